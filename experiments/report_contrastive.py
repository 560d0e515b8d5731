"""The part of a report about contrastive methods: losses and coefficient of every task, the bounds and their worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avalanche_firn.evaluation.contrastive_report import BOUNDS
from avalanche_firn.experiments.report_parts import Drawn
from avalanche_firn.experiments.report_text import over_tasks
from avalanche_firn.experiments.results import Group

__all__ = ["contrastive_curves_drawn", "contrastive_facts", "contrastive_tables"]

Table = tuple[str, list[str], list[list[str]]]

_COEFFICIENT = "cila/coefficient"
_LOSSES = (
    ("cila/contrastive", "contrastive loss"),
    ("cila/distillation", "distillation loss"),
    ("cila/ratio", "ratio of the tasks before"),
    (_COEFFICIENT, "coefficient"),
    ("cila/floor-active", "floor decided (share of seeds)"),
)
_BOUNDS = (
    ("cila/bound/measured", "held-out loss, mean over tasks seen"),
    ("cila/bound/one-step", "one-step bound"),
    ("cila/bound/chained", "chained bound"),
    ("cila/bound/training-loss", "training-loss bound"),
    ("cila/bound/ceiling", "largest possible loss"),
    ("cila/certificate/lower", "certificate, lower end"),
    ("cila/certificate/loss", "loss with all positives, tasks before"),
    ("cila/certificate/upper", "certificate, upper end"),
)


def _contrastive(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if all(_COEFFICIENT in run["curves"] for run in group.runs)]


def contrastive_tables(groups: Sequence[Group]) -> list[Table]:
    """Per method one table of losses and coefficients, and one of the bounds where they were measured."""
    found: list[Table] = []
    for group in _contrastive(groups):
        for title, rows in (("losses in training and coefficient", _LOSSES), ("bounds on held-out images", _BOUNDS)):
            lines = [[name, *cells] for tag, name in rows if (cells := _cells(group, tag))]
            if lines:
                found.append((f"{group.label}: {title}, mean over seeds", *over_tasks("nats", lines)))
    return found


def _cells(group: Group, tag: str) -> list[str]:
    """Mean over the seeds after every task; a dash where no seed has a value; empty where nothing was measured."""
    rows = [run["curves"].get(tag) for run in group.runs]
    if not all(rows) or len({len(row) for row in rows}) > 1:
        return []
    values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    return ["-" if np.isnan(column).all() else f"{np.nanmean(column):.3g}" for column in values.T]


def contrastive_facts(groups: Sequence[Group]) -> list[str]:
    """In words: where the coefficient never left its floor, and which bounds say nothing."""
    lines = []
    for group in _contrastive(groups):
        floors = [v for run in group.runs for v in run["curves"]["cila/floor-active"] if v is not None]
        if floors and all(floors) and group.runs[0]["strategy"] == "cila":
            lines.append(f"In {group.label} the coefficient never left its floor: it equals Co2L with that weight.")
        useless: dict[str, list[str]] = {}
        for name in BOUNDS:
            tasks = ", ".join(str(i + 1) for i, share in enumerate(_vacuous(group, name)) if share)
            useless.setdefault(tasks, []).append(name.replace("_", "-"))
        for tasks, names in useless.items():
            if tasks:
                bounds = f"the bounds {', '.join(names)} are" if len(names) > 1 else f"the bound {names[0]} is"
                text = "the largest loss that is possible at all is no larger"
                lines.append(f"In {group.label} {bounds} vacuous after task {tasks}: {text}.")
    return lines


def _vacuous(group: Group, name: str) -> list[bool]:
    """Per task, whether the bound is vacuous in any seed."""
    runs = [run.get("contrastive_bound") for run in group.runs]
    if not all(runs):
        return []
    flags = [[name in task["vacuous"] for task in run["tasks"]] for run in runs if run is not None]
    return [any(column) for column in zip(*flags, strict=True)] if len({len(row) for row in flags}) == 1 else []


def contrastive_curves_drawn(groups: Sequence[Group]) -> list[Drawn]:
    """What is drawn over the tasks."""
    chosen = _contrastive(groups)
    drawn = [Drawn(_COEFFICIENT, "weight of the distillation", "weight", False)] if chosen else []
    if any(_cells(group, "cila/bound/measured") for group in chosen):
        caption = "held-out contrastive loss, mean over tasks seen"
        drawn.append(Drawn("cila/bound/measured", caption, "loss (nats)", False))
    return drawn
