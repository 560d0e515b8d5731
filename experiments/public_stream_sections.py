"""The sections of streams from public data sets that Avalanche lacks. Nothing here imports torch.

Each names its data set and takes `root`, the folder that holds it in its public layout; null is the folder where
Avalanche keeps data, ``~/.avalanche/data``. `download` fetches what isn't there yet, where a public address serves it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.schema_rules import repeated
from avalanche_firn.experiments.section_base import Section
from avalanche_firn.experiments.stream_rules import (
    AUGMENT_HELP,
    CLASSES_HELP,
    MOST,
    ORDER_HELP,
    TASKS_HELP,
    TRANSFORMS_HELP,
    ClassId,
    ClassOrder,
    Tasks,
    Transforms,
    fraction_problems,
    order_problems,
    task_problems,
)

__all__ = [
    "PUBLIC_CLASSES",
    "CUB200StreamConfig",
    "Cars196StreamConfig",
    "DomainNetStreamConfig",
    "FMoWStreamConfig",
    "FiveDatasetsStreamConfig",
    "HuggingFaceStreamConfig",
    "ImageNetRStreamConfig",
    "PublicStream",
]

# classes of the whole data sets; public facts
PUBLIC_CLASSES = {"imagenet_r": 200, "cub200": 200, "cars196": 196, "domainnet": 345, "fmow": 62}
_ROOT_HELP = "folder that holds the data in its public layout; null = the data set's own below ~/.avalanche/data"
_DOWNLOAD_HELP = "fetch what isn't there yet; false never uses the network"
_COMPLETE_HELP = "refuse data that isn't all there; false takes a part of the data set, for trials"
_VALIDATION_HELP = "of each class, held out of the training images; 0 = no validation part"
Name = Annotated[str, Field(min_length=1)]


def _repeated(field: str, values: list[str] | None, what: str) -> list[tuple[str, str, str]]:
    twice = repeated(values or [])
    return [(field, f"the {what} {twice} are repeated", f"each of the {what} once")] if twice else []


class PublicStream(Section):
    """What all of them have."""

    root: str | None = Field(default=None, min_length=1, description=_ROOT_HELP)
    transforms: Transforms = Field(default="backbone", description=TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=AUGMENT_HELP)


class _HeldOut(PublicStream):
    """Data sets without a validation part of their own."""

    validation_fraction: float = Field(default=0.0, ge=0, lt=1, description=_VALIDATION_HELP)
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the held-out images; our choice")


class _Classes(_HeldOut):
    """A class-incremental stream over a known number of classes."""

    tasks: Tasks = Field(default=10, description=f"{TASKS_HELP}; the SLCA code")
    class_order: ClassOrder = Field(default="natural", description=ORDER_HELP)

    complete: bool = Field(default=True, description=_COMPLETE_HELP)

    @model_validator(mode="after")
    def _possible(self) -> _Classes:
        if self.complete:
            classes = PUBLIC_CLASSES[self.name]  # type: ignore[attr-defined]
            reject([*order_problems(self.class_order, classes), *task_problems(self.tasks, classes)])
        return self


class ImageNetRStreamConfig(_Classes):
    """ImageNet-R: 30,000 pictures of 200 ImageNet classes, with a drawn split into 80 and 20 %."""

    name: Literal["imagenet_r"] = Field(description="ImageNet-R in the split of DualPrompt and SLCA: drawn, 80 / 20 %")
    split_seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="of the drawn test part, whose list is written beside the data, and of held-out images; our choice",
    )
    split_files: list[Name] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="lists of training and test images of another project, instead of the drawn ones",
    )
    download: bool = Field(default=True, description=f"{_DOWNLOAD_HELP} (2 GB)")


class CUB200StreamConfig(_Classes):
    """CUB-200-2011: 11,788 whole pictures of 200 birds in the official split."""

    name: Literal["cub200"] = Field(description="CUB-200-2011, whole pictures, official split")
    download: bool = Field(default=True, description=f"{_DOWNLOAD_HELP} (1.1 GB)")


class Cars196StreamConfig(_Classes):
    """Stanford Cars: 16,185 pictures of 196 kinds of cars in the official split."""

    name: Literal["cars196"] = Field(description="Stanford Cars in torchvision's layout; no public address serves it")
    tasks: Tasks = Field(default=[20] * 9 + [16], description=f"{TASKS_HELP}; the SLCA code")
    swap_train_test: bool = Field(default=False, description="as a script of the SLCA code perhaps does, open")


class DomainNetStreamConfig(_HeldOut):
    """DomainNet: 586,575 pictures of 345 classes in six domains, in the official split."""

    name: Literal["domainnet"] = Field(description="DomainNet, by classes or by domains, official lists")
    scenario: Literal["classes", "domains"] = Field(
        default="classes", description="classes = tasks of classes over pooled domains; domains = one domain per task"
    )
    domains: list[Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]] | None = Field(
        default=None, min_length=1, description="those that take part, in their order; null = all six, sorted"
    )
    tasks: Tasks = Field(default=5, description=f"scenario classes only. {TASKS_HELP}; the LoRAC-IPC code")
    class_order: ClassOrder = Field(default="natural", description=f"scenario classes only. {ORDER_HELP}")
    download: bool = Field(default=True, description=f"{_DOWNLOAD_HELP} (18 GB)")
    complete: bool = Field(default=True, description=_COMPLETE_HELP)

    @model_validator(mode="after")
    def _possible(self) -> DomainNetStreamConfig:
        problems = _repeated("domains", self.domains, "domains")  # type: ignore[arg-type]
        if self.scenario == "classes" and self.complete:
            problems += order_problems(self.class_order, PUBLIC_CLASSES["domainnet"])
            problems += task_problems(self.tasks, PUBLIC_CLASSES["domainnet"])
        elif self.scenario == "domains" and self.class_order != "natural":
            problems.append(("class_order", "set, but scenario domains has all classes in every task", "natural"))
        reject(problems)
        return self


class FiveDatasetsStreamConfig(_HeldOut):
    """5-Datasets: one data set per task, ten classes each."""

    name: Literal["five_datasets"] = Field(description="5-Datasets: one data set per task")
    datasets: list[Literal["svhn", "mnist", "cifar10", "notmnist", "fashion_mnist"]] = Field(
        default=["svhn", "mnist", "cifar10", "notmnist", "fashion_mnist"],
        min_length=1,
        description="in order of appearance; the LoRAC-IPC code",
    )
    download: bool = Field(default=True, description=_DOWNLOAD_HELP)

    @model_validator(mode="after")
    def _possible(self) -> FiveDatasetsStreamConfig:
        reject(_repeated("datasets", self.datasets, "data sets"))  # type: ignore[arg-type]
        return self


class FMoWStreamConfig(PublicStream):
    """FMoW-WILDS by region of the world: 62 classes that come again in every region."""

    name: Literal["fmow"] = Field(description="satellite images by region, in the layout of wilds")
    regions: list[Literal["Asia", "Europe", "Africa", "Americas", "Oceania", "Other"]] = Field(
        default=["Asia", "Europe", "Africa", "Americas", "Oceania"],
        min_length=1,
        description="in order of appearance; open in the LP-FT paper, our choice: the numbering of wilds",
    )
    until_year: int | None = Field(
        default=2013, ge=2003, le=2018, description="images before this year; wilds' own part, null = all of them"
    )
    complete: bool = Field(default=True, description=_COMPLETE_HELP)

    @model_validator(mode="after")
    def _possible(self) -> FMoWStreamConfig:
        reject(_repeated("regions", self.regions, "regions"))  # type: ignore[arg-type]
        return self


class HuggingFaceStreamConfig(Section):
    """Any image data set that the library `datasets` loads, from the Hugging Face hub or from a local folder."""

    name: Literal["huggingface"] = Field(description="an image data set of the Hugging Face hub; needs datasets")
    dataset: str = Field(min_length=1, description="its name on the hub, or a local folder")
    config: str | None = Field(default=None, min_length=1, description="of data sets with several configurations")
    revision: str | None = Field(default=None, min_length=1, description="commit or tag; null = the newest")
    image: str | None = Field(default=None, min_length=1, description="column of the images; null = found by its type")
    label: str | None = Field(default=None, min_length=1, description="column of the labels; null = found by its type")
    train: str = Field(default="train", min_length=1, description="its split to train on")
    test: str | None = Field(
        default=None, min_length=1, description="its split to test on; null = test, validation or drawn"
    )
    validation: str | None = Field(default=None, min_length=1, description="its validation split; null = drawn")
    tasks: Tasks = Field(description=TASKS_HELP)
    class_order: Literal["natural", "seeded"] | list[ClassId | str] = Field(
        default="natural", description=f"{ORDER_HELP}, or of all class names"
    )
    classes: int | None = Field(default=None, ge=1, le=MOST, description=CLASSES_HELP)
    validation_fraction: float = Field(default=0.2, ge=0, lt=1, description="of each class, if drawn; our choice")
    test_fraction: float = Field(default=0.2, ge=0, lt=1, description="of each class, if drawn; our choice")
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the drawn splits; our choice")
    transforms: Transforms = Field(default="backbone", description=TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=AUGMENT_HELP)

    @model_validator(mode="after")
    def _possible(self) -> HuggingFaceStreamConfig:
        listed: Any = sum(self.tasks) if isinstance(self.tasks, list) else None
        problems = order_problems(self.class_order, listed if listed is not None else self.classes)
        problems += fraction_problems(self.validation_fraction, self.test_fraction)
        if self.classes is not None:
            problems += task_problems(self.tasks, self.classes)
        reject(problems)
        return self
