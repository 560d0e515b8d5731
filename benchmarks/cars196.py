"""Stanford Cars, 196 models of cars, as a class-incremental stream (Split Cars-196: nine tasks of 20 and one of 16).

16,185 images with an official split, 8,144 to train and 8,041 to test (Krause et al., 3dRR 2013). SLCA (arXiv
2303.05118) and SLCA++ report on it.

SLCA's released script for the split copies the images whose flag column is called istest to the training folder. If the
name is right, its parts are swapped (8,041 to train, 8,144 to test); whether the published figures come from that is
open. `swap_train_test=True` gives those parts, the default is the official split.

The images are no longer at their public address, so they have to be fetched by hand; copies are around under the name
stanford_cars. Layout, as torchvision's `StanfordCars` reads it: `root/stanford_cars/` with `devkit/cars_meta.mat`,
`devkit/cars_train_annos.mat`, `cars_test_annos_withlabels.mat`, `cars_train/*.jpg`, `cars_test/*.jpg`; or that folder
itself as root. Some copies have the list of the test images in devkit/, which is accepted. Class ids are those of the
lists less one, class names those of `cars_meta.mat`. The .mat files are read by scipy, which executes nothing in them.

Cost: about 1.9 GB on disk; building the stream takes 1 s, no image is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avalanche_firn.benchmarks.downloads import default_root, download_words, locate
from avalanche_firn.benchmarks.image_files import check_transforms
from avalanche_firn.benchmarks.listed import listed_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

CARS196_IMAGES = {"train": 8_144, "test": 8_041}
CARS196_CLASSES = 196
CARS196_TASKS = (20,) * 9 + (16,)  # exps/slca_cars.json: 20 at first and 20 more each time

_INNER = "stanford_cars"
_LAYOUT = (
    f"accepted: root/{_INNER}/ with devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, "
    "cars_train/ and cars_test/, or that folder itself as root"
)


def cars196_stream(
    root: str | Path | None = None,
    *,
    tasks: int | Sequence[int] = CARS196_TASKS,
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    swap_train_test: bool = False,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    download: bool = False,
    complete: bool = True,
    name: str | None = None,
) -> Stream:
    """Split Cars-196 with the official parts.

    Args:
        root: a folder in the layout above; None: `~/.avalanche/data/stanford_cars`.
        tasks: number of tasks or their class counts.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order, seed: class ids or names in order of appearance, or the seed of a random order
            (`streams.class_order`; the papers' 1993 and others).
        swap_train_test: True trains on the official test images and tests on the training images, see above.
        validation_fraction: part of each class's training images that becomes the validation stream; 0: none.
        split_seed: of that part.
        download: can't be done; True with the images absent raises an error that says how to get them.
        complete: True requires the 8,144 and 8,041 images of 196 classes. False takes shorter lists, for trials.
        name: of the stream; "cars196" by default, "cars196-swapped" with swapped parts.

    Raises:
        StreamError: no such folder, a list that is absent or of another format (such as the one of the test images
            without labels), images that are missing, or an order, sizes or fraction that don't fit.
    """
    check_transforms(train_transform, eval_transform)
    root = default_root(_INNER) if root is None else Path(root).expanduser()
    folder = locate(root, _INNER, lambda path: (path / "devkit").is_dir())
    if folder is None:
        if download:
            words = download_words(
                "Stanford Cars",
                reason="its public address is dead",
                source="copies are linked in issue 7545 of pytorch/vision",
                place=root / _INNER,
            )
            raise StreamError(f"{words}; {_LAYOUT}")
        raise StreamError(f"Stanford Cars is not in {root}; {_LAYOUT}; it has to be fetched by hand")
    class_names = tuple(str(label) for label in _read(folder / "devkit" / "cars_meta.mat", "class_names"))
    labelled = "cars_test_annos_withlabels.mat"
    in_devkit = not (folder / labelled).exists() and (folder / "devkit" / labelled).exists()
    lists = {"train": folder / "devkit" / "cars_train_annos.mat"}
    lists["test"] = folder / "devkit" / labelled if in_devkit else folder / labelled
    files = {part: _read_annotations(path, f"cars_{part}", len(class_names)) for part, path in lists.items()}
    found = {part: len(listed) for part, listed in files.items()}
    if complete and (found, len(class_names)) != (CARS196_IMAGES, CARS196_CLASSES):
        raise StreamError(
            f"{folder} lists {found} images of {len(class_names)} classes, not {CARS196_IMAGES} of {CARS196_CLASSES}; "
            "get the lists again; complete=False takes what is listed"
        )
    if swap_train_test:
        files = {"train": files["test"], "test": files["train"]}
    return listed_stream(
        name or ("cars196-swapped" if swap_train_test else "cars196"),
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


def _read(path: Path, variable: str) -> Any:
    """A variable of a .mat file as an array of one dimension."""
    from scipy.io import loadmat

    if not path.is_file():
        raise StreamError(f"{path} is absent; {_LAYOUT}")
    try:
        content = loadmat(path, squeeze_me=True, variable_names=[variable])
    except Exception as error:  # the reader's errors have no common class
        raise StreamError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if variable not in content:
        raise StreamError(f"{path} has no variable {variable!r}; accepted: the file of that name of the data set")
    return np.atleast_1d(content[variable])


def _read_annotations(path: Path, images: str, classes: int) -> list[tuple[str, int]]:
    """(path relative to the folder, class id) in the order of the file."""
    rows = _read(path, "annotations")
    absent = sorted({"fname", "class"} - set(rows.dtype.names or ()))
    if absent:
        hint = "" if path.name.startswith("cars_train") else "; the test list with labels is needed"
        raise StreamError(f"{path} has no field {absent[0]!r}; accepted: annotations with fname and class{hint}")
    listed = []
    for fname, label in zip(rows["fname"].tolist(), rows["class"].tolist(), strict=True):
        if not isinstance(fname, str) or not fname or isinstance(label, bool) or not isinstance(label, int):
            raise StreamError(f"{path} has the row {fname!r}, {label!r}; accepted: a file name and a class number")
        if not 1 <= label <= classes:
            raise StreamError(f"{path} gives {fname!r} the class {label}; accepted: 1..{classes}")
        listed.append((f"{images}/{fname}", label - 1))
    return listed


__all__ = ["CARS196_CLASSES", "CARS196_IMAGES", "CARS196_TASKS", "cars196_stream"]
