"""Outputs of the blocks of a backbone, one vector per image: which modules count, and how to listen to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_firn.models.parts import ModelParts

# timm's names for the sequence of blocks; ResNets have layer1, layer2, ...
_CONTAINERS = ("blocks", "stages", "layers")


def block_names(parts: ModelParts, blocks: Sequence[str] | str | None) -> dict[str, str]:
    """Name of a block in the tags -> its name in the model."""
    if blocks is None:
        return {}
    modules = {n: m for n, m in parts.model.named_modules() if n and not parts.is_head(f"{n}.")}
    if blocks == "all":
        return _all_blocks(parts.model, modules)
    found = {}
    for name in blocks:
        matches = [name] if name in modules else [n for n in modules if n.endswith(f".{name}")]
        if len(matches) != 1:
            which = f"could be any of {matches}" if matches else "was not found"
            top = [n for n, _ in parts.model.named_children()]
            raise ValueError(f"blocks: {name!r} {which} in {type(parts.model).__name__}; top level: {top}")
        found[name] = matches[0]
    return found


def _all_blocks(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        above, _, leaf = name.rpartition(".")
        if not isinstance(module, (nn.Sequential, nn.ModuleList)) or not len(module):
            continue
        if leaf in _CONTAINERS:
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            groups[name] = [child for child in children if child in modules]  # not the classifier
        elif re.fullmatch(r"layer\d+", leaf):
            groups.setdefault(f"{above}.layer", []).append(name)
    if not groups:
        raise ValueError(
            f"blocks: 'all' finds no module list named {', '.join(_CONTAINERS)} or layer1, layer2, ... in "
            f"{type(model).__name__}; name the modules: blocks=[...], one of {[n for n, _ in model.named_children()]}"
        )

    def size(names: list[str]) -> int:
        return sum(p.numel() for name in names for p in modules[name].parameters())

    place, names = max(groups.items(), key=lambda group: size(group[1]))  # the first of equals is the outermost
    above = place.rpartition(".")[0]
    return {name[len(above) + 1 :] if above else name: name for name in names}


@contextmanager
def recorded_blocks(model: nn.Module, names: Mapping[str, str]) -> Iterator[dict[str, list[Tensor]]]:
    """Pooled outputs (B, d) of modules, one per forward pass of the model and block (the last call counts)."""
    outputs: dict[str, list[Tensor]] = {block: [] for block in names}
    last: dict[str, Tensor] = {}
    formats = {str(m.output_fmt) for m in model.modules() if hasattr(m, "output_fmt")}
    channels_last = any(text.endswith("NHWC") for text in formats)

    def keep(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            last[block] = _pooled(output, block, channels_last)

        return hook

    def store(module: nn.Module, args: Any, output: Any) -> None:
        if absent := [block for block in names if block not in last]:
            raise ValueError(f"blocks: {absent} take no part in the forward pass of {type(model).__name__}")
        for block in names:
            outputs[block].append(last.pop(block))

    handles = [model.get_submodule(name).register_forward_hook(keep(block)) for block, name in names.items()]
    handles.append(model.register_forward_hook(store))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _pooled(output: Any, block: str, channels_last: bool) -> Tensor:
    axes = {2: (), 3: (1,), 4: (1, 2) if channels_last else (2, 3)}
    if not isinstance(output, Tensor) or output.ndim not in axes:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"blocks: {block!r} gives {kind}; accepted are (B, d), (B, N, d) and (B, C, H, W)")
    output = output.detach().to(torch.float32, copy=True)  # a later layer may write into it
    return output.mean(axes[output.ndim]) if axes[output.ndim] else output


__all__ = ["block_names", "recorded_blocks"]
