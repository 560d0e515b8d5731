"""The shipped recipes as a table: methods, benchmark, backbone, cost, and the best figure that others report.

Read from the recipes alone, without torch, so ``firn recipes ls`` answers at once. Recipes are grouped by the papers
that they follow. What has to be declared of a method (joint training, stored samples, votes per test batch) follows
from its configuration and is told by :func:`declared`, also to the table of reproductions.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from avalanche_firn.experiments.about_sections import CostConfig, TargetConfig
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.recipe import list_recipes, load_experiment
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = [
    "JOINT",
    "PAPERS",
    "VOTE",
    "backbone_of",
    "best_target",
    "cost_text",
    "declared",
    "hours_text",
    "recipes_by_paper",
    "recipes_text",
]

Experiment = Config | TransferExperiment

PAPERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("SLCA, SLCA++ (arXiv 2303.05118, 2408.08295)", ("digits", "slca", "baselines", "domainnet")),
    ("LoRAC-IPC (arXiv 2504.13407)", ("lorac",)),
    ("LP-FT (arXiv 2302.13289)", ("lp_ft",)),
    ("CILA, Co2L (arXiv 2405.18756, 2106.14413)", ("cila", "co2l")),
    ("Zapping (arXiv 2310.07996, 2507.01559)", ("zapping",)),
)
"""Headings and how the names of their recipes begin; what begins otherwise comes last."""
_OTHERS = "Several papers"
JOINT = "joint training, not continual"
VOTE = "one vote per test batch: leaks the task"
_WIDTH = 160  # of a line that goes into a file or a pipe
_NARROW = 18  # no column is squeezed further
_GAP = "  "


@functools.cache
def _shipped(name: str) -> Experiment:
    """A shipped recipe, read once: it doesn't change while a process runs."""
    return load_experiment(name)


def recipes_by_paper(names: Iterable[str] | None = None) -> dict[str, list[Experiment]]:
    """The shipped recipes by heading, in a fixed order; headings without any are left out.

    Args:
        names: those that are wanted; None = all.

    Raises:
        ConfigError: a recipe that isn't valid.
    """
    wanted = None if names is None else set(names)
    found: dict[str, list[Experiment]] = {heading: [] for heading in (*(h for h, _ in PAPERS), _OTHERS)}
    for recipe in list_recipes():
        if wanted is None or recipe.name in wanted:
            heading = next((h for h, starts in PAPERS if recipe.name.startswith(starts)), _OTHERS)
            found[heading].append(_shipped(recipe.name))
    return {heading: recipes for heading, recipes in found.items() if recipes}


# ------------------------------------------------------------------ one recipe
def _holds(values: Any, key: str) -> bool:
    """Whether a section has a key at any depth."""
    return isinstance(values, Mapping) and (key in values or any(_holds(value, key) for value in values.values()))


def declared(config: Experiment, label: str) -> list[str]:
    """What whoever compares a method's figures must know about it, in words; mostly nothing.

    Raises:
        KeyError: no method has that label.
    """
    method = {m.name: m for m in config.methods}[label]
    if isinstance(config, TransferExperiment):
        found = ["replay of pre-training images, in the pre-training"] * (method.strategy in ("asb", "meta_asb"))
        searched = any(len(optimizer.rates) > 1 for optimizer in config.transfer.optimizers)
        if searched and config.transfer.select == "test_envelope":
            found.append("rates chosen on the transfer classes")
        return found
    values = method.model_dump()
    found = [JOINT] if method.strategy == "joint" else []
    found += ["replay"] if _holds(values, "mem_size") else []
    return found + ([VOTE] if (values.get("task_inference") or {}).get("batchwise_vote") else [])


def backbone_of(config: Experiment) -> str:
    """Name of the network, and whether it starts from random weights."""
    if isinstance(config, TransferExperiment):
        return config.network.name
    return config.backbone.name if config.backbone.pretrained else f"{config.backbone.name} (scratch)"


def best_target(config: Experiment) -> TargetConfig | None:
    """The highest figure that others report of a method of the recipe, of the first kind that the recipe names.

    Methods that aren't continual or leak the task are left aside where there are others. None where none is known.
    """
    known = [target for target in config.targets if target.method in {m.name for m in config.methods}]
    if not known:
        return None
    same = [target for target in known if target.figure == known[0].figure]
    fair = [target for target in same if not {JOINT, VOTE} & set(declared(config, str(target.method)))]
    return max(fair or same, key=lambda target: target.value)


def hours_text(cost: CostConfig | None) -> str:
    """Hours of a run in two digits, with ~ where they are an estimate; a dash where they aren't known."""
    if cost is None:
        return "-"
    hours = cost.hours_per_run
    return ("~" if cost.basis == "estimate" else "") + (f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}")


def cost_text(config: Experiment) -> str:
    """The cost in a sentence without its point."""
    cost = config.cost
    if cost is None:
        return "cost not known"
    runs = len(config.methods) * len(config.seeds)
    count = f"{runs} run{'s' if runs > 1 else ''}"
    return (
        f"{count}, {cost.memory_gb:g} GB of memory and {hours_text(cost).removeprefix('~')} h each on "
        f"{cost.device} ({'an estimate' if cost.basis == 'estimate' else 'measured'})"
    )


# ------------------------------------------------------------------- the lists
def _cells(config: Experiment) -> list[str]:
    best = best_target(config)
    return [
        config.name,
        ", ".join(method.name for method in config.methods),
        config.benchmark or "-",
        backbone_of(config),
        "-" if config.cost is None else f"{config.cost.memory_gb:g}",
        hours_text(config.cost),
        "-" if best is None else f"{best.method} {best.value:g} ({best.standing})",
    ]


_HEADS = ("recipe", "methods", "benchmark", "backbone", "GB", "hours", "best figure of others, %")
_WRAPPED = (1, 2, 6)
"""Columns whose cells may take several lines."""


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    parts = [
        textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]
        for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, parts))
    rows = zip(*(part + [""] * (height - len(part)) for part in parts), strict=True)
    return [_GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]


def _table(groups: Mapping[str, Sequence[Experiment]], width: int) -> str:
    tables = {heading: [_cells(config) for config in recipes] for heading, recipes in groups.items()}
    rows = [_HEADS, *(row for table in tables.values() for row in table)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    longest_word = [max(len(word) for row in rows for word in row[i].split()) for i in range(len(_HEADS))]
    fixed = sum(w for i, w in enumerate(widths) if i not in _WRAPPED) + len(_GAP) * (len(widths) - 1)
    free, left = width - fixed, len(_WRAPPED)
    for i in sorted(_WRAPPED, key=lambda i: widths[i]):  # what a narrow column doesn't need goes to the others
        widths[i] = min(widths[i], max(free // left, longest_word[i], _NARROW))
        free, left = free - widths[i], left - 1
    lines = [*_lines(_HEADS, widths), _GAP.join("-" * w for w in widths)]
    for heading, table in tables.items():
        lines += ["", heading, *(line for row in table for line in _lines(row, widths))]
    return "\n".join(lines)


def _long(groups: Mapping[str, Sequence[Experiment]], width: int) -> str:
    lines: list[str] = []
    for heading, recipes in groups.items():
        lines += ["", heading, "=" * len(heading)] if lines else [heading, "=" * len(heading)]
        for config in recipes:
            methods = ", ".join(method.name for method in config.methods)
            told = [config.description, f"{config.benchmark or '-'}; {backbone_of(config)}", f"methods: {methods}"]
            lines += ["", config.name]
            for text in (*told, cost_text(config)):
                lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
            for target in config.targets:
                text = f"{target.label}, {target.figure}: {target.text()} % ({target.standing}: {target.source})"
                lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)


def recipes_text(*, long: bool = False, width: int | None = None) -> str:
    """The list of ``firn recipes ls``: plain text, recipes grouped by paper.

    Args:
        long: description, cost and all figures of others instead of a line per recipe.
        width: columns of a line, at least 80; None = 160. Names are never broken, so a line may be longer.
    """
    groups = recipes_by_paper()
    columns = max(width or _WIDTH, 80)
    if long:
        return _long(groups, columns)
    notes = (
        "GB: memory of a run, hours: time of a run, with ~ an estimate. Figures of others: code = printed in the "
        "authors' repository, abstract = in the paper's abstract, secondary = quoted by others. "
        "firn recipes ls --long tells all of them, firn recipes show NAME a whole recipe."
    )
    return "\n".join([_table(groups, columns), "", *textwrap.wrap(notes, columns)])
