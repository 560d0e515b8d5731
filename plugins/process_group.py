"""Start and end of the processes of a distributed run, as ``torchrun`` makes them.

    torchrun --nproc-per-node=2 script.py

Every process runs the whole script. :func:`start_processes` joins them and says which device is this process's own;
without ``torchrun`` it does nothing, so one script serves both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from avalanche_firn.models.processes import process_count, process_rank
from avalanche_firn.plugins.run_errors import ProcessLostError

__all__ = [
    "end_processes",
    "first_process_first",
    "lost_process",
    "processes_wanted",
    "start_processes",
    "wait_for_all",
]


def processes_wanted() -> int:
    """Number of processes that ``torchrun`` has started (its ``WORLD_SIZE``); 1 without it.

    :raises ValueError: the variable isn't a whole number above 0.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE is {text!r}; a whole number, 1 or above, as torchrun sets it, is accepted")
    return int(text)


def start_processes(device: str = "auto", *, timeout: float = 1800.0) -> torch.device:
    """Join the processes of ``torchrun``, and name the device of this one.

    :param device: ``"auto"``: the CUDA device of the process's number on its machine, the CPU where there is none;
        ``"cuda"``: the same, and an error without one; ``"cpu"``.
    :param timeout: seconds that a process waits for the others before the run ends with an error (1800: our choice,
        the time that one of them may take to decode a data set).
    :returns: the device. NCCL connects processes on GPUs, gloo those on CPUs.
    :raises ValueError: another name of a device; more processes on this machine than CUDA devices.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; 'auto', 'cpu' or 'cuda' is accepted: each process has its own")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise ValueError(f"device is 'cuda', and torch {torch.__version__} sees no CUDA device here; 'cpu' is accepted")
    kind = "cuda" if count and device != "cpu" else "cpu"
    if processes_wanted() == 1:
        return torch.device(kind)
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= count:
            raise ValueError(
                f"process {local} of this machine has no CUDA device of its own: there are {count}; "
                f"--nproc-per-node={count} is accepted, or device 'cpu'"
            )
        torch.cuda.set_device(local)
        own = torch.device("cuda", local)
    else:
        own = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return own


def end_processes() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here; nothing in a single one."""
    if process_count() > 1:
        dist.barrier()


def lost_process(error: BaseException) -> ProcessLostError | None:
    """What to tell of an exchange that failed since another process is gone; None for other errors."""
    if process_count() == 1 or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
        return None
    reason = str(error).strip().splitlines()[0]
    return ProcessLostError(
        f"process {process_rank()} of {process_count()} has lost another one ({reason}); torchrun names the one that "
        "failed first. The last checkpoint is kept"
    )


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through the block before the others do: for downloads, and files that are made once."""
    if process_rank() != 0:
        wait_for_all()
    try:
        yield
    finally:
        if process_rank() == 0:
            wait_for_all()
