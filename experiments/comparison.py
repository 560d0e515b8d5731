"""All methods of a configuration with all seeds, one after the other; what is finished already is kept.

The folder of a run belongs to one configuration. A finished run of the same configuration is kept, an interrupted one
goes on, one of another configuration stops the comparison before anything is trained: results are never mixed, and
nothing is deleted unless `fresh` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.recipe import dump
from avalanche_firn.experiments.report import facts, text_table, write_report
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.results import Group, group_runs, read_results, write_text
from avalanche_firn.experiments.run_folders import (
    SUMMARY,
    comparison_folder,
    delete_runs,
    is_run,
    plan_runs,
    run_folder,
)
from avalanche_firn.experiments.runner import run

__all__ = ["Comparison", "compare", "comparison_folder", "resume", "run_folder"]


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
    plan = list(plan_runs(config, folder, fresh))
    if not all(planned.finished for planned in plan):
        prepare(config)
    if fresh:
        delete_runs(folder, plan, everything=summary)
    if summary:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", dump(config))
    runs, images = [], dict[str, Any]()
    for number, planned in enumerate(plan, 1):
        if not planned.finished and not quiet:
            label = f"{planned.config.methods[0].name} seed {planned.config.seeds[0]}"
            say(f"[{number}/{len(plan)}] {label}")
        runs.append(run(planned.config, planned.folder, quiet=quiet, say=say, images=images))
    groups = tuple(group_runs(runs))
    target = folder / SUMMARY if summary else None
    if target is not None:
        write_report(target, groups, title=config.name)
    return Comparison(folder, groups, sum(not planned.finished for planned in plan), target)


def resume(config: Config, folder: Path, *, quiet: bool = False, say: Callable[[str], None] = print) -> Comparison:
    """Go on in a folder whose ``config.yaml`` is `config`: the folder of a comparison or of a single run."""
    if not is_run(config, folder):
        return compare(config, folder=folder, quiet=quiet, say=say)
    finished = read_results(folder) is not None
    if not finished:
        prepare(config)
    groups = tuple(group_runs([run(config, folder, quiet=quiet, say=say)]))
    return Comparison(folder, groups, 0 if finished else 1, None)
