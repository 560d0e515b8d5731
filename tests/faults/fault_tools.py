"""What the tests of faults share: runs of a second, faults that strike at a chosen call, and what a run left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.runner import run

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
from tiny_comparison import make_recipe

__all__ = [
    "Strike", "assert_same", "files_of", "firn", "make_recipe", "no_room", "outcome", "shared_recipe", "single",
    "small_disk", "strike_loss", "weights", "whole_run",
]  # fmt: skip

MEASURED = ",efficiency/"


_MADE: dict[tuple[str, ...], Path] = {}


def shared_recipe(factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, made once in a process; its images are read only."""
    if () not in _MADE:
        _MADE[()] = make_recipe(factory.mktemp("shared"))
    return _MADE[()]


def whole_run(factory: pytest.TempPathFactory, *words: str) -> Path:
    """The folder of a run of :func:`single` that nothing happened to, made once in a process."""
    key = ("whole", *words)
    if key not in _MADE:
        _MADE[key] = factory.mktemp("whole") / "naive" / "seed-0"
        run(single(shared_recipe(factory), "naive", *words), _MADE[key], quiet=True, say=None)
    return _MADE[key]


def single(recipe: Path, method: str = "naive", *words: str) -> Config:
    """The configuration of one run of the tiny recipe: two tasks, 2 epochs of 3 steps of 4 images, saved every 2."""
    return load_recipe(recipe, ["checkpoint.every=2", *words]).single(method, 0)


def firn(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command line in this process."""
    from avalanche_firn.experiments.cli import main

    capsys.readouterr()
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


# ------------------------------------------------------------------ what a run left
def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run left but wall-clock figures, as plain values."""
    from avalanche_firn.evaluation.tensorboard import read_scalars

    results = json.loads((folder / "results.json").read_text())
    del results["cost"]
    lines = (folder / "metrics.csv").read_text().splitlines()
    events = {tag: points for tag, points in read_scalars(folder).items() if not tag.startswith("efficiency/")}
    return {
        "results": results,
        "metrics": [line for line in lines if MEASURED not in line],
        "events": json.dumps(events, default=str, sort_keys=True),
        "weights": {name: value.numpy().tobytes() for name, value in weights(folder).items()},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last checkpoint."""
    return load_file(max((folder / "checkpoint").glob("step-*")) / "tensors.safetensors")


def assert_same(first: Path, second: Path) -> None:
    """Two runs ended alike, to the bit."""
    mine, theirs = outcome(first), outcome(second)
    for part in ("results", "metrics", "events"):
        assert mine[part] == theirs[part], part
    assert mine["weights"].keys() == theirs["weights"].keys()
    for name, content in mine["weights"].items():
        assert content == theirs["weights"][name], name


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file of a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------- faults
class Strike:
    """Raises at the n-th call of functions that it was put around, and counts the calls.

    :param error: makes what is raised. :param at: the call, from 1; 0: never. :param last: whether it strikes once.
    """

    def __init__(self, error: Callable[[], BaseException], at: int, *, once: bool = True) -> None:
        self.error, self.at, self.once = error, at, once
        self.calls = 0
        self.struck = ""

    def check(self, what: str) -> None:
        self.calls += 1
        if self.at and (self.calls == self.at or (self.calls > self.at and not self.once)):
            self.struck = self.struck or what
            raise self.error()

    def around(self, function: Any, what: str, wanted: Callable[..., bool] = lambda *args, **kwargs: True) -> Any:
        """`function` with a check before it, where `wanted` accepts its arguments."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args, **kwargs):
                self.check(what)
            return function(*args, **kwargs)

        return checked


def strike_loss(monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException]) -> Strike:
    """An error in the n-th loss of a mini-batch that is trained on."""
    strike = Strike(error, at)
    trained = lambda *args, **kwargs: torch.is_grad_enabled()  # noqa: E731
    forward = nn.CrossEntropyLoss.forward
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", strike.around(forward, "loss", trained))
    return strike


def no_room(number: int = errno.ENOSPC) -> OSError:
    """What the system says on a full disk."""
    return OSError(number, os.strerror(number))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory of that size; skips the test where it can't be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        with suppress(OSError):
            os.sync()
        subprocess.run(["umount", "-l", folder], check=True)
