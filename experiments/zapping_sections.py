"""The sections of a configuration about zapping and the dynamics of tasks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import reject
from avalanche_firn.experiments.section_base import Section

__all__ = ["TaskDynamicsConfig", "ZappingConfig"]


class ZappingConfig(Section):
    """Rows of the classifier redrawn while training; ZappingPlugin explains every option."""

    scope: Literal["experience", "new", "all", "random"] = Field(
        default="experience",
        description="whose rows: classes of the task, those of them not seen before, all (past ones too), or a random "
        "part of all; our choice",
    )
    schedule: Literal["experience", "epoch", "iteration", "class_exposure"] = Field(
        default="epoch", description="when; the released i.i.d. pre-training: epochs, all but the first of a task"
    )
    every: int = Field(default=1, ge=1, description="epochs, iterations, tasks or exposures between zaps")
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="of the rows, drawn anew each time; null = all"
    )
    init: Literal["kaiming_normal", "kaiming_normal_joint", "kaiming_uniform", "default", "xavier_normal", "zeros"] = (
        Field(default="kaiming_normal", description="rule for fresh rows; joint = the released code for several rows")
    )
    bias: Literal["keep", "zero", "init"] = Field(default="keep", description="of a redrawn row; the released code")
    optimizer_state: Literal["keep", "drop", "rows", "rows_seeded"] = Field(
        default="keep", description="of redrawn rows; the released code"
    )
    blend: float = Field(
        default=1.0, gt=0, le=1, description="share of the fresh row, 1 = all of it; the released code"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ZappingConfig:
        problems = []
        if self.scope == "random" and self.fraction is None:
            problems.append(("fraction", "null with scope random", "a number above 0, at most 1"))
        if self.scope != "random" and self.fraction is not None:
            problems.append(
                ("fraction", f"{self.fraction} is set, but the scope is {self.scope}", "null, or scope: random")
            )
        reject(problems)
        return self


class TaskDynamicsConfig(Section):
    """Loss of every task on a few of its evaluated images, while all tasks are trained."""

    every: Annotated[int, Field(ge=1)] | Literal["experience"] = Field(
        default=100, description="iterations between probes, or after every task; our choice"
    )
    max_tasks: int = Field(default=25, ge=1, description="probed, spread over the stream; our choice")
    images_per_task: int = Field(default=5, ge=1, description="spread over a task's images; our choice")
