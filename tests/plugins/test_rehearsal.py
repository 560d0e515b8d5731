"""RehearsalPlugin: what is kept, which batches come of it, whose random numbers it uses, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios.generic_scenario import CLStream
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_firn.plugins import RehearsalPlugin
from avalanche_firn.plugins.random_state import capture_random_state
from avalanche_firn.plugins.rehearsal import RehearsalSet, find_rehearsal

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore::DeprecationWarning")


def numbers(benchmark):
    """Sample numbers of each experience, in its order (the first benchmark generation has its own)."""
    return [[int(item[0][0]) for item in e.dataset] for e in benchmark.train_stream]


class Batches(SupervisedPlugin):
    """The batches of each task, and what the buffer held meanwhile."""

    def __init__(self):
        super().__init__()
        self.tasks, self.places = [], []

    def before_training_exp(self, strategy, **kwargs):
        self.tasks.append([])
        memory = find_rehearsal(strategy)
        self.places.append([tuple(p) for p in memory.places.tolist()])

    def before_training_iteration(self, strategy, **kwargs):
        self.tasks[-1].append([t.clone() for t in strategy.mbatch])


def samples(classes=6, per_class=7):
    """Sample i of class i % classes; its number is its first feature."""
    count = classes * per_class
    x = torch.stack([torch.arange(count).float(), torch.randn(count, generator=torch.Generator().manual_seed(0))], 1)
    return x, np.arange(count) % classes


def naive(memory, *plugins, epochs=1, batch=5):
    torch.manual_seed(0)
    model = nn.Linear(2, 10)
    return Naive(
        model=nn.Sequential(nn.BatchNorm1d(2), model), optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(), train_mb_size=batch, train_epochs=epochs, eval_mb_size=20,
        plugins=[memory, *plugins], evaluator=EvaluationPlugin(loggers=[]),
    )  # fmt: skip


def train(strategy, stream, **kwargs):
    for experience in stream:
        strategy.train(experience, eval_streams=[], **kwargs)


def fill(memory, tasks):
    """Let the buffer see targets task by task; its places after each."""
    found = []
    for task, targets in enumerate(tasks):
        memory.update(task, targets)
        found.append({tuple(p) for p in memory.places.tolist()})
    return found


# --------------------------------------------------------------------- class balance
@pytest.mark.parametrize("key", ["cifar_200", "cifar_500", "tiny_200", "tiny_500"])
def test_shares_of_the_classes(golden, key):
    g = golden("cila", "buffer_counts")
    per_task, tasks, slots = g[f"{key}_setting"].tolist()
    sizes, official = g[f"{key}_class_sizes"].tolist(), g[f"{key}_counts"]
    memory, before = RehearsalPlugin(slots, seed=1), set()
    for task in range(1, tasks):
        classes = range(per_task * (task - 1), per_task * task)
        memory.update(task - 1, [c for c in classes for _ in range(sizes[c])])
        counts, seen = memory.counts(), per_task * task
        assert set(counts) == set(range(seen)) or seen > slots
        enough = sum(sizes[:seen]) >= slots
        assert sum(counts.values()) == (slots if enough else sum(sizes[:seen]))
        assert (official[:, task].sum(1) == sum(counts.values())).all()
        assert max(counts.values()) - min(counts.values()) <= 1
        if key.startswith("cifar"):
            ours = np.array([counts[c] for c in range(seen)])
            for table in (ours, official[:, task, :seen]):
                assert np.abs(table - slots / seen).max() <= 2
        held = {tuple(p) for p in memory.places.tolist()}
        assert {p for p in held if p[0] < task - 1} <= before
        assert len(held) == len(memory.places) and {p[0] for p in held} <= set(range(task))
        before = held


@pytest.mark.parametrize("slots", [7, 20, 64])
def test_sizes_are_those_of_avalanches_buffer(slots):
    rng = np.random.default_rng(slots)
    memory, policy = RehearsalPlugin(slots), ClassBalancedBuffer(slots)
    for task in range(4):
        targets = rng.integers(2 * task, 2 * task + 3, 15).tolist()  # a class comes back in the next task
        memory.update(task, targets)
        data = TensorDataset(torch.zeros(15, 1), torch.tensor(targets))
        data.targets = targets
        policy.update_from_dataset(as_classification_dataset(data))
        sizes = {c: len(group.buffer) for c, group in policy.buffer_groups.items() if len(group.buffer)}
        assert memory.counts() == sizes


def test_a_class_with_fewer_samples_than_its_quota():
    memory = RehearsalPlugin(20)
    fill(memory, [[0] * 3 + [1] * 30, [2] * 30])
    assert memory.counts() == {0: 3, 1: 7, 2: 6}  # quotas 7, 7, 6


def test_a_class_that_comes_back_keeps_samples_of_both_experiences():
    memory = RehearsalPlugin(40)
    places = fill(memory, [[0] * 100 + [1] * 100, [0] * 100 + [2] * 100])
    assert memory.counts() == {0: 14, 1: 13, 2: 13}
    mine = memory.places[memory.labels == 0]
    assert set(mine[:, 0].tolist()) == {0, 1}
    assert {tuple(p) for p in mine.tolist() if p[0] == 0} <= places[0]
    assert (mine[:, 1] < 100).all()  # positions of class 0 in both


def test_labels_belong_to_the_places():
    memory, targets = RehearsalPlugin(12), [[0, 1, 0, 1, 1, 0], [3, 2, 2, 3, 2, 3]]
    fill(memory, targets)
    assert len(memory.places) == 12
    for (experience, position), label in zip(memory.places.tolist(), memory.labels.tolist(), strict=True):
        assert targets[experience][position] == label


# ------------------------------------------------------------------------- reservoir
def test_shares_of_the_domains(golden):
    g = golden("cila", "reservoir_counts")
    size, slots, tasks = g["setting"].tolist()
    repeats, official = 80, g["counts"].astype(float)
    counts = np.zeros((repeats, tasks, tasks))
    for repeat in range(repeats):
        memory = RehearsalPlugin(slots, storage="reservoir", seed=repeat)
        for task in range(1, tasks):
            memory.update(task - 1, [0] * size)
            assert len(memory.places) == len({tuple(p) for p in memory.places.tolist()}) == slots
            counts[repeat, task] = np.bincount(memory.places[:, 0], minlength=tasks)
    for task in range(2, tasks):
        ours, theirs = counts[:, task, :task], official[:, task, :task]
        error = ours.std(0, ddof=1) / repeats**0.5
        assert (np.abs(ours.mean(0) - slots / task) <= 4 * error).all()
        both = np.hypot(error, theirs.std(0, ddof=1) / len(theirs) ** 0.5)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * both + 0.005 * slots / task).all()


def test_a_reservoir_larger_than_what_came():
    memory = RehearsalPlugin(10, storage="reservoir")
    places = fill(memory, [[0] * 4, [0] * 3, [0] * 30])
    assert len(places[0]) == 4 and len(places[1]) == 7 and len(places[2]) == 10


# ----------------------------------------------------------------------------- union
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_every_sample_once_per_epoch(stream_of, generation, workers):
    x, y = samples()
    benchmark = stream_of(x, y, [2, 2, 2], generation=generation)
    record, memory = Batches(), RehearsalPlugin(6)
    stream = benchmark.train_stream if workers == 0 else benchmark.train_stream[:2]
    train(naive(memory, record, epochs=1 if workers else 2), stream, num_workers=workers)
    rows = numbers(benchmark)
    for task, batches in enumerate(record.tasks):
        places = record.places[task]
        assert {experience for experience, _ in places} == set(range(task)) and len(places) == (6 if task else 0)
        expected = sorted([*rows[task], *(rows[e][p] for e, p in places)])
        per_epoch = -(-len(expected) // 5)
        assert len(batches) == per_epoch * (1 if workers else 2)
        orders = []
        for epoch in range(len(batches) // per_epoch):
            x_, y_, origin, *labels = (
                torch.cat(c) for c in zip(*batches[epoch * per_epoch :][:per_epoch], strict=True)
            )
            number = x_[:, 0].long()
            assert sorted(number.tolist()) == expected
            assert torch.equal(x_, x[number]) and y_.tolist() == y[number].tolist()
            assert torch.equal(origin, y_ // 2)
            assert [t.tolist() for t in labels] == ([[0] * len(y_)] if generation == "classic" else [])
            orders.append(number.tolist())
        assert all(order != expected for order in orders) and len(set(map(tuple, orders))) == len(orders)


def test_task_labels_come_last(stream_of):
    benchmark = stream_of(*samples(), [2, 2, 2], generation="classic")
    seen = []

    class Labels(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            assert len(strategy.mbatch) == 4
            seen.append((strategy.mb_task_id is strategy.mbatch[3], strategy.mbatch[2].max().item()))

    train(naive(RehearsalPlugin(6), Labels()), benchmark.train_stream)
    assert all(last for last, _ in seen) and seen[-1][1] > 0


def test_loader_options_are_those_of_the_strategy(stream_of):
    benchmark = stream_of(*samples(), [2, 2, 2])
    record = Batches()
    train(naive(RehearsalPlugin(6), record), benchmark.train_stream, shuffle=False, drop_last=True)
    assert [[len(b[0]) for b in batches] for batches in record.tasks] == [[5, 5], [5] * 4, [5] * 4]
    assert (
        torch.cat([b[2] for b in record.tasks[1]]).tolist() == [1] * 14 + [0] * 6
    )  # unshuffled: the memory comes last


# -------------------------------------------------------------------------- balanced
@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_batches_of_current_and_as_many_stored_samples(stream_of, generation):
    x, y = samples()
    benchmark = stream_of(x, y, [2, 2, 2], generation=generation)
    record = Batches()
    train(naive(RehearsalPlugin(12, batches="balanced"), record, batch=4), benchmark.train_stream)
    assert [[len(b[0]) for b in batches] for batches in record.tasks] == [[4, 4, 4, 2], [8, 8, 8, 6], [8, 8, 8, 6]]
    rows = numbers(benchmark)
    for task, batches in enumerate(record.tasks):
        stored = {rows[e][p] for e, p in record.places[task]}
        current = []
        for batch in batches:
            classes = batch[1] // 2
            old = classes < task
            assert int(old.sum()) == (4 if task else 0)
            assert set(batch[0][old, 0].long().tolist()) <= stored
            current += batch[0][~old, 0].long().tolist()
        assert sorted(current) == sorted(rows[task])


# ------------------------------------------------------------------------ transforms
class Add:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, x):
        return x + self.amount


@pytest.mark.parametrize("batches", ["union", "balanced"])
def test_stored_samples_are_transformed_at_each_use(batches):
    x, y = samples(4)
    parts = []
    for task in range(2):
        rows = y // 2 == task
        data = TensorDataset(x[rows], torch.tensor(y[rows]))
        data.targets = y[rows].tolist()
        transforms = {"train": (Add(1000), None), "eval": (Add(5000), None)}
        parts.append(as_classification_dataset(data, transform_groups=transforms))
    benchmark = with_classes_timeline(benchmark_from_datasets(train=parts, test=parts))
    record, memory = Batches(), RehearsalPlugin(6, batches=batches)
    strategy = naive(memory, record)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)  # puts no data set into another mode
    x_ = torch.cat([b[0] for b in record.tasks[1]])[:, 0]
    assert ((x_ >= 1000) & (x_ < 1028)).all()
    for evaluation, offset in ((False, 1000), (True, 5000)):
        found = memory.dataset(benchmark.train_stream[1], evaluation=evaluation)
        assert len(found) == 14 + 6 and found.targets == [found[i][1] for i in range(20)]
        assert all(offset <= found[i][0][0] < offset + 28 for i in range(20))
        assert found.origins == [1] * 14 + [0] * 6 == [found[i][2] for i in range(20)]


def test_a_set_of_several_parts():
    first = TensorDataset(torch.arange(4.0), torch.tensor([0, 1, 0, 1]))
    first.targets = [0, 1, 0, 1]
    whole = RehearsalSet([(first, [3, 0], 5), (first, range(2), 7)])
    assert (len(whole), whole.targets, whole.origins) == (4, [1, 0, 0, 1], [5, 5, 7, 7])
    batch = next(iter(DataLoader(whole, batch_size=4)))
    assert [t.tolist() for t in batch] == [[3.0, 0.0, 0.0, 1.0], [1, 0, 0, 1], [5, 5, 7, 7]]


# ---------------------------------------------------------------------- random numbers
def equal_random_state(a, b):
    return torch.equal(a["torch"], b["torch"]) and all(
        torch.equal(a[k]["words"], b[k]["words"]) for k in ("python", "numpy")
    )


@pytest.mark.parametrize("storage", ["class_balanced", "reservoir"])
def test_the_choice_depends_on_the_seed_alone(storage):
    found = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        before = capture_random_state()
        memory = RehearsalPlugin(10, storage=storage, seed=seed)
        found.append(fill(memory, [[0, 1] * 30, [2, 3] * 30]))
        assert equal_random_state(before, capture_random_state())
    assert found[0] == found[1] != found[2]


def test_experiences_are_drawn_independently():
    memory = RehearsalPlugin(4)
    fill(memory, [[0] * 50, [1] * 50])
    first, second = (set(memory.places[memory.labels == c, 1].tolist()) for c in (0, 1))
    assert first != second


# ----------------------------------------------------------------------------- state
@pytest.mark.parametrize("storage", ["class_balanced", "reservoir"])
def test_state_round_trip(storage):
    memory = RehearsalPlugin(10, storage=storage)
    tasks = [[0, 1] * 30, [2, 3] * 30, [0, 4] * 30]
    fill(memory, tasks[:2])
    other = RehearsalPlugin(10, storage=storage)
    other.load_state_dict(memory.state_dict())
    for _ in range(2):
        assert memory.state_dict().keys() == other.state_dict().keys()
        for key, value in memory.state_dict().items():
            same = torch.equal(value, other.state_dict()[key]) if isinstance(value, torch.Tensor) else None
            assert value == other.state_dict()[key] if same is None else same
        memory.update(2, tasks[2])
        other.update(2, tasks[2])


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_a_restored_plugin_continues_the_stream(stream_of, generation):
    """Between two experiences, and when one of them is entered a second time."""
    benchmark = stream_of(*samples(), [2, 2, 2], generation=generation)
    record, memory = Batches(), RehearsalPlugin(6)
    strategy, states = naive(memory, record), []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        states.append(memory.state_dict())
    for start, reached in ((1, 0), (2, 1), (1, 1), (2, 2)):
        again, other = Batches(), RehearsalPlugin(6)
        other.load_state_dict(states[reached])
        train(naive(other, again), benchmark.train_stream[start:])
        assert again.places == record.places[start:]
        assert {int(o) for b in again.tasks[0] for o in b[2]} == set(range(start + 1))


def test_training_twice_on_an_experience_keeps_the_buffer(stream_of):
    first, second, *_ = stream_of(*samples(), [2, 2, 2]).train_stream
    record = Batches()
    train(naive(RehearsalPlugin(6), record), [first, second, second])
    assert record.places[0] == [] and record.places[1] == record.places[2] != []


# ---------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mem_size": 0}, "mem_size is 0; 1 and above"),
        ({"seed": -1}, "seed is -1; 0 and above"),
        ({"storage": "herding"}, "storage is 'herding'"),
        ({"batches": "mixed"}, "batches is 'mixed'"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        RehearsalPlugin(**arguments)


def test_online_experiences_are_refused(stream_of):
    online = split_online_stream(stream_of(*samples(), [2, 2, 2]).train_stream, experience_size=7)
    with pytest.raises(ValueError, match="online one; rehearsal accepts streams of whole experiences"):
        train(naive(RehearsalPlugin(6)), [next(iter(online))])


def test_streams_that_only_pass_by_are_refused(stream_of):
    experiences = list(stream_of(*samples(), [2, 2, 2]).train_stream)
    passing = CLStream("passing", iter(experiences), SimpleNamespace(streams={}))
    with pytest.raises(ValueError, match=r"stream is a CLStream; rehearsal accepts streams with stream\[i\]"):
        train(naive(RehearsalPlugin(6)), passing)


def test_the_plugin_is_found():
    memory = RehearsalPlugin(6)
    assert find_rehearsal(naive(memory)) is memory
    assert find_rehearsal(SimpleNamespace(plugins=[Batches()])) is None
