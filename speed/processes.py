"""One process against two: the same epochs of training, and what each step exchanges.

An Avalanche strategy with :class:`~avalanche_firn.plugins.DistributedPlugin` and the fast path, on the embedded
digits transformer and on a wider one, on the CPU: in one process with one thread, in two with one thread each, and in
one with two threads. Each contestant is a program of its own, started in turn; it tells the median of its epochs.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from avalanche_firn.models.processes import process_rank
from avalanche_firn.plugins import DistributedPlugin, FastPathPlugin, end_processes, start_processes
from speed.measure import Lap, Row, Settings, interleaved, rows_from
from speed.rows import ROOT
from speed.workload import EpochClock, experience_of, held, network

__all__ = ["rows"]

BENCHMARK = "processes"
# backbone, edge of its images, images of an epoch, batch
CASES = {"digits": ("vit_firn_32.omniglot", 32, 512, 64), "vit_tiny": ("vit_tiny_patch16_224", 224, 32, 16)}
ONE, TWO, THREADS = "one process, one thread", "two processes, one thread each", "one process, two threads"
EPOCHS = 3


def _work(case: str, out: Path, *, quick: bool) -> None:
    """Train, and write the median seconds of an epoch and the bytes exchanged per step."""
    device = start_processes("cpu")
    name, edge, images, batch = CASES[case]
    model = network(name, edge)
    shared, clock = DistributedPlugin(allow=["_First", "_Last"]), EpochClock(device)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        train_mb_size=batch,
        train_epochs=EPOCHS + 1,
        device=device,
        plugins=[FastPathPlugin(), shared],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    clock.install(strategy)
    strategy.train(experience_of(held(name, edge, 2 * batch if quick else images)), eval_streams=[])
    if process_rank() == 0:
        exchanged = shared.bytes_given / shared.batches if shared.batches else 0
        found = {"seconds": statistics.median(clock.epochs[1:]), "bytes": exchanged}
        out.write_text(json.dumps(found), encoding="utf-8")
    end_processes()


def _call(case: str, processes: int, threads: int, quick: bool, told: dict[str, Any]) -> Lap:
    """A program with so many processes, and threads for each."""
    with tempfile.TemporaryDirectory(prefix="firn-speed-") as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "speed.processes", case, str(out), *(["--quick"] if quick else [])]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            words = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900
        )
        found = json.loads(out.read_text(encoding="utf-8"))
    told.update(found)
    return Lap(found["seconds"])


def rows(settings: Settings) -> list[Row]:
    """Each case: the two other ways by one process with one thread."""
    found: list[Row] = []
    for case, (name, edge, images, batch) in CASES.items():
        if not settings.wants(case):
            continue
        told: dict[str, dict[str, Any]] = {ONE: {}, TWO: {}, THREADS: {}}
        ways = {ONE: (1, 1), TWO: (2, 1), THREADS: (1, 2)}
        contestants = {
            who: partial(_call, case, processes, threads, settings.quick, told[who])
            for who, (processes, threads) in ways.items()
        }
        timings = interleaved(contestants, settings.rounds_or(5), warmup=0)
        label = f"{name}, {edge} pixels, batches of {batch}"
        details = {TWO: {"bytes_exchanged_per_step": told[TWO]["bytes"]}}
        count = 2 * batch if settings.quick else images
        found += rows_from(timings, BENCHMARK, label, settings, to_what=ONE, images=count, details=details)
    return found


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]), quick="--quick" in sys.argv)
