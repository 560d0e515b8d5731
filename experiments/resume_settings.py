"""Settings that a run may be given when it goes on: how it computes, and not what it is.

``firn resume FOLDER performance.accumulate=4 training.num_workers=0`` goes on with a run that had no memory left, or
whose loader processes died. The run stays the one that it was: its ``config.yaml``, its digest and its place in a
comparison don't change. What was given stands in ``environment.json`` (``resumed_in``, or ``settings`` of a run that
began with it), and, where it may change figures, in the section ``performance`` of ``results.json``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.errors import ConfigError, Problem, nearest
from avalanche_firn.experiments.performance_section import FIGURES, PerformanceConfig
from avalanche_firn.experiments.recipe import apply_override
from avalanche_firn.experiments.results_form import read_environment
from avalanche_firn.experiments.run_folders import Planned
from avalanche_firn.experiments.transfer_config import TransferExperiment, validate_transfer

__all__ = [
    "accepted_settings",
    "declared",
    "declared_text",
    "given",
    "plan_with_settings",
    "with_earlier",
    "with_settings",
]

AnyConfig = TypeVar("AnyConfig", Config, TransferExperiment)

_ANY = ("checkpoint.every", "checkpoint.keep", "device", "progress", "threads")
_STREAM = ("training.eval_batch_size", "training.num_workers")
_MAY_CHANGE = {
    "performance.accumulate": "rounding, and what BatchNorm and dropout see",
    "performance.fast_path": "the random numbers of augmentations in loader processes",
    "performance.one_pass_evaluation": "rounding of evaluated figures",
    "training.eval_batch_size": "rounding of evaluated figures, and of features and what is made of them",
    "device": "rounding",
    "threads": "rounding",
    "training.num_workers": "the random numbers of augmentations, between none and some",
}
"""Accepted all the same, and declared in the results."""
_STEP = re.compile(r"step-(\d+)(-end)?")


def accepted_settings(config: Config | TransferExperiment) -> list[str]:
    """Keys that may be given to a run of this kind when it goes on."""
    if isinstance(config, TransferExperiment):
        return sorted(_ANY)
    performance = [f"performance.{name}" for name in PerformanceConfig.model_fields if name not in FIGURES]
    return sorted([*_ANY, *_STREAM, *performance, "performance.accumulate"])


def with_settings(config: AnyConfig, settings: Sequence[str]) -> AnyConfig:
    """The configuration that a run goes on with; its identity is still that of `config`.

    Args:
        config: of the run, or of a whole comparison.
        settings: ``key=value``, the value as YAML.

    Raises:
        ConfigError: a key that would make it another experiment, or a value that doesn't fit; all together.
    """
    if not settings:
        return config
    _check_keys(config, settings)
    raw = config.model_dump()
    for text in settings:
        apply_override(raw, text)
    source = f"the configuration with {', '.join(settings)}"
    if isinstance(config, TransferExperiment):
        return validate_transfer(raw, source=source)
    return validate(raw, source=source)


def plan_with_settings(plan: Sequence[Planned[AnyConfig]], settings: Sequence[str]) -> list[Planned[AnyConfig]]:
    """The runs of a plan, those that aren't finished with settings to go on with.

    Raises:
        ConfigError: see :func:`with_settings`, also where all runs are finished; a method that can't do with a setting
            is named.
    """
    if not settings:
        return list(plan)
    for planned in plan[:1]:  # all are of one kind
        _check_keys(planned.config, settings)
    found, problems = [], []
    for planned in plan:
        running = None
        if not planned.finished:
            try:
                running = with_settings(planned.config, settings)
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        found.append(replace(planned, running=running))
    if problems:
        raise ConfigError(problems, source="what runs are to go on with")
    return found


def _check_keys(config: Config | TransferExperiment, settings: Sequence[str]) -> None:
    """:raises ConfigError: a key that may not be given to a run of this kind when it goes on."""
    accepted = accepted_settings(config)
    problems = [problem for text in settings if (problem := _refused(text, accepted)) is not None]
    if problems:
        raise ConfigError(problems, source="what a run is to go on with")


def _refused(text: str, accepted: Iterable[str]) -> Problem | None:
    key, sign, _ = text.partition("=")
    if not sign or not key.strip():
        return Problem("", f"{text!r} has no key=value", "for example performance.accumulate=4")
    if key.strip() in accepted:
        return None
    close = nearest(key.strip(), accepted)
    reason = "can't be changed in a run that goes on, since it would be another experiment"
    return Problem(key.strip(), reason, ", ".join(accepted), f"did you mean {close}?" if close else "")


def given(config: Config | TransferExperiment, running: Config | TransferExperiment) -> dict[str, Any]:
    """Keys in which the configuration that a run goes on with differs from its own, and their values."""
    own, now = config.model_dump(), running.model_dump()
    return {key: _at(now, key) for key in accepted_settings(config) if _at(own, key) != _at(now, key)}


def _at(values: Mapping[str, Any], key: str) -> Any:
    for step in key.split("."):
        values = values[step]
    return values


def with_earlier(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What ``environment.json`` is to hold when a run goes on: what stands there, and the present one in `resumed_in`.

    The file decides nothing about the run, so a damaged one is set aside with a warning and begun anew.

    Args:
        path: of the file, which need not be there.
        now: the present environment.
    """
    try:
        first = read_environment(path)
    except ConfigError as error:
        aside = path.with_name(f"refused-{path.name}")
        os.replace(path, aside)
        text = f"{error}; it is kept as {aside.name}, and settings that it declared won't be in the results"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        first = None
    return now if first is None else first | {"resumed_in": [*first.get("resumed_in", []), now]}


def declared(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run was given and may have changed its figures, from its ``environment.json``: ``{from, settings}`` each.

    `from` is the checkpoint from which it went on, ``start`` for a run that began so. What came of settings that were
    given from the same checkpoint before, or from a later one, is no part of the run any more.
    """
    found: list[dict[str, Any]] = []
    for entry in (environment, *environment.get("resumed_in", [])):
        found = [earlier for earlier in found if not _redone(earlier["from"], entry.get("from"))]
        settings = {key: value for key, value in entry.get("settings", {}).items() if key in _MAY_CHANGE}
        if settings:
            found.append({"from": entry.get("from", "start"), "settings": settings})
    return found


def _redone(start: str, now: str | None) -> bool:
    """Whether everything that followed on one checkpoint is done again, since the run goes on from ``now``."""
    places = []
    for name in (start, now or ""):
        step = _STEP.fullmatch(name)
        if name != "start" and step is None:  # not known
            return False
        places.append((-1, False) if step is None else (int(step[1]), step[2] is not None))
    return places[0] >= places[1]


def declared_text(results: Mapping[str, Any]) -> str:
    """What the results of a run declare of it: ``performance.accumulate=4 from step-000000200``; "" for nothing."""
    told = []
    for entry in (results.get("performance") or {}).get("resumed_with", []):
        settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
        told.append(f"{settings} from {entry['from']}")
    return "; ".join(told)
