"""Learning-rate schedules as factories: ``factory(optimizer) -> scheduler``, called anew in every experience.

A scheduler object is bound to one optimizer and one horizon; a factory gives each experience the same shape
(Avalanche's ``LRSchedulerPlugin`` rewinds one object instead, which goes wrong for warm-ups).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

SchedulerFactory = Callable[[Optimizer], LRScheduler]


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


__all__ = ["SchedulerFactory", "cosine", "multistep"]
