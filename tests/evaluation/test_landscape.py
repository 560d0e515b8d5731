"""Surfaces against a model that is really moved, landscapes around and along models, pictures by their data."""

import copy
import math

import numpy as np
import pytest
import torch
from avalanche.models import as_multitask
from PIL import Image
from torch import nn

from avalanche_firn.evaluation.landscape import Landscape, random_landscape, trajectory_landscape
from avalanche_firn.evaluation.landscape_math import filter_normalized_direction, pca_directions
from avalanche_firn.evaluation.surface import loss_surface
from avalanche_firn.evaluation.trajectory import Trajectory
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.random_state import capture_random_state


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0, dtype=torch.float64, dropout=0.5):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten())
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("head", nn.Linear(3 * 16, 4))
    return model.to(dtype)


@pytest.fixture(scope="module")
def data():
    return normal(7, 11, 1, 6, 6), torch.arange(11) % 4


def walked(seed=0, steps=6, **options):
    """A model that has walked at random, and its trajectory."""
    model, trajectory = network(seed), Trajectory(**options)
    trajectory.record(model, label="start")
    for step in range(1, steps):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p += 0.1 * normal(100 * step + i, *p.shape)
        trajectory.record(model, label=f"task {step}" if step % 2 == 0 else "")
    return model, trajectory


# ----------------------------------------------------------------------- surface
def state_of(model):
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return to_plain([copy.deepcopy(dict(model.state_dict())), modes, grads, capture_random_state()])


class Noisy(nn.Module):
    """Draws and counts even in evaluation mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.model(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("only", [None, "head"])
def test_surface_equals_the_loss_of_a_model_that_is_really_moved(data, only):
    model = network()
    model.train()
    model.body[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    chosen = {n: p for n, p in model.named_parameters() if only is None or n.startswith(only)}
    dx, dy = (filter_normalized_direction(chosen, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    xs, ys = [-0.5, 0.0, 0.7], [0.0, 0.4]
    noisy = Noisy(model)
    before, identities = state_of(noisy), [id(p) for p in noisy.parameters()]
    named = [{f"model.{n}": w for n, w in side.items()} for side in (chosen, dx, dy)]
    surface = loss_surface(noisy, *data, *named, xs, ys, batch_size=4)
    assert differing_state(before, state_of(noisy)) is None
    assert [id(p) for p in noisy.parameters()] == identities
    for a, x in enumerate(xs):
        for b, y in enumerate(ys):
            moved = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    if name in chosen:
                        p += x * dx[name] + y * dy[name]
                logits = moved(data[0])
                expected = nn.functional.cross_entropy(logits, data[1])
            assert surface.loss[a, b].item() == pytest.approx(expected.item(), abs=1e-12)
            assert surface.accuracy[a, b].item() == (logits.argmax(1) == data[1]).double().mean().item()


def test_surface_casts_images_and_directions_and_keeps_going_at_infinity(data):
    model = network(dtype=torch.float32)
    weights = dict(model.named_parameters())
    direction = {name: p.detach().double() for name, p in weights.items()}
    other = {name: torch.zeros_like(p) for name, p in weights.items()}
    surface = loss_surface(model, *data, weights, direction, other, [0.0, 1e30], [0.0])
    assert surface.loss.dtype == torch.float64 and math.isfinite(surface.loss[0, 0])
    assert not math.isfinite(surface.loss[1, 0])


def test_surface_errors_leave_the_model_alone(data):
    model, several = network(), as_multitask(network(), "head")
    model.train()
    images, labels = data
    w = {name: p.detach() for name, p in model.named_parameters()}
    good = (images, labels, w, w, w, [0.0], [0.0])
    before = state_of(model)
    for change, match in (
        ({0: images[:0], 1: labels[:0]}, "images: got"),
        ({0: [1.0]}, "images: got list"),
        ({1: labels[:3]}, "labels: got"),
        ({1: labels.double()}, "labels: got torch.float64"),
        ({1: labels - 1}, "labels: got"),
        ({1: labels + 1}, r"model: gives \(11, 4\); accepted are logits \(n, C\) with C >= 5"),
        ({2: {}}, "origin: got nothing"),
        ({2: {"nose": w["head.bias"]}}, r"origin: got the unknown \['nose'\]"),
        ({3: {"head.bias": w["head.bias"]}}, "dx: names differ"),
        ({4: {**w, "head.bias": torch.zeros(5)}}, "dy: head.bias has shape"),
        ({5: []}, "xs: got"),
        ({6: [0.0, math.inf]}, "ys: got"),
    ):
        with pytest.raises(ValueError, match=match):
            loss_surface(model, *(change.get(i, value) for i, value in enumerate(good)))
    with pytest.raises(ValueError, match="batch_size: got 0"):
        loss_surface(model, *good, batch_size=0)
    with pytest.raises(ValueError, match="needs task labels"):
        loss_surface(several, *good)
    assert differing_state(before, state_of(model)) is None


# -------------------------------------------------------------------- landscapes
def test_random_landscape_has_the_model_in_its_centre(data):
    model = network(dtype=torch.float32)
    before = state_of(model)
    landscape = random_landscape(model, *data, radius=0.5, points=3, seed=4, part="head")
    assert differing_state(before, state_of(model)) is None
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(data[0].float()), data[1])
    assert landscape.loss[1, 1] == pytest.approx(expected.item(), abs=1e-6)
    assert landscape.xs.tolist() == landscape.ys.tolist() == [-0.5, 0.0, 0.5]
    assert landscape.path.shape == (0, 2) and landscape.explained is None
    again = random_landscape(model, *data, radius=0.5, points=3, seed=4, part="head")
    other = random_landscape(model, *data, radius=0.5, points=3, seed=5, part="head")
    np.testing.assert_array_equal(landscape.loss, again.loss)
    assert np.abs(landscape.loss - other.loss).max() > 1e-3
    frozen = random_landscape(model, *data, radius=0.5, points=3, part="head", ignore=["head.weight"])
    np.testing.assert_allclose(frozen.loss, expected.item(), atol=1e-6)  # a bias has no direction


def test_trajectory_landscape_holds_the_path_and_ends_at_the_model(data):
    model, trajectory = walked(part="encoder")
    before = state_of(model)
    landscape = trajectory_landscape(model, *data, trajectory, points=5, margin=0.1)
    assert differing_state(before, state_of(model)) is None
    assert landscape.path.shape == (6, 2) and not landscape.path[-1].any()
    assert landscape.labels == ("start", "", "task 2", "", "task 4", "")
    low, high = landscape.path.min(0), landscape.path.max(0)
    for axis, values in enumerate((landscape.xs, landscape.ys)):
        room = 0.1 * (high - low)[axis]
        assert values[[0, -1]].tolist() == pytest.approx([low[axis] - room, high[axis] + room])
    assert 0 < landscape.explained[1] <= landscape.explained[0] and sum(landscape.explained) <= 1 + 1e-12
    plane = pca_directions([trajectory.snapshot(i) for i in range(6)])
    np.testing.assert_allclose(plane.coordinates, landscape.path, atol=1e-12)
    moved = copy.deepcopy(model).eval()  # the head of now, the encoder of a corner
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name in plane.dx:
                p += landscape.xs[0] * plane.dx[name] + landscape.ys[-1] * plane.dy[name]
        expected = nn.functional.cross_entropy(moved(data[0]), data[1])
    assert landscape.loss[0, -1] == pytest.approx(expected.item(), abs=1e-5)  # snapshots are float32


def test_builder_errors(data):
    model, trajectory = walked(steps=2)
    for call, match in (
        (lambda: random_landscape(model, *data, radius=0), "radius: got 0"),
        (lambda: random_landscape(model, *data, radius=math.nan), "radius: got nan"),
        (lambda: random_landscape(model, *data, points=1), "points: got 1"),
        (lambda: random_landscape(model, *data, part="tail"), "part: got 'tail'"),
        (lambda: random_landscape(model, *data, ignore=["nose"]), r"ignore: got \['nose'\]"),
        (lambda: trajectory_landscape(model, *data, trajectory, margin=-1), "margin: got -1"),
        (lambda: trajectory_landscape(model, *data, trajectory, points=2.5), "points: got 2.5"),
        (lambda: trajectory_landscape(model, *data, trajectory), "snapshots: got 2"),
        (lambda: trajectory_landscape(model, *data, Trajectory()), "snapshots: got 0"),
        (lambda: trajectory_landscape(model, data[0], data[1][:2], trajectory), "labels: got"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def made(loss=None, **changes):
    xs, ys = np.linspace(-1, 2, 4), np.linspace(0, 3, 3)
    loss = np.exp(xs[:, None] + ys) if loss is None else loss
    path = np.asarray([[-0.5, 0.5], [0.5, 2.0], [1.0, 1.0], [0.0, 1.0]])
    values = dict(xs=xs, ys=ys, loss=loss, accuracy=np.full((4, 3), 0.25), path=path, axes=("first", "second"))
    return Landscape(**{**values, "labels": ("start", "task 0", "", ""), "explained": (0.75, 0.2), **changes})


def test_the_figure_shows_path_marks_and_explained_variance():
    for kind in ("loss", "accuracy"):
        figure = made().figure(kind, title="t")
        axes, bar = figure.axes
        lines = {line.get_label(): line for line in axes.lines}
        np.testing.assert_array_equal(lines["_path"].get_xydata(), made().path)
        np.testing.assert_array_equal(lines["start"].get_xydata(), made().path[:1])
        np.testing.assert_array_equal(lines["end of a task"].get_xydata(), made().path[1:2])
        np.testing.assert_array_equal(lines["end"].get_xydata(), made().path[-1:])
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert left <= made().path[:, 0].min() and made().path[:, 0].max() <= right
        assert low <= made().path[:, 1].min() and made().path[:, 1].max() <= high
        assert [text.get_text() for text in axes.texts] == ["task 0"] and axes.get_title(loc="left") == "t"
        assert axes.get_xlabel() == "first (75.0 % of variance)"
        assert axes.get_ylabel() == "second (20.0 % of variance)"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["start", "end of a task", "end"]
        assert bar.get_ylabel() == ("loss in nats" if kind == "loss" else "accuracy")
    marked = made(labels=("start", "domain B", "", "")).figure()
    assert [text.get_text() for text in marked.legends[0].get_texts()] == ["start", "marked", "end"]


def test_levels_are_evenly_spaced_in_the_logarithm_and_x_is_horizontal():
    contours = made().figure().axes[0].collections[0]
    ratios = np.diff(np.log(contours.levels))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)
    assert contours.levels[[0, -1]].tolist() == pytest.approx([math.exp(-1), math.exp(5)])
    grows = made(np.repeat(np.asarray([[1.0], [2.0], [4.0], [8.0]]), 3, axis=1)).figure().axes[0].collections[0]
    low = max(path.vertices[:, 0].min() for path in grows.get_paths() if len(path.vertices))
    assert low > 1.5  # the highest level lies at the right end, whatever y
    corner = contours.get_paths()[-1].vertices
    assert corner[:, 0].min() > 1 and corner[:, 1].min() > 2  # and here at the right end of both


@pytest.mark.parametrize("value", [0.0, 1e-30, 2.3, 1e30])
def test_plains_zeros_and_infinities_can_be_drawn(tmp_path, value):
    loss = np.full((4, 3), value)
    made(loss).save(tmp_path / "plain")
    loss[0, 0], loss[1, 1] = math.nan, math.inf
    figure = made(loss, path=np.zeros((0, 2)), labels=(), explained=None).figure()
    assert len(figure.legends) == 0 and [line.get_marker() for line in figure.axes[0].lines] == ["+"]
    wide = np.geomspace(1e-20, 1e3, 12).reshape(4, 3)
    assert made(wide).figure().axes[0].collections[0].levels[0] == pytest.approx(0.1)
    for kind in ("loss", "accuracy"):
        with pytest.raises(ValueError, match="no value is finite"):
            made(np.full((4, 3), math.nan)).figure(kind)


def test_many_tasks_keep_their_markers_and_share_ten_texts():
    turn = np.linspace(0, 6, 102)
    path = np.stack([np.cos(turn), 1.5 + np.sin(turn)], axis=1)
    path[40:60] = path[40]  # a standstill
    figure = made(path=path, labels=("start", *(f"task {i}" for i in range(101)))).figure()
    assert len(figure.axes[0].texts) == 10
    assert all(np.isfinite(text.get_position()).all() for text in figure.axes[0].texts)
    assert len({line.get_label(): line for line in figure.axes[0].lines}["end of a task"].get_xdata()) == 100


@pytest.mark.parametrize("changes", [{}, {"path": np.zeros((0, 2)), "labels": (), "explained": None}])
def test_save_and_load(tmp_path, changes):
    import matplotlib.pyplot as plt

    landscape = made(**changes)
    paths = landscape.save(tmp_path / "new" / "v1.2")
    assert [path.name for path in paths] == ["v1.2.npz", "v1.2-loss.png", "v1.2-accuracy.png"]
    for path in paths[1:]:
        with Image.open(path) as image:
            assert image.size == (960, 735)
    loaded = Landscape.load(tmp_path / "new" / "v1.2")
    for name, value in vars(landscape).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(loaded, name), value)
        else:
            assert getattr(loaded, name) == value
    assert plt.get_fignums() == []
    with pytest.raises(FileNotFoundError):
        Landscape.load(tmp_path / "other")


def test_landscape_errors():
    for changes, match in (
        ({"xs": [0.0]}, "xs: got"),
        ({"ys": [0.0, 1.0, 1.0]}, "ys: got"),
        ({"loss": np.ones((3, 4))}, r"loss: got shape \(3, 4\); accepted is \(4, 3\)"),
        ({"accuracy": np.ones(4)}, "accuracy: got shape"),
        ({"path": np.ones((2, 3))}, "path: got"),
        ({"labels": ("one",)}, "path: got .* 1 labels"),
    ):
        with pytest.raises(ValueError, match=match):
            made(**changes)
    with pytest.raises(ValueError, match="quantity: got 'grade'"):
        made().figure("grade")
