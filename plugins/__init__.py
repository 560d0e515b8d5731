"""Plugins for any Avalanche SGD strategy, and the functions that they are made of."""

from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.class_statistics import ClassGaussians
from avalanche_firn.plugins.classifier_alignment import (
    ClassifierAlignmentPlugin,
    align_classifier,
    logit_normalized_cross_entropy,
    mean_scale,
    symmetric_cross_entropy,
)
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians
from avalanche_firn.plugins.contrastive_distillation import (
    ContrastiveDistillationPlugin,
    asymmetric_supcon,
    distillation_coefficient,
    relation_distillation,
)
from avalanche_firn.plugins.critical_parameters import ImportanceTracker, ImportantParameterPlugin, select_critical
from avalanche_firn.plugins.distributed import DistributedPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.finite_guard import FiniteGuardPlugin
from avalanche_firn.plugins.linear_probe import LinearProbePlugin
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.losses import (
    LocalCrossEntropy,
    LocalSymmetricCrossEntropy,
    local_cross_entropy,
    local_symmetric_cross_entropy,
)
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.placed_buffer import ResumableReplayPlugin
from avalanche_firn.plugins.process_group import end_processes, first_process_first, start_processes
from avalanche_firn.plugins.rehearsal import RehearsalPlugin
from avalanche_firn.plugins.schedules import cosine, lagged_cosine, multistep
from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin
from avalanche_firn.plugins.task_inference import MahalanobisTaskInference, TaskInferencePlugin
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin
from avalanche_firn.plugins.zapping import ZappingPlugin, resample_rows_, reset_optimizer_rows_

__all__ = [
    "ClassGaussians",
    "ClassifierAlignmentPlugin",
    "ClassifierStagePlugin",
    "ClusterGaussians",
    "ContrastiveDistillationPlugin",
    "DistributedPlugin",
    "ExactCheckpointPlugin",
    "FastPathPlugin",
    "FiniteGuardPlugin",
    "FreshOptimizerPlugin",
    "GradientAccumulationPlugin",
    "ImportanceTracker",
    "ImportantParameterPlugin",
    "LinearProbePlugin",
    "LoRACompositionPlugin",
    "LocalCrossEntropy",
    "LocalSymmetricCrossEntropy",
    "MahalanobisTaskInference",
    "MixedPrecisionPlugin",
    "RehearsalPlugin",
    "ResumableEWCPlugin",
    "ResumableLwFPlugin",
    "ResumableReplayPlugin",
    "SequentialPhasePlugin",
    "SlowLearnerPlugin",
    "TaskInferencePlugin",
    "WarmupCosinePlugin",
    "ZappingPlugin",
    "align_classifier",
    "asymmetric_supcon",
    "cosine",
    "distillation_coefficient",
    "end_processes",
    "first_process_first",
    "lagged_cosine",
    "local_cross_entropy",
    "local_symmetric_cross_entropy",
    "logit_normalized_cross_entropy",
    "mean_scale",
    "multistep",
    "relation_distillation",
    "resample_rows_",
    "reset_optimizer_rows_",
    "select_critical",
    "start_processes",
    "symmetric_cross_entropy",
]
