"""Loaders with the batches of Avalanche's own, made faster: whole batches from memory, seeded workers for files.

A loader is replaced only where the batches stay the same: the same samples in the same order, and the same draws from
the global random generators, so that everything else that is drawn stays the same too.

* Data in memory (:func:`~avalanche_firn.benchmarks.batches.batched`): an epoch is one permutation, a batch one gather.
  Loaders that mix several data sets (replay, several tasks) keep their samplers and get the gather.
* Files read by workers: the workers live through all epochs, and random transforms draw from a seed of their batch.
  Images are therefore the same whatever the number of workers (above 0), and an epoch that is interrupted can be
  repeated without the epochs before it. Other numbers are drawn there than by Avalanche's loader.

Cost: about 15 us per batch beside the gather.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    MultiDatasetDataLoader,
    MultiDatasetSampler,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.dataloader import default_collate

from avalanche_firn.benchmarks.batches import (
    WORKER_TIMEOUT,
    Batchwise,
    JoinedBatches,
    WholeBatches,
    as_it_is,
    batched,
)
from avalanche_firn.plugins.random_state import derived_seed

__all__ = ["MemoryBatches", "WorkerBatches", "draw_order", "faster_loader", "note_iteration"]

_SEVERAL = (
    MultiDatasetDataLoader,
    GroupBalancedDataLoader,
    TaskBalancedDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
)


def note_iteration() -> int:
    """The draw that torch's DataLoader makes from the global generator whenever an iteration starts."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def draw_order(count: int, shuffle: bool) -> tuple[Tensor, int]:
    """The order of an epoch as torch's RandomSampler draws it, (count,) int64, and the seed that decides it.

    Without ``shuffle`` nothing is drawn, and the seed is 0.
    """
    if not shuffle:
        return torch.arange(count), 0
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)), seed


class _Epochs:
    """An iterable over the batches of one data set, drawn anew in each epoch."""

    draws_while_iterating = False
    """The order is drawn before the first batch (a checkpoint asks)."""

    def __init__(self, count: int, batch_size: int, *, shuffle: bool, drop_last: bool) -> None:
        self.count, self.batch_size = count, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def _batches(self) -> tuple[Sequence[Tensor], int]:
        """Positions of each batch of an epoch, and the seed of the epoch."""
        started = note_iteration()
        order, seed = draw_order(self.count, self.shuffle)
        places = order[: len(self) * self.batch_size].split(self.batch_size) if len(self) else ()
        return places, seed if self.shuffle else started


class MemoryBatches(_Epochs):
    """Batches of data in memory.

    :param data: from :func:`~avalanche_firn.benchmarks.batches.batched`. :param dataset: what it was made from, for
        plugins that look at a loader's data set.
    """

    def __init__(
        self, data: WholeBatches, batch_size: int, *, shuffle: bool, drop_last: bool = False, dataset: Any = None
    ) -> None:
        super().__init__(len(data), batch_size, shuffle=shuffle, drop_last=drop_last)
        self.data, self.dataset = data, dataset

    def _batches(self) -> tuple[Sequence[Tensor], int]:
        note_iteration()
        order, seed = draw_order(self.count, self.shuffle)
        order = order[: len(self) * self.batch_size].to(self.data.device)  # once, so that no step waits for a copy
        return order.split(self.batch_size) if len(self) else (), seed

    def __iter__(self) -> Iterator[list[Tensor]]:
        return map(self.data.fetch, self._batches()[0])


class WorkerBatches(_Epochs):
    """Batches that worker processes load; one set of workers for all epochs.

    :param dataset: an Avalanche data set. :param num_workers: at least 1. :param prefetch_factor: batches that each
        worker holds ready. :param persistent: keep the workers from epoch to epoch. :param collate_fn: of the loader.
    :param timeout: seconds to wait for a batch before the workers count as hanging; 0 waits for ever.
    """

    loads = "seeded processes"
    """Who draws the random numbers of transforms (a checkpoint asks)."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool = False,
        num_workers: int,
        prefetch_factor: int = 4,
        persistent: bool = True,
        pin_memory: bool = False,
        collate_fn: Any = default_collate,
        timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(len(dataset), batch_size, shuffle=shuffle, drop_last=drop_last)
        self.dataset = dataset
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            "prefetch_factor": prefetch_factor,
            "pin_memory": pin_memory,
            "collate_fn": collate_fn,
            "timeout": timeout,
        }
        self._sampler = _Given()
        self._loader = self._new_loader(self._sampler, persistent_workers=persistent)
        self._busy = False

    def __iter__(self) -> Iterator[Any]:
        places, seed = self._batches()
        return self._epoch([[derived_seed(seed, n), *rows.tolist()] for n, rows in enumerate(places)])

    def _epoch(self, batches: list[list[int]]) -> Iterator[Any]:
        if self._busy:  # lasting workers serve one epoch at a time; one that is begun within it gets its own
            yield from self._new_loader(_Given(batches))
            return
        self._busy, self._sampler.batches = True, batches
        try:
            yield from self._loader
        finally:
            self._busy = False

    def _new_loader(self, sampler: _Given, *, persistent_workers: bool = False) -> DataLoader[Any]:
        return DataLoader(
            _Seeded(self.dataset),
            batch_sampler=sampler,  # type: ignore[arg-type]
            persistent_workers=persistent_workers,
            generator=torch.Generator(),  # what the loader draws for itself is of no consequence
            **self._options,
        )


class _Given(Sampler[list[int]]):
    """Batches that somebody else has drawn."""

    def __init__(self, batches: Sequence[list[int]] = ()) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Seeded(Dataset):
    """Seeds the worker's generators before each batch; the first entry of a batch is its seed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list[int]) -> list[Any]:
        seed, *rows = batch
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return [self.dataset[row] for row in rows]


def faster_loader(
    loader: Any,
    *,
    prefetch_factor: int = 4,
    persistent_workers: bool = True,
    timeout: float = WORKER_TIMEOUT,
) -> Any:
    """A loader with the same batches as ``loader``, or ``loader`` itself where nothing better is known.

    :param loader: of a training experience: torch's DataLoader or one of Avalanche's.
    :param timeout: seconds to wait for a batch of worker processes; also set on a loader that is returned as it is.
    """
    workers = {"prefetch_factor": prefetch_factor, "persistent": persistent_workers, "timeout": timeout}
    if type(loader) in _SEVERAL:
        if loader.loader_kwargs.get("num_workers", 0):
            loader.loader_kwargs.setdefault("timeout", timeout)
        if not loader.distributed_sampling and not loader.never_ending:
            return _of_several(loader, workers)
    elif type(loader) is DataLoader:
        given = bool(loader.timeout)
        if loader.num_workers and not given:
            loader.timeout = timeout
        if type(loader.batch_sampler) is BatchSampler:
            return _of_one(loader, workers, keep=given)
    return loader


def _of_several(loader: Any, workers: dict[str, Any]) -> Any:
    options, data = loader.loader_kwargs, [batched(dataset) for dataset in loader.datasets]
    plain = set(options) <= {
        *("num_workers", "shuffle", "drop_last", "pin_memory", "persistent_workers", "batch_size", "collate_fn"),
        "timeout",
    }
    shuffle, drop_last = options.get("shuffle", False), options.get("drop_last", False)
    collate_fn = options["collate_fn"]
    if collate_fn is not default_collate:
        data = [None] * len(data)  # whole batches are collated as torch does it
    if len(data) == 1 and plain:
        settings = {"shuffle": shuffle, "drop_last": drop_last}
        if data[0] is not None:
            return MemoryBatches(data[0], loader.batch_sizes[0], **settings, dataset=loader.datasets[0])
        if options.get("num_workers", 0):
            return WorkerBatches(
                loader.datasets[0],
                loader.batch_sizes[0],
                **settings,
                **{**workers, "timeout": options["timeout"]},
                num_workers=options["num_workers"],
                pin_memory=options.get("pin_memory", False),
                collate_fn=collate_fn,
            )
    found = [part for part in data if part is not None]
    if len(found) < len(data) or len({part.device for part in found}) > 1:
        return loader
    joined = Batchwise(JoinedBatches(found))

    def gathered() -> DataLoader[Any]:
        samplers = loader._create_samplers(loader.datasets, loader.batch_sizes, False, options)
        order = MultiDatasetSampler(
            loader.datasets,
            samplers,
            termination_dataset_idx=loader.termination_dataset,
            oversample_small_datasets=loader.oversample_small_datasets,
        )
        return DataLoader(joined, batch_sampler=order, collate_fn=as_it_is, generator=options.get("generator"))

    loader._get_loader = gathered
    return loader


def _of_one(loader: Any, workers: dict[str, Any], *, keep: bool) -> Any:
    """`keep`: workers that it has stay as they are, since somebody has set them up with care."""
    batches, sampler = loader.batch_sampler, loader.batch_sampler.sampler
    stock = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(loader.dataset)
    )
    settings = {"shuffle": type(sampler) is RandomSampler, "drop_last": batches.drop_last}
    plain = stock and loader.generator is None and loader.worker_init_fn is None
    data = batched(loader.dataset) if loader.collate_fn is default_collate else None
    if data is not None:
        if plain:
            return MemoryBatches(data, batches.batch_size, **settings, dataset=loader.dataset)
        return DataLoader(
            Batchwise(data, loader.dataset), batch_sampler=batches, collate_fn=as_it_is, generator=loader.generator
        )
    if plain and loader.num_workers and loader.multiprocessing_context is None and not keep:
        return WorkerBatches(
            loader.dataset,
            batches.batch_size,
            **settings,
            **workers,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            collate_fn=loader.collate_fn,
        )
    return loader
