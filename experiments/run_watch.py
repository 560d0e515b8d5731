"""What a run reports to: the narrator, the bars, the estimate of the time left. A run alone has a watch of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.narration import Narrator, TextNarrator
from avalanche_firn.experiments.progress import Overall, ProgressPlugin, bars_wanted
from avalanche_firn.experiments.time_left import TimeLeft

__all__ = ["RunWatch"]

_ENOUGH = 0.02  # share of a run from which its pace is believed before its first experience is done; our choice


class RunWatch:
    """Told by a run what it has done.

    Args:
        method: label of the method. strategy: its kind. seed: of the run. folder: of the run.
        narrator: hears of every experience.
        bars: whether to draw bars.
        time_left: learns the pace of the run.
        overall: the bar over the comparison. before: its units that were done before. whole: units of this run.
    """

    def __init__(
        self,
        *,
        method: str,
        strategy: str,
        seed: int,
        folder: Path,
        narrator: Narrator,
        bars: bool = False,
        time_left: TimeLeft | None = None,
        overall: Overall | None = None,
        before: int = 0,
        whole: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.who = {"method": method, "strategy": strategy, "seed": seed, "folder": folder}
        self.narrator, self.bars, self.overall = narrator, bars, overall
        self._time_left, self._clock = time_left, clock
        self._before, self._whole = before, whole
        self._first: tuple[float, float] | None = None  # share and time when the run was first seen
        self._steady = False  # an experience was finished: its pace is better than that of single steps
        self._plugin: ProgressPlugin | None = None

    @classmethod
    def alone(
        cls, config: Any, folder: Path, *, quiet: bool = False, say: Callable[[str], None] | None = print
    ) -> RunWatch:
        """The watch of a run that belongs to no comparison; `config` has one method and one seed."""
        method, hushed = config.methods[0], quiet or say is None
        narrator = TextNarrator(say or print, quiet=hushed)
        identity = {"method": method.name, "strategy": method.strategy, "seed": config.seeds[0], "folder": folder}
        return cls(**identity, narrator=narrator, bars=bars_wanted(config.progress, quiet))

    @property
    def label(self) -> str:
        """For bars: method and seed."""
        return f"{self.who['method']} seed {self.who['seed']}"

    def plugin(self, tasks: int) -> ProgressPlugin | None:
        """The plugin that draws the run's bars, to be put first; None where none are drawn."""
        if self.bars:
            self._plugin = ProgressPlugin(label=self.label, tasks=tasks, drawn=self.drawn)
        return self._plugin

    def drawn(self, share: float) -> None:
        """A bar was drawn; so much of the run's training is done."""
        now = self._clock()
        if self._first is None:
            self._first = (share, now)
        begun, since = self._first
        if self._time_left is not None and not self._steady and share - begun >= _ENOUGH and begun < _ENOUGH:
            self._time_left.pace(share, (now - since) * share / (share - begun))
        if self.overall is not None:
            self.overall.show(self._before + self._whole * share)

    def experience(
        self, *, index: int, tasks: int, classes: Sequence[int], figures: dict[str, float | None], seconds: float
    ) -> None:
        """An experience was trained and evaluated. `index`: from 0. `seconds`: of the whole run so far."""
        self._paced((index + 1) / tasks, seconds)
        facts = {"task": index + 1, "tasks": tasks, "classes": list(classes), "figures": figures, "seconds": seconds}
        self.narrator.tell("experience", **self.who, **facts, seconds_left=self._left())

    def pretrained(self, figures: dict[str, float], seconds: float) -> None:
        """The network of a transfer experiment is trained."""
        self.narrator.tell("pretrained", **self.who, figures=figures, seconds=seconds)

    def transferred(
        self, optimizer: str, figures: dict[str, float | None], seconds: float, *, share: float, so_far: float
    ) -> None:
        """The transfers with one optimizer are done; with them `share` of the run, in `so_far` seconds."""
        self._paced(share, so_far)
        self.narrator.tell("transferred", **self.who, optimizer=optimizer, figures=figures, seconds=seconds)

    def close(self) -> None:
        """The run's bars go, also after an error."""
        if self._plugin is not None:
            self._plugin.close()

    def _paced(self, share: float, seconds: float) -> None:
        self._steady = True
        if self._time_left is not None:
            self._time_left.pace(share, seconds)
        if self.overall is not None:
            self.overall.show(self._before + self._whole * share)

    def _left(self) -> float | None:
        return None if self._time_left is None else self._time_left.seconds_left()
