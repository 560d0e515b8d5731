"""What a report is made of, whatever it is written as: sections of paragraphs, tables, pictures, code and terms.

A report is put together once, from results, and rendered twice, as report.html and as report.md: so the two can't
differ. Nothing here knows HTML or Markdown, and no text is escaped yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = [
    "Block",
    "Code",
    "DataTable",
    "Drawn",
    "Folded",
    "Picture",
    "Report",
    "Section",
    "Terms",
    "Text",
    "unique_name",
]


class Drawn(NamedTuple):
    """A quantity that is drawn over the tasks: its tag in the results, caption, name of its axis, and its kind."""

    tag: str
    caption: str
    axis: str = "accuracy"
    percent: bool = True


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class DataTable:
    """A table; the first cell of every row names the row.

    `title` is its caption, `heads` one text per column, `rows` as many cells each, `note` a line below it.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, with its name (unique in the report, also that of its file) and its text alternative.

    `svg` has the colours of :mod:`~avalanche_firn.experiments.report_svg` that stand for ink and paper.
    """

    name: str
    caption: str
    alternative: str
    svg: str


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is: commands, a configuration."""

    text: str


@dataclass(frozen=True)
class Terms:
    """Definitions: (term, what it means)."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    """Blocks that are opened on demand; `printed` says whether they belong on paper too."""

    title: str
    blocks: Sequence[Block]
    printed: bool = False


Block = Text | DataTable | Picture | Code | Terms | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; a section without blocks isn't shown."""

    title: str
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Report:
    """A whole report: title, the result in words, cautions, other facts, sections."""

    title: str
    result: Sequence[str]
    cautions: Sequence[str]
    facts: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)

    def pictures(self) -> Iterator[Picture]:
        """Every picture, in order."""
        for section in self.sections:
            yield from _pictures(section.blocks)


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Folded):
            yield from _pictures(block.blocks)


def unique_name(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it where it is taken already; what is given is added to `taken`."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    taken.add(found)
    return found
