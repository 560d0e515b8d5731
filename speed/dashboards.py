"""Reports of many runs: how long ``firn report`` takes, and how large the page is.

A hundred runs that nobody trained (20 methods x 5 seeds, 20 tasks, with ten quantities of 1,000 points each in every
``metrics.csv``) are written to a temporary folder, and ``firn report`` makes all of their summary in a process of its
own: table, report.html, report.md, results.csv and the TensorBoard run. Nothing of it depends on what the numbers are.

* ``reading``: what the others are measured in: every results.json and metrics.csv parsed once by Python's own readers,
  in a process that imports nothing else.
* ``firn report``: the whole command, imports included. ``details`` has the size of the page in MiB.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_firn.evaluation.matrix import ResultMatrix
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.recipe import dump, load_experiment
from speed.measure import Lap, Row, Settings, interleaved, make_row, rows_from

__all__ = ["BENCHMARK", "SECONDS", "made_up_runs", "rows"]

BENCHMARK = "dashboards"
SECONDS, MEBIBYTES = 20.0, 5.0  # what the project allows itself for a hundred runs of a thousand points
_READING = """
import csv, json, pathlib, sys
for path in pathlib.Path(sys.argv[1]).rglob("results.json"):
    json.loads(path.read_text())
    with path.with_name("metrics.csv").open(newline="") as file:
        rows = [(int(step), tag, float(value)) for step, tag, value in list(csv.reader(file))[1:]]
"""
_TAGS = ("loss/train", "lr/all", "efficiency/images-per-second")  # and others of our own, up to the number asked for


@dataclass(frozen=True)
class Size:
    """Of a made-up comparison."""

    methods: int
    seeds: int
    tasks: int
    points: int
    tags: int

    def __str__(self) -> str:
        runs = self.methods * self.seeds
        return f"{runs} runs of {self.methods} methods, {self.tasks} tasks, {self.tags} x {self.points} points"


_FULL, _QUICK = Size(20, 5, 20, 1000, 10), Size(3, 2, 3, 50, 4)


def made_up_runs(folder: Path, size: Size, seed: int = 0) -> None:
    """Write the folder of a comparison whose runs look finished; the numbers are random."""
    draws = random.Random(seed)
    names = [f"method_{index + 1}" for index in range(size.methods)]
    methods = [{"strategy": "naive", "name": name} for name in names]
    # digits have ten classes: more tasks stand in the results only, which nobody trains from
    config = load_experiment("digits", [f"methods={json.dumps(methods)}", f"seeds={list(range(size.seeds))}"])
    assert isinstance(config, Config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    for index, name in enumerate(names):
        for number in range(size.seeds):
            place = folder / name / f"seed-{number}"
            place.mkdir(parents=True)
            single = config.single(name, number)
            (place / "config.yaml").write_text(dump(single), encoding="utf-8")
            results = _results(single, size, 0.9 - 0.03 * index, draws)
            (place / "results.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
            _write_metrics(place / "metrics.csv", results, size, draws)


def _results(config: Config, size: Size, level: float, draws: random.Random) -> dict[str, Any]:
    matrix = ResultMatrix()
    for step in range(size.tasks):
        for task in range(step + 1):
            share = level + draws.gauss(0, 0.03) - 0.01 * (step - task)
            matrix.record(step, task, round(50 * min(1.0, max(0.0, share))), 50)
        matrix.describe(step, task=step, seen=range(step + 1))
    steps = [matrix.summary(step) for step in range(size.tasks)]
    curves = {name: [step[name] for step in steps] for name in steps[-1]}
    accuracy = [[None if math.isnan(v) else v for v in row] for row in matrix.accuracy.tolist()]
    return {
        "format": 1,
        "recipe": config.name,
        "method": config.methods[0].name,
        "strategy": config.methods[0].strategy,
        "seed": config.seeds[0],
        "config_digest": config.digest(),
        "group_digest": config.digest(seeds=False),
        "stream": {
            "source": "digits",
            "split": "test",
            "fingerprint": "made up",
            "class_order": list(range(10)),
            "class_names": list("0123456789"),
            "task_sizes": [2] * size.tasks,
        },
        "backbone": {"tag": "made up", "weights": "random", "weights_sha256": "made up"},
        "protocol": {
            "task_identity_at_test": False,
            "task_incremental_figures": False,
            "replay": False,
            "replay_slots": None,
            "joint": False,
            "evaluated": "seen",
            "forgetting": "max_seen",
        },
        "figures": {name: curve[-1] for name, curve in curves.items()},
        "curves": curves,
        "accuracy_matrix": accuracy,
        "matrix": matrix.to_dict(),
        "probes": [],
        "diverged": False,
        "cost": {
            "seconds": draws.uniform(10, 100),
            "training_seconds": 10.0,
            "images_per_second": draws.uniform(100, 1000),
            "peak_memory_MiB": draws.uniform(300, 900),
            "trainable_parameters": draws.randrange(10**4, 10**6),
            "device": "cpu",
            "threads": 1,
        },
    }


def _write_metrics(path: Path, results: dict[str, Any], size: Size, draws: random.Random) -> None:
    tags = [*_TAGS, *(f"loss/term-{index + 1}" for index in range(size.tags))][: size.tags]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("step", "tag", "value"))
        for point in range(size.points):
            table.writerows((point, tag, repr(draws.random())) for tag in tags)
        for name, curve in results["curves"].items():
            table.writerows((step, name, repr(value)) for step, value in enumerate(curve) if value is not None)


def rows(settings: Settings) -> list[Row]:
    """Time of the command against reading, and both limits of the project as ratios to them."""
    size = _QUICK if settings.quick else _FULL
    if not settings.wants(str(size)):
        return []
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory(prefix="firn-dashboards-") as scratch:
        folder = Path(scratch) / "made_up"
        made_up_runs(folder, size)

        def run(*words: str) -> Lap:
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
            return Lap(time.perf_counter() - start)

        output = str(folder / "summary")
        contestants = {
            "reading": lambda: run("-c", _READING, str(folder)),
            "firn report": lambda: run(
                "-m", "avalanche_firn.experiments.cli", "report", str(folder), "--output", output
            ),
        }
        timings = interleaved(contestants, settings.rounds_or(5), warmup=0 if settings.quick else 1)
        page = (folder / "summary" / "report.html").stat().st_size / 2**20
    found = rows_from(
        timings, BENCHMARK, str(size), settings, to_what="reading", details={"firn report": {"html_MiB": page}}
    )
    if settings.quick:
        return found
    took = timings.seconds["firn report"]
    limit = make_row(
        BENCHMARK,
        str(size),
        "firn report",
        settings,
        seconds=timings.median("firn report"),
        all_seconds=list(took),
        ratio=timings.median("firn report") / SECONDS,
        all_ratios=[seconds / SECONDS for seconds in took],
        to_what=f"{SECONDS:g} seconds",
        bound=1.0,
    )
    weight = make_row(
        BENCHMARK,
        str(size),
        "report.html",
        settings,
        ratio=page / MEBIBYTES,
        to_what=f"{MEBIBYTES:g} MiB",
        quantity="bytes",
        bound=1.0,
        details={"html_MiB": page},
    )
    return [*found, limit, weight]
