"""Thousands of damaged checkpoints: each is refused by name, or what it holds is restored to the bit.

Five small runs are stopped in the middle, each with two checkpoints. Their files are truncated, flipped, overwritten,
exchanged, deleted, replaced by folders, links and pipes: with the sums left alone, which must always be noticed, and
with the sums made anew, as a half-wrong tool or an adversary would. ``--slow`` runs all 2,000 and more mutations; what
became of them is printed at the end.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "plugins"))
import checkpoint_recipes as recipes
import fuzz_calls as calls
import fuzz_cases as fuzz
import fuzz_damage as damage

from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.checkpoint_files import CheckpointError, checkpoints, read_checkpoint
from avalanche_firn.plugins.checkpoint_fit import experiences_left
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state
from avalanche_firn.plugins.strategy_state import capture_strategy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(os.name == "nt", reason="needs POSIX")]

# where the runs are stopped: inside an experience, or after its end
STOPS = {
    "slca": ("before_backward", 20),
    "lorac_ipc": ("before_eval_iteration", 2),
    "cila": ("before_backward", 17),
    "lp_ft": ("before_eval_iteration", 2),
    "avalanche_replay": ("before_backward", 22),
}
SECONDS = 60


class Lines(SupervisedPlugin):
    """Appends a line per iteration to a file, as loggers do."""

    stateless = True
    affects_results = False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{strategy.clock.train_iterations},loss,0.5\n")


@dataclass
class Entered:
    """A strategy that was brought to a checkpoint, just before it would train on."""

    strategy: Any
    experience: Any
    settings: dict[str, Any]
    state: Any = None
    error: BaseException | None = None
    resumed: bool = False
    """resume() came to its end."""

    def capture(self) -> None:
        self.state = copy.deepcopy({"strategy": capture_strategy(self.strategy), "random": capture_random_state()})


UNTIL_RESTORED = ("before_training_iteration", 1)


def enter(name: str, folder: Path, *, stop: tuple[str, int] = UNTIL_RESTORED, seed: int = 7) -> Entered:
    """Build a run and resume it, by default until its state is restored; errors of the resume are kept."""
    for draw in (torch.manual_seed, random.seed, np.random.seed):
        draw(seed)
    own = ExactCheckpointPlugin(folder / "checkpoint", every=3, append_only=[folder / "metrics.csv"])
    plugins = [Lines(folder / "metrics.csv"), recipes.Bomb(*stop), own]
    strategy, stream, settings = getattr(recipes, name)(plugins)
    done = Entered(strategy, stream.train_stream[0], settings)
    complete, until_restored = own._complete, stop == UNTIL_RESTORED

    def completed(strategy: Any) -> None:
        complete(strategy)
        if until_restored:
            done.capture()

    own._complete = completed  # type: ignore[method-assign]
    try:
        start = own.resume(strategy)
        done.resumed = True
        for done.experience in experiences_left(stream.train_stream, start):
            if not own.is_trained(done.experience):
                strategy.train(done.experience, **settings)
            elif until_restored:
                break
            strategy.eval(stream.test_stream)
    except recipes.Crash:
        pass
    except BaseException as error:  # judged by the caller
        done.error = error
    if done.error is None and done.state is None:
        done.capture()
    own.close()
    return done


@dataclass
class Stopped:
    """A run that was stopped: its folder, its checkpoints, and what they bring a strategy to."""

    name: str
    folder: Path
    newest: str
    older: str
    states: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stopped]]:
    """The five runs; the disk isn't waited for."""
    torch.set_num_threads(1)
    made: dict[str, Stopped] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "sync", lambda path: None)
        for name, stop in STOPS.items():
            folder = tmp_path_factory.mktemp(name)
            assert enter(name, folder, stop=stop, seed=0).error is None
            newest, older = [path.name for path in checkpoints(folder / "checkpoint")]
            run = Stopped(name, folder, newest, older)
            for chosen in (newest, older):
                work = tmp_path_factory.mktemp("reference") / "run"
                shutil.copytree(folder, work)
                if chosen == older:
                    shutil.rmtree(work / "checkpoint" / newest)
                run.sizes[chosen] = read_checkpoint(work / "checkpoint" / chosen)["append_only"]["../metrics.csv"]
                entered = enter(name, work)
                assert entered.error is None
                run.states[chosen] = entered.state
            assert differing_state(to_plain(run.states[newest]["strategy"]), to_plain(run.states[older]["strategy"]))
            made[name] = run
        yield made


def same(found: Any, expected: Any) -> bool:
    return differing_state(to_plain(found), to_plain(expected)) is None


# ------------------------------------------------------------------------ judging
def files_of(folder: Path) -> dict[str, str]:
    """Everything below a folder of a run but the lock."""
    return {name: text for name, text in calls.snapshot(folder).items() if not name.endswith("lock")}


def judge(run: Stopped, work: Path, *, trusted: bool) -> str:
    """Resume a changed folder and say what became of it.

    `trusted`: the sums were made anew, so that values may be others than those that were saved.
    """
    before = files_of(work)
    with calls.bounded(SECONDS):
        found = enter(run.name, work)
    after = files_of(work)
    if found.error is not None:
        if trusted and found.resumed and not isinstance(found.error, (CheckpointError, AssertionError)):
            return "failed while training"  # numbers that don't fit the stream, told by whoever needs them
        if not isinstance(found.error, CheckpointError):
            raise AssertionError(f"{found.error!r} reached the user") from found.error
        assert "checkpoint" in str(found.error), found.error  # the folder, or what of it doesn't fit
        if after != before:  # a form that is found wrong while restoring: files that grow were cut back by then
            assert {n for n in before | after if before.get(n) != after.get(n)} <= {"metrics.csv"} and trusted, (
                found.error
            )
        with pytest.raises((CheckpointError, RuntimeError)):  # nothing goes on silently
            found.strategy.train(found.experience, **found.settings)
        return "refused"
    for chosen, outcome in ((run.newest, "unharmed"), (run.older, "fell back")):
        if same(found.state, run.states[chosen]):
            if not trusted:
                assert len((work / "metrics.csv").read_bytes()) == run.sizes[chosen]
            elif chosen == run.newest:
                assert_loaded(run, work, found)
            return outcome
    if not checkpoints(work / "checkpoint")[1:] and found.strategy.clock.train_iterations <= 1:
        return "began anew"
    assert trusted, "a changed checkpoint was restored"
    assert_loaded(run, work, found)
    return "as another valid checkpoint"


def skeleton(value: Any) -> Any:
    """The form of a state: keys, types, and of tensors type and shape; lists whose entries are alike by their first."""
    if isinstance(value, dict):
        return {key: skeleton(inner) for key, inner in value.items()}
    if isinstance(value, list):
        forms = [skeleton(inner) for inner in value]
        return forms[:1] if all(form == forms[0] for form in forms) else forms
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def assert_loaded(run: Stopped, work: Path, found: Entered) -> None:
    """What was restored is exactly what the file holds, and of the form that was saved."""
    place = checkpoints(work / "checkpoint")[0]
    inside = read_checkpoint(place)
    original = read_checkpoint(run.folder / "checkpoint" / place.name)
    assert skeleton(inside["strategy"]) == skeleton(original["strategy"]), "another form was accepted"
    for part, held in original["strategy"].items():
        restored = found.state["strategy"][part]
        if same(held, run.states[place.name]["strategy"][part]):  # not what is made anew, such as caches
            assert same(inside["strategy"][part], restored), f"{part} isn't what the file holds"


TOLD: Counter[tuple[str, str]] = Counter()


WHAT = "changed checkpoints"


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints what became of the mutations."""
    with calls.printed(pytestconfig, WHAT, TOLD):
        yield


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The same as a property of each test."""
    before = TOLD.copy()
    yield
    record_property("fuzzed", calls.told(WHAT, TOLD - before))


def copied(run: Stopped, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A copy of a run: its folder, its newest and its older checkpoint."""
    work = tmp_path / "run"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(run.folder, work)
    return work, work / "checkpoint" / run.newest, work / "checkpoint" / run.older


def changed(run: Stopped, tmp_path: Path, change: Callable[[Path, Path], str], *, sums: bool) -> None:
    """Change a copy of a run and judge what is made of it."""
    work, newest, older = copied(run, tmp_path)
    kind = change(newest, older)
    if sums:
        damage.sums_anew(newest)
    outcome = judge(run, work, trusted=sums)
    TOLD[f"{kind}{', sums anew' if sums else ''}", outcome] += 1


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(700, 20, 2))
def test_bytes_that_change_are_noticed(stopped: dict[str, Stopped], tmp_path: Path, part: int, cases: int) -> None:
    def check(data: st.DataObject) -> None:
        run, name = stopped[data.draw(st.sampled_from(sorted(STOPS)))], data.draw(st.sampled_from(damage.FILES))
        changed(run, tmp_path, lambda newest, older: damage.change_bytes(data.draw, newest / name), sums=False)

    calls.explore(check, part=part, cases=cases, data=st.data())


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(300, 18, 1))
def test_files_that_are_something_else(stopped: dict[str, Stopped], tmp_path: Path, part: int, cases: int) -> None:
    def check(data: st.DataObject) -> None:
        run = stopped[data.draw(st.sampled_from(sorted(STOPS)))]
        changed(run, tmp_path, lambda newest, older: damage.change_files(data.draw, newest, older), sums=False)

    calls.explore(check, part=part, cases=cases, data=st.data())


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(800, 25, 2))
def test_states_with_new_sums(stopped: dict[str, Stopped], tmp_path: Path, part: int, cases: int) -> None:
    def check(data: st.DataObject) -> None:
        run = stopped[data.draw(st.sampled_from(sorted(STOPS)))]
        changed(run, tmp_path, lambda newest, older: damage.change_state(data.draw, newest / "state.json"), sums=True)

    calls.explore(check, part=part, cases=cases, data=st.data())


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(300, 12, 1))
def test_states_with_a_new_form_too(stopped: dict[str, Stopped], tmp_path: Path, part: int, cases: int) -> None:
    """Who knows the format can write any state: it is refused in words, or fails aloud where it is used."""

    def check(data: st.DataObject) -> None:
        run = stopped[data.draw(st.sampled_from(sorted(STOPS)))]
        work, newest, _ = copied(run, tmp_path)
        kind = damage.change_state(data.draw, newest / "state.json")
        damage.form_anew(newest / "state.json")
        damage.sums_anew(newest)
        with calls.bounded(SECONDS):
            found = enter(run.name, work)
        outcome = "went on"
        if found.error is not None:
            if not found.resumed and not isinstance(found.error, CheckpointError):
                raise AssertionError(f"{found.error!r} reached the user") from found.error
            outcome = "refused" if isinstance(found.error, CheckpointError) else "failed while training"
        TOLD[f"{kind}, sums and form anew", outcome] += 1

    calls.explore(check, part=part, cases=cases, data=st.data())


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(500, 18, 1))
def test_tensors_with_new_sums(stopped: dict[str, Stopped], tmp_path: Path, part: int, cases: int) -> None:
    def check(data: st.DataObject) -> None:
        run = stopped[data.draw(st.sampled_from(sorted(STOPS)))]
        changed(run, tmp_path, lambda newest, _: damage.change_tensors(data.draw, newest / damage.FILES[1]), sums=True)

    calls.explore(check, part=part, cases=cases, data=st.data())


# ------------------------------------------------------------- faults found by it
@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A small checkpoint of plain values."""
    state = {"weight": torch.arange(6.0).reshape(2, 3), "name": "a", "steps": 3, "history": [0.5] * 40}
    return checkpoint_files.write_checkpoint(tmp_path, "step-000000001", to_plain(state), keep=2)


def edited(change: Callable[[dict[str, Any]], Any], *, form: bool = False) -> Callable[[Path], None]:
    """A change of what is in the ``state.json``, with its sum (and its form) made anew."""

    def apply(folder: Path) -> None:
        file = folder / "state.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))
        if form:
            damage.form_anew(file)
        damage.sums_anew(folder)

    return apply


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """Other bytes in a file, with its sum made anew."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        damage.sums_anew(folder)

    return apply


def pipe(folder: Path) -> None:
    """Reading it would wait for ever."""
    (folder / "SHA256SUMS").unlink()
    os.mkfifo(folder / "SHA256SUMS")


def stored_otherwise(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other tensors, with the sum made anew."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "tensors.safetensors")
        change(tensors)
        save_file(tensors, folder / "tensors.safetensors")
        damage.sums_anew(folder)

    return apply


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (pipe, "SHA256SUMS is missing or unreadable"),
    "no JSON": (written("state.json", b"{"), r"state\.json can't be read"),
    "a list": (written("state.json", b"[]"), "holds a list"),
    "thousands of levels": (written("state.json", b"[" * 100_000), r"state\.json can't be read"),
    "no number": (written("state.json", b'{"format": 1, "state": {"a": NaN}}'), "NaN is no JSON"),
    "an infinite number": (written("state.json", b'{"format": 1, "state": {"a": 1e999}}'), "1e999 is no finite number"),
    "a key twice": (written("state.json", b'{"format": 1, "state": {"a": 1, "a": 2}}'), "a key is there twice"),
    "format true": (edited(lambda c: c | {"format": True}), "format True"),
    "no state": (edited(lambda c: c | {"state": None}, form=True), "holds no state"),
    "another key": (edited(lambda c: c["state"].update(x=1)), "a state of another form"),
    "another type": (edited(lambda c: c["state"].update(steps=3.0)), "a state of another form"),
    "another text": (edited(lambda c: c["state"].update(name="b")), "a state of another form"),
    "a tensor that isn't there": (edited(lambda c: c["state"].update(x={"$tensor": "x"}), form=True), "no tensor 'x'"),
    "a tensor without a name": (edited(lambda c: c["state"].update(x={"$tensor": 1}), form=True), "has no name"),
    "numbers that are a matrix": (
        edited(lambda c: c["state"].update(weight={"$numbers": "weight"}), form=True),
        "isn't a list of numbers",
    ),
    "some of the fields of a run": (
        edited(lambda c: c["state"].update(kind="end"), form=True),
        "experience is missing",
    ),
    "no safetensors": (written("tensors.safetensors", b"x" * 100), r"tensors\.safetensors can't be read"),
    "a header of exabytes": (written("tensors.safetensors", (2**60).to_bytes(8, "little")), "can't be read"),
    "one tensor more": (stored_otherwise(lambda t: t.update(x=torch.zeros(2))), "has 'x', of which"),
    "one tensor less": (stored_otherwise(lambda t: t.pop("weight")), "has no tensor 'weight'"),
    "another shape": (stored_otherwise(lambda t: t.update(weight=torch.zeros(3, 2))), "tensor 'weight' is"),
    "another precision": (stored_otherwise(lambda t: t.update(weight=torch.zeros(2, 3).half())), "tensor 'weight' is"),
}


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG)
def test_what_was_restored_or_crashed(plain: Path, change: Callable[[Path], None], told: str) -> None:
    change(plain)
    with calls.bounded(SECONDS), pytest.raises(CheckpointError, match=told) as caught:
        read_checkpoint(plain)
    assert str(plain) in str(caught.value)


def test_a_checkpoint_of_before_has_no_form(plain: Path) -> None:
    """Versions before wrote neither the form nor the types of tensors."""
    expected = read_checkpoint(plain)
    edited(lambda c: {"format": 1, "state": c["state"]})(plain)
    assert same(read_checkpoint(plain), expected)


NODES = {
    "gigabytes for a picture": {"$picture": {"mode": "RGB", "size": [60_000, 60_000], "data": b"x"}},
    "any name of torch": {"$dtype": "load"},
    "no device": {"$device": "x"},
    "a device that isn't there": {"$on": ["cuda:77", torch.zeros(1)]},
    "a set of lists": {"$set": [[1]]},
    "no pairs": {"$items": [1]},
    "no bytes": {"$bytes": 3},
    "a size of texts": {"$size": ["x"]},
    "an unknown tag": {"$nothing": 1},
}


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_descriptions_that_nobody_writes(node: Any) -> None:
    if "$picture" in node:
        node = {"$picture": node["$picture"] | {"data": {"$bytes": torch.zeros(1, dtype=torch.uint8)}}}
    with calls.bounded(SECONDS, gigabytes=1), pytest.raises((ValueError, TypeError)):
        from_plain(node, current=object())


def test_attributes_that_are_never_saved_are_not_set(stopped: dict[str, Stopped], tmp_path: Path) -> None:
    """A state that replaces the strategy's own methods and model is refused, and the strategy can't go on."""
    run = stopped["slca"]
    work, newest, _ = copied(run, tmp_path)
    edited(lambda c: c["state"]["strategy"]["attributes"]["attributes"].update(model=None), form=True)(newest)
    found = enter(run.name, work)
    assert isinstance(found.error, CheckpointError) and "model: nothing is saved of it" in str(found.error)
    with pytest.raises(RuntimeError):
        found.strategy.train(found.experience, **found.settings)


def test_a_checkpoint_that_counts_more_experiences_than_there_are() -> None:
    """The run ended at once then, as if everything had been trained."""
    assert experiences_left(["a", "b"], 1) == ["b"] and experiences_left(["a", "b"], 2) == []
    with pytest.raises(CheckpointError, match="counts 64 trained experiences, the stream has 2"):
        experiences_left(["a", "b"], 64)
