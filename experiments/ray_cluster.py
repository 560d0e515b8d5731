"""A Ray cluster for the runs of a comparison: joined or started, and checked before anything is trained.

Checked are: a folder that every machine sees under the same path, locks that reach from one machine to another, the
folder that relative paths begin from, room for a run, and what the runs load (backbone, data, device), on one machine.
Where locks don't reach other machines (NFS mounted with ``nolock``, Lustre without ``flock``), a run whose machine is
lost isn't started again by itself, since a machine that only seems lost might go on writing.

A Ray that is started here listens on the network of this machine, as Ray always does. From version 2.52 on it asks for
a token, which is made anew each time; it has no dashboard, and sends no usage statistics.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments import ray_worker
from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.narration import Narrator
from avalanche_firn.experiments.places import RayPlace, Room, demand_of
from avalanche_firn.experiments.ray_crew import RayCrew
from avalanche_firn.experiments.run_folders import Planned, claimed
from avalanche_firn.plugins.run_errors import RunError
from avalanche_firn.plugins.storage_stop import writing

__all__ = ["ray_crew"]

_INSTALL = 'pip install "avalanche-firn[ray]"'
_ANSWER = 120.0  # seconds that a machine has for its check; our choice
_STORE = 100 * 2**20  # bytes of shared memory of a Ray that is started here; hardly any is used. Our choice
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PASSED = (*_THREADS, "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED", "HF_HUB_OFFLINE", "MPLBACKEND")
_TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@contextlib.contextmanager
def ray_crew(
    place: RayPlace, config: Any, plan: Sequence[Planned[Any]], folder: Path, narrator: Narrator
) -> Iterator[RayCrew]:
    """Join a cluster, check it, and give a crew that does the runs of a plan there; left again at the end.

    Args:
        place: which cluster, and what a run asks of it.
        config: of the comparison, with the device that the runs go on with.
        plan: every run. folder: of the comparison, which exists.
        narrator: told what was noticed.

    Raises:
        ConfigError: Ray isn't installed, the cluster can't be joined, a machine doesn't see the folder, no machine has
            room for a run, or something that the configuration points to can't be had there. Nothing was written.
        RunError: what the runs need can't be loaded there for another reason.
    """
    import torch

    ray, threads = _ray(), torch.get_num_threads()
    with _joined(ray, place), _check_folder(folder.absolute()) as (check, token):
        machines = [node for node in ray.nodes() if node["Alive"]]
        demand = demand_of(config, place, [_room(node) for node in machines], threads_here=threads)
        able = [node for node in machines if demand.fits(_room(node))]
        job: dict[str, Any] = {"check": str(check), "token": token, "directory": os.getcwd()}
        job |= {"threads": threads, "gpu": demand.gpus > 0}
        locks = _check(ray, able, job, narrator)
        variables = {name: os.environ[name] for name in _PASSED if name in os.environ}
        variables |= {name: value for name, value in os.environ.items() if name.startswith("FIRN_")}
        options = {
            "num_cpus": demand.cpus,
            "num_gpus": demand.gpus,
            "max_calls": 1,  # nothing of one run is left to the next
            "max_retries": 0,  # a run is started again by the crew, which knows how far it has come
            # Ray sets one thread per CPU of a task, where a local comparison takes torch's own number
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)} | variables},
        }
        _prepare(ray, config, job, options)
        facts: dict[str, Any] = {"words": place.words, "at_once": demand.at_once, "locks": locks}
        crew = RayCrew(ray, job, options, mailbox_node=_own_node(ray, place), **facts)
        try:
            yield crew
        finally:
            crew.cancel()


# ------------------------------------------------------------------------ joining
def _ray() -> Any:
    """The library, without its usage statistics.

    Raises:
        ConfigError: it isn't installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(Problem("--on", f"needs Ray, which can't be imported ({error})", _INSTALL)) from None
    return ray


@contextlib.contextmanager
def _joined(ray: Any, place: RayPlace) -> Iterator[None]:
    """Connected to the cluster; one that this process had joined already is used and stays."""
    if ray.is_initialized() and place.address is None:
        yield
        return
    address = place.address or os.environ.get("RAY_ADDRESS") or ("auto" if _started_here() else None)
    before = {name: os.environ.get(name) for name in _TOKEN}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            _connect(ray, address)
        finally:
            if threading.current_thread() is threading.main_thread() and callable(handler):
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which ends the process at once
        yield
    finally:
        ray.shutdown()
        if {name: os.environ.get(name) for name in _TOKEN} != before:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            _forget_token()


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
            return
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            if address != "auto":
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reason = f"the Ray cluster at {address} can't be joined: {told}"
                raise ConfigError(Problem("--on", reason, "the address of a running cluster")) from error
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        _forget_token()
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=_STORE, **quiet)
    except Exception as error:  # of many kinds: processes that don't start, ports, memory
        raise RunError(f"Ray can't be started on this machine: {type(error).__name__}: {error}") from error


def _forget_token() -> None:
    """Make Ray read the variables of its token again, as far as this version of it has any."""
    import ray._raylet

    library: Any = ray._raylet
    with contextlib.suppress(AttributeError):
        library.Config.initialize("")
        library.AuthenticationTokenLoader.instance().reset_cache()


def _started_here() -> bool:
    """Whether ``ray start`` has left the address of a cluster on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster").is_file()


def _own_node(ray: Any, place: RayPlace) -> str:
    """The machine that lives as long as this process is of any use: its own, or that of the client's server."""
    if place.address is None:
        return str(ray.get_runtime_context().get_node_id())
    heads = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    return str(heads[0]["NodeID"])


# ------------------------------------------------------------------------ checks
def _room(node: dict[str, Any]) -> Room:
    resources = node["Resources"]
    return Room(_name(node), resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _name(node: dict[str, Any]) -> str:
    """Host name and address of a machine, as people look for it."""
    host, address = node.get("NodeManagerHostname") or "", node.get("NodeManagerAddress") or ""
    if host and address and host != address:
        return f"{host} ({address})"
    return host or address or str(node["NodeID"])[:12]


@contextlib.contextmanager
def _check_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder with a token, locked, inside `folder`. Its name is new: no machine has an old picture of it."""
    token = secrets.token_hex(16)
    check = folder / f".check-{token[:12]}"
    with claimed(check):
        file = check / ray_worker.TOKEN
        with writing("a file for the check of the machines", file):
            file.write_text(token, encoding="utf-8")
        try:
            yield check, token
        finally:
            with contextlib.suppress(OSError):
                file.unlink()


def _check(ray: Any, machines: Sequence[dict[str, Any]], job: dict[str, Any], narrator: Narrator) -> bool:
    """Whether locks reach all machines; what differs in versions is told.

    Raises:
        ConfigError: machines that don't see the folder, have no such working folder, can't import this package or
            don't answer; all are named.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    refs = []
    for node in machines:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=where)(ray_worker.check_machine)
        refs.append(look.remote(job["check"], job["token"], job["directory"]))
    ray.wait(refs, num_returns=len(refs), timeout=_ANSWER)
    shared = Path(job["check"]).parent
    problems, blind, unlocked, here = [], [], [], ray_worker.versions()
    for node, ref in zip(machines, refs, strict=True):
        name = _name(node)
        try:
            found = ray.get(ref, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problems.append(Problem("--on", f"{name} doesn't answer within {_ANSWER:.0f} s", "machines that work"))
            continue
        except ray.exceptions.RayError as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            reason = f"{name} can't run avalanche-firn: {last}"
            problems.append(Problem("--on", reason, "the same packages on every machine, avalanche-firn among them"))
            continue
        if not found["sees"]:
            blind.append(name)
        elif not found["directory"]:
            reason = f"{name} has no folder {job['directory']}, which relative paths begin from"
            problems.append(Problem("--on", reason, "a working folder that every machine has"))
        elif not found["locks"]:
            unlocked.append(name)
        differ = [f"{key} {value or 'absent'}" for key, value in found["packages"].items() if value != here[key]]
        if differ:
            text = f"{name} has other versions than this machine: {', '.join(differ)}; results may differ in rounding"
            narrator.tell("note", text=text)
    if blind:
        reason = f"{shared} isn't seen by {', '.join(blind)}"
        problems.append(Problem("output", reason, "a folder that all machines share under the same path"))
    if problems:
        raise ConfigError(problems)
    if unlocked:
        text = (
            f"locks in {shared} don't reach {', '.join(unlocked)}: a run whose machine is lost will not be started "
            "again by itself, since a machine that only seems lost might go on writing"
        )
        narrator.tell("note", text=text)
    return not unlocked


def _prepare(ray: Any, config: Any, job: dict[str, Any], options: dict[str, Any]) -> None:
    """Load what the runs need, on the first machine that has room for a run."""
    load = ray.remote(**options)(ray_worker.prepare)
    try:
        found = ray.get(load.remote(job | {"config": config.model_dump(), "running": None}))
    except ray.exceptions.RayError as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        raise RunError(f"what the runs need can't be loaded on the cluster: {type(error).__name__}: {last}") from error
    if found.get("problems"):
        raise ConfigError([Problem(**problem) for problem in found["problems"]])
    if found.get("failed"):
        failed = found["failed"]
        raise RunError("\n".join(filter(None, (failed["text"], failed["trace"]))))
