"""Exports of finished runs: logits of what is loaded back, what is refused and why, what is written and when.

The reference of every comparison is the model of the strategy itself, in the state in which the run evaluated it last.
Runs are real ones of a second or two, on digits or on images made here.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from avalanche_firn.benchmarks import digits
from avalanche_firn.benchmarks.transforms import TRANSFORM_PRESETS, preset_transforms
from avalanche_firn.experiments import runner
from avalanche_firn.experiments.cli import _EXPORTS, main
from avalanche_firn.experiments.config import validate
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.export import (
    FORMATS,
    ExportedModel,
    ExportError,
    export_run,
    final_model,
    load_exported,
)
from avalanche_firn.experiments.export_card import preprocessing
from avalanche_firn.experiments.export_formats import FinalModel, timm_model
from avalanche_firn.models.backbones import load_backbone
from avalanche_firn.models.contrastive import ContrastiveClassifier
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.checkpoint_files import checkpoints, read_checkpoint, write_checkpoint
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

ALIGNMENT = {"epochs": 2, "samples_per_class": 32}
ADAM = {"optimizer": {"name": "adam", "lr": 0.01}}  # few steps have to move pairs that start at 0
VIEWS = {
    "augmentation": {"crop_scale": [0.7, 1.0], "flip": 0.0, "jitter": None, "grey": 0.0},
    "classifier": {"epochs": 2, "batch_size": 64, "lr": 0.1, "views": "evaluation"},
    "rehearsal": {"mem_size": 20},
}
METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "joint": {},
    "zapped": {"strategy": "naive", "zapping": {"schedule": "iteration", "every": 5}},
    "linear_probe": {},
    "replay": {"rehearsal": {"mem_size": 20}},
    "lp_ft": {"linear_probe": {"solver": "ridge"}},
    "slca": {"alignment": ALIGNMENT, "backbone_scale": 0.1},
    "slca_plus_plus": {"alignment": ALIGNMENT | {"scaling": "feature", "epochs": 2}},
    "lora": {"lora": {"rank": 4}, "training": ADAM},
    "cila": VIEWS,
    "lorac_newest": {
        "strategy": "lorac_ipc",
        "training": ADAM,
        "lora": {"rank": 4},
        "alignment": None,
        "task_inference": None,
    },
    "lorac_ipc": {
        "training": ADAM,
        "lora": {"rank": 4},
        "importance": {"threshold": 0.1},
        "alignment": {"epochs": 2, "clusters": 2, "samples_per_class": 32},
        "task_inference": {"clusters": 2},
    },
}


def recipe(folder: Path, label: str, **changes: Any) -> Any:
    method = {"strategy": label, "name": label, **METHODS[label]}
    raw = {
        "name": "mine",
        "output": str(folder),
        "seeds": [3],
        "device": "cpu",
        "threads": 1,
        "stream": {"name": "digits", "tasks": [5, 5], "class_order": "seeded"},
        "training": {"epochs": 1, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.01}},
        "methods": [method],
    }
    return validate(raw | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """``trained(label)`` -> folder and strategy of a finished run on digits, trained once."""
    done: dict[str, tuple[Path, Any]] = {}
    place = tmp_path_factory.mktemp("runs")

    def run(label: str, **changes: Any) -> tuple[Path, Any]:
        key = label + "".join(changes)
        if key not in done:
            done[key] = run_of(recipe(place, label, **changes), place / key)
        return done[key]

    return run


def run_of(config: Any, folder: Path) -> tuple[Path, Any]:
    """Train on the first 300 digits, where it is digits, and keep the strategy that the runner built."""
    kept: list[Any] = []
    scans, labels = digits._load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_load", lambda: (scans[:300], labels[:300]))
        build = runner.build_strategy
        patch.setattr(runner, "build_strategy", lambda parts: kept.append(build(parts)) or kept[0])
        runner.run(config, folder, quiet=True)
    return folder, kept[0]


@torch.no_grad()
def evaluated(strategy: Any, images: torch.Tensor, task: int | None = None) -> torch.Tensor:
    """Logits of the strategy's own model in evaluation mode, by class id."""
    model = strategy.model.eval()
    if task is not None:
        with LoRAComposition(model).as_task(task - 1):
            return model(images)
    for plugin in strategy.plugins:
        if isinstance(plugin, TaskInferencePlugin):
            return plugin.predict(model, images)
    return model(images)


def images(count: int = 16, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    largest = float(expected.abs().max())
    assert 0.01 < largest < 1000
    assert float((found - expected).abs().max()) <= 1e-6 * max(largest, 1.0)


def copied(run: Path, target: Path) -> Path:
    """A run that may be spoilt."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("export", "events.*"))
    return target


# --- the same logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [label for label in METHODS if label != "lorac_ipc"])
def test_every_format_gives_the_logits_of_the_run(label: str, trained, tmp_path: Path) -> None:
    folder, strategy = trained(label)
    expected = evaluated(strategy, images())

    file = export_run(folder, "timm", output=tmp_path / "weights.safetensors")
    plain = timm.create_model("vit_firn_32", num_classes=10)
    plain.load_state_dict(load_file(file), strict=True)
    assert_equal(plain.eval()(images()).detach(), expected)

    hub = export_run(folder, "hub-folder", output=tmp_path / "hub")
    assert_equal(timm.create_model(f"local-dir:{hub}", pretrained=True).eval()(images()).detach(), expected)

    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors"))
    assert isinstance(own, ExportedModel) and not own.training
    assert_equal(own(images()).detach(), expected)
    assert own.class_ids == tuple(range(10)) and own.labels == tuple("0123456789")


def test_aligned_classifiers_are_exported_and_raw_ones_are_not(trained, tmp_path: Path) -> None:
    for label in ("slca", "slca_plus_plus"):
        folder, strategy = trained(label)
        state = read_checkpoint(checkpoints(folder / "checkpoint")[0])["strategy"]["model"]["tensors"]
        raw = torch.cat([state["head.weights.0"], state["head.weights.1"]])
        aligned, _ = strategy.model.head.weight_matrix()
        assert not torch.allclose(raw, aligned, atol=1e-4)  # else this test says nothing
        assert torch.equal(final_model(folder).head.weight_matrix()[0], aligned)
    scales = strategy.model.head.input_scales
    assert scales.tolist() == pytest.approx([1.02, 1.0])
    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors")).model
    assert torch.equal(own.head.input_scales, scales)
    assert not any("head" in n and "scale" in n for n in load_file(export_run(folder, "timm", force=True)))


def test_task_inference_is_kept_by_our_own_format_alone(trained, tmp_path: Path) -> None:
    folder, strategy = trained("lorac_ipc")
    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors"))
    expected = evaluated(strategy, images(64))
    routed = own.inference.inference.infer(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    assert set(routed.tolist()) == {0, 1}  # both tasks are there to be found
    assert_equal(own(images(64)), expected)
    assert own.to(torch.device("cpu")) is own
    for form in ("timm", "hub-folder"):
        with pytest.raises(ExportError, match="--task K, 1 to 2"):
            export_run(folder, form, output=tmp_path / f"refused{'.safetensors' * (form == 'timm')}")
    assert {path.name for path in tmp_path.iterdir()} == {"own.safetensors"}


@pytest.mark.parametrize("task", [1, 2])
def test_weights_as_of_a_task(task: int, trained, tmp_path: Path) -> None:
    folder, strategy = trained("lorac_ipc")
    expected, other = evaluated(strategy, images(), task), evaluated(strategy, images(), 3 - task)
    assert float((expected - other).abs().max()) > 1e-3
    hub = export_run(folder, "hub-folder", output=tmp_path / "hub", task=task)
    assert_equal(timm.create_model(f"local-dir:{hub}", pretrained=True).eval()(images()).detach(), expected)
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert f"after task {task} of 2" in card and "Task inference, with which the run was evaluated, is not" in card
    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors", task=task))
    assert_equal(own(images()).detach(), expected)
    assert own.inference is None and own.header["task"] == str(task)


def test_tasks_that_are_not_there(trained) -> None:
    with pytest.raises(ExportError, match="--task is 3; 1 to 2"):
        final_model(trained("lorac_ipc")[0], 3)
    with pytest.raises(ExportError, match="--task is 0; 1 to 2"):
        final_model(trained("lorac_ipc")[0], 0)
    for label in ("naive", "lora"):
        with pytest.raises(ExportError, match="--task is for runs of lorac_ipc"):
            final_model(trained(label)[0], 1)


def test_projector_stays_in_our_own_format(trained, tmp_path: Path) -> None:
    folder, strategy = trained("cila")
    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors")).model
    assert isinstance(own, ContrastiveClassifier)
    with torch.no_grad():
        assert_equal(own.project(images()), strategy.model.eval().project(images()))
    hub = export_run(folder, "hub-folder", output=tmp_path / "hub")
    assert "projector, which only the training needs, is left out" in (hub / "README.md").read_text(encoding="utf-8")
    assert not any("projector" in name for name in load_file(hub / "model.safetensors"))


def test_final_norm_with_another_eps_is_no_timm_model(trained, tmp_path: Path) -> None:
    folder, strategy = trained("slca", backbone={"fresh_final_norm": True})
    assert strategy.model.backbone.norm.eps == 1e-5
    with pytest.raises(ExportError, match=r"as norm .*eps=1e-06.*eps=1e-05.*fresh_final_norm.*--format safetensors"):
        export_run(folder, "timm", output=tmp_path / "refused.safetensors")
    assert list(tmp_path.iterdir()) == []
    own = load_exported(export_run(folder, "safetensors", output=tmp_path / "own.safetensors"))
    assert own.model.backbone.norm.eps == 1e-5
    assert_equal(own(images()).detach(), evaluated(strategy, images()))


# --- without data and weights ---------------------------------------------------------------------------------------


def test_neither_data_nor_weights_are_needed(tmp_path: Path) -> None:
    """Also: BatchNorm, a paper's transforms, an order of the classes, a validation split, a custom label."""
    data, weights = tmp_path / "data", tmp_path / "start.safetensors"
    random = np.random.RandomState(0)
    for name in ("fox", "hare", "lynx", "owl"):
        (data / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(random.randint(0, 255, (40, 48, 3), dtype=np.uint8)).save(data / name / f"{i}.png")
    torch.manual_seed(0)
    save_file(load_backbone("resnet18_cifar", pretrained=False).module.state_dict(), weights)
    stream = {"name": "folder", "root": str(data), "tasks": 2, "class_order": [2, 0, 3, 1], "transforms": "ucl_cifar"}
    config = recipe(
        tmp_path,
        "naive",
        stream=stream,
        backbone={"name": "resnet18_cifar", "weights": str(weights)},
        evaluation={"split": "validation", "streams": "all"},
    )
    folder, strategy = run_of(config, tmp_path / "run")
    shutil.rmtree(data)
    weights.unlink()
    expected = evaluated(strategy, images(2))
    before = torch.get_rng_state()
    hub = export_run(folder, "hub-folder")
    assert torch.equal(torch.get_rng_state(), before) and hub.parent == folder / "export"
    found = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    assert_equal(found(images(2)).detach(), expected)
    assert float(found.bn1.running_mean.abs().max()) > 0
    data_config = timm.data.resolve_model_data_config(found)
    assert data_config["mean"] == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)
    assert data_config["crop_mode"] == "squash" and tuple(data_config["input_size"]) == (3, 32, 32)
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert "on the validation images" in card and "weights start.safetensors" in card and str(tmp_path) not in card


@pytest.mark.parametrize("name", sorted(TRANSFORM_PRESETS))
def test_preprocessing_is_that_of_the_paper(name: str) -> None:
    config = SimpleNamespace(stream=SimpleNamespace(transforms=name))
    found = preprocessing(config, {})  # type: ignore[arg-type]
    noise = np.random.RandomState(1).randint(0, 255, (300, 260, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = preset_transforms(name).eval(image)
    grey = found["input_size"][0] == 1  # from here on it is before resizing, there after it: a level of 255 at most
    made = timm.data.create_transform(**found, is_training=False)(image.convert("L") if grey else image)
    assert torch.allclose(made, expected, atol=1.01 / 255 if grey else 1e-5)


def test_preprocessing_of_digits_and_of_the_backbone() -> None:
    cfg = {"input_size": (3, 8, 8), "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "box", "crop_pct": 0.9}
    scans = recipe(Path("x"), "naive")
    assert preprocessing(scans, cfg) == cfg | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    folder = recipe(Path("x"), "naive", stream={"name": "folder", "root": "x", "tasks": 1})
    assert preprocessing(folder, cfg) == cfg | {"crop_mode": "center"}


# --- architectures --------------------------------------------------------------------------------------------------


def made_by_hand(name: str, ids: list[list[int]], **options: Any) -> FinalModel:
    """A model as a run leaves it, with random weights and statistics, and classes that come in any order."""
    torch.manual_seed(0)
    backbone = load_backbone(name, pretrained=False, **options)
    head = TaskwiseLinearHead(backbone.num_features, init_std=0.5)
    for task in ids:
        head.add_task(task)
    head.load_weight_matrix(head.weight_matrix()[0], torch.randn(head.num_classes))
    head.set_input_scales([1 + 0.1 * k for k in range(len(ids))])
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    model = FeatureClassifier(backbone.module, head).eval()
    known = tuple(sorted(head.known_classes))
    config = recipe(Path("x"), "naive", backbone={"name": name, "pretrained": False})
    cfg = dict(backbone.module.pretrained_cfg)
    return FinalModel(config, {}, model, backbone.data_config, cfg, known, tuple(map(str, known)))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "resnet18_cifar"])
def test_classifiers_of_other_architectures(name: str) -> None:
    final = made_by_hand(name, [[7, 2], [0]])
    x = images(2, final.data_config["input_size"][-1])
    with torch.no_grad():
        found, in_task_order = timm_model(final)(x), final.model(x)
    assert found.shape == (2, 3)  # ids that were never seen have no column
    assert_equal(found, in_task_order[:, [2, 1, 0]])
    final.head.adaptation(SimpleNamespace(classes_in_this_experience=[7]))  # as Avalanche does: columns are ids now
    with torch.no_grad():
        assert_equal(final.logits(x), final.model(x)[:, [0, 2, 7]])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", "several classifiers, head, head_dist"),
        ("levit_128s", "several classifiers|as its classifier|no classifier"),
        ("resnetv2_18", "a Conv2d as its classifier"),
    ],
)
def test_classifiers_that_are_not_one_linear_layer(name: str, reason: str) -> None:
    with pytest.raises(ExportError, match=f"timm's {name} has ({reason}).*--format safetensors"):
        timm_model(made_by_hand(name, [[0, 1]]))


def test_backbones_built_with_other_arguments() -> None:
    with pytest.raises(ExportError, match="other tensors than the run's network: pos_embed"):
        timm_model(made_by_hand("test_vit", [[0, 1]], img_size=224))
    with pytest.raises(ExportError, match=r"act.*GELU.*ReLU"):
        timm_model(made_by_hand("test_vit", [[0, 1]], act_layer="relu"))


# --- what files say -------------------------------------------------------------------------------------------------


def test_header_config_and_card(trained, tmp_path: Path) -> None:
    folder, _ = trained("slca_plus_plus")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    hub = export_run(folder, "hub-folder", output=tmp_path / "hub")
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(hub / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["architecture"] == "vit_firn_32" and header["backbone"] == "vit_firn_32.omniglot"
    assert header["config_digest"] == results["config_digest"] and header["seed"] == "3"
    assert header["initial_weights_sha256"] == results["backbone"]["weights_sha256"]
    assert json.loads(header["class_ids"]) == list(range(10)) and header["recipe"] == "mine"
    config = json.loads((hub / "config.json").read_text(encoding="utf-8"))
    assert config["num_classes"] == 10 and config["num_features"] == 96 and config["firn"] == header
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3 and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert f"{100 * results['figures']['accuracy/last']:.2f}" in card and results["config_digest"] in card
    for said in ("seed 3", "no mean over seeds", "import avalanche_firn.models", "| replay | no |", "aligned one"):
        assert said in card
    assert "scales that the method puts on the inputs" in card and "pairs are merged" in card


def test_joint_training_says_what_it_is(trained, tmp_path: Path) -> None:
    hub = export_run(trained("joint")[0], "hub-folder", output=tmp_path / "hub")
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert "not a continual learner" in card and "incremental accuracy" not in card and "| joint | yes |" in card


# --- writing --------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_asked(trained, tmp_path: Path) -> None:
    folder = copied(trained("naive")[0], tmp_path / "run")
    for form in ("timm", "safetensors", "hub-folder"):
        export_run(folder, form)
    made = {path.name for path in (folder / "export").iterdir()}
    stem = "mine-naive-seed-3"
    assert made == {stem, f"{stem}.safetensors", f"{stem}-timm.safetensors"}
    for form in ("timm", "safetensors", "hub-folder"):
        with pytest.raises(ExportError, match=r"exists already.*--force"):
            export_run(folder, form)
    (folder / "export" / stem / "README.md").write_text("old", encoding="utf-8")
    export_run(folder, "hub-folder", force=True)
    assert (folder / "export" / stem / "README.md").read_text(encoding="utf-8") != "old"
    assert {path.name for path in (folder / "export").iterdir()} == made  # nothing temporary is left
    (folder / "export" / stem / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ExportError, match="other files than an export"):
        export_run(folder, "hub-folder", force=True)
    with pytest.raises(ExportError, match="is a folder, and timm isn't"):
        export_run(folder, "timm", output=_folder(tmp_path / "taken.safetensors"), force=True)
    with pytest.raises(ExportError, match=r"ends in \.safetensors"):
        export_run(folder, "timm", output=tmp_path / "weights.bin")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_an_export_that_fails_leaves_nothing(trained, tmp_path: Path, monkeypatch) -> None:
    from avalanche_firn.experiments import export

    def wrong(final: FinalModel) -> nn.Module:
        model = timm_model(final)
        with torch.no_grad():
            model.head.weight[0] += 1
        return model

    monkeypatch.setattr(export, "timm_model", wrong)
    for form, name in (("timm", "a.safetensors"), ("hub-folder", "hub")):
        with pytest.raises(ExportError, match="other logits than the run's"):
            export_run(trained("naive")[0], form, output=tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


# --- wrong runs -----------------------------------------------------------------------------------------------------


def said(capsys, *words: str | Path) -> str:
    """The one message of a command that exits with 2."""
    assert main(["export", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_folders_that_are_no_finished_run(trained, tmp_path: Path, capsys) -> None:
    timm_form = ("--format", "timm")
    assert "isn't a folder" in said(capsys, tmp_path / "nowhere", *timm_form)
    assert "holds no run" in said(capsys, tmp_path, *timm_form)
    run = copied(trained("naive")[0], tmp_path / "cmp" / "naive" / "seed-3")
    shutil.copy(run / "config.yaml", tmp_path / "cmp" / "config.yaml")
    message = said(capsys, tmp_path / "cmp", *timm_form)
    assert "folder of a comparison" in message and str(run) in message
    (run / "results.json").unlink()
    assert f"firn resume {run}" in said(capsys, run, *timm_form)
    assert "invalid choice" in said(capsys, run, "--format", "onnx")
    assert "required: --format" in said(capsys, run)
    assert "one run is accepted" in said(capsys, run, run, *timm_form)
    with pytest.raises(ExportError, match="format is 'onnx'; timm, safetensors, hub-folder"):
        export_run(run, "onnx")


def test_transfer_experiments_are_told_where_their_network_is(tmp_path: Path, capsys) -> None:
    with zipfile.ZipFile(Path(__file__).parents[1] / "artefacts" / "v0.1.0" / "transfer.zip") as stored:
        name = next(name for name in stored.namelist() if name.endswith("results.json"))
        (tmp_path / "results.json").write_bytes(stored.read(name))
    message = said(capsys, tmp_path, "--format", "timm")
    assert "transfer experiment" in message and str(tmp_path / "pretrained.safetensors") in message


def test_damaged_and_foreign_checkpoints(trained, tmp_path: Path, capsys) -> None:
    timm_form = ("--format", "timm")
    run = copied(trained("naive")[0], tmp_path / "damaged")
    tensors = next((run / "checkpoint").glob("step-*/tensors.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    message = said(capsys, run, *timm_form)
    assert "damaged" in message and str(tensors) in message
    shutil.rmtree(run / "checkpoint")
    assert "holds no checkpoint" in said(capsys, run, *timm_form)
    shutil.copytree(trained("replay")[0] / "checkpoint", run / "checkpoint")
    assert "made by another configuration" in said(capsys, run, *timm_form)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("lr: 0.01", "lr: 0.02"), encoding="utf-8")
    assert "isn't the configuration" in said(capsys, run, *timm_form)
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in said(capsys, run, *timm_form)


def changed(run: Path, target: Path, change: Any) -> Path:
    """A run whose checkpoint says something else, with checksums that fit."""
    folder = copied(run, target)
    path = checkpoints(folder / "checkpoint")[0]
    state = read_checkpoint(path)
    change(state)
    write_checkpoint(folder / "checkpoint", path.name, state, keep=1)
    return folder


def test_a_checkpoint_that_is_not_the_end(trained, tmp_path: Path) -> None:
    run = changed(trained("naive")[0], tmp_path / "start", lambda state: state.update(kind="start", experience=None))
    with pytest.raises(ExportError, match="not at their end"):
        final_model(run)

    def shrink(state: dict) -> None:
        state["strategy"]["model"]["tensors"]["backbone.norm.weight"] = torch.ones(5)

    with pytest.raises(ExportError, match=r"doesn't fit its configuration.*backbone\.norm\.weight"):
        final_model(changed(trained("naive")[0], tmp_path / "shrunk", shrink))


def test_diverged_runs_have_no_model(trained, tmp_path: Path) -> None:
    def spoil(state: dict) -> None:
        state["strategy"]["model"]["tensors"]["backbone.norm.weight"][3] = float("nan")

    with pytest.raises(ExportError, match=r"diverged \(weights that aren't finite: backbone\.norm\.weight\)"):
        final_model(changed(trained("naive")[0], tmp_path / "nan", spoil))
    run = copied(trained("naive")[0], tmp_path / "said")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    (run / "results.json").write_text(json.dumps(results | {"diverged": True}), encoding="utf-8")
    with pytest.raises(ExportError, match="diverged"):
        final_model(run)


def test_alignment_on_a_gpu_is_repeated_on_a_gpu(trained, tmp_path: Path, monkeypatch) -> None:
    """The alignment draws from the device, so its results elsewhere would be others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def on_gpu(state: dict) -> None:  # as a plugin's tensors are described there
        for plugin in state["strategy"]["plugins"]:
            if plugin["class"].endswith("ClassifierAlignmentPlugin"):
                plugin["state"] = json_on(plugin["state"], "cuda:0")

    for label, refused in (("slca", True), ("lorac_ipc", False)):
        run = changed(trained(label)[0], tmp_path / label, on_gpu)
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        results["cost"]["device"] = "cuda"
        (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
        if refused:
            with pytest.raises(ExportError, match="aligned its classifier on a CUDA device"):
                final_model(run)
        else:
            assert final_model(run).inference is not None


def json_on(node: Any, device: str) -> Any:
    if isinstance(node, torch.Tensor):
        return {"$on": [device, node]}
    if isinstance(node, list):
        return [json_on(part, device) for part in node]
    return {key: json_on(part, device) for key, part in node.items()} if isinstance(node, dict) else node


# --- loading --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_export(trained, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="isn't a file"):
        load_exported(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    with pytest.raises(ExportError, match="truncated or no safetensors file"):
        load_exported(tmp_path / "text.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match="isn't an export of firn"):
        load_exported(tmp_path / "other.safetensors")
    folder = trained("naive")[0]
    with pytest.raises(ExportError, match=r"timm\.create_model\('vit_firn_32', num_classes=10\)"):
        load_exported(export_run(folder, "timm", output=tmp_path / "timm.safetensors"))
    own = export_run(folder, "safetensors", output=tmp_path / "own.safetensors")
    with safe_open(own, framework="pt") as file:
        header = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(own).items()}  # the file is written anew below
    del tensors["backbone.norm.weight"]
    save_file(tensors, own, metadata=header)
    with pytest.raises(ExportError, match=r"doesn't hold what its header says.*backbone\.norm\.weight"):
        load_exported(own)
    save_file(tensors, own, metadata=header | {"structure": "{}"})
    with pytest.raises(ExportError, match="doesn't hold what its header says: KeyError"):
        load_exported(own)


# --- command line ---------------------------------------------------------------------------------------------------


def test_command(trained, tmp_path: Path, capsys) -> None:
    folder = trained("lorac_ipc")[0]
    words = ["export", str(folder), "--format", "hub-folder", "--task", "2", "--output", str(tmp_path / "hub")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "hub") in printed and "local-dir:" in printed and "Task inference" in printed
    assert "exists already" in said(capsys, *words[1:])
    assert main([*words, "--force"]) == 0
    assert issubclass(ExportError, ConfigError) and _EXPORTS == FORMATS
