"""The curves of a comparison that was killed and resumed are those of one that never stopped, everywhere they are kept.

A fork server pays for the imports once. Each launch is a process of its own that runs the whole comparison; it counts
training steps, logged scalars and parts of the report, keeps the count in a file, and is killed by SIGKILL at a drawn
one. Compared are the scalars of every event file, ``metrics.csv``, ``results.json``, and what TensorBoard would serve.
Figures that measure time or memory differ from run to run; of these the steps must agree.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

CHILD = "__comparison_child__"
PRELOAD = ["avalanche_firn.experiments.comparison", "pytest", "PIL.Image"]
MEASURED = (
    "efficiency/seconds", "efficiency/images-per-second", "efficiency/peak-memory-MiB", "efficiency/run-seconds",
)  # fmt: skip


# --------------------------------------------------------------- the child
def child(recipe: str, output: str, words: list[str], mark: str, kill_at: int | None) -> None:
    """Run the comparison, or go on with it, and die at the given mark."""
    import torch

    from avalanche_firn.experiments import comparison
    from avalanche_firn.experiments.csv_logger import CsvLogger
    from avalanche_firn.experiments.recipe import load_recipe

    file, count = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), iter(range(1, 10**9))

    def marked(function: Any, phase: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(count)
            os.pwrite(file, f"{number:6d} {phase:12s}".encode(), 0)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    torch.optim.SGD.step = marked(torch.optim.SGD.step, "training")  # type: ignore[method-assign]
    CsvLogger.log_single_metric = marked(CsvLogger.log_single_metric, "logging")  # type: ignore[method-assign]
    comparison.write_report = marked(comparison.write_report, "report")  # type: ignore[attr-defined]
    comparison.read_results = marked(comparison.read_results, "files")  # type: ignore[attr-defined]
    config = load_recipe(recipe, [f"output={output!r}", *words])
    comparison.compare(config, quiet=True, say=lambda text: None)


if __name__ == CHILD:
    child(**CONFIG)  # type: ignore[name-defined]  # noqa: F821


# --------------------------------------------------------------- the parent
def launch(recipe: Path, output: Path, words: list[str], kill_at: int | None = None) -> tuple[int, str] | None:
    """Run a child. None if it came to its end, else the number and phase of the mark at which it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": str(recipe), "output": str(output), "words": words, "mark": str(output / "mark"), "kill_at": kill_at,
    }  # fmt: skip
    process = context.Process(
        target=runpy.run_path, args=(__file__,), kwargs={"init_globals": {"CONFIG": config}, "run_name": CHILD}
    )
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL), f"the comparison failed with exit code {process.exitcode}"
    return None if process.exitcode == 0 else marks(output)


def marks(output: Path) -> tuple[int, str]:
    """Number and phase of the last mark."""
    number, phase = (output / "mark").read_text().split()
    return int(number), phase


def served(folder: Path, *, purge: bool) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(run, tag) -> points, as TensorBoard's own reader gives them for the folder; `purge`: what it does by default."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    reader = EventMultiplexer(size_guidance={"scalars": 0}, purge_orphaned_data=purge)
    reader.AddRunsFromDirectory(str(folder))
    reader.Reload()
    return {
        (run, tag): [(event.step, event.value) for event in reader.Scalars(run, tag)]
        for run, tags in reader.Runs().items()
        for tag in tags["scalars"]
    }


def measured(tag: str) -> bool:
    """Whether a tag, also one of the summary, is about time or memory."""
    return any(name in tag for name in MEASURED)


def assert_same_points(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    """The same tags with the same points."""
    assert ours.keys() == theirs.keys() and ours
    for key, points in ours.items():
        if measured(key if isinstance(key, str) else key[1]):
            assert [step for step, _ in points] == [step for step, _ in theirs[key]], key
        else:
            assert points == theirs[key], key


def assert_same_comparison(ours: Path, theirs: Path) -> None:
    """Two comparisons ended alike in everything that is drawn."""
    from avalanche_firn.evaluation.tensorboard import read_scalars

    runs = sorted(path.parent.relative_to(ours) for path in ours.rglob("results.json"))
    assert runs == sorted(path.parent.relative_to(theirs) for path in theirs.rglob("results.json"))
    for run in runs:
        assert_same_points(read_scalars(ours / run), read_scalars(theirs / run))
        assert lines(ours / run / "metrics.csv") == lines(theirs / run / "metrics.csv")
        assert results(ours / run) == results(theirs / run)
    ours_raw = served(ours, purge=False)
    for (run, tag), points in ours_raw.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{tag} of {run} goes back: {steps}"
    assert_same_points(served(ours, purge=True), ours_raw)  # nothing that TensorBoard would have to hide
    assert_same_points(ours_raw, served(theirs, purge=True))
    assert {run for run, _ in ours_raw} > {str(run) for run in runs}  # and those of the summary


def lines(file: Path) -> list[bytes]:
    """The bytes of a metrics.csv; of what is measured anew without the value."""
    rows = file.read_bytes().splitlines(keepends=True)
    return [row.rpartition(b",")[0] if measured(row.decode()) else row for row in rows]


def results(run: Path) -> dict[str, Any]:
    """results.json without the cost."""
    found = json.loads((run / "results.json").read_text())
    del found["cost"]
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """naive and slca, a second per run, a checkpoint every three steps."""
    from tiny_comparison import make_recipe

    return make_recipe(tmp_path_factory.mktemp("tiny"))


def test_what_is_compared_can_differ(tmp_path: Path) -> None:
    """A curve that goes back is seen, and one more point, one other value, another step of a measured time."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in (0, 1, 2, 1, 2):
            writer.add_scalar("loss/train", step, step)
    assert [step for step, _ in served(tmp_path, purge=False)["run", "loss/train"]] == [0, 1, 2, 1, 2]
    same = {"loss/train": [(0, 1.0)], "efficiency/seconds": [(0, 3.0)]}
    assert_same_points(same, same | {"efficiency/seconds": [(0, 4.0)]})
    for other in ({"efficiency/seconds": [(1, 3.0)]}, {"loss/train": [(0, 1.5)]}, {"loss/train": [(0, 1.0), (1, 1.0)]}):
        with pytest.raises(AssertionError):
            assert_same_points(same, same | other)


def check(recipe: Path, base: Path, words: list[str], *, chains: int, kills: int, seed: int) -> list[str]:
    """Compare chains of killed launches with an uninterrupted comparison; phases of the kills."""
    rng, phases = random.Random(seed), list[str]()
    assert launch(recipe, base / "whole", words) is None
    total, last = marks(base / "whole")
    assert last == "report" and total > 100
    for chain in range(chains):
        output = base / f"chain-{chain}"
        for _ in range(kills):
            killed = launch(recipe, output, words, kill_at=rng.randrange(1, max(total // kills, 2)))
            phases += [] if killed is None else [killed[1]]
        assert launch(recipe, output, words) is None
        assert_same_comparison(output / "tiny", base / "whole" / "tiny")
    return phases


def test_killed_and_resumed(recipe: Path, tmp_path: Path) -> None:
    phases = check(recipe, tmp_path, ["seeds=[0]"], chains=1, kills=3, seed=1)
    assert len(phases) == 3


def test_killed_in_the_report(recipe: Path, tmp_path: Path) -> None:
    """After the last run, before the report: only that is left to do."""
    words = ["seeds=[0]", "methods=[slca]", "training.epochs=1"]
    assert launch(recipe, tmp_path / "whole", words) is None
    total, phase = marks(tmp_path / "whole")
    assert phase == "report"
    assert launch(recipe, tmp_path / "killed", words, kill_at=total) == (total, "report")
    assert launch(recipe, tmp_path / "killed", words) is None
    assert marks(tmp_path / "killed") == (1, "report")
    assert_same_comparison(tmp_path / "killed" / "tiny", tmp_path / "whole" / "tiny")


@pytest.mark.slow
def test_killed_and_resumed_many_times(recipe: Path, tmp_path: Path) -> None:
    methods = "methods=[naive,lp_ft,slca]"
    phases = check(recipe, tmp_path, [methods, "evaluation.drift={}"], chains=5, kills=5, seed=7)
    assert len(phases) >= 20 and {"training", "logging"} <= set(phases)
