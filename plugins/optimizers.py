"""A fresh optimizer and schedule in every experience, with named parameter groups.

Avalanche keeps one optimizer for the whole stream and guesses the group of each new parameter from the module tree. The
guess fails silently once a head grows during an evaluation, and raises for adapters that are spread over groups. Here a
one-group stand-in goes through Avalanche's bookkeeping, then the real optimizer takes its place: momentum never crosses
a task border, and each group has the members that its name says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from avalanche_firn.plugins.finite_words import refuse_empty
from avalanche_firn.plugins.schedules import SchedulerFactory

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]


def optimizer_like(template: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A new optimizer of the class and defaults of ``template``, over other parameter groups.

    :raises ValueError: the template has more than one group, whose settings would be lost.
    """
    if len(template.param_groups) > 1:
        raise ValueError(
            f"the optimizer has {len(template.param_groups)} parameter groups; one group is accepted, since this "
            "plugin makes the groups (give optimizer_factory=... for settings of your own)"
        )
    accepted = inspect.signature(type(template).__init__).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    # a rate or decay that was edited after construction stands in the group, not in the defaults
    settings = {
        k: template.param_groups[0].get(k, v) for k, v in template.defaults.items() if takes_all or k in accepted
    }
    return type(template)(groups, **settings)


class FreshOptimizerPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Rebuild optimizer and schedule in every experience; works with any Avalanche SGD strategy.

    One group, ``"model"``, holds all trainable parameters; subclasses make other groups in :meth:`groups`.

    :param optimizer_factory: ``groups -> optimizer``; default: class and settings of the optimizer that was given to
        the strategy. A group's rate is multiplied by its ``lr_scale`` after construction.
    :param scheduler_factory: ``optimizer -> scheduler``, stepped after each epoch; see
        :mod:`avalanche_firn.plugins.schedules`. Plateau schedules need a metric and are refused.
    """

    rebuilds_optimizer = True
    """Optimizer state does not cross experiences (the checkpoint plugin asks)."""

    def __init__(
        self, *, optimizer_factory: OptimizerFactory | None = None, scheduler_factory: SchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer_factory
        self.scheduler_factory = scheduler_factory
        self.scheduler: LRScheduler | None = None
        self.lr: float | None = None
        """Rate of the next experience in place of the template's; other plugins set it before the experience opens."""
        self._template: Optimizer | None = None

    def groups(self, strategy: Any) -> list[dict[str, Any]]:
        """Parameter groups: ``{"params": [...], "name": str, "lr_scale": float}``."""
        return [{"params": trainable(strategy.model), "name": "model", "lr_scale": 1.0}]

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check once, before any work, that nobody else owns the optimizer."""
        owners = [type(p).__name__ for p in strategy.plugins if isinstance(p, FreshOptimizerPlugin)]
        if len(owners) > 1:
            raise ValueError(f"plugins {owners} all rebuild the optimizer; one of them is accepted")
        if self._template is None:
            self._template = strategy.optimizer

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Put the stand-in in place before Avalanche looks at the optimizer; an experience needs samples."""
        refuse_empty(strategy.experience)
        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=1.0)
        strategy.optimized_param_id = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Build the real optimizer, after the model has grown, and its schedule."""
        groups = self.groups(strategy)
        if not any(group["params"] for group in groups):
            raise ValueError("no parameter of the model is trainable; at least one with requires_grad is needed")
        if self.optimizer_factory is not None:
            optimizer = self.optimizer_factory(groups)
        else:
            assert self._template is not None
            optimizer = optimizer_like(self._template, groups)
        for group in optimizer.param_groups:
            group["lr"] = (group["lr"] if self.lr is None else self.lr) * group["lr_scale"]
        strategy.optimizer = optimizer
        self.scheduler = None
        if self.scheduler_factory is not None:
            self.scheduler = self.scheduler_factory(optimizer)
            if isinstance(self.scheduler, ReduceLROnPlateau):
                raise ValueError(
                    "scheduler_factory gave ReduceLROnPlateau, which needs a metric; schedules by epoch are accepted"
                )

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Step the schedule."""
        if self.scheduler is not None:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Progress of the schedule (the optimizer belongs to the strategy)."""
        return {"scheduler": None if self.scheduler is None else _plain(self.scheduler.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the progress; without a schedule (between experiences) there is nothing to restore."""
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with ``requires_grad``, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def _plain(value: Any) -> Any:
    """Keep what JSON can hold; functions and counters of a scheduler come from its factory again."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _plain(item) for key, item in value.items() if isinstance(key, str) and _is_plain(item)}


def _is_plain(item: Any) -> bool:
    if isinstance(item, dict):
        return all(isinstance(key, str) for key in item)
    return item is None or isinstance(item, (bool, int, float, str, list, tuple))


__all__ = ["FreshOptimizerPlugin", "OptimizerFactory", "optimizer_like", "trainable"]
