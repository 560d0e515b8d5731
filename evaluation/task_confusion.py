"""Which task a learner takes a sample for: the confusion of tasks, and the share of samples that stay in their task.

A class-incremental learner errs in two ways: it takes a sample for another class of its task, or for one of another
task. Accuracy alone doesn't say which. Here every prediction is assigned to the task that its class belongs to, by the
classes of the evaluated experiences. Where tasks share classes (domain-incremental streams) this has no meaning, and
nothing is emitted.

Cost: a reference to the predictions of each batch, which the accuracies use too, and one sum per evaluated experience
on the device; read back once per evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue
from numpy.typing import NDArray
from torch import Tensor

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.map_figures import task_confusion_figure
from avalanche_firn.evaluation.predictions import best_columns
from avalanche_firn.plugins.finite_words import not_evaluated

__all__ = ["WITHIN_TASK", "TaskConfusion", "confusion_shares"]

WITHIN_TASK = "accuracy/within-task"
_TOGETHER = 256  # batches whose predictions are added up at once
Counts = list[list[int]]


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except TypeError:  # a lazily generated stream
        return None


def _classes(experience: Any) -> list[int]:
    return sorted({int(c) for c in getattr(experience, "classes_in_this_experience", None) or ()})


def confusion_shares(counts: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.float64]:
    """Shares of every task's samples by the task of the predicted class, mean over runs.

    Args:
        counts: one (T, T) or (T, T + 1) matrix of counts per run, all of the same T; see :class:`TaskConfusion`.

    Returns:
        (T, T) float64, or (T, T + 1) if a run has the column of predictions of no task; NaN in the row of a task
        without samples.

    Raises:
        ValueError: no run, or matrices of other shapes.
    """
    found = [np.asarray(matrix, dtype=np.float64) for matrix in counts]
    shapes = [matrix.shape for matrix in found]
    tasks = shapes[0][0] if shapes and shapes[0] else 0
    if not tasks or any(shape not in ((tasks, tasks), (tasks, tasks + 1)) for shape in shapes):
        raise ValueError(f"counts: got shapes {shapes}; accepted is (T, T) or (T, T + 1), the same T for every run")
    width = max(shape[1] for shape in shapes)
    padded = np.stack([np.pad(matrix, ((0, 0), (0, width - matrix.shape[1]))) for matrix in found])
    totals = padded.sum(2, keepdims=True)
    shares = np.divide(padded, totals, out=np.full_like(padded, np.nan), where=totals > 0)
    mean: NDArray[np.float64] = shares.mean(0)
    return mean


class TaskConfusion(PluginMetric["Counts | None"]):
    """Counts, per evaluated experience, the tasks that the predicted classes belong to.

    ``counts[i][j]``: samples of the i-th task seen whose predicted class belongs to the j-th one. Predictions of a
    class of no task seen so far are in a column behind, which is there only if it isn't empty. A row adds up to the
    samples of its task, and its diagonal entry is at least the number of right ones.

    Emitted after an evaluation of all tasks seen, over the index of the experience trained last:
    ``accuracy/within-task``, the share of the pooled samples of the tasks seen whose prediction lies in their own task;
    after the last experience also ``accuracy/confusion``, an image of the shares. Nothing is emitted by an evaluation
    before any training or inside an experience, without any sample, or where a class belongs to several evaluated
    experiences or an experience doesn't tell its classes.

    An experience of the evaluated stream counts as seen when the training experience of the same index was trained; if
    the two streams differ in length (joint training, online streams), when all of its classes were.

    Args:
        stream: name of the evaluated stream to follow, ``"test"`` or ``"valid"``; others are ignored.
        prefix: put before every tag; default "" for "test", "validation/" for "valid", else the stream's name.
        image: emit the image after the last experience.

    Predictions are the argmax over ``strategy.mb_output`` of shape (B, max class id + 1), original class ids. Raises
    TypeError for another kind of output, NonFiniteError for NaN among them.
    """

    def __init__(self, *, stream: str = "test", prefix: str | None = None, image: bool = True) -> None:
        super().__init__()
        self.stream = stream
        self.prefix = {"test": "", "valid": "validation/"}.get(stream, f"{stream}/") if prefix is None else prefix
        self.image = image
        self._trained: list[int] = []
        self._trained_classes: set[int] = set()
        self._train_length: int | None = None
        self._current: int | None = None
        self._task_classes: list[list[int]] | None = None  # of the whole evaluated stream
        self._counts: Counts | None = None
        self._within: dict[int, float] = {}
        self._follow: int | None = None  # index of the experience being evaluated
        self._found: list[tuple[Tensor, Tensor]] = []
        self._width = 0  # columns of the outputs
        self._sums: dict[int, Tensor] = {}
        self._classes: dict[int, list[int]] = {}
        self._eval_stream: Any = None

    def __str__(self) -> str:
        return f"TaskConfusion({self.stream})"

    def result(self) -> Counts | None:
        """Counts of the last evaluation of all tasks seen; None before it and where tasks share classes."""
        return None if self._counts is None else [list(row) for row in self._counts]

    def curve(self) -> list[float | None]:
        """``accuracy/within-task`` after every experience trained; empty if it was never defined."""
        if not self._within:
            return []
        return [self._within.get(step) for step in range(len(self._trained))]

    def reset(self) -> None:
        """Nothing to do between experiences: the counts are those of the last evaluation."""

    # ----------------------------------------------------------------- hooks
    def before_training_exp(self, strategy: Any) -> None:
        self._current = int(strategy.experience.current_experience)
        self._trained_classes |= set(_classes(strategy.experience))
        self._train_length = _length(full_stream(strategy.experience))

    def after_training_exp(self, strategy: Any) -> None:
        if self._current is not None:
            self._trained.append(self._current)
        self._current = None

    def before_eval(self, strategy: Any) -> None:
        self._follow, self._found, self._sums, self._classes, self._eval_stream = None, [], {}, {}, None
        self._width = 0

    def before_eval_exp(self, strategy: Any) -> None:
        experience = strategy.experience
        between = self._current is None and bool(self._trained)
        followed = between and experience.origin_stream.name == self.stream
        self._follow, self._found = int(experience.current_experience) if followed else None, []
        if self._follow is not None:
            self._sums.pop(self._follow, None)  # of two evaluations of an experience the last counts

    def after_eval_iteration(self, strategy: Any) -> None:
        if self._follow is None:
            return
        output = strategy.mb_output
        if not isinstance(output, Tensor) or output.ndim != 2:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"mb_output: got {kind}; accepted are logits of shape (B, max class id + 1)")
        self._found.append(best_columns(output))
        self._width = max(self._width, output.shape[1])
        if len(self._found) >= _TOGETHER:
            self._count(self._follow)

    def after_eval_exp(self, strategy: Any) -> None:
        if self._follow is not None:
            self._count(self._follow)
            self._classes[self._follow] = _classes(strategy.experience)
            self._eval_stream = full_stream(strategy.experience)
        self._follow = None

    def _count(self, index: int) -> None:
        """Add the waiting predictions to the experience's sums (1 + C,), on the device: [0] rows with a NaN."""
        if not self._found:
            return
        top, column = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        self._found = []
        places = torch.where(top == top, column + 1, 0)  # the maximum of a row with a NaN is NaN
        sums = self._sums.get(index)
        width = 1 + self._width
        if sums is None:
            sums = places.new_zeros(width)
        elif len(sums) < width:  # a head that grew between two experiences
            sums = torch.nn.functional.pad(sums, (0, width - len(sums)))
        self._sums[index] = sums.scatter_add_(0, places, torch.ones_like(places))

    def after_eval(self, strategy: Any) -> list[MetricValue] | None:
        if not self._sums or self._tasks_overlap():
            return None
        seen = self._seen()
        if not self._sums.keys() & set(seen) or not set(seen) <= self._classes.keys():
            return None  # a partial evaluation
        if any(not self._classes[i] for i in seen if i in self._sums):
            return None  # nobody says which classes are the task's
        counts = self._by_task(strategy, seen)
        step, total = len(self._trained) - 1, sum(map(sum, counts))
        if not total:
            return None  # batches without a sample
        within = sum(counts[i][i] for i in range(len(seen))) / total
        repeated = self._counts == counts and self._within.get(step) == within
        self._counts, self._within[step] = counts, within
        if repeated:
            return None
        emitted = [MetricValue(self, f"{self.prefix}{WITHIN_TASK}", within, step)]
        if self.image and len(set(self._trained)) == self._train_length:
            shares = confusion_shares([counts])
            picture = AlternativeValues(task_confusion_figure(shares), torch.from_numpy(shares))
            emitted.append(MetricValue(self, f"{self.prefix}accuracy/confusion", picture, step))
        return emitted

    # ------------------------------------------------------------------ work
    def _by_task(self, strategy: Any, seen: Sequence[int]) -> Counts:
        """Counts by true and predicted task of the tasks seen; the only place that waits for the device."""
        known = [i for i in seen if i in self._sums]  # others have no sample
        width = max(len(self._sums[i]) for i in known)
        padded = [torch.nn.functional.pad(self._sums[i], (0, width - len(self._sums[i]))) for i in known]
        table = dict(zip(known, torch.stack(padded).cpu().numpy(), strict=True))
        for index, sums in table.items():
            if sums[0]:
                where = f"experience {index} of the stream {self.stream!r}"
                raise not_evaluated(strategy, f"the outputs of {sums[0]} samples hold a NaN", where)
        task_of = np.full(width, len(seen))  # no task seen
        for place, index in enumerate(seen):
            task_of[[1 + c for c in self._classes[index] if 1 + c < width]] = place
        counts = np.zeros((len(seen), len(seen) + 1), dtype=np.int64)
        for row, index in zip(counts, seen, strict=True):
            if index in table:
                np.add.at(row, task_of, table[index])
        return (counts if counts[:, -1].any() else counts[:, :-1]).tolist()  # type: ignore[no-any-return]

    def _tasks_overlap(self) -> bool:
        """Whether a class belongs to several experiences, of the whole stream where it can be listed."""
        if self._task_classes is None and _length(self._eval_stream) is not None:
            self._task_classes = [_classes(experience) for experience in self._eval_stream]
        lists = [*self._classes.values()] if self._task_classes is None else self._task_classes
        return sum(map(len, lists)) > len({c for classes in lists for c in classes})

    def _seen(self) -> list[int]:
        columns = _length(self._eval_stream)
        if columns is None or columns == self._train_length:
            return sorted(set(self._trained))
        lists = self._task_classes or []
        return [i for i, ids in enumerate(lists) if ids and set(ids) <= self._trained_classes]

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """What was trained, and counts and shares so far."""
        return {
            "trained": list(self._trained),
            "trained_classes": sorted(self._trained_classes),
            "train_length": self._train_length,
            "current": self._current,
            "counts": self.result(),
            "within": [[step, share] for step, share in self._within.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._trained = [int(i) for i in state["trained"]]
        self._trained_classes = {int(c) for c in state["trained_classes"]}
        self._train_length, self._current = state["train_length"], state["current"]
        counts = state["counts"]
        self._counts = None if counts is None else [[int(n) for n in row] for row in counts]
        self._within = {int(step): float(share) for step, share in state["within"]}
        self._task_classes = None
