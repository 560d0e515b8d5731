"""LoRA, LoRAC-IPC and SLCA++ in recipes: sections and errors, what is built from them, runs on digits, the report."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_firn.evaluation.tensorboard import read_scalars
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.dry_run import dry_run
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.lora_results import lora_protocol
from avalanche_firn.experiments.methods import Ingredients, build_strategy, make_schedule
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.report import facts, tables
from avalanche_firn.experiments.report_lora import lora_curves_drawn, lora_facts, lora_tables
from avalanche_firn.experiments.resources import build_backbone, prepare
from avalanche_firn.experiments.results import find_runs, group_runs
from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.models.lora import TARGETS, LoRAComposition
from avalanche_firn.plugins import (
    ClassifierAlignmentPlugin,
    ImportantParameterPlugin,
    LocalCrossEntropy,
    LocalSymmetricCrossEntropy,
    LoRACompositionPlugin,
    SlowLearnerPlugin,
    TaskInferencePlugin,
)

RECIPE = """
name: pairs
threads: 1
seeds: [0]
device: cpu
stream: {name: digits, tasks: 2}
training: {epochs: 1, batch_size: 64, optimizer: {name: adam, lr: 0.005, weight_decay: 0.0}}
progress: false
methods:
  - {strategy: lora, lora: {rank: 4}}
  - strategy: lorac_ipc
    training: {schedule: {name: lagged_cosine, floor: 0.00001}}
    lora: {rank: 4}
    importance: {threshold: 0.1}
    alignment: {epochs: 2, clusters: 2, samples_per_class: 64}
    task_inference: {clusters: 2}
  - strategy: lorac_ipc
    name: newest
    lora: {rank: 4, targets: [attn.qkv, attn.proj]}
    importance: {threshold: 0.0}
    alignment: null
    task_inference: null
  - strategy: lorac_ipc
    name: voting
    lora: {rank: 4}
    alignment: null
    task_inference: {clusters: 2, batchwise_vote: true}
    official_k_gate: true
  - strategy: slca_plus_plus
    training: {optimizer: {name: sgd, lr: 0.01, momentum: 0.9}, schedule: {name: cosine, floor: 0.0001}}
    alignment: {epochs: 1, samples_per_class: 32, scaling: feature}
"""
TASKS = 2
RUN = ("lora", "lorac_ipc", "slca_plus_plus")  # the others are built, but not trained
ALL = (*RUN, "newest", "voting")
OVERLAPS = {f"lorac/overlap/{name}" for name in ("largest", "cosine", "mean-cosine")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "pairs.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    words = [str(recipe), f"methods=[{','.join(RUN)}]"]
    assert main(["compare", *words, "--output", str(output), "--quiet"]) == 0
    return output / "pairs"


def results(folder: Path, method: str) -> dict:
    return json.loads((folder / method / "seed-0" / "results.json").read_text(encoding="utf-8"))


def built(recipe: Path, method: str, *overrides: str):
    """The strategy of one method, before any training."""
    config = load_recipe(str(recipe), list(overrides)).single(method, 0)
    evaluator = EvaluationPlugin(loggers=[BaseLogger()])
    return build_strategy(Ingredients(config, build_backbone(config), torch.device("cpu"), [], evaluator))


def plugin(strategy, kind: type):
    """The only plugin of a type; None for none."""
    found = [p for p in strategy.plugins if type(p) is kind]
    assert len(found) < 2
    return found[0] if found else None


def layers(strategy) -> dict[str, ComposedLoRALinear]:
    return {name: m for name, m in strategy.model.named_modules() if isinstance(m, ComposedLoRALinear)}


# --- results --------------------------------------------------------------------------------------------------------


DECLARED = ("task_inference", "batchwise_vote", "official_k_gate")


@pytest.mark.parametrize("method", RUN)
def test_protocol(finished: Path, method: str) -> None:
    run = results(finished, method)
    assert [run["protocol"][key] for key in DECLARED] == [method == "lorac_ipc", False, False]
    assert not run["protocol"]["replay"] and not run["protocol"]["task_identity_at_test"] and not run["diverged"]
    assert 0.1 < run["figures"]["accuracy/last"] <= 1


def test_protocol_follows_the_configuration(recipe: Path) -> None:
    config = load_recipe(str(recipe))
    for method in ALL:
        declared = lora_protocol(config.single(method, 0))
        assert declared == dict.fromkeys(DECLARED, method == "voting") | {
            "task_inference": method in ("lorac_ipc", "voting")
        }


def test_curves(finished: Path) -> None:
    run = results(finished, "lorac_ipc")
    curves = {tag: curve for tag, curve in run["curves"].items() if tag.startswith("lorac/")}
    scores = {f"lorac/importance/{name}" for name in ("largest", "mean", "frozen-share")}
    assert curves.keys() == OVERLAPS | scores | {"lorac/frozen", "lorac/task-inference"}
    assert {tag: run["figures"][tag] for tag in curves} == {tag: curve[-1] for tag, curve in curves.items()}
    for tag, curve in curves.items():
        assert len(curve) == TASKS and (curve[0] is None) is (tag in OVERLAPS) and curve[1] > 0
    shares = curves["lorac/task-inference"]
    assert shares[0] == 1.0 and 0.5 < shares[1] <= 1
    for method in ("lora", "slca_plus_plus"):
        assert not [tag for tag in results(finished, method)["curves"] if tag.startswith("lorac")]


def test_frozen_matrices_by_name(finished: Path, recipe: Path) -> None:
    """A tenth of the 36 matrices after each task; the list only grows."""
    run, positions = results(finished, "lorac_ipc"), LoRAComposition(built(recipe, "lorac_ipc").model).positions
    first, second = run["lora"]["frozen"]
    assert len(positions) == 36 and set(first) < set(second) <= set(positions)
    assert [len(first), len(second)] == [3, 6] == run["curves"]["lorac/frozen"]
    assert results(finished, "lora")["lora"] is None and results(finished, "slca_plus_plus")["lora"] is None


def test_scalars(finished: Path) -> None:
    run, board = results(finished, "lorac_ipc"), read_scalars(finished / "lorac_ipc" / "seed-0")
    table = (finished / "lorac_ipc" / "seed-0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    curves = {tag: curve for tag, curve in run["curves"].items() if tag.startswith("lorac/")}
    assert {line.split(",")[1] for line in table} >= curves.keys() | {"loss/task", "loss/orthogonality"}
    for tag, curve in curves.items():
        assert [v for _, v in board[tag]] == pytest.approx([v for v in curve if v is not None], rel=1e-6)
    assert len(board["loss/task"]) == len(board["loss/orthogonality"]) == TASKS  # once per epoch
    for method in ("lora", "slca_plus_plus"):
        assert not [tag for tag in read_scalars(finished / method / "seed-0") if tag.startswith("lorac")]


def test_report(finished: Path, capsys) -> None:
    for name in ("report.md", "report.html"):
        text = (finished / "summary" / name).read_text(encoding="utf-8")
        for method in RUN:
            assert (f"{method}: low-rank pairs, mean over seeds" in text) is (method == "lorac_ipc")
        assert "Tasks are inferred from features at test time in: lorac_ipc." in text
        assert "one vote per test batch" not in text and "slip of the released code" not in text
    text = (finished / "summary" / "report.md").read_text(encoding="utf-8")
    curves = results(finished, "lorac_ipc")["curves"]
    assert "| frozen matrices | 3 | 6 |" in text
    assert f"| samples sent to their own task, % | 100 | {100 * curves['lorac/task-inference'][1]:.3g} |" in text
    assert f"| - | {curves['lorac/overlap/largest'][1]:.3g} |" in text
    picture = finished / "summary" / "lorac-task-inference.svg"
    assert picture.stat().st_size > 1000 and f"]({picture.name})" in text
    assert main(["report", str(finished)]) == 0
    assert "Tasks are inferred from features at test time in: lorac_ipc." in capsys.readouterr().out


def test_report_over_seeds(finished: Path) -> None:
    found = {run["method"]: run for run in find_runs([finished])}
    runs = [copy.deepcopy(found["lorac_ipc"]) | {"seed": seed} for seed in (0, 1)]
    runs[0]["curves"] |= {"lorac/task-inference": [None, 0.5], "lorac/frozen": [3.0, 5.0]}
    runs[1]["curves"] |= {"lorac/task-inference": [None, 0.6], "lorac/frozen": [3.0, 6.0]}
    groups = group_runs(runs)
    ((title, heads, rows),) = lora_tables(groups)
    assert title == "lorac_ipc: low-rank pairs, mean over seeds" and heads == ["", "task 1", "task 2"]
    body = {row[0]: row[1:] for row in rows}
    assert body["frozen matrices"] == ["3", "5.5"]
    assert body["samples sent to their own task, %"] == ["-", "55"]
    assert (title, heads, rows) in tables(groups)
    assert [(d.tag, d.caption) for d in lora_curves_drawn(groups)] == [
        ("lorac/task-inference", "share of samples sent to their own task")
    ]
    other = group_runs([found["lora"], found["slca_plus_plus"]])
    assert lora_tables(other) == [] == lora_facts(other) == lora_curves_drawn(other)


def test_report_says_who_votes(finished: Path) -> None:
    """Also where methods with and without a vote stand side by side, and in runs of before these were declared."""
    found = {run["method"]: run for run in find_runs([finished])}
    runs = []
    for label, declared in (
        ("lorac_ipc", (True, False, False)), ("voting", (True, True, False)), ("gated", (False, False, True)),
        ("both", (True, True, True)),
    ):  # fmt: skip
        runs.append(copy.deepcopy(found["lorac_ipc"]) | {"method": label, "group_digest": label})
        runs[-1]["protocol"] |= dict(zip(DECLARED, declared, strict=True))
    older = copy.deepcopy(found["lora"])
    for key in DECLARED:
        del older["protocol"][key]
    groups = group_runs([*runs, older])
    lines = lora_facts(groups)
    names = [set(line.split(" in: ")[1].split(";")[0].rstrip(".").split(", ")) for line in lines]
    assert names == [{"lorac_ipc", "voting", "both"}, {"voting", "both"}, {"gated", "both"}]
    assert lines[1].startswith("CAUTION: one vote per test batch in: ") and lines[1].endswith("so the vote leaks it.")
    assert set(lines) <= set(facts(groups))


def test_dry_run(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """With settings that two steps could not reach: many epochs, a long alignment."""
    monkeypatch.chdir(tmp_path)
    later = ["training.epochs=50", "training.batch_size=4", "methods.lorac_ipc.alignment.epochs=500"]
    assert main(["check", str(recipe), "--dry-run", *later]) == 0
    told = capsys.readouterr().out
    assert [method in told for method in (f"\n{name}: 6 training steps" for name in ALL)] == [True] * len(ALL)
    assert not list(tmp_path.iterdir())


# --- what is built --------------------------------------------------------------------------------------------------


def test_lorac_ipc_is_built_as_configured(recipe: Path) -> None:
    strategy = built(
        recipe, "lorac_ipc", "methods.lorac_ipc.lora={rank: 3, alpha: 6.0, init: qr, targets: [attn.qkv, mlp.fc2]}",
        "methods.lorac_ipc.importance={threshold: 0.25, window: 7, of_remaining: true, ties: all}",
        "methods.lorac_ipc.task_inference={clusters: 3, mixed: grouped}", "methods.lorac_ipc.first_lr=0.02",
        "methods.lorac_ipc.alignment={epochs: 4, clusters: 5, samples_per_class: 6, lr: 0.7, momentum: 0.8}",
        "methods.lorac_ipc.orthogonality=2.5", "methods.lorac_ipc.omega_scale=0.1", "methods.lorac_ipc.clip=null",
        "training.num_workers=2",
    )  # fmt: skip
    composed = layers(strategy)
    assert {name.rpartition("blocks.")[2].partition(".")[2] for name in composed} == {"attn.qkv", "mlp.fc2"}
    assert {(m.rank, m.scale, m.init, tuple(m.gates)) for m in composed.values()} == {(3, 2.0, "qr", ())}
    assert {m.parts for m in composed.values()} == {("q", "k", "v"), ("full",)}
    assert all(m.num_tasks == 0 for m in composed.values())  # opened in training
    composition = plugin(strategy, LoRACompositionPlugin)
    settings = (composition.orthogonality, composition.omega_scale, composition.clip, composition.first_lr)
    assert settings == (2.5, 0.1, None, 0.02)
    freezing = plugin(strategy, ImportantParameterPlugin)
    assert (freezing.fraction, freezing.window, freezing.of_remaining, freezing.ties) == (0.25, 7, True, "all")
    tap = plugin(strategy, ClassifierAlignmentPlugin)
    assert (tap.epochs, tap.samples_per_class, tap.lr, tap.momentum, tap.weight_decay) == (4, 6, 0.7, 0.8, 0.0)
    assert (tap.statistics, tap.gaussians.clusters, tap.scaling, tap.temperature) == ("clusters", 5, None, None)
    assert not tap.restore and tap.num_workers == 2
    inference = plugin(strategy, TaskInferencePlugin)
    assert (inference.inference.clusters, inference.batchwise_vote, inference.mixed) == (3, False, "grouped")
    assert inference.num_workers == 2 and type(strategy._criterion) is LocalCrossEntropy


def test_lorac_ipc_with_parts_switched_off(recipe: Path) -> None:
    newest, voting = built(recipe, "newest"), built(recipe, "voting")
    assert plugin(newest, TaskInferencePlugin) is None and plugin(newest, ClassifierAlignmentPlugin) is None
    assert plugin(newest, ImportantParameterPlugin).fraction == 0
    assert plugin(voting, TaskInferencePlugin).batchwise_vote
    gates = {tuple(m.gates.items()) for m in layers(voting).values()}
    assert gates == {(("k", "q"),), ()}
    found = built(recipe, "voting", "methods.voting.alignment={}", "methods.voting.lora={}")
    tap = plugin(found, ClassifierAlignmentPlugin)
    assert (tap.epochs, tap.samples_per_class, tap.lr, tap.gaussians.clusters) == (50, 640, 0.005, 10)
    assert {name.partition("blocks.")[2].partition(".")[2] for name in layers(found)} == set(TARGETS)
    assert {m.rank for m in layers(found).values()} == {16}


def test_lora_is_one_open_pair(recipe: Path) -> None:
    strategy = built(recipe, "lora", "methods.lora.lora={rank: 2, targets: [attn.proj], alpha: 4.0}")
    composed = layers(strategy)
    assert len(composed) == 6 and all(m.num_tasks == 1 and m.num_closed == 0 for m in composed.values())
    trained = [name for name, p in strategy.model.backbone.named_parameters() if p.requires_grad]
    assert len(trained) == 12 and all(".attn.proj." in name for name in trained)
    assert isinstance(strategy._criterion, torch.nn.CrossEntropyLoss)
    local = built(recipe, "lora", "methods.lora.local_loss=true")
    assert type(local._criterion) is LocalCrossEntropy
    first, second = (built(recipe, "lora", f"seeds=[{s}]") for s in (0, 0))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_slca_plus_plus_is_built_as_configured(recipe: Path) -> None:
    label = "methods.slca_plus_plus"
    strategy = built(
        recipe, "slca_plus_plus", f"{label}.alpha=0.25", f"{label}.beta=0.75", f"{label}.lora_rank=3",
        f"{label}.lora_scale=0.6", f"{label}.lora_targets=[attn.qkv, mlp.fc1]", f"{label}.backbone_scale=0.2",
        f"{label}.first_task_lora_scale=0.4",
        f"{label}.alignment={{epochs: 4, temperature: null, scaling: mean, weight_decay: 0.0, samples_per_class: 9}}",
    )  # fmt: skip
    composed = layers(strategy)
    assert {(m.rank, m.scale, m.parts, m.init) for m in composed.values()} == {(3, 0.6, ("full",), "svd")}
    assert {name.rpartition(".")[2] for name in composed} == {"qkv", "fc1"}
    loss = strategy._criterion
    assert type(loss) is LocalSymmetricCrossEntropy and (loss.alpha, loss.beta) == (0.25, 0.75)
    aligned = plugin(strategy, ClassifierAlignmentPlugin)
    assert (aligned.epochs, aligned.temperature, aligned.scaling, aligned.weight_decay) == (4, None, "mean", 0.0)
    assert aligned.samples_per_class == 9 and aligned.restore
    factors = [factor for _, factor in plugin(strategy, SlowLearnerPlugin).rules]
    assert [f if isinstance(f, float) else (f(0), f(1)) for f in factors] == [(0.4, 0.2), 0.2, 1.0]


def test_schedules(recipe: Path) -> None:
    """Rates of five epochs, lr 1 and floor 0.2: half a cosine, and the same one epoch late."""
    assert make_schedule(load_recipe(str(recipe)).training.schedule, 5) is None
    found = {}
    for name in ("cosine", "lagged_cosine"):
        schedule = load_recipe(str(recipe), [f"training.schedule={{name: {name}, floor: 0.2}}"]).training.schedule
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = make_schedule(schedule, 5)(optimizer)
        found[name] = []
        for _ in range(5):
            found[name].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    curve = [0.2 + 0.4 * (1 + math.cos(math.pi * e / 5)) for e in range(5)]
    assert found["cosine"] == pytest.approx(curve) and found["lagged_cosine"] == pytest.approx([1.0, *curve[:4]])


@pytest.mark.parametrize("method", ["lorac_ipc", "slca_plus_plus"])
def test_schedule_of_a_method_reaches_its_strategy(recipe: Path, method: str) -> None:
    kind = {"lorac_ipc": LoRACompositionPlugin, "slca_plus_plus": SlowLearnerPlugin}[method]
    for schedule, last in (("{name: cosine, floor: 0.3}", 0.3), ("{name: none}", 1.0)):
        strategy = built(recipe, method, f"methods.{method}.training.schedule={schedule}", "training.epochs=4")
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = plugin(strategy, kind).scheduler_factory(optimizer)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(last)


# --- configurations -------------------------------------------------------------------------------------------------


def test_brief(recipe: Path) -> None:
    config = load_recipe(str(recipe), ["training.epochs=9", "methods.lorac_ipc.alignment.epochs=50"])
    for method in config.methods:
        brief = method.brief()
        assert (brief.training.epochs, brief.training.schedule) == (1, None)
        own = method.model_dump() | {"training": brief.training.model_dump()}
        if method.name == "lorac_ipc":
            own["alignment"]["epochs"] = 1
        assert brief.model_dump() == own
    assert config.methods[1].alignment.epochs == 50  # the method itself stays


def test_digest_changes_with_every_value(recipe: Path) -> None:
    changes = {
        "lora": ["lora.rank=5", "lora.alpha=2", "lora.init=qr", "lora.targets=[attn.qkv]", "local_loss=true"],
        "lorac_ipc": [
            "lora.rank=5", "orthogonality=0.4", "omega_scale=0.5", "clip=null", "first_lr=0.1", "official_k_gate=true",
            "importance.threshold=0", "importance.window=null", "importance.of_remaining=true", "importance.ties=all",
            "alignment=null", "alignment.epochs=3", "alignment.clusters=3", "alignment.samples_per_class=3",
            "alignment.lr=3", "alignment.momentum=0", "task_inference=null", "task_inference.clusters=3",
            "task_inference.batchwise_vote=true", "task_inference.mixed=grouped", "training.schedule.floor=0.0",
            "training.schedule.name=cosine",
        ],
        "slca_plus_plus": [
            "alpha=0.5", "beta=0.5", "backbone_scale=0.2", "first_task_lora_scale=0.1", "lora_rank=5", "lora_scale=1",
            "lora_targets=[fc1]", "alignment.scaling=null", "alignment.temperature=null",
        ],
    }  # fmt: skip
    for method, overrides in changes.items():
        words = [[], *([f"methods.{method}.{override}"] for override in overrides)]
        digests = [load_recipe(str(recipe), word).single(method, 0).digest() for word in words]
        assert len(set(digests)) == len(digests)


# overrides -> what the message must contain: path, value, what is accepted
WRONG = {
    "rank of zero": (["methods.lora.lora.rank=0"], ["methods[0].lora.rank: 0", "a whole number, at least 1"]),
    "fraction for a rank": (["methods.lora.lora.rank=2.5"], ["methods[0].lora.rank: 2.5", "a whole number"]),
    "alpha of zero": (["methods.lorac_ipc.lora.alpha=0"], ["methods[1].lora.alpha: 0", "greater than 0"]),
    "unknown start": (["methods.lorac_ipc.lora.init=svd"], ["methods[1].lora.init: 'svd'", "kaiming, qr"]),
    "one name for targets": (["methods.lora.lora.targets=qkv"], ["methods[0].lora.targets: 'qkv'", "a list"]),
    "unknown key of lora": (["methods.lora.lora.rnk=2"], ["lora.rnk", "did you mean methods.lora.lora.rank"]),
    "more than all": (["methods.lorac_ipc.importance.threshold=1.5"], ["importance.threshold: 1.5", "at most 1"]),
    "fewer than none": (["methods.newest.importance.threshold=-1"], ["importance.threshold: -1", "at least 0"]),
    "empty window": (["methods.lorac_ipc.importance.window=0"], ["importance.window: 0", "at least 1", "null"]),
    "unknown ties": (["methods.lorac_ipc.importance.ties=none"], ["importance.ties: 'none'", "order, all"]),
    "negative epochs": (["methods.lorac_ipc.alignment.epochs=-1"], ["methods[1].alignment.epochs: -1", "at least 0"]),
    "no clusters": (["methods.lorac_ipc.alignment.clusters=0"], ["methods[1].alignment.clusters: 0", "at least 1"]),
    "no rows": (["methods.lorac_ipc.alignment.samples_per_class=0"], ["alignment.samples_per_class: 0", "at least 1"]),
    "no rate": (["methods.lorac_ipc.alignment.lr=0"], ["methods[1].alignment.lr: 0", "greater than 0"]),
    "momentum of one": (["methods.lorac_ipc.alignment.momentum=1"], ["alignment.momentum: 1", "less than 1"]),
    "key of the other alignment": (
        ["methods.lorac_ipc.alignment.temperature=0.1"], ["methods[1].alignment.temperature: unknown key", "clusters"],
    ),
    "no clusters for tasks": (["methods.voting.task_inference.clusters=0"], ["inference.clusters: 0", "at least 1"]),
    "number for a vote": (["methods.voting.task_inference.batchwise_vote=1"], ["batchwise_vote: 1", "true or false"]),
    "unknown passes": (["methods.voting.task_inference.mixed=both"], ["mixed: 'both'", "auto, one_pass, grouped"]),
    "negative penalty": (["methods.lorac_ipc.orthogonality=-1"], ["methods[1].orthogonality: -1", "at least 0"]),
    "negative scale": (["methods.lorac_ipc.omega_scale=-1"], ["methods[1].omega_scale: -1", "at least 0"]),
    "clip to nothing": (["methods.lorac_ipc.clip=0"], ["methods[1].clip: 0", "greater than 0 or null"]),
    "first rate of zero": (["methods.lorac_ipc.first_lr=0"], ["methods[1].first_lr: 0", "greater than 0 or null"]),
    "text for a switch": (["methods.voting.official_k_gate='no'"], ["official_k_gate: 'no'", "true or false"]),
    "penalty of plain LoRA": (["methods.lora.orthogonality=1"], ["methods[0].orthogonality: unknown key", "accepted"]),
    "rank of SLCA++": (["methods.slca_plus_plus.lora_rank=0"], ["methods[4].lora_rank: 0", "at least 1"]),
    "no targets": (["methods.slca_plus_plus.lora_targets=[]"], ["methods[4].lora_targets", "not empty"]),
    "frozen backbone": (["methods.slca_plus_plus.backbone_scale=0"], ["backbone_scale: 0", "greater than 0"]),
    "negative loss": (["methods.slca_plus_plus.alpha=-0.5"], ["methods[4].alpha: -0.5", "at least 0"]),
    "pairs that count nothing": (["methods.slca_plus_plus.lora_scale=0"], ["lora_scale: 0", "greater than 0"]),
    "loss of SLCA": (["methods.slca_plus_plus.local_loss=true"], ["methods[4].local_loss: unknown key", "alpha"]),
    "floor without a cosine": (
        ["training.schedule={name: none, floor: 0.1}"],
        ["training.schedule.floor: 0.1 is set, but the schedule is none", "accepted: 0"],
    ),
    "floor of steps": (
        ["training.epochs=3", "training.schedule={name: multistep, milestones: [1], floor: 0.1}"],
        ["training.schedule.floor: 0.1 is set, but the schedule is multistep"],
    ),
    "floor below zero": (["training.schedule={name: cosine, floor: -1}"], ["schedule.floor: -1", "at least 0"]),
    "milestones of a cosine": (
        ["training.schedule={name: lagged_cosine, milestones: [1]}"],
        ["training.schedule.milestones: [1] is set, but the schedule is lagged_cosine"],
    ),
    "floor of a method": (
        ["methods.lorac_ipc.training.schedule={name: none, floor: 0.1}"],
        ["methods[1].training.schedule.floor: 0.1 is set, but the schedule is none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration(name: str, recipe: Path, tmp_path: Path, capsys) -> None:
    overrides, expected = WRONG[name]
    assert main(["compare", str(recipe), *overrides, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and not (tmp_path / "out").exists()
    for part in expected:
        assert part in message


def test_all_problems_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            str(recipe),
            ["methods.lora.lora.rank=0", "methods.lorac_ipc.importance.threshold=2", "methods.slca_plus_plus.beta=-1"],
        )
    paths = sorted(problem.path for problem in caught.value.problems)
    assert paths == ["methods[0].lora.rank", "methods[1].importance.threshold", "methods[4].beta"]


def test_accepted_configurations(recipe: Path) -> None:
    for overrides in (
        ["methods.lorac_ipc.importance.threshold=0"],  # a whole number where a fraction is meant
        ["methods.lorac_ipc.alignment.epochs=0", "methods.lorac_ipc.clip=null"],
        ["training.schedule={name: lagged_cosine, floor: 0}"],
        ["methods=[lora, lorac_ipc, slca_plus_plus]"],
    ):
        assert isinstance(load_recipe(str(recipe), overrides), Config)


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ({"strategy": "lora", "lora": {"rank": 500}}, "methods[0].lora", "rank is 500; 1 to 96"),
        ({"strategy": "lorac_ipc", "lora": {"targets": ["nothing"]}}, "methods[0].lora", "'nothing'"),
        ({"strategy": "slca_plus_plus", "lora_targets": ["head"]}, "methods[0].lora_targets", "'head'"),
    ],
)
def test_layers_that_do_not_fit_the_backbone(method, path, message):
    backbone = {"name": "vit_firn_32", "pretrained": False}
    config = validate({"name": "c", "stream": {"name": "digits"}, "backbone": backbone, "methods": [method]})
    for refuse in (lambda: prepare(config), lambda: list(dry_run(config, data=False))):
        with pytest.raises(ConfigError) as error:
            refuse()
        assert error.value.problems[0].path == path and message in error.value.problems[0].reason


@pytest.mark.parametrize("strategy", ["lorac_ipc", "slca_plus_plus"])
def test_streams_whose_classes_come_again_are_refused(strategy):
    stream = {"name": "domains", "root": "nowhere", "domain_order": ["a", "b"], "classes": 3}
    config = validate({"name": "c", "stream": stream, "backbone": {"name": "vit_firn_32"}, "methods": [strategy]})
    with pytest.raises(ConfigError, match=f"{strategy} needs each class in one experience"):
        list(dry_run(config, data=False))
