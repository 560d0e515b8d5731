"""What a comparison tells while it goes on: lines for people, or JSON lines for scripts, from the same facts.

Every event is a name and plain facts; both narrators get the same ones, so what is printed and what a script reads
can't differ. Events and their facts (all of them also have `event`):

=====================  ================================================================================================
start                  name, folder, runs, methods, seeds, kept (runs that were finished before), seconds_left, resume
run_started            number, runs, method, strategy, seed, folder, resumed, seconds_left
experience             method, strategy, seed, folder, task (from 1), tasks, classes, figures, seconds, seconds_left
pretrained             of a transfer experiment: method, strategy, seed, folder, figures, seconds
transferred            of a transfer experiment: the same and optimizer
run_finished           number, runs, method, strategy, seed, folder, figures, seconds, seconds_left, to_come (runs)
run_failed             of runs at the same time, whose others go on: method, strategy, seed, folder, error
note                   text
interrupted, failed    folder, finished, left (lists of method, seed), runs, seconds_left, resume, report; failed: error
comparison_finished    folder, trained, kept, methods, report, dashboard
commands               of ``--print-commands``: folder, commands (lists of method, seed, folder, command), report
report                 of ``firn report``: methods, unfinished, report
error                  of a wrong configuration or usage: message, problems (path, reason, accepted, hint)
=====================  ================================================================================================

`figures` map a tag to a number, shares from 0 to 1; in `methods` to ``{mean, lower, upper, std, n, values}`` over the
seeds. Times are in seconds. What isn't defined or isn't finite is null. `resume` is the command that goes on.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.escapes import visible
from avalanche_firn.experiments.time_left import about, span

__all__ = [
    "JsonNarrator",
    "Narrator",
    "TextNarrator",
    "error_facts",
    "figures_over_seeds",
    "firn_command",
    "plain",
    "report_files",
    "resume_command",
    "stopped_text",
]

_ENDS = ("interrupted", "failed")


class Narrator(Protocol):
    """Takes events. `quiet`: neither bars nor anything else may be written but what it writes itself."""

    quiet: bool
    ended: bool
    """Whether it was told that the comparison was interrupted or failed."""

    def tell(self, event: str, **facts: Any) -> None:
        """Something has happened."""
        ...


def plain(value: Any) -> Any:
    """Values for JSON: paths as text, tuples and sets as lists, numbers of other libraries as Python's, NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(inner) for inner in value)
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def firn_command() -> str:
    """How this process was called, as a shell takes it: ``firn``, or ``torchrun`` with the module."""
    processes, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes == "1":
        return "firn"
    launch = f"torchrun --nproc-per-node={here}" + (" ..." if here != processes else "")  # ...: of several machines
    return f"{launch} -m avalanche_firn.experiments.cli"


def resume_command(folder: Path, settings: Sequence[str] = ()) -> str:
    """The command that goes on in a folder, as a shell takes it; `settings`: ``key=value`` that it goes on with."""
    return " ".join([f"{firn_command()} resume", *(shlex.quote(word) for word in (str(folder), *settings))])


def report_files(folder: Path | None) -> dict[str, Path | None] | None:
    """Where the parts of a report lie; None without a report."""
    if folder is None:
        return None
    files = {"html": folder / "report.html", "markdown": folder / "report.md", "csv": folder / "results.csv"}
    return {name: path if path.is_file() else None for name, path in files.items()} | {"folder": folder}


def figures_over_seeds(group: Any, tags: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Tag -> mean, interval and the value of every seed, of a group of runs (stream or transfer)."""
    found = {}
    for tag in tags:
        interval = group.interval(tag)
        shown = {"mean": None, "lower": None, "upper": None, "std": None, "n": 0}
        found[tag] = (shown if interval is None else interval.to_dict()) | {"values": group.values(tag)}
    return found


def error_facts(error: ConfigError | Exception) -> dict[str, Any]:
    """Facts of the event `error`."""
    problems = error.problems if isinstance(error, ConfigError) else ()
    listed = [{"path": p.path, "reason": p.reason, "accepted": p.accepted, "hint": p.hint} for p in problems]
    return {"message": str(error), "problems": listed}


class JsonNarrator:
    """One JSON object per line and event.

    Args:
        write: takes a line without its end; it should reach the reader at once.
    """

    quiet = True

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.ended = False

    def tell(self, event: str, **facts: Any) -> None:
        """Write the event."""
        self.ended |= event in _ENDS
        self._write(json.dumps({"event": event} | plain(facts), allow_nan=False))


class TextNarrator:
    """Lines for people: one per run and experience; none of them with `quiet`, but always how to go on.

    Args:
        say: takes the lines.
        quiet: neither bars nor lines of progress.
        stopped: takes how to go on after an interruption; default `say`.
    """

    def __init__(
        self, say: Callable[[str], None] = print, *, quiet: bool = False, stopped: Callable[[str], None] | None = None
    ) -> None:
        self.say, self.quiet = say, quiet
        self._stopped = say if stopped is None else stopped
        self.ended = False

    def tell(self, event: str, **facts: Any) -> None:
        """Say the line of the event, if it has one."""
        if event in _ENDS:
            self.ended = True
            self._stopped(visible(stopped_text(event, facts)))
        elif event == "note":
            self.say(visible(str(facts["text"])))
        elif not self.quiet and (line := _LINES.get(event)) is not None and (text := line(facts)):
            self.say(visible(text))


# ------------------------------------------------------------------------ lines
def _percent(figures: Mapping[str, Any], *names: tuple[str, str]) -> str:
    shown = ((name, figures.get(tag)) for tag, name in names)
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in shown if value is not None)


def _run_started(facts: Mapping[str, Any]) -> str:
    resumed = " goes on" if facts["resumed"] else ""
    return f"[{facts['number']}/{facts['runs']}] {facts['method']} seed {facts['seed']}{resumed}"


def _experience(facts: Mapping[str, Any]) -> str:
    classes = sorted(facts["classes"])
    listed = f"classes {' '.join(map(str, classes))}" if len(classes) <= 10 else f"{len(classes)} classes"
    head = f"{facts['method']} seed {facts['seed']} task {facts['task']}/{facts['tasks']} ({listed})"
    accuracies = _percent(facts["figures"], ("accuracy/last", "last"), ("accuracy/average", "average"))
    return f"{head}: accuracy {accuracies}; {facts['seconds']:.1f} s"


def _pretrained(facts: Mapping[str, Any]) -> str:
    accuracy = f"{100 * facts['figures']['pretraining/accuracy']:.2f}"
    text = f"{accuracy} % of held-out images of the pre-training classes"
    return f"{facts['method']} seed {facts['seed']}: {text}; {facts['seconds']:.1f} s"


def _transferred(facts: Mapping[str, Any]) -> str:
    shown = _percent(facts["figures"], ("continual/accuracy", "continual"), ("iid/accuracy", "iid"))
    head = f"{facts['method']} seed {facts['seed']}, {facts['optimizer']}"
    return f"{head}: transfer accuracy {shown}; {facts['seconds']:.1f} s"


def _run_finished(facts: Mapping[str, Any]) -> str:
    if facts["runs"] == 1:
        return ""
    accuracy = _percent(facts["figures"], ("accuracy/last", "last accuracy"))
    left = about(facts["seconds_left"]) if facts["to_come"] else ""
    head = f"[{facts['number']}/{facts['runs']}] {facts['method']} seed {facts['seed']} finished"
    parts = [accuracy, f"{facts['seconds']:.1f} s"]
    return f"{head}: {', '.join(part for part in parts if part)}" + (f"; {left}" if left else "")


def _run_failed(facts: Mapping[str, Any]) -> str:
    return f"{facts['method']} seed {facts['seed']} failed, the others go on: {facts['error']}"


_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "run_started": _run_started,
    "experience": _experience,
    "pretrained": _pretrained,
    "transferred": _transferred,
    "run_finished": _run_finished,
    "run_failed": _run_failed,
}


def _by_method(runs: Sequence[Mapping[str, Any]]) -> str:
    """``naive 0, 1; slca 0``: seeds of every method."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run["method"], []).append(str(run["seed"]))
    return "; ".join(f"{method} {', '.join(numbers)}" for method, numbers in seeds.items())


def stopped_text(event: str, facts: Mapping[str, Any]) -> str:
    """How to go on, what is finished, and what is left and for how long."""
    cause = "interrupted" if event == "interrupted" else "a run failed; after fixing the cause"
    lines = [f"{cause}{';' if event == 'interrupted' else ''} go on with: {facts['resume']}"]
    finished, left = facts.get("finished", ()), facts.get("left", ())
    if len(finished) + len(left) > 1:
        lines.append(f"finished: {len(finished)} of {facts['runs']} runs" + _in_brackets(finished))
        seconds = facts.get("seconds_left")
        time = "" if seconds is None else f", {span(seconds)}"
        lines.append(f"left: {len(left)}{_in_brackets(left)}{time}")
    if facts.get("report") is not None:
        lines.append(f"report of what is finished: {facts['report']}")
    return "\n".join(lines)


def _in_brackets(runs: Sequence[Mapping[str, Any]]) -> str:
    return f" (seeds of {_by_method(runs)})" if runs else ""
