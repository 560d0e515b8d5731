"""Pictures that set the methods of a comparison side by side: ranking, paired differences, accuracy against cost.

The maps (task matrices side by side, confusion of tasks, frozen matrices) are in
:mod:`~avalanche_firn.evaluation.map_figures` and can be imported from here as well. Built like those in
:mod:`~avalanche_firn.evaluation.figures`, in whose five colours everything but the data is drawn. A mean without an
interval (one seed) has no whiskers: nothing is made up. Cost: 0.05 to 0.3 s a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox

from avalanche_firn.evaluation.figures import (
    DPI,
    FONT,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    WIDTH,
    Style,
    in_legend,
    inked,
    new_figure,
    plain_texts,
    styles_of,
    tidy,
    wrapped,
)
from avalanche_firn.evaluation.map_figures import frozen_map_figure, task_confusion_figure, task_matrices_figure
from avalanche_firn.evaluation.statistics import Interval

__all__ = [
    "cost_figure",
    "differences_figure",
    "frozen_map_figure",
    "ranking_figure",
    "task_confusion_figure",
    "task_matrices_figure",
]

_LINE = 0.17  # inches of a line of text of 9 points


def _lines(
    intervals: Mapping[str, Interval], xlabel: str, scale: float, size: tuple[float, float] | None, below: float
) -> tuple[Figure, Axes, list[str]]:
    """An empty dot plot: one line per label from top to bottom, the numbers at the right."""
    if not intervals:
        raise ValueError("intervals: got nothing to draw; accepted is at least one")
    width = WIDTH if size is None else size[0]
    names = [wrapped(label, int(4.2 * width)) for label in intervals]
    heights = [max(2, 1 + name.count("\n") + 0.7) * _LINE for name in names]
    figure = new_figure(width, sum(heights) + 0.6 + below if size is None else size[1])
    axes = figure.add_subplot()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel, fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)
    for place, interval in enumerate(intervals.values()):
        axes.annotate(
            interval.format(scale),
            (1.02, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=FONT,
            color=INK,
        )
    ends = [end for i in intervals.values() for end in (i.mean, i.lower, i.upper) if end is not None]
    low, high = scale * min(ends), scale * max(ends)
    room = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3 * abs(scale))
    axes.set_xlim(low - room, high + room)
    return figure, axes, names


@plain_texts
def ranking_figure(
    intervals: Mapping[str, Interval],
    *,
    xlabel: str,
    scale: float = 100.0,
    styles: Mapping[str, Style] | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Dot plot: one line per method from top to bottom, its mean as a dot, its interval as whiskers and as numbers.

    Args:
        intervals: label -> interval, in the order in which they are drawn.
        xlabel: name and unit of the quantity.
        scale: factor before printing and drawing, 100 for fractions in percent.
        styles: of the methods; default :func:`~avalanche_firn.evaluation.figures.styles_of` their labels.
        size: inches (width, height); default 4.6 across, and as high as there are methods.

    Raises:
        ValueError: no interval.
    """
    styles = {**styles_of(intervals), **(styles or {})}
    figure, axes, _ = _lines(intervals, xlabel, scale, size, 0.0)
    for place, (label, interval) in enumerate(intervals.items()):
        style = styles[label]
        if interval.lower is not None and interval.upper is not None:
            ends = [scale * interval.lower, scale * interval.upper]
            axes.plot(ends, [place, place], color=style.colour, linewidth=1.8, marker="|", markersize=7)
        axes.plot([scale * interval.mean], [place], color=style.colour, marker=style.marker, markersize=7)
    return inked(figure)


def excludes_zero(interval: Interval) -> bool:
    """Whether the interval exists and zero lies outside of it."""
    return interval.lower is not None and interval.upper is not None and not interval.lower <= 0.0 <= interval.upper


@plain_texts
def differences_figure(
    intervals: Mapping[str, Interval],
    *,
    xlabel: str,
    scale: float = 100.0,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Dot plot of differences around a line at zero; filled where the interval excludes zero, hollow elsewhere.

    Args:
        intervals: what is compared -> interval of the difference, in the order in which they are drawn.
        xlabel, scale, size: see :func:`ranking_figure`.

    Raises:
        ValueError: no interval.
    """
    figure, axes, _ = _lines(intervals, xlabel, scale, size, 0.6)
    axes.axvline(0.0, color=MUTED, linewidth=1.2)
    low, high = axes.get_xlim()
    room = 0.05 * (max(high, 0.0) - min(low, 0.0))
    axes.set_xlim(min(low, -room), max(high, room))
    colour = PALETTE[0]
    for place, interval in enumerate(intervals.values()):
        if interval.lower is not None and interval.upper is not None:
            ends = [scale * interval.lower, scale * interval.upper]
            axes.plot(ends, [place, place], color=colour, linewidth=1.8, marker="|", markersize=7)
        face = colour if excludes_zero(interval) else PAPER
        axes.plot(
            [scale * interval.mean], [place], color=colour, marker="o", markersize=7, mfc=face, markeredgewidth=1.6
        )
    marks = [
        Line2D([], [], color=colour, linestyle="", marker="o", markersize=7, mfc=face, markeredgewidth=1.6, label=text)
        for face, text in (
            (colour, "zero lies outside the interval"),
            (PAPER, "zero lies inside it, or there is no interval"),
        )
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=1, frameon=False, fontsize=FONT)
    return inked(figure)


def _renderer(figure: Any) -> Any:
    canvas: Any = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)  # as new_figure made it
    return canvas.get_renderer()  # type: ignore[no-untyped-call]


def _beside(
    axes: Axes, points: Sequence[tuple[str, float, float]], obstacles: Sequence[tuple[float, float, float]]
) -> bool:
    """Write every label beside its point; False, and nothing written, where one finds no free place.

    Args:
        points: label, x, y. obstacles: x, lower, upper of every error bar, in data coordinates.
    """
    renderer = _renderer(axes.get_figure())
    dot = DPI / 72.0
    spots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = [Bbox.from_extents(x - 5 * dot, y - 5 * dot, x + 5 * dot, y + 5 * dot) for x, y in spots]
    for x, low, high in obstacles:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        taken.append(Bbox.from_extents(left - 2 * dot, bottom, left + 2 * dot, top))
    frame = axes.get_window_extent(renderer)
    written = []
    # right, left, above, below, the corners; then the same farther away
    places = [
        (far * dx, far * dy)
        for far in (1.0, 1.8)
        for dx, dy in ((8, 0), (-8, 0), (0, 9), (0, -9), (7, 8), (7, -8), (-7, 8), (-7, -8))
    ]
    for label, x, y in points:
        for dx, dy in places:
            across, up = ("left" if dx > 0 else "right") if dx else "center", "center"
            if dy:
                up = "bottom" if dy > 0 else "top"
            text = axes.annotate(
                label,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                fontsize=FONT,
                color=INK,
                annotation_clip=False,
            )
            box = text.get_window_extent(renderer)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 + 4 and box.y0 >= frame.y0 and box.y1 <= frame.y1 + 4
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                written.append(text)
                break
            text.remove()
        else:
            for text in written:
                text.remove()
            return False
    return True


def _scale_costs(axes: Axes, costs: Sequence[float], log: bool) -> None:
    """Limits with room for labels, and ticks that a reader can read."""
    low, high = min(costs), max(costs)
    if log and high > low:
        room = (high / low) ** 0.12
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        ratio = high / low
        subs = (
            (1.0,) if ratio > 200 else (1.0, 3.0) if ratio > 20 else (1.0, 2.0, 5.0) if ratio > 4 else (*range(1, 10),)
        )
        axes.xaxis.set_major_locator(LogLocator(10.0, subs=subs, numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.12 * (high - low) or 0.5 * abs(high) or 1.0
        axes.set_xlim(low - room if low - room > 0 or low <= 0 else 0.0, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    letters = EngFormatter(sep=" ")
    large = high >= 20_000
    axes.xaxis.set_major_formatter(letters if large else FuncFormatter(lambda value, _: f"{value:g}"))


@plain_texts
def cost_figure(
    points: Mapping[str, tuple[float, float, float | None]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    styles: Mapping[str, Style] | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Accuracy against a cost, one point per method; cheap and good is at the top left.

    Args:
        points: label -> (cost, mean accuracy as a fraction, half the width of its interval or None).
        xlabel: name and unit of the cost.
        ylabel: name of the accuracy; its axis is in percent.
        log: logarithmic costs.
        styles: of the methods; default :func:`~avalanche_firn.evaluation.figures.styles_of` their labels.
        size: inches (width, height); default 4.6 x 3.2, and what a legend takes.

    Returns:
        A figure with the labels beside the points, or in a legend below where they'd lie on each other.

    Raises:
        ValueError: no point, a cost or accuracy that isn't finite, a cost of 0 or less with ``log``.
    """
    if not points:
        raise ValueError("points: got nothing to draw; accepted is at least one method")
    for label, (cost, mean, _) in points.items():
        if not math.isfinite(cost) or not math.isfinite(mean):
            raise ValueError(f"points: got {(cost, mean)} of {label!r}; accepted are finite numbers")
        if log and cost <= 0:
            raise ValueError(f"points: got a cost of {cost} of {label!r}; accepted with log=True is more than 0")
    styles = {**styles_of(points), **(styles or {})}
    costs = [cost for cost, _, _ in points.values()]
    bars = [(cost, mean - (half or 0.0), mean + (half or 0.0)) for cost, mean, half in points.values()]
    low, high = min(bar[1] for bar in bars), max(bar[2] for bar in bars)
    rise = 0.09 * (high - low) or 0.02
    letters = max(map(len, points))

    def drawn(rows: int) -> tuple[Figure, Axes]:
        width, height = (WIDTH, 3.2 + _LINE * rows) if size is None else size
        figure = new_figure(width, height, constrained=False)
        # a fixed place, so that labels stay where they were tried
        bottom = (0.52 + _LINE * rows + (0.1 if rows else 0.0)) / height
        axes = figure.add_axes((0.68 / width, bottom, 1 - 0.86 / width, 1 - bottom - 0.12 / height))
        _scale_costs(axes, costs, log)
        axes.set_ylim(low - rise, high + rise)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(xlabel, fontsize=FONT)
        axes.set_ylabel(ylabel, fontsize=FONT)
        tidy(axes, "both")
        for label, (cost, mean, half) in points.items():
            style = styles[label]
            if half is not None:
                axes.plot([cost, cost], [mean - half, mean + half], color=style.colour, linewidth=1.4, alpha=0.6)
            axes.plot([cost], [mean], color=style.colour, marker=style.marker, markersize=7, ls="", label=label)
        box = axes.yaxis.get_tightbbox(_renderer(figure))
        if box is not None and box.x0 < 3:  # longer numbers, as 99.95 %
            more = (3 - box.x0) / (DPI * width)
            place = axes.get_position()
            axes.set_position((place.x0 + more, place.y0, place.width - more, place.height))
        return figure, axes

    figure, axes = drawn(0)
    shown = [(wrapped(label, 20), cost, mean) for label, (cost, mean, _) in points.items()]
    # those with the least room, at the right, choose first
    if len(points) > 12 or not _beside(axes, sorted(shown, key=lambda point: -point[1]), bars):
        width = WIDTH if size is None else size[0]
        columns = max(1, min(len(points), int(width / (0.082 * letters + 0.5))))
        names = [in_legend(label, width) for label in points]
        figure, axes = drawn(-(-len(points) // columns) + sum(name.count("\n") for name in names))
        marks = [line for line in axes.get_lines() if line.get_label() in points]
        look: dict[str, Any] = {"frameon": False, "fontsize": FONT, "columnspacing": 1.2}
        figure.legend(marks, names, loc="lower center", ncols=columns, **look)
    return inked(figure)
