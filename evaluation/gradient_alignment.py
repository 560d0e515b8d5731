"""Gradients of tasks against each other and against the updates of a run: functions, and an Avalanche metric.

The functions stand in :mod:`~avalanche_firn.evaluation.gradient_math` (directions of gradients and applied updates) and
:mod:`~avalanche_firn.evaluation.second_moment` (Adam's moments and the Fisher diagonal); :class:`GradientAlignment`
follows a training run with them. Written after arXiv 2507.01559, whose measures are not known in detail: all
definitions are ours.

Cost of the metric, at a measured iteration only: a forward and a backward pass per task (25 images by default), a copy
of the trained parameters, and a gradient per task (ten tasks of 1.2 million parameters: 47 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from matplotlib.figure import Figure
from numpy.typing import NDArray

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.dynamics_figures import cosine_figure
from avalanche_firn.evaluation.dynamics_math import as_block_tasks
from avalanche_firn.evaluation.gradient_math import Alignment, AppliedUpdate, gradient_alignment, watched_parameters
from avalanche_firn.evaluation.probe_tasks import ProbeTasks, device_of, refuse_multi_task, whole
from avalanche_firn.evaluation.second_moment import MomentComparison, second_moment_vs_fisher

Emitted = list[MetricValue] | None
FloatArray = NDArray[np.float64]
_ARRAYS = ("loss", "norm", "cosine", "predicted_change", "cosine_update")


@dataclass(frozen=True, eq=False)
class AlignmentHistory:
    """M measurements of T tasks; NaN for tasks without output units then."""

    steps: NDArray[np.int64]
    """(M,) training iterations done after the measured update."""
    loss: FloatArray
    """(M, T) mean loss before the update, nats."""
    norm: FloatArray
    """(M, T) norms of the gradients."""
    cosine: FloatArray
    """(M, T, T) cosines between gradients."""
    predicted_change: FloatArray
    """(M, T) change of each loss by the update, to first order, nats."""
    cosine_update: FloatArray
    """(M, T) cosine of the update with the way down for each task."""
    current: tuple[tuple[int, ...], ...]
    """Per measurement the tasks, as indices in the stream, that were trained."""
    task_ids: tuple[int, ...]
    """Index in the stream of each of the T tasks."""

    def mean_cosine(self) -> FloatArray:
        """(T, T) mean over the measurements in which both tasks were measured; NaN where there was none."""
        measured = ~np.isnan(self.cosine)
        count = measured.sum(0)
        sums = np.where(measured, self.cosine, 0.0).sum(0)
        return np.where(count > 0, sums / np.maximum(count, 1), np.nan)

    def figure(self) -> Figure:
        """Heat map of :meth:`mean_cosine`."""
        return cosine_figure(self.mean_cosine(), task_names=[str(i) for i in self.task_ids])


class GradientAlignment(PluginMetric[AlignmentHistory]):
    """At every k-th iteration: does the update that was applied help or hurt the current and the earlier tasks.

    The gradients are those of fixed images of each task, in evaluation mode, at the parameters right before the
    optimizer's step; the update is the difference that this iteration made to them, including what plugins did to the
    weights in ``after_update``. Emitted over training iterations: ``dynamics/update-cosine/current`` and ``/past``, the
    cosine of the update with the way down for the current task and its mean over the earlier ones; and
    ``dynamics/predicted-change-past``, the mean first-order change of their losses in nats (above 0: interference).
    :meth:`result` keeps all arrays, for a heat map of :meth:`AlignmentHistory.figure`.

    Training isn't changed by a bit: parameters, gradients, modes, buffers, optimizer and random generators stay. Tasks
    without output units (heads that grow) are NaN. A value that isn't defined, such as any for a task that is not
    among the probed ones, is left out. Multi-task models are refused.

    :param tasks: as for :class:`~avalanche_firn.evaluation.dynamics.TaskDynamics`.
    :param every: iterations of the run between measurements. 100: our choice, as are the defaults below.
    :param max_tasks: tasks that are looked at, spread evenly over the stream.
    :param images_per_task: spread evenly over each task's images.
    :param batch_size: of the pass that finds tasks without units.
    :param ignore: names of parameters that are left out, such as biases without effect on the function.
    :param task_of: ``experience -> indices of the tasks that it trains``; default its index.
    :raises ValueError: settings out of range; and, before the first step, a multi-task model, names in ``ignore`` that
        the model doesn't have, and a training stream of another length than ``tasks`` without ``task_of``.
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        *,
        every: int = 100,
        max_tasks: int = 10,
        images_per_task: int = 25,
        batch_size: int | None = None,
        ignore: Sequence[str] = (),
        task_of: Callable[[Any], Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.every = whole("every", every, 1)
        self.probe = ProbeTasks(tasks, max_tasks=max_tasks, images_per_task=images_per_task, batch_size=batch_size)
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self.task_of = task_of
        self._applied: AppliedUpdate | None = None  # between the hooks before and after an update
        self._current: list[int] = []
        self._past: set[int] = set()
        self._steps: list[int] = []
        self._measured: list[list[int]] = []  # current tasks of each measurement
        self._rows: dict[str, list[FloatArray]] = {name: [] for name in _ARRAYS}

    def __str__(self) -> str:
        return "GradientAlignment"

    def reset(self) -> None:
        """Nothing to do between experiences: the measurements are the history of the run."""

    def result(self) -> AlignmentHistory:
        """All measurements so far; M may be 0."""
        count, tasks = len(self._steps), len(self.probe)
        shapes = {name: (count, tasks, tasks) if name == "cosine" else (count, tasks) for name in _ARRAYS}
        arrays = {name: np.asarray(rows, dtype=np.float64).reshape(shapes[name]) for name, rows in self._rows.items()}
        return AlignmentHistory(
            steps=np.asarray(self._steps, dtype=np.int64),
            current=tuple(tuple(tasks) for tasks in self._measured),
            task_ids=tuple(self.probe.ids),
            **arrays,
        )

    # ------------------------------------------------------------------ hooks
    def before_training_exp(self, strategy: Any) -> Emitted:
        refuse_multi_task(strategy.model, "GradientAlignment")
        watched_parameters(strategy.model, self.ignore)  # a wrong name is an error now
        self._past |= set(self._current)
        experience = strategy.experience
        if self.task_of is None:
            try:
                length = len(full_stream(experience))
            except TypeError:  # a lazily generated stream
                length = self.probe.total
            if length != self.probe.total:
                raise ValueError(
                    f"tasks: got {self.probe.total} for a stream of {length} experiences; accepted is one for each, or "
                    "task_of=..."
                )
        chosen = [int(experience.current_experience)] if self.task_of is None else self.task_of(experience)
        self._current = list(as_block_tasks([chosen], self.probe.total)[0])
        return None

    def before_update(self, strategy: Any) -> Emitted:
        # Plugins of this event ran before; from here to after_update only the step and their after_update follow.
        due = (int(strategy.clock.train_iterations) + 1) % self.every == 0  # the clock counts after us
        self._applied = AppliedUpdate(strategy.model, ignore=self.ignore) if due else None
        return None

    def after_update(self, strategy: Any) -> Emitted:
        applied, self._applied = self._applied, None
        if applied is None:
            return None
        step = int(strategy.clock.train_iterations) + 1
        found = self._measure(strategy.model, applied, device_of(strategy.model, strategy.device))
        self._steps.append(step)
        self._measured.append([*self._current])
        for name, value in found.items():
            self._rows[name].append(value)
        ids = np.asarray(self.probe.ids)
        current = np.isin(ids, self._current)
        past = np.isin(ids, sorted(self._past)) & ~current
        values = {
            "dynamics/update-cosine/current": found["cosine_update"][current],
            "dynamics/update-cosine/past": found["cosine_update"][past],
            "dynamics/predicted-change-past": found["predicted_change"][past],
        }
        means = {tag: part[np.isfinite(part)] for tag, part in values.items()}
        return [MetricValue(self, tag, float(part.mean()), step) for tag, part in means.items() if part.size]

    def _measure(self, model: Any, applied: AppliedUpdate, device: torch.device) -> dict[str, FloatArray]:
        losses = self.probe.evaluate(model, device)[0].cpu()
        columns = torch.nonzero(~losses.isnan())[:, 0].tolist()  # tasks with units
        tasks = len(self.probe)
        rows = {name: np.full((tasks, tasks) if name == "cosine" else tasks, np.nan) for name in _ARRAYS}
        if columns:
            found: Alignment = gradient_alignment(
                model,
                [self.probe.batch(column, model, device) for column in columns],
                update=applied.difference(),
                ignore=self.ignore,
                parameters=applied.before,
            )
            for name in _ARRAYS:
                place = np.ix_(columns, columns) if name == "cosine" else columns
                rows[name][place] = getattr(found, name).numpy()
        return rows

    # ------------------------------------------------------------------ state
    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "ignore": sorted(self.ignore), **self.probe.settings()}

    def state_dict(self) -> dict[str, Any]:
        """All measurements, the current and earlier tasks, and the settings that they belong to; no images."""
        history = self.result()
        return {
            "settings": self._settings(),
            "arrays": {name: torch.from_numpy(getattr(history, name).copy()) for name in _ARRAYS},
            "steps": [*self._steps],
            "measured": [[*tasks] for tasks in self._measured],
            "current": [*self._current],
            "past": sorted(self._past),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a metric with the same settings and tasks; ValueError, naming them, otherwise."""
        own = self._settings()
        if differing := [name for name in own if state["settings"].get(name) != own[name]]:
            raise ValueError(f"GradientAlignment: the state was made with another value of {', '.join(differing)}")
        self._rows = {name: list(state["arrays"][name].cpu().clone().numpy()) for name in _ARRAYS}
        self._steps = [int(step) for step in state["steps"]]
        self._measured = [[int(i) for i in tasks] for tasks in state["measured"]]
        self._current, self._past = [int(i) for i in state["current"]], {int(i) for i in state["past"]}
        self._applied = None


__all__ = [
    "Alignment",
    "AlignmentHistory",
    "AppliedUpdate",
    "GradientAlignment",
    "MomentComparison",
    "gradient_alignment",
    "second_moment_vs_fisher",
]
