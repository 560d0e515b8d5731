"""Twenty seeds of random matrices against the formulas as nested loops, and what must hold between the figures.

Beside ``test_matrix.py``: matrices that are only known on and below the diagonal, every kind of forgetting with and
without the last task, averages over steps, chosen tasks and weights, the streams' own lists of seen tasks.
"""

import math

import numpy as np
import pytest

from avalanche_firn.evaluation.matrix import (
    FORGETTING_KINDS,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_accuracy,
    last_accuracy,
)

SEEDS = range(20)
KINDS = ("max_seen", "diag", "max_all")


def drawn(seed, *, known="full"):
    """R (T, N) with T in 1..8 and N >= T, and the baseline (N,); ``known`` says which entries aren't NaN."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 9))
    tasks = steps + int(rng.integers(0, 3))
    matrix, base = rng.random((steps, tasks)) * rng.choice([1.0, 100.0]), rng.random(tasks)
    for t in range(steps):
        for i in range(tasks):
            if i > t + {"lower": 0, "next": 1, "full": tasks}[known]:
                matrix[t, i] = math.nan
    return matrix, base


def mean(values):
    return sum(values) / len(values) if values else math.nan


def forgetting_by_hand(matrix, kind, include_last, tasks=None):
    steps = len(matrix)
    if steps == 1:
        return math.nan
    lost = []
    for i in range(steps if include_last else steps - 1):
        if tasks is not None and i not in tasks:
            continue
        best = -math.inf
        for t in range(steps):
            counts = {
                "max_seen": i <= t <= steps - 2 or i == t == steps - 1,  # the last task has no earlier step
                "diag": t == i,
                "max_all": True,
            }[kind]
            if counts and not math.isnan(matrix[t][i]) and matrix[t][i] > best:
                best = matrix[t][i]
        lost.append(best - matrix[steps - 1][i])
    return mean(lost)


def close(value):
    return pytest.approx(value, abs=1e-11, nan_ok=True)


@pytest.mark.parametrize("known", ["full", "lower"])
@pytest.mark.parametrize("seed", SEEDS)
def test_forgetting(seed, known):
    matrix, _ = drawn(seed, known=known)
    before = matrix.copy()
    for kind in KINDS:
        for include_last in (False, True):
            expected = forgetting_by_hand(matrix.tolist(), kind, include_last)
            assert forgetting(matrix, kind, include_last=include_last) == close(expected)
        some = [i for i in range(len(matrix)) if i % 2 == 0]
        assert forgetting(matrix, kind, tasks=some) == close(forgetting_by_hand(matrix.tolist(), kind, False, some))
        for t in range(len(matrix)):  # F_t, from the rows so far with and without the columns to come
            expected = forgetting_by_hand(matrix[: t + 1].tolist(), kind, False)
            assert forgetting(matrix[: t + 1], kind) == close(expected)
            assert forgetting(matrix[: t + 1, : t + 1], kind) == close(expected)
    for alias, kind in FORGETTING_KINDS.items():
        np.testing.assert_equal(forgetting(matrix, alias), forgetting(matrix, kind))
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("known", ["full", "lower"])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_holds_between_the_kinds(seed, known):
    matrix, _ = drawn(seed, known=known)
    steps = len(matrix)
    if steps == 1:
        assert all(math.isnan(forgetting(matrix, k, include_last=last)) for k in KINDS for last in (False, True))
        assert math.isnan(backward_transfer(matrix))
        return
    diag, seen, every = (forgetting(matrix, kind) for kind in ("diag", "max_seen", "max_all"))
    assert diag == -backward_transfer(matrix)
    assert every >= 0 and every >= seen - 1e-12 and seen >= diag - 1e-12
    if known == "lower":  # the last task was seen once: it only adds to the divisor
        for kind in KINDS:
            expected = forgetting(matrix, kind) * (steps - 1) / steps
            assert forgetting(matrix, kind, include_last=True) == close(expected)
        rising = np.sort(np.where(np.isnan(matrix), -1, matrix), axis=0)
        rising[rising < 0] = math.nan
        assert forgetting(rising, "max_all") == 0 and forgetting(rising, "max_seen") <= 0
        falling = matrix.copy()
        for i in range(steps):
            falling[i:, i] = np.sort(matrix[i:, i])[::-1]
        assert forgetting(falling, "max_seen") == forgetting(falling, "max_all") == forgetting(falling, "diag") >= 0
    shift, factor = 3.5, 0.25  # a difference of accuracies: the unit passes through, a common offset doesn't
    for kind in KINDS:
        assert forgetting(matrix * factor + shift, kind) == close(forgetting(matrix, kind) * factor)


@pytest.mark.parametrize("known", ["full", "lower"])
@pytest.mark.parametrize("seed", SEEDS)
def test_backward_transfer_and_averages(seed, known):
    matrix, _ = drawn(seed, known=known)
    before, rows = matrix.copy(), matrix.tolist()
    steps = len(rows)
    gains = [rows[steps - 1][i] - rows[i][i] for i in range(steps - 1)]
    assert backward_transfer(matrix) == close(mean(gains))
    assert backward_transfer(matrix, tasks=[0]) == close(gains[0] if gains else math.nan)
    averages = [mean([rows[t][i] for i in range(t + 1)]) for t in range(steps)]
    for t in range(steps):
        assert average_accuracy(matrix[: t + 1]) == close(averages[t])
    assert average_incremental_accuracy(matrix) == close(mean(averages))
    weights = np.random.default_rng(seed + 99).integers(0, 4, matrix.shape[1])
    chosen = list(range(0, steps, 2))
    total = sum(int(weights[i]) for i in chosen)
    expected = sum(int(weights[i]) * rows[-1][i] for i in chosen) / total if total else math.nan
    assert average_accuracy(matrix, tasks=chosen, weights=weights) == close(expected)
    # the average fell by what was forgotten: A_T = mean of the diagonal + BWT (T-1) / T
    diagonal = mean([rows[i][i] for i in range(steps)])
    fallen = backward_transfer(matrix) * (steps - 1) / steps if steps > 1 else 0
    assert average_accuracy(matrix) == close(diagonal + fallen)
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("known", ["full", "next"])
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_transfer_reads_the_entries_above_the_diagonal_only(seed, known):
    matrix, base = drawn(seed, known=known)
    before = matrix.copy(), base.copy()
    steps = len(matrix)
    gains = [float(matrix[i - 1][i]) - float(base[i]) for i in range(1, steps)]
    assert forward_transfer(matrix, base) == close(mean(gains))
    some = [i for i in range(steps) if i % 2]
    assert forward_transfer(matrix, base, tasks=some) == close(mean([gains[i - 1] for i in some]))
    assert math.isnan(forward_transfer(matrix))
    other = np.full_like(matrix, math.nan)
    for i in range(1, steps):
        other[i - 1, i] = matrix[i - 1, i]
    np.testing.assert_equal(forward_transfer(other, base), forward_transfer(matrix, base))
    np.testing.assert_array_equal(matrix, before[0])
    np.testing.assert_array_equal(base, before[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_pooled_accuracies(seed):
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 9))
    tasks = steps + int(rng.integers(0, 3))
    total = rng.integers(0, 20, tasks)
    correct = rng.integers(0, total + 1, (steps, tasks)).astype(float)
    order = rng.permutation(tasks).tolist()  # tasks are trained in another order than they are numbered
    seen = [sorted(order[: t + 1]) for t in range(steps)]
    unseen = correct.copy()
    for t in range(steps):
        for i in range(tasks):
            if i not in seen[t]:
                unseen[t, i] = rng.choice([math.nan, -1])
    before = unseen.copy(), total.copy(), [list(s) for s in seen]
    pooled, rounded = [], []
    for t in range(steps):
        hits = samples = 0
        for i in seen[t]:
            hits += int(correct[t, i])
            samples += int(total[i])
        if samples:
            pooled.append(hits / samples)
            rounded.append(np.around(100 * hits / samples, 2) / 100)
    samples = sum(int(total[i]) for i in seen[-1])
    last = sum(int(correct[-1, i]) for i in seen[-1]) / samples if samples else math.nan
    assert last_accuracy(unseen, total, seen=seen) == close(last)
    assert incremental_accuracy(unseen, total, seen=seen) == close(mean(pooled))
    assert incremental_accuracy(unseen, total, seen=seen, rounded="percent2") == close(mean(rounded))
    np.testing.assert_array_equal(unseen, before[0])
    np.testing.assert_array_equal(total, before[1])
    assert seen == before[2]
    equal = np.full(tasks, 7)  # equally large tasks: pooled and task means agree
    counts = rng.integers(0, 8, (steps, tasks))
    assert last_accuracy(counts, equal) == close(average_accuracy(counts / 7))
    assert incremental_accuracy(counts, equal) == close(average_incremental_accuracy(counts / 7))


def test_lists_are_accepted_and_left_alone():
    rows = [[90.0, math.nan, math.nan], [80.0, 85.0, math.nan], [70.0, 88.0, 95.0]]
    before = [list(row) for row in rows]
    array = np.asarray(rows)
    for figure in (forgetting, backward_transfer, average_accuracy, average_incremental_accuracy):
        assert figure(rows) == figure(array)
    np.testing.assert_equal(rows, before)
