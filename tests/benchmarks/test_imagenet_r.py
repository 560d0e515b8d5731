"""ImageNet-R on a miniature of the public layout: split and its list, lists of others, refusals, download."""

import hashlib
import os
import tarfile

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import imagenet_r
from avalanche_firn.benchmarks.downloads import RemoteFile
from avalanche_firn.benchmarks.imagenet_r import imagenet_r_stream
from avalanche_firn.benchmarks.split_lists import read_split, seeded_split, write_split
from avalanche_firn.benchmarks.streams import StreamError

WNIDS = ("n01443537", "n01484850", "n02701002", "n09835506")
NAMES = [f"{wnid}/{kind}_{n}.jpg" for wnid in WNIDS for kind in ("art", "toy") for n in range(5)]


def transform(image):
    return pil_to_tensor(image).float()


def write(root, names=NAMES, inner="imagenet-r"):
    """One grey per image, a different one for each: what JPEG keeps within a few grey values."""
    for name in names:
        path = root / inner / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * NAMES.index(name)).save(path, quality=95)
    (root / inner / "README.txt").write_text("n01443537 goldfish\n")
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(imagenet_r, "IMAGENET_R_IMAGES", len(NAMES))
    monkeypatch.setattr(imagenet_r, "IMAGENET_R_CLASSES", len(WNIDS))


def build(root, **options):
    settings = {"tasks": 2, "train_transform": transform, "eval_transform": transform}
    return imagenet_r_stream(root, **(settings | options))


def found(stream, part):
    """Names of the images of a part, from their pixels, sorted; labels are checked against them."""
    names = []
    for experience in getattr(stream, part):
        for x, y, _ in experience.dataset:
            name = NAMES[round(float(x.mean()) / 6)]
            assert x.shape == (3, 8, 8) and WNIDS[y] == name.split("/")[0]
            names.append(name)
    return sorted(names)


def test_drawn_split_is_written_out_once(root):
    stream = build(root)
    assert (stream.name, stream.class_names, stream.task_sizes) == ("imagenet-r", WNIDS, (2, 2))
    assert stream.valid is None
    train, test = seeded_split(NAMES, 0.8, 0)
    assert len(test) == 8 and found(stream, "train") == train and found(stream, "test") == test
    assert read_split(root / "imagenet-r-split-0.txt") == (train, test)
    own = ([*train[1:], test[0]], [train[0], *test[1:]])
    write_split(root / "imagenet-r-split-0.txt", *own)
    assert found(build(root), "test") == sorted(own[1])
    assert found(build(root, split_seed=5), "test") == seeded_split(NAMES, 0.8, 5)[1]
    assert {path.name for path in root.iterdir()} == {
        "imagenet-r",
        "imagenet-r-split-0.txt",
        "imagenet-r-split-5.txt",
    }


def test_the_folder_of_classes_as_root(root):
    expected = build(root)
    (root / "imagenet-r-split-0.txt").unlink()
    stream = build(root / "imagenet-r")
    assert stream.fingerprint == expected.fingerprint and (root / "imagenet-r" / "imagenet-r-split-0.txt").is_file()
    assert build(root / "imagenet-r").fingerprint == expected.fingerprint  # the list beside the classes is no obstacle


def test_order_of_the_file_system_has_no_influence(root, tmp_path, monkeypatch):
    expected = build(root)
    other = write(tmp_path / "other", NAMES[::-1])
    scandir = os.scandir

    class Turned:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Turned)
    stream = build(other, seed=3)
    monkeypatch.undo()
    assert stream.fingerprint == expected.fingerprint and stream.class_names == expected.class_names
    assert (other / "imagenet-r-split-0.txt").read_text() == (root / "imagenet-r-split-0.txt").read_text()


def test_lists_of_other_projects(root, tmp_path):
    train, test = seeded_split(NAMES, 0.7, 9)
    lists = (tmp_path / "train.yaml", tmp_path / "test.yaml")
    for path, names in zip(lists, (train, test), strict=True):
        path.write_text("data:\n" + "".join(f"- data/imagenet-r/{name}\n" for name in names[::-1]))
    stream = build(root, split_files=lists)
    assert found(stream, "train") == train and found(stream, "test") == test
    assert [path.name for path in root.iterdir()] == ["imagenet-r"]  # nothing was drawn
    lists[1].write_text("data:\n" + "".join(f"- data/imagenet-r/{name}\n" for name in test[1:]))
    with pytest.raises(StreamError, match=f"match the images: 1 on disk and not listed .{test[0]}"):
        build(root, split_files=lists)
    with pytest.raises(StreamError, match="split_files is 'x'; accepted: a pair"):
        build(root, split_files="x")


def test_validation_and_class_order(root):
    stream = build(root, validation_fraction=0.2, class_order=WNIDS[::-1], tasks=[1, 3])
    assert [set(e.classes_in_this_experience) for e in stream.train] == [{3}, {0, 1, 2}]
    both = found(stream, "train") + found(stream, "valid")
    assert sorted(both) == seeded_split(NAMES, 0.8, 0)[0] and len({name[:9] for name in found(stream, "valid")}) == 4


def test_counts_and_parts_of_the_data(root, tmp_path):
    kept = seeded_split(NAMES, 0.8, 0)
    (root / "imagenet-r" / NAMES[0]).unlink()
    with pytest.raises(StreamError, match=r"has 39 images of 4 classes, not 40 of 4; .*complete=False"):
        build(root)
    stream = build(root, complete=False)
    assert found(stream, "test") == seeded_split(NAMES[1:], 0.8, 0)[1]
    assert [path.name for path in root.iterdir()] == ["imagenet-r"]  # a list of a part isn't written
    lists = (tmp_path / "train.txt", tmp_path / "test.txt")
    for path, names in zip(lists, kept, strict=True):
        path.write_text("\n".join(names))
    stream = build(root, complete=False, split_files=lists)
    assert sorted(found(stream, "train") + found(stream, "test")) == NAMES[1:]


def test_images_are_not_opened_before_they_are_read(root):
    (root / "imagenet-r" / NAMES[3]).write_bytes(b"no image")
    stream = build(root)
    with pytest.raises(StreamError, match=r"art_3\.jpg cannot be decoded"):
        found(stream, "train"), found(stream, "test")


def test_trees_that_are_refused(root, tmp_path):
    with pytest.raises(
        StreamError, match=r"ImageNet-R is not in .*nowhere; accepted: .*download=True \(https://people"
    ):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StreamError, match=r"ImageNet-R is not in .*empty"):
        build(tmp_path / "empty")
    write(tmp_path / "parted", inner="imagenet-r/train")
    with pytest.raises(StreamError, match=r"holds the folder 'train'; accepted: .*is for folder_stream"):
        build(tmp_path / "parted")
    (root / "n01443537").mkdir()
    with pytest.raises(StreamError, match=r"imagenet-r stands in .*accepted: one of them"):
        build(root)
    (root / "n01443537").rmdir()
    (root / "imagenet-r" / WNIDS[0] / "notes.txt").write_text("x")
    with pytest.raises(StreamError, match=r"notes\.txt is not an image file"):
        build(root)
    (root / "imagenet-r" / WNIDS[0] / "notes.txt").unlink()
    for options, message in (
        ({"tasks": 5}, "tasks is 5"),
        ({"split_seed": -1}, "seed of the split is -1"),
        ({"eval_transform": None}, "eval_transform is None"),
        ({"class_order": [0, 1]}, "2 entries"),
    ):
        with pytest.raises(StreamError, match=message):
            build(root, **options)


def test_download(root, tmp_path, monkeypatch):
    """The archive is fetched from a file address, unpacked and found; the second time there is nothing to fetch."""
    archive = tmp_path / "imagenet-r.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root / "imagenet-r", "imagenet-r")
    remote = RemoteFile(archive.as_uri(), "imagenet-r.tar", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(imagenet_r, "IMAGENET_R_ARCHIVE", remote)
    stream = build(tmp_path / "new", download=True)
    assert stream.fingerprint == build(root).fingerprint
    archive.unlink()
    (tmp_path / "new" / "imagenet-r.tar").unlink()
    assert build(tmp_path / "new", download=True).fingerprint == stream.fingerprint


def test_default_place(root, monkeypatch):
    monkeypatch.setattr(imagenet_r, "default_root", lambda name: root if name == "imagenet-r" else None)
    assert found(build(None), "test") == seeded_split(NAMES, 0.8, 0)[1]
