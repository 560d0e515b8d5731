"""TensorBoard's event files in their order, and the thread that writes them, when something is wrong.

TensorBoard reads the event files of a folder in the order of their names, which begin with the second in which they
were made. A run that is resumed makes a new one, and its name has to come after those that are there: also within the
same second, and on a machine whose clock was set back. :func:`after` makes it so.

Events are written by a thread. It ends at the first error, says so with a traceback on standard error, and the next
event or flush in the main thread raises the same error; :func:`quiet_writers` leaves out the traceback.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["abandon", "after", "quiet_writers", "writer_failed"]

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_THREAD = "_AsyncWriterThread"
_WRITER_MODULE = "tensorboard.summary.writer"


@contextlib.contextmanager
def after(files: Iterable[Path]) -> Iterator[None]:
    """Event files that are made inside, by this thread, get names that come after those of ``files``."""
    seconds = [int(m[1]) for path in files if (m := _NAME.match(path.name))]
    try:
        from tensorboard.summary.writer import event_file_writer as module
    except ImportError:  # no TensorBoard, no event files
        yield
        return
    if not seconds or getattr(module, "time", None) is None:
        yield
        return
    first, caller = max(seconds) + 1, threading.get_ident()

    def now() -> float:
        # the writer's own thread goes on by the true time
        return max(time.time(), float(first)) if threading.get_ident() == caller else time.time()

    clock, module.time = module.time, SimpleNamespace(time=now)
    try:
        yield
    finally:
        module.time = clock


@contextlib.contextmanager
def quiet_writers() -> Iterator[None]:
    """Threads that write events end without a traceback when a file can't be written; the main thread hears of it."""
    usual = threading.excepthook

    def hook(facts: Any) -> None:
        if type(facts.thread).__name__ != _THREAD or not isinstance(facts.exc_value, OSError):
            usual(facts)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


def abandon(writer: Any) -> None:
    """Close a ``SummaryWriter`` of a run that broke off; what it can't write any more is left, also at the exit."""
    try:
        writer.close()
    except OSError:  # the disk that ended the run is still full; Avalanche would close the writer again at the exit
        writer.file_writer = writer.all_writers = None


def writer_failed(names: Iterable[str]) -> bool:
    """Whether an error came from the writing of events.

    :param names: the calls on its traceback, see :func:`~avalanche_firn.plugins.stop_places.frames`.
    """
    return any(name.startswith(_WRITER_MODULE) for name in names)
