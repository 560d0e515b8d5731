"""What a run of LoRAC-IPC leaves beside accuracies: what was frozen, how orthogonal the pairs are, inferred tasks."""

from __future__ import annotations

from typing import Any

from avalanche_firn.experiments.config import Config, LoRACIPCConfig
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

__all__ = ["lora_curves", "lora_protocol", "lora_results"]


def lora_curves(strategy: Any) -> dict[str, list[float | None]]:
    """Figures after every task, by tag; empty for other methods."""
    curves: dict[str, list[float | None]] = {}
    for plugin in strategy.plugins:
        if isinstance(plugin, LoRACompositionPlugin):
            for name in plugin.overlaps[-1]:
                curves[f"lorac/overlap/{name}"] = [overlap[name] for overlap in plugin.overlaps]
        elif isinstance(plugin, ImportantParameterPlugin):
            curves["lorac/frozen"] = [float(len(names)) for names in plugin.frozen_after]
            for name in next((scores for scores in plugin.scores_after if scores is not None), ()):
                values = [None if scores is None else scores[name] for scores in plugin.scores_after]
                curves[f"lorac/importance/{name}"] = values
        elif isinstance(plugin, TaskInferencePlugin):
            steps = range(1, strategy.clock.train_exp_counter + 1)
            curves["lorac/task-inference"] = [plugin.accuracies.get(step) for step in steps]
    return curves


def lora_protocol(config: Config) -> dict[str, Any]:
    """Whether tasks are inferred at test time, and whether whole test batches vote, which leaks the task."""
    method = config.methods[0]
    section = method.task_inference if isinstance(method, LoRACIPCConfig) else None
    return {
        "task_inference": section is not None,
        "batchwise_vote": section is not None and section.batchwise_vote,
        "official_k_gate": isinstance(method, LoRACIPCConfig) and method.official_k_gate,
    }


def lora_results(strategy: Any) -> dict[str, Any] | None:
    """Names of the matrices frozen after each task, and of all that may be; None for other methods."""
    for plugin in strategy.plugins:
        if isinstance(plugin, ImportantParameterPlugin):
            frozen = [list(names) for names in plugin.frozen_after]
            return {"frozen": frozen, "matrices": plugin.matrices(strategy)}
    return None
