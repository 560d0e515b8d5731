"""What is inside the two files of a checkpoint, read without trust: sums that were made anew prove nothing.

Beside the state stand its form (a hash of all names, texts, types and lengths: of everything but numbers) and the types
and shapes of the tensors. JSON that no writer of this package makes, a state that hasn't that form, tensors that it
doesn't speak of or describes otherwise are refused with the file named, before anything of a run is touched. Other
numbers can't be told from those of another run: they are loaded as they stand there. Nothing is unpickled, and whoever
makes the form anew too can only bring a strategy to another state. Checkpoints of versions before have neither.
Cost: two passes over the JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from avalanche_firn.plugins.checkpoint_errors import CheckpointError

__all__ = [
    "check_form",
    "check_run_state",
    "describe_tensors",
    "form_of",
    "load_tensors",
    "read_json",
    "references",
    "unflatten",
]

_DEPTH = 200  # lists and dicts, one inside the other; ours have some tens
_ONE_TENSOR = ("$tensor", "$numbers")
_VALUES = (
    (re.compile(r"(?<=[\[:,])-?[0-9]+(\.[0-9]+([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)(?=[,\]}])"), "0.0"),
    (re.compile(r"(?<=[\[:,])-?[0-9]+(?=[,\]}])"), "0"),
    (re.compile(r"(?<=[\[:,])(true|false)(?=[,\]}])"), "true"),
)


def describe_tensors(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Type and shape of every tensor, as plain values for the JSON: ``name -> ["float32", 3, 4]``."""
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}


def form_of(text: str) -> str:
    """SHA-256 of a JSON text without spaces in which every number stands for its type alone."""
    for pattern, kind in _VALUES:
        text = pattern.sub(kind, text)
    return hashlib.sha256(text.encode()).hexdigest()


def check_form(file: Path, content: dict[str, Any]) -> None:
    """Whether the state of a ``state.json`` has the form that stands beside it.

    :raises CheckpointError: it hasn't.
    """
    if "form" in content and content["form"] != form_of(json.dumps(content.get("state"), separators=(",", ":"))):
        raise CheckpointError(f"{file} holds a state of another form than the one that was saved")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a ``state.json``: an object of plain, finite values, no key twice.

    :raises CheckpointError: it is something else.
    """

    def constant(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no finite number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; an object is needed")
    return content


def load_tensors(file: Path, described: Any, named: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a ``tensors.safetensors``, on the CPU.

    :param described: what :func:`describe_tensors` gave when they were written; None in checkpoints of versions before.
    :param named: those that the JSON refers to.
    :raises CheckpointError: not in that format; others, more or fewer tensors than described and named.
    """
    try:
        tensors = load_file(file)
    except Exception as error:  # the library has errors of its own, and lets those of torch through
        raise CheckpointError(f"{file} can't be read: {error}") from error
    wanted = set(named)
    if wanted != tensors.keys():
        missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        told = f"has no tensor {missing[0]!r}" if missing else f"has {extra[0]!r}, of which state.json says nothing"
        raise CheckpointError(f"{file} {told}; the two don't belong together")
    if described is not None:
        found = describe_tensors(tensors)
        known = described if isinstance(described, dict) else {}
        wrong = next((name for name in {**known, **found} if known.get(name) != found.get(name)), None)
        if wrong is not None:
            text = (
                f"tensor {wrong!r} is {found.get(wrong, 'missing')}, and state.json says {known.get(wrong, 'nothing')}"
            )
            raise CheckpointError(f"{file}: {text}")
    return tensors


def references(tree: Any) -> set[str]:
    """Names of the tensors that a tree refers to.

    :raises ValueError: a reference without a name, or too many levels.
    """
    found: set[str] = set()
    level: list[Any] = [tree]
    for _ in range(_DEPTH):
        level = [part for node in level for part in _below(node, found)]
        if not level:
            return found
    raise ValueError(f"more than {_DEPTH} levels, one inside the other")


def _below(node: Any, found: set[str]) -> Iterable[Any]:
    """The parts of a node; of a reference the name is noted."""
    if isinstance(node, list):
        return node
    if not isinstance(node, dict):
        return ()
    name = next((node[key] for key in _ONE_TENSOR if key in node), None)
    if name is None and not any(key in node for key in _ONE_TENSOR):
        return node.values()
    if len(node) != 1 or not isinstance(name, str):
        raise ValueError("a reference to a tensor has no name, or stands beside other things")
    found.add(name)
    return ()


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The description that :func:`~avalanche_firn.plugins.checkpoint_files.flatten` split.

    :raises ValueError: numbers that aren't a list of them. :raises KeyError: a tensor isn't there.
    """
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$numbers" in tree:
        numbers = tensors[tree["$numbers"]]
        if numbers.ndim != 1 or str(numbers.dtype) not in ("torch.float64", "torch.int64"):
            raise ValueError(f"{tree['$numbers']!r} isn't a list of numbers")
        return numbers.tolist()
    return {k: unflatten(v, tensors) for k, v in tree.items()}


# ------------------------------------------------------------- the state of a run
def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(text) is str for text in value.values())


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in ("start", "inside", "end"),
    "experience": _maybe(_whole),
    "samples": _maybe(_whole),
    "epoch": _maybe(_whole),
    "train_epochs": _maybe(_whole),
    "fingerprint": _maybe(_is(str)),
    "structure": lambda value: isinstance(value, dict) and _texts(value.get("parameters")),
    "environment": _texts,
    "append_only": lambda value: isinstance(value, dict) and all(map(_whole, value.values())),
    "rebuilt": _is(bool),
    "loader": _maybe(_is(dict)),
    "random": _is(dict),
    "strategy": _is(dict),
}
_STRATEGY: dict[str, Callable[[Any], bool]] = {
    "model": _is(dict),
    "criterion": _maybe(_is(dict)),
    "optimizer": _is(dict),
    "plugins": lambda value: isinstance(value, list) and all(map(_is(dict), value)),
    "evaluator": _is(dict),
    "attributes": _is(dict),
    "periodic": _is(list),
    "clock": lambda value: isinstance(value, dict) and all(map(_whole, value.values())),
    "loss": lambda value: isinstance(value, (Tensor, dict)),
}
_CLOCK = ("train_iterations", "train_exp_counter", "train_exp_epochs", "train_exp_iterations", "train_epoch_iterations")


def check_run_state(state: dict[str, Any]) -> None:
    """Whether a state has the form that ``ExactCheckpointPlugin`` gives it; plain states of others pass.

    :raises ValueError: it has some of its fields and not all, or a field of another form.
    """
    if not state.keys() & _FIELDS.keys():
        return
    _check_fields(state, _FIELDS, "")
    strategy, kind = state["strategy"], state["kind"]
    _check_fields(strategy, _STRATEGY, "strategy/")
    clock = strategy["clock"]
    missing = [name for name in _CLOCK if name not in clock]
    if missing:
        raise ValueError(f"strategy/clock has no {missing[0]}")
    inside = kind == "inside"
    for name in ("epoch", "train_epochs", "loader"):
        if (state[name] is not None) is not inside:
            raise ValueError(f"{name} is {'missing' if inside else 'set'} in a checkpoint of kind {kind}")
    if (state["experience"] is None) is not (kind == "start") or (kind == "end" and clock["train_exp_counter"] < 1):
        raise ValueError(
            f"kind {kind} with experience {state['experience']}, {clock['train_exp_counter']} of them done"
        )
    if inside and state["epoch"] >= max(state["train_epochs"], 1):
        raise ValueError(f"epoch {state['epoch']} of {state['train_epochs']}")


def _check_fields(state: dict[str, Any], fields: dict[str, Callable[[Any], bool]], place: str) -> None:
    for name, good in fields.items():
        if name not in state:
            raise ValueError(f"{place}{name} is missing")
        if not good(state[name]):
            text = repr(state[name])
            raise ValueError(f"{place}{name} has another form: {text if len(text) < 60 else f'{text[:57]}...'}")
