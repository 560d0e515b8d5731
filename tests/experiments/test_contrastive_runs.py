"""Runs of naive, replay, Co2L and CILA on digits: results, scalars, report, resume, dry run, wrong configurations.

One epoch: of a cosine that ends at lr / 1000 there is only the end, so nearly nothing is trained and no accuracy is
compared here.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation.tensorboard import read_scalars
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.report import facts, tables
from avalanche_firn.experiments.results import find_runs, group_runs

RECIPE = """
name: contrast
threads: 1
seeds: [0]
device: cpu
stream: {name: digits, tasks: [4, 3, 3]}
training: {epochs: 1, batch_size: 64, optimizer: {lr: 0.001}}
checkpoint: {every: 4}
progress: false
evaluation:
  contrastive_bound: {negatives: 4, pairs_per_task: 32, pool_per_task: 16}
methods:
  - naive
  - {strategy: replay, rehearsal: {mem_size: 30}}
  - strategy: co2l
    distillation_weight: 0.5
    rehearsal: {mem_size: 30}
    augmentation: {crop_scale: [0.7, 1.0], flip: 0.0, jitter: null, grey: 0.0}
    classifier: {epochs: 2, batch_size: 64, lr: 0.1, views: evaluation}
  - strategy: cila
    coefficient: {balance: 3.0}
    rehearsal: {mem_size: 30}
    augmentation: {crop_scale: [0.7, 1.0], flip: 0.0, jitter: null, grey: 0.0}
    classifier: {epochs: 2, batch_size: 64, lr: 0.1, views: evaluation}
"""
TASKS = 3
CONTRASTIVE = ("co2l", "cila")
LOSSES = {f"cila/{name}" for name in ("contrastive", "distillation", "coefficient", "ratio", "floor-active")}
BOUNDS = {
    *(f"cila/bound/{n}" for n in ("measured", "one-step", "chained", "training-loss", "ceiling", "old-distillation")),
    *(f"cila/certificate/{name}" for name in ("loss", "lower", "upper")),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "contrast.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["compare", str(recipe), "--output", str(output), "--quiet"]) == 0
    return output / "contrast"


def results(folder: Path, method: str) -> dict:
    return json.loads((folder / method / "seed-0" / "results.json").read_text(encoding="utf-8"))


# --- results --------------------------------------------------------------------------------------------------------


def test_curves(finished: Path) -> None:
    for method in CONTRASTIVE:
        run = results(finished, method)
        curves = {tag: curve for tag, curve in run["curves"].items() if tag.startswith("cila/")}
        assert curves.keys() == LOSSES | BOUNDS and all(len(curve) == TASKS for curve in curves.values())
        first = {tag for tag, curve in curves.items() if curve[0] is None}
        assert first >= LOSSES - {"cila/contrastive"} and curves["cila/ratio"][1] is None
        assert all(math.isfinite(v) for curve in curves.values() for v in curve if v is not None)
        assert {tag: run["figures"][tag] for tag in curves} == {tag: curve[-1] for tag, curve in curves.items()}
    assert results(finished, "co2l")["curves"]["cila/coefficient"] == [None, 0.5, 0.5]
    curves = results(finished, "cila")["curves"]
    ratio = curves["cila/distillation"][1] / curves["cila/contrastive"][1]
    assert curves["cila/ratio"][2] == pytest.approx(ratio, rel=1e-12)
    assert curves["cila/coefficient"][1] == 1.0 and curves["cila/coefficient"][2] == pytest.approx(3 * ratio)
    assert ratio > 1 / 3 and curves["cila/floor-active"] == [None, None, 0.0]


@pytest.mark.parametrize(("method", "slots"), [("naive", None), ("replay", 30), ("co2l", 30), ("cila", 30)])
def test_protocol_and_what_other_methods_lack(finished: Path, method: str, slots: int | None) -> None:
    run = results(finished, method)
    assert (run["protocol"]["replay"], run["protocol"]["replay_slots"]) == (slots is not None, slots)
    assert run["protocol"]["task_identity_at_test"] is False and run["diverged"] is False
    if method not in CONTRASTIVE:
        assert run["contrastive_bound"] is None and not [tag for tag in run["curves"] if tag.startswith("cila")]


def test_bounds(finished: Path) -> None:
    for method in CONTRASTIVE:
        run = results(finished, method)
        tasks, remarks = run["contrastive_bound"]["tasks"], run["contrastive_bound"]["remarks"]
        assert [row["task"] for row in tasks] == [*range(TASKS)]
        assert [row["coefficient"] for row in tasks] == run["curves"]["cila/coefficient"]
        for name, tag in (("measured", "measured"), ("one_step", "one-step"), ("training_loss", "training-loss")):
            assert [row[name] for row in tasks] == run["curves"][f"cila/bound/{tag}"]
        for row in tasks[1:]:
            bounds = [row["measured"], row["one_step"], row["chained"], row["training_loss"]]
            assert all(low <= high + 1e-9 for low, high in itertools.pairwise(bounds))
            assert row["certificate_lower"] <= row["certificate_loss"] <= row["certificate_upper"]
            assert row["vacuous"] == [n for n in ("one_step", "chained", "training_loss") if row[n] >= row["ceiling"]]
        # a chain over three tasks multiplies by the largest possible loss, 5.4 nats here
        assert "chained" in tasks[2]["vacuous"] and any("the chained bound" in r and "is vacuous" in r for r in remarks)
        assert f"the contrastive loss over 3 tasks is {tasks[2]['measured']:.3g}" in " ".join(remarks)


def test_throughput_counts_replayed_images(finished: Path) -> None:
    cost = {method: results(finished, method)["cost"] for method in ("naive", "replay", *CONTRASTIVE)}
    counted = {method: c["images_per_second"] * c["training_seconds"] for method, c in cost.items()}
    assert counted["naive"] == pytest.approx(1079)
    assert counted["co2l"] == pytest.approx(counted["cila"]) == pytest.approx(1079 + 2 * 30)  # each once per epoch
    later = [len(experience.dataset) for experience in digits_stream(tasks=[4, 3, 3]).train[1:]]
    batches = sum(math.ceil(size / 64) for size in later)  # each is joined by the whole buffer
    assert counted["replay"] == pytest.approx(1079 + 30 * batches)


# --- scalars and report ---------------------------------------------------------------------------------------------


def test_scalars(finished: Path) -> None:
    for method in CONTRASTIVE:
        run, found = finished / method / "seed-0", results(finished, method)
        board = read_scalars(run)
        tags = LOSSES | BOUNDS | {"classifier/loss", "classifier/accuracy", "loss/contrastive", "loss/distillation"}
        assert tags <= board.keys()
        assert {line.split(",")[1] for line in (run / "metrics.csv").read_text("utf-8").splitlines()} >= tags
        for tag in LOSSES | BOUNDS:
            points = [(i, pytest.approx(v, rel=1e-6)) for i, v in enumerate(found["curves"][tag]) if v is not None]
            assert board[tag] == points
        assert [step for step, _ in board["classifier/accuracy"]] == [0, 1, 2]
        assert len(board["loss/contrastive"]) == 3 and len(board["loss/distillation"]) == 2  # once per epoch
    assert not [tag for tag in read_scalars(finished / "replay" / "seed-0") if tag.startswith(("cila", "classifier"))]
    cila, co2l, naive = (read_scalars(finished / "summary" / method) for method in ("cila", "co2l", "naive"))
    assert [step for step, _ in cila["CILA/cila/coefficient"]] == [1, 2]
    assert len(co2l["CILA/co2l: cila/bound/measured"]) == 3 and not [tag for tag in naive if "CILA" in tag]


def test_report(finished: Path, capsys) -> None:
    curves = results(finished, "cila")["curves"]
    for name in ("report.md", "report.html"):
        text = (finished / "summary" / name).read_text(encoding="utf-8")
        for method in CONTRASTIVE:
            assert f"{method}: losses in training and coefficient, mean over seeds" in text
            assert f"{method}: bounds on held-out images, mean over seeds" in text
        assert "naive: losses" not in text and "replay: losses" not in text
        assert "; replay in: " in text
        for method in ("replay", *CONTRASTIVE):
            assert f"{method} (30 samples)" in text
        assert re.search(r"In cila the bounds? [a-z, -]*chained[a-z, -]* (is|are) vacuous after task (2, )?3: ", text)
        assert "never left its floor" not in text
    text = (finished / "summary" / "report.md").read_text(encoding="utf-8")
    assert f"| coefficient | - | 1 | {curves['cila/coefficient'][2]:.3g} |" in text
    assert f"| ratio of the tasks before | - | - | {curves['cila/ratio'][2]:.3g} |" in text
    for picture in ("cila-coefficient.svg", "cila-bound-measured.svg"):
        assert (finished / "summary" / picture).stat().st_size > 1000 and f"]({picture})" in text
    rows = (finished / "summary" / "results.csv").read_text(encoding="utf-8").splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"naive", "replay", "co2l", "cila"}
    assert main(["report", str(finished)]) == 0
    assert "vacuous after task" in capsys.readouterr().out


def test_several_seeds_and_a_coefficient_at_its_floor(finished: Path) -> None:
    found = {run["method"]: run for run in find_runs([finished])}
    runs = []
    for seed, (coefficient, floor) in enumerate([(1.0, 1.0), (2.0, 0.0)]):
        runs.append(copy.deepcopy(found["cila"]) | {"seed": seed})
        runs[-1]["curves"] |= {"cila/coefficient": [None, 1.0, coefficient], "cila/floor-active": [None, None, floor]}
    (table,) = [body for title, _, body in tables(group_runs(runs)) if title.startswith("cila: losses")]
    rows = {row[0]: row[1:] for row in table}
    assert rows["coefficient"] == ["-", "1", "1.5"] and rows["floor decided (share of seeds)"] == ["-", "-", "0.5"]
    line = "In cila the coefficient never left its floor: it equals Co2L with that weight."
    assert line not in facts(group_runs(runs)) and line in facts(group_runs(runs[:1]))
    co2l = copy.deepcopy(found["co2l"])  # no news there
    co2l["curves"]["cila/floor-active"] = [None, None, 1.0]
    assert not [text for text in facts(group_runs([co2l])) if "floor" in text]


def test_without_bounds(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "method=cila", "evaluation.contrastive_bound=null", "stream.tasks=2", "--quiet"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    run = results(tmp_path / "contrast", "cila")
    assert run["contrastive_bound"] is None and run["curves"].keys() >= LOSSES and not BOUNDS & run["curves"].keys()
    groups = group_runs(find_runs([tmp_path / "contrast"]))
    titles = [title for title, *_ in tables(groups)]
    assert "cila: losses in training and coefficient, mean over seeds" in titles
    assert not [title for title in titles if "bounds" in title] and not any("vacuous" in text for text in facts(groups))


# --- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [25, 36])
def test_resume_is_exact(step: int, recipe: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped in the second task: training the representation, and fitting the classifier (SGD, too)."""
    original, count = torch.optim.SGD.step, iter(range(10_000))

    def interrupted(self, *args, **kwargs):
        if next(count) == step:
            places.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    places: list[int] = []
    words = ["run", str(recipe), "method=cila", "--output", str(tmp_path), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        assert main(words) == 130
    assert places == [7 * (96 + 1)] if step == 36 else places[0] > 10_000
    assert main(words) == 0
    mine, reference = (results(folder, "cila") for folder in (tmp_path / "contrast", finished))
    for run in (mine, reference):
        cost = run.pop("cost")
        assert cost["images_per_second"] * cost["training_seconds"] == pytest.approx(1079 + 2 * 30)
    assert mine == reference
    tables = []
    for folder in (tmp_path / "contrast", finished):
        lines = (folder / "cila" / "seed-0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        tables.append([line for line in lines if "efficiency/" not in line])
    assert tables[0] == tables[1]


# --- dry run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [True, False])
def test_dry_run(recipe: Path, tmp_path: Path, capsys, monkeypatch, data: bool) -> None:
    """With settings that two steps could not reach: many epochs at first, a warm-up, a late milestone."""
    monkeypatch.chdir(tmp_path)
    later = [
        "training.epochs=20", "training.batch_size=4", "methods.cila.rates={first_epochs: 30, warmup: true}",
        "methods.cila.classifier={epochs: 20, milestones: [15]}",
    ]  # fmt: skip
    assert main(["check", str(recipe), "--dry-run", *([] if data else ["--no-data"]), *later]) == 0
    told = capsys.readouterr().out
    for method in ("naive", "replay", *CONTRASTIVE):
        (steps,) = re.findall(rf"^{method}: (\d+) training steps and an evaluation", told, flags=re.MULTILINE)
        assert int(steps) >= 4
    assert ("images not read" in told) is not data
    assert not list(tmp_path.iterdir())


# --- configurations -------------------------------------------------------------------------------------------------

FOLDER = "stream={name: folder, root: nowhere, tasks: 2"
WRONG = {
    "schedule": (
        ["training.schedule={name: cosine}"],
        ["methods[2].training.schedule: co2l has its own schedule", "asks for cosine", "methods[3]", "{name: none}"],
    ),
    "augmented stream": (
        [f"{FOLDER}}}"],
        ["stream.augment: true with co2l", "true with cila", "views on the device", "accepted: false"],
    ),
    "transforms of another paper": (
        [f"{FOLDER}, transforms: ucl_cifar}}"],
        ["stream.transforms: ucl_cifar with co2l", "accepted: backbone with augment: false, or co2l_"],
    ),
    "transforms of a benchmark": (
        ["stream={name: avalanche, benchmark: SplitMNIST, transforms: own}"],
        ["stream.transforms: own with co2l", "accepted: backbone"],
    ),
    "warm-up of a large batch": (
        ["training.batch_size=512", "training.epochs=5"],
        ["methods[2].rates.warmup_epochs: 10 with 5 epochs", "accepted: 0 to 4, or warmup: false", "methods[3].rates"],
    ),
    "warm-up of a short first task": (
        ["training.epochs=40", "methods.cila.rates={warmup: true, first_epochs: 3}"],
        ["methods[3].rates.warmup_epochs: 10 with 3 epochs", "0 to 2"],
    ),
    "milestone out of reach": (
        ["methods.cila.classifier.milestones=[2]"],
        ["methods[3].classifier.milestones: [2] is never reached in 2 epochs", "1 to 1"],
    ),
    "milestones that fall": (
        ["methods.cila.classifier={epochs: 9, milestones: [5, 3]}"],
        ["methods[3].classifier.milestones: [5, 3] doesn't rise", "rising epochs"],
    ),
    "crop that falls": (
        ["methods.cila.augmentation.crop_scale=[0.8,0.2]"],
        ["methods[3].augmentation.crop_scale: [0.8, 0.2]", "0 < smallest <= largest <= 1"],
    ),
    "crop of nothing": (
        ["methods.co2l.augmentation.crop_scale=[0,1]"],
        ["augmentation.crop_scale: [0.0, 1.0]", "0 < smallest"],
    ),
    "crop above one": (
        ["methods.co2l.augmentation.crop_scale=[0.5,1.5]"],
        ["methods[2].augmentation.crop_scale[1]", "1.5", "at most 1"],
    ),
    "ranges": (["methods.cila.augmentation.jitter=[0.4,0.4]"], ["augmentation.jitter", "4 or more of them, 4 at most"]),
    "hue": (["methods.cila.augmentation.jitter=[0.4,0.4,0.4,0.7]"], ["jitter: hue is 0.7", "hue up to 0.5"]),
    "even kernel": (["methods.cila.augmentation.blur_kernel=6"], ["blur_kernel: 6 is even", "an odd number"]),
    "unknown key": (
        ["methods.cila.contrastive.temprature=0.1"],
        ["methods.cila.contrastive.temprature", "did you mean methods.cila.contrastive.temperature?"],
    ),
    "Co2L with a rule": (["methods.co2l.coefficient.balance=2"], ["methods[2].coefficient: unknown key", "accepted"]),
    "CILA with a weight": (["methods.cila.distillation_weight=2"], ["methods[3].distillation_weight: unknown key"]),
    "unknown rule": (
        ["methods.cila.coefficient.mode=constant"],
        ["methods[3].coefficient.mode: 'constant'", "max, min, pure"],
    ),
    "no temperature": (
        ["methods.cila.contrastive.temperature=0"],
        ["methods[3].contrastive.temperature", "0", "greater than 0"],
    ),
    "negative balance": (["methods.cila.coefficient.balance=-1"], ["coefficient.balance", "-1", "at least 0"]),
    "empty buffer": (["methods.replay.rehearsal.mem_size=0"], ["methods[1].rehearsal.mem_size", "0", "at least 1"]),
    "one image in the pool": (
        ["evaluation.contrastive_bound.pool_per_task=1"],
        ["evaluation.contrastive_bound.pool_per_task", "1", "at least 2"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration(name: str, recipe: Path, tmp_path: Path, capsys) -> None:
    overrides, expected = WRONG[name]
    assert main(["compare", str(recipe), *overrides, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and not (tmp_path / "out").exists()
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["methods.naive.training.schedule={name: cosine}"],  # a schedule of another method
        ["training.schedule={name: cosine}", *(f"methods.{m}.training.schedule={{name: none}}" for m in CONTRASTIVE)],
        [f"{FOLDER}, augment: false}}"],
        [f"{FOLDER}, transforms: co2l_tiny}}"],
        ["training.batch_size=512", *(f"methods.{m}.rates.warmup=false" for m in CONTRASTIVE)],
        ["training.batch_size=512", *(f"methods.{m}.training.batch_size=256" for m in CONTRASTIVE)],
        [f"{FOLDER}}}", "methods=[naive,replay]"],
    ],
)
def test_accepted_configurations(overrides: list[str], recipe: Path) -> None:
    assert isinstance(load_recipe(str(recipe), overrides), Config)


def test_all_problems_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), ["training.schedule={name: cosine}", "training.batch_size=300", f"{FOLDER}}}"])
    paths = [problem.path for problem in caught.value.problems]
    assert sorted(paths) == sorted(
        ["stream.augment", "stream.augment"]
        + [f"methods[{i}].{place}" for i in (2, 3) for place in ("training.schedule", "rates.warmup_epochs")]
    )
