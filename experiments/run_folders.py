"""Folders of runs: which belong to a comparison, which are finished, and never two configurations in one.

The folder of a run belongs to one configuration. A finished run of the same configuration is kept, an interrupted one
goes on, one of another configuration stops the comparison before anything is trained: results are never mixed, and
nothing is deleted unless the caller says so. One process at a time works on a folder, see :func:`claimed`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.results import FILE, HALF, read_results
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["SUMMARY", "Planned", "claimed", "comparison_folder", "delete_runs", "is_run", "plan_runs", "run_folder"]

SUMMARY = "summary"
LOCK = "lock"
"""In a folder that a process works on, and in one whose process was killed."""
AnyConfig = TypeVar("AnyConfig", Config, TransferExperiment)


def comparison_folder(config: Config | TransferExperiment) -> Path:
    """Folder of a comparison: OUTPUT/NAME."""
    return Path(config.output) / config.name


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Folder of a run inside the folder of its comparison: METHOD/seed-S."""
    return folder / method / f"seed-{seed}"


@dataclass(frozen=True)
class Planned(Generic[AnyConfig]):
    """A run of a comparison.

    Attributes:
        config: what it is. folder: of the run. finished: whether its results are there.
        running: how it goes on, where that differs; see :mod:`~avalanche_firn.experiments.resume_settings`.
    """

    config: AnyConfig
    folder: Path
    finished: bool
    running: AnyConfig | None = None


def is_run(config: Config | TransferExperiment, folder: Path) -> bool:
    """Whether a folder is that of a run: one method, one seed, and a run's own file or name."""
    if len(config.methods) != 1 or len(config.seeds) != 1:
        return False
    own = (folder / "environment.json").is_file() or (folder / FILE).is_file()
    return own or not (folder / config.methods[0].name / f"seed-{config.seeds[0]}").is_dir()


def plan_runs(config: AnyConfig, folder: Path, fresh: bool) -> Iterator[Planned[AnyConfig]]:
    """Every run with its state, seed by seed; ConfigError if a folder belongs to another configuration."""
    foreign: list[str] = []
    other: list[str] = []
    for seed in config.seeds:
        for method in config.methods:
            single = config.single(method.name, seed)
            place = run_folder(folder, method.name, seed)
            used = place.exists() and not (place.is_dir() and all(_before_a_run(path) for path in place.iterdir()))
            if used and not (place / "config.yaml").is_file():
                foreign.append(f"{place} isn't the folder of a run; use another name= or --output")
            difference = _difference(single, place) if used and not fresh and not foreign else None
            if difference is not None:
                advice = "use --fresh to delete it and start over, or another name= or --output"
                other.append(f"{place} {difference}; {advice}")
            finished = used and not fresh and difference is None and read_results(place) is not None
            yield Planned(single, place, finished)
    if conflicts := [*foreign, *other]:
        raise ConfigError(conflicts[0] + (f" ({len(conflicts) - 1} more like this)" if len(conflicts) > 1 else ""))


def _before_a_run(path: Path) -> bool:
    """Whether a file may be there although no run has begun: the lock, and what a killed process had half written."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(HALF))


def _difference(config: Config | TransferExperiment, place: Path) -> str | None:
    """In what the run in a folder differs from the one of `config`; None if it doesn't."""
    try:
        stored = load_experiment(place / "config.yaml")
    except ConfigError:
        return "holds a run whose configuration this version can't read"
    if stored.digest() == config.digest():
        return None
    there, here = _flat(stored.identity()), _flat(config.identity())
    differ = [k for k in sorted(there.keys() | here.keys()) if there.get(k, _ABSENT) != here.get(k, _ABSENT)]
    shown = ", ".join(f"{k} {there.get(k, _ABSENT)} there, {here.get(k, _ABSENT)} here" for k in differ[:3])
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"holds a run of another configuration ({shown}{more})"


_ABSENT = "absent"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}").items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}[{i}]").items()}
    return {prefix.removeprefix("."): value}


def delete_runs(folder: Path, plan: Sequence[Planned[Any]], *, everything: bool) -> None:
    """Delete the planned runs, with `everything` also other runs of the comparison and its summary; nothing else.

    Raises:
        CheckpointError: another process works on one of them; nothing has been deleted then.
        StorageError: a folder can't be deleted.
    """
    from avalanche_firn.plugins.storage_stop import writing  # loads torch: late

    places = {planned.folder for planned in plan}
    if everything:
        places |= set(folder.glob("*/seed-*"))
    made = sorted(place for place in places if (place / "config.yaml").is_file())  # only what a run has made
    with ExitStack() as claims:
        for place in made:
            claims.enter_context(claimed(place))
        if everything:
            shutil.rmtree(folder / SUMMARY, ignore_errors=True)
        for place in made:
            with writing("the deletion of a run", place):
                shutil.rmtree(place)


class _Claim:
    """Who holds a folder."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder of a run or of a comparison for this process; it is made if needed, and gone again if left empty.

    Reading it (reports, dashboards) needs no claim. A process that is killed leaves a file that blocks nobody.

    Raises:
        CheckpointError: another process works on it, or a part of this one; its files are untouched.
        StorageError: the folder or its lock can't be made.
    """
    from avalanche_firn.plugins.folder_lock import lock_directory, unlock_directory  # loads torch: late
    from avalanche_firn.plugins.storage_stop import writing

    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    with writing("the folder of a run", folder):
        folder.mkdir(parents=True, exist_ok=True)
    owner = _Claim()
    lock_directory(folder, owner, None)
    try:
        for path in folder.glob(f".*{HALF}"):  # left by a process that was killed
            path.unlink(missing_ok=True)
        yield
    finally:
        unlock_directory(folder, owner, delete=True)
        for place in absent:
            with suppress(OSError):
                place.rmdir()
