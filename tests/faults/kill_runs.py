"""Runs of ``firn run`` that are killed by SIGKILL, at random steps and at random times, and started again to go on.

``python kill_runs.py`` is a server: it pays for the imports once and forks a process for every job that it reads. A
process leaves a mark in a file at every step (hooks of the strategy, phases of methods, operations on files), so it can
be told to kill itself at one of them, and it is known where it died. :class:`Runs` is the other side.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT = 120.0  # seconds that a run of a second may take


# ------------------------------------------------------------------------------------------------------- the child
class Marks:
    """Counts steps by phase, keeps the last one in a file that survives the process, and kills it at a given count."""

    def __init__(self, path: Path, kill_at: int | None, only: str | None) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.kill_at = kill_at
        self.only = only
        self.process = os.getpid()
        self.counts: Counter[str] = Counter()
        self.inside: list[str] = []

    def __call__(self, phase: str | None = None) -> None:
        if os.getpid() != self.process:
            return  # a loader's worker
        phase = phase or (self.inside[-1] if self.inside else "running")
        self.counts[phase] += 1
        os.pwrite(self.file, f"{phase:16s}".encode(), 0)
        reached = self.counts.total() if self.only is None else self.counts[self.only] * (self.only == phase)
        if self.kill_at is not None and reached >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str, phase: Any = None) -> None:
        """Mark before and after ``owner.name``, and count the steps inside to its phase.

        The phase may be a function of the arguments. None: a step of whatever phase it is called in.
        """
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            own = phase(*args) if callable(phase) else phase
            self(own)
            with self.within(own):
                result = original(*args, **kwargs)
            self(own)
            return result

        setattr(owner, name, marked)

    @contextmanager
    def within(self, phase: str | None) -> Any:
        """Steps inside count to ``phase``; None: to the phase around it."""
        if phase is not None:
            self.inside.append(phase)
        try:
            yield
        finally:
            if phase is not None:
                self.inside.pop()


def watch(mark: Marks) -> None:
    """Marks in everything that a run does."""
    import torch

    from avalanche_firn.evaluation import contrastive_report, drift, dynamics, landscape, representation
    from avalanche_firn.experiments import pretraining, results, runner, transfer_protocols, transfer_run
    from avalanche_firn.plugins import (
        checkpoint,
        checkpoint_files,
        class_statistics,
        classifier_alignment,
        cluster_gaussians,
        linear_probe,
        rehearsal,
    )
    from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin
    from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
    from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
    from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
    from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
    from avalanche_firn.plugins.placed_buffer import PlacedBuffer
    from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
    from avalanche_firn.plugins.task_inference import TaskInferencePlugin
    from avalanche_firn.plugins.zapping import ZappingPlugin
    from avalanche_firn.strategies.avalanche_der import LogitBuffer
    from avalanche_firn.strategies.avalanche_scr import ResumableSCR

    for name in ("fsync", "replace", "rename", "truncate", "unlink"):
        mark.wrap(os, name)
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        mark.wrap(kind, "step", lambda *_: mark.inside[-1] if mark.inside else "training")
    for module in (checkpoint_files, pretraining):
        mark.wrap(module, "save_file")
    mark.wrap(checkpoint_files, "cut_back")
    mark.wrap(shutil, "rmtree")
    for owner, name, phase in (
        (runner, "build_backbone", "building"),
        (runner, "build_stream", "building"),
        (runner, "hold_stream", "building"),
        (pretraining, "build_network", "building"),
        (checkpoint.ExactCheckpointPlugin, "resume", "resuming"),
        (checkpoint.ExactCheckpointPlugin, "_save", "saving"),
        (results, "write_text", lambda path, text: "results" if path.name == "results.json" else "recording"),
        (runner, "_results", "results"),
        (runner, "log_hparams", "results"),
        (transfer_run, "_log", "results"),
        (representation.RepresentationProbe, "measure", "probe"),
        (drift.RepresentationDrift, "_observe", "drift"),
        (dynamics.TaskDynamics, "_add", "dynamics"),
        (contrastive_report.ContrastiveBound, "after_training_exp", "bound"),
        (classifier_alignment.ClassifierAlignmentPlugin, "_after_task", "statistics"),
        (classifier_alignment.ClassifierAlignmentPlugin, "align", "aligning"),
        (class_statistics.ClassGaussians, "add", "statistics"),
        (class_statistics.ClassGaussians, "sample", "aligning"),
        (cluster_gaussians.ClusterGaussians, "add", None),
        (cluster_gaussians.ClusterGaussians, "moments", None),
        (linear_probe.LinearProbePlugin, "_probe", "linear probe"),
        (linear_probe.LinearProbePlugin, "_features", "linear probe"),
        (linear_probe, "write_probe", "linear probe"),
        (ImportantParameterPlugin, "after_backward", "importance"),
        (ImportantParameterPlugin, "_choose", "freezing"),
        (LoRACompositionPlugin, "_close", "closing task"),
        (TaskInferencePlugin, "_measure", "measuring"),
        (TaskInferencePlugin, "_second_pass", "inferring"),
        (ResumableEWCPlugin, "compute_importances", "importance"),
        (ResumableLwFPlugin, "_copy", "teacher"),
        (LogitBuffer, "update", "buffer"),
        (rehearsal.RehearsalPlugin, "update", "buffer"),
        (PlacedBuffer, "post_adapt", "buffer"),
        (ResumableSCR, "compute_class_means", "means"),
        (ClassifierStagePlugin, "fit", "classifier"),
        (ClassifierStagePlugin, "_features", "classifier"),
        (ContrastiveDistillationPlugin, "__call__", _loss),
        (SequentialPhasePlugin, "_step", "inner loop"),
        (ZappingPlugin, "_zap", "zapping"),
        (transfer_protocols, "sweep_rates", "sweep"),
        (transfer_protocols, "continual_transfer", "continual"),
        (transfer_protocols, "iid_transfer", "i.i.d."),
        (transfer_protocols, "trajectory_landscape", "landscape"),
        (landscape.Landscape, "save", "landscape"),
    ):
        mark.wrap(owner, name, phase)
    for module, name in ((runner, "build_strategy"), (pretraining, "pretraining_strategy")):
        setattr(module, name, _with_marker(getattr(module, name), mark))
        mark.wrap(module, name, "building")
    results.write_json.__globals__["write_text"] = results.write_text
    for module in (runner, transfer_run):
        module.write_text = results.write_text


def _loss(plugin: Any, output: Any, targets: Any) -> str:
    if plugin._views is None:
        return "evaluating"
    return "contrasting" if output.requires_grad else "averaging"


def _with_marker(build: Any, mark: Marks) -> Any:
    """A builder of strategies whose hooks leave marks."""
    from avalanche.training.plugins import SupervisedPlugin

    class Marker(SupervisedPlugin, supports_distributed=False):
        stateless = True
        affects_results = False  # so that an evaluation may still be one pass

    opening = ("before_training", "before_train_dataset_adaptation", "before_training_exp", "before_training_epoch")
    for hook in dir(SupervisedPlugin):
        if hook.startswith(("before_", "after_")):
            phase = "evaluating" if "eval" in hook else "opening" if hook in opening else "training"
            setattr(Marker, hook, lambda self, strategy, phase=phase, **kwargs: mark(phase))

    @functools.wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        strategy = build(*args, **kwargs)
        strategy.plugins.append(Marker())
        return strategy

    return built


def shuffle_listings(seed: int) -> None:
    """From now on folders are listed in another order, as another file system would."""
    order, listdir, scandir = random.Random(seed), os.listdir, os.scandir

    class Scan:
        """What os.scandir gives: an iterator that is closed."""

        def __init__(self, entries: list[Any]) -> None:
            self.entries = iter(entries)

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self.entries)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def close(self) -> None:
            pass

    def shuffled(entries: Any) -> list[Any]:
        found = sorted(entries, key=str)
        order.shuffle(found)
        return found

    def scanned(path: Any = ".") -> Scan:
        with scandir(path) as entries:
            return Scan(shuffled(entries))

    os.listdir = lambda path=".": shuffled(listdir(path))
    os.scandir = scanned  # type: ignore[assignment]


def child(folder: str, command: list[str], kill_at: int | None, only: str | None, shuffle: int | None) -> int:
    """A ``firn`` command in this process; its exit status."""
    import kill_cases  # noqa: F401  registers the backbone

    from avalanche_firn.experiments.cli import main

    place = Path(folder)
    mark = Marks(place / "mark", kill_at, only)
    mark("starting")
    watch(mark)
    if shuffle is not None:
        shuffle_listings(shuffle)
    status = main([*command, "--output", folder, "--quiet"])
    mark("ending")
    (place / "marks.json").write_text(json.dumps(mark.counts))
    return status


# ------------------------------------------------------------------------------------------------------ the server
def serve() -> None:
    """Fork a process for every line of standard input, and answer how it ended."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to standard error
    sys.path.append(str(HERE))
    import contourpy  # noqa: F401
    import kill_cases  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import avalanche_firn.experiments.comparison
    import avalanche_firn.experiments.transfer_comparison  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        after = job.pop("after")
        mark = Path(job["folder"], "mark")
        pid = os.fork()
        if pid == 0:
            _forked(job)
        began, status = time.monotonic(), 0
        kill_after = LIMIT if after is None else after
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if after is not None and not mark.exists():
                began = time.monotonic()
            if time.monotonic() - began > kill_after:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is ours
                done = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        status = os.waitstatus_to_exitcode(done[1])
        hung = after is None and time.monotonic() - began > LIMIT
        answers.write(json.dumps({"status": status, "hung": hung}) + "\n")


def _forked(job: dict[str, Any]) -> None:
    output = os.open(Path(job["folder"], "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    status = 70
    try:
        status = child(**job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ------------------------------------------------------------------------------------------------------ the parent
class Runs:
    """A server, and runs that it is told to start."""

    def __init__(self, **environment: str) -> None:
        own = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **environment}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **own},
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def launch(
        self,
        folder: Path,
        recipe: Path | str,
        *words: str,
        command: str = "run",
        kill_at: int | None = None,
        only: str | None = None,
        after: float | None = None,
        shuffle: int | None = None,
    ) -> str | None:
        """``firn run RECIPE WORDS``, begun or gone on with below a folder: None if it ended, else where it was killed.

        ``kill_at``: the mark to be killed at, ``only`` counting those of a phase. ``after``: seconds to be killed
        after. ``shuffle``: seed of the order in which folders are listed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mark").unlink(missing_ok=True)
        job = {"folder": str(folder), "command": [command, str(recipe), *words], "kill_at": kill_at, "only": only}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({**job, "after": after, "shuffle": shuffle}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert not answer["hung"], f"a run took more than {LIMIT:.0f} seconds: {folder}"
        if answer["status"] == 0:
            return None
        said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        assert answer["status"] == -signal.SIGKILL, f"a run failed with status {answer['status']}:\n{said[-3000:]}"
        return (folder / "mark").read_text().strip() or "starting"


if __name__ == "__main__":
    serve()
    os._exit(0)  # what was imported takes seconds to say goodbye
