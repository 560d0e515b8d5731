"""Finished runs of transfer experiments, grouped: one group per way of pre-training and optimizer of the transfer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.statistics import Interval, mean_interval
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import parse, read_recipe
from avalanche_firn.experiments.results import FILE, files_below, group_runs, read_results

__all__ = [
    "ACCURACIES",
    "COLUMNS",
    "EFFECTS",
    "PROTOCOLS",
    "Column",
    "TransferGroup",
    "run_folders_of",
    "stored_configs",
    "transfer_groups",
]

Column = tuple[str, str, float, int]
"""Tag, heading, factor, digits."""
ACCURACIES: tuple[Column, ...] = (
    ("pretraining/accuracy", "held-out accuracy %", 100.0, 2),
    ("continual/accuracy", "continual accuracy %", 100.0, 2),
    ("iid/accuracy", "i.i.d. accuracy %", 100.0, 2),
    ("iid/shock", "shock, nats", 1.0, 2),
    ("iid/recovery", "recovery, iterations", 1.0, 1),
)
EFFECTS: tuple[Column, ...] = (
    ("dynamics/learning", "learning, nats", 1.0, 1),
    ("dynamics/interference", "interference, nats", 1.0, 1),
    ("dynamics/synergy", "synergy, nats", 1.0, 1),
    ("dynamics/forgetting", "forgetting, nats", 1.0, 2),
)
COLUMNS = ACCURACIES + EFFECTS
"""Columns of the printed table; a report shows the two parts as tables of their own, which fit a page."""
PROTOCOLS = {"continual": "continual", "iid": "i.i.d."}
"""Key in results, name in texts."""


@dataclass(frozen=True)
class TransferGroup:
    """All runs of one way of pre-training with one configuration, by seed, seen through one optimizer."""

    method: str
    """Label of the way of pre-training, unique among the configurations of a table."""
    optimizer: str
    """Label of the transfer's optimizer."""
    runs: tuple[dict[str, Any], ...]
    """Contents of ``results.json``, by seed."""

    @property
    def label(self) -> str:
        """``METHOD, OPTIMIZER``."""
        return f"{self.method}, {self.optimizer}"

    @property
    def digest(self) -> str:
        """Of the configuration but for the seed."""
        return str(self.runs[0]["group_digest"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run["seed"] for run in self.runs]

    @property
    def transfers(self) -> list[dict[str, Any]]:
        """Per seed what ``results.json`` says about the transfers with this optimizer."""
        return [run["optimizers"][self.optimizer] for run in self.runs]

    def values(self, tag: str) -> list[float | None]:
        """One value per seed: of :data:`COLUMNS`, or ``pretraining/loss`` (nats); None where it isn't defined."""
        part, name = tag.split("/", 1)
        if part == "pretraining":
            return [run["pretraining"].get(name) for run in self.runs]
        return [transfer["figures"].get(tag) for transfer in self.transfers]

    def by_seed(self, tag: str) -> dict[int, float]:
        """The finite ones of :meth:`values` by seed."""
        pairs = zip(self.seeds, self.values(tag), strict=True)
        return {seed: value for seed, value in pairs if value is not None and math.isfinite(value)}

    def interval(self, tag: str) -> Interval | None:
        """Mean and 95 % interval over the seeds; None where a run has no such figure."""
        known = self.by_seed(tag)
        return mean_interval(known.values()) if len(known) == len(self.runs) else None

    def never_recovered(self) -> tuple[int, int]:
        """I.i.d. trials, over all seeds, whose shock was measured and didn't pass; and all whose shock was measured."""
        shocks = [shock for transfer in self.transfers for shock in transfer["shocks"] if shock["size"] is not None]
        return sum(shock["iterations"] is None for shock in shocks), len(shocks)

    def cell(self, column: Column) -> str:
        """``mean ± half width``, a dash where it isn't defined; of recovery ``k of n never`` where there are such."""
        tag, _, scale, digits = column
        never, measured = self.never_recovered() if tag == "iid/recovery" else (0, 0)
        if never:
            return f"{never} of {measured} never"
        interval = self.interval(tag)
        return "-" if interval is None else interval.format(scale, digits)


def transfer_groups(runs: Sequence[dict[str, Any]]) -> list[TransferGroup]:
    """Runs by configuration and optimizer, best continual accuracy first, otherwise in the order found.

    Args:
        runs: contents of ``results.json``. Where methods of different configurations share a label, the recipe's name
            (and, if need be, the beginning of the configuration's digest) is put behind it.

    Raises:
        ConfigError: a run of another kind of experiment, or the same configuration and seed twice.
    """
    foreign = sorted({str(run.get("method")) for run in runs if run.get("experiment") != "transfer"})
    if foreign:
        raise ConfigError(f"{', '.join(foreign)}: not a transfer experiment; report on the two kinds separately")
    own = {(run["group_digest"], run["seed"]): run for run in runs}
    # The grouping of streams needs to hear that nothing is an upper bound; without figures it keeps the order.
    plain = [run | {"figures": {}, "protocol": {"joint": False}} for run in runs]
    groups = []
    for group in group_runs(plain):
        members = tuple(own[run["group_digest"], run["seed"]] for run in group.runs)
        groups += [TransferGroup(group.label, optimizer, members) for optimizer in members[0]["optimizers"]]

    def rank(group: TransferGroup) -> float:
        interval = group.interval("continual/accuracy")
        return -interval.mean if interval else math.inf

    return sorted(groups, key=rank)


def run_folders_of(groups: Iterable[TransferGroup], runs_folder: Path | Sequence[Path]) -> dict[str, Path]:
    """Where the runs lie: digest of a run's configuration -> its folder, found in or below `runs_folder`.

    Runs that aren't there (a report of copied results) are left out.

    Raises:
        ConfigError: a ``results.json`` that can't be read.
    """
    wanted = {run["config_digest"] for group in groups for run in group.runs}
    found: dict[str, Path] = {}
    for top in [runs_folder] if isinstance(runs_folder, Path) else runs_folder:
        for path in files_below(top, FILE):
            results = read_results(path.parent)
            if results is not None and results.get("config_digest") in wanted:
                found.setdefault(results["config_digest"], path.parent)
    return found


def stored_configs(groups: Iterable[TransferGroup], places: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The ``config.yaml`` of one run per configuration: digest but for the seed -> plain values.

    They are read as they are, not validated: a report may be made by a later version.

    Raises:
        ConfigError: a file that isn't YAML.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for run in group.runs:
            path = places.get(run["config_digest"], Path()) / "config.yaml"
            if group.digest not in found and run["config_digest"] in places and path.is_file():
                found[group.digest] = _config(path)
    return found


def _config(path: Path) -> dict[str, Any]:
    """The plain values of a ``config.yaml``, with the parts that tables compare."""
    raw = parse(read_recipe(path), source=str(path))
    parts = raw if isinstance(raw, dict) else {}
    transfer, methods, dynamics = parts.get("transfer"), parts.get("methods"), parts.get("dynamics")
    optimizers = transfer.get("optimizers") if isinstance(transfer, dict) else None
    good = isinstance(optimizers, list) and all(isinstance(one, dict) and "label" in one for one in optimizers)
    own = methods[0] if isinstance(methods, list) and len(methods) == 1 else None
    good = good and isinstance(own, dict) and isinstance(own.get("strategy"), str)
    if dynamics is not None:
        share = dynamics.get("recovery_fraction") if isinstance(dynamics, dict) else None
        good = good and isinstance(share, int | float) and not isinstance(share, bool)
    if not good:
        raise ConfigError(f"{path} isn't the configuration of a run of a transfer experiment")
    return parts
