"""Omniglot: public layouts, the merged small subsets, one character per experience, and the real drawings."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avalanche_firn.benchmarks import (
    OMNIGLOT_SMALL_PRETRAIN,
    OMNIGLOT_SMALL_TRANSFER,
    StreamError,
    check_disjoint,
    omniglot,
    omniglot_classes,
    omniglot_stream,
)

REAL = Path.home() / ".cache/avalanche-firn/data/omniglot"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the small sets of Omniglot are not unpacked in {REAL}")
BACKGROUND = {"Greek": 2, "Latin": 3, "Tagalog_(x)": 1}


def draw(path, key, edge=35):
    """A 1-bit drawing that its key decides, as the files of Omniglot are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    Image.fromarray(np.random.RandomState(seed).rand(edge, edge) > 0.3).save(path)


def write(folder, alphabets, files=4):
    for alphabet, characters in alphabets.items():
        for c in range(1, characters + 1):
            for n in range(files):
                name = f"{alphabet}/character{c:02d}/{c:04d}_{n:02d}.png"
                draw(folder / name, name)
    return folder


@pytest.fixture
def sizes(monkeypatch):
    """Parts as small as the folders written here count as complete."""
    for part, count in (("background", 6), ("evaluation", 2), ("small", 6)):
        monkeypatch.setitem(omniglot.OMNIGLOT_CLASSES, part, count)


# -------------------------------------------------------------------- layouts
def test_plain_layout(tmp_path):
    data = omniglot_classes(write(tmp_path / "o", BACKGROUND), None)
    names = [f"{a}/character{c:02d}" for a, n in BACKGROUND.items() for c in range(1, n + 1)]
    assert list(data.class_names) == sorted(names) and data.counts.tolist() == [4] * 6
    assert data.images.shape == (24, 1, 28, 28) and (data.mean, data.std) == ((0.0,), (1.0,))
    paths = sorted(
        (tmp_path / "o").glob("*/*/*.png"), key=lambda p: (f"{p.parent.parent.name}/{p.parent.name}", p.name)
    )
    for image, path in zip(data.images, paths, strict=True):
        with Image.open(path) as file:
            assert file.mode == "1"
            expected = np.asarray(file.convert("L").resize((28, 28), Image.Resampling.LANCZOS))
        assert np.array_equal(image[0].numpy(), expected)
    assert data.images.float().mean() > 128  # white paper: not inverted
    assert omniglot_classes(tmp_path / "o", None, size=35).images.shape[-2:] == (35, 35)


@pytest.mark.parametrize("given", ["parent", "omniglot-py", "folder"])
@pytest.mark.parametrize("outer", ["", "omniglot-py"])
def test_public_layouts(tmp_path, sizes, outer, given):
    base = tmp_path / "data" / outer
    write(base / "images_background", BACKGROUND)
    write(base / "images_evaluation", {"Other": 2})
    root = {"parent": tmp_path / "data", "omniglot-py": base, "folder": base / "images_background"}[given]
    data = omniglot_classes(root, "background")
    assert data.fingerprint() == omniglot_classes(base / "images_background", None).fingerprint()
    assert data.num_classes == 6
    if given != "folder":
        other = omniglot_classes(str(root), "evaluation")
        assert other.class_names == ("Other/character01", "Other/character02")
        check_disjoint(data, other)
        with pytest.raises(StreamError, match="isn't a folder of alphabets; accepted: a part, one of 'background'"):
            omniglot_classes(root, None)


def test_small_subsets_are_merged_and_overlaps_taken_once(tmp_path, sizes):
    write(tmp_path / "images_background_small1", {"Greek": 2, "Korean": 2})
    write(tmp_path / "images_background_small2", {"Greek": 2, "Tagalog": 2})
    data = omniglot_classes(tmp_path, "small")
    assert data.num_classes == 6 and data.counts.tolist() == [4] * 6
    assert omniglot_classes(tmp_path / "images_background_small2", "small").fingerprint() == data.fingerprint()
    (tmp_path / "images_background_small2/Greek/character01/0001_02.png").unlink()  # still in the first
    assert omniglot_classes(tmp_path, "small").fingerprint() == data.fingerprint()
    draw(tmp_path / "images_background_small2/Greek/character02/0002_01.png", "another")
    with pytest.raises(StreamError, match=r"0002_01\.png and .*0002_01\.png differ; accepted: the same drawing"):
        omniglot_classes(tmp_path, "small")
    shutil.rmtree(tmp_path / "images_background_small1")
    with pytest.raises(StreamError, match="images_background_small1 is neither in"):
        omniglot_classes(tmp_path, "small")


def test_refuses_what_could_mean_two_things(tmp_path, sizes):
    write(tmp_path / "images_background", BACKGROUND)
    write(tmp_path / "omniglot-py" / "images_background", BACKGROUND)
    with pytest.raises(StreamError, match="are both there; accepted: one images_background"):
        omniglot_classes(tmp_path, "background")
    shutil.rmtree(tmp_path / "images_background")
    (tmp_path / "images_background").symlink_to(tmp_path / "omniglot-py" / "images_background")
    assert omniglot_classes(tmp_path, "background").num_classes == 6  # one folder under two names


def test_alphabets(tmp_path, sizes):
    write(tmp_path / "images_background", BACKGROUND)
    data = omniglot_classes(tmp_path, "background", alphabets=["Tagalog_(x)", "Greek"])
    assert data.class_names == ("Greek/character01", "Greek/character02", "Tagalog_(x)/character01")
    rest = omniglot_classes(tmp_path, "background", alphabets=["Latin"])
    check_disjoint(data, rest)
    for alphabets, message in (
        (["Greek", "Klingon"], r"alphabet 'Klingon' is not there; accepted: Greek, Latin, Tagalog_\(x\)"),
        ("Greek", "alphabets is 'Greek'; accepted: a sequence"),
        ([], "at least one"),
    ):
        with pytest.raises(StreamError, match=message):
            omniglot_classes(tmp_path, "background", alphabets=alphabets)


def test_refuses_incomplete_and_unknown(tmp_path):
    write(tmp_path / "images_background", BACKGROUND)
    with pytest.raises(StreamError, match="has 6 characters, not 964; unpack it again"):
        omniglot_classes(tmp_path, "background")
    with pytest.raises(StreamError, match="part is 'train'; accepted: 'background', 'evaluation', 'small' or None"):
        omniglot_classes(tmp_path, "train")
    with pytest.raises(StreamError, match=r"images_evaluation is neither in .*download=True"):
        omniglot_classes(tmp_path, "evaluation")
    with pytest.raises(StreamError, match="is absent; accepted: ALPHABET/CHARACTER"):
        omniglot_classes(tmp_path / "nowhere", None)
    with pytest.raises(StreamError, match="download is True and part None"):
        omniglot_classes(tmp_path, None, download=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StreamError, match="holds no alphabets"):
        omniglot_classes(tmp_path / "empty", None)
    (tmp_path / "images_background" / "Greek" / "character01" / "notes.txt").write_text("x")
    with pytest.raises(StreamError, match=r"notes\.txt is not an image file"):
        omniglot_classes(tmp_path / "images_background", None)


# ------------------------------------------------------------------- download
def serve(monkeypatch, calls, alphabets):
    """Instead of the network: `alphabets` of a name in the place of its archive."""

    def fetch(file, folder):
        assert len(file.md5) == 32 and file.url.endswith(f"/omniglot/master/python/{file.name}")
        calls.append(file.name)
        return folder / file.name

    def unpack(archive, folder, *, marker):
        assert archive == folder / f"{marker}.zip" and folder.name == "omniglot-py"
        write(folder / marker, alphabets(marker))

    monkeypatch.setattr("avalanche_firn.benchmarks.omniglot.fetch", fetch)
    monkeypatch.setattr("avalanche_firn.benchmarks.omniglot.unpack", unpack)


def test_download_only_where_it_is_asked_for_and_needed(tmp_path, monkeypatch, sizes):
    calls = []
    serve(monkeypatch, calls, lambda name: BACKGROUND if name == "images_background" else {"Other": 2})
    with pytest.raises(StreamError, match="neither"):
        omniglot_classes(tmp_path, "background")
    assert calls == []
    first = omniglot_classes(tmp_path, "background", download=True)
    assert omniglot_classes(tmp_path, "background", download=True).fingerprint() == first.fingerprint()
    assert calls == ["images_background.zip"]
    assert omniglot_classes(tmp_path, "evaluation", download=True).num_classes == 2
    assert calls == ["images_background.zip", "images_evaluation.zip"]


def test_download_of_the_small_subsets(tmp_path, monkeypatch, sizes):
    calls = []
    serve(monkeypatch, calls, lambda n: {"Greek": 2, "Korean": 2} if "small1" in n else {"Greek": 2, "Tagalog": 2})
    assert omniglot_classes(tmp_path, "small", download=True).num_classes == 6
    assert calls == ["images_background_small1.zip", "images_background_small2.zip"]
    assert (tmp_path / "omniglot-py" / "images_background_small1").is_dir()


# --------------------------------------------------------------------- stream
def test_stream(tmp_path, sizes):
    write(tmp_path / "images_background", BACKGROUND, files=20)
    stream = omniglot_stream(tmp_path, "background", seed=3)
    assert stream.name == "omniglot-background" and stream.task_sizes == (1,) * 6 and stream.valid is None
    assert [len(e.dataset) for e in stream.train] == [15] * 6 and [len(e.dataset) for e in stream.test] == [5] * 6
    assert stream.train[0].dataset[0][0].shape == (1, 28, 28)
    assert [min(e.classes_in_this_experience) for e in stream.train] == list(stream.class_order) != list(range(6))
    drawn = {
        part: {x.numpy().tobytes() for e in s for x, *_ in e.dataset} for part, s in stream.benchmark.streams.items()
    }
    assert len(drawn["train"]) == 90 and len(drawn["test"]) == 30 and not drawn["train"] & drawn["test"]
    other = omniglot_stream(tmp_path, "background", split_seed=1, valid_per_class=2, train_per_class=10, name="o")
    assert other.name == "o" and [len(e.dataset) for e in other.valid] == [2] * 6
    assert other.fingerprint != stream.fingerprint
    greek = omniglot_stream(tmp_path, "background", alphabets=["Greek"])
    data = omniglot_classes(tmp_path, "background")
    for c in range(2):  # a character is split in the same way in every selection
        mine = torch.stack([x for x, *_ in greek.test[c].dataset])
        position = stream.class_order.index(data.class_names.index(greek.class_names[c]))
        assert torch.equal(mine, torch.stack([x for x, *_ in stream.test[position].dataset]))
    with pytest.raises(StreamError, match="valid_per_class is -1"):  # before the folder is looked at
        omniglot_stream(tmp_path / "nowhere", None, valid_per_class=-1)
    with pytest.raises(StreamError, match=r"class 'Greek/character01' has 20 image\(s\).* need 21"):
        omniglot_stream(tmp_path, "background", train_per_class=16)


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch, sizes):
    write(tmp_path / "images_background", BACKGROUND, files=6)
    options = {"train_per_class": 4, "test_per_class": 2}
    before = omniglot_stream(tmp_path, "background", **options)
    scandir, listdir = os.scandir, os.listdir
    shuffled = np.random.RandomState(0)

    class Shuffled:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = list(entries)
            shuffled.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

        def __iter__(self):
            return iter(self.entries)

        def close(self):
            pass

    def other_listdir(path="."):
        names = listdir(path)
        shuffled.shuffle(names)
        return names

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", other_listdir)
    orders = {tuple(os.listdir(tmp_path / "images_background")) for _ in range(20)}
    assert len(orders) > 1  # the file system now answers in any order
    for _ in range(3):
        after = omniglot_stream(tmp_path, "background", **options)
        assert after.class_names == before.class_names and after.fingerprint == before.fingerprint
        for part in ("train", "test"):
            for mine, theirs in zip(getattr(before, part), getattr(after, part), strict=True):
                rows = [torch.stack([x for x, *_ in e.dataset]) for e in (mine, theirs)]
                assert torch.equal(*rows)


# ------------------------------------------------------------------ real data
@pytest.fixture(scope="module")
def real():
    return omniglot_classes(REAL, None)


@needs_real
def test_the_small_sets_hold_242_characters_of_20_different_drawings(real):
    assert real.num_classes == 242 == omniglot.OMNIGLOT_CLASSES["small"] and real.counts.tolist() == [20] * 242
    assert len(set(real.image_hashes())) == 4840  # different at 28 pixels too
    alphabets = {name.partition("/")[0] for name in real.class_names}
    assert alphabets == {*OMNIGLOT_SMALL_PRETRAIN, *OMNIGLOT_SMALL_TRANSFER} and len(alphabets) == 8
    assert len(set(real.images.unique().tolist())) > 100  # grey, because files are converted before they are scaled
    assert 200 < real.images.float().mean() < 250


@needs_real
def test_suggested_split_shares_no_class_and_no_image(real):
    sets = {}
    for part, names in (("pretrain", OMNIGLOT_SMALL_PRETRAIN), ("transfer", OMNIGLOT_SMALL_TRANSFER)):
        sets[part] = real.take([name for name in real.class_names if name.partition("/")[0] in names])
    assert (sets["pretrain"].num_classes, sets["transfer"].num_classes) == (175, 67)
    check_disjoint(sets["pretrain"], sets["transfer"])
    for data in sets.values():
        train, test = data.split(15, 5, seed=0)
        assert not set(train.image_hashes()) & set(test.image_hashes())
        assert sorted(train.image_hashes() + test.image_hashes()) == sorted(data.image_hashes())


@needs_real
def test_stream_of_real_drawings():
    stream = omniglot_stream(REAL, None, alphabets=OMNIGLOT_SMALL_TRANSFER, seed=0)
    assert stream.name == "omniglot" and stream.num_classes == len(stream.train) == 67
    assert {len(e.dataset) for e in stream.train} == {15} and {len(e.dataset) for e in stream.test} == {5}
    x, y, task = stream.train[0].dataset[0]
    assert x.shape == (1, 28, 28) and x.min() >= 0 and x.max() <= 1 and y == stream.class_order[0] and task == 0
