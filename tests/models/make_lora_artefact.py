"""Writes tests/artefacts/lorac_ipc.safetensors and lorac_ipc.npz, which test_lora_artefact.py reads.

``python tests/models/make_lora_artefact.py 2026-11-25`` (the date of the day; the package must be installed). The files
stand for those that users keep: they are written again only when the format changes on purpose, and then the release
notes say so. Other machines and versions give other last bits, so a new file comes with its own expected values.

``model.KEY`` is an entry of the model's state dict; the plugins' state dicts are split by ``checkpoint_files.flatten``
into tensors called ``plugins/CLASS/...`` and JSON, which stands in the header of the file.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.training.plugins import EvaluationPlugin
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.plugins.checkpoint_files import flatten
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.plain_state import to_plain
from avalanche_firn.plugins.task_inference import TaskInferencePlugin
from avalanche_firn.strategies.lorac_ipc import LoRACIPC

FOLDER = Path(__file__).parents[1] / "artefacts"
KINDS = (LoRACompositionPlugin, ImportantParameterPlugin, ClassifierAlignmentPlugin, TaskInferencePlugin)
LAYER = "backbone.blocks.0.attn.qkv"


def stream() -> Any:
    """Tasks of 3, 3, 2 and 2 digits, 8 x 8; class 7 has four images. Three tasks are stored, a fourth comes later."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)

    def dataset(rows: torch.Tensor) -> TensorDataset:
        data = TensorDataset(x[rows], y[rows])
        data.targets = y[rows].tolist()  # type: ignore[attr-defined]
        return data

    train, test = torch.arange(200), torch.arange(400, 500)
    train = train[(y[train] != 7) | (torch.cumsum(y[train] == 7, 0) <= 4)]
    parts = {"train": dataset(train), "test": dataset(test)}
    return class_incremental_benchmark(
        parts, class_order=[3, 1, 7, 0, 9, 2, 8, 4, 6, 5], num_classes_per_exp=[3, 3, 2, 2]
    )


def build(seed: int) -> LoRACIPC:
    """The strategy before its first task; 12 matrices, of which 2 are frozen per task."""
    torch.manual_seed(seed)
    shape = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **shape)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # timm's small values would be blown up by the norms, rounding errors with them
            torch.nn.init.normal_(parameter, std=0.2)
    return LoRACIPC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        rank=2,
        alpha=3.0,
        orthogonality=0.05,
        importance=ImportantParameterPlugin(0.2, window=20),
        alignment=ClassifierAlignmentPlugin.tap(epochs=20, lr=0.02, samples_per_class=32, clusters=2),
        task_inference=TaskInferencePlugin(2),
        train_mb_size=16,
        train_epochs=10,
        eval_mb_size=64,
        evaluator=EvaluationPlugin(loggers=[]),
    )


def plugins_of(strategy: Any) -> dict[str, Any]:
    """The method's plugins that have a state, by the name of their class."""
    return {type(p).__name__: p for p in strategy.plugins if isinstance(p, KINDS)}


def answers(strategy: Any, images: torch.Tensor, mixed: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model says, in evaluation mode; logits by class id.

    :param images: (N, 1, 8, 8). :param mixed: (N,) tasks of the samples in a batch of several tasks.
    """
    model, inference = strategy.model.eval(), plugins_of(strategy)["TaskInferencePlugin"]
    composition = LoRAComposition(model)
    features: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    logits = []
    with torch.no_grad():
        for task in range(composition.num_closed):
            with composition.as_task(task):
                logits.append(model(images))
        with composition.as_tasks(mixed):
            together = model(images)
    handle.remove()
    return {
        "logits": torch.stack(logits),
        "mixed_logits": together,
        "predicted_logits": inference.predict(model, images),
        "distances": inference.inference.distances(features[0]),
        "inferred": inference.inference.infer(features[0]),
        "merged": torch.stack([composition.layers[LAYER].merged_weight(t) for t in range(composition.num_closed)]),
        "frozen": composition.frozen,
    }


def clear_cases(strategy: Any, streams: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Five images of each task whose nearest task is nearer than the others by a hundredth or more."""
    plugin, images, targets = plugins_of(strategy)["TaskInferencePlugin"], [], []
    owners = torch.tensor(plugin.inference.tasks)
    for experience in streams:
        x, y = (torch.stack([torch.as_tensor(row[i]) for row in experience.dataset]) for i in range(2))
        distances = answers(strategy, x, torch.zeros_like(y))["distances"]
        nearest = torch.stack([distances[:, owners == task].amin(1) for task in range(3)], 1).sort(1)[0]
        rows = (nearest[:, 1] > 1.01 * nearest[:, 0]).nonzero()[:, 0]
        rows = rows[:: len(rows) // 5][:5]
        images.append(x[rows])
        targets.append(y[rows])
    return torch.cat(images), torch.cat(targets)


def main(date: str) -> None:
    """Train on three tasks, write both files."""
    benchmark, strategy = stream(), build(1)
    for experience in benchmark.train_stream[:3]:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
    images, targets = clear_cases(strategy, benchmark.test_stream[:3])
    mixed = torch.arange(len(images)) % 3
    tree, tensors = flatten({"plugins": {n: to_plain(p.state_dict()) for n, p in plugins_of(strategy).items()}})
    tensors |= {f"model.{key}": tensor.contiguous() for key, tensor in strategy.model.state_dict().items()}
    # the trained model's columns are class ids; a model outside Avalanche has them in the order of the tasks
    kept = {name: value.numpy() for name, value in answers(strategy, images, mixed).items()}
    columns = np.array(strategy.model.head.known_classes)
    for name in ("logits", "mixed_logits", "predicted_logits"):
        kept[name] = kept[name][..., columns]
    FOLDER.mkdir(exist_ok=True)
    header = {"version": version("avalanche-firn"), "date": date, "plugins": json.dumps(tree["plugins"])}
    save_file(tensors, FOLDER / "lorac_ipc.safetensors", metadata={"format": "pt", **header})
    positions = np.array(LoRAComposition(strategy.model).positions)
    np.savez_compressed(
        FOLDER / "lorac_ipc.npz",
        images=images.numpy(), targets=targets.numpy(), mixed=mixed.numpy(), positions=positions, columns=columns,
        **kept,
    )  # fmt: skip
    print("accuracy", (columns[kept["predicted_logits"].argmax(1)] == targets.numpy()).mean())
    print("tasks", kept["inferred"].tolist())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1])
