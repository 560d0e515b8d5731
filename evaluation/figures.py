"""Pictures of a comparison: how methods look, the task matrix as a heat map, curves over tasks with bands over seeds.

Built with matplotlib's object interface on the Agg canvas: no pyplot, hence no window, no global state and nothing to
close. Colours are the Okabe-Ito palette (Okabe and Ito, "Color universal design"; orange, sky blue and grey shifted in
lightness so that each has a contrast of 3:1 or more on white and on a dark page), and every method also has its own
marker and dash pattern, so that the curves can be told apart without colour. Matrices are expected as fractions in
[0, 1] and are printed in percent.

Everything that is neither data nor a cell of a map is drawn in one of five colours, `INK` (text), `MUTED` (ticks, axes,
notes), `GRID` (grid lines), `EMPTY` (cells that were not measured) and `PAPER` (background). No other thing has these
colours, so a page that holds a picture as SVG may replace them by its own, for instance in dark mode. Default size is
4.6 inches across with letters of 9 points or more: legible on a phone.

Names are drawn letter by letter: a dollar sign begins no formula and nothing is given to TeX (:func:`plain_texts`).
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from avalanche_firn.evaluation.statistics import curve_interval

# blue, vermillion, bluish green, reddish purple, orange, sky blue, grey
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#BC8200", "#3D9BD1", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Dash = str | tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
DPI = 150
INK, MUTED, GRID, EMPTY, PAPER = "#1b1f24", "#5c6371", "#d8dce1", "#eceef1", "#fffffe"
WIDTH = 4.6  # inches
FONT = 9.0  # points
PLAIN_TEXTS: Any = {"text.parse_math": False, "text.usetex": False}
_P = ParamSpec("_P")
_R = TypeVar("_R")
_LETTER = 0.082  # inches of an average letter of 9 points, on the safe side


@dataclass(frozen=True)
class Style:
    """How a method looks in every picture: a hex colour, a matplotlib marker and a matplotlib dash pattern."""

    colour: str
    marker: str
    dash: Dash


def styles_of(labels: Iterable[str]) -> dict[str, Style]:
    """A style of its own for every label, the same ones in whatever order the labels come (a ranking may change).

    Up to seven labels differ in colour and marker; up to 28 in the pair of colour and dash pattern, and in the pair of
    colour and marker; up to 196 in the three together.

    Returns:
        Label -> style, in the order given.
    """
    order = list(dict.fromkeys(labels))
    found = {}
    count = len(PALETTE)
    for index, label in enumerate(sorted(order)):
        block = index // count
        turn = block // len(DASHES)
        marker = MARKERS[(index + block + turn) % len(MARKERS)]
        found[label] = Style(PALETTE[index % count], marker, DASHES[block % len(DASHES)])
    return {label: found[label] for label in order}


def new_figure(width: float, height: float, *, constrained: bool = True) -> Figure:
    """An empty figure of so many inches on the Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def plain_texts(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that draws or saves figures, with every text taken literally."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with matplotlib.rc_context(PLAIN_TEXTS):
            return draw(*args, **kwargs)

    return drawn


def wrapped(label: str, letters: int) -> str:
    """The label in lines of so many letters; what has no space is broken within."""
    return "\n".join(textwrap.wrap(label, max(letters, 1))) or label


def inked(figure: Figure) -> Figure:
    """Draw what isn't data in the colours of this module; texts inside the axes (numbers in cells) stay as they are.

    For figures that were drawn elsewhere too. Returns the same figure.
    """
    figure.patch.set_facecolor(PAPER)
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if to_hex(axes.get_facecolor()) == "#ffffff":
            axes.set_facecolor(PAPER)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_tick_params(which="both", color=MUTED, labelcolor=INK)
            texts += [axis.label, axis.offsetText]
            for line in axis.get_gridlines():
                if to_hex(line.get_color()) != PAPER:
                    line.set_color(GRID)
        for spine in axes.spines.values():
            spine.set_edgecolor(MUTED)
        texts += [axes.title, axes._left_title, axes._right_title]  # type: ignore[attr-defined]
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set(facecolor=PAPER, edgecolor=GRID)
            texts += legend.get_texts()
    for text in texts:
        if to_hex(text.get_color()) != MUTED:
            text.set_color(INK)
    return figure


def checked_matrix(matrix: ArrayLike, name: str = "matrix") -> NDArray[np.float64]:
    """(T, N) float64. Raises ValueError for another number of axes or an empty one."""
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name}: got shape {values.shape}; accepted is (T, N) with at least one row and column")
    return values


def draw_cells(
    axes: Axes,
    values: NDArray[np.float64],
    cell: float,
    *,
    colours: Colormap | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    texts: NDArray[Any] | None = None,
) -> AxesImage:
    """A map of (T, N) numbers: grey where NaN, lines between the cells, numbers in them where they fit.

    Args:
        axes: to draw into. values: (T, N). cell: width of a cell in inches, to know whether three digits fit.
        colours: default viridis. limits: of the colour scale.
        texts: (T, N) strings for the cells; default the values in percent.
    """
    rows, columns = values.shape
    colours = (colormaps["viridis"] if colours is None else colours).with_extremes(bad=(0, 0, 0, 0))
    axes.set_facecolor(EMPTY)  # shines through where nothing was measured
    low, high = limits
    masked = np.ma.masked_invalid(values)
    image = axes.imshow(masked, cmap=colours, vmin=low, vmax=high, aspect="equal", interpolation="none")
    if cell >= 0.24:
        for t, i in zip(*np.nonzero(np.isfinite(values)), strict=True):
            red, green, blue, _ = colours((values[t, i] - low) / (high - low))
            tone = "#080808" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#ffffff"
            text = f"{100 * values[t, i]:.0f}" if texts is None else str(texts[t, i])
            axes.text(i, t, text, ha="center", va="center", color=tone, fontsize=FONT)
    if cell >= 0.06:
        axes.set_xticks(np.arange(-0.5, columns), minor=True)
        axes.set_yticks(np.arange(-0.5, rows), minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=FONT)
    axes.spines[:].set_visible(False)
    return image


@plain_texts
def task_matrix_figure(
    matrix: ArrayLike,
    *,
    title: str | None = None,
    task_names: Sequence[str] | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Heat map of an accuracy matrix with the percentage in every cell.

    Args:
        matrix: (T, N) fractions; NaN (not evaluated) stays grey.
        title: line above the map.
        task_names: N labels for the columns; default the task indices.
        size: inches (width, height); default grows with the number of tasks up to some 11 inches.

    Returns:
        A figure that no pyplot manager knows; cells are labelled where the numbers fit (in the default size up to 20
        tasks), else only coloured.
    """
    values = checked_matrix(matrix)
    rows, columns = values.shape
    names = [str(i) for i in range(columns)] if task_names is None else [str(name) for name in task_names]
    if len(names) != columns:
        raise ValueError(f"task_names: got {len(names)}; accepted is one for each of {columns} columns")
    cell = min(0.62, 9.0 / max(rows, columns))
    if size is None:
        size = (max(3.6, cell * columns + 1.9), max(1.8, cell * rows + 1.3))
    else:
        cell = min((size[0] - 1.6) / columns, (size[1] - 0.9) / rows)
    figure = new_figure(*size)
    axes = figure.add_subplot()
    image = draw_cells(axes, values, cell if max(rows, columns) <= 20 else min(cell, 0.23))
    step = max(1, -(-max(rows, columns) // min(20, max(2, int(max(rows, columns) * cell / 0.2)))))
    crowded = max(len(name) for name in names) > 4
    axes.set_xticks(
        range(0, columns, step), names[::step], rotation=45 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_yticks(range(0, rows, step))
    axes.set_xlabel("evaluated task", fontsize=FONT)
    axes.set_ylabel("after training step", fontsize=FONT)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), shrink=0.9)
    bar.set_label("accuracy", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    bar.outline.set_visible(False)
    if title:
        axes.set_title(title, fontsize=FONT + 1)
    return inked(figure)


def legend_below(figure: Figure, width: float, labels: Sequence[str]) -> None:
    """A legend under the axes, with as many columns as there is room for."""
    longest = max(map(len, labels)) * _LETTER + 0.6
    columns = max(1, min(len(labels), int(width / longest)))
    legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=FONT, columnspacing=1.2)
    for text in legend.get_texts():
        text.set_text(in_legend(text.get_text(), width))


def in_legend(label: str, width: float) -> str:
    """A label whose lines fit, with their mark, into a legend of so many inches; lines that fit stay as they are."""
    letters = max(8, int((width - 0.6) / _LETTER))
    return "\n".join(line if len(line) <= letters else wrapped(line, letters) for line in label.split("\n"))


@plain_texts
def curves_figure(
    curves: Mapping[str, ArrayLike],
    *,
    title: str | None = None,
    xlabel: str = "tasks learnt",
    ylabel: str = "accuracy",
    percent: bool = True,
    limits: tuple[float, float] | None = None,
    confidence: float = 0.95,
    steps: ArrayLike | None = None,
    styles: Mapping[str, Style] | None = None,
    size: tuple[float, float] | None = None,
    legend: Literal["right", "below", "none"] = "below",
) -> Figure:
    """One line per method over the tasks, with its confidence band over the seeds.

    Args:
        curves: method name -> (S, T) one row per seed; NaN where there is no value. A method with a single point
            (joint training) becomes a horizontal line: it is a level to compare with, not a course over tasks.
        title, xlabel, ylabel: labels; without ``steps``, ``x`` counts tasks from 1.
        percent: the values are fractions, printed in percent.
        limits: of the y axis; default fitted to the data, not beyond 102 % where all means are shares.
        confidence: of the band (Student t); no band at points with fewer than two seeds.
        steps: (T,) x position of each point of the longest curve, rising, the same for all; default 1 to T.
        styles: of the methods; default :func:`styles_of` their names.
        size: inches (width, height) with the legend; default 4.6 x 3.1 and what a legend below takes, or 7.4 x 4.2
            with one at the right.
        legend: where the names are.

    Raises:
        ValueError: no curve, a curve of another shape, steps that aren't T rising numbers, a legend elsewhere.
    """
    if not curves:
        raise ValueError("curves: got nothing to draw; accepted is at least one method")
    if legend not in ("right", "below", "none"):
        raise ValueError(f"legend: got {legend!r}; accepted is 'right', 'below' or 'none'")
    statistics = {method: curve_interval(values, confidence) for method, values in curves.items()}
    tasks = max(len(mean) for mean, _, _ in statistics.values())
    places = np.arange(1, tasks + 1) if steps is None else np.asarray(steps)
    if places.shape != (tasks,) or not np.isfinite(places).all() or (np.diff(places) <= 0).any():
        raise ValueError(f"steps: got {places.tolist()}; accepted is one number for each of {tasks} points, rising")
    styles = {**styles_of(curves), **(styles or {})}
    if size is None:
        columns = max(1, int(WIDTH / (max(map(len, curves)) * _LETTER + 0.6)))
        rows = -(-len(curves) // columns) if legend == "below" else 0
        size = (7.4, 4.2) if legend == "right" else (WIDTH, 3.1 + 0.17 * rows)
    figure = new_figure(*size)
    axes = figure.add_subplot()
    drawn = list(statistics.values())
    every = max(1, -(-tasks // 16))  # a marker at every point would hide a long line
    for method, (mean, lower, upper) in statistics.items():
        style = styles[method]
        x, marker, dash = places[: len(mean)], style.marker, style.dash
        if len(mean) == 1 < tasks:
            x, marker, dash = places[[0, -1]], "", (0, (5, 3))
            mean, lower, upper = (np.repeat(part, 2) for part in (mean, lower, upper))
        axes.plot(
            x,
            mean,
            color=style.colour,
            marker=marker,
            markersize=5,
            markevery=every,
            linestyle=dash,
            linewidth=1.8,
            label=method,
        )
        if np.isfinite(lower).any():
            axes.fill_between(x, lower, upper, color=style.colour, alpha=0.16, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel, fontsize=FONT)
    axes.set_ylabel(ylabel, fontsize=FONT)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if limits is not None:
        axes.set_ylim(*limits)
    elif percent and axes.get_ylim()[1] > 1.02 and all((mean[~np.isnan(mean)] <= 1).all() for mean, *_ in drawn):
        axes.set_ylim(top=1.02)  # an interval may reach beyond 100 %, a share can't
    tidy(axes)
    if title:
        axes.set_title(wrapped(title, int((size[0] - 0.65) / 0.09)), fontsize=FONT + 1, loc="left")
    if legend == "right":
        figure.legend(loc="outside right upper", frameon=False, fontsize=FONT)
    elif legend == "below":
        legend_below(figure, size[0], list(curves))
    return inked(figure)


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Faint grid behind the data, no frame at the top and the right, labels of 9 points."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)


@plain_texts
def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG at 150 dpi, making the folder if needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path
