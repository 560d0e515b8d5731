"""Task inference by Mahalanobis distance to class clusters (LoRAC-IPC, arXiv 2504.13407, from the public code).

Every class keeps a few clusters ``(mu, R)`` of its features: ``R`` is the correlation matrix of the shrunk covariance.
A row ``f`` belongs to the class with the smallest ``(f - mu)' R^-1 (f - mu)`` over all clusters, and to its task.

Differences from the public code: one factor per cluster, made in float64 when the class arrives, instead of a
pseudo-inverse per cluster and batch; class ids of any kind in any order; a one-sample cluster has covariance 0 instead
of NaN, and a class with few rows fewer clusters.

Cost: ``n d`` numbers a class in the low-rank form (``d^2`` a cluster in the dense one), as many multiplications for
every query row; putting the statistics together after a new class needs them twice for a moment. The float32 error of
a distance is about 1e-6 relative for new rows. For rows out of a low-rank cluster of a few samples it reached 7e-5: the
difference of two sums cancels there, up to ``1 + d / shrinkage`` times. TF32 products, if allowed, cost more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.plugins.clustering import cluster_labels
from avalanche_firn.plugins.feature_checks import check_features, to_float64
from avalanche_firn.plugins.mahalanobis_math import (
    Cluster,
    ClusterStack,
    cluster_distances,
    correlation_matrix,
    fit_cluster,
    given_cluster,
    mahalanobis_distance,
    normalize_rows,
    shrink_covariance,
    stack_clusters,
    vote,
)
from avalanche_firn.plugins.random_state import derived_seed

_QUERY_ROWS = 1024  # rows of a query looked at together
_TENSORS = ("means", "scales", "rows")


class _Class(NamedTuple):
    """The k clusters of one class; a dense one has ``d`` rows, a low-rank one a row per sample."""

    task: int
    means: Tensor  # (k, d)
    scales: Tensor  # (k, d)
    rows: Tensor  # (sum of ranks, d)
    ranks: list[int]
    low_rank: list[bool]


class MahalanobisTaskInference:
    """A growing set of class clusters that tells which task a feature row comes from.

    Features of any floating dtype; the statistics are made in float64 and stored in float32, or in float64 if the first
    features are. Queries are normalised here, like the features. A query that isn't finite gets an arbitrary answer:
    finding out would wait for the device.

    Args:
        clusters: KMeans clusters a class (4: public code; 2 there for ImageNet-R).
        jitter: added to every variance (1e-4: public code).
        normalize: divide every row by its Euclidean norm (True: public code). A zero row stays zero.
        correlation: distances use the correlation matrix (True: public code), else the covariance.
        shrinkage: multiple of the mean variance added to every variance (1.0: public code).
        form: ``"dense"``, ``"low_rank"`` or ``"auto"``: low-rank for clusters of ``n`` samples with ``n - 1 < d / 2``,
            unless ``shrinkage`` and ``jitter`` are next to nothing. Same distances (``mahalanobis_math``).
        seed: of KMeans, together with the class id: the clusters don't depend on the order of the classes.

    Raises:
        ValueError: a setting out of range, unknown form.
    """

    def __init__(
        self,
        clusters: int = 4,
        *,
        jitter: float = 1e-4,
        normalize: bool = True,
        correlation: bool = True,
        shrinkage: float = 1.0,
        form: str = "auto",
        seed: int = 0,
    ) -> None:
        if form not in ("auto", "dense", "low_rank"):
            raise ValueError(f"form: {form!r} is not accepted, use 'auto', 'dense' or 'low_rank'")
        self.clusters, self.seed = operator.index(clusters), operator.index(seed)
        for name, value, least in (("clusters", self.clusters, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        for name, number in (("jitter", jitter), ("shrinkage", shrinkage)):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{name}: must be a finite number >= 0, got {number}")
        self.jitter, self.shrinkage, self.form = float(jitter), float(shrinkage), form
        self.normalize, self.correlation = bool(normalize), bool(correlation)
        self._device: torch.device | None = None
        self._classes: dict[int, _Class] = {}  # views of the tensors of the stack, where there is one
        # Stack of all clusters; (C,) int64 each: clusters per class, class ids, tasks. None: to be made.
        self._cache: tuple[ClusterStack, Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, class_id: object) -> bool:
        return class_id in self._classes

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Class ids in the order in which they were added: the columns of ``distances``."""
        return tuple(self._classes)

    @property
    def tasks(self) -> tuple[int, ...]:
        """Owning task of each of ``class_ids``."""
        return tuple(stored.task for stored in self._classes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored statistics."""
        tensors = (getattr(stored, name) for stored in self._classes.values() for name in _TENSORS)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def add(
        self, class_id: int, features: Tensor, task: int, *, labels: Tensor | None = None, replace: bool = False
    ) -> None:
        """Store the clusters of ``features`` under ``class_id``, owned by ``task``.

        Args:
            class_id, task: any integers.
            features: (n, d), floating point, finite, n >= 1. The first ones fix d, dtype and device of the storage.
            labels: (n,) integer, the cluster of every row. Default: KMeans; fewer clusters for fewer distinct rows.
            replace: overwrite a known class, which keeps its column.

        Raises:
            TypeError: ``features`` isn't a floating-point tensor.
            ValueError: the id is known and ``replace`` is False; ``features`` isn't 2-d, is empty, not finite or of
                another feature size; unfit ``labels``; the matrix of a cluster isn't positive definite.
        """
        class_id, task = self._new_id(class_id, replace), operator.index(task)
        check_features(features, f"features of class {class_id}", "n, d")
        rows = to_float64(features)
        rows = normalize_rows(rows) if self.normalize else rows
        if labels is None:
            labels = cluster_labels(rows, self.clusters, seed=derived_seed(self.seed, class_id % 2**64) % 2**32)
        elif labels.shape != rows.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            got = f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"labels of class {class_id}: expected ({len(rows)},) integers, got {got}")
        labels = labels.to(rows.device)
        kwargs: dict[str, Any] = {"correlation": self.correlation, "shrinkage": self.shrinkage}
        groups = (rows[labels == label] for label in labels.unique().tolist())
        self._store(class_id, task, features, (fit_cluster(g, self.jitter, self.form, **kwargs) for g in groups))

    @torch.no_grad()
    def add_moments(
        self,
        class_id: int,
        means: Tensor,
        covariances: Tensor,
        task: int,
        *,
        shrunk: bool = False,
        replace: bool = False,
    ) -> None:
        """Store given clusters, in the dense form: ``means`` (k, d) and ``covariances`` (k, d, d), k >= 1.

        The covariances are complete: nothing is normalised, no jitter added, and they are shrunk unless ``shrunk``.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: the id is known and ``replace`` is False; wrong shapes or feature size; not finite; a covariance
                not symmetric or not positive definite.
        """
        class_id, task = self._new_id(class_id, replace), operator.index(task)
        check_features(means, f"means of class {class_id}", "k, d")
        check_features(covariances, f"covariances of class {class_id}", "k, d, d")
        if covariances.shape != (*means.shape, means.shape[1]):
            got = f"{tuple(covariances.shape)} for means {tuple(means.shape)}"
            raise ValueError(f"covariances of class {class_id}: got {got}")
        matrices = to_float64(covariances)
        if not torch.allclose(matrices, matrices.mT, rtol=1e-4, atol=1e-6 * float(matrices.abs().max())):
            raise ValueError(f"covariances of class {class_id}: not symmetric")
        kwargs: dict[str, Any] = {"correlation": self.correlation, "shrinkage": 0.0 if shrunk else self.shrinkage}
        pairs = zip(to_float64(means), (matrices + matrices.mT) / 2, strict=True)
        self._store(class_id, task, means, (given_cluster(*pair, **kwargs) for pair in pairs))

    @torch.no_grad()
    def distances(self, features: Tensor) -> Tensor:
        """Squared distance of every row to every class: the minimum over its clusters.

        Args:
            features: (n, d), any floating dtype, on the device of the statistics.

        Returns:
            (n, C) in the storage dtype, columns in the order of ``class_ids``. After an ``add``, ``load_state_dict`` or
            ``to`` the first call puts the statistics together; apart from that nothing waits for the device.

        Raises:
            RuntimeError: no class is known.
            TypeError, ValueError: ``features`` isn't floating point, or not of shape (n, d).
        """
        stack, counts, _, _ = self._stacked()
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating-point tensor, got {features.dtype}")
        if features.ndim != 2 or features.shape[1] != stack.means.shape[1]:
            raise ValueError(f"features: expected (n, {stack.means.shape[1]}), got {tuple(features.shape)}")
        wide = torch.promote_types(features.dtype, stack.means.dtype)
        blocks = [stack.means.new_empty(0, len(self))]
        with torch.autocast(features.device.type, enabled=False):
            for rows in features.split(_QUERY_ROWS) if len(features) else ():
                rows = normalize_rows(rows.to(wide)) if self.normalize else rows
                clusters = cluster_distances(stack, rows.to(stack.means.dtype))
                blocks.append(torch.segment_reduce(clusters, "min", lengths=counts, axis=0, unsafe=True).T)
        return torch.cat(blocks)

    def nearest_class(self, features: Tensor) -> Tensor:
        """Id of the nearest class of every row, (n,) int64; of equal distances the class that arrived first."""
        return self._stacked()[2].index_select(0, self.distances(features).argmin(1))

    def infer(self, features: Tensor) -> Tensor:
        """Task that owns the nearest class of every row, (n,) int64. Arguments and errors as for ``distances``."""
        return self._stacked()[3].index_select(0, self.distances(features).argmin(1))

    def to(self, device: torch.device | str) -> MahalanobisTaskInference:
        """Move all statistics, and those added later, to ``device``; returns self."""
        self._device, self._cache = torch.device(device), None
        for class_id, stored in self._classes.items():
            tensors = {name: getattr(stored, name).to(device) for name in _TENSORS}
            self._classes[class_id] = stored._replace(**tensors)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, bit-exact, as tensors and plain values; the tensors are shared, not copied."""
        classes = list(self._classes.values())
        stack = self._stacked()[0] if classes else None
        return {
            **self._settings(),
            "class_ids": list(self._classes),
            "tasks": [stored.task for stored in classes],
            "ranks": [list(stored.ranks) for stored in classes],
            "low_rank": [list(stored.low_rank) for stored in classes],
            **{name: getattr(stack, name, None) for name in _TENSORS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all statistics by copies of those of ``state``, on the device given to ``to``, else on theirs.

        Raises:
            ValueError: ``state`` was made with another setting, or is inconsistent.
        """
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"{name}: the state was made with {state[name]!r}, here it is {own!r}")
        ids, tasks, ranks, low_rank = (list(state[name]) for name in ("class_ids", "tasks", "ranks", "low_rank"))
        tensors: list[Tensor] = [state[name] for name in _TENSORS] if ids else []
        counts, heights = [len(own) for own in ranks], [sum(own) for own in ranks]
        shapes = [(size, tensors[0].shape[-1]) for size in (sum(counts), sum(counts), sum(heights)) if ids]
        if (
            not len(set(ids)) == len(tasks) == len(ranks) == len(ids)
            or [len(own) for own in low_rank] != counts
            or [tuple(tensor.shape) for tensor in tensors] != shapes
        ):
            raise ValueError("state: inconsistent, its numbers of classes, clusters and rows don't fit each other")
        copies = [tensor.to(self._device or tensor.device, copy=True) for tensor in tensors]
        self._classes, self._cache = _views(ids, tasks, copies, ranks, low_rank), None

    def _settings(self) -> dict[str, Any]:
        names = ("clusters", "jitter", "normalize", "correlation", "shrinkage", "form", "seed")
        return {name: getattr(self, name) for name in names}

    def _new_id(self, class_id: int, replace: bool) -> int:
        class_id = operator.index(class_id)
        if class_id in self._classes and not replace:
            raise ValueError(f"class_id: class {class_id} is known already, pass replace=True to overwrite it")
        return class_id

    def _store(self, class_id: int, task: int, source: Tensor, clusters: Iterator[Cluster]) -> None:
        known = next(iter(self._classes.values()), None)
        if known is not None and source.shape[1] != known.means.shape[1]:
            sizes = f"feature size {source.shape[1]}, the other classes have {known.means.shape[1]}"
            raise ValueError(f"class {class_id}: {sizes}")
        try:
            means, scales, rows, low_rank = zip(*clusters, strict=True)
        except ValueError as error:
            settings = f"jitter {self.jitter:g}, shrinkage {self.shrinkage:g}"
            kind = NonFiniteValues if isinstance(error, NonFiniteValues) else ValueError
            raise kind(f"class {class_id}: {error} ({settings})") from error
        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=dtype, device=self._device or source.device) if known is None else known.means
        tensors = [tensor.to(like) for tensor in (torch.stack(means), torch.stack(scales), torch.cat(rows))]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise NonFiniteValues(f"class {class_id}: the statistics overflow {like.dtype}")
        ranks = [len(own) for own in rows]
        self._classes[class_id] = _Class(task, tensors[0], tensors[1], tensors[2], ranks, list(low_rank))
        self._cache = None

    def _stacked(self) -> tuple[ClusterStack, Tensor, Tensor, Tensor]:
        if not self._classes:
            raise RuntimeError("MahalanobisTaskInference: no class is known yet, add some first")
        if self._cache is None:
            ids = list(self._classes)
            tasks, means, scales, rows, ranks, low_rank = map(list, zip(*self._classes.values(), strict=True))
            tensors = [torch.cat(parts) for parts in (means, scales, rows)]
            with torch.autocast(tensors[0].device.type, enabled=False):
                every = (list(chain(*ranks)), list(chain(*low_rank)))
                stack = stack_clusters(tensors[0], tensors[1], tensors[2], *every)
            numbers = torch.tensor([[len(own) for own in ranks], ids, tasks], device=stack.means.device)
            self._classes = _views(ids, tasks, tensors, ranks, low_rank)  # one copy of the numbers is enough
            self._cache = (stack, *numbers)
        return self._cache


def _views(
    ids: list[int], tasks: list[int], tensors: list[Tensor], ranks: list[list[int]], low_rank: list[list[bool]]
) -> dict[int, _Class]:
    """The classes whose clusters lie one after the other in ``tensors``: means, scales and rows (none for no class)."""
    if not ids:
        return {}
    counts = [len(own) for own in ranks]
    sizes = (counts, counts, [sum(own) for own in ranks])
    parts = (tensor.split(size) for tensor, size in zip(tensors, sizes, strict=True))
    fields = zip(tasks, *parts, map(list, ranks), map(list, low_rank), strict=True)
    return dict(zip(ids, (_Class(*values) for values in fields), strict=True))


__all__ = [
    "MahalanobisTaskInference",
    "correlation_matrix",
    "mahalanobis_distance",
    "shrink_covariance",
    "vote",
]
