"""Streams from folders of class folders."""

import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks.folder import ImageFiles, folder_stream
from avalanche_firn.benchmarks.streams import StreamError, class_order

CLASSES = ("ant", "bee", "cow", "dog", "elk")


def train_transform(image):
    return pil_to_tensor(image).float()


def eval_transform(image):
    return pil_to_tensor(image).float() + 1000


def write_class(folder, label, count, start=0, extension="png"):
    """Images whose pixel (r, g) = (label, number): a sample shows where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.new("RGB", (3, 2), (label, number, 7)).save(folder / f"{number:03d}.{extension}")


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "animals"
    for label, name in enumerate(CLASSES):
        write_class(root / name, label, 5 + label)
    return root


@pytest.fixture
def parted(tmp_path):
    root = tmp_path / "animals"
    for label, name in enumerate(CLASSES):
        write_class(root / "train" / name, label, 4)
        write_class(root / "test" / name, label, 2, start=100)
    return root


def build(root, **options):
    settings = {"tasks": 2, "train_transform": train_transform, "eval_transform": eval_transform} | options
    return folder_stream(root, **settings)


def samples(stream, part):
    """(label in the pixels, number in the pixels, target) of every sample."""
    found = []
    for experience in getattr(stream, part):
        for x, y, _ in experience.dataset.train():
            assert set(experience.classes_in_this_experience) >= {y}
            found.append((int(x[0, 0, 0]), int(x[1, 0, 0]), y))
    return found


@pytest.mark.parametrize("options", [{}, {"seed": 4}, {"class_order": [4, 0, 3, 1, 2], "tasks": [1, 3, 1]}])
def test_flat_folder_is_split_and_nothing_is_lost(flat, options):
    stream = build(flat, **options)
    assert stream.name == "animals" and stream.class_names == CLASSES
    found = {part: samples(stream, part) for part in ("train", "valid", "test")}
    everything = sorted(s for part in found.values() for s in part)
    assert everything == sorted((c, n, c) for c in range(5) for n in range(5 + c))
    for part in ("valid", "test"):
        assert Counter(y for _, _, y in found[part]) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
    if "seed" in options:
        assert stream.class_order == class_order(5, 4)
    if "class_order" in options:
        assert [set(e.classes_in_this_experience) for e in stream.train] == [{4}, {0, 3, 1}, {2}]


def test_the_split_does_not_depend_on_the_class_order(flat):
    first, second, third = build(flat), build(flat, seed=9, tasks=5), build(flat, split_seed=1)
    for part in ("train", "valid", "test"):
        assert sorted(samples(first, part)) == sorted(samples(second, part))
    assert sorted(samples(first, "test")) != sorted(samples(third, "test"))
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_test_folder_is_kept_and_validation_is_drawn(parted):
    stream = build(parted, validation_fraction=0.25)
    assert sorted(samples(stream, "test")) == [(c, n, c) for c in range(5) for n in (100, 101)]
    assert Counter(y for _, _, y in samples(stream, "valid")) == dict.fromkeys(range(5), 1)
    assert len(samples(stream, "train")) == 15
    stream = build(parted, validation_fraction=0)
    assert stream.valid is None and len(samples(stream, "train")) == 20


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder(parted, name):
    for label, folder in enumerate(CLASSES):
        write_class(parted / name / folder, label, 1, start=200)
    stream = build(parted, validation_fraction=0.5)
    assert sorted(samples(stream, "valid")) == [(c, 200, c) for c in range(5)]
    assert len(samples(stream, "train")) == 20


def test_train_folder_alone_is_split(parted, tmp_path):
    parted.joinpath("test").rename(tmp_path / "away")
    stream = build(parted, validation_fraction=0.25, test_fraction=0.25)
    assert [len(samples(stream, part)) for part in ("train", "valid", "test")] == [10, 5, 5]


def test_a_class_may_be_called_train(tmp_path):
    for label, name in enumerate(["bus", "test", "train"]):
        write_class(tmp_path / "r" / name, label, 4)
    stream = build(tmp_path / "r", tasks=3)
    assert stream.class_names == ("bus", "test", "train")


def test_groups_switch_and_evaluation_streams_start_in_eval(flat):
    stream = build(flat)
    data = stream.train[1].dataset
    assert torch.equal(data[0][0] + 1000, data.eval()[0][0])
    assert stream.test[0].dataset[0][0].min() >= 1000 and stream.valid[0].dataset[0][0].min() >= 1000


def test_other_modes_and_hidden_files(flat):
    Image.new("L", (4, 4), 30).save(flat / "ant" / "grey.png")
    Image.new("1", (4, 4)).save(flat / "ant" / "bits.PNG")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(flat / "ant" / "alpha.png")
    Image.new("P", (4, 4)).save(flat / "ant" / "palette.gif")
    Image.new("RGB", (4, 4)).save(flat / "ant" / "photo.jpg")
    (flat / "ant" / ".DS_Store").write_bytes(b"x")
    (flat / "ant" / "Thumbs.db").write_bytes(b"x")
    (flat / ".cache").mkdir()
    (flat / "LICENSE.txt").write_text("free")
    stream = build(flat)
    total = sum(len(e.dataset) for part in (stream.train, stream.valid, stream.test) for e in part)
    assert total == 35 + 5
    assert all(x.shape[0] == 3 for e in stream.train for x, _, _ in e.dataset)


def test_fingerprint_follows_content_and_not_the_place(flat, tmp_path):
    before = build(flat).fingerprint
    moved = tmp_path / "elsewhere"
    flat.rename(moved)
    assert build(moved).fingerprint == before
    os.utime(moved / "bee" / "002.png", (1, 1))
    assert build(moved).fingerprint == before
    Image.new("RGB", (3, 2), (1, 2, 8)).save(moved / "bee" / "002.png")
    changed = build(moved).fingerprint
    assert changed != before
    (moved / "bee" / "002.png").rename(moved / "bee" / "002b.png")
    assert build(moved).fingerprint not in (before, changed)


def test_workers_pickle_and_random_state(flat):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    stream = build(flat, seed=1)
    assert state() == before
    data = pickle.loads(pickle.dumps(stream.train[0].dataset))
    assert torch.equal(data[0][0], stream.train[0].dataset[0][0])
    loader = DataLoader(stream.train[0].dataset, batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert sum(len(x) for x, _, _ in loader) == len(stream.train[0].dataset)


def refused(root, message, **options):
    with pytest.raises(StreamError, match=message):
        build(root, **options)


def test_refuses_missing_and_empty_folders(flat, tmp_path):
    refused(tmp_path / "nowhere", r"nowhere is absent; accepted: root/CLASS")
    refused(flat / "ant" / "000.png", "is not a folder; accepted")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no class folders; accepted")
    (flat / "fox").mkdir()
    refused(flat, "class folder .*fox holds no images")


def test_refuses_files_that_are_no_images(flat):
    notes = flat / "bee" / "notes.txt"
    notes.write_text("buzz")
    refused(flat, r"notes\.txt is not an image file; accepted: \.bmp")
    notes.unlink()
    (flat / "bee" / "fake.png").write_text("not a picture at all")
    refused(flat, r"fake\.png cannot be read as an image")
    (flat / "bee" / "fake.png").write_bytes(b"")
    refused(flat, r"fake\.png cannot be read as an image")
    (flat / "bee" / "fake.png").unlink()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(flat / "bee" / "deep.png")
    refused(flat, r"deep\.png cannot be read.* mode I;16; accepted: 8 bits")


def test_refuses_folders_inside_class_folders(flat):
    write_class(flat / "bee" / "deeper", 1, 1)
    refused(flat, "class folder .*bee holds the folder 'deeper'; accepted: root/CLASS")


def test_refuses_images_outside_class_folders(flat):
    Image.new("RGB", (2, 2)).save(flat / "stray.png")
    refused(flat, r"stray\.png is an image outside any class folder")


def test_refuses_stray_part_folders(parted):
    write_class(parted / "extra", 0, 1)
    refused(parted, "extra stands beside .*train")


def test_refuses_two_validation_folders(parted):
    for name in ("val", "valid"):
        for label, folder in enumerate(CLASSES):
            write_class(parted / name / folder, label, 1)
    refused(parted, "are both there; accepted: one validation folder")


def test_refuses_loose_images_in_a_part(parted):
    Image.new("RGB", (2, 2)).save(parted / "test" / "stray.png")
    refused(parted, r"stray\.png is an image outside any class folder")


def test_refuses_classes_that_differ(parted):
    write_class(parted / "test" / "fox", 5, 1)
    refused(parted, "'fox' is missing in .*train; accepted: the same classes")
    write_class(parted / "train" / "fox", 5, 3)
    write_class(parted / "train" / "gnu", 6, 3)
    refused(parted, "'gnu' is missing in .*test; accepted: the same classes")


def test_refuses_orders_sizes_and_splits(flat):
    refused(flat, "2 entries", class_order=[0, 1])
    refused(flat, "repeats the classes 0", class_order=[0, 1, 2, 3, 0])
    refused(flat, "unknown classes 'yak'", class_order=["ant", "bee", "cow", "dog", "yak"])
    refused(flat, "sum to 4", tasks=[2, 2])
    refused(flat, "tasks is 6", tasks=6)
    refused(flat, r"validation_fraction is 1\.5", validation_fraction=1.5)
    refused(flat, "nothing to train on", validation_fraction=0.5, test_fraction=0.5)
    refused(flat, "no folder test and test_fraction is 0", test_fraction=0)
    refused(flat, "train_transform is None", train_transform=None)


def test_refuses_too_few_images_before_opening_any(tmp_path):
    write_class(tmp_path / "r" / "ant", 0, 5)
    write_class(tmp_path / "r" / "bee", 1, 2)
    (tmp_path / "r" / "ant" / "broken.png").write_bytes(b"?")
    refused(tmp_path / "r", r"class 'bee' has 2 image\(s\); a 3-way split needs 3")
    (tmp_path / "r" / "ant" / "broken.png").unlink()
    assert build(tmp_path / "r", validation_fraction=0).valid is None


def test_a_file_that_breaks_later_is_named(flat):
    data = ImageFiles([str(flat / "ant" / "000.png")], [0])
    (flat / "ant" / "000.png").write_bytes(b"gone")
    with pytest.raises(StreamError, match=r"000\.png cannot be decoded"):
        data[0]


def test_truncated_image_is_named_when_it_is_read(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(StreamError, match=r"part\.png cannot be decoded"):
        ImageFiles([str(tmp_path / "part.png")], [0])[0]
