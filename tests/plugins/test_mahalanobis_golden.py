"""Task inference against the numbers of the official code (tests/golden/lorac_ipc/README.md)."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from avalanche_firn.plugins.class_statistics import class_statistics
from avalanche_firn.plugins.mahalanobis import (
    MahalanobisTaskInference,
    correlation_matrix,
    mahalanobis_distance,
    shrink_covariance,
    vote,
)

sys.path.append(str(Path(__file__).parent))
from mahalanobis_cases import FORMS, relative, to_largest


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_golden_distances(golden, dtype, tolerance):
    file = golden("lorac_ipc", "mahalanobis")
    cov, mean, query = (torch.from_numpy(file[name]).to(dtype) for name in ("cov", "mean", "query"))
    shrunk = shrink_covariance(cov)
    correlation = correlation_matrix(shrunk)
    to_largest(shrunk, file["shrunk"], tolerance)
    to_largest(correlation, file["correlation"], tolerance)
    distance = mahalanobis_distance(query, mean, correlation)
    assert distance.dtype == dtype and distance.shape == (20, 4, 3)
    to_largest(distance, file["distance_per_cluster"], tolerance)
    store = MahalanobisTaskInference(normalize=False)
    for class_id in range(4):
        given_shrunk = class_id % 2 == 0
        store.add_moments(class_id, mean[class_id], (shrunk if given_shrunk else cov)[class_id], 0, shrunk=given_shrunk)
    assert store.distances(query).dtype == dtype
    to_largest(store.distances(query), file["distance_min"], tolerance)
    assert store.nearest_class(query).tolist() == file["argmin"].tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clusters", [2, 4])
def test_golden_statistics(golden, form, clusters):
    file = golden("lorac_ipc", "task_statistics")
    first, store = torch.from_numpy(file["P"][0]), MahalanobisTaskInference(clusters, form=form)
    ids = file["class_ids"].tolist()
    query = torch.cat([torch.from_numpy(file[f"inputs_c{c}"]) for c in ids]) @ first
    for column, class_id in enumerate(ids):
        features = torch.from_numpy(file[f"inputs_c{class_id}"]) @ first
        labels, mean, cov, shrunk = (
            torch.from_numpy(file[f"tii_k{clusters}_{name}_c{class_id}"])
            for name in ("labels", "mean", "cov", "shrunk")
        )
        store.add(class_id, features, class_id, labels=labels)
        state, own = store.state_dict(), slice(column * clusters, (column + 1) * clusters)
        to_largest(state["means"][own], mean.double(), 2e-7)
        to_largest(shrink_covariance(cov), shrunk, 1e-12)
        normalized = F.normalize(features, dim=1)
        for k in range(clusters):
            to_largest(class_statistics(normalized[labels == k])[1], cov[k], 2e-7)
        rows, rank = state["rows"], sum(sum(ranks) for ranks in state["ranks"][:column])
        for k, size in enumerate(state["ranks"][column]):
            part = rows[rank : rank + size]
            rank += size
            inverse = part.T @ part
            if form == "low_rank":
                inverse = torch.diag(state["scales"][own][k] ** 2) - inverse
            to_largest(torch.linalg.inv(inverse), correlation_matrix(shrunk[k]), 2e-7)
        expected = mahalanobis_distance(F.normalize(query, dim=1), mean.double(), correlation_matrix(shrunk))
        to_largest(store.distances(query)[:, column], expected.amin(1), 5e-7)


def evaluate(file, order, mode, experience):
    """Task routed to before and after the vote, and whether the prediction is right, for the first test sets."""
    mean, shrunk, inputs, P, H, bias = (
        torch.from_numpy(file[n]) for n in ("mean", "shrunk", "inputs", "P", "H", "bias")
    )
    store = MahalanobisTaskInference(2)
    for position in order:
        if file["class_task"][position] <= experience:
            class_id, task = int(file["class_ids"][position]), int(file["class_task"][position])
            store.add_moments(class_id, mean[position], shrunk[position], task, shrunk=True)
    sets = inputs.split(file["test_sizes"].tolist())[: experience + 1]
    routed = [store.infer(rows @ P[0]) for rows in sets]
    voted = routed
    if mode == "batch":
        voted = [torch.cat([vote(batch) for batch in tasks.split(int(file["batch_size"]))]) for tasks in routed]
    targets = torch.from_numpy(file["targets"]).split(file["test_sizes"].tolist())
    right = []
    for rows, tasks, target in zip(sets, voted, targets, strict=False):
        logits = torch.stack([x @ H[k] + bias for x, k in zip(rows, tasks.tolist(), strict=True)])
        right.append(logits.argmax(1) == target)
    return routed, voted, right


@pytest.mark.parametrize("mode", ["instance", "batch"])
@pytest.mark.parametrize("order", [range(6), (4, 1, 5, 0, 3, 2)])
def test_golden_evaluation(golden, mode, order):
    file = golden("lorac_ipc", "tii_evaluate")
    accuracy = torch.zeros(3, 3, dtype=torch.float64)
    for t in range(3):
        routed, voted, right = evaluate(file, order, mode, t)
        assert torch.cat(voted).tolist() == file[f"{mode}_t{t}_routed_task"].tolist()
        counts = torch.tensor([[int((tasks == a).sum()) for tasks in routed] for a in range(t + 1)])
        correct = torch.tensor(
            [[int((ok & (tasks == a)).sum()) for tasks, ok in zip(routed, right, strict=True)] for a in range(t + 1)]
        )
        assert counts.tolist() == file[f"{mode}_t{t}_routed_count"].tolist()
        assert correct.tolist() == file[f"{mode}_t{t}_correct_count"].tolist()
        for i in range(t + 1):
            accuracy[i, t] = 100 * right[i].double().mean()
        now, inferred = accuracy[: t + 1, t], [100 * float((r == i).double().mean()) for i, r in enumerate(routed)]
        best = accuracy[:t, :t].amax(1) if t else accuracy[:0, 0]
        backward = now[:t] - accuracy.diagonal()[:t]
        expected = [now.mean(), (best - now[:t]).sum() / max(t, 1), backward.sum() / max(t, 1), sum(inferred) / (t + 1)]
        torch.testing.assert_close(
            torch.tensor([float(x) for x in expected], dtype=torch.float64),
            torch.from_numpy(file[f"{mode}_t{t}_metrics"]), rtol=0, atol=1e-4,
        )  # fmt: skip
    torch.testing.assert_close(accuracy, torch.from_numpy(file[f"{mode}_acc_matrix"]), rtol=0, atol=1e-4)


def test_golden_evaluation_distances(golden):
    file = golden("lorac_ipc", "tii_evaluate")
    store = MahalanobisTaskInference()
    for class_id in range(6):
        mean, shrunk = (torch.from_numpy(file[name][class_id]) for name in ("mean", "shrunk"))
        store.add_moments(class_id, mean, shrunk, int(file["class_task"][class_id]), shrunk=True)
    query = torch.from_numpy(file["inputs"] @ file["P"][0])
    relative(store.distances(query), file["distance_min"], 1e-11)
