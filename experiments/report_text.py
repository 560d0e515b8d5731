"""Texts that every report needs: an aligned table for the terminal, the report as Markdown, names of picture files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["Table", "aligned", "file_name", "markdown_report"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, heading, rows."""


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right, with a rule below the heading."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def markdown_report(
    title: str, facts: Sequence[str], tables: Sequence[Table], pictures: Sequence[tuple[str, Path]]
) -> str:
    """Markdown text. `pictures`: (caption, file), linked by the name of the file: they lie beside the report."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    parts = [f"# {title}", "", *(f"{line}  " for line in facts), ""]
    for name, heads, rows in tables:
        parts += [f"## {name}", "", row(heads), row(["---"] * len(heads)), *(row(r) for r in rows), ""]
    for caption, path in pictures:
        parts += [f"![{caption}]({path.name})", ""]
    return "\n".join(parts)


def file_name(label: str) -> str:
    """A label as part of a file name: letters, digits, points, dashes and underscores stay."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in label)
