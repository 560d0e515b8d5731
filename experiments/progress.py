"""Progress bars of a comparison and of its current run, and the clock that says how long a run took.

On a terminal there are two bars: the upper one over the whole comparison, with the time that is left for all of it, the
lower one over the iterations of the current experience (with experience, phase and epoch) or over the images of an
evaluation. Off a terminal nothing is drawn. Nothing here waits for the device in a step, and a step costs about a
microsecond: a bar looks at the clock only as often as it has to for its interval.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from tqdm import tqdm

__all__ = ["Overall", "ProgressPlugin", "RunClock", "bars_wanted", "say_above_bars"]

_INTERVAL = 0.2  # seconds between two drawings; our choice
# What plugins do outside the epochs, by the name of their class: when, and what it is called
_BEFORE = {"LinearProbePlugin": "linear probe"}
_AFTER = {
    "ClassifierAlignmentPlugin": "classifier alignment",
    "ClassifierStagePlugin": "classifier stage",
    "TaskInferencePlugin": "class statistics",
    "EWCPlugin": "parameter importances",
}


def bars_wanted(progress: bool, quiet: bool) -> bool:
    """Whether to draw bars: wanted, not quiet, and standard error is a terminal."""
    return progress and not quiet and sys.stderr.isatty()


def say_above_bars(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, so that a line never lands in the middle of a bar: the bars are taken away and drawn again below it."""

    def above(text: str) -> None:
        with tqdm.external_write_mode(file=sys.stdout):
            say(text)
            sys.stdout.flush()

    return above


class Overall:
    """The bar over a whole comparison, or over a single run.

    Args:
        total: number of units. unit: what they are called: ``runs``, or ``%`` of a single one.
        label: text before the bar.
        left: gives the text behind it, the time left; asked whenever the bar is drawn.
        done: units that are done from the start.
    """

    def __init__(self, *, total: int, unit: str, label: str, left: Callable[[], str], done: int = 0) -> None:
        self.unit, self.left = unit, left
        self.label = label
        self.bar: tqdm[Any] = tqdm(
            total=total,
            initial=done,
            leave=False,
            dynamic_ncols=True,
            mininterval=_INTERVAL,
            bar_format="{desc} |{bar}| {elapsed}{postfix}",
        )
        self.show(done)

    def show(self, done: float) -> None:
        """So many units are done, parts of one included."""
        self.bar.n = done
        self.refresh()

    def refresh(self) -> None:
        """Draw anew, with the time left as it is now."""
        done = int(self.bar.n + 1e-9)
        counted = f"{done} %" if self.unit == "%" else f"{done}/{self.bar.total} {self.unit}"
        self.bar.set_description_str(f"{self.label} {counted}", refresh=False)
        self.bar.set_postfix_str(self.left(), refresh=False)
        self.bar.refresh()

    def close(self) -> None:
        """The bar goes."""
        self.bar.close()


class ProgressPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """A bar for the iterations of an experience, with its phase, and one for the images of an evaluation.

    First in the list of plugins it sees the phases of the others begin. An evaluation inside training gets its bar
    below that of the training. Both vanish when they are full.

    :param label: text before the bar, for example ``slca seed 0``.
    :param tasks: number of experiences.
    :param drawn: called after a bar was drawn, with the share of the run's training that is done (0 to 1).
    """

    stateless = True
    """Nothing to save in a checkpoint."""

    affects_results = False
    """A run may be resumed with or without bars."""

    def __init__(self, *, label: str, tasks: int, drawn: Callable[[float], None] | None = None) -> None:
        super().__init__()
        self.label = label
        self.tasks = tasks
        self.phase = ""
        self._drawn = drawn
        self._at = 0  # experiences before the current one
        self._done = 0.0  # experiences, with the part of the current one
        self._place = ""
        self._bar: tqdm[Any] | None = None
        self._evaluation: tqdm[Any] | None = None

    # ---------------------------------------------------------------- training
    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A new bar over all iterations of the experience."""
        self._close()
        self._at = strategy.clock.train_exp_counter
        self._done = float(self._at)
        self._place = f"task {self._at + 1}/{self.tasks}"
        self._bar = self._open(strategy.train_epochs * len(strategy.dataloader), "step", self._place)
        self._enter(self._named(strategy, _BEFORE) or "preparing")

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Show experience and epoch, and start where a resumed run stands."""
        if self._bar is not None:
            clock = strategy.clock
            self._place = f"task {self._at + 1}/{self.tasks} epoch {clock.train_exp_epochs + 1}/{strategy.train_epochs}"
            self._bar.n = max(self._bar.n, clock.train_exp_iterations)
            # a probe goes before fine-tuning; without one there is a single phase, which needs no name
            self._enter(getattr(strategy, "phase", None) or ("fine-tuning" if self._named(strategy, _BEFORE) else ""))

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One step further."""
        if self._bar is not None and self._bar.update(1):
            phase = getattr(strategy, "phase", None)
            if phase is not None and phase != self.phase:
                self._enter(str(phase))
            self._done = self._at + self._bar.n / (self._bar.total or 1)
            self._tell()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """After the last one others fit classifiers or measure, which takes its time."""
        if strategy.clock.train_exp_epochs + 1 >= strategy.train_epochs:
            self._enter(self._named(strategy, _AFTER) or self.phase)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The bar goes, unless there is a phase after training."""
        phase = self._named(strategy, _AFTER)
        if phase:
            self._enter(phase)
        else:
            self._close_training()

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """All phases are over."""
        self._close_training()

    # -------------------------------------------------------------- evaluation
    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """A bar over the images of all evaluated experiences; plugins may do something first."""
        self._close_evaluation()
        if self._bar is None:
            self._done = float(strategy.clock.train_exp_counter)
        experiences = strategy.current_eval_stream
        images = sum(len(experience.dataset) for experience in experiences)
        self._evaluation = self._open(images, "image", "evaluating")

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Show which experience is evaluated."""
        if self._evaluation is not None:
            number = strategy.experience.current_experience + 1
            self._evaluation.set_description(f"{self.label} evaluating task {number}", refresh=False)

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One batch further: counted in images, as a batch may be part of a larger one."""
        if self._evaluation is not None and self._evaluation.update(len(strategy.mb_y)):
            self._tell()

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """The bar goes."""
        self._close_evaluation()

    # ------------------------------------------------------------------ helpers
    def close(self) -> None:
        """Take away what is drawn, also after an error."""
        self._close()

    def _named(self, strategy: Any, names: dict[str, str]) -> str:
        """What the plugins of a strategy do that is in a table, in its order; they may be subclasses."""
        kinds = {kind.__name__ for plugin in getattr(strategy, "plugins", ()) for kind in type(plugin).__mro__}
        return ", ".join(text for name, text in names.items() if name in kinds)

    def _enter(self, phase: str) -> None:
        self.phase = str(phase)
        if self._bar is not None:
            self._bar.set_description(" ".join(part for part in (self.label, self._place, self.phase) if part))

    def _tell(self) -> None:
        if self._drawn is not None:
            self._drawn(min(self._done / self.tasks, 1.0))

    def _open(self, total: int, unit: str, text: str) -> tqdm[Any]:
        desc = f"{self.label} {text}"
        return tqdm(total=total, desc=desc, unit=unit, leave=False, dynamic_ncols=True, mininterval=_INTERVAL)

    def _close_training(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def _close(self) -> None:
        self._close_evaluation()
        self._close_training()


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
