"""The report of a comparison put together: which sections it has, and what stands in them.

A section is there where there is something to show. Order: the results and how sure they are, what they cost, how they
came about over the tasks, what single methods do, then how to get the same again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.vocabulary import describe
from avalanche_firn.experiments.report_contrastive import contrastive_curves_drawn, contrastive_tables
from avalanche_firn.experiments.report_dynamics import dynamics_pictures, dynamics_tables
from avalanche_firn.experiments.report_figures import Drawing, curves, label_of
from avalanche_firn.experiments.report_lora import lora_curves_drawn, lora_tables
from avalanche_firn.experiments.report_parts import Block, DataTable, Drawn, Folded, Picture, Report, Section, Text
from avalanche_firn.experiments.report_probes import probe_tables, probe_tags
from avalanche_firn.experiments.report_settings import made_from, repeat_section, settings_section, versions_section
from avalanche_firn.experiments.report_tables import (
    cost_note,
    cost_tables,
    facts,
    mismatches,
    paired_tables,
    result_tables,
)
from avalanche_firn.experiments.report_task_incremental import task_curves, task_tables
from avalanche_firn.experiments.report_text import Table
from avalanche_firn.experiments.report_unfinished import unfinished_curves, unfinished_labels, unfinished_table
from avalanche_firn.experiments.report_words import meanings, paired, result_lines
from avalanche_firn.experiments.results import Group

__all__ = ["build_report"]

_CAUTION = "CAUTION: "
_CURVES = (
    Drawn("accuracy/last", "accuracy over all classes seen"),
    Drawn("accuracy/average", "mean accuracy over tasks seen"),
    Drawn("forgetting/average", "forgetting, mean over the tasks before", "forgetting"),
)
_DRIFT = (
    Drawn("drift/cka", "likeness of the features to those before training (CKA)", "CKA", False),
    Drawn("drift/weights", "distance of the weights from those before training", "relative distance", False),
)
_OWN = re.compile(r"(slca|lorac|cila|lp|zap)/")  # quantities of one method
_TOLD = (
    "cila/bound/",
    "cila/certificate/",
    "cila/contrastive",
    "cila/distillation",
    "cila/floor-active",
    "cila/ratio",
    "lorac/overlap/",
)
"""Among them those that stand in tables."""
_MOST = 12  # curves of single methods; our choice


def build_report(folder: Path, groups: Sequence[Group], *, title: str, unfinished: Sequence[Any] = ()) -> Report:
    """The whole report.

    Args:
        folder: that it will be written to, for the command that makes it again.
        groups: finished runs, in the order of every table; may be empty where some are unfinished.
        title: of the report.
        unfinished: runs that aren't finished, see :mod:`~avalanche_firn.experiments.unfinished`.

    Raises:
        ConfigError: a file of a run that can't be read.
    """
    told = facts(groups)
    cautions = [line.removeprefix(_CAUTION) for line in told if line.startswith(_CAUTION)]
    plain = [line for line in told if not line.startswith(_CAUTION)]
    labels = {label_of(group): group.label for group in groups}
    drawing = Drawing(labels | {name: run.label for run, name in unfinished_labels(unfinished)})
    made = [made_from(label_of(group), group, group.folders) for group in groups]
    ends = [  # before the figures are drawn: a file that can't be read shows at once
        settings_section(made),
        versions_section(made),
        repeat_section(made, folder, [run.folder for run in unfinished]),
        meanings(_tags(groups, unfinished)),
    ]
    sections = [
        _results(groups, drawing),
        _paired(groups, drawing),
        _unfinished(unfinished),
        Section("Accuracy and cost", _costs(groups, drawing)),
        Section("Over the tasks", _courses(_CURVES, groups, unfinished, drawing)),
        Section("Between the tasks", [*drawing.matrices(groups), *drawing.confusion(groups)]),
        Section("With the task given at test time", [*_blocks(task_tables(groups)), *_given(groups, drawing)]),
        Section("Representations", [*_blocks(probe_tables(groups)), *_represented(groups, unfinished, drawing)]),
        Section("Single methods", _single(groups, unfinished, drawing)),
        Section("Dynamics of single tasks", _dynamics(groups, drawing)),
        *ends,
    ]
    lines = result_lines(groups, mismatches(groups)) if groups else ["No run is finished yet."]
    return Report(title, lines, cautions, plain, [section for section in sections if section.blocks])


def _blocks(tables: Iterable[Table]) -> list[Block]:
    return [DataTable(*table) for table in tables]


def _results(groups: Sequence[Group], drawing: Drawing) -> Section:
    known = {label_of(group): i for group in groups if (i := group.interval("accuracy/last")) is not None}
    return Section("Results", [*drawing.ranking(known, "ranking", "last accuracy"), *_blocks(result_tables(groups))])


def _costs(groups: Sequence[Group], drawing: Drawing) -> list[Block]:
    note = cost_note(groups)
    return [*drawing.costs(groups), *(DataTable(*table, note=note) for table in cost_tables(groups))]


def _paired(groups: Sequence[Group], drawing: Drawing) -> Section:
    pairs = paired(groups)
    if not pairs:
        return Section("Paired comparison over the seeds")
    first = pairs[0].first
    count = sum(not group.joint for group in groups) - 1
    others = "every other method" if len(pairs) == count else f"those {len(pairs)} of {count} others that ran"
    words = (
        f"{first}, the highest in these runs, against {others} on the same seeds (same classes, same order, "
        "same data): the interval of the differences leaves out what the seeds share. An interval that excludes zero "
        f"shows a difference; with {len(pairs)} comparisons, each at 95 %, now and then one does so by chance."
    )
    pictures = []
    if any(pair.interval.n > 1 for pair in pairs):
        pictures = [drawing.lead(first, {pair.other: pair.interval for pair in pairs}, "last accuracy")]
    return Section("Paired comparison over the seeds", [Text(words), *pictures, *_blocks(paired_tables(groups))])


def _unfinished(unfinished: Sequence[Any]) -> Section:
    if not unfinished:
        return Section("Unfinished runs")
    words = "No figure of these runs is part of a mean, a ranking or an interval of this report."
    return Section("Unfinished runs", [Text(words), *_blocks([unfinished_table(unfinished)])])


# ------------------------------------------------------------------------ curves
def _course(drawn: Drawn, groups: Sequence[Group], unfinished: Sequence[Any], drawing: Drawing) -> list[Picture]:
    finished = curves(groups, drawn.tag)
    shown = {label_of(group): finished[group.label] for group in groups if group.label in finished}
    lines = shown | unfinished_curves(unfinished, drawn.tag, [group.label for group in groups])
    return drawing.course(lines, drawn, drawn.tag.replace("/", "-"))


def _courses(
    wanted: Iterable[Drawn], groups: Sequence[Group], unfinished: Sequence[Any], drawing: Drawing
) -> list[Picture]:
    return [picture for drawn in wanted for picture in _course(drawn, groups, unfinished, drawing)]


def _given(groups: Sequence[Group], drawing: Drawing) -> list[Picture]:
    return _courses(task_curves(groups), groups, (), drawing)


def _represented(groups: Sequence[Group], unfinished: Sequence[Any], drawing: Drawing) -> list[Picture]:
    """Probes that were measured after every task, and drift."""
    drawn = []
    for tag in probe_tags(groups):
        if all(None not in run["curves"].get(tag, [None]) for group in groups for run in group.runs):
            drawn.append(Drawn(tag, f"mean accuracy over tasks seen after adaptation: {tag.removeprefix('probe/')}"))
    return _courses([*drawn, *_DRIFT], groups, unfinished, drawing)


def _single(groups: Sequence[Group], unfinished: Sequence[Any], drawing: Drawing) -> list[Block]:
    """Tables and curves of what only some methods have."""
    known = [*contrastive_curves_drawn(groups), *lora_curves_drawn(groups)]
    tags = {tag for group in groups for run in group.runs for tag in run["curves"] if _OWN.match(tag)}
    others = sorted(tag for tag in tags - {drawn.tag for drawn in known} if not tag.startswith(_TOLD))
    for tag in others[:_MOST]:
        meaning = describe(tag)
        name = (meaning.title if meaning is not None else "") or tag
        known.append(Drawn(tag, name, meaning.unit if meaning is not None else "", False))
    return [
        *_blocks([*contrastive_tables(groups), *lora_tables(groups)]),
        *_courses(known, groups, unfinished, drawing),
        *drawing.frozen(groups),
    ]


def _dynamics(groups: Sequence[Group], drawing: Drawing) -> list[Block]:
    effects, losses = dynamics_pictures(groups, drawing)
    title = f"Losses of every task over training ({len(losses)} figures)"
    folded = [Folded(title, losses, printed=True)] if losses else []
    return [*_blocks(dynamics_tables(groups)), *effects, *folded]


def _shown(value: Any) -> bool:
    """Zero is a figure; None and an empty curve are none."""
    return value is not None and value != []


def _tags(groups: Sequence[Group], unfinished: Sequence[Any]) -> set[str]:
    """Of everything that the report shows."""
    runs = [run for group in groups for run in group.runs]
    found = {tag for run in runs for part in ("figures", "curves") for tag, value in run[part].items() if _shown(value)}
    found |= {drawn.tag for drawn in _DRIFT if curves(groups, drawn.tag)}
    return found | {drawn.tag for drawn in (*_CURVES, *_DRIFT) for run in unfinished if drawn.tag in run.curves}
