"""The sections of a configuration about linear probes, adaptation and drift. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.schema_rules import repeated
from avalanche_firn.experiments.section_base import Section

__all__ = ["DriftConfig", "LinearProbeStageConfig", "ProbeConfig"]

Rate = Annotated[float, Field(gt=0)]
Penalty = Annotated[float, Field(ge=0)]


class LinearProbeStageConfig(Section):
    """The linear probe before fine-tuning; LinearProbePlugin explains every option."""

    solver: Literal["lbfgs", "ridge", "sgd"] = Field(
        default="lbfgs", description="logistic regression as in the LP-FT code, closed form, or mini-batches"
    )
    l2: Penalty | Annotated[list[Penalty], Field(min_length=1)] | None = Field(
        default=None, description="penalty; null = 1 / samples; a list is chosen from on held-out training data; open"
    )
    lp_features: Literal["eval", "train", "new_bn_stats", "refresh"] = Field(
        default="eval", description="BatchNorm while features are extracted; the LP-FT code's default"
    )
    lp_views: Annotated[int, Field(ge=0)] | Literal["fresh"] = Field(
        default=0, description="0 = evaluation transform, m = random training views, fresh = new ones per epoch of sgd"
    )
    lp_scope: Literal["current", "all"] = Field(
        default="current", description="rows written: of the task's classes, or all (absent ones zero)"
    )
    head_init: Literal["keep", "reset", "zero"] = Field(
        default="keep", description="the classifier when a task begins; open in the paper, our choice"
    )
    lp_first: bool = Field(default=False, description="probe the first task too; open in the paper, our choice")
    ft_bn: Literal["auto", "train", "eval"] = Field(
        default="auto", description="backbone while fine-tuning; auto = eval after a probe, as in the LP-FT code"
    )
    reset_momentum: bool = Field(default=True, description="false carries the optimizer over all tasks; our choice")
    normalize: Literal["none", "scalar"] = Field(default="none", description="scalar = as in the LP-FT code")
    rescale_head: bool | Literal["temperature"] = Field(
        default=False, description="true = to the spread of the rows replaced, temperature = to the labels"
    )
    backbone: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="patterns of the backbone parameters that are fine-tuned; null = all"
    )
    val_fraction: float = Field(default=0.2, gt=0, lt=1, description="held out to choose l2 from a list; our choice")
    max_iter: int = Field(default=500, ge=1, description="of lbfgs; our choice")
    epochs: int = Field(default=20, ge=1, description="of sgd; our choice")
    lr: Rate | None = Field(default=None, description="of sgd; null = a rate that is stable for the features")
    batch_size: int = Field(default=128, ge=1, description="of sgd; our choice")

    @model_validator(mode="after")
    def _consistent(self) -> LinearProbeStageConfig:
        problems: list[tuple[str, str, str]] = []
        if self.lp_views == "fresh" and self.solver != "sgd":
            problems.append(("lp_views", f"fresh with solver {self.solver}", "a number of views, or solver: sgd"))
        if self.rescale_head is True and self.head_init == "zero":
            problems.append(("rescale_head", "true with head_init zero, whose rows have no spread", "false"))
        reject(problems)
        return self


class ProbeConfig(Section):
    """How the representation is judged: accuracy on every task after adapting to data of it."""

    adapt: list[Literal["knn", "linear", "fine_tune", "lp_ft"]] = Field(
        default=["knn", "linear"], min_length=1, description="adaptations, each with its own task matrix"
    )
    shots: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="adaptation images per class, a fraction below 1.0, or null = all"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of subsets and adaptation, not of the training")
    when: Literal["experience", "diagonal", "end"] = Field(
        default="experience", description="after every task; or the new task, and all at the end; or only at the end"
    )
    tasks: Literal["all", "seen"] = Field(default="seen", description="all = also tasks to come (forward transfer)")
    task_aware: bool = Field(default=True, description="classes compete within their task; the UCL code")
    k: int = Field(default=200, ge=1, description="neighbours; the UCL code")
    temperature: Rate = Field(default=0.1, description="of the weights of neighbours; the UCL code")
    solver: Literal["lbfgs", "ridge"] = Field(default="lbfgs", description="of the linear probe")
    l2: Penalty | Annotated[list[Penalty], Field(min_length=1)] | None = Field(
        default=None, description="of the linear probe; null = 1 / samples; a list is chosen from on held-out data"
    )
    lr: Rate | Annotated[list[Rate], Field(min_length=1)] = Field(
        default=[0.001, 0.01, 0.1], description="of fine-tuning, chosen from on held-out adaptation data; our choice"
    )
    epochs: int = Field(default=20, ge=0, description="of fine-tuning; open in the paper, our choice")
    batch_size: int = Field(default=32, ge=1, description="of fine-tuning; open in the paper, our choice")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of fine-tuning; our choice")
    weight_decay: float = Field(default=0.0, ge=0, description="of fine-tuning; our choice")
    val_fraction: float = Field(default=0.2, gt=0, lt=1, description="held out to choose lr and l2; our choice")

    @model_validator(mode="after")
    def _consistent(self) -> ProbeConfig:
        problems: list[tuple[str, str, str]] = []
        if twice := repeated(self.adapt):
            problems.append(("adapt", f"{twice} are repeated", "every adaptation once"))
        if not self.task_aware and self.tasks == "all":
            problems.append(("tasks", "all together with task_aware: false", "seen"))
        reject(problems)
        return self


class DriftConfig(Section):
    """How far the representation moves: similarity of features of fixed images, distance of the weights."""

    num_images: int = Field(default=256, ge=2, description="fixed training images of all tasks; our choice")
    blocks: Literal["all"] | list[str] | None = Field(default=None, description="also per block of the backbone")
    weights: bool = Field(default=True, description="distance of the weights; holds two copies of them")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the choice of images")
