"""ASB and Meta-ASB: a loop by hand, finite differences, Naive with the plugin, given episodes, real digits."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn

from avalanche_firn.plugins.episodes import EpisodeSampler
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
from avalanche_firn.strategies.zapping import ASB, MetaASB

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
NAMES = ("backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias")
SHORT = dict(inner_lr=0.2, outer_lr=0.03, episodes=5, inner_steps=5, remember_size=7, seed=3)


def network(dtype=torch.float64, classes=4):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh())
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(6, classes))).to(dtype)


def samples(dtype=torch.float64, per_class=(6, 4, 8, 3)):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    return torch.randn(len(y), 1, 3, 3, generator=generator, dtype=dtype) + y.view(-1, 1, 1, 1).to(dtype) / 2, y


def build(model, kind=ASB, **kwargs):
    settings = SHORT | {"evaluator": None} | kwargs
    return kind(model=model, **settings)


def state(strategy):
    return {name: value.clone() for name, value in strategy.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------- the oracle
def forward(theta, x):
    w1, b1, w2, b2 = theta
    return torch.tanh(x.flatten(1) @ w1.T + b1) @ w2.T + b2


def mean_loss(theta, x, y):
    logits = forward(theta, x)
    return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()


class Oracle:
    """Episodes one after the other; plain SGD and Adam written out, moments that live over episodes."""

    def __init__(self, model, settings):
        self.theta = [dict(model.named_parameters())[name].detach().clone() for name in NAMES]
        self.settings = settings
        self.m = [torch.zeros_like(t) for t in self.theta]
        self.v = [torch.zeros_like(t) for t in self.theta]
        self.t = 0
        self.zaps = torch.Generator().manual_seed(derived_seed(settings["seed"], 1))
        self.inner, self.outer = [], []

    def run(self, x, y, seed):
        s = self.settings
        sampler = EpisodeSampler(
            y.numpy(), episodes=s["episodes"], inner_steps=s["inner_steps"], remember_size=s["remember_size"], seed=seed
        )
        for ids in sampler:
            self.episode(x[ids], y[ids])

    def episode(self, x, y):
        s = self.settings
        n, moved = s["inner_steps"], (0, 1, 2, 3) if s.get("inner", "all") == "all" else (2, 3)
        if s.get("zap", True):
            width = self.theta[2].shape[1]
            fresh = torch.randn(1, width, generator=self.zaps, dtype=torch.float64) * math.sqrt(2 / width)
            self.theta[2][y[0]] = fresh[0]
        leaves = [t.clone().requires_grad_() for t in self.theta]
        theta, losses = list(leaves), []
        for _ in range(s.get("cycles", 1)):
            for start in range(0, n, s.get("inner_batch_size", 1)):
                end = min(start + s.get("inner_batch_size", 1), n)
                loss = mean_loss(theta, x[start:end], y[start:end])
                losses.append(loss.item())
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                theta = [
                    t - s["inner_lr"] * g if i in moved else t
                    for i, (t, g) in enumerate(zip(theta, grads, strict=True))
                ]
        if not s.get("meta"):
            leaves = theta = [t.detach().requires_grad_() for t in theta]
        first = n if s.get("remember_only") else 0
        loss = mean_loss(theta, x[first:], y[first:])
        grads = torch.autograd.grad(loss, leaves)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        limit = s.get("max_grad_norm")
        if limit is not None and norm > limit:
            grads = [g * limit / (norm + 1e-6) for g in grads]  # torch's denominator
        self.inner.append(losses)
        self.outer.append(loss.item())
        self.theta = self.adam([t.detach() for t in leaves], grads)

    def adam(self, theta, grads):
        self.t += 1
        moved = []
        for i, (t, g) in enumerate(zip(theta, grads, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            moved.append(t - self.settings["outer_lr"] * m / (v.sqrt() + 1e-8))
        return moved


class Outer(SupervisedPlugin):
    """Batches and losses of the outer steps, the weights before them, and the gradients of them."""

    def __init__(self):
        super().__init__()
        self.batches, self.losses, self.weights, self.gradients = [], [], [], []

    def before_forward(self, strategy, **kwargs):
        self.batches.append([part.clone() for part in strategy.mbatch])
        self.weights.append(state(strategy))

    def before_update(self, strategy, **kwargs):
        self.losses.append(float(strategy.loss.detach()))
        self.gradients.append({n: p.grad.clone() for n, p in strategy.model.named_parameters() if p.grad is not None})


VARIANTS = {
    "default": {},
    "no zap": {"zap": False},
    "cycles, batches": {"cycles": 2, "inner_batch_size": 2},
    "remember only": {"remember_only": True},
    "clipped": {"max_grad_norm": 0.02},
    "head": {"inner": "head"},
    "meta": {"meta": True},
    "meta, no zap": {"meta": True, "zap": False},
    "meta, cycles, batches, clipped": {"meta": True, "cycles": 2, "inner_batch_size": 3, "max_grad_norm": 0.02},
    "meta, head, remember only": {"meta": True, "inner": "head", "remember_only": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_experiences_equal_a_loop_by_hand(variant, stream_of):
    """The sequences of the class with three images are drawn with replacement."""
    x, y = samples()
    settings = SHORT | VARIANTS[variant]
    model, outer = network(), Outer()
    oracle = Oracle(model, settings)
    strategy = build(model, plugins=[outer], evaluator=EvaluationPlugin(loggers=[]), **VARIANTS[variant])
    logged = []
    for task, experience in enumerate(stream_of(x, y, [2, 2]).train_stream):
        strategy.train(experience, eval_streams=[])
        logged.append(strategy.evaluator.get_last_metrics())
        part = (y // 2 == task).nonzero().flatten()
        oracle.run(x[part], y[part], settings["seed"] if task == 0 else [settings["seed"], task, 0])
    for name, expected in zip(NAMES, oracle.theta, strict=True):
        torch.testing.assert_close(strategy.model.state_dict()[name], expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(outer.losses, oracle.outer, rtol=0, atol=1e-10)
    for task, metrics in enumerate(logged):
        edges = np.mean([[losses[0], losses[-1]] for losses in oracle.inner[5 * task : 5 * task + 5]], axis=0)
        values = [metrics["zap/inner-loss-first"], metrics["zap/inner-loss-last"]]
        np.testing.assert_allclose(values, edges, rtol=0, atol=1e-10)
    if "clipped" in variant:
        norms = [torch.cat([g.flatten() for g in found.values()]).norm() for found in outer.gradients]
        assert max(norms) <= 0.02 + 1e-9 and min(norms) > 0.0199


def test_more_epochs_are_other_episodes(stream_of):
    """The plugin on a strategy of several epochs: the second pass draws from seed, experience and epoch."""
    x, y = samples()
    model = network()
    oracle = Oracle(model, SHORT)
    phase = SequentialPhasePlugin(0.2, zap=True, episodes=5, inner_steps=5, remember_size=7, seed=3)
    strategy = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.03), criterion=nn.CrossEntropyLoss(),
        train_epochs=2, evaluator=None, plugins=[phase],
    )  # fmt: skip
    strategy.train(stream_of(x, y, [4]).train_stream[0], eval_streams=[])
    oracle.run(x, y, 3)
    oracle.run(x, y, [3, 0, 1])
    # Naive's loss is float32 at its end, so its last digits are lost there, but not in the gradients
    for name, expected in zip(NAMES, oracle.theta, strict=True):
        torch.testing.assert_close(strategy.model.state_dict()[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "variant",
    [{}, {"meta": True}, {"zap": False, "max_grad_norm": 0.1}, {"inner": "head", "cycles": 2, "remember_only": True}],
)
def test_equals_naive_with_the_plugin_to_the_bit(variant, stream_of):
    x, y = samples(torch.float32)
    bm = stream_of(x, y, [2, 2])
    strategy = build(network(torch.float32), **variant)
    model = network(torch.float32)
    own = {key: SHORT[key] for key in ("episodes", "inner_steps", "remember_size", "seed")}
    phase = SequentialPhasePlugin(SHORT["inner_lr"], **{"zap": True, **own, **variant})
    naive = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=SHORT["outer_lr"]),
        criterion=nn.CrossEntropyLoss(), train_mb_size=2, evaluator=None, plugins=[phase],
    )  # fmt: skip
    for experience in bm.train_stream:
        strategy.train(experience, eval_streams=[])
        naive.train(experience, eval_streams=[], shuffle=False)
    same(state(strategy), state(naive))


def test_meta_asb_is_asb_with_meta(stream_of):
    bm = stream_of(*samples(), [4])
    runs = [build(network(), meta=True), build(network(), MetaASB)]
    for strategy in runs:
        strategy.train(bm.train_stream[0], eval_streams=[])
    same(*map(state, runs))
    assert MetaASB(model=network(), inner_lr=0.1).sequential_phase.episodes == 25000
    assert ASB(model=network(), inner_lr=0.1).sequential_phase.episodes == 9000


# ------------------------------------------------------------- given episodes
def given(length=4, remembered=6):
    x, y = samples()
    chosen = (y == 2).nonzero().flatten()[:length]
    return x[chosen], y[chosen], x[:remembered], y[:remembered]


@pytest.mark.parametrize("inner", ["all", "head"])
def test_the_meta_gradient_equals_finite_differences(inner):
    """Central differences of the batch loss as a function of the weights before the sequence, every weight."""
    images = given()
    strategy = build(network(), meta=True, zap=False, inner=inner, inner_lr=0.5)
    theta = [p.detach().clone() for p in strategy.model.parameters()]
    moved = (0, 1, 2, 3) if inner == "all" else (2, 3)

    def loss(weights):
        for i in range(len(images[0])):
            leaves = [w.detach().requires_grad_() for w in weights]
            grads = torch.autograd.grad(mean_loss(leaves, images[0][i : i + 1], images[1][i : i + 1]), leaves)
            weights = [w - 0.5 * g if k in moved else w for k, (w, g) in enumerate(zip(weights, grads, strict=True))]
        return float(mean_loss(weights, torch.cat(images[::2]), torch.cat(images[1::2])))

    losses = strategy.episode(*images)
    assert float(losses.batch) == pytest.approx(loss(theta), abs=1e-12)
    for k, parameter in enumerate(strategy.model.parameters()):
        numeric = torch.zeros_like(parameter)
        for place in range(parameter.numel()):
            both = []
            for step in (1e-5, -1e-5):
                shifted = [t.clone() for t in theta]
                shifted[k].view(-1)[place] += step
                both.append(loss(shifted))
            numeric.view(-1)[place] = (both[0] - both[1]) / 2e-5
        torch.testing.assert_close(parameter.grad, numeric, rtol=0, atol=1e-8)
    first_order = build(network(), zap=False, inner=inner, inner_lr=0.5)
    first_order.episode(*images)
    pairs = zip(strategy.model.parameters(), first_order.model.parameters(), strict=True)
    assert max(float((a.grad - b.grad).abs().max()) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("inner", ["all", "head"])
def test_no_gradient_of_the_sequence_reaches_the_outer_step(meta, inner):
    """Two episodes: what is there before the second (garbage too) has no influence on its gradient either."""
    outer = Outer()
    strategy = build(network(), meta=meta, inner=inner, plugins=[outer])
    strategy.episode(*given())
    for parameter in strategy.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    strategy.episode(*given(3))
    if not meta:
        theta = [outer.weights[1][name].requires_grad_() for name in NAMES]
        grads = torch.autograd.grad(mean_loss(theta, *outer.batches[1][:2]), theta)
        for name, expected in zip(NAMES, grads, strict=True):
            torch.testing.assert_close(outer.gradients[1][name], expected, rtol=0, atol=1e-12)
    for name, parameter in strategy.model.named_parameters():
        assert torch.equal(parameter.grad, outer.gradients[1][name])
        assert (parameter.grad - 7).abs().min() > 1


def test_meta_asb_drops_the_sequence():
    """An outer rate of next to nothing: the weights are the ones from before; ASB's are those after the sequence."""
    before = state(build(network()))
    runs = {}
    for meta in (False, True):
        strategy = build(network(), meta=meta, zap=False, outer_lr=1e-12)
        strategy.episode(*given())
        runs[meta] = max(float((v - before[n]).abs().max()) for n, v in state(strategy).items())
        assert strategy.sequential_phase._fast is None
    assert runs[True] < 1e-11 and runs[False] > 1e-3


@pytest.mark.parametrize("meta", [False, True])
def test_a_given_episode_equals_the_same_one_in_training(meta, stream_of):
    x, y = samples()
    settings = {"meta": meta, "episodes": 3}
    trained, fed = build(network(), **settings), build(network(), **settings)
    outer = Outer()
    trained.plugins.insert(1, outer)
    trained.train(stream_of(x, y, [4]).train_stream[0], eval_streams=[])
    for batch in outer.batches:
        inner, remember = [part[:5] for part in batch], [part[5:] for part in batch]
        losses = fed.episode(inner[0], inner[1], remember[0], remember[1])
        assert losses.inner.shape == (5,) and losses.batch.shape == ()
        assert not losses.inner.requires_grad and not losses.batch.requires_grad
    same(state(trained), state(fed))
    np.testing.assert_allclose(float(losses.batch), outer.losses[-1], rtol=0, atol=1e-12)
    assert fed.sequential_phase.inner_steps == 5
    assert fed.clock.train_iterations == 3


def test_a_given_episode_may_be_followed_by_training_and_evaluation(stream_of):
    bm = stream_of(*samples(), [4])
    strategy = build(network(), MetaASB, evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]))
    strategy.episode(*given())
    strategy.train(bm.train_stream[0], eval_streams=[])
    assert strategy.clock.train_iterations == 6
    results = strategy.eval(bm.test_stream)
    x, y = samples()
    expected = (forward([strategy.model.state_dict()[n] for n in NAMES], x).argmax(1) == y).double().mean()
    (accuracy,) = [v for k, v in results.items() if "Top1_Acc_Stream" in k]
    assert accuracy == pytest.approx(float(expected))


def test_what_a_given_episode_refuses():
    strategy = build(network())
    x, y, rx, ry = given()
    with pytest.raises(ValueError, match="inner_labels holds the classes"):
        strategy.episode(x, torch.tensor([2, 2, 1, 2]), rx, ry)
    with pytest.raises(ValueError, match="inner_labels holds the classes"):
        strategy.episode(x[:0], y[:0], rx, ry)
    with pytest.raises(ValueError, match="inner_images and inner_labels hold 4 and 3"):
        strategy.episode(x, y[:3], rx, torch.cat([ry, y[3:]]))
    with pytest.raises(ValueError, match="remember_images is empty"):
        build(network(), remember_only=True).episode(x, y, rx[:0], ry[:0])
    with pytest.raises(ValueError, match="class_ids"):
        strategy.episode(x, torch.full((4,), 9), rx, ry)
    same(state(strategy), state(build(network())))
    strategy.episode(x, y, rx[:0], ry[:0])  # the sequence alone is a batch


# ---------------------------------------------------------------- random numbers
def test_zaps_are_drawn_apart_from_episodes_and_from_everything_else(stream_of):
    x, y = samples()
    bm = stream_of(x, y, [4])
    batches, generators = [], []
    for zap in (True, False):
        outer = Outer()
        strategy = build(network(), zap=zap, plugins=[outer])
        generators.append([strategy.sequential_phase.zap_generator.get_state()])
        torch.manual_seed(5)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        strategy.train(bm.train_stream[0], eval_streams=[])
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])
        batches.append(torch.stack([batch[0] for batch in outer.batches]))
        generators[-1].append(strategy.sequential_phase.zap_generator.get_state())
    assert torch.equal(*batches)
    assert not torch.equal(*generators[0]) and torch.equal(*generators[1])


def test_seeds(stream_of):
    bm = stream_of(*samples(), [4])

    def run(start, **kwargs):
        strategy = build(network(), **kwargs)
        torch.manual_seed(start)
        strategy.train(bm.train_stream[0], eval_streams=[])
        return state(strategy)["head.weight"]

    assert torch.equal(run(0, seed=1), run(1, seed=1))
    assert not torch.equal(run(0, seed=1), run(0, seed=2))
    assert torch.equal(run(0, seed=None), run(0, seed=None))
    assert not torch.equal(run(0, seed=None), run(1, seed=None))


# --------------------------------------------------------------------- settings
def test_outer_optimizer_and_criterion_are_arguments(stream_of):
    """SGD without smoothing is one step along the gradient; a smoothed loss gives another one."""
    bm = stream_of(*samples(), [4])
    moved = []
    for smoothing in (0.0, 0.2):
        outer = Outer()
        strategy = build(
            network(), outer_optimizer=torch.optim.SGD, outer_lr=0.5, episodes=1, plugins=[outer],
            criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
        )  # fmt: skip
        strategy.train(bm.train_stream[0], eval_streams=[])
        assert isinstance(strategy.optimizer, torch.optim.SGD)
        for name, value in state(strategy).items():
            expected = outer.weights[0][name] - 0.5 * outer.gradients[0][name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)
        moved.append(state(strategy)["head.weight"])
    assert (moved[0] - moved[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_mb_size": 4}, "train_mb_size is given"),
        ({"train_epochs": 4}, "train_epochs is given"),
        ({"optimizer": None}, "optimizer is given"),
        ({"outer_lr": 0.0}, r"outer_lr is 0\.0"),
        ({"outer_lr": math.nan}, "outer_lr is nan"),
        ({"inner_lr": -0.1}, r"inner_lr is -0\.1"),
        ({"episodes": 0}, "episodes is 0"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(network(), **kwargs)


def test_meta_asb_without_meta():
    with pytest.raises(ValueError, match="meta is False"):
        build(network(), MetaASB, meta=False)


# ------------------------------------------------------------------- real digits
def convnet():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    return nn.Sequential(OrderedDict(backbone=body, head=nn.Linear(16 * 9, 10)))


@pytest.fixture(scope="module")
def digits(stream_of):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return stream_of(x[:1000], y[:1000], [10], x[1000:], y[1000:])


@pytest.mark.parametrize("kind", [ASB, MetaASB])
@pytest.mark.parametrize("zap", [True, False])
def test_learns_real_digits(kind, zap, digits):
    """Outer loss of the last ten of 100 episodes as a share of the first ten's, over six seeds: 0.59 to 0.75 with the
    zap, 0.09 to 0.13 without. With it the classifier is never done (each of its rows is redrawn every ten episodes),
    without it the test accuracy is 0.84 to 0.91."""
    outer = Outer()
    strategy = kind(
        model=convnet(), inner_lr=0.01, outer_lr=3e-3, episodes=100, inner_steps=5, remember_size=64, zap=zap, seed=0,
        plugins=[outer], evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]), eval_every=0,
    )  # fmt: skip
    results = strategy.train(digits.train_stream[0], eval_streams=[digits.test_stream])
    assert np.mean(outer.losses[-10:]) < (0.85 if zap else 0.25) * np.mean(outer.losses[:10])
    (accuracy,) = [v for k, v in results.items() if "Top1_Acc_Stream" in k]
    assert zap or accuracy > 0.75


def test_a_copy_of_the_strategy_trains_on_its_own(stream_of):
    """Meta-ASB stands before the forward pass of the strategy that it was installed in."""
    bm = stream_of(*samples(), [4])
    phase = build(network(), MetaASB).sequential_phase
    phases = [phase, copy.deepcopy(phase)]
    runs = []
    for own in phases:
        model = network()
        strategy = Naive(
            model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.03), criterion=nn.CrossEntropyLoss(),
            evaluator=None, plugins=[own],
        )  # fmt: skip
        strategy.train(bm.train_stream[0], eval_streams=[])
        strategy.train(bm.train_stream[0], eval_streams=[])
        runs.append(state(strategy))
    same(*runs)
