"""Composed LoRA for the world outside: plain weights for timm, an adapter for PEFT (huggingface/peft).

Merged weights are the whole model. An adapter is the low-rank pairs only: whatever else was trained (a classifier;
biases and norms with SLCA++) is not in it, and cannot be told from what the model was built with. Use
:func:`save_merged` there, or :func:`save_peft_adapter` and the other tensors by your own means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.models.lora import LoRAComposition


def merged_state_dict(model: nn.Module, task: int | None = None, submodule: str | None = None) -> dict[str, Tensor]:
    """State dict of the model as it was before ``add_composed_lora``, with the composed weights in place of its own.

    :param task: weights as after this task; default: as they are now.
    :param submodule: name of the part that is wanted (``"backbone"``); keys are relative to it.
    :returns: copies, in the order of the original keys.
    :raises ValueError: no composed layer, no such submodule. :raises IndexError: the task is not closed.
    """
    module = _part(model, submodule)
    layers = _layers(module, task)
    found: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        name = next((name for name in layers if key.startswith(_prefix(name))), None)
        if name is None:
            found[key] = _copy(tensor)
            continue
        own = key.removeprefix(_prefix(name))
        if own == "base.weight":
            found[f"{_prefix(name)}weight"] = _copy(layers[name].merged_weight(task))
        elif own.startswith("base."):
            found[_prefix(name) + own.removeprefix("base.")] = _copy(tensor)
    return found


def save_merged(
    model: nn.Module,
    path: str | Path,
    task: int | None = None,
    submodule: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write :func:`merged_state_dict` as a safetensors file, which ``load_backbone(..., weights=path)`` reads.

    :param metadata: strings for the header of the file. Other parameters and errors: :func:`merged_state_dict`.
    """
    save_file(merged_state_dict(model, task, submodule), path, metadata={"format": "pt", **(metadata or {})})


def save_peft_adapter(
    model: nn.Module, folder: str | Path, task: int | None = None, submodule: str | None = None
) -> None:
    """Write the pairs as a LoRA that ``peft.PeftModel.from_pretrained(fresh_model, folder)`` loads.

    One pair per layer, that of all tasks side by side with scale and scalars in B, alpha = rank; a fused qkv has a
    block-diagonal B. Trained biases, norms and classifiers are not part of it (see the module). A model that reads
    ``layer.weight`` (BEiT, EVA, Swin v2 of timm: qkv) passes by PEFT's layers until ``merge_and_unload()``.

    :param folder: made where it is absent; ``adapter_config.json`` and ``adapter_model.safetensors`` are replaced.
    :param task, submodule: as in :func:`merged_state_dict`, with the same errors.
    :raises ValueError: also: no task has been opened.
    """
    module = _part(model, submodule)
    layers = _layers(module, task)
    if any(layer.num_tasks == 0 for layer in layers.values()):
        raise ValueError(f"the LoRA layers of {type(module).__name__} hold no task yet: the adapter would be empty")
    if "" in layers:
        raise ValueError("PEFT adapts layers inside a model; the model is a single layer here")
    pairs = {name: _pair(layer, task) for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _copy(A)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _copy(B)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(module, {name: A.shape[0] for name, (A, _) in pairs.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _peft_config(module: nn.Module, ranks: dict[str, int]) -> dict[str, object]:
    # PEFT takes a name for every module that ends in it, and the first pattern that fits: longer names first
    patterns = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    others = [n for n, _ in module.named_modules() if n not in ranks and any(n.endswith(f".{name}") for name in ranks)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": list(ranks),
        **({"exclude_modules": others} if others else {}),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


@torch.no_grad()
def _pair(layer: ComposedLoRALinear, task: int | None) -> tuple[Tensor, Tensor]:
    """One pair ``(r', in)``, ``(out, r')`` for the whole layer, PEFT's orientation."""
    down, up = [], []
    for index, part in enumerate(layer.parts):
        scalars = layer.scale * layer._coefficients(index, task)
        A, B = layer._list("A", part)[: len(scalars)], layer._list("B", part)[: len(scalars)]
        weighted = [b * scalar for b, scalar in zip(B, scalars, strict=True)]
        # pairs that contribute nothing (frozen matrices, scalars at 0) only cost; a layer needs one all the same
        used = [i for i, b in enumerate(weighted) if b.any()]
        down.append(torch.cat([A[i].T for i in used]) if used else layer.base.weight.new_zeros(0, layer.in_features))
        up.append(torch.cat([weighted[i] for i in used]).T if used else layer.base.weight.new_zeros(layer.height, 0))
    if not any(len(A) for A in down):
        return layer.base.weight.new_zeros(1, layer.in_features), layer.base.weight.new_zeros(layer.out_features, 1)
    return torch.cat(down), torch.block_diag(*up)


def _part(model: nn.Module, submodule: str | None) -> nn.Module:
    if submodule is None:
        return model
    if submodule not in dict(model.named_modules()):
        top = [name for name, _ in model.named_children()]
        raise ValueError(f"submodule {submodule!r} is no module of {type(model).__name__}; top level: {top}")
    return model.get_submodule(submodule)


def _layers(module: nn.Module, task: int | None) -> dict[str, ComposedLoRALinear]:
    composition = LoRAComposition(module)
    if task is not None:
        with composition.as_task(task):  # refuses a task that is not closed
            pass
    return composition.layers


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


__all__ = ["merged_state_dict", "save_merged", "save_peft_adapter"]
