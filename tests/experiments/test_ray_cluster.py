"""A comparison on a simulated Ray cluster of three machines, one of which dies: the results are the local ones.

The command runs in a process of its own, as a user starts it; here the cluster is made, watched and hurt. Compared to
the bit: results, curves in tables and event files, what TensorBoard would serve, weights and state of checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults")]
from ray_tools import at_work_on, cluster_of, kill_machine, no_cluster
from test_interrupted_curves import assert_same_comparison, lines, results
from tiny_comparison import json_lines, make_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")]
METHODS, SEEDS = ("naive", "slca", "lp_ft", "replay"), (0, 1, 2)
WORDS = (f"methods=[{','.join(METHODS)}]", f"seeds={list(SEEDS)}", "training.epochs=6")
LIMIT = 900.0


class Command:
    """``firn ... --json`` in another process."""

    def __init__(self, *words: str, address: str | None = None, environment: dict[str, str] | None = None) -> None:
        more = {"RAY_ADDRESS": address} if address else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "avalanche_firn.experiments.cli", *words, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**(environment or os.environ), **more},
        )
        self.lines: list[str] = []
        self.errors = ""
        assert self.process.stdout is not None and self.process.stderr is not None
        out, err = self.process.stdout, self.process.stderr
        self._readers = [
            threading.Thread(target=lambda: self.lines.extend(out), daemon=True),
            threading.Thread(target=lambda: setattr(self, "errors", err.read()), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def end(self) -> int:
        """Its exit status, when all that it said was read."""
        status = self.process.wait(LIMIT)
        for reader in self._readers:
            reader.join(30)
        return status

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What it told so far, of one kind."""
        return [event for event in json_lines("".join(self.lines)) if event["event"] == kind]

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def local(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the local comparison."""
    output = tmp_path_factory.mktemp("local")
    with Command("compare", str(recipe), *WORDS, "--output", str(output)) as command:
        assert command.end() == 0, command.errors
    return output / "tiny"


def until(command: Command, condition: Any, what: str, seconds: float = 300.0, pause: float = 0.02) -> Any:
    """What a condition gives as soon as it gives something, while a command goes on."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert command.process.poll() is None, f"the command has ended before {what}: {command.errors[-3000:]}"
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(pause)
    return found


def test_a_machine_dies_in_the_middle(recipe: Path, local: Path, tmp_path: Path) -> None:
    from kill_cases import story

    folder = tmp_path / "tiny"
    words = ("compare", str(recipe), *WORDS, "--on", "ray", "--output", str(tmp_path))
    with cluster_of(3) as (cluster, machines), Command(*words, address=cluster.address) as command:
        victim = machines[-1]
        until(command, lambda: command.events("run_finished"), "a run is finished")
        hurt = until(command, lambda: at_work_on(victim, folder), "a run goes on on the machine")
        os.kill(int((hurt / "lock").read_text()), signal.SIGSTOP)  # so that it is still there in the next moment
        step = max(path.name for path in hurt.glob("checkpoint/step-*"))
        kill_machine(victim)
        assert command.end() == 0, command.errors
        assert len([node for node in machines if node.any_processes_alive()]) >= 2
    started = [event for event in command.events("run_started") if event["folder"] == str(hurt)]
    assert [event["resumed"] for event in started] == [False, True]
    notes = [event["text"] for event in command.events("note")]
    lost = [text for text in notes if f"{hurt.parent.name} seed {hurt.name.removeprefix('seed-')}: its" in text]
    assert len(lost) == 1 and step in lost[0] and "started again" in lost[0], notes
    assert len(json.loads((hurt / "environment.json").read_text())["resumed_in"]) == 1
    (done,) = command.events("comparison_finished")
    assert (done["trained"], done["kept"]) == (len(METHODS) * len(SEEDS), 0)
    assert len(command.events("run_finished")) == len(METHODS) * len(SEEDS)
    assert not list(folder.glob(".check-*"))
    assert_same_comparison(folder, local)
    for method in METHODS:
        for seed in SEEDS:
            assert story(folder / method / f"seed-{seed}") == story(local / method / f"seed-{seed}")


def test_ctrl_c_and_going_on(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle: what goes on ends in order, and the told command ends it with the same results."""
    folder, whole = tmp_path / "ray" / "tiny", tmp_path / "local" / "tiny"
    words = ("compare", str(recipe), "methods=[naive]", "training.epochs=40")  # long enough to be met in the middle
    with cluster_of(2) as (cluster, machines):
        far = (*words, "--on", "ray", "--output", str(folder.parent))
        with Command(*far, address=cluster.address) as command:
            run = until(command, lambda: at_work_on(machines[1], folder), "a run goes on on the machine")
            command.process.send_signal(signal.SIGTERM)
            assert command.end() == 130, command.errors
        (told,) = command.events("interrupted")
        assert {"method": "naive", "seed": int(run.name.removeprefix("seed-"))} in told["left"]
        assert told["resume"] == f"firn resume {folder} --on ray"
        assert not (run / "results.json").exists() and any(run.glob("checkpoint/step-*"))
        assert not (run / "lock").exists()  # given back in order, and not by the death of its holder
        with Command(*told["resume"].split()[1:], address=cluster.address) as command:
            assert command.end() == 0, command.errors
        (done,) = command.events("comparison_finished")
        assert done["kept"] == len(told["finished"]) and done["trained"] == len(told["left"])
    assert len(json.loads((run / "environment.json").read_text())["resumed_in"]) == 1
    with Command(*words, "--output", str(whole.parent)) as command:
        assert command.end() == 0, command.errors
    assert_same_comparison(folder, whole)


def test_through_the_client_server(recipe: Path, local: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output, words = tmp_path / "out", ("compare", str(recipe), "methods=[naive]", "seeds=[0,1]", WORDS[2])
    words += ("--on", f"ray://127.0.0.1:{port}", "--output", str(output))
    with cluster_of(1, 2, ray_client_server_port=port), Command(*words) as command:
        assert command.end() == 0, command.errors
    for seed in (0, 1):
        run = Path("naive", f"seed-{seed}")
        assert results(output / "tiny" / run) == results(local / run)
        assert lines(output / "tiny" / run / "metrics.csv") == lines(local / run / "metrics.csv")


def test_transfers(tmp_path: Path) -> None:
    from kill_cases import PRETRAININGS, TRANSFER, story

    methods = [{"name": name, **PRETRAININGS[name]} for name in ("iid_zap", "asb_zap")]
    file = tmp_path / "transfer.yaml"
    file.write_text(json.dumps({**TRANSFER, "methods": methods, "seeds": [0, 1]}))
    with no_cluster() as environment:
        for place in ("local", "ray"):
            words = ("compare", str(file), "--on", place, "--output", str(tmp_path / place))
            with Command(*words, environment=environment) as command:
                assert command.end() == 0, command.errors
    for method in methods:
        for seed in (0, 1):
            run = Path("kills", str(method["name"]), f"seed-{seed}")
            assert story(tmp_path / "ray" / run) == story(tmp_path / "local" / run)
