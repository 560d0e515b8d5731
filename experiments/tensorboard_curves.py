"""The curves of a dashboard: figures over tasks from ``results.json``, everything else from ``metrics.csv``.

Over tasks the seeds are joined by the index of the task. Over iterations they are joined by the number of the point:
seeds whose tasks have different sizes log at different iterations, and the k-th epoch is the same epoch in all of them;
such a point stands at the median of the seeds' iterations. A file that isn't there, or a quantity that an older
version didn't log, is a curve less. Costs about 0.6 s per million lines of ``metrics.csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avalanche_firn.evaluation.tensorboard import Parts, interval_points
from avalanche_firn.evaluation.vocabulary import VALIDATION, describe
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.results import Group

__all__ = ["by_label", "group_curves", "label_of", "thinned", "unfinished_curves"]

POINTS = 1000  # TensorBoard itself keeps a random choice of as many per curve
_TOTAL = 100_000  # points in all, then curves get shorter: 1.5 s to write
_MOST = 1e15  # a step beyond is a damaged line
FloatArray = NDArray[np.float64]
Curve = tuple[NDArray[np.int64], FloatArray]
"""(T,) steps and (S, T) values, one row per seed, NaN where a seed has none."""
Wanted = Callable[[str], bool]


def group_curves(groups: Sequence[Group], wanted: Wanted, banded: Wanted) -> list[dict[str, Parts]]:
    """The points to draw, of every group.

    Args:
        groups: in any order.
        wanted: which tags are drawn at all.
        banded: which of them get an interval over the seeds beside the mean.

    Returns:
        For each group: tag -> ``{"mean": points}``, with ``lower`` and ``upper`` where the tag is over tasks, banded,
        and some point has two seeds. Joint training has one point, after all tasks: it becomes a level from the first
        to the last task.
    """
    found = [_curves(group, wanted) for group in groups]
    long = [curve for curves in found for curve in curves.values() if len(curve[0]) > 100]
    limit = min(POINTS, max(100, _TOTAL // max(len(long), 1)))
    return [
        {tag: parts for tag, curve in curves.items() if (parts := _parts(group, tag, curve, banded(tag), limit))}
        for group, curves in zip(groups, found, strict=True)
    ]


def unfinished_curves(runs: Sequence[Any], wanted: Wanted) -> dict[str, Parts]:
    """Mean over unfinished runs of one method, tag -> ``{"mean": points}``; ``run.curves`` as in ``results.json``."""
    found = {}
    for tag in dict.fromkeys(tag for run in runs for tag in run.curves if wanted(tag)):
        steps, values = _stacked([run.curves.get(tag, []) for run in runs])
        points = interval_points(values, steps.tolist())
        if points:
            found[tag] = {"mean": points["mean"]}
    return found


def thinned(length: int, limit: int) -> NDArray[np.int64]:
    """Indices of at most ``limit`` points, evenly spaced, the first and the last among them."""
    if length <= limit:
        return np.arange(length)
    return np.linspace(0, length - 1, limit).round().astype(np.int64)


def _parts(group: Group, tag: str, curve: Curve, banded: bool, limit: int) -> Parts:
    steps, values = curve
    chosen = thinned(len(steps), limit)
    steps, values = steps[chosen], values[:, chosen]
    over_tasks = _over_tasks(tag)
    if group.joint and over_tasks and len(steps) == 1:
        last = len(group.runs[0]["stream"]["task_sizes"]) - 1
        steps = np.array([0, last] if last > 0 else [0])
        values = np.repeat(values, len(steps), axis=1)
    if over_tasks and banded:
        return interval_points(values, steps.tolist())
    known = ~np.isnan(values).all(axis=0)
    if not known.any():
        return {}
    mean = np.nanmean(values[:, known], axis=0)
    return {"mean": list(zip(steps[known].tolist(), mean.tolist(), strict=True))}


def _over_tasks(tag: str) -> bool:
    meaning = describe(tag)
    return meaning is not None and meaning.step == "experience"


def _curves(group: Group, wanted: Wanted) -> dict[str, Curve]:
    """All curves of a group; what ``results.json`` has is never taken from ``metrics.csv``."""
    if group.joint:  # of a single step this means nothing, and the table leaves it out too
        some, wanted = wanted, lambda tag: not tag.endswith("accuracy/incremental") and some(tag)
    tags = dict.fromkeys(tag for run in group.runs for tag in run["curves"])
    found = {tag: _stacked([run["curves"].get(tag, []) for run in group.runs]) for tag in tags if wanted(tag)}
    prefix = VALIDATION if group.runs[0]["stream"]["split"] == "validation" else ""
    logged = [
        _logged(folder / "metrics.csv", lambda tag: wanted(tag) and tag not in tags, prefix)
        for folder in group.folders
        if folder is not None
    ]
    for tag in dict.fromkeys(tag for run in logged for tag in run):
        rows = [run[tag] for run in logged if tag in run]
        found[tag] = _joined_by_step(rows) if _over_tasks(tag) else _joined_by_number(rows)
    return {tag: curve for tag, curve in found.items() if curve[1].size and not np.isnan(curve[1]).all()}


def _stacked(rows: Sequence[Sequence[float | None]]) -> Curve:
    """Curves over the index of the task, the shorter ones padded."""
    length = max((len(row) for row in rows), default=0)
    values = np.full((len(rows), length), np.nan)
    for line, row in zip(values, rows, strict=True):
        line[: len(row)] = [np.nan if value is None else value for value in row]
    return np.arange(length), values


def _logged(path: Path, wanted: Wanted, prefix: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Steps and values of the wanted tags, without ``prefix``; none where there is no ``metrics.csv``."""
    found: dict[str, tuple[list[str], list[str]] | None] = {}
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows, None)
            for row in rows:
                if len(row) != 3:  # cut off
                    continue
                step, tag, value = row
                if tag not in found:
                    found[tag] = ([], []) if wanted(tag.removeprefix(prefix)) else None
                lists = found[tag]
                if lists is not None:
                    lists[0].append(step)
                    lists[1].append(value)
        arrays = {}
        for tag, lists in found.items():
            if lists is not None:
                steps, values = (np.array(part, dtype=np.float64) for part in lists)
                if not ((steps >= 0) & (steps < _MOST)).all():
                    raise ValueError(f"{tag} has a step outside 0 to {_MOST:.0e}")
                values[np.isinf(values)] = np.nan  # has no place on a chart, and no mean
                arrays[tag.removeprefix(prefix)] = (steps, values)
    except (ValueError, csv.Error) as error:  # text that is none, a line of something else
        raise ConfigError(f"{path} isn't as it was written: {error}") from None
    except OSError:
        return {}
    return arrays


def _joined_by_step(rows: Sequence[tuple[FloatArray, FloatArray]]) -> Curve:
    steps = np.unique(np.concatenate([row[0] for row in rows]))
    values = np.full((len(rows), len(steps)), np.nan)
    for line, (places, numbers) in zip(values, rows, strict=True):
        line[np.searchsorted(steps, places)] = numbers
    return steps.astype(np.int64), values


def _joined_by_number(rows: Sequence[tuple[FloatArray, FloatArray]]) -> Curve:
    length = max(len(row[0]) for row in rows)
    padded = np.full((2, len(rows), length), np.nan)
    for index, row in enumerate(rows):
        for part, numbers in enumerate(row):
            padded[part, index, : len(numbers)] = numbers
    return np.nanmedian(padded[0], axis=0).round().astype(np.int64), padded[1]


def by_label(groups: Sequence[Group], curves: Sequence[Mapping[str, Parts]]) -> dict[str, dict[str, Parts]]:
    """Label in the dashboard -> curves."""
    return {label_of(group): dict(of) for group, of in zip(groups, curves, strict=True)}


def label_of(group: Group) -> str:
    """Name of a group in the dashboard; joint training says that it isn't continual."""
    return f"{group.label} (upper bound, not continual)" if group.joint else group.label
