"""OmnImage: ImageNet's 1,000 classes with 20 or 100 images each that resemble one another, at 84x84.

From Frati, Traft and Cheney, GECCO 2023 (github.com/lfrati/OmnImage), made as a natural counterpart of Omniglot. The
zapping papers (arXiv 2310.07996, 2507.01559) pre-train on 700 classes and transfer to 300. Pixels as in the released
code, normalised with the data set's own figures; images that aren't 84x84 are scaled with Lanczos.

The 300 classes came out of a search, so no rule gives them. The released list is `extra/test_class_names.json` of that
repository (its branch with a random list calls it `evolved_test_class_names.json`); `read_test_classes` reads it and
recognises it by its digest. Any other list of names can be given.

The images are ImageNet's (research use); the archives `OmnImage84_20.zip` and `OmnImage84_100.zip` are linked there and
aren't fetched from here. Accepted layouts: `root/OmnImage84_20/WNID/*.JPEG` (or `OmnImage84_100`), or that folder
itself as root.

Cost: 0.35 ms per image to read; 20 images of 1,000 classes take 7 s and 0.42 GB, 100 images five times as much.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.image_files import list_classes
from avalanche_firn.benchmarks.one_class import check_parts, split_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

OmnImagePart = Literal["train", "test"]

OMNIMAGE_MEAN, OMNIMAGE_STD = (0.4875, 0.4667, 0.4110), (0.2607, 0.2528, 0.2678)  # released code, of the 100 images
# SHA-256 of the 300 names of the released list, sorted and joined by newlines
OMNIMAGE_TEST_CLASSES_SHA256 = "d0530236898fd1adc7dbe217ab23fe0d6930fd5b9b0375f0be24e01c72cdeef1"
OMNIMAGE_CLASSES = 1000
_NUMBERS = (20, 100)  # images per class of the two archives


def read_test_classes(path: str | Path, *, released: bool = True) -> tuple[str, ...]:
    """The classes of the transfer set from a file: a JSON list of names, or a text file with one name per line.

    Args:
        path: the file; `.json` is read as JSON. Empty lines and what follows a "#" are left out of text.
        released: True refuses any list but the released one of 300 names; False takes a list of one's own.

    Returns:
        The names, sorted.

    Raises:
        StreamError: no such file, no list of names, a name twice, or, with `released`, another list.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix.lower() == ".json" else _lines(text)
    except (OSError, ValueError) as error:  # includes JSON and Unicode errors
        raise StreamError(f"{path} cannot be read as a list of class names: {error}") from error
    checked = _check_names(names, str(path))
    if released and hashlib.sha256("\n".join(checked).encode()).hexdigest() != OMNIMAGE_TEST_CLASSES_SHA256:
        raise StreamError(
            f"{path} holds {len(checked)} classes and isn't the released list; accepted: extra/test_class_names.json "
            "of lfrati/OmnImage, or released=False for a list of your own"
        )
    return checked


def omnimage_classes(
    root: str | Path,
    part: OmnImagePart | None = None,
    *,
    test_classes: Sequence[str] | None = None,
    images_per_class: int = 20,
    size: int = 84,
) -> ClassImages:
    """Classes named by WNID and sorted as text.

    Args:
        root: a folder in one of the layouts above.
        part: "test": the classes of `test_classes`; "train": all others; None: all, without a list.
        test_classes: the names of the transfer set, from `read_test_classes`; with a part only.
        images_per_class: 20 or 100, which names the folder; every class must have so many images.
        size: height and width in pixels.

    Returns:
        Images (N, 3, size, size) with the data set's mean and standard deviation.

    Raises:
        StreamError: an argument out of range, a part without a list or a list without a part, no such folder, a class
            of the list that is absent, no class left, another number of classes or of images, files that are no images.
    """
    if part not in (None, "train", "test"):
        raise StreamError(f"part is {part!r}; accepted: 'train', 'test' or None")
    if isinstance(images_per_class, bool) or images_per_class not in _NUMBERS:
        raise StreamError(f"images_per_class is {images_per_class!r}; accepted: {' or '.join(map(str, _NUMBERS))}")
    if (part is None) != (test_classes is None):
        raise StreamError(
            f"part is {part!r} and test_classes {'absent' if test_classes is None else 'given'}; accepted: both, with "
            "the names from read_test_classes, or neither"
        )
    chosen = None if test_classes is None else _check_names(test_classes, "test_classes")
    folder = _find(Path(root), images_per_class)
    folders = list_classes(folder, "accepted: WNID/*.JPEG")
    if len(folders) != OMNIMAGE_CLASSES:
        raise StreamError(f"{folder} has {len(folders)} classes; accepted: the {OMNIMAGE_CLASSES} of the archive")
    if chosen is not None:
        absent = [name for name in chosen if name not in folders]
        if absent:
            raise StreamError(f"class {absent[0]!r} of test_classes is not in {folder}; accepted: its folders")
        folders = {name: files for name, files in folders.items() if (name in set(chosen)) == (part == "test")}
        if not folders:
            raise StreamError(f"test_classes holds every class of {folder}; accepted: a list that leaves some to train")
    for name, files in folders.items():
        if len(files) != images_per_class:
            raise StreamError(f"class {name!r} in {folder} has {len(files)} images; accepted: {images_per_class}")
    return read_class_images(
        folders,
        size=size,
        mode="RGB",
        resample="lanczos",
        mean=OMNIMAGE_MEAN,
        std=OMNIMAGE_STD,
        description="reading omnimage",
    )


def omnimage_stream(
    root: str | Path,
    part: OmnImagePart | None = "test",
    *,
    test_classes: Sequence[str] | None = None,
    images_per_class: int = 20,
    train_per_class: int = 15,
    test_per_class: int | None = None,
    valid_per_class: int = 0,
    split_seed: int = 0,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    size: int = 84,
    allow_shared_images: bool = False,
    name: str | None = None,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """One class per experience, the images of every class split into parts.

    Args:
        root, part, test_classes, images_per_class, size: see `omnimage_classes`.
        train_per_class: images of every class. 15: released code of arXiv 2310.07996, with 20 as with 100 images.
        test_per_class: the same for the test stream. None: all others, 5 or 85: released code.
        valid_per_class: images for a validation stream; 0: there is none.
        split_seed: see `split_stream`. Images beyond the sum of the three numbers are left out.
        class_order, seed, allow_shared_images, train_transform, eval_transform: see `one_class_stream`.
        name: of the stream; "omnimage", the number of images and the part by default.

    Raises:
        StreamError: see `omnimage_classes` and `one_class_stream`; a class with too few images.
    """
    check_parts(train_per_class, 1 if test_per_class is None else test_per_class, valid_per_class)
    images = omnimage_classes(root, part, test_classes=test_classes, images_per_class=images_per_class, size=size)
    rest = images_per_class - train_per_class - valid_per_class
    return split_stream(
        images,
        name=name or "-".join([f"omnimage{images_per_class}", *([part] if part else [])]),
        train_per_class=train_per_class,
        test_per_class=rest if test_per_class is None else test_per_class,
        valid_per_class=valid_per_class,
        split_seed=split_seed,
        class_order=class_order,
        seed=seed,
        allow_shared_images=allow_shared_images,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _lines(text: str) -> list[str]:
    return [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]


def _check_names(names: object, where: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise StreamError(f"{where} is {names!r}; accepted: a sequence of class names, at least one")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise StreamError(f"{where} holds {wrong[0]!r}; accepted: class names")
    unique = sorted(set(names))
    if len(unique) != len(names):
        repeated = next(name for name in unique if list(names).count(name) > 1)
        raise StreamError(f"{where} holds {repeated!r} twice; accepted: each class once")
    return tuple(unique)


def _find(root: Path, images_per_class: int) -> Path:
    name = f"OmnImage84_{images_per_class}"
    found = [place for place in (root / name, root) if place.name == name and place.is_dir()]
    if len(found) != 1:
        there = f"{found[0]} lies in a folder of the same name" if found else f"{root} neither is nor holds {name}"
        raise StreamError(f"{there}; accepted: {name}/WNID/*.JPEG")
    return found[0]


__all__ = [
    "OMNIMAGE_CLASSES",
    "OMNIMAGE_MEAN",
    "OMNIMAGE_STD",
    "OMNIMAGE_TEST_CLASSES_SHA256",
    "omnimage_classes",
    "omnimage_stream",
    "read_test_classes",
]
