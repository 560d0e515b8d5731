"""Random views of whole image batches on the device where they lie, for contrastive learning.

What: crop, flip, colour jitter, grey and blur, with parameters drawn anew for every image and every view; torchvision's
transforms draw one set for a batch. The steps and their order are those of the code released with Co2L (chaht01/Co2L).
Images go in and come out normalised, so that a stream's deterministic transforms (`preset_transforms("co2l_cifar")`)
and this module fit together. All but the crop is kornia's: kornia slices crops image by image, and before version 0.9,
which needs Python 3.11, it never keeps the full width or height.

How it draws: from torch's global generator on the CPU, wherever the images lie. Equal seeds therefore give equal views
on the CPU and on CUDA, up to rounding (the blur's convolution may use TF32 there), and a checkpoint that keeps that
generator resumes exactly; another version of kornia may draw differently. One thing is not drawn per image: the order
of the four jitter operations, which kornia draws once per call, so that all images and views of a call share it
(torchvision: once per image).

Cost: 1,024 views take 0.16 s at 3x32x32 and 1.6 s at 3x64x64 with blur on one CPU core, over half of it the jitter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kornia.augmentation import ColorJitter, RandomGaussianBlur, RandomGrayscale, RandomHorizontalFlip
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.transforms import CO2L_CIFAR_MEAN, CO2L_CIFAR_STD, CO2L_TINY_MEAN, CO2L_TINY_STD

__all__ = ["AUGMENTATION_PRESETS", "ContrastiveAugmentation", "TwoViews", "crop_boxes", "resized_crops"]

_TRIES = 10  # crops drawn for an image before it is kept whole, and the range of their shapes: torchvision's defaults
_RATIO = (3 / 4, 4 / 3)
_JITTER = ("brightness", "contrast", "saturation", "hue")
_COLOUR = {"flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.8, "grey": 0.2}

# Co2L's released code; its images keep their native size.
AUGMENTATION_PRESETS: dict[str, dict[str, Any]] = {
    "seq_cifar10": {**_COLOUR, "crop_scale": (0.2, 1.0), "mean": CO2L_CIFAR_MEAN, "std": CO2L_CIFAR_STD},
    "seq_tiny_imagenet": {
        **_COLOUR,
        "crop_scale": (0.1, 1.0),
        "blur": (7, (0.1, 2.0), 0.5),
        "mean": CO2L_TINY_MEAN,
        "std": CO2L_TINY_STD,
    },
    "rotated_mnist": {"crop_scale": (0.7, 1.0), "flip": 0.0, "jitter": None, "grey": 0.0, "mean": 0.0, "std": 1.0},
}


class ContrastiveAugmentation(nn.Module):
    """Random views of a batch of images; `forward` says how it is called. Training and evaluation mode are alike.

    It has no parameters, no gradient passes through it and its state dict is empty. Moving it to a device moves mean
    and std, never the drawing. The defaults are those of Co2L's code on CIFAR-10 but for mean and std.

    Args:
        size: pixels of the views, one figure or (height, width); None: those of the images. A larger crop is reduced
            without smoothing.
        crop_scale: smallest and largest part of the area that a crop keeps, 0 < smallest <= largest <= 1; its width is
            3/4 to 4/3 of its height. (1, 1) keeps square images whole.
        flip: probability of a mirror image.
        jitter: ranges of brightness, contrast, saturation (factors 1 +- that, not below 0) and hue (turns, up to 0.5);
            None: no jitter.
        jitter_probability: probability of the jitter as a whole.
        grey: probability of an image without colour.
        blur: (pixels of the kernel, an odd number; (smallest, largest) sigma in pixels; probability), or None.
        mean, std: what the images are normalised with, one figure or one per channel, in units of images in 0..1.
        views: views of each image, at least 1.

    Raises:
        StreamError: a setting out of range.

    Example:
        >>> augment = ContrastiveAugmentation.preset("seq_cifar10")
        >>> augment(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 2, 3, 32, 32])
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        *,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.4, 0.1),
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: tuple[int, tuple[float, float], float] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        views: int = 2,
    ) -> None:
        super().__init__()
        self.size = _size(size)
        self.views = _views(views)
        if not _rising(crop_scale, above=0.0) or crop_scale[1] > 1:
            raise StreamError(f"crop_scale is {crop_scale!r}; accepted: 0 < smallest <= largest <= 1")
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        ranges = None if jitter is None else _jitter(jitter)
        operations: list[Any] = []
        if _probability("flip", flip):
            operations.append(RandomHorizontalFlip(p=flip))
        if _probability("jitter_probability", jitter_probability) and ranges is not None:
            operations.append(ColorJitter(**ranges, p=jitter_probability))
        if _probability("grey", grey):
            operations.append(RandomGrayscale(p=grey))
        self._needs_colour = any(isinstance(o, (ColorJitter, RandomGrayscale)) for o in operations)
        self._kernel = 1
        if blur is not None:
            self._kernel, sigma, probability = _blur(blur)
            if probability:
                operations.append(RandomGaussianBlur((self._kernel, self._kernel), sigma, p=probability))
        for operation in operations:
            operation.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
        # In a tuple, not as submodules: kornia moves the drawing to where `.to()` moves the module.
        self._operations = tuple(operations)
        self.register_buffer("_mean", _channels("mean", mean), persistent=False)
        self.register_buffer("_std", _channels("std", std), persistent=False)
        if bool((self._std <= 0).any()):
            raise StreamError(f"std is {std!r}; accepted: figures above 0")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ContrastiveAugmentation:
        """The augmentation of a benchmark in Co2L's code: "seq_cifar10", "seq_tiny_imagenet" or "rotated_mnist".

        They expect the images of `preset_transforms`: "co2l_cifar", "co2l_tiny", "co2l_digits". `changes` are arguments
        of the class that replace the preset's.

        Raises:
            StreamError: unknown name.
        """
        if name not in AUGMENTATION_PRESETS:
            raise StreamError(
                f"augmentation preset {name!r} is unknown; accepted: {', '.join(sorted(AUGMENTATION_PRESETS))}"
            )
        return cls(**{**AUGMENTATION_PRESETS[name], **changes})

    @torch.no_grad()
    def forward(self, images: Tensor, views: int | None = None) -> Tensor:
        """Independent random views of every image.

        Args:
            images: (N, C, H, W) float of any precision, normalised. Values that lie outside 0..1 without the
                normalisation are cut off.
            views: V, in place of the one given to the class.

        Returns:
            (N, V, C, height, width), dtype and device of `images`; computed in float32, under autocast too.
            `result.transpose(0, 1).flatten(0, 1)` has all first views, then all second ones, and costs no copy.

        Raises:
            StreamError: images of another shape or dtype, jitter or grey for images that aren't of three channels, a
                blur kernel that is too large for the views.
        """
        views = self.views if views is None else _views(views)
        size = self._checked(images)
        with torch.autocast(images.device.type, enabled=False):
            mean, std = self._mean.float(), self._std.float()
            x = (images.float() * std + mean).repeat(views, 1, 1, 1)
            x = resized_crops(x, crop_boxes(len(x), (x.shape[-2], x.shape[-1]), self.crop_scale), size)
            for operation in self._operations:
                x = operation(x)
            x = (x.clamp(0, 1) - mean) / std
        return x.to(images.dtype).unflatten(0, (views, len(images))).transpose(0, 1)

    def _checked(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the views, if `images` are as `forward` wants them."""
        if images.dim() != 4 or not images.is_floating_point() or not images.numel():
            raise StreamError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; accepted: floats (N, C, H, W), N at least 1"
            )
        channels = images.shape[1]
        if self._needs_colour and channels != 3:
            raise StreamError(
                f"images have {channels} channel(s); accepted: 3, or jitter=None and grey=0 (presets for grey images: "
                '"rotated_mnist")'
            )
        for name, figures in (("mean", self._mean), ("std", self._std)):
            if len(figures) not in (1, channels):
                raise StreamError(
                    f"{name} has {len(figures)} figures for {channels} channel(s); accepted: 1 or as many"
                )
        size = self.size or (images.shape[-2], images.shape[-1])
        if min(size) <= self._kernel // 2:
            raise StreamError(
                f"blur has a kernel of {self._kernel} for views of {size}; accepted: below twice the shorter edge"
            )
        return size

    def extra_repr(self) -> str:
        """Kornia's operations, which aren't submodules."""
        own = f"size={self.size}, crop_scale={self.crop_scale}, views={self.views}"
        return ", ".join((own, *map(repr, self._operations)))


class TwoViews:
    """Two draws of a random transform as one tensor, for a stream that augments on the CPU.

    Args:
        transform: from an image to a tensor (C, H, W), random.

    A list of two tensors would not do: Avalanche's strategies can't move it to the device.

    Raises:
        StreamError: `transform` can't be called.
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        if not callable(transform):
            raise StreamError(f"transform is {transform!r}; accepted: something that can be called")
        self.transform = transform

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """An image -> (2, C, H, W)."""
        return torch.stack((self.transform(image), self.transform(image)))


def crop_boxes(count: int, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """Random boxes with the distribution of torchvision's `RandomResizedCrop`, for many images at once.

    Args:
        count: M, boxes.
        size: (height, width) of the images, pixels.
        scale: smallest and largest part of the area, uniform between them; width / height is log-uniform in 3/4..4/3.
            Where ten tries don't fit into the image, it is kept whole, or the middle of an image that is too long.

    Returns:
        (M, 4) left, top, width, height in whole pixels, float32, drawn and left on the CPU.
    """
    height, width = size

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, _TRIES, device="cpu", dtype=torch.float32).uniform_(low, high)

    area, ratio = uniform(*scale) * height * width, uniform(math.log(_RATIO[0]), math.log(_RATIO[1])).exp()
    across, down = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (across >= 1) & (across <= width) & (down >= 1) & (down <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first that fits
    across, down, fits = (table.gather(1, first).squeeze(1) for table in (across, down, fits))
    left, top = (
        (torch.rand(count, device="cpu", dtype=torch.float32) * free).floor()
        for free in (width - across + 1, height - down + 1)
    )
    whole = (min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0])))
    middle = ((width - whole[0]) // 2, (height - whole[1]) // 2, *whole)
    fallback = torch.tensor(middle, device="cpu", dtype=torch.float32)
    return torch.where(fits[:, None], torch.stack((left, top, across, down), 1), fallback)


def resized_crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """A crop of every image, resized bilinearly without smoothing, in one step for the whole batch.

    Equals `torchvision.transforms.functional.resized_crop(..., antialias=False)` image by image, up to rounding.

    Args:
        images: (M, C, H, W) float.
        boxes: (M, 4) left, top, width, height in whole pixels, inside the image; on any device.
        size: (height, width) of the result.

    Returns:
        (M, C, *size), dtype and device of `images`.
    """
    height, width = images.shape[-2:]
    left, top, across, down = boxes.to(images.device, images.dtype, non_blocking=True).unbind(1)
    columns, rows = _positions(left, across, size[1], width), _positions(top, down, size[0], height)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _positions(start: Tensor, length: Tensor, count: int, whole: int) -> Tensor:
    """Where `count` pixels of the result lie on an axis of `whole` pixels: (M, count), -1..1 from first to last."""
    centres = (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) / count
    inside = (centres * length[:, None] - 0.5).clamp(min=0)
    inside = torch.minimum(inside, length[:, None] - 1)  # pixels beside the crop must not enter it
    return 2 * (start[:, None] + inside) / max(whole - 1, 1) - 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rising(pair: Any, *, above: float) -> bool:
    """Whether `pair` holds two figures, the first above `above` and not above the second."""
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(_number, pair)) and above < pair[0] <= pair[1]


def _probability(name: str, value: Any) -> float:
    if not _number(value) or not 0 <= value <= 1:
        raise StreamError(f"{name} is {value!r}; accepted: a probability, 0..1")
    return float(value)


def _views(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StreamError(f"views is {value!r}; accepted: a whole number, at least 1")
    return value


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
        raise StreamError(f"size is {value!r}; accepted: None, pixels, or (height, width) in pixels")
    return pair[0], pair[1]


def _jitter(value: Any) -> dict[str, Any]:
    limits = (float("inf"),) * 3 + (0.5,)
    if (
        not isinstance(value, (tuple, list))
        or len(value) != len(_JITTER)
        or not all(_number(v) and 0 <= v <= limit for v, limit in zip(value, limits, strict=True))
    ):
        raise StreamError(f"jitter is {value!r}; accepted: None, or {', '.join(_JITTER)}: not below 0, hue up to 0.5")
    return {name: float(v) for name, v in zip(_JITTER, value, strict=True)}


def _blur(value: Any) -> tuple[int, tuple[float, float], float]:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise StreamError(
            f"blur is {value!r}; accepted: None, or (kernel, (smallest sigma, largest sigma), probability)"
        )
    kernel, sigma, probability = value
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        raise StreamError(f"the kernel of blur is {kernel!r}; accepted: an odd number of pixels")
    if not _rising(sigma, above=0.0):
        raise StreamError(f"the sigma of blur is {sigma!r}; accepted: 0 < smallest <= largest")
    return kernel, (float(sigma[0]), float(sigma[1])), _probability("the probability of blur", probability)


def _channels(name: str, value: Any) -> Tensor:
    """`value` as (1, 1, 1) or (C, 1, 1) float32."""
    figures = [value] if _number(value) else value
    if not isinstance(figures, (tuple, list)) or not figures or not all(map(_number, figures)):
        raise StreamError(f"{name} is {value!r}; accepted: a figure, or one per channel")
    return torch.tensor(figures, dtype=torch.float32).view(-1, 1, 1)
