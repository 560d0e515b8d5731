"""5-Datasets on miniature files in torchvision's layouts. Pixels say data set, part, class and number."""

import dataclasses
import hashlib
import pickle
import shutil
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import cifar
from avalanche_firn.benchmarks import five_datasets as module
from avalanche_firn.benchmarks.downloads import DownloadError, RemoteFile
from avalanche_firn.benchmarks.five_datasets import (
    FIVE_DATASETS,
    NOTMNIST_BROKEN,
    ArrayImages,
    JoinedImages,
    five_datasets_stream,
    git_blob,
)
from avalanche_firn.benchmarks.streams import StreamError

COUNTS = {"train": 4, "test": 2}  # images per class
CODES = {key: 40 * (i + 1) for i, key in enumerate(FIVE_DATASETS)}  # red pixel of class 0
TEST_OFFSET = 20


def to_tensor(image):
    assert image.mode == "RGB"
    return pil_to_tensor(image).float()


def to_negative(image):
    return -to_tensor(image)


def code(key, part, label):
    return CODES[key] + (TEST_OFFSET if part == "test" else 0) + label


def labels_of(part):
    return np.tile(np.arange(10), COUNTS[part])  # classes mixed, as in the real files


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">i{array.ndim}i", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def write_cifar(root, monkeypatch):
    """The binary version: records of a label and three planes."""
    folder, sums = root / "cifar-10-batches-bin", {}
    folder.mkdir()
    for part, name in (("train", "data_batch_1.bin"), ("test", "test_batch.bin")):
        labels = labels_of(part)
        rows = np.zeros((len(labels), 1 + 3 * 1024), dtype=np.uint8)
        rows[:, 0] = labels
        rows[:, 1:1025] = [[code("cifar10", part, c)] for c in labels]
        (folder / name).write_bytes(rows.tobytes())
        sums[part] = {name: md5(folder / name)}
    files = dataclasses.replace(cifar.CIFAR[10], binary=("cifar-10-batches-bin", sums))
    monkeypatch.setitem(cifar.CIFAR, 10, files)


def write_svhn(root, part, monkeypatch):
    labels = labels_of(part)
    images = np.zeros((32, 32, 3, len(labels)), dtype=np.uint8)
    images[:, :, 0] = [code("svhn", part, c) for c in labels]
    images[0, 1, 2] = np.arange(len(labels))  # blue of the second pixel: which image it is
    file = f"{part}_32x32.mat"
    # the digit 0 is called 10 in the files
    savemat(root / file, {"X": images, "y": np.where(labels == 0, 10, labels).reshape(-1, 1).astype(np.uint8)})
    monkeypatch.setitem(module.vision.SVHN.split_list, part, [f"https://example.org/{file}", file, md5(root / file)])


def write_grey(root, key, folder, part):
    labels = labels_of(part)
    stem = {"train": "train", "test": "t10k"}[part]
    images = np.stack([np.full((28, 28), code(key, part, c)) for c in labels])
    write_idx(root / folder / "raw" / f"{stem}-images-idx3-ubyte", images)
    write_idx(root / folder / "raw" / f"{stem}-labels-idx1-ubyte", labels)


def write_letters(root, numbers=None):
    for part in COUNTS:
        for label, letter in enumerate("ABCDEFGHIJ"):
            folder = root / "notMNIST" / part.capitalize() / letter
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers or range(COUNTS[part]):
                if number < COUNTS[part]:
                    Image.new("L", (28, 28), code("notmnist", part, label)).save(folder / f"font{number}.png")


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "five"
    folder.mkdir()
    for part in COUNTS:
        write_svhn(folder, part, monkeypatch)
        write_grey(folder, "mnist", "MNIST", part)
        write_grey(folder, "fashion_mnist", "FashionMNIST", part)
    write_letters(folder)
    write_cifar(folder, monkeypatch)
    return folder


def build(root, **options):
    return five_datasets_stream(root, **{"train_transform": to_tensor, "eval_transform": to_tensor, **options})


def samples(experience):
    """(red, green, blue, target) of every sample."""
    return [(*(int(v) for v in x[:, 0, 0]), int(y)) for x, y, _ in experience.dataset]


def test_the_five_follow_one_another_in_rgb(root):
    stream = build(root)
    assert stream.name == "five-datasets" and stream.valid is None
    assert stream.task_sizes == (10,) * 5 and stream.class_order == tuple(range(50))
    assert stream.class_names[0] == "svhn/0" and stream.class_names[29] == "cifar10/truck"
    assert stream.class_names[30] == "notmnist/A" and stream.class_names[40] == "fashion_mnist/T-shirt/top"
    for part in ("train", "test"):
        experiences = stream.benchmark.streams[part]
        assert len(experiences) == 5
        for i, (key, experience) in enumerate(zip(FIVE_DATASETS, experiences, strict=True)):
            grey = key not in ("svhn", "cifar10")
            reds = {c: code(key, part, c) for c in range(10)}
            expected = [(red, red * grey, red * grey, 10 * i + c) for c, red in reds.items()]
            assert Counter(samples(experience)) == dict.fromkeys(expected, COUNTS[part])
            assert set(experience.classes_in_this_experience) == set(range(10 * i, 10 * i + 10))


def test_order_and_number_of_the_data_sets_are_the_users(root):
    stream = build(root, datasets=("notmnist", "svhn"), name="two")
    assert stream.name == "two" and stream.task_sizes == (10, 10) and stream.num_classes == 20
    assert min(samples(stream.train[0]))[0] == CODES["notmnist"] and stream.class_names[10] == "svhn/0"
    for absent in ("MNIST", "FashionMNIST", "cifar-10-batches-bin"):
        shutil.rmtree(root / absent)
    assert build(root, datasets=["notmnist", "svhn"]).fingerprint == stream.fingerprint
    assert build(root, datasets=["svhn", "notmnist"]).fingerprint != stream.fingerprint


def test_validation_part_of_a_data_set_does_not_depend_on_the_others(root):
    options = {"validation_fraction": 0.25, "split_seed": 3}
    both = build(root, datasets=("mnist", "svhn"), **options)
    alone = build(root, datasets=("svhn",), **options)
    assert [len(e.dataset) for e in both.valid] == [10, 10] and [len(e.dataset) for e in both.train] == [30, 30]

    def numbers(experience):
        return sorted(int(x[2, 0, 1]) for x, *_ in experience.dataset)

    assert numbers(both.valid[1]) == numbers(alone.valid[0]) and numbers(both.train[1]) == numbers(alone.train[0])
    assert sorted(numbers(alone.valid[0]) + numbers(alone.train[0])) == list(range(40))
    assert alone.fingerprint != build(root, datasets=("svhn",), validation_fraction=0.25, split_seed=4).fingerprint
    assert alone.fingerprint != build(root, datasets=("svhn",)).fingerprint


def test_transform_groups(root):
    stream = build(root, datasets=["mnist"], eval_transform=to_negative)
    assert min(x.min() for x, *_ in stream.train[0].dataset) > 0 > max(x.max() for x, *_ in stream.test[0].dataset)
    assert max(x.max() for x, *_ in stream.train[0].dataset.eval()) < 0


def test_workers_and_pickle(root):
    stream = build(root, datasets=["mnist", "notmnist"])
    data = pickle.loads(pickle.dumps(stream.train[1].dataset))
    assert torch.equal(data[5][0], stream.train[1].dataset[5][0])
    loader = DataLoader(data, batch_size=16, num_workers=1, multiprocessing_context="fork")
    assert sum(len(x) for x, *_ in loader) == 40


def test_fingerprint_follows_pixels_and_labels(root):
    before = build(root, datasets=["mnist"]).fingerprint
    raw = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    assert build(root, datasets=["mnist"]).fingerprint != before
    before = build(root, datasets=["notmnist"]).fingerprint
    Image.new("L", (28, 28), 1).save(root / "notMNIST" / "Train" / "C" / "font1.png")
    assert build(root, datasets=["notmnist"]).fingerprint != before


def test_order_of_the_file_system_does_not_matter(root):
    before = build(root, datasets=["notmnist"])
    shutil.rmtree(root / "notMNIST")
    write_letters(root, numbers=[2, 0, 3, 1])
    after = build(root, datasets=["notmnist"])
    assert after.fingerprint == before.fingerprint and samples(after.train[0]) == samples(before.train[0])


def test_the_two_broken_files_are_left_out_and_no_others(root):
    before = build(root, datasets=["notmnist"])
    for file in NOTMNIST_BROKEN:
        (root / "notMNIST" / "Train" / file).write_bytes(b"")
    stream = build(root, datasets=["notmnist"])
    assert stream.fingerprint == before.fingerprint and len(stream.train[0].dataset) == 40
    (root / "notMNIST" / "Train" / "B" / "new.png").write_bytes(b"no image")
    (root / "notMNIST" / "Train" / "J" / "font0.png").write_bytes(b"")
    with pytest.raises(StreamError, match=r"2 file\(s\) of .*Train cannot be read as images: B/new\.png, J/font0\.png"):
        build(root, datasets=["notmnist"])


def test_a_known_name_that_opens_is_used(root):
    Image.new("L", (28, 28), 9).save(root / "notMNIST" / "Train" / min(NOTMNIST_BROKEN))
    assert len(build(root, datasets=["notmnist"]).train[0].dataset) == 41


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("svhn", "test_32x32.mat"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin"),
    ],
)
def test_absent_files_are_named(root, key, file):
    (root / file).unlink()
    with pytest.raises(StreamError, match=rf"{file} is absent.*download=True fetches"):
        build(root, datasets=[key])


def test_wrong_checksum_and_damage_are_named(root):
    file = root / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StreamError, match=r"SVHN in .*train_32x32\.mat\) cannot be read: .*wrong checksum"):
        build(root, datasets=["svhn"])
    raw = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(StreamError, match=r"MNIST in .*train-images-idx3-ubyte.*damaged"):
        build(root, datasets=["mnist"])
    raw.write_bytes(b"\x1f\x8b")
    with pytest.raises(StreamError, match=r"MNIST in .*cannot be read"):
        build(root, datasets=["mnist"])


def test_numbers_of_images_and_labels_must_agree(root):
    write_idx(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", labels_of("train")[:-1])
    with pytest.raises(StreamError, match=r"train-images-idx3-ubyte has 40 images, .*39; accepted: equal"):
        build(root, datasets=["mnist"])


def test_a_class_without_images_is_refused(root):
    write_idx(root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", labels_of("test") % 9)
    with pytest.raises(StreamError, match=r"test data must hold exactly the classes 0\.\.9; see 9"):
        build(root, datasets=["mnist"])


def test_folders_of_notmnist(root):
    (root / "notMNIST" / "Train" / "K").mkdir()
    Image.new("L", (28, 28)).save(root / "notMNIST" / "Train" / "K" / "a.png")
    with pytest.raises(StreamError, match=r"holds the folders A, B, .*, K; accepted: A to J"):
        build(root, datasets=["notmnist"])
    shutil.rmtree(root / "notMNIST" / "Train")
    with pytest.raises(StreamError, match=r"Train is absent; accepted: root/notMNIST/\{Train,Test\}/\{A\.\.J\}"):
        build(root, datasets=["notmnist"], download=True)  # Test is there: not overwritten


def test_notmnist_is_fetched_checked_and_unpacked(root, tmp_path, monkeypatch):
    expected = build(root, datasets=["notmnist"]).fingerprint
    archive = tmp_path / "server.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted((root / "notMNIST").rglob("*.png")):
            out.write(path, path.relative_to(root))
        out.writestr("__MACOSX/._notMNIST", b"x")
    shutil.rmtree(root / "notMNIST")
    monkeypatch.setattr(module, "NOTMNIST", RemoteFile(archive.as_uri(), "notMNIST.zip"))
    with pytest.raises(StreamError, match="Train is absent"):
        build(root, datasets=["notmnist"])
    with pytest.raises(DownloadError, match=r"notMNIST\.zip has the git SHA-1 [0-9a-f]{40}; accepted: 3e15e76a"):
        build(root, datasets=["notmnist"], download=True)
    assert not (root / "notMNIST").exists()
    monkeypatch.setattr(module, "NOTMNIST_GIT_BLOB", git_blob(archive.read_bytes()))
    assert build(root, datasets=["notmnist"], download=True).fingerprint == expected


def test_git_blob():
    assert git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # the empty file's name in any repository


def test_torchvision_downloads_and_its_failure_is_named(root, tmp_path, monkeypatch):
    expected = build(root, datasets=["svhn"]).fingerprint
    server = tmp_path / "server.mat"
    (root / "test_32x32.mat").rename(server)
    asked = []

    def copy(self):  # instead of the network
        asked.append(self.filename)
        shutil.copy(server, root / self.filename)

    with monkeypatch.context() as patch:
        patch.setattr(module.vision.SVHN, "download", copy)
        assert build(root, datasets=["svhn"], download=True).fingerprint == expected
    assert asked == ["test_32x32.mat"]  # and not the file that is there
    (root / "test_32x32.mat").unlink()
    nowhere = (tmp_path / "nowhere.mat").as_uri()
    monkeypatch.setitem(module.vision.SVHN.split_list, "test", [nowhere, "test_32x32.mat", md5(server)])
    with pytest.raises(DownloadError, match=r"SVHN could not be fetched from file:.*test_32x32\.mat can be put there"):
        build(root, datasets=["svhn"], download=True)


def test_files_of_old_versions_are_never_opened(root):
    old = root / "MNIST" / "processed"
    old.mkdir()
    for file in ("training.pt", "test.pt"):
        (old / file).write_bytes(b"not even a pickle")
    assert build(root, datasets=["mnist"]).num_classes == 10  # the idx files are there
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DownloadError, match=r"MNIST could not be fetched from .*processed is of an old version"):
        build(root, datasets=["mnist"], download=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ["svhn", "kmnist"]}, "datasets names 'kmnist'; accepted: some of svhn, mnist"),
        ({"datasets": ["svhn", "svhn"]}, "datasets names 'svhn' twice"),
        ({"datasets": "svhn"}, "datasets is 'svhn'"),
        ({"datasets": []}, r"datasets is \[\]"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"split_seed": -1}, "seed of the split is -1"),
        ({"train_transform": None}, "train_transform is None"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(StreamError, match=message):
        build(tmp_path / "nowhere", **options)


def test_default_folder_is_avalanches(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "default_root", lambda name: tmp_path / name)
    with pytest.raises(StreamError, match=r"five_datasets/train_32x32\.mat is absent"):
        build(None)


def test_joined_images():
    grey = ArrayImages(np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2), [2, 0, 1])
    joined = JoinedImages([(grey, np.array([2, 0]), 0), (grey, np.array([], dtype=int), 5), (grey, np.array([1]), 10)])
    assert joined.targets == [1, 2, 10] and len(joined) == 3
    assert [joined[i][0].getpixel((0, 0)) for i in (0, 1, 2, -1)] == [(8, 8, 8), (0, 0, 0), (4, 4, 4), (4, 4, 4)]
    assert [joined[i][1] for i in range(3)] == joined.targets
    with pytest.raises(IndexError):
        joined[3]
