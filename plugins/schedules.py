"""Learning-rate schedules as factories: ``factory(optimizer) -> scheduler``, called anew in every experience.

A scheduler object is bound to one optimizer and one horizon; a factory gives each experience the same shape
(Avalanche's ``LRSchedulerPlugin`` rewinds one object instead, which goes wrong for warm-ups).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

SchedulerFactory = Callable[[Optimizer], LRScheduler]


def constant(optimizer: Optimizer) -> LRScheduler:
    """Rates that stay as they are; itself a factory."""
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def multistep(milestones: Sequence[int], gamma: float = 0.1) -> SchedulerFactory:
    """Multiply the rates by ``gamma`` after each milestone: epochs 1 to m run at the full rate (SLCA, released code).

    :param milestones: epochs, increasing, each at least 1. :param gamma: factor in (0, 1].
    :raises ValueError: milestones not increasing or below 1, ``gamma`` outside (0, 1].
    """
    steps = [int(m) for m in milestones]
    if any(m < 1 for m in steps) or sorted(set(steps)) != steps:
        raise ValueError(f"milestones is {list(milestones)}; increasing epochs of 1 and above are accepted")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; a factor in (0, 1] is accepted")
    return lambda optimizer: MultiStepLR(optimizer, steps, gamma)


def cosine(epochs: int, eta_min: float = 0.0) -> SchedulerFactory:
    """Half a cosine from each group's rate to ``eta_min`` over ``epochs`` epochs.

    :raises ValueError: fewer than one epoch, or a negative ``eta_min``.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; 1 and above is accepted")
    if eta_min < 0:
        raise ValueError(f"eta_min is {eta_min}; a rate of 0 and above is accepted")
    return lambda optimizer: CosineAnnealingLR(optimizer, epochs, eta_min)


def lagged_cosine(epochs: int, floor: float = 1e-5) -> SchedulerFactory:
    """Half a cosine that starts one epoch late: epochs 0 and 1 run at each group's rate, the floor is not reached.

    Epoch e > 1 runs at ``floor + (base - floor) (1 + cos(pi (e - 1) / epochs)) / 2``, and at the floor once e - 1 is
    ``epochs``: timm's schedule when it is stepped with the index of the epoch that has just ended, as the released code
    of LoRAC-IPC does. A group whose rate is below the floor keeps it: no rate is ever raised.

    :param floor: 1e-5 in that code.
    :raises ValueError: fewer than one epoch, or a negative ``floor``.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; 1 and above is accepted")
    if not floor >= 0:
        raise ValueError(f"floor is {floor}; a rate of 0 and above is accepted")
    return lambda optimizer: _LaggedCosine(optimizer, epochs, floor)


class _LaggedCosine(LRScheduler):
    """In closed form, so that its state is the number of the epoch; see :func:`lagged_cosine`."""

    def __init__(self, optimizer: Optimizer, epochs: int, floor: float) -> None:
        self.epochs = epochs
        self.floor = floor
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        done = min(max(self.last_epoch - 1, 0), self.epochs)
        share = (1 + math.cos(math.pi * done / self.epochs)) / 2
        return [base if base <= self.floor else self.floor + (base - self.floor) * share for base in self.base_lrs]


__all__ = ["SchedulerFactory", "constant", "cosine", "lagged_cosine", "multistep"]
