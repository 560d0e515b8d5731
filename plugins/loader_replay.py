"""Bring a data loader back to the middle of an epoch: same random state at its start, same number of batches fetched.

A loader can't be saved (its sampler and its workers hold generators, half a permutation and prefetched batches), but it
can be repeated. Recording costs one random state and a checksum of the first batch per epoch, and a checksum of the
targets per batch. Loaders that may draw from the global generators while they are being iterated (several datasets side
by side, unknown samplers) are recorded with the random state of each fetch, about 13 kB and 0.1 ms per batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from avalanche_firn.plugins.checkpoint_files import CheckpointError
from avalanche_firn.plugins.random_state import capture_random_state, restore_random_state


class LoaderReplay:
    """What happened to the loader of an experience so far; one object per run, cleared for each experience."""

    def __init__(self) -> None:
        self._epochs: list[dict[str, Any]] = []
        self._iterator: Iterator[Any] = iter(())
        self._loader: Any = None

    @property
    def used(self) -> int:
        """Batches fetched in the current epoch."""
        return int(self._epochs[-1]["fetched"])

    def clear(self) -> None:
        """Forget the epochs of the last experience."""
        self._epochs.clear()
        self.release()

    def release(self) -> None:
        """Let go of the loader's iterator (and its workers)."""
        self._iterator, self._loader = iter(()), None

    def begin(self, loader: Any) -> None:
        """Start an epoch: note the random state, but fetch nothing yet."""
        if not _keeps_workers(loader):
            self._epochs.clear()  # an earlier epoch has no influence on this one
        self._epochs.append(
            {
                "random": capture_random_state(),
                "generators": [g.get_state() for g in _generators(loader)],
                "fetched": 0,
                "finished": False,
                "first": 0,
                "targets": 0,
                "fetches": [] if _draws_while_iterating(loader) else None,
            }
        )
        self._loader = loader
        self._iterator = _started(loader)

    def batches(self) -> Iterator[Any]:
        """The remaining batches of the epoch."""
        epoch = self._epochs[-1]
        while True:
            if epoch["fetches"] is not None:
                epoch["fetches"].append(capture_random_state(cuda=False))
            try:
                batch = next(self._iterator)
            except StopIteration:
                epoch["finished"] = True
                return
            self._note(batch)
            yield batch

    def state(self) -> dict[str, Any]:
        """Plain values for :meth:`repeat`."""
        generators = [g.get_state() for g in _generators(self._loader)]
        return {"epochs": self._epochs, "generators": generators}

    def repeat(self, loader: Any, state: dict[str, Any]) -> None:
        """Bring ``loader`` to the recorded place; changes the global random generators.

        :raises CheckpointError: the loader gives fewer batches, or batches with other targets.
        """
        self._epochs = []
        for recorded in state["epochs"]:
            self.begin(loader)
            epoch = self._epochs[-1]
            restore_random_state(recorded["random"])
            _set_generators(loader, recorded["generators"])
            for n in range(recorded["fetched"] + recorded["finished"]):
                if recorded["fetches"] is not None:
                    restore_random_state(recorded["fetches"][n])
                batch = next(self._iterator, None)
                if batch is None and n < recorded["fetched"]:
                    raise CheckpointError(
                        f"the loader gives {n} batches; the checkpoint had used {recorded['fetched']}"
                    )
                if n < recorded["fetched"]:
                    self._note(batch)
            if (epoch["first"], epoch["targets"]) != (recorded["first"], recorded["targets"]):
                raise CheckpointError(
                    "the loader gives other batches than before: data, order or batch size have changed, or it draws "
                    "from a generator that isn't saved"
                )
            self._epochs[-1] = dict(recorded)
        _set_generators(loader, state["generators"])

    def _note(self, batch: Any) -> None:
        """Count a batch, and what it can be recognised by.

        The first batch of an epoch comes back to the bit. Later ones may have been augmented with random numbers that
        training had a share in; their targets are still the same.
        """
        epoch = self._epochs[-1]
        parts = [t for t in batch if isinstance(t, Tensor)] if isinstance(batch, (list, tuple)) else []
        if epoch["fetched"] == 0:
            for part in parts:
                epoch["first"] = zlib.crc32(_head(part.cpu()), epoch["first"])
        epoch["fetched"] += 1
        targets = parts[1] if len(parts) > 1 else None
        if targets is not None and targets.device.type == "cpu" and targets.dtype == torch.int64:
            epoch["targets"] = zlib.crc32(_head(targets), epoch["targets"])


def _head(tensor: Tensor) -> memoryview:
    """The first 64 Ki values of a tensor as bytes."""
    values = tensor.detach().contiguous().reshape(-1)[: 2**16]
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _started(loader: Any) -> Iterator[Any]:
    """Iterate from the first ``next`` on; creating the iterator may draw random numbers already."""
    yield from loader


def _keeps_workers(loader: Any) -> bool:
    """Workers that live through several epochs carry their random state along."""
    settings = getattr(loader, "loader_kwargs", {})
    workers = getattr(loader, "num_workers", settings.get("num_workers", 0))
    return bool(workers and getattr(loader, "persistent_workers", settings.get("persistent_workers", False)))


def _draws_while_iterating(loader: Any) -> bool:
    """Whether the order of the batches may depend on global random state after the first fetch."""
    declared = getattr(loader, "draws_while_iterating", None)
    if declared is not None:
        return bool(declared)
    if type(loader) is DataLoader:
        batch_sampler = loader.batch_sampler
        plain = type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) in (
            RandomSampler,
            SequentialSampler,
        )
        return not plain
    datasets = getattr(loader, "datasets", None)  # Avalanche's loaders: a short dataset is shuffled again on the way
    return datasets is None or len(datasets) != 1


def _generators(loader: Any) -> list[torch.Generator]:
    """Private generators of a loader and its samplers, each once."""
    holders = [loader]
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        holders += [sampler, getattr(sampler, "sampler", None)]
    found = [getattr(h, "generator", None) for h in holders]
    found.append(getattr(loader, "loader_kwargs", {}).get("generator"))
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _set_generators(loader: Any, states: list[Tensor]) -> None:
    generators = _generators(loader)
    if len(generators) != len(states):
        raise CheckpointError(f"the loader has {len(generators)} private generators; the checkpoint has {len(states)}")
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


__all__ = ["LoaderReplay"]
