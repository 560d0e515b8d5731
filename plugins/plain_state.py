"""The state of an object as plain values, and back in place: no pickle, no code runs, and nothing is left out silently.

:func:`plain_state` walks the attributes of an object (a plugin or a metric that has no ``state_dict``) and either
describes all of them or raises ``TypeError`` naming the first one that it can't describe exactly.
:func:`load_plain_state` writes such a description into an object that was constructed in the same way. A description
consists of None, bool, int, finite float, str, tensors, lists, and dicts with string keys; any other type stands in a
dict with a single key that starts with ``$``. Cost: one visit per value; tensors are referenced, not copied.
"""

from __future__ import annotations

import enum
import math
import time
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.evaluation.metric_results import AlternativeValues, TensorImage
from avalanche.evaluation.metrics.timing import ElapsedTime
from avalanche.training.utils import ParamData
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from avalanche_firn.plugins.run_errors import RunError

_SETTINGS = (types.FunctionType, types.BuiltinFunctionType, type, enum.Enum, range)
_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_MAPPINGS: dict[type, str] = {
    dict: "$items", OrderedDict: "$ordered", Counter: "$counter", defaultdict: "$default",
}  # fmt: skip
_WRONG_FORM = (LookupError, AttributeError, RuntimeError, OverflowError)
_METRIC_MODULES = ("avalanche.evaluation", "avalanche_firn.evaluation")
_MACHINE_METRICS = tuple(f"avalanche.evaluation.metrics.{m}_usage" for m in ("cpu", "ram", "gpu", "disk"))


def plain_state(obj: Any, *, known: Mapping[str, Any] | None = None, skip: Container[str] = ()) -> dict[str, Any]:
    """Describe all attributes of ``obj``.

    Accepted: None, bool, int, float, str, bytes, tensors, NumPy arrays, list, tuple, set, deque, dict and its variants
    with plain keys; as attributes or values of a defaultdict also metrics of Avalanche and of this package,
    ``torch.Generator``, learning-rate schedulers and objects with ``state_dict``/``load_state_dict``; Avalanche's
    ``ParamData``, ``AlternativeValues``, ``TensorImage``; PIL images. Functions without closure, classes, enum members
    and ranges count as settings: they are compared when loading, not restored.

    :param known: ``name -> object`` for objects whose state is saved elsewhere (the model, other plugins): a reference
        to one is saved as its name.
    :param skip: attributes of ``obj`` to leave out.
    :raises TypeError: any other attribute, named with its path.
    """
    return _Encoder(known).object(obj, type(obj).__name__, skip)


def load_plain_state(
    obj: Any,
    state: Mapping[str, Any],
    *,
    known: Mapping[str, Any] | None = None,
    skip: Container[str] = (),
    strict: bool = True,
    device: torch.device | None = None,
) -> None:
    """Write a description into an equally constructed object; containers and nested objects are changed in place.

    :param known: as for :func:`plain_state`. :param skip: likewise.
    :param strict: False leaves out what has no counterpart yet (an object that a hook will create later).
    :param device: as for :func:`from_plain`.
    :raises ValueError: another class, a setting that differs, or a description that :func:`plain_state` never gives.
    :raises TypeError: a nested object has no counterpart to be written into.
    """
    _Decoder(known, strict, device).object(obj, state, type(obj).__name__, skip)


def to_plain(value: Any, *, path: str = "state", known: Mapping[str, Any] | None = None) -> Any:
    """Describe a value rather than an object with attributes, for example the result of a ``state_dict()``.

    :raises TypeError: it contains something other than plain values; the message names the place.
    """
    return _Encoder(known).value(value, path, owned=False)


def from_plain(
    node: Any, current: Any = None, *, known: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> Any:
    """The value that :func:`to_plain` described, written into ``current`` if that is a container of the same type.

    :param device: takes the tensors of other devices than the CPU, wherever they lay, and copies of parameters; None:
        each goes to the device that it was on. A tensor of the CPU that is no copy of a parameter stays there.
    """
    return _Decoder(known, True, device).value(node, current, "state")


def class_name(obj: Any) -> str:
    """Module and class of an object."""
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def differing_state(first: Any, second: Any, path: str = "") -> str | None:
    """Path of the first place where two descriptions differ by so much as a bit, None if there is none.

    NaN equals NaN, 0.0 differs from -0.0, tensors are compared in dtype, shape and every bit, on any device: which one
    it is makes no difference.
    """
    first, second = _anywhere(first), _anywhere(second)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return None if _same_bits(first, second) else path or "value"
    if type(first) is not type(second):
        return path or "value"
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{path}/{min(first.keys() ^ second.keys())}"
        return next((d for k in first if (d := differing_state(first[k], second[k], f"{path}/{k}"))), None)
    if isinstance(first, list):
        if len(first) != len(second):
            return f"{path} (lengths {len(first)} and {len(second)})"
        pairs = enumerate(zip(first, second, strict=True))
        return next((d for i, (a, b) in pairs if (d := differing_state(a, b, f"{path}/{i}"))), None)
    return None if repr(first) == repr(second) else path or "value"


def _anywhere(node: Any) -> Any:
    """A node without the device that it names."""
    if isinstance(node, dict) and len(node) == 1:
        if "$on" in node:
            return node["$on"][1]
        if "$device" in node:
            return {"$device": None}
    return node


class _Encoder:
    """One walk from objects to a description; ``path`` is for messages."""

    def __init__(self, known: Mapping[str, Any] | None) -> None:
        self.names = {id(obj): name for name, obj in (known or {}).items()}
        self.inside: list[int] = []

    def object(self, obj: Any, path: str, skip: Container[str] = ()) -> dict[str, Any]:
        """Class and attributes."""
        if id(obj) in self.inside:
            raise TypeError(f"{path}: the object contains itself")
        if type(obj).__module__ in _MACHINE_METRICS:
            raise TypeError(f"{path}: {type(obj).__name__} watches the process through handles that can't be saved")
        self.inside.append(id(obj))
        attributes = {name: self.value(v, f"{path}.{name}") for name, v in vars(obj).items() if name not in skip}
        self.inside.pop()
        return {"class": class_name(obj), "attributes": attributes}

    def value(self, value: Any, path: str, *, owned: bool = True) -> Any:
        """``owned``: the constructor of the owner (or the factory of a defaultdict) makes such an object again."""
        kind = type(value)
        if id(value) in self.names:
            return {"$known": self.names[id(value)]}
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            value = value.detach()
            return value if value.device.type == "cpu" else {"$on": [str(value.device), value]}
        if kind is list:
            return self.items(value, path)
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: self.items(value if kind is tuple else _in_order(value), path)}
        if kind is deque:
            return {"$deque": [value.maxlen, self.items(value, path)]}
        if kind in _MAPPINGS:
            return self.mapping(value, path)
        if kind in _LEAVES:
            tag, encode = _LEAVES[kind]
            return {tag: self.value(encode(value), path, owned=False)}
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
            return {"$ndarray" if isinstance(value, np.ndarray) else "$scalar": torch.from_numpy(np.array(value))}
        found = self.nested(value, path) if owned else None
        if found is None:
            raise TypeError(f"{path}: a {kind.__module__}.{kind.__qualname__} can't be saved exactly")
        return found

    def nested(self, value: Any, path: str) -> dict[str, Any] | None:
        """Objects that exist again when the state is loaded; None for all others."""
        if isinstance(value, _SETTINGS) and getattr(value, "__closure__", None) is None:
            return {"$setting": _setting(value)}
        if isinstance(value, ElapsedTime):
            return {"$elapsed": None if value._init_time is None else value._prev_time - value._init_time}
        if isinstance(value, torch.Generator):
            return {"$generator": value.get_state()}
        if isinstance(value, LRScheduler) or has_state_dict(value):
            return {"$state": self.value(value.state_dict(), path, owned=False)}
        if any(base.__module__.startswith(_METRIC_MODULES) for base in type(value).__mro__):
            return {"$object": self.object(value, path)}
        return None

    def items(self, values: Any, path: str) -> list[Any]:
        return [self.value(v, f"{path}[{i}]", owned=False) for i, v in enumerate(values)]

    def mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        made = isinstance(value, defaultdict)
        if type(value) is dict and all(type(k) is str and not k.startswith("$") for k in value):
            return {k: self.value(v, f"{path}[{k!r}]", owned=made) for k, v in value.items()}
        pairs = [
            [self.value(k, f"{path} (a key)", owned=False), self.value(v, f"{path}[{k!r}]", owned=made)]
            for k, v in value.items()
        ]
        return {_MAPPINGS[type(value)]: pairs}


class _Decoder:
    """One walk back, along the object that is written into."""

    def __init__(self, known: Mapping[str, Any] | None, strict: bool, device: torch.device | None) -> None:
        self.known = known or {}
        self.strict = strict
        self.device = device

    def object(self, obj: Any, state: Mapping[str, Any], path: str, skip: Container[str] = ()) -> None:
        saved = state.get("attributes") if isinstance(state, Mapping) else None
        if not isinstance(saved, Mapping) or "class" not in state:
            raise ValueError(f"{path}: not the description of an object")
        if state["class"] != class_name(obj):
            raise ValueError(f"{path}: saved from a {state['class']}, loaded into a {class_name(obj)}")
        if foreign := [name for name in saved if name in skip]:
            raise ValueError(f"{path}.{foreign[0]}: nothing is saved of it, and the description has it")
        current = vars(obj)
        for name in [n for n in current if n not in saved and n not in skip]:
            del current[name]  # a hook made it since construction; it was absent when the state was saved
        for name, node in saved.items():
            current[name] = self.value(node, current.get(name), f"{path}.{name}")

    def value(self, node: Any, current: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            return node.to(current.device, copy=True) if isinstance(current, Tensor) else node.clone()
        if isinstance(node, list):
            return _refill(current, list, [self.value(v, None, path) for v in node])
        if not isinstance(node, dict):
            return node
        tag = next(iter(node)) if len(node) == 1 else ""
        if not tag.startswith("$"):
            return self.mapping(dict, list(node.items()), current, path)
        content = node[tag]
        try:
            return self.tagged(tag, content, current, path)
        except (RunError, torch.OutOfMemoryError):
            raise
        except _WRONG_FORM as error:  # of a description that to_plain never gives
            raise ValueError(f"{path}: {tag} holds something else: {type(error).__name__} {error}") from error

    def tagged(self, tag: str, content: Any, current: Any, path: str) -> Any:
        """What stands in a dict with a single key that starts with ``$``."""
        if tag == "$on":
            there = current.device if isinstance(current, Tensor) else self.device or content[0]
            return content[1].to(there, copy=True)
        if tag == "$device" and self.device is not None:
            saved = torch.device(content)
            return current if isinstance(current, torch.device) else saved if saved.type == "cpu" else self.device
        if tag == "$parameter":
            data = self.value(content["data"], None, path)
            data = data if self.device is None else data.to(self.device)  # it lies where the parameter lies
            return ParamData(content["name"], init_tensor=data, device=data.device)
        if tag in _MAPPINGS.values():
            kind = next(k for k, t in _MAPPINGS.items() if t == tag)
            return self.mapping(kind, [(self.value(k, None, path), v) for k, v in content], current, path)
        if tag == "$known":
            if content not in self.known:
                raise ValueError(f"{path}: saved as a reference to {content!r}, which is not there")
            return self.known[content]
        if tag == "$deque":
            values = [self.value(v, None, path) for v in content[1]]
            return _refill(current, deque, values) if type(current) is deque else deque(values, content[0])
        if tag == "$set":
            return _refill(current, set, {self.value(v, None, path) for v in content})
        if tag in _DECODE:
            return _DECODE[tag](self.value(content, None, path))
        return self.nested(tag, content, current, path)

    def mapping(self, kind: type, pairs: list[tuple[Any, Any]], current: Any, path: str) -> Any:
        if kind is defaultdict and type(current) is not defaultdict:
            return self.missing("defaultdict", path)
        into: Any = current if type(current) is kind else kind()
        factory = into.default_factory if isinstance(into, defaultdict) else None
        old = dict(into)
        into.clear()
        for key, node in pairs:
            present = old.get(key)
            if present is None and factory is not None:
                present = factory()
            into[key] = self.value(node, present, f"{path}[{key!r}]")
        return into

    def nested(self, tag: str, content: Any, current: Any, path: str) -> Any:
        if current is None:
            return self.missing(tag[1:], path)
        if tag == "$setting":
            if not isinstance(current, _SETTINGS) or _setting(current) != content:
                raise ValueError(f"{path}: saved as {content}, now {current!r}; equal settings are needed")
        elif tag == "$object":
            self.object(current, content, path)
        elif tag == "$state":
            current.load_state_dict(self.value(content, None, path))
        elif tag == "$generator":
            current.set_state(content.cpu())
        elif tag == "$elapsed":
            # a clock can't be carried to another process; the time that has passed can
            now = time.perf_counter()
            current._init_time = None if content is None else now - content
            current._prev_time = None if content is None else now
        else:
            raise ValueError(f"{path}: unknown tag {tag!r}; it was saved by another version")
        return current

    def missing(self, what: str, path: str) -> None:
        if self.strict:
            raise TypeError(f"{path}: the saved {what} has no counterpart in the object that it is loaded into")


def has_state_dict(obj: Any) -> bool:
    """Whether an object saves itself by ``state_dict``/``load_state_dict``; modules and optimizers don't count."""
    return (
        not isinstance(obj, (nn.Module, torch.optim.Optimizer))
        and callable(getattr(obj, "state_dict", None))
        and callable(getattr(obj, "load_state_dict", None))
    )


def _in_order(values: Any) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


def _setting(value: Any) -> str:
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__qualname__} {value!r}"


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1) for t in (first, second))
    return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _refill(current: Any, kind: type, values: Any) -> Any:
    into: Any = current if type(current) is kind else None
    if into is None:
        return values
    into.clear()
    (into.update if kind is set else into.extend)(values)
    return into


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no type {name!r}")
    return found


def _picture(mode: str, size: tuple[int, int], data: bytes) -> Image.Image:
    if size[0] * size[1] > 8 * len(data):  # before room is made for it
        raise ValueError(f"{len(data)} bytes for {size[0]} x {size[1]} pixels")
    return Image.frombytes(mode, size, data)


_LEAVES: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda v: torch.frombuffer(bytearray(v), dtype=torch.uint8) if v else torch.empty(0)),
    torch.Size: ("$size", list),
    torch.device: ("$device", str),
    torch.dtype: ("$dtype", lambda v: str(v).removeprefix("torch.")),
    type(Path()): ("$path", str),
    AlternativeValues: ("$alternatives", lambda v: list(v.alternatives)),
    TensorImage: ("$image", lambda v: v.image),
    Image.Image: ("$picture", lambda v: {"mode": v.mode, "size": list(v.size), "data": v.tobytes()}),
    ParamData: ("$parameter", lambda v: {"name": v.name, "data": v.data}),
}
_DECODE: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": tuple,
    "$frozenset": frozenset,
    "$bytes": lambda v: v.to(torch.uint8).numpy().tobytes(),
    "$size": torch.Size,
    "$device": torch.device,
    "$dtype": lambda v: _dtype(v),
    "$path": Path,
    "$alternatives": lambda v: AlternativeValues(*v),
    "$image": TensorImage,
    "$picture": lambda v: _picture(v["mode"], tuple(v["size"]), v["data"]),
    "$ndarray": lambda v: v.numpy(),
    "$scalar": lambda v: v.numpy()[()],
}

__all__ = [
    "class_name",
    "differing_state",
    "from_plain",
    "has_state_dict",
    "load_plain_state",
    "plain_state",
    "to_plain",
]
