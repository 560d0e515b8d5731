"""resample_rows_ and reset_optimizer_rows_: rules against a naive draw, what stays untouched, state modes, refusals."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_firn.plugins import resample_rows_, reset_optimizer_rows_

RULES = ["kaiming_normal", "kaiming_normal_joint", "kaiming_uniform", "default", "xavier_normal", "zeros"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_rows(rule, count, width, outputs, generator):
    """Row after row, entry after entry, from standard numbers of one block."""
    if rule == "zeros":
        return torch.zeros(count, width, dtype=torch.float64)
    if rule in ("kaiming_uniform", "default"):
        unit = torch.rand(count, width, dtype=torch.float64, generator=generator)
        bound = math.sqrt(6 / width) if rule == "kaiming_uniform" else 1 / math.sqrt(width)
        return torch.tensor([[(2 * float(u) - 1) * bound for u in row] for row in unit], dtype=torch.float64)
    unit = torch.randn(count, width, dtype=torch.float64, generator=generator)
    fan = {"kaiming_normal": width, "kaiming_normal_joint": count * width, "xavier_normal": width + outputs}[rule]
    return torch.tensor([[float(u) * math.sqrt(2 / fan) for u in row] for row in unit], dtype=torch.float64)


# ---------------------------------------------------------------------- draws
@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3)),
    ndim=st.sampled_from([2, 3]),
    data=st.data(),
    blend=st.sampled_from([0.0, 0.3, 0.75, 1.0]),
)
def test_every_rule_equals_the_naive_one(rule, shape, ndim, data, blend):
    weight = torch.randn(shape[:ndim], dtype=torch.float64, generator=seeded(1))
    before = weight.clone()
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), unique=True, max_size=shape[0]))
    result = resample_rows_(weight, rows, init=rule, generator=seeded(2), blend=blend)
    assert result is weight
    width = before[0].numel()
    fresh = naive_rows(rule, len(rows), width, shape[0], seeded(2))
    expected = before.clone()
    for k, row in enumerate(rows):
        mixed = [
            (1 - blend) * float(o) + blend * float(f) for o, f in zip(before[row].flatten(), fresh[k], strict=True)
        ]
        expected[row] = torch.tensor(mixed, dtype=torch.float64).view(before.shape[1:])
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)
    others = [r for r in range(shape[0]) if r not in rows]
    assert torch.equal(weight[others], before[others])


@pytest.mark.parametrize("rows", [3, [3], np.int64(3), np.array([3]), torch.tensor(3), torch.tensor([3]), range(3, 4)])
def test_all_ways_to_name_a_row(rows):
    weight = resample_rows_(torch.zeros(5, 4), rows, generator=seeded())
    expected = torch.zeros(5, 4)
    expected[3] = torch.randn(1, 4, generator=seeded()) * math.sqrt(2 / 4)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


def test_the_order_of_rows_is_the_order_of_the_draw():
    forward = resample_rows_(torch.zeros(4, 20), [0, 2], generator=seeded())
    backward = resample_rows_(torch.zeros(4, 20), [2, 0], generator=seeded())
    assert torch.equal(forward[[0, 2]], backward[[2, 0]]) and not torch.equal(forward, backward)


@pytest.mark.parametrize("rows", [[], np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64), np.array([])])
def test_no_rows_nothing_drawn(rows):
    generator = seeded()
    state, weight = generator.get_state(), torch.ones(3, 2)
    resample_rows_(weight, rows, generator=generator)
    assert torch.equal(weight, torch.ones(3, 2)) and torch.equal(generator.get_state(), state)
    assert resample_rows_(torch.empty(0, 4), []).shape == (0, 4)


def test_a_generator_leaves_the_global_one_alone_and_none_is_the_global_one():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    private = resample_rows_(torch.zeros(3, 4), [0, 1], generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(resample_rows_(torch.zeros(3, 4), [0, 1]), private)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blend", [1.0, 0.4])
def test_half_types_get_the_values_of_float32(dtype, blend):
    wide = torch.randn(6, 32, generator=seeded(3)).to(dtype)
    half = wide.clone()
    single = resample_rows_(wide.float(), [4, 1], generator=seeded(), blend=blend)
    resample_rows_(half, [4, 1], generator=seeded(), blend=blend)
    assert half.dtype == dtype and torch.equal(half, single.to(dtype))


def test_a_full_zap_heals_nan_and_parts_do_not():
    weight = torch.full((3, 4), math.nan)
    assert bool(resample_rows_(weight, [1], generator=seeded())[1].isfinite().all())
    assert bool(weight[[0, 2]].isnan().all())
    assert bool(resample_rows_(torch.full((3, 4), math.nan), [1], blend=0.5)[1].isnan().all())


def test_blend_zero_draws_like_one():
    used, other, weight = seeded(), seeded(), torch.randn(4, 3)
    before = weight.clone()
    resample_rows_(weight, [0, 3], generator=used, blend=0.0)
    resample_rows_(weight.clone(), [0, 3], generator=other)
    assert torch.equal(weight, before) and torch.equal(used.get_state(), other.get_state())


def test_a_parameter_stays_a_trainable_leaf():
    layer = nn.Linear(4, 3)
    before = layer.weight
    resample_rows_(layer.weight, 1)
    assert layer.weight is before and before.is_leaf and before.requires_grad
    layer(torch.ones(1, 4)).sum().backward()
    assert before.grad is not None


@pytest.mark.parametrize("rule", ["kaiming_normal", "default"])
@pytest.mark.parametrize("mode", ["rule", "zero", "init"])
def test_bias_modes(rule, mode):
    weight, bias = torch.ones(5, 9, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    resample_rows_(weight, [4, 0], init=rule, bias=bias, bias_mode=mode, generator=seeded())
    generator = seeded()
    naive_rows(rule, 2, 9, 5, generator)
    expected = torch.ones(5, dtype=torch.float64)
    expected[[4, 0]] = 0.0
    if mode == "init" or (mode == "rule" and rule == "default"):
        expected[[4, 0]] = (2 * torch.rand(2, dtype=torch.float64, generator=generator) - 1) / 3
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-15)


def test_bias_is_blended_too():
    bias = torch.tensor([1.0, 2.0, 4.0])
    resample_rows_(torch.ones(3, 2), [2, 1], bias=bias, blend=0.25)
    assert bias.tolist() == [1.0, 1.5, 3.0]


def test_a_function_as_rule():
    weight = torch.zeros(4, 2, 3)
    resample_rows_(weight, [3, 1], init=lambda block, g: nn.init.orthogonal_(block, generator=g), generator=seeded())
    torch.testing.assert_close(weight[[3, 1]].flatten(1) @ weight[[3, 1]].flatten(1).T, torch.eye(2))
    before = weight.clone()
    for unfinished in (
        lambda block, g: None,
        lambda block, g: block[0].zero_(),
        lambda block, g: block.fill_(math.inf),
    ):
        with pytest.raises(ValueError, match="init left entries without a finite value"):
            resample_rows_(weight, [0, 1], init=unfinished)
    assert torch.equal(weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gets_the_rows_of_the_cpu():
    cpu, gpu = torch.zeros(5, 7), torch.zeros(5, 7, device="cuda")
    assert torch.equal(
        resample_rows_(cpu, [4, 2], generator=seeded()), resample_rows_(gpu, [4, 2], generator=seeded()).cpu()
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [0, 3]}, ValueError, r"rows holds \[3\]; numbers from 0 to 2"),
        ({"rows": -1}, ValueError, r"rows holds \[-1\]"),
        ({"rows": [1, 0, 1]}, ValueError, r"rows holds \[1\] more than once"),
        ({"rows": [True, False, True]}, TypeError, "rows is bool"),
        ({"rows": torch.tensor([1.0])}, TypeError, "rows is float"),
        ({"rows": [[0, 1]]}, TypeError, r"of shape \(1, 2\)"),
        ({"init": "kaiming"}, ValueError, "init is 'kaiming'; a function or one of"),
        ({"blend": 1.5}, ValueError, "blend is 1.5; a share from 0 to 1"),
        ({"blend": math.nan}, ValueError, "blend is nan"),
        ({"blend": True}, ValueError, "blend is True"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has the shape \(4,\); \(3,\)"),
        ({"bias": torch.zeros(3, dtype=torch.long)}, TypeError, "bias is of torch.int64"),
        ({"bias_mode": "keep"}, ValueError, "bias_mode is 'keep'"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight has the shape \(3,\)"),
        ({"weight": torch.zeros(3, 0)}, ValueError, r"weight has the shape \(3, 0\)"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int32)}, TypeError, "weight is of torch.int32"),
        ({"weight": [[1.0]]}, TypeError, "weight is a list"),
    ],
)
def test_wrong_draws(arguments, error, message):
    weight = torch.ones(3, 2)
    with pytest.raises(error, match=message):
        resample_rows_(**({"weight": weight, "rows": [0]} | arguments))
    assert torch.equal(weight, torch.ones(3, 2))


# ------------------------------------------------------------------ optimizer
MOMENTS = {  # first and second moments
    "SGD": (dict(lr=0.1, momentum=0.9), ["momentum_buffer"], []),
    "Adam": ({}, ["exp_avg"], ["exp_avg_sq"]),
    "AdamW": (dict(amsgrad=True), ["exp_avg"], ["exp_avg_sq", "max_exp_avg_sq"]),
    "Adamax": ({}, ["exp_avg"], ["exp_inf"]),
    "NAdam": ({}, ["exp_avg"], ["exp_avg_sq"]),
    "RAdam": ({}, ["exp_avg"], ["exp_avg_sq"]),
    "RMSprop": (dict(centered=True, momentum=0.5), ["momentum_buffer", "grad_avg"], ["square_avg"]),
    "Adagrad": (dict(initial_accumulator_value=0.3), [], ["sum"]),
    "Adadelta": ({}, [], ["square_avg", "acc_delta"]),
}


def trained(name, steps=3, seed=0, **extra):
    """A layer and its optimizer after some steps with random gradients."""
    torch.manual_seed(seed)
    layer = nn.Linear(4, 5).double()
    optimizer = getattr(torch.optim, name)(layer.parameters(), **MOMENTS.get(name, ({},))[0], **extra)
    for _ in range(steps):
        step(layer, optimizer)
    return layer, optimizer


def step(layer, optimizer):
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype)
    optimizer.step()


def copied(optimizer, parameter):
    return {k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}


@pytest.mark.filterwarnings("ignore:optimizer rows were zeroed")
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("mode", ["rows", "rows_seeded"])
@pytest.mark.parametrize("name", MOMENTS)
def test_row_modes_of_every_optimizer(name, mode, which):
    layer, optimizer = trained(name)
    parameter = getattr(layer, which)
    other = layer.bias if which == "weight" else layer.weight
    before, untouched = copied(optimizer, parameter), copied(optimizer, other)
    reset_optimizer_rows_(optimizer, parameter, [4, 1], mode)
    after = copied(optimizer, parameter)
    _, first, second = MOMENTS[name]
    assert before.keys() == after.keys() and set(first) | set(second) <= before.keys()
    for key in before:
        if key not in first + second:
            assert before[key].ndim == 0 and torch.equal(before[key], after[key])  # a counter
            continue
        expected = before[key].clone()
        for row in (4, 1):
            if key in first or mode == "rows":
                expected[row] = 0.3 if name == "Adagrad" else 0.0
            else:
                expected[row] = (before[key][0] + before[key][2] + before[key][3]) / 3
        torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-15)
        assert not torch.equal(before[key], after[key])
    assert all(torch.equal(v, untouched[k]) for k, v in copied(optimizer, other).items())
    step(layer, optimizer)
    assert bool(parameter.isfinite().all())


@pytest.mark.parametrize("name", [*MOMENTS, "Rprop", "ASGD", "Adafactor"])
def test_drop_is_a_new_start_of_one_parameter(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this PyTorch has no {name}")
    layer, optimizer = trained(name)
    bias = copied(optimizer, layer.bias)
    reset_optimizer_rows_(optimizer, layer.weight, [0], "drop")
    assert all(torch.equal(v, bias[k]) for k, v in copied(optimizer, layer.bias).items())
    fresh = nn.Linear(4, 5).double()
    fresh.load_state_dict(layer.state_dict())
    restarted = type(optimizer)(fresh.parameters(), **MOMENTS.get(name, ({},))[0])
    for seed in range(3):
        torch.manual_seed(seed)
        step(layer, optimizer)
        torch.manual_seed(seed)
        step(fresh, restarted)
    torch.testing.assert_close(layer.weight, fresh.weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", MOMENTS)
def test_all_rows_seeded_is_drop(name):
    ends = []
    for rows, mode in (([3, 0, 1, 4, 2], "rows_seeded"), ([1], "drop"), ([3], "rows_seeded")):
        layer, optimizer = trained(name)
        reset_optimizer_rows_(optimizer, layer.weight, rows, mode)
        step(layer, optimizer)
        ends.append(layer.weight.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("mode", ["keep", "drop", "rows", "rows_seeded"])
@pytest.mark.parametrize("name", MOMENTS)
def test_without_state_or_rows_nothing_happens(name, mode):
    layer, optimizer = trained(name, steps=0)
    reset_optimizer_rows_(optimizer, layer.weight, [1], mode)
    step(layer, optimizer)
    before = copied(optimizer, layer.weight)
    reset_optimizer_rows_(optimizer, layer.weight, [], mode)
    reset_optimizer_rows_(optimizer, layer.weight, [1], "keep")
    assert all(torch.equal(v, before[k]) for k, v in copied(optimizer, layer.weight).items())


@pytest.mark.filterwarnings("ignore:optimizer rows were zeroed")
@pytest.mark.parametrize("mode", ["drop", "rows", "rows_seeded"])
def test_fused_steps(mode):
    ends = []
    for options in ({"fused": True}, {"foreach": False}):
        layer, optimizer = trained("Adam", **options)
        reset_optimizer_rows_(optimizer, layer.weight, [2, 0], mode)
        step(layer, optimizer)
        ends.append(layer.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:optimizer rows were zeroed")
@pytest.mark.parametrize("mode", ["drop", "rows", "rows_seeded"])
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}])
def test_steps_on_a_gpu(mode, options):
    layer = nn.Linear(4, 5, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), **options)
    for _ in range(2):
        layer(torch.randn(3, 4, device="cuda")).square().sum().backward()
        optimizer.step()
        reset_optimizer_rows_(optimizer, layer.weight, [2, 0], mode)
    assert bool(layer.weight.isfinite().all())


@pytest.mark.parametrize("name", ["Rprop", "ASGD", "Adafactor"])
@pytest.mark.parametrize("steps", [0, 2])
def test_row_modes_refuse_other_state(name, steps):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this PyTorch has no {name}")
    layer, optimizer = trained(name, steps=steps)
    for mode in ("rows", "rows_seeded"):
        with pytest.raises(ValueError, match=f"with {name} .*mode 'drop' is accepted"):
            reset_optimizer_rows_(optimizer, layer.weight, [1], mode)


def test_lbfgs_has_one_state_for_all():
    layer = nn.Linear(4, 5)
    optimizer = torch.optim.LBFGS(layer.parameters())
    optimizer.step(lambda: layer(torch.ones(1, 4)).square().sum())
    assert len(optimizer.state)
    with pytest.raises(ValueError, match=r"with LBFGS .*mode 'drop' is accepted"):
        reset_optimizer_rows_(optimizer, layer.bias, [1], "rows")
    reset_optimizer_rows_(optimizer, layer.bias, [1], "drop")
    assert not len(optimizer.state)


@pytest.mark.parametrize("value", [torch.zeros(5, 4), torch.zeros(3), [torch.zeros(5, 4)], {"a": 1}])
def test_row_modes_refuse_what_they_do_not_know(value):
    layer, optimizer = trained("SGD")
    optimizer.state[layer.weight]["history"] = value
    before = copied(optimizer, layer.weight)
    with pytest.raises(ValueError, match=r"state 'history'.*mode 'drop' is accepted"):
        reset_optimizer_rows_(optimizer, layer.weight, [1], "rows_seeded")
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], before["momentum_buffer"])
    reset_optimizer_rows_(optimizer, layer.weight, [1], "drop")
    assert layer.weight not in optimizer.state


def test_the_warning_speaks_of_amplified_updates_only():
    for name, mode in (("SGD", "rows"), ("Adam", "rows_seeded"), ("Adagrad", "rows")):
        layer, optimizer = trained(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reset_optimizer_rows_(optimizer, layer.weight, [1], mode)
    layer, optimizer = trained("Adam")
    with pytest.warns(RuntimeWarning, match="mode 'rows_seeded' avoids it"):
        reset_optimizer_rows_(optimizer, layer.weight, [1], "rows")


def test_wrong_resets():
    layer, optimizer = trained("Adam")
    with pytest.raises(ValueError, match="mode is 'zero'; one of"):
        reset_optimizer_rows_(optimizer, layer.weight, [1], "zero")
    with pytest.raises(ValueError, match="is in no group of the Adam"):
        reset_optimizer_rows_(optimizer, nn.Parameter(torch.zeros(5, 4)), [1], "drop")
    with pytest.raises(ValueError, match=r"rows holds \[5\]"):
        reset_optimizer_rows_(optimizer, layer.weight, [5], "drop")
