"""What the scalar logger leaves out: hyper-parameters, configuration text, and the summary of a set of curves.

Everything of one run goes into the run's own event file, through the ``writer`` of Avalanche's ``TensorboardLogger``.
``SummaryWriter.add_hparams`` would open a second event file in a sub-folder, and TensorBoard would list that as a run
of its own. The summary has one run per method, so that each has a colour of its own, with the mean over seeds and its
interval as scalar tags, and a custom-scalars layout: one chart per metric with the lines of all methods, and one with
their bands. How it lies on disk: :mod:`~avalanche_firn.evaluation.summary_run`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from avalanche_firn.evaluation.statistics import curve_interval
from avalanche_firn.evaluation.summary_run import Category, Lines, Margin, write_runs

GROUP = "All methods"
"""In front of a metric's tag in the methods' runs; no seed's run has such a tag, so the charts never show those."""
INTERVAL = "interval over seeds"

Parts = dict[str, list[tuple[int, float]]]


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
    writer: SummaryWriter,
    hparams: Mapping[str, Any],
    metrics: Iterable[str] | Mapping[str, float | None],
    *,
    experiment: bool = True,
) -> None:
    """Writes a run's row of the HPARAMS table into the run's own event file.

    Args:
        writer: of the run, e.g. ``TensorboardLogger(...).writer``. Write once per run: TensorBoard keeps the first row.
        hparams: nested mappings allowed, see :func:`flatten`. Booleans are written as "true" and "false", because
            torch's helper turns them into numbers.
        metrics: tags of scalars *that this run has written*: the table shows the last point of each. A mapping gives
            values for tags that it has not: each is written as a scalar at step 0; None values are left out.
        experiment: also say which columns the table has. TensorBoard takes the columns of **one** run, whichever it
            comes across first, for all rows: right for a run that stands alone, wrong for runs with different
            hyper-parameters below one folder. Those leave it out and have the columns written once, by the summary
            (``TableColumns``); until there is one, TensorBoard shows all hyper-parameters and all scalars.

    Raises:
        ValueError: no hyper-parameter.
    """
    if not hparams:
        raise ValueError("hparams: got nothing; accepted is at least one hyper-parameter")
    row = {k: str(v).lower() if isinstance(v, bool) else v for k, v in flatten(hparams).items()}
    values = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    if isinstance(metrics, Mapping):
        values = {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
    # the public attribute is None until something was written
    file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
    columns, start, end = hparams_summaries(row, values)  # type: ignore[no-untyped-call]
    for summary in (columns, start, end) if experiment else (start, end):
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
    images: Mapping[str, Figure] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Parts]]:
    """Writes the summary of a set of curves, replacing an older one: a run per method below it, see the module.

    Args:
        directory: folder of the run, e.g. ``runs/NAME/summary``; older summaries in it are replaced, other files stay.
        curves: metric tag -> method -> (S, T) values, one row per seed, over the experience index; NaN where a seed has
            no value. Rows of unequal length are padded with NaN.
        confidence: of the intervals (Student t).
        steps: metric tag -> step number of each point, at least as many as its longest curve has; metrics that are left
            out count from 0.
        images: tag -> figure that no pyplot manager knows, shown in the summary run.
        texts: tag -> Markdown, shown in the summary run.

    Returns:
        The points written: method -> metric -> ``{"mean" | "lower" | "upper": [(step, value)]}``; the scalar tags are
        those of :func:`summary_tag`. Where no point has two seeds there is no interval and no margin chart.

    Raises:
        ValueError: a method without seeds, steps of a metric that isn't there, fewer steps than points. Nothing has
            been deleted or written then.
    """
    padded = {metric: {method: _padded(rows) for method, rows in m.items()} for metric, m in curves.items()}
    places = _checked_steps(padded, steps or {})
    written: dict[str, dict[str, Parts]] = {}
    for metric, methods in padded.items():
        for method, rows in methods.items():
            parts = interval_points(rows, places[metric], confidence)
            if parts:
                written.setdefault(method, {})[metric] = parts
    means = [Lines(metric, (summary_tag(metric),)) for metric in padded]
    banded = [m for m in padded if any("lower" in found.get(m, {}) for found in written.values())]
    layout = [Category(f"{GROUP}: mean over seeds", tuple(means))]
    if banded:
        # TensorBoard (2.21) draws the margin charts of a section from the last to the first.
        margins = tuple(margin_chart(metric) for metric in reversed(banded))
        layout.append(Category(f"{GROUP}: {confidence:.0%} intervals over seeds", margins))
    write_runs(directory, _tagged(written), layout=layout, images=images, texts=texts)
    return written


def summary_tag(metric: str, part: str = "mean", group: str = GROUP) -> str:
    """Scalar tag of a metric in a method's summary run; ``part``: mean, lower or upper."""
    return f"{group}/{metric}" if part == "mean" else f"{INTERVAL}/{metric}/{part}"


def margin_chart(metric: str, group: str = GROUP) -> Margin:
    """The chart of a metric's mean and band, all methods in it."""
    tags = {part: summary_tag(metric, part, group) for part in ("mean", "lower", "upper")}
    return Margin(f"{metric}: mean and interval", **tags)


def interval_points(rows: np.ndarray, steps: Sequence[int], confidence: float = 0.95) -> Parts:
    """Mean and interval over seeds as points.

    Args:
        rows: (S, T) float64, NaN where a seed has no value.
        steps: of the T points.
        confidence: of the interval.

    Returns:
        ``{"mean" | "lower" | "upper": [(step, value)]}`` of the points that are defined; no empty parts.
    """
    parts = zip(("mean", "lower", "upper"), curve_interval(rows, confidence), strict=True)
    points = {
        part: [(int(t), float(v)) for t, v in zip(steps, curve, strict=False) if not np.isnan(v)]
        for part, curve in parts
    }
    return {part: curve for part, curve in points.items() if curve}


def _tagged(written: Mapping[str, Mapping[str, Parts]]) -> dict[str, Parts]:
    """Points by method and scalar tag."""
    return {
        method: {summary_tag(m, part): points for m, parts in metrics.items() for part, points in parts.items()}
        for method, metrics in written.items()
    }


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
