"""The tables of a comparison, what a reader of them has to know, and results.csv: all from results.json files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from avalanche_firn.evaluation.statistics import mean_interval
from avalanche_firn.experiments.escapes import csv_cell, one_line
from avalanche_firn.experiments.report_contrastive import contrastive_facts, contrastive_tables
from avalanche_firn.experiments.report_dynamics import dynamics_facts, dynamics_tables
from avalanche_firn.experiments.report_figures import COSTS, MEMORY_OF_PROCESS, label_of, memory_is_shared
from avalanche_firn.experiments.report_lora import lora_facts, lora_tables
from avalanche_firn.experiments.report_probes import probe_facts, probe_tables, probe_tags
from avalanche_firn.experiments.report_task_incremental import task_facts, task_tables, task_tags
from avalanche_firn.experiments.report_text import Table, aligned
from avalanche_firn.experiments.report_words import in_words, last_by_seed, paired
from avalanche_firn.experiments.results import FIGURES, Group
from avalanche_firn.experiments.resume_settings import declared_text

__all__ = [
    "cells",
    "cost_note",
    "cost_tables",
    "facts",
    "mismatches",
    "paired_tables",
    "result_tables",
    "results_csv",
    "tables",
    "text_table",
]


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
    if not groups:
        return []
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
    changed = [f"{run['method']} seed {run['seed']} ({text})" for run in runs if (text := declared_text(run))]
    cautions = [
        *mismatches(groups),
        *([f"resumed with other settings: {', '.join(changed)}"] if changed else []),
        *([f"weights became infinite or NaN in {', '.join(diverged)}"] if diverged else []),
    ]
    return [one_line(line) for line in [*lines, *(f"CAUTION: {text}" for text in cautions)]]


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
    sizes = {(run["seed"], tuple(run["stream"]["task_sizes"])) for run in runs if run["stream"].get("task_sizes")}
    if len(sizes) > len({seed for seed, _ in sizes}):  # joint training is evaluated on the same tasks
        counts = sorted({len(tasks) for _, tasks in sizes})
        found.append(f"the tasks differ within a seed: {' or '.join(map(str, counts))} of them")
    seeds = {tuple(group.seeds) for group in groups}
    if len(seeds) > 1:
        found.append("the methods have different seeds: " + "; ".join(f"{g.label} {g.seeds}" for g in groups))
    return found


# ------------------------------------------------------------------------ tables
def tables(groups: Sequence[Group]) -> list[Table]:
    """The tables of a report: title, heading, rows."""
    return [
        *result_tables(groups),
        *paired_tables(groups),
        *task_tables(groups),
        *probe_tables(groups),
        *contrastive_tables(groups),
        *lora_tables(groups),
        *dynamics_tables(groups),
    ]


def result_tables(groups: Sequence[Group]) -> list[Table]:
    """Figures of every method, and the last accuracy of every run."""
    if not groups:
        return []
    heads = ["method", *(head for _, head, *_ in FIGURES)]
    seeds = sorted({seed for group in groups for seed in group.seeds})
    rows = []
    for group in groups:
        known = last_by_seed(group)
        rows.append([label_of(group), *(f"{100 * known[seed]:.2f}" if seed in known else "-" for seed in seeds)])
    return [
        ("Results", heads, [[label_of(group), *cells(group)] for group in groups]),
        ("Every seed", ["last accuracy %", *(f"seed {seed}" for seed in seeds)], rows),
    ]


def paired_tables(groups: Sequence[Group]) -> list[Table]:
    """The best continual method against every other, over common seeds; empty with one method."""
    rows = [[pair.label, pair.interval.format(), str(pair.interval.n), in_words(pair)] for pair in paired(groups)]
    heads = ["difference of last accuracy", "percent points", "seeds", "in words"]
    return [("Paired differences (mean ± 95 % interval over common seeds)", heads, rows)] if rows else []


def cost_tables(groups: Sequence[Group]) -> list[Table]:
    """What a run of each method cost, mean and interval over the seeds."""
    rows = []
    for group in groups:
        row = [label_of(group)]
        for key, *_ in COSTS:
            known = [run["cost"].get(key) for run in group.runs]
            complete = all(isinstance(value, int | float) for value in known)
            row.append(_cost(key, known) if complete else "-")
        rows.append(row)
    return [("What a run cost", ["method", *(head for _, head, _ in COSTS)], rows)] if rows else []


def cost_note(groups: Sequence[Group]) -> str:
    """What has to be said about the figures of :func:`cost_tables`; empty if nothing."""
    return MEMORY_OF_PROCESS if memory_is_shared(groups) else ""


def _cost(key: str, values: Sequence[float]) -> str:
    if key == "trainable_parameters":
        low, high = min(values), max(values)
        return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    return mean_interval(values).format(1.0, 1)


# --------------------------------------------------------------------------- csv
def results_csv(groups: Sequence[Group]) -> str:
    """One row per run, figures with all their digits, an empty cell where one isn't defined."""
    text = io.StringIO()
    tags = [tag for tag, *_ in FIGURES if tag != "seconds"] + ["transfer/backward", "transfer/forward"]
    tags += task_tags(groups)
    tags += sorted({tag for group in groups for run in group.runs for tag in run["figures"] if tag[:6] == "probe/"})
    cost = ["seconds", "images_per_second", "peak_memory_MiB", "trainable_parameters"]
    writer = csv.writer(text, lineterminator="\n")
    heads = ["method", "strategy", "seed", "split", *tags, *cost, "config_digest", "weights_sha256"]
    writer.writerow([csv_cell(head) for head in heads])
    for group in groups:
        for run in group.runs:
            figures = [run["figures"].get(tag) for tag in tags]
            values = [*figures, *(run["cost"].get(name) for name in cost)]
            identity = [group.label, run["strategy"], run["seed"], run["stream"]["split"]]
            end = [run["config_digest"], run["backbone"]["weights_sha256"]]
            row = [*identity, *("" if value is None else value for value in values), *end]
            writer.writerow([csv_cell(value) for value in row])
    return text.getvalue()
