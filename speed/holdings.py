"""What a process holds at the moment, and what its processor has done: memory, objects, tensors, handles, phases.

For streams that are watched for hours, where a hundred bytes too many in every task count. Memory is known on Linux
with glibc; with ``PYTHONMALLOC=malloc`` Python's objects are part of the heap, and what is in use of it is exact.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

__all__ = ["Phases", "alive", "handles", "memory", "storages"]


_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    """What glibc tells of its heap, see mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def memory() -> dict[str, int | None]:
    """Bytes in use on the heap and resident bytes, after free blocks were given back; None where nobody knows."""
    gc.collect()
    heap = resident = None
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # type: ignore[union-attr]
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = _Mallinfo  # type: ignore[union-attr]
        found = library.mallinfo2()  # type: ignore[union-attr]
        heap = int(found.uordblks + found.hblkhd)
    statm = Path("/proc/self/statm")
    if statm.exists():
        resident = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"heap": heap, "resident": resident}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages behind tensors, by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def alive() -> dict[str, Any]:
    """Objects that the garbage collector knows, tensors among them with the bytes behind them, types of ctypes."""
    found = gc.get_objects()
    behind = storages(thing for thing in found if issubclass(type(thing), Tensor))
    pointers = len(getattr(ctypes, "_pointer_type_cache", ()))  # one is kept for each length of a tensor ever saved
    size = sum(behind.values())
    return {"objects": len(found), "tensors": len(behind), "tensor_bytes": size, "pointer_types": pointers}


def handles() -> dict[str, int]:
    """Open files, threads and child processes."""
    own = Path("/proc/self")
    children = [path.read_text(encoding="ascii").split() for path in own.glob("task/*/children")]
    return {
        "files": len(os.listdir(own / "fd")) if own.exists() else 0,
        "threads": len(os.listdir(own / "task")) if own.exists() else threading.active_count(),
        "children": sum(map(len, children)),
    }


class Phases(SupervisedPlugin, supports_distributed=False):  # type: ignore[call-arg]
    """Seconds of training, statistics, alignment, evaluation and saving in the current task.

    Phases inside others don't count there. Training is the epochs; what is left of a task is "other".
    """

    stateless = True
    affects_results = False

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self._open: list[tuple[str, float]] = []

    def enter(self, phase: str) -> None:
        """A phase begins; the one around it waits."""
        now = time.process_time()
        if self._open:
            around, since = self._open[-1]
            self.seconds[around] += now - since
        self._open.append((phase, now))

    def leave(self) -> None:
        """The innermost phase ends."""
        now = time.process_time()
        phase, since = self._open.pop()
        self.seconds[phase] += now - since
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def around(self, owner: Any, name: str, phase: str) -> None:
        """Count the calls of ``owner.name`` to a phase."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
