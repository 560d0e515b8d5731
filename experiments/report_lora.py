"""The part of a report about LoRAC-IPC: frozen matrices, overlap of the tasks' pairs, inferred tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avalanche_firn.experiments.report_parts import Drawn
from avalanche_firn.experiments.report_text import over_tasks
from avalanche_firn.experiments.results import Group

__all__ = ["lora_curves_drawn", "lora_facts", "lora_tables"]

_ROWS = (
    ("lorac/frozen", "frozen matrices", 1.0),
    ("lorac/overlap/largest", "largest |A_i' A_j| between tasks", 1.0),
    ("lorac/overlap/cosine", "the same, columns of length 1", 1.0),
    ("lorac/overlap/mean-cosine", "mean of these", 1.0),
    ("lorac/task-inference", "samples sent to their own task, %", 100.0),
)
_INFERENCE = "lorac/task-inference"


def lora_tables(groups: Sequence[Group]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Per method one table over the tasks."""
    found = []
    for group in groups:
        rows = []
        for tag, name, scale in _ROWS:
            curves = [run["curves"].get(tag) for run in group.runs]
            if all(curves) and len({len(curve) for curve in curves}) == 1:
                values = scale * np.array([[np.nan if v is None else v for v in c] for c in curves], dtype=float)
                rows.append([name, *("-" if np.isnan(v).all() else f"{np.nanmean(v):.3g}" for v in values.T)])
        if rows:
            found.append((f"{group.label}: low-rank pairs, mean over seeds", *over_tasks("", rows)))
    return found


def lora_facts(groups: Sequence[Group]) -> list[str]:
    """In words: which methods infer the task, and which of them let test batches vote."""
    inferring = [g.label for g in groups if any(run["protocol"].get("task_inference") for run in g.runs)]
    voting = [g.label for g in groups if any(run["protocol"].get("batchwise_vote") for run in g.runs)]
    gated = [g.label for g in groups if any(run["protocol"].get("official_k_gate") for run in g.runs)]
    lines = []
    if inferring:
        lines.append(f"Tasks are inferred from features at test time in: {', '.join(inferring)}.")
    if voting:
        text = "test batches hold one task each, so the vote leaks it"
        lines.append(f"CAUTION: one vote per test batch in: {', '.join(voting)}; {text}.")
    if gated:
        text = "New key components are gated by the queries' mask, a slip of the released code"
        lines.append(f"{text}, in: {', '.join(gated)}.")
    return lines


def lora_curves_drawn(groups: Sequence[Group]) -> list[Drawn]:
    """What is drawn over the tasks."""
    inferring = any(_INFERENCE in run["curves"] for group in groups for run in group.runs)
    return [Drawn(_INFERENCE, "share of samples sent to their own task", "share")] if inferring else []
