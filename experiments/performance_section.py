"""The section ``performance`` of a configuration: how fast a run is, and which of that is part of what it is.

Most of it changes no figure and is no part of a run's identity, so a run may be resumed with other values. What may
change figures (:data:`FIGURES`) belongs to the identity where it differs from its default: configurations without the
section are the experiments that they always were. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.section_base import Section

__all__ = ["FIGURES", "PerformanceConfig", "changed_figures", "performance_problems"]

_DIVISORS = 4096  # up to here they are named
FIGURES = ("device_augmentation", "stored_edge", "compile", "fused_optimizer", "accumulate")
"""Fields that may change figures: other random numbers, other pixels, other rounding."""


class PerformanceConfig(Section):
    """What makes a run fast; every piece can be switched off."""

    fast_path: bool = Field(
        default=True,
        description="cached hooks and batched loading, false = Avalanche's loops; changes no figure, but for the "
        "random numbers of augmentations in loader processes",
    )
    memory: Literal["auto", "off", "cpu", "device", "mapped"] = Field(
        default="auto",
        description="images held decoded on the device, in main memory (cpu) or in a mapped file, auto = the first "
        "that has room, off = read anew each time; changes no figure",
    )
    memory_gb: float | None = Field(
        default=None, gt=0, description="most that held images may take, in 2^30 bytes; null = half of what is free"
    )
    device_augmentation: bool = Field(
        default=False, description="draw random crops and colours in batches on the device: other random numbers"
    )
    stored_edge: int | None = Field(
        default=None,
        ge=1,
        description="with device_augmentation, images of many sizes: pixels of the square that they are held as; "
        "null = as they come",
    )
    one_pass_evaluation: bool = Field(
        default=True, description="one loader over all evaluated tasks; changes no figure but by rounding"
    )
    compile: bool = Field(default=False, description="torch.compile of the backbone; other rounding")
    fused_optimizer: Literal["auto", "on", "off"] = Field(
        default="auto", description="one kernel per step, auto = on CUDA; other rounding"
    )
    accumulate: int = Field(
        default=1, ge=1, description="mini-batches that training.batch_size is cut into, for small memories; 1 = none"
    )
    persistent_workers: bool = Field(
        default=True, description="loader processes live through the epochs of a task; changes no figure"
    )
    prefetch_factor: int = Field(
        default=4, ge=1, description="batches that each loader process prepares ahead, torch: 2; our choice"
    )
    finite_guard: bool = Field(
        default=True,
        description="stop at the first loss, gradient, weight or output that isn't finite, false = only where figures "
        "are read, perhaps after checkpoints that hold it; changes no figure",
    )
    worker_timeout: float = Field(
        default=300.0,
        ge=0,
        description="seconds that a batch of loader processes is waited for before they count as hanging, 0 = for "
        "ever; changes no figure, our choice",
    )

    @field_validator("memory", "fused_optimizer", mode="before")
    @classmethod
    def _words(cls, value: Any, info: ValidationInfo) -> Any:
        """In YAML a bare ``off`` is false and a bare ``on`` true."""
        if value is False:
            return "off"
        return "on" if value is True and info.field_name == "fused_optimizer" else value

    @model_validator(mode="after")
    def _consistent(self) -> PerformanceConfig:
        problems = []
        if self.memory == "off":
            if self.memory_gb is not None:
                problems.append(("memory_gb", f"{self.memory_gb} is set, but memory is off", "null, or memory: auto"))
            if self.device_augmentation:
                reason = "true with memory off, and it takes its images from memory"
                problems.append(("device_augmentation", reason, "false, or memory: auto"))
        if self.stored_edge is not None and not self.device_augmentation:
            reason = f"{self.stored_edge} is set without device_augmentation, which alone stores images of that size"
            problems.append(("stored_edge", reason, "null, or device_augmentation: true"))
        reject(problems)
        return self


def changed_figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the section that may change figures and aren't at their default.

    Args:
        values: of the section, as plain values; missing fields have their default.
    """
    defaults = {name: PerformanceConfig.model_fields[name].default for name in FIGURES}
    return {name: values[name] for name in FIGURES if name in values and values[name] != defaults[name]}


def performance_problems(
    performance: PerformanceConfig, methods: Sequence[Any], batch_sizes: Sequence[int | None]
) -> list[tuple[str, str, str]]:
    """Where the section does not fit the methods: path, reason and what is accepted, as `reject` takes them.

    Args:
        performance: the section.
        methods: sections of the methods.
        batch_sizes: images per step of each method; None where it isn't known.
    """
    problems = []
    adapted = [m.name for m in methods if m.strategy in ("lora", "lorac_ipc", "slca_plus_plus")]
    if performance.compile and adapted:
        reason = f"true with {', '.join(adapted)}, whose layers merge and keep weights between calls"
        problems.append(("performance.compile", reason, "false, or other methods"))
    steps = performance.accumulate
    if steps == 1:
        return problems
    sizes = {m.name: size for m, size in zip(methods, batch_sizes, strict=True) if size is not None}
    uneven = [f"{size} ({name})" for name, size in sizes.items() if size % steps]
    if uneven:
        common = math.gcd(*sizes.values())
        divisors = [str(n) for n in range(1, min(common, _DIVISORS) + 1) if common % n == 0]
        reason = f"{steps} doesn't divide the batch size {', '.join(uneven)}"
        accepted = f"a divisor of all batch sizes: {', '.join(divisors)}"
        problems.append(("performance.accumulate", reason, accepted))
    for i, method in enumerate(methods):
        problems += _parts_problems(f"methods[{i}]", method, steps)
    return problems


def _parts_problems(path: str, method: Any, steps: int) -> list[tuple[str, str, str]]:
    """Why a method can't work on parts of a batch."""
    whole = {
        "co2l": "compares the images of a batch with each other",
        "cila": "compares the images of a batch with each other",
        "scr": "compares the images of a batch with each other",
        "der": "adds means over different parts of a batch",
    }
    problems = []
    if method.strategy in whole:
        reason = f"{steps} with {method.name}: {method.strategy} {whole[method.strategy]}"
        problems.append(("performance.accumulate", reason, "1, or other methods"))
    if method.strategy == "lorac_ipc" and method.importance.threshold > 0:
        reason = f"{method.importance.threshold} with performance.accumulate {steps}: importance needs whole batches"
        problems.append((f"{path}.importance.threshold", reason, "0, or performance.accumulate: 1"))
    if method.strategy == "avalanche_replay" and method.rehearsal.batch_size_mem is not None:
        reason = (
            f"{method.rehearsal.batch_size_mem} with performance.accumulate {steps}, which would draw them each time"
        )
        accepted = "null (as many as current images), or performance.accumulate: 1"
        problems.append((f"{path}.rehearsal.batch_size_mem", reason, accepted))
    if method.zapping is not None and method.zapping.schedule not in ("experience", "epoch"):
        reason = f"{method.zapping.schedule} with performance.accumulate {steps}, which cuts batches into parts"
        problems.append((f"{path}.zapping.schedule", reason, "experience or epoch, or performance.accumulate: 1"))
    return problems
