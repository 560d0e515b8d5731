"""Clusters of a class's features: what KMeans leaves to errors or warnings is decided here."""

import random
import warnings

import numpy as np
import pytest
import torch

from avalanche_firn.plugins.clustering import cluster_labels


def blobs(sizes, d=3, seed=0):
    """Rows around points far from each other, shuffled; and the index of the point of each."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    index = index[torch.randperm(len(index), generator=generator)]
    points = 100 * torch.eye(len(sizes), d)
    return points[index] + torch.randn(len(index), d, generator=generator), index


def test_finds_separate_groups():
    rows, index = blobs([20, 5, 12])
    labels = cluster_labels(rows, 3)
    assert labels.dtype == torch.int64 and labels.shape == (37,)
    pairs = set(zip(index.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 3 and {label for _, label in pairs} == {0, 1, 2}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_rows_than_clusters_give_a_cluster_each(n):
    assert sorted(cluster_labels(torch.randn(n, 5), 4).tolist()) == list(range(n))


def test_equal_rows_share_a_cluster_without_warnings():
    rows = torch.tensor([[1.0, 2.0], [5.0, 1.0]])[[0, 1, 1, 0, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = cluster_labels(rows, 4)
        assert cluster_labels(rows[:1].expand(6, 2), 4).tolist() == [0] * 6
    assert sorted(labels.unique().tolist()) == [0, 1]
    assert labels[0] == labels[3] and labels[1] == labels[2] == labels[4] == labels[5] != labels[0]


def test_one_cluster_holds_everything():
    assert cluster_labels(torch.randn(7, 2), 1).tolist() == [0] * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_seed_decides(dtype):
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    first = cluster_labels(rows, 5, seed=2**32 - 1)
    assert first.unique().tolist() == list(range(5))
    assert torch.equal(cluster_labels(rows, 5, seed=2**32 - 1), first)
    assert any(not torch.equal(cluster_labels(rows, 5, seed=seed), first) for seed in range(5))


def test_global_generators_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    before = states()
    cluster_labels(torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), 4, seed=3)
    after = states()
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    assert np.array_equal(before[1][1], after[1][1]) and before[1][2:] == after[1][2:]


def test_errors_name_the_argument():
    rows = torch.randn(4, 2)
    hole = rows.clone()
    hole[2, 1] = float("nan")
    for match, arguments in (
        ("clusters is 0; 1 and above is accepted", (rows, 0)),
        (r"features: expected \(n, d\) with n >= 1, got \(4,\)", (rows[:, 0], 2)),
        (r"features: expected \(n, d\) with n >= 1, got \(0, 2\)", (rows[:0], 2)),
        ("features: not finite", (hole, 2)),
        ("features: not finite", (rows / 0, 1)),
    ):
        with pytest.raises(ValueError, match=match):
            cluster_labels(*arguments)
