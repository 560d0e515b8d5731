"""Clusters of a class's features: LoRAC-IPC's statistics keep several Gaussians per class (arXiv 2504.13407, code).

scikit-learn's KMeans on the CPU, seeded by the caller; what the reference leaves to errors is decided here.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues


def cluster_labels(features: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster of each row of the features of one class.

    :param features: ``(n, d)``, floating point, finite, n >= 1; any device.
    :param clusters: wanted number; with fewer (distinct) rows there are fewer clusters.
    :param seed: of KMeans' starting points (10 of them: scikit-learn's former default), 0 to 2**32 - 1.
    :returns: ``(n,)`` int64 on the CPU, 0 to k - 1; every cluster has a row.
    :raises ValueError: not 2-d, empty or not finite features, fewer than one cluster.
    """
    if clusters < 1:
        raise ValueError(f"clusters is {clusters}; 1 and above is accepted")
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features: expected (n, d) with n >= 1, got {tuple(features.shape)}")
    rows = features.detach().double().cpu().numpy()
    if not torch.isfinite(features).all():
        raise NonFiniteValues("features: not finite (NaN or infinity among the values)")
    if min(clusters, len(rows)) == 1:
        return torch.zeros(len(rows), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows: fewer clusters come out, which is accepted
        found = KMeans(min(clusters, len(rows)), n_init=10, random_state=seed).fit_predict(rows)
    return torch.unique(torch.from_numpy(found).long(), return_inverse=True)[1]


__all__ = ["cluster_labels"]
