"""A network for contrastive continual learning: backbone, projector, and a classifier that is fitted apart.

In training mode it gives unit-norm projections ``(views * B, d)``, in evaluation mode the logits of the classifier on
the backbone's features, so that Avalanche's evaluation works as ever. Under autocast the backbone runs in 16 bits;
projector and norm stay in float32, since a teacher temperature of 0.01 multiplies errors of similarities by 100.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models.convnets import ProjectionHead
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier, find_parts


def flatten_views(images: Tensor) -> Tensor:
    """Views ``(B, V, C, H, W)`` -> ``(V * B, C, H, W)``: all first views, then all second ones; others unchanged."""
    return images.transpose(0, 1).flatten(0, 1) if images.ndim == 5 else images


class ContrastiveClassifier(FeatureClassifier):
    """Backbone with a projector beside the classifier.

    :param backbone: module whose output is features ``(B, f)``. :param projector: features -> projections ``(B, d)``.
    :param head: features -> logits; the projector is no part of it.
    :param normalize: projections of unit norm (the released code leaves those of the digits as they are).
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, head: nn.Module, *, normalize: bool = True) -> None:
        super().__init__(backbone, head)
        self.projector = projector
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` or views ``(B, V, C, H, W)`` -> projections in training, logits in evaluation."""
        return self.project(x) if self.training else super().forward(flatten_views(x))

    def project(self, x: Tensor) -> Tensor:
        """Projections ``(V * B, d)``, float32 (float64 for a model in it), in whatever mode the modules are."""
        features = self.backbone(flatten_views(x))
        with torch.autocast(features.device.type, enabled=False):
            weight = next(self.projector.parameters(), features)
            projected = self.projector(features.to(weight.dtype))
            return F.normalize(projected, dim=1) if self.normalize else projected


def with_projection_head(
    model: nn.Module,
    *,
    projection_size: int = 128,
    hidden_size: int | None = None,
    feature_size: int | None = None,
    normalize: bool = True,
) -> ContrastiveClassifier:
    """A model with projector and growing classifier; one that already is a :class:`ContrastiveClassifier` is returned.

    :param model: a timm model (its classifier is removed), any module with a feature output ``(B, f)``, or a
        :class:`~avalanche_firn.models.parts.FeatureClassifier`, whose classifier stays.
    :param projection_size: d (128: Co2L). :param hidden_size: of the projector; None: f (Co2L).
    :param feature_size: f, where the model has no ``num_features``.
    :raises ValueError: the feature size is not known.
    """
    if isinstance(model, ContrastiveClassifier):
        return model
    backbone, head = model, None
    if isinstance(model, FeatureClassifier):
        backbone, head = model.backbone, model.head
    elif callable(reset := getattr(model, "reset_classifier", None)):
        reset(0)
    if feature_size is None and isinstance(head, TaskwiseLinearHead):
        feature_size = head.in_features
    if feature_size is None:
        feature_size = getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", None)
    if not isinstance(feature_size, int):
        raise ValueError(f"the feature size of {type(backbone).__name__} is not known; give feature_size=...")
    return ContrastiveClassifier(
        backbone,
        ProjectionHead(feature_size, hidden_size, projection_size),
        TaskwiseLinearHead(feature_size, freeze_old=False) if head is None else head,
        normalize=normalize,
    )


def check_projecting(model: nn.Module) -> None:
    """Refuse a model that can't be trained contrastively.

    :raises ValueError: no ``project(x)``, or no classifier that can be found.
    """
    if not callable(getattr(model, "project", None)):
        raise ValueError(
            f"{type(model).__name__} has no project(images) -> projections; a model from "
            "avalanche_firn.models.with_projection_head is accepted, or one with such a method that gives projections "
            "in training mode and logits in evaluation mode"
        )
    find_parts(model)


__all__ = ["ContrastiveClassifier", "check_projecting", "flatten_views", "with_projection_head"]
