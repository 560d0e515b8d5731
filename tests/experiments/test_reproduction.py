"""The table of reproductions: which runs count, what is measured of them, what is collected; and docs/results.md."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.collected_runs import collect, compact_results, portable, portable_environment
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, load_experiment
from avalanche_firn.experiments.recipe_table import JOINT, VOTE
from avalanche_firn.experiments.reproduction import PLACES, comparable, differences, reproduce, stored_runs
from avalanche_firn.experiments.reproduction_text import results_text, shown_figures

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENVIRONMENT = {
    "python": "3.12.1",
    "platform": "Linux-6.1.0-made-by-somebody-x86_64-with-glibc2.36",
    "packages": {"avalanche-firn": "0.1.0", "torch": "2.5.0"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "device": {"type": "cuda", "cpus": 8, "threads": 1, "name": "Some GPU", "memory_MiB": 80000, "cuda": "12.4"},
    "date": "2025-01-31",
}
PROTOCOL = {"task_identity_at_test": False, "replay": False, "joint": False, "batchwise_vote": False}


def make_run(
    top: Path, recipe: str, method: str, seed: int, figures: dict[str, float], *overrides: str, **changes: Any
) -> Path:
    """A finished run in the format of the runner. `changes`: weights, data, protocol, environment, seconds."""
    config = load_experiment(recipe, overrides).single(method, seed)
    weights = changes.get("weights", "a" * 64)
    results: dict[str, Any] = {
        "format": 1,
        "recipe": config.name,
        "method": method,
        "strategy": config.methods[0].strategy,
        "seed": seed,
        "config_digest": config.digest(),
        "group_digest": config.digest(seeds=False),
        "protocol": PROTOCOL | changes.get("protocol", {}),
        "diverged": changes.get("diverged", False),
        "cost": {"seconds": changes.get("seconds", 5400.0), "device": "cuda"},
    }
    if hasattr(config, "transfer"):
        own = {"figures": figures, "diverged": False, "rates": {}, "sweeps": {}, "optimizer": {"name": "adam"}}
        own |= {"continual": {"accuracy": [0.25], "curves": [[0.25]]}, "logged_after": [1], "shocks": []}
        results |= {
            "experiment": "transfer",
            "data": {"source": "x", "fingerprint": "f"},
            "network": {"name": "convnet_28", "parameters": 100},
            "pretraining": {},
            "optimizers": {"adam": own},
        }
        rest = {"rates_chosen_on": "validation", "trainable": "all", "head": "kaiming", "tasks": 1, "trials": 1}
        results["protocol"] = rest | {"zap": False} | results["protocol"]
    else:
        curves = {tag: [1.0, value] for tag, value in figures.items()} | {"slca/long": [0.0] * 500}
        results |= {
            "stream": {
                "source": "x",
                "split": "test",
                "fingerprint": changes.get("data", "d" * 64),
                "class_order": [0, 1],
                "task_sizes": [1, 1],
            },
            "backbone": {
                "tag": config.backbone.name,
                "weights": changes.get("kind", "pretrained"),
                "weights_sha256": weights,
            },
            "figures": figures,
            "curves": curves,
            "accuracy_matrix": [[1.0, None], [0.5, 0.5]],
            "dynamics": {"losses": [[0.0] * 100] * 100},
        }
    folder = top / config.name / method / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(dump(config))
    environment = changes.get("environment", ENVIRONMENT)
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def last(value: float) -> dict[str, float]:
    return {"accuracy/last": value, "accuracy/average": value, "accuracy/incremental": value}


def section(text: str, recipe: str) -> str:
    """The part of the table about a recipe."""
    return text.partition(f"\n### {recipe}\n")[2].partition("\n##")[0]


def row(text: str, method: str) -> list[str]:
    """The cells of the first row of a method."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(*folders: Path) -> str:
    return results_text(stored_runs(folders))


def test_only_transfers_have_optimizers(tmp_path: Path) -> None:
    """Keys that this version doesn't know are left as they are, whatever they hold."""
    for optimizers in ([], None, {"adam": {}}):
        file = make_run(tmp_path / str(optimizers), "digits", "naive", 0, last(0.9)) / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"optimizers": optimizers}))
        assert row(section(table_of(file.parent), "digits"), "naive")[2] == "90.00"


# ------------------------------------------------------------------- the table
def test_the_table_in_docs_is_made_from_the_runs_in_docs() -> None:
    """Fails when a run or a recipe changed: firn results docs/results --output docs/results.md makes it again."""
    assert (DOCS / "results.md").read_text(encoding="utf-8") == table_of(DOCS / "results")


def test_without_runs_everything_says_so() -> None:
    text = results_text([])
    part = section(text, "slca_plus_plus_cifar100")
    assert row(part, "slca")[1:3] == ["91.53 ± 0.28 (secondary) [2]", "not run yet"]
    assert row(part, "*SLCA in the TUNA paper*")[1:3] == ["88.55 (secondary) [7]", "not trained here"]
    assert "- [5] CoFiMA paper (arXiv 2312.08977), table 1; ± over: three class orders" in part
    assert "Measured with" not in text and "other settings, so" not in text
    assert "recipes 0 have been run" in text
    assert row(section(text, "digits"), "joint")[-1] == JOINT  # to be declared, run or not
    assert VOTE in row(section(text, "lorac_ipc_cifar100_in21k"), "lorac_ipc_batchwise_vote")[-1]


def test_two_of_three_seeds(tmp_path: Path) -> None:
    for seed, value in ((1993, 0.915), (1997, 0.921)):
        make_run(tmp_path, "slca_plus_plus_cifar100", "slca", seed, last(value), data=str(seed))
    part = section(table_of(tmp_path), "slca_plus_plus_cifar100")
    values = np.array([91.5, 92.1])
    half = stats.t.ppf(0.975, 1) * values.std(ddof=1) / np.sqrt(2)
    cells = row(part, "slca")
    assert cells[1:3] == ["91.53 ± 0.28 (secondary) [2]", f"91.80 ± {half:.2f}"]
    assert cells[6] == "-"  # forgetting isn't in the results
    assert cells[7] == "2 of 3 (1993, 1997)"
    assert row(part, "slca_plus_plus")[2] == "not run yet"
    assert "| slca | `aaaaaaaaaaaa` | `0123456789ab` | Some GPU | 2025-01-31 | 1.5 |" in part
    assert "Of " in table_of(tmp_path) and " recipes 1 have been run, 0 of them with every method." in table_of(
        tmp_path
    )


def test_one_seed_has_no_interval_and_foreign_seeds_are_told(tmp_path: Path) -> None:
    make_run(tmp_path, "digits", "slca", 7, last(0.5))
    cells = row(section(table_of(tmp_path), "digits"), "slca")
    assert cells[1] == "50.00" and cells[3] == "1 of 3 (7); not all the recipe's"


def test_runs_elsewhere_count(tmp_path: Path) -> None:
    """Places of data and weights, device, threads, loaders and output are not other settings."""
    places = ["backbone.weights=/home/somebody/w.safetensors", "stream.root=/data/r", "device=cpu", "threads=3"]
    places += ["training.num_workers=0", "output=/scratch/runs", "progress=false", "checkpoint.every=7"]
    folder = make_run(tmp_path, "lorac_ipc_imagenet_r", "lorac", 42, {"accuracy/average": 0.78}, *places)
    part = section(table_of(tmp_path), "lorac_ipc_imagenet_r")
    assert row(part, "lorac")[2] == "78.00" and "other settings" not in part
    assert json.loads((folder / "results.json").read_text())["group_digest"] != (
        load_experiment("lorac_ipc_imagenet_r").single("lorac", 42).digest(seeds=False)
    )
    make_run(tmp_path, "slca_plus_plus_cifar100", "slca", 1993, last(0.9), "stream.arguments.dataset_root=/data/cifar")
    assert row(section(table_of(tmp_path), "slca_plus_plus_cifar100"), "slca")[2] == "90.00"
    plain = comparable(load_experiment("digits").single("slca", 0))
    assert plain["methods.slca.alignment.epochs"] == 5 and not set(PLACES) & set(plain)


def test_other_settings_stand_apart_and_say_what_differs(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "digits", "slca", 0, last(0.9))
    make_run(tmp_path / "b", "digits", "slca", 1, last(0.1), "training.epochs=1", "methods.slca.alignment.lr=0.5")
    make_run(tmp_path / "b", "digits", "naive", 1, last(0.2), "evaluation.split=validation")
    part = section(table_of(tmp_path), "digits")
    assert row(part, "slca")[1:4] == ["90.00", "90.00", "1 of 3 (0)"] and row(part, "naive")[1] == "not run yet"
    apart = part.partition("Run with other settings")[2]
    cells = row(apart, "slca")
    assert cells[1] == "10.00" and cells[3] == "1 (1)"
    assert cells[4] == "methods.slca.alignment.lr 0.5 instead of 0.01; training.epochs 1 instead of 5"
    assert row(apart, "naive")[4] == "evaluation.split validation instead of test"
    many = [f"training.optimizer.{k}={v}" for k, v in (("lr", 1.0), ("momentum", 0.0), ("weight_decay", 0.1))]
    many += ["training.epochs=1", "training.batch_size=1", "training.eval_batch_size=1", "stream.tasks=2"]
    many += ["precision=bf16", "evaluation.streams=all", "backbone.fresh_final_norm=true"]
    make_run(tmp_path / "c", "digits", "joint", 0, last(0.3), *many)
    assert row(section(table_of(tmp_path), "digits").partition("other settings")[2], "joint")[4].endswith("and 2 more")


def test_differences_need_a_method_of_that_name() -> None:
    config = load_experiment("digits").single("slca", 0)
    assert not differences(config, load_experiment("digits"))
    with pytest.raises(KeyError):
        differences(config, load_experiment("cila_digits"))


def test_other_weights_and_other_data_are_not_averaged(tmp_path: Path) -> None:
    make_run(tmp_path, "digits", "slca", 0, last(0.9))
    make_run(tmp_path, "digits", "slca", 1, last(0.1), weights="b" * 64)
    make_run(tmp_path, "digits", "naive", 0, last(0.9))
    make_run(tmp_path, "digits", "naive", 1, last(0.1), data="e" * 64)
    part = section(table_of(tmp_path), "digits")
    assert row(part, "slca (weights aaaaaaaaaaaa)")[1] == "90.00"
    assert row(part, "slca (weights bbbbbbbbbbbb)")[1] == "10.00"
    assert row(part, "naive (data eeeeeeeeeeee)")[1] == "10.00"
    # random weights differ from seed to seed, and so does what a seeded class order makes of Avalanche's own streams
    for seed in (0, 1):
        make_run(tmp_path, "cila_digits_scratch", "naive", seed, last(0.2), weights=str(seed), kind="random")
    part = section(table_of(tmp_path), "cila_digits_scratch")
    assert row(part, "naive")[1] == "20.00 ± 0.00" and "| naive | random |" in part


def test_what_has_to_be_declared(tmp_path: Path) -> None:
    make_run(tmp_path, "digits", "joint", 0, last(0.99), protocol={"joint": True}, diverged=True)
    make_run(
        tmp_path,
        "co2l_seq_cifar10_200",
        "co2l",
        0,
        {"accuracy/last": 0.6, "task-il/accuracy/last": 0.9},
        protocol={"replay": True, "replay_slots": 200},
        kind="random",
    )
    make_run(
        tmp_path,
        "lorac_ipc_cifar100_in21k",
        "lorac_ipc_batchwise_vote",
        42,
        {"accuracy/average": 0.93, "forgetting/average": 0.02},
        protocol={"batchwise_vote": True, "task_identity_at_test": True},
    )
    text = table_of(tmp_path)
    assert row(section(text, "digits"), "joint")[-1] == f"{JOINT}; weights became infinite or NaN with seed 0"
    part = section(text, "co2l_seq_cifar10_200")
    assert row(part, "co2l")[-1] == "replay of 200 samples" and row(part, "cila")[-1] == "replay"
    assert row(part, "method")[3:5] == [
        "`task-il/accuracy/last` (task given), others",
        "`task-il/accuracy/last` (task given), measured",
    ]
    assert row(part, "co2l")[1:5] == [
        "65.57 ± 1.37 (secondary) [1]", "60.00", "93.43 ± 0.78 (secondary) [1]", "90.00",
    ]  # fmt: skip
    voting = row(section(text, "lorac_ipc_cifar100_in21k"), "lorac_ipc_batchwise_vote")
    assert voting[1:5] == ["92.86 ± 0.11 (code) [1]", "93.00", "1.92 ± 0.09 (code) [1]", "2.00"]
    assert voting[-1] == f"{VOTE}; task identity at test time"


def test_joint_training_has_no_incremental_accuracy(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "digits", "joint", 0, last(0.99), protocol={"joint": True})
    run = stored_runs([folder])[0]
    assert run.value("accuracy/incremental") is None and run.value("accuracy/last") == 0.99
    assert run.value("accuracy/unknown") is None


def test_transfers(tmp_path: Path) -> None:
    figures = {"continual/accuracy": 0.25, "iid/accuracy": None}
    protocol = {"replay": True, "rates_chosen_on": "validation", "joint": None}
    make_run(tmp_path, "zapping_omniglot", "asb_zap", 0, figures, "data.root=/omniglot", protocol=protocol)
    part = section(table_of(tmp_path), "zapping_omniglot")
    assert row(part, "asb_zap")[1:6] == ["-", "25.00", "-", "-", "-"]  # no figure of sgd in these results
    assert row(part, "asb_zap")[-1] == "replay of pre-training images, in the pre-training"
    assert row(part, "*ANML, made again*")[1:3] == ["65 (code) [1]", "not trained here"]
    assert "| asb_zap | random | `0123456789ab` | Some GPU | 2025-01-31 | 1.5 |" in part
    assert shown_figures(load_experiment("zapping_digits", ["transfer.iid_epochs=0"])) == [
        "adam/continual/accuracy",
        "sgd/continual/accuracy",
    ]
    assert "probe/fine-tune" in shown_figures(load_experiment("lp_ft_digits"))


def test_environments(tmp_path: Path) -> None:
    make_run(tmp_path, "digits", "slca", 0, last(0.9), environment=None, seconds=40 * 3600.0)
    changed = ENVIRONMENT | {"git_commit": "f" * 40 + "+changes", "device": {"type": "cpu", "threads": 1}, "date": None}
    make_run(tmp_path, "digits", "naive", 0, last(0.9), environment=changed | {"resumed_in": [ENVIRONMENT]})
    make_run(tmp_path, "digits", "joint", 0, last(0.9), environment=ENVIRONMENT | {"git_commit": None})
    part = section(table_of(tmp_path), "digits")
    assert "| slca | `aaaaaaaaaaaa` | not recorded | not recorded | not recorded | 40 |" in part
    code = "`0123456789ab`; `ffffffffffff` with changes"
    assert f"| naive | `aaaaaaaaaaaa` | {code} | CPU, 1 thread; Some GPU | 2025-01-31 | 1.5 |" in part
    assert "| joint | `aaaaaaaaaaaa` | version 0.1.0, commit not recorded |" in part


def test_runs_under_other_names(tmp_path: Path) -> None:
    make_run(tmp_path, "digits", "slca", 0, last(0.9), "name=mine")
    make_run(tmp_path, "digits", "naive", 0, last(0.1), "name=quick", "training.epochs=1")
    folder = make_run(tmp_path, "digits", "joint", 0, last(0.5), "name=old")
    (folder / "config.yaml").write_text("name: old\nno_such_key: 1\n")
    text = table_of(tmp_path)
    assert row(section(text, "digits"), "slca")[1] == "90.00"
    left = text.partition("## Runs of no shipped recipe\n")[2]
    assert "- quick/naive seed 0: no shipped recipe has that name, and none has its configuration\n" in left
    assert "- old/joint seed 0: this version can't read its configuration\n" in left
    copied = tmp_path / "copied.yaml"
    copied.write_text("name: digits\nstream: {name: digits}\nmethods: [{strategy: naive, name: special}]\n")
    make_run(tmp_path, str(copied), "special", 0, last(0.3))
    apart = section(table_of(tmp_path), "digits").partition("other settings")[2]
    assert row(apart, "special")[4] == "the recipe has no method special"
    make_run(tmp_path / "t", "zapping_digits", "iid", 0, {}, "name=digits")
    assert "another kind of experiment than the recipe of that name" in table_of(tmp_path)


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for seed, value in ((2, 0.7), (0, 0.9), (1, 0.8)):
        for method in ("slca", "naive"):
            make_run(tmp_path / "one", "digits", method, seed, last(value))
    moved = tmp_path / "two"
    for i, folder in enumerate(sorted((tmp_path / "one").rglob("seed-*"), reverse=True)):
        shutil.copytree(folder, moved / f"{i}")
    assert table_of(tmp_path / "one") == table_of(moved)
    runs = stored_runs([moved])
    assert results_text(runs) == results_text(runs[::-1])
    assert len(stored_runs([moved, moved / "0"])) == 6  # named twice, counted once


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "holds no config.yaml"),
        (lambda folder: (folder / "environment.json").write_text("{"), "environment.json can't be read"),
        (lambda folder: (folder / "results.json").write_text("[]"), "isn't a results file of format 1"),
        (
            lambda folder: (folder / "config.yaml").write_text(dump(load_experiment("digits").single("naive", 3))),
            r"results.json is of slca with seed 0, config.yaml of \['naive'\] with seeds \[3\]",
        ),
        (lambda folder: shutil.copytree(folder, folder.parent / "again"), "seed 0 of digits/slca is given twice"),
    ],
)
def test_broken_runs_stop_the_table(tmp_path: Path, break_it: Any, words: str) -> None:
    break_it(make_run(tmp_path, "digits", "slca", 0, last(0.9)))
    with pytest.raises(ConfigError, match=words):
        table_of(tmp_path)


def test_a_folder_must_exist_and_may_be_empty(tmp_path: Path) -> None:
    assert stored_runs([tmp_path]) == []
    with pytest.raises(ConfigError, match="nowhere isn't a folder"):
        stored_runs([tmp_path / "nowhere"])


# ------------------------------------------------------------------ collecting
def test_collected_runs_give_the_same_table_without_places(tmp_path: Path) -> None:
    home = "/home/somebody"
    places = [f"backbone.weights={home}/w.safetensors", f"stream.root={home}/imagenet-r", f"output={home}/runs"]
    told = ENVIRONMENT | {"hostname": socket.gethostname(), "cwd": home, "resumed_in": [ENVIRONMENT | {"user": "x"}]}
    for seed in (42, 44):
        make_run(
            tmp_path / "runs",
            "lorac_ipc_imagenet_r",
            "lorac",
            seed,
            {"accuracy/average": 0.7 + seed / 1000},
            *places,
            environment=told,
            kind=f"{home}/w.safetensors",
        )
    make_run(tmp_path / "runs", "digits", "slca", 0, last(0.9), "training.epochs=1")
    make_run(tmp_path / "more", "digits", "slca", 0, last(0.8))
    make_run(tmp_path / "more", "digits", "naive", 0, last(0.8), "name=mine", "training.epochs=1")
    target = tmp_path / "docs" / "results"
    written = collect([tmp_path / "runs", tmp_path / "more"], target)
    names = [folder.relative_to(target).as_posix() for folder in written]
    assert names[0] == "digits/slca/" + names[0].split("/")[2] + "/seed-0" and names[0].split("/")[2].startswith(
        "other-"
    )
    assert names[1] == "digits/slca/seed-0" and names[2:4] == [f"lorac_ipc_imagenet_r/lorac/seed-{s}" for s in (42, 44)]
    assert names[4].startswith("mine/naive/other-")
    assert table_of(target) == table_of(tmp_path / "runs", tmp_path / "more")
    assert "from a file" in section(table_of(target), "lorac_ipc_imagenet_r")
    for path in (path for path in target.rglob("*") if path.is_file()):
        text = path.read_text()
        assert home not in text and "somebody" not in text and "hostname" not in text and '"user"' not in text
        assert len(text) < 5000
    kept = json.loads((target / names[1] / "results.json").read_text())
    assert kept["dynamics"] is None and "slca/long" not in kept["curves"] and kept["accuracy_matrix"][1] == [0.5, 0.5]
    assert kept["curves"]["accuracy/last"] == [1.0, 0.8]
    config = (target / names[2] / "config.yaml").read_text()
    assert "root: imagenet-r\n" in config and "weights: w.safetensors\n" in config and "\ntargets:" not in config
    assert load_experiment(target / names[2]).output == "runs"
    before = {path: path.read_bytes() for path in target.rglob("*.json")}
    assert collect([tmp_path / "runs", tmp_path / "more"], target) == written  # again: the same
    assert before == {path: path.read_bytes() for path in target.rglob("*.json")}


def test_collecting_refuses_what_can_not_be_told_later(tmp_path: Path) -> None:
    target = tmp_path / "results"
    changed = ENVIRONMENT | {"git_commit": "f" * 40 + "+changes"}
    make_run(tmp_path / "a", "digits", "slca", 0, last(0.9), environment=changed)
    make_run(tmp_path / "b", "digits", "slca", 0, last(0.9), environment=ENVIRONMENT | {"resumed_in": [changed]})
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=f"{name}/digits/slca/seed-0 was run from code with uncommitted changes"):
            collect([tmp_path / name], target)
    make_run(tmp_path / "c", "digits", "slca", 0, last(0.9), environment=None)
    with pytest.raises(ConfigError, match=r"holds no environment.json"):
        collect([tmp_path / "c"], target, changed_code=True)
    folder = make_run(tmp_path / "d", "digits", "naive", 0, last(0.9))
    (folder / "config.yaml").write_text("name: old\nno_such_key: 1\n")
    with pytest.raises(ConfigError, match=r"config.yaml: this version can't read it"):
        collect([tmp_path / "d"], target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no finished run to collect"):
        collect([tmp_path / "empty"], target)
    assert not target.exists()  # nothing was written by any of these
    assert len(collect([tmp_path / "a"], target, changed_code=True)) == 1
    make_run(tmp_path / "e", "digits", "slca", 0, last(0.5))
    with pytest.raises(ConfigError, match=r"holds another run already \(results.json, environment.json differ\)"):
        collect([tmp_path / "e"], target)
    collect([tmp_path / "e"], target, replace=True)
    assert row(section(table_of(target), "digits"), "slca")[1] == "50.00"
    make_run(tmp_path / "f", "digits", "joint", 0, last(0.5))
    make_run(tmp_path / "g", "digits", "joint", 0, last(0.4), weights="b" * 64)
    with pytest.raises(ConfigError, match="as another run does"):
        collect([tmp_path / "f", tmp_path / "g"], target)


def test_what_is_left_of_paths_and_machines() -> None:
    values = {"root": "../somebody/data", "free": "a/b", "list": ["/x/y", "C:\\Users\\z", "~/q"], "n": 1, "none": None}
    assert portable(values) == {"root": "data", "free": "a/b", "list": ["y", "z", "q"], "n": 1, "none": None}
    assert portable({"split_files": ["up/train.txt", "up/test.txt"]}) == {"split_files": ["train.txt", "test.txt"]}
    kept = portable_environment(ENVIRONMENT | {"hostname": "h"})
    assert kept["platform"] == "Linux-x86_64" and "hostname" not in kept and kept["device"] == ENVIRONMENT["device"]
    assert portable_environment({"platform": "macOS-14.4-arm64-arm-64bit"}) == {"platform": "macOS-arm64"}
    assert compact_results({"figures": {"a": 1.0}, "dynamics": {"x": 1}}) == {"figures": {"a": 1.0}, "dynamics": None}


# ----------------------------------------------------------------- the command
def test_command_on_a_real_run(tmp_path: Path, capsys, monkeypatch) -> None:
    """A run of a second, as it comes from the runner: collected, listed apart, reported."""
    monkeypatch.chdir(tmp_path)
    short = ["training.epochs=1", "stream.tasks=2", "device=cpu", "evaluation.task_incremental=true"]
    assert main(["run", "digits", "method=naive", "seed=0", *short, "--quiet"]) == 0
    environment = json.loads(Path("runs/digits/naive/seed-0/environment.json").read_text())
    capsys.readouterr()
    words = ["results", "runs", "--collect", "kept", "--output", "table.md"]
    if str(environment["git_commit"]).endswith("+changes"):
        assert main(words) == 2 and "uncommitted changes" in capsys.readouterr().err
    assert main([*words, "--changed-code"]) == 0
    assert capsys.readouterr().out == "table.md: 1 finished run\n"
    part = section(Path("table.md").read_text(), "digits")
    figure = json.loads(Path("runs/digits/naive/seed-0/results.json").read_text())["figures"]["accuracy/last"]
    cells = row(part.partition("other settings")[2], "naive")
    assert cells[1] == f"{100 * figure:.2f}"
    assert cells[4] == (
        "evaluation.task_incremental true instead of false; stream.tasks 2 instead of 5; training.epochs 1 instead of 5"
    )
    assert main(["results", "runs"]) == 0
    assert capsys.readouterr().out == Path("table.md").read_text()
    assert main(["report", "kept"]) == 0
    assert f"{100 * figure:.2f}" in capsys.readouterr().out
    assert reproduce(stored_runs([Path("kept")]))[1] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere isn't a folder"),
        (["--output", "no/such/table.md"], "a file in a folder that exists is accepted"),
        (["--replace"], "--collect"),
        (["--collect", "kept"], "no finished run to collect"),
    ],
)
def test_command_refuses(tmp_path: Path, capsys, monkeypatch, words: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["results", *words]) == 2
    assert told in capsys.readouterr().err and not any(tmp_path.iterdir())
