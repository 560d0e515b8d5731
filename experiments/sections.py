"""The sections of a configuration: backbone, stream, training, evaluation, checkpoint.

Every field says what it means and where its default comes from; ``firn recipes keys`` prints them. Sections are
frozen, refuse unknown keys and don't convert types (``"3"`` isn't a number). Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.contrastive_sections import ContrastiveBoundConfig
from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.probe_sections import DriftConfig, ProbeConfig
from avalanche_firn.experiments.public_stream_sections import (
    Cars196StreamConfig,
    CUB200StreamConfig,
    DomainNetStreamConfig,
    FiveDatasetsStreamConfig,
    FMoWStreamConfig,
    HuggingFaceStreamConfig,
    ImageNetRStreamConfig,
)
from avalanche_firn.experiments.section_base import Rate, Section
from avalanche_firn.experiments.stream_rules import MOST
from avalanche_firn.experiments.stream_sections import (
    AvalancheStreamConfig,
    DigitsStreamConfig,
    DomainFolderStreamConfig,
    FolderStreamConfig,
)
from avalanche_firn.experiments.zapping_sections import TaskDynamicsConfig

__all__ = [
    "AvalancheStreamConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "DigitsStreamConfig",
    "DomainFolderStreamConfig",
    "EvaluationConfig",
    "FolderStreamConfig",
    "OptimizerConfig",
    "OptimizerOverride",
    "Rate",
    "ScheduleConfig",
    "Section",
    "StreamConfig",
    "TrainingConfig",
    "TrainingOverride",
]


class BackboneConfig(Section):
    """The pre-trained feature extractor; normalisation and image size come from its timm data configuration."""

    name: str = Field(
        default="vit_firn_32.omniglot", min_length=1, description="full timm tag. Default: the embedded backbone"
    )
    pretrained: bool = Field(default=True, description="load the pre-trained weights; false = random initialisation")
    weights: str | None = Field(default=None, min_length=1, description="local weights file instead of timm's own")
    fresh_final_norm: bool = Field(
        default=False,
        description="replace the final LayerNorm by a fresh one, as the released SLCA code does. Default: our choice",
    )

    @model_validator(mode="after")
    def _consistent(self) -> BackboneConfig:
        if self.weights is not None and not self.pretrained:
            reject([("pretrained", "false contradicts backbone.weights, which names a file to load", "true")])
        return self


StreamConfig = Annotated[
    DigitsStreamConfig
    | FolderStreamConfig
    | AvalancheStreamConfig
    | DomainFolderStreamConfig
    | ImageNetRStreamConfig
    | CUB200StreamConfig
    | Cars196StreamConfig
    | DomainNetStreamConfig
    | FiveDatasetsStreamConfig
    | FMoWStreamConfig
    | HuggingFaceStreamConfig,
    Field(discriminator="name"),
]


class OptimizerConfig(Section):
    """The optimizer, rebuilt in every experience."""

    name: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="SLCA and its baselines use SGD")
    lr: Rate = Field(default=0.01, description="learning rate of the head; exps/slca_cifar.json")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="SGD only; null = 0.9, exps/slca_cifar.json")
    weight_decay: float = Field(default=5e-4, ge=0, description="exps/slca_cifar.json")

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.momentum is not None and self.name != "sgd":
            reject([("momentum", f"{self.momentum} is set, but {self.name} has no momentum", "null, or name: sgd")])
        return self


class ScheduleConfig(Section):
    """The learning-rate schedule of one experience, stepped once per epoch."""

    name: Literal["none", "multistep", "cosine", "lagged_cosine"] = Field(
        default="none", description="lagged_cosine = the LoRAC-IPC code's, one epoch late"
    )
    milestones: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="multistep only: after how many epochs the rates fall"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="multistep only: factor at a milestone; the SLCA code")
    floor: float = Field(default=0.0, ge=0, description="cosines only: the rate that they end at")

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        problems = []
        if self.floor and self.name not in ("cosine", "lagged_cosine"):
            problems.append(("floor", f"{self.floor} is set, but the schedule is {self.name}", "0"))
        if self.name == "multistep" and not self.milestones:
            problems.append(("milestones", "empty, but the schedule is multistep", "at least one epoch"))
        if self.name != "multistep" and self.milestones:
            problems.append(("milestones", f"{self.milestones} is set, but the schedule is {self.name}", "[]"))
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            problems.append(("milestones", f"{self.milestones} doesn't rise", "rising epochs"))
        reject(problems)
        return self


class TrainingConfig(Section):
    """How one experience is trained."""

    epochs: int = Field(default=20, ge=1, description="epochs per experience; exps/slca_cifar.json")
    batch_size: int = Field(default=128, ge=1, le=MOST, description="images per step; exps/slca_cifar.json")
    eval_batch_size: int = Field(
        default=256,
        ge=1,
        le=MOST,
        description="images per evaluation step; rounding of evaluated figures and of features",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="rebuilt in every experience")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="rebuilt in every experience")
    num_workers: int = Field(default=0, ge=0, le=1024, description="loader processes; 0 loads in the main process")

    @model_validator(mode="after")
    def _reachable(self) -> TrainingConfig:
        late = [m for m in self.schedule.milestones if m >= self.epochs]
        if late:
            reject(
                [("schedule.milestones", f"{late} is never reached in {self.epochs} epochs", f"1 to {self.epochs - 1}")]
            )
        return self


class OptimizerOverride(Section):
    """The optimizer of one method, where it differs from ``training.optimizer``."""

    name: Literal["sgd", "adam", "adamw"] | None = Field(default=None, description="null = as in training.optimizer")
    lr: Rate | None = Field(default=None, description="null = as in training.optimizer")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="null = as in training.optimizer")
    weight_decay: float | None = Field(default=None, ge=0, description="null = as in training.optimizer")


class TrainingOverride(Section):
    """Training of one method, where it differs from ``training``; null means the same as there."""

    epochs: int | None = Field(default=None, ge=1, description="null = as in training")
    batch_size: int | None = Field(default=None, ge=1, le=MOST, description="null = as in training")
    optimizer: OptimizerOverride = Field(default_factory=OptimizerOverride, description="single values of it")
    schedule: ScheduleConfig | None = Field(default=None, description="null = as in training; given as a whole")


class EvaluationConfig(Section):
    """What is evaluated after each experience."""

    streams: Literal["seen", "all"] = Field(
        default="seen", description="all also evaluates classes not trained yet, which forward transfer needs"
    )
    split: Literal["test", "validation"] = Field(
        default="test", description="validation never touches the test images: for choosing hyper-parameters"
    )
    forgetting: Literal["max_seen", "diag", "max_all"] = Field(
        default="max_seen", description="reference of forgetting/average, see avalanche_firn.evaluation.forgetting"
    )
    task_incremental: bool = Field(
        default=False,
        description="also task-incremental accuracy: arg-max among the classes of the true task; uses task identity",
    )
    probes: list[ProbeConfig] = Field(default_factory=list, description="judge the representation by adaptation")
    drift: DriftConfig | None = Field(default=None, description="measure how far the representation moves")
    contrastive_bound: ContrastiveBoundConfig | None = Field(
        default=None,
        description="of contrastive methods, the losses and bounds of CILA's theory on the evaluated images",
    )
    dynamics: TaskDynamicsConfig | None = Field(default=None, description="losses of single tasks while training")


class CheckpointConfig(Section):
    """How often a run can be resumed from."""

    every: int = Field(
        default=200, ge=0, description="training iterations between checkpoints, 0 = after experiences only; our choice"
    )
    keep: int = Field(default=2, ge=1, description="checkpoints kept, the older one for a damaged newer; our choice")
