"""A small comparison through the command line: layout, idempotence, refusals, exact resume, report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from avalanche_firn.experiments.cli import main

RECIPE = """
name: tiny
seeds: [0]
device: cpu
stream: {{name: folder, root: {root}, tasks: 2, class_order: seeded}}
training: {{epochs: 2, batch_size: 4, optimizer: {{lr: 0.01}}, schedule: {{name: cosine}}}}
checkpoint: {{every: 3}}
methods:
  - naive
  - {{strategy: slca, alignment: {{samples_per_class: 16}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of ten random textures, 32 pixels, and a recipe for them."""
    base = tmp_path_factory.mktemp("tiny")
    random = np.random.RandomState(0)
    for c in range(4):
        folder = base / "data" / f"class{c}"
        folder.mkdir(parents=True)
        wave = np.sin(np.arange(32) * (c + 1) / 3)[None, :, None] * 60 + 128
        for i in range(10):
            pixels = np.clip(wave + random.randn(32, 32, 3) * 30, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    path = base / "tiny.yaml"
    path.write_text(RECIPE.format(root=base / "data"))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that ran without interruption."""
    output = tmp_path_factory.mktemp("finished")
    assert main(["compare", str(recipe), "--output", str(output), "--quiet"]) == 0
    return output / "tiny"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change; `output` is tmp_path."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def results(folder: Path) -> dict:
    """results.json without what wall time decides."""
    found = json.loads((folder / "results.json").read_text())
    del found["cost"]
    return found


def scalars(folder: Path) -> list[str]:
    """Lines of metrics.csv without wall-clock figures."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if ",efficiency/" not in line]


def events(folder: Path) -> dict:
    """Scalars of the event files without wall-clock figures."""
    from avalanche_firn.evaluation.tensorboard import read_scalars

    return {tag: points for tag, points in read_scalars(folder).items() if not tag.startswith("efficiency/")}


def weights(folder: Path) -> dict:
    """Tensors of the last checkpoint."""
    (last,) = (folder / "checkpoint").glob("step-*")
    return load_file(last / "tensors.safetensors")


def assert_same(first: Path, second: Path) -> None:
    """Two runs ended alike, to the bit."""
    assert results(first) == results(second)
    assert scalars(first) == scalars(second)
    assert events(first) == events(second)
    mine, theirs = weights(first), weights(second)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.equal(theirs[name]), name


def test_layout(finished: Path) -> None:
    for method in ("naive", "slca"):
        run = finished / method / "seed-0"
        names = {path.name.split(".tfevents")[0] for path in run.iterdir()}
        assert names == {"config.yaml", "environment.json", "results.json", "metrics.csv", "checkpoint", "events.out"}
    names = {path.name for path in (finished / "summary").iterdir()}
    assert {"report.md", "report.html", "results.csv", "accuracy-last.svg", "task-matrices.svg"} <= names
    assert any("tfevents" in name for name in names)
    assert (finished / "config.yaml").is_file()


def test_results(finished: Path) -> None:
    found = json.loads((finished / "slca" / "seed-0" / "results.json").read_text())
    assert found["protocol"] | {"evaluated": "", "forgetting": ""} == {
        "task_identity_at_test": False, "task_incremental_figures": False, "replay": False, "replay_slots": None,
        "joint": False, "evaluated": "", "forgetting": "", "task_inference": False, "batchwise_vote": False,
        "official_k_gate": False, "zapping": None,
    }  # fmt: skip
    assert found["performance"] == {
        "device_augmentation": False, "stored_edge": None, "compile": False, "fused_optimizer": False, "accumulate": 1,
    }  # fmt: skip
    from avalanche_firn.benchmarks.streams import class_order

    assert tuple(found["stream"]["class_order"]) == class_order(4, 0)
    matrix = found["accuracy_matrix"]
    assert len(matrix) == 2 and matrix[0][1] is None
    correct, total = found["matrix"]["correct"][1], found["matrix"]["total"]
    assert found["figures"]["accuracy/last"] == sum(correct) / sum(total)
    assert found["figures"]["forgetting/average"] == matrix[0][0] - matrix[1][0]
    assert found["cost"]["seconds"] >= found["cost"]["training_seconds"] > 0
    assert found["cost"]["trainable_parameters"] > 1000 and not found["diverged"]


def test_environment(finished: Path) -> None:
    found = json.loads((finished / "slca" / "seed-0" / "environment.json").read_text())
    assert found["images"] and set(found["images"].values()) <= {"cpu", "files"}
    run = json.loads((finished / "slca" / "seed-0" / "results.json").read_text())
    assert found["packages"]["torch"] and found["device"]["type"] == "cpu"
    assert found["backbone"]["weights_sha256"] == run["backbone"]["weights_sha256"]


def test_scalars_agree_and_cover_the_vocabulary(finished: Path) -> None:
    from avalanche_firn.experiments.csv_logger import read_metrics

    run = finished / "slca" / "seed-0"
    rows = read_metrics(run / "metrics.csv")
    tags = {tag for _, tag, _ in rows}
    assert {"accuracy/last", "accuracy/average", "accuracy/task-1", "loss/train", "lr/backbone", "lr/head"} <= tags
    assert {"efficiency/seconds", "Top1_Acc_Stream/eval_phase/test_stream/Task000"} <= tags
    board = events(run)
    written = [(step, value) for step, tag, value in rows if tag == "accuracy/last"]
    assert [step for step, _ in board["accuracy/last"]] == [step for step, _ in written] == [0, 1]
    assert np.allclose([v for _, v in board["accuracy/last"]], [v for _, v in written], atol=1e-7)


def test_hparams_and_configuration_are_in_the_run_s_own_file(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished / "slca" / "seed-0"
    (file,) = run.glob("events.out.tfevents.*")
    data = EventAccumulator(str(file))
    data.Reload()
    assert any("hparams" in tag for tag in data.summary_metadata)
    assert any(tag.startswith("config") for tag in data.Tags()["tensors"])
    assert "accuracy/matrix" in data.Tags()["images"]


def test_second_call_trains_nothing(recipe: Path, copy: Path, capsys, monkeypatch) -> None:
    import avalanche_firn.experiments.comparison as comparison

    def forbidden(*_: object) -> None:
        raise AssertionError("prepared although everything was finished")

    monkeypatch.setattr(comparison, "prepare", forbidden)
    before = (copy / "slca" / "seed-0" / "results.json").read_bytes()
    assert main(["compare", str(recipe), "--output", str(copy.parent)]) == 0
    assert "0 runs trained, 2 kept from before" in capsys.readouterr().out
    assert (copy / "slca" / "seed-0" / "results.json").read_bytes() == before


def test_more_methods_train_only_what_is_new(recipe: Path, copy: Path, capsys) -> None:
    words = ["compare", str(recipe), "--output", str(copy.parent), "methods=[naive,slca,joint,linear_probe]"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2 runs trained, 2 kept from before" in out
    assert "joint (upper bound, not continual)" in out and "linear_probe seed 0 task 2/2" in out
    assert "slca seed 0 task" not in out
    joint = json.loads((copy / "joint" / "seed-0" / "results.json").read_text())
    assert joint["protocol"]["joint"] and joint["figures"]["forgetting/average"] is None
    assert len(joint["accuracy_matrix"]) == 1 and len(joint["accuracy_matrix"][0]) == 2


def test_another_configuration_is_refused_then_fresh(recipe: Path, copy: Path, capsys) -> None:
    words = ["compare", str(recipe), "--output", str(copy.parent), "training.epochs=1", "--quiet"]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "training.epochs 2 there, 1 here" in message and "--fresh" in message
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    (copy / "naive" / "notes.txt").write_text("mine")
    assert main([*words, "--fresh"]) == 0
    text = (copy / "slca" / "seed-0" / "config.yaml").read_text()
    assert "epochs: 1\n" in text
    assert (copy / "naive" / "notes.txt").read_text() == "mine"
    assert main(words) == 0


def test_folder_of_something_else_is_refused(recipe: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "tiny" / "slca" / "seed-0"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    for extra in ([], ["--fresh"]):
        assert main(["compare", str(recipe), "--output", str(tmp_path), *extra]) == 2
        assert "isn't the folder of a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.txt"]


def test_a_half_written_file_is_no_other_run(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """A process may be killed while it writes the first file of a run."""
    place = tmp_path / "tiny" / "slca" / "seed-0"
    place.mkdir(parents=True)
    (place / ".config.yaml.123.tmp").write_text("name: ti")
    assert main(["run", str(recipe), "method=slca", "seed=0", "--output", str(tmp_path)]) == 0
    assert not list(place.glob(".*"))
    assert_same(place, finished / "slca" / "seed-0")


def test_single_run_equals_the_one_of_the_comparison(recipe: Path, finished: Path, tmp_path: Path, capsys) -> None:
    assert main(["run", str(recipe), "method=slca", "seed=0", "--output", str(tmp_path)]) == 0
    assert "slca seed 0 task 2/2" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "config.yaml").exists() and not (tmp_path / "tiny" / "summary").exists()
    assert_same(tmp_path / "tiny" / "slca" / "seed-0", finished / "slca" / "seed-0")


# --- interruption ---------------------------------------------------------------------------------------------------


def test_table_has_its_columns_before_the_first_run(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    """A TensorBoard that is open already reads the columns of the hparams table once."""

    def stops(config, folder, **options):
        files = list((folder.parents[1] / "summary").glob("events.out.tfevents.*"))
        assert any(b"backbone.name" in path.read_bytes() for path in files)
        raise KeyboardInterrupt

    from avalanche_firn.experiments import comparison

    monkeypatch.setattr(comparison, "run", stops)
    assert main(["compare", str(recipe), "--output", str(tmp_path), "--quiet"]) == 130


@pytest.mark.parametrize(("method", "step"), [("naive", 5), ("slca", 0), ("slca", 4), ("slca", 8), ("slca", 11)])
def test_resume_is_exact(
    method: str, step: int, recipe: Path, finished: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    import torch

    original, count = torch.optim.SGD.step, iter(range(10_000))

    def interrupted(self, *args, **kwargs):
        if next(count) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        words = ["run", str(recipe), f"method={method}", "--output", str(tmp_path)]
        assert main(words) == 130
    run = tmp_path / "tiny" / method / "seed-0"
    assert f"go on with: firn resume {run}" in capsys.readouterr().err
    assert not (run / "results.json").exists()
    assert main(["resume", str(run)]) == 0
    assert_same(run, finished / method / "seed-0")
    environment = json.loads((run / "environment.json").read_text())
    assert len(environment["resumed_in"]) == 1


def test_resume_after_a_failure_inside_the_evaluation(
    recipe: Path, finished: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    from avalanche_firn.evaluation.metrics import ResultMatrixMetric

    original, count = ResultMatrixMetric.after_eval_exp, iter(range(100))

    def failing(self, strategy):
        if next(count) == 2:  # the second evaluation, half way
            raise OSError("the disk is full")
        return original(self, strategy)

    with monkeypatch.context() as patch:
        patch.setattr(ResultMatrixMetric, "after_eval_exp", failing)
        assert main(["compare", str(recipe), "methods=[slca]", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "the disk is full" in err and f"firn resume {tmp_path / 'tiny'}" in err
    assert main(["resume", str(tmp_path / "tiny")]) == 0
    assert_same(tmp_path / "tiny" / "slca" / "seed-0", finished / "slca" / "seed-0")
    assert (tmp_path / "tiny" / "summary" / "report.html").is_file()


def test_killed_before_the_first_checkpoint(recipe: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "naive" / "seed-0"
    run.mkdir(parents=True)
    shutil.copy(finished / "naive" / "seed-0" / "config.yaml", run)
    (run / "metrics.csv").write_text("step,tag,value\n0,half a li")
    (run / "events.out.tfevents.1.x").write_bytes(b"\x00")
    assert main(["run", str(recipe), "method=naive", "--output", str(tmp_path), "--quiet"]) == 0
    assert_same(run, finished / "naive" / "seed-0")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.1, 0.5, 1.0, 1.6])
def test_sigkill(after: float, recipe: Path, finished: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "avalanche_firn.experiments.cli", "run", str(recipe), "method=slca"]
    run = tmp_path / "tiny" / "slca" / "seed-0"
    process = subprocess.Popen(
        [*words, "--output", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoint").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same(run, finished / "slca" / "seed-0")


# --- report, check --------------------------------------------------------------------------------------------------


def test_report_of_folders(finished: Path, tmp_path: Path, capsys) -> None:
    words = [str(finished / "naive"), str(finished / "slca" / "seed-0")]
    assert main(["report", *words, "--output", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "naive" in out and "slca" in out and "one seed, so no interval" in out
    assert (tmp_path / "report" / "report.html").is_file()
    assert main(["report", *words]) == 0


def test_report_while_runs_go_on(finished: Path, tmp_path: Path, capsys) -> None:
    """One run finished and one not, then none finished; what is shown of the latter comes from metrics.csv."""
    folder = shutil.copytree(finished, tmp_path / "tiny")
    for method, some in (("slca", True), ("naive", False)):
        (folder / method / "seed-0" / "results.json").unlink()
        assert main(["report", str(folder)]) == 0
        out = capsys.readouterr().out
        assert f"Report: {folder / 'summary' / 'report.html'}" in out and "slca" in out
        assert ("No run is finished yet" in out) != some
        page = (folder / "summary" / "report.html").read_text()
        assert "running or interrupted" in page and "2 of 2" in page
    assert main(["report", str(folder / "summary")]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_the_end_says_how_to_look_at_it(recipe: Path, copy: Path, capsys) -> None:
    assert main(["compare", str(recipe), "--output", str(copy.parent)]) == 0
    out = capsys.readouterr().out
    assert f"Report: {copy / 'summary' / 'report.html'}   Dashboard: firn dashboard {copy}" in out


@pytest.mark.parametrize(
    ("words", "port", "browser"), [([], None, True), (["--port", "6007", "--no-browser"], 6007, False)]
)
def test_dashboard(words: list[str], port: int | None, browser: bool, monkeypatch) -> None:
    """Folders and options arrive; the exit status comes back."""
    import avalanche_firn.experiments.dashboard as dashboard

    seen: list[tuple] = []

    def open_dashboard(folders, *, port=None, open_browser=True, say=print) -> int:
        seen.append((folders, port, open_browser))
        return 130

    monkeypatch.setattr(dashboard, "open_dashboard", open_dashboard)
    assert main(["dashboard", "runs/a", "runs/b", *words]) == 130
    assert seen == [([Path("runs/a"), Path("runs/b")], port, browser)]


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "6006.5"])
def test_dashboard_refuses_wrong_ports(port: str, capsys) -> None:
    assert main(["dashboard", "runs", f"--port={port}"]) == 2
    assert "a whole number from 1 to 65535" in capsys.readouterr().err


def test_check_writes_nothing(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(recipe)]) == 0
    assert "4 classes in tasks of 2, 2" in capsys.readouterr().out
    methods = "methods=[naive,linear_probe,slow_learner,slca,joint]"
    assert main(["check", str(recipe), "--dry-run", methods, "training.batch_size=2", "precision=bf16"]) == 0
    out = capsys.readouterr().out
    for method in ("naive", "linear_probe", "slow_learner", "slca"):
        assert f"{method}: 4 training steps" in out
    assert "joint: 4 training steps" in out
    assert not list(tmp_path.iterdir())


def test_all_streams_give_forward_transfer(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "method=slca", "evaluation.streams=all", "training.epochs=1", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    found = results(tmp_path / "tiny" / "slca" / "seed-0")
    assert None not in found["accuracy_matrix"][0] and None not in found["matrix"]["baseline"]
    assert found["figures"]["transfer/forward"] is not None


def test_validation_split_leaves_the_test_images_alone(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "method=naive", "evaluation.split=validation", "training.epochs=1", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    run = tmp_path / "tiny" / "naive" / "seed-0"
    assert "test_stream" not in (run / "metrics.csv").read_text()
    assert results(run)["stream"]["split"] == "validation"
