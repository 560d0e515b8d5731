"""What a Ray cluster executes of a comparison: the check of a machine, and the runs. Plain values go in and out.

A run is done by the same functions as in a local comparison, in a process of its own. Its folder is locked while it is
worked on. A process that is thought dead and still lives holds that lock, so its successor waits for it, and gives up
after :data:`PATIENCE`; where the lock can't reach other machines, no successor is started (see
:mod:`~avalanche_firn.experiments.ray_cluster`). Nothing at the top of this module imports torch: which threads and GPUs
it may use is decided before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE", "TOKEN", "Mailbox", "check_machine", "prepare", "train", "versions"]

PATIENCE = 180.0
"""Seconds to wait for the lock of a run: twice the 90 s after which NFS 4 takes a lock from a dead machine."""
TOKEN = "token"
"""File in the folder of a check that says whose check it is."""
_PACKAGES = ("avalanche-firn", "avalanche-lib", "torch", "torchvision", "timm", "numpy", "scikit-learn")
_PAUSE = 1.0
_FLUSH = 30.0  # seconds to wait for the last letter; only lines of progress would be lost


class Mailbox:
    """Takes letters from the runs until somebody fetches them. It lives beside whoever waits for the runs."""

    def __init__(self) -> None:
        self._letters: list[tuple[int, int, str, dict[str, Any]]] = []

    def put(self, run: int, attempt: int, kind: str, facts: dict[str, Any]) -> None:
        """`run` and `attempt`: who writes. `kind` and `facts`: what happened."""
        self._letters.append((run, attempt, kind, facts))

    def take(self) -> list[tuple[int, int, str, dict[str, Any]]]:
        """All letters since the last call, in the order in which they came."""
        letters, self._letters = self._letters, []
        return letters


def check_machine(check: str, token: str, directory: str, patience: float = 30.0) -> dict[str, Any]:
    """What a machine sees of the shared folder.

    Args:
        check: a new folder with the file :data:`TOKEN` and a lock that another process holds.
        token: content of that file.
        directory: that relative paths begin from.
        patience: seconds to wait for the file: a network file system may show it late.

    Returns:
        `sees`: the file; `locks`: whether the lock was refused, as it must be; `directory`: whether there is one;
        `packages`: version by name.
    """
    end = time.monotonic() + patience
    while not (sees := _reads(Path(check, TOKEN), token)) and time.monotonic() < end:
        time.sleep(0.2)
    return {
        "sees": sees,
        "locks": sees and _refuses(Path(check)),
        "directory": Path(directory).is_dir(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides results, by name; "" for what isn't installed. Imports none of it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _reads(file: Path, token: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == token
    except OSError:
        return False


def _refuses(check: Path) -> bool:
    """Whether a folder that another process has locked can't be locked from here, as folder_lock would do it."""
    from avalanche_firn.experiments.run_folders import LOCK

    try:
        import fcntl

        handle = os.open(check / LOCK, os.O_RDWR)
    except (ImportError, OSError):
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(handle)
    return False


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Load what the runs need, once, on one machine, as a local comparison does before its first run.

    Returns:
        `problems`: of the configuration there, each with path, reason, accepted and hint; else `failed`, see
        :func:`train`, or nothing.
    """
    from avalanche_firn.experiments.errors import ConfigError

    try:
        config = _settle(job)
        with _once_here(job["token"]):
            _load(config)
    except ConfigError as error:
        return {"problems": [vars(problem) for problem in error.problems]}
    except Exception as error:
        return _failed(error)
    return {}


def train(job: dict[str, Any], run: int, attempt: int, mailbox: Any) -> dict[str, Any]:
    """Do a run, or go on with it from its last checkpoint; a finished one is only read.

    Args:
        job: `config` and `running` (plain values of the configurations), `folder`, `check`, `token`, `directory`,
            `threads` (of torch, where the configuration doesn't say), `gpu` (whether it has one).
        run, attempt: which run, and the how manieth time.
        mailbox: the handle of a :class:`Mailbox`.

    Returns:
        `results`, or `failed`: text and trace of the error. Ray is told of no error, so that it can take none for the
        end of a machine.
    """
    letters = _Letters(run, attempt, mailbox)
    try:
        config = _settle(job)
        folder = Path(job["folder"])
        with _once_here(job["token"]) as first:
            if first:
                _load(config)
        letters.put("started", resumed=(folder / "checkpoint").is_dir())
        return {"results": dict(_with_patience(lambda: _run(job, config, folder, letters)))}
    except Exception as error:
        return _failed(error)
    finally:
        letters.flush()


class _Letters:
    """Writes to the mailbox without waiting for it."""

    def __init__(self, run: int, attempt: int, mailbox: Any) -> None:
        self._who, self._mailbox, self._last = (run, attempt), mailbox, None

    def put(self, kind: str, **facts: Any) -> None:
        self._last = self._mailbox.put.remote(*self._who, kind, facts)

    def flush(self) -> None:
        """Wait until the last one has arrived: this process ends soon."""
        import ray

        if self._last is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # the mailbox is gone: nobody listens
                ray.get(self._last, timeout=_FLUSH)


def _settle(job: dict[str, Any]) -> Any:
    """Take the place that the run has in a local comparison; its configuration."""
    from avalanche_firn.experiments.errors import ConfigError

    if not _reads(Path(job["check"], TOKEN), job["token"]):
        raise ConfigError(f"this machine doesn't see the folder of the comparison, {Path(job['check']).parent}")
    try:
        os.chdir(job["directory"])
    except OSError as error:
        raise ConfigError(f"this machine has no folder {job['directory']}: {error.strerror}") from None
    if not job["gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: `auto` is the CPU in a task without a GPU
    import warnings

    import torch

    for message in ("no QP solver found", "Importing from timm.models", "Call to deprecated function"):
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(job["threads"])  # a recipe that says how many sets them again
    return _configuration(job["running"] or job["config"])


def _configuration(raw: dict[str, Any]) -> Any:
    from avalanche_firn.experiments.config import validate
    from avalanche_firn.experiments.transfer_config import is_transfer, validate_transfer

    return validate_transfer(raw) if is_transfer(raw) else validate(raw)


def _load(config: Any) -> None:
    from avalanche_firn.experiments.transfer_config import TransferExperiment

    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_comparison import prepare_transfers

        prepare_transfers(config)
    else:
        from avalanche_firn.experiments.resources import prepare as prepare_stream

        prepare_stream(config)


@contextlib.contextmanager
def _once_here(token: str) -> Iterator[bool]:
    """Whether this is the first run of a comparison on this machine; the others wait until it has loaded its data.

    Data sets are fetched and unpacked by whoever comes first, and not all of the libraries that do so expect company.
    """
    import tempfile

    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    file, own = Path(tempfile.gettempdir(), f"avalanche-firn-{user}.prepared"), token.encode()
    try:
        import fcntl

        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except (ImportError, OSError):  # then every run loads by itself first
        yield True
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        first = os.pread(handle, 100, 0) != own
        yield first
        if first:
            os.ftruncate(handle, 0)
            os.pwrite(handle, own, 0)
    finally:
        os.close(handle)


def _with_patience(work: Callable[[], Any]) -> Any:
    """`work`, tried again while another process holds the folder, which may be a predecessor that is dying."""
    from avalanche_firn.plugins.checkpoint_errors import FolderInUse

    end = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except FolderInUse:
            if time.monotonic() > end:
                raise
            time.sleep(_PAUSE)


def _run(job: dict[str, Any], config: Any, folder: Path, letters: _Letters) -> dict[str, Any]:
    from avalanche_firn.experiments.ray_watch import far_watch
    from avalanche_firn.experiments.transfer_config import TransferExperiment

    own = _configuration(job["config"])
    running = None if job["running"] is None else config
    watch = far_watch(own, folder, letters.put)
    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_data import build_data
        from avalanche_firn.experiments.transfer_run import run as run_transfer

        return run_transfer(own, folder, build_data(config.data), watch=watch, running=running)
    from avalanche_firn.experiments.runner import run

    return run(own, folder, quiet=True, watch=watch, running=running)


def _failed(error: Exception) -> dict[str, Any]:
    """What to tell of an error; those of the code with their trace."""
    from avalanche_firn.experiments.errors import ConfigError
    from avalanche_firn.plugins.checkpoint_errors import CheckpointError
    from avalanche_firn.plugins.run_errors import RunError

    explained = isinstance(error, (ConfigError, CheckpointError, RunError))
    text = str(error) if explained else f"{type(error).__name__}: {error}"
    return {"failed": {"text": text, "trace": "" if explained else "".join(traceback.format_exception(error))}}
