"""Seeded subsets of labelled data: a few samples of every class, and a held-out part of every class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def few_shot_indices(
    targets: ArrayLike | Sequence[int] | Tensor, shots: int | float | None, seed: int
) -> NDArray[np.int64]:
    """A seeded subset with so many samples of every class; smaller subsets of one seed lie in larger ones.

    Args:
        targets: (n,) integer class ids >= 0.
        shots: an int is the exact number per class, a float in (0, 1] the fraction of every class (rounded, at least
            one sample), None takes everything.
        seed: integer >= 0. The choice within a class depends on the seed, the class id and the class's size only.

    Returns:
        Sorted positions, int64.

    Raises:
        TypeError: ``shots`` or ``seed`` of another type.
        ValueError: a class with fewer samples than ``shots`` (named in the text), values outside these ranges.
    """
    ids = _targets(targets)
    if shots is None:
        return np.arange(len(ids), dtype=np.int64)
    if isinstance(shots, bool) or not isinstance(shots, Real):
        raise TypeError(f"shots: got {shots!r}; accepted are an int >= 1, a float in (0, 1] and None")
    exact = isinstance(shots, Integral)
    if not (shots >= 1 if exact else 0 < shots <= 1):
        raise ValueError(f"shots: got {shots}; accepted are an int >= 1, a float in (0, 1] and None")
    chosen = []
    for class_id, order in _class_orders(ids, seed):
        if exact and shots > len(order):
            raise ValueError(f"shots: got {shots}, but class {class_id} has {len(order)} samples")
        chosen.append(order[: int(shots) if exact else max(1, math.floor(shots * len(order) + 0.5))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def holdout_split(
    targets: ArrayLike | Sequence[int] | Tensor, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into training and validation, class by class.

    Every class with two samples or more gives ``fraction`` of them (rounded, at least one) to validation and keeps at
    least one for training; a single sample stays in training. The validation part of a smaller fraction lies in that
    of a larger one.

    Args:
        targets: (n,) integer class ids >= 0.
        fraction: in (0, 1).
        seed: integer >= 0.

    Returns:
        Sorted positions of the training and of the validation samples, int64.

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: values outside these ranges.
    """
    ids = _targets(targets)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction}; accepted are numbers above 0 and below 1")
    validation = np.zeros(len(ids), dtype=bool)
    for _, order in _class_orders(ids, seed):
        wanted = max(1, math.floor(fraction * len(order) + 0.5))
        validation[order[len(order) - min(wanted, len(order) - 1) :]] = True
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def _targets(targets: ArrayLike | Sequence[int] | Tensor) -> NDArray[np.int64]:
    ids = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"targets: got {ids.dtype} of shape {ids.shape}; accepted are integers of one dimension")
    if ids.min() < 0:
        raise ValueError(f"targets: got {ids.min()}; accepted are class ids >= 0")
    return ids.astype(np.int64)


def _class_orders(ids: NDArray[np.int64], seed: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Positions of every class in the order of its own seeded permutation."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed: got {seed!r}; accepted are integers >= 0")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}; accepted are integers >= 0 below 2**32")
    orders = []
    for class_id in np.unique(ids):
        positions = np.flatnonzero(ids == class_id)
        orders.append((int(class_id), np.random.RandomState([int(seed), int(class_id)]).permutation(positions)))
    return orders


__all__ = ["few_shot_indices", "holdout_split"]
