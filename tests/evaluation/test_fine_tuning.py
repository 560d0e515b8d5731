"""Fine-tuning of copies: against SGD written out, on every kind of model, without a trace in the original."""

import copy
import math
import random

import numpy as np
import pytest
import timm
import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, as_multitask
from torch import nn

from avalanche_firn.evaluation.fine_tuning import adapted_copy, choose_rate, fine_tune, predict, random_head
from avalanche_firn.models import resnet_firn, with_taskwise_head
from avalanche_firn.models.contrastive import with_projection_head
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
from avalanche_firn.models.parts import FeatureClassifier, extract_features
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.random_state import capture_random_state


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(head=None, drop=0.0, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Dropout(drop)]
    return FeatureClassifier(nn.Sequential(*layers), nn.Linear(6, 9) if head is None else head)


def data(n=30, classes=3, dtype=torch.float64):
    y = torch.arange(n) % classes
    return normal(1, n, 5, dtype=dtype) + normal(2, classes, 5, dtype=dtype)[y], y


# ------------------------------------------------------------------ oracle
def tuned_by_hand(model, head, x, y, sizes, *, lr, epochs, momentum, weight_decay, seed):
    first = model.backbone[0]
    p = [t.detach().clone().requires_grad_() for t in (first.weight, first.bias, *head)]
    speed, draws = [torch.zeros_like(t) for t in p], torch.Generator().manual_seed(seed)
    step, total = 0, epochs * len(sizes)
    for _ in range(epochs):
        order, start = torch.randperm(len(x), generator=draws), 0
        for size in sizes:
            rows = order[start : start + size]
            start += size
            logits = torch.tanh(x[rows] @ p[0].T + p[1]) @ p[2].T + p[3]
            loss = (logits.logsumexp(1) - logits[range(len(rows)), y[rows]]).mean()
            rate = lr * (1 + math.cos(math.pi * step / total)) / 2
            for i, grad in enumerate(torch.autograd.grad(loss, p)):
                speed[i] = momentum * speed[i] + grad + weight_decay * p[i].detach()
                p[i] = (p[i].detach() - rate * speed[i]).requires_grad_()
            step += 1
    return [t.detach() for t in p]


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (30, 8, [8, 8, 8, 6]),
        (30, 10, [10, 10, 10]),
        (30, 40, [30]),
        (33, 8, [8, 8, 8, 9]),  # one sample that is left over
        (1, 8, [1]),
        (5, 1, [1] * 5),
    ],
)
def test_weights_equal_sgd_written_out(n, batch_size, sizes):
    (x, y), model, head = data(n), network().double(), (normal(3, 3, 6), normal(4, 3))
    options = {"lr": 0.2, "epochs": 3, "momentum": 0.8, "weight_decay": 0.01, "seed": 7}
    tuned = fine_tune(model, head, x, y, batch_size=batch_size, **options)
    found = [tuned.backbone[0].weight, tuned.backbone[0].bias, tuned.head.weight, tuned.head.bias]
    for value, expected in zip(found, tuned_by_hand(model, head, x, y, sizes, **options), strict=True):
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    assert (tuned.backbone[0].weight - model.backbone[0].weight).abs().max() > 1e-3
    assert not any(module.training for module in tuned.modules())


def test_random_head_has_the_distribution_of_a_linear_layer():
    weight, bias = random_head(50, 400, 0, torch.empty(0))
    assert weight.shape == (50, 400) and bias.shape == (50,) and weight.dtype == torch.float32
    assert 0.0499 < weight.abs().max() <= 0.05 and weight.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    again, other = (random_head(50, 400, seed, torch.empty(0, dtype=torch.float64))[0] for seed in (0, 1))
    assert torch.equal(again.float(), weight) and again.dtype == torch.float64 and not torch.equal(again, other)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes(mode):
    (x, y), model = data(), network(norm=True, drop=0.5).double()
    head = random_head(3, 6, 0, x)
    tuned = fine_tune(model, head, x, y, lr=0.0, epochs=2, mode=mode)
    moved = not torch.equal(tuned.backbone[1].running_mean, model.backbone[1].running_mean)
    assert moved == (mode == "train")
    settings = {"lr": 0.1, "epochs": 1, "batch_size": 8, "mode": mode}
    changed = [fine_tune(model, head, x, y, seed=seed, **settings).head.weight for seed in (0, 0, 1)]
    assert torch.equal(changed[0], changed[1]) and not torch.equal(changed[0], changed[2])


@pytest.mark.parametrize("n", [9, 17])
def test_one_sample_is_never_a_batch_of_its_own(n):
    (x, y), model = data(n), network(norm=True).double()  # BatchNorm would refuse it
    fine_tune(model, random_head(3, 6, 0, x), x, y, lr=0.1, epochs=1, batch_size=8)


def test_a_rate_of_zero_keeps_the_starting_head():
    (x, y), model, head = data(), network(drop=0.5).double(), (normal(3, 3, 6), normal(4, 3))
    tuned = fine_tune(model, head, x, y, lr=0.0, epochs=3, weight_decay=0.1)
    with torch.no_grad():
        logits = model.eval().backbone(x) @ head[0].T + head[1]
        assert torch.equal(predict(tuned, x), logits.argmax(1))
        assert torch.equal(tuned.backbone[0].weight, model.backbone[0].weight)
    none = fine_tune(model, head, x, y, lr=0.5, epochs=0)
    assert torch.equal(none.head.weight, head[0]) and torch.equal(none.backbone[0].weight, model.backbone[0].weight)


# ------------------------------------------------------- every kind of model
class MultiTask(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(5, 6), MultiHeadClassifier(6, masking=False)

    def forward(self, x, task_labels):
        return self.head(torch.tanh(self.backbone(x)), task_labels)


def taskwise():
    head = TaskwiseLinearHead(6)
    for classes in ([0, 1], [4]):
        head.add_task(classes)
    return network(head)


def vit():
    size = {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_firn_32", num_classes=4, proj_drop_rate=0.2, **size)


def resnet():
    return resnet_firn.resnet18_cifar(num_classes=4, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), drop_rate=0.2)


def decorated():
    return as_multitask(network(), "head")


MODELS = {
    "linear": (network, None),
    "batch norm": (lambda: network(norm=True, drop=0.2), None),
    "incremental": (lambda: network(IncrementalClassifier(6, 9)), None),
    "taskwise": (taskwise, None),
    "multi-head": (MultiTask, None),
    "as_multitask": (decorated, "head"),
    "nested": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 9))), "1.1"),
    "vit": (vit, None),
    "resnet": (resnet, None),
    "resnet, taskwise": (lambda: with_taskwise_head(resnet()), None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_original_is_left_alone(kind):
    build, head_name = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    images = "net" in kind or "vit" in kind
    y = torch.arange(14) % 5
    shape = (3, 16, 16) if images else (5,)
    x = normal(1, 5, *shape, dtype=torch.float32)[y] + 0.1 * normal(0, 14, *shape, dtype=torch.float32)
    model.train()
    first = next(p for p in model.parameters() if p.ndim > 1)
    first.requires_grad_(False)  # trainable in the copy
    first.grad = torch.ones_like(first)
    inner = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    inner.eval()  # modes that differ

    def snapshot():
        parameters = {n: [p.detach().clone(), p.requires_grad, p.grad is None] for n, p in model.named_parameters()}
        modes = {n: m.training for n, m in model.named_modules()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return to_plain([parameters, buffers, modes, capture_random_state()])

    modules, before = [id(m) for m in model.modules()], snapshot()
    with torch.no_grad():  # as inside ``strategy.eval``
        labelled = [(image, 0, 0) for image in x]
        size = extract_features(model, labelled, head_name=head_name)[0].shape[1]
        head = (normal(3, 5, size).float(), torch.full((5,), -3.0))  # all logits below 0
        start = fine_tune(model, head, x, y, lr=0.1, epochs=0, head_name=head_name)
        options = {"lr": 0.01 if kind == "vit" else 0.05, "epochs": 20, "batch_size": 5}
        tuned = fine_tune(model, head, x, y, **options, head_name=head_name, task_label=3)
        found = predict(tuned, x, batch_size=4, task_label=3)
    assert differing_state(before, snapshot()) is None and modules == [id(m) for m in model.modules()]
    assert found.shape == (14,) and found.dtype == torch.int64 and set(found.tolist()) <= set(range(5))
    assert (found == y).sum() >= 9 > (predict(start, x, task_label=3) == y).sum()
    old, new = dict(model.named_parameters()), dict(tuned.named_parameters())
    backbone = [n for n in new if n in old and old[n].shape == new[n].shape]
    assert backbone and all(new[n].requires_grad for n in new)
    assert not torch.equal(new[backbone[0]], old[backbone[0]])
    with torch.no_grad():
        features = extract_features(model, labelled, head_name=head_name)[0]
        assert torch.equal(predict(start, x), (features @ head[0].T + head[1]).argmax(1))


def test_copies_draw_nothing():
    model = network()
    before = to_plain(capture_random_state())
    duplicate = adapted_copy(model, torch.zeros(2, 6), torch.ones(2))
    random_head(3, 6, 0, torch.empty(0))
    (x, y), dropping = data(dtype=torch.float32), network(drop=0.5)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    state = to_plain(capture_random_state())
    first = fine_tune(dropping, random_head(3, 6, 0, x), x, y, lr=0.1, epochs=1)
    assert differing_state(state, to_plain(capture_random_state())) is None
    torch.manual_seed(2)
    second = fine_tune(dropping, random_head(3, 6, 0, x), x, y, lr=0.1, epochs=1)
    assert torch.equal(first.head.weight, second.head.weight)  # dropout depends on the seed alone too
    assert before and torch.equal(duplicate.head.bias.detach(), torch.ones(2))
    duplicate.head.weight.data.fill_(3)
    assert model.head.weight.shape == (9, 6)


# ------------------------------------------------------------------ choice
def test_the_best_rate_on_held_out_data_is_chosen_and_the_smallest_of_equals():
    (x, y), model = data(60), network().double()
    head, split = random_head(3, 6, 0, x), (np.arange(40), np.arange(40, 60))
    settings = {"epochs": 8, "batch_size": 8, "seed": 3}
    rates = [1e4, 0.1, 0.0, 0.001]
    hits = {}
    for lr in rates:
        tuned = fine_tune(model, head, x[:40], y[:40], lr=lr, **settings)
        hits[lr] = int((predict(tuned, x[40:]) == y[40:]).sum())
    chosen = choose_rate(model, {"part": head}, x, y, rates, split, **settings)
    assert hits[chosen] == max(hits.values()) and chosen == min(lr for lr in rates if hits[lr] == hits[chosen])
    assert len(set(hits.values())) > 2 and chosen == 0.1
    assert choose_rate(model, {"part": head}, x, y, [0.2, 1e-9, 1e-8][1:], split, **settings) == 1e-9  # equals
    scrambled = y.clone()
    scrambled[40:] = (y[40:] + 1) % 3  # only the held-out part speaks
    assert choose_rate(model, {"part": head}, x, scrambled, rates, split, **settings) != 0.1


def test_a_rate_that_diverges_is_never_right():
    (x, y), model = data(30), network().double()
    with torch.no_grad():
        model.backbone[0].weight.fill_(math.nan)
    head = random_head(3, 6, 0, x)
    tuned = fine_tune(model, head, x, y, lr=0.1, epochs=1)
    assert (predict(tuned, x) == -1).all()
    x32, wild = x.float(), network()
    rates, split = [0.01, 1e30], (np.arange(20), np.arange(20, 30))
    assert choose_rate(wild, {"part": random_head(3, 6, 0, x32)}, x32, y, rates, split, epochs=5) == 0.01


def test_prediction_does_not_depend_on_the_batches():
    (x, _), model = data(23), copy.deepcopy(network().double()).eval()
    assert all(torch.equal(predict(model, x, batch_size=b), predict(model, x)) for b in (1, 7, 23, 100))


@pytest.mark.parametrize("kind", ["projector", "nearest mean"])
def test_contrastive_networks_are_tuned_on_logits(kind):
    """In training they give projections; the copy must give the logits of its classifier, and learn with it."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
    if kind == "projector":
        plain = FeatureClassifier(backbone, TaskwiseLinearHead(8))
        model = with_projection_head(plain, projection_size=3, feature_size=8)
    else:
        model = NearestMeanNetwork(backbone, 8, projection_size=3)
    images, labels = torch.randn(40, 3, 2, 2), torch.arange(40) % 4
    head = random_head(4, 8, 0, images)
    tuned = adapted_copy(model, *head).train()
    expected = nn.functional.linear(model.backbone(images), *head)
    torch.testing.assert_close(tuned(images), expected)
    before = nn.functional.cross_entropy(expected, labels)
    tuned = fine_tune(model, head, images, labels, lr=0.1, epochs=10, batch_size=8)
    assert nn.functional.cross_entropy(tuned(images), labels) < 0.7 * before
    plain = FeatureClassifier(backbone, TaskwiseLinearHead(8))
    same = fine_tune(plain, head, images, labels, lr=0.1, epochs=10, batch_size=8)
    assert torch.equal(tuned(images), same(images))
