"""Accuracy and loss summed on the device: everything that Avalanche's metrics emit, to the bit; state; no reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, task_incremental_benchmark, with_task_labels
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.evaluation import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.evaluation.device_metrics import DeviceAccuracy, DeviceLoss

pytestmark = pytest.mark.filterwarnings("ignore")


class Collector:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.values: list[tuple[str, int, float]] = []

    def log_metrics(self, values: list[Any]) -> None:
        self.values += [(v.name, v.x_plot, v.value) for v in values]


def emitted(metrics: list[Any], stream: Any, *, output: Any = None, plugins: Any = (), size: int = 7) -> list[Any]:
    """Train and evaluate, and give every value: (name, x, value), in order."""
    torch.manual_seed(0)
    collector = Collector()
    model = nn.Linear(6, 6)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        eval_mb_size=size,
        evaluator=EvaluationPlugin(*metrics, loggers=[collector], collect_all=False),
        plugins=list(plugins),
    )
    if output is not None:
        forward = strategy.forward
        strategy.forward = lambda: forward() if strategy.is_training else output(forward())
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[stream.test_stream[:1]])
        strategy.eval(stream.test_stream)
    return collector.values


def build(stream_of: Any, kind: str) -> Any:
    torch.manual_seed(1)
    x, y = torch.randn(101, 6), torch.arange(101) % 6
    if kind == "tasks":  # a label of its own for each task
        parts = {}
        for name in ("train", "test"):
            parts[name] = TensorDataset(x, y)
            parts[name].targets = y.tolist()
        benchmark = class_incremental_benchmark(parts, class_order=range(6), num_classes_per_exp=[1, 3, 2])
        return task_incremental_benchmark(with_task_labels(benchmark), reset_task_labels=True)
    return stream_of(x, y, (1, 3, 2), generation=kind)


@pytest.mark.parametrize("kind", ["modern", "tasks", "classic"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_equals_avalanche_to_the_bit(stream_of: Any, kind: str, size: int) -> None:
    stream = build(stream_of, kind)
    wanted = {"experience": True, "stream": True}
    theirs = emitted([accuracy_metrics(**wanted), loss_metrics(**wanted)], stream, size=size)
    ours = emitted([device_accuracy_metrics(), device_loss_metrics()], stream, size=size)
    assert ours == theirs  # names, positions, values and order
    assert all(type(value) is float for _, _, value in ours)
    names = {name for name, _, _ in ours}
    labels = {"modern": set(), "classic": {"Task000"}, "tasks": {"Task000", "Task001", "Task002"}}
    assert {part for name in names for part in name.split("/") if part.startswith("Task")} == labels[kind]
    assert len(names) == 8
    assert len({value for _, _, value in ours}) > 8


@pytest.mark.parametrize("level", ["experience", "stream"])
def test_one_level(stream_of: Any, level: str) -> None:
    stream, only = build(stream_of, "modern"), {level: True}
    other = {"experience": False, "stream": False} | only
    theirs = emitted([accuracy_metrics(**only), loss_metrics(**only)], stream)
    assert emitted([device_accuracy_metrics(**other), device_loss_metrics(**other)], stream) == theirs != []


@pytest.mark.parametrize("output", [lambda o: o.max(1).indices, lambda o: o.bfloat16()], ids=["labels", "bf16"])
def test_other_outputs(stream_of: Any, output: Any) -> None:
    class NoLoss(SupervisedPlugin):
        """Class ids have no cross-entropy."""

        def before_eval(self, strategy: Any, **kwargs: Any) -> None:
            strategy._criterion = lambda out, y: out.float().mean()

        def after_eval(self, strategy: Any, **kwargs: Any) -> None:
            strategy._criterion = nn.CrossEntropyLoss()

    stream = build(stream_of, "modern")
    settings = {"output": output, "plugins": [NoLoss()]}
    theirs = emitted([accuracy_metrics(experience=True, stream=True)], stream, **settings)
    ours = emitted([device_accuracy_metrics()], stream, **settings)
    assert ours == theirs and len({value for _, _, value in ours}) > 4


def batch(outputs: torch.Tensor, targets: torch.Tensor, loss: float = 1.0) -> Any:
    class Strategy:
        mb_output, mb_y = outputs, targets

    Strategy.loss = torch.tensor([loss])
    return Strategy


def test_one_hot_targets_and_unequal_sizes() -> None:
    metric = DeviceAccuracy()
    logits = torch.eye(4)
    metric.after_eval_iteration(batch(logits, torch.eye(4)[[0, 1, 3, 2]]))
    assert metric.result() == {"experience": 0.5, "stream": 0.5}
    with pytest.raises(ValueError, match="mb_output has 4 rows and mb_y 3"):
        metric.after_eval_iteration(batch(logits, torch.arange(3)))


def test_levels_reset_apart_and_nothing_is_zero() -> None:
    metric = DeviceLoss()
    assert metric.result() == {"experience": 0.0, "stream": 0.0}
    metric.before_eval(None)
    metric.before_eval_exp(None)
    metric.after_eval_iteration(batch(torch.eye(3), torch.arange(3), 2.0))
    metric.before_eval_exp(None)
    metric.after_eval_iteration(batch(torch.eye(1), torch.arange(1), 6.0))
    assert metric.result() == {"experience": 6.0, "stream": 3.0}
    metric.before_eval(None)
    assert metric.result() == {"experience": 0.0, "stream": 0.0}


@pytest.mark.parametrize("kind", [DeviceAccuracy, DeviceLoss])
def test_state_round_trip(kind: type) -> None:
    one, other = kind(), kind()
    other.load_state_dict(one.state_dict())
    assert other.result() == one.result()
    parts = [batch(torch.randn(5, 3), torch.arange(5) % 3, 0.1 * (i + 1)) for i in range(6)]
    for part in parts[:3]:
        one.after_eval_iteration(part)
    state = one.state_dict()
    assert all(type(total) is float for total in state["sums"]) and state["samples"] == [15, 15]
    other.load_state_dict(state)
    for part in parts[3:]:
        one.after_eval_iteration(part)
        other.after_eval_iteration(part)
    assert one.result() == other.result()
    assert state["samples"] == [15, 15]  # a copy


def test_no_read_from_the_device_per_batch() -> None:
    """On the meta device every read of a value raises."""
    for metric in (DeviceAccuracy(), DeviceLoss()):
        part = batch(torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.long, device="meta"))
        part.loss = torch.empty(1, device="meta")
        metric.before_eval(part)
        metric.before_eval_exp(part)
        metric.after_eval_iteration(part)
        metric.after_eval_iteration(part)
        with pytest.raises((NotImplementedError, RuntimeError)):
            metric.result()


def test_sums_made_in_inference_mode() -> None:
    metric = DeviceLoss()
    with torch.inference_mode():
        metric.after_eval_iteration(batch(torch.eye(2), torch.arange(2), 2.0))
    metric.before_eval_exp(None)
    metric.after_eval_iteration(batch(torch.eye(2), torch.arange(2), 4.0))
    assert metric.result() == {"experience": 4.0, "stream": 3.0}


def test_nothing_asked_for() -> None:
    for factory in (device_accuracy_metrics, device_loss_metrics):
        with pytest.raises(ValueError, match="experience and stream are False; at least one"):
            factory(experience=False, stream=False)
