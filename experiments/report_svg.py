"""Figures as SVG that fits a page: text as text, few bytes, colours that follow the page's light or dark scheme.

matplotlib writes SVG for one file: ids repeat between files, a style rule applies to everything around it, fonts and
colours are fixed, and numbers have six decimals. :func:`svg_of` draws a figure once and tidies the result; ink, grid
and background are drawn in colours that stand for something (:data:`ROLES`), so :func:`inline_svg` can hand them to the
page's CSS variables, and :func:`standalone_svg` can set them down as they are, on white, for a file of its own.

Cost: 0.05 to 0.4 s a figure, nearly all of it matplotlib's layout.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from avalanche_firn.evaluation.figures import EMPTY, GRID, INK, MUTED, PAPER, PLAIN_TEXTS, inked
from avalanche_firn.experiments.escapes import visible

__all__ = ["ROLES", "inline_svg", "standalone_svg", "svg_of"]

ROLES = {INK.lower(): "--ink", MUTED.lower(): "--muted", GRID.lower(): "--grid"}
ROLES |= {EMPTY.lower(): "--empty", PAPER.lower(): "--paper"}
"""Colour in a drawing -> CSS variable of the page."""
FONT = "system-ui, sans-serif"
_DOTS = 150  # per inch, of the parts that are drawn as pixels; our choice
_GREYS = {"#d9d9d9", "#f2f2f2"}  # of pictures of dynamics: what was not measured
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # what XML doesn't allow in a text
_IDENTITY = re.compile(r"rotate\(-?0 [^)]*\)")


def svg_of(figure: Figure, *, name: str, title: str, description: str) -> str:
    """Draw a figure as SVG.

    Args:
        figure: isn't needed any more afterwards: its colours are changed.
        name: unique on the page; every id in the drawing starts with it. Letters, digits, points, dashes, underscores.
        title: short name for those who can't see the figure.
        description: what it shows, with its numbers.

    Returns:
        One ``<svg>`` element without XML heading, transparent, in the colours of :data:`ROLES`.
    """
    _give_roles(figure)
    text = io.StringIO()
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 0.2}
    with matplotlib.rc_context(look | PLAIN_TEXTS):
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)  # once; saving would draw a second time to do it
            figure.set_layout_engine("none")
        figure.savefig(text, format="svg", facecolor="none", dpi=_DOTS, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(_CONTROL.sub(" ", text.getvalue()))
    _tidy(root)
    _rename(root, name)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    for key in list(root.attrib):
        del root.attrib[key]
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {_round(width, 1)} {_round(height, 1)}",
        "width": _round(width, 0),
        "height": _round(height, 0),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": f"stroke-linejoin:round;stroke-linecap:butt;font-family:{FONT}",
    }
    for tag, content in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = visible(_CONTROL.sub(" ", content))
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def inline_svg(svg: str) -> str:
    """The drawing as part of a page that has the variables of :data:`ROLES`."""
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    for colour, variable in ROLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def standalone_svg(svg: str) -> str:
    """The drawing as a file of its own, on white."""
    start = svg.index("</desc>") + len("</desc>")
    background = '<rect width="100%" height="100%" style="fill:#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:start]}{background}{svg[start:]}\n'


# ----------------------------------------------------------------------- colours
def _give_roles(figure: Figure) -> None:
    """Everything that isn't data gets a colour with a role, and cells that hold nothing let their background through.

    Texts inside of axes keep their colour: they lie on coloured cells.
    """
    inked(figure).patch.set_facecolor("none")
    for line in figure.findobj(Line2D):
        if to_hex(line.get_color()) == "#000000":
            line.set_color(INK)
    for axes in figure.axes:
        axes.patch.set_facecolor("none" if to_hex(axes.get_facecolor()) == PAPER else _pale(axes.get_facecolor()))
        for shown in [*axes.images, *axes.collections]:
            if shown.get_array() is None:
                continue
            bad = shown.get_cmap().get_bad()
            if bad[3] > 0:
                shown.set_cmap(shown.get_cmap().with_extremes(bad=(0, 0, 0, 0)))
                axes.patch.set_facecolor(_pale(tuple(bad)))
            if isinstance(shown, AxesImage):
                shown.set_interpolation("none")  # one pixel a cell, enlarged by the viewer


def _pale(colour: Any) -> str:
    """The colour as hex, greys that mean "not measured" as the one that has a role."""
    found = to_hex(colour, keep_alpha=False)
    return EMPTY if found in _GREYS else found


# --------------------------------------------------------------------- structure
def _tidy(root: ElementTree.Element) -> None:
    """Without name spaces, metadata, style rules, fonts, invisible paths, needless digits and idle groups."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag == f"{_SVG}style" or _invisible(child):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text = visible(element.text) if element.text and element.text.strip() else None
        element.tail = None
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        for key, value in list(element.attrib.items()):
            element.set(key, _attribute(element.tag, key, value))
            if not element.attrib[key]:
                del element.attrib[key]
    _dissolve(root)


def _invisible(element: ElementTree.Element) -> bool:
    return element.tag == f"{_SVG}path" and element.get("style") == "fill: none" and "clip-path" not in element.attrib


def _attribute(tag: str, key: str, value: str) -> str:
    if key == "style":
        parts = [part.strip() for part in value.split(";")]
        kept = [re.sub(r":\s+", ":", part) for part in parts if part and not part.startswith("font-family")]
        return ";".join(_NUMBER.sub(lambda found: _round(found.group(), 2), part) for part in kept)
    if key == "href":
        return re.sub(r"\s", "", value)
    if key == "transform":
        value = _IDENTITY.sub("", value).strip()
        digits = 5 if "matrix" in value else 2  # a factor of an image is multiplied by its pixels
        return _NUMBER.sub(lambda found: _round(found.group(), digits), value)
    if key in ("d", "points") or (key in ("x", "y", "width", "height") and tag != "svg"):
        value = _NUMBER.sub(lambda found: _round(found.group(), 2), value)
        return re.sub(r"\s*\n\s*", "", value) if key == "d" else value
    return value


def _round(number: str, digits: int) -> str:
    text = f"{float(number):.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _dissolve(parent: ElementTree.Element) -> None:
    """Groups that say nothing but an id that nobody refers to are replaced by what they hold."""
    for child in list(parent):
        _dissolve(child)
        if child.tag in ("g", "defs") and not len(child):
            parent.remove(child)
        elif child.tag == "g" and set(child.attrib) <= {"id"}:
            place = list(parent).index(child)
            parent.remove(child)
            for offset, grandchild in enumerate(list(child)):
                parent.insert(place + offset, grandchild)


def _rename(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to become NAME-1, NAME-2, ...; the others go."""
    wanted = set(_referred(root))
    names: dict[str, str] = {}
    for element in root.iter():
        found = element.attrib.pop("id", None)
        if found in wanted:
            names.setdefault(str(found), f"{name}-{len(names) + 1}")
            element.set("id", names[str(found)])
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{names.get(value[1:], value[1:])}")
            elif "url(#" in value:
                element.set(key, _REFERENCE.sub(lambda found: f"url(#{names.get(found[1], found[1])})", value))


def _referred(root: ElementTree.Element) -> Iterable[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                yield value[1:]
            elif "url(#" in value:
                yield from _REFERENCE.findall(value)
