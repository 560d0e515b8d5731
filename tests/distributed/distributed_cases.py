"""Small runs of every method for tests with several processes: five tasks of real digits, no dropout, no augmentation.

As a program: ``firn`` with the backbone of these runs (``... firn run RECIPE``), or the runs of some methods with what
the tests compare (``... record FOLDER METHOD ...``), under ``torchrun`` or alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "faults"))
import kill_cases
import torch
from avalanche.training.plugins import SupervisedPlugin
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.vision_transformer import VisionTransformer

BACKBONE = "vit_of_distributed_tests"
CLASSES, TASKS = 10, 5
METHODS = tuple(kill_cases.METHODS)

default_cfgs = generate_default_cfgs({BACKBONE: dict(kill_cases.default_cfgs[kill_cases.BACKBONE].default.to_dict())})

if not is_model(BACKBONE):

    @register_model
    def vit_of_distributed_tests(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        """Four tokens of 16, two blocks."""
        shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return build_model_with_cfg(VisionTransformer, BACKBONE, pretrained, **{**shape, **kwargs})


def write_images(root: Path) -> Path:
    """A folder of digits, one folder per class."""
    before, kill_cases.CLASSES = kill_cases.CLASSES, CLASSES
    try:
        return kill_cases.write_images(root)
    finally:
        kill_cases.CLASSES = before


def recipe_of(method: str, images: Path) -> dict[str, Any]:
    """The recipe of a method, as plain values (JSON is YAML), in float32; its last batches have odd sizes."""
    recipe = kill_cases.recipe_of(method, images)
    stream = {**recipe["stream"], "tasks": TASKS, "augment": False}
    training = {**recipe["training"], "batch_size": 10}
    (section,) = recipe["methods"]
    if "rehearsal" in section:
        section = {**section, "rehearsal": {**section["rehearsal"], "mem_size": 20}}
    return {
        **recipe,
        "name": "distributed",
        "backbone": {"name": BACKBONE, "pretrained": False},
        "stream": stream,
        "training": training,
        "methods": [section],
        "precision": "fp32",
    }


def write_recipes(folder: Path, methods: tuple[str, ...] = METHODS) -> dict[str, Path]:
    """Recipe files by method."""
    images, files = write_images(folder / "images"), {}
    for method in methods:
        files[method] = folder / f"{method}.yaml"
        files[method].write_text(json.dumps(recipe_of(method, images)), encoding="utf-8")
    return files


class Record(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """A hash of the weights after every step and phase; the model after its first experience."""

    stateless = True
    affects_results = False

    def __init__(self) -> None:
        super().__init__()
        self.hashes: list[str] = []
        self.first: dict[str, torch.Tensor] = {}

    def note(self, strategy: Any) -> None:
        found = hashlib.sha256()
        for tensor in strategy.model.state_dict().values():
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.hashes.append(found.hexdigest()[:16])

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self.note(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.note(strategy)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        self.note(strategy)
        if not self.first:
            self.first = {name: tensor.clone() for name, tensor in strategy.model.state_dict().items()}

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        self.note(strategy)


def record(folder: Path, methods: list[str]) -> None:
    """Run methods whose recipes lie in `folder`; what the tests compare goes to ``folder/PROCESSES``."""
    from safetensors.torch import save_file

    from avalanche_firn.experiments import runner
    from avalanche_firn.experiments.recipe import load_experiment
    from avalanche_firn.models.processes import process_count, process_rank
    from avalanche_firn.plugins.process_group import end_processes, start_processes

    start_processes("cpu")
    place, fast_path = folder / str(process_count()), runner._fast_path
    for method in methods:
        noted = Record()
        runner._fast_path = lambda config, noted=noted: [*fast_path(config), noted]  # type: ignore[assignment,misc]
        config = load_experiment(folder / f"{method}.yaml").single(method, 0)
        runner.run(config, place / method, quiet=True, say=None)
        rank = process_rank()
        (place / f"{method}-{rank}.json").write_text(json.dumps(noted.hashes))
        if rank == 0:
            save_file({k: v.contiguous() for k, v in noted.first.items()}, place / f"{method}.safetensors")
    end_processes()


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[3:])
    else:
        from avalanche_firn.experiments.cli import main

        sys.exit(main(sys.argv[2:]))
