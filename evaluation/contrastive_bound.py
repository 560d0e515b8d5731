"""How far a contrastive loss on old tasks can rise, as functions of tensors and numbers: bounds and a certificate.

The idea is that of CILA (arXiv 2405.18756): the contrastive loss over all tasks seen is limited by the losses of the
successive models, through the distillation between each model and the one before it. The constants of the paper are not
public; those here are our own derivation, in which every inequality holds for every sample and not only on average.

Setting of the bounds: unit rows, one positive and K negatives per anchor, logits = cosine / temperature, the same
temperature for both models. q and p are the probabilities that the new and the old model give to the 1 + K candidates,
C = -log q_positive the loss of a model and D = -sum p log q the distillation. No C exceeds
alpha = log(1 + K exp(2 / temperature)), and ``D - alpha C_old <= C_new <= D + alpha C_old``. The distillation in the
loss of a training step is *not* this D: it runs over current samples for the most part, with two temperatures.

What to expect: alpha stands to the power of the number of tasks, so :func:`chained_bound` passes alpha itself, which no
loss can, after two or three tasks: alpha^(T-1) is 20 for K = 1, temperature 1 and 5 tasks, 14,000 for K = 1022 and
temperature 0.5. :func:`tv_certificate` is the one that says something: for one pair of models and any number of
positives. Cost: the bounds none; the certificate about six (n, n) matrices, 6 MiB for n = 512 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


# ----------------------------------------------------------------------- numbers
def loss_ceiling(temperature: float, negatives: int) -> float:
    """Largest contrastive loss that unit rows can have, ``log(1 + K exp(2 / temperature))``, in nats.

    It is reached where the positive is opposite to the anchor and every negative equal to it.

    Args:
        temperature: above 0, finite. negatives: K, an integer of at least 1.

    No overflow: the exponential is never formed. Raises ValueError for other arguments.
    """
    _check_temperature(temperature)
    if isinstance(negatives, bool) or int(negatives) != negatives or negatives < 1:
        raise ValueError(f"negatives: got {negatives!r}; accepted are integers >= 1")
    largest = math.log(negatives) + 2 / temperature
    return largest + math.log1p(math.exp(-largest))


def gamma(weight: float, previous_weight: float, coefficient: float) -> float:
    """``min(1 / k_t, lambda_t / K_{t-1})``: how much of the training loss counts in :func:`training_loss_bound`.

    It grows with the coefficient up to ``lambda_t = K_{t-1} / k_t``, the number of earlier tasks for equal weights. A
    larger coefficient doesn't tighten the bound any more.

    Args:
        weight: k_t >= 0 of the new task. previous_weight: K_{t-1} >= 0, the sum over the tasks before.
        coefficient: lambda_t >= 0 of the distillation; it isn't read where ``previous_weight`` is 0.

    Returns a float; a quotient with divisor 0 is infinite, and so is the result if both are. Raises ValueError for
    arguments that are negative or not finite.
    """
    _check_weights([weight, previous_weight])
    first = 1 / weight if weight else math.inf
    if not previous_weight:
        return first
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient: got {coefficient}; accepted are finite numbers >= 0")
    return min(first, coefficient / previous_weight)


def one_step_bound(
    measured_before: float,
    contrastive_new: float,
    distillation_old: float,
    *,
    weight: float,
    previous_weight: float,
    ceiling: float,
) -> float:
    """Bound of A_t from what is known of the model before, ``alpha A_{t-1} + k_t C_t + K_{t-1} D_t``.

    A_t is the *sum* over tasks s <= t of k_s times the mean loss of model t on data of s; divide by K_t for a mean.

    Args:
        measured_before: A_{t-1}, nats. contrastive_new: C_t, the mean loss of model t on data of its own task.
        distillation_old: D_t, the mean distillation from model t-1 to model t on the earlier tasks, each with its
            weight.
        weight: k_t >= 0. previous_weight: K_{t-1} >= 0. ceiling: alpha, see :func:`loss_ceiling`.

    A loss whose weight is 0 isn't read and may be NaN (``previous_weight`` stands for ``measured_before`` too). NaN
    anywhere else gives NaN. Raises ValueError for weights and a ceiling out of range.
    """
    _check_weights([weight, previous_weight])
    _check_ceiling(ceiling)
    old = ceiling * measured_before + previous_weight * distillation_old if previous_weight else 0.0
    return old + (weight * contrastive_new if weight else 0.0)


def chained_bound(
    contrastive_new: Sequence[float], distillation_old: Sequence[float], *, weights: Sequence[float], ceiling: float
) -> list[float]:
    """Bound of A_t after every task in which no earlier loss is measured again: :func:`one_step_bound` on itself.

    Args:
        contrastive_new: C_t of every task in the order of training. distillation_old: D_t of every task; the first
            entry isn't read. Both as long as ``weights``.
        weights: k_t >= 0. ceiling: alpha, see :func:`loss_ceiling`.

    Returns one sum per task, to be divided by K_t for a mean. An entry that is read and NaN makes its own bound and all
    later ones NaN; entries with weight 0 aren't read. Raises ValueError for other lengths and values out of range.
    """
    _check_lengths(weights=weights, contrastive_new=contrastive_new, distillation_old=distillation_old)
    _check_weights(weights)
    bounds: list[float] = []
    bound = total = 0.0
    for new, old, weight in zip(contrastive_new, distillation_old, weights, strict=True):
        bound = one_step_bound(bound, new, old, weight=weight, previous_weight=total, ceiling=ceiling)
        total += weight
        bounds.append(bound)
    return bounds


def training_loss_bound(
    training_losses: Sequence[float],
    *,
    weights: Sequence[float],
    coefficients: Sequence[float | None],
    ceiling: float,
) -> list[float]:
    """Bound of A_t after every task that knows nothing but one loss L_t per task, the form of the paper.

    ``k_1 alpha^(t-1) L_1 + sum over 2 <= j <= t of alpha^(t-j) / gamma_j L_j``, with :func:`gamma`.

    Args:
        training_losses: ``C_t + lambda_t D_t`` of every task, on data as for :func:`chained_bound`; C_1 for the first.
        weights: k_t >= 0. coefficients: lambda_t of every task, None where there is none; the first isn't read.
        ceiling: alpha, see :func:`loss_ceiling`.

    Returns one sum per task. Infinite from a coefficient of 0 on, and NaN from an unknown one (None, NaN) or from a NaN
    loss on. A task that comes first with weight 0 isn't read. Raises ValueError for other lengths and values out of
    range.
    """
    _check_lengths(weights=weights, training_losses=training_losses, coefficients=coefficients)
    _check_weights(weights)
    _check_ceiling(ceiling)
    bounds: list[float] = []
    bound = total = 0.0
    for loss, weight, coefficient in zip(training_losses, weights, coefficients, strict=True):
        if total and (coefficient is None or math.isnan(coefficient)):
            bound = math.nan
        elif total or weight:
            share = gamma(weight, total, 0.0 if coefficient is None else coefficient)
            # a share of 0 leaves the old tasks without any bound, whatever the loss
            bound = ceiling * bound + (loss / share if share else math.inf)
        total += weight
        bounds.append(bound)
    return bounds


# ----------------------------------------------------------------------- tensors
def pair_losses(cosines: Tensor, temperature: float) -> Tensor:
    """Contrastive loss -log q_0 of anchors with one positive and K negatives.

    Args:
        cosines: (..., 1 + K) floating; similarity of the anchor with its positive, then with its negatives.
        temperature: above 0, finite.

    Returns (...) in the dtype of the cosines, nats; at most :func:`loss_ceiling`. Raises ValueError for K < 1, other
    dtypes and temperatures.
    """
    _check_cosines("cosines", cosines)
    _check_temperature(temperature)
    return -(cosines / temperature).log_softmax(-1)[..., 0]


def pair_cross_entropies(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distillation -sum_j p_j log q_j of the same candidates under two models, p of the teacher, q of the student.

    Args:
        student, teacher: (..., 1 + K) floating, cosines as for :func:`pair_losses`, of one shape.
        temperature: above 0, finite; that of both.

    Returns (...), nats. It includes the teacher's entropy, so it isn't 0 for equal models. Raises ValueError for other
    shapes, dtypes and temperatures.
    """
    _check_cosines("student", student)
    _check_cosines("teacher", teacher)
    _check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(f"student, teacher: got {tuple(student.shape)} and {tuple(teacher.shape)}; must be equal")
    return -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1)


class TVCertificate(NamedTuple):
    """Result of :func:`tv_certificate`: tensors (n,), one entry per row, nats (``total_variation``: 0 to 1)."""

    loss: Tensor
    """l_i, the student's contrastive loss; NaN without a positive."""
    cross_entropy: Tensor
    """From the teacher's to the student's distribution over the other rows."""
    total_variation: Tensor
    """Distance of the teacher's distribution from the uniform one over the positives; NaN without a positive."""
    logit_range: Tensor
    """Largest minus smallest logit of the student."""
    largest_term: Tensor
    """Largest -log q_ij of the row; never below ``logit_range`` by its definition."""
    upper: Tensor
    """``cross_entropy + largest_term * total_variation``, the looser upper value."""
    upper_range: Tensor
    """``cross_entropy + logit_range * total_variation``."""
    lower_range: Tensor
    """``cross_entropy - logit_range * total_variation``; below 0, where it says nothing, for poor teachers."""


def tv_certificate(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> TVCertificate:
    """Bounds of the student's supervised contrastive loss from how well the *teacher* puts equal labels together.

    Per row i, over the other n - 1 rows: q_i the softmax of the student's similarities divided by the temperature, p_i
    that of the teacher's, u_i uniform over the rows with i's label. The loss l_i is the cross-entropy of u_i and q_i;
    replacing u_i by p_i changes it by at most the range of the logits times the total variation of u_i and p_i.

    Args:
        student: (n, d) floating, n >= 2, unit rows for cosines (the inequalities hold for any rows).
        teacher: (n, d') of the same samples, d' may differ.
        labels: (n,) integers, any ids.
        temperature: above 0, finite; that of both.

    Returns :class:`TVCertificate` in the dtype that the two promote to (float32 for half precision).
    ``lower_range <= loss <= upper_range <= upper`` in every row with a positive. A row whose label no other row has is
    NaN in all fields that need a positive; the cross-entropy, the range and the largest term are there. Raises
    ValueError for other shapes, dtypes and temperatures.
    """
    _check_temperature(temperature)
    for name, rows in (("student", student), ("teacher", teacher)):
        if rows.ndim != 2 or not rows.is_floating_point() or len(rows) != len(student) or len(rows) < 2:
            got = f"{rows.dtype} {tuple(rows.shape)}"
            raise ValueError(f"{name}: got {got}; accepted are floating rows (n, d) with n >= 2, as many for both")
    if labels.shape != (len(student),) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels: got {labels.dtype} {tuple(labels.shape)}; accepted are integers of shape ({len(student)},)"
        )
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    logits = (student.to(dtype) @ student.to(dtype).T) / temperature
    log_q = logits.masked_fill(own, -math.inf).log_softmax(1).masked_fill(own, 0)
    p = ((teacher.to(dtype) @ teacher.to(dtype).T) / temperature).masked_fill(own, -math.inf).softmax(1)
    positive = (labels[:, None] == labels).masked_fill(own, False).to(dtype)
    uniform = positive / positive.sum(1, keepdim=True)  # 0 / 0 is the NaN of a row without positives
    cross_entropy = -(p * log_q).sum(1)
    variation = (uniform - p).abs().sum(1) / 2
    logit_range = logits.masked_fill(own, -math.inf).amax(1) - logits.masked_fill(own, math.inf).amin(1)
    largest = -log_q.amin(1)
    return TVCertificate(
        loss=-(uniform * log_q).sum(1),
        cross_entropy=cross_entropy,
        total_variation=variation,
        logit_range=logit_range,
        largest_term=largest,
        upper=cross_entropy + largest * variation,
        upper_range=cross_entropy + logit_range * variation,
        lower_range=cross_entropy - logit_range * variation,
    )


# ------------------------------------------------------------------------ checks
def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}; accepted are finite numbers above 0")


def _check_ceiling(ceiling: float) -> None:
    if not 0 < ceiling < math.inf:
        raise ValueError(f"ceiling: got {ceiling}; accepted are finite numbers above 0, see loss_ceiling")


def _check_weights(weights: Sequence[float]) -> None:
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights: got {list(weights)}; accepted are finite numbers >= 0")


def _check_lengths(**sequences: Sequence[float | None]) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lengths differ: got {lengths}; accepted is one entry per task in each")


def _check_cosines(name: str, cosines: Tensor) -> None:
    if cosines.ndim < 1 or cosines.shape[-1] < 2 or not cosines.is_floating_point():
        got = f"{cosines.dtype} {tuple(cosines.shape)}"
        raise ValueError(f"{name}: got {got}; accepted are floating cosines (..., 1 + K), K >= 1 negatives")


__all__ = [
    "TVCertificate",
    "chained_bound",
    "gamma",
    "loss_ceiling",
    "one_step_bound",
    "pair_cross_entropies",
    "pair_losses",
    "training_loss_bound",
    "tv_certificate",
]
