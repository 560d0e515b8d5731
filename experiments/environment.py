"""What a run ran on: package versions, commit, device, threads; and the seeds of all global generators."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.models.processes import process_count

__all__ = [
    "describe_environment",
    "git_commit",
    "own_device",
    "package_versions",
    "processes_of",
    "resolve_device",
    "seed_everything",
    "use_deterministic",
]

_PACKAGES = (
    "avalanche-firn", "avalanche-lib", "torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors",
    "tensorboard", "pydantic", "pyyaml",
)  # fmt: skip


def resolve_device(name: str) -> torch.device:
    """The device that a configuration asks for; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: a CUDA device was asked for and isn't there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"torch {torch.__version__} sees {count} CUDA devices here"
        raise ConfigError(Problem("device", f"{name!r} isn't available: {have}", "auto, cpu" + ", cuda" * bool(count)))
    return device


def own_device(device: torch.device) -> torch.device:
    """The device of this process: in a distributed run on GPUs the one that it has taken, else the one given."""
    if process_count() == 1 or device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device())


def processes_of(environment: dict[str, Any]) -> list[int]:
    """Numbers of processes that a run had, in the order in which it had them, from its ``environment.json``."""
    found = [part.get("device", {}).get("processes", 1) for part in (environment, *environment.get("resumed_in", []))]
    return [count for index, count in enumerate(found) if index == 0 or count != found[index - 1]]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and CUDA), and ask cuDNN for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def use_deterministic(wanted: bool) -> None:
    """Let torch use deterministic algorithms only, or its own choice again (which :func:`seed_everything` narrows).

    With them an operation that has no deterministic form on its device raises ``RuntimeError``. cuBLAS needs a fixed
    workspace, which is asked for here unless the environment says otherwise: before the first product on a GPU.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide a result; None for one that isn't installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout this package runs from, with ``+changes`` if it has any; None outside a checkout."""
    root = folder if folder is not None else Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Day (UTC), Python, platform, versions, commit, device and threads, as plain values for ``environment.json``."""
    hardware: dict[str, Any] = {"type": device.type, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if process_count() > 1:
        hardware["processes"] = process_count()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "name": properties.name,
            "memory_MiB": properties.total_memory // 2**20,
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "git_commit": git_commit(),
        "device": hardware,
    }
