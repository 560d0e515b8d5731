"""The embedded stream."""

import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.streams import StreamError, class_order


@pytest.fixture(scope="module")
def stream():
    return digits_stream()


def rows(stream, part):
    """(image, label) of every sample of a part, in stream order."""
    return [(x, y) for experience in getattr(stream, part) for x, y, _ in experience.dataset]


def test_defaults(stream):
    assert stream.name == "digits" and stream.task_sizes == (2,) * 5 and stream.class_order == tuple(range(10))
    assert stream.class_names == tuple("0123456789")
    sizes = {part: sum(len(e.dataset) for e in getattr(stream, part)) for part in ("train", "valid", "test")}
    assert sizes == {"train": 1079, "valid": 359, "test": 359}
    x, y, task = stream.train[0].dataset[0]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and y in (0, 1) and task == 0
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) and -1 <= x.min() < x.max() <= 1


def test_the_data_and_the_split_are_frozen(stream):
    assert stream.fingerprint == FINGERPRINT
    assert digits_stream(seed=3, tasks=2, mean=0.1, std=0.2).fingerprint == FINGERPRINT
    assert digits_stream(image_size=8).fingerprint != FINGERPRINT


FINGERPRINT = "58722af764348dc518ce7a12624927b1afd11b0f534498d705229600e65864cc"


@pytest.mark.parametrize(
    "options", [{}, {"seed": 1993}, {"class_order": (9, 1, 8, 2, 7, 3, 6, 4, 5, 0), "tasks": [1, 4, 3, 2]}]
)
def test_all_1797_scans_are_there_once_with_their_own_label(options):
    stream = digits_stream(image_size=8, mean=0.0, std=255 / 16 / 255, **options)  # back to the levels 0..16
    bunch = load_digits()
    expected = sorted(
        (img.astype(int).tobytes(), int(label)) for img, label in zip(bunch.images, bunch.target, strict=True)
    )
    found = sorted(
        (x[0].round().to(torch.int64).numpy().tobytes(), y)
        for part in ("train", "valid", "test")
        for x, y in rows(stream, part)
    )
    assert found == expected
    position = 0
    for size, experiences in zip(
        stream.task_sizes, zip(stream.train, stream.valid, stream.test, strict=True), strict=True
    ):
        classes = set(stream.class_order[position : position + size])
        assert all(set(e.classes_in_this_experience) == classes for e in experiences)
        position += size


def test_split_is_stratified_and_disjoint_from_the_seed_of_the_order(stream):
    for part, fraction in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        labels = np.array([y for _, y in rows(stream, part)])
        total = np.bincount(load_digits().target)
        assert np.abs(np.bincount(labels) - fraction * total).max() <= 1
    other = digits_stream(seed=11)
    for part in ("train", "valid", "test"):
        mine = sorted(x.numpy().tobytes() for x, _ in rows(stream, part))
        assert mine == sorted(x.numpy().tobytes() for x, _ in rows(other, part))


def test_upscaling_is_bilinear_and_normalisation_the_given_one():
    small = digits_stream(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).train[0].dataset
    large = digits_stream(image_size=16, mean=0.0, std=1.0).train[0].dataset
    x = small[0][0]
    unit = x * torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(unit[0], unit[2])
    torch.testing.assert_close(unit * 16, (unit * 16).round(), atol=0.04, rtol=0)  # 17 grey levels, 8-bit rounding
    scan = (unit[0] * 16).round() / 16
    doubled = large[0][0][0]
    # Half-pixel centres: pixel 1 of the larger image lies a quarter of the way from pixel 0 to pixel 1.
    for r, c in ((1, 1), (5, 8), (9, 2), (14, 13)):
        (r0, fr), (c0, fc) = divmod((r - 0.5) / 2, 1), divmod((c - 0.5) / 2, 1)
        r0, c0 = int(r0), int(c0)
        corners = scan[r0 : r0 + 2, c0 : c0 + 2]
        weights = torch.tensor([[(1 - fr) * (1 - fc), (1 - fr) * fc], [fr * (1 - fc), fr * fc]])
        assert abs(float((corners * weights).sum() - doubled[r, c])) < 0.6 / 255


def test_class_order_options():
    assert digits_stream(image_size=8, seed=1993).class_order == class_order(10, 1993)
    named = digits_stream(image_size=8, class_order=list("9876543210"), tasks=[4, 6])
    assert named.class_order == tuple(range(9, -1, -1))
    assert set(named.train[0].classes_in_this_experience) == {9, 8, 7, 6}
    assert digits_stream(image_size=8, tasks=3).task_sizes == (3, 3, 4)


def test_transforms_apply_to_their_group(stream):
    shifted = digits_stream(train_transform=_plus_one, eval_transform=_minus_one)
    plain, data = stream.train[2].dataset[5][0], shifted.train[2].dataset
    assert torch.equal(data[5][0], plain + 1) and torch.equal(data.eval()[5][0], plain - 1)
    assert torch.equal(shifted.test[1].dataset[0][0], stream.test[1].dataset[0][0] - 1)


def _plus_one(x):
    return x + 1


def _minus_one(x):
    return x - 1


def test_building_touches_no_random_state():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    digits_stream(seed=1993).joint()
    assert state() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size is 4"),
        ({"image_size": 32.0}, "image_size is 32.0"),
        ({"tasks": 11}, "tasks is 11"),
        ({"tasks": [5, 4]}, "sum to 9"),
        ({"class_order": [0, 1]}, "2 entries"),
        ({"class_order": list(range(10)), "seed": 1}, "both given"),
        ({"seed": -3}, "seed"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": 0}, "std"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(StreamError, match=message):
        digits_stream(**options)
