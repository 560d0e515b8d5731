"""Peak memory of a call: on a GPU torch's own peak, on a CPU in a fresh process.

On a CPU it is by how much the resident memory of the process rises at its highest: ``VmHWM`` after setting the mark
back (``/proc/self/clear_refs``), less what was resident before. Linux only; None elsewhere.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from speed.rows import ROOT

__all__ = ["MemoryMark", "in_fresh_process", "peak_memory", "synchronise"]


def synchronise(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class MemoryMark:
    """Peak memory between two moments of this process.

    On a GPU the absolute peak of torch's allocator, so the weights count; on a CPU the rise of the resident memory
    above what it was at the first moment, which only a fresh process makes meaningful.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._before: float | None = None

    def start(self) -> None:
        """The first moment."""
        if self.device.type == "cuda":
            torch.cuda.init()  # a process that has not used the GPU yet has nothing to reset
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = _kibibytes("VmRSS")
        except (OSError, StopIteration):  # another system, or a kernel that doesn't allow it
            self._before = None

    def stop(self) -> float | None:
        """MiB; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return None if self._before is None else max(_kibibytes("VmHWM") - self._before, 0.0) / 1024


def _kibibytes(name: str) -> float:
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(row.split()[1]) for row in rows if row.startswith(name + ":"))


def in_fresh_process(target: str, /, **options: Any) -> Any:
    """Call a function in a new process, with this one's number of threads.

    Args:
        target: "module:function".
        options: arguments and result are what JSON can hold.

    Raises:
        RuntimeError: the process failed; the message ends with its last lines.
    """
    code = "from speed.memory import _child; _child()"
    # glibc gives freed blocks back at once, so that what came before hides nothing
    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, "-c", code, target, json.dumps(options), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        env={**os.environ, **small, "PYTHONPATH": path},
    )
    if ran.returncode:
        raise RuntimeError(f"{target} failed in a process of its own:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _child() -> None:
    target, options, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    module, name = target.split(":")
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(**json.loads(options))))


def peak_memory(target: str, /, device: torch.device | str = "cpu", **options: Any) -> float | None:
    """Peak memory of one call, MiB: on a CPU in a fresh process, on a GPU in this one.

    Args:
        target: "module:function"; it gets `options` and returns the callable to measure, which runs once before.
        device: where the call computes.
    """
    if torch.device(device).type != "cuda":
        measured: float | None = in_fresh_process("speed.memory:memory_of", target=target, options=options)
        return measured
    return memory_of(target, options, device)


def memory_of(target: str, options: dict[str, Any], device: torch.device | str = "cpu") -> float | None:
    """The same in this process."""
    module, name = target.split(":")
    call = getattr(importlib.import_module(module), name)(**options)
    call()
    synchronise(device)
    mark = MemoryMark(device)
    mark.start()
    call()
    synchronise(device)
    return mark.stop()
