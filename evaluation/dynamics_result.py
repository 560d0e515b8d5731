"""What :class:`~avalanche_firn.evaluation.dynamics.TaskDynamics` measured, and every figure that follows from it.

Arrays and plain values only: it can be saved as JSON, compared and drawn without the model or the stream. Losses are
kept beside accuracies because with five images an accuracy moves in steps of 0.2. Definitions:
:mod:`~avalanche_firn.evaluation.dynamics_math`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from avalanche_firn.evaluation.dynamics_figures import block_effect_figure, loss_map_figure, task_curves_figure
from avalanche_firn.evaluation.dynamics_math import (
    EffectTotals,
    FloatArray,
    IntArray,
    as_block_tasks,
    as_blocks,
    block_effects,
    effect_totals,
    forgetting,
    last_ends,
    shock_and_recovery,
    step_effects,
)


class Shock(NamedTuple):
    """A jump of a loss and the time until it came back."""

    size: float
    """Nats; NaN where the first row was not measured."""
    row: int | None
    """Rows from the change until recovery; None for never."""
    iterations: int | None
    """Training iterations from the change until recovery; None for never."""


@dataclass(frozen=True, eq=False)
class Dynamics:
    """Losses and accuracies of T probed tasks in S + 1 rows, row 0 before the first step.

    Args:
        steps: (S + 1,) int64, training iterations done at each row, not falling.
        loss: (S + 1, T) float64, nats; NaN where a task was not measured or its loss wasn't finite.
        accuracy: (S + 1, T) float64, fractions; NaN where a task was not measured.
        blocks: (B, 2) int64, first and last row of each block. A block starts where the one before ended, so it holds
            all that happened to the model between the two rows: a head that grew or was zapped counts with it.
        block_tasks: per block the indices, in the stream, of the tasks that it trained.
        task_ids: T ascending indices in the stream of the probed tasks; default 0 to T - 1.
        task_names: T labels; default the task ids.
        diverged: (S + 1, T) bool, where a loss was measured and wasn't finite; default where ``loss`` is infinite.

    Raises ValueError, naming the field, where shapes or numbers don't fit together.
    """

    steps: IntArray
    loss: FloatArray
    accuracy: FloatArray
    blocks: IntArray
    block_tasks: tuple[tuple[int, ...], ...]
    task_ids: tuple[int, ...] = ()
    task_names: tuple[str, ...] = ()
    diverged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))

    def __post_init__(self) -> None:
        loss = np.array(self.loss, dtype=np.float64)
        if loss.ndim != 2 or 0 in loss.shape:
            raise ValueError(f"loss: got shape {loss.shape}; accepted is (S + 1, T), at least 1 along each axis")
        rows, tasks = loss.shape
        diverged = np.array(self.diverged, dtype=bool)
        diverged = np.isinf(loss) if diverged.size == 0 else diverged
        arrays = {
            "steps": (np.array(self.steps, dtype=np.int64), (rows,)),
            "accuracy": (np.array(self.accuracy, dtype=np.float64), loss.shape),
            "diverged": (diverged, loss.shape),
        }
        for name, (array, shape) in arrays.items():
            if array.shape != shape:
                raise ValueError(f"{name}: got shape {array.shape}; accepted is {shape}, as in loss")
        steps = arrays["steps"][0]
        if (np.diff(steps) < 0).any():
            raise ValueError(f"steps: got {steps.tolist()}; accepted are numbers that don't fall")
        ids = tuple(int(i) for i in self.task_ids) or tuple(range(tasks))
        if len(ids) != tasks or any(b <= a for a, b in pairwise(ids)) or ids[0] < 0:
            raise ValueError(f"task_ids: got {ids}; accepted are {tasks} ascending indices")
        names = tuple(str(name) for name in self.task_names) or tuple(str(i) for i in ids)
        if len(names) != tasks:
            raise ValueError(f"task_names: got {len(names)}; accepted is one for each of {tasks} tasks")
        blocks = as_blocks(self.blocks, rows)
        trained = tuple(as_block_tasks(self.block_tasks))
        if len(trained) != len(blocks):
            raise ValueError(f"block_tasks: got {len(trained)} items; accepted is one for each of {len(blocks)} blocks")
        loss[~np.isfinite(loss)] = np.nan
        values: dict[str, Any] = {name: array for name, (array, _) in arrays.items()}
        values |= {"loss": loss, "blocks": blocks, "block_tasks": trained, "task_ids": ids, "task_names": names}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    # --------------------------------------------------------------- figures
    @property
    def block_columns(self) -> list[tuple[int, ...]]:
        """Per block the columns that it trained: ``block_tasks`` without tasks that are not probed."""
        place = {task: column for column, task in enumerate(self.task_ids)}
        return [tuple(place[task] for task in tasks if task in place) for tasks in self.block_tasks]

    @property
    def step_effect(self) -> FloatArray:
        """(S, T) change of every loss from row to row, nats."""
        return step_effects(self.loss)

    @property
    def block_effect(self) -> FloatArray:
        """(B, T) change of every loss over each block, nats."""
        return block_effects(self.loss, self.blocks)

    def totals(self, blocks: int | None = None) -> EffectTotals:
        """Learning, interference, synergy and the forward effects, nats, over the first ``blocks`` blocks or all."""
        count = len(self.blocks) if blocks is None else blocks
        if not 0 <= count <= len(self.blocks):
            raise ValueError(f"blocks: got {blocks}; accepted are None and 0 to {len(self.blocks)}")
        return effect_totals(self.block_effect[:count], self.block_columns[:count])

    @property
    def ends(self) -> IntArray:
        """(T,) row at which the last block of each task ended; -1 for tasks that were not trained yet."""
        return last_ends(self.blocks, self.block_columns, self.loss.shape[1])

    @property
    def final_forgetting(self) -> FloatArray:
        """(T,) rise of each loss from the end of its last block to the last row, nats; NaN for untrained tasks."""
        return forgetting(self.loss, self.ends)[0]

    @property
    def max_forgetting(self) -> FloatArray:
        """(T,) rise of each loss from the end of its last block to its worst row after that, nats."""
        return forgetting(self.loss, self.ends)[1]

    @property
    def mean_loss(self) -> FloatArray:
        """(S + 1,) mean over the tasks that were measured; NaN in rows where none was or any loss wasn't finite."""
        return np.where(self.diverged.any(1), np.nan, _row_means(self.loss))

    @property
    def mean_accuracy(self) -> FloatArray:
        """(S + 1,) mean over the tasks that were measured, fractions; NaN in rows where none was."""
        return _row_means(self.accuracy)

    def shock(self, before: float, task: int | None = None, *, fraction: float = 0.5, row: int = 0) -> Shock:
        """How far a loss jumped at a change of head or domain, and how long it took to come back.

        Args:
            before: the loss before the change, nats, measured on the same images.
            task: index in the stream of a probed task; None for the mean over the tasks that were measured in ``row``.
            fraction: share of the shock that may remain. Default 0.5, our choice: open in the paper.
            row: the first row after the change; default 0, a change before the run.

        Raises:
            ValueError: a task that is not probed, a row out of range, none of whose tasks was measured.
        """
        if not 0 <= row < len(self.loss):
            raise ValueError(f"row: got {row}; accepted are 0 to {len(self.loss) - 1}")
        if task is not None and task not in self.task_ids:
            raise ValueError(f"task: got {task}; accepted are None and the probed tasks {list(self.task_ids)}")
        part = self.loss[row:]
        columns = ~np.isnan(part[0]) if task is None else np.asarray(self.task_ids) == task
        if not columns.any():
            raise ValueError(f"row: got {row}, in which no task was measured; accepted are rows with a loss")
        size, found = shock_and_recovery(part[:, columns].mean(1), before, fraction)
        assert isinstance(size, float) and not isinstance(found, np.ndarray)
        return Shock(size, found, None if found is None else int(self.steps[row + found] - self.steps[row]))

    def figures(self) -> dict[str, Figure]:
        """Pictures by name: ``loss-map``, ``curves`` and, once there is a block, ``block-effect``."""
        found = {
            "loss-map": loss_map_figure(self.steps, self.loss, task_names=self.task_names),
            "curves": task_curves_figure(self.steps, self.loss),
        }
        if len(self.blocks):
            names = dict(zip(self.task_ids, self.task_names, strict=True))
            if any(task not in names for tasks in self.block_tasks for task in tasks):
                names = {}  # indices for all rows, since some tasks have no name here
            rows = [_block_name([names.get(task, str(task)) for task in tasks]) for tasks in self.block_tasks]
            found["block-effect"] = block_effect_figure(self.block_effect, block_names=rows, task_names=self.task_names)
        return found

    # ----------------------------------------------------------------- state
    def to_dict(self) -> dict[str, Any]:
        """Plain lists, fit for JSON; None where a number is NaN."""
        return {
            "steps": self.steps.tolist(),
            "loss": _without_nan(self.loss),
            "accuracy": _without_nan(self.accuracy),
            "blocks": self.blocks.tolist(),
            "block_tasks": [list(tasks) for tasks in self.block_tasks],
            "task_ids": list(self.task_ids),
            "task_names": list(self.task_names),
            "diverged": self.diverged.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dynamics:
        """The object that :meth:`to_dict` was called on. ValueError for missing or unknown fields."""
        names = set(cls.__dataclass_fields__)
        if set(values) != names:
            raise ValueError(f"fields: got {sorted(values)}; accepted are exactly {sorted(names)}")
        return cls(**{name: values[name] for name in names})

    def state_dict(self) -> dict[str, Any]:
        """Tensors for the arrays and plain values for the rest; copies."""
        arrays = {name: torch.from_numpy(value.copy()) for name, value in vars(self).items() if hasattr(value, "dtype")}
        return {**self.to_dict(), **arrays}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Dynamics:
        """The object that :meth:`state_dict` was called on."""
        return cls.from_dict({n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in state.items()})


def _row_means(values: FloatArray) -> FloatArray:
    measured = ~np.isnan(values)
    count = measured.sum(1)
    sums = np.where(measured, values, 0.0).sum(1)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def _block_name(tasks: Sequence[str]) -> str:
    """Of a block by its tasks."""
    if len(tasks) < 2:
        return tasks[0] if tasks else "other"
    return f"{tasks[0]} to {tasks[-1]}"


def _without_nan(values: FloatArray) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in values.tolist()]


__all__ = ["Dynamics", "Shock"]
