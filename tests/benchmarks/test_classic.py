"""Avalanche's own benchmarks, passed through."""

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, classic, nc_benchmark, with_task_labels
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream, wrap_benchmark
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.streams import StreamError


def tensor_data(count=24, classes=6, seed=0):
    y = torch.arange(count) % classes
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + y[:, None]
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return data


def legacy(**options):
    settings = {"n_experiences": 3, "task_labels": False, "fixed_class_order": [5, 2, 0, 4, 1, 3]} | options
    return nc_benchmark(tensor_data(), tensor_data(12, seed=1), **settings)


def test_legacy_benchmark_is_described_and_untouched():
    benchmark = legacy()
    stream = wrap_benchmark("legacy", benchmark)
    assert stream.benchmark is benchmark and stream.train is benchmark.streams["train"] and stream.valid is None
    assert stream.class_order == (5, 2, 0, 4, 1, 3) and stream.task_sizes == (2, 2, 2) and stream.num_classes == 6
    assert stream.class_names == tuple("012345")
    for position, experience in enumerate(stream.train):
        classes = set(stream.class_order[2 * position : 2 * position + 2])
        assert set(experience.classes_in_this_experience) == classes
        assert {y for _, y, _ in experience.dataset} == classes


def test_legacy_unequal_sizes_and_remapped_labels():
    benchmark = legacy(n_experiences=2, per_exp_classes={0: 4, 1: 2}, class_ids_from_zero_from_first_exp=True)
    stream = wrap_benchmark("remapped", benchmark)
    assert stream.task_sizes == (4, 2) and stream.class_order == (0, 1, 2, 3, 4, 5)
    assert {y for _, y, _ in stream.train[0].dataset} == {0, 1, 2, 3}


def test_task_incremental_and_domain_incremental_repeat_classes():
    stream = wrap_benchmark("tasks", legacy(task_labels=True, class_ids_from_zero_in_each_exp=True))
    assert stream.task_sizes == (2, 2, 2) and stream.class_order == (0, 1) and stream.num_classes == 2


@pytest.mark.parametrize("labels", [False, True])
def test_modern_benchmark(labels):
    parts = {part: tensor_data(n, seed=n) for part, n in (("train", 24), ("valid", 6), ("test", 12))}
    if not labels:
        parts = {part: as_classification_dataset(data) for part, data in parts.items()}
    benchmark = class_incremental_benchmark(parts, class_order=[4, 1, 0, 5, 3, 2], num_classes_per_exp=[3, 1, 2])
    benchmark = with_task_labels(benchmark) if labels else benchmark
    stream = wrap_benchmark("modern", benchmark)
    assert stream.task_sizes == (3, 1, 2) and stream.class_order == (0, 1, 4, 5, 2, 3)  # ascending inside a task
    assert stream.valid is benchmark.valid_stream
    joint = stream.joint()
    assert sorted(joint.train[0].dataset.targets) == sorted(parts["train"].targets)
    assert joint.test is benchmark.test_stream and hasattr(joint.train[0], "task_label") is labels


def test_joint_of_a_legacy_benchmark():
    stream = wrap_benchmark("legacy", legacy())
    joint = stream.joint()
    (experience,) = joint.train
    assert set(experience.classes_in_this_experience) == set(range(6)) and experience.task_label == 0
    found = sorted((round(float(x[0]), 4), y) for x, y, _ in experience.dataset)
    assert found == sorted((round(float(x[0]), 4), int(y)) for x, y in tensor_data())
    assert joint.test is stream.benchmark.streams["test"] and joint.task_sizes == (6,)


def test_fingerprint_sees_labels_and_images():
    def fingerprint(train, name="a", **options):
        settings = {"n_experiences": 3, "task_labels": False, "fixed_class_order": list(range(6))} | options
        return wrap_benchmark(name, nc_benchmark(train, tensor_data(12), **settings)).fingerprint

    base = fingerprint(tensor_data())
    assert fingerprint(tensor_data()) == base
    others = [
        fingerprint(tensor_data(seed=3)),
        fingerprint(tensor_data(30)),
        fingerprint(tensor_data(), fixed_class_order=[1, 0, 2, 3, 4, 5], n_experiences=6),
        fingerprint(tensor_data(), n_experiences=2),
    ]
    assert len({base, *others}) == 5


def test_random_evaluation_transforms_do_not_enter_the_fingerprint():
    def noisy(x):
        return x + torch.rand(())

    first, second = (wrap_benchmark("n", legacy(train_transform=noisy, eval_transform=noisy)) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_wrapping_our_own_stream_gives_the_same_facts():
    ours = digits_stream(image_size=8, seed=1993, tasks=[3, 3, 4])
    wrapped = wrap_benchmark("digits", ours.benchmark)
    assert wrapped.task_sizes == ours.task_sizes
    for begin, size in zip(np.cumsum([0, 3, 3]), ours.task_sizes, strict=True):
        assert set(wrapped.class_order[begin : begin + size]) == set(ours.class_order[begin : begin + size])


def test_avalanche_stream_passes_arguments_through(monkeypatch):
    calls = []

    def fake(n_experiences, *, seed=None):
        calls.append((n_experiences, seed))
        return legacy(n_experiences=n_experiences)

    monkeypatch.setattr(classic, "SplitMNIST", fake)
    stream = avalanche_stream("SplitMNIST", n_experiences=2, seed=4)
    assert calls == [(2, 4)] and stream.name == "SplitMNIST" and stream.task_sizes == (3, 3)


def test_known_names_and_unknown_ones():
    known = avalanche_benchmarks()
    expected = {"SplitMNIST", "SplitCIFAR10", "SplitCIFAR100", "SplitTinyImageNet", "SplitCUB200", "PermutedMNIST"}
    assert expected <= set(known) and "CLEARMetric" not in known and not [n for n in known if n.startswith("ExML")]
    with pytest.raises(StreamError, match=r"'SplitCifar100' is unknown; nearest: SplitCIFAR100"):
        avalanche_stream("SplitCifar100")
    with pytest.raises(StreamError, match=r"'xyzzy' is unknown; accepted: CLEAR, "):
        avalanche_stream("xyzzy")


def test_refuses_what_is_no_classification_benchmark():
    with pytest.raises(StreamError, match=r"has the streams \[\]"):
        wrap_benchmark("nothing", object())

    class Experience:
        dataset = None

    class Benchmark:
        streams = {"train": [Experience()], "test": []}  # noqa: RUF012

    with pytest.raises(StreamError, match="experience 0 of the train stream of 'x' has no dataset with targets"):
        wrap_benchmark("x", Benchmark())
    Benchmark.streams["train"] = []
    with pytest.raises(StreamError, match="empty training stream"):
        wrap_benchmark("x", Benchmark())
