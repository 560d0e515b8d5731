"""What is known of an image file that a stream reads: its class and its split, for messages.

Looks through the data sets of the stream (those of :class:`~avalanche_firn.benchmarks.image_files.ImageFiles` know the
path of every image). Only called when something is wrong; 0.1 us per image then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche_firn.benchmarks.data_trees import Leaf, find_leaves, mapped_targets
from avalanche_firn.benchmarks.streams import Stream

__all__ = ["describe_file"]


def describe_file(stream: Stream, text: str) -> str:
    """Class and split of the file that `text` names, such as ``class 'otter', train``; "" where it names none.

    Args:
        stream: that reads the file.
        text: of a message.
    """
    for leaf in find_leaves(stream.benchmark):
        row = _row(getattr(leaf.data, "paths", ()), text)
        if row is not None:
            return _described(leaf, row, stream.class_names)
    return ""


def _row(paths: Sequence[Any], text: str) -> int | None:
    """Of the file whose path stands in the text; the longest one, as a path may begin another."""
    found = [(len(str(path)), row) for row, path in enumerate(paths) if str(path) in text]
    return max(found)[1] if found else None


def _described(leaf: Leaf, row: int, names: Sequence[str]) -> str:
    targets = mapped_targets(leaf)
    parts = sorted(leaf.parts, key=lambda part: part != "train")
    if targets is None or not 0 <= targets[row] < len(names):
        return ", ".join(parts)
    return ", ".join([f"class {names[targets[row]]!r}", *parts])
