"""CUB-200-2011, 200 species of birds, as a class-incremental stream (Split CUB-200: 10 tasks of 20).

11,788 images with an official split, 5,994 to train and 5,794 to test (Wah et al., Caltech CNS-TR-2011-001). SLCA
(arXiv 2303.05118) and SLCA++ report on it, with whole images.

Not Avalanche's `SplitCUB200`: its `CUB200` passes the bounding boxes to `PathsDataset`, which crops every image to its
box before any transform. The SLCA code doesn't crop, so that one isn't the papers' stream. The files on disk are the
same and are shared, in Avalanche's default place too.

Layouts: `root/CUB_200_2011/` with `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `classes.txt` and
`images/CLASS/*.jpg`, or that folder itself as root. Class ids are those of `classes.txt` less one, class names as
written there ("001.Black_footed_Albatross").

Cost: the download has 1.15 GB; building the stream takes 0.5 s, no image is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avalanche_firn.benchmarks.downloads import RemoteFile, default_root, locate
from avalanche_firn.benchmarks.image_files import check_transforms
from avalanche_firn.benchmarks.listed import listed_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

CUB200_ARCHIVE = RemoteFile(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
    "CUB_200_2011.tgz",
    "97eceeb196236b17998738112f37df78",
)
CUB200_IMAGES = {"train": 5_994, "test": 5_794}
CUB200_CLASSES = 200

_INNER = "CUB_200_2011"
_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
_LAYOUTS = f"accepted: root/{_INNER}/ with {', '.join(_LISTS)} and images/, or that folder itself as root"


def cub200_stream(
    root: str | Path | None = None,
    *,
    tasks: int | Sequence[int] = 10,
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    download: bool = False,
    complete: bool = True,
    name: str | None = None,
) -> Stream:
    """Split CUB-200 with the official parts, images whole.

    Args:
        root: a folder in one of the layouts above; None: `~/.avalanche/data/CUB_200_2011`, where Avalanche keeps it.
        tasks: number of tasks or their class counts. 10: the papers.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order, seed: class ids or names in order of appearance, or the seed of a random order
            (`streams.class_order`; the papers' 1993 and others).
        validation_fraction: part of each class's training images that becomes the validation stream; 0: none.
        split_seed: of that part.
        download: whether to fetch and unpack the archive into the root if the images aren't there (1.15 GB; the archive
            stays and may be deleted).
        complete: True requires the 5,994 and 5,794 images of 200 classes. False takes shorter lists, for trials.
        name: of the stream; "cub200" by default.

    Raises:
        StreamError: no such folder, a list that is absent or malformed, ids that are missing, unknown or there twice,
            an image in the folder of another class, images that are missing, or an order, sizes or fraction that don't
            fit.
        DownloadError: the archive could not be fetched.
    """
    check_transforms(train_transform, eval_transform)
    root = default_root(_INNER) if root is None else Path(root).expanduser()
    folder = locate(root, _INNER, lambda path: (path / _LISTS[0]).is_file(), archive=CUB200_ARCHIVE, download=download)
    if folder is None:
        raise StreamError(
            f"CUB-200-2011 is not in {root}; {_LAYOUTS}; or download=True ({CUB200_ARCHIVE.url}, 1.15 GB)"
        )
    class_names, files = _read_lists(folder)
    found = {part: len(listed) for part, listed in files.items()}
    if complete and (found, len(class_names)) != (CUB200_IMAGES, CUB200_CLASSES):
        raise StreamError(
            f"{folder} lists {found} images of {len(class_names)} classes, not {CUB200_IMAGES} of {CUB200_CLASSES}; "
            "unpack the archive again; complete=False takes what is listed"
        )
    return listed_stream(
        name or "cub200",
        folder,
        files=files,
        class_names=class_names,
        tasks=tasks,
        train_transform=train_transform,
        eval_transform=eval_transform,
        class_order=class_order,
        seed=seed,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
    )


def _read_lists(folder: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """Class names, and part -> (path, class id) in the order of the image ids."""
    images, labels, flags, classes = (_read_column(folder / name) for name in _LISTS)
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise StreamError(f"{folder / _LISTS[3]} has the ids {_ids(classes)}; accepted: 1, 2, ... up to their number")
    for name, column in ((_LISTS[1], labels), (_LISTS[2], flags)):
        for ids, where, other in (
            (set(images) - set(column), name, _LISTS[0]),
            (set(column) - set(images), _LISTS[0], name),
        ):
            if ids:
                raise StreamError(f"{folder / where} lacks the image {_ids(ids)} of {other}; accepted: all ids in each")
    files: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for image in sorted(images):
        label, flag = labels[image], flags[image]
        if not label.isdecimal() or int(label) not in classes:
            raise StreamError(f"{folder / _LISTS[1]}: image {image} has class {label!r}; accepted: 1..{len(classes)}")
        if flag not in ("0", "1"):
            raise StreamError(f"{folder / _LISTS[2]}: image {image} has {flag!r}; accepted: 1 to train, 0 to test")
        own, path = classes[int(label)], images[image]
        if path.split("/")[0] != own:
            raise StreamError(
                f"{folder / _LISTS[0]}: image {image} is {path!r} and its class {own!r}; accepted: its folder"
            )
        files["train" if flag == "1" else "test"].append((f"images/{path}", int(label) - 1))
    return tuple(classes[c] for c in sorted(classes)), files


def _read_column(path: Path) -> dict[int, str]:
    """Id -> the rest of its line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path} cannot be read: {error}; {_LAYOUTS}") from error
    column: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value:
            raise StreamError(f"{path}, line {number}: {line!r}; accepted: an id and a value")
        if int(key) in column:
            raise StreamError(f"{path}, line {number}: the id {key} is there twice; accepted: once")
        column[int(key)] = value
    if not column:
        raise StreamError(f"{path} is empty; accepted: lines with an id and a value")
    return column


def _ids(ids: set[int] | dict[int, str], shown: int = 3) -> str:
    return ", ".join(map(str, sorted(ids)[:shown])) + (f" and {len(ids) - shown} more" if len(ids) > shown else "")


__all__ = ["CUB200_ARCHIVE", "CUB200_CLASSES", "CUB200_IMAGES", "cub200_stream"]
