"""Why a run can't go on, for reasons that lie outside the code: numbers, memory, disk, data.

Each message says where the run stood, what happened and what helps. The last checkpoint is kept, and a command line
shows the message without a traceback. None of these derives from ``ValueError``: they come after work was done.
"""

from __future__ import annotations


class RunError(RuntimeError):
    """A run can't go on; its last checkpoint is intact."""


class NonFiniteError(RunError):
    """A loss, gradient, weight, feature or statistic is infinite or not a number; the message names which and where."""


class OutOfMemoryStop(RunError):
    """The device or the machine has no memory left; the message names the phase and the settings that need less."""


class StorageError(RunError):
    """A file of the run can't be written: no space, no permission, a read-only folder; the message names it."""


class ProcessLostError(RunError):
    """Another process of a distributed run has ended, or can't be reached."""


class DataLoadingError(RunError):
    """An image can't be read, or a process that loads images has died; the message names the file or the process."""


__all__ = ["DataLoadingError", "NonFiniteError", "OutOfMemoryStop", "RunError", "StorageError"]
