"""mini-ImageNet and OmnImage from generated folders in the layouts of their public copies."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from avalanche_firn.benchmarks import (
    StreamError,
    check_disjoint,
    mini_imagenet,
    mini_imagenet_classes,
    mini_imagenet_stream,
    omnimage,
    omnimage_classes,
    omnimage_stream,
    read_test_classes,
)
from avalanche_firn.benchmarks.transforms import IMAGENET_MEAN, IMAGENET_STD

COUNTS = {"train": 4, "val": 2, "test": 3}


def picture(path, seed, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def wnid(number):
    return f"n{number:08d}"


@pytest.fixture
def sizes(monkeypatch):
    """Sets as small as the folders written here count as complete."""
    for part, count in COUNTS.items():
        monkeypatch.setitem(mini_imagenet.MINI_IMAGENET_CLASSES, part, count)
    monkeypatch.setattr(omnimage, "OMNIMAGE_CLASSES", 5)


def write_mini(root, images=6):
    number = 0
    for part, count in COUNTS.items():
        for _ in range(count):
            number += 1
            for n in range(images):
                picture(root / part / wnid(number) / f"{wnid(number)}{n:08d}.png", 100 * number + n)
    return root


# -------------------------------------------------------------- mini-ImageNet
def test_mini_imagenet_folders(tmp_path, sizes):
    write_mini(tmp_path)
    data = {part: mini_imagenet_classes(tmp_path, part) for part in COUNTS}
    assert data["train"].class_names == tuple(wnid(n) for n in range(1, 5))
    assert data["test"].class_names == tuple(wnid(n) for n in range(7, 10))
    assert data["test"].images.shape == (18, 3, 84, 84) and data["val"].counts.tolist() == [6, 6]
    assert (data["train"].mean, data["train"].std) == (IMAGENET_MEAN, IMAGENET_STD)
    with Image.open(tmp_path / "test" / wnid(7) / f"{wnid(7)}{0:08d}.png") as file:
        expected = np.asarray(file.resize((84, 84), Image.Resampling.LANCZOS))
    assert np.array_equal(data["test"].images[0].permute(1, 2, 0).numpy(), expected)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        check_disjoint(data[first], data[second])
    before = data["train"].fingerprint()
    (tmp_path / "processed_images").mkdir()
    for part in COUNTS:
        (tmp_path / part).rename(tmp_path / "processed_images" / part)
    assert mini_imagenet_classes(tmp_path, "train").fingerprint() == before


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("header", [("filename", "label"), ("filename    ", " label")])
def test_mini_imagenet_lists(tmp_path, sizes, nested, header):
    write_mini(tmp_path / "folders")
    listed = tmp_path / "lists"
    for part in COUNTS:
        listed.mkdir(exist_ok=True)
        with open(listed / f"{part}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for path in sorted((tmp_path / "folders" / part).glob("*/*"), reverse=True):
                target = listed / "images" / path.parent.name / path.name if nested else listed / "images" / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                writer.writerow([path.name, path.parent.name])
    for part in COUNTS:
        found, expected = mini_imagenet_classes(listed, part), mini_imagenet_classes(tmp_path / "folders", part)
        assert found.fingerprint() == expected.fingerprint()
    if nested:  # a filename may hold the folder
        rows = (listed / "test.csv").read_text().splitlines()
        rows[1] = f"{rows[1].split(',')[1]}/{rows[1]}"
        (listed / "test.csv").write_text("\n".join(rows))
        assert mini_imagenet_classes(listed, "test").num_classes == 3


def test_mini_imagenet_refuses(tmp_path, sizes):
    with pytest.raises(StreamError, match="part is 'novel'; accepted: 'train', 'val', 'test'"):
        mini_imagenet_classes(tmp_path, "novel")
    with pytest.raises(StreamError, match=r"holds no part 'train'; accepted: root/train/WNID/\*.jpg"):
        mini_imagenet_classes(tmp_path, "train")
    write_mini(tmp_path, images=2)
    shutil.rmtree(tmp_path / "train" / wnid(2))
    with pytest.raises(StreamError, match="train has 3 classes; accepted: 4 in 'train'"):
        mini_imagenet_classes(tmp_path, "train")
    (tmp_path / "test.csv").write_text("filename,label\n")
    with pytest.raises(StreamError, match="are both there"):
        mini_imagenet_classes(tmp_path, "test")


def test_mini_imagenet_refuses_lists_with_gaps(tmp_path, sizes):
    picture(tmp_path / "images" / "a.png", 0)
    for text, message in (
        ("file,label\na.png,x\n", r"has the columns \['file', 'label'\]; accepted: filename and label"),
        ("", r"has the columns \[\]"),
        ("filename,label\na.png,\n", "line 2: .*accepted: a filename and a label"),
        ("filename,label\na.png\n", "line 2: .*accepted: a filename and a label"),
        ("filename,label\na.png,x\na.png,y\n", "line 3: 'a.png' is listed twice"),
        ("filename,label\nb.png,x\n", r"line 2: none of .*b\.png"),
        ("filename,label\na.png,x\n", "has 1 classes; accepted: 3"),
    ):
        (tmp_path / "test.csv").write_text(text)
        with pytest.raises(StreamError, match=message):
            mini_imagenet_classes(tmp_path, "test")
    picture(tmp_path / "images" / "x" / "a.png", 1)
    with pytest.raises(StreamError, match="line 2: both of"):
        mini_imagenet_classes(tmp_path, "test")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(StreamError, match="images is absent; accepted: the folder of the images that"):
        mini_imagenet_classes(tmp_path, "test")


def test_mini_imagenet_stream(tmp_path, sizes):
    write_mini(tmp_path)
    stream = mini_imagenet_stream(tmp_path, train_per_class=2, test_per_class=3, seed=1, size=8)
    assert stream.name == "mini-imagenet-test" and stream.task_sizes == (1, 1, 1)
    assert [len(e.dataset) for e in stream.train] == [2] * 3 and [len(e.dataset) for e in stream.test] == [3] * 3
    data = mini_imagenet_classes(tmp_path, "test", size=8)
    x, y, _ = stream.train[0].dataset[0]
    assert any(torch.equal(x, row) for row in data.pixels()[data.labels == y])
    with pytest.raises(StreamError, match="test_per_class is 0"):  # before the folder is looked at
        mini_imagenet_stream(tmp_path / "nowhere", test_per_class=0)
    with pytest.raises(StreamError, match=r"has 6 image\(s\); .* need 130"):
        mini_imagenet_stream(tmp_path)  # 30 and 100 images
    again = tmp_path / "test" / wnid(9) / "again.png"
    shutil.copy(tmp_path / "test" / wnid(8) / f"{wnid(8)}{0:08d}.png", again)
    options = {"train_per_class": 3, "test_per_class": 3, "size": 8}
    found = []
    for seed in range(8):  # the copy is in another part, in the same one, or in none
        try:
            mini_imagenet_stream(tmp_path, split_seed=seed, **options)
        except StreamError as error:
            found.append("in two parts" in str(error))
        assert mini_imagenet_stream(tmp_path, split_seed=seed, allow_shared_images=True, **options).num_classes == 3
    assert found and all(found)


# ------------------------------------------------------------------- OmnImage
def write_omnimage(root, images=20, classes=5, number=20):
    for c in range(classes):
        for n in range(images):
            picture(root / f"OmnImage84_{number}" / wnid(c) / f"{wnid(c)}_{n}.png", 100 * c + n, (6, 6))
    return root


def test_omnimage(tmp_path, sizes):
    write_omnimage(tmp_path)
    whole = omnimage_classes(tmp_path, size=6)
    assert whole.class_names == tuple(wnid(c) for c in range(5)) and whole.counts.tolist() == [20] * 5
    assert whole.mean == (0.4875, 0.4667, 0.4110) and whole.std == (0.2607, 0.2528, 0.2678)
    assert omnimage_classes(tmp_path / "OmnImage84_20", size=6).fingerprint() == whole.fingerprint()
    test_classes = [wnid(3), wnid(1)]
    parts = {p: omnimage_classes(tmp_path, p, test_classes=test_classes, size=6) for p in ("train", "test")}
    assert parts["test"].class_names == (wnid(1), wnid(3))
    assert parts["train"].class_names == (wnid(0), wnid(2), wnid(4))
    check_disjoint(parts["train"], parts["test"])
    assert omnimage_classes(tmp_path).images.shape[-2:] == (84, 84)


def test_omnimage_stream(tmp_path, sizes):
    write_omnimage(tmp_path)
    options = {"test_classes": (wnid(1), wnid(4)), "size": 6}
    stream = omnimage_stream(tmp_path, **options)
    assert stream.name == "omnimage20-test" and stream.class_names == (wnid(1), wnid(4)) and stream.valid is None
    assert [len(e.dataset) for e in stream.train] == [15, 15] and [len(e.dataset) for e in stream.test] == [5, 5]
    other = omnimage_stream(tmp_path, "train", train_per_class=10, valid_per_class=3, **options)
    assert {part: len(s[0].dataset) for part, s in other.benchmark.streams.items()} == {
        "train": 10,
        "valid": 3,
        "test": 7,
    }
    small = omnimage_stream(tmp_path, None, train_per_class=2, test_per_class=1, size=6)
    assert small.name == "omnimage20" and small.num_classes == 5 and len(small.test[0].dataset) == 1
    with pytest.raises(StreamError, match="test_per_class is 0"):
        omnimage_stream(tmp_path, train_per_class=20, **options)
    with pytest.raises(StreamError, match=r"train_per_class is '3'"):
        omnimage_stream(tmp_path, train_per_class="3", **options)


def test_omnimage_refuses(tmp_path, sizes, monkeypatch):
    write_omnimage(tmp_path)
    names = [wnid(c) for c in range(5)]
    for options, message in (
        ({"part": "val"}, "part is 'val'"),
        ({"part": "test"}, "part is 'test' and test_classes absent"),
        ({"test_classes": names[:1]}, "part is None and test_classes given"),
        ({"images_per_class": 50}, "images_per_class is 50; accepted: 20 or 100"),
        ({"images_per_class": 100}, r"neither is nor holds OmnImage84_100; accepted: OmnImage84_100/WNID"),
        ({"part": "test", "test_classes": ["n1"]}, "class 'n1' of test_classes is not in"),
        ({"part": "test", "test_classes": []}, "at least one"),
        ({"part": "test", "test_classes": "n1"}, "test_classes is 'n1'"),
        ({"part": "test", "test_classes": [names[0], 3]}, "test_classes holds 3; accepted: class names"),
        ({"part": "test", "test_classes": [names[0]] * 2}, "twice"),
        ({"part": "train", "test_classes": names}, "every class"),
    ):
        with pytest.raises(StreamError, match=message):
            omnimage_classes(tmp_path, **options)
    (tmp_path / "OmnImage84_20" / wnid(2) / f"{wnid(2)}_7.png").unlink()
    with pytest.raises(StreamError, match=f"class '{wnid(2)}' in .* has 19 images; accepted: 20"):
        omnimage_classes(tmp_path)
    monkeypatch.undo()
    with pytest.raises(StreamError, match="has 5 classes; accepted: the 1000 of the archive"):
        omnimage_classes(tmp_path)
    (tmp_path / "OmnImage84_20" / "OmnImage84_20").mkdir()
    with pytest.raises(StreamError, match="lies in a folder of the same name"):
        omnimage_classes(tmp_path / "OmnImage84_20")


def test_lists_of_test_classes(tmp_path, monkeypatch):
    import hashlib

    (tmp_path / "list.json").write_text(json.dumps(["b", "a"]))
    (tmp_path / "list.txt").write_text("# mine\nb\n\n a  # the first\n")
    for name in ("list.json", "list.txt"):
        assert read_test_classes(tmp_path / name, released=False) == ("a", "b")
        with pytest.raises(StreamError, match="holds 2 classes and isn't the released list"):
            read_test_classes(tmp_path / name)
    monkeypatch.setattr(omnimage, "OMNIMAGE_TEST_CLASSES_SHA256", hashlib.sha256(b"a\nb").hexdigest())
    assert read_test_classes(str(tmp_path / "list.json")) == ("a", "b")
    for name, text, message in (
        ("x.json", "{", "cannot be read as a list"),
        ("x.json", '{"a": 1}', "accepted: a sequence of class names"),
        ("x.json", '["a", "a"]', "holds 'a' twice"),
        ("x.txt", "# nothing\n", "at least one"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(StreamError, match=message):
            read_test_classes(tmp_path / name, released=False)
    with pytest.raises(StreamError, match="cannot be read as a list"):
        read_test_classes(tmp_path / "absent.txt")
