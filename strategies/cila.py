"""CILA (arXiv 2405.18756) and Co2L (arXiv 2106.14413): contrastive continual learning with a small rehearsal buffer.

Every experience trains backbone and projector on two views of current and stored images: a supervised contrastive loss
with current samples as anchors, plus distillation of the similarities of each batch from the model before the task.
Then a fresh linear classifier is fitted on the backbone's features. CILA weighs the distillation anew in every task,
Co2L by a constant.

``CILA(...)`` equals Avalanche's ``Naive`` with ``RehearsalPlugin``, ``WarmupCosinePlugin``, ``ClassifierStagePlugin``
and, as criterion, ``ContrastiveDistillationPlugin`` to the bit. What differs from the released code of Co2L, and what
is open in CILA, stands in these plugins. Cost: two views per image, the teacher's forward pass, and the classifier's
epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import InteractiveLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from avalanche_firn.models.contrastive import with_projection_head
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
from avalanche_firn.plugins.rehearsal import RehearsalPlugin, Storage
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin


def evaluation_metrics() -> EvaluationPlugin:
    """Avalanche's default evaluator without training accuracy, which has no meaning for projections."""
    return EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True),
        loss_metrics(epoch=True, experience=True, stream=True),
        loggers=[InteractiveLogger()],
    )


class CILA(SupervisedTemplate):
    """Contrastive continual learning with an adaptive coefficient; Co2L's settings on Seq-CIFAR-10.

    :param model: a timm model or any module with a feature output ``(B, f)``; projector and growing classifier are put
        on it (:func:`~avalanche_firn.models.contrastive.with_projection_head`) unless it has them.
    :param optimizer: kept through the stream; its ``lr`` is the top of the cosine. Default: SGD with rate 0.5, momentum
        0.9, weight decay 1e-4 (Co2L's released code).
    :param contrastive: losses and coefficient, for settings other than ``ContrastiveDistillationPlugin()``.
    :param classifier: the classifier stage, for settings other than ``ClassifierStagePlugin()``.
    :param augmentation: two random views of a batch on the device, such as
        :class:`~avalanche_firn.benchmarks.augmentation.ContrastiveAugmentation`; given to both plugins where they have
        none. None: the data set gives two views.
    :param mem_size: stored samples, 200 (or 500). :param storage: ``"class_balanced"``, ``"reservoir"`` for domains.
    :param rates: epochs and rates, for settings other than ``WarmupCosinePlugin()``.
    :param projection_size: 128. :param feature_size: f, where the model has no ``num_features``.
    :param train_epochs: per experience (100). The first one's are ``WarmupCosinePlugin(first_epochs=500)``.
    :param seed: of the choice of stored samples.
    :param plugins: further plugins; they run after the method's own and before the losses.
    :param evaluator: not one with accuracies of the training phase (they compare projections with classes).

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        contrastive: ContrastiveDistillationPlugin | None = None,
        classifier: ClassifierStagePlugin | None = None,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        mem_size: int = 200,
        storage: Storage = "class_balanced",
        rates: WarmupCosinePlugin | None = None,
        projection_size: int = 128,
        feature_size: int | None = None,
        seed: int = 0,
        train_mb_size: int = 512,
        train_epochs: int = 100,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = evaluation_metrics,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        model = with_projection_head(model, projection_size=projection_size, feature_size=feature_size)
        losses = ContrastiveDistillationPlugin() if contrastive is None else contrastive
        stage = ClassifierStagePlugin(seed=seed) if classifier is None else classifier
        for part in (losses, stage):
            part.augmentation = part.augmentation or augmentation
        super().__init__(
            model=model,
            optimizer=optimizer or SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4),
            criterion=losses,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[
                RehearsalPlugin(mem_size, storage=storage, seed=seed),
                WarmupCosinePlugin() if rates is None else rates,
                stage,
                *(plugins or []),
            ],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


class Co2L(CILA):
    """CILA with a constant coefficient.

    :param distillation_weight: the coefficient, 1 (Co2L's released code).
    :param contrastive: settings of the losses; its ``mode`` has to be ``"constant"``, and its ``floor`` is the weight.

    Other parameters: :class:`CILA`.
    """

    def __init__(
        self,
        *,
        distillation_weight: float | None = None,
        contrastive: ContrastiveDistillationPlugin | None = None,
        **kwargs: Any,
    ) -> None:
        if contrastive is None:
            weight = 1.0 if distillation_weight is None else distillation_weight
            contrastive = ContrastiveDistillationPlugin(mode="constant", floor=weight)
        elif contrastive.mode != "constant" or distillation_weight is not None:
            raise ValueError(
                f"contrastive has mode {contrastive.mode!r} and distillation_weight is {distillation_weight}; mode "
                "'constant', with the weight as its floor and distillation_weight left out, is accepted"
            )
        super().__init__(contrastive=contrastive, **kwargs)


__all__ = ["CILA", "Co2L"]
