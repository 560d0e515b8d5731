"""Progress bars of a run, and the clock that says how long it took. Nothing here waits for the device in a step."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from tqdm import tqdm

__all__ = ["ProgressPlugin", "RunClock", "bars_wanted"]


def bars_wanted(progress: bool, quiet: bool) -> bool:
    """Whether to draw bars: wanted, not quiet, and standard error is a terminal."""
    return progress and not quiet and sys.stderr.isatty()


class ProgressPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """One bar for the iterations of an experience, one for an evaluation; both vanish when they are full.

    :param label: text before the bar, for example ``slca seed 0``.
    :param tasks: number of experiences.
    """

    stateless = True
    """Nothing to save in a checkpoint."""

    affects_results = False
    """A run may be resumed with or without bars."""

    def __init__(self, *, label: str, tasks: int) -> None:
        super().__init__()
        self.label = label
        self.tasks = tasks
        self._bar: tqdm[Any] | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A new bar over all iterations of the experience."""
        self._open(strategy.train_epochs * len(strategy.dataloader))

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Show experience and epoch, and start where a resumed run stands."""
        if self._bar is not None:
            clock = strategy.clock
            text = f"task {clock.train_exp_counter + 1}/{self.tasks} epoch {clock.train_exp_epochs + 1}"
            self._bar.set_description(f"{self.label} {text}/{strategy.train_epochs}", refresh=False)
            self._bar.n = max(self._bar.n, clock.train_exp_iterations)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(1)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The bar goes."""
        self._close()

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A bar over the batches of one evaluated experience."""
        self._open(len(strategy.dataloader))
        assert self._bar is not None
        self._bar.set_description(
            f"{self.label} evaluating {strategy.experience.current_experience + 1}", refresh=False
        )

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One batch further."""
        if self._bar is not None:
            self._bar.update(1)

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The bar goes."""
        self._close()

    def _open(self, total: int) -> None:
        self._close()
        self._bar = tqdm(total=total, leave=False, dynamic_ncols=True, mininterval=0.2)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RunClock(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Wall time spent in ``train`` and ``eval``, alignment included; goes on counting in a resumed run."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        """Seconds up to the last iteration, or to the end of the last ``train`` or ``eval``."""
        self._since: float | None = None
        self._nested = False

    def _lap(self) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now

    def _stop(self, strategy: Any) -> None:
        if strategy.device.type == "cuda":
            torch.cuda.synchronize(strategy.device)
        self._lap()
        self._since = None

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self._since = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Take the time, so that a checkpoint between two iterations has it."""
        self._lap()

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """The clock stops."""
        self._stop(strategy)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """The clock starts, unless this is an evaluation inside training."""
        self._nested = self._since is not None
        if not self._nested:
            self._since = time.perf_counter()

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """The clock stops, unless this was an evaluation inside training."""
        if not self._nested:
            self._stop(strategy)

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.seconds = float(state["seconds"])
        if self._since is not None:
            self._since = time.perf_counter()
