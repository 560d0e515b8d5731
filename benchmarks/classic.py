"""Avalanche's own benchmarks as streams: as they are, or with a validation part, or cut to their first experiences.

`avalanche_stream("SplitMNIST", n_experiences=5)` calls Avalanche's class with the given arguments and describes the
result; `wrap_benchmark` describes any benchmark of either generation (`nc_benchmark`, `class_incremental_benchmark`).
Data, transforms and labels stay Avalanche's, nothing is copied or remapped, and unless a part is asked for the
benchmark itself is handed on. One exception: Tiny ImageNet lists files in the order of the directory, which differs
between machines and with it every seeded choice of images; they are sorted by name here.

Avalanche's loaders unpickle: CIFAR's files come from `cifar` instead, which doesn't, and whatever else a loader
unpickles (CORe50, OpenLORIS, old files of torchvision) may hold plain values only (`pickles.plain_pickles_only`),
unless FIRN_TRUST_PICKLES=1 stands in the environment: no recipe can say so. Their archives and images go through
Avalanche's and torchvision's own code, which isn't bounded as ours is.

`cut_benchmark` holds images out or cuts streams: Avalanche's classic benchmarks have no validation stream.

Cost: the labels of every experience are read once for the fingerprint, 1-3 us a sample, and one image of each.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from avalanche.benchmarks import classic
from avalanche.benchmarks.datasets import TinyImagenet
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario

from avalanche_firn.benchmarks.cifar import avalanche_without_pickles
from avalanche_firn.benchmarks.pickles import plain_pickles_only
from avalanche_firn.benchmarks.streams import Digest, Stream, StreamError, eager_stream, stratified_split

_TRUST = "FIRN_TRUST_PICKLES"
_NOT_DATA = ("CLEARMetric",)  # exported beside the benchmarks; the ExML* ones carry models, not data


def avalanche_benchmarks() -> tuple[str, ...]:
    """Names of Avalanche's classic benchmarks that `avalanche_stream` accepts."""
    return tuple(
        name
        for name, value in sorted(vars(classic).items())
        if name[0].isupper() and callable(value) and not name.startswith("ExML") and name not in _NOT_DATA
    )


def avalanche_stream(
    name: str,
    *,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    first_experiences: int | None = None,
    **kwargs: Any,
) -> Stream:
    """One of Avalanche's classic benchmarks, built with its own arguments and defaults.

    Args:
        name: "SplitMNIST", "SplitCIFAR100", "SplitTinyImageNet", "SplitCUB200", "PermutedMNIST", ...; see
            `avalanche_benchmarks`.
        validation_fraction, split_seed, first_experiences: see `cut_benchmark`. The defaults leave the benchmark alone.
        kwargs: arguments of that class. Without `dataset_root` Avalanche downloads to its own folder; without `seed` or
            `fixed_class_order` it draws the class order from torch's global generator, and a seed reseeds that one.

    Raises:
        StreamError: unknown name, with the nearest ones; a pickle that names code; see also `read_cifar` and
            `cut_benchmark`. Errors of Avalanche itself pass through.
    """
    known = avalanche_benchmarks()
    if name not in known:
        lower = {k.lower(): k for k in known}
        near = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)]
        hint = f"nearest: {', '.join(near)}" if near else f"accepted: {', '.join(known)}"
        raise StreamError(f"Avalanche benchmark {name!r} is unknown; {hint}")
    # on no samples: a wrong fraction or seed is refused before the data is read
    stratified_split([], validation_fraction=validation_fraction, test_fraction=0, seed=split_seed)
    build: Callable[..., Any] = getattr(classic, name)
    with avalanche_without_pickles(build):
        trusted = os.environ.get(_TRUST) == "1"
        benchmark = build(**kwargs) if trusted else _built_from_plain_values(name, build, kwargs)
    _sort_files(benchmark)
    return cut_benchmark(
        name,
        benchmark,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        first_experiences=first_experiences,
    )


def cut_benchmark(
    name: str,
    benchmark: Any,
    *,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    first_experiences: int | None = None,
) -> Stream:
    """An Avalanche benchmark with a validation stream, or with fewer experiences, or both.

    Args:
        name: short name.
        benchmark: of either generation; it isn't changed.
        validation_fraction: part of each class of each training experience, in [0, 1), that leaves the train stream for
            a stream "valid" of as many experiences, see `streams.stratified_split`. Its data is in the transform group
            "eval". A class has the same images held out in every experience that brings it with as many images, such as
            the permutations of PermutedMNIST. 0: there is no such stream.
        split_seed: of the held-out images, 0..2**32-1.
        first_experiences: all streams end after this many experiences; None keeps them all. Class ids stay as they are.

    Returns:
        The benchmark as it is (see `wrap_benchmark`) if nothing is asked for. Else a benchmark of Avalanche's modern
        API over the same datasets: samples, labels, task labels and transforms are those of `benchmark`, and
        `classes_in_this_experience` is a set. The fingerprint covers the images held out and the number of experiences.

    Raises:
        StreamError: a fraction, seed or number out of range, a class with one image in an experience, a benchmark that
            has a validation stream already, or, with `first_experiences`, streams of different lengths.
    """
    whole = wrap_benchmark(name, benchmark)
    streams = dict(benchmark.streams)
    lengths = {part: sum(1 for _ in stream) for part, stream in streams.items()}
    keep = lengths["train"] if first_experiences is None else first_experiences
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= lengths["train"]:
        raise StreamError(f"first_experiences is {keep!r}; accepted: None or 1..{lengths['train']} for {name!r}")
    if keep < lengths["train"] and set(lengths.values()) != {lengths["train"]}:
        raise StreamError(
            f"first_experiences is {keep}, but the streams of {name!r} have {lengths} experiences; accepted: None, or "
            "a benchmark with equally many in each"
        )
    if validation_fraction and "valid" in streams:
        raise StreamError(
            f"validation_fraction is {validation_fraction}, but {name!r} has a validation stream already; accepted: 0"
        )
    parts = {part: [e.dataset for e in islice(stream, keep)] for part, stream in streams.items()}
    digest = Digest()
    digest.add("whole", whole.fingerprint)
    digest.add("first_experiences", str(keep))
    held_out = []
    for position, experience in enumerate(islice(streams["train"], keep)):
        labels = _labels(name, "train", position, experience)
        split = stratified_split(labels, validation_fraction=validation_fraction, test_fraction=0, seed=split_seed)
        if len(split.valid):
            digest.add(f"valid/{position}", split.valid)
            held_out.append(experience.dataset.subset(split.valid.tolist()).eval())
            parts["train"][position] = experience.dataset.subset(split.train.tolist())
    if not held_out and keep == lengths["train"]:
        return whole
    if held_out:
        parts = {"train": parts.pop("train"), "valid": held_out, **parts}
    cut = CLScenario([eager_stream(part, datasets) for part, datasets in parts.items()])
    kept = {int(c) for experience in cut.streams["train"] for c in experience.classes_in_this_experience}
    return replace(
        whole,
        benchmark=cut,
        class_order=tuple(c for c in whole.class_order if c in kept),
        task_sizes=whole.task_sizes[:keep],
        fingerprint=digest.hexdigest(),
    )


def wrap_benchmark(name: str, benchmark: Any) -> Stream:
    """Describes an Avalanche benchmark of either generation; the benchmark itself is kept as it is.

    Class order: the classes as the training experiences bring them; inside an experience the order that the benchmark
    itself remembers, else ascending. Task sizes: classes per training experience. Ids are the labels that the data
    yields, so benchmarks that remap labels are described after the remapping. Class names are the ids. The fingerprint
    covers the labels of every experience and its first image under the evaluation transform (unless that is random),
    which tells two permutations of PermutedMNIST apart; it doesn't cover all pixels.

    Raises:
        StreamError: no train or no test stream, an empty training stream, or experiences without class labels.
    """
    streams = dict(getattr(benchmark, "streams", {}))
    for part in ("train", "test"):
        if part not in streams:
            raise StreamError(
                f"benchmark {name!r} has the streams {sorted(streams)}; accepted: at least train and test"
            )
    remembered = {int(c): i for i, c in enumerate(getattr(benchmark, "classes_order", ()))}
    order: dict[int, None] = {}
    sizes: list[int] = []
    digest = Digest()
    digest.add("name", name)
    for part in sorted(streams):
        for position, experience in enumerate(streams[part]):
            labels = _labels(name, part, position, experience)
            digest.add(f"{part}/{position}", labels)
            if len(labels):
                digest.add("first", _first_image(experience.dataset.eval()))
            if part == "train":
                classes = sorted(np.unique(labels).tolist(), key=lambda c: (remembered.get(c, len(remembered)), c))
                order.update(dict.fromkeys(classes))
                sizes.append(len(classes))
    if not order:
        raise StreamError(f"benchmark {name!r} has an empty training stream; accepted: at least one experience")
    names = tuple(str(c) for c in range(max(order) + 1))
    return Stream(name, benchmark, tuple(order), tuple(sizes), names, digest.hexdigest())


def _built_from_plain_values(name: str, build: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What `build` returns; StreamError if a pickle that it loads names code, whether it minds or not."""
    with plain_pickles_only() as refused:
        try:
            benchmark = build(**arguments)
        except Exception as error:
            if refused:
                raise _distrusted(name, refused) from error
            raise
    if refused:
        raise _distrusted(name, refused)
    return benchmark


def _distrusted(name: str, refused: Sequence[str]) -> StreamError:
    return StreamError(
        f"{name}: {refused[0]}; accepted: files of plain values; or, if you trust whoever made them, set {_TRUST}=1 "
        "in the environment"
    )


def _sort_files(benchmark: Any) -> None:
    """Sorts the files of every class by name, in place, where Avalanche lists a directory. Labels stay where they are,
    and so does what the experiences hold of each class but for the order."""
    pending = [getattr(e, "dataset", None) for stream in getattr(benchmark, "streams", {}).values() for e in stream]
    visited: set[int] = set()
    while pending:
        data = pending.pop()
        if id(data) in visited:
            continue
        visited.add(id(data))
        if isinstance(data, TinyImagenet):
            listed = sorted((label, str(path), path) for label, path in zip(data.targets, data.data, strict=True))
            data.data = [path for _, _, path in listed]
        pending += getattr(data, "_datasets", [])


def _labels(name: str, part: str, position: int, experience: Any) -> np.ndarray:
    """Class ids (N,) int64 of an experience's data."""
    targets = getattr(getattr(experience, "dataset", None), "targets", None)
    if targets is None:
        raise StreamError(
            f"experience {position} of the {part} stream of {name!r} has no dataset with targets; accepted: "
            "classification benchmarks"
        )
    return np.fromiter((int(t) for t in targets), dtype=np.int64, count=len(targets))


def _first_image(data: Any) -> np.ndarray:
    """The first image as an array, empty if two accesses differ or if it is no array at all."""
    first, again = (np.asarray(data[0][0]) for _ in range(2))
    return first if first.dtype != object and np.array_equal(first, again) else np.empty(0)


__all__ = ["avalanche_benchmarks", "avalanche_stream", "cut_benchmark", "wrap_benchmark"]
