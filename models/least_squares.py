"""A linear classifier by least squares on one-hot targets, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from avalanche_firn.models.finite_values import NonFiniteValues

__all__ = ["least_squares_head"]


def least_squares_head(features: Tensor, labels: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Weights and biases that fit one-hot targets best; of all best ones those of smallest norm.

    The head start of few-shot transfer (arXiv 2310.07996, released code). Solved on the CPU in float64 by singular
    values, since the drivers for GPUs are wrong where there are fewer samples than features.

    :param features: ``(N, d)``. :param labels: ``(N,)`` int64, 0 to ``outputs - 1``.
    :param outputs: rows of the result; a row without samples is fitted to zeros.
    :returns: weight ``(outputs, d)`` and bias ``(outputs,)``, of the dtype and on the device of ``features``.
    :raises ValueError: other shapes, no sample, labels out of range, features that aren't finite.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"features and labels have shapes {shapes}; (N, d) and (N,) with N >= 1 are accepted")
    if int(labels.min()) < 0 or int(labels.max()) >= outputs:
        raise ValueError(f"labels go from {int(labels.min())} to {int(labels.max())}; 0 to {outputs - 1} is accepted")
    matrix = F.pad(features.detach().to("cpu", torch.float64), (0, 1), value=1.0)
    if not bool(matrix.isfinite().all()):
        raise NonFiniteValues("features hold NaN or infinite values; finite ones are accepted")
    targets = F.one_hot(labels.cpu(), outputs).double()
    solution = torch.linalg.lstsq(matrix, targets, driver="gelsd").solution.to(features)
    return solution[:-1].T.contiguous(), solution[-1].contiguous()
