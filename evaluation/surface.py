"""The loss of a model on a grid of weights: :func:`loss_surface`.

Any plane in weight space, given by an origin and two directions; :mod:`~avalanche_firn.evaluation.landscape` has the
usual two. Differs from the code of "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913): the weights of a
point stand beside the model (``torch.func.functional_call``), whose own are never written, so that nothing has to be
restored and an error leaves nothing behind; there is no wait for the device between points; accuracy is a fraction.

Cost: one forward pass of the images for each point. The points are a loop: a stack of them under ``vmap`` took 1.9 to
2.7 times as long (28 px convnets of width 8 to 32, one CPU thread), as convolutions become grouped ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn
from torch.nn import functional

from avalanche_firn.evaluation.landscape_math import Weights
from avalanche_firn.models.parts import evaluation_mode, forward_batch
from avalanche_firn.plugins.random_state import private_random_state

_HALF = (torch.float16, torch.bfloat16)


class Surface(NamedTuple):
    """Entry [a, b] belongs to ``origin + xs[a] * dx + ys[b] * dy``."""

    loss: Tensor
    """(A, B) float64, mean cross-entropy in nats; infinite or NaN where the network overflows."""
    accuracy: Tensor
    """(A, B) float64, fraction in [0, 1]."""


@torch.no_grad()
def loss_surface(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    origin: Weights,
    dx: Weights,
    dy: Weights,
    xs: Sequence[float] | Tensor,
    ys: Sequence[float] | Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Surface:
    """Loss and accuracy on a grid of the plane ``origin + x * dx + y * dy``.

    Evaluation mode; modes, weights, buffers and global generators are afterwards what they were. BatchNorm has at every
    point the running statistics that the model has now, as in the reference.

    Args:
        model: (n, ...) -> logits (n, C); single-task.
        images, labels: (n, ...) and (n,) integers; floating-point images are moved to the model's dtype.
        origin: parameters by name; those that aren't named keep the model's value.
        dx, dy: directions, the names and shapes of ``origin``; any floating dtype.
        xs, ys: A and B coordinates.
        batch_size: images per forward pass; None: 16 on a CPU, where more leave the cache, else 256.
        device: where to compute; default that of the model's first parameter. The model itself isn't moved.

    Returns:
        :class:`Surface` on the CPU.

    Raises:
        ValueError: a multi-task model, names or shapes that don't fit, empty or non-finite coordinates, no image,
            labels that aren't one integer from 0 for each image, fewer logits than classes.
    """
    if isinstance(model, MultiTaskModule):
        raise ValueError(f"model: {type(model).__name__} needs task labels; accepted are single-task models")
    classes = check_data(images, labels, batch_size)
    grid = [_coordinates("xs", xs), _coordinates("ys", ys)]
    parameters = dict(model.named_parameters())
    _check_plane(parameters, origin, dx, dy)
    place = next(iter(parameters.values()))
    device = place.device if device is None else torch.device(device)
    fixed = {name: p.detach().to(device) for name, p in parameters.items() if name not in origin}
    fixed |= {name: b.detach().to(device, copy=True) for name, b in model.named_buffers()}
    base, step_x, step_y = (
        {name: side[name].detach().to(device, parameters[name].dtype) for name in origin} for side in (origin, dx, dy)
    )
    size = forward_batch(batch_size, device)
    x = images.detach().to(device, place.dtype if images.is_floating_point() else images.dtype).split(size)
    y = labels.detach().to(device, torch.long).split(size)
    sums = torch.zeros(2, len(grid[0]), len(grid[1]), dtype=torch.float64, device=device)
    # a model that draws even in evaluation mode must not shift what training draws later
    with evaluation_mode(model), private_random_state():
        for a, along_x in enumerate(grid[0]):
            column = {name: torch.add(w, step_x[name], alpha=along_x) for name, w in base.items()}
            for b, along_y in enumerate(grid[1]):
                point = {name: torch.add(w, step_y[name], alpha=along_y) for name, w in column.items()}
                for part, target in zip(x, y, strict=True):
                    logits = torch.func.functional_call(model, {**fixed, **point}, (part,))
                    if logits.ndim != 2 or logits.shape[1] < classes:
                        got = tuple(logits.shape)
                        raise ValueError(
                            f"model: gives {got}; accepted are logits (n, C) with C >= {classes}, as labels has"
                        )
                    logits = logits.float() if logits.dtype in _HALF else logits
                    sums[0, a, b] += functional.cross_entropy(logits, target, reduction="sum")
                    sums[1, a, b] += (logits.argmax(1) == target).sum()
    loss, accuracy = (sums / len(images)).cpu()  # the only wait for the device
    return Surface(loss, accuracy)


def check_data(images: Tensor, labels: Tensor, batch_size: int | None) -> int:
    """The number of classes that the labels need; ValueError for data that :func:`loss_surface` doesn't accept."""
    if not isinstance(images, Tensor) or images.ndim < 2 or len(images) == 0:
        got = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}; accepted is a tensor (n, ...) with n >= 1")
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not whole or labels.shape != images.shape[:1] or int(labels.min()) < 0:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: got {got}; accepted are {len(images)} integers from 0, one for each image")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: got {batch_size!r}; accepted are None and integers from 1")
    return int(labels.max()) + 1


def _coordinates(name: str, values: Sequence[float] | Tensor) -> list[float]:
    numbers = torch.as_tensor(values, dtype=torch.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name}: got {numbers.tolist()}; accepted are one or more finite coordinates")
    return numbers.tolist()


def _check_plane(parameters: Mapping[str, Tensor], origin: Weights, dx: Weights, dy: Weights) -> None:
    if not origin or (unknown := sorted(origin.keys() - parameters.keys())):
        got = f"the unknown {unknown}" if origin else "nothing"
        raise ValueError(f"origin: got {got}; accepted are parameters of the model, {[*parameters]}")
    for what, side in (("origin", origin), ("dx", dx), ("dy", dy)):
        if side.keys() != origin.keys():
            raise ValueError(
                f"{what}: names differ in {sorted(side.keys() ^ origin.keys())}; accepted are those of origin"
            )
        for name, w in side.items():
            if w.shape != parameters[name].shape:
                shapes = f"shape {tuple(w.shape)}; accepted is the model's {tuple(parameters[name].shape)}"
                raise ValueError(f"{what}: {name} has {shapes}")


__all__ = ["Surface", "check_data", "loss_surface"]
