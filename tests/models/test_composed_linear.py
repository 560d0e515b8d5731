"""ComposedLoRALinear and LoRAComposition: gradients, what stays the same to the last bit, state, errors."""

import copy
import io
import math
import warnings

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from avalanche_firn.models import lora_math
from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora, compose_delta, orthogonality_penalty

QKV = ("q", "k", "v")


def make(in_features=24, out_features=36, *, tasks=0, parts=("full",), rank=2, seed=0, bias=True, scale=0.7, **kwargs):
    """A layer with closed tasks and arbitrary numbers in them, float64."""
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, bias=bias).double()
    base.weight.requires_grad_(False)
    layer = ComposedLoRALinear(base, rank=rank, scale=scale, parts=parts, **kwargs)
    for _ in range(tasks):
        layer.open_task()
        scramble(layer)
        layer.close_task()
    return layer


def scramble(layer):
    """Numbers for the pair and the scalars of the open task, as if it had been trained."""
    with torch.no_grad():
        for index, part in enumerate(layer.parts):
            if layer._slot(index):
                layer.B[part][-1].normal_()
            if part in layer.omega and layer.is_free(part):
                layer.omega[part].add_(0.3 * torch.randn_like(layer.omega[part]))


def as_composition(*layers):
    return LoRAComposition(nn.ModuleList(layers))


def vit(**kwargs):
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | kwargs
    return timm.models.vision_transformer.VisionTransformer(**kwargs)


def lora_vit(tasks, rank=2, **kwargs):
    model = vit(**kwargs)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    add_composed_lora(model, rank=rank, scale=0.5)
    composition = LoRAComposition(model)
    for _ in range(tasks):
        composition.open_task()
        for layer in composition.layers.values():
            scramble(layer)
        composition.close_task()
    return model, composition


def naive(layer, x, *, frozen=()):
    """The same layer by automatic differentiation of the formula; returns output and leaves by name."""
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in layer.named_parameters()}
    blocks = []
    for index, part in enumerate(layer.parts):
        scalars = layer.snapshots[-1, index] if part in frozen else leaves.get(f"omega.{part}", ())
        delta = layer.base.weight.T[:, index * layer.height : (index + 1) * layer.height].clone()
        for i, scalar in enumerate(scalars):
            delta = delta + layer.scale * scalar * (leaves[f"A.{part}.{i}"] @ leaves[f"B.{part}.{i}"])
        newest = layer.num_tasks - 1
        if part not in frozen:
            delta = delta + layer.scale * (leaves[f"A.{part}.{newest}"] @ leaves[f"B.{part}.{newest}"])
        blocks.append(delta)
    y = x @ torch.cat(blocks, 1)
    return (y if layer.bias is None else y + leaves["base.bias"]), leaves


# ------------------------------------------------------------------- function of the layer
@pytest.mark.parametrize("parts", [("full",), QKV])
def test_no_task_or_a_new_pair_leaves_the_layer_as_it_was(parts):
    layer = make(parts=parts).float()
    base = copy.deepcopy(layer.base)
    for x in (torch.randn(2, 24), torch.randn(3, 40, 24)):
        assert torch.equal(layer(x), base(x))
    layer.open_task()
    assert all((B == 0).all() for part in parts for B in layer.B[part])
    for x in (torch.randn(2, 24), torch.randn(3, 40, 24)):
        assert torch.equal(layer(x), base(x)) and layer(x).requires_grad
        with torch.no_grad():
            assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.weight, base.weight)
    layer.close_task()
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    torch.testing.assert_close(layer(x[0, :1]), base(x[0, :1]), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [("full",), QKV])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_starts_where_the_one_before_ended(parts, dtype):
    layer = make(parts=parts, tasks=3).to(dtype)
    few, many = torch.randn(2, 24, dtype=dtype), torch.randn(3, 40, 24, dtype=dtype)
    before, before_few, weight = layer(many), layer(few), layer.merged_weight().clone()
    layer.open_task()
    assert torch.equal(layer(many), before) and layer(many).requires_grad  # both merge: no difference at all
    with torch.no_grad():
        assert torch.equal(layer(many), before)
    # stacked factors before, merged ones in training; and the sums of ``weight``: rounding only
    close = dict(rtol=0, atol=20 * torch.finfo(dtype).eps * float(before.detach().abs().max()))
    torch.testing.assert_close(layer(few), before_few, **close)
    torch.testing.assert_close(layer.weight.detach(), weight, **close)


def test_merged_and_stacked_are_one_function_and_rows_decide():
    layer = make(tasks=3)
    composition = as_composition(layer)
    few, many = torch.randn(14, 24).double(), torch.randn(15, 24).double()  # 24 * 36 / (24 + 36) = 14.4
    for task in range(3):
        weight = layer.merged_weight(task).clone()
        layer._kept.clear()
        with composition.as_task(task):
            y = layer(few)
            assert ("merged", task) not in layer._kept
            z = layer(many)
            assert ("merged", task) in layer._kept
        torch.testing.assert_close(y, F.linear(few, weight, layer.bias), rtol=0, atol=1e-13)
        assert torch.equal(z, F.linear(many, weight, layer.bias))


@pytest.mark.parametrize("shape", [(64,), (64, 5), (64, 3, 2)])
@pytest.mark.parametrize("parts", [("full",), QKV])
def test_samples_of_different_tasks_in_one_pass(shape, parts):
    layer = make(tasks=4, parts=parts).float()
    composition = as_composition(layer)
    x, tasks = torch.randn(*shape, 24), torch.arange(64) % 4
    with torch.no_grad():
        with composition.as_tasks(tasks):
            together = layer(x)
        order = torch.randperm(64)
        with composition.as_tasks(tasks[order]):
            shuffled = layer(x[order])
        alone = []
        for n in range(64):
            with composition.as_tasks(tasks[n : n + 1]):
                alone.append(layer(x[n : n + 1]))
        each = []
        for n in range(64):
            with composition.as_task(n % 4):
                each.append(layer(x[n : n + 1]))
        # a model that folds the windows of a sample into the first dimension
        with composition.as_tasks(tasks):
            windows = layer(x.repeat_interleave(3, 0))[::3]
    close = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, together[order], **close)
    torch.testing.assert_close(torch.cat(alone), together, **close)
    torch.testing.assert_close(torch.cat(each), together, **close)
    torch.testing.assert_close(windows, together, **close)


def test_different_tasks_in_one_pass_through_a_transformer():
    model, composition = lora_vit(3)
    model.eval()
    x, tasks = torch.randn(64, 3, 16, 16), torch.randint(3, (64,))
    with torch.no_grad():
        with composition.as_tasks(tasks):
            together = model(x)
        order = torch.randperm(64)
        with composition.as_tasks(tasks[order]):
            torch.testing.assert_close(model(x[order]), together[order], rtol=0, atol=1e-5)
        for n in range(64):
            with composition.as_tasks(tasks[n : n + 1]):
                torch.testing.assert_close(model(x[n : n + 1]), together[n : n + 1], rtol=0, atol=1e-5)
            with composition.as_task(int(tasks[n])):
                torch.testing.assert_close(model(x[n : n + 1]), together[n : n + 1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------- gradients
WAYS = {"rows": (64, 72), "dense": (6, 9)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [("full",), QKV])
@pytest.mark.parametrize("tasks", [0, 1, 3])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 2)])
def test_gradients_are_those_of_the_formula(monkeypatch, way, parts, tasks, shape):
    used = []
    for name in ("rows", "dense"):
        original = getattr(lora_math, f"_from_{name}")
        monkeypatch.setattr(
            lora_math, f"_from_{name}", lambda *args, o=original, n=name: used.append(n) or o(*args)
        )  # fmt: skip
    layer = make(*WAYS[way], tasks=tasks, parts=parts)
    layer.open_task()
    scramble(layer)
    x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    twin = x.detach().clone().requires_grad_()
    expected, leaves = naive(layer, twin)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    assert set(used) == {way}
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-11)
    compare_gradients(layer, leaves)
    assert layer.base.bias.grad is not None and layer.base.weight.grad is None


def compare_gradients(layer, leaves, atol=1e-11):
    for name, parameter in layer.named_parameters():
        if parameter.grad is None:
            assert leaves[name].grad is None or (leaves[name].grad == 0).all(), name
        else:
            torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-11, atol=atol)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_with_frozen_parts_and_through_the_weight(way):
    for by_weight in (False, True):
        layer = make(*WAYS[way], tasks=2, parts=QKV)
        layer.freeze_parts([False, True, False])
        layer.open_task()
        scramble(layer)
        x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
        y = F.linear(x, layer.weight, layer.bias) if by_weight else layer(x)
        twin = x.detach().clone().requires_grad_()
        expected, leaves = naive(layer, twin, frozen=("k",))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-11)
        compare_gradients(layer, leaves)
        assert all(p.grad is None for n, p in layer.named_parameters() if ".k" in n)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_and_biases_without_gradient(way):
    layer = make(*WAYS[way], tasks=1, bias=False)
    layer.open_task()
    scramble(layer)
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    expected, leaves = naive(layer, x)
    expected.square().sum().backward()
    layer(x).square().sum().backward()
    compare_gradients(layer, leaves)

    layer = make(*WAYS[way], tasks=1)
    layer.base.bias.requires_grad_(False)
    layer.open_task()
    layer(x).sum().backward()
    assert layer.base.bias.grad is None and layer.B["full"][1].grad is not None


def test_gradients_accumulate_over_calls_of_one_layer():
    layer = make(tasks=1)
    layer.open_task()
    scramble(layer)
    x = torch.randn(5, 24, dtype=torch.float64)
    square = ComposedLoRALinear(nn.Linear(24, 24).double(), rank=2, scale=1.0)
    square.open_task()
    square.B["full"][0].data.normal_()
    square(square(x)).sum().backward()
    A, B = (square.get_parameter(f"{f}.full.0").detach().clone().requires_grad_() for f in "AB")
    weight = square.base.weight.detach() + (A @ B).T
    F.linear(F.linear(x, weight, square.bias), weight, square.bias).sum().backward()
    torch.testing.assert_close(square.A["full"][0].grad, A.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(square.B["full"][0].grad, B.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_mixed_precision_are_near_and_in_the_type_of_the_parameters(way):
    layer = make(*WAYS[way], tasks=2, parts=QKV).float()
    layer.open_task()
    scramble(layer)
    x = torch.randn(40, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    exact = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    got = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}
    assert got.keys() == exact.keys() and all(g.dtype == torch.float32 for g in got.values())
    for name, gradient in exact.items():
        assert (got[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, monkeypatch):
    results = []
    for checkpointing in (False, True):
        model, composition = lora_vit(2)
        model.double()
        composition.open_task()
        torch.manual_seed(1)
        for layer in composition.layers.values():
            scramble(layer)
        model.set_grad_checkpointing(checkpointing)
        if reentrant and checkpointing:
            monkeypatch.setattr(
                timm.models.vision_transformer,
                "checkpoint_seq",
                lambda blocks, x, **_: torch.utils.checkpoint.checkpoint_sequential(blocks, 2, x, use_reentrant=True),
            )
        x = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        records = {position: [] for position in composition.positions}
        with composition.recording({p: r.append for p, r in records.items()}):
            model(x).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(len(found) == 1 for found in records.values())
        results.append((gradients | {"x": x.grad}, torch.stack([r[0] for r in records.values()])))
    (plain, importance), (checkpointed, again) = results
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(again, importance, rtol=1e-11, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by_weight", [False, True])
def test_importance_is_the_mean_of_weight_times_gradient(way, by_weight):
    layer = make(*WAYS[way], tasks=2, parts=QKV)
    composition = as_composition(layer)
    composition.open_task()
    scramble(layer)
    x = torch.randn(4, 3, layer.in_features, dtype=torch.float64)
    weight = naive(layer, torch.eye(layer.in_features).double())[0].detach() - layer.bias.detach()
    weight = weight.T.clone().requires_grad_()
    F.linear(x, weight, layer.bias).square().sum().backward()
    expected = (weight * weight.grad).abs().detach().split(layer.height)

    def run():
        layer.zero_grad()
        (F.linear(x, layer.weight, layer.bias) if by_weight else layer(x)).square().sum().backward()
        return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}

    plain, found = run(), {}
    wanted = {p: (lambda value, p=p: found.__setitem__(p, value)) for p in ("0.q", "0.v")}
    with composition.recording(wanted):
        recorded = run()
    assert found.keys() == wanted.keys() and all(v.shape == () and not v.requires_grad for v in found.values())
    torch.testing.assert_close(found["0.q"], expected[0].mean(), rtol=1e-11, atol=0)
    torch.testing.assert_close(found["0.v"], expected[2].mean(), rtol=1e-11, atol=0)
    for name, gradient in plain.items():
        torch.testing.assert_close(recorded[name], gradient, rtol=1e-11, atol=1e-11)
    found.clear()
    run()
    assert not found  # outside of ``recording``


# ----------------------------------------------------------------- what must not change
def train(parameters, layer, steps=5, **adam):
    optimizer = torch.optim.Adam(parameters, lr=0.05, **{"weight_decay": 0.1} | adam)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 40, layer.in_features)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("frozen", [(True, False, False), (False, True, True), (True, True, True)])
def test_frozen_matrices_and_closed_tasks_are_the_same_to_the_last_bit(frozen):
    layer = make(parts=QKV, tasks=2).float()
    layer.freeze_parts(frozen)
    tasks = [layer.merged_weight(task).clone() for task in range(2)]
    for _ in range(2):
        layer.open_task()
        train(layer.parameters(), layer)  # all of them, as Avalanche does
        for index, is_frozen in enumerate(frozen):
            rows = slice(index * layer.height, (index + 1) * layer.height)
            assert torch.equal(layer.merged_weight()[rows], tasks[1][rows]) == is_frozen
        layer.close_task()
        for index, is_frozen in enumerate(frozen):
            rows = slice(index * layer.height, (index + 1) * layer.height)
            assert torch.equal(layer.merged_weight()[rows], tasks[1][rows]) == is_frozen
        assert all(torch.equal(layer.merged_weight(task), weight) for task, weight in enumerate(tasks))
        x = torch.randn(64, 24)
        expected = F.linear(x, layer.merged_weight(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_scalars_carry_over_and_pairs_of_closed_tasks_are_constant():
    layer = make(tasks=2)
    before = layer.omega["full"].detach().clone()
    assert torch.equal(layer.snapshots[1, 0], torch.cat([before, torch.ones(1).double()]))
    layer.open_task()
    assert torch.equal(layer.omega["full"].detach(), torch.cat([before, torch.ones(1).double()]))
    assert (
        [A.requires_grad for A in layer.A["full"]] == [B.requires_grad for B in layer.B["full"]] == [False] * 2 + [True]
    )
    assert layer.omega["full"].requires_grad


def test_after_the_last_task_is_closed_nothing_is_trained():
    layer = make(tasks=2)
    x = torch.randn(64, 24, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "base.bias")


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_merged_weights_follow_the_optimizer(settings):
    layer = make(tasks=2, parts=QKV).float()
    layer.open_task()
    scramble(layer)
    x = torch.randn(64, 24)
    for parameters in (layer.A.parameters(), layer.B.parameters(), layer.omega.parameters()):
        before = layer.merged_weight().clone()
        assert layer.merged_weight() is layer.merged_weight()
        train([p for p in parameters if p.requires_grad], layer, steps=1, **settings)
        after = layer.merged_weight()
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(F.linear(x, after, layer.bias), layer(x), rtol=0, atol=1e-5)
    before = layer.merged_weight(0).clone()
    with torch.no_grad():
        layer.base.weight.mul_(2)
    assert (layer.merged_weight(0) - before).abs().max() > 0.1


def test_merged_weights_are_kept_for_few_tasks_the_first_one_always():
    layer = make(tasks=6)
    first = layer.merged_weight(0)
    for task in (1, 2, 3, 4, 5, 2, 1):
        kept = layer.merged_weight(task)
        assert layer.merged_weight(task) is kept and layer.merged_weight(0) is first
        assert sum(key[0] == "merged" for key in layer._kept) <= layer.keep_merged == 2
    layer.keep_merged = 4
    for task in (1, 2, 3, 4, 5):
        layer.merged_weight(task)
        assert sum(key[0] == "merged" for key in layer._kept) <= 4
    kept = [layer.merged_weight(task) for task in (3, 4, 5)]
    assert all(layer.merged_weight(task) is weight for task, weight in zip((3, 4, 5), kept, strict=True))
    assert layer.merged_weight(0) is first


# -------------------------------------------------------------------------- initial pairs
def test_kaiming_is_uniform_in_one_over_root_rank():
    layer = ComposedLoRALinear(nn.Linear(1024, 32), rank=16, scale=1.0)
    layer.open_task(torch.Generator().manual_seed(0))
    A = layer.A["full"][0].detach()
    assert A.numel() >= 10_000 and A.shape == (1024, 16)
    assert A.abs().max() <= 0.25 and A.abs().max() > 0.249
    assert A.var().item() == pytest.approx(1 / (3 * 16), rel=0.05) and abs(A.mean()) < 0.01
    assert (layer.B["full"][0] == 0).all() and layer.B["full"][0].shape == (16, 32)


def test_initial_pairs_follow_the_generator_and_the_global_seed():
    def pairs(generator, seed):
        torch.manual_seed(seed)
        layer = ComposedLoRALinear(nn.Linear(24, 36), rank=2, scale=1.0, parts=QKV)
        torch.manual_seed(seed)
        layer.open_task(generator)
        return torch.stack([layer.A[part][0].detach() for part in QKV])

    first = pairs(torch.Generator().manual_seed(3), 0)
    assert torch.equal(first, pairs(torch.Generator().manual_seed(3), 1))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(pairs(None, 5), pairs(None, 5)) and not torch.equal(pairs(None, 5), pairs(None, 6))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_qr_starts_orthonormal_and_orthogonal_to_the_history(dtype, tolerance):
    layer = ComposedLoRALinear(nn.Linear(12, 24).to(dtype), rank=4, scale=1.0, parts=("q", "k"), init="qr")
    composition = as_composition(layer)
    for task in range(3):  # the third task fills the space
        composition.open_task()
        assert composition.orthogonality() < 10 * tolerance
        for part in ("q", "k"):
            A = torch.cat(list(layer.A[part]), 1).detach()
            torch.testing.assert_close(A.T @ A, torch.eye(4 * task + 4, dtype=dtype), rtol=0, atol=tolerance)
        composition.close_task()
    with pytest.warns(RuntimeWarning, match="input width 12"):
        composition.open_task()
    A = layer.A["q"][3].detach()  # no room left: still orthonormal by itself
    torch.testing.assert_close(A.T @ A, torch.eye(4, dtype=dtype), rtol=0, atol=tolerance)


def test_qr_takes_a_history_that_is_not_orthonormal():
    layer = make(tasks=3, init="kaiming")
    layer.init = "qr"
    layer.open_task()
    *history, A = (a.detach() for a in layer.A["full"])
    assert (torch.cat(history, 1).T @ A).abs().max() < 1e-13
    torch.testing.assert_close(A.T @ A, torch.eye(2).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [("full",), QKV])
def test_svd_takes_the_first_right_singular_vectors(parts):
    layer = make(parts=parts, rank=3, init="svd")
    layer.open_task()
    for part, weight in zip(parts, layer.base.weight.split(layer.height), strict=True):
        right = torch.linalg.svd(weight)[2][:3].T
        A = layer.A[part][0].detach()
        torch.testing.assert_close(A.abs(), right.abs(), rtol=0, atol=1e-12)
        torch.testing.assert_close((A * right).sum(0).abs(), torch.ones(3).double(), rtol=0, atol=1e-12)
        assert (A.gather(0, A.abs().argmax(0, keepdim=True)) > 0).all()


def slca_layer(file, weight, bias, lora):
    """A layer with the B of the file, and A's signs relative to the file."""
    base = nn.Linear(file[weight].shape[1], file[weight].shape[0]).double()
    base.load_state_dict({"weight": torch.from_numpy(file[weight]), "bias": torch.from_numpy(file[bias])})
    layer = ComposedLoRALinear(base, rank=int(file["rank"]), scale=float(file["lora_scale"]), init="svd")
    layer.open_task()
    A = torch.from_numpy(file[f"{lora}_A"])  # (r, in), ours is the transpose
    signs = (layer.A["full"][0].detach().T * A).sum(1).sign()
    torch.testing.assert_close(layer.A["full"][0].detach().T * signs[:, None], A, rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.B["full"][0].copy_((torch.from_numpy(file[f"{lora}_B"]) * signs).T)
    return layer, signs


def check_slca(file, layer, signs, lora):
    close = dict(rtol=0, atol=1e-10)
    A, B = layer.A["full"][0].grad, layer.B["full"][0].grad
    torch.testing.assert_close(
        A.T * signs[:, None], torch.from_numpy(file[lora.replace("lora", "grad_lora", 1) + "_A"]), **close
    )
    torch.testing.assert_close(
        B.T * signs, torch.from_numpy(file[lora.replace("lora", "grad_lora", 1) + "_B"]), **close
    )


def test_golden_lora_modules_of_slcapp(golden):
    file = golden("slca", "lora_modules")
    close = dict(rtol=0, atol=1e-10)
    (fc1, signs1), (fc2, signs2) = (
        slca_layer(file, f"mlp_fc{i}.weight", f"mlp_fc{i}.bias", f"mlp_lora_{i}") for i in (1, 2)
    )
    x = torch.from_numpy(file["mlp_x"]).requires_grad_()
    y = fc2(F.gelu(fc1(x)))
    torch.testing.assert_close(y.detach(), torch.from_numpy(file["mlp_y"]), **close)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, torch.from_numpy(file["mlp_grad_x"]), **close)
    check_slca(file, fc1, signs1, "mlp_lora_1")
    check_slca(file, fc2, signs2, "mlp_lora_2")

    attention = Attention(8, int(file["num_heads"]), qkv_bias=True).double()
    attention.qkv, signs = slca_layer(file, "attn_qkv.weight", "attn_qkv.bias", "attn_lora")
    attention.proj.load_state_dict({n: torch.from_numpy(file[f"attn_proj.{n}"]) for n in ("weight", "bias")})
    x = torch.from_numpy(file["attn_x"]).requires_grad_()
    y = attention(x)
    torch.testing.assert_close(y.detach(), torch.from_numpy(file["attn_y"]), **close)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, torch.from_numpy(file["attn_grad_x"]), **close)
    check_slca(file, attention.qkv, signs, "attn_lora")


# ------------------------------------------------------------------------------------ state
def test_deepcopy_is_independent_and_has_no_view():
    layer = make(tasks=2, parts=QKV)
    composition = as_composition(layer)
    with composition.as_task(0):
        twin = copy.deepcopy(layer)
        assert layer._view == 0
    assert twin._view is None and not twin._kept
    x = torch.randn(64, 24).double()
    assert torch.equal(twin(x), layer(x))
    twin.open_task()
    scramble(twin)
    assert (layer.num_tasks, twin.num_tasks) == (2, 3)
    with torch.no_grad():
        twin.A["q"][0].zero_()
    assert layer.A["q"][0].abs().max() > 0
    model, _ = lora_vit(1)
    torch.testing.assert_close(
        copy.deepcopy(model).eval()(torch.ones(1, 3, 16, 16)), model.eval()(torch.ones(1, 3, 16, 16))
    )


def test_change_of_type():
    layer = make(tasks=2, parts=QKV)
    x = torch.randn(64, 24).double()
    before = layer(x)
    layer.float()
    assert layer.snapshots.dtype == layer.merged_weight().dtype == torch.float32 and layer.frozen.dtype == torch.bool
    torch.testing.assert_close(layer(x.float()).double(), before, rtol=1e-5, atol=1e-5)
    layer.open_task()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    layer.double()
    layer(x).sum().backward()


@pytest.mark.parametrize("already", [0, 1, 2])
@pytest.mark.parametrize("is_open", [False, True])
def test_state_dict_grows_an_emptier_model_and_draws_no_random_numbers(already, is_open):
    model, composition = lora_vit(2)
    frozen = torch.zeros(len(composition.positions), dtype=torch.bool)
    frozen[[0, 3, 9]] = True
    composition.freeze(frozen)
    composition.open_task()
    for layer in composition.layers.values():
        scramble(layer)
    if not is_open:
        composition.close_task()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)

    other, grown = lora_vit(already)
    random = torch.get_rng_state()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(random, torch.get_rng_state())
    assert (grown.num_tasks, grown.num_closed) == (3, 2 + (not is_open)) and torch.equal(grown.frozen, frozen)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]) and parameter.requires_grad == theirs[name].requires_grad, name
    for name, layer in composition.layers.items():
        assert torch.equal(layer.snapshots, grown.layers[name].snapshots)
    x = torch.randn(4, 3, 16, 16)
    for task in range(composition.num_closed):
        with torch.no_grad(), composition.as_task(task), grown.as_task(task):
            assert torch.equal(model.eval()(x), other.eval()(x))
    gradients = []
    for which, of in ((model, composition), (other, grown)):
        if not is_open:
            of.open_task(torch.Generator().manual_seed(0))
        (which(x).square().sum() + of.orthogonality()).backward()
        gradients.append({n: p.grad for n, p in which.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_a_state_with_fewer_tasks_is_refused():
    small, _ = lora_vit(1)
    large, _ = lora_vit(2)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.A: the layer holds 2 tasks, the state 1"):
        large.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="the layer holds 2 tasks, the state 0"):
        large.load_state_dict(vit().state_dict())


# ------------------------------------------------------------------------------ composition
def test_positions_parameters_and_frozen_flags():
    model, composition = lora_vit(0)
    kinds = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert composition.positions == [f"blocks.{block}.{kind}" for kind in kinds for block in range(2)]
    assert composition.pairs() == composition.scalars() == []
    composition.open_task()
    assert len(composition.pairs()) == 24 and composition.scalars() == []
    composition.close_task()
    frozen = torch.arange(12) % 4 == 1
    composition.freeze(frozen)
    assert torch.equal(composition.frozen, frozen) and torch.equal(LoRAComposition(model).frozen, frozen)
    composition.open_task()
    assert len(composition.pairs()) == 2 * 9 and len(composition.scalars()) == 9
    trained = {id(p) for p in (*composition.pairs(), *composition.scalars())}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    free = [position for position, flag in zip(composition.positions, frozen, strict=True) if not flag]
    assert free[:2] == ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.k"]


def test_orthogonality_adds_the_free_matrices():
    _, composition = lora_vit(2)
    frozen = torch.arange(12) % 3 == 0
    composition.freeze(frozen)
    assert LoRAComposition(nn.ModuleList(composition.layers.values())).orthogonality() == 0  # no open task
    composition.open_task()
    expected = 0.0
    for (name, part), is_frozen in zip(composition._places, frozen, strict=True):
        *history, current = composition.layers[name].A[part]
        if not is_frozen:
            expected = expected + orthogonality_penalty(torch.cat(history, 1), current)
    torch.testing.assert_close(composition.orthogonality(), expected)
    with torch.no_grad():  # the history is kept, the current pair is not
        composition.pairs()[0].mul_(2)
    assert (composition.orthogonality() - expected).abs() > 0.1


def test_overlap():
    layer = ComposedLoRALinear(nn.Linear(4, 4), rank=1, scale=1.0)
    composition = as_composition(layer)
    for column in ([2.0, 0, 0, 0], [3.0, 4, 0, 0]):
        composition.open_task()
        assert composition.num_tasks == 2 or all(math.isnan(v) for v in composition.overlap().values())
        with torch.no_grad():
            layer.A["full"][-1].copy_(torch.tensor(column)[:, None])
        composition.close_task()
    assert composition.overlap() == pytest.approx({"largest": 6.0, "cosine": 0.6, "mean-cosine": 0.6})
    composition.freeze(torch.tensor([True]))
    assert all(math.isnan(v) for v in composition.overlap().values())


def test_overlap_without_a_task():
    assert all(math.isnan(v) for v in as_composition(make()).overlap().values())


@pytest.mark.parametrize("change", ["close", "double", "load", "layer"])
def test_orthogonality_after_a_change(change):
    model, composition = lora_vit(1)
    composition.open_task()
    composition.orthogonality()
    if change == "close":
        composition.close_task()
    elif change == "double":
        model.double()
    elif change == "load":
        other, of = lora_vit(2)
        of.open_task()
        model.load_state_dict(other.state_dict())
    else:
        for layer in composition.layers.values():
            layer.close_task()
            layer.open_task()
    assert torch.equal(composition.orthogonality(), LoRAComposition(model).orthogonality())


@pytest.mark.parametrize("what", ["weight", "orthogonality"])
def test_training_after_an_evaluation_in_inference_mode(what):
    layer = make(tasks=2)
    layer.open_task()
    composition = as_composition(layer)
    x = torch.randn(64, 24).double()
    with torch.inference_mode():
        layer(x)
        composition.orthogonality()
    layer(x).sum().backward()  # is right already
    (layer.weight if what == "weight" else composition.orthogonality()).sum().backward()


def test_parts_are_not_frozen_before_the_first_task():
    layer = make(parts=QKV)
    layer.freeze_parts([False, False, False])
    with pytest.raises(RuntimeError, match="no task has been trained; matrices are frozen from the second task on"):
        layer.freeze_parts([True, False, False])


@pytest.mark.parametrize("by_weight", [False, True])
def test_frozen_parts_are_not_recorded(by_weight):
    layer = make(parts=QKV, tasks=1)
    layer.freeze_parts([True, False, False])
    layer.open_task()
    found = {}
    x = torch.randn(5, 24).double()
    with as_composition(layer).recording({f"0.{p}": (lambda value, p=p: found.__setitem__(p, value)) for p in QKV}):
        (F.linear(x, layer.weight) if by_weight else layer(x)).square().sum().backward()
    assert found.keys() == {"k", "v"}


@pytest.mark.parametrize("by_weight", [False, True])
def test_the_base_weight_has_no_gradient(by_weight):
    layer = make(tasks=1)
    layer.base.weight.requires_grad_(True)
    layer.open_task()
    x = torch.randn(5, 24).double()
    (F.linear(x, layer.weight) if by_weight else layer(x)).square().sum().backward()
    assert layer.base.weight.grad is None and layer.B["full"][1].grad is not None


def test_a_frozen_part_that_is_trained_by_another_gate_is_not_recorded():
    layer = make(parts=QKV, tasks=1, gates={"k": "q"})
    layer.freeze_parts([False, True, False])
    layer.open_task()
    found = []
    with as_composition(layer).recording({"0.k": found.append}):
        layer(torch.randn(5, 24).double()).square().sum().backward()
    assert not found and layer.B["k"][1].grad.abs().max() > 0 and layer.omega["k"].grad is None


def test_views_end_with_their_context():
    layer = make(tasks=2)
    composition = as_composition(layer)
    x = torch.randn(64, 24).double()
    now = layer(x)
    with pytest.raises(ZeroDivisionError), composition.as_task(0):
        assert not torch.equal(layer(x), now)
        with composition.as_tasks(torch.ones(64, dtype=torch.int64)):
            torch.testing.assert_close(layer(x), now)
        assert torch.equal(layer(x), F.linear(x, layer.merged_weight(0), layer.bias))
        1 / 0  # noqa: B018
    assert torch.equal(layer(x), now)


# -------------------------------------------------------------------------- errors, warnings
def test_refused_arguments():
    def layer(base=None, **kwargs):
        return ComposedLoRALinear(base or nn.Linear(8, 12), **{"rank": 2, "scale": 1.0} | kwargs)

    with pytest.raises(TypeError, match=r"base is a Conv2d; a torch\.nn\.Linear is accepted"):
        layer(nn.Conv2d(3, 3, 1))
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank is {rank}; 1 to 8, the smaller side"):
            layer(rank=rank)
    with pytest.raises(ValueError, match="rank is 5; 1 to 4"):  # a third of the fused layer
        layer(rank=5, parts=QKV)
    with pytest.raises(ValueError, match="scale is nan; a finite"):
        layer(scale=math.nan)
    for parts in ((), ("q", "q"), ("a", "b", "c", "d", "e")):
        with pytest.raises(ValueError, match="distinct names of equal shares of 12 rows"):
            layer(parts=parts)
    with pytest.raises(ValueError, match="init is 'xavier'; 'kaiming', 'qr' or 'svd'"):
        layer(init="xavier")
    with pytest.raises(ValueError, match=r"gates names \['key'\]; .*\['q', 'k', 'v'\]"):
        layer(parts=QKV, gates={"key": "q"})


def test_order_of_tasks():
    layer = make(parts=QKV)
    with pytest.raises(RuntimeError, match="no task is open"):
        layer.close_task()
    with pytest.raises(IndexError, match="task 0 is not closed"):
        layer.merged_weight(0)
    layer.open_task()
    with pytest.raises(RuntimeError, match="task 0 is open; close it"):
        layer.open_task()
    with pytest.raises(RuntimeError, match="task 0 is open; matrices are frozen between tasks"):
        layer.freeze_parts([True] * 3)
    layer.close_task()
    with pytest.raises(RuntimeError, match="no task is open"):
        layer.close_task()
    with pytest.raises(ValueError, match=r"frozen has 1 flags; one for each of \['q', 'k', 'v'\]"):
        layer.freeze_parts([True])
    composition = as_composition(layer)
    with pytest.raises(ValueError, match=r"shape \(2,\); \(3,\) is accepted"):
        composition.freeze(torch.zeros(2, dtype=torch.bool))
    for task in (-1, 1):
        with (
            pytest.raises(IndexError, match=f"task {task} is not closed; 0 to 0 are accepted"),
            composition.as_task(task),
        ):
            pass
        with pytest.raises(IndexError, match=f"task {task} is not closed; 0 to 0 are accepted"):
            layer.merged_weight(task)
    with pytest.raises(ValueError, match=r"torch\.float32; \(B,\) torch\.int64"), composition.as_tasks(torch.zeros(2)):
        pass
    tasks = torch.zeros(2, dtype=torch.int64)
    with composition.as_tasks(tasks), pytest.raises(ValueError, match="5 rows in its first dimension for 2 samples"):
        layer(torch.zeros(5, 24).double())
    with composition.as_tasks(tasks), pytest.raises(RuntimeError, match="reads the weight of a layer"):
        _ = layer.weight
    with pytest.raises(ValueError, match=r"Sequential has no composed LoRA layer.*add_composed_lora"):
        LoRAComposition(nn.Sequential(nn.Linear(2, 2)))


def test_warning_where_pairs_exceed_the_width_once():
    layer = ComposedLoRALinear(nn.Linear(8, 8), rank=3, scale=1.0)
    composition = as_composition(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            composition.open_task()
            composition.close_task()
    text = r"3 tasks of rank 3 exceed the input width 8 of a layer: .* stays above sqrt\(1\)"
    with pytest.warns(RuntimeWarning, match=text) as caught:
        composition.open_task()
    assert caught[0].filename == __file__
    with torch.no_grad():  # the bound, reached: columns of the identity and one more
        for task, columns in enumerate(torch.eye(9)[:8].split(3, 1)):
            layer.A["full"][task].copy_(columns)
    assert LoRAComposition(nn.ModuleList([layer])).orthogonality().item() == pytest.approx(1)
    composition.close_task()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        composition.open_task()


def test_refused_shapes_of_the_functions():
    with pytest.raises(ValueError, match=r"expected \(n, in, r\), \(n, r, out\), \(n,\), got \(2, 4, 3\)"):
        compose_delta(torch.zeros(2, 4, 3), torch.zeros(2, 2, 5), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"got \(5, 2\) and \(4, 2\)"):
        orthogonality_penalty(torch.zeros(5, 2), torch.zeros(4, 2))
    assert torch.equal(
        compose_delta(torch.zeros(0, 4, 3), torch.zeros(0, 3, 5), torch.zeros(0), 1.0), torch.zeros(4, 5)
    )
