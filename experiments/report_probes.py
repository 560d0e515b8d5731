"""The part of a report about representations: figures of the probes, and the protocol that they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche_firn.evaluation.statistics import paired_difference
from avalanche_firn.experiments.report_words import NOT_ZERO, difference_cell, shared_seeds
from avalanche_firn.experiments.results import Group

__all__ = ["probe_facts", "probe_tables", "probe_tags"]

Table = tuple[str, list[str], list[list[str]]]


def probe_tags(groups: Sequence[Group]) -> list[str]:
    """Tags of the adaptations that every run has, such as ``probe/knn``, in the order of the first run."""
    runs = [run for group in groups for run in group.runs]
    if not runs:
        return []
    tags = [tag for tag in runs[0]["figures"] if tag.startswith("probe/") and tag.count("/") == 1]
    return [tag for tag in tags if all(tag in run["figures"] for run in runs)]


def probe_tables(groups: Sequence[Group]) -> list[Table]:
    """Average accuracy and forgetting by adaptation, and paired differences; empty without probes."""
    tags = probe_tags(groups)
    if not tags:
        return []
    columns = [(tag, f"{tag.removeprefix('probe/')} %") for tag in tags]
    forgotten = [(f"{tag}/forgetting-max-seen", f"{tag.removeprefix('probe/')} forgetting %") for tag in tags]
    columns += [(tag, head) for tag, head in forgotten if any(group.interval(tag) for group in groups)]
    rows = []
    for group in groups:
        intervals = [group.interval(tag) for tag, _ in columns]
        rows.append([group.label, *("-" if i is None else i.format(100.0, 2) for i in intervals)])
    found: list[Table] = [("Representations (accuracy after adaptation)", ["method", *(h for _, h in columns)], rows)]
    differences = _differences(groups, tags)
    if differences:
        heads = ["difference, percent points", *(tag.removeprefix("probe/") for tag in tags), "seeds"]
        title = f"Paired differences of representations (mean ± 95 % interval over common seeds; {NOT_ZERO})"
        found.append((title, heads, differences))
    return found


def _differences(groups: Sequence[Group], tags: Sequence[str]) -> list[list[str]]:
    """Every continual method against the first of them."""
    continual = [group for group in groups if not group.joint]
    rows = []
    for other in continual[1:]:
        first, cells, common = continual[0], [], []
        for tag in tags:
            mine, theirs = (dict(zip(g.seeds, g.values(tag), strict=True)) for g in (first, other))
            common = [s for s in shared_seeds(first, other) if mine[s] is not None and theirs[s] is not None]
            ours, others = ([float(values[s] or 0.0) for s in common] for values in (mine, theirs))
            cells.append(difference_cell(paired_difference(ours, others)) if common else "-")
        if any(cell != "-" for cell in cells):
            rows.append([f"{first.label} - {other.label}", *cells, str(len(common))])
    return rows


def probe_facts(groups: Sequence[Group]) -> list[str]:
    """One line per protocol; a caution where runs differ in it."""
    protocols: list[list[dict[str, Any]]] = []
    for run in (run for group in groups for run in group.runs):
        found = [probe["protocol"] for probe in run.get("probes", [])]
        if found not in protocols:
            protocols.append(found)
    lines = [_line(protocol) for protocol in (protocols[0] if protocols else [])]
    return lines + (["CAUTION: the protocols of the probes differ between runs"] if len(protocols) > 1 else [])


def _line(p: dict[str, Any]) -> str:
    shots = "all images" if p["shots"] is None else f"{p['shots']:g} images per class"
    parts = []
    if "knn" in p["adapt"]:
        parts.append(f"kNN k={p['k']} T={p['temperature']:g} on the adaptation images")
    if {"linear", "lp_ft"} & set(p["adapt"]):
        l2 = "1/n" if p["l2"] is None else f"{p['l2']}"
        parts.append(f"linear probe by {p['solver']}, l2 {l2}")
    if {"fine_tune", "lp_ft"} & set(p["adapt"]):
        rates = ", ".join(f"{rate:g}" for rate in p["lr"])
        held = " (chosen on held-out adaptation images)" if len(p["lr"]) > 1 else ""
        parts.append(
            f"fine-tuning of all parameters, SGD lr {rates}{held}, momentum {p['momentum']:g}, weight decay "
            f"{p['weight_decay']:g}, {p['epochs']} epochs, batches of {p['batch_size']}"
        )
    identity = "classes compete within their task (task identity used)" if p["task_aware"] else "all classes compete"
    return f"Probes: {'; '.join(parts)}; {shots}, seed {p['seed']}; measured: {p['when']}; {identity}."
