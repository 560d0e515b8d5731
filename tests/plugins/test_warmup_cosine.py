"""WarmupCosinePlugin: the golden rates through the functions and through real runs, epochs, momentum, and refusals."""

import numpy as np
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.plugins import FreshOptimizerPlugin, WarmupCosinePlugin
from avalanche_firn.plugins.warmup_cosine import cosine_rate, warmup_rate

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


class Rates(SupervisedPlugin):
    """Rates of every iteration as the optimizer uses them, per task; and how many epochs there were."""

    def __init__(self):
        super().__init__()
        self.tasks, self.epochs, self.momentum = [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.tasks.append([])
        self._keep(strategy)

    def before_update(self, strategy, **kwargs):
        self.tasks[-1].append([group["lr"] for group in strategy.optimizer.param_groups])

    def after_training_exp(self, strategy, **kwargs):
        self.epochs.append(strategy.clock.train_exp_epochs)
        self._keep(strategy)

    def _keep(self, strategy):
        self.momentum.append([s["momentum_buffer"].clone() for s in strategy.optimizer.state.values()])

    def table(self, task, iterations):
        assert all(len(set(rates)) == 1 for rates in self.tasks[task])
        return np.array([rates[0] for rates in self.tasks[task]]).reshape(-1, iterations)


class Batches(SupervisedPlugin):
    """So many tiny batches an epoch, whatever the batch size."""

    def __init__(self, count):
        super().__init__()
        self.batches = [(torch.ones(2, 2), torch.tensor([0, 1]))] * count

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = self.batches


@pytest.fixture
def three_tasks(stream_of):
    return stream_of(torch.randn(12, 2), np.arange(6).repeat(2), [2, 2, 2])


def naive(rates, *plugins, lr=0.5, epochs=12, batch=512, groups=False, model=None):
    torch.manual_seed(0)
    model = model or nn.Linear(2, 6)
    parameters = (
        [{"params": [p], "lr": 0.1 + 0.1 * i} for i, p in enumerate(model.parameters())]
        if groups
        else model.parameters()
    )
    return Naive(
        model=model, optimizer=torch.optim.SGD(parameters, lr=lr, momentum=0.9), criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch, train_epochs=epochs, eval_mb_size=4, plugins=[rates, *plugins],
        evaluator=EvaluationPlugin(loggers=[]),
    )  # fmt: skip


def train(strategy, stream):
    for experience in stream:
        strategy.train(experience, eval_streams=[])


def settings(g, key):
    """Base rate, epochs of the first and of later tasks, iterations per epoch, batch size, whether it warms up."""
    lr, first, later, iterations, batch, warm = g[f"{key}_setting"].tolist()
    return lr, int(first), int(later), int(iterations), int(batch), bool(warm)


# --------------------------------------------------------------------------- golden
@pytest.mark.parametrize("key", ["cifar", "tiny", "rmnist"])
def test_golden_rates_from_the_functions(golden, key):
    g = golden("cila", "learning_rates")
    lr, first, later, iterations, _, warm = settings(g, key)

    def table(epochs, target):
        rates = np.array([[cosine_rate(lr, e, epochs)] * iterations for e in range(1, epochs + 1)])
        if warm:
            end = cosine_rate(lr, 10, target)
            steps = [warmup_rate(0.01, end, i, 10 * iterations) for i in range(10 * iterations)]
            rates[:10] = np.reshape(steps, (10, iterations))
        return rates

    np.testing.assert_allclose(table(first, later), g[f"{key}_first"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table(later, later), g[f"{key}_later"], rtol=0, atol=1e-12)
    if warm:
        assert cosine_rate(lr, 10, later) == pytest.approx(float(g[f"{key}_warmup_to"]), abs=1e-12)
    if key == "cifar":
        np.testing.assert_allclose(table(first, first), g["cifar_first_corrected"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "target"), [("cifar", "reference"), ("tiny", "reference"), ("rmnist", "reference"), ("cifar", "task")]
)
def test_golden_rates_of_a_run(golden, three_tasks, key, target):
    g = golden("cila", "learning_rates")
    lr, first, later, iterations, batch, warm = settings(g, key)
    record = Rates()
    # without a setting the batch decides: above 256 there is a warm-up, but never for the digits
    plugin = WarmupCosinePlugin(first_epochs=first, warmup_target=target, warmup=None if warm else False)
    tasks = 2 if target == "reference" else 1
    strategy = naive(plugin, Batches(iterations), record, lr=lr, epochs=later, batch=batch)
    train(strategy, three_tasks.train_stream[:tasks])
    expected = g["cifar_first_corrected" if target == "task" else f"{key}_first"]
    np.testing.assert_allclose(record.table(0, iterations), expected, rtol=0, atol=1e-12)
    if tasks == 2:
        np.testing.assert_allclose(record.table(1, iterations), g[f"{key}_later"], rtol=0, atol=1e-12)


def test_ends_of_the_functions():
    assert cosine_rate(0.5, 100, 100) == pytest.approx(0.0005, abs=1e-15)
    assert cosine_rate(0.5, 0, 100) == 0.5
    assert cosine_rate(2.0, 3, 3, final=0.0) == 0.0 and cosine_rate(2.0, 2, 3, final=1.0) == 2.0
    assert warmup_rate(0.01, 0.4, 0, 7) == 0.01 and warmup_rate(0.01, 0.4, 7, 7) == pytest.approx(0.4)


# --------------------------------------------------------------------------- options
def test_epochs_of_the_first_experience(three_tasks):
    record = Rates()
    strategy = naive(WarmupCosinePlugin(first_epochs=5, warmup=False), record, epochs=3)
    for experience in three_tasks.train_stream:
        strategy.train(experience, eval_streams=[])
        assert strategy.train_epochs == 3
    assert record.epochs == [5, 3, 3]
    for task, epochs in enumerate((5, 3, 3)):
        expected = [[cosine_rate(0.5, e, epochs)] for e in range(1, epochs + 1)]
        np.testing.assert_allclose(record.table(task, 1), expected, rtol=1e-15)


def test_a_whole_stream_in_one_call(three_tasks):
    record = Rates()
    strategy = naive(WarmupCosinePlugin(first_epochs=5, warmup=False), record, epochs=3)
    strategy.train(three_tasks.train_stream, eval_streams=[])
    assert record.epochs == [5, 3, 3]


def test_without_first_epochs_all_are_alike(three_tasks):
    record = Rates()
    train(naive(WarmupCosinePlugin(warmup=False), record, epochs=2), three_tasks.train_stream)
    assert record.epochs == [2, 2, 2] and record.tasks[0] == record.tasks[1] == record.tasks[2]


@pytest.mark.parametrize(
    ("batch", "warmup", "expected"), [(256, None, False), (257, None, True), (8, True, True), (512, False, False)]
)
def test_the_batch_decides_on_the_warm_up(three_tasks, batch, warmup, expected):
    record = Rates()
    plugin = WarmupCosinePlugin(warmup=warmup, warmup_epochs=2, warmup_from=0.05)
    train(naive(plugin, record, epochs=4, batch=batch), three_tasks.train_stream[:1])
    start = record.tasks[0][0][0]
    assert start == 0.05 if expected else start == cosine_rate(0.5, 1, 4)


def test_warm_up_targets_differ_in_the_first_task_only(three_tasks):
    tables = {}
    for target in ("task", "reference"):
        record = Rates()
        plugin = WarmupCosinePlugin(first_epochs=40, warmup_target=target, warmup_epochs=4)
        train(naive(plugin, Batches(2), record, epochs=8), three_tasks.train_stream[:2])
        tables[target] = [record.table(task, 2) for task in (0, 1)]
    own, released = tables["task"], tables["reference"]
    np.testing.assert_array_equal(own[1], released[1])
    np.testing.assert_array_equal(own[0][4:], released[0][4:])
    assert (own[0][0, 0], released[0][0, 0]) == (0.01, 0.01) and (own[0][1:4] > released[0][1:4] + 0.01).all()
    jumps = [table[0][4, 0] - table[0][3, 1] for table in (own, released)]
    assert jumps[0] < 0.06 < 0.15 < jumps[1]  # a step of the line, and the released code's leap


def test_rate_and_its_end_are_arguments(three_tasks):
    record = Rates()
    train(naive(WarmupCosinePlugin(0.2, final=0.25, warmup=False), record, epochs=6), three_tasks.train_stream[:1])
    assert record.tasks[0][-1][0] == pytest.approx(0.05) and record.tasks[0][0][0] == cosine_rate(0.2, 1, 6, 0.25)


def test_groups_keep_their_ratio(three_tasks):
    record, single = Rates(), Rates()
    train(naive(WarmupCosinePlugin(), Batches(3), record, groups=True), three_tasks.train_stream[:2])
    train(naive(WarmupCosinePlugin(), Batches(3), single), three_tasks.train_stream[:2])
    for groups, plain in zip(record.tasks, single.tasks, strict=True):
        wanted = np.array(plain) * np.array([[0.1, 0.2]]) / 0.5  # rates at the beginning, and the optimizer's own
        np.testing.assert_allclose(np.array(groups), wanted, rtol=1e-12)


def test_no_warm_up_epochs(three_tasks):
    record = Rates()
    train(naive(WarmupCosinePlugin(warmup_epochs=0, warmup=True), record, epochs=2), three_tasks.train_stream[:1])
    assert record.tasks[0][0][0] == cosine_rate(0.5, 1, 2)


# ------------------------------------------------------------------------- one optimizer
def test_momentum_carries_over_tasks(three_tasks):
    record = Rates()
    strategy = naive(WarmupCosinePlugin(warmup=False), record, epochs=3)
    optimizer = strategy.optimizer
    train(strategy, three_tasks.train_stream)
    assert strategy.optimizer is optimizer and record.momentum[0] == []
    for end, start in ((1, 2), (3, 4)):
        before, after = record.momentum[end], record.momentum[start]
        assert len(before) == len(after) == 2 and all(map(torch.equal, before, after))
        assert all(bool(m.any()) for m in before)


def test_rates_follow_from_the_clock(three_tasks):
    """Nothing to save: a new plugin beside a clock that stands at the second task does as the old one would."""
    assert WarmupCosinePlugin.stateless is True
    whole, rest = Rates(), Rates()
    train(naive(WarmupCosinePlugin(first_epochs=4, warmup=False), whole, epochs=3), three_tasks.train_stream)
    strategy = naive(WarmupCosinePlugin(first_epochs=4, warmup=False), rest, epochs=3)
    strategy.clock.train_exp_counter = 1
    train(strategy, three_tasks.train_stream[1:])
    assert rest.epochs == [3, 3] and rest.tasks == whole.tasks[1:]


def test_refused_beside_a_plugin_that_rebuilds_the_optimizer(three_tasks):
    for plugins in ([WarmupCosinePlugin(), FreshOptimizerPlugin()], [FreshOptimizerPlugin(), WarmupCosinePlugin()]):
        with pytest.raises(ValueError, match="keeps one optimizer, another plugin rebuilds it"):
            train(naive(*plugins), three_tasks.train_stream)


# ---------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("first", "later", "warm", "message"),
    [(None, 10, 10, "10 with 10 epochs"), (5, 30, 10, "10 with 5 epochs"), (30, 8, 10, "10 with 8 epochs")],
)
def test_a_warm_up_as_long_as_a_task(three_tasks, first, later, warm, message):
    strategy = naive(WarmupCosinePlugin(first_epochs=first, warmup_epochs=warm), epochs=later)
    with pytest.raises(ValueError, match=f"warmup_epochs is {message}"):
        train(strategy, three_tasks.train_stream)
    assert strategy.clock.train_iterations == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; a rate above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"first_epochs": 0}, "first_epochs is 0; 1 and above"),
        ({"final": -0.1}, "final is -0.1; 0 and above"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"warmup_from": -0.01}, "warmup_from is -0.01"),
        ({"warmup_target": "later"}, "warmup_target is 'later'; 'task' or 'reference'"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosinePlugin(**arguments)
