"""The part of a report about zapping and the dynamics of single tasks: totals of effects, heat maps, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.evaluation.figures import save_figure
from avalanche_firn.experiments.dynamics_results import DYNAMICS
from avalanche_firn.experiments.report_text import file_name
from avalanche_firn.experiments.results import Group

__all__ = ["dynamics_facts", "dynamics_pictures", "dynamics_tables"]

_CAPTIONS = {
    "block-effect": "change of every task's loss while a task is trained",
    "loss-map": "loss of every task over training",
    "curves": "loss of every task over training, mean bold",
}


def _measured(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if all(run.get("dynamics") for run in group.runs)]


def dynamics_tables(groups: Sequence[Group]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table: totals per method, mean and interval over seeds."""
    rows = []
    for group in _measured(groups):
        cells = [group.interval(tag) for tag in DYNAMICS]
        rows.append([group.label, *("-" if cell is None else cell.format(1.0, 2) for cell in cells)])
    if not rows:
        return []
    return [("Dynamics of single tasks (losses on evaluated images)", ["method", *DYNAMICS.values()], rows)]


def dynamics_facts(groups: Sequence[Group]) -> list[str]:
    """In words: who zaps, and what the totals mean."""
    lines = []
    zapping = [
        f"{g.label} ({g.runs[0]['protocol']['zapping']})" for g in groups if g.runs[0]["protocol"].get("zapping")
    ]
    if zapping:
        lines.append(f"Rows of the classifier are redrawn while training in: {', '.join(zapping)}.")
    if _measured(groups):
        lines.append(
            "Learning: what training a task took off its own loss; interference and synergy: what it added to and took "
            "off the losses of earlier ones; sums over all tasks. A task without output units yet isn't counted."
        )
    return lines


def dynamics_pictures(folder: Path, groups: Sequence[Group]) -> list[tuple[str, Path]]:
    """Heat maps and curves of the first seed of every method, written to the folder."""
    done = []
    for group in _measured(groups):
        run = group.runs[0]
        safe = file_name(group.label)
        for name, figure in Dynamics.from_dict(run["dynamics"]).figures().items():
            caption = f"{group.label}: {_CAPTIONS[name]}, seed {run['seed']}"
            done.append((caption, save_figure(figure, folder / f"dynamics-{name}-{safe}.png")))
    return done
