"""Avalanche metrics with one tag vocabulary and two declared steps.

Pass them to Avalanche's own ``EvaluationPlugin``; its loggers write every value under the bare tag. Values about a
training step (loss, rates, throughput) are plotted over training iterations, values about the stream (accuracies,
forgetting, transfer, cost per experience) over the index of the experience, so that methods with other batch sizes or
epochs line up. Nothing here waits for the device inside the training or evaluation loop: counts and losses accumulate
on the device and are read once per evaluated experience, once per epoch, or every ``every`` iterations.

Every metric has ``state_dict()`` / ``load_state_dict()`` of tensors and plain values. The ``before_*`` hooks never
discard what is pending, accumulators are emptied when they are emitted. A state may therefore be loaded before or after
the ``before_*`` hooks of the interrupted epoch, and the epoch continues to the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue
from torch import Tensor

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.efficiency import Efficiency
from avalanche_firn.evaluation.figures import task_matrix_figure
from avalanche_firn.evaluation.matrix import ResultMatrix
from avalanche_firn.evaluation.predictions import best_columns
from avalanche_firn.plugins.finite_words import not_evaluated

Emitted = list[MetricValue] | None
_TOGETHER = 256  # batches whose hits are added up at once


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except TypeError:  # a lazily generated stream
        return None


def _classes(experience: Any) -> set[int]:
    return {int(c) for c in getattr(experience, "classes_in_this_experience", None) or ()}


class ResultMatrixMetric(PluginMetric[ResultMatrix]):
    """Counts correct predictions per evaluated experience and emits the figures of :class:`ResultMatrix`.

    Rows are the numbers of experiences trained so far: an evaluation after ``n`` of them writes row ``n - 1``, the last
    write wins, and one before any training is the baseline of forward transfer. An evaluation *inside* an experience
    (periodic evaluation) is no row: it is emitted under ``periodic/`` over training iterations.

    Emitted after an evaluation, over the experience index: ``accuracy/task-K`` for every evaluated experience, and
    ``accuracy/average``, ``accuracy/last``, ``accuracy/incremental``, ``forgetting/average``, ``transfer/backward``,
    ``transfer/forward`` as far as they are defined (a partial evaluation has no average). After the last experience
    ``accuracy/matrix``, an image. A value that was emitted already for the same step is not repeated.

    An experience of the evaluated stream counts as seen when the training experience of the same index was trained; if
    the two streams differ in length (joint training, online streams), when all of its classes were.

    Args:
        stream: name of the evaluated stream to follow, ``"test"`` or ``"valid"``; others are ignored.
        prefix: put before every tag; default "" for "test", "validation/" for "valid", else the stream's name.
        forgetting_kind, rounded: see :class:`ResultMatrix`.
        image: emit the matrix as an image after the last experience.

    Predictions are the argmax over ``strategy.mb_output`` of shape (B, max class id + 1), compared with
    ``strategy.mb_y`` (B,), original class ids. Raises TypeError for another kind of output, and NonFiniteError at the
    end of an experience of which a sample has an output of NaN or infinity: that is no wrong answer, it is none.
    """

    def __init__(
        self,
        *,
        stream: str = "test",
        prefix: str | None = None,
        forgetting_kind: str = "max_seen",
        rounded: str | None = None,
        image: bool = True,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.prefix = {"test": "", "valid": "validation/"}.get(stream, f"{stream}/") if prefix is None else prefix
        self.image = image
        self.matrix = ResultMatrix(forgetting_kind=forgetting_kind, rounded=rounded)
        self._trained: list[int] = []
        self._trained_classes: set[int] = set()
        self._train_length: int | None = None
        self._current: int | None = None
        self._last: dict[str, tuple[int, float]] = {}
        self._correct: Tensor | None = None
        self._found: list[Tensor] = []  # right or not, per batch
        self._tops: list[Tensor] = []  # largest outputs of the same samples
        self._lost: Tensor | None = None  # samples whose outputs aren't finite
        self._followed = False  # whether the experience belongs to the stream
        self._total = 0
        self._evaluated: dict[int, tuple[int, int]] = {}
        self._eval_stream: Any = None

    def __str__(self) -> str:
        return f"ResultMatrix({self.stream})"

    def result(self) -> ResultMatrix:
        return self.matrix

    def reset(self) -> None:
        """Nothing to do between experiences: the matrix is the history of the run."""

    def before_training_exp(self, strategy: Any) -> Emitted:
        self._current = int(strategy.experience.current_experience)
        self._trained_classes |= _classes(strategy.experience)
        self._train_length = _length(full_stream(strategy.experience))
        return None

    def after_training_exp(self, strategy: Any) -> Emitted:
        if self._current is not None:
            self._trained.append(self._current)
        self._current = None
        return None

    def before_eval(self, strategy: Any) -> Emitted:
        self._evaluated, self._eval_stream = {}, None
        return None

    def before_eval_exp(self, strategy: Any) -> Emitted:
        self._correct, self._total, self._found = None, 0, []
        self._tops, self._lost = [], None
        self._followed = strategy.experience.origin_stream.name == self.stream
        return None

    def after_eval_iteration(self, strategy: Any) -> Emitted:
        if not self._followed:
            return None
        output, target = strategy.mb_output, strategy.mb_y
        if not isinstance(output, Tensor) or output.ndim != 2:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"mb_output: got {kind}; accepted are logits of shape (B, max class id + 1)")
        self._found.append(self._hits(output, target))
        self._tops.append(best_columns(output)[0])
        self._total += int(target.shape[0])
        if len(self._found) >= _TOGETHER:
            self._count()
        return None

    def _count(self) -> None:
        """Add up what was found right, on the device."""
        if self._found:
            hits = torch.cat(self._found).sum()
            lost = (~torch.cat(self._tops).isfinite()).sum()
            self._correct = hits if self._correct is None else self._correct + hits
            self._lost = lost if self._lost is None else self._lost + lost
            self._found, self._tops = [], []

    def _hits(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,) bool: which rows of the logits (B, C) are right for the class ids (B,)."""
        top, predicted = best_columns(output)  # the maximum of a row with a NaN is NaN
        return (predicted == target) & (top == top)

    def after_eval_exp(self, strategy: Any) -> Emitted:
        experience = strategy.experience
        if experience.origin_stream.name == self.stream:
            self._count()
            correct = 0
            if self._correct is not None and self._lost is not None:
                correct, lost = torch.stack([self._correct, self._lost]).tolist()
                if lost:
                    raise not_evaluated(strategy, f"the outputs of {lost} of {self._total} samples aren't finite")
            index = int(experience.current_experience)
            self._evaluated[index] = (correct, self._total)
            self._eval_stream = full_stream(experience)
            if self._current is None:
                row = len(self._trained) - 1
                self.matrix.record(row, index, correct, self._total, classes=_classes(experience))
        return None

    def after_eval(self, strategy: Any) -> Emitted:
        if not self._evaluated or (not self._trained and self._current is None):
            return None
        values = {f"accuracy/task-{i}": hit / size for i, (hit, size) in sorted(self._evaluated.items()) if size}
        if self._current is not None:
            chosen = self._evaluated.keys() & set(self._seen())
            size = sum(self._evaluated[i][1] for i in chosen)
            if size and len(chosen) == len(self._seen()):
                values["accuracy/last"] = sum(self._evaluated[i][0] for i in chosen) / size
            return self._emit(values, int(strategy.clock.train_iterations), "periodic/")
        row = len(self._trained) - 1
        aligned = self._train_length == _length(self._eval_stream)
        self.matrix.describe(row, task=self._trained[-1] if aligned else None, seen=self._seen())
        values |= {name: value for name, value in self.matrix.summary(row).items() if value is not None}
        emitted = self._emit(values, row)
        if emitted and self.image and len(set(self._trained)) == self._train_length:
            accuracy = self.matrix.accuracy
            picture = AlternativeValues(task_matrix_figure(accuracy), torch.from_numpy(accuracy))
            emitted.append(MetricValue(self, f"{self.prefix}accuracy/matrix", picture, row))
        return emitted

    def _seen(self) -> list[int]:
        trained = {*self._trained, *(() if self._current is None else (self._current,))}
        columns = _length(self._eval_stream)
        if columns is None or columns == self._train_length:
            return sorted(trained)
        if len(trained) == self._train_length:
            return list(range(columns))
        classes = [_classes(experience) for experience in self._eval_stream]
        return [i for i, ids in enumerate(classes) if ids and ids <= self._trained_classes]

    def _emit(self, values: Mapping[str, float], step: int, before: str = "") -> list[MetricValue]:
        tagged = {f"{before}{self.prefix}{name}": (step, value) for name, value in values.items()}
        new = {tag: point for tag, point in tagged.items() if self._last.get(tag) != point}
        self._last |= new
        return [MetricValue(self, tag, value, x) for tag, (x, value) in new.items()]

    def state_dict(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix.state_dict(),
            "trained": list(self._trained),
            "trained_classes": sorted(self._trained_classes),
            "train_length": self._train_length,
            "current": self._current,
            "last": {tag: list(point) for tag, point in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.matrix.load_state_dict(state["matrix"])
        self._trained = [int(i) for i in state["trained"]]
        self._trained_classes = set(state["trained_classes"])
        self._train_length, self._current = state["train_length"], state["current"]
        self._last = {tag: (int(x), float(value)) for tag, (x, value) in state["last"].items()}


class TrainingLoss(PluginMetric[float | None]):
    """``loss/train``: mean loss per sample over the epoch, as it was minimised (all terms that plugins added).

    With ``every=k`` also ``loss/running``, the mean over the last ``k`` iterations, every ``k`` iterations. Sums are
    kept on the device in float64 (float32 where the device has none).
    """

    def __init__(self, *, every: int | None = None) -> None:
        super().__init__()
        if every is not None and every < 1:
            raise ValueError(f"every: got {every}; accepted are None and numbers of iterations from 1")
        self.every = every
        self._sums: dict[str, Tensor] = {}
        self._counts = {"train": 0, "running": 0}
        self._iterations = 0

    def __str__(self) -> str:
        return "TrainingLoss"

    def result(self, which: str = "train") -> float | None:
        count = self._counts[which]
        return float(self._sums[which]) / count if count else None

    def reset(self, which: str = "train") -> None:
        self._sums.pop(which, None)
        self._counts[which] = 0

    def after_training_iteration(self, strategy: Any) -> Emitted:
        loss, size = strategy.loss.detach().mean(), int(strategy.mb_y.shape[0])
        for which in ("train",) if self.every is None else ("train", "running"):
            total = self._sums.get(which)
            if total is None or total.device != loss.device:
                dtype = torch.float32 if loss.device.type == "mps" else torch.float64
                total = torch.zeros((), dtype=dtype, device=loss.device) if total is None else total.to(loss.device)
            self._sums[which] = total.add_(loss, alpha=size)
            self._counts[which] += size
        self._iterations += 1
        if self.every is None or self._iterations % self.every:
            return None
        return self._emit("running", int(strategy.clock.train_iterations) + 1)  # the clock counts after us

    def after_training_epoch(self, strategy: Any) -> Emitted:
        return self._emit("train", int(strategy.clock.train_iterations))

    def _emit(self, which: str, step: int) -> Emitted:
        value = self.result(which)
        self.reset(which)
        return None if value is None else [MetricValue(self, f"loss/{which}", value, step)]

    def state_dict(self) -> dict[str, Any]:
        sums = {which: total.detach().clone() for which, total in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts), "iterations": self._iterations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {which: total.clone() for which, total in state["sums"].items()}
        self._counts, self._iterations = dict(state["counts"]), int(state["iterations"])


class LearningRates(PluginMetric[dict[str, float]]):
    """``lr/<group>``: the rate of every parameter group at the start of the epoch, plotted at its end.

    The name is ``group["name"]`` where there is one, else ``group-<index>``; a repeated name gets its index appended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[str, float] = {}

    def __str__(self) -> str:
        return "LearningRates"

    def result(self) -> dict[str, float]:
        return dict(self._rates)

    def reset(self) -> None:
        self._rates = {}

    def before_training_iteration(self, strategy: Any) -> Emitted:
        if not self._rates:
            for i, group in enumerate(strategy.optimizer.param_groups):
                name = str(group.get("name", f"group-{i}"))
                self._rates[f"{name}-{i}" if name in self._rates else name] = float(group["lr"])
        return None

    def after_training_epoch(self, strategy: Any) -> Emitted:
        step = int(strategy.clock.train_iterations)
        emitted = [MetricValue(self, f"lr/{name}", rate, step) for name, rate in self._rates.items()]
        self.reset()
        return emitted

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self._rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rates = {name: float(rate) for name, rate in state["rates"].items()}


class PhaseMetric(PluginMetric[str | None]):
    """``phase/<name>``: 1 from the iteration at which ``strategy.phase`` takes that value, 0 from its end.

    For strategies with phases inside the training loop; silent where ``strategy.phase`` does not exist or is None.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phase: str | None = None

    def __str__(self) -> str:
        return "Phase"

    def result(self) -> str | None:
        return self._phase

    def reset(self) -> None:
        self._phase = None

    def before_training_iteration(self, strategy: Any) -> Emitted:
        return self._observe(strategy)

    def after_training_exp(self, strategy: Any) -> Emitted:
        return self._observe(strategy)

    def _observe(self, strategy: Any) -> Emitted:
        phase, before = getattr(strategy, "phase", None), self._phase
        if phase == before:
            return None
        self._phase = None if phase is None else str(phase)
        step = int(strategy.clock.train_iterations)
        changes = [(before, 0.0), (self._phase, 1.0)]
        return [MetricValue(self, f"phase/{name}", value, step) for name, value in changes if name is not None]

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self._phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phase = state["phase"]


def continual_metrics(
    *,
    streams: Iterable[str] = ("test", "valid"),
    forgetting_kind: str = "max_seen",
    rounded: str | None = None,
    image: bool = True,
    loss_every: int | None = None,
    efficiency: bool = True,
) -> list[PluginMetric[Any]]:
    """The metrics of a run, for ``EvaluationPlugin(*continual_metrics(), loggers=[...], collect_all=False)``.

    Args:
        streams: names of the evaluated streams to follow; one that is never evaluated emits nothing.
        forgetting_kind, rounded, image: see :class:`ResultMatrixMetric`.
        loss_every: see :class:`TrainingLoss`.
        efficiency: add throughput, memory, seconds and trainable parameters, which no two runs repeat exactly.

    Raises:
        ValueError: a stream is named twice.
    """
    names = list(streams)
    if len(set(names)) != len(names):
        raise ValueError(f"streams: got {names}; accepted are different names")
    matrices = [
        ResultMatrixMetric(stream=name, forgetting_kind=forgetting_kind, rounded=rounded, image=image) for name in names
    ]
    rest = [TrainingLoss(every=loss_every), LearningRates(), PhaseMetric()]
    return [*matrices, *rest, *([Efficiency()] if efficiency else [])]
