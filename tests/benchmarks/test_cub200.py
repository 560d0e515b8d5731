"""CUB-200-2011 on a miniature of the public layout: official parts, whole images, lists that don't fit, download."""

import hashlib
import tarfile

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import cub200
from avalanche_firn.benchmarks.cub200 import cub200_stream
from avalanche_firn.benchmarks.downloads import RemoteFile
from avalanche_firn.benchmarks.streams import StreamError

CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
# id, class, to train: ids aren't grouped by class, as if they were drawn
ROWS = [(n, (n - 1) % 3 + 1, int(n % 4 > 0)) for n in range(1, 19)]


def transform(image):
    return pil_to_tensor(image).float()


def image_path(n, c):
    return f"{CLASSES[c - 1]}/Bird_{n:04d}.jpg"


def write(root, rows=ROWS):
    folder = root / "CUB_200_2011"
    for n, c, _ in rows:
        path = folder / "images" / image_path(n, c)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (10 * n, 10 * n, 10 * n)).save(path, quality=95)
    lists = {
        "images.txt": [f"{n} {image_path(n, c)}" for n, c, _ in rows],
        "image_class_labels.txt": [f"{n} {c}" for n, c, _ in rows],
        "train_test_split.txt": [f"{n} {train}" for n, _, train in rows],
        "classes.txt": [f"{i} {name}" for i, name in enumerate(CLASSES, 1)],
        "bounding_boxes.txt": [f"{n} 2.0 3.0 5.0 4.0" for n, _, _ in rows],
    }
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(cub200, "CUB200_IMAGES", {"train": 14, "test": 4})
    monkeypatch.setattr(cub200, "CUB200_CLASSES", 3)


def build(root, **options):
    settings = {"tasks": 3, "train_transform": transform, "eval_transform": transform}
    return cub200_stream(root, **(settings | options))


def found(stream, part):
    """(image id from the pixels, class number) of every sample, sorted; images are whole."""
    rows = []
    for experience in getattr(stream, part):
        for x, y, _ in experience.dataset:
            assert x.shape == (3, 12, 16)  # Avalanche's CUB200 would give the box, 4 x 5
            rows.append((round(float(x.mean()) / 10), y + 1))
    return sorted(rows)


def test_official_parts(root):
    stream = build(root)
    assert (stream.name, stream.class_names, stream.task_sizes) == ("cub200", CLASSES, (1, 1, 1))
    assert stream.valid is None
    for part, flag in (("train", 1), ("test", 0)):
        assert found(stream, part) == [(n, c) for n, c, train in ROWS if train == flag]


def test_parts_without_their_boxes_in_avalanche_too(root):
    """The parts are those of Avalanche's class, whose samples are cut to the boxes."""
    from avalanche.benchmarks.datasets import CUB200

    theirs = CUB200(root, train=True, download=False)
    paths = sorted((str(path), label) for path, label, _ in theirs._images)
    assert paths == sorted((image_path(n, c), c - 1) for n, c, train in ROWS if train)
    assert theirs[0][0].size == (5, 4)


def test_order_of_files_and_lines_has_no_influence(root, tmp_path):
    other = write(tmp_path / "other", ROWS[::-1])
    assert build(other).fingerprint == build(root).fingerprint
    assert build(root / "CUB_200_2011", seed=4).fingerprint == build(root).fingerprint


def test_validation_and_class_order(root):
    stream = build(root, validation_fraction=0.25, class_order=[2, 0, 1], tasks=[2, 1])
    assert [set(e.classes_in_this_experience) for e in stream.train] == [{0, 2}, {1}]
    assert len(found(stream, "valid")) == 3 and len(found(stream, "train")) == 11
    assert len({build(root, validation_fraction=0.25, split_seed=s).fingerprint for s in range(4)}) > 1


def test_counts_are_checked(root, monkeypatch):
    monkeypatch.setattr(cub200, "CUB200_IMAGES", {"train": 5_994, "test": 5_794})
    with pytest.raises(StreamError, match=r"lists \{'train': 14, 'test': 4\} images of 3 classes, not .*5994.*of 3"):
        build(root)
    assert len(found(build(root, complete=False), "train")) == 14


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "5 002", "4 002", r"images\.txt, line 5: the id 4 is there twice"),
        ("images.txt", "5 002", "x 002", r"images\.txt, line 5: 'x 002.*accepted: an id and a value"),
        ("images.txt", "5 002", "99 002", r"class_labels\.txt lacks the image 99 of images\.txt"),
        ("images.txt", "5 002.L", "5 003.L", r"image 5 is '003\.L.* and its class '002\.Laysan_Albatross'"),
        ("images.txt", "5 002", "5 ../002", r"image 5 is '\.\./002"),
        ("image_class_labels.txt", "5 2", "5 4", r"labels\.txt: image 5 has class '4'; accepted: 1\.\.3"),
        ("image_class_labels.txt", "5 2", "5 0", "image 5 has class '0'"),
        ("image_class_labels.txt", "5 2\n", "", r"image_class_labels\.txt lacks the image 5 of images\.txt"),
        ("train_test_split.txt", "5 1", "5 2", r"split\.txt: image 5 has '2'; accepted: 1 to train"),
        ("train_test_split.txt", "5 1", "19 1", r"train_test_split\.txt lacks the image 5 of images\.txt"),
        ("classes.txt", "3 003", "4 003", r"classes\.txt has the ids 1, 2, 4; accepted: 1, 2"),
        ("classes.txt", "3 003", "\n3 003", r"classes\.txt, line 3: ''"),
    ],
)
def test_lists_that_do_not_fit(root, name, old, new, message):
    path = root / "CUB_200_2011" / name
    text = "\n" + path.read_text()
    assert text.count(f"\n{old}") == 1
    path.write_text(text.replace(f"\n{old}", f"\n{new}")[1:])
    with pytest.raises(StreamError, match=message):
        build(root)


def test_trees_that_are_refused(root, tmp_path):
    with pytest.raises(StreamError, match=r"CUB-200-2011 is not in .*nowhere; .*download=True \(https://data\.caltech"):
        build(tmp_path / "nowhere")
    (root / "CUB_200_2011" / "images" / image_path(7, 1)).unlink()
    with pytest.raises(StreamError, match=r"1 of 18 listed files are not in .*: images/001.*Bird_0007\.jpg"):
        build(root)
    (root / "CUB_200_2011" / "train_test_split.txt").write_text("")
    with pytest.raises(StreamError, match=r"split\.txt is empty"):
        build(root)
    (root / "CUB_200_2011" / "image_class_labels.txt").unlink()
    with pytest.raises(StreamError, match=r"labels\.txt cannot be read.*accepted: root/CUB_200_2011/"):
        build(root)
    with pytest.raises(StreamError, match="train_transform is 3"):
        build(root, train_transform=3)


def test_download(root, tmp_path, monkeypatch):
    archive = tmp_path / "CUB_200_2011.tgz"
    (root / "attributes.txt").write_text("beside the folder, as in the archive")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "attributes.txt", "attributes.txt")
        tar.add(root / "CUB_200_2011", "CUB_200_2011")
    remote = RemoteFile(archive.as_uri(), "CUB_200_2011.tgz", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cub200, "CUB200_ARCHIVE", remote)
    stream = build(tmp_path / "new", download=True)
    assert stream.fingerprint == build(root).fingerprint
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "CUB_200_2011",
        "CUB_200_2011.tgz",
        "attributes.txt",
    }


def test_default_place(root, monkeypatch):
    monkeypatch.setattr(cub200, "default_root", lambda name: root if name == "CUB_200_2011" else None)
    assert build(None).fingerprint == build(root).fingerprint
