"""The part of a report about task-incremental figures: they use task identity at test time, so they stand apart."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche_firn.evaluation.task_incremental import TASK_PREFIX
from avalanche_firn.experiments.report_parts import Drawn
from avalanche_firn.experiments.results import Group

__all__ = ["task_curves", "task_facts", "task_tables", "task_tags"]

Table = tuple[str, list[str], list[list[str]]]

_TITLE = "With the task given at test time (task-incremental)"
_COLUMNS = (
    ("accuracy/last", "task-il last accuracy %"),
    ("accuracy/average", "task-il average accuracy %"),
    ("forgetting/average", "task-il forgetting %"),
)
_CURVES = (
    ("accuracy/last", "accuracy over all classes seen, task given at test time"),
    ("accuracy/average", "mean accuracy over tasks seen, task given at test time"),
)


def task_tags(groups: Sequence[Group]) -> list[str]:
    """Tags of the task-incremental figures that any run has, such as ``task-il/accuracy/last``, sorted."""
    figures = {tag for group in groups for run in group.runs for tag in run["figures"]}
    return sorted(tag for tag in figures if tag.startswith(TASK_PREFIX))


def task_tables(groups: Sequence[Group]) -> list[Table]:
    """One table, ``mean ± half width`` per method, a dash where a method was run without; empty without any."""
    if not task_tags(groups):
        return []
    rows = []
    for group in groups:
        intervals = [group.interval(f"{TASK_PREFIX}{name}") for name, _ in _COLUMNS]
        rows.append([group.label, *("-" if i is None else i.format(100.0, 2) for i in intervals)])
    return [(_TITLE, ["method", *(head for _, head in _COLUMNS)], rows)]


def task_curves(groups: Sequence[Group]) -> list[Drawn]:
    """What is drawn over the tasks."""
    return [Drawn(f"{TASK_PREFIX}{name}", caption) for name, caption in _CURVES] if task_tags(groups) else []


def task_facts(groups: Sequence[Group]) -> list[str]:
    """The line that says what these figures were told."""
    if not task_tags(groups):
        return []
    return [
        "Task-incremental figures (task-il): the same classifier, arg-max among the classes of the true task; they use "
        "task identity at test time and don't compare with the others."
    ]
