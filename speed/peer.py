"""The public SLCA code as a contestant: what ``--peer PATH`` accepts, and contestants in processes of their own.

PATH is a clone that the user made and trusts, for its code is executed:

    git clone https://github.com/GengDavid/SLCA

Nothing of it is part of this project. ``peer_slca.py`` runs it in a process of its own with the clone first on the
import path, on our data, backbone and weights; what it does there to make old code run today stands in that file.
Every other contestant gets a fresh process as well, so that none inherits another one's memory, caches or threads.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "DRIVER",
    "MEASURED_COMMIT",
    "REPOSITORY",
    "ContestantError",
    "PeerError",
    "check_equal_tasks",
    "check_peer",
    "peer_commit",
    "run_contestant",
    "within_one_deviation",
]

REPOSITORY = "https://github.com/GengDavid/SLCA"
MEASURED_COMMIT = "169d4e6b91e3ca30caa717200c1944981c4426d1"  # the one that the driver was written for
DRIVER = Path(__file__).with_name("peer_slca.py")

# What the driver calls or replaces, file by file.
_NEEDED: dict[str, tuple[str, ...]] = {
    "trainer.py": ("_train", "_set_device"),
    "models/base.py": ("BaseLearner", "_compute_accuracy", "_compute_class_mean", "eval_task"),
    "models/slca.py": ("SLCA", "_stage1_training", "_stage2_compact_classifier"),
    "utils/data.py": (),
    "utils/data_manager.py": ("DataManager", "_get_idata"),
    "utils/factory.py": ("get_model",),
    "utils/inc_net.py": ("get_convnet",),
    "utils/toolkit.py": ("accuracy",),
    "convs/linears.py": ("SimpleContinualLinear",),
}
_TAIL = 15  # lines of a contestant's output in an error


class PeerError(ValueError):
    """The path is no clone of the public code, or the setting is one that it can't run."""


class ContestantError(RuntimeError):
    """A contestant's process failed; the message ends with its last lines."""


def check_peer(path: str | Path) -> Path:
    """The clone at `path`, looked at and not executed.

    Args:
        path: folder of the clone.

    Returns:
        The absolute path.

    Raises:
        PeerError: no such folder, or a file or definition that the driver needs is missing; all of them are named.
    """
    folder = Path(path).expanduser().resolve()
    accepted = f"accepted: a clone of {REPOSITORY}"
    if not folder.is_dir():
        raise PeerError(f"--peer {path}: there is no such folder; {accepted}")
    absent = [name for name in _NEEDED if not (folder / name).is_file()]
    if absent:
        raise PeerError(f"--peer {path} lacks {', '.join(absent)}; {accepted}")
    for name, definitions in _NEEDED.items():
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        missing = [d for d in definitions if not re.search(rf"^\s*(?:def|class)\s+{d}\b", text, re.MULTILINE)]
        if missing:
            raise PeerError(
                f"--peer {path}: {name} doesn't define {', '.join(missing)}; {accepted}, commit {MEASURED_COMMIT[:7]}"
            )
    return folder


def peer_commit(folder: Path) -> str | None:
    """Commit of the clone, with ``+changes`` if it has any; None for a copy that isn't a git checkout of its own."""
    if not (folder / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+changes" if status else "")


def check_equal_tasks(classes: int, tasks: int) -> None:
    """Refuse what the public code computes differently: it finds the task of a class by dividing by the task's size.

    Raises:
        PeerError: tasks of different sizes.
    """
    if not 1 <= tasks <= classes or classes % tasks:
        divisors = ", ".join(str(n) for n in range(1, classes + 1) if classes % n == 0)
        raise PeerError(
            f"tasks is {tasks} with {classes} classes; beside the public code accepted: equal tasks, {divisors}"
        )


def run_contestant(script: Path, job: Mapping[str, Any], folder: Path, *, timeout: float = 7200.0) -> dict[str, Any]:
    """Run one contestant in a fresh Python process: ``script --job FILE``.

    Args:
        script: this package's script that knows the contestant.
        job: plain values; ``threads`` and ``contestant`` are read here, the rest is for the script.
        folder: scratch folder of this run alone; made here. Gets ``job.json``, ``output.txt`` and, from the script,
            ``result.json``.
        timeout: seconds after which the process is ended (two hours: our choice).

    Returns:
        What the script wrote to ``result.json``.

    Raises:
        ContestantError: it failed, took too long or wrote no result.
    """
    folder.mkdir(parents=True)
    path, log, result = (folder / name for name in ("job.json", "output.txt", "result.json"))
    path.write_text(json.dumps({**job, "folder": str(folder), "result": str(result)}, indent=1), encoding="utf-8")
    threads = str(job["threads"])
    environment = os.environ | {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written into the user's clone
    }
    try:
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, str(script), "--job", str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                timeout=timeout,
                check=False,
            )
        failure = None if done.returncode == 0 else f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        failure = f"not finished after {timeout:.0f} s"
    if failure is None and not result.is_file():
        failure = "no result"
    if failure is not None:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        raise ContestantError("\n  ".join([f"{job['contestant']}: {failure}; its last lines:", *tail]))
    return dict(json.loads(result.read_text(encoding="utf-8")))


def within_one_deviation(ours: Sequence[float], theirs: Sequence[float]) -> bool | None:
    """Whether two means over seeds differ by at most one standard deviation.

    The deviation is the pooled one of both contestants over their seeds (n - 1 in the denominator), since each mean
    varies with the class order. None with fewer than two seeds.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    deviation = ((statistics.variance(ours) + statistics.variance(theirs)) / 2) ** 0.5
    return bool(abs(statistics.fmean(ours) - statistics.fmean(theirs)) <= deviation)
