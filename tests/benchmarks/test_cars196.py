"""Stanford Cars on a miniature of torchvision's layout: official and swapped parts, lists that don't fit."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import StanfordCars
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import cars196
from avalanche_firn.benchmarks.cars196 import CARS196_CLASSES, CARS196_TASKS, cars196_stream
from avalanche_firn.benchmarks.streams import StreamError

CLASSES = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012")
TRAIN = [(n, n % 3 + 1) for n in (4, 2, 1, 3, 5, 6, 8, 7)]  # image number, class; not in the order of the numbers
TEST = [(n, (n + 1) % 3 + 1) for n in range(1, 5)]
LABELLED = "cars_test_annos_withlabels.mat"


def transform(image):
    return pil_to_tensor(image).float()


def annotations(rows, labelled=True):
    fields = [*((f"bbox_{edge}", "O") for edge in ("x1", "y1", "x2", "y2")), ("class", "O"), ("fname", "O")]
    if not labelled:
        fields.pop(4)
    found = np.empty((1, len(rows)), dtype=fields)
    for i, (n, c) in enumerate(rows):
        name = n if isinstance(n, str) else f"{n:05d}.jpg"
        found[0, i] = (1, 2, 3, 4, c, name) if labelled else (1, 2, 3, 4, name)
    return {"annotations": found}


def write(root, train=TRAIN, test=TEST):
    """Grey 10 n in training images, 10 n + 100 in test images."""
    folder = root / "stanford_cars"
    for part, rows, first in (("train", train, 0), ("test", test, 100)):
        (folder / f"cars_{part}").mkdir(parents=True, exist_ok=True)
        for n, _ in rows:
            Image.new("L", (8, 8), 10 * n + first).save(folder / f"cars_{part}" / f"{n:05d}.jpg", quality=95)
    (folder / "devkit").mkdir(exist_ok=True)
    names = np.empty((1, len(CLASSES)), dtype=object)
    names[0, :] = CLASSES
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    savemat(folder / "devkit" / "cars_train_annos.mat", annotations(train))
    savemat(folder / "devkit" / "cars_test_annos.mat", annotations(test, labelled=False))
    savemat(folder / LABELLED, annotations(test))
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(cars196, "CARS196_IMAGES", {"train": 8, "test": 4})
    monkeypatch.setattr(cars196, "CARS196_CLASSES", 3)


def build(root, **options):
    settings = {"tasks": [2, 1], "train_transform": transform, "eval_transform": transform}
    return cars196_stream(root, **(settings | options))


def found(stream, part):
    """(image number from the pixels, class number), sorted."""
    return sorted(
        (round(float(x.mean()) / 10), y + 1) for experience in getattr(stream, part) for x, y, _ in experience.dataset
    )


def test_official_parts(root):
    stream = build(root)
    assert (stream.name, stream.class_names, stream.task_sizes) == ("cars196", CLASSES, (2, 1))
    assert stream.valid is None and sum(CARS196_TASKS) == CARS196_CLASSES
    assert found(stream, "train") == sorted(TRAIN)
    assert found(stream, "test") == [(n + 10, c) for n, c in TEST]


def test_parts_and_labels_of_torchvision(root):
    for part in ("train", "test"):
        theirs = StanfordCars(str(root), split=part)
        assert tuple(theirs.classes) == CLASSES
        rows = sorted((round(np.asarray(image).mean() / 10), label + 1) for image, label in theirs)
        assert found(build(root), part) == rows


def test_swapped_parts(root):
    stream = build(root, swap_train_test=True)
    official = build(root)
    assert stream.name == "cars196-swapped" and stream.fingerprint != official.fingerprint
    assert found(stream, "train") == found(official, "test") and found(stream, "test") == found(official, "train")


def test_other_places(root, tmp_path, monkeypatch):
    expected = build(root).fingerprint
    folder = root / "stanford_cars"
    assert build(folder).fingerprint == expected
    (folder / LABELLED).rename(folder / "devkit" / LABELLED)
    assert build(root, download=True).fingerprint == expected  # nothing to download, so no complaint
    monkeypatch.setattr(cars196, "default_root", lambda name: root if name == "stanford_cars" else None)
    assert build(None).fingerprint == expected


def test_order_of_the_file_system_has_no_influence(root, tmp_path):
    other = tmp_path / "other"
    for part, rows in (("test", TEST), ("train", TRAIN)):
        (other / "stanford_cars" / f"cars_{part}").mkdir(parents=True)
        for n, _ in sorted(rows, reverse=True):
            (other / "stanford_cars" / f"cars_{part}" / f"{n:05d}.jpg").touch()
    assert build(write(other)).fingerprint == build(root).fingerprint


def test_validation_and_class_order(root):
    stream = build(root, validation_fraction=0.4, class_order=CLASSES[::-1])
    assert [set(e.classes_in_this_experience) for e in stream.train] == [{1, 2}, {0}]
    assert sorted(found(stream, "train") + found(stream, "valid")) == sorted(TRAIN)
    assert {c for _, c in found(stream, "valid")} == {1, 2, 3}


def test_counts_are_checked(root, monkeypatch):
    monkeypatch.setattr(cars196, "CARS196_IMAGES", {"train": 8_144, "test": 8_041})
    with pytest.raises(StreamError, match=r"lists \{'train': 8, 'test': 4\} images of 3 classes, not .*8144.*of 3"):
        build(root)
    assert len(found(build(root, complete=False), "train")) == 8


def test_absent_data_says_how_to_get_it(tmp_path):
    with pytest.raises(
        StreamError, match=r"Stanford Cars is not in .*nowhere; accepted: root/stanford_cars/ .*by hand"
    ):
        build(tmp_path / "nowhere")
    with pytest.raises(
        StreamError, match=r"not downloaded from here: its public address is dead.*7545.*stanford_cars; acc"
    ):
        build(tmp_path / "nowhere", download=True)


def test_trees_that_are_refused(root):
    def refused(message, **options):
        with pytest.raises(StreamError, match=message):
            build(root, **options)

    folder = root / "stanford_cars"
    (folder / "cars_test" / "00002.jpg").unlink()
    refused(r"1 of 12 listed files are not in .*: cars_test/00002\.jpg")
    savemat(folder / LABELLED, annotations(TEST, labelled=False))
    refused(r"withlabels\.mat has no field 'class'.*the test list with labels is needed")
    (folder / LABELLED).unlink()
    refused(r"cars_test_annos_withlabels\.mat is absent; accepted: root/stanford_cars/")
    refused("eval_transform is None", eval_transform=None)
    (folder / "devkit" / "cars_meta.mat").write_bytes(b"not one")
    refused(r"cars_meta\.mat cannot be read as a MATLAB file")
    savemat(folder / "devkit" / "cars_meta.mat", {"names": [1.0]})
    refused(r"cars_meta\.mat has no variable 'class_names'")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*TRAIN, (9, 4)], r"gives '00009\.jpg' the class 4; accepted: 1\.\.3"),
        ([*TRAIN, (9, 0)], r"gives '00009\.jpg' the class 0"),
        ([*TRAIN, (9, 1.5)], r"has the row '00009\.jpg', 1\.5; accepted: a file name and a class"),
        ([*TRAIN, TRAIN[0]], r"'cars_train/00004\.jpg' is listed in 'train' of files and again"),
        ([*TRAIN, ("../x.jpg", 1)], r"lists 'cars_train/\.\./x\.jpg'; accepted: a path relative"),
        ([row for row in TRAIN if row[1] != 2], "class 'Ram C/V Cargo Van Minivan 2012' without files in 'train'"),
    ],
)
def test_lists_that_do_not_fit(root, rows, message):
    savemat(root / "stanford_cars" / "devkit" / "cars_train_annos.mat", annotations(rows))
    with pytest.raises(StreamError, match=message):
        build(root, complete=False)
