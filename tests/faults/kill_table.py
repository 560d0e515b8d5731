"""The table of all kills at the end of a test run, from what the tests have recorded.

With xdist the records arrive with the reports of the workers, at the controlling process, which collects no test and so
reads no ``conftest.py`` of this folder unless it was named on the command line: ``tests/conftest.py`` tells it too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any


def record(case: str, phases: Counter[str]) -> tuple[str, str]:
    """Name and value for ``record_property``."""
    return "kills", json.dumps({"case": case, "phases": phases})


def kill_table(reports: Iterable[Any]) -> str:
    """Kills by case and phase, from the reports of all tests; "" if none was recorded."""
    found: dict[str, Counter[str]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "kills":
                recorded = json.loads(value)
                found.setdefault(recorded["case"], Counter()).update(recorded["phases"])
    if not found:
        return ""
    whole = sum(found.values(), Counter())
    phases = [phase for phase, _ in whole.most_common()]
    width = max(map(len, [*found, "all"]))
    lines = [" " * width + "  kills  phases"]
    for case, counts in [*sorted(found.items()), ("all", whole)]:
        told = ", ".join(f"{phase} {counts[phase]}" for phase in phases if counts[phase])
        lines.append(f"{case:<{width}}  {counts.total():5d}  {told}")
    lines.append(f"{whole.total()} kills of {len(found)} kinds of runs; every one was resumed to identical results")
    return "\n".join(lines)


def tell_kills(terminalreporter: Any) -> None:
    """Print the table once, in ``pytest_terminal_summary``."""
    passed = terminalreporter.stats.get("passed", [])
    table = kill_table(report for report in passed if report.when == "call")
    if table and not getattr(terminalreporter, "firn_kills_told", False):
        terminalreporter.firn_kills_told = True
        terminalreporter.section("random kills")
        terminalreporter.write_line(table)
