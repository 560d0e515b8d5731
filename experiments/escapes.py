"""Texts of strangers on their way out: names from folders, configurations, results and errors.

Each kind of output has its own ways to be misled: a terminal by escape sequences and line breaks, HTML and Markdown by
markup, a spreadsheet by cells that begin like a formula, a reader by characters that turn the direction of writing.
What has such a meaning is shown as what it is; all other text stays as it is, to the byte.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

__all__ = ["csv_cell", "html_text", "markdown_line", "one_line", "visible"]

# C0 and C1 but for line feed and tab; soft hyphen and what has no width; marks, embeddings, overrides and isolates of
# the direction of writing; separators of lines and paragraphs; halves of surrogates
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")  # and their wide forms
_ENTITY = re.compile(r"&(?=#?\w+;)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)")


def visible(text: str) -> str:
    """Characters that steer a terminal or can't be seen as ``\\x1b`` or ``\\u202e``; line breaks and tabs stay."""
    return _HIDDEN.sub(lambda found: _named(found.group()), text)


def one_line(text: str) -> str:
    """The same on one line: a break, with the white space around it, becomes a space."""
    first, *others = _BREAKS.split(text)
    if others:  # trimmed piece by piece: a pattern with white space at both ends would look at it again and again
        between = [trimmed for piece in others[:-1] if (trimmed := piece.strip())]
        text = " ".join([first.rstrip(), *between, others[-1].lstrip()])
    return visible(text.replace("\t", " "))


def html_text(text: str) -> str:
    """As content of an element, or of an attribute in quotes."""
    return escape(visible(text), quote=True)


def markdown_line(text: str, *, in_brackets: bool = False) -> str:
    """On one line of Markdown: no HTML, code, formula, link or picture, so that a name can't load anything.

    With `in_brackets` also inside of those of a picture. As an entity and not with a backslash where renderers differ:
    TensorBoard's lets HTML behind a backslash through.
    """
    plain = one_line(text).replace("\\", "\\\\").replace("`", "\\`").replace("$", "\\$")
    plain = _ENTITY.sub("&amp;", plain).replace("<", "&lt;")
    plain = re.sub(r"[\[\]]", r"\\\g<0>", plain) if in_brackets else plain
    return re.sub(r"\](?=[(\[:])", r"]\\", plain)


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _named(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
