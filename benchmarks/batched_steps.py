"""The random steps of image transforms for a whole batch at once, on the device where the images lie.

What: torchvision's RandomCrop, RandomResizedCrop, flips, ColorJitter, RandomGrayscale, GaussianBlur and RandomApply,
with parameters drawn for every image. Each step draws on the CPU, from torch's global generator, before anything is
computed: equal seeds give equal augmentations on the CPU and on CUDA, and all the parameters of a batch travel in one
small copy.

What differs from torchvision on PIL images: nothing for crops without resizing and for flips, which are equal to the
bit. The others compute in float32 where PIL rounds to 8 bits after every step (up to about one level of 255 a step;
hue, which PIL rounds to 256 steps, up to a few). The order of the operations of a jitter is drawn once per batch, not
once per image. A resized crop is two matrix products per image, whose weights are those of PIL's filters with
antialiasing; a product in TF32, where that is switched on, moves it by at most a fifth of a level.

Cost on one CPU core, per image: 50 us for all of "ucl_cifar" at 32 pixels and 0.2 ms for "ucl_tiny" at 64, where PIL
takes 0.4 and 1.3 ms. A resized crop of 224 pixels from 256 takes 3 ms, three times as long as PIL: it is for a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from avalanche_firn.benchmarks.augmentation import crop_boxes
from avalanche_firn.benchmarks.streams import StreamError

__all__ = ["Apply", "BatchedStep", "Blur", "Crop", "Draw", "Flip", "Grey", "Jitter", "ResizedCrop", "unit"]

Size = tuple[int, int]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey


class Draw(NamedTuple):
    """What a step drew for a batch.

    Attributes:
        table: (B, columns of the step) float32 on the CPU, one row per image.
        shared: what holds for the whole batch, such as the order of operations.
    """

    table: Tensor
    shared: Any = None


class BatchedStep(ABC):
    """A random step: `draw` on the CPU, then `apply` on the device, which never waits for it."""

    columns: int

    def size(self, size: Size) -> Size:
        """(height, width) of the result for images of `size`; refuses (StreamError) sizes that don't fit."""
        return size

    @abstractmethod
    def draw(self, count: int, size: Size) -> Draw:
        """Parameters for `count` images of `size`, from torch's global CPU generator."""

    @abstractmethod
    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        """(B, C, H, W) uint8, or float in 0..1, to the same kind or to float; `table` lies on the same device."""


class Crop(BatchedStep):
    """Crops of one size at random places, after padding with a constant. Keeps uint8, and is exact to the bit.

    Args:
        crop: (height, width) in pixels.
        padding: pixels at (left, top, right, bottom).
        fill: of the padding, in 0..255.
    """

    columns = 2

    def __init__(self, crop: Size, padding: tuple[int, int, int, int] = (0, 0, 0, 0), fill: float = 0) -> None:
        self.crop, self.padding, self.fill = crop, padding, fill

    def size(self, size: Size) -> Size:
        if min(self._free(size)) < 0:
            raise StreamError(
                f"RandomCrop of {self.crop} for images of {size}; accepted: images as large, with padding"
            )
        return self.crop

    def draw(self, count: int, size: Size) -> Draw:
        places = [torch.randint(0, free + 1, (count,), device="cpu") for free in self._free(size)]
        return Draw(torch.stack(places, 1).to(torch.float32))

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        left, top, right, bottom = self.padding
        if any(self.padding):
            fill = self.fill if images.dtype == torch.uint8 else self.fill / 255
            images = functional.pad(images, (left, right, top, bottom), value=fill)
        places = table.to(torch.int64)
        rows = places[:, :1] + torch.arange(self.crop[0], device=images.device)
        columns = places[:, 1:] + torch.arange(self.crop[1], device=images.device)
        # one gather of all pixels, by their number in the padded image
        pixels = (rows[:, :, None] * images.shape[-1] + columns[:, None, :]).flatten(1)
        pixels = pixels[:, None].expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, pixels).unflatten(2, self.crop)

    def _free(self, size: Size) -> Size:
        left, top, right, bottom = self.padding
        return size[0] + top + bottom - self.crop[0], size[1] + left + right - self.crop[1]


class ResizedCrop(BatchedStep):
    """Crops of random area and shape, resized with PIL's filters and antialiasing.

    Args:
        result: (height, width) in pixels.
        scale: smallest and largest part of the area; width / height lies in 3/4..4/3, see `augmentation.crop_boxes`.
        filter: "bilinear" or "bicubic".
    """

    columns = 4

    def __init__(self, result: Size, scale: tuple[float, float], filter: Literal["bilinear", "bicubic"]) -> None:
        self.result, self.scale, self.filter = result, scale, filter

    def size(self, size: Size) -> Size:
        return self.result

    def draw(self, count: int, size: Size) -> Draw:
        return Draw(crop_boxes(count, size, self.scale))

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        count, channels, height, width = images.shape
        left, top, across, down = table.unbind(1)
        rows = self._weights(top, down, self.result[0], height)
        columns = self._weights(left, across, self.result[1], width)
        x = unit(images).reshape(count, channels * height, width) @ columns.transpose(1, 2)
        x = rows[:, None] @ x.view(count, channels, height, self.result[1])
        return x.clamp_(0, 1)  # a bicubic filter overshoots

    def _weights(self, start: Tensor, length: Tensor, count: int, whole: int) -> Tensor:
        """Part of every pixel of an axis in every pixel of the result: (B, count, whole), rows sum to 1."""
        step = (length / count)[:, None]
        centres = start[:, None] + (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) * step
        pixels = torch.arange(whole, device=start.device, dtype=start.dtype)
        # a reduction widens the filter to the pixels that one pixel of the result covers
        distance = ((pixels + 0.5 - centres[:, :, None]) / step.clamp(min=1)[:, :, None]).abs_()
        if self.filter == "bilinear":
            weights = (1 - distance).clamp_(min=0)
        else:  # Keys' cubic with a = -1/2, as in PIL
            distance.clamp_(max=2)  # where it ends, with 0
            near = (1.5 * distance).sub_(2.5).mul_(distance).mul_(distance).add_(1)
            far = (-0.5 * distance).add_(2.5).mul_(distance).sub_(4).mul_(distance).add_(2)
            weights = torch.where(distance < 1, near, far)
        inside = (pixels >= start[:, None]) & (pixels < (start + length)[:, None])  # what lies beside must not enter
        weights = weights.mul_(inside[:, None])
        return weights.div_(weights.sum(-1, keepdim=True))


class Flip(BatchedStep):
    """Mirror images with a probability; `axis` -1 left to right, -2 upside down. Keeps uint8, exact to the bit."""

    columns = 1

    def __init__(self, probability: float, axis: int = -1) -> None:
        self.probability, self.axis = probability, axis

    def draw(self, count: int, size: Size) -> Draw:
        return Draw(_mask(count, self.probability))

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        return torch.where(_per_image(table[:, 0] > 0), images.flip(self.axis), images)


class Jitter(BatchedStep):
    """Brightness, contrast, saturation and hue.

    Args:
        brightness, contrast, saturation: smallest and largest factor, or None.
        hue: smallest and largest turn, in -0.5..0.5, or None.
    """

    def __init__(
        self,
        brightness: Sequence[float] | None,
        contrast: Sequence[float] | None,
        saturation: Sequence[float] | None,
        hue: Sequence[float] | None,
    ) -> None:
        given = ((_brightness, brightness), (_contrast, contrast), (_saturation, saturation), (_hue, hue))
        self.operations = [(operation, float(span[0]), float(span[1])) for operation, span in given if span is not None]
        self.columns = len(self.operations)

    def draw(self, count: int, size: Size) -> Draw:
        order = torch.randperm(self.columns, device="cpu").tolist()
        spans = torch.tensor([span for _, *span in self.operations], device="cpu", dtype=torch.float32).view(-1, 2)
        return Draw(torch.rand(count, self.columns, device="cpu") * (spans[:, 1] - spans[:, 0]) + spans[:, 0], order)

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        x = unit(images)
        for i in shared:
            x = self.operations[i][0](x, _per_image(table[:, i]))
        return x


class Grey(BatchedStep):
    """Images without colour, with a probability."""

    columns = 1

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def draw(self, count: int, size: Size) -> Draw:
        return Draw(_mask(count, self.probability))

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        x = unit(images)
        return torch.where(_per_image(table[:, 0] > 0), _grey(x), x)


class Blur(BatchedStep):
    """A Gaussian filter of random width; the images are continued by reflection.

    Args:
        kernel: (width, height) of the filter, odd numbers of pixels.
        sigma: smallest and largest standard deviation, pixels.
    """

    columns = 1

    def __init__(self, kernel: Size, sigma: tuple[float, float]) -> None:
        self.kernel, self.sigma = kernel, sigma

    def size(self, size: Size) -> Size:
        if size[1] <= self.kernel[0] // 2 or size[0] <= self.kernel[1] // 2:
            raise StreamError(f"GaussianBlur of {self.kernel} for images of {size}; accepted: below twice the edges")
        return size

    def draw(self, count: int, size: Size) -> Draw:
        low, high = self.sigma
        return Draw(torch.rand(count, 1, device="cpu") * (high - low) + low)

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        x = unit(images)
        across, down = self.kernel[0] // 2, self.kernel[1] // 2
        x = functional.pad(x, (across, across, down, down), mode="reflect")
        # tap by tap: exact in float32, and no slower than a convolution with a kernel for every image
        return _taps(_taps(x, table, across, -1), table, down, -2)


class Apply(BatchedStep):
    """Other steps, together with a probability."""

    def __init__(self, probability: float, steps: Sequence[BatchedStep]) -> None:
        self.probability, self.steps = probability, tuple(steps)
        self.columns = 1 + sum(step.columns for step in steps)

    def size(self, size: Size) -> Size:
        for step in self.steps:
            if step.size(size) != size:
                raise StreamError(f"RandomApply of {type(step).__name__}; accepted: steps that keep the size, {size}")
        return size

    def draw(self, count: int, size: Size) -> Draw:
        draws = [step.draw(count, size) for step in self.steps]
        table = torch.cat([_mask(count, self.probability), *(draw.table for draw in draws)], 1)
        return Draw(table, [draw.shared for draw in draws])

    def apply(self, images: Tensor, table: Tensor, shared: Any) -> Tensor:
        x = images
        tables = table[:, 1:].split([step.columns for step in self.steps], 1)
        for step, own, common in zip(self.steps, tables, shared, strict=True):
            x = step.apply(x, own, common)
        before = images if x.dtype == images.dtype else unit(images)
        return torch.where(_per_image(table[:, 0] > 0), x, before)


def unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1; others as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def _mask(count: int, probability: float) -> Tensor:
    return (torch.rand(count, 1, device="cpu") < probability).to(torch.float32)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W) luminance; one channel is luminance already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - factor), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.addcmul(_grey(x) * (1 - factor), x, factor).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Colours turned around the circle of hues; value and saturation stay."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    scale = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale),
    )
    sixth = sixth + 6 * turn[:, 0]
    channels = []
    for offset in (5, 3, 1):  # red, green, blue of a hue: a trapezoid each, a third of a turn apart
        place = (offset + sixth).remainder(6)
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, 1)


def _taps(x: Tensor, sigma: Tensor, reach: int, axis: int) -> Tensor:
    """A Gaussian filter of every image along an axis that is longer by `reach` at either end."""
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.softmax(-0.5 * (offsets / sigma).square(), 1)
    length = x.shape[axis] - 2 * reach
    result = x.narrow(axis, 0, length) * _per_image(weights[:, 0])
    for i in range(1, 2 * reach + 1):
        result.addcmul_(x.narrow(axis, i, length), _per_image(weights[:, i]))
    return result
