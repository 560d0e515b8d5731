"""Bounds and certificate against golden numbers and nested loops; their inequalities on random data."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.evaluation.contrastive_bound import (
    chained_bound,
    gamma,
    loss_ceiling,
    one_step_bound,
    pair_cross_entropies,
    pair_losses,
    training_loss_bound,
    tv_certificate,
)

FIELDS = [
    "loss",
    "cross_entropy",
    "total_variation",
    "largest_term",
    "logit_range",
    "upper",
    "upper_range",
    "lower_range",
]


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True)


def unit_rows(rng, *shape, spread=1.0, dtype=torch.float64):
    rows = torch.from_numpy(spread * rng.standard_normal(shape) + rng.standard_normal(shape[-1]))
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


# ---------------------------------------------------------------- golden numbers
def test_golden_losses_of_pairs(golden):
    data = golden("cila", "bound")
    cosines, temperature = torch.from_numpy(data["cosines"]), float(data["temperature"])
    assert pair_losses(cosines, temperature).mean(-1).numpy() == close(data["contrastive"])
    distilled = pair_cross_entropies(cosines[1:], cosines[:-1], temperature).mean(-1).numpy()
    for t in range(1, 4):
        assert distilled[t - 1, :t] == close(data["distillation"][t, :t])


def test_golden_bounds(golden):
    data = golden("cila", "bound")
    alpha = loss_ceiling(float(data["temperature"]), int(data["negatives"]))
    assert alpha == close(float(data["alpha"]))
    weights, coefficients = data["weights"].tolist(), data["coefficients"].tolist()
    new, old = np.diag(data["contrastive"]).tolist(), data["distillation_old"].tolist()
    totals, measured = np.cumsum(weights), data["measured"]
    one_step = [
        one_step_bound(measured[t - 1], new[t], old[t], weight=weights[t], previous_weight=totals[t - 1], ceiling=alpha)
        for t in range(1, 4)
    ]
    assert one_step == close(data["one_step"][1:])
    assert chained_bound(new, old, weights=weights, ceiling=alpha) == close(data["chained"])
    shares = [gamma(weights[t], totals[t - 1], coefficients[t]) for t in range(1, 4)]
    assert shares == close(data["gamma"][1:])
    losses = [new[0], *(new[t] + coefficients[t] * old[t] for t in range(1, 4))]
    assert losses == close(data["training_losses"])
    for first in (math.nan, None):
        given_coefficients = [first, *coefficients[1:]]
        bounds = training_loss_bound(losses, weights=weights, coefficients=given_coefficients, ceiling=alpha)
        assert bounds == close(data["training_bound"])


def test_golden_certificates(golden):
    data = golden("cila", "bound")
    for case in data["certificate_cases"].tolist():
        student, teacher, labels = (torch.from_numpy(data[f"{case}_{n}"]) for n in ("student", "teacher", "labels"))
        found = tv_certificate(student, teacher, labels, float(data[f"{case}_temperature"]))
        for field in FIELDS:
            value = getattr(found, field)
            assert value.dtype == torch.float64
            assert value.numpy() == close(data[f"{case}_{field}"]), (case, field)


def test_golden_ceilings(golden):
    data = golden("cila", "bound")
    values = [loss_ceiling(temperature, int(k)) for temperature, k in data["ceiling_arguments"].tolist()]
    assert values == close(data["ceiling_values"])


# ----------------------------------------------------------------------- ceiling
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("negatives", [1, 7, 2000])
def test_ceiling_is_the_loss_of_the_worst_anchor(temperature, negatives):
    worst = torch.tensor([-1.0] + [1.0] * negatives, dtype=torch.float64)
    alpha = loss_ceiling(temperature, negatives)
    assert math.isfinite(alpha) and alpha == pytest.approx(pair_losses(worst, temperature).item(), rel=1e-12)
    if 2 / temperature < 700:
        assert alpha == pytest.approx(math.log(1 + negatives * math.exp(2 / temperature)), rel=1e-12)


def test_ceiling_never_overflows():
    assert loss_ceiling(1e-300, 2000) == pytest.approx(2e300)
    assert loss_ceiling(0.01, 2000) == pytest.approx(200 + math.log(2000), rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.5, 0), "negatives"), ((0.5, -3), "negatives"), ((0.5, 1.5), "negatives"), ((0.5, True), "negatives")]
    + [((value, 3), "temperature") for value in (0, -1.0, math.nan, math.inf)],
)
def test_impossible_ceilings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.*accepted"):
        loss_ceiling(*arguments)


# ------------------------------------------------------------------------ numbers
def test_gamma():
    assert gamma(1, 4, 2.0) == 0.5
    assert [gamma(1, 4, c) for c in (4.0, 8.0, 1e9)] == [1, 1, 1]  # a larger coefficient doesn't help any more
    assert gamma(2, 4, 8.0) == 0.5
    assert gamma(1, 0, math.nan) == 1 and gamma(0, 4, 2.0) == 0.5 and gamma(1, 4, 0.0) == 0
    assert gamma(0, 0, 1.0) == math.inf
    for arguments, message in (
        ((-1, 1, 1), "weights"),
        ((1, math.inf, 1), "weights"),
        ((1, 1, -0.1), "coefficient"),
        ((1, 1, math.nan), "coefficient"),
    ):
        with pytest.raises(ValueError, match=f"{message}: got .*accepted"):
            gamma(*arguments)


def test_what_has_weight_0_is_not_read():
    nan = math.nan
    assert one_step_bound(nan, 2.0, nan, weight=3, previous_weight=0, ceiling=5) == 6
    assert one_step_bound(1.0, nan, 2.0, weight=0, previous_weight=3, ceiling=5) == 11
    assert one_step_bound(nan, nan, nan, weight=0, previous_weight=0, ceiling=5) == 0
    assert chained_bound([nan, 2.0, nan], [nan, nan, 1.0], weights=[0, 1, 0], ceiling=5) == [0, 2, 11]
    bounds = training_loss_bound([nan, 2.0, 0.5], weights=[0, 1, 0], coefficients=[None, None, 0.5], ceiling=5)
    assert bounds == [0, 2, 11]
    assert chained_bound([], [], weights=[], ceiling=5) == []


def test_what_is_read_and_unknown_spoils_all_that_follows():
    nan = math.nan
    weights = [1, 1, 1, 1]
    assert one_step_bound(1.0, 1.0, nan, weight=1, previous_weight=1, ceiling=5) == close(nan)
    assert chained_bound([1, 1, nan, 1], [nan, 1, 1, 1], weights=weights, ceiling=5) == close([1, 7, nan, nan])
    for unknown in (None, nan):
        bounds = training_loss_bound([1, 1, 1, 1], weights=weights, coefficients=[None, 1, unknown, 1], ceiling=5)
        assert bounds == close([1, 6, nan, nan])
    bounds = training_loss_bound([1, 1, nan, 1], weights=weights, coefficients=[None, 1, 1, 1], ceiling=5)
    assert bounds == close([1, 6, nan, nan])
    bounds = training_loss_bound([1, 1, 0, 1], weights=[1, 1, 0, 1], coefficients=[None, 1, 0, 1], ceiling=5)
    assert bounds == [1, 6, math.inf, math.inf]  # without distillation nothing holds the old tasks


def test_impossible_sequences_are_refused():
    with pytest.raises(ValueError, match=r"lengths differ: got .*'weights': 2.*accepted"):
        chained_bound([1.0], [1.0], weights=[1, 1], ceiling=2)
    with pytest.raises(ValueError, match="lengths differ"):
        training_loss_bound([1.0], weights=[1], coefficients=[], ceiling=2)
    for ceiling in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="ceiling: got"):
            chained_bound([1.0], [1.0], weights=[1], ceiling=ceiling)
        with pytest.raises(ValueError, match="ceiling: got"):
            training_loss_bound([1.0], weights=[1], coefficients=[None], ceiling=ceiling)
    with pytest.raises(ValueError, match=r"weights: got \[1, -1\]"):
        chained_bound([1.0, 1.0], [1.0, 1.0], weights=[1, -1], ceiling=2)


# --------------------------------------------------------------------- inequalities
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 60), st.floats(0.02, 5), st.floats(0, 3))
def test_one_model_bounds_the_next_pair_by_pair(seed, negatives, temperature, distance):
    rng = np.random.default_rng(seed)
    old = torch.from_numpy(rng.uniform(-1, 1, (50, 1 + negatives)))
    new = (old + torch.from_numpy(distance * rng.standard_normal(old.shape))).clamp(-1, 1)
    alpha = loss_ceiling(temperature, negatives)
    before, after = pair_losses(old, temperature), pair_losses(new, temperature)
    distilled = pair_cross_entropies(new, old, temperature)
    rounding = 1e-9 * max(1, alpha)
    assert (after <= distilled + alpha * before + rounding).all()
    assert (after >= distilled - alpha * before - rounding).all()
    assert (after <= alpha + rounding).all() and (after >= 0).all()


def bounds_of_random_models(seed, tasks, negatives, temperature):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3, tasks)
    coefficients = [None, *rng.uniform(0.05, 5, tasks - 1)]
    cosines = torch.from_numpy(rng.uniform(-1, 1, (tasks, tasks, 6, 1 + negatives)))
    loss = pair_losses(cosines, temperature).mean(-1).numpy()
    distilled = pair_cross_entropies(cosines[1:], cosines[:-1], temperature).mean(-1).numpy()
    old = [math.nan, *(float(np.average(distilled[t - 1, :t], weights=weights[:t])) for t in range(1, tasks))]
    new, alpha, totals = np.diag(loss), loss_ceiling(temperature, negatives), np.cumsum(weights)
    measured = [float(weights[: t + 1] @ loss[t, : t + 1]) for t in range(tasks)]
    one_step = [
        one_step_bound(measured[t - 1], new[t], old[t], weight=weights[t], previous_weight=totals[t - 1], ceiling=alpha)
        for t in range(1, tasks)
    ]
    chained = chained_bound(new, old, weights=weights, ceiling=alpha)
    training = [new[0], *(new[t] + coefficients[t] * old[t] for t in range(1, tasks))]
    last = training_loss_bound(training, weights=weights, coefficients=coefficients, ceiling=alpha)
    return measured, [measured[0], *one_step], chained, last, training, weights, coefficients, alpha


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 20), st.floats(0.3, 3))
def test_every_bound_lies_above_the_one_before(seed, tasks, negatives, temperature):
    found = bounds_of_random_models(seed, tasks, negatives, temperature)
    for smaller, larger in itertools.pairwise(found[:4]):
        for low, high in zip(smaller, larger, strict=True):
            assert high - low >= -1e-9 * max(1, abs(high))


def test_recursion_equals_the_published_form():
    *_, last, training, weights, coefficients, alpha = bounds_of_random_models(3, 5, 4, 0.5)
    for t in range(5):
        total = weights[0] * alpha**t * training[0]
        for j in range(1, t + 1):
            share = min(1 / weights[j], coefficients[j] / sum(weights[:j]))
            total += alpha ** (t - j) / share * training[j]
        assert last[t] == pytest.approx(total, rel=1e-12)


# -------------------------------------------------------------------- certificate
def naive_certificate(student, teacher, labels, temperature):
    """Row by row and entry by entry, in Python floats."""
    student, teacher, labels = student.double().tolist(), teacher.double().tolist(), labels.tolist()
    n = len(labels)
    rows = {field: [] for field in FIELDS}

    def distribution(z, i):
        logits = {j: sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature for j in range(n) if j != i}
        top = max(logits.values())
        total = math.fsum(math.exp(value - top) for value in logits.values())
        return logits, {j: value - top - math.log(total) for j, value in logits.items()}

    for i in range(n):
        logits, log_q = distribution(student, i)
        _, log_p = distribution(teacher, i)
        partners = [j for j in range(n) if j != i and labels[j] == labels[i]]
        cross = -math.fsum(math.exp(log_p[j]) * log_q[j] for j in log_q)
        loss = -math.fsum(log_q[j] for j in partners) / len(partners) if partners else math.nan
        share = {j: (j in partners) / max(1, len(partners)) for j in log_q}
        apart = math.fsum(abs(share[j] - math.exp(log_p[j])) for j in log_q) / 2 if partners else math.nan
        largest, extent = max(-v for v in log_q.values()), max(logits.values()) - min(logits.values())
        values = (loss, cross, apart, largest, extent)
        bounds = (cross + largest * apart, cross + extent * apart, cross - extent * apart)
        for field, value in zip(FIELDS, values + bounds, strict=True):
            rows[field].append(value)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_certificate_against_nested_loops(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 14))
    student, teacher = unit_rows(rng, n, 5), unit_rows(rng, n, 1 + seed % 7)
    if seed % 2:  # short rows, which are more like others than like themselves
        student, teacher = (rows * torch.from_numpy(rng.uniform(0.1, 1, (n, 1))) for rows in (student, teacher))
    labels = torch.from_numpy(rng.integers(-2, 3, n))
    temperature = float(rng.uniform(0.05, 2))
    expected = naive_certificate(student, teacher, labels, temperature)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        found = tv_certificate(student.to(dtype), teacher.to(dtype), labels, temperature)
        for field in FIELDS:
            value = getattr(found, field)
            assert value.shape == (n,) and value.dtype == dtype
            assert value.tolist() == pytest.approx(expected[field], rel=tolerance, abs=tolerance, nan_ok=True), field


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(2, 40), st.integers(1, 6), st.floats(0.02, 3), st.floats(0, 2))
def test_certificate_encloses_the_loss(seed, n, classes, temperature, distance):
    rng = np.random.default_rng(seed)
    teacher = unit_rows(rng, n, 4)
    student = torch.nn.functional.normalize(teacher + torch.from_numpy(distance * rng.standard_normal((n, 4))), dim=1)
    labels = torch.from_numpy(rng.integers(0, classes, n))
    found = tv_certificate(student, teacher, labels, temperature)
    paired = (labels[:, None] == labels).sum(1) > 1
    loss, low, high, loose = (rows[paired] for rows in (found.loss, found.lower_range, found.upper_range, found.upper))
    assert (loss - low >= -1e-9).all() and (high - loss >= -1e-9).all() and (loose - high >= -1e-9).all()
    assert (found.largest_term - found.logit_range >= -1e-9).all()
    assert ((found.total_variation[paired] >= 0) & (found.total_variation[paired] <= 1 + 1e-12)).all()
    assert all(rows[~paired].isnan().all() for rows in (found.loss, found.total_variation, found.upper))


def test_certificate_of_a_perfect_teacher_is_the_loss():
    labels = torch.arange(3).repeat(4)
    teacher = torch.eye(3, dtype=torch.float64)[labels]
    found = tv_certificate(unit_rows(np.random.default_rng(0), 12, 6), teacher, labels, 0.01)
    assert found.total_variation.max() < 1e-12
    assert (found.upper_range - found.loss).abs().max() < 1e-9 and (found.lower_range - found.loss).abs().max() < 1e-9


def test_certificate_ignores_the_order_of_rows_and_the_names_of_classes():
    rng = np.random.default_rng(1)
    student, teacher, labels = unit_rows(rng, 15, 4), unit_rows(rng, 15, 4), torch.from_numpy(rng.integers(0, 4, 15))
    order = torch.from_numpy(rng.permutation(15))
    whole = tv_certificate(student, teacher, labels, 0.3)
    moved = tv_certificate(student[order], teacher[order], 100 - labels[order].to(torch.int32), 0.3)
    for rows, other in zip(whole, moved, strict=True):
        torch.testing.assert_close(rows[order], other, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_certificate_at_sharp_temperatures_and_in_half_precision():
    rng = np.random.default_rng(2)
    student, teacher = unit_rows(rng, 10, 4, dtype=torch.float32), unit_rows(rng, 10, 4, dtype=torch.float32)
    labels = torch.arange(2).repeat(5)
    assert all(rows.isfinite().all() for rows in tv_certificate(student, teacher, labels, 0.002))
    half = tv_certificate(student.half(), teacher.half(), labels, 0.5)
    whole = tv_certificate(student, teacher, labels, 0.5)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, whole.loss, rtol=1e-2, atol=1e-2)


def test_impossible_tensors_are_refused():
    rows, labels = torch.eye(4), torch.zeros(4, dtype=torch.long)
    for student, teacher, ids, message in (
        (rows[:1], rows[:1], labels[:1], "student"),
        (rows[0], rows, labels, "student"),
        (rows, rows[:3], labels, "teacher"),
        (rows.long(), rows, labels, "student"),
        (rows, rows, labels[:3], "labels"),
        (rows, rows, labels.float(), "labels"),
    ):
        with pytest.raises(ValueError, match=f"^{message}: got .*accepted"):
            tv_certificate(student, teacher, ids, 0.5)
    with pytest.raises(ValueError, match="temperature"):
        tv_certificate(rows, rows, labels, 0)
    for cosines in (torch.zeros(3, 1), torch.tensor(1.0), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"cosines: got .*accepted"):
            pair_losses(cosines, 0.5)
    with pytest.raises(ValueError, match="student, teacher: got"):
        pair_cross_entropies(torch.zeros(3, 2), torch.zeros(3, 3), 0.5)
    with pytest.raises(ValueError, match="teacher: got"):
        pair_cross_entropies(torch.zeros(3, 2), torch.zeros(3, 1), 0.5)
    with pytest.raises(ValueError, match="temperature"):
        pair_losses(torch.zeros(3, 2), math.nan)
