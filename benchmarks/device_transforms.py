"""Image transforms taken apart: what can be done once, when an image is decoded, and what is done per batch.

`plan_transform` reads a transform of torchvision's `Compose` kind, such as `preset_transforms` and `timm_transforms`
make them, and splits it into the deterministic steps before the first random one (done once on the PIL image, the
result is kept as uint8), the random steps (done on whole batches, see `batched_steps`) and the normalisation.

Without random steps the result equals the original transform to the bit, on the CPU and on CUDA: the same float32
operations in the same order. With them it is the same augmentation with other random numbers; `batched_steps` says
where it differs by a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from timm.data import transforms as timm_steps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from avalanche_firn.benchmarks.batched_steps import (
    Apply,
    BatchedStep,
    Blur,
    Crop,
    Draw,
    Flip,
    Grey,
    Jitter,
    ResizedCrop,
)
from avalanche_firn.benchmarks.streams import StreamError

__all__ = ["AsRGB", "TransformPlan", "plan_transform"]

_RATIO = (3 / 4, 4 / 3)  # of `crop_boxes`
_FILTERS = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}
_MODES = ("L", "RGB")  # 8 bits per channel, as ToTensor divides by 255


class AsRGB:
    """Any image as an RGB PIL image: grey ones, and tensors (C, H, W), uint8 or float in 0..1. Deterministic."""

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Tensor):
            image = to_pil_image((image * 255).round().to(torch.uint8) if image.is_floating_point() else image)
        return image.convert("RGB") if image.mode != "RGB" else image


# Steps that draw nothing, and the attributes that make two of them equal.
_FIXED: dict[type[Any], tuple[str, ...]] = {
    AsRGB: (),
    transforms.CenterCrop: ("size",),
    transforms.Grayscale: ("num_output_channels",),
    transforms.Pad: ("padding", "fill", "padding_mode"),
    transforms.Resize: ("size", "interpolation", "max_size", "antialias"),
    transforms.ToPILImage: ("mode",),
    transforms.ToTensor: (),
    timm_steps.CenterCropOrPad: ("size", "fill", "padding_mode"),
    timm_steps.MaybeToTensor: (),
    timm_steps.ResizeKeepRatio: ("size", "interpolation", "longest"),
}
_ROTATION = ("degrees", "interpolation", "expand", "center", "fill")
_RANDOM = (
    "RandomCrop",
    "RandomResizedCrop",
    "RandomResizedCropAndInterpolation",
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "ColorJitter",
    "RandomGrayscale",
    "GaussianBlur",
    "RandomApply",
)
_ACCEPTED = (
    f"accepted: {', '.join(kind.__name__ for kind in _FIXED)}, RandomRotation by one angle, then {', '.join(_RANDOM)}, "
    "then ToTensor, then perhaps Normalize"
)


@dataclass(frozen=True, eq=False)
class TransformPlan:
    """A transform taken apart; `load` and then a call do what it did. Made by `plan_transform`.

    Attributes:
        prefix: deterministic steps from an image to a PIL image of 8 bits per channel.
        random: batched random steps.
        mean, std: (C,) float32 of the normalisation, of images in 0..1, or None without one.
    """

    prefix: tuple[Any, ...]
    random: tuple[BatchedStep, ...]
    mean: Tensor | None
    std: Tensor | None
    _constants: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def exact(self) -> bool:
        """Whether nothing is drawn, so that the result equals the original transform's to the bit."""
        return not self.random

    @property
    def signature(self) -> list[list[str]]:
        """The prefix in words: equal for two plans whose `load` gives equal images."""
        return [
            [type(step).__name__, *(f"{name}={_text(getattr(step, name))}" for name in _fields(step))]
            for step in self.prefix
        ]

    def stored(self, edge: int) -> TransformPlan:
        """A plan whose `load` brings images of any size to a square: the shorter edge is resized to `edge` pixels with
        antialiasing, then the middle is cut out. An approximation: random crops never reach what was cut off.

        Raises:
            StreamError: the first random step is no random resized crop, the only one after which size doesn't matter.
        """
        first = self.random[0] if self.random else None
        if not isinstance(first, ResizedCrop):
            name = "none" if first is None else type(first).__name__
            raise StreamError(
                f"stored_edge is {edge}, and the first random step is {name}; accepted: RandomResizedCrop"
            )
        resize = transforms.Resize(edge, interpolation=InterpolationMode(first.filter))
        return replace(self, prefix=(*self.prefix, resize, transforms.CenterCrop(edge)), _constants={})

    def load(self, image: Any) -> Tensor:
        """An image as the prefix leaves it: (C, H, W) uint8 on the CPU, C 1 or 3.

        Raises:
            StreamError: the prefix gives something else than a PIL image of mode L or RGB.
        """
        for step in self.prefix:
            image = step(image)
        if not isinstance(image, Image.Image) or image.mode not in _MODES:
            found = getattr(image, "mode", type(image).__name__)
            raise StreamError(
                f"the image before ToTensor is {found}; accepted: a PIL image of mode {' or '.join(_MODES)}"
            )
        pixels: Tensor = pil_to_tensor(image)
        return pixels

    @torch.no_grad()
    def __call__(self, images: Tensor, channels: int | None = None) -> Tensor:
        """A batch of loaded images, augmented and normalised. Draws from torch's global CPU generator.

        Args:
            images: (B, C, H, W) uint8 on any device; not changed.
            channels: of the result, where grey images are stored with one channel; None: C.

        Returns:
            (B, channels, height, width) float32 on the device of `images`. Nothing waits for the device.

        Raises:
            StreamError: images of a size that a random step can't take.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = self._augment(images) if self.random else images
            scale, mean, std = self._on(images.device)
            # 255 as a tensor: CUDA multiplies by the reciprocal of a plain figure, which rounds differently
            x = torch.div(images, scale) if images.dtype == torch.uint8 else images  # floats are the steps' own
            if channels is not None and channels != x.shape[1]:
                x = x.repeat(1, channels, 1, 1)
            if self.mean is not None:
                x = x.sub_(mean).div_(std)
            return x.contiguous()

    def _augment(self, images: Tensor) -> Tensor:
        draws: list[Draw] = []
        size = (images.shape[-2], images.shape[-1])
        for step in self.random:
            after = step.size(size)
            draws.append(step.draw(len(images), size))
            size = after
        # the parameters of all steps in one copy, which from ordinary memory is staged and not waited for
        table = torch.cat([draw.table for draw in draws], 1).to(images.device, non_blocking=True)
        tables = table.split([step.columns for step in self.random], 1)
        for step, own, draw in zip(self.random, tables, draws, strict=True):
            images = step.apply(images, own, draw.shared)
        return images

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """255, mean and std (C, 1, 1) on a device, copied there once."""
        if device not in self._constants:
            nothing = torch.zeros(1, device="cpu")
            figures = (nothing + 255, *(nothing if f is None else f for f in (self.mean, self.std)))
            self._constants[device] = tuple(figure.view(-1, 1, 1).to(device) for figure in figures)
        return self._constants[device]


def plan_transform(transform: Any) -> TransformPlan:
    """Takes a transform apart.

    Args:
        transform: torchvision's Compose (nested ones too), a sequence of steps or one step, from an image to a
            normalised float32 tensor (C, H, W).

    Raises:
        StreamError: a step that isn't known, or known ones in another order than: steps without chance, random steps,
            ToTensor, at most one Normalize. The message names the step and says what is accepted.
    """
    steps = _flatten(transform)
    ends = [i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor)]
    if not ends:
        raise StreamError(f"a transform of {_names(steps) or 'no steps'} has no ToTensor; {_ACCEPTED}")
    before, after = steps[: ends[-1]], steps[ends[-1] + 1 :]
    mean, std = _normalisation(after)
    fixed = next((i for i, step in enumerate(before) if not _is_fixed(step)), len(before))
    random = tuple(_batched(step) for step in before[fixed:])
    return TransformPlan(tuple(before[:fixed]), random, mean, std)


def _flatten(transform: Any) -> list[Any]:
    if isinstance(transform, (transforms.Compose, nn.Sequential, list, tuple)):
        parts = transform.transforms if isinstance(transform, transforms.Compose) else transform
        return [step for part in parts for step in _flatten(part)]
    return [transform]


def _normalisation(steps: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    if not steps:
        return None, None
    if len(steps) > 1 or type(steps[0]) is not transforms.Normalize:
        raise StreamError(f"after ToTensor come {_names(steps)}; {_ACCEPTED}")
    mean, std = (
        torch.as_tensor(figures, dtype=torch.float32, device="cpu").reshape(-1)
        for figures in (steps[0].mean, steps[0].std)
    )
    return mean, std


def _is_fixed(step: Any) -> bool:
    if type(step) is transforms.RandomRotation:
        return bool(step.degrees[0] == step.degrees[1])
    if type(step) is timm_steps.ResizeKeepRatio and (step.random_scale_prob or step.random_aspect_prob):
        return False
    return type(step) in _FIXED and not isinstance(getattr(step, "interpolation", None), (tuple, list))


def _fields(step: Any) -> tuple[str, ...]:
    return _ROTATION if type(step) is transforms.RandomRotation else _FIXED[type(step)]


def _text(value: Any) -> str:
    return value.value if isinstance(value, InterpolationMode) else repr(value)


def _batched(step: Any) -> BatchedStep:
    """The step for whole batches."""
    if type(step) is transforms.RandomCrop:
        if step.pad_if_needed or step.padding_mode != "constant" or not isinstance(step.fill, (int, float)):
            raise StreamError(f"{step} with fill {step.fill!r}; accepted: padding with one figure, no pad_if_needed")
        return Crop(_pair(step.size), _sides(step.padding), float(step.fill))
    if type(step) in (transforms.RandomResizedCrop, timm_steps.RandomResizedCropAndInterpolation):
        if isinstance(step.interpolation, (tuple, list)) or step.interpolation not in _FILTERS:
            raise StreamError(f"{step}; accepted: interpolation bilinear or bicubic")
        if any(abs(a - b) > 1e-6 for a, b in zip(step.ratio, _RATIO, strict=True)):
            raise StreamError(f"{step}; accepted: a ratio of 3/4 to 4/3")
        return ResizedCrop(_pair(step.size), (step.scale[0], step.scale[1]), _FILTERS[step.interpolation])  # type: ignore[arg-type]
    if type(step) is transforms.RandomHorizontalFlip:
        return Flip(float(step.p))
    if type(step) is transforms.RandomVerticalFlip:
        return Flip(float(step.p), axis=-2)
    if type(step) is transforms.ColorJitter:
        return Jitter(step.brightness, step.contrast, step.saturation, step.hue)
    if type(step) is transforms.RandomGrayscale:
        return Grey(float(step.p))
    if type(step) is transforms.GaussianBlur:
        return Blur(_pair(step.kernel_size), (float(step.sigma[0]), float(step.sigma[1])))
    if type(step) is transforms.RandomApply:
        return Apply(float(step.p), [_batched(inner) for inner in step.transforms])
    raise StreamError(f"transform step {step!r} is not understood here; {_ACCEPTED}")


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of torchvision's padding: nothing, one figure, (across, down) or all four."""
    if not padding:
        return (0, 0, 0, 0)
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (sides * (4 // len(sides)))[:4]
    return int(left), int(top), int(right), int(bottom)


def _names(steps: Sequence[Any]) -> str:
    return ", ".join(getattr(step, "__name__", type(step).__name__) for step in steps)
