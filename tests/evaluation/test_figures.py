"""Pictures: right content, right size, nothing left behind in pyplot."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from avalanche_firn.evaluation.figures import PALETTE, curves_figure, save_figure, task_matrix_figure


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


def test_saved_picture(tmp_path):
    backend = matplotlib.get_backend()
    path = save_figure(curves_figure({"a": [[0.1, 0.2]]}, limits=(0, 1), percent=False), tmp_path / "new" / "c.png")
    with Image.open(path) as image:
        assert image.size == (1110, 630) and round(image.info["dpi"][0]) == 150
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
