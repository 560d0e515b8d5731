"""Tables and files that summarise finished runs: printed table, results.csv, report.md, report.html, pictures.

All figures come from ``results.json`` files, so a report can be made again at any time, of any selection of runs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avalanche_firn.evaluation.figures import curves_figure, save_figure, task_matrix_figure
from avalanche_firn.evaluation.statistics import paired_difference
from avalanche_firn.evaluation.tensorboard import write_summary
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_contrastive import (
    contrastive_curves_drawn,
    contrastive_facts,
    contrastive_tables,
)
from avalanche_firn.experiments.report_dynamics import dynamics_facts, dynamics_pictures, dynamics_tables
from avalanche_firn.experiments.report_html import html_report
from avalanche_firn.experiments.report_lora import lora_curves_drawn, lora_facts, lora_tables
from avalanche_firn.experiments.report_probes import probe_facts, probe_tables, probe_tags
from avalanche_firn.experiments.report_task_incremental import task_curves, task_facts, task_tables, task_tags
from avalanche_firn.experiments.report_text import aligned, file_name, markdown_report
from avalanche_firn.experiments.results import FIGURES, Group, find_runs, group_runs

__all__ = ["facts", "mismatches", "report_folders", "text_table", "write_report"]

_CURVES = (("accuracy/last", "accuracy over all classes seen"), ("accuracy/average", "mean accuracy over tasks seen"))


def _curves(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Tags and captions of what is drawn over the tasks; probes that were measured after every task."""
    drawn = [*_CURVES, *task_curves(groups)]
    for tag in probe_tags(groups):
        if all(None not in run["curves"].get(tag, [None]) for group in groups for run in group.runs):
            drawn.append((tag, f"mean accuracy over tasks seen after adaptation: {tag.removeprefix('probe/')}"))
    return drawn + contrastive_curves_drawn(groups) + lora_curves_drawn(groups)


def label_of(group: Group) -> str:
    """Name of a group in tables; joint training says that it isn't continual."""
    return f"{group.label} (upper bound, not continual)" if group.joint else group.label


def cells(group: Group) -> list[str]:
    """One cell per entry of FIGURES: ``mean ± half width`` of the 95 % interval, a dash where it isn't defined."""
    row = []
    for tag, _, scale, digits in FIGURES:
        interval = group.interval(tag)
        row.append("-" if interval is None else interval.format(scale, digits))
    return row


def text_table(groups: Sequence[Group]) -> str:
    """The table that is printed at the end of a comparison; below it those with the task given and of the probes."""
    heads = ["method", *(head for _, head, *_ in FIGURES)]
    rows = [[label_of(group), *cells(group)] for group in groups]
    more = [*task_tables(groups), *probe_tables(groups)[:1]]
    return "\n\n".join([aligned(heads, rows), *(aligned(*table[1:]) for table in more)])


def facts(groups: Sequence[Group]) -> list[str]:
    """What a reader of the table has to know: where it was measured, on what, over how many seeds."""
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({run["seed"] for run in runs})
    splits = sorted({f"{run['stream']['split']} split of {run['stream']['source']}" for run in runs})
    tags = sorted({f"{run['backbone']['tag']} ({run['backbone']['weights']})" for run in runs})
    devices = sorted({run["cost"]["device"] for run in runs})
    interval = "mean ± 95 % interval over seeds (Student t)" if len(seeds) > 1 else "one seed, so no interval"
    told = {"the probes": probe_tags(groups), "the task-incremental figures": task_tags(groups)}
    apart = " and ".join(name for name, tags_of in told.items() if tags_of)
    identity = f"Apart from {apart} no task identity" if apart else "No task identity"
    lines = [
        f"Measured in these runs on the {', '.join(splits)}; {interval}; seeds {', '.join(map(str, seeds))}.",
        f"Backbone {', '.join(tags)}; device {', '.join(devices)}. {identity} at test time{_replay(groups)}.",
    ]
    diverged = [f"{run['method']} seed {run['seed']}" for run in runs if run["diverged"]]
    lines += [*task_facts(groups), *probe_facts(groups), *contrastive_facts(groups), *lora_facts(groups)]
    lines += dynamics_facts(groups)
    cautions = [
        *mismatches(groups),
        *([f"weights became infinite or NaN in {', '.join(diverged)}"] if diverged else []),
    ]
    return lines + [f"CAUTION: {text}" for text in cautions]


def _replay(groups: Sequence[Group]) -> str:
    """Which methods keep samples of the past, and how many where the results say so."""
    found = []
    for group in groups:
        if any(run["protocol"]["replay"] for run in group.runs):
            slots = sorted({s for run in group.runs if (s := run["protocol"].get("replay_slots")) is not None})
            found.append(f"{group.label} ({' or '.join(map(str, slots))} samples)" if slots else group.label)
    return f"; replay in: {', '.join(found)}" if found else ", no replay"


def mismatches(groups: Sequence[Group]) -> list[str]:
    """Reasons why rows of the table must not be compared with each other; empty if they may."""
    runs = [run for group in groups for run in group.runs]
    found = []
    for what, key in (
        ("the data differ between runs", lambda run: run["stream"]["fingerprint"]),
        ("the evaluated splits differ between runs", lambda run: run["stream"]["split"]),
        ("the backbones' tags differ between runs", lambda run: run["backbone"]["tag"]),
        ("the class orders differ within a seed", lambda run: (run["seed"], tuple(run["stream"]["class_order"]))),
    ):
        values = {key(run) for run in runs}
        allowed = len({run["seed"] for run in runs}) if what.endswith("seed") else 1
        if len(values) > allowed:
            found.append(what)
    seeds = {tuple(group.seeds) for group in groups}
    if len(seeds) > 1:
        found.append("the methods have different seeds: " + "; ".join(f"{g.label} {g.seeds}" for g in groups))
    return found


def _last(group: Group) -> dict[int, float]:
    """Last accuracy by seed."""
    pairs = zip(group.seeds, group.values("accuracy/last"), strict=True)
    return {seed: value for seed, value in pairs if value is not None}


def _per_seed(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    seeds = sorted({seed for group in groups for seed in group.seeds})
    rows = []
    for group in groups:
        known = _last(group)
        rows.append([group.label, *(f"{100 * known[seed]:.2f}" if seed in known else "-" for seed in seeds)])
    return ["last accuracy %", *(f"seed {seed}" for seed in seeds)], rows


def _differences(groups: Sequence[Group]) -> list[list[str]]:
    """The best continual method against every other: paired differences of last accuracy over common seeds."""
    continual = [group for group in groups if not group.joint]
    rows = []
    for other in continual[1:]:
        best = continual[0]
        mine, theirs = _last(best), _last(other)
        common = [seed for seed in best.seeds if seed in mine and seed in theirs]
        if common:
            interval = paired_difference([mine[s] for s in common], [theirs[s] for s in common])
            rows.append([f"{best.label} - {other.label}", interval.format(), str(len(common))])
    return rows


def tables(groups: Sequence[Group]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a report: title, heading, rows."""
    heads = ["method", *(head for _, head, *_ in FIGURES)]
    found = [("Results", heads, [[label_of(group), *cells(group)] for group in groups])]
    found.append(("Every seed", *_per_seed(groups)))
    differences = _differences(groups)
    if differences:
        heading = ["difference of last accuracy", "percent points", "seeds"]
        found.append(("Paired differences (mean ± 95 % interval over common seeds)", heading, differences))
    return [
        *found,
        *task_tables(groups),
        *probe_tables(groups),
        *contrastive_tables(groups),
        *lora_tables(groups),
        *dynamics_tables(groups),
    ]


def _csv(groups: Sequence[Group]) -> str:
    text = io.StringIO()
    tags = [tag for tag, *_ in FIGURES if tag != "seconds"] + ["transfer/backward", "transfer/forward"]
    tags += task_tags(groups)
    tags += sorted({tag for group in groups for run in group.runs for tag in run["figures"] if tag[:6] == "probe/"})
    cost = ["seconds", "images_per_second", "peak_memory_MiB", "trainable_parameters"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "strategy", "seed", "split", *tags, *cost, "config_digest", "weights_sha256"])
    for group in groups:
        for run in group.runs:
            figures = [run["figures"].get(tag) for tag in tags]
            values = [*figures, *(run["cost"].get(name) for name in cost)]
            identity = [group.label, run["strategy"], run["seed"], run["stream"]["split"]]
            end = [run["config_digest"], run["backbone"]["weights_sha256"]]
            writer.writerow([*identity, *("" if value is None else value for value in values), *end])
    return text.getvalue()


def curves(groups: Sequence[Group], tag: str) -> dict[str, Any]:
    """Label -> (seeds, tasks) values of a figure after every task, NaN where there is none."""
    found = {}
    for group in groups:
        rows = [[np.nan if v is None else v for v in run["curves"].get(tag, [])] for run in group.runs]
        if rows and all(rows) and len({len(row) for row in rows}) == 1:
            found[group.label] = np.asarray(rows, dtype=np.float64)
    return found


def _pictures(folder: Path, groups: Sequence[Group]) -> list[tuple[str, Path]]:
    done = []
    for tag, caption in _curves(groups):
        lines = curves(groups, tag)
        if lines:
            name = tag.replace("/", "-")
            done.append((caption, save_figure(curves_figure(lines, title=caption), folder / f"{name}.png")))
    for group in groups:
        matrices = [np.asarray(run["accuracy_matrix"], dtype=np.float64) for run in group.runs]
        if len({matrix.shape for matrix in matrices}) == 1:
            over = f"mean over {len(matrices)} seeds" if len(matrices) > 1 else f"seed {group.seeds[0]}"
            caption = f"{group.label}: accuracy per task, {over}"
            figure = task_matrix_figure(np.mean(matrices, axis=0), title=caption)
            done.append((caption, save_figure(figure, folder / f"matrix-{file_name(group.label)}.png")))
    return done + dynamics_pictures(folder, groups)


def write_report(folder: Path, groups: Sequence[Group], *, title: str) -> None:
    """Write results.csv, report.md, report.html, pictures and the TensorBoard summary into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(_csv(groups), encoding="utf-8")
    pictures = _pictures(folder, groups)
    markdown = markdown_report(title, facts(groups), tables(groups), pictures)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    html = html_report(title, facts(groups), tables(groups), pictures)
    (folder / "report.html").write_text(html, encoding="utf-8")
    write_summary(folder, {tag: curves(groups, tag) for tag, _ in _curves(groups)})


def report_folders(folders: Sequence[Path], output: Path | None = None) -> str:
    """Table and facts of all finished runs in the folders, as text; writes the report (see the command's help).

    Raises:
        ConfigError: a folder without finished runs, or the same run twice.
    """
    groups = group_runs(find_runs(folders))
    if output is None and len(folders) == 1 and (folders[0] / "summary").is_dir():
        output = folders[0] / "summary"
    if output is not None:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output} is a file; give a folder for the report")
        title = folders[0].resolve().name if len(folders) == 1 else "runs"
        write_report(output, groups, title=title)
    lines = [text_table(groups), "", *facts(groups)]
    return "\n".join(lines + ([f"Report: {output / 'report.html'}"] if output is not None else []))
