"""Streams whose images are decoded once and kept in memory, on the device if they fit.

`hold_in_memory` gives back a stream with the same experiences, samples, labels and order. In the mode "exact" nothing
changes but speed: what is held equals to the bit what the files would give, and a transform that draws random numbers
goes on reading files, in the workers of the loader. In the mode "device" random training transforms are held too, as
far as they are deterministic, and the rest is done for whole batches on the device, see `batched_steps`.

How: the samples at the bottom of the data sets become row numbers, and the transform of each group holds the images,
see `held_images`. Samples of images held on CUDA can't be read by the workers of a loader; batches don't need any.

Cost: decoding once, about an epoch's time; H W bytes per image and channel (150 kB at 224 pixels).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

import numpy as np
import psutil  # comes with Avalanche
import torch
from torch import Tensor

from avalanche_firn.benchmarks.data_trees import GROUPS, Leaf, exchange, find_leaves, mapped_targets
from avalanche_firn.benchmarks.device_transforms import TransformPlan, plan_transform
from avalanche_firn.benchmarks.held_images import FromSource, HeldImages, HeldTransform, MovedImages
from avalanche_firn.benchmarks.image_store import (
    ImageStore,
    Place,
    UnevenImagesError,
    decode,
    digest_of,
    kept_generators,
    read_image,
    read_store,
    stored_file,
    write_facts,
)
from avalanche_firn.benchmarks.named_files import describe_file
from avalanche_firn.benchmarks.streams import Stream, StreamError
from avalanche_firn.benchmarks.tensors import TensorImageDataset

__all__ = ["MemoryReport", "hold_in_memory"]

_SHARE = 0.5  # of the memory that is free; our choice


@dataclass(frozen=True)
class MemoryReport:
    """What `hold_in_memory` did.

    Attributes:
        parts: "train/train", "train/eval", "test/eval", ... (stream and transform group) -> where its images are read:
            "cuda", "cpu", "disk" (a mapped file), "files" (decoded on access, as before), or "unchanged" for data
            that is in memory anyway or that isn't understood. Several, joined by "+", where data sets differ.
        bytes: of all images held.
    """

    parts: dict[str, str]
    bytes: int


class _UnfitError(Exception):
    """Images that can't be held; the message says why."""


class _Space:
    """How many bytes are still free for images, in each kind of memory."""

    def __init__(self, device: torch.device, limit: int | None, folder: Path | None) -> None:
        self.device, self.folder = device, folder
        self._free: dict[str, float] = {"cpu": _SHARE * _free_memory(torch.device("cpu"))}
        if device.type != "cpu":
            self._free[device.type] = _SHARE * _free_memory(device)
        if limit is not None:
            self._free[device.type] = limit

    def place(self, size: int, files: Sequence[Path]) -> list[Place] | None:
        """Places for the stores of one data set, all in the same memory; None where there is no room."""
        for device in (self.device, torch.device("cpu")):
            if size <= self._free[device.type]:
                self._free[device.type] -= size
                return [Place(device) for _ in files] or [Place(device)]
        there = sum(file.stat().st_size for file in files if file.exists())  # of an earlier run, perhaps used again
        if self.folder is None or size > disk_usage(self.folder).free + there:
            return None
        return [Place(torch.device("cpu"), file) for file in files]

    def give_back(self, size: int, place: Place) -> None:
        """What `place` counted too much."""
        if place.file is None:
            self._free[place.device.type] += size

    def __str__(self) -> str:
        return ", ".join(f"{free / 2**20:.0f} MiB on {name}" for name, free in self._free.items())


def hold_in_memory(
    stream: Stream,
    *,
    device: torch.device | str = "cpu",
    limit_bytes: int | None = None,
    folder: str | Path | None = None,
    augmentation: Literal["exact", "device"] = "exact",
    stored_edge: int | None = None,
    quiet: bool = True,
    cache: dict[str, ImageStore] | None = None,
) -> tuple[Stream, MemoryReport]:
    """The same stream with its images in memory.

    What is held: the evaluation images of all streams, and the training images of the train stream if their transform
    draws nothing or `augmentation` is "device". Images go to the device, else to the CPU's memory, else to a file in
    `folder`, else stay files; the train stream comes first. Data that is tensors already (`TensorImageDataset`) is left
    alone, or moved to a CUDA device.

    Args:
        stream: of any kind; it isn't changed. Transforms that aren't understood (see `plan_transform`) stay as they
            are.
        device: where the images are wanted.
        limit_bytes: of images on that device; None: half of the memory that is free there. The CPU's memory in place of
            a CUDA device is always used up to half of what is free.
        folder: for files of images that fit nowhere else; it is made if it is absent. They are used again by later
            runs with the same data and transforms, and written anew where anything differs. That data is the same the
            stream's name and fingerprint, the labels and the first image say; without a fingerprint it never is.
        augmentation: "exact": what is held equals the original to the bit. "device": random training transforms are
            computed for whole batches on the device, with other random numbers, from torch's global CPU generator.
        stored_edge: pixels, with "device", for training images of any size under a transform that begins with a random
            resized crop: their shorter edge is resized to it with antialiasing, and the middle square is stored. An
            approximation, since crops never reach what was cut off. None stores images as they are, which needs equal
            sizes.
        quiet: whether there is no progress bar.
        cache: images that calls with the same dictionary share, so that several runs on the same data (see `folder`)
            decode it once.

    Returns:
        The stream, with the name, class order, task sizes and fingerprint of the original, and what was done.

    Raises:
        StreamError: an argument out of range, or an image that can't be decoded; with "device" also a training
            transform that isn't understood, images of different sizes without `stored_edge`, or no room for them.
    """
    where = _checked(device, limit_bytes, augmentation, stored_edge)
    path = None if folder is None else Path(folder)
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StreamError(f"folder is {path}, which can't be made: {error}; accepted: a folder") from error
    leaves = find_leaves(stream.benchmark)
    space = _Space(where, limit_bytes, path)
    holder = _Holder(stream, space, augmentation == "device", stored_edge, quiet, {} if cache is None else cache)
    replacements: dict[int, tuple[Any, Any]] = {}
    with kept_generators():
        for i in sorted(range(len(leaves)), key=lambda i: "train" not in leaves[i].parts):
            found = holder.hold(i, leaves[i])
            if found is not None:
                replacements[i] = found
    if not replacements:
        return stream, _report(leaves, {})
    benchmark, used = exchange(stream.benchmark, leaves, replacements)
    report = _report(leaves, {i: replacements[i] for i in used})
    return replace(stream, benchmark=benchmark), report


class _Holder:
    """Makes the replacements of the data sets of one stream."""

    def __init__(
        self,
        stream: Stream,
        space: _Space,
        augment: bool,
        edge: int | None,
        quiet: bool,
        cache: dict[str, ImageStore],
    ) -> None:
        self.stream, self.space, self.augment, self.edge, self.quiet = stream, space, augment, edge, quiet
        self.cache = cache

    def hold(self, position: int, leaf: Leaf) -> tuple[Any, Any] | None:
        """The data set in its place and the transforms of its groups; None to leave it alone.

        Raises:
            StreamError: an image that can't be read; where random training transforms were asked for on the device
                also whatever keeps them from it.
        """
        if isinstance(leaf.data, HeldImages):
            return None
        if isinstance(leaf.data, TensorImageDataset):
            return self._moved(leaf)
        plans = self._plans(leaf)
        try:
            return self._held(position, leaf, plans) if plans else None
        except _UnfitError as error:
            if "train" in plans and plans["train"].random:
                place = f"training images of {self.stream.name} ({type(leaf.data).__name__})"
                raise StreamError(f"{place}: {error}") from error
            return None

    def _held(self, position: int, leaf: Leaf, plans: dict[str, TransformPlan]) -> tuple[Any, Any]:
        targets = mapped_targets(leaf)
        if not leaf.understood or targets is None:
            raise _UnfitError("its labels or the way to its samples aren't understood")
        rows = np.flatnonzero(leaf.used)
        facts = {
            "fingerprint": self.stream.fingerprint,
            "stream": self.stream.name,
            "data": position,
            "rows": digest_of(rows, np.asarray(targets, dtype=np.int64)),
        }
        fit = dict(plans)
        stores = self._stores(leaf, fit, rows, facts)
        device = next(iter(stores.values())).device
        groups = {
            group: HeldTransform(stores[_name(fit[group])], fit[group])
            if group in fit
            else FromSource(leaf.data, leaf.x[group])
            for group in GROUPS
        }
        return HeldImages(targets, device), groups

    def _moved(self, leaf: Leaf) -> tuple[Any, Any] | None:
        if self.space.device.type == "cpu" or any(leaf.x.values()) or any(leaf.y.values()) or not leaf.understood:
            return None
        size = sum(value.nbytes for value in vars(leaf.data).values() if isinstance(value, Tensor))
        places = self.space.place(size, [])
        if places is None or places[0].device.type == "cpu":
            return None
        return MovedImages(leaf.data, self.space.device), None

    def _plans(self, leaf: Leaf) -> dict[str, TransformPlan]:
        """The transform groups that can be held."""
        plans: dict[str, TransformPlan] = {}
        wanted = self.augment and "train" in leaf.parts and bool(leaf.x["train"])
        for group in GROUPS:
            needed = group == "train" and wanted
            try:
                plan = plan_transform(leaf.x[group])
            except StreamError as error:
                if needed:
                    raise StreamError(f"training transform of {self.stream.name}: {error}") from error
                continue
            if plan.random and needed:
                plans[group] = plan if self.edge is None else plan.stored(self.edge)
            elif plan.exact:
                plans[group] = plan
        same = [id(step) for step in leaf.x["train"]] == [id(step) for step in leaf.x["eval"]]
        if "train" not in leaf.parts and not same:
            plans.pop("train", None)  # nobody trains on it
        return plans

    def _stores(
        self, leaf: Leaf, plans: dict[str, TransformPlan], rows: np.ndarray, facts: dict[str, Any]
    ) -> dict[str, ImageStore]:
        """A store for each different prefix of `plans`, which loses groups whose images aren't fit to be held."""
        targets = leaf.data.targets
        try:
            with self._named():
                first = read_image(leaf.data, int(rows[0]), int(targets[int(rows[0])]))
        except UnevenImagesError as error:
            raise _UnfitError(str(error)) from error
        probes: dict[str, Tensor] = {}
        for group, plan in list(plans.items()):
            try:
                probes.setdefault(_name(plan), plan.load(first))
            except Exception as error:  # steps that don't take what this data set gives
                if plan.random or len(plans) == 1:
                    raise _UnfitError(f"its transform doesn't take its images: {error}") from error
                del plans[group]
        named = {_name(plan): plan for plan in plans.values()}
        about = {
            name: {**facts, "steps": plan.signature, "first": digest_of(probes[name].numpy())}
            for name, plan in named.items()
        }
        folder = self.space.folder or Path()
        files = [stored_file(folder, self.stream.name, about[name]) for name in named]
        keys = {name: stored_file(Path(), str(self.space.device), about[name]).name for name in named}
        known = bool(self.stream.fingerprint)  # without one nobody can say whether images are the same
        if known and all(keys[name] in self.cache for name in named):
            return {name: self.cache[keys[name]] for name in named}
        size = len(rows) * sum(probes[name].numel() for name in named)
        places = self.space.place(size, files)
        if places is None:
            raise _UnfitError(f"its images don't fit: there is room for {self.space}; accepted: more, or a folder")
        stores: dict[str, ImageStore] = {}
        for name, place in zip(named, places, strict=True):
            if place.file is not None:
                kept = read_store(place.file, about[name], rows, len(targets)) if known else None
                if kept is not None:
                    stores[name] = kept
                else:
                    with suppress(FileNotFoundError):
                        place.file.with_suffix(".json").unlink()  # what it describes is about to be replaced
        missing = [name for name in named if name not in stores]
        if missing:
            loaders = [named[name].load for name in missing]
            to = [place for name, place in zip(named, places, strict=True) if name in missing]
            label = f"decoding {self.stream.name}"
            try:
                with self._named():
                    new = decode(leaf.data, targets, rows, loaders, to, label=label, quiet=self.quiet)
            except UnevenImagesError as error:
                self.space.give_back(size, places[0])
                raise _UnfitError(str(error)) from error
            except OSError as error:  # a disk that has become full meanwhile, a quota
                raise _UnfitError(f"they can't be written to {self.space.folder}: {error}") from error
            stores |= dict(zip(missing, new, strict=True))
            self.space.give_back(size - sum(store.nbytes for store in stores.values()), places[0])
        for name in missing:
            if stores[name].place.file is not None:
                write_facts(stores[name], about[name])
        if known:
            self.cache |= {keys[name]: stores[name] for name in named}
        return stores

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An image that can't be read is told with its class and split."""
        try:
            yield
        except UnevenImagesError:
            raise
        except StreamError as error:
            known = describe_file(self.stream, str(error))
            raise StreamError(f"{error} ({known})" if known else str(error)) from error


def _report(leaves: Sequence[Leaf], replaced: dict[int, tuple[Any, Any]]) -> MemoryReport:
    places: dict[str, Counter[str]] = {}
    stores: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        data, groups = replaced.get(i, (None, None))
        for part in sorted(leaf.parts, key=lambda part: part != "train"):
            for group in GROUPS if part == "train" else ("eval",):
                place = "unchanged"
                if groups is not None:
                    transform = groups[group]
                    held = isinstance(transform, HeldTransform)
                    place = str(transform.store.place) if held else "files"
                    if held:
                        stores[id(transform.store)] = transform.store.nbytes
                elif data is not None:
                    place, stores[id(data)] = data.device.type, data.nbytes
                places.setdefault(f"{part}/{group}", Counter())[place] += 1
    return MemoryReport({part: "+".join(sorted(found)) for part, found in places.items()}, sum(stores.values()))


def _name(plan: TransformPlan) -> str:
    return repr(plan.signature)


def _checked(device: Any, limit: Any, augmentation: Any, edge: Any) -> torch.device:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise StreamError(f"limit_bytes is {limit!r}; accepted: None or a whole number of bytes")
    if augmentation not in ("exact", "device"):
        raise StreamError(f"augmentation is {augmentation!r}; accepted: 'exact', 'device'")
    if edge is not None and (isinstance(edge, bool) or not isinstance(edge, int) or edge < 1):
        raise StreamError(f"stored_edge is {edge!r}; accepted: None or a number of pixels, at least 1")
    if edge is not None and augmentation == "exact":
        raise StreamError(f"stored_edge is {edge} with augmentation 'exact'; accepted: None, or augmentation 'device'")
    where = None
    with suppress(RuntimeError, TypeError):
        where = torch.device(device)
    if where is None or where.type not in ("cpu", "cuda"):
        raise StreamError(f"device is {device!r}; accepted: 'cpu', 'cuda' or 'cuda:N'")
    if where.type == "cuda":
        count = torch.cuda.device_count()
        if (where.index or 0) >= count:
            raise StreamError(f"device is {device!r}, but there are {count} CUDA devices; accepted: 'cpu'")
        if where.index is None:  # a tensor's own device has a number
            return torch.device("cuda", torch.cuda.current_device())
    return where


def _free_memory(device: torch.device) -> int:
    """Bytes; of the CPU's memory also what the system could give up."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
