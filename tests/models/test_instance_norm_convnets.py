"""models/convnets.py, the zapping papers' convnets: golden numbers, a naive oracle, sizes, and what timm needs."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from avalanche_firn.models import InstanceNormConvNet, find_parts, list_backbones, load_backbone, with_taskwise_head

BLOCKS = {28: 3, 84: 4}


def from_golden(arrays, edge, prefix="", **options):
    """The network with the golden file's weights, in float64."""
    names = {key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
    width, chans = arrays[f"{prefix}b1_conv_w"].shape[:2]
    outputs = len(arrays[f"{prefix}head_b"])
    model = InstanceNormConvNet(edge, width=width, in_chans=chans, num_classes=outputs, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            head, _, kind = name.rpartition(".")
            if head == "fc":
                key = f"head_{kind[0]}"
            else:
                _, block, part = head.split(".")
                key = f"b{int(block) + 1}_{part}_{kind[0]}"
            assert key in names
            parameter.copy_(torch.from_numpy(arrays[prefix + key]))
    return model


def images_of(arrays, edge):
    return torch.from_numpy(arrays[f"n{edge}_images_u8"]).double() / 255


@pytest.mark.parametrize("edge", BLOCKS)
def test_logits_and_features_equal_the_golden_numbers_in_both_modes(golden, edge):
    arrays = golden("zapping", "convnets")
    model, x = from_golden(arrays, edge, f"n{edge}__"), images_of(arrays, edge)
    expected = torch.from_numpy(arrays[f"n{edge}_logits"])
    torch.testing.assert_close(torch.from_numpy(arrays[f"n{edge}_logits_train_mode"]), expected, rtol=0, atol=1e-12)
    for mode in (True, False):
        with torch.no_grad():
            features = model.train(mode).forward_features(x)
            torch.testing.assert_close(
                features, torch.from_numpy(arrays[f"n{edge}_features"]), rtol=0, atol=1e-9, check_stride=False
            )
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(model(x[:1]), expected[:1], rtol=0, atol=1e-9)  # a single image


@pytest.mark.parametrize("edge", BLOCKS)
def test_dead_biases_have_no_effect_and_may_be_left_out(golden, edge):
    arrays = golden("zapping", "convnets")
    x = images_of(arrays, edge)
    full, lean = (from_golden(arrays, edge, f"n{edge}__", dead_biases=dead) for dead in (True, False))
    expected = full(x).detach()
    torch.testing.assert_close(lean(x).detach(), expected, rtol=0, atol=1e-9)
    assert full.dead_parameters() == [f"blocks.{i}.conv.bias" for i in range(BLOCKS[edge])]
    assert lean.dead_parameters() == []
    assert set(dict(full.named_parameters())) - set(dict(lean.named_parameters())) == set(full.dead_parameters())
    functional.cross_entropy(full(x), torch.tensor([0, 1])).backward()
    for name, parameter in full.named_parameters():
        alive = parameter.grad.abs().max() > 1e-12
        assert alive == (name not in full.dead_parameters()), name
    with torch.no_grad():
        for name in full.dead_parameters():
            full.get_parameter(name).add_(3)
        torch.testing.assert_close(full(x), expected, rtol=0, atol=1e-9)
        full.blocks[0].norm.bias.add_(3)
        assert (full(x) - expected).abs().max() > 0.01


def naive_block(x, weight, bias, scale, shift, padding, pool):
    """One image (C, H, W) through convolution, instance norm, ReLU and pooling, by loops."""
    x = functional.pad(x, (padding,) * 4)
    height, width = x.shape[1] - 2, x.shape[2] - 2
    out = torch.zeros(len(weight), height, width, dtype=x.dtype)
    for o in range(len(weight)):
        for i in range(height):
            for j in range(width):
                out[o, i, j] = (weight[o] * x[:, i : i + 3, j : j + 3]).sum() + bias[o]
        mean = out[o].mean()
        variance = ((out[o] - mean) ** 2).mean()
        out[o] = (scale[o] * (out[o] - mean) / (variance + 1e-5).sqrt() + shift[o]).clamp(min=0)
    if not pool:
        return out
    halves = (height // 2, width // 2)
    pooled = torch.zeros(len(weight), *halves, dtype=x.dtype)
    for i in range(halves[0]):
        for j in range(halves[1]):
            pooled[:, i, j] = out[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((1, 2))
    return pooled


def test_features_equal_loops():
    torch.manual_seed(0)
    model = InstanceNormConvNet(28, width=2).double()
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight.uniform_(0.5, 2)
            block.norm.bias.uniform_(-1, 1)
    x = torch.rand(1, 1, 28, 28, dtype=torch.float64)
    expected = x[0]
    for block, pool in zip(model.blocks, (True, True, False), strict=True):
        conv, norm = block.conv, block.norm
        expected = naive_block(expected, conv.weight, conv.bias, norm.weight, norm.bias, 0, pool).detach()
    assert expected.shape == (2, 3, 3)
    features = torch.cat([channel.reshape(-1) for channel in expected])  # channel by channel
    torch.testing.assert_close(model.forward_features(x)[0].detach(), features, rtol=0, atol=1e-12)


def test_parameter_counts(golden):
    rows = golden("zapping", "convnets")["counts_width_outputs_features_encoder_head"].tolist()
    found = {}
    for width, outputs, features, encoder, head in rows:
        edge = 28 if features == 9 * width else 84
        with torch.device("meta"):
            model = InstanceNormConvNet(edge, width=width, num_classes=outputs)
        counts = [sum(p.numel() for p in m.parameters()) for m in (model.blocks, model.fc)]
        assert (model.num_features, *counts) == (features, encoder, head)
        found[edge, width, outputs] = counts
    assert found[28, 256, 1000] == [1_184_256, 2_305_000] and found[84, 256, 64] == [1_779_456, 409_664]
    with torch.device("meta"):  # without the dead biases: 256 fewer per block
        lean = InstanceNormConvNet(28, dead_biases=False)
    assert sum(p.numel() for p in lean.parameters()) == 1_184_256 - 3 * 256


@pytest.mark.parametrize("edge", BLOCKS)
def test_construction(golden, edge):
    stored = golden("zapping", "convnets")[f"construction_std_{edge}"].tolist()
    torch.manual_seed(0)
    model = InstanceNormConvNet(edge, num_classes=1000 if edge == 28 else 64)
    found, formula = [], []
    for block in model.blocks:
        fan_in = block.conv.weight[0].numel()
        found += [block.conv.weight.std().item(), block.norm.weight.std().item()]
        formula += [math.sqrt(2 / fan_in), 0.0]
        assert block.norm.running_mean is None and block.norm.eps == 1e-5 and not block.norm.bias.any()
    found.append(model.fc.weight.std().item())
    formula.append(1 / math.sqrt(3 * model.num_features))
    assert found == pytest.approx(formula, rel=0.03) and found == pytest.approx(stored, rel=0.03)
    assert model.fc.weight.abs().max() <= 1 / math.sqrt(model.num_features)  # uniform: torch's default


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(list(BLOCKS)), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_images_do_not_influence_each_other(edge, width, images, chans, dead):
    model = InstanceNormConvNet(edge, width=width, in_chans=chans, dead_biases=dead).double()
    x = torch.rand(images, chans, edge, edge, dtype=torch.float64)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
    assert together.shape == (images, model.num_features) and model.num_features == width * (9 if edge == 28 else 25)
    assert together.isfinite().all() and (together >= 0).all()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("edge", BLOCKS)
def test_timm_s_ways_of_calling_it(edge):
    name, chans = f"convnet_{edge}", 1 if edge == 28 else 3
    assert name in list_backbones()
    model = timm.create_model(name, width=4, num_classes=7)
    x = torch.rand(2, chans, edge, edge)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True) is features
    assert torch.equal(model(x), model.fc(features)) and model(x).shape == (2, 7)
    assert find_parts(model).head_name == "fc" and model.get_classifier() is model.fc
    first = model.pretrained_cfg["first_conv"]
    assert isinstance(model.get_submodule(first), nn.Conv2d) and first == "blocks.0.conv"
    model.double().reset_classifier(4)
    assert model(x.double()).shape == (2, 4)  # the new classifier has the dtype of the rest
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, model.num_features) and model.num_classes == 0
    assert with_taskwise_head(model).head.in_features == 4 * (9 if edge == 28 else 25)
    assert timm.create_model(name, width=2, in_chans=2)(torch.rand(1, 2, edge, edge)).shape == (
        1,
        model.num_features // 2,
    )
    assert timm.create_model(name, width=2, dead_biases=False).dead_parameters() == []
    with pytest.raises(TypeError, match="edge"):
        timm.create_model(name, edge=edge)


def test_load_backbone_knows_size_and_normalisation():
    backbone = load_backbone("convnet_28", pretrained=False, width=8)
    assert (backbone.num_features, backbone.weights) == (72, "random")
    config = backbone.data_config
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 28, 28), (0.0,), (1.0,))
    assert config["interpolation"] == "lanczos"
    config = load_backbone("convnet_84", pretrained=False, width=8).data_config
    assert (config["input_size"], config["mean"]) == ((3, 84, 84), (0.485, 0.456, 0.406))


def test_refuses_what_it_cannot_take():
    model = InstanceNormConvNet(28, width=2)
    for shape in ((2, 3, 28, 28), (2, 1, 84, 84), (1, 28, 28)):
        with pytest.raises(ValueError, match=r"takes \(B, 1, 28, 28\)"):
            model(torch.rand(shape))
    for edge in (32, "28", True, None):
        with pytest.raises(ValueError, match=r"edge is .*28 or 84 pixels"):
            InstanceNormConvNet(edge)
    for name, value in (("width", 0), ("width", 2.0), ("num_classes", -1), ("in_chans", 0), ("dead_biases", 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            InstanceNormConvNet(84, **{name: value})


def test_it_learns():
    torch.manual_seed(0)
    model = InstanceNormConvNet(28, width=4, num_classes=2)
    y = torch.arange(16) % 2
    x = torch.rand(16, 1, 28, 28) * 0.3
    x[y == 1, :, :, ::4] = 1  # stripes: the norm takes brightness away, so classes must differ in structure
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
