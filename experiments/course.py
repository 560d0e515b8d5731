"""The course of a comparison: one run after the other, what is told meanwhile, and what is left when it breaks off.

The report is written anew after a finished run as long as that costs little beside the runs, so that a dashboard or a
browser shows a comparison that goes on; and once more when it is interrupted or a run fails, for what is finished by
then. An error in such a report never hides the cause.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.narration import Narrator, TextNarrator, resume_command
from avalanche_firn.experiments.progress import Overall, bars_wanted, say_above_bars
from avalanche_firn.experiments.results import read_results
from avalanche_firn.experiments.run_folders import Planned
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.time_left import TimeLeft, about

__all__ = ["Course", "ReportBudget", "identity_of"]

Runs = list[dict[str, Any]]


def identity_of(planned: Planned[Any]) -> dict[str, Any]:
    """What the events of a run say of it: method, strategy, seed, folder."""
    method, seed = planned.config.methods[0], planned.config.seeds[0]
    return {"method": method.name, "strategy": method.strategy, "seed": seed, "folder": planned.folder}


class ReportBudget:
    """Decides whether a report may be written now: if the last one took at most `share` of the time since.

    Args:
        share: of the time that reports may take; our choice.
        guess: seconds that a report is taken to cost before one was written; our choice.
    """

    def __init__(
        self, *, share: float = 0.02, guess: float = 2.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.cost = share, guess
        self._clock = clock
        self._last = clock()

    def write(self, report: Callable[[], Any]) -> bool:
        """Write it if it is cheap enough; whether it was."""
        begun = self._clock()
        if self.cost > self.share * (begun - self._last):
            return False
        try:
            report()
        finally:
            self._last = self._clock()
            self.cost = self._last - begun
        return True


class Course:
    """Do the runs of a plan.

    Args:
        plan: every run, the finished ones too.
        name: of the comparison. folder: of the comparison.
        narrator: hears of everything.
        progress: whether bars are wanted at all, see :func:`~avalanche_firn.experiments.progress.bars_wanted`.
        resume: the folder that ``firn resume`` would go on in; None: that of the run that broke off.
        settings: ``key=value`` that the runs go on with; the command that goes on has them, too.
        report: writes the report of the runs that it is given, and gives its file.
    """

    def __init__(
        self,
        plan: Sequence[Planned[Any]],
        *,
        name: str,
        folder: Path,
        narrator: Narrator,
        progress: bool,
        resume: Path | None,
        report: Callable[[Runs], Path] | None = None,
        settings: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.plan, self.name, self.folder, self.report = list(plan), name, folder, report
        self.narrator, self._resume, self._clock = narrator, resume, clock
        self._settings = tuple(settings)
        self.quiet = narrator.quiet
        self.bars = bars_wanted(progress, narrator.quiet)
        if self.bars and isinstance(narrator, TextNarrator):
            narrator.say = say_above_bars(narrator.say)
        waiting = [planned.config.methods[0].name for planned in self.plan if not planned.finished]
        self.time_left = TimeLeft(waiting, clock)
        self.found: dict[Path, dict[str, Any]] = {}
        self._current: Planned[Any] | None = None

    def work(self, one: Callable[[Planned[Any], RunWatch], dict[str, Any]]) -> Runs:
        """Results of every run of the plan in its order; `one` does a run that isn't finished.

        Raises:
            whatever a run raises, after what is finished was told and its report written.
        """
        self._begin()
        budget, overall = ReportBudget(clock=self._clock), self._overall()
        try:
            for number, planned in enumerate(self.plan, 1):
                if planned.folder not in self.found:
                    self.found[planned.folder] = self._one(one, planned, number, overall)
                    if self._to_come():
                        self._update(budget)
        except BaseException as error:
            if overall is not None:
                overall.close()
            self._broken(error)
            raise
        if overall is not None:
            overall.close()
        return self._runs()

    def _begin(self) -> None:
        """Take what is finished, and tell that the others begin."""
        for planned in self.plan:
            kept = read_results(planned.folder) if planned.finished else None
            if kept is not None:
                self.found[planned.folder] = kept
                self.time_left.kept(kept["method"], kept["cost"]["seconds"])
        self._tell_start()

    def _runs(self) -> Runs:
        """What is finished, in the order of the plan."""
        return [self.found[planned.folder] for planned in self.plan if planned.folder in self.found]

    def _to_come(self) -> int:
        """Number of runs that aren't finished."""
        return len(self.plan) - len(self.found)

    # ------------------------------------------------------------------ one run
    def _one(
        self, one: Callable[[Planned[Any], RunWatch], dict[str, Any]], planned: Planned[Any], number: int, overall: Any
    ) -> dict[str, Any]:
        self._current = planned
        self._tell_started(planned, number, resumed=(planned.folder / "checkpoint").is_dir())
        self.time_left.begin(planned.config.methods[0].name)
        several = len(self.plan) > 1
        watch = RunWatch(
            **identity_of(planned),
            narrator=self.narrator,
            bars=self.bars,
            time_left=self.time_left,
            overall=overall,
            before=len(self.found) if several else 0,
            whole=1 if several else 100,
            clock=self._clock,
        )
        try:
            found = one(planned, watch)
        finally:
            watch.close()
        self.time_left.finish()
        self._current = None
        if overall is not None:
            overall.show(len(self.found) + 1 if several else 100)
        self._tell_finished(planned, number, found, to_come=self._to_come() - 1)
        return found

    def _tell_started(self, planned: Planned[Any], number: int, *, resumed: bool) -> None:
        facts = {"number": number, "runs": len(self.plan)} | identity_of(planned)
        left = self.time_left.seconds_left()
        self.narrator.tell("run_started", **facts, resumed=resumed, seconds_left=left)

    def _tell_finished(self, planned: Planned[Any], number: int, found: dict[str, Any], *, to_come: int) -> None:
        facts = {"number": number, "runs": len(self.plan)} | identity_of(planned)
        left, seconds = self.time_left.seconds_left(), found["cost"]["seconds"]
        figures = found.get("figures", {})
        self.narrator.tell(
            "run_finished", **facts, figures=figures, seconds=seconds, seconds_left=left, to_come=to_come
        )

    def _overall(self) -> Overall | None:
        """The upper bar."""
        if not self.bars or not self._to_come():
            return None
        left = lambda: about(self.time_left.seconds_left())  # noqa: E731
        if len(self.plan) > 1:
            return Overall(total=len(self.plan), unit="runs", label=self.name, left=left)
        config = self.plan[0].config
        label = f"{config.methods[0].name} seed {config.seeds[0]}"
        return Overall(total=100, unit="%", label=label, left=left)

    def _tell_start(self) -> None:
        self.narrator.tell(
            "start",
            name=self.name,
            folder=self.folder,
            runs=len(self.plan),
            methods=list(dict.fromkeys(planned.config.methods[0].name for planned in self.plan)),
            seeds=list(dict.fromkeys(planned.config.seeds[0] for planned in self.plan)),
            kept=len(self.found),
            seconds_left=self.time_left.seconds_left(),
            resume=resume_command(self._resume or self.plan[0].folder, self._settings),
        )

    # ------------------------------------------------------------------ reports
    def _update(self, budget: ReportBudget) -> None:
        """The report of what is finished so far; if it can't be written now, the last one will say why."""
        report = self.report
        if report is None:
            return
        try:
            budget.write(lambda: report(self._runs()))
        except Exception as error:
            self.narrator.tell("note", text=f"the report can't be written: {error}; the runs go on")

    def last_report(self) -> bool:
        """The report of all runs; whether it was written. Without it their results are complete all the same."""
        if self.report is None:
            return False
        try:
            self.report(self._runs())
        except ConfigError:
            raise
        except Exception as error:
            again = f"firn report {shlex.quote(str(self.folder))}"
            problem = f"{type(error).__name__}: {error}"
            self.narrator.tell(
                "note", text=f"the report can't be written: {problem}; all runs are finished, try {again}"
            )
            return False
        return True

    def _broken(self, error: BaseException) -> None:
        """Write the report of what is finished, and say how to go on unless the configuration is wrong."""
        file, finished = None, self._runs()
        if self.report is not None and finished:
            try:
                file = self.report(finished)
            except KeyboardInterrupt:  # once more: no report then
                pass
            except Exception as problem:
                self.narrator.tell("note", text=f"the report can't be written: {problem}")
        if isinstance(error, ConfigError) or not isinstance(error, (KeyboardInterrupt, Exception)):
            return
        listed = [{"method": p.config.methods[0].name, "seed": p.config.seeds[0]} for p in self.plan]
        place = self._resume or (self._current or self.plan[0]).folder
        facts = {
            "folder": self.folder,
            "runs": len(self.plan),
            "finished": [who for who, p in zip(listed, self.plan, strict=True) if p.folder in self.found],
            "left": [who for who, p in zip(listed, self.plan, strict=True) if p.folder not in self.found],
            "seconds_left": self.time_left.seconds_left(),
            "resume": resume_command(place, self._settings),
            "report": file,
        }
        if isinstance(error, KeyboardInterrupt):
            self.narrator.tell("interrupted", **facts)
        else:
            self.narrator.tell("failed", **facts, error=f"{type(error).__name__}: {error}")
