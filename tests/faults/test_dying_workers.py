"""Processes that load images: one that is killed, one that hangs; the run stops with words and goes on to the bit."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, _utils, get_worker_info

from avalanche_firn.benchmarks.batches import WORKER_TIMEOUT, loader_of
from avalanche_firn.benchmarks.image_files import ImageFiles
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins.fast_loader import WorkerBatches, faster_loader
from avalanche_firn.plugins.loading_stop import loading_error
from avalanche_firn.plugins.run_errors import DataLoadingError

sys.path.append(str(Path(__file__).parent))
from fault_tools import assert_same, firn, outcome, shared_recipe, single, whole_run

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals"),
]
WORDS = ("training.num_workers=2", "performance.memory=off")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no five seconds for a worker to end by itself."""
    torch.set_num_threads(1)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_recipe(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose workers lived."""
    return whole_run(tmp_path_factory, *WORDS)


def kill_a_worker(monkeypatch: pytest.MonkeyPatch, at: int, *, training: bool) -> list[int]:
    """As the system does where memory ends: SIGKILL to a worker in the n-th loss; the pids that were killed."""
    forward, killed = nn.CrossEntropyLoss.forward, list[int]()
    calls = iter(range(1, 10**6))

    def lethal(self: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() == training and next(calls) >= at and not killed:
            for worker in multiprocessing.active_children():  # none where all batches of an evaluation are loaded
                killed.append(int(worker.pid or 0))
                os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.5)  # torch hears of it by a signal; waiting for the process would take that away
                break
        return forward(self, *args)

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lethal)
    return killed


@pytest.mark.parametrize(
    ("at", "training", "more"),
    [
        (9, True, ()),
        pytest.param(1, False, ("training.eval_batch_size=2",), marks=pytest.mark.slow),
        pytest.param(5, True, ("performance.fast_path=false",), marks=pytest.mark.slow),
        pytest.param(5, True, ("performance.persistent_workers=false",), marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_is_killed(
    at: int,
    training: bool,
    more: tuple[str, ...],
    recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: Any,
) -> None:
    """Told with its number and what helps; the run that goes on ends as if nothing had happened."""
    words = ["checkpoint.every=2", *WORDS, *more, f"output={tmp_path}", "--quiet"]
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    with monkeypatch.context() as patch:
        killed = kill_a_worker(patch, at, training=training)
        status, _, told = firn(["run", recipe, "method=naive", "seed=0", *words], capfd)
    assert killed and status == 1 and "Traceback" not in told, told
    assert f"the process {killed[0]} that loads images has died, most often because the memory" in told
    assert "what helps: training.num_workers=0 " in told and "performance.prefetch_factor" in told
    assert f"go on with: firn resume {folder}" in told and "is kept: " in told
    gc.collect()
    assert not multiprocessing.active_children()
    whole = whole_run(tmp_path_factory, *WORDS, *more)
    assert firn(["resume", folder, "--quiet"], capfd)[0] == 0
    assert_same(folder, whole)


@pytest.mark.slow
def test_going_on_without_workers(recipe: Path, reference: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """What the message says helps. Only random numbers of augmentations differ, and here they are declared."""
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    with monkeypatch.context() as patch:
        kill_a_worker(patch, 9, training=True)
        with pytest.raises(DataLoadingError):
            run(single(recipe, "naive", *WORDS), folder, quiet=True, say=None)
    status, _, told = firn(["resume", folder, "training.num_workers=0", "--quiet"], capfd)
    assert status == 0, told
    found, whole = outcome(folder)["results"], outcome(reference)["results"]
    given = {"from": "step-000000008", "settings": {"training.num_workers": 0}}
    assert found["performance"]["resumed_with"] == [given]
    assert found["config_digest"] == whole["config_digest"]
    assert found["accuracy_matrix"][0] == whole["accuracy_matrix"][0]  # of the task before


@pytest.mark.slow
def test_workers_that_hang(recipe: Path, reference: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """From the first image on: no batch within the time that is set."""
    folder = tmp_path / "naive" / "seed-0"
    began = time.monotonic()
    with monkeypatch.context() as patch:
        read = ImageFiles.__getitem__

        def hanging(self: ImageFiles, index: int) -> Any:
            if get_worker_info() is not None:
                time.sleep(600)
            return read(self, index)

        patch.setattr(ImageFiles, "__getitem__", hanging)
        with pytest.raises(DataLoadingError) as stopped:
            run(single(recipe, "naive", *WORDS, "performance.worker_timeout=1.5"), folder, quiet=True, say=None)
    assert "have given nothing for 1.5 seconds: they hang" in str(stopped.value)
    assert "longer performance.worker_timeout" in str(stopped.value) and "task 1/2" in str(stopped.value)
    del stopped  # its frames hold the loader
    gc.collect()
    assert time.monotonic() - began < 120 and not multiprocessing.active_children()
    run(single(recipe, "naive", *WORDS), folder, quiet=True, say=None)
    assert_same(folder, reference)


def _run_and_exit(recipe: Path, folder: Path, at: int) -> None:
    """The whole life of a process, whose exit mustn't wait for workers with prefetched batches."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if at:
            kill_a_worker(patch, at, training=True)
        try:
            run(single(recipe, "naive", *WORDS), folder, quiet=True, say=None)
        except DataLoadingError:
            sys.exit(3)
    sys.exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "status"), [(0, 0), (5, 3)])
def test_a_process_with_workers_ends(at: int, status: int, recipe: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run_and_exit, args=(recipe, tmp_path / "seed-0", at))
    process.start()
    process.join(120)
    assert not process.is_alive(), "it hangs at its exit"
    assert process.exitcode == status


# ----------------------------------------------------------------- waits of all loaders
def test_no_loader_waits_for_ever(stream_of: Any) -> None:
    data = TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    for loader in (loader_of(data, num_workers=1, batch_size=4), loader_of(data, num_workers=0, batch_size=4)):
        assert loader.timeout == (WORKER_TIMEOUT if loader.num_workers else 0)
    own = DataLoader(data, num_workers=1, batch_size=4, timeout=7)
    assert faster_loader(own) is own and own.timeout == 7  # somebody's choice stays
    fast = faster_loader(DataLoader(_Slow(), num_workers=1, batch_size=4), timeout=5)
    assert isinstance(fast, WorkerBatches) and fast._loader.timeout == 5


class _Slow(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3), 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "the process 12 that loads images has died, most"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "the processes 12, 13 that load images have died"),
        (
            "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "has died of a bus error: shared memory (/dev/shm) is full",
        ),
        (
            "DataLoader worker (pid 12) is killed by signal: Segmentation fault. ",
            "has died (killed: Segmentation fault)",
        ),
        ("unable to write to file </torch_12_34_5>: No space left on device (28)", "shared memory (/dev/shm) is full"),
        (
            "Too many open files. Communication with the workers is no longer possible. Please increase the limit "
            "using `ulimit -n` in the shell or change the sharing strategy",
            "too many open files; what helps: a higher limit (ulimit -n), or training.num_workers=0",
        ),
        ("received 0 items of ancdata", "too many open files; what helps: a higher limit (ulimit -n)"),
        ("DataLoader timed out after 300 seconds", "have given nothing for 300 seconds: they hang, or the disk does"),
        ("Pin memory thread exited unexpectedly", "a thread that loads images has died"),
    ],
)
def test_what_torch_says_of_workers(text: str, told: str) -> None:
    assert told in str(loading_error(RuntimeError(text)))
    try:
        raise KeyError("anywhere") from RuntimeError(text)  # the signal handler raises in any line
    except KeyError as error:
        assert told in str(loading_error(error))
