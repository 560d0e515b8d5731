"""A stream from any folder of class folders.

Accepted layouts: `root/CLASS/image`, or `root/train/CLASS/image` with `root/test/CLASS/image` and perhaps one of
`root/val`, `root/valid`, `root/validation`. What is not there as a folder is drawn from the training images of each
class by a seeded permutation. Class ids are the positions of the folder names sorted as text ("10" before "2").

Nothing is skipped in silence (see `image_files`), and train and test must hold the same classes.

Cost: see `image_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from avalanche_firn.benchmarks.image_files import (
    ImageFiles,
    check_transforms,
    draw_split,
    find_parts,
    list_classes,
    read_parts,
)
from avalanche_firn.benchmarks.streams import (
    Digest,
    Stream,
    StreamError,
    Transform,
    build_stream,
    resolve_class_order,
    task_sizes,
)


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
    check_transforms(train_transform, eval_transform)
    root = Path(root)
    folders = find_parts(root)
    listings = {part: list_classes(folder) for part, folder in folders.items()}
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
    split = draw_split(
        listings, ids, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=split_seed
    )
    if "test" not in listings and not len(split.test):
        raise StreamError(f"{root} has no folder test and test_fraction is 0; accepted: one of both")
    total = sum(len(paths) for listing in listings.values() for paths in listing.values())
    with tqdm(total=total, desc=f"checking {root.name}", unit="file", disable=None, leave=False) as progress:
        parts = read_parts(listings, ids, split, progress)
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


__all__ = ["ImageFiles", "folder_stream"]
