"""The table of reproductions: beside what others report of each shipped recipe, what was measured with this package.

Made from the files of finished runs alone (``results.json``, ``environment.json``, ``config.yaml``); nothing is filled
in by hand, and the same runs give the same text to the byte. A run counts for a recipe only if its configuration is
that of the recipe's method, but for where its data and weights lie and what it ran on. Runs with other settings stand
apart with what differs; they are never averaged with the others. Neither are runs from other weights or other data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.statistics import mean_interval
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.recipe_table import JOINT, VOTE, Experiment, recipes_by_paper
from avalanche_firn.experiments.results import FILE, files_below, read_results
from avalanche_firn.experiments.results_form import read_environment
from avalanche_firn.experiments.resume_settings import declared_text

__all__ = ["Reproduced", "Rows", "StoredRun", "comparable", "differences", "flags_of", "reproduce", "stored_runs"]

PLACES = (
    "device",
    "threads",
    "training.num_workers",
    "backbone.weights",
    "stream.root",
    "stream.download",
    "stream.arguments.dataset_root",
    "data.root",
    "data.download",
    "data.test_class_list",
)
"""Where data and weights lie and what a run ran on. They are part of a run's digest, yet change no figure by
themselves: other weights or data show in the hashes that a run records, which are compared."""
_LISTS = "stream.split_files"
"""Which files divide the data: their places don't matter, but whether there are any does."""
_ABSENT = "absent"
_SHOWN = 8  # differences that are named


@dataclass(frozen=True)
class StoredRun:
    """A finished run, read from its folder; `config` is None where this version can't read it."""

    folder: Path
    results: dict[str, Any]
    environment: dict[str, Any] | None
    config: Experiment | None

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.results["seed"])

    @property
    def label(self) -> str:
        """Of the method."""
        return str(self.results["method"])

    @property
    def title(self) -> str:
        """``RECIPE/METHOD seed S``."""
        return f"{self.results['recipe']}/{self.label} seed {self.seed}"

    @property
    def joint(self) -> bool:
        """Trained on all classes at once."""
        return bool(self.results["protocol"].get("joint"))

    @property
    def origin(self) -> tuple[str, str]:
        """Hashes of initial weights and of data; "" where they differ from seed to seed by design."""
        backbone = self.results.get("backbone", {})
        weights = "" if backbone.get("weights", "random") == "random" else str(backbone["weights_sha256"])
        data = self.results.get("stream") or self.results.get("data") or {}
        seeded = getattr(getattr(self.config, "stream", None), "name", "") == "avalanche"  # labels come in its order
        return weights, "" if seeded else str(data.get("fingerprint", ""))

    def value(self, tag: str) -> float | None:
        """A figure as a share of 1; None where the run has none. Joint training has no incremental accuracy."""
        figures = self.results.get("figures", {})
        if "experiment" in self.results:
            optimizer, _, tag = tag.partition("/")
            figures = self.results["optimizers"].get(optimizer, {}).get("figures", {})
        value = None if self.joint and tag.endswith("accuracy/incremental") else figures.get(tag)
        return float(value) if value is not None and math.isfinite(value) else None


def stored_runs(folders: Iterable[Path]) -> list[StoredRun]:
    """All finished runs in or below the folders, each once, by recipe, method and seed; a folder may hold none.

    Raises:
        ConfigError: no such folder, a run without ``config.yaml`` or with that of another run, a file that isn't what
            its name says.
    """
    found: dict[Path, StoredRun] = {}
    for top in folders:
        if not top.is_dir():
            raise ConfigError(f"{top} isn't a folder; give folders of runs or comparisons")
        for path in files_below(top, FILE):
            if path.resolve() not in found:
                found[path.resolve()] = _read(path.parent)
    return sorted(found.values(), key=lambda run: (run.results["recipe"], run.label, run.seed, str(run.folder)))


def _read(folder: Path) -> StoredRun:
    results = read_results(folder)
    if results is None:  # the name was there: of a pipe, or of a link to nowhere
        raise ConfigError(f"{folder / FILE} isn't a file")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no config.yaml, so what was run isn't known")
    surroundings = read_environment(folder / "environment.json")
    try:
        config: Experiment | None = load_experiment(folder / "config.yaml")
    except ConfigError:
        config = None  # an older or a newer version's
    if config is not None:
        named = ([method.name for method in config.methods], list(config.seeds))
        if named != ([results["method"]], [results["seed"]]):
            told = f"{results['method']} with seed {results['seed']}"
            raise ConfigError(f"{folder}: {FILE} is of {told}, config.yaml of {named[0]} with seeds {named[1]}")
    return StoredRun(folder, results, surroundings, config)


# -------------------------------------------------------------- same or another
def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted path; entries of a list of sections by their index."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}").items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}[{i}]").items()}
    return {prefix.removeprefix("."): value}


def comparable(config: Experiment) -> dict[str, Any]:
    """What decides a run's figures but for its seed, by dotted path: the identity without :data:`PLACES`.

    Args:
        config: of one run, see ``Config.single``; its method's values are found under ``methods.LABEL``.
    """
    label = config.methods[0].name
    values = _flat({key: value for key, value in config.identity().items() if key != "seeds"})
    plain = {key.replace("methods[0]", f"methods.{label}", 1): value for key, value in values.items()}
    if plain.get(_LISTS) is not None:
        plain[_LISTS] = "given"
    return {key: value for key, value in plain.items() if key not in PLACES}


def differences(config: Experiment, recipe: Experiment) -> list[str]:
    """In what a run's configuration differs from a recipe's method of the same label; empty if it doesn't.

    Raises:
        KeyError: the recipe has no such method.
    """
    there, here = comparable(config), comparable(recipe.single(config.methods[0].name, recipe.seeds[0]))
    keys = [k for k in sorted(there.keys() | here.keys()) if there.get(k, _ABSENT) != here.get(k, _ABSENT)]
    return [f"{k} {_short(there.get(k, _ABSENT))} instead of {_short(here.get(k, _ABSENT))}" for k in keys]


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def flags_of(runs: Sequence[StoredRun]) -> list[str]:
    """What has to be declared of measured figures, from what the runs recorded."""
    found: dict[str, None] = {}
    for run in runs:
        protocol = run.results["protocol"]
        slots = protocol.get("replay_slots")
        pretrained = "replay of pre-training images, in the pre-training"
        transfers = run.results["optimizers"] if "experiment" in run.results else {}
        replay = pretrained if transfers else f"replay of {slots} samples" if slots else "replay"
        diverged = [run.results.get("diverged"), *(transfer["diverged"] for transfer in transfers.values())]
        for flag, holds in (
            (JOINT, protocol.get("joint")),
            (replay, protocol.get("replay")),
            (VOTE, protocol.get("batchwise_vote")),
            ("task identity at test time", protocol.get("task_identity_at_test")),
            ("rates chosen on the transfer classes", "test" in protocol.get("rates_chosen_on", "")),
            (f"weights became infinite or NaN with seed {run.seed}", any(diverged)),
            (f"seed {run.seed} resumed with {declared_text(run.results)}", declared_text(run.results)),
        ):
            if holds:
                found[flag] = None
    return list(found)


# ------------------------------------------------------------------ the rows
@dataclass(frozen=True)
class Rows:
    """Runs that may be averaged: one method, one configuration, the same weights and data, by seed."""

    label: str
    runs: tuple[StoredRun, ...]
    differs: tuple[str, ...] = ()
    """From the recipe; empty if the runs count for it."""
    note: str = ""
    """What tells these runs from others of the same method and configuration."""

    @property
    def seeds(self) -> list[int]:
        """Of the runs, ascending."""
        return [run.seed for run in self.runs]

    def measured(self, tag: str) -> str:
        """``mean ± half width of the 95 % interval`` in percent, without ± for one seed; a dash without the figure."""
        values = [value for run in self.runs if (value := run.value(tag)) is not None]
        return mean_interval(values).format(100.0, 2) if values and len(values) == len(self.runs) else "-"


@dataclass
class Reproduced:
    """A shipped recipe and the runs of it."""

    config: Experiment
    counting: list[Rows] = field(default_factory=list)
    others: list[Rows] = field(default_factory=list)

    def of(self, label: str) -> list[Rows]:
        """The counting rows of a method."""
        return [rows for rows in self.counting if rows.label == label]


def reproduce(runs: Sequence[StoredRun]) -> tuple[dict[str, list[Reproduced]], list[str]]:
    """The shipped recipes by paper, in their fixed order, each with its runs; and why the other runs were left out.

    A run under another name than a shipped recipe's (``name=`` of the command line) counts for the recipe that it is a
    run of, if there is one.

    Raises:
        ConfigError: the same seed twice among runs that would be averaged.
    """
    shipped = recipes_by_paper()
    by_name = {config.name: Reproduced(config) for recipes in shipped.values() for config in recipes}
    sorted_runs: dict[tuple[str, str, tuple[str, ...], tuple[str, str]], list[StoredRun]] = {}
    left_out = []
    for run in runs:
        name, differs = _belongs(run, {name: found.config for name, found in by_name.items()})
        if name is None:
            left_out.append(f"{run.title}: {differs[0]}")
        else:
            sorted_runs.setdefault((name, run.label, tuple(differs), run.origin), []).append(run)
    for key in sorted(sorted_runs):
        name, label, other, origin = key
        members = sorted(sorted_runs[key], key=lambda run: run.seed)
        for first, second in pairwise(members):
            if first.seed == second.seed:
                told = f"seed {first.seed} of {name}/{label}"
                raise ConfigError(f"{told} is given twice: {first.folder} and {second.folder}; give one of them")
        same = [near[3] for near in sorted_runs if near[:3] == key[:3]]
        rows = Rows(label, tuple(members), other, _note(origin, same))
        (by_name[name].others if other else by_name[name].counting).append(rows)
    return {heading: [by_name[c.name] for c in recipes] for heading, recipes in shipped.items()}, left_out


def _belongs(run: StoredRun, shipped: Mapping[str, Experiment]) -> tuple[str | None, list[str]]:
    """The recipe of a run and in what it differs from it; without a recipe the reason."""
    if run.config is None:
        return None, ["this version can't read its configuration"]
    own = shipped.get(run.config.name)
    near = [own] if own is not None else [c for c in shipped.values() if isinstance(run.config, type(c))]
    for recipe in near:
        if not isinstance(run.config, type(recipe)):
            return None, ["another kind of experiment than the recipe of that name"]
        if run.label not in [method.name for method in recipe.methods]:
            if own is not None:
                return own.name, [f"the recipe has no method {run.label}"]
            continue
        differs = differences(run.config, recipe)
        if own is not None or not differs:
            more = len(differs) - _SHOWN
            return recipe.name, [*differs[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    return None, ["no shipped recipe has that name, and none has its configuration"]


def _note(origin: tuple[str, str], others: Sequence[tuple[str, str]]) -> str:
    """Hashes that tell runs of one configuration apart; empty where nothing has to be told apart."""
    parts = zip(("weights", "data"), origin, zip(*others, strict=True), strict=True)
    return ", ".join(f"{name} {own[:12]}" for name, own, all_ in parts if len(set(all_)) > 1)
