"""Runs that have begun and aren't finished: what they have shown so far, read while they may still be written.

A run is unfinished where its ``config.yaml`` and ``environment.json`` lie and its ``results.json``, written last, does
not. Whether a process is at work on it can't be told from its files, so that isn't claimed: `updated` says when
something was last written. Nothing is locked or changed. Costs one look at the folders and one pass over the
``metrics.csv`` of each unfinished run, and nothing for finished ones.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_experiment, parse, read_recipe
from avalanche_firn.experiments.results import FILE, files_below
from avalanche_firn.experiments.stream_sections import DomainFolderStreamConfig
from avalanche_firn.experiments.task_plan import plan_tasks

__all__ = ["UnfinishedRun", "find_unfinished"]

STATE = "running or interrupted"
_OVER_TASKS = (
    "accuracy/", "forgetting/", "transfer/", "task-il/", "probe/", "drift/", "lorac/", "cila/", "slca/",
    "dynamics/interference", "dynamics/learning", "dynamics/synergy",
    "efficiency/seconds", "efficiency/peak-memory-MiB", "efficiency/trainable-parameters",
)  # fmt: skip
_FROM_ONE = "lorac/task-inference"  # written over the number of tasks, which is the index plus one
_STEP = re.compile(r"[0-9]{1,15}")
_TASKS = 100_000  # more than any stream has: a step beyond is a damaged line
_VALIDATION = "validation/"  # before the tags of a run on the validation split, and not in its results.json


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without results.

    Attributes:
        label: name of the method. strategy: its kind. seed: of the run.
        folder: of the run.
        group_digest: as in ``results.json``; "" where this version can't read the configuration.
        tasks_done: experiences that were trained and evaluated. tasks_total: None where only the data say.
        curves: tag -> values over the experience index, None where there is none; tags as in ``results.json``.
        updated: when a file of the run last changed, seconds since 1970.
        state: for a table.
    """

    label: str
    strategy: str
    seed: int
    folder: Path
    group_digest: str
    tasks_done: int
    tasks_total: int | None
    curves: dict[str, list[float | None]] = field(default_factory=dict, hash=False)
    updated: float = 0.0
    state: str = STATE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `label` is called `method` as in other events."""
        facts = {name: value for name, value in vars(self).items() if name != "label"}
        return {"method": self.label} | facts | {"folder": str(self.folder)}


def find_unfinished(folders: Iterable[Path]) -> list[UnfinishedRun]:
    """All unfinished runs in or below the folders, each once, in the order of their paths; none is no error.

    Folders that don't exist, files that are half written and configurations of other versions are no error either:
    this is called while runs go on.
    """
    found: dict[Path, UnfinishedRun] = {}
    for folder in folders:
        for config in files_below(folder, "config.yaml"):
            place = config.parent
            if (place / FILE).is_file() or not (place / "environment.json").is_file():
                continue  # finished, or the folder of a comparison
            run = _read(place)
            if run is not None:
                found.setdefault(place.resolve(), run)
    return list(found.values())


def _read(place: Path) -> UnfinishedRun | None:
    """The run in a folder; None if it is none after all, or has gone since."""
    try:
        label, strategy, seed, digest, total = _identity(place / "config.yaml")
    except (ConfigError, OSError, KeyError, IndexError, TypeError, ValueError):
        return None
    curves, done = _curves(place / "metrics.csv")
    if (place / FILE).is_file():  # finished in the meantime
        return None
    return UnfinishedRun(label, strategy, seed, place, digest, done, total, curves, _updated(place))


def _identity(file: Path) -> tuple[str, str, int, str, int | None]:
    """Label, strategy, seed, digest without the seed, number of experiences."""
    try:
        config = load_experiment(file)
    except ConfigError:  # written by another version: what it is called can be read all the same
        raw: dict[str, Any] = parse(read_recipe(file))
        (method,), (seed,) = raw["methods"], raw["seeds"]
        return str(method.get("name") or method["strategy"]), str(method["strategy"]), int(seed), "", None
    (method,), (seed,) = config.methods, config.seeds
    total = _tasks(config) if isinstance(config, Config) else None
    return method.name, method.strategy, seed, config.digest(seeds=False), total


def _tasks(config: Config) -> int | None:
    """Experiences to train on, as far as the recipe says."""
    if config.methods[0].strategy == "joint":
        return 1
    if isinstance(config.stream, DomainFolderStreamConfig) and config.stream.domain_order is None:
        return None
    try:
        return len(plan_tasks(config.stream).sizes)
    except ConfigError:
        tasks = getattr(config.stream, "tasks", None)
        return tasks if isinstance(tasks, int) else len(tasks) if isinstance(tasks, list) else None


def _rows(file: Path) -> Iterator[tuple[int, str, float]]:
    """Complete lines of a ``metrics.csv`` that may be growing."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    whole = text[: text.rfind("\n") + 1]  # the last line may be half
    try:
        for row in csv.reader(whole.splitlines()[1:]):
            if len(row) == 3 and _STEP.fullmatch(row[0]) and "_" not in row[2]:
                try:
                    yield int(row[0]), row[1], float(row[2])
                except ValueError:
                    continue
    except csv.Error:  # what comes after isn't lines of three values
        return


def _curves(file: Path) -> tuple[dict[str, list[float | None]], int]:
    """Curves over the experience index, and how many experiences are done."""
    points: dict[str, dict[int, float]] = {}
    done = 0
    for step, tag, value in _rows(file):
        tag = tag.removeprefix(_VALIDATION)
        step -= tag == _FROM_ONE
        if 0 <= step < _TASKS and tag.startswith(_OVER_TASKS) and math.isfinite(value):
            points.setdefault(tag, {})[step] = value  # a resumed run may have written a step again
        if tag == "accuracy/last" and step < _TASKS:
            done = max(done, step + 1)
    return {tag: [at.get(k) for k in range(max(at) + 1)] for tag, at in points.items() if max(at) <= done}, done


def _updated(place: Path) -> float:
    """The last change of a file of the run."""
    times = []
    for path in (place, *place.glob("*"), *place.glob("checkpoint/*")):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # replaced at this moment
            continue
    return max(times, default=0.0)
