"""CIFAR-10 and CIFAR-100 from their official files, of either version, without unpickling anything.

The *binary version* is what is downloaded and preferred: `cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin` and
`cifar-100-binary/{train,test}.bin`, records of a label byte (CIFAR-100: the coarse label, then the fine one) and 3,072
bytes, the red, green and blue planes row by row (https://www.cs.toronto.edu/~kriz/cifar.html).

The *Python version*, which torchvision and Avalanche download, is made of pickles. Where only it is there, its MD5 sums
are checked as torchvision does, and the files are taken apart as tokens (`pickles.read_tokens`): no code of a file can
run. Both versions hold the same images in the same order, so streams, fingerprints and figures stay what they were.
(The order isn't stated on the page above; others have compared all labels and pixels of CIFAR-10.)

Cost: 0.3 s for CIFAR-10, of which half is the checksums; Python version 1 s. 180 MB of memory.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from avalanche.benchmarks.datasets import default_dataset_location
from PIL import Image
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.downloads import RemoteFile, fetch, unpack
from avalanche_firn.benchmarks.pickles import Call, Name, read_tokens
from avalanche_firn.benchmarks.streams import StreamError

_URL = "https://www.cs.toronto.edu/~kriz"
_PIXELS = 3 * 32 * 32
_lock = threading.RLock()


@dataclass(frozen=True)
class CifarFiles:
    """The files of one of the two data sets.

    Attributes:
        classes: 10 or 100.
        archive: of the binary version.
        binary: its folder, and part -> file -> MD5.
        python: the same of the Python version.
        key: of the labels in the Python version.
        labels: bytes of labels in a record of the binary version; the last one is used.
    """

    classes: int
    archive: RemoteFile
    binary: tuple[str, Mapping[str, Mapping[str, str]]]
    python: tuple[str, Mapping[str, Mapping[str, str]]]
    key: str
    labels: int


CIFAR = {
    10: CifarFiles(
        10,
        RemoteFile(
            f"{_URL}/cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170052171
        ),
        (
            "cifar-10-batches-bin",
            {
                "train": {
                    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                },
                "test": {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
            },
        ),
        (
            "cifar-10-batches-py",
            {
                "train": {
                    "data_batch_1": "c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "634d18415352ddfa80567beed471001a",
                    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                },
                "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
            },
        ),
        "labels",
        1,
    ),
    100: CifarFiles(
        100,
        RemoteFile(
            f"{_URL}/cifar-100-binary.tar.gz", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168513733
        ),
        (
            "cifar-100-binary",
            {
                "train": {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
                "test": {"test.bin": "4499cfba6c016c1be1438163640a0898"},
            },
        ),
        (
            "cifar-100-python",
            {
                "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
                "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            },
        ),
        "fine_labels",
        2,
    ),
}


class ArrayImages(Dataset):
    """(RGB image, label) pairs, the images PIL ones made from an array on access.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        targets: (N,) class ids.
    """

    def __init__(self, images: np.ndarray, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = [int(t) for t in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(np.ascontiguousarray(self.images[index])).convert("RGB"), self.targets[index]


def read_cifar(classes: int, root: str | Path, part: str, *, download: bool = False) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) of a part, in the order of the files.

    Args:
        classes: 10, or 100 with the fine labels.
        root: the folder that holds the folder of either version.
        part: "train" or "test".
        download: fetches the binary version (170 MB) where neither is there.

    Raises:
        StreamError: no files (with how to get them), or one that isn't the official one, with its name.
        DownloadError: a download that fails, with its address and where to put the file.
    """
    root, files = Path(root).expanduser(), CIFAR[classes]
    label = f"CIFAR-{classes}"
    if _there(root, files.binary, part):
        pieces = [_read_binary(path, md5, files) for path, md5 in _listed(root, files.binary, part)]
    elif _there(root, files.python, part):
        pieces = [_read_python(path, md5, files) for path, md5 in _listed(root, files.python, part)]
    elif download:
        archive = fetch(files.archive, root)
        last = list(files.binary[1]["test"])[-1]
        unpack(archive, root, marker=f"{files.binary[0]}/{last}")
        return read_cifar(classes, root, part)
    else:
        absent = next(path for path, _ in _listed(root, files.binary, part) if not path.is_file())
        raise StreamError(
            f"{absent} is absent, {label} needs it; download=True fetches the binary version from {files.archive.url}; "
            f"{files.python[0]}/ of the Python version is accepted too"
        )
    images = np.concatenate([images for images, _ in pieces])
    labels = [c for _, part_labels in pieces for c in part_labels]
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


@contextmanager
def avalanche_without_pickles(build: Any) -> Iterator[None]:
    """Inside of it, `build` (a function of `avalanche.benchmarks.classic`) gets CIFAR from `read_cifar`.

    Avalanche's functions for CIFAR ask one function each for the data and do all else by themselves: that one is
    exchanged, where it is torchvision's. Data that isn't there is downloaded, as Avalanche does.
    """
    module = sys.modules[build.__module__]
    with _lock:
        kept = {}
        for classes in CIFAR:
            name = f"get_cifar{classes}_dataset"
            known = getattr(module, name, None)
            if getattr(known, "__module__", "").startswith("avalanche."):  # not what a test or a user has put there
                kept[name] = known
                setattr(module, name, _getter(classes))
        try:
            yield
        finally:
            for name, known in kept.items():
                setattr(module, name, known)


def _getter(classes: int) -> Any:
    def get(dataset_root: str | Path | None) -> tuple[ArrayImages, ...]:
        root = default_dataset_location(f"cifar{classes}") if dataset_root is None else dataset_root
        return tuple(ArrayImages(*read_cifar(classes, root, part, download=True)) for part in ("train", "test"))

    return get


def _listed(root: Path, version: tuple[str, Mapping[str, Mapping[str, str]]], part: str) -> list[tuple[Path, str]]:
    folder, parts = version
    return [(root / folder / name, md5) for name, md5 in parts[part].items()]


def _there(root: Path, version: tuple[str, Mapping[str, Mapping[str, str]]], part: str) -> bool:
    return all(path.is_file() for path, _ in _listed(root, version, part))


def _content(path: Path, md5: str, files: CifarFiles) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StreamError(f"{path} cannot be read: {error}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise StreamError(
            f"{path} has the MD5 checksum {found}; accepted: {md5}; remove the folder {path.parent} and pass "
            f"download=True, or unpack {files.archive.url} there"
        )
    return content


def _read_binary(path: Path, md5: str, files: CifarFiles) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 3072) uint8 and labels of a file."""
    content, record = _content(path, md5, files), files.labels + _PIXELS
    if len(content) % record:
        raise StreamError(f"{path} has {len(content)} bytes; accepted: a multiple of {record}, a record's")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return rows[:, files.labels :], _checked(rows[:, files.labels - 1].tolist(), path, files)


def _read_python(path: Path, md5: str, files: CifarFiles) -> tuple[np.ndarray, list[int]]:
    """The same of a pickle, which isn't unpickled."""
    try:
        batch = read_tokens(_content(path, md5, files))
        pixels, labels = _array(batch["data"]), batch[files.key]
        if len(pixels) != len(labels):
            raise ValueError(f"it has {len(pixels)} images and {len(labels)} labels")
        return pixels, _checked(labels, path, files)
    except StreamError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise StreamError(
            f"{path} isn't the file of the Python version ({error}); it isn't unpickled, which could run code. Get the "
            f"binary version: {files.archive.url}, unpacked to {path.parent.parent / files.binary[0]}"
        ) from error


def _array(call: Any) -> np.ndarray:
    """(N, 3072) uint8 from the tokens of a NumPy array: a call that is given version, shape, type, order and bytes."""
    if not isinstance(call, Call) or call.of != Name("numpy.core.multiarray _reconstruct"):
        raise ValueError("'data' is no array")
    _, shape, dtype, by_columns, content = call.state
    if not isinstance(dtype, Call) or dtype.of != Name("numpy dtype") or dtype.arguments[0] != "u1":
        raise ValueError("'data' holds no bytes")
    values = np.frombuffer(content.encode("latin-1"), dtype=np.uint8)
    if len(shape) != 2 or shape[1] != _PIXELS or values.size != shape[0] * _PIXELS:
        raise ValueError(f"'data' has the shape {shape} and {values.size} bytes; accepted: (N, {_PIXELS})")
    return values.reshape(shape, order="F" if by_columns else "C")


def _checked(labels: Any, path: Path, files: CifarFiles) -> list[int]:
    wrong = [c for c in labels if type(c) is not int or not 0 <= c < files.classes]
    if wrong:
        raise StreamError(f"{path} has the label {wrong[0]!r}; accepted: 0..{files.classes - 1}")
    return list(labels)


__all__ = ["CIFAR", "ArrayImages", "CifarFiles", "avalanche_without_pickles", "read_cifar"]
