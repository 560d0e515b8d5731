"""The system's time is set back and forward by hours: order of event files, waits, seconds, the newest checkpoint."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from avalanche_firn.evaluation.tensorboard import write_summary
from avalanche_firn.experiments.comparison import compare
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins.checkpoint_files import checkpoints, newest_valid
from avalanche_firn.plugins.event_files import after

sys.path.append(str(Path(__file__).parent))
from fault_tools import assert_same, shared_recipe, single, strike_loss, whole_run

pytestmark = pytest.mark.filterwarnings("ignore")
TRUE = time.time


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_recipe(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory)


def steps_in_order(folder: Path) -> dict[str, list[int]]:
    """The steps of every scalar in the order in which TensorBoard reads them: by the names of the files."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


@pytest.mark.parametrize(
    "hours",
    [(-1.0, -30.0), *(pytest.param(h, marks=pytest.mark.slow) for h in ((0.0, 0.0), (5.0, -2.0)))],
    ids=["back", "the same second", "on and back"],
)
def test_set_between_interruptions(
    hours: tuple[float, float], recipe: Path, reference: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A resumed run doesn't wait for the time to come back, and its events come after those before."""
    folder = tmp_path / "naive" / "seed-0"
    fixed = TRUE()
    for shift, at in zip((0.0, *hours), (5, 4, None), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda shift=shift: (fixed if hours == (0, 0) else TRUE()) + 3600 * shift)
            patch.setattr(time, "sleep", no_waits)
            if at is None:
                run(single(recipe), folder, quiet=True, say=None)
                continue
            strike_loss(patch, at, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                run(single(recipe), folder, quiet=True, say=None)
    assert_same(folder, reference)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 3
    for tag, steps in steps_in_order(folder).items():
        assert steps == sorted(steps), tag


def no_waits(seconds: float) -> None:
    assert seconds < 2, f"waits {seconds} s for the clock"


def jumping() -> Callable[[], float]:
    """A clock that is set by up to a day whenever it is asked."""
    draw = random.Random(3)
    return lambda: TRUE() + draw.uniform(-86400, 86400)


class Listener:
    """Keeps what a comparison tells."""

    quiet, ended = True, False

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, event: str, **facts: Any) -> None:
        self.told.append({"event": event, **facts})


def test_jumps_inside_runs(recipe: Path, reference: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Seconds, throughput and the time left come from a clock that only grows; results are those of a calm clock."""
    from avalanche_firn.experiments.csv_logger import read_metrics

    listener = Listener()
    words = ["checkpoint.every=2", "methods=[naive]", "seeds=[0]", f"output={str(tmp_path)!r}"]
    config = load_recipe(recipe, words)
    monkeypatch.setattr(time, "time", jumping())
    done = compare(config, narrator=listener)
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    assert_same(folder, reference)
    rows = read_metrics(folder / "metrics.csv")
    measured = {tag: value for _, tag, value in rows if tag.startswith("efficiency/") and "parameters" not in tag}
    assert len(measured) == 3 and all(0 <= value < 1e6 for value in measured.values()), measured
    for result in done.runs:
        cost = result["cost"]
        assert 0 < cost["training_seconds"] <= cost["seconds"] < 600 and cost["images_per_second"] > 0
    left = [facts["seconds_left"] for facts in listener.told if facts.get("seconds_left") is not None]
    assert left and all(0 <= value < 600 for value in left), left


@pytest.mark.slow
def test_the_newest_checkpoint_is_that_of_the_last_step(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever times the files carry."""
    folder = tmp_path / "naive" / "seed-0"
    with monkeypatch.context() as patch:
        strike_loss(patch, 10, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(single(recipe), folder, quiet=True, say=None)
    new, old = checkpoints(folder / "checkpoint")
    for path, when in ((new, TRUE() - 86400), (old, TRUE() + 86400)):
        for file in (path, *path.iterdir()):
            os.utime(file, (when, when))
    found = newest_valid(folder / "checkpoint")
    assert found is not None and found[0] == new
    assert int(new.name.split("-")[1]) > int(old.name.split("-")[1])


def test_a_summary_written_after_the_clock_was_set_back(tmp_path: Path, monkeypatch: Any) -> None:
    """A TensorBoard that runs goes on to files whose names come later only."""
    names = []
    for shift in (0, -7200, 3600):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda shift=shift: TRUE() + shift)
            patch.setattr(time, "time_ns", lambda shift=shift: int((TRUE() + shift) * 1e9))
            write_summary(tmp_path, {"accuracy/last": {"naive": [[0.1, 0.2]]}})
        written = [path.name for path in tmp_path.glob("events.out.tfevents.*") if path.stat().st_size]
        names += [name for name in written if name not in names]
    assert len(names) == 3 and names == sorted(names)


def test_names_of_event_files(tmp_path: Path, monkeypatch: Any) -> None:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    before = [tmp_path / "events.out.tfevents.2000000000.host.1.0", tmp_path / "metrics.csv"]
    with after(before):
        writer = EventFileWriter(str(tmp_path))
    writer.close()
    with after([]):
        other = EventFileWriter(str(tmp_path))
    other.close()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made[0].startswith("events.out.tfevents.1000000000.")
    assert made[1].startswith("events.out.tfevents.2000000001.")
