"""Pictures of a comparison: the numbers that they show, the places where they show them, and what they refuse."""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from avalanche_firn.evaluation.comparison_figures import (
    cost_figure,
    differences_figure,
    excludes_zero,
    frozen_map_figure,
    ranking_figure,
    task_confusion_figure,
    task_matrices_figure,
)
from avalanche_firn.evaluation.figures import EMPTY, GRID, INK, MUTED, PALETTE, PAPER, Style, styles_of
from avalanche_firn.evaluation.statistics import mean_interval

INTERVALS = {"slca": mean_interval([0.9, 0.92, 0.88]), "joint (upper bound, not continual)": mean_interval([0.99])}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def inside(figure):
    """Every text lies within the figure."""
    figure.canvas.draw()
    frame, renderer = figure.bbox, figure.canvas.get_renderer()
    found = [t for axes in figure.axes for t in (*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title)]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    found += [t for axes in figure.axes for t in (axes._left_title,)] + figure.texts
    found += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = [t.get_window_extent(renderer) for t in found if t.get_text().strip() and t.get_visible()]
    assert len(boxes) > 3
    for box in boxes:
        assert box.x0 >= frame.x0 - 1 and box.y0 >= frame.y0 - 1
        assert box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1


# ------------------------------------------------------------------------- ranking
def test_ranking_shows_means_intervals_and_numbers_from_top_to_bottom():
    figure = ranking_figure(INTERVALS, xlabel="last accuracy (%)")
    axes = figure.axes[0]
    whisker, dot, single = axes.lines
    np.testing.assert_allclose(whisker.get_xdata(), [100 * INTERVALS["slca"].lower, 100 * INTERVALS["slca"].upper])
    np.testing.assert_allclose(dot.get_xdata(), [90.0])
    np.testing.assert_allclose(single.get_xdata(), [99.0])
    assert [*dot.get_ydata(), *single.get_ydata()] == [0, 1] and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert texts(axes) == ["90.00 ± 4.97", "99.00"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["slca", "joint (upper bound,\nnot continual)"]
    styles = styles_of(INTERVALS)
    assert (dot.get_color(), dot.get_marker()) == (styles["slca"].colour, styles["slca"].marker)
    low, high = axes.get_xlim()
    assert low < 100 * INTERVALS["slca"].lower and high > 99
    inside(figure)


def test_ranking_of_one_value_and_with_given_styles():
    figure = ranking_figure(
        {"a": mean_interval([2.0])}, xlabel="nats", scale=1.0, styles={"a": Style("#123456", "v", "-")}
    )
    assert figure.axes[0].lines[0].get_color() == "#123456" and texts(figure.axes[0]) == ["2.00"]
    assert figure.axes[0].get_xlim()[0] < 2 < figure.axes[0].get_xlim()[1]
    assert tuple(ranking_figure(INTERVALS, xlabel="x", size=(6, 2)).get_size_inches()) == (6, 2)


# --------------------------------------------------------------------- differences
def test_differences_are_filled_where_the_interval_excludes_zero():
    given = {
        "a - b": mean_interval([0.10, 0.11, 0.12]),
        "a - c": mean_interval([-0.10, 0.20, 0.05]),
        "a - d": mean_interval([0.3]),
        "a - e": mean_interval([-0.10, -0.11, -0.12]),
    }
    assert [excludes_zero(interval) for interval in given.values()] == [True, False, False, True]
    figure = differences_figure(given, xlabel="percentage points")
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [to_hex(dot.get_markerfacecolor()) for dot in dots] == [
        PALETTE[0].lower(),
        PAPER,
        PAPER,
        PALETTE[0].lower(),
    ]
    np.testing.assert_allclose([dot.get_xdata()[0] for dot in dots], [11, 5, 30, -11])
    zero = next(line for line in axes.lines if list(line.get_xdata()) == [0.0, 0.0])
    assert to_hex(zero.get_color()) == MUTED and texts(axes)[2] == "30.00"
    assert len(figure.legends[0].get_texts()) == 2
    inside(figure)


def test_zero_is_always_in_the_picture():
    for values in ([0.4, 0.41], [-0.41, -0.4], [0.0]):
        low, high = differences_figure({"a": mean_interval(values)}, xlabel="x").axes[0].get_xlim()
        assert low < 0 < high


# ---------------------------------------------------------------------------- cost
POINTS = {
    "slca": (30.0, 0.9, 0.02),
    "naive": (20.0, 0.2, None),
    "joint (upper bound, not continual)": (300.0, 0.98, 0.01),
}


@pytest.mark.parametrize("log", [False, True])
def test_costs_and_accuracies_with_labels_beside_the_points(log):
    figure = cost_figure(POINTS, xlabel="seconds", ylabel="last accuracy", log=log)
    axes = figure.axes[0]
    assert axes.get_xscale() == ("log" if log else "linear") and figure.legends == []
    dots = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(dots) == list(POINTS)
    for label, (cost, mean, _) in POINTS.items():
        assert (*dots[label].get_xdata(), *dots[label].get_ydata()) == (cost, mean)
    bars = [line for line in axes.lines if line.get_label().startswith("_")]
    np.testing.assert_allclose([bar.get_ydata() for bar in bars], [[0.88, 0.92], [0.97, 0.99]])
    assert {text.replace("\n", " ") for text in texts(axes)} == set(POINTS)
    inside(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for x, y in (axes.transData.transform(POINTS[label][:2]) for label in POINTS):
        assert not any(box.contains(x, y) for box in boxes)


def test_many_or_coinciding_points_get_a_legend():
    generator = np.random.default_rng(0)
    many = {f"method {i}": (float(10 ** generator.uniform(0, 6)), float(generator.random()), 0.01) for i in range(20)}
    same = {f"method {i}": (1.0, 0.5, None) for i in range(12)}
    for points in (many, same):
        figure = cost_figure(points, xlabel="x", ylabel="y", log=points is many)
        assert texts(figure.axes[0]) == []
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(points)
        inside(figure)
        low, high = figure.axes[0].get_xlim()
        assert all(low < cost < high for cost, *_ in points.values())


def test_large_costs_have_readable_ticks():
    figure = cost_figure({"a": (1.2e6, 0.5, None), "b": (8.4e4, 0.4, None)}, xlabel="x", ylabel="y")
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert any(label.endswith((" k", " M")) for label in shown) and max(map(len, shown)) <= 6


# ---------------------------------------------------------------------------- maps
def triangle(tasks, seed=0):
    values = np.random.default_rng(seed).random((tasks, tasks))
    values[np.triu_indices(tasks, 1)] = np.nan
    return values


def test_matrices_on_one_scale_in_one_orientation():
    given = {"joint (upper bound, not continual)": [[0.9, 0.8, 1.0]], "slca": triangle(3), "naive": triangle(3, 1)}
    figure = task_matrices_figure(given, title="all")
    panels = figure.axes[: len(given)]
    for axes, (label, matrix) in zip(panels, given.items(), strict=True):
        assert axes._left_title.get_text().replace("\n", " ") == label
        image = axes.images[0]
        np.testing.assert_array_equal(image.get_array().filled(np.nan), matrix)
        assert image.get_clim() == (0.0, 1.0) and image.get_cmap().name == "viridis"
        assert axes.get_ylim()[0] > axes.get_ylim()[1] and to_hex(axes.get_facecolor()) == EMPTY
        known = np.asarray(matrix)[~np.isnan(matrix)]
        assert texts(axes) == [f"{100 * value:.0f}" for value in known]
    squares = [axes.get_position() for axes in panels]
    width, height = figure.get_size_inches()
    cells = [(p.width * width / 3, p.height * height / n) for p, n in zip(squares, (1, 3, 3), strict=True)]
    np.testing.assert_allclose(cells, cells[0][0])
    assert len(figure.axes) == 4 and "all" in [text.get_text() for text in figure.texts]
    inside(figure)


@pytest.mark.parametrize(("methods", "tasks"), [(1, 1), (20, 1), (2, 5), (7, 5), (2, 10), (7, 20), (1, 100), (20, 100)])
@pytest.mark.parametrize("size", [None, (7.4, 6.0)])
def test_any_number_of_methods_and_tasks(methods, tasks, size):
    figure = task_matrices_figure({f"method {i}": triangle(tasks) for i in range(methods)}, size=size)
    width, height = figure.get_size_inches()
    assert (width, height) == size if size else width == 4.6 and height < 12
    places = [axes.get_position() for axes in figure.axes[:methods]]
    assert all(p.x0 >= 0 and p.x1 <= 1 and p.y0 > 0.3 / height and p.y1 <= 1 for p in places)
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    assert tasks < 20 or not any(texts(axes) for axes in figure.axes)


def test_a_hundred_ticks_are_thinned():
    axes = task_matrices_figure({"a": triangle(100)}).axes[0]
    assert 3 < len(axes.get_xticks()) < 30 and axes.get_xticks()[0] == 0


@pytest.mark.parametrize("none", [False, True])
def test_confusion(none):
    shares = np.array([[0.75, 0.25], [np.nan, np.nan]])
    shares = np.column_stack([shares, [0.0, np.nan]]) if none else shares
    figure = task_confusion_figure(shares, title="slca")
    axes = figure.axes[0]
    assert texts(axes) == ["75", "25", "0"][: 2 + none]
    assert axes.images[0].get_array().mask[1].all() and axes.images[0].get_clim() == (0.0, 1.0)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0", "1", "none"][: 2 + none]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("task of the predicted class", "true task")
    inside(figure)


@pytest.mark.parametrize("tasks", [1, 12, 50, 100])
def test_confusion_of_any_number_of_tasks(tasks):
    figure = task_confusion_figure(np.full((tasks, tasks + 1), 1 / (tasks + 1)), size=(5.0, 5.5))
    inside(figure)
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "none"
    assert task_confusion_figure(np.eye(tasks)).get_size_inches()[0] == 4.6


FROZEN = [
    ["backbone.blocks.1.attn.proj"],
    ["backbone.blocks.1.attn.proj"],
    ["backbone.blocks.1.attn.proj", "backbone.blocks.3.attn.qkv.v"],
]


def test_frozen_map_has_the_task_of_the_first_freezing():
    figure = frozen_map_figure(FROZEN, title="t")
    axes = figure.axes[0]
    nan = np.nan
    np.testing.assert_array_equal(axes.images[0].get_array().filled(nan), [[nan, 0, nan, nan], [nan, nan, nan, 2]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn.proj", "attn.qkv.v"]
    assert texts(axes) == ["0", "2"] and axes.images[0].get_clim() == (-0.5, 2.5)
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["never"]
    inside(figure)


def test_frozen_map_of_all_matrices_and_other_names():
    every = [f"blocks.{block}.{kind}" for block in range(5) for kind in ("attn.proj", "mlp.fc1")]
    axes = frozen_map_figure([["blocks.3.mlp.fc1"]], matrices=every).axes[0]
    assert axes.images[0].get_array().shape == (2, 5) and axes.images[0].get_array().count() == 1
    swin = frozen_map_figure([["layers.0.blocks.1.attn.qkv", "layers.1.blocks.0.attn.qkv", "norm"]])
    labels = [label.get_text() for label in swin.axes[0].get_xticklabels()]
    assert labels == ["-", "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    inside(swin)
    for figure in (frozen_map_figure([[], []]), frozen_map_figure([["head"]])):
        assert figure.axes[0].images[0].get_array().shape == (1, 1)
    many = frozen_map_figure([[f"blocks.{b}.fc"] for b in range(100)], matrices=[f"blocks.{b}.fc" for b in range(100)])
    assert many.axes[0].images[0].get_array().compressed().tolist() == list(range(100)) and texts(many.axes[0]) == []
    inside(many)


def test_long_titles_are_wrapped_and_stay_inside():
    title = "a method with a rather long name [recipe 0a1b2c]: task after which a matrix was frozen, seed 0"
    for figure in (
        frozen_map_figure(FROZEN, title=title),
        task_confusion_figure(np.eye(3), title=title),
        task_matrices_figure({"a": triangle(3), "b": triangle(3)}, title=title),
    ):
        assert " ".join(title.split()) in [" ".join(text.get_text().split()) for text in figure.texts]
        inside(figure)
        figure.canvas.draw()
        (head,) = (text for text in figure.texts if text.get_text().startswith("a method"))
        box = head.get_window_extent(figure.canvas.get_renderer())
        assert box.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)


# ---------------------------------------------------------------------------- all
ALL = {
    "ranking": lambda: ranking_figure(INTERVALS, xlabel="x"),
    "differences": lambda: differences_figure(INTERVALS, xlabel="x"),
    "cost": lambda: cost_figure(POINTS, xlabel="x", ylabel="y", log=True),
    "matrices": lambda: task_matrices_figure({"a": triangle(3), "b": triangle(3)}, title="t"),
    "confusion": lambda: task_confusion_figure([[0.9, 0.1], [0.2, np.nan]], title="t"),
    "frozen": lambda: frozen_map_figure(FROZEN, title="t"),
}


@pytest.mark.parametrize("name", ALL)
def test_colours_and_letters(name):
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        ALL[name]().savefig(text, format="svg")
    inks, known = {INK, MUTED, GRID, EMPTY, PAPER}, {colour.lower() for colour in PALETTE}
    maps = {"#080808", "#ffffff"} if name in ("matrices", "confusion", "frozen") else set()
    found = set(re.findall(r"#[0-9a-f]{6}\b", text.getvalue()))
    assert found - inks <= (maps or known) and {INK, PAPER} <= found
    assert all("fill: #" in letter for letter in re.findall(r"<text[^>]*>", text.getvalue()))
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", text.getvalue())) >= 9
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: ranking_figure({}, xlabel="x"),
        lambda: differences_figure({}, xlabel="x"),
        lambda: cost_figure({}, xlabel="x", ylabel="y"),
        lambda: cost_figure({"a": (0.0, 0.5, None)}, xlabel="x", ylabel="y", log=True),
        lambda: cost_figure({"a": (1.0, float("nan"), None)}, xlabel="x", ylabel="y"),
        lambda: cost_figure({"a": (float("inf"), 0.5, None)}, xlabel="x", ylabel="y"),
        lambda: task_matrices_figure({}),
        lambda: task_matrices_figure({"a": [0.5]}),
        lambda: task_confusion_figure([[0.5, 0.5, 0.0, 0.0]]),
        lambda: task_confusion_figure([]),
        lambda: frozen_map_figure([]),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(ValueError, match=r"(intervals|points|matri|shares|frozen).*: got .*accepted "):
        call()


def test_long_names_in_a_legend_are_wrapped_and_stay_inside() -> None:
    labels = [f"a_method_with_a_rather_long_name_{i} [a_recipe_with_a_long_name_too abc123]" for i in range(7)]
    figure = cost_figure(dict.fromkeys(labels, (1.0, 0.5, 0.1)), xlabel="seconds", ylabel="accuracy")
    (legend,) = figure.legends
    figure.draw_without_rendering()
    frame, box = figure.bbox, legend.get_window_extent()
    assert box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == labels
