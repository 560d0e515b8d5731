"""A stream from any folder of class folders.

Accepted layouts: `root/CLASS/image`, or `root/train/CLASS/image` with `root/test/CLASS/image` and perhaps one of
`root/val`, `root/valid`, `root/validation`. What is not there as a folder is drawn from the training images of each
class by a seeded permutation. Class ids are the positions of the folder names sorted as text ("10" before "2").

Nothing is skipped in silence: every file of a class folder must be an image whose header opens (hidden files and the
index files of desktop systems aside), train and test must hold the same classes, and images are read with 8 bits per
channel only, because a conversion of deeper ones to RGB would clip them.

Cost: one open per file the first time a process builds the stream (0.1 ms for a small PNG, 0.2 ms for a JPEG) and 30 us
a file later; no pixels are decoded before `__getitem__`, in the workers of the loader.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from avalanche_firn.benchmarks.streams import (
    Digest,
    Stream,
    StreamError,
    Transform,
    build_stream,
    resolve_class_order,
    stratified_split,
    task_sizes,
)

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


class _File(NamedTuple):
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
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB"), self.targets[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise StreamError(f"{self.paths[index]} cannot be decoded: {error}") from error


def folder_stream(
    root: str | Path,
    *,
    tasks: int | Sequence[int],
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    name: str | None = None,
) -> Stream:
    """A class-incremental stream over a folder of class folders.

    Args:
        root: the folder, in one of the layouts above.
        tasks: number of tasks or their class counts, see `streams.task_sizes`.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order: class ids or folder names in order of appearance; None: natural order, or the one of `seed`.
        seed: makes the class order (`streams.class_order`).
        validation_fraction: part of each class's training folder that becomes the validation stream, unless there is a
            validation folder. Pass 0 for a protocol that trains on everything: there is then no validation stream.
        test_fraction: the same for the test stream, where there is no test folder.
        split_seed: of the drawn splits; independent of `seed`, so that class orders are compared on the same images.
        name: of the stream; the folder's name by default.

    Raises:
        StreamError: no such folder, no classes, a class without images, a file that is no image, classes that differ
            between train and test, too few images for the split, or a class order or sizes that do not fit.
    """
    for field, transform in (("train_transform", train_transform), ("eval_transform", eval_transform)):
        if not callable(transform):
            raise StreamError(f"{field} is {transform!r}; accepted: a callable from a PIL image to a tensor")
    root = Path(root)
    folders = _find_parts(root)
    listings = {part: _list_classes(folder) for part, folder in folders.items()}
    class_names = tuple(listings["train"])
    for part, listing in listings.items():
        differ = sorted(set(listing) ^ set(class_names))
        if differ:
            missing = [label for label in differ if label not in listing]
            where = f"missing in {folders[part]}" if missing else f"missing in {folders['train']}"
            raise StreamError(f"class folder {(missing or differ)[0]!r} is {where}; accepted: the same classes in both")
    order = resolve_class_order(class_names, class_order, seed)
    sizes = task_sizes(len(class_names), tasks)
    ids = {label: c for c, label in enumerate(class_names)}
    # The split needs counts only: an impossible one is refused before the files are opened.
    labels = [ids[label] for label, paths in listings["train"].items() for _ in paths]
    split = stratified_split(
        labels,
        validation_fraction=0 if "valid" in listings else validation_fraction,
        test_fraction=0 if "test" in listings else test_fraction,
        seed=split_seed,
        class_names=class_names,
    )
    if "test" not in listings and not len(split.test):
        raise StreamError(f"{root} has no folder test and test_fraction is 0; accepted: one of both")
    total = sum(len(paths) for listing in listings.values() for paths in listing.values())
    with tqdm(total=total, desc=f"checking {root.name}", unit="file", disable=None, leave=False) as progress:
        files = {part: _check_files(listing, ids, progress) for part, listing in listings.items()}
    pool = files["train"]
    parts = {"train": [pool[i] for i in split.train]}
    parts["valid"] = files["valid"] if "valid" in files else [pool[i] for i in split.valid]
    parts["test"] = files["test"] if "test" in files else [pool[i] for i in split.test]
    digest = Digest()
    for part, members in parts.items():
        for file in members:
            digest.add(f"{part}/{file.key}", file.digest)
    datasets = {part: ImageFiles([f.path for f in m], [f.label for f in m]) for part, m in parts.items() if m}
    return build_stream(
        name or root.resolve().name,
        **datasets,
        class_order=order,
        task_sizes=sizes,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sub-folders and files of a folder, sorted by name, without hidden ones and the systems' index files."""
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:  # knows what is a folder without a call per file
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_NAMES:
                (folders if entry.is_dir() else files).append(Path(entry.path))
    return folders, files


def _find_parts(root: Path) -> dict[str, Path]:
    """Folder of the training images and, where there are some, of the validation and the test images."""
    if not root.is_dir():
        raise StreamError(f"{root} is {'not a folder' if root.exists() else 'absent'}; {LAYOUTS}")
    folders, files = _visible(root)
    if not folders:
        raise StreamError(f"{root} holds no class folders; {LAYOUTS}")
    loose = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        raise StreamError(f"{loose[0]} is an image outside any class folder; {LAYOUTS}")
    named = {path.name: path for path in folders}
    # A class may be called "train": the folder is a part only if it holds folders.
    if "train" not in named or not _visible(named["train"])[0]:
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
        raise StreamError(f"{next(iter(named.values()))} stands beside {root / 'train'}; {LAYOUTS}")
    return parts


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted. Refuses anything in a class folder that is not an image file."""
    classes, files = _visible(folder)
    if not classes:
        raise StreamError(f"{folder} holds no class folders; {LAYOUTS}")
    loose = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        raise StreamError(f"{loose[0]} is an image outside any class folder; {LAYOUTS}")
    listing = {}
    for path in classes:
        below, images = _visible(path)
        if below:
            raise StreamError(f"class folder {path} holds the folder {below[0].name!r}; {LAYOUTS}")
        if not images:
            raise StreamError(f"class folder {path} holds no images; accepted: at least one file in each class folder")
        other = [image for image in images if image.suffix.lower() not in IMAGE_EXTENSIONS]
        if other:
            raise StreamError(f"{other[0]} is not an image file; accepted: {' '.join(sorted(IMAGE_EXTENSIONS))}")
        listing[path.name] = images
    return listing


def _check_files(listing: dict[str, list[Path]], ids: dict[str, int], progress: Any) -> list[_File]:
    checked = []
    for name, paths in listing.items():
        for path in paths:
            try:
                status = os.stat(path)
                digest = _check_image(str(path), status.st_size, status.st_mtime_ns)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise StreamError(f"{path} cannot be read as an image: {error}") from error
            checked.append(_File(str(path), ids[name], f"{name}/{path.name}", digest))
            progress.update()
    return checked


@functools.lru_cache(maxsize=2**20)  # a comparison builds the same stream for every method and seed
def _check_image(path: str, size: int, modified: int) -> bytes:
    """Opens the header, and returns a digest of size, first and last 4 KiB: the content of small files, the headers and
    the ends of the compressed data of large ones. `modified` only keys the cache."""
    with open(path, "rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        tail = file.read(_EDGE)
        file.seek(0)
        with Image.open(file) as image:
            mode = image.mode
    if mode not in IMAGE_MODES:
        raise ValueError(f"pixels of mode {mode}; accepted: 8 bits per channel or fewer, convert it first")
    return hashlib.sha256(b"%d:" % size + head + tail).digest()


__all__ = ["ImageFiles", "folder_stream"]
