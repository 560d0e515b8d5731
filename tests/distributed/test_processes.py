"""What several processes do together (``checks.py``), in three of them; and what a single one does without torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from checks import CHECKS, naive, network, stream
from processes import call

from avalanche_firn.models.processes import all_rows, own_rows, process_count, process_rank, same_everywhere
from avalanche_firn.plugins.distributed import DistributedPlugin
from avalanche_firn.plugins.process_group import first_process_first, start_processes

PROCESSES = 3


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What became of each check in each process."""
    folder = tmp_path_factory.mktemp("checks")
    status, _, err = call(folder, processes=PROCESSES, program=Path(__file__).parent / "checks.py")
    assert status == 0, err[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
@pytest.mark.parametrize("check", CHECKS)
def test_together(found: list[dict[str, str]], check: str) -> None:
    for rank, results in enumerate(found):
        assert results[check] == "", f"process {rank}:\n{results[check]}"


def test_alone_nothing_is_shared() -> None:
    assert (process_count(), process_rank(), own_rows(5)) == (1, 0, slice(0, 5))
    rows = torch.randn(6, 2)
    assert all_rows(rows, 3) is rows and same_everywhere(rows)
    with first_process_first():
        pass
    strategy = naive(network(), DistributedPlugin())
    strategy.train(stream().train_stream[0], eval_streams=[])
    assert "forward" not in vars(strategy)


@pytest.mark.parametrize(
    ("variables", "device", "told"),
    [
        ({}, "cuda:1", "device is 'cuda:1'; 'auto', 'cpu' or 'cuda' is accepted"),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE is 'two'; a whole number, 1 or above"),
        ({"WORLD_SIZE": "0"}, "cpu", "WORLD_SIZE is '0'"),
    ],
)
def test_wrong_beginnings(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], device: str, told: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        start_processes(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        start_processes("cuda")
    assert start_processes() == torch.device("cpu")
