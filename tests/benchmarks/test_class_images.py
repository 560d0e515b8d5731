"""Images of many classes in memory: choosing classes, splitting, pixels, reading files, one class per experience."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avalanche_firn.benchmarks import (
    ClassImages,
    StreamError,
    check_disjoint,
    class_order,
    one_class_stream,
    read_class_images,
    split_stream,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(counts, names=None, channels=1, seed=0, edge=4, **options):
    """Images whose first two values are (class, number): a row shows where it came from; the rest is noise."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), channels, edge, edge), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels
    images[:, 0, 0, 1] = torch.cat([torch.arange(n) for n in counts])
    return ClassImages(images, labels, tuple(names or (f"c{c}" for c in range(len(counts)))), **options)


def origins(data):
    """(class the image came from, its number there, name of the class it is in now) of every row."""
    first = data.images[:, 0, 0, :2].tolist()
    return [(c, n, data.class_names[label]) for (c, n), label in zip(first, data.labels.tolist(), strict=True)]


# ------------------------------------------------------------ fields and take
def test_fields():
    data = make([3, 1, 2], mean=[0.5], std=[0.25])
    assert (data.num_classes, len(data), data.counts.tolist()) == (3, 6, [3, 1, 2])
    assert data.mean == (0.5,) and data.class_names == ("c0", "c1", "c2")
    data.counts.zero_()  # a copy: nothing can be spoilt through it
    assert data.counts.tolist() == [3, 1, 2]
    assert make([1]).mean == (0.0,) and make([1]).std == (1.0,)
    assert data.to("cpu").fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 1, 2, 2)}, r"images are torch.float32 of shape"),
        ({"images": torch.zeros(3, 2, 2, 2, dtype=torch.uint8)}, r"images are .*\(3, 2, 2, 2\); accepted: uint8"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, "N >= 1"),
        ({"labels": torch.tensor([0, 0, 1], dtype=torch.int32)}, r"labels are torch.int32"),
        ({"labels": torch.tensor([0, 1])}, r"accepted: int64 \(3,\)"),
        ({"labels": torch.tensor([0, 1, 0])}, "not 0..1 in this order"),
        ({"labels": torch.tensor([0, 0, 0])}, "not 0..1 in this order, each at least once"),
        ({"labels": torch.tensor([0, 1, 2])}, "not 0..1 in this order"),
        ({"class_names": ("a", "a")}, "class_names holds 'a' 2 times"),
        ({"mean": (0.1, 0.2)}, r"mean is \(0.1, 0.2\); accepted: one finite figure or 1"),
        ({"mean": (float("nan"),)}, "mean is .*nan"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"std": (0.0,)}, "std is .*above 0"),
    ],
)
def test_refuses_other_fields(change, message):
    fields = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 0, 1]),
        "class_names": ("a", "b"),
    }
    ClassImages(**fields)
    with pytest.raises(StreamError, match=message):
        ClassImages(**(fields | change))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_take_is_the_loop_over_the_classes(counts, data):
    whole = make(counts)
    chosen = data.draw(st.permutations(range(len(counts))))[: data.draw(st.integers(1, len(counts)))]
    expected = [(c, n, f"c{c}") for c in chosen for n in range(counts[c])]
    for given_as in (chosen, [f"c{c}" for c in chosen], np.array(chosen), torch.tensor(chosen)):
        part = whole.take(given_as)
        assert origins(part) == expected
        assert part.labels.tolist() == [i for i, c in enumerate(chosen) for _ in range(counts[c])]
    assert torch.equal(part.images, torch.cat([whole.images[whole.labels == c] for c in chosen]))


def test_take_refuses():
    whole = make([1, 2, 3])
    for classes, message in (
        ([], "at least one"),
        ("c1", "sequence of class ids or names"),
        ([0, 3], r"class 3 is unknown; accepted: ids 0\.\.2"),
        ([-1], "class -1 is unknown"),
        ([True], "class True is unknown"),
        (["c9"], "class 'c9' is unknown"),
        ([1, "c1"], "class 'c1' is given twice"),
    ):
        with pytest.raises(StreamError, match=message):
            whole.take(classes)


# --------------------------------------------------------------------- split
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(4, 9), min_size=1, max_size=5),
    st.sampled_from([(1, 2), (2, 1, 1), (1, -1), (-1, 2), (1, -1, 1), (4,)]),
    st.integers(0, 2**32 - 1),
)
def test_split_gives_every_image_once_in_file_order(counts, sizes, seed):
    whole = make(counts)
    parts = whole.split(*sizes, seed=seed, drop_rest=-1 not in sizes)
    rows = [origins(part) for part in parts]
    for size, part, found in zip(sizes, parts, rows, strict=True):
        assert part.class_names == whole.class_names and found == sorted(found)
        rest = [n - sum(s for s in sizes if s > 0) for n in counts]
        assert part.counts.tolist() == (rest if size == -1 else [size] * len(counts))
    everything = [row for found in rows for row in found]
    assert len(set(everything)) == len(everything)
    if -1 in sizes:
        assert sorted(everything) == origins(whole)


def test_split_is_the_permutation_of_seed_and_name():
    import hashlib

    whole = make([6, 5], names=("Greek/character01", "b"))
    parts = whole.split(3, -1, seed=7)
    for c, (name, count) in enumerate(zip(whole.class_names, (6, 5), strict=True)):
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
        order = np.random.RandomState([7, *words]).permutation(count).tolist()
        assert [n for k, n, _ in origins(parts[0]) if k == c] == sorted(order[:3])
        assert [n for k, n, _ in origins(parts[1]) if k == c] == sorted(order[3:])


def test_split_of_a_class_does_not_depend_on_the_others():
    whole = make([6] * 20)
    first = whole.split(4, 2, seed=3)
    again = whole.take([5, 2, 11]).split(4, 2, seed=3)
    for part, small in zip(first, again, strict=True):
        assert origins(part.take(["c5", "c2", "c11"])) == origins(small)
    numbers = {tuple(n for c, n, _ in origins(first[1]) if c == k) for k in range(20)}
    assert len(numbers) > 5  # of 15 pairs: the classes are split differently
    assert origins(whole.split(4, 2, seed=4)[1]) != origins(first[1])


def test_split_refuses():
    whole = make([6, 4], names=("a", "few"))
    for sizes, options, message in (
        ((3, 2), {}, r"class 'a' has 6 image\(s\); the sizes \(3, 2\) need 5; -1 takes the rest"),
        ((3, 2), {"drop_rest": True}, r"class 'few' has 4 image\(s\); the sizes \(3, 2\) need 5$"),
        ((4, -1), {}, r"class 'few' has 4 image\(s\).* need 5"),
        ((-1, -1), {}, "accepted: one -1"),
        ((1, -1), {"drop_rest": True}, "accepted: one -1, or drop_rest"),
        ((), {}, "sizes are"),
        ((0, 1), {}, r"sizes are \(0, 1\)"),
        ((1, -2), {}, r"sizes are \(1, -2\)"),
        ((1.0,), {}, r"sizes are \(1.0,\)"),
        ((1, -1), {"seed": -1}, "seed of the split is -1"),
        ((1, -1), {"seed": True}, "seed of the split is True"),
        ((1, -1), {"seed": 2**32}, "seed of the split is"),
    ):
        with pytest.raises(StreamError, match=message):
            whole.split(*sizes, **({"seed": 0} | options))


def test_nothing_draws_from_global_generators():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    split_stream(make([3, 3]), name="s", train_per_class=2, test_per_class=1, seed=2)
    assert state() == before


# --------------------------------------------------------------------- pixels
def test_pixels_of_a_set_without_normalisation_are_bytes_over_255():
    data = make([2, 1])
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(data.pixels(dtype=dtype), data.images.to(dtype) / 255)
    assert torch.equal(data.pixels([2, 0]), (data.images[[2, 0]].float() / 255))
    assert data.pixels([]).shape == (0, 1, 4, 4) and data.pixels(torch.tensor([1])).shape == (1, 1, 4, 4)


def test_normalised_pixels():
    data = make([3, 2], channels=3, mean=MEAN, std=STD)
    exact = torch.empty(5, 3, 4, 4, dtype=torch.float64)
    for n in range(5):
        for c in range(3):
            exact[n, c] = (data.images[n, c].double() / 255 - MEAN[c]) / STD[c]
    torch.testing.assert_close(data.pixels(dtype=torch.float64), exact, rtol=0, atol=1e-12)
    found = data.pixels(device="cpu")
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(data.pixels(dtype=torch.float16), found.half())
    assert torch.equal(data.dataset().batch([4, 0])[0], found[[4, 0]])  # the same bits as through a loader
    with pytest.raises(TypeError, match=r"dtype is torch.int64; accepted: a floating type"):
        data.pixels(dtype=torch.int64)
    for rows in ([5], [-1], [0, 7]):
        with pytest.raises(StreamError, match=r"accepted: 0\.\.4"):
            data.pixels(rows)


def test_dataset_keeps_a_single_channel_unless_colour_is_asked_for():
    data = make([2, 1], mean=(0.5,), std=(0.25,))
    grey, colour = data.dataset(), data.dataset(rgb=True)
    assert grey.targets == colour.targets == [0, 0, 1]
    assert torch.equal(grey[1][0], data.pixels()[1]) and grey[1][1] == 0
    assert torch.equal(torch.stack([x for x, _ in grey.__getitems__([2, 0])]), data.pixels([2, 0]))
    assert torch.equal(colour[1][0], data.pixels()[1].expand(3, -1, -1))
    assert make([1], channels=3).dataset()[0][0].shape == (3, 4, 4)


def test_fingerprint_follows_images_labels_and_names():
    data = make([2, 2])
    assert make([2, 2]).fingerprint() == data.fingerprint() and len(data.fingerprint()) == 64
    other = data.images.clone()
    other[3, 0, 3, 3] ^= 1
    changed = (
        ClassImages(other, data.labels, data.class_names),
        ClassImages(data.images, torch.tensor([0, 1, 1, 1]), data.class_names),
        ClassImages(data.images, data.labels, ("c0", "d")),
        data.take([1, 0]),
    )
    assert len({data.fingerprint(), *(c.fingerprint() for c in changed)}) == 5


# ------------------------------------------------------------- reading files
def write(folder, numbers, edge=6, mode="L", extension="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        noise = np.random.RandomState(number).randint(0, 256, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / f"{number:03d}.{extension}")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("resample", ["lanczos", "bilinear"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_reading_equals_pillow_file_by_file(tmp_path, mode, resample):
    folders = {"b": write(tmp_path / "b", [3, 1], mode="RGB"), "a": write(tmp_path / "a", [2], mode="RGB")}
    for size in (4, 6):
        data = read_class_images(folders, size=size, mode=mode, resample=resample, mean=(0.5,), std=(0.5,))
        assert data.class_names == ("a", "b") and data.counts.tolist() == [1, 2] and data.mean == (0.5,)
        for image, path in zip(data.images, [*folders["a"], *folders["b"]], strict=True):
            with Image.open(path) as file:
                expected = np.asarray(file.convert(mode).resize((size, size), Image.Resampling[resample.upper()]))
            assert torch.equal(image, torch.from_numpy(expected.copy()).reshape(size, size, -1).permute(2, 0, 1))


def test_one_bit_files_are_grey_before_they_are_scaled(tmp_path):
    drawing = np.zeros((8, 8), dtype=bool)
    drawing[:, ::2] = True
    Image.fromarray(drawing).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as file:
        assert file.mode == "1"
    data = read_class_images({"a": [tmp_path / "x.png"]}, size=4, mode="L", resample="box")
    assert set(data.images.flatten().tolist()) <= {127, 128}  # the mean of black and white, not one of them


def test_order_of_mapping_and_files_has_no_influence(tmp_path):
    folders = {name: write(tmp_path / name, numbers) for name, numbers in (("b", [5, 4]), ("a/2", [1, 2]), ("a", [9]))}
    folders["a"] = [path for path in folders["a"] if path.is_file()]
    first = read_class_images(folders, size=6, mode="L")
    turned = {name: list(reversed(paths)) for name, paths in reversed(folders.items())}
    assert read_class_images(turned, size=6, mode="L").fingerprint() == first.fingerprint()
    assert first.class_names == ("a", "a/2", "b")


def test_reading_refuses(tmp_path):
    files = write(tmp_path / "a", [1])
    for change, message in (
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size is True"),
        ({"mode": "RGBA"}, "mode is 'RGBA'; accepted: 'L', 'RGB'"),
        ({"resample": "best"}, "resample is 'best'; accepted: nearest"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean is"),
        ({"std": (-1,)}, "std is"),
        ({"folders": {}}, "folders is empty"),
        ({"folders": {"a": files, "b": []}}, "class 'b' has no image files"),
    ):
        settings = {"folders": {"a": files}, "size": 4, "mode": "L"} | change
        with pytest.raises(StreamError, match=message):
            read_class_images(settings.pop("folders"), **settings)
    (tmp_path / "fake.png").write_text("no picture")
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, message in (("fake", "cannot be read as an image"), ("deep", "8 bits per channel"), ("gone", "No such")):
        with pytest.raises(StreamError, match=rf"{name}\.png .*{message}"):
            read_class_images({"a": [*files, tmp_path / f"{name}.png"]}, size=4, mode="L")


# -------------------------------------------------------------------- streams
def samples(stream, part):
    """(class in the pixels, number in the pixels, target) of every sample of one part."""
    found = []
    for experience in getattr(stream, part):
        for x, y, _ in experience.dataset:
            assert experience.classes_in_this_experience == {y}
            found.append((round(x[0, 0, 0].item() * 255), round(x[0, 0, 1].item() * 255), y))
    return found


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"class_order": ["c3", "c0", "c1", "c2"]}])
def test_one_class_per_experience(options):
    train, valid, test = make([4, 4, 4, 4]).split(2, 1, 1, seed=0)
    stream = one_class_stream(train, test, valid=valid, name="four", **options)
    order = {"seed": class_order(4, 5), "class_order": (3, 0, 1, 2)}.get(next(iter(options), ""), (0, 1, 2, 3))
    assert stream.class_order == order and stream.task_sizes == (1, 1, 1, 1) and stream.name == "four"
    assert [set(e.classes_in_this_experience) for e in stream.train] == [{c} for c in order]
    for part, data in (("train", train), ("valid", valid), ("test", test)):
        assert sorted(samples(stream, part)) == sorted((c, n, c) for c, n, _ in origins(data))
    assert stream.train[0].dataset[0][0].shape == (1, 4, 4)
    plain = one_class_stream(train, test, valid=valid)
    assert plain.fingerprint == stream.fingerprint != one_class_stream(train, test).fingerprint
    assert one_class_stream(train, test).valid is None
    assert one_class_stream(train, test, rgb=True).train[0].dataset[0][0].shape == (3, 4, 4)


def test_transforms_reach_their_parts():
    train, test = make([2, 2]).split(1, 1, seed=0)
    stream = one_class_stream(train, test, train_transform=lambda x: x + 10, eval_transform=lambda x: x - 10)
    assert stream.train[0].dataset[0][0].min() >= 10 and stream.test[0].dataset[0][0].max() <= -9


def test_an_image_in_two_parts_is_refused():
    train, test = make([3, 3]).split(2, 1, seed=0)
    images = test.images.clone()
    images[1] = train.images[0]  # a drawing of class c0 among the test images of c1
    leaky = ClassImages(images, test.labels, test.class_names)
    with pytest.raises(
        StreamError, match=r"1 image\(s\) are in two parts, such as one of 'c0' \(train\) and 'c1' \(te"
    ):
        one_class_stream(train, leaky)
    with pytest.raises(StreamError, match=r"2 image\(s\) are in two parts"):
        one_class_stream(train, test, valid=test)
    assert one_class_stream(train, leaky, allow_shared_images=True).num_classes == 2
    twice = ClassImages(train.images[[0, 0, 2, 3]], train.labels, train.class_names)
    assert one_class_stream(twice, test).num_classes == 2  # a repeated image within a part is no leak


def test_parts_must_belong_together():
    train, test = make([2, 2]).split(1, 1, seed=0)
    for other, message in (
        (test.take([1, 0]), "class_names of test and train differ"),
        (ClassImages(test.images, test.labels, test.class_names, mean=(0.5,)), "mean of test and train differ"),
        (ClassImages(test.images, test.labels, test.class_names, std=(0.5,)), "std of test and train differ"),
        (ClassImages(test.images[..., :2], test.labels, test.class_names), r"images of test are \(1, 4, 2\)"),
    ):
        with pytest.raises(StreamError, match=message):
            one_class_stream(train, other)
    with pytest.raises(StreamError, match="class_order"):
        one_class_stream(train, test, class_order=[0, 0])


def test_split_stream_keeps_the_test_images_when_training_images_change():
    data = make([9, 9, 9])
    options = {"name": "s", "test_per_class": 2, "valid_per_class": 1, "split_seed": 4}
    few, many = (split_stream(data, train_per_class=n, **options) for n in (3, 6))
    for part, size in (("test", 2), ("valid", 1)):
        assert samples(few, part) == samples(many, part) and len(samples(few, part)) == 3 * size
    assert set(samples(few, "train")) < set(samples(many, "train")) and len(samples(few, "train")) == 9
    test, train = data.split(2, 7, seed=4)
    plain = split_stream(data, name="s", train_per_class=7, test_per_class=2, split_seed=4)
    assert sorted(samples(plain, "train")) == sorted((c, n, c) for c, n, _ in origins(train))
    assert sorted(samples(plain, "test")) == sorted((c, n, c) for c, n, _ in origins(test))
    for field, value in (
        ("train_per_class", 0),
        ("test_per_class", 0),
        ("valid_per_class", -1),
        ("test_per_class", 1.0),
    ):
        with pytest.raises(StreamError, match=f"{field} is {value}"):
            split_stream(data, **({"name": "s", "train_per_class": 1, "test_per_class": 1} | {field: value}))
    with pytest.raises(StreamError, match=r"class 'c0' has 9 image\(s\)"):
        split_stream(data, name="s", train_per_class=8, test_per_class=2)


def test_two_sets_must_share_neither_class_nor_image():
    data = make([2, 2, 2, 2])
    first, second = data.take([0, 1]), data.take([2, 3])
    check_disjoint(first, second)
    with pytest.raises(StreamError, match=r"1 class\(es\) are in both sets, such as 'c1'"):
        check_disjoint(first, data.take([1, 2]))
    renamed = ClassImages(data.take([1, 2]).images, data.take([1, 2]).labels, ("x", "y"))
    with pytest.raises(StreamError, match=r"2 image\(s\) are in two parts, such as one of 'c1' \(first\) and 'x'"):
        check_disjoint(first, renamed)
    turned = ClassImages(first.images.reshape(4, 1, 2, 8), first.labels, ("x", "y"))
    check_disjoint(first, turned)  # the same bytes in another shape are another image


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_sharing_is_the_pairwise_comparison(left, right):
    def of(values, names):
        images = torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 3, 3).contiguous()
        return ClassImages(images, torch.tensor([0, *[1] * (len(values) - 1)]), names)

    shares = any(a == b for a in left for b in right)
    try:
        check_disjoint(of(left, ("a", "b")), of(right, ("x", "y")))
    except StreamError:
        assert shares
    else:
        assert not shares


def test_listing_order_of_the_file_system_has_no_influence(tmp_path, monkeypatch):
    from avalanche_firn.benchmarks.image_files import list_classes

    for name in ("b", "a", "c"):
        write(tmp_path / name, range(ord(name), ord(name) + 3))
    before = read_class_images(list_classes(Path(tmp_path)), size=6, mode="L")
    listdir, scandir = os.listdir, os.scandir

    class Turned:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Turned)
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    after = read_class_images(list_classes(Path(tmp_path)), size=6, mode="L")
    assert torch.equal(before.images, after.images) and before.fingerprint() == after.fingerprint()
