"""Ridge probes: in memory and from a stream."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from avalanche_firn.models.linear_probe import fit_linear_probe, solve_linear_probe
from avalanche_firn.models.ridge import RidgeStatistics


def problem(seed, n=50, d=6, classes=(0, 2, 3)):
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    return torch.randn(n, d, generator=g, dtype=torch.float64) + y[:, None] * 0.3 + 4.0, y


def streamed(x, y, sizes):
    statistics = RidgeStatistics()
    for rows, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        statistics.add(rows, labels)
    return statistics


def worst(a, b):
    return max(float((u - v).abs().max()) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["tall", "ids"])
def test_golden(golden, name):
    arrays = golden("lp_ft", "probe_ridge")
    x, y = torch.tensor(arrays[f"{name}/features"]), torch.tensor(arrays[f"{name}/labels"])
    statistics = streamed(x, y, arrays[f"{name}/batch_sizes"].tolist())
    for i, l2 in enumerate(arrays[f"{name}/l2"].tolist()):
        expected = torch.tensor(arrays[f"{name}/weight"][i]), torch.tensor(arrays[f"{name}/bias"][i])
        assert worst(fit_linear_probe(x, y, "ridge", l2=l2), expected) < 1e-12
        assert worst(statistics.solve(l2), expected) < 1e-12
        weight, bias = statistics.solve(l2)
        scores = x @ weight.T + bias
        assert (scores[:, arrays[f"{name}/class_ids"]].sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_against_scikit_learn_in_both_forms(seed):
    rng = np.random.RandomState(seed)
    x, y = problem(seed, n=rng.randint(5, 60), d=rng.randint(1, 80))
    l2 = float(10 ** rng.uniform(-4, 2))
    onehot = (y[:, None] == torch.tensor([0, 2, 3])).double()
    reference = Ridge(alpha=len(x) * l2, solver="svd").fit(x.numpy(), onehot.numpy())
    solution = solve_linear_probe(x, y, "ridge", l2=l2, num_classes=6)
    assert np.abs(solution.weight[[0, 2, 3]].numpy() - reference.coef_).max() < 1e-10
    assert np.abs(solution.bias[[0, 2, 3]].numpy() - reference.intercept_).max() < 1e-10
    assert not solution.weight[[1, 4, 5]].any() and not solution.bias[[1, 4, 5]].any()
    loss = 0.5 * (onehot - (x @ solution.weight.T + solution.bias)[:, [0, 2, 3]]).square().sum(1).mean()
    assert solution.objective == pytest.approx(float(loss + l2 / 2 * solution.weight.square().sum()), rel=1e-12)
    assert worst(RidgeStatistics().add(x, y).solve(l2, 6), (solution.weight, solution.bias)) < 1e-10


@pytest.mark.parametrize(("n", "d"), [(30, 90), (90, 30)])
@pytest.mark.parametrize("l2", [1e-12, 1e-6, 0.0])
def test_weak_penalties_keep_their_digits(n, d, l2):
    x, y = problem(1, n=n, d=d)
    x = x * torch.logspace(0, -3, d, dtype=torch.float64)
    weight, bias = fit_linear_probe(x, y, "ridge", l2=l2)
    centred = x - x.mean(0)
    onehot = (y[:, None] == torch.arange(4)).double()
    u, s, vh = np.linalg.svd(centred.numpy(), full_matrices=False)
    kept = s > 1e-12 * s[0]
    factor = np.divide(s, s**2 + n * l2, where=kept, out=np.zeros_like(s))
    expected = (vh.T * factor) @ u.T @ (onehot - onehot.mean(0)).numpy()
    assert np.abs(weight.numpy() - expected.T).max() < 1e-9 * np.abs(expected).max()
    assert (bias - (onehot.mean(0) - weight @ x.mean(0))).abs().max() < 1e-10 * max(1.0, float(bias.abs().max()))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 1000), st.floats(0, 1e4))
def test_any_split_into_batches_and_collections(sizes, seed, offset):
    x, y = problem(seed, n=max(sum(sizes), 4))
    x = x + offset
    sizes = [*sizes, len(x) - sum(sizes)]
    whole = RidgeStatistics().add(x, y).solve(0.01)
    tolerance = 1e-10 * max(1.0, float(whole[1].abs().max()))  # biases grow with the offset
    assert worst(streamed(x, y, sizes).solve(0.01), whole) < tolerance
    half = len(x) // 2
    parts = RidgeStatistics().add(x[:half], y[:half]), RidgeStatistics().add(x[half:], y[half:])
    merged = RidgeStatistics().merge(parts[0]).merge(parts[1]).merge(RidgeStatistics())
    assert merged.count == len(x) and worst(merged.solve(0.01), whole) < tolerance
    assert parts[1].count == len(x) - half  # the argument of merge stays as it is


def test_a_far_away_origin_costs_no_digits():
    x, y = problem(2, n=400)
    near = RidgeStatistics().add(x, y).solve(1e-4)[0]
    far = RidgeStatistics().add(x + 2.0**20, y).solve(1e-4)[0]
    assert (near - far).abs().max() < 1e-9


def test_collection_survives_pickling_and_takes_any_floating_dtype():
    x, y = problem(3)
    statistics = RidgeStatistics().add(x[:20].float(), y[:20].to(torch.int32))
    statistics = pickle.loads(pickle.dumps(statistics))
    with torch.inference_mode():
        statistics.add(x[20:].half(), y[20:])
    values = torch.cat([x[:20].float().double(), x[20:].half().double()])
    weight, bias = statistics.solve(0.1)
    assert weight.dtype == bias.dtype == torch.float64 and not weight.is_inference()
    assert worst((weight, bias), fit_linear_probe(values, y, "ridge", l2=0.1)) < 1e-12


def test_no_penalty_gives_the_smallest_norm_and_a_single_class_the_constant_one():
    x, y = problem(4)
    doubled = torch.cat([x, x, torch.ones(50, 1, dtype=torch.float64)], 1)
    single, _ = RidgeStatistics().add(x, y).solve(0.0)
    for weight, _ in (RidgeStatistics().add(doubled, y).solve(0.0), fit_linear_probe(doubled, y, "ridge", l2=0.0)):
        assert worst((weight[:, :6], weight[:, 6:12]), (single / 2, single / 2)) < 1e-10
        assert weight[:, 12].abs().max() < 1e-12
    weight, bias = RidgeStatistics().add(x, torch.full_like(y, 2)).solve(0.1, 4)
    assert weight.abs().max() < 1e-15 and bias.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-14)
    weight, bias = RidgeStatistics().add(x[:1], y[:1]).solve(0.0)
    assert not weight.any() and bias[int(y[0])] == 1


def test_single_class_ridge():
    x, y = problem(4, classes=(2,))
    weight, bias = fit_linear_probe(x, y, "ridge", num_classes=4)
    assert weight.abs().max() < 1e-15 and bias.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-14)


def test_wrong_arguments():
    x, y = problem(0)
    statistics = RidgeStatistics()
    with pytest.raises(ValueError, match=r"^RidgeStatistics.solve: no rows were added"):
        statistics.add(x[:0], y[:0]).merge(RidgeStatistics()).solve(0.1)
    statistics.add(x, y)
    for call, message in (
        (lambda: statistics.add(x[:, :4], y), "features: got 4 columns; earlier rows have 6"),
        (lambda: statistics.add(x[0], y), r"features: got torch.float64 \(6,\)"),
        (lambda: statistics.add(x, y[:4]), r"labels: got torch.int64 \(4,\)"),
        (lambda: statistics.add(x, y - 1), "labels: got -1"),
        (lambda: statistics.add(x / 0, y), "features: got NaN or infinite"),
        (
            lambda: statistics.merge(RidgeStatistics().add(x[:, :4], y)),
            "merge: got statistics of 4 columns; these have 6",
        ),
        (lambda: statistics.solve(-1.0), "l2: got -1.0"),
        (lambda: statistics.solve(float("nan")), "l2: got nan"),
        (lambda: statistics.solve(0.1, 3), "num_classes: got 3, but class 3 was added"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert statistics.count == 50
