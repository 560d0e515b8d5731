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
        ("lp_ft.py", [], "points lost on earlier tasks"),
        ("lp_ft.py", ["--no-probe"], "points lost on earlier tasks"),
        ("cila.py", [], "certified to lie between"),
        ("cila.py", ["--constant"], "coefficient 1.000"),
        ("lorac_ipc.py", [], "sent to their own task; frozen from now on: backbone.blocks."),
        ("lorac_ipc.py", ["--newest"], "composed.safetensors: 2.8 MiB, features differ by"),
    ],
)
def test_example(name, arguments, said, tmp_path):
    words = [sys.executable, str(EXAMPLES / name), "--epochs", "1", "--logdir", str(tmp_path / "log"), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "after task 4" in done.stdout
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
