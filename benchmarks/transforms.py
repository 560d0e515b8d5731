"""Image transforms: from a backbone's data configuration, and the papers' own as named presets.

Both give a pair of callables from an RGB PIL image to a normalised float32 tensor (3, H, W), for
`folder_stream(..., train_transform=pair.train, eval_transform=pair.eval)`. Random ones draw from the global generators
of torch and Python, as torchvision and timm do; a checkpoint has to keep both.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from avalanche_firn.benchmarks.streams import StreamError, Transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # SLCA code, CIFAR-100
UCL_MEAN, UCL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)  # CIFAR-10's, for every data set of that code
CO2L_CIFAR_MEAN, CO2L_CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # Co2L code
CO2L_TINY_MEAN, CO2L_TINY_STD = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)  # Co2L code
_REQUIRED = ("input_size", "interpolation", "mean", "std")
_OPTIONAL = ("crop_pct", "crop_mode")


class TransformPair(NamedTuple):
    """Transforms for training and for evaluation, each from an RGB PIL image to a float32 tensor (3, H, W).

    One preset gives a single grey channel: "co2l_digits".
    """

    train: Transform
    eval: Transform


def timm_transforms(data_config: Mapping[str, Any], *, augment: bool = True, **options: Any) -> TransformPair:
    """Transforms that fit a timm backbone.

    Args:
        data_config: what `timm.data.resolve_model_data_config(model)` returns; size, interpolation, mean, std and the
            evaluation crop are taken from it.
        augment: whether training images are augmented by timm's ImageNet recipe (random resized crop of 8-100 %, flip,
            colour jitter 0.4); False uses the evaluation transform for training too.
        options: further arguments of `timm.data.create_transform` for training, such as scale, hflip, color_jitter,
            re_prob, auto_augment.

    Raises:
        StreamError: a configuration without a required key or not for three channels, an unknown option, or options
            without augmentation.
    """
    absent = [key for key in _REQUIRED if key not in data_config]
    if absent:
        raise StreamError(
            f"data_config lacks {', '.join(absent)}; accepted: timm.data.resolve_model_data_config(model)"
        )
    config = {key: data_config[key] for key in (*_REQUIRED, *_OPTIONAL) if key in data_config}
    size = config["input_size"]
    if isinstance(size, (tuple, list)) and len(size) == 3 and size[0] != 3:
        raise StreamError(f"data_config input_size is {tuple(size)}; accepted: three channels, images are read as RGB")
    free = set(inspect.signature(create_transform).parameters) - {*_REQUIRED, *_OPTIONAL, "is_training"}
    for option in options:
        if option not in free:
            raise StreamError(f"transform option {option!r} is unknown{_suggest(option, sorted(free))}")
    evaluation = create_transform(**config, is_training=False)
    if not augment:
        if options:
            raise StreamError(f"options {sorted(options)} are for augmentation, which is off (augment=False)")
        return TransformPair(evaluation, evaluation)
    return TransformPair(create_transform(**config, is_training=True, **options), evaluation)


def preset_transforms(name: str) -> TransformPair:
    """The transforms of a paper: one of `TRANSFORM_PRESETS`.

    "slca_cifar", "slca_imagenet_r", "slca_cub", "slca_cars": SLCA and SLCA++, released code (GengDavid/SLCA), 224
    pixels. "ucl_cifar", 32 pixels, and "ucl_tiny", 64 pixels: released code of the protocol on sequential CIFAR-10,
    CIFAR-100 and TinyImageNet (divyam3897/UCL, `augmentations/simsiam_aug.py` with its option `cl_default`; its first
    release has a random resized crop of 20-100 % in place of the padded crop). Images of another size are resized
    first, bilinearly, which that code doesn't need. "lorac", 224 pixels, in 0..1 and not normalised: released code of
    LoRAC-IPC (learninginvision/LoRAC-IPC), which has "slca_cifar" for CIFAR-100 with the original ImageNet-21k weights.
    "co2l_cifar", 32 pixels, "co2l_tiny", 64, and "co2l_digits", 28 and one grey channel in 0..1: released code of Co2L
    (chaht01/Co2L). These don't augment, training included: views are drawn later, on the device, by
    `ContrastiveAugmentation`. Other sizes are resized bilinearly.

    Raises:
        StreamError: unknown name; the nearest ones are listed.
    """
    if name not in TRANSFORM_PRESETS:
        raise StreamError(f"transform preset {name!r} is unknown{_suggest(name, list(TRANSFORM_PRESETS))}")
    return TRANSFORM_PRESETS[name]()


def _tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


def _centre_crop() -> list[Any]:
    return [transforms.Resize(256, interpolation=InterpolationMode.BICUBIC), transforms.CenterCrop(224)]


def _slca(steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> TransformPair:
    return TransformPair(
        transforms.Compose([*steps, *_tensor(mean, std)]), transforms.Compose([*_centre_crop(), *_tensor(mean, std)])
    )


def _random_crop() -> list[Any]:
    return [
        transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
    ]


def _slca_cifar() -> TransformPair:
    return _slca([*_random_crop(), transforms.ColorJitter(brightness=63 / 255)], CIFAR_MEAN, CIFAR_STD)


def _slca_imagenet_r() -> TransformPair:
    return _slca(_random_crop(), IMAGENET_MEAN, IMAGENET_STD)


def _slca_fine_grained() -> TransformPair:
    steps = [
        transforms.Resize((300, 300), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomCrop(224),
        transforms.RandomHorizontalFlip(),
    ]
    return _slca(steps, IMAGENET_MEAN, IMAGENET_STD)


def _lorac() -> TransformPair:
    # bilinear while training, as torchvision's default; the weights' own normalisation is left out, as in that code
    steps = [transforms.RandomResizedCrop(224, scale=(0.05, 1.0)), transforms.RandomHorizontalFlip()]
    return TransformPair(
        transforms.Compose([*steps, transforms.ToTensor()]),
        transforms.Compose([*_centre_crop(), transforms.ToTensor()]),
    )


def _ucl(size: int, blur: bool) -> TransformPair:
    native = transforms.Resize((size, size))  # leaves images of that size as they are
    steps = [
        transforms.RandomCrop(size, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(transforms.RandomApply([transforms.GaussianBlur(size // 20 * 2 + 1, sigma=(0.1, 2.0))], p=0.5))
    tensor = _tensor(UCL_MEAN, UCL_STD)
    return TransformPair(transforms.Compose([native, *steps, *tensor]), transforms.Compose([native, *tensor]))


def _ucl_cifar() -> TransformPair:
    return _ucl(32, blur=False)


def _ucl_tiny() -> TransformPair:
    return _ucl(64, blur=True)


def _co2l(size: int, *steps: Any) -> TransformPair:
    native = transforms.Resize((size, size))
    fixed = transforms.Compose([native, *steps])
    return TransformPair(fixed, fixed)


def _co2l_cifar() -> TransformPair:
    return _co2l(32, *_tensor(CO2L_CIFAR_MEAN, CO2L_CIFAR_STD))


def _co2l_tiny() -> TransformPair:
    return _co2l(64, *_tensor(CO2L_TINY_MEAN, CO2L_TINY_STD))


def _co2l_digits() -> TransformPair:
    # exact where the three channels are copies of one grey image, as a run makes them of MNIST
    return _co2l(28, transforms.Grayscale(), transforms.ToTensor())


TRANSFORM_PRESETS: dict[str, Callable[[], TransformPair]] = {
    "slca_cifar": _slca_cifar,
    "slca_imagenet_r": _slca_imagenet_r,
    "slca_cub": _slca_fine_grained,
    "slca_cars": _slca_fine_grained,
    "lorac": _lorac,
    "ucl_cifar": _ucl_cifar,
    "ucl_tiny": _ucl_tiny,
    "co2l_cifar": _co2l_cifar,
    "co2l_tiny": _co2l_tiny,
    "co2l_digits": _co2l_digits,
}


# What the images of a preset are normalised with, mean and deviation of images in 0..1.
PRESET_NORMALIZATION: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "slca_cifar": (CIFAR_MEAN, CIFAR_STD),
    "slca_imagenet_r": (IMAGENET_MEAN, IMAGENET_STD),
    "slca_cub": (IMAGENET_MEAN, IMAGENET_STD),
    "slca_cars": (IMAGENET_MEAN, IMAGENET_STD),
    "lorac": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "ucl_cifar": (UCL_MEAN, UCL_STD),
    "ucl_tiny": (UCL_MEAN, UCL_STD),
    "co2l_cifar": (CO2L_CIFAR_MEAN, CO2L_CIFAR_STD),
    "co2l_tiny": (CO2L_TINY_MEAN, CO2L_TINY_STD),
    "co2l_digits": ((0.0,), (1.0,)),
}


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else f"; accepted: {', '.join(known)}"


__all__ = ["PRESET_NORMALIZATION", "TRANSFORM_PRESETS", "TransformPair", "preset_transforms", "timm_transforms"]
