"""The lock that keeps two processes out of one folder: a file ``lock`` in it, held by the system for a process.

The lock ends with the process, also with one that is killed, so a file that was left behind blocks nobody. It holds the
number of the process for whoever is refused. Closing any handle of that file in the same process gives the lock back
(POSIX), so nothing else may open it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avalanche_firn.plugins.checkpoint_errors import CheckpointError, FolderInUse
from avalanche_firn.plugins.storage_stop import no_link, storage_error, writing

try:
    import fcntl
except ImportError:  # not on Windows: no protection against a second process there
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock_directory", "unlock_directory"]

_OWNERS: dict[Path, tuple[int, weakref.ref[Any], Callable[[], None] | None, int]] = {}
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = tuple(
    getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL") if hasattr(errno, name)
)


def lock_directory(directory: Path, owner: Any, revoke: Callable[[], None] | None) -> None:
    """Take a directory for ``owner``; the lock ends with the process, however it ends.

    A second owner in the same process (a notebook cell that is run again) takes over and ``revoke`` of the first is
    called. POSIX record locks: unlike ``flock`` they don't pass to data loader workers, which outlive a killed parent
    for seconds. Where a file system has no locks (some network ones), a warning says so and nothing is locked.

    :param revoke: None: no other owner in this process may take over while this one lives.
    :raises FolderInUse: another process holds it (the message gives its process id).
    :raises CheckpointError: an owner of this process holds it.
    :raises StorageError: the lock file can't be made, or is a link.
    """
    key = directory.resolve()
    if key in _OWNERS and _OWNERS[key][3] != os.getpid():  # this process was forked: the lock stayed with the parent
        os.close(_OWNERS.pop(key)[0])
    if key in _OWNERS:
        handle, previous, stop, _ = _OWNERS[key]
        if previous() is not None and previous() is not owner:
            if stop is None:
                raise CheckpointError(f"{directory} is in use by this process (id {os.getpid()}) already")
            stop()
    else:
        handle = _locked(key, directory)
        with contextlib.suppress(OSError):  # on a full disk there is no room for the number; the lock holds without it
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
    _OWNERS[key] = (handle, weakref.ref(owner), revoke, os.getpid())


def _locked(key: Path, directory: Path) -> int:
    """A handle of the lock file, which this process has locked."""
    while True:
        with writing("the lock of a run", key / "lock"):
            handle = no_link(key / "lock", os.O_RDWR | os.O_CREAT)
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                text = (
                    f"{directory} can't be locked ({error.strerror}): its file system has no locks, so a second "
                    "process that uses the same folder would not be noticed; start one only, or use a local disk"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=4)
                return handle
            holder = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in _HELD:
                raise storage_error(error, "the lock of a run", key / "lock") from error
            raise FolderInUse(f"{directory} is in use by another process (id {holder or 'unknown'})") from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(key / "lock")):
                return handle
        os.close(handle)  # its holder has deleted it meanwhile: what is locked is no longer the lock of the folder


def unlock_directory(directory: Path, owner: Any, *, delete: bool = False) -> None:
    """Give a directory back, if ``owner`` holds it.

    :param delete: delete the lock file, too.
    """
    key = directory.resolve()
    if key in _OWNERS and _OWNERS[key][1]() is owner:
        if delete:
            with contextlib.suppress(OSError):
                (key / "lock").unlink()  # before it is given back: nobody else's lock is deleted
        os.close(_OWNERS.pop(key)[0])
