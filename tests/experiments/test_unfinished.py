"""Runs that have begun and aren't finished are found by their files, whatever state these are in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, load_recipe
from avalanche_firn.experiments.results import find_runs
from avalanche_firn.experiments.unfinished import UnfinishedRun, find_unfinished

METRICS = """step,tag,value
7,loss/train,0.5
0,accuracy/last,0.9
0,accuracy/task-0,0.9
0,drift/cka,0.8
14,loss/train,0.25
1,accuracy/last,0.5
1,accuracy/task-1,1.0
1,forgetting/average,0.4
1,lorac/task-inference,0.75
2,lorac/task-inference,0.5
"""


def make_run(folder: Path, metrics: str = METRICS, words: tuple[str, ...] = ()) -> Path:
    """A run of slca with seed 3 on digits, five tasks."""
    config = load_recipe("digits", list(words)).single("slca", 3)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "environment.json").write_text("{}")
    (folder / "metrics.csv").write_text(metrics)
    return folder


def only(folder: Path) -> UnfinishedRun:
    (found,) = find_unfinished([folder])
    return found


def test_what_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits" / "slca" / "seed-3")
    os.utime(run / "metrics.csv", (2e9, 2e9))
    found = only(tmp_path)
    assert (found.label, found.strategy, found.seed, found.folder) == ("slca", "slca", 3, run)
    assert (found.tasks_done, found.tasks_total, found.state) == (2, 5, "running or interrupted")
    assert found.curves == {
        "accuracy/last": [0.9, 0.5],
        "accuracy/task-0": [0.9],
        "accuracy/task-1": [None, 1.0],
        "drift/cka": [0.8],
        "forgetting/average": [None, 0.4],
        "lorac/task-inference": [0.75, 0.5],  # written over the number of tasks
    }
    assert found.updated == 2e9
    assert found.group_digest == load_recipe("digits").single("slca", 3).digest(seeds=False)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_dict()["method"] == "slca"


def test_validation_tags_are_those_of_the_results(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "step,tag,value\n0,validation/accuracy/last,0.25\n")
    found = only(tmp_path)
    assert found.curves == {"accuracy/last": [0.25]} and found.tasks_done == 1


def test_finished_runs_comparisons_and_summaries_are_none(tmp_path: Path) -> None:
    finished = make_run(tmp_path / "tiny" / "slca" / "seed-0")
    (finished / "results.json").write_text("{}")
    (tmp_path / "tiny" / "config.yaml").write_text((finished / "config.yaml").read_text())  # one method, one seed
    (tmp_path / "tiny" / "summary").mkdir()
    (tmp_path / "tiny" / "summary" / "metrics.csv").write_text(METRICS)
    assert find_unfinished([tmp_path, tmp_path / "missing"]) == []


def test_folders_that_vanish_meanwhile(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "digits" / "slca" / "seed-3")
    gone = run / "checkpoint" / "step-1"
    gone.mkdir(parents=True)
    scandir = os.scandir

    def racing(path):
        if Path(path) == gone:
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert only(tmp_path).folder == run
    with pytest.raises(ConfigError, match="no finished run"):
        find_runs([tmp_path])


def test_each_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_run(tmp_path / name)
    places = [run.folder for run in find_unfinished([tmp_path, tmp_path / "b"])]
    assert places == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize(
    ("metrics", "last"),
    [
        ("", None),
        ("step,tag", None),
        ("step,tag,value\n0,accuracy/last,0.5\n1,accuracy/last,0.2", [0.5]),  # the last line is half written
        ("step,tag,value\n0,accuracy/last,0.5\nx,accuracy/last,0.2\n1,2\n\n", [0.5]),
        ("step,tag,value\n0,accuracy/last,0.5\n0,accuracy/last,0.75\n", [0.75]),
        ("step,tag,value\n0,accuracy/last,0.5\n1,accuracy/la\ufffd", [0.5]),
    ],
)
def test_files_that_are_being_written(metrics: str, last: list[float] | None, tmp_path: Path) -> None:
    make_run(tmp_path / "run", metrics)
    found = only(tmp_path)
    assert found.curves.get("accuracy/last") == last and found.tasks_done == len(last or [])
    (tmp_path / "run" / "metrics.csv").unlink()
    assert only(tmp_path).curves == {}


def test_tasks_that_only_the_data_know(tmp_path: Path) -> None:
    (tmp_path / "data" / "x").mkdir(parents=True)
    stream = f"stream={{name: folder, root: {tmp_path / 'data'}, tasks: 3}}"
    make_run(tmp_path / "known", words=(stream,))
    assert only(tmp_path / "known").tasks_total == 3
    domains = f"stream={{name: domains, root: {tmp_path / 'data'}}}"
    make_run(tmp_path / "unknown", words=(domains,))
    assert only(tmp_path / "unknown").tasks_total is None


def test_joint_training_has_one_task(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(dump(load_recipe("digits").single("joint", 0)))
    assert only(tmp_path).tasks_total == 1


def test_configurations_of_other_versions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + "invented: 1\n")
    found = only(tmp_path)
    assert (found.label, found.seed, found.group_digest, found.tasks_total) == ("slca", 3, "", None)
    assert found.curves["accuracy/last"] == [0.9, 0.5]
    (run / "config.yaml").write_text("methods: []\nseeds: 3\n")
    assert find_unfinished([tmp_path]) == []
    (run / "config.yaml").write_text("a: [")
    assert find_unfinished([tmp_path]) == []
