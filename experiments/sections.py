"""The sections of a configuration: backbone, stream, training, evaluation, checkpoint.

Every field says what it means and where its default comes from; ``firn recipes keys`` prints them. Sections are
frozen, refuse unknown keys and don't convert types (``"3"`` isn't a number). Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from avalanche_firn.experiments.contrastive_sections import ContrastiveBoundConfig
from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.probe_sections import DriftConfig, ProbeConfig
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
    "ScheduleConfig",
    "Section",
    "StreamConfig",
    "TrainingConfig",
    "TrainingOverride",
]

DIGITS = 10  # classes of the digits stream
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Common rules: unknown keys forbidden, no conversion of types, no infinities, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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


ClassId = Annotated[int, Field(ge=0)]
ClassOrder = Literal["natural", "seeded"] | list[ClassId]
Tasks = Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]]
Transforms = Literal[
    "backbone",
    "slca_cifar",
    "slca_imagenet_r",
    "slca_cub",
    "slca_cars",
    "lorac",
    "ucl_cifar",
    "ucl_tiny",
    "co2l_cifar",
    "co2l_tiny",
    "co2l_digits",
]
_TRANSFORMS_HELP = (
    "backbone = from timm's data configuration of the weights; slca_... = the SLCA code's, 224 pixels; lorac = "
    "the LoRAC-IPC code's, 224 pixels, not normalised; ucl_cifar, ucl_tiny = the UCL code's, 32 and 64 pixels; "
    "co2l_cifar, co2l_tiny, co2l_digits = the Co2L code's, 32, 64 and 28 pixels (one grey channel), without "
    "augmentation, which follows on the device"
)
_AUGMENT_HELP = "with transforms: backbone, random crop, flip and colour jitter while training; timm's ImageNet recipe"
_TASKS_HELP = "number of experiences (the last takes what remains), or the list of their class counts"
_CLASSES_HELP = "number of classes, for check --no-data; null = as many as there are, otherwise compared with the data"
_ORDER_HELP = (
    "natural = ascending; seeded = numpy permutation drawn from the run's seed, as the SLCA code does; "
    "or the list of all class ids"
)


def _order_problems(order: Any, classes: int | None) -> list[tuple[str, str, str]]:
    if not isinstance(order, list):
        return []
    accepted = "natural, seeded, or a list with every class id once"
    problems = []
    repeated = sorted({c for c in order if order.count(c) > 1}, key=str)
    if repeated:
        problems.append(("class_order", f"the class ids {repeated} are repeated", accepted))
    size = classes if classes is not None else len(order)
    if len(order) != size:
        problems.append(("class_order", f"has {len(order)} entries for {size} classes", accepted))
    outside = sorted({c for c in order if isinstance(c, int) and c >= size})
    if outside and len(order) == size:
        problems.append(("class_order", f"the class ids {outside} don't exist", f"{accepted}: 0 to {size - 1}"))
    return problems


def _fraction_problems(validation: float, test: float) -> list[tuple[str, str, str]]:
    if validation + test < 1:
        return []
    total = f"together with validation_fraction {validation + test:g}"
    return [("test_fraction", f"{total} leaves nothing to train on", "a sum below 1")]


class DigitsStreamConfig(Section):
    """scikit-learn's handwritten digits: 1,797 real images of 10 classes, part of the package's dependencies."""

    name: Literal["digits"] = Field(description="scikit-learn's handwritten digits")
    tasks: Tasks = Field(default=5, description=_TASKS_HELP)
    class_order: ClassOrder = Field(default="natural", description=_ORDER_HELP)

    @model_validator(mode="after")
    def _possible(self) -> DigitsStreamConfig:
        problems = _order_problems(self.class_order, DIGITS)
        if isinstance(self.tasks, int) and self.tasks > DIGITS:
            problems.append(("tasks", f"{self.tasks} tasks are impossible with {DIGITS} classes", f"1 to {DIGITS}"))
        if isinstance(self.tasks, list) and sum(self.tasks) != DIGITS:
            accepted = f"counts that sum to {DIGITS}"
            problems.append(("tasks", f"{self.tasks} sums to {sum(self.tasks)} classes", accepted))
        reject(problems)
        return self


class FolderStreamConfig(Section):
    """Any folder with one sub-folder of images per class."""

    name: Literal["folder"] = Field(description="a folder of class folders")
    root: str = Field(min_length=1, description="the folder; relative paths start at the working directory")
    tasks: Tasks = Field(description=_TASKS_HELP)
    class_order: Literal["natural", "seeded"] | list[ClassId | str] = Field(
        default="natural", description=f"{_ORDER_HELP}, or of all class names"
    )
    classes: int | None = Field(default=None, ge=1, description=_CLASSES_HELP)
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class, unless the folder has a validation part; our choice"
    )
    test_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class, unless the folder has a test part; our choice"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the drawn splits; our choice")
    transforms: Transforms = Field(default="backbone", description=_TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=_AUGMENT_HELP)

    @model_validator(mode="after")
    def _possible(self) -> FolderStreamConfig:
        listed = sum(self.tasks) if isinstance(self.tasks, list) else None
        problems = _order_problems(self.class_order, listed if listed is not None else self.classes)
        problems += _fraction_problems(self.validation_fraction, self.test_fraction)
        if self.classes is not None and listed is not None and listed != self.classes:
            problems.append(("tasks", f"{self.tasks} sums to {listed} classes", f"counts that sum to {self.classes}"))
        if self.classes is not None and isinstance(self.tasks, int) and self.tasks > self.classes:
            reason = f"{self.tasks} tasks are impossible with {self.classes} classes"
            problems.append(("tasks", reason, f"1 to {self.classes}"))
        reject(problems)
        return self


class DomainFolderStreamConfig(Section):
    """A folder of domains, each with one sub-folder of images per class: the classes come again in every domain."""

    name: Literal["domains"] = Field(description="a folder of domain folders")
    root: str = Field(min_length=1, description="the folder; relative paths start at the working directory")
    domain_order: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, min_length=1, description="domain folders in order of appearance; null = all, sorted as text"
    )
    classes: int | None = Field(default=None, ge=1, description=_CLASSES_HELP)
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class of a domain, unless it has a validation part; our choice"
    )
    test_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="of each class of a domain, unless it has a test part; our choice"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the drawn splits; our choice")
    transforms: Transforms = Field(default="backbone", description=_TRANSFORMS_HELP)
    augment: bool = Field(default=True, description=_AUGMENT_HELP)

    @model_validator(mode="after")
    def _possible(self) -> DomainFolderStreamConfig:
        problems = _fraction_problems(self.validation_fraction, self.test_fraction)
        order = self.domain_order or []
        repeated = sorted({d for d in order if order.count(d) > 1})
        if repeated:
            problems.append(("domain_order", f"the domains {repeated} are repeated", "every domain once"))
        reject(problems)
        return self


class AvalancheStreamConfig(Section):
    """One of Avalanche's classic benchmarks."""

    name: Literal["avalanche"] = Field(description="a classic benchmark of Avalanche")
    benchmark: str = Field(min_length=1, description="its class name, for example SplitMNIST")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="its keyword arguments; without seed or fixed_class_order the run's seed is used; RotatedMNIST "
        "without rotations_list gets angles in [0, 180) degrees from that seed",
    )
    transforms: Transforms | Literal["own"] = Field(
        default="backbone", description=f"{_TRANSFORMS_HELP}; own = the benchmark's"
    )
    augment: bool = Field(default=True, description=_AUGMENT_HELP)
    validation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="of each class, held out of the training images; 0 = no validation part"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the held-out images; our choice")
    first_experiences: int | None = Field(
        default=None, ge=1, description="the stream ends after this many experiences; null = all of the benchmark's"
    )


StreamConfig = Annotated[
    DigitsStreamConfig | FolderStreamConfig | AvalancheStreamConfig | DomainFolderStreamConfig,
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
    batch_size: int = Field(default=128, ge=1, description="images per step; exps/slca_cifar.json")
    eval_batch_size: int = Field(default=256, ge=1, description="images per evaluation step; changes no figure")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="rebuilt in every experience")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="rebuilt in every experience")
    num_workers: int = Field(default=0, ge=0, description="loader processes; 0 loads in the main process")

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
    batch_size: int | None = Field(default=None, ge=1, description="null = as in training")
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
