"""Two training steps of every method on random images of the true shape, then an evaluation; nothing is written.

Finds in seconds what a long run would find late: a batch that doesn't fit into memory, a head or a precision that a
method can't work with. Images are random, so the figures mean nothing and aren't shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.streams import Stream, build_stream
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.environment import resolve_device, seed_everything
from avalanche_firn.experiments.methods import METHODS, Ingredients, build_strategy
from avalanche_firn.experiments.resources import build_backbone
from avalanche_firn.experiments.resources import build_stream as build_real_stream

__all__ = ["dry_run"]

_STEPS = 2


class _RandomImages(Dataset[tuple[torch.Tensor, int]]):
    """`size` random images (C, H, W) float32, made on access from their index; the classes take turns."""

    def __init__(self, shape: tuple[int, int, int], classes: int, size: int) -> None:
        self.shape = shape
        self.targets = [i % classes for i in range(size)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.randn(self.shape, generator=torch.Generator().manual_seed(index))
        return image, self.targets[index]


def dry_run(config: Config) -> Iterator[str]:
    """Train and evaluate every method for two steps in each of two tasks; yields one line per method.

    Raises:
        ConfigError: see :func:`avalanche_firn.experiments.resources.prepare`.
        Exception: whatever a method raises.
    """
    device = resolve_device(config.device)
    backbone = build_backbone(config)
    real = build_real_stream(config, backbone.data_config, config.seeds[0])
    for method in config.methods:
        seed_everything(config.seeds[0])
        single = config.single(method.name, config.seeds[0])
        short = method.training.model_copy(update={"epochs": 1, "schedule": None})
        training = single.training_of(method).model_dump() | {"epochs": 1, "schedule": {}}
        single = type(config).model_validate(
            single.model_dump()
            | {"training": training, "methods": [method.model_dump() | {"training": short.model_dump()}]}
        )
        stream = _random_stream(real, backbone.data_config["input_size"], single.training.batch_size)
        if METHODS[method.strategy].joint:
            stream = stream.joint()
        evaluator = EvaluationPlugin(loggers=[BaseLogger()])  # one that logs nothing
        parts = Ingredients(single, build_backbone(config), device, [], evaluator)
        strategy = build_strategy(parts)
        start = time.perf_counter()
        for experience in stream.train:
            strategy.train(experience, eval_streams=[], num_workers=0)
        steps = int(strategy.clock.train_iterations)
        strategy.eval(stream.test, num_workers=0)
        seconds = time.perf_counter() - start
        yield f"{method.name}: {steps} training steps and an evaluation in {seconds:.1f} s{_memory(device)}"


def _random_stream(real: Stream, shape: Any, batch_size: int) -> Stream:
    """Two tasks (one if the stream has one) with the class counts of the real ones and two batches each."""
    sizes = [min(size, batch_size * _STEPS) for size in real.task_sizes[:2]]
    classes = sum(sizes)
    # equal numbers per class; at least two full batches in the smaller task
    per_class = max(1, -(-batch_size * _STEPS // min(sizes)))
    return build_stream(
        "random",
        train=_RandomImages(tuple(shape), classes, classes * per_class),
        test=_RandomImages(tuple(shape), classes, classes),
        class_order=list(range(classes)),
        task_sizes=sizes,
        class_names=[str(c) for c in range(classes)],
        fingerprint="",
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", peak memory {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
