"""Streams from lists of image files, for data sets whose parts are given by lists and not by class folders.

A list holds pairs (path relative to the root with forward slashes, class id) for each part: "train", "test" and perhaps
"valid". Inside a class, and inside a domain, samples keep the order of the lists.

What differs from `folder`: the archives are large, so every listed file is looked up (it must be there) and none is
opened. A file that doesn't decode raises when it is read, and nothing refuses pixels of more than 8 bits per channel.

Cost: 13 us per file (500,000 files in 7 s) if the file system answers from memory; no pixels are decoded before
`__getitem__`.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from avalanche_firn.benchmarks.domains import build_domain_stream
from avalanche_firn.benchmarks.image_files import ImageFiles, check_transforms
from avalanche_firn.benchmarks.streams import (
    Digest,
    Stream,
    StreamError,
    Transform,
    build_stream,
    resolve_class_order,
    stratified_split,
    task_sizes,
)

Files = Mapping[str, Sequence[tuple[str, int]]]

_PARTS = ("train", "valid", "test")
_SHOWN = 3  # names in a message


class _Listed(NamedTuple):
    path: str
    label: int
    size: int  # bytes


def listed_stream(
    name: str,
    root: str | Path,
    *,
    files: Files,
    class_names: Sequence[str],
    tasks: int | Sequence[int],
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
) -> Stream:
    """A class-incremental stream over listed image files.

    Args:
        name: of the stream.
        root: the folder that the paths are relative to.
        files: "train", "test" and perhaps "valid" -> pairs (path, class id). Every part must hold every class.
        class_names: (C,) different names; class ids are positions in it.
        tasks: number of tasks or their class counts, see `streams.task_sizes`.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order: class ids or names in order of appearance; None: natural order, or the one of `seed`.
        seed: makes the class order (`streams.class_order`).
        validation_fraction: part of each class's training files that becomes the validation stream, unless the lists
            have a part "valid". 0: everything is trained on, and without "valid" there is no validation stream.
        split_seed: of that drawn part.

    Returns:
        A stream whose fingerprint covers part, path, class id and file size of every file, in order.

    Raises:
        StreamError: parts other than these, paths that aren't relative or leave the root, a path that is listed twice,
            a class id outside 0..C-1, a class without files in a part, files that aren't there (the first are named,
            with their number), too few files for the validation part, an order or sizes that don't fit.
    """
    check_transforms(train_transform, eval_transform)
    root = _check_root(root)
    class_names = _check_names(class_names)
    _check_files(files, len(class_names), {}, "files")
    for part, listed in files.items():
        absent = sorted(set(range(len(class_names))).difference(label for _, label in listed))
        if absent:
            raise StreamError(f"{name}: {_named(absent, class_names)} in {part!r}; accepted: every class in each part")
    order = resolve_class_order(class_names, class_order, seed)
    sizes = task_sizes(len(class_names), tasks)
    drawn = _draw_valid(files, class_names, validation_fraction, split_seed)
    digest = Digest()
    found = _find_files(root, {"": drawn}, name)[""]
    datasets = {part: _dataset(part, members, root, digest) for part, members in found.items()}
    return build_stream(
        name,
        **datasets,
        class_order=order,
        task_sizes=sizes,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def listed_domain_stream(
    name: str,
    root: str | Path,
    *,
    domains: Mapping[str, Files],
    class_names: Sequence[str],
    train_transform: Transform,
    eval_transform: Transform,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
) -> Stream:
    """A domain-incremental stream over listed image files: one experience per domain, in the order of the mapping.

    Args:
        domains: name of the domain -> its files as in `listed_stream`, all domains with the same parts. A domain may
            lack classes; together the training parts hold every class.
        validation_fraction, split_seed: as in `listed_stream`, for each domain by itself.
        name, root, class_names, train_transform, eval_transform: as in `listed_stream`.

    Returns:
        A stream as `build_domain_stream` makes it, with a fingerprint as in `listed_stream` that covers the names of
        the domains too.

    Raises:
        StreamError: as in `listed_stream`, naming the domain; no domains, domains with different parts or with an
            empty one, a class that no domain trains.
    """
    check_transforms(train_transform, eval_transform)
    root = _check_root(root)
    class_names = _check_names(class_names)
    if not domains:
        raise StreamError(f"{name}: domains is empty; accepted: at least one")
    first, parts = next((domain, set(files)) for domain, files in domains.items())
    seen: dict[str, str] = {}
    drawn = {}
    for domain, files in domains.items():
        _check_files(files, len(class_names), seen, f"domain {domain!r}")
        if set(files) != parts:
            raise StreamError(
                f"domain {domain!r} has the parts {', '.join(sorted(files))} and {first!r} has "
                f"{', '.join(sorted(parts))}; accepted: the same parts in all"
            )
        empty = [part for part, listed in files.items() if not listed]
        if empty:
            raise StreamError(f"domain {domain!r} has no files in {empty[0]!r}; accepted: at least one")
        try:
            drawn[domain] = _draw_valid(files, class_names, validation_fraction, split_seed)
        except StreamError as error:
            raise StreamError(f"domain {domain!r}: {error}") from error
    trained = {label for files in domains.values() for _, label in files["train"]}
    absent = sorted(set(range(len(class_names))) - trained)
    if absent:
        raise StreamError(
            f"{name}: {_named(absent, class_names)} in any domain's 'train'; accepted: some in one domain"
        )
    digest = Digest()
    datasets: dict[str, list[ImageFiles]] = {}
    for domain, found in _find_files(root, drawn, name).items():
        digest.add("domain", domain)
        for part, members in found.items():
            datasets.setdefault(part, []).append(_dataset(part, members, root, digest))
    return build_domain_stream(
        name,
        **datasets,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def is_plain(path: str) -> bool:
    """Whether a path is relative, stays in its folder, and is written with forward slashes in the shortest way."""
    return (
        path == posixpath.normpath(path)
        and path[0] != "/"
        and path.split("/")[0] not in (".", "..")
        and "\\" not in path
    )


def _check_root(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        raise StreamError(
            f"{root} is {'not a folder' if root.exists() else 'absent'}; accepted: the folder of the files"
        )
    return root


def _check_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str) or not len(class_names):
        raise StreamError(f"class_names is {class_names!r}; accepted: a sequence of names, at least one")
    seen: set[str] = set()
    for label in class_names:
        if label in seen:
            raise StreamError(f"class_names holds {label!r} twice; accepted: different names")
        seen.add(label)
    return tuple(class_names)


def _check_files(files: Files, classes: int, seen: dict[str, str], where: str) -> None:
    """Checks parts, paths and labels without touching the disk; `seen` collects path -> where it is listed."""
    unknown = sorted(set(files) - set(_PARTS))
    if unknown or not {"train", "test"} <= set(files):
        held = ", ".join(map(repr, files)) or "none"
        raise StreamError(f"{where} has the parts {held}; accepted: 'train' and 'test', and perhaps 'valid'")
    for part, listed in files.items():
        place = f"{part!r} of {where}"
        for path, label in listed:
            if not is_plain(path):
                raise StreamError(
                    f"{place} lists {path!r}; accepted: a path relative to the root, with forward slashes and without "
                    "'.' and '..'"
                )
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
                raise StreamError(f"{place} gives {path!r} the class {label!r}; accepted: 0..{classes - 1}")
            if path in seen:
                raise StreamError(f"{path!r} is listed in {seen[path]} and again in {place}; accepted: once")
            seen[path] = place


def _draw_valid(files: Files, class_names: Sequence[str], fraction: float, seed: int) -> Files:
    """The parts in the order train, valid, test; "valid" as given, drawn from "train", or absent."""
    train = files["train"]
    split = stratified_split(
        [label for _, label in train],
        validation_fraction=0 if "valid" in files else fraction,
        test_fraction=0,
        seed=seed,
        class_names=class_names,
    )
    if "valid" in files or not len(split.valid):
        return {part: files[part] for part in _PARTS if part in files}
    return {
        "train": [train[i] for i in split.train],
        "valid": [train[i] for i in split.valid],
        "test": files["test"],
    }


def _find_files(root: Path, domains: Mapping[str, Files], name: str) -> dict[str, dict[str, list[_Listed]]]:
    """Looks up every file. Absent ones are counted first, so that one message tells how much is missing."""
    found: dict[str, dict[str, list[_Listed]]] = {}
    missing: list[str] = []
    total = sum(len(listed) for files in domains.values() for listed in files.values())
    prefix = os.fspath(root)
    with tqdm(total=total, desc=f"looking up {name}", unit="file", disable=None, leave=False) as progress:
        for domain, files in domains.items():
            for part, listed in files.items():
                members = found.setdefault(domain, {}).setdefault(part, [])
                for path, label in listed:
                    try:
                        status = os.stat(f"{prefix}/{path}")
                    except OSError:
                        missing.append(path)
                        continue
                    if not stat.S_ISREG(status.st_mode):
                        missing.append(path)
                        continue
                    members.append(_Listed(path, int(label), status.st_size))
                progress.update(len(listed))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise StreamError(
            f"{name}: {len(missing)} of {total} listed files are not in {root}: {', '.join(missing[:_SHOWN])}{more}; "
            "accepted: every listed file there"
        )
    return found


def _dataset(part: str, members: Sequence[_Listed], root: Path, digest: Digest) -> ImageFiles:
    for path, label, size in members:
        digest.add(f"{part}/{path}", f"{label}:{size}")
    return ImageFiles([os.path.join(root, path) for path, _, _ in members], [label for _, label, _ in members])


def _named(classes: Sequence[int], class_names: Sequence[str]) -> str:
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    labels = ", ".join(repr(class_names[c]) for c in classes[:_SHOWN]) + more
    return f"class{'es' if len(classes) > 1 else ''} {labels} without files"


__all__ = ["is_plain", "listed_domain_stream", "listed_stream"]
