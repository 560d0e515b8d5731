"""Evaluation: 12,800 samples in ten experiences with the task matrix and TensorBoard, against a raw loop.

* ``batched loop``: what the others are measured in: for every experience a data set with ``__getitems__`` under a
  ``DataLoader``, correct predictions and loss summed on the device and read once per experience; nothing is logged.
* ``ours``: ``strategy.eval(stream)`` of a strategy with all our metrics of a run (task matrix, accuracy and loss per
  experience and stream) and TensorBoard; ``ours, fast path``: with ``FastPathPlugin()``.
* ``Naive, Avalanche's metrics``: Avalanche's strategy with its accuracy and loss metrics and TensorBoard, for
  reference.

Strategies have trained the ten experiences on a few samples each before, so that there is a task matrix to go on with.
``accuracy_deviation``: largest difference of a task's accuracy from the loop's, the samples being the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.plugins.fast_path import FastPathPlugin
from speed.measure import Row, Settings, interleaved, rows_from
from speed.workload import CLASSES, Batched, as_it_is, board, held, network, on, recorded, stream_of, with_targets

__all__ = ["BASELINE", "BOUND", "CASES", "rows"]

BENCHMARK = "evaluation"
BASELINE, OURS, FAST, REFERENCE = "batched loop", "ours", "ours, fast path", "Naive, Avalanche's metrics"
BOUND = 1.3
EXPERIENCES = 10


@dataclass(frozen=True)
class Case:
    """What is evaluated: a network, samples in all, samples of a batch."""

    backbone: str
    samples: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.backbone}, {self.samples} samples in {EXPERIENCES} experiences, batch {self.batch}"


CASES = tuple(Case(backbone, 12_800, batch) for backbone in ("mlp", "vit_firn_32") for batch in (64, 256))
QUICK = (Case("mlp", 1280, 64), Case("vit_firn_32", 80, 64))


def by_class(data: TensorDataset) -> list[TensorDataset]:
    """One data set per class."""
    x, y = data.tensors
    return [with_targets(x[y == c], y[y == c]) for c in range(CLASSES)]


@torch.no_grad()
def evaluate_by_hand(
    model: nn.Module, tasks: list[TensorDataset], batch: int, device: torch.device
) -> list[list[float]]:
    """`[accuracy, loss]` of every task, as a careful person writes it."""
    model.eval()
    results: list[Any] = []
    for task in tasks:
        correct = torch.zeros((), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for x, y in _batches(task, batch):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            output = model(x)
            loss += F.cross_entropy(output, y, reduction="sum")
            correct += (output.argmax(1) == y).sum()
        results.append((torch.stack([correct.double(), loss]) / len(task)).tolist())
    return results


def _batches(task: TensorDataset, batch: int) -> Any:
    if task.tensors[0].is_cuda:
        return zip(*(tensor.split(batch) for tensor in task.tensors), strict=True)
    return DataLoader(Batched(task), batch, collate_fn=as_it_is)


class _Evaluation:
    """One case on one device: the data, and a way to evaluate it for every contestant."""

    def __init__(self, case: Case, device: torch.device, stack: ExitStack) -> None:
        self.case, self.device = case, device
        data = by_class(held(case.backbone, 32, case.samples, seed=1))
        self.tasks = [on(task, device) for task in data]  # where the loop and the fast path have them
        few = [with_targets(*(t[:4] for t in task.tensors)) for task in by_class(held(case.backbone, 32, 40))]
        self.plain = stream_of(few, data)
        self.near = stream_of([on(task, device) for task in few], self.tasks)
        self.accuracies: dict[str, list[float]] = {}
        reference = EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True),
            loss_metrics(experience=True, stream=True),
            loggers=[stack.enter_context(board())],
            collect_all=False,
        )
        self.strategies = {
            REFERENCE: self._trained(reference),
            OURS: self._trained(stack.enter_context(recorded())),
            FAST: self._trained(stack.enter_context(recorded()), FastPathPlugin()),
        }
        self.model = self.strategies[FAST].model

    def _trained(self, log: EvaluationPlugin, *plugins: Any) -> Any:
        model = network(self.case.backbone, 32, classes=0)
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            eval_mb_size=self.case.batch,
            device=self.device,
            plugins=list(plugins),
            evaluator=log,
        )
        for experience in (self.near if plugins else self.plain).train_stream:
            torch.manual_seed(int(experience.current_experience))  # the same heads for all
            strategy.train(experience, eval_streams=[], pin_memory=False)
        return strategy

    def contestants(self) -> dict[str, Callable[[], Any]]:
        """Ways to evaluate, the loop first."""

        def way(name: str) -> Callable[[], Any]:
            stream = (self.near if name == FAST else self.plain).test_stream
            return lambda: self.strategies[name].eval(stream)

        def loop() -> None:
            results = evaluate_by_hand(self.model, self.tasks, self.case.batch, self.device)
            self.accuracies[BASELINE] = [accuracy for accuracy, _ in results]

        return {BASELINE: loop, **{name: way(name) for name in self.strategies}}

    def details(self) -> dict[str, dict[str, Any]]:
        """How far the accuracies of our task matrices are from the loop's."""
        found: dict[str, dict[str, Any]] = {}
        for name in (OURS, FAST):
            metrics = self.strategies[name].evaluator.metrics
            matrix = next(m for m in metrics if isinstance(m, ResultMatrixMetric) and m.stream == "test").matrix
            ours = Tensor(matrix.accuracy[-1])
            found[name] = {"accuracy_deviation": float((ours - Tensor(self.accuracies[BASELINE])).abs().max())}
        return found


def rows(settings: Settings) -> list[Row]:
    """Figures of all cases."""
    found: list[Row] = []
    for case in QUICK if settings.quick else CASES:
        if not settings.wants(case.name):
            continue
        with ExitStack() as stack:
            contest = _Evaluation(case, settings.device, stack)
            timings = interleaved(contest.contestants(), settings.rounds_or(5), device=settings.device)
            found += rows_from(
                timings,
                BENCHMARK,
                case.name,
                settings,
                to_what=BASELINE,
                images=case.samples,
                bounds={FAST: BOUND},
                details=contest.details(),
            )
    return found
