"""Continual-learning figures as functions and as Avalanche metrics; probes of representations, drift; intervals,
pictures and TensorBoard."""

from avalanche_firn.evaluation.comparison_figures import (
    cost_figure,
    differences_figure,
    frozen_map_figure,
    ranking_figure,
    task_confusion_figure,
    task_matrices_figure,
)
from avalanche_firn.evaluation.contrastive_bound import (
    TVCertificate,
    chained_bound,
    loss_ceiling,
    one_step_bound,
    training_loss_bound,
    tv_certificate,
)
from avalanche_firn.evaluation.contrastive_report import ContrastiveBound
from avalanche_firn.evaluation.device_metrics import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.evaluation.drift import RepresentationDrift, linear_cka, weight_distance
from avalanche_firn.evaluation.dynamics import (
    Dynamics,
    EffectTotals,
    TaskDynamics,
    block_effects,
    effect_totals,
    shock_and_recovery,
    step_effects,
)
from avalanche_firn.evaluation.dynamics_figures import (
    block_effect_figure,
    cosine_figure,
    loss_map_figure,
    task_curves_figure,
)
from avalanche_firn.evaluation.dynamics_math import forgetting as loss_forgetting
from avalanche_firn.evaluation.efficiency import Efficiency
from avalanche_firn.evaluation.figures import Style, curves_figure, save_figure, styles_of, task_matrix_figure
from avalanche_firn.evaluation.gradient_alignment import (
    AppliedUpdate,
    GradientAlignment,
    gradient_alignment,
    second_moment_vs_fisher,
)
from avalanche_firn.evaluation.landscape import Landscape, random_landscape, trajectory_landscape
from avalanche_firn.evaluation.landscape_math import (
    PrincipalPlane,
    filter_normalized_direction,
    normalize_direction,
    pca_directions,
    project,
)
from avalanche_firn.evaluation.matrix import (
    NotEvaluatedError,
    ResultMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_accuracy,
    last_accuracy,
)
from avalanche_firn.evaluation.metrics import (
    LearningRates,
    PhaseMetric,
    ResultMatrixMetric,
    TrainingLoss,
    continual_metrics,
)
from avalanche_firn.evaluation.probes import fit_linear_probe, knn_predict
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.evaluation.statistics import Interval, curve_interval, mean_interval, paired_difference
from avalanche_firn.evaluation.surface import Surface, loss_surface
from avalanche_firn.evaluation.task_confusion import TaskConfusion, confusion_shares
from avalanche_firn.evaluation.task_incremental import TaskIncrementalMatrixMetric
from avalanche_firn.evaluation.tensorboard import (
    log_hparams,
    log_text_config,
    read_scalars,
    summary_tag,
    write_summary,
)
from avalanche_firn.evaluation.trajectory import Trajectory
from avalanche_firn.evaluation.vocabulary import Meaning, describe, glossary

__all__ = [
    "AppliedUpdate",
    "ContrastiveBound",
    "Dynamics",
    "EffectTotals",
    "Efficiency",
    "GradientAlignment",
    "Interval",
    "Landscape",
    "LearningRates",
    "Meaning",
    "NotEvaluatedError",
    "PhaseMetric",
    "PrincipalPlane",
    "RepresentationDrift",
    "RepresentationProbe",
    "ResultMatrix",
    "ResultMatrixMetric",
    "Style",
    "Surface",
    "TVCertificate",
    "TaskConfusion",
    "TaskDynamics",
    "TaskIncrementalMatrixMetric",
    "TrainingLoss",
    "Trajectory",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "block_effect_figure",
    "block_effects",
    "chained_bound",
    "confusion_shares",
    "continual_metrics",
    "cosine_figure",
    "cost_figure",
    "curve_interval",
    "curves_figure",
    "describe",
    "device_accuracy_metrics",
    "device_loss_metrics",
    "differences_figure",
    "effect_totals",
    "filter_normalized_direction",
    "fit_linear_probe",
    "forgetting",
    "forward_transfer",
    "frozen_map_figure",
    "glossary",
    "gradient_alignment",
    "incremental_accuracy",
    "knn_predict",
    "last_accuracy",
    "linear_cka",
    "log_hparams",
    "log_text_config",
    "loss_ceiling",
    "loss_forgetting",
    "loss_map_figure",
    "loss_surface",
    "mean_interval",
    "normalize_direction",
    "one_step_bound",
    "paired_difference",
    "pca_directions",
    "project",
    "random_landscape",
    "ranking_figure",
    "read_scalars",
    "save_figure",
    "second_moment_vs_fisher",
    "shock_and_recovery",
    "step_effects",
    "styles_of",
    "summary_tag",
    "task_confusion_figure",
    "task_curves_figure",
    "task_matrices_figure",
    "task_matrix_figure",
    "training_loss_bound",
    "trajectory_landscape",
    "tv_certificate",
    "weight_distance",
    "write_summary",
]
