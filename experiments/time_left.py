"""How long a comparison will still take, estimated from nothing but what was measured.

A run that is still to come takes what finished runs of its method took: on the clock of this comparison where there
are some, else by the cost in the ``results.json`` of runs that were kept; where there is neither, the mean of the other
methods. A current run takes what its method took, else what its own pace says. Before anything was measured there is
no estimate. Methods differ by orders of magnitude, so the mean over methods, not over runs, stands for an unknown one.
Where several runs go on at once, those to come are dealt out to whichever place is free first.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

__all__ = ["TimeLeft", "about", "span"]


@dataclass
class _Current:
    """A run that goes on: since when, and how much of it was done in how many seconds at what time."""

    method: str
    begun: float
    pace: tuple[float, float, float] | None = None


class TimeLeft:
    """The estimate for the runs of one comparison.

    Args:
        methods: label of the method of every run that is to be done, in their order.
        clock: seconds that only grow.
        at_once: how many runs are expected to go on at the same time, until that is seen.
    """

    def __init__(
        self, methods: Sequence[str], clock: Callable[[], float] = time.perf_counter, *, at_once: int = 1
    ) -> None:
        self._waiting = list(methods)
        self._clock = clock
        self._kept: dict[str, list[float]] = {}
        self._measured: dict[str, list[float]] = {}
        self._current: dict[Hashable, _Current] = {}
        self._expected, self._seen = max(at_once, 1), 0

    def kept(self, method: str, seconds: float | None) -> None:
        """A run was there already and had taken so long; it isn't one of those that are to be done."""
        if seconds is not None and seconds > 0:
            self._kept.setdefault(method, []).append(seconds)

    def begin(self, method: str, run: Hashable = None) -> None:
        """The next run begins. `run`: tells it from others at the same time."""
        self._waiting.remove(method)
        self._current[run] = _Current(method, self._clock())
        self._seen = max(self._seen, len(self._current))

    def pace(self, share: float, seconds: float, run: Hashable = None) -> None:
        """So much of a current run is done (0 to 1), and took so long; time before an interruption counts."""
        if 0 < share <= 1 and seconds > 0 and run in self._current:
            self._current[run].pace = (share, seconds, self._clock())

    def finish(self, run: Hashable = None) -> None:
        """A current run is finished."""
        current = self._current.pop(run)
        seconds = self._clock() - current.begun
        if current.pace is not None:  # a resumed run took more than what is seen of it
            _, spent, known = current.pace
            seconds = max(seconds, spent + self._clock() - known)
        self._measured.setdefault(current.method, []).append(seconds)

    def give_up(self, run: Hashable = None, *, again: bool = False) -> None:
        """A current run has ended without results. `again`: it will be begun once more."""
        current = self._current.pop(run)
        self._seen = len(self._current)  # its machine may be gone
        if again:
            self._waiting.insert(0, current.method)

    def seconds_left(self) -> float | None:
        """Seconds until all is done; None while there is nothing to go by."""
        known = {method: fmean(values) for method, values in (self._kept | self._measured).items()}
        found = [(current, *self._of(current, known)) for current in self._current.values()]
        wholes: dict[str, list[float]] = {}
        for current, _, whole in found:
            if whole is not None:
                wholes.setdefault(current.method, []).append(whole)
        known = {method: fmean(values) for method, values in wholes.items()} | known
        if not known:
            return None if self._waiting or self._current else 0.0
        other = fmean(known.values())
        ends = [
            max(other - (self._clock() - current.begun), 0.0) if left is None else left for current, left, _ in found
        ]
        places = self._seen if self._measured else max(self._seen, self._expected)
        ends += [0.0] * (max(places, 1) - len(ends))
        heapq.heapify(ends)
        for method in self._waiting:
            heapq.heapreplace(ends, ends[0] + known.get(method, other))
        return max(ends)

    def _of(self, current: _Current, known: dict[str, float]) -> tuple[float | None, float | None]:
        """What is left of a current run, and what it takes in all, as far as either is known."""
        pace = None
        spent = self._clock() - current.begun
        if current.pace is not None:
            share, seconds, since = current.pace
            pace = seconds / share
            spent = seconds + self._clock() - since
        if current.method in known and spent < known[current.method]:
            return known[current.method] - spent, known[current.method]
        return (None, None) if pace is None else (max(pace - spent, 0.0), pace)


def span(seconds: float) -> str:
    """Rounded for readers: ``about 40 s``, ``about 12 min``, ``about 1 h 20 min``, ``about 2 d 3 h``."""
    return "a few seconds" if seconds < 5 else f"about {_rounded(seconds)}"


def _rounded(seconds: float) -> str:
    if seconds < 100:
        return f"{5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        hours, rest = divmod(5 * round(minutes / 5), 60)
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, rest = divmod(round(minutes / 60), 24)
    return f"{days} d {rest} h" if rest else f"{days} d"


def about(seconds: float | None) -> str:
    """``about 12 min left``; "" without an estimate."""
    return "" if seconds is None else f"{span(seconds)} left"
