"""What training costs: throughput, seconds, peak memory, optimised parameters.

Time is wall time between hooks, with evaluation taken out and the device synchronised where a clock stops (at the end
of epochs and experiences and before evaluations, never per iteration). Work that a plugin does lazily inside an
evaluation is evaluation time here; a runner that compares methods should also time its whole run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue

Emitted = list[MetricValue] | None


def peak_memory_mib(device: torch.device | str) -> float | None:
    """Peak memory in MiB: tensors allocated on a CUDA device, else the resident set of this process.

    The CUDA figure counts from the last ``torch.cuda.reset_peak_memory_stats``. The resident set counts from the start
    of the *process* and cannot be reset, so runs that share a process share it; None where the system does not tell
    (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def optimised_parameters(optimizer: torch.optim.Optimizer) -> int:
    """Number of scalars that the optimizer can change: in one of its groups and requiring a gradient."""
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return sum(p.numel() for p in held.values() if p.requires_grad)


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> float:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
        return self.seconds

    def read(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


class Efficiency(PluginMetric[dict[str, float]]):
    """Throughput per epoch and the cost per experience.

    Over training iterations: ``efficiency/images-per-second``, images of the training batches (replayed ones included)
    over the wall time of the epoch, data loading included and evaluation not.

    Over the experience index: ``efficiency/seconds``, wall time of training since the start of the run, with everything
    that plugins do before, between and after the epochs, without evaluation; ``efficiency/peak-memory-MiB`` so far, see
    :func:`peak_memory_mib`; ``efficiency/trainable-parameters``, see :func:`optimised_parameters`.

    The state carries elapsed times, so a resumed run goes on counting; the figures themselves are never reproducible.
    """

    def __init__(self) -> None:
        super().__init__()
        self._epoch, self._train = _Stopwatch(), _Stopwatch()
        self._paused: list[_Stopwatch] = []
        self._images = 0  # of the epoch
        self._all_images = 0
        self._peak = 0.0
        self._parameters = 0
        self._device = torch.device("cpu")
        self._measuring = False

    def __str__(self) -> str:
        return "Efficiency"

    def result(self) -> dict[str, float]:
        return {
            "seconds": self._train.read(),
            "images": self._all_images,
            "peak-memory-MiB": self._peak,
            "trainable-parameters": self._parameters,
        }

    def reset(self) -> None:
        """Nothing to do between experiences: cost adds up over the run."""

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def before_train_dataset_adaptation(self, strategy: Any) -> Emitted:
        if not self._measuring:
            self._device = torch.device(strategy.device)
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._measuring = True
        self._train.start()
        return None

    def before_training_epoch(self, strategy: Any) -> Emitted:
        self._epoch.start()
        self._parameters = optimised_parameters(strategy.optimizer)  # here, because plugins unfreeze things afterwards
        return None

    def before_training_iteration(self, strategy: Any) -> Emitted:
        if not self._epoch.running:  # resumed inside an epoch, whose opening hooks metrics do not hear a second time
            self.before_train_dataset_adaptation(strategy)
            self._epoch.start()
        return None

    def after_training_iteration(self, strategy: Any) -> Emitted:
        size = int(strategy.mb_y.shape[0])
        self._images += size
        self._all_images += size
        return None

    def after_training_epoch(self, strategy: Any) -> Emitted:
        self._synchronise()
        seconds, images = self._epoch.stop(), self._images
        self._epoch.seconds, self._images = 0.0, 0
        if not images or seconds <= 0:
            return None
        step = int(strategy.clock.train_iterations)
        return [MetricValue(self, "efficiency/images-per-second", images / seconds, step)]

    def after_training_exp(self, strategy: Any) -> Emitted:
        self._synchronise()
        values: dict[str, float] = {"seconds": self._train.stop(), "trainable-parameters": self._parameters}
        peak = peak_memory_mib(self._device)
        if peak is not None:
            self._peak = values["peak-memory-MiB"] = max(self._peak, peak)
        index = int(strategy.clock.train_exp_counter)
        return [MetricValue(self, f"efficiency/{name}", value, index) for name, value in values.items()]

    def before_eval(self, strategy: Any) -> Emitted:
        self._paused = [watch for watch in (self._epoch, self._train) if watch.running]
        if self._paused:
            self._synchronise()
        for watch in self._paused:
            watch.stop()
        return None

    def after_eval(self, strategy: Any) -> Emitted:
        for watch in self._paused:
            watch.start()
        self._paused = []
        return None

    def state_dict(self) -> dict[str, Any]:
        now = peak_memory_mib(self._device) if self._measuring else None
        return {
            "epoch_seconds": self._epoch.read(),
            "train_seconds": self._train.read(),
            "images": self._images,
            "all_images": self._all_images,
            "parameters": self._parameters,
            "peak_mib": max(self._peak, now or 0.0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for watch, name in ((self._epoch, "epoch_seconds"), (self._train, "train_seconds")):
            running = watch.running
            watch.stop()
            watch.seconds = float(state[name])
            if running:
                watch.start()
        self._images, self._all_images = int(state["images"]), int(state["all_images"])
        self._parameters = int(state["parameters"])
        self._peak = float(state["peak_mib"])
