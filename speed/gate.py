"""The regression gate: are the ratios just measured worse than the recorded ones?

Compared are ratios only, never seconds: of the same case, contestant and reference, at the same precision, on the same
kind of device (a CPU with as many threads, or a GPU). A ratio is a regression when it is worse by more than the
tolerance *and* by more than the rounds scatter (the wider of the two interquartile ranges); worse by more than the
tolerance but within the scatter is noise. What has no record is new, and no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speed.rows import Row, read_rows
from speed.scripts import SCRIPTS, read_record

__all__ = ["TOLERANCE", "Comparison", "compare", "device_kind", "failed", "recorded_rows", "spread", "table"]

TOLERANCE = 0.10  # our choice
Verdict = Literal["regression", "noise", "unchanged", "better", "new"]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A measured ratio beside the recorded one (None: there is none), and what follows."""

    row: Row
    recorded: float | None
    scatter: float
    verdict: Verdict


def device_kind(row: Row) -> str:
    """ "CPU, <threads>" or "GPU": between these, ratios of the same case are not comparable."""
    kind = row.device.split(",")[0]
    return f"{kind}, {row.threads} threads" if kind == "CPU" else kind


def spread(row: Row) -> float:
    """Interquartile range of the rounds' ratios; 0 for fewer than two."""
    if len(row.all_ratios) < 2:
        return 0.0
    low, _, high = statistics.quantiles(row.all_ratios, n=4, method="inclusive")
    return high - low


def compare(measured: Iterable[Row], recorded: Iterable[Row], tolerance: float = TOLERANCE) -> list[Comparison]:
    """Judge every measured ratio that is not a reference's own.

    Args:
        measured, recorded: rows; of several recorded rows that fit, one of the very same device counts, else the last.
        tolerance: accepted worsening, as a part of the recorded ratio.

    Raises:
        ValueError: a negative tolerance.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}; a part of the recorded ratio, 0 and above, is accepted")
    known: dict[Key, list[Row]] = {}
    for row in recorded:
        if row.ratio is not None:
            known.setdefault(_key(row), []).append(row)
    found = []
    for row in measured:
        if row.ratio is None or row.contestant == row.to_what:
            continue
        fitting = known.get(_key(row), [])
        same = [candidate for candidate in fitting if candidate.device == row.device]
        candidates = same or fitting
        found.append(_judge(row, candidates[-1], tolerance) if candidates else Comparison(row, None, 0.0, "new"))
    return found


def _key(row: Row) -> Key:
    return (row.benchmark, row.case, row.contestant, row.to_what, row.quantity, row.precision, device_kind(row))


def _judge(row: Row, before: Row, tolerance: float) -> Comparison:
    assert row.ratio is not None and before.ratio is not None
    scatter, change = max(spread(row), spread(before)), row.ratio - before.ratio
    verdict: Verdict = "unchanged"
    if abs(change) > tolerance * abs(before.ratio):
        verdict = "noise" if abs(change) <= scatter else "regression" if change > 0 else "better"
    return Comparison(row, before.ratio, scatter, verdict)


def failed(comparisons: Iterable[Comparison]) -> bool:
    """Whether there is a regression."""
    return any(comparison.verdict == "regression" for comparison in comparisons)


def recorded_rows(folder: Path, benchmarks: Sequence[str]) -> list[Row]:
    """What is recorded of these benchmarks; nothing for those without a file.

    Raises:
        ResultsError: a file of another format, with what is wrong.
    """
    found: list[Row] = []
    for name in benchmarks:
        path = folder / f"{name}.json"
        if path.exists():
            found += read_record(name, path) if name in SCRIPTS else read_rows(path)
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """The verdicts, regressions first."""
    order = ("regression", "new", "better", "noise", "unchanged")
    lines = [f"{'verdict':<12}{'recorded':>9}{'measured':>9}{'change':>9}{'scatter':>9}   what"]
    for one in sorted(comparisons, key=lambda c: order.index(c.verdict)):
        before = "-" if one.recorded is None else f"{one.recorded:.3f}"
        change = "-" if not one.recorded else f"{one.row.ratio / one.recorded - 1:+.1%}"  # type: ignore[operator]
        what = f"{one.row.benchmark}: {one.row.case}: {one.row.contestant} to {one.row.to_what} ({one.row.quantity})"
        lines.append(f"{one.verdict:<12}{before:>9}{one.row.ratio:>9.3f}{change:>9}{one.scatter:>9.3f}   {what}")
    if not comparisons:
        lines.append("nothing to compare")
    return "\n".join(lines)
