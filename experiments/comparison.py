"""All methods of a configuration with all seeds; what is finished already is kept.

The folder of a run belongs to one configuration. A finished run of the same configuration is kept, an interrupted one
goes on, one of another configuration stops the comparison before anything is trained: results are never mixed, and
nothing is deleted unless `fresh` says so. What is told meanwhile, how the time left is estimated and what happens when
a run breaks off: :mod:`~avalanche_firn.experiments.course`. Runs go on one after the other, or at the same time on a
cluster: :mod:`~avalanche_firn.experiments.ray_cluster`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.course import Course
from avalanche_firn.experiments.narration import Narrator, TextNarrator, figures_over_seeds, report_files
from avalanche_firn.experiments.places import RayPlace
from avalanche_firn.experiments.recipe import dump
from avalanche_firn.experiments.report import facts, text_table, write_report
from avalanche_firn.experiments.report_tensorboard import write_dashboard
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.results import Group, group_runs, read_results, write_text
from avalanche_firn.experiments.resume_settings import plan_with_settings
from avalanche_firn.experiments.run_folders import (
    SUMMARY,
    Planned,
    claimed,
    comparison_folder,
    delete_runs,
    is_run,
    plan_runs,
    run_folder,
)
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.runner import run
from avalanche_firn.experiments.together import Crew, TogetherCourse
from avalanche_firn.experiments.unfinished import find_unfinished
from avalanche_firn.models.processes import process_rank
from avalanche_firn.plugins.process_group import first_process_first
from avalanche_firn.plugins.storage_stop import writing

__all__ = ["Comparison", "compare", "comparison_folder", "described", "resume", "run_folder"]


def described(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The final table for scripts: per method its figures over the seeds, shares from 0 to 1."""
    found = []
    for group in groups:
        tags = dict.fromkeys(tag for run in group.runs for tag in run["figures"])
        who = {"method": group.label, "strategy": group.runs[0]["strategy"], "joint": group.joint}
        figures = figures_over_seeds(group, [*tags, "seconds"])
        found.append(who | {"seeds": group.seeds, "folders": group.folders, "figures": figures})
    return found


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
            lines.append(f"Report: {self.summary / 'report.html'}   Dashboard: firn dashboard {self.folder}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The facts of the event ``comparison_finished``, see :mod:`~avalanche_firn.experiments.narration`."""
        return {
            "folder": self.folder,
            "trained": self.trained,
            "kept": len(self.runs) - self.trained,
            "methods": described(self.groups),
            "report": report_files(self.summary),
            "dashboard": None if self.summary is None else f"firn dashboard {shlex.quote(str(self.folder))}",
        }


def compare(
    config: Config,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    summary: bool = True,
    say: Callable[[str], None] = print,
    narrator: Narrator | None = None,
    settings: Sequence[str] = (),
    on: RayPlace | None = None,
) -> Comparison:
    """Train what is missing, and summarise. One process at a time works on the folder of a comparison.

    Args:
        config: methods and seeds.
        folder: of the comparison; default OUTPUT/NAME of the configuration.
        fresh: delete the runs of this comparison that are there already, whatever their configuration.
        quiet: no progress bars, no line per experience.
        summary: write the comparison's own ``config.yaml`` and ``summary/``; off for a single run.
        say: takes the lines of progress.
        narrator: hears what happens, in the place of `quiet` and `say`.
        settings: ``key=value`` that runs which aren't finished go on with, see
            :mod:`~avalanche_firn.experiments.resume_settings`.
        on: a Ray cluster, whose machines all see `folder`; None: this process, one run after the other. The results
            are the same.

    Returns:
        Results by method, best last accuracy first.

    Raises:
        ConfigError: something the configuration points to can't be had, or the folder holds runs of another
            configuration; nothing has been written then.
        CheckpointError: another process works on the folder; none of its files were touched.
        RunError: memory, disk or images end a run, or numbers that aren't finite; its last checkpoint is kept. On a
            cluster the other runs are finished first.
    """
    folder = comparison_folder(config) if folder is None else folder
    narrator = narrator or TextNarrator(say, quiet=quiet)
    main = process_rank() == 0  # of a distributed run, the process that writes
    # a single run has a lock of its own
    with claimed(folder) if summary and main else nullcontext(), ExitStack() as stack:
        with first_process_first():
            plan = plan_with_settings(list(plan_runs(config, folder, fresh and main)), settings)
            crew = _prepare(config, plan, folder, narrator, on, stack)
            if fresh and main:
                delete_runs(folder, plan, everything=summary)
            if summary and main:
                with writing("the settings of a comparison", folder / "config.yaml"):
                    write_text(folder / "config.yaml", dump(config))
                if not any(planned.finished for planned in plan):
                    with writing("the dashboard of a comparison", folder / SUMMARY):
                        # a TensorBoard that is open reads the columns of its table only once
                        write_dashboard(folder / SUMMARY, [])
        return _done(config, folder, plan, narrator, settings, crew, summary=summary)


def resume(
    config: Config,
    folder: Path,
    *,
    quiet: bool = False,
    say: Callable[[str], None] = print,
    narrator: Narrator | None = None,
    settings: Sequence[str] = (),
    on: RayPlace | None = None,
) -> Comparison:
    """Go on in a folder whose ``config.yaml`` is `config`: the folder of a comparison or of a single run."""
    narrator = narrator or TextNarrator(say, quiet=quiet)
    if not is_run(config, folder):
        return compare(config, folder=folder, narrator=narrator, settings=settings, on=on)
    with ExitStack() as stack:
        with first_process_first():
            plan = plan_with_settings([Planned(config, folder, read_results(folder) is not None)], settings)
            crew = _prepare(config, plan, folder, narrator, on, stack)
        return _done(config, folder, plan, narrator, settings, crew, summary=False)


def _prepare(
    config: Config,
    plan: Sequence[Planned[Config]],
    folder: Path,
    narrator: Narrator,
    on: RayPlace | None,
    stack: ExitStack,
) -> Crew | None:
    """Load what runs that aren't finished need, before any of them begins; the crew that does them, if not we."""
    waiting = [planned for planned in plan if not planned.finished]
    if not waiting:
        return None
    config = config.model_copy(update={"device": (waiting[0].running or config).device})
    if on is None:
        prepare(config)
        return None
    from avalanche_firn.experiments.ray_cluster import ray_crew  # Ray is loaded by who asks for it only

    return stack.enter_context(ray_crew(on, config, plan, folder, narrator))


def _done(
    config: Config,
    folder: Path,
    plan: Sequence[Planned[Config]],
    narrator: Narrator,
    settings: Sequence[str],
    crew: Crew | None,
    *,
    summary: bool,
) -> Comparison:
    """Do a plan and summarise it."""
    summary = summary and process_rank() == 0
    target = folder / SUMMARY if summary else None

    def report(runs: Sequence[dict[str, Any]]) -> Path:
        place = folder / SUMMARY
        write_report(place, group_runs(runs), title=config.name, unfinished=find_unfinished([folder]))
        return place / "report.html"

    images: dict[str, Any] = {}

    def one(planned: Planned[Config], watch: RunWatch) -> dict[str, Any]:
        config, place, running = planned.config, planned.folder, planned.running
        return run(config, place, quiet=narrator.quiet, images=images, watch=watch, running=running)

    options: dict[str, Any] = {
        "name": config.name,
        "folder": folder,
        "narrator": narrator,
        "progress": config.progress,
        "resume": folder if summary else None,
        "settings": settings,
        "report": report if summary else None,
    }
    course: Course
    if crew is None:
        course = Course(plan, **options)
        runs = course.work(one)
    else:
        course = together = TogetherCourse(plan, crew=crew, **options)
        runs = together.work_together()
    if not course.last_report():
        target = None
    done = Comparison(folder, tuple(group_runs(runs)), sum(not planned.finished for planned in plan), target)
    narrator.tell("comparison_finished", **done.to_dict())
    return done
