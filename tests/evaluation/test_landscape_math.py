"""Directions, coordinates and principal planes against plain formulas and decompositions, float64; errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.evaluation import landscape_math
from avalanche_firn.evaluation.landscape_math import (
    filter_normalized_direction,
    normalize_direction,
    pca_directions,
    project,
)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------- directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_filter_of_a_direction_has_the_norm_of_its_weight(dtype):
    weights = {"conv": normal(0, 3, 2, 3, 3), "norm": normal(1, 3), "linear": normal(2, 4, 5), "scale": normal(3)}
    weights = {name: w.to(dtype) for name, w in weights.items()}
    raw = {name: normal(10 + i, *w.shape).to(dtype) for i, (name, w) in enumerate(weights.items())}
    scaled = normalize_direction(raw, weights)
    for name in ("conv", "linear"):
        for d, w, r in zip(scaled[name], weights[name], raw[name], strict=True):
            norm = math.sqrt(sum(v * v for v in w.flatten().tolist()))
            length = math.sqrt(sum(v * v for v in r.flatten().tolist()))
            expected = [v * norm / (length + 1e-10) for v in r.flatten().tolist()]
            assert d.flatten().tolist() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-5)
    assert not scaled["norm"].any() and not scaled["scale"].any()
    assert all(scaled[name].dtype == dtype and scaled[name].shape == w.shape for name, w in weights.items())


def test_ignored_and_zero_filters_and_half_precision():
    weights = {"a": normal(0, 3, 4), "b": normal(1, 2, 4)}
    weights["b"][0] = 0  # nothing to scale by
    whole, without = (
        filter_normalized_direction(weights, generator=torch.Generator().manual_seed(3), ignore=ignore)
        for ignore in ((), ("a",))
    )
    assert torch.equal(whole["b"], without["b"]) and not without["a"].any() and bool(whole["a"].any())
    assert not whole["b"][0].any() and bool(whole["b"][1].any())
    dead = normalize_direction({"a": torch.zeros(3, 4), "b": whole["b"]}, weights)
    assert not dead["a"].any()  # a direction without length stays one, no NaN
    half = {name: w.half() for name, w in weights.items()}
    small = filter_normalized_direction(half, generator=torch.Generator().manual_seed(3))
    single = filter_normalized_direction(
        {name: w.float() for name, w in half.items()}, generator=torch.Generator().manual_seed(3)
    )
    for name, d in small.items():
        assert d.dtype == torch.float16
        torch.testing.assert_close(d.float(), single[name], atol=2e-3, rtol=1e-3)


def test_direction_errors():
    weights, generator = {"a": torch.ones(2, 2)}, torch.Generator()
    for call, match in (
        (lambda: filter_normalized_direction({}, generator=generator), "weights: got none"),
        (lambda: filter_normalized_direction({"a": torch.ones(2, 2).long()}, generator=generator), "int64"),
        (lambda: filter_normalized_direction(weights, generator=generator, ignore=["b"]), r"ignore: .*\['b'\]"),
        (lambda: filter_normalized_direction(weights, generator=generator, ignore="a"), "ignore: got the text"),
        (lambda: filter_normalized_direction(weights, generator=0), "generator: got 0"),
        (lambda: normalize_direction({"b": torch.ones(2, 2)}, weights), r"direction: names differ in \['a', 'b'\]"),
        (lambda: normalize_direction({"a": torch.ones(2, 3)}, weights), "direction: a has shape"),
        (lambda: normalize_direction(weights, {"a": torch.full((2, 2), math.nan)}), r"NaN or infinity in \[a\]"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ------------------------------------------------------------------ coordinates
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 60), st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1)
)
def test_coordinates_recover_the_coefficients_of_a_combination(seed, size, wanted):
    dx, dy = normal(seed, size), 10 * normal(seed + 1, size)
    angle = abs(float(torch.nn.functional.cosine_similarity(dx, dy, dim=0)))
    if angle > 0.999:  # nearly parallel by chance: coordinates are defined, only badly
        return
    coefficients = torch.tensor(wanted, dtype=torch.float64)
    points = coefficients @ torch.stack([dx, dy])
    torch.testing.assert_close(project(points, dx, dy), coefficients, atol=1e-8, rtol=0)
    normals = torch.linalg.qr(torch.stack([dx, dy], dim=1), mode="complete")[0][:, 2:]
    off = points + normal(seed + 2, len(wanted), size - 2) @ normals.T if size > 2 else points
    torch.testing.assert_close(project(off, dx, dy), coefficients, atol=1e-8, rtol=0)


def test_coordinates_of_named_tensors_in_any_number_of_blocks(monkeypatch):
    dx, dy = ({"a": normal(s, 3, 4), "b": normal(s + 1, 5)} for s in (0, 2))
    rows = [{name: 2.5 * dx[name] - s * dy[name] for name in dx} for s in range(3)]
    expected = torch.tensor([[2.5, -0.0], [2.5, -1], [2.5, -2]], dtype=torch.float64)
    for size in (64 * 2**20, 1, 100):
        monkeypatch.setattr(landscape_math, "BLOCK_BYTES", size)
        torch.testing.assert_close(project(rows, dx, dy), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(project(rows[1], dx, dy), expected[1:2], atol=1e-12, rtol=0)
        reordered = {name: dx[name] for name in ("b", "a")}  # names decide, not their order
        torch.testing.assert_close(project(rows, reordered, dy), expected, atol=1e-12, rtol=0)


def test_projection_errors():
    x, y = normal(0, 5), normal(1, 5)
    for call, match in (
        (lambda: project(x, x, -3 * x), "parallel or 0"),
        (lambda: project(x, 0 * x, y), "parallel or 0"),
        (lambda: project(x, x, 0 * y), "parallel or 0"),
        (lambda: project(x[:1], x[:1], y[:1]), "parallel or 0"),
        (lambda: project(x, x * float("nan"), y), "NaN or infinity"),
        (lambda: project(normal(0, 2, 4), x, y), "points: got 4 parameters; accepted are the 5"),
        (lambda: project(normal(0, 2, 6), x, y), "points: they have more than the 5"),
        (lambda: project(x, {"a": x}, y), "dx: got dict"),
        (lambda: project({"a": x}, x, y), "dx: got Tensor"),
        (lambda: project({"a": x}, {"a": x}, {"b": y}), r"dy: got \[b\]"),
        (lambda: project(torch.arange(5), x, y), "points: got torch.int64"),
        (lambda: project([], x, y), "points: got"),
        (lambda: project([{"a": x}, {"a": x, "b": y}], {"a": x}, {"a": y}), r"number 1 differs .* \[b\]"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---------------------------------------------------------------- principal plane
@pytest.mark.parametrize("block", [64 * 2**20, 100])
@pytest.mark.parametrize(("count", "size", "offset"), [(3, 2, 0.0), (3, 50, 1.0), (9, 40, 1e4), (30, 7, 1.0)])
def test_principal_plane_against_a_singular_value_decomposition(monkeypatch, block, count, size, offset):
    monkeypatch.setattr(landscape_math, "BLOCK_BYTES", block)
    snapshots = offset + normal(count, count, size).cumsum(0)
    plane = pca_directions(snapshots)
    moved = snapshots.numpy() - snapshots.numpy()[-1]
    _, values, vectors = np.linalg.svd(moved - moved.mean(0), full_matrices=False)
    found = np.stack([plane.dx, plane.dy])
    signs = np.sign((found * vectors[:2]).sum(1, keepdims=True))
    np.testing.assert_allclose(found, signs * vectors[:2], atol=1e-9)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-14)
    np.testing.assert_allclose(plane.explained, values[:2] ** 2 / (values**2).sum(), atol=1e-10)
    expected = np.linalg.lstsq(found.T, moved.T, rcond=None)[0].T
    np.testing.assert_allclose(plane.coordinates, expected, atol=1e-9)
    assert not plane.coordinates[-1].any() and (plane.coordinates[0] <= 0).all()


def test_principal_plane_of_named_tensors_is_that_of_the_matrix():
    rows = [{"a": normal(s, 3, 4), "b": normal(50 + s, 5)} for s in range(6)]
    named = pca_directions(rows)
    plain = pca_directions(torch.stack([torch.cat([row["a"].flatten(), row["b"]]) for row in rows]))
    assert named.dx["a"].shape == (3, 4) and [*named.dy] == ["a", "b"]
    for ours, vector in ((named.dx, plain.dx), (named.dy, plain.dy)):
        torch.testing.assert_close(torch.cat([ours["a"].flatten(), ours["b"]]), vector, atol=1e-12, rtol=0)
    torch.testing.assert_close(named.coordinates, plain.coordinates, atol=1e-12, rtol=0)


def test_principal_plane_errors():
    line = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None] * normal(0, 8)
    broken = normal(1, 5, 8)
    broken[3, 2] = math.nan
    for snapshots, match in (
        (normal(0, 2, 8), "snapshots: got 2; accepted are at least 3"),
        (normal(0, 1, 8).expand(4, 8), "all 4 are equal"),
        (line, "lie on one line"),
        (normal(0, 5, 1), "lie on one line"),
        (broken, "number 3 .* NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=match):
            pca_directions(snapshots)
