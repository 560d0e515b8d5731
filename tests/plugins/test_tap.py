"""TAP through the alignment plugin: aligned heads stay, eagerly, whatever is evaluated; state; refused settings."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.models.parts import extract_features, with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin, logit_normalized_cross_entropy
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians, cluster_batches
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.random_state import derived_seed

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import assert_same, crash, play, slca

SIZES = (2, 1, 3)


class Seeded(SupervisedPlugin):
    """The same draws in each task and epoch, whatever was evaluated before; keeps the heads a task starts with."""

    def __init__(self):
        super().__init__()
        self.starts = []

    def before_train_dataset_adaptation(self, strategy, **kwargs):
        torch.manual_seed(strategy.clock.train_exp_counter)

    def before_training_epoch(self, strategy, **kwargs):
        torch.manual_seed(100 * strategy.clock.train_exp_counter + strategy.clock.train_exp_epochs)

    def before_training_exp(self, strategy, **kwargs):
        self.starts.append(strategy.model.head.weight_matrix())


def tap(**overrides):
    settings = dict(epochs=4, lr=0.05, clusters=3, samples_per_class=16, seed=3) | overrides
    return ClassifierAlignmentPlugin.tap(**settings)


def naive(alignment, **settings):
    torch.manual_seed(5)
    model = with_taskwise_head(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), feature_size=8)
    settings = dict(evaluator=None, train_epochs=2) | settings
    return Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.2), criterion=LocalCrossEntropy(),
        train_mb_size=8, eval_mb_size=8, plugins=[Seeded(), alignment], **settings,
    )  # fmt: skip


def seeded_of(strategy):
    return next(p for p in strategy.plugins if isinstance(p, Seeded))


@pytest.fixture(scope="module")
def benchmark(stream_of):
    y = torch.arange(sum(SIZES)).repeat_interleave(8)
    x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0)) + torch.eye(6)[y]
    return stream_of(x, y, SIZES)


def train(strategy, benchmark, first=0, last=3):
    for experience in benchmark.train_stream[first:last]:
        strategy.train(experience, eval_streams=[])
    return strategy


def same(left, right):
    left, right = left.model.state_dict(), right.model.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_defaults_are_those_of_the_released_code():
    plugin = ClassifierAlignmentPlugin.tap()
    assert (plugin.epochs, plugin.lr, plugin.momentum, plugin.weight_decay) == (50, 0.005, 0.9, 0)
    assert plugin.temperature is plugin.scaling is None and plugin.samples_per_class == 640
    assert isinstance(plugin.gaussians, ClusterGaussians)
    assert (plugin.gaussians.clusters, plugin.gaussians.jitter) == (10, 1e-4)
    assert not plugin.restore and not plugin.lazy and plugin.batch_source is None
    changed = ClassifierAlignmentPlugin.tap(epochs=3, restore=True, seed=7)
    assert (changed.epochs, changed.lr, changed.gaussians.seed) == (3, 0.005, 7) and changed.lazy
    plain = ClassifierAlignmentPlugin()
    assert plain.lazy and plain.restore and plain.statistics == "gaussian"


def test_aligned_heads_stay_and_the_first_task_is_not_aligned(benchmark):
    alignment = tap()
    strategy = naive(alignment)
    head, first = strategy.model.head, None
    for t, experience in enumerate(benchmark.train_stream):
        strategy.train(experience, eval_streams=[])
        assert alignment.alignments == t  # eager, none after the first task
        before = head.weight_matrix()
        strategy.eval(benchmark.test_stream)
        assert all(torch.equal(a, b) for a, b in zip(before, head.weight_matrix(), strict=True))
        if first is not None:  # the task started with the aligned heads of the one before
            start = seeded_of(strategy).starts[-1]
            rows = len(first[1])
            assert torch.equal(start[0][:rows], first[0]) and torch.equal(start[1][:rows], first[1])
            assert not torch.equal(before[0][:rows], first[0])  # and alignment moved them on
        first = before
    assert not any("snapshot" in name for name in strategy.model.state_dict())
    assert all(torch.isfinite(value).all() for value in strategy.model.state_dict().values())


def test_old_rows_do_not_change_in_training_and_alignment_starts_from_them(benchmark):
    """Alignment switched off before task 2 leaves what task 1 aligned, to the bit."""
    alignment = tap()
    strategy = train(naive(alignment), benchmark, last=2)
    aligned = strategy.model.head.weight_matrix()
    alignment.epochs = 0
    train(strategy, benchmark, 2)
    weight, bias = strategy.model.head.weight_matrix()
    assert torch.equal(weight[:3], aligned[0]) and torch.equal(bias[:3], aligned[1])


class Watched(ClassifierAlignmentPlugin):
    """Keeps the heads before and after each alignment."""

    def align(self, strategy):
        before = strategy.model.head.weight_matrix()
        super().align(strategy)
        self.seen = (before, strategy.model.head.weight_matrix())


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_equals_alignment_by_hand_with_as_many_batches_as_earlier_classes(benchmark, temperature):
    """Autograd and torch's SGD with its cosine schedule, statistics of the backbone as it is after the task."""
    settings = dict(epochs=4, lr=0.05, samples_per_class=16, seed=3, clusters=3)
    alignment = Watched.tap(**settings, temperature=temperature)
    strategy, store = naive(alignment), ClusterGaussians(3, seed=3)
    for t, experience in enumerate(benchmark.train_stream):
        strategy.train(experience, eval_streams=[])
        features, targets = extract_features(strategy.model, experience.dataset.eval())
        for class_id in sorted(set(targets.tolist())):
            store.add(class_id, features[targets == class_id])
        if t == 0:
            continue
        earlier, task = sum(SIZES[:t]), strategy.model.head.class_task
        batches = cluster_batches(
            store, range(earlier + SIZES[t]), 16, earlier, generator=torch.Generator().manual_seed(derived_seed(3, t))
        )
        weight, bias = (value.requires_grad_() for value in alignment.seen[0])
        optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for epoch in range(4):
            steps = 0
            for rows, columns in batches(epoch):
                optimizer.zero_grad()
                logits = nn.functional.linear(rows.clone(), weight, bias)  # the buffer of rows is overwritten
                logit_normalized_cross_entropy(logits, columns, task, temperature).backward()
                optimizer.step()
                steps += 1
            assert steps == earlier
            schedule.step()
        for own, other in zip(alignment.seen[1], (weight, bias), strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=0, atol=2e-6)
    assert alignment.gaussians.class_ids == store.class_ids
    for own, other in zip(alignment.gaussians.moments(range(6))[:2], store.moments(range(6))[:2], strict=True):
        assert torch.equal(own, other)


def test_evaluations_do_not_matter(benchmark):
    """Never, at the end of a task, after each epoch; the last evaluation inside a task sees the aligned heads."""
    plain = train(naive(tap()), benchmark)
    for eval_every in (0, 1):
        evaluator = EvaluationPlugin(
            accuracy_metrics(stream=True), loggers=[SimpleNamespace(log_metrics=lambda m: None)]
        )
        alignment = tap()
        strategy = naive(alignment, evaluator=evaluator, eval_every=eval_every)
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[benchmark.test_stream])
            logged = evaluator.get_last_metrics()
            assert strategy.eval(benchmark.test_stream) == logged
        assert alignment.alignments == 2
        same(plain, strategy)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
def test_state_round_trip_between_tasks(benchmark, tasks, evaluate):
    whole, resumed = naive(tap()), naive(tap())
    train(whole, benchmark, last=tasks)
    if evaluate:
        whole.eval(benchmark.test_stream)
    state = whole.plugins[1].state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist())  # nothing but tensors and plain values
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.plugins[1].load_state_dict(state)
    resumed.clock.train_exp_counter = tasks
    same(whole, resumed)
    for one in (whole, resumed):
        train(one, benchmark, tasks)
        one.eval(benchmark.test_stream)
    same(whole, resumed)
    states = [one.plugins[1].state_dict()["gaussians"] for one in (whole, resumed)]
    assert torch.equal(*(state.pop("rows") for state in states)) and states[0] == states[1]


def digits(plugins, loggers=()):
    return slca(plugins, loggers, alignment=tap(), eval_every=1)


@pytest.mark.filterwarnings("ignore")
def test_exact_resume_from_a_checkpoint(tmp_path):
    """Stopped in the second task, after the alignment that ends it, in an evaluation after it, and in the third."""
    reference = play(digits, tmp_path / "whole", every=None)
    places = (("before_backward", 14), ("after_training_epoch", 4), ("before_eval", 7), ("before_backward", 26))
    for n, (hook, count) in enumerate(places):
        crash(digits, tmp_path / str(n), hook, count)
        assert_same(play(digits, tmp_path / str(n), seed=99), reference)


def test_state_of_other_statistics_is_refused(benchmark):
    single, clusters = ClassifierAlignmentPlugin(), tap()
    for plugin, other, kinds in ((single, clusters, "'clusters', here it is 'gaussian'"),
                                 (clusters, single, "'gaussian', here it is 'clusters'")):  # fmt: skip
        with pytest.raises(ValueError, match=f"statistics: the state was made with {kinds}"):
            plugin.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="clusters: the state was made with 3, here it is 4"):
        tap(clusters=4).load_state_dict(clusters.state_dict())
    old = single.state_dict()
    del old["statistics"]  # of the version before there were two
    single.load_state_dict(old)


def test_clusters_with_raw_heads_that_come_back(benchmark):
    """The options are independent: ``restore=True`` is lazy or eager with one result, and leaves no trace."""
    raw = train(naive(tap(epochs=0)), benchmark)
    heads = []
    for lazy in (None, True, False):
        alignment = tap(restore=True, lazy=lazy)
        strategy = train(naive(alignment), benchmark)
        assert alignment.alignments == (2 if lazy is False else 0)
        strategy.eval(benchmark.test_stream)
        heads.append(strategy.model.head.weight_matrix()[0])
        assert alignment.lazy is (lazy is not False)
        strategy.model.head.restore()
        assert torch.equal(strategy.model.head.weight_matrix()[0], raw.model.head.weight_matrix()[0])
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_one_gaussian_per_class_with_heads_that_stay(benchmark):
    alignment = ClassifierAlignmentPlugin(epochs=2, samples_per_class=16, scaling=None, restore=False)
    strategy = train(naive(alignment), benchmark, last=2)
    aligned = strategy.model.head.weight_matrix()[0]
    assert alignment.alignments == 1 and not alignment.lazy
    train(strategy, benchmark, 2)
    assert torch.equal(seeded_of(strategy).starts[-1][0][:3], aligned)


def test_batches_may_be_given(benchmark):
    asked = []

    def source(task, epoch):
        asked.append((task, epoch))
        generator = torch.Generator().manual_seed(epoch)
        yield torch.randn(5, 8, generator=generator), torch.arange(5) % sum(SIZES[: task + 1])

    train(naive(tap(epochs=2, batch_source=source)), benchmark)
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_task_that_stops_early_and_a_class_with_one_sample(stream_of):
    class Stop(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            strategy.stop_training()

    y = torch.tensor([0] * 8 + [1] * 8 + [2] + [3] * 8)
    x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0))
    alignment = tap()
    strategy = naive(alignment)
    strategy.plugins.append(Stop())
    train(strategy, stream_of(x, y, (2, 1, 1)))
    assert alignment.alignments == 2 and alignment.gaussians.moments([2])[2] == [1]
    assert all(torch.isfinite(value).all() for value in strategy.model.state_dict().values())


def test_refused_settings():
    for settings, message in (
        ({"statistics": "clusters"}, "scaling is 'mean' and statistics is 'clusters'"),
        ({"statistics": "clusters", "scaling": "feature"}, "scaling is 'feature' and statistics is 'clusters'"),
        ({"statistics": "clusters", "scaling": None, "relative_jitter": True}, "relative_jitter is True"),
        ({"statistics": "clusters", "scaling": None, "clusters": 0}, "clusters is 0"),
        ({"statistics": "kmeans"}, "statistics is 'kmeans'; 'gaussian' or 'clusters'"),
        ({"restore": False, "lazy": True}, "lazy is True and restore is False"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassifierAlignmentPlugin(**settings)
    with pytest.raises(ValueError, match="lazy is True and restore is False"):
        ClassifierAlignmentPlugin.tap(lazy=True)
    with pytest.raises(TypeError, match="batch"):
        ClassifierAlignmentPlugin.tap(batch=3)
