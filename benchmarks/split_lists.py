"""Lists that say which image is trained on and which tests, for data sets without an official split.

Where a paper only says "a random split", this draws one that is the same on every machine, and writes it out, so that
it can be published with the results: names sorted as text, then NumPy's legacy generator, whose permutations are frozen
by NumPy's compatibility policy. Lists of other projects are read too.

The file is plain text. Two header lines hold the format and a SHA-256, which `sha256sum` gives for the rest:

    # avalanche-firn split 1
    # sha256 7d0e...
    train n01443537/art_0.jpg
    test n01443537/art_1.jpg

Cost: 0.05 s for 30,000 names to draw and write, or to read; as YAML 0.6 s, or 6 s where PyYAML lacks libyaml.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from avalanche_firn.benchmarks.listed import is_plain
from avalanche_firn.benchmarks.streams import StreamError

SplitLists = tuple[list[str], list[str]]  # train, test

_HEADER = "# avalanche-firn split 1"
_SHOWN = 3  # names in a message
_BYTES = 2**26  # of a list; our choice: DomainNet's 600,000 names have 25 MB


def seeded_split(names: Sequence[str], fraction: float, seed: int) -> SplitLists:
    """Draws a split that depends on the set of names, the fraction and the seed only.

    Args:
        names: (n,) different names in any order.
        fraction: of them to train on, 0 < fraction < 1; `round(fraction * n)` names.
        seed: 0..2**32-1.

    Returns:
        The names to train on and those to test on, both sorted as text.

    Raises:
        StreamError: a name that is there twice, a fraction or seed out of range, or a part that would be empty.
    """
    _check_draw(fraction, seed)
    ordered = sorted(names)
    _check_distinct(ordered, "names")
    count = round(fraction * len(ordered))
    if not 0 < count < len(ordered):
        raise StreamError(f"{len(ordered)} names with fraction {fraction} leave a part empty; accepted: more names")
    permutation = np.random.RandomState(int(seed)).permutation(len(ordered))
    train, test = (sorted(ordered[i] for i in rows) for rows in np.split(permutation, [count]))
    return train, test


def split_digest(train: Iterable[str], test: Iterable[str]) -> str:
    """SHA-256 of a split, 64 hexadecimal digits: that of the lines of its file below the header."""
    return hashlib.sha256(_body(train, test).encode()).hexdigest()


def write_split(path: str | Path, train: Sequence[str], test: Sequence[str]) -> None:
    """Writes a split to a file, at once or not at all.

    Raises:
        StreamError: a name that is there twice, or no relative path with forward slashes that stays in its folder.
        OSError: the file can't be written.
    """
    path = Path(path)
    for part, names in (("train", train), ("test", test)):
        for name in names:
            _check_name(name, f"{part} names of {path}")
    _check_distinct([*train, *test], f"the names of {path}")
    text = f"{_HEADER}\n# sha256 {split_digest(train, test)}\n{_body(train, test)}"
    with tempfile.TemporaryDirectory(prefix=".split-", dir=path.parent) as temporary:
        part_file = Path(temporary) / path.name
        part_file.write_bytes(text.encode())
        os.replace(part_file, path)


def read_split(path: str | Path) -> SplitLists:
    """Reads what `write_split` wrote.

    Returns:
        The names to train on and those to test on, both sorted as text.

    Raises:
        StreamError: no such file, another format, a name that is there twice or leaves its folder, an unknown part, or
            lines that don't give the digest of the header.
    """
    path = Path(path)
    lines = _read_text(path).splitlines()
    match = re.fullmatch("# sha256 ([0-9a-f]{64})", lines[1].strip()) if len(lines) > 1 else None
    if match is None or lines[0].strip() != _HEADER:
        raise StreamError(f"{path} starts with {lines[:2]}; accepted: {_HEADER!r} and '# sha256 DIGEST'")
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for number, line in enumerate(lines[2:], 3):
        part, _, name = line.partition(" ")
        if part not in parts:
            raise StreamError(f"{path}, line {number}: {line!r}; accepted: 'train PATH' or 'test PATH'")
        _check_name(name, f"{path}, line {number},")
        parts[part].append(name)
    _check_distinct([*parts["train"], *parts["test"]], str(path))
    digest = split_digest(parts["train"], parts["test"])
    if digest != match[1]:
        raise StreamError(f"{path} has the digest {match[1]}, its lines have {digest}; accepted: an unchanged list")
    return sorted(parts["train"]), sorted(parts["test"])


def load_or_draw(path: str | Path, names: Sequence[str], fraction: float, seed: int) -> SplitLists:
    """The split in the file, or else the one that `seeded_split` draws, written to the file once.

    Where the file can't be written (data folders may be read-only) the split is drawn every time, with the same result.

    Args:
        path: of the list.
        names: what is on disk; a list that is there must hold exactly these.
        fraction, seed: see `seeded_split`; without influence where the list is there.

    Raises:
        StreamError: see `read_split` and `seeded_split`; a list that doesn't match the names.
    """
    path = Path(path)
    _check_draw(fraction, seed)  # also where the list is there: a mistake shows at once
    if path.exists():
        train, test = read_split(path)
        check_cover(train, test, names, str(path))
        return train, test
    train, test = seeded_split(names, fraction, seed)
    with contextlib.suppress(OSError):  # the list is a convenience: the seed gives the same split again
        write_split(path, train, test)
    return train, test


def check_cover(train: Sequence[str], test: Sequence[str], names: Sequence[str], where: str) -> None:
    """Refuses (StreamError) lists that don't hold exactly the names on disk; names some of those in only one."""
    listed, there = {*train, *test}, set(names)
    problems = []
    for only, text in ((listed - there, "not on disk"), (there - listed, "on disk and not listed")):
        if only:
            problems.append(f"{len(only)} {text} ({_some(sorted(only))})")
    if problems:
        raise StreamError(f"{where} doesn't match the images: {', '.join(problems)}; accepted: each image listed once")


def read_name_lists(train_file: str | Path, test_file: str | Path) -> SplitLists:
    """Reads the two lists of another project, which may hold the folders of somebody else's machine.

    Accepted in each: plain text with one path per line, perhaps followed by a number (a label, ignored), where empty
    lines and lines that start with # don't count; or YAML (a file that ends in .yaml or .yml) with the paths as a list
    under `data`, without tags and aliases and with every key once.

    Returns:
        The names to train on and those to test on, reduced to the last two components CLASS/FILE and sorted as text.

    Raises:
        StreamError: a file that is absent, malformed or without paths, a path without a folder, a name that is there
            twice, in one list or in both.
    """
    parts = []
    for path in (Path(train_file), Path(test_file)):
        paths = _read_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else _read_lines(path)
        if not paths:
            raise StreamError(f"{path} lists no paths; accepted: one per line, or YAML with a list under 'data'")
        names = []
        for given in paths:
            components = [part for part in re.split(r"[\\/]", given) if part]
            if len(components) < 2 or ".." in components[-2:] or "." in components[-2:]:
                raise StreamError(f"{path} lists {given!r}; accepted: paths that end in CLASS/FILE")
            names.append("/".join(components[-2:]))
        _check_distinct(sorted(names), str(path))
        parts.append(sorted(names))
    train, test = parts
    both = sorted(set(train) & set(test))
    if both:
        raise StreamError(f"{train_file} and {test_file} both list {_some(both)}; accepted: each image in one of them")
    return train, test


def _read_lines(path: Path) -> list[str]:
    lines = (line.strip() for line in _read_text(path).splitlines())
    return [_without_label(line) for line in lines if line and not line.startswith("#")]


def _without_label(line: str) -> str:
    """A line without a number behind white space or commas at its end."""
    path = line.rstrip("0123456789")
    cut = path.rstrip(" \t\xa0\u3000,")
    return cut if len(cut) < len(path) < len(line) else line


def _read_yaml(path: Path) -> list[str]:
    try:
        listed = _listed(_read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StreamError(f"{path} cannot be read as plain YAML: {error}") from error
    if listed is None:
        raise StreamError(f"{path} has no list of paths under 'data'; accepted: YAML with one")
    return listed


def _listed(text: str) -> list[str] | None:
    """The texts of the list under `data`, read event by event: nothing else of the file is built, however deep it is.

    Raises:
        ValueError: tags, aliases, a key that is there twice, or more than one document.
        yaml.YAMLError: no YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML has it
    kinds = yaml.resolver.Resolver()
    keys: set[str] = set()
    listed: list[str] | None = None
    depth = documents = 0
    key: str | None = None  # of the outermost mapping, whose value comes next or is being read
    outermost = inside = False
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) not in (None, "!"):
            raise ValueError(f"a tag or an alias in line {line}; accepted: plain lists and texts")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ValueError("it holds several documents; accepted: one")
        elif isinstance(event, yaml.CollectionStartEvent):
            if depth == 0:
                outermost = isinstance(event, yaml.MappingStartEvent)
            elif depth == 1 and outermost and key is None:
                raise ValueError(f"line {line} has a list or mapping as a key; accepted: texts")
            elif inside:
                return None
            elif depth == 1 and outermost and key == "data":
                if not isinstance(event, yaml.SequenceStartEvent):
                    return None
                listed, inside = [], True
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            if depth == 1:
                key, inside = None, False
        elif isinstance(event, yaml.ScalarEvent):
            if inside and listed is not None:
                if kinds.resolve(yaml.ScalarNode, event.value, event.implicit) != "tag:yaml.org,2002:str":
                    return None
                listed.append(event.value)
            elif depth == 1 and outermost and key is None:
                key = event.value
                if key in keys:
                    raise ValueError(f"the key {key!r} is there twice; accepted: each once")
                keys.add(key)
            elif depth == 1 and outermost:
                key = None
    return listed


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        if path.exists() and (size := path.stat().st_size) > _BYTES:
            raise OSError(f"it has {size:,} bytes, and at most {_BYTES:,} are read")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path} cannot be read: {error}; accepted: a text file in UTF-8") from error


def _body(train: Iterable[str], test: Iterable[str]) -> str:
    return "".join(f"{part} {name}\n" for part, names in (("train", train), ("test", test)) for name in sorted(names))


def _check_draw(fraction: float, seed: int) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise StreamError(f"fraction is {fraction!r}; accepted: 0 < fraction < 1")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise StreamError(f"seed of the split is {seed!r}; accepted: 0..2**32-1")


def _check_name(name: str, where: str) -> None:
    if not is_plain(name) or name != name.strip() or len(name.splitlines()) != 1:
        raise StreamError(f"{where}: {name!r}; accepted: a relative path with forward slashes that stays in its folder")


def _check_distinct(names: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise StreamError(f"{where}: {name!r} is there twice; accepted: each once")
        seen.add(name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


__all__ = [
    "SplitLists",
    "check_cover",
    "load_or_draw",
    "read_name_lists",
    "read_split",
    "seeded_split",
    "split_digest",
    "write_split",
]
