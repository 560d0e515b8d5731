"""What several seeds say: a mean with its Student-t interval, and paired differences between methods.

Seeds are few (three to ten), so intervals use Student's t with ``n - 1`` degrees of freedom: with three seeds its
factor is 4.30, where a normal quantile would be 1.96 and the interval less than half as wide as it should be. One
seed gives a mean and *no* interval. Methods that ran on the same seeds (same class order, same data) are compared by
the interval of their per-seed differences, which removes the part of the spread that the seeds share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


@dataclass(frozen=True)
class Interval:
    """Mean of ``n`` values with a two-sided confidence interval; ``lower``, ``upper`` and ``std`` are None for n = 1.

    ``std`` is the sample standard deviation (divisor ``n - 1``). All numbers are in the unit of the values.
    """

    mean: float
    lower: float | None
    upper: float | None
    std: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval: what stands behind the plus-minus sign."""
        return None if self.upper is None else self.upper - self.mean

    def format(self, scale: float = 100.0, digits: int = 2) -> str:
        """``"87.31 ± 1.20"``, or ``"87.31"`` without an interval; ``scale=100`` turns fractions into percent."""
        half = self.half_width
        middle = f"{scale * self.mean:.{digits}f}"
        return middle if half is None else f"{middle} ± {scale * half:.{digits}f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"mean": self.mean, "lower": self.lower, "upper": self.upper, "std": self.std, "n": self.n}


def _factor(n: int, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}; accepted is a number between 0 and 1")
    return float(special.stdtrit(n - 1, 0.5 + confidence / 2)) if n > 1 else math.nan


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean and Student-t interval: ``mean ± t_{n-1} std / sqrt(n)``.

    Args:
        values: one finite number per seed.
        confidence: coverage, 0.95 by default.

    Raises:
        ValueError: no value, or one that is not finite (a missing seed must be left out by the caller, knowingly).
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values: got {array.tolist()}; accepted is a non-empty list of finite numbers")
    factor, mean = _factor(array.size, confidence), float(array.mean())
    if array.size == 1:
        return Interval(mean=mean, lower=None, upper=None, std=None, n=1)
    std = float(array.std(ddof=1))
    half = factor * std / math.sqrt(array.size)
    return Interval(mean=mean, lower=mean - half, upper=mean + half, std=std, n=int(array.size))


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of ``first[s] - second[s]`` over the seeds ``s`` that both methods ran, in the same order.

    An interval that excludes zero says that the methods differ; overlap of their separate intervals says little.
    """
    if len(first) != len(second):
        raise ValueError(f"paired difference: got {len(first)} and {len(second)} values; accepted are equal numbers")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], confidence)


def curve_interval(
    curves: ArrayLike, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean curve and interval at every point.

    Args:
        curves: (S, T) one row per seed; NaN where a seed has no value at that point.
        confidence: coverage.

    Returns:
        ``mean, lower, upper``, each (T,) float64. The interval is NaN at points with fewer than two values, the mean at
        points with none.
    """
    array = np.asarray(curves, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] == 0:
        raise ValueError(f"curves: got shape {array.shape}; accepted is (S, T) with S >= 1 seeds")
    mean, half = np.full(array.shape[1], np.nan), np.full(array.shape[1], np.nan)
    for t, column in enumerate(array.T):
        values = column[~np.isnan(column)]
        if values.size:
            interval = mean_interval(values, confidence)
            mean[t] = interval.mean
            half[t] = np.nan if interval.half_width is None else interval.half_width
    return mean, mean - half, mean + half
