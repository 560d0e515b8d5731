"""Two training steps of every method on random images of the true shape, then an evaluation; nothing is written.

Finds in seconds what a long run would find late: a batch that doesn't fit into memory, a head or a precision that a
method can't work with. Images are random, so the figures mean nothing and aren't shown. Neither the data nor a weights
file needs to be on this machine, if the recipe alone says how many classes the tasks have (`task_plan`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.domains import build_domain_stream
from avalanche_firn.benchmarks.streams import Stream, build_stream
from avalanche_firn.benchmarks.transforms import TRANSFORM_PRESETS, preset_transforms
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.environment import resolve_device, seed_everything
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.methods import METHODS, Ingredients, build_strategy
from avalanche_firn.experiments.resources import (
    build_backbone,
    check_lora,
    refuse_repeated_classes,
    refuse_small_memory,
    stream_normalization,
)
from avalanche_firn.experiments.resources import build_stream as build_real_stream
from avalanche_firn.experiments.task_plan import TaskPlan, plan_tasks
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.plugins.run_errors import RunError

__all__ = ["dry_run", "outline"]

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


def outline(config: Config) -> str:
    """What `firn check --no-data` prints: the recipe, its backbone with random weights, the tasks it plans.

    Raises:
        ConfigError: an unknown backbone, tasks that can't be known without the data, a method that can't work on them.
    """
    device = resolve_device(config.device)
    plan = _checked_plan(config)
    backbone = build_backbone(_random_weights(config))
    runs = len(config.methods) * len(config.seeds)
    sizes = ", ".join(map(str, plan.sizes))
    return "\n".join(
        [
            f"recipe    {config.name}: {len(config.methods)} methods x {len(config.seeds)} seeds = {runs} runs",
            f"methods   {', '.join(method.name for method in config.methods)}",
            f"backbone  {backbone.tag} (weights not read), features {backbone.num_features}",
            f"stream    {plan.name}: {plan.num_classes} classes in tasks of {sizes}; images not read",
            f"device    {device}, {config.precision}",
        ]
    )


def _random_weights(config: Config) -> Config:
    """The same recipe with the backbone as it is initialised."""
    backbone = config.backbone.model_copy(update={"pretrained": False, "weights": None})
    return config.model_copy(update={"backbone": backbone})


def _checked_plan(config: Config) -> TaskPlan:
    plan = plan_tasks(config.stream)
    refuse_small_memory(config, plan.num_classes)
    if plan.repeats and len(plan.sizes) > 1:
        refuse_repeated_classes(config, plan.name)
    return plan


def dry_run(config: Config, *, data: bool = True) -> Iterator[str]:
    """Train and evaluate every method for two steps in each of two tasks; yields one line per method.

    Without `data` neither the data nor pre-trained weights are read: the tasks follow from the recipe alone.

    Raises:
        ConfigError: see :func:`avalanche_firn.experiments.resources.prepare`; without `data` :func:`outline`; a method
            that ends in the two steps for a reason that a run would have ended for, such as a rate that is too large.
        Exception: whatever a method raises.
    """
    device = resolve_device(config.device)
    if not data:
        config = _random_weights(config)
    backbone = build_backbone(config)
    check_lora(config, backbone)
    plan = _plan_of(build_real_stream(config, backbone.data_config, config.seeds[0])) if data else _checked_plan(config)
    for method in config.methods:
        seed_everything(config.seeds[0])
        single = config.single(method.name, config.seeds[0])
        training = single.training_of(method).model_dump() | {"epochs": 1, "schedule": {}, "num_workers": 0}
        single = type(config).model_validate(
            single.model_dump() | {"training": training, "methods": [_brief(method, config.performance.accumulate)]}
        )
        stream = _random_stream(plan, _shape(config, backbone), single.training.batch_size)
        if METHODS[method.strategy].joint:
            stream = stream.joint()
        evaluator = EvaluationPlugin(loggers=[BaseLogger()])  # one that logs nothing
        backbone = build_backbone(config)
        normalization = stream_normalization(config, backbone.data_config)
        parts = Ingredients(single, backbone, device, [], evaluator, normalization=normalization)
        strategy = build_strategy(parts)
        start = time.perf_counter()
        try:
            for experience in stream.train:
                strategy.train(experience, eval_streams=[], num_workers=0)
            steps = int(strategy.clock.train_iterations)
            strategy.eval(stream.test, num_workers=0)
        except RunError as error:
            raise ConfigError(Problem(f"methods.{method.name}", f"on random images: {error}")) from error
        seconds = time.perf_counter() - start
        yield f"{method.name}: {steps} training steps and an evaluation in {seconds:.1f} s{_memory(device)}"


def _brief(method: Any, accumulate: int) -> dict[str, Any]:
    """The method as a dry run trains it, as plain values."""
    values: dict[str, Any] = method.brief().model_dump()
    if accumulate > 1 and values["zapping"] is not None:  # a zap per iteration is refused then
        values["zapping"] = None if method.strategy == "lp_ft" else values["zapping"] | {"schedule": "experience"}
    return values


def _shape(config: Config, backbone: Backbone) -> tuple[int, ...]:
    """Shape of a transformed image: the preset's own size, or the backbone's."""
    name = getattr(config.stream, "transforms", "backbone")
    if name in TRANSFORM_PRESETS:
        return tuple(preset_transforms(name).eval(Image.new("RGB", (256, 256))).shape)
    return tuple(backbone.data_config["input_size"])


def _plan_of(stream: Stream) -> TaskPlan:
    return TaskPlan(stream.name, stream.task_sizes, repeats=sum(stream.task_sizes) != stream.num_classes)


def _random_stream(plan: TaskPlan, shape: Any, batch_size: int) -> Stream:
    """Two tasks (one if the plan has one) with its class counts and two batches each; classes come again as there."""
    sizes = [min(size, batch_size * _STEPS) for size in plan.sizes[:2]]
    classes = max(sizes) if plan.repeats else sum(sizes)
    # equal numbers per class; at least two full batches in the smaller task
    per_class = max(1, -(-batch_size * _STEPS // min(sizes)))
    names = [str(c) for c in range(classes)]
    if plan.repeats:
        return build_domain_stream(
            "random",
            train=[_RandomImages(tuple(shape), size, size * per_class) for size in sizes],
            test=[_RandomImages(tuple(shape), size, size) for size in sizes],
            class_names=names,
            fingerprint="",
        )
    return build_stream(
        "random",
        train=_RandomImages(tuple(shape), classes, classes * per_class),
        test=_RandomImages(tuple(shape), classes, classes),
        class_order=list(range(classes)),
        task_sizes=sizes,
        class_names=names,
        fingerprint="",
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", peak memory {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
