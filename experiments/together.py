"""The course of a comparison whose runs go on at the same time, on other machines.

Where the runs are and how they are started is the matter of a crew (:class:`Crew`), which says what happens to them;
here it is told, counted and reported as by :class:`~avalanche_firn.experiments.course.Course`. A run that fails doesn't
stop the others: they end first, then the comparison fails with the names and errors of all that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from avalanche_firn.experiments.course import Course, ReportBudget, Runs, identity_of
from avalanche_firn.experiments.narration import Narrator
from avalanche_firn.experiments.progress import Overall
from avalanche_firn.experiments.results import RunResults
from avalanche_firn.experiments.run_folders import Planned
from avalanche_firn.experiments.time_left import TimeLeft
from avalanche_firn.plugins.run_errors import RunError

__all__ = ["Crew", "Failure", "Happening", "RunsFailed", "TogetherCourse"]


@dataclass(frozen=True)
class Failure:
    """Why a run has failed. `trace`: of an error in the code, to be shown; "" for one that its text explains."""

    text: str
    trace: str = ""


@dataclass(frozen=True)
class Happening:
    """What a crew says of a run.

    ==========  ==============================================================================================
    `kind`      `facts`
    ==========  ==============================================================================================
    started     resumed
    paced       share (0 to 1) of the run that is done, seconds that it took
    told        event, and the facts that a narrator gets with it: ``experience``, ``pretrained``, ``transferred``
    lost        text: its process or machine is gone; it will start again
    finished    results
    failed      failure
    passed      a moment has passed, of no run (`planned` is None)
    ==========  ==============================================================================================
    """

    kind: str
    planned: Planned[Any] | None
    facts: dict[str, Any]


class Crew(Protocol):
    """Does runs somewhere."""

    words: tuple[str, ...]
    """Of the command line, which a command that goes on needs too."""
    at_once: int
    """How many runs it is expected to do at the same time."""

    def work(self, waiting: Sequence[Planned[Any]]) -> Iterator[Happening]:
        """Do the runs; ends when each is finished or has failed."""
        ...

    def cancel(self) -> None:
        """End what goes on; every run keeps its last checkpoint."""
        ...


class RunsFailed(RunError):
    """Runs of a comparison have failed; the others are finished. The message names all that failed."""


class TogetherCourse(Course):
    """Do the runs of a plan with a crew; see :class:`~avalanche_firn.experiments.course.Course` for the arguments."""

    def __init__(self, plan: Sequence[Planned[Any]], *, narrator: Narrator, crew: Crew, **more: Any) -> None:
        settings = (*more.pop("settings", ()), *crew.words)
        super().__init__(plan, narrator=narrator, settings=settings, **more)
        waiting = [planned.config.methods[0].name for planned in self.plan if not planned.finished]
        self.time_left = TimeLeft(waiting, self._clock, at_once=crew.at_once)
        self._crew = crew
        self._numbers = {planned.folder: number for number, planned in enumerate(self.plan, 1)}
        self._shares: dict[Path, float] = {}  # of the runs that go on
        self._failures: dict[Path, Failure] = {}
        self._budget = ReportBudget(clock=self._clock)
        self._bar: Overall | None = None

    def work_together(self) -> Runs:
        """Results of every run of the plan in its order.

        Raises:
            RunsFailed: some have failed, after all the others were finished and their report was written.
            KeyboardInterrupt: after the runs were cancelled and what is finished was told.
        """
        self._begin()
        self._bar = self._overall()
        try:
            self._listen()
            if self._failures:
                raise RunsFailed(self._failed_text())
        except BaseException as error:
            if self._bar is not None:
                self._bar.close()
            self._broken(error)
            raise
        if self._bar is not None:
            self._bar.close()
        return self._runs()

    def _listen(self) -> None:
        waiting = [planned for planned in self.plan if planned.folder not in self.found]
        try:
            for happening in self._crew.work(waiting):
                if happening.planned is not None:
                    getattr(self, f"_{happening.kind}")(happening.planned, **happening.facts)
                if self._bar is not None:
                    self._bar.show(self._units())
        except BaseException:
            self._crew.cancel()
            raise

    def _units(self) -> float:
        """What the bar shows: runs, those that go on in parts; per cent of a single one."""
        done = len(self.found) + sum(self._shares.values())
        return done if len(self.plan) > 1 else 100 * done

    # ------------------------------------------------------------------ what happens
    def _started(self, planned: Planned[Any], *, resumed: bool) -> None:
        self._tell_started(planned, self._numbers[planned.folder], resumed=resumed)
        self._going(planned)

    def _going(self, planned: Planned[Any]) -> None:
        """It goes on, whether or not its first word has arrived."""
        if planned.folder not in self._shares:
            self._shares[planned.folder] = 0.0
            self.time_left.begin(planned.config.methods[0].name, planned.folder)

    def _paced(self, planned: Planned[Any], *, share: float, seconds: float) -> None:
        self._going(planned)
        self._shares[planned.folder] = share
        self.time_left.pace(share, seconds, planned.folder)

    def _told(self, planned: Planned[Any], *, event: str, **facts: Any) -> None:
        if "seconds_left" in facts:  # what the run alone can't know
            facts["seconds_left"] = self.time_left.seconds_left()
        self.narrator.tell(event, **{**facts, **identity_of(planned)})

    def _lost(self, planned: Planned[Any], *, text: str) -> None:
        if self._shares.pop(planned.folder, None) is not None:
            self.time_left.give_up(planned.folder, again=True)
        self.narrator.tell("note", text=f"{_name(planned)}: {text}")

    def _finished(self, planned: Planned[Any], *, results: dict[str, Any]) -> None:
        self._going(planned)
        del self._shares[planned.folder]
        self.found[planned.folder] = RunResults(results, planned.folder)
        self.time_left.finish(planned.folder)
        to_come = self._to_come() - len(self._failures)
        self._tell_finished(planned, self._numbers[planned.folder], results, to_come=to_come)
        if to_come:
            self._update(self._budget)

    def _failed(self, planned: Planned[Any], *, failure: Failure) -> None:
        self._going(planned)
        del self._shares[planned.folder]
        self._failures[planned.folder] = failure
        self.time_left.give_up(planned.folder)
        self.narrator.tell("run_failed", **identity_of(planned), error=failure.text)

    def _failed_text(self) -> str:
        """All that failed, each with its error."""
        failed = [(p, self._failures[p.folder]) for p in self.plan if p.folder in self._failures]
        count = "1 run has failed" if len(failed) == 1 else f"{len(failed)} runs have failed"
        lines = [f"{count}, of {len(self.plan)}:"]
        for planned, failure in failed:
            lines += [f"{_name(planned)}: {failure.text}", *([failure.trace.rstrip()] if failure.trace else [])]
        return "\n".join(lines)


def _name(planned: Planned[Any]) -> str:
    return f"{planned.config.methods[0].name} seed {planned.config.seeds[0]}"
