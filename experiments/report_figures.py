"""The figures of a comparison's report: every one drawn once, from results, as SVG with its numbers in words.

A method looks the same in all of them. Quantities that a run doesn't have (runs of older versions have fewer) leave a
figure out, or a method out of a figure; they are never an error. Drift over the tasks is read from ``metrics.csv``, all
the rest comes from ``results.json``.

Cost: 0.05 to 0.4 s a figure, of which a comparison has 10 to 40.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from avalanche_firn.evaluation.comparison_figures import (
    cost_figure,
    differences_figure,
    frozen_map_figure,
    ranking_figure,
    task_confusion_figure,
    task_matrices_figure,
)
from avalanche_firn.evaluation.figures import (
    WIDTH,
    Style,
    curves_figure,
    in_legend,
    legend_below,
    plain_texts,
    styles_of,
)
from avalanche_firn.evaluation.statistics import Interval, curve_interval
from avalanche_firn.evaluation.task_confusion import confusion_shares
from avalanche_firn.experiments.report_parts import Drawn, Picture, unique_name
from avalanche_firn.experiments.report_svg import svg_of
from avalanche_firn.experiments.report_text import file_name
from avalanche_firn.experiments.results import Group

__all__ = ["COSTS", "MEMORY_OF_PROCESS", "Drawing", "curves", "label_of", "memory_is_shared"]

Curves = dict[str, NDArray[np.float64]]
COSTS = (
    ("seconds", "seconds", "seconds of a run, with evaluation"),
    ("peak_memory_MiB", "peak memory, MiB", "peak memory, MiB"),
    ("trainable_parameters", "trainable parameters", "trainable parameters at the end"),
)
"""Key in a run's cost, heading of a table, name of an axis."""
MEMORY_OF_PROCESS = (
    "Peak memory on a CPU is that of the whole process so far: runs of one comparison share it, so a later run shows "
    "no less than those before it."
)
_TOGETHER = 6  # matrices in one figure; our choice: three rows of two on a phone
_BANDS = 8  # curves with bands over the seeds; of more of them nobody could see which is whose. Our choice
_LOG = 10.0  # costs that differ by more are drawn on a logarithmic axis; our choice
_TASK = re.compile(r"[0-9]{1,5}")  # the index of a task; a longer one is a damaged line
_DRIFT = ("drift/cka", "drift/weights")


def label_of(group: Group) -> str:
    """Name of a group in tables and figures; joint training says that it isn't continual."""
    return f"{group.label} (upper bound, not continual)" if group.joint else group.label


def curves(groups: Sequence[Group], tag: str) -> Curves:
    """Label -> (seeds, tasks) values of a figure after every task, NaN where there is none."""
    found = {}
    for group in groups:
        rows = [[np.nan if v is None else v for v in _course(run, tag)] for run in group.runs]
        if rows and all(rows) and len({len(row) for row in rows}) == 1:
            found[group.label] = np.asarray(rows, dtype=np.float64)
    return found


def _course(run: dict[str, Any], tag: str) -> Sequence[float | None]:
    """After every task: from the results, and what isn't there from the run's ``metrics.csv``."""
    known: Sequence[float | None] | None = run["curves"].get(tag)
    folder = getattr(run, "folder", None)
    if known is not None or tag not in _DRIFT or folder is None:
        return known or []
    drift = _drift(Path(folder) / "metrics.csv").get(tag, [])
    missing = len(run["curves"].get("accuracy/last", [])) - len(drift)
    return [*drift, *[None] * missing] if drift else []  # measured after some tasks only: a gap, not a level


def _drift(path: Path) -> dict[str, list[float | None]]:
    """Tag -> values over the experience index."""
    return _drift_read(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=1024)
def _drift_read(path: Path, changed: int) -> dict[str, list[float | None]]:
    """The lines of other tags, nearly all of a file, aren't parsed. `changed` tells one content from another."""
    points: dict[str, dict[int, float]] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text[: text.rfind("\n") + 1].splitlines():  # the last one may be half
        if "drift/" in line and line.count(",") == 2:
            step, tag, value = line.split(",")
            tag = tag.removeprefix("validation/")
            if tag in _DRIFT and _TASK.fullmatch(step) and (number := _finite(value)) is not None:
                points.setdefault(tag, {})[int(step)] = number
    return {tag: [at.get(step) for step in range(max(at) + 1)] for tag, at in points.items()}


def _finite(text: str) -> float | None:
    """A number that can be drawn; weights that became infinite have none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def memory_is_shared(groups: Sequence[Group]) -> bool:
    """Whether a peak of memory was measured of the whole process, as on a CPU."""
    runs = [run for group in groups for run in group.runs]
    return any(str(r["cost"].get("device")) == "cpu" and r["cost"].get("peak_memory_MiB") is not None for r in runs)


@dataclass
class Drawing:
    """Draws the figures of a report; all methods keep their style and all figures have names of their own.

    Args:
        labels: of everything that is drawn -> name of its method; a method looks the same under all its labels.
    """

    labels: Mapping[str, str]
    styles: dict[str, Style] = field(init=False)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        own = styles_of(self.labels.values())
        self.styles = {label: own[method] for label, method in self.labels.items()}

    def picture(self, figure: Figure, name: str, caption: str, alternative: str) -> Picture:
        """A figure as a picture; its name is made fit for a file and unique."""
        name = unique_name(file_name(name), self.names)
        svg = svg_of(figure, name=name, title=caption, description=alternative)
        return Picture(name, caption, alternative, svg)

    # ------------------------------------------------------------------ of methods
    def ranking(self, intervals: Mapping[str, Interval], name: str, what: str) -> list[Picture]:
        """Dots and whiskers of fractions, in percent; nothing without intervals."""
        if not intervals:
            return []
        figure = ranking_figure(intervals, xlabel=f"{what}, %", styles=self.styles)
        few, seeds = (of(interval.n for interval in intervals.values()) for of in (min, max))
        number = f"{seeds}" if few == seeds else f"{few} to {seeds}"
        over = f"mean and 95 % interval over {number} seeds" if seeds > 1 else "one seed"
        return [self.picture(figure, name, f"{_upper(what)}, {over}", _intervals(intervals, " %"))]

    def lead(self, first: str, intervals: Mapping[str, Interval], what: str) -> Picture:
        """How far `first` is ahead of every other label: dots and whiskers around zero."""
        figure = differences_figure(intervals, xlabel=f"lead of {first}, percent points")
        caption = f"{_upper(what)} of {first} minus that of each other method, paired over seeds, 95 % intervals"
        told = {f"{first} - {other}": interval for other, interval in intervals.items()}
        return self.picture(figure, "differences", caption, _intervals(told, " percent points"))

    def costs(self, groups: Sequence[Group]) -> list[Picture]:
        """Last accuracy against everything it cost."""
        done = []
        for key, _, axis in COSTS:
            points: dict[str, tuple[float, float, float | None]] = {}
            for group in groups:
                costs = [run["cost"].get(key) for run in group.runs]
                accuracy = group.interval("accuracy/last")
                if accuracy is not None and all(isinstance(cost, int | float) for cost in costs):
                    points[label_of(group)] = (float(np.mean(costs)), accuracy.mean, accuracy.half_width)
            spent = [cost for cost, _, _ in points.values()]
            if len(points) > 1 and all(map(math.isfinite, spent)):
                log = min(spent) > 0 and max(spent) > _LOG * min(spent)
                figure = cost_figure(points, xlabel=axis, ylabel="last accuracy", log=log, styles=self.styles)
                told = "; ".join(
                    f"{label}: {cost:,.4g}, {100 * mean:.2f} %" for label, (cost, mean, _) in points.items()
                )
                name = f"cost-{key.replace('_', '-')}"
                caption = f"Last accuracy against {axis}, mean over seeds"
                if key == "peak_memory_MiB" and memory_is_shared(groups):
                    caption += f". {MEMORY_OF_PROCESS}"
                done.append(self.picture(figure, name, caption, told))
        return done

    def course(self, lines: Mapping[str, NDArray[np.float64]], drawn: Drawn, name: str) -> list[Picture]:
        """Curves over the tasks with their bands over the seeds; nothing where no curve has a point."""
        lines = {label: rows for label, rows in lines.items() if np.isfinite(rows).any()}
        if not lines:
            return []
        return [self.lines(lines, name, _upper(drawn.caption), ylabel=drawn.axis, percent=drawn.percent)]

    @plain_texts
    def lines(
        self, lines: Mapping[str, NDArray[np.float64]], name: str, caption: str, *, percent: bool = True, **options: Any
    ) -> Picture:
        """Any curves, with options of :func:`~avalanche_firn.evaluation.figures.curves_figure`."""
        if len(lines) > _BANDS:
            lines = {label: curve_interval(rows)[0][None] for label, rows in lines.items()}
            caption += ", mean over seeds"
        names = {label: in_legend(label.replace(" (upper bound, ", " (upper bound,\n"), WIDTH) for label in lines}
        longest = ["x" * max(len(line) for line in text.split("\n")) for text in names.values()]
        columns = max(1, min(len(lines), int(WIDTH / (max(map(len, longest)) * 0.082 + 0.6))))
        rows = -(-len(lines) // columns) + sum(text.count("\n") for text in names.values())
        size = (WIDTH, 2.9 + 0.17 * rows)
        figure = curves_figure(lines, percent=percent, styles=self.styles, size=size, legend="none", **options)
        for line in figure.axes[0].get_lines():
            line.set_label(names.get(str(line.get_label()), str(line.get_label())))
        legend_below(figure, WIDTH, longest)
        return self.picture(figure, name, caption, _ends(lines, percent))

    # ------------------------------------------------------------------- of tasks
    def matrices(self, groups: Sequence[Group]) -> list[Picture]:
        """The accuracy of every task after every task, methods side by side on one scale, a few to a figure."""
        means: dict[str, NDArray[np.float64]] = {}
        for group in groups:
            found = [np.asarray(run["accuracy_matrix"], dtype=np.float64) for run in group.runs]
            if len({matrix.shape for matrix in found}) == 1 and found[0].ndim == 2 and found[0].size:
                means[label_of(group)] = np.mean(found, axis=0)
        seeds = max((len(group.runs) for group in groups), default=1)
        over = "mean over seeds" if seeds > 1 else "one seed"
        done = []
        for number, labels in enumerate(_chunks(list(means), _TOGETHER)):
            told = "; ".join(f"{label} after the last step: {_percents(means[label][-1])}" for label in labels)
            name = f"task-matrices{f'-{number + 1}' if len(means) > _TOGETHER else ''}"
            figure = task_matrices_figure({label: means[label] for label in labels})
            caption = f"Accuracy of every task after every step, {over}"
            caption += f": {', '.join(labels)}" if len(labels) < len(means) else ""
            done.append(self.picture(figure, name, caption, f"By evaluated task. {told}"))
        return done

    def confusion(self, groups: Sequence[Group]) -> list[Picture]:
        """Which task's classes the images of each task were taken for after the last one, mean over the seeds."""
        done = []
        for group in groups:
            counts: list[Any] = [(run.get("task_confusion") or {}).get("counts") for run in group.runs]
            if not all(counts) or len({len(count) for count in counts}) != 1:
                continue
            shares = confusion_shares(counts)
            kept = _percents(np.diag(shares[:, : len(shares)]))
            over = "mean over seeds" if len(counts) > 1 else "one seed"
            caption = f"{label_of(group)}: task of the predicted class, {over}"
            alternative = f"Share of each task's images taken for a class of their own task: {kept}"
            name = f"task-confusion-{group.label}"
            done.append(self.picture(task_confusion_figure(shares), name, caption, alternative))
        return done

    def frozen(self, groups: Sequence[Group]) -> list[Picture]:
        """Which matrices were frozen after which task, in the first seed."""
        done = []
        for group in groups:
            run = group.runs[0]
            frozen = (run.get("lora") or {}).get("frozen")
            if frozen:
                told = [f"task {task}: {', '.join(_new(frozen, task)) or 'none'}" for task in range(len(frozen))]
                caption = f"{group.label}: matrices by the task after which they were frozen, seed {run['seed']}"
                alternative = "Newly frozen after " + "; ".join(told)
                figure = frozen_map_figure(frozen, matrices=run["lora"].get("matrices"))
                done.append(self.picture(figure, f"frozen-{group.label}", caption, alternative))
        return done


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _chunks(labels: list[str], most: int) -> list[list[str]]:
    """In parts of nearly equal length, none longer than `most`."""
    if not labels:
        return []
    parts = -(-len(labels) // most)
    length = -(-len(labels) // parts)
    return [labels[start : start + length] for start in range(0, len(labels), length)]


def _new(frozen: Sequence[Sequence[str]], task: int) -> list[str]:
    before = set(frozen[task - 1]) if task else set()
    return [name for name in frozen[task] if name not in before]


def _intervals(intervals: Mapping[str, Interval], unit: str) -> str:
    def one(interval: Interval) -> str:
        if interval.lower is None or interval.upper is None:
            return f"{100 * interval.mean:.2f}{unit}"
        ends = f"{100 * interval.lower:.2f} to {100 * interval.upper:.2f}"
        return f"{100 * interval.mean:.2f}{unit} (95 % interval {ends})"

    return "; ".join(f"{label} {one(interval)}" for label, interval in intervals.items())


def _ends(lines: Mapping[str, NDArray[np.float64]], percent: bool) -> str:
    """First and last mean of every curve."""
    show: Callable[[float], str] = (lambda v: f"{100 * v:.2f} %") if percent else (lambda v: f"{v:.3g}")
    told = []
    for label, rows in lines.items():
        mean = curve_interval(rows)[0]
        known = mean[np.isfinite(mean)]
        told.append(f"{label} {show(known[0])}" + (f" to {show(known[-1])}" if len(known) > 1 else ""))
    return "First and last mean over seeds: " + "; ".join(told)


def _percents(values: NDArray[np.float64]) -> str:
    return ", ".join("not measured" if np.isnan(value) else f"{100 * value:.0f} %" for value in values)
