"""The fast path changes nothing but the time: weights, metrics and random numbers stay the same to the bit."""

import copy
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.models import MultiHeadClassifier
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import AGEM, ER_ACE, JointTraining, LwF, Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks import ContrastiveAugmentation, build_stream, digits_stream
from avalanche_firn.evaluation import continual_metrics
from avalanche_firn.evaluation.predictions import best_columns
from avalanche_firn.models import with_taskwise_head
from avalanche_firn.plugins import (
    ClassifierStagePlugin,
    ContrastiveDistillationPlugin,
    FastPathPlugin,
    GradientAccumulationPlugin,
    MixedPrecisionPlugin,
)
from avalanche_firn.plugins.fast_evaluation import OnePass, one_pass_fits
from avalanche_firn.plugins.fast_hooks import LOOP_EVENTS, listens
from avalanche_firn.plugins.fast_loader import MemoryBatches, WorkerBatches, faster_loader
from avalanche_firn.plugins.loader_replay import LoaderReplay
from avalanche_firn.strategies import CILA, SLCA

EXACT = dict(one_pass=False)


class Log:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.values = []

    def log_metrics(self, values):
        self.values += [(v.name, v.value, v.x_plot) for v in values if isinstance(v.value, (int, float))]


def network(stream, heads=None):
    size = stream.train[0].dataset[0][0].numel()
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.ReLU(), nn.Dropout(0.2))
    return with_taskwise_head(backbone, feature_size=24, freeze_old=False) if heads is None else heads


def run(kind, stream, plugins=(), *, minibatch=False, tasks=3, **settings):
    """Weights, logged values and random state after a few tasks."""
    torch.manual_seed(0)
    random.seed(0)
    log, model = Log(), network(stream)
    metrics = [*continual_metrics(image=False, efficiency=False)]
    metrics += accuracy_metrics(minibatch=minibatch, epoch=True, epoch_running=minibatch, experience=True, stream=True)
    metrics += loss_metrics(epoch=True, experience=True)
    strategy = kind(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), train_mb_size=32,
        criterion=nn.CrossEntropyLoss(), train_epochs=2, eval_mb_size=50, plugins=list(plugins),
        evaluator=EvaluationPlugin(*metrics, loggers=[log], collect_all=False), **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, experience in enumerate(list(stream.train)[:tasks]):
            strategy.train(experience, eval_streams=[])
            strategy.eval(stream.test[: index + 1])
    return model.state_dict(), log.values, torch.get_rng_state(), strategy


def equal(one, other, *, values=True):
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert torch.equal(one[2], other[2])
    if values:
        assert one[1] == other[1]


@pytest.fixture(scope="module")
def digits():
    return digits_stream(tasks=5)


# ------------------------------------------------------------------ the whole
@pytest.mark.parametrize("minibatch", [False, True])
def test_naive_is_the_same_to_the_bit(digits, minibatch):
    equal(run(Naive, digits, minibatch=minibatch), run(Naive, digits, [FastPathPlugin(**EXACT)], minibatch=minibatch))


@pytest.mark.parametrize("part", ["loader", "hooks"])
def test_each_part_alone(digits, part):
    off = {name: False for name in ("loader", "hooks", "one_pass") if name != part}
    equal(run(Naive, digits), run(Naive, digits, [FastPathPlugin(**off)]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ER_ACE, {"mem_size": 40}),
        (AGEM, {"patterns_per_exp": 20, "sample_size": 20}),
        (LwF, {"alpha": 1, "temperature": 2}),
    ],
)
def test_avalanches_strategies_are_the_same_to_the_bit(digits, kind, settings):
    equal(run(kind, digits, **settings), run(kind, digits, [FastPathPlugin(**EXACT)], **settings))


def test_replay_and_ewc_are_the_same_to_the_bit(digits):
    def others():
        return [ReplayPlugin(mem_size=40), EWCPlugin(ewc_lambda=0.1)]

    equal(run(Naive, digits, others()), run(Naive, digits, [*others(), FastPathPlugin(**EXACT)]))
    fast = run(Naive, digits, [FastPathPlugin(**EXACT), *others()])
    equal(run(Naive, digits, others()), fast)


def test_periodic_evaluation(digits):
    def periodic(plugins):
        torch.manual_seed(0)
        log, model = Log(), network(digits)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
            train_mb_size=32, train_epochs=3, eval_mb_size=50, plugins=plugins, eval_every=1,
            evaluator=EvaluationPlugin(*continual_metrics(image=False, efficiency=False), loggers=[log]),
        )  # fmt: skip
        for experience in digits.train[:2]:
            strategy.train(experience, eval_streams=[digits.test])
        return model.state_dict(), log.values, torch.get_rng_state()

    equal(periodic([]), periodic([FastPathPlugin(**EXACT)]))


def test_slca_with_a_transformer_and_bf16(digits):
    def slca(plugins):
        torch.manual_seed(0)
        model = timm.create_model("vit_firn_32.omniglot", pretrained=True)
        model.blocks = model.blocks[:1]
        log = Log()
        strategy = SLCA(
            model=model, train_mb_size=64, eval_mb_size=128, fresh_final_norm=False,
            plugins=[MixedPrecisionPlugin("bf16"), *plugins],
            evaluator=EvaluationPlugin(*continual_metrics(image=False, efficiency=False), loggers=[log]),
        )  # fmt: skip
        for experience in digits.train[:2]:
            strategy.train(experience, eval_streams=[])
            strategy.eval(digits.test[:2])
        return strategy.model.state_dict(), log.values, torch.get_rng_state()

    equal(slca([]), slca([FastPathPlugin(**EXACT)]))


@pytest.mark.parametrize("domains", [False, True])
def test_cila_knows_where_stored_images_come_from(digits, domains):
    def cila(plugins):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16))
        backbone(torch.zeros(1, *digits.train[0].dataset[0][0].shape))
        strategy = CILA(
            model=backbone, feature_size=16, projection_size=8, mem_size=12, train_mb_size=32, train_epochs=2,
            augmentation=ContrastiveAugmentation(crop_scale=(0.7, 1.0), jitter=None, grey=0.0),
            contrastive=ContrastiveDistillationPlugin(domain_incremental=domains),
            classifier=ClassifierStagePlugin(epochs=2), eval_mb_size=100, plugins=plugins, evaluator=None,
        )  # fmt: skip
        for experience in digits.train[:2]:
            strategy.train(experience, eval_streams=[])
        return strategy.model.state_dict(), [], torch.get_rng_state()

    equal(cila([]), cila([FastPathPlugin()]))
    equal(cila([]), cila([FastPathPlugin(hooks=False)]))


# ------------------------------------------------------------------- one pass
def test_one_pass_gives_the_same_counts_and_nearly_the_same_losses(digits):
    slow, fast = run(Naive, digits, tasks=5), run(Naive, digits, [FastPathPlugin()], tasks=5)
    equal(slow, fast, values=False)
    assert [(name, x) for name, _, x in slow[1]] == [(name, x) for name, _, x in fast[1]]
    for (name, mine, _), (_, theirs, _) in zip(fast[1], slow[1], strict=True):
        if "accuracy" in name or "Acc" in name:
            assert mine == theirs, name
        else:
            assert mine == pytest.approx(theirs, rel=1e-5), name


def test_one_pass_computes_full_batches_only(digits):
    class Sizes(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.sizes = inner, []

        def forward(self, x):
            if not self.training:
                self.sizes.append(len(x))
            return self.inner(x)

    model = network(digits)
    sizes = model.backbone = Sizes(model.backbone)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=64, eval_mb_size=100, plugins=[FastPathPlugin()], evaluator=None,
    )  # fmt: skip
    strategy.train(digits.train[0], eval_streams=[])
    strategy.eval(digits.test)
    total = sum(len(experience.dataset) for experience in digits.test)
    assert sum(sizes.sizes) >= total
    # classes that have no unit yet widen the output experience by experience: those pieces are computed by themselves
    sizes.sizes.clear()
    strategy.eval(digits.test)
    assert sizes.sizes == [100] * (total // 100) + [total % 100]


def test_an_evaluation_before_training_sees_classes_without_a_unit(digits):
    def first(plugins):
        torch.manual_seed(0)
        log, model = Log(), network(digits)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
            train_mb_size=64, eval_mb_size=100, plugins=plugins,
            evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[log]),
        )  # fmt: skip
        strategy.eval(digits.test)
        strategy.train(digits.train[0], eval_streams=[])
        strategy.eval(digits.test)
        return log.values

    assert first([]) == first([FastPathPlugin()])


def test_where_one_pass_does_not_fit(digits):
    class Looks(SupervisedPlugin):
        def before_eval_forward(self, strategy, **kwargs):
            pass

    def strategy(model=None, plugins=()):
        model = (network(digits) if model is None else model).eval()  # as at the start of an evaluation
        return Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
            plugins=list(plugins), evaluator=None,
        )  # fmt: skip

    assert one_pass_fits(strategy(), digits.test)
    assert not one_pass_fits(strategy(), digits.test[:1])
    assert not one_pass_fits(strategy(plugins=[Looks()]), digits.test)
    assert not one_pass_fits(strategy(MultiHeadClassifier(4)), digits.test)

    class Own(Naive):
        def forward(self):
            return super().forward()

    model = network(digits)
    own = Own(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), evaluator=None)
    assert not one_pass_fits(own, digits.test)


# ---------------------------------------------------------------------- hooks
def test_every_listener_is_called_as_before(digits):
    def calls(fast):
        seen = []

        class Recorder(SupervisedPlugin):
            def __init__(self, name):
                super().__init__()
                self.name = name

        for event in LOOP_EVENTS:

            def method(self, strategy, event=event, **kwargs):
                seen.append((self.name, event, strategy.clock.train_iterations, sorted(kwargs)))

            setattr(Recorder, event, method)
        plugins = [Recorder("a"), *([FastPathPlugin(**EXACT)] if fast else []), Recorder("b")]
        run(Naive, digits, plugins, tasks=1)
        return seen

    assert calls(True) == calls(False)


def test_a_plugin_added_on_the_way_is_heard(digits):
    class Counter(SupervisedPlugin):
        count = 0

        def after_update(self, strategy, **kwargs):
            self.count += 1

    class Adder(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 1:
                strategy.plugins.insert(0, counter)

    counter = Counter()
    *_, strategy = run(Naive, digits, [FastPathPlugin(), Adder()], tasks=1)
    assert counter.count == strategy.clock.train_iterations - 2


def test_a_strategy_with_its_own_trigger_keeps_it(digits):
    class Own(Naive):
        called = 0

        def _before_forward(self, **kwargs):
            self.called += 1
            super()._before_forward(**kwargs)

    *_, strategy = run(Own, digits, [FastPathPlugin()], tasks=1)
    assert strategy.called == strategy.clock.train_iterations


def test_who_listens():
    plugin = SupervisedPlugin()
    assert not any(listens(plugin, event) for event in LOOP_EVENTS)
    plugin.after_update = lambda strategy: None
    assert listens(plugin, "after_update") and not listens(object(), "after_update")


def test_metrics_see_the_experience_in_logging_mode_and_get_it_back_after_an_error(digits):
    class Broken(Exception):
        pass

    class Metric(accuracy_metrics(epoch=True)[0].__class__):
        def after_training_iteration(self, strategy):
            assert strategy.experience is not digits.train[0]
            raise Broken

    model = network(digits)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=64, plugins=[FastPathPlugin()], evaluator=EvaluationPlugin(Metric(), loggers=[Log()]),
    )  # fmt: skip
    with pytest.raises(Broken):
        strategy.train(digits.train[0], eval_streams=[])
    assert strategy.experience is digits.train[0]


# -------------------------------------------------------------------- loaders
def unlabelled(count=10):
    data = TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 2)
    data.targets = data.tensors[1].tolist()
    return data


@pytest.mark.parametrize("options", [{"shuffle": True}, {"shuffle": False}, {"shuffle": True, "drop_last": True}])
def test_a_plain_loader(options):
    dataset = as_classification_dataset(unlabelled())
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, **options)
    fast = faster_loader(torch.utils.data.DataLoader(dataset, batch_size=4, **options))
    assert type(fast) is MemoryBatches and len(fast) == len(loader)
    for _ in range(2):
        state = torch.get_rng_state()
        expected = [batch[0].tolist() for batch in loader]
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert [batch[0].tolist() for batch in fast] == expected
        assert torch.equal(after, torch.get_rng_state())


def test_samplers_of_ones_own_are_kept():
    dataset = as_classification_dataset(unlabelled())
    for options in ({"sampler": [3, 1, 2]}, {"shuffle": True, "generator": torch.Generator().manual_seed(4)}):
        copies = [torch.utils.data.DataLoader(dataset, batch_size=2, **options) for _ in range(2)]
        if "generator" in options:
            copies[1] = torch.utils.data.DataLoader(
                dataset, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(4)
            )
        fast = faster_loader(copies[1])
        assert [b[0].tolist() for b in fast] == [b[0].tolist() for b in copies[0]]


def test_an_unknown_loader_stays():
    loader = [1, 2]
    assert faster_loader(loader) is loader


class Noisy(torch.utils.data.Dataset):
    """Samples that draw from all three generators."""

    targets = tuple(i % 2 for i in range(12))

    def __len__(self):
        return 12

    def __getitem__(self, index):
        drawn = torch.rand(1).item(), np.random.rand(), random.random()
        return torch.tensor([index, *drawn], dtype=torch.float64), self.targets[index]


def worker_epochs(workers, epochs=2):
    dataset = as_classification_dataset(Noisy())
    torch.manual_seed(5)
    loader = faster_loader(torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, num_workers=workers))
    assert type(loader) is WorkerBatches
    return [torch.cat([batch[0] for batch in loader]) for _ in range(epochs)], loader


def test_workers_draw_by_batch_whatever_their_number():
    (first, second), _ = worker_epochs(1)
    (again, twice), _ = worker_epochs(2)
    assert torch.equal(first, again) and torch.equal(second, twice)
    assert not torch.equal(first, second)
    assert len(first[:, 1].unique()) == 12  # no two batches share their draws


def test_the_order_with_workers_is_avalanches():
    dataset = as_classification_dataset(Noisy())
    torch.manual_seed(5)
    stock = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, num_workers=1)
    expected = [torch.cat([batch[0][:, 0] for batch in stock]) for _ in range(2)]
    found, _ = worker_epochs(1)
    assert all(torch.equal(a[:, 0], b) for a, b in zip(found, expected, strict=True))


def test_an_epoch_with_lasting_workers_is_repeated_without_the_ones_before():
    epochs, _ = worker_epochs(2, epochs=3)
    recorded = LoaderReplay()
    torch.manual_seed(5)
    loader = faster_loader(
        torch.utils.data.DataLoader(as_classification_dataset(Noisy()), 5, shuffle=True, num_workers=2)
    )
    for _ in range(2):
        recorded.begin(loader)
        list(recorded.batches())
    recorded.begin(loader)
    batches = recorded.batches()
    next(batches)
    state = copy.deepcopy(recorded.state())
    assert len(state["epochs"]) == 1
    rest = torch.cat([batch[0] for batch in batches])
    repeated = LoaderReplay()
    fresh = faster_loader(
        torch.utils.data.DataLoader(as_classification_dataset(Noisy()), 5, shuffle=True, num_workers=2)
    )
    repeated.repeat(fresh, state)
    assert torch.equal(torch.cat([batch[0] for batch in repeated.batches()]), rest)
    assert torch.equal(rest, epochs[2][5:])


def test_evaluation_of_files_takes_one_set_of_workers():
    benchmark = with_classes_timeline(
        benchmark_from_datasets(
            train=[as_classification_dataset(Noisy())], test=[as_classification_dataset(Noisy())] * 3
        )
    )

    class Columns(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0] % 2 == 0, x[:, 0] % 2 == 1], 1).float()

    def accuracy(plugins, workers):
        log, model = Log(), Columns()
        model.unused = nn.Parameter(torch.zeros(1))
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
            eval_mb_size=5, plugins=plugins, evaluator=EvaluationPlugin(loss_metrics(experience=True), loggers=[log]),
        )  # fmt: skip
        strategy.eval(benchmark.test_stream, num_workers=workers)
        return log.values

    expected = accuracy([], 0)
    assert len(expected) == 3
    for workers in (0, 1):
        found = accuracy([FastPathPlugin()], workers)
        assert [(name, x) for name, _, x in found] == [(name, x) for name, _, x in expected]
        assert [value for _, value, _ in found] == pytest.approx([value for _, value, _ in expected], rel=1e-6)


# --------------------------------------------------------- what must not differ
def rows(count=23, seed=0):
    data = TensorDataset(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 4)
    data.targets = data.tensors[1].tolist()
    return data


def experiences(number=3):
    """A benchmark whose experiences don't know their classes, with batches across borders."""
    parts = {"train": [rows(seed=n) for n in range(number)], "test": [rows(seed=10 + n) for n in range(number)]}
    return benchmark_from_datasets(
        **{name: [as_classification_dataset(d) for d in data] for name, data in parts.items()}
    )


def small(plugins, model=None, log=None):
    torch.manual_seed(0)
    model = nn.Linear(6, 4) if model is None else model
    metrics = (accuracy_metrics(experience=True), loss_metrics(experience=True, stream=True))
    return Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=8, eval_mb_size=8, plugins=list(plugins),
        evaluator=EvaluationPlugin(*metrics, loggers=[Log() if log is None else log]),
    )  # fmt: skip


def evaluated(plugins, stream, model=None, **options):
    log = Log()
    torch.manual_seed(0)
    strategy = small(plugins, None if model is None else model(), log)
    strategy.eval(stream, **options)
    return log.values, strategy.model, torch.get_rng_state()


def close(one, other):
    assert [(name, x) for name, _, x in one[0]] == [(name, x) for name, _, x in other[0]]
    assert [value for _, value, _ in one[0]] == pytest.approx([value for _, value, _ in other[0]], rel=1e-5)
    assert torch.equal(one[2], other[2])


def test_experiences_that_do_not_know_their_classes_and_come_again():
    stream = experiences().test_stream
    for chosen in (stream, [stream[0], stream[1], stream[0]], [stream[2], stream[2]]):
        close(evaluated([], chosen), evaluated([FastPathPlugin()], chosen))


def test_one_pass_over_experiences_that_are_made_anew(monkeypatch):
    benchmark = nc_benchmark(rows(40), rows(42, 1), n_experiences=2, task_labels=False, shuffle=False)
    assert benchmark.test_stream[0] is not benchmark.test_stream[0]
    calls = []
    known = OnePass.batch
    monkeypatch.setattr(OnePass, "batch", lambda self, number: calls.append(number) or known(self, number))
    close(evaluated([], benchmark.test_stream), evaluated([FastPathPlugin()], benchmark.test_stream))
    assert max(calls) == 5  # 42 images


def test_a_shuffled_evaluation_draws_as_before():
    stream = experiences().test_stream
    close(evaluated([], stream, shuffle=True), evaluated([FastPathPlugin()], stream, shuffle=True))


class Turned(nn.Module):
    """A model with a setting."""

    def __init__(self):
        super().__init__()
        self.layer, self.turn = nn.Linear(6, 4), 0

    def forward(self, x):
        return self.layer(x).roll(self.turn, 1)


class PerExperience(SupervisedPlugin):
    def before_eval_exp(self, strategy, **kwargs):
        strategy.model.turn = strategy.experience.current_experience


class PerBatch(SupervisedPlugin):
    def before_eval_iteration(self, strategy, **kwargs):
        strategy.mb_x.mul_(3)


class After(SupervisedPlugin):
    def after_eval_iteration(self, strategy, **kwargs):
        strategy.model.turn += 1


@pytest.mark.parametrize("plugin", [PerExperience, PerBatch, After])
def test_plugins_that_act_within_an_evaluation(plugin):
    stream = experiences().test_stream
    slow = evaluated([plugin()], stream, Turned)
    close(slow, evaluated([plugin(), FastPathPlugin()], stream, Turned))
    assert slow[0] != evaluated([], stream, Turned)[0]


def test_models_that_mix_the_images_of_a_batch():
    def mixing():
        return nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4))

    stream = experiences().test_stream
    close(evaluated([], stream, mixing), evaluated([FastPathPlugin()], stream, mixing))


def test_a_stream_of_which_a_part_is_in_memory():
    class Files(torch.utils.data.Dataset):
        targets = rows().targets

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            assert torch.utils.data.get_worker_info() is not None
            return rows()[index]

    class Memory(TensorDataset):  # none for torch's own
        def batch(self, positions):
            return self[positions]

        def __getitem__(self, index):
            assert torch.utils.data.get_worker_info() is None  # as of images on the device
            return super().__getitem__(index)

    memory = Memory(*rows().tensors)
    memory.targets = rows().targets
    mixed = [as_classification_dataset(data) for data in (memory, Files())]
    stream = benchmark_from_datasets(train=mixed, test=mixed).test_stream
    found = evaluated([FastPathPlugin()], stream, num_workers=1)[0]
    plain = [as_classification_dataset(rows())] * 2
    assert found == evaluated([], benchmark_from_datasets(train=plain, test=plain).test_stream)[0]


def test_a_copy_of_a_strategy_has_a_path_of_its_own():
    benchmark = experiences()
    for own in (FastPathPlugin(), GradientAccumulationPlugin(2)):
        strategy = small([own])
        strategy.train(benchmark.train_stream[0], eval_streams=[])
        twin = copy.deepcopy(strategy)
        before, count = strategy.model.weight.clone(), len(strategy.evaluator.loggers[0].values)
        twin.train(benchmark.train_stream[1], eval_streams=[])
        assert torch.equal(strategy.model.weight, before) and not torch.equal(twin.model.weight, before)
        assert twin.eval(benchmark.test_stream) != strategy.evaluator.get_last_metrics()
        assert len(strategy.evaluator.loggers[0].values) == count
        strategy.train(benchmark.train_stream[1], eval_streams=[])  # equal again
        assert strategy.eval(benchmark.test_stream).keys() == twin.evaluator.get_last_metrics().keys()


def test_nothing_is_held_after_training_evaluation_or_an_error():
    class Breaks(SupervisedPlugin):
        def before_eval(self, strategy, **kwargs):
            self.count = 0

        def after_eval(self, strategy, **kwargs):
            raise KeyError("broken")

    benchmark = experiences()
    plugin, breaks = FastPathPlugin(), Breaks()
    strategy = small([breaks, plugin])
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    with pytest.raises(KeyError, match="broken"):
        strategy.eval(benchmark.test_stream)
    assert plugin._whole is not None
    strategy.plugins.remove(breaks)
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    assert plugin._whole is None
    strategy.eval(benchmark.test_stream)
    held = [weakref.ref(experience) for experience in (*benchmark.train_stream, *benchmark.test_stream)]
    del benchmark
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_loggers_are_asked_one_after_the_other():
    def order(plugins):
        seen = []

        class Tells(Log):
            def __init__(self, name):
                super().__init__()
                self.name = name

            def log_metrics(self, values):
                if values:
                    seen.append((self.name, "values"))

            def after_training_iteration(self, strategy, values):
                seen.append((self.name, "iteration", len(values)))

        model = nn.Linear(6, 4)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train_mb_size=8, plugins=plugins,
            evaluator=EvaluationPlugin(accuracy_metrics(minibatch=True), loggers=[Tells("a"), Tells("b")]),
        )  # fmt: skip
        strategy.train(experiences().train_stream[0], eval_streams=[])
        return seen

    assert order([]) == order([FastPathPlugin()]) and len(order([])) == 12


def test_collating_of_ones_own_is_kept():
    def moved(samples):
        x, y = torch.utils.data.default_collate(samples)
        return [x + 100, y]

    dataset = as_classification_dataset(rows())
    for workers in (0, 1):
        loader = faster_loader(torch.utils.data.DataLoader(dataset, 8, collate_fn=moved, num_workers=workers))
        assert next(iter(loader))[0].mean() > 90
    several = ReplayDataLoader(dataset, dataset, batch_size=4, batch_size_mem=4, collate_fn=moved)
    assert next(iter(faster_loader(several)))[0].mean() > 90


def test_workers_draw_anew_in_every_epoch_without_shuffling():
    torch.manual_seed(5)
    loader = faster_loader(torch.utils.data.DataLoader(as_classification_dataset(Noisy()), 5, num_workers=1))
    first, second = (torch.cat([batch[0] for batch in loader]) for _ in range(2))
    assert torch.equal(first[:, 0], second[:, 0]) and not (first[:, 1:] == second[:, 1:]).any()


def test_an_epoch_begun_within_an_epoch_leaves_lasting_workers_alone():
    _, loader = worker_epochs(1, epochs=1)
    seen = []
    for batch in loader:
        seen += batch[0][:, 0].tolist()
        if len(seen) == 5:
            assert len(list(loader)) == 3
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predictions_of_outputs_that_are_written_to(mode):
    with mode():
        output = torch.tensor([[1.0, 2.0]])
        assert best_columns(output)[1].tolist() == [1]
        output[0, 0] = 3
        assert best_columns(output)[1].tolist() == [0]


# --------------------------------------------------------------------- misuse
def test_settings_out_of_range():
    with pytest.raises(ValueError, match="prefetch_factor is 0; 1 and above"):
        FastPathPlugin(prefetch_factor=0)


def test_one_plugin_for_two_strategies(digits):
    plugin = FastPathPlugin()
    run(Naive, digits, [plugin], tasks=1)
    with pytest.raises(ValueError, match="serves another strategy"):
        run(Naive, digits, [plugin], tasks=1)


def test_joint_training_and_an_empty_experience_are_left_to_avalanche(digits):
    torch.manual_seed(0)
    random.seed(0)
    model = network(digits)
    strategy = JointTraining(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
        train_mb_size=64, eval_mb_size=64, plugins=[FastPathPlugin()], evaluator=None,
    )  # fmt: skip
    strategy.train(digits.train, eval_streams=[])
    assert strategy.clock.train_iterations > 10


def test_a_stream_without_task_labels():
    data = TensorDataset(torch.randn(40, 6), torch.arange(40) % 4)
    data.targets = data.tensors[1].tolist()
    labelled = build_stream(
        "t", train=data, test=data, class_order=range(4), task_sizes=[2, 2], class_names=list("abcd"), fingerprint=""
    )
    plain = with_classes_timeline(
        benchmark_from_datasets(train=[as_classification_dataset(data)], test=[as_classification_dataset(data)])
    )
    for stream in (labelled.benchmark, plain):

        def short(plugins, stream=stream):
            torch.manual_seed(1)
            model = nn.Linear(6, 4)
            strategy = Naive(
                model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
                train_mb_size=8, eval_mb_size=8, plugins=plugins, evaluator=None,
            )  # fmt: skip
            for experience in stream.train_stream:
                strategy.train(experience, eval_streams=[], num_workers=0)
                strategy.eval(stream.test_stream)
            return model.weight

        assert torch.equal(short([]), short([FastPathPlugin()]))
