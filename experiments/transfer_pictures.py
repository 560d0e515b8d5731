"""Figures of a report of transfers: accuracy over classes, interference against synergy, dynamics, landscapes.

Curves and bars are over all seeds. What happens to single classes, and landscapes, are those of the first seed and its
first trial, read from the files that the runs left; a run without them costs no more than its figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from avalanche_firn.evaluation.dynamics_result import Dynamics
from avalanche_firn.evaluation.figures import FONT, MUTED, PALETTE, WIDTH, inked, new_figure, plain_texts, tidy, wrapped
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_dynamics import dynamics_pictures_of
from avalanche_firn.experiments.report_figures import Drawing
from avalanche_firn.experiments.report_parts import Block, Folded, Picture, Section
from avalanche_firn.experiments.transfer_results import EFFECTS, TransferGroup
from avalanche_firn.experiments.transfer_run import dynamics_file

__all__ = ["continual_curves", "effects_figure", "transfer_sections"]

Curves = dict[str, NDArray[np.float64]]
_CROWD = 7  # lines that can be told apart at a glance: as many as there are colours
_SHOWN = 6  # pictures of a kind that stand open; more are opened on demand. Our choice
_DYNAMICS = {
    "block-effect": "change of each class's loss while a class is learnt",
    "loss-map": "loss of each class over the continual transfer",
    "curves": "loss of each class over the continual transfer, mean in bold",
}


def continual_curves(groups: Sequence[TransferGroup]) -> list[tuple[tuple[int, ...], Curves]]:
    """Accuracy over the classes learnt so far, groups with the same points together.

    Returns:
        (classes learnt at each point, label -> (S, T) fractions, one row per seed, mean over its trials); a group whose
        seeds have different points is left out.
    """
    found: dict[tuple[int, ...], Curves] = {}
    for group in groups:
        points = {tuple(transfer["logged_after"]) for transfer in group.transfers}
        if len(points) == 1:
            rows = [np.mean(transfer["continual"]["curves"], axis=0) for transfer in group.transfers]
            found.setdefault(points.pop(), {})[group.label] = np.asarray(rows, dtype=np.float64)
    return list(found.items())


@plain_texts
def effects_figure(groups: Sequence[TransferGroup]) -> Figure | None:
    """Bars of every group: interference to the right in red, synergy to the left in blue, as in the heat maps.

    Returns:
        A figure that no pyplot manager knows, lines at the bars' ends for the 95 % intervals over the seeds; None where
        no group has both figures.
    """
    rows = []
    for group in groups:
        harm, gain = group.interval("dynamics/interference"), group.interval("dynamics/synergy")
        if harm is not None and gain is not None:
            rows.append((group.label, harm, gain))
    if not rows:
        return None
    names = [wrapped(label, 22) for label, *_ in rows]
    height = sum(0.1 + 0.17 * max(1 + name.count("\n"), 1.4) for name in names)
    figure = new_figure(WIDTH, height + 1.1)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    look: dict[str, Any] = {"height": 0.7, "error_kw": {"ecolor": MUTED, "elinewidth": 1.2}, "capsize": 3}
    _, harms, gains = zip(*rows, strict=True)
    for name, colour, sign, intervals in (("synergy", PALETTE[0], -1, gains), ("interference", PALETTE[1], 1, harms)):
        widths = [interval.half_width or 0.0 for interval in intervals]
        means = [sign * interval.mean for interval in intervals]
        axes.barh(places, means, xerr=widths if any(widths) else None, color=colour, label=name, **look)
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axes.set_xlabel("nats, summed over all pairs of classes", fontsize=FONT)
    tidy(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=FONT)
    return inked(figure)


def transfer_sections(groups: Sequence[TransferGroup], places: Mapping[str, Path], drawing: Drawing) -> list[Section]:
    """Draw all of them.

    Args:
        groups: in the order of the legends.
        places: digest of a run's configuration -> its folder.
        drawing: of the report.

    Returns:
        Sections with pictures only: accuracy over the classes, effects, single classes, landscapes.

    Raises:
        ConfigError: a file of a run that can't be read.
    """
    effects = effects_figure(groups)
    drawn = []
    if effects is not None:
        caption = "Interference and synergy in the continual transfer, mean over seeds with 95 % intervals"
        drawn.append(drawing.picture(effects, "effects", caption, _effects_told(groups)))
    dynamics = [(group, _dynamics(group, places)) for group in groups]
    blocks: list[Block] = [*drawn]
    for kind, what in _DYNAMICS.items():
        pictures = [
            drawing.picture(found[kind], f"dynamics-{group.label}-{kind}", _caption(group, what), _effect_told(group))
            for group, found in dynamics
            if kind in found
        ]
        if pictures:
            title = f"{what[:1].upper()}{what[1:]} ({len(pictures)} figures)"
            blocks += pictures if len(pictures) <= _SHOWN else [Folded(title, pictures, printed=True)]
    return [
        Section("Continual transfer", _curves(groups, drawing)),
        Section("Effects between classes", blocks),
        Section("Loss landscapes", _landscapes(groups, places, drawing)),
    ]


def _caption(group: TransferGroup, what: str) -> str:
    return f"{group.label}: {what}, seed {group.seeds[0]}, first trial"


def _effect_told(group: TransferGroup) -> str:
    told = [f"{column[1]} {group.cell(column)}" for column in EFFECTS if group.cell(column) != "-"]
    return f"Totals, mean over seeds: {'; '.join(told)}" if told else "Totals were not measured"


def _effects_told(groups: Sequence[TransferGroup]) -> str:
    _, harm, gain, _ = EFFECTS
    return "; ".join(f"{g.label}: interference {g.cell(harm)} nats, synergy {g.cell(gain)} nats" for g in groups)


def _curves(groups: Sequence[TransferGroup], drawing: Drawing) -> list[Picture]:
    """All groups in one picture; where these are many, also one per optimizer."""
    done = []
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    choices = [("", "", list(groups))]
    if len(groups) > _CROWD and len(optimizers) > 1:
        methods = list(dict.fromkeys(group.method for group in groups))
        alike = sorted(groups, key=lambda group: methods.index(group.method))
        choices += [(f"-{name}", f", {name}", [g for g in alike if g.optimizer == name]) for name in optimizers]
    for suffix, which, chosen in choices:
        for number, (points, curves) in enumerate(continual_curves(chosen)):
            caption = f"Accuracy over the classes learnt so far{which}"
            top = (
                1.03 * max(float(values.max()) for values in curves.values()) or 1.0
            )  # bands may go beyond 0 and 100 %
            name = f"continual-accuracy{suffix}{f'-{number + 1}' if number else ''}"
            done.append(drawing.lines(curves, name, caption, xlabel="classes learnt", steps=points, limits=(0.0, top)))
    return done


def _dynamics(group: TransferGroup, places: Mapping[str, Path]) -> dict[str, Figure]:
    run = group.runs[0]
    if run["config_digest"] not in places:
        return {}
    path = dynamics_file(places[run["config_digest"]], group.optimizer)
    if not path.is_file():
        return {}
    try:
        return dynamics_pictures_of(Dynamics.from_dict(json.loads(path.read_text(encoding="utf-8"))), list(_DYNAMICS))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def _landscapes(groups: Sequence[TransferGroup], places: Mapping[str, Path], drawing: Drawing) -> list[Picture]:
    done = []
    for group in groups:
        run = group.runs[0]
        stem = places.get(run["config_digest"], Path()) / f"landscape-{group.optimizer}"
        if run["config_digest"] in places and stem.with_name(f"{stem.name}.npz").is_file():
            try:
                landscape = Landscape.load(stem)
                figure = landscape.figure()
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{stem}.npz can't be read or drawn: {error}") from None
            width, height = figure.get_size_inches()
            figure.set_size_inches(WIDTH, height * WIDTH / width)
            known = landscape.loss[np.isfinite(landscape.loss)]
            told = f"Loss from {known.min():.3g} to {known.max():.3g} nats" if known.size else "No finite loss"
            caption = _caption(group, "loss around the path of the continual transfer")
            done.append(drawing.picture(figure, f"landscape-{group.label}", caption, told))
    return done
