"""Pictures: right content, right size, nothing left behind in pyplot, colours that a page can replace."""

import io
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from avalanche_firn.evaluation.figures import (
    EMPTY,
    GRID,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Style,
    curves_figure,
    inked,
    save_figure,
    styles_of,
    task_matrix_figure,
)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_matrix_shows_what_was_evaluated_and_nothing_else():
    figure = task_matrix_figure([[0.98, np.nan], [0.5, 0.004]], title="run", task_names=["0, 1", "2, 3"])
    assert texts(figure) == ["98", "50", "0"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0, 1", "2, 3"]
    assert axes.get_xlabel() == "evaluated task" and axes.get_title() == "run"
    image = axes.images[0]
    assert image.get_clim() == (0.0, 1.0) and image.get_array().mask.tolist() == [[False, True], [False, False]]


def test_large_and_wide_matrices_stay_readable(tmp_path):
    large = task_matrix_figure(np.random.default_rng(0).random((40, 40)))
    assert texts(large) == [] and len(large.axes[0].get_xticklabels()) == 20
    wide = task_matrix_figure(np.full((1, 5), 0.5))
    for figure in (large, wide):
        width, height = figure.get_size_inches()
        assert width < 13 and height < 13
        save_figure(figure, tmp_path / "matrix.png")


def test_curves_have_bands_only_with_two_seeds_and_levels_for_single_points():
    curves = {"naive": [[0.9, 0.5, 0.3], [0.8, 0.6, 0.2]], "one seed": [[0.9, 0.8, 0.7]], "joint": [[0.97], [0.95]]}
    figure = curves_figure(curves, title="t")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["naive"].get_ydata(), [0.85, 0.55, 0.25])
    np.testing.assert_array_equal(lines["naive"].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(lines["joint"].get_xdata(), [1, 3])
    np.testing.assert_allclose(lines["joint"].get_ydata(), [0.96, 0.96])
    assert len(axes.collections) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)


def test_curves_at_given_steps():
    curves = {"long": [[0.9, 0.5, 0.3]], "short": [[0.9, 0.5]], "level": [[0.7]]}
    lines = {line.get_label(): line for line in curves_figure(curves, steps=[1, 10, 67]).axes[0].lines}
    np.testing.assert_array_equal(lines["long"].get_xdata(), [1, 10, 67])
    np.testing.assert_array_equal(lines["short"].get_xdata(), [1, 10])
    np.testing.assert_array_equal(lines["level"].get_xdata(), [1, 67])
    bands = curves_figure({"a": [[0.9, 0.5], [0.7, 0.1]]}, steps=[4, 9]).axes[0].collections
    assert bands[0].get_paths()[0].get_extents().xmin == 4 and bands[0].get_paths()[0].get_extents().xmax == 9


@pytest.mark.parametrize("steps", [[1, 2], [1, 2, 3, 4], [1, 3, 3], [3, 2, 1], [1, 2, np.nan], [[1, 2, 3]]])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps: .*accepted is one number for each of 3 points"):
        curves_figure({"a": [[0.9, 0.5, 0.3]]}, steps=steps)


def test_twenty_methods_can_be_told_apart():
    figure = curves_figure({f"m{i}": [[0.1 * i, 0.2]] for i in range(20)})
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == 20 and len(set(PALETTE)) == 7


def contrast(one, other):
    """Ratio of WCAG 2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot(
            [0.2126, 0.7152, 0.0722], [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        )

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_white_and_on_a_dark_page():
    for colour in PALETTE:
        assert contrast(colour, "#ffffff") >= 3 and contrast(colour, "#16181d") >= 3, colour
    assert contrast(INK, PAPER) > 7 and contrast(MUTED, PAPER) > 4.5


def test_styles_differ_and_depend_on_the_labels_alone():
    labels = [f"method {i}" for i in range(196)]
    styles = styles_of(labels)
    assert list(styles) == labels and len(set(styles.values())) == 196
    some = styles_of(labels[:28])
    assert len({(s.colour, s.dash) for s in some.values()}) == len({(s.colour, s.marker) for s in some.values()}) == 28
    assert len({s.colour for s in styles_of(labels[:7]).values()}) == 7
    assert styles_of(reversed(labels)) == styles and styles_of(["b", "a", "b"]) == styles_of(["a", "b"])


def test_given_styles_and_places_of_the_legend():
    style = Style("#123456", "v", (0, (1, 1)))
    figure = curves_figure({"a": [[0.1, 0.2]], "b": [[0.3, 0.4]]}, styles={"a": style}, legend="none", size=(3, 2))
    line, other = figure.axes[0].lines
    assert (line.get_color(), line.get_marker()) == ("#123456", "v") and other.get_color() in PALETTE
    assert figure.legends == [] and tuple(figure.get_size_inches()) == (3, 2)
    wide, narrow = (curves_figure({"a": [[0.1, 0.2]]}, legend=legend) for legend in ("right", "below"))
    assert wide.get_size_inches()[0] > 7 and narrow.get_size_inches()[0] == 4.6 and len(narrow.legends) == 1
    with pytest.raises(ValueError, match="legend: got 'top'; accepted is 'right', 'below' or 'none'"):
        curves_figure({"a": [[0.1]]}, legend="top")


def test_shares_are_not_drawn_beyond_a_whole():
    wide = [[0.99, 0.9], [0.6, 0.9]]
    assert curves_figure({"a": wide}).axes[0].get_ylim()[1] == 1.02
    assert curves_figure({"a": wide}, percent=False).axes[0].get_ylim()[1] > 1.02
    assert curves_figure({"a": [[1.5, 1.2]]}).axes[0].get_ylim()[1] > 1.2


def colours_of(figure):
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg")
    return set(re.findall(r"#[0-9a-f]{6}\b", text.getvalue())), text.getvalue()


@pytest.mark.parametrize(
    "figure",
    [
        curves_figure({"a": [[0.1, 0.2], [0.2, 0.4]], "b": [[0.5]]}, title="t"),
        curves_figure({"a": [[0.1, 0.2]]}, legend="right"),
        task_matrix_figure([[0.98, np.nan], [0.5, 0.004]], title="t"),
    ],
)
def test_everything_but_the_data_has_one_of_five_colours(figure):
    inks = {INK, MUTED, GRID, EMPTY, PAPER}
    assert len(inks) == 5 and not inks & {colour.lower() for colour in PALETTE}
    found, text = colours_of(figure)
    cells = {"#080808", "#ffffff"} if figure.axes[0].images else set()
    assert found - inks <= {colour.lower() for colour in PALETTE} | cells
    assert {INK, MUTED, PAPER} <= found
    letters = re.findall(r"<text[^>]*>", text)
    assert len(letters) > 4 and all("fill: #" in letter for letter in letters)
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)) >= 9


def test_a_figure_drawn_elsewhere_can_be_inked():
    figure = Figure()
    axes = figure.add_subplot(title="title", xlabel="x")
    axes.plot([1, 2], [3, 4], color="#0072b2", label="line")
    axes.grid(color="#d9d9d9")
    axes.legend()
    axes.text(1.5, 3.5, "cell", color="#111111")
    assert inked(figure) is figure
    found, _ = colours_of(figure)
    assert found == {"#0072b2", "#111111", INK, MUTED, GRID, PAPER}


def test_saved_picture(tmp_path):
    backend = matplotlib.get_backend()
    path = save_figure(curves_figure({"a": [[0.1, 0.2]]}, limits=(0, 1), percent=False), tmp_path / "new" / "c.png")
    with Image.open(path) as image:
        assert image.size == (690, 490) and round(image.info["dpi"][0]) == 150
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == [] and matplotlib.get_backend() == backend


@pytest.mark.parametrize(
    "call",
    [
        lambda: task_matrix_figure(np.zeros(3)),
        lambda: task_matrix_figure(np.zeros((2, 2)), task_names=["a"]),
        lambda: curves_figure({}),
        lambda: curves_figure({"a": [0.1, 0.2]}),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(ValueError, match="accepted is"):
        call()
