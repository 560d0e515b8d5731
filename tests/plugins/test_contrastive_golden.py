"""CILA's losses and coefficient against stored numbers (tests/golden/cila/README.md); errors of the coefficient."""

import math

import numpy as np
import pytest
import torch

from avalanche_firn.plugins.contrastive_losses import (
    asymmetric_supcon,
    contrastive_distillation,
    distillation_coefficient,
    loss_ratio,
    relation_distillation,
)

MODES = ["max", "min", "pure", "constant"]
PRECISIONS = [torch.float64, torch.float32]


def case_of(golden, name, case):
    """Tensors and numbers of one case, by their names without the case."""
    arrays = {key.split("_", 1)[1]: value for key, value in golden("cila", name).items() if key.startswith(f"{case}_")}
    return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in arrays.items()}


def check(loss, features, case, dtype, value=1e-10, gradient=1e-10):
    """Value and gradient; in float32 relative 1e-5, and 1e-4 of the largest entry of a gradient that is not zero."""
    leaf = features.to(dtype, copy=True).requires_grad_()
    actual = loss(leaf)
    actual.backward()
    assert actual.dtype == leaf.grad.dtype == dtype
    if dtype == torch.float32:
        value, gradient = 1e-5 * abs(case["loss"]), max(1e-4 * float(case["grad"].abs().max()), 1e-6)
    assert abs(actual.item() - case["loss"]) <= value
    assert (leaf.grad - case["grad"]).abs().max() <= gradient


# --------------------------------------------------------------------- losses
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", "abcdef")
def test_golden_supcon(golden, name, dtype):
    case = case_of(golden, "supcon", name)
    labels, anchors, temperature = case["labels"], case["anchors"], case["temperature"]
    check(
        lambda z: asymmetric_supcon(z, labels, anchors, temperature, case["base_temperature"]),
        case["features"],
        case,
        dtype,
    )
    if case["base_temperature"] == temperature:
        check(lambda z: asymmetric_supcon(z, labels, anchors, temperature), case["features"], case, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_golden_supcon_without_anchor_is_exactly_zero(golden, dtype):
    case = case_of(golden, "supcon", "e")
    leaf = case["features"].to(dtype).requires_grad_()
    loss = asymmetric_supcon(leaf, case["labels"], case["anchors"], case["temperature"], case["base_temperature"])
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all() and not case["anchors"].any()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", "abcde")
def test_golden_relation_distillation(golden, name, dtype):
    case = case_of(golden, "relation_distillation", name)
    teacher = case["teacher"].to(dtype).requires_grad_()
    temperatures = case["student_temperature"], case["teacher_temperature"]
    check(lambda z: relation_distillation(z, teacher, *temperatures), case["student"], case, dtype)
    assert teacher.grad is None
    assert name != "e" or case["grad"].abs().max() < 1e-12  # student = teacher


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", "ab")
def test_golden_total(golden, name, dtype):
    case = case_of(golden, "total_loss", name)
    settings = {key: case[key] for key in ("temperature", "base_temperature", "coefficient")}
    settings |= {key: case[key] for key in ("student_temperature", "teacher_temperature")}
    teacher = case["teacher"].to(dtype)

    def loss(z):
        terms = contrastive_distillation(z, case["labels"], case["anchors"], teacher_features=teacher, **settings)
        return terms.total

    check(loss, case["student"], case, dtype)


@pytest.mark.parametrize("name, dtype", [("a", torch.float64), ("b", torch.float32), ("b", torch.float64)])
def test_golden_underflow(golden, name, dtype):
    case = case_of(golden, "underflow", name)
    assert not np.isfinite(case["official_loss"])
    student, teacher = case["student"].to(dtype, copy=True).requires_grad_(), case["teacher"].to(dtype)
    loss = relation_distillation(student, teacher, case["student_temperature"], case["teacher_temperature"])
    loss.backward()
    tolerance = 1e-8 if dtype == torch.float64 else 1e-6
    assert loss.item() == pytest.approx(case["stable_loss"], rel=tolerance)
    assert torch.isfinite(student.grad).all() and student.grad.abs().max() > 0


# ---------------------------------------------------------------- coefficient
@pytest.mark.parametrize("mode", MODES)
def test_golden_coefficient(golden, mode):
    file = golden("cila", "coefficient")
    for row, count in enumerate(file["count"]):
        ceiling = float(file["ceiling"][row])
        actual = distillation_coefficient(
            file["distillation"][row, :count].tolist(),
            file["contrastive"][row, :count].tolist(),
            balance=float(file["balance"][row]),
            floor=float(file["floor"][row]),
            ceiling=None if np.isnan(ceiling) else ceiling,
            mode=mode,
        )
        assert isinstance(actual, float) and actual == pytest.approx(file[f"expected_{mode}"][row], rel=1e-12, abs=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", ["task", "last_epoch"])
def test_golden_coefficients_of_a_run(golden, window, mode):
    file = golden("cila", "coefficient")
    epochs = slice(None) if window == "task" else slice(-1, None)
    weights = np.broadcast_to(file["run_batch_sizes"], file["run_contrastive"][:, epochs].shape)
    means = {}
    for term in ("contrastive", "distillation"):
        means[term] = np.average(file[f"run_{term}"][:, epochs], axis=(1, 2), weights=weights)
        np.testing.assert_allclose(means[term], file[f"run_{window}_mean_{term}"], rtol=1e-12, atol=0)
    for task in range(1, 5):  # the first task has no distillation and enters no sum
        before = [means[term][1:task].tolist() for term in ("distillation", "contrastive")]
        actual = distillation_coefficient(*before, balance=float(file["run_balance"]), mode=mode)
        assert actual == pytest.approx(file[f"run_{window}_coefficients_{mode}"][task - 1], rel=1e-12, abs=0)
        assert task > 1 or actual == 1.0


def test_coefficient_by_hand():
    assert distillation_coefficient([3.0, 5.0], [1.0, 1.0]) == 4.0
    assert distillation_coefficient([3.0, 5.0], [1.0, 1.0], balance=0.1, floor=0.5) == 0.5
    assert distillation_coefficient([3.0, 5.0], [1.0, 1.0], mode="min") == 1.0
    assert distillation_coefficient([3.0, 5.0], [1.0, 1.0], balance=0.1, mode="pure") == pytest.approx(0.4)
    assert distillation_coefficient([3.0, 5.0], [1.0, 1.0], ceiling=2.5) == 2.5
    assert loss_ratio([3.0, 5.0], [1.0, 1.0]) == 4.0 and loss_ratio([], []) is None and loss_ratio([1.0], [0.0]) is None


@pytest.mark.parametrize("mode", ["max", "min", "pure", "constant"])
def test_without_a_ratio_the_floor_is_untouched_by_the_ceiling(mode):
    for losses in (([], []), ([2.0], [0.0])):
        assert distillation_coefficient(*losses, floor=1.5, ceiling=0.5, mode=mode) == 1.5
    constant = distillation_coefficient([9.0], [1.0], floor=1.5, ceiling=0.5, mode=mode)
    assert constant == (1.5 if mode == "constant" else 0.5)


@pytest.mark.parametrize(
    "match, change",
    [
        ("distillation_losses has 1 entries and contrastive_losses 2", {"distillation_losses": [1.0]}),
        ("distillation_losses is .*nan", {"distillation_losses": [1.0, math.nan]}),
        ("contrastive_losses is .*inf", {"contrastive_losses": [math.inf, 1.0]}),
        ("balance is -1", {"balance": -1.0}),
        ("balance is inf", {"balance": math.inf}),
        ("floor is nan", {"floor": math.nan}),
        ("ceiling is -0.5", {"ceiling": -0.5}),
        ("mode is 'mean'", {"mode": "mean"}),
    ],
)
def test_unfit_coefficient(match, change):
    with pytest.raises(ValueError, match=match):
        distillation_coefficient(**{"distillation_losses": [1.0, 2.0], "contrastive_losses": [1.0, 2.0], **change})
