"""One run of a transfer experiment: pre-train once, then transfer with every optimizer; ends in ``results.json``.

An interrupted pre-training resumes exactly; the transfers, minutes at most, start over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from avalanche_firn.evaluation.tensorboard import log_hparams, log_text_config
from avalanche_firn.experiments.environment import describe_environment, resolve_device, seed_everything
from avalanche_firn.experiments.pretraining import WEIGHTS, pretrain
from avalanche_firn.experiments.recipe import dump
from avalanche_firn.experiments.results import FILE, FORMAT, RunResults, read_results, write_json, write_text
from avalanche_firn.experiments.resume_settings import declared, given, with_earlier
from avalanche_firn.experiments.run_folders import claimed
from avalanche_firn.experiments.run_stops import Standing, told_stops
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.experiments.transfer_data import TransferData
from avalanche_firn.experiments.transfer_protocols import FIGURES, Transfers, number, run_transfers, transfer_figures
from avalanche_firn.experiments.transfer_sections import TransferOptimizerConfig
from avalanche_firn.plugins.checkpoint_files import checkpoints
from avalanche_firn.plugins.event_files import quiet_writers
from avalanche_firn.plugins.storage_stop import writing
from avalanche_firn.strategies.transfer import TransferResult

__all__ = ["FIGURES", "dynamics_file", "run"]

_SUFFIX = ".transfer"  # of the event file that is written at the end


def dynamics_file(folder: Path, optimizer: str) -> Path:
    """Where the losses of single tasks lie, as ``Dynamics.to_dict`` wrote them."""
    return folder / f"dynamics-{optimizer}.json"


def _rows(results: Sequence[TransferResult]) -> list[list[float]]:
    return [run.curve.tolist() for run in results]


def _described(transfers: Transfers, section: TransferOptimizerConfig) -> dict[str, Any]:
    """Plain values of all transfers with one optimizer."""
    sweeps = {
        name: {
            "rates": list(sweep.rates),
            "accuracy": sweep.accuracy[:, :, -1].tolist(),
            "diverged": sweep.diverged.tolist(),
            "at_edge": sweep.at_edge,
            "envelope": sweep.envelope().tolist(),
        }
        for name, sweep in transfers.sweeps.items()
    }
    return {
        "optimizer": section.model_dump(exclude={"label"}),
        "rates": transfers.rates,
        "sweeps": sweeps,
        "figures": transfer_figures(transfers),
        "logged_after": list(transfers.continual[0].logged_after),
        "continual": {"curves": _rows(transfers.continual), "accuracy": [run.accuracy for run in transfers.continual]},
        "iid": {"accuracy": [run.accuracy for run in transfers.iid]},
        "shocks": [{"size": number(s.size), "iterations": s.iterations} for s in transfers.shocks],
        "diverged": any(run.diverged for run in [*transfers.continual, *transfers.iid]),
    }


def run(
    config: TransferExperiment,
    folder: Path,
    data: TransferData,
    *,
    quiet: bool = False,
    say: Callable[[str], None] | None = print,
    watch: RunWatch | None = None,
    running: TransferExperiment | None = None,
) -> dict[str, Any]:
    """Pre-train with one method and seed and transfer with all optimizers, or read what is finished.

    One process at a time works on the folder: it is locked before anything is written.

    Args:
        config: with one method and one seed.
        folder: of the run; made if needed. The caller has checked that it holds no other run.
        data: see :func:`~avalanche_firn.experiments.transfer_data.build_data`.
        quiet: no progress bar of the pre-training, no line per transfer. say: takes the lines; None for silence.
        watch: told of the pre-training and of every transfer, and draws the bars, in the place of `quiet` and `say`.
        running: how the run goes on, where that differs from `config`, which stays what the run is.

    Returns:
        The content of ``results.json``.

    Raises:
        CheckpointError: another process works on the folder, or its checkpoints can't be used.
        RunError: memory or disk end the run, or numbers that aren't finite; its last checkpoint is kept.
    """
    done = read_results(folder)
    if done is not None:
        return done
    running = config if running is None else running
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in given(config, running).items())
    standing = Standing(running, folder, settings)
    watch = RunWatch.alone(config, folder, quiet=quiet, say=say) if watch is None else watch
    with told_stops(standing), claimed(folder), quiet_writers():
        done = read_results(folder)  # another process may have finished it in the meantime
        return done if done is not None else _run(config, running, standing, data, watch)


def _run(
    own: TransferExperiment, config: TransferExperiment, standing: Standing, data: TransferData, watch: RunWatch
) -> dict[str, Any]:
    """The run itself. `own`: what it is. `config`: how it computes now."""
    start, folder = time.perf_counter(), standing.folder
    method, seed = config.methods[0], config.seeds[0]
    standing.device = device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(seed)
    environment = _record(own, config, folder, device)
    model, held_out = pretrain(
        own.model_copy(update={"checkpoint": config.checkpoint}), data, folder, device, bar=watch.bars
    )
    trained = time.perf_counter() - start
    watch.pretrained({f"pretraining/{name}": value for name, value in held_out.items()}, trained)
    optimizers: dict[str, Any] = {}
    pictures: list[tuple[str, Transfers]] = []
    for section in config.transfer.optimizers:
        begun = time.perf_counter()
        transfers = run_transfers(config, section, model, data, device, held_out["loss"])
        optimizers[section.label] = _described(transfers, section)
        pictures.append((section.label, transfers))
        if transfers.dynamics is not None:
            with writing("losses of single tasks", dynamics_file(folder, section.label)):
                write_json(dynamics_file(folder, section.label), transfers.dynamics.to_dict())
        if transfers.landscape is not None:
            with writing("a loss landscape", folder / f"landscape-{section.label}"):
                _save(transfers.landscape, folder / f"landscape-{section.label}")
        now = time.perf_counter()
        count = len(config.transfer.optimizers) / len(optimizers)
        whole = trained + (now - start - trained) * count  # as if the others took as long
        figures = optimizers[section.label]["figures"]
        watch.transferred(section.label, figures, now - begun, share=(now - start) / whole, so_far=now - start)
    results = {
        "format": FORMAT,
        "experiment": "transfer",
        "recipe": config.name,
        "method": method.name,
        "strategy": method.strategy,
        "seed": seed,
        "config_digest": own.digest(),
        "group_digest": own.digest(seeds=False),
        "data": {"source": config.data.name, "fingerprint": data.fingerprint, "description": str(data)},
        "network": {"name": config.network.name, "parameters": sum(p.numel() for p in model.parameters())},
        "protocol": {
            "task_identity_at_test": False,
            "replay": method.strategy in ("asb", "meta_asb"),  # of pre-training images, in the pre-training only
            "zap": getattr(method, "zap", False),
            "rates_chosen_on": _chosen_on(config),
            "trainable": config.transfer.trainable,
            "head": config.transfer.head,
            "tasks": config.transfer.tasks or data.transfer[0].num_classes,
            "trials": config.transfer.trials,
        },
        "pretraining": held_out,
        "optimizers": optimizers,
        "cost": {
            "seconds": time.perf_counter() - start,
            "pretraining_seconds": trained,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
    }
    if resumed_with := declared(environment):
        results["performance"] = {"resumed_with": resumed_with}
    _log(own, folder, results, pictures)
    with writing("the results of a run", folder / FILE):
        write_json(folder / FILE, results)
    return RunResults(results, folder)


def _record(own: TransferExperiment, config: TransferExperiment, folder: Path, device: torch.device) -> dict[str, Any]:
    """Write config.yaml and environment.json, and give what stands in the latter."""
    with writing("the settings of a run", folder / "config.yaml"):
        write_text(folder / "config.yaml", dump(own))
    environment, path = describe_environment(device), folder / "environment.json"
    changed = given(own, config)
    found = checkpoints(folder / "checkpoint")
    environment["from"] = found[0].name if found else WEIGHTS if (folder / WEIGHTS).is_file() else "start"
    if changed:
        environment["settings"] = changed
    with writing("the environment of a run", path):
        environment = with_earlier(path, environment)
        write_json(path, environment)
    return environment


def _save(landscape: Any, stem: Path) -> None:
    """Write the files of a landscape anew; what has their names may be a stranger's link."""
    for end in (".npz", "-loss.png", "-accuracy.png"):
        stem.with_name(f"{stem.name}{end}").unlink(missing_ok=True)
    landscape.save(stem)


def _chosen_on(config: TransferExperiment) -> str:
    """Which classes decided the rates of the transfers."""
    if all(len(optimizer.rates) == 1 for optimizer in config.transfer.optimizers):
        return "given"
    return "transfer classes (test)" if config.transfer.select == "test_envelope" else "validation"


def _log(
    config: TransferExperiment, folder: Path, results: dict[str, Any], pictures: Sequence[tuple[str, Transfers]]
) -> None:
    """Curves, figures and pictures for TensorBoard, all at once at the end."""
    figures: dict[str, float | None] = {}
    for path in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):  # of an attempt that broke off here
        path.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        log_text_config(writer, dump(config))
        for label, transfers in pictures:
            described = results["optimizers"][label]
            for step, value in zip(
                described["logged_after"], np.mean(described["continual"]["curves"], 0), strict=True
            ):
                writer.add_scalar(f"transfer/{label}/continual", value, step)
            figures |= {f"{label}/{name}": value for name, value in described["figures"].items()}
            if transfers.dynamics is not None:
                for name, figure in transfers.dynamics.figures().items():
                    writer.add_figure(f"dynamics/{label}/{name}", figure, 0)
            if transfers.landscape is not None:
                writer.add_figure(f"landscape/{label}", transfers.landscape.figure(), 0)
        figures |= {f"pretraining/held-out-{name}": value for name, value in results["pretraining"].items()}
        log_hparams(writer, config.identity() | {"seeds": results["seed"]}, figures)
