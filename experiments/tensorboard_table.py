"""Hyper-parameters of runs as one flat row each, and the columns of TensorBoard's hparams table.

A run writes its row into its own event file; the columns are written once, by the summary of the comparison, since
TensorBoard takes the first set of columns that it finds for all rows. What a comparison is going to run is known from
its ``config.yaml``, so the columns are complete as soon as the first run is finished: a TensorBoard that is open
doesn't read them a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from avalanche_firn.evaluation.summary_run import TableColumns
from avalanche_firn.evaluation.tensorboard import flatten
from avalanche_firn.evaluation.vocabulary import VALIDATION, describe
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.results import Group
from avalanche_firn.experiments.run_folders import SUMMARY
from avalanche_firn.experiments.schema_rules import COSMETIC

__all__ = ["RUN_SECONDS", "group_settings", "hyper_parameters", "planned", "table_columns"]

Value = str | int | float
Settings = dict[str, Value]

RUN_SECONDS = "efficiency/run-seconds"
_APART = (*COSMETIC, "seeds", "methods", "training", "device", "threads")
_PROTOCOL = ("split", "streams", "forgetting")  # of the section evaluation; the rest only adds measurements
# Figures first, cost last. drift/weights isn't among them: it ends where a method adds weights, and a cell of the table
# shows the last point whenever that was.
_METRICS = (
    "accuracy/last",
    "accuracy/average",
    "accuracy/incremental",
    "forgetting/average",
    "transfer/backward",
    "transfer/forward",
    "accuracy/within-task",
    "task-il/accuracy/last",
    "task-il/accuracy/average",
    "task-il/forgetting/average",
)
_MORE = ("drift/cka", "lorac/task-inference", "dynamics/learning", "dynamics/interference", "dynamics/synergy")
_COST = (RUN_SECONDS, "efficiency/peak-memory-MiB", "efficiency/trainable-parameters")
_FIGURES = ("accuracy/", "forgetting/", "transfer/", "task-il/")  # these tags say on which split they were measured


def hyper_parameters(config: Config) -> Settings:
    """A run's row: one level of names, values as the table can show and sort them.

    ``Method`` and ``Seed`` come first: TensorBoard sorts by name, capital letters before small ones. ``training.*`` is
    what the method trains with, its own values on top of the shared ones. What isn't set (None) has no entry, so that
    a column of numbers stays one; lists are JSON.

    Args:
        config: of one method and one seed, see :meth:`Config.single`.
    """
    method = config.methods[0]
    own = method.model_dump(exclude={"name", "training"}, exclude_none=True)
    shared = {key: value for key, value in config.identity().items() if key not in _APART}
    shared["evaluation"] = {key: shared["evaluation"][key] for key in _PROTOCOL}
    nested = {
        "Method": method.name,
        "Seed": config.seeds[0],
        **shared,
        "training": config.training_of(method).model_dump(),
    }
    clashes = {f"method.{key}" if key in nested else key: value for key, value in own.items()}
    flat = flatten(_without_none(nested | clashes))
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in flat.items()}


def _without_none(values: dict[str, object]) -> dict[str, object]:
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _config(path: Path) -> Config | None:
    """A stored configuration; None where there is none that this version can read."""
    try:
        found = load_experiment(path) if path.is_file() else None
    except (ConfigError, OSError, UnicodeDecodeError):
        return None
    return found if isinstance(found, Config) else None


def planned(folder: Path) -> list[Config]:
    """What the comparison whose summary is ``folder`` runs, one configuration per method and seed; empty if unknown."""
    config = _config(folder.resolve().parent / "config.yaml") if folder.name == SUMMARY else None
    if config is None:
        return []
    return [config.single(method.name, seed) for method in config.methods for seed in config.seeds]


def group_settings(groups: Sequence[Group]) -> list[Settings | None]:
    """The hyper-parameters of each group's first run; None where its ``config.yaml`` isn't there or can't be read."""
    found = []
    for group in groups:
        folder = next((folder for folder in group.folders if folder is not None), None)
        config = None if folder is None else _config(folder / "config.yaml")
        found.append(None if config is None else hyper_parameters(config))
    return found


def table_columns(
    groups: Sequence[Group], settings: Sequence[Settings | None], *, tags: Iterable[str], plan: Sequence[Config] = ()
) -> TableColumns | None:
    """The columns for finished and for planned runs; None where nothing is known of any.

    Args:
        groups: finished runs.
        settings: of each group, see :func:`group_settings`.
        tags: everything that the runs have logged and the dashboard draws.
        plan: see :func:`planned`.
    """
    rows = [
        {**(row or {"Method": group.runs[0]["method"]}), "Seed": seed}
        for group, row in zip(groups, settings, strict=True)
        for seed in group.seeds
    ]
    rows += [hyper_parameters(config) for config in plan]
    if not rows:
        return None
    names = sorted({name for row in rows for name in row}, key=lambda name: (name not in ("Method", "Seed"), name))
    metrics = _metrics(groups, set(tags), plan)
    headings = {tag: _heading(tag) for tag in metrics}
    notes = {tag: f"{meaning.definition} ({meaning.unit})" for tag in metrics if (meaning := describe(tag)) is not None}
    return TableColumns({name: [row.get(name) for row in rows] for name in names}, headings, notes)


def _heading(tag: str) -> str:
    meaning = describe(tag)
    plain = tag.removeprefix(VALIDATION)
    title = meaning.title if meaning is not None and meaning.title else plain
    return title if plain == tag else f"{title} (validation)"


def _metrics(groups: Sequence[Group], drawn: set[str], plan: Sequence[Config]) -> list[str]:
    """Tags of the final figures, in the order of the columns, with ``validation/`` for runs on that split."""
    known = {
        tag for group in groups for run in group.runs for tag, value in run["figures"].items() if value is not None
    }
    known |= drawn & {"drift/cka"}
    splits = {group.runs[0]["stream"]["split"] for group in groups}
    for config in plan:
        splits.add(config.evaluation.split)
        known |= _planned_metrics(config)
    probes = sorted(tag for tag in known if tag.startswith("probe/") and tag.count("/") == 1)
    found = []
    for tag in (*_METRICS, *probes, *_MORE, *_COST):
        if tag in known or tag in _COST:
            of_split = tag.startswith(_FIGURES)
            found += [tag] if "test" in splits or not of_split else []
            found += [f"{VALIDATION}{tag}"] if "validation" in splits and of_split else []
    return found


def _planned_metrics(config: Config) -> set[str]:
    section = config.evaluation
    found = {"accuracy/last", "accuracy/average", "accuracy/incremental", "forgetting/average", "transfer/backward"}
    if section.task_incremental:
        found |= {tag for tag in _METRICS if tag.startswith("task-il/")}
    if section.drift is not None:
        found.add("drift/cka")
    if len(section.probes) == 1:  # of several the tags say the settings too
        found |= {f"probe/{name.replace('_', '-')}" for name in section.probes[0].adapt}
    return found
