"""Data and our contestants of the stream benchmark (``stream.py``): stage 1 by hand, and the strategy as a run has it.

A job is a dict of plain values that ``stream.py`` writes: contestant, seed, class order, tasks, epochs, milestones,
batch size, rates, backbone, weights, overrides of the recipe, mean and deviation, device, threads, precision, and the
files to read and write.
Cost: that of the training; images are normalised once, before the clock starts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.benchmarks.streams import Stream, task_sizes
from avalanche_firn.benchmarks.streams import build_stream as stream_of_datasets
from avalanche_firn.benchmarks.tensors import TensorImageDataset
from avalanche_firn.experiments import runner
from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.environment import seed_everything
from avalanche_firn.experiments.methods import Ingredients, build_strategy
from avalanche_firn.experiments.recipe import apply_override
from avalanche_firn.experiments.resources import build_stream, stream_normalization
from avalanche_firn.models.backbones import Backbone, load_backbone
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from speed.memory import MemoryMark, synchronise

__all__ = [
    "BARE",
    "OURS",
    "OURS_BF16",
    "Problem",
    "configuration",
    "load_given",
    "make_problem",
    "run_bare",
    "run_job",
    "run_ours",
]

BARE, OURS, OURS_BF16 = "stage 1 alone", "ours", "ours, bf16"
Orders = Callable[[int, int, int], Tensor]


class Problem(NamedTuple):
    """uint8 images (N, H, W, 3) and int64 class ids (N,), 0 to C - 1 in both parts."""

    train_images: np.ndarray
    train_targets: np.ndarray
    test_images: np.ndarray
    test_targets: np.ndarray

    @property
    def classes(self) -> int:
        """C."""
        return int(self.train_targets.max()) + 1


def make_problem(
    config: Config, data_config: dict[str, Any], images: int | None = None, test_images: int | None = None
) -> Problem:
    """Decodes the stream of a configuration once, resized for the backbone.

    Args:
        config: see :func:`configuration`.
        data_config: of the backbone.
        images, test_images: only the first ones of each class, to train and to test; None: all.

    Raises:
        ConfigError: no data, a file that is no image.
        ValueError: transforms whose images aren't uint8 before they are normalised.
    """
    stream = build_stream(config, data_config, seed=0)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stream_normalization(config, data_config))
    parts: list[np.ndarray] = []
    for experiences, most in ((stream.train, images), (stream.test, test_images)):
        samples = [(x, int(y)) for experience in experiences for x, y, *_ in experience.dataset.eval()]
        levels = (torch.stack([x for x, _ in samples]) * std + mean) * 255  # back to what was decoded
        pixels = levels.round()
        if float((levels - pixels).abs().max()) > 0.01:
            raise ValueError(
                f"images of {stream.name} are no whole grey levels; accepted: transforms that end in uint8"
            )
        targets = np.array([y for _, y in samples], dtype=np.int64)
        rows = np.concatenate([np.flatnonzero(targets == c)[:most] for c in range(stream.num_classes)])
        parts += [pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()[rows], targets[rows]]
    return Problem(*parts)


def _load_problem(path: str) -> Problem:
    with np.load(path, allow_pickle=False) as arrays:
        return Problem(*(arrays[name] for name in Problem._fields))


def _in_memory(images: np.ndarray, targets: np.ndarray, job: dict[str, Any]) -> TensorImageDataset:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return TensorImageDataset(pixels, targets.tolist(), mean=job["mean"], std=job["std"])


def load_given(job: dict[str, Any]) -> Backbone:
    """The backbone of all contestants, with the fresh final norm that the public code makes."""
    weights = job["weights"]
    return load_backbone(job["backbone"], pretrained=weights is None, weights=weights, fresh_final_norm=True)


def run_bare(job: dict[str, Any], problem: Problem, orders: Orders | None = None) -> tuple[dict[str, Any], nn.Module]:
    """Stage 1 by hand, as a careful person writes it.

    Args:
        job: see the module.
        problem: the images.
        orders: ``(task, epoch, images of the task) -> rows`` int64; default: shuffled.

    Returns:
        Seconds, images trained and MiB; and the trained backbone.
    """
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    loaded = load_given(job)
    backbone = loaded.module.to(device)
    data = _in_memory(problem.train_images, problem.train_targets, job)
    images, targets = (part.to(device) for part in data.batch(range(len(data))))
    order, sizes = torch.tensor(job["class_order"], device=device), task_sizes(problem.classes, job["tasks"])
    seed_everything(job["seed"])
    orders = orders or (lambda task, epoch, count: torch.randperm(count))
    backbone.train()
    clock, trained = _Clock(device), 0
    for task, classes in enumerate(torch.split(order, list(sizes))):
        classes = classes.sort().values
        mine = torch.isin(targets, classes)
        x, y = images[mine], (targets[mine][:, None] == classes).int().argmax(1)
        head = nn.Linear(loaded.num_features, len(classes), device="meta").to_empty(device=device)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        slow = {"params": backbone.parameters(), "lr": job["lr"] * job["backbone_scale"]}
        optimizer = torch.optim.SGD(
            [slow, {"params": head.parameters()}],
            lr=job["lr"],
            momentum=job["momentum"],
            weight_decay=job["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, job["milestones"])
        for epoch in range(job["epochs"]):
            for rows in orders(task, epoch, len(x)).to(device).split(job["batch_size"]):
                optimizer.zero_grad()
                F.cross_entropy(head(backbone(x[rows])), y[rows]).backward()
                optimizer.step()
                trained += len(rows)
            schedule.step()
    spent = clock.stop()
    return {**spent, "stage1_seconds": spent["seconds"], "images": trained}, backbone


def configuration(job: dict[str, Any]) -> Config:
    """The recipe of our contestants with the job's overrides; its stream is replaced by the images in memory.

    Raises:
        ConfigError: a setting that can't be.
    """
    milestones = job["milestones"]
    raw: dict[str, Any] = {
        "name": "stream",
        "seeds": [job["seed"]],
        "device": job["device"],
        "precision": job["precision"],
        "threads": job["threads"],
        "backbone": {"name": job["backbone"], "weights": job["weights"], "fresh_final_norm": True},
        "stream": _stream_section(job["data"], job["tasks"]),
        "training": {
            "epochs": job["epochs"],
            "batch_size": job["batch_size"],
            "optimizer": {
                "name": "sgd",
                **{name: job[name] for name in ("lr", "momentum", "weight_decay")},
            },
            "schedule": {"name": "multistep", "milestones": milestones} if milestones else {"name": "none"},
        },
        "checkpoint": {"every": 0, "keep": 1},  # after each task, as the public code saves its weights
        "methods": [
            {
                "strategy": "slca",
                "backbone_scale": job["backbone_scale"],
                "alignment": {
                    "epochs": job["alignment_epochs"],
                    "samples_per_class": job["alignment_rows_per_class"],
                    **{name: job[name] for name in ("lr", "momentum", "weight_decay", "temperature")},
                },
            }
        ],
    }
    for text in job.get("overrides", ()):
        apply_override(raw, text)
    return validate(raw)


def _stream_section(data: str | None, tasks: int) -> dict[str, Any]:
    if data is None:
        return {"name": "digits", "tasks": tasks}
    return {"name": "folder", "root": data, "tasks": tasks, "augment": False, "validation_fraction": 0.0}


def run_ours(job: dict[str, Any], problem: Problem, plugins: Sequence[Any] = ()) -> tuple[dict[str, Any], Any]:
    """The whole stream as ``experiments/runner.py`` runs it.

    Args:
        job: see the module.
        problem: the images.
        plugins: further ones, after the method's own.

    Returns:
        Seconds, images trained, accuracies in 0..1 and MiB; and the strategy.
    """
    torch.set_num_threads(job["threads"])
    device, folder, config = torch.device(job["device"]), Path(job["folder"]), configuration(job)
    backbone = load_given(job)
    stream = _stream(job, problem)
    seed_everything(job["seed"])
    clock = _Clock(device)
    checkpoint = ExactCheckpointPlugin(
        folder / "checkpoint", every=config.checkpoint.every, keep=config.checkpoint.keep,
        append_only=[folder / "events.out.tfevents.*", folder / "metrics.csv"],
    )  # fmt: skip
    try:
        # the runner's own recorder and loop, so that what is timed is what a run does
        with runner._recorder(config, folder, stream, stream.test, FeatureCache()) as recorder:
            strategy = build_strategy(
                Ingredients(config, backbone, device, [checkpoint, *plugins], recorder.evaluator, FeatureCache())
            )
            if not any(isinstance(plugin, FastPathPlugin) for plugin in strategy.plugins):
                strategy.plugins.insert(0, FastPathPlugin())
            seed_everything(job["seed"])
            for _ in runner._train(config, strategy, checkpoint, stream, stream.test):
                pass
    finally:
        checkpoint.close()
    spent = clock.stop()
    matrix, training = recorder.matrix.matrix, recorder.efficiency.result()
    curve = [matrix.summary(step)["accuracy/last"] for step in range(len(stream.train))]
    result = {
        **spent,
        "stage1_seconds": training["seconds"],
        "images": int(training["images"]),
        "accuracy_last": curve[-1],
        "accuracy_incremental": statistics.fmean(v for v in curve if v is not None),
    }
    return result, strategy


def _stream(job: dict[str, Any], problem: Problem) -> Stream:
    classes = problem.classes
    return stream_of_datasets(
        "stream",
        train=_in_memory(problem.train_images, problem.train_targets, job),
        test=_in_memory(problem.test_images, problem.test_targets, job),
        class_order=job["class_order"],
        task_sizes=task_sizes(classes, job["tasks"]),
        class_names=[str(c) for c in range(classes)],
        fingerprint="in memory",
    )


class _Clock:
    """Seconds by the clock and of the processor, and MiB, from now to :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.memory = device, MemoryMark(device)
        self.memory.start()
        synchronise(device)
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, Any]:
        """``seconds``, ``cpu_seconds`` of all threads together and ``peak_memory_MiB`` (see ``memory.py``)."""
        synchronise(self.device)
        spent = {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.cpu_start}
        return {**spent, "peak_memory_MiB": self.memory.stop()}


def run_job(path: Path) -> None:
    """One of our contestants, in a process of its own."""
    job = json.loads(path.read_text(encoding="utf-8"))
    problem = _load_problem(job["problem"])
    result, _ = run_bare(job, problem) if job["contestant"] == BARE else run_ours(job, problem)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
