"""Streams from the `datasets` library, on miniature folders. Pixels say class and number."""

import io
import pickle
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import huggingface as module
from avalanche_firn.benchmarks.huggingface import HubImages, huggingface_stream
from avalanche_firn.benchmarks.streams import Digest, StreamError, class_order

CLASSES = ("ant", "bee", "cow", "dog")
PER_CLASS = {"train": 5, "test": 2, "validation": 3}
OFFSET = {"train": 0, "test": 100, "validation": 200}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The library, offline and with its cache in the test's own folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets", minversion="4.0")
    # the library reads its environment when it is imported, which another test may have done
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def to_tensor(image):
    assert image.mode == "RGB"
    return pil_to_tensor(image).float()


def to_negative(image):
    return -to_tensor(image) - 1


def picture(label, number):
    return Image.new("RGB", (4, 3), (label, number, 7))


def write_folder(root, splits=("train", "test"), numbers=None):
    for split in splits:
        for number in numbers or range(PER_CLASS[split]):
            for label, name in enumerate(CLASSES):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                if number < PER_CLASS[split]:
                    picture(label, OFFSET[split] + number).save(folder / f"{number:02d}.png")
    return str(root)


def encoded(label, number):
    buffer = io.BytesIO()
    picture(label, number).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(library, split="train", *, classes=None, extra=None, name="label", values=None):
    """A split in memory, rows of the classes mixed."""
    pairs = [(label, OFFSET[split] + number) for number in range(PER_CLASS[split]) for label in range(len(CLASSES))]
    columns = {
        "image": [encoded(*pair) for pair in pairs],
        name: [label if values is None else values[label] for label, _ in pairs],
    }
    features = {"image": library.Image(), name: library.ClassLabel(names=list(classes or CLASSES))}
    if values is not None:
        features[name] = library.Value("int64" if isinstance(values[0], int) else "string")
    for column, (feature, filling) in (extra or {}).items():
        columns[column] = [filling] * len(pairs)
        features[column] = feature
    return library.Dataset.from_dict(columns, features=library.Features(features))


def save(library, root, **splits):
    library.DatasetDict(splits).save_to_disk(str(root))
    return str(root)


def build(dataset, **options):
    settings = {"tasks": 2, "train_transform": to_tensor, "eval_transform": to_tensor}
    return huggingface_stream(dataset, **{**settings, **options})


def samples(stream, part):
    """(class in the pixels, number in the pixels, target) of every sample."""
    return [(*(int(v) for v in x[:2, 0, 0]), int(y)) for e in stream.benchmark.streams[part] for x, y, _ in e.dataset]


def whole(split):
    return sorted((c, OFFSET[split] + n, c) for c in range(4) for n in range(PER_CLASS[split]))


def test_folder_of_images(library, tmp_path):
    stream = build(write_folder(tmp_path / "animals"), validation_fraction=0)
    assert stream.name == "animals" and stream.class_names == CLASSES and stream.valid is None
    assert stream.class_order == (0, 1, 2, 3) and stream.task_sizes == (2, 2)
    assert sorted(samples(stream, "train")) == whole("train") and sorted(samples(stream, "test")) == whole("test")


def test_formats_of_the_library_by_name(library, tmp_path):
    root = write_folder(tmp_path / "animals")
    stream = build("imagefolder", data_dir=tmp_path / "animals")
    assert stream.name == "animals" and stream.fingerprint == build(root).fingerprint


def test_parquet_and_saved_folder_give_the_same_stream(library, tmp_path):
    train, test = table(library), table(library, "test")
    saved = save(library, tmp_path / "saved", train=train, test=test)
    (tmp_path / "parquet").mkdir()
    train.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    test.to_parquet(str(tmp_path / "parquet" / "test.parquet"))
    first, second = build(saved), build(str(tmp_path / "parquet"))
    assert first.fingerprint == second.fingerprint
    for part in ("train", "valid", "test"):
        assert samples(first, part) == samples(second, part)


def test_one_saved_split_is_split(library, tmp_path):
    table(library).save_to_disk(str(tmp_path / "one"))
    stream = build(str(tmp_path / "one"), validation_fraction=0.2, test_fraction=0.4)
    found = {part: samples(stream, part) for part in ("train", "valid", "test")}
    assert sorted(row for rows in found.values() for row in rows) == whole("train")
    assert [Counter(row[2] for row in found[part]) for part in found] == [dict.fromkeys(range(4), n) for n in (2, 1, 2)]
    again = build(str(tmp_path / "one"), validation_fraction=0.2, test_fraction=0.4, split_seed=1)
    assert again.fingerprint != stream.fingerprint and samples(again, "test") != found["test"]
    with pytest.raises(StreamError, match="has no split for test and test_fraction is 0; accepted: one of both"):
        build(str(tmp_path / "one"), test_fraction=0)


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        (("train", "test", "validation"), {}, {"train": "train", "valid": "validation", "test": "test"}),
        (("train", "validation"), {"validation_fraction": 0}, {"train": "train", "test": "validation"}),
        (
            ("train", "test", "validation"),
            {"test": "validation", "validation": "test"},
            {"train": "train", "valid": "test", "test": "validation"},
        ),
        (
            ("train", "test"),
            {"train": "test", "test": "train", "validation_fraction": 0},
            {"train": "test", "test": "train"},
        ),
    ],
)
def test_which_split_is_which_part(library, tmp_path, there, options, expected):
    root = save(library, tmp_path / "d", **{split: table(library, split) for split in there})
    stream = build(root, **options)
    assert set(stream.benchmark.streams) == set(expected)
    for part, split in expected.items():
        assert sorted(samples(stream, part)) == whole(split)


def test_validation_drawn_where_its_split_is_the_test_part(library, tmp_path):
    root = save(library, tmp_path / "d", train=table(library), validation=table(library, "validation"))
    stream = build(root, validation_fraction=0.2)
    assert sorted(samples(stream, "test")) == whole("validation")
    assert sorted(samples(stream, "train") + samples(stream, "valid")) == whole("train")


def test_class_order_tasks_and_groups(library, tmp_path):
    root = write_folder(tmp_path / "animals")
    stream = build(root, tasks=[1, 3], class_order=["dog", "ant", "bee", "cow"], eval_transform=to_negative)
    assert stream.class_order == (3, 0, 1, 2) and {row[2] for row in samples(stream, "train")} == {0, 1, 2, 3}
    assert stream.train[0].classes_in_this_experience == {3}
    assert all(row[0] < 0 for row in samples(stream, "test")) and all(row[0] >= 0 for row in samples(stream, "train"))
    assert build(root, seed=3).class_order == class_order(4, 3)
    assert build(root, seed=3).fingerprint == build(root).fingerprint


def test_order_of_the_file_system_does_not_matter(library, tmp_path):
    first = build(write_folder(tmp_path / "a" / "animals"))
    second = build(write_folder(tmp_path / "b" / "animals", numbers=[4, 1, 3, 0, 2]))
    assert first.fingerprint == second.fingerprint and samples(first, "train") == samples(second, "train")


def test_fingerprint_follows_labels_and_images(library, tmp_path):
    before = build(save(library, tmp_path / "a", train=table(library), test=table(library, "test"))).fingerprint
    other = save(library, tmp_path / "b", train=table(library), test=table(library, "validation"))
    named = save(
        library, tmp_path / "c", train=table(library, classes="abcd"), test=table(library, "test", classes="abcd")
    )
    assert len({before, build(other).fingerprint, build(named).fingerprint}) == 3


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["elk", "bat", "cat", "ape"], ("ape", "bat", "cat", "elk"), [3, 1, 2, 0]),
        ([10, 9, 2, 33], ("2", "9", "10", "33"), [2, 1, 0, 3]),  # sorted as numbers
    ],
)
def test_text_and_numbers_as_labels(library, tmp_path, values, names, ids):
    parts = {split: table(library, split, values=values, name="kind") for split in ("train", "test")}
    stream = build(save(library, tmp_path / "d", **parts), validation_fraction=0)
    assert stream.class_names == names
    assert {(row[0], row[2]) for row in samples(stream, "train")} == set(enumerate(ids))


def test_a_class_label_goes_before_other_columns(library, tmp_path):
    extra = {
        "id": (library.Value("int64"), 1),
        "text": (library.Value("string"), "x"),
        "w": (library.Value("float32"), 0),
    }
    parts = {split: table(library, split, extra=extra) for split in ("train", "test")}
    root = save(library, tmp_path / "d", **parts)
    assert build(root).class_names == CLASSES
    with pytest.raises(
        StreamError, match=r"label is 'w'; accepted: classes, whole numbers or text; .*w \(Value float32\)"
    ):
        build(root, label="w")
    with pytest.raises(StreamError, match=r"label is 'kind'; accepted: one of the columns of .*: image \(Image"):
        build(root, label="kind")
    with pytest.raises(StreamError, match=r"image is 'picture'; accepted: one of the columns"):
        build(root, image="picture")
    with pytest.raises(StreamError, match="image is 'w', of which the library makes no images"):
        build(root, image="w")


def test_ambiguous_columns_are_listed(library, tmp_path):
    coarse = {"coarse": (library.ClassLabel(names=["all"]), 0)}
    root = save(library, tmp_path / "d", **{s: table(library, s, extra=coarse, name="fine") for s in ("train", "test")})
    with pytest.raises(StreamError, match=r"the label column is ambiguous \(fine, coarse\).*fine \(ClassLabel int64\)"):
        build(root)
    assert build(root, label="fine").class_names == CLASSES
    two = {"mask": (library.Image(), encoded(0, 0))}
    root = save(library, tmp_path / "e", **{s: table(library, s, extra=two) for s in ("train", "test")})
    with pytest.raises(StreamError, match=r"the image column is ambiguous \(image, mask\)"):
        build(root)
    assert sorted(samples(build(root, image="image"), "test")) == whole("test")
    alone = library.Dataset.from_dict({"x": [1.0, 2.0]})
    root = save(library, tmp_path / "f", train=alone, test=alone)
    with pytest.raises(StreamError, match=r"the image column is not to be found by type .*: x \(Value float64\)"):
        build(root)


def test_bytes_are_images_where_they_are_named(library, tmp_path):
    parts = {}
    for split in ("train", "test"):
        data = table(library, split)
        raw = [row["bytes"] for row in data.cast_column("image", library.Image(decode=False))["image"]]
        parts[split] = library.Dataset.from_dict(
            {"png": raw, "label": data["label"][:]},
            features=library.Features(
                {"png": library.Value("binary"), "label": library.ClassLabel(names=list(CLASSES))}
            ),
        )
    root = save(library, tmp_path / "d", **parts)
    with pytest.raises(StreamError, match="the image column is not to be found by type"):
        build(root)
    assert sorted(samples(build(root, image="png"), "test")) == whole("test")


def test_absent_splits_are_listed(library, tmp_path):
    root = write_folder(tmp_path / "animals")
    for field in ("train", "test", "validation"):
        with pytest.raises(StreamError, match=rf"{field} is 'dev'; accepted: the splits of .*animals': train, test"):
            build(root, **{field: "dev"})
    with pytest.raises(StreamError, match="test is 'train', as for another part"):
        build(root, test="train")


def test_labels_that_are_missing_or_secret(library, tmp_path):
    data = table(library)
    secret = table(library, "test").cast_column("label", library.Value("int64"))
    secret = secret.map(lambda row: {"label": -1}).cast_column("label", library.ClassLabel(names=list(CLASSES)))
    root = save(library, tmp_path / "a", train=data, test=secret, validation=table(library, "validation"))
    with pytest.raises(
        StreamError, match=r"8 of 8 rows of split 'test' have a 'label' outside 0\.\.3 \(from -1 to -1\)"
    ):
        build(root)
    assert sorted(samples(build(root, test="validation"), "test")) == whole("validation")
    empty = library.Dataset.from_dict({"image": data["image"][:2], "label": [None, 1]}, features=data.features)
    root = save(library, tmp_path / "b", train=empty, test=data)
    with pytest.raises(StreamError, match="1 of 2 rows of split 'train' have no 'label'"):
        build(root)


def test_classes_must_agree(library, tmp_path):
    root = save(library, tmp_path / "a", train=table(library), test=table(library, "test", classes="abcd"))
    with pytest.raises(StreamError, match="the classes of split 'test' are not those of 'train'"):
        build(root)
    root = save(library, tmp_path / "b", train=table(library), test=table(library, "test").select(range(3)))
    with pytest.raises(StreamError, match=r"split 'test' of .* has no image of dog; accepted: every class"):
        build(root)
    root = save(library, tmp_path / "c", train=table(library), test=table(library, "test").remove_columns("label"))
    with pytest.raises(StreamError, match="column 'label' is missing in the test split"):
        build(root)


def test_too_few_images_and_wrong_tasks(library, tmp_path):
    root = save(library, tmp_path / "d", train=table(library, "test"))
    with pytest.raises(StreamError, match=r"class 'ant' has 2 image\(s\); a 3-way split needs 3"):
        build(root)
    with pytest.raises(StreamError, match="tasks is 5"):
        build(root, tasks=5, validation_fraction=0)


def test_what_cannot_be_loaded_is_named(library, tmp_path):
    with pytest.raises(StreamError, match=r"dataset 'nobody/nothing' cannot be loaded: \w+: "):
        build("nobody/nothing")
    with pytest.raises(StreamError, match="cannot be loaded"):
        build(str(tmp_path))
    with pytest.raises(StreamError, match=r"cannot be loaded: .*'small' not found"):
        build(write_folder(tmp_path / "animals"), config="small")
    saved = save(library, tmp_path / "d", train=table(library))
    with pytest.raises(StreamError, match="folder of save_to_disk; accepted: no config, revision or data_dir"):
        build(saved, revision="main")


def test_a_script_is_never_run(library, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for dataset in (tmp_path / "code", tmp_path / "code" / "code.py"):
        with pytest.raises(StreamError, match="cannot be loaded"):
            build(str(dataset))
    assert not ran.exists()


def test_images_that_break(library, tmp_path):
    broken = [encoded(label, 0) for label in range(4)] * 2
    broken[5] = {"bytes": b"no image", "path": None}
    broken[6] = None
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(buffer, format="PNG")
    broken[7] = {"bytes": buffer.getvalue(), "path": None}
    test = library.Dataset.from_dict({"image": broken, "label": [0, 1, 2, 3] * 2}, features=table(library).features)
    stream = build(save(library, tmp_path / "d", train=table(library), test=test))
    with pytest.raises(StreamError, match=r"row \d of column 'image' cannot be decoded"):
        samples(stream, "test")
    images = HubImages(test, "image", range(8), [0, 1, 2, 3] * 2)
    assert images[4][0].getpixel((0, 0)) == (0, 0, 7)
    for row, message in (
        (5, "no image of a known format; acc"),
        (6, "it is empty; accepted"),
        (7, "pixels of mode I;16; acc"),
    ):
        with pytest.raises(StreamError, match=rf"row {row} of column 'image' cannot be decoded: {message}"):
            images[row]


def test_an_empty_first_image_is_refused(library, tmp_path):
    data = table(library)
    rows = [None, *(encoded(c % 4, 0) for c in range(1, 8))]
    empty = library.Dataset.from_dict({"image": rows, "label": [0, 1, 2, 3] * 2}, features=data.features)
    with pytest.raises(StreamError, match="row 0 of column 'image' is empty; accepted: an image in every row"):
        build(save(library, tmp_path / "d", train=data, test=empty))


def test_grey_images_become_rgb_and_files_may_vanish(library, tmp_path):
    root = tmp_path / "animals"
    write_folder(root)
    Image.new("L", (4, 3), 9).save(root / "train" / "ant" / "00.png")
    stream = build(str(root), validation_fraction=0)
    assert all(x.shape == (3, 3, 4) for e in stream.train for x, *_ in e.dataset)
    (root / "train" / "ant" / "00.png").unlink()
    with pytest.raises(StreamError, match=r"row 0 of column 'image' cannot be decoded: .*00\.png"):
        samples(stream, "train")
    gone = library.Dataset.from_dict({"image": [str(root / "train" / "ant" / "00.png")]})
    with pytest.raises(StreamError, match=r"row 0 of column 'image' cannot be read: .*00\.png"):
        module._add_part(library, Digest(), "train", gone, "image", np.array([0]), np.array([0]))


def test_workers_and_pickle(library, tmp_path):
    stream = build(save(library, tmp_path / "d", train=table(library), test=table(library, "test")))
    data = pickle.loads(pickle.dumps(stream.train[0].dataset))
    assert torch.equal(data[1][0], stream.train[0].dataset[1][0])
    loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert sum(len(x) for x, *_ in loader) == len(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_transform": None}, "train_transform is None"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"split_seed": "a"}, "seed of the split is 'a'"),
    ],
)
def test_wrong_arguments_are_refused_first(options, message):
    with pytest.raises(StreamError, match=message):
        build("nobody/nothing", **options)


def test_dataset_is_a_text(library):
    for wrong in ("", 3, None):
        with pytest.raises(StreamError, match="accepted: a name on the Hub or a folder, as text"):
            build(wrong)


def test_missing_library_comes_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StreamError, match=r"needs the library datasets: pip install avalanche-firn\[huggingface\]"):
        build("cifar100")


def test_old_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(StreamError, match=r"datasets has version 3\.6\.0; accepted: 4\.0 or later"):
        build("cifar100")


def test_the_library_is_not_imported_with_the_package():
    assert "datasets" not in vars(module)
