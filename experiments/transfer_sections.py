"""Sections of a transfer experiment: data, networks, ways of pre-training, transfers. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.schema_rules import LABEL, LABEL_HELP, Label, repeated
from avalanche_firn.experiments.section_base import Arguments
from avalanche_firn.experiments.sections import OptimizerConfig, Rate, Section

__all__ = [
    "ASBConfig",
    "AlphabetsConfig",
    "DataConfig",
    "DigitClassesConfig",
    "DynamicsConfig",
    "IidConfig",
    "LandscapeConfig",
    "MetaASBConfig",
    "MiniImageNetConfig",
    "NetworkConfig",
    "OmnImageConfig",
    "OmniglotConfig",
    "PretrainingConfig",
    "TransferConfig",
    "UntrainedConfig",
]

Count = Annotated[int, Field(ge=1)]
Digit = Annotated[int, Field(ge=0, le=9)]


class NetworkConfig(Section):
    """The network, with random weights: pre-training is what is compared."""

    name: str = Field(
        default="convnet_28", min_length=1, description="a timm model; the papers' are convnet_28 and _84"
    )
    arguments: Arguments = Field(
        default_factory=dict, description="for timm.create_model, such as width (256 in the released code)"
    )
    outputs: int | None = Field(
        default=None,
        ge=1,
        description="of the classifier, null = one per pre-training class; released: 1000 on Omniglot",
    )


class _ClassData(Section):
    """Classes of few images: some to pre-train on, others to transfer to, others to choose rates on."""

    pretrain_images: int = Field(default=15, ge=1, description="per class, to pre-train on; the released code")
    held_out_images: int = Field(default=5, ge=1, description="per pre-training class, never trained on")
    train_images: int = Field(default=15, ge=1, description="per transfer class, to learn from; the released code")
    test_images: int = Field(default=5, ge=1, description="per transfer class, to test on; the released code")
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="of the images' split and the held-out classes")


class AlphabetsConfig(Section):
    """Which characters."""

    part: Literal["background", "evaluation", "small"] | None = Field(
        default=None, description="of Omniglot, found below root; null = the alphabets that lie in root"
    )
    alphabets: list[str] | None = Field(default=None, min_length=1, description="whole alphabets, null = all")


class OmniglotConfig(_ClassData):
    """Omniglot: 20 drawings of each character, 28 pixels, grey."""

    name: Literal["omniglot"] = Field(description="handwritten characters")
    root: str = Field(min_length=1, description="folder of the data; relative paths start at the working directory")
    download: bool = Field(default=False, description="fetch a part that isn't there")
    pretrain: AlphabetsConfig = Field(
        default_factory=lambda: AlphabetsConfig(part="background"), description="characters to pre-train on"
    )
    transfer: AlphabetsConfig = Field(
        default_factory=lambda: AlphabetsConfig(part="evaluation"), description="characters to transfer to"
    )
    validation_classes: int = Field(
        default=50, ge=0, description="characters left out of the pre-training, to choose rates on; our choice"
    )


class MiniImageNetConfig(_ClassData):
    """mini-ImageNet: 64 classes to pre-train on, 16 to choose rates on, 20 to transfer to; 84 pixels, colour."""

    name: Literal["mini_imagenet"] = Field(description="natural images of 100 classes")
    root: str = Field(min_length=1, description="folder of the data")
    pretrain_images: int = Field(default=500, ge=1, description="per class, to pre-train on; the released code")
    held_out_images: int = Field(default=100, ge=1, description="per pre-training class, never trained on")
    train_images: int = Field(default=30, ge=1, description="per transfer class; the released code, also 10")
    test_images: int = Field(default=100, ge=1, description="per transfer class, to test on; the released code")


class OmnImageConfig(_ClassData):
    """OmnImage: 1,000 classes of 20 or 100 natural images, 84 pixels; 700 to pre-train on, 300 to transfer to."""

    name: Literal["omnimage"] = Field(description="natural images of 1,000 classes")
    root: str = Field(min_length=1, description="folder of the data")
    test_class_list: str = Field(min_length=1, description="file with the names of the transfer classes")
    images_per_class: Literal[20, 100] = Field(default=20, description="which of the two sets")
    validation_classes: int = Field(
        default=50, ge=0, description="classes left out of the pre-training, to choose rates on; our choice"
    )


class DigitClassesConfig(_ClassData):
    """scikit-learn's handwritten digits, part of the package's dependencies; scaled to 28 pixels, grey."""

    name: Literal["digits"] = Field(description="handwritten digits, nothing to download")
    pretrain: list[Digit] = Field(default=[0, 1, 2, 3, 4], min_length=1, description="to pre-train on; our choice")
    validation: list[Digit] = Field(default=[5, 6], description="to choose rates on; our choice")
    transfer: list[Digit] = Field(default=[7, 8, 9], min_length=1, description="to transfer to; our choice")
    pretrain_images: int = Field(default=120, ge=1, description="per class, to pre-train on; our choice")
    held_out_images: int = Field(default=40, ge=1, description="per pre-training class, never trained on; our choice")
    train_images: int = Field(default=60, ge=1, description="per transfer class, to learn from; our choice")
    test_images: int = Field(default=60, ge=1, description="per transfer class, to test on; our choice")

    @model_validator(mode="after")
    def _disjoint(self) -> DigitClassesConfig:
        parts = [*self.pretrain, *self.validation, *self.transfer]
        if twice := repeated(parts):
            reject([("transfer", f"the digits {twice} are in two parts or given twice", "every digit at most once")])
        return self


DataConfig = Annotated[
    OmniglotConfig | MiniImageNetConfig | OmnImageConfig | DigitClassesConfig, Field(discriminator="name")
]


class _Pretraining(Section):
    """A way of pre-training; its label names its folder and its rows."""

    name: Label = Field(
        pattern=LABEL,
        json_schema_extra=LABEL_HELP,
        description="unique label: folder and table row. Default: the strategy's name",
    )

    def brief(self) -> _Pretraining:
        """A few steps of it, for a dry run."""
        return self


class UntrainedConfig(_Pretraining):
    """No pre-training: random weights, what a transfer reaches by itself."""

    strategy: Literal["untrained"] = Field(description="random weights")


class IidConfig(_Pretraining):
    """Shuffled batches of all classes."""

    strategy: Literal["iid"] = Field(description="ordinary training in shuffled batches")
    zap: bool = Field(description="redraw rows of the classifier at the beginning of epochs")
    zap_every: int = Field(default=1, ge=1, description="epochs between zaps; the released sweep: 1, 3, 5, 10")
    zap_fraction: float = Field(
        default=1.0, gt=0, le=1, description="of the rows, drawn anew each time; the released code"
    )
    zap_init: Literal["kaiming_normal", "kaiming_normal_joint"] = Field(
        default="kaiming_normal", description="joint = the released code's, almost zero for many rows"
    )
    epochs: int = Field(default=10, ge=1, description="10 on Omniglot, 30 elsewhere in the released configurations")
    batch_size: int = Field(default=256, ge=1, description="the released configurations")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(name="adam", lr=1e-3, weight_decay=0.0),
        description="constant rate; released: Adam, 1e-3 on Omniglot, 3e-4 elsewhere",
    )

    def brief(self) -> IidConfig:
        """Two epochs, so that a zap is in it."""
        return self.model_copy(update={"epochs": min(self.epochs, 2)})


class ASBConfig(_Pretraining):
    """Alternating sequential and batch learning."""

    strategy: Literal["asb"] = Field(description="a sequence of one class, then a batch")
    zap: bool = Field(description="redraw the class's row before its sequence")
    inner_lr: Rate = Field(description="of SGD in the sequence; released: 0.1 on Omniglot, 1e-3 elsewhere")
    outer_lr: Rate = Field(default=1e-3, description="of Adam on the batch; the released configurations")
    episodes: int = Field(default=9000, ge=1, description="the released configurations")
    inner_steps: int = Field(default=20, ge=1, description="images of a sequence; the released configurations")
    remember_size: int = Field(default=64, ge=1, description="more images in the batch; released: 100 but on Omniglot")

    def brief(self) -> ASBConfig:
        """Two episodes."""
        return self.model_copy(update={"episodes": min(self.episodes, 2)})


class MetaASBConfig(ASBConfig):
    """Meta-ASB: the outer gradient goes through the sequence."""

    strategy: Literal["meta_asb"] = Field(description="ASB with second-order gradients")  # type: ignore[assignment]
    episodes: int = Field(default=25000, ge=1, description="the released configurations")


PretrainingConfig = Annotated[UntrainedConfig | IidConfig | ASBConfig | MetaASBConfig, Field(discriminator="strategy")]


class TransferOptimizerConfig(Section):
    """An optimizer of the transfer, with the rates that are tried."""

    label: Label = Field(pattern=LABEL, json_schema_extra=LABEL_HELP, description="unique; in tables and tags")
    name: Literal["sgd", "adam", "adamw"] = Field(description="the released code: Adam")
    rates: list[Rate] = Field(min_length=1, description="tried on validation classes; one rate is simply taken")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="SGD only; our choice: none")
    weight_decay: float = Field(default=0.0, ge=0, description="the released code")

    @model_validator(mode="after")
    def _consistent(self) -> TransferOptimizerConfig:
        problems = []
        if self.momentum and self.name != "sgd":
            problems.append(("momentum", f"{self.momentum} is set, but {self.name} has no momentum", "0, or name: sgd"))
        if twice := repeated(self.rates):
            problems.append(("rates", f"the rates {twice} are repeated", "every rate once"))
        reject(problems)
        return self


class TransferConfig(Section):
    """What is transferred to, and how it is judged."""

    optimizers: list[TransferOptimizerConfig] = Field(min_length=1, description="each is a row of the table")
    select: Literal["validation", "test_envelope"] = Field(
        default="validation",
        description="rates by validation classes; test_envelope = the released notebooks, on the transfer classes, "
        "which the results say",
    )
    trainable: Literal["all", "head"] = Field(default="all", description="the released headline setting: all")
    head: Literal["kaiming", "lstsq"] = Field(
        default="kaiming", description="start of the classifier; the released code"
    )
    tasks: int | None = Field(default=None, ge=1, description="first so many classes of a trial's order; null = all")
    log_every: int = Field(default=10, ge=1, description="classes between accuracies; released: 50 on Omniglot, 10")
    trials: int = Field(
        default=3, ge=1, description="class orders and classifier draws per seed; the released code: 10"
    )
    sweep_trials: int = Field(default=1, ge=1, description="trials per rate of the sweep; our choice")
    iid_epochs: int = Field(
        default=5, ge=0, description="of the i.i.d. transfer, 0 = none; released: 1, or 5 in notebooks"
    )
    iid_batch_size: int = Field(
        default=256, ge=1, description="released: 256 on Omniglot, 128 OmnImage, 64 mini-ImageNet"
    )

    @model_validator(mode="after")
    def _unique(self) -> TransferConfig:
        labels = [optimizer.label for optimizer in self.optimizers]
        twice = repeated(label.lower() for label in labels)  # capitals make no other file everywhere
        reject([("optimizers", f"the labels {twice} are repeated", "every label once")] if twice else [])
        return self


class DynamicsConfig(Section):
    """Losses of single tasks during the first trial of the continual transfer."""

    every: Count | Literal["experience"] = Field(
        default="experience", description="iterations between probes, or after every class; our choice"
    )
    tasks: int = Field(default=50, ge=1, description="probed, spread over the transfer; our choice")
    images_per_task: int = Field(default=5, ge=1, description="test images of a task; our choice")
    recovery_fraction: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="of the shock that may remain when a network counts as recovered; our choice",
    )


class LandscapeConfig(Section):
    """Loss over a plane through the weights of the continual transfer's first trial."""

    points: int = Field(default=21, ge=3, description="per side; our choice")
    snapshots: int = Field(default=30, ge=3, description="of the path; our choice")
    part: Literal["all", "encoder"] = Field(
        default="encoder", description="weights that span the plane; the redrawn classifier would fill it; our choice"
    )
