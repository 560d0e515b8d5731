"""What ends a run for a reason outside the code, told with the place, what is kept and what helps.

:func:`told_stops` stands around a run. Errors of memory, of disks and of images become a
:class:`~avalanche_firn.plugins.run_errors.RunError` whose message says where the run stood, which checkpoint it goes on
from and which settings help; a command line prints it without a traceback. Errors of the code stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from avalanche_firn.benchmarks.named_files import describe_file
from avalanche_firn.benchmarks.streams import Stream, StreamError
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.memory_advice import memory_advice
from avalanche_firn.experiments.transfer_config import TransferExperiment
from avalanche_firn.plugins.checkpoint_errors import CheckpointError
from avalanche_firn.plugins.checkpoint_files import checkpoints
from avalanche_firn.plugins.event_files import writer_failed
from avalanche_firn.plugins.loading_stop import loading_error
from avalanche_firn.plugins.memory_stop import is_out_of_memory, out_of_memory
from avalanche_firn.plugins.run_errors import DataLoadingError, OutOfMemoryStop, RunError, StorageError
from avalanche_firn.plugins.stop_places import frames, phase_of, place_of
from avalanche_firn.plugins.storage_stop import storage_error, storage_problem

__all__ = ["Standing", "told_stops"]

_STEP = re.compile(r"step-(\d+)")


@dataclass
class Standing:
    """What is known of a run while it goes on; filled in as it becomes known.

    Attributes:
        config: that it runs with. folder: of the run.
        settings: that it was given when it went on, as ``key=value``.
        device: of the run. held: where its images are read from. stream: that it reads. strategy: that it trains.
    """

    config: Config | TransferExperiment
    folder: Path
    settings: tuple[str, ...] = ()
    device: Any = None
    held: dict[str, str] = field(default_factory=dict)
    stream: Stream | None = None
    strategy: Any = None


@contextmanager
def told_stops(standing: Standing) -> Iterator[None]:
    """Raise a RunError for what ends a run from outside.

    Raises:
        OutOfMemoryStop, StorageError, DataLoadingError: see the module.
    """
    try:
        yield
    except CheckpointError as error:
        if "allow_fresh" in str(error):
            text = f"{error}. On the command line --fresh deletes the run and begins anew"
            raise CheckpointError(text) from error
        raise
    except Exception as error:
        told = _told(error, standing)
        if told is None or told is error:
            raise
        raise told from error


def _told(error: Exception, standing: Standing) -> RunError | None:
    if isinstance(error, ConfigError):
        # an image of the stream that can't be held in memory is no wrong setting
        cause = error.__cause__
        if not isinstance(cause, StreamError) or standing.stream is None:
            return None
        return _loading(cause, standing) if describe_file(standing.stream, str(cause)) else None
    if isinstance(error, StorageError):
        return StorageError(f"{error}. {_kept(standing)}")
    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return _memory(error, standing)
    loading = _loading(error, standing)
    if loading is not None:
        return loading
    problem = storage_problem(error)
    if problem is None:
        return None
    if writer_failed(frames(error)):
        found = storage_error(error, "TensorBoard's events", standing.folder)
    else:
        place = problem.filename or standing.folder
        found = storage_error(error, "a file", place, verb="use")
    return StorageError(f"{found}. {_kept(standing)}")


def _loading(error: BaseException, standing: Standing) -> DataLoadingError | None:
    stream = standing.stream
    told = loading_error(error, lambda text: "" if stream is None else describe_file(stream, text))
    if told is None:
        return None
    place = place_of(error, standing.strategy)
    return DataLoadingError(f"images can't be loaded in {place}: {told}. {_kept(standing)}")


def _memory(error: Exception, standing: Standing) -> OutOfMemoryStop:
    device = torch.device("cpu") if standing.device is None else torch.device(standing.device)
    main = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # also of a run on a GPU
    more = _kept(standing)
    if isinstance(standing.config, Config):
        phase = phase_of(error, standing.strategy)
        where = "cpu" if main else device.type
        advice = memory_advice(standing.config, phase, device=where, held=standing.held)
        more += f"\n{advice.text(standing.folder, standing.settings)}"
    return out_of_memory(error, standing.strategy, device="cpu" if main else device, more=more)


def _kept(standing: Standing) -> str:
    """From where the run goes on."""
    found = checkpoints(standing.folder / "checkpoint")
    if not found:
        return "No checkpoint was made yet: the run begins anew"
    done = _STEP.search(found[0].name)
    if standing.strategy is None or done is None:
        return f"The last checkpoint, {found[0]}, is kept"
    back = int(standing.strategy.clock.train_iterations) - int(done[1])
    behind = f"{back} iteration{'s' * (back != 1)} back" if back > 0 else "with all iterations that were done"
    return f"The last checkpoint, {found[0]}, is kept: {behind}"
