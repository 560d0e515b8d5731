"""Drawings for a page: unique ids, colours with roles, text as text, few digits; what they say without being seen."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from avalanche_firn.evaluation.dynamics_figures import block_effect_figure, loss_map_figure, task_curves_figure
from avalanche_firn.evaluation.figures import EMPTY, GRID, INK, MUTED, PALETTE, curves_figure, task_matrix_figure
from avalanche_firn.experiments.report_svg import ROLES, inline_svg, standalone_svg, svg_of

HOSTILE = '</svg><script>alert("1")</script>'


def curves() -> Figure:
    return curves_figure({"a & <b>": [[0.1, 0.2, 0.3], [0.2, 0.3, 0.5]], "c": [[0.9, 0.8, 0.7]]})


def matrix() -> Figure:
    return task_matrix_figure(np.array([[1.0, np.nan], [0.5, 0.25]]))


def effects() -> Figure:
    return block_effect_figure(np.array([[-1.0, np.nan], [0.5, -0.25]]))


def losses() -> Figure:
    return loss_map_figure([0, 5, 10], np.array([[1.0, np.nan], [0.5, 2.0], [0.1, 0.2]]))


FIGURES = [curves, matrix, effects, losses, lambda: task_curves_figure([0, 5], [[1.0, 2.0], [0.5, 1.0]])]


@pytest.mark.parametrize("draw", FIGURES)
def test_drawing_can_stand_in_a_page(draw) -> None:
    svg = svg_of(draw(), name="one.two", title=HOSTILE, description="97 % & <more>")
    root = ElementTree.fromstring(svg)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and all(found.startswith("one.two-") for found in ids)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert {a or b for a, b in references} | {"one.two-title", "one.two-desc"} == set(ids)
    assert root.get("role") == "img" and root.get("aria-labelledby") == "one.two-title one.two-desc"
    assert root[0].text == HOSTILE and root[1].text == "97 % & <more>"
    tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
    assert not tags & {"style", "metadata", "script"} and "text" in tags
    assert "<script" not in svg and "DejaVu" not in svg and "xlink" not in svg
    assert "#000000" not in re.sub(r"<text.*?</text>", "", svg)  # black is for numbers in coloured cells only


@pytest.mark.parametrize("draw", FIGURES)
def test_colours_follow_the_page(draw) -> None:
    svg = svg_of(draw(), name="a", title="t", description="d")
    page, file = inline_svg(svg), standalone_svg(svg)
    assert "var(--ink)" in page and "var(--muted)" in page
    assert not any(colour in page for colour in ROLES) and "://" not in page
    assert INK.lower() in file and "var(" not in file
    assert file.startswith("<?xml") and file.index("#ffffff") < file.index(INK.lower())
    ElementTree.fromstring(file.encode())


def test_what_was_not_measured_lets_the_page_through() -> None:
    for draw in (matrix, effects, losses):
        assert f"fill:{EMPTY}" in svg_of(draw(), name="a", title="t", description="d")
    assert GRID in svg_of(curves(), name="a", title="t", description="d")
    assert MUTED in svg_of(curves(), name="a", title="t", description="d")


def test_text_stays_text_and_numbers_in_it_stay_whole() -> None:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([1.23456789, 2.0], [0.123456789, 0.5], color=PALETTE[0])
    axes.set_xticks([1.23456789], ["1.23456789"])
    svg = svg_of(figure, name="a", title="t", description="0.000123456")
    assert ">1.23456789</text>" in svg and "0.000123456" in svg
    paths = re.findall(r' d="([^"]*)"', svg)
    assert paths and not any(re.search(r"\.\d{3}", path) for path in paths)


def test_same_figure_gives_the_same_bytes_under_every_name() -> None:
    first, second, other = (svg_of(curves(), name=name, title="t", description="d") for name in ("a", "a", "b"))
    assert first == second and first != other
    assert set(re.findall(r'id="([^"]+)"', first)).isdisjoint(re.findall(r'id="([^"]+)"', other))
