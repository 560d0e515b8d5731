"""Intervals against scipy's own and against coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from avalanche_firn.evaluation.statistics import Interval, curve_interval, mean_interval, paired_difference


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_equals_scipy(n, confidence):
    values = np.random.default_rng(n).normal(0.8, 0.05, n)
    got = mean_interval(values, confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (got.lower, got.upper) == pytest.approx((low, high), rel=1e-12)
    assert got.mean == pytest.approx(values.mean()) and got.std == pytest.approx(values.std(ddof=1)) and got.n == n


def test_three_seeds_by_hand():
    got = mean_interval([0.8, 0.9, 1.0])
    quantile = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # closed form for two degrees of freedom: 4.3027
    assert got.half_width == pytest.approx(quantile * 0.1 / math.sqrt(3), rel=1e-9)  # older SciPy: 1e-11
    assert got.format() == "90.00 ± 24.84" and got.format(scale=1, digits=3) == "0.900 ± 0.248"


def test_one_seed_has_no_interval():
    got = mean_interval([0.5])
    assert got == Interval(mean=0.5, lower=None, upper=None, std=None, n=1)
    assert got.half_width is None and got.format() == "50.00" and got.to_dict()["lower"] is None


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_missing_values_are_refused(values):
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_confidence_is_checked():
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1, 2], confidence=95)


def test_paired_difference_removes_the_common_part():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 5)
    first, second = common + 0.1 + 0.001 * rng.normal(size=5), common
    assert mean_interval(first).half_width > 0.5
    difference = paired_difference(first.tolist(), second.tolist())
    assert difference.lower > 0 and difference.mean == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="equal numbers"):
        paired_difference([1.0], [1.0, 2.0])


def test_curves_with_holes():
    nan = float("nan")
    mean, lower, upper = curve_interval([[1, 2, nan, nan], [3, nan, 5, nan]])
    np.testing.assert_array_equal(mean, [2, 2, 5, nan])
    assert np.isnan(lower[1:]).all() and np.isnan(upper[1:]).all()
    expected = mean_interval([1, 3])
    assert (lower[0], upper[0]) == pytest.approx((expected.lower, expected.upper))
    with pytest.raises(ValueError, match="shape"):
        curve_interval([1.0, 2.0])


def test_coverage_of_three_seeds():
    rng = np.random.default_rng(1)
    hits = [(i := mean_interval(rng.normal(0, 1, 3))).lower <= 0 <= i.upper for _ in range(2000)]
    assert 0.93 < np.mean(hits) < 0.97
