"""The summary run of a comparison on disk: event files that TensorBoard can watch while they are replaced.

TensorBoard gives every *run* a colour, and all tags of one run the same. So each method has a run of its own,
``summary/<method>``, and a chart over one tag shows all methods in their colours; ``summary`` itself holds what is
there once: the layout of the custom-scalars tab, images, texts, and the columns of the hparams table.

Every event file is written beside its place under a name that TensorBoard doesn't look at and then moved there. It
begins with a session start at step 0, by which a TensorBoard that runs drops what it has read of the older file. That
one is emptied, and deleted by a later report: TensorBoard without its data server would wait for ever at a file that
vanishes before its eyes. Only files with our suffix are ever touched, and the nameless ones of earlier versions, known
by their layout, where no run lies in the folder. About 13 microseconds per point.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text as text_summary

from avalanche_firn.evaluation.figures import plain_texts

__all__ = [
    "SUFFIX",
    "Category",
    "Lines",
    "Margin",
    "TableColumns",
    "run_names",
    "safe_name",
    "write_runs",
]

SUFFIX = ".firn-summary"
IMAGE_DPI = 130  # our choice: sharp at the full width of the images tab
_TICKED = 10  # numbers of a hyper-parameter that are offered one by one instead of by their ends; our choice
_READ_BY = 600.0  # seconds after which every TensorBoard has gone on to the next file; our choice
_REPORT_FILES = (".html", ".md", ".csv", ".svg", ".png")
_EARLIER_MOST = 2**28  # bytes; summaries of earlier versions were far smaller
_LAYOUT_TAG = "custom_scalars__config__"
_RUN_FILES = ("metrics.csv", "results.json", "config.yaml")  # of a training run: its event files are not ours

Points = Sequence[tuple[int, float]]
Value = str | int | float


@dataclass(frozen=True)
class Lines:
    """A chart with one line per run and tag. ``tags``: exact names, all drawn in one chart."""

    title: str
    tags: tuple[str, ...]

    def chart(self) -> layout_pb2.Chart:
        """TensorBoard's message: tags are regular expressions there, matched from the beginning."""
        patterns = [f"{re.escape(tag)}$" for tag in self.tags]
        return layout_pb2.Chart(title=self.title, multiline=layout_pb2.MultilineChartContent(tag=patterns))


@dataclass(frozen=True)
class Margin:
    """A chart with one line and its band per run."""

    title: str
    mean: str
    lower: str
    upper: str

    def chart(self) -> layout_pb2.Chart:
        """TensorBoard's message: these tags are names, not expressions."""
        series = layout_pb2.MarginChartContent.Series(value=self.mean, lower=self.lower, upper=self.upper)
        return layout_pb2.Chart(title=self.title, margin=layout_pb2.MarginChartContent(series=[series]))


@dataclass(frozen=True)
class Category:
    """A section of the custom-scalars tab. ``closed``: folded at first; its charts then cost nothing to load."""

    title: str
    charts: tuple[Lines | Margin, ...]
    closed: bool = False


@dataclass(frozen=True)
class TableColumns:
    """The columns of the hparams table; the rows are the runs that have logged hyper-parameters.

    Attributes:
        settings: hyper-parameter -> its values in all runs, None where a run has none. Those with several values are
            put in front by TensorBoard, then by name, capital letters first.
        metrics: tag -> heading. A cell is the last point of the tag in the run.
        notes: tag -> description of the metric, shown where the mouse rests.
    """

    settings: Mapping[str, Sequence[Value | None]]
    metrics: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> Summary:
        """The experiment as TensorBoard's message.

        Written once only, in the summary run: TensorBoard takes the first one that it comes across, in no fixed order.
        """
        infos = [_setting(name, values) for name, values in self.settings.items()]
        metrics = [
            api_pb2.MetricInfo(
                name=api_pb2.MetricName(tag=tag), display_name=title, description=self.notes.get(tag, "")
            )
            for tag, title in self.metrics.items()
        ]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics, time_created_secs=time.time())
        content = plugin_data_pb2.HParamsPluginData(experiment=experiment, version=0).SerializeToString()
        data = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        return Summary(value=[Summary.Value(tag=EXPERIMENT_TAG, metadata=SummaryMetadata(plugin_data=data))])


def _setting(name: str, values: Sequence[Value | None]) -> api_pb2.HParamInfo:
    known = [value for value in values if value is not None]
    info = api_pb2.HParamInfo(name=name, differs=len(set(values)) > 1)
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        info.type = api_pb2.DATA_TYPE_FLOAT64
        numbers = sorted({float(value) for value in known})
        if len(numbers) <= _TICKED:
            info.domain_discrete.extend(numbers)
        else:
            info.domain_interval.min_value, info.domain_interval.max_value = numbers[0], numbers[-1]
    else:
        info.type = api_pb2.DATA_TYPE_STRING
        info.domain_discrete.extend(sorted({_shown(value) for value in known}))
    return info


def _shown(value: Value) -> str:
    """As TensorBoard writes a value of a column that holds texts too."""
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else str(float(value))


def safe_name(label: str) -> str:
    """A label as a folder name on any system: spaces, commas, brackets and parentheses stay, so that it can be read."""
    name = re.sub(r"[^\w \-.,+=()\[\]%]", "-", label).strip(" .")
    if name.lower().endswith(_REPORT_FILES):
        name += " (run)"  # report.html lies beside the runs
    return name or "run"


def run_names(labels: Iterable[str]) -> dict[str, str]:
    """Label -> folder name, no two alike even where capital letters don't count."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in dict.fromkeys(labels):
        name, number = safe_name(label), 2
        while name.casefold() in taken:
            name, number = f"{safe_name(label)} ({number})", number + 1
        taken.add(name.casefold())
        names[label] = name
    return names


def write_runs(
    directory: str | Path,
    runs: Mapping[str, Mapping[str, Points]],
    *,
    layout: Sequence[Category] = (),
    images: Mapping[str, Figure] | None = None,
    texts: Mapping[str, str] | None = None,
    columns: TableColumns | None = None,
) -> dict[str, Path]:
    """Writes a summary run and its sub-runs, replacing older ones.

    Args:
        directory: of the summary run, made if needed. Other files in it stay, also in sub-folders.
        runs: label -> scalar tag -> ``[(step, value)]`` in rising steps; each label becomes a sub-run.
        layout: of the custom-scalars tab.
        images: tag -> figure, drawn at step 0; figures that no pyplot manager knows, so there is nothing to close.
        texts: tag -> Markdown, at step 0.
        columns: of the hparams table.

    Returns:
        label -> folder of its run.
    """
    directory = Path(directory)
    names = run_names(runs)
    summaries = [_layout(layout)] if layout else []
    summaries += [columns.summary()] if columns is not None else []
    summaries += [text_summary(tag, text) for tag, text in (texts or {}).items()]  # type: ignore[no-untyped-call]
    summaries += [_image(tag, figure) for tag, figure in (images or {}).items()]
    places = {label: directory / name for label, name in names.items()}
    for label, place in places.items():
        _replace(place, _scalars(runs[label]))
    _replace(directory, (Event(step=0, summary=summary) for summary in summaries))
    _remove_stale(directory, set(names.values()))
    return places


def _scalars(tags: Mapping[str, Points]) -> Iterable[Event]:
    for tag, points in tags.items():
        for step, value in points:
            yield Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def _layout(categories: Sequence[Category]) -> Summary:
    layout = layout_pb2.Layout(
        version=0,
        category=[
            layout_pb2.Category(title=c.title, chart=[chart.chart() for chart in c.charts], closed=c.closed)
            for c in categories
        ],
    )
    tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    return Summary(value=[Summary.Value(tag=_LAYOUT_TAG, tensor=tensor, metadata=metadata)])


@plain_texts
def _image(tag: str, figure: Figure) -> Summary:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=IMAGE_DPI, facecolor="white", metadata={"Software": None})
    encoded = data.getvalue()
    width, height = (int.from_bytes(encoded[i : i + 4], "big") for i in (16, 20))  # of the PNG's header
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _event_files(folder: Path) -> list[Path]:
    """Event files of the folder that are ours."""
    run = any((folder / name).exists() for name in _RUN_FILES)
    found = sorted(folder.glob("events.out.tfevents.*"))
    return [path for path in found if path.name.endswith(SUFFIX) or (not run and _earlier(path))]


def _earlier(path: Path) -> bool:
    """Whether a nameless event file is the summary of an earlier version: each of those has a layout."""
    with suppress(OSError):
        if path.stat().st_size <= _EARLIER_MOST:
            return _LAYOUT_TAG.encode() in path.read_bytes()
    return False


def _replace(folder: Path, events: Iterable[Event]) -> None:
    """Writes an event file and empties the older ones of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    older = _event_files(folder)
    now = time.time()
    temporary = folder / f".{os.getpid()}.summary.tmp"
    try:
        with temporary.open("wb") as file:
            records = RecordWriter(file)
            first = (
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)),
            )
            for event in first:
                records.write(event.SerializeToString())
            for event in events:
                event.wall_time = now
                records.write(event.SerializeToString())
        number = time.time_ns()
        latest = max((path.name for path in older), default="")
        # A TensorBoard that runs goes on to files whose names come later only.
        while (name := f"events.out.tfevents.{number // 10**9}.{number % 10**9:09d}{SUFFIX}") <= latest:
            number += 10**9
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    for path in older:
        with suppress(OSError):  # gone by another report, or on Windows held open
            if path.stat().st_size:
                os.truncate(path, 0)
            elif now - path.stat().st_mtime > _READ_BY:
                path.unlink()


def _remove_stale(directory: Path, kept: set[str]) -> None:
    """Deletes sub-runs of an older report: folders whose event files all carry our suffix."""
    for folder in sorted(directory.iterdir()):
        if folder.name in kept or not folder.is_dir() or folder.is_symlink():
            continue
        ours = [path for path in folder.glob("events.out.tfevents.*") if path.name.endswith(SUFFIX)]
        with suppress(OSError):  # as above
            for path in ours:
                path.unlink(missing_ok=True)
            if ours and not any(folder.iterdir()):
                folder.rmdir()
