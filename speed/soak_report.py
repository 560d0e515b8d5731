"""What the soak has found, as a page and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from speed.rows import ROOT, Row

__all__ = ["DOCUMENT", "figure", "markdown"]

DOCUMENT = ROOT / "docs" / "soak.md"
PHASES = ("training", "statistics", "alignment", "evaluation", "saving", "other")
_SLOPES = (
    ("documented", "bytes documented as growing"),
    ("tensor_bytes", "bytes behind all tensors"),
    ("heap", "bytes in use of the heap"),
    ("resident", "resident bytes"),
    ("tensors", "tensors"),
    ("objects", "objects of Python's garbage collector"),
    ("pointer_types", "types that ctypes keeps"),
    ("checkpoint", "bytes of a checkpoint on disk"),
    ("events", "bytes of event files"),
    ("table", "bytes of metrics.csv"),
)
_READING = """
*Documented*: classifier rows with the copy that alignment keeps, class statistics, pairs and scalars of tasks with the
tables made of them, computed from the objects themselves. *Bytes in use* holds everything, Python's objects included;
accounted for are the documented bytes, 2 KiB for each tensor that is kept (object, gradient, names, allocator),
12 KiB a task for plain values, and 7 KiB for each type that ctypes keeps. *Resident* bytes are more, since freed
blocks between used ones can't go back to the system.

Not ours, but in every stream:

* NumPy's `ctypeslib.as_array`, with which safetensors writes a tensor, leaves a type in the cache of ctypes for every
  length in bytes that was ever saved. Histories of metrics have a new length in each checkpoint.
* Avalanche's `update_optimizer` compares every parameter with every parameter of the optimizer, twice a task: with a
  pair of parameters per matrix and task its time grows with the square of the tasks (part of *other* for LoRAC-IPC).
* Avalanche's `evaluator.last_metric_results` has an entry for every tag, and experiences have tags of their own.
  `collect_all=False`, as runs have it, is what keeps it from holding all values ever logged too.
"""


def _cases(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(case, list(group)) for case, group in groupby(found, key=lambda row: row.case)]


def _amount(name: str, value: float) -> str:
    if name in ("tensors", "objects", "pointer_types"):
        return f"{value:.1f}"
    return f"{value / 1024:.1f} KiB"


def markdown(found: Sequence[Row]) -> str:
    """The page."""
    first = found[0]
    where = f"{first.device}, {first.threads} threads, torch {first.torch}, Python {first.python}, {first.date[:10]}"
    lines = [
        "# A long stream",
        "",
        f"Written by `python -m speed soak` ({where}).",
        "What is measured how: `speed/soak.py`.",
    ]
    for case, rows in _cases(found):
        slopes = next(row.details for row in rows if "documented_per_task" in row.details)
        lines += ["", f"## {case}", "", "| grows per task | by |", "|---|---|"]
        for name, words in _SLOPES:
            value = slopes.get(f"{name}_per_task")
            lines.append(f"| {words} | {'not known here' if value is None else _amount(name, value)} |")
        lines += ["", "| | first | last | ratio | to | bound |", "|---|---|---|---|---|---|"]
        for row in rows:
            bound = "" if row.bound is None else f"{row.bound:.3g}, {'met' if row.met else '**not met**'}"
            ends = [row.details.get(f"{end}_seconds") for end in ("first", "last")]
            shown = ["" if value is None else f"{1000 * value:.3g} ms" for value in ends]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            lines.append(f"| {row.contestant} | {shown[0]} | {shown[1]} | {ratio} | {row.to_what} | {bound} |")
    return "\n".join(lines) + "\n" + _READING


def figure(found: Sequence[Row], path: Path) -> None:
    """Per method memory over the tasks, in MiB above the first point, and seconds of the phases of a task."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cases = [(case, rows[0].details["series"]) for case, rows in _cases(found)]
    picture = Figure(figsize=(10, 4 * len(cases)), layout="constrained")
    axes: Any = picture.subplots(len(cases), 2, squeeze=False)
    for (memory, times), (case, series) in zip(axes, cases, strict=True):
        method, tasks = case.split(",")[0], series["task"]
        for name in ("resident", "heap", "documented"):
            values = series[name]
            if None not in values:
                memory.plot(tasks, [(value - values[0]) / 2**20 for value in values], label=name, linewidth=1)
        for phase in PHASES:
            seconds = [1000 * row.get(phase, 0.0) for row in series["seconds"]]
            times.plot(tasks, seconds, label=phase, linewidth=1)
        memory.set(title=method, xlabel="tasks", ylabel="MiB more than after the first task")
        times.set(title=method, xlabel="tasks", ylabel="ms of the processor a task", yscale="log")
        for panel in (memory, times):
            panel.grid(True, linewidth=0.3)
            panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    # text as text, no date and no random ids: a small file, the same for the same figures
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "firn"}):
        picture.savefig(path, metadata={"Date": None})
