"""Every wrong configuration: exit status 2, one clear message with field and accepted values, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from avalanche_firn.experiments.cli import main

# overrides of the digits recipe -> what the message must contain
WRONG = {
    "unknown key": (["training.epoch=3"], ["training.epoch", "unknown key", "did you mean training.epochs?"]),
    "unknown section": (["trainig.epochs=3"], ["trainig.epochs", "did you mean training.epochs?"]),
    "key at the wrong place": (["lr=0.1"], ["lr", "unknown key", "did you mean training.optimizer.lr?"]),
    "misspelt key of a method": (
        ["methods.slca.aligment.lr=1"],
        ["methods.slca.aligment.lr", "did you mean methods.slca.alignment.lr?"],
    ),
    "key of another method": (["methods.naive.backbone_scale=0.1"], ["methods[0].backbone_scale", "unknown key"]),
    "method that is called like another one's section": (
        ["methods.linear_probe.local_loss=3", "methods=[linear_probe,lp_ft]"],
        ["methods[0].local_loss: 3", "true or false"],
    ),
    "unknown label": (["methods.scla.alignment.lr=1"], ["methods.scla", "did you mean slca?", "naive"]),
    "unknown strategy": (["methods=[naive,slcaa]"], ["methods[1].strategy", "'slcaa'", "did you mean slca?"]),
    "text for a number": (["training.epochs='3'"], ["training.epochs", "'3'", "a whole number, at least 1"]),
    "fraction for a whole number": (["training.epochs=2.5"], ["training.epochs", "2.5", "a whole number"]),
    "number for true": (["backbone.pretrained=1"], ["backbone.pretrained", "true or false"]),
    "negative rate": (["training.optimizer.lr=-0.1"], ["training.optimizer.lr", "-0.1", "greater than 0"]),
    "infinite rate": (["training.optimizer.lr=.inf"], ["training.optimizer.lr", "inf", "a number, greater than 0"]),
    "negative scale": (["methods.slca.backbone_scale=-1"], ["methods[3].backbone_scale", "at least 0"]),
    "momentum of one": (["training.optimizer.momentum=1"], ["training.optimizer.momentum", "less than 1"]),
    "momentum of adam": (
        ["training.optimizer={name: adam, momentum: 0.9}"],
        ["training.optimizer.momentum", "adam has no momentum"],
    ),
    "zero epochs": (["training.epochs=0"], ["training.epochs", "0", "at least 1"]),
    "zero batch": (["training.batch_size=0"], ["training.batch_size", "at least 1"]),
    "impossible split": (["stream.tasks=11"], ["stream.tasks", "11 tasks", "10 classes", "1 to 10"]),
    "task sizes that don't sum": (["stream.tasks=[2,3]"], ["stream.tasks", "sums to 5", "10"]),
    "class order too short": (["stream.class_order=[0,1,2]"], ["stream.class_order", "3 entries for 10 classes"]),
    "class order repeats": (
        ["stream.class_order=[0,1,2,3,4,5,6,7,8,8]"],
        ["stream.class_order", "[8] are repeated", "every class id once"],
    ),
    "class order unknown": (["stream.class_order=natrual"], ["stream.class_order", "did you mean natural?"]),
    "class that doesn't exist": (["stream.class_order=[0,1,2,3,4,5,6,7,8,10]"], ["[10] don't exist"]),
    "milestone out of reach": (
        ["training.schedule={name: multistep, milestones: [90]}"],
        ["training.schedule.milestones", "[90] is never reached"],
    ),
    "milestone of one method out of reach": (
        ["training.schedule={name: multistep, milestones: [2]}", "methods.joint.training.epochs=2"],
        ["methods[4].training.schedule.milestones", "never reached in 2 epochs"],
    ),
    "milestones without multistep": (["training.schedule.milestones=[2]"], ["milestones", "the schedule is none"]),
    "falling milestones": (
        ["training.schedule={name: multistep, milestones: [3,2]}"],
        ["training.schedule.milestones", "doesn't rise"],
    ),
    "seed twice": (["seeds=[0,1,1]"], ["seeds", "[1] are repeated"]),
    "seed below zero": (["seeds=[-1]"], ["seeds[0]", "-1", "at least 0"]),
    "no seeds": (["seeds=[]"], ["seeds", "not empty"]),
    "no methods": (["methods=[]"], ["methods", "not empty"]),
    "label twice": (["methods=[slca,slca]"], ["methods", "['slca'] are repeated"]),
    "reserved label": (["methods=[{name: summary, strategy: naive}]"], ["methods", "summary is reserved"]),
    "label that leaves the folder": (["methods=[{name: ../x, strategy: naive}]"], ["methods[0].name", "letters"]),
    "name that leaves the folder": (["name=../../x"], ["name", "letters, digits"]),
    "unknown precision": (["precision=fp8"], ["precision", "'fp8'", "fp32, bf16, fp16"]),
    "fp16 on the CPU": (["precision=fp16", "device=cpu"], ["precision", "fp16 needs a CUDA device"]),
    "unknown device": (["device=gpu"], ["device", "'gpu'", "auto, cpu, cuda or cuda:N"]),
    "unknown stream": (["stream.name=digit"], ["stream.name", "did you mean digits?", "folder, avalanche"]),
    "weights and random": (["backbone={pretrained: false, weights: a.safetensors}"], ["backbone.pretrained", "a file"]),
    "value in place of a section": (["training.epochs.x=3"], ["training.epochs.x", "unknown key"]),
    "unknown adaptation": (
        ["evaluation.probes=[{adapt: [knn, finetune]}]"],
        ["evaluation.probes[0].adapt[1]", "'finetune'", "did you mean fine_tune?"],
    ),
    "adaptation twice": (["evaluation.probes=[{adapt: [knn, knn]}]"], ["evaluation.probes[0].adapt", "repeated"]),
    "no shots": (["evaluation.probes=[{shots: 0}]"], ["evaluation.probes[0].shots", "at least 1"]),
    "tasks to come without task identity": (
        ["evaluation.probes=[{tasks: all, task_aware: false}]"],
        ["evaluation.probes[0].tasks", "task_aware: false"],
    ),
    "key of a probe": (["evaluation.probes=[{shot: 5}]"], ["evaluation.probes[0].shot", "unknown key"]),
    "fresh views of a closed form": (
        ["methods=[{strategy: lp_ft, linear_probe: {lp_views: fresh}}]"],
        ["methods[0].linear_probe.lp_views", "fresh with solver lbfgs", "solver: sgd"],
    ),
    "rows of zeros rescaled": (
        ["methods=[{strategy: lp_ft, linear_probe: {head_init: zero, rescale_head: true}}]"],
        ["methods[0].linear_probe.rescale_head", "no spread"],
    ),
    "schedule over one optimizer": (
        [
            "methods=[{strategy: lp_ft, linear_probe: {reset_momentum: false}}]",
            "training.schedule={name: cosine}",
        ],
        ["methods[0].linear_probe.reset_momentum", "schedule: {name: none}"],
    ),
    "not an override": (["epochs 3"], ["no recipe", "epochs 3"]),
    "broken YAML": (["seeds=[0,1"], ["not valid YAML"]),
}


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must end with status 2."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration(name: str, capsys, tmp_path: Path) -> None:
    overrides, expected = WRONG[name]
    recipe = [] if name == "not an override" else ["digits"]
    message = fails(capsys, "compare", *recipe, *overrides, "--output", str(tmp_path / "out"))
    for part in expected:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_all_errors_come_together(capsys, tmp_path: Path) -> None:
    words = ["training.epochs=0", "seeds=[1,1]", "stream.tasks=99", "backbon.name=x", "methods.slca.alignment.lr=-1"]
    message = fails(capsys, "compare", "digits", *words, "--output", str(tmp_path / "out"))
    assert "5 errors" in message
    for part in ("training.epochs", "seeds", "stream.tasks", "backbon.name", "methods[3].alignment.lr"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", ["repeated key 'name'", "line 2"]),
        ("- 1\n- 2\n", ["not a mapping but list"]),
        ("", ["not a mapping"]),
        ("name: [\n", ["not valid YAML", "line"]),
        ("name: x\n", ["stream: missing", "methods: missing"]),
        ("name: x\nmethods: [naive]\nstream: {tasks: 5}\n", ["stream.name: missing", "digits, folder, avalanche"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    ],
)
def test_wrong_recipe_file(text: str, expected: list[str], capsys, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    message = fails(capsys, "compare", str(recipe), "--output", str(tmp_path / "out"))
    for part in expected:
        assert part in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "digit"], ["no recipe 'digit'", "did you mean digits?"]),
        (["compare", "a.yaml", "b.yaml"], ["one recipe is accepted"]),
        (["compare", "digits", "--bogus"], ["--bogus"]),
        (["run", "digits"], ["method: missing", "one of naive"]),
        (["run", "digits", "method=sclca"], ["'sclca' isn't in the recipe", "did you mean slca?"]),
        (["run", "digits", "method=slca", "seed=a"], ["seed", "'a' isn't accepted", "a whole number"]),
        (["check"], ["RECIPE"]),
        (["recipes", "show"], ["needs a recipe"]),
        (["recipes", "copy", "nothing"], ["no recipe 'nothing'"]),
        (["resume", "nowhere"], ["nowhere", "config.yaml"]),
        (["report", "nowhere"], ["nowhere isn't a folder"]),
        (["dance"], ["dance"]),
        ([], ["COMMAND"]),
    ],
)
def test_wrong_usage(words: list[str], expected: list[str], capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, *words)
    for part in expected:
        assert part in message
    assert not list(tmp_path.iterdir())


# --- what only shows when the data, the weights and the device are looked at ---------------------------------------


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name) * 9 % 255, 80, 90)).save(path)


def _folder_recipe(tmp_path: Path) -> list[str]:
    recipe = tmp_path / "mine.yaml"
    root = tmp_path / "data"
    recipe.write_text(f"name: mine\nmethods: [naive]\nstream: {{name: folder, root: {root}, tasks: 2}}\n")
    return [str(recipe), "backbone.pretrained=false", "--output", str(tmp_path / "out")]


def test_missing_folder(capsys, tmp_path: Path) -> None:
    message = fails(capsys, "compare", *_folder_recipe(tmp_path))
    assert "stream" in message and str(tmp_path / "data") in message
    assert not (tmp_path / "out").exists()


def test_empty_folder(capsys, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    message = fails(capsys, "compare", *_folder_recipe(tmp_path))
    assert "stream" in message and str(tmp_path / "data") in message
    assert not (tmp_path / "out").exists()


def test_file_that_is_no_image(capsys, tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for i in range(6):
            _picture(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "bee" / "6.png").write_text("not an image")
    message = fails(capsys, "compare", *_folder_recipe(tmp_path))
    assert "6.png" in message
    assert not (tmp_path / "out").exists()


def test_folder_with_too_few_classes(capsys, tmp_path: Path) -> None:
    for i in range(6):
        _picture(tmp_path / "data" / "ant" / f"{i}.png")
    message = fails(capsys, "compare", *_folder_recipe(tmp_path))
    assert "tasks is 2" in message and "1..1" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backbone.name=vit_bsae_patch16_224"], ["backbone", "vit_bsae_patch16_224"]),
        (["backbone.weights=missing.safetensors"], ["backbone", "missing.safetensors"]),
        (["stream={name: avalanche, benchmark: SplitMINST}"], ["stream", "SplitMINST", "SplitMNIST"]),
        (["evaluation.probes=[{shots: 500}]"], ["evaluation.probes[0]", "shots: got 500", "samples"]),
    ],
)
def test_missing_resources(overrides: list[str], expected: list[str], capsys, tmp_path: Path) -> None:
    message = fails(capsys, "compare", "digits", *overrides, "--output", str(tmp_path / "out"))
    for part in expected:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_missing_gpu(capsys, tmp_path: Path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails(capsys, "compare", "digits", "device=cuda", "--output", str(tmp_path / "out"))
    assert "device" in message and "'cuda' isn't available" in message and "auto, cpu" in message
    assert not (tmp_path / "out").exists()


def test_auto_precision_fp16_without_gpu(capsys, tmp_path: Path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails(capsys, "compare", "digits", "precision=fp16", "--output", str(tmp_path / "out"))
    assert "precision" in message and "fp16 needs a CUDA device" in message


def test_check_finds_the_same(capsys) -> None:
    assert "training.epochs" in fails(capsys, "check", "digits", "training.epochs=0")
