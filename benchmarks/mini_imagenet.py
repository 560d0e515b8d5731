"""mini-ImageNet, 100 classes of ImageNet with 600 images each at 84x84, in the split of Ravi and Larochelle.

64 classes to train, 16 to validate and 20 to test; the zapping paper (arXiv 2310.07996) pre-trains on the first and
transfers to the last. Pixels as in its released code: scaled with Lanczos where a file isn't 84x84, normalised with
ImageNet's mean and standard deviation.

The images are ImageNet's (research use) and aren't fetched from here. Accepted layouts of the copies that go round:

- `root/train/WNID/*.jpg` with `root/val` and `root/test`, also in `root/processed_images` (the layout of
  yaoyao-liu/mini-imagenet-tools, which the released code uses);
- `root/images` with `root/train.csv`, `root/val.csv` and `root/test.csv`, which have the columns filename and label
  (Ravi and Larochelle's lists); an image is `images/FILENAME` or `images/LABEL/FILENAME`.

Cost: 0.35 ms per image to read; the 64 classes (38,400 images) take 14 s and 0.8 GB.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.image_files import list_classes
from avalanche_firn.benchmarks.one_class import check_parts, split_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform
from avalanche_firn.benchmarks.transforms import IMAGENET_MEAN, IMAGENET_STD

MiniImageNetPart = Literal["train", "val", "test"]

MINI_IMAGENET_CLASSES = {"train": 64, "val": 16, "test": 20}
_LAYOUTS = "accepted: root/{0}/WNID/*.jpg, root/processed_images/{0}/WNID/*.jpg, or root/{0}.csv with root/images"


def mini_imagenet_classes(root: str | Path, part: MiniImageNetPart, *, size: int = 84) -> ClassImages:
    """The classes of one part, named by WNID (the label of the lists) and sorted as text.

    Args:
        root: a folder in one of the layouts above.
        part: "train" (64 classes), "val" (16) or "test" (20).
        size: height and width in pixels.

    Returns:
        Images (N, 3, size, size) with ImageNet's mean and standard deviation.

    Raises:
        StreamError: an unknown part, no such folder or several, a part with a wrong number of classes, a list without
            its two columns or with an image that is absent or listed twice, files that are no images.
    """
    if part not in MINI_IMAGENET_CLASSES:
        raise StreamError(f"part is {part!r}; accepted: {', '.join(map(repr, MINI_IMAGENET_CLASSES))}")
    root = Path(root)
    layouts = _LAYOUTS.format(part)
    found = [place for place in (root / part, root / "processed_images" / part) if place.is_dir()]
    found += [place for place in (root / f"{part}.csv",) if place.is_file()]
    if len(found) != 1:
        there = " and ".join(map(str, found)) + " are both there" if found else f"{root} holds no part {part!r}"
        raise StreamError(f"{there}; {layouts}")
    folders = list_classes(found[0], layouts) if found[0].is_dir() else _read_list(found[0], root / "images")
    if len(folders) != MINI_IMAGENET_CLASSES[part]:
        raise StreamError(f"{found[0]} has {len(folders)} classes; accepted: {MINI_IMAGENET_CLASSES[part]} in {part!r}")
    return read_class_images(
        folders,
        size=size,
        mode="RGB",
        resample="lanczos",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        description=f"reading mini-imagenet {part}",
    )


def mini_imagenet_stream(
    root: str | Path,
    part: MiniImageNetPart = "test",
    *,
    train_per_class: int = 30,
    test_per_class: int = 100,
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
        root, part, size: see `mini_imagenet_classes`.
        train_per_class, test_per_class: images of every class. 30 (or 10) and 100: released code of arXiv 2310.07996.
        valid_per_class: images for a validation stream; 0: there is none.
        split_seed: see `split_stream`. Images beyond the sum of the three numbers are left out.
        class_order, seed, allow_shared_images, train_transform, eval_transform: see `one_class_stream`.
        name: of the stream; "mini-imagenet" and the part by default.

    Raises:
        StreamError: see `mini_imagenet_classes` and `one_class_stream`; a class with too few images.
    """
    check_parts(train_per_class, test_per_class, valid_per_class)
    return split_stream(
        mini_imagenet_classes(root, part, size=size),
        name=name or f"mini-imagenet-{part}",
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        valid_per_class=valid_per_class,
        split_seed=split_seed,
        class_order=class_order,
        seed=seed,
        allow_shared_images=allow_shared_images,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _read_list(path: Path, images: Path) -> dict[str, list[Path]]:
    """Label -> files from a list with the columns filename and label."""
    if not images.is_dir():
        raise StreamError(f"{images} is absent; accepted: the folder of the images that {path} lists")
    folders: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        columns = [name.strip() for name in rows.fieldnames or []]
        if not {"filename", "label"} <= set(columns):
            raise StreamError(f"{path} has the columns {columns}; accepted: filename and label")
        rows.fieldnames = columns
        for row in rows:
            name, label = (row["filename"] or "").strip(), (row["label"] or "").strip()
            if not name or not label:
                raise StreamError(f"{path}, line {rows.line_num}: {row}; accepted: a filename and a label")
            places = [place for place in (images / name, images / label / name) if place.is_file()]
            if len(places) != 1:
                number = "both" if places else "none"
                raise StreamError(
                    f"{path}, line {rows.line_num}: {number} of {images / name} and {images / label / name} is there; "
                    "accepted: one of them"
                )
            if places[0] in seen:
                raise StreamError(f"{path}, line {rows.line_num}: {name!r} is listed twice; accepted: once")
            seen.add(places[0])
            folders.setdefault(label, []).append(places[0])
    return folders


__all__ = ["MINI_IMAGENET_CLASSES", "mini_imagenet_classes", "mini_imagenet_stream"]
