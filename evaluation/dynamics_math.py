"""How every single task fares while a model learns one after the other: the figures, as functions of arrays of losses.

Follows the question of "How Weight Resampling and Optimizers Shape the Dynamics of Continual Learning and Forgetting in
Neural Networks" (arXiv 2507.01559). No code of it was found, so the definitions are ours; they are written out at each
function. ``L[s, j]`` is the loss of task ``j`` at row ``s``, row 0 before the first step; a block is the span of rows
in which one task, or a few, were trained. Losses are in nats, but any quantity that falls by learning will do.

Entries that are not finite (a task without an output unit yet, a diverged model) count as *not measured*: they are
skipped where something is summed, and what would need them is NaN. Cost: a few passes over the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BlockTasks = Sequence[int | Sequence[int]]


class EffectTotals(NamedTuple):
    """Sums over all blocks, in the unit of the losses; all but ``learning`` are 0 or above."""

    learning: float
    """How far the losses of the trained tasks fell in their own blocks; negative where they rose."""
    interference: float
    """How far the losses of earlier tasks rose while others were trained."""
    synergy: float
    """How far the losses of earlier tasks fell while others were trained."""
    forward_harm: float
    """How far the losses of tasks to come rose."""
    forward_gain: float
    """How far the losses of tasks to come fell."""


def as_losses(losses: ArrayLike | Tensor, name: str = "losses", ndim: int = 2) -> FloatArray:
    """A float64 copy of an array or tensor, NaN where it isn't finite.

    Raises:
        ValueError: another number of dimensions than ``ndim``, or an axis of length 0.
    """
    values = losses.detach().cpu().double().numpy() if isinstance(losses, Tensor) else losses
    values = np.array(values, dtype=np.float64)
    if values.ndim != ndim or 0 in values.shape:
        shape = {1: "(S + 1,)", 2: "(S + 1, T)"}[ndim]
        raise ValueError(f"{name}: got shape {values.shape}; accepted is {shape}, at least 1 along each axis")
    values[~np.isfinite(values)] = np.nan
    return values


def as_block_tasks(block_tasks: BlockTasks, tasks: int | None = None) -> list[tuple[int, ...]]:
    """One tuple of task indices per block, each task once, in ascending order.

    Args:
        block_tasks: per block an index or a sequence of indices; an empty one for a block that trained none of them.
        tasks: T, where the indices must lie below it.

    Raises:
        ValueError: an index out of range. TypeError: something that isn't an integer.
    """
    found = []
    for block in block_tasks:
        ids: Iterable[Any] = [block] if isinstance(block, (int, np.integer)) else block
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, (int, np.integer))]
        if wrong:
            raise TypeError(f"block_tasks: got {wrong}; accepted are integers, or sequences of integers, per block")
        chosen = tuple(sorted({int(i) for i in ids}))
        wrong = [i for i in chosen if i < 0 or (tasks is not None and i >= tasks)]
        if wrong:
            limit = "0 and above" if tasks is None else f"0 to {tasks - 1}"
            raise ValueError(f"block_tasks: got task indices {wrong}; accepted are {limit}")
        found.append(chosen)
    return found


def as_blocks(blocks: ArrayLike, rows: int) -> IntArray:
    """Blocks as an int64 array (B, 2) of first and last row.

    Raises:
        ValueError: another shape, numbers that aren't whole, a block that ends before it starts or leaves the rows.
    """
    given = np.asarray(blocks)
    if given.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if given.ndim != 2 or given.shape[1] != 2 or given.dtype.kind not in "iu":
        raise ValueError(f"blocks: got {given.dtype} of shape {given.shape}; accepted are integers of shape (B, 2)")
    found = given.astype(np.int64)
    wrong = (found[:, 0] < 0) | (found[:, 1] < found[:, 0]) | (found[:, 1] >= rows)
    if wrong.any():
        raise ValueError(f"blocks: got {found[wrong].tolist()}; accepted are 0 <= start <= end <= {rows - 1}")
    return found


def step_effects(losses: ArrayLike | Tensor) -> FloatArray:
    """Change of every loss from row to row, ``D[s, j] = L[s + 1, j] - L[s, j]``.

    Args:
        losses: (S + 1, T).

    Returns:
        (S, T) float64; NaN where either end was not measured. Raises ValueError for another shape.
    """
    return np.diff(as_losses(losses), axis=0)


def block_effects(losses: ArrayLike | Tensor, blocks: ArrayLike) -> FloatArray:
    """Change of every loss over each block, ``E[i, j] = L[end_i, j] - L[start_i, j]``.

    For blocks that cover all rows without gap or overlap the column sums are ``L[S] - L[0]``.

    Args:
        losses: (S + 1, T).
        blocks: (B, 2) integers, first and last row of each block.

    Returns:
        (B, T) float64; NaN where either end was not measured. Raises ValueError for blocks outside the rows.
    """
    values = as_losses(losses)
    spans = as_blocks(blocks, len(values))
    return values[spans[:, 1]] - values[spans[:, 0]]


def effect_totals(effects: ArrayLike | Tensor, block_tasks: BlockTasks) -> EffectTotals:
    """Learning, interference, synergy, forward harm and forward gain: block effects summed by what the task was then.

    Of block i, *own* are the tasks that it trains, *past* those that an earlier block trained and this one doesn't,
    *future* all the others. Learning is minus the sum over own; interference and forward harm sum the positive parts
    over past and future, synergy and forward gain the negative parts, as positive numbers.

    Args:
        effects: (B, T), see :func:`block_effects`. B may be 0: all sums are 0 then.
        block_tasks: B items, a column or several.

    Returns:
        Sums over the entries that were measured: 0 where there is nothing to sum (no past in the first block), NaN
        where there is something and none of it was measured (learning with a head that grows after the probe).
    """
    if not len(block_tasks):
        return EffectTotals(0.0, 0.0, 0.0, 0.0, 0.0)
    values = as_losses(effects, "effects")
    count, tasks = values.shape
    if len(block_tasks) != count:
        raise ValueError(f"block_tasks: got {len(block_tasks)} items; accepted is one for each of {count} blocks")
    own = np.zeros((count, tasks), dtype=bool)
    for row, columns in zip(own, as_block_tasks(block_tasks, tasks), strict=True):
        row[list(columns)] = True
    seen = np.zeros_like(own)  # trained in an earlier block
    seen[1:] = np.logical_or.accumulate(own, axis=0)[:-1]
    past, future = seen & ~own, ~seen & ~own
    rise, fall = np.maximum(values, 0.0), np.maximum(-values, 0.0)
    return EffectTotals(_sum(-values[own]), _sum(rise[past]), _sum(fall[past]), _sum(rise[future]), _sum(fall[future]))


def _sum(values: FloatArray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.sum()) + 0.0 if measured.size or not values.size else math.nan  # + 0.0: never -0.0


def last_ends(blocks: ArrayLike, block_tasks: BlockTasks, tasks: int) -> IntArray:
    """Row at which the last block of each task ended.

    Args:
        blocks: (B, 2), first and last row.
        block_tasks: B items, a task or several.
        tasks: T.

    Returns:
        (T,) int64, -1 for a task that was never trained.
    """
    spans = as_blocks(blocks, np.iinfo(np.int64).max)
    if len(block_tasks) != len(spans):
        raise ValueError(f"block_tasks: got {len(block_tasks)} items; accepted is one for each of {len(spans)} blocks")
    ends = np.full(tasks, -1, dtype=np.int64)
    for end, columns in zip(spans[:, 1], as_block_tasks(block_tasks, tasks), strict=True):
        ends[list(columns)] = end
    return ends


def forgetting(losses: ArrayLike | Tensor, ends: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """How far the loss of each task rose after its last block: at the end, and at the worst moment.

    ``final[j] = L[S, j] - L[e, j]`` and ``maximal[j] = max over s >= e of L[s, j] - L[e, j]``, e the end of the last
    block of j. Positive is forgetting, unlike :func:`~avalanche_firn.evaluation.matrix.forgetting`, where accuracies
    fall; ``maximal`` is never negative.

    Args:
        losses: (S + 1, T).
        ends: (T,) integers, see :func:`last_ends`; negative for tasks that were never trained.

    Returns:
        ``(final, maximal)``, each (T,) float64; NaN for tasks that were never trained or not measured at ``e`` (final:
        or in the last row).
    """
    values = as_losses(losses)
    rows, tasks = values.shape
    given = np.asarray(ends)
    if given.shape != (tasks,) or given.dtype.kind not in "iu" or (given >= rows).any():
        raise ValueError(f"ends: got {given.tolist()}; accepted are {tasks} integers below {rows} rows, -1 for never")
    trained = given >= 0
    start = np.where(trained, given, 0).astype(np.int64)
    reference = np.where(trained, values[start, np.arange(tasks)], np.nan)
    later = (np.arange(rows)[:, None] >= start) & ~np.isnan(values)
    worst = np.where(later, values, -np.inf).max(0)
    return values[-1] - reference, np.where(np.isnan(reference), np.nan, worst) - reference


def shock_and_recovery(
    trace: ArrayLike | Tensor, before: ArrayLike, fraction: float = 0.5
) -> tuple[float, int | None] | tuple[FloatArray, IntArray]:
    """How far a loss jumped at a change of head or domain, and how many rows it took to come back.

    ``shock = L[0] - before``; recovery is the first s with ``L[s] - before <= fraction * shock``, and 0 if the shock
    isn't positive. Rows that were not measured are skipped.

    Args:
        trace: (S + 1,) losses from the change on, or (S + 1, T) for several traces at once.
        before: the loss before the change; a number, or (T,).
        fraction: share of the shock that may remain, 0 to 1. Default 0.5, our choice: open in the paper.

    Returns:
        Of one trace the shock and the row, None for never. Of several (T,) float64 shocks and (T,) int64 rows, -1 for
        never. A trace that isn't measured in row 0 has a shock of NaN and no recovery.

    Raises:
        ValueError: another shape, ``before`` that isn't finite, ``fraction`` out of range.
    """
    single = (trace.ndim if isinstance(trace, Tensor) else np.ndim(trace)) == 1  # type: ignore[arg-type]
    values = as_losses(trace, "trace", 1)[:, None] if single else as_losses(trace, "trace", 2)
    level = np.asarray(before, dtype=np.float64)
    if level.shape not in ((), (1,), values.shape[1:]) or not np.isfinite(level).all():
        raise ValueError(f"before: got {level.tolist()}; accepted is a finite number, or one for each trace")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}; accepted are numbers from 0 to 1")
    shock = values[0] - level
    with np.errstate(invalid="ignore"):
        back = values - level <= np.where(shock > 0, fraction * shock, shock)
    recovery = np.where(back.any(0), back.argmax(0), -1).astype(np.int64)
    if single:
        return float(shock[0]), None if recovery[0] < 0 else int(recovery[0])
    return shock, recovery


__all__ = [
    "BlockTasks",
    "EffectTotals",
    "as_block_tasks",
    "as_blocks",
    "as_losses",
    "block_effects",
    "effect_totals",
    "forgetting",
    "last_ends",
    "shock_and_recovery",
    "step_effects",
]
