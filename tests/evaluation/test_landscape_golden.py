"""Directions, surface, coordinates and principal plane against stored numbers of the loss-landscape code (float64)."""

import pytest
import torch
from torch import nn

from avalanche_firn.evaluation.landscape_math import (
    filter_normalized_direction,
    normalize_direction,
    pca_directions,
    project,
)
from avalanche_firn.evaluation.surface import loss_surface


@pytest.fixture(scope="module")
def case(golden):
    return {name: torch.from_numpy(value) for name, value in golden("zapping", "landscape").items()}


@pytest.fixture(scope="module")
def network(case):
    """The small network of the file: the order of its parameters is that of the stored tensors."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.InstanceNorm2d(3, affine=True),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 4),
    ).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(case[f"w{index}"])
    return model


def stored(case, network, prefix):
    return {name: case[f"{prefix}{i}"] for i, (name, _) in enumerate(network.named_parameters())}


@pytest.mark.parametrize("axis", [0, 1])
def test_golden_directions(case, network, axis):
    weights, side = dict(network.named_parameters()), "xy"[axis]
    expected = stored(case, network, f"{side}_filter")
    given = normalize_direction(stored(case, network, f"{side}_raw"), weights)
    generator = torch.Generator().manual_seed(int(case["direction_seeds"][axis]))
    drawn = filter_normalized_direction(weights, generator=generator)
    assert len(expected) == int(case["n_tensors"]) == 8
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, atol=1e-9, rtol=0)
        torch.testing.assert_close(drawn[name], value, atol=1e-9, rtol=0)
        assert bool(value.any()) == (value.ndim > 1)


@pytest.mark.parametrize("batch_size", [4, 9])
def test_golden_surface(case, network, batch_size):
    weights = {name: p.detach() for name, p in network.named_parameters()}
    dx, dy = (stored(case, network, f"{side}_filter") for side in "xy")
    grid, data = case["grid"], (case["surface_images"], case["surface_labels"])
    surface = loss_surface(network, *data, weights, dx, dy, grid, grid, batch_size=batch_size)
    torch.testing.assert_close(surface.loss, case["surface_loss"], atol=1e-8, rtol=0)
    torch.testing.assert_close(100 * surface.accuracy, case["surface_accuracy"], atol=1e-8, rtol=0)
    assert (surface.loss.T - case["surface_loss"]).abs().max() > 0.1  # the order of the axes matters here


def test_golden_projection_is_least_squares(case):
    coordinates = project(case["proj_points"], case["proj_dx"], case["proj_dy"])
    torch.testing.assert_close(coordinates, case["proj_lstsq"], atol=1e-9, rtol=0)
    assert (coordinates - case["proj_cos"]).abs().max() > 1  # the reference's other projection


def test_golden_principal_plane(case):
    plane = pca_directions(case["pca_snapshots"])
    signs = []
    for direction, name in ((plane.dx, "pca_direction1"), (plane.dy, "pca_direction2")):
        signs.append(torch.sign(direction @ case[name]))
        torch.testing.assert_close(direction * signs[-1], case[name], atol=1e-9, rtol=0)
    torch.testing.assert_close(plane.explained, case["pca_explained_variance_ratio"], atol=1e-9, rtol=0)
    torch.testing.assert_close(plane.coordinates * torch.stack(signs), case["pca_coordinates"], atol=1e-9, rtol=0)
