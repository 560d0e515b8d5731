"""models/convnets.py and the ResNet beside it: Co2L's networks to the golden numbers, and what timm needs of them."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from avalanche_firn.models import DigitConvNet, ProjectionHead, find_parts, load_backbone, with_taskwise_head
from avalanche_firn.models.backbones import WeightsError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def fill(modules, first_seed):
    """The golden file's rule: tensor i from RandomState(first_seed + i), normal with fan-in, or uniform if 1-d."""
    names = [(module, name, p) for module in modules for name, p in module.named_parameters()]
    for i, (module, name, parameter) in enumerate(names):
        draw = np.random.RandomState(first_seed + i)
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            values = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            owner = module.get_submodule(name.rpartition(".")[0])
            scale = isinstance(owner, nn.BatchNorm2d) and name.endswith("weight")
            values = draw.uniform(-0.5, 0.5, shape) + scale
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
    return [tuple(p.shape) for _, _, p in names]


def close(found, expected, dtype):
    """Within the tolerance relative to the largest entry."""
    expected = torch.from_numpy(expected)
    worst = (found.detach().double() - expected).abs().max() / expected.abs().max()
    assert worst < TOLERANCE[dtype], worst


def shapes_of(arrays, key):
    return [tuple(map(int, shape.split(","))) for shape in arrays[key].tolist()]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_resnet_and_projector_equal_the_golden_numbers(golden, dtype):
    arrays = golden("cila", "networks")
    encoder, projector = timm.create_model("resnet18_cifar").to(dtype), ProjectionHead(512).to(dtype)
    assert [sum(p.numel() for p in m.parameters()) for m in (encoder, projector)] == arrays["resnet_sizes"].tolist()
    assert arrays["resnet_sizes"].tolist() == [11_168_832, 328_320]
    assert fill((encoder, projector), int(arrays["fill_seed"])) == shapes_of(arrays, "resnet_parameter_shapes")
    x = torch.from_numpy(arrays["resnet_input"]).to(dtype)
    for mode in ("train", "eval"):  # in this order: evaluation comes after exactly one pass in training mode
        encoder.train(mode == "train")
        with torch.no_grad():
            features = encoder(x)
            projection = functional.normalize(projector(features))
        close(projection, arrays[f"resnet_{mode}_projection"], dtype)
        close(features, arrays[f"resnet_{mode}_features"], dtype)
        close(encoder.bn1.running_mean, arrays["resnet_stem_running_mean"], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_digit_network_and_projector_equal_the_golden_numbers(golden, dtype):
    arrays = golden("cila", "networks")
    encoder, projector = timm.create_model("digit_convnet").to(dtype), ProjectionHead(500, out_features=500).to(dtype)
    assert [sum(p.numel() for p in m.parameters()) for m in (encoder, projector)] == arrays["digit_sizes"].tolist()
    assert arrays["digit_sizes"].tolist() == [426_070, 501_000]
    assert fill((encoder, projector), int(arrays["fill_seed"]) + 500) == shapes_of(arrays, "digit_parameter_shapes")
    with torch.no_grad():
        features = encoder(torch.from_numpy(arrays["digit_input"]).to(dtype))
        close(features, arrays["digit_features"], dtype)
        close(projector(features), arrays["digit_projection_raw"], dtype)


def test_projector():
    assert [p.shape for p in ProjectionHead(6).parameters()] == [(6, 6), (6,), (128, 6), (128,)]
    head = ProjectionHead(6, 4, 3).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    state = head.state_dict()
    hidden = (x @ state["hidden.weight"].T + state["hidden.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x).detach(), hidden @ state["output.weight"].T + state["output.bias"])
    assert not torch.allclose(head(x).norm(dim=1), torch.ones(5, dtype=torch.float64))  # normalising is left outside
    for wrong in (
        {"in_features": 0},
        {"in_features": 4, "hidden_features": 0},
        {"in_features": 4, "out_features": 1.5},
    ):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is .*at least 1, is accepted"):
            ProjectionHead(**wrong)


def test_timm_s_ways_of_calling_it():
    model = timm.create_model("digit_convnet", num_classes=7)
    x = torch.rand(3, 1, 28, 28)
    features = model.forward_features(x)
    assert features.shape == (3, 500) and (features >= 0).all() and model.num_features == 500
    assert model.forward_head(features, pre_logits=True) is features
    assert torch.equal(model(x), model.fc(features)) and model(x).shape == (3, 7)
    assert find_parts(model).head_name == "fc" and model.get_classifier() is model.fc
    model.reset_classifier(4)
    assert model(x).shape == (3, 4)
    model.reset_classifier(0)
    assert torch.equal(model(x), features) and model.num_classes == 0
    assert timm.create_model("digit_convnet", in_chans=3)(torch.rand(2, 3, 28, 28)).shape == (2, 500)
    for shape in ((2, 3, 28, 28), (2, 1, 32, 32), (1, 28, 28)):
        with pytest.raises(ValueError, match=r"takes \(B, 1, 28, 28\)"):
            model(torch.rand(shape))
    for name, value in (("num_classes", -1), ("in_chans", 0), ("num_classes", True)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            DigitConvNet(**{name: value})


def test_load_backbone_random_and_from_a_file(tmp_path):
    backbone = load_backbone("digit_convnet", pretrained=False)
    assert (backbone.num_features, backbone.weights, backbone.tag) == (500, "random", "digit_convnet")
    config = backbone.data_config
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 28, 28), (0.0,), (1.0,))
    with pytest.raises(WeightsError, match="no weights"):
        load_backbone("digit_convnet")
    torch.save(DigitConvNet(num_classes=5).state_dict(), tmp_path / "w.pt")  # the classifier of the file is dropped
    loaded = load_backbone("digit_convnet", weights=tmp_path / "w.pt").module
    assert torch.equal(loaded.conv1.weight, torch.load(tmp_path / "w.pt")["conv1.weight"])
    assert load_backbone("digit_convnet", pretrained=False, in_chans=3).data_config["input_size"] == (3, 28, 28)
    assert with_taskwise_head(loaded).head.in_features == 500


def test_it_learns():
    torch.manual_seed(0)
    model = DigitConvNet(num_classes=2)
    y = torch.arange(16) % 2
    x = torch.rand(16, 1, 28, 28) + y[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
