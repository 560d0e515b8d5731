"""Calls to plugins inside the loop, without the ones that do nothing.

Avalanche asks every plugin for every event, and its evaluator every metric and logger, whether or not they have
anything to do: about 150 us per training iteration. Here the answer to "who listens to this event" is found once per
epoch and evaluation. Who listens is called in the same order with the same arguments, so nothing else changes.

Not seen before the next epoch: a plugin, metric or logger whose method is replaced in the middle of one, and, by
metrics and loggers, an attribute that is put on an experience after their first call of a kind in it. Plugins that are
added or removed are seen at once. Loggers are not asked to log an empty list of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import avalanche.core
from avalanche.evaluation import PluginMetric
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate, PeriodicEval

__all__ = ["LOOP_EVENTS", "install_hooks"]

LOOP_EVENTS = (
    "before_training_iteration",
    "before_forward",
    "after_forward",
    "before_backward",
    "after_backward",
    "before_update",
    "after_update",
    "after_training_iteration",
    "before_eval_iteration",
    "before_eval_forward",
    "after_eval_forward",
    "after_eval_iteration",
    "before_eval_dataset_adaptation",
    "after_eval_dataset_adaptation",
    "after_eval_exp",
)
"""Events of an iteration, and those of an evaluated experience that do nothing but call plugins."""

_EMPTY = (avalanche.core.BasePlugin, avalanche.core.BaseSGDPlugin, PluginMetric, BaseLogger)
Call = Callable[..., Any]


def listens(obj: Any, event: str) -> bool:
    """Whether an object has a method for an event, other than the empty one of Avalanche's base classes."""
    method = getattr(obj, event, None)
    if method is None:
        return False
    function = getattr(method, "__func__", method)
    return not any(function is vars(base).get(event) for kind in _EMPTY for base in kind.__mro__)


def install_hooks(strategy: Any) -> Callable[[], None]:
    """Replace the strategy's triggers of :data:`LOOP_EVENTS`; what is returned looks for the listeners again.

    A trigger that the strategy's class does more in than Avalanche's stays.
    """
    kind = type(strategy)
    stock = [e for e in LOOP_EVENTS if getattr(kind, f"_{e}") is getattr(BaseSGDTemplate, f"_{e}")]
    triggers = [_Trigger(strategy, event) for event in stock]
    for trigger in triggers:
        setattr(strategy, f"_{trigger.event}", trigger)

    return partial(_renew, triggers)  # no function around the triggers: copies of the strategy have their own


def _renew(triggers: Sequence[_Trigger]) -> None:
    for trigger in triggers:
        trigger.forget()


class _Trigger:
    """Calls the plugins that listen to one event."""

    def __init__(self, strategy: Any, event: str) -> None:
        self.strategy, self.event = strategy, event
        self.plugins: list[Any] = []
        self._calls: list[Call] = []

    def __call__(self, **kwargs: Any) -> None:
        strategy = self.strategy
        if strategy.plugins != self.plugins:  # identity decides, as plugins don't compare otherwise
            self._find()
        for call in self._calls:
            call(strategy, **kwargs)

    def forget(self) -> None:
        """Look for listeners again at the next call, and let go of the experience."""
        self.plugins, self._calls = [], []

    def _find(self) -> None:
        self.plugins = list(self.strategy.plugins)
        self._calls = []
        for plugin in self.plugins:
            if type(plugin) is EvaluationPlugin:
                if _wanted(plugin, self.event):
                    self._calls.append(_Evaluator(plugin, self.event))
            elif type(plugin) is PeriodicEval and plugin.peval_mode != "iteration":
                continue  # has a method for iterations that only acts in that mode
            elif listens(plugin, self.event):
                self._calls.append(getattr(plugin, self.event))


def _wanted(evaluator: EvaluationPlugin, event: str) -> bool:
    return any(listens(obj, event) for obj in (*evaluator.metrics, *evaluator.loggers))


class _Evaluator:
    """What Avalanche's evaluator does at an event, for the metrics and loggers that listen."""

    def __init__(self, evaluator: EvaluationPlugin, event: str) -> None:
        self._evaluator = evaluator
        self._metrics = [getattr(m, event) for m in evaluator.metrics if listens(m, event)]
        self._loggers = [(log, getattr(log, event) if listens(log, event) else None) for log in evaluator.loggers]
        self._of: Any = None
        self._logged: Any = None

    def __call__(self, strategy: Any, **kwargs: Any) -> None:
        evaluator, experience = self._evaluator, strategy.experience
        if not evaluator.active:
            return
        if experience is not None and experience is not self._of:
            self._of, self._logged = experience, experience.logging()
        if experience is not None:
            strategy.experience = self._logged
        try:
            for metric in self._metrics:
                found = metric(strategy)
                if found is None:
                    continue
                for value in found if isinstance(found, Sequence) else (found,):
                    evaluator.publish_metric_value(value)
            values = evaluator._metric_values
            for logger, log in self._loggers:
                if values:
                    logger.log_metrics(values)
                if log is not None:
                    log(strategy, values)
            evaluator._metric_values = []
        finally:
            strategy.experience = experience
