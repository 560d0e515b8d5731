"""Every method in two processes: the weights of one process, the same in both at all times, results written once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from distributed_cases import METHODS, write_recipes
from processes import call

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")

QUICK = ("slca", "lorac_ipc", "cila")
WEIGHTS = 1e-5  # relative, after the first task, of all weights together
TENSOR = 1e-3  # of each: Adam makes much of gradients that are nothing but rounding, as those of the keys' biases
FIGURES = 1 / 40 + 1e-9  # one of the 40 test images of the ten classes


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Runs of the methods alone and in two processes; all of them with ``--slow``."""
    methods = METHODS if request.config.getoption("--slow") else QUICK
    folder = tmp_path_factory.mktemp("distributed")
    write_recipes(folder, methods)
    for processes in (1, 2):
        status, _, err = call("record", folder, *methods, processes=processes)
        assert status == 0, err[-3000:]
    return folder


def results(runs: Path, processes: int, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / str(processes) / method / "results.json").read_text())
    return found


CHOSEN = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", CHOSEN)
def test_weights_of_the_first_task_are_those_of_one_process(runs: Path, method: str) -> None:
    one, two = (load_file(runs / str(n) / f"{method}.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and len(one) > 10
    squares = torch.zeros(2, dtype=torch.float64)
    for name, tensor in one.items():
        if not tensor.is_floating_point():
            assert torch.equal(two[name], tensor), name
            continue
        found = torch.stack([(two[name] - tensor).double().square().sum(), tensor.double().square().sum()])
        assert found[0] <= TENSOR**2 * found[1], name
        squares += found
    assert squares[0] <= WEIGHTS**2 * squares[1]


@pytest.mark.parametrize("method", CHOSEN)
def test_both_processes_have_the_same_weights_at_all_times(runs: Path, method: str) -> None:
    first, second = (json.loads((runs / "2" / f"{method}-{rank}.json").read_text()) for rank in (0, 1))
    alone = json.loads((runs / "1" / f"{method}-0.json").read_text())
    assert first == second and len(first) == len(alone) > 20
    assert len(set(first)) > 10


@pytest.mark.parametrize("method", CHOSEN)
def test_figures_are_those_of_one_process(runs: Path, method: str) -> None:
    one, two = (results(runs, n, method) for n in (1, 2))
    assert two["performance"].pop("processes") == [2] and "processes" not in one["performance"]
    for name in ("stream", "protocol", "performance", "config_digest"):
        assert one[name] == two[name]
    for name, value in one["figures"].items():
        if name.startswith("accuracy/") and value is not None:
            assert abs(two["figures"][name] - value) <= FIGURES, name


@pytest.mark.parametrize("method", CHOSEN)
def test_everything_is_written_once(runs: Path, method: str) -> None:
    """Scalars of the same tags and steps, one event file, the same checkpoints."""
    tables = []
    for n in (1, 2):
        folder = runs / str(n) / method
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        rows = [line.split(",")[:2] for line in (folder / "metrics.csv").read_text().splitlines()]
        tables.append(rows)
        assert len(list((folder / "checkpoint").glob("step-*"))) == 1
    assert tables[0] == tables[1] and len(tables[0]) > 30
