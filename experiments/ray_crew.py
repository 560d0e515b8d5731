"""Runs as tasks of a Ray cluster: started, listened to, started again when a machine is lost, cancelled.

A run's task answers with results or with its error in words, so whatever Ray itself reports means that a process or a
machine is gone, and the run is started again from its last checkpoint. It is given up after :data:`DEATHS` in a row
without a new checkpoint between them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.experiments import ray_worker
from avalanche_firn.experiments.run_folders import Planned
from avalanche_firn.experiments.together import Failure, Happening
from avalanche_firn.plugins.checkpoint_files import checkpoints

__all__ = ["DEATHS", "RayCrew"]

DEATHS = 3
"""Deaths of a run's process in a row, without a new checkpoint, after which it is given up; our choice."""
_MOMENT = 0.25  # seconds between two looks; our choice
_GENTLE, _FORCED = 10.0, 5.0  # seconds for runs to end when they are cancelled, and when they are killed
_VISIBLE = 60.0  # seconds until a network file system shows what another machine has written: NFS's acdirmax


@dataclass
class _Task:
    """A run on its way. `ref`: of the task. `deaths`: in a row, since the checkpoint called `last`."""

    number: int
    planned: Planned[Any]
    ref: Any = None
    attempt: int = 0
    deaths: int = 0
    last: str = ""


class RayCrew:
    """A :class:`~avalanche_firn.experiments.together.Crew` whose runs are tasks of a cluster.

    Args:
        ray: the library, connected.
        job: what all runs are told, see :func:`~avalanche_firn.experiments.ray_worker.train`.
        options: of their tasks.
        mailbox_node: the machine that keeps what the runs tell.
        words: of the command line. at_once: how many runs are expected to go on at the same time.
        locks: whether the locks of folders reach all machines; without, a lost run isn't started again.
    """

    def __init__(
        self,
        ray: Any,
        job: dict[str, Any],
        options: dict[str, Any],
        *,
        mailbox_node: str,
        words: tuple[str, ...] = (),
        at_once: int = 1,
        locks: bool = True,
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.words, self.at_once = words, at_once
        self._ray, self._job, self._locks = ray, job, locks
        self._train = ray.remote(**options, scheduling_strategy="SPREAD")(ray_worker.train)
        where = NodeAffinitySchedulingStrategy(mailbox_node, soft=False)
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=where)(ray_worker.Mailbox).remote()
        self._tasks: dict[int, _Task] = {}

    # ------------------------------------------------------------------ work
    def work(self, waiting: Sequence[Planned[Any]]) -> Iterator[Happening]:
        """Do the runs; see :class:`~avalanche_firn.experiments.together.Crew`."""
        self._tasks = {number: _Task(number, planned) for number, planned in enumerate(waiting)}
        for task in self._tasks.values():
            task.last = _last(task.planned.folder)
            self._start(task)
        while self._tasks:
            by_ref = {task.ref: task for task in self._tasks.values()}
            done, _ = self._ray.wait(list(by_ref), num_returns=1, timeout=_MOMENT)
            yield from self._letters()
            for ref in done:
                yield self._ended(by_ref[ref])
            yield Happening("passed", None, {})

    def cancel(self) -> None:
        """End all tasks: first as Ctrl-C would, so that each closes its files, then by force."""
        for force, seconds in ((False, _GENTLE), (True, _FORCED)):
            refs = [task.ref for task in self._tasks.values()]
            if not refs:
                return
            for ref in refs:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    self._ray.cancel(ref, force=force)
            with contextlib.suppress(Exception):
                done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=seconds)
                ended = set(done)
                self._tasks = {n: task for n, task in self._tasks.items() if task.ref not in ended}
        self._tasks = {}

    def _start(self, task: _Task) -> None:
        task.attempt += 1
        planned = task.planned
        running = None if planned.running is None else planned.running.model_dump()
        own = {"config": planned.config.model_dump(), "running": running, "folder": str(planned.folder.absolute())}
        task.ref = self._train.remote(self._job | own, task.number, task.attempt, self._mailbox)

    def _letters(self) -> Iterator[Happening]:
        """What the runs have told since the last look."""
        try:
            letters = self._ray.get(self._mailbox.take.remote(), timeout=_GENTLE)
        except self._ray.exceptions.RayError:  # no lines of progress then; results come another way
            return
        for number, attempt, kind, facts in letters:
            task = self._tasks.get(number)
            if task is not None and attempt == task.attempt:  # not of one that was thought dead
                yield Happening(kind, task.planned, facts)

    def _ended(self, task: _Task) -> Happening:
        """What became of a task."""
        try:
            answer = self._ray.get(task.ref)
        except self._ray.exceptions.RayError as error:
            return self._lost(task, error)
        del self._tasks[task.number]
        if "failed" in answer:
            return Happening("failed", task.planned, {"failure": Failure(**answer["failed"])})
        _wait_for(task.planned.folder / "results.json")
        return Happening("finished", task.planned, {"results": answer["results"]})

    def _lost(self, task: _Task, error: Exception) -> Happening:
        """Start it again, or give it up."""
        reason, last = _reason(error), _last(task.planned.folder)
        task.deaths = task.deaths + 1 if last == task.last else 1
        task.last = last
        kept = f"its last checkpoint, {last}" if last else "its beginning, as no checkpoint was made yet"
        text = ""
        if not self._locks:
            text = f"{reason}; it goes on from {kept} when it is started again"
        elif task.deaths >= DEATHS:
            text = f"{reason}, {task.deaths} times in a row without a new checkpoint; it would go on from {kept}"
        if text:
            del self._tasks[task.number]
            return Happening("failed", task.planned, {"failure": Failure(text)})
        self._start(task)
        return Happening("lost", task.planned, {"text": f"{reason}; it is started again from {kept}"})


def _last(folder: Path) -> str:
    """Name of the last checkpoint of a run, "" for none."""
    found = checkpoints(folder / "checkpoint")
    return found[0].name if found else ""


def _reason(error: Exception) -> str:
    """What Ray says of a lost task, in a line."""
    kind = type(error).__name__
    told = {
        "NodeDiedError": "its machine is gone",
        "LocalRayletDiedError": "its machine is gone",
        "WorkerCrashedError": "its process has died",
        "OutOfMemoryError": "Ray has ended its process, as its machine had hardly any memory left",
        "TaskCancelledError": "its task was cancelled",
    }
    return told.get(kind) or f"its task is lost ({kind}: {(str(error).strip().splitlines() or [''])[0]})"


def _wait_for(file: Path) -> None:
    """Until this machine sees a file that another one has written, as long as that may take."""
    end = time.monotonic() + _VISIBLE
    while not file.is_file() and time.monotonic() < end:
        with contextlib.suppress(OSError):
            next(file.parent.iterdir(), None)  # reading a folder makes NFS ask again
        time.sleep(_MOMENT)
