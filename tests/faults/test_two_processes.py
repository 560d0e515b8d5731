"""Two processes on one folder: the second one stops at once with words, and nothing of the first is touched."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from avalanche_firn.experiments.comparison import compare
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.run_folders import claimed, plan_runs
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins import folder_lock
from avalanche_firn.plugins.checkpoint_errors import CheckpointError

sys.path.append(str(Path(__file__).parent))
from fault_tools import assert_same, files_of, firn, shared_recipe, single, whole_run

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is forked"),
]
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_recipe(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was alone."""
    return whole_run(tmp_path_factory)


@contextmanager
def waiting(work: Callable[[], object], at: int) -> Iterator[Any]:
    """Another process that stops in its n-th loss until it is told to go on."""
    mine, its = FORK.Pipe()

    def child() -> None:
        forward, calls = nn.CrossEntropyLoss.forward, iter(range(1, 10**6))

        def gated(self: Any, *args: Any) -> Any:
            if torch.is_grad_enabled() and next(calls) == at:
                its.send("there")
                its.recv()
            return forward(self, *args)

        nn.CrossEntropyLoss.forward = gated  # type: ignore[method-assign]
        try:
            work()
        except BaseException as error:
            print("the other process:", repr(error), file=sys.stderr)
            os._exit(9)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    try:
        assert mine.poll(120) and mine.recv() == "there"
        yield process
        if process.is_alive():
            mine.send("on")
            process.join(120)
            assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_a_second_process_on_a_run(recipe: Path, reference: Path, tmp_path: Path, capfd: Any) -> None:
    """Whatever command it is; the first one ends as if it had been alone."""
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    words = [recipe, "method=naive", "seed=0", "checkpoint.every=2", f"output={tmp_path}", "--quiet"]
    with waiting(lambda: run(single(recipe), folder, quiet=True, say=None), at=9) as other:
        before = files_of(folder)
        assert {"config.yaml", "metrics.csv", "lock"} <= set(before)
        for command in (["run", *words], ["resume", folder, "--quiet"], ["run", *words, "--fresh"]):
            began = time.perf_counter()
            status, _, told = firn(command, capfd)
            assert status == 1 and "Traceback" not in told
            assert f"{folder} is in use by another process (id {other.pid})" in told
            assert time.perf_counter() - began < 30
            assert files_of(folder) == before, command
        status, out, _ = firn(["report", folder.parent], capfd)  # reading needs nothing
        assert status == 2 or "unfinished" in out.lower()
        assert files_of(folder) == before
    assert_same(folder, reference)
    assert not (folder / "lock").exists()


@pytest.mark.slow
def test_a_second_process_on_a_comparison(recipe: Path, tmp_path: Path, capfd: Any) -> None:
    """Reports and dashboards read it meanwhile; another run of it may be trained by another process."""
    from avalanche_firn.experiments.dashboard import _refresh
    from avalanche_firn.experiments.unfinished import find_unfinished

    config = load_recipe(recipe, [f"output={str(tmp_path)!r}", "methods=[naive]", "training.epochs=1"])
    folder = tmp_path / "tiny"
    with waiting(lambda: compare(config, quiet=True, say=lambda text: None), at=8) as other:  # the second run
        before = files_of(folder)
        words = [recipe, "methods=[naive]", "training.epochs=1", f"output={tmp_path}", "--quiet"]
        for command in (["compare", *words], ["compare", *words, "--fresh"], ["resume", folder, "--quiet"]):
            status, _, told = firn(command, capfd)
            assert status == 1 and f"{folder} is in use by another process (id {other.pid})" in told, told
            assert "Traceback" not in told
            assert files_of(folder) == before, command
        with pytest.raises(CheckpointError, match="in use by another process"), claimed(folder / "naive" / "seed-1"):
            pass
        with claimed(folder / "slca" / "seed-0"):  # nobody works on it
            pass
        assert not (folder / "slca").exists()  # and nothing is left of it
        runs = {name: content for name, content in before.items() if not name.startswith("summary")}
        status, out, _ = firn(["report", folder], capfd)
        assert status == 0 and "Unfinished runs" in out
        _refresh(folder, lambda text: None)
        assert [run.seed for run in find_unfinished([folder])] == [1]
        assert {name: c for name, c in files_of(folder).items() if not name.startswith("summary")} == runs
    assert {p.finished for p in plan_runs(config, folder, False)} == {True}
    assert not list(folder.rglob("lock")) or [p.parent.name for p in folder.rglob("lock")] == ["checkpoint"] * 2


@pytest.mark.slow
def test_both_begin_at_once(recipe: Path, reference: Path, tmp_path: Path) -> None:
    """One of them wins, the other is told; there is one run in the end."""
    folder, told = tmp_path / "naive" / "seed-0", tmp_path / "told"
    told.mkdir()
    gate = FORK.Barrier(3)

    def child(number: int) -> None:
        gate.wait(60)
        try:
            run(single(recipe), folder, quiet=True, say=None)
        except CheckpointError as error:
            (told / str(number)).write_text(str(error))
            os._exit(3)
        os._exit(0)

    others = [FORK.Process(target=child, args=(number,)) for number in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(120)
    # who comes when it is finished reads the results
    codes = sorted(process.exitcode for process in others)
    assert codes[0] == 0 and set(codes) <= {0, 3} and codes.count(3) >= 1, codes
    for path in told.iterdir():
        assert "is in use by another process (id " in path.read_text()
    assert_same(folder, reference)


@pytest.mark.slow
def test_a_killed_process_blocks_nobody(recipe: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "naive" / "seed-0"
    with waiting(lambda: run(single(recipe), folder, quiet=True, say=None), at=9) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert (folder / "lock").read_text().strip() == str(other.pid)
    run(single(recipe), folder, quiet=True, say=None)
    assert_same(folder, reference)


def test_killed_before_there_was_anything(recipe: Path, tmp_path: Path) -> None:
    """A folder with nothing but the lock is no foreign folder."""
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "lock").write_text("123456\n")
    config = load_recipe(recipe, [f"output={str(tmp_path)!r}", "methods=[naive]", "seeds=[0]"])
    assert [planned.finished for planned in plan_runs(config, tmp_path / "tiny", False)] == [False]


# ------------------------------------------------------------------------ the lock
def test_a_part_of_the_same_process(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(CheckpointError, match="in use by this process"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "lock").exists()


def test_what_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refused)
    with (
        pytest.warns(RuntimeWarning, match=r"can't be locked .*would not be noticed; start one only"),
        claimed(tmp_path),
    ):
        pass


def test_a_lock_that_its_holder_deletes(tmp_path: Path, monkeypatch: Any) -> None:
    """Between opening and locking: two processes would hold two files of one name."""
    lockf, first = folder_lock.fcntl.lockf, iter([True])

    def late(handle: int, operation: int) -> None:
        if next(first, False):
            (tmp_path / "lock").unlink()
        lockf(handle, operation)

    monkeypatch.setattr(folder_lock.fcntl, "lockf", late)
    with claimed(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"  # of the file that is there now
        handle = folder_lock._OWNERS[tmp_path.resolve()][0]
        assert os.path.samestat(os.fstat(handle), os.stat(tmp_path / "lock"))


def test_a_wrong_configuration_leaves_nothing(recipe: Path, tmp_path: Path, capfd: Any) -> None:
    """The folder is claimed before the data are read, and given back with what was made for it."""
    data = recipe.parent / "data"
    status, _, told = firn(["compare", recipe, f"stream.root={data / 'absent'}", f"output={tmp_path / 'runs'}"], capfd)
    assert status == 2 and "absent" in told
    assert not list(tmp_path.iterdir())
