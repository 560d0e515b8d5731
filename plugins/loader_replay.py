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
                "loads": _loads(loader),
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

    def repeat(self, loader: Any, state: dict[str, Any], *, sizes: tuple[int, int] | None = None) -> None:
        """Bring ``loader`` to the recorded place; changes the global random generators.

        :param sizes: images per batch then and now, where they differ: the same images are fetched in other batches.
            Where a loader draws anew while it is iterated, the draws within a step may differ then.
        :raises CheckpointError: the loader gives fewer batches, or batches with other targets.
        """
        self._epochs = []
        for recorded in _recorded(state):
            self.begin(loader)
            epoch = self._epochs[-1]
            _restore(recorded["random"])
            _set_generators(loader, recorded["generators"])
            count = recorded["fetched"]
            if sizes is not None:
                count = len(loader) if recorded["finished"] else count * sizes[0] // sizes[1]
            drawn: list[Any] = []
            for n in range(count + recorded["finished"]):
                if recorded["fetches"] is not None:
                    _restore_fetch(recorded["fetches"], n, sizes)
                    drawn += [capture_random_state(cuda=False)] if sizes is not None else []
                batch = next(self._iterator, None)
                if batch is None and n < count:
                    raise CheckpointError(f"the loader gives {n} batches; the checkpoint had used {count}")
                if n < count:
                    self._note(batch)
            self._compare(epoch, recorded, cut=sizes is not None)
            self._epochs[-1] = {**recorded, "fetched": count, "first": epoch["first"], "loads": epoch["loads"]}
            if drawn:
                self._epochs[-1] |= {"fetches": drawn, "targets": epoch["targets"]}
        _set_generators(loader, state["generators"])

    def _compare(self, epoch: dict[str, Any], recorded: dict[str, Any], *, cut: bool) -> None:
        """The batches of an epoch with the recorded ones.

        The images of the first batch are compared if it holds the same images, and if random transforms drew from the
        same generators: workers have their own. A loader that mixes data sets gives the targets of a step in another
        order in smaller batches.
        """
        same = not cut and recorded.get("loads", epoch["loads"]) == epoch["loads"]
        images = not same or epoch["first"] == recorded["first"]
        targets = (cut and recorded["fetches"] is not None) or epoch["targets"] == recorded["targets"]
        if not images or not targets:
            raise CheckpointError(
                "the loader gives other batches than before: data, order or batch size have changed, or it draws "
                "from a generator that isn't saved"
            )

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


def _restore_fetch(states: list[Any], n: int, sizes: tuple[int, int] | None) -> None:
    """The random state of the n-th fetch, if a fetch of then began with the same image."""
    old, new = (1, 1) if sizes is None else sizes
    if n * new % old == 0 and n * new // old < len(states):
        _restore(states[n * new // old])


def _restore(state: Any) -> None:
    try:
        restore_random_state(state, strict=False)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random state of a loader can't be restored: {error}") from error


_FIELDS = {"random": dict, "generators": list, "fetched": int, "finished": bool, "first": int, "targets": int}


def _recorded(state: Any) -> list[dict[str, Any]]:
    """The epochs of a recorded state, checked."""
    epochs = state.get("epochs") if isinstance(state, dict) else None
    good = isinstance(epochs, list) and bool(epochs) and isinstance(state.get("generators"), list)
    for epoch in epochs if isinstance(epochs, list) else []:
        good = good and isinstance(epoch, dict)
        good = good and all(type(epoch.get(name)) is kind for name, kind in _FIELDS.items()) and epoch["fetched"] >= 0
        good = good and "fetches" in epoch and isinstance(epoch["fetches"], (list, type(None)))
    if not good:
        raise CheckpointError("what the checkpoint says of the loader has another form than a loader's state")
    return list(epochs or ())


def _workers(loader: Any) -> int:
    settings = getattr(loader, "loader_kwargs", {})
    return int(getattr(loader, "num_workers", settings.get("num_workers", 0)) or 0)


def _loads(loader: Any) -> str:
    """Who loads the images, and so whose random numbers their transforms draw."""
    return str(getattr(loader, "loads", "processes" if _workers(loader) else "here"))


def _keeps_workers(loader: Any) -> bool:
    """Workers that live through several epochs carry their random state along."""
    settings = getattr(loader, "loader_kwargs", {})
    return bool(_workers(loader) and getattr(loader, "persistent_workers", settings.get("persistent_workers", False)))


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
        try:
            generator.set_state(state)
        except (TypeError, RuntimeError) as error:
            raise CheckpointError(f"the state of a loader's generator can't be restored: {error}") from error


__all__ = ["LoaderReplay"]
