"""What a run with classifier alignment (SLCA, SLCA++, TAP of LoRAC-IPC) leaves beside accuracies: how that went."""

from __future__ import annotations

from typing import Any

from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin

__all__ = ["slca_curves"]

_NAMES = ("loss-first", "loss-last", "head-change")


def slca_curves(strategy: Any) -> dict[str, list[float | None]]:
    """Figures after every task, by tag; None for a task that wasn't aligned, as the first; empty for other methods."""
    for plugin in strategy.plugins:
        if isinstance(plugin, ClassifierAlignmentPlugin) and plugin.history:
            by_task = {entry["task"]: entry for entry in plugin.history}
            tasks = range(strategy.clock.train_exp_counter)
            return {f"slca/alignment/{name}": [by_task.get(t, {}).get(name) for t in tasks] for name in _NAMES}
    return {}
