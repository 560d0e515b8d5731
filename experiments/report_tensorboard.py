"""The TensorBoard dashboard of a comparison: charts over all methods, the hparams table, pictures and texts.

Everything is read from the runs' ``results.json``, ``metrics.csv`` and ``config.yaml``, so a dashboard can be made
again at any time, of any selection of runs, and while a TensorBoard looks at it. What an older run doesn't have is a
chart less. Cost: reading the CSV files (0.6 s per million lines), 13 microseconds per point, 0.1 to 0.3 s per picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from avalanche_firn.evaluation.summary_run import Category, Lines, Margin, write_runs
from avalanche_firn.evaluation.tensorboard import GROUP, Parts, margin_chart, summary_tag, write_summary
from avalanche_firn.evaluation.vocabulary import VOCABULARY, describe
from avalanche_firn.experiments.results import Group
from avalanche_firn.experiments.tensorboard_curves import by_label, group_curves, unfinished_curves
from avalanche_firn.experiments.tensorboard_images import dashboard_images, landscape_images
from avalanche_firn.experiments.tensorboard_table import group_settings, planned, table_columns
from avalanche_firn.experiments.tensorboard_texts import HOW_TO_READ, dashboard_texts
from avalanche_firn.experiments.transfer_results import TransferGroup

__all__ = ["write_dashboard", "write_transfer_dashboard"]


@dataclass(frozen=True)
class _Section:
    """Tags that are drawn together. ``name``: in front of their tags, sorted before the single runs' small letters."""

    name: str
    title: str
    starts: tuple[str, ...]
    banded: bool = False


_SECTIONS = (
    _Section(GROUP, "Accuracy and forgetting", ("accuracy/", "forgetting/", "transfer/"), banded=True),
    _Section("Task given", "Accuracy with the true task given", ("task-il/",), banded=True),
    _Section("Probes", "Probes of the representation", ("probe/",), banded=True),
    _Section("Drift", "Drift of the representation", ("drift/",), banded=True),
    _Section("Learning rates and losses", "Learning rates and losses", ("lr/", "loss/")),
    _Section("SLCA", "SLCA: alignment", ("slca/",)),
    _Section("LoRAC-IPC", "LoRAC-IPC: importance and frozen matrices", ("lorac/",)),
    _Section("CILA", "CILA: coefficient and bounds", ("cila/", "classifier/")),
    _Section("LP-FT", "LP-FT: linear probe", ("lp/",)),
    _Section("Zapping and dynamics", "Zapping, interference and recovery", ("zap/", "dynamics/")),
    _Section("Cost", "Cost", ("efficiency/",)),
)
_BOUNDS = ("cila/bound/", "cila/certificate/")  # of one method in one chart: they bound the same quantity
_OPEN = 2  # sections that aren't folded at first
_UNFINISHED = "(unfinished)"


def _section(tag: str) -> _Section | None:
    """Where a tag is drawn; None for those that aren't: single tasks, phases, pictures, Avalanche's own."""
    meaning = describe(tag)
    if meaning is None or meaning.step == "once" or meaning.pattern.endswith("task-K"):
        return None
    return next((section for section in _SECTIONS if tag.startswith(section.starts)), None)


def _wanted(tag: str) -> bool:
    return _section(tag) is not None


def _banded(tag: str) -> bool:
    section = _section(tag)
    return section is not None and section.banded


def write_dashboard(
    folder: Path, groups: Sequence[Group], *, unfinished: Sequence[Any] = ()
) -> dict[str, dict[str, Parts]]:
    """Writes the summary of a comparison for TensorBoard, replacing an older one; other files stay.

    Args:
        folder: of the summary, e.g. ``runs/NAME/summary``; made if needed.
        groups: see :func:`~avalanche_firn.experiments.results.group_runs`, in the order of the legends.
        unfinished: runs without results, with ``label``, ``folder``, ``group_digest``, ``curves`` (tag -> values over
            the tasks) and ``tasks_done``. A method of which no run is finished is drawn as ``METHOD (unfinished)``.

    Returns:
        What was written: method, as the dashboard calls it -> tag -> ``{"mean" | "lower" | "upper": [(step, value)]}``.
        TensorBoard's names: run ``METHOD`` below ``folder``
        (:func:`~avalanche_firn.evaluation.summary_run.run_names`), tag
        :func:`~avalanche_firn.evaluation.tensorboard.summary_tag`.
    """
    written = by_label(groups, group_curves(groups, _wanted, _banded))
    waiting = _waiting(groups, unfinished)
    written |= {label: unfinished_curves(runs, _wanted) for label, runs in waiting.items()}
    tags = list(dict.fromkeys(tag for curves in written.values() for tag in curves))
    settings = group_settings(groups)
    texts = dashboard_texts(
        groups,
        settings,
        tags,
        unfinished={label: _progress(runs) for label, runs in waiting.items()},
    )
    write_runs(
        folder,
        {label: _tagged(label, curves) for label, curves in written.items()},
        layout=_layout(written),
        images=dashboard_images(groups),
        texts=texts,
        columns=table_columns(groups, settings, tags=tags, plan=planned(folder)),
    )
    return written


def _waiting(groups: Sequence[Group], unfinished: Sequence[Any]) -> dict[str, list[Any]]:
    """Unfinished runs of methods without a finished one, by the name that they get."""
    digests = {run.get("group_digest") for group in groups for run in group.runs}
    methods = {run["method"] for group in groups for run in group.runs}
    found: dict[tuple[str, str], list[Any]] = {}
    for run in unfinished:
        digest = getattr(run, "group_digest", "")
        if not (digest in digests if digest else run.label in methods):
            found.setdefault((run.label, digest), []).append(run)
    labels = [label for label, _ in found]
    return {  # never a mean over two configurations
        f"{label} [{digest[:6] or 'other version'}] {_UNFINISHED}"
        if labels.count(label) > 1
        else f"{label} {_UNFINISHED}": runs
        for (label, digest), runs in found.items()
    }


def _progress(runs: Sequence[Any]) -> str:
    return ", ".join(f"seed {run.seed}: {run.tasks_done} tasks" for run in runs)


def _tag(label: str, tag: str) -> str:
    """Tag of a mean. Bounds carry the method's name too, since a chart can't choose among runs."""
    section = _section(tag)
    name = GROUP if section is None else section.name
    return f"{name}/{label}: {tag}" if tag.startswith(_BOUNDS) else summary_tag(tag, group=name)


def _tagged(label: str, curves: Mapping[str, Parts]) -> dict[str, list[tuple[int, float]]]:
    return {
        _tag(label, tag) if part == "mean" else summary_tag(tag, part): points
        for tag, parts in curves.items()
        for part, points in parts.items()
    }


def _layout(written: Mapping[str, Mapping[str, Parts]]) -> list[Category]:
    categories: list[Category] = []
    for section in _SECTIONS:
        tags = sorted({t for curves in written.values() for t in curves if _section(t) is section}, key=_place)
        charts: list[Lines | Margin] = [
            Lines(_title(tag), (_tag("", tag),)) for tag in tags if not tag.startswith(_BOUNDS)
        ]
        charts += _bounds(written, tags)
        if charts:
            over = " (mean over seeds)" if section.banded else ""
            categories.append(Category(f"{section.title}{over}", tuple(charts), closed=len(categories) >= _OPEN))
        bands = [tag for tag in tags if any("lower" in curves.get(tag, {}) for curves in written.values())]
        if bands:
            title = f"{section.title} (95 % intervals over seeds)"
            # TensorBoard (2.21) draws the margin charts of a section from the last to the first.
            margins = tuple(margin_chart(tag, section.name) for tag in reversed(bands))
            categories.append(Category(title, margins, closed=len(categories) >= _OPEN))
    return categories


def _place(tag: str) -> tuple[int, str]:
    """Order of the charts of a section: that of the vocabulary, then by name."""
    meaning = describe(tag)
    return (len(VOCABULARY) if meaning is None else VOCABULARY.index(meaning), tag)


def _bounds(written: Mapping[str, Mapping[str, Parts]], tags: Sequence[str]) -> list[Lines | Margin]:
    """One chart of each method's bounds and one of its certificate."""
    charts: list[Lines | Margin] = []
    for start, what in zip(
        _BOUNDS, ("bounds of the contrastive loss", "certificate of the earlier tasks"), strict=True
    ):
        for label, curves in written.items():
            mine = [tag for tag in tags if tag.startswith(start) and tag in curves]
            if mine:
                charts.append(Lines(f"{label}: {what}", tuple(_tag(label, tag) for tag in mine)))
    return charts


def _title(tag: str) -> str:
    meaning = describe(tag)
    over = "tasks" if meaning is not None and meaning.step == "experience" else "iterations"
    return f"{tag} over {over}"


def write_transfer_dashboard(
    folder: Path,
    groups: Sequence[TransferGroup],
    places: Mapping[str, Path],
    curves: Mapping[str, Mapping[str, ArrayLike]],
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, Parts]]:
    """The summary of transfer experiments: the given curves, and the landscapes that the runs left.

    Args:
        folder, curves, steps: see :func:`~avalanche_firn.evaluation.tensorboard.write_summary`, which writes them.
        groups: of transfer experiments.
        places: digest of a run's configuration -> its folder.
    """
    images = landscape_images(groups, places)
    return write_summary(folder, curves, steps=steps, images=images, texts={"1 how to read this": HOW_TO_READ})
