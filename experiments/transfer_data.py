"""The classes of a transfer experiment: to pre-train on, to choose rates on, to transfer to. No image is in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.digits import digit_classes
from avalanche_firn.benchmarks.mini_imagenet import mini_imagenet_classes
from avalanche_firn.benchmarks.omniglot import omniglot_classes
from avalanche_firn.benchmarks.omnimage import omnimage_classes, read_test_classes
from avalanche_firn.benchmarks.one_class import check_disjoint
from avalanche_firn.benchmarks.streams import Digest
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.transfer_sections import DigitClassesConfig, MiniImageNetConfig, OmniglotConfig
from avalanche_firn.strategies.transfer_start import TransferTask

__all__ = ["TransferData", "build_data", "random_data", "tasks_of"]


@dataclass(frozen=True)
class TransferData:
    """Images in memory; the parts of a pair have the same classes and no image in common."""

    pretrain: ClassImages
    held_out: ClassImages
    """Of the pre-training classes, never trained on."""
    validation: tuple[ClassImages, ClassImages] | None
    """To learn from and to test on, of classes that are in neither of the others."""
    transfer: tuple[ClassImages, ClassImages]
    fingerprint: str

    def __str__(self) -> str:
        left = self.validation[0].num_classes if self.validation is not None else 0
        shape = "x".join(map(str, self.pretrain.images.shape[1:]))
        learn, test = self.transfer
        return (
            f"{self.pretrain.num_classes} classes to pre-train on ({len(self.pretrain)} images, {len(self.held_out)} "
            f"held out), {left} to choose rates on, {learn.num_classes} to transfer to ({len(learn)} images to learn, "
            f"{len(test)} to test), {shape} pixels"
        )


def build_data(section: Any) -> TransferData:
    """Read and split the data of a configuration.

    Raises:
        ConfigError: no data, too few images or classes, classes or images in two parts.
    """
    try:
        if isinstance(section, DigitClassesConfig):
            digits = digit_classes()
            parts = [digits.take([str(d) for d in chosen]) for chosen in (section.pretrain, section.transfer)]
            pretrain, transfer = parts
            validation = digits.take([str(d) for d in section.validation]) if section.validation else None
        elif isinstance(section, MiniImageNetConfig):
            pretrain, validation, transfer = (
                mini_imagenet_classes(section.root, part) for part in ("train", "val", "test")
            )
        else:
            pretrain, transfer = _omniglot(section) if isinstance(section, OmniglotConfig) else _omnimage(section)
            pretrain, validation = _left_out(pretrain, section.validation_classes, section.split_seed)
        others = [transfer] if validation is None else [transfer, validation]
        for other in others:
            check_disjoint(pretrain, other)
        if validation is not None:
            check_disjoint(validation, transfer)
        learn = (section.train_images, section.test_images)
        train, held_out = pretrain.split(
            section.pretrain_images, section.held_out_images, seed=section.split_seed, drop_rest=True
        )
        pairs = [
            None if c is None else c.split(*learn, seed=section.split_seed, drop_rest=True)
            for c in (validation, transfer)
        ]
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(Problem("data", str(error) or type(error).__name__)) from error
    digest = Digest()
    for part in (train, held_out, *(image for pair in pairs if pair is not None for image in pair)):
        digest.add("part", part.fingerprint().encode())
    return TransferData(train, held_out, pairs[0], pairs[1], digest.hexdigest())  # type: ignore[arg-type]


def _omniglot(section: OmniglotConfig) -> tuple[ClassImages, ClassImages]:
    first, second = (
        omniglot_classes(section.root, part.part, alphabets=part.alphabets, download=section.download)
        for part in (section.pretrain, section.transfer)
    )
    return first, second


def _omnimage(section: Any) -> tuple[ClassImages, ClassImages]:
    names = read_test_classes(section.test_class_list)
    first, second = (
        omnimage_classes(section.root, part, test_classes=names, images_per_class=section.images_per_class)
        for part in ("train", "test")
    )
    return first, second


def _left_out(classes: ClassImages, count: int, seed: int) -> tuple[ClassImages, ClassImages | None]:
    """`count` classes, drawn, taken out."""
    if not count:
        return classes, None
    if count >= classes.num_classes:
        accepted = f"0 to {classes.num_classes - 1}"
        raise ConfigError(Problem("data.validation_classes", f"{count} of {classes.num_classes} classes", accepted))
    drawn = np.sort(np.random.RandomState(seed).permutation(classes.num_classes)[:count])
    rest = np.setdiff1d(np.arange(classes.num_classes), drawn)
    return classes.take(rest.tolist()), classes.take(drawn.tolist())


def tasks_of(pair: tuple[ClassImages, ClassImages], device: torch.device) -> list[TransferTask]:
    """One task per class, normalised pixels on the device."""
    found = []
    parts = [
        (part.pixels(device=device).split(part.counts.tolist()), part.labels.to(device).split(part.counts.tolist()))
        for part in pair
    ]
    for images, labels, test_images, test_labels in zip(*parts[0], *parts[1], strict=True):
        found.append(TransferTask(images, labels, test_images, test_labels))
    return found


def random_data(shape: tuple[int, int, int], classes: int) -> TransferData:
    """Random images of the true shape, for a dry run: `classes` to pre-train on, four of both other kinds."""

    def part(kind: str, count: int, each: int, seed: int) -> ClassImages:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (count * each, *shape), generator=generator, dtype=torch.uint8)
        return ClassImages(
            images, torch.arange(count).repeat_interleave(each), tuple(f"{kind}-{i}" for i in range(count))
        )

    validation, transfer = ((part(kind, 4, 3, seed), part(kind, 4, 2, seed + 1)) for kind, seed in (("v", 2), ("t", 4)))
    return TransferData(part("p", classes, 8, 0), part("p", classes, 2, 1), validation, transfer, "random")
