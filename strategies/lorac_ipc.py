"""LoRAC-IPC: orthogonal LoRA composition with important parameters frozen (arXiv 2504.13407).

Each task trains one low-rank pair per weight matrix of a frozen transformer and scalars that rescale the pairs of the
tasks before; a penalty keeps pairs of different tasks orthogonal, and the matrices that mattered most are frozen before
the next task. After a task the classifier is aligned on Gaussian clusters of features, and at test time the features
tell the task whose weights are used. No image of the past is kept and no task identity is used.

``LoRACIPC(...)`` equals Avalanche's ``Naive`` with ``LoRACompositionPlugin``, ``ImportantParameterPlugin``,
``ClassifierAlignmentPlugin.tap()``, ``TaskInferencePlugin`` and ``LocalCrossEntropy`` to the bit. What differs from the
released code stands in these plugins; of the paper only the abstract was at hand. Cost: a training step of plain LoRA
plus a fifth at most; statistics take two passes over a task's images; evaluation takes two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Adam, Optimizer

from avalanche_firn.models.composed_linear import ComposedLoRALinear, Init
from avalanche_firn.models.lora import add_composed_lora
from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.schedules import SchedulerFactory, lagged_cosine
from avalanche_firn.plugins.task_inference import TaskInferencePlugin


class LoRACIPC(SupervisedTemplate):
    """LoRA composition, freezing of important matrices, classifier alignment and task inference.

    Defaults: the released code's script for CIFAR-100 with AugReg weights (its two processes' batches together).

    :param model: a timm transformer or any module with a feature output ``(B, d)``; a
        :class:`~avalanche_firn.models.heads.TaskwiseLinearHead` and composed LoRA layers are put on it unless it has
        them.
    :param optimizer: template of the optimizer, rebuilt in each task; default: Adam with rate 0.0015.
    :param targets: layers to adapt, see :func:`~avalanche_firn.models.add_composed_lora`. :param rank: 16.
    :param alpha: 1. :param init: of new pairs, ``"kaiming"`` (released code) or ``"qr"``.
    :param orthogonality: weight of the penalty, 0.5. :param omega_scale: rate of the scalars / lr, 1.0.
    :param clip: largest gradient norm, 1.0. :param first_lr: rate of the first task; None: the same.
    :param threshold: fraction of all matrices frozen after each task, 0.05. 0: LoRAC without freezing.
    :param importance: for settings other than ``ImportantParameterPlugin(threshold)``.
    :param alignment: for settings other than ``ClassifierAlignmentPlugin.tap()``; False: none.
    :param task_inference: for settings other than ``TaskInferencePlugin()``; False: the newest weights are used.
    :param scheduler_factory: default: the released code's cosine over ``train_epochs``
        (:func:`~avalanche_firn.plugins.schedules.lagged_cosine`).
    :param official_k_gate: repeat the released code's slip, new key components gated by the queries' mask (False).
    :param feature_size: d, where the model has no ``num_features``. :param seed: of new pairs, clusters and alignment.
    :param plugins: further plugins; they run after the method's own.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        targets: Sequence[str] | None = None,
        rank: int = 16,
        alpha: float = 1.0,
        init: Init = "kaiming",
        orthogonality: float = 0.5,
        omega_scale: float = 1.0,
        clip: float | None = 1.0,
        first_lr: float | None = None,
        threshold: float = 0.05,
        importance: ImportantParameterPlugin | None = None,
        alignment: ClassifierAlignmentPlugin | bool = True,
        task_inference: TaskInferencePlugin | bool = True,
        scheduler_factory: SchedulerFactory | None = None,
        official_k_gate: bool = False,
        feature_size: int | None = None,
        seed: int = 0,
        train_mb_size: int = 128,
        train_epochs: int = 10,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        model = with_taskwise_head(model, feature_size=feature_size)
        if not any(isinstance(module, ComposedLoRALinear) for module in model.modules()):
            gates = {"k": "q"} if official_k_gate else None
            add_composed_lora(model, targets, rank, alpha, init=init, gates=gates)
        elif official_k_gate:
            raise ValueError("official_k_gate is True, and the model has its LoRA layers already; give gates= to them")
        own: list[SupervisedPlugin] = [
            LoRACompositionPlugin(
                orthogonality,
                omega_scale=omega_scale,
                clip=clip,
                first_lr=first_lr,
                scheduler_factory=lagged_cosine(train_epochs) if scheduler_factory is None else scheduler_factory,
                seed=seed,
            ),
            ImportantParameterPlugin(threshold) if importance is None else importance,
        ]
        if alignment is True:
            alignment = ClassifierAlignmentPlugin.tap(seed=seed)
        if task_inference is True:
            task_inference = TaskInferencePlugin(seed=seed)
        own += [plugin for plugin in (alignment, task_inference) if plugin is not False]
        super().__init__(
            model=model,
            optimizer=optimizer or Adam(model.parameters(), lr=0.0015),
            criterion=LocalCrossEntropy() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*own, *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


__all__ = ["LoRACIPC"]
