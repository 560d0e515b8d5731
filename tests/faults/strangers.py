"""Files as strangers could make them, for several tests: pickles with a payload, CIFAR's files, weights."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avalanche_firn.benchmarks import cifar


class Payload:
    """Unpickling it makes a file: what must never happen."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def payload(marker: Path) -> bytes:
    """A pickle that would make `marker`, tried out here."""
    content = pickle.dumps(Payload(marker), protocol=2)
    pickle.loads(content)
    assert marker.exists()  # else no test with it says anything
    marker.unlink()
    return content


# ------------------------------------------------------------------------ CIFAR
def _text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def python2_batch(labels: list[int], pixels: np.ndarray, *, key: str = "labels", by_columns: bool = False) -> bytes:
    """A batch as Python 2 pickled it: a dictionary with a list of numbers and an array (N, 3072) uint8."""
    content = np.asfortranarray(pixels).tobytes("F") if by_columns else pixels.tobytes()
    numbers = b"".join(b"K" + bytes([c]) for c in labels)
    kind = b"cnumpy\ndtype\nq\x0e" + _text("u1") + b"K\x00K\x01\x87q\x0fRq\x10"
    kind += b"(K\x03" + _text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x11b"
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", 3072) + b"\x86q\x0d"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09" + _text("b")
    array += b"q\x0a\x87q\x0bRq\x0c(K\x01" + shape + kind + (b"\x88" if by_columns else b"\x89")
    array += b"T" + struct.pack("<I", len(content)) + content + b"tq\x12b"
    names = b"]q\x14(" + b"".join(_text(f"picture_{i}.png") + b"r" + struct.pack("<I", 300 + i) for i in range(3))
    return (
        b"\x80\x02}q\x01(" + _text("batch_label") + b"q\x02" + _text("a test") + b"q\x03"
        + _text(key) + b"q\x04]q\x05(" + numbers + b"e" + _text("data") + b"q\x06" + array
        + _text("filenames") + b"q\x13" + names + b"eu."
    )  # fmt: skip


def small_cifar(classes: int, images: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 3072) and labels of a made-up part, every class there."""
    random = np.random.RandomState(seed)
    labels = [int(c) for c in random.permutation(np.arange(images) % classes)]
    return random.randint(0, 256, (images, 3072), dtype=np.uint8), labels


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, version: str, classes: int = 10) -> dict[str, Any]:
    """Two small training files and a test file of either version, whose sums become the official ones.

    Returns: part -> (pixels, labels) of all its files.
    """
    known = cifar.CIFAR[classes]
    folder, parts = known.binary if version == "binary" else known.python
    (root / folder).mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    sums: dict[str, dict[str, str]] = {}
    for part in ("train", "test"):
        found[part], sums[part] = ([], []), {}
        for i, name in enumerate(list(parts[part])[:2]):
            pixels, labels = small_cifar(classes, 2 * classes, seed=classes + 10 * i + (part == "test"))
            if version == "binary":
                coarse = [[7]] * len(labels) if known.labels == 2 else [[]] * len(labels)
                rows = np.concatenate([np.array(coarse, dtype=np.uint8).reshape(len(labels), -1),
                                       np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1)  # fmt: skip
                content = rows.tobytes()
            else:
                content = python2_batch(labels, pixels, key=known.key, by_columns=i == 1)
            (root / folder / name).write_bytes(content)
            sums[part][name] = hashlib.md5(content).hexdigest()
            found[part][0].append(pixels)
            found[part][1].extend(labels)
    changed = {"binary" if version == "binary" else "python": (folder, sums)}
    monkeypatch.setitem(cifar.CIFAR, classes, dataclasses.replace(known, **changed))
    return {part: (np.concatenate(pixels), labels) for part, (pixels, labels) in found.items()}


def patch_torchvision(monkeypatch: pytest.MonkeyPatch, root: Path, classes: int = 10) -> Any:
    """torchvision's own class, made to accept the files of the Python version that `write_cifar` wrote."""
    import torchvision.datasets as vision

    kind = vision.CIFAR10 if classes == 10 else vision.CIFAR100
    folder, sums = cifar.CIFAR[classes].python
    meta = pickle.dumps({kind.meta["key"]: [str(c) for c in range(classes)]}, protocol=2)
    (root / folder / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})
    for part in ("train", "test"):
        monkeypatch.setattr(kind, f"{part}_list", [[name, md5] for name, md5 in sums[part].items()])
    return kind
