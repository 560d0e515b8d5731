"""One run: one method, one seed, from a configuration to ``results.json``.

A run that was interrupted goes on from its last checkpoint when it is called again, and ends with the same figures,
weights and scalars as if it had never stopped; only wall-clock figures (``efficiency/...`` and `cost`) differ.
"""

from __future__ import annotations

import glob
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate

from avalanche_firn.benchmarks.streams import Stream
from avalanche_firn.evaluation.contrastive_report import ContrastiveBound
from avalanche_firn.evaluation.device_metrics import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.evaluation.drift import RepresentationDrift
from avalanche_firn.evaluation.dynamics import TaskDynamics
from avalanche_firn.evaluation.efficiency import Efficiency
from avalanche_firn.evaluation.matrix import ResultMatrix
from avalanche_firn.evaluation.metrics import ResultMatrixMetric, continual_metrics
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.evaluation.task_confusion import WITHIN_TASK, TaskConfusion
from avalanche_firn.evaluation.task_incremental import TASK_PREFIX, TaskIncrementalMatrixMetric
from avalanche_firn.evaluation.tensorboard import log_hparams, log_text_config
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.contrastive_results import (
    build_bound,
    contrastive_bound_results,
    contrastive_curves,
)
from avalanche_firn.experiments.csv_logger import CsvLogger
from avalanche_firn.experiments.dynamics_results import (
    build_dynamics,
    dynamics_figures,
    zapping_protocol,
    zapping_results,
)
from avalanche_firn.experiments.environment import (
    describe_environment,
    own_device,
    processes_of,
    resolve_device,
    seed_everything,
    use_deterministic,
)
from avalanche_firn.experiments.lora_results import lora_curves, lora_protocol, lora_results
from avalanche_firn.experiments.methods import METHODS, Ingredients, build_strategy
from avalanche_firn.experiments.performance_section import FIGURES as PERFORMANCE
from avalanche_firn.experiments.progress import RunClock
from avalanche_firn.experiments.recipe import dump
from avalanche_firn.experiments.resources import (
    build_backbone,
    build_probes,
    build_stream,
    evaluated_stream,
    hold_stream,
    stream_normalization,
)
from avalanche_firn.experiments.results import FILE, FORMAT, RunResults, read_results, write_json, write_text
from avalanche_firn.experiments.resume_settings import declared, given, with_earlier
from avalanche_firn.experiments.run_folders import claimed
from avalanche_firn.experiments.run_stops import Standing, told_stops
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.slca_results import slca_curves
from avalanche_firn.experiments.tensorboard_table import RUN_SECONDS, hyper_parameters
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.models.processes import process_count, process_rank
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.checkpoint_files import checkpoints, matching_files, refuse_links, sync
from avalanche_firn.plugins.checkpoint_fit import experiences_left
from avalanche_firn.plugins.distributed import DistributedPlugin
from avalanche_firn.plugins.event_files import abandon, quiet_writers
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.finite_guard import FiniteGuardPlugin
from avalanche_firn.plugins.process_group import first_process_first, wait_for_all
from avalanche_firn.plugins.run_errors import StorageError
from avalanche_firn.plugins.storage_stop import writing

__all__ = ["run"]

_METRICS = "metrics.csv"
_GROWN = ("events.out.tfevents.*", _METRICS)  # files that a run only appends to
_STREAMS = {"test": "test", "validation": "valid"}  # split of the configuration -> Avalanche's stream name


@dataclass(frozen=True)
class _Recorder:
    """The metrics of a run and where they are written."""

    matrix: ResultMatrixMetric
    given_task: TaskIncrementalMatrixMetric | None
    confusion: TaskConfusion
    probes: list[RepresentationProbe]
    bound: ContrastiveBound | None
    dynamics: TaskDynamics | None
    efficiency: Efficiency
    evaluator: EvaluationPlugin
    board: TensorboardLogger | None
    table: CsvLogger | None
    """Both None in a distributed run's other processes."""


@contextmanager
def _recorder(config: Config, folder: Path, stream: Stream, evaluated: Any, cache: FeatureCache) -> Iterator[_Recorder]:
    section = config.evaluation
    probes = build_probes(config, stream, evaluated, cache)
    drift = section.drift
    images = stream.joint().train[0].dataset if drift is not None else None
    extra: list[Any] = [*probes, *([] if drift is None else [RepresentationDrift(images, **drift.model_dump())])]
    name, kind = _STREAMS[section.split], section.forgetting
    metrics = continual_metrics(streams=[name], forgetting_kind=kind)
    given_task = TaskIncrementalMatrixMetric(stream=name, forgetting_kind=kind) if section.task_incremental else None
    bound = build_bound(config, stream, evaluated)
    dynamics = build_dynamics(config, stream, evaluated)
    confusion = TaskConfusion(stream=name)
    extra += [metric for metric in (given_task, confusion, bound, dynamics) if metric is not None]
    board, table = _loggers(folder)
    evaluator = EvaluationPlugin(
        *metrics,
        *extra,
        *device_accuracy_metrics(),
        *device_loss_metrics(),
        loggers=[logger for logger in (board, table) if logger is not None],
        collect_all=False,
    )
    matrix = next(metric for metric in metrics if isinstance(metric, ResultMatrixMetric))
    efficiency = next(metric for metric in metrics if isinstance(metric, Efficiency))
    try:
        yield _Recorder(matrix, given_task, confusion, probes, bound, dynamics, efficiency, evaluator, board, table)
    except BaseException:
        if board is not None and table is not None:
            abandon(board.writer)
            with suppress(StorageError):  # what ended the run is told, and not that a full disk is still full
                table.close()
        raise
    if board is not None and table is not None:
        board.writer.close()  # raises if an event was lost
        table.close()


def _loggers(folder: Path) -> tuple[TensorboardLogger, CsvLogger] | tuple[None, None]:
    """What writes a run's scalars, in the process that writes."""
    if process_rank() != 0:
        return None, None
    table = CsvLogger(folder / _METRICS)
    try:
        return TensorboardLogger(folder), table
    except BaseException:
        table.close()
        raise


def run(
    config: Config,
    folder: Path,
    *,
    quiet: bool = False,
    say: Callable[[str], None] | None = print,
    images: dict[str, Any] | None = None,
    watch: RunWatch | None = None,
    running: Config | None = None,
) -> dict[str, Any]:
    """Train one method with one seed in `folder`, or finish an interrupted run there; a finished one is only read.

    One process at a time works on the folder: it is locked before anything is read for the run or written.

    Args:
        config: with one method and one seed, see :meth:`Config.single`.
        folder: of the run; made if needed. The caller has checked that it holds no other run.
        quiet: no progress bars and no line per experience.
        say: takes the line per experience; None for silence.
        images: decoded ones, which runs with the same dictionary share.
        watch: told of every experience, and draws the bars, in the place of `say`.
        running: how the run goes on, where that differs from `config`, which stays what the run is; see
            :mod:`~avalanche_firn.experiments.resume_settings`.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: the backbone, the data or the device can't be had; nothing has been written then.
        CheckpointError: another process works on the folder, or its checkpoints can't be used.
        RunError: memory, disk or images end the run, or numbers that aren't finite; its last checkpoint is kept.
    """
    done = read_results(folder)
    if done is not None:
        return done
    running = config if running is None else running
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in given(config, running).items())
    standing = Standing(running, folder, settings)
    # in a distributed run every process does all of it, and the first one writes
    held = claimed(folder) if process_rank() == 0 else nullcontext()
    with told_stops(standing), held, quiet_writers():
        done = read_results(folder)  # another process may have finished it in the meantime
        return done if done is not None else _run(config, running, standing, quiet, say, images, watch)


def _run(
    own: Config,
    config: Config,
    standing: Standing,
    quiet: bool,
    say: Callable[[str], None] | None,
    images: dict[str, Any] | None,
    watch: RunWatch | None,
) -> dict[str, Any]:
    """The run itself. `own`: what it is. `config`: how it computes now."""
    folder = standing.folder
    method, seed = config.methods[0], config.seeds[0]
    main = process_rank() == 0
    standing.device = device = own_device(resolve_device(config.device))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    use_deterministic(config.deterministic)
    seed_everything(seed)
    backbone = build_backbone(config)
    standing.stream = build_stream(config, backbone.data_config, seed)
    with first_process_first():  # it decodes and keeps the images; the others find them
        stream, held = hold_stream(config, standing.stream, device, folder, quiet=quiet or not main, cache=images)
    standing.held = held
    evaluated = evaluated_stream(config, stream)
    continual = stream
    if METHODS[method.strategy].joint:
        stream = stream.joint()
    refuse_links(folder / "checkpoint")
    place, grown = folder / "checkpoint", [f"{glob.escape(str(folder))}/{name}" for name in _GROWN]
    resumed = bool(checkpoints(place))
    if main:
        with writing("the settings of a run", folder / "config.yaml"):
            write_text(folder / "config.yaml", dump(own))
        if resumed:
            ExactCheckpointPlugin.rewind(place, grown)
        else:  # killed before its first checkpoint, if there is anything at all
            with writing("what a run appends to, begun anew", folder):
                for path in matching_files(grown):
                    path.unlink()
    checkpoint = ExactCheckpointPlugin(
        place,
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        fingerprint=f"{own.digest()} {stream.fingerprint} {backbone.weights_sha256}",
        append_only=grown,
    )
    environment: dict[str, Any] = {}
    if main:
        begun = {"images": held, "from": checkpoints(place)[0].name if resumed else "start"}
        if changed := given(own, config):
            begun["settings"] = changed
        environment = _record_environment(folder, device, backbone, begun, resumed=resumed)
    clock, cache = RunClock(), FeatureCache()
    watch = RunWatch.alone(config, folder, quiet=quiet, say=say) if watch is None else watch
    try:
        with _recorder(config, folder, continual, evaluated, cache) as recorder:
            plugins: list[SupervisedPlugin] = [*_fast_path(config), checkpoint]
            normalization = stream_normalization(config, backbone.data_config)
            standing.strategy = strategy = build_strategy(
                Ingredients(config, backbone, device, plugins, recorder.evaluator, cache, normalization)
            )
            if process_count() > 1:
                strategy.plugins.insert(_after_own(strategy), DistributedPlugin())
            if config.performance.finite_guard:
                strategy.plugins.insert(0, FiniteGuardPlugin())  # before those that make something of the weights
            if main and (bars := watch.plugin(len(stream.train))) is not None:
                strategy.plugins.insert(0, bars)  # before others: it shows what they begin
            strategy.plugins.insert(0, clock)  # first: what others do before an evaluation counts
            seed_everything(seed)  # again: what loading the backbone drew must not shift the order of the data
            if recorder.board is not None and not resumed:
                log_text_config(recorder.board.writer, dump(own))
            for index in _train(config, strategy, checkpoint, stream, evaluated):
                watch.experience(
                    index=index,
                    tasks=len(stream.train),
                    classes=sorted(stream.train[index].classes_in_this_experience),
                    figures=recorder.matrix.matrix.summary(index),
                    seconds=clock.seconds,
                )
            results = _results(own, stream, backbone, recorder, strategy, clock.seconds)
            if resumed_with := declared(environment):
                results["performance"]["resumed_with"] = resumed_with
            if (processes := processes_of(environment)) != [1]:
                results["performance"]["processes"] = processes
            seconds = {RUN_SECONDS: results["cost"]["seconds"]}
            if recorder.board is not None:
                log_hparams(recorder.board.writer, hyper_parameters(own), seconds, experiment=False)
        if main:
            with writing("the results of a run", folder / FILE):
                for path in matching_files(grown):
                    sync(path)  # where there are results, everything that they come from is on the disk
                write_json(folder / FILE, results)
    finally:
        watch.close()
        checkpoint.close()
    if main:
        for older in checkpoints(place)[1:]:
            shutil.rmtree(older, ignore_errors=True)
    wait_for_all()
    return RunResults(results, folder)


def _after_own(strategy: SupervisedTemplate) -> int:
    """Place of a plugin that comes after all of the method's, before Avalanche's evaluator."""
    return next(i for i, plugin in enumerate(strategy.plugins) if isinstance(plugin, EvaluationPlugin))


def _fast_path(config: Config) -> list[SupervisedPlugin]:
    section = config.performance
    if not section.fast_path:
        return []
    return [
        FastPathPlugin(
            one_pass=section.one_pass_evaluation,
            prefetch_factor=section.prefetch_factor,
            persistent_workers=section.persistent_workers,
            worker_timeout=section.worker_timeout,
        )
    ]


def _train(
    config: Config, strategy: SupervisedTemplate, checkpoint: ExactCheckpointPlugin, stream: Stream, evaluated: Any
) -> Iterator[int]:
    """Train and evaluate from where the checkpoint stands; yields the index of every experience that is done."""
    workers = {"num_workers": config.training_of(config.methods[0]).num_workers}
    start = checkpoint.resume(strategy)
    if config.evaluation.streams == "all" and strategy.clock.train_iterations == 0:
        strategy.eval(evaluated, **workers)  # the baseline of forward transfer
    for index, experience in enumerate(experiences_left(stream.train, start), start):
        if not checkpoint.is_trained(experience):
            strategy.train(experience, eval_streams=[], **workers)
        whole = config.evaluation.streams == "all" or len(stream.train) != len(evaluated)
        strategy.eval(evaluated if whole else evaluated[: index + 1], **workers)
        yield index


def _record_environment(
    folder: Path, device: torch.device, backbone: Backbone, more: dict[str, Any], *, resumed: bool
) -> dict[str, Any]:
    """Write environment.json; a resumed run keeps the first one and adds the one that it goes on in.

    Returns:
        All that stands there now.
    """
    environment = describe_environment(device) | {
        "backbone": {"tag": backbone.tag, "weights": backbone.weights, "weights_sha256": backbone.weights_sha256},
        **more,
    }
    path = folder / "environment.json"
    with writing("the environment of a run", path):
        environment = with_earlier(path, environment) if resumed else environment
        write_json(path, environment)
    return environment


def _curves(matrix: ResultMatrix, prefix: str = "") -> dict[str, list[float | None]]:
    """Every figure after every step."""
    steps = [matrix.summary(t) for t in range(matrix.shape[0])]
    return {f"{prefix}{name}": [step[name] for step in steps] for name in steps[-1]}


def _matrices(matrix: ResultMatrix) -> dict[str, Any]:
    """The accuracies per step and task, and the counts that they come from."""
    accuracy = [[None if math.isnan(v) else v for v in row] for row in matrix.accuracy.tolist()]
    return {"accuracy_matrix": accuracy, "matrix": matrix.to_dict()}


def _results(
    config: Config,
    stream: Stream,
    backbone: Backbone,
    recorder: _Recorder,
    strategy: SupervisedTemplate,
    seconds: float,
) -> dict[str, Any]:
    method, matrix = config.methods[0], recorder.matrix.matrix
    given_task = None if recorder.given_task is None else recorder.given_task.matrix
    kind = METHODS[method.strategy]
    curves: dict[str, Any] = _curves(matrix) | ({} if given_task is None else _curves(given_task, TASK_PREFIX))
    curves |= {name: curve for probe in recorder.probes for name, curve in probe.curves().items()}
    curves |= contrastive_curves(strategy, recorder.bound) | lora_curves(strategy) | slca_curves(strategy)
    within = recorder.confusion.curve()
    curves |= {WITHIN_TASK: within} if within else {}
    return {
        "format": FORMAT,
        "recipe": config.name,
        "method": method.name,
        "strategy": method.strategy,
        "seed": config.seeds[0],
        "config_digest": config.digest(),
        "group_digest": config.digest(seeds=False),
        "stream": {
            "source": stream.name.removesuffix("-joint"),
            "split": config.evaluation.split,
            "fingerprint": stream.fingerprint,
            "class_order": list(stream.class_order),
            "class_names": list(stream.class_names),
            "task_sizes": [len(e.classes_in_this_experience) for e in stream.test],
        },
        "backbone": {"tag": backbone.tag, "weights": backbone.weights, "weights_sha256": backbone.weights_sha256},
        "protocol": {
            "task_identity_at_test": False,  # of the main figures
            "task_incremental_figures": given_task is not None,
            "replay": kind.replay,
            "replay_slots": method.rehearsal.mem_size if kind.replay else None,  # type: ignore[union-attr]
            "joint": kind.joint,
            "evaluated": config.evaluation.streams,
            "forgetting": matrix.forgetting_kind,
            **lora_protocol(config),
            **zapping_protocol(config),
        },
        "performance": _performance(config, strategy),
        "figures": {name: curve[-1] for name, curve in curves.items()} | dynamics_figures(recorder.dynamics),
        "curves": curves,
        **_matrices(matrix),
        "task_incremental": None if given_task is None else _matrices(given_task),
        "task_confusion": {"counts": recorder.confusion.result()},
        "probes": [
            {"protocol": probe.protocol(), "matrices": {name: m.to_dict() for name, m in probe.matrices.items()}}
            for probe in recorder.probes
        ],
        "contrastive_bound": None if recorder.bound is None else contrastive_bound_results(recorder.bound),
        "lora": lora_results(strategy),
        "zapping": zapping_results(strategy),
        "dynamics": None if recorder.dynamics is None else recorder.dynamics.result().to_dict(),
        "diverged": not all(bool(p.isfinite().all()) for p in strategy.model.parameters()),
        "cost": _cost(recorder.efficiency, strategy, seconds),
    }


def _performance(config: Config, strategy: SupervisedTemplate) -> dict[str, Any]:
    """What was in use of the things that may change figures."""
    asked = config.performance.model_dump(include=set(PERFORMANCE))
    if not config.performance.fast_path and config.training_of(config.methods[0]).num_workers:
        asked["fast_path"] = False  # random transforms draw other numbers then
    return asked | {"fused_optimizer": bool(strategy.optimizer.defaults.get("fused"))}


def _cost(efficiency: Efficiency, strategy: SupervisedTemplate, seconds: float) -> dict[str, Any]:
    """Cost of the run. Peak memory on a CPU is that of the process, which runs of one comparison share."""
    spent = efficiency.result()
    shared = [plugin for plugin in strategy.plugins if isinstance(plugin, DistributedPlugin) and plugin.batches]
    exchanged = {"exchanged_bytes_per_batch": shared[0].bytes_given // shared[0].batches} if shared else {}
    return {
        "seconds": seconds,
        "training_seconds": spent["seconds"],
        "images_per_second": spent["images"] / spent["seconds"] if spent["seconds"] > 0 else None,
        "peak_memory_MiB": spent["peak-memory-MiB"],
        "trainable_parameters": int(spent["trainable-parameters"]),
        "device": str(strategy.device),
        "threads": torch.get_num_threads(),
        **exchanged,
    }
