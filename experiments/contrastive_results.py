"""What a run of a contrastive method leaves beside accuracies: its coefficient, its losses, and the theory's bounds."""

from __future__ import annotations

from typing import Any

from avalanche_firn.benchmarks.streams import Stream
from avalanche_firn.evaluation.contrastive_report import ContrastiveBound
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.methods import METHODS
from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin

__all__ = ["build_bound", "contrastive_bound_results", "contrastive_curves"]


def build_bound(config: Config, stream: Stream, evaluated: Any) -> ContrastiveBound | None:
    """The metric of the bounds on the evaluated images, for a contrastive method whose recipe asks for it."""
    section = config.evaluation.contrastive_bound
    if section is None or not METHODS[config.methods[0].strategy].contrastive:
        return None
    return ContrastiveBound(
        evaluated,
        **section.model_dump(),
        batch_size=config.training.eval_batch_size,
        num_workers=config.training.num_workers,
    )


def contrastive_curves(strategy: Any, bound: ContrastiveBound | None) -> dict[str, list[float | None]]:
    """Figures after every task, by tag; empty for other methods."""
    losses = strategy._criterion
    found = losses.history() if isinstance(losses, ContrastiveDistillationPlugin) else {}
    return found | ({} if bound is None else bound.curves())


def contrastive_bound_results(bound: ContrastiveBound) -> dict[str, Any]:
    """The bounds of every task, and in words what they are worth."""
    return {"tasks": bound.result(), "remarks": bound.summary_lines()}
