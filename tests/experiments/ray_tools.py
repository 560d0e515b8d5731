"""A Ray cluster of simulated machines for tests, and what is at work on one of them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray lets its workers give way to everything else on a machine, so tests on a busy one would wait for ever
EAGER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


@contextmanager
def cluster_of(machines: int, cpus: int = 1, **head: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Ray's own simulation: one node per machine, each with its own processes; the first is the head."""
    os.environ.update(EAGER)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        options = {"num_cpus": cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        first = cluster.add_node(**options, **head)
        yield cluster, [first, *(cluster.add_node(**options) for _ in range(machines - 1))]
    finally:
        cluster.shutdown()


@contextmanager
def no_cluster() -> Iterator[dict[str, str]]:
    """An environment in which no Ray is to be found, whatever goes on on this machine."""
    place = tempfile.mkdtemp(prefix="r")  # short: sockets lie in it
    try:
        others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        yield others | EAGER | {"RAY_TMPDIR": place}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def raylet(node: Any) -> int:
    """Process id of what makes a machine a machine."""
    (found,) = node.all_processes["raylet"]
    return int(found.process.pid)


def below(pid: int) -> list[int]:
    """All processes that a process has begun, and those that these have begun."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def kill_machine(node: Any) -> None:
    """Everything on it ends at once, as when its power fails."""
    chief = raylet(node)
    for pid in [chief, *below(chief)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def at_work_on(node: Any, comparison: Path) -> Path | None:
    """The folder of a run that a machine trains and has a checkpoint of: the lock of a run says who holds it."""
    theirs = set(below(raylet(node)))
    for lock in comparison.glob("*/seed-*/lock"):
        try:
            holder = int(lock.read_text() or 0)
        except (OSError, ValueError):
            continue
        run = lock.parent
        if holder in theirs and any(run.glob("checkpoint/step-*")) and not (run / "results.json").exists():
            return run
    return None
