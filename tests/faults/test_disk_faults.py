"""A full disk, a read-only folder, no permission, a limit on files: said in words, and nothing that was saved is lost.

Simulated by file systems in memory where they can be mounted, by a limit of the system in a process of its own, and by
errors in the operations on files of a run, one after the other.
"""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from avalanche_firn.experiments import csv_logger
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.run_folders import claimed
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint_files import checkpoints, read_checkpoint
from avalanche_firn.plugins.run_errors import StorageError
from avalanche_firn.plugins.storage_stop import storage_error, storage_problem, writing

sys.path.append(str(Path(__file__).parent))
from fault_tools import (
    Strike,
    assert_same,
    files_of,
    firn,
    no_room,
    shared_recipe,
    single,
    small_disk,
    strike_loss,
    whole_run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_recipe(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk with room."""
    return whole_run(tmp_path_factory)


# --------------------------------------------------------------------- the words
def test_what_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, writing("a checkpoint", tmp_path / "a" / "step-1"):
        raise no_room()
    text = str(caught.value)
    assert text.startswith(f"can't write a checkpoint, {tmp_path}/a/step-1: No space left on device (")
    assert "bytes are free there" in text and text.endswith("make room there, or move the folder to another disk")
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device" in str(storage_error(rust, "x", tmp_path)) and storage_problem(rust) is not None
    for number, words in ((errno.EROFS, "read-only"), (errno.EACCES, "permissions"), (errno.EFBIG, "ulimit -f")):
        assert words in str(storage_error(no_room(number), "x", tmp_path))
    assert storage_problem(FileNotFoundError(errno.ENOENT, "absent")) is None and storage_problem(ValueError()) is None
    with pytest.raises(StorageError, match="first"), writing("x", tmp_path):  # not told twice
        raise StorageError("first")


# ------------------------------------------------------------------- a full disk
def fill(folder: Path) -> None:
    """Not a byte is left."""
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            while True:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    if size == 1:
                        raise
                    break


def test_a_disk_that_runs_full(recipe: Path, reference: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """The next file that is written says so, whichever it is; with room the run goes on to the bit."""
    with small_disk(tmp_path / "disk", "64m") as disk:
        words = ["run", recipe, "method=naive", "seed=0", "checkpoint.every=2", f"output={disk}", "--quiet"]
        folder = disk / "tiny" / "naive" / "seed-0"
        with monkeypatch.context() as patch:
            strike = strike_loss(patch, 9, lambda: KeyError())
            strike.check = lambda what: count(strike, lambda: fill(disk))  # type: ignore[method-assign]
            status, _, told = firn(words, capfd)
        assert status == 1 and "Traceback" not in told, told
        assert "can't write " in told and "No space left on device (0 bytes are free there)" in told
        assert "is kept: " in told and f"go on with: firn resume {folder}" in told
        assert_intact(folder)
        status, _, told = firn(["resume", folder, "--quiet"], capfd)  # still full
        assert status == 1 and "Traceback" not in told and "No space left" in told
        assert_intact(folder)
        (disk / "filler").unlink()
        assert firn(["resume", folder, "--quiet"], capfd)[0] == 0
        assert_same(folder, reference)


def count(strike: Strike, act: Callable[[], None]) -> None:
    strike.calls += 1
    if strike.calls == strike.at:
        act()


def assert_intact(folder: Path) -> None:
    """What carries a final name is whole, and the folder is free."""
    for path in checkpoints(folder / "checkpoint"):
        read_checkpoint(path)
    assert not list((folder / "checkpoint").glob(".new-*")), "half a checkpoint takes room"
    if (folder / "config.yaml").exists():
        load_experiment(folder / "config.yaml")
    for name in ("environment.json", "results.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    if folder.exists():
        assert not (folder / "lock").exists()
        process = multiprocessing.get_context("fork").Process(target=_claim, args=(folder,))
        process.start()
        process.join(30)
        assert process.exitcode == 0


def _claim(folder: Path) -> None:
    """Another process may work on the folder."""
    try:
        with claimed(folder):
            os._exit(0)
    except StorageError:  # a full disk is no lock
        os._exit(0)
    except BaseException:
        os._exit(7)


@pytest.mark.slow
def test_a_read_only_folder(recipe: Path, reference: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """A run that was interrupted, on a disk that was mounted read-only since."""
    with small_disk(tmp_path / "disk", "64m") as disk:
        folder = disk / "tiny" / "naive" / "seed-0"
        with monkeypatch.context() as patch:
            strike_loss(patch, 9, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                run(single(recipe), folder, quiet=True, say=None)
        before = files_of(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        try:
            status, _, told = firn(["resume", folder, "--quiet"], capfd)
            assert status == 1 and "Traceback" not in told, told
            assert f"can't write the lock of a run, {folder}/lock: Read-only file system" in told
            status, _, told = firn(["run", recipe, "method=slca", "seed=0", f"output={disk}", "--quiet"], capfd)
            assert status == 1 and "Read-only file system" in told and "Traceback" not in told
            assert "make it writable" in told
        finally:
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert files_of(disk) == before
        run(single(recipe), folder, quiet=True, say=None)
        assert_same(folder, reference)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(recipe: Path, tmp_path: Path, reference: Path) -> None:
    """RLIMIT_FSIZE, in a process of its own."""
    resource = pytest.importorskip("resource")
    folder, told = tmp_path / "naive" / "seed-0", tmp_path / "told"
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(resource, recipe, folder, told))
    process.start()
    process.join(120)
    assert process.exitcode == 3, told.read_text() if told.exists() else "nothing was told"
    text = told.read_text()
    assert "can't write a checkpoint" in text and "File too large" in text and "ulimit -f" in text
    assert checkpoints(folder / "checkpoint") == []
    run(single(recipe), folder, quiet=True, say=None)
    assert_same(folder, reference)


def _limited(resource: Any, recipe: Path, folder: Path, told: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        run(single(recipe), folder, quiet=True, say=None)
    except StorageError as error:
        told.write_text(str(error))
        os._exit(3)
    except BaseException as error:
        told.write_text(repr(error))
        os._exit(4)
    os._exit(5)


# ------------------------------------------------------------------ held images
HOLD = """
import sys, torch, numpy as np
from pathlib import Path
from avalanche_firn.benchmarks.image_store import Place, decode

folder, greys = Path(sys.argv[1]), int(sys.argv[2])

class Rows:
    def __len__(self):
        return 600

    def __getitem__(self, row):
        if row == 300 and greys == 0:  # another program takes what is free
            try:
                (folder / "other").write_bytes(b"x" * 6_000_000)
            except OSError:
                pass
        return row, 0

def load(row):
    colours = torch.arange(3, dtype=torch.uint8).view(3, 1, 1) * (row >= greys)
    return torch.full((3, 64, 64), row % 200, dtype=torch.uint8) + colours

place = Place(torch.device("cpu"), folder / "a.uint8")
try:
    store, = decode(Rows(), [0] * 600, np.arange(600), [load], [place], label="x", quiet=True)
    print("held", all(torch.equal(store.images[i], load(i)) for i in range(600)))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize(
    ("size", "greys", "told"),
    [("9m", 0, "held True"), ("4m", 0, "No space left on device"), ("9m", 400, "No space left on device")],
    ids=["filled meanwhile", "too small", "too small for the colours"],
)
def test_a_disk_that_runs_full_under_held_images(size: str, greys: int, told: str, tmp_path: Path) -> None:
    """What is written through a mapping has its place before: the process isn't ended by SIGBUS, no half is left."""
    with small_disk(tmp_path / "disk", size) as disk:
        done = subprocess.run([sys.executable, "-c", HOLD, disk, str(greys)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip() == told, (done.returncode, done.stdout, done.stderr)
        assert {path.name for path in disk.iterdir()} == ({"a.uint8", "other"} if told == "held True" else set())


def test_file_systems_that_reserve_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    from avalanche_firn.benchmarks.image_store import _reserve

    for number in (errno.EOPNOTSUPP, errno.EINVAL, None, errno.ENOSPC):
        with monkeypatch.context() as patch, (tmp_path / "x").open("wb") as file:
            if number is None:
                patch.delattr(os, "posix_fallocate", raising=False)  # macOS
            else:
                refuse = lambda *args, number=number: (_ for _ in ()).throw(no_room(number))  # noqa: E731
                patch.setattr(os, "posix_fallocate", refuse, raising=False)
            if number == errno.ENOSPC:
                with pytest.raises(OSError, match="No space"):
                    _reserve(file.fileno(), 1000)
            else:
                _reserve(file.fileno(), 1000)
                assert (tmp_path / "x").stat().st_size == 1000


# ------------------------------------------------------ every operation in its turn
def strike_files(patch: pytest.MonkeyPatch, folder: Path, at: int, number: int, *, once: bool = True) -> Strike:
    """An error in the n-th operation that writes below a folder."""
    strike = Strike(lambda: no_room(number), at, once=once)
    mine = lambda *args, **kwargs: str(folder) in " ".join(map(str, args))  # noqa: E731
    for name in ("rename", "replace", "truncate", "mkdir"):
        patch.setattr(os, name, strike.around(getattr(os, name), name, mine))
    creates = lambda path, flags, *args, **kwargs: mine(path) and bool(flags & os.O_CREAT)  # noqa: E731
    patch.setattr(os, "open", strike.around(os.open, "open", creates))
    patch.setattr(os, "fsync", strike.around(os.fsync, "fsync"))
    patch.setattr(Path, "write_text", strike.around(Path.write_text, "write_text", mine))

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            strike.check("save_file")
        except OSError as error:  # safetensors leaves nothing, and raises an error of its own
            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            ) from None
        original(*args, **kwargs)

    original = checkpoint_files.save_file
    patch.setattr(checkpoint_files, "save_file", save)

    def writer(file: Any, **options: Any) -> Any:
        rows = csv.writer(file, **options)
        return SimpleNamespace(writerow=strike.around(rows.writerow, "writerow"))

    patch.setattr(csv_logger, "csv", SimpleNamespace(writer=writer, DictReader=csv.DictReader))
    from tensorboard.compat.tensorflow_stub.io import gfile

    disk = gfile.LocalFileSystem
    patch.setattr(disk, "_write", strike.around(disk._write, "events", mine))
    return strike


@pytest.fixture(scope="module")
def operations(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations a run writes with."""
    folder = tmp_path_factory.mktemp("counted") / "naive" / "seed-0"
    with pytest.MonkeyPatch.context() as patch:
        strike = strike_files(patch, folder, 0, errno.ENOSPC)
        run(single(recipe), folder, quiet=True, say=None)
    return strike.calls


SPARED = ("", "fsync", "open", "rename", "mkdir")
"""What may fail once without harm: the number in a lock, a folder that is there already, deleting old checkpoints."""
NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES)


def fail_and_go_on(recipe: Path, folder: Path, reference: Path, at: int, *, once: bool) -> str:
    """An error at one operation, then a run that goes on; where the error struck."""
    number = NUMBERS[at % len(NUMBERS)]
    with pytest.MonkeyPatch.context() as patch:
        strike = strike_files(patch, folder, at, number, once=once)
        try:
            run(single(recipe), folder, quiet=True, say=None)
        except StorageError as error:
            assert os.strerror(number) in str(error), error
            assert str(folder) in str(error)
        else:  # what it struck wasn't needed, such as the number in the lock
            assert strike.struck in SPARED and (folder / "results.json").exists(), strike.struck
    assert_intact(folder)
    assert not (folder / "results.json").exists() or strike.struck in SPARED
    run(single(recipe), folder, quiet=True, say=None)
    assert_same(folder, reference)
    return strike.struck


def test_some_operations(recipe: Path, reference: Path, operations: int, tmp_path: Path) -> None:
    assert operations > 100
    struck = {
        fail_and_go_on(recipe, tmp_path / str(at) / "seed-0", reference, at, once=bool(at % 2))
        for at in (operations // 2,)
    }
    assert struck and "" not in struck


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_operation(part: int, recipe: Path, reference: Path, operations: int, tmp_path: Path) -> None:
    struck = [
        fail_and_go_on(recipe, tmp_path / str(at) / "seed-0", reference, at, once=bool(at % 2))
        for at in range(1 + part, operations + 1, 4)
    ]
    found = {what: struck.count(what) for what in set(struck)}
    print("struck in", found)
    assert {"save_file", "fsync", "events", "writerow", "rename"} <= set(found)


# ------------------------------------------------------------------- TensorBoard
@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), -1], ids=["early", "the last event"])
def test_events_that_are_lost_end_the_run(
    at: int, recipe: Path, reference: Path, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    """The thread that writes events dies; the run neither hangs nor ends as if nothing had happened."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    folder = tmp_path / "tiny" / "naive" / "seed-0"
    words = ["run", recipe, "method=naive", "seed=0", "checkpoint.every=2", f"output={tmp_path}", "--quiet"]
    if at < 0:
        at = number_of_events(reference)
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        disk = gfile.LocalFileSystem
        mine = lambda system, name, *args: str(tmp_path) in str(name)  # noqa: E731
        strike = Strike(no_room, at, once=False)
        patch.setattr(disk, "_write", strike.around(disk._write, "events", mine))
        status, _, told = firn(words, capfd)
    assert strike.struck and status == 1 and "Traceback" not in told and "Exception in thread" not in told, told
    assert f"can't write TensorBoard's events, {folder}: No space left on device" in told or "can't write what" in told
    assert not (folder / "results.json").exists()
    assert threading.active_count() <= threads
    assert_intact(folder)
    run(single(recipe), folder, quiet=True, say=None)
    assert_same(folder, reference)


def number_of_events(folder: Path) -> int:
    """Records of the event files of a run."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return sum(len(list(LegacyEventFileLoader(str(path)).Load())) for path in folder.glob("events.out.*"))


# ------------------------------------------------------------------------ reports
def test_a_report_that_cannot_be_written(reference: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(reference, folder / "naive" / "seed-0")
    (folder / "config.yaml").write_text((reference / "config.yaml").read_text())
    with monkeypatch.context() as patch:
        strike_files(patch, tmp_path, 1, errno.EROFS, once=False)
        status, _, told = firn(["report", folder, "--output", tmp_path / "made"], capfd)
    assert status == 1 and "Traceback" not in told, told
    assert "Read-only file system" in told and "make it writable" in told
    before = files_of(folder)
    with monkeypatch.context() as patch:
        strike_files(patch, tmp_path, 1, errno.EACCES, once=False)
        status, _, told = firn(["resume", folder, "--quiet"], capfd)
    assert status == 1 and "Traceback" not in told and "Permission denied" in told, told
    assert files_of(folder) == before
