"""Whole batches from an Avalanche data set: one gather per batch in place of one Python call per sample and level.

An Avalanche data set answers sample by sample, through every level of subsets, concatenations and transform groups.
:func:`batched` looks through these levels once: it finds the data sets at the bottom, the row of each sample there and
the transforms on the way, and gives back an object that fetches any batch with a few calls. It does so only where the
result is the same to the bit: every data set at the bottom must answer whole batches (a method `batch`, or torch's
TensorDataset), and so must every transform on the way (a method `batch`, or none). Elsewhere it gives None, and the
usual path stays. A data set of another kind may say itself how, by a method `as_batches`.

Cost: about 0.1 us per sample for looking through; 16 bytes per sample while the object lives.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.data import _FlatDataWithTransform
from avalanche.benchmarks.utils.flat_data import FlatData
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.dataloader import default_collate

__all__ = ["WORKER_TIMEOUT", "Batchwise", "JoinedBatches", "WholeBatches", "as_it_is", "batched", "loader_of"]

Batch = list[Tensor]

WORKER_TIMEOUT = 300.0
"""Seconds that a batch of worker processes is waited for, torch: for ever; our choice."""


class WholeBatches(Protocol):
    """N samples that are fetched a batch at a time.

    Attributes:
        device: where positions are best kept and where the batch arrives.
    """

    device: torch.device

    def __len__(self) -> int: ...

    def fetch(self, positions: Tensor) -> Batch:
        """The samples at `positions`, (B,) int64 on `device` or the CPU, collated as torch's loader does."""
        ...

    def slice(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`."""
        ...


class _Source(NamedTuple):
    """A data set at the bottom, and the transforms of x on the way up."""

    fetch: Callable[[Tensor], tuple[Tensor, Tensor]]
    transforms: tuple[Callable[[Tensor], Tensor], ...]
    device: torch.device

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.fetch(rows)
        for transform in self.transforms:
            x = transform(x)
        return x, y


class _Unfit(Exception):
    """Some level can't be looked through."""


class BatchedData:
    """Batches of an Avalanche data set: `[x, y]`, or `[x, y, t]` where the samples have task labels."""

    def __init__(self, sources: Sequence[_Source], source_of: np.ndarray, rows: np.ndarray, extra: list[Tensor]):
        used = np.unique(source_of)
        self._sources = [sources[s] for s in used]
        self.device = self._sources[0].device if len({s.device for s in self._sources}) == 1 else torch.device("cpu")
        self._rows = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        self._length = len(rows)
        self._source_of = None
        if len(used) > 1:
            self._source_of = torch.from_numpy(np.searchsorted(used, source_of)).to(self.device)
        self._extra = [values.to(self.device) for values in extra]

    def __len__(self) -> int:
        return self._length

    def fetch(self, positions: Tensor) -> Batch:
        positions = positions.to(self.device)
        rows = self._rows[positions]
        x, y = self._sources[0](rows) if self._source_of is None else self._mixed(rows, self._source_of[positions])
        return [x, y, *(values[positions] for values in self._extra)]

    def slice(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`, the same as `fetch` gives them."""
        rows = self._rows[start:stop]
        x, y = self._sources[0](rows) if self._source_of is None else self._mixed(rows, self._source_of[start:stop])
        return [x, y, *(values[start:stop] for values in self._extra)]

    def _mixed(self, rows: Tensor, source_of: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of several data sets: each gives its own, and they are put in order."""
        places, parts = [], []
        for s, source in enumerate(self._sources):
            here = (source_of == s).nonzero()[:, 0]
            if len(here):
                places.append(here)
                parts.append(tuple(part.to(self.device) for part in source(rows[here])))
        order = torch.cat(places).argsort()
        x, y = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return x, y


class JoinedBatches:
    """Several of them, one after another.

    Args:
        parts: all with the same number of tensors per batch.
        constants: values of a further int64 tensor per batch, one for each part, put in at position 2.
    """

    def __init__(self, parts: Sequence[WholeBatches], constants: Sequence[int] | None = None) -> None:
        self.parts = list(parts)
        self.device = parts[0].device if len({part.device for part in parts}) == 1 else torch.device("cpu")
        self.constants = constants
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        self._length = self._ends[-1]
        self._starts = torch.tensor([0, *self._ends])
        self._inner = self._starts[1:-1].to(self.device)
        self._starts = self._starts.to(self.device)

    def __len__(self) -> int:
        return self._length

    def fetch(self, positions: Tensor) -> Batch:
        positions = positions.to(self.device)
        if len(self.parts) == 1:
            return self._with_constant(0, self.parts[0].fetch(positions))
        owner = torch.searchsorted(self._inner, positions, right=True)
        places, fetched = [], []
        for index, part in enumerate(self.parts):
            here = (owner == index).nonzero()[:, 0]
            if len(here):
                places.append(here)
                batch = self._with_constant(index, part.fetch(positions[here] - self._starts[index]))
                fetched.append([column.to(self.device) for column in batch])
        order = torch.cat(places).argsort()
        return [torch.cat(column)[order] for column in zip(*fetched, strict=True)]

    def slice(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`: whole stretches of the parts."""
        pieces, index = [], bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[index - 1] if index else 0
            end = min(stop, self._ends[index])
            if start < end:
                pieces.append(self._with_constant(index, self.parts[index].slice(start - first, end - first)))
            start, index = end, index + 1
        if len(pieces) == 1:
            return pieces[0]
        return [torch.cat([c.to(self.device) for c in column]) for column in zip(*pieces, strict=True)]

    def _with_constant(self, index: int, batch: Batch) -> Batch:
        if self.constants is None:
            return batch
        return [*batch[:2], torch.full_like(batch[1], self.constants[index]), *batch[2:]]


class Batchwise(Dataset[Any]):
    """Whole batches as torch's DataLoader asks for them; collate with :func:`as_it_is`.

    Args:
        source: the data set that they come from, for those who look at a loader's data set.
    """

    def __init__(self, data: WholeBatches, source: Any = None) -> None:
        self.data, self.source = data, source

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, batch: list[int]) -> Batch:
        return self.data.fetch(torch.tensor(batch))


def as_it_is(batch: Any) -> Any:
    """A batch that needs no collating."""
    return batch


def loader_of(
    dataset: Any, *, num_workers: int = 0, timeout: float = WORKER_TIMEOUT, **options: Any
) -> DataLoader[Any]:
    """torch's DataLoader over a data set, by whole batches and without workers where it is in memory.

    Batches, order and draws from the global generators are the same in both ways.

    Args:
        dataset: with its own `collate_fn`, if it has one.
        num_workers: for data that isn't in memory.
        timeout: seconds to wait for a batch of the workers; 0 waits for ever.
        options: further ones of DataLoader.
    """
    data = batched(dataset)
    if data is None:
        options["collate_fn"] = getattr(dataset, "collate_fn", None)
        return DataLoader(dataset, num_workers=num_workers, timeout=timeout if num_workers else 0, **options)
    if data.device.type != "cpu":
        options.pop("pin_memory", None)
    return DataLoader(Batchwise(data), collate_fn=as_it_is, **options)


def batched(dataset: Any) -> WholeBatches | None:
    """The data set as whole batches, in its current transform group; None where that can't be done to the bit.

    Samples must be collated by torch's default function.
    """
    own = getattr(type(dataset), "as_batches", None)
    if own is not None:
        found: WholeBatches | None = dataset.as_batches()
        return found
    if not isinstance(dataset, AvalancheDataset) or not len(dataset):
        return None
    if getattr(dataset, "collate_fn", None) not in (None, default_collate):
        return None
    flat = dataset._flat_data
    try:
        sources, source_of, rows = _look_through(flat, flat._transform_groups.current_group)
        extra = [_values(a, len(rows)) for a in dataset._data_attributes.values() if a.use_in_getitem]
    except _Unfit:
        return None
    return BatchedData(sources, source_of, rows, extra)


def _look_through(node: Any, group: str) -> tuple[list[_Source], np.ndarray, np.ndarray]:
    """Sources below a level, and for each of its samples the source and the row there."""
    if not isinstance(node, FlatData):
        return [_bottom(node)], np.zeros(len(node), dtype=np.int64), np.arange(len(node))
    sources: list[_Source] = []
    source_of, rows = [], []
    for child in node._datasets:
        below, child_source, child_rows = _look_through(child, group)
        source_of.append(child_source + len(sources))
        rows.append(child_rows)
        sources += below
    owner, row = np.concatenate(source_of), np.concatenate(rows)
    if node._indices is not None:
        chosen = np.fromiter(node._indices, dtype=np.int64, count=len(node._indices))
        owner, row = owner[chosen], row[chosen]
    own = _transforms(node, group)
    return [s._replace(transforms=s.transforms + own) for s in sources] if own else sources, owner, row


def _transforms(node: Any, group: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Batched forms of a level's transforms of x, the frozen ones first."""
    found: list[Callable[[Tensor], Tensor]] = []
    if not isinstance(node, _FlatDataWithTransform):
        return ()
    for groups in (node._frozen_transform_groups, node._transform_groups):
        transform = None if groups is None else groups.transform_groups[group]
        if transform is None:
            continue
        steps = getattr(transform, "transforms", None)  # Avalanche's tuple of a transform of x, and perhaps one of y
        if not steps or any(step is not None for step in steps[1:]):
            raise _Unfit
        if steps[0] is not None:
            if not callable(getattr(steps[0], "batch", None)):
                raise _Unfit
            found.append(steps[0].batch)
    return tuple(found)


def _bottom(data: Any) -> _Source:
    if type(data) is TensorDataset and len(data.tensors) == 2 and data.tensors[1].dim() == 1:
        x, y = data.tensors
        if x.device != y.device:
            raise _Unfit
        return _Source(lambda rows: (x.index_select(0, rows), y.index_select(0, rows)), (), x.device)
    if callable(getattr(data, "batch", None)):
        return _Source(data.batch, (), torch.device(getattr(data, "device", "cpu")))
    raise _Unfit


def _values(attribute: Any, count: int) -> Tensor:
    """A data attribute of all samples, as the loader collates it."""
    if not all(isinstance(value, int) for value in attribute.uniques):
        raise _Unfit
    if len(attribute.uniques) == 1:
        return torch.full((count,), next(iter(attribute.uniques)))
    return torch.tensor(list(attribute.data), dtype=torch.int64)
