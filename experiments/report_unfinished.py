"""Runs that aren't finished, in a report: how far they are, when they were last heard of, their curves so far.

They stand apart from the results: no figure of theirs is part of a mean, a ranking or an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avalanche_firn.experiments.report_text import Table, aligned

__all__ = ["unfinished_curves", "unfinished_labels", "unfinished_table", "unfinished_text"]

TITLE = "Unfinished runs"


def unfinished_table(unfinished: Sequence[Any]) -> Table:
    """One row per run.

    Args:
        unfinished: :class:`~avalanche_firn.experiments.unfinished.UnfinishedRun` or whatever has its fields.
    """
    heads = ["method", "seed", "tasks done", "last accuracy so far %", "last change", "state"]
    rows = []
    for run in unfinished:
        total = "?" if run.tasks_total is None else str(run.tasks_total)
        known = [value for value in run.curves.get("accuracy/last", []) if value is not None]
        changed = datetime.fromtimestamp(run.updated).astimezone() if run.updated else None
        last = f"{100 * known[-1]:.2f}" if known else "-"
        rows.append(
            [
                run.label,
                str(run.seed),
                f"{run.tasks_done} of {total}",
                last,
                changed.strftime("%Y-%m-%d %H:%M:%S %z") if changed else "-",
                run.state,
            ]
        )
    return TITLE, heads, rows


def unfinished_text(unfinished: Sequence[Any]) -> str:
    """The table for a terminal, under its title; empty without runs."""
    if not unfinished:
        return ""
    title, heads, rows = unfinished_table(unfinished)
    return f"{title}\n{aligned(heads, rows)}"


def unfinished_labels(unfinished: Sequence[Any]) -> list[tuple[Any, str]]:
    """Every run with the label of its curve; one curve is of one configuration, whatever the seed."""
    digests: dict[str, set[str]] = {}
    for run in unfinished:
        digests.setdefault(run.label, set()).add(run.group_digest)
    found = []
    for run in unfinished:
        which = f" [{run.group_digest[:6] or 'unknown'}]" if len(digests[run.label]) > 1 else ""
        found.append((run, f"{run.label}{which} (unfinished)"))
    return found


def unfinished_curves(
    unfinished: Sequence[Any], tag: str, without: Sequence[str] = ()
) -> dict[str, NDArray[np.float64]]:
    """Curves so far: ``METHOD (unfinished)`` -> (seeds, tasks), NaN for tasks that a seed hasn't come to.

    Args:
        unfinished: the runs. tag: of the quantity.
        without: labels of methods that are drawn already, from finished runs.
    """
    rows: dict[str, list[list[float]]] = {}
    tasks: dict[str, int] = {}
    for run, label in unfinished_labels(unfinished):
        course = [np.nan if v is None or not math.isfinite(v) else float(v) for v in run.curves.get(tag, [])]
        if run.label not in without and course:
            rows.setdefault(label, []).append(course)
            total = 2 if run.tasks_total is None else run.tasks_total
            tasks[label] = max(tasks.get(label, 1), total, len(course))
    found = {}
    for label, courses in rows.items():
        length = tasks[label]  # one point of many is a point; a curve of one task would be drawn as a level
        found[label] = np.asarray([course + [np.nan] * (length - len(course)) for course in courses])
    return found
