"""A long stream: 200 tasks of two classes with SLCA and with LoRAC-IPC, watched for whatever grows.

Small experiences (images of 16 pixels around a centre per class, a transformer of one block), and everything of a run
around them: fast path, our metrics, TensorBoard, CSV, checkpoints inside and after tasks. After each task the newest
five tasks are evaluated, and no more: an evaluation of all tasks seen grows by definition and would hide what doesn't.

Noted after each task, with all garbage collected: bytes in use of the heap and resident ones, Python's objects, tensors
and the bytes behind them, open files, threads, child processes, bytes on disk, and the seconds of the processor by
phase (so that disks and neighbours don't count). What may grow is documented: rows of the head with the copies that
alignment keeps, statistics of classes, pairs and scalars of tasks (those of all tasks for each: quadratic, 4 bytes
each) with the tables made of them, a line of metrics per task. Rows are slopes over the tasks after the first 20, and
the time of the last 20 tasks by that of the 20 after the first 20. How to read them: ``docs/soak.md``.

Each method runs in a process of its own, Python's objects in the same heap as everything else (``PYTHONMALLOC``), which
makes what is in use exact. Memory is known on Linux with glibc; elsewhere there are times and objects.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import TensorDataset

from avalanche_firn.evaluation import continual_metrics
from avalanche_firn.evaluation.device_metrics import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.experiments.csv_logger import CsvLogger
from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.task_inference import TaskInferencePlugin
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.slca import SLCA
from speed.holdings import Phases, alive, handles, memory, storages
from speed.measure import Row, Settings, in_fresh_process, make_row
from speed.rows import RESULTS
from speed.soak_report import DOCUMENT, figure, markdown
from speed.workload import stream_of, with_targets

__all__ = ["METHODS", "record", "report", "rows", "slope", "soak_rows"]

BENCHMARK = "soak"
EDGE, PATCH, WIDTH = 16, 8, 64
CLASSES, TRAIN, TEST, BATCH, EPOCHS = 2, 12, 4, 8, 2  # classes of a task, images of a class, of a step, epochs
EVALUATED = 5
TASKS, WARM, QUICK = 200, 20, (12, 4)
SAMPLES = 16  # rows of alignment per class and epoch
# Allowed beside documented bytes: of a tensor (measured: 1.6 kB for a parameter of two numbers with its gradient, and
# its names), of a task (our choice), of a type of ctypes (measured: 6.1 kB)
TENSOR, TASK, POINTER = 2048, 12 * 1024, 7 * 1024
FRAGMENTED = 2.5  # resident bytes by bytes in use


# ----------------------------------------------------------------------------------------------------- the stream
def tasks(count: int) -> Any:
    """An Avalanche benchmark of `count` tasks: images (3, 16, 16) around a random centre per class."""
    generator = torch.Generator().manual_seed(0)

    def part(task: int, each: int, centres: Tensor) -> TensorDataset:
        noise = torch.randn(CLASSES, each, 3, EDGE, EDGE, generator=generator)
        labels = torch.arange(CLASSES).repeat_interleave(each) + CLASSES * task
        return with_targets((centres[:, None] + noise).flatten(0, 1), labels)

    train, test = [], []
    for task in range(count):
        centres = torch.randn(CLASSES, 3, EDGE, EDGE, generator=generator)
        train.append(part(task, TRAIN, centres))
        test.append(part(task, TEST, centres))
    return stream_of(train, test)


def _slca(**shared: Any) -> SLCA:
    return SLCA(**shared, alignment=ClassifierAlignmentPlugin(epochs=2, samples_per_class=SAMPLES), milestones=[1])


def _lorac_ipc(**shared: Any) -> LoRACIPC:
    return LoRACIPC(
        **shared,
        rank=1,
        importance=ImportantParameterPlugin(0.05, window=4),
        alignment=ClassifierAlignmentPlugin.tap(epochs=2, samples_per_class=SAMPLES, clusters=2),
        task_inference=TaskInferencePlugin(2),
    )


METHODS: dict[str, Callable[..., Any]] = {"SLCA": _slca, "LoRAC-IPC": _lorac_ipc}


# --------------------------------------------------------------------------------------------------- what is noted
def _documented(strategy: Any) -> int:
    """Bytes that may grow: the model with its rows and pairs, what it keeps beside them, the statistics of classes."""
    kept: list[Tensor] = []
    for tensor in (*strategy.model.parameters(), *strategy.model.buffers()):
        kept += [tensor] if tensor.grad is None else [tensor, tensor.grad]
    for module in strategy.model.modules():
        if isinstance(module, TaskwiseLinearHead) and module._snapshot is not None:
            kept += [tensor for part in module._snapshot.values() for tensor in part]
        if isinstance(module, ComposedLoRALinear):
            kept += [tensor for value in module._kept.values() for tensor in value if isinstance(tensor, Tensor)]
    stores = [getattr(plugin, name, None) for plugin in strategy.plugins for name in ("gaussians", "inference")]
    return sum(storages(kept).values()) + sum(store.nbytes for store in stores if store is not None)


def _on_disk(folder: Path) -> dict[str, int]:
    events = sum(path.stat().st_size for path in folder.glob("events.out.tfevents.*"))
    newest = max((folder / "checkpoint").glob("step-*"), default=None)
    stored = sum(path.stat().st_size for path in newest.iterdir()) if newest is not None else 0
    return {"events": events, "table": (folder / "metrics.csv").stat().st_size, "checkpoint": stored}


@contextmanager
def _run(method: str, folder: Path, plugins: Sequence[SupervisedPlugin]) -> Iterator[tuple[Any, Phases]]:
    """A strategy with everything of a run around it, and the clock of its phases."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=EDGE, patch_size=PATCH, embed_dim=WIDTH, depth=1, num_heads=2, num_classes=0, mlp_ratio=2
    )
    phases, grown = Phases(), [folder / "events.out.tfevents.*", folder / "metrics.csv"]
    checkpoint = ExactCheckpointPlugin(folder / "checkpoint", every=50, append_only=grown)
    board, table = TensorboardLogger(folder), CsvLogger(folder / "metrics.csv")
    evaluator = EvaluationPlugin(
        *continual_metrics(streams=["test"]),
        *device_accuracy_metrics(),
        *device_loss_metrics(),
        loggers=[board, table],
        collect_all=False,
    )
    strategy = METHODS[method](
        model=model,
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        eval_mb_size=64,
        plugins=[FastPathPlugin(), *plugins, checkpoint],
        evaluator=evaluator,
    )
    for plugin in strategy.plugins:
        if isinstance(plugin, ClassifierAlignmentPlugin):
            phases.around(plugin, "_after_task", "statistics")
            phases.around(plugin, "align", "alignment")
        if isinstance(plugin, TaskInferencePlugin):
            phases.around(plugin, "_measure", "statistics")
    phases.around(strategy, "training_epoch", "training")
    phases.around(strategy, "eval", "evaluation")
    phases.around(checkpoint, "_save", "saving")
    try:
        checkpoint.resume(strategy)
        yield strategy, phases
    finally:
        board.writer.close()
        table.close()
        checkpoint.close()


def record(method: str, count: int, plugins: Sequence[SupervisedPlugin] = ()) -> list[dict[str, Any]]:
    """Train and evaluate a stream of `count` tasks; what is noted after each.

    Args:
        method: of `METHODS`. plugins: further ones.
    """
    benchmark, noted = tasks(count), list[dict[str, Any]]()
    gc.collect()
    gc.freeze()  # the modules and the stream needn't be looked through after every task
    try:
        with tempfile.TemporaryDirectory(prefix="firn-soak-") as place, _run(method, Path(place), plugins) as run:
            strategy, phases = run
            for index in range(count):
                phases.take()
                start = time.process_time()
                strategy.train(benchmark.train_stream[index], eval_streams=[])
                strategy.eval(benchmark.test_stream[max(0, index + 1 - EVALUATED) : index + 1])
                whole, seconds = time.process_time() - start, phases.take()
                seconds["other"] = whole - sum(seconds.values())
                facts = {**memory(), **handles(), **alive(), **_on_disk(Path(place))}
                noted.append({"task": index + 1, "seconds": seconds, "documented": _documented(strategy), **facts})
    finally:
        gc.unfreeze()
    return noted


# ------------------------------------------------------------------------------------------------------------- rows
def slope(noted: Sequence[dict[str, Any]], name: str, warm: int) -> float | None:
    """Growth of a figure per task: the median of the slopes of all pairs of tasks after the first `warm`."""
    points = [(row["task"], row[name]) for row in noted[warm:] if row[name] is not None]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2)]
    return statistics.median(slopes) if slopes else None


def _times(noted: Sequence[dict[str, Any]], phase: str, warm: int) -> tuple[float, float]:
    """Median seconds of a phase in the tasks after the first `warm`, and in as many at the end."""
    seconds = [row["seconds"].get(phase, 0.0) for row in noted]
    return statistics.median(seconds[warm : 2 * warm]), statistics.median(seconds[-warm:])


def _operations(task: float) -> float:
    """Multiplications of an alignment, but for a factor: rows of all classes times their width, and their logits."""
    classes = CLASSES * task
    return classes * (TRAIN + 4 * classes)


def _time_bounds(method: str, warm: int, count: int) -> dict[str, float]:
    """Largest ratios of the last tasks' time to that of the first ones, as the curves of single parts have them."""
    first, last = 1.5 * warm, count - 0.5 * warm
    alignment = 1.1 * _operations(last) / _operations(first)
    if method == "SLCA":
        return {"training": 1.15, "statistics": 1.25, "alignment": alignment}
    # the history of a step grows by a rank per task; docs/speed-curves.md: 1.54 times from 5 to 100 past tasks
    return {"training": 2.5, "statistics": 2.5, "alignment": alignment}


def soak_rows(method: str, noted: Sequence[dict[str, Any]], settings: Settings) -> list[Row]:
    """Rows of one method from what was noted in its stream."""
    count, warm = len(noted), QUICK[1] if settings.quick else WARM
    case = f"{method}, {count} tasks of {CLASSES} classes, the newest {EVALUATED} evaluated after each"
    names = ("documented", "heap", "resident", "objects", "tensors", "tensor_bytes", "pointer_types", "events", "table")
    slopes = {name: slope(noted, name, warm) for name in (*names, "checkpoint")}
    step = max(1, count // 50)
    series: dict[str, list[Any]] = {name: [row[name] for row in noted[::step]] for name in ("task", *names[:3])}
    series["seconds"] = [{k: round(v, 5) for k, v in row["seconds"].items()} for row in noted[::step]]
    found: list[Row] = []

    def add(what: str, ratio: float | None, to_what: str, quantity: str, bound: float | None, **details: Any) -> None:
        given: dict[str, Any] = {"ratio": ratio, "to_what": to_what, "quantity": quantity, "bound": bound}
        found.append(make_row(BENCHMARK, case, what, settings, **given, details=details))

    told: dict[str, Any] = {f"{name}_per_task": value for name, value in slopes.items()}
    documented, tensors = slopes["documented"] or 0.0, slopes["tensor_bytes"] or 0.0
    undocumented = (tensors - documented) / TASK
    add(
        "bytes of tensors",
        undocumented,
        "12 KiB a task beside what is documented",
        "memory",
        1.0,
        **told,
        series=series,
    )
    if slopes["heap"] is not None and slopes["resident"] is not None:
        allowed = documented + TENSOR * (slopes["tensors"] or 0.0) + POINTER * (slopes["pointer_types"] or 0.0) + TASK
        add("bytes in use", slopes["heap"] / allowed, "what is accounted for", "memory", 1.0, allowed_per_task=allowed)
        add("resident bytes", slopes["resident"] / slopes["heap"], "bytes in use", "memory", FRAGMENTED)
    for name in ("files", "threads", "children"):
        first, last = (statistics.median(row[name] for row in part) for part in (noted[:warm], noted[-warm:]))
        add(name, last / first if first else 1.0 + last, f"the first {warm} tasks", "handles", 1.0, last=last)
    for phase in ("training", "statistics", "alignment", "evaluation", "saving", "other"):
        first, last = _times(noted, phase, warm)
        bound = None if settings.quick else _time_bounds(method, warm, count).get(phase)
        times = {"first_seconds": first, "last_seconds": last}
        add(phase, last / first if first else None, f"tasks {warm + 1} to {2 * warm}", "time", bound, **times)
    return found


def rows(settings: Settings) -> list[Row]:
    """Both methods, or the one that `--case` names."""
    chosen = [method for method in METHODS if settings.wants(method)]
    if not chosen:
        raise ValueError(f"--case is {settings.case!r}; of soak accepted: {', '.join(METHODS)}")
    count = QUICK[0] if settings.quick else TASKS
    found: list[Row] = []
    before = os.environ.get("PYTHONMALLOC")
    os.environ["PYTHONMALLOC"] = "malloc"  # for the processes that follow
    try:
        for method in chosen:
            found += soak_rows(method, in_fresh_process("speed.soak:record", method=method, count=count), settings)
    finally:
        if before is None:
            del os.environ["PYTHONMALLOC"]
        else:
            os.environ["PYTHONMALLOC"] = before
    return found


def report(found: Sequence[Row], folder: Path) -> None:
    """Figure and table beside a record; the table of the repository's own record stands in docs/."""
    document = DOCUMENT if folder.resolve() == RESULTS else folder / DOCUMENT.name
    figure(found, folder / "soak.svg")
    document.write_text(markdown(found), encoding="utf-8")
    print(f"written to {folder / 'soak.svg'} and {document}")
