"""Streams: what a run learns from, and the rules that split classes and samples.

A `Stream` is an Avalanche benchmark (train, validation and test streams, one experience per task) together with the
facts that Avalanche does not keep: class order, task sizes, class names and a fingerprint of the data.

`build_stream` makes one from plain torch datasets. It goes through Avalanche's modern generator with task labels, the
combination on which most Avalanche strategies work (mini-batches are x, y, t), and steps around its traps: class counts
are explicit (`num_experiences` drops the classes that do not divide), the class order is explicit (`seed=` would reseed
torch's global generator), and evaluation streams start in the "eval" transform group.

Cost: building touches labels only, about 2 us per sample and stream; no image is read, no random state is used.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from avalanche.benchmarks import class_incremental_benchmark, with_classes_timeline, with_task_labels
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario, EagerCLStream
from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset, concat_datasets
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.benchmarks.utils.transform_groups import TransformGroups

Transform = Callable[[Any], Any]


class StreamError(ValueError):
    """A stream cannot be built as asked. The message names the field or path, the value and what is accepted."""


class Split(NamedTuple):
    """Sample indices of a stratified split, each sorted and of dtype int64."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Stream:
    """An Avalanche benchmark and what is known about it.

    Attributes:
        name: short name for logs and tables.
        benchmark: the Avalanche benchmark, of either generation.
        class_order: class ids in order of appearance. Labels are never remapped.
        task_sizes: number of classes in each training experience. Sums to `len(class_order)` when every class
            belongs to one experience; domain-incremental benchmarks repeat classes and sum to more.
        class_names: name of class id c at position c.
        fingerprint: SHA-256 of the data and of its split into train, validation and test (not of the class order).
    """

    name: str
    benchmark: Any
    class_order: tuple[int, ...]
    task_sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def train(self) -> Any:
        """The training stream of the benchmark."""
        return self.benchmark.streams["train"]

    @property
    def valid(self) -> Any:
        """The validation stream, or None if the benchmark has none."""
        return self.benchmark.streams.get("valid")

    @property
    def test(self) -> Any:
        """The test stream of the benchmark."""
        return self.benchmark.streams["test"]

    @property
    def num_classes(self) -> int:
        """Number of different classes."""
        return len(self.class_order)

    def joint(self) -> Stream:
        """The same data as one training experience that holds all classes; all other streams are the same objects."""
        train = eager_stream("train", [concat_datasets([experience.dataset for experience in self.train])])
        others = [stream for name, stream in self.benchmark.streams.items() if name != "train"]
        return replace(
            self, name=f"{self.name}-joint", benchmark=CLScenario([train, *others]), task_sizes=(self.num_classes,)
        )


def class_order(num_classes: int, seed: int | None) -> tuple[int, ...]:
    """Order in which the classes appear: 0..num_classes-1 for None, else the permutation that the papers use.

    The permutation is that of NumPy's legacy generator, `RandomState(seed).permutation(num_classes)`, equal to
    `numpy.random.seed(seed)` followed by a global permutation, and frozen by NumPy's compatibility policy.

    Raises:
        StreamError: no classes, or a seed outside 0..2**32-1.
    """
    if num_classes < 1:
        raise StreamError(f"num_classes is {num_classes}; at least 1 is needed")
    if seed is None:
        return tuple(range(num_classes))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise StreamError(f"seed of the class order is {seed!r}; accepted: None (natural order) or 0..2**32-1")
    return tuple(int(c) for c in np.random.RandomState(int(seed)).permutation(num_classes))


def resolve_class_order(
    class_names: Sequence[str], order: Sequence[int] | Sequence[str] | None, seed: int | None
) -> tuple[int, ...]:
    """A given order of class ids or class names, checked, or the one that `seed` makes (see `class_order`).

    Raises:
        StreamError: order and seed both given; an order of wrong length, with repeated or with unknown classes.
    """
    count = len(class_names)
    if order is None:
        return class_order(count, seed)
    if seed is not None:
        raise StreamError(f"class_order and seed={seed} are both given; accepted: one of them")
    if isinstance(order, str) or not isinstance(order, (Sequence, np.ndarray)):
        raise StreamError(f"class_order is {order!r}; accepted: a sequence of {count} class ids or class names")
    ids = {name: c for c, name in enumerate(class_names)}
    known = [ids.get(c, -1) if isinstance(c, str) else c for c in order]
    accepted = f"accepted: each of the {count} classes once, as id 0..{count - 1} or by name"
    unknown = [
        given
        for given, c in zip(order, known, strict=True)
        if isinstance(c, bool) or not isinstance(c, (int, np.integer)) or not 0 <= c < count
    ]
    if unknown:
        raise StreamError(f"class_order holds the unknown classes {_some(unknown)}; {accepted}")
    repeated = sorted(int(c) for c, times in Counter(known).items() if times > 1)
    if repeated:
        raise StreamError(f"class_order repeats the classes {_some(repeated)}; {accepted}")
    if len(known) != count:
        raise StreamError(f"class_order has {len(known)} entries; {accepted}")
    return tuple(int(c) for c in known)


def task_sizes(num_classes: int, tasks: int | Sequence[int]) -> tuple[int, ...]:
    """Number of classes of each task.

    An int is the number of tasks: all get `num_classes // tasks` classes and the last takes what remains, so that no
    class is dropped (10 classes in 3 tasks: 3, 3, 4). A sequence gives the sizes themselves.

    Raises:
        StreamError: more tasks than classes, no task, sizes below 1 or sizes that do not sum to num_classes.
    """
    if isinstance(tasks, (bool, str)) or not isinstance(tasks, (int, np.integer, Sequence, np.ndarray)):
        raise StreamError(f"tasks is {tasks!r}; accepted: the number of tasks or a sequence of class counts")
    if isinstance(tasks, (int, np.integer)):
        if not 1 <= tasks <= num_classes:
            raise StreamError(f"tasks is {tasks}; accepted: 1..{num_classes} tasks for {num_classes} classes")
        size = num_classes // int(tasks)
        return (size,) * (int(tasks) - 1) + (num_classes - size * (int(tasks) - 1),)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in tasks):
        raise StreamError(f"tasks is {list(tasks)}; accepted: class counts of at least 1")
    if sum(tasks) != num_classes:
        raise StreamError(f"tasks {list(tasks)} sum to {sum(tasks)}; accepted: a sum of {num_classes}, the class count")
    return tuple(int(n) for n in tasks)


def increment_sizes(num_classes: int, initial: int, increment: int) -> tuple[int, ...]:
    """Task sizes in the papers' notation: `initial` classes, then `increment` each, the last task takes the rest.

    196 classes with 20 and 20 make nine tasks of 20 and one of 16.
    """
    if not 1 <= initial <= num_classes or increment < 1:
        raise StreamError(
            f"initial={initial}, increment={increment}; accepted: initial 1..{num_classes}, increment at least 1"
        )
    full, rest = divmod(num_classes - initial, increment)
    return (initial,) + (increment,) * full + ((rest,) if rest else ())


def stratified_split(
    targets: Sequence[int] | np.ndarray,
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> Split:
    """Splits every class by its own seeded permutation, so that no class's split depends on the others.

    Counts are the fractions of the class, rounded half up, and at least one image in every part asked for. The
    permutation comes from NumPy's legacy generator seeded with (seed, class): the same everywhere.

    Args:
        targets: (N,) class ids.
        validation_fraction, test_fraction: in [0, 1), sum below 1; 0 leaves that part empty.
        seed: of the split alone, 0..2**32-1.
        class_names: for messages.

    Raises:
        StreamError: fractions out of range, or a class with too few images to fill every part.
    """
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    for field, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise StreamError(f"{field} is {value!r}; accepted: 0 <= fraction < 1")
    if validation_fraction + test_fraction >= 1:
        raise StreamError(f"{fractions} leave nothing to train on; accepted: a sum below 1")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise StreamError(f"seed of the split is {seed!r}; accepted: 0..2**32-1")
    labels = np.asarray(targets)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for c in np.unique(labels).tolist():
        members = np.flatnonzero(labels == c)
        valid, test = (max(1, math.floor(len(members) * f + 0.5)) if f > 0 else 0 for f in fractions.values())
        while valid + test >= len(members) and max(valid, test) > 1:
            valid, test = (valid - 1, test) if valid >= test else (valid, test - 1)
        if valid + test >= len(members):
            name = class_names[c] if class_names is not None else c
            needed = 1 + (valid > 0) + (test > 0)
            raise StreamError(f"class {name!r} has {len(members)} image(s); a {needed}-way split needs {needed}")
        shuffled = members[np.random.RandomState([int(seed), c]).permutation(len(members))]
        blocks = np.split(shuffled, [len(members) - valid - test, len(members) - test])
        for part, block in zip(parts, blocks, strict=True):
            part.append(block)
    return Split(*(np.sort(np.concatenate(part)) if part else np.empty(0, dtype=np.int64) for part in parts))


def build_stream(
    name: str,
    *,
    train: Any,
    test: Any,
    valid: Any = None,
    class_order: Sequence[int],
    task_sizes: Sequence[int],
    class_names: Sequence[str],
    fingerprint: str,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """A class-incremental stream over plain torch datasets.

    Args:
        name: short name.
        train, test, valid: map-style datasets of (x, int label) with an attribute `targets`, the list of their labels.
            Each must hold every class 0..C-1. `valid` may be None.
        class_order, task_sizes: checked ids and counts, from `resolve_class_order` and `task_sizes`.
        class_names: (C,) names.
        fingerprint: SHA-256 of data and split, see `Digest`.
        train_transform, eval_transform: applied to x in the transform groups "train" and "eval" of every dataset. A
            strategy picks the group itself; outside one, `experience.dataset` is in "train" for the train stream and
            in "eval" for the others, and `.train()` / `.eval()` return switched copies. None leaves x as it is.

    Raises:
        StreamError: a dataset that lacks a class, or an order and sizes that do not fit.
    """
    parts = {"train": train, "test": test} if valid is None else {"train": train, "valid": valid, "test": test}
    count = len(class_names)
    if sorted(class_order) != list(range(count)) or sum(task_sizes) != count:
        raise StreamError(f"{name}: class_order and task_sizes must cover the {count} classes once")
    datasets = {}
    for part, data in parts.items():
        absent = set(range(count)).symmetric_difference(data.targets)
        if absent:
            raise StreamError(f"{name}: {part} data must hold exactly the classes 0..{count - 1}; see {_some(absent)}")
        datasets[part] = avalanche_dataset(data, part, train_transform, eval_transform)
    benchmark = with_task_labels(
        class_incremental_benchmark(datasets, class_order=list(class_order), num_classes_per_exp=list(task_sizes))
    )
    return Stream(name, benchmark, tuple(class_order), tuple(task_sizes), tuple(class_names), fingerprint)


def avalanche_dataset(data: Any, part: str, train: Transform | None, evaluation: Transform | None) -> Any:
    """A torch dataset with `targets` as an Avalanche one of task label 0, in the transform group of its part."""
    return TaskAwareSupervisedClassificationDataset(
        [data],
        data_attributes=[DataAttribute(data.targets, "targets"), TaskLabels(ConstantSequence(0, len(data)))],
        transform_groups=_transform_groups(train, evaluation),
    ).with_transforms("train" if part == "train" else "eval")


def eager_stream(name: str, datasets: Sequence[Any]) -> EagerCLStream:
    """A stream of the modern API with one experience per Avalanche dataset, which keeps its transform group.

    The experiences know their classes and, where the data has them, their task labels.
    """
    experiences = [DatasetExperience(dataset=data, current_experience=i) for i, data in enumerate(datasets)]
    stream = with_classes_timeline(EagerCLStream(name, experiences))
    return with_task_labels(stream) if all(hasattr(data, "targets_task_labels") for data in datasets) else stream


def full_stream(experience: Any) -> Any:
    """The whole stream of an experience; the first benchmark generation hands out slices as origin streams."""
    stream = experience.origin_stream
    streams = getattr(getattr(experience, "benchmark", None), "streams", {})
    return streams.get(stream.name, stream)


class Digest:
    """SHA-256 over a sequence of named parts; lengths are hashed too, so that parts cannot run into each other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, value: str | bytes | np.ndarray) -> None:
        """Adds one part. Arrays count with shape and dtype, byte order set to little-endian."""
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            name, data = f"{name}:{array.dtype.str}:{array.shape}", array.tobytes()
        else:
            data = value.encode() if isinstance(value, str) else value
        self._hash.update(f"{len(name.encode())}:{name}:{len(data)}:".encode() + data)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()


def _transform_groups(train: Transform | None, evaluation: Transform | None) -> TransformGroups | None:
    # Without transforms there is no group to pass through: Avalanche's empty groups cost less per sample.
    if train is None and evaluation is None:
        return None
    return TransformGroups({"train": train, "eval": evaluation})


def _some(values: Any, limit: int = 5) -> str:
    listed = list(values)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(repr(value) for value in listed[:limit]) + more


__all__ = [
    "Digest",
    "Split",
    "Stream",
    "StreamError",
    "avalanche_dataset",
    "build_stream",
    "class_order",
    "eager_stream",
    "full_stream",
    "increment_sizes",
    "resolve_class_order",
    "stratified_split",
    "task_sizes",
]
