"""Merged weights load into plain timm models, adapters into PEFT; outputs are those of the model."""

import json
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from avalanche_firn.models.backbones import load_backbone
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.models.lora_export import merged_state_dict, save_merged, save_peft_adapter
from avalanche_firn.models.parts import FeatureClassifier

PLAIN = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
MODELS = {
    "vit_tiny_patch16_224": PLAIN,
    "swin_tiny_patch4_window7_224": STAGES,
    "beit_base_patch16_224": PLAIN,  # reads qkv.weight, its qkv has no bias
}
CLOSE = dict(rtol=1e-9, atol=1e-9)


def fresh(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{"num_classes": 5} | MODELS[name] | kwargs).eval().double()
    with torch.no_grad():  # timm starts heads and biases at 0: outputs that no weight can change by much
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def scramble(composition):
    with torch.no_grad():
        for layer in composition.layers.values():
            for part in layer.parts:
                if layer.is_free(part):
                    layer.B[part][-1].normal_(std=0.3)
                if part in layer.omega and layer.is_free(part):
                    layer.omega[part].add_(0.5 * torch.randn_like(layer.omega[part]))


def with_tasks(model, tasks=3, rank=2, freeze=True, **settings):
    """Tasks with arbitrary numbers; some matrices are frozen after the first, more after the second."""
    add_composed_lora(model, rank=rank, scale=0.5, **settings)
    composition = LoRAComposition(model)
    for task in range(tasks):
        if task and freeze:
            composition.freeze(torch.arange(len(composition.positions)) % 5 < task)
        composition.open_task()
        scramble(composition)
        composition.close_task()
    return composition


def images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ------------------------------------------------------------------------------ merged weights
@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_load_into_a_plain_model(name):
    model, x = fresh(name), images()
    composition = with_tasks(model)
    assert composition.frozen.any()
    state = fresh(name).state_dict()
    for task in (0, 1, 2, None):
        merged = merged_state_dict(model, task)
        assert list(merged) == list(state) and {k: v.shape for k, v in merged.items()} == {
            k: v.shape for k, v in state.items()
        }
        plain = fresh(name)
        plain.load_state_dict(merged, strict=True)
        with torch.no_grad():
            if task is None:
                torch.testing.assert_close(plain(x), model(x), **CLOSE)
            else:
                with composition.as_task(task):
                    torch.testing.assert_close(plain(x), model(x), **CLOSE)
    changed = {key for key, value in merged_state_dict(model).items() if not torch.equal(value, state[key])}
    assert changed == {f"{name}.weight" for name in composition.layers}


def test_merged_weights_of_an_open_task_and_of_none():
    model = fresh()
    composition = with_tasks(model, 0)
    assert all(torch.equal(v, fresh().state_dict()[k]) for k, v in merged_state_dict(model).items())
    for _ in range(2):
        composition.open_task()
        scramble(composition)
        plain = fresh()
        plain.load_state_dict(merged_state_dict(model))
        torch.testing.assert_close(plain(images()), model(images()), **CLOSE)
        with pytest.raises(IndexError, match=rf"task {composition.num_closed} is not closed"):
            merged_state_dict(model, composition.num_closed)
        composition.close_task()


def test_merged_weights_are_copies():
    model = fresh()
    composition = with_tasks(model)
    before = model(images())
    for task in (None, 2, 0):
        for value in merged_state_dict(model, task).values():
            assert not value.requires_grad
            value.zero_()
    assert torch.equal(model(images()), before)
    assert composition.layers["blocks.0.mlp.fc1"].merged_weight(0).abs().max() > 0


@pytest.mark.parametrize("split", [None, {}])
def test_merged_weights_of_a_split_layer(split):
    model = fresh()
    composition = with_tasks(model, split=split)
    layer = composition.layers["blocks.1.attn.qkv"]
    assert layer.parts == (("full",) if split == {} else ("q", "k", "v"))
    expected = layer.base.weight.detach().clone()
    for index, part in enumerate(layer.parts):
        for task in range(2):
            update = layer.scale * layer.snapshots[1, index, task] * (layer.A[part][task] @ layer.B[part][task])
            expected.view(len(layer.parts), -1, 16)[index] += update.detach().T
    torch.testing.assert_close(merged_state_dict(model, 1)["blocks.1.attn.qkv.weight"], expected, **CLOSE)


def test_a_wrapper_keeps_its_prefix_and_a_part_of_it_has_none():
    model = FeatureClassifier(fresh(num_classes=0), TaskwiseLinearHead(16).double())
    model.head.add_task([0, 1])
    composition = with_tasks(model)
    merged = merged_state_dict(model, 1)
    assert "backbone.blocks.0.attn.qkv.weight" in merged and not any(".base." in key for key in merged)
    other = FeatureClassifier(fresh(num_classes=0), TaskwiseLinearHead(16).double())
    other.load_state_dict(merged)
    with torch.no_grad(), composition.as_task(1):
        torch.testing.assert_close(other.eval()(images()), model.eval()(images()), **CLOSE)
    backbone = merged_state_dict(model, 1, submodule="backbone")
    fresh(num_classes=0).load_state_dict(backbone)
    assert all(torch.equal(value, merged[f"backbone.{key}"]) for key, value in backbone.items())
    with pytest.raises(
        ValueError, match=r"'back' is no module of FeatureClassifier; top level: \['backbone', 'head'\]"
    ):
        merged_state_dict(model, submodule="back")
    with pytest.raises(ValueError, match="TaskwiseLinearHead has no composed LoRA layer"):
        merged_state_dict(model, submodule="head")


def test_a_single_layer_as_the_model():
    linear = nn.Sequential(nn.Linear(6, 4))
    add_composed_lora(linear, ["0"], rank=2)
    LoRAComposition(linear).open_task()
    assert list(merged_state_dict(linear[0])) == ["weight", "bias"]


def test_saved_merged_weights_are_a_file_for_load_backbone(tmp_path):
    model = fresh()
    composition = with_tasks(model)
    path = tmp_path / "task1.safetensors"
    save_merged(model, path, 1, metadata={"method": "LoRAC-IPC"})
    assert all(torch.equal(load_file(path)[key], value) for key, value in merged_state_dict(model, 1).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "method": "LoRAC-IPC"}
    backbone = load_backbone("vit_tiny_patch16_224", weights=path, **PLAIN).module.eval()
    with torch.no_grad(), composition.as_task(1):
        expected = model.forward_head(model.forward_features(images()), pre_logits=True)
        assert expected.abs().max() > 1  # float32, what load_backbone makes of it
        torch.testing.assert_close(backbone(images().float()).double(), expected, rtol=1e-5, atol=1e-5)
    wrapped = FeatureClassifier(fresh(), nn.Linear(5, 2).double())
    with_tasks(wrapped)
    save_merged(wrapped, path, submodule="backbone")
    fresh().load_state_dict(load_file(path))


@pytest.mark.parametrize("save", [save_merged, save_peft_adapter])
def test_refused(save, tmp_path):
    with pytest.raises(ValueError, match=r"VisionTransformer has no composed LoRA layer.*add_composed_lora"):
        save(fresh(), tmp_path / "x")
    model = fresh()
    composition = with_tasks(model, 2)
    for task in (2, -1):
        with pytest.raises(IndexError, match=f"task {task} is not closed; 0 to 1 are accepted"):
            save(model, tmp_path / "x", task)
    composition.open_task()
    with pytest.raises(IndexError, match="task 2 is not closed; 0 to 1"):
        save(model, tmp_path / "x", 2)
    with pytest.raises(ValueError, match="'stem' is no module of VisionTransformer"):
        save(model, tmp_path / "x", submodule="stem")
    assert not (tmp_path / "x").exists()


def test_an_adapter_without_tasks_or_of_a_bare_layer_is_refused(tmp_path):
    model = fresh()
    composition = with_tasks(model, 0)
    with pytest.raises(ValueError, match="hold no task yet: the adapter would be empty"):
        save_peft_adapter(model, tmp_path / "x")
    composition.open_task()
    with pytest.raises(ValueError, match="the model is a single layer"):
        save_peft_adapter(model, tmp_path / "x", submodule="blocks.0.mlp.fc1")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------- adapter
def read(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def applied(config, tensors, plain):
    """What PEFT computes from the files, by its definition ``W + alpha / r B A``."""
    for name in config["target_modules"]:
        A, B = (tensors.pop(f"base_model.model.{name}.lora_{factor}.weight") for factor in "AB")
        assert config["rank_pattern"][name] == config["alpha_pattern"][name] == A.shape[0] == B.shape[1]
        with torch.no_grad():
            plain.get_submodule(name).weight += B @ A
    assert not tensors and config["r"] == config["lora_alpha"] == max(config["rank_pattern"].values())
    return plain


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", [0, 1, 2, None])
def test_files_of_an_adapter(name, task, tmp_path):
    model = fresh(name)
    composition = with_tasks(model)
    if task is None:
        composition.open_task()
        scramble(composition)
    save_peft_adapter(model, tmp_path / "deep" / "folder", task)
    config, tensors = read(tmp_path / "deep" / "folder")
    assert config["target_modules"] == list(composition.layers) and config["peft_type"] == "LORA"
    plain = applied(config, tensors, fresh(name))
    expected = merged_state_dict(model, task)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, expected[key], **CLOSE)


def test_pairs_that_contribute_nothing_are_left_out(tmp_path):
    model = fresh()
    composition = with_tasks(model, 1)
    frozen = torch.tensor([position.endswith((".q", "fc2")) for position in composition.positions])
    composition.freeze(frozen)
    composition.open_task()
    scramble(composition)
    with torch.no_grad():
        composition.layers["blocks.0.mlp.fc1"].omega["full"].zero_()
    composition.close_task()
    save_peft_adapter(model, tmp_path)
    config, _ = read(tmp_path)
    ranks = config["rank_pattern"]
    assert ranks["blocks.0.attn.qkv"] == 2 * (1 + 2 + 2) and ranks["blocks.0.attn.proj"] == 2 * 2
    assert ranks["blocks.0.mlp.fc2"] == 2 and ranks["blocks.0.mlp.fc1"] == 2 and ranks["blocks.1.mlp.fc1"] == 4


def test_an_adapter_that_changes_nothing(tmp_path):
    model = fresh()
    composition = with_tasks(model, 0)
    composition.open_task()
    save_peft_adapter(model, tmp_path)
    config, tensors = read(tmp_path)
    assert set(config["rank_pattern"].values()) == {1} and all((value == 0).all() for value in tensors.values())


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:.*adapter keys.*")
def test_peft_computes_what_the_model_does(peft, name, tmp_path):
    model = fresh(name)
    composition = with_tasks(model)
    for task in range(3):
        save_peft_adapter(model, tmp_path / str(task), task)
        loaded = peft.PeftModel.from_pretrained(fresh(name), tmp_path / str(task)).eval()
        adapted = [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert adapted == [f"base_model.model.{n}" for n in composition.layers]
        with torch.no_grad(), composition.as_task(task):
            expected = model(images())
            if name != "beit_base_patch16_224":
                torch.testing.assert_close(loaded(images()), expected, **CLOSE)
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(images()), expected, **CLOSE)
        for key, value in merged.state_dict().items():
            torch.testing.assert_close(value, merged_state_dict(model, task)[key], **CLOSE)


def test_peft_loads_a_part_of_a_wrapper_and_an_open_task(peft, tmp_path):
    model = FeatureClassifier(fresh(num_classes=0), nn.Linear(16, 3).double())
    composition = with_tasks(model, 1)
    composition.open_task()
    scramble(composition)
    save_peft_adapter(model, tmp_path, submodule="backbone")
    loaded = peft.PeftModel.from_pretrained(fresh(num_classes=0), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()), model.backbone(images()), **CLOSE)


def test_peft_loads_an_adapter_that_changes_nothing(peft, tmp_path):
    model = fresh()
    with_tasks(model, 0).open_task()
    save_peft_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    torch.testing.assert_close(loaded(images()), fresh()(images()), **CLOSE)


def test_peft_tells_layers_apart_whose_names_end_alike(peft, tmp_path, recwarn):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"first": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
            self.double()

        def forward(self, x):
            return self.inner["other"](self.inner["first"](self.other(self.first(x))))

    model = Twice()
    add_composed_lora(model, ["first", "other"], rank=2)  # "inner.first" too
    composition = LoRAComposition(model)
    composition.open_task()
    scramble(composition)
    composition.close_task()
    composition.freeze(torch.tensor(["inner" in position for position in composition.positions]))
    composition.open_task()
    scramble(composition)  # ranks: 4 outside, 2 inside
    save_peft_adapter(model, tmp_path / "all")
    ranks = read(tmp_path / "all")[0]["rank_pattern"]
    assert {name: ranks[name] for name in model.inner} == {"first": 4, "other": 4} and ranks["inner.first"] == 2
    x = torch.randn(3, 6).double()
    loaded = peft.PeftModel.from_pretrained(Twice(), tmp_path / "all")
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)

    part = Twice()  # only "first" is adapted, not "inner.first"
    composed = add_composed_lora(Twice(), ["first"], rank=2)["first"]
    composed.open_task()
    composed.B["full"][0].data.normal_()
    part.first = composed
    save_peft_adapter(part, tmp_path / "part")
    loaded = peft.PeftModel.from_pretrained(Twice(), tmp_path / "part")
    torch.testing.assert_close(loaded(x), part(x), **CLOSE)
    assert not any(re.search("missing|unexpected", str(w.message), re.I) for w in recwarn)
