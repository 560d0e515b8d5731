"""Any image data set of the `datasets` library as a stream: from the Hugging Face Hub, or from a folder on disk.

The library is optional, `pip install avalanche-firn[huggingface]`. What it opens is accepted here: a name on the Hub
("cifar100", "imagenet-1k" after its licence is accepted), a folder of images in class folders, of parquet files or of
`save_to_disk`. Data sets that bring a script of their own are refused: it would be code of strangers, which versions
before 4.0 could run and later ones can't, so 4.0 is required and `trust_remote_code` never passed.

The Hub keeps no fixed content under a name: pass `revision` (a commit) and compare `Stream.fingerprint`, which covers
all labels and the bytes of the first image of every class, in each part.

The library hands over bytes or paths and never decodes: images are opened on access within the bounds of
`image_bounds`, become RGB as in `image_files` and, unlike there, are turned as their EXIF data says, as it would do.

Cost: labels are read at once, 0.1 us a row; one image per class and part is opened. The library keeps a copy of what it
loads from folders of images and from the Hub (`HF_DATASETS_CACHE`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.image_bounds import BROKEN_IMAGE, bounded_image
from avalanche_firn.benchmarks.image_files import check_mode, check_transforms
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

INSTALL = "pip install avalanche-firn[huggingface]"
OLDEST = 4  # major version: the first that can't run a data set's own code
_FORMATS = ("arrow", "imagefolder", "parquet", "webdataset")  # loaders whose folder is data_dir
_FIELDS = {"train": "train", "test": "test", "valid": "validation"}  # part -> argument that names its split
_ORIENTATION = 0x0112  # of EXIF data
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes for several splits and for one


class HubImages(Dataset):
    """(RGB image, label) pairs over rows of a data set of the library.

    Args:
        data: a split with its image column, of type Image, the only one that is read.
        column: name of that column.
        rows: (N,) positions in `data`.
        targets: (N,) class ids of those rows.
    """

    def __init__(self, data: Any, column: str, rows: Sequence[int], targets: Sequence[int]) -> None:
        image = data.features[column]
        self.data = data.cast_column(column, type(image)(decode=False)) if image.decode else data
        self.column = column
        self.rows = [int(row) for row in rows]
        self.targets = [int(t) for t in targets]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        try:
            return _decoded(self.data[row][self.column]), self.targets[index]
        except BROKEN_IMAGE as error:
            raise StreamError(f"row {row} of column {self.column!r} cannot be decoded: {error}") from error


def _decoded(stored: Any) -> Image.Image:
    """The RGB image of a row, stored as {"bytes": ..., "path": ...}, turned as its EXIF data says."""
    if stored is None:
        raise ValueError("it is empty; accepted: an image in every row")
    with bounded_image(stored["path"] if stored["bytes"] is None else stored["bytes"]) as image:
        check_mode(image)
        image.load()  # some formats know their EXIF data only then
        if image.getexif().get(_ORIENTATION) is not None:
            return ImageOps.exif_transpose(image).convert("RGB")
        return image.convert("RGB")


def huggingface_stream(
    dataset: str,
    *,
    tasks: int | Sequence[int],
    train_transform: Transform,
    eval_transform: Transform,
    config: str | None = None,
    revision: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    validation: str | None = None,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
    name: str | None = None,
) -> Stream:
    """A class-incremental stream over a data set of images with labels.

    Args:
        dataset: name on the Hub, name of one of the library's formats ("imagefolder", "parquet") with `data_dir`, or a
            folder.
        tasks: number of tasks or their class counts, see `streams.task_sizes`.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        config: configuration (subset) of the data set, where it has several.
        revision: commit, tag or branch on the Hub; None takes what is newest.
        image: column of the images. None: the only column of type Image. A named column of another type (bytes, paths)
            is cast to it.
        label: column of the classes. None: the only one of type ClassLabel, else the only one of whole numbers or text.
            Of a ClassLabel the ids and names are kept; of others the ids are the positions of the sorted values.
        train, test, validation: names of the splits. `test` None takes "test", else "validation", else draws it from
            `train`; `validation` None takes "validation" if that isn't the test part, else draws it.
        class_order: class ids or names in order of appearance; None: natural order, or the one of `seed`.
        seed: makes the class order (`streams.class_order`).
        validation_fraction, test_fraction: part of each class of `train` where there is no such split. 0 for the
            first: there is then no validation stream.
        split_seed: of the drawn parts.
        data_dir: folder inside the data set, or with "imagefolder" and the like the folder itself.
        name: of the stream; by default the last part of `dataset` (of `data_dir` for a format) and the configuration.

    Raises:
        StreamError: the library is missing or too old (with the command that installs it), a data set that it doesn't
            load, splits or columns that are absent or ambiguous (all are listed), rows without a label, classes that
            differ between the parts, too few images for a split, or a class order or sizes that do not fit.
    """
    check_transforms(train_transform, eval_transform)
    stratified_split([], validation_fraction=validation_fraction, test_fraction=test_fraction, seed=split_seed)
    library = _library()
    splits = _load(library, dataset, config, revision, data_dir, train)
    names = _choose_splits(dataset, splits, train, test, validation)
    used = {part: splits[split].with_format(None) for part, split in names.items()}
    image, label = _choose_columns(library, dataset, used, image, label)
    class_names, labels = _labels(library, dataset, used, names, label)
    images = {part: _image_column(library, data, image) for part, data in used.items()}
    order = resolve_class_order(class_names, class_order, seed)
    sizes = task_sizes(len(class_names), tasks)
    split = stratified_split(
        labels["train"],
        validation_fraction=0 if "valid" in used else validation_fraction,
        test_fraction=0 if "test" in used else test_fraction,
        seed=split_seed,
        class_names=class_names,
    )
    digest = Digest()
    digest.add("classes", "\n".join(class_names))
    datasets = {}
    for part, drawn in split._asdict().items():
        source = part if part in used else "train"
        rows = np.arange(len(labels[part])) if part in used and part != "train" else drawn
        if not len(rows):
            if part == "valid":
                continue
            raise StreamError(f"{dataset!r} has no split for {part} and {part}_fraction is 0; accepted: one of both")
        targets = labels[source][rows]
        _add_part(library, digest, part, images[source], image, rows, targets)
        datasets[part] = HubImages(images[source], image, rows.tolist(), targets.tolist())
    return build_stream(
        name or _name(dataset, config, data_dir),
        **datasets,
        class_order=order,
        task_sizes=sizes,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _name(dataset: str, config: str | None, data_dir: str | Path | None) -> str:
    place = Path(data_dir) if data_dir is not None and dataset in _FORMATS else Path(dataset)
    stem = place.resolve().name if place.is_dir() else place.name
    return f"{stem}-{config}" if config else stem


def _library() -> Any:
    try:
        import datasets  # here, because it is optional and takes half a second
    except ImportError as error:
        raise StreamError(f"huggingface_stream needs the library datasets: {INSTALL}") from error
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise StreamError(
            f"datasets has version {datasets.__version__}; accepted: {OLDEST}.0 or later, earlier ones could run code "
            f"of a data set: {INSTALL}"
        )
    return datasets


def _load(
    library: Any, dataset: str, config: str | None, revision: str | None, data_dir: str | Path | None, train: str
) -> dict[str, Any]:
    """Split name -> data."""
    if not isinstance(dataset, str) or not dataset:
        raise StreamError(f"dataset is {dataset!r}; accepted: a name on the Hub or a folder, as text")
    saved = any((Path(dataset) / file).is_file() for file in _SAVED)
    if saved and (config or revision or data_dir):
        raise StreamError(f"{dataset} is a folder of save_to_disk; accepted: no config, revision or data_dir")
    try:
        if saved:
            loaded = library.load_from_disk(dataset)
        else:
            folder = None if data_dir is None else str(data_dir)
            loaded = library.load_dataset(dataset, config, revision=revision, data_dir=folder)
    except (OSError, RuntimeError, ValueError, library.exceptions.DatasetsError) as error:
        raise StreamError(f"dataset {dataset!r} cannot be loaded: {type(error).__name__}: {error}") from error
    # one split alone is saved without its name
    return dict(loaded) if isinstance(loaded, Mapping) else {train: loaded}


def _choose_splits(
    dataset: str, splits: Mapping[str, Any], train: str, test: str | None, validation: str | None
) -> dict[str, str]:
    """Part ("train", "test", "valid") -> name of its split; drawn parts are not in it."""
    names = {"train": train}
    if test is None:
        test = next((split for split in ("test", "validation") if split in splits and split != train), None)
    if validation is None and "validation" in splits and "validation" not in (train, test):
        validation = "validation"
    for part, split in (("test", test), ("valid", validation)):
        if split is not None:
            if split in names.values():
                raise StreamError(f"{_FIELDS[part]} is {split!r}, as for another part; accepted: a split of its own")
            names[part] = split
    for part, split in names.items():
        if split not in splits:
            raise StreamError(f"{_FIELDS[part]} is {split!r}; accepted: the splits of {dataset!r}: {', '.join(splits)}")
    return names


def _choose_columns(
    library: Any, dataset: str, used: Mapping[str, Any], image: str | None, label: str | None
) -> tuple[str, str]:
    features = used["train"].features
    listed = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    accepted = f"accepted: one of the columns of {dataset!r}: {listed}"
    for field, column in (("image", image), ("label", label)):
        if column is not None and column not in features:
            raise StreamError(f"{field} is {column!r}; {accepted}")
    if image is None:
        image = _only("image", [c for c, f in features.items() if isinstance(f, library.Image)], accepted)
    if label is None:
        found = [c for c, f in features.items() if isinstance(f, library.ClassLabel)]
        found = found or [c for c, f in features.items() if _plain(library, f)]
        label = _only("label", found, accepted)
    elif not isinstance(features[label], library.ClassLabel) and not _plain(library, features[label]):
        raise StreamError(f"label is {label!r}; accepted: classes, whole numbers or text; {accepted}")
    for part, data in used.items():
        absent = [column for column in (image, label) if column not in data.features]
        if absent:
            raise StreamError(f"column {absent[0]!r} is missing in the {part} split of {dataset!r}")
    return image, label


def _only(field: str, found: Sequence[str], accepted: str) -> str:
    if len(found) == 1:
        return found[0]
    what = f"is ambiguous ({', '.join(found)})" if found else "is not to be found by type"
    raise StreamError(f"the {field} column {what} and {field} is None; {accepted}")


def _kind(feature: Any) -> str:
    return f"{type(feature).__name__} {dtype}" if (dtype := getattr(feature, "dtype", None)) else type(feature).__name__


def _plain(library: Any, feature: Any) -> bool:
    """Whether a column holds whole numbers or text."""
    return isinstance(feature, library.Value) and ("int" in feature.dtype or "string" in feature.dtype)


def _labels(
    library: Any, dataset: str, used: Mapping[str, Any], names: Mapping[str, str], label: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class names, and class ids (N,) int64 of every part that has a split."""
    values = {part: data[label][:] for part, data in used.items()}
    for part, column in values.items():
        empty = sum(value is None for value in column)
        if empty:
            raise StreamError(f"{empty} of {len(column)} rows of split {names[part]!r} have no {label!r}")
    feature = used["train"].features[label]
    if isinstance(feature, library.ClassLabel):
        for part, data in used.items():
            if getattr(data.features[label], "names", None) != feature.names:
                raise StreamError(f"the classes of split {names[part]!r} are not those of {names['train']!r}")
        class_names = tuple(feature.names)
        ids = {part: np.asarray(column, dtype=np.int64) for part, column in values.items()}
    else:
        distinct = sorted({value for column in values.values() for value in column})
        position = {value: c for c, value in enumerate(distinct)}
        class_names = tuple(str(value) for value in distinct)
        ids = {part: np.asarray([position[v] for v in column], dtype=np.int64) for part, column in values.items()}
    for part, column in ids.items():
        outside = int(((column < 0) | (column >= len(class_names))).sum())
        if outside:  # test parts whose labels are secret have -1
            raise StreamError(
                f"{outside} of {len(column)} rows of split {names[part]!r} have a {label!r} outside 0.."
                f"{len(class_names) - 1} (from {column.min()} to {column.max()}); accepted: a split with labels, named "
                f"in {_FIELDS[part]}"
            )
        lacking = [class_names[c] for c in sorted(set(range(len(class_names))) - set(column.tolist()))]
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise StreamError(
                f"split {names[part]!r} of {dataset!r} has no image of {', '.join(lacking[:5])}{more}; accepted: every "
                f"class of {label!r} in every part"
            )
    return class_names, ids


def _image_column(library: Any, data: Any, column: str) -> Any:
    """The split with its image column alone, as bytes or paths: the library would decode whatever lies there."""
    alone = data.select_columns([column])
    try:
        return alone.cast_column(column, library.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise StreamError(f"image is {column!r}, of which the library makes no images: {error}") from error


def _add_part(
    library: Any, digest: Digest, part: str, data: Any, column: str, rows: np.ndarray, targets: np.ndarray
) -> None:
    """Adds rows and labels of a part, and the bytes of the first image of each class."""
    digest.add(f"{part}/rows", rows.astype(np.int64))
    digest.add(f"{part}/labels", targets.astype(np.int64))
    raw = data.cast_column(column, library.Image(decode=False))
    for c in np.unique(targets).tolist():
        row = int(rows[np.flatnonzero(targets == c)[0]])
        stored = raw[row][column]
        if stored is None:
            raise StreamError(f"row {row} of column {column!r} is empty; accepted: an image in every row")
        content = stored["bytes"]
        if content is None:
            try:
                content = Path(stored["path"]).read_bytes()
            except OSError as error:
                raise StreamError(f"row {row} of column {column!r} cannot be read: {error}") from error
        digest.add(f"{part}/first/{c}", hashlib.sha256(content).digest())


__all__ = ["HubImages", "huggingface_stream"]
