"""A real comparison of six methods with three seeds, and a headless Chromium to look at it with.

Needs Playwright's Python package (in the extra ``test``) and a Chromium: one on the PATH, one that `playwright install
chromium` fetched, or the file that FIRN_CHROMIUM names. Without them these tests are skipped. ``--screenshots DIR``
keeps the pictures that they make.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
METHODS = ("naive", "zapping", "lp_ft", "slca", "lorac_ipc", "cila")
SEEDS = (0, 1, 2)
# As the recipe, in a fraction of the time: figures are worse, what is drawn is the same.
QUICK = ["training.epochs=2", "methods.cila.training.epochs=1", "methods.cila.classifier.epochs=2", "threads=1"]


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``firn compare all_digits``, trained for one or two epochs a task; 18 runs with their summary."""
    from avalanche_firn.experiments.comparison import compare
    from avalanche_firn.experiments.recipe import load_experiment

    config = load_experiment("all_digits", [*QUICK, f"output={str(tmp_path_factory.mktemp('runs'))!r}"])
    assert [method.name for method in config.methods] == list(METHODS) and config.seeds == list(SEEDS)
    done = compare(config, quiet=True, say=lambda text: None)
    assert len(done.runs) == 18
    return done.folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    found = os.environ.get("FIRN_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    with playwright.sync_playwright() as running:
        if found is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("needs a Chromium on the PATH, in FIRN_CHROMIUM, or from: playwright install chromium")
        opened = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go."""
    chosen = request.config.getoption("--screenshots")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
