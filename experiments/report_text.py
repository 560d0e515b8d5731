"""Texts that every report needs: an aligned table for the terminal, the report as Markdown, names of picture files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avalanche_firn.experiments.escapes import markdown_line, one_line, visible
from avalanche_firn.experiments.report_parts import Block, Code, DataTable, Picture, Report, Terms, Text

__all__ = ["Table", "aligned", "file_name", "markdown_report", "over_tasks"]

_LONGEST = 180  # bytes; file systems accept 255, and an ending and that of a temporary file come behind
Table = tuple[str, list[str], list[list[str]]]
"""Title, heading, rows."""


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right, with a rule below the heading."""
    heads, rows = [one_line(head) for head in heads], [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def over_tasks(corner: str, rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table over the tasks; a row that has fewer of them ends in dashes.

    Args:
        corner: heading of the first column.
        rows: a name and one cell per task.
    """
    tasks = max(map(len, rows), default=1) - 1
    heads = [corner, *(f"task {i + 1}" for i in range(tasks))]
    return heads, [[*row, *["-"] * (len(heads) - len(row))] for row in rows]


def markdown_report(report: Report) -> str:
    """Markdown text of a whole report; pictures are linked by the name of their file, which lies beside it."""
    parts = [f"# {markdown_line(report.title)}", ""]
    for line in report.result:
        parts += [f"**{markdown_line(line)}**", ""]
    for line in report.cautions:
        parts += [f"> **CAUTION:** {markdown_line(line)}", ""]
    parts += [*(f"{markdown_line(line)}  " for line in report.facts), ""]
    for section in report.sections:
        if section.blocks:
            parts += [f"## {markdown_line(section.title)}", "", *_blocks(section.blocks)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _blocks(blocks: Sequence[Block]) -> list[str]:
    return [line for block in blocks for line in [*_block(block), ""]]


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [markdown_line(block.text)]
    if isinstance(block, DataTable):
        return _table(block)
    if isinstance(block, Picture):
        told = markdown_line(f"{block.caption}: {block.alternative}", in_brackets=True)
        return [f"![{told}]({block.name}.svg)", "", markdown_line(block.caption)]
    if isinstance(block, Code):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return [fence, visible(block.text.rstrip("\n")), fence]
    if isinstance(block, Terms):
        return [f"- **{markdown_line(term)}**: {markdown_line(text)}" for term, text in block.rows]
    title = markdown_line(block.title)
    return [f"<details><summary>{title}</summary>", "", *_blocks(block.blocks), "</details>"]


def _table(table: DataTable) -> list[str]:
    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(markdown_line(value).replace("|", "\\|") for value in values) + " |"

    rows = [row(values) for values in table.rows]
    lines = [f"### {markdown_line(table.title)}", "", row(table.heads), row(["---"] * len(table.heads)), *rows]
    return lines + (["", markdown_line(table.note)] if table.note else [])


def file_name(label: str) -> str:
    """A label as part of a file name: letters, digits, points, dashes and underscores stay; at most 180 bytes."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in label)
    return name.encode()[:_LONGEST].decode(errors="ignore")
