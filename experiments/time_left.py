"""How long a comparison will still take, estimated from nothing but what was measured.

A run that is still to come takes what finished runs of its method took: on the clock of this comparison where there
are some, else by the cost in the ``results.json`` of runs that were kept; where there is neither, the mean of the other
methods. The current run takes what its method took, else what its own pace says. Before anything was measured there is
no estimate. Methods differ by orders of magnitude, so the mean over methods, not over runs, stands for an unknown one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

__all__ = ["TimeLeft", "about", "span"]


class TimeLeft:
    """The estimate for the runs of one comparison.

    Args:
        methods: label of the method of every run that is to be done, in their order.
        clock: seconds that only grow.
    """

    def __init__(self, methods: Sequence[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._waiting = list(methods)
        self._clock = clock
        self._kept: dict[str, list[float]] = {}
        self._measured: dict[str, list[float]] = {}
        self._current: str | None = None
        self._begun = 0.0
        self._pace: tuple[float, float, float] | None = None  # share done, seconds for it, when that was known

    def kept(self, method: str, seconds: float | None) -> None:
        """A run was there already and had taken so long; it isn't one of those that are to be done."""
        if seconds is not None and seconds > 0:
            self._kept.setdefault(method, []).append(seconds)

    def begin(self, method: str) -> None:
        """The next run begins."""
        self._waiting.remove(method)
        self._current, self._begun, self._pace = method, self._clock(), None

    def pace(self, share: float, seconds: float) -> None:
        """So much of the current run is done (0 to 1), and took so long; time before an interruption counts."""
        if 0 < share <= 1 and seconds > 0:
            self._pace = (share, seconds, self._clock())

    def finish(self) -> None:
        """The current run is finished."""
        assert self._current is not None
        seconds = self._clock() - self._begun
        if self._pace is not None:  # a resumed run took more than what is seen of it
            _, spent, known = self._pace
            seconds = max(seconds, spent + self._clock() - known)
        self._measured.setdefault(self._current, []).append(seconds)
        self._current = None

    def seconds_left(self) -> float | None:
        """Seconds until all is done; None while there is nothing to go by."""
        known = {method: fmean(values) for method, values in (self._kept | self._measured).items()}
        left, whole = self._of_current(known)
        if whole is not None and self._current is not None:
            known.setdefault(self._current, whole)
        if not known:
            return None if self._waiting or self._current is not None else 0.0
        other = fmean(known.values())
        if self._current is not None and left is None:
            left = max(other - (self._clock() - self._begun), 0.0)
        return (left or 0.0) + sum(known.get(method, other) for method in self._waiting)

    def _of_current(self, known: dict[str, float]) -> tuple[float | None, float | None]:
        """What is left of the current run, and what it takes in all, as far as either is known."""
        if self._current is None:
            return 0.0, None
        pace = None
        if self._pace is not None:
            share, seconds, since = self._pace
            pace = seconds / share
            spent = seconds + self._clock() - since
        if self._current in known:
            whole = known[self._current]
            if self._pace is None:
                spent = self._clock() - self._begun
            if spent < whole:
                return whole - spent, whole
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
