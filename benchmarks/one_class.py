"""Streams with one class per experience, from images in memory; two sets of classes that must share nothing.

The setting of the zapping papers (arXiv 2310.07996, 2507.01559): a network meets hundreds of classes one by one, with a
few images of each. Sharing is looked for by the pixels and not by file names, because the small subsets of Omniglot
overlap, and copies of a file have other names.

Cost: looking for shared images hashes every image, 1 to 2 s per GB; building the stream takes 1 ms per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.streams import Digest, Stream, StreamError, Transform, build_stream, resolve_class_order


def one_class_stream(
    train: ClassImages,
    test: ClassImages,
    *,
    valid: ClassImages | None = None,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    name: str = "one-class",
    rgb: bool = False,
    allow_shared_images: bool = False,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """A class-incremental stream with one class per experience.

    Args:
        train, test, valid: parts with the same classes, such as those of `ClassImages.split`.
        class_order: class ids or names in order of appearance; None: the natural order, or the one of `seed`.
        seed: makes the class order (`streams.class_order`).
        name: of the stream.
        rgb: see `ClassImages.dataset`.
        allow_shared_images: True accepts an image that is in two parts, or two files with the same pixels.
        train_transform, eval_transform: further transforms of the normalised float32 tensor (C, H, W).

    Raises:
        StreamError: parts with other classes, sizes or normalisation, an order that does not fit, or an image in two
            parts.
    """
    parts = {"train": train, "test": test} if valid is None else {"train": train, "valid": valid, "test": test}
    for part, data in parts.items():
        for attribute in ("class_names", "mean", "std"):
            if getattr(data, attribute) != getattr(train, attribute):
                raise StreamError(f"{name}: {attribute} of {part} and train differ; accepted: parts of one data set")
        if data.images.shape[1:] != train.images.shape[1:]:
            shapes = tuple(data.images.shape[1:]), tuple(train.images.shape[1:])
            raise StreamError(f"{name}: images of {part} are {shapes[0]} and of train {shapes[1]}; accepted: one shape")
    order = resolve_class_order(train.class_names, class_order, seed)
    if not allow_shared_images:
        _refuse_shared_images(name, parts, "allow_shared_images=True keeps them")
    digest = Digest()
    for part, data in parts.items():
        digest.add(part, data.fingerprint())
    return build_stream(
        name,
        **{part: data.dataset(rgb=rgb) for part, data in parts.items()},
        class_order=order,
        task_sizes=(1,) * train.num_classes,
        class_names=train.class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def split_stream(
    images: ClassImages,
    *,
    name: str,
    train_per_class: int,
    test_per_class: int,
    valid_per_class: int = 0,
    split_seed: int = 0,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    rgb: bool = False,
    allow_shared_images: bool = False,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """`one_class_stream` over a seeded split of the images of every class.

    Args:
        images: the classes of the stream.
        train_per_class, test_per_class: images of every class, at least 1.
        valid_per_class: the same for a validation stream; 0: there is none. What a class has beyond the sum of the
            three is left out.
        split_seed: of the split (`ClassImages.split`), independent of the order of the classes. The test images are
            drawn first, the training images last: they do not change with the number of training images.
        name, class_order, seed, rgb, allow_shared_images, train_transform, eval_transform: see `one_class_stream`.

    Raises:
        StreamError: numbers out of range, a class with too few images; see also `one_class_stream`.
    """
    check_parts(train_per_class, test_per_class, valid_per_class)
    sizes = [size for size in (test_per_class, valid_per_class, train_per_class) if size]
    test, *middle, train = images.split(*sizes, seed=split_seed, drop_rest=True)
    return one_class_stream(
        train,
        test,
        valid=middle[0] if middle else None,
        class_order=class_order,
        seed=seed,
        name=name,
        rgb=rgb,
        allow_shared_images=allow_shared_images,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def check_parts(train_per_class: int, test_per_class: int, valid_per_class: int) -> None:
    """Refuses (StreamError) numbers of images per class that `split_stream` can't take, before images are read."""
    given = {"train_per_class": train_per_class, "test_per_class": test_per_class, "valid_per_class": valid_per_class}
    for field, value in given.items():
        least = 0 if field == "valid_per_class" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise StreamError(f"{field} is {value!r}; accepted: images per class, at least {least}")


def check_disjoint(first: ClassImages, second: ClassImages) -> None:
    """Refuses two sets, such as those of pre-training and of transfer, that share a class name or an image.

    Images are compared as they are held: the same file read at two sizes is not found by its pixels.

    Raises:
        StreamError: a class name or the pixels of an image are in both.
    """
    common = sorted(set(first.class_names) & set(second.class_names))
    if common:
        raise StreamError(f"{len(common)} class(es) are in both sets, such as {common[0]!r}; accepted: none")
    _refuse_shared_images("the two sets", {"first": first, "second": second}, "leave one of the classes out")


def _refuse_shared_images(name: str, parts: Mapping[str, ClassImages], hint: str) -> None:
    seen: dict[bytes, tuple[str, str]] = {}
    shared: list[str] = []
    for part, data in parts.items():
        hashes = data.image_hashes()
        places = [(part, data.class_names[c]) for c in data.labels.tolist()]
        for value, place in zip(hashes, places, strict=True):
            if value in seen:
                shared.append(f"{seen[value][1]!r} ({seen[value][0]}) and {place[1]!r} ({place[0]})")
        seen.update(zip(hashes, places, strict=True))  # after the look-ups: repeats within a part are its own affair
    if shared:
        raise StreamError(f"{name}: {len(shared)} image(s) are in two parts, such as one of {shared[0]}; {hint}")


__all__ = ["check_disjoint", "check_parts", "one_class_stream", "split_stream"]
