"""The figures against nested loops, against published code (golden numbers), and their edge cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.evaluation.matrix import (
    NotEvaluatedError,
    ResultMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_accuracy,
    last_accuracy,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "lp_ft" / "matrix_metrics.npz"
NAN = float("nan")
HAND = np.array([[90, NAN, NAN], [80, 85, NAN], [70, 88, 95]])  # worked by hand


def lower(matrix):
    return np.where(np.tril(np.ones_like(matrix)) > 0, matrix, np.nan)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.mark.parametrize("name", ["hand3", "full3", "two", "rand5_low", "rand6_full"])
def test_golden_numbers_of_the_reference_codes(golden, name):
    def ref(key):
        return golden[f"{name}/{key}"]

    matrix, weights = ref("matrix"), ref("classes_per_task")
    before = matrix.copy()
    assert forgetting(matrix, "max_all") == pytest.approx(float(ref("ucl_metrics_forgetting")), abs=1e-10)
    every = forgetting(matrix, "max_all", include_last=True)
    assert every == pytest.approx(float(ref("ucl_first_forgetting")), abs=1e-10)
    assert backward_transfer(matrix) == pytest.approx(float(ref("ucl_backward_transfer")), abs=1e-10)
    assert average_accuracy(matrix, tasks=range(matrix.shape[1])) == pytest.approx(
        float(ref("ucl_first_avg")), abs=1e-10
    )
    if f"{name}/ucl_forward_transfer" in golden:
        transfer = forward_transfer(matrix, ref("baseline"))
        assert transfer == pytest.approx(float(ref("ucl_forward_transfer")), abs=1e-10)
    for t in range(len(matrix)):
        block, triangle = matrix[: t + 1, : t + 1], lower(matrix)[: t + 1, : t + 1]
        assert average_accuracy(block) == pytest.approx(ref("ucl_head_avg_per_step")[t], abs=1e-10)
        assert average_accuracy(matrix[: t + 1]) == pytest.approx(ref("facil_avg_per_step")[t], abs=1e-10)
        weighted = average_accuracy(matrix[: t + 1], weights=weights)
        assert weighted == pytest.approx(ref("facil_weighted_avg_per_step")[t], abs=1e-10)
        per_step = ref("ucl_head_forgetting_per_step")[t]
        assert forgetting(block, "diag") == pytest.approx(per_step, abs=1e-10, nan_ok=True)
        if t:
            assert forgetting(block, "diag") == pytest.approx(
                ref("avalanche_forgetting_matrix")[t, :t].mean(), abs=1e-10
            )
            facil = ref("facil_forgetting_matrix")[t, :t].mean()
            assert forgetting(triangle, "max_seen") == pytest.approx(facil, abs=1e-10)
            assert forgetting(matrix[: t + 1], "max_seen") == pytest.approx(facil, abs=1e-10)
    aia = ref("ucl_head_avg_per_step").mean()
    assert average_incremental_accuracy(matrix) == pytest.approx(aia, abs=1e-10)
    np.testing.assert_array_equal(matrix, before)


def test_worked_example():
    assert average_accuracy(HAND) == pytest.approx(253 / 3)
    assert forgetting(HAND, "diag") == forgetting(HAND, "after_training") == 8.5
    assert forgetting(HAND) == forgetting(HAND, "max") == forgetting(HAND, "max_seen") == 8.5
    assert forgetting(HAND, "max_all") == 10
    assert forgetting(HAND, "max_all", include_last=True) == pytest.approx(20 / 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31 - 1))
def test_against_nested_loops(steps, extra, seed):
    rng = np.random.default_rng(seed)
    matrix, base = rng.random((steps, steps + extra)), rng.random(steps + extra)
    total = rng.integers(0, 9, steps + extra)
    correct = rng.integers(0, total + 1, (steps, steps + extra))

    average = sum(matrix[steps - 1][i] for i in range(steps)) / steps
    assert average_accuracy(matrix) == pytest.approx(average, abs=1e-12)
    losses = {"max_seen": [], "diag": [], "max_all": []}
    for i in range(steps - 1):
        last = matrix[steps - 1][i]
        losses["max_seen"].append(max(matrix[t][i] for t in range(i, steps - 1)) - last)
        losses["diag"].append(matrix[i][i] - last)
        losses["max_all"].append(max(matrix[t][i] for t in range(steps)) - last)
    for kind, values in losses.items():
        expected = sum(values) / len(values) if values else NAN
        assert forgetting(matrix, kind) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert forgetting(matrix, "max_seen") >= forgetting(matrix, "diag") - 1e-12 or steps == 1
    gains = [matrix[i - 1][i] - base[i] for i in range(1, steps)]
    expected = sum(gains) / len(gains) if gains else NAN
    assert forward_transfer(matrix, base) == pytest.approx(expected, abs=1e-12, nan_ok=True)

    pooled = []
    for t in range(steps):
        size = sum(int(total[i]) for i in range(t + 1))
        pooled.append(sum(int(correct[t][i]) for i in range(t + 1)) / size if size else NAN)
    assert last_accuracy(correct, total) == pytest.approx(pooled[-1], abs=1e-12, nan_ok=True)
    known = [value for value in pooled if not math.isnan(value)]
    expected = sum(known) / len(known) if known else NAN
    assert incremental_accuracy(correct, total) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_pooled_and_task_mean_differ_for_unequal_tasks_only():
    assert last_accuracy([[9, 0], [9, 0]], [9, 1]) == 0.9
    assert average_accuracy([[1, 0], [1, 0]]) == 0.5
    assert last_accuracy([[3, 0], [3, 1]], [4, 4]) == average_accuracy([[0.75, 0], [0.75, 0.25]])


def test_incremental_rounding_switch():
    correct, total = [[1, -1], [1, 1]], [3, 4]
    assert incremental_accuracy(correct, total) == pytest.approx((1 / 3 + 2 / 7) / 2, abs=1e-15)
    rounded = incremental_accuracy(correct, total, rounded="percent2")
    assert rounded == pytest.approx((0.3333 + 0.2857) / 2, abs=1e-15) and rounded != incremental_accuracy(
        correct, total
    )
    with pytest.raises(ValueError, match="percent2"):
        incremental_accuracy(correct, total, rounded="yes")


def test_one_task_and_missing_baseline_are_nan_without_warning(recwarn):
    one = [[0.5]]
    assert all(math.isnan(forgetting(one, kind)) for kind in ("max_seen", "diag", "max_all"))
    assert math.isnan(backward_transfer(one)) and math.isnan(forward_transfer(one, [0.1]))
    assert math.isnan(forward_transfer(np.full((3, 3), 0.5)))
    assert average_accuracy(one) == average_incremental_accuracy(one) == 0.5
    assert len(recwarn) == 0


def test_nan_is_skipped_in_maxima_and_refused_elsewhere():
    holes = np.array([[0.9, NAN, NAN], [NAN, 0.8, NAN], [0.5, 0.6, 0.7]])
    assert forgetting(holes, "max_seen") == pytest.approx(0.3)
    no_diagonal = np.array([[NAN, NAN, NAN], [0.9, 0.8, NAN], [0.5, 0.6, 0.7]])
    assert forgetting(no_diagonal, "max_seen") == pytest.approx(0.3)
    for figure in (
        lambda: forgetting(no_diagonal, "diag"),
        lambda: backward_transfer(no_diagonal),
        lambda: average_accuracy(holes[:2]),
        lambda: average_incremental_accuracy(holes),
        lambda: forgetting([[NAN, NAN], [0.5, 0.5]]),
        lambda: forward_transfer(lower(np.ones((3, 3))), np.zeros(3)),
        lambda: forward_transfer(np.ones((3, 3)), [0, NAN, 0]),
        lambda: last_accuracy([[1, -1], [1, -1]], [2, 2]),
        lambda: incremental_accuracy([[-1, -1], [1, 1]], [2, 2]),
    ):
        with pytest.raises(NotEvaluatedError):
            figure()
    assert forward_transfer(np.ones((3, 3)), [NAN, 0, 0]) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: forgetting(HAND, "best"),
        lambda: forgetting(np.ones((3, 2))),
        lambda: average_accuracy(np.ones(3)),
        lambda: average_accuracy(np.ones((0, 3))),
        lambda: average_accuracy(HAND, weights=[1, 2]),
        lambda: average_accuracy(HAND, tasks=[5]),
        lambda: forward_transfer(np.ones((3, 3)), np.zeros(2)),
        lambda: last_accuracy([[3]], [2]),
        lambda: last_accuracy([[1, 1]], [2]),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


def filled(steps=3, rng=None):
    rng = rng or np.random.default_rng(0)
    matrix, total = ResultMatrix(classes=[[4, 7], [0], [2, 9]]), [10, 5, 8]
    for t in range(-1, steps):
        for i in range(steps):
            matrix.record(t, i, int(rng.integers(0, total[i] + 1)), total[i])
    return matrix


def test_result_matrix_equals_the_functions():
    matrix = filled()
    accuracy, seen = matrix.accuracy, [[0], [0, 1], [0, 1, 2]]
    assert matrix.shape == (3, 3) and matrix.total.tolist() == [10, 5, 8]
    np.testing.assert_array_equal(accuracy, matrix.correct / matrix.total)
    assert matrix.last == last_accuracy(matrix.correct, matrix.total) == matrix.correct[-1].sum() / 23
    assert matrix.average == average_accuracy(accuracy)
    assert matrix.incremental == incremental_accuracy(matrix.correct, matrix.total, seen=seen)
    assert matrix.forgetting == forgetting(accuracy) and matrix.backward == backward_transfer(accuracy)
    assert matrix.forward == forward_transfer(accuracy, matrix.baseline)
    first = matrix.summary(0)
    assert first["accuracy/average"] == first["accuracy/last"] == accuracy[0, 0]
    assert first["forgetting/average"] is None and first["transfer/forward"] is None
    assert matrix.summary(1)["forgetting/average"] == pytest.approx(accuracy[0, 0] - accuracy[1, 0])
    assert matrix.classes == [[4, 7], [0], [2, 9]]


def test_partial_evaluation_has_no_average_but_is_kept():
    matrix = ResultMatrix()
    matrix.record(0, 0, 4, 5)
    matrix.record(1, 1, 3, 5)
    assert matrix.summary()["accuracy/average"] is None and math.isnan(matrix.last)
    assert matrix.accuracy[1, 1] == 0.6 and np.isnan(matrix.accuracy[1, 0])
    matrix.record(1, 0, 1, 5)
    assert matrix.average == pytest.approx(0.4) and matrix.forgetting == pytest.approx(0.6)
    matrix.record(1, 0, 2, 5)  # the last write wins
    assert matrix.average == pytest.approx(0.5)
    assert math.isnan(ResultMatrix().average)


def test_empty_tasks_are_left_out():
    matrix, plain = ResultMatrix(), ResultMatrix()
    for t in range(3):
        for i, (correct, total) in enumerate([(4 - t, 4), (0, 0), (2, 4)]):
            matrix.record(t, i, correct, total)
    for t, row in enumerate([(4, 0), (2, 2)]):
        for i, correct in enumerate(row):
            plain.record(t, i, correct, 4)
    assert matrix.average == plain.average == 0.5 and matrix.last == plain.last
    assert np.isnan(matrix.accuracy[:, 1]).all() and matrix.forgetting == pytest.approx(0.5)


def test_joint_training_sees_every_task_in_one_step():
    matrix = ResultMatrix()
    for i, total in enumerate((4, 8)):
        matrix.record(0, i, 3, total)
    matrix.describe(0, task=None, seen=[0, 1])
    assert matrix.average == pytest.approx((3 / 4 + 3 / 8) / 2) and matrix.last == 0.5
    assert matrix.summary()["forgetting/average"] is None


def test_steps_that_trained_the_tasks_in_another_order():
    forward, backward = filled(), ResultMatrix()
    order = [2, 0, 1]
    for t in range(-1, 3):
        for i in range(3):
            count = (forward.baseline * forward.total)[i] if t < 0 else forward.correct[t, i]
            backward.record(t, order[i], round(float(count)), int(forward.total[i]))
    for t in range(3):
        backward.describe(t, task=order[t], seen=order[: t + 1])
    assert backward.summary() == pytest.approx(forward.summary())
    backward.describe(2, task=order[0], seen=[0, 1, 2])  # a repeated task: the diagonal means nothing
    assert backward.summary()["forgetting/average"] is None and backward.summary()["accuracy/last"] is not None


def test_round_trip_through_json():
    matrix = filled()
    matrix.record(3, 0, 1, 10)
    matrix.describe(3, task=None, seen=[0, 2, 5])
    text = json.dumps(matrix.to_dict(), allow_nan=False)
    again = ResultMatrix.from_dict(json.loads(text))
    assert again.to_dict() == matrix.to_dict() and again.summary() == matrix.summary()
    loaded = ResultMatrix(forgetting_kind="diag")
    loaded.load_state_dict(matrix.state_dict())
    assert loaded.to_dict() == matrix.to_dict()
    assert ResultMatrix.from_dict(ResultMatrix().to_dict()).shape == (0, 0)
    broken = matrix.to_dict()
    del broken["total"]
    with pytest.raises(ValueError, match="total"):
        ResultMatrix.from_dict(broken)
    with pytest.raises(ValueError, match="fit"):
        ResultMatrix.from_dict({**matrix.to_dict(), "total": [1]})


def test_record_refuses_nonsense():
    matrix = ResultMatrix()
    matrix.record(0, 0, 1, 5)
    for bad in ((0, 0, 6, 5), (0, -1, 1, 5), (-2, 0, 1, 5), (0, 0, -1, 5), (1, 0, 1, 6)):
        with pytest.raises(ValueError, match="record"):
            matrix.record(*bad)
    with pytest.raises(ValueError, match="forgetting_kind"):
        ResultMatrix(forgetting_kind="x")
    with pytest.raises(ValueError, match="rounded"):
        ResultMatrix(rounded="x")
    with pytest.raises(ValueError, match="steps"):
        matrix.summary(1)
