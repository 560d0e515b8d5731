"""Avalanche's own benchmarks as streams, passed through untouched.

`avalanche_stream("SplitMNIST", n_experiences=5)` calls Avalanche's class with the given arguments and describes the
result; `wrap_benchmark` describes any benchmark of either generation (`nc_benchmark`, `class_incremental_benchmark`).
Data, transforms, labels and experiences stay Avalanche's: nothing is copied, sorted or remapped.

Cost: the labels of every experience are read once for the fingerprint, 1-3 us a sample, and one image of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
from avalanche.benchmarks import classic

from avalanche_firn.benchmarks.streams import Digest, Stream, StreamError

_NOT_DATA = ("CLEARMetric",)  # exported beside the benchmarks; the ExML* ones carry models, not data


def avalanche_benchmarks() -> tuple[str, ...]:
    """Names of Avalanche's classic benchmarks that `avalanche_stream` accepts."""
    return tuple(
        name
        for name, value in sorted(vars(classic).items())
        if name[0].isupper() and callable(value) and not name.startswith("ExML") and name not in _NOT_DATA
    )


def avalanche_stream(name: str, **kwargs: Any) -> Stream:
    """One of Avalanche's classic benchmarks, built with its own arguments and defaults.

    Args:
        name: "SplitMNIST", "SplitCIFAR100", "SplitTinyImageNet", "SplitCUB200", "PermutedMNIST", ...; see
            `avalanche_benchmarks`.
        kwargs: arguments of that class. Without `dataset_root` Avalanche downloads to its own folder; without `seed` or
            `fixed_class_order` it draws the class order from torch's global generator, and a seed reseeds that one.

    Raises:
        StreamError: unknown name, with the nearest ones. Errors of Avalanche itself pass through.
    """
    known = avalanche_benchmarks()
    if name not in known:
        lower = {k.lower(): k for k in known}
        near = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)]
        hint = f"nearest: {', '.join(near)}" if near else f"accepted: {', '.join(known)}"
        raise StreamError(f"Avalanche benchmark {name!r} is unknown; {hint}")
    build: Callable[..., Any] = getattr(classic, name)
    return wrap_benchmark(name, build(**kwargs))


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


__all__ = ["avalanche_benchmarks", "avalanche_stream", "wrap_benchmark"]
