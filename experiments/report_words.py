"""A comparison in words: who is best and whether that is shown, paired differences, what each quantity means.

No word says more than its interval: "better" needs a paired interval that excludes zero, one seed shows nothing, and
where the rows must not be compared nothing is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from avalanche_firn.evaluation.comparison_figures import excludes_zero
from avalanche_firn.evaluation.statistics import Interval, paired_difference
from avalanche_firn.evaluation.vocabulary import glossary
from avalanche_firn.experiments.report_parts import Section, Terms
from avalanche_firn.experiments.results import Group

__all__ = [
    "NOT_ZERO",
    "Pair",
    "difference_cell",
    "in_words",
    "last_by_seed",
    "meanings",
    "paired",
    "result_lines",
    "shared_seeds",
]

NOT_ZERO = "not 0: the interval excludes zero"
"""Said once in the title of a table with :func:`difference_cell`."""
_BETTER = {"higher": "higher is better", "lower": "lower is better", "none": ""}


@dataclass(frozen=True)
class Pair:
    """Last accuracy of one method minus that of another, over the seeds that both have."""

    first: str
    other: str
    interval: Interval

    @property
    def label(self) -> str:
        """``FIRST - OTHER``."""
        return f"{self.first} - {self.other}"


def last_by_seed(group: Group) -> dict[int, float]:
    """Last accuracy by seed."""
    pairs = zip(group.seeds, group.values("accuracy/last"), strict=True)
    return {seed: value for seed, value in pairs if value is not None and math.isfinite(value)}


def paired(groups: Sequence[Group]) -> list[Pair]:
    """The best continual method against every other, over the seeds in which both had the same stream and backbone.

    Those without such a seed are left out, as are runs of other data, class order, tasks, split or backbone.
    """
    continual = [group for group in groups if not group.joint]
    found = []
    for other in continual[1:]:
        mine, theirs = last_by_seed(continual[0]), last_by_seed(other)
        common = [seed for seed in shared_seeds(continual[0], other) if seed in mine and seed in theirs]
        if common:
            interval = paired_difference([mine[s] for s in common], [theirs[s] for s in common])
            found.append(Pair(continual[0].label, other.label, interval))
    return found


def shared_seeds(first: Group, other: Group) -> list[int]:
    """Seeds in which both ran on the same stream with the same backbone."""
    ours, theirs = (dict(zip(group.seeds, map(_setting, group.runs), strict=True)) for group in (first, other))
    return [seed for seed in first.seeds if seed in theirs and ours[seed] == theirs[seed]]


def _setting(run: dict[str, Any]) -> list[Any]:
    """What two runs of a seed must have in common for their difference to be one of the methods."""
    stream = run["stream"]
    own = [stream["fingerprint"], stream["split"], list(stream["class_order"]), stream.get("task_sizes")]
    return [*own, run["backbone"]["tag"]]


def in_words(pair: Pair) -> str:
    """What the interval of a difference says."""
    if pair.interval.lower is None:
        return "one seed: nothing shown"
    if not excludes_zero(pair.interval):
        return "no difference shown: the interval includes zero"
    return f"{pair.first if pair.interval.mean > 0 else pair.other} better: the interval excludes zero"


def difference_cell(interval: Interval, scale: float = 100.0, digits: int = 2) -> str:
    """``mean ± half width`` of a difference, marked in words where the interval excludes zero: see :data:`NOT_ZERO`."""
    return interval.format(scale, digits) + (", not 0" if excludes_zero(interval) else "")


def result_lines(groups: Sequence[Group], mismatches: Sequence[str]) -> list[str]:
    """The result in a paragraph; no ranking where the rows must not be compared.

    Args:
        groups: as in the tables, best first.
        mismatches: why they must not be compared; empty if they may.
    """
    continual = [group for group in groups if not group.joint and group.interval("accuracy/last") is not None]
    if not continual:
        return []
    if mismatches:
        return [f"These rows must not be ranked: {'; '.join(mismatches)}."]
    best, interval = continual[0], continual[0].interval("accuracy/last")
    assert interval is not None
    seeds = f"{interval.n} seeds" if interval.n > 1 else "one seed, so no interval"
    reached = f"{interval.format()} % ({'mean ± 95 % interval, ' if interval.n > 1 else ''}{seeds})"
    if len(continual) == 1:
        words = f"{best.label} reached a last accuracy of {reached}."
    else:
        words = f"{best.label} reached the highest last accuracy of {len(continual)} continual methods, {reached}"
        words += f"{_lead(groups)}."
    words += _advantage(continual)
    bounds = [f"{g.label} {i.format()} %" for g in groups if g.joint and (i := g.interval("accuracy/last"))]
    if bounds:
        words += f" Trained on all classes at once (upper bound, not continual): {', '.join(bounds)}."
    return [words]


_ADVANTAGES = (("replay", "keeps samples of the past"), ("batchwise_vote", "lets test batches vote on their task"))


def _advantage(continual: Sequence[Group]) -> str:
    """What the best method was allowed and others weren't, and the best of those."""
    words = ""
    for key, what in _ADVANTAGES:
        has = [any(run["protocol"].get(key) for run in group.runs) for group in continual]
        if has[0] and not all(has):
            other = continual[has.index(False)]
            interval = other.interval("accuracy/last")
            reached = "" if interval is None else f", {interval.format()} %"
            words += f" It {what}; the best of those that don't is {other.label}{reached}."
    return words


def _lead(groups: Sequence[Group]) -> str:
    """By how much the best is ahead of the next, and of how many others that is shown."""
    pairs = paired(groups)
    if not pairs:
        return "; no other method has a seed in common with it"
    next_, interval = pairs[0].other, pairs[0].interval
    ahead = f", {100 * interval.mean:.2f} percent points above {next_}, the next"
    if interval.lower is None or interval.upper is None:
        return f"{ahead}; with one seed no difference is shown"
    told = f"(95 % interval of the paired difference {100 * interval.lower:.2f} to {100 * interval.upper:.2f})"
    if not excludes_zero(interval):
        ahead += f": no difference shown {told}"
        apart = [pair.other for pair in pairs if excludes_zero(pair.interval)]
        more = f"its intervals against {_listed(apart)} exclude zero" if apart else "nor against any other method"
        return f"{ahead}; {more}" if len(pairs) > 1 else ahead
    rest = [pair for pair in pairs if not excludes_zero(pair.interval)]
    shown = f"; not shown against {_listed([pair.other for pair in rest])}" if rest else ""
    return f"{ahead} {told}{shown}"


def _listed(names: Sequence[str]) -> str:
    few = list(names[:6]) + ([f"{len(names) - 6} more"] if len(names) > 6 else [])
    return few[0] if len(few) == 1 else f"{', '.join(few[:-1])} and {few[-1]}"


def meanings(tags: Iterable[str]) -> Section:
    """Definitions of the quantities in a report, as far as the vocabulary has them."""
    rows = []
    for meaning in glossary(tags):
        told = [f"unit: {meaning.unit}" if meaning.unit else "", _BETTER[meaning.better]]
        text = meaning.definition[:1].upper() + meaning.definition[1:]
        extra = "; ".join(part for part in told if part)
        rows.append((meaning.pattern, f"{text}{f' ({extra})' if extra else ''}."))
    return Section("What the figures mean", [Terms(rows)] if rows else [])
