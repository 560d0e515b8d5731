"""Small runs for the fault tests: every method and way of pre-training, with what else may go on in a run.

Images are scikit-learn's digits as files, 8 pixels; the network is a transformer of 7,000 parameters. A run takes about
a second. Also: what of a finished run must be the same to the bit, whatever happened on the way.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

BACKBONE = "vit_of_fault_tests"
CLASSES, IMAGES = 6, 20

default_cfgs = generate_default_cfgs(
    {
        BACKBONE: {
            "num_classes": 0,
            "input_size": (3, 8, 8),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)

if not timm.is_model(BACKBONE):

    @register_model
    def vit_of_fault_tests(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        """Four tokens of 16, two blocks, with dropout: random numbers are drawn in every step."""
        shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.1}
        return build_model_with_cfg(VisionTransformer, BACKBONE, pretrained, **{**shape, **kwargs})


RECIPE: dict[str, Any] = {
    "name": "kills",
    "seeds": [0],
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "backbone": {"name": BACKBONE, "pretrained": False},
    "stream": {"name": "folder", "tasks": 3, "class_order": "seeded", "augment": False, "validation_fraction": 0.0},
    "training": {
        "epochs": 2,
        "batch_size": 8,
        "eval_batch_size": 10,
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "cosine"},
    },
    "checkpoint": {"every": 3},
}
MEMORY = {"mem_size": 9}
VIEWS = {"crop_scale": [0.7, 1.0], "flip": 0.0, "jitter": None, "grey": 0.0}
CONTRASTIVE = {
    "rehearsal": MEMORY,
    "augmentation": VIEWS,
    "classifier": {"epochs": 2, "batch_size": 8, "lr": 0.1},
    "training": {"schedule": {"name": "none"}},
}
ALIGNMENT = {"epochs": 2, "samples_per_class": 16}
PROBES = [
    {"adapt": ["knn", "linear"], "shots": 4, "k": 3, "tasks": "all"},
    {"adapt": ["fine_tune"], "shots": 2, "when": "diagonal", "lr": 0.01, "epochs": 1},
]
AUGMENTED = {"stream": {"augment": True}}
BOUND = {"evaluation": {"contrastive_bound": {"negatives": 2, "pairs_per_task": 8, "pool_per_task": 4}}}
ADAM = {"training": {"optimizer": {"name": "adam", "lr": 0.003, "weight_decay": 0.0}}}

# label of a method -> its section, and what its recipe has beside RECIPE
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "naive": (
        {"strategy": "naive"},
        {**AUGMENTED, **ADAM, "evaluation": {"streams": "all", "probes": PROBES}, "performance": {"memory": "off"}},
    ),
    "zapping": (
        {"strategy": "naive", "zapping": {"schedule": "epoch", "scope": "experience"}},
        {**AUGMENTED, "evaluation": {"dynamics": {"every": 2}}},
    ),
    "linear_probe": (
        {"strategy": "linear_probe"},
        {"evaluation": {"drift": {"num_images": 10, "blocks": ["blocks.0"]}, "task_incremental": True}},
    ),
    "slow_learner": (
        {"strategy": "slow_learner", "backbone_scale": 0.1},
        {"performance": {"fast_path": False}, "training": {"num_workers": 1}},
    ),
    "slca": (
        {"strategy": "slca", "backbone_scale": 0.1, "alignment": ALIGNMENT},
        {**AUGMENTED, "evaluation": {"dynamics": {"every": 3}, "drift": {"num_images": 10, "blocks": ["blocks.0"]}}},
    ),
    "slca_plus_plus": ({"strategy": "slca_plus_plus", "alignment": ALIGNMENT}, {"precision": "bf16"}),
    "lora": ({"strategy": "lora", "lora": {"rank": 2}}, {"performance": {"accumulate": 2}}),
    "lorac_ipc": (
        {
            "strategy": "lorac_ipc",
            "lora": {"rank": 2},
            "importance": {"threshold": 0.2, "window": 4},
            "alignment": {"epochs": 2, "clusters": 2, "samples_per_class": 8},
            "task_inference": {"clusters": 2},
        },
        {**ADAM, "evaluation": {"task_incremental": True}},
    ),
    "lp_ft": (
        {"strategy": "lp_ft", "linear_probe": {"solver": "sgd", "lp_views": "fresh", "epochs": 2, "batch_size": 8}},
        {**AUGMENTED, "evaluation": {"probes": PROBES}},
    ),
    "replay": ({"strategy": "replay", "rehearsal": MEMORY}, AUGMENTED),
    "co2l": ({"strategy": "co2l", **CONTRASTIVE}, BOUND),
    "cila": (
        {"strategy": "cila", "coefficient": {"balance": 3.0, "average_over": "final_model"}, **CONTRASTIVE},
        BOUND,
    ),
    "ewc": ({"strategy": "ewc", "ewc_lambda": 5.0, "zapping": {"schedule": "experience"}}, {}),
    "lwf": ({"strategy": "lwf", "teacher": "training"}, AUGMENTED),
    "der": ({"strategy": "der", "rehearsal": MEMORY, "zapping": {"schedule": "iteration", "every": 2}}, AUGMENTED),
    "scr": (
        {"strategy": "scr", "rehearsal": {**MEMORY, "batch_size_mem": 5}, "augmentation": VIEWS, "projection_size": 8},
        {},
    ),
    "avalanche_replay": ({"strategy": "avalanche_replay", "rehearsal": MEMORY}, {"evaluation": {"probes": PROBES[:1]}}),
    "joint": ({"strategy": "joint", "training": {"epochs": 3}}, AUGMENTED),
}

TRANSFER: dict[str, Any] = {
    "experiment": "transfer",
    "name": "kills",
    "seeds": [0],
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "network": {"name": "convnet_28", "arguments": {"width": 2}},
    "data": {"name": "digits", "pretrain_images": 12, "held_out_images": 6, "train_images": 5, "test_images": 5},
    "transfer": {
        "optimizers": [{"label": "adam", "name": "adam", "rates": [0.003, 0.001]}],
        "trials": 1,
        "log_every": 1,
        "iid_epochs": 1,
        "iid_batch_size": 8,
    },
    "dynamics": {"every": 5, "tasks": 3, "images_per_task": 4},
    "landscape": {"points": 3, "snapshots": 3},
    "checkpoint": {"every": 3},
}
PRETRAININGS: dict[str, dict[str, Any]] = {
    "untrained": {"strategy": "untrained"},
    "iid_zap": {"strategy": "iid", "zap": True, "zap_fraction": 0.5, "epochs": 3, "batch_size": 15},
    "asb_zap": {
        "strategy": "asb", "zap": True, "inner_lr": 0.01, "episodes": 8, "inner_steps": 3, "remember_size": 8
    },
    "meta_asb_zap": {
        "strategy": "meta_asb", "zap": True, "inner_lr": 0.01, "episodes": 6, "inner_steps": 3, "remember_size": 8
    },
}  # fmt: skip
CASES = (*METHODS, *PRETRAININGS)


def write_images(root: Path) -> Path:
    """A folder of digits, one folder per class, PNG."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for digit in range(CLASSES):
        folder = root / str(digit)
        folder.mkdir(parents=True)
        for i, pixels in enumerate(images[labels == digit][:IMAGES]):
            Image.fromarray((pixels.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def recipe_of(case: str, images: Path) -> dict[str, Any]:
    """The recipe of a case, as plain values (JSON is YAML)."""
    if case in PRETRAININGS:
        return {**TRANSFER, "methods": [{"name": case, **PRETRAININGS[case]}]}
    section, more = METHODS[case]
    recipe = {**RECIPE, "stream": {**RECIPE["stream"], "root": str(images)}, "methods": [{"name": case, **section}]}
    for key, value in more.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


# ------------------------------------------------------------------------------------------ what a run leaves
def timed(tag: str) -> bool:
    """Whether a scalar is of the clock or of the machine, and so the only kind that may differ."""
    return tag.startswith("efficiency/")


def story(run: Path) -> dict[str, Any]:
    """What a run leaves, times aside: results, scalars of table and event files, weights and state."""
    from safetensors.torch import load_file

    from avalanche_firn.plugins.checkpoint_files import checkpoints

    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    del results["cost"]
    found: dict[str, Any] = {"results": results, "events": scalars(run)}
    if (run / "metrics.csv").is_file():
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            found["metrics"] = [row for row in csv.reader(file) if not timed(row[1])]
        last = checkpoints(run / "checkpoint")[0]  # an older one is left where a run was killed in its last moment
        state = json.loads((last / "state.json").read_text(encoding="utf-8"))
        found["checkpoint"] = {name: state["state"][name] for name in ("kind", "experience", "samples", "structure")}
        files = [last / "tensors.safetensors"]
    else:
        files = [run / "pretrained.safetensors"]
        found["dynamics"] = [path.read_bytes() for path in sorted(run.glob("dynamics-*"))]
        found["landscape"] = [_arrays(path) for path in sorted(run.glob("landscape-*.npz"))]
    tensors = {name: value for path in files for name, value in load_file(path).items()}
    found["tensors"] = {name: (str(v.dtype), tuple(v.shape), sha256(v)) for name, v in sorted(tensors.items())}
    return found


def _arrays(path: Path) -> dict[str, bytes]:
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        return {name: array.tobytes() for name, array in stored.items()}


def sha256(tensor: Any) -> str:
    """Of a tensor's bytes."""
    import torch

    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """All scalars of the event files in a folder but times: (tag, step, value), sorted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not timed(tag)]
    return sorted((tag, e.step, e.value) for tag in tags for e in events.Scalars(tag))
