"""The report of a comparison: results.csv, report.md, report.html, figures, the TensorBoard summary; ``firn report``.

All figures come from ``results.json`` and ``metrics.csv`` files, so a report can be made again at any time, of any
selection of runs, also while runs go on. report.html is one file that needs nothing else; report.md links the figures
that lie beside it. Cost: 0.05 to 0.4 s a figure; a hundred runs of twenty methods take some seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_figures import curves, label_of
from avalanche_firn.experiments.report_files import write_files
from avalanche_firn.experiments.report_sections import build_report
from avalanche_firn.experiments.report_tables import cells, facts, mismatches, results_csv, tables, text_table
from avalanche_firn.experiments.report_tensorboard import write_dashboard
from avalanche_firn.experiments.report_unfinished import unfinished_text
from avalanche_firn.experiments.results import FILE, Group, files_below, find_runs, group_runs
from avalanche_firn.experiments.unfinished import find_unfinished

__all__ = [
    "cells",
    "curves",
    "facts",
    "label_of",
    "mismatches",
    "report_folders",
    "tables",
    "text_table",
    "write_report",
]


def write_report(folder: Path, groups: Sequence[Group], *, title: str, unfinished: Sequence[Any] = ()) -> None:
    """Write results.csv, report.md, report.html, figures (SVG) and the TensorBoard summary into `folder`.

    Args:
        folder: made if needed; figures of an older report in it are replaced.
        groups: finished runs, see :func:`~avalanche_firn.experiments.results.group_runs`; may be empty.
        title: of the report.
        unfinished: :class:`~avalanche_firn.experiments.unfinished.UnfinishedRun`, listed apart. Default none.

    Raises:
        ConfigError: a file of a run that can't be read; nothing has been written then.
    """
    report = build_report(folder, groups, title=title, unfinished=unfinished)
    write_dashboard(folder, groups, unfinished=unfinished)  # first: it reads files of the runs before it writes
    write_files(folder, report, results_csv(groups))


def report_folders(folders: Sequence[Path], output: Path | None = None) -> str:
    """Table and facts of all runs in the folders, as text; writes the report (see the command's help).

    Raises:
        ConfigError: a folder without runs, or the same run twice.
    """
    unfinished = find_unfinished(folders)
    without = [folder for folder in folders if not _has(folder, FILE) and find_unfinished([folder])]
    with_results = [folder for folder in folders if folder not in without]
    groups = group_runs(find_runs(with_results)) if with_results else []
    if output is None and len(folders) == 1 and (folders[0] / "summary").is_dir():
        output = folders[0] / "summary"
    if output is not None:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output} is a file; give a folder for the report")
        title = folders[0].resolve().name if len(folders) == 1 else "runs"
        write_report(output, groups, title=title, unfinished=unfinished)
    parts = [text_table(groups) if groups else "No run is finished yet.", "\n".join(facts(groups))]
    text = "\n\n".join(part for part in [*parts, unfinished_text(unfinished)] if part)
    return text + (f"\nReport: {output / 'report.html'}" if output is not None else "")


def _has(folder: Path, name: str) -> bool:
    return bool(files_below(folder, name))
