"""Runs the public SLCA code (GengDavid/SLCA) on our data and backbone; for a process of its own, see ``peer.py``.

    python speed/peer_slca.py --job JOB.json

Its trainer, its two stages, class statistics and evaluation run as they are in the clone. Replaced from outside:

=====================  ===============================================================================================
its modules            here
=====================  ===============================================================================================
convs.vits             a stub: its copy of a vision transformer needs timm 0.5; our timm model takes the place
timm.models.layers     the few names that it imports from timm's former place, from today's
utils.inc_net          ``get_convnet`` gives our backbone with our weights and the fresh final norm that it makes too
utils.data_manager     ``_get_idata`` gives our images (uint8 arrays, as its CIFAR path has) and class order; transforms
                       are ToTensor and Normalize, so its network sees our tensors up to rounding
trainer                ``_set_device``, which knows CUDA alone
models.slca            the module's batch size and weight decay
torch's DataLoader     as many workers as the job says; None leaves the eight and four of its own
_compute_accuracy      only for "no test passes": returns 0 at once. These are the passes over training and test images
                       in every fifth epoch of stage 1 and over the test images after every epoch of stage 2, whose
                       figures are printed and not used. The evaluation after each task stays
=====================  ===============================================================================================

The clock runs from the call of its trainer to its return; imports, images and the backbone are there before it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # python speed/peer_slca.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import timm.layers
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from avalanche_firn.models.backbones import load_backbone
from speed.memory import MemoryMark, synchronise


class Features(nn.Module):
    """The backbone as the public network wants it, with counters of images.

    ``forward(x (B, 3, H, W))`` gives ``{"features": (B, d)}``.
    """

    def __init__(self, backbone: nn.Module, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_dim = size
        self.trained = 0
        self.looked_at = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training and torch.is_grad_enabled():
            self.trained += len(x)
        else:
            self.looked_at += len(x)
        return {"features": self.backbone(x)}


class Images:
    """Images and class order in the form of the public code's data sets."""

    use_path = False

    def __init__(self, job: dict[str, Any]) -> None:
        with np.load(job["problem"], allow_pickle=False) as arrays:
            self.train_data, self.train_targets = arrays["train_images"], arrays["train_targets"]
            self.test_data, self.test_targets = arrays["test_images"], arrays["test_targets"]
        self.class_order = list(job["class_order"])
        self.train_trsf: list[Any] = []
        self.test_trsf: list[Any] = []
        self.common_trsf = [transforms.ToTensor(), transforms.Normalize(job["mean"], job["std"])]

    def download_data(self) -> None:
        """Nothing to do: the images are here."""


def _stub(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the public code asked for one of its own transformers, which the driver leaves out")


def install_stubs() -> None:
    """Modules that the clone imports and that are gone, or not needed."""
    truncated = timm.layers.trunc_normal_
    _stub("timm.models.layers", Mlp=timm.layers.Mlp, trunc_normal_=truncated, __path__=[])
    _stub("timm.models.layers.weight_init", trunc_normal_=truncated)
    kinds = [f"vit_base{lora}_patch16_224_{weights}" for lora in ("", "_lora") for weights in ("in21k", "mocov3")]
    _stub("convs.vits", **dict.fromkeys(kinds, _unavailable))


def arguments(job: dict[str, Any], device: str) -> dict[str, Any]:
    """The public code's settings; what the job doesn't name is as in its exps/slca/slca_cifar.json."""
    size = len(job["class_order"]) // int(job["tasks"])
    return {
        "prefix": "speed",
        "dataset": "given",
        "memory_size": 0,
        "memory_per_class": 0,
        "fixed_memory": False,
        "shuffle": False,  # the class order is given
        "init_cls": size,
        "increment": size,
        "model_name": "slca",
        "model_postfix": "speed",
        "convnet_type": "given",
        "device": [device],
        "seed": job["seed"],
        "run_id": 0,
        "epochs": job["epochs"],
        "milestones": job["milestones"],
        "lr": job["lr"],
        "bcb_lrscale": job["backbone_scale"],
        "ca_epochs": job["alignment_epochs"],
        "ca_with_logit_norm": job["temperature"],
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The whole stream; seconds, accuracies in 0..1, images trained and looked at, MiB."""
    torch.set_num_threads(job["threads"])
    device = torch.device("cuda:0" if job["device"].startswith("cuda") else "cpu")
    loaded = load_backbone(
        job["backbone"], pretrained=job["weights"] is None, weights=job["weights"], fresh_final_norm=True
    )
    features = Features(loaded.module, loaded.num_features)
    images = Images(job)
    (Path(job["folder"]) / "logs").mkdir(exist_ok=True)
    os.chdir(job["folder"])  # where its logs and weights of every task go
    root = str(Path(__file__).resolve().parents[1])
    sys.path[:] = [job["peer"], *(entry for entry in sys.path if entry != root)]  # both have a folder models/
    install_stubs()
    modules = [importlib.import_module(name) for name in ("trainer", "models.slca", "models.base")]
    trainer, learner, base = (_of_clone(module, job["peer"]) for module in modules)
    importlib.import_module("utils.data_manager")._get_idata = lambda name: images  # type: ignore[attr-defined]
    importlib.import_module("utils.inc_net").get_convnet = lambda cfg, pretrained=False: features  # type: ignore[attr-defined]
    trainer._set_device = lambda args: args.update(device=[device])
    learner.batch_size, learner.weight_decay = job["batch_size"], job["weight_decay"]
    if job["peer_workers"] is not None:
        learner.DataLoader = base.DataLoader = _loader(job["peer_workers"])
    if not job["test_passes"]:
        base.BaseLearner._compute_accuracy = lambda self, model, loader: np.float64(0)
    curve: list[float] = []
    stage1: list[float] = []
    _watch(learner.SLCA, "_stage1_training", lambda result, seconds: stage1.append(seconds), device)
    _watch(learner.SLCA, "eval_task", lambda result, seconds: curve.append(float(result[0]["top1"]) / 100), device)
    settings = arguments(job, str(device))
    memory = MemoryMark(device)
    memory.start()
    synchronise(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer._train(settings)
    synchronise(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "stage1_seconds": sum(stage1),
        "images": features.trained,
        "images_looked_at": features.looked_at,
        "accuracy_last": curve[-1],
        "accuracy_incremental": sum(curve) / len(curve),
        "peak_memory_MiB": memory.stop(),
    }


def _of_clone(module: Any, clone: str) -> Any:
    """The module, if it comes from the clone and not from some other folder of the import path."""
    if not Path(module.__file__).resolve().is_relative_to(Path(clone).resolve()):
        raise RuntimeError(f"module {module.__name__} came from {module.__file__} and not from {clone}")
    return module


def _loader(workers: int) -> Callable[..., DataLoader[Any]]:
    def make(*args: Any, **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(*args, **{**kwargs, "num_workers": workers})

    return make


def _watch(owner: Any, name: str, tell: Callable[[Any, float], None], device: torch.device) -> None:
    """Tells result and seconds of every call of a method, which is otherwise left as it is."""
    method = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        synchronise(device)
        start = time.perf_counter()
        result = method(*args, **kwargs)
        synchronise(device)
        tell(result, time.perf_counter() - start)
        return result

    setattr(owner, name, watched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", type=Path, required=True, help="written by speed/peer.py")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    Path(job["result"]).write_text(json.dumps(run(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
