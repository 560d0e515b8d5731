"""From the section ``stream`` of a configuration to a stream: one builder per kind of section, in :data:`_BUILDERS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torchvision.transforms import Compose

from avalanche_firn.benchmarks import classic
from avalanche_firn.benchmarks.cars196 import cars196_stream
from avalanche_firn.benchmarks.cub200 import cub200_stream
from avalanche_firn.benchmarks.device_transforms import AsRGB
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.domainnet import domainnet_domain_stream, domainnet_stream
from avalanche_firn.benchmarks.domains import domain_folder_stream
from avalanche_firn.benchmarks.five_datasets import five_datasets_stream
from avalanche_firn.benchmarks.fmow import fmow_region_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.huggingface import huggingface_stream
from avalanche_firn.benchmarks.imagenet_r import imagenet_r_stream
from avalanche_firn.benchmarks.rotations import rotation_angles
from avalanche_firn.benchmarks.streams import Stream
from avalanche_firn.benchmarks.transforms import TransformPair, preset_transforms, timm_transforms
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.public_stream_sections import (
    Cars196StreamConfig,
    CUB200StreamConfig,
    DomainNetStreamConfig,
    FiveDatasetsStreamConfig,
    FMoWStreamConfig,
    HuggingFaceStreamConfig,
    ImageNetRStreamConfig,
)
from avalanche_firn.experiments.stream_sections import (
    AvalancheStreamConfig,
    DigitsStreamConfig,
    DomainFolderStreamConfig,
    FolderStreamConfig,
)
from avalanche_firn.plugins.run_errors import RunError

__all__ = ["as_config_error", "build_stream"]

Transforms = Mapping[str, Any]  # train_transform and eval_transform, as streams take them


_TERSE = (LookupError, AttributeError)  # their texts alone say little


@contextmanager
def as_config_error(path: str) -> Iterator[None]:
    """Errors of a builder become errors of the section at `path`.

    Builders call libraries with values that no schema of ours knows, and libraries raise what they like. What has
    nothing to do with values stays as it is: no memory left, whatever is a :class:`RunError`.
    """
    try:
        yield
    except (ConfigError, RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, AssertionError, *_TERSE) as error:
        told = str(error) or type(error).__name__
        if isinstance(error, _TERSE):
            told = f"{type(error).__name__}: {told}"
        raise ConfigError(Problem(path, told)) from error


def build_stream(config: Config, data_config: dict[str, Any], seed: int) -> Stream:
    """Build the stream of a run; `seed` makes the class order where the configuration says ``seeded``.

    Raises:
        ConfigError: no data, a file that is no image, an impossible split.
    """
    section = config.stream
    with as_config_error("stream"):
        if isinstance(section, DigitsStreamConfig):
            return digits_stream(
                image_size=_image_size(data_config),
                mean=data_config["mean"],
                std=data_config["std"],
                tasks=section.tasks,
                **_order(section.class_order, seed),
            )
        pair = _transforms(section, data_config)
        if isinstance(section, AvalancheStreamConfig):
            return _classic(section, pair, seed)
        assert pair is not None
        stream = _BUILDERS[type(section)](section, {"train_transform": pair.train, "eval_transform": pair.eval}, seed)
        return _counted(stream, getattr(section, "classes", None))


# Fields that mean to a builder what they mean in its section, under the same name.
_SHARED = ("tasks", "validation_fraction", "test_fraction", "split_seed", "complete", "download")


def _shared(section: Any, transforms: Transforms, seed: int, *but: str) -> dict[str, Any]:
    """What most builders take: transforms, class order, and the fields of the section among `_SHARED` without `but`."""
    fields = {name: getattr(section, name) for name in _SHARED if hasattr(section, name) and name not in but}
    order = {} if "class_order" in but else _order(getattr(section, "class_order", "natural"), seed)
    return {**fields, **transforms, **order}


def _folder(section: FolderStreamConfig, transforms: Transforms, seed: int) -> Stream:
    return folder_stream(section.root, **_shared(section, transforms, seed))


def _domains(section: DomainFolderStreamConfig, transforms: Transforms, seed: int) -> Stream:
    return domain_folder_stream(section.root, domains=section.domain_order, **_shared(section, transforms, seed))


def _imagenet_r(section: ImageNetRStreamConfig, transforms: Transforms, seed: int) -> Stream:
    files = None if section.split_files is None else (section.split_files[0], section.split_files[1])
    return imagenet_r_stream(section.root, split_files=files, **_shared(section, transforms, seed))


def _cub200(section: CUB200StreamConfig, transforms: Transforms, seed: int) -> Stream:
    return cub200_stream(section.root, **_shared(section, transforms, seed))


def _cars196(section: Cars196StreamConfig, transforms: Transforms, seed: int) -> Stream:
    swap = section.swap_train_test
    return cars196_stream(section.root, swap_train_test=swap, **_shared(section, transforms, seed))


def _domainnet(section: DomainNetStreamConfig, transforms: Transforms, seed: int) -> Stream:
    chosen: dict[str, Any] = {} if section.domains is None else {"domains": section.domains}
    if section.scenario == "domains":
        shared = _shared(section, transforms, seed, "tasks", "class_order")
        return domainnet_domain_stream(section.root, **chosen, **shared)
    return domainnet_stream(section.root, **chosen, **_shared(section, transforms, seed))


def _five_datasets(section: FiveDatasetsStreamConfig, transforms: Transforms, seed: int) -> Stream:
    return five_datasets_stream(section.root, datasets=section.datasets, **_shared(section, transforms, seed))


def _fmow(section: FMoWStreamConfig, transforms: Transforms, seed: int) -> Stream:
    shared = _shared(section, transforms, seed)
    return fmow_region_stream(section.root, regions=section.regions, until_year=section.until_year, **shared)


def _huggingface(section: HuggingFaceStreamConfig, transforms: Transforms, seed: int) -> Stream:
    own = ("config", "revision", "image", "label", "train", "test", "validation")
    chosen: dict[str, Any] = {name: getattr(section, name) for name in own}
    return huggingface_stream(section.dataset, **chosen, **_shared(section, transforms, seed))


_BUILDERS: dict[type[Any], Callable[[Any, Transforms, int], Stream]] = {
    FolderStreamConfig: _folder,
    DomainFolderStreamConfig: _domains,
    ImageNetRStreamConfig: _imagenet_r,
    CUB200StreamConfig: _cub200,
    Cars196StreamConfig: _cars196,
    DomainNetStreamConfig: _domainnet,
    FiveDatasetsStreamConfig: _five_datasets,
    FMoWStreamConfig: _fmow,
    HuggingFaceStreamConfig: _huggingface,
}


def _counted(stream: Stream, classes: int | None) -> Stream:
    """`stream`, whose number of classes must be the declared one, if one is declared."""
    if classes not in (None, stream.num_classes):
        reason = f"{classes}, but the data has {stream.num_classes} classes"
        raise ConfigError(Problem("stream.classes", reason, f"{stream.num_classes} or null"))
    return stream


def _order(order: Any, seed: int) -> dict[str, Any]:
    if order == "seeded":
        return {"seed": seed}
    return {} if order == "natural" else {"class_order": order}


def _image_size(data_config: dict[str, Any]) -> int:
    channels, height, width = data_config["input_size"]
    if channels != 3 or height != width:
        accepted = "a backbone for square images of three channels"
        raise ConfigError(Problem("backbone", f"takes images of {channels}x{height}x{width}", accepted))
    return int(height)


def _transforms(section: Any, data_config: dict[str, Any]) -> TransformPair | None:
    if section.transforms == "own":
        return None
    if section.transforms == "backbone":
        return timm_transforms(data_config, augment=section.augment)
    return preset_transforms(section.transforms)


def _classic(section: AvalancheStreamConfig, pair: TransformPair | None, seed: int) -> Stream:
    arguments = dict(section.arguments)
    known = classic.avalanche_benchmarks()
    if section.benchmark in known:
        import avalanche.benchmarks.classic as benchmarks

        accepted = inspect.signature(getattr(benchmarks, section.benchmark)).parameters
        if "seed" in accepted and not {"seed", "fixed_class_order"} & set(arguments):
            arguments["seed"] = seed
        if section.benchmark == "RotatedMNIST" and "n_experiences" in arguments and "rotations_list" not in arguments:
            arguments["rotations_list"] = rotation_angles(arguments["n_experiences"], arguments.get("seed", seed))
        if pair is not None:
            # Avalanche's data sets have grey images too, and its MNIST tensors
            arguments |= {
                "train_transform": Compose([AsRGB(), pair.train]),
                "eval_transform": Compose([AsRGB(), pair.eval]),
            }
    return classic.avalanche_stream(
        section.benchmark,
        validation_fraction=section.validation_fraction,
        split_seed=section.split_seed,
        first_experiences=section.first_experiences,
        **arguments,
    )
