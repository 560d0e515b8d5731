"""What the benchmarks of training and evaluation compute with: data in memory, networks, loops' data sets, clocks.

Images are uint8 in memory and become normalised floats inside the network, on its device: so every contestant, a
hand-written loop or a strategy, gets the same bytes and does the same arithmetic.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import avalanche_firn.models  # noqa: F401  (registers our backbones with timm)
from avalanche_firn.evaluation import continual_metrics
from avalanche_firn.evaluation.device_metrics import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.models.parts import FeatureClassifier, with_taskwise_head
from speed.measure import MemoryMark, synchronise

__all__ = [
    "CLASSES",
    "FEATURES",
    "Batched",
    "EpochClock",
    "Laps",
    "OnDevice",
    "as_it_is",
    "board",
    "copy_of",
    "deviation",
    "experience_of",
    "held",
    "network",
    "on",
    "recorded",
    "stream_of",
    "with_targets",
]

CLASSES = 10
FEATURES = 64  # of the perceptron, which gets vectors and no images


# ---------------------------------------------------------------------------------------------------------- data
def held(backbone: str, edge: int, samples: int, seed: int = 0) -> TensorDataset:
    """Random samples in memory with `targets`: uint8 images (3, edge, edge), or floats (64,) for "mlp"."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % CLASSES
    if backbone == "mlp":
        x = torch.randn(samples, FEATURES, generator=generator)
    else:
        x = torch.randint(0, 256, (samples, 3, edge, edge), generator=generator, dtype=torch.uint8)
    return with_targets(x, targets)


def with_targets(x: Tensor, y: Tensor) -> TensorDataset:
    """A TensorDataset that Avalanche accepts."""
    data = TensorDataset(x, y)
    data.targets = y.tolist()  # type: ignore[attr-defined]
    return data


def on(data: TensorDataset, device: torch.device) -> TensorDataset:
    """The same samples, held on a device."""
    return data if device.type == "cpu" else with_targets(*(tensor.to(device) for tensor in data.tensors))


class Batched(Dataset[Any]):
    """A TensorDataset that torch's DataLoader asks for whole batches; its collate function is `as_it_is`."""

    def __init__(self, data: TensorDataset) -> None:
        self.tensors = data.tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(rows)
        return tuple(tensor[index] for tensor in self.tensors)


def as_it_is(batch: Any) -> Any:
    """A batch that needs no collating."""
    return batch


def stream_of(train: Sequence[TensorDataset], test: Sequence[TensorDataset] = ()) -> Any:
    """An Avalanche benchmark with one experience per data set."""
    parts = {"train": [as_classification_dataset(d) for d in train]}
    if test:
        parts["test"] = [as_classification_dataset(d) for d in test]
    return with_classes_timeline(benchmark_from_datasets(**parts))


def experience_of(data: TensorDataset) -> Any:
    """All samples as a single training experience."""
    return stream_of([data]).train_stream[0]


# ------------------------------------------------------------------------------------------------------ networks
class OnDevice(nn.Module):
    """uint8 images (B, 3, H, W) -> features (B, d); pixels become floats and are normalised where the network runs."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).mul(255).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).mul(255).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone((x.float() - self.mean) / self.std)


def network(backbone: str, edge: int, *, classes: int = CLASSES) -> FeatureClassifier:
    """A freshly built model, always the same: "mlp" (64-64-classes) or a timm name, with a layer for all classes."""
    torch.manual_seed(0)
    if backbone == "mlp":
        model = with_taskwise_head(nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU()), feature_size=64)
    else:
        size: dict[str, Any] = {"img_size": edge} if "vit" in backbone else {}
        features = timm.create_model(backbone, num_classes=0, **size)
        model = with_taskwise_head(OnDevice(features), feature_size=features.num_features)
    assert isinstance(model, FeatureClassifier)
    if classes:
        model.head.add_task(range(classes))  # type: ignore[operator]
    return model


def deviation(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between two weights; 0 if both have trained alike."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return float(torch.stack([(a - b).detach().abs().max().float().cpu() for a, b in pairs]).max())


# -------------------------------------------------------------------------------------------------------- clocks
class Laps:
    """Seconds per part of an iteration; waits for the device at each part, so only shares mean something on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        synchronise(self.device)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def microseconds(self, iterations: int) -> dict[str, float]:
        """Per iteration."""
        return {part: round(1e6 * value / iterations, 1) for part, value in self.seconds.items()}


class _Busy(threading.Thread):
    """Asks every tenth of a second how busy the GPU is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.readings: list[float] = []
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.1):
            try:
                self.readings.append(float(torch.cuda.utilization(self.device)))
            except Exception:  # no pynvml, or a driver that doesn't tell: this figure is optional
                return

    def stop(self) -> float | None:
        """Median of the readings, percent of the time with work; None without any."""
        self._over.set()
        self.join()
        return statistics.median(self.readings) if self.readings else None


class EpochClock:
    """Seconds of each epoch, from before the first plugin's first hook until after the last one's last.

    :param seed: of the global generator at the start of every epoch, so that all contestants draw the same order.
    :param laps: also time the parts of every iteration.
    :param memory: also take the peak memory of an epoch, which on a CPU means something in a fresh process only.
    :param busy: also take the utilisation of the GPU, percent (needs pynvml).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        seed: int = 1,
        laps: Laps | None = None,
        memory: bool = False,
        busy: bool = False,
    ) -> None:
        self.device, self.seed, self.laps = device, seed, laps
        self.epochs: list[float] = []
        self.peak: float | None = None
        self.busy: float | None = None
        self._asks = busy and device.type == "cuda"
        self._poll: _Busy | None = None
        self._mark = MemoryMark(device) if memory or device.type == "cuda" else None
        self._start = 0.0

    def start(self) -> None:
        """An epoch begins."""
        torch.manual_seed(self.seed + len(self.epochs))
        if self._mark is not None:
            self._mark.start()
        if self.laps is not None:
            self.laps.start()
        if self._asks:
            self._poll = _Busy(self.device)
        synchronise(self.device)
        self._start = time.perf_counter()

    def stop(self) -> None:
        """An epoch ends."""
        synchronise(self.device)
        self.epochs.append(time.perf_counter() - self._start)
        if self._mark is not None:
            self.peak = self._mark.stop()
        if self._poll is not None:
            self.busy, self._poll = self._poll.stop(), None

    def install(self, strategy: Any) -> None:
        """Around all plugins of a strategy that hasn't trained yet."""
        strategy.plugins.insert(0, _First(self))
        if self.laps is not None:
            strategy.plugins.insert(1, _Parts(self.laps))
        strategy.plugins.append(_Last(self))


class _First(SupervisedPlugin):
    def __init__(self, clock: EpochClock) -> None:
        super().__init__()
        self.clock = clock

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.clock.start()


class _Last(SupervisedPlugin):
    def __init__(self, clock: EpochClock) -> None:
        super().__init__()
        self.clock = clock

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.clock.stop()


class _Parts(SupervisedPlugin):
    """Laps from the strategy's own hooks."""

    def __init__(self, laps: Laps) -> None:
        super().__init__()
        self.laps = laps

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("fetch a batch")

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("hooks, zero_grad")

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("forward")

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("loss")

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("backward")

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("hooks, zero_grad")

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("optimizer")

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.laps.lap("hooks, zero_grad")


@contextmanager
def board() -> Iterator[TensorboardLogger]:
    """TensorBoard into a folder that is thrown away afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="firn-speed-"))
    logger = TensorboardLogger(folder)
    try:
        yield logger
    finally:
        logger.writer.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def recorded() -> Iterator[EvaluationPlugin]:
    """Our metrics of a run and TensorBoard, as the runner has them."""
    accuracy = device_accuracy_metrics(experience=True, stream=True)
    loss = device_loss_metrics(experience=True, stream=True)
    with board() as logger:
        yield EvaluationPlugin(*continual_metrics(), *accuracy, *loss, loggers=[logger], collect_all=False)


def copy_of(model: FeatureClassifier, device: torch.device) -> FeatureClassifier:
    """The model's own copy for one contestant, on the device, in training mode."""
    return copy.deepcopy(model).to(device).train()
