"""The transfers of one pre-trained network with one optimizer: rates, accuracies, dynamics, landscape.

The rate of each protocol is chosen on validation classes before a transfer class is looked at, unless the configuration
asks for the released notebooks' choice on the transfer classes. All networks and optimizers meet the same class orders
and the same classifier draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from avalanche_firn.evaluation.dynamics import Dynamics, Shock, TaskDynamics
from avalanche_firn.evaluation.landscape import Landscape, trajectory_landscape
from avalanche_firn.evaluation.trajectory import Trajectory
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.experiments.transfer_data import TransferData, tasks_of
from avalanche_firn.experiments.transfer_sections import TransferOptimizerConfig
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.strategies.transfer import TransferResult, continual_transfer, iid_transfer
from avalanche_firn.strategies.transfer_start import TransferTask
from avalanche_firn.strategies.transfer_sweep import RateSweep, sweep_rates

__all__ = ["FIGURES", "Transfers", "number", "run_transfers", "transfer_figures"]

FIGURES = {
    "continual/accuracy": "top-1 over all transfer classes after the last one, mean over the trials",
    "iid/accuracy": "top-1 after the i.i.d. transfer, mean over the trials",
    "iid/shock": "loss of the transfer classes before the first step minus that of the pre-training classes, nats",
    "iid/recovery": "iterations until only a fraction of the shock remained",
    "dynamics/learning": "what learning a class took off its own loss, nats summed over the classes",
    "dynamics/interference": "what learning a class added to losses of earlier ones, nats summed over all pairs",
    "dynamics/synergy": "what it took off losses of earlier ones, nats summed over all pairs",
    "dynamics/forgetting": "rise of a class's loss from the end of its turn to the end, nats, mean over the classes",
}
"""What a row of the table holds."""


def _optimizer(section: TransferOptimizerConfig) -> Callable[..., Any]:
    if section.name == "sgd":
        return partial(SGD, momentum=section.momentum, weight_decay=section.weight_decay)
    return partial(Adam if section.name == "adam" else AdamW, weight_decay=section.weight_decay)


@dataclass(frozen=True)
class Transfers:
    """The transfers of one pre-trained network with one optimizer."""

    rates: dict[str, float]
    """Chosen rate per protocol."""
    sweeps: dict[str, RateSweep]
    """Per protocol, where there were several rates."""
    continual: list[TransferResult]
    iid: list[TransferResult]
    dynamics: Dynamics | None
    """Of the first continual trial."""
    shocks: list[Shock]
    """Shock and recovery of each i.i.d. trial."""
    landscape: Landscape | None


def run_transfers(
    config: TransferExperiment,
    section: TransferOptimizerConfig,
    model: nn.Module,
    data: TransferData,
    device: torch.device,
    before: float,
) -> Transfers:
    """Choose rates, transfer, measure.

    Args:
        config: with one seed.
        section: the optimizer.
        model: pre-trained, left as it is.
        before: its loss on held-out images of the pre-training classes, nats: the level that a shock rises from.
    """
    settings, seed = config.transfer, config.seeds[0]
    optimizer = _optimizer(section)
    shared: dict[str, Any] = {
        "optimizer": optimizer,
        "trainable": settings.trainable,
        "head": settings.head,
        "outputs": data.transfer[0].num_classes,
        "device": device,
    }
    protocols: dict[str, tuple[Callable[..., TransferResult], dict[str, Any]]] = {
        "continual": (continual_transfer, {**shared, "log_every": settings.log_every})
    }
    if settings.iid_epochs:
        own = {"epochs": settings.iid_epochs, "batch_size": settings.iid_batch_size}
        protocols["iid"] = (iid_transfer, {**shared, **own})
    tasks = tasks_of(data.transfer, device)
    sweeps, rates = {}, {}
    for name, (transfer, own) in protocols.items():
        if len(section.rates) > 1:
            sweeps[name] = _sweep(config, section, transfer, model, data, device, own)
        rates[name] = sweeps[name].best if name in sweeps else section.rates[0]
    runs: dict[str, list[TransferResult]] = {name: [] for name in protocols}
    dynamics, landscape, shocks = None, None, []
    for trial in range(settings.trials):
        order = np.random.default_rng([seed, trial]).permutation(len(tasks))[: settings.tasks]
        chosen, names = [tasks[i] for i in order], [data.transfer[0].class_names[i] for i in order]
        draw = derived_seed(seed, 3, trial) % 2**31
        for name, (transfer, own) in protocols.items():
            options: dict[str, Any] = {**own, "lr": rates[name], "seed": draw}
            follow, path = None, None
            if name == "iid":  # few steps, each of which counts for the recovery
                follow = _follow(config, chosen, names, every=1)
            elif trial == 0:
                follow = _follow(config, chosen, names, every=None)
                path = None if config.landscape is None else _Path(config, model, len(chosen))
                options["after_task"] = path
            run = transfer(model, chosen, **options, dynamics=follow)
            runs[name].append(run)
            if path is not None:
                landscape = path.landscape(run.model, chosen, device)
            if follow is None or config.dynamics is None:
                continue
            if name == "iid":
                shocks.append(follow.result().shock(before, fraction=config.dynamics.recovery_fraction))
            else:
                dynamics = follow.result()
    return Transfers(rates, sweeps, runs["continual"], runs.get("iid", []), dynamics, shocks, landscape)


def _sweep(
    config: TransferExperiment,
    section: TransferOptimizerConfig,
    transfer: Callable[..., TransferResult],
    model: nn.Module,
    data: TransferData,
    device: torch.device,
    settings: dict[str, Any],
) -> RateSweep:
    """All rates, on the validation classes or, as the released notebooks do, on the transfer classes."""
    envelope = config.transfer.select == "test_envelope"
    pair = data.transfer if envelope else data.validation
    assert pair is not None  # the configuration was checked
    own = settings | {"outputs": None}
    if transfer is continual_transfer:
        own |= {"shuffle_tasks": True, "log_every": settings["log_every"] if envelope else None}
    first = derived_seed(config.seeds[0], 2) % 2**31
    trials = config.transfer.sweep_trials
    return sweep_rates(transfer, model, tasks_of(pair, device), section.rates, trials=trials, seed=first, **own)


class _Path:
    """Snapshots along a continual transfer, and the landscape around them."""

    def __init__(self, config: TransferExperiment, model: nn.Module, tasks: int) -> None:
        assert config.landscape is not None
        self.section = config.landscape
        dead: list[str] = getattr(model, "dead_parameters", list)()
        self.trajectory = Trajectory(part=self.section.part, ignore=dead)
        self.every = max(1, tasks // (self.section.snapshots - 1))

    def __call__(self, model: nn.Module, done: int) -> None:
        if done % self.every == 0:
            self.trajectory.record(model, step=done, label="start" if done == 0 else "")

    def landscape(self, model: nn.Module, tasks: Sequence[TransferTask], device: torch.device) -> Landscape | None:
        """None where the weights didn't move in two directions."""
        images, labels = torch.cat([t.test_images for t in tasks]), torch.cat([t.test_labels for t in tasks])
        try:
            return trajectory_landscape(
                model, images, labels, self.trajectory, points=self.section.points, device=device
            )
        except ValueError as error:
            warnings.warn(f"no landscape: {error}", RuntimeWarning, stacklevel=2)
            return None


def _follow(
    config: TransferExperiment, tasks: Sequence[TransferTask], names: Sequence[str], *, every: int | None
) -> TaskDynamics | None:
    section = config.dynamics
    if section is None:
        return None
    return TaskDynamics(
        [(task.test_images, task.test_labels) for task in tasks],
        every=section.every if every is None else every,
        max_tasks=section.tasks,
        images_per_task=section.images_per_task,
        task_names=names,
        images=False,
    )


def transfer_figures(transfers: Transfers) -> dict[str, float | None]:
    """The row of a table, see :data:`FIGURES`; None where a figure isn't defined (a network that never recovered)."""
    found: dict[str, float | None] = dict.fromkeys(FIGURES)
    found["continual/accuracy"] = float(np.mean([run.accuracy for run in transfers.continual]))
    if transfers.iid:
        found["iid/accuracy"] = float(np.mean([run.accuracy for run in transfers.iid]))
    if transfers.shocks:
        found["iid/shock"] = _mean([shock.size for shock in transfers.shocks])
        found["iid/recovery"] = _mean([shock.iterations for shock in transfers.shocks])
    if transfers.dynamics is not None:
        totals = transfers.dynamics.totals()
        found["dynamics/learning"] = number(totals.learning)
        found["dynamics/interference"] = number(totals.interference)
        found["dynamics/synergy"] = number(totals.synergy)
        forgotten = transfers.dynamics.final_forgetting
        if np.isfinite(forgotten).any():
            found["dynamics/forgetting"] = float(np.nanmean(forgotten))
    return found


def number(value: float) -> float | None:
    """The value, None where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(known)) if len(known) == len(values) else None
