"""The pictures of a comparison's dashboard: task matrices on one scale, and maps of what single methods did.

Means over seeds where every seed has the same tasks, else, and for what belongs to one run (frozen matrices, effects
of single tasks), the first seed. Costs 0.1 to 0.3 s a picture, so beyond eight methods only the best have maps of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from avalanche_firn.evaluation.comparison_figures import (
    frozen_map_figure,
    task_confusion_figure,
    task_matrices_figure,
)
from avalanche_firn.evaluation.dynamics_result import Dynamics
from avalanche_firn.evaluation.figures import curves_figure
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.evaluation.statistics import curve_interval
from avalanche_firn.evaluation.task_confusion import confusion_shares
from avalanche_firn.experiments.results import Group
from avalanche_firn.experiments.tensorboard_curves import label_of
from avalanche_firn.experiments.transfer_results import TransferGroup

__all__ = ["dashboard_images", "landscape_images"]

_METHODS = 8  # our choice
_BOUND = "cila/bound/"
_TOGETHER = 12  # matrices in one picture; our choice


def dashboard_images(groups: Sequence[Group]) -> dict[str, Figure]:
    """Tag -> figure that no pyplot manager knows; what the results don't have is left out."""
    images: dict[str, Figure] = {}  # numbered: TensorBoard sorts by name, and the single runs' pictures would be first
    matrices = {label_of(group): matrix for group in groups if (matrix := _matrix(group)) is not None}
    labels = list(matrices)
    for start in range(0, len(labels), _TOGETHER):
        part = {label: matrices[label] for label in labels[start : start + _TOGETHER]}
        which = f", methods {start + 1} to {start + len(part)}" if len(labels) > _TOGETHER else ""
        images[f"1 task matrices/mean over seeds{which}"] = task_matrices_figure(part)
    for group in groups[:_METHODS]:
        run, label = group.runs[0], group.label
        confusion = _confusion(group)
        if confusion is not None:
            images[f"2 confusion of tasks/{label}"] = task_confusion_figure(
                confusion, title=f"{label}: confusion of tasks"
            )
        frozen = (run.get("lora") or {}).get("frozen")
        if frozen:
            title = f"{label}: task after which a matrix was frozen, seed {run['seed']}"
            images[f"3 frozen matrices/{label}"] = frozen_map_figure(frozen, title=title)
        if run.get("dynamics"):
            figure = _block_effect(run["dynamics"])
            if figure is not None:
                images[f"4 block effects/{label}, seed {run['seed']}"] = figure
        bounds = _bounds(group)
        if bounds is not None:
            images[f"5 bounds/{label}"] = bounds
    return images


def _matrix(group: Group) -> NDArray[np.float64] | None:
    """Mean over the seeds; that of the first where they have different tasks."""
    found = [np.asarray(run["accuracy_matrix"], dtype=np.float64) for run in group.runs]
    alike = [matrix for matrix in found if matrix.shape == found[0].shape]
    if found[0].ndim != 2 or 0 in found[0].shape:
        return None
    return np.mean(alike, axis=0) if len(alike) == len(found) else found[0]


def _confusion(group: Group) -> NDArray[np.float64] | None:
    found = [(run.get("task_confusion") or {}).get("counts") for run in group.runs]
    counts = [matrix for matrix in found if matrix is not None]
    if len(counts) < len(found) or len({len(matrix) for matrix in counts}) > 1:
        return None
    return confusion_shares(counts)


def _block_effect(dynamics: Mapping[str, Any]) -> Figure | None:
    try:
        return Dynamics.from_dict(dynamics).figures().get("block-effect")
    except (ValueError, TypeError, KeyError):  # of an older version
        return None


def _bounds(group: Group) -> Figure | None:
    """CILA's bounds on a logarithmic scale, each in a colour of its own: TensorBoard draws all of a run's in one."""
    curves = {}
    for tag in dict.fromkeys(tag for run in group.runs for tag in run["curves"] if tag.startswith(_BOUND)):
        rows = [[np.nan if v is None else v for v in run["curves"].get(tag, [])] for run in group.runs]
        if len({len(row) for row in rows}) == 1 and np.isfinite(rows).any():
            # Only the mean: the lower end of an interval is often negative.
            curves[tag.removeprefix(_BOUND)] = curve_interval(rows)[0][None]
    if not curves:
        return None
    title = f"{group.label}: contrastive loss and its bounds, mean over seeds"
    figure = curves_figure(curves, title=title, ylabel="nats, logarithmic", percent=False)
    axes = figure.axes[0]
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # matplotlib's own writes formulas
    axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def landscape_images(groups: Sequence[TransferGroup], places: Mapping[str, Path]) -> dict[str, Figure]:
    """Landscapes around the continual path of transfer experiments, of each group's first run, where it left one.

    Args:
        groups: of transfer experiments.
        places: digest of a run's configuration -> its folder.
    """
    images = {}
    for group in groups:
        folder = places.get(group.runs[0]["config_digest"])
        stem = None if folder is None else folder / f"landscape-{group.optimizer}"
        if stem is not None and stem.with_name(f"{stem.name}.npz").is_file():
            images[f"landscape/{group.label}"] = Landscape.load(stem).figure()
    return images
