"""The two losses of CILA against plain loops, their properties, precision, and errors."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_firn.plugins import contrastive_losses
from avalanche_firn.plugins.contrastive_losses import (
    asymmetric_supcon,
    contrastive_distillation,
    relation_distillation,
)

TEMPERATURES = {"temperature": 0.5, "base_temperature": 0.07, "student_temperature": 0.2, "teacher_temperature": 0.01}
ANY_LABELS = [-(2**63), -7, 0, 3, 2**53, 2**53 + 1, 2**63 - 1]  # the last three are two numbers in float64
seeds = st.integers(0, 9999)


# -------------------------------------------------------------------- helpers
def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def log_sum(exponents):
    top = max(exponents)
    return top + math.log(math.fsum(math.exp(e - top) for e in exponents))


def supcon_by_loop(features, labels, anchors, temperature, base_temperature=None):
    """Anchor by anchor, partner by partner."""
    z, labels, total = features.tolist(), labels.tolist(), 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        partners = [j for j in others if labels[j] == labels[i]]
        if anchors[i] and partners:
            level = log_sum([dot(z[i], z[j]) / temperature for j in others])
            total += sum(level - dot(z[i], z[j]) / temperature for j in partners) / len(partners)
    return total / len(z) * (temperature / base_temperature if base_temperature else 1.0)


def relations_by_loop(student, teacher, student_temperature, teacher_temperature):
    """Row by row: a softmax for each network, then their cross-entropy."""
    z, t, total = student.tolist(), teacher.tolist(), 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        ours = [dot(z[i], z[j]) / student_temperature for j in others]
        theirs = [dot(t[i], t[j]) / teacher_temperature for j in others]
        for a, b in zip(ours, theirs, strict=True):
            total -= math.exp(b - log_sum(theirs)) * (a - log_sum(ours))
    return total / len(z)


def batch(seed=0, rows=12, width=5, labels=(0, 1, 2), dtype=torch.float64):
    """Student, teacher (of another width), labels in any order, anchors of a random part of the rows."""
    generator = torch.Generator().manual_seed(seed)
    student = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
    teacher = F.normalize(torch.randn(rows, width + 2, generator=generator, dtype=torch.float64), dim=1)
    chosen = torch.tensor(labels)[torch.randint(len(labels), (rows,), generator=generator)]
    return student.to(dtype), teacher.to(dtype), chosen, torch.rand(rows, generator=generator) < 0.6


def slope(loss, features):
    """Value and gradient of ``loss(features)``."""
    leaf = features.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def each_loss(teacher, labels, anchors, coefficient=1.5):
    """Both losses and their fused sum, as functions of the student."""
    everything = {**TEMPERATURES, "teacher_features": teacher, "coefficient": coefficient}
    return {
        "contrastive": lambda z: asymmetric_supcon(z, labels, anchors, 0.5, 0.07),
        "distillation": lambda z: relation_distillation(z, teacher, 0.2, 0.01),
        "total": lambda z: contrastive_distillation(z, labels, anchors, **everything).total,
    }


# ---------------------------------------------------------------------- loops
@given(
    seed=seeds,
    rows=st.integers(2, 9),
    temperature=st.sampled_from([0.01, 0.1, 0.5, 2.0]),
    base=st.sampled_from([None, 0.07]),
)
@settings(max_examples=60, deadline=None)
def test_supcon_equals_the_loop(seed, rows, temperature, base):
    student, _, labels, anchors = batch(seed, rows, labels=ANY_LABELS[seed % 5 :])
    loss = asymmetric_supcon(student, labels, anchors, temperature, base)
    expected = supcon_by_loop(student, labels, anchors, temperature, base)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(
    seed=seeds,
    rows=st.integers(2, 9),
    ours=st.sampled_from([0.01, 0.2, 1.0]),
    theirs=st.sampled_from([0.01, 0.1, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_relation_distillation_equals_the_loop(seed, rows, ours, theirs):
    student, teacher, _, _ = batch(seed, rows)
    loss = relation_distillation(student, teacher, ours, theirs)
    assert loss.item() == pytest.approx(relations_by_loop(student, teacher, ours, theirs), rel=1e-12, abs=1e-12)


def test_every_integer_type_is_a_label():
    student, _, labels, anchors = batch()
    expected = asymmetric_supcon(student, labels, anchors, 0.5)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(asymmetric_supcon(student, labels.to(dtype), anchors, 0.5), expected)


@pytest.mark.parametrize("loss", ["contrastive", "distillation", "total"])
def test_gradient_equals_finite_differences(loss):
    student, teacher, labels, anchors = batch(rows=7)
    student = 1.3 * student  # nothing relies on unit rows
    function = each_loss(teacher, labels, anchors)[loss]
    assert torch.autograd.gradcheck(function, student.requires_grad_(), eps=1e-6, atol=1e-6)
    _, once = slope(function, student)
    _, thrice = slope(lambda z: 3 * function(z), student)
    close(thrice, 3 * once, 1e-12)


# --------------------------------------------------------------- small batches
def test_an_anchor_without_partner_contributes_nothing_and_counts():
    student, _, _, _ = batch(rows=5)
    labels = torch.tensor([4, 9, 4, 4, 8])
    both = torch.tensor([True, True, True, False, False])
    value, gradient = slope(lambda z: asymmetric_supcon(z, labels, both, 0.5), student)
    without = torch.tensor([True, False, True, False, False])
    expected, same = slope(lambda z: asymmetric_supcon(z, labels, without, 0.5), student)
    assert torch.equal(value, expected) and torch.equal(gradient, same) and torch.isfinite(gradient).all()
    # two anchors, divided by five rows
    z = student.tolist()
    terms = [
        log_sum([dot(z[i], z[j]) / 0.5 for j in range(5) if j != i]) - sum(dot(z[i], z[j]) / 0.5 for j in partners) / 2
        for i, partners in ((0, (2, 3)), (2, (0, 3)))
    ]
    close(value, sum(terms) / 5, 1e-12)


def test_only_anchors_without_partner():
    student, _, _, _ = batch(rows=4)
    value, gradient = slope(
        lambda z: asymmetric_supcon(z, torch.arange(4), torch.ones(4, dtype=torch.bool), 0.5), student
    )
    assert value == 0 and (gradient == 0).all()


def test_no_anchor_gives_zero_and_leaves_the_distillation():
    student, teacher, labels, _ = batch()
    none = torch.zeros(12, dtype=torch.bool)
    losses = each_loss(teacher, labels, none, coefficient=1.0)
    value, gradient = slope(losses["contrastive"], student)
    assert value == 0 and (gradient == 0).all()
    for fused, alone in zip(slope(losses["total"], student), slope(losses["distillation"], student), strict=True):
        close(fused, alone, 1e-14)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_batches_without_relations(rows):
    student, teacher, _, _ = batch(rows=rows)
    labels, anchors = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    for loss in each_loss(teacher, labels, anchors).values():
        value, gradient = slope(loss, student)
        assert value == 0 and gradient.shape == student.shape and (gradient == 0).all()


# ----------------------------------------------------------------- properties
@given(seed=seeds, rows=st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_order_of_rows_plays_no_role(seed, rows):
    student, teacher, labels, anchors = batch(seed, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain, mixed = each_loss(teacher, labels, anchors), each_loss(teacher[order], labels[order], anchors[order])
    for name in plain:
        (value, gradient), (other, moved) = slope(plain[name], student), slope(mixed[name], student[order])
        close(other, value, 1e-12 * max(1.0, float(value)))
        close(moved, gradient[order], 1e-12 * max(1.0, float(gradient.abs().max())))


@given(seed=seeds, rows=st.integers(2, 20), elements=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_size_of_blocks_plays_no_role(seed, rows, elements):
    student, teacher, labels, anchors = batch(seed, rows)
    for loss in each_loss(teacher, labels, anchors).values():
        value, gradient = slope(loss, student)
        with mock.patch.dict(contrastive_losses._BLOCK_ELEMENTS, cpu=elements):
            other, same = slope(loss, student)
        close(other, value, 1e-12 * max(1.0, float(value)))
        close(same, gradient, 1e-12 * max(1.0, float(gradient.abs().max())))


def test_blocks_cover_every_row_once():
    for elements, sizes in ((1, [1] * 5), (10, [2, 2, 1]), (24, [4, 1]), (25, [5])):
        with mock.patch.dict(contrastive_losses._BLOCK_ELEMENTS, cpu=elements):
            blocks = list(contrastive_losses._blocks(5, "cpu"))
        assert [b.stop - b.start for b in blocks] == sizes and [r for b in blocks for r in range(5)[b]] == [*range(5)]


@given(seed=seeds, coefficient=st.sampled_from([0.0, 0.3, 1.0, 7.5]))
@settings(max_examples=20, deadline=None)
def test_fused_total_is_the_weighted_sum(seed, coefficient):
    student, teacher, labels, anchors = batch(seed)
    losses = each_loss(teacher, labels, anchors, coefficient)
    (value, gradient), (first, a), (second, b) = (
        slope(losses[name], student) for name in ("total", "contrastive", "distillation")
    )
    close(value, first + coefficient * second, 1e-12)
    close(gradient, a + coefficient * b, 1e-11)
    terms = contrastive_distillation(
        student.requires_grad_(), labels, anchors, teacher_features=teacher, coefficient=coefficient, **TEMPERATURES
    )
    assert terms.total.requires_grad and not terms.contrastive.requires_grad and not terms.distillation.requires_grad
    close(terms.contrastive, first, 1e-12)
    close(terms.distillation, second, 1e-12)


def test_without_teacher_the_total_is_contrastive():
    student, _, labels, anchors = batch()
    terms = contrastive_distillation(student, labels, anchors, temperature=0.5, coefficient=3.0)
    assert terms.distillation == 0 and torch.equal(terms.total, terms.contrastive)
    assert torch.equal(terms.total, asymmetric_supcon(student, labels, anchors, 0.5, 0.5))  # None is the factor 1


@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0])
def test_student_equal_to_teacher_is_stationary_at_one_temperature(temperature):
    student, _, _, _ = batch(rows=16, width=8)
    value, gradient = slope(lambda z: relation_distillation(z, student, temperature, temperature), student)
    close(gradient, torch.zeros_like(student), 1e-12)
    assert value > 0  # the teacher's entropy
    _, unequal = slope(lambda z: relation_distillation(z, student, 2 * temperature, temperature), student)
    assert unequal.abs().max() > 1e-4


def test_no_gradient_reaches_the_teacher():
    student, teacher, labels, anchors = batch()
    teacher.requires_grad_()
    for loss in each_loss(teacher, labels, anchors).values():
        slope(loss, student)
        assert teacher.grad is None
    assert not relation_distillation(student, teacher, 0.2, 0.01).requires_grad


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_type_of_the_input(dtype):
    student, teacher, labels, anchors = batch(dtype=dtype)
    for loss in each_loss(teacher, labels, anchors).values():
        value, gradient = slope(loss, student)
        assert gradient.dtype == dtype
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("norm", [1.0, 10.0, 300.0])
def test_bfloat16_under_autocast(norm):
    student, _, labels, anchors = batch(rows=128, width=32, dtype=torch.float32)
    teacher = F.normalize(student + 0.1 * torch.randn(128, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    wide, narrow = each_loss(norm * teacher, labels, anchors), each_loss((norm * teacher).bfloat16(), labels, anchors)
    narrow["sharp"] = lambda z: asymmetric_supcon(z, labels, anchors, 0.01)
    wide["sharp"] = narrow["sharp"]
    for name, loss in narrow.items():
        exact, _ = slope(wide[name], norm * student)
        with torch.autocast("cpu", torch.bfloat16):
            value, gradient = slope(loss, (norm * student).bfloat16())
        assert value.dtype == torch.float32 and torch.isfinite(gradient).all()
        assert value.item() == pytest.approx(exact.item(), rel=1e-2), name


def test_autocast_changes_nothing():
    student, teacher, labels, anchors = batch(dtype=torch.float32)
    for loss in each_loss(teacher, labels, anchors).values():
        value, gradient = slope(loss, student)
        with torch.autocast("cpu", torch.bfloat16):
            other, same = slope(loss, student)
        assert torch.equal(other, value) and torch.equal(same, gradient)


class Watch(TorchDispatchMode):
    """Calls ``seen(name, arguments)`` ahead of every operation."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def settings_in_force():
    """Everything that PyTorch knows about the precision of float32 products."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "set in the newer way"
    backends = [torch.backends, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [older, *(getattr(b, "fp32_precision", None) for b in backends)]


@pytest.fixture(params=["default", "medium", "allow_tf32", "backend", "all backends"])
def precision(request):
    """Some way of asking for fast products; taken back afterwards."""
    newer = hasattr(torch.backends, "fp32_precision")
    if "backend" in request.param and not newer:
        pytest.skip("from PyTorch 2.9 on")
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif request.param == "backend":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif request.param == "all backends":
        torch.backends.fp32_precision = "tf32"
    yield request.param
    torch.set_float32_matmul_precision("highest")
    if newer:
        for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"


def test_products_are_exact_whatever_is_set(precision):
    student, teacher, labels, anchors = batch(dtype=torch.float32)
    before, products = settings_in_force(), []

    def seen(name, arguments):
        if "mm" in name:
            products.append((torch.get_float32_matmul_precision(), {a.dtype for a in arguments}))

    with torch.autocast("cpu", torch.bfloat16), Watch(seen):
        slope(each_loss(teacher, labels, anchors)["total"], student)
    assert len(products) == 4 and all(p == ("highest", {torch.float32}) for p in products)
    assert settings_in_force() == before


def test_settings_come_back_after_an_error(precision):
    student, teacher, labels, anchors = batch(dtype=torch.float32)
    before = settings_in_force()

    def seen(name, arguments):
        if "softmax" in name:
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"), torch.autocast("cpu", torch.bfloat16), Watch(seen):
        slope(each_loss(teacher, labels, anchors)["total"], student)
    assert settings_in_force() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="from PyTorch 2.9 on")
def test_an_inherited_setting_stays_inherited():
    student, teacher, labels, anchors = batch(dtype=torch.float32)
    try:
        torch.backends.fp32_precision = "tf32"
        slope(each_loss(teacher, labels, anchors)["total"], student)
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_nothing_waits_for_the_device():
    student, teacher, labels, anchors = batch()
    waiting = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")
    names = set()

    def seen(name, arguments):
        names.add(name)
        chosen = [i for a in arguments if isinstance(a, list | tuple) for i in a if isinstance(i, torch.Tensor)]
        assert name not in waiting and not any(i.dtype == torch.bool for i in chosen), name  # a mask hides a nonzero

    with mock.patch.dict(contrastive_losses._BLOCK_ELEMENTS, cpu=30), Watch(seen):
        slope(each_loss(teacher, labels, anchors)["total"], student)
    assert {"mm", "addmm_"} <= names
    for attempt in (lambda: student.sum().item(), lambda: student[anchors], lambda: bool(anchors.any())):
        with pytest.raises(AssertionError), Watch(seen):
            attempt()


# --------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "match, change",
    [
        (r"features is torch.float64 \(12,\)", {"features": torch.zeros(12, dtype=torch.float64)}),
        (r"features is torch.int64", {"features": torch.zeros(12, 5, dtype=torch.long)}),
        (r"labels is torch.int64 \(11,\); integers \(12,\)", {"labels": torch.zeros(11, dtype=torch.long)}),
        (r"labels is torch.float32", {"labels": torch.zeros(12)}),
        (r"labels is torch.bool", {"labels": torch.zeros(12, dtype=torch.bool)}),
        (r"anchors is torch.bool \(12, 1\); bool \(12,\)", {"anchors": torch.zeros(12, 1, dtype=torch.bool)}),
        (r"anchors is torch.int64", {"anchors": torch.zeros(12, dtype=torch.long)}),
        (r"teacher has 11 rows and the student 12", {"teacher_features": torch.zeros(11, 5)}),
        (r"teacher is torch.float32 \(12, 5, 1\)", {"teacher_features": torch.zeros(12, 5, 1)}),
        *((rf"{name} is {value}", {name: value}) for name in TEMPERATURES for value in (0.0, -0.1, math.inf, math.nan)),
    ],
)
def test_unfit_arguments(match, change):
    student, teacher, labels, anchors = batch()
    arguments = {"features": student, "labels": labels, "anchors": anchors, "teacher_features": teacher}
    with pytest.raises(ValueError, match=match):
        contrastive_distillation(**{**arguments, **TEMPERATURES, **change})


def test_unfit_arguments_of_the_single_losses():
    student, teacher, labels, anchors = batch()
    for match, call in (
        ("temperature is 0", lambda: asymmetric_supcon(student, labels, anchors, 0)),
        ("base_temperature is -1", lambda: asymmetric_supcon(student, labels, anchors, 0.5, -1)),
        ("student is torch.int64", lambda: relation_distillation(student.long(), teacher, 0.2, 0.01)),
        ("teacher has 3 rows and the student 12", lambda: relation_distillation(student, teacher[:3], 0.2, 0.01)),
        ("student_temperature is 0", lambda: relation_distillation(student, teacher, 0, 0.01)),
        ("teacher_temperature is nan", lambda: relation_distillation(student, teacher, 0.2, math.nan)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
