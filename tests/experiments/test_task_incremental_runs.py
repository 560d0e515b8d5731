"""Runs with task-incremental figures: results, scalars, report; and what a report says about replay."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_firn.evaluation.matrix import ResultMatrix
from avalanche_firn.evaluation.tensorboard import read_scalars
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.report import facts, tables, text_table, write_report
from avalanche_firn.experiments.results import find_runs, group_runs

RECIPE = """
name: given
threads: 1
seeds: [0]
stream: {name: digits, tasks: [3, 3, 4]}
training: {epochs: 1, batch_size: 64}
progress: false
evaluation: {task_incremental: true}
methods: [naive, joint]
"""
FIGURES = {"accuracy/last", "accuracy/average", "accuracy/incremental", "forgetting/average", "transfer/backward"}
TITLE = "With the task given at test time (task-incremental)"
LINE = "they use task identity at test time"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "given.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["compare", str(recipe), "--output", str(output), "--quiet"]) == 0
    return output / "given"


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["naive", "joint"])
def test_results(finished: Path, method: str) -> None:
    found = results(finished / method / "seed-0")
    protocol, part = found["protocol"], found["task_incremental"]
    assert protocol["task_incremental_figures"] is True and protocol["task_identity_at_test"] is False
    matrix = ResultMatrix.from_dict(part["matrix"])
    np.testing.assert_array_equal(np.array(part["accuracy_matrix"], dtype=float), matrix.accuracy)
    final = {f"task-il/{name}": value for name, value in matrix.summary().items()}
    assert final == {tag: value for tag, value in found["figures"].items() if tag.startswith("task-il/")}
    assert all(found["curves"][tag][-1] == value for tag, value in final.items())
    assert found["figures"]["task-il/accuracy/last"] > found["figures"]["accuracy/last"]
    assert len(found["curves"]["task-il/accuracy/last"]) == (1 if method == "joint" else 3)


def test_scalars(finished: Path) -> None:
    run = finished / "naive" / "seed-0"
    found, scalars = results(run), read_scalars(run)
    tags = {tag for tag in scalars if tag.startswith("task-il/")}
    assert tags == {f"task-il/{name}" for name in (*FIGURES, *(f"accuracy/task-{k}" for k in range(3)))}
    curve = [(t, pytest.approx(v)) for t, v in enumerate(found["curves"]["task-il/accuracy/last"])]
    assert scalars["task-il/accuracy/last"] == curve
    rows = [line.split(",") for line in (run / "metrics.csv").read_text(encoding="utf-8").splitlines()]
    assert tags <= {row[1] for row in rows}
    events = EventAccumulator(str(run))
    events.Reload()
    assert [image.step for image in events.Images("task-il/accuracy/matrix")] == [2]
    summary = b"".join(path.read_bytes() for path in (finished / "summary").glob("*tfevents*"))
    assert b"task-il/accuracy/last" in summary  # a column of the hparams table


def test_report(finished: Path, capsys) -> None:
    summary = finished / "summary"
    for name in ("report.md", "report.html"):
        text = (summary / name).read_text(encoding="utf-8")
        assert TITLE in text and LINE in text and "task-il forgetting %" in text
        assert "Apart from the task-incremental figures no task identity at test time, no replay." in text
    with (summary / "results.csv").open(encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    figures = results(finished / "naive" / "seed-0")["figures"]
    assert float(rows["naive"]["task-il/accuracy/average"]) == figures["task-il/accuracy/average"]
    assert rows["joint"]["task-il/forgetting/average"] == ""
    assert (summary / "task-il-accuracy-last.svg").stat().st_size > 1000
    scalars = read_scalars(summary / "naive")
    assert [len(scalars[tag]) for tag in scalars if tag.endswith("task-il/accuracy/average")] == [3]
    assert main(["report", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "task-il last accuracy %" in printed and LINE in printed
    assert f"{100 * figures['task-il/accuracy/last']:.2f}" in printed


def test_switched_off_nothing_else_changes(recipe: Path, finished: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "method=naive", "evaluation.task_incremental=false", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    off, on = (folder / "naive" / "seed-0" for folder in (tmp_path / "given", finished))
    found, reference = results(off), results(on)
    assert found["task_incremental"] is None and found["protocol"]["task_incremental_figures"] is False
    for part in ("figures", "curves"):
        assert found[part] == {k: v for k, v in reference[part].items() if not k.startswith("task-il/")}
    assert found["matrix"] == reference["matrix"] and found["accuracy_matrix"] == reference["accuracy_matrix"]
    lines = []
    for run in (off, on):
        text = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
        lines.append([line for line in text if not any(k in line for k in ("task-il/", "efficiency/", "Time"))])
    assert lines[0] == lines[1]


def test_validation_images(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "method=naive", "evaluation.split=validation", "stream.tasks=2", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    run = tmp_path / "given" / "naive" / "seed-0"
    assert "task-il/accuracy/last" in results(run)["figures"]
    assert "validation/task-il/accuracy/last" in read_scalars(run)


def test_interval_over_seeds_and_runs_without_the_figures(finished: Path, tmp_path: Path) -> None:
    naive = next(run for run in find_runs([finished]) if run["method"] == "naive")
    runs = []
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        runs.append(copy.deepcopy(naive) | {"seed": seed})
        runs[-1]["figures"]["task-il/accuracy/last"] = value
        older = copy.deepcopy(naive) | {"seed": seed, "method": "older", "group_digest": "older"}
        for part in ("figures", "curves"):
            older[part] = {k: v for k, v in older[part].items() if not k.startswith("task-il/")}
        del older["task_incremental"], older["protocol"]["task_incremental_figures"]
        runs.append(older)
    groups = group_runs(runs)
    rows = {row[0]: row for title, _, body in tables(groups) if title == TITLE for row in body}
    assert rows["naive"][1].startswith("60.00 ± ") and rows["older"][1:] == ["-"] * 3
    write_report(tmp_path, groups, title="both")
    for method, drawn in (("naive", True), ("older", False)):
        assert any(tag.endswith("task-il/accuracy/last") for tag in read_scalars(tmp_path / method)) is drawn
    alone = group_runs([run for run in runs if run["method"] == "older"])
    assert "task-il" not in text_table(alone) and not any(LINE in line for line in facts(alone))


def test_methods_with_replay_are_named(finished: Path) -> None:
    naive = next(run for run in find_runs([finished]) if run["method"] == "naive")

    def line(*changes: tuple[str, dict]) -> str:
        runs = [
            naive | {"method": method, "group_digest": method, "protocol": naive["protocol"] | protocol}
            for method, protocol in changes
        ]
        return next(text for text in facts(group_runs(runs)) if "task identity at test time" in text)

    assert line(("a", {})).endswith("no task identity at test time, no replay.")
    mixed = line(("a", {}), ("b", {"replay": True, "replay_slots": 200}), ("c", {"replay": True}))
    assert "no replay" not in mixed and mixed.endswith("; replay in: b (200 samples), c.")
    assert line(("a", {"replay": True, "replay_slots": None})).endswith("; replay in: a.")
