"""Local losses: while training, only the classes of the current experience compete.

Used by SLCA, SLCA++, LoRAC-IPC, L2P and others for class-incremental streams: the units of earlier classes get no
gradient that pushes them down. In evaluation all classes compete. One gather of columns per step; no host
synchronisation in a step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.nn import functional as F

from avalanche_firn.plugins.alignment_math import symmetric_cross_entropy


def local_cross_entropy(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy over the columns ``classes`` alone.

    :param logits: ``(B, W)``, column = class id; computed in float32 at least.
    :param targets: class ids ``(B,)``; rows with a target outside ``classes`` are left out of the mean.
    :param classes: sorted class ids ``(K,)``, same device.
    :returns: scalar, nats; NaN if no target is among ``classes``.
    """
    return F.cross_entropy(*_local(logits, targets, classes))


def local_symmetric_cross_entropy(
    logits: Tensor, targets: Tensor, classes: Tensor, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """``alpha CE + beta RCE`` over the columns ``classes`` alone (SLCA++); arguments as :func:`local_cross_entropy`.

    :param alpha: weight of the cross-entropy, :param beta: of the reverse one (1.0 and 0.1: released configuration of
        CIFAR-100); see :func:`~avalanche_firn.plugins.alignment_math.symmetric_cross_entropy`.
    :returns: scalar, nats; NaN if no target is among ``classes``.
    """
    return symmetric_cross_entropy(*_local(logits, targets, classes), alpha, beta)


def _local(logits: Tensor, targets: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ``(B, K)`` of the classes, float32 at least, and positions ``(B,)`` in them, -100 for other targets."""
    position = torch.searchsorted(classes, targets).clamp(max=len(classes) - 1)
    local = torch.where(classes[position] == targets, position, -100)
    return _at_least_float32(logits.index_select(1, classes)), local


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _LocalCriterion(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Criterion and plugin in one: :meth:`local_loss` in training, cross-entropy over all classes in evaluation."""

    stateless = True
    """Nothing to save in a checkpoint: the classes come from the experience."""

    def __init__(self, *, outside: Literal["error", "ignore"] = "error") -> None:
        super().__init__()
        if outside not in ("error", "ignore"):
            raise ValueError(f"outside is {outside!r}; 'error' or 'ignore' is accepted")
        self.outside = outside
        self._classes: Tensor | None = None
        self._stretch: tuple[int, int] | None = None
        self._table = torch.empty(0)
        self._evaluating = False
        self._check_batch = False
        self._stray: Tensor | None = None

    def local_loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Training loss: logits of the experience's classes ``(B, K)``, positions in them ``(B,)``, -100 for others."""
        raise NotImplementedError

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the classes of the experience."""
        classes = sorted(int(c) for c in strategy.experience.classes_in_this_experience)
        if not classes:
            raise ValueError("the experience has no classes; local cross-entropy needs at least one")
        self._classes = torch.tensor(classes, device=strategy.device)
        # neighbouring columns are a view, which costs nothing forward and little backward
        self._stretch = (classes[0], classes[-1] + 1) if classes == list(range(classes[0], classes[-1] + 1)) else None
        # a look-up, with a last entry for every id that is no class of the experience
        table = torch.full((classes[-1] + 2,), -100)
        table[classes] = torch.arange(len(classes))
        self._table = table.to(strategy.device)
        self._evaluating = False  # an evaluation may have broken off
        self._stray = torch.zeros((), dtype=torch.long, device=strategy.device)
        self._check_batch = self.outside == "error"

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation: all classes compete."""
        self._evaluating = True

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Back to training."""
        self._evaluating = False

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """One read per epoch: were there targets of other classes?"""
        if self.outside == "error":
            self._raise_if_stray()

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``logits (B, W)`` by class id, ``targets (B,)`` -> scalar loss in nats."""
        if self._evaluating or self._classes is None:
            return F.cross_entropy(_at_least_float32(logits), targets)
        positions = self._table[targets.clamp(-1, len(self._table) - 1)]
        if self.outside == "error":
            assert self._stray is not None
            self._stray += (positions < 0).sum()
            if self._check_batch:
                self._check_batch = False
                self._raise_if_stray()
        if self._stretch is None or logits.shape[1] < self._stretch[1]:  # too few columns are an error, no shorter view
            own = logits.index_select(1, self._classes)
        else:
            own = logits[:, self._stretch[0] : self._stretch[1]]
        loss = self.local_loss(_at_least_float32(own), positions)
        if self.outside == "ignore":  # a batch of other experiences' samples alone has no mean, and teaches nothing
            loss = torch.where((positions >= 0).any(), loss, 0.0)
        return loss

    def _raise_if_stray(self) -> None:
        count = 0 if self._stray is None else int(self._stray)
        if count:
            assert self._classes is not None
            raise ValueError(
                f"{count} training targets are outside the classes of the experience, {self._classes.tolist()}, and "
                "local cross-entropy would ignore them; with a replay buffer use a loss over all seen classes "
                f"(torch.nn.CrossEntropyLoss), or say {type(self).__name__}(outside='ignore')"
            )


class LocalCrossEntropy(_LocalCriterion, supports_distributed=True):  # type: ignore[call-arg]
    """Criterion for Avalanche strategies: local cross-entropy in training, over all classes in evaluation.

    Pass it as ``criterion=``; the strategy then registers it as a plugin by itself.

    :param outside: what a training target outside the current experience means. ``"error"``: ValueError, at the first
        batch of the experience or at the end of the epoch (a replay buffer next to this loss would be ignored silently
        otherwise). ``"ignore"``: such rows do not count, as in SLCA's released code; the loss of a batch without any
        other row is 0, and so is its gradient.
    """

    def local_loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        """As :func:`local_cross_entropy`."""
        return F.cross_entropy(logits, positions)


class LocalSymmetricCrossEntropy(_LocalCriterion, supports_distributed=True):  # type: ignore[call-arg]
    """As :class:`LocalCrossEntropy`, with ``alpha CE + beta RCE`` in training (SLCA++) and plain CE in evaluation.

    :param alpha: weight of the cross-entropy, :param beta: of the reverse one. Released configurations: 1.0 and 0.1
        (CIFAR-100, CUB-200), 0.5 and 0.5 (ImageNet-R, Cars-196).
    :param outside: see :class:`LocalCrossEntropy`.
    :raises ValueError: a weight that is negative or not finite, or both 0.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, *, outside: Literal["error", "ignore"] = "error") -> None:
        super().__init__(outside=outside)
        for field, weight in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{field} is {weight}; a finite weight of 0 and above is accepted")
        if alpha == beta == 0:
            raise ValueError("alpha and beta are 0; the loss needs at least one of its two terms")
        self.alpha = alpha
        self.beta = beta

    def local_loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        """As :func:`local_symmetric_cross_entropy`."""
        return symmetric_cross_entropy(logits, positions, self.alpha, self.beta)


__all__ = [
    "LocalCrossEntropy",
    "LocalSymmetricCrossEntropy",
    "local_cross_entropy",
    "local_symmetric_cross_entropy",
]
