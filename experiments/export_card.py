"""What an exported model says about itself: pre-processing, timm's hub configuration, remarks and the model card.

The card is written from ``config.yaml`` and ``results.json`` alone: where the model comes from, what this one run
measured and under which protocol, what the file leaves out, how it is loaded. Licence and data are the user's to add:
a run doesn't know them.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from avalanche_firn.benchmarks.transforms import TRANSFORM_PRESETS, preset_transforms
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.environment import package_versions
from avalanche_firn.experiments.escapes import markdown_line
from avalanche_firn.experiments.export_formats import FinalModel
from avalanche_firn.experiments.results import FIGURES
from avalanche_firn.experiments.sections import DigitsStreamConfig
from avalanche_firn.models.backbones import list_backbones
from avalanche_firn.models.contrastive import ContrastiveClassifier

__all__ = ["architectures", "hub_config", "model_card", "preprocessing", "remarks"]

_KEYS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
_SHOWN = 20  # classes in the card; config.json has all of them


def architectures() -> set[str]:
    """Names of the architectures that this package adds to timm, which knows them after an import."""
    return {name.partition(".")[0] for name in list_backbones()}


def preprocessing(config: Config, data_config: dict[str, Any]) -> dict[str, Any]:
    """Pre-processing of the images that a run was evaluated on, as ``timm.data.create_transform`` takes it.

    Args:
        config: of the run.
        data_config: of the backbone; it holds where the recipe says nothing else.

    Returns:
        ``input_size`` (channels, height, width), ``interpolation``, ``crop_pct``, ``crop_mode``, ``mean`` and ``std``
        per channel, of images in 0..1. With ``stream.transforms: own`` the backbone's, see :func:`remarks`.
    """
    name = getattr(config.stream, "transforms", None)
    if name in TRANSFORM_PRESETS:
        return _of_transform(preset_transforms(name).eval)
    found = {"crop_mode": "center", **{key: data_config[key] for key in _KEYS if key in data_config}}
    if isinstance(config.stream, DigitsStreamConfig):  # 8x8 pixels scaled to the size of the network
        found |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    return found


def _of_transform(evaluation: Any) -> dict[str, Any]:
    """The same of a torchvision pipeline: resize, perhaps a centre crop, tensor, perhaps a normalisation."""
    steps = evaluation.transforms
    flat = [step for part in steps for step in (part.transforms if isinstance(part, transforms.Compose) else [part])]
    shape: torch.Size = evaluation(Image.new("RGB", (256, 256))).shape
    resize = next(step for step in flat if isinstance(step, transforms.Resize))
    normalize = next((step for step in flat if isinstance(step, transforms.Normalize)), None)
    whole = isinstance(resize.size, (tuple, list))  # both edges are set: nothing is cut off
    return {
        "input_size": tuple(shape),
        "interpolation": resize.interpolation.value,
        "crop_pct": 1.0 if whole else shape[-1] / resize.size,
        "crop_mode": "squash" if whole else "center",
        "mean": tuple(normalize.mean) if normalize is not None else (0.0,) * shape[0],
        "std": tuple(normalize.std) if normalize is not None else (1.0,) * shape[0],
    }


def hub_config(final: FinalModel, target: nn.Module, header: dict[str, str]) -> dict[str, Any]:
    """``config.json`` of a hub folder, in timm's layout.

    Args:
        final: the model.
        target: the same as a model of timm.
        header: of the weights file; goes along under the key ``firn``, which timm leaves alone.
    """
    base: dict[str, Any] = dict(target.pretrained_cfg)  # type: ignore[arg-type]
    found = preprocessing(final.config, final.data_config)
    same_size = tuple(found["input_size"]) == tuple(base["input_size"])
    classes = len(final.class_ids)
    licence = final.backbone_cfg.get("license")
    return {
        "architecture": final.architecture,
        "num_classes": classes,
        "num_features": final.head.in_features,
        "label_names": list(final.labels),
        "pretrained_cfg": {
            "custom_load": False,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in found.items()},
            "fixed_input_size": base.get("fixed_input_size", False),
            "num_classes": classes,
            "pool_size": list(base["pool_size"]) if same_size and base.get("pool_size") else None,
            "first_conv": base.get("first_conv"),
            "classifier": base.get("classifier"),
            **({"license": licence} if licence else {}),
        },
        "firn": header,
    }


def remarks(final: FinalModel, form: str) -> list[str]:
    """What a user of the file has to know, one sentence each."""
    config, method, head = final.config, final.config.methods[0], final.head
    plain = form != "safetensors"
    found = []
    alignment = getattr(method, "alignment", None)
    if alignment is not None and alignment.epochs > 0 and head.num_tasks > 1:
        found.append("The classifier is the aligned one, with which the run was evaluated.")
    if plain and bool((head.input_scales != 1).any()):
        found.append("The scales that the method puts on the inputs of the classifier are part of its weights.")
    if final.composed and (plain or final.task is not None):
        found.append("The low-rank pairs are merged into the weights.")
    if isinstance(final.model, ContrastiveClassifier):
        what = "is left out" if plain else "is in the file, the logits don't pass through it"
        found.append(f"The projector, which only the training needs, {what}.")
    if final.task is not None:
        text = f"The backbone's weights are those after task {final.task} of {head.num_tasks}, the classifier the last."
        if getattr(method, "task_inference", None) is not None:
            text += " Task inference, with which the run was evaluated, is not part of it: its figures don't hold here."
        elif final.task < head.num_tasks:
            text += " The run was evaluated with those after the last task: its figures don't hold here."
        found.append(text)
    if final.inference is not None:
        vote = "one task per batch, by majority" if final.inference.batchwise_vote else "each by its own features"
        found.append(f"Images are evaluated with the weights of the task that is inferred for them, {vote}.")
    if config.precision != "fp32":
        found.append(f"The run was evaluated with precision {config.precision}; the weights are float32.")
    if getattr(config.stream, "transforms", None) == "own":
        found.append("The images went through the benchmark's own transforms; those named here are the backbone's.")
    if final.results["protocol"]["joint"]:
        found.append("It was trained on all classes at once: an upper bound, not a continual learner.")
    return found


def model_card(final: FinalModel, title: str) -> str:
    """``README.md`` of a hub folder."""
    results, config = final.results, final.config
    stream, protocol = results["stream"], results["protocol"]
    ours = final.architecture in architectures()
    packages = "import avalanche_firn.models  # registers the architecture with timm\n" if ours else ""
    more = len(final.class_ids) - _SHOWN
    classes = [f"id {c}, {_text(label)}" for c, label in zip(final.class_ids, final.labels, strict=True)][:_SHOWN]
    licence = final.backbone_cfg.get("license")
    split = "test" if stream["split"] == "test" else "validation"
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm, continual-learning]",
        "---",
        f"# {_text(title)}",
        "",
        f"An image classifier of {len(final.class_ids)} classes on the architecture {final.architecture}, trained on a "
        f"stream of {len(stream['task_sizes'])} tasks by the method {_text(results['strategy'])} of "
        f"avalanche-firn, and exported by its version {package_versions()['avalanche-firn']}.",
        "",
        "```python",
        "import timm",
        f'{packages}model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: this one',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        "```",
        "",
        "## Origin",
        "",
        *_table(
            ("recipe", results["recipe"]),
            ("method", f"{results['method']} (strategy {results['strategy']})"),
            ("seed", results["seed"]),
            ("backbone", f"{results['backbone']['tag']}, weights {_origin(results['backbone']['weights'])}"),
            ("SHA-256 of the initial weights", results["backbone"]["weights_sha256"]),
            ("licence of the initial weights, as timm names it", licence or "not known"),
            ("SHA-256 of the configuration", results["config_digest"]),
            ("stream", stream["source"]),
            ("classes per task", ", ".join(map(str, stream["task_sizes"]))),
            ("order of the classes", _some(stream["class_order"])),
            ("epochs per task", config.training_of(config.methods[0]).epochs),
        ),
        "",
        "## Figures",
        "",
        f"Measured by this one run, seed {results['seed']}, on the {split} images: no mean over seeds. How each is "
        "defined stands in the documentation of avalanche-firn.",
        "",
        *_table(*_figures(results)),
        "",
        "Protocol under which they hold:",
        "",
        *_table(*((key.replace("_", " "), _plain(value)) for key, value in protocol.items())),
        "",
        "## What to know",
        "",
        *(f"- {remark}" for remark in remarks(final, "hub-folder")),
        "- It knows the classes below and nothing else; an image of another class gets one of them.",
        "- The figures hold for images that are pre-processed as `config.json` says.",
        "",
        "## Classes",
        "",
        "Output column: class id of the data, name"
        + (f"; the first {_SHOWN} of {len(final.class_ids)}, all in `config.json`." if more > 0 else "."),
        "",
        *(f"- {column}: {text}" for column, text in enumerate(classes)),
    ]
    return "\n".join(lines) + "\n"


def _figures(results: dict[str, Any]) -> list[tuple[str, str]]:
    joint = results["protocol"]["joint"]
    rows = []
    for tag, heading, factor, digits in FIGURES:
        value = results["figures"].get(tag)
        if value is not None and not (joint and tag == "accuracy/incremental"):
            rows.append((heading, f"{factor * value:.{digits}f}"))
    return [*rows, ("seconds of training and evaluation", f"{results['cost']['seconds']:.1f}")]


def _table(*rows: tuple[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {_text(name)} | {_text(str(value))} |" for name, value in rows)]


def _plain(value: Any) -> str:
    return {True: "yes", False: "no", None: "-"}[value] if isinstance(value, (bool, type(None))) else str(value)


def _origin(weights: str) -> str:
    """A local file is somebody's path: its name is enough."""
    return weights.replace("\\", "/").rpartition("/")[2]


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:50])) + (f" ... ({len(values)} in all)" if len(values) > 50 else "")


def _text(value: str) -> str:
    """In one line of Markdown, nothing of it markup, no end of a table's cell."""
    return markdown_line(" ".join(value.split())).replace("|", "\\|")
