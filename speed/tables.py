"""Rows of figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from speed.gate import spread
from speed.rows import Row

__all__ = ["bounds_table", "rows_table"]

_ELSEWHERE = ("x", "exponent")


def rows_table(rows: Sequence[Row]) -> str:
    """Every case with its contestants: seconds, throughput, ratio and its scatter, memory, bound."""
    lines: list[str] = []
    for (benchmark, case), found in groupby(rows, key=lambda row: (row.benchmark, row.case)):
        group = list(found)
        first = group[0]
        lines.append(f"\n{benchmark}: {case}; {first.device}, {first.threads} threads, {first.precision}")
        width = max(len(row.contestant) for row in group) + 2
        for row in group:
            lines.append(f"  {row.contestant:<{width}}" + "".join(f"{cell:>{size}}" for cell, size in _cells(row)))
        lines += _parts(group, width)
    return "\n".join(lines)


def _cells(row: Row) -> list[tuple[str, int]]:
    seconds = "" if row.seconds is None else f"{row.seconds:.4g} s"
    speed = "" if row.images_per_second is None else f"{row.images_per_second:.1f} images/s"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f} x {row.to_what}"
    scatter = f" +-{spread(row) / 2:.3f}" if len(row.all_ratios) > 1 else ""
    memory = "" if row.peak_memory_MiB is None else f"{row.peak_memory_MiB:.1f} MiB"
    kind = "" if row.quantity == "time" else f"  ({row.quantity})"
    shown = [(seconds, 13), (speed, 20), ("   " + ratio + scatter + kind, 0), (memory, 15)]
    if row.met is not None:
        shown.append((f"   bound {row.bound:.3f}: {'met' if row.met else 'NOT MET'}", 0))
    return shown


def _parts(group: Sequence[Row], width: int) -> list[str]:
    """Microseconds of the parts of an iteration, where they were taken; other details after them."""
    lines: list[str] = []
    timed = [row for row in group if "microseconds_per_iteration" in row.details]
    if timed:
        columns = list(timed[0].details["microseconds_per_iteration"])
        lines.append(f"  {'us per iteration':<{width}}" + "".join(f"{column:>18}" for column in columns))
        for row in timed:
            laps = row.details["microseconds_per_iteration"]
            lines.append(f"  {row.contestant:<{width}}" + "".join(f"{laps.get(c, 0):>18.0f}" for c in columns))
    slopes = {row.details["exponent"]: row.details["axis"] for row in group if "exponent" in row.details}
    lines += [f"  grows as ({axis}) to the power of {slope:.2f}" for slope, axis in slopes.items()]
    for row in group:
        numbers = {k: v for k, v in row.details.items() if isinstance(v, (bool, int, float)) and k not in _ELSEWHERE}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, bool) else format(value, '.4g')}"
            for name, value in numbers.items()
        )
        if shown:
            lines.append(f"  {row.contestant:<{width}}{shown}")
    return lines


def bounds_table(rows: Iterable[Row]) -> str:
    """One line per bound."""
    lines = [
        f"{'met' if row.met else 'NOT MET':<9}{row.ratio:>8.3f} of {row.bound:.3f}   "
        f"{row.benchmark}: {row.case}: {row.contestant} to {row.to_what}"
        for row in rows
        if row.met is not None
    ]
    return "\n".join(["bounds:", *lines]) if lines else "no bound was checked"
