"""What the scalar logger leaves out: hyper-parameters, configuration text, and the summary run of a comparison.

Everything of one run goes into the run's own event file, through the ``writer`` of Avalanche's ``TensorboardLogger``.
``SummaryWriter.add_hparams`` would open a second event file in a sub-folder, and TensorBoard would list that as a run
of its own. The summary run holds, per metric and method, the mean over seeds and its interval as three scalar tags
over the experience index, and a custom-scalars layout that draws them: one chart per metric with all methods, and one
margin chart per metric and method.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from avalanche_firn.evaluation.statistics import curve_interval


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """One level of ``a.b.c`` keys with values that the hparams table can show; lists as JSON, None as "none"."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None:
            flat[f"{prefix}{key}"] = "none"
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = json.dumps(list(value)) if isinstance(value, (list, tuple)) else str(value)
    return flat


def log_hparams(
    writer: SummaryWriter, hparams: Mapping[str, Any], metrics: Iterable[str] | Mapping[str, float | None]
) -> None:
    """Writes a run's row of the HPARAMS table into the run's own event file.

    Args:
        writer: of the run, e.g. ``TensorboardLogger(...).writer``. Write once per run: TensorBoard keeps the first row.
        hparams: nested mappings allowed, see :func:`flatten`. Booleans are written as "true" and "false", because
            torch's helper turns them into numbers.
        metrics: tags of scalars *that this run has written*: the table shows the last point of each. A mapping gives
            values for tags that it has not: each is written as a scalar at step 0; None values are left out.

    Raises:
        ValueError: no hyper-parameter.
    """
    if not hparams:
        raise ValueError("hparams: got nothing; accepted is at least one hyper-parameter")
    row = {k: str(v).lower() if isinstance(v, bool) else v for k, v in flatten(hparams).items()}
    values = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    if isinstance(metrics, Mapping):
        values = {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
    file_writer = writer._get_file_writer()  # the public attribute is None until something was written
    for summary in hparams_summaries(row, values):
        file_writer.add_summary(summary)
    for tag, value in values.items():
        if value is not None:
            writer.add_scalar(tag, value, 0)
    writer.flush()


def log_text_config(writer: SummaryWriter, config: str, tag: str = "config") -> None:
    """Shows a configuration (resolved YAML, a command line, ...) verbatim under TEXT at step 0."""
    # An indented block is verbatim in Markdown whatever the text contains; a fence could be closed by it.
    writer.add_text(tag, "\n".join(f"    {line}" for line in config.splitlines()), 0)
    writer.flush()


def write_summary(
    directory: str | Path,
    curves: Mapping[str, Mapping[str, ArrayLike]],
    confidence: float = 0.95,
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Writes the summary run of a comparison, replacing an older one.

    Args:
        directory: folder of the run, e.g. ``runs/NAME/summary``; event files in it are replaced, other files stay.
        curves: metric tag -> method -> (S, T) values, one row per seed, over the experience index; NaN where a seed has
            no value. Rows of unequal length are padded with NaN.
        confidence: of the intervals (Student t).
        steps: metric tag -> step number of each point, at least as many as its longest curve has; metrics that are left
            out count from 0.

    Returns:
        The points written: ``METRIC/METHOD`` -> ``{"mean" | "lower" | "upper": [(step, value)]}``, the scalar tag being
        ``METRIC/METHOD/mean`` and so on. Where no point has two seeds there is no interval and no margin chart.

    Raises:
        ValueError: a method without seeds, steps of a metric that isn't there, fewer steps than points. Nothing has
            been deleted or written then.
    """
    padded = {metric: {method: _padded(rows) for method, rows in m.items()} for metric, m in curves.items()}
    places = _checked_steps(padded, steps or {})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    written: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with SummaryWriter(str(directory)) as writer:
        for metric, methods in padded.items():
            for method, rows in methods.items():
                parts = zip(("mean", "lower", "upper"), curve_interval(rows, confidence), strict=True)
                points = {
                    part: [(t, float(v)) for t, v in zip(places[metric], curve, strict=False) if not np.isnan(v)]
                    for part, curve in parts
                }
                written[f"{metric}/{method}"] = points = {part: curve for part, curve in points.items() if curve}
                for part, curve in points.items():
                    for step, value in curve:
                        writer.add_scalar(f"{metric}/{method}/{part}", value, step)
        writer.add_custom_scalars(_layout(curves, written))
    return written


def _checked_steps(
    curves: Mapping[str, Mapping[str, np.ndarray]], steps: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Step numbers of every metric."""
    if unknown := sorted(set(steps) - set(curves)):
        raise ValueError(f"steps: got the metrics {unknown}; accepted are those of the curves, {sorted(curves)}")
    found = {}
    for metric, methods in curves.items():
        length = max((rows.shape[1] for rows in methods.values()), default=0)
        found[metric] = [int(step) for step in steps.get(metric, range(length))]
        if len(found[metric]) < length:
            got = f"{len(found[metric])} for {metric}, whose longest curve has {length} points"
            raise ValueError(f"steps: got {got}; accepted is a step for each point")
    return found


def _padded(seeds: ArrayLike | Sequence[Sequence[float]]) -> np.ndarray:
    rows = [np.asarray(row, dtype=np.float64) for row in seeds]  # type: ignore[union-attr]
    if not rows:
        raise ValueError("curves: got a method without seeds; accepted is at least one row of values")
    length = max(row.size for row in rows)
    return np.stack([np.pad(row, (0, length - row.size), constant_values=np.nan) for row in rows])


def _layout(curves: Mapping[str, Mapping[str, Any]], written: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Chart layout: tags of multi-line charts are regular expressions that match from the start, margins are tags."""
    overview = {
        metric: ["Multiline", [f"{re.escape(f'{metric}/{method}/mean')}$" for method in methods]]
        for metric, methods in curves.items()
    }
    layout: dict[str, dict[str, list[Any]]] = {"all methods (mean over seeds)": overview}
    for metric, methods in curves.items():
        names = [f"{metric}/{method}" for method in methods if "lower" in written[f"{metric}/{method}"]]
        charts = {name: ["Margin", [f"{name}/mean", f"{name}/lower", f"{name}/upper"]] for name in names}
        if charts:
            layout[f"{metric} (interval over seeds)"] = charts
    return layout


def read_scalars(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a run: tag -> ``[(step, value)]`` in the order written, nothing sampled away.

    Reads every event file of the folder (not of sub-folders) and drops what a resumed run has purged. Values are
    float32 as TensorBoard stores them.

    Raises:
        FileNotFoundError: the folder has no event file.
    """
    run_dir = Path(run_dir)
    if not any(run_dir.glob("*tfevents*")):
        raise FileNotFoundError(f"no TensorBoard event file in {run_dir}")
    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()[SCALARS]}
