"""Task inference by class clusters against explicit loops, and what the docstrings promise."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_firn.plugins import mahalanobis_math
from avalanche_firn.plugins.clustering import cluster_labels
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference, vote
from avalanche_firn.plugins.random_state import derived_seed

sys.path.append(str(Path(__file__).parent))
from mahalanobis_cases import FORMS, by_loop, filled, queries, relative, rows_of

# ------------------------------------------------------------------ explicit loops
OPTIONS = ({}, {"normalize": False}, {"correlation": False}, {"shrinkage": 0.3, "jitter": 0.02}, {"shrinkage": 0.0})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_equals_the_loop(form, options):
    store, query = MahalanobisTaskInference(3, form=form, **options), queries(n=3)
    for class_id, n in ((7, 20), (-3, 5), (0, 1), (12, 9)):
        rows = rows_of(class_id, n)
        labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(n)) * 5 - 4
        store.add(class_id, rows, 0, labels=labels)
        relative(store.distances(query)[:, -1], by_loop(query, rows, labels, **options), 1e-9)


@pytest.mark.parametrize("class_id", [3, -3])
def test_clusters_come_from_kmeans_on_normalised_rows(class_id):
    rows = rows_of(3, 40) * torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    store, query = MahalanobisTaskInference(3, seed=5), queries(n=2)
    store.add(class_id, rows, 0)
    labels = cluster_labels(F.normalize(rows, dim=1), 3, seed=derived_seed(5, class_id % 2**64) % 2**32)
    assert len(store.state_dict()["ranks"][0]) == 3
    relative(store.distances(query)[:, 0], by_loop(query, rows, labels), 1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_forms_agree_and_auto_picks_by_size(options):
    query, stores = queries(d=24), {}
    for form in ("dense", "low_rank", "auto"):
        store = stores[form] = MahalanobisTaskInference(2, form=form, **options)
        for class_id, n in ((7, 13), (-3, 12), (0, 1), (12, 60)):
            store.add(class_id, rows_of(class_id, n, 24), 0, labels=torch.zeros(n, dtype=torch.long))
    for form in ("low_rank", "auto"):
        relative(stores[form].distances(query), stores["dense"].distances(query), 1e-10)
    assert stores["low_rank"].state_dict()["ranks"] == [[13], [12], [1], [60]]
    assert stores["dense"].state_dict()["ranks"] == [[24]] * 4
    # n - 1 < d / 2, unless nothing limits the cancellation: raw features with shrinkage 0
    expected = [[24], [12], [1], [24]] if options.get("shrinkage", 1.0) else [[24], [24], [1], [24]]
    assert stores["auto"].state_dict()["ranks"] == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_float32_is_close_to_float64(form, common):
    d, ids = 96, (7, -3, 0, 12)
    shift = common * rows_of(99, 1, d)  # features that have most of their norm in common
    stores = [MahalanobisTaskInference(form=form) for _ in range(2)]
    for class_id in ids:
        rows = (rows_of(class_id, 90, d) + shift).float()
        labels = cluster_labels(rows, 4)
        for store, x in zip(stores, (rows, rows.double()), strict=True):
            store.add(class_id, x, 0, labels=labels)
    seen = torch.cat([rows_of(class_id, 90, d) for class_id in ids])
    query = (torch.cat([seen, queries(ids, 16, d)]) + shift).float()
    assert stores[0].distances(query).dtype == torch.float32
    relative(stores[0].distances(query), stores[1].distances(query.double()), 2e-5)
    assert torch.equal(stores[0].infer(query), stores[1].infer(query.double()))


def test_the_mean_of_a_cluster_is_at_distance_zero_not_below():
    store = filled((7, 0), n=4, d=24, dtype=torch.float32, clusters=1, normalize=False)
    distances = store.distances(store.state_dict()["means"])
    assert bool((distances >= 0).all()) and float(distances.diagonal().max()) < 1e-9


# ------------------------------------------------------------------ edges
@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_samples_are_finite(form, n):
    store = MahalanobisTaskInference(form=form)
    store.add(5, rows_of(5, n), 1)
    store.add(6, rows_of(6, n).float(), 2, labels=torch.arange(n))
    query = queries()
    assert [len(ranks) for ranks in store.state_dict()["ranks"]] == [n, n]
    assert bool(torch.isfinite(store.distances(query)).all())
    # one-sample clusters: R = I
    expected = torch.cdist(F.normalize(query, dim=1), F.normalize(rows_of(5, n), dim=1)).square().amin(1)
    relative(store.distances(query)[:, 0], expected, 1e-9)


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_zero_and_equal_rows(form):
    store = MahalanobisTaskInference(form=form)
    store.add(5, torch.zeros(4, 6), 0)
    store.add(6, torch.ones(4, 6), 1)
    query = torch.cat([torch.zeros(1, 6), 3 * torch.ones(1, 6)])
    torch.testing.assert_close(store.distances(query), 1 - torch.eye(2), rtol=0, atol=1e-6)
    assert store.infer(query).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype):
    rows, query = rows_of(5, 20, dtype=dtype), queries(dtype=dtype)
    half, single = MahalanobisTaskInference(2), MahalanobisTaskInference(2)
    single.add(5, rows.float(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        half.add(5, rows, 0)
        distances = half.distances(query)
    assert distances.dtype == torch.float32 and torch.equal(distances, single.distances(query.float()))


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_batches_and_their_order_do_not_matter(form):
    store, query = filled(form=form), queries()
    tasks, distances = store.infer(query), store.distances(query)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))
    assert len(query) == 64 and tasks.unique().tolist() == [0, 1]
    assert torch.equal(torch.cat([store.infer(row[None]) for row in query]), tasks)
    assert torch.equal(store.infer(query[order]), tasks[order])
    relative(torch.cat([store.distances(row[None]) for row in query]), distances, 1e-11)
    assert store.distances(query[:0]).shape == (0, 4) and store.infer(query[:0]).shape == (0,)


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_blocks_do_not_matter(form, monkeypatch):
    store, query = filled(form=form, d=24), queries(d=24)
    whole = store.distances(query)
    monkeypatch.setattr(mahalanobis_math, "_BLOCK_BYTES_CPU", 3 * 64 * 24 * 8)  # three clusters: cuts classes in two
    relative(store.distances(query), whole, 1e-11)
    many = query.repeat(20, 1)
    relative(store.distances(many), whole.repeat(20, 1), 1e-11)


@given(ids=st.lists(st.integers(-50, 50), min_size=1, max_size=6, unique=True), data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_of_arrival_does_not_matter(ids, data):
    task_of = {class_id: data.draw(st.integers(0, 3)) for class_id in ids}
    sizes = {class_id: data.draw(st.integers(1, 9)) for class_id in ids}
    stores = [MahalanobisTaskInference(2), MahalanobisTaskInference(2)]
    for store, order in zip(stores, (ids, data.draw(st.permutations(ids))), strict=True):
        for class_id in order:
            store.add(class_id, rows_of(class_id, sizes[class_id]), task_of[class_id])
    query = queries(ids, 4)
    assert torch.equal(stores[0].infer(query), stores[1].infer(query))
    nearest = stores[0].nearest_class(query)
    assert torch.equal(nearest, stores[1].nearest_class(query))
    assert [task_of[class_id] for class_id in nearest.tolist()] == stores[0].infer(query).tolist()


def test_renamed_classes_give_the_same_routing():
    query, ids = queries(), (7, -3, 0, 12)
    names = {7: 2**40, -3: 5, 0: -(2**62), 12: 1}
    stores = MahalanobisTaskInference(), MahalanobisTaskInference()
    for position, class_id in enumerate(ids):
        rows = rows_of(class_id, 20)
        labels = cluster_labels(rows, 4)
        stores[0].add(class_id, rows, position // 2, labels=labels)
        stores[1].add(names[class_id], rows, position // 2, labels=labels)
    assert torch.equal(stores[0].infer(query), stores[1].infer(query))
    assert [names[class_id] for class_id in stores[0].nearest_class(query).tolist()] == stores[1].nearest_class(
        query
    ).tolist()


def test_ties_go_to_the_class_that_arrived_first():
    store = MahalanobisTaskInference(1)
    for class_id in (9, 2, 4):
        store.add(class_id, rows_of(1, 1), class_id)
    assert store.nearest_class(queries()).unique().tolist() == [9] == store.infer(queries()).unique().tolist()


def test_replacing_keeps_the_column():
    store, query = filled(), queries()
    before = store.distances(query)
    rows = rows_of(77, 30)
    store.add(-3, rows, 5, replace=True, labels=torch.zeros(30, dtype=torch.int32))
    after = store.distances(query)
    assert store.class_ids == (7, -3, 0, 12) and store.tasks == (0, 5, 1, 1)
    relative(after[:, 1], by_loop(query, rows, torch.zeros(30)), 1e-9)
    relative(after[:, [0, 2, 3]], before[:, [0, 2, 3]], 1e-11)


# ------------------------------------------------------------------ vote
def test_vote():
    for tasks, winner in (([3, 1, 1, 0], 1), ([2, 1, 1, 2], 1), ([4], 4), ([5, -2, 0], -2), ([1, 1, 0, 0, 7, 7], 0)):
        voted = vote(torch.tensor(tasks))
        assert voted.dtype == torch.int64 and voted.tolist() == [winner] * len(tasks)
    assert vote(torch.zeros(0, dtype=torch.int64)).shape == (0,)
    for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"tasks: expected \(n,\) torch.int64, got"):
            vote(bad)


# ------------------------------------------------------------------ device
class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_nothing_waits_for_the_device(form):
    store, query = filled(form=form, dtype=torch.float32), queries(dtype=torch.float32)
    store.infer(query)
    with Watch() as watch:
        tasks = store.infer(query)
        store.nearest_class(query)
        vote(tasks)
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2"}
    assert watch.names.count("addmm") == 2 and not waiting & set(watch.names)
    assert "_to_copy" not in watch.names  # nothing moves between devices


def test_to_moves_statistics_and_those_added_later():
    store = filled()
    before = store.distances(queries())
    assert store.to("cpu") is store and torch.equal(store.distances(queries()), before)
    elsewhere = MahalanobisTaskInference().to("meta")
    elsewhere.to("cpu").add(0, rows_of(0, 3), 0)
    assert elsewhere.distances(queries()).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["dense", "low_rank", "auto"])
def test_cuda_gives_the_same_without_waiting(form):
    store, query = filled(form=form, d=24), queries(d=24)
    expected = store.distances(query)
    store.to("cuda").add(50, rows_of(50, 20, 24).cuda(), 3)
    store.infer(query.cuda())
    there = query.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distances, voted = store.distances(there), vote(store.infer(there))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    relative(distances[:, :4].cpu(), expected, 1e-10)
    assert voted.is_cuda and store.nearest_class(there).is_cuda
