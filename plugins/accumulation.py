"""Gradient accumulation for any Avalanche SGD strategy: one optimizer step for several mini-batches.

A batch that doesn't fit into memory is cut into ``steps`` mini-batches (``train_mb_size`` images each). The gradient of
a step is the mean over all images of its group, so that the run equals one with batches of ``steps * train_mb_size``
images up to rounding, also where the last group of an epoch or its last mini-batch is smaller. BatchNorm sees
mini-batches, and so does dropout's generator.

The plugin replaces ``training_epoch`` on the strategy. All triggers fire as in Avalanche's loop, but ``before_update``
and ``after_update``, which belong to a step: they fire with the last mini-batch of a group. ``strategy.loss`` stays the
loss of the mini-batch. In ``after_backward`` the gradients are those of the group only at its last mini-batch (where
fp16 is unscaled, once); before that they are a part of the sum, with fp16 a scaled one. Losses that plugins add in
``before_backward`` are averaged like the rest.

``strategy.clock`` and all metrics count mini-batches. What goes by steps asks :func:`updates_in` and
:func:`updates_done`; what can't be right is refused before any work: losses over pairs within a batch, schedules per
iteration of others, gradients taken in the middle of a group.

Cost: one multiplication of a scalar per mini-batch, and one of all gradients where a group is not full.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates.update_type.sgd_update import SGDUpdate

from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin


class GradientAccumulationPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """An optimizer step every ``steps`` mini-batches.

    :param steps: mini-batches per step; 1 leaves Avalanche's loop in place. The groups are counted from the start of
        each epoch, whose last one may be shorter.
    :raises ValueError: ``steps`` below 1; a strategy with another loop or a second plugin of this kind; a plugin,
        criterion or metric that can't work with parts of a batch (named); a loader without a length.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; a whole number of 1 and above is accepted")
        self.steps = steps
        self._samples = 0  # of the open group
        self._first = 0  # of its first mini-batch
        self._length = 0  # mini-batches of the epoch

    @property
    def inside_group(self) -> bool:
        """Whether gradients are waiting for their step: nothing may be saved then."""
        return self._samples > 0

    def completes(self, strategy: Any) -> bool:
        """Whether the mini-batch in work is the last one of its group."""
        # the clock, not a counter of our own: a resumed epoch begins in its middle
        place = int(strategy.clock.train_epoch_iterations) + 1
        return self.steps == 1 or place % self.steps == 0 or place == self._length

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check, and take the loop over (once)."""
        if self.steps == 1:
            return
        if sum(isinstance(plugin, GradientAccumulationPlugin) for plugin in strategy.plugins) > 1:
            raise ValueError("the strategy has several GradientAccumulationPlugins; one is accepted")
        _refuse(strategy, self.steps)
        current = vars(strategy).get("training_epoch")
        if getattr(current, "accumulates", None) is self:
            return
        if current is not None:
            raise ValueError("training_epoch of the strategy was replaced by another plugin; one of them is accepted")

        # not a function around the strategy, which a copy of the strategy would go on training
        training_epoch = partial(self._epoch, strategy)
        training_epoch.accumulates = self  # type: ignore[attr-defined]
        strategy.training_epoch = training_epoch

    # ------------------------------------------------------------------ loop
    def _epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Avalanche's training epoch with steps at the end of each group."""
        try:
            self._length = len(strategy.dataloader)
        except TypeError:
            raise ValueError(
                f"{type(strategy.dataloader).__name__} has no length, so the end of the last group isn't known; a "
                "loader with a length is accepted"
            ) from None
        self._samples = 0  # an exception may have left an open group
        for batch in strategy.dataloader:
            strategy.mbatch = batch
            if strategy._stop_training:
                break
            strategy._unpack_minibatch()
            strategy._before_training_iteration(**kwargs)
            count = len(strategy.mb_y)
            if not self._samples:
                strategy.optimizer.zero_grad()
                self._first = count
            self._samples += count
            strategy.loss = strategy._make_empty_loss()

            strategy._before_forward(**kwargs)
            strategy.mb_output = strategy.forward()
            strategy._after_forward(**kwargs)
            strategy.loss += strategy.criterion()

            complete = self.completes(strategy)
            strategy._before_backward(**kwargs)
            self._backward(strategy, count, complete=complete)
            strategy._after_backward(**kwargs)
            if complete:
                self._update(strategy, **kwargs)
            strategy._after_training_iteration(**kwargs)
        if self._samples:  # stopped, or the loader gave less than it had promised: no gradient is thrown away
            scaler = _scaler(strategy)
            if scaler is not None:
                scaler.unscale_(strategy.optimizer)
            self._to_mean(strategy)
            self._update(strategy, **kwargs)

    def _backward(self, strategy: Any, count: int, *, complete: bool) -> None:
        """Add the gradient of a mini-batch, weighted as in a full group of mini-batches like the first one."""
        loss = strategy.loss
        strategy.loss = loss * (count / (self.steps * self._first))
        try:
            scaler = _scaler(strategy)
            if scaler is None or complete:
                strategy.backward()  # with fp16 this unscales the sum, which may happen once per step
            else:
                scaler.scale(strategy.loss).backward(retain_graph=strategy.retain_graph)
        finally:
            strategy.loss = loss
        if complete:
            self._to_mean(strategy)

    @torch.no_grad()
    def _to_mean(self, strategy: Any) -> None:
        """From the weights of a full group to the mean over the images that there were."""
        full = self.steps * self._first
        if self._samples != full:
            groups = strategy.optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, full / self._samples)

    def _update(self, strategy: Any, **kwargs: Any) -> None:
        strategy._before_update(**kwargs)
        strategy.optimizer_step()
        strategy._after_update(**kwargs)
        self._samples = 0

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The setting; groups are complete when this is called.

        A checkpoint made with other ``steps`` is translated before it is loaded, if a step has the same images.
        """
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the setting.

        :raises ValueError: the state was made with other ``steps``.
        """
        if state["steps"] != self.steps:
            raise ValueError(f"steps is {self.steps}; the state was made with steps={state['steps']}")


# ---------------------------------------------------------------- for other plugins
def accumulation_steps(strategy: Any) -> int:
    """Mini-batches per optimizer step of a strategy; 1 without the plugin."""
    for plugin in strategy.plugins:
        if isinstance(plugin, GradientAccumulationPlugin):
            return plugin.steps
    return 1


def inside_group(strategy: Any) -> bool:
    """Whether gradients of some mini-batches are waiting for their step."""
    return any(isinstance(p, GradientAccumulationPlugin) and p.inside_group for p in strategy.plugins)


def updates_in(strategy: Any, batches: int) -> int:
    """Optimizer steps in an epoch of so many mini-batches."""
    return -(-batches // accumulation_steps(strategy))


def updates_done(strategy: Any) -> int:
    """Optimizer steps of the current experience that are done, for hooks of an iteration."""
    steps, clock = accumulation_steps(strategy), strategy.clock
    if steps == 1:
        return int(clock.train_exp_iterations)
    inside = int(clock.train_epoch_iterations)
    return int(clock.train_exp_epochs) * updates_in(strategy, len(strategy.dataloader)) + inside // steps


def _scaler(strategy: Any) -> torch.amp.GradScaler | None:
    for plugin in strategy.plugins:
        if isinstance(plugin, MixedPrecisionPlugin) and plugin.scaler is not None:
            return plugin.scaler
    return None


# --------------------------------------------------------------------- refusals
_AVALANCHE = {
    "AGEMPlugin": "takes a gradient of its own before each iteration",
    "GEMPlugin": "takes gradients of its own before each iteration",
    "MIRPlugin": "looks an optimizer step ahead in each iteration",
    "RWalkPlugin": "measures the path of the weights iteration by iteration",
    "GSS_greedyPlugin": "takes gradients of its own in each iteration",
    "RARPlugin": "takes steps of its own in each iteration",
    "CoPEPlugin": "compares the images of a batch with each other",
}
"""Avalanche's plugins that can't work on parts of a batch, and why; by name, since some need further packages."""


def _refuse(strategy: Any, steps: int) -> None:
    """ValueError naming whatever can't be right with parts of a batch."""
    # imported here, since plugins import the functions above
    from avalanche.training.supervised import DER, SCR

    from avalanche_firn.evaluation.gradient_alignment import GradientAlignment

    name = type(strategy).__name__
    if isinstance(strategy, SCR):
        _say(name, "compares the images of a batch with each other", steps)
    if isinstance(strategy, DER):
        _say(name, "adds means over different parts of a batch", steps)
    if type(strategy).training_epoch is not SGDUpdate.training_epoch:
        _say(name, "has a training loop of its own", steps)
    for plugin in (*strategy.plugins, strategy._criterion):
        reason = _reason(plugin)
        if reason:
            _say(type(plugin).__name__, reason, steps)
    for metric in strategy.evaluator.metrics:
        if isinstance(metric, GradientAlignment):
            _say("GradientAlignment", "takes every iteration for a step", steps)


def _say(name: str, reason: str, steps: int) -> None:
    raise ValueError(f"steps is {steps} and {name} {reason}; steps=1 is accepted with it")


def _reason(plugin: Any) -> str | None:
    """Why a plugin or criterion can't work on parts of a batch; None where it can."""
    from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
    from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
    from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
    from avalanche_firn.plugins.zapping import ZappingPlugin

    if isinstance(plugin, ContrastiveDistillationPlugin):
        return "compares the images of a batch with each other"
    if isinstance(plugin, SequentialPhasePlugin):
        return "makes an episode of every iteration"
    if isinstance(plugin, ImportantParameterPlugin) and plugin.fraction > 0:
        return "takes importance from the gradient of a whole batch, of which it keeps no sum"
    if isinstance(plugin, ZappingPlugin):
        if plugin.schedule not in ("experience", "epoch"):
            shown = plugin.schedule if isinstance(plugin.schedule, str) else "a function"
            return f"would redraw rows within the batch of a step (schedule {shown!r}; 'experience' or 'epoch' is fine)"
        if plugin.relearn_steps:
            return f"has relearn_steps of train_mb_size images (relearn_steps={plugin.relearn_steps}; 0 is fine)"
    if getattr(plugin, "step_granularity", None) == "iteration":
        return "steps its schedule in every iteration (step_granularity='epoch' is fine)"
    for kind in type(plugin).__mro__:
        if kind.__name__ in _AVALANCHE:
            return _AVALANCHE[kind.__name__]
    return None


__all__ = ["GradientAccumulationPlugin", "accumulation_steps", "inside_group", "updates_done", "updates_in"]
