"""``--json``: every line of standard output is an event, whatever happens; exit statuses stay."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from tiny_comparison import json_lines, make_recipe

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.narration import JsonNarrator, plain


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, a second per run."""
    return make_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder of a comparison and its events."""
    output, text = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["compare", str(recipe), "--output", str(output), "--json", "methods=[naive,joint]"]) == 0
    return output / "tiny", json_lines(text.getvalue())


def test_plain_values() -> None:
    value = {
        "nan": float("nan"), "inf": [math.inf, 1.5], 3: Path("a"), "set": {2, 1}, "flag": True,
        "numpy": np.float32(0.5), "tensor": torch.tensor(2), "none": None,
    }  # fmt: skip
    assert plain(value) == {
        "nan": None, "inf": [None, 1.5], "3": "a", "set": [1, 2], "flag": True, "numpy": 0.5, "tensor": 2, "none": None,
    }  # fmt: skip
    lines: list[str] = []
    JsonNarrator(lines.append).tell("note", text="a\nb", value=float("nan"))
    assert lines == ['{"event": "note", "text": "a\\nb", "value": null}']


def test_events_of_a_comparison(finished: tuple[Path, list[dict]]) -> None:
    folder, events = finished
    kinds = [event["event"] for event in events]
    naive, joint = (
        ["run_started", "experience", "experience", "run_finished"],
        ["run_started", "experience", "run_finished"],
    )
    assert kinds == ["start", *naive, *joint, *naive, *joint, "comparison_finished"]
    start = events[0]
    assert (start["name"], start["folder"], start["runs"], start["kept"]) == ("tiny", str(folder), 4, 0)
    assert start["methods"] == ["naive", "joint"] and start["seeds"] == [0, 1] and start["seconds_left"] is None
    assert start["resume"] == f"firn resume {folder}"
    first, second = events[2:4]
    assert (first["task"], second["task"], first["tasks"]) == (1, 2, 2) and len(first["classes"]) == 2
    assert first["figures"]["forgetting/average"] is None and second["seconds"] > first["seconds"] > 0
    assert first["seconds_left"] > 0  # its own pace
    ended = [event for event in events if event["event"] == "run_finished"]
    assert [event["to_come"] for event in ended] == [3, 2, 1, 0] and ended[-1]["seconds_left"] == 0.0
    for event in ended:
        stored = json.loads((Path(event["folder"]) / "results.json").read_text())
        assert (event["method"], event["seed"]) == (stored["method"], stored["seed"])
        assert event["figures"] == stored["figures"] and event["seconds"] == stored["cost"]["seconds"]


def test_the_last_line_is_the_table(finished: tuple[Path, list[dict]]) -> None:
    folder, events = finished
    last = events[-1]
    assert (last["trained"], last["kept"], last["folder"]) == (4, 0, str(folder))
    assert [(m["method"], m["joint"], m["seeds"]) for m in last["methods"]] == [
        ("joint", True, [0, 1]), ("naive", False, [0, 1]),
    ]  # fmt: skip
    for method in last["methods"]:
        stored = [json.loads((Path(place) / "results.json").read_text()) for place in method["folders"]]
        figure = method["figures"]["accuracy/last"]
        assert figure["values"] == [run["figures"]["accuracy/last"] for run in stored] and figure["n"] == 2
        assert figure["mean"] == pytest.approx(np.mean(figure["values"]))
        assert figure["lower"] <= figure["mean"] <= figure["upper"]
        assert method["figures"]["seconds"]["values"] == [run["cost"]["seconds"] for run in stored]
    assert last["methods"][0]["figures"]["forgetting/average"] == {
        "mean": None, "lower": None, "upper": None, "std": None, "n": 0, "values": [None, None],
    }  # fmt: skip
    assert last["report"]["html"] == str(folder / "summary" / "report.html")
    assert all(Path(path).exists() for path in last["report"].values())
    assert last["dashboard"] == f"firn dashboard {folder}"


def test_what_is_kept(finished, recipe: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished[0], tmp_path / "tiny")
    assert main(["compare", str(recipe), "--output", str(tmp_path), "--json", "methods=[naive,joint]"]) == 0
    events = json_lines(capsys.readouterr().out)
    assert [event["event"] for event in events] == ["start", "comparison_finished"]
    assert events[0]["kept"] == 4 and events[0]["seconds_left"] == 0.0
    assert (events[1]["trained"], events[1]["kept"]) == (0, 4)


def test_run_interrupted_and_resumed(recipe: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    """Also below Python, on the file descriptor, there is nothing else."""
    original, count = torch.optim.SGD.step, iter(range(10_000))

    def interrupted(self, *args, **kwargs):
        if next(count) == 11:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        assert main(["run", str(recipe), "method=naive", "--output", str(tmp_path), "--json"]) == 130
    events = json_lines(capfd.readouterr().out)
    run = tmp_path / "tiny" / "naive" / "seed-0"
    assert [event["event"] for event in events] == ["start", "run_started", "experience", "interrupted"]
    assert events[-1]["resume"] == f"firn resume {run}" and events[-1]["left"] == [{"method": "naive", "seed": 0}]
    assert events[-1]["seconds_left"] is not None and events[-1]["report"] is None
    assert main(["resume", str(run), "--json"]) == 0
    events = json_lines(capfd.readouterr().out)
    kinds = ["start", "run_started", "experience", "run_finished", "comparison_finished"]
    assert [event["event"] for event in events] == kinds
    assert events[1]["resumed"] and events[2]["task"] == 2
    assert events[-1]["report"] is None and events[-1]["methods"][0]["seeds"] == [0]


def test_a_failure(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def full(self, *args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.optim.SGD, "step", full)
    assert main(["compare", str(recipe), "--output", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    last = json_lines(out)[-1]
    assert last["event"] == "failed" and last["error"] == "OSError: the disk is full"
    assert last["resume"] == f"firn resume {tmp_path / 'tiny'}" and last["runs"] == len(last["left"]) == 4
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("words", "path", "accepted"),
    [
        (["compare", "digits", "trainin.epochs=3"], "trainin.epochs", ""),
        (["compare", "digits", "training.epochs=0"], "training.epochs", "at least 1"),
        (["run", "digits", "method=slc"], "method", "one of"),
        (["resume", "missing"], "", ""),
        (["report", "missing"], "", ""),
    ],
)
def test_a_wrong_configuration(words: list[str], path: str, accepted: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    (event,) = json_lines(out)
    assert event["event"] == "error" and event["message"] in err
    assert [problem["path"] for problem in event["problems"]] == [path]
    assert accepted in event["problems"][0]["accepted"]
    assert set(event["problems"][0]) == {"path", "reason", "accepted", "hint"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["compare", "--jsn", "--json"], ["run", "a", "b", "--json"], ["export", "--json"]])
def test_a_wrong_command_line(words: list[str], capsys) -> None:
    assert main(words) == 2
    (event,) = json_lines(capsys.readouterr().out)
    assert event["event"] == "error" and event["message"] and event["problems"] == []


def test_report(finished, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "tiny")
    (folder / "naive" / "seed-1" / "results.json").unlink()
    assert main(["report", str(folder), "--json"]) == 0
    (event,) = json_lines(capsys.readouterr().out)
    assert event["event"] == "report" and event["report"]["csv"] == str(folder / "summary" / "results.csv")
    assert [(m["method"], m["seeds"]) for m in event["methods"]] == [("joint", [0, 1]), ("naive", [0])]
    (run,) = event["unfinished"]
    assert (run["method"], run["seed"], run["tasks_done"], run["tasks_total"]) == ("naive", 1, 2, 2)
    assert len(run["curves"]["accuracy/last"]) == 2
    assert main(["report", str(folder / "joint"), str(folder / "naive" / "seed-0"), "--json"]) == 0
    (event,) = json_lines(capsys.readouterr().out)
    assert event["report"] is None and event["unfinished"] == []


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name == "nt", reason="needs POSIX signals")
def test_sigterm_is_like_ctrl_c(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """And afterwards the signal means what it meant before."""
    original, count, before = torch.optim.SGD.step, iter(range(10_000)), signal.getsignal(signal.SIGTERM)

    def terminated(self, *args, **kwargs):
        if next(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", terminated)
    assert main(["compare", str(recipe), "--output", str(tmp_path), "--json"]) == 130
    out, err = capsys.readouterr()
    last = json_lines(out)[-1]
    assert last["event"] == "interrupted" and len(last["left"]) == 4 and last["finished"] == []
    assert f"firn resume {tmp_path / 'tiny'}" in err and "Traceback" not in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_report_that_cannot_be_written_and_an_abbreviation(finished, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(["report", str(finished[0]), "--output", str(tmp_path / "file" / "below"), "--json"])
    (event,) = json_lines(capsys.readouterr().out)
    assert event["event"] == "error" and "Error" in event["message"] and event["problems"] == []
    assert main(["report", str(finished[0]), "--output", str(tmp_path / "new"), "--js"]) == 0
    assert [event["event"] for event in json_lines(capsys.readouterr().out)] == ["report"]


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch) -> None:
    from avalanche_firn.experiments import results

    replace, target = os.replace, tmp_path / "report.md"

    def late(source, place):
        if os.getpid() == here:
            monkeypatch.setattr(os, "getpid", lambda: here + 1)
            results.write_text(target, "other")  # another process, just now
            monkeypatch.setattr(os, "getpid", lambda: here)
        replace(source, place)

    here = os.getpid()
    monkeypatch.setattr(results.os, "replace", late)
    results.write_text(target, "mine")
    assert target.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["report.md"]
