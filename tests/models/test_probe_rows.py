"""Rows, penalties, scales and temperatures of heads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avalanche_firn.models.linear_probe import (
    binary_rows,
    c_path,
    fit_linear_probe,
    fit_temperature,
    l2_from_c,
    pad_rows,
    probe_loss,
    rescale_rows,
)


def test_golden_binary_rows(golden):
    arrays = golden("lp_ft", "probe_binary")
    for i in range(2):
        raw, intercept = torch.tensor(arrays["raw_coef"][i]), float(arrays["raw_intercept"][i])
        for weight in (raw, raw[None]):
            for bias in (intercept, torch.tensor([intercept], dtype=torch.float64)):
                rows, offsets = binary_rows(weight, bias)
                assert np.array_equal(rows.numpy(), arrays["weight"][i])
                assert np.array_equal(offsets.numpy(), arrays["bias"][i])


def test_golden_padding_and_argmax(golden):
    arrays = golden("lp_ft", "probe_binary")
    ids, bias = arrays["pad_present"], torch.tensor(arrays["pad_intercept"])
    for class_ids in (ids.tolist(), torch.tensor(ids)):
        weight, offset = pad_rows(torch.tensor(arrays["pad_coef"]), bias, class_ids, 7)
        assert np.array_equal(weight.numpy(), arrays["pad_weight"]) and np.array_equal(offset, arrays["pad_bias"])
    logits = torch.tensor(arrays["features"]) @ weight.T + offset
    assert np.abs(logits.numpy() - arrays["pad_logits"]).max() < 1e-12
    assert np.array_equal(ids[logits[:, ids].argmax(1).numpy()], arrays["argmax_present_only"])


def test_golden_rescaling(golden):
    arrays = golden("lp_ft", "probe_binary")
    for i in range(2):
        given = torch.tensor(arrays["weight"][i]), torch.tensor(arrays["bias"][i])
        weight, bias = rescale_rows(*given, torch.tensor(arrays["random_weight"]))
        assert np.abs(weight.numpy() - arrays["weight_normalised"][i]).max() < 1e-6
        assert np.abs(bias.numpy() - arrays["bias_normalised"][i]).max() < 1e-6
        assert float(weight.std()) == pytest.approx(float(arrays["random_weight"].std(ddof=1)), rel=1e-6)


def test_rescaling_of_a_head_without_spread_changes_nothing():
    reference = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for weight in (torch.zeros(2, 3), torch.ones(1, 1)):
        rows, bias = rescale_rows(weight, torch.ones(len(weight)), reference)
        assert torch.equal(rows, weight) and torch.equal(bias, torch.ones(len(weight)))
    for constant in (torch.zeros(2, 3), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="reference_weight: got a constant tensor"):
            rescale_rows(reference, torch.zeros(2), constant)


def test_penalties_of_the_official_grid(golden):
    grid = golden("lp_ft", "probe_c_path")["C_grid"]
    assert c_path(140, 4, num=7) == pytest.approx([1 / (140 * c) for c in grid], rel=1e-12)
    assert c_path(140, 2, num=7) == pytest.approx([2 / (140 * c) for c in grid], rel=1e-12)
    default = c_path(10, 3)
    assert len(default) == 100 and default == sorted(default, reverse=True)
    assert default[0] == pytest.approx(1e6) and default[-1] == pytest.approx(1e-3)
    assert l2_from_c(2.0, 10, 1) == 0.05 and l2_from_c(2.0, 10, 2) == 0.1 and l2_from_c(2.0, 10, 3) == 0.05


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_temperature_is_where_the_derivative_vanishes(scale):
    g = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(400, 5, generator=g)
    labels = torch.distributions.Categorical(logits=2 * logits / scale).probs.multinomial(1, generator=g)[:, 0]
    temperature = fit_temperature(logits, labels)
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(logits.double() / t, labels)
    (slope,) = torch.autograd.grad(loss, t)
    assert abs(float(slope)) * temperature < 1e-6  # derivative by log T
    assert temperature == pytest.approx(scale / 2, rel=0.2)
    for other in np.geomspace(1e-2, 1e2, 200):
        assert F.cross_entropy(logits.double() / other, labels) >= loss.detach() - 1e-12


def test_temperature_of_ridge_heads_and_limits():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(120) % 3
    x = torch.randn(120, 4, generator=g) + F.one_hot(y, 4)
    weight, bias = fit_linear_probe(x, y, "ridge")
    logits = x @ weight.T + bias
    temperature = fit_temperature(logits, y)
    assert 0.05 < temperature < 0.9
    assert probe_loss(logits / temperature, y) < probe_loss(logits, y) - 0.02
    assert fit_temperature(F.one_hot(y).float(), y) == 1e-2  # separable
    assert fit_temperature(-F.one_hot(y).float(), y, bounds=(0.5, 7.0)) == 7.0
    assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_probe_loss():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    for dtype, result in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)):
        loss = probe_loss(logits.to(dtype), torch.tensor([0, 0], dtype=torch.int32))
        assert loss.dtype == result and float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_rows(torch.zeros(2, 3), 0.0), r"weight: got shape \(2, 3\); accepted are \(1, d\) and \(d,\)"),
        (lambda: binary_rows(torch.zeros(3), torch.zeros(2)), r"bias: got shape \(2,\)"),
        (lambda: pad_rows(torch.zeros(2, 3), torch.zeros(3), [0, 1], 4), "weight, bias, class_ids: got shapes"),
        (lambda: pad_rows(torch.zeros(2, 3), torch.zeros(2), [0], 4), "weight, bias, class_ids: got shapes"),
        (lambda: pad_rows(torch.zeros(2, 3), torch.zeros(2), [0, 4], 4), r"class_ids: got \[0, 4\]"),
        (lambda: pad_rows(torch.zeros(2, 3), torch.zeros(2), [-1, 2], 4), r"class_ids: got \[-1, 2\]"),
        (lambda: pad_rows(torch.zeros(2, 3), torch.zeros(2), [2, 2], 4), r"class_ids: got \[2, 2\]"),
        (lambda: l2_from_c(0.0, 5, 2), "c, n, num_classes_present: got 0.0, 5, 2"),
        (lambda: l2_from_c(1.0, 0, 2), "c, n, num_classes_present: got 1.0, 0, 2"),
        (lambda: l2_from_c(1.0, 5, 0), "c, n, num_classes_present: got 1.0, 5, 0"),
        (lambda: c_path(5, 2, num=0), "num: got 0"),
        (lambda: fit_temperature(torch.zeros(0, 3), torch.zeros(0).long()), "logits: got no rows"),
        (
            lambda: fit_temperature(torch.zeros(2, 3), torch.tensor([0, 3])),
            "labels: got 3; accepted are columns below 3",
        ),
        (lambda: fit_temperature(torch.zeros(1, 3), torch.tensor([0]), (0.0, 1.0)), r"bounds: got \(0.0, 1.0\)"),
        (lambda: fit_temperature(torch.zeros(1, 3), torch.tensor([0]), (2.0, 1.0)), r"bounds: got \(2.0, 1.0\)"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
