"""Pictures of a comparison: the task matrix as a heat map, and curves over tasks with bands over seeds.

Built with matplotlib's object interface on the Agg canvas: no pyplot, hence no window, no global state and nothing to
close. Colours are the Okabe-Ito palette, and every method also has its own marker and dash pattern, so that the
curves can be told apart without colour. Matrices are expected as fractions in [0, 1] and are printed in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from avalanche_firn.evaluation.statistics import curve_interval

# Okabe and Ito, "Color universal design", without black and yellow (too pale on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F5F5F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
DPI = 150


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def task_matrix_figure(
    matrix: ArrayLike, *, title: str | None = None, task_names: Sequence[str] | None = None
) -> Figure:
    """Heat map of an accuracy matrix with the percentage in every cell.

    Args:
        matrix: (T, N) fractions; NaN (not evaluated) stays grey.
        title: line above the map.
        task_names: N labels for the columns; default the task indices.

    Returns:
        A figure that no pyplot manager knows; cells are labelled up to 20 tasks, beyond that only coloured.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"matrix: got shape {values.shape}; accepted is (T, N) with at least one row and column")
    rows, columns = values.shape
    names = [str(i) for i in range(columns)] if task_names is None else [str(name) for name in task_names]
    if len(names) != columns:
        raise ValueError(f"task_names: got {len(names)}; accepted is one for each of {columns} columns")
    cell = min(0.62, 9.0 / max(rows, columns))
    figure, axes = _figure(max(3.6, cell * columns + 1.9), max(1.8, cell * rows + 1.3))
    colours = colormaps["viridis"].with_extremes(bad="#f2f2f2")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0.0, vmax=1.0, aspect="equal")
    if max(rows, columns) <= 20:
        for t, i in zip(*np.nonzero(~np.isnan(values)), strict=True):
            tone = "black" if values[t, i] > 0.55 else "white"
            size = min(9.0, 17.0 * cell)
            axes.text(i, t, f"{100 * values[t, i]:.0f}", ha="center", va="center", color=tone, fontsize=size)
    step = max(1, -(-max(rows, columns) // 20))
    crowded = max(len(name) for name in names) > 4
    axes.set_xticks(
        range(0, columns, step), names[::step], rotation=45 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_yticks(range(0, rows, step))
    axes.set_xlabel("evaluated task")
    axes.set_ylabel("after training step")
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy", format=PercentFormatter(1.0, decimals=0), shrink=0.9)
    bar.outline.set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)
    return figure


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
) -> Figure:
    """One line per method over the tasks, with its confidence band over the seeds.

    Args:
        curves: method name -> (S, T) one row per seed; NaN where there is no value. A method with a single point
            (joint training) becomes a horizontal line: it is a level to compare with, not a course over tasks.
        title, xlabel, ylabel: labels; without ``steps``, ``x`` counts tasks from 1.
        percent: the values are fractions, printed in percent.
        limits: of the y axis; default fitted to the data.
        confidence: of the band (Student t); no band at points with fewer than two seeds.
        steps: (T,) x position of each point of the longest curve, rising, the same for all; default 1 to T.

    Raises:
        ValueError: no curve, a curve of another shape, steps that aren't T rising numbers.
    """
    if not curves:
        raise ValueError("curves: got nothing to draw; accepted is at least one method")
    statistics = {method: curve_interval(values, confidence) for method, values in curves.items()}
    tasks = max(len(mean) for mean, _, _ in statistics.values())
    places = np.arange(1, tasks + 1) if steps is None else np.asarray(steps)
    if places.shape != (tasks,) or not np.isfinite(places).all() or (np.diff(places) <= 0).any():
        raise ValueError(f"steps: got {places.tolist()}; accepted is one number for each of {tasks} points, rising")
    figure, axes = _figure(7.4, 4.2)
    for index, (method, (mean, lower, upper)) in enumerate(statistics.items()):
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        dash = DASHES[(index // len(PALETTE)) % len(DASHES)]
        x = places[: len(mean)]
        if len(mean) == 1 < tasks:
            x, marker, dash = places[[0, -1]], "", (0, (5, 3))
            mean, lower, upper = (np.repeat(part, 2) for part in (mean, lower, upper))
        axes.plot(x, mean, color=colour, marker=marker, markersize=5, linestyle=dash, linewidth=1.8, label=method)
        if np.isfinite(lower).any():
            axes.fill_between(x, lower, upper, color=colour, alpha=0.16, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if limits is not None:
        axes.set_ylim(*limits)
    axes.grid(axis="y", color="#d9d9d9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG at 150 dpi, making the folder if needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path
