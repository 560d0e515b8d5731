"""All methods of a configuration with all seeds, one after the other; what is finished already is kept.

The folder of a run belongs to one configuration. A finished run of the same configuration is kept, an interrupted one
goes on, one of another configuration stops the comparison before anything is trained: results are never mixed, and
nothing is deleted unless `fresh` says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, load_recipe
from avalanche_firn.experiments.report import facts, text_table, write_report
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.results import FILE, Group, group_runs, read_results, write_text
from avalanche_firn.experiments.runner import run

__all__ = ["Comparison", "compare", "comparison_folder", "resume", "run_folder"]

_SUMMARY = "summary"


def comparison_folder(config: Config) -> Path:
    """Folder of a comparison: OUTPUT/NAME."""
    return Path(config.output) / config.name


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Folder of a run inside the folder of its comparison: METHOD/seed-S."""
    return folder / method / f"seed-{seed}"


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave. `trained`: runs that were trained or finished now; the others were there already."""

    folder: Path
    groups: tuple[Group, ...]
    trained: int
    summary: Path | None

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The results of every run, as in their ``results.json``."""
        return [run for group in self.groups for run in group.runs]

    def __str__(self) -> str:
        kept = len(self.runs) - self.trained
        counts = f"{self.trained} runs trained" + (f", {kept} kept from before" if kept else "")
        lines = [text_table(self.groups), "", *facts(self.groups), f"{counts}; folder {self.folder}"]
        if self.summary is not None:
            lines.append(f"Report: {self.summary / 'report.html'}   Dashboard: tensorboard --logdir {self.folder}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Planned:
    config: Config
    folder: Path
    finished: bool


def compare(
    config: Config,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    summary: bool = True,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Train what is missing, and summarise.

    Args:
        config: methods and seeds.
        folder: of the comparison; default OUTPUT/NAME of the configuration.
        fresh: delete the runs of this comparison that are there already, whatever their configuration.
        quiet: no progress bars, no line per experience.
        summary: write the comparison's own ``config.yaml`` and ``summary/``; off for a single run.
        say: takes the lines of progress.

    Returns:
        Results by method, best last accuracy first.

    Raises:
        ConfigError: something the configuration points to can't be had, or the folder holds runs of another
            configuration; nothing has been written then.
    """
    folder = comparison_folder(config) if folder is None else folder
    plan = list(_plan(config, folder, fresh))
    if not all(planned.finished for planned in plan):
        prepare(config)
    if fresh:
        _delete_runs(folder, plan, everything=summary)
    if summary:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", dump(config))
    runs = []
    for number, planned in enumerate(plan, 1):
        if not planned.finished and not quiet:
            label = f"{planned.config.methods[0].name} seed {planned.config.seeds[0]}"
            say(f"[{number}/{len(plan)}] {label}")
        runs.append(run(planned.config, planned.folder, quiet=quiet, say=say))
    groups = tuple(group_runs(runs))
    target = folder / _SUMMARY if summary else None
    if target is not None:
        write_report(target, groups, title=config.name)
    return Comparison(folder, groups, sum(not planned.finished for planned in plan), target)


def resume(config: Config, folder: Path, *, quiet: bool = False, say: Callable[[str], None] = print) -> Comparison:
    """Go on in a folder whose ``config.yaml`` is `config`: the folder of a comparison or of a single run."""
    if not _is_run(config, folder):
        return compare(config, folder=folder, quiet=quiet, say=say)
    finished = read_results(folder) is not None
    if not finished:
        prepare(config)
    groups = tuple(group_runs([run(config, folder, quiet=quiet, say=say)]))
    return Comparison(folder, groups, 0 if finished else 1, None)


def _is_run(config: Config, folder: Path) -> bool:
    """Whether a folder is that of a run: one method, one seed, and a run's own file or name."""
    if len(config.methods) != 1 or len(config.seeds) != 1:
        return False
    own = (folder / "environment.json").is_file() or (folder / FILE).is_file()
    return own or not (folder / config.methods[0].name / f"seed-{config.seeds[0]}").is_dir()


def _plan(config: Config, folder: Path, fresh: bool) -> Iterator[_Planned]:
    """Every run with its state, seed by seed; ConfigError if a folder belongs to another configuration."""
    foreign, other = [], []
    for seed in config.seeds:
        for method in config.methods:
            single = config.single(method.name, seed)
            place = run_folder(folder, method.name, seed)
            used = place.exists() and not (place.is_dir() and not any(place.iterdir()))
            if used and not (place / "config.yaml").is_file():
                foreign.append(f"{place} isn't the folder of a run; use another name= or --output")
            difference = _difference(single, place) if used and not fresh and not foreign else None
            if difference is not None:
                advice = "use --fresh to delete it and start over, or another name= or --output"
                other.append(f"{place} {difference}; {advice}")
            finished = used and not fresh and difference is None and read_results(place) is not None
            yield _Planned(single, place, finished)
    if conflicts := [*foreign, *other]:
        raise ConfigError(conflicts[0] + (f" ({len(conflicts) - 1} more like this)" if len(conflicts) > 1 else ""))


def _difference(config: Config, place: Path) -> str | None:
    """In what the run in a folder differs from the one of `config`; None if it doesn't."""
    try:
        stored = load_recipe(place / "config.yaml")
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


def _delete_runs(folder: Path, plan: list[_Planned], *, everything: bool) -> None:
    """Delete the planned runs, with `everything` also other runs of the comparison and its summary; nothing else."""
    places = {planned.folder for planned in plan}
    if everything:
        places |= set(folder.glob("*/seed-*"))
        shutil.rmtree(folder / _SUMMARY, ignore_errors=True)
    for place in places:
        if (place / "config.yaml").is_file():  # only what a run has made
            shutil.rmtree(place)
