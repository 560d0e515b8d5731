"""Pre-train a network in one of the ways of a transfer experiment, resumable inside, and keep its weights."""

from __future__ import annotations

import glob
import math
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.streams import Stream, build_stream
from avalanche_firn.evaluation.metrics import LearningRates, ResultMatrixMetric, TrainingLoss
from avalanche_firn.experiments.environment import seed_everything
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.methods import make_optimizer
from avalanche_firn.experiments.progress import ProgressPlugin
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.experiments.transfer_data import TransferData
from avalanche_firn.experiments.transfer_sections import ASBConfig, IidConfig, MetaASBConfig
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.checkpoint_files import checkpoints, matching_files
from avalanche_firn.plugins.event_files import abandon
from avalanche_firn.plugins.finite_guard import FiniteGuardPlugin
from avalanche_firn.plugins.finite_words import nonfinite_stop
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.storage_stop import writing
from avalanche_firn.plugins.zapping import ZappingPlugin
from avalanche_firn.strategies.zapping import ASB, MetaASB

__all__ = ["build_network", "held_out_figures", "pretrain", "pretraining_strategy", "pretraining_stream"]

WEIGHTS = "pretrained.safetensors"
_EVENTS = "events.out.tfevents.*"


def build_network(config: TransferExperiment, data: TransferData) -> nn.Module:
    """The network of an experiment with random weights.

    Raises:
        ConfigError: an unknown network or argument, fewer outputs than classes, images it can't take.
    """
    section, classes = config.network, data.pretrain.num_classes
    outputs = classes if section.outputs is None else section.outputs
    if outputs < classes:
        raise ConfigError(
            Problem("network.outputs", f"{outputs} for {classes} classes", f"at least {classes}, or null")
        )
    arguments = {"in_chans": data.pretrain.images.shape[1], **section.arguments}
    try:
        model: nn.Module = timm.create_model(section.name, pretrained=False, num_classes=outputs, **arguments)
        with torch.no_grad():
            logits = model.eval()(data.held_out.pixels([0]))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(Problem("network", str(error) or type(error).__name__)) from error
    if logits.shape != (1, outputs):
        raise ConfigError(Problem("network", f"gives outputs of shape {tuple(logits.shape)}", f"(images, {outputs})"))
    return model.train()


def pretraining_stream(data: TransferData) -> Stream:
    """All pre-training classes in one experience, tested on the held-out images."""
    count = data.pretrain.num_classes
    return build_stream(
        "pretraining",
        train=data.pretrain.dataset(),
        test=data.held_out.dataset(),
        class_order=tuple(range(count)),
        task_sizes=(count,),
        class_names=data.pretrain.class_names,
        fingerprint=data.fingerprint,
    )


def pretraining_strategy(
    config: TransferExperiment, model: nn.Module, device: torch.device, plugins: list[Any], evaluator: EvaluationPlugin
) -> SupervisedTemplate:
    """The strategy of the configuration's only method."""
    method, seed = config.methods[0], config.seeds[0]
    if config.precision != "fp32":
        plugins = [MixedPrecisionPlugin(config.precision), *plugins]
    common = {"model": model, "device": device, "evaluator": evaluator, "eval_mb_size": 256}
    if isinstance(method, IidConfig):
        zaps = []
        if method.zap:
            zaps = [
                ZappingPlugin.pretraining(
                    every=method.zap_every,
                    fraction=method.zap_fraction,
                    reference=method.zap_init == "kaiming_normal_joint",
                    seed=seed,
                )
            ]
        return Naive(
            **common,
            optimizer=make_optimizer(method.optimizer, model),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=method.batch_size,
            train_epochs=method.epochs,
            plugins=[*zaps, *plugins],
        )
    assert isinstance(method, ASBConfig)
    kind = MetaASB if isinstance(method, MetaASBConfig) else ASB
    settings = method.model_dump(exclude={"name", "strategy"})
    return kind(**common, **settings, seed=seed, plugins=plugins)


def pretrain(
    config: TransferExperiment, data: TransferData, folder: Path, device: torch.device, *, bar: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The pre-trained network of a run and its figures, from the folder where it has been trained before.

    An interrupted pre-training goes on from its last checkpoint and ends with the same weights.

    Raises:
        ConfigError: the folder holds weights of another configuration or other images.

    Returns:
        The network on the device, and ``accuracy``, ``loss`` on the held-out images of the pre-training classes.
    """
    method, seed = config.methods[0], config.seeds[0]
    seed_everything(seed)
    model = build_network(config, data).to(device)
    weights = folder / WEIGHTS
    made_from = f"{config.digest()} {data.fingerprint}"
    if weights.is_file():
        _check_origin(weights, made_from)
        model.load_state_dict(load_file(weights, device=str(device)))
    elif method.strategy != "untrained":
        _train(config, data, model, folder, device, bar)
    if not weights.is_file():
        temporary = folder / f".{WEIGHTS}.tmp"
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        try:
            with writing("the pre-trained weights", weights):
                save_file(tensors, temporary, metadata={"made_from": made_from})
                temporary.replace(weights)
        finally:
            temporary.unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return model, held_out_figures(model, data.held_out, device)


def _check_origin(weights: Path, made_from: str) -> None:
    """ConfigError where stored weights belong to another configuration or to other images."""
    with safe_open(weights, framework="pt") as file:
        stored = (file.metadata() or {}).get("made_from")
    if stored != made_from:
        raise ConfigError(
            f"{weights} was pre-trained with another configuration or on other images; use --fresh to start over"
        )


def _train(
    config: TransferExperiment, data: TransferData, model: nn.Module, folder: Path, device: torch.device, bar: bool
) -> None:
    method, seed = config.methods[0], config.seeds[0]
    stream = pretraining_stream(data)
    place, grown = folder / "checkpoint", [f"{glob.escape(str(folder))}/{_EVENTS}"]
    if checkpoints(place):
        ExactCheckpointPlugin.rewind(place, grown)
    else:
        for path in matching_files(grown):
            path.unlink()
    checkpoint = ExactCheckpointPlugin(
        place,
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        fingerprint=f"{config.digest()} {data.fingerprint}",
        append_only=grown,
    )
    board = TensorboardLogger(folder)
    metrics = [ResultMatrixMetric(prefix="pretraining/"), TrainingLoss(every=100), LearningRates()]
    evaluator = EvaluationPlugin(*metrics, loggers=[board], collect_all=False)
    plugins: list[Any] = [checkpoint]
    if bar:
        plugins.insert(0, ProgressPlugin(label=f"{method.name} seed {seed}", tasks=1))
    try:
        strategy = pretraining_strategy(config, model, device, plugins, evaluator)
        strategy.plugins.insert(0, FiniteGuardPlugin())
        seed_everything(seed)  # again: drawing the weights must not shift the order of the data
        checkpoint.resume(strategy)
        if not checkpoint.is_trained(stream.train[0]):
            strategy.train(stream.train[0], eval_streams=[])
        strategy.eval(stream.test)
    except BaseException:
        abandon(board.writer)
        raise
    finally:
        checkpoint.close()
    board.writer.close()  # raises if an event was lost


@torch.no_grad()
def held_out_figures(model: nn.Module, images: ClassImages, device: torch.device) -> dict[str, float]:
    """Accuracy and mean cross-entropy (nats) on held-out images, in evaluation mode and float32."""
    model.eval()
    losses, hits = [], []
    rows = torch.arange(len(images))
    for chosen in rows.split(256):
        logits = model(images.pixels(chosen, device=device))
        labels = images.labels[chosen].to(device)
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(1) == labels)
    found = {"accuracy": float(torch.cat(hits).double().mean()), "loss": float(torch.cat(losses).double().mean())}
    if not math.isfinite(found["loss"]):
        raise nonfinite_stop(None, "the held-out images of the pre-training", f"their loss is {found['loss']}")
    return found
