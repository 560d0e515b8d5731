"""The embedded stream: scikit-learn's handwritten digits as five tasks of two classes.

1,797 real scans of 8x8 pixels with 17 grey levels (the test part of UCI's optical recognition of handwritten digits),
shipped inside scikit-learn: nothing is downloaded. Images are scaled bilinearly to the size of the backbone, get three
equal channels, and stay in memory (21 MiB at 32 pixels). The split into train, validation and test is 60/20/20 per
class, made by our own seeded permutation: it depends neither on the scikit-learn version nor on the seed of a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from avalanche_firn.benchmarks.class_images import ClassImages
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
from avalanche_firn.benchmarks.tensors import TensorImageDataset

SPLIT_SEED = 0  # part of the benchmark's definition, never the seed of a run
VALIDATION_FRACTION = 0.2
TEST_FRACTION = 0.2
CLASS_NAMES = tuple(str(digit) for digit in range(10))


def digits_stream(
    *,
    image_size: int = 32,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    tasks: int | Sequence[int] = 5,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """The digits as a class-incremental stream.

    Args:
        image_size: height and width in pixels, at least 8; 32 is the embedded backbone's size.
        mean, std: normalisation of the image scaled to 0..1, from the backbone's data_config.
        tasks: number of tasks or their class counts, see `streams.task_sizes`.
        class_order: the ten digits in order of appearance; None takes the natural order, or the one of `seed`.
        seed: makes the class order (`streams.class_order`); the split does not depend on it.
        train_transform, eval_transform: further transforms of the normalised float32 tensor (3, H, W). None is right
            for most uses: flips and large crops change what a digit is.

    Returns:
        A stream with 1,079 training, 359 validation and 359 test images.

    Raises:
        StreamError: a size below 8, a class order or task sizes that do not fit ten classes, an invalid mean or std.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8:
        raise StreamError(f"image_size is {image_size!r}; accepted: an integer of at least 8, the size of the scans")
    order = resolve_class_order(CLASS_NAMES, class_order, seed)
    sizes = task_sizes(len(CLASS_NAMES), tasks)
    scans, labels = _load()
    split = stratified_split(
        labels, validation_fraction=VALIDATION_FRACTION, test_fraction=TEST_FRACTION, seed=SPLIT_SEED
    )
    images = _upscale(scans, image_size)
    digest = Digest()
    digest.add("digits", f"image_size={image_size}")
    datasets = {}
    for part, rows in split._asdict().items():
        digest.add(f"{part}/images", scans[rows])
        digest.add(f"{part}/labels", labels[rows])
        datasets[part] = TensorImageDataset(images[torch.from_numpy(rows)], labels[rows].tolist(), mean=mean, std=std)
    return build_stream(
        "digits",
        **datasets,
        class_order=order,
        task_sizes=sizes,
        class_names=CLASS_NAMES,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def digit_classes(size: int = 28) -> ClassImages:
    """All 1,797 digits as classes "0" to "9" in memory, grey (1, size, size), pixels in 0..1, not normalised.

    For pre-training on some digits and transfer to others, where nothing may be downloaded.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise StreamError(f"size is {size!r}; accepted: a number of pixels, at least 8")
    scans, labels = _load()
    order = np.argsort(labels, kind="stable")
    return ClassImages(_upscale(scans[order], size), torch.from_numpy(labels[order]), CLASS_NAMES)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Scans (1797, 8, 8) uint8 in 0..16 and labels (1797,) int64."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


def _upscale(scans: np.ndarray, size: int) -> torch.Tensor:
    """Grey images (N, 1, size, size) uint8 in 0..255, interpolated bilinearly, rounded to the nearest level."""
    grey = torch.from_numpy(scans).to(torch.float32).unsqueeze(1).mul_(255 / 16)
    if size != scans.shape[-1]:
        grey = functional.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    return grey.round_().to(torch.uint8)


__all__ = ["digit_classes", "digits_stream"]
