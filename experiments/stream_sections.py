"""The sections of streams from digits, folders and Avalanche's own benchmarks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.schema_rules import repeated
from avalanche_firn.experiments.section_base import Arguments, Section
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
    "DIGITS",
    "AvalancheStreamConfig",
    "DigitsStreamConfig",
    "DomainFolderStreamConfig",
    "FolderStreamConfig",
]

DIGITS = 10  # classes of the digits stream


class DigitsStreamConfig(Section):
    """scikit-learn's handwritten digits: 1,797 real images of 10 classes, part of the package's dependencies."""

    name: Literal["digits"] = Field(description="scikit-learn's handwritten digits")
    tasks: Tasks = Field(default=5, description=TASKS_HELP)
    class_order: ClassOrder = Field(default="natural", description=ORDER_HELP)

    @model_validator(mode="after")
    def _possible(self) -> DigitsStreamConfig:
        reject([*order_problems(self.class_order, DIGITS), *task_problems(self.tasks, DIGITS)])
        return self


class FolderStreamConfig(Section):
    """Any folder with one sub-folder of images per class."""

    name: Literal["folder"] = Field(description="a folder of class folders")
    root: str = Field(min_length=1, description="the folder; relative paths start at the working directory")
    tasks: Tasks = Field(description=TASKS_HELP)
    class_order: Literal["natural", "seeded"] | list[ClassId | str] = Field(
        default="natural", description=f"{ORDER_HELP}, or of all class names"
    )
    classes: int | None = Field(default=None, ge=1, le=MOST, description=CLASSES_HELP)
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class, unless the folder has a validation part; our choice"
    )
    test_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class, unless the folder has a test part; our choice"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the drawn splits; our choice")
    transforms: Transforms = Field(default="backbone", description=TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=AUGMENT_HELP)

    @model_validator(mode="after")
    def _possible(self) -> FolderStreamConfig:
        listed = sum(self.tasks) if isinstance(self.tasks, list) else None
        problems = order_problems(self.class_order, listed if listed is not None else self.classes)
        problems += fraction_problems(self.validation_fraction, self.test_fraction)
        if self.classes is not None:
            problems += task_problems(self.tasks, self.classes)
        reject(problems)
        return self


class DomainFolderStreamConfig(Section):
    """A folder of domains, each with one sub-folder of images per class: the classes come again in every domain."""

    name: Literal["domains"] = Field(description="a folder of domain folders")
    root: str = Field(min_length=1, description="the folder; relative paths start at the working directory")
    domain_order: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, min_length=1, description="domain folders in order of appearance; null = all, sorted as text"
    )
    classes: int | None = Field(default=None, ge=1, le=MOST, description=CLASSES_HELP)
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class of a domain, unless it has a validation part; our choice"
    )
    test_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class of a domain, unless it has a test part; our choice"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the drawn splits; our choice")
    transforms: Transforms = Field(default="backbone", description=TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=AUGMENT_HELP)

    @model_validator(mode="after")
    def _possible(self) -> DomainFolderStreamConfig:
        problems = fraction_problems(self.validation_fraction, self.test_fraction)
        order = self.domain_order or []
        if twice := repeated(order):
            problems.append(("domain_order", f"the domains {twice} are repeated", "every domain once"))
        reject(problems)
        return self


class AvalancheStreamConfig(Section):
    """One of Avalanche's classic benchmarks."""

    name: Literal["avalanche"] = Field(description="a classic benchmark of Avalanche")
    benchmark: str = Field(min_length=1, description="its class name, for example SplitMNIST")
    arguments: Arguments = Field(
        default_factory=dict,
        description="its keyword arguments; without seed or fixed_class_order the run's seed is used; RotatedMNIST "
        "without rotations_list gets angles in [0, 180) degrees from that seed",
    )
    transforms: Transforms | Literal["own"] = Field(
        default="backbone", description=f"{TRANSFORMS_HELP}; own = the benchmark's"
    )
    augment: bool = Field(default=True, description=AUGMENT_HELP)
    validation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="of each class, held out of the training images; 0 = no validation part"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the held-out images; our choice")
    first_experiences: int | None = Field(
        default=None, ge=1, description="the stream ends after this many experiences; null = all of the benchmark's"
    )
