"""Avalanche's own benchmarks, passed through."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    classic,
    nc_benchmark,
    ni_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.datasets import TinyImagenet
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream, cut_benchmark, wrap_benchmark
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, stratified_split
from avalanche_firn.evaluation.metrics import ResultMatrixMetric


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


def modern():
    parts = {part: tensor_data(n, seed=n) for part, n in (("train", 24), ("test", 12))}
    return with_task_labels(
        class_incremental_benchmark(parts, class_order=[5, 2, 0, 4, 1, 3], num_classes_per_exp=[2, 2, 2])
    )


def samples(experiences):
    """Every sample as plain values, in the order of the data."""
    return [[(*x.tolist(), int(y), *map(int, t)) for x, y, *t in e.dataset] for e in experiences]


@pytest.mark.parametrize("build", [legacy, modern])
def test_validation_part(build):
    whole = wrap_benchmark("b", build())
    stream = cut_benchmark("b", build(), validation_fraction=0.25, split_seed=3)
    assert list(stream.benchmark.streams) == ["train", "valid", "test"]
    assert (stream.class_order, stream.task_sizes) == (whole.class_order, whole.task_sizes)
    assert samples(stream.test) == samples(whole.test)
    for i, (before, train, valid) in enumerate(zip(whole.train, stream.train, stream.valid, strict=True)):
        labels = [int(y) for y in before.dataset.targets]
        split = stratified_split(labels, validation_fraction=0.25, test_fraction=0, seed=3)
        rows = samples([before])[0]
        assert samples([train])[0] == [rows[j] for j in split.train]
        assert samples([valid])[0] == [rows[j] for j in split.valid] and len(split.valid) == 2
        for part, experience in (("train", train), ("valid", valid)):
            assert experience.current_experience == i and experience.origin_stream.name == part
            assert experience.origin_stream is stream.benchmark.streams[part]
            assert experience.classes_in_this_experience == set(whole.class_order[2 * i : 2 * i + 2])
            assert experience.previous_classes == set(whole.class_order[: 2 * i])
            assert experience.task_label == 0


def test_the_benchmark_itself_is_left_alone():
    benchmark = legacy()
    before = samples(benchmark.streams["train"]), samples(benchmark.streams["test"])
    cut_benchmark("b", benchmark, validation_fraction=0.5, first_experiences=1)
    assert (samples(benchmark.streams["train"]), samples(benchmark.streams["test"])) == before
    assert list(benchmark.streams) == ["train", "test"]
    assert cut_benchmark("b", benchmark).benchmark is benchmark
    assert cut_benchmark("b", benchmark, first_experiences=3).benchmark is benchmark


@pytest.mark.parametrize("build", [legacy, modern])
def test_first_experiences(build):
    whole = wrap_benchmark("b", build())
    stream = cut_benchmark("b", build(), first_experiences=2)
    assert stream.task_sizes == (2, 2) and stream.class_order == whole.class_order[:4] and stream.valid is None
    assert stream.class_names == whole.class_names  # class 5 is still class 5
    assert samples(stream.train) == samples(whole.train[:2]) and samples(stream.test) == samples(whole.test[:2])
    assert stream.train[1].future_classes == set()


def test_task_labels_of_a_task_incremental_benchmark_stay():
    stream = cut_benchmark("b", legacy(task_labels=True), validation_fraction=0.5)
    for part in (stream.train, stream.valid, stream.test):
        assert [experience.task_label for experience in part] == [0, 1, 2]
        assert [{t for _, _, t in experience.dataset} for experience in part] == [{0}, {1}, {2}]


def test_transforms_follow_the_part():
    options = {"train_transform": lambda x: x * 0 + 1, "eval_transform": lambda x: x * 0 + 2}
    stream = cut_benchmark("b", legacy(**options), validation_fraction=0.5)
    for part, own in (("train", 1), ("valid", 2), ("test", 2)):
        for experience in stream.benchmark.streams[part]:
            assert {float(x[0]) for x, *_ in experience.dataset} == {own}
            assert {float(x[0]) for x, *_ in experience.dataset.train()} == {1}
            assert {float(x[0]) for x, *_ in experience.dataset.eval()} == {2}


def test_targets_that_are_a_tensor():
    train, test = tensor_data(), tensor_data(12, seed=1)
    train.targets, test.targets = torch.tensor(train.targets), torch.tensor(test.targets)
    benchmark = nc_benchmark(train, test, n_experiences=3, task_labels=False, fixed_class_order=[5, 2, 0, 4, 1, 3])
    stream = cut_benchmark("b", benchmark, validation_fraction=0.25, first_experiences=2)
    assert [set(e.classes_in_this_experience) for e in stream.valid] == [{5, 2}, {0, 4}]
    assert stream.fingerprint == cut_benchmark("b", legacy(), validation_fraction=0.25, first_experiences=2).fingerprint


def test_fingerprint_covers_the_cut():
    def fingerprint(**options):
        return cut_benchmark("b", legacy(), **options).fingerprint

    base = fingerprint(validation_fraction=0.25)
    assert base == fingerprint(validation_fraction=0.25)
    others = [
        fingerprint(),
        fingerprint(validation_fraction=0.5),
        fingerprint(validation_fraction=0.25, split_seed=1),
        fingerprint(validation_fraction=0.25, first_experiences=2),
        fingerprint(first_experiences=2),
        fingerprint(first_experiences=1),
    ]
    assert len({base, *others}) == 7


@pytest.mark.parametrize("build", [legacy, modern])
def test_naive_trains_and_the_matrix_follows_the_validation_stream(build):
    torch.manual_seed(0)
    stream = cut_benchmark("b", build(), validation_fraction=0.25, first_experiences=2)
    metric = ResultMatrixMetric(stream="valid", image=False)
    model = torch.nn.Linear(3, 6)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=2,
        eval_mb_size=4,
        evaluator=EvaluationPlugin(metric, loggers=[]),
    )
    for experience in stream.train:
        strategy.train(experience)
        strategy.eval(stream.valid)
        strategy.eval(stream.test)  # another stream: not counted
    values = metric.result().accuracy
    assert values.shape == (2, 2) and np.isfinite(values).all()
    images = torch.stack([x for x, *_ in stream.valid[1].dataset])
    labels = torch.tensor([int(y) for _, y, _ in stream.valid[1].dataset])
    with torch.no_grad():
        assert values[1, 1] == pytest.approx(float((model(images).argmax(1) == labels).float().mean()))


def test_cut_refuses():
    cases = [
        (dict(first_experiences=0), "first_experiences is 0; accepted: None or 1..3 for 'b'"),
        (dict(first_experiences=4), "first_experiences is 4; accepted: None or 1..3 for 'b'"),
        (dict(first_experiences=True), "first_experiences is True"),
        (dict(validation_fraction=1.0), "validation_fraction is 1.0; accepted: 0 <= fraction < 1"),
        (dict(validation_fraction=0.5, split_seed=-1), "seed of the split is -1"),
    ]
    for options, message in cases:
        with pytest.raises(StreamError, match=message.replace(".", r"\.")):
            cut_benchmark("b", legacy(), **options)
    once = cut_benchmark("b", legacy(), validation_fraction=0.25)
    with pytest.raises(StreamError, match="'b' has a validation stream already; accepted: 0"):
        cut_benchmark("b", once.benchmark, validation_fraction=0.25)
    again = cut_benchmark("b", once.benchmark, first_experiences=2)
    assert [len(again.train), len(again.valid), len(again.test)] == [2, 2, 2]
    single = ni_benchmark(tensor_data(120), tensor_data(12), n_experiences=2, task_labels=False, seed=0)
    with pytest.raises(StreamError, match=r"the streams of 'n' have \{'train': 2, 'test': 1\} experiences"):
        cut_benchmark("n", single, first_experiences=1)
    held_out = cut_benchmark("n", single, validation_fraction=0.25)
    assert [len(held_out.train), len(held_out.valid), len(held_out.test)] == [2, 2, 1]


def test_wrong_fractions_are_refused_before_the_data_is_read(monkeypatch):
    monkeypatch.setattr(classic, "SplitMNIST", lambda **options: pytest.fail("the data was read"))
    with pytest.raises(StreamError, match=r"validation_fraction is 1\.5"):
        avalanche_stream("SplitMNIST", n_experiences=5, validation_fraction=1.5)
    with pytest.raises(StreamError, match="seed of the split is None"):
        avalanche_stream("SplitMNIST", n_experiences=5, split_seed=None)


def test_the_same_images_are_held_out_of_every_domain():
    domains = [as_classification_dataset(tensor_data()) for _ in range(3)]
    benchmark = with_classes_timeline(benchmark_from_datasets(train=domains, test=domains))
    stream = cut_benchmark("d", benchmark, validation_fraction=0.25, split_seed=5)
    first, *others = samples(stream.valid)
    assert others == [first, first] and len(first) == 6
    assert stream.num_classes == 6 and stream.task_sizes == (6, 6, 6)
    two = cut_benchmark("d", benchmark, first_experiences=2)
    assert two.num_classes == 6 and two.task_sizes == (6, 6)


def test_joint_keeps_the_validation_stream():
    stream = cut_benchmark("b", legacy(), validation_fraction=0.25)
    joint = stream.joint()
    assert isinstance(joint, Stream) and joint.valid is stream.valid
    assert sorted(samples(joint.train)[0]) == sorted(row for rows in samples(stream.train) for row in rows)


def test_own_arguments_don_t_collide_with_avalanche_s():
    own = {p.name for p in inspect.signature(avalanche_stream).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert own == {"validation_fraction", "split_seed", "first_experiences"}
    for name in avalanche_benchmarks():
        assert not own & set(inspect.signature(getattr(classic, name)).parameters), name


def test_avalanche_stream_cuts(monkeypatch):
    monkeypatch.setattr(classic, "SplitMNIST", lambda n_experiences: legacy(n_experiences=n_experiences))
    options = dict(validation_fraction=0.25, split_seed=2, first_experiences=2)
    stream = avalanche_stream("SplitMNIST", n_experiences=3, **options)
    direct = cut_benchmark("SplitMNIST", legacy(n_experiences=3), **options)
    for field in fields(Stream):
        if field.name != "benchmark":
            assert getattr(stream, field.name) == getattr(direct, field.name), field.name


def test_tiny_imagenet_files_are_sorted(tmp_path, monkeypatch):
    root = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{i:03d}" for i in range(200)]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    annotations = []
    for i, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for k in range(3 if i < 8 else 1):
            Image.new("RGB", (4, 4), (i, 60 * k, 0)).save(folder / f"{wnid}_{k}.JPEG", quality=100)
        annotations.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t1\t1")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / "val" / "images" / f"val_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations) + "\n")
    listed = TinyImagenet.get_train_images_paths
    streams = []
    for backwards in (False, True):
        monkeypatch.setattr(
            TinyImagenet,
            "get_train_images_paths",
            lambda self, name, backwards=backwards: sorted(listed(self, name), reverse=backwards),
        )
        options = dict(n_experiences=25, fixed_class_order=list(range(200)), dataset_root=tmp_path)
        streams.append(avalanche_stream("SplitTinyImageNet", first_experiences=1, validation_fraction=0.3, **options))
    first, second = streams
    assert first.task_sizes == (8,) and len(first.train[0].dataset) == 16 and len(first.valid[0].dataset) == 8
    assert first.fingerprint == second.fingerprint
    for a, b in zip(first.train[0].dataset.eval(), second.train[0].dataset.eval(), strict=True):
        assert a[1] == b[1] and torch.equal(a[0], b[0])
