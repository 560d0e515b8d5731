"""The figures of continual learning, defined once, as functions of an accuracy matrix.

Row ``t`` of a matrix ``R`` holds the accuracies right after training step ``t``, column ``i`` those of task ``i``;
NaN means *not evaluated*. ``T`` is the number of rows, ``N >= T`` the number of columns. The functions are pure and
do not care about the unit (fractions or percent); forward transfer reads the part above the diagonal, all others read
on and below it. A NaN is skipped where a maximum is taken over earlier steps; anywhere else it raises
:class:`NotEvaluatedError`, because a mean over the entries that happen to exist would be another figure. With one task
there is no forgetting and no transfer: NaN.

Two families are easily mixed up: *pooled* accuracies count samples (large tasks weigh more), *task means* count tasks.
`last_accuracy` and `incremental_accuracy` pool, `average_accuracy` and `average_incremental_accuracy` do not. They
agree when all tasks have equally many test samples. Cost: microseconds; no dependency but NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

FORGETTING_KINDS = {"max": "max_seen", "after_training": "diag"} | {k: k for k in ("max_seen", "diag", "max_all")}


class NotEvaluatedError(ValueError):
    """A figure needs an entry of the matrix that was never evaluated."""


def _matrix(matrix: ArrayLike, *, aligned: bool = False) -> FloatArray:
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or (aligned and values.shape[0] > values.shape[1]):
        rule = "1 <= T <= N, step t having trained task t" if aligned else "T >= 1 steps, N >= 1 tasks"
        raise ValueError(f"matrix: got shape {values.shape}; accepted is (T, N) with {rule}")
    return values


def _need(values: NDArray[Any], what: str) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    if np.isnan(values).any():
        raise NotEvaluatedError(f"{what}: {np.isnan(values).sum()} of {values.size} entries were not evaluated (NaN)")
    return values


def _tasks(tasks: Sequence[int] | None, default: range, columns: int) -> list[int]:
    chosen = list(default if tasks is None else tasks)
    wrong = [i for i in chosen if not 0 <= i < columns]
    if wrong:
        raise ValueError(f"tasks: {wrong} lie outside the {columns} columns of the matrix")
    return chosen


def average_accuracy(
    matrix: ArrayLike, *, tasks: Sequence[int] | None = None, weights: ArrayLike | None = None
) -> float:
    """Mean over the seen tasks after the last step: ``A_T = mean_{i < T} R[T-1, i]``.

    Args:
        matrix: (T, N), see the module. ``A_t`` of an earlier step is the value for ``matrix[: t + 1]``.
        tasks: columns that count; default all ``i < T``. For joint training (one row, many columns) pass all of them.
        weights: (N,) non-negative weight of each column, e.g. classes per task; default equal weights.

    In the unit of the matrix; NaN when ``tasks`` is empty or its weights sum to zero. Raises NotEvaluatedError when an
    entry that counts is NaN.
    """
    values = _matrix(matrix)
    chosen = _tasks(tasks, range(min(values.shape)), values.shape[1])
    row = _need(values[-1, chosen], "average accuracy, last row")
    weight = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != (values.shape[1],) or not (weight >= 0).all():
        raise ValueError(f"weights: accepted is one non-negative number for each of {values.shape[1]} columns")
    share = weight[chosen]
    return float((row * share).sum() / share.sum()) if share.sum() > 0 else math.nan


def average_incremental_accuracy(matrix: ArrayLike) -> float:
    """Mean over the steps of the task mean: ``mean_t A_t``, every ``A_t`` from :func:`average_accuracy`.

    Raises NotEvaluatedError when an entry on or below the diagonal is NaN.
    """
    values = _matrix(matrix)
    return float(np.mean([average_accuracy(values[: t + 1]) for t in range(values.shape[0])]))


def _pooled(correct: ArrayLike, total: ArrayLike, seen: Sequence[Sequence[int]] | None) -> list[float]:
    hits, sizes = _matrix(correct), np.asarray(total, dtype=np.float64)
    if sizes.shape != (hits.shape[1],):
        raise ValueError(f"total: got shape {sizes.shape}; accepted is one count for each of {hits.shape[1]} columns")
    if seen is not None and len(seen) != hits.shape[0]:
        raise ValueError(f"seen: got {len(seen)} lists; accepted is one for each of {hits.shape[0]} rows")
    hits, sizes = np.where(hits < 0, np.nan, hits), np.where(sizes < 0, np.nan, sizes)
    if (hits > sizes).any():
        raise ValueError("correct: more correct samples than samples in a task")
    pooled = []
    for t, row in enumerate(hits):
        columns = _tasks(seen[t] if seen is not None else None, range(min(t + 1, len(sizes))), len(sizes))
        got = _need(row[columns], f"pooled accuracy, correct counts of row {t}")
        size = _need(sizes[columns], f"pooled accuracy, sizes of the tasks seen at row {t}").sum()
        pooled.append(float(got.sum() / size) if size > 0 else math.nan)
    return pooled


def last_accuracy(correct: ArrayLike, total: ArrayLike, *, seen: Sequence[Sequence[int]] | None = None) -> float:
    """Accuracy over the pooled samples of all seen classes after the last step, in [0, 1].

    ``sum_{i seen} correct[T-1, i] / sum_{i seen} total[i]``: what class-incremental papers call last accuracy
    (SLCA: Last-Acc). It is *not* the mean of the task accuracies.

    Args:
        correct: (T, N) correct test samples; NaN or a negative number where not evaluated.
        total: (N,) test samples per task; an empty task (0) adds nothing.
        seen: per row the columns that were trained by then; default ``0..t``.

    NaN when no seen task has a test sample. Raises NotEvaluatedError when one was not evaluated in the last row.
    """
    hits = _matrix(correct)
    rows = [range(min(hits.shape))] if seen is None else [seen[-1]]
    return _pooled(hits[-1:], total, rows)[0]


def incremental_accuracy(
    correct: ArrayLike,
    total: ArrayLike,
    *,
    seen: Sequence[Sequence[int]] | None = None,
    rounded: str | None = None,
) -> float:
    """Mean over the steps of the pooled accuracy over all classes seen by then, in [0, 1].

    Args:
        correct, total, seen: as for :func:`last_accuracy`.
        rounded: ``"percent2"`` rounds each step to two decimals of a percent before the mean, as the released code of
            SLCA prints Inc-Acc; default None, exact.

    Steps at which no seen task has a test sample are left out; NaN when that holds for all of them. Raises
    NotEvaluatedError when a task that was seen at some step was not evaluated then.
    """
    if rounded not in (None, "percent2"):
        raise ValueError(f"rounded: got {rounded!r}; accepted are None and 'percent2'")
    steps = np.asarray([value for value in _pooled(correct, total, seen) if not np.isnan(value)])
    if rounded == "percent2":
        steps = np.around(100 * steps, 2) / 100
    return float(steps.mean()) if steps.size else math.nan


def forgetting(
    matrix: ArrayLike, kind: str = "max_seen", include_last: bool = False, tasks: Sequence[int] | None = None
) -> float:
    """How far earlier tasks have fallen by the last step: mean over ``i < T-1`` of ``reference_i - R[T-1, i]``.

    Args:
        matrix: (T, N) with ``N >= T``; step ``t`` trained task ``t``. ``F_t`` is the value for ``matrix[: t + 1]``.
        kind: the reference, each with the public code that it equals:

            * ``"max_seen"`` (alias ``"max"``): ``max_{i <= t <= T-2} R[t, i]``, the best value before the last step
              (Chaudhry et al. 2018; FACIL). Negative when the last step is better than all earlier ones.
            * ``"diag"`` (alias ``"after_training"``): ``R[i, i]``, right after the task was trained (Avalanche,
              UCL). Equals minus backward transfer.
            * ``"max_all"``: ``max_t R[t, i]`` over every row, last and earlier-than-trained ones included; never
              negative (``utils/metrics.py`` of UCL).
        include_last: count the last task too and divide by ``T`` (first release of UCL, with ``"max_all"``).
        tasks: columns that count, e.g. without tasks whose test set is empty; default all.

    In the unit of the matrix; NaN with one step or when no task counts. Raises NotEvaluatedError for a NaN in the
    last row or, with ``"diag"``, on the diagonal, and ValueError for an unknown kind or more rows than columns.
    """
    if kind not in FORGETTING_KINDS:
        raise ValueError(f"kind: got {kind!r}; accepted are {', '.join(sorted(FORGETTING_KINDS))}")
    values, kind = _matrix(matrix, aligned=True), FORGETTING_KINDS[kind]
    steps = values.shape[0]
    chosen = _tasks(tasks, range(values.shape[1]), values.shape[1])
    chosen = [i for i in chosen if i < steps - 1 or (include_last and i == steps - 1)]
    if steps == 1 or not chosen:
        return math.nan
    last = _need(values[-1, chosen], "forgetting, last row")
    if kind == "diag":
        reference = _need(values[chosen, chosen], "forgetting, diagonal")
    elif kind == "max_all":
        reference = np.nanmax(values[:, chosen], axis=0)
    else:
        spans = [values[i : max(steps - 1, i + 1), i] for i in chosen]
        missing = [i for i, span in zip(chosen, spans, strict=True) if np.isnan(span).all()]
        if missing:
            raise NotEvaluatedError(f"forgetting: tasks {missing} were never evaluated before the last step")
        reference = np.asarray([np.nanmax(span) for span in spans])
    return float((reference - last).mean())


def backward_transfer(matrix: ArrayLike, tasks: Sequence[int] | None = None) -> float:
    """Influence of later training on earlier tasks: mean over ``i < T-1`` of ``R[T-1, i] - R[i, i]``.

    Lopez-Paz and Ranzato 2017; equals ``-forgetting(matrix, "diag")``. Negative values are forgetting. NaN with one
    step. Raises NotEvaluatedError for a NaN in the last row or on the diagonal.
    """
    return -forgetting(matrix, "diag", tasks=tasks)


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike | None = None, tasks: Sequence[int] | None = None) -> float:
    """Influence of earlier training on tasks to come: mean over ``1 <= i < T`` of ``R[i-1, i] - baseline[i]``.

    Lopez-Paz and Ranzato 2017. Needs evaluations of tasks *before* they are trained (the entries next above the
    diagonal); in class-incremental streams those are about zero by construction, so the figure only speaks where
    labels are shared between tasks.

    Args:
        matrix: (T, N) with ``N >= T``.
        baseline: (N,) accuracy of each task before any training; None = not measured, which gives NaN.
        tasks: columns that count; default all.

    Raises NotEvaluatedError when a needed entry of the matrix or of the baseline is NaN.
    """
    values = _matrix(matrix, aligned=True)
    if baseline is None:
        return math.nan
    base = np.asarray(baseline, dtype=np.float64)
    if base.shape != (values.shape[1],):
        raise ValueError(f"baseline: got shape {base.shape}; accepted is one value for each of {values.shape[1]} tasks")
    chosen = [i for i in _tasks(tasks, range(values.shape[1]), values.shape[1]) if 1 <= i < values.shape[0]]
    if not chosen:
        return math.nan
    ahead = _need(values[[i - 1 for i in chosen], chosen], "forward transfer, entries above the diagonal")
    return float((ahead - _need(base[chosen], "forward transfer, baseline")).mean())


class ResultMatrix:
    """The integer counts behind the figures: correct samples per (step, task), samples and class ids per task.

    ``record(-1, i, ...)`` stores the evaluation before any training, the baseline of forward transfer. Unless
    :meth:`describe` says otherwise, step ``t`` trained task ``t`` and has seen tasks ``0..t``. Accuracies are
    fractions in [0, 1], transfer and forgetting lie in [-1, 1]. A figure is NaN (None in :meth:`summary`) when
    something that it needs was not evaluated: a partial evaluation never passes for a complete one. Tasks without a
    test sample are left out.

    Args:
        classes: original class ids of each task, where known.
        forgetting_kind: see :func:`forgetting`.
        rounded: see :func:`incremental_accuracy`.
    """

    def __init__(
        self, *, classes: Sequence[Sequence[int]] = (), forgetting_kind: str = "max_seen", rounded: str | None = None
    ) -> None:
        if forgetting_kind not in FORGETTING_KINDS:
            raise ValueError(f"forgetting_kind: got {forgetting_kind!r}; accepted are {sorted(FORGETTING_KINDS)}")
        if rounded not in (None, "percent2"):
            raise ValueError(f"rounded: got {rounded!r}; accepted are None and 'percent2'")
        self.forgetting_kind = forgetting_kind
        self.rounded = rounded
        self._correct: dict[tuple[int, int], int] = {}
        self._total: dict[int, int] = {}
        self._classes = {i: sorted(int(c) for c in ids) for i, ids in enumerate(classes)}
        self._trained: dict[int, int | None] = {}
        self._seen: dict[int, list[int]] = {}

    def record(self, t: int, i: int, correct: int, total: int, *, classes: Iterable[int] | None = None) -> None:
        """Stores ``correct`` of ``total`` samples of task ``i`` after step ``t`` (-1: before training).

        The last write wins. Raises ValueError for impossible counts, and when ``total`` differs from an earlier one
        of the same task: rows over different test data cannot be compared.
        """
        if t < -1 or i < 0:
            raise ValueError(f"record: got step {t}, task {i}; accepted are step >= -1 and task >= 0")
        if not 0 <= correct <= total:
            raise ValueError(f"record: got correct={correct}, total={total}; accepted is 0 <= correct <= total")
        if self._total.setdefault(i, int(total)) != total:
            raise ValueError(f"record: task {i} has {total} test samples now and had {self._total[i]} before")
        self._correct[t, i] = int(correct)
        if classes is not None:
            self._classes[i] = sorted(int(c) for c in classes)

    def describe(self, t: int, *, task: int | None, seen: Iterable[int]) -> None:
        """Says which task step ``t`` trained (None: no single one, as in joint training) and which are seen by then."""
        self._trained[t], self._seen[t] = task, sorted(int(i) for i in seen)

    def seen(self, t: int) -> list[int]:  # tasks seen after step t
        return list(self._seen.get(t, range(t + 1)))

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N): steps recorded, tasks known so far."""
        rows = max((t for t, _ in self._correct), default=-1) + 1
        columns = [*self._total, *(i for t in range(rows) for i in self.seen(t))]
        return rows, max(columns, default=-1) + 1

    @property
    def correct(self) -> NDArray[np.int64]:
        """(T, N) int64 counts, -1 where not evaluated."""
        return self._counts(range(self.shape[0]))

    @property
    def total(self) -> NDArray[np.int64]:
        """(N,) int64 test samples per task, -1 where never evaluated."""
        return np.asarray([self._total.get(i, -1) for i in range(self.shape[1])], dtype=np.int64)

    @property
    def classes(self) -> list[list[int]]:
        """Class ids per task, empty where unknown."""
        return [list(self._classes.get(i, [])) for i in range(max([self.shape[1], *(k + 1 for k in self._classes)]))]

    @property
    def accuracy(self) -> FloatArray:
        """(T, N) float64 accuracies in [0, 1], NaN where not evaluated or empty."""
        return self._fractions(self.correct)

    @property
    def baseline(self) -> FloatArray:
        """(N,) float64 accuracies before any training, NaN where not evaluated."""
        return self._fractions(self._counts(range(-1, 0)))[0]

    def _counts(self, steps: range) -> NDArray[np.int64]:
        columns = range(self.shape[1])
        rows = [[self._correct.get((t, i), -1) for i in columns] for t in steps]
        return np.asarray(rows, dtype=np.int64).reshape(len(steps), len(columns))

    def _fractions(self, correct: NDArray[np.int64]) -> FloatArray:
        known = (correct >= 0) & (self.total > 0)
        return np.where(known, correct / np.maximum(self.total, 1), np.nan)

    def summary(self, t: int | None = None) -> dict[str, float | None]:
        """The figures after step ``t`` (default the last) under their tags; None where undefined."""
        rows = self.shape[0]
        t = rows - 1 if t is None else t
        if not 0 <= t < rows:
            raise ValueError(f"t: got {t}; the matrix has {rows} steps")
        accuracy, correct, total = self.accuracy[: t + 1], self.correct[: t + 1], self.total
        seen = [self.seen(step) for step in range(t + 1)]
        figures: dict[str, Callable[[], float]] = {
            "accuracy/average": lambda: average_accuracy(accuracy, tasks=[i for i in seen[t] if total[i] != 0]),
            "accuracy/last": lambda: last_accuracy(correct, total, seen=seen),
            "accuracy/incremental": lambda: incremental_accuracy(correct, total, seen=seen, rounded=self.rounded),
            **dict.fromkeys(("forgetting/average", "transfer/backward", "transfer/forward"), lambda: math.nan),
        }
        order = [i for i in (self._trained.get(step, step) for step in range(t + 1)) if i is not None]
        if len(set(order)) == t + 1:  # otherwise "the task of step t" means nothing
            square, base = accuracy[:, order], self.baseline[order]
            filled = [k for k, i in enumerate(order) if total[i] != 0]
            figures["forgetting/average"] = lambda: forgetting(square, self.forgetting_kind, tasks=filled)
            figures["transfer/backward"] = lambda: backward_transfer(square, tasks=filled)
            figures["transfer/forward"] = lambda: forward_transfer(square, base, tasks=filled)
        return {name: _or_none(figure) for name, figure in figures.items()}

    def _figure(self, name: str) -> float:
        return math.nan if not self.shape[0] or (value := self.summary()[name]) is None else value

    last = property(lambda self: self._figure("accuracy/last"), doc="Pooled accuracy over all seen tasks.")
    average = property(lambda self: self._figure("accuracy/average"), doc="Mean accuracy over the seen tasks.")
    incremental = property(lambda self: self._figure("accuracy/incremental"), doc="Mean of `last` over the steps.")
    forgetting = property(lambda self: self._figure("forgetting/average"), doc="Forgetting of `forgetting_kind`.")
    backward = property(lambda self: self._figure("transfer/backward"), doc="Backward transfer.")
    forward = property(lambda self: self._figure("transfer/forward"), doc="Forward transfer.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON: counts (None where not evaluated), sizes, classes and what the steps trained."""
        steps, columns = map(range, self.shape)
        return {
            "correct": [[self._correct.get((t, i)) for i in columns] for t in steps],
            "total": [self._total.get(i) for i in columns],
            "baseline": [self._correct.get((-1, i)) for i in columns],
            "classes": self.classes,
            "trained": [self._trained.get(t, t) for t in steps],
            "seen": [self.seen(t) for t in steps],
            "forgetting_kind": self.forgetting_kind,
            "rounded": self.rounded,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResultMatrix:
        """The inverse of :meth:`to_dict`; raises ValueError when a key is missing or the sizes do not fit."""
        missing = [k for k in ("correct", "total", "baseline", "trained", "seen") if k not in data]
        if missing:
            raise ValueError(f"result matrix: missing keys {missing}")
        rows, total = [data["baseline"], *data["correct"]], data["total"]
        steps = [*zip(data["trained"], data["seen"], strict=True)]
        if {len(row) for row in rows} != {len(total)} or len(steps) != len(data["correct"]):
            raise ValueError("result matrix: the lengths of correct, total, baseline, trained and seen do not fit")
        matrix = cls(**{k: data[k] for k in ("classes", "forgetting_kind", "rounded") if k in data})
        for t, row in enumerate(rows, start=-1):
            for i, count in enumerate(row):
                if count is not None:
                    matrix.record(t, i, count, total[i])
        for t, (task, seen) in enumerate(steps):
            matrix.describe(t, task=task, seen=seen)
        return matrix

    state_dict = to_dict

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the contents by those of a ``state_dict()``, which is :meth:`to_dict`."""
        self.__dict__.update(type(self).from_dict(state).__dict__)


def _or_none(figure: Callable[[], float]) -> float | None:
    try:
        return None if math.isnan(value := figure()) else value
    except NotEvaluatedError:
        return None
