"""Image files on disk: what a folder of class folders holds, checked, and the data set that decodes it.

Nothing is skipped in silence: every file of a class folder must be an image whose header opens (hidden files and the
index files of desktop systems aside). What reaches a decoder is bounded, see `image_bounds`.

Images become RGB with 8 bits per channel. Grey and palettes are spread, CMYK goes through Pillow's plain formula
without colour profiles, transparency is dropped (the colours below it stay). Grey of more than 8 bits and floats are
refused, because Pillow would clip them; of colours with 16 bits per channel (PNG) Pillow keeps the upper 8.

Cost: one open per file the first time a process checks it (0.1 ms for a small PNG, 0.2 ms for a JPEG) and 30 us a file
later; no pixels are decoded before `__getitem__`, in the workers of the loader.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from avalanche_firn.benchmarks.image_bounds import BROKEN_IMAGE, bounded_image, open_regular
from avalanche_firn.benchmarks.streams import Split, StreamError, Transform, stratified_split

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_MODES = frozenset(  # 8 bits per channel or fewer
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
)
VALIDATION_FOLDERS = ("val", "valid", "validation")
LAYOUTS = (
    "accepted: root/CLASS/image files, or root/train/CLASS/... with root/test/CLASS/... "
    f"(and perhaps one of root/{', root/'.join(VALIDATION_FOLDERS)})"
)
_SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_EDGE = 4096  # bytes hashed at either end of a file


class CheckedFile(NamedTuple):
    """An image file that opens, its class id, and what a fingerprint needs."""

    path: str
    label: int
    key: str  # CLASS/name: the same wherever the root lies
    digest: bytes


class ImageFiles(Dataset):
    """(RGB image, label) pairs, the image a PIL image decoded on access.

    Args:
        paths: (N,) image files.
        targets: (N,) class ids.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int]) -> None:
        self.paths = list(paths)
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            with bounded_image(self.paths[index]) as image:
                check_mode(image)
                return image.convert("RGB"), self.targets[index]
        except BROKEN_IMAGE as error:
            raise StreamError(f"{self.paths[index]} cannot be decoded: {error}") from error


def check_mode(image: Any) -> None:
    """Refuses (ValueError) pixels that a conversion to RGB would clip."""
    if image.mode not in IMAGE_MODES:
        raise ValueError(f"pixels of mode {image.mode}; accepted: 8 bits per channel or fewer, convert it first")


def check_transforms(train_transform: Transform, eval_transform: Transform) -> None:
    """Refuses (StreamError) what can't turn an image into a tensor."""
    for field, transform in (("train_transform", train_transform), ("eval_transform", eval_transform)):
        if not callable(transform):
            raise StreamError(f"{field} is {transform!r}; accepted: a callable from a PIL image to a tensor")


def visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sub-folders and files of a folder, sorted by name, without hidden ones and the systems' index files."""
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:  # knows what is a folder without a call per file
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_NAMES:
                (folders if entry.is_dir() else files).append(Path(entry.path))
    return folders, files


def find_parts(root: Path, layouts: str = LAYOUTS) -> dict[str, Path]:
    """The folders "train" and, where there are some, "valid" and "test"; `layouts` is what messages say is accepted."""
    if not root.is_dir():
        raise StreamError(f"{root} is {'not a folder' if root.exists() else 'absent'}; {layouts}")
    folders, files = visible(root)
    if not folders:
        raise StreamError(f"{root} holds no class folders; {layouts}")
    loose = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        raise StreamError(f"{loose[0]} is an image outside any class folder; {layouts}")
    named = {path.name: path for path in folders}
    # A class may be called "train": the folder is a part only if it holds folders.
    if "train" not in named or not visible(named["train"])[0]:
        return {"train": root}
    parts = {"train": named.pop("train")}
    if "test" in named:
        parts["test"] = named.pop("test")
    validation = [named.pop(alias) for alias in VALIDATION_FOLDERS if alias in named]
    if len(validation) > 1:
        raise StreamError(f"{validation[0]} and {validation[1]} are both there; accepted: one validation folder")
    if validation:
        parts["valid"] = validation[0]
    if named:
        raise StreamError(f"{next(iter(named.values()))} stands beside {root / 'train'}; {layouts}")
    return parts


def list_classes(folder: Path, layouts: str = LAYOUTS) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted. Refuses anything in a class folder that is not an image file."""
    classes, files = visible(folder)
    if not classes:
        raise StreamError(f"{folder} holds no class folders; {layouts}")
    loose = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        raise StreamError(f"{loose[0]} is an image outside any class folder; {layouts}")
    listing = {}
    for path in classes:
        below, images = visible(path)
        if below:
            raise StreamError(f"class folder {path} holds the folder {below[0].name!r}; {layouts}")
        if not images:
            raise StreamError(f"class folder {path} holds no images; accepted: at least one file in each class folder")
        other = [image for image in images if image.suffix.lower() not in IMAGE_EXTENSIONS]
        if other:
            raise StreamError(f"{other[0]} is not an image file; accepted: {' '.join(sorted(IMAGE_EXTENSIONS))}")
        listing[path.name] = images
    return listing


def draw_split(
    listings: dict[str, dict[str, list[Path]]],
    ids: dict[str, int],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> Split:
    """Which training files become the parts that have no folder, as positions in the listing of the training files.

    Needs counts only: what is impossible is refused (StreamError) before a file is opened.
    """
    return stratified_split(
        [ids[name] for name, paths in listings["train"].items() for _ in paths],
        validation_fraction=0 if "valid" in listings else validation_fraction,
        test_fraction=0 if "test" in listings else test_fraction,
        seed=seed,
        class_names=list(ids),
    )


def read_parts(
    listings: dict[str, dict[str, list[Path]]], ids: dict[str, int], split: Split, progress: Any
) -> dict[str, list[CheckedFile]]:
    """The checked files of "train", "valid" and "test", from their folders or drawn from the training files."""
    files = {part: check_files(listing, ids, progress) for part, listing in listings.items()}
    pool = files["train"]
    drawn = {part: [pool[i] for i in rows] for part, rows in split._asdict().items()}
    return {part: files[part] if part in files and part != "train" else drawn[part] for part in drawn}


def check_files(listing: dict[str, list[Path]], ids: dict[str, int], progress: Any) -> list[CheckedFile]:
    """Opens the header of every file of a listing; `progress.update()` is called once per file."""
    checked = []
    for name, paths in listing.items():
        for path in paths:
            try:
                status = os.stat(path)
                digest = _check_image(str(path), status.st_size, status.st_mtime_ns)
            except BROKEN_IMAGE as error:
                raise StreamError(f"{path} cannot be read as an image: {error}") from error
            checked.append(CheckedFile(str(path), ids[name], f"{name}/{path.name}", digest))
            progress.update()
    return checked


@functools.lru_cache(maxsize=2**20)  # a comparison builds the same stream for every method and seed
def _check_image(path: str, size: int, modified: int) -> bytes:
    """Opens the header, and returns a digest of size, first and last 4 KiB: the content of small files, the headers and
    the ends of the compressed data of large ones. `modified` only keys the cache."""
    with open_regular(path) as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        tail = file.read(_EDGE)
        file.seek(0)
        with bounded_image(file) as image:
            check_mode(image)
    return hashlib.sha256(b"%d:" % size + head + tail).digest()


__all__ = [
    "IMAGE_EXTENSIONS",
    "IMAGE_MODES",
    "LAYOUTS",
    "VALIDATION_FOLDERS",
    "CheckedFile",
    "ImageFiles",
    "check_files",
    "check_mode",
    "check_transforms",
    "draw_split",
    "find_parts",
    "list_classes",
    "read_parts",
    "visible",
]
