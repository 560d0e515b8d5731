"""Rows of a batch shared among the processes of a distributed run, and how all of them get the results.

Every process has the whole batch, computes its own consecutive rows, and gets the rows of the others back in the order
of the batch. What is computed from whole results is then the same in all processes, and the same as in one: losses over
pairs, means over parts of a batch, metrics. In a single process all rows are its own and nothing is sent.

Gradients: the rows of other processes are constants, and the gradient of the own ones is multiplied by the number of
processes, so that the mean over the processes, which ``DistributedDataParallel`` takes, is the gradient of the whole
batch. What is added to a loss from the weights alone is whole in every process, and its mean is itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["all_rows", "mean_over_processes", "own_rows", "process_count", "process_rank", "same_everywhere"]


def process_count() -> int:
    """Number of processes of this run; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_rows(count: int) -> slice:
    """The rows of a batch of ``count`` that this process computes.

    The first ``count % processes`` processes have one more than the others. With fewer rows than processes those
    without a row compute row 0 as well, which :func:`all_rows` leaves out: all take part in every exchange.

    :raises ValueError: ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one row is accepted")
    start, size = _share(count, process_rank())
    return slice(start, start + size) if size else slice(0, 1)


def all_rows(own: Tensor, count: int) -> Tensor:
    """Results of all ``count`` rows from those of the own ones, in the order of the batch; see the module.

    :param own: ``(k * n, ...)`` for the n rows of :func:`own_rows`; k above 1: k results per row, all rows' first
        results before all rows' second ones, as two views of an image are stacked. Any dtype.
    :returns: ``(k * count, ...)``.
    :raises ValueError: a first dimension that is no multiple of n.
    """
    world = process_count()
    rows = own_rows(count)
    size = rows.stop - rows.start
    if own.ndim == 0 or len(own) % size or not len(own):
        raise ValueError(f"the results have shape {tuple(own.shape)} for {size} rows; a multiple of them is accepted")
    if world == 1:
        return own
    views = len(own) // size
    by_row = own.reshape(views, size, *own.shape[1:]).transpose(0, 1)
    whole: Tensor = _Gather.apply(by_row, count)  # type: ignore[no-untyped-call]
    return whole.transpose(0, 1).reshape(views * count, *own.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int) -> Tensor:
        ctx.count, ctx.size = count, len(own)
        return _gathered(own, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start, size = _share(ctx.count, process_rank())
        if not size:  # row 0 of a process without rows
            return gradient.new_zeros(ctx.size, *gradient.shape[1:]), None
        return gradient[start : start + size] * process_count(), None


def _share(count: int, rank: int) -> tuple[int, int]:
    """First row and number of rows of a process."""
    each, more = divmod(count, process_count())
    return each * rank + min(rank, more), each + (rank < more)


def _gathered(own: Tensor, count: int) -> Tensor:
    """Rows of all processes; as bytes, which every backend can send whatever the dtype."""
    world, rank = process_count(), process_rank()
    longest = -(-count // world)
    _, size = _share(count, rank)
    sent = own.new_zeros(longest, *own.shape[1:])
    sent[:size] = own[:size]
    received = torch.empty(world, *sent.shape, dtype=own.dtype, device=own.device)
    if sent.numel():
        dist.all_gather_into_tensor(_bytes(received), _bytes(sent))
    return torch.cat([received[r, : _share(count, r)[1]] for r in range(world)])


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat.view(torch.uint8)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes, in place; as it is in a single one."""
    if process_count() > 1:
        dist.all_reduce(value)
        value /= process_count()
    return value


def same_everywhere(value: Tensor) -> bool:
    """Whether a tensor has the same bits in all processes; waits for the device."""
    world = process_count()
    if world == 1:
        return True
    received = value.new_empty(world, *value.shape)
    dist.all_gather_into_tensor(_bytes(received), _bytes(value.contiguous()))
    sent = _bytes(received).view(world, -1)
    return bool((sent == sent[0]).all())
