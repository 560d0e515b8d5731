"""Decoded images as one uint8 tensor: on the device, in ordinary memory, or in a file that is mapped into memory.

`decode` fills the stores of a data set in one pass: every file is read once, by a pool of threads (PIL decodes and
resizes without Python's lock). Images whose three channels are equal are stored with one. A stored file is plain uint8,
(N, C, H, W) row by row, and a JSON file beside it says what it holds; both are written under another name and renamed,
the JSON last, and nothing in them is ever executed or unpickled.

Cost: as long as one epoch of a loader with as many workers as there are cores, once; H W C bytes per image.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from avalanche_firn.benchmarks.streams import StreamError

__all__ = [
    "ImageStore",
    "Place",
    "UnevenImagesError",
    "decode",
    "digest_of",
    "kept_generators",
    "read_image",
    "read_store",
    "stored_file",
    "write_facts",
]

_CHUNK = 256  # images decoded before they are copied to their place; our choice
_FORMAT = 1
# Data sets whose items may be read by several threads at once: those of this package, torchvision and Avalanche.
_THREAD_SAFE = ("avalanche_firn.", "torchvision.", "avalanche.")


class UnevenImagesError(StreamError):
    """Images that can't lie in one tensor, because their sizes differ or a label isn't the one announced."""


class Place(NamedTuple):
    """Where a store lies: on a device, or, with a file, in that file (and then `device` is the CPU)."""

    device: torch.device
    file: Path | None = None

    def __str__(self) -> str:
        return "disk" if self.file is not None else self.device.type


class ImageStore:
    """Images of a data set, those of some of its rows.

    Args:
        images: (M, C, H, W) uint8 on any device.
        channels: of the images; 3 where grey ones are stored with C = 1.
        rows: (M,) int64, ascending: the rows of the data set that are held.
        length: rows of the data set.
        place: where it lies.
    """

    def __init__(self, images: Tensor, channels: int, rows: np.ndarray, length: int, place: Place) -> None:
        self.images = images
        self.channels = channels
        self.place = place
        self.device = images.device
        self._slots: Tensor | None = None
        if len(rows) != length:
            slots = np.full(length, len(rows), dtype=np.int64)  # a row that is not held is an index error
            slots[rows] = np.arange(len(rows))
            self._slots = torch.from_numpy(slots).to(images.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> ImageStore:
        return self  # never written to, and too large to copy by accident

    def __getstate__(self) -> dict[str, Any]:
        # a mapped file travels by its name, not by its content
        mapped = self.place.file is not None
        return {**self.__dict__, "images": tuple(self.images.shape) if mapped else self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.place.file is not None:
            self.images = _map(self.place.file, state["images"])

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return self.images.numel()

    def gather(self, rows: Tensor) -> Tensor:
        """(B,) int64 rows of the data set, on any device -> (B, C, H, W) uint8 on the store's device."""
        rows = rows.to(self.device, non_blocking=True)
        slots = rows if self._slots is None else self._slots.index_select(0, rows)
        return self.images.index_select(0, slots)  # on the CPU many times as fast as brackets


def read_image(source: Any, row: int, target: int) -> Any:
    """The image of a row of a data set of (image, label) pairs.

    Raises:
        UnevenImagesError: the item is no pair, or its label isn't `target`.
        StreamError: the item can't be read; the message names the file or the row.
    """
    try:
        item = source[row]
    except StreamError:
        raise
    except Exception as error:
        raise StreamError(f"image {row} of {type(source).__name__} cannot be read: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2 or int(item[1]) != target:
        raise UnevenImagesError(f"item {row} of {type(source).__name__} is no image with label {target}")
    return item[0]


def decode(
    source: Any,
    targets: Sequence[int],
    rows: np.ndarray,
    loaders: Sequence[Callable[[Any], Tensor]],
    places: Sequence[Place],
    *,
    label: str,
    quiet: bool,
) -> list[ImageStore]:
    """Decodes rows of a data set into one store per loader.

    Args:
        source: map-style data set of (image, label) pairs.
        targets: labels of all its rows.
        rows: (M,) rows to hold, ascending, at least one.
        loaders: from an image to a tensor (C, H, W) uint8 on the CPU.
        places: of each store.
        label: of the progress bar.
        quiet: whether there is none.

    Raises:
        UnevenImagesError: images of different sizes, or an item that is no pair with the label announced.
        StreamError: an image that can't be decoded, named in the message.
        OSError: a file can't be made, or the disk has no room for it; nothing is left of it.
    """

    def load(row: int) -> list[Tensor]:
        image = read_image(source, row, int(targets[row]))
        return [loader(image) for loader in loaders]

    safe = type(source).__module__.startswith(_THREAD_SAFE)
    threads = min(32, os.cpu_count() or 1) if safe else 1
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(contextlib.closing(_Buffer(len(rows), place))) for place in places]
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        bar = stack.enter_context(
            tqdm(total=len(rows), desc=label, unit="image", disable=True if quiet else None, leave=False)
        )
        for start in range(0, len(rows), _CHUNK):
            chunk = list(pool.map(load, rows[start : start + _CHUNK].tolist()))
            for buffer, images in zip(buffers, zip(*chunk, strict=True), strict=True):
                buffer.write(start, images)
            bar.update(len(chunk))
        return [
            ImageStore(buffer.finish(), buffer.channels, rows, len(targets), place)
            for buffer, place in zip(buffers, places, strict=True)
        ]


class _Buffer:
    """The images of one store while they are decoded: one channel as long as all of them are grey."""

    def __init__(self, count: int, place: Place) -> None:
        self.channels = 0
        self._count = count
        self._place = place
        self._shape: tuple[int, ...] = ()
        self._images: Tensor | None = None
        self._temporary: Path | None = None

    def write(self, start: int, images: Sequence[Tensor]) -> None:
        """Puts images at `start`, the number of those written before."""
        shapes = {tuple(image.shape) for image in images} | ({self._shape} if self._shape else set())
        if len(shapes) != 1:
            sizes = " and ".join(f"{height}x{width}" for _, height, width in sorted(shapes)[:2])
            raise UnevenImagesError(
                f"images have different sizes, such as {sizes} pixels; accepted: equal ones, or stored_edge"
            )
        (self._shape,) = shapes
        chunk = torch.stack(list(images))
        self.channels = chunk.shape[1]
        if self._images is None or self._images.shape[1] == 1 < self.channels:
            grey = bool((chunk == chunk[:, :1]).all())
            if self._images is None:
                self._images = self._allocate(1 if grey else self.channels)
            elif not grey:
                old, stale = self._images, self._temporary
                self._images = self._allocate(self.channels)
                self._images[:start] = old[:start]
                del old
                if stale is not None:
                    stale.unlink()
        self._images[start : start + len(chunk)].copy_(chunk[:, : self._images.shape[1]])

    def finish(self) -> Tensor:
        """All images, in their place."""
        assert self._images is not None
        if self._temporary is None or self._place.file is None:
            return self._images
        shape = tuple(self._images.shape)
        self._images = None
        os.replace(self._temporary, self._place.file)
        self._temporary = None
        return _map(self._place.file, shape)

    def close(self) -> None:
        """Removes what an error left behind."""
        self._images = None
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def _allocate(self, channels: int) -> Tensor:
        shape = (self._count, channels, *self._shape[1:])
        if self._place.file is None:
            return torch.empty(shape, dtype=torch.uint8, device=self._place.device)
        handle, name = tempfile.mkstemp(dir=self._place.file.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                _reserve(file.fileno(), math.prod(shape))
        except BaseException:
            os.unlink(name)
            raise
        self._temporary = Path(name)
        return _map(self._temporary, shape, shared=True)


def _reserve(file: int, size: int) -> None:
    """Gives a file its length and its place on the disk: a mapping that finds no room ends the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            # EINVAL: file systems that can't, as of ZFS
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
    os.ftruncate(file, size)


def stored_file(folder: Path, name: str, facts: dict[str, Any]) -> Path:
    """The file in `folder` for what `facts` describe, which have to be plain values."""
    text = json.dumps({**_versions(), **facts}, sort_keys=True)
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "images"
    return folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.uint8"


def write_facts(store: ImageStore, facts: dict[str, Any]) -> None:
    """Writes the JSON file beside a mapped store."""
    file = store.place.file
    assert file is not None
    content = {**_versions(), **facts, "shape": list(store.images.shape), "channels": store.channels}
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as beside:
        json.dump(content, beside, indent=1)
    os.replace(name, file.with_suffix(".json"))


def read_store(file: Path, facts: dict[str, Any], rows: np.ndarray, length: int) -> ImageStore | None:
    """The store in a file of an earlier run, or None if there is none that holds exactly what `facts` describe."""
    if not (file.is_file() and file.with_suffix(".json").is_file()):  # nor a pipe, which would be waited for
        return None
    try:
        content = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        shape, channels = content.pop("shape"), content.pop("channels")
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    expected = json.loads(json.dumps({**_versions(), **facts}))
    if content != expected or not isinstance(shape, list) or [type(n) for n in shape] != [int] * 4:
        return None
    if shape[0] != len(rows) or min(shape) < 1 or size != math.prod(shape) or channels not in {shape[1], 3}:
        return None
    return ImageStore(_map(file, tuple(shape)), channels, rows, length, Place(torch.device("cpu"), file))


def digest_of(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays, in words."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, Any]:
    # another decoder or filter may give other pixels
    return {"format": _FORMAT, "pillow": PIL.__version__, "torchvision": torchvision.__version__}


def _map(file: Path, shape: tuple[int, ...], *, shared: bool = False) -> Tensor:
    """A file of uint8 as a tensor; only a shared one writes to the file."""
    return torch.from_file(str(file), shared=shared, size=math.prod(shape), dtype=torch.uint8).view(shape)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Puts the global generators back to where they were: a rotation by one angle draws that angle."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
