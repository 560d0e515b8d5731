"""Continual-learning figures as functions and as Avalanche metrics; probes of representations, drift; intervals,
pictures and TensorBoard."""

from avalanche_firn.evaluation.contrastive_bound import (
    TVCertificate,
    chained_bound,
    loss_ceiling,
    one_step_bound,
    training_loss_bound,
    tv_certificate,
)
from avalanche_firn.evaluation.contrastive_report import ContrastiveBound
from avalanche_firn.evaluation.drift import RepresentationDrift, linear_cka, weight_distance
from avalanche_firn.evaluation.efficiency import Efficiency
from avalanche_firn.evaluation.figures import curves_figure, save_figure, task_matrix_figure
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
from avalanche_firn.evaluation.task_incremental import TaskIncrementalMatrixMetric
from avalanche_firn.evaluation.tensorboard import log_hparams, log_text_config, read_scalars, write_summary

__all__ = [
    "ContrastiveBound",
    "Efficiency",
    "Interval",
    "LearningRates",
    "NotEvaluatedError",
    "PhaseMetric",
    "RepresentationDrift",
    "RepresentationProbe",
    "ResultMatrix",
    "ResultMatrixMetric",
    "TVCertificate",
    "TaskIncrementalMatrixMetric",
    "TrainingLoss",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "chained_bound",
    "continual_metrics",
    "curve_interval",
    "curves_figure",
    "fit_linear_probe",
    "forgetting",
    "forward_transfer",
    "incremental_accuracy",
    "knn_predict",
    "last_accuracy",
    "linear_cka",
    "log_hparams",
    "log_text_config",
    "loss_ceiling",
    "mean_interval",
    "one_step_bound",
    "paired_difference",
    "read_scalars",
    "save_figure",
    "task_matrix_figure",
    "training_loss_bound",
    "tv_certificate",
    "weight_distance",
    "write_summary",
]
