"""Class Gaussians against the golden numbers, explicit loops, and what the docstrings promise."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# ------------------------------------------------------------------ moments
@pytest.mark.parametrize("case", ["tall", "wide", "two", "offset"])
def test_golden_statistics(golden, case):
    file = golden("slca", "class_statistics")
    rows = torch.from_numpy(file[f"{case}_features"])
    mean, covariance = class_statistics(rows.double(), float(file["jitter"]))
    close(mean, file[f"{case}_mean"], 1e-10)
    close(covariance, file[f"{case}_cov"], 1e-10)
    mean, covariance = class_statistics(rows, float(file["jitter"]))
    assert mean.dtype == covariance.dtype == torch.float32
    close(mean, file[f"{case}_mean"], 1e-6 * abs(file[f"{case}_mean"]).max())
    close(covariance, file[f"{case}_cov"], 1e-6 * abs(file[f"{case}_cov"]).max())
    for form in FORMS:
        gaussians = ClassGaussians(form, jitter=float(file["jitter"]))
        gaussians.add(5, rows.double())
        close(gaussians.mean([5])[0], file[f"{case}_mean"], 1e-10)
        close(gaussians.covariance(5), file[f"{case}_cov"], 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_golden_store_grows(golden, form):
    file = golden("slca", "class_statistics")
    rows, labels = torch.from_numpy(file["store_features"]), torch.from_numpy(file["store_labels"])
    gaussians, other_jitter = ClassGaussians(form), ClassGaussians(form, jitter=1e-5)
    for task in ((0, 1), (2, 3)):
        for class_id in task:
            gaussians.add(class_id, rows[labels == class_id])
            other_jitter.add(class_id, rows[labels == class_id])
        gaussians.sample(gaussians.class_ids, 2)  # the cached stacks must not go stale
    assert gaussians.class_ids == (0, 1, 2, 3) and len(gaussians) == 4 and 3 in gaussians and 4 not in gaussians
    close(gaussians.mean(torch.arange(4)), file["store_mean"], 1e-10)
    for class_id in range(4):
        close(gaussians.covariance(class_id), file["store_cov"][class_id], 1e-9)
    for class_id in range(2):
        close(other_jitter.covariance(class_id), file["store_cov_jitter1e5_first_two"][class_id], 1e-9)


@given(n=st.integers(1, 9), d=st.integers(1, 7), seed=st.integers(0, 99), jitter=st.sampled_from([1e-4, 0.3]))
@settings(max_examples=40, deadline=None)
def test_equals_the_loop_in_both_forms(n, d, seed, jitter):
    rows = features(n, d, seed)
    expected_mean, expected_covariance = by_loop(rows.tolist(), jitter)
    mean, covariance = class_statistics(rows, jitter)
    close(mean, expected_mean, 1e-10)
    close(covariance, expected_covariance, 1e-10)
    for form in FORMS:
        gaussians = ClassGaussians(form, jitter)
        gaussians.add(0, rows)
        close(gaussians.covariance(0), expected_covariance, 1e-9)


@given(seed=st.integers(0, 99), shift=st.floats(-1e3, 1e3))
@settings(max_examples=20, deadline=None)
def test_covariance_ignores_a_shift_and_the_order_of_samples(seed, shift):
    rows = features(6, 4, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = ClassGaussians()
    moved.add(0, rows[order] + shift)
    close(moved.covariance(0), by_loop(rows.tolist(), 1e-4)[1], 1e-9)


def test_one_sample_gives_the_jitter_alone():
    rows = features(1, 6)
    mean, covariance = class_statistics(rows, 0.25)
    assert torch.equal(mean, rows[0]) and torch.equal(covariance, 0.25 * torch.eye(6, dtype=torch.float64))
    for form in FORMS:
        gaussians = ClassGaussians(form, 0.25)
        gaussians.add(3, rows)
        draws = gaussians.sample([3], 20_000, torch.Generator().manual_seed(0))[0]
        close(draws.mean(0), rows[0], 0.02)
        close(torch.cov(draws.T), 0.25 * torch.eye(6), 0.02)


def test_large_offset_in_float32_keeps_the_covariance():
    rows = (1e4 + features(12, 5)).float()
    gaussians = ClassGaussians()
    gaussians.add(0, rows)
    expected = by_loop(rows.double().tolist(), 1e-4)[1]
    close(gaussians.covariance(0), expected, 1e-6 * float(expected.abs().max()))


def test_half_precision_features_are_stored_in_float32():
    gaussians = ClassGaussians()
    gaussians.add(0, features(5, 4, dtype=torch.bfloat16))
    assert gaussians.mean([0]).dtype == gaussians.sample([0], 2).dtype == torch.float32
    assert class_statistics(features(5, 4, dtype=torch.float16))[0].dtype == torch.float16


def test_relative_jitter_is_a_fraction_of_the_mean_variance():
    rows = features(9, 4) * 100
    for form in FORMS:
        for n in (9, 3):  # triangular and low-rank factor
            gaussians = ClassGaussians(form, jitter=0.01, relative_jitter=True)
            gaussians.add(0, rows[:n])
            plain = class_statistics(rows[:n], 0.0)[1]
            expected = plain + 0.01 * plain.diagonal().mean() * torch.eye(4, dtype=torch.float64)
            close(gaussians.covariance(0), expected, 1e-9 * float(plain.max()))


# ---------------------------------------------------------- memory and state
def test_memory_of_thirty_samples_and_no_second_copy():
    gaussians = ClassGaussians()
    for class_id in range(5):
        gaussians.add(class_id, features(30, 768, class_id, torch.float32))
    assert gaussians.nbytes == 5 * 30 * 768 * 4 <= 5 * 0.1e6
    gaussians.sample(gaussians.class_ids, 2)
    gaussians.sample([2, 0], 2)
    storages = {rows.untyped_storage().data_ptr() for rows in gaussians._rows.values()}
    assert len(storages) == 1 and gaussians._rows[0].untyped_storage().nbytes() == gaussians.nbytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip_is_exact(form, dtype):
    def fill(gaussians, ids):
        for class_id in ids:
            gaussians.add(class_id, features(2 + 5 * (class_id % 3), 8, class_id, dtype))

    ids = [8, 3, 4, 1]
    original, copy = (ClassGaussians(form, 0.01, relative_jitter=True) for _ in range(2))
    fill(original, ids)
    state = original.state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist())  # nothing but tensors and plain values
    copy.load_state_dict(state)
    assert copy.class_ids == original.class_ids
    fill(original, [20, 21])
    fill(copy, [20, 21])
    ids += [20, 21]
    for class_id in ids:
        assert torch.equal(copy.covariance(class_id), original.covariance(class_id))
    samples = [gaussians.sample(ids, 5, torch.Generator().manual_seed(4)) for gaussians in (original, copy)]
    assert samples[0].dtype == dtype and torch.equal(*samples)
    for tensor in (group["rows"] for group in state["groups"]):
        tensor.zero_()
    assert torch.equal(copy.sample(ids, 5, torch.Generator().manual_seed(4)), samples[1])


def test_state_of_an_empty_store_and_of_other_settings():
    gaussians = ClassGaussians()
    gaussians.add(0, features(3, 4))
    state = gaussians.state_dict()
    gaussians.load_state_dict(ClassGaussians().state_dict())
    assert len(gaussians) == 0
    gaussians.add(0, features(3, 9))  # nothing of the old feature size is left
    for name, other in {
        "form": ClassGaussians("cholesky"),
        "jitter": ClassGaussians(jitter=1e-3),
        "relative_jitter": ClassGaussians(relative_jitter=True),
        "dtype": ClassGaussians(dtype=torch.float32),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: the state was made with"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="groups: inconsistent"):
        gaussians.load_state_dict({**state, "class_ids": [0, 1]})
    broken = [{**state["groups"][0], "noise": []}]
    with pytest.raises(ValueError, match=r"groups: the statistics of classes \[0\]"):
        gaussians.load_state_dict({**state, "groups": broken})
    assert gaussians.mean([0]).shape == (1, 9)


def test_to_moves_statistics_and_those_added_later():
    gaussians = ClassGaussians()
    gaussians.add(0, features(3, 4))
    before = gaussians.sample([0], 3, torch.Generator().manual_seed(0))
    assert gaussians.to("cpu") is gaussians
    assert torch.equal(gaussians.sample([0], 3, torch.Generator().manual_seed(0)), before)
    meta = ClassGaussians().to("meta")
    meta.to("cpu").add(0, features(3, 4))
    assert meta.mean([0]).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_cuda_gives_the_same_draws_from_a_cpu_generator(form):
    here, there = ClassGaussians(form), ClassGaussians(form).to("cuda")
    for class_id in range(20):
        for gaussians in (here, there):
            gaussians.add(class_id, features(3 + 7 * (class_id % 2), 8, class_id))
    expected = here.sample(here.class_ids, 6, torch.Generator().manual_seed(0))
    actual = there.sample(here.class_ids, 6, torch.Generator().manual_seed(0))
    assert actual.is_cuda
    close(actual.cpu(), expected, 1e-10)
    assert there.sample([1], 6, torch.Generator("cuda").manual_seed(0)).is_cuda
    here.to("cuda")
    close(here.sample(here.class_ids, 6, torch.Generator().manual_seed(0)).cpu(), expected, 1e-10)


# ------------------------------------------------------------- given moments
def test_given_moments_are_kept_as_they_are():
    mean, covariance = class_statistics(features(9, 5), 0.3)
    for form in FORMS:
        gaussians = ClassGaussians(form)
        gaussians.add_moments(2, mean, covariance)
        gaussians.add(1, features(3, 5))
        close(gaussians.mean([2])[0], mean, 0)
        close(gaussians.covariance(2), covariance, 1e-12)
        assert gaussians.sample([1, 2], 4).shape == (2, 4, 5)


def test_given_moments_are_checked():
    mean, covariance = torch.zeros(3), torch.eye(3)
    gaussians = ClassGaussians()
    asymmetric = covariance.clone()
    asymmetric[0, 1] = 0.5
    for error, match, moments in (
        (ValueError, r"mean of class 6: expected shape \(d,\)", (covariance, covariance)),
        (ValueError, r"covariance of class 6: got \(3, 3\) for 2 features", (mean[:2], covariance)),
        (ValueError, "covariance of class 6: not symmetric", (mean, asymmetric)),
        (ValueError, "class 6: the covariance is not positive definite", (mean, torch.diag(torch.tensor([1.0, 1, 0])))),
        (ValueError, "covariance of class 6: not finite", (mean, covariance * math.inf)),
        (TypeError, "mean of class 6: expected a floating-point tensor", ([0.0, 0.0, 0.0], covariance)),
    ):
        with pytest.raises(error, match=match):
            gaussians.add_moments(6, *moments)
    assert len(gaussians) == 0


# ------------------------------------------------------------------- errors
def test_unfit_features_are_named():
    good = features(4, 3)
    hole = good.clone()
    hole[1, 2] = math.nan
    for error, match, rows in (
        (ValueError, r"class 7: expected shape \(n, d\)", good[:0]),
        (ValueError, r"class 7: expected shape \(n, d\)", good[0]),
        (ValueError, r"class 7: expected shape \(n, d\)", good[:, :0]),
        (ValueError, "class 7: not finite", hole),
        (ValueError, "class 7: not finite", good / 0),
        (TypeError, "class 7: expected a floating-point tensor, got torch.int64", good.long()),
    ):
        with pytest.raises(error, match=match):
            ClassGaussians().add(7, rows)
        with pytest.raises(error, match="features: "):
            class_statistics(rows)
    gaussians = ClassGaussians()
    gaussians.add(1, good)
    with pytest.raises(ValueError, match="class 7: feature size 2, the other classes have 3"):
        gaussians.add(7, good[:, :2])
    with pytest.raises(ValueError, match=r"class 7: the statistics overflow torch\.float32"):
        ClassGaussians(dtype=torch.float32).add(7, good * 1e100)
    assert gaussians.class_ids == (1,)


def test_unfit_settings():
    for match, arguments in (
        ("form: 'full' is not accepted", {"form": "full"}),
        ("jitter: must be a finite number >= 0", {"jitter": -1e-4}),
        ("jitter: must be a finite number >= 0", {"jitter": math.nan}),
        ("dtype: torch.float16 is not accepted", {"dtype": torch.float16}),
    ):
        with pytest.raises(ValueError, match=match):
            ClassGaussians(**arguments)
    with pytest.raises(ValueError, match="jitter"):
        class_statistics(features(3, 2), jitter=-1.0)


def test_unfit_class_ids_and_sizes():
    gaussians = ClassGaussians()
    for class_id in (4, 2):
        gaussians.add(class_id, features(3, 5, class_id))
    with pytest.raises(KeyError, match=r"no statistics for classes \[3, 9\], known are \[2, 4\]"):
        gaussians.sample([2, 9, 3], 4)
    with pytest.raises(KeyError, match=r"\[0\]"):
        gaussians.covariance(0)
    with pytest.raises(ValueError, match=r"repeated classes \[2\]"):
        gaussians.sample(torch.tensor([2, 4, 2]), 4)
    with pytest.raises(ValueError, match="class_ids: empty"):
        gaussians.mean([])
    with pytest.raises(ValueError, match="n: must be at least 1, got 0"):
        gaussians.sample([2], 0)
    with pytest.raises(ValueError, match=r"mean_scale: expected shape \(2,\), got \(3,\)"):
        gaussians.sample([2, 4], 1, mean_scale=torch.ones(3))
    with pytest.raises(ValueError, match="class 4 is known already"):
        gaussians.add(4, features(3, 5))


def test_covariance_that_cannot_be_factored_names_class_and_settings():
    rows = features(3, 5) * 1e9
    with pytest.raises(ValueError, match=r"class 8: the covariance is not positive definite.*relative_jitter=True"):
        ClassGaussians("cholesky", jitter=0.0).add(8, rows)
    with pytest.raises(ValueError, match="class 8"):
        ClassGaussians("cholesky", relative_jitter=True).add(8, rows[:1])
    ClassGaussians("cholesky", relative_jitter=True).add(8, rows)
    ClassGaussians("low_rank").add(8, rows)
    ClassGaussians("low_rank", relative_jitter=True).add(8, rows[:1])
