"""One comparison, read back from everything that shows it: all of them tell the same figures.

Read are the printed table, ``results.csv``, ``report.html``, ``report.md``, the facts for scripts, the summary that
TensorBoard draws, and the row of each run in its hparams table. The truth is in the ``results.json`` files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from avalanche_firn.evaluation.statistics import Interval, mean_interval
from avalanche_firn.experiments.comparison import Comparison, compare
from avalanche_firn.experiments.narration import plain
from avalanche_firn.experiments.recipe import load_recipe

METHODS = ("naive", "slca", "joint")
COLUMNS = {  # heading of a table: tag, factor, digits
    "last accuracy %": ("accuracy/last", 100.0, 2),
    "average accuracy %": ("accuracy/average", 100.0, 2),
    "incremental accuracy %": ("accuracy/incremental", 100.0, 2),
    "forgetting %": ("forgetting/average", 100.0, 2),
    "seconds": ("seconds", 1.0, 1),
}
CURVES = ("accuracy/last", "accuracy/average", "accuracy/incremental", "forgetting/average")
Cells = dict[str, dict[str, str]]
"""Method -> heading -> cell."""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three methods, two seeds, digits, one epoch."""
    output = tmp_path_factory.mktemp("agree")
    words = [
        f"output={str(output)!r}", f"methods=[{','.join(METHODS)}]", "seeds=[0,1]", "stream.tasks=2", "device=cpu",
        "threads=1", "training.epochs=1", "training.batch_size=128", "methods.slca.alignment.epochs=1",
    ]  # fmt: skip
    return compare(load_recipe("digits", words), quiet=True, say=lambda text: None)


@pytest.fixture(scope="module")
def stored(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Method -> contents of its results.json files, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        files = sorted((comparison.folder / method).glob("seed-*/results.json"))
        found[method] = [json.loads(file.read_text()) for file in files]
    assert all([run["seed"] for run in runs] == [0, 1] for runs in found.values())
    return found


def values(runs: list[dict[str, Any]], tag: str) -> list[float | None]:
    """A figure of every seed. Joint training has one step, so what is a mean over steps isn't shown of it."""
    if tag == "seconds":
        return [run["cost"]["seconds"] for run in runs]
    if tag == "accuracy/incremental" and runs[0]["protocol"]["joint"]:
        return [None for _ in runs]
    return [run["figures"][tag] for run in runs]


def interval(runs: list[dict[str, Any]], tag: str) -> Interval | None:
    """Computed from the stored values alone."""
    found = [value for value in values(runs, tag) if value is not None]
    return mean_interval(found) if found else None


def assert_tells(cells: Cells, stored: dict[str, list[dict[str, Any]]], *, everything: bool = True) -> None:
    """A table has every method and, to its digits, the stored figures."""
    assert sorted(method.split(" (")[0] for method in cells) == sorted(METHODS)
    for shown, row in cells.items():
        runs = stored[shown.split(" (")[0]]
        assert ("upper bound, not continual" in shown) == runs[0]["protocol"]["joint"]
        assert not everything or set(COLUMNS) <= set(row)
        for heading in set(COLUMNS) & set(row):
            tag, scale, digits = COLUMNS[heading]
            expected = interval(runs, tag)
            cell = row[heading]
            if expected is None:
                assert cell in ("-", "–", ""), (shown, heading)
                continue
            mean, half = (float(number) for number in re.findall(r"-?[\d.]+", cell))
            rounding = 0.5 * 10**-digits * (1 + 1e-6)
            assert abs(mean - scale * expected.mean) <= rounding, (shown, heading)
            assert abs(half - scale * (expected.upper - expected.mean)) <= rounding, (shown, heading)


def table(rows: Iterator[list[str]]) -> Cells:
    """The first table whose heading begins with the method and has the last accuracy."""
    heads: list[str] = []
    found: Cells = {}
    for row in rows:
        if heads and len(row) == len(heads):
            found[row[0]] = dict(zip(heads, row, strict=True))
        elif heads:
            break
        elif row and row[0] == "method" and "last accuracy %" in row:
            heads = row
    assert found, "no table of results"
    return found


# ----------------------------------------------------------------------- tables
def test_printed_table(comparison: Comparison, stored) -> None:
    lines = (re.split(r"\s{2,}", line.strip()) for line in str(comparison).splitlines())
    assert_tells(table(row for row in lines if not set("".join(row)) <= {"-"}), stored)


def test_markdown(comparison: Comparison, stored) -> None:
    text = (comparison.folder / "summary" / "report.md").read_text()
    rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines())
    cells = table(row for row in rows if not set("".join(row)) <= set("-: "))
    plain_cells = {method.replace("*", ""): row for method, row in cells.items()}
    assert_tells({m: {h: c.replace("*", "") for h, c in row.items()} for m, row in plain_cells.items()}, stored)


class _Tables(HTMLParser):
    """Texts of the cells of every table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("table", "tr"):
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def test_html(comparison: Comparison, stored) -> None:
    parser = _Tables()
    parser.feed((comparison.folder / "summary" / "report.html").read_text())
    rows = [[" ".join(cell.split()) for cell in row] for row in parser.rows]
    begin = next(i for i, row in enumerate(rows) if row[:1] == ["method"] and "last accuracy %" in row)
    assert_tells(table(iter(rows[begin:])), stored)


def test_csv(comparison: Comparison, stored) -> None:
    """Every run with all its digits."""
    with (comparison.folder / "summary" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(METHODS)
    for row in rows:
        run = stored[row["method"].split(" (")[0]][int(row["seed"])]
        for tag in CURVES:
            value = run["figures"][tag]
            assert row[tag] == ("" if value is None else repr(value)), (row["method"], tag)
        for name in ("seconds", "images_per_second", "peak_memory_MiB", "trainable_parameters"):
            assert float(row[name]) == run["cost"][name]
        assert row["config_digest"] == run["config_digest"]


def test_facts_for_scripts(comparison: Comparison, stored) -> None:
    methods = plain(comparison.to_dict())["methods"]
    assert sorted(method["method"] for method in methods) == sorted(METHODS)
    for method in methods:
        for tag in (*CURVES, "seconds"):
            figure, expected = method["figures"][tag], interval(stored[method["method"]], tag)
            told = None if expected is None else expected.to_dict()
            assert {k: v for k, v in figure.items() if k != "values"} == (told or dict.fromkeys(told_keys()) | {"n": 0})
            if expected is not None:
                assert figure["values"] == values(stored[method["method"]], tag)


def told_keys() -> list[str]:
    """Keys of an interval."""
    return list(Interval(0.0, None, None, None, 1).to_dict())


# ----------------------------------------------------------------------- TensorBoard
@pytest.fixture(scope="module")
def board(comparison: Comparison) -> Any:
    """TensorBoard's reader on the whole folder."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    reader = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
    reader.AddRunsFromDirectory(str(comparison.folder))
    return reader.Reload()


def test_summary_of_tensorboard(comparison: Comparison, board: Any, stored) -> None:
    """The last points of mean, lower and upper of every method, to float32."""
    runs = {run.removeprefix("summary/"): run for run in board.Runs() if run.startswith("summary/")}
    assert sorted(name.split(" (")[0] for name in runs) == sorted(METHODS)
    for name, run in runs.items():
        tags, method = board.Runs()[run]["scalars"], name.split(" (")[0]
        for metric in CURVES:
            expected = interval(stored[method], metric)
            for part in ("mean", "lower", "upper"):
                ends = (f"/{metric}", f"/{metric}/mean") if part == "mean" else (f"/{metric}/{part}",)
                found = [tag for tag in tags if tag.endswith(ends)]
                if expected is None:
                    assert not found, (method, metric, part)
                    continue
                assert len(found) == 1, (method, metric, part)
                points = board.Scalars(run, found[0])
                assert np.float32(points[-1].value) == np.float32(getattr(expected, part)), (method, metric, part)
                if method == "joint":  # one step, which may be drawn as a level over all tasks
                    assert len({point.value for point in points}) == 1 and points[0].step == 0
                    continue
                curve = stored[method][0]["curves"][metric]
                assert [point.step for point in points] == [k for k, v in enumerate(curve) if v is not None]


def test_rows_of_hparams(comparison: Comparison, board: Any, stored) -> None:
    """One row per run, with its method and seed, and every metric of the table is the run's stored figure."""
    from tensorboard.plugins.hparams import metadata

    rows = board.PluginRunToTagToContent(metadata.PLUGIN_NAME)
    assert {run for run, tags in rows.items() if metadata.SESSION_START_INFO_TAG in tags} == {
        f"{method}/seed-{seed}" for method in METHODS for seed in (0, 1)
    }
    columns = metadata.parse_experiment_plugin_data(rows["summary"][metadata.EXPERIMENT_TAG])
    tags = [info.name.tag for info in columns.metric_infos]
    assert set(CURVES) <= set(tags)
    for method in METHODS:
        for seed in (0, 1):
            run, results = f"{method}/seed-{seed}", stored[method][seed]
            row = metadata.parse_session_start_info_plugin_data(rows[run][metadata.SESSION_START_INFO_TAG])
            shown = {name.lower(): value for name, value in row.hparams.items()}
            assert shown["method"].string_value == method and shown["seed"].number_value == seed
            for tag in CURVES:
                value = results["figures"][tag]
                if value is None:
                    assert tag not in board.Runs()[run]["scalars"]
                else:
                    assert np.float32(board.Scalars(run, tag)[-1].value) == np.float32(value), (run, tag)


def test_curves_of_the_runs(comparison: Comparison, board: Any, stored) -> None:
    """Event files and metrics.csv have the curves of results.json."""
    from avalanche_firn.experiments.csv_logger import read_metrics

    for method in METHODS:
        for seed in (0, 1):
            run, curves = f"{method}/seed-{seed}", stored[method][seed]["curves"]
            rows = read_metrics(comparison.folder / run / "metrics.csv")
            for tag in CURVES:
                expected = [(k, value) for k, value in enumerate(curves[tag]) if value is not None]
                assert [(step, value) for step, name, value in rows if name == tag] == expected
                if expected:
                    drawn = [(event.step, np.float32(event.value)) for event in board.Scalars(run, tag)]
                    assert drawn == [(step, np.float32(value)) for step, value in expected]


def test_a_wrong_figure_would_be_seen(stored) -> None:
    """One digit off in one cell fails."""

    def cells(change: float) -> Cells:
        found: Cells = {}
        for method, runs in stored.items():
            label = "joint (upper bound, not continual)" if method == "joint" else method
            found[label] = {}
            for heading, (tag, scale, digits) in COLUMNS.items():
                shown = interval(runs, tag)
                found[label][heading] = "-" if shown is None else shown.format(scale, digits)
            if method == "slca":
                last = interval(runs, "accuracy/last")
                found[label]["last accuracy %"] = f"{100 * last.mean + change:.2f} ± {100 * last.half_width:.2f}"
        return found

    assert_tells(cells(0.0), stored)
    with pytest.raises(AssertionError):
        assert_tells(cells(0.01), stored)
