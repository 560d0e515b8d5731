"""What a configuration points to: backbone, data, device. What can be wrong with it is found here, before a run.

:func:`prepare` loads all of it once and writes nothing; its errors are :class:`ConfigError`, so the command line
answers them like any other wrong configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avalanche_firn.benchmarks.memory import hold_in_memory
from avalanche_firn.benchmarks.streams import Stream
from avalanche_firn.benchmarks.transforms import PRESET_NORMALIZATION
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.experiments.baseline_sections import SCRConfig
from avalanche_firn.experiments.config import Config, LoRACIPCConfig, LoRAOnlyConfig, LPFTConfig, SLCAPlusPlusConfig
from avalanche_firn.experiments.environment import resolve_device, seed_everything
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.methods import METHODS
from avalanche_firn.experiments.progress import bars_wanted
from avalanche_firn.experiments.stream_builders import as_config_error, build_stream
from avalanche_firn.models.backbones import Backbone, load_backbone
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.models.lora import add_composed_lora
from avalanche_firn.plugins.finite_words import refuse_empty
from avalanche_firn.plugins.lone_samples import refuses_one
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.random_state import private_random_state

__all__ = [
    "Prepared",
    "build_backbone",
    "build_probes",
    "build_stream",
    "check_lora",
    "evaluated_stream",
    "hold_stream",
    "prepare",
    "refuse_lone_images",
    "refuse_repeated_classes",
    "refuse_small_memory",
    "stream_normalization",
]


def build_backbone(config: Config) -> Backbone:
    """Load the backbone.

    Raises:
        ConfigError: unknown name, missing or mismatched weights.
    """
    section = config.backbone
    with as_config_error("backbone"):
        return load_backbone(
            section.name,
            pretrained=section.pretrained and section.weights is None,
            weights=section.weights,
            fresh_final_norm=section.fresh_final_norm,
        )


def stream_normalization(config: Config, data_config: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that the images of the stream were normalised with, of images in 0..1."""
    preset = getattr(config.stream, "transforms", "backbone")
    return PRESET_NORMALIZATION.get(preset, (data_config["mean"], data_config["std"]))


def hold_stream(
    config: Config,
    stream: Stream,
    device: torch.device,
    folder: Path,
    *,
    quiet: bool = False,
    cache: dict[str, Any] | None = None,
) -> tuple[Stream, dict[str, str]]:
    """The stream with its images where ``performance.memory`` wants them, and where each part is read from.

    Args:
        folder: of the run; images that are mapped from a file lie beside its comparison's methods, in ``.images``.
        cache: images that runs of the same process share.

    Raises:
        ConfigError: random transforms that can't be computed on the device, or no room for what they need.
    """
    section = config.performance
    if section.memory == "off":
        return stream, {}
    limit = None if section.memory_gb is None else int(section.memory_gb * 2**30)
    with as_config_error("performance"):
        held, report = hold_in_memory(
            stream,
            # Avalanche's own loaders have workers, which can't read what lies on the device
            device=device if section.memory in ("auto", "device") and section.fast_path else "cpu",
            limit_bytes=0 if section.memory == "mapped" else limit,
            folder=folder.parent.parent / ".images" if section.memory == "mapped" else None,
            augmentation="device" if section.device_augmentation else "exact",
            stored_edge=section.stored_edge,
            quiet=not bars_wanted(config.progress, quiet),
            cache=cache,
        )
    return held, report.parts


def evaluated_stream(config: Config, stream: Stream) -> Any:
    """The Avalanche stream that the run is evaluated on: test or validation.

    Raises:
        ConfigError: validation was asked for and the stream has none.
    """
    if config.evaluation.split == "test":
        return stream.test
    if stream.valid is None:
        raise ConfigError(Problem("evaluation.split", f"the stream {stream.name} has no validation part", "test"))
    return stream.valid


def build_probes(config: Config, stream: Stream, evaluated: Any, cache: FeatureCache) -> list[RepresentationProbe]:
    """The probes of a run, on the continual stream's tasks (also for joint training).

    Raises:
        ConfigError: more shots than a class has images, streams that do not fit together.
    """
    sections = config.evaluation.probes
    probes: list[RepresentationProbe] = []
    for i, section in enumerate(sections):
        others = {adaptation for j, other in enumerate(sections) if j != i for adaptation in other.adapt}
        with as_config_error(f"evaluation.probes[{i}]"):
            probe = RepresentationProbe(
                stream.train,
                evaluated,
                **section.model_dump(),
                eval_batch_size=config.training.eval_batch_size,
                num_workers=config.training.num_workers,
                cache=cache,
                detailed_tags=bool(others & set(section.adapt)),  # the same adaptation with other settings
            )
        same = sorted({probe.tag(name) for name in probe.adapt} & {o.tag(name) for o in probes for name in o.adapt})
        if same:
            reason = f"{same} is measured twice, with settings that its tag does not tell apart"
            accepted = "other shots, k, temperature, l2, lr or epochs"
            raise ConfigError(Problem(f"evaluation.probes[{i}]", reason, accepted))
        probes.append(probe)
    return probes


def refuse_repeated_classes(config: Config, name: str) -> None:
    """Refuses the methods that can't work on a stream (called `name`) whose classes come again.

    Raises:
        ConfigError: there is one in the recipe.
    """
    for i, method in enumerate(config.methods):
        if method.strategy in ("linear_probe", "slow_learner", "slca", "slca_plus_plus", "lorac_ipc"):
            reason = f"{method.strategy} needs each class in one experience, and {name} repeats classes"
            accepted = "naive, lp_ft, replay, ewc, lwf, der or joint on this stream"
            raise ConfigError(Problem(f"methods[{i}].strategy", reason, accepted))


def refuse_small_memory(config: Config, classes: int) -> None:
    """Refuses SCR with fewer stored images than the stream has classes: a class without any has no mean.

    Raises:
        ConfigError: there is one in the recipe.
    """
    for i, method in enumerate(config.methods):
        if isinstance(method, SCRConfig) and method.rehearsal.mem_size < classes:
            reason = f"{method.rehearsal.mem_size} with {classes} classes, of which scr keeps at least an image each"
            raise ConfigError(Problem(f"methods[{i}].rehearsal.mem_size", reason, f"at least {classes}"))


def refuse_lone_images(config: Config, backbone: Backbone, stream: Stream) -> None:
    """Refuses batch sizes that leave a single image to a BatchNorm that sees one value per channel.

    torch would refuse that batch when it comes, which may be in the last task.

    Raises:
        ConfigError: there is one in the recipe; methods that train on two views or on stored images are looked at only
            as long as their batches are plain ones.
    """
    sizes = [len(experience.dataset) for experience in stream.train]
    for i, method in enumerate(config.methods):
        if method.strategy in ("co2l", "cila", "scr", "lorac_ipc"):  # two views; BatchNorm that stands still
            continue
        counts = [sum(sizes)] if METHODS[method.strategy].joint else sizes[: _plain_tasks(method)]
        steps = config.performance.accumulate
        size = config.training_of(method).batch_size // steps
        lone = [task for task, count in enumerate(counts) if count % size == min(size - 1, 1)]
        if not lone:
            continue
        with private_random_state():
            image = stream.train[0].dataset[0][0]
        norm = refuses_one(backbone.module, image[None]) if isinstance(image, torch.Tensor) else None
        if norm is None:
            return
        fine = [n for n in range(2, 2 * size + 3) if all(count % n != 1 for count in counts)]
        nearest = sorted(sorted(fine, key=lambda n: abs(n - size))[:3])
        reason = (
            f"{size * steps} leaves task {lone[0]} ({counts[lone[0]]} images) a last batch of one image, which "
            f"BatchNorm {norm} of {backbone.tag} can't be trained on"
        )
        own = method.training.batch_size is not None
        path = f"methods[{i}].training.batch_size" if own else "training.batch_size"
        raise ConfigError(Problem(path, reason, f"for example {', '.join(str(n * steps) for n in nearest)}"))


def _plain_tasks(method: Any) -> int | None:
    """Tasks, from the first on, that a method trains on plain batches with BatchNorm in training mode; None: all."""
    if method.strategy in ("replay", "avalanche_replay", "der"):
        return 1
    if isinstance(method, LPFTConfig):
        probe = method.linear_probe
        if probe.ft_bn == "eval" or (probe.ft_bn == "auto" and probe.lp_features != "train"):
            return 0 if probe.lp_first else 1
    return None


def check_lora(config: Config, backbone: Backbone) -> None:
    """Tries the low-rank layers of all methods on a copy of the backbone.

    Raises:
        ConfigError: layers that aren't there, a rank that is too large.
    """
    for i, method in enumerate(config.methods):
        targets: list[str] | None
        if isinstance(method, SLCAPlusPlusConfig):
            path, targets, rank = "lora_targets", method.lora_targets, method.lora_rank
        elif isinstance(method, (LoRAOnlyConfig, LoRACIPCConfig)):
            path, targets, rank = "lora", method.lora.targets, method.lora.rank
        else:
            continue
        whole: dict[str, list[str]] | None = {} if path == "lora_targets" else None  # SLCA++ leaves a fused qkv whole
        with as_config_error(f"methods[{i}].{path}"):
            add_composed_lora(copy.deepcopy(backbone.module), targets, rank, split=whole)


@dataclass(frozen=True)
class Prepared:
    """The result of :func:`prepare`."""

    config: Config
    device: torch.device
    backbone: Backbone
    stream: Stream

    def __str__(self) -> str:
        config, stream = self.config, self.stream
        parts = {"train": stream.train, "valid": stream.valid, "test": stream.test}
        sizes = ", ".join(f"{sum(len(e.dataset) for e in s)} {name}" for name, s in parts.items() if s is not None)
        runs = len(config.methods) * len(config.seeds)
        return "\n".join(
            [
                f"recipe    {config.name}: {len(config.methods)} methods x {len(config.seeds)} seeds = {runs} runs",
                f"methods   {', '.join(method.name for method in config.methods)}",
                f"backbone  {self.backbone.tag} ({self.backbone.weights}), features {self.backbone.num_features}",
                f"stream    {stream.name}: {stream.num_classes} classes in tasks of "
                f"{', '.join(map(str, stream.task_sizes))}; images: {sizes}",
                f"device    {self.device}, {config.precision}",
            ]
        )


def prepare(config: Config) -> Prepared:
    """Load everything that `config` points to, once, and check that it fits together. Writes nothing.

    Raises:
        ConfigError: see the builders above.
    """
    device = resolve_device(config.device)
    if config.precision == "fp16" and MixedPrecisionPlugin("fp16").resolve(device) == "fp16" and device.type == "cpu":
        raise ConfigError(
            Problem("precision", "fp16 needs a CUDA device and the run is on the CPU", "fp32, bf16, auto")
        )
    seed_everything(config.seeds[0])
    backbone = build_backbone(config)
    check_lora(config, backbone)
    stream = build_stream(config, backbone.data_config, config.seeds[0])
    build_probes(config, stream, evaluated_stream(config, stream), FeatureCache())
    refuse_small_memory(config, stream.num_classes)
    refuse_lone_images(config, backbone, stream)
    with as_config_error("stream"):
        for experience in stream.train:
            refuse_empty(experience)
    if sum(stream.task_sizes) != stream.num_classes:
        refuse_repeated_classes(config, stream.name)
    assert set(METHODS) >= {method.strategy for method in config.methods}
    return Prepared(config, device, backbone, stream)
