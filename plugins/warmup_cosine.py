"""Rates of Co2L: per task half a cosine over the epochs, after a linear warm-up over iterations.

One optimizer lives through the stream (its momentum carries over, as in the released code); only its rate is set here,
and the number of epochs, which may be larger in the first task. ``LRSchedulerPlugin`` has one length and goes wrong on
a second warm-up. The cosine counts epochs from 1, as the released code does: a single epoch runs at ``lr * final`` and
trains next to nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from avalanche.training.plugins import SupervisedPlugin

from avalanche_firn.plugins.accumulation import accumulation_steps, updates_done, updates_in
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin


def cosine_rate(lr: float, epoch: int, epochs: int, final: float = 1e-3) -> float:
    """``lr * (final + (1 - final) (1 + cos(pi * epoch / epochs)) / 2)``; the last of ``epochs`` runs at ``lr * final``.

    :param epoch: from 1.
    """
    low = lr * final
    return low + (lr - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def warmup_rate(start: float, end: float, iteration: int, iterations: int) -> float:
    """From ``start`` at iteration 0 in a line to ``end`` at ``iterations``, which the warm-up does not reach."""
    return start + iteration / iterations * (end - start)


class WarmupCosinePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Set epochs and learning rate of every task; the optimizer stays.

    :param lr: None: that of the optimizer given to the strategy.
    :param first_epochs: epochs of the first experience; None: as the others, which have the strategy's
        ``train_epochs``.
    :param final: the last epoch's rate as part of ``lr``, 1e-3. :param warmup_epochs: 10; 0: none.
    :param warmup_from: rate of the first iteration, 0.01.
    :param warmup: None: for batches above 256 samples, as the released code has it (never for the digits).
    :param warmup_target: ``"task"``: the warm-up ends at the cosine of the task's own epochs; ``"reference"``: at that
        of the later tasks' epochs also in the first, as the released code does, where the rate then jumps.
    :raises ValueError: settings out of range; a warm-up as long as a task; another plugin that sets rates.
    """

    stateless = True
    """Rates and epochs follow from the clock."""

    def __init__(
        self,
        lr: float | None = None,
        *,
        first_epochs: int | None = None,
        final: float = 1e-3,
        warmup_epochs: int = 10,
        warmup_from: float = 0.01,
        warmup: bool | None = None,
        warmup_target: Literal["task", "reference"] = "task",
    ) -> None:
        super().__init__()
        for field, value, least in (
            ("first_epochs", first_epochs, 1),
            ("final", final, 0),
            ("warmup_epochs", warmup_epochs, 0),
            ("warmup_from", warmup_from, 0),
        ):
            if value is not None and not value >= least:
                raise ValueError(f"{field} is {value}; {least} and above is accepted")
        if lr is not None and not lr > 0:
            raise ValueError(f"lr is {lr}; a rate above 0 is accepted")
        if warmup_target not in ("task", "reference"):
            raise ValueError(f"warmup_target is {warmup_target!r}; 'task' or 'reference' is accepted")
        self.lr = lr
        self.first_epochs = first_epochs
        self.final = final
        self.warmup_epochs = warmup_epochs
        self.warmup_from = warmup_from
        self.warmup = warmup
        self.warmup_target = warmup_target
        self._later: int | None = None  # epochs of all experiences but the first
        self._epochs = 0  # of the current experience
        self._warm = 0  # of which warm up
        self._iterations = 0  # optimizer steps of an epoch

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check once that nobody else sets rates."""
        if any(isinstance(p, FreshOptimizerPlugin) for p in strategy.plugins):
            raise ValueError(
                "WarmupCosinePlugin keeps one optimizer, another plugin rebuilds it; one of them is accepted"
            )
        if self._later is None:
            self._later = strategy.train_epochs

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Set the number of epochs."""
        assert self._later is not None
        first = strategy.clock.train_exp_counter == 0 and self.first_epochs is not None
        self._epochs = int(self.first_epochs if first else self._later)  # type: ignore[arg-type]
        batch = strategy.train_mb_size * accumulation_steps(strategy)
        wanted = batch > 256 if self.warmup is None else self.warmup
        self._warm = self.warmup_epochs if wanted else 0
        if self._warm and self._warm >= min(self._epochs, self._later):
            least = min(self._epochs, self._later)
            raise ValueError(f"warmup_epochs is {self._warm} with {least} epochs; fewer than those are accepted")
        strategy.train_epochs = self._epochs

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The rate of the epoch."""
        self._iterations = updates_in(strategy, len(strategy.dataloader))
        self._set(strategy, cosine_rate(self._base(strategy), self._epoch(strategy), self._epochs, self.final))

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """The rate of an iteration of the warm-up."""
        if self._epoch(strategy) > self._warm:
            return
        assert self._later is not None
        epochs = self._later if self.warmup_target == "reference" else self._epochs
        end = cosine_rate(self._base(strategy), self._warm, epochs, self.final)
        done = updates_done(strategy)
        self._set(strategy, warmup_rate(self.warmup_from, end, done, self._warm * self._iterations))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Give the number of epochs back."""
        strategy.train_epochs = self._later

    def _epoch(self, strategy: Any) -> int:
        return int(strategy.clock.train_exp_epochs) + 1

    def _base(self, strategy: Any) -> float:
        return float(strategy.optimizer.defaults["lr"]) if self.lr is None else self.lr

    def _set(self, strategy: Any, rate: float) -> None:
        """The rate; a group that began with another one than the optimizer's keeps its ratio."""
        default = strategy.optimizer.defaults["lr"]
        for group in strategy.optimizer.param_groups:
            group["lr"] = rate * (group.setdefault("initial_lr", group["lr"]) / default)


__all__ = ["WarmupCosinePlugin", "cosine_rate", "warmup_rate"]
