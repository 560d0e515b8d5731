"""The sections of Avalanche's own baselines: EWC, LwF, DER, SCR and its experience replay. Nothing here imports torch.

Sources of defaults: "Avalanche" is avalanche-lib 0.6.0, "continual-learning-baselines" the experiments that its authors
publish beside it. None of them was tuned for a pre-trained backbone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.contrastive_sections import AugmentationConfig
from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.method_section import MethodSection
from avalanche_firn.experiments.section_base import Section

__all__ = [
    "AvalancheReplayConfig",
    "DERConfig",
    "DERMemoryConfig",
    "EWCConfig",
    "LwFConfig",
    "ReplayMemoryConfig",
    "SCRConfig",
    "SCRMemoryConfig",
    "scr_problems",
]

NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Whole = Annotated[int, Field(ge=1)]


class EWCConfig(MethodSection):
    """Elastic weight consolidation: as naive, with a penalty on changes of parameters that mattered before."""

    strategy: Literal["ewc"] = Field(description="elastic weight consolidation, Avalanche's")
    ewc_lambda: NotNegative = Field(
        default=1.0, description="weight of the penalty; continual-learning-baselines, Permuted MNIST"
    )
    mode: Literal["separate", "online"] = Field(
        default="separate",
        description="separate = a penalty per experience, two copies of the model each; online = one; Avalanche",
    )
    decay_factor: float | None = Field(
        default=None, ge=0, le=1, description="online only, where it is needed: of the earlier importances; Avalanche"
    )
    keep_importance_data: bool = Field(
        default=False, description="online only: keep what nothing reads any more, for inspection; Avalanche"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EWCConfig:
        problems = []
        if self.mode == "online" and self.decay_factor is None:
            problems.append(("decay_factor", "null with mode online", "0 to 1, 1 = plain sum"))
        if self.mode == "separate" and self.decay_factor is not None:
            problems.append(("decay_factor", f"{self.decay_factor} is set, but the mode is separate", "null"))
        if self.mode == "separate" and self.keep_importance_data:
            problems.append(("keep_importance_data", "true with mode separate, which keeps all anyway", "false"))
        reject(problems)
        return self


class LwFConfig(MethodSection):
    """Learning without forgetting: as naive, with distillation from the model before the experience."""

    strategy: Literal["lwf"] = Field(description="learning without forgetting, Avalanche's")
    alpha: NotNegative = Field(default=1.0, description="weight of the distillation; Avalanche")
    temperature: Positive = Field(default=2.0, description="of its softmax; Avalanche and the paper")
    teacher: Literal["evaluation", "training"] = Field(
        default="evaluation", description="mode of that model, training = as Avalanche leaves it; our choice"
    )


class DERMemoryConfig(Section):
    """The images and logits that DER stores, in equal shares of the classes."""

    mem_size: Whole = Field(default=200, description="images kept; Avalanche")
    batch_size_mem: Whole | None = Field(
        default=None, description="stored images per step, null = as many as current ones; Avalanche"
    )


class DERConfig(MethodSection):
    """Dark experience replay: stored images are held to the logits that they had, and to their labels."""

    strategy: Literal["der"] = Field(description="dark experience replay, Avalanche's; DER++ by its beta")
    rehearsal: DERMemoryConfig = Field(default_factory=DERMemoryConfig, description="the buffer")
    alpha: NotNegative = Field(default=0.1, description="of the squared differences of logits; Avalanche")
    beta: NotNegative = Field(
        default=0.5, description="of the cross-entropy of stored images, above 0 = DER++, 0 = DER; Avalanche"
    )


class SCRMemoryConfig(Section):
    """The images that SCR stores, in equal shares of the classes; at least one per class of the stream."""

    mem_size: Whole = Field(
        default=200, description="images kept; continual-learning-baselines, Split CIFAR-10 (Avalanche: 100)"
    )
    batch_size_mem: Whole = Field(default=100, description="stored images per step; Avalanche")


class SCRConfig(MethodSection):
    """Supervised contrastive replay: a contrastive loss over images and views of them, nearest class mean at test."""

    strategy: Literal["scr"] = Field(description="supervised contrastive replay, Avalanche's")
    rehearsal: SCRMemoryConfig = Field(default_factory=SCRMemoryConfig, description="the buffer")
    temperature: Positive = Field(default=0.1, description="of the contrastive loss; Avalanche")
    projection_size: Whole = Field(default=128, description="width of the projections; the SCR code")
    augmentation: AugmentationConfig = Field(
        default_factory=AugmentationConfig, description="of the second view; the SCR code has these values too"
    )


class ReplayMemoryConfig(Section):
    """The images that Avalanche's replay stores."""

    mem_size: Whole = Field(default=200, description="images kept; Avalanche")
    batch_size_mem: Whole | None = Field(
        default=None, description="stored images per step, null = as many as current ones; Avalanche"
    )
    storage: Literal["experience_balanced", "class_balanced", "reservoir"] = Field(
        default="experience_balanced", description="equal shares of experiences or classes, or uniform; Avalanche"
    )


class AvalancheReplayConfig(MethodSection):
    """Avalanche's experience replay: as naive, and every batch is joined by stored images."""

    strategy: Literal["avalanche_replay"] = Field(description="naive with stored images, Avalanche's ReplayPlugin")
    rehearsal: ReplayMemoryConfig = Field(default_factory=ReplayMemoryConfig, description="the buffer")


def scr_problems(path: str, zapping: object, transforms: str) -> list[tuple[str, str, str]]:
    """Where SCR does not fit the shared sections: path, reason and what is accepted, as `reject` takes them.

    Args:
        path: of the method.
        zapping: its section or None.
        transforms: of the stream; "backbone" where it has no such field.
    """
    problems = []
    if zapping is not None:
        problems.append((f"{path}.zapping", "is set with scr, whose class means have no rows to redraw", "null"))
    if transforms == "own":
        reason = "own with scr, which must know what the images were normalised with"
        problems.append(("stream.transforms", reason, "backbone or a preset"))
    return problems
