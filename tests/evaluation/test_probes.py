"""Weighted kNN, few-shot subsets, holdout splits."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from avalanche_firn.evaluation.probes import few_shot_indices, holdout_split, knn_predict, knn_scores


def scores_by_loops(queries, bank, labels, k, temperature):
    """Nested loops in float64; no ties at the k-th place."""
    ids = sorted(set(labels.tolist()))
    result = []
    for q in queries.tolist():
        similarity = []
        for b in bank.tolist():
            dot, norm = sum(u * v for u, v in zip(q, b, strict=True)), math.sqrt(sum(u * u for u in q))
            norm *= math.sqrt(sum(v * v for v in b))
            similarity.append(dot / norm if norm else 0.0)
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        scores = dict.fromkeys(ids, 0.0)
        for i in nearest:
            scores[int(labels[i])] += math.exp((similarity[i] - similarity[nearest[0]]) / temperature)
        result.append([scores[c] for c in ids])
    return torch.tensor(result, dtype=torch.float64)


def problem(seed, q=9, n=40, d=6, classes=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(q, d, generator=g, dtype=torch.float64)
    bank = torch.randn(n, d, generator=g, dtype=torch.float64)
    return queries.to(dtype), bank.to(dtype), torch.randint(classes, (n,), generator=g)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_scores(golden, dtype, tolerance):
    arrays = golden("lp_ft", "knn_scores")
    queries, bank = (torch.tensor(arrays[name]).to(dtype) for name in ("queries", "bank"))
    labels = torch.tensor(arrays["bank_labels"])
    for a, k in enumerate(arrays["ks"].tolist()):
        for b, temperature in enumerate(arrays["temperatures"].tolist()):
            predicted = knn_predict(queries, bank, labels, k, temperature)
            assert np.array_equal(predicted.numpy(), arrays["pred"][a, b])
            assert np.array_equal(predicted.numpy(), arrays["pred_sklearn"][a, b])
            scores, class_ids = knn_scores(queries, bank, labels, k, temperature)
            expected = arrays["scores"][a, b] / arrays["scores"][a, b].sum(1, keepdims=True)
            assert scores.dtype == dtype and np.array_equal(class_ids.numpy(), arrays["class_ids"])
            assert np.abs((scores / scores.sum(1, keepdim=True)).numpy() - expected).max() < tolerance


def test_golden_matrix(golden):
    arrays = golden("lp_ft", "knn_matrix")
    for t, backbone in enumerate(arrays["backbone_weights"]):
        for i in range(4):
            bank, queries = (torch.tensor(np.maximum(arrays[f"x_{s}_{i}"] @ backbone.T, 0)) for s in ("train", "test"))
            labels = torch.tensor(arrays[f"y_train_{i}"])
            for k, name in ((200, "acc_k200"), (200, "acc_masked_k200"), (t + 1, "acc_k_tasks_seen")):
                accuracy = 100 * (knn_predict(queries, bank, labels, k).numpy() == arrays[f"y_test_{i}"]).mean()
                assert abs(accuracy - arrays[name][t, i]) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_against_loops_and_scikit_learn(seed):
    rng = np.random.RandomState(seed)
    queries, bank, labels = problem(seed, n=rng.randint(5, 60))
    k, temperature = int(rng.randint(1, len(bank) + 1)), float(rng.choice([0.02, 0.07, 0.5]))
    names = torch.tensor([-7, 3, 40, 1000])  # any ids
    scores, ids = knn_scores(queries, bank, names[labels], k, temperature)
    torch.testing.assert_close(
        scores, scores_by_loops(queries, bank, names[labels], k, temperature), rtol=0, atol=1e-12
    )
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    expected = reference.fit(bank.numpy(), names[labels].numpy()).predict(queries.numpy())
    predicted = knn_predict(queries, bank, names[labels], k, temperature)
    assert predicted.dtype == torch.int64 and np.array_equal(predicted.numpy(), expected)
    assert torch.equal(ids, names[labels].unique())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 12), st.booleans())
def test_chunks_bank_order_and_names_change_nothing(seed, k, chunk, single):
    queries, bank, labels = problem(seed, dtype=torch.float32 if single else torch.float64)
    expected = knn_predict(queries, bank, labels, k)
    assert torch.equal(knn_predict(queries, bank, labels, k, chunk=chunk), expected)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(knn_predict(queries, bank[order], labels[order], k), expected)
    names = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[:4] - 20
    assert torch.equal(knn_predict(queries, bank, names[labels], k), names[expected])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24))
def test_repeated_bank_rows_share_the_last_places_whatever_the_order(seed, k):
    queries, bank, _ = problem(seed, n=4)
    bank = bank.repeat(5, 1)  # every similarity five times
    labels = torch.randint(3, (20,), generator=torch.Generator().manual_seed(seed))
    scores, ids = knn_scores(queries, bank, labels, k)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed + 1))
    again, _ = knn_scores(queries, bank[order], labels[order], k)
    torch.testing.assert_close(again, scores, rtol=1e-12, atol=1e-14)
    assert torch.equal(knn_predict(queries, bank, labels, k), knn_predict(queries, bank[order], labels[order], k))
    similarity = torch.cosine_similarity(queries[:, None], bank[None, :4], dim=2)
    for row, values in enumerate(similarity):
        expected, places = torch.zeros(3, dtype=torch.float64), min(k, 20)
        for i in values.argsort(descending=True).tolist():
            taken = min(places, 5)
            of_class = torch.bincount(labels[i::4], minlength=3).double()
            expected += taken / 5 * of_class * math.exp((float(values[i]) - float(values.max())) / 0.1)
            places -= taken
        torch.testing.assert_close(scores[row], expected[ids], rtol=1e-9, atol=1e-12)


def test_the_nearest_neighbour_needs_no_temperature_and_k_is_clipped():
    queries, bank, labels = problem(3)
    nearest = labels[torch.cosine_similarity(queries[:, None], bank[None], dim=2).argmax(1)]
    for temperature in (1e-4, 0.1, 1e4):
        assert torch.equal(knn_predict(queries, bank, labels, 1, temperature), nearest)
    assert torch.equal(knn_scores(queries, bank, labels, 10**9)[0], knn_scores(queries, bank, labels, 40)[0])


def test_lowest_id_wins_a_tie():
    bank = torch.eye(3)[[0, 1, 1, 0]]
    for labels in ([8, 5, 8, 5], [5, 8, 5, 8]):
        assert knn_predict(torch.tensor([[1.0, 1.0, 0.0]]), bank, torch.tensor(labels), 4).tolist() == [5]
        assert knn_predict(torch.tensor([[1.0, 1.0, 0.0]]), bank, torch.tensor(labels), 1).tolist() == [5]


def test_zero_vectors_have_similarity_zero():
    bank = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    scores, _ = knn_scores(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), bank, torch.tensor([0, 1, 2]), temperature=0.5)
    expected = [[1.0, math.exp(-2), math.exp(-4)], [1.0, 1.0, 1.0]]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert knn_predict(torch.zeros(1, 2), bank, torch.tensor([4, 1, 2])).tolist() == [1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_length_of_the_vectors_plays_no_role(scale):
    queries, bank, labels = problem(4, dtype=torch.float32)
    expected, _ = knn_scores(queries, bank, labels, 20)
    scores, _ = knn_scores(queries * scale, bank * scale, labels, 20)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_at_any_temperature(dtype):
    queries, bank, labels = problem(5, dtype=dtype)
    for temperature in (0.01, 0.07):
        scores, _ = knn_scores(queries, bank, labels, 20, temperature)
        expected, _ = knn_scores(queries.double(), bank.double(), labels, 20, temperature)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
        assert torch.equal(
            knn_predict(queries, bank, labels, 20, temperature),
            knn_predict(queries.double(), bank, labels, 20, temperature),
        )


def test_low_temperature_in_float32_stays_finite():
    queries, bank, labels = problem(6, dtype=torch.float32)
    scores, _ = knn_scores(queries, bank, labels, 20, 1e-3)
    assert scores.isfinite().all() and (scores.amax(1) >= 0.999).all()
    assert torch.equal(knn_predict(queries, bank, labels, 20, 1e-3), knn_predict(queries, bank, labels, 1))


def test_no_queries_one_bank_row_and_the_modes_of_the_caller():
    queries, bank, labels = problem(7, dtype=torch.float32)
    none = knn_predict(queries[:0], bank, labels)
    assert none.shape == (0,) and none.dtype == torch.int64
    assert knn_scores(queries[:0], bank, labels)[0].shape == (0, 4)
    assert knn_predict(queries, bank[:1], labels[:1]).tolist() == [int(labels[0])] * 9
    expected, _ = knn_scores(queries, bank, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_scores(queries.requires_grad_(), bank, labels.to(torch.int16))[0], expected)
    assert not knn_scores(queries, bank, labels)[0].requires_grad


Q, B, L = problem(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bank=B[:0], bank_labels=L[:0]), "bank: got no rows"),
        (dict(k=0), "k: got 0; accepted are integers >= 1"),
        (dict(chunk=0), "chunk: got 0; accepted are integers >= 1"),
        (dict(temperature=0.0), "temperature: got 0.0; accepted are finite numbers above 0"),
        (dict(temperature=-1.0), "temperature: got -1.0"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(temperature=float("inf")), "temperature: got inf"),
        (dict(queries=Q[0]), r"queries: got torch.float64 \(6,\); accepted is a floating tensor of two dimensions"),
        (dict(queries=Q.long()), r"queries: got torch.int64 \(9, 6\)"),
        (dict(bank=B.tolist()), "bank: got list"),
        (dict(queries=Q[:, :3]), "queries, bank: got 3 and 6 columns"),
        (dict(queries=Q[:, :0], bank=B[:, :0]), "queries, bank: got 0 and 0 columns"),
        (
            dict(bank_labels=L[:3]),
            r"bank_labels: got torch.int64 \(3,\); accepted is an integer tensor of shape \(40,\)",
        ),
        (dict(bank_labels=L.double()), r"bank_labels: got torch.float64 \(40,\)"),
        (dict(bank_labels=L.bool()), r"bank_labels: got torch.bool \(40,\)"),
        (dict(queries=Q / 0), "queries, bank: got NaN or infinite values"),
        (dict(bank=B * torch.nan), "queries, bank: got NaN or infinite values"),
        (dict(bank=B.to("meta")), "queries, bank: got devices cpu and meta"),
    ],
)
@pytest.mark.parametrize("function", [knn_predict, knn_scores])
def test_wrong_arguments(function, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{"queries": Q, "bank": B, "bank_labels": L, **arguments})


@pytest.mark.parametrize("arguments", [dict(k=2.0), dict(k=True), dict(chunk=1.5)])
def test_wrong_types(arguments):
    with pytest.raises(TypeError, match=f"^{next(iter(arguments))}: got"):
        knn_predict(Q, B, L, **arguments)


TARGETS = np.repeat([3, 0, 11], [20, 7, 13])[np.random.RandomState(0).permutation(40)]


@pytest.mark.parametrize("shots", [1, 2, 5, 7])
@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor])
def test_exact_shots(shots, kind):
    chosen = few_shot_indices(kind(TARGETS), shots, seed=1)
    assert chosen.dtype == np.int64 and np.all(np.diff(chosen) > 0)
    assert {c: int((TARGETS[chosen] == c).sum()) for c in (0, 3, 11)} == dict.fromkeys((0, 3, 11), shots)
    assert np.array_equal(chosen, few_shot_indices(TARGETS, shots, seed=1))


def test_subsets_are_nested_and_depend_on_the_seed():
    for seed in range(5):
        sizes = [few_shot_indices(TARGETS, n, seed) for n in (1, 2, 4, 7)]
        for small, large in itertools.pairwise(sizes):
            assert set(small) < set(large)
        fractions = [few_shot_indices(TARGETS, f, seed) for f in (0.01, 0.1, 0.3, 0.35, 0.9, 1.0)]
        for small, large in itertools.pairwise(fractions):
            assert set(small) <= set(large)
    draws = {tuple(few_shot_indices(TARGETS, 2, seed)) for seed in range(20)}
    assert len(draws) > 15


def test_a_class_is_drawn_independently_of_the_others():
    alone = np.flatnonzero(TARGETS == 3)
    chosen = few_shot_indices(TARGETS, 4, seed=2)
    assert np.array_equal(alone[few_shot_indices(TARGETS[alone], 4, seed=2)], chosen[TARGETS[chosen] == 3])
    reference = np.random.RandomState([2, 3]).permutation(alone)[:4]
    assert np.array_equal(np.sort(reference), chosen[TARGETS[chosen] == 3])


def test_fractions_and_everything():
    for fraction, counts in ((0.01, (1, 1, 1)), (0.1, (1, 2, 1)), (0.5, (4, 10, 7)), (1.0, (7, 20, 13))):
        chosen = few_shot_indices(TARGETS, fraction, seed=0)
        assert tuple(int((TARGETS[chosen] == c).sum()) for c in (0, 3, 11)) == counts
    assert np.array_equal(few_shot_indices(TARGETS, None, seed=0), np.arange(40))
    assert few_shot_indices([], 3, seed=0).shape == few_shot_indices([], None, seed=0).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_holdout(targets, fraction, seed):
    targets = np.asarray(targets, dtype=np.int64)
    train, validation = holdout_split(targets, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(targets)))
    assert (
        np.all(np.diff(train) > 0) and np.all(np.diff(validation) > 0) and train.dtype == validation.dtype == np.int64
    )
    for c in np.unique(targets):
        size, held = int((targets == c).sum()), int((targets[validation] == c).sum())
        assert held == (0 if size == 1 else min(max(1, math.floor(fraction * size + 0.5)), size - 1))
    _, smaller = holdout_split(targets, fraction / 2, seed)
    assert set(smaller) <= set(validation)


def test_holdout_depends_on_the_seed_only():
    assert len({tuple(holdout_split(TARGETS, 0.2, seed)[1]) for seed in range(10)}) == 10
    assert np.array_equal(holdout_split(TARGETS, 0.2, 3)[0], holdout_split(list(TARGETS), 0.2, 3)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: few_shot_indices(TARGETS, 8, 0), ValueError, "shots: got 8, but class 0 has 7 samples"),
        (
            lambda: few_shot_indices(TARGETS, 0, 0),
            ValueError,
            r"shots: got 0; accepted are an int >= 1, a float in \(0, 1",
        ),
        (lambda: few_shot_indices(TARGETS, 0.0, 0), ValueError, "shots: got 0.0"),
        (lambda: few_shot_indices(TARGETS, 1.5, 0), ValueError, "shots: got 1.5"),
        (lambda: few_shot_indices(TARGETS, float("nan"), 0), ValueError, "shots: got nan"),
        (lambda: few_shot_indices(TARGETS, "5", 0), TypeError, "shots: got '5'"),
        (lambda: few_shot_indices(TARGETS, True, 0), TypeError, "shots: got True"),
        (lambda: few_shot_indices(TARGETS, 1, -1), ValueError, "seed: got -1"),
        (lambda: few_shot_indices(TARGETS, 1, 2**32), ValueError, "seed: got 4294967296"),
        (lambda: few_shot_indices(TARGETS, 1, 0.5), TypeError, "seed: got 0.5"),
        (lambda: few_shot_indices(TARGETS - 1, 1, 0), ValueError, "targets: got -1; accepted are class ids >= 0"),
        (lambda: few_shot_indices(TARGETS[None], 1, 0), ValueError, r"targets: got int64 of shape \(1, 40\)"),
        (lambda: few_shot_indices(TARGETS * 1.0, 1, 0), ValueError, r"targets: got float64 of shape \(40,\)"),
        (
            lambda: holdout_split(TARGETS, 0.0, 0),
            ValueError,
            "fraction: got 0.0; accepted are numbers above 0 and below 1",
        ),
        (lambda: holdout_split(TARGETS, 1.0, 0), ValueError, "fraction: got 1.0"),
        (lambda: holdout_split(TARGETS, float("nan"), 0), ValueError, "fraction: got nan"),
        (lambda: holdout_split(TARGETS, 0.5, -1), ValueError, "seed: got -1"),
    ],
)
def test_wrong_subsets(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
