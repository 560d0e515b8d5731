"""What a batch of outputs predicts, computed once for all metrics that ask."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["best_columns"]

_last: tuple[weakref.ref[Tensor] | None, int, tuple[Tensor, Tensor] | None] = (None, 0, None)


def best_columns(output: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its column in each row of (B, C): two tensors (B,), the same ones for the same output.

    The value of a row with a NaN is NaN.
    """
    global _last
    known, version, found = _last
    if output.is_inference():  # nobody counts what is written into it
        return _best(output)
    now = output._version
    if found is not None and known is not None and known() is output and version == now:
        return found
    found = _best(output)
    _last = (weakref.ref(output), now, found)
    return found


@torch.no_grad()
def _best(output: Tensor) -> tuple[Tensor, Tensor]:
    top, column = output.max(1)
    return top, column
