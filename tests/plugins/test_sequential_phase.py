"""SequentialPhasePlugin beside other plugins: classifiers, BatchNorm, precision, evaluations, and what it refuses."""

import copy
from collections import OrderedDict

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import BaseLogger
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn.utils import parametrizations

from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.rehearsal import RehearsalPlugin
from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore::DeprecationWarning")
SHORT = dict(zap=True, episodes=4, inner_steps=3, remember_size=5, seed=2)


def phase(inner_lr=0.1, **kwargs):
    return SequentialPhasePlugin(inner_lr, **SHORT | kwargs)


def network(head=None, *, norm=None):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Identity() if norm is None else norm, nn.ReLU(), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=body, head=nn.Linear(16, 4) if head is None else head))


@pytest.fixture(scope="module")
def bm(stream_of):
    """Two experiences of two classes with six images."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat_interleave(6)
    return stream_of(torch.randn(24, 1, 4, 4, generator=generator) + y.view(-1, 1, 1, 1) / 2, y, [2, 2])


def naive(plugins, model=None, *, optimizer=torch.optim.Adam, evaluator=None, lr=0.01, **kwargs):
    model = network() if model is None else model
    return Naive(
        model=model, optimizer=optimizer(model.parameters(), lr=lr), criterion=nn.CrossEntropyLoss(),
        plugins=plugins, evaluator=evaluator, **kwargs,
    )  # fmt: skip


def train(strategy, experiences, **kwargs):
    for experience in experiences:
        strategy.train(experience, eval_streams=[], **kwargs)
    return strategy


def weights(strategy):
    return {name: value.clone() for name, value in strategy.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Watch(SupervisedPlugin):
    """Weights as the outer step finds them and leaves them, and whose episode it was."""

    def __init__(self):
        super().__init__()
        self.found, self.left, self.classes, self.sizes = [], [], [], []

    def before_forward(self, strategy, **kwargs):
        self.found.append(weights(strategy))
        self.classes.append(int(strategy.mb_y[0]))
        self.sizes.append(len(strategy.mb_y))

    def after_training_iteration(self, strategy, **kwargs):
        self.left.append(weights(strategy))


# ------------------------------------------------------------------------- zaps
@pytest.mark.parametrize("init", ["kaiming_normal", "zeros"])
def test_a_zap_writes_the_row_of_its_class_and_nothing_else(init, bm):
    """With rates of 0 zaps are all that happens; a Parameter stays the same object."""
    watch, model = Watch(), network()
    old, before = model.head.weight, {n: v.clone() for n, v in model.state_dict().items()}
    train(naive([phase(0.0, init=init, episodes=6), watch], model, lr=0.0), bm.train_stream[:1])
    assert model.head.weight is old
    for class_id, now in zip(watch.classes, watch.found, strict=True):
        changed = (now["head.weight"] != before["head.weight"]).any(1).nonzero().flatten().tolist()
        assert changed == ([class_id] if before["head.weight"][class_id].any() else [])
        assert init != "zeros" or not now["head.weight"][class_id].any()
        for name in before:
            assert name == "head.weight" or torch.equal(now[name], before[name])
        before = now
    assert set(watch.classes) == {0, 1}


def test_without_zaps_rates_of_zero_change_nothing(bm):
    strategy = naive([phase(0.0, zap=False)], lr=0.0)
    before = weights(strategy)
    same(weights(train(strategy, bm.train_stream)), before)


def test_fresh_rows_have_the_spread_of_one_row(bm):
    """600 values: the spread within four standard errors of sqrt(2 / F)."""
    model = nn.Sequential(OrderedDict(backbone=nn.Flatten(), head=nn.Linear(16, 4)))
    watch = Watch()
    train(naive([phase(0.0, episodes=40), watch], model, lr=0.0), bm.train_stream[:1])
    rows = torch.stack([now["head.weight"][c] for c, now in zip(watch.classes, watch.found, strict=True)])
    assert rows.numel() == 640
    assert abs(float(rows.std()) / (2 / 16) ** 0.5 - 1) < 4 / (2 * 640) ** 0.5


# ------------------------------------------------------------------- classifiers
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    "kind", ["IncrementalClassifier", "taskwise", "taskwise, old ones trained", "named", "rebuilt optimizer"]
)
def test_classifiers(kind, meta, bm):
    """Growing ones get their rows before the first episode; the classes of an experience are what is zapped in it."""
    options, others, name = {}, [], "head"
    if kind == "IncrementalClassifier":
        model = network(IncrementalClassifier(16, 1))
    elif kind.startswith("taskwise"):
        model = with_taskwise_head(network().backbone, feature_size=16, freeze_old="old" not in kind)
    elif kind == "named":
        model = nn.Sequential(OrderedDict(body=network().backbone, last=nn.Linear(16, 4)))
        options, name = {"head_name": "last"}, "last"
    else:
        model, others = network(), [FreshOptimizerPlugin()]
    watch = Watch()
    strategy = naive([phase(meta=meta, **options), *others, watch], model)
    train(strategy, bm.train_stream)
    assert [c // 2 for c in watch.classes] == [0] * 4 + [1] * 4 and watch.sizes == [8] * 8
    assert all(torch.isfinite(value).all() for value in weights(strategy).values())
    head = model.get_submodule(name)
    assert type(head) is type(strategy.model.get_submodule(name))
    moved = [n for n in watch.left[-1] if n.startswith(name) and n in watch.left[4]
             and not torch.equal(watch.left[-1][n], watch.left[4][n])]  # fmt: skip
    assert moved
    if kind == "taskwise":  # the first task's layer is frozen in the second
        first = [n for n in watch.left[3] if n.startswith("head.") and n in watch.left[-1]]
        kept = [n for n in first if torch.equal(watch.left[3][n], watch.left[-1][n])]
        assert kept and all(n.endswith(".0") or not watch.left[3][n].is_floating_point() for n in kept)


def test_only_the_head_moves_in_a_sequence(bm):
    class Sequence(Watch):
        def before_training_iteration(self, strategy, **kwargs):
            self.start = getattr(self, "start", [])
            self.start.append(weights(strategy))

    watch = Sequence()
    plugin = phase(inner="head", zap=False)
    strategy = naive([watch, plugin])
    train(strategy, bm.train_stream[:1])
    for start, before, after in zip(watch.start, watch.found, watch.left, strict=True):
        moved = {n for n in start if not torch.equal(start[n], before[n])}
        assert moved == {"head.weight", "head.bias"}
        assert all(not torch.equal(before[n], after[n]) for n in start)


def test_frozen_parameters_stay(bm):
    model = network()
    model.backbone[0].weight.requires_grad_(False)
    frozen = model.backbone[0].weight.clone()
    for meta in (False, True):
        strategy = train(naive([phase(meta=meta)], model), bm.train_stream[:1])
        assert torch.equal(strategy.model.backbone[0].weight, frozen)


# ------------------------------------------------------------ BatchNorm, dropout
@pytest.mark.parametrize("meta", [False, True])
def test_batch_norm_counts_every_forward_pass(meta, bm):
    """Statistics move in the sequence and in the outer step, also where the weights are dropped."""
    strategy = naive([phase(meta=meta)], network(norm=nn.BatchNorm2d(4)))
    train(strategy, bm.train_stream[:1])
    norm = strategy.model.backbone[1]
    assert int(norm.num_batches_tracked) == 4 * (3 + 1)
    assert norm.running_mean.abs().min() > 0 and not norm.running_mean.requires_grad


def test_dropout_draws_from_the_global_generator(bm):
    def run(seed):
        strategy = naive([phase(meta=True)], network(norm=nn.Dropout(0.5)))
        torch.manual_seed(seed)
        return weights(train(strategy, bm.train_stream[:1]))["head.weight"]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


# --------------------------------------------------------------------- precision
class Precision(nn.Module):
    """Notes whether autocast is on, and in what the features come."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((torch.is_autocast_enabled("cpu"), x.dtype, torch.is_grad_enabled()))
        return x


@pytest.mark.parametrize("meta", [False, True])
def test_bf16_reaches_every_forward_pass_in_either_order_of_the_plugins(meta, bm):
    runs = []
    for first in (True, False):
        spy, own = Precision(), phase(meta=meta)
        half = MixedPrecisionPlugin("bf16")
        strategy = naive([own, half] if first else [half, own], network(norm=spy))
        for experience in bm.train_stream:  # the second time everything is installed already
            spy.seen.clear()
            train(strategy, [experience])
            assert spy.seen == [(True, torch.bfloat16, True)] * 4 * (3 + 1)
        assert all(p.dtype == torch.float32 for p in strategy.model.parameters())
        assert all(loss.dtype == torch.float32 for loss in own.inner_losses)
        spy.seen.clear()
        strategy.eval(bm.test_stream)
        assert spy.seen and all(entry == (True, torch.bfloat16, False) for entry in spy.seen)
        runs.append(weights(strategy))
    same(*runs)
    full = weights(train(naive([phase(meta=meta)]), bm.train_stream))
    gap = max(float((runs[0][n] - full[n]).abs().max()) for n in full)
    assert 0 < gap < 0.1


def test_fp16_is_refused_before_any_work(bm):
    strategy = naive([phase(), MixedPrecisionPlugin("fp16")])
    before = weights(strategy)
    with pytest.raises(ValueError, match=r"precision fp16 .* bf16 is accepted"):
        train(strategy, bm.train_stream)
    same(weights(strategy), before)


# --------------------------------------------------------------- beside others
@pytest.mark.parametrize("meta", [False, True])
def test_evaluation_changes_nothing_and_sees_the_slow_weights(meta, bm):
    def run(**kwargs):
        metrics = EvaluationPlugin(accuracy_metrics(minibatch=True, stream=True), loss_metrics(epoch=True), loggers=[])
        strategy = naive([phase(meta=meta)], evaluator=metrics, **kwargs)
        for experience in bm.train_stream:
            strategy.train(experience, eval_streams=[bm.test_stream])
        return strategy

    plain, evaluated = run(), run(eval_every=1, peval_mode="iteration")
    same(weights(plain), weights(evaluated))
    results = evaluated.eval(bm.test_stream)
    model = copy.deepcopy(evaluated.model).eval()
    items = [item for e in bm.test_stream for item in e.dataset]
    right = model(torch.stack([x[0] for x in items])).argmax(1) == torch.tensor([x[1] for x in items])
    (accuracy,) = [v for k, v in results.items() if "Top1_Acc_Stream" in k]
    assert accuracy == pytest.approx(float(right.double().mean()))


def test_after_an_exception_the_dropped_weights_are_not_used(bm):
    """Meta-ASB, interrupted between the sequence and its update: evaluation and the next episode know nothing of it."""

    class Interruption(SupervisedPlugin):
        armed = True

        def before_forward(self, strategy, **kwargs):
            if self.armed:
                raise KeyboardInterrupt

    stop = Interruption()
    own = phase(5.0, meta=True, zap=False)
    strategy = naive([own, stop], lr=1e-3, evaluator=EvaluationPlugin(loss_metrics(stream=True), loggers=[]))
    with pytest.raises(KeyboardInterrupt):
        train(strategy, bm.train_stream[:1])
    assert own._fast is not None
    results = strategy.eval(bm.test_stream)
    items = [item for e in bm.test_stream for item in e.dataset]
    x, y = torch.stack([x[0] for x in items]), torch.tensor([x[1] for x in items])
    (loss,) = [v for k, v in results.items() if "Loss_Stream" in k]
    assert loss == pytest.approx(nn.functional.cross_entropy(network()(x), y).item(), rel=1e-5)
    stop.armed = False
    train(strategy, bm.train_stream[:1])
    fresh = naive([phase(5.0, meta=True, zap=False)], lr=1e-3)
    same(weights(train(fresh, bm.train_stream[:1])), weights(strategy))


def test_log_tags_over_training_iterations(bm):
    class Lines(BaseLogger):
        def __init__(self):
            super().__init__()
            self.lines = []

        def log_single_metric(self, name, value, x_plot):
            self.lines.append((name, x_plot, value))

    logger = Lines()
    strategy = naive([phase(cycles=2)], evaluator=EvaluationPlugin(loggers=[logger]), train_epochs=2)
    train(strategy, bm.train_stream)
    tags = [line for line in logger.lines if line[0].startswith("zap/")]
    assert [line[:2] for line in tags] == [
        (f"zap/inner-loss-{place}", step) for step in (4, 8, 12, 16) for place in ("first", "last")
    ]
    assert all(isinstance(value, float) and value > 0 for _, _, value in tags)
    assert all(first[2] > last[2] for first, last in zip(tags[::2], tags[1::2], strict=True))  # they were learnt

    silent = EvaluationPlugin(loggers=[Lines()])
    silent.active = False
    train(naive([phase()], evaluator=silent), bm.train_stream)
    assert not silent.last_metric_results and not silent.loggers[0].lines


def test_state_round_trip(bm):
    """In the middle of a run, with a seed that was drawn; the episodes' own numbers need no state."""
    runs = [naive([phase(seed=None)], optimizer=torch.optim.SGD) for _ in range(2)]
    torch.manual_seed(4)
    train(runs[0], bm.train_stream[:1])
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    vars(runs[1].clock).update(vars(runs[0].clock))
    old, new = (next(p for p in run.plugins if isinstance(p, SequentialPhasePlugin)) for run in runs)
    assert new.seed is None
    new.load_state_dict(old.state_dict())
    assert differing_state(to_plain(old.state_dict()), to_plain(new.state_dict())) is None
    for run in runs:
        train(run, bm.train_stream[1:])
    same(*map(weights, runs))


def test_checkpoints_do_not_grow_with_the_episodes(bm, tmp_path):
    """Inside a pre-training of 60 episodes: the same tensors at each place, and text that counts."""
    checkpoint = ExactCheckpointPlugin(tmp_path, every=10, keep=100)
    strategy = naive([phase(meta=True, episodes=60), checkpoint])
    checkpoint.resume(strategy)
    train(strategy, bm.train_stream[:1])
    sizes = {
        folder.name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in sorted(tmp_path.glob("step-*"))
    }
    inside = [size for name, size in sizes.items() if not name.endswith(("000000000", "-end"))]
    assert len(inside) == 5 and min(inside) > 10_000
    assert max(inside) - min(inside) < 200


@pytest.mark.parametrize(
    "workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}, {"persistent_workers": True}]
)
def test_workers_give_the_same_run(workers, bm):
    runs = [train(naive([phase()], train_epochs=2), bm.train_stream[:1], **kwargs) for kwargs in ({}, workers)]
    same(*map(weights, runs))


def test_ewc_pulls_in_the_outer_step(bm):
    """Its penalty is part of the outer loss; the sequence is plain."""
    runs = [train(naive([phase(meta=True), *more]), bm.train_stream) for more in ([], [EWCPlugin(1e4)])]
    drift = []
    for run in runs:
        start = weights(train(naive([phase(meta=True)]), bm.train_stream[:1]))
        drift.append(sum(float(((v - start[n]) ** 2).sum()) for n, v in weights(run).items() if "backbone" in n))
    assert drift[1] < drift[0]


# ----------------------------------------------------------------------- errors
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["replay", "rehearsal"])
def test_another_loader_is_refused(kind, first, bm):
    """On either side: a plugin before this one would lose its loader without a word."""
    other = ReplayPlugin(mem_size=6) if kind == "replay" else RehearsalPlugin(6)
    plugins = [phase(), other] if first else [other, phase()]
    with pytest.raises(ValueError, match=r"another plugin has .* episodes need one of their own"):
        train(naive(plugins, train_mb_size=4), bm.train_stream)


def test_a_head_per_task_is_refused(bm):
    model = MTSimpleMLP(input_size=16, hidden_size=4)
    with pytest.raises(ValueError, match="heads per task"):
        train(naive([phase(head_name="classifier")], model), bm.train_stream)


def test_classifiers_that_are_refused_before_the_first_step(bm):
    mlp_head = network(nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4)))
    frozen = network()
    frozen.head.weight.requires_grad_(False)
    computed = network()
    parametrizations.weight_norm(computed.head)
    cases = (
        (mlp_head, {}, "the classifier is a Sequential"),
        (network(nn.Linear(16, 1)), {}, r"class_ids \[1\]: the Linear has no row"),
        (frozen, {}, "is frozen"),
        (computed, {}, "computed from other parameters"),
        (network(), {"head_name": "nothing"}, "head_name 'nothing'"),
    )
    for model, options, message in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        strategy = naive([phase(**options)], model)
        with pytest.raises(ValueError, match=message):
            train(strategy, bm.train_stream)
        same(before, weights(strategy))
    # the control has no rows to redraw
    train(naive([phase(zap=False)], frozen), bm.train_stream[:1])


def test_nothing_to_learn_in_the_sequence(bm):
    model = network()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="inner is 'head' and holds no trainable parameter"):
        train(naive([phase(inner="head", zap=False)], model), bm.train_stream)


def test_more_images_to_remember_than_there_are(bm):
    with pytest.raises(ValueError, match="remember_size is 64; the data set has 12 images"):
        train(naive([phase(remember_size=64)]), bm.train_stream)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({field: value}, f"{field} is {value}")
            for field in ("episodes", "inner_steps", "inner_batch_size", "cycles", "remember_size")
            for value in (0, 1.5, True, None)
        ),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, r"seed is 1\.0"),
        ({"inner_lr": float("inf")}, "inner_lr is inf"),
        ({"inner_lr": float("nan")}, "inner_lr is nan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"inner": "body"}, "inner is 'body'"),
        ({"zap": "yes"}, "zap is 'yes'"),
        ({"init": "kaiming"}, "init is 'kaiming'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SequentialPhasePlugin(**{"inner_lr": 0.1, **SHORT, **settings})


def test_the_zap_is_always_asked_for():
    with pytest.raises(TypeError, match="zap"):
        SequentialPhasePlugin(0.1)
