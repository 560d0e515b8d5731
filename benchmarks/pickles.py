"""What is done with the pickles of data sets: this package builds nothing from them, others may build plain values.

Unpickling runs whatever code a file names. Two ways around it are here:

- `read_tokens` takes a pickle apart without executing it: lists, dictionaries, numbers and texts are read as what they
  are, and what would be a call becomes a `Call` with a name and arguments. Only the operations that Python 2 wrote for
  CIFAR's files are known; any other is refused.
- `plain_pickles_only` surrounds the loaders of other packages (Avalanche's, torchvision's): whatever they unpickle in
  this thread meanwhile may consist of plain values, which name no code. A name of a class or function ends the loading
  before it is looked up, and torch loads tensors with ``weights_only=True``.

Cost: 1 us a token, 0.1 s for the 70,000 of a CIFAR-10 batch.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_PLAIN = {"BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_lock = threading.RLock()


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; nothing is imported."""

    text: str


@dataclass(eq=False)
class Call:
    """What a pickle would call, with what, and the state that it would set."""

    of: Any
    arguments: Any
    state: Any = None


def read_tokens(content: bytes) -> Any:
    """The values in a pickle of protocol 2, as Python 2 wrote it, with nothing of it executed.

    Args:
        content: of the file. Its texts, which may hold raw bytes, come back as `str` in latin-1.

    Raises:
        ValueError: it is damaged, or has an operation beyond those of plain values, calls and their states.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = max(i for i, value in enumerate(stack) if value is _MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    tokens: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    try:
        for operation, argument, _ in tokens:
            name = operation.name
            if name in _PLAIN:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                _of(list, stack[-1]).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                pairs = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _of(dict, stack[-1]).update(zip(pairs[::2], pairs[1::2], strict=True))
            elif name == "GLOBAL":
                stack.append(Name(argument))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack[-1] = Call(stack[-1], arguments)
            elif name == "BUILD":
                state = stack.pop()
                _of(Call, stack[-1]).state = state
            elif name == "STOP":
                (found,) = stack
                return found
            elif name != "PROTO":
                raise ValueError(f"the operation {name} isn't accepted")
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    raise ValueError("it ends too early")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} is expected")
    return value


class RefusedPickle(pickle.UnpicklingError):
    """A pickle that is more than plain values; the message names the file, where it is known, and the class."""


@contextlib.contextmanager
def plain_pickles_only() -> Iterator[list[str]]:
    """Inside of it, what this thread unpickles may name no class and no function.

    Yields:
        What was refused, in words: loaders may swallow the `RefusedPickle` that is raised there.
    """
    owner, refused = threading.get_ident(), list[str]()
    load, loads, unpickler, torch_load = pickle.load, pickle.loads, pickle.Unpickler, torch.load

    class Plain(unpickler):  # type: ignore[misc, valid-type]
        def __init__(self, file: Any, **options: Any) -> None:
            super().__init__(file, **options)
            self.source = getattr(file, "name", None)

        def find_class(self, module: str, name: str) -> Any:
            if threading.get_ident() != owner:
                return super().find_class(module, name)
            refused.append(f"{self.source or 'a pickle'} names {module}.{name}, which unpickling would look up and run")
            raise RefusedPickle(refused[-1])

    def plain_torch_load(f: Any, *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return torch_load(f, *arguments, **options)
        try:
            return torch_load(f, *arguments, **{"weights_only": True, **options})
        except pickle.UnpicklingError as error:
            known = isinstance(error, RefusedPickle)
            reason = refused.pop() if known else "it holds more than tensors, or is damaged"
            refused.append(f"{f if isinstance(f, (str, os.PathLike)) else getattr(f, 'name', f)}: {reason}")
            raise

    def plain_load(file: Any, **options: Any) -> Any:
        return Plain(file, **options).load()

    def plain_loads(data: Any, /, **options: Any) -> Any:
        return Plain(io.BytesIO(data), **options).load()

    with _lock:
        pickle.load, pickle.loads = plain_load, plain_loads
        pickle.Unpickler, torch.load = Plain, plain_torch_load  # type: ignore[misc]
        try:
            yield refused
        finally:
            pickle.load, pickle.loads = load, loads
            pickle.Unpickler, torch.load = unpickler, torch_load  # type: ignore[misc]


__all__ = ["Call", "Name", "RefusedPickle", "plain_pickles_only", "read_tokens"]
