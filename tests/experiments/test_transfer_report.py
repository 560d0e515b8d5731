"""Tables and reports of transfers from made-up results, and one from true runs on scikit-learn's digits."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avalanche_firn.evaluation.dynamics_result import Dynamics
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.evaluation.tensorboard import read_scalars, summary_tag
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.results import find_runs
from avalanche_firn.experiments.transfer_comparison import report_transfers
from avalanche_firn.experiments.transfer_config import validate_transfer
from avalanche_firn.experiments.transfer_data import build_data
from avalanche_firn.experiments.transfer_pictures import continual_curves, effects_figure
from avalanche_firn.experiments.transfer_report import (
    TransferGroup,
    transfer_facts,
    transfer_groups,
    transfer_mismatches,
    transfer_table,
    write_transfer_report,
)
from avalanche_firn.experiments.transfer_results import COLUMNS, run_folders_of, stored_configs
from avalanche_firn.experiments.transfer_run import FIGURES, dynamics_file, run
from avalanche_firn.experiments.transfer_tables import control_pairs, transfer_tables

POINTS = [1, 3, 4]


def transfer(optimizer: str, accuracy: float) -> dict:
    """Two trials with one optimizer, all figures made from one number."""
    sweep = {"rates": [0.1, 0.01, 0.001], "accuracy": [[0.1], [0.3], [0.2]], "diverged": [[False]] * 3}
    sweep |= {"at_edge": False, "envelope": [0.3]}
    momentum = 0.9 if optimizer == "sgd" else 0.0
    figures = {tag: accuracy * factor for factor, tag in enumerate(FIGURES, 1)}
    return {
        "optimizer": {"name": optimizer, "rates": sweep["rates"], "momentum": momentum, "weight_decay": 0.0},
        "rates": {"continual": 0.01, "iid": 0.001},
        "sweeps": {"continual": sweep, "iid": dict(sweep)},
        "figures": figures,
        "logged_after": POINTS,
        "continual": {"curves": [[1.0, 0.5, accuracy], [0.8, 0.3, accuracy]], "accuracy": [accuracy, accuracy]},
        "iid": {"accuracy": [accuracy, accuracy]},
        "shocks": [{"size": 1.0, "iterations": 2}, {"size": 2.0, "iterations": 4}],
        "diverged": False,
    }


def made_up(method: str, seed: int, accuracy: float, **changes: object) -> dict:
    """Results of a run with two optimizers; Adam reaches half of what SGD does."""
    strategy = method.split("_")[0]
    return {
        "format": 1,
        "experiment": "transfer",
        "recipe": "made-up",
        "method": method,
        "strategy": strategy,
        "seed": seed,
        "config_digest": f"{method}{seed}",
        "group_digest": method,
        "data": {"source": "digits", "fingerprint": "f", "description": "5 classes to pre-train on"},
        "network": {"name": "convnet_28", "parameters": 12345},
        "protocol": {
            "task_identity_at_test": False,
            "replay": strategy == "asb",
            "zap": method.endswith("zap"),
            "rates_chosen_on": "validation",
            "trainable": "all",
            "head": "kaiming",
            "tasks": 4,
            "trials": 2,
        },
        "pretraining": {"accuracy": accuracy / 2, "loss": 1.5},
        "optimizers": {"slow": transfer("sgd", accuracy), "fast": transfer("adam", accuracy / 2)},
        "cost": {"seconds": 10.0, "pretraining_seconds": 6.0, "device": "cpu", "threads": 1},
    } | changes


RUNS = [
    *(made_up("iid", seed, value) for seed, value in enumerate((0.2, 0.3, 0.1))),
    *(made_up("iid_zap", seed, value) for seed, value in enumerate((0.6, 0.8, 0.4))),
    *(made_up("asb", seed, value) for seed, value in enumerate((0.5, 0.5, 0.5))),
]


def changed(index: int = 0, **changes: object) -> list[dict]:
    """RUNS with one of them changed at `a__b=value`."""
    runs = deepcopy(RUNS)
    for path, value in changes.items():
        *parts, last = path.split("__")
        place = runs[index]
        for part in parts:
            place = place[part]
        place[last] = value
    return runs


def config_of(method: str, **changes: object) -> dict:
    """What a run stores, as far as reports read it."""
    optimizers = [{"label": "slow", "name": "sgd"}, {"label": "fast", "name": "adam"}]
    own = {"name": method, "strategy": method.split("_")[0], "zap": method.endswith("zap"), "zap_every": 1, "epochs": 5}
    return {
        "methods": [own | changes],
        "data": {"name": "digits"},
        "network": {"name": "convnet_28"},
        "precision": "fp32",
        "dynamics": {"recovery_fraction": 0.25, "tasks": 50},
        "transfer": {"optimizers": optimizers, "trials": 2},
    }


CONFIGS = {method: config_of(method) for method in ("iid", "iid_zap", "asb")}


def on_disk(folder: Path, runs: list[dict] = RUNS) -> Path:
    """Folders as runs leave them; the first seed of each method has dynamics, `iid` a landscape too."""
    loss = np.array([[2.0, 2.5], [0.5, 3.0], [1.5, 1.0]])
    dynamics = Dynamics([0, 5, 10], loss, loss / 4, [[0, 1], [1, 2]], ((0,), (1,)), task_names=("<a>", "b"))
    grid, surface = np.linspace(-1, 1, 3), np.arange(9.0).reshape(3, 3) + 1
    landscape = Landscape(grid, grid, surface, surface / 10, np.array([[-1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    for run_ in runs:
        place = folder / run_["method"] / f"seed-{run_['seed']}"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(run_))
        (place / "config.yaml").write_text(yaml.safe_dump(config_of(run_["method"])))
        if run_["seed"] == 0:
            for optimizer in run_["optimizers"]:
                dynamics_file(place, optimizer).write_text(json.dumps(dynamics.to_dict()))
            if run_["method"] == "iid":
                landscape.save(place / "landscape-slow")
    return folder


# ------------------------------------------------------------------------ groups
def test_groups_hold_one_optimizer_each_and_the_best_comes_first() -> None:
    groups = transfer_groups(RUNS)
    labels = ["iid_zap, slow", "asb, slow", "iid_zap, fast", "asb, fast", "iid, slow", "iid, fast"]
    assert [group.label for group in groups] == labels
    assert groups[0].seeds == [0, 1, 2] and groups[0].runs[0] is RUNS[3]
    assert groups[0].values("continual/accuracy") == [0.6, 0.8, 0.4]
    assert groups[2].values("continual/accuracy") == [0.3, 0.4, 0.2]
    assert groups[0].values("pretraining/accuracy") == [0.3, 0.4, 0.2]
    assert groups[0].values("pretraining/loss") == [1.5] * 3
    assert groups[0].values("dynamics/unknown") == [None] * 3 and groups[0].interval("dynamics/unknown") is None


def test_columns_are_the_figures_that_runs_write() -> None:
    assert [tag for tag, *_ in COLUMNS] == ["pretraining/accuracy", *FIGURES]


def test_configurations_are_never_averaged_together() -> None:
    def other(recipe: str) -> list[dict]:
        return [
            made_up("iid", seed, 0.9, group_digest="another", config_digest=f"o{seed}", recipe=recipe)
            for seed in range(2)
        ]

    labels = {group.label for group in transfer_groups([*RUNS, *other("second")])}
    assert {"iid [made-up], slow", "iid [second], slow", "iid [second], fast", "asb, slow"} <= labels
    labels = {group.label for group in transfer_groups([*RUNS, *other("made-up")])}
    assert {"iid [made-up iid], slow", "iid [made-up anothe], slow"} <= labels
    with pytest.raises(ConfigError, match="given twice"):
        transfer_groups([*RUNS, RUNS[0]])
    with pytest.raises(ConfigError, match="slca: not a transfer experiment"):
        transfer_groups([*RUNS, {"method": "slca", "group_digest": "s", "seed": 0}])
    assert transfer_groups([]) == []


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(RUNS))))
def test_order_of_runs_changes_no_figure(order: list[int]) -> None:
    distinct = [made_up(run_["method"], run_["seed"], 0.01 * (7 * i + 11)) for i, run_ in enumerate(RUNS)]
    assert transfer_table(transfer_groups([distinct[i] for i in order])) == transfer_table(transfer_groups(distinct))


# ------------------------------------------------------------------------- table
def test_table_has_mean_and_student_interval() -> None:
    lines = transfer_table(transfer_groups(RUNS)).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["iid_zap", "slow"], ["asb", "slow"]]
    values = np.array([0.6, 0.8, 0.4])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    for factor, scale, digits in ((0.5, 100, 2), (1, 100, 2), (2, 100, 2), (3, 1, 2), (4, 1, 1), (5, 1, 1), (8, 1, 2)):
        cell = f"{scale * factor * values.mean():.{digits}f} ± {scale * factor * half:.{digits}f}"
        assert cell in lines[2], cell
    assert "nats" in lines[0] and len(lines) == 8
    assert "±" not in transfer_table(transfer_groups(RUNS[:1]))


@pytest.mark.parametrize(
    ("shocks", "recovery", "cell"),
    [
        ([{"size": 1.0, "iterations": None}, {"size": 1.0, "iterations": 3}], None, "1 of 6 never"),
        ([{"size": None, "iterations": None}, {"size": 1.0, "iterations": 3}], None, "-"),
        ([], None, "-"),
        ([{"size": -1.0, "iterations": 0}, {"size": -1.0, "iterations": 0}], 0.0, "0.0 ± 0.0"),
    ],
)
def test_recovery_that_is_not_defined_in_every_seed(shocks: list, recovery: float | None, cell: str) -> None:
    runs = [made_up("iid", seed, 0.2 if recovery is None else 0.0) for seed in range(3)]
    runs[1]["optimizers"]["slow"]["shocks"] = shocks
    runs[1]["optimizers"]["slow"]["figures"]["iid/recovery"] = recovery
    (group,) = [g for g in transfer_groups(runs) if g.optimizer == "slow"]
    assert group.cell(COLUMNS[4]) == cell
    if recovery is None:  # the other optimizer's figure stays
        (other,) = [g for g in transfer_groups(runs) if g.optimizer == "fast"]
        assert "±" in other.cell(COLUMNS[4])


# ------------------------------------------------------------------------- facts
def test_facts_without_cautions(tmp_path: Path) -> None:
    groups = transfer_groups(RUNS)
    text = "\n".join(transfer_facts(groups))
    assert "CAUTION" not in text and transfer_mismatches(groups) == []
    for part in (
        "digits: 5 classes to pre-train on",
        "convnet_28 (12,345 parameters)",
        "seeds 0, 1, 2, in each the mean over 2 trials",
        "mean ± 95 % interval over seeds",
        "25.00 %",  # one of four classes
        "No task identity at test time; nothing of the pre-training is replayed in the transfer",
        "chosen on validation classes",
        "at most the configured share of the shock",
        "interference what it added",
    ):
        assert part in text
    told = "\n".join(transfer_facts(groups, runs_folder=on_disk(tmp_path)))
    assert "at most 25 % of the shock" in told and "CAUTION" not in told
    assert "one seed, so no interval" in "\n".join(transfer_facts(transfer_groups(RUNS[:1])))


@pytest.mark.parametrize(
    ("change", "caution"),
    [
        ({"data__fingerprint": "g"}, "the data differ"),
        ({"network__parameters": 7}, "the networks differ"),
        ({"protocol__trainable": "head"}, "what the transfer trains (all, head)"),
        ({"protocol__head": "lstsq"}, "the classifier's start"),
        ({"protocol__tasks": 3}, "the number of classes (3, 4)"),
        ({"protocol__trials": 1}, "the number of trials"),
        (
            {"protocol__rates_chosen_on": "transfer classes (test)"},
            "(optimistic, as the released notebooks do) in iid, ",
        ),
        ({"protocol__rates_chosen_on": "transfer classes (test)"}, "the classes that rates are chosen on"),
        ({"optimizers__slow__optimizer__momentum": 0.5}, "of the optimizer slow differ"),
        ({"optimizers__fast__sweeps__iid__at_edge": True}, "the i.i.d. transfer is at an edge of its grid"),
        ({"optimizers__fast__diverged": True}, "infinite or NaN in iid, fast seed 0"),
        ({"seed": 9}, "different seeds: iid_zap [0, 1, 2]; asb [0, 1, 2]; iid [1, 2, 9]"),
    ],
)
def test_cautions(change: dict, caution: str) -> None:
    lines = transfer_facts(transfer_groups(changed(**change)))
    assert [line for line in lines if line.startswith("CAUTION") and caution in line]


def test_edges_name_only_their_rows() -> None:
    runs = changed(optimizers__fast__sweeps__iid__at_edge=True)
    (caution,) = [line for line in transfer_facts(transfer_groups(runs)) if "edge" in line]
    assert caution.endswith("outside: iid, fast.")
    for run_ in runs:
        for found in run_["optimizers"].values():
            found["sweeps"]["continual"]["at_edge"] = True
    (caution, _) = [line for line in transfer_facts(transfer_groups(runs)) if "edge" in line]
    assert "the continual transfer" in caution and caution.endswith("every row.")


def test_given_rates_are_not_called_chosen() -> None:
    runs = changed(optimizers__slow__sweeps={})
    runs[1]["optimizers"]["slow"]["sweeps"] = runs[2]["optimizers"]["slow"]["sweeps"] = {}
    text = "\n".join(transfer_facts(transfer_groups(runs)))
    assert "Rates were given in the configuration, not chosen in iid, slow." in text and "validation" in text
    for run_ in runs:
        run_["protocol"]["rates_chosen_on"] = "transfer classes (test)"
        for found in run_["optimizers"].values():
            found["sweeps"] = {}
    text = "\n".join(transfer_facts(transfer_groups(runs)))
    assert "not chosen." in text and "optimistic" not in text and "validation" not in text
    rates = {name: rows for name, _, rows in transfer_tables(transfer_groups(runs), {})}["Chosen rates"]
    assert ["iid, slow", "continual", *["0.01 (given)"] * 3] in rates


def test_settings_that_only_configurations_tell() -> None:
    groups = transfer_groups(RUNS)
    assert transfer_mismatches(groups, CONFIGS) == []
    other = CONFIGS | {"asb": CONFIGS["asb"] | {"dynamics": {"recovery_fraction": 0.5, "tasks": 10}}}
    assert transfer_mismatches(groups, other) == ["the protocols differ between runs: settings of what is probed"]


# ------------------------------------------------------------------ differences
def table(groups: list[TransferGroup], start: str, configs: dict = CONFIGS) -> tuple[list[str], dict[str, list[str]]]:
    """Heading and rows of the table whose title starts like this."""
    ((_, heads, rows),) = [found for found in transfer_tables(groups, configs) if found[0].startswith(start)]
    return heads, {row[0]: row[1:] for row in rows}


def test_zapping_against_its_control() -> None:
    heads, rows = table(transfer_groups(RUNS), "Zapping against its control, slow")
    assert heads == ["difference", "iid_zap - iid"] and rows["common seeds"] == ["3"]
    difference = np.array([0.6, 0.8, 0.4]) - np.array([0.2, 0.3, 0.1])
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / np.sqrt(3)
    assert rows["continual accuracy %"] == [f"{100 * difference.mean():.2f} ± {100 * half:.2f}, not 0"]
    assert rows["shock, nats"] == [f"{3 * difference.mean():.2f} ± {3 * half:.2f}, not 0"]
    assert list(rows) == ["common seeds", *(heading for _, heading, *_ in COLUMNS)]
    _, fast = table(transfer_groups(RUNS), "Zapping against its control, fast")
    assert fast["continual accuracy %"] == [f"{50 * difference.mean():.2f} ± {50 * half:.2f}, not 0"]


def test_differences_are_over_common_seeds_only() -> None:
    runs = [*RUNS[1:3], *RUNS[3:5]]  # iid has seeds 1, 2, iid_zap 0, 1
    _, rows = table(transfer_groups(runs), "Zapping against its control, slow")
    assert rows["common seeds"] == ["1"] and rows["continual accuracy %"] == ["50.00"]
    names = [name for name, *_ in transfer_tables(transfer_groups([RUNS[1], RUNS[3]]), CONFIGS)]
    assert not any(name.startswith("Zapping") for name in names)
    undefined = changed(1, **{"optimizers__slow__figures__iid/recovery": None})
    _, rows = table(transfer_groups(undefined), "Zapping against its control, slow")
    assert "recovery, iterations" not in rows and "shock, nats" in rows


@pytest.mark.parametrize(
    ("configs", "pairs"),
    [
        (CONFIGS, 2),
        (CONFIGS | {"iid": config_of("iid", zap_every=3)}, 2),  # means nothing without zaps
        (CONFIGS | {"iid": config_of("iid") | {"data": {"name": "omniglot"}}}, 0),
        (CONFIGS | {"iid": config_of("iid") | {"transfer": {"optimizers": [{"label": "slow", "name": "sgd"}]}}}, 0),
        ({}, 0),
    ],
)
def test_a_control_differs_in_the_zaps_alone(configs: dict, pairs: int) -> None:
    found = control_pairs(transfer_groups(RUNS), configs)
    assert len(found) == pairs
    assert all((a.method, b.method) == ("iid_zap", "iid") and a.optimizer == b.optimizer for a, b, _ in found)
    assert all(exact for *_, exact in found)


def test_the_only_two_of_a_strategy_are_a_pair_with_a_mark() -> None:
    configs = CONFIGS | {"iid": config_of("iid", epochs=6)}
    assert [exact for *_, exact in control_pairs(transfer_groups(RUNS), configs)] == [False, False]
    heads, _ = table(transfer_groups(RUNS), "Zapping against its control, slow", configs)
    assert heads == ["difference", "iid_zap - iid *"]
    third = [made_up("iid_twice", seed, 0.5, strategy="iid") for seed in (0, 1, 2)]
    configs |= {third[0]["group_digest"]: config_of("iid", epochs=9)}
    assert not control_pairs(transfer_groups([*RUNS, *third]), configs)


def test_other_optimizers_do_not_part_a_pair() -> None:
    fewer = config_of("iid")
    fewer["transfer"]["optimizers"] = fewer["transfer"]["optimizers"][:1]
    found = control_pairs(transfer_groups(RUNS), CONFIGS | {"iid": fewer})
    assert [zapping.optimizer for zapping, *_ in found] == ["slow"]


def test_optimizers_are_compared_within_methods_sgd_first() -> None:
    runs = deepcopy(RUNS)
    for run_ in runs:
        run_["optimizers"] = dict(reversed(run_["optimizers"].items()))
    heads, rows = table(transfer_groups(runs), "Optimizers, slow - fast")
    assert heads == ["difference", "iid_zap", "asb", "iid"] and rows["common seeds"] == ["3"] * 3
    assert rows["continual accuracy %"][1] == "25.00 ± 0.00, not 0" and rows["synergy, nats"][1] == "1.8 ± 0.0, not 0"
    assert "shock, nats" not in rows and "held-out accuracy %" not in rows  # the same by construction


def test_seeds_and_rates() -> None:
    runs = changed(2, optimizers__slow__sweeps__iid__at_edge=True, seed=7)
    heads, rows = table(transfer_groups(runs), "Every seed")
    assert heads == ["continual accuracy %", "optimizer", "seed 0", "seed 1", "seed 2", "seed 7"]
    assert rows["iid"] == ["fast", "10.00", "15.00", "-", "5.00"]
    found = {name: rows for name, _, rows in transfer_tables(transfer_groups(runs), {})}["Chosen rates"]
    assert ["iid, slow", "i.i.d.", "0.001", "0.001", "-", "0.001 (edge)"] in found and len(found) == 12


# ---------------------------------------------------------------------- pictures
def test_curves_are_means_over_trials() -> None:
    ((points, curves),) = continual_curves(transfer_groups(RUNS))
    assert points == tuple(POINTS) and len(curves) == 6
    np.testing.assert_allclose(curves["iid, slow"], [[0.9, 0.4, 0.2], [0.9, 0.4, 0.3], [0.9, 0.4, 0.1]])
    mixed = changed(optimizers__slow__logged_after=[1, 2, 4])  # one seed differs from the other two
    ((_, curves),) = continual_curves(transfer_groups(mixed))
    assert "iid, slow" not in curves and len(curves) == 5


def test_bars_of_interference_and_synergy() -> None:
    figure = effects_figure(transfer_groups(RUNS))
    assert figure is not None
    blue, red = (container for container in figure.axes[0].containers if hasattr(container, "patches"))
    assert blue[0].get_width() == pytest.approx(-7 * 0.6) and red[0].get_width() == pytest.approx(6 * 0.6)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "iid_zap, slow"
    assert effects_figure(transfer_groups(RUNS[:1])) is not None  # no intervals to draw
    nothing = changed(**{"optimizers__slow__figures__dynamics/synergy": None})
    assert effects_figure([g for g in transfer_groups(nothing) if g.label == "iid, slow"]) is None


# ------------------------------------------------------------------------- files
def test_files(tmp_path: Path) -> None:
    runs = on_disk(tmp_path / "runs")
    hostile = "<script>alert(1)</script>|x"
    groups = transfer_groups([r | ({"method": hostile} if r["method"] == "asb" else {}) for r in find_runs([runs])])
    out = tmp_path / "out"
    write_transfer_report(out, groups, title='a "title" <b>', runs_folder=runs)
    html = (out / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "<b>" not in html
    assert "://" not in html
    pictures = sorted(path.name for path in out.glob("*.svg"))
    assert len(pictures) == html.count("<svg ") == 3 + 3 * 6 + 1
    assert {"ranking.svg", "continual-accuracy.svg", "effects.svg", "landscape-iid--slow.svg"} <= set(pictures)
    assert "iid_zap, slow reached the highest accuracy of the continual transfer, 60.00 ±" in html.replace(
        "&nbsp;", " "
    )
    markdown = (out / "report.md").read_text()
    assert "\\|x" in markdown and "## Zapping against its control, slow" in markdown
    assert all(f"({name})" in markdown for name in pictures)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 18 and rows[0]["method"] == "iid_zap" and rows[0]["optimizer"] == "slow"
    assert float(rows[1]["continual/accuracy"]) == 0.8 and float(rows[1]["pretraining/loss"]) == 1.5
    assert (rows[0]["rate_continual"], rows[0]["rate_iid"], rows[0]["momentum"]) == ("0.01", "0.001", "0.9")
    assert rows[0]["trials_never_recovered"] == "0" and rows[0]["zap"] == "True"
    for _ in range(2):  # the second report replaces the first one's events
        write_transfer_report(out, groups[:1], title="again", runs_folder=[tmp_path / "nowhere", runs])
    assert sum(path.stat().st_size > 0 for path in out.glob("*tfevents*")) == 1
    points = read_scalars(out / "iid_zap, slow")[summary_tag("continual/accuracy")]
    assert [step for step, _ in points] == POINTS and points[-1][1] == pytest.approx(0.6)


def test_runs_that_are_not_there_cost_figures_only(tmp_path: Path) -> None:
    groups = transfer_groups(RUNS)
    write_transfer_report(tmp_path / "out", groups, title="x", runs_folder=tmp_path)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.svg"))
    assert names == ["continual-accuracy.svg", "effects.svg", "ranking.svg"]
    assert "Zapping" not in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match="groups"):
        write_transfer_report(tmp_path / "none", [], title="x", runs_folder=tmp_path)
    assert not (tmp_path / "none").exists()


def test_unfinished_runs_stand_apart_and_alone_are_no_error(tmp_path: Path) -> None:
    runs = on_disk(tmp_path / "runs")
    waiting = runs / "asb" / "seed-9"
    waiting.mkdir()
    config = config_of("asb") | {"experiment": "transfer", "seeds": [9]}
    (waiting / "config.yaml").write_text(yaml.safe_dump(config))
    (waiting / "environment.json").write_text("{}")
    text = report_transfers([runs], tmp_path / "out")
    assert "Unfinished runs" in text and "seeds 0, 1, 2" in text
    assert "running or interrupted" in (tmp_path / "out" / "report.md").read_text()
    alone = report_transfers([waiting], tmp_path / "none")
    assert alone.startswith("No run is finished yet.") and "asb" in alone and not (tmp_path / "none").exists()
    assert "running or interrupted" in report_transfers([runs / "iid", waiting])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no finished run"):
        report_transfers([tmp_path / "empty"])


def test_many_rows_get_a_picture_per_optimizer(tmp_path: Path) -> None:
    more = [made_up("untrained", 0, 0.1, group_digest="u", config_digest="u0")]
    write_transfer_report(tmp_path, transfer_groups([*RUNS, *more]), title="x", runs_folder=tmp_path)
    names = {path.name for path in tmp_path.glob("continual*.svg")}
    assert names == {"continual-accuracy.svg", "continual-accuracy-fast.svg", "continual-accuracy-slow.svg"}
    events = next(tmp_path.glob("*tfevents*"))
    assert events.stat().st_size > 0


def test_groups_with_other_points_get_their_own_axis(tmp_path: Path) -> None:
    runs = deepcopy(RUNS)
    for run_ in runs[:3]:
        for found in run_["optimizers"].values():
            found["logged_after"] = [1, 2, 4]
    write_transfer_report(tmp_path, transfer_groups(runs), title="x", runs_folder=tmp_path)
    assert (tmp_path / "continual-accuracy-2.svg").is_file()
    second = read_scalars(tmp_path / "iid, slow")[summary_tag("continual/accuracy/2")]
    assert [step for step, _ in second] == [1, 2, 4]
    assert [step for step, _ in read_scalars(tmp_path / "asb, slow")[summary_tag("continual/accuracy")]] == POINTS


@pytest.mark.parametrize("file", ["dynamics-slow.json", "landscape-slow.npz", "config.yaml"])
def test_damaged_files_are_named(tmp_path: Path, file: str) -> None:
    runs = on_disk(tmp_path / "runs", RUNS[:1])
    (runs / "iid" / "seed-0" / file).write_text("{ [")
    with pytest.raises(ConfigError, match=file.split(".")[0]):
        write_transfer_report(tmp_path / "out", transfer_groups(RUNS[:1]), title="x", runs_folder=runs)


def test_places_and_configurations(tmp_path: Path) -> None:
    groups = transfer_groups(RUNS)
    places = run_folders_of(groups[:1], on_disk(tmp_path))
    assert places == {f"iid_zap{seed}": tmp_path / "iid_zap" / f"seed-{seed}" for seed in range(3)}
    (tmp_path / "iid_zap" / "seed-0" / "config.yaml").unlink()  # another seed tells the same
    assert stored_configs(groups, places) == {"iid_zap": CONFIGS["iid_zap"]}


# -------------------------------------------------------------------- true runs
def test_report_of_true_runs(tmp_path: Path) -> None:
    """What runs write today is what reports read."""
    sgd = {"label": "sgd", "name": "sgd", "rates": [0.01, 0.001]}
    config = validate_transfer(
        {
            "experiment": "transfer",
            "name": "tiny",
            "seeds": [0],
            "device": "cpu",
            "network": {"arguments": {"width": 4}},
            "data": {
                "name": "digits",
                "pretrain": [0, 1, 2],
                "pretrain_images": 8,
                "held_out_images": 4,
                "train_images": 4,
                "test_images": 4,
            },
            "methods": [
                {"name": "zap", "strategy": "iid", "zap": True, "epochs": 2, "batch_size": 12},
                {"name": "plain", "strategy": "iid", "zap": False, "epochs": 2, "batch_size": 12},
            ],
            "transfer": {"optimizers": [sgd], "trials": 1, "log_every": 1, "iid_epochs": 1, "iid_batch_size": 6},
            "landscape": {"points": 3, "snapshots": 3},
        }
    )
    data = build_data(config.data)
    for method in ("zap", "plain"):
        run(config.single(method, 0), tmp_path / method / "seed-0", data, quiet=True)
    groups = transfer_groups(find_runs([tmp_path]))
    facts = transfer_facts(groups, runs_folder=tmp_path)
    assert "at most 50 % of the shock" in "\n".join(facts) and "at an edge" in "\n".join(facts)
    assert not [line for line in facts if "differ" in line]
    write_transfer_report(tmp_path / "summary", groups, title="tiny", runs_folder=tmp_path)
    markdown = (tmp_path / "summary" / "report.md").read_text()
    assert "| difference | zap - plain |" in markdown and "Optimizers" not in markdown
    names = {path.name for path in (tmp_path / "summary").glob("*.svg")}
    assert {"dynamics-zap--sgd-block-effect.svg", "landscape-plain--sgd.svg"} <= names and len(names) == 11
