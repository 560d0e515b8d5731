"""Tables and files that summarise finished transfer experiments: printed table, results.csv, report.md, report.html.

Numbers come from ``results.json`` files, figures of single classes and landscapes from the files beside them, so a
report can be made again at any time, of any selection of runs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.statistics import paired_difference
from avalanche_firn.experiments.escapes import csv_cell, one_line
from avalanche_firn.experiments.report_figures import Drawing
from avalanche_firn.experiments.report_files import write_files
from avalanche_firn.experiments.report_parts import DataTable, Report, Section
from avalanche_firn.experiments.report_settings import Made, repeat_section, settings_section, versions_section
from avalanche_firn.experiments.report_tensorboard import write_transfer_dashboard
from avalanche_firn.experiments.report_text import aligned
from avalanche_firn.experiments.report_unfinished import unfinished_table
from avalanche_firn.experiments.report_words import Pair, in_words, meanings
from avalanche_firn.experiments.transfer_pictures import continual_curves, transfer_sections
from avalanche_firn.experiments.transfer_results import (
    ACCURACIES,
    COLUMNS,
    PROTOCOLS,
    TransferGroup,
    run_folders_of,
    stored_configs,
    transfer_groups,
)
from avalanche_firn.experiments.transfer_tables import transfer_tables

__all__ = [
    "TransferGroup",
    "transfer_facts",
    "transfer_groups",
    "transfer_mismatches",
    "transfer_table",
    "write_transfer_report",
]

Configs = Mapping[str, Mapping[str, Any]]


def transfer_table(groups: Sequence[TransferGroup]) -> str:
    """The table that is printed at the end of an experiment."""
    heads = ["method", "optimizer", *(heading for _, heading, *_ in COLUMNS)]
    rows = [[group.method, group.optimizer, *(group.cell(column) for column in COLUMNS)] for group in groups]
    return aligned(heads, rows)


# ------------------------------------------------------------------------ facts
def transfer_facts(groups: Sequence[TransferGroup], *, runs_folder: Path | Sequence[Path] | None = None) -> list[str]:
    """What a reader of the table has to know: data, protocol, definitions, and what forbids a comparison.

    Args:
        groups: at least one.
        runs_folder: holds the runs; with it the share of the shock that recovery means is told and compared.
    """
    places = {} if runs_folder is None else run_folders_of(groups, runs_folder)
    return [one_line(line) for line in _facts(groups, stored_configs(groups, places))]


def _facts(groups: Sequence[TransferGroup], configs: Configs) -> list[str]:
    runs = _runs(groups)
    seeds = sorted({run["seed"] for run in runs})
    protocols = [run["protocol"] for run in runs]
    data = _different(runs, lambda run: f"{run['data']['source']}: {run['data']['description']}")
    networks = _different(runs, lambda run: f"{run['network']['name']} ({run['network']['parameters']:,} parameters)")
    devices = _different(runs, lambda run: run["cost"]["device"])
    trials = " or ".join(map(str, sorted({p["trials"] for p in protocols})))
    classes = sorted({p["tasks"] for p in protocols})
    constant = " or ".join(f"{100 / count:.2f}" for count in classes)
    trained = {"all": "all weights are trained", "head": "only the classifier is trained"}
    starts = {"kaiming": "random numbers", "lstsq": "least squares"}
    interval = "mean ± 95 % interval over seeds (Student t)" if len(seeds) > 1 else "one seed, so no interval"
    return [
        f"Measured in these runs on {'; '.join(data)}.",
        f"Network {', '.join(networks)}; device {', '.join(devices)}; {interval}; seeds {', '.join(map(str, seeds))}, "
        f"in each the mean over {trials} trials, that is class orders and draws of the classifier.",
        f"Transfer to {' or '.join(map(str, classes))} classes: "
        f"{' or '.join(dict.fromkeys(trained[p['trainable']] for p in protocols))}, the classifier starts from "
        f"{' or '.join(dict.fromkeys(starts[p['head']] for p in protocols))}; a constant answer would reach "
        f"{constant} %. No task identity at test time; nothing of the pre-training is replayed in the transfer.",
        *_selection(groups),
        *_definitions(groups, configs),
        *(f"CAUTION: {text}." for text in [*_cautions(groups), *transfer_mismatches(groups, configs)]),
    ]


def _runs(groups: Sequence[TransferGroup]) -> list[dict[str, Any]]:
    """Every run once."""
    return list({run["config_digest"]: run for group in groups for run in group.runs}.values())


def _different(runs: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], str]) -> list[str]:
    return list(dict.fromkeys(of(run) for run in runs))


def _searched(groups: Sequence[TransferGroup]) -> dict[str, list[str]]:
    """On which classes rates were chosen, as the results say it -> labels of the groups."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for run, transfer in zip(group.runs, group.transfers, strict=True):
            labels = found.setdefault(run["protocol"]["rates_chosen_on"], []) if transfer["sweeps"] else []
            if group.label not in labels:
                labels.append(group.label)
    return found


def _selection(groups: Sequence[TransferGroup]) -> list[str]:
    searched = _searched(groups)
    chosen = {label for labels in searched.values() for label in labels}
    given = [group.label for group in groups if group.label not in chosen]
    lines = []
    if "validation" in searched:
        own = "for each pre-trained network, optimizer and transfer by itself"
        lines.append(f"Rates were chosen on validation classes, neither pre-trained on nor transferred to, {own}.")
    if given:
        which = "" if len(given) == len(groups) else f" in {'; '.join(given)}"
        lines.append(f"Rates were given in the configuration, not chosen{which}.")
    return lines


def _definitions(groups: Sequence[TransferGroup], configs: Configs) -> list[str]:
    lines = []
    if any(group.never_recovered()[1] for group in groups):
        shares = sorted({c["dynamics"]["recovery_fraction"] for c in configs.values() if c.get("dynamics")})
        share = " or ".join(f"{100 * s:g} %" for s in shares) or "the configured share"
        lines.append(
            "Shock: loss on the transfer classes before the first step of the i.i.d. transfer minus that on held-out "
            f"images of the pre-training classes. Recovery: iterations until at most {share} of the shock was left; "
            "never = not within the transfer, a shock that isn't positive takes 0."
        )
    if any(group.by_seed("dynamics/learning") for group in groups):
        lines.append(
            "First trial of the continual transfer, losses on test images: learning is what a class took off its own "
            "loss while it was learnt, interference what it added to losses of classes learnt before, synergy what it "
            "took off them, each summed over the classes probed; forgetting is the rise of a class's loss from then to "
            "the end, mean over classes."
        )
    return lines


# --------------------------------------------------------------------- cautions
def _cautions(groups: Sequence[TransferGroup]) -> list[str]:
    """Reasons why figures are worth less than they look."""
    found = []
    optimistic = [label for where, labels in _searched(groups).items() if where != "validation" for label in labels]
    if optimistic:
        way = "optimistic, as the released notebooks do"
        found.append(f"rates were chosen on the transfer classes that are reported ({way}) in {'; '.join(optimistic)}")
    for key, name in PROTOCOLS.items():
        sweeps = [(group.label, [t["sweeps"].get(key) for t in group.transfers]) for group in groups]
        edges = [label for label, tried in sweeps if any(sweep and sweep["at_edge"] for sweep in tried)]
        if edges:
            where = "every row" if len(edges) == len(groups) else "; ".join(edges)
            lies = "is at an edge of its grid, a better one may lie outside"
            found.append(f"the rate of the {name} transfer {lies}: {where}")
    diverged = [
        f"{group.label} seed {seed}"
        for group in groups
        for seed, transfer in zip(group.seeds, group.transfers, strict=True)
        if transfer["diverged"]
    ]
    if diverged:
        found.append(f"weights became infinite or NaN in {'; '.join(diverged)}")
    return found


def transfer_mismatches(groups: Sequence[TransferGroup], configs: Configs | None = None) -> list[str]:
    """Reasons why rows of the table must not be compared with each other; empty if they may.

    Args:
        groups: the rows.
        configs: stored configurations by the groups' digest, for what the results don't tell; default none.
    """
    runs, found = _runs(groups), []

    def differs(values: Sequence[Hashable]) -> bool:
        return len(set(values)) > 1

    for what, key in (
        ("the data differ between runs", lambda run: run["data"]["fingerprint"]),
        ("the networks differ between runs", lambda run: (run["network"]["name"], run["network"]["parameters"])),
    ):
        if differs([key(run) for run in runs]):
            found.append(what)
    for field, name in (
        ("trainable", "what the transfer trains"),
        ("head", "the classifier's start"),
        ("tasks", "the number of classes"),
        ("trials", "the number of trials"),
        ("rates_chosen_on", "the classes that rates are chosen on"),
    ):
        values = sorted({str(run["protocol"][field]) for run in runs})
        if len(values) > 1:
            found.append(f"the protocols differ between runs: {name} ({', '.join(values)})")
    for optimizer in dict.fromkeys(group.optimizer for group in groups):
        alike = [transfer for group in groups if group.optimizer == optimizer for transfer in group.transfers]
        if differs([repr(sorted(transfer["optimizer"].items())) for transfer in alike]):
            found.append(f"settings or rates of the optimizer {optimizer} differ between runs")
    for section, name in (("dynamics", "what is probed"), ("transfer", "the transfer")):
        sections = [c.get(section) or {} for c in (configs or {}).values()]
        plain = [repr(sorted((k, v) for k, v in values.items() if k not in _TOLD)) for values in sections]
        if differs(plain):
            found.append(f"the protocols differ between runs: settings of {name}")
    seeds = {group.method: tuple(group.seeds) for group in groups}
    if differs(list(seeds.values())):
        told = "; ".join(f"{method} {list(own)}" for method, own in seeds.items())
        found.append(f"the methods have different seeds: {told}")
    return found


_TOLD = ("optimizers", "trainable", "head", "tasks", "trials", "select")
"""Keys of the two sections that another caution names, or that only choose among a run's rows."""


# ------------------------------------------------------------------------ files
def _csv(groups: Sequence[TransferGroup]) -> str:
    """One row per run and optimizer."""
    tags = ["pretraining/loss", *(tag for tag, *_ in COLUMNS)]
    own = ["name", "momentum", "weight_decay"]
    cost = ["seconds", "pretraining_seconds", "device"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["method", "strategy", "zap", "optimizer", "seed", "data", "rates_chosen_on", "rate_continual", "rate_iid"]
    kind = ["optimizer_name", "momentum", "weight_decay"]
    ends = ["trials", "trials_never_recovered", "diverged", *cost, "config_digest"]
    writer.writerow([*heads, *kind, *tags, *ends])
    for group in groups:
        values = {tag: group.values(tag) for tag in tags}
        for row, (run, transfer) in enumerate(zip(group.runs, group.transfers, strict=True)):
            protocol = run["protocol"]
            never = TransferGroup(group.method, group.optimizer, (run,)).never_recovered()
            cells = [group.method, run["strategy"], protocol["zap"], group.optimizer, run["seed"]]
            cells += [run["data"]["source"], protocol["rates_chosen_on"] if transfer["sweeps"] else "given"]
            cells += [transfer["rates"].get(name) for name in PROTOCOLS]
            cells += [transfer["optimizer"].get(name) for name in own]
            cells += [values[tag][row] for tag in tags]
            cells += [protocol["trials"], never[0] if never[1] else None, transfer["diverged"]]
            cells += [*(run["cost"].get(name) for name in cost), run["config_digest"]]
            writer.writerow(["" if cell is None else csv_cell(cell) for cell in cells])
    return text.getvalue()


def write_transfer_report(
    folder: Path,
    groups: Sequence[TransferGroup],
    *,
    title: str,
    runs_folder: Path | Sequence[Path],
    unfinished: Sequence[Any] = (),
) -> None:
    """Write results.csv, report.md, report.html, figures (SVG) and the TensorBoard summary into `folder`.

    Args:
        folder: of the report; made if needed.
        groups: see :func:`transfer_groups`.
        title: of the report.
        runs_folder: a folder, or several, that holds the runs at any depth. Runs that aren't there have no figures of
            single classes and take no part in the comparison of zapping with its control.
        unfinished: :class:`~avalanche_firn.experiments.unfinished.UnfinishedRun`, listed apart. Default none.

    Raises:
        ConfigError: a file of a run that can't be read; nothing has been written then.
        ValueError: no group.
    """
    if not groups:
        raise ValueError("groups: got none; accepted is at least one")
    places = run_folders_of(groups, runs_folder)
    report = _report(folder, groups, title, places, unfinished)
    found = continual_curves(groups)
    tags = [f"continual/accuracy{f'/{i + 1}' if i else ''}" for i in range(len(found))]
    curves = {tag: curves for tag, (_, curves) in zip(tags, found, strict=True)}
    steps = {tag: points for tag, (points, _) in zip(tags, found, strict=True)}
    write_transfer_dashboard(folder, groups, places, curves, steps=steps)  # first: it reads files of the runs
    write_files(folder, report, _csv(groups))


def _report(
    folder: Path, groups: Sequence[TransferGroup], title: str, places: dict[str, Path], unfinished: Sequence[Any]
) -> Report:
    """Tables first by what they compare, then the figures, then how to get the same again."""
    configs = stored_configs(groups, places)
    told = _facts(groups, configs)
    cautions = [line.removeprefix(_CAUTION) for line in told if line.startswith(_CAUTION)]
    drawing = Drawing({group.label: group.label for group in groups})
    known = {group.label: i for group in groups if (i := group.interval("continual/accuracy")) is not None}
    tables = [DataTable(*table) for table in transfer_tables(groups, configs)]
    paired = [table for table in tables if table.title.startswith(("Zapping against", "Optimizers"))]
    rates = [table for table in tables if table.title == "Chosen rates"]
    results = [table for table in tables if table not in [*paired, *rates]]
    made = _made(groups, places)
    sections = [
        Section("Results", [*drawing.ranking(known, "ranking", "accuracy of the continual transfer"), *results]),
        Section("Unfinished runs", [DataTable(*unfinished_table(unfinished))] if unfinished else []),
        Section("Paired comparisons over the seeds", paired),
        *transfer_sections(groups, places, drawing),
        Section("Learning rates of the transfers", rates),
        settings_section(made),
        versions_section(made),
        repeat_section(made, folder, [run.folder for run in unfinished]),
        meanings(["pretraining/loss", *(tag for tag, *_ in COLUMNS)]),
    ]
    lines = _result(groups, transfer_mismatches(groups, configs))
    plain = [line for line in told if not line.startswith(_CAUTION)]
    return Report(title, lines, cautions, plain, [section for section in sections if section.blocks])


_CAUTION = "CAUTION: "


def _made(groups: Sequence[TransferGroup], places: Mapping[str, Path]) -> list[Made]:
    """One line per way of pre-training: its optimizers share a configuration."""
    found = {}
    for group in groups:
        if group.digest not in found:
            runs = [(run["seed"], places.get(run["config_digest"])) for run in group.runs]
            found[group.digest] = Made(group.method, str(group.runs[0]["method"]), runs)
    return list(found.values())


def _result(groups: Sequence[TransferGroup], mismatches: Sequence[str]) -> list[str]:
    """The result in a sentence; nothing is ranked where the rows must not be compared."""
    known = [group for group in groups if group.interval("continual/accuracy") is not None]
    if not known:
        return []
    if mismatches:
        return [f"These rows must not be ranked: {'; '.join(mismatches)}."]
    best = known[0]
    column = next(column for column in ACCURACIES if column[0] == "continual/accuracy")
    words = f"{best.label} reached the highest accuracy of the continual transfer, {best.cell(column)} %"
    if len(known) < 2:
        return [f"{best.label} reached an accuracy of the continual transfer of {best.cell(column)} %."]
    mine, theirs = best.by_seed(column[0]), known[1].by_seed(column[0])
    common = [seed for seed in best.seeds if seed in mine and seed in theirs]
    if common:
        interval = paired_difference([mine[s] for s in common], [theirs[s] for s in common])
        pair = Pair(best.label, known[1].label, interval)
        words += f", {pair.interval.format()} percent points above {known[1].label}, the next ({in_words(pair)})"
    return [f"{words}."]
