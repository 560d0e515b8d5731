"""Long streams: what grows and what doesn't (``speed/soak.py``), and that a leak would be seen."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the folder speed/ is no part of the package

from speed import holdings, soak
from speed.measure import Row, Settings
from speed.rows import read_rows, write_rows

QUICK = Settings(quick=True)


@pytest.fixture(autouse=True)
def in_memory(run_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of these runs; also those of other processes."""
    monkeypatch.setenv("TMPDIR", str(run_root))
    monkeypatch.setattr("tempfile.tempdir", str(run_root))


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.contestant: row for row in rows}


class Leak(SupervisedPlugin, supports_distributed=False):
    """Keeps something of every task."""

    stateless = True

    def __init__(self, tensors: int = 0, files: bool = False, threads: bool = False) -> None:
        super().__init__()
        self.tensors, self.files, self.threads = tensors, files, threads
        self.kept: list[Any] = []
        self.over = threading.Event()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.tensors:
            self.kept.append(torch.zeros(self.tensors, dtype=torch.uint8))
        if self.files:
            self.kept.append(Path(__file__).open())  # noqa: SIM115  a leak
        if self.threads:
            self.kept.append(threading.Thread(target=self.over.wait))
            self.kept[-1].start()

    def close(self) -> None:
        self.over.set()
        for thing in self.kept:
            if isinstance(thing, threading.Thread):
                thing.join()
            elif not isinstance(thing, torch.Tensor):
                thing.close()


def watched(*plugins: SupervisedPlugin, method: str = "SLCA") -> dict[str, Row]:
    """Rows of a short stream in this process."""
    return by_name(soak.soak_rows(method, soak.record(method, 10, plugins), QUICK))


@pytest.mark.filterwarnings("ignore")
def test_a_stream_without_a_leak() -> None:
    rows = watched()
    assert rows["bytes of tensors"].met and abs(rows["bytes of tensors"].ratio or 1) < 0.1
    assert all(rows[name].met for name in ("threads", "children"))
    times = {"training", "statistics", "alignment", "evaluation", "saving", "other"}
    assert times <= rows.keys() and all(rows[name].details["last_seconds"] > 0 for name in times)
    slopes = rows["bytes of tensors"].details
    assert slopes["documented_per_task"] > 4000 and slopes["checkpoint_per_task"] > 4000
    assert slopes["events_per_task"] > 0 and slopes["table_per_task"] > 0


@pytest.mark.filterwarnings("ignore")
def test_leaks_are_seen() -> None:
    """An image of every task, an open file, a thread."""
    leak = Leak(tensors=2**14, files=True, threads=sys.platform == "linux")
    try:
        rows = watched(leak)
    finally:
        leak.close()
    tensors = rows["bytes of tensors"]
    assert not tensors.met and tensors.ratio == pytest.approx(2**14 / soak.TASK, rel=0.1)
    if sys.platform == "linux":
        assert not rows["files"].met and not rows["threads"].met


def noted(count: int, **growth: float) -> list[dict[str, Any]]:
    """A made-up record: figures that grow by so much per task."""
    names = ("documented", "heap", "resident", "objects", "tensors", "tensor_bytes", "pointer_types", "events", "table")
    return [
        {
            "task": task,
            "seconds": {"training": 0.1 + growth.get("training", 0) * task},
            **{name: 1000 + growth.get(name, 0) * task for name in (*names, "checkpoint")},
            **dict.fromkeys(("files", "threads", "children"), 3),
        }
        for task in range(1, count + 1)
    ]


def test_bytes_in_use_are_held_against_what_is_accounted_for() -> None:
    usual = {"documented": 5000, "tensor_bytes": 5000, "tensors": 4, "heap": 20_000, "resident": 40_000}
    rows = by_name(soak.soak_rows("SLCA", noted(60, **usual), Settings()))
    assert rows["bytes in use"].details["allowed_per_task"] == 5000 + 4 * soak.TENSOR + soak.TASK
    assert rows["bytes in use"].met and rows["resident bytes"].ratio == pytest.approx(2) and rows["resident bytes"].met
    rows = by_name(soak.soak_rows("SLCA", noted(60, **{**usual, "heap": 30_000}), Settings()))
    assert not rows["bytes in use"].met
    assert by_name(soak.soak_rows("SLCA", noted(60, **usual, training=0.0001), Settings()))["training"].met
    assert not by_name(soak.soak_rows("SLCA", noted(60, **usual, training=0.01), Settings()))["training"].met


def test_slopes_are_medians_and_know_what_nobody_knows() -> None:
    rows: list[dict[str, Any]] = [{"task": t, "heap": 100 + 7 * t, "resident": None} for t in range(1, 31)]
    rows[12]["heap"] += 10_000
    assert soak.slope(rows, "heap", 5) == 7
    assert soak.slope(rows, "resident", 5) is None


def test_phases_inside_others_dont_count_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 8.0, 10.0])
    monkeypatch.setattr(holdings.time, "process_time", lambda: next(now))
    phases = holdings.Phases()

    class Work:
        def inner(self) -> str:
            return "done"

        def outer(self) -> str:
            return self.inner()

    work = Work()
    phases.around(work, "inner", "inside")
    phases.around(work, "outer", "outside")
    assert work.outer() == "done"
    assert phases.take() == {"outside": 5.0, "inside": 5.0} and phases.take() == {}


def test_the_report_is_a_page_and_a_figure_of_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"documented": 5000, "tensor_bytes": 5000, "tensors": 4, "heap": 20_000, "resident": 40_000}
    rows = [row for method in soak.METHODS for row in soak.soak_rows(method, noted(60, **usual), Settings())]
    write_rows(tmp_path / "soak.json", rows)
    soak.report(read_rows(tmp_path / "soak.json"), tmp_path)
    page = (tmp_path / "soak.md").read_text(encoding="utf-8")
    assert "| bytes in use of the heap | 19.5 KiB |" in page and "LoRAC-IPC, 60 tasks" in page
    assert "| training | 100 ms | 100 ms | 1.00 | tasks 21 to 40 | 1.15, met |" in page
    picture = (tmp_path / "soak.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml") and len(picture) < 200_000


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="--case is 'none such'; of soak accepted: SLCA, LoRAC-IPC"):
        soak.rows(Settings(case="none such"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", soak.METHODS)
def test_two_hundred_tasks(method: str) -> None:
    """Memory and handles; times depend on what else the machine does, and are measured by ``python -m speed soak``."""
    rows = by_name(soak.rows(Settings(case=method)))
    assert {"bytes of tensors", "files", "threads", "children"} <= rows.keys()
    for name, row in rows.items():
        if row.quantity != "time":
            assert row.met, f"{name}: {row.ratio} times {row.to_what}"
