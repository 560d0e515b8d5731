"""The report as one HTML file: pictures inside, no script, nothing loaded from elsewhere, all texts escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

__all__ = ["html_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
table { display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: 0.3rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td:not(:first-child) { white-space: nowrap; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figure { margin: 1.5rem 0; } figcaption, .facts { color: #777; }
"""


def html_report(
    title: str,
    facts: Sequence[str],
    tables: Sequence[tuple[str, list[str], list[list[str]]]],
    pictures: Sequence[tuple[str, Path]],
) -> str:
    """HTML text. `tables`: (title, heading, rows); `pictures`: (caption, PNG file), embedded."""
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="facts">{escape(line)}</p>' for line in facts),
    ]
    for name, heads, rows in tables:
        body = "".join(_row("td", row) for row in rows)
        parts.append(f"<h2>{escape(name)}</h2><table><thead>{_row('th', heads)}</thead><tbody>{body}</tbody></table>")
    for caption, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join([*parts, "</body></html>", ""])


def _row(tag: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"
