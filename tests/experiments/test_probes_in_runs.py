"""Runs whose representation is judged: results, report, TensorBoard, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from avalanche_firn.evaluation import forgetting
from avalanche_firn.evaluation.matrix import ResultMatrix
from avalanche_firn.experiments.cli import main

RECIPE = """
name: probed
threads: 1
seeds: [0]
stream: {name: digits, tasks: [2, 2, 2, 2, 2]}
training: {epochs: 1, batch_size: 64}
checkpoint: {every: 2}
progress: false
evaluation:
  probes:
    - {adapt: [knn, linear], shots: 5, k: 3}
    - {adapt: [fine_tune], shots: 2, when: diagonal, lr: 0.01, epochs: 1}
  drift: {num_images: 20, blocks: [blocks.0]}
methods: [naive, lp_ft, joint]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "probed.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["compare", str(recipe), "--output", str(output), "--quiet"]) == 0
    return output / "probed"


def results(folder: Path, method: str) -> dict:
    return json.loads((folder / method / "seed-0" / "results.json").read_text(encoding="utf-8"))


def test_results(finished: Path) -> None:
    for method in ("naive", "lp_ft"):
        run = results(finished, method)
        assert [probe["protocol"]["adapt"] for probe in run["probes"]] == [["knn", "linear"], ["fine_tune"]]
        assert run["probes"][0]["protocol"] | {"shots": 5, "k": 3} == run["probes"][0]["protocol"]
        for name, probe in (("knn", 0), ("linear", 0), ("fine_tune", 1)):
            matrix = ResultMatrix.from_dict(run["probes"][probe]["matrices"][name])
            tag = f"probe/{name.replace('_', '-')}"
            assert run["figures"][tag] == pytest.approx(matrix.accuracy[-1].mean())
            kind = forgetting(matrix.accuracy, "diag")
            assert run["figures"][f"{tag}/forgetting-diag"] == pytest.approx(kind)
        assert len(run["curves"]["probe/knn"]) == 5 and None not in run["curves"]["probe/knn"]
        assert run["curves"]["probe/fine-tune"][:4].count(None) == 3  # the first row has one task, which is all
    assert results(finished, "joint")["figures"]["probe/knn"] > 0.8
    assert results(finished, "joint")["figures"]["probe/knn/forgetting-diag"] is None


def test_report(finished: Path, capsys) -> None:
    text = (finished / "summary" / "report.md").read_text(encoding="utf-8")
    assert "## Representations (accuracy after adaptation)" in text and "| fine-tune forgetting % |" in text
    assert "kNN k=3 T=0.1" in text and "5 images per class" in text and "task identity used" in text
    assert "Apart from the probes no task identity" in text
    assert "probe/knn/forgetting-diag" in (finished / "summary" / "results.csv").read_text(encoding="utf-8")
    assert (finished / "summary" / "probe-knn.svg").stat().st_size > 1000
    assert main(["report", str(finished)]) == 0
    assert "knn %" in capsys.readouterr().out


def test_scalars(finished: Path) -> None:
    lines = (finished / "lp_ft" / "seed-0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    tags = {line.split(",")[1] for line in lines}
    assert {
        "probe/knn", "probe/linear/task-0", "probe/fine-tune/forgetting-max-all", "drift/cka", "drift/weights-previous",
        "drift/cka/blocks.0", "lp/loss", "lp/head-norm", "lp/loss-all-rows",
    } <= tags  # fmt: skip


@pytest.mark.parametrize("step", [5, 9])
def test_resume_is_exact(step: int, recipe: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped while fine-tuning after a probe: results and every scalar of the run but wall clocks."""
    original, count = torch.optim.SGD.step, iter(range(10_000))

    def interrupted(self, *args, **kwargs):
        if next(count) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    words = ["run", str(recipe), "method=lp_ft", "--output", str(tmp_path), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        assert main(words) == 130
    assert main(words) == 0
    mine, reference = (results(folder, "lp_ft") for folder in (tmp_path / "probed", finished))
    for run in (mine, reference):
        del run["cost"]
    assert mine == reference
    tables = []
    for folder in (tmp_path / "probed", finished):
        lines = (folder / "lp_ft" / "seed-0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        tables.append([line for line in lines if "efficiency/" not in line and "Time" not in line])
    assert tables[0] == tables[1]
