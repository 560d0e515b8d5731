"""Runs of every method that are killed again and again, in all their phases, end as if nothing had happened.

The runs are those of ``firn run``: configuration, folders, checkpoints, loggers, probes, figures, transfers. Half of
the kills fall on any step of a run or on any time, the other half on a step of a phase, all phases in turn. At the end
of each chain results, scalars, weights and state equal those of a run that was never killed, to the bit. The suite
prints how often each method was killed in which phase.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from kill_cases import CASES, METHODS, PRETRAININGS, story
from kill_table import kill_table, record

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

LEAST = 12  # kills per case: 264 over all 22
LINKS = 5  # kills in a chain, at most
CHAINS = 40  # of a case, at most


def run_of(folder: Path, case: str) -> Path:
    return folder / "kills" / case / "seed-0"


@dataclass
class Reference:
    """A run that nobody disturbs: what it leaves, its steps by phase, its time."""

    story: dict[str, Any]
    marks: dict[str, int]
    seconds: float


@dataclass
class Kills:
    """Draws kills for one case, and counts those that came about."""

    reference: Reference
    seed: str
    links: int = LINKS
    phases: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.turn = itertools.count()
        self.names = sorted(self.reference.marks)

    def missing(self) -> list[str]:
        """Phases in which no run was killed so far."""
        return [name for name in self.names if not self.phases[name]]

    def draw(self) -> dict[str, Any]:
        """In turn: any step, a step of a phase (one that is missing), any time, a step of a phase."""
        kind = next(self.turn) % 4
        marks = self.reference.marks
        if kind == 0:
            return {"kill_at": self.rng.randint(1, sum(marks.values()))}
        if kind == 2:
            return {"after": self.rng.uniform(0, 0.9 * self.reference.seconds)}
        phase = self.rng.choice(self.missing() or self.names)
        return {"kill_at": self.rng.randint(1, marks[phase]), "only": phase}

    def chain(self, runs: Any, recipe: Path, folder: Path, case: str) -> None:
        """Kill a run some times, let it end, and compare what it leaves."""
        for link in range(self.links + 1):
            phase = runs.launch(folder, recipe, **(self.draw() if link < self.links else {}))
            if phase is None:
                break
            self.phases[phase] += 1
        left = story(run_of(folder, case))
        for part, expected in self.reference.story.items():
            assert left[part] == expected, f"{case}: {part} differ after kills in {dict(self.phases)}"
        assert left.keys() == self.reference.story.keys()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reference(runs: Any, recipes: dict[str, Path], run_root: Path) -> Any:
    """Undisturbed runs by case."""
    made: dict[str, Reference] = {}

    def get(case: str) -> Reference:
        if case not in made:
            folder = run_root / "references" / case
            began = time.monotonic()
            assert runs.launch(folder, recipes[case]) is None
            seconds = time.monotonic() - began
            marks = json.loads((folder / "marks.json").read_text())
            made[case] = Reference(story(run_of(folder, case)), marks, seconds)
        return made[case]

    return get


def kill(
    runs: Any, recipe: Path, reference: Reference, place: Path, case: str, *, least: int, everywhere: bool
) -> Counter[str]:
    """Chains of kills until there are enough, in all phases if that is asked for; the kills by phase."""
    kills = Kills(reference, f"kills of {case}", LINKS if everywhere else least)
    for number in range(CHAINS):
        kills.chain(runs, recipe, place / case / str(number), case)
        if kills.phases.total() >= least and not (everywhere and kills.missing()):
            break
    assert kills.phases.total() >= least
    assert not everywhere or not kills.missing(), f"{case} was never killed in {kills.missing()}"
    return kills.phases


def test_the_runs_have_all_phases(reference: Any) -> None:
    """Also that a comparison of stories compares something."""
    slca, transfer = reference("slca"), reference("iid_zap")
    common = {"starting", "building", "recording", "resuming", "saving", "opening", "training", "evaluating", "results"}
    assert {*common, "statistics", "aligning", "dynamics", "drift"} <= slca.marks.keys()
    assert {*common, "zapping", "sweep", "continual", "i.i.d.", "landscape"} <= transfer.marks.keys()
    assert sum(slca.marks.values()) > 500
    assert len(slca.story["tensors"]) > 50 and any("backbone" in name for name in slca.story["tensors"])
    assert len(slca.story["metrics"]) > 80 and len(slca.story["events"]) > 80
    assert len(transfer.story["tensors"]) > 5 and len(transfer.story["dynamics"]) == 1
    assert transfer.story["landscape"] and transfer.story["events"]


@pytest.mark.parametrize("case", ["slca", "lorac_ipc", "asb_zap"])
def test_a_few_kills(case: str, runs: Any, recipes: dict[str, Path], run_root: Path, reference: Any) -> None:
    """The same as below, in seconds."""
    kill(runs, recipes[case], reference(case), run_root / "few", case, least=2, everywhere=False)


def test_all_methods_are_killed() -> None:
    """A method that is added must be added here too."""
    from avalanche_firn.experiments.methods import METHODS as KNOWN

    assert {section["strategy"] for section, _ in METHODS.values()} == set(KNOWN)
    assert {section["strategy"] for section in PRETRAININGS.values()} == {"untrained", "iid", "asb", "meta_asb"}
    assert LEAST * len(CASES) >= 240


def test_the_table_adds_up_what_the_tests_recorded() -> None:
    """Also several records of one case, as from several processes."""
    found = [("slca", Counter(saving=2, training=1)), ("slca", Counter(saving=1)), ("joint", Counter(training=3))]
    reports = [SimpleNamespace(user_properties=[record(case, phases), ("other", "x")]) for case, phases in found]
    lines = kill_table([*reports, SimpleNamespace()]).splitlines()
    assert lines[1:4] == [
        "joint      3  training 3",
        "slca       4  training 1, saving 3",
        "all        7  training 4, saving 3",
    ]
    assert lines[4].startswith("7 kills of 2 kinds of runs") and kill_table([]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kills_in_every_phase(
    case: str, runs: Any, recipes: dict[str, Path], run_root: Path, reference: Any, record_property: Any
) -> None:
    """At least LEAST kills, and at least one in every phase that the case has."""
    phases = kill(runs, recipes[case], reference(case), run_root / "all", case, least=LEAST, everywhere=True)
    record_property(*record(case, phases))
