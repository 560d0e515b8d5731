"""Mahalanobis distances to many clusters as functions of tensors (LoRAC-IPC, arXiv 2504.13407, from the public code).

A cluster ``(mu, R)`` is stored as rows that make its distance ``(f - mu)' R^-1 (f - mu)`` a sum of squares:

- dense: ``L^-1`` (d, d) with ``R = L L'``, distance ``||L^-1 (f - mu)||^2``;
- low-rank, exact as well, from the samples: with ``F`` (n, d) the centred ones over ``sqrt(n - 1)`` the shrunk
  covariance is ``F'F + kappa I``. Let ``D`` be its diagonal (I without correlation), ``s = sqrt(D / kappa)``,
  ``L L' = I + F F' / kappa`` and ``V = L^-1 F diag(s) / sqrt(kappa)``. By Woodbury's formula the distance is
  ``||s (f - mu)||^2 - ||V (f - mu)||^2``.

``cluster_distances`` then takes one product with the rows of a block of clusters and one sum of squares per cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.plugins.class_statistics import class_statistics

_CANCELLATION = 16  # "auto" leaves clusters dense whose variance exceeds this times that of kappa I: float32 suffers
_SINGULAR = "the matrix of a cluster is not positive definite"
_BLOCK_BYTES = 2**26  # temporary memory per block of clusters
_BLOCK_BYTES_CPU = 2**22  # fits the cache


def shrink_covariance(covariance: Tensor, shrinkage: float = 1.0) -> Tensor:
    """``covariance + shrinkage * mean(diagonal) * I`` of every matrix of ``(..., d, d)`` (1.0: public code)."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + shrinkage * mean * identity


def correlation_matrix(covariance: Tensor) -> Tensor:
    """``C_ab / sqrt(C_aa C_bb)`` of every matrix of ``(..., d, d)``; ValueError for a variance that isn't positive."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if not bool((variance > 0).all()):
        raise ValueError(f"covariance: variances must be positive, the smallest is {float(variance.min()):.3g}")
    deviation = variance.sqrt()
    return covariance / (deviation[..., :, None] * deviation[..., None, :])


def mahalanobis_distance(query: Tensor, mean: Tensor, correlation: Tensor) -> Tensor:
    """Squared distances ``(f - mu)' R^-1 (f - mu)`` by Cholesky factor and triangular solve.

    Args:
        query: (n, d), float32 or float64.
        mean: (..., d).
        correlation: (..., d, d), symmetric positive definite; a covariance will do as well.

    Returns:
        (n, ...), of the dtype of the arguments.

    Raises:
        ValueError: shapes that don't fit; a matrix that isn't positive definite.
    """
    d = query.shape[-1]
    if query.ndim != 2 or mean.shape[-1:] != (d,) or correlation.shape != (*mean.shape, d):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, mean, correlation))
        raise ValueError(f"query, mean, correlation: expected (n, d), (..., d), (..., d, d), got {shapes}")
    factor, info = torch.linalg.cholesky_ex(correlation)
    if bool((info != 0).any()):
        raise ValueError("correlation: not positive definite")
    solved = torch.linalg.solve_triangular(factor, query.T - mean[..., None], upper=False)
    return solved.square().sum(-2).movedim(-1, 0)


def vote(tasks: Tensor) -> Tensor:
    """The most frequent of the inferred tasks of a batch, the smallest of several, for every row of it.

    The reference's batch-wise inference. **It leaks task identity**: its test batches hold samples of a single task, so
    the vote uses what a class-incremental learner isn't told. Compare such numbers with voted numbers only.

    Args:
        tasks: (n,) int64.

    Returns:
        (n,) int64. Nothing waits for the device.

    Raises:
        ValueError: another shape or dtype.
    """
    if tasks.ndim != 1 or tasks.dtype != torch.int64:
        raise ValueError(f"tasks: expected (n,) torch.int64, got {tuple(tasks.shape)} {tasks.dtype}")
    if len(tasks) == 0:
        return tasks.clone()
    ordered = tasks.sort().values
    count = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    return ordered.index_select(0, count.argmax(0, keepdim=True).expand(len(tasks)))  # argmax: the first of equals


def normalize_rows(features: Tensor) -> Tensor:
    """Rows of (n, d) over their Euclidean norm; a zero row stays zero."""
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / torch.where(norm > 0, norm, 1.0)


class Cluster(NamedTuple):
    """One cluster, see the module text; ``scales`` are 0 in the dense form."""

    mean: Tensor  # (d,)
    scales: Tensor  # (d,)
    rows: Tensor  # (d, d), or (n, d) in the low-rank form
    low_rank: bool


def given_cluster(mean: Tensor, covariance: Tensor, *, shrinkage: float, correlation: bool) -> Cluster:
    """Dense cluster of given moments (d,) and (d, d); ValueError if the matrix isn't positive definite."""
    matrix = shrink_covariance(covariance, shrinkage)
    if not bool((matrix.diagonal() > 0).all()):
        raise ValueError(_SINGULAR)
    factor, info = torch.linalg.cholesky_ex(correlation_matrix(matrix) if correlation else matrix)
    if int(info) != 0:
        raise ValueError(_SINGULAR)
    rows = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    return Cluster(mean, torch.zeros_like(mean), rows, False)


def fit_cluster(rows: Tensor, jitter: float, form: str, *, shrinkage: float, correlation: bool) -> Cluster:
    """Cluster of samples ``rows`` (n, d), float64, n >= 1.

    ``form`` ``"auto"`` is low-rank with ``n - 1 < d / 2``, but not where almost no jitter and shrinkage would let the
    difference of the two sums cancel. ValueError if the matrix isn't positive definite or overflows.
    """
    n, d = rows.shape
    mean = rows.mean(0)
    factor = (rows - mean) / max(n - 1, 1) ** 0.5
    trace = float(factor.square().sum())
    kappa = jitter + shrinkage * (trace / d + jitter)
    if not math.isfinite(trace):
        raise NonFiniteValues(f"the covariance of a cluster overflows {rows.dtype}")
    fits = n - 1 < d / 2 and kappa > 0 and trace <= _CANCELLATION * d * kappa
    if form == "dense" or (form == "auto" and not fits):
        mean, covariance = class_statistics(rows, jitter)
        return given_cluster(mean, covariance, shrinkage=shrinkage, correlation=correlation)
    if not kappa > 0:
        raise ValueError(_SINGULAR)
    scaled = factor / kappa**0.5
    gram = scaled @ scaled.T
    gram.diagonal().add_(1.0)
    scales = (scaled.square().sum(0) + 1.0).sqrt() if correlation else torch.full_like(mean, kappa**-0.5)
    own = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), scaled * scales, upper=False)
    return Cluster(mean, scales, own, True)


@dataclass(frozen=True)
class ClusterStack:
    """K clusters, with R rows in all, in one piece. Made by ``stack_clusters``."""

    means: Tensor  # (K, d)
    scales: Tensor  # (K, d), 0 for dense clusters
    rows: Tensor  # (R, d)
    centre: Tensor  # (d,), taken off queries and means before the product: smaller numbers, smaller errors
    offsets: Tensor  # (R, 1), rows times (mean - centre)
    signs: Tensor  # (K, 1), -1 for low-rank clusters
    ranks: Tensor  # (K,) int64
    low_rank: list[bool]  # of the K clusters
    starts: list[int]  # first row of each cluster, and R
    highest: int  # largest of ranks


def stack_clusters(means: Tensor, scales: Tensor, rows: Tensor, ranks: list[int], low_rank: list[bool]) -> ClusterStack:
    """Precompute what queries need: ``means``, ``scales`` (K, d), ``rows`` (R, d), of which cluster k has ranks[k]."""
    centre = means.mean(0)
    parts = zip(rows.split(ranks), means - centre, strict=True)
    return ClusterStack(
        means=means,
        scales=scales,
        rows=rows,
        centre=centre,
        offsets=torch.cat([part @ mean for part, mean in parts])[:, None],
        signs=means.new_tensor([-1.0 if low else 1.0 for low in low_rank])[:, None],
        ranks=torch.tensor(ranks, device=means.device),
        low_rank=low_rank,
        starts=[0, *accumulate(ranks)],
        highest=max(ranks),
    )


def cluster_distances(stack: ClusterStack, features: Tensor) -> Tensor:
    """(K, n) squared distances of ``features`` (n, d), n >= 1, of the dtype and on the device of the stack.

    Works through blocks of clusters whose temporary tensors stay below 64 MB (4 MB on the CPU), unless those of a
    single cluster exceed that. Deterministic; nothing waits for the device.
    """
    n, d = features.shape
    budget = _BLOCK_BYTES_CPU if features.device.type == "cpu" else _BLOCK_BYTES
    step = max(1, budget // (n * max(d, stack.highest) * features.element_size()))
    centred, blocks = (features - stack.centre).T, []
    for first in range(0, len(stack.means), step):
        block = slice(first, first + step)
        rows = slice(stack.starts[first], stack.starts[min(first + step, len(stack.means))])
        products = torch.addmm(stack.offsets[rows], stack.rows[rows], centred, beta=-1.0)
        # unsafe: no check of the lengths, for which it would wait
        sums = torch.segment_reduce(products.square_(), "sum", lengths=stack.ranks[block], axis=0, unsafe=True)
        sums *= stack.signs[block]
        if any(stack.low_rank[block]):
            moved = features - stack.means[block, None]
            sums += moved.mul_(stack.scales[block, None]).square_().sum(2)
        blocks.append(sums)
    return torch.cat(blocks).clamp_(min=0.0)  # rounding can leave the difference just below


__all__ = [
    "Cluster",
    "ClusterStack",
    "cluster_distances",
    "correlation_matrix",
    "fit_cluster",
    "given_cluster",
    "mahalanobis_distance",
    "normalize_rows",
    "shrink_covariance",
    "stack_clusters",
    "vote",
]
