"""The files of a report: written whole or not at all, and what an older report left is removed.

Only files that a report of this package has made are removed: those that the report.md beside them links, and no other
picture in the folder. A reader who has report.html open while runs go on sees the old one or the new one, never half.
"""

from __future__ import annotations

import re
from pathlib import Path

from avalanche_firn.experiments.report_html import html_report
from avalanche_firn.experiments.report_parts import Report
from avalanche_firn.experiments.report_svg import standalone_svg
from avalanche_firn.experiments.report_text import markdown_report
from avalanche_firn.experiments.results import write_text

__all__ = ["write_files"]

_LINKED = re.compile(r"^!\[.*\]\(([^()/\\]+\.(?:png|svg))\)$", re.MULTILINE)


def write_files(folder: Path, report: Report, csv: str) -> None:
    """Write report.html, report.md, results.csv and one SVG file per picture.

    Args:
        folder: made if needed.
        report: what they show.
        csv: text of results.csv.
    """
    pictures = {f"{picture.name}.svg": standalone_svg(picture.svg) for picture in report.pictures()}
    texts = {"results.csv": csv, "report.html": html_report(report), "report.md": markdown_report(report)}
    folder.mkdir(parents=True, exist_ok=True)
    old = _linked(folder / "report.md")
    for name, text in (pictures | texts).items():
        write_text(folder / name, text)
    for name in old - set(pictures):
        (folder / name).unlink(missing_ok=True)


def _linked(path: Path) -> set[str]:
    """Pictures beside an older report that it links."""
    if not path.is_file():
        return set()
    return set(_LINKED.findall(path.read_text(encoding="utf-8", errors="replace")))
