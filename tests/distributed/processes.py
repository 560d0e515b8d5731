"""Starts programs under ``torchrun`` for the tests, and checks how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parent / "distributed_cases.py"
LIMIT = 600.0


def environment() -> dict[str, str]:
    """Of a program that finds the package where this process has it."""
    import avalanche_firn.plugins

    package = Path(avalanche_firn.plugins.__file__).absolute().parents[1]
    path = [str(package.parent)] if package.name == "avalanche_firn" else []
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    before = [kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else []
    more = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg"}
    return {**kept, **more, **({"PYTHONPATH": os.pathsep.join(path + before)} if path + before else {})}


def free_port() -> int:
    """A port of this computer that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(*words: str | Path, processes: int = 2, program: Path = CASES) -> subprocess.Popen[str]:
    """Start a program, with ``processes`` 1 without ``torchrun``."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}"]
    return subprocess.Popen(
        [*start, str(program), *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(program: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str, str]:
    """Status, standard output and errors of a program that must end in time; nothing of it is left."""
    try:
        out, err = program.communicate(timeout=limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return program.returncode, out, err


def call(*words: str | Path, processes: int = 2, program: Path = CASES) -> tuple[int, str, str]:
    """Start a program and wait for its end."""
    return ended(launch(*words, processes=processes, program=program))
