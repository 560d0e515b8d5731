"""add_composed_lora on timm's transformers: what is adapted, the function, its gradients, what is refused."""

import copy

import pytest
import timm
import torch
from torch import nn

from avalanche_firn.models.lora import TARGETS, ComposedLoRALinear, LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import FeatureClassifier

SIZE, PLAIN = {"img_size": 32}, {"embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
SEPARATE = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# name: timm's arguments, targets, number of matrices
CALLED = {
    "vit_tiny_patch16_224": (SIZE | PLAIN, None, 12),
    "deit_tiny_distilled_patch16_224": (SIZE | PLAIN, None, 12),
    "vit_tiny_r_s16_p8_224": (SIZE | PLAIN, None, 12),  # convolutions before the blocks
    "swin_tiny_patch4_window7_224": (SIZE | STAGES, None, 24),  # windows of a sample in the first dimension
    "cait_xxs24_224": (SIZE | PLAIN | {"init_values": 0.5}, SEPARATE, 2 * 6 + 2 * 6),
    "convit_tiny": (
        SIZE | PLAIN | {"embed_dim": 8, "local_up_to_layer": 1},
        ("attn.v", "*.mlp.fc?", "attn.qkv"),
        2 + 4 + 2,
    ),
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "ls_init_value": 0.5}, None, 8),  # (B, H, W, C)
}
READ = {  # multiply by ``qkv.weight`` themselves
    "beit_base_patch16_224": (SIZE | PLAIN, None, 12),
    "eva02_tiny_patch14_224": (PLAIN | {"img_size": 28, "embed_dim": 24}, ("attn.qkv", "attn.proj", "mlp.fc2"), 10),
    "swinv2_tiny_window8_256": (SIZE | STAGES, None, 24),
}
MODELS = CALLED | READ


def build(name):
    torch.manual_seed(0)
    settings, targets, _ = MODELS[name]
    model = timm.create_model(name, pretrained=False, num_classes=5, **settings).double().eval()
    with torch.no_grad():  # timm starts some of its gains and biases at 0, and attention all but uniform
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, targets, settings.get("img_size", 32)


def adapted(name, tasks):
    model, targets, size = build(name)
    add_composed_lora(model, targets, rank=2, scale=0.5)
    composition = LoRAComposition(model)
    for _ in range(tasks):
        composition.open_task()
        change(composition)
        composition.close_task()
    return model, composition, size


def change(composition):
    with torch.no_grad():
        for layer in composition.layers.values():
            for part in layer.parts:
                layer.B[part][-1].normal_(std=0.3)
                if part in layer.omega:
                    layer.omega[part].mul_(1.3)


def merged_by_hand(model, composition, name, task):
    """The plain model with the weights of a task (None: of the open one), by the formula; and these by name."""
    plain, *_ = build(name)
    weights = {}
    for path, layer in composition.layers.items():
        blocks = []
        for index, part in enumerate(layer.parts):
            scalars = [*layer.omega[part].tolist(), 1.0] if task is None else layer.snapshots[task, index].tolist()
            count = layer.num_tasks if task is None else task + 1
            pairs = zip(scalars[:count], list(layer.A[part])[:count], list(layer.B[part])[:count], strict=True)
            blocks.append(sum(layer.scale * scalar * (A @ B).detach() for scalar, A, B in pairs).T)
        weights[path] = plain.get_submodule(path).weight
        with torch.no_grad():
            weights[path].add_(torch.cat(blocks))
    return plain, weights


@pytest.mark.parametrize("name", MODELS)
def test_adapted_layers_and_the_function_before_the_first_step(name):
    plain, targets, size = build(name)
    model = copy.deepcopy(plain)
    layers = add_composed_lora(model, targets, rank=2)
    assert all(isinstance(layer, ComposedLoRALinear) and layer.scale == 0.5 for layer in layers.values())
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    composition = LoRAComposition(model)
    assert composition.layers == layers and len(composition.positions) == MODELS[name][2]
    assert all(
        layer.parts == (("q", "k", "v") if path.endswith("qkv") else ("full",)) for path, layer in layers.items()
    )
    kinds = [(path.rpartition(".")[2], part) for path, part in composition._places]
    assert sorted(kinds, key=kinds.index) == kinds  # kind by kind
    x = torch.randn(2, 3, size, size).double()
    expected = plain(x)
    assert torch.equal(model(x), expected)
    composition.open_task()
    assert torch.equal(model(x), expected) and model(x).requires_grad
    assert {n.replace(".base.", ".") for n, _ in model.named_parameters() if ".A." not in n and ".B." not in n} == {
        n for n, _ in plain.named_parameters()
    }


@pytest.mark.parametrize("name", MODELS)
def test_function_of_each_task(name):
    model, composition, size = adapted(name, 3)
    x = torch.randn(3, 3, size, size).double()
    for task in range(3):
        plain, _ = merged_by_hand(model, composition, name, task)
        with torch.no_grad(), composition.as_task(task):
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-11)
            torch.testing.assert_close(model(x[:1]), plain(x[:1]), rtol=0, atol=1e-11)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-11)  # now: as after the last


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    model, composition, size = adapted(name, 2)
    composition.open_task()
    change(composition)
    x = torch.randn(2, 3, size, size).double()
    model(x).square().sum().backward()
    plain, weights = merged_by_hand(model, composition, name, None)
    for weight in weights.values():
        weight.requires_grad_()
    plain(x).square().sum().backward()
    for path, layer in composition.layers.items():
        for part, G in zip(layer.parts, weights[path].grad.split(layer.height), strict=True):
            A, B = (list(getattr(layer, factor)[part]) for factor in "AB")
            close = dict(rtol=1e-9, atol=1e-9 * float(G.abs().max()))
            assert G.abs().max() > 0 and all(p.grad is None for p in (*A[:-1], *B[:-1]))
            torch.testing.assert_close(A[-1].grad, 0.5 * G.T @ B[-1].T, **close)
            torch.testing.assert_close(B[-1].grad, 0.5 * A[-1].T @ G.T, **close)
            scalars = torch.stack([0.5 * ((a.T @ G.T) * b).sum() for a, b in zip(A[:-1], B[:-1], strict=True)])
            torch.testing.assert_close(layer.omega[part].grad, scalars.detach(), **close)
    records = dict.fromkeys(composition.positions)
    with composition.recording({p: (lambda value, p=p: records.__setitem__(p, value)) for p in records}):
        model(x).square().sum().backward()
    expected = []
    for path, part in composition._places:
        weight, index = weights[path], composition.layers[path].parts.index(part)
        expected.append((weight * weight.grad).split(composition.layers[path].height)[index].abs().mean())
    torch.testing.assert_close(torch.stack(list(records.values())), torch.stack(expected).detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CALLED)
def test_samples_of_different_tasks_in_one_pass(name):
    model, composition, size = adapted(name, 3)
    x, tasks = torch.randn(6, 3, size, size).double(), torch.tensor([2, 0, 1, 1, 2, 0])
    with torch.no_grad():
        with composition.as_tasks(tasks):
            together = model(x)
        for n, task in enumerate(tasks.tolist()):
            with composition.as_task(task):
                torch.testing.assert_close(model(x[n : n + 1]), together[n : n + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", READ)
def test_a_model_that_reads_weights_takes_one_task_at_a_time(name):
    model, composition, size = adapted(name, 2)
    text = r"the model reads the weight of a layer instead of calling it.*mixed='grouped' of TaskInferencePlugin"
    x = torch.randn(2, 3, size, size).double()
    with torch.no_grad(), composition.as_tasks(torch.tensor([0, 1])), pytest.raises(RuntimeError, match=text):
        model(x)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256"])
def test_a_task_starts_where_the_one_before_ended(name):
    model, composition, size = adapted(name, 2)
    x = torch.randn(8, 3, size, size).double()
    before = model(x)
    composition.open_task()
    after = model(x)
    assert after.requires_grad
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_a_wrapped_model_keeps_its_prefix():
    backbone, _, size = build("vit_tiny_patch16_224")
    backbone.reset_classifier(0)
    model = FeatureClassifier(backbone, nn.Linear(16, 4).double())
    layers = add_composed_lora(model, rank=2)
    assert next(iter(layers)) == "backbone.blocks.0.attn.qkv" and len(layers) == 8
    assert LoRAComposition(model).positions[0] == "backbone.blocks.0.attn.qkv.q"
    assert model(torch.randn(2, 3, size, size).double()).shape == (2, 4)


# ---------------------------------------------------------------------------- arguments
def small():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **SIZE, **PLAIN)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["blocks.1.mlp.fc1"], ["blocks.1.mlp.fc1"]),
        (["fc1"], ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        (["blocks.*.mlp.fc?"], [f"blocks.{b}.mlp.fc{i}" for b in range(2) for i in (1, 2)]),
        (("head", "attn.proj"), ["blocks.0.attn.proj", "blocks.1.attn.proj", "head"]),
    ],
)
def test_targets(targets, expected):
    assert list(add_composed_lora(small(), targets, rank=2)) == expected


def test_rank_scale_split_and_gates():
    layers = add_composed_lora(small(), rank=4, alpha=2.0)
    assert {(layer.rank, layer.scale) for layer in layers.values()} == {(4, 0.5)}
    layers = add_composed_lora(small(), rank=4, scale=0.8, split={}, init="svd")
    assert {(layer.scale, layer.parts, layer.init) for layer in layers.values()} == {(0.8, ("full",), "svd")}
    layers = add_composed_lora(small(), rank=4, split={"fc1": ("up", "gate")}, gates={"up": "gate"})
    assert layers["blocks.0.mlp.fc1"].parts == ("up", "gate") and layers["blocks.0.mlp.fc1"].gates == {"up": "gate"}
    assert layers["blocks.0.attn.qkv"].parts == ("full",) and layers["blocks.0.attn.qkv"].gates == {}
    layers = add_composed_lora(small(), rank=4, gates={"k": "q"})
    assert layers["blocks.0.attn.qkv"].gates == {"k": "q"} and layers["blocks.0.mlp.fc1"].gates == {}
    default = add_composed_lora(small())
    assert {(layer.rank, layer.scale, layer.init) for layer in default.values()} == {(16, 1 / 16, "kaiming")}


def test_models_without_such_layers_are_refused():
    resnet = timm.create_model("resnet10t", pretrained=False, num_classes=5)
    text = r"ResNet has no linear layer called attn\.qkv or .*mlp\.fc2; give targets=.*such as \['fc'\]"
    with pytest.raises(ValueError, match=text):
        add_composed_lora(resnet)
    settings = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
    convnext = timm.create_model("convnext_atto", pretrained=False, num_classes=5, **settings)  # 1x1 convolutions
    assert isinstance(convnext.get_submodule("stages.0.blocks.0.mlp.fc1"), nn.Conv2d)
    with pytest.raises(ValueError, match="ConvNeXt has no linear layer called"):
        add_composed_lora(convnext)
    with pytest.raises(ValueError, match=r"targets \['mlp\.fc1'\] match .*'stages\.0\.blocks\.0\.mlp\.fc1': 'Conv2d'"):
        add_composed_lora(convnext, ["mlp.fc1"])


def test_targets_that_match_nothing_are_refused():
    model = small()
    text = r"targets \['mlp\.fc3', 'qqq'\] match nothing in VisionTransformer; .*'fc1', 'fc2', 'head', 'proj', 'qkv'"
    with pytest.raises(ValueError, match=text):
        add_composed_lora(model, ["attn.qkv", "qqq", "mlp.fc3"])
    with pytest.raises(ValueError, match=r"targets \['norm1'\] match .*LayerNorm"):
        add_composed_lora(model, ["norm1"])
    assert not any(isinstance(module, ComposedLoRALinear) for module in model.modules())


def test_adding_twice_or_with_too_large_a_rank_is_refused():
    model = small()
    with pytest.raises(ValueError, match="rank is 17; 1 to 16, the smaller side of the matrix"):
        add_composed_lora(model, rank=17)
    assert not any(isinstance(module, ComposedLoRALinear) for module in model.modules())
    add_composed_lora(model, TARGETS[:1], rank=2)
    with pytest.raises(ValueError, match="has composed LoRA layers already"):
        add_composed_lora(model, TARGETS[2:], rank=2)
