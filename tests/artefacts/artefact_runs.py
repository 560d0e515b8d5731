"""The tiny runs that are stored of every released version, and the network that they train.

Both stay as they are for ever: what a version has stored is loaded with the network and the settings it was made with.
A later version that wants other runs adds them under other names.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

BACKBONE = "vit_of_artefacts"

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
    def vit_of_artefacts(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        """Four tokens of 8 and one block: 2,000 parameters."""
        shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
        return build_model_with_cfg(VisionTransformer, BACKBONE, pretrained, **{**shape, **kwargs})


RECIPE: dict[str, Any] = {
    "name": "artefacts",
    "seeds": [0],
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "output": "runs",
    "backbone": {"name": BACKBONE, "pretrained": False},
    "stream": {"name": "digits", "tasks": 2, "class_order": "seeded"},
    "training": {"epochs": 1, "batch_size": 64, "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.0}},
    "checkpoint": {"every": 5, "keep": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "slca": {"strategy": "slca", "backbone_scale": 0.5, "alignment": {"epochs": 2, "samples_per_class": 16}},
    "lorac_ipc": {
        "strategy": "lorac_ipc",
        "lora": {"rank": 2},
        "importance": {"threshold": 0.2, "window": 5},
        "alignment": {"epochs": 2, "clusters": 2, "samples_per_class": 16},
        "task_inference": {"clusters": 2},
    },
    "cila": {
        "strategy": "cila",
        "rehearsal": {"mem_size": 20},
        "augmentation": {"crop_scale": [0.7, 1.0], "flip": 0.0, "jitter": None, "grey": 0.0},
        "classifier": {"epochs": 2, "batch_size": 64, "lr": 0.1, "views": "evaluation"},
    },
    "lp_ft": {"strategy": "lp_ft", "linear_probe": {"solver": "ridge"}},
    "zapping": {"strategy": "naive", "zapping": {"schedule": "iteration", "every": 7}},
}
TRANSFER: dict[str, Any] = {
    "experiment": "transfer",
    "name": "transfer",
    "seeds": [0],
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "output": "runs",
    "network": {"name": "convnet_28", "arguments": {"width": 2}},
    "data": {"name": "digits", "pretrain_images": 12, "held_out_images": 6, "train_images": 5, "test_images": 5},
    "methods": [
        {"strategy": "iid", "name": "iid_zap", "zap": True, "zap_fraction": 0.5, "epochs": 2, "batch_size": 15},
    ],
    "transfer": {
        "optimizers": [{"label": "adam", "name": "adam", "rates": [0.003]}],
        "trials": 1,
        "iid_epochs": 1,
        "iid_batch_size": 8,
    },
    "landscape": {"points": 3, "snapshots": 3},
}


def recipe_of(label: str) -> dict[str, Any]:
    """The recipe of a stored comparison, with one method."""
    return TRANSFER if label == "transfer" else {**RECIPE, "methods": [{"name": label, **METHODS[label]}]}
