"""A training step of every method against what lies behind it: past tasks, and samples of a past task.

A step is the time from one iteration's first hook to the next one's, everything included (fetching, hooks, metrics,
losses, buffer), with the fast path and a small vision transformer; the median over an epoch. A method may cost more per
step with more past tasks (more classes in the classifier, more LoRA pairs), never with more past samples.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins import ZappingPlugin
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin
from avalanche_firn.strategies.cila import CILA, Co2L
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA, SLCAPlusPlus
from speed.growth import SLACK, point_rows
from speed.measure import Row, Settings, Timings, synchronise
from speed.workload import on, recorded, stream_of, with_targets

__all__ = ["METHODS", "steps"]

EDGE, BATCH, STORED = 16, 16, 64
TASKS, SAMPLES = (5, 20, 50, 100), (256, 1024, 4096, 16_384)


def _pair_of_views(images: Tensor) -> Tensor:
    """Two views without any augmentation: what is looked for is growth."""
    return torch.stack([images, images], 1)


def _naive(**shared: Any) -> Any:
    return Naive(
        **shared, optimizer=torch.optim.SGD(shared["model"].parameters(), lr=0.01), criterion=nn.CrossEntropyLoss()
    )


def _zapping(**shared: Any) -> Any:
    plugins = [ZappingPlugin(schedule="epoch", seed=0), *shared.pop("plugins")]
    return _naive(**shared, plugins=plugins)


def _contrastive(kind: Any) -> Callable[..., Any]:
    def build(**shared: Any) -> Any:
        return kind(
            **shared,
            optimizer=torch.optim.SGD(shared["model"].parameters(), lr=0.01),
            classifier=ClassifierStagePlugin(epochs=1, when="final"),
            rates=WarmupCosinePlugin(warmup_epochs=0),
            augmentation=_pair_of_views,
            mem_size=STORED,
        )

    return build


def _lorac(**shared: Any) -> Any:
    # statistics and alignment come after the epochs; the pairs of 100 tasks fit into the width
    return LoRACIPC(**shared, rank=1, alignment=False, task_inference=False)


METHODS: dict[str, Callable[..., Any]] = {
    "Naive": _naive,
    "Naive, zapping": _zapping,
    "LP-FT": LPFT,
    "SLCA": SLCA,
    "SLCA++": SLCAPlusPlus,
    "LoRAC-IPC": _lorac,
    "CILA": _contrastive(CILA),
    "Co2L": _contrastive(Co2L),
}


class _Steps(SupervisedPlugin):
    """Seconds of the iterations of an experience, from one's first hook to the next one's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[int, list[float]] = {}
        self._last: float | None = None

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self._last = None

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        if self._last is not None:
            number = int(strategy.experience.current_experience)
            self.seconds.setdefault(number, []).append(now - self._last)
        self._last = now


def _backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=EDGE, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0)


def _tasks(sizes: Sequence[int], device: torch.device) -> list[TensorDataset]:
    """One class per task, random images."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for class_id, count in enumerate(sizes):
        images = torch.randn(count, 3, EDGE, EDGE, generator=generator)
        found.append(on(with_targets(images, torch.full((count,), class_id)), device))
    return found


def _run(method: str, sizes: Sequence[int], timed: Sequence[int], device: torch.device) -> list[float]:
    """Median seconds of a step in each of the timed experiences."""
    steps, model = _Steps(device), _backbone()
    model = model if method in ("CILA", "Co2L") else with_taskwise_head(model)  # type: ignore[assignment]
    with recorded() as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a coefficient at its floor
        strategy = METHODS[method](
            model=model,
            train_mb_size=BATCH,
            train_epochs=1,
            eval_mb_size=256,
            device=device,
            plugins=[FastPathPlugin()],
            evaluator=log,
        )
        strategy.plugins.insert(0, steps)
        for experience in stream_of(_tasks(sizes, device)).train_stream[: timed[-1] + 1]:
            strategy.train(experience, eval_streams=[])
    return [statistics.median(steps.seconds[number]) for number in timed]


def steps(settings: Settings) -> list[Row]:
    """Curves of every method over past tasks and over past samples."""
    tasks, samples, length = (TASKS, SAMPLES, 24) if not settings.quick else ((1, 3), (32, 64), 4)
    methods = METHODS if not settings.quick else ("SLCA", "CILA")
    # the epochs that are timed have as many samples whatever lies behind; one more task, so that none is the last
    along = [length * BATCH if number in tasks else 4 for number in range(tasks[-1] + 2)]
    found: list[Row] = []
    for method in methods:
        took = [_run(method, along, tasks, settings.device) for _ in range(settings.rounds_or(2))]
        names = {f"{count} past tasks": float(count) for count in tasks}
        found += point_rows(
            Timings(dict(zip(names, map(list, zip(*took, strict=True)), strict=True))),
            f"{method}, a step against past tasks of one class, batch {BATCH}",
            names,
            settings,
            axis="past tasks",
        )
        rounds = [
            [_run(method, [count, length * BATCH, 4], [1], settings.device)[0] for count in samples]
            for _ in range(settings.rounds_or(2))
        ]
        names = {f"{count} past samples": float(count) for count in samples}
        found += point_rows(
            Timings(dict(zip(names, map(list, zip(*rounds, strict=True)), strict=True))),
            f"{method}, a step against past samples, batch {BATCH}",
            names,
            settings,
            axis="past samples",
            bound=SLACK,
        )
    return found
