"""Shared by the fault tests: a folder in memory for runs, a server of runs, the table of all kills at the end."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from kill_table import tell_kills

MEMORY = Path("/dev/shm")  # a killed process loses nothing that it had written, so no disk is needed
ENOUGH = 2**30  # bytes that must be free there


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for runs, in memory where there is room: forcing files to a disk takes longer than a run."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        with tempfile.TemporaryDirectory(prefix="firn-faults-", dir=MEMORY) as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def recipes(run_root: Path) -> dict[str, Path]:
    """Recipe files of all cases by name."""
    from kill_cases import CASES, recipe_of, write_images

    images, made = write_images(run_root / "images"), {}
    for case in CASES:
        made[case] = run_root / f"{case}.yaml"
        made[case].write_text(json.dumps(recipe_of(case, images)), encoding="utf-8")
    return made


@pytest.fixture(scope="session")
def runs() -> Iterator[Any]:
    """The server of runs; it has imported everything."""
    from kill_runs import Runs

    server = Runs()
    yield server
    server.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of kills."""
    tell_kills(terminalreporter)
