"""Accuracy and loss of evaluated experiences and streams, as Avalanche's metrics, without waiting for the device.

Avalanche's ``accuracy_metrics(experience=True, stream=True)`` and ``loss_metrics(...)`` read a number back from the
device in every mini-batch, once per metric. Here each mini-batch leaves one number on the device, and they are read
together, once per experience (every 1,024 batches). Tags, positions and values are Avalanche's, the values to the bit:
the same products are summed in the same order.

Cost: one operation per mini-batch for the loss, two or three for the accuracy, for experience and stream together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

from avalanche_firn.evaluation.predictions import best_columns
from avalanche_firn.plugins.finite_words import not_evaluated

__all__ = ["DeviceAccuracy", "DeviceLoss", "device_accuracy_metrics", "device_loss_metrics"]

Emitted = list[MetricValue] | None
_LEVELS = ("experience", "stream")
_TOGETHER = 1024  # mini-batches read at once


class _DeviceMean(PluginMetric[dict[str, float]]):
    """Means over the samples of an experience and of a stream, of one value per mini-batch.

    Args:
        experience: emit the mean of every evaluated experience.
        stream: emit the mean of the whole evaluation.

    Raises:
        ValueError: neither is asked for.
        NonFiniteError: where a mean is emitted, of outputs or losses that aren't all finite.
    """

    names: tuple[str, str]
    """First part of the tag, for an experience and for a stream."""

    def __init__(self, *, experience: bool = True, stream: bool = True) -> None:
        super().__init__()
        if not (experience or stream):
            raise ValueError("experience and stream are False; at least one of them is needed")
        self._wanted = {"experience": bool(experience), "stream": bool(stream)}
        self._sums = [0.0, 0.0]  # experience, stream
        self._samples = [0, 0]
        self._waiting: list[tuple[Tensor, int]] = []  # a number on the device per mini-batch, and its samples
        self._tops: list[Tensor] = []  # what must be finite beside these numbers
        self._lost = ""  # why there is no mean; raised where it is emitted

    def __str__(self) -> str:
        return type(self).__name__

    def value(self, strategy: Any) -> Tensor:
        """What is read of a mini-batch: a scalar on the device."""
        raise NotImplementedError

    def mean(self, value: float, samples: int) -> float:
        """The mean over the mini-batch, from what was read."""
        raise NotImplementedError

    def result(self) -> dict[str, float]:
        """Means of the current experience and stream, floats by level; 0 before the first sample, as Avalanche's."""
        self._read()
        pairs = zip(_LEVELS, self._sums, self._samples, strict=True)
        return {level: total / count if count else 0.0 for level, total, count in pairs}

    def reset(self) -> None:
        """Forget both means."""
        self._sums, self._samples, self._waiting = [0.0, 0.0], [0, 0], []
        self._tops, self._lost = [], ""

    def _read(self) -> None:
        """Add what waits on the device, in its order."""
        if not self._waiting:
            return
        values = torch.stack([value for value, _ in self._waiting]).tolist()
        if self._tops and not bool((tops := torch.cat(self._tops)).isfinite().all()):
            self._lost = f"the outputs of {int((~tops.isfinite()).sum())} samples aren't finite"
        if wrong := [value for value in values if not math.isfinite(value)]:
            self._lost = f"the loss of {len(wrong)} of {len(values)} mini-batches isn't finite, of the first {wrong[0]}"
        self._tops = []
        for value, (_, count) in zip(values, self._waiting, strict=True):
            term = self.mean(value, count) * count
            self._sums = [total + term for total in self._sums]
            self._samples = [samples + count for samples in self._samples]
        self._waiting = []

    # ------------------------------------------------------------------ hooks
    def before_eval(self, strategy: Any) -> None:
        self.reset()

    def before_eval_exp(self, strategy: Any) -> None:
        self._read()
        self._sums[0], self._samples[0] = 0.0, 0

    @torch.no_grad()
    def after_eval_iteration(self, strategy: Any) -> None:
        self._waiting.append((self.value(strategy), strategy.mb_y.shape[0]))
        if len(self._waiting) >= _TOGETHER:
            self._read()

    def after_eval_exp(self, strategy: Any) -> Emitted:
        return self._emit(strategy, "experience")

    def after_eval(self, strategy: Any) -> Emitted:
        return self._emit(strategy, "stream")

    def _emit(self, strategy: Any, level: str) -> Emitted:
        if not self._wanted[level]:
            return None
        inside, value = level == "experience", self.result()[level]
        if self._lost:
            raise not_evaluated(strategy, self._lost)
        name = get_metric_name(self.names[0 if inside else 1], strategy, add_experience=inside, add_task=True)
        return [MetricValue(self, name, value, strategy.clock.train_iterations)]

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Sums and numbers of samples."""
        self._read()
        return {"sums": [*self._sums], "samples": [*self._samples]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._waiting, self._tops, self._lost = [], [], ""
        self._sums = [float(total) for total in state["sums"]]
        self._samples = [int(count) for count in state["samples"]]


class DeviceAccuracy(_DeviceMean):
    """``Top1_Acc_Exp`` and ``Top1_Acc_Stream``: the share of samples that are predicted right.

    ``strategy.mb_output`` is logits (B, C) or class ids (B,), ``strategy.mb_y`` class ids or one-hot rows.
    """

    names = ("Top1_Acc_Exp", "Top1_Acc_Stream")

    def value(self, strategy: Any) -> Tensor:
        """Number of right predictions in the mini-batch."""
        predicted, true = torch.as_tensor(strategy.mb_output), torch.as_tensor(strategy.mb_y)
        if len(predicted) != len(true):
            raise ValueError(f"mb_output has {len(predicted)} rows and mb_y {len(true)}; equal numbers are accepted")
        if predicted.ndim > 1:
            top, predicted = best_columns(predicted)
            self._tops.append(top)
        if true.ndim > 1:
            true = true.max(1).indices
        return (predicted == true).sum()

    def mean(self, value: float, samples: int) -> float:
        """Share of right predictions."""
        return value / samples


class DeviceLoss(_DeviceMean):
    """``Loss_Exp`` and ``Loss_Stream``: the mean of ``strategy.loss`` over the samples."""

    names = ("Loss_Exp", "Loss_Stream")

    def value(self, strategy: Any) -> Tensor:
        """Loss of the mini-batch in its own type."""
        loss: Tensor = strategy.loss.detach()
        return loss.mean() if loss.ndim else loss

    def mean(self, value: float, samples: int) -> float:
        """The loss is a mean already."""
        return value


def device_accuracy_metrics(*, experience: bool = True, stream: bool = True) -> list[PluginMetric[Any]]:
    """Avalanche's accuracy per evaluated experience and stream, summed on the device.

    Args:
        experience: emit ``Top1_Acc_Exp``.
        stream: emit ``Top1_Acc_Stream``.

    Raises:
        ValueError: neither is asked for.
    """
    return [DeviceAccuracy(experience=experience, stream=stream)]


def device_loss_metrics(*, experience: bool = True, stream: bool = True) -> list[PluginMetric[Any]]:
    """Avalanche's loss per evaluated experience and stream, summed on the device.

    Args:
        experience: emit ``Loss_Exp``.
        stream: emit ``Loss_Stream``.

    Raises:
        ValueError: neither is asked for.
    """
    return [DeviceLoss(experience=experience, stream=stream)]
