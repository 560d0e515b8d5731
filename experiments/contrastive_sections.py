"""The sections of a configuration about contrastive methods and rehearsal. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.section_base import Section

__all__ = [
    "AugmentationConfig",
    "ClassifierStageConfig",
    "CoefficientConfig",
    "ContrastiveBoundConfig",
    "ContrastiveConfig",
    "RateScheduleConfig",
    "RehearsalConfig",
]

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class ContrastiveConfig(Section):
    """The losses of Co2L; ContrastiveDistillationPlugin explains every option."""

    temperature: Positive = Field(default=0.5, description="of the contrastive loss; the Co2L code, CIFAR-10")
    student_temperature: Positive = Field(default=0.2, description="of the distillation; the Co2L code, CIFAR-10")
    teacher_temperature: Positive = Field(default=0.01, description="of the distillation; the Co2L code, CIFAR-10")
    base_temperature: Positive | None = Field(
        default=0.07, description="the contrastive loss times temperature / this, null = 1; the Co2L code"
    )
    teacher_bn: Literal["batch", "running"] = Field(
        default="batch", description="BatchNorm statistics of the teacher; the Co2L code"
    )
    domain_incremental: bool = Field(
        default=False, description="equal classes of different experiences are negatives; the Co2L code on R-MNIST"
    )
    projection_size: int = Field(default=128, ge=1, description="width of the projections; the Co2L code")
    normalize: bool = Field(default=True, description="projections of unit norm; the Co2L code but for R-MNIST")


class CoefficientConfig(Section):
    """CILA's weight of the distillation; what is open in the paper is a choice here."""

    mode: Literal["max", "min", "pure"] = Field(default="max", description="max = CILA, the others its ablation")
    balance: NotNegative = Field(default=1.0, description="factor of the ratio; open in the paper")
    floor: NotNegative = Field(default=1.0, description="also the weight in the second task; secondary sources")
    ceiling: NotNegative | None = Field(default=None, description="largest weight, null = none")
    average_over: Literal["last_epoch", "task", "final_model"] = Field(
        default="last_epoch", description="losses that enter the ratio; open in the paper"
    )
    ratio_scale: Literal["plain", "training"] = Field(
        default="plain", description="training = contrastive averages with temperature / base_temperature; open"
    )


class ClassifierStageConfig(Section):
    """The linear classifier fitted on the frozen backbone after an experience."""

    epochs: int = Field(default=100, ge=1, description="the Co2L code")
    batch_size: int = Field(default=256, ge=1, description="the Co2L code")
    lr: Positive = Field(default=1.0, description="the Co2L code, CIFAR-10 and R-MNIST")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the Co2L code")
    weight_decay: NotNegative = Field(default=0.0, description="the Co2L code")
    milestones: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="epochs after which the rate falls, null = after 60, 75, 90 %; the Co2L code"
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="factor at a milestone; the Co2L code")
    balance: Literal["class", "domain"] = Field(default="class", description="domain = the Co2L code on R-MNIST")
    views: Literal["augmented", "evaluation"] = Field(
        default="augmented", description="augmented = the Co2L code; evaluation = features once, for a CPU"
    )

    @model_validator(mode="after")
    def _reachable(self) -> ClassifierStageConfig:
        given = self.milestones or []
        problems = []
        late = [m for m in given if m >= self.epochs]
        if late:
            problems.append(
                ("milestones", f"{late} is never reached in {self.epochs} epochs", f"1 to {self.epochs - 1}")
            )
        if sorted(set(given)) != given:
            problems.append(("milestones", f"{given} doesn't rise", "rising epochs"))
        reject(problems)
        return self


class AugmentationConfig(Section):
    """Two random views of every image, drawn on the device."""

    crop_scale: list[Probability] = Field(
        default=[0.2, 1.0], min_length=2, max_length=2, description="area that a crop keeps; the Co2L code, CIFAR-10"
    )
    flip: Probability = Field(default=0.5, description="probability of a mirror image; the Co2L code")
    jitter: list[NotNegative] | None = Field(
        default=[0.4, 0.4, 0.4, 0.1],
        min_length=4,
        max_length=4,
        description="brightness, contrast, saturation, hue; null = none; the Co2L code",
    )
    jitter_probability: Probability = Field(default=0.8, description="the Co2L code")
    grey: Probability = Field(default=0.2, description="probability of an image without colour; the Co2L code")
    blur: Probability = Field(default=0.0, description="probability; the Co2L code has 0.5 on Tiny ImageNet")
    blur_kernel: int = Field(default=7, ge=1, description="pixels, odd; the Co2L code, Tiny ImageNet")
    blur_sigma: list[Positive] = Field(
        default=[0.1, 2.0], min_length=2, max_length=2, description="pixels; the Co2L code, Tiny ImageNet"
    )

    @model_validator(mode="after")
    def _possible(self) -> AugmentationConfig:
        problems = []
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            problems.append(("crop_scale", f"{self.crop_scale}", "0 < smallest <= largest <= 1"))
        if self.jitter is not None and self.jitter[3] > 0.5:
            problems.append(("jitter", f"hue is {self.jitter[3]}", "hue up to 0.5"))
        if self.blur_kernel % 2 == 0:
            problems.append(("blur_kernel", f"{self.blur_kernel} is even", "an odd number"))
        if self.blur_sigma[0] > self.blur_sigma[1]:
            problems.append(("blur_sigma", f"{self.blur_sigma} doesn't rise", "smallest, largest"))
        reject(problems)
        return self


class RateScheduleConfig(Section):
    """Epochs of the first experience and the warm-up.

    The rate follows half a cosine over the epochs, counted from 1: a single epoch runs at a thousandth of the rate.
    """

    first_epochs: int | None = Field(default=None, ge=1, description="of the first experience; null = as the others")
    warmup: bool | None = Field(default=None, description="null = for batches above 256; the Co2L code")
    warmup_epochs: int = Field(default=10, ge=0, description="the Co2L code")
    warmup_from: NotNegative = Field(default=0.01, description="rate of the first iteration; the Co2L code")
    warmup_target: Literal["task", "reference"] = Field(
        default="task", description="reference = ends at the later tasks' cosine also in the first; the Co2L code"
    )


class RehearsalConfig(Section):
    """The buffer of earlier images."""

    mem_size: int = Field(default=200, ge=1, description="images kept; 200 and 500 in Co2L")
    storage: Literal["class_balanced", "reservoir"] = Field(
        default="class_balanced", description="reservoir = uniform over all images seen, for domains"
    )


class ContrastiveBoundConfig(Section):
    """The losses and bounds that CILA's theory speaks of, on held-out images, for contrastive methods."""

    negatives: int = Field(default=8, ge=1, description="per pair; our choice")
    pairs_per_task: int = Field(default=256, ge=1, description="anchors per task; our choice")
    pool_per_task: int = Field(default=64, ge=2, description="images per task for the certificate; our choice")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the choice of images")
