"""Where the runs of a comparison are trained: here, one after the other, or on the machines of a Ray cluster.

What the command line says of it (``--on``, ``--gpus-per-run``, ``--cpus-per-run``) and what a run then asks of a
machine. Nothing here imports torch or Ray.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["Demand", "RayPlace", "Room", "demand_of", "place_of"]

_ACCEPTED = "local, ray, or ray://HOST:PORT"
_ADDRESS = re.compile(r"ray://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


@dataclass(frozen=True)
class RayPlace:
    """A Ray cluster.

    Attributes:
        address: ``ray://HOST:PORT`` of a Ray client server; None: the cluster that the environment variable RAY_ADDRESS
            names, else the one that ``ray start`` began on this machine, else a new one on this machine.
        gpus_per_run: share of a GPU for each run, 0 to 1; None: 1 where the recipe asks for CUDA, or for ``auto`` and
            the cluster has GPUs, else 0.
        cpus_per_run: CPU cores that each run is given room for; None: see :func:`demand_of`.
    """

    address: str | None = None
    gpus_per_run: float | None = None
    cpus_per_run: int | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The options of the command line that stand for it."""
        found = ["--on", self.address or "ray"]
        found += [] if self.gpus_per_run is None else ["--gpus-per-run", f"{self.gpus_per_run:g}"]
        found += [] if self.cpus_per_run is None else ["--cpus-per-run", str(self.cpus_per_run)]
        return tuple(found)


def place_of(on: str, gpus_per_run: float | None = None, cpus_per_run: int | None = None) -> RayPlace | None:
    """What ``--on`` and the options beside it stand for; None: this process.

    Raises:
        ConfigError: no such place, numbers out of range, or numbers for runs that aren't scheduled; all together.
    """
    problems = []
    found = _ADDRESS.fullmatch(on)
    if on not in ("local", "ray") and not (found and 0 < int(found[2]) < 65536):
        problems.append(Problem("--on", f"{on!r} isn't accepted", _ACCEPTED))
    if gpus_per_run is not None and not (math.isfinite(gpus_per_run) and 0 <= gpus_per_run <= 1):
        reason = f"{gpus_per_run:g} isn't accepted: a run uses one GPU at most"
        problems.append(Problem("--gpus-per-run", reason, "0 to 1, 0.5 lets two runs share a GPU"))
    if cpus_per_run is not None and cpus_per_run < 1:
        problems.append(Problem("--cpus-per-run", f"{cpus_per_run} isn't accepted", "a whole number, at least 1"))
    if on == "local":
        for name, value in (("--gpus-per-run", gpus_per_run), ("--cpus-per-run", cpus_per_run)):
            if value is not None:
                problems.append(Problem(name, "is set, but the runs go on here, one after the other", "with --on ray"))
    if problems:
        raise ConfigError(problems)
    return None if on == "local" else RayPlace(on if found else None, gpus_per_run, cpus_per_run)


@dataclass(frozen=True)
class Room:
    """What a machine has in all. `name`: of the machine."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Demand:
    """What each run asks of a machine. `at_once`: runs that the machines have room for, if nobody else uses them."""

    cpus: int
    gpus: float
    at_once: int = 1

    def fits(self, room: Room) -> bool:
        """Whether a machine could ever take a run."""
        return room.cpus >= self.cpus and room.gpus >= self.gpus


def demand_of(
    config: Config | TransferExperiment, place: RayPlace, rooms: Sequence[Room], *, threads_here: int
) -> Demand:
    """CPU cores and GPUs for each run, and how many runs there is room for.

    Unless the place says so, cores are the larger one of the recipe's ``threads`` and ``num_workers``, though never
    more than the largest machine has. Without ``threads`` it is one for a run with a GPU, else `threads_here`: what
    torch would use in a local comparison, and does use in the runs, so that their results are the same.

    Args:
        config: of the comparison, with the device that the runs go on with.
        rooms: of the machines.
        threads_here: of torch in this process.

    Raises:
        ConfigError: a device that no run gets there, or machines that are all too small.
    """
    device = config.device
    if device not in ("auto", "cpu", "cuda", "cuda:0"):
        reason = f"{device!r} on a Ray cluster, where a run sees no GPU but its own"
        raise ConfigError(Problem("device", reason, "auto, cpu or cuda"))
    most_gpus = max((room.gpus for room in rooms), default=0.0)
    wants = device.startswith("cuda") or (device == "auto" and most_gpus > 0)
    gpus = place.gpus_per_run if place.gpus_per_run is not None else float(wants)
    if gpus == 0 and device.startswith("cuda"):
        raise ConfigError(Problem("--gpus-per-run", f"0 with device {device}", "more than 0, up to 1"))
    if gpus > 0 and device == "cpu":
        raise ConfigError(Problem("--gpus-per-run", f"{gpus:g} with device cpu, which uses none", "0"))
    able = [room for room in rooms if room.gpus >= gpus]
    most_cpus = int(max((room.cpus for room in able), default=1.0))
    usual = max(config.threads or (1 if gpus else threads_here), _loaders(config))
    cpus = place.cpus_per_run or max(min(usual, most_cpus), 1)
    demand = Demand(cpus, gpus)
    fitting = [room for room in rooms if demand.fits(room)]
    if not fitting:
        listed = ", ".join(f"{room.name}: {room.cpus:g} CPUs, {room.gpus:g} GPUs" for room in rooms[:8]) or "none"
        reason = f"a run asks for {cpus} CPUs and {gpus:g} GPUs, and no machine of the cluster has them ({listed})"
        raise ConfigError(Problem("--on", reason, "other --cpus-per-run or --gpus-per-run, device: cpu"))
    return Demand(cpus, gpus, sum(_count(demand, room) for room in fitting))


def _count(demand: Demand, room: Room) -> int:
    by_cpu = int(room.cpus // demand.cpus)
    return min(by_cpu, int(room.gpus / demand.gpus + 1e-6)) if demand.gpus else by_cpu


def _loaders(config: Config | TransferExperiment) -> int:
    """Processes that load images for a run, the largest number among the methods."""
    if isinstance(config, TransferExperiment):
        return 0
    return max(config.training_of(method).num_workers for method in config.methods)
