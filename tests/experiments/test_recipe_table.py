"""What recipes say about themselves: the schema of benchmark, cost and figures of others, and ``firn recipes ls``."""

from __future__ import annotations

from pathlib import Path

import pytest

from avalanche_firn.experiments.about_sections import FIGURES, TRANSFER_FIGURES, target_problems
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, list_recipes, load_experiment, load_recipe, parse
from avalanche_firn.experiments.recipe_table import (
    JOINT,
    PAPERS,
    VOTE,
    best_target,
    cost_text,
    declared,
    hours_text,
    recipes_by_paper,
    recipes_text,
)
from avalanche_firn.experiments.transfer_config import TransferExperiment

NAMES = [recipe.name for recipe in list_recipes()]
TARGET = "{method: slca, figure: accuracy/last, value: 90, standing: code, source: here}"


def with_targets(*targets: str, recipe: str = "digits") -> Config | TransferExperiment:
    return load_experiment(recipe, [f"targets=[{', '.join(targets)}]"])


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_say_what_they_are(name: str) -> None:
    config = load_experiment(name)
    assert config.benchmark and "\n" not in config.benchmark and len(config.benchmark) <= 60
    assert not target_problems(config)
    if name.startswith(tuple(start for _, starts in PAPERS for start in starts)):
        assert config.cost is not None
    assert all(0 <= target.value <= 100 and (target.spread or 0) < 5 for target in config.targets)


def test_published_figures_stand_where_they_belong() -> None:
    """Spot checks against the tables that they were taken from."""
    known = {(n, t.label, t.figure): t.text() for n in NAMES for t in load_experiment(n).targets}
    for row, text in {
        ("slca_plus_plus_cifar100", "slca", "accuracy/last"): "91.53 ± 0.28",
        ("slca_plus_plus_cub200", "slca_plus_plus", "accuracy/incremental"): "91.63 ± 0.72",
        ("slca_plus_plus_cars196", "joint", "accuracy/last"): "80.31 ± 0.13",
        ("lorac_ipc_cifar100", "lorac_ipc", "accuracy/average"): "92.08 ± 0.06",
        ("lorac_ipc_imagenet_r_in21k", "lorac_ipc", "forgetting/average"): "1.74 ± 0.13",
        ("lorac_ipc_cifar100_mocov3", "LoRAC-IPC", "accuracy/average"): "86.11 ± 0.20",
        ("co2l_seq_cifar10_200", "co2l", "task-il/accuracy/last"): "93.43 ± 0.78",
        ("co2l_seq_tiny_imagenet_500", "ER", "accuracy/last"): "9.99 ± 0.29",
        ("co2l_rotated_mnist_500", "co2l", "accuracy/last"): "98.65 ± 0.31",
        ("co2l_seq_cifar10_500", "cila", "accuracy/last"): "76",
    }.items():
        assert known[row] == text
    assert not any(name.startswith("lp_ft") for name, *_ in known)  # the paper's tables are not known to us


def test_vocabulary_is_that_of_the_metrics() -> None:
    from avalanche_firn.evaluation.matrix import ResultMatrix
    from avalanche_firn.evaluation.representation import _tag
    from avalanche_firn.evaluation.task_incremental import TASK_PREFIX
    from avalanche_firn.experiments.transfer_protocols import FIGURES as OF_TRANSFERS

    matrix = ResultMatrix()
    matrix.record(0, 0, 1, 2)
    own = list(matrix.summary())
    probes = [f"probe/{_tag(name)}" for name in ("knn", "linear", "fine_tune", "lp_ft")]
    assert sorted(FIGURES) == sorted([*own, *(f"{TASK_PREFIX}{tag}" for tag in own), *probes])
    assert set(TRANSFER_FIGURES) <= set(OF_TRANSFERS)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "{figure: accuracy/last, value: 1, standing: code, source: x}",
            ["targets[0].name: missing, and method is null"],
        ),
        (TARGET.replace("slca", "slca, name: SLCA"), ["targets[0].name", "'SLCA' together with method slca", "one of"]),
        (TARGET.replace("accuracy/last", "accuracy/lats"), ["targets[0].figure", "did you mean accuracy/last?"]),
        (TARGET.replace("90", "190"), ["targets[0].value", "at most 100"]),
        (TARGET.replace("90", "90, spread: 1"), ["targets[0].spread_of: missing, and spread is 1"]),
        (TARGET.replace("90", "90, spread_of: ten runs"), ["targets[0].spread: missing, and spread_of is 'ten runs'"]),
        (TARGET.replace("code", "guess"), ["targets[0].standing", "one of code, abstract, secondary, measured"]),
        (TARGET.replace(", source: here", ""), ["targets[0].source: missing"]),
        (f"{TARGET}, {TARGET}", ["targets: accuracy/last of slca: given twice", "every figure of a row once"]),
    ],
)
def test_wrong_figures_are_refused(target: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        with_targets(target)
    assert all(word in str(raised.value) for word in words), raised.value


def test_wrong_costs_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe("digits", ["cost={memory_gb: 0, hours_per_run: 1, basis: hearsay, device: a CPU}"])
    assert "cost.memory_gb" in str(raised.value) and "one of estimate, measured" in str(raised.value)


def test_figures_of_methods_that_a_recipe_lacks(tmp_path: Path, capsys) -> None:
    found = target_problems(with_targets(TARGET.replace("slca", "slac")))
    assert len(found) == 1 and str(found[0]).startswith("targets[0].method: 'slac' isn't a method of the recipe")
    assert "null together with a name" in str(found[0]) and "did you mean slca?" in str(found[0])
    foreign = with_targets(
        "{name: x, figure: accuracy/last, value: 1, standing: code, source: y}", recipe="zapping_digits"
    )
    assert "one of adam/continual/accuracy" in str(target_problems(foreign)[0])
    kept = with_targets(
        "{method: asb, figure: sgd/iid/accuracy, value: 1, standing: code, source: y}", recipe="zapping_digits"
    )
    assert not target_problems(kept)
    path = tmp_path / "mine.yaml"
    text = "name: mine\nstream: {name: digits}\nmethods: [naive, slca]\ntargets:\n  - "
    path.write_text(f"{text}{TARGET.replace('slca', 'slac')}\n")
    assert main(["check", str(path), "--no-data"]) == 2
    assert "did you mean slca?" in capsys.readouterr().err
    path.write_text(f"{text}{TARGET}\n")
    assert main(["check", str(path), "--no-data"]) == 0
    assert main(["check", str(path), "--no-data", "methods=[naive]"]) == 0  # a selection isn't a mistake
    capsys.readouterr()


@pytest.mark.parametrize("name", ["co2l_seq_cifar10_200", "zapping_omniglot"])
def test_what_is_said_is_no_part_of_a_run(name: str, tmp_path: Path) -> None:
    """A configuration stored before these fields existed is the same experiment; a run carries its method's figures."""
    config = load_experiment(name)
    label, seed = config.methods[-1].name, config.seeds[0]
    single = config.single(label, seed)
    assert all(target.method == label for target in single.targets)
    path = tmp_path / "config.yaml"
    path.write_text(dump(single))
    assert load_experiment(path) == single and not target_problems(single)
    stored = {k: v for k, v in parse(dump(single)).items() if k not in ("benchmark", "cost", "targets")}
    path.write_text(dump(stored))
    assert load_experiment(path).digest() == single.digest()
    assert load_experiment(path).digest(seeds=False) == single.digest(seeds=False)
    assert [t.method for t in config.single(config.methods[0].name, seed).targets] == [
        t.method for t in config.targets if t.method == config.methods[0].name
    ]


# --- the list
def test_list_fits_and_breaks_no_name() -> None:
    lines = recipes_text().splitlines()
    assert max(map(len, lines)) <= 160 and not any(line != line.rstrip() for line in lines)
    first = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [name for name in first if name in NAMES] == [
        c.name for recipes in recipes_by_paper().values() for c in recipes
    ]
    assert sorted(name for name in first if name in NAMES) == NAMES
    assert len(recipes_text(width=240).splitlines()) < len(lines)
    narrow = recipes_text(width=10).splitlines()
    assert [line.split()[0] for line in narrow if line.split()[:1] and line.split()[0] in NAMES and line[0] != " "]


def test_list_tells_cost_and_best_figure() -> None:
    text = recipes_text()
    row = next(line for line in text.splitlines() if line.startswith("slca_plus_plus_cifar100 "))
    assert row.split()[-5:] == ["18", "~2.8", "slca", "91.53", "(secondary)"]
    assert "vit_base_patch16_224.augreg_in21k" in row
    assert "Zapping (arXiv 2310.07996, 2507.01559)" in text.splitlines()
    digits = next(line for line in text.splitlines() if line.startswith("digits "))
    assert digits.split()[-3:] == ["1", "0.002", "-"]  # measured, so without ~; no figure of others


def test_long_list_tells_everything() -> None:
    words = " ".join(recipes_text(long=True).split())
    for name in NAMES:
        config = load_experiment(name)
        assert config.description in words and cost_text(config) in words
        for target in config.targets:
            told = f"{target.label}, {target.figure}: {target.text()} % ({target.standing}: {target.source})"
            assert told in words


def test_best_figure_is_a_continual_learners() -> None:
    best = best_target(load_recipe("lorac_ipc_cifar100_in21k"))
    assert best is not None and (best.method, best.value) == ("lorac_ipc", 90.21)  # not that of votes per batch
    joint = "{method: joint, figure: accuracy/last, value: 99, standing: code, source: x}"
    found = best_target(with_targets(joint, TARGET))
    assert found is not None and found.method == "slca"
    alone = best_target(with_targets(joint))
    assert alone is not None and alone.method == "joint"
    assert best_target(load_experiment("zapping_omniglot")) is None


def test_costs_in_words() -> None:
    config = load_recipe("lorac_ipc_domainnet")
    assert hours_text(config.cost) == "~47"
    assert cost_text(config) == "3 runs, 14 GB of memory and 47 h each on one GPU at 10 TFLOP/s (an estimate)"
    one = load_recipe("digits", ["methods=[slca]", "seeds=[0]"])
    assert cost_text(one) == "1 run, 1 GB of memory and 0.002 h each on two cores of a CPU (measured)"
    assert hours_text(None) == "-" and cost_text(load_recipe("digits", ["cost=null"])) == "cost not known"


def test_what_is_declared_of_methods() -> None:
    """Of every shipped method what its builder says about replay and joint training."""
    from avalanche_firn.experiments.methods import METHODS

    for name in NAMES:
        config = load_experiment(name)
        for method in config.methods:
            told = declared(config, method.name)
            if isinstance(config, TransferExperiment):
                assert ("replay of pre-training images, in the pre-training" in told) == ("asb" in method.strategy)
                continue
            kind = METHODS[method.strategy]
            assert ("replay" in told, JOINT in told) == (kind.replay, kind.joint), (name, method.name)
            assert (VOTE in told) == ("vote" in method.name)
    config = load_experiment("zapping_digits", ["transfer.select=test_envelope"])
    assert declared(config, "iid") == ["rates chosen on the transfer classes"]
    with pytest.raises(KeyError):
        declared(config, "naive")
