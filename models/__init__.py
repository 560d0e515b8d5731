"""Backbones (timm), heads, a projector, LoRA layers, how a model splits into the two, and linear probes on features."""

from avalanche_firn.models.backbones import Backbone, WeightsError, list_backbones, load_backbone, renew_final_norm
from avalanche_firn.models.compilation import compile_backbone
from avalanche_firn.models.contrastive import ContrastiveClassifier, with_projection_head
from avalanche_firn.models.convnets import DigitConvNet, InstanceNormConvNet, ProjectionHead
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.linear_probe import fit_linear_probe
from avalanche_firn.models.linear_rows import LinearRows, linear_rows
from avalanche_firn.models.lora import (
    ComposedLoRALinear,
    LoRAComposition,
    add_composed_lora,
    compose_delta,
    orthogonality_penalty,
)
from avalanche_firn.models.lora_export import merged_state_dict, save_merged, save_peft_adapter
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
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
    "ComposedLoRALinear",
    "ContrastiveClassifier",
    "DigitConvNet",
    "FeatureCache",
    "FeatureClassifier",
    "InstanceNormConvNet",
    "LinearRows",
    "LoRAComposition",
    "ModelParts",
    "NearestMeanNetwork",
    "ProjectionHead",
    "TaskwiseLinearHead",
    "WeightsError",
    "add_composed_lora",
    "compile_backbone",
    "compose_delta",
    "evaluation_mode",
    "extract_features",
    "find_parts",
    "fit_linear_probe",
    "linear_rows",
    "list_backbones",
    "load_backbone",
    "merged_state_dict",
    "orthogonality_penalty",
    "renew_final_norm",
    "save_merged",
    "save_peft_adapter",
    "with_projection_head",
    "with_taskwise_head",
]
