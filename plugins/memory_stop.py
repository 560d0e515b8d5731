"""No memory left, in words: where the run stood and on which device. What helps in a run, its settings say.

An error of memory comes in many classes: torch's on CUDA, plain ``RuntimeError`` on CPU and MPS and from cuBLAS and
cuDNN, ``MemoryError`` of Python and NumPy, ``ENOMEM`` of the system, and each of them wrapped by a loader's worker.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import torch

from avalanche_firn.plugins.run_errors import OutOfMemoryStop, RunError
from avalanche_firn.plugins.stop_places import chain, place_of

__all__ = ["device_text", "is_out_of_memory", "out_of_memory"]

_CLASSES = (MemoryError, *(c for c in [getattr(torch, "OutOfMemoryError", None), torch.cuda.OutOfMemoryError] if c))
_WORDS = (
    "out of memory",  # CUDA, MPS ("MPS backend out of memory"), XPU
    "can't allocate memory",  # DefaultCPUAllocator
    "cannot allocate memory",  # mmap, fork
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
    "_ALLOCATION_FAILED",  # cuDNN 9, which says of what
    "MemoryError in DataLoader worker",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is no memory left."""
    for link in chain(error):
        if isinstance(link, RunError):
            return isinstance(link, OutOfMemoryStop)
        if isinstance(link, _CLASSES) or (isinstance(link, OSError) and link.errno == errno.ENOMEM):
            return True
        if isinstance(link, RuntimeError) and any(words.lower() in str(link).lower() for words in _WORDS):
            return True
    return False


def out_of_memory(error: BaseException, strategy: Any = None, *, device: Any = None, more: str = "") -> OutOfMemoryStop:
    """What to tell of it.

    :param error: the cause. :param strategy: an Avalanche strategy, or None before there is one.
    :param device: where the run computes; None: the strategy's. :param more: text behind it: what helps.
    """
    if device is None:
        device = torch.device("cpu") if strategy is None else strategy.device
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if len(reason) > 240:
        reason = f"{reason[:237]}..."
    text = f"out of memory in {place_of(error, strategy)}, on {device_text(device)}: {reason}"
    return OutOfMemoryStop(f"{text}\n{more}" if more else text)


def device_text(device: Any) -> str:
    """A device with its memory and the peak so far, as far as they are known.

    The peak is that of tensors on CUDA, and of the whole process on a CPU.
    """
    from avalanche_firn.evaluation.efficiency import peak_memory_mib  # evaluation imports plugins elsewhere

    device = torch.device(device)
    facts: list[str] = []
    try:
        if device.type == "cuda":
            facts = [
                torch.cuda.get_device_name(device),
                f"{torch.cuda.get_device_properties(device).total_memory / 2**20:.0f} MiB",
            ]
        elif device.type == "cpu" and sys.platform.startswith("linux"):
            with open("/proc/meminfo", encoding="ascii") as file:
                facts = [f"{int(file.readline().split()[1]) / 2**10:.0f} MiB"]
        peak = peak_memory_mib(device)
    except (OSError, ValueError, IndexError, RuntimeError, AssertionError):
        peak = None
    if peak is not None:
        facts.append(f"peak {peak:.0f} MiB")
    return f"{device} ({', '.join(facts)})" if facts else str(device)
