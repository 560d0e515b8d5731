"""models/backbones.py and models/vit_firn.py: what loads, and that nothing else ever does."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from avalanche_firn.models import backbones, vit_firn
from avalanche_firn.models.backbones import WeightsError, list_backbones, load_backbone, renew_final_norm, state_sha256

TAG = "vit_firn_32.omniglot"
FILE = vit_firn.WEIGHTS / "vit_firn_32_omniglot.safetensors"
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}  # a vit_firn_32 that builds in no time


def tiny_state(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {**timm.create_model("vit_firn_32", num_classes=0, **TINY).state_dict(), **extra}


def written(path: Path, state: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(state, path)
    return path


# --- the embedded backbone -------------------------------------------------------------------------------------------


def test_embedded_weights_load_through_both_doors():
    backbone = load_backbone("vit_firn_32")
    assert (backbone.tag, backbone.weights, backbone.num_features) == (TAG, "pretrained", 96)
    assert load_backbone(TAG).weights_sha256 == backbone.weights_sha256
    config = backbone.data_config
    assert config["input_size"] == (3, 32, 32) and config["mean"] == (0.5, 0.5, 0.5) and config["crop_pct"] == 1.0
    file = safetensors.torch.load_file(FILE)
    state = backbone.module.state_dict()
    assert set(file) - set(state) == {"head.weight", "head.bias"}
    assert all(torch.equal(value, file[name].float()) for name, value in state.items())
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize(("kwargs", "shape"), [({}, 242), ({"num_classes": 0}, 96), ({"num_classes": 10}, 10)])
def test_timm_creates_the_embedded_model(kwargs, shape):
    model = timm.create_model(TAG, pretrained=True, **kwargs)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, shape)
    assert torch.equal(model.norm.weight, load_backbone(TAG).module.norm.weight)


def test_provenance_stands_beside_the_weights():
    record = json.loads(FILE.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert FILE.stat().st_size <= 4 * 2**20
    tensors = safetensors.torch.load_file(FILE)
    assert record["parameters"] == sum(v.numel() for v in tensors.values())
    assert record["data"]["classes"] == len(record["class_names"]) == tensors["head.bias"].numel() == 242
    assert 0.8 < record["held_out_accuracy"] <= 1.0
    assert record["licence"] == "MIT" and "omniglot" in record["origin"]
    assert record["command"].startswith("python examples/pretrain.py ") and record["settings"]["invert"] is True
    cfg = timm.get_pretrained_cfg(TAG)
    assert (list(cfg.mean), list(cfg.std), cfg.num_classes) == (record["mean"], record["std"], 242)


def test_embedded_features_tell_drawings_apart_better_than_random_ones():
    """Nearest class mean on scikit-learn's digits, even against odd rows; measured 0.97 against 0.50 to 0.60."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images[:600] / 16, dtype=torch.float32)[:, None]
    x = (torch.nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1) - 0.5) / 0.5
    y = torch.tensor(digits.target[:600])

    def accuracy(backbone):
        with torch.no_grad():
            features = backbone.module.eval()(x)
        means = torch.stack([features[::2][y[::2] == c].mean(0) for c in range(10)])
        return (torch.cdist(features[1::2], means).argmin(1) == y[1::2]).float().mean().item()

    torch.manual_seed(0)
    assert accuracy(load_backbone(TAG)) > accuracy(load_backbone("vit_firn_32", pretrained=False)) + 0.15


def test_other_image_sizes_resample_the_position_embedding():
    small, large = load_backbone(TAG), load_backbone(TAG, img_size=64)
    assert large.data_config["input_size"] == (3, 64, 64) and large.module.pos_embed.shape == (1, 65, 96)
    assert torch.equal(small.module.blocks[0].mlp.fc1.weight, large.module.blocks[0].mlp.fc1.weight)
    assert load_backbone(TAG, img_size=(28, 40)).module.patch_embed.grid_size == (4, 5)
    with pytest.raises(ValueError, match="img_size=7"):
        load_backbone(TAG, img_size=7)
    with pytest.raises(ValueError, match="dynamic_img_size"):
        timm.create_model("vit_firn_32", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"\(16, 16\) pixels given to a model of img_size=\(32, 32\)"):
        small.module(torch.zeros(1, 3, 16, 16))


def test_stem_is_the_one_of_the_larger_model():
    model = timm.create_model("vit_tin_32")
    shapes = {name: tuple(value.shape) for name, value in model.patch_embed.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "net.0.weight": (48, 3, 3, 3),
        "net.1.weight": (48,),
        "net.3.weight": (96, 48, 3, 3),
        "net.4.weight": (96,),
        "net.6.weight": (192, 96, 3, 3),
    }
    assert model.pos_embed.shape == (1, 17, 192) and len(model.blocks) == 6
    with pytest.raises(ValueError, match="patch_size=4"):
        timm.create_model("vit_firn_32", patch_size=4)
    with pytest.raises(ValueError, match="embed_dim=48"):
        timm.create_model("vit_firn_32", embed_dim=48)


def test_our_names_are_in_the_registry_of_timm():
    assert list_backbones() == ["convnet_28", "convnet_84", "digit_convnet", "resnet18_cifar", TAG, "vit_tin_32"]
    assert timm.is_model("vit_firn_32") and TAG in timm.list_pretrained("vit_firn*")


# --- other architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "features"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, 192),
        ("resnet18", {}, 512),
        ("mobilenetv3_small_050", {"in_chans": 1}, 1024),  # its classifier follows a layer wider than num_features
    ],
)
def test_random_backbones_give_features_of_the_stated_width(name, kwargs, features):
    backbone = load_backbone(name, pretrained=False, **kwargs)
    channels, height, width = backbone.data_config["input_size"]
    assert (channels, height) == (kwargs.get("in_chans", 3), kwargs.get("img_size", 224))
    assert len(backbone.data_config["mean"]) == len(backbone.data_config["std"]) == channels
    assert backbone.module.training
    out = backbone.module.eval()(torch.randn(2, channels, height, width))
    assert out.shape == (2, features) and backbone.num_features == features
    assert (backbone.weights, backbone.tag) == ("random", name)


def test_hash_covers_names_types_shapes_and_values():
    torch.manual_seed(0)
    first = load_backbone("vit_firn_32", pretrained=False, **TINY)
    torch.manual_seed(0)
    second = load_backbone("vit_firn_32", pretrained=False, **TINY)
    assert first.weights_sha256 == second.weights_sha256 == state_sha256(first.module)
    with torch.no_grad():
        second.module.norm.bias[0] += 1e-7
    assert state_sha256(second.module) != first.weights_sha256
    assert state_sha256(torch.nn.BatchNorm1d(3)) == state_sha256(torch.nn.BatchNorm1d(3))  # scalar integer buffer
    assert state_sha256(torch.nn.Linear(2, 2).bfloat16()) != state_sha256(torch.nn.Linear(2, 2))


def test_fresh_final_norm():
    kept, fresh = load_backbone(TAG), load_backbone(TAG, fresh_final_norm=True)
    norm = fresh.module.norm
    assert type(norm) is torch.nn.LayerNorm and norm.eps == 1e-5
    assert torch.equal(norm.weight, torch.ones(96)) and torch.equal(norm.bias, torch.zeros(96))
    assert torch.equal(kept.module.pos_embed, fresh.module.pos_embed)
    assert kept.weights_sha256 != fresh.weights_sha256
    features = fresh.module.eval()(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(features.norm(dim=1), torch.full((4,), 96**0.5), rtol=1e-3, atol=0)
    pooled = load_backbone("vit_firn_32", pretrained=False, fresh_final_norm=True, global_pool="avg", **TINY)
    assert type(pooled.module.fc_norm) is torch.nn.LayerNorm and pooled.module.fc_norm.eps == 1e-5
    assert renew_final_norm(kept.module) and state_sha256(kept.module) == fresh.weights_sha256
    assert not renew_final_norm(torch.nn.Linear(2, 2))
    for name in ("resnet18", "convnext_atto"):
        with pytest.raises(ValueError, match=f"'{name}' has no final LayerNorm"):
            load_backbone(name, pretrained=False, fresh_final_norm=True)


# --- local files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "float16", "pth", "wrapped", "with classifier"])
def test_local_files(tmp_path, kind):
    state = tiny_state()
    path = tmp_path / ("w.safetensors" if kind in ("safetensors", "float16", "with classifier") else "w.pth")
    if kind == "pth":
        torch.save(state, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif kind == "float16":
        state = {k: v.half() for k, v in state.items()}
        written(path, state)
    elif kind == "with classifier":
        written(path, {**state, "head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)})
    else:
        written(path, state)
    backbone = load_backbone("vit_firn_32", weights=path, **TINY)
    loaded = backbone.module.state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[k], v.float()) for k, v in state.items())
    assert (
        load_backbone("vit_firn_32", pretrained=False, weights=path, **TINY).weights_sha256 == backbone.weights_sha256
    )
    assert backbone.weights == str(path) and {v.dtype for v in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_local_file_of_another_family(tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = load_backbone(name, weights=written(tmp_path / "r.safetensors", state)).module.state_dict()
    assert 0 < len(set(state) - set(loaded)) <= 20
    assert all(torch.equal(state[k], v) for k, v in loaded.items() if k in state)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("resnet10t", ("fc.",)),
        ("convnext_atto", ("head.fc.",)),  # its last norm is in "head" too and stays
        ("levit_128s", ("head.", "head_dist.")),  # norms and linears of the two classifiers
    ],
)
def test_what_counts_as_the_classifier(name, prefixes):
    assert backbones._classifier_prefixes(timm.create_model(name, num_classes=0)) == prefixes


def refusal(name="vit_firn_32", **kwargs) -> str:
    with pytest.raises(WeightsError) as info:
        load_backbone(name, **kwargs)
    return str(info.value)


def test_files_that_do_not_fit_are_listed_key_by_key(tmp_path):
    state = tiny_state(extra=torch.zeros(2))
    del state["norm.bias"], state["cls_token"]
    state["pos_embed"] = torch.zeros(1, 17, 64)
    path = written(tmp_path / "w.safetensors", state)
    message = refusal(weights=path, **TINY)
    for part in (
        str(path),
        "'vit_firn_32'",
        "expected 26 tensors, found 25",
        "missing 2 (cls_token, norm.bias)",
        "unexpected 1 (extra)",
        "wrong shape 1 (pos_embed (1, 17, 64), expected (1, 17, 32))",
    ):
        assert part in message
    assert "(26 in all)" in refusal("resnet18", weights=written(tmp_path / "v.safetensors", tiny_state()))
    # A final norm that is going to be replaced may be absent; a classifier of another model is no classifier here.
    half = tiny_state()
    del half["norm.bias"], half["norm.weight"]
    path = written(tmp_path / "n.safetensors", half)
    assert load_backbone("vit_firn_32", weights=path, fresh_final_norm=True, **TINY).module.norm.weight.sum() == 32
    assert "missing 2 (norm.weight, norm.bias)" in refusal(weights=path, **TINY)
    path = written(tmp_path / "f.safetensors", tiny_state(**{"fc.weight": torch.zeros(7, 32)}))
    assert "unexpected 1 (fc.weight)" in refusal(weights=path, **TINY)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/nonexistent/payload"),))


def test_unreadable_files(tmp_path):
    assert "no such file" in refusal(weights=tmp_path / "absent.safetensors")
    assert ".safetensors, .pth" in refusal(weights=tmp_path)
    whole = written(tmp_path / "w.safetensors", tiny_state()).read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated or not a weights file" in refusal(weights=tmp_path / "t.safetensors", **TINY)
    (tmp_path / "t.pth").write_bytes(b"not a checkpoint")
    assert "t.pth" in refusal(weights=tmp_path / "t.pth", **TINY)
    torch.save({"state_dict": tiny_state(), "code": Payload()}, tmp_path / "p.pth")
    assert "isn't unpickled" in refusal(weights=tmp_path / "p.pth", **TINY)
    torch.save([1, 2], tmp_path / "l.pt")
    assert "holds no state dict" in refusal(weights=tmp_path / "l.pt", **TINY)
    path = written(tmp_path / "nan.safetensors", tiny_state(**{"norm.bias": torch.full((32,), float("nan"))}))
    assert "NaN values in norm.bias" in refusal(weights=path, **TINY)


# --- timm's weights --------------------------------------------------------------------------------------------------


def test_weights_that_timm_does_not_have():
    message = refusal("vit_tin_32")
    assert "'vit_tin_32'" in message and "weights=" in message and "pretrained=False" in message


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("resnet10t.c3_in1k")
    for part in ("'resnet10t.c3_in1k'", "network access", "weights='FILE.safetensors'", "pretrained=False"):
        assert part in message


def test_embedded_file_removed_or_replaced(tmp_path, monkeypatch):
    cfg = timm.get_pretrained_cfg(TAG)
    monkeypatch.setattr(cfg, "file", str(tmp_path / "gone.safetensors"))
    monkeypatch.setattr(backbones.timm, "get_pretrained_cfg", lambda *a, **k: cfg)
    assert "gone.safetensors" in refusal(TAG)


def test_timm_weights_never_cover_a_model_partly(caplog):
    message = refusal(TAG, depth=7)  # one block more than the file has
    assert "don't fit the model" in message and "'depth': 7" in message and "blocks.6.norm1.weight" in message
    assert "fc_norm" in refusal(TAG, global_pool="avg")
    with caplog.at_level(logging.INFO), backbones._timm_reports() as reports:
        timm.create_model(TAG, pretrained=True, num_classes=3)  # timm alone only mentions what it leaves random
    assert reports and "head.weight" in reports[0]
    assert not logging.getLogger("timm.models._builder").handlers


# --- names and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "match"),
    [
        ("vit_frin_32", {}, ValueError, "did you mean vit_firn_32"),
        ("zzzzzz", {}, ValueError, "list_models"),
        ("vit_firn_32.omniglob", {}, ValueError, "no tag 'omniglob'; timm knows: omniglot"),
        ("", {}, TypeError, "name=''"),
        (3, {}, TypeError, "name=3"),
        (TAG, {"pretrained": "w.pth"}, TypeError, "goes into weights="),
        (TAG, {"num_classes": 10}, ValueError, "num_classes can't be passed"),
        ("hf-hub:owner/name", {"weights": "w.pth"}, ValueError, "plain name of its architecture"),
        ("vit_firn_32", {"pretrained": False, "dept": 3}, ValueError, "can't be built with num_classes=0, dept=3"),
        (TAG, {"dept": 3}, ValueError, "dept=3"),
        ("vit_firn_32", {"pretrained": False, "global_pool": "", **TINY}, ValueError, "global_pool='avg'"),
    ],
)
def test_wrong_arguments(name, kwargs, error, match):
    with pytest.raises(error, match=match) as info:
        load_backbone(name, **kwargs)
    assert not isinstance(info.value, WeightsError)
