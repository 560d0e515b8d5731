"""LoRA composition: one low-rank pair per task, earlier ones rescaled, pairs of different tasks kept orthogonal.

LoRAC-IPC (arXiv 2504.13407; procedure of the released code). In every experience a pair opens in each composed layer of
the model (:func:`avalanche_firn.models.add_composed_lora`); pairs, classifier and the scalars of earlier tasks are
trained by a fresh optimizer, everything else stands still; the loss gets an orthogonality penalty, gradients are
clipped, and the scalars are copied at the end, which keeps the weights of every task.

Differs from the released code: any optimizer and schedule; BatchNorm of hybrid models keeps its statistics. Cost:
:mod:`avalanche_firn.models.lora_math`; the penalty is one batched product per input width and step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.parts import find_parts
from avalanche_firn.plugins.finite_words import nonfinite_stop
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin, OptimizerFactory, trainable
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.plugins.schedules import SchedulerFactory


class LoRACompositionPlugin(FreshOptimizerPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Open, train and close a task in all composed layers of the model, in every experience.

    Groups of the optimizer: ``"lora"`` (pairs of the task) and ``"head"`` at the rate, ``"omega"`` (scalars of earlier
    tasks) at ``lr * omega_scale``. Defaults: training_scripts/*.sh of the released code, CIFAR-100 with AugReg weights.

    :param orthogonality: weight lambda of the penalty (0.5). 0 switches it off.
    :param omega_scale: rate of the scalars / lr (1.0).
    :param clip: largest norm of all gradients together, penalty included (1.0); None: no clipping.
    :param first_lr: rate of the first experience in place of the optimizer's; None: the same.
    :param optimizer_factory: see :class:`FreshOptimizerPlugin`. :param scheduler_factory: likewise.
    :param seed: of the random values in new pairs.
    :param head_name: dotted name of the classifier, see :func:`avalanche_firn.models.parts.find_parts`.
    :raises ValueError: the model has no composed layer; a setting out of range; an online stream.
    """

    def __init__(
        self,
        orthogonality: float = 0.5,
        *,
        omega_scale: float = 1.0,
        clip: float | None = 1.0,
        first_lr: float | None = None,
        optimizer_factory: OptimizerFactory | None = None,
        scheduler_factory: SchedulerFactory | None = None,
        seed: int = 0,
        head_name: str | None = None,
    ) -> None:
        super().__init__(optimizer_factory=optimizer_factory, scheduler_factory=scheduler_factory)
        for field, value in (("orthogonality", orthogonality), ("omega_scale", omega_scale), ("seed", seed)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} is {value}; 0 and above is accepted")
        for field, limit in (("clip", clip), ("first_lr", first_lr)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise ValueError(f"{field} is {limit}; a number above 0 or None is accepted")
        self.orthogonality = orthogonality
        self.omega_scale = omega_scale
        self.clip = clip
        self.first_lr = first_lr
        self.seed = seed
        self.head_name = head_name
        self.overlaps: list[dict[str, float | None]] = []
        """:meth:`LoRAComposition.overlap` after every task; None where there is nothing to compare."""
        self._composition: LoRAComposition | None = None
        self._sums: Tensor | None = None  # of the loss without penalty, of the penalty, and the number of steps

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model before any work is done; only pairs, scalars and classifier are trained from here on."""
        super().before_training(strategy, **kwargs)
        self._composition = composition = LoRAComposition(strategy.model)
        parts = find_parts(strategy.model, self.head_name)
        own = {id(p) for layer in composition.layers.values() for p in layer.pair_parameters()}
        for _, parameter in parts.backbone_parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Open the task before Avalanche looks at the parameters (a resumed run comes with an open one)."""
        if isinstance(strategy.experience, OnlineCLExperience):
            raise ValueError(
                "the experience is a piece of an online stream; LoRA composition opens a pair per experience and "
                "accepts whole tasks"
            )
        composition = self._layers(strategy)
        if composition.num_closed == composition.num_tasks:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, composition.num_tasks))
            composition.open_task(generator)
        super().before_train_dataset_adaptation(strategy, **kwargs)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Build the optimizer; the first task may have a rate of its own."""
        self.lr = self.first_lr if self._layers(strategy).num_tasks == 1 else None
        self._composition = LoRAComposition(strategy.model)
        self._sums = None
        super().before_training_exp(strategy, **kwargs)

    def groups(self, strategy: Any) -> list[dict[str, Any]]:
        """Pairs, classifier, scalars."""
        composition = self._layers(strategy)
        head = [p for _, p in find_parts(strategy.model, self.head_name).head_parameters() if p.requires_grad]
        found = [("lora", composition.pairs(), 1.0), ("head", head, 1.0)]
        found += [("omega", composition.scalars(), self.omega_scale)]
        return [{"params": params, "name": name, "lr_scale": scale} for name, params, scale in found if params]

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """BatchNorm outside the classifier belongs to the frozen backbone."""
        parts = find_parts(strategy.model, self.head_name)
        head = set(parts.head.modules())
        for module in strategy.model.modules():
            if isinstance(module, _BatchNorm) and module not in head:
                module.eval()

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty."""
        loss = strategy.loss.detach().sum()
        penalty = torch.zeros_like(loss)
        if self.orthogonality:
            term = self.orthogonality * self._layers(strategy).orthogonality()
            strategy.loss = strategy.loss + term
            penalty = term.detach().to(loss)
        step = torch.stack([loss, penalty, torch.ones_like(loss)])
        self._sums = step if self._sums is None else self._sums + step

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clip loss and penalty together (released code)."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(strategy.model), self.clip)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Step the schedule, log both parts of the loss (one read); close the task after its last epoch."""
        super().after_training_epoch(strategy, **kwargs)
        self._publish_losses(strategy)
        if strategy.clock.train_exp_epochs + 1 >= strategy.train_epochs:
            self._close(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The same for a task that stopped early."""
        if self._layers(strategy).num_closed < self._layers(strategy).num_tasks:
            self._close(strategy)

    # ------------------------------------------------------------------ work
    def _close(self, strategy: Any) -> None:
        composition = self._layers(strategy)
        composition.close_task()
        overlap = {name: value if math.isfinite(value) else None for name, value in composition.overlap().items()}
        self.overlaps.append(overlap)
        figures = {f"lorac/overlap/{name}": value for name, value in overlap.items() if value is not None}
        self._publish(strategy, figures, strategy.clock.train_exp_counter)

    def _layers(self, strategy: Any) -> LoRAComposition:
        if self._composition is None:
            self._composition = LoRAComposition(strategy.model)
        return self._composition

    def _publish_losses(self, strategy: Any) -> None:
        if self._sums is None:
            return
        loss, penalty, steps = self._sums.tolist()
        self._sums = None
        if not math.isfinite(loss + penalty):
            what = f"loss {loss / steps} and orthogonality penalty {penalty / steps}"
            advice = "A smaller rate or clip is needed."
            raise nonfinite_stop(strategy, f"epoch {strategy.clock.train_exp_epochs}", what, advice)
        figures = {"loss/task": loss / steps, "loss/orthogonality": penalty / steps}
        self._publish(strategy, figures, strategy.clock.train_iterations)

    def describe_nonfinite(self, strategy: Any) -> str | None:
        """For the message of a guard: which part of the loss it was."""
        if self._sums is None:
            return None
        loss, penalty, _ = self._sums.tolist()
        if math.isfinite(loss + penalty):
            return None
        both = f"the losses of the task add up to {loss:.4g}, the orthogonality penalties to {penalty:.4g}"
        return f"Since the epoch began, {both}"

    def _publish(self, strategy: Any, figures: dict[str, float], step: int) -> None:
        if strategy.evaluator.active:
            for tag, value in figures.items():
                strategy.evaluator.publish_metric_value(MetricValue(self, tag, value, step))

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Progress of schedule and logs (pairs and scalars belong to the model)."""
        return {**super().state_dict(), "overlaps": [dict(o) for o in self.overlaps], "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.overlaps = [dict(o) for o in state["overlaps"]]
        self._sums = None if state["sums"] is None else state["sums"].clone()


__all__ = ["LoRACompositionPlugin"]
