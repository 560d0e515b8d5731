"""Curves of growth: exponents, rows, the table and the figure."""

from __future__ import annotations

import math
from functools import cache

import pytest

from speed import curves, growth, past
from speed.measure import Row, Settings, Timings
from speed.rows import read_rows, write_rows

SETTINGS = Settings(quick=True)


@cache
def quick(group: str) -> list[Row]:
    return curves.GROUPS[group](SETTINGS)


def made(power: float = 1.0, **options) -> list[Row]:
    """A curve that grows as x to the power."""
    points = {f"{x} classes": float(x) for x in (10, 100, 1000)}
    timings = Timings({name: [2 * x**power, 4 * x**power] for name, x in points.items()})
    return growth.point_rows(timings, "a curve", points, SETTINGS, axis="classes", **options)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_exponent_is_the_slope_of_the_logarithms(power):
    x = [1.0, 3.0, 10.0, 70.0]
    assert growth.exponent(x, [5 * v**power for v in x]) == pytest.approx(power)


def test_one_point_has_no_exponent():
    assert math.isnan(growth.exponent([2.0, 2.0], [1.0, 3.0]))


def test_points_are_compared_with_the_first_and_the_last_has_the_bound():
    rows = made(bound=110.0)
    assert [row.ratio for row in rows] == [1.0, pytest.approx(10.0), pytest.approx(100.0)]
    assert [row.bound for row in rows] == [None, None, 110.0] and rows[-1].met
    assert {row.to_what for row in rows} == {"10 classes"}
    assert all(row.details["exponent"] == pytest.approx(1.0) for row in rows)
    assert not made(2.0, bound=110.0)[-1].met


@pytest.mark.parametrize("group", sorted(curves.GROUPS))
def test_a_quick_run_of_a_group_gives_complete_rows(group):
    rows = quick(group)
    assert rows
    for row in rows:
        assert row.benchmark == "curves" and row.case and row.device and row.date
        assert row.ratio is not None and row.ratio > 0 and row.details["axis"] and row.details["x"] > 0
        assert row.quantity == "bytes" or (row.seconds and len(row.all_ratios) >= 1)
    curve = [row for row in rows if "exponent" in row.details]
    assert curve or group in ("zaps", "dynamics")
    for case in {row.case for row in curve}:
        x = [row.details["x"] for row in curve if row.case == case]
        assert x == sorted(set(x)) and len(x) >= 2


def test_bytes_are_as_documented():
    stored = [row for row in quick("statistics") if row.quantity == "bytes"]
    assert len(stored) == 8 and all(row.ratio == 1.0 and row.met for row in stored)


def test_steps_cover_every_method_with_both_curves():
    wanted = {"Naive", "SLCA", "SLCA++", "LP-FT", "LoRAC-IPC", "CILA", "Co2L"}
    assert wanted <= set(past.METHODS)
    cases = {row.case.split(", a step against ")[1].split(" of")[0].split(",")[0] for row in quick("past")}
    assert cases == {"past tasks", "past samples"}


@pytest.mark.parametrize("method", sorted(past.METHODS))
def test_every_method_takes_steps(method):
    sizes = [4, 2 * past.BATCH, 4]
    (seconds,) = past._run(method, sizes, [1], SETTINGS.device)
    assert seconds > 0


def test_a_group_can_be_asked_for_and_an_unknown_one_is_refused():
    rows = curves.rows(Settings(quick=True, case="pixels"))
    assert {row.details["axis"] for row in rows} == {"pixels of the edge"}
    with pytest.raises(ValueError, match="--case is 'none such'; of curves accepted: alignment"):
        curves.rows(Settings(quick=True, case="none such"))


def test_the_report_is_a_table_and_a_figure_of_the_record(tmp_path):
    rows = [*made(bound=50.0), *quick("zaps"), *[row for row in quick("statistics") if row.quantity == "bytes"]]
    write_rows(tmp_path / "curves.json", rows)

    curves.report(read_rows(tmp_path / "curves.json"), tmp_path)

    table = (tmp_path / "speed-curves.md").read_text(encoding="utf-8")
    assert "| a curve | classes | 10: 30.00 s | 1000: 3000.00 s | 100.00 | 1.00 | 50, **not met** |" in table
    assert "ms a zap" in table and "bytes" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {8, 6}
    picture = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml") and "a curve (1.00)" in picture and len(picture) < 100_000


def test_the_same_figures_give_the_same_picture(tmp_path):
    for name in ("a.svg", "b.svg"):
        curves.figure(made(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
