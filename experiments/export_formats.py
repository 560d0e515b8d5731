"""What the final model of a run looks like outside: the state dict of a timm model, or a file of our own.

timm's form is the state dict of ``timm.create_model(ARCHITECTURE, num_classes=C)``: low-rank pairs merged, the layers
of all tasks put together as one linear classifier whose rows are the classes in ascending order, scales of their inputs
multiplied in. Networks that timm can't say exactly are refused with the reason instead of being exported nearly right.
Among them is a final LayerNorm with another eps than the architecture's, which ``backbone.fresh_final_norm`` makes of
most vision transformers (1e-5, as the SLCA code has it, where timm has 1e-6): no argument in a file sets it in timm.
Our own form keeps every tensor of the model under its own name, and in the header what it takes to build the modules.

Cost: a copy of the weights; for timm one construction of the architecture. Runs are read and files are written by
:mod:`~avalanche_firn.experiments.export`, texts by :mod:`~avalanche_firn.experiments.export_card`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.environment import package_versions
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.models.backbones import load_backbone
from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.models.contrastive import ContrastiveClassifier
from avalanche_firn.models.convnets import ProjectionHead
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.lora_export import merged_state_dict
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference
from avalanche_firn.plugins.random_state import private_random_state
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

__all__ = [
    "FORMAT",
    "FORMATS",
    "ExportError",
    "FinalModel",
    "check_structure",
    "class_columns",
    "metadata",
    "own_state",
    "rebuild",
    "timm_model",
]

FORMAT = 1  # of the header of files
FORMATS = ("timm", "safetensors", "hub-folder")
_STATISTICS = "task_inference."  # the names of task inference's tensors begin with it
_TENSORS = ("means", "scales", "rows")
_SETTINGS = ("clusters", "jitter", "normalize", "correlation", "shrinkage", "form", "seed")
_ROUTING = ("mask_unseen", "batchwise_vote", "mixed")
_SPARE = 2**22  # values of modules beyond those of a file: 16 MB. Our choice


class ExportError(ConfigError):
    """A run can't be exported as asked, or a file isn't an export; the message says why and what can be done."""

    def _text(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


@dataclass(frozen=True)
class FinalModel:
    """The classifier that a run evaluated last.

    Attributes:
        config: of the run: one method, one seed.
        results: content of its ``results.json``.
        model: on the CPU, in evaluation mode, in the state in which it was evaluated.
        data_config: pre-processing of the backbone, as timm takes it.
        backbone_cfg: what timm says about the backbone's weights (architecture, licence ...).
        class_ids: (C,) ids of the classes that were learnt, ascending: the columns of the logits.
        labels: (C,) their names, or the ids as text where the run knows no names.
        inference: task inference, where it takes part in the evaluation.
        task: weights as after this task, 1 for the first; None: those of the evaluation.
    """

    config: Config
    results: dict[str, Any]
    model: FeatureClassifier
    data_config: dict[str, Any]
    backbone_cfg: dict[str, Any]
    class_ids: tuple[int, ...]
    labels: tuple[str, ...]
    inference: TaskInferencePlugin | None = None
    task: int | None = None

    @property
    def head(self) -> TaskwiseLinearHead:
        """The classifier, one layer per task."""
        assert isinstance(self.model.head, TaskwiseLinearHead)
        return self.model.head

    @property
    def architecture(self) -> str:
        """timm's name of the backbone, without a tag."""
        return str(self.backbone_cfg.get("architecture") or self.config.backbone.name.partition(".")[0])

    @property
    def composed(self) -> dict[str, ComposedLoRALinear]:
        """Layers with low-rank pairs, by their names in the model."""
        return {name: m for name, m in self.model.named_modules() if isinstance(m, ComposedLoRALinear)}

    @property
    def view(self) -> int | None:
        """`task`, counted from 0."""
        return None if self.task is None else self.task - 1

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) float32 -> logits (B, C) of the run's own modules, columns as `class_ids`."""
        if self.inference is not None:
            found = self.inference.predict(self.model, images)
        else:
            with nullcontext() if self.view is None else LoRAComposition(self.model).as_task(self.view):
                found = self.model(images)
        return found[:, class_columns(self.head)]


def class_columns(head: TaskwiseLinearHead) -> list[int]:
    """Where in the output of a head its classes are, by ascending class id."""
    ids = head.known_classes
    if head._width is not None:  # Avalanche has adapted it: its columns are class ids, with gaps where one is unknown
        return sorted(ids)
    return sorted(range(len(ids)), key=ids.__getitem__)


def metadata(final: FinalModel, form: str) -> dict[str, str]:
    """What the header of a file says, all as text: form, origin and classes; lists are JSON."""
    results = final.results
    return {
        "format": "pt",  # what readers of safetensors look for
        "firn_format": str(FORMAT),
        "firn_form": form,
        "firn_version": package_versions()["avalanche-firn"] or "",
        "architecture": final.architecture,
        "backbone": results["backbone"]["tag"],
        "initial_weights_sha256": results["backbone"]["weights_sha256"],
        "recipe": results["recipe"],
        "method": results["method"],
        "strategy": results["strategy"],
        "seed": str(results["seed"]),
        "config_digest": results["config_digest"],
        "task": "" if final.task is None else str(final.task),
        "num_classes": str(len(final.class_ids)),
        "class_ids": json.dumps(final.class_ids),
        "labels": json.dumps(final.labels),
    }


# --- timm -----------------------------------------------------------------------------------------------------------


def timm_model(final: FinalModel) -> nn.Module:
    """``timm.create_model(ARCHITECTURE, num_classes=C)`` with the run's weights, in evaluation mode.

    Raises:
        ExportError: the run's function isn't that of a network of timm: task inference, a classifier that isn't one
            linear layer on the pooled features, other tensors or other settings of a layer.
    """
    if final.inference is not None:
        raise ExportError(
            "the run infers the task of every image and evaluates it with the weights of that task, which is no single "
            f"network; give --task K, 1 to {final.head.num_tasks}, for the weights as of task K without task "
            "inference, or --format safetensors, which keeps all of it"
        )
    architecture = final.architecture
    target: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=len(final.class_ids))
    classifier = _linear_classifier(target, architecture, final.head.in_features)
    backbone = final.model.backbone
    weight, bias = _rows(final.head)
    state = merged_state_dict(final.model, final.view, "backbone") if final.composed else dict(backbone.state_dict())
    state |= {f"{classifier}.weight": weight, f"{classifier}.bias": bias}
    expected = target.state_dict()
    differ = [k for k in {**expected, **state} if k not in state or k not in expected]
    differ += [k for k in state if k in expected and state[k].shape != expected[k].shape]
    if differ:
        shown = ", ".join(differ[:4]) + (f" ... ({len(differ)} in all)" if len(differ) > 4 else "")
        raise _refused(architecture, f"has other tensors than the run's network: {shown}")
    _check_layers(architecture, target, backbone, classifier)
    target.load_state_dict(state)
    return target.eval()


def _linear_classifier(model: Any, architecture: str, features: int) -> str:
    """Name of an architecture's classifier, which must be a linear layer on the features that the run's is on."""
    name = model.pretrained_cfg.get("classifier")
    if isinstance(name, (list, tuple)):
        raise _refused(architecture, f"has several classifiers, {', '.join(map(str, name))}, and averages them")
    layer = dict(model.named_modules()).get(name) if name else None
    if not isinstance(layer, nn.Linear):
        kind = "no classifier that it names" if layer is None else f"a {type(layer).__name__} as its classifier"
        raise _refused(architecture, f"has {kind}, not a linear layer on the pooled features")
    if layer.in_features != features or layer.bias is None:
        bias = "" if layer.bias is not None else " without a bias"
        raise _refused(
            architecture, f"has a classifier{bias} on {layer.in_features} values, the run's is on {features}"
        )
    return str(name)


def _rows(head: TaskwiseLinearHead) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of all tasks by ascending class id, scales of the inputs multiplied in."""
    weight, bias = head.weight_matrix()
    weight = weight * head.input_scales[head.class_task][:, None]
    order = head.class_ids.argsort()
    return weight[order], bias[order]


def _check_layers(architecture: str, target: nn.Module, backbone: nn.Module, classifier: str) -> None:
    """Equal tensors don't make equal functions: layers must be of one kind with equal settings, such as eps."""
    own = {name: m.base if isinstance(m, ComposedLoRALinear) else m for name, m in backbone.named_modules()}
    for name, module in target.named_modules():
        if name in ("", classifier) or name not in own:
            continue
        there, here = _described(module), _described(own[name])
        if here != there:
            text = f"has as {name} {there}, and the run's network {here}"
            if name in ("norm", "fc_norm") and here.startswith("LayerNorm"):
                text += " (backbone.fresh_final_norm), which no argument in a file sets in timm"
            raise _refused(architecture, text)


def _described(module: nn.Module) -> str:
    """Kind and settings of a layer; timm's LayerNorm computes what torch's does."""
    plain = type(module) in (nn.LayerNorm, TimmLayerNorm)
    return f"{'LayerNorm' if plain else type(module).__name__}({module.extra_repr()})"


def _refused(architecture: str, why: str) -> ExportError:
    return ExportError(f"timm's {architecture} {why}; --format safetensors keeps the model as it is")


# --- our own form ---------------------------------------------------------------------------------------------------


def own_state(final: FinalModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the model under our names, and what :func:`rebuild` needs to know, as plain values.

    With a `task` the pairs are merged, as of that task. Statistics of task inference are ``task_inference....``.
    """
    model, head = final.model, final.head
    merged = final.task is not None
    tensors = merged_state_dict(model, final.view) if merged else dict(model.state_dict())
    section = final.config.backbone
    structure: dict[str, Any] = {
        "backbone": {"name": section.name, "fresh_final_norm": section.fresh_final_norm},
        "head": {"in_features": head.in_features, "freeze_old": head.freeze_old},
        "projector": None,
        "pairs": {} if merged else {name: _pair_settings(layer) for name, layer in final.composed.items()},
        "task_inference": None,
    }
    if isinstance(model, ContrastiveClassifier):
        assert isinstance(model.projector, ProjectionHead)
        hidden = model.projector.hidden.out_features
        structure["projector"] = {
            "hidden_features": hidden,
            "out_features": model.projector.out_features,
            "normalize": model.normalize,
        }
    if final.inference is not None:
        statistics = final.inference.inference.state_dict()
        tensors |= {f"{_STATISTICS}{name}": statistics.pop(name) for name in _TENSORS}
        routing = {name: getattr(final.inference, name) for name in _ROUTING}
        structure["task_inference"] = {"statistics": statistics, "routing": routing}
    return tensors, structure


def _pair_settings(layer: ComposedLoRALinear) -> dict[str, Any]:
    return {
        "rank": layer.rank,
        "scale": layer.scale,
        "parts": list(layer.parts),
        "init": layer.init,
        "gates": dict(layer.gates),
    }


def check_structure(structure: Any, tensors: Mapping[str, Tensor], *, hub: bool) -> None:
    """Refuses a description that would read other files, ask the network or need more memory than the tensors say.

    Raises:
        KeyError, TypeError, ValueError: such a description; ``hub`` allows architectures that timm has to fetch.
    """
    name = structure["backbone"]["name"]
    if set(structure["backbone"]) != {"name", "fresh_final_norm"} or not isinstance(name, str):
        raise ValueError(f"the backbone is described by {sorted(structure['backbone'])}; name and fresh_final_norm are")
    if ":" in name and not hub:
        raise ValueError(f"the architecture {name!r} would be fetched; load_exported(..., hub=True) allows it")
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values() if tensor.numel()), default=0)
    sizes: list[tuple[str, Any, tuple[str, ...]]] = [("head", structure["head"], ("in_features",))]
    sizes += [("projector", structure["projector"] or {}, ("hidden_features", "out_features"))]
    sizes += [(pair, settings, ("rank",)) for pair, settings in structure["pairs"].items()]
    for where, section, keys in sizes:
        for key in set(keys) & set(section):
            if isinstance(section[key], bool) or not isinstance(section[key], int) or not 0 < section[key] <= largest:
                raise ValueError(f"{where}.{key} is {section[key]!r}; no tensor is larger than {largest}")
    odd = [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.is_complex()]
    if odd:
        raise ValueError(f"{odd[0]} is complex")


def rebuild(
    structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[FeatureClassifier, TaskInferencePlugin | None]:
    """The modules that :func:`own_state` described, with their tensors, in evaluation mode, and task inference.

    Global random generators stay as they were. No weights of timm's are read. An architecture that is far larger than
    the tensors is refused while it is built.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: the description is none, or doesn't fit the tensors.
    """
    with _no_larger_than(sum(tensor.numel() for tensor in tensors.values())):
        return _rebuilt(structure, tensors)


@contextmanager
def _no_larger_than(values: int) -> Iterator[None]:
    """Refuses modules as soon as this thread has given them more parameters and buffers than a file of `values` needs.

    Some are made twice, as those of a final norm, and some aren't in files, as masks: hence the factor.
    """
    owner, most, made = threading.get_ident(), _SPARE + 4 * values, 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal made
        if tensor is not None and threading.get_ident() == owner:
            made += tensor.numel()
            if made > most:  # before it is filled, which is what takes memory
                raise ValueError(f"its modules have more than {most:,} values, and its tensors {values:,}")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rebuilt(
    structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[FeatureClassifier, TaskInferencePlugin | None]:
    with private_random_state():
        backbone = load_backbone(**structure["backbone"], pretrained=False).module
    head = TaskwiseLinearHead(**structure["head"])
    model = FeatureClassifier(backbone, head)
    if (section := structure["projector"]) is not None:
        projector = ProjectionHead(head.in_features, section["hidden_features"], section["out_features"])
        model = ContrastiveClassifier(backbone, projector, head, normalize=section["normalize"])
    for name, settings in structure["pairs"].items():
        parent, _, leaf = name.rpartition(".")
        base: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, ComposedLoRALinear(base, **settings))
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_STATISTICS)}
    before = dict(model.state_dict())
    model.load_state_dict(state)  # refuses what is missing, left over or of another shape, but casts between types
    if wrong := [k for k, t in state.items() if k in before and t.is_floating_point() != before[k].is_floating_point()]:
        raise ValueError(f"{wrong[0]} is {state[wrong[0]].dtype} and stands for {before[wrong[0]].dtype}")
    inference = None
    if (section := structure["task_inference"]) is not None:
        stored = section["statistics"]
        statistics = MahalanobisTaskInference(**{name: stored[name] for name in _SETTINGS})
        statistics.load_state_dict({**stored, **{name: tensors[f"{_STATISTICS}{name}"] for name in _TENSORS}})
        inference = TaskInferencePlugin(inference=statistics, **section["routing"])
    return model.eval(), inference
