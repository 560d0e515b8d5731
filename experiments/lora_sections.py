"""The sections of a configuration about LoRA layers and LoRAC-IPC. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from avalanche_firn.experiments.section_base import Section

__all__ = ["ImportanceConfig", "LoRAConfig", "TapConfig", "TaskInferenceConfig"]

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class LoRAConfig(Section):
    """Low-rank layers in the backbone; add_composed_lora explains every option."""

    targets: list[str] | None = Field(
        default=None, description="layers by the end of their names, null = attn.qkv, attn.proj, mlp.fc1, mlp.fc2"
    )
    rank: int = Field(default=16, ge=1, description="of a pair; the LoRAC-IPC code, CIFAR-100")
    alpha: Positive = Field(default=1.0, description="pairs count alpha / rank; the LoRAC-IPC code")
    init: Literal["kaiming", "qr"] = Field(default="kaiming", description="of A; the LoRAC-IPC code; qr is our option")


class ImportanceConfig(Section):
    """Which matrices are frozen after a task."""

    threshold: float = Field(
        default=0.05, ge=0, le=1, description="fraction of all matrices, 0 = LoRAC; the LoRAC-IPC code"
    )
    window: int | None = Field(
        default=150, ge=1, description="last steps in which importance is tracked, null = all (the code); our choice"
    )
    of_remaining: bool = Field(default=False, description="fraction of the free matrices with a score above 0")
    ties: Literal["order", "all"] = Field(default="order", description="all = the LoRAC-IPC code")


class TapConfig(Section):
    """Alignment of the classifier on Gaussian clusters of features."""

    epochs: int = Field(default=50, ge=0, description="0 = no alignment; the LoRAC-IPC code")
    clusters: int = Field(default=10, ge=1, description="per class; the LoRAC-IPC code")
    samples_per_class: int = Field(default=640, ge=1, description="rows per cluster, and per step; 5 batches of 128")
    lr: Positive = Field(default=0.005, description="cosine to 0 over the epochs; the LoRAC-IPC code")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the LoRAC-IPC code")


class TaskInferenceConfig(Section):
    """The task of a test sample from its features."""

    clusters: int = Field(default=4, ge=1, description="per class; the LoRAC-IPC code, 2 on ImageNet-R")
    batchwise_vote: bool = Field(
        default=False, description="one task per test batch, which leaks the task; the LoRAC-IPC code's option"
    )
    mixed: Literal["auto", "one_pass", "grouped"] = Field(
        default="auto", description="batches of several tasks; grouped = a pass per task, for BEiT, EVA, Swin v2"
    )
