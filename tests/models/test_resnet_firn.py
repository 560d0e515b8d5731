"""models/resnet_firn.py: the network is the protocols' small-image ResNet-18, and timm treats it as its own."""

import pytest
import timm
import torch
from scipy import stats
from timm.models.resnet import ResNet
from torch import nn
from torch.nn import functional

from avalanche_firn.models import find_parts, load_backbone
from avalanche_firn.models.backbones import WeightsError
from avalanche_firn.models.resnet_firn import SmallImageResNet, resnet18_cifar

TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}  # builds and runs in no time


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("resnet18_cifar", **{**TINY, **kwargs})


def test_number_of_parameters_by_hand():
    total = 3 * 64 * 9 + 2 * 64  # stem and its BatchNorm
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            entering = width if block == 0 else channels
            total += 9 * entering * channels + 9 * channels * channels + 2 * 2 * channels
            if stage and block == 0:
                total += width * channels + 2 * channels  # 1x1 shortcut and its BatchNorm
        width = channels
    assert total == 11_168_832
    bare = resnet18_cifar()
    assert sum(p.numel() for p in bare.parameters()) == total
    assert isinstance(bare.fc, nn.Identity) and bare.num_features == 512
    bare.reset_classifier(100)  # UCL's head, for every data set
    assert sum(p.numel() for p in bare.parameters()) == total + 513 * 100


def test_stem_and_the_rest_of_the_model():
    model, imagenet = small(num_classes=10), timm.create_model("resnet18", num_classes=10, **TINY)
    conv = model.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert not any(isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)) for m in model.modules())
    assert isinstance(model, ResNet) and isinstance(model, SmallImageResNet)
    shapes = {n: tuple(t.shape) for n, t in imagenet.state_dict().items()}
    assert shapes.pop("conv1.weight") == (64, 3, 7, 7)
    own = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert own.pop("conv1.weight") == (64, 3, 3, 3)
    assert own == shapes


@pytest.mark.parametrize(("size", "tokens"), [(32, 4), (64, 8), (28, 4)])
def test_resolution_of_the_stages(size, tokens):
    maps = small(features_only=True).eval()
    x = torch.zeros(2, 3, size, size)
    edges = [o.shape[-1] for o in maps(x)]
    assert edges[0] == edges[1] == size and edges[-1] == tokens
    assert maps.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [-(-size // r) for r in maps.feature_info.reduction()] == edges
    assert small(num_classes=7)(x).shape == (2, 7)


@pytest.mark.parametrize("size", [32, 64])
def test_full_width_shapes(size):
    model = timm.create_model("resnet18_cifar", num_classes=10).eval()
    with torch.no_grad():
        maps = model.forward_features(torch.zeros(1, 3, size, size))
        assert maps.shape == (1, 512, size // 8, size // 8)
        assert model.forward_head(maps).shape == (1, 10)
        assert model.forward_head(maps, pre_logits=True).shape == (1, 512)


def test_features_equal_a_composition_by_hand():
    model = small(num_classes=5).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics that an untrained BatchNorm doesn't have
            if "running_mean" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.2)
            elif "running_var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        for name, parameter in model.named_parameters():
            if ".bn2." in name:  # zero at the start: the branch would not count
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    x = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    state = model.state_dict()

    def norm(value, name):
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (value - mean) / (var + 1e-5).sqrt() * weight + bias

    value = norm(functional.conv2d(x, state["conv1.weight"], stride=1, padding=1), "bn1").relu()
    for stage in (1, 2, 3, 4):
        name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        branch = functional.conv2d(value, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        branch = functional.conv2d(norm(branch, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
        if f"{name}.downsample.0.weight" in state:
            value = functional.conv2d(value, state[f"{name}.downsample.0.weight"], stride=stride)
            value = norm(value, f"{name}.downsample.1")
        value = (norm(branch, f"{name}.bn2") + value).relu()
    features = value.mean((2, 3))
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features)
        torch.testing.assert_close(model(x), features @ state["fc.weight"].T + state["fc.bias"])
    assert features.std() > 0.01


def test_weights_start_with_the_distribution_of_timm():
    """Kaiming normal, fan-out: std sqrt(2 / (channels * k * k)), for the new stem as for every other convolution."""
    torch.manual_seed(0)
    model, imagenet = timm.create_model("resnet18_cifar"), timm.create_model("resnet18", num_classes=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight, expected = module.weight.detach(), (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(weight.mean().item()) < 0.1 * expected, name
            if name == "conv1":
                assert stats.kstest(weight.flatten().numpy() / expected, "norm").pvalue > 0.01
        elif isinstance(module, nn.BatchNorm2d):
            other = imagenet.get_submodule(name)
            assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias), name
    assert not model.layer1[0].bn2.weight.any()
    assert (small(zero_init_last=False).layer1[0].bn2.weight == 1).all()


def test_same_seed_same_weights_and_global_generator_decides():
    first, second = small(), small()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    torch.manual_seed(1)
    assert not torch.equal(timm.create_model("resnet18_cifar", **TINY).conv1.weight, first.conv1.weight)


def test_training_step_moves_every_parameter_and_learns():
    model = small(num_classes=3)
    y = torch.arange(24) % 3
    x = torch.randn(24, 3, 32, 32) + 2 * torch.eye(3)[y][:, :, None, None]  # one colour per class
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(8):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1:  # at step 0 the branches are still multiplied by zero
            assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_keywords_pass_through():
    assert small(in_chans=1, num_classes=4)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    model = small(num_classes=4, drop_rate=0.5, global_pool="max")
    assert model.drop_rate == 0.5 and model.global_pool.pool_type == "max"
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    expected = model.fc(model.forward_features(x).amax((2, 3)))
    torch.testing.assert_close(model(x), expected)
    assert small(dtype=torch.float64).conv1.weight.dtype == torch.float64
    for option in ({"stem_type": "deep"}, {"stem_width": 32}, {"replace_stem_pool": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            small(**option)


def test_reset_classifier_and_parts():
    model = small(num_classes=4)
    parts = find_parts(model)
    assert parts.head_name == "fc" and {n for n, _ in parts.head_parameters()} == {"fc.weight", "fc.bias"}
    model.reset_classifier(6)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 6)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_load_backbone_random_and_from_a_file(tmp_path):
    backbone = load_backbone("resnet18_cifar", pretrained=False)
    assert (backbone.num_features, backbone.weights, backbone.tag) == (512, "random", "resnet18_cifar")
    config = backbone.data_config
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1.0
    assert config["mean"] == (0.4914, 0.4822, 0.4465) and config["std"] == (0.2470, 0.2435, 0.2615)
    assert timm.get_pretrained_cfg("resnet18_cifar").pool_size == (4, 4)
    with pytest.raises(WeightsError, match="no weights"):
        load_backbone("resnet18_cifar")
    torch.save(small(num_classes=5).state_dict(), tmp_path / "w.pt")  # with its classifier, which is dropped
    loaded = load_backbone("resnet18_cifar", weights=tmp_path / "w.pt", **TINY)
    assert torch.equal(loaded.module.conv1.weight, small(num_classes=5).conv1.weight)
    with pytest.raises(WeightsError, match=r"conv1\.weight"):  # ImageNet's stem doesn't fit
        torch.save(timm.create_model("resnet18", **TINY).state_dict(), tmp_path / "i.pt")
        load_backbone("resnet18_cifar", weights=tmp_path / "i.pt", **TINY)
