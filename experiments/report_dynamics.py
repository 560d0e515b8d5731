"""The part of a report about zapping and the dynamics of single tasks: totals of effects, heat maps, curves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matplotlib.figure import Figure

from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.evaluation.figures import FONT, WIDTH
from avalanche_firn.experiments.dynamics_results import DYNAMICS
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_figures import Drawing
from avalanche_firn.experiments.report_parts import Picture
from avalanche_firn.experiments.results import Group

__all__ = ["dynamics_facts", "dynamics_pictures", "dynamics_pictures_of", "dynamics_tables"]

_FEW = 6  # methods whose losses are drawn too, two figures each; our choice

_EFFECT = "block-effect"
_CAPTIONS = {
    _EFFECT: "change of every task's loss while a task is trained, on a scale of its own",
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


def dynamics_pictures(groups: Sequence[Group], drawing: Drawing) -> tuple[list[Picture], list[Picture]]:
    """Of the first seed of every method: heat maps of effects; and losses over training, where methods are few."""
    chosen = _measured(groups)
    kinds = [kind for kind in _CAPTIONS if kind == _EFFECT or len(chosen) <= _FEW]
    found = [dynamics_pictures_of(_dynamics(group), kinds) for group in chosen]
    effects: list[Picture] = []
    losses: list[Picture] = []
    for kind in kinds:
        for group, figures in zip(chosen, found, strict=True):
            if kind in figures:
                caption = f"{group.label}: {_CAPTIONS[kind]}, seed {group.seeds[0]}"
                picture = drawing.picture(figures[kind], f"dynamics-{kind}-{group.label}", caption, _told(group))
                (effects if kind == _EFFECT else losses).append(picture)
    return effects, losses


def _dynamics(group: Group) -> Dynamics:
    """Of the first seed."""
    try:
        return Dynamics.from_dict(group.runs[0]["dynamics"])
    except (ValueError, TypeError) as error:
        place = group.folders[0] or group.label
        raise ConfigError(f"the dynamics in the results of {place} aren't as they were written: {error}") from None


def dynamics_pictures_of(dynamics: Dynamics, kinds: Collection[str]) -> dict[str, Figure]:
    """Of :meth:`~avalanche_firn.evaluation.dynamics_result.Dynamics.figures` those named, made to fit a phone."""
    found = {}
    for kind, figure in dynamics.figures().items():
        if kind in kinds:
            width, height = figure.get_size_inches()
            maps = kind == _EFFECT
            figure.set_size_inches(WIDTH, max(2.2, height * WIDTH / width) if maps else min(max(height, 2.4), 3.4))
            for legend in figure.legends:
                legend.remove()
            if kind == "curves":
                figure.legend(loc="outside lower center", frameon=False, fontsize=FONT)
            found[kind] = figure
    return found


def _told(group: Group) -> str:
    known = [(name, group.interval(tag)) for tag, name in DYNAMICS.items()]
    told = [f"{name} {interval.format(1.0, 2)}" for name, interval in known if interval is not None]
    return f"Totals over the tasks, mean over seeds: {'; '.join(told)}" if told else "Totals were not measured"
