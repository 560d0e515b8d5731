"""ImageNet-R, renditions of 200 ImageNet classes, as a class-incremental stream (Split ImageNet-R: 10 tasks of 20).

30,000 images: art, cartoons, embroidery, toys and more (Hendrycks et al., arXiv 2006.16241). SLCA (arXiv 2303.05118),
SLCA++ and LoRAC-IPC report on it, after DualPrompt (arXiv 2204.04799).

There is no official split. DualPrompt draws a random 80/20 split over all images (24,000 to train, 6,000 to test; the
share of a class varies a little) and SLCA's authors point there (issue 1 of their repository). Here:

- `split_seed` draws such a split, the same on every machine, and writes it once to `imagenet-r-split-SEED.txt` in the
  root, to be published with results. It is ours and not the papers', whose lists aren't published: part of any
  difference to their figures comes from that;
- `split_files` takes the two lists of another project, for example `imagenet-r_train.yaml` and `imagenet-r_test.yaml`
  that the CODA-Prompt code reads.

Layouts: `root/imagenet-r/WNID/*.jpg` (with the archive's README.txt), or `root/WNID/*.jpg`. Class ids are the positions
of the WNIDs sorted as text, and the WNIDs are the class names.

Cost: the download has 2.0 GB, unpacked as much again; building the stream takes 1 s, no image is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from avalanche_firn.benchmarks.downloads import RemoteFile, default_root, locate
from avalanche_firn.benchmarks.image_files import check_transforms, list_classes, visible
from avalanche_firn.benchmarks.listed import listed_stream
from avalanche_firn.benchmarks.split_lists import check_cover, load_or_draw, read_name_lists, seeded_split
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

IMAGENET_R_ARCHIVE = RemoteFile(
    "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337"
)
IMAGENET_R_IMAGES = 30_000
IMAGENET_R_CLASSES = 200
TRAIN_FRACTION = 0.8  # DualPrompt, and SLCA by issue 1 of its repository

_INNER = "imagenet-r"
_LAYOUTS = "accepted: root/imagenet-r/WNID/*.jpg or root/WNID/*.jpg, where a WNID is n and eight digits"


def imagenet_r_stream(
    root: str | Path | None = None,
    *,
    tasks: int | Sequence[int] = 10,
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    split_seed: int = 0,
    split_files: tuple[str | Path, str | Path] | None = None,
    validation_fraction: float = 0.0,
    download: bool = False,
    complete: bool = True,
    name: str | None = None,
) -> Stream:
    """Split ImageNet-R.

    Args:
        root: a folder in one of the layouts above; None: `~/.avalanche/data/imagenet-r`.
        tasks: number of tasks or their class counts. 10: the papers.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order, seed: class ids or WNIDs in order of appearance, or the seed of a random order
            (`streams.class_order`; the papers' 1993 and others).
        split_seed: of the 80/20 split, and of the validation part; a list in the root that was written before is used
            and must match the images.
        split_files: (train, test) lists as `split_lists.read_name_lists` takes them, instead of the drawn split;
            `split_seed` then draws the validation part only.
        validation_fraction: part of each class's training images that becomes the validation stream; 0: none.
        download: whether to fetch and unpack the archive into the root if the images aren't there (2.0 GB; the archive
            stays and may be deleted).
        complete: True requires all 30,000 images of 200 classes. False takes the classes and images that are there, for
            trials: the split is drawn from them and not written out, and entries of `split_files` without an image are
            left out. Figures from a part can't be compared.
        name: of the stream; "imagenet-r" by default.

    Raises:
        StreamError: no such folder, images that are missing, lists that don't match, files that are no images, classes
            without images in a part, or an order, sizes or fraction that don't fit.
        DownloadError: the archive could not be fetched.
    """
    check_transforms(train_transform, eval_transform)
    root = default_root(_INNER) if root is None else Path(root).expanduser()
    folder = locate(root, _INNER, _holds_wnids, archive=IMAGENET_R_ARCHIVE, download=download)
    if folder is None:
        raise StreamError(
            f"ImageNet-R is not in {root}; {_LAYOUTS}; or download=True ({IMAGENET_R_ARCHIVE.url}, 2.0 GB)"
        )
    others = [path.name for path in visible(folder)[0] if not _is_wnid(path.name)]
    if others:
        hint = "; a tree with train and test is for folder_stream" if {"train", "test"} & set(others) else ""
        raise StreamError(f"{folder} holds the folder {others[0]!r}; {_LAYOUTS}{hint}")
    listing = list_classes(folder, _LAYOUTS)
    names = [f"{wnid}/{path.name}" for wnid, paths in listing.items() for path in paths]
    if complete and (len(names), len(listing)) != (IMAGENET_R_IMAGES, IMAGENET_R_CLASSES):
        raise StreamError(
            f"{folder} has {len(names)} images of {len(listing)} classes, not {IMAGENET_R_IMAGES} of "
            f"{IMAGENET_R_CLASSES}; unpack the archive again; complete=False takes what is there"
        )
    train, test = _split(root, names, split_seed, split_files, complete)
    ids = {wnid: c for c, wnid in enumerate(listing)}
    return listed_stream(
        name or _INNER,
        folder,
        files={
            part: [(path, ids[path.split("/")[0]]) for path in paths]
            for part, paths in (("train", train), ("test", test))
        },
        class_names=tuple(listing),
        tasks=tasks,
        train_transform=train_transform,
        eval_transform=eval_transform,
        class_order=class_order,
        seed=seed,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
    )


def _split(
    root: Path,
    names: Sequence[str],
    split_seed: int,
    split_files: tuple[str | Path, str | Path] | None,
    complete: bool,
) -> tuple[list[str], list[str]]:
    if split_files is not None:
        if isinstance(split_files, str) or len(split_files) != 2:
            raise StreamError(f"split_files is {split_files!r}; accepted: a pair (train list, test list) or None")
        train, test = read_name_lists(*split_files)
        if complete:
            check_cover(train, test, names, f"the split in {split_files[0]} and {split_files[1]}")
            return train, test
        there = set(names)
        return [path for path in train if path in there], [path for path in test if path in there]
    if not complete:
        return seeded_split(names, TRAIN_FRACTION, split_seed)
    return load_or_draw(root / f"{_INNER}-split-{split_seed}.txt", names, TRAIN_FRACTION, split_seed)


def _is_wnid(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def _holds_wnids(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_wnid(entry.name) and entry.is_dir() for entry in entries)


__all__ = ["IMAGENET_R_ARCHIVE", "IMAGENET_R_CLASSES", "IMAGENET_R_IMAGES", "imagenet_r_stream"]
