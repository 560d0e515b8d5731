"""Freezing of the weight matrices that mattered most: IPC of LoRAC-IPC (arXiv 2504.13407; procedure of its code).

While a task is trained, every matrix of the composed layers has an importance, the mean of ``|W * G|`` over its entries
with the merged weight W and its gradient G, smoothed into a sensitivity and an uncertainty. After the task the free
matrices with the largest product of the two are frozen: they keep their value in all later tasks.

Differs from the released code: importance is tracked in the last steps of a task only (``window``; averages of 0.85
forget the rest), G exists for one layer at a time and is dropped in its backward pass, edge cases are decided
(:func:`select_critical`). Cost: one product of the size of a weight gradient per layer in the steps of the window.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.plugins.finite_words import listed, nonfinite_stop
from avalanche_firn.plugins.importance import ImportanceTracker, select_critical
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin


def score_figures(score: Tensor, before: Tensor, after: Tensor) -> dict[str, float] | None:
    """How large the scores of the free matrices are, and how much of them lies in the newly frozen ones.

    :param score: ``(N,)`` float64, finite, at least 0. :param before: ``(N,)`` bool, frozen during the task.
    :param after: the same after it.
    :returns: ``largest``, ``mean``, and ``frozen-share`` of their sum (0 if that is 0); None if no matrix was free.
    """
    free = score[~before]
    if not len(free):
        return None
    total, chosen = float(free.sum()), float(score[after & ~before].sum())
    share = chosen / total if total > 0 else 0.0
    return {"largest": float(free.max()), "mean": total / len(free), "frozen-share": share}


class ImportantParameterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Freeze the most important matrices after each task. Comes after :class:`LoRACompositionPlugin` in ``plugins``.

    :param fraction: of all matrices, frozen per task: ``int(fraction * number)`` (0.05: training_scripts/*.sh). 0, or a
        fraction too small for one matrix, tracks and freezes nothing.
    :param beta1: smoothing of the sensitivity (0.85: released code). :param beta2: of the uncertainty (0.85).
    :param window: steps before the end of a task in which importance is tracked; None: all. 150, our choice: the scores
        differ from those of all steps by less than 1e-8.
    :param of_remaining: ``fraction`` counts free matrices with a score above 0 instead of all (option of the code).
    :param ties: ``"order"``: exactly as many as counted. ``"all"``: every matrix that reaches the last one's score
        (released code; may freeze everything).
    :raises ValueError: a setting out of range, no LoRACompositionPlugin before this one.
    :raises NonFiniteError: a score that is not finite.
    """

    def __init__(
        self,
        fraction: float = 0.05,
        *,
        beta1: float = 0.85,
        beta2: float = 0.85,
        window: int | None = 150,
        of_remaining: bool = False,
        ties: Literal["order", "all"] = "order",
    ) -> None:
        super().__init__()
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}; 0 to 1 is accepted")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; 1 and above or None is accepted")
        if ties not in ("order", "all"):
            raise ValueError(f"ties is {ties!r}; 'order' or 'all' is accepted")
        self.fraction = fraction
        self.window = window
        self.of_remaining = of_remaining
        self.ties: Literal["order", "all"] = ties
        self.tracker = ImportanceTracker(beta1, beta2)
        self.frozen_after: list[list[str]] = []
        """Names of all frozen matrices after each task."""
        self.scores_after: list[dict[str, float] | None] = []
        """Per task ``largest`` and ``mean`` of the scores of the matrices that were free in it, and ``frozen-share``,
        the share of their sum that lies in those frozen after it; None where nothing was tracked."""
        self._composition: LoRAComposition | None = None
        self._step: dict[str, Tensor] = {}  # importance of the matrices in the current step
        self._inverse: Tensor | None = None  # 1 / loss scale of fp16
        self._recording = False
        self._done = False  # the current task's matrices were chosen

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """The plugin that closes tasks comes first."""
        before = strategy.plugins[: strategy.plugins.index(self)]
        if not any(isinstance(plugin, LoRACompositionPlugin) for plugin in before):
            raise ValueError(
                "ImportantParameterPlugin freezes what LoRACompositionPlugin composes; give that one before it in "
                "plugins"
            )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Statistics begin anew."""
        self._composition = LoRAComposition(strategy.model)
        self._composition.record(None)
        self.tracker.reset()
        self._step, self._recording, self._done = {}, False, False

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Watch the gradients from the first step of the window on."""
        if self._recording or int(self.fraction * len(self._layers(strategy).positions)) == 0:
            return
        steps = strategy.train_epochs * len(strategy.dataloader)
        if self.window is None or strategy.clock.train_exp_iterations >= steps - self.window:
            layers = self._layers(strategy)
            layers.record({name: partial(self._record, name) for name in layers.positions})
            self._recording = True

    def _record(self, name: str, value: Tensor) -> None:
        if name in self._step:
            raise RuntimeError(
                f"matrix {name} got two gradients in one step; importance needs one backward pass through one forward "
                "pass per step"
            )
        self._step[name] = value

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """The loss scale that the gradients of this step had."""
        self._inverse = None
        if self._recording:
            for plugin in strategy.plugins:
                if isinstance(plugin, MixedPrecisionPlugin) and plugin.scaler is not None:
                    one = torch.ones((), device=strategy.device)
                    self._inverse = plugin.scaler.scale(one).reciprocal()  # stays on the device

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Smooth the importance of this step."""
        if not self._step:
            return
        names = [name for name in self._layers(strategy).positions if name in self._step]
        values = torch.stack([self._step[name] for name in names])
        self._step = {}
        if self._inverse is None:
            self.tracker.update_many(names, values)
        else:
            scaled = values * self._inverse
            self.tracker.update_many(names, scaled, valid=torch.isfinite(scaled).all())

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Choose after the last epoch."""
        if strategy.clock.train_exp_epochs + 1 >= strategy.train_epochs:
            self._choose(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The same for a task that stopped early."""
        if not self._done:
            self._choose(strategy)

    # ------------------------------------------------------------------ work
    def _choose(self, strategy: Any) -> None:
        layers = self._layers(strategy)
        layers.record(None)
        self._recording, self._done = False, True
        self._warn_if_stopped(strategy)
        found, scores = self.tracker.score(), None
        if found:
            absent = torch.zeros((), dtype=torch.float64)
            score = torch.stack([found[name].double().cpu() if name in found else absent for name in layers.positions])
            finite = score.isfinite().tolist()
            wrong = [name for name, known in zip(layers.positions, finite, strict=True) if not known]
            if wrong:
                what = f"that of {len(wrong)} of {len(finite)} isn't finite ({listed(wrong)})"
                raise nonfinite_stop(strategy, "the importance of matrices", what, "A smaller rate or clip is needed.")
            before = layers.frozen
            frozen = select_critical(score, before, self.fraction, of_remaining=self.of_remaining, ties=self.ties)
            layers.freeze(frozen)
            scores = score_figures(score, before, frozen)
        names = [name for name, frozen in zip(layers.positions, layers.frozen.tolist(), strict=True) if frozen]
        self.frozen_after.append(names)
        self.scores_after.append(scores)
        if strategy.evaluator.active:
            step = strategy.clock.train_exp_counter
            figures = {f"lorac/importance/{name}": value for name, value in (scores or {}).items()}
            for tag, value in {"lorac/frozen": len(names), **figures}.items():
                strategy.evaluator.publish_metric_value(MetricValue(self, tag, value, step))

    def matrices(self, strategy: Any) -> list[str]:
        """Names of all matrices that may be frozen."""
        return self._layers(strategy).positions

    def _warn_if_stopped(self, strategy: Any) -> None:
        """The window ends with the last step that was planned; a task may end sooner, also within its last epoch."""
        steps = strategy.train_epochs * len(strategy.dataloader)
        wanted = int(self.fraction * len(self._layers(strategy).positions))
        if wanted and self.window is not None and strategy.clock.train_exp_iterations < steps > self.window:
            warnings.warn(
                f"experience {strategy.clock.train_exp_counter} stopped early, before or within the window of the "
                f"{self.window} steps in which importance is tracked; window=None tracks all steps",
                RuntimeWarning,
                stacklevel=2,
            )

    def _layers(self, strategy: Any) -> LoRAComposition:
        if self._composition is None:
            self._composition = LoRAComposition(strategy.model)
        return self._composition

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Statistics of the task and what was frozen (the flags themselves belong to the model)."""
        return {
            "tracker": self.tracker.state_dict(),
            "frozen_after": [list(names) for names in self.frozen_after],
            "scores_after": [None if scores is None else dict(scores) for scores in self.scores_after],
            "done": self._done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.tracker.load_state_dict(state["tracker"])
        self.frozen_after = [list(names) for names in state["frozen_after"]]
        scores = state.get("scores_after", [None] * len(self.frozen_after))  # states of 0.1 have none
        self.scores_after = [None if found is None else dict(found) for found in scores]
        self._done = state["done"]


__all__ = ["ImportanceTracker", "ImportantParameterPlugin", "score_figures", "select_critical"]
