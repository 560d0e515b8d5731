"""Runs that are killed by SIGKILL, at random places and at random times, and resumed until they end.

A fork server pays for the imports once; each run is a process of its own. It leaves a mark in a file at every step
(hooks of the strategy, operations on files), so a test can kill it at a chosen mark and see later where it died.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

CHILD = "__checkpoint_child__"
FINAL = ("weights.safetensors", "results.json", "state.json")
PRELOAD = [
    "avalanche.training",
    "avalanche.benchmarks",
    "avalanche.logging",
    "sklearn.datasets",
    "pytest",
    "avalanche_firn.plugins.checkpoint",
    "avalanche_firn.strategies.avalanche_der",
    "avalanche_firn.strategies.avalanche_scr",
    "avalanche_firn.strategies.cila",
    "avalanche_firn.strategies.lorac_ipc",
    "avalanche_firn.strategies.slca",
    "avalanche_firn.strategies.slca_plus_plus",
    "avalanche_firn.strategies.zapping",
    "tensorboard.backend.event_processing.event_accumulator",
]


# --------------------------------------------------------------- the child
class Marks:
    """Counts steps, keeps the last one in a file that survives the process, and kills the process at a given count."""

    def __init__(self, path: Path, kill_at: int | None, only: str | None) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.kill_at = kill_at
        self.only = only
        self.count = 0

    def __call__(self, phase: str) -> None:
        if self.only in (None, phase):
            self.count += 1
        os.pwrite(self.file, f"{self.count:6d} {phase:12s}".encode(), 0)
        if self.kill_at is not None and self.count >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Any, phase: Any = "files") -> Any:
        """``function`` with a mark before and after it; the phase may depend on its arguments."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            name = phase(*args) if callable(phase) else phase
            self(name)
            result = function(*args, **kwargs)
            self(name)
            return result

        return marked


def fingerprint(value: Any) -> Any:
    """A description of a state in which every tensor stands as type, shape and SHA-256."""
    if isinstance(value, dict):
        return {key: fingerprint(v) for key, v in value.items()}
    if isinstance(value, list):
        return [fingerprint(v) for v in value]
    if hasattr(value, "detach"):
        content = value.detach().contiguous().reshape(-1).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    return repr(value)


def child(folder: str, recipe: str, kill_at: int | None, only: str | None) -> None:
    """One process: build everything, resume, run to the end, write the final weights, results and state."""
    import checkpoint_recipes as recipes
    import torch
    from avalanche.logging import TensorboardLogger
    from avalanche.training.plugins import SupervisedPlugin
    from safetensors.torch import save_file

    from avalanche_firn.plugins import checkpoint_files, classifier_alignment, linear_probe
    from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin
    from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
    from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
    from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
    from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
    from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
    from avalanche_firn.plugins.task_inference import TaskInferencePlugin
    from avalanche_firn.plugins.zapping import ZappingPlugin
    from avalanche_firn.strategies.avalanche_der import LogitBuffer
    from avalanche_firn.strategies.avalanche_scr import ResumableSCR

    torch.set_num_threads(1)
    run = Path(folder)
    mark = Marks(run / "mark", kill_at, only)
    mark("building")
    for name in ("fsync", "rename", "truncate", "unlink"):
        setattr(os, name, mark.around(getattr(os, name)))
    checkpoint_files.save_file = mark.around(checkpoint_files.save_file)
    checkpoint_files.shutil.rmtree = mark.around(shutil.rmtree)
    checkpoint_files.cut_back = mark.around(checkpoint_files.cut_back)

    linear_probe.write_probe = mark.around(linear_probe.write_probe, "probing")
    classifier_alignment.align_classifier = mark.around(classifier_alignment.align_classifier, "aligning")

    def loss(losses: Any, output: torch.Tensor, targets: torch.Tensor) -> str:
        if losses._views is None:
            return "evaluating"
        return f"task-{len(losses.contrastive_losses)}" if output.requires_grad else "averaging"

    def fit(stage: Any, strategy: Any, *args: Any) -> str:  # a batch of features inside the classifier stage
        return f"fit-{strategy.experience.current_experience}"

    def step(importance: Any, strategy: Any) -> str:
        return f"{'window' if importance._recording else 'plain'}-{strategy.experience.current_experience}"

    def inner(phase: Any, strategy: Any, *args: Any) -> str:  # a step in a sequence of an episode
        return f"inner-{strategy.experience.current_experience}"

    for owner, name, phase in (
        (ContrastiveDistillationPlugin, "__call__", loss),
        (ClassifierStagePlugin, "_features", fit),
        (ImportantParameterPlugin, "after_update", step),
        (TaskInferencePlugin, "_measure", "measuring"),
        (TaskInferencePlugin, "_second_pass", "inferring"),
        (SequentialPhasePlugin, "_step", inner),
        (ZappingPlugin, "_zap", "zapping"),
        (ResumableEWCPlugin, "compute_importances", "importances"),
        (LogitBuffer, "update", "logits"),
        (ResumableSCR, "compute_class_means", "means"),
    ):
        setattr(owner, name, mark.around(getattr(owner, name), phase))

    class Marker(SupervisedPlugin):
        stateless = True

    def watch(hook: str) -> None:
        phase = "evaluating" if "eval" in hook else "opening" if hook in opening else "training"
        setattr(Marker, hook, lambda self, strategy, **kwargs: mark(phase))

    opening = ("before_training", "before_train_dataset_adaptation", "before_training_exp", "before_training_epoch")
    for hook in dir(SupervisedPlugin):
        if hook.startswith(("before_", "after_")):
            watch(hook)

    torch.manual_seed(0)
    random.seed(0)
    events = [run / "events.out.tfevents.*"]
    checkpoint = ExactCheckpointPlugin(run / "checkpoint", every=3, append_only=events)
    strategy, bm, settings = getattr(recipes, recipe)([Marker(), checkpoint], [TensorboardLogger(run)])
    mark("resuming")
    start = checkpoint.resume(strategy)
    results: dict[str, Any] = {}
    for experience in bm.train_stream[start:]:
        if not checkpoint.is_trained(experience):
            strategy.train(experience, **settings)
        mark("between")
        results = strategy.eval(bm.test_stream)
        mark("between")
    strategy.evaluator.loggers[0].writer.close()
    save_file({k: v.contiguous() for k, v in strategy.model.state_dict().items()}, run / "weights.safetensors")
    (run / "results.json").write_text(json.dumps({k: repr(v) for k, v in sorted(results.items())}))
    state = recipes.state_of(strategy)
    if any(getattr(p, "rebuilds_optimizer", False) for p in strategy.plugins):  # gone after the last experience
        del state["optimizer"]
        for plugin in state["plugins"]:
            (plugin["state"] or {}).pop("scheduler", None)
    (run / "state.json").write_text(json.dumps(fingerprint(state), sort_keys=True))
    mark("done")


if __name__ == CHILD:
    child(**CONFIG)  # type: ignore[name-defined]  # noqa: F821


# --------------------------------------------------------------- the parent
def launch(folder: Path, kill_at: int | None = None, only: str | None = None, after: float | None = None) -> str | None:
    """Run a child in ``recipe/folder``. None if it ended by itself, else the phase in which it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mark").unlink(missing_ok=True)
    config = {"folder": str(folder), "kill_at": kill_at, "only": only, "recipe": folder.parent.name}
    process = context.Process(
        target=runpy.run_path, args=(__file__,), kwargs={"init_globals": {"CONFIG": config}, "run_name": CHILD}
    )
    process.start()
    if after is not None:
        while not (folder / "mark").exists() and process.is_alive():
            time.sleep(0.001)
        process.join(after)
        if process.is_alive():
            process.kill()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), f"the run failed with exit code {process.exitcode}"
    return None if process.exitcode == 0 else (folder / "mark").read_text().split()[1]


def story(folder: Path) -> tuple[Any, ...]:
    """Final weights, results and state as bytes, and every scalar of the event files."""
    from checkpoint_recipes import scalars

    return (*((folder / name).read_bytes() for name in FINAL), scalars(folder))


def steps(folder: Path) -> int:
    return int((folder / "mark").read_text().split()[0])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Uninterrupted runs by recipe: story, number of marks, duration in seconds."""
    made: dict[str, Any] = {}

    def get(recipe: str) -> tuple[tuple[Any, ...], int, float]:
        if recipe not in made:
            folder = tmp_path_factory.mktemp("kill") / recipe / "reference"
            launch(folder)
            shutil.rmtree(folder)
            began = time.monotonic()
            assert launch(folder) is None
            made[recipe] = story(folder), steps(folder), time.monotonic() - began
        return made[recipe]

    return get


def kill_until_done(folder: Path, draw: Any, expected: tuple[Any, ...], limit: int = 60) -> list[str]:
    """Launch with kills from ``draw()`` until a run ends, compare its story, and give the phases of the kills."""
    phases = []
    for _ in range(limit):
        phase = launch(folder, **draw())
        if phase is None:
            assert story(folder) == expected
            return phases
        phases.append(phase)
    pytest.fail(f"no run came to its end in {limit} launches; killed in {Counter(phases)}")


def test_the_run_covers_what_is_to_be_killed(references):
    (weights, results, _, events), marks, _ = references("slca_evaluated")
    assert len(weights) > 1000 and b"Top1_Acc_Stream" in results
    assert len({tag for tag, _, _ in events}) > 10 and len(events) > 200
    assert marks > 400


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [
        ("slca_evaluated", 20),
        ("growing", 6),
        ("lp_ft", 6),
        ("cila", 4),
        ("lorac_ipc", 4),
        ("slca_plus_plus", 4),
        ("asb", 3),
        ("meta_asb", 3),
        ("zapped_iid", 2),
        ("ewc_online", 2),
        ("lwf", 2),
        ("der", 2),
        ("scr", 2),
        ("avalanche_replay", 2),
        ("fast_slca", 3),
        ("fast_replay", 2),
        pytest.param("slca_evaluated", 60, marks=pytest.mark.slow),
        *(
            pytest.param(f"cila{name}", 12, marks=pytest.mark.slow)
            for name in ("", "_task", "_final_model", "_domains")
        ),
        *(
            pytest.param(recipe, 12, marks=pytest.mark.slow)
            for recipe in ("lorac_ipc", "lorac_ipc_evaluated", "slca_plus_plus")
        ),
        *(
            pytest.param(recipe, 12, marks=pytest.mark.slow)
            for recipe in ("asb", "asb_evaluated", "meta_asb", "zapped_iid", "zapped_iid_reference")
        ),
        *(
            pytest.param(recipe, 12, marks=pytest.mark.slow)
            # not replay_domains: its loader workers would import all anew in every epoch of these processes
            for recipe in ("ewc_online", "lwf", "der", "der_bf16", "scr", "avalanche_replay")
        ),
    ],
)
def test_kills_at_random_places(recipe, kills, references, tmp_path):
    """At random steps, anywhere between the first line of a process and its last event."""
    expected, marks, _ = references(recipe)
    rng = random.Random(2026)
    phases: list[str] = []
    for chain in range(3 * kills):
        if len(phases) >= kills:
            break
        phases += kill_until_done(
            tmp_path / recipe / str(chain), lambda: {"kill_at": rng.randrange(1, marks)}, expected
        )
    print("killed in", dict(Counter(phases)))
    assert len(phases) >= kills
    assert kills < 20 or {"files", "training", "evaluating"} <= set(phases)


@pytest.mark.parametrize("kills", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_times(kills, references, tmp_path):
    """From outside, after a random time, wherever the process happens to be."""
    expected, _, seconds = references("slca_evaluated")
    rng = random.Random(kills)
    phases: list[str] = []
    for chain in range(3 * kills):
        if len(phases) >= kills:
            break
        began, killed = time.monotonic(), len(phases)
        draw = functools.partial(rng.uniform, 0, 0.6 * seconds)
        folder = tmp_path / "slca_evaluated" / str(chain)
        phases += kill_until_done(folder, lambda draw=draw: {"after": draw()}, expected)
        if len(phases) == killed:  # a whole run takes this long at the moment
            seconds = min(seconds, time.monotonic() - began)
    print("killed in", dict(Counter(phases)))
    assert len(phases) >= kills


def test_kills_at_every_operation_on_files(references, tmp_path):
    """Operation 1, 3, 5, ... of a process, in one chain: saving, cutting back event files, deleting old checkpoints."""
    expected, _, _ = references("slca_evaluated")
    operations = iter([*range(1, 60, 2), None])
    draw = lambda: {"kill_at": next(operations), "only": "files"}  # noqa: E731
    phases = kill_until_done(tmp_path / "slca_evaluated" / "run", draw, expected)
    assert len(phases) >= 20 and set(phases) == {"files"}


def test_kills_inside_linear_probes(references, tmp_path):
    """Before and after the rows are written, in both of the probed experiences."""
    expected, _, _ = references("lp_ft")
    for kill_at in (1, 2, 3, 4):
        places = iter([kill_at, None])
        draw = lambda places=places: {"kill_at": next(places), "only": "probing"}  # noqa: E731
        assert kill_until_done(tmp_path / "lp_ft" / str(kill_at), draw, expected) == ["probing"]


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        ("cila", [("task-0", 17), ("fit-0", 9), ("task-1", 17), ("fit-1", 2), ("task-2", 6), ("fit-2", 12)]),
        ("cila_domains", [("task-0", 4), ("task-1", 17), ("fit-1", 7), ("task-2", 15), ("fit-2", 1)]),
        ("cila_task", [("task-1", 15), ("task-2", 14)]),
        ("cila_final_model", [("task-1", 8), ("averaging", 3), ("task-2", 17), ("averaging", 4)]),
    ],
)
def test_kills_in_every_phase_of_contrastive_learning(recipe, places, references, tmp_path):
    """One chain: in the middle of an epoch, inside the classifier stage, in the pass for the averages. There are two
    marks per batch, counted from where the process has resumed."""
    expected, _, _ = references(recipe)
    draws = iter([*({"only": phase, "kill_at": count} for phase, count in places), {}])
    assert kill_until_done(tmp_path / recipe / "run", lambda: next(draws), expected) == [phase for phase, _ in places]


def test_what_the_stories_of_contrastive_runs_tell(references):
    (_, results, state, events), _, _ = references("cila")
    plugins = {p["class"].split(".")[-1].strip("'"): p["state"] for p in json.loads(state)["plugins"]}
    losses, rehearsal = plugins["ContrastiveDistillationPlugin"], plugins["RehearsalPlugin"]
    assert len(losses["coefficients"]) == len(losses["contrastive"]) == 3 and float(losses["coefficients"][2]) > 1
    assert all("torch.float32" in losses["teacher"][f"backbone.2.running_{kind}"] for kind in ("mean", "var"))
    assert rehearsal["places"].startswith("torch.int64 (12, 2)")
    assert b"classifier/accuracy" in results
    assert {"cila/coefficient", "cila/ratio", "loss/distillation", "classifier/loss"} <= {tag for tag, _, _ in events}


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        (
            "lorac_ipc",
            [
                ("plain-0", 9), ("window-0", 7), ("measuring", 2), ("between", 1), ("inferring", 1), ("plain-1", 3),
                ("window-1", 7), ("aligning", 1), ("evaluating", 12), ("window-2", 5), ("aligning", 2),
                ("inferring", 5),
            ],
        ),
        ("slca_plus_plus", [("training", 70), ("between", 1), ("training", 40), ("aligning", 1), ("aligning", 2)]),
    ],
)  # fmt: skip
def test_kills_in_every_phase_of_low_rank_methods(recipe, places, references, tmp_path):
    """One chain: before the window of importance and in it, in the first and in the last epoch, in the passes at the
    end of a task, in alignment, between experiences, in evaluations. Two marks per step, checkpoints every three."""
    expected, _, _ = references(recipe)
    draws = iter([*({"only": phase, "kill_at": count} for phase, count in places), {}])
    assert kill_until_done(tmp_path / recipe / "run", lambda: next(draws), expected) == [phase for phase, _ in places]


def test_what_the_stories_of_low_rank_runs_tell(references):
    """Statistics of every step in which they were tracked, the matrices that were frozen, evaluations by task."""
    (_, _, state, events), _, _ = references("lorac_ipc")
    plugins = {p["class"].split(".")[-1].strip("'"): p["state"] for p in json.loads(state)["plugins"]}
    seen = plugins["Importance"]["attributes"]["seen"]
    windows = [*range(7, 12), *range(15, 20), *range(23, 28)]
    assert [step for step, kept in enumerate(seen) if kept["tracker"]["names"]] == windows
    assert len({json.dumps(kept["tracker"]) for kept in seen}) == len(windows) + 1
    assert [kept["tasks"] for kept in seen] == 12 * [["1", "0"]] + 8 * [["2", "1"]] + 8 * [["3", "2"]]
    assert [len(names) for names in plugins["ImportantParameterPlugin"]["frozen_after"]] == [2, 4, 6]
    assert {"lorac/frozen", "lorac/task-inference", "lorac/overlap/cosine"} <= {tag for tag, _, _ in events}


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        ("asb", [("inner-0", 9), ("inner-0", 40), ("inner-1", 6), ("inner-1", 27), ("inner-2", 1), ("inner-2", 20)]),
        ("meta_asb", [("inner-0", 17), ("inner-0", 44), ("inner-1", 12), ("inner-1", 61), ("inner-2", 1)]),
        ("zapped_iid", [("zapping", 1), ("zapping", 2), ("zapping", 3), ("zapping", 4), ("training", 30)]),
    ],
)  # fmt: skip
def test_kills_in_sequences_and_zaps(recipe, places, references, tmp_path):
    """One chain: between the steps of a sequence, before and after rows are redrawn. Two marks per step, three (six)
    steps per episode; checkpoints every three episodes."""
    expected, _, _ = references(recipe)
    draws = iter([*({"only": phase, "kill_at": count} for phase, count in places), {}])
    assert kill_until_done(tmp_path / recipe / "run", lambda: next(draws), expected) == [phase for phase, _ in places]


def test_what_the_stories_of_zapped_runs_tell(references):
    """Seeds that were drawn, generators that have moved on, every zap, losses in the sequences of each experience."""

    def told(recipe):
        (_, _, state, events), _, _ = references(recipe)
        return {p["class"].split(".")[-1].strip("'"): p["state"] for p in json.loads(state)["plugins"]}, events

    plugins, events = told("asb")
    assert int(plugins["SequentialPhasePlugin"]["seed"]) > 0
    losses = [(tag, step) for tag, step, _ in events if tag.startswith("zap/")]
    assert losses == [(f"zap/inner-loss-{place}", step) for place in ("first", "last") for step in (8, 16, 24)]
    assert told("meta_asb")[0]["SequentialPhasePlugin"]["seed"] == "3"
    history = told("zapped_iid")[0]["ZappingPlugin"]["history"]
    assert [(zap[1], len(zap[3])) for zap in history] == [("1", 5), ("2", 5)] * 3


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        ("ewc_online", [("importances", 1), ("training", 40), ("importances", 2), ("training", 60)]),
        ("lwf", [("training", 110), ("evaluating", 30), ("training", 60), ("training", 45)]),
        ("der", [("logits", 2), ("training", 45), ("training", 30), ("logits", 3)]),
        ("scr", [("means", 2), ("training", 45), ("means", 1), ("training", 40), ("means", 2)]),
        ("avalanche_replay", [("training", 130), ("training", 45), ("between", 1), ("training", 50)]),
    ],
)
def test_kills_in_avalanche_s_own_methods(recipe, places, references, tmp_path):
    """One chain: before and after importances, logits and class means are computed, and in the epochs after them.
    There are ten marks of training per step."""
    expected, _, _ = references(recipe)
    draws = iter([*({"only": phase, "kill_at": count} for phase, count in places), {}])
    assert kill_until_done(tmp_path / recipe / "run", lambda: next(draws), expected) == [phase for phase, _ in places]


def test_what_the_stories_of_avalanche_s_own_methods_tell(references):
    """Importances of the last experience alone, no teacher between experiences, a full buffer with its logits, means
    of all classes."""

    def told(recipe):
        state = json.loads(references(recipe)[0][2])
        return {p["class"].split(".")[-1].strip("'"): p["state"] for p in state["plugins"]}, state["attributes"], state

    plugins, _, _ = told("ewc_online")
    importances = plugins["ResumableEWCPlugin"]["attributes"]["importances"]["$default"]
    assert [task for task, _ in importances] == ["2"] and "'head.weights.2'" in json.dumps(importances)
    plugins, _, _ = told("lwf")
    assert plugins["ResumableLwFPlugin"]["teacher"] == "None" and len(plugins["ResumableLwFPlugin"]["classes"]) == 10
    plugins, _, _ = told("avalanche_replay")
    assert plugins["ResumableReplayPlugin"]["places"].startswith("torch.int64 (12, 2)")
    assert plugins["ResumableReplayPlugin"]["groups"] == [[str(task), "4", "4"] for task in range(3)]
    _, attributes, _ = told("der")
    assert attributes["attributes"]["storage_policy"]["$state"]["logits"].startswith("torch.float32 (15, 10)")
    _, _, state = told("scr")
    assert state["model"]["tensors"]["head.class_means"].startswith("torch.float32 (10, 24)")
