"""Every example runs as its docstring says, with fewer epochs."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("slca.py", [], "of all seen digits"),
        ("slca.py", ["--as-plugins"], "of all seen digits"),
        ("several_gpus.py", [], "of all seen digits, 1 processes"),
        ("lp_ft.py", [], "points lost on earlier tasks"),
        ("lp_ft.py", ["--no-probe"], "points lost on earlier tasks"),
        ("cila.py", [], "certified to lie between"),
        ("cila.py", ["--constant"], "coefficient 1.000"),
        ("lorac_ipc.py", [], "sent to their own task; frozen from now on: backbone.blocks."),
        ("lorac_ipc.py", ["--newest"], "composed.safetensors: 2.8 MiB, features differ by"),
        # a task's first epoch has no zap, so one needs two of them
        ("zapping.py", ["--epochs", "2"], "10 rows zapped in all, in 5 zaps"),
        ("zapping.py", ["--no-zap"], "0 rows zapped in all, in 0 zaps"),
        ("zapping_dynamics.py", ["--regime", "asb", "--episodes", "3", "--every", "10", "--width", "4"], "zap, Adam "),
        ("zapping_dynamics.py", ["--regime", "meta", "--episodes", "2", "--every", "10", "--width", "4"], "zap, Adam "),
    ],
)
def test_example(name, arguments, said, tmp_path):
    words = [sys.executable, str(EXAMPLES / name), "--epochs", "1", "--logdir", str(tmp_path / "log"), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "after task 4" in done.stdout
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_zapping_in_pre_training(tmp_path):
    words = [sys.executable, str(EXAMPLES / "zapping.py"), "--iid", "--epochs", "2", "--logdir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "after task 0" in done.stdout and "10 rows zapped in all, in 1 zaps" in done.stdout


@pytest.mark.slow
def test_dynamics_of_both_optimizers_are_drawn_and_told(tmp_path):
    words = [sys.executable, str(EXAMPLES / "zapping_dynamics.py"), "--epochs", "1", "--every", "25", "--width", "4"]
    done = subprocess.run([*words, "--logdir", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after task 4") == 4 and list(tmp_path.glob("events.out.tfevents.*"))
    runs = [f"{start}-{optimizer}" for start in ("no-zap", "zap") for optimizer in ("sgd", "adam")]
    kinds = ("block-effect", "curves", "landscape", "loss-map")
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"{run}-{kind}" for run in runs for kind in kinds}
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line and "after" not in line]
    assert len(rows) == 4
    for row in rows:
        figures = [float(word) for word in row[row.index("%") - 1 :] if word != "%"]
        assert len(figures) == 6 and 0 <= figures[0] <= 100 and min(figures[1:3]) >= 0


@pytest.mark.slow
def test_the_interval_of_the_dynamics_must_fit_into_a_class(tmp_path):
    words = [sys.executable, str(EXAMPLES / "zapping_dynamics.py"), "--every", "51", "--logdir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--every is 51; 1 to 50 is accepted" in done.stderr


@pytest.mark.slow
def test_several_processes_print_and_write_once(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*start, str(EXAMPLES / "several_gpus.py"), "--epochs", "1", "--logdir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after task 4") == 1 and "2 processes" in done.stdout
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
