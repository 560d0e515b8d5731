"""A file of a run that can't be written, in words: which one, why, how much room there is, how to go on.

Checkpoints, settings and results are written under another name and renamed, and what a run appends to is cut back to
its last checkpoint when it goes on: an error leaves what was saved before as it was. safetensors reports the errors of
the system in a class of its own, which is no ``OSError``; it is understood too.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from avalanche_firn.plugins.run_errors import RunError, StorageError
from avalanche_firn.plugins.stop_places import chain

__all__ = ["no_link", "storage_error", "storage_problem", "writing"]

_MOVE = "move the folder to another disk"
_FORBIDDEN = "this user may not write there: change the permissions, or move the folder elsewhere"
_BY_NAME = {
    "ENOSPC": f"make room there, or {_MOVE}",
    "EDQUOT": f"the quota is used up: make room there, or {_MOVE}",
    "EFBIG": "the file system or a limit (ulimit -f) allows no larger file",
    "EROFS": "it is mounted read-only: make it writable, or move the folder elsewhere",
    "EACCES": _FORBIDDEN,
    "EPERM": _FORBIDDEN,
    "EIO": "the disk reports an error: copy the folder to another one",
    "ESTALE": "the network file system has lost the file: mount it again",
    "ENODEV": "the disk is gone: mount it again",
    "EMFILE": "this process has too many open files (ulimit -n)",
    "ENFILE": "this system has too many open files",
    "ELOOP": "it is a link, and a run writes through none, since it may lead to any file: put the file in its place",
}
_HINTS = {getattr(errno, name): hint for name, hint in _BY_NAME.items() if hasattr(errno, name)}  # not all on Windows
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def storage_problem(error: BaseException) -> OSError | None:
    """The error of the system behind an error, if it is one of a disk, a permission or a limit; None else."""
    for link in chain(error):
        found = _system_error(link)
        if found is not None and found.errno in _HINTS:
            return found
    return None


def storage_error(
    error: BaseException, what: str, path: str | os.PathLike[str], *, verb: str = "write"
) -> StorageError:
    """What to tell of a file that can't be written.

    :param error: the cause. :param what: is written, in words: ``a checkpoint``. :param path: of it.
    :param verb: what can't be done with it.
    """
    found = _system_error(error) or storage_problem(error)
    reason = str(error) if found is None else str(found.strerror or found)
    hint = _HINTS.get(found.errno or 0) if found is not None else None
    text = f"can't {verb} {what}, {os.fspath(path)}: {reason}{_room(Path(path))}"
    return StorageError(text + (f"; {hint}" if hint else ""))


@contextmanager
def writing(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system while a file is written become a :class:`StorageError` that names it.

    :param what: is written, in words: ``a checkpoint``. :param path: of it.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError) as error:
        raise storage_error(error, what, path) from error


def no_link(path: str | os.PathLike[str], flags: int) -> int:
    """:func:`os.open` for a file of a run, whose folder may come from a stranger: a link is no file of it.

    :raises OSError: ELOOP, the file is a symbolic link (not noticed on Windows).
    """
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _system_error(error: BaseException) -> OSError | None:
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if isinstance(error, SafetensorError):
        number = _OS_ERROR.search(str(error))
        if number is not None:
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def _room(path: Path) -> str:
    """What is free on the disk of a file, which may not exist."""
    for place in (path, *path.absolute().parents):
        try:
            free = shutil.disk_usage(place).free
        except OSError:
            continue
        nodes = ""
        if hasattr(os, "statvfs"):
            facts = os.statvfs(place)
            nodes = " and no file entry" if facts.f_files and not facts.f_favail else ""
        return f" ({free} bytes are free there{nodes})"
    return ""
