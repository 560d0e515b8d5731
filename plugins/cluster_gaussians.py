"""Several diagonal Gaussians per class, one per cluster of its features: statistics of TAP, LoRAC-IPC's head alignment.

TAP comes from HiDe-Prompt and is part of the released code of LoRAC-IPC (arXiv 2504.13407). Each cluster weighs the
same in sampling, whatever its size. A cluster without any variance is skipped, as there; unlike there it stays if the
class has no other one, so that a class with a single sample takes part in alignment instead of vanishing from it.

Draws are restricted to the rows that alignment uses: at the last of 10 tasks of 10 classes the released code makes
eleven times as many. Storage: ``2 k d`` numbers a class (10 clusters x 768: 61 kB). Adding a class costs one KMeans on
the CPU; an epoch of draws costs a permutation of all indices, and one normal and one gathered mean and deviation per
number.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.plugins.alignment_math import Batches
from avalanche_firn.plugins.clustering import cluster_labels
from avalanche_firn.plugins.feature_checks import check_features, check_jitter, fill_normal, to_float64
from avalanche_firn.plugins.random_state import derived_seed


class ClusterGaussians:
    """A growing set of classes, each with the mean and the variances of every cluster of its features.

    Arithmetic is float64; stored is float64 if the first features are, else float32. Clusters whose stored variances
    are all 0 are left out (released code), except the first one of a class that has no others (the released code leaves
    such a class out of alignment).

    Args:
        clusters: KMeans clusters per class (10: training_scripts/*.sh of the released code); fewer where a class has
            fewer distinct rows.
        jitter: added to every variance in ``cluster_batches``, not to what is stored (1e-4: released code).
        seed: of KMeans, together with the class id.

    Raises:
        ValueError: fewer than one cluster, negative or non-finite jitter, negative seed.
    """

    def __init__(self, clusters: int = 10, *, jitter: float = 1e-4, seed: int = 0) -> None:
        for name, value, least in (("clusters", clusters, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; {least} and above is accepted")
        check_jitter(jitter)
        self.clusters, self.jitter, self.seed = int(clusters), float(jitter), int(seed)
        self._device: torch.device | None = None
        # Class id -> (k, 2, d): mean and variances of each cluster. Never written to once it is here.
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, class_id: object) -> bool:
        return class_id in self._rows

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Class ids in the order in which they were added."""
        return tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored statistics."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def add(self, class_id: int, features: Tensor, *, labels: Tensor | None = None, replace: bool = False) -> None:
        """Cluster ``features`` and store the statistics of each cluster (variances with divisor n) under ``class_id``.

        Args:
            class_id: 0 and above.
            features: (n, d) as the backbone gives them, any floating dtype, n >= 1.
            labels: (n,) integer, the cluster of each row, any numbers. Default: KMeans.
            replace: overwrite a known class.

        Raises:
            TypeError: ``features`` isn't a floating-point or ``labels`` not an integer tensor.
            ValueError: negative id, or it is known and ``replace`` is False; ``features`` isn't 2-d, is empty, not
                finite or of another feature size; ``labels`` don't fit.
        """
        class_id = self._new_id(class_id, replace)
        check_features(features, f"features of class {class_id}", "n, d")
        rows = to_float64(features)
        if labels is None:
            labels = cluster_labels(features, self.clusters, seed=derived_seed(self.seed, class_id) % 2**32)
        elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels of class {class_id}: expected an integer tensor, got {labels.dtype}")
        elif labels.shape != rows.shape[:1]:
            raise ValueError(f"labels of class {class_id}: expected shape ({len(rows)},), got {tuple(labels.shape)}")
        index = torch.unique(labels.to(rows.device), return_inverse=True)[1]
        members = F.one_hot(index).T.to(rows)  # (k, n): sums over clusters as products, reproducible on a GPU, too
        counts = members.sum(1, keepdim=True)
        origin = rows[members.argmax(1)]  # one row of each cluster: equal rows then have exactly no variance
        centred = rows - origin[index]
        shift = members @ centred / counts
        variances = members @ (centred - shift[index]).square() / counts
        self._store(class_id, origin + shift, variances, features)

    def add_moments(self, class_id: int, means: Tensor, variances: Tensor, *, replace: bool = False) -> None:
        """Store given ``means`` (k, d) and ``variances`` (k, d) of the clusters of a class, k >= 1.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: negative id, or it is known and ``replace`` is False; wrong or different shapes; not finite; a
                negative variance.
        """
        class_id = self._new_id(class_id, replace)
        for name, values in (("means", means), ("variances", variances)):
            check_features(values, f"{name} of class {class_id}", "n, d")
        if means.shape != variances.shape:
            raise ValueError(
                f"variances of class {class_id}: expected shape {tuple(means.shape)}, got {tuple(variances.shape)}"
            )
        if bool((variances < 0).any()):
            raise ValueError(f"variances of class {class_id}: {float(variances.min()):.3g} is negative")
        self._store(class_id, to_float64(means), to_float64(variances).to(to_float64(means).device), means)

    def moments(self, class_ids: Iterable[int] | Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Clusters of the classes, one class after the other: means (K, d), variances (K, d), clusters of each class.

        Raises:
            KeyError: unknown id. ValueError: no or repeated ids.
        """
        ids = class_ids.tolist() if isinstance(class_ids, Tensor) else [operator.index(c) for c in class_ids]
        unknown = sorted(set(ids) - set(self._rows))
        if unknown:
            raise KeyError(f"class_ids: no statistics for classes {unknown}, known are {sorted(self._rows)}")
        if len(set(ids)) != len(ids) or not ids:
            repeated = sorted({class_id for class_id in ids if ids.count(class_id) > 1})
            raise ValueError(f"class_ids: repeated classes {repeated}" if ids else "class_ids: empty")
        rows = torch.cat([self._rows[class_id] for class_id in ids])
        return rows[:, 0], rows[:, 1], [len(self._rows[class_id]) for class_id in ids]

    def to(self, device: torch.device | str) -> ClusterGaussians:
        """Move all statistics, and those added later, to ``device``; returns self."""
        self._device = torch.device(device)
        self._rows = {class_id: rows.to(device) for class_id, rows in self._rows.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, bit-exact, as tensors and plain values."""
        return {
            **self._settings(),
            "class_ids": list(self._rows),
            "counts": [len(rows) for rows in self._rows.values()],
            "rows": torch.cat(list(self._rows.values())) if self._rows else torch.empty(0, 2, 0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all statistics by copies of those of ``state``, on the device given to ``to``, else on theirs.

        Raises:
            ValueError: ``state`` was made with other clusters, jitter or seed, or is inconsistent.
        """
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"{name}: the state was made with {state[name]!r}, here it is {own!r}")
        ids, counts, rows = state["class_ids"], state["counts"], state["rows"]
        fit = rows.ndim == 3 and rows.shape[1] == 2 and sum(counts) == len(rows) and min(counts, default=1) > 0
        if not fit or not len(ids) == len(set(ids)) == len(counts):
            raise ValueError(f"rows: the statistics of classes {ids} are inconsistent")
        rows = rows.to(self._device or rows.device, copy=True)
        self._rows = dict(zip(ids, rows.split(counts), strict=True)) if ids else {}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("clusters", "jitter", "seed")}

    def _new_id(self, class_id: int, replace: bool) -> int:
        class_id = operator.index(class_id)
        if class_id < 0:
            raise ValueError(f"class_id is {class_id}; 0 and above is accepted")
        if class_id in self._rows and not replace:
            raise ValueError(f"class_id: class {class_id} is known already, pass replace=True to overwrite it")
        return class_id

    def _store(self, class_id: int, means: Tensor, variances: Tensor, source: Tensor) -> None:
        default = torch.float64 if source.dtype == torch.float64 else torch.float32
        empty = torch.empty(0, 2, means.shape[1], dtype=default, device=self._device or source.device)
        like = next(iter(self._rows.values()), empty)
        if means.shape[1] != like.shape[2]:
            raise ValueError(f"class {class_id}: feature size {means.shape[1]}, the other classes have {like.shape[2]}")
        rows = torch.stack([means, variances], 1).to(device=like.device, dtype=like.dtype)
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteValues(f"class {class_id}: the statistics overflow {like.dtype}")
        varies = (rows[:, 1] != 0).any(1)
        self._rows[class_id] = rows[varies] if bool(varies.any()) else rows[:1].clone()


def cluster_batches(
    clusters: ClusterGaussians,
    class_ids: Iterable[int] | Tensor,
    samples_per_cluster: int,
    num_batches: int,
    *,
    generator: torch.Generator | None,
) -> Batches:
    """The ``batches`` of ``align_classifier`` in TAP: ``num_batches`` batches of ``samples_per_cluster`` rows an epoch.

    The law is that of the released code: ``samples_per_cluster`` rows of each of K clusters from
    ``N(mean, diag(variances) + jitter I)``, mixed, of which the first ``num_batches`` batches are used. Rows that
    aren't used aren't drawn. Draw order per epoch: ``randperm(K samples_per_cluster)``; then, when its turn comes, one
    block of normals (samples_per_cluster, d) a batch, in float32 whatever the storage dtype. No host synchronisation
    with a generator on the device of the statistics. The features of a batch are overwritten by the next one.

    Args:
        clusters: statistics of all the classes; later additions don't matter.
        class_ids: (C,) ids in column order; targets are positions in it.
        samples_per_cluster: rows a cluster and epoch, and rows a batch.
        num_batches: 1 to K.
        generator: source of all draws; None is PyTorch's global one.

    Raises:
        KeyError: unknown id.
        ValueError: no or repeated ids, ``samples_per_cluster`` below 1, ``num_batches`` out of range.
    """
    size = samples_per_cluster
    if size < 1:
        raise ValueError(f"samples_per_cluster is {size}; 1 and above is accepted")
    means, variances, counts = clusters.moments(class_ids)
    if not 1 <= num_batches <= len(means):
        raise ValueError(f"num_batches is {num_batches}; 1 to {len(means)}, the number of clusters, is accepted")
    moments = torch.stack([means, (variances + clusters.jitter).sqrt_()], 1)  # together: one gather a batch
    columns = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(moments.device)
    device = moments.device if generator is None else generator.device
    gathered, batch = moments.new_empty(size, *moments.shape[1:]), moments.new_empty(size, moments.shape[2])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(moments) * size, generator=generator, device=device)[: num_batches * size]
        for cluster in (order // size).to(moments.device).split(size):
            fill_normal(batch, generator)
            torch.index_select(moments, 0, cluster, out=gathered)
            torch.addcmul(gathered[:, 0], gathered[:, 1], batch, out=batch)
            yield batch, columns[cluster]

    return batches


__all__ = ["ClusterGaussians", "cluster_batches"]
