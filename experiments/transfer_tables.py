"""Tables of a report of transfers: results, every seed, zapping against its control, optimizers, chosen rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from avalanche_firn.evaluation.statistics import paired_difference
from avalanche_firn.experiments.report_text import Table
from avalanche_firn.experiments.report_words import NOT_ZERO, difference_cell
from avalanche_firn.experiments.transfer_results import ACCURACIES, COLUMNS, EFFECTS, PROTOCOLS, Column, TransferGroup

__all__ = ["control_pairs", "transfer_tables"]

_ZAP = ("name", "zap", "zap_every", "zap_fraction", "zap_init")
"""Keys of a method in which a control may differ: the last three mean nothing without zaps."""
_PAIRED = f"mean ± 95 % interval of paired differences over seeds; {NOT_ZERO}"
_SAME = ("pretraining/accuracy", "iid/shock")
"""Figures that don't depend on the optimizer: taken before its first step, from the same draws."""


def transfer_tables(groups: Sequence[TransferGroup], configs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The tables of a report.

    Args:
        groups: in the order of the rows.
        configs: stored configurations by the groups' digest; zapping is compared where both sides have one.
    """
    heads = ["method", "optimizer"]
    found: list[Table] = []
    for name, columns in (("Results", ACCURACIES), ("Dynamics of single classes in the continual transfer", EFFECTS)):
        rows = [[group.method, group.optimizer, *(group.cell(column) for column in columns)] for group in groups]
        if columns is ACCURACIES or any(set(row[2:]) != {"-"} for row in rows):
            found.append((name, heads + [heading for _, heading, *_ in columns], rows))
    return [
        *found,
        ("Every seed", *_per_seed(groups)),
        *_zap_tables(groups, configs),
        *_optimizer_tables(groups),
        ("Chosen rates", *_rates(groups)),
    ]


def _all_seeds(groups: Sequence[TransferGroup]) -> list[int]:
    return sorted({seed for group in groups for seed in group.seeds})


def _per_seed(groups: Sequence[TransferGroup]) -> tuple[list[str], list[list[str]]]:
    seeds, rows = _all_seeds(groups), []
    for group in groups:
        known = group.by_seed("continual/accuracy")
        cells = [f"{100 * known[seed]:.2f}" if seed in known else "-" for seed in seeds]
        rows.append([group.method, group.optimizer, *cells])
    return ["continual accuracy %", "optimizer", *(f"seed {seed}" for seed in seeds)], rows


def _rates(groups: Sequence[TransferGroup]) -> tuple[list[str], list[list[str]]]:
    """What each transfer ran with; `edge` marks ends of the grid, `given` a single rate of the configuration."""
    seeds, rows = _all_seeds(groups), []
    for group in groups:
        for protocol, name in PROTOCOLS.items():
            cells = dict.fromkeys(seeds, "-")
            for seed, transfer in zip(group.seeds, group.transfers, strict=True):
                if protocol in transfer["rates"]:
                    sweep = transfer["sweeps"].get(protocol)
                    mark = " (given)" if sweep is None else " (edge)" if sweep["at_edge"] else ""
                    cells[seed] = f"{transfer['rates'][protocol]:g}{mark}"
            if set(cells.values()) != {"-"}:
                rows.append([group.label, name, *cells.values()])
    return ["method, optimizer", "transfer", *(f"seed {seed}" for seed in seeds)], rows


# ----------------------------------------------------------- paired differences
def _difference(first: TransferGroup, second: TransferGroup, column: Column) -> str:
    """Mean and interval of first - second over the common seeds; a dash where one of these has no figure."""
    tag, _, scale, digits = column
    mine, theirs = first.by_seed(tag), second.by_seed(tag)
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common or any(seed not in mine or seed not in theirs for seed in common):
        return "-"
    interval = paired_difference([mine[s] for s in common], [theirs[s] for s in common])
    return difference_cell(interval, scale, digits)


def _differences(
    title: str,
    pairs: Sequence[tuple[str, TransferGroup, TransferGroup]],
    columns: Sequence[Column],
) -> list[Table]:
    """One table, a column per pair and a row per figure: these are more than fit side by side. Empty without pairs."""
    pairs = [pair for pair in pairs if set(pair[1].seeds) & set(pair[2].seeds)]
    rows = [[column[1], *(_difference(a, b, column) for _, a, b in pairs)] for column in columns]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    counts = [str(len(set(a.seeds) & set(b.seeds))) for _, a, b in pairs]
    heads = ["difference", *(heading for heading, *_ in pairs)]
    return [(title, heads, [["common seeds", *counts], *rows])] if pairs and rows else []


def _scope(config: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """What decides a group's figures apart from its method: data, network and the transfer with one optimizer."""
    transfer = dict(config["transfer"])
    own = [section for section in transfer.pop("optimizers") if section["label"] == optimizer]
    parts = {key: config.get(key) for key in ("data", "network", "precision", "dynamics")}
    return parts | {"transfer": transfer, "optimizer": own}


def control_pairs(
    groups: Sequence[TransferGroup], configs: Mapping[str, Mapping[str, Any]]
) -> list[tuple[TransferGroup, TransferGroup, bool]]:
    """(zapping, control, exact) with the same optimizer.

    Exact: nothing but the zaps differs in their configurations. Where a strategy has no exact control, its only
    zapping method and its only other one are a pair too: each side with settings of its own.
    """
    found = []
    for zapping in groups:
        if not zapping.runs[0]["protocol"]["zap"] or zapping.digest not in configs:
            continue
        near = []
        for control in groups:
            if zapping.optimizer != control.optimizer or control.digest not in configs:
                continue
            ours, theirs = configs[zapping.digest], configs[control.digest]
            if control.runs[0]["protocol"]["zap"] or not _alike(ours, theirs, zapping.optimizer):
                continue
            methods = [{k: v for k, v in c["methods"][0].items() if k not in _ZAP} for c in (ours, theirs)]
            if methods[0]["strategy"] == methods[1]["strategy"]:
                near.append((zapping, control, methods[0] == methods[1]))
        exact = [pair for pair in near if pair[2]]
        rivals = [g for g in groups if g.optimizer == zapping.optimizer and _strategy(g) == _strategy(zapping)]
        found += exact or (near if len(rivals) == 2 else [])
    return found


def _alike(ours: Mapping[str, Any], theirs: Mapping[str, Any], optimizer: str) -> bool:
    return _scope(ours, optimizer) == _scope(theirs, optimizer)


def _strategy(group: TransferGroup) -> str:
    return str(group.runs[0]["strategy"])


def _zap_tables(groups: Sequence[TransferGroup], configs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    pairs = control_pairs(groups, configs)
    found = []
    for optimizer in dict.fromkeys(zapping.optimizer for zapping, *_ in pairs):
        title = f"Zapping against its control, {optimizer}: {_PAIRED}"
        own = [pair for pair in pairs if pair[0].optimizer == optimizer]
        if not all(exact for *_, exact in own):
            title += " (*: each side with pre-training settings of its own)"
        chosen = [(f"{a.method} - {b.method}{'' if exact else ' *'}", a, b) for a, b, exact in own]
        found += _differences(title, chosen, COLUMNS)
    return found


def _optimizer_tables(groups: Sequence[TransferGroup]) -> list[Table]:
    """Every two optimizers of a run; SGD, which keeps no state of its own, is the first of a pair."""
    kinds = {g.optimizer: g.transfers[0]["optimizer"]["name"] for g in groups}
    labels = dict.fromkeys(label for group in groups for label in group.runs[0]["optimizers"] if label in kinds)
    columns = [column for column in COLUMNS if column[0] not in _SAME]
    by_key = {(group.digest, group.optimizer): group for group in groups}
    found = []
    for first, second in combinations(sorted(labels, key=lambda label: kinds[label] != "sgd"), 2):
        pairs = [
            (group.method, group, by_key[group.digest, second])
            for group in groups
            if group.optimizer == first and (group.digest, second) in by_key
        ]
        title = f"Optimizers, {first} - {second}: {_PAIRED}"
        found += _differences(title, pairs, columns)
    return found
