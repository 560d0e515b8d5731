"""A report as one HTML file: drawings inside, no script, nothing loaded from elsewhere, all texts escaped.

A content security policy in the page itself forbids whatever this module doesn't write. Readable without a mouse, by a
screen reader, on a phone and on paper: see :mod:`~avalanche_firn.experiments.report_style`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from avalanche_firn.experiments.escapes import html_text as escape
from avalanche_firn.experiments.report_parts import (
    Block,
    Code,
    DataTable,
    Picture,
    Report,
    Section,
    Terms,
    Text,
    unique_name,
)
from avalanche_firn.experiments.report_style import STYLE
from avalanche_firn.experiments.report_svg import inline_svg

__all__ = ["html_report"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LONG = 4  # sections from which on there is a table of contents; our choice
_SHORT = 8  # letters of a heading that stays on one line; our choice
_LETTERS = 24  # of the name of a row, from which on it may be broken; our choice
_NUMERIC = re.compile(r"[-+−]?(\d|nan|inf)")


def html_report(report: Report) -> str:
    """HTML text of a whole report; sections without blocks are left out."""
    sections = [section for section in report.sections if section.blocks]
    taken: set[str] = set()
    anchors = [unique_name(_anchor(section.title), taken) for section in sections]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(report.title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(report.title)}</h1>",
        *(f'<p class="result">{_unbroken(line)}</p>' for line in report.result),
        *(f'<p class="caution" role="note"><strong>CAUTION:</strong> {escape(line)}</p>' for line in report.cautions),
    ]
    if report.facts:
        parts += ['<ul class="facts">', *(f"<li>{escape(line)}</li>" for line in report.facts), "</ul>"]
    if len(sections) >= _LONG:
        links = [
            f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
            for section, anchor in zip(sections, anchors, strict=True)
        ]
        parts += ['<nav aria-label="Contents">', "<ul>", *links, "</ul>", "</nav>"]
    for section, anchor in zip(sections, anchors, strict=True):
        parts += _section(section, anchor)
    return "\n".join([*parts, "</main>", "</body>", "</html>", ""])


def _unbroken(text: str) -> str:
    """Escaped, with numbers kept on a line with what belongs to them."""
    return escape(text).replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")


def _anchor(title: str) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _section(section: Section, anchor: str) -> list[str]:
    heading = f'<h2 id="{anchor}">{escape(section.title)}</h2>'
    return [f'<section aria-labelledby="{anchor}">', heading, *_blocks(section.blocks), "</section>"]


def _blocks(blocks: Sequence[Block]) -> list[str]:
    """Figures that follow each other share a grid; tables, and a single figure before them, stand side by side."""
    parts: list[str] = []
    runs = [list(run) for _, run in groupby(blocks, key=lambda b: type(b) if isinstance(b, Picture | DataTable) else b)]
    flow: list[str] = []
    for place, run in enumerate(runs):
        shown = [line for block in run for line in _block(block)]
        before_table = place + 1 < len(runs) and isinstance(runs[place + 1][0], DataTable)
        if isinstance(run[0], Picture) and len(run) == 1 and before_table:
            flow = shown
        elif isinstance(run[0], Picture):
            parts += ['<div class="figures">', *shown, "</div>"]
        elif isinstance(run[0], DataTable):
            parts += ['<div class="flow">', *flow, *shown, "</div>"]
            flow = []
        else:
            parts += shown
    return parts


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"<p>{_unbroken(block.text)}</p>"]
    if isinstance(block, DataTable):
        return _table(block)
    if isinstance(block, Picture):
        return ["<figure>", f"<figcaption>{escape(block.caption)}</figcaption>", inline_svg(block.svg), "</figure>"]
    if isinstance(block, Code):
        return [f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>']
    if isinstance(block, Terms):
        return ["<dl>", *(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in block.rows), "</dl>"]
    opening = '<details class="printed">' if block.printed else "<details>"
    return [opening, f"<summary>{escape(block.title)}</summary>", *_blocks(block.blocks), "</details>"]


def _table(table: DataTable) -> list[str]:
    long = ' class="long"' if any(len(row[0]) > _LETTERS for row in table.rows) else ""
    words = [_in_words([row[i] for row in table.rows]) for i in range(len(table.heads))]

    def cells(tag: str, values: Sequence[str]) -> str:
        styled = [' class="words"' if i and words[i] else "" for i in range(len(values))]
        if tag == "th":
            styled = [
                look or (' class="short"' if len(v) <= _SHORT else "") for v, look in zip(values, styled, strict=True)
            ]
            found = [f'<th scope="col"{look}>{escape(value)}</th>' for value, look in zip(values, styled, strict=True)]
        else:
            found = [f'<th scope="row"{long}>{escape(values[0])}</th>']
            found += [f"<td{look}>{escape(value)}</td>" for value, look in zip(values[1:], styled[1:], strict=True)]
        return f"<tr>{''.join(found)}</tr>"

    label = escape(table.title)
    parts = [
        '<div class="data">',
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">',
        "<table>",
        f"<caption><span>{escape(table.title)}</span></caption>",
        f"<thead>{cells('th', table.heads)}</thead>",
        "<tbody>",
        *(cells("td", row) for row in table.rows),
        "</tbody>",
        "</table>",
        "</div>",
    ]
    return [*parts, *([f'<p class="note">{escape(table.note)}</p>'] if table.note else []), "</div>"]


def _in_words(column: Sequence[str]) -> bool:
    """Whether a column holds texts, to be set to the left; numbers go to the right."""
    said = [cell for cell in column if cell not in ("-", "")]
    return bool(said) and not all(_NUMERIC.match(cell) for cell in said)
