"""ZappingPlugin in runs: when and which rows, every classifier, other plugins, relearning, logs, state, refusals."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.logging import BaseLogger
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.models import TaskwiseLinearHead, add_composed_lora
from avalanche_firn.plugins import (
    ExactCheckpointPlugin,
    FreshOptimizerPlugin,
    LinearProbePlugin,
    MixedPrecisionPlugin,
    RehearsalPlugin,
    SlowLearnerPlugin,
    ZappingPlugin,
    resample_rows_,
)
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state
from avalanche_firn.plugins.relearning import biased_batch
from avalanche_firn.plugins.schedules import cosine

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore::DeprecationWarning")

WIDTH = 5


class Net(nn.Module):
    """A backbone with BatchNorm and dropout, and a classifier."""

    def __init__(self, head=None, inputs=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Tanh())
        self.classifier = nn.Linear(WIDTH, 6) if head is None else head

    def forward(self, x):
        return self.classifier(self.backbone(x))


class Watch(SupervisedPlugin):
    """Weights when experiences, epochs and iterations begin, after the plugins before it, and at the end."""

    def __init__(self):
        super().__init__()
        self.opened, self.epochs, self.started, self.closed, self.modes = [], [], [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.opened.append(weights(strategy.model))

    def before_training_epoch(self, strategy, **kwargs):
        self.epochs.append(weights(strategy.model))

    def before_training_iteration(self, strategy, **kwargs):
        self.started.append(weights(strategy.model))
        self.modes.append(all(m.training for m in strategy.model.modules()))

    def after_training_exp(self, strategy, **kwargs):
        self.closed.append(weights(strategy.model))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(first, second, name="classifier.weight"):
    """Rows of a weight that differ."""
    return (first[name] != second[name]).any(1).nonzero().flatten().tolist()


def data(classes=6, per_class=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(classes * per_class, 3, generator=generator)
    return x, np.arange(classes).repeat(per_class)


@pytest.fixture
def three(stream_of):
    """Three experiences of two classes, four samples of each."""
    return stream_of(*data(), [2, 2, 2]).train_stream


def overlapping():
    """Experiences with classes 0 and 1, 1 and 2, 0 and 2."""
    x, y = data(3)
    parts = []
    for pair in ((0, 1), (1, 2), (0, 2)):
        rows = np.isin(y, pair)
        part = TensorDataset(x[rows], torch.tensor(y[rows]))
        part.targets = y[rows].tolist()
        parts.append(as_classification_dataset(part))
    return with_classes_timeline(benchmark_from_datasets(train=parts, test=parts)).train_stream


def naive(*plugins, head=None, model=None, epochs=2, batch=4, optimizer=None, seed=0, loggers=()):
    torch.manual_seed(seed)
    model = model or Net(head)
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    return Naive(
        model=model, optimizer=optimizer(model.parameters()), criterion=nn.CrossEntropyLoss(), train_mb_size=batch,
        train_epochs=epochs, eval_mb_size=8, plugins=list(plugins), evaluator=EvaluationPlugin(loggers=list(loggers)),
    )  # fmt: skip


def train(strategy, stream, **kwargs):
    for experience in stream:
        strategy.train(experience, eval_streams=[], **kwargs)
    return strategy


def places(plugin):
    return [(zap.experience, zap.epoch, zap.iteration) for zap in plugin.history]


def rows_of(plugin):
    return [zap.rows for zap in plugin.history]


# ----------------------------------------------------------------------- when
@settings(max_examples=25, deadline=None)
@given(
    schedule=st.sampled_from(["experience", "epoch", "iteration"]),
    every=st.integers(0, 3),
    start=st.integers(0, 3),
    length=st.one_of(st.none(), st.integers(0, 4)),
    skip_first=st.sampled_from([None, True, False]),
    skip_last=st.booleans(),
)
def test_schedules_equal_a_naive_count(stream_of, schedule, every, start, length, skip_first, skip_last):
    if schedule == "experience":
        skip_last = True
    stop = None if length is None else start + length
    plugin = ZappingPlugin(
        schedule=schedule, every=every, start=start, stop=stop, skip_first=skip_first, skip_last=skip_last
    )
    x, y = data(4, 2)
    train(naive(plugin, epochs=3, batch=2), stream_of(x, y, [2, 2]).train_stream)

    def due(n):
        if n == 0 and (skip_first if skip_first is not None else schedule != "experience"):
            return False
        steps = [] if every == 0 else list(range(start, 100 if stop is None else stop, every))
        return n in steps

    expected = []
    for exp in range(2):
        if schedule == "experience" and due(exp):
            expected.append((exp, 0, exp * 6))
        for epoch in range(3):
            if schedule == "epoch" and due(epoch):
                expected.append((exp, epoch, exp * 6 + epoch * 2))
            for i in range(epoch * 2, epoch * 2 + 2):
                if schedule == "iteration" and due(i):
                    expected.append((exp, epoch, exp * 6 + i))
        if not skip_last and due(3 if schedule == "epoch" else 6):
            expected.append((exp, 3, exp * 6 + 6))
    assert places(plugin) == expected
    assert rows_of(plugin) == [((0, 1), (2, 3))[exp] for exp, _, _ in expected]


def test_a_function_as_schedule(three):
    plugin = ZappingPlugin(schedule=lambda s: s.clock.train_exp_counter == 1, every=2, start=1)
    train(naive(plugin), three)
    assert places(plugin) == [(1, 0, 5), (1, 1, 7)]  # iterations 1 and 3 of the second experience


def test_a_zap_after_the_last_epoch_stays_untrained(three):
    watch = Watch()
    early = ZappingPlugin(schedule="epoch", seed=3)
    late = ZappingPlugin(schedule="epoch", seed=3, skip_last=False)
    plain = train(naive(early), three[:1])
    strategy = train(naive(late, watch), three[:1])
    assert places(early) == [(0, 1, 2)] and places(late) == [(0, 1, 2), (0, 2, 4)]
    assert changed(weights(plain.model), watch.closed[0]) == [0, 1]
    assert changed(watch.closed[0], weights(strategy.model)) == []


def test_class_exposure_zaps_a_class_when_it_comes(three):
    record, plugin = Watch(), ZappingPlugin(schedule="class_exposure")
    strategy = naive(plugin, record, batch=4)
    train(strategy, three[:1], shuffle=False)  # four of class 0, then four of class 1
    assert [(z.iteration, z.rows) for z in plugin.history] == [(0, (0,)), (1, (1,))]
    train(strategy, three[1:2], shuffle=False)
    assert rows_of(plugin)[2:] == [(2,), (3,)]


def test_class_exposure_counts_the_experiences_of_each_class():
    for options, expected in (
        ({}, [0, 1, 1, 2, 0, 2]),
        ({"every": 2}, [0, 1, 2]),
        ({"skip_first": True}, [1, 0, 2]),
        ({"start": 1, "stop": 2}, [1, 0, 2]),
        ({"every": 0}, []),
        ({"scope": [2]}, [2, 2]),
        ({"scope": "new"}, [0, 1, 2]),
        ({"scope": "all"}, [0, 1, 1, 2, 0, 2]),
    ):
        plugin = ZappingPlugin(schedule="class_exposure", **options)
        train(naive(plugin, batch=2), overlapping(), shuffle=False)
        assert [z.rows for z in plugin.history] == [(c,) for c in expected], options


def test_class_exposure_reads_targets_only_until_all_have_come(three):
    plugin, reads = ZappingPlugin(schedule="class_exposure"), []
    arriving = plugin._arriving
    plugin._arriving = lambda strategy: reads.append(strategy.clock.train_exp_iterations) or arriving(strategy)
    train(naive(plugin, epochs=3), three[:1], shuffle=False)
    assert reads == [0, 1]


def test_classes_that_arrive_together_are_one_zap(stream_of):
    plugin = ZappingPlugin(schedule="class_exposure")
    train(naive(plugin, batch=24), stream_of(*data(), [6]).train_stream)
    assert rows_of(plugin) == [(0, 1, 2, 3, 4, 5)]


# ----------------------------------------------------------------------- what
def test_scopes_of_experiences():
    for scope, expected in (
        ("experience", [(0, 1), (1, 2), (0, 2)]),
        ("new", [(0, 1), (2,)]),
        ("all", [(0, 1, 2, 3, 4, 5)] * 3),
        ([4, 0], [(4, 0)] * 3),
        (np.array([1]), [(1,)] * 3),
        (lambda s: {s.clock.train_exp_counter}, [(0,), (1,), (2,)]),
        (lambda s: [], []),
    ):
        plugin = ZappingPlugin(scope=scope)
        train(naive(plugin), overlapping())
        assert rows_of(plugin) == expected


def test_an_experience_that_comes_twice_is_new_once(three):
    plugin = ZappingPlugin(scope="new")
    train(naive(plugin), [three[0], three[0], three[1]])
    assert rows_of(plugin) == [(0, 1), (2, 3)] and not plugin.zapped_past


def test_only_scope_and_schedule_decide_which_rows_change(three):
    watch = Watch()
    strategy = naive(ZappingPlugin(seed=4), watch)
    before = weights(strategy.model)
    train(strategy, three)
    assert changed(before, watch.opened[0]) == [0, 1]
    assert changed(watch.closed[0], watch.opened[1]) == [2, 3]
    assert changed(watch.closed[1], watch.opened[2]) == [4, 5]
    for first, second in ((before, watch.opened[0]), (watch.closed[0], watch.opened[1])):
        assert all(torch.equal(first[n], second[n]) for n in first if n != "classifier.weight")
    copy, generator = before["classifier.weight"].clone(), torch.Generator().manual_seed(4)
    resample_rows_(copy, [0, 1], generator=generator)
    assert torch.equal(copy, watch.opened[0]["classifier.weight"])
    copy = watch.closed[0]["classifier.weight"].clone()
    assert torch.equal(
        resample_rows_(copy, [2, 3], generator=generator), watch.opened[1]["classifier.weight"]
    )  # the stream goes on


@pytest.mark.parametrize("options", [dict(init="default", bias="init"), dict(bias="zero", blend=0.3), dict(blend=0.6)])
def test_options_reach_the_draw(three, options):
    watch = Watch()
    strategy = naive(ZappingPlugin(seed=9, **options), watch)
    before = weights(strategy.model)
    train(strategy, three[:1])
    weight, bias = before["classifier.weight"].clone(), before["classifier.bias"].clone()
    resample_rows_(
        weight, [0, 1], init=options.get("init", "kaiming_normal"), bias=bias if "bias" in options else None,
        bias_mode=options.get("bias", "rule"), blend=options.get("blend", 1.0),
        generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    assert torch.equal(watch.opened[0]["classifier.weight"], weight)
    assert torch.equal(watch.opened[0]["classifier.bias"], bias)


@pytest.mark.parametrize(
    ("options", "count"), [({"n_rows": 4}, 4), ({"fraction": 0.4}, 2), ({"fraction": 0.01}, 1), ({"fraction": 1.0}, 6)]
)
@pytest.mark.parametrize("numpy", [True, False])
def test_random_rows(three, options, count, numpy):
    found = []
    for seed in (1, 1, 2):
        own = {"row_choice_seed": seed} if numpy else {"seed": seed}
        plugin = ZappingPlugin(scope="random", **options, **own)
        train(naive(plugin), three)
        assert all(len(set(rows)) == len(rows) == count and set(rows) <= set(range(6)) for rows in rows_of(plugin))
        found.append(rows_of(plugin))
    assert found[0] == found[1] != found[2]


def test_samples_of_another_scope(three):
    plugin = ZappingPlugin(n_rows=1, schedule="iteration", seed=1)
    train(naive(plugin, epochs=6), three[1:2])
    assert {len(rows) for rows in rows_of(plugin)} == {1} and {rows[0] for rows in rows_of(plugin)} == {2, 3}


# ------------------------------------------------------------------ no past
class Replayed(Watch):
    """Class ids in the batches."""

    def __init__(self):
        super().__init__()
        self.classes = []

    def before_training_iteration(self, strategy, **kwargs):
        self.classes.append(set(strategy.mb_y.tolist()))


@pytest.mark.parametrize("schedule", ["experience", "epoch", "iteration", "class_exposure"])
@pytest.mark.parametrize("memory", [lambda: ReplayPlugin(mem_size=4), lambda: RehearsalPlugin(4)])
@pytest.mark.parametrize("scope", ["experience", "new"])
def test_replay_never_zaps_the_past(three, schedule, memory, scope):
    plugin, watch = ZappingPlugin(scope=scope, schedule=schedule), Replayed()
    train(naive(plugin, memory(), watch), three)
    assert any(classes & {0, 1} for classes in watch.classes[-6:])  # old classes are in the batches
    assert plugin.history and all(set(z.rows) <= {2 * z.experience, 2 * z.experience + 1} for z in plugin.history)
    assert not plugin.zapped_past


def test_the_past_is_zapped_where_it_is_named_and_reported(three):
    for scope, past in (("all", True), ([0, 5], True), (lambda s: [0], True), ([5], False)):
        plugin = ZappingPlugin(scope=scope)
        strategy = naive(plugin, RehearsalPlugin(4))
        train(strategy, three[:1])
        assert not plugin.zapped_past  # nothing is old so far
        train(strategy, three[1:])
        assert plugin.zapped_past is past
    plugin = ZappingPlugin(scope="random", n_rows=6)
    assert train(naive(plugin), three) and plugin.zapped_past
    plugin = ZappingPlugin(scope=lambda s: [(0, 1, 4)[s.clock.train_exp_counter]])
    strategy = train(naive(plugin), three[:2])
    assert plugin.zapped_past and train(strategy, three[2:]) and plugin.zapped_past  # once is enough


# ---------------------------------------------------------------- classifiers
def test_a_growing_classifier_is_zapped_after_growth_and_trained(three):
    watch, plugin = Watch(), ZappingPlugin(seed=2)
    strategy = naive(plugin, watch, head=IncrementalClassifier(WIDTH, 2))
    train(strategy, three)
    name, generator = "classifier.classifier.weight", torch.Generator().manual_seed(2)
    for task, (opened, closed) in enumerate(zip(watch.opened, watch.closed, strict=True)):
        assert opened[name].shape == (2 * task + 2, WIDTH)
        fresh = torch.randn(2, WIDTH, generator=generator) * math.sqrt(2 / WIDTH)
        torch.testing.assert_close(opened[name][2 * task :], fresh)
        assert {2 * task, 2 * task + 1} <= set(changed(opened, closed, name))
        if task:
            assert torch.equal(opened[name][: 2 * task], watch.closed[task - 1][name])
    assert any(p is strategy.model.classifier.classifier.weight for p in strategy.optimizer.param_groups[0]["params"])


class TaskNet(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.backbone = Net().backbone
        self.classifier = MultiHeadClassifier(WIDTH, 2)

    def forward(self, x, task_labels):
        return self.classifier(self.backbone(x), task_labels)


@pytest.mark.parametrize("scope", ["experience", "new", "all", [1, 0]])
def test_rows_of_the_task_in_several_heads(scope):
    x, y = data(4)
    sets = TensorDataset(x, torch.tensor(y))
    sets.targets = y.tolist()
    stream = nc_benchmark(
        sets, sets, 2, task_labels=True, shuffle=False, class_ids_from_zero_in_each_exp=True
    ).train_stream
    watch, plugin = Watch(), ZappingPlugin(scope=scope, seed=2, schedule="experience")
    train(naive(plugin, watch, model=TaskNet()), stream)
    rows = [1, 0] if scope == [1, 0] else [0, 1]
    assert rows_of(plugin) == [tuple(rows)] * 2 and not plugin.zapped_past  # each task has its own class 0
    generator = torch.Generator().manual_seed(2)
    for task, opened in enumerate(watch.opened):
        fresh = torch.randn(2, WIDTH, generator=generator) * math.sqrt(2 / WIDTH)
        torch.testing.assert_close(opened[f"classifier.classifiers.{task}.classifier.weight"][rows], fresh)
    assert changed(watch.closed[0], watch.opened[1], "classifier.classifiers.0.classifier.weight") == []


def test_one_layer_per_task(three):
    watch, plugin = Watch(), ZappingPlugin(seed=5)
    train(naive(plugin, watch, head=TaskwiseLinearHead(WIDTH)), three)
    fresh = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)) * math.sqrt(2 / WIDTH)
    torch.testing.assert_close(watch.opened[0]["classifier.weights.0"], fresh)
    assert torch.equal(watch.closed[0]["classifier.weights.0"], watch.opened[1]["classifier.weights.0"])

    for scope in ("all", [0, 3]):
        strategy = naive(ZappingPlugin(scope=scope, start=1), head=TaskwiseLinearHead(WIDTH))
        with pytest.raises(ValueError, match=r"'classifier.weights.0' holds rows to zap and is frozen"):
            train(strategy, three[:2])

    watch = Watch()
    plugin = ZappingPlugin(scope=[3, 0], start=1, seed=5)
    train(naive(plugin, watch, head=TaskwiseLinearHead(WIDTH, freeze_old=False)), three[:2])
    block = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)) * math.sqrt(2 / WIDTH)
    torch.testing.assert_close(watch.opened[1]["classifier.weights.1"][1], block[0])  # class 3 comes first
    torch.testing.assert_close(watch.opened[1]["classifier.weights.0"][0], block[1])
    assert changed(watch.closed[0], watch.opened[1], "classifier.weights.0") == [0]


def test_a_classifier_by_name(three):
    head = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 6, bias=False))
    with pytest.raises(ValueError, match=r"the classifier 'classifier' is a Sequential; a linear layer, .*target="):
        train(naive(ZappingPlugin(), head=head), three)
    watch, plugin = Watch(), ZappingPlugin("classifier.2", bias="init")
    train(naive(plugin, watch, head=head), three)
    assert changed(watch.closed[0], watch.opened[1], "classifier.2.weight") == [2, 3]
    with pytest.raises(ValueError, match="head_name 'fc' is no module of Net"):
        train(naive(ZappingPlugin("fc")), three)
    with pytest.raises(ValueError, match="the classifier of Sequential was not found"):
        train(naive(ZappingPlugin(), model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6))), three)


def test_adapted_layers_have_no_rows(three):
    model = Net()
    add_composed_lora(model, ["backbone.0"], rank=2)
    for target in ("backbone.0", "backbone"):
        with pytest.raises(
            ValueError, match=rf"the classifier '{target}' is a (ComposedLoRALinear|Sequential); a linear"
        ):
            train(naive(ZappingPlugin(target), model=model), three)


def frozen_head():
    head = nn.Linear(WIDTH, 6)
    head.weight.requires_grad_(False)
    return head


def test_rows_that_could_not_be_relearned_are_not_lost(three):
    for head, options, message in (
        (frozen_head(), {}, "'classifier.weight' holds rows to zap and is frozen"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 6)), {}, "are computed from other parameters"),
        (nn.Linear(WIDTH, 2), {"scope": [0, 4]}, r"class_ids \[4\]: the Linear has no row"),
        (nn.Linear(WIDTH, 6), {"n_rows": 3}, "n_rows is 3 and scope 'experience' has 2 rows"),
        (nn.Linear(WIDTH, 6), {"scope": lambda s: [1, 1]}, r"scope\(strategy\) is \[1, 1\]; different whole numbers"),
    ):
        plugin = ZappingPlugin(**options)
        strategy = naive(plugin, head=head)
        before = weights(strategy.model)
        with pytest.raises(ValueError, match=message):
            train(strategy, three)
        assert strategy.clock.train_iterations == 0 and not plugin.history
        assert all(torch.equal(before[n], v) for n, v in weights(strategy.model).items())


def test_a_frozen_bias_counts_only_if_it_is_redrawn(three):
    head = nn.Linear(WIDTH, 6)
    head.bias.requires_grad_(False)
    train(naive(ZappingPlugin(), head=head), three)
    with pytest.raises(ValueError, match=r"'classifier.bias' holds rows to zap and is frozen"):
        train(naive(ZappingPlugin(bias="zero"), head=head), three)


def test_a_classifier_that_grew_in_an_evaluation(three):
    class Grow(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            strategy.model.classifier.adaptation(SimpleNamespace(classes_in_this_experience=[5]))

    strategy = naive(ZappingPlugin(schedule="epoch"), Grow(), head=IncrementalClassifier(WIDTH, 2, masking=False))
    with pytest.raises(ValueError, match="is not in the optimizer, so they could never be relearned"):
        train(strategy, three)


def test_benchmarks_without_a_timeline_of_classes():
    x, y = data(2)
    part = TensorDataset(x, torch.tensor(y))
    part.targets = y.tolist()
    stream = benchmark_from_datasets(train=[as_classification_dataset(part)]).train_stream
    assert not hasattr(stream[0], "classes_in_this_experience")
    plugin = ZappingPlugin()
    train(naive(plugin), stream)
    assert rows_of(plugin) == [(0, 1)]


# -------------------------------------------------------------- other plugins
class FixedOrder(SupervisedPlugin):
    """The samples of each batch, by their values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_training_iteration(self, strategy, **kwargs):
        self.seen.append(strategy.mb_x.clone())


@pytest.mark.parametrize("schedule", ["experience", "epoch", "iteration", "class_exposure"])
def test_a_private_seed_leaves_the_data_order_and_dropout_alone(three, schedule):
    orders, states = [], []
    for every, options in ((1, {}), (0, {}), (1, {"relearn_steps": 2}), (1, {"row_choice_seed": 1})):
        if options.get("row_choice_seed") and schedule != "class_exposure":
            options = options | {"n_rows": 1}
        record = FixedOrder()
        plugin = ZappingPlugin(schedule=schedule, every=every, skip_first=False, **options)
        train(naive(plugin, record, epochs=3), three)
        assert bool(plugin.history) is bool(every)
        orders.append(torch.cat(record.seen))
        states.append(torch.get_rng_state())
    assert all(torch.equal(order, orders[0]) for order in orders)
    assert all(torch.equal(state, states[0]) for state in states)


class Jitter:
    """Draws from all global generators."""

    def __call__(self, x):
        return x + 0.1 * torch.randn(3) + 0.1 * np.random.rand() + 0.1 * random.random()


def test_augmentation_while_relearning_leaves_the_global_generators_alone():
    x, y = data(2)
    part = TensorDataset(x, torch.tensor(y))
    part.targets = y.tolist()
    part = as_classification_dataset(part, transform_groups={"train": (Jitter(), None), "eval": (None, None)})
    stream = with_classes_timeline(benchmark_from_datasets(train=[part], test=[part])).train_stream
    states = []
    for steps in (0, 3):
        random.seed(0)
        np.random.seed(0)
        train(naive(ZappingPlugin(relearn_steps=steps)), stream)
        states.append(to_plain(capture_random_state()))
    assert differing_state(*states) is None


def test_the_global_generator_on_request(three):
    orders = []
    for every in (1, 0):
        record = FixedOrder()
        train(naive(ZappingPlugin(schedule="epoch", every=every, seed=None), record, epochs=3), three)
        orders.append(torch.cat(record.seen))
    assert not torch.equal(*orders)


@pytest.mark.parametrize("fresh", [FreshOptimizerPlugin, SlowLearnerPlugin])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("schedule", ["experience", "epoch"])
@pytest.mark.parametrize("steps", [0, 2])
def test_beside_a_plugin_that_rebuilds_the_optimizer(three, fresh, first, schedule, steps):
    """On either side the same run: the optimizer that relearns is the rebuilt one."""
    plugin = ZappingPlugin(schedule=schedule, relearn_steps=steps, optimizer_state="rows_seeded", bias="zero")
    other = fresh(scheduler_factory=cosine(2))
    watch = Watch()
    strategy = naive(*((plugin, other) if first else (other, plugin)), watch, optimizer=torch.optim.Adam)
    train(strategy, three)
    assert rows_of(plugin) == [(0, 1), (2, 3), (4, 5)]
    reference = ZappingPlugin(schedule=schedule, relearn_steps=steps, optimizer_state="rows_seeded", bias="zero")
    again = train(naive(fresh(scheduler_factory=cosine(2)), reference, optimizer=torch.optim.Adam), three)
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in strategy.model.state_dict().items())


def test_the_place_before_or_after_a_linear_probe(three):
    """Before it the solution stands when fine-tuning begins; after it the zap destroys it."""
    heads = {}
    for name, order in (
        ("probe", ["probe"]), ("zap first", ["zap", "probe"]), ("probe first", ["probe", "zap"]),
    ):  # fmt: skip
        made = {"zap": ZappingPlugin(seed=1), "probe": LinearProbePlugin(lp_first=True, solver="ridge", l2=0.1)}
        watch = Watch()
        train(naive(*(made[n] for n in order), watch), three[:1])
        heads[name] = watch.epochs[0]["classifier.weight"]
    assert torch.equal(heads["probe"][:2], heads["zap first"][:2])
    assert not bool(torch.isclose(heads["probe"][:2], heads["probe first"][:2]).any())


def test_optimizer_rows_are_treated_at_the_zap(three):
    seen = {}

    class After(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 1:
                state = strategy.optimizer.state
                for key, p in (("weight", strategy.model.classifier.weight), ("bias", strategy.model.classifier.bias)):
                    seen[key] = {k: v.clone() for k, v in state.get(p, {}).items()}

    for mode in ("keep", "drop", "rows_seeded"):
        plugin = ZappingPlugin(schedule="epoch", optimizer_state=mode, bias="zero")
        train(naive(plugin, After(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)), three[:1])
        for part in ("weight", "bias"):
            if mode == "drop":
                assert seen[part] == {}
                continue
            first, second = seen[part]["exp_avg"], seen[part]["exp_avg_sq"]
            assert bool(first[2:].any()) and bool(first[:2].any()) is (mode == "keep")
            average = second[2:].mean(0).expand_as(second[:2])
            assert torch.equal(second[:2], average) is (mode == "rows_seeded")
    plugin = ZappingPlugin(schedule="epoch", optimizer_state="drop")
    train(naive(plugin, After(), optimizer=torch.optim.Adam), three[:1])
    assert seen["weight"] == {} and seen["bias"]  # a bias that is kept keeps its state


def test_an_optimizer_without_rows_is_refused_before_training(three):
    strategy = naive(ZappingPlugin(schedule="epoch", optimizer_state="rows"), optimizer=torch.optim.Rprop)
    with pytest.raises(ValueError, match=r"with Rprop .*mode 'drop' is accepted"):
        train(strategy, three)
    assert strategy.clock.train_iterations == 0


# ----------------------------------------------------------------- relearning
@settings(max_examples=60, deadline=None)
@given(
    inside=st.integers(1, 9), outside=st.integers(0, 9), size=st.integers(1, 12),
    fraction=st.floats(0.01, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_batches_with_a_share_of_the_zapped_classes(inside, outside, size, fraction, seed):
    first, second = torch.arange(inside) * 2, torch.arange(outside) * 2 + 1
    generator = torch.Generator().manual_seed(seed)
    batch = biased_batch(first, second, size=size, fraction=fraction, generator=generator)
    assert len(batch) == size and set(batch) <= {*first.tolist(), *second.tolist()}
    zapped = [i for i in batch if i % 2 == 0]
    share = size if not outside else max(1, math.floor(size * fraction + 0.5))
    assert len(zapped) == share
    if share <= inside:
        assert len(set(zapped)) == share
    if size - share <= outside:
        assert len({i for i in batch if i % 2}) == size - share


@pytest.mark.parametrize("schedule", ["experience", "epoch", "iteration", "class_exposure"])
def test_relearning_moves_the_classifier_alone(three, schedule):
    watch, plugin = Watch(), ZappingPlugin(schedule=schedule, relearn_steps=3, skip_first=False, stop=1, seed=1)
    strategy = naive(plugin, watch)
    before = weights(strategy.model)
    train(strategy, three[:1])
    after = watch.started[0] if schedule in ("iteration", "class_exposure") else watch.epochs[0]
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert changed(before, after) == [0, 1, 2, 3, 4, 5]  # softmax moves them all
    assert all(watch.modes) and all(p.requires_grad for p in strategy.model.parameters())
    assert strategy.clock.train_iterations == 4


def test_relearning_equals_the_steps_written_out(three):
    watch = Watch()
    options = dict(seed=6, relearn_steps=4, relearn_fraction=0.75, scope=[1])
    strategy = naive(ZappingPlugin(**options), watch, optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9))
    torch.manual_seed(0)
    model = Net()
    head = model.classifier
    resample_rows_(head.weight, [1], generator=torch.Generator().manual_seed(6))
    train(strategy, three[:1])
    batches = ZappingPlugin(**options)._streams.batches
    torch.randint(2**62, (1,), generator=batches)  # for augmentation and dropout
    x, y = (torch.stack([torch.as_tensor(item[k]) for item in three[0].dataset]) for k in (0, 1))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    model.eval()
    for _ in range(4):
        ones, zeros = (y == 1).nonzero().flatten(), (y == 0).nonzero().flatten()
        drawn = [ones[torch.randperm(4, generator=batches)[:3]], zeros[torch.randperm(4, generator=batches)[:1]]]
        rows = torch.cat(drawn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(model.backbone(x[rows]).detach()), y[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(watch.epochs[0]["classifier.weight"], head.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(watch.epochs[0]["classifier.bias"], head.bias.detach(), rtol=0, atol=1e-6)


def test_relearning_of_chosen_parameters(three):
    for chosen in (["backbone.0.*"], lambda name, p: name.startswith("backbone.0")):
        watch = Watch()
        strategy = naive(ZappingPlugin(relearn_steps=2, relearn_parameters=chosen, every=1), watch)
        train(strategy, three[:1])
        moved = {n for n in watch.opened[0] if not torch.equal(watch.opened[0][n], watch.epochs[0][n])}
        assert moved == {"backbone.0.weight", "backbone.0.bias"}


def test_relearning_refuses_what_has_no_sense(three):
    strategy = naive(ZappingPlugin(scope=[0], start=1, relearn_steps=1))
    with pytest.raises(ValueError, match=r"relearn_steps is 1 and the experience has no sample of .* \[0\]"):
        train(strategy, three[:2])
    strategy = naive(ZappingPlugin(relearn_steps=1, relearn_parameters=["encoder.*"]))
    with pytest.raises(ValueError, match="relearn_parameters chooses no trainable parameter"):
        train(strategy, three)
    assert all(p.requires_grad for p in strategy.model.parameters())


def test_relearning_in_mixed_precision(three):
    strategy = naive(MixedPrecisionPlugin("bf16"), ZappingPlugin(schedule="epoch", relearn_steps=2))
    train(strategy, three)
    assert all(bool(v.isfinite().all()) for v in strategy.model.state_dict().values())
    assert strategy.clock.train_iterations == 12


# -------------------------------------------------------------- short cut, log
def test_pretraining_settings():
    plain = ZappingPlugin.pretraining()
    assert (plain.scope, plain.schedule, plain.skip_first, plain.init) == ("all", "epoch", True, "kaiming_normal")
    part = ZappingPlugin.pretraining(every=3, fraction=0.1, bias="zero")
    assert (part.scope, part.fraction, part.every, part.bias) == ("random", 0.1, 3, "zero")
    released = ZappingPlugin.pretraining(reference=True, seed=4)
    assert (released.scope, released.init, released._streams.values) == ("random", "kaiming_normal_joint", None)
    with pytest.raises(ValueError, match=r"fraction is 1.5; a share above 0, to 1"):
        ZappingPlugin.pretraining(fraction=1.5)


def test_pretraining_zaps_the_whole_head_between_epochs(three):
    for options in ({}, {"reference": True}):
        watch, plugin = Watch(), ZappingPlugin.pretraining(every=2, **options)
        train(naive(plugin, watch, epochs=5), three[:1])
        assert [z.epoch for z in plugin.history] == [2, 4]
        assert all(sorted(rows) == list(range(6)) for rows in rows_of(plugin))


class Log(BaseLogger):
    def __init__(self):
        super().__init__()
        self.values = []

    def log_single_metric(self, name, value, x_plot):
        self.values.append((name, value, x_plot))


@pytest.mark.parametrize("log", [True, False])
def test_log(three, log):
    logger = Log()
    plugin = ZappingPlugin(schedule="epoch", log=log, scope="all")
    train(naive(plugin, loggers=[logger], epochs=3), three[:2])
    expected = [("zap/rows", 6, step) for step in (2, 4, 8, 10)]
    assert [v for v in logger.values if v[0].startswith("zap")] == (expected if log else [])


# ----------------------------------------------------------------------- state
VARIANTS = [
    dict(schedule="experience"),
    dict(schedule="epoch", scope="new", bias="init", relearn_steps=2),
    dict(schedule="iteration", every=3, scope="all", optimizer_state="rows_seeded"),
    dict(schedule="class_exposure", scope="all", relearn_steps=1),
    dict(schedule="epoch", scope="random", fraction=0.5, row_choice_seed=8),
    dict(schedule="epoch", scope="random", n_rows=2, seed=None, skip_last=False),
]


class Cut(SupervisedPlugin):
    """Leaves the run after so many iterations."""

    stateless = True

    def __init__(self, limit=None):
        super().__init__()
        self.limit = limit

    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.limit:
            raise InterruptedError


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("options", VARIANTS)
def test_a_restored_plugin_goes_on_between_experiences(three, options):
    whole = ZappingPlugin(**options)
    expected = train(naive(whole, optimizer=adam, epochs=3), three)
    first = ZappingPlugin(**options)
    strategy = train(naive(first, optimizer=adam, epochs=3), three[:2])
    saved = to_plain(first.state_dict())
    second = ZappingPlugin(**options)
    strategy.plugins[strategy.plugins.index(first)] = second
    state = torch.get_rng_state()
    second.load_state_dict(from_plain(saved))
    assert differing_state(saved, to_plain(second.state_dict())) is None
    assert torch.equal(torch.get_rng_state(), state)
    train(strategy, three[2:])
    assert second.history == whole.history and second.zapped_past == whole.zapped_past
    assert all(torch.equal(v, expected.model.state_dict()[n]) for n, v in strategy.model.state_dict().items())
    assert differing_state(to_plain(whole.state_dict()), to_plain(second.state_dict())) is None


@pytest.mark.parametrize("options", VARIANTS)
def test_exact_resume_inside_a_schedule(three, tmp_path, options):
    def run(folder, limit):
        checkpoint, plugin = ExactCheckpointPlugin(folder, every=2), ZappingPlugin(**options)
        strategy = naive(plugin, Cut(limit), checkpoint, optimizer=adam, epochs=3, batch=3)
        start = checkpoint.resume(strategy)
        try:
            for experience in three[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        finally:
            checkpoint.close()
        return strategy, plugin

    expected, whole = run(tmp_path / "whole", None)
    assert whole.history
    for limit in (1, 13, 16, None):  # nine iterations an experience
        if limit is None:
            strategy, plugin = run(tmp_path / "cut", None)
        else:
            with pytest.raises(InterruptedError):
                run(tmp_path / "cut", limit)
    assert plugin.history == whole.history
    assert all(torch.equal(v, expected.model.state_dict()[n]) for n, v in strategy.model.state_dict().items())
    assert differing_state(to_plain(whole.state_dict()), to_plain(plugin.state_dict())) is None


def test_classes_that_are_still_to_come_are_part_of_the_state(three):
    plugin = ZappingPlugin(schedule="class_exposure", scope="all")
    with pytest.raises(InterruptedError):
        train(naive(plugin, Cut(1)), three, shuffle=False)  # two batches of class 0 and 1 an epoch
    state = plugin.state_dict()
    assert state["awaited"] == [2, 3, 4, 5] and state["exposures"] == [[0, 0, 1], [0, 1, 1]]
    other = ZappingPlugin(schedule="class_exposure", scope="all")
    other.load_state_dict(state)
    strategy = SimpleNamespace(
        mb_y=torch.tensor([0, 4, 1]), experience=three[0], model=Net(), clock=SimpleNamespace(train_exp_iterations=1)
    )
    assert other._arriving(strategy) == [4] and other.state_dict()["awaited"] == [2, 3, 5]


def test_nothing_is_zapped_while_a_checkpoint_opens_an_experience_again(three):
    class Reopening(SupervisedPlugin):
        reopening = True

    for schedule in ("experience", "epoch"):
        plugin = ZappingPlugin(schedule=schedule, relearn_steps=1)
        state = to_plain(plugin.state_dict()["streams"])
        train(naive(plugin, Reopening()), three[:2])
        assert not plugin.history and differing_state(to_plain(plugin.state_dict()["streams"]), state) is None


def test_a_state_of_other_streams_is_refused():
    for field, one, other in (
        ("seed", ZappingPlugin(), ZappingPlugin(seed=None)),
        ("row_choice_seed", ZappingPlugin(n_rows=1, row_choice_seed=1), ZappingPlugin(n_rows=1)),
    ):
        for source, goal in ((one, other), (other, one)):
            with pytest.raises(ValueError, match=f"{field} is None in one of"):
                goal.load_state_dict(source.state_dict())


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": ""}, "target is ''"),
        ({"scope": "old"}, "scope is 'old'; one of"),
        ({"scope": []}, "scope is empty"),
        ({"scope": [1, 1]}, r"scope is \[1, 1\]; different whole numbers"),
        ({"scope": [-1]}, r"scope is \[-1\]"),
        ({"scope": [0.5]}, r"scope is \[0.5\]"),
        ({"scope": 3}, "scope is 3; class ids"),
        ({"scope": "random"}, "scope is 'random' without n_rows and fraction"),
        ({"schedule": "batch"}, "schedule is 'batch'; one of"),
        ({"every": -1}, "every is -1; a whole number of 0 and above"),
        ({"every": 1.5}, "every is 1.5"),
        ({"every": None}, "every is None"),
        ({"start": -2}, "start is -2"),
        ({"stop": -1}, "stop is -1"),
        ({"skip_last": False}, "skip_last is False with schedule 'experience'"),
        ({"n_rows": 0}, "n_rows is 0; a whole number of 1"),
        ({"fraction": 0.0}, r"fraction is 0.0; a share above 0, to 1"),
        ({"fraction": math.nan}, "fraction is nan"),
        ({"n_rows": 1, "fraction": 0.5}, "n_rows is 1 and fraction is 0.5; one of them"),
        ({"schedule": "class_exposure", "n_rows": 1}, "'class_exposure' with n_rows or fraction"),
        ({"init": "xavier"}, "init is 'xavier'"),
        ({"bias": "rule"}, "bias is 'rule'; one of"),
        ({"bias": len}, "bias is <built-in function len>"),
        ({"optimizer_state": "reset"}, "optimizer_state is 'reset'"),
        ({"blend": -0.1}, "blend is -0.1"),
        ({"relearn_steps": -1}, "relearn_steps is -1"),
        ({"relearn_fraction": 0}, "relearn_fraction is 0"),
        ({"relearn_fraction": None}, "relearn_fraction is None"),
        ({"relearn_parameters": "head"}, "relearn_parameters is 'head'"),
        ({"relearn_parameters": []}, r"relearn_parameters is \[\]"),
        ({"seed": -1}, "seed is -1"),
        ({"row_choice_seed": True}, "row_choice_seed is True"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZappingPlugin(**arguments)
