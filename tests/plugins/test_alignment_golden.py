"""Classifier alignment against the numbers of the official code (tests/golden/slca/README.md)."""

import sys

import numpy as np
import pytest
import torch

from avalanche_firn.plugins.alignment_math import (
    align_classifier,
    cosine_rates,
    feature_scale,
    gaussian_batches,
    logit_normalized_cross_entropy,
    mean_scale,
    symmetric_cross_entropy,
)
from avalanche_firn.plugins.class_statistics import ClassGaussians


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def tau(value):
    return None if np.isnan(value) else float(value)


def tensors(file, *names):
    return tuple(torch.from_numpy(file[name]) for name in names)


def sgd(file):
    return {name: float(file[name]) for name in ("lr", "momentum", "weight_decay")} | {"epochs": int(file["epochs"])}


@pytest.mark.parametrize("case", ["t1", "t2", "t9"])
def test_golden_mean_scale(golden, case):
    file = golden("slca", "mean_scale")
    scale = mean_scale(torch.from_numpy(file[f"{case}_class_task"]), int(file[f"{case}_current_task"]))
    assert scale.dtype == torch.float64
    close(scale, file[f"{case}_scale"], 1e-12)


def test_golden_cosine_rates(golden):
    expected = golden("slca", "lr_tables")["ca_5_epochs"]
    close(torch.tensor(cosine_rates(0.01, 5), dtype=torch.float64), expected, 1e-12)
    close(torch.tensor(cosine_rates(0.01, 3), dtype=torch.float64), golden("slca", "ca_slca_explicit")["lrs"], 1e-12)
    assert cosine_rates(0.01, 0) == []


@pytest.mark.parametrize("case", ["plain", "norm_0p1", "norm_0p05_separated", "unequal_0p1"])
def test_golden_logit_norm_loss(golden, case):
    file = golden("slca", "logit_norm_loss")
    logits, targets, task = tensors(file, f"{case}_logits", f"{case}_targets", f"{case}_class_task")
    expected = torch.from_numpy(file[f"{case}_grad"])
    generator = torch.Generator().manual_seed(0)
    for order in (torch.arange(logits.shape[1]), torch.randperm(logits.shape[1], generator=generator)):
        leaf = logits[:, order].requires_grad_()
        column = torch.argsort(order)[targets]
        loss = logit_normalized_cross_entropy(leaf, column, task[order], tau(file[f"{case}_temperature"]))
        close(loss.detach(), file[f"{case}_loss"], 1e-10)
        (3 * loss).backward()
        close(leaf.grad, 3 * expected[:, order], 3e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["cifar", "imagenet_r", "ce_only"])
def test_golden_symmetric_cross_entropy(golden, case):
    file = golden("slca", "sce_loss")
    logits, targets = tensors(file, f"{case}_logits", f"{case}_targets")
    logits.requires_grad_()
    loss = symmetric_cross_entropy(logits, targets, float(file[f"{case}_alpha"]), float(file[f"{case}_beta"]))
    close(loss.detach(), file[f"{case}_loss"], 1e-10)
    loss.backward()
    close(logits.grad, file[f"{case}_grad"], 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_golden_alignment_with_given_batches(golden, dtype, tolerance):
    file = golden("slca", "ca_slca_explicit")
    features, targets, task, weight, bias = tensors(file, "features", "targets", "class_task", "weight0", "bias0")
    weight, bias, size, seen = weight.to(dtype).requires_grad_(), bias.to(dtype), int(file["batch_size"]), []
    before = weight.detach().clone(), bias.clone()

    def batches(epoch):
        return zip(features[epoch].to(dtype).split(size), targets[epoch].long().split(size), strict=True)

    def on_epoch(epoch, loss):
        seen.append(loss)

    with torch.no_grad():
        new_weight, new_bias = align_classifier(
            weight, bias, batches, task, temperature=float(file["temperature"]), on_epoch=on_epoch, **sgd(file)
        )
    assert new_weight.dtype == new_bias.dtype == dtype and not new_weight.requires_grad
    close(new_weight, file["weight1"], tolerance)
    close(new_bias, file["bias1"], tolerance)
    close(torch.tensor(seen, dtype=torch.float64), file["losses"].mean(1), 20 * tolerance)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1]) and weight.grad is None


def stored_noise(monkeypatch, eps):
    """Let ``ClassGaussians`` take the stored normals, one epoch after the other."""
    blocks = iter(torch.from_numpy(eps).double())
    monkeypatch.setattr(
        sys.modules[ClassGaussians.__module__], "fill_normal", lambda out, generator: out.copy_(next(blocks))
    )


def store_of(file):
    gaussians = ClassGaussians("cholesky")
    for class_id, (mean, covariance) in enumerate(zip(*tensors(file, "mean", "cov"), strict=True)):
        gaussians.add_moments(class_id, mean.to(covariance), covariance)
    return gaussians


def permuted(rows, targets, order, size=256):
    index = torch.from_numpy(order.astype(np.int64))
    return zip(rows.flatten(0, 1)[index].split(size), targets[index].split(size), strict=True)


@pytest.mark.parametrize("name, k", [("ca_slca_eps", k) for k in range(3)] + [("ca_slcapp_eps", k) for k in range(2)])
def test_golden_alignment_with_stored_noise(golden, monkeypatch, name, k):
    file = golden("slca", name)
    gaussians, (task, weight, bias) = store_of(file), tensors(file, "class_task", "weight0", "bias0")
    index, current, n = torch.from_numpy(file["official_task_index"]), int(file["current_task"]), 256
    targets = torch.arange(len(task)).repeat_interleave(n)
    stored_noise(monkeypatch, file["eps"])
    first = []

    def batches(epoch):
        if name == "ca_slca_eps":
            rows = gaussians.sample(range(len(task)), n, None, mean_scale(index, current))
        else:
            uniform = torch.from_numpy(file["uniform_u16"][epoch] / 65536)
            rows = gaussians.sample(range(len(task)), n)
            rows *= feature_scale(uniform, current - index, float(file["feature_scale_mu"]))[:, :, None]
        for features, target in permuted(rows, targets, file["perm"][epoch]):
            first.append(features[:8])
            yield features, target

    settings = sgd(file) | {"temperature": tau(file["temperatures"][k])}
    new_weight, new_bias = align_classifier(weight, bias, batches, task, **settings)
    if k == 0:
        close(first[0], file["first_batch_features_tau0"], 1e-12)
    close(new_weight, file[f"weight1_tau{k}"], 1e-9)
    close(new_bias, file[f"bias1_tau{k}"], 1e-9)


def test_golden_alignment_with_the_seed_of_the_public_code(golden):
    file = golden("slca", "ca_slca_seeded")
    gaussians, (task, weight, bias) = store_of(file), tensors(file, "class_task", "weight0", "bias0")
    generator = torch.Generator().manual_seed(int(file["torch_seed"]))
    source = gaussian_batches(gaussians, range(12), generator=generator, mean_scale=mean_scale(task, 2))
    first = []

    def batches(epoch):
        for features, targets in source(epoch):
            first.append(features.clone())
            yield features, targets

    settings = sgd(file) | {"temperature": float(file["temperature"])}
    new_weight, new_bias = align_classifier(weight, bias, batches, task, **settings)
    assert len(first) == 5 * 12 and new_weight.dtype == torch.float32
    close(first[0][:16], file["first_batch_features"], 2e-4)
    close(new_weight, file["weight1"], 5e-6)
    close(new_bias, file["bias1"], 5e-6)


def test_golden_alignment_with_the_seed_of_the_public_code_slcapp(golden):
    file = golden("slca", "ca_slcapp_seeded")
    gaussians, (task, weight, bias) = store_of(file), tensors(file, "class_task", "weight0", "bias0")
    generator = torch.Generator().manual_seed(int(file["torch_seed"]))
    targets = torch.arange(12).repeat_interleave(256)
    first = []

    def batches(epoch):  # normals and uniforms alternate class by class there
        rows = torch.empty(12, 256, 32)
        for class_id in range(12):
            rows[class_id] = gaussians.sample([class_id], 256, generator)[0]
            uniform = torch.rand(1, 256, generator=generator)
            distance = 2 - task[class_id : class_id + 1]
            rows[class_id] *= feature_scale(uniform, distance, float(file["feature_scale_mu"]))[0, :, None]
        order = torch.randperm(12 * 256, generator=generator).numpy()
        for features, target in permuted(rows, targets, order):
            first.append(features.clone())
            yield features, target

    settings = sgd(file) | {"temperature": float(file["temperature"])}
    new_weight, new_bias = align_classifier(weight, bias, batches, task, **settings)
    close(first[0][:16], file["first_batch_features"], 2e-4)
    close(new_weight, file["weight1"], 5e-6)
    close(new_bias, file["bias1"], 5e-6)
