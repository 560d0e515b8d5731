"""Features, stores and comparisons shared by the tests of the task inference."""

import torch
import torch.nn.functional as F

from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference

FORMS = ("dense", "low_rank")


def rows_of(class_id, n, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(class_id % 2**32)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    shift = 2 * torch.randn(d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift).to(dtype)


def filled(ids=(7, -3, 0, 12), n=20, d=6, dtype=torch.float64, **options):
    store = MahalanobisTaskInference(**options)
    for position, class_id in enumerate(ids):
        store.add(class_id, rows_of(class_id, n, d, dtype), position // 2)
    return store


def queries(ids=(7, -3, 0, 12), n=16, d=6, dtype=torch.float64):
    return torch.cat([rows_of(class_id, 20 + n, d)[20:] for class_id in ids]).to(dtype)


def by_loop(query, rows, labels, jitter=1e-4, normalize=True, correlation=True, shrinkage=1.0):
    """Distances (n,) to one class, one number at a time."""
    if normalize:
        query, rows = (F.normalize(x.double(), dim=1, eps=0) if len(x) else x for x in (query, rows))
    result = []
    for f in query:
        candidates = []
        for label in labels.unique():
            members = rows[labels == label]
            n, d = members.shape
            eye = torch.eye(d, dtype=torch.float64)
            mean = sum(members) / n
            covariance = sum(torch.outer(x - mean, x - mean) for x in members) / max(n - 1, 1) + jitter * eye
            covariance = covariance + shrinkage * sum(covariance[i, i] for i in range(d)) / d * eye
            if correlation:
                covariance = torch.stack(
                    [
                        torch.stack([row[b] / (covariance[a, a] * covariance[b, b]).sqrt() for b in range(d)])
                        for a, row in enumerate(covariance)
                    ]
                )
            candidates.append((f - mean) @ torch.linalg.inv(covariance) @ (f - mean))
        result.append(min(candidates))
    return torch.stack(result)


def relative(actual, expected, tolerance):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=1e-300)


def to_largest(actual, expected, tolerance):
    expected = torch.as_tensor(expected).to(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
