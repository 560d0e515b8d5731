"""What the pictures show: values, colours, gaps, labels; and what they refuse."""

import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection, QuadMesh

from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.evaluation.dynamics_figures import (
    block_effect_figure,
    cosine_figure,
    loss_map_figure,
    task_curves_figure,
)
from avalanche_firn.evaluation.figures import save_figure

NAN = math.nan


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_block_effects_have_colours_centred_on_zero():
    figure = block_effect_figure([[-2.0, 0.5], [1.0, NAN]], block_names=["x", "y"], task_names=["cat", "dog"])
    axes = figure.axes[0]
    image = axes.images[0]
    assert image.get_clim() == (-2.0, 2.0)
    np.testing.assert_array_equal(image.get_array().filled(NAN), [[-2.0, 0.5], [1.0, NAN]])
    red, _, blue, _ = image.cmap(image.norm(1.0))
    assert red > blue  # rose
    red, _, blue, _ = image.cmap(image.norm(-1.0))
    assert blue > red
    centre = image.cmap(image.norm(0.0))
    assert max(centre[:3]) - min(centre[:3]) < 0.02
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["x", "y"]
    assert pixels(figure).std() > 0


@pytest.mark.parametrize("values", [[[0.0]], [[NAN, NAN]], np.zeros((60, 50))])
def test_block_effects_without_any_size_can_be_drawn(values):
    figure = block_effect_figure(values)
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert len(figure.axes[0].get_xticks()) <= 20 and pixels(figure).shape[2] == 4


def test_cosines_keep_a_fixed_scale():
    image = cosine_figure([[1.0, 0.1], [0.1, 1.0]]).axes[0].images[0]
    assert image.get_clim() == (-1.0, 1.0)
    with pytest.raises(ValueError, match="cosine"):
        cosine_figure([[1.0, 0.0]])


def test_loss_map_has_a_column_per_row_and_a_row_per_task():
    loss = np.arange(12.0).reshape(4, 3)
    loss[1, 2] = NAN
    figure = loss_map_figure([0, 10, 15, 40], loss, task_names=["a", "b", "c"])
    axes = figure.axes[0]
    (mesh,) = [c for c in axes.collections if isinstance(c, QuadMesh)]
    np.testing.assert_array_equal(mesh.get_array().filled(NAN), loss.T)
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 15, 40, 65])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # task 0 on top
    assert pixels(loss_map_figure([3], [[1.0]])).std() > 0
    assert pixels(loss_map_figure([3, 3], [[1.0], [2.0]])).std() > 0


def test_curves_show_every_task_and_the_mean_of_what_was_measured():
    loss = np.array([[1.0, 3.0], [2.0, NAN], [NAN, NAN], [4.0, 8.0]])
    axes = task_curves_figure([0, 2, 3, 7], loss).axes[0]
    (faint,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    (bold,) = axes.lines
    np.testing.assert_array_equal(bold.get_xydata(), [[0, 2.0], [2, 2.0], [3, NAN], [7, 6.0]])
    segments = faint.get_segments()
    assert len(segments) == 2 and segments[0][:, 1][0] == 1.0 and faint.get_alpha() < 0.5
    assert bold.get_linewidth() > 2 * faint.get_linewidths()[0]
    low, high = axes.get_ylim()
    assert low <= 1 and high >= 8
    assert pixels(task_curves_figure([0], [[1.0, 2.0]])).std() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_effect_figure([1.0]), "effects"),
        (lambda: block_effect_figure(np.zeros((0, 2))), "effects"),
        (lambda: block_effect_figure([[1.0]], task_names=["a", "b"]), "task_names"),
        (lambda: block_effect_figure([[1.0]], block_names=[]), "block_names"),
        (lambda: loss_map_figure([0, 1], [[1.0]]), "steps"),
        (lambda: loss_map_figure([1, 0], [[1.0], [1.0]]), "steps"),
        (lambda: loss_map_figure([0], [[1.0]], task_names=[]), "task_names"),
        (lambda: task_curves_figure([NAN], [[1.0]]), "steps"),
        (lambda: task_curves_figure([0], [1.0]), "loss"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pictures_of_a_result(tmp_path):
    values = dict(steps=[0, 5], loss=[[2.0, 1.0], [1.0, 2.0]], accuracy=[[0.0, 0.0], [1.0, 0.0]])
    some = Dynamics(**values, blocks=[[0, 1]], block_tasks=[[0, 1]], task_names=["cat", "dog"])
    figures = some.figures()
    assert set(figures) == {"loss-map", "curves", "block-effect"}
    labels = [t.get_text() for t in figures["block-effect"].axes[0].get_yticklabels()]
    assert labels == ["cat to dog"]
    assert set(Dynamics(**values, blocks=[], block_tasks=()).figures()) == {"loss-map", "curves"}
    assert save_figure(figures["curves"], tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG"
