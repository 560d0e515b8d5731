"""Images that can't be loaded, in words: a broken or absent file, a worker process that has died or that hangs.

torch says the first with the traceback of the worker inside the message, and the second as a ``RuntimeError`` that its
signal handler may raise in any line of the main process. Both are recognised by what they say. What is not about
loading (an error in a transform, for example) stays what it is: it belongs to the code and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.plugins.run_errors import DataLoadingError, RunError
from avalanche_firn.plugins.stop_places import chain, frames

__all__ = ["loading_error"]

_IN_WORKER = re.compile(r"^Caught \w+ in DataLoader worker process \d+\.", re.MULTILINE)
_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed by signal: ([^.]+))"
)
_LATE = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
_READERS = ("torch.utils.data._utils.fetch", "PIL.", "torchvision.io")
FEWER = "training.num_workers=0 (images are loaded in the main process)"
_FILES = ("Too many open files. Communication with the workers", " items of ancdata")
_SHARED = "shared memory (/dev/shm) is full; what helps: a larger one, or"


def loading_error(error: BaseException, describe: Callable[[str], str] = lambda text: "") -> DataLoadingError | None:
    """What to tell of an error in loading images; None if it is of another kind.

    :param error: the cause. :param describe: takes the message and gives what is known of the image in it, such as its
        class and split; "" where nothing is.
    """
    links = list(chain(error))
    if any(isinstance(link, RunError) for link in links):
        return None
    told = next(filter(None, map(_worker, links)), "")  # first: it may strike while an image is read
    told = told or next(filter(None, (_image(link, describe) for link in links)), "")
    return DataLoadingError(told) if told else None


def _worker(error: BaseException) -> str:
    """Of a process that is dead or silent; "" if it isn't about one."""
    text = str(error)
    if not isinstance(error, RuntimeError):
        return ""
    dead = _DEAD.search(text)
    if dead is not None:
        many = "," in dead[1]
        who = (
            f"the processes {dead[1]} that load images have" if many else f"the process {dead[1]} that loads images has"
        )
        signal = (dead[2] or "").strip()
        if signal == "Bus error":
            return f"{who} died of a bus error: {_SHARED} {FEWER}"
        how = f" (killed: {signal})" if signal and signal != "Killed" else ""
        return (
            f"{who} died{how}, most often because the memory of the machine was used up; what helps: {FEWER}, fewer of "
            "them, or a smaller performance.prefetch_factor"
        )
    late = _LATE.search(text)
    if late is not None:
        return (
            f"the processes that load images have given nothing for {float(late[1]):g} seconds: they hang, or the disk "
            f"does; what helps: {FEWER}, or a longer performance.worker_timeout"
        )
    if "unable to write to file </torch_" in text or "unable to open shared memory object" in text:
        return f"the processes that load images can't hand them over: {_SHARED} {FEWER}"
    if any(words in text for words in _FILES):
        return (
            "the processes that load images can't hand them over: there are too many open files; what helps: a higher "
            f"limit (ulimit -n), or {FEWER}"
        )
    return "a thread that loads images has died" if "Pin memory thread exited unexpectedly" in text else ""


def _image(error: BaseException, describe: Callable[[str], str]) -> str:
    """Of a file that can't be read; "" if it isn't about one."""
    text = str(error)
    in_worker = _IN_WORKER.search(text) is not None
    reading = in_worker or any(name.startswith(_READERS) for name in frames(error))
    if not isinstance(error, StreamError) and not (isinstance(error, OSError) and reading):
        return ""
    if in_worker:  # the last line of the traceback inside, without the name of the class
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    known = describe(text)
    return f"{text} ({known})" if known and known not in text else text
