"""Training throughput: our strategies, with and without the fast path, against a hand-written PyTorch loop.

All contestants train the same network on the same samples in the same order, with the same optimizer (SGD, fused on a
GPU) and rates, at the same precision; images lie in memory as uint8 and are normalised on the device by all of them.

* ``batched loop``: as a careful person writes it, and what the others are measured in: a data set with
  ``__getitems__`` under a ``DataLoader`` with a collate function that passes tensors through; on a GPU the images lie
  there, and a batch is one gather.
* ``TensorDataset loop``: the same with a plain ``DataLoader(TensorDataset(...))``, for reference.
* ``Naive``, ``SLCA`` (its first stage): Avalanche's loop with all our metrics of a run and TensorBoard switched on;
  ``..., fast path``: the same with ``FastPathPlugin()``. On a GPU the fast path takes images that lie there.

Timed are whole epochs, from the first plugin's first hook to the last one's last, TensorBoard included; not what comes
before and after them (set-up, class statistics, alignment). ``weights_deviation``: largest difference of a trained
weight from that of the batched loop.

    python -m speed throughput                                     # or: python speed/throughput.py
    python -m speed throughput --device cuda --case vit_base       # two minutes on one GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # python speed/throughput.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.strategies.slca import SLCA
from speed.measure import Lap, Row, Settings, in_fresh_process, interleaved, rows_from
from speed.workload import (
    Batched,
    EpochClock,
    Laps,
    as_it_is,
    copy_of,
    deviation,
    experience_of,
    held,
    network,
    on,
    recorded,
)

__all__ = ["BASELINE", "CASES", "CONTESTANTS", "Case", "epoch_memory", "rows"]

BENCHMARK = "throughput"
BASELINE = "batched loop"
CONTESTANTS = (BASELINE, "TensorDataset loop", "Naive", "Naive, fast path", "SLCA", "SLCA, fast path")
LR, BACKBONE_SCALE, MOMENTUM, DECAY = 0.01, 0.01, 0.9, 5e-4  # exps/slca_*.json


@dataclass(frozen=True)
class Case:
    """A network and its data.

    :param images: of an epoch on a CPU; :param cuda_images: on a GPU. :param bound: of the fast path, in the time of
        the batched loop. :param where: "cpu", "cuda", or both. :param few: leave out two contestants without a bound,
        where an epoch takes seconds.
    """

    backbone: str
    edge: int
    batch: int
    images: int
    bound: float
    rounds: int = 5
    cuda_batch: int = 128
    cuda_images: int = 12_800
    precision: str = "fp32"
    where: tuple[str, ...] = ("cpu", "cuda")
    few: bool = False

    def at(self, device: torch.device) -> Case:
        """With the sizes of a device."""
        if device.type == "cpu" or self.backbone == "mlp":
            return self
        return replace(self, batch=self.cuda_batch, images=self.cuda_images)

    @property
    def name(self) -> str:
        shape = "64 features" if self.backbone == "mlp" else f"{self.edge} px"
        return f"{self.backbone}, {shape}, batch {self.batch}, {self.images} samples"


CASES = (
    Case("vit_firn_32", 32, 128, 1024, bound=1.03, cuda_images=6400),
    Case("vit_small_patch16_224", 224, 16, 32, bound=1.03, cuda_images=1280, few=True),
    Case("mlp", 0, 64, 12_800, bound=1.3, rounds=11),
    # at least 95 % of the loop's images per second
    Case(
        "vit_base_patch16_224", 224, 128, 1920, 1 / 0.95, cuda_images=1920, precision="bf16", where=("cuda",), few=True
    ),
)
QUICK = (
    Case("vit_firn_32", 32, 8, 16, bound=1.03, cuda_batch=8, cuda_images=16),
    Case("mlp", 0, 64, 1280, bound=1.3),
    Case("vit_base_patch16_224", 224, 8, 16, 1 / 0.95, 5, 8, 16, precision="bf16", where=("cuda",), few=True),
)


class _StageOne(ClassifierAlignmentPlugin):
    """SLCA's second stage, switched off: its statistics are no part of training."""

    def _after_task(self, strategy: Any) -> None:
        return None


def train_by_hand(
    model: FeatureClassifier, data: TensorDataset, case: Case, epochs: int, clock: EpochClock, *, batched: bool
) -> None:
    """The loop that a person would write: two rates, shuffled batches, nothing else."""
    device, cuda = clock.device, clock.device.type == "cuda"
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters()), "lr": LR * BACKBONE_SCALE},
        {"params": list(model.head.parameters())},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=cuda or None)
    lap: Callable[[str], None] = (lambda part: None) if clock.laps is None else clock.laps.lap
    for _ in range(epochs):
        clock.start()
        for x, y in _batches(data, case.batch, batched=batched, cuda=cuda):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            lap("fetch a batch")
            optimizer.zero_grad()
            lap("hooks, zero_grad")
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
                output = model(x)
                lap("forward")
                loss = F.cross_entropy(output, y)
            lap("loss")
            loss.backward()
            lap("backward")
            optimizer.step()
            lap("optimizer")
        clock.stop()


def _batches(data: TensorDataset, size: int, *, batched: bool, cuda: bool) -> Any:
    """Shuffled batches of an epoch, in the order of torch's DataLoader whatever makes them."""
    if not batched:
        return DataLoader(data, size, shuffle=True, pin_memory=cuda)
    images, targets = data.tensors
    if not images.is_cuda:
        return DataLoader(Batched(data), size, shuffle=True, collate_fn=as_it_is, pin_memory=cuda)
    torch.empty((), dtype=torch.int64).random_()  # the loader's own draw before that of its sampler
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    return ((images[rows], targets[rows]) for rows in order.split(size))


def strategy_for(name: str, model: FeatureClassifier, case: Case, epochs: int, device: torch.device, log: Any) -> Any:
    """Naive or SLCA over a model that has its classifier already."""
    cuda = device.type == "cuda"
    plugins: list[Any] = [] if case.precision == "fp32" else [MixedPrecisionPlugin(case.precision)]  # type: ignore[arg-type]
    if name.endswith("fast path"):
        plugins.append(FastPathPlugin())
    shared: dict[str, Any] = dict(
        model=model,
        train_mb_size=case.batch,
        train_epochs=epochs,
        eval_mb_size=256,
        device=device,
        plugins=plugins,
        evaluator=log,
    )
    settings: dict[str, Any] = dict(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=cuda or None)
    if name.startswith("SLCA"):
        optimizer = torch.optim.SGD(model.parameters(), **settings)
        return SLCA(
            **shared,
            optimizer=optimizer,
            backbone_scale=BACKBONE_SCALE,
            alignment=_StageOne(epochs=0),
            fresh_final_norm=False,
        )
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters()), "lr": LR * BACKBONE_SCALE},
        {"params": list(model.head.parameters())},
    ]
    return Naive(**shared, optimizer=torch.optim.SGD(groups, **settings), criterion=nn.CrossEntropyLoss())


class Contest:
    """One case on one device: its data and first weights, and how each contestant trains on them.

    On a GPU a run is two epochs, the last of which is timed: the first one fills the allocator and starts the clocks.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.epochs = 2 if device.type == "cuda" else 1
        self.template = network(case.backbone, case.edge)
        self.data = held(case.backbone, case.edge, case.images)
        self.near = on(self.data, device)
        self.experiences = {near: experience_of(self.near if near else self.data) for near in (False, True)}
        self.peaks: dict[str, float | None] = {}

    def contestants(self) -> tuple[str, ...]:
        """Those of this case."""
        left_out = ("TensorDataset loop", "Naive") if self.case.few else ()
        return tuple(name for name in CONTESTANTS if name not in left_out)

    def train(self, name: str, clock: EpochClock) -> FeatureClassifier:
        """Train a copy of the model."""
        model = copy_of(self.template, self.device)
        near = name.endswith("fast path")
        if name.endswith("loop"):
            batched = name == BASELINE
            data = self.near if batched else self.data
            train_by_hand(model, data, self.case, self.epochs, clock, batched=batched)
            return model
        with recorded() as log:
            strategy = strategy_for(name, model, self.case, self.epochs, self.device, log)
            clock.install(strategy)
            strategy.train(self.experiences[near], eval_streams=[])
        return model

    def run(self, name: str) -> Lap:
        """Seconds of the last epoch."""
        clock = EpochClock(self.device)
        self.train(name, clock)
        self.peaks[name] = clock.peak
        return Lap(clock.epochs[-1])

    def details(self) -> dict[str, dict[str, Any]]:
        """What another run per contestant shows: parts of an iteration, trained weights, use of the GPU."""
        iterations = -(-self.case.images // self.case.batch) * self.epochs
        found: dict[str, dict[str, Any]] = {}
        reference: FeatureClassifier | None = None
        for name in self.contestants():
            laps = Laps(self.device)
            model = self.train(name, EpochClock(self.device, laps=laps))
            reference = model if reference is None else reference
            found[name] = {
                "microseconds_per_iteration": laps.microseconds(iterations),
                "weights_deviation": deviation(model, reference),
            }
            if self.device.type == "cuda" and name in (BASELINE, "SLCA, fast path"):
                clock = EpochClock(self.device, busy=True)
                self.train(name, clock)
                found[name]["utilisation_percent"] = clock.busy
        return found


def epoch_memory(case: int, contestant: str, precision: str) -> float | None:
    """Peak memory of a contestant's epoch, MiB, in a fresh process on the CPU."""
    chosen = CASES[case]
    clock = EpochClock(torch.device("cpu"), memory=True)
    Contest(replace(chosen, precision=precision), clock.device).train(contestant, clock)
    return clock.peak


def rows(settings: Settings) -> list[Row]:
    """Figures of all cases that the device is meant for."""
    found: list[Row] = []
    device = settings.device
    for number, case in enumerate(QUICK if settings.quick else CASES):
        case = case.at(device)
        if device.type not in case.where or not settings.wants(case.name):
            continue
        if settings.precision != "auto":
            case = replace(case, precision=settings.precision)
        contest = Contest(case, device)
        runs = {name: partial(contest.run, name) for name in contest.contestants()}
        timings = interleaved(runs, settings.rounds_or(case.rounds), warmup=0 if settings.quick else 1, device=device)
        memory = dict(contest.peaks)
        if device.type == "cpu" and not settings.quick and case.backbone != "mlp":
            chosen = (BASELINE, "SLCA, fast path")
            memory = {
                name: in_fresh_process(
                    "speed.throughput:epoch_memory", case=number, contestant=name, precision=case.precision
                )
                for name in chosen
            }
        found += rows_from(
            timings,
            BENCHMARK,
            case.name,
            settings,
            to_what=BASELINE,
            images=case.images,
            bounds={name: case.bound for name in runs if name.endswith("fast path")},
            memory=memory,
            details=contest.details(),
            precision=case.precision,
        )
    return found


if __name__ == "__main__":
    from speed.__main__ import main

    sys.exit(main(["throughput", *sys.argv[1:]]))
