"""The learning rate of a transfer, chosen on classes that are neither pre-trained on nor transferred to.

The notebooks of arXiv 2310.07996 choose the rate anew at every point of a curve, by the mean accuracy on the test
images of the transfer classes themselves: an envelope that no single run reaches. Here a sweep runs on validation
classes and one rate stands for the whole curve; the envelope is there for comparison and says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_firn.strategies.transfer import TransferResult
from avalanche_firn.strategies.transfer_start import TransferTask

__all__ = ["RELEASED_RATES", "RateSweep", "sweep_rates"]

RELEASED_RATES = (0.055, 0.01, 0.0055, 1e-3, 7e-4, 4e-4, 1e-4, 7e-5, 4e-5)
"""Rates of the released transfer sweep (arXiv 2310.07996, configs/)."""


@dataclass(frozen=True)
class RateSweep:
    """Accuracies of one transfer at several rates."""

    rates: tuple[float, ...]
    logged_after: tuple[int, ...]
    """Classes (continual) or epochs (i.i.d.) of the points of a curve."""
    accuracy: Tensor
    """``(rates, trials, points)`` float64: mean over the tasks learnt so far; over all tasks for i.i.d. transfer."""
    diverged: Tensor
    """``(rates, trials)`` bool: a weight became infinite or NaN."""

    @property
    def best(self) -> float:
        """The rate with the highest mean accuracy at the last point; the smaller one of equals, diverged ones last."""
        score = self.accuracy[:, :, -1].mean(1) - self.diverged.any(1).double() * 2
        # equal means of trials in another order differ in their last digit
        order = sorted(range(len(self.rates)), key=lambda i: (-round(float(score[i]), 12), self.rates[i]))
        return self.rates[order[0]]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest of several, so that a wider grid may hold a better."""
        return len(self.rates) > 1 and self.best in (min(self.rates), max(self.rates))

    def envelope(self) -> Tensor:
        """``(points,)``: at every point the mean accuracy of the rate that is best there.

        The released notebooks' figure, if the sweep ran on the transfer classes: optimistic, no run has this curve.
        """
        return self.accuracy.mean(1).amax(0)


def sweep_rates(
    transfer: Callable[..., TransferResult],
    model: nn.Module,
    tasks: Sequence[TransferTask],
    rates: Sequence[float],
    *,
    trials: int = 3,
    seed: int = 0,
    **settings: Any,
) -> RateSweep:
    """Transfer with every rate and several seeds.

    :param transfer: :func:`~avalanche_firn.strategies.transfer.continual_transfer` or ``iid_transfer``.
    :param tasks: for a choice that counts, of validation classes.
    :param trials: seeds ``seed, seed + 1, ...``, the same for every rate. 3: our choice; 10 in the released sweep.
    :param settings: passed on to ``transfer``; a rate that diverges is recorded and stops nothing.
    :raises ValueError: no rates, the same one twice or out of range, no trial.
    """
    if not rates or len(set(rates)) != len(rates):
        raise ValueError(f"rates is {list(rates)}; at least one, each once, is accepted")
    if not all(0 <= rate < float("inf") for rate in rates):
        raise ValueError(f"rates is {list(rates)}; finite rates, 0 or above, are accepted")
    if trials < 1:
        raise ValueError(f"trials is {trials}; 1 and above is accepted")
    recorded: dict[str, Any] = {"on_nonfinite": "record", **settings}
    curves, diverged = [], []
    logged: tuple[int, ...] = ()
    for rate in rates:
        runs = [transfer(model, tasks, lr=rate, seed=seed + trial, **recorded) for trial in range(trials)]
        curves.append(torch.stack([run.curve for run in runs]))
        diverged.append(torch.tensor([run.diverged for run in runs]))
        logged = runs[0].logged_after
    return RateSweep(tuple(rates), logged, torch.stack(curves), torch.stack(diverged))
