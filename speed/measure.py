"""How everything in here is timed: contestants in turn, ratios within a round, one row of figures per contestant.

A machine's speed drifts (temperature, neighbours, caches), so contestants are never timed one after another. Each round
runs every contestant once, in an order that rotates from round to round; the ratio of two contestants is the median of
their ratios within the rounds. The device is synchronised before a clock starts and before it stops.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from speed.memory import MemoryMark, in_fresh_process, peak_memory, synchronise
from speed.rows import FORMAT, RESULTS, ROOT, ResultsError, Row, Settings, read_rows, write_rows

__all__ = [
    "FORMAT",
    "RESULTS",
    "ROOT",
    "Lap",
    "MemoryMark",
    "ResultsError",
    "Row",
    "Settings",
    "Timings",
    "in_fresh_process",
    "interleaved",
    "machine",
    "make_row",
    "peak_memory",
    "read_rows",
    "rows_from",
    "synchronise",
    "write_rows",
]

Contestants = Mapping[str, Callable[[], Any]]


class Lap(float):
    """Seconds that a contestant has timed itself, returned in place of the clock around it."""


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The fields of a row that describe where it was measured."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "device": f"GPU, {torch.cuda.get_device_name(device)}" if gpu else f"CPU, {_processor()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "avalanche": _version("avalanche-lib"),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        rows = cpu.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((row.split(":")[1].strip() for row in rows if "model name" in row), name)
    return name or platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------------------------------------------------- time
@dataclass(frozen=True)
class Timings:
    """Seconds of every contestant in every round, `{contestant: [round, ...]}`."""

    seconds: dict[str, list[float]]

    def median(self, contestant: str) -> float:
        """Median seconds."""
        return statistics.median(self.seconds[contestant])

    def ratios(self, contestant: str, to_what: str) -> list[float]:
        """Time by that of another contestant, round by round."""
        return [a / b for a, b in zip(self.seconds[contestant], self.seconds[to_what], strict=True)]

    def ratio(self, contestant: str, to_what: str) -> float:
        """Median of the ratios within the rounds."""
        return statistics.median(self.ratios(contestant, to_what))


def interleaved(
    contestants: Contestants,
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    after_each: Callable[[], Any] = lambda: None,
) -> Timings:
    """Time the contestants in turn.

    Args:
        contestants: by name; each is called without arguments. One that returns a `Lap` has timed itself (what it
            prepared before doesn't count), every other one is timed as a whole.
        rounds: counted rounds, at least 1.
        warmup: rounds before these, not counted.
        device: synchronised around the clock.
        after_each: called after every run, such as a progress bar's update.

    Returns:
        Seconds by contestant and round. Round `n` begins with contestant `n` modulo their number.

    Raises:
        ValueError: no contestant, or no round.
    """
    names = list(contestants)
    if not names or rounds < 1 or warmup < 0:
        raise ValueError(
            f"there are {len(names)} contestants, {rounds} rounds and {warmup} to warm up; accepted: at least one "
            "contestant, one round and 0 to warm up"
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already needn't be looked through before every run
    try:
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                synchronise(device)
                start = time.perf_counter()
                result = contestants[name]()
                synchronise(device)
                took = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(float(result) if isinstance(result, Lap) else took)
                del result  # before the next contestant needs the memory
                after_each()
    finally:
        gc.unfreeze()
    return Timings(seconds)


# ---------------------------------------------------------------------------------------------------------- rows
def make_row(benchmark: str, case: str, contestant: str, settings: Settings, **figures: Any) -> Row:
    """A row of this machine, now."""
    given: dict[str, Any] = {"precision": "fp32", "command": settings.command, **machine(settings.device), **figures}
    return Row(benchmark=benchmark, case=case, contestant=contestant, **given)


def rows_from(
    timings: Timings,
    benchmark: str,
    case: str,
    settings: Settings,
    *,
    to_what: str,
    images: int | None = None,
    bounds: Mapping[str, float] | None = None,
    memory: Mapping[str, float | None] | None = None,
    details: Mapping[str, dict[str, Any]] | None = None,
    **figures: Any,
) -> list[Row]:
    """One row for every contestant.

    Args:
        to_what: contestant that the others are compared with.
        images: of one run, for images per second.
        bounds, memory, details: by contestant.
        figures: further fields, alike in all rows.
    """
    return [
        make_row(
            benchmark,
            case,
            name,
            settings,
            seconds=timings.median(name),
            all_seconds=list(took),
            images_per_second=None if images is None else images / timings.median(name),
            ratio=timings.ratio(name, to_what),
            all_ratios=timings.ratios(name, to_what),
            to_what=to_what,
            bound=(bounds or {}).get(name),
            peak_memory_MiB=(memory or {}).get(name),
            details=(details or {}).get(name, {}),
            **figures,
        )
        for name, took in timings.seconds.items()
    ]
