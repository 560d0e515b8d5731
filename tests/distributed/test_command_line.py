"""``firn`` under ``torchrun``: what is printed and written, processes that die, runs that go on, what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from distributed_cases import kill_cases, recipe_of, write_images
from processes import CASES, call, ended, launch

from avalanche_firn.plugins.checkpoint_files import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, of which the second is long enough to be killed."""
    folder = tmp_path_factory.mktemp("recipes")
    content = recipe_of("slca", write_images(folder / "images"))
    (slca,) = content["methods"]
    content["methods"] = [{"strategy": "naive", "training": {"epochs": 1}}, slca]
    content["evaluation"] = {}
    file = folder / "both.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison by two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, out, err = call("firn", "compare", recipe, "--output", folder)
    assert status == 0, err[-3000:]
    return folder / "distributed", out


def story(run: Path) -> dict[str, Any]:
    found = kill_cases.story(run)
    del found["checkpoint"]
    return found


def test_a_comparison_is_told_and_written_once(undisturbed: tuple[Path, str]) -> None:
    folder, out = undisturbed
    assert out.count("2 runs trained") == 1 and out.count("slca seed 0 task 5/5") == 1
    assert (folder / "summary" / "report.html").is_file()
    for method in ("naive", "slca"):
        run = folder / method / "seed-0"
        assert json.loads((run / "results.json").read_text())["performance"]["processes"] == [2]
        assert json.loads((run / "environment.json").read_text())["device"]["processes"] == 2
        assert len(list(run.glob("events.out.tfevents.*"))) == 1 and not (run / "lock").exists()
    assert not (folder / "lock").exists()


@pytest.mark.slow
def test_a_finished_comparison_is_kept(undisturbed: tuple[Path, str], recipe: Path) -> None:
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed-0/results.json")}
    status, out, err = call("firn", "compare", recipe, "--output", folder.parent)
    assert status == 0 and "0 runs trained, 2 kept from before" in out, err[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def rank_of(pid: int) -> int:
    words = dict(w.split("=", 1) for w in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in w)
    return int(words["RANK"])


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 1])
def killed(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run one of whose processes is killed in the middle; it ends cleanly."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    folder = tmp_path_factory.mktemp(f"killed{request.param}")
    program = launch("firn", "run", recipe, "method=slca", "--output", folder)
    run, began = folder / "distributed" / "slca" / "seed-0", time.monotonic()
    try:
        while not any(path.name > "step-000000010" for path in checkpoints(run / "checkpoint")):
            assert time.monotonic() - began < 300 and program.poll() is None, program.communicate()[1][-2000:]
            time.sleep(0.01)
        (victim,) = [pid for pid in children(program.pid) if rank_of(pid) == request.param]
        os.kill(victim, signal.SIGKILL)
        status, _, err = ended(program, limit=90)
    except BaseException:
        ended(program, limit=1)
        raise
    own = [line for line in err.splitlines() if 'File "' in line and "avalanche_firn" in line]
    assert status != 0 and not own  # tracebacks are torchrun's
    if request.param == 1:  # the first process is told that the other is gone, or to end, whatever comes first
        assert "firn: process 0 of 2 has lost another one" in err or "firn: interrupted" in err
        assert "go on with: torchrun --nproc-per-node=2 -m avalanche_firn.experiments.cli resume" in err
    assert not (run / "results.json").exists() and checkpoints(run / "checkpoint")
    return run


def test_a_killed_process_ends_the_run_and_it_goes_on(
    killed: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "seed-0"
    shutil.copytree(killed, copy)
    status, out, err = call("firn", "resume", copy)
    assert status == 0 and "slca seed 0 goes on" in out, err[-3000:]
    assert story(copy) == story(undisturbed[0] / "slca" / "seed-0")


@pytest.mark.slow
def test_it_goes_on_in_one_process_too(killed: Path, undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    """The same batches; results differ by rounding, and say who made them."""
    import shutil

    copy = tmp_path / "seed-0"
    shutil.copytree(killed, copy)
    status, _, err = call("firn", "resume", copy, processes=1)
    assert status == 0, err[-3000:]
    found, expected = (json.loads((p / "results.json").read_text()) for p in (copy, undisturbed[0] / "slca" / "seed-0"))
    assert found["performance"]["processes"] == [2, 1]
    assert found["figures"]["accuracy/last"] == pytest.approx(expected["figures"]["accuracy/last"], abs=1 / 40)
    one, two = (
        load_file(checkpoints(place / "checkpoint")[0] / "tensors.safetensors")
        for place in (copy, undisturbed[0] / "slca" / "seed-0")
    )
    names = [name for name in one if name.startswith("strategy/model/") and one[name].is_floating_point()]
    assert len(names) > 20
    error = sum(float((one[name] - two[name]).double().square().sum()) for name in names)
    assert error <= 1e-8 * sum(float(two[name].double().square().sum()) for name in names)


TRANSFER = {**kill_cases.TRANSFER, "methods": [{"name": "untrained", **kill_cases.PRETRAININGS["untrained"]}]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "transfer.yaml"], "a transfer experiment learns image by image"),
        pytest.param(
            ["run", "digits", "method=slca", "device=cuda:0"],
            "device is 'cuda:0'; 'auto', 'cpu' or 'cuda' is accepted",
            marks=pytest.mark.slow,
        ),
        pytest.param(["run", "digits", "method=slcaa"], "'slcaa' isn't in the recipe", marks=pytest.mark.slow),
    ],
)
def test_what_is_refused_is_told_once(tmp_path: Path, words: list[str], told: str) -> None:
    (tmp_path / "transfer.yaml").write_text(json.dumps(TRANSFER))
    chosen = [str(tmp_path / w) if w.endswith(".yaml") else w for w in words]
    status, out, err = call("firn", *chosen, "--output", tmp_path / "runs")
    assert status == 1 and err.count(told) == 1 and not out  # 1: torchrun's own; the message is ours
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_other_commands_are_carried_out_once(tmp_path: Path) -> None:
    status, out, err = call("firn", "recipes", "ls")
    assert status == 0 and out.count("lorac_ipc_domainnet") == 1, err[-2000:]
    assert CASES.is_file()
