"""``results.json``: what a finished run leaves, how it is read, and how runs are grouped for a table.

The file is written last and atomically: where it is, the run is finished. Everything in it but `cost` is repeated to
the bit by a run that was interrupted and resumed.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.statistics import Interval, mean_interval
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.results_form import FORMAT, check_results, read_json

__all__ = [
    "FIGURES",
    "FORMAT",
    "Group",
    "RunResults",
    "files_below",
    "find_runs",
    "group_runs",
    "read_results",
    "write_json",
    "write_text",
]

FILE = "results.json"
HALF = ".tmp"
"""End of the names of files that are being written; they begin with a dot."""
# columns of every table: tag, heading, factor, digits
FIGURES = (
    ("accuracy/last", "last accuracy %", 100.0, 2),
    ("accuracy/average", "average accuracy %", 100.0, 2),
    ("accuracy/incremental", "incremental accuracy %", 100.0, 2),
    ("forgetting/average", "forgetting %", 100.0, 2),
    ("seconds", "seconds", 1.0, 1),
)


class RunResults(dict[str, Any]):
    """The content of a ``results.json``, and the folder that it lies in (None if it comes from nowhere)."""

    def __init__(self, content: Mapping[str, Any], folder: Path | None = None) -> None:
        super().__init__(content)
        self.folder = folder


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{HALF}")  # two reports may be written at once
    temporary.unlink(missing_ok=True)  # of a killed process with our number, or a stranger's link
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def files_below(folder: Path, name: str) -> list[Path]:
    """Files of a name (or pattern) in or below a folder, sorted.

    Unlike ``Path.rglob`` it isn't stopped by folders that vanish meanwhile, as checkpoints of a run do.
    """
    found = []
    for place, _, files in os.walk(folder):
        found += [Path(place, file) for file in fnmatch.filter(files, name)]
    return sorted(path for path in found if os.path.isfile(path))  # no pipe, no link to nowhere


def write_json(path: Path, value: Any) -> None:
    """Write JSON like :func:`write_text`; NaN is refused (it is no JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_results(folder: Path) -> RunResults | None:
    """The results of a finished run, None where the run isn't finished.

    Raises:
        ConfigError: the file is there and isn't a results file of this format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    return RunResults(check_results(path, read_json(path)), folder)


def find_runs(folders: Iterable[Path]) -> list[RunResults]:
    """Results of all finished runs in or below the folders, each once, in the order of their paths.

    Raises:
        ConfigError: a folder doesn't exist or holds no finished run.
    """
    found: dict[Path, RunResults] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} isn't a folder; give folders of runs or comparisons")
        paths = files_below(folder, FILE)
        if not paths:
            raise ConfigError(f"{folder} holds no finished run (no {FILE} in or below it)")
        for path in paths:
            results = read_results(path.parent)
            if results is not None:
                found.setdefault(path.resolve(), results)
    return list(found.values())


@dataclass(frozen=True)
class Group:
    """All runs of one method with one configuration, by seed."""

    label: str
    runs: tuple[dict[str, Any], ...]

    @property
    def joint(self) -> bool:
        """Trained on all classes at once: an upper bound, not continual."""
        return bool(self.runs[0]["protocol"]["joint"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run["seed"] for run in self.runs]

    @property
    def folders(self) -> list[Path | None]:
        """Folder of each run, where ``metrics.csv`` and ``config.yaml`` lie; None for results made elsewhere."""
        return [getattr(run, "folder", None) for run in self.runs]

    def values(self, tag: str) -> list[float | None]:
        """One value per seed of a figure, or of ``seconds``."""
        return [run["cost"]["seconds"] if tag == "seconds" else run["figures"].get(tag) for run in self.runs]

    def interval(self, tag: str) -> Interval | None:
        """Mean and 95 % interval over the seeds; None where a run has no such figure.

        Joint training has one step only: no forgetting, and its incremental accuracy would mean something else.
        """
        if self.joint and tag == "accuracy/incremental":
            return None
        values = [value for value in self.values(tag) if value is not None and math.isfinite(value)]
        return mean_interval(values) if len(values) == len(self.runs) else None


def group_runs(runs: Sequence[dict[str, Any]]) -> list[Group]:
    """Runs by method and configuration, best last accuracy first, joint training at the top.

    Runs whose configurations differ in more than the seed are never averaged; where such groups share a label, the
    recipe's name (and, if that is the same too, the beginning of the configuration's digest) is put behind it.

    Raises:
        ConfigError: the same configuration and seed twice.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["group_digest"], []).append(run)
    labels: list[tuple[str, str, str]] = [(m[0]["method"], m[0]["recipe"], digest) for digest, m in groups.items()]
    done = []
    for (method, recipe, digest), members in zip(labels, groups.values(), strict=True):
        seeds = [run["seed"] for run in members]
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            raise ConfigError(f"seeds {repeated} of {method} are given twice, with the same configuration")
        same = [other for other in labels if other[0] == method]
        label = method
        if len(same) > 1:
            label += f" [{recipe}]" if len({r for _, r, _ in same}) == len(same) else f" [{recipe} {digest[:6]}]"
        done.append(Group(label, tuple(sorted(members, key=lambda run: run["seed"]))))

    def rank(group: Group) -> tuple[bool, float]:
        interval = group.interval("accuracy/last")
        return (not group.joint, -(interval.mean if interval else -math.inf))

    return sorted(done, key=rank)
