"""Heads as rows: shapes, scales and penalties of linear probes in the conventions of other code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from avalanche_firn.models.probe_solvers import cross_entropy_and_gradient_
from avalanche_firn.models.ridge import check_rows


def binary_rows(weight: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
    """A binary head of one row ``w`` as two rows ``(-w/2, +w/2)``, the bias likewise: same probabilities.

    Args:
        weight: (1, d) or (d,), the logit of the second class.
        bias: a number or a tensor of one element.

    Returns:
        (2, d) and (2,).
    """
    if weight.ndim not in (1, 2) or (weight.ndim == 2 and weight.shape[0] != 1):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted are (1, d) and (d,)")
    offset = torch.as_tensor(bias, dtype=weight.dtype, device=weight.device)
    if offset.numel() != 1:
        raise ValueError(f"bias: got shape {tuple(offset.shape)}; accepted is one number")
    half, offset = weight.reshape(1, -1) / 2, offset.reshape(1) / 2
    return torch.cat([-half, half]), torch.cat([-offset, offset])


def pad_rows(
    weight: Tensor, bias: Tensor, class_ids: Tensor | Sequence[int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Rows (K, d) and biases (K,) of the classes ``class_ids`` at their place in a head of C rows; the rest zero.

    ValueError: shapes that don't fit, an id outside ``0..num_classes-1`` or twice.
    """
    ids = torch.as_tensor(class_ids, device=weight.device)
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or ids.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (weight, bias, ids))
        raise ValueError(f"weight, bias, class_ids: got shapes {shapes}; accepted are (K, d), (K,), (K,)")
    values = ids.tolist()
    if len(set(values)) < len(values) or any(not 0 <= i < num_classes for i in values):
        raise ValueError(f"class_ids: got {values}; accepted are different ids in 0..{num_classes - 1}")
    padded = weight.new_zeros(num_classes, weight.shape[1])
    offset = bias.new_zeros(num_classes)
    padded[ids], offset[ids] = weight, bias
    return padded, offset


def l2_from_c(c: float, n: int, num_classes_present: int) -> float:
    """The penalty that equals scikit-learn's ``C`` on n samples: ``1/(n C)``, and ``2/(n C)`` with two classes."""
    if not 0 < c < math.inf or n < 1 or num_classes_present < 1:
        raise ValueError(f"c, n, num_classes_present: got {c}, {n}, {num_classes_present}; all must be above 0")
    return (2.0 if num_classes_present == 2 else 1.0) / (n * c)


def c_path(n: int, classes_present: int, num: int = 100, low: float = -7, high: float = 2) -> list[float]:
    """Penalties of the grid ``C = logspace(low, high, num)`` of arXiv 2202.10054's code, strongest first."""
    if num < 1:
        raise ValueError(f"num: got {num}; accepted are integers >= 1")
    return [l2_from_c(float(c), n, classes_present) for c in np.logspace(low, high, num)]


def rescale_rows(weight: Tensor, bias: Tensor, reference_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias times ``std(reference_weight) / std(weight)`` (unbiased); unchanged where ``weight`` is constant.

    Option ``normalize_lp`` of arXiv 2202.10054's code: the head gets the spread of a random one. The standard deviation
    is over all entries given, so leave rows of absent classes out. ValueError when ``reference_weight`` is constant.
    """
    reference = reference_weight.detach().double().std() if reference_weight.numel() > 1 else torch.zeros(())
    if not bool(reference > 0):
        raise ValueError("reference_weight: got a constant tensor; accepted is one with a spread above 0")
    spread = weight.detach().double().std(correction=1 if weight.numel() > 1 else 0)
    factor = torch.where(spread > 0, reference.to(spread) / spread, torch.ones_like(spread))
    return weight * factor.to(weight.dtype), bias * factor.to(bias.dtype)


def fit_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float] = (1e-2, 1e2)) -> float:
    """The temperature T within ``bounds`` for which the cross-entropy of ``logits / T`` is smallest.

    For ridge heads, whose scores are nearly flat under a softmax. Separable logits give the lower bound.

    Args:
        logits: (n, C) floating, n >= 1.
        labels: (n,) integer columns.
        bounds: of T. Logits without any spread give 1.

    ValueError: no rows, other shapes, dtypes or values than these.
    """
    check_rows(logits, labels)
    if len(logits) == 0:
        raise ValueError("logits: got no rows; accepted is at least one")
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds: got {bounds}; accepted are 0 < lower < upper")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels: got {int(labels.max())}; accepted are columns below {logits.shape[1]}")
    z, y = logits.detach().to(torch.float64), labels.to(logits.device, torch.int64)
    if bool((z == z[:, :1]).all()):
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(cross_entropy_and_gradient_(z * math.exp(-log_temperature), y)[0])

    low, high = (math.log(bound) for bound in bounds)
    inside = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x)
    best = min((low, inside, high), key=loss)  # the search itself never tries the bounds
    return bounds[0] if best == low else bounds[1] if best == high else math.exp(best)


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats, a scalar in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels.to(wide.device, torch.int64))
