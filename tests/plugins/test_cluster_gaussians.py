"""Cluster Gaussians and TAP against nested loops and the official code's numbers (tests/golden/lorac_ipc/README.md)."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.plugins.alignment_math import align_classifier
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians, cluster_batches
from avalanche_firn.plugins.clustering import cluster_labels
from avalanche_firn.plugins.random_state import derived_seed


def features(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def relative(actual, expected, tolerance):
    """Within ``tolerance`` times the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    close(actual.double(), expected, tolerance * float(expected.abs().max()))


def by_loop(rows, labels):
    """Means and variances (divisor n) of the clusters, entry by entry."""
    means, variances = [], []
    for cluster in sorted(set(labels)):
        own = [row for row, label in zip(rows, labels, strict=True) if label == cluster]
        mean = [sum(row[j] for row in own) / len(own) for j in range(len(rows[0]))]
        means.append(mean)
        variances.append([sum((row[j] - mean[j]) ** 2 for row in own) / len(own) for j in range(len(mean))])
    return means, variances


# ----------------------------------------------------------------- statistics
def test_golden_statistics(golden):
    file = golden("lorac_ipc", "task_statistics")
    clusters = ClusterGaussians(int(file["n_centroids"]))
    for class_id in file["class_ids"].tolist():
        rows = torch.from_numpy(file[f"inputs_c{class_id}"] @ file["P"][1])
        clusters.add(class_id, rows, labels=torch.from_numpy(file[f"tap_labels_c{class_id}"]))
        means, variances, counts = clusters.moments([class_id])
        assert counts == [5] and means.dtype == torch.float64
        relative(means, file[f"tap_mean_c{class_id}"], 2e-7)
        relative(variances, file[f"tap_var_c{class_id}"], 2e-7)


@given(n=st.integers(1, 12), d=st.integers(1, 5), k=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_equals_the_loop_whatever_the_labels_are(n, d, k, seed):
    rows, labels = features(n, d, seed), torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    clusters = ClusterGaussians()
    clusters.add(3, rows, labels=7 * labels - 5)
    means, variances, counts = clusters.moments([3])
    expected = [torch.tensor(m, dtype=torch.float64) for m in by_loop(rows.tolist(), labels.tolist())]
    used = (torch.bincount(labels) > 1)[labels.unique()]  # a cluster of one row has no variance
    if not used.any():
        used[0] = True
    close(means, expected[0][used], 1e-12)
    close(variances, expected[1][used], 1e-12)
    assert counts == [int(used.sum())]


def test_kmeans_labels_are_those_of_the_class_seed():
    rows = features(30, 4, dtype=torch.float32)
    clusters, expected = ClusterGaussians(3, seed=5), ClusterGaussians(3, seed=5)
    state = torch.get_rng_state()
    clusters.add(11, rows)
    assert torch.equal(state, torch.get_rng_state())
    expected.add(11, rows, labels=cluster_labels(rows, 3, seed=derived_seed(5, 11) % 2**32))
    for own, other in zip(clusters.moments([11])[:2], expected.moments([11])[:2], strict=True):
        assert torch.equal(own, other) and own.dtype == torch.float32
    assert clusters.nbytes == 2 * clusters.moments([11])[2][0] * 4 * 4


def test_separated_clusters_are_found_and_a_large_offset_costs_nothing():
    rows = torch.cat([features(20, 3, k) + 100 * k for k in range(4)]) + 1e4
    clusters = ClusterGaussians(4)
    clusters.add(0, rows.float())
    means, variances, _ = clusters.moments([0])
    order = means[:, 0].argsort()
    expected = by_loop(rows.float().tolist(), [k for k in range(4) for _ in range(20)])
    relative(means[order], expected[0], 1e-7)
    relative(variances[order], expected[1], 1e-7)


def test_half_precision_features_are_stored_in_float32():
    clusters = ClusterGaussians(2)
    clusters.add(0, features(9, 4, dtype=torch.bfloat16))
    assert clusters.moments([0])[0].dtype == torch.float32


def test_clusters_without_variance_are_skipped():
    """0.1 is not exact in binary: three times 0.1 divided by 3 isn't 0.1, yet equal rows must have no variance."""
    same, spread = torch.full((3, 4), 0.1, dtype=torch.float64), features(5, 4)
    clusters = ClusterGaussians()
    labels = torch.tensor([0] * 3 + [1] * 5 + [2])
    clusters.add(1, torch.cat([same, spread, features(1, 4, 1)]), labels=labels)
    means, _, counts = clusters.moments([1])
    assert counts == [1]
    close(means[0], spread.mean(0), 1e-12)
    clusters.add_moments(2, torch.eye(4).double(), torch.eye(4).double() * torch.tensor([0, 1, 0, 2]).double())
    means, variances, counts = clusters.moments([2])
    assert counts == [2] and torch.equal(means, torch.eye(4).double()[[1, 3]]) and bool((variances.sum(1) > 0).all())


@pytest.mark.parametrize("rows", [torch.ones(1, 4), 0.1 * torch.ones(6, 4), torch.eye(4)])
def test_a_class_without_any_variance_keeps_one_cluster_with_variance_zero(rows):
    """One sample, equal samples, and as many clusters as samples; the released code loses such a class."""
    clusters = ClusterGaussians(4)
    clusters.add(1, rows)
    clusters.add(0, features(20, 4, dtype=torch.float32))
    means, variances, counts = clusters.moments([1])
    assert counts == [1] and bool((variances == 0).all())
    assert any(torch.equal(means[0], row) for row in rows)
    batches = cluster_batches(clusters, [0, 1], 400, 2, generator=torch.Generator().manual_seed(0))
    drawn = [(f.clone(), t) for epoch in range(4) for f, t in batches(epoch)]
    own = torch.cat([f[t == 1] for f, t in drawn])
    assert len(own) > 200 and bool(torch.isfinite(own).all())
    close((own - means[0]).std(0), torch.full((4,), 0.01), 0.002)


# ------------------------------------------------------------------- sampling
def golden_store(file):
    clusters = ClusterGaussians()
    for class_id, mean, var in zip(file["class_ids"].tolist(), file["cluster_mean"], file["cluster_var"], strict=True):
        clusters.add_moments(class_id, torch.from_numpy(mean), torch.from_numpy(var))
    return clusters


def golden_run(file, batches, monkeypatch):
    losses, module = [], sys.modules[align_classifier.__module__]
    step = module._loss_and_gradient

    def recorded(*arguments):
        result = step(*arguments)
        losses.append(float(result[0]))
        return result

    monkeypatch.setattr(module, "_loss_and_gradient", recorded)
    settings = {name: float(file[name]) for name in ("lr", "momentum", "weight_decay")}
    settings |= {"epochs": int(file["epochs"]), "temperature": None}
    weight, bias = torch.from_numpy(file["weight_before"]), torch.from_numpy(file["bias_before"])
    aligned = align_classifier(weight, bias, batches, file["class_task"].tolist(), **settings)
    relative(aligned[0], file["weight_after"], 2e-6)
    relative(aligned[1], file["bias_after"], 2e-6)
    relative(torch.tensor(losses, dtype=torch.float64), file["losses"], 2e-6)


def used_batches(file):
    return int((file["class_task"] < file["class_task"].max()).sum())


def test_golden_tap_with_given_batches(golden, monkeypatch):
    file = golden("lorac_ipc", "tap")
    n, used = int(file["samples_per_cluster"]), used_batches(file)
    mean, var = (torch.from_numpy(file[f"cluster_{k}"]).flatten(0, 1) for k in ("mean", "var"))
    assert file["cluster_class"].tolist() == [c for c in range(6) for _ in range(2)] and len(file["losses"]) == 3 * used

    def batches(epoch):
        noise = torch.from_numpy(file["noise"][epoch])
        rows = (mean[:, None] + (var + 1e-4).sqrt()[:, None] * noise).flatten(0, 1)
        order = torch.from_numpy(file["permutations"][epoch])[: n * used]
        targets = torch.from_numpy(file["cluster_class"]).repeat_interleave(n)
        return zip(rows[order].split(n), targets[order].split(n), strict=True)

    golden_run(file, batches, monkeypatch)


def test_golden_tap_with_injected_draws(golden, monkeypatch):
    """The same with ``cluster_batches`` itself, fed the stored permutations and the noise of the rows it draws."""
    file = golden("lorac_ipc", "tap")
    n, used = int(file["samples_per_cluster"]), used_batches(file)
    orders = torch.from_numpy(file["permutations"])
    noise = iter(
        block
        for eps, order in zip(torch.from_numpy(file["noise"]).flatten(1, 2), orders, strict=True)
        for block in eps[order[: n * used]].split(n)
    )
    queue = iter(orders)
    monkeypatch.setattr(torch, "randperm", lambda count, **kwargs: next(queue))
    module = sys.modules[ClusterGaussians.__module__]
    monkeypatch.setattr(module, "fill_normal", lambda out, generator: out.copy_(next(noise)))
    batches = cluster_batches(golden_store(file), file["class_ids"].tolist(), n, used, generator=None)
    golden_run(file, batches, monkeypatch)
    assert next(noise, None) is None and next(queue, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_epoch_is_the_start_of_a_shuffled_whole_one(dtype):
    """Index by index with a loop, for classes with different numbers of clusters in an order of their own."""
    clusters, ids, n = ClusterGaussians(jitter=0.01), [6, 9, 4], 5
    for class_id, k in zip((9, 4, 6), (1, 3, 2), strict=True):
        clusters.add_moments(class_id, features(k, 4, class_id, dtype), features(k, 4, k, dtype).square() + 0.1)
    batches = cluster_batches(clusters, torch.tensor(ids), n, 4, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    flat = [(column, k) for column, class_id in enumerate(ids) for k in range(clusters.moments([class_id])[2][0])]
    for epoch in range(2):
        order = torch.randperm(len(flat) * n, generator=generator).tolist()
        drawn = [(f.clone(), t) for f, t in batches(epoch)]
        assert len(drawn) == 4
        for b, (rows, targets) in enumerate(drawn):
            noise = torch.randn(n, 4, generator=generator).to(dtype)
            assert rows.dtype == dtype and rows.shape == (n, 4) and targets.dtype == torch.int64
            for j, index in enumerate(order[b * n : (b + 1) * n]):
                column, k = flat[index // n]
                means, variances, _ = clusters.moments([ids[column]])
                close(rows[j], means[k] + (variances[k] + 0.01).sqrt() * noise[j], 1e-6)
                assert targets[j] == column


def test_moments_of_the_draws_and_equal_weight_of_clusters():
    clusters = ClusterGaussians()
    clusters.add_moments(0, torch.tensor([[-8.0, 0.0], [8.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.04, 4.0]]))
    clusters.add_moments(1, torch.tensor([[0.0, 50.0]]), torch.tensor([[0.25, 0.25]]))
    batches = cluster_batches(clusters, [0, 1], 2000, 3, generator=torch.Generator().manual_seed(0))
    drawn = [(f.clone(), t) for epoch in range(4) for f, t in batches(epoch)]
    rows, targets = torch.cat([f for f, _ in drawn]), torch.cat([t for _, t in drawn])
    assert torch.bincount(targets).tolist() == [16_000, 8_000]  # num_batches = K: every index once an epoch
    for own, mean, var in (
        (rows[(targets == 0) & (rows[:, 0] < 0)], [-8.0, 0.0], [1.0, 1e-4]),
        (rows[(targets == 0) & (rows[:, 0] > 0)], [8.0, 1.0], [0.04, 4.0]),
        (rows[targets == 1], [0.0, 50.0], [0.25, 0.25]),
    ):
        assert len(own) == 8_000
        close(own.mean(0), mean, 0.06)
        torch.testing.assert_close(own.var(0), torch.tensor(var) + 1e-4 * (torch.tensor(var) > 1e-3), rtol=0.06, atol=0)


def test_batches_reuse_one_buffer_and_the_store_may_grow():
    clusters = ClusterGaussians(2)
    clusters.add(0, features(12, 3))
    batches = cluster_batches(clusters, [0], 4, 2, generator=None)
    clusters.add(1, features(12, 3, 1))
    pointers = {f.data_ptr() for epoch in range(2) for f, t in batches(epoch) if not bool(t.any())}
    assert len(pointers) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_the_cpu_with_the_noise_of_a_cpu_generator_and_never_waits():
    cpu, gpu = ClusterGaussians(3), ClusterGaussians(3).to("cuda")
    for class_id in range(4):
        cpu.add(class_id, features(20, 6, class_id))
        gpu.add(class_id, features(20, 6, class_id).cuda())
    drawn = [
        [(f.cpu().clone(), t.cpu()) for f, t in cluster_batches(s, range(4), 8, 3, generator=generator)(0)]
        for s, generator in ((s, torch.Generator().manual_seed(0)) for s in (cpu, gpu))
    ]
    for (rows, targets), (other, columns) in zip(*drawn, strict=True):
        assert torch.equal(targets, columns)
        close(other, rows, 1e-10)
    batches = cluster_batches(gpu, range(4), 8, 3, generator=torch.Generator("cuda").manual_seed(0))
    list(batches(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(batches(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------- state
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip_is_exact(dtype):
    original, copy = ClusterGaussians(3, jitter=0.01, seed=2), ClusterGaussians(3, jitter=0.01, seed=2)
    for class_id, n in ((8, 20), (3, 1), (4, 7)):
        original.add(class_id, features(n, 5, class_id, dtype))
    state = original.state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist())  # nothing but tensors and plain values
    copy.load_state_dict(state)
    state["rows"].zero_()
    for store in (original, copy):
        store.add(20, features(9, 5, 20, dtype))
    assert copy.class_ids == original.class_ids == (8, 3, 4, 20) and len(copy) == 4 and 3 in copy and 5 not in copy
    for own, other in zip(copy.moments([4, 20, 8, 3]), original.moments([4, 20, 8, 3]), strict=True):
        assert own == other if isinstance(own, list) else torch.equal(own, other) and own.dtype == dtype
    assert copy.nbytes == original.nbytes == sum(original.moments(original.class_ids)[2]) * 2 * 5 * dtype.itemsize


def test_state_of_an_empty_store_and_of_other_settings():
    clusters = ClusterGaussians(2)
    clusters.add(0, features(5, 4))
    state = clusters.state_dict()
    clusters.load_state_dict(ClusterGaussians(2).state_dict())
    assert len(clusters) == clusters.nbytes == 0
    for setting, value in (("clusters", 3), ("jitter", 0.5), ("seed", 1)):
        other = ClusterGaussians(**{"clusters": 2, setting: value})
        with pytest.raises(ValueError, match=f"{setting}: the state was made with"):
            other.load_state_dict(state)
    for change in ({"class_ids": [0, 1]}, {"counts": [9]}, {"rows": state["rows"][:, 0]}):
        with pytest.raises(ValueError, match="inconsistent"):
            clusters.load_state_dict(state | change)
    clusters.load_state_dict(state)
    assert 0 in clusters


def test_to_moves_statistics_and_those_added_later():
    clusters = ClusterGaussians(2)
    clusters.add(0, features(5, 4))
    assert clusters.to("meta") is clusters and clusters.moments([0])[0].device.type == "meta"
    target = ClusterGaussians(2).to("cpu")
    target.add(0, features(5, 4))
    assert target.moments([0])[0].device.type == "cpu"


# ---------------------------------------------------------------------- errors
def test_unfit_settings():
    for change, match in (
        ({"clusters": 0}, "clusters is 0"), ({"seed": -1}, "seed is -1"),
        ({"jitter": -1.0}, "jitter"), ({"jitter": float("nan")}, "jitter"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ClusterGaussians(**change)


def test_unfit_features_and_labels_are_named():
    clusters, rows = ClusterGaussians(2), features(5, 4)
    clusters.add(0, rows)
    for error, match, arguments in (
        (TypeError, "features of class 1: expected a floating", {"features": rows.long()}),
        (ValueError, "features of class 1: expected shape", {"features": rows[0]}),
        (ValueError, "features of class 1: expected shape", {"features": rows[:0]}),
        (ValueError, "features of class 1: not finite", {"features": rows / 0}),
        (ValueError, "class 1: feature size 3, the other classes have 4", {"features": rows[:, :3]}),
        (TypeError, "labels of class 1: expected an integer", {"features": rows, "labels": torch.zeros(5)}),
        (ValueError, r"labels of class 1: expected shape \(5,\)", {"features": rows, "labels": torch.arange(4)}),
    ):
        with pytest.raises(error, match=match):
            clusters.add(1, **arguments)
    small = ClusterGaussians()
    small.add(0, rows.float())
    with pytest.raises(ValueError, match=r"class 1: the statistics overflow torch\.float32"):
        small.add(1, 1e300 * rows, labels=torch.zeros(5, dtype=torch.long))
    for class_id, match in ((0, "class 0 is known already"), (-1, "class_id is -1")):
        with pytest.raises(ValueError, match=match):
            clusters.add(class_id, rows)
        with pytest.raises(ValueError, match=match):
            clusters.add_moments(class_id, rows, rows.square())
    clusters.add(0, rows + 1, replace=True)
    clusters.add_moments(0, rows, rows.square(), replace=True)
    assert clusters.class_ids == (0,) and torch.equal(clusters.moments([0])[0], rows)


def test_unfit_moments_are_named():
    clusters, rows = ClusterGaussians(), features(3, 4)
    for error, match, means, variances in (
        (TypeError, "means of class 1", rows.long(), rows.square()),
        (ValueError, "variances of class 1: expected shape", rows, rows[:2].square()),
        (ValueError, "variances of class 1: .* is negative", rows, rows),
        (ValueError, "variances of class 1: not finite", rows, rows / 0),
    ):
        with pytest.raises(error, match=match):
            clusters.add_moments(1, means, variances)
    assert len(clusters) == 0


def test_unfit_class_ids_and_batch_sizes():
    clusters = ClusterGaussians(2)
    clusters.add(3, features(9, 4))
    for error, match, ids, size, count in (
        (KeyError, r"no statistics for classes \[5\], known are \[3\]", [3, 5], 4, 1),
        (ValueError, r"repeated classes \[3\]", [3, 3], 4, 1), (ValueError, "class_ids: empty", [], 4, 1),
        (ValueError, "samples_per_cluster is 0", [3], 0, 1), (ValueError, "num_batches is 0", [3], 4, 0),
        (ValueError, "num_batches is 3; 1 to 2", [3], 4, 3),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            cluster_batches(clusters, ids, size, count, generator=None)
