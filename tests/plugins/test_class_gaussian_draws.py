"""Draws of the class Gaussians: the documented order, the law, and what must not change them."""

import math

import pytest
import torch

from avalanche_firn.plugins.class_statistics import ClassGaussians, class_statistics

FORMS = ("low_rank", "cholesky")


def features(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    shift = 3 * torch.randn(d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift).to(dtype)


def by_loop(rows, jitter):
    n, d = len(rows), len(rows[0])
    mean = [sum(row[j] for row in rows) / n for j in range(d)]
    covariance = [[jitter * (i == j) for j in range(d)] for i in range(d)]
    for i in range(d):
        for j in range(d):
            if n > 1:
                covariance[i][j] += sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (n - 1)
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)


def helmert(n):
    """The (n - 1, n) contrasts, entry by entry."""
    matrix = torch.zeros(n - 1, n, dtype=torch.float64)
    for i in range(1, n):
        matrix[i - 1, :i] = 1 / math.sqrt(i * (i + 1))
        matrix[i - 1, i] = -i / math.sqrt(i * (i + 1))
    return matrix


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def expected_draws(rows_of, ids, n, seed, scale, jitter, form):
    """The documented draw order and the definition of the law, class by class, in float64."""
    generator = torch.Generator().manual_seed(seed)
    d = next(iter(rows_of.values())).shape[1]
    z = torch.randn(len(ids), n, d, generator=generator).double()
    out = torch.empty_like(z)
    ranks = [d if form == "cholesky" or len(rows_of[c]) > d else len(rows_of[c]) - 1 for c in ids]
    for rank in dict.fromkeys(ranks):
        positions = [p for p, r in enumerate(ranks) if r == rank]
        for start in range(0, len(positions), 16):
            chunk = positions[start : start + 16]
            w = torch.randn(len(chunk), n, rank + 1, generator=generator).double() if rank < d else None
            for k, p in enumerate(chunk):
                rows = rows_of[ids[p]]
                mean = rows.mean(0)
                if w is None:
                    factor = torch.linalg.cholesky(by_loop(rows.tolist(), jitter)[1])
                    noise = z[p] @ factor.T
                else:
                    factor = helmert(len(rows)) @ (rows - mean) / math.sqrt(max(rank, 1))
                    noise = w[k, :, :rank] @ factor + math.sqrt(jitter) * z[p]
                out[p] = scale[p] * mean + noise
    return out


@pytest.mark.parametrize("form", FORMS)
def test_draws_follow_the_documented_order(form):
    sizes = {10 * c + 7: (4, 9, 1, 4, 30, 2)[c % 6] for c in range(50)}  # several ranks, interleaved, beyond one chunk
    rows_of = {c: features(n, 6, seed=c) for c, n in sizes.items()}
    gaussians = ClassGaussians(form, jitter=0.01)
    for class_id, rows in rows_of.items():
        gaussians.add(class_id, rows)
    scale = torch.linspace(0.9, 1.0, 50, dtype=torch.float64)
    for ids in (list(sizes), list(sizes)[::-1], list(sizes)[3:9], list(sizes)[::2] + list(sizes)[1::2]):
        some = scale[: len(ids)]
        draws = gaussians.sample(ids, 5, torch.Generator().manual_seed(3), some)
        close(draws, expected_draws(rows_of, ids, 5, 3, some, 0.01, form), 1e-11)


def test_wide_triangular_factor_is_applied_in_blocks():
    rows = {c: features(450, 400, seed=c) / 20 for c in range(2)}
    gaussians = ClassGaussians()
    for class_id, class_rows in rows.items():
        gaussians.add(class_id, class_rows)
    draws = gaussians.sample([0, 1], 7, torch.Generator().manual_seed(1))
    noise = torch.randn(2, 7, 400, generator=torch.Generator().manual_seed(1)).double()
    for class_id, class_rows in rows.items():
        mean, covariance = class_statistics(class_rows)
        close(draws[class_id], mean + noise[class_id] @ torch.linalg.cholesky(covariance).T, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [4, 40])
def test_the_law(form, n):
    rows = features(n, 8) / 3
    gaussians = ClassGaussians(form, jitter=0.05)
    gaussians.add(0, rows)
    draws = gaussians.sample([0], 200_000, torch.Generator().manual_seed(0), torch.tensor([0.9]))[0]
    mean, covariance = class_statistics(rows, 0.05)
    spread = covariance.diagonal().max().sqrt()
    close(torch.cov(draws.T), covariance, 0.02 * float(covariance.abs().max()))
    close(draws.mean(0), 0.9 * mean, 0.02 * float(spread))
    # A Gaussian along a random direction, not only its first two moments.
    direction = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    standard = (draws - 0.9 * mean) @ direction / (direction @ covariance @ direction).sqrt()
    assert abs(standard.pow(4).mean() - 3) < 0.05 and abs((standard.abs() < 1).double().mean() - 0.6827) < 0.005


@pytest.mark.parametrize("form", FORMS)
def test_same_generator_state_same_samples_and_both_dtypes_see_the_same_noise(form):
    narrow, wide = ClassGaussians(form), ClassGaussians(form, dtype=torch.float64)
    for class_id in range(3):
        for gaussians in (narrow, wide):
            gaussians.add(class_id, features(5 + 4 * class_id, 8, class_id, torch.float32))
    first, again = (narrow.sample([0, 1, 2], 16, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert not torch.equal(first, narrow.sample([0, 1, 2], 16, torch.Generator().manual_seed(8)))
    close(first.double(), wide.sample([0, 1, 2], 16, torch.Generator().manual_seed(9)), 1e-4)


def test_cholesky_form_draws_one_block_of_normals():
    gaussians = ClassGaussians("cholesky")
    for class_id in range(3):
        gaussians.add(class_id, features(4, 8, class_id))
    generator, expected = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    gaussians.sample([0, 1, 2], 16, generator)
    torch.randn(3, 16, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_private_generator_leaves_the_global_one_alone():
    gaussians = ClassGaussians()
    gaussians.add(0, features(4, 8))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    gaussians.sample([0], 4, torch.Generator().manual_seed(2))
    assert torch.equal(before, torch.get_rng_state())
    gaussians.sample([0], 4)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("form", FORMS)
def test_relative_jitter_draws_with_each_class_its_own(form):
    gaussians = ClassGaussians(form, jitter=0.5, relative_jitter=True)
    rows_of = {c: features(4, 6, c) * 10.0**c for c in range(3)}
    for class_id, rows in rows_of.items():
        gaussians.add(class_id, rows)
    draws = gaussians.sample([0, 1, 2], 50_000, torch.Generator().manual_seed(0))
    for class_id in range(3):
        expected = gaussians.covariance(class_id)
        close(torch.cov(draws[class_id].T), expected, 0.05 * float(expected.abs().max()))


def test_no_jitter_stays_in_the_span_of_the_samples():
    rows = features(3, 6)
    gaussians = ClassGaussians(jitter=0.0)
    gaussians.add(0, rows)
    draws = gaussians.sample([0], 9, torch.Generator().manual_seed(0))[0] - rows.mean(0)
    assert torch.linalg.matrix_rank(draws, atol=1e-9) == 2


def test_out_is_filled_and_autocast_changes_nothing():
    gaussians = ClassGaussians()
    for class_id in range(4):
        gaussians.add(class_id, features(3 + 7 * (class_id % 2), 8, class_id, torch.float32))
    expected = gaussians.sample([0, 1, 2, 3], 6, torch.Generator().manual_seed(0))
    out = torch.full((4, 6, 8), math.nan)
    with torch.autocast("cpu", torch.bfloat16):
        assert gaussians.sample([0, 1, 2, 3], 6, torch.Generator().manual_seed(0), out=out) is out
    assert torch.equal(out, expected)
    for wrong in (out[:3], out.double(), out.transpose(1, 2)):
        with pytest.raises(ValueError, match="out: expected a contiguous"):
            gaussians.sample([0, 1, 2, 3], 6, out=wrong)


def test_replace_takes_effect_after_a_draw():
    gaussians = ClassGaussians()
    for class_id in range(3):
        gaussians.add(class_id, features(3, 5, class_id))
    gaussians.sample([0, 1, 2], 2)
    for n in (3, 4, 20):  # the same rank, another one, a triangular factor
        rows = features(n, 5, 50 + n)
        gaussians.add(1, rows, replace=True)
        assert gaussians.class_ids == (0, 1, 2)
        rows_of = {0: features(3, 5, 0), 1: rows, 2: features(3, 5, 2)}
        expected = expected_draws(rows_of, [0, 1, 2], 4, 6, [1, 1, 1], 1e-4, "low_rank")
        close(gaussians.sample([0, 1, 2], 4, torch.Generator().manual_seed(6)), expected, 1e-10)
