"""examples/pretrain.py on a generated tree: resume, provenance, what is held out, what is refused."""

import argparse
import hashlib
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from avalanche_firn.models.backbones import load_backbone


def _module():
    path = Path(__file__).parents[2] / "examples" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("firn_pretrain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretrain = _module()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tree(tmp_path):
    """3 classes in 2 nested folders, 5 dark drawings on white each, 20x30 pixels."""
    rng = np.random.RandomState(0)
    lines = {"north/bar": (4, 4, 16, 4), "north/diagonal": (2, 2, 18, 26), "south/pole": (10, 2, 10, 28)}
    for name, line in lines.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(5):
            image = Image.new("1", (20, 30), 1)
            dx, dy = rng.randint(-2, 3, 2)
            ImageDraw.Draw(image).line([line[0] + dx, line[1] + dy, line[2] + dx, line[3] + dy], fill=0, width=2)
            image.save(folder / f"{i}.png")
    (tmp_path / "data" / "readme.txt").write_text("not an image, not a class")
    return tmp_path / "data"


def arguments(tree: Path, output: Path, *more: str) -> list[str]:
    small = ["--epochs", "3", "--batch-size", "5", "--invert", "--device", "cpu", "--warmup", "1"]
    return [str(tree), "--output", str(output), *small, *more]


def test_killed_and_resumed_run_ends_with_the_same_weights(tree, tmp_path, monkeypatch, capsys):
    pretrain.main(arguments(tree, tmp_path / "whole.safetensors"))
    assert "3 classes, 12 images to train, 3 held out" in capsys.readouterr().out
    output, save = tmp_path / "out" / "cut.safetensors", pretrain.Trainer.save

    def killed(self, path, epochs):
        save(self, path, epochs)
        if epochs == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Trainer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(arguments(tree, output))
    assert [p.name for p in output.parent.iterdir()] == ["cut.checkpoint.safetensors"]
    trained = []
    epoch = pretrain.Trainer.epoch
    monkeypatch.setattr(pretrain.Trainer, "epoch", lambda self, number: trained.append(number) or epoch(self, number))
    pretrain.main(arguments(tree, output))
    assert trained == [2]
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(p.name for p in output.parent.iterdir()) == ["cut.json", "cut.safetensors"]


def test_written_files(tree, tmp_path):
    output = tmp_path / "w.safetensors"
    pretrain.main(arguments(tree, output, "--half", "--origin", "drawn here", "--licence", "MIT", "--epochs", "1"))
    record, tensors = json.loads(output.with_suffix(".json").read_text()), safetensors.torch.load_file(output)
    assert record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert record["class_names"] == ["north/bar", "north/diagonal", "south/pole"]
    assert record["data"] == {"classes": 3, "train": 12, "held_out": 3}
    assert (record["origin"], record["licence"], record["settings"]["seed"]) == ("drawn here", "MIT", 0)
    assert record["command"].startswith(f"python examples/pretrain.py {tree}") and "--half" in record["command"]
    assert 0 <= record["held_out_accuracy"] <= 1 and record["settings"]["epochs"] == 1
    assert tensors["head.weight"].shape == (3, 96) and {v.dtype for v in tensors.values()} == {torch.float16}
    assert record["parameters"] == sum(v.numel() for v in tensors.values())
    assert output.stat().st_mode & 0o444 == 0o444
    backbone = load_backbone("vit_firn_32", weights=output)
    assert torch.equal(backbone.module.norm.weight, tensors["norm.weight"].float())


def test_checkpoint_of_other_settings_is_refused(tree, tmp_path, monkeypatch, capsys):
    output = tmp_path / "w.safetensors"
    trainer = pretrain.Trainer(pretrain.parse(arguments(tree, output)))
    trainer.epoch(0)
    trainer.save(tmp_path / "w.checkpoint.safetensors", 1)
    with pytest.raises(SystemExit) as info:
        pretrain.main(arguments(tree, output, "--lr", "0.5"))
    assert info.value.code == 2
    message = capsys.readouterr().err
    assert "lr 0.001 there, 0.5 now" in message and "--fresh" in message
    Image.new("1", (20, 30), 1).save(tree / "south" / "pole" / "0.png")
    with pytest.raises(SystemExit):
        pretrain.main(arguments(tree, output))
    assert "data_sha256" in capsys.readouterr().err
    pretrain.main(arguments(tree, output, "--fresh", "--epochs", "1"))
    assert output.exists()


def test_loss_falls(tree, tmp_path):
    args = pretrain.parse(arguments(tree, tmp_path / "w.safetensors", "--epochs", "8", "--fit", "0", "--shear", "0"))
    trainer = pretrain.Trainer(args)
    losses = [trainer.epoch(i) for i in range(8)]
    assert losses[-1] < losses[0] - 0.2


def test_accuracy_is_the_one_of_a_loop_over_the_held_out_drawings(tree, tmp_path):
    trainer = pretrain.Trainer(pretrain.parse(arguments(tree, tmp_path / "w.safetensors", "--held-out", "0.6")))
    trainer.epoch(0)
    model, right = trainer.model.eval(), 0
    with torch.no_grad():
        model.head.weight.mul_(50)
    for i in trainer.held.nonzero().flatten().tolist():
        x = torch.nn.functional.avg_pool2d(trainer.images[i : i + 1].float() / 255, 2)
        logits = model(((x - 0.5) / 0.5).expand(-1, 3, -1, -1))[0]
        right += int(logits.argmax() == trainer.labels[i])
    assert trainer.held_out_accuracy(trainer.export()) == right / 9


def test_folder_is_read_in_order(tree):
    images, labels, names = pretrain.load_folder(tree, 64)
    assert images.shape == (15, 1, 64, 64) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and names[1] == "north/diagonal"
    expected = Image.open(tree / "north" / "bar" / "0.png").convert("L").resize((64, 64), Image.Resampling.BOX)
    assert torch.equal(images[0, 0], torch.from_numpy(np.array(expected)))
    Image.new("RGB", (9, 9), (200, 10, 10)).save(tree / "south" / "pole" / "5.png")
    assert pretrain.load_folder(tree, 64)[0].shape == (16, 3, 64, 64)


def test_hold_out_takes_a_share_of_every_class():
    labels = torch.tensor([0] * 20 + [1] * 2 + [2] * 7)
    held = pretrain.hold_out(labels, 0.2, 5)
    assert [int(held[labels == c].sum()) for c in range(3)] == [4, 1, 1]
    assert torch.equal(held, pretrain.hold_out(labels, 0.2, 5))
    assert not torch.equal(held, pretrain.hold_out(labels, 0.2, 6))
    assert [int(pretrain.hold_out(labels, 0.99, 5)[labels == c].sum()) for c in range(3)] == [19, 1, 6]


def test_ink_boxes_against_a_loop():
    x = torch.zeros(3, 1, 64, 64)
    x[0, 0, 10:20, 30:50] = 1
    x[1, 0, 63, 0] = 0.9
    boxes = pretrain.ink_boxes(x)
    for image, box in zip(x[:2, 0], boxes[:2], strict=True):
        rows, columns = (image > 0.5).nonzero().T
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        centre = ((left + right) / 64 - 1, (top + bottom) / 64 - 1)
        torch.testing.assert_close(box, torch.tensor([*centre, (right - left) / 64, (bottom - top) / 64]))
    assert boxes[2].tolist() == [0, 0, 1, 1]


def neutral(**changes) -> argparse.Namespace:
    plain = {"rotate": 0, "scale": [1, 1], "shear": 0, "translate": 0, "fit": 0, "thicken": 0, "blur": 0}
    return argparse.Namespace(**{**plain, **changes})


def test_augmentation(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(64, 1, 64, 64)
    x[:, :, 20:30, 10:14] = 1
    # Without any strength only the aspect changes, up to a factor exp(0.2) on each axis, about the centre.
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.5))
    same = pretrain.augment(x, neutral(), generator)
    torch.testing.assert_close(same, torch.nn.functional.avg_pool2d(x, 2))
    filled = pretrain.augment(x, neutral(fit=1.0), generator)
    box = pretrain.ink_boxes(filled)[0]
    assert box[:2].abs().max() < 0.05 and box[3] == pytest.approx(1 / 1.125, abs=0.05)  # the middle of 0.95 .. 1.3
    thick = pretrain.augment(x, neutral(thicken=1.0), generator)
    assert float(thick[0].sum()) * 4 == pytest.approx(12 * 6, rel=1e-4)  # draws are 0.5: filter 3, not 5
    coarse = pretrain.augment(x, neutral(blur=1.0), generator)
    assert coarse.mean() == pytest.approx(float(same.mean()), rel=0.2) and coarse.max() < 1
    monkeypatch.setattr(torch, "rand", rand)
    strong = neutral(rotate=20, scale=[0.8, 1.6], shear=0.3, translate=0.2, fit=0.5, thicken=0.7, blur=0.5)
    views = [pretrain.augment(x, strong, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == (64, 1, 32, 32) and views[0].min() >= 0 and views[0].max() <= 1
    turned = pretrain.augment(x, neutral(rotate=45), generator)
    assert len({round(float(v), 4) for v in turned.flatten(1).std(1)}) > 10 and math.isfinite(float(turned.sum()))


def test_folders_that_cannot_be_used(tree, tmp_path, capsys):
    def refusal(folder):
        with pytest.raises(SystemExit) as info:
            pretrain.main(arguments(folder, tmp_path / "never" / "w.safetensors"))
        assert info.value.code == 2 and not (tmp_path / "never").exists()
        return capsys.readouterr().err

    assert "is not a folder" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has 0 folders with images" in refusal(tmp_path / "empty")
    assert "has 1 folders with images" in refusal(tree / "south")
    assert "holds images itself" in refusal(tree / "south" / "pole")
    (tree / "south" / "pole" / "9.png").write_bytes(b"no image")
    message = refusal(tree)
    assert "9.png cannot be decoded" in message and message.count("\n") == 1
    whole = (tree / "south" / "pole" / "0.png").read_bytes()
    (tree / "south" / "pole" / "9.png").write_bytes(whole[: len(whole) // 2])
    assert "9.png cannot be decoded" in refusal(tree)
    (tree / "south" / "pole" / "9.png").unlink()
    for i in range(1, 5):
        (tree / "south" / "pole" / f"{i}.png").unlink()
    assert "none to hold out: south/pole" in refusal(tree)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--output", "w.pth"], "must end in .safetensors"),
        (["--backbone", "vit_frin"], "not a timm model"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "--lr above 0"),
        (["--held-out", "1"], "between 0 and 1"),
        (["--scale", "2", "1"], "LOW <= HIGH"),
        (["--blur", "1.5"], "between 0 and 1"),
    ],
)
def test_wrong_options(tmp_path, capsys, more, match):
    with pytest.raises(SystemExit) as info:
        pretrain.main(arguments(tmp_path, tmp_path / "w.safetensors", *more))
    assert info.value.code == 2 and match in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tree, tmp_path, capsys):
    (tmp_path / "w.checkpoint.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(arguments(tree, tmp_path / "w.safetensors"))
    assert "w.checkpoint.safetensors can't be read" in (told := capsys.readouterr().err) and "--fresh" in told
