"""What all statistics of features share: checks with the errors they promise, float64 arithmetic, noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues


def check_features(tensor: Tensor, name: str, shape: str) -> None:
    """Refuse what statistics can't be made of.

    :param name: of the argument, for the message. :param shape: what it has to be, such as ``"n, d"``, none of them 0.
    :raises TypeError: not a floating-point tensor. :raises ValueError: another number of dimensions, empty;
        ``NonFiniteValues``, where not finite.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    sizes = shape.split(", ")
    if tensor.ndim != len(sizes) or tensor.numel() == 0:
        wanted = f"({shape}{',' * (len(sizes) == 1)}) with {', '.join(dict.fromkeys(sizes))} >= 1"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteValues(f"{name}: not finite (NaN or infinity among the values)")


def check_by_class(features: Tensor, targets: Tensor) -> None:
    """Refuse features that aren't finite, by the names of their classes; one read from the device.

    :param features: ``(N, d)``. :param targets: ``(N,)`` class ids.
    :raises NonFiniteValues: NaN or infinity among them.
    """
    if not bool(torch.isfinite(features).all()):
        bad = ~torch.isfinite(features).all(1)
        counts = [
            (c, int((targets[bad] == c).sum()), int((targets == c).sum())) for c in targets[bad].unique().tolist()
        ]
        shown = ", ".join(f"{c} ({n} of {total} samples)" for c, n, total in counts[:10])
        raise NonFiniteValues(f"the features of class {shown}: not finite (NaN or infinity among the values)")


def check_jitter(jitter: float) -> None:
    """:raises ValueError: negative or not finite."""
    if not (math.isfinite(jitter) and jitter >= 0):
        raise ValueError(f"jitter: must be a finite number >= 0, got {jitter}")


def to_float64(tensor: Tensor) -> Tensor:
    """Detached, float64, on the same device (on the CPU for mps, which has no float64)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def fill_normal(out: Tensor, generator: torch.Generator | None) -> None:
    """Fill with standard normals, always drawn in float32 so that both storage dtypes see the same noise."""
    device = out.device if generator is None else generator.device
    if out.dtype == torch.float32 and out.device.type == device.type:
        out.normal_(generator=generator)
    else:
        out.copy_(torch.randn(out.shape, generator=generator, device=device, dtype=torch.float32))


__all__ = ["check_by_class", "check_features", "check_jitter", "fill_normal", "to_float64"]
