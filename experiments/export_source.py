"""The final model of a finished run, read from its folder alone: ``config.yaml``, ``results.json`` and ``checkpoint/``.

Neither the data nor a file of pre-trained weights is needed: the network is built with random weights, and everything
in it comes from the run's last checkpoint. SLCA and SLCA++ align their classifier when an evaluation begins, after that
checkpoint, so the alignment is repeated here from the statistics in it. Its random numbers are those of the device: a
run on a GPU needs one for that. Nothing is unpickled. Cost: network and checkpoint in memory, and the alignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from avalanche_firn.benchmarks.digits import CLASS_NAMES
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.export_formats import ExportError, FinalModel
from avalanche_firn.experiments.methods import Ingredients, build_strategy
from avalanche_firn.experiments.performance_section import changed_figures
from avalanche_firn.experiments.recipe import load_experiment, parse
from avalanche_firn.experiments.resources import build_backbone, stream_normalization
from avalanche_firn.experiments.results import FILE, read_results
from avalanche_firn.experiments.schema_rules import COSMETIC, digest_of
from avalanche_firn.experiments.sections import DigitsStreamConfig
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.checkpoint_files import CheckpointError, checkpoints, read_checkpoint
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.model_state import load_module_state
from avalanche_firn.plugins.plain_state import class_name, from_plain
from avalanche_firn.plugins.random_state import private_random_state
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

__all__ = ["final_model"]


def final_model(folder: Path, task: int | None = None) -> FinalModel:
    """The classifier that a finished run evaluated last, from its folder alone.

    Args:
        folder: of the run.
        task: LoRAC-IPC only: weights as after this task (1 for the first), without task inference.

    Raises:
        ExportError: not the folder of a finished run on a stream; a checkpoint that is damaged, of another
            configuration, or doesn't fit; weights that aren't finite; an alignment that can't be repeated on this
            machine; a task that isn't there.
    """
    config, results = _finished(folder)
    state = _last_state(folder, config, results)
    with private_random_state(), _threads(config.threads):
        backbone, strategy = _random_strategy(config)
        model = strategy.model
        head = getattr(model, "head", None)
        if not isinstance(model, FeatureClassifier) or not isinstance(head, TaskwiseLinearHead):
            kind = f"{type(model).__name__} with a {type(head).__name__}"
            raise ExportError(f"the model of {config.methods[0].strategy} is a {kind}, which has no export")
        try:
            load_module_state(model, state["model"], "model")
            _align(strategy, state, results)
            inference = _task_inference(strategy, state)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            text = " ".join(str(error).split())  # torch lists keys in lines
            raise ExportError(f"the checkpoint of {folder} doesn't fit its configuration: {text}") from error
    model.to("cpu").eval()
    broken = [n for n, t in model.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken or results.get("diverged"):
        named = f"weights that aren't finite: {', '.join(broken[:3])}" if broken else "said so in results.json"
        raise ExportError(f"the run in {folder} has diverged ({named}); it has no model to export")
    if task is not None:
        _check_task(model, task)
        inference = None
    ids = tuple(sorted(head.known_classes))
    labels = _labels(config, results, ids)
    cfg: dict[str, Any] = dict(backbone.module.pretrained_cfg)  # type: ignore[arg-type]
    return FinalModel(config, results, model, backbone.data_config, cfg, ids, labels, inference, task)


def _finished(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and results of a finished run on a stream, and a way on where there is none."""
    if not folder.is_dir():
        raise ExportError(f"{folder} isn't a folder; give the folder of a finished run")
    results = read_results(folder)
    if results is None:
        runs = sorted(path.parent for path in folder.rglob(FILE))
        if runs:
            listed = "".join(f"\n  {run}" for run in runs[:20]) + (f"\n  ... ({len(runs)} in all)" * (len(runs) > 20))
            raise ExportError(f"{folder} is the folder of a comparison; give one of its runs:{listed}")
        if not (folder / "config.yaml").is_file():
            raise ExportError(f"{folder} holds no run (no {FILE}); give the folder of a finished run")
        raise ExportError(f"the run in {folder} isn't finished; finish it with: firn resume {folder}")
    if results.get("experiment") == "transfer":
        raise ExportError(
            f"{folder} is a run of a transfer experiment, whose classifiers are made anew in every trial; its "
            f"pre-trained network is {folder / 'pretrained.safetensors'}, a state dict for timm.create_model with the "
            "network's name and arguments of config.yaml"
        )
    file = folder / "config.yaml"
    if not file.is_file():
        raise ExportError(f"{file} is missing; it says how the model of the run is built")
    config = load_experiment(file)
    raw = parse(file.read_text(encoding="utf-8"), source=str(file))
    # as it was written, too: a later version of this package may have further keys
    changed = changed_figures(raw.get("performance") or {})
    identity = {key: value for key, value in raw.items() if key not in COSMETIC}
    written = digest_of(identity | ({"performance": changed} if changed else {}), seeds=True)
    if isinstance(config, TransferExperiment) or results["config_digest"] not in (written, config.digest()):
        raise ExportError(f"{file} isn't the configuration that {folder / FILE} was made with")
    return config, results


def _last_state(folder: Path, config: Config, results: dict[str, Any]) -> dict[str, Any]:
    """State of the strategy at the end of training, from a checkpoint that is intact and of this run."""
    place = folder / "checkpoint"
    found = checkpoints(place)
    if not found:
        raise ExportError(f"{place} holds no checkpoint; it keeps the weights of the run, which are nowhere else")
    try:
        content = read_checkpoint(found[0])  # an older one would be another model
    except (CheckpointError, OSError, ValueError) as error:
        raise ExportError(f"the checkpoint of the run is damaged: {error}") from error
    expected = [results["config_digest"], results["stream"]["fingerprint"], results["backbone"]["weights_sha256"]]
    if str(content["fingerprint"]).split() != expected:
        raise ExportError(f"{found[0]} was made by another configuration, data or initial weights than {folder / FILE}")
    steps = content["strategy"]["clock"]["train_exp_counter"]
    if content["kind"] != "end" or steps != len(results["accuracy_matrix"]):
        raise ExportError(
            f"{found[0]} stands in training experience {steps} of {len(results['accuracy_matrix'])}, not at their end"
        )
    state: dict[str, Any] = content["strategy"]
    return state


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many threads as the run had, where its configuration says how many: they decide the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _random_strategy(config: Config) -> tuple[Backbone, SupervisedTemplate]:
    """The run's strategy as it is before training, its backbone with random weights, on the CPU."""
    section = config.backbone.model_copy(update={"pretrained": False, "weights": None})
    config = config.model_copy(update={"backbone": section})
    try:
        backbone = build_backbone(config)
    except ConfigError as error:
        ways = " (an architecture from a folder or from the hub is read from there: it has to be at hand)"
        raise ExportError(f"the network can't be built: {error}{ways if ':' in section.name else ''}") from error
    evaluator = EvaluationPlugin(loggers=[BaseLogger()])  # one that logs nothing
    normalization = stream_normalization(config, backbone.data_config)
    parts = Ingredients(config, backbone, torch.device("cpu"), [], evaluator, normalization=normalization)
    return backbone, build_strategy(parts)


def _saved(plugin: Any, state: dict[str, Any]) -> Any:
    """A plugin's own part of a checkpoint; its tensors come to the CPU, wherever they were."""
    own = next(saved for saved in state["plugins"] if saved["class"] == class_name(plugin))
    return from_plain(_on_cpu(own["state"]))


def _on_cpu(node: Any) -> Any:
    if isinstance(node, list):
        return [_on_cpu(part) for part in node]
    if isinstance(node, dict):
        return _on_cpu(node["$on"][1]) if set(node) == {"$on"} else {key: _on_cpu(part) for key, part in node.items()}
    return node


def _align(strategy: SupervisedTemplate, state: dict[str, Any], results: dict[str, Any]) -> None:
    """The alignment that the last evaluation began with, if it isn't in the checkpoint."""
    for plugin in strategy.plugins:
        if not isinstance(plugin, ClassifierAlignmentPlugin):
            continue
        saved = _saved(plugin, state)
        plugin.load_state_dict(saved)
        device = torch.device(results["cost"]["device"])
        works = saved["pending"] and plugin.epochs > 0 and strategy.model.head.num_tasks > 1
        if works and device.type == "cuda" and not torch.cuda.is_available():
            raise ExportError(
                "the run aligned its classifier on a CUDA device, after its last checkpoint, with random numbers that "
                "only such a device draws; export it on a machine with one"
            )
        if works and device.type == "cuda":
            strategy.model.to("cuda")
            plugin.gaussians.to("cuda")
        with torch.no_grad():  # as in an evaluation
            plugin.before_eval(SimpleNamespace(model=strategy.model))


def _task_inference(strategy: SupervisedTemplate, state: dict[str, Any]) -> TaskInferencePlugin | None:
    for plugin in strategy.plugins:
        if isinstance(plugin, TaskInferencePlugin):
            plugin.load_state_dict(_saved(plugin, state))
            return plugin
    return None


def _check_task(model: nn.Module, task: int) -> None:
    try:
        closed = LoRAComposition(model).num_closed
    except ValueError:
        closed = 0
    if not closed:
        raise ExportError("--task is for runs of lorac_ipc, which keep the weights of every task; leave it out here")
    if not 1 <= task <= closed:
        raise ExportError(f"--task is {task}; 1 to {closed} are accepted, the run's tasks")


def _labels(config: Config, results: dict[str, Any], ids: tuple[int, ...]) -> tuple[str, ...]:
    names = results["stream"].get("class_names")
    if names is None and isinstance(config.stream, DigitsStreamConfig):
        names = CLASS_NAMES
    return tuple(str(c) if names is None else str(names[c]) for c in ids)
