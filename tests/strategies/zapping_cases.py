"""The golden files' small networks and numbers, for the tests of ASB and of transfer."""

import torch

from avalanche_firn.models.convnets import InstanceNormConvNet

DEAD = "conv.bias"  # in front of an instance norm: only rounding noise moves it


def ours(name):
    """The golden name of a tensor, ``b2_norm_w``, as the network calls it."""
    if name.startswith("head"):
        return "fc." + {"w": "weight", "b": "bias"}[name[-1]]
    block, layer, kind = name.split("_")
    return f"blocks.{int(block[1:]) - 1}.{layer}." + {"w": "weight", "b": "bias"}[kind]


def tensors(arrays, group):
    """``group__*`` by the network's names, float64."""
    prefix = f"{group}__"
    return {ours(k.removeprefix(prefix)): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}


def network(arrays, group="init"):
    state = tensors(arrays, group)
    outputs, width = state["fc.weight"].shape[0], state["blocks.0.conv.weight"].shape[0]
    model = InstanceNormConvNet(edge=28, width=width, num_classes=outputs).double()
    model.load_state_dict(state)
    return model


def pixels(images):
    return torch.from_numpy(images).double() / 255


def close(actual, expected, tolerance=1e-9):
    """Same names, and every tensor within the tolerance of the golden set."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        bound = 1e-6 if name.endswith(DEAD) else tolerance
        assert (actual[name].detach() - tensor).abs().max() <= bound, name
