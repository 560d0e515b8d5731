"""Class orders, task sizes, splits, and the streams built from plain datasets."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from avalanche_firn.benchmarks.streams import (
    Digest,
    StreamError,
    build_stream,
    class_order,
    increment_sizes,
    resolve_class_order,
    stratified_split,
    task_sizes,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "slca" / "class_orders.npz"
ORDER = (3, 0, 4, 6, 1, 5, 2)
SIZES = (3, 1, 2, 1)


class Marked(Dataset):
    """x = (label, index, offset): whatever an experience yields can be traced back to its source."""

    def __init__(self, counts, offset):
        self.targets = [c for c, n in enumerate(counts) for _ in range(n)]
        self.offset = offset

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor([self.targets[index], index, self.offset], dtype=torch.float32), self.targets[index]


def add_ten(x):
    return x + 10


def add_hundred(x):
    return x + 100


def make(**options):
    counts = {"train": [5, 4, 3, 2, 6, 1, 7], "valid": [1] * 7, "test": [2] * 7}
    parts = {part: Marked(n, offset) for offset, (part, n) in enumerate(counts.items())}
    parts |= {key: options.pop(key) for key in list(options) if key in parts}
    settings = {"class_order": ORDER, "task_sizes": SIZES, "class_names": list("abcdefg"), "fingerprint": "f"} | options
    return build_stream("marked", **parts, **settings)


def rng_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("seed", [1993, 1996, 1997])
@pytest.mark.parametrize(("count", "step"), [(100, 10), (200, 20), (196, 20)])
def test_class_orders_and_sizes_of_the_papers(count, step, seed):
    golden = np.load(GOLDEN)
    key = f"C{count}_seed{seed}_init{step}_inc{step}"
    order = class_order(count, seed)
    assert order == tuple(golden[f"{key}_order"].tolist())
    assert all(order[p] == c for c, p in enumerate(golden[f"{key}_position"].tolist()))
    assert increment_sizes(count, step, step) == tuple(golden[f"{key}_sizes"].tolist())


def test_class_order_is_natural_without_a_seed_and_leaves_numpy_alone():
    before = rng_state()
    assert class_order(4, None) == (0, 1, 2, 3)
    assert sorted(class_order(50, 7)) == list(range(50)) and class_order(50, 7) == class_order(50, 7)
    assert all(type(c) is int for c in class_order(5, 1))
    assert rng_state() == before


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", True])
def test_class_order_refuses_seeds(seed):
    with pytest.raises(StreamError, match="seed"):
        class_order(5, seed)


def test_resolve_class_order_takes_ids_and_names():
    names = ["cat", "dog", "emu"]
    assert resolve_class_order(names, None, None) == (0, 1, 2)
    assert resolve_class_order(names, None, 3) == class_order(3, 3)
    assert resolve_class_order(names, ["emu", "cat", "dog"], None) == (2, 0, 1)
    resolved = resolve_class_order(names, np.array([1, 2, 0]), None)
    assert resolved == (1, 2, 0) and all(type(c) is int for c in resolved)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1], "2 entries.*each of the 3 classes"),
        ([0, 1, 1], "repeats the classes 1"),
        ([0, 1, 2, 0], "repeats the classes 0"),
        ([0, 1, 3], "unknown classes 3"),
        ([0, -1, 2], "unknown classes -1"),
        (["cat", "dog", "fox"], "unknown classes 'fox'"),
        ([0, 1, 2.0], "unknown classes 2.0"),
        ([0, True, 2], "unknown classes True"),
        ("cat", "class_order is 'cat'"),
    ],
)
def test_resolve_class_order_refuses(order, message):
    with pytest.raises(StreamError, match=message):
        resolve_class_order(["cat", "dog", "emu"], order, None)


def test_class_order_and_seed_exclude_each_other():
    with pytest.raises(StreamError, match="class_order and seed=1"):
        resolve_class_order(["cat", "dog"], [1, 0], 1)


def test_task_sizes_never_drop_a_class():
    assert task_sizes(10, 5) == (2, 2, 2, 2, 2)
    assert task_sizes(10, 3) == (3, 3, 4)
    assert task_sizes(7, [4, 1, 2]) == (4, 1, 2) == task_sizes(7, np.array([4, 1, 2]))
    for classes in range(1, 25):
        for tasks in range(1, classes + 1):
            sizes = task_sizes(classes, tasks)
            assert sum(sizes) == classes and len(sizes) == tasks and min(sizes) >= 1


@pytest.mark.parametrize("tasks", [0, 11, -1, True, 2.0, "5", [5, 4], [5, 5, 0], [5, 6], [], [10, -1, 1], [5, 5.0]])
def test_task_sizes_refuse(tasks):
    with pytest.raises(StreamError, match=r"tasks.*accepted"):
        task_sizes(10, tasks)


@pytest.mark.parametrize(("initial", "increment"), [(0, 2), (11, 2), (5, 0)])
def test_increment_sizes_refuse(initial, increment):
    with pytest.raises(StreamError, match="initial"):
        increment_sizes(10, initial, increment)


def test_increment_sizes():
    assert increment_sizes(10, 10, 1) == (10,)
    assert increment_sizes(10, 4, 3) == (4, 3, 3)
    assert increment_sizes(10, 5, 3) == (5, 3, 2)


def test_stratified_split_partitions_every_class():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(6), [3, 4, 10, 33, 100, 7]))
    split = stratified_split(labels, validation_fraction=0.2, test_fraction=0.2, seed=0)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in split)
    for c, n in enumerate([3, 4, 10, 33, 100, 7]):
        counts = [int((labels[part] == c).sum()) for part in split]
        expected = max(1, int(n * 0.2 + 0.5))
        assert counts == [n - 2 * expected, expected, expected]


def test_stratified_split_of_a_class_does_not_depend_on_the_others():
    alone = stratified_split([2] * 20, validation_fraction=0.25, test_fraction=0.25, seed=5)
    beside = stratified_split([2] * 20 + [0] * 9, validation_fraction=0.25, test_fraction=0.25, seed=5)
    for a, b in zip(alone, beside, strict=True):
        assert a.tolist() == [i for i in b.tolist() if i < 20]


def test_stratified_split_parts_can_be_empty_and_seeds_differ():
    labels = [0] * 30 + [1] * 30
    split = stratified_split(labels, validation_fraction=0, test_fraction=0.1, seed=0)
    assert (len(split.train), len(split.valid), len(split.test)) == (54, 0, 6)
    other = stratified_split(labels, validation_fraction=0, test_fraction=0.1, seed=1)
    assert split.test.tolist() != other.test.tolist()
    whole = stratified_split(labels, validation_fraction=0, test_fraction=0, seed=0)
    assert whole.train.tolist() == list(range(60))


def test_stratified_split_is_frozen():
    # These indices are part of every stream that draws its split: they may never change.
    split = stratified_split([0] * 8 + [1] * 4, validation_fraction=0.25, test_fraction=0.25, seed=0)
    assert [part.tolist() for part in split] == FROZEN_SPLIT


FROZEN_SPLIT = [[0, 3, 4, 7, 9, 10], [2, 6, 8], [1, 5, 11]]


@pytest.mark.parametrize(("count", "ways"), [(1, 3), (2, 3)])
def test_stratified_split_names_the_class_that_is_too_small(count, ways):
    with pytest.raises(StreamError, match=rf"'b' has {count} image\(s\); a {ways}-way split needs {ways}"):
        stratified_split(
            [0] * 9 + [1] * count, validation_fraction=0.2, test_fraction=0.2, seed=0, class_names=["a", "b"]
        )


@pytest.mark.parametrize(
    ("validation", "test", "field"),
    [
        (1.0, 0.1, "validation_fraction"),
        (-0.1, 0, "validation_fraction"),
        (0, float("nan"), "test_fraction"),
        ("a", 0, "validation_fraction"),
        (0.5, 0.5, "nothing to train on"),
    ],
)
def test_stratified_split_refuses_fractions(validation, test, field):
    with pytest.raises(StreamError, match=field):
        stratified_split([0] * 10, validation_fraction=validation, test_fraction=test, seed=0)


def test_every_sample_lands_once_with_its_label_in_the_task_of_its_class():
    stream = make()
    start = 0
    for part, offset in (("train", 0), ("valid", 1), ("test", 2)):
        seen = []
        for position, experience in enumerate(getattr(stream, part)):
            begin = sum(SIZES[:position])
            classes = set(ORDER[begin : begin + SIZES[position]])
            assert experience.current_experience == position
            assert set(experience.classes_in_this_experience) == classes
            assert set(experience.previous_classes) == set(ORDER[:begin])
            assert set(experience.future_classes) == set(ORDER[begin + SIZES[position] :])
            assert experience.task_label == 0
            assert list(experience.dataset.targets) == [sample[1] for sample in experience.dataset]
            for x, y, task in experience.dataset:
                assert x[0] == y and y in classes and x[2] == offset and task == 0
                seen.append(int(x[1]))
        assert sorted(seen) == list(range(len(seen)))
        start += len(seen)
    assert start == 28 + 7 + 14
    assert stream.class_order == ORDER and stream.task_sizes == SIZES and stream.num_classes == 7
    assert stream.train is stream.benchmark.train_stream and stream.valid is stream.benchmark.valid_stream


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (6, 1), (1, 6)])
def test_extreme_sizes(sizes):
    stream = make(task_sizes=sizes)
    assert [len(e.classes_in_this_experience) for e in stream.test] == list(sizes)
    assert sum(len(e.dataset) for e in stream.train) == 28


def test_transform_groups_switch_and_start_where_they_belong():
    stream = make(train_transform=add_ten, eval_transform=add_hundred)
    for part in (stream.train, stream.valid, stream.test):
        for experience in part:
            data = experience.dataset
            trained, evaluated = data.train()[0][0], data.eval()[0][0]
            assert torch.equal(trained + 90, evaluated)
            assert torch.equal(data[0][0], trained if part is stream.train else evaluated)
            assert torch.equal(data.train().eval().train()[0][0], trained)
            assert torch.equal(data.eval().subset([0])[0][0], evaluated)


def test_one_transform_alone_leaves_the_other_group_untouched():
    data = make(eval_transform=add_hundred).train[0].dataset
    assert torch.equal(data.train()[0][0] + 100, data.eval()[0][0])
    data = make(train_transform=add_ten).train[0].dataset
    assert torch.equal(data.train()[0][0], data.eval()[0][0] + 10)


def test_without_validation_data_there_is_no_validation_stream():
    stream = make(valid=None)
    assert stream.valid is None and set(stream.benchmark.streams) == {"train", "test"}
    assert stream.joint().valid is None


def test_joint_holds_everything_once_and_keeps_the_other_streams():
    stream = make(train_transform=add_ten, eval_transform=add_hundred)
    joint = stream.joint()
    assert joint.task_sizes == (7,) and joint.class_order == ORDER and joint.fingerprint == stream.fingerprint
    assert joint.test is stream.test and joint.valid is stream.valid and len(joint.train) == 1
    (experience,) = joint.train
    assert set(experience.classes_in_this_experience) == set(range(7)) and not experience.previous_classes
    assert experience.current_experience == 0 and experience.task_label == 0
    assert sorted(int(x[1]) - 10 for x, _, _ in experience.dataset) == list(range(28))
    assert all(x[0] == y + 10 for x, y, _ in experience.dataset)
    assert all(x[0] == y + 100 for x, y, _ in experience.dataset.eval())
    assert len(stream.train) == 4  # the original is as it was
    assert [e.current_experience for e in stream.train] == [0, 1, 2, 3]
    assert set(joint.joint().train[0].classes_in_this_experience) == set(range(7))


def test_building_touches_no_random_state_and_no_argument():
    order, sizes = list(ORDER), list(SIZES)
    before = rng_state()
    stream = make(class_order=order, task_sizes=sizes)
    stream.joint()
    assert rng_state() == before
    assert order == list(ORDER) and sizes == list(SIZES)


def test_experiences_reach_loader_workers():
    stream = make(train_transform=add_ten, eval_transform=add_hundred)
    data = pickle.loads(pickle.dumps(stream.train[0].dataset))
    assert torch.equal(data.eval()[3][0], stream.train[0].dataset.eval()[3][0])
    loader = DataLoader(stream.train[0].dataset, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert sum(len(x) for x, _, _ in loader) == len(stream.train[0].dataset)


def test_build_stream_refuses_what_does_not_fit():
    with pytest.raises(StreamError, match="cover the 7 classes"):
        make(task_sizes=(3, 3))
    with pytest.raises(StreamError, match="cover the 7 classes"):
        make(class_order=(0, 1, 2, 3, 4, 5, 5))
    with pytest.raises(StreamError, match=r"test data must hold exactly the classes 0\.\.6; see 6"):
        make(test=Marked([1] * 6, 2))
    with pytest.raises(StreamError, match=r"valid data must hold exactly .* see 7"):
        make(valid=Marked([1] * 8, 2))


def test_digest_keeps_parts_apart():
    def digest(*parts):
        d = Digest()
        for name, value in parts:
            d.add(name, value)
        return d.hexdigest()

    array = np.arange(6)
    assert digest(("a", array)) == digest(("a", array.copy()))
    assert digest(("a", array)) == digest(("a", array.astype(">i8")))
    assert digest(("a", array[::2])) == digest(("a", array[::2].copy()))
    different = [
        [("a", array)],
        [("b", array)],
        [("a", array.reshape(2, 3))],
        [("a", array.astype(np.int32))],
        [("a", "xy"), ("b", "z")],
        [("a", "x"), ("b", "yz")],
        [("a", b"xyb"), ("b", "z")],
    ]
    assert len({digest(*parts) for parts in different}) == len(different)
