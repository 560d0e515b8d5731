"""Many classes of few images, held in memory: what pre-training and one-class-per-experience streams are cut from.

`ClassImages` is one tensor of 8-bit images sorted by class. Everything is a choice of rows: a part of the classes
(`take`), a seeded split inside every class (`split`), normalised pixels of some rows on a device (`pixels`), a data set
for a loader (`dataset`). `class_files` reads them from folders, `one_class` makes streams of them.

For the zapping papers (arXiv 2310.07996, 2507.01559). Their released code lists folders in the order of the file
system for Omniglot, and splits all classes with one generator. Here both are sorted and seeded by class name, so that a
class is split in the same way on every machine, whatever other classes are there.

Cost: one byte per value, 25 MB for Omniglot at 28 pixels, 1.3 GB for mini-ImageNet at 84.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from avalanche_firn.benchmarks.streams import Digest, StreamError
from avalanche_firn.benchmarks.tensors import TensorImageDataset


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images of K classes, sorted by class and, within a class, by file name.

    Attributes:
        images: (N, C, H, W) uint8, C = 1 or 3.
        labels: (N,) int64 in 0..K-1, never falling, every class at least once, on the device of the images.
        class_names: (K,) different names.
        mean, std: (C,) or (1,), of pixels in 0..1, for `pixels` and `dataset`; (0,) and (1,) leave pixels at 0..1.

    Raises:
        StreamError: a field that is not of this form.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    _counts: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
            raise StreamError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; accepted: uint8 (N, 1 or 3, H, W), N >= 1"
            )
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise StreamError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; accepted: int64 ({len(images)},)"
            )
        if labels.device != images.device:
            raise StreamError(f"labels are on {labels.device} and images on {images.device}; accepted: one device")
        names = tuple(self.class_names)
        repeated = [name for name, times in Counter(names).items() if times > 1]
        if repeated:
            raise StreamError(f"class_names holds {repeated[0]!r} {names.count(repeated[0])} times; accepted: once")
        present, counts = torch.unique_consecutive(labels, return_counts=True)
        if present.tolist() != list(range(len(names))):
            raise StreamError(
                f"labels are not 0..{len(names) - 1} in this order, each at least once; accepted: images sorted by "
                f"class, and the {len(names)} classes of class_names"
            )
        if images.stride() != _row_major(images.shape):
            # grey images read as (N, H, W, 1) also pass as channels_last, whose kernels are slower on a CPU
            object.__setattr__(
                self, "images", torch.empty(images.shape, dtype=images.dtype, device=images.device).copy_(images)
            )
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "_counts", counts)
        for name in ("mean", "std"):
            object.__setattr__(self, name, per_channel(name, getattr(self, name), images.shape[1]))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @property
    def counts(self) -> Tensor:
        """Images of each class, (K,) int64."""
        return self._counts.clone()

    def to(self, device: torch.device | str) -> ClassImages:
        """The same images on another device, where `pixels` is a gather without a copy from the host."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, classes: Sequence[int] | Sequence[str] | Tensor) -> ClassImages:
        """Some classes, by id or name, with new labels 0..len-1 in the order given.

        Raises:
            StreamError: no class, an unknown class, or one that is there twice.
        """
        if isinstance(classes, Tensor):
            classes = classes.tolist()
        if isinstance(classes, str) or len(classes) == 0:
            raise StreamError(f"classes is {classes!r}; accepted: a sequence of class ids or names, at least one")
        ids = {name: c for c, name in enumerate(self.class_names)}
        found = [ids.get(c) if isinstance(c, str) else _class_id(c, self.num_classes) for c in classes]
        unknown = [c for c, known in zip(classes, found, strict=True) if known is None]
        if unknown:
            raise StreamError(
                f"class {unknown[0]!r} is unknown; accepted: ids 0..{self.num_classes - 1} or names such as "
                f"{self.class_names[0]!r}"
            )
        chosen = [c for c in found if c is not None]
        repeated = [c for c, times in Counter(chosen).items() if times > 1]
        if repeated:
            raise StreamError(f"class {self.class_names[repeated[0]]!r} is given twice; accepted: each class once")
        order = torch.tensor(chosen, device=self.labels.device)
        counts = self.counts
        firsts, sizes = (counts.cumsum(0) - counts)[order], counts[order]
        total = int(sizes.sum())
        # row r of the result is row r - (rows before its class here) + (rows before its class there)
        shift = (firsts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes, output_size=total)
        labels = torch.arange(len(order), device=order.device).repeat_interleave(sizes, output_size=total)
        rows = torch.arange(total, device=order.device) + shift
        names = tuple(self.class_names[c] for c in chosen)
        return replace(self, images=self.images[rows], labels=labels, class_names=names)

    def split(self, *sizes: int, seed: int, drop_rest: bool = False) -> tuple[ClassImages, ...]:
        """Parts with so many images of every class; every part keeps all classes and the order of the files.

        The permutation of a class depends on the seed, its name and its number of images, so that it is the same in any
        selection of classes; `take` and `split` can change places.

        Args:
            sizes: images per class of each part, at least 1; one of them may be -1: the rest, at least one image.
            seed: of the permutations, 0..2**32-1.
            drop_rest: whether a class may have more images than the sizes sum to. They are in no part then.

        Raises:
            StreamError: sizes or a seed out of range, a class with too few images, or with more without -1 or
                `drop_rest`. The class is named.
        """
        if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n == 0 or n < -1 for n in sizes):
            raise StreamError(
                f"sizes are {sizes}; accepted: images per class of each part, at least 1, or -1: the rest"
            )
        rest = sizes.count(-1)
        if rest > 1 or (rest and drop_rest):
            raise StreamError(f"sizes are {sizes} with drop_rest={drop_rest}; accepted: one -1, or drop_rest=True")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
            raise StreamError(f"seed of the split is {seed!r}; accepted: 0..2**32-1")
        needed = sum(n for n in sizes if n > 0) + rest
        parts: list[list[np.ndarray]] = [[] for _ in sizes]
        first = 0
        for name, count in zip(self.class_names, self.counts.tolist(), strict=True):
            if count < needed or (count > needed and not rest and not drop_rest):
                hint = "" if count < needed else "; -1 takes the rest as a part, drop_rest=True leaves it out"
                raise StreamError(f"class {name!r} has {count} image(s); the sizes {sizes} need {needed}{hint}")
            order = first + _class_generator(seed, name).permutation(count)
            ends = np.cumsum([count - (needed - 1) if n < 0 else n for n in sizes])
            for part, block in zip(parts, np.split(order[: ends[-1]], ends[:-1]), strict=True):
                part.append(np.sort(block))
            first += count
        return tuple(self._rows(torch.from_numpy(np.concatenate(part))) for part in parts)

    def pixels(
        self,
        rows: Tensor | Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Normalised images (len(rows), C, H, W): `(image / 255 - mean) / std`.

        Args:
            rows: int64 indices; None: all.
            device: of the result; None: that of the images. The bytes travel, not the floats.
            dtype: of the result. float32 has the same bits as `dataset`; half types are rounded from float32.

        Raises:
            TypeError: a dtype that is not floating.
            StreamError: rows out of range (found on the CPU; on another device by the indexing itself).
        """
        if not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; accepted: a floating type")
        images = self.images
        if rows is not None:
            index = torch.as_tensor(rows, dtype=torch.int64)
            if (
                index.device.type == "cpu"
                and index.numel()
                and not -1 < int(index.min()) <= int(index.max()) < len(self)
            ):
                raise StreamError(f"rows are {int(index.min())}..{int(index.max())}; accepted: 0..{len(self) - 1}")
            images = images[index.to(images.device)]
        if device is not None:
            images = images.to(device)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = (torch.tensor(v, dtype=exact, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return torch.sub(images.to(exact), 255 * mean).div_(255 * std).to(dtype)

    def dataset(self, *, rgb: bool = False) -> TensorImageDataset:
        """A data set of (normalised image (C, H, W) float32, label), for Avalanche and for loaders.

        Args:
            rgb: True repeats a single channel to three, for a network that takes colour; else C stays as it is.
        """
        kind = TensorImageDataset if rgb or self.images.shape[1] == 3 else _GreyDataset
        return kind(self.images.cpu(), self.labels.tolist(), mean=self.mean, std=self.std, storage="uint8")

    def fingerprint(self) -> str:
        """SHA-256 over images, labels and class names, 64 hexadecimal digits."""
        digest = Digest()
        for name, images in zip(self.class_names, self.images.cpu().split(self.counts.tolist()), strict=True):
            digest.add(name, images.numpy())  # class by class: a digest of everything would copy everything
        return digest.hexdigest()

    def image_hashes(self) -> list[bytes]:
        """A hash of the pixels and the size of every image, 16 bytes each, in the order of the images."""
        shape = str(tuple(self.images.shape[1:])).encode()
        flat = self.images.cpu().flatten(1).numpy()
        return [hashlib.blake2b(row, digest_size=16, salt=shape[:16]).digest() for row in flat]

    def _rows(self, rows: Tensor) -> ClassImages:
        rows = rows.to(self.labels.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])


class _GreyDataset(TensorImageDataset):
    """A `TensorImageDataset` of uint8 storage that keeps the single channel it is given."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._mean: Tensor = self._mean[:1]
        self._std: Tensor = self._std[:1]


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor laid out in the order of its axes, also along axes of length 1."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _class_id(value: object, count: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < count:
        return None
    return int(value)


def _class_generator(seed: int, name: str) -> np.random.RandomState:
    # NumPy's legacy generator, as for class orders: its permutations are frozen. The name in place of the id makes the
    # split of a class the same in every selection of classes.
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    return np.random.RandomState([int(seed), *words.tolist()])


def per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """`mean` or `std`, checked: one finite figure or one per channel, and a `std` above 0."""
    accepted = f"accepted: one finite figure or {channels}, of pixels in 0..1" + (", above 0" if name == "std" else "")
    try:
        figures = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise StreamError(f"{name} is {values!r}; {accepted}") from error
    good = all(math.isfinite(v) and (v > 0 or name == "mean") for v in figures)
    if len(figures) not in (1, channels) or not good:
        raise StreamError(f"{name} is {values!r}; {accepted}")
    return figures


__all__ = ["ClassImages", "per_channel"]
