"""What zapping and the dynamics of single tasks leave in a run: the metric, what was redrawn, totals of effects."""

from __future__ import annotations

import math
from typing import Any

from avalanche_firn.benchmarks.streams import Stream
from avalanche_firn.evaluation.dynamics import TaskDynamics
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.plugins.zapping import ZappingPlugin

__all__ = ["DYNAMICS", "build_dynamics", "dynamics_figures", "zapping_protocol", "zapping_results"]

DYNAMICS = {
    "dynamics/learning": "learning, nats",
    "dynamics/interference": "interference, nats",
    "dynamics/synergy": "synergy, nats",
    "dynamics/forgetting": "forgetting of losses, nats",
}
"""Figures of a run and their headings in tables."""


def build_dynamics(config: Config, stream: Stream, evaluated: Any) -> TaskDynamics | None:
    """The metric of a run, on the continual stream's tasks (also for joint training); None where it isn't wanted.

    Raises:
        ConfigError: a task without images.
    """
    section = config.evaluation.dynamics
    if section is None:
        return None
    count = len(evaluated)

    def task_of(experience: Any) -> list[int]:
        whole = len(experience.origin_stream) != count
        return list(range(count)) if whole else [int(experience.current_experience)]

    try:
        return TaskDynamics(list(evaluated), **section.model_dump(), task_of=task_of)
    except ValueError as error:
        raise ConfigError(Problem("evaluation.dynamics", str(error))) from error


def dynamics_figures(metric: TaskDynamics | None) -> dict[str, float | None]:
    """Totals at the end of a run, by tag; empty where nothing was measured."""
    if metric is None:
        return {}
    found = metric.result()
    totals = found.totals()
    forgotten = [value for value in found.final_forgetting.tolist() if math.isfinite(value)]
    values = {
        "dynamics/learning": totals.learning,
        "dynamics/interference": totals.interference,
        "dynamics/synergy": totals.synergy,
        "dynamics/forgetting": sum(forgotten) / len(forgotten) if forgotten else math.nan,
    }
    return {tag: float(value) if math.isfinite(value) else None for tag, value in values.items()}


def zapping_protocol(config: Config) -> dict[str, Any]:
    """Whether rows of the classifier are redrawn, and whether rows of earlier tasks may be."""
    zapping = config.methods[0].zapping
    return {"zapping": None if zapping is None else f"{zapping.scope}, every {zapping.every} {zapping.schedule}"}


def zapping_results(strategy: Any) -> dict[str, Any] | None:
    """How many zaps there were and how many rows they redrew; None without zapping."""
    for plugin in strategy.plugins:
        if isinstance(plugin, ZappingPlugin):
            rows = sum(len(zap.rows) for zap in plugin.history)
            return {"zaps": len(plugin.history), "rows": rows, "past_rows": plugin.zapped_past}
    return None
