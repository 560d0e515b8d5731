"""Learning-rate splitter and rebuilt optimizers: golden runs and rates, groups, errors."""

import itertools

import numpy as np
import pytest
import timm
import timm.optim
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from avalanche_firn.models.parts import FeatureClassifier, with_taskwise_head
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin, optimizer_like
from avalanche_firn.plugins.schedules import cosine, multistep
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin


class Recorder(SupervisedPlugin):
    """Injects the golden initial heads and records every epoch."""

    def __init__(self, golden):
        super().__init__()
        self.golden, self.rates, self.losses = golden, [], []

    def before_training_exp(self, strategy, **kwargs):
        self.task, self.epoch, head = strategy.clock.train_exp_counter, 0, strategy.model.head
        with torch.no_grad():
            head.weights[-1].copy_(torch.from_numpy(self.golden[f"task{self.task}_head_weight0"]))
        self.old = [w.detach().clone() for w in head.weights[:-1]]

    def before_training_epoch(self, strategy, **kwargs):
        self.epoch_losses = []
        rates = {g["name"]: g["lr"] for g in strategy.optimizer.param_groups}
        np.testing.assert_allclose(
            [rates["backbone"], rates["head"]], self.golden[f"task{self.task}_lrs"][self.epoch], rtol=0, atol=1e-12
        )

    def after_training_iteration(self, strategy, **kwargs):
        self.epoch_losses.append(strategy.loss.item())

    def after_training_epoch(self, strategy, **kwargs):
        g, t, e = self.golden, self.task, self.epoch
        close = dict(rtol=0, atol=1e-10)
        # Avalanche adds losses up in float32; the gradients stay float64
        np.testing.assert_allclose(self.epoch_losses, g[f"task{t}_losses"][e], rtol=0, atol=1e-6)
        for name, parameter in strategy.model.backbone.named_parameters():
            np.testing.assert_allclose(parameter.detach(), g[f"task{t}_after_convnet.{name}"][e], **close)
        for j in range(t + 1):
            for kind, parts in (("weight", strategy.model.head.weights), ("bias", strategy.model.head.biases)):
                np.testing.assert_allclose(parts[j].detach(), g[f"task{t}_after_fc.heads.{j}.0.{kind}"][e], **close)
        for own, old in zip(strategy.model.head.weights, self.old, strict=False):
            assert torch.equal(own, old)
        self.epoch += 1


def two_rate_run(golden, stream_of, toy_backbone, **overrides):
    g = golden("slca", "two_rate_sgd")
    x = np.concatenate([g["task0_x"], g["task1_x"]])
    y = np.concatenate([g["task0_y"], g["task1_y"]])
    settings = dict(momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"])) | overrides
    model = with_taskwise_head(toy_backbone(g)).double()
    scheduler = multistep(g["milestones"].tolist())
    plugin = SlowLearnerPlugin(float(g["backbone_scale"]), scheduler_factory=scheduler)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=float(g["lr"]), **settings),
        criterion=LocalCrossEntropy(),
        train_mb_size=int(g["batch_size"]),
        train_epochs=int(g["epochs"]),
        plugins=[plugin, Recorder(g)],
        evaluator=None,
    )
    for experience in stream_of(x, y, g["sizes"].tolist()).train_stream:
        strategy.train(experience, eval_streams=[], shuffle=False)


def test_golden_two_rate_sgd_every_epoch_of_every_task(golden, stream_of, toy_backbone):
    two_rate_run(golden, stream_of, toy_backbone)


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"momentum": 0.8}])
def test_the_golden_run_notices_wrong_settings(golden, stream_of, toy_backbone, wrong):
    with pytest.raises(AssertionError):
        two_rate_run(golden, stream_of, toy_backbone, **wrong)


SLCA_TABLES = {  # released configurations: epochs, milestone
    "cifar": (20, 18), "cifar_mocov3": (90, 80), "imgnetr": (50, 40), "imgnetr_mocov3": (90, 80),
    "cub": (50, 40), "cub_mocov3": (90, 80), "cars": (50, 40), "cars_mocov3": (90, 80),
}  # fmt: skip


@pytest.mark.parametrize("config", SLCA_TABLES)
def test_learning_rate_tables_of_the_released_configurations(golden, config):
    epochs, milestone = SLCA_TABLES[config]
    model = FeatureClassifier(nn.Linear(2, 2), nn.Linear(2, 2))
    template = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    groups = [
        {"params": list(model.backbone.parameters()), "lr": 0.01 * 0.01},
        {"params": list(model.head.parameters())},
    ]
    optimizer = optimizer_like(template, groups)
    scheduler = multistep([milestone])(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, golden("slca", "lr_tables")[f"slca_{config}"], rtol=0, atol=1e-12)


def run(model, plugin, stream_of, *, optimizer=None, classes=(2, 2), **kwargs):
    """One epoch over a small stream; gives the strategy."""
    torch.manual_seed(0)
    x = torch.randn(8 * sum(classes), *kwargs.pop("shape", (6,)))
    y = torch.arange(sum(classes)).repeat_interleave(8)
    strategy = Naive(
        model=model, optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_mb_size=8, plugins=[plugin], evaluator=None, **kwargs,
    )  # fmt: skip
    for experience in stream_of(x, y, classes).train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def plain_model():
    return FeatureClassifier(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()), nn.Linear(5, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.7),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: timm.optim.create_optimizer_v2(p, "lamb", lr=0.1),
    ],
)
def test_class_and_settings_of_any_optimizer_survive(make, stream_of):
    model = plain_model()
    template = make(model.parameters())
    strategy = run(model, SlowLearnerPlugin(0.1), stream_of, optimizer=template)
    assert type(strategy.optimizer) is type(template)
    groups = {g["name"]: g for g in strategy.optimizer.param_groups}
    assert groups["backbone"]["lr"] == pytest.approx(0.01) and groups["head"]["lr"] == pytest.approx(0.1)
    for key, value in template.param_groups[0].items():
        if key not in ("params", "lr"):
            assert groups["head"][key] == value, key


def test_rates_edited_after_construction_count(stream_of):
    model = plain_model()
    template = torch.optim.SGD(model.parameters(), lr=0.5)
    template.param_groups[0]["lr"] = 0.2
    strategy = run(model, SlowLearnerPlugin(0.1), stream_of, optimizer=template)
    assert [g["lr"] for g in strategy.optimizer.param_groups] == pytest.approx([0.02, 0.2])


def test_scale_zero_freezes_parameters_and_batchnorm_statistics(stream_of):
    model = plain_model()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    head = model.head.weight.detach().clone()
    strategy = run(model, SlowLearnerPlugin(0.0), stream_of)
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert not torch.equal(model.head.weight, head)
    assert [g["name"] for g in strategy.optimizer.param_groups] == ["head"]


def test_layer_decay_names_and_scales(stream_of):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=2, num_classes=4)
    strategy = run(model, SlowLearnerPlugin(0.5, layer_decay=0.1), stream_of, shape=(3, 32, 32))
    rates = {g["name"]: g["lr"] for g in strategy.optimizer.param_groups}
    layers = [n for n in rates if n.startswith("backbone.")]
    assert layers == sorted(layers) and len(layers) >= 3
    for low, high in itertools.pairwise(layers):
        assert rates[high] / rates[low] == pytest.approx(10)
    assert rates[layers[-1]] == pytest.approx(0.05) and rates["head"] == pytest.approx(0.1)
    assert sum(len(g["params"]) for g in strategy.optimizer.param_groups) == len(list(model.parameters()))


def test_rules_with_a_factor_per_task(stream_of):
    rules = [
        (lambda n, p: n.endswith("bias"), lambda task: 0.5 if task == 0 else 0.25),
        (lambda n, p: not n.endswith("bias"), 2.0),
    ]
    strategy = run(plain_model(), SlowLearnerPlugin(groups=rules), stream_of)
    assert {g["name"]: g["lr"] for g in strategy.optimizer.param_groups} == pytest.approx(
        {"group-0": 0.025, "group-1": 0.2}
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(lambda n, p: n.startswith("head"), 1.0)], r"'backbone.0.weight' matches groups \[\]"),
        ([(lambda n, p: True, 1.0), (lambda n, p: True, 1.0)], r"matches groups \[0, 1\]"),
        ([(lambda n, p: True, -1.0)], r"groups\[0\] is -1.0"),
    ],
)
def test_bad_rules(rules, message, stream_of):
    with pytest.raises(ValueError, match=message):
        run(plain_model(), SlowLearnerPlugin(groups=rules), stream_of)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(backbone_scale=-0.1), "backbone_scale is -0.1"),
        (dict(backbone_scale=float("nan")), "backbone_scale is nan"),
        (dict(layer_decay=0.0), "layer_decay is 0.0"),
        (dict(groups=[]), "groups is empty"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SlowLearnerPlugin(**settings)


def test_errors_before_the_first_step(stream_of):
    with pytest.raises(ValueError, match="was not found"):
        run(nn.Sequential(nn.Linear(6, 4)), SlowLearnerPlugin(), stream_of)
    frozen = plain_model()
    frozen.head.requires_grad_(False)
    with pytest.raises(ValueError, match="'head' has no trainable parameter"):
        run(frozen, SlowLearnerPlugin(), stream_of)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        run(plain_model(), SlowLearnerPlugin(scheduler_factory=lambda o: ReduceLROnPlateau(o)), stream_of)
    with pytest.raises(ValueError, match="layer_decay needs a timm backbone"):
        run(plain_model(), SlowLearnerPlugin(layer_decay=0.5), stream_of)
    model = plain_model()
    two = torch.optim.SGD([{"params": model.backbone.parameters()}, {"params": model.head.parameters()}], lr=0.1)
    with pytest.raises(ValueError, match="2 parameter groups"):
        run(model, SlowLearnerPlugin(), stream_of, optimizer=two)
    with pytest.raises(ValueError, match="all rebuild the optimizer"):
        Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), evaluator=None,
            plugins=[SlowLearnerPlugin(), FreshOptimizerPlugin()],
        ).train([])  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: multistep([3, 2]), r"\[3, 2\]"), (lambda: multistep([0]), r"\[0\]"),
        (lambda: multistep([1], 0), "gamma is 0"),
        (lambda: cosine(0), "epochs is 0"), (lambda: cosine(3, -1.0), "eta_min is -1.0"),
    ],
)  # fmt: skip
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("factory", [multistep([1, 2]), cosine(3)])
def test_schedule_state_is_plain_and_resumes(factory, stream_of):
    import json

    plugin = SlowLearnerPlugin(0.1, scheduler_factory=factory)
    strategy = run(plain_model(), plugin, stream_of, train_epochs=2)
    state = json.loads(json.dumps(plugin.state_dict()))
    rates = [g["lr"] for g in strategy.optimizer.param_groups]
    optimizer = torch.optim.SGD(
        [{"params": g["params"], "lr": lr} for g, lr in zip(strategy.optimizer.param_groups, [0.01, 0.1], strict=True)]
    )
    other = SlowLearnerPlugin(0.1)
    other.load_state_dict(state)  # between experiences there is no schedule yet
    other.scheduler = factory(optimizer)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr  # the optimizer's own state
    other.load_state_dict(state)
    for scheduler in (plugin.scheduler, other.scheduler):
        scheduler.optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in strategy.optimizer.param_groups]
