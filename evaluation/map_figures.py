"""Maps of a comparison: task matrices side by side on one scale, confusion of tasks, matrices frozen over the tasks.

Built like those in :mod:`~avalanche_firn.evaluation.figures`. What was not measured is grey. Panels are laid out in
inches here (matplotlib's constrained layout takes seconds for twenty panels). Cost: 0.1 s a picture, 0.5 s for twenty
methods of a hundred tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from avalanche_firn.evaluation.figures import (
    EMPTY,
    FONT,
    INK,
    WIDTH,
    checked_matrix,
    draw_cells,
    inked,
    new_figure,
    plain_texts,
    wrapped,
)

__all__ = ["frozen_map_figure", "task_confusion_figure", "task_matrices_figure"]

_LINE = 0.17  # inches of a line of text of 9 points
_DIGITS = 3  # of the number of a block; our choice


def _ticks(count: int, cell: float, letters: int = 0) -> range:
    """Every so many places, so that their numbers don't run into each other."""
    wide = 0.085 * max(letters, len(str(count - 1))) + 0.06
    step = max(1, math.ceil(wide / cell))
    for nice in (1, 2, 5, 10, 20, 50, 100):
        if nice >= step:
            return range(0, count, nice)
    return range(0, count, step)


def _head(title: str | None, room: float) -> tuple[str, float]:
    """The title in lines that fit into so many inches, and the height that they take above the map."""
    lines = wrapped(title, int(room / 0.09)) if title else ""
    return lines, 0.12 + (0.1 + (_LINE + 0.02) * (1 + lines.count("\n")) if lines else 0.0)


def _colour_bar(figure: Figure, left: float, bottom: float, length: float, label: str) -> None:
    """A scale from 0 to 100 % lying below the panels; places in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, length / width, 0.1 / height))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0.0, 1.0), colormaps["viridis"]),
        cax=axes,
        orientation="horizontal",
        format=PercentFormatter(1.0, decimals=0),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT)
    bar.set_label(label, fontsize=FONT)


def _panels(count: int, tasks: int, width: float, height: float | None) -> int:
    """How many panels stand side by side."""
    most = max(1, int(width / (1.9 if count <= 4 and tasks <= 8 else 1.35 if count <= 9 else 1.0)))
    if height is None:
        return min(count, most)
    # the number with the largest squares
    return max(range(1, count + 1), key=lambda n: min(width / n, height / math.ceil(count / n)))


@plain_texts
def task_matrices_figure(
    matrices: Mapping[str, ArrayLike], *, title: str | None = None, size: tuple[float, float] | None = None
) -> Figure:
    """Accuracy matrices of several methods as small maps on one scale from 0 to 100 %.

    Args:
        matrices: label -> (T, N) fractions, row t after training step t, column i the evaluated task; NaN (not
            evaluated) is grey. T and N may differ: joint training has one row.
        title: line above all of them.
        size: inches (width, height); default 4.6 across, and as high as the panels need.

    Returns:
        A figure with one set of axes per method, in the order given, and a colour bar. Cells have numbers where they
        fit (up to some six tasks in the default size).

    Raises:
        ValueError: no matrix, one that isn't (T, N).
    """
    if not matrices:
        raise ValueError("matrices: got nothing to draw; accepted is at least one method")
    values = {label: checked_matrix(matrix, f"matrix of {label!r}") for label, matrix in matrices.items()}
    rows, columns = (max(shape) for shape in zip(*(matrix.shape for matrix in values.values()), strict=True))
    width = WIDTH if size is None else size[0]
    left, gap, bottom = 0.5, 0.1, 1.05
    inner = width - left
    told, top = _head(title, inner)
    across = _panels(len(values), max(rows, columns), inner, None if size is None else size[1] - top - bottom)
    down = math.ceil(len(values) / across)
    room = inner / across - gap
    names = [wrapped(label, max(6, int(room / 0.082))) for label in values]
    # height of the names above each line of panels, and of its panels in cells
    parts = [range(start, min(start + across, len(names))) for start in range(0, len(names), across)]
    heads = [0.1 + _LINE * max(1 + names[index].count("\n") for index in part) for part in parts]
    tall = [max([*values.values()][index].shape[0] for index in part) for part in parts]
    cell = min(room / columns, 0.55)
    if size is not None:
        free = size[1] - top - bottom - sum(heads) - 0.12 * down
        cell = min(cell, max(0.01, free / sum(tall)))
    height = top + sum(heads) + cell * sum(tall) + 0.12 * down + bottom if size is None else size[1]
    figure = new_figure(width, height, constrained=False)
    for index, matrix in enumerate(values.values()):
        line, place = divmod(index, across)
        x = left + place * (room + gap)
        y = top + sum(heads[: line + 1]) + cell * sum(tall[:line]) + 0.12 * line
        own_rows, own_columns = matrix.shape
        axes = figure.add_axes(
            (x / width, 1 - (y + cell * own_rows) / height, cell * own_columns / width, cell * own_rows / height)
        )
        draw_cells(axes, matrix, cell)
        axes.set_title(names[index], fontsize=FONT, loc="left", pad=4)
        lowest = index + across >= len(values) or own_rows != rows
        axes.set_xticks(_ticks(own_columns, cell) if lowest else [])
        axes.set_yticks(_ticks(own_rows, max(cell, 0.01), 2) if place == 0 or own_rows != rows else [])
    figure.text(left / width, 0.76 / height, "evaluated task", fontsize=FONT, va="top", color=INK)
    figure.text(
        0.1 / width,
        1 - (top + heads[0]) / height,
        "after training step",
        fontsize=FONT,
        rotation=90,
        va="top",
        ha="left",
        color=INK,
    )
    _colour_bar(figure, left + 1.25, 0.5, min(2.4, inner - 1.45), "accuracy")
    if told:
        figure.text(left / width, 1 - 0.08 / height, told, fontsize=FONT + 1, va="top", color=INK)
    return inked(figure)


@plain_texts
def task_confusion_figure(
    shares: ArrayLike, *, title: str | None = None, size: tuple[float, float] | None = None
) -> Figure:
    """Which task's classes the samples of each task were taken for.

    Args:
        shares: (T, T) or (T, T + 1) fractions: row the true task, column the task of the predicted class, and last
            those that were predicted as a class of no task. NaN (no sample) is grey.
        title: line above the map.
        size: inches (width, height); default 4.6 across.

    Raises:
        ValueError: another shape.
    """
    values = checked_matrix(shares, "shares")
    rows, columns = values.shape
    if columns not in (rows, rows + 1):
        raise ValueError(f"shares: got shape {values.shape}; accepted is (T, T), or (T, T + 1) with one for no task")
    width = WIDTH if size is None else size[0]
    left, bottom = 0.75, 1.2
    told, top = _head(title, width - left)
    cell = min((width - left - 0.15) / columns, 0.55)
    if size is not None:
        cell = min(cell, (size[1] - top - bottom) / rows)
    height = top + bottom + cell * rows if size is None else size[1]
    figure = new_figure(width, height, constrained=False)
    axes = figure.add_axes(
        (left / width, 1 - (top + cell * rows) / height, cell * columns / width, cell * rows / height)
    )
    draw_cells(axes, values, cell)
    places = [*_ticks(rows, cell)]
    names = [str(place) for place in places]
    if columns > rows:
        while places and (rows - places[-1]) * cell < 0.33:  # room for the word
            places, names = places[:-1], names[:-1]
        places, names = [*places, rows], [*names, "none"]
    axes.set_xticks(places, names)
    axes.set_yticks(_ticks(rows, cell, 2))
    axes.set_xlabel("task of the predicted class", fontsize=FONT, loc="left")
    axes.set_ylabel("true task", fontsize=FONT)
    _colour_bar(figure, left, 0.5, min(2.6, width - left - 0.3), "share of the task's samples")
    if told:
        figure.text(left / width, 1 - 0.08 / height, told, fontsize=FONT + 1, va="top", color=INK)
    return inked(figure)


def _split(name: str) -> tuple[tuple[str, ...], str]:
    """Where the matrix is, up to the last number in its name, and what it is: (("blocks", "3"), "attn.qkv.q")."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if _number(part) is not None]
    end = numbers[-1] + 1 if numbers else 0
    return tuple(parts[:end]), ".".join(parts[end:])


def _number(part: str) -> int | None:
    """Of a block; a part of a name that is no number, or longer than one of a block, is none."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) <= _DIGITS else None


def _blocks(found: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """All blocks in order; those between the first and the largest number of a sequence too."""
    every = set(found)
    for block in found:
        if block:
            every |= {(*block[:-1], str(number)) for number in range(_number(block[-1]) or 0)}

    def key(block: tuple[str, ...]) -> list[tuple[bool, int, str]]:
        return [(_number(part) is None, _number(part) or 0, part) for part in block]

    return sorted(every, key=key)


@plain_texts
def frozen_map_figure(
    frozen: Sequence[Sequence[str]],
    *,
    matrices: Sequence[str] | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """When each weight matrix was frozen: a map of blocks and kinds of matrix, coloured by the task.

    Args:
        frozen: names of all matrices that were frozen after each task, such as ``backbone.blocks.3.attn.qkv.v``.
        matrices: names of all that could be; default those of ``frozen`` and, of the same kinds, those of the blocks
            with a smaller number.
        title: line above the map.
        size: inches (width, height); default 4.6 across.

    Returns:
        A figure; never frozen is pale, and a cell has the number of the task (from 0) where it fits.

    Raises:
        ValueError: no task.
    """
    if not frozen:
        raise ValueError("frozen: got nothing to draw; accepted is one list of names for each task")
    first: dict[str, int] = {}
    for task, names in enumerate(frozen):
        for name in names:
            first.setdefault(name, task)
    known = dict.fromkeys([*(matrices or ()), *first])
    places = {name: _split(name) for name in known}
    blocks = _blocks({block for block, _ in places.values()}) or [()]
    kinds = list(dict.fromkeys(sorted(kind for _, kind in places.values()))) or ["no matrix"]
    values: NDArray[np.float64] = np.full((len(kinds), len(blocks)), np.nan)
    for name, task in first.items():
        block, kind = places[name]
        values[kinds.index(kind), blocks.index(block)] = task
    labels = _short(blocks)
    letters = max(map(len, kinds))
    width = WIDTH if size is None else size[0]
    left = min(0.5 * width, 0.2 + 0.082 * letters)
    turned = max(map(len, labels)) > 2
    told, top = _head(title, width - 0.2)
    bottom = 1.15 + (0.09 * max(map(len, labels)) if turned else 0.0)
    cell = min((width - left - 0.12) / len(blocks), 0.4)
    tall = max(cell, 0.2)  # a line of text
    if size is not None:
        tall = min(tall, (size[1] - top - bottom) / len(kinds))
    height = top + bottom + tall * len(kinds) if size is None else size[1]
    figure = new_figure(width, height, constrained=False)
    axes = figure.add_axes(
        (left / width, 1 - (top + tall * len(kinds)) / height, cell * len(blocks) / width, tall * len(kinds) / height)
    )
    tasks = len(frozen)
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.95, tasks)))
    numbers = np.where(np.isfinite(values), np.nan_to_num(values).astype(int), -1).astype(str)
    # three digits need 0.24 inches, one 0.13
    fits = 0.24 if min(cell, tall) >= 0.08 * len(str(tasks - 1)) + 0.06 else 0.0
    draw_cells(
        axes, values, fits or min(cell, 0.23), colours=colours, limits=(-0.5, tasks - 0.5), texts=numbers
    ).axes.set_aspect("auto")
    shown = _ticks(len(blocks), cell, 1 if turned else 0)
    axes.set_xticks(shown, [labels[place] for place in shown], rotation=90 if turned else 0)
    axes.set_yticks(range(len(kinds)), [wrapped(kind, int((left - 0.1) / 0.082)) for kind in kinds])
    axes.set_xlabel("block", fontsize=FONT, loc="left")
    _task_bar(figure, colours, tasks, width, height)
    if told:
        figure.text(0.1 / width, 1 - 0.08 / height, told, fontsize=FONT + 1, va="top", color=INK)
    return inked(figure)


def _short(blocks: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of the blocks without what all of them begin with."""
    same = 0
    while all(len(block) > same + 1 for block in blocks) and len({block[: same + 1] for block in blocks}) == 1:
        same += 1
    return [".".join(block[same:]) or "-" for block in blocks]


def _task_bar(figure: Figure, colours: ListedColormap, tasks: int, width: float, height: float) -> None:
    """One field per task, and one for what was never frozen."""
    left, length = 0.2, min(2.6, width - 1.9)
    axes: Axes = figure.add_axes((left / width, 0.5 / height, length / width, 0.14 / height))
    bar = np.arange(tasks, dtype=np.float64)[None]
    draw_cells(axes, bar, 0.0, colours=colours, limits=(-0.5, tasks - 0.5)).axes.set_aspect("auto")
    axes.set_xticks(_ticks(tasks, length / tasks))
    axes.set_yticks([])
    axes.set_xlabel("frozen after task", fontsize=FONT)
    never: Any = figure.add_axes(((left + length + 0.3) / width, 0.5 / height, 0.25 / width, 0.14 / height))
    never.set_facecolor(EMPTY)
    never.set(xticks=[0.5], xticklabels=["never"], yticks=[], xlim=(0, 1))
    never.tick_params(length=0, labelsize=FONT)
    never.spines[:].set_visible(False)
