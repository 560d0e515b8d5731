"""All runs of a transfer experiment; what is finished already is kept. Checks before work."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_firn.experiments.course import Course
from avalanche_firn.experiments.environment import resolve_device, seed_everything
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.narration import Narrator, TextNarrator, figures_over_seeds, report_files
from avalanche_firn.experiments.places import RayPlace
from avalanche_firn.experiments.pretraining import (
    build_network,
    held_out_figures,
    pretraining_strategy,
    pretraining_stream,
)
from avalanche_firn.experiments.recipe import dump
from avalanche_firn.experiments.report_unfinished import unfinished_text
from avalanche_firn.experiments.results import FILE, files_below, find_runs, read_results, write_text
from avalanche_firn.experiments.resume_settings import plan_with_settings
from avalanche_firn.experiments.run_folders import (
    SUMMARY,
    Planned,
    claimed,
    comparison_folder,
    delete_runs,
    is_run,
    plan_runs,
)
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.together import Crew, TogetherCourse
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.experiments.transfer_data import TransferData, build_data, random_data
from avalanche_firn.experiments.transfer_protocols import run_transfers
from avalanche_firn.experiments.transfer_report import TransferGroup, transfer_facts, transfer_groups, transfer_table
from avalanche_firn.experiments.transfer_report import write_transfer_report as write_report
from avalanche_firn.experiments.transfer_results import COLUMNS
from avalanche_firn.experiments.transfer_run import run
from avalanche_firn.experiments.unfinished import find_unfinished
from avalanche_firn.plugins.storage_stop import writing

__all__ = [
    "TransferComparison",
    "compare_transfers",
    "described_transfers",
    "dry_run_transfers",
    "outline_transfers",
    "prepare_transfers",
    "report_transfers",
    "resume_transfers",
]


def described_transfers(groups: Sequence[TransferGroup]) -> list[dict[str, Any]]:
    """The final table for scripts: per way of pre-training and optimizer its figures over the seeds."""
    found = []
    for group in groups:
        who = {"method": group.method, "optimizer": group.optimizer, "strategy": group.runs[0]["strategy"]}
        found.append(who | {"seeds": group.seeds, "figures": figures_over_seeds(group, [c[0] for c in COLUMNS])})
    return found


@dataclass(frozen=True)
class TransferComparison:
    """What an experiment gave. `trained`: runs that were done now; the others were there already."""

    folder: Path
    groups: tuple[TransferGroup, ...]
    runs: tuple[dict[str, Any], ...]
    trained: int
    summary: Path | None

    def __str__(self) -> str:
        kept = len(self.runs) - self.trained
        counts = f"{self.trained} runs trained" + (f", {kept} kept from before" if kept else "")
        lines = [
            transfer_table(self.groups),
            "",
            *transfer_facts(self.groups, runs_folder=self.folder),
            f"{counts}; folder {self.folder}",
        ]
        if self.summary is not None:
            lines.append(f"Report: {self.summary / 'report.html'}   Dashboard: firn dashboard {self.folder}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The facts of the event ``comparison_finished``, see :mod:`~avalanche_firn.experiments.narration`."""
        return {
            "folder": self.folder,
            "trained": self.trained,
            "kept": len(self.runs) - self.trained,
            "methods": described_transfers(self.groups),
            "report": report_files(self.summary),
            "dashboard": None if self.summary is None else f"firn dashboard {shlex.quote(str(self.folder))}",
        }


def compare_transfers(
    config: TransferExperiment,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    summary: bool = True,
    say: Callable[[str], None] = print,
    narrator: Narrator | None = None,
    settings: Sequence[str] = (),
    on: RayPlace | None = None,
) -> TransferComparison:
    """Do the runs that are missing, and summarise; see :func:`avalanche_firn.experiments.comparison.compare`."""
    folder = comparison_folder(config) if folder is None else folder
    narrator = narrator or TextNarrator(say, quiet=quiet)
    with claimed(folder) if summary else nullcontext(), ExitStack() as stack:  # a single run has a lock of its own
        plan = plan_with_settings(list(plan_runs(config, folder, fresh)), settings)
        data, crew = _ready(config, plan, folder, narrator, on, stack)
        if fresh:
            delete_runs(folder, plan, everything=summary)
        if summary:
            with writing("the settings of a comparison", folder / "config.yaml"):
                write_text(folder / "config.yaml", dump(config))
        return _done(config, folder, plan, data, narrator, settings, crew, summary=summary)


def resume_transfers(
    config: TransferExperiment,
    folder: Path,
    *,
    quiet: bool = False,
    say: Callable[[str], None] = print,
    narrator: Narrator | None = None,
    settings: Sequence[str] = (),
    on: RayPlace | None = None,
) -> TransferComparison:
    """Go on in a folder whose ``config.yaml`` is `config`: that of an experiment or of a single run."""
    narrator = narrator or TextNarrator(say, quiet=quiet)
    if not is_run(config, folder):
        return compare_transfers(config, folder=folder, narrator=narrator, settings=settings, on=on)
    plan = plan_with_settings([Planned(config, folder, read_results(folder) is not None)], settings)
    with ExitStack() as stack:
        data, crew = _ready(config, plan, folder, narrator, on, stack)
        return _done(config, folder, plan, data, narrator, settings, crew, summary=False)


def _ready(
    config: TransferExperiment,
    plan: Sequence[Planned[TransferExperiment]],
    folder: Path,
    narrator: Narrator,
    on: RayPlace | None,
    stack: ExitStack,
) -> tuple[TransferData | None, Crew | None]:
    """What runs that aren't finished need, or the crew that does them and loads it itself; None and None: all are."""
    waiting = [planned for planned in plan if not planned.finished]
    if not waiting:
        return None, None
    config = config.model_copy(update={"device": (waiting[0].running or config).device})
    if on is None:
        return _prepared(config)[1], None
    from avalanche_firn.experiments.ray_cluster import ray_crew  # Ray is loaded by who asks for it only

    return None, stack.enter_context(ray_crew(on, config, plan, folder, narrator))


def _done(
    config: TransferExperiment,
    folder: Path,
    plan: Sequence[Planned[TransferExperiment]],
    data: TransferData | None,
    narrator: Narrator,
    settings: Sequence[str],
    crew: Crew | None,
    *,
    summary: bool,
) -> TransferComparison:
    """Do a plan and summarise it."""
    target = folder / SUMMARY if summary else None

    def report(runs: Sequence[dict[str, Any]]) -> Path:
        place = folder / SUMMARY
        unfinished = find_unfinished([folder])
        write_report(place, transfer_groups(runs), title=config.name, runs_folder=folder, unfinished=unfinished)
        return place / "report.html"

    def one(planned: Planned[TransferExperiment], watch: RunWatch) -> dict[str, Any]:
        assert data is not None
        return run(planned.config, planned.folder, data, watch=watch, running=planned.running)

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
    trained = sum(not planned.finished for planned in plan)
    done = TransferComparison(folder, tuple(transfer_groups(runs)), tuple(runs), trained, target)
    narrator.tell("comparison_finished", **done.to_dict())
    return done


def report_transfers(folders: Sequence[Path], output: Path | None = None) -> str:
    """Table and facts of all finished runs in the folders; writes the report as ``firn report`` says.

    Unfinished runs are listed apart. Where there are no others, nothing but that list is returned and no file written:
    everything in a report of transfers is made of results.

    Raises:
        ConfigError: a folder without runs, runs of comparisons on a stream among them, the same run twice.
    """
    unfinished = find_unfinished(folders)
    waiting = {folder for folder in folders if not files_below(folder, FILE) and find_unfinished([folder])}
    with_results = [folder for folder in folders if folder not in waiting]
    if not with_results and unfinished:
        return f"No run is finished yet.\n\n{unfinished_text(unfinished)}"
    runs = find_runs(with_results)
    if any(run.get("experiment") != "transfer" for run in runs):
        raise ConfigError("transfer experiments and comparisons on a stream have no table in common; give one kind")
    groups = transfer_groups(runs)
    if output is None and len(folders) == 1 and (folders[0] / SUMMARY).is_dir():
        output = folders[0] / SUMMARY
    if output is not None:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output} is a file; give a folder for the report")
        title = folders[0].resolve().name if len(folders) == 1 else "runs"
        write_report(output, groups, title=title, runs_folder=list(folders), unfinished=unfinished)
    lines = [transfer_table(groups), "", *transfer_facts(groups, runs_folder=list(folders))]
    lines += ["", unfinished_text(unfinished)] if unfinished else []
    return "\n".join(lines + ([f"Report: {output / 'report.html'}"] if output is not None else []))


def _prepared(config: TransferExperiment) -> tuple[torch.device, TransferData]:
    """Everything that the configuration points to, checked; nothing is written."""
    device = resolve_device(config.device)
    data = build_data(config.data)
    seed_everything(config.seeds[0])
    _check(config, data)
    return device, data


def _check(config: TransferExperiment, data: TransferData) -> None:
    build_network(config, data)
    count, wanted = data.transfer[0].num_classes, config.transfer.tasks
    if wanted is not None and wanted > count:
        raise ConfigError(Problem("transfer.tasks", f"{wanted} of {count} transfer classes", f"1 to {count}, or null"))
    images = len(data.pretrain)
    for i, method in enumerate(config.methods):
        asked = getattr(method, "remember_size", 0)
        if asked > images:
            reason = f"{asked}, but {images} images to pre-train on, drawn without replacement"
            raise ConfigError(Problem(f"methods[{i}].remember_size", reason, f"1 to {images}"))


def _outline(config: TransferExperiment, data: str) -> str:
    labels = ", ".join(optimizer.label for optimizer in config.transfer.optimizers)
    ways, seeds = len(config.methods), len(config.seeds)
    return "\n".join(
        [
            f"recipe    {config.name}: {ways} ways of pre-training x {seeds} seeds = {ways * seeds} runs",
            f"methods   {', '.join(method.name for method in config.methods)}",
            f"transfer  {labels}; rates by {config.transfer.select.replace('_', ' ')}, {config.transfer.trials} trials",
            f"network   {config.network.name} {dict(config.network.arguments) or ''}".rstrip(),
            f"data      {config.data.name}: {data}",
            f"device    {resolve_device(config.device)}, {config.precision}",
        ]
    )


def prepare_transfers(config: TransferExperiment) -> str:
    """What `firn check` prints, after loading everything once.

    Raises:
        ConfigError: no data, a network that can't take it, numbers that don't fit.
    """
    return _outline(config, str(_prepared(config)[1]))


def outline_transfers(config: TransferExperiment) -> str:
    """What `firn check --no-data` prints: the images are random ones of the true shape."""
    whole = config.transfer.model_copy(update={"tasks": None})  # how many classes there are, only the data say
    _check(config.model_copy(update={"transfer": whole}), _random(config))
    return _outline(config, "images not read")


def _random(config: TransferExperiment) -> TransferData:
    """Random images; as many classes as a few episodes or batches need."""
    shape = (1, 28, 28) if config.data.name in ("omniglot", "digits") else (3, 84, 84)
    most = max([getattr(method, "remember_size", 1) for method in config.methods])
    return random_data(shape, classes=max(8, -(-most // 8)))


def dry_run_transfers(config: TransferExperiment, *, data: bool = True) -> Iterator[str]:
    """A few steps of every way of pre-training and every transfer on random images; yields one line per method."""
    if data:
        _prepared(config)
    device = resolve_device(config.device)
    fake = _random(config)
    few = config.transfer.model_copy(
        update={
            "tasks": None,
            "trials": 1,
            "iid_epochs": min(config.transfer.iid_epochs, 1),
            "optimizers": [o.model_copy(update={"rates": o.rates[:1]}) for o in config.transfer.optimizers],
        }
    )
    for method in config.methods:
        single = config.single(method.name, config.seeds[0])
        single = single.model_copy(update={"methods": [method.brief()], "transfer": few})
        seed_everything(config.seeds[0])
        model = build_network(single, fake).to(device)
        steps = 0
        if method.strategy != "untrained":
            strategy = pretraining_strategy(single, model, device, [], EvaluationPlugin(loggers=[BaseLogger()]))
            strategy.train(pretraining_stream(fake).train[0], eval_streams=[])
            steps = int(strategy.clock.train_iterations)
        level = held_out_figures(model, fake.held_out, device)["loss"]
        for section in few.optimizers:
            run_transfers(single, section, model, fake, device, level)
        memory = (
            f", peak memory {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if device.type == "cuda" else ""
        )
        names = ", ".join(section.label for section in few.optimizers)
        yield f"{method.name}: {steps} steps of pre-training, transfers with {names}{memory}"
