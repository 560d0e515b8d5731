"""State of a module and of its optimizer beyond what their ``state_dict`` holds, for exact checkpoints.

A ``state_dict`` leaves out training modes, frozen flags, non-persistent buffers and plain attributes (the classes that
a growing head knows, say); an optimizer's knows its members by position only, and positions depend on the order in
which parameters joined. Everything that is loaded is compared with what was saved, to the bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from torch import Tensor, nn

from avalanche_firn.plugins.checkpoint_files import CheckpointError
from avalanche_firn.plugins.plain_state import class_name, differing_state, from_plain, to_plain

_MODULE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, str)


# ---------------------------------------------------------------------- modules
def module_state(module: nn.Module) -> dict[str, Any]:
    """Tensors, non-persistent buffers, plain attributes of all submodules (modes too), names of frozen parameters."""
    tensors = module.state_dict()
    return {
        "tensors": {n: t.detach() if isinstance(t, Tensor) else to_plain(t, path=n) for n, t in tensors.items()},
        "versions": to_plain(dict(getattr(tensors, "_metadata", {}))),
        "buffers": {n: b.detach() for n, b in module.named_buffers() if n not in tensors},
        "attributes": {
            name: {k: to_plain(v) for k, v in vars(part).items() if k not in _MODULE and _is_plain(v)}
            for name, part in module.named_modules()
        },
        "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
    }


def load_module_state(module: nn.Module, state: dict[str, Any], what: str) -> None:
    """Load :func:`module_state` in place. Avalanche's growing heads grow here, others by loading (see check_growth).

    :raises CheckpointError: names or shapes differ, or something did not come back to the bit.
    """
    tensors = OrderedDict(from_plain(state["tensors"]))
    tensors._metadata = OrderedDict(from_plain(state["versions"]))  # type: ignore[attr-defined]
    _grow_heads(module, tensors)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{what}: the checkpoint doesn't fit: {error}") from error
    parts = dict(module.named_modules())
    for name, buffer in state["buffers"].items():
        owner, _, leaf = name.rpartition(".")
        if owner in parts:
            own = parts[owner]._buffers.get(leaf)
            parts[owner]._buffers[leaf] = buffer.clone() if own is None else buffer.to(own.device, copy=True)
    for name, attributes in state["attributes"].items():
        for key, node in attributes.items() if name in parts else ():
            parts[name].__dict__[key] = from_plain(node, parts[name].__dict__.get(key))
    frozen = set(state["frozen"])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)
    place = differing_state({**state, "attributes": None}, {**module_state(module), "attributes": None})
    if place is not None:
        raise CheckpointError(f"{what}: {place} didn't come back as it was saved")


def check_growth(module: nn.Module, initial: Mapping[str, str]) -> None:
    """Refuse growth that could not be repeated when loading.

    :param initial: name -> :func:`describe_parameter` of the module as it is constructed.
    :raises ValueError: a parameter appeared, vanished or changed its shape, and no module above it overrides
        ``_load_from_state_dict`` (where modules grow) or is a growing head of Avalanche.
    """
    now = {n: describe_parameter(p) for n, p in module.named_parameters()}
    parts = dict(module.named_modules())
    for name in [n for n in {**initial, **now} if initial.get(n) != now.get(n)]:
        path = name.split(".")
        above = (parts.get(".".join(path[:i])) for i in range(len(path)))
        if not any(part is not None and _grows(part) for part in above):
            raise ValueError(
                f"parameter {name!r} was {initial.get(name, 'absent')} and is {now.get(name, 'absent')} now; no module "
                "above it grows when a state is loaded (by overriding _load_from_state_dict), so it can't be restored"
            )


def describe_parameter(parameter: nn.Parameter) -> str:
    """Shape and type, for messages and comparison."""
    return f"{list(parameter.shape)} {parameter.dtype}"


def _grows(module: nn.Module) -> bool:
    if isinstance(module, (IncrementalClassifier, MultiHeadClassifier)):
        return True
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return own and not isinstance(module, nn.modules.batchnorm._NormBase)


def _grow_heads(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Bring Avalanche's growing heads to the saved size."""
    for name, part in list(module.named_modules()):
        if isinstance(part, MultiHeadClassifier):
            start = f"{name}.classifiers." if name else "classifiers."
            device = next(part.parameters()).device
            for task in dict.fromkeys(k[len(start) :].split(".")[0] for k in tensors if k.startswith(start)):
                if task not in part.classifiers:
                    head = IncrementalClassifier(part.in_features, masking=False, auto_adapt=False)
                    part.classifiers[task] = head.to(device)
                units = tensors.get(f"{name}.active_units_T{task}" if name else f"active_units_T{task}")
                if units is not None:
                    part.register_buffer(f"active_units_T{task}", torch.zeros_like(units, device=device))
    for name, part in module.named_modules():
        weight = tensors.get(f"{name}.classifier.weight" if name else "classifier.weight")
        if isinstance(part, IncrementalClassifier) and weight is not None:
            old, size = part.classifier, len(weight)
            if size > old.out_features:
                part.classifier = nn.Linear(old.in_features, size, device=old.weight.device, dtype=old.weight.dtype)
            if part.masking and size > len(part.active_units):
                part.active_units = part.active_units.new_zeros(size)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(_is_plain(v) for v in value)
    if type(value) is dict:
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return type(value) in _PLAIN


# -------------------------------------------------------------------- optimizer
def optimizer_state(strategy: Any) -> dict[str, Any]:
    """State of the optimizer with its members by name.

    A head that grew in a periodic evaluation leaves its old tensor behind in the optimizer, known to Avalanche by name
    until the next experience: such members are kept as stand-ins with a shape and without a value.
    """
    mapped = getattr(strategy, "optimized_param_id", None)
    current = {id(p): n for n, p in strategy.model.named_parameters()}
    behind = {id(p): n for n, p in (mapped or {}).items() if id(p) not in current}
    members = [
        [[current.get(id(p)), behind.get(id(p)), list(p.shape), p.dtype] for p in group["params"]]
        for group in strategy.optimizer.param_groups
    ]
    return {
        "class": class_name(strategy.optimizer),
        "members": to_plain(members),
        "mapped": None if mapped is None else list(mapped),
        "state": to_plain(strategy.optimizer.state_dict(), path=type(strategy.optimizer).__name__),
    }


def load_optimizer_state(strategy: Any, state: dict[str, Any]) -> None:
    """Put the saved members into the saved groups, by name, and load their state.

    :raises CheckpointError: another class of optimizer, a parameter that is gone, or a state that came back changed.
    """
    optimizer = strategy.optimizer
    if class_name(optimizer) != state["class"]:
        raise CheckpointError(f"optimizer: checkpoint {state['class']}, now {class_name(optimizer)}")
    parameters: dict[str, nn.Parameter] = dict(strategy.model.named_parameters())
    mapped: dict[str, nn.Parameter] = {n: parameters[n] for n in state["mapped"] or () if n in parameters}
    groups: list[list[nn.Parameter]] = []
    for members in from_plain(state["members"]):
        groups.append([])
        for name, behind, shape, dtype in members:
            if name is not None and name not in parameters:
                raise CheckpointError(f"optimizer: parameter {name!r} of the checkpoint is not in the model")
            if name and (list(parameters[name].shape) != shape or parameters[name].dtype != dtype):
                there = f"{tuple(parameters[name].shape)} {parameters[name].dtype}"
                raise CheckpointError(f"optimizer: {name} is {tuple(shape)} {dtype} in the checkpoint, now {there}")
            member = parameters[name] if name else nn.Parameter(torch.zeros(shape, dtype=dtype, device=strategy.device))
            if behind:
                mapped[behind] = member
            groups[-1].append(member)
    if [[id(p) for p in g["params"]] for g in optimizer.param_groups] != [[id(p) for p in g] for g in groups]:
        optimizer.param_groups[:] = [{"params": group} for group in groups]
    optimizer.load_state_dict(from_plain(state["state"], device=strategy.device))
    if state["mapped"] is not None:
        strategy.optimized_param_id = mapped
    place = differing_state(state["state"], optimizer_state(strategy)["state"])
    if place is not None:
        raise CheckpointError(f"optimizer: {place} didn't come back as it was saved")


__all__ = [
    "check_growth",
    "describe_parameter",
    "load_module_state",
    "load_optimizer_state",
    "module_state",
    "optimizer_state",
]
