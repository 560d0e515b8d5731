"""Contrastive learning of a representation, kept by distillation of the similarities of each batch.

Co2L (arXiv 2106.14413): only samples of the current task are anchors of a supervised contrastive loss; from the second
task on the structure of similarities within the batch is distilled from the model as it was before the task. CILA
(arXiv 2405.18756) weighs the distillation by the ratio of the average losses of the tasks so far,
``max(floor, balance * sum(distillation) / sum(contrastive))``. The classifier is fitted afterwards, see
:mod:`~avalanche_firn.plugins.classifier_stage`.

The plugin is the criterion of a strategy whose model gives projections in training mode, of two views per image::

    model = with_projection_head(timm.create_model("resnet18"))
    Naive(model=model, criterion=ContrastiveDistillationPlugin(augmentation=ContrastiveAugmentation(32)), ...)

Of CILA only the abstract was at hand: the value of ``balance``, the averages in the ratio and whether the contrastive
one carries the factor ``temperature / base_temperature`` are open, hence parameters. With that factor
(``ratio_scale="training"``) the ratio is mostly below 1 and CILA equals Co2L; a warning says so at the end of a run.

Cost beside the student's step: one forward pass of the teacher without gradient, a copy of the model, and the losses
(:mod:`~avalanche_firn.plugins.contrastive_losses`). Nothing waits for the device within an epoch.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.models.contrastive import check_projecting
from avalanche_firn.models.parts import evaluation_mode
from avalanche_firn.models.processes import all_rows, own_rows
from avalanche_firn.plugins.contrastive_losses import (
    CoefficientMode,
    asymmetric_supcon,
    check_coefficient,
    check_temperatures,
    contrastive_distillation,
    distillation_coefficient,
    loss_ratio,
    relation_distillation,
)
from avalanche_firn.plugins.finite_words import nonfinite_stop, refuse_empty
from avalanche_firn.plugins.random_state import derived_seed, private_random_state
from avalanche_firn.plugins.rehearsal import RehearsalSet, find_rehearsal

_TAGS = ("cila/contrastive", "cila/distillation", "cila/coefficient", "cila/ratio", "cila/floor-active")


class ContrastiveDistillationPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Criterion of Co2L and CILA; in evaluation cross-entropy of the logits. Pass it as ``criterion=``.

    :param temperature: of the contrastive loss, 0.5. :param student_temperature: 0.2 and
    :param teacher_temperature: 0.01, of the distillation (Co2L's released code, CIFAR-10).
    :param base_temperature: the contrastive loss is multiplied by ``temperature / base_temperature``, 0.07 (released
        code; published figures come from it); None: factor 1.
    :param mode: ``"max"`` (CILA), ``"constant"`` (Co2L: the coefficient is ``floor``), ``"min"``, ``"pure"``; see
        :func:`distillation_coefficient`. :param balance: 1, open. :param floor: 1. :param ceiling: None.
    :param average_over: batches whose losses enter the averages: those of the ``"last_epoch"`` of a task, of the whole
        ``"task"``, or of one more pass with the ``"final_model"`` without gradient; open. The losses logged per epoch
        are means since the beginning of the epoch, with ``"task"`` of the task.
    :param ratio_scale: ``"plain"``: contrastive averages without the factor, ``"training"``: with it; open.
    :param teacher_bn: the teacher's BatchNorm: ``"batch"`` statistics, its running ones go on moving (released code),
        or its ``"running"`` statistics. The rest of the teacher is in evaluation mode.
    :param domain_incremental: equal classes of different experiences are negatives, anchors are the samples of the
        current experience; stored samples then come from a :class:`RehearsalPlugin` with ``batches="union"``.
    :param augmentation: of a batch on the device, ``(N, C, H, W) -> (N, 2, C, H, W)``; None: the loader gives views.
    :param seed: of the additional pass of ``"final_model"``.
    :raises ValueError: settings out of range; a model without projections; one view per image; an
        experience without a training sample.
    :raises NonFiniteError: a loss that is not finite at the end of an epoch.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        student_temperature: float = 0.2,
        teacher_temperature: float = 0.01,
        base_temperature: float | None = 0.07,
        mode: CoefficientMode = "max",
        balance: float = 1.0,
        floor: float = 1.0,
        ceiling: float | None = None,
        average_over: Literal["last_epoch", "task", "final_model"] = "last_epoch",
        ratio_scale: Literal["plain", "training"] = "plain",
        teacher_bn: Literal["batch", "running"] = "batch",
        *,
        domain_incremental: bool = False,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_temperatures(
            temperature=temperature,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            base_temperature=base_temperature,
        )
        check_coefficient(balance, floor, ceiling, mode)
        for field, value, accepted in (
            ("average_over", average_over, ("last_epoch", "task", "final_model")),
            ("ratio_scale", ratio_scale, ("plain", "training")),
            ("teacher_bn", teacher_bn, ("batch", "running")),
        ):
            if value not in accepted:
                raise ValueError(f"{field} is {value!r}; one of {list(accepted)} is accepted")
        if seed < 0:
            raise ValueError(f"seed is {seed}; 0 and above is accepted")
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.base_temperature = base_temperature
        self.mode: CoefficientMode = mode
        self.balance = balance
        self.floor = floor
        self.ceiling = ceiling
        self.average_over = average_over
        self.ratio_scale = ratio_scale
        self.teacher_bn = teacher_bn
        self.domain_incremental = domain_incremental
        self.augmentation = augmentation
        self.seed = seed
        self.teacher: nn.Module | None = None
        """The model as it was before the current task, without gradients; None in the first task."""
        self.coefficients: list[float | None] = []
        """Weight of the distillation in every task; None in the first."""
        self.contrastive_losses: list[float] = []
        """Average contrastive loss of every finished task, nats, without the factor of ``base_temperature``."""
        self.distillation_losses: list[float] = []
        """Average distillation loss of every finished task, nats; 0 in the first."""
        self._teacher_state: dict[str, Tensor] | None = None  # loaded before there is a teacher to hold it
        self._sums: Tensor | None = None  # contrastive, distillation, samples; on the device
        self._renew = False  # the next batch begins them anew
        self._current: Tensor | None = None  # class ids of the experience
        self._views: Tensor | None = None  # of the minibatch in work, until the loss was computed
        self._origins: Tensor | None = None  # experience of each of its samples, (N,), where the loader tells
        self._experience = 0
        self._loader: Any = None

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check once, before any work."""
        if strategy._criterion is not self:
            raise ValueError("the plugin is not the strategy's criterion; pass it as criterion=, not in plugins")
        check_projecting(strategy.model)
        if isinstance(self.augmentation, nn.Module):
            self.augmentation.to(strategy.device)
        rehearsal = find_rehearsal(strategy)
        separate = rehearsal is not None and rehearsal.batches != "union"
        if self.domain_incremental and (separate or any(isinstance(p, ReplayPlugin) for p in strategy.plugins)):
            raise ValueError(
                "domain_incremental is True with replayed batches, which don't tell where a sample comes from; "
                "RehearsalPlugin(batches='union') is accepted"
            )

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """An experience without samples would be refused by the loader, without saying which."""
        refuse_empty(strategy.experience)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Copy the teacher and weigh its distillation for this task."""
        task = len(self.contrastive_losses)
        self.coefficients = self.coefficients[:task]
        if task == 0:
            self.teacher, coefficient = None, None
        else:
            self.teacher = self._copy(strategy.model)
            coefficient = distillation_coefficient(*self._averages(), **self._rule())
        self._teacher_state = None
        self.coefficients.append(coefficient)
        classes = sorted(int(c) for c in strategy.experience.classes_in_this_experience)
        self._current = torch.tensor(classes, device=strategy.device)
        self._experience = int(strategy.experience.current_experience)
        self._loader = self._sums = None

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Begin the averages of the epoch anew, unless they are those of the task; an epoch that is never entered
        (early stopping) leaves those of the one before."""
        self._renew = self.average_over != "task"
        if self._loader is None:
            self._loader = strategy.dataloader  # by now every plugin has put its own in place

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Make the views of the batch."""
        if self.augmentation is not None:
            with torch.no_grad():
                strategy.mbatch[0] = self.augmentation(strategy.mb_x)
        self._views = strategy.mb_x
        if self._views.ndim != 5 or self._views.shape[1] != 2:
            raise ValueError(
                f"the images of a batch are {tuple(self._views.shape)}; two views (N, 2, C, H, W) are accepted: give "
                "augmentation=..., or a transform that stacks two views"
            )
        source = getattr(self._loader, "dataset", None)
        tagged = isinstance(getattr(source, "source", source), RehearsalSet)
        self._origins = strategy.mbatch[2] if tagged else None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """What an interrupted step left behind is void."""
        self._views = None

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """One read per epoch: log the losses, stop where they are not finite."""
        if self._sums is None or self._renew:
            return
        contrastive, distillation = self._means(strategy, f"epoch {strategy.clock.train_exp_epochs}")
        terms = {"loss/contrastive": contrastive}
        if self.teacher is not None:
            terms["loss/distillation"] = distillation
        self._publish(strategy, terms, strategy.clock.train_iterations)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Close the task's averages."""
        task = len(self.contrastive_losses)
        if self.average_over == "final_model" and self._sums is not None:
            self._final_pass(strategy)
        if self._sums is None:
            raise ValueError(f"experience {self._experience} had no batch to train on; at least one is needed")
        contrastive, distillation = self._means(strategy, "the trained model")
        self.contrastive_losses.append(contrastive)
        self.distillation_losses.append(distillation)
        self._sums = self._current = self._loader = None
        figures = {tag: values[-1] for tag, values in self.history().items()}
        self._publish(strategy, {tag: value for tag, value in figures.items() if value is not None}, task)
        if self._experience + 1 == len(full_stream(strategy.experience)):
            self._warn_if_constant()

    # ------------------------------------------------------------------ loss
    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """Projections ``(2N, d)`` and class ids ``(N,)`` of a training batch -> loss; logits ``(B, C)`` otherwise."""
        views, self._views = self._views, None
        if views is None:
            if len(output) == 2 * len(targets):
                targets = targets.repeat(2)  # logits of both views: EWC asks for them
            return F.cross_entropy(output if output.dtype == torch.float64 else output.float(), targets)
        assert self._current is not None
        terms = contrastive_distillation(
            output,
            *self._labels(targets),
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            teacher_features=None if self.teacher is None else self._project(views),
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            coefficient=self.coefficients[-1] or 0.0,
        )
        count = len(targets)
        new = torch.stack([terms.contrastive / self._factor(), terms.distillation, terms.total.new_ones(())]).double()
        if self._renew:
            self._sums, self._renew = None, False
        self._sums = new.mul_(count) if self._sums is None else self._sums.to(new.device).add_(new, alpha=count)
        return terms.total

    def _labels(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and anchors of both views, ``(2N,)`` each."""
        assert self._current is not None
        if not self.domain_incremental:
            return targets.repeat(2), torch.isin(targets, self._current).repeat(2)
        if self._origins is None:
            return targets.repeat(2), torch.ones_like(targets, dtype=torch.bool).repeat(2)
        return (targets + (self._origins << 32)).repeat(2), (self._origins == self._experience).repeat(2)

    @torch.no_grad()
    def _project(self, views: Tensor) -> Tensor:
        assert self.teacher is not None
        return _shared(self.teacher.project, views)

    def _copy(self, model: nn.Module) -> nn.Module:
        """The teacher: what the model is now, never trained again."""
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        for parameter in teacher.parameters():
            parameter.grad = None
        if self.teacher_bn == "batch":
            for module in teacher.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        return teacher

    def _final_pass(self, strategy: Any) -> None:
        """Losses of the trained model over its training data, evaluation mode, no gradient."""
        self._sums = None
        before = strategy.mbatch
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(private_random_state(derived_seed(self.seed, len(self.contrastive_losses))))
            for model in (strategy.model, self.teacher):
                if model is not None:
                    stack.enter_context(evaluation_mode(model))
            for strategy.mbatch in self._loader:
                strategy._unpack_minibatch()
                self.before_forward(strategy)
                self(_shared(strategy.model.project, strategy.mb_x), strategy.mb_y)
        strategy.mbatch = before

    # ----------------------------------------------------------- coefficient
    def _factor(self) -> float:
        return 1.0 if self.base_temperature is None else self.temperature / self.base_temperature

    def _rule(self) -> dict[str, Any]:
        return {"balance": self.balance, "floor": self.floor, "ceiling": self.ceiling, "mode": self.mode}

    def _averages(self, task: int | None = None) -> tuple[list[float], list[float]]:
        """Averages that a task's ratio is made of, distillation and contrastive: from the second task on.

        :param task: its index; None: of the next task.
        """
        scale = self._factor() if self.ratio_scale == "training" else 1.0
        return self.distillation_losses[1:task], [scale * loss for loss in self.contrastive_losses[1:task]]

    def _at_floor(self, ratio: float) -> bool:
        return self.mode == "max" and self.balance * ratio <= self.floor

    def _warn_if_constant(self) -> None:
        """One warning where CILA was Co2L all along."""
        chosen = [c for c in self.coefficients[2:] if c is not None]
        if self.mode == "max" and chosen and all(c == self.floor for c in chosen):
            text = (
                f"the coefficient was at its floor, {self.floor:g}, in all {len(chosen)} tasks that could look back "
                "(balance * ratio never exceeded it), so this run equals Co2L; see balance and ratio_scale"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # --------------------------------------------------------------- logging
    def history(self) -> dict[str, list[float | None]]:
        """Figures of every finished task by the tag they are logged under; None where one isn't defined.

        ``cila/ratio`` is the raw ratio that the task's coefficient comes from, ``cila/floor-active`` 1 where the floor
        decided.
        """
        found: dict[str, list[float | None]] = {tag: [] for tag in _TAGS}
        for task, contrastive in enumerate(self.contrastive_losses):
            ratio = loss_ratio(*self._averages(task))
            values = (
                contrastive,
                self.distillation_losses[task] if task else None,
                self.coefficients[task],
                ratio,
                None if ratio is None else float(self._at_floor(ratio)),
            )
            for tag, value in zip(_TAGS, values, strict=True):
                found[tag].append(value)
        return found

    def _means(self, strategy: Any, where: str) -> tuple[float, float]:
        """Average contrastive and distillation loss per sample; one read from the device."""
        assert self._sums is not None
        contrastive, distillation, count = self._sums.tolist()
        if not (math.isfinite(contrastive) and math.isfinite(distillation)):
            what = f"the contrastive loss became {contrastive / count} and the distillation {distillation / count}"
            raise nonfinite_stop(strategy, where, what, "A smaller rate or a longer warm-up is needed.")
        return contrastive / count, distillation / count

    def describe_nonfinite(self, strategy: Any) -> str | None:
        """For the message of a guard: which of the losses it was."""
        if self._sums is None or self._renew or bool(self._sums.isfinite().all()):
            return None
        contrastive, distillation, _ = self._sums.tolist()
        both = f"the contrastive losses add up to {contrastive:.4g}, the distillation to {distillation:.4g}"
        return f"Since the epoch began, {both}"

    def _publish(self, strategy: Any, figures: dict[str, float], step: int) -> None:
        if strategy.evaluator.active:
            for tag, value in figures.items():
                strategy.evaluator.publish_metric_value(MetricValue(self, tag, value, step))

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Teacher, history of coefficients and averages, sums of the epoch."""
        teacher = self._teacher_state if self.teacher is None else self.teacher.state_dict()
        return {
            "teacher": None if teacher is None else {name: t.detach() for name, t in teacher.items()},
            "coefficients": list(self.coefficients),
            "contrastive": list(self.contrastive_losses),
            "distillation": list(self.distillation_losses),
            "sums": None if self._renew else self._sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._teacher_state = state["teacher"]
        if self._teacher_state is None:
            self.teacher = None
        elif self.teacher is not None:
            self.teacher.load_state_dict(self._teacher_state)
            self._teacher_state = None
        self.coefficients = list(state["coefficients"])
        self.contrastive_losses = list(state["contrastive"])
        self.distillation_losses = list(state["distillation"])
        self._sums, self._renew = None if state["sums"] is None else state["sums"].clone(), False


def _shared(project: Any, views: Tensor) -> Tensor:
    """Projections of a batch ``(N, 2, C, H, W)``; in a distributed run of this process's rows, and gathered."""
    return all_rows(project(views[own_rows(len(views))]), len(views))


__all__ = [
    "ContrastiveDistillationPlugin",
    "asymmetric_supcon",
    "contrastive_distillation",
    "distillation_coefficient",
    "relation_distillation",
]
