"""Losses of single tasks at a fine resolution while a model learns one task after the other.

Measures what "How Weight Resampling and Optimizers Shape the Dynamics of Continual Learning and Forgetting in Neural
Networks" (arXiv 2507.01559) is about: what each step does to each task. No code of it was found; probe sets, resolution
and definitions are ours (:mod:`~avalanche_firn.evaluation.dynamics_math`).

:class:`TaskDynamics` is an Avalanche metric and also works in a hand-written loop::

    dynamics = TaskDynamics(pairs, every=100)        # one (images, labels) per task
    dynamics.start(model)                            # row 0
    for task, loader in enumerate(loaders):
        dynamics.begin_block([task])
        for images, labels in loader:
            ...                                      # one update
            dynamics.step(model)
        dynamics.end_block(model)
    dynamics.finish(model)
    print(dynamics.result().totals())

Cost with the defaults: one forward pass of at most 125 images in at least 100 iterations. Measured on one CPU thread
(``speed/zapping.py``), training the 28-pixel convnet on one image at a time: 8 % of the time of the training with width
16, 9 % with 32; with a row after every class of 15 images 1.5 and 1.7 times the time. ``every=1`` costs a pass per
iteration.
Rows stay on the device until an experience ends, so training never waits for them. Memory: the images
(:mod:`~avalanche_firn.evaluation.probe_tasks`) and 8 bytes per row and task on the device, 16 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue
from torch import Tensor, nn

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.dynamics_math import (
    EffectTotals,
    as_block_tasks,
    block_effects,
    effect_totals,
    forgetting,
    last_ends,
    shock_and_recovery,
    step_effects,
)
from avalanche_firn.evaluation.dynamics_result import Dynamics, Shock
from avalanche_firn.evaluation.probe_tasks import ProbeTasks, device_of, refuse_multi_task, whole

Emitted = list[MetricValue] | None


class TaskDynamics(PluginMetric[Dynamics]):
    """Loss and accuracy of each task on a few fixed images, at many moments of a run.

    **When.** Row 0 comes before the first step, after the model was adapted to the first experience. Inside an
    experience a row follows its iterations ``every``, ``2 * every``, ...; at its end one if there was one inside or if
    ``every`` iterations have passed since the last row, and always after the last experience. Experiences without a row
    at their end share a block with the next one. A row at an experience's end replaces one of the same iteration
    inside it, because phases after training (alignment, averaging) may have changed the model.

    **Emitted** over training iterations, when an experience ends: ``dynamics/loss`` and ``dynamics/accuracy``, means
    over the probed tasks that have output units; at block ends the totals so far, ``dynamics/learning``,
    ``dynamics/interference`` and ``dynamics/synergy``; after the last experience the images ``dynamics/block-effect``,
    ``dynamics/loss-map`` and ``dynamics/curves``. A value that isn't defined is left out; a loss that isn't finite with
    a RuntimeWarning, once.

    **Not measured.** A task of which any label has no unit (logits too narrow, or masked by
    :class:`~avalanche_firn.models.TaskwiseLinearHead` or Avalanche's ``IncrementalClassifier``) is NaN in that row.
    With a head that grows at the start of an experience the new task is therefore missing in the row where its block
    starts, and ``learning`` does not see that block; a head with all units from the start has no such gap.

    Training isn't changed by a bit: modes, buffers, gradients, optimizer and random generators stay. The probe is in
    evaluation mode and float32 (or the dtype of the model) whatever the training does. Multi-task models are refused.

    :param tasks: an Avalanche stream or list of experiences, a list of data sets, or a list of pairs of tensors
        (images (n, ...) float, labels (n,) int); one per task. Training or test images, as you like: read once, here.
    :param every: iterations between rows, 1 for each; or ``"experience"``, at each experience's end. 100: our choice.
    :param max_tasks: tasks that are probed, spread evenly over the stream. 25: our choice, for its cost.
    :param images_per_task: spread evenly over each task's images in stored order. 5: our choice (the test images per
        class of the published Omniglot protocol).
    :param batch_size: images per forward pass, None: 16 on a CPU, else 256; its only effect is on memory and speed.
    :param task_names: a label for every task of the stream; default their indices.
    :param task_of: ``experience -> indices of the tasks that it trains``, for streams whose experience i isn't task i.
    :param images: emit the images.
    :raises ValueError: settings out of range, tasks that :class:`ProbeTasks` refuses; and, before the first step, a
        multi-task model or a training stream of another length than ``tasks`` without ``task_of``.
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        *,
        every: int | Literal["experience"] = 100,
        max_tasks: int = 25,
        images_per_task: int = 5,
        batch_size: int | None = None,
        task_names: Sequence[str] | None = None,
        task_of: Callable[[Any], Sequence[int]] | None = None,
        images: bool = True,
    ) -> None:
        super().__init__()
        if every != "experience" and (isinstance(every, (str, bool)) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every: got {every!r}; accepted are 'experience' and integers from 1")
        self.every = every
        self.probe = ProbeTasks(tasks, max_tasks=max_tasks, images_per_task=images_per_task, batch_size=batch_size)
        names = [str(i) for i in range(self.probe.total)] if task_names is None else [str(name) for name in task_names]
        if len(names) != self.probe.total:
            raise ValueError(f"task_names: got {len(names)}; accepted is one for each of {self.probe.total} tasks")
        self.task_names = [names[i] for i in self.probe.ids]
        self.task_of = task_of
        self.images = images
        self._steps: list[int] = []  # one per row
        self._chunks: list[Tensor] = []  # (n, 2, T) float64, rows on the CPU
        self._pending: list[Tensor] = []  # (2, T) on the device
        self._blocks: list[list[int]] = []
        self._block_tasks: list[list[int]] = []
        self._open: list[int] = []  # tasks since the last block ended
        self._inside = False  # between begin_block and end_block
        self._iteration = 0
        self._local = 0  # iterations of this experience
        self._probed = False  # a row inside this experience
        self._emitted = [0, 0]  # rows and blocks that were emitted
        self._trained: list[int] = []  # experiences
        self._device: torch.device | None = None
        self._warned = False

    def __str__(self) -> str:
        return "TaskDynamics"

    def reset(self) -> None:
        """Nothing to do between experiences: the rows are the history of the run."""

    # ------------------------------------------------------------ any loop
    def start(self, model: nn.Module, device: torch.device | str | None = None, *, iteration: int = 0) -> None:
        """Row 0, before the first step.

        :param device: where the model computes; default that of its first parameter. :param iteration: training
            iterations that were done before, the first entry of ``steps``.
        :raises RuntimeError: called before. ValueError: a multi-task model.
        """
        if self._steps:
            raise RuntimeError("start() was called before; each run makes its own TaskDynamics")
        refuse_multi_task(model, "TaskDynamics")
        self._iteration = whole("iteration", iteration, 0)
        self._device = device_of(model, device)
        self._add(model)

    def begin_block(self, task_indices: int | Sequence[int]) -> None:
        """An experience begins that trains these tasks of the stream (none, where it trains none of them).

        :raises RuntimeError: before :meth:`start`, or inside another experience. ValueError: an index out of range.
        """
        if not self._steps or self._inside:
            raise RuntimeError("begin_block() comes after start() and, after the first time, after end_block()")
        (chosen,) = as_block_tasks([task_indices], self.probe.total)
        self._open += [i for i in chosen if i not in self._open]
        self._inside, self._local, self._probed = True, 0, False

    def step(self, model: nn.Module, iterations: int = 1) -> None:
        """Training iterations were done; takes a row where one is due.

        :param iterations: how many since the last call.
        :raises RuntimeError: outside an experience.
        """
        if not self._inside:
            raise RuntimeError("step() comes between begin_block() and end_block()")
        before = self._local
        self._local += iterations
        self._iteration += iterations
        if self.every != "experience" and self._local // self.every > before // self.every:
            self._add(model)
            self._probed = True

    def end_block(self, model: nn.Module) -> None:
        """The experience has ended; takes a row and closes the block where that is due (see the class).

        :raises RuntimeError: outside an experience.
        """
        if not self._inside:
            raise RuntimeError("end_block() comes after begin_block()")
        self._inside = False
        passed = self._iteration - self._steps[-1]
        if self._probed or self.every == "experience" or passed >= self.every:
            self._close(model, replace=self._probed and passed == 0)
        self._flush()

    def finish(self, model: nn.Module) -> None:
        """The last experience has ended: closes the block that is still open. Calling it again does nothing.

        :raises RuntimeError: inside an experience, or before :meth:`start`.
        """
        if not self._steps or self._inside:
            raise RuntimeError("finish() comes after start() and end_block()")
        if self._open or self._iteration > self._steps[-1]:
            self._close(model, replace=False)
        self._flush()

    def result(self) -> Dynamics:
        """What was measured so far. Iterations after the last row, and a block that is still open, aren't part of it.

        :raises RuntimeError: before :meth:`start`.
        """
        if not self._steps:
            raise RuntimeError("result() comes after start(): nothing was measured yet")
        table = self._table().numpy()
        return Dynamics(
            steps=np.asarray(self._steps, dtype=np.int64),
            loss=table[:, 0],
            accuracy=table[:, 1],
            blocks=np.asarray(self._blocks, dtype=np.int64).reshape(-1, 2),
            block_tasks=tuple(tuple(tasks) for tasks in self._block_tasks),
            task_ids=tuple(self.probe.ids),
            task_names=tuple(self.task_names),
        )

    def _add(self, model: nn.Module, replace: bool = False) -> None:
        if self._device is None:  # a loaded state: start() ran in another process
            self._device = device_of(model)
        row = self.probe.evaluate(model, self._device)
        if replace and self._pending:
            self._pending[-1] = row
        elif replace:
            self._chunks[-1][-1] = row.to("cpu", torch.float64)
        else:
            self._pending.append(row)
            self._steps.append(self._iteration)

    def _close(self, model: nn.Module, replace: bool) -> None:
        self._add(model, replace)
        start = self._blocks[-1][1] if self._blocks else 0
        self._blocks.append([start, len(self._steps) - 1])
        self._block_tasks.append(sorted(self._open))
        self._open = []

    def _flush(self) -> None:
        if self._pending:
            self._chunks.append(torch.stack(self._pending).to("cpu", torch.float64))
            self._pending = []

    def _table(self) -> Tensor:
        """(S + 1, 2, T) float64 on the CPU."""
        self._flush()
        if len(self._chunks) != 1:
            self._chunks = [torch.cat(self._chunks)] if self._chunks else []
        return self._chunks[0] if self._chunks else torch.zeros(0, 2, len(self.probe), dtype=torch.float64)

    # ---------------------------------------------------------------- Avalanche
    def before_training_exp(self, strategy: Any) -> Emitted:
        self._device = device_of(strategy.model, strategy.device)
        chosen = self._tasks_of(strategy.experience)
        refuse_multi_task(strategy.model, "TaskDynamics")
        if not self._steps:
            self.start(strategy.model, strategy.device, iteration=int(strategy.clock.train_iterations))
        self._iteration = int(strategy.clock.train_iterations)
        self._inside = False  # an experience that an exception had cut short
        self.begin_block(chosen)
        return None

    def after_training_iteration(self, strategy: Any) -> Emitted:
        if self._inside:  # else the evaluator was switched off when the experience began
            self.step(
                strategy.model, int(strategy.clock.train_iterations) + 1 - self._iteration
            )  # the clock counts later
        return None

    def after_training_exp(self, strategy: Any) -> Emitted:
        if not self._inside:
            return None
        self.end_block(strategy.model)
        self._trained.append(int(strategy.experience.current_experience))
        length = _length(full_stream(strategy.experience))
        last = len(set(self._trained)) == length
        if last:
            self.finish(strategy.model)
        return self._emit(last)

    def _tasks_of(self, experience: Any) -> Sequence[int]:
        if self.task_of is not None:
            return self.task_of(experience)
        length = _length(full_stream(experience))
        if length is not None and length != self.probe.total:
            raise ValueError(
                f"tasks: got {self.probe.total} for a stream of {length} experiences; accepted is one for each, or "
                "task_of=..."
            )
        return [int(experience.current_experience)]

    def _emit(self, last: bool) -> list[MetricValue]:
        rows, blocks = self._emitted
        if len(self._steps) == rows and len(self._blocks) == blocks and not last:
            return []
        found, emitted = self.result(), []
        series = (("dynamics/loss", found.mean_loss), ("dynamics/accuracy", found.mean_accuracy))
        for tag, values in series:
            for step, value in zip(self._steps[rows:], values[rows:].tolist(), strict=True):
                if np.isfinite(value):
                    emitted.append(MetricValue(self, tag, value, step))
        for block in range(blocks, len(self._blocks)):
            step, totals = self._steps[self._blocks[block][1]], found.totals(block + 1)
            for name in ("learning", "interference", "synergy"):
                if np.isfinite(value := getattr(totals, name)):
                    emitted.append(MetricValue(self, f"dynamics/{name}", value, step))
        if found.diverged[rows:].any() and not self._warned:
            self._warned = True
            text = f"TaskDynamics: losses that aren't finite, from iteration {found.steps[found.diverged.any(1)][0]} on"
            warnings.warn(f"{text}; dynamics/loss is left out there", RuntimeWarning, stacklevel=2)
        self._emitted = [len(self._steps), len(self._blocks)]
        if last and self.images:
            arrays = {"block-effect": found.block_effect, "loss-map": found.loss, "curves": found.loss}
            for name, figure in found.figures().items():
                picture = AlternativeValues(figure, torch.from_numpy(arrays[name]))  # the figure first: loggers take it
                emitted.append(MetricValue(self, f"dynamics/{name}", picture, self._steps[-1]))
        return emitted

    # ------------------------------------------------------------------ state
    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, **self.probe.settings()}

    def state_dict(self) -> dict[str, Any]:
        """All rows, where the run stands inside a block, and the settings that they belong to; no images."""
        return {
            "settings": self._settings(),
            "table": self._table().clone(),
            "steps": [*self._steps],
            "blocks": [[*block] for block in self._blocks],
            "block_tasks": [[*tasks] for tasks in self._block_tasks],
            "open": [*self._open],
            "inside": self._inside,
            "iteration": self._iteration,
            "local": self._local,
            "probed": self._probed,
            "emitted": [*self._emitted],
            "trained": [*self._trained],
            "warned": self._warned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a metric with the same settings and tasks; ValueError, naming them, otherwise."""
        own = self._settings()
        if differing := [name for name in own if state["settings"].get(name) != own[name]]:
            raise ValueError(f"TaskDynamics: the state was made with another value of {', '.join(differing)}")
        table = state["table"].detach().to("cpu", torch.float64, copy=True)
        self._chunks, self._pending = ([table] if len(table) else []), []
        self._steps = [int(step) for step in state["steps"]]
        self._blocks = [[int(row) for row in block] for block in state["blocks"]]
        self._block_tasks = [[int(i) for i in tasks] for tasks in state["block_tasks"]]
        self._open, self._trained = [int(i) for i in state["open"]], [int(i) for i in state["trained"]]
        self._inside, self._probed, self._warned = (bool(state[name]) for name in ("inside", "probed", "warned"))
        self._iteration, self._local = int(state["iteration"]), int(state["local"])
        self._emitted = [int(count) for count in state["emitted"]]


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except TypeError:  # a lazily generated stream
        return None


__all__ = [
    "Dynamics",
    "EffectTotals",
    "Shock",
    "TaskDynamics",
    "block_effects",
    "effect_totals",
    "forgetting",
    "last_ends",
    "shock_and_recovery",
    "step_effects",
]
