"""The public code as a contestant: what counts as a clone, the driver on a miniature of its layout, processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the folder speed/ is no part of the package

from avalanche_firn.benchmarks.tensors import TensorImageDataset
from speed.peer import (
    DRIVER,
    ContestantError,
    PeerError,
    check_equal_tasks,
    check_peer,
    peer_commit,
    run_contestant,
    within_one_deviation,
)
from speed.peer_slca import Images

# A miniature with the file layout and the names that the driver uses, written for this test: per task one forward and
# backward pass over the training images, two test passes, one evaluation.
CLONE = {
    "trainer.py": """
from utils import factory
from utils.data_manager import DataManager

def _set_device(args):
    raise RuntimeError("CUDA only")

def _train(args):
    _set_device(args)
    data = DataManager(args["dataset"], args["shuffle"], args["seed"], args["init_cls"], args["increment"])
    learner = factory.get_model(args["model_name"], args)
    for task in range(len(data.images.class_order) // args["increment"]):
        learner.incremental_train(data, task)
        learner.eval_task()
""",
    "models/__init__.py": "",
    "models/base.py": """
from torch.utils.data import DataLoader

class BaseLearner:
    def _compute_accuracy(self, model, loader):
        model.eval()
        for x, y in loader:
            model(x)
        return 1.0

    def _compute_class_mean(self, data):
        assert DataLoader([1], num_workers=4).num_workers == 0  # the driver's number wins

    def eval_task(self):
        return {"top1": 100.0 * (self.task + 1) / 2}, None
""",
    "models/slca.py": """
import torch
from timm.models.layers.weight_init import trunc_normal_
from torch.utils.data import DataLoader
from convs.linears import SimpleContinualLinear
from convs.vits import vit_base_patch16_224_in21k, vit_base_lora_patch16_224_mocov3
from models.base import BaseLearner
from utils import inc_net

batch_size = 128
weight_decay = 5e-4

class SLCA(BaseLearner):
    def __init__(self, args):
        assert str(args["device"][0]) == "cpu"
        self.args, self.network = args, inc_net.get_convnet(args)

    def incremental_train(self, data, task):
        self.task = task
        x, y = data.batch(task, self.args["increment"])
        self.loader = DataLoader(list(zip(x, y)), batch_size=batch_size, num_workers=8)
        self._stage1_training()
        self._compute_class_mean(data)
        self._stage2_compact_classifier()

    def _stage1_training(self):
        head = SimpleContinualLinear(self.network.out_dim, 2)
        self.network.train()
        for x, y in self.loader:
            assert len(x) <= 3
            head(self.network(x)["features"]).sum().backward()

    def _stage2_compact_classifier(self):
        for epoch in range(2):
            self._compute_accuracy(self.network, self.loader)
        print("lr", self.args["lr"], self.args["bcb_lrscale"], self.args["ca_with_logit_norm"], weight_decay)
""",
    "utils/__init__.py": "",
    "utils/data.py": "",
    "utils/data_manager.py": """
import torch
from PIL import Image
from torchvision import transforms

def _get_idata(name):
    raise RuntimeError("downloads")

class DataManager:
    def __init__(self, name, shuffle, seed, first, increment):
        assert not shuffle
        self.images = _get_idata(name)
        self.images.download_data()

    def batch(self, task, size):
        chosen = self.images.class_order[task * size : (task + 1) * size]
        pick = transforms.Compose([*self.images.train_trsf, *self.images.common_trsf])
        rows = [i for i, y in enumerate(self.images.train_targets) if y in chosen]
        assert len(rows) == 4 * size
        tensors = [pick(Image.fromarray(self.images.train_data[i])) for i in rows]
        assert abs(float(tensors[0].min())) <= 1.0
        return torch.stack(tensors), torch.zeros(len(rows))
""",
    "utils/factory.py": """
from models.slca import SLCA

def get_model(name, args):
    return SLCA(args)
""",
    "utils/inc_net.py": """
def get_convnet(cfg, pretrained=False):
    raise RuntimeError("downloads")
""",
    "utils/toolkit.py": "def accuracy(): pass\n",
    "convs/__init__.py": "",
    "convs/linears.py": """
from timm.models.layers import Mlp
from torch import nn

class SimpleContinualLinear(nn.Linear):
    pass
""",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    for name, text in CLONE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def job(tmp_path: Path, clone: Path, **changes) -> dict:
    targets = np.repeat(np.arange(4), 4)
    images = np.full((16, 32, 32, 3), 127, dtype=np.uint8)
    path = tmp_path / "problem.npz"
    np.savez(path, train_images=images, train_targets=targets, test_images=images[::4], test_targets=targets[::4])
    return {
        "contestant": "peer", "problem": str(path), "peer": str(clone), "peer_workers": 0, "test_passes": True,
        "backbone": "vit_firn_32.omniglot", "weights": None, "mean": [0.5] * 3, "std": [0.5] * 3,
        "class_order": [2, 0, 3, 1], "tasks": 2, "epochs": 1, "milestones": [], "batch_size": 3, "seed": 5,
        "threads": 1, "device": "cpu", "lr": 0.02, "backbone_scale": 0.03, "weight_decay": 0.004,
        "alignment_epochs": 5, "temperature": 0.7,
    } | changes  # fmt: skip


def test_a_clone_is_accepted(clone):
    assert check_peer(clone) == clone.resolve()
    assert peer_commit(clone) is None  # no git checkout


def test_a_path_that_is_no_clone_names_what_is_missing(tmp_path, clone):
    with pytest.raises(PeerError, match=r"nowhere: there is no such folder; accepted: a clone of https://.*SLCA"):
        check_peer(tmp_path / "nowhere")
    (clone / "utils" / "inc_net.py").unlink()
    (clone / "trainer.py").unlink()
    with pytest.raises(PeerError, match=r"lacks trainer\.py, utils/inc_net\.py; accepted"):
        check_peer(clone)


def test_a_file_without_what_the_driver_replaces_is_refused(clone):
    (clone / "models" / "slca.py").write_text("class SLCApp:\n    def _stage1_training(self): ...\n", encoding="utf-8")
    with pytest.raises(PeerError, match=r"models/slca\.py doesn't define SLCA, _stage2_compact_classifier"):
        check_peer(clone)


def test_tasks_of_different_sizes_are_refused():
    check_equal_tasks(10, 5)
    with pytest.raises(PeerError, match=r"tasks is 3 with 10 classes; .*1, 2, 5, 10"):
        check_equal_tasks(10, 3)


def test_one_standard_deviation():
    theirs = [0.70, 0.72, 0.74]  # deviation 0.02
    assert within_one_deviation([0.719, 0.739, 0.759], theirs) is True
    assert within_one_deviation([0.741, 0.761, 0.781], theirs) is False
    assert within_one_deviation([0.68, 0.66, 0.70], theirs) is False  # worse counts as well: both means are compared
    assert within_one_deviation([0.72], [0.72]) is None


def test_the_public_code_sees_our_tensors(tmp_path, clone):
    """Its transforms on its arrays give what our data set in memory gives, up to rounding."""
    levels = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    settings = job(tmp_path, clone, mean=[0.48, 0.45, 0.40], std=[0.277, 0.269, 0.282])
    np.savez(
        settings["problem"],
        **dict.fromkeys(("train_images", "test_images"), levels),
        train_targets=[0],
        test_targets=[0],
    )
    images = Images(settings)
    theirs = transforms.Compose(images.common_trsf)(Image.fromarray(images.train_data[0]))
    pixels = torch.from_numpy(levels).permute(0, 3, 1, 2)
    ours = TensorImageDataset(pixels, [0], mean=settings["mean"], std=settings["std"])[0][0]
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-6)
    assert float(theirs.max() - theirs.min()) > 3
    assert images.class_order == [2, 0, 3, 1] and images.train_trsf == images.test_trsf == []


@pytest.mark.parametrize("test_passes", [True, False])
def test_the_driver_runs_a_clone_on_our_data(tmp_path, clone, test_passes):
    result = run_contestant(DRIVER, job(tmp_path, clone, test_passes=test_passes), tmp_path / "run")
    assert result["images"] == 16
    assert result["images_looked_at"] == (2 * 16 if test_passes else 0)
    assert result["accuracy_last"] == 1.0 and result["accuracy_incremental"] == 0.75
    assert 0 < result["stage1_seconds"] < result["seconds"] and result["cpu_seconds"] > 0
    assert result["peak_memory_MiB"] is None or result["peak_memory_MiB"] > 0
    assert "lr 0.02 0.03 0.7 0.004" in (tmp_path / "run" / "output.txt").read_text(encoding="utf-8")
    assert not list(clone.rglob("__pycache__"))  # the user's folder stays as it was


def test_a_failing_contestant_is_named_with_its_last_lines(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("print('one'); raise SystemExit('no such thing')\n", encoding="utf-8")
    with pytest.raises(ContestantError, match=r"(?s)ours: exit status 1; .*no such thing"):
        run_contestant(script, {"contestant": "ours", "threads": 1}, tmp_path / "a")
    script.write_text("", encoding="utf-8")
    with pytest.raises(ContestantError, match="ours: no result"):
        run_contestant(script, {"contestant": "ours", "threads": 1}, tmp_path / "b")
    script.write_text("import time; time.sleep(60)\n", encoding="utf-8")
    with pytest.raises(ContestantError, match="ours: not finished after"):
        run_contestant(script, {"contestant": "ours", "threads": 1}, tmp_path / "c", timeout=0.2)


def test_a_contestant_gets_its_job_and_threads(tmp_path):
    script = tmp_path / "echo.py"
    text = "import json, os, sys\njob = json.load(open(sys.argv[2]))\n"
    text += "json.dump([job['seed'], os.environ['OMP_NUM_THREADS']], open('values', 'w'))\n"
    script.write_text(text + "json.dump({'cwd': os.getcwd()}, open(job['result'], 'w'))\n", encoding="utf-8")
    result = run_contestant(script, {"contestant": "ours", "threads": 3, "seed": 9}, tmp_path / "run")
    assert Path(result["cwd"]) == (tmp_path / "run").resolve()
    assert json.loads((tmp_path / "run" / "values").read_text(encoding="utf-8")) == [9, "3"]
