"""Tables and reports from made-up results: means, intervals, grouping, cautions, escaping."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report import facts, mismatches, text_table, write_report
from avalanche_firn.experiments.results import find_runs, group_runs, read_results, write_json, write_text


def made_up(method: str, seed: int, last: float, **changes: object) -> dict:
    """Results of a run of two tasks."""
    joint = method == "joint"
    names = ("accuracy/last", "accuracy/average", "accuracy/incremental")
    figures = dict.fromkeys(names, last) | {"forgetting/average": None if joint else 0.25}
    steps = 1 if joint else 2
    return {
        "format": 1,
        "recipe": "made-up",
        "method": method,
        "strategy": method,
        "seed": seed,
        "config_digest": f"{method}{seed}",
        "group_digest": method,
        "stream": {
            "source": "digits",
            "split": "test",
            "fingerprint": "f",
            "class_order": [0, 1],
            "task_sizes": [1, 1],
        },
        "backbone": {"tag": "vit", "weights": "pretrained", "weights_sha256": "w"},
        "protocol": {"task_identity_at_test": False, "replay": False, "joint": joint},
        "figures": figures,
        "curves": {name: [last] * steps for name in names},
        "accuracy_matrix": [[last, last]] if joint else [[1.0, None], [last, last]],
        "matrix": {},
        "diverged": False,
        "cost": {"seconds": 10.0 + seed, "device": "cpu"},
    } | changes


RUNS = [
    *(made_up("naive", seed, value) for seed, value in enumerate((0.1, 0.2, 0.3))),
    *(made_up("slca", seed, value) for seed, value in enumerate((0.9, 0.8, 0.95))),
    *(made_up("joint", seed, value) for seed, value in enumerate((0.5, 0.5, 0.5))),
]


def test_table_has_mean_and_student_interval() -> None:
    groups = group_runs(RUNS)
    lines = text_table(groups).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["joint", "slca", "naive"]  # the bound first, then by accuracy
    values = [90.0, 80.0, 95.0]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert f"{np.mean(values):.2f} ± {half:.2f}" in lines[3]
    assert "11.0 ± 2.5" in lines[3]  # seconds
    assert "(upper bound, not continual)" in lines[2]
    assert lines[2].split().count("-") == 2  # no forgetting, no incremental accuracy


def test_one_seed_has_no_interval() -> None:
    groups = group_runs([made_up("naive", 0, 0.5)])
    assert "±" not in text_table(groups)
    assert "one seed, so no interval" in facts(groups)[0]


def test_order_of_runs_does_not_matter() -> None:
    assert text_table(group_runs(RUNS)) == text_table(group_runs(RUNS[::-1]))


def test_configurations_are_never_averaged_together() -> None:
    other = [made_up("slca", seed, 0.1, group_digest="another", recipe="second") for seed in range(3)]
    labels = [group.label for group in group_runs([*RUNS, *other])]
    assert "slca [made-up]" in labels and "slca [second]" in labels
    same_recipe = [made_up("slca", seed, 0.1, group_digest="another") for seed in range(3)]
    labels = [group.label for group in group_runs([*RUNS, *same_recipe])]
    assert "slca [made-up another]"[:20] in {label[:20] for label in labels}
    with pytest.raises(ConfigError, match="given twice"):
        group_runs([*RUNS, RUNS[0]])


@pytest.mark.parametrize(
    ("change", "caution"),
    [
        ({"stream": RUNS[0]["stream"] | {"fingerprint": "g"}}, "the data differ"),
        ({"stream": RUNS[0]["stream"] | {"split": "validation"}}, "splits differ"),
        ({"stream": RUNS[0]["stream"] | {"class_order": [1, 0]}}, "class orders differ within a seed"),
        ({"backbone": RUNS[0]["backbone"] | {"tag": "resnet"}}, "backbones"),
        ({"seed": 9}, "different seeds"),
        ({"diverged": True}, "infinite or NaN in naive"),
    ],
)
def test_cautions(change: dict, caution: str) -> None:
    assert not mismatches(group_runs(RUNS))
    runs = [RUNS[0] | change, *RUNS[1:]]
    assert any(caution in line for line in facts(group_runs(runs)))


def test_files(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>|x"
    runs = [
        run | ({"recipe": "other", "group_digest": "h", "method": hostile} if run["method"] == "naive" else {})
        for run in RUNS
    ]
    write_report(tmp_path, group_runs(runs), title='a "title" <b>')
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "<b>" not in html
    assert "://" not in html
    pictures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert pictures == [
        "accuracy-average.svg",
        "accuracy-last.svg",
        "cost-seconds.svg",
        "differences.svg",
        "ranking.svg",
        "task-matrices.svg",
    ]
    assert html.count("<svg ") == len(pictures)
    markdown = (tmp_path / "report.md").read_text()
    assert "\\|x" in markdown and "## Paired differences" in markdown and "<script" not in markdown.replace("\\<", "")
    assert all(f"]({name})" in markdown for name in pictures)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 9 and rows[0]["method"] == "joint" and float(rows[3]["accuracy/last"]) == 0.9
    assert rows[0]["forgetting/average"] == ""
    write_report(tmp_path, group_runs(RUNS), title="again")
    assert sum(path.stat().st_size > 0 for path in tmp_path.glob("*tfevents*")) == 1


def test_figures_of_an_older_report_go_and_other_files_stay(tmp_path: Path) -> None:
    for name in ("matrix-slca.png", "photo.png", "drawing.svg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "report.md").write_text("# old\n\n![slca](matrix-slca.png)\n\n![no](../photo.png)\n", encoding="utf-8")
    write_report(tmp_path, group_runs(RUNS), title="x")
    assert not (tmp_path / "matrix-slca.png").exists()
    assert (tmp_path / "photo.png").exists() and (tmp_path / "drawing.svg").exists()
    write_report(tmp_path, group_runs(RUNS[:1]), title="x")  # one method: nothing to compare
    assert not (tmp_path / "differences.svg").exists() and (tmp_path / "ranking.svg").exists()


def test_the_same_report_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, group_runs(RUNS), title="x")
    for path in (tmp_path / "a").iterdir():
        if path.suffix in (".svg", ".md", ".csv"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_results_that_say_less_leave_figures_out(tmp_path: Path) -> None:
    """As runs of older versions do, and runs whose matrices don't fit together."""
    runs = [run | {"cost": {"seconds": None, "device": "cpu"}, "curves": {}} for run in RUNS[:3]]
    runs[0] |= {"accuracy_matrix": [[1.0]]}
    runs = [run | {"cost": {"seconds": 3.0, "device": "cpu"}} for run in runs]
    write_report(tmp_path, group_runs(runs), title="x")
    assert [path.name for path in tmp_path.glob("*.svg")] == ["ranking.svg"]


def test_summary_run(tmp_path: Path) -> None:
    from avalanche_firn.evaluation.tensorboard import read_scalars, summary_tag

    write_report(tmp_path, group_runs(RUNS), title="x")
    steps = read_scalars(tmp_path / "slca")[summary_tag("accuracy/last")]
    assert [step for step, _ in steps] == [0, 1]
    assert steps[0][1] == pytest.approx(np.mean([0.9, 0.8, 0.95]))


def test_report_command(tmp_path: Path, capsys) -> None:
    for run in RUNS:
        folder = tmp_path / "made-up" / run["method"] / f"seed-{run['seed']}"
        folder.mkdir(parents=True)
        write_json(folder / "results.json", run)
    (tmp_path / "made-up" / "summary").mkdir()
    assert main(["report", str(tmp_path / "made-up")]) == 0
    assert "slca" in capsys.readouterr().out
    assert (tmp_path / "made-up" / "summary" / "report.html").is_file()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "made-up" / "slca"), str(tmp_path / "made-up" / "slca" / "seed-1")]) == 0
    assert "seeds 0, 1, 2" in capsys.readouterr().out  # a run that is named twice counts once
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_reading(tmp_path: Path) -> None:
    assert read_results(tmp_path) is None
    write_text(tmp_path / "results.json", "{")
    with pytest.raises(ConfigError, match="can't be read"):
        read_results(tmp_path)
    write_json(tmp_path / "results.json", {"format": 99})
    with pytest.raises(ConfigError, match="format 1"):
        find_runs([tmp_path])
    with pytest.raises(ValueError):
        write_json(tmp_path / "results.json", {"x": float("nan")})
    assert json.loads((tmp_path / "results.json").read_text()) == {"format": 99}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
