"""Verdicts of the regression gate, and the records of the older scripts read as rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from speed.gate import compare, device_kind, failed, recorded_rows, spread, table
from speed.rows import RESULTS, ResultsError, Row, write_rows
from speed.scripts import SCRIPTS, read_record, rows_of_record


def row(ratio: float | None = 1.0, rounds: tuple[float, ...] = (), **changes: Any) -> Row:
    fields: dict[str, Any] = {
        **dict(benchmark="bench", case="case", contestant="ours", to_what="loop", device="CPU, one", threads=2),
        **dict(precision="fp32", torch="2", timm="1", avalanche="0.6", python="3"),
        **dict(seconds=1.0, ratio=ratio, all_ratios=list(rounds)),
    }
    return Row(**fields | changes)


def verdict(measured: Row, *recorded: Row, **options: Any) -> str:
    (found,) = compare([measured], recorded, **options)
    return found.verdict


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.09, "unchanged"), (1.11, "regression"), (0.91, "unchanged"), (0.85, "better")]
)
def test_the_tolerance_is_a_part_of_the_recorded_ratio(ratio, expected):
    assert verdict(row(ratio), row(1.0)) == expected
    assert verdict(row(3 * ratio), row(3.0)) == expected


def test_another_tolerance():
    assert verdict(row(1.11), row(1.0), tolerance=0.2) == "unchanged"
    assert verdict(row(1.11), row(1.0), tolerance=0.0) == "regression"
    with pytest.raises(ValueError, match="tolerance is -1"):
        compare([], [], tolerance=-1)


WIDE, NARROW = (0.8, 0.9, 1.2, 1.5, 1.6), (1.19, 1.2, 1.2, 1.2, 1.21)


def test_worse_within_the_scatter_of_either_side_is_noise():
    assert spread(row(1.2, WIDE)) == pytest.approx(0.6)
    assert verdict(row(1.2, WIDE), row(1.0)) == "noise"
    assert verdict(row(1.2, NARROW), row(1.0, tuple(r - 0.2 for r in WIDE))) == "noise"
    assert verdict(row(1.2, NARROW), row(1.0, tuple(r - 0.2 for r in NARROW))) == "regression"


def test_fewer_than_two_rounds_have_no_scatter():
    assert spread(row(1.0, (1.0,))) == spread(row()) == 0


def test_seconds_are_never_compared():
    assert verdict(row(1.0, seconds=100.0), row(1.0, seconds=1.0)) == "unchanged"


@pytest.mark.parametrize(
    "change",
    [
        {"device": "GPU, one"},
        {"threads": 1},
        {"precision": "bf16"},
        {"case": "another"},
        {"contestant": "theirs"},
        {"to_what": "something else"},
        {"quantity": "memory"},
        {"benchmark": "other"},
    ],
)
def test_what_has_no_record_of_its_kind_is_new(change):
    found = compare([row(5.0, **change)], [row(1.0)])
    assert [one.verdict for one in found] == ["new"] and not failed(found)


def test_another_processor_is_the_same_kind_but_the_very_same_one_counts_first():
    mine, other = row(2.0, device="CPU, mine"), row(1.0, device="CPU, other")
    assert verdict(row(2.0, device="CPU, mine"), mine, other) == "unchanged"
    assert verdict(row(2.0, device="CPU, third"), mine, other) == "regression"
    gpus = {device_kind(row(device=f"GPU, {name}", threads=n)) for name, n in (("a", 2), ("b", 16))}
    assert gpus == {"GPU"} and device_kind(mine) == "CPU, 2 threads"


def test_references_and_rows_without_a_ratio_are_left_out():
    assert compare([row(1.0, contestant="loop"), row(None)], [row(1.0)]) == []


def test_the_table_begins_with_the_regression():
    found = compare([row(1.0), row(2.0, case="worse"), row(1.0, case="unknown")], [row(1.0), row(1.0, case="worse")])
    lines = table(found).splitlines()
    assert lines[1].startswith("regression") and "+100.0%" in lines[1] and "worse" in lines[1]
    assert lines[2].startswith("new") and failed(found)
    assert table([]).endswith("nothing to compare")


# -------------------------------------------------------------------------------------------------- the record
def test_rows_are_read_by_benchmark_and_missing_files_are_nothing(tmp_path):
    write_rows(tmp_path / "throughput.json", [row(1.0)])
    assert recorded_rows(tmp_path, ["throughput", "evaluation", "alignment"]) == [row(1.0)]


def test_a_record_of_another_format_is_an_error_with_the_file(tmp_path):
    (tmp_path / "throughput.json").write_text('{"results": []}', encoding="utf-8")
    with pytest.raises(ResultsError, match=r"throughput\.json has the format None"):
        recorded_rows(tmp_path, ["throughput"])
    (tmp_path / "alignment.json").write_text('{"results": []}', encoding="utf-8")
    with pytest.raises(ResultsError, match=r"alignment\.json: the record of alignment has another form"):
        recorded_rows(tmp_path, ["alignment"])


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_the_recorded_figures_of_the_scripts_are_rows(name):
    rows = read_record(name, RESULTS / f"{name}.json")
    assert rows and all(r.ratio and r.ratio > 0 and r.device and r.threads >= 1 for r in rows)
    assert len({(r.case, r.contestant, r.to_what, r.quantity, r.threads) for r in rows}) == len(rows)
    assert not failed(compare(rows, rows))


def test_ratios_of_a_script_are_those_of_its_record():
    report = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    rows = [r for r in rows_of_record("alignment", report) if r.contestant == "ours" and r.to_what == "floor"]
    assert [r.ratio for r in rows] == [result["over_floor"] for result in report["results"]]
    probe = json.loads((RESULTS / "linear_probe.json").read_text(encoding="utf-8"))
    cheaper = list(probe["times_cheaper"].values())
    assert [1 / r.ratio for r in rows_of_record("linear_probe", probe) if r.ratio] == pytest.approx(cheaper)


@pytest.mark.parametrize("report", [None, [], {}, {"rows": 3}])
@pytest.mark.parametrize("name", ["alignment", "contrastive", "linear_probe"])
def test_another_form_of_a_record_is_refused(name, report):
    with pytest.raises(ResultsError, match=f"the record of {name} has another form"):
        rows_of_record(name, report)
