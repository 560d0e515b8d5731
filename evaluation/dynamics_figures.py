"""Pictures of the dynamics of single tasks: block effects, losses over time, and angles between gradients.

Built like those in :mod:`~avalanche_firn.evaluation.figures`: matplotlib's object interface on the Agg canvas, no
pyplot, hence no global state and nothing to close. What was not measured stays grey, or is a gap in a curve. Signed
quantities have a diverging map centred on 0 (blue falls, red rises). Cost: 0.1 to 0.5 s a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from avalanche_firn.evaluation.figures import DPI, PALETTE, plain_texts

_GREY = "#d9d9d9"
_MOST_LABELS = 20


def _figure(width: float, height: float, title: str | None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    return figure, axes


def _matrix(values: ArrayLike, name: str, shape: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{name}: got shape {found.shape}; accepted is {shape}, at least 1 along each axis")
    return found


def _names(names: Sequence[str] | None, count: int, field: str) -> list[str]:
    found = [str(i) for i in range(count)] if names is None else [str(name) for name in names]
    if len(found) != count:
        raise ValueError(f"{field}: got {len(found)}; accepted is one for each of {count}")
    return found


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Every so many names, so that they do not overlap."""
    step = max(1, -(-len(names) // _MOST_LABELS))
    return list(range(0, len(names), step)), [*names[::step]]


def _heat_map(
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    limit: float,
    label: str,
    title: str | None,
) -> tuple[Figure, Axes]:
    cell = min(0.5, 7.0 / max(values.shape))
    figure, axes = _figure(max(3.8, cell * len(columns) + 2.1), max(2.0, cell * len(rows) + 1.4), title)
    colours = colormaps["RdBu_r"].with_extremes(bad=_GREY)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit, aspect="equal", interpolation="nearest"
    )
    places, shown = _ticks(columns)
    crowded = max(len(name) for name in columns) > 4
    axes.set_xticks(places, shown, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.set_yticks(*_ticks(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    bar.outline.set_visible(False)
    return figure, axes


@plain_texts
def block_effect_figure(
    effects: ArrayLike,
    *,
    block_names: Sequence[str] | None = None,
    task_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Heat map of what each block did to the loss of each task: red rose, blue fell, grey was not measured.

    Args:
        effects: (B, T) change of the loss in nats, see :func:`~avalanche_firn.evaluation.dynamics_math.block_effects`.
        block_names: B labels of the rows; default the block indices.
        task_names: T labels of the columns; default the task indices.
        title: line above the map.
    """
    values = _matrix(effects, "effects", "(B, T)")
    rows = _names(block_names, values.shape[0], "block_names")
    columns = _names(task_names, values.shape[1], "task_names")
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    figure, axes = _heat_map(values, rows, columns, limit, "change of loss (nats)", title)
    axes.set_xlabel("task")
    axes.set_ylabel("trained in block")
    return figure


@plain_texts
def cosine_figure(cosine: ArrayLike, *, task_names: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """Heat map of cosines between the gradients of tasks, from -1 (blue, opposed) to 1 (red, the same direction).

    Args:
        cosine: (T, T); NaN stays grey.
        task_names: T labels; default the task indices.
        title: line above the map.
    """
    values = _matrix(cosine, "cosine", "(T, T)")
    if values.shape[0] != values.shape[1]:
        raise ValueError(f"cosine: got shape {values.shape}; accepted is (T, T)")
    names = _names(task_names, len(values), "task_names")
    figure, axes = _heat_map(values, names, names, 1.0, "cosine of gradients", title)
    axes.set_xlabel("task")
    axes.set_ylabel("task")
    return figure


def _checked(steps: ArrayLike, loss: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, values = np.asarray(steps, dtype=np.float64), _matrix(loss, "loss", "(S + 1, T)")
    if x.shape != (len(values),) or not np.isfinite(x).all() or (np.diff(x) < 0).any():
        raise ValueError(f"steps: got shape {x.shape}; accepted are {len(values)} numbers that don't fall")
    return x, values


@plain_texts
def loss_map_figure(
    steps: ArrayLike, loss: ArrayLike, *, task_names: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Losses of all tasks (rows) over training iterations (columns); a colour holds until the next probe.

    Args:
        steps: (S + 1,) training iterations of the probes, not falling.
        loss: (S + 1, T) nats; NaN (not measured) stays grey.
        task_names: T labels of the rows; default the task indices.
        title: line above the map.
    """
    x, values = _checked(steps, loss)
    tasks = values.shape[1]
    names = _names(task_names, tasks, "task_names")
    last = x[-1] + (x[-1] - x[-2] if len(x) > 1 and x[-1] > x[-2] else 1.0)
    figure, axes = _figure(7.4, min(7.0, max(2.2, 0.16 * tasks + 1.4)), title)
    colours = colormaps["viridis"].with_extremes(bad=_GREY)
    edges = np.arange(tasks + 1) - 0.5
    mesh = axes.pcolormesh(np.append(x, last), edges, np.ma.masked_invalid(values.T), cmap=colours, rasterized=True)
    axes.set_facecolor(_GREY)
    axes.set_yticks(*_ticks(names))
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training iteration")
    axes.set_ylabel("task")
    figure.colorbar(mesh, ax=axes, label="loss (nats)").outline.set_visible(False)
    return figure


@plain_texts
def task_curves_figure(
    steps: ArrayLike, loss: ArrayLike, *, ylabel: str = "loss (nats)", title: str | None = None
) -> Figure:
    """One faint line per task over training iterations, and their mean in bold.

    Args:
        steps: (S + 1,) training iterations of the probes, not falling.
        loss: (S + 1, T), or accuracies with another ``ylabel``. NaN is a gap; the mean is over what was measured.
        ylabel: label of the y axis.
        title: line above the picture.
    """
    x, values = _checked(steps, loss)
    finite = np.where(np.isfinite(values), values, np.nan)
    measured = ~np.isnan(finite)
    count = measured.sum(1)
    mean = np.where(count > 0, np.where(measured, finite, 0.0).sum(1) / np.maximum(count, 1), np.nan)
    figure, axes = _figure(7.4, 4.2, title)
    lines = [np.column_stack([x, column]) for column in finite.T]
    axes.add_collection(LineCollection(lines, colors=PALETTE[0], linewidths=0.8, alpha=0.35))
    marker = "o" if len(x) == 1 else None
    axes.plot(x, mean, color=PALETTE[1], linewidth=2.4, marker=marker, label=f"mean of {finite.shape[1]} tasks")
    axes.autoscale_view()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training iteration")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


__all__ = ["block_effect_figure", "cosine_figure", "loss_map_figure", "task_curves_figure"]
