"""What a recipe says about itself: its benchmark, what a run costs, and figures that others report for it.

None of it decides a run's figures, so none of it is part of a run's identity: recipes may learn a new figure, and runs
that were finished before still count. A figure never stands here without where it comes from and how far that can be
trusted. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from avalanche_firn.experiments.errors import Problem, nearest, reject
from avalanche_firn.experiments.schema_rules import LABEL, LABEL_HELP, repeated
from avalanche_firn.experiments.section_base import Section

__all__ = [
    "FIGURES",
    "TASK_GIVEN",
    "TRANSFER_FIGURES",
    "CostConfig",
    "TargetConfig",
    "check_repeated",
    "own_targets",
    "target_problems",
]

TASK_GIVEN = "task-il/"
"""Begins the tags of figures that are measured with the task given at test time."""
_MATRIX = (
    "accuracy/last",
    "accuracy/average",
    "accuracy/incremental",
    "forgetting/average",
    "transfer/backward",
    "transfer/forward",
)
_PROBES = tuple(f"probe/{name}" for name in ("knn", "linear", "fine-tune", "lp-ft"))
FIGURES = (*_MATRIX, *(f"{TASK_GIVEN}{tag}" for tag in _MATRIX), *_PROBES)
"""Tags of the figures of a run on a stream that are shares of 1, the vocabulary of avalanche_firn.evaluation."""
TRANSFER_FIGURES = ("continual/accuracy", "iid/accuracy")
"""Tags of the figures of a transfer; the label of the transfer's optimizer is put before them."""
_TRANSFER_TAG = rf"{LABEL[1:-1]}/({'|'.join(TRANSFER_FIGURES)})"
_FIGURE_HELP = f"one of {', '.join(_MATRIX)}, with {TASK_GIVEN} before it where the task is given; {', '.join(_PROBES)}"
_TRANSFER_HELP = f"OPTIMIZER/{' or OPTIMIZER/'.join(TRANSFER_FIGURES)}"


class CostConfig(Section):
    """What one run needs. A run is one method with one seed."""

    memory_gb: float = Field(
        gt=0, description="10^9 bytes, of the GPU or, on a CPU, of the process; the largest method of the recipe"
    )
    hours_per_run: float = Field(gt=0, description="mean over the runs of the recipe")
    basis: Literal["estimate", "measured"] = Field(description="estimate = by counting operations or images")
    device: str = Field(min_length=1, description="what the hours are of, in words")


class TargetConfig(Section):
    """One figure that others report, in percent."""

    method: str | None = Field(
        default=None,
        pattern=LABEL,
        json_schema_extra={"accepted": f"label of a method of the recipe ({LABEL_HELP['accepted']}), or null"},
        description="whose figure it is; null = of something that the recipe doesn't train, see name",
    )
    name: str | None = Field(default=None, min_length=1, description="with method: null only: what it is the figure of")
    figure: str = Field(
        json_schema_extra={"accepted": f"{_FIGURE_HELP}; of transfers {_TRANSFER_HELP}"},
        description="tag of the figure, as in results.json",
    )
    value: float = Field(ge=-100, le=100, description="percent")
    spread: float | None = Field(default=None, ge=0, description="percent points behind the value's ±; null = none")
    spread_of: str | None = Field(default=None, min_length=1, description="what the spread is taken over, in words")
    standing: Literal["code", "abstract", "secondary", "measured"] = Field(
        description="code = printed in the authors' repository; abstract = in the paper's abstract; secondary = quoted "
        "by others from the paper; measured = made again from what the authors published"
    )
    source: str = Field(min_length=1, description="where it is printed")

    @model_validator(mode="after")
    def _consistent(self) -> TargetConfig:
        problems: list[tuple[str, str, str]] = []
        if self.method is None and self.name is None:
            problems.append(("name", "missing, and method is null", "what the figure is of, or a method of the recipe"))
        if self.method is not None and self.name is not None:
            problems.append(("name", f"{self.name!r} together with method {self.method}", "one of the two"))
        if self.spread is not None and self.spread_of is None:
            problems.append(("spread_of", f"missing, and spread is {self.spread:g}", "what the spread is taken over"))
        if self.spread is None and self.spread_of is not None:
            problems.append(("spread", f"missing, and spread_of is {self.spread_of!r}", "percent points"))
        if self.figure not in FIGURES and not re.fullmatch(_TRANSFER_TAG, self.figure):
            close = nearest(self.figure, FIGURES)
            hint = f" (did you mean {close}?)" if close else ""
            accepted = f"{_FIGURE_HELP}; of transfers {_TRANSFER_HELP}"
            problems.append(("figure", f"{self.figure!r} isn't known{hint}", accepted))
        reject(problems)
        return self

    @property
    def label(self) -> str:
        """The method's label, or the name of what isn't trained."""
        return self.method if self.method is not None else str(self.name)

    def text(self) -> str:
        """``91.53 ± 0.28``, in percent, with as many digits as the recipe gives (both with those of the longer one)."""
        numbers = [self.value] if self.spread is None else [self.value, self.spread]
        digits = max(len(f"{number:g}".partition(".")[2]) for number in numbers)
        return " ± ".join(f"{number:.{digits}f}" for number in numbers)


def check_repeated(targets: Sequence[TargetConfig]) -> list[TargetConfig]:
    """Refuses two figures of the same kind for the same row, inside a validator."""
    rows = [(target.label, target.figure) for target in targets]
    told = ", ".join(f"{figure} of {label}" for label, figure in repeated(rows))
    reject([("", f"{told}: given twice", "every figure of a row once")] if told else [])
    return list(targets)


def own_targets(targets: Iterable[TargetConfig], method: str) -> list[TargetConfig]:
    """The figures of one method (by label): what a run of it carries along."""
    return [target for target in targets if target.method == method]


def target_problems(config: Any) -> list[Problem]:
    """Figures of methods that a recipe doesn't have, or of the other kind of recipe; empty if all is well.

    It is no rule of the schema: ``methods=[a]`` takes a part of a recipe's methods, and what is reported of the others
    stays in the recipe. ``firn check`` asks it, and a test asks it of every shipped recipe.

    Args:
        config: a validated configuration of either kind.
    """
    labels = [method.name for method in config.methods]
    transfer = getattr(config, "transfer", None)
    optimizers = [] if transfer is None else [optimizer.label for optimizer in transfer.optimizers]
    tags = [f"{label}/{figure}" for label in optimizers for figure in TRANSFER_FIGURES] or list(FIGURES)
    problems = []
    for i, target in enumerate(config.targets):
        if target.method is not None and target.method not in labels:
            close = nearest(target.method, labels)
            accepted = f"one of {', '.join(labels)}, or null together with a name"
            hint = f"did you mean {close}?" if close else ""
            problems.append(
                Problem(f"targets[{i}].method", f"{target.method!r} isn't a method of the recipe", accepted, hint)
            )
        if target.figure not in tags:
            reason = f"{target.figure} isn't a figure of this recipe"
            problems.append(Problem(f"targets[{i}].figure", reason, f"one of {', '.join(tags)}"))
    return problems
