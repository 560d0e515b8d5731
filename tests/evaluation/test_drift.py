"""Similarity and distance against nested loops; the metric against recomputation from copies of the model."""

import copy
import math
import random

import numpy as np
import pytest
import timm
import torch
from avalanche.models import as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from avalanche_firn.evaluation.drift import (
    RepresentationDrift,
    _centred,
    _feature_form,
    _gram_form,
    linear_cka,
    weight_distance,
)
from avalanche_firn.models import resnet_firn, with_taskwise_head
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

SEEDS = range(20)
CLASSES = 4


# -------------------------------------------------------------------- functions
def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_cka(x, y):
    def centred(rows):
        means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]

    def squared_norm(a, b):
        total = 0.0
        for p in range(len(a[0])):
            for q in range(len(b[0])):
                total += math.fsum(a[i][p] * b[i][q] for i in range(len(a))) ** 2
        return total

    x, y = centred(x.tolist()), centred(y.tolist())
    return squared_norm(y, x) / math.sqrt(squared_norm(x, x)) / math.sqrt(squared_norm(y, y))


@pytest.mark.parametrize("seed", SEEDS)
def test_cka_against_nested_loops(seed):
    n, first, second = (int(v) for v in np.random.default_rng(seed).integers([2, 1, 1], [12, 9, 9]))
    x = normal(seed, n, first)
    y = normal(seed + 100, n, second) + x[:, :1]
    value = linear_cka(x, y)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(naive_cka(x, y), abs=1e-12)
    assert linear_cka(y, x).item() == pytest.approx(value.item(), abs=1e-12)
    assert linear_cka(x.float(), y.float()).item() == pytest.approx(naive_cka(x.float(), y.float()), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_forms_agree(seed):
    for n in (5, 40):
        x, y = _centred(normal(seed, n, 9), "x"), _centred(normal(seed + 1, n, 17) + normal(seed, n, 1), "y")
        assert _gram_form(x, y).item() == pytest.approx(_feature_form(x, y).item(), abs=1e-13)


def test_the_cheaper_form_is_taken(monkeypatch):
    taken = []
    for form in (_gram_form, _feature_form):
        name = form.__name__
        monkeypatch.setattr(
            f"avalanche_firn.evaluation.drift.{name}", lambda x, y, f=form, n=name: taken.append(n) or f(x, y)
        )
    for shapes in (((9, 10), (9, 3)), ((9, 3), (9, 10)), ((10, 10), (10, 3))):
        linear_cka(normal(0, *shapes[0]), normal(1, *shapes[1]))
    assert taken == ["_gram_form", "_gram_form", "_feature_form"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(3, 20),
    st.integers(1, 20),
    st.floats(-6, 6),
    st.floats(-1e3, 1e3),
    st.booleans(),
)
def test_cka_ignores_rotation_scale_and_offset_and_nothing_else(seed, n, d, exponent, offset, negative):
    x, y = normal(seed, n, d), normal(seed + 1, n, 5)
    rotation, _ = torch.linalg.qr(normal(seed + 2, d, d))
    scale = (-1 if negative else 1) * 10**exponent
    moved = (x @ rotation) * scale + offset * abs(scale) * normal(seed + 3, 1, d)
    assert linear_cka(x, moved).item() == pytest.approx(1, abs=1e-10)
    assert linear_cka(moved, y).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-10)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert linear_cka(x[order], y[order]).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-12)
    assert 0 <= linear_cka(x, y).item() <= 1


def test_cka_sees_what_it_should():
    x = normal(0, 60, 6)
    stretched = x * torch.tensor([30.0, 1, 1, 1, 1, 1])  # scaling that isn't isotropic
    assert linear_cka(x, stretched) < 0.6
    assert linear_cka(x, x.flip(0)) < 0.3  # other samples in the same places
    noisy = [linear_cka(x, x + s * normal(1, 60, 6)).item() for s in (0.1, 0.5, 2)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0.05


@pytest.mark.parametrize(("n", "d"), [(4000, 32), (256, 256), (64, 512)])
def test_independent_features(n, d):
    values = [linear_cka(normal(s, n, d), normal(s + 50, n, d)).item() for s in range(5)]
    assert np.mean(values) == pytest.approx(d / (n + d), rel=0.15)


def test_equal_features_give_exactly_one_and_no_overflow():
    for seed in SEEDS:
        for shape in ((40, 7), (7, 40)):
            x = normal(seed, *shape)
            assert linear_cka(x, x.clone()).item() == 1
            assert linear_cka(x.half(), x.half()).item() == 1
    x, y = normal(0, 10, 4), normal(1, 10, 4)
    for scale in (1e-280, 1e280):
        assert linear_cka(x * scale, y).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-12)


def test_cka_refuses_what_has_no_similarity():
    x = normal(0, 6, 3)
    for bad in (normal(0, 5, 3), x[0], x[None], normal(0, 0, 3)):
        with pytest.raises(ValueError, match="accepted are"):
            linear_cka(x, bad)
    with pytest.raises(ValueError, match="n >= 2"):
        linear_cka(x[:1], x[:1])
    flat = torch.full((6, 4), 0.1) * 3
    with pytest.raises(ValueError, match="y: the features of all 6 samples are equal"):
        linear_cka(x, flat)
    with pytest.raises(ValueError, match="x: the features"):
        linear_cka(flat, x)
    with pytest.raises(ValueError, match="y: the features"):
        linear_cka(x, normal(0, 6, 0))
    for hole in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = hole
        with pytest.raises(ValueError, match="x: features that are NaN"):
            linear_cka(broken, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_distance_against_nested_loops(seed):
    rng = np.random.default_rng(seed)
    shapes = {f"w{i}": tuple(rng.integers(1, 4, rng.integers(0, 3))) for i in range(4)}
    old = {name: torch.from_numpy(np.asarray(rng.normal(size=shape))) for name, shape in shapes.items()}
    new = {name: torch.from_numpy(np.asarray(rng.normal(size=shape))) for name, shape in reversed(shapes.items())}
    moved = size = 0.0
    for name in shapes:
        for a, b in zip(new[name].flatten().tolist(), old[name].flatten().tolist(), strict=True):
            moved += (a - b) ** 2
            size += b**2
    assert weight_distance(new, old) == pytest.approx(math.sqrt(moved / size), rel=1e-14)
    assert weight_distance(old, old) == 0
    doubled = {name: 2 * value for name, value in old.items()}
    assert weight_distance(doubled, old) == 1 and weight_distance(old, doubled) == 0.5


def test_weight_distance_accumulates_in_float64():
    count = 2**12  # squares of 1 beside one of 1e5**2: float32 sums would lose many of them
    old = {"a": torch.ones(count), "b": torch.tensor([1e5])}
    new = {"a": torch.zeros(count), "b": torch.tensor([1e5])}
    assert weight_distance(new, old) == pytest.approx(math.sqrt(count / (count + 1e10)), rel=1e-13)
    assert math.isnan(weight_distance({"a": torch.tensor([math.nan])}, {"a": torch.ones(1)}))


def test_weight_distance_refuses_what_differs():
    old = {"kept": torch.ones(2), "gone": torch.ones(1), "grown": torch.ones(2), "count": torch.ones(2)}
    new = {"kept": torch.ones(2), "new": torch.ones(1), "grown": torch.ones(3), "count": torch.ones(2).long()}
    with pytest.raises(ValueError) as error:
        weight_distance(new, old)
    for part in ("gone (missing in the state)", "new (missing in the reference)", "grown ((3,), reference (2,))"):
        assert part in str(error.value)
    assert "count (torch.int64" in str(error.value) and "kept" not in str(error.value)
    for empty in ({}, {"a": torch.zeros(3)}):
        with pytest.raises(ValueError, match="reference: all weights are 0"):
            weight_distance(empty, empty)


# ----------------------------------------------------------------------- metric
@pytest.fixture(scope="module")
def digits():
    """200 digits 0..3 as (x (n, 3, 16, 16), y)."""
    data = load_digits(n_class=CLASSES)
    x = torch.tensor(data.images[:200] / 16, dtype=torch.float32)[:, None]
    return nn.functional.interpolate(x, size=16, mode="bilinear").repeat(1, 3, 1, 1), data.target[:200]


@pytest.fixture(params=["modern", "classic"])
def stream(request, digits, stream_of):
    x, y = digits
    return stream_of(x[:120], y[:120], [2, 2], x[120:], y[120:], generation=request.param)


@pytest.fixture
def modern(digits, stream_of):
    x, y = digits
    return stream_of(x[:120], y[:120], [2, 2], x[120:], y[120:])


def vit(**kwargs):
    size = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_firn_32", num_classes=CLASSES, **{**size, **kwargs})


def resnet(num_classes=CLASSES, **kwargs):
    size = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "zero_init_last": False}
    return resnet_firn.resnet18_cifar(num_classes=num_classes, **{**size, **kwargs})


def taskwise():
    return with_taskwise_head(resnet())


def learner(build, metrics, *, plugins=(), lr=0.05, prepare=None, log=None):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = build()
    if prepare is not None:
        prepare(model)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=1,
        eval_mb_size=64,
        plugins=[*plugins],
        evaluator=EvaluationPlugin(*metrics, loggers=[] if log is None else [log], collect_all=False),
    )


class Copies(SupervisedPlugin):
    """Copies of the model before the first experience and after each."""

    def __init__(self):
        super().__init__()
        self.models = []

    def before_training_exp(self, strategy, **kwargs):
        if not self.models:
            self.models.append(copy.deepcopy(strategy.model))

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


@torch.no_grad()
def features_by_hand(model, x):
    model.eval()
    if hasattr(model, "backbone"):
        return model.backbone(x)
    return model.forward_head(model.forward_features(x), pre_logits=True)


def cka_by_hand(x, y):
    """The kernel form with the centring matrix written out."""
    x, y, n = x.double().numpy(), y.double().numpy(), len(x)
    centre = np.eye(n) - 1 / n

    def hsic(a, b):
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def distance_by_hand(new, old):
    pairs = [(p, q) for (n, p), q in zip(new.named_parameters(), old.parameters(), strict=False) if head(n) is None]
    a, b = (torch.cat([p.detach().double().flatten() for p in side]) for side in zip(*pairs, strict=True))
    return float((a - b).norm() / b.norm())


def head(name):
    return name if name.split(".")[0] in ("head", "fc") else None


@pytest.mark.parametrize("build", [vit, resnet, taskwise])
def test_values_equal_recomputation_from_copies_of_the_model(stream, digits, tools, build):
    images, log, copies = digits[0][120:170], tools.Collect(), Copies()
    metric = RepresentationDrift(images, batch_size=17)
    strategy = learner(build, [metric], plugins=[copies], log=log)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    features = [features_by_hand(model, images) for model in copies.models]
    for end, before in (("", [0, 0]), ("-previous", [0, 1])):
        expected = [cka_by_hand(features[t + 1], features[before[t]]) for t in range(2)]
        assert log.curve(f"drift/cka{end}") == [(t, pytest.approx(expected[t], abs=1e-6)) for t in range(2)]
        assert max(expected) < 1 - 1e-4
        moved = [distance_by_hand(copies.models[t + 1], copies.models[before[t]]) for t in range(2)]
        assert log.curve(f"drift/weights{end}") == [(t, pytest.approx(moved[t], rel=1e-6)) for t in range(2)]
        assert min(moved) > 1e-3
    assert log.tags == {"drift/cka", "drift/cka-previous", "drift/weights", "drift/weights-previous"}
    last = {tag: log.curve(tag)[-1][1] for tag in log.tags}
    assert metric.result() == last


def freeze_backbone(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head(name) is not None)


def test_frozen_backbone_does_not_drift_at_all(stream, digits, tools):
    log = tools.Collect()
    metric = RepresentationDrift(digits[0][:40], blocks="all")
    strategy = learner(vit, [metric], prepare=freeze_backbone, log=log)
    before = strategy.model.head.weight.detach().clone()
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    assert not torch.equal(strategy.model.head.weight, before)
    for tag in log.tags:
        assert [value for _, value in log.curve(tag)] == [0 if "weights" in tag else 1] * 2, tag


def test_batchnorm_statistics_drift_though_no_weight_moves(modern, digits, tools):
    log = tools.Collect()
    strategy = learner(resnet, [RepresentationDrift(digits[0][:40])], prepare=freeze_backbone, log=log)
    strategy.train(modern.train_stream[0], eval_streams=[])
    assert log.curve("drift/weights") == [(0, 0)]
    assert log.curve("drift/cka")[0][1] < 1 - 1e-4


@pytest.mark.parametrize("build", [lambda: vit(proj_drop_rate=0.2), lambda: resnet(drop_rate=0.2)])
def test_training_is_the_same_to_the_bit(stream, digits, build):
    def run(metrics):
        strategy = learner(build, metrics)
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(stream.test_stream)
        modes = {name: module.training for name, module in strategy.model.named_modules()}
        optimizer = to_plain(strategy.optimizer.state_dict())
        return to_plain([dict(strategy.model.state_dict()), modes, optimizer, capture_random_state()])

    blocks = RepresentationDrift(digits[0], blocks="all", num_images=40)
    assert differing_state(run([]), run([blocks])) is None
    assert len(blocks.result()) > 4


def test_nothing_of_a_strategy_is_touched_between_its_hooks(modern, digits):
    metric = RepresentationDrift(digits[0][:40], blocks="all")
    strategy = learner(lambda: resnet(drop_rate=0.5), [])
    strategy.train(modern.train_stream[0], eval_streams=[])
    model = strategy.model
    model.train()
    model.layer2.eval()  # modes that differ
    model.layer1.requires_grad_(False)
    strategy.mbatch = [digits[0][:4], torch.zeros(4), torch.zeros(4)]
    strategy.mb_output, strategy.loss = model(digits[0][:4]), torch.ones(1)
    strategy.mb_output.sum().backward()
    strategy.experience = modern.train_stream[1]

    def snapshot():
        parameters = {
            n: [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
            for n, p in model.named_parameters()
        }
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        modes = {n: m.training for n, m in model.named_modules()}
        hooks = {n: [len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()}
        return to_plain([parameters, buffers, modes, hooks, capture_random_state(), torch.is_grad_enabled()])

    before, attributes = snapshot(), dict(vars(strategy))
    metric.before_training_exp(strategy)
    metric.after_training_exp(strategy)
    assert differing_state(before, snapshot()) is None
    assert vars(strategy).keys() == attributes.keys()
    assert all(vars(strategy)[name] is value for name, value in attributes.items())
    model.fc.register_forward_pre_hook(lambda *_: 1 / 0)  # an error inside must not leave anything behind either
    before = snapshot()
    with pytest.raises(ZeroDivisionError):
        metric.after_training_exp(strategy)
    assert differing_state(before, snapshot()) is None


# ------------------------------------------------------------------------ state
@pytest.mark.parametrize("options", [{}, {"blocks": ["blocks.1"]}, {"against": ["previous"], "weights": False}])
def test_state_continues_to_the_same_values(stream, digits, tools, options):
    def run(between):
        log, metric = tools.Collect(), RepresentationDrift(digits[0], num_images=30, **options)
        strategy = learner(vit, [metric], log=log)
        between(metric, strategy)
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            between(metric, strategy)
        return log.values

    def replace(metric, strategy):  # by a fresh one, which knows what stands in the state and nothing else
        state = from_plain(copy.deepcopy(to_plain(metric.state_dict())))
        fresh = RepresentationDrift(digits[0], num_images=30, **options)
        fresh.load_state_dict(state)
        assert fresh.result() == metric.result()
        assert differing_state(to_plain(fresh.state_dict()), to_plain(metric.state_dict())) is None
        for tensor in state["references"].get("previous", {}).values() if state["references"] else ():
            _ = [t.zero_() for t in tensor.values()] if isinstance(tensor, dict) else tensor.zero_()  # own copies
        metric.__dict__ = fresh.__dict__

    expected = run(lambda metric, strategy: None)
    assert len(expected) == 2 * {0: 4, 1: 5, 2: 1}[len(options)] and run(replace) == expected


def test_references_survive_hooks_that_run_again(modern, digits):
    metric = RepresentationDrift(digits[0][:40])
    strategy = learner(vit, [])
    strategy.experience = modern.train_stream[0]
    metric.before_training_exp(strategy)
    state = copy.deepcopy(metric.state_dict())
    loaded = RepresentationDrift(digits[0][:40])
    loaded.load_state_dict(state)
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.mul_(1.5)  # the state of the middle of an experience
    for each in (metric, loaded):
        each.before_training_exp(strategy)
        values = {value.name: value.value for value in each.after_training_exp(strategy)}
        assert values["drift/weights"] == pytest.approx(0.5, rel=1e-6)
        assert differing_state(to_plain(state["references"]["initial"]), to_plain(each.state_dict())) is not None
        first = each.state_dict()["references"]["initial"]
        assert differing_state(to_plain(state["references"]["initial"]), to_plain(first)) is None
        assert {value.name: value.value for value in each.after_training_exp(strategy)}["drift/weights-previous"] == 0


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 3])  # in the first experience, in the second
def test_exact_resume_after_a_kill(modern, digits, tools, tmp_path, at):
    def run(at):
        log, metric = tools.Collect(), RepresentationDrift(digits[0], num_images=30, blocks="all")
        checkpoint = ExactCheckpointPlugin(tmp_path, every=1)
        strategy = learner(resnet, [metric], plugins=[Kill(at), checkpoint], log=log)
        start = checkpoint.resume(strategy)
        try:
            for experience in modern.train_stream[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            return log.values
        finally:
            checkpoint.close()
        return log.values

    log, metric = tools.Collect(), RepresentationDrift(digits[0], num_images=30, blocks="all")
    whole = learner(resnet, [metric], plugins=[Kill(-1)], log=log)
    for experience in modern.train_stream:
        whole.train(experience, eval_streams=[])
    killed = run(at)
    assert len(killed) == (0 if at == 1 else 8)
    assert killed + run(-1) == log.values


def test_state_of_other_settings_is_refused(digits):
    images = digits[0]
    state = RepresentationDrift(images, num_images=20).state_dict()
    for options, name in (
        ({"num_images": 21}, "rows"),
        ({"num_images": 20, "seed": 1}, "rows"),
        ({"num_images": 20, "weights": False}, "weights"),
        ({"num_images": 20, "against": ["initial"]}, "against"),
        ({"num_images": 20, "blocks": "all"}, "blocks"),
    ):
        with pytest.raises(ValueError, match=f"another value of {name}"):
            RepresentationDrift(images, **options).load_state_dict(state)


def test_weights_are_kept_only_where_they_are_wanted(modern, digits, tools):
    log, metric = tools.Collect(), RepresentationDrift(digits[0][:20], weights=False, against=["initial"])
    strategy = learner(resnet, [metric], log=log)
    strategy.train(modern.train_stream[0], eval_streams=[])
    assert log.tags == {"drift/cka"}
    saved = metric.state_dict()["references"]
    assert saved["initial"]["weights"] == {} and list(saved) == ["initial"]
    assert saved["initial"]["features"].shape == (20, 16) and saved["initial"]["features"].dtype == torch.float32
    twice = RepresentationDrift(digits[0][:20])
    twice.before_training_exp(strategy)
    assert twice.state_dict()["references"]["previous"] is None  # equal to the initial one: stored once
    names = set(twice.state_dict()["references"]["initial"]["weights"])
    assert names == {n for n, _ in strategy.model.named_parameters() if head(n) is None}


# ----------------------------------------------------------------------- blocks
def blocks_by_hand(model, x, names, pool):
    kept, handles = {}, []
    for name in names:
        keep = lambda m, a, out, name=name: kept.update({name: pool(out)})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return kept


STAGES = {f"layer{i}": f"layer{i}" for i in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("build", "blocks", "expected", "axes"),
    [
        (vit, "all", {"blocks.0": "blocks.0", "blocks.1": "blocks.1"}, 1),
        (vit, ["blocks.1"], {"blocks.1": "blocks.1"}, 1),
        (resnet, "all", STAGES, (2, 3)),
        (taskwise, "all", {tag: f"backbone.{name}" for tag, name in STAGES.items()}, (2, 3)),
        (
            taskwise,
            ["layer2.0.conv1", "backbone.layer3"],
            {"layer2.0.conv1": "backbone.layer2.0.conv1", "backbone.layer3": "backbone.layer3"},
            (2, 3),
        ),
    ],
)
def test_blocks_equal_recomputation(modern, digits, tools, build, blocks, expected, axes):
    images, log, copies = digits[0][120:160], tools.Collect(), Copies()
    strategy = learner(build, [RepresentationDrift(images, blocks=blocks)], plugins=[copies], log=log)
    for experience in modern.train_stream:
        strategy.train(experience, eval_streams=[])
    outputs = [blocks_by_hand(m, images, expected.values(), lambda out: out.mean(axes)) for m in copies.models]
    for tag, name in expected.items():
        values = [cka_by_hand(outputs[t][name], outputs[0][name]) for t in (1, 2)]
        assert log.curve(f"drift/cka/{tag}") == [(t, pytest.approx(values[t], abs=1e-6)) for t in range(2)]
    assert {t.removeprefix("drift/cka/") for t in log.tags if t.startswith("drift/cka/")} == set(expected)


def observed(model, digits, **options):
    """The blocks of a metric that has looked at a model once."""
    metric = RepresentationDrift(digits[0][:12], **options)
    metric.before_training_exp(learner(lambda: model, []))
    return metric.state_dict()["references"]["initial"]["blocks"]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def test_blocks_of_other_families(digits):
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16, patch_size=2, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=3,
    )  # fmt: skip
    found = observed(swin, digits, blocks="all")
    expected = blocks_by_hand(swin, digits[0][:12], ["layers.0", "layers.1"], lambda out: out.mean((1, 2)))
    assert list(found) == ["layers.0", "layers.1"]
    for name, value in expected.items():  # channels last
        torch.testing.assert_close(found[name], value)
    convnext = timm.create_model("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 8, 8, 8), num_classes=3)
    large = (nn.functional.interpolate(digits[0], size=32),)
    assert list(observed(convnext, large, blocks="all")) == [f"stages.{i}" for i in range(4)]
    names = ["layers.0", "layers.1", "layers.2"]  # not layers.3, the classifier
    assert list(observed(Layers(), digits, blocks="all", head_name="layers.3")) == names
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    before = observed(hidden, digits, blocks=["1"], head_name="3")["1"]  # (B, d), and the next layer writes into it
    assert (before < 0).any() and before.shape == (12, 8)


def test_blocks_that_do_not_fit_are_refused_before_training(digits):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.fc = nn.Linear(768, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.two = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            x = self.used(x.flatten(1))
            self.two(x[:, None])
            return self.fc(x)

    for model, blocks, message in (
        (vit(), ["blocks.7"], "was not found"),
        (vit(), ["norm1"], "could be any of"),
        (vit(), ["head"], "was not found"),
        (Unused(), "all", "finds no module list"),
        (Unused(), ["spare"], "take no part"),
        (Unused(), ["two"], "gives tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            observed(model, digits, blocks=blocks)


# ----------------------------------------------------------------------- images
def test_every_kind_of_images(stream, digits):
    experiences = list(stream.test_stream)
    whole = torch.cat([torch.stack([item[0] for item in e.dataset.eval()]) for e in experiences])
    kinds = {
        "stream": (stream.test_stream, whole),
        "experience": (experiences[1], whole[len(experiences[0].dataset) :]),
        "data set": (experiences[0].dataset, whole[: len(experiences[0].dataset)]),
        "list": ([(x, 0) for x in digits[0]], digits[0]),
        "bare": (list(digits[0]), digits[0]),
        "tensor": (digits[0], digits[0]),
    }
    for kind, (given_as, expected) in kinds.items():
        every, some = (RepresentationDrift(given_as, num_images=n) for n in (1000, 9))
        assert torch.equal(every.images, expected), kind
        rows = some.state_dict()["settings"]["rows"]
        assert len(set(rows)) == 9 and rows == sorted(rows) and torch.equal(some.images, expected[rows]), kind
        again, other = (RepresentationDrift(given_as, num_images=9, seed=seed) for seed in (0, 1))
        assert torch.equal(again.images, some.images) and not torch.equal(other.images, some.images), kind


def test_evaluation_transforms_are_applied_and_random_ones_leave_no_trace(digits):
    from avalanche.benchmarks.utils import as_classification_dataset

    def noisy(x):
        random.random()
        return x + torch.rand(()) + np.random.rand()

    data = torch.utils.data.TensorDataset(digits[0], torch.zeros(len(digits[0]), dtype=torch.long))
    data.targets = [0] * len(data)
    both = as_classification_dataset(data, transform_groups={"train": noisy, "eval": lambda x: x * 2})
    assert torch.equal(RepresentationDrift(both.train(), num_images=999).images, digits[0] * 2)
    before = to_plain(capture_random_state())
    given_as = [(noisy(x), 0) for x in digits[0][:3]]
    assert differing_state(before, to_plain(capture_random_state())) is not None

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return len(given_as)

        def __getitem__(self, index):
            return noisy(digits[0][index]), 0

    before = to_plain(capture_random_state())
    RepresentationDrift(Random())
    assert differing_state(before, to_plain(capture_random_state())) is None


def test_the_tensor_is_copied(digits):
    images = digits[0][:10].clone()
    metric = RepresentationDrift(images)
    images.zero_()
    assert torch.equal(metric.images, digits[0][:10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 1}, "num_images"),
        ({"num_images": 2.0}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"against": ()}, "against"),
        ({"against": "initial"}, "against"),
        ({"against": ("first",)}, "against"),
        ({"against": ("initial", "initial")}, "against"),
        ({"blocks": "blocks"}, "blocks"),
        ({"blocks": []}, "blocks"),
        ({"blocks": "all", "against": ["previous"]}, "blocks"),
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "images"),
        ({"images": torch.zeros(4)}, "images"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "at least 2"),
        ({"images": [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]}, "one shape"),
        ({"images": [("a", 0), ("b", 0)]}, "one shape"),
        ({"images": [torch.zeros(3, 8, 8).byte()] * 2}, "one shape"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RepresentationDrift(**{"images": torch.rand(4, 3, 8, 8), **change})


# ------------------------------------------------------------------------ trouble
def test_trouble_at_the_start_stops_the_run_before_a_step(modern, digits, tools):
    same = learner(vit, [RepresentationDrift(digits[0][:1].repeat(5, 1, 1, 1))])
    with pytest.raises(ValueError, match="initial backbone's features can't be compared"):
        same.train(modern.train_stream[0], eval_streams=[])
    assert same.clock.train_iterations == 0
    nameless = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), [RepresentationDrift(digits[0])])
    with pytest.raises(ValueError, match="head_name"):
        nameless.train(modern.train_stream[0], eval_streams=[])
    metric = RepresentationDrift(digits[0], head_name="1")
    weightless = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), [metric])
    with pytest.raises(ValueError, match="weights: True"):
        weightless.train(modern.train_stream[0], eval_streams=[])
    multi = learner(lambda: as_multitask(vit(), "head"), [RepresentationDrift(digits[0])])
    with pytest.raises(ValueError, match="single-task"):
        multi.train(tools.benchmark("classic").train_stream[0], eval_streams=[])


def test_trouble_later_leaves_a_value_out_and_goes_on(modern, digits):
    metric = RepresentationDrift(digits[0][:20])
    strategy = learner(resnet, [])
    strategy.experience = modern.train_stream[0]
    metric.before_training_exp(strategy)
    model, weight = strategy.model, strategy.model.layer4[0].conv2.weight
    good = weight.detach().clone()

    def tags():
        return {value.name for value in metric.after_training_exp(strategy)}

    weight.data.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="is left out") as caught:
        assert tags() == set()
    assert len(caught) == 4 and "it is nan" in "".join(str(w.message) for w in caught)
    weight.data.copy_(good)
    with pytest.warns(RuntimeWarning, match="-previous is left out"):
        assert tags() == {"drift/cka", "drift/weights"}
    assert tags() == {"drift/cka", "drift/weights", "drift/cka-previous", "drift/weights-previous"}
    model.layer4[0].extra = nn.Parameter(torch.zeros(3))  # an adapter that a later task adds
    with pytest.warns(RuntimeWarning, match="layer4.0.extra"):
        assert tags() == {"drift/cka", "drift/cka-previous"}


def test_without_a_reference_nothing_is_emitted(modern, digits, tools):
    log, metric = tools.Collect(), RepresentationDrift(digits[0][:20])
    strategy = learner(vit, [metric], log=log)
    strategy.experience = modern.train_stream[0]
    assert metric.after_training_exp(strategy) is None
    assert metric.result() == {} and str(metric) == "RepresentationDrift"


def test_double_precision_and_flat_inputs(tools):
    bench, log = tools.benchmark(), tools.Collect()
    metric = RepresentationDrift(bench.test_stream, head_name="2", num_images=50)
    strategy = tools.strategy([metric], [log])
    for experience in bench.train_stream:
        strategy.train(experience, eval_streams=[])
    assert [x for x, _ in log.curve("drift/cka")] == [0, 1, 2]
    double = RepresentationDrift(metric.images, head_name="2")
    strategy.model.double()
    double.before_training_exp(strategy)
    hidden = strategy.model[:2](metric.images.double()).detach().float()
    torch.testing.assert_close(double.state_dict()["references"]["initial"]["features"], hidden)
