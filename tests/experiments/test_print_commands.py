"""Commands of ``--print-commands``: one per run, the same run as the comparison's, and given again they do no harm."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults")]
from test_interrupted_curves import results
from tiny_comparison import json_lines, make_recipe

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.recipe import load_experiment

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm_array.sh"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe in it, whose images have a relative path."""
    place = tmp_path / "my project"  # a name that a shell would take apart
    place.mkdir()
    make_recipe(place)
    text = (place / "tiny.yaml").read_text().replace(str(place / "data"), "data")
    (place / "tiny.yaml").write_text(text.replace("checkpoint", "progress: false\ncheckpoint"))
    monkeypatch.chdir(place)
    return place


def printed(capsys: Any, *words: str) -> tuple[list[list[str]], list[str]]:
    """The words of every command, and of the comment behind them."""
    assert main(["compare", *words, "--print-commands"]) == 0
    *lines, comment = capsys.readouterr().out.splitlines()
    assert comment.startswith("# table and report, also before all runs are finished: firn report ")
    return [shlex.split(line) for line in lines], shlex.split(comment.partition("finished: ")[2])


def test_one_command_per_run(home: Path, capsys: Any) -> None:
    words = ["tiny.yaml", "training.epochs=1", "methods.slca.alignment.samples_per_class=8", "output=elsewhere"]
    commands, report = printed(capsys, *words, "--output", "out", "--quiet")
    assert not (home / "out").exists()  # nothing is trained or written
    assert [command[3:5] for command in commands] == [
        ["method=naive", "seed=0"], ["method=slca", "seed=0"], ["method=naive", "seed=1"], ["method=slca", "seed=1"],
    ]  # fmt: skip
    for command in commands:
        assert command[:3] == ["firn", "run", str(home / "tiny.yaml")]
        assert command[5:7] == words[1:3]
        assert command[7:] == ["--output", str(home / "out"), "--directory", str(home), "--quiet"]
    folder = home / "out" / "tiny"
    assert report == ["firn", "report", str(folder), "--output", str(folder / "summary")]


def test_shipped_recipes_and_labels_that_look_like_numbers(home: Path, capsys: Any) -> None:
    commands, _ = printed(capsys, "digits", "seeds=[3]", "methods=[{strategy: naive, name: '1e3'}, slca]")
    assert [command[2:5] for command in commands] == [
        ["digits", 'method="1e3"', "seed=3"], ["digits", "method=slca", "seed=3"],
    ]  # fmt: skip
    assert commands[0][-4:] == ["--output", str(home / "runs"), "--directory", str(home)]


def test_for_scripts(home: Path, capsys: Any) -> None:
    assert main(["compare", "tiny.yaml", "--print-commands", "--json"]) == 0
    (event,) = json_lines(capsys.readouterr().out)
    assert event["event"] == "commands" and event["folder"] == str(home / "runs" / "tiny")
    assert [(run["method"], run["seed"]) for run in event["commands"]] == [
        ("naive", 0), ("slca", 0), ("naive", 1), ("slca", 1),
    ]  # fmt: skip
    assert event["commands"][1]["folder"] == str(home / "runs" / "tiny" / "slca" / "seed-0")
    assert event["commands"][1]["command"].startswith("firn run ") and event["report"].startswith("firn report ")


def test_what_excludes_it(home: Path, capsys: Any) -> None:
    for words, told in ((["--fresh"], "--fresh"), (["--on", "ray"], "--on")):
        assert main(["compare", "tiny.yaml", "--print-commands", *words]) == 2
        assert f"--print-commands and {told} exclude each other" in capsys.readouterr().err
    assert main(["compare", "tiny.yaml", "training.epoch=1", "--print-commands"]) == 2
    assert "training.epochs" in capsys.readouterr().err
    assert main(["run", "tiny.yaml", "method=naive", "--directory", "nowhere"]) == 2
    assert "--directory: 'nowhere'" in capsys.readouterr().err


def test_the_runs_are_those_of_the_comparison(home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, one of them twice; then the comparison trains nothing, and has the same report."""
    words = ["tiny.yaml", "seeds=[0]", "training.epochs=1", "--quiet"]
    commands, report = printed(capsys, *words, "--output", "out")
    (home.parent / "other").mkdir()
    monkeypatch.chdir(home.parent / "other")
    for command in [*commands, commands[0]]:
        assert main(command[1:]) == 0
        assert Path.cwd() == home.parent / "other"
    assert main(report[1:]) == 0
    monkeypatch.chdir(home)
    summary = (home / "out" / "tiny" / "summary" / "results.csv").read_text()
    capsys.readouterr()
    assert main(["compare", *words, "--output", "out"]) == 0
    assert "0 runs trained, 2 kept from before" in capsys.readouterr().out
    assert (home / "out" / "tiny" / "summary" / "results.csv").read_text() == summary
    assert main(["compare", *words, "--output", "whole"]) == 0
    config = load_experiment("tiny.yaml", words[1:3])
    for method in ("naive", "slca"):
        one, other = (home / name / "tiny" / method / "seed-0" for name in ("out", "whole"))
        assert results(one) == results(other)
        assert json.loads((one / "results.json").read_text())["config_digest"] == config.single(method, 0).digest()


def test_another_configuration_is_refused(home: Path, capsys: Any) -> None:
    assert main(["run", "tiny.yaml", "method=naive", "training.epochs=1", "--quiet"]) == 0
    assert main(["compare", "tiny.yaml", "--print-commands"]) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err


def test_transfers(home: Path, capsys: Any) -> None:
    from kill_cases import PRETRAININGS, TRANSFER

    methods = [{"name": name, **PRETRAININGS[name]} for name in ("untrained", "iid_zap")]
    Path("t.yaml").write_text(json.dumps({**TRANSFER, "methods": methods}))
    commands, _ = printed(capsys, "t.yaml", "--quiet")
    for command in commands:
        assert main(command[1:]) == 0
    capsys.readouterr()
    assert main(["compare", "t.yaml", "--quiet"]) == 0
    assert "0 runs trained, 2 kept from before" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
@pytest.mark.slow
def test_a_job_array(home: Path, capsys: Any) -> None:
    """The example script does what the line of its number says, twice without harm, and refuses other numbers."""
    assert main(["compare", "tiny.yaml", "training.epochs=1", "--print-commands"]) == 0
    commands = home / "commands.txt"
    commands.write_text(capsys.readouterr().out)
    firn = home / "bin" / "firn"
    firn.parent.mkdir()
    firn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m avalanche_firn.experiments.cli "$@"\n')
    firn.chmod(firn.stat().st_mode | stat.S_IXUSR)

    def job(number: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{firn.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": number}
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=280)

    done = job("2", str(commands))
    assert done.returncode == 0 and "slca seed 0 task 2/2" in done.stdout, done.stderr
    assert [path.parent.name for path in home.glob("runs/tiny/*/*/results.json")] == ["seed-0"]
    again = job("2", str(commands))
    assert again.returncode == 0 and "kept from before" in again.stdout and "task 2/2" not in again.stdout
    for number, arguments in (("5", [str(commands)]), ("9", [str(commands)]), ("1", []), ("1", [str(home / "no")])):
        assert job(number, *arguments).returncode == 2
