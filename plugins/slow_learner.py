"""Slow learner: a much smaller learning rate for the pre-trained backbone than for the classifier.

SLCA (arXiv 2303.05118; stage 1 of the released code): in every task a new optimizer trains the backbone at
``backbone_scale`` times the rate of the new classifier layer. Differs from the released code: any optimizer, any number
of groups, layer-wise decay as an option. No cost beyond the optimizer itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from avalanche_firn.models.parts import ModelParts, find_parts
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin, OptimizerFactory
from avalanche_firn.plugins.schedules import SchedulerFactory

GroupRule = tuple[Callable[[str, nn.Parameter], bool], "float | Callable[[int], float]"]


class SlowLearnerPlugin(FreshOptimizerPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Learning-rate splitter: group ``"backbone"`` at ``lr * backbone_scale``, group ``"head"`` at ``lr``.

    Optimizer and schedule are rebuilt in each experience from the class and settings of the optimizer given to the
    strategy. Weight decay and momentum act on every trainable tensor of both groups, as in the released code.

    :param backbone_scale: factor of the backbone's rate (0.01: exps/slca_*.json). 0 freezes the backbone: no gradients,
        and evaluation mode (BatchNorm statistics fixed, no dropout).
    :param groups: more than two groups: ``(predicate(name, parameter), factor or callable(task) -> factor)``, the task
        index counting from 0; replaces ``backbone_scale``. Each trainable parameter must match exactly one predicate.
        Groups are named ``group-0``, ``group-1``, ...
    :param layer_decay: rate factor per layer of a timm backbone, counted from the top: layer k of L gets
        ``backbone_scale * layer_decay ** (L - k)``; groups are named ``backbone.0`` (input) to ``backbone.L``.
    :param optimizer_factory: see :class:`FreshOptimizerPlugin`.
    :param scheduler_factory: see :class:`FreshOptimizerPlugin`.
    :param head_name: dotted name of the classifier, see :func:`avalanche_firn.models.parts.find_parts`.
    :raises ValueError: a negative or non-finite scale, no trainable classifier parameter, a parameter in no group or in
        several, a plateau schedule.
    """

    def __init__(
        self,
        backbone_scale: float = 0.01,
        *,
        groups: Sequence[GroupRule] | None = None,
        layer_decay: float | None = None,
        optimizer_factory: OptimizerFactory | None = None,
        scheduler_factory: SchedulerFactory | None = None,
        head_name: str | None = None,
    ) -> None:
        super().__init__(optimizer_factory=optimizer_factory, scheduler_factory=scheduler_factory)
        self.backbone_scale = _checked("backbone_scale", backbone_scale)
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; a factor in (0, 1] is accepted")
        if groups is not None and layer_decay is not None:
            raise ValueError("groups and layer_decay are both given; one of them is accepted")
        if groups is not None and not groups:
            raise ValueError("groups is empty; at least one (predicate, factor) is needed")
        self.rules = None if groups is None else list(groups)
        self.layer_decay = layer_decay
        self.head_name = head_name

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Find the classifier before any work is done."""
        super().before_training(strategy, **kwargs)
        find_parts(strategy.model, self.head_name)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Keep a frozen backbone in evaluation mode (``strategy.train`` puts the model into training mode)."""
        if self.rules is None and self.backbone_scale == 0:
            find_parts(strategy.model, self.head_name).backbone_eval()

    def groups(self, strategy: Any) -> list[dict[str, Any]]:
        """The named groups for the current experience; parameters at rate 0 are frozen instead."""
        parts = find_parts(strategy.model, self.head_name)
        if self.rules is not None:
            return self._ruled_groups(strategy.model, strategy.clock.train_exp_counter)
        head = [p for _, p in parts.head_parameters() if p.requires_grad]
        if not head:
            raise ValueError(
                f"the classifier {parts.head_name!r} has no trainable parameter; the fast group would be empty"
            )
        groups = [{"params": head, "name": "head", "lr_scale": 1.0}]
        if self.backbone_scale == 0:
            for _, parameter in parts.backbone_parameters():
                parameter.requires_grad_(False)
            return groups
        return self._backbone_groups(parts) + groups

    def _backbone_groups(self, parts: ModelParts) -> list[dict[str, Any]]:
        slow = [(n, p) for n, p in parts.backbone_parameters() if p.requires_grad]
        if not slow:
            return []
        if self.layer_decay is None:
            return [{"params": [p for _, p in slow], "name": "backbone", "lr_scale": self.backbone_scale}]
        layers = _layer_of_parameters(parts)
        top = max(layers[n] for n, _ in slow)
        members: dict[int, list[nn.Parameter]] = {}
        for name, parameter in slow:
            members.setdefault(layers[name], []).append(parameter)
        return [
            {
                "params": members[k],
                "name": f"backbone.{k}",
                "lr_scale": self.backbone_scale * self.layer_decay ** (top - k),
            }
            for k in sorted(members)
        ]

    def _ruled_groups(self, model: nn.Module, task: int) -> list[dict[str, Any]]:
        assert self.rules is not None
        members: list[list[nn.Parameter]] = [[] for _ in self.rules]
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            matches = [i for i, (predicate, _) in enumerate(self.rules) if predicate(name, parameter)]
            if len(matches) != 1:
                raise ValueError(f"parameter {name!r} matches groups {matches}; exactly one group is accepted")
            members[matches[0]].append(parameter)
        groups = []
        for i, (_, factor) in enumerate(self.rules):
            scale = _checked(f"groups[{i}]", factor(task) if callable(factor) else factor)
            if members[i]:
                groups.append({"params": members[i], "name": f"group-{i}", "lr_scale": scale})
        return groups


def _checked(field: str, scale: float) -> float:
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{field} is {scale!r}; a finite factor of 0 and above is accepted")
    return float(scale)


def _layer_of_parameters(parts: ModelParts) -> dict[str, int]:
    """Parameter name -> layer index of the timm backbone (0 = input), as timm groups its models."""
    from timm.models import group_parameters

    for prefix, module in parts.model.named_modules():
        matcher = getattr(module, "group_matcher", None)
        if callable(matcher):
            layers = group_parameters(module, matcher(coarse=False), reverse=True)
            start = f"{prefix}." if prefix else ""
            found = {f"{start}{name}": int(layer) for name, layer in layers.items()}
            # parameters outside the timm model (or that timm leaves open) count as its top
            top = max(found.values(), default=0)
            return {name: found.get(name, top) for name, _ in parts.model.named_parameters()}
    raise ValueError(f"layer_decay needs a timm backbone (with group_matcher); {type(parts.model).__name__} has none")


__all__ = ["GroupRule", "SlowLearnerPlugin"]
