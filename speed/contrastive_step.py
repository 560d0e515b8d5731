"""A whole training step of CILA against the same networks without any loss.

The second task of CILA, with a teacher and a buffer: views drawn, encoder, both losses, teacher, backward pass and
update through the strategy, with all metrics of a run and TensorBoard.

* ``without losses``: what the others are measured in: a hand-written loop over tensors in memory with the same views of
  the same number of samples, the student's and the teacher's forward pass, the backward pass of the sum of the
  student's projections, and the update.
* ``CILA`` and ``CILA, fast path``.

Timed are whole epochs, as in ``throughput``. The losses alone are measured by ``contrastive``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
from avalanche_firn.models.contrastive import ContrastiveClassifier, with_projection_head
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin
from avalanche_firn.strategies.cila import CILA
from speed.measure import Lap, Row, Settings, interleaved, rows_from
from speed.workload import Batched, EpochClock, as_it_is, on, recorded, stream_of, with_targets

__all__ = ["BASELINE", "BOUND", "CASES", "rows"]

BENCHMARK = "contrastive_step"
BASELINE = "without losses"
BOUND = 1.15
STORED = 16  # samples of the first task, all of which the buffer holds


@dataclass(frozen=True)
class Case:
    """A network, its augmentation, and the samples of an epoch: `steps` batches of `batch`."""

    backbone: str
    augmentation: str
    shape: tuple[int, int, int]
    batch: int
    steps: int
    cuda_batch: int = 128
    cuda_steps: int = 15

    def at(self, device: torch.device) -> Case:
        """With the sizes of a device."""
        return self if device.type == "cpu" else replace(self, batch=self.cuda_batch, steps=self.cuda_steps)

    @property
    def name(self) -> str:
        return f"{self.backbone}, {self.shape[-1]} px, batch {self.batch}, {self.steps} steps"


CASES = (
    Case("digit_convnet", "rotated_mnist", (1, 28, 28), 128, 8),
    Case("resnet18_cifar", "seq_cifar10", (3, 32, 32), 32, 2),
)
QUICK = (Case("digit_convnet", "rotated_mnist", (1, 28, 28), 32, 2, 32, 2),)


def random_images(case: Case, count: int, classes: tuple[int, int]) -> TensorDataset:
    """Normalised floats with class ids from `classes[0]` on."""
    generator = torch.Generator().manual_seed(classes[0])
    first, last = classes
    targets = first + torch.arange(count) % (last - first)
    return with_targets(torch.rand(count, *case.shape, generator=generator), targets)


class _Contest:
    """One case on one device."""

    def __init__(self, case: Case, device: torch.device, precision: str) -> None:
        self.case, self.device, self.precision = case, device, precision
        torch.manual_seed(0)
        self.template = with_projection_head(timm.create_model(case.backbone, num_classes=0))
        self.augmentation = ContrastiveAugmentation.preset(case.augmentation).to(device)
        first = random_images(case, STORED, (0, 5))
        second = random_images(case, case.batch * case.steps - STORED, (5, 10))
        last = random_images(case, STORED, (10, 12))  # so that the second task isn't the end of the stream
        self.union = on(
            with_targets(*(torch.cat(pair) for pair in zip(first.tensors, second.tensors, strict=True))), device
        )
        self.plain = stream_of([first, second, last]).train_stream
        self.near = stream_of([on(data, device) for data in (first, second, last)]).train_stream

    def run(self, name: str) -> Lap:
        """Seconds of the second task's epoch."""
        clock = EpochClock(self.device)
        model = copy.deepcopy(self.template).to(self.device).train()
        if name == BASELINE:
            self.by_hand(model, clock)
        else:
            self.by_strategy(name, model, clock)
        return Lap(clock.epochs[-1])

    def by_hand(self, model: ContrastiveClassifier, clock: EpochClock) -> None:
        """The same networks, no loss."""
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        for module in teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train()  # as the strategy has it: statistics of the batch
        optimizer = torch.optim.SGD(model.parameters(), **self._settings())
        clock.start()
        for x, _ in self._batches():
            views = self.augmentation(x.to(self.device, non_blocking=True))
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                projections = model(views)
                with torch.no_grad():
                    teacher.project(views)
                loss = projections.sum()
            loss.backward()
            optimizer.step()
        clock.stop()

    def by_strategy(self, name: str, model: nn.Module, clock: EpochClock) -> None:
        """CILA over its first two tasks."""
        fast = name.endswith("fast path")
        plugins: list[Any] = [MixedPrecisionPlugin("bf16")] if self.precision == "bf16" else []
        with recorded() as log:
            strategy = CILA(
                model=model,
                optimizer=torch.optim.SGD(model.parameters(), **self._settings()),
                classifier=ClassifierStagePlugin(epochs=1, when="final"),
                rates=WarmupCosinePlugin(warmup_epochs=0, final=1.0),
                augmentation=self.augmentation,
                mem_size=STORED,
                train_mb_size=self.case.batch,
                train_epochs=1,
                device=self.device,
                plugins=[*plugins, FastPathPlugin()] if fast else plugins,
                evaluator=log,
            )
            clock.install(strategy)
            for experience in (self.near if fast else self.plain)[:2]:
                strategy.train(experience, eval_streams=[])

    def _settings(self) -> dict[str, Any]:
        fused = True if self.device.type == "cuda" else None
        return {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "fused": fused}

    def _batches(self) -> Any:
        if self.device.type == "cuda":
            order = torch.randperm(len(self.union)).to(self.device)
            return (tuple(tensor[rows] for tensor in self.union.tensors) for rows in order.split(self.case.batch))
        return DataLoader(Batched(self.union), self.case.batch, shuffle=True, collate_fn=as_it_is)


def rows(settings: Settings) -> list[Row]:
    """Figures of all cases."""
    found: list[Row] = []
    precision = "fp32" if settings.precision == "auto" else settings.precision
    names = (BASELINE, "CILA", "CILA, fast path")
    for case in QUICK if settings.quick else CASES:
        case = case.at(settings.device)
        if not settings.wants(case.name):
            continue
        contest = _Contest(case, settings.device, precision)
        timings = interleaved(
            {name: partial(contest.run, name) for name in names}, settings.rounds_or(7), device=settings.device
        )
        found += rows_from(
            timings,
            BENCHMARK,
            case.name,
            settings,
            to_what=BASELINE,
            images=case.batch * case.steps,
            bounds={"CILA, fast path": BOUND},
            precision=precision,
        )
    return found
