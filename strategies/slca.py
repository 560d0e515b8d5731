"""SLCA: slow learner with classifier alignment (arXiv 2303.05118, ICCV 2023).

A pre-trained backbone learns at a hundredth of the classifier's rate, one linear layer per task is trained with a loss
over the task's own classes, and after each task all layers are aligned on Gaussian features of the classes seen.
No image of the past is kept and no task identity is used at test time.

``SLCA(...)`` equals Avalanche's ``Naive`` with ``SlowLearnerPlugin``, ``ClassifierAlignmentPlugin`` and
``LocalCrossEntropy`` to the bit. What differs from the released code stands in the two plugins. Cost: that of
fine-tuning, one more pass over the task's images for the statistics, and the alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import SGD, Optimizer

from avalanche_firn.models.backbones import renew_final_norm
from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.schedules import SchedulerFactory, multistep
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin
from avalanche_firn.strategies.slca_plus_plus import SLCAPlusPlus  # its successor, importable from here as well


class SLCA(SupervisedTemplate):
    """Slow learner with classifier alignment, with the released code's defaults.

    :param model: a timm model or any module with a feature output ``(B, d)``; a
        :class:`~avalanche_firn.models.heads.TaskwiseLinearHead` is put on it unless it already has one.
    :param optimizer: template of the optimizer (class and settings), rebuilt in each task; default: SGD with rate 0.01,
        momentum 0.9, weight decay 5e-4 (exps/slca_*.json).
    :param criterion: default :class:`LocalCrossEntropy`.
    :param backbone_scale: rate factor of the backbone (0.01). :param milestones: epochs after which the rates fall to a
        tenth (CIFAR-100: ``[18]`` of 20 epochs, others ``[40]`` of 50). :param scheduler_factory: instead of
        milestones.
    :param alignment: the alignment plugin, for settings other than ``ClassifierAlignmentPlugin()``.
    :param fresh_final_norm: drop the pre-trained final LayerNorm of a timm backbone for a fresh one (released code);
        models without one, and modules that do not come from timm, stay as they are.
    :param feature_size: d, where the model has no ``num_features``.
    :param plugins: further plugins; they run after the method's own.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        backbone_scale: float = 0.01,
        milestones: Sequence[int] = (),
        scheduler_factory: SchedulerFactory | None = None,
        alignment: ClassifierAlignmentPlugin | None = None,
        fresh_final_norm: bool = True,
        feature_size: int | None = None,
        train_mb_size: int = 128,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        if milestones and scheduler_factory is not None:
            raise ValueError("milestones and scheduler_factory are both given; one of them is accepted")
        if fresh_final_norm:
            renew_final_norm(getattr(model, "backbone", model))
        model = with_taskwise_head(model, feature_size=feature_size)
        slow_learner = SlowLearnerPlugin(
            backbone_scale, scheduler_factory=multistep(milestones) if milestones else scheduler_factory
        )
        super().__init__(
            model=model,
            optimizer=optimizer or SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
            criterion=LocalCrossEntropy() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[slow_learner, ClassifierAlignmentPlugin() if alignment is None else alignment, *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


__all__ = ["SLCA", "SLCAPlusPlus"]
