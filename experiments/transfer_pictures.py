"""Pictures of a report of transfers: accuracy over classes, interference against synergy, dynamics, landscapes.

Curves and bars are over all seeds. What happens to single classes, and landscapes, are those of the first seed and its
first trial, read from the files that the runs left; a run without them costs no more than its picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from avalanche_firn.evaluation.dynamics_result import Dynamics
from avalanche_firn.evaluation.figures import DPI, PALETTE, curves_figure, save_figure
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_text import file_name
from avalanche_firn.experiments.transfer_results import TransferGroup
from avalanche_firn.experiments.transfer_run import dynamics_file

__all__ = ["continual_curves", "effects_figure", "transfer_pictures"]

Curves = dict[str, NDArray[np.float64]]
_CROWD = 7  # lines that can be told apart at a glance: as many as there are colours
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
    figure = Figure(figsize=(7.4, 0.34 * len(rows) + 1.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    look: dict[str, Any] = {"height": 0.7, "error_kw": {"ecolor": "#404040", "elinewidth": 1.2}, "capsize": 3}
    _, harms, gains = zip(*rows, strict=True)
    for name, colour, sign, intervals in (("synergy", PALETTE[0], -1, gains), ("interference", PALETTE[1], 1, harms)):
        widths = [interval.half_width or 0.0 for interval in intervals]
        means = [sign * interval.mean for interval in intervals]
        axes.barh(places, means, xerr=widths if any(widths) else None, color=colour, label=name, **look)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [label for label, *_ in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axes.set_xlabel("nats, summed over all pairs of classes")
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def transfer_pictures(
    folder: Path, groups: Sequence[TransferGroup], places: Mapping[str, Path]
) -> list[tuple[str, Path]]:
    """Draw and save all of them.

    Args:
        folder: of the report.
        groups: in the order of the legends.
        places: digest of a run's configuration -> its folder.

    Returns:
        (caption, PNG file).

    Raises:
        ConfigError: a file of a run that can't be read.
    """
    done = _curves(folder, groups)
    effects = effects_figure(groups)
    if effects is not None:
        caption = "interference and synergy in the continual transfer"
        done.append((caption, save_figure(effects, folder / "effects.png")))
    dynamics = [(group, _dynamics(group, places)) for group in groups]
    for kind, what in _DYNAMICS.items():
        for group, found in dynamics:
            if kind in found:
                path = folder / f"dynamics-{file_name(group.label)}-{kind}.png"
                save_figure(found[kind], path)
                done.append((_caption(group, what), _small(path) if kind == "curves" else path))
    return done + _landscapes(folder, groups, places)


def _caption(group: TransferGroup, what: str) -> str:
    return f"{group.label}: {what}, seed {group.seeds[0]}, first trial"


def _curves(folder: Path, groups: Sequence[TransferGroup]) -> list[tuple[str, Path]]:
    """All groups in one picture; where these are many, also one per optimizer."""
    done = []
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    choices = [("", "", list(groups))]
    if len(groups) > _CROWD and len(optimizers) > 1:
        methods = list(dict.fromkeys(group.method for group in groups))
        alike = sorted(groups, key=lambda group: methods.index(group.method))  # a method has one colour in all of them
        choices += [(f"-{name}", f", {name}", [g for g in alike if g.optimizer == name]) for name in optimizers]
    for suffix, which, chosen in choices:
        for number, (points, curves) in enumerate(continual_curves(chosen)):
            caption = f"continual transfer: accuracy over the classes learnt so far{which}"
            top = (
                1.03 * max(float(values.max()) for values in curves.values()) or 1.0
            )  # bands may go beyond 0 and 100 %
            figure = curves_figure(
                curves, title=f"continual transfer{which}", xlabel="classes learnt", steps=points, limits=(0.0, top)
            )
            name = f"continual-accuracy{suffix}{f'-{number + 1}' if number else ''}"
            done.append((caption, save_figure(figure, folder / f"{file_name(name)}.png")))
    return done


def _dynamics(group: TransferGroup, places: Mapping[str, Path]) -> dict[str, Figure]:
    run = group.runs[0]
    if run["config_digest"] not in places:
        return {}
    path = dynamics_file(places[run["config_digest"]], group.optimizer)
    if not path.is_file():
        return {}
    try:
        return Dynamics.from_dict(json.loads(path.read_text(encoding="utf-8"))).figures()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def _landscapes(folder: Path, groups: Sequence[TransferGroup], places: Mapping[str, Path]) -> list[tuple[str, Path]]:
    done = []
    for group in groups:
        run = group.runs[0]
        stem = places.get(run["config_digest"], Path()) / f"landscape-{group.optimizer}"
        if run["config_digest"] in places and stem.with_name(f"{stem.name}.npz").is_file():
            try:
                figure = Landscape.load(stem).figure()
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{stem}.npz can't be read or drawn: {error}") from None
            path = folder / f"landscape-{file_name(group.label)}.png"
            caption = _caption(group, "loss around the path of the continual transfer")
            done.append((caption, save_figure(figure, path)))
    return done


def _small(path: Path) -> Path:
    """The same picture in 256 colours: of faint lines that cross, a quarter of the bytes; a heat map would suffer."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    reduced.save(path, dpi=(DPI, DPI))
    return path
