"""Asymmetric supervised contrastive loss and instance-wise relation distillation of one batch of projections.

Co2L (arXiv 2106.14413), which CILA (arXiv 2405.18756) builds on. Both losses are functions of the Gram matrix of the
projections ``z``, so both come from one product, block of rows by block of rows, together with their gradient in closed
form: ``dL / dz = (M + M') z`` with ``M = dL / d(z z')``. Nothing of size 2N x 2N is ever kept.

Stable where the released code is not: the diagonal is masked before the maximum of a row is taken, and nothing is
divided by a sum of underflowed exponentials. Products run in float32 (float64 for float64 input) whatever autocast or
TF32 settings are in force: a teacher temperature of 0.01 multiplies errors of similarities by 100.

Cost for 2N rows of width d: about ``16 N^2 d`` multiply-additions forward and backward together, memory of one
block of rows. No boolean gather, no host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CoefficientMode = Literal["max", "min", "pure", "constant"]

_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Elements of one block: half of 1,024 rows on a CPU (measured), few launches on a GPU (our choice)."""


class ContrastiveTerms(NamedTuple):
    """``total = contrastive + coefficient * distillation`` carries the gradient; the terms are for logging."""

    total: Tensor
    contrastive: Tensor
    distillation: Tensor


def contrastive_distillation(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    temperature: float,
    base_temperature: float | None = None,
    teacher_features: Tensor | None = None,
    student_temperature: float = 0.2,
    teacher_temperature: float = 0.01,
    coefficient: float = 1.0,
) -> ContrastiveTerms:
    """Both losses of a batch from one Gram matrix.

    :param features: projections ``(2N, d)``, unit rows; 16-bit types are computed in float32.
    :param labels: ``(2N,)`` integers. :param anchors: ``(2N,)`` bool. See :func:`asymmetric_supcon`.
    :param teacher_features: ``(2N, d')`` of the previous model on the same images; None: no distillation (first task).
    :param coefficient: weight of the distillation.
    :returns: three scalars, nats. The terms are detached.
    :raises ValueError: shapes that do not fit, a temperature that is not positive.
    """
    _check_features("features", features)
    _check_rows(features, labels=labels, anchors=anchors)
    check_temperatures(temperature=temperature, base_temperature=base_temperature)
    scale = 1.0 if base_temperature is None else temperature / base_temperature
    if teacher_features is not None:
        _check_teacher(features, teacher_features)
        check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    results = _GramLosses.apply(
        _computed(features),
        None if teacher_features is None else _computed(teacher_features.detach()),
        labels,
        anchors,
        (temperature, scale, student_temperature, teacher_temperature),
        (1.0, float(coefficient)),
    )
    return ContrastiveTerms(*results)


def asymmetric_supcon(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float, base_temperature: float | None = None
) -> Tensor:
    """Supervised contrastive loss whose anchors are only some of the rows; all other rows serve as negatives.

    For an anchor i with the same-label rows P(i): ``log sum_{a != i} exp(z_i z_a / T) - mean_{p in P(i)} z_i z_p / T``;
    the loss is the sum over anchors divided by the number of all rows, times ``T / base_temperature``.

    :param features: ``(2N, d)``, used as they are (normalise them before).
    :param labels: ``(2N,)``, any integers, any order. :param anchors: ``(2N,)`` bool.
    :param temperature: T, above 0 (0.5: Co2L on CIFAR-10).
    :param base_temperature: 0.07 in Co2L's released code; None: factor 1.
    :returns: scalar, nats. Without an anchor 0 with zero gradient; an anchor without partner contributes 0 and still
        counts in 2N.
    :raises ValueError: shapes that do not fit, a temperature that is not positive.
    """
    terms = contrastive_distillation(
        features, labels, anchors, temperature=temperature, base_temperature=base_temperature
    )
    return terms.total


def relation_distillation(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Instance-wise relation distillation: keep the batch's similarity structure as the teacher has it.

    Mean over rows of ``-sum_{j != i} p_ij log q_ij``; p: softmax of the teacher's similarities divided by
    ``teacher_temperature``, q likewise of the student's. A cross-entropy: it holds the teacher's entropy, and at
    unequal temperatures student = teacher is not its minimum.

    :param student: ``(2N, d)``. :param teacher: ``(2N, d')``, detached inside.
    :param student_temperature: 0.2, :param teacher_temperature: 0.01 in Co2L on CIFAR-10.
    :returns: scalar, nats; 0 for two rows; finite for finite input.
    :raises ValueError: shapes that do not fit, a temperature that is not positive.
    """
    _check_features("student", student)
    _check_teacher(student, teacher)
    check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    total, _, _ = _GramLosses.apply(
        _computed(student),
        _computed(teacher.detach()),
        None,
        None,
        (1.0, 1.0, student_temperature, teacher_temperature),
        (0.0, 1.0),
    )
    return total


def distillation_coefficient(
    distillation_losses: Sequence[float],
    contrastive_losses: Sequence[float],
    balance: float = 1.0,
    floor: float = 1.0,
    ceiling: float | None = None,
    mode: CoefficientMode = "max",
) -> float:
    """CILA's weight of the distillation for the next task, from the average losses of the tasks since the second.

    ``r = balance * sum(distillation) / sum(contrastive)``; ``"max"``: ``max(floor, r)`` (CILA), ``"min"``:
    ``min(floor, r)`` and ``"pure"``: ``r`` (its ablation), ``"constant"``: ``floor`` (Co2L). Without a task to look
    back on, or with a contrastive sum of 0, ``floor`` as it is; else ``ceiling`` cuts from above.

    :param distillation_losses: one average per task, :param contrastive_losses: likewise.
    :param balance: open in the paper; 1. :param floor: 1 (secondary sources). :param ceiling: None (none is mentioned).
    :raises ValueError: different lengths, entries that are not finite, settings out of range, an unknown mode.
    """
    check_coefficient(balance, floor, ceiling, mode)
    if len(distillation_losses) != len(contrastive_losses):
        raise ValueError(
            f"distillation_losses has {len(distillation_losses)} entries and contrastive_losses "
            f"{len(contrastive_losses)}; equal numbers are accepted"
        )
    for field, values in (("distillation_losses", distillation_losses), ("contrastive_losses", contrastive_losses)):
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{field} is {list(values)}; finite averages are accepted")
    ratio = loss_ratio(distillation_losses, contrastive_losses)
    if ratio is None or mode == "constant":
        return float(floor)
    weighted = balance * ratio
    chosen = {"max": max(floor, weighted), "min": min(floor, weighted), "pure": weighted}[mode]
    return float(chosen if ceiling is None else min(ceiling, chosen))


def loss_ratio(distillation_losses: Sequence[float], contrastive_losses: Sequence[float]) -> float | None:
    """``sum(distillation) / sum(contrastive)``; None without entries or with a contrastive sum of 0."""
    below = math.fsum(contrastive_losses)
    return math.fsum(distillation_losses) / below if len(contrastive_losses) and below != 0 else None


def check_coefficient(balance: float, floor: float, ceiling: float | None, mode: str) -> None:
    """ValueError for settings of :func:`distillation_coefficient` out of range."""
    if mode not in ("max", "min", "pure", "constant"):
        raise ValueError(f"mode is {mode!r}; 'max', 'min', 'pure' or 'constant' is accepted")
    for field, value in (("balance", balance), ("floor", floor), ("ceiling", ceiling)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field} is {value}; a finite number of 0 and above is accepted")


# ------------------------------------------------------------------------------------------------------------- kernel
class _GramLosses(torch.autograd.Function):
    """Weighted sum of both losses and the two terms; the gradient is made in the forward pass, block by block."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        z: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        anchors: Tensor | None,
        temperatures: tuple[float, float, float, float],
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature, scale, student_temperature, teacher_temperature = temperatures
        count = len(z)
        contrastive, distillation = z.new_zeros(()), z.new_zeros(())
        gradient = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        with _full_precision(z.device.type):
            for rows in _blocks(count, z.device.type) if count > 1 else ():
                shifted, own = _similarities(z, rows)
                slopes: list[Tensor] = []
                if labels is not None and anchors is not None:
                    term, slope = _supcon_rows(shifted, own, rows, labels, anchors, temperature)
                    contrastive += term * (scale / count)
                    slopes.append(slope.mul_(weights[0] * scale / (count * temperature)))
                if teacher is not None:
                    term, slope = _relation_rows(shifted, teacher, rows, student_temperature, teacher_temperature)
                    distillation += term / count
                    slopes.append(slope.mul_(weights[1] / (count * student_temperature)))
                if gradient is not None:
                    slope = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
                    gradient[rows].addmm_(slope, z)
                    gradient.addmm_(slope.T, z[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(contrastive, distillation)
        return weights[0] * contrastive + weights[1] * distillation, contrastive, distillation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None, None


def _blocks(count: int, device: str) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS.get(device, 2**24) // count)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _similarities(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of ``z z'`` minus their maximum off the diagonal ``(m, n)``; the columns ``(m, 1)`` of the diagonal. The
    diagonal is so low that its exponential is 0, yet finite, so that 0 times it is 0."""
    similar = z[rows] @ z.T
    own = torch.arange(rows.start, rows.stop, device=z.device)[:, None]
    similar.scatter_(1, own, -(torch.finfo(z.dtype).max ** 0.5))
    return similar.sub_(similar.amax(1, keepdim=True)), own


def _softmax(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``(m, n)`` and logarithms of the sums ``(m, 1)`` of rows whose largest exponent is 0."""
    probability = torch.softmax(exponents, 1)
    return probability, -probability.amax(1, keepdim=True).log()


def _supcon_rows(
    shifted: Tensor, own: Tensor, rows: slice, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, and its derivative by the similarities times the temperature ``(m, n)``."""
    positive = (labels[rows, None] == labels).to(shifted.dtype).scatter_(1, own, 0.0)
    partners = positive.sum(1, keepdim=True)
    valid = (anchors[rows, None] & (partners > 0)).to(shifted.dtype)
    share = valid / partners.clamp(min=1)
    probability, log_sum = _softmax(shifted / temperature)
    attraction = (positive * shifted).sum(1, keepdim=True) / temperature
    loss = (valid * log_sum - share * attraction).sum()
    return loss, probability.mul_(valid).addcmul_(positive, share, value=-1.0)


def _relation_rows(
    shifted: Tensor, teacher: Tensor, rows: slice, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross-entropies, and its derivative by the similarities times the student's temperature."""
    relations, _ = _similarities(teacher, rows)
    target, _ = _softmax(relations / teacher_temperature)
    exponents = shifted / student_temperature
    probability, log_sum = _softmax(exponents)
    loss = (log_sum - (target * exponents).sum(1, keepdim=True)).sum()
    return loss, probability.sub_(target)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Autocast off and no TF32 or bf16 products inside; afterwards what was set before, in either of PyTorch's ways."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    newer: list[Any] = [m for m in matmuls if hasattr(m, "fp32_precision")]  # from PyTorch 2.9 on
    precisions = [m.fp32_precision for m in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # something was set in the newer way that the older has no word for
        older = None
    with torch.autocast(device, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older)
            for matmul, precision in zip(newer, precisions, strict=True):
                matmul.fp32_precision = "none"  # inherits
                if matmul.fp32_precision != precision:
                    matmul.fp32_precision = precision


# ------------------------------------------------------------------------------------------------------------- checks
def _computed(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _check_features(field: str, features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{field} is {features.dtype} {tuple(features.shape)}; floating-point (2N, d) is accepted")


def _check_teacher(student: Tensor, teacher: Tensor) -> None:
    _check_features("teacher", teacher)
    if len(teacher) != len(student):
        raise ValueError(f"teacher has {len(teacher)} rows and the student {len(student)}; equal numbers are accepted")


def _check_rows(features: Tensor, *, labels: Tensor, anchors: Tensor) -> None:
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels is {labels.dtype} {tuple(labels.shape)}; integers ({len(features)},) are accepted, one per row"
        )
    if anchors.shape != features.shape[:1] or anchors.dtype != torch.bool:
        raise ValueError(f"anchors is {anchors.dtype} {tuple(anchors.shape)}; bool ({len(features)},) is accepted")


def check_temperatures(**temperatures: float | None) -> None:
    """ValueError for a temperature that is neither None nor a finite number above 0."""
    for field, value in temperatures.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{field} is {value}; a finite number above 0 is accepted")


__all__ = [
    "CoefficientMode",
    "ContrastiveTerms",
    "asymmetric_supcon",
    "check_coefficient",
    "check_temperatures",
    "contrastive_distillation",
    "distillation_coefficient",
    "loss_ratio",
    "relation_distillation",
]
