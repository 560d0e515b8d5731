"""The in-memory image data set."""

import pickle
import time

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import Normalize

from avalanche_firn.benchmarks import tensors
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.tensors import TensorImageDataset

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def images(count=12, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("storage", ["uint8", "float32", "auto"])
def test_items_equal_torchvision(channels, storage):
    source = images(channels=channels)
    data = TensorImageDataset(source, list(range(12)), mean=MEAN, std=STD, storage=storage)
    for i in (0, 5, 11, -1):
        x, y = data[i]
        expected = Normalize(MEAN, STD)((source[i].float() / 255).expand(3, 8, 8))
        assert x.shape == (3, 8, 8) and x.dtype == torch.float32 and y == list(range(12))[i]
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_both_storages_agree_to_the_bit_one_by_one_and_in_batches():
    source, targets = images(20, 3), list(range(20))
    small, fast = (TensorImageDataset(source, targets, mean=MEAN, std=STD, storage=s) for s in ("uint8", "float32"))
    order = [7, 7, 0, 19, 3]
    for data in (small, fast):
        x, y = data.batch(order)
        assert y.tolist() == order and y.dtype == torch.int64 and x.shape == (5, 3, 8, 8)
        assert torch.equal(x, torch.stack([fast[i][0] for i in order]))
        listed = data.__getitems__(order)
        assert [label for _, label in listed] == order
        assert all(torch.equal(image, small[i][0]) for (image, _), i in zip(listed, order, strict=True))


@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_changing_an_item_in_place_leaves_the_data_alone(storage):
    data = TensorImageDataset(images(), [0] * 12, storage=storage)
    before = data[3][0].clone()
    data[3][0].zero_()
    data.__getitems__([3, 4])[0][0].zero_()
    data.batch([3])[0].zero_()
    assert torch.equal(data[3][0], before)


def test_auto_storage_follows_the_limit(monkeypatch):
    assert TensorImageDataset(images(), [0] * 12)._images.dtype == torch.float32
    monkeypatch.setattr(tensors, "AUTO_FLOAT_LIMIT", 12 * 3 * 64 * 4 - 1)
    assert TensorImageDataset(images(), [0] * 12)._images.dtype == torch.uint8


def test_loader_uses_batched_fetch_and_gives_the_same():
    data = TensorImageDataset(images(), list(range(12)))
    x, y = next(iter(DataLoader(data, batch_size=12)))
    assert torch.equal(x, data.batch(range(12))[0]) and y.tolist() == list(range(12))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[2][0], data[2][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(2, 1, 8, 8)}, "float32.*accepted: uint8"),
        ({"images": torch.zeros(2, 8, 8, dtype=torch.uint8)}, r"\(2, 8, 8\).*accepted"),
        ({"images": torch.zeros(2, 2, 8, 8, dtype=torch.uint8)}, "1 or 3"),
        ({"targets": [0]}, "2 images and 1 targets"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": "half"}, "mean"),
        ({"std": 0.0}, "std"),
        ({"std": (0.1, 0.1, -1)}, "std"),
        ({"std": float("nan")}, "std"),
        ({"storage": "float16"}, "storage"),
    ],
)
def test_refuses(arguments, message):
    settings = {"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "targets": [0, 1]} | arguments
    with pytest.raises(StreamError, match=message):
        TensorImageDataset(settings.pop("images"), settings.pop("targets"), **settings)


def test_access_is_cheap():
    # Measured: 5 us float32, 8 us uint8 at 32 pixels. The bound leaves room for a busy machine.
    for storage in ("float32", "uint8"):
        data = TensorImageDataset(images(256, 1, 32), [0] * 256, storage=storage)
        best = min(_seconds(data) for _ in range(9)) / 256
        assert best < 40e-6, f"{storage}: {best * 1e6:.1f} us"


def _seconds(data):
    start = time.process_time()
    for i in range(256):
        data[i]
    return time.process_time() - start
