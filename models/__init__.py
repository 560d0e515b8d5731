"""Backbones (timm), heads, and how a model splits into the two."""

from avalanche_firn.models.backbones import Backbone, WeightsError, list_backbones, load_backbone, renew_final_norm
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import (
    FeatureClassifier,
    ModelParts,
    evaluation_mode,
    extract_features,
    find_parts,
    with_taskwise_head,
)

__all__ = [
    "Backbone",
    "FeatureClassifier",
    "ModelParts",
    "TaskwiseLinearHead",
    "WeightsError",
    "evaluation_mode",
    "extract_features",
    "find_parts",
    "list_backbones",
    "load_backbone",
    "renew_final_norm",
    "with_taskwise_head",
]
