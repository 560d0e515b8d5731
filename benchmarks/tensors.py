"""Images held in memory as one tensor: the fastest data set a small benchmark can have.

What it costs: with `storage="float32"` the images are normalised once and an access copies one image; with
`storage="uint8"` an access converts and normalises, and memory is a quarter of it (a third of that again for grey
images, whose channels are made on access). Both give the same values to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.streams import StreamError

AUTO_FLOAT_LIMIT = 64 * 2**20  # bytes up to which storage="auto" keeps normalised float32 images; our choice


class TensorImageDataset(Dataset):
    """(x, label) pairs with x = (image / 255 - mean) / std, a float32 tensor (3, H, W).

    Args:
        images: (N, 1, H, W) or (N, 3, H, W) uint8. One channel is repeated to three.
        targets: (N,) class ids.
        mean, std: one figure or one per channel, in units of the image scaled to 0..1, such as timm's data_config has.
        storage: "uint8", "float32", or "auto": float32 if that takes at most 64 MiB.

    Raises:
        StreamError: shapes, dtype, lengths, mean, std or storage out of range.

    Example:
        >>> data = TensorImageDataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], mean=0.5, std=0.5)
        >>> data[1][0].shape, data[1][1], data.batch([0, 1])[0].shape
        (torch.Size([3, 8, 8]), 1, torch.Size([2, 3, 8, 8]))
    """

    def __init__(
        self,
        images: Tensor,
        targets: Sequence[int] | Tensor,
        *,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        storage: Literal["auto", "uint8", "float32"] = "auto",
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise StreamError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; accepted: uint8 (N, 1 or 3, H, W)"
            )
        if len(images) != len(targets):
            raise StreamError(f"there are {len(images)} images and {len(targets)} targets; accepted: equal numbers")
        if storage not in ("auto", "uint8", "float32"):
            raise StreamError(f"storage is {storage!r}; accepted: 'auto', 'uint8', 'float32'")
        self.targets: list[int] = [int(t) for t in targets]
        self._labels = torch.tensor(self.targets, dtype=torch.int64)
        self._mean = 255 * _channels("mean", mean)
        self._std = 255 * _channels("std", std)
        if bool((self._std <= 0).any()):
            raise StreamError(f"std is {std!r}; accepted: figures above 0")
        count, _, height, width = images.shape
        self._images = images
        if storage == "auto":
            storage = "float32" if count * 3 * height * width * 4 <= AUTO_FLOAT_LIMIT else "uint8"
        self._normalised = storage == "float32"
        if self._normalised:
            self._images = self._normalise(images)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample: a label and a tensor (3, H, W) of its own, so that in-place transforms leave the data alone."""
        image = self._images[index]
        return (image.clone() if self._normalised else self._normalise(image)), self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The samples at `indices`, as torch's loader fetches them: one gather instead of one per sample."""
        images, _ = self._gather(indices)
        return [(image, self.targets[i]) for image, i in zip(images.unbind(0), indices, strict=True)]

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `indices`, already collated: images (B, 3, H, W) float32 and labels (B,) int64."""
        images, rows = self._gather(indices)
        return images, self._labels[rows]

    def _gather(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        images = self._images.index_select(0, rows)  # far faster than brackets on a CPU
        return (images if self._normalised else self._normalise(images)), rows

    def _normalise(self, images: Tensor) -> Tensor:
        # (v - 255 mean) / (255 std): two elementwise operations without a fused product, equal to the bit in any shape.
        return torch.sub(images, self._mean).div_(self._std)


def _channels(field: str, value: float | Sequence[float]) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StreamError(f"{field} is {value!r}; accepted: a figure or three of them") from error
    if tensor.numel() not in (1, 3) or not bool(torch.isfinite(tensor).all()):
        raise StreamError(f"{field} is {value!r}; accepted: a finite figure or three of them")
    return tensor.expand(3).reshape(3, 1, 1).clone()


__all__ = ["TensorImageDataset"]
