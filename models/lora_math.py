"""Composition of low-rank updates as functions of tensors, and the linear layer that is trained through it.

LoRAC-IPC (arXiv 2504.13407; formulas of the released code): a weight matrix is ``W = W0 + s sum_i omega_i A_i B_i``
with one pair ``A_i (in, r)``, ``B_i (r, out)`` and one scalar per task; the ``A_i`` are pushed towards orthonormality.

Cost of a training step in :class:`ComposedLinear`: one merge (``in * out * T r`` multiplications, independent of the
batch), then a plain linear layer. Its backward pass gives the gradients of the pair and of all T scalars from products
with ``T r`` columns (or, where that is cheaper or the importance of the matrix is wanted, from the dense gradient,
which is dropped at once). Nothing of size ``(T, in, out)`` exists, against T dense updates kept alive by automatic
differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avalanche_firn.models.processes import mean_over_processes


def compose_delta(A: Tensor, B: Tensor, omega: Tensor, scale: float) -> Tensor:
    """``scale * sum_i omega_i A_i B_i`` as one product of stacked factors.

    :param A: ``(n, in, r)``. :param B: ``(n, r, out)``. :param omega: ``(n,)``; n = 0 gives zeros.
    :returns: ``(in, out)``, differentiable with respect to all three.
    :raises ValueError: shapes that do not fit.
    """
    if A.ndim != 3 or B.ndim != 3 or A.shape[0] != B.shape[0] or A.shape[2] != B.shape[1] or omega.shape != A.shape[:1]:
        raise ValueError(
            f"A, B, omega: expected (n, in, r), (n, r, out), (n,), got {tuple(A.shape)}, {tuple(B.shape)}, "
            f"{tuple(omega.shape)}"
        )
    weighted = A * (scale * omega)[:, None, None]
    return weighted.transpose(0, 1).flatten(1) @ B.flatten(0, 1)


def history_gap(A_history: Tensor) -> Tensor:
    """``||A'A - I||_F^2`` of the history ``(..., in, m)``, the part of the penalty that is constant in a task."""
    A = A_history.detach()
    gram = A.transpose(-1, -2) @ A
    return (gram - torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)).square().sum((-1, -2))


def orthogonality_penalty(A_history: Tensor, A_current: Tensor, *, gap: Tensor | None = None) -> Tensor:
    """``|| [H A]' [H A] - I ||_F``, not squared, with the history H constant.

    The gradient with respect to A stays of the order of one however small the error is (at most 2 for the first task),
    and is 0, not NaN, where the error is exactly 0.

    :param A_history: ``(..., in, m)``, detached here; m = 0 is the first task. :param A_current: ``(..., in, r)``.
    :param gap: :func:`history_gap` of the history, where it is kept from step to step.
    :returns: ``(...)``, a scalar without leading dimensions.
    :raises ValueError: shapes that do not fit.
    """
    if A_history.shape[:-1] != A_current.shape[:-1]:
        raise ValueError(
            f"A_history, A_current: expected (..., in, m) and (..., in, r), got {tuple(A_history.shape)} and "
            f"{tuple(A_current.shape)}"
        )
    history = A_history.detach()
    gap = history_gap(history) if gap is None else gap.detach()
    identity = torch.eye(A_current.shape[-1], dtype=A_current.dtype, device=A_current.device)
    own = A_current.transpose(-1, -2) @ A_current - identity
    cross = history.transpose(-1, -2) @ A_current * 2**0.5  # stands in both off-diagonal blocks
    # one norm over everything: its subgradient at 0 is 0, where a square root of a sum would give NaN
    return torch.linalg.vector_norm(torch.cat([own.flatten(-2), cross.flatten(-2), gap.sqrt()[..., None]], -1), dim=-1)


@dataclass(frozen=True)
class Part:
    """What the backward pass needs to know about one matrix of a layer (a fused qkv has three).

    :param rows: its rows of the layer's weight ``(out, in)``.
    :param scale: s. :param rank: r.
    :param history: ``A (in, m)`` and ``B (m, out)`` of the tasks whose scalars are trained; None where they are not.
    :param slot: whether a pair of the current task takes part.
    :param record: takes the importance of the matrix, mean ``|W G|``, a scalar on the device; None: not wanted.
    """

    rows: slice
    scale: float
    rank: int
    history: tuple[Tensor, Tensor] | None
    slot: bool
    record: Callable[[Tensor], None] | None = None


class ComposedLinear(torch.autograd.Function):
    """``x W' + b`` with a weight that was merged from factors, and the gradients of these factors.

    ``apply(x, bias, weight, parts, *factors)``: ``x (..., in)``, ``weight (out, in)`` merged and detached, ``factors``
    the tensors ``A (in, r), B (r, out)`` of each part with a slot and ``omega (t,)`` of each part with a history, part
    by part.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, parts: Sequence[Part], *factors: Tensor
    ) -> Tensor:
        ctx.parts = parts
        ctx.input_dtype = x.dtype
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, weight, *factors)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(x.dtype)
            dx = (grad @ weight.to(x.dtype)).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            dbias = grad_rows.sum(0) if ctx.needs_input_grad[1] else None
            gradients = _factor_gradients(ctx.parts, rows, grad_rows, weight, list(factors))
        needed = ctx.needs_input_grad[4:]
        return dx, dbias, None, None, *(g if n else None for g, n in zip(gradients, needed, strict=True))


def _factor_gradients(
    parts: Sequence[Part], x: Tensor, grad: Tensor, weight: Tensor, factors: list[Tensor]
) -> list[Tensor]:
    gradients: list[Tensor] = []
    for part in parts:
        slot = (factors.pop(0), factors.pop(0)) if part.slot else None
        if part.history is not None:
            factors.pop(0)  # the gradient of the scalars does not depend on them
        if slot is None and part.history is None:
            continue
        own = grad[:, part.rows]
        dense = part.record is not None or _dense_is_cheaper(part, x.shape[1], own.shape[1])
        compute = _from_dense if dense else _from_rows
        gradients += compute(part, x, own, weight[part.rows], slot)
    return gradients


def _dense_is_cheaper(part: Part, width: int, height: int) -> bool:
    """Multiplications per row of the batch: ``in * out`` against ``(in + out)`` times the number of columns."""
    columns = 0 if part.history is None else part.history[0].shape[1]
    return (columns + 2 * part.rank * part.slot) * (width + height) > width * height


def _from_rows(part: Part, x: Tensor, grad: Tensor, weight: Tensor, slot: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Gradients from ``x A`` and ``dY B'``, without the dense gradient."""
    pairs = [pair for pair in (part.history, slot) if pair is not None]
    A, B = (torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs]))
    down, up = x @ A.to(x.dtype), grad @ B.to(x.dtype).T  # (rows, columns): those of the history, then the pair's
    found: list[Tensor] = []
    if slot is not None:
        own = slice(-part.rank, None)
        found += [(x.T @ up[:, own]).to(A.dtype), (down[:, own].T @ grad).to(B.dtype)]
    if part.history is not None:
        columns = part.history[0].shape[1]
        products = (down[:, :columns] * up[:, :columns]).sum(0, dtype=_at_least_float32(A.dtype))
        found.append(_per_task(products, part).to(A.dtype))
    return [f.mul_(part.scale) for f in found]


def _from_dense(
    part: Part, x: Tensor, grad: Tensor, weight: Tensor, slot: tuple[Tensor, Tensor] | None
) -> list[Tensor]:
    """Gradients from ``G = dY' X``, which also gives the importance of the matrix."""
    dense = (grad.T @ x).to(weight.dtype)  # (out, in)
    found: list[Tensor] = []
    if slot is not None:
        A, B = slot
        found += [dense.T @ B.T, A.T @ dense.T]
    if part.history is not None:
        A, B = part.history
        found.append(_per_task(((dense @ A) * B.T).sum(0), part))
    if part.record is not None:
        part.record(mean_over_processes(dense).mul_(weight).abs_().mean())
    return [f.mul_(part.scale) for f in found]


def _per_task(columns: Tensor, part: Part) -> Tensor:
    return columns.view(-1, part.rank).sum(1)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["ComposedLinear", "Part", "compose_delta", "history_gap", "orthogonality_penalty"]
