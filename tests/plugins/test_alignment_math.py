"""Classifier alignment against plain loops, autograd and plain NumPy, and its errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.plugins.alignment_math import (
    align_classifier,
    feature_scale,
    gaussian_batches,
    logit_normalized_cross_entropy,
    mean_scale,
    reference_task_index,
    symmetric_cross_entropy,
)
from avalanche_firn.plugins.class_statistics import ClassGaussians


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def loss_by_loop(logits, targets, class_task, temperature, norm="task_mean"):
    """Row by row, class by class."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if temperature:
            slices = [[v for v, t in zip(row, class_task, strict=True) if t == k] for k in sorted(set(class_task))]
            slices = [row] if norm == "full" else slices
            size = sum(math.sqrt(sum(v * v for v in part)) + 1e-7 for part in slices) / len(slices)
            row = [v / (size * temperature) for v in row]
        top = max(row)
        total += top + math.log(sum(math.exp(v - top) for v in row)) - row[target]
    return total / len(logits)


# ------------------------------------------------------------ small functions
def test_mean_scale_by_hand_and_beyond_the_current_task():
    close(mean_scale([0, 1, 4], 4), [0.92, 0.94, 1.0], 1e-12)
    close(mean_scale(torch.tensor([11, 12]), 9), [1.02, 1.03], 1e-12)  # last task of Cars-196 in the public code
    with pytest.raises(ValueError, match="current_task"):
        mean_scale([0], -1)
    assert reference_task_index(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_feature_scale_by_hand():
    uniform = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    factors = feature_scale(uniform, torch.tensor([3, 0]), 0.02)
    close(factors, [[1 / 1.03, 1 / 1.06, 1 / 1.09], [1.0, 1.0, 1.0]], 1e-15)


# --------------------------------------------------------------------- losses
@given(
    seed=st.integers(0, 999),
    class_task=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    temperature=st.sampled_from([None, 0.0, 0.1, 0.7]),
    norm=st.sampled_from(["task_mean", "full"]),
)
@settings(max_examples=50, deadline=None)
def test_loss_equals_the_loop_and_its_gradient_the_finite_differences(seed, class_task, temperature, norm):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, len(class_task), generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(len(class_task), (3,), generator=generator)

    def loss(x):
        return logit_normalized_cross_entropy(x, targets, class_task, temperature, norm)

    assert loss(logits).item() == pytest.approx(loss_by_loop(logits, targets, class_task, temperature, norm), abs=1e-10)
    assert torch.autograd.gradcheck(loss, logits, eps=1e-7, atol=1e-5)


@given(seed=st.integers(0, 999), cut=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_loss_of_a_batch_is_the_weighted_mean_of_its_parts(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (8,), generator=generator)
    whole, first, second = (
        logit_normalized_cross_entropy(logits[part], targets[part], [0, 0, 1, 1], 0.1)
        for part in (slice(None), slice(cut), slice(cut, None))
    )
    close(whole, (cut * first + (8 - cut) * second) / 8, 1e-10)


def test_zero_slices_and_zero_rows_give_finite_gradients():
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0] = 0
    logits[1, 2:4] = 0
    leaf = logits.clone().requires_grad_()
    logit_normalized_cross_entropy(leaf, torch.arange(4), [0, 0, 1, 1, 2, 2], 0.1).backward()
    assert torch.isfinite(leaf.grad).all() and bool((leaf.grad[1, 2:4] != 0).all())
    # The same with the norms that PyTorch differentiates, which has the subgradient 0 at 0 as well.
    other = logits.clone().requires_grad_()
    norms = torch.stack([torch.linalg.vector_norm(other[:, k : k + 2], dim=1) + 1e-7 for k in (0, 2, 4)]).mean(0)
    F.cross_entropy(other / (norms[:, None] * 0.1), torch.arange(4)).backward()
    close(leaf.grad, other.grad, 1e-10 * float(other.grad.abs().max()))


def test_symmetric_cross_entropy_equals_the_loop_when_saturated():
    logits = torch.tensor([[0.0, 40.0, -3.0], [25.0, 0.0, 25.0], [-100.0, 100.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([1, 0, 2])
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        expected += 0.5 * (math.log(total) - row[target])
        for k, value in enumerate(row):
            label = min(max(float(k == target), 1e-4), 1.0)
            expected -= 0.25 * min(max(math.exp(value) / total, 1e-7), 1.0) * math.log(label)
    close(symmetric_cross_entropy(logits, targets, 0.5, 0.25), expected / 3, 1e-10)


def test_symmetric_cross_entropy_leaves_marked_rows_out():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([1, -100, 0, 3, -100, 2])
    loss = symmetric_cross_entropy(logits, targets, 0.5, 0.25)
    kept = targets >= 0
    close(loss.detach(), symmetric_cross_entropy(logits[kept], targets[kept], 0.5, 0.25).detach(), 1e-12)
    loss.backward()
    assert bool((logits.grad[~kept] == 0).all()) and bool((logits.grad[kept] != 0).all())
    assert symmetric_cross_entropy(logits, torch.full_like(targets, -100), 1.0, 1.0).isnan()


def test_losses_compute_in_float32_under_autocast_and_for_half_logits():
    logits = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(16) % 6
    expected = logit_normalized_cross_entropy(logits.float(), targets, [0, 0, 0, 1, 1, 1], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = logits.clone().requires_grad_()
        loss = logit_normalized_cross_entropy(leaf, targets, [0, 0, 0, 1, 1, 1], 0.1)
        loss.backward()
        assert symmetric_cross_entropy(logits, targets, 1.0, 0.1).dtype == torch.float32
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and leaf.grad.dtype == torch.bfloat16


def test_unfit_loss_arguments():
    logits, targets = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    for match, arguments in (
        (r"class_task: expected shape \(3,\), got \(2,\)", (logits, targets, [0, 1], 0.1)),
        (r"logits, targets: expected .* got \(4, 3\) and \(3,\)", (logits, targets[:3], [0, 0, 1], 0.1)),
        ("logits, targets: expected .* torch.int32", (logits, targets.int(), [0, 0, 1], 0.1)),
        ("norm: 'mean' is not accepted", (logits, targets, [0, 0, 1], 0.1, "mean")),
    ):
        with pytest.raises(ValueError, match=match):
            logit_normalized_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="logits, targets"):
        symmetric_cross_entropy(logits[0], targets, 1.0, 0.1)


# ------------------------------------------------------------------ alignment
def numpy_alignment(weight, bias, mean, covariance, class_task, scale_task, current, draws, temperature, settings):
    """Straight from the formulas: per class a Cholesky factor, per task a norm, gradients by hand, SGD."""
    weight, bias, n = weight.copy(), bias.copy(), 256
    velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    slices = [np.flatnonzero(class_task == k) for k in np.unique(class_task)]
    for epoch, (eps, order) in enumerate(draws):
        rate = settings["lr"] * (1 + math.cos(math.pi * epoch / settings["epochs"])) / 2
        rows = np.concatenate(
            [
                (0.9 + 0.1 * (scale_task[c] + 1) / (current + 1)) * mean[c]
                + eps[c] @ np.linalg.cholesky(covariance[c]).T
                for c in range(len(mean))
            ]
        )
        for index in np.split(order, range(n, len(order), n)):
            x, y = rows[index], index // n
            logits = x @ weight.T + bias
            norms = np.stack([np.sqrt((logits[:, s] ** 2).sum(1)) for s in slices], 1)
            size = (norms + 1e-7).mean(1)
            u = logits / (size * temperature)[:, None]
            p = np.exp(u - u.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(y)), y] -= 1
            p /= len(y)
            gradient = p / (size * temperature)[:, None]
            dsize = -(p * logits).sum(1) / (size**2 * temperature)
            for k, s in enumerate(slices):
                gradient[:, s] += (dsize / len(slices) / norms[:, k])[:, None] * logits[:, s]
            for value, v, g in ((weight, velocity, gradient.T @ x), (bias, bias_velocity, gradient.sum(0))):
                v *= settings["momentum"]
                v += g + settings["weight_decay"] * value
                value -= rate * v
    return weight, bias


@pytest.mark.parametrize("compat", [False, True])
def test_unequal_tasks_against_plain_numpy(compat):
    class_task, current, d = np.array([0, 0, 0, 0, 1, 2, 2]), 2, 6
    draw = np.random.default_rng(0)
    mean, root = 3 * draw.normal(size=(7, d)), draw.normal(size=(7, d, d))
    covariance = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(d)
    weight, bias = 0.1 * draw.normal(size=(7, d)), 0.1 * draw.normal(size=7)
    scale_task = reference_task_index(7, 2).numpy() if compat else class_task
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 5}

    gaussians = ClassGaussians("cholesky")
    for class_id in range(7):
        gaussians.add_moments(class_id, torch.from_numpy(mean[class_id]), torch.from_numpy(covariance[class_id]))
    scale = mean_scale(torch.from_numpy(scale_task), current)
    batches = gaussian_batches(gaussians, range(7), generator=torch.Generator().manual_seed(3), mean_scale=scale)
    ours = align_classifier(
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        batches,
        torch.from_numpy(class_task),
        temperature=0.1,
        **settings,
    )
    generator = torch.Generator().manual_seed(3)
    draws = [
        (
            torch.randn(7, 256, d, generator=generator).double().numpy(),
            torch.randperm(7 * 256, generator=generator).numpy(),
        )
        for _ in range(5)
    ]
    args = (weight, bias, mean, covariance, class_task)
    for actual, expected in zip(ours, numpy_alignment(*args, scale_task, current, draws, 0.1, settings), strict=True):
        close(actual, expected, 1e-9)
    other = class_task if compat else reference_task_index(7, 2).numpy()
    far = numpy_alignment(*args, other, current, draws, 0.1, settings)[0]
    assert np.abs(far - ours[0].numpy()).max() > 1e-4  # the two indices do differ here


def random_problem(dtype=torch.float64, classes=6, d=5, steps=4, epochs=3):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, d, generator=generator).to(dtype)
    bias = torch.randn(classes, generator=generator).to(dtype)
    data = [
        [
            (torch.randn(16, d, generator=generator).to(dtype), torch.randint(classes, (16,), generator=generator))
            for _ in range(steps)
        ]
        for _ in range(epochs)
    ]
    return weight, bias, data


@pytest.mark.parametrize("norm, temperature", [("task_mean", 0.1), ("full", 0.1), ("task_mean", None)])
def test_equals_autograd_with_pytorchs_own_sgd(norm, temperature):
    weight, bias, data = random_problem()
    task = [2, 0, 1, 1, 0, 5]  # any order, with gaps
    ours = align_classifier(weight, bias, lambda e: data[e], task, epochs=3, norm=norm, temperature=temperature)
    layer = torch.nn.Linear(5, 6).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    slices = [[c for c in range(6) if task[c] == k] for k in (0, 1, 2, 5)] if norm == "task_mean" else [list(range(6))]
    for epoch in data:
        for features, targets in epoch:
            logits = layer(features)
            if temperature:
                norms = torch.stack([logits[:, s].norm(dim=1) + 1e-7 for s in slices]).mean(0)
                logits = logits / (norms[:, None] * temperature)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
        schedule.step()
    close(ours[0], layer.weight.detach(), 1e-11)
    close(ours[1], layer.bias.detach(), 1e-11)


@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_order_of_classes_plays_no_role(seed):
    weight, bias, data = random_problem()
    task = torch.tensor([0, 0, 1, 2, 2, 2])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    plain = align_classifier(weight, bias, lambda e: data[e], task, epochs=3)
    mixed = align_classifier(
        weight[order], bias[order], lambda e: [(x, place[y]) for x, y in data[e]], task[order], epochs=3
    )
    close(mixed[0], plain[0][order], 1e-11)
    close(mixed[1], plain[1][order], 1e-11)


def test_any_iterable_of_batches_and_zero_epochs():
    weight, bias, data = random_problem()
    listed = align_classifier(weight, bias, lambda e: data[e], [0] * 6, epochs=3)
    lazy = align_classifier(weight, bias, lambda e: iter(data[e]), [0] * 6, epochs=3)
    assert torch.equal(listed[0], lazy[0]) and torch.equal(listed[1], lazy[1])
    tracked = [[(x.clone().requires_grad_(), y) for x, y in epoch] for epoch in data]
    graph = align_classifier(weight.requires_grad_(), bias, lambda e: tracked[e], [0] * 6, epochs=3)
    assert torch.equal(graph[0], lazy[0]) and not graph[0].requires_grad and not graph[1].requires_grad
    same = align_classifier(weight, bias, lambda e: data[e], [0] * 6, epochs=0)
    assert torch.equal(same[0], weight) and same[0].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_heads_are_aligned_in_float32_and_autocast_is_off(dtype):
    weight, bias, data = random_problem(dtype)
    wide = [[(x.float(), y) for x, y in epoch] for epoch in data]
    expected = align_classifier(weight.float(), bias.float(), lambda e: wide[e], [0, 0, 0, 1, 1, 1], epochs=3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = align_classifier(weight, bias, lambda e: data[e], [0, 0, 0, 1, 1, 1], epochs=3)
    assert torch.equal(ours[0], expected[0].to(dtype)) and torch.equal(ours[1], expected[1].to(dtype))


def test_a_head_of_zeros_is_aligned():
    _, _, data = random_problem()
    weight, bias = align_classifier(
        torch.zeros(6, 5).double(), torch.zeros(6).double(), lambda e: data[e], [0, 0, 0, 1, 1, 1], epochs=3
    )
    assert torch.isfinite(weight).all() and weight.abs().sum() > 0 and torch.isfinite(bias).all()


def test_divergence_stops_with_the_epoch():
    weight, bias, data = random_problem()
    data[1][2][0][3, 1] = math.nan
    with pytest.raises(FloatingPointError, match="alignment epoch 1: mean loss nan"):
        align_classifier(weight, bias, lambda e: data[e], [0] * 6, epochs=3)
    weight, bias, data = random_problem(torch.float32)
    with pytest.raises(FloatingPointError, match="alignment epoch 0"):
        align_classifier(weight, bias, lambda e: data[e], [0] * 6, epochs=1, lr=1e38, temperature=None)
    last_step = [(1e3 * data[0][0][0], data[0][0][1])]  # a finite loss, then a step out of range
    with pytest.raises(FloatingPointError, match=r"alignment epoch 0: mean loss \d"):
        align_classifier(weight, bias, lambda e: last_step, [0] * 6, epochs=1, lr=1e38, temperature=None)


def test_unfit_alignment_arguments():
    weight, bias, data = random_problem()
    good = {"weight": weight, "bias": bias, "batches": lambda e: data[e], "class_task": [0] * 6}
    for match, change in (
        (r"weight, bias: expected \(C, d\) and \(C,\)", {"bias": bias[:5]}),
        (r"class_task: expected shape \(6,\)", {"class_task": [0] * 5}),
        ("lr: must be at least 0", {"lr": -0.1}),
        ("lr: must be at least 0", {"lr": math.nan}),
        ("momentum: must be at least 0 and below 1, got 1.0", {"momentum": 1.0}),
        ("weight_decay: must be", {"weight_decay": -1e-4}),
        ("epochs: must be", {"epochs": -1}),
        ("batches: epoch 0 has no batch", {"batches": lambda e: []}),
        ("logits, targets: expected", {"batches": lambda e: [(data[0][0][0], data[0][0][1][:3])]}),
        ("norm: 'mean'", {"norm": "mean"}),
    ):
        with pytest.raises(ValueError, match=match):
            align_classifier(**good | change)


# -------------------------------------------------------------------- batches
@pytest.mark.parametrize("feature_scaling", [None, (0.02, torch.tensor([2, 1, 0]))])
def test_an_epoch_has_every_row_once(feature_scaling):
    gaussians = ClassGaussians()
    for class_id in (9, 4, 6):
        gaussians.add(class_id, torch.randn(4, 5, generator=torch.Generator().manual_seed(class_id)))
    scale = torch.tensor([0.9, 0.95, 1.0])
    batches = gaussian_batches(
        gaussians,
        torch.tensor([6, 9, 4]),
        8,
        5,
        generator=torch.Generator().manual_seed(0),
        mean_scale=scale,
        feature_scaling=feature_scaling,
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(2):
        rows = gaussians.sample([6, 9, 4], 8, generator, scale)
        if feature_scaling is not None:
            m = 0.02 + 0.02 * (torch.rand(3, 8, generator=generator) - 0.5)
            rows = rows / (1 + m * torch.tensor([2, 1, 0])[:, None])[:, :, None]
        order = torch.randperm(24, generator=generator)
        drawn = [(features.clone(), targets) for features, targets in batches(epoch)]
        assert [len(targets) for _, targets in drawn] == [5, 5, 5, 5, 4]
        close(torch.cat([features for features, _ in drawn]), rows.flatten(0, 1)[order], 1e-6)
        targets = torch.cat([targets for _, targets in drawn])
        assert torch.equal(targets, order // 8) and torch.bincount(targets).tolist() == [8, 8, 8]


def test_batches_reuse_one_buffer(monkeypatch):
    gaussians, buffers = ClassGaussians(), []
    gaussians.add(0, torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    sample = ClassGaussians.sample
    monkeypatch.setattr(ClassGaussians, "sample", lambda *a, **k: buffers.append(sample(*a, **k)) or buffers[-1])
    batches = gaussian_batches(gaussians, [0], 8, 4, generator=None)
    kept = next(batches(0))[0].clone()
    list(batches(1))
    assert buffers[0] is buffers[1] and not torch.equal(kept, next(batches(2))[0])


def test_unfit_batch_arguments():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="samples_per_class, batch_size"):
            gaussian_batches(ClassGaussians(), [0], *sizes, generator=None)
    with pytest.raises(KeyError, match=r"no statistics for classes \[3\]"):
        next(iter(gaussian_batches(ClassGaussians(), [3], generator=None)(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_the_cpu_with_the_noise_of_a_cpu_generator():
    gaussians = ClassGaussians(dtype=torch.float64)
    for class_id in range(6):
        gaussians.add(class_id, torch.randn(4, 5, generator=torch.Generator().manual_seed(class_id)))
    weight, bias, _ = random_problem()
    results = []
    for device in ("cpu", "cuda"):
        batches = gaussian_batches(gaussians.to(device), range(6), 32, generator=torch.Generator().manual_seed(0))
        aligned = align_classifier(weight.to(device), bias.to(device), batches, [0, 0, 1, 1, 2, 2], epochs=2)
        results.append([tensor.cpu() for tensor in aligned])
    close(results[1][0], results[0][0], 1e-10)
    close(results[1][1], results[0][1], 1e-10)
