"""Comparisons on a Ray cluster: what is asked of machines, what is checked, lost and failed runs, and a small real one.

Most of it needs no Ray: a stand-in of the library does tasks at once and loses them when it is told to. A cluster of
several machines and their death: ``test_ray_cluster.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from ray_tools import no_cluster
from tiny_comparison import json_lines, make_recipe

from avalanche_firn.experiments import ray_cluster, ray_crew, ray_worker
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.places import Demand, RayPlace, Room, demand_of, place_of
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.run_folders import Planned, plan_runs
from avalanche_firn.experiments.time_left import TimeLeft
from avalanche_firn.experiments.together import Failure, Happening, RunsFailed, TogetherCourse


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """naive and slca, seeds 0 and 1, a second per run."""
    return make_recipe(tmp_path_factory.mktemp("tiny"))


# ------------------------------------------------------------------ places
def test_places() -> None:
    assert place_of("local") is None
    assert place_of("ray") == RayPlace() and place_of("ray").words == ("--on", "ray")
    far = place_of("ray://10.0.0.1:10001", 0.5, 4)
    assert far == RayPlace("ray://10.0.0.1:10001", 0.5, 4)
    assert far.words == ("--on", "ray://10.0.0.1:10001", "--gpus-per-run", "0.5", "--cpus-per-run", "4")
    assert place_of("ray://[::1]:10001").address == "ray://[::1]:10001"


@pytest.mark.parametrize("on", ["", "Ray", "ray:", "ray://", "ray://host", "ray://host:0", "ray://host:65536", "slurm"])
def test_other_places_are_refused(on: str) -> None:
    with pytest.raises(ConfigError, match=r"local, ray, or ray://HOST:PORT"):
        place_of(on)


def test_wrong_numbers_are_told_together() -> None:
    with pytest.raises(ConfigError) as told:
        place_of("slurm", float("nan"), 0)
    assert [problem.path for problem in told.value.problems] == ["--on", "--gpus-per-run", "--cpus-per-run"]
    with pytest.raises(ConfigError, match="with --on ray"):
        place_of("local", 0.5)
    for number in (-0.1, 1.5, float("inf")):
        with pytest.raises(ConfigError, match="0 to 1"):
            place_of("ray", number)


SMALL, LARGE, GPUS = Room("small", 2, 0), Room("large", 16, 0), Room("gpus", 32, 4)


@pytest.mark.parametrize(
    ("words", "place", "rooms", "expected"),
    [
        (["threads=null"], RayPlace(), [SMALL, LARGE], Demand(8, 0, 2)),  # as torch would use here
        (["threads=null"], RayPlace(), [SMALL], Demand(2, 0, 1)),  # never more than a machine has
        (["threads=1"], RayPlace(), [SMALL, LARGE], Demand(1, 0, 18)),
        (["threads=1", "training.num_workers=3"], RayPlace(), [SMALL, LARGE], Demand(3, 0, 5)),
        (["threads=1"], RayPlace(cpus_per_run=4), [SMALL, LARGE], Demand(4, 0, 4)),
        (["threads=null", "device=auto"], RayPlace(), [LARGE, GPUS], Demand(1, 1, 4)),
        (["threads=2", "device=auto"], RayPlace(gpus_per_run=0.5), [LARGE, GPUS], Demand(2, 0.5, 8)),
        (["threads=2", "device=auto"], RayPlace(gpus_per_run=0), [LARGE, GPUS], Demand(2, 0, 24)),
        (["threads=2", "device=cuda"], RayPlace(), [LARGE, GPUS], Demand(2, 1, 4)),
        (["threads=2", "device=cpu"], RayPlace(), [LARGE, GPUS], Demand(2, 0, 24)),
    ],
)
def test_what_a_run_asks_for(
    recipe: Path, words: list[str], place: RayPlace, rooms: list[Room], expected: Demand
) -> None:
    assert demand_of(load_experiment(recipe, words), place, rooms, threads_here=8) == expected


@pytest.mark.parametrize(
    ("words", "place", "rooms", "told"),
    [
        (["device=cuda:1"], RayPlace(), [GPUS], "sees no GPU but its own"),
        (["device=cuda"], RayPlace(), [LARGE], "no machine of the cluster has them .large: 16 CPUs, 0 GPUs"),
        (["device=cuda"], RayPlace(gpus_per_run=0), [GPUS], "0 with device cuda"),
        (["device=cpu"], RayPlace(gpus_per_run=1), [GPUS], "1 with device cpu"),
        (["device=cpu"], RayPlace(cpus_per_run=3), [SMALL], "asks for 3 CPUs"),
        (["device=cpu"], RayPlace(), [], "no machine of the cluster has them .none"),
    ],
)
def test_what_no_machine_can_give(recipe: Path, words: list[str], place: RayPlace, rooms: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        demand_of(load_experiment(recipe, words), place, rooms, threads_here=8)


def test_transfers_ask_for_threads(tmp_path: Path) -> None:
    config = load_experiment("zapping_digits", ["threads=3", "device=cpu"])
    assert demand_of(config, RayPlace(), [LARGE], threads_here=8) == Demand(3, 0, 5)


# ------------------------------------------------------------------ time left
class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_of_several_at_once() -> None:
    clock = Clock()
    left = TimeLeft(["a", "a", "a", "b"], clock, at_once=2)
    left.kept("a", 10.0)
    assert left.seconds_left() == pytest.approx(20)  # two places, four runs
    left.begin("a", 1)
    left.begin("a", 2)
    clock.now = 4.0
    assert left.seconds_left() == pytest.approx(6 + 10)
    left.pace(0.2, 4.0, 2)  # what the method took before counts until it is over
    clock.now = 20.0
    left.finish(1)
    assert left.seconds_left() == pytest.approx(20)  # a and b on the free place, one after the other: 20 s is known now
    left.give_up(2, again=True)
    assert left.seconds_left() == pytest.approx(60)  # one place is left to see, three runs
    left.begin("a", 2)
    left.begin("a", 3)
    left.give_up(3)
    left.finish(2)
    left.begin("b", 4)
    left.finish(4)
    assert left.seconds_left() == 0.0


# ------------------------------------------------------------------ the course
class FakeCrew:
    """Says what a test wants."""

    words, at_once = ("--on", "ray"), 2

    def __init__(self, script: Callable[[Sequence[Planned[Any]]], Iterator[Happening]]) -> None:
        self.work, self.cancelled = script, False

    def cancel(self) -> None:
        self.cancelled = True


class Listener:
    """Keeps what a narrator is told."""

    quiet, ended = True, False

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def tell(self, event: str, **facts: Any) -> None:
        self.heard.append({"event": event, **facts})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [heard for heard in self.heard if heard["event"] == event]


def course_of(recipe: Path, folder: Path, crew: FakeCrew, report: Any = None) -> tuple[TogetherCourse, Listener]:
    config = load_experiment(recipe)
    narrator, plan = Listener(), list(plan_runs(config, folder, False))
    more = {"name": "tiny", "folder": folder, "progress": False, "resume": folder, "settings": ("threads=1",)}
    return TogetherCourse(plan, narrator=narrator, crew=crew, report=report, **more), narrator


def results(seconds: float = 1.0) -> dict[str, Any]:
    return {"figures": {"accuracy/last": 0.5}, "cost": {"seconds": seconds}}


def test_a_failed_run_stops_no_other(recipe: Path, tmp_path: Path) -> None:
    written = []

    def script(waiting: Sequence[Planned[Any]]) -> Iterator[Happening]:
        first, second, third, fourth = waiting
        yield Happening("started", first, {"resumed": False})
        yield Happening("started", second, {"resumed": True})
        yield Happening("failed", first, {"failure": Failure("out of memory in task 1")})
        yield Happening("paced", second, {"share": 0.5, "seconds": 1.0})
        yield Happening("told", second, {"event": "experience", "task": 1, "seconds_left": None})
        yield Happening("lost", second, {"text": "its machine is gone"})
        yield Happening("passed", None, {})
        yield Happening("finished", third, {"results": results()})  # its first word has not come
        yield Happening("started", second, {"resumed": True})
        yield Happening("finished", second, {"results": results()})
        yield Happening("failed", fourth, {"failure": Failure("TypeError: no", "Traceback\n  here\n")})

    def report(runs: Any) -> Path:
        written.append(len(runs))
        return tmp_path / "report.html"

    crew = FakeCrew(script)
    course, narrator = course_of(recipe, tmp_path, crew, report)
    with pytest.raises(RunsFailed) as told:
        course.work_together()
    assert str(told.value).splitlines() == [
        "2 runs have failed, of 4:", "naive seed 0: out of memory in task 1", "slca seed 1: TypeError: no", "Traceback",
        "  here",
    ]  # fmt: skip
    assert not crew.cancelled and written[-1] == 2  # the report of what is finished
    assert [event["number"] for event in narrator.of("run_started")] == [1, 2, 2]
    (experience,) = narrator.of("experience")
    assert experience["seconds_left"] is not None and experience["folder"] == tmp_path / "slca" / "seed-0"
    assert [event["to_come"] for event in narrator.of("run_finished")] == [2, 1]
    assert [event["error"] for event in narrator.of("run_failed")] == ["out of memory in task 1", "TypeError: no"]
    (failed,) = narrator.of("failed")
    assert failed["resume"] == f"firn resume {tmp_path} threads=1 --on ray"
    assert failed["left"] == [{"method": "naive", "seed": 0}, {"method": "slca", "seed": 1}]


def test_an_interruption_cancels_what_goes_on(recipe: Path, tmp_path: Path) -> None:
    def script(waiting: Sequence[Planned[Any]]) -> Iterator[Happening]:
        yield Happening("finished", waiting[1], {"results": results()})
        raise KeyboardInterrupt

    crew = FakeCrew(script)
    course, narrator = course_of(recipe, tmp_path, crew)
    with pytest.raises(KeyboardInterrupt):
        course.work_together()
    (told,) = narrator.of("interrupted")
    assert crew.cancelled and told["finished"] == [{"method": "slca", "seed": 0}] and len(told["left"]) == 3


# ------------------------------------------------------------------ a stand-in for Ray
class Gone(Exception):
    """The base of what the stand-in raises."""


class NodeDiedError(Gone):
    pass


class GetTimeoutError(Gone, TimeoutError):
    pass


class FakeRay:
    """Does what is asked when its result is asked for; `answers` says what becomes of each task, in their order."""

    def __init__(self, nodes: Sequence[dict[str, Any]] = ()) -> None:
        self.exceptions = SimpleNamespace(RayError=Gone, GetTimeoutError=GetTimeoutError)
        self.answers: dict[Any, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.cancelled: list[tuple[Any, bool]] = []
        self.stubborn = False
        self._nodes = list(nodes)

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            if isinstance(function, type):
                return SimpleNamespace(remote=lambda: self._actor(function()))

            def call(*arguments: Any) -> int:
                self.calls.append((function.__name__, arguments, options))
                return len(self.calls) - 1

            return SimpleNamespace(remote=call)

        return decorate

    def _actor(self, thing: Any) -> Any:
        self.mailbox = thing
        take, put = (SimpleNamespace(remote=getattr(thing, name)) for name in ("take", "put"))
        return SimpleNamespace(take=take, put=put)

    def wait(self, refs: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        if self.cancelled and self.stubborn and not self.cancelled[-1][1]:
            return [], refs
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if isinstance(ref, list):  # what the mailbox gave
            return ref
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, ref: Any, force: bool) -> None:
        self.cancelled.append((ref, force))


@pytest.fixture
def fake_run(recipe: Path, tmp_path: Path) -> Planned[Any]:
    return next(plan_runs(load_experiment(recipe), tmp_path, False))


def crew_of(ray: FakeRay, **more: Any) -> ray_crew.RayCrew:
    pytest.importorskip("ray")
    return ray_crew.RayCrew(ray, {"check": "c"}, {"num_cpus": 1}, mailbox_node="1" * 56, **more)


def checkpoint(run: Path, step: int) -> None:
    place = run / "checkpoint" / f"step-{step:09d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text("{}")
    (place / "tensors.safetensors").write_text("")


def test_a_lost_run_is_started_again_until_it_no_longer_comes_further(
    fake_run: Planned[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, step = FakeRay(), [""]
    monkeypatch.setattr(ray_crew, "_last", lambda folder: step[0])
    crew, found = crew_of(ray), []
    for number in range(6):
        ray.answers[number] = NodeDiedError()
    for happening in crew.work([fake_run]):
        if happening.kind != "passed":
            found.append((happening.kind, len(ray.calls)))
            if len(found) == 3:
                break
        if happening.kind == "lost" and len(found) == 2:
            step[0] = "step-000000003"  # it has come further: counted anew
    assert found == [("lost", 2), ("lost", 3), ("lost", 4)]
    step[0] = "step-000000003"
    ray = FakeRay()
    ray.answers = dict.fromkeys(range(6), NodeDiedError())
    happenings = [h for h in crew_of(ray).work([fake_run]) if h.kind != "passed"]
    assert [h.kind for h in happenings] == ["lost", "lost", "failed"] and len(ray.calls) == ray_crew.DEATHS == 3
    assert [arguments[2] for _, arguments, _ in ray.calls] == [1, 2, 3]
    text = happenings[-1].facts["failure"].text
    assert text.startswith("its machine is gone, 3 times in a row") and "step-000000003" in text


def test_without_locks_a_lost_run_is_not_started_again(fake_run: Planned[Any]) -> None:
    ray = FakeRay()
    ray.answers[0] = NodeDiedError()
    happenings = [h for h in crew_of(ray, locks=False).work([fake_run]) if h.kind != "passed"]
    assert [h.kind for h in happenings] == ["failed"] and len(ray.calls) == 1


def test_the_last_checkpoint_is_read_from_the_folder(tmp_path: Path) -> None:
    assert ray_crew._last(tmp_path) == ""
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 12)
    assert ray_crew._last(tmp_path) == "step-000000012"


def test_errors_of_a_run_are_no_loss_and_old_letters_are_dropped(fake_run: Planned[Any]) -> None:
    ray = FakeRay()
    crew = crew_of(ray)
    ray.answers = {0: NodeDiedError(), 1: {"failed": {"text": "no space", "trace": ""}}}
    seen = []
    for happening in crew.work([fake_run]):
        if happening.kind == "lost":
            ray.mailbox.put(0, 1, "told", {"event": "experience"})  # of the one that was thought dead
            ray.mailbox.put(0, 2, "paced", {"share": 0.5, "seconds": 1.0})
        seen.append(happening.kind)
    assert seen == ["lost", "passed", "paced", "failed", "passed"]


def test_cancelling_is_gentle_first(fake_run: Planned[Any]) -> None:
    for stubborn, expected in ((False, [(0, False)]), (True, [(0, False), (0, True)])):
        ray = FakeRay()
        ray.stubborn, ray.answers = stubborn, {0: NodeDiedError(), 1: NodeDiedError(), 2: NodeDiedError()}
        crew = crew_of(ray)
        work = crew.work([fake_run])
        first = next(work)
        assert first.kind == "lost"
        crew.cancel()
        assert [(ref - 1, force) for ref, force in ray.cancelled] == expected
        crew.cancel()  # nothing is left
        assert len(ray.cancelled) == len(expected)


# ------------------------------------------------------------------ checks of machines
def node(name: str) -> dict[str, Any]:
    number = name.encode().hex().ljust(56, "0")
    return {"NodeID": number, "Alive": True, "NodeManagerHostname": name, "Resources": {"CPU": 2.0}}


GOOD = {"sees": True, "locks": True, "directory": True, "packages": ray_worker.versions()}


def checked(answers: Sequence[Any]) -> tuple[bool, list[str]]:
    pytest.importorskip("ray")
    ray, narrator = FakeRay([node(f"m{i}") for i in range(len(answers))]), Listener()
    ray.answers = dict(enumerate(answers))
    job = {"check": "/shared/runs/tiny/.check-0", "token": "t", "directory": "/home/me"}
    locks = ray_cluster._check(ray, ray.nodes(), job, narrator)
    return locks, [note["text"] for note in narrator.of("note")]


def test_machines_that_are_fit() -> None:
    assert checked([GOOD, GOOD]) == (True, [])
    locks, notes = checked([GOOD, {**GOOD, "locks": False}])
    assert not locks and len(notes) == 1 and "don't reach m1" in notes[0]
    locks, notes = checked([{**GOOD, "packages": {**GOOD["packages"], "torch": "1.0"}}])
    assert locks and notes == ["m0 has other versions than this machine: torch 1.0; results may differ in rounding"]


def test_machines_that_are_not() -> None:
    blind, broken = {**GOOD, "sees": False, "locks": False}, Gone("a\nModuleNotFoundError: x")
    with pytest.raises(ConfigError) as told:
        checked([GOOD, blind, {**GOOD, "directory": False}, broken, GetTimeoutError(), blind])
    text = str(told.value)
    assert "/shared/runs/tiny isn't seen by m1, m5; accepted: a folder that all machines share" in text
    assert "m2 has no folder /home/me" in text and "m3 can't run avalanche-firn: ModuleNotFoundError: x" in text
    assert "m4 doesn't answer" in text and "m0" not in text


HOLD = """
import fcntl, sys
with open(sys.argv[1] + "/lock", "w") as file:  # as folder_lock does it, without its imports
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_machine_looks_at_the_folder(tmp_path: Path) -> None:
    check = tmp_path / "check"
    check.mkdir()
    (check / ray_worker.TOKEN).write_text("t")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(check)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        found = ray_worker.check_machine(str(check), "t", str(tmp_path))
        assert found == GOOD
        other = ray_worker.check_machine(str(check), "u", str(tmp_path / "none"), patience=0.0)
        assert (other["sees"], other["locks"], other["directory"]) == (False, False, False)
    finally:
        holder.communicate(timeout=60)
    (check / "lock").write_text("")  # nobody holds it: as where locks stay on their machine
    assert not ray_worker.check_machine(str(check), "t", str(tmp_path))["locks"]


def test_the_folder_of_a_check_is_gone_afterwards(tmp_path: Path) -> None:
    with ray_cluster._check_folder(tmp_path) as (check, token):
        assert (check / ray_worker.TOKEN).read_text() == token and (check / "lock").is_file()
    assert not list(tmp_path.iterdir())


def test_the_first_run_on_a_machine_loads_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))

    def first(token: str) -> bool:
        with ray_worker._once_here(token) as found:
            return found

    assert [first("a"), first("a"), first("b"), first("b")] == [True, False, True, False]
    with pytest.raises(ValueError), ray_worker._once_here("c"):
        raise ValueError  # what couldn't be loaded isn't loaded
    assert first("c")


def test_a_successor_waits_for_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    from avalanche_firn.plugins.checkpoint_errors import CheckpointError, FolderInUse

    monkeypatch.setattr(ray_worker, "_PAUSE", 0.0)
    tries = iter([FolderInUse("in use"), FolderInUse("in use"), None])

    def work() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "done"

    assert ray_worker._with_patience(work) == "done"
    monkeypatch.setattr(ray_worker, "PATIENCE", -1.0)
    for error in (FolderInUse("in use"), CheckpointError("damaged")):
        tries = iter([error, None])
        with pytest.raises(type(error)):
            ray_worker._with_patience(work)


def test_a_task_answers_in_words(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails, and how: without the folder, in the configuration, in the code."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    with ray_cluster._check_folder(tmp_path) as (check, token):
        config = load_experiment(recipe, ["backbone.weights=missing.safetensors"]).single("naive", 0)
        job = {"check": str(check), "token": token, "directory": str(tmp_path), "threads": 1, "gpu": False}
        job |= {"config": config.model_dump(), "running": None, "folder": str(tmp_path / "run")}
        answer = ray_worker.train(job | {"token": "x"}, 0, 1, None)
        assert "doesn't see the folder of the comparison" in answer["failed"]["text"]
        answer = ray_worker.train(job | {"directory": str(tmp_path / "none")}, 0, 1, None)
        assert "has no folder" in answer["failed"]["text"]
        (problem,) = ray_worker.prepare(job)["problems"]
        assert "missing.safetensors" in problem["reason"]
        answer = ray_worker.train(job, 0, 1, None)
        assert "missing.safetensors" in answer["failed"]["text"] and not answer["failed"]["trace"]
        monkeypatch.setattr(ray_worker, "_load", lambda config: {}["bug"])
        answer = ray_worker.train(job, 0, 1, None)
        assert answer["failed"]["text"] == "KeyError: 'bug'" and "Traceback" in answer["failed"]["trace"]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ the command
def test_without_ray(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    output = tmp_path / "runs"
    assert main(["compare", str(recipe), "--on", "ray", "--output", str(output)]) == 2
    assert 'accepted: pip install "avalanche-firn[ray]"' in capsys.readouterr().err
    assert not output.exists()
    assert main(["compare", str(recipe), "--on", "slurm", "--output", str(output)]) == 2
    assert "--on: 'slurm' isn't accepted; accepted: local, ray, or ray://HOST:PORT" in capsys.readouterr().err
    assert main(["compare", str(recipe), "--cpus-per-run", "x"]) == 2
    assert "'x' isn't accepted; a whole number" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_on_this_machine(recipe: Path, tmp_path: Path) -> None:
    """A Ray that is started here: the run that works has the results of a local one, the one that diverges is named."""
    pytest.importorskip("ray")
    from test_interrupted_curves import assert_same_points, lines
    from test_interrupted_curves import results as results_of

    from avalanche_firn.evaluation.tensorboard import read_scalars

    words = [str(recipe), "seeds=[0]", "methods.slca.training.optimizer.lr=1e30"]
    command = [sys.executable, "-m", "avalanche_firn.experiments.cli", "compare", *words, "--on", "ray", "--json"]
    with no_cluster() as environment:
        far = subprocess.Popen(
            [*command, "--output", str(tmp_path / "ray")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert main(["run", *words, "method=naive", "seed=0", "--quiet", "--output", str(tmp_path / "local")]) == 0
        out, err = far.communicate(timeout=280)
    assert far.returncode == 1, err
    told = {event["event"]: event for event in json_lines(out)}
    assert told["run_finished"]["method"] == "naive" and told["experience"]["tasks"] == 2
    assert "slca seed 0: " in told["failed"]["error"] and "naive" not in told["failed"]["error"]
    assert told["failed"]["left"] == [{"method": "slca", "seed": 0}] and told["failed"]["report"]
    assert told["run_failed"]["method"] == "slca" and "1 run has failed, of 2" in err and "Traceback" not in err
    here, there = tmp_path / "local" / "tiny" / "naive" / "seed-0", tmp_path / "ray" / "tiny" / "naive" / "seed-0"
    assert results_of(here) == results_of(there) and lines(here / "metrics.csv") == lines(there / "metrics.csv")
    assert_same_points(read_scalars(here), read_scalars(there))
    cost = [json.loads((run / "results.json").read_text())["cost"] for run in (here, there)]
    assert cost[0]["threads"] == cost[1]["threads"] and cost[0]["device"] == cost[1]["device"] == "cpu"
