"""Probes of a representation as functions of cached features: weighted kNN, linear probes, few-shot subsets.

Nothing here knows about Avalanche or models: the functions work as well on features saved by an earlier run.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from avalanche_firn.benchmarks.subsets import few_shot_indices, holdout_split
from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.models.linear_probe import ProbeSolution, c_path, fit_linear_probe, l2_from_c, solve_linear_probe
from avalanche_firn.models.ridge import RidgeStatistics, describe, is_integer

__all__ = [
    "ProbeSolution",
    "RidgeStatistics",
    "c_path",
    "few_shot_indices",
    "fit_linear_probe",
    "holdout_split",
    "knn_predict",
    "knn_scores",
    "l2_from_c",
    "solve_linear_probe",
]

_SCORE_TIE = 1e-12  # relative; covers the order of summation of equal scores


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> Tensor:
    """Class of every query by weighted k-nearest neighbours; arguments and errors as for :func:`knn_scores`.

    Returns:
        (q,) int64 class ids as in ``bank_labels``, on the device of the queries. The lowest id wins a tie; only
        there can renaming the classes make a difference.
    """
    scores, class_ids = _scores(queries, bank, bank_labels, k, temperature, chunk)
    best = scores.amax(1, keepdim=True)
    return class_ids[(scores >= best * (1 - _SCORE_TIE)).int().argmax(1)]


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Sum over the k most similar bank rows of ``exp(similarity / temperature)``, per class.

    Similarity is the cosine, 0 where a vector is zero. Bank rows that tie with the k-th similarity share the places
    that are left equally, so that the order of the bank plays no role. Differences beyond that are those of rounding
    in the matrix product: two bank rows whose similarities differ by less than that may change places at the k-th.

    Args:
        queries: (q, d) floating, finite; q = 0 is allowed.
        bank: (n, d) floating, finite, on the same device, n >= 1.
        bank_labels: (n,) integers, any class ids.
        k: neighbours, clipped to n. Default 200: ``tools/knn_monitor.py`` of UCL, first release.
        temperature: T > 0. Default 0.1: same source.
        chunk: queries per matrix product; memory ``chunk * n``. It changes no result.

    Returns:
        Scores (q, C') and the sorted class ids (C',) int64 of the bank. Every row of scores is divided by
        ``exp(largest similarity / T)``, which keeps it finite at any T. The dtype is that of the inputs, float32 for
        half precision.

    Raises:
        TypeError: ``k`` or ``chunk`` is not an integer.
        ValueError: n = 0, k < 1, chunk < 1, T not above 0 and finite, shapes or dtypes other than these, NaN.
    """
    scores, class_ids = _scores(queries, bank, bank_labels, k, temperature, chunk)
    return scores.to(_dtype(queries, bank)), class_ids


def _dtype(queries: Tensor, bank: Tensor) -> torch.dtype:
    dtype = torch.promote_types(queries.dtype, bank.dtype)
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def _scores(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    k, chunk = _check_knn(queries, bank, bank_labels, k, temperature, chunk)
    dtype, n = _dtype(queries, bank), len(bank)
    k = min(k, n)
    class_ids, columns = bank_labels.to(bank.device, torch.int64).unique(return_inverse=True)
    with torch.autocast(queries.device.type, enabled=False):
        bank, queries = _unit_rows(bank.to(dtype)), _unit_rows(queries.to(dtype))
        parts = [_chunk_scores(q @ bank.T, columns, len(class_ids), k, temperature) for q in queries.split(chunk)]
    return torch.cat(parts), class_ids


def _chunk_scores(similarity: Tensor, columns: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """(q, n) similarities to (q, classes) float64 scores."""
    tie = 4 * torch.finfo(similarity.dtype).eps
    values, rows = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    top = values[:, :1].double()
    weights = ((values[:, :k].double() - top) / temperature).exp()
    scores = weights.new_zeros(len(values), classes).scatter_add_(1, columns[rows[:, :k]], weights)
    if k == similarity.shape[1]:
        return scores
    tied = (values[:, k - 1] - values[:, k] <= tie).nonzero()[:, 0]
    if len(tied):  # rare: spread the open places over all rows at the border
        near, border = similarity[tied], values[tied, k - 1 : k]
        inside, at_border = near > border + tie, (near - border).abs() <= tie
        inside, at_border = inside.double(), at_border.double()
        share = inside + at_border * ((k - inside.sum(1, keepdim=True)) / at_border.sum(1, keepdim=True))
        weights = ((near.double() - top[tied]) / temperature).exp() * share
        scores[tied] = weights.new_zeros(len(tied), classes).index_add_(1, columns, weights)
    return scores


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero. Dividing by the largest entry first keeps the squares in range."""
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _check_knn(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, temperature: float, chunk: int
) -> tuple[int, int]:
    for name, x in {"queries": queries, "bank": bank}.items():
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"{name}: got {describe(x)}; accepted is a floating tensor of two dimensions")
    if queries.shape[1] != bank.shape[1] or bank.shape[1] == 0:
        raise ValueError(f"queries, bank: got {queries.shape[1]} and {bank.shape[1]} columns; must be equal, above 0")
    if queries.device != bank.device:
        raise ValueError(f"queries, bank: got devices {queries.device} and {bank.device}; must be the same")
    if len(bank) == 0:
        raise ValueError("bank: got no rows; accepted is at least one")
    if not is_integer(bank_labels) or bank_labels.shape != (len(bank),):
        got = describe(bank_labels)
        raise ValueError(f"bank_labels: got {got}; accepted is an integer tensor of shape ({len(bank)},)")
    for name, value in {"k": k, "chunk": chunk}.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: got {value!r}; accepted are integers >= 1")
        if value < 1:
            raise ValueError(f"{name}: got {value}; accepted are integers >= 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}; accepted are finite numbers above 0")
    if not bool(queries.isfinite().all() & bank.isfinite().all()):
        raise NonFiniteValues("queries, bank: got NaN or infinite values; accepted are finite numbers")
    return int(k), int(chunk)
