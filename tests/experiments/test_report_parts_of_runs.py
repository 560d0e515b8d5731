"""What a report says in words, about settings, versions and commands, and about runs that aren't finished."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))
from report_pages import made_up_runs, read_page

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report import report_folders, write_report
from avalanche_firn.experiments.report_figures import curves
from avalanche_firn.experiments.report_html import html_report
from avalanche_firn.experiments.report_sections import build_report
from avalanche_firn.experiments.report_tables import mismatches
from avalanche_firn.experiments.report_text import markdown_report
from avalanche_firn.experiments.report_unfinished import unfinished_curves, unfinished_table
from avalanche_firn.experiments.report_words import paired, result_lines
from avalanche_firn.experiments.results import Group, group_runs
from avalanche_firn.experiments.unfinished import UnfinishedRun


def groups_of(**last: list[float]) -> list[Group]:
    """Groups with these last accuracies by seed; `joint` is the upper bound."""
    runs = []
    for method, values in last.items():
        for seed, value in enumerate(values):
            run = dict(made_up_runs(None, 1, 1)[0]) | {"method": method, "seed": seed, "group_digest": method}
            run["figures"] = run["figures"] | {"accuracy/last": value}
            runs.append(run | {"protocol": run["protocol"] | {"joint": method == "joint"}})
    return group_runs(runs)


# ------------------------------------------------------------------------- words
def test_a_shown_lead_is_told_with_its_interval() -> None:
    (line,) = result_lines(groups_of(a=[0.9, 0.91, 0.92], b=[0.5, 0.51, 0.53], joint=[0.95] * 3), [])
    assert line.startswith("a reached the highest last accuracy of 2 continual methods, 91.00 ± 2.48 %")
    assert "39.67 percent points above b, the next (95 % interval of the paired difference 38.23 to 41.10)" in line
    assert line.endswith("(upper bound, not continual): joint 95.00 ± 0.00 %.")


def test_no_lead_is_claimed_where_the_interval_includes_zero() -> None:
    (line,) = result_lines(groups_of(a=[0.9, 0.7, 0.95], b=[0.8, 0.85, 0.8], c=[0.1, 0.11, 0.12]), [])
    assert "no difference shown" in line and "its intervals against c exclude zero" in line
    (line,) = result_lines(groups_of(a=[0.9, 0.7], b=[0.8, 0.75]), [])
    assert "no difference shown" in line and "exclude" not in line
    (line,) = result_lines(groups_of(a=[0.9, 0.92, 0.91], b=[0.5, 0.51, 0.5], c=[0.3, 0.9, 0.1]), [])
    assert "above b, the next (95 %" in line and line.endswith("not shown against c.")


def test_one_seed_shows_nothing() -> None:
    (line,) = result_lines(groups_of(a=[0.9], b=[0.1]), [])
    assert "one seed, so no interval" in line and "with one seed no difference is shown" in line
    report = build_report(Path("x"), groups_of(a=[0.9], b=[0.1]), title="t")
    assert "differences" not in {picture.name for picture in report.pictures()}


def test_rows_that_must_not_be_compared_are_not_ranked() -> None:
    (line,) = result_lines(groups_of(a=[0.9], b=[0.1]), ["the data differ between runs"])
    assert line == "These rows must not be ranked: the data differ between runs."
    assert result_lines(groups_of(joint=[0.9]), []) == []


def test_cautions_stand_out_and_are_not_repeated(tmp_path: Path) -> None:
    runs = made_up_runs(None, 1)
    runs[0]["diverged"] = True
    report = build_report(tmp_path, group_runs(runs), title="t")
    assert report.cautions == ["weights became infinite or NaN in method_0 seed 0"]
    html = html_report(report)
    assert html.count("infinite or NaN in method_0 seed 0") == 1 and '<p class="caution" role="note">' in html
    assert "> **CAUTION:** weights became infinite" in markdown_report(report)


# ---------------------------------------------------------------------- settings
def test_settings_versions_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "my runs"
    groups = group_runs(made_up_runs(top))
    (top / "method_2" / "seed-0" / "config.yaml").write_text(
        yaml.safe_dump({"training": {"epochs": 9}, "methods": [{"name": "method_2", "strategy": "s"}]}),
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    page = read_page(html_report(build_report(top / "summary", groups, title="t")))
    rows = {row[0]: row[1:] for row in page.tables["What differs between the methods"]}
    assert rows["setting"] == ["method_0", "method_1", "method_2"]
    assert rows["training.epochs"] == ["5", "5", "9"] and rows["method.strategy"] == ["method_0", "method_1", "s"]
    assert rows["training.optimizer.lr"] == ["0.1", "0.1", "-"]
    assert page.tables["What only method_1 has (1 settings)"] == [["setting", "value"], ["method.lora.rank", "4"]]
    versions = dict(page.tables["What the runs ran on"])
    assert versions["python"] == "3.11.1" and versions["torch"] == "2.0 (3 of 6 runs), 2.1 (3 of 6 runs)"
    for command in (
        "firn compare 'my runs/config.yaml' --output again",
        "firn run 'my runs/config.yaml' method=method_0 seed=0 --output again",
        "firn report 'my runs'",
    ):
        assert command in page.text
    assert "firn resume" not in page.text


def test_results_that_lie_nowhere_have_no_settings(tmp_path: Path) -> None:
    page = read_page(html_report(build_report(tmp_path, group_runs(made_up_runs(None, 2)), title="t")))
    assert not {"What differs between the methods", "What the runs ran on"} & set(page.tables)
    assert "How to repeat it" not in page.text and "Likeness of the features" not in page.text


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_damaged_files_are_named_before_anything_is_written(tmp_path: Path, name: str) -> None:
    groups = group_runs(made_up_runs(tmp_path / "runs"))
    (tmp_path / "runs" / "method_0" / "seed-0" / name).write_text("{ [", encoding="utf-8")
    with pytest.raises(ConfigError, match=name):
        write_report(tmp_path / "out", groups, title="t")
    assert not (tmp_path / "out").exists()


def test_drift_that_was_measured_after_one_task_only_is_a_point(tmp_path: Path) -> None:
    groups = group_runs(made_up_runs(tmp_path, 1, 1))
    assert curves(groups, "drift/cka")["method_0"].tolist() == [[0.9, 0.8, 0.7]]
    lines = "step,tag,value\n0,validation/drift/cka,0.5\nhalf a li"
    (tmp_path / "method_0" / "seed-0" / "metrics.csv").write_text(lines, encoding="utf-8")
    (row,) = curves(groups, "drift/cka")["method_0"]
    assert row[0] == 0.5 and len(row) == 3 and all(row[1:] != row[1:])


# -------------------------------------------------------------------- unfinished
def unfinished(folder: Path, label: str, seed: int, *last: float) -> UnfinishedRun:
    curves: dict[str, list[float | None]] = {"accuracy/last": [*last]}
    return UnfinishedRun(label, label, seed, folder / label / f"seed-{seed}", "", len(last), 3, curves, 1e9)


def test_unfinished_runs_stand_apart(tmp_path: Path) -> None:
    groups = group_runs(made_up_runs(None))
    going = [unfinished(tmp_path, "method_0", 7, 0.11), unfinished(tmp_path, "<new>", 0, 0.99, 0.98)]
    page = read_page(html_report(build_report(tmp_path, groups, title="t", unfinished=going)))
    head, *rows = page.tables["Unfinished runs"]
    assert head[:4] == ["method", "seed", "tasks done", "last accuracy so far %"]
    assert [row[:4] for row in rows] == [["method_0", "7", "1 of 3", "11.00"], ["<new>", "0", "2 of 3", "98.00"]]
    assert page.tables["Results"][1][1] == "90.50 ± 6.35" and len(page.tables["Results"]) == 4
    assert "<new> (unfinished) 99.00 % to 98.00 %" in page.text
    assert "method_0 (unfinished)" not in page.text  # its finished runs are drawn
    assert "firn resume" in page.text


def test_curves_of_unfinished_runs_are_never_levels(tmp_path: Path) -> None:
    going = [unfinished(tmp_path, "a", 0, 0.5), unfinished(tmp_path, "a", 1, 0.4, 0.3)]
    (rows,) = unfinished_curves(going, "accuracy/last").values()
    assert rows.shape == (2, 3) and rows[1, 1] == 0.3 and (rows[:, 2] != rows[:, 2]).all()
    assert unfinished_curves(going, "accuracy/last", ["a"]) == unfinished_curves(going, "other") == {}
    unknown = UnfinishedRun("b", "b", 0, tmp_path, "", 0, None)
    assert unfinished_table([unknown])[2] == [["b", "0", "0 of ?", "-", "-", unknown.state]]


def test_folder_with_unfinished_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    made_up_runs(runs, 2, 1)
    for place in runs.glob("*/seed-0"):
        (place / "results.json").unlink()
        text = "step,tag,value\n0,accuracy/last,0.75\n"
        (place / "metrics.csv").write_text(text, encoding="utf-8")
    printed = report_folders([runs], tmp_path / "out")
    assert "No run is finished yet." in printed and "method_1" in printed and "75.00" in printed
    page = read_page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "No run is finished yet." in page.text and len(page.tables["Unfinished runs"]) == 3
    assert "method_0 (unfinished) 75.00 %" in page.text
    finished = tmp_path / "finished"
    made_up_runs(finished, 1, 1)
    both = report_folders([runs, finished])
    assert "90.00" in both and "Unfinished runs" in both and "No run" not in both
    with pytest.raises(ConfigError, match="isn't a folder"):
        report_folders([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no finished run"):
        report_folders([tmp_path / "empty", finished])
    assert main(["report", str(finished)]) == 0
    assert "Unfinished" not in capsys.readouterr().out


# ---------------------------------------------------------------- what may mislead
def test_runs_of_other_data_are_not_paired(tmp_path: Path) -> None:
    """Selections that mix experiments: no difference between methods is told across their streams."""
    runs = made_up_runs(None, 3, 2, whole=True)
    for run in runs:
        if run["method"] == "method_2":
            run["stream"] = run["stream"] | {"fingerprint": "other"}
    groups = group_runs(runs)
    assert [pair.other for pair in paired(groups)] == ["method_1"]
    page = read_page(html_report(build_report(tmp_path, groups, title="t")))
    (probes,) = (rows for title, rows in page.tables.items() if title.startswith("Paired differences of repr"))
    assert [row[0] for row in probes[1:]] == ["method_0 - method_1"]
    assert "against those 1 of 2 others that ran on the same seeds" in page.text and "must not be ranked" in page.text


def test_other_numbers_of_tasks_are_a_mismatch() -> None:
    runs = made_up_runs(None, 2, 2)
    for run in runs:
        run["stream"] = run["stream"] | {"task_sizes": [2, 2, 2] if run["method"] == "method_0" else [6]}
    assert mismatches(group_runs(runs)) == ["the tasks differ within a seed: 1 or 3 of them"]
    assert paired(group_runs(runs)) == []
    for run in runs:
        run["stream"]["task_sizes"] = [2, 2, 2] if run["seed"] else [1, 2, 3]
    assert mismatches(group_runs(runs)) == [] and len(paired(group_runs(runs))) == 1


def test_replay_and_votes_of_the_best_are_told() -> None:
    for key, words in (("replay", "keeps samples of the past"), ("batchwise_vote", "lets test batches vote")):
        groups = groups_of(a=[0.9, 0.91], b=[0.5, 0.52], joint=[0.95] * 2)
        next(g for g in groups if g.label == "a").runs[0]["protocol"][key] = True
        (line,) = result_lines(groups, [])
        assert words in line and "the best of those that don't is b, 51.00 ± 12.71 %." in line
    assert "those that don't" not in result_lines(groups_of(a=[0.9], b=[0.5]), [])[0]


def test_peak_memory_of_a_process_is_told_where_it_is_drawn(tmp_path: Path) -> None:
    runs = made_up_runs(None, 2)
    page = html_report(build_report(tmp_path, group_runs(runs), title="t"))
    assert page.count("that of the whole process so far") >= 2  # below the picture's caption and the table
    for run in runs:
        run["cost"] = run["cost"] | {"device": "cuda:0"}
    assert "whole process" not in html_report(build_report(tmp_path, group_runs(runs), title="t"))


def test_drift_of_diverged_runs_and_half_lines_draws_a_gap(tmp_path: Path) -> None:
    groups = group_runs(made_up_runs(tmp_path, 1, 1))
    lines = "step,tag,value\n0,drift/weights,0.5\n1,drift/weights,inf\n2,drift/weights,nan\n2,drift/weights,0.1"
    (tmp_path / "method_0" / "seed-0" / "metrics.csv").write_text(lines, encoding="utf-8")
    (row,) = curves(groups, "drift/weights")["method_0"]
    assert row[0] == 0.5 and all(row[1:] != row[1:])
    going = [unfinished(tmp_path, "a", 0, 0.5, float("inf"))]
    page = read_page(html_report(build_report(tmp_path, groups, title="t", unfinished=going)))
    assert "a (unfinished) 50.00 %" in page.text


def test_unfinished_runs_of_two_configurations_are_two_curves(tmp_path: Path) -> None:
    one, other = (
        dataclasses.replace(unfinished(tmp_path, "a", 0, v), group_digest=d) for v, d in ((0.5, "x1"), (1.0, "y2"))
    )
    found = unfinished_curves([one, other], "accuracy/last")
    assert {label: rows[0, 0] for label, rows in found.items()} == {
        "a [x1] (unfinished)": 0.5,
        "a [y2] (unfinished)": 1.0,
    }
    build_report(tmp_path, [], title="t", unfinished=[one, other])


def test_confusions_with_and_without_the_column_of_no_task_are_averaged(tmp_path: Path) -> None:
    runs = made_up_runs(None, 1, 2, whole=True)
    runs[0]["task_confusion"] = {"counts": [[*row, 10] for row in runs[0]["task_confusion"]["counts"]]}
    (picture,) = (p for p in build_report(tmp_path, group_runs(runs), title="t").pictures() if "confusion" in p.name)
    assert picture.alternative.endswith("60 %, 60 %, 60 %") and "mean over seeds" in picture.caption  # 8/20 and 8/10


def test_zero_is_explained_too(tmp_path: Path) -> None:
    runs = made_up_runs(None, 1, 1)
    runs[0]["figures"] = runs[0]["figures"] | {"transfer/backward": 0.0}
    page = read_page(html_report(build_report(tmp_path, group_runs(runs), title="t")))
    assert "transfer/backward" in page.text


def test_names_from_elsewhere_break_nothing(tmp_path: Path) -> None:
    """Results are plain files: their names may be of any kind."""
    runs = made_up_runs(None, 2, 1, whole=True)
    for run, name in zip(runs, ("a\x07" + 240 * "m", "\\<img src=x> ![p](https://example.org/x.png)"), strict=True):
        run["method"] = name
    (tmp_path / "mine.png").write_bytes(b"x")
    (tmp_path / "report.md").write_text("text [mine](mine.png)\n", encoding="utf-8")
    write_report(tmp_path, group_runs(runs), title="t")
    assert (tmp_path / "mine.png").exists()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "](https" not in text and not re.search(r"(?<!\\)(\\\\)*<img", text)
    for file in tmp_path.glob("*.svg"):
        ElementTree.parse(file)


# ------------------------------------------------------------------------- many
def test_a_hundred_runs_fit_a_page(tmp_path: Path) -> None:
    """Twenty methods, five seeds, twenty tasks, confusions and probes: under 5 MB, every label there."""
    runs = made_up_runs(None, 20, 5, 20, whole=True)
    for run in runs:
        run["dynamics"] = run["lora"] = None
    html = html_report(build_report(tmp_path, group_runs(runs), title="many"))
    assert len(html.encode()) < 5e6
    page = read_page(html)
    assert len(page.tables["Results"]) == 21
    assert len([tag for tag, _ in page.tags if tag == "svg"]) < 50
    assert all(f"method_{i} " in page.text for i in range(20))
