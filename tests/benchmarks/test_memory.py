"""Streams held in memory: the same samples, decoded once."""

import copy
import json
import pickle
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import concat_datasets, make_avalanche_dataset
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.benchmarks.utils.transform_groups import DefaultTransformGroups
from avalanche.training import Naive
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from avalanche_firn.benchmarks import memory
from avalanche_firn.benchmarks.batches import batched
from avalanche_firn.benchmarks.classic import cut_benchmark, wrap_benchmark
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.domains import domain_folder_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.image_store import ImageStore, Place, decode
from avalanche_firn.benchmarks.memory import MemoryReport, hold_in_memory
from avalanche_firn.benchmarks.streams import StreamError, build_stream
from avalanche_firn.benchmarks.transforms import TransformPair, preset_transforms

CLASSES = ("ant", "bee", "cow", "dog")
CO2L = preset_transforms("co2l_cifar")
UCL = preset_transforms("ucl_cifar")


def write(folder, count, seed, *, size=None, grey=False, extension="png"):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.RandomState(seed)
    for number in range(count):
        height, width = size or (20 + generator.randint(20), 20 + generator.randint(20))
        pixels = generator.randint(0, 256, (height, width, 1 if grey else 3), dtype=np.uint8)
        Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).copy()).save(folder / f"{number}.{extension}")


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(CLASSES):
        write(tmp_path / "animals" / name, 10, seed, extension="jpg" if seed % 2 else "png")
    return tmp_path / "animals"


def build(root, pair=UCL, **options):
    return folder_stream(root, tasks=2, train_transform=pair.train, eval_transform=pair.eval, **options)


def streams_of(stream):
    return dict(stream.benchmark.streams)


def assert_same_facts(held, stream):
    for field in ("name", "class_order", "task_sizes", "class_names", "fingerprint"):
        assert getattr(held, field) == getattr(stream, field)
    assert type(held.benchmark) is type(stream.benchmark) and list(streams_of(held)) == list(streams_of(stream))
    for part, ours in streams_of(held).items():
        theirs = streams_of(stream)[part]
        assert len(ours) == len(theirs) and getattr(held.benchmark, f"{part}_stream") is ours
        for one, other in zip(ours, theirs, strict=True):
            assert one.current_experience == other.current_experience
            assert one.origin_stream.name == part and len(one.origin_stream) == len(theirs)
            assert one.classes_in_this_experience == other.classes_in_this_experience
            assert getattr(one, "task_label", None) == getattr(other, "task_label", None)
            assert list(one.dataset.targets) == list(other.dataset.targets)
            assert list(one.dataset.targets_task_labels) == list(other.dataset.targets_task_labels)
            mine, original = one.dataset._flat_data, other.dataset._flat_data
            assert mine._transform_groups.current_group == original._transform_groups.current_group


def assert_same_samples(ours, theirs):
    """To the bit, with the random numbers that both draw."""
    assert len(ours) == len(theirs)
    for i in range(len(theirs)):
        torch.manual_seed(i)
        random.seed(i)
        x, y, *t = ours[i]
        torch.manual_seed(i)
        random.seed(i)
        expected, label, *task = theirs[i]
        assert torch.equal(x, expected) and x.dtype == expected.dtype and x.device.type == "cpu"
        assert int(y) == int(label) and type(y) is type(label) and t == task


def assert_equal_streams(held, stream):
    assert_same_facts(held, stream)
    for part, ours in streams_of(held).items():
        for one, other in zip(ours, streams_of(stream)[part], strict=True):
            # `assert_same_facts` has seen that the group in which they come is the same
            assert_same_samples(one.dataset.train(), other.dataset.train())
            assert_same_samples(one.dataset.eval(), other.dataset.eval())


def bottom(dataset):
    """The data set at the bottom, the transform groups right above it, and the rows of a data set of one leaf."""
    node, rows, groups = dataset._flat_data, np.arange(len(dataset)), None
    while hasattr(node, "_datasets"):
        if node._indices is not None:
            rows = np.fromiter(node._indices, dtype=np.int64)[rows]
        groups = node._transform_groups
        (node,) = node._datasets
    return node, groups, rows


def whole_batch(dataset, group):
    leaf, groups, rows = bottom(dataset)
    x, y = leaf.batch(torch.from_numpy(rows))
    return groups[group].transforms[0].batch(x), y


# ---------------------------------------------------------------- exact


def test_folder_with_a_random_training_transform(root):
    stream = build(root)
    held, report = hold_in_memory(stream)
    assert report.parts == {
        "train/train": "files",
        "train/eval": "cpu",
        "valid/eval": "cpu",
        "test/eval": "cpu",
    }
    assert report.bytes == 40 * 3 * 32 * 32
    assert_equal_streams(held, stream)


@pytest.mark.parametrize("pair", [CO2L, TransformPair(UCL.eval, CO2L.eval)])
def test_folder_with_a_deterministic_training_transform(root, pair):
    stream = build(root, pair, validation_fraction=0)
    held, report = hold_in_memory(stream)
    assert report == MemoryReport({"train/train": "cpu", "train/eval": "cpu", "test/eval": "cpu"}, 40 * 3 * 32 * 32)
    assert_equal_streams(held, stream)
    for experience in held.train:
        for group in ("train", "eval"):
            x, y = whole_batch(experience.dataset, group)
            data = experience.dataset.with_transforms(group)
            assert torch.equal(x, torch.stack([data[i][0] for i in range(len(data))]))
            assert y.dtype == torch.int64 and y.tolist() == list(data.targets)


def test_stream_is_not_changed_and_files_are_read_once(root, monkeypatch):
    stream = build(root, CO2L)
    before = [e.dataset._flat_data for e in stream.train]
    held, _ = hold_in_memory(stream)
    assert all(a is e.dataset._flat_data for a, e in zip(before, stream.train, strict=True))
    assert bottom(stream.train[0].dataset)[0] is not bottom(held.train[0].dataset)[0]
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a file was opened"))
    held.train[0].dataset[0]
    held.test[1].dataset[3]


def test_the_global_generators_are_left_alone(root):
    rotation = transforms.Compose([transforms.Resize((8, 8)), transforms.RandomRotation((9, 9)), transforms.ToTensor()])
    stream = build(root, TransformPair(rotation, rotation))
    torch.manual_seed(4)
    random.seed(4)
    expected = torch.rand(1), random.random()
    torch.manual_seed(4)
    random.seed(4)
    held, report = hold_in_memory(stream)
    assert (torch.rand(1), random.random()) == expected and report.parts["train/train"] == "cpu"
    assert_same_samples(held.train[0].dataset, stream.train[0].dataset)


@pytest.mark.filterwarnings("ignore:Concatenated datasets have different transformation groups")
def test_subset_concat_joint_and_freeze(root):
    stream = build(root)
    held, _ = hold_in_memory(stream)
    for ours, theirs in (
        (held.joint().train[0].dataset, stream.joint().train[0].dataset),
        (held.train[0].dataset.subset([3, 1, 1]), stream.train[0].dataset.subset([3, 1, 1])),
        (held.train[0].dataset.eval().subset([2]), stream.train[0].dataset.eval().subset([2])),
        (held.train[1].dataset.freeze_transforms(), stream.train[1].dataset.freeze_transforms()),
        (
            concat_datasets([held.train[0].dataset, held.train[1].dataset.subset([0, 4])]),
            concat_datasets([stream.train[0].dataset, stream.train[1].dataset.subset([0, 4])]),
        ),
        (
            held.train[0].dataset.eval().concat(held.test[0].dataset),
            stream.train[0].dataset.eval().concat(stream.test[0].dataset),
        ),
    ):
        assert_same_samples(ours, theirs)
        assert_same_samples(ours.eval(), theirs.eval())
    joint = held.joint().train[0].dataset
    assert len(joint._flat_data._datasets) == 1, "the experiences share one data set, as before"
    assert_same_facts(held.joint(), stream.joint())


def test_streams_of_concatenated_experiences(root):
    whole = build(root, CO2L)
    both = [concat_datasets([whole.train[0].dataset, whole.train[1].dataset.subset([5, 0])]), whole.train[1].dataset]
    benchmark = benchmark_from_datasets(train=both, test=[e.dataset for e in whole.test])
    stream = wrap_benchmark("both", benchmark)
    held, report = hold_in_memory(stream)
    assert set(report.parts.values()) == {"cpu"}
    for ours, theirs in ((held.train, stream.train), (held.test, stream.test)):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_samples(one.dataset, other.dataset)


def test_only_rows_in_use_are_held(root):
    stream = cut_benchmark("cut", build(root, CO2L, validation_fraction=0).benchmark, first_experiences=1)
    held, report = hold_in_memory(stream)
    assert report.bytes == 20 * 3 * 32 * 32
    assert_equal_streams(held, stream)
    leaf, groups, rows = bottom(held.train[0].dataset)
    others = sorted(set(range(len(leaf))) - set(rows.tolist()))
    with pytest.raises(IndexError):
        groups["train"].transforms[0](others[0])


def test_domains(tmp_path):
    for domain in ("clip", "real"):
        for seed, name in enumerate(CLASSES):
            write(tmp_path / domain / name, 6, seed + 7 * len(domain), grey=domain == "clip")
    stream = domain_folder_stream(
        tmp_path, domains=["clip", "real"], train_transform=UCL.train, eval_transform=UCL.eval
    )
    held, report = hold_in_memory(stream)
    assert report.parts["train/eval"] == "cpu" and report.bytes == 24 * 32 * 32 + 24 * 3 * 32 * 32  # clip is grey
    assert_equal_streams(held, stream)


def test_grey_images_take_one_channel_until_the_first_coloured_one(tmp_path):
    shade = TransformPair(*(transforms.Compose([transforms.Resize((5, 5)), transforms.ToTensor()]) for _ in range(2)))
    for seed, name in enumerate(CLASSES):
        write(tmp_path / "grey" / name, 5, seed, grey=True)
    stream = build(tmp_path / "grey", shade)
    held, report = hold_in_memory(stream)
    assert report.bytes == 20 * 25 and held.train[0].dataset[0][0].shape == (3, 5, 5)
    assert_equal_streams(held, stream)
    images = [torch.full((3, 2, 2), i % 251, dtype=torch.uint8) for i in range(600)]
    images[520][1] = 7

    class Listed(Dataset):
        def __getitem__(self, i):
            return images[i], 0

    arguments = (Listed(), [0] * 600, np.arange(600), [lambda image: image], [Place(torch.device("cpu"))])
    (store,) = decode(*arguments, label="", quiet=True)
    assert store.images.shape == (600, 3, 2, 2) and torch.equal(store.gather(torch.arange(600)), torch.stack(images))


@pytest.mark.parametrize("task_labels", [False, True])
def test_first_generation_benchmarks(task_labels):
    benchmark = nc_benchmark(
        Pictures(),
        Pictures(12),
        n_experiences=2,
        task_labels=task_labels,
        class_ids_from_zero_in_each_exp=task_labels,
        fixed_class_order=[2, 0, 3, 1],
        train_transform=UCL.train,
        eval_transform=UCL.eval,
    )
    stream = wrap_benchmark("pictures", benchmark)
    held, report = hold_in_memory(stream)
    assert report.parts == {"train/train": "files", "train/eval": "cpu", "test/eval": "cpu"}
    assert_equal_streams(held, stream)
    assert held.benchmark.classes_order == benchmark.classes_order and held.train[0].benchmark is held.benchmark
    cut = cut_benchmark("pictures", benchmark, validation_fraction=0.25)
    held, report = hold_in_memory(cut)
    assert report.parts["valid/eval"] == "cpu"
    assert_equal_streams(held, cut)


class Pictures(Dataset):
    def __init__(self, count=24, size=(20, 24), classes=4, targets=None):
        self.targets = [i % classes for i in range(count)] if targets is None else targets
        self.sizes = [size] * count if isinstance(size, tuple) else size

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        pixels = np.random.RandomState(index).randint(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.targets[index]


def pictures(pair=UCL, **options):
    facts = {"class_order": [0, 1, 2, 3], "task_sizes": [2, 2], "class_names": list("abcd"), "fingerprint": "f" * 64}
    data = {"train": Pictures(**options), "test": Pictures(12, options.get("size", (20, 24))[:2])}
    return build_stream("pictures", **data, **facts, train_transform=pair.train, eval_transform=pair.eval)


def test_rotations_frozen_below_the_transforms():
    # as Avalanche's RotatedMNIST: the same images under other angles
    data, benchmark = Pictures(), []
    for angle in (10, 50):
        frozen = DefaultTransformGroups((transforms.RandomRotation((angle, angle)), None))
        benchmark.append(
            make_avalanche_dataset(_make_taskaware_classification_dataset(data), frozen_transform_groups=frozen)
        )
    benchmark = nc_benchmark(
        benchmark,
        benchmark,
        n_experiences=2,
        task_labels=False,
        shuffle=False,
        one_dataset_per_exp=True,
        class_ids_from_zero_in_each_exp=True,
        train_transform=CO2L.train,
        eval_transform=CO2L.eval,
    )
    stream = wrap_benchmark("rotated", benchmark)
    held, report = hold_in_memory(stream)
    assert set(report.parts.values()) == {"cpu"} and report.bytes == 2 * 2 * 24 * 3 * 32 * 32
    assert_equal_streams(held, stream)
    assert not torch.equal(held.test[0].dataset[0][0], held.test[1].dataset[0][0])


def test_without_a_fingerprint_nothing_is_taken_for_the_same(tmp_path):
    class Others(Pictures):
        def __getitem__(self, index):  # the first image is the same
            image, label = super().__getitem__(index)
            return image if index == 0 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label

    def stream(kind):
        facts = {"class_order": [0, 1, 2, 3], "task_sizes": [2, 2], "class_names": list("abcd"), "fingerprint": ""}
        return build_stream(
            "s", train=kind(), test=kind(), **facts, train_transform=CO2L.eval, eval_transform=CO2L.eval
        )

    cache = {}
    for options in ({"cache": cache}, {"folder": tmp_path, "limit_bytes": 0}):
        for kind in (Pictures, Others):
            held, _ = hold_in_memory(stream(kind), **options)
            assert_equal_streams(held, stream(kind))
    assert not cache


def unknown(image):
    return transforms.functional.pil_to_tensor(image).float()


def test_what_is_not_understood_stays(root):
    cases = [
        build(root, TransformPair(unknown, unknown)),
        wrap_benchmark("tensors", nc_benchmark(tensors(), tensors(), 2, False)),
        wrap_benchmark("both", nc_benchmark(Pictures(), Pictures(), 2, False, train_transform=Both())),
        build(root, TransformPair(transforms.ToTensor(), transforms.ToTensor())),  # images of many sizes
    ]
    for stream in cases:
        held, report = hold_in_memory(stream)
        assert held is stream and set(report.parts.values()) == {"unchanged"} and report.bytes == 0
    half = build(root, TransformPair(unknown, CO2L.eval))
    held, report = hold_in_memory(half)
    assert report.parts["train/train"] == "files" and report.parts["train/eval"] == "cpu"
    assert_equal_streams(held, half)


class Both:
    """Not a transform of the image alone."""

    min_params = max_params = 2

    def __call__(self, x, y):
        return transforms.functional.to_tensor(x), y


def tensors():
    data = TensorDataset(torch.randn(24, 3, 4, 4), torch.arange(24) % 4)
    data.targets = data.tensors[1].tolist()
    return data


def test_labels_that_differ_from_the_targets_leave_the_data_alone():
    liar = Pictures()
    liar.targets = [(c + 1) % 4 for c in liar.targets]
    liar.__class__ = type("Liar", (Pictures,), {"__getitem__": lambda self, i: (Pictures()[i][0], i % 4)})
    stream = build_stream(
        "liar",
        train=liar,
        test=Pictures(12),
        class_order=[0, 1, 2, 3],
        task_sizes=[4],
        class_names=list("abcd"),
        fingerprint="0",
        train_transform=CO2L.train,
        eval_transform=CO2L.eval,
    )
    held, report = hold_in_memory(stream)
    assert report.parts == {"train/train": "unchanged", "train/eval": "unchanged", "test/eval": "cpu"}
    assert_same_samples(held.train[0].dataset, stream.train[0].dataset)


def test_digits_are_left_alone_on_the_cpu():
    stream = digits_stream(image_size=8, tasks=2)
    held, report = hold_in_memory(stream)
    assert held is stream and set(report.parts.values()) == {"unchanged"}


def test_a_corrupt_file_is_named(root):
    stream = build(root)
    broken = root / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200] + b"\0" * 50)
    with pytest.raises(StreamError, match=r"bee/3\.jpg cannot be decoded"):
        hold_in_memory(stream)


def test_other_data_sets_name_the_row():
    class Broken(Pictures):
        def __getitem__(self, index):
            if index == 7:
                raise RuntimeError("no such image")
            return super().__getitem__(index)

    benchmark = nc_benchmark(Broken(), Pictures(), 2, False, train_transform=CO2L.train, eval_transform=CO2L.eval)
    with pytest.raises(StreamError, match="image 7 of Broken cannot be read: no such image"):
        hold_in_memory(wrap_benchmark("broken", benchmark))


# ---------------------------------------------------------------- places


def test_limit_decides_and_the_train_stream_comes_first(root):
    stream = build(root, CO2L, validation_fraction=0)
    for limit, place in ((40 * 3072, "cpu"), (32 * 3072, "unchanged"), (0, "unchanged")):
        held, report = hold_in_memory(stream, limit_bytes=limit)
        assert report.parts["test/eval"] == place
        assert report.parts["train/train"] == ("cpu" if limit else "unchanged")
        assert_equal_streams(held, stream)


def test_mapped_files_are_made_used_again_and_refused(root, tmp_path, monkeypatch):
    stream, folder = build(root), tmp_path / "cache"
    held, report = hold_in_memory(stream, limit_bytes=0, folder=folder)
    assert report.parts == {"train/train": "files", **dict.fromkeys(("train/eval", "valid/eval", "test/eval"), "disk")}
    assert report.bytes == 40 * 3072
    assert_equal_streams(held, stream)
    files = sorted(folder.iterdir())
    assert len(files) == 6 and {f.suffix for f in files} == {".json", ".uint8"}, "nothing temporary stays"
    facts = json.loads(next(f for f in files if f.suffix == ".json").read_text())
    assert facts["fingerprint"] == stream.fingerprint and facts["shape"][1:] == [3, 32, 32]
    assert sum(f.stat().st_size for f in files if f.suffix == ".uint8") == 40 * 3072

    decoded = []
    original = memory.decode
    monkeypatch.setattr(memory, "decode", lambda *a, **k: decoded.append(1) or original(*a, **k))

    def again(expected, other=stream):
        decoded.clear()
        held, report = hold_in_memory(other, limit_bytes=0, folder=folder)
        assert len(decoded) == expected and report.parts["test/eval"] == "disk"
        for part in ("train", "valid", "test"):
            ours, theirs = (streams_of(s)[part][1].dataset.eval() for s in (held, other))
            assert_same_samples(ours, theirs)

    again(0)
    images = [f for f in files if f.suffix == ".uint8"]
    images[0].write_bytes(images[0].read_bytes()[:-1])
    again(1)  # too short
    images[1].with_suffix(".json").write_text("{")
    again(1)  # damaged
    beside = images[2].with_suffix(".json")
    for change in ({"fingerprint": "0" * 64}, {"shape": [1, 2]}, {"shape": [8, 3, -32, -32]}, {"channels": 5}):
        beside.write_text(json.dumps({**json.loads(beside.read_text()), **change}))
        again(1)  # of something else
    beside.unlink()
    again(1)  # interrupted before the JSON
    again(0)
    assert sorted(folder.iterdir()) == files
    again(0, build(root, CO2L))  # other statistics and augmentation, the same images
    again(3, build(root, preset_transforms("co2l_tiny")))
    again(3, build(root, validation_fraction=0.3))
    assert len(list(folder.iterdir())) == 18


def test_a_failed_decoding_leaves_no_file(root, tmp_path):
    stream, folder = build(root), tmp_path / "cache"
    broken = root / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(StreamError, match=r"3\.jpg"):
        hold_in_memory(stream, limit_bytes=0, folder=folder)
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_mapped_and_held_streams_travel(root, tmp_path):
    stream = build(root, CO2L)
    mapped, _ = hold_in_memory(stream, limit_bytes=0, folder=tmp_path / "cache")
    transform = bottom(mapped.test[0].dataset)[1]["eval"].transforms[0]
    text = pickle.dumps(transform)
    assert len(text) < 20_000, "a mapped file travels by its name"
    assert torch.equal(pickle.loads(text)(0), transform(0))
    held, _ = hold_in_memory(stream)
    twin = copy.deepcopy(held.train[0].dataset)
    assert bottom(twin)[1]["eval"].transforms[0].store is bottom(held.train[0].dataset)[1]["eval"].transforms[0].store
    for data in (mapped.train[0].dataset, held.train[0].dataset, hold_in_memory(build(root))[0].train[0].dataset):
        loader = DataLoader(data, batch_size=4, num_workers=1)
        assert sum(len(y) for _, y, _ in loader) == len(data)


def test_what_does_not_fit_on_the_device_goes_to_the_cpu(tmp_path):
    space = memory._Space.__new__(memory._Space)
    space.device, space.folder, space._free = torch.device("cuda", 0), None, {"cuda": 100.0, "cpu": 1000.0}
    one, two = [tmp_path / "a"], [tmp_path / "a", tmp_path / "b"]
    assert [p.device.type for p in space.place(60, two)] == ["cuda", "cuda"]
    (second,) = space.place(60, one)
    assert second.device.type == "cpu" and str(second) == "cpu"
    assert space.place(2000, one) is None
    space.give_back(60, Place(torch.device("cuda", 0)))
    assert str(space.place(100, one)[0]) == "cuda"
    space.folder = tmp_path
    assert [p.file for p in space.place(2000, two)] == two and str(space.place(2000, one)[0]) == "disk"
    assert space.place(2**60, one) is None, "more than the disk has"


# ---------------------------------------------------------------- augmentation on the device


def test_random_training_transforms_on_the_device():
    stream = pictures(size=(32, 32))
    held, report = hold_in_memory(stream, augmentation="device")
    assert report == MemoryReport(
        {"train/train": "cpu", "train/eval": "cpu", "test/eval": "cpu"}, (24 + 12) * 3 * 32 * 32
    )  # both groups have the same prefix
    assert_same_facts(held, stream)
    for one, other in zip(held.train, stream.train, strict=True):
        assert_same_samples(one.dataset.eval(), other.dataset.eval())
        torch.manual_seed(0)
        x, y = whole_batch(one.dataset, "train")
        torch.manual_seed(0)
        assert torch.equal(whole_batch(one.dataset, "train")[0], x) and y.tolist() == list(other.dataset.targets)
        assert x.shape == (12, 3, 32, 32) and not torch.equal(whole_batch(one.dataset, "train")[0], x)
        sample = one.dataset[0]
        assert sample[0].shape == (3, 32, 32) and sample[1] == other.dataset[0][1] and sample[0].device.type == "cpu"
        # the same images behind the augmentation: many draws agree in the mean
        rows = torch.zeros(400, dtype=torch.int64)
        _, groups, found = bottom(one.dataset)
        ours = groups["train"].transforms[0].batch(rows + int(found[0])).mean()
        theirs = torch.stack([other.dataset[0][0] for _ in range(400)]).mean()
        assert float(ours) == pytest.approx(float(theirs), abs=0.06)


def test_images_of_many_sizes_need_an_edge(root):
    pair = preset_transforms("slca_imagenet_r")
    stream = build(root, pair)
    with pytest.raises(StreamError, match=r"animals \(ImageFiles\): images have different sizes.*stored_edge"):
        hold_in_memory(stream, augmentation="device")
    held, report = hold_in_memory(stream, augmentation="device", stored_edge=40)
    assert report.parts["train/train"] == "cpu"
    assert held.train[0].dataset[0][0].shape == (3, 224, 224)
    store = bottom(held.train[0].dataset)[1]["train"].transforms[0].store
    assert store.images.shape[1:] == (3, 40, 40)
    assert_same_samples(held.train[0].dataset.eval(), stream.train[0].dataset.eval())


def test_the_device_mode_refuses_what_it_can_not_do(root):
    odd = transforms.Compose([transforms.AutoAugment(), transforms.ToTensor()])
    for stream, options, message in (
        (build(root, TransformPair(odd, CO2L.eval)), {}, "training transform of animals.*AutoAugment"),
        (build(root), {"limit_bytes": 0}, "don't fit.*MiB on cpu"),
        (build(root), {"stored_edge": 16}, "stored_edge is 16"),
    ):
        with pytest.raises(StreamError, match=message):
            hold_in_memory(stream, augmentation="device", **options)
    for stream in (
        digits_stream(image_size=8, tasks=2),
        wrap_benchmark("t", nc_benchmark(tensors(), tensors(), 2, False)),
    ):
        assert hold_in_memory(stream, augmentation="device")[0] is stream


def test_the_device_mode_does_not_insist_where_nothing_is_drawn(root):
    stream = build(root, CO2L)
    held, report = hold_in_memory(stream, augmentation="device", limit_bytes=0)
    assert held is stream and set(report.parts.values()) == {"unchanged"}
    held, _ = hold_in_memory(stream, augmentation="device")
    assert_equal_streams(held, stream)
    again, report = hold_in_memory(held, augmentation="device")
    assert again is held and report.bytes == 0, "a second time changes nothing"


def test_transforms_that_do_not_take_the_images(root):
    wrong = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()])  # for tensors, not for files
    random_wrong = transforms.Compose(
        [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    report = hold_in_memory(build(root, TransformPair(wrong, CO2L.eval)))[1]
    assert report.parts["train/train"] == "files" and report.parts["train/eval"] == "cpu"
    assert set(hold_in_memory(build(root, TransformPair(wrong, wrong)))[1].parts.values()) == {"unchanged"}
    with pytest.raises(StreamError, match=r"training images of animals.*doesn't take its images"):
        hold_in_memory(build(root, TransformPair(random_wrong, CO2L.eval)), augmentation="device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "mps"}, "accepted: 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"limit_bytes": -1}, "limit_bytes is -1"),
        ({"limit_bytes": 1.5}, "limit_bytes is 1.5"),
        ({"augmentation": "fast"}, "augmentation is 'fast'"),
        ({"stored_edge": 0, "augmentation": "device"}, "stored_edge is 0"),
        ({"stored_edge": 32}, "with augmentation 'exact'"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(StreamError, match=message):
        hold_in_memory(pictures(), **options)


def test_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamError, match=r"folder is .*file"):
        hold_in_memory(pictures(), folder=tmp_path / "file")


def test_whole_batches_through_the_levels_of_avalanche(root):
    stream = build(root, CO2L)
    held, _ = hold_in_memory(stream)
    for ours, theirs in (
        (held.joint().train[0].dataset, stream.joint().train[0].dataset),
        (held.test[1].dataset, stream.test[1].dataset),
        (held.train[0].dataset.eval().subset([3, 1, 1]), stream.train[0].dataset.eval().subset([3, 1, 1])),
    ):
        data = batched(ours)
        assert data is not None and batched(theirs) is None
        order = torch.randperm(len(ours))
        x, y, t = data.fetch(order)
        expected = [theirs[int(i)] for i in order]
        assert torch.equal(x, torch.stack([image for image, _, _ in expected]))
        assert y.tolist() == [label for _, label, _ in expected] and t.tolist() == [0] * len(order)
    random_part = hold_in_memory(build(root))[0].train[0].dataset
    assert batched(random_part) is None and batched(random_part.eval()) is not None


@pytest.mark.parametrize("augmentation", ["exact", "device"])
def test_avalanche_trains_on_it_with_the_same_weights(augmentation):
    stream = pictures(CO2L)
    weights = []
    for one in (stream, hold_in_memory(stream, augmentation=augmentation)[0]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        strategy = Naive(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=8)
        for experience in one.train:
            strategy.train(experience)
        weights.append(model[1].weight.detach().clone())
    assert torch.equal(*weights)


def test_a_store_gathers_rows_in_any_order():
    images = torch.arange(3 * 4, dtype=torch.uint8).view(3, 1, 2, 2)
    store = ImageStore(images, 3, np.array([1, 4, 6]), 8, Place(torch.device("cpu")))
    assert torch.equal(store.gather(torch.tensor([6, 1, 1, 4])), images[[2, 0, 0, 1]]) and store.nbytes == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda(root):
    stream = build(root, CO2L)
    held, report = hold_in_memory(stream, device="cuda")
    assert set(report.parts.values()) == {"cuda"}
    assert_equal_streams(held, stream)
    x, y = whole_batch(held.test[0].dataset, "eval")
    assert x.is_cuda and y.is_cuda and torch.equal(x[0].cpu(), stream.test[0].dataset[0][0])
    with pytest.raises(StreamError, match="num_workers=0"):
        next(iter(DataLoader(held.train[0].dataset, num_workers=1)))
    digits = digits_stream(image_size=8, tasks=2)
    held, report = hold_in_memory(digits, device="cuda")
    assert set(report.parts.values()) == {"cuda"}
    assert_equal_streams(held, digits)
    leaf, _, rows = bottom(held.train[0].dataset)
    x, y = leaf.batch(torch.from_numpy(rows[:5]))
    assert x.is_cuda and torch.equal(x[2].cpu(), digits.train[0].dataset[2][0])
    assert hold_in_memory(build(root), device="cuda", augmentation="device")[1].parts["train/train"] == "cuda"
    assert hold_in_memory(stream, device="cuda", limit_bytes=0)[1].parts["train/train"] == "cpu"


def test_calls_with_the_same_dictionary_decode_once(root, monkeypatch):
    cache = {}
    first, _ = hold_in_memory(build(root, CO2L), cache=cache)
    monkeypatch.setattr(memory, "decode", None)  # would fail if it were called
    second, report = hold_in_memory(build(root, CO2L), cache=cache)
    assert set(report.parts.values()) == {"cpu"} and report.bytes > 0
    for mine, theirs in zip(first.train, second.train, strict=True):
        assert_same_samples(mine.dataset, theirs.dataset)
    with pytest.raises(TypeError):
        hold_in_memory(build(root, CO2L))
