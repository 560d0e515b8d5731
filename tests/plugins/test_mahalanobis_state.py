"""Task inference: memory, state, and what is refused."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference, correlation_matrix, mahalanobis_distance

sys.path.append(str(Path(__file__).parent))
from mahalanobis_cases import filled, queries, rows_of


# ------------------------------------------------------------------ memory and state
def test_memory_and_no_second_copy():
    store = MahalanobisTaskInference(2, form="auto")
    for class_id in range(3):
        store.add(class_id, rows_of(class_id, 12, 48, torch.float32), 0, labels=torch.arange(12) % 2)
    rows = 12 + 2 * 2  # one per sample; means and scales of two clusters
    assert store.nbytes == 3 * rows * 48 * 4
    store.infer(queries(d=48))
    assert store.nbytes == 3 * rows * 48 * 4
    storages = {stored.rows.untyped_storage().data_ptr(): stored.rows for stored in store._classes.values()}
    assert [rows.untyped_storage().nbytes() for rows in storages.values()] == [3 * 12 * 48 * 4]


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip_is_exact(form, dtype):
    original = filled(form=form, dtype=dtype, d=24, n=11, clusters=2, seed=3)
    copy = MahalanobisTaskInference(2, form=form, seed=3)
    state = original.state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist())  # nothing but tensors and plain values
    copy.load_state_dict(state)
    query = queries(d=24, dtype=dtype)
    assert copy.class_ids == original.class_ids == (7, -3, 0, 12) and copy.tasks == original.tasks == (0, 0, 1, 1)
    assert copy.nbytes == original.nbytes and len(copy) == 4 and -3 in copy and 1 not in copy
    assert torch.equal(copy.distances(query), original.distances(query))
    for store in (original, copy):
        store.add(1, rows_of(1, 30, 24, dtype), 2)
    expected = original.distances(query)
    assert expected.dtype == dtype and torch.equal(copy.distances(query), expected)
    for name in ("means", "scales", "rows"):
        assert torch.equal(copy.state_dict()[name], original.state_dict()[name])
        state[name].zero_()
    assert torch.equal(copy.distances(query), expected)


def test_state_of_an_empty_store_and_of_other_settings():
    store = filled()
    state = store.state_dict()
    store.load_state_dict(MahalanobisTaskInference().state_dict())
    assert len(store) == 0
    store.add(0, rows_of(0, 3, 9), 0)  # nothing of the old feature size is left
    for name, value in {
        "clusters": 5,
        "jitter": 1e-3,
        "normalize": False,
        "correlation": False,
        "shrinkage": 0.5,
        "form": "dense",
        "seed": 1,
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: the state was made with"):
            MahalanobisTaskInference(**{name: value}).load_state_dict(state)
    for broken in (
        {"class_ids": [7, -3, 0, 0]},
        {"tasks": [0]},
        {"ranks": state["ranks"][:3]},
        {"low_rank": [*state["low_rank"][:3], [False]]},
        {"means": state["means"][:-1]},
        {"scales": state["scales"][:, :2]},
        {"rows": state["rows"][:-1]},
    ):
        with pytest.raises(ValueError, match="state: inconsistent"):
            store.load_state_dict({**state, **broken})
    assert store.class_ids == (0,)


# ------------------------------------------------------------------ errors
def test_nothing_known():
    store = MahalanobisTaskInference()
    for method in (store.distances, store.nearest_class, store.infer):
        with pytest.raises(RuntimeError, match="no class is known yet"):
            method(queries())
    assert len(store) == store.nbytes == 0 and store.class_ids == store.tasks == ()


def test_unfit_features_are_named():
    good = rows_of(1, 4, 3)
    hole = good.clone()
    hole[1, 2] = math.nan
    for error, match, rows in (
        (ValueError, r"features of class 7: expected shape \(n, d\)", good[:0]),
        (ValueError, r"features of class 7: expected shape \(n, d\)", good[0]),
        (ValueError, "features of class 7: not finite", hole),
        (ValueError, "features of class 7: not finite", good / 0),
        (TypeError, "features of class 7: expected a floating-point tensor, got torch.int64", good.long()),
    ):
        with pytest.raises(error, match=match):
            MahalanobisTaskInference().add(7, rows, 0)
    store = MahalanobisTaskInference(normalize=False)
    store.add(1, good.float(), 0)
    with pytest.raises(ValueError, match="class 7: feature size 2, the other classes have 3"):
        store.add(7, good[:, :2], 0)
    with pytest.raises(ValueError, match=r"class 7: the statistics overflow torch\.float32"):
        store.add(7, good * 1e100, 0)
    with pytest.raises(ValueError, match=r"class 7: the covariance of a cluster overflows torch\.float64"):
        store.add(7, good * 1e200, 0, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="class_id: class 1 is known already, pass replace=True"):
        store.add(1, good, 0)
    for labels in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"labels of class 7: expected \(4,\) integers, got"):
            store.add(7, good, 0, labels=labels)
    with pytest.raises(TypeError):
        store.add("7", good, 0)
    assert store.class_ids == (1,)


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
@pytest.mark.parametrize("correlation", [False, True])
def test_singular_clusters_name_class_and_settings(form, correlation):
    store = MahalanobisTaskInference(1, form=form, jitter=0.0, correlation=correlation)
    with pytest.raises(ValueError, match=r"class 7: .*not positive definite \(jitter 0, shrinkage 1\)"):
        store.add(7, rows_of(7, 1), 0)
    store.add(8, rows_of(8, 3), 0)
    unshrunk = MahalanobisTaskInference(1, form=form, jitter=0.0, shrinkage=0.0, correlation=correlation)
    with pytest.raises(ValueError, match=r"class 7: .*\(jitter 0, shrinkage 0\)"):
        unshrunk.add(7, torch.eye(6)[:2], 0)


def test_given_moments_are_checked():
    store, means, covariances = MahalanobisTaskInference(), torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1)
    asymmetric, indefinite = covariances.clone(), covariances.clone()
    asymmetric[1, 0, 1], indefinite[1, 2, 2] = 0.5, -2.0
    for error, match, arguments in (
        (ValueError, r"means of class 6: expected shape \(k, d\)", (means[0], covariances)),
        (ValueError, r"covariances of class 6: expected shape \(k, d, d\)", (means, covariances[0])),
        (ValueError, r"covariances of class 6: got \(1, 3, 3\) for means \(2, 3\)", (means, covariances[:1])),
        (ValueError, "covariances of class 6: not symmetric", (means, asymmetric)),
        (
            ValueError,
            r"class 6: the matrix of a cluster is not positive definite \(jitter 0.0001, shrinkage 1\)",
            (means, indefinite),
        ),
        (ValueError, "means of class 6: not finite", (means / 0, covariances)),
        (ValueError, "covariances of class 6: not finite", (means, covariances * math.inf)),
        (TypeError, "means of class 6: expected a floating-point tensor", ([[0.0]], covariances)),
    ):
        with pytest.raises(error, match=match):
            store.add_moments(6, *arguments, 0, shrunk=True)
    store.add_moments(6, means, covariances, 0)
    with pytest.raises(ValueError, match="class_id: class 6 is known already"):
        store.add_moments(6, means, covariances, 0)
    store.add_moments(6, means, covariances, 4, replace=True)
    assert store.tasks == (4,)


def test_unfit_queries():
    store = filled()
    with pytest.raises(ValueError, match=r"features: expected \(n, 6\), got \(4, 5\)"):
        store.infer(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"features: expected \(n, 6\), got \(6,\)"):
        store.nearest_class(torch.zeros(6))
    with pytest.raises(TypeError, match=r"features: expected a floating-point tensor, got torch\.int64"):
        store.distances(torch.zeros(4, 6, dtype=torch.long))


def test_unfit_settings():
    for match, arguments in (
        ("form: 'full' is not accepted", {"form": "full"}),
        ("jitter: must be a finite number >= 0, got -1", {"jitter": -1}),
        ("shrinkage: must be a finite number >= 0, got nan", {"shrinkage": math.nan}),
        ("clusters: must be at least 1, got 0", {"clusters": 0}),
        ("seed: must be at least 0, got -1", {"seed": -1}),
    ):
        with pytest.raises(ValueError, match=match):
            MahalanobisTaskInference(**arguments)


def test_unfit_matrices():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="covariance: variances must be positive, the smallest is 0"):
        correlation_matrix(torch.diag(torch.tensor([1.0, 0.0, 2.0])))
    with pytest.raises(ValueError, match="correlation: not positive definite"):
        mahalanobis_distance(torch.zeros(2, 3), torch.zeros(3), eye - 2)
    for shapes in (((3,), (3,), (3, 3)), ((2, 3), (2,), (3, 3)), ((2, 3), (4, 3), (3, 3))):
        with pytest.raises(ValueError, match=r"query, mean, correlation: expected \(n, d\), \(..., d\), \(..., d, d\)"):
            mahalanobis_distance(*(torch.zeros(shape) for shape in shapes))
    assert mahalanobis_distance(torch.ones(2, 3), torch.zeros(3), eye).tolist() == [3.0, 3.0]
