"""SLCA++: SLCA with a parameter-efficient slow learner and a symmetric cross-entropy (arXiv 2408.08295).

Trained in the backbone: one low-rank pair per qkv matrix for the whole stream, the norms, the biases and the class
token; everything else keeps its pre-trained value. Half a cosine per task, a symmetric cross-entropy over the task's
own classes, then alignment of all classifier layers on Gaussian features whose scale is drawn at random. No image of
the past is kept and no task identity is used at test time.

``SLCAPlusPlus(...)`` equals Avalanche's ``Naive`` with ``SlowLearnerPlugin(groups=rate_groups(model),
scheduler_factory=cosine(epochs, floor))``, ``ClassifierAlignmentPlugin(scaling="feature")`` and
``LocalSymmetricCrossEntropy`` to the bit, on a model that went through ``renew_final_norm``, ``with_taskwise_head`` and
:func:`parameter_efficient`.

Differs from the released code, without an effect on results: its pairs of fc1 and fc2, which it declares but never
hands to its optimizer, do not exist here (``lora_targets=("qkv", "fc1", "fc2")`` adds and trains them); milestones, of
which it uses the number alone, are a number. Results differ where tasks differ in size: the alignment uses the task in
which a class was learnt (see ``ClassifierAlignmentPlugin.compat_task_index``).

Cost: forward and backward pass take about 0.7 times as long as in SLCA (ViT-B/16 on one core, measured), as the large
matrices need no gradient; 270,336 of the backbone's 86 million values are trained. Besides, one merge of the pair per
adapted matrix and step, a merged copy of it in evaluation, and a singular value decomposition of it at the start (qkv
of ViT-B/16: half a second to a second on one core). Statistics and alignment as in SLCA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import SGD, Optimizer

from avalanche_firn.models.backbones import renew_final_norm
from avalanche_firn.models.lora import ComposedLoRALinear, LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import find_parts, with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.losses import LocalSymmetricCrossEntropy
from avalanche_firn.plugins.schedules import SchedulerFactory, cosine
from avalanche_firn.plugins.slow_learner import GroupRule, SlowLearnerPlugin

TRAINED = ("norm", "bias", "cls_token")
"""A backbone tensor whose name contains one of these is trained along with the pairs (released code)."""


def parameter_efficient(
    model: nn.Module, rank: int = 4, scale: float = 0.8, targets: Sequence[str] = ("qkv",)
) -> nn.Module:
    """Add one open low-rank pair per matrix, and freeze what SLCA++ does not train; in place.

    A model that has composed LoRA layers keeps them, and the settings here are not used. What is frozen stays so.

    :param model: with a classifier that :func:`~avalanche_firn.models.parts.find_parts` finds.
    :param rank: 4, :param scale: 0.8 (released code: ``W + 0.8 B A``, not alpha / rank).
    :param targets: names or ends of names of linear layers, see
        :func:`~avalanche_firn.models.lora.add_composed_lora`; a fused qkv is one matrix. A starts as the first ``rank``
        right singular vectors of the matrix, B at 0.
    :returns: the model.
    :raises ValueError: no target matches, the rank is too large, or the model's own pairs belong to closed tasks.
    """
    if not any(isinstance(module, ComposedLoRALinear) for module in model.modules()):
        targets = (targets,) if isinstance(targets, str) else targets
        add_composed_lora(model, targets, rank, scale=scale, init="svd", split={})
        LoRAComposition(model).open_task()
    is_head, pairs = find_parts(model).is_head, _pairs(model)
    composed = {f"{name}.base.weight" for name, m in model.named_modules() if isinstance(m, ComposedLoRALinear)}
    for name, parameter in model.named_parameters():
        trained = is_head(name) or name in pairs or (name not in composed and any(part in name for part in TRAINED))
        parameter.requires_grad_(trained and parameter.requires_grad)
    return model


def rate_groups(
    model: nn.Module, *, first_task_lora_scale: float = 0.5, backbone_scale: float = 0.1
) -> list[GroupRule]:
    """Groups of :class:`SlowLearnerPlugin`: the pairs, the backbone's other trained tensors, the classifier (factor 1).

    :param model: as :func:`parameter_efficient` gives it.
    :param first_task_lora_scale: factor of the pairs' rate in the first task (0.5: released code), later
        ``backbone_scale``. :param backbone_scale: factor of the others (0.1: released configurations).
    :raises ValueError: a negative or non-finite factor, no composed LoRA layers, or their task is closed.
    """
    _check_factors(first_task_lora_scale, backbone_scale)
    # the pairs exist by now, once for the stream; the classifier grows, so it goes by its prefix
    is_head, pairs = find_parts(model).is_head, _pairs(model)
    return [
        (lambda name, _: name in pairs, lambda task: first_task_lora_scale if task == 0 else backbone_scale),
        (lambda name, _: name not in pairs and not is_head(name), backbone_scale),
        (lambda name, _: is_head(name), 1.0),
    ]


def _check_factors(first_task_lora_scale: float, backbone_scale: float) -> None:
    for field, factor in (("first_task_lora_scale", first_task_lora_scale), ("backbone_scale", backbone_scale)):
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"{field} is {factor}; a finite factor of 0 and above is accepted")


def _pairs(model: nn.Module) -> set[str]:
    """Names of the A and B that the open task trains."""
    lora = LoRAComposition(model)
    if lora.num_tasks == lora.num_closed:
        raise ValueError(
            f"the model's LoRA layers hold {lora.num_tasks} closed tasks and no open one; SLCA++ trains one pair for "
            "the whole stream: LoRAComposition(model).open_task() before the strategy is made"
        )
    members = {id(parameter) for parameter in lora.pairs()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


class SLCAPlusPlus(SupervisedTemplate):
    """Slow learner with classifier alignment, parameter-efficient, with the released code's defaults.

    :param model: a timm model or any module with a feature output ``(B, d)``, with linear layers that ``lora_targets``
        names; a :class:`~avalanche_firn.models.heads.TaskwiseLinearHead` is put on it unless it already has one.
        Composed LoRA layers that it already has are used as they are (``lora_*`` are ignored then); their newest task
        must be open.
    :param optimizer: template of the optimizer (class and settings), rebuilt in each task; default: SGD with rate 0.01,
        momentum 0.9, weight decay 5e-4 (released configurations of CIFAR-100 and CUB-200; ImageNet-R and Cars-196
        have no decay).
    :param criterion: default ``LocalSymmetricCrossEntropy(alpha, beta)``.
    :param alpha: weight of the cross-entropy, :param beta: of the reverse one (1.0 and 0.1: CIFAR-100, CUB-200; 0.5
        and 0.5: ImageNet-R, Cars-196).
    :param lora_rank: 4, :param lora_scale: 0.8 (released code). :param lora_targets: ``("qkv",)`` is what the released
        code optimises, ``("qkv", "fc1", "fc2")`` what it declares; see :func:`parameter_efficient`.
    :param first_task_lora_scale: factor of the pairs' rate in the first task (0.5: released code), later
        ``backbone_scale``.
    :param backbone_scale: rate factor of the backbone (0.1: released configurations). With 0 the backbone learns in
        the first task alone, by its pairs.
    :param num_milestones: milestones in the released configuration (1, or 2 with MoCo v3 weights): the cosine of every
        group ends at ``lr * backbone_scale * 0.1 ** num_milestones``.
    :param scheduler_factory: instead of that cosine over ``train_epochs``.
    :param alignment: the alignment plugin, for settings other than ``ClassifierAlignmentPlugin(scaling="feature")``,
        whose weight decay is that of the SGD in use (released code; with another optimizer 5e-4).
    :param fresh_final_norm: drop the pre-trained final LayerNorm of a timm backbone for a fresh one (released code);
        models without one, and modules that do not come from timm, stay as they are.
    :param feature_size: d, where the model has no ``num_features``.
    :param plugins: further plugins; they run after the method's own.
    :raises ValueError: no layer to adapt (convolutional networks), settings out of range.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        alpha: float = 1.0,
        beta: float = 0.1,
        lora_rank: int = 4,
        lora_scale: float = 0.8,
        lora_targets: Sequence[str] = ("qkv",),
        first_task_lora_scale: float = 0.5,
        backbone_scale: float = 0.1,
        num_milestones: int = 1,
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
        _check_factors(first_task_lora_scale, backbone_scale)
        if num_milestones < 0:
            raise ValueError(f"num_milestones is {num_milestones}; 0 and above is accepted")
        if criterion is None:
            criterion = LocalSymmetricCrossEntropy(alpha, beta)
        if fresh_final_norm:
            renew_final_norm(getattr(model, "backbone", model))
        model = with_taskwise_head(model, feature_size=feature_size)
        parameter_efficient(model, lora_rank, lora_scale, lora_targets)
        optimizer = optimizer or SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        settings = optimizer.param_groups[0]
        if scheduler_factory is None:
            floor = float(settings["lr"]) * backbone_scale * 0.1**num_milestones
            scheduler_factory = cosine(train_epochs, floor)
        if alignment is None:
            decay = settings["weight_decay"] if isinstance(optimizer, SGD) else 5e-4
            alignment = ClassifierAlignmentPlugin(scaling="feature", weight_decay=decay)
        slow_learner = SlowLearnerPlugin(
            groups=rate_groups(model, first_task_lora_scale=first_task_lora_scale, backbone_scale=backbone_scale),
            scheduler_factory=scheduler_factory,
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[slow_learner, alignment, *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


__all__ = ["TRAINED", "SLCAPlusPlus", "parameter_efficient", "rate_groups"]
