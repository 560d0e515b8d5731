"""LP-FT for streams: a linear probe, then fine-tuning, in every experience (arXiv 2302.13289, base method 2202.10054).

No buffer, no distillation, no second network: what protects the features is that fine-tuning starts from a classifier
that fits them. The representation is what is judged (``evaluation.RepresentationProbe``), not the stream's classifier.

``LPFT(...)`` equals Avalanche's ``Naive`` with ``LinearProbePlugin`` and ``FreshOptimizerPlugin`` to the bit.
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

from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins.linear_probe import LinearProbePlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.schedules import SchedulerFactory


class LPFT(SupervisedTemplate):
    """Linear probe, then fine-tuning, at every experience.

    :param model: a timm model or any module with a classifier. A timm model without one gets a growing linear head
        (:class:`~avalanche_firn.models.heads.TaskwiseLinearHead`, older rows trainable); another classifier stays.
    :param optimizer: template of fine-tuning's optimizer (class and settings), rebuilt in each experience; default: SGD
        with rate 0.01, momentum 0.9, no weight decay (2202.10054's released code; the rate is to be tuned).
    :param criterion: default cross-entropy over all classes seen.
    :param linear_probe: the probe, for settings other than ``LinearProbePlugin()``. With ``reset_momentum=False`` one
        optimizer lives through the stream, without a schedule.
    :param scheduler_factory: of fine-tuning, per epoch; the released code's is ``cosine(train_epochs)``.
    :param feature_size: d, where a head is put on a model without ``num_features``.
    :param train_epochs: epochs of fine-tuning; 0: probes alone.
    :param plugins: further plugins; they run after the method's own.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        linear_probe: LinearProbePlugin | None = None,
        scheduler_factory: SchedulerFactory | None = None,
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
        probe = LinearProbePlugin() if linear_probe is None else linear_probe
        if not _has_classifier(model, probe.head):
            model = with_taskwise_head(model, feature_size=feature_size, freeze_old=False)
        if probe.reset_momentum or not probe.enabled:
            fresh = [FreshOptimizerPlugin(scheduler_factory=scheduler_factory)]
        elif scheduler_factory is None:
            fresh = []  # Avalanche's own optimizer, carried over the stream
        else:
            raise ValueError(
                "scheduler_factory is given with reset_momentum=False; a schedule needs the optimizer rebuilt in each "
                "experience, so None is accepted"
            )
        super().__init__(
            model=model,
            optimizer=optimizer or SGD(model.parameters(), lr=0.01, momentum=0.9),
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[probe, *fresh, *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


def _has_classifier(model: nn.Module, name: str | None) -> bool:
    from avalanche_firn.models.parts import find_parts

    try:
        find_parts(model, name)
    except ValueError:
        if name is not None:
            raise
        return False
    return True


__all__ = ["LPFT"]
