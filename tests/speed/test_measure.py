"""How contestants are timed, what a row holds, files of rows, memory, the command line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields

import pytest
import torch

from speed import __main__ as command_line
from speed.measure import Lap, ResultsError, Row, Settings, Timings, interleaved, make_row, peak_memory, rows_from
from speed.memory import MemoryMark, in_fresh_process
from speed.rows import read_rows, write_rows
from speed.tables import bounds_table, rows_table


# ------------------------------------------------------------------------------------------------------- timing
def test_contestants_run_in_turn_and_the_order_rotates():
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "abc"}

    interleaved(contestants, rounds=4, warmup=1)

    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[1:] == ["abc", "bca", "cab", "abc"]
    assert Counter(rounds[0]) == Counter("abc")  # to warm up


def test_warm_up_rounds_do_not_count():
    laps = iter([100.0, 1.0, 2.0])

    timings = interleaved({"a": lambda: Lap(next(laps))}, rounds=2, warmup=1)

    assert timings.seconds == {"a": [1.0, 2.0]}


def test_a_contestant_that_times_itself_is_believed_and_another_one_is_clocked():
    timings = interleaved({"own": lambda: Lap(123.0), "clocked": lambda: 123.0}, rounds=1)

    assert timings.seconds["own"] == [123.0]
    assert 0 < timings.seconds["clocked"][0] < 100


def test_the_ratio_is_the_median_of_the_ratios_within_a_round_not_the_ratio_of_the_medians():
    timings = Timings({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 8.0]})

    assert timings.ratios("a", "b") == [2.0, 3.0, 0.5]
    assert timings.ratio("a", "b") == 2.0
    assert timings.median("a") / timings.median("b") == 0.5


@pytest.mark.parametrize(("contestants", "rounds", "warmup"), [({}, 1, 1), ({"a": int}, 0, 1), ({"a": int}, 1, -1)])
def test_nothing_to_time_is_refused(contestants, rounds, warmup):
    with pytest.raises(ValueError, match="accepted: at least one contestant"):
        interleaved(contestants, rounds, warmup=warmup)


def test_after_each_is_called_after_every_run():
    seen: list[int] = []
    interleaved({"a": int, "b": int}, 2, warmup=1, after_each=lambda: seen.append(1))
    assert len(seen) == 6


# --------------------------------------------------------------------------------------------------------- rows
def some_rows(case: str = "case", **changes) -> list[Row]:
    timings = Timings({"loop": [1.0, 2.0], "ours": [2.0, 3.0]})
    settings = Settings(command="python -m speed x")
    return rows_from(timings, "bench", case, settings, to_what="loop", images=6, bounds={"ours": 1.8}, **changes)


def test_rows_have_the_figures_of_their_contestant():
    loop, ours = some_rows()

    assert (ours.seconds, ours.all_seconds, ours.images_per_second) == (2.5, [2.0, 3.0], 6 / 2.5)
    assert (ours.ratio, ours.all_ratios, ours.to_what) == (1.75, [2.0, 1.5], "loop")
    assert (ours.bound, ours.met, loop.bound, loop.met) == (1.8, True, None, None)
    assert ours.device.startswith("CPU, ") and ours.threads == torch.get_num_threads()
    assert ours.torch == torch.__version__ and ours.avalanche.startswith("0.6")
    assert ours.command == "python -m speed x" and ours.date[:2] == "20"


def test_a_bound_that_does_not_hold_is_said():
    (_, ours), text = some_rows(), ""
    text = rows_table([ours.__class__(**{**asdict(ours), "bound": 1.5})])
    assert "NOT MET" in text
    assert "bound 1.800: met" in rows_table([ours])
    assert "NOT MET" not in bounds_table([ours]) and "1.750 of 1.800" in bounds_table([ours])
    assert bounds_table([]) == "no bound was checked"


def test_a_file_of_rows_reads_back_as_it_was(tmp_path):
    rows = some_rows(details={"ours": {"deviation": 1e-7}}, memory={"loop": 12.5})
    write_rows(tmp_path / "new" / "bench.json", rows)
    assert read_rows(tmp_path / "new" / "bench.json") == rows


def test_writing_keeps_what_is_not_replaced(tmp_path):
    path = tmp_path / "bench.json"
    old, other = some_rows(), some_rows("other case")
    write_rows(path, [*old, *other])
    new = rows_from(Timings({"loop": [1.0], "ours": [9.0]}), "bench", "case", Settings(), to_what="loop")

    write_rows(path, new, keep=read_rows(path))

    assert read_rows(path) == [*other, *new]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("no json", "can't be read"),
        ('{"device": "CPU", "results": []}', "has the format None"),
        ("[1, 2]", "has the format 'list'"),
        ('{"format": 99, "rows": []}', "has the format 99"),
        ('{"format": 1, "rows": [3]}', "a row is a int"),
        ('{"format": 1, "rows": [{"benchmark": "b", "wrong": 1}]}', "unknown ['wrong']"),
    ],
)
def test_a_file_of_another_format_is_refused_with_its_name(tmp_path, content, named):
    path = tmp_path / "old.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ResultsError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and named in str(caught.value)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ResultsError, match=r"none\.json can't be read"):
        read_rows(tmp_path / "none.json")


def test_every_field_of_a_row_is_json():
    row = make_row("bench", "case", "ours", Settings(), ratio=1.0, to_what="loop")
    assert set(json.loads(json.dumps(asdict(row)))) == {f.name for f in fields(Row)}


# ------------------------------------------------------------------------------------------------------- memory
def test_the_peak_of_a_call_in_a_fresh_process_is_its_allocation(tmp_path, monkeypatch):
    module = tmp_path / "module_to_measure.py"
    module.write_text(
        "import torch\ndef allocation(mebibytes):\n    return lambda: torch.ones(mebibytes * 2**18).sum()\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if not _marks():
        pytest.skip("this system does not tell the peak of a process")

    peak = peak_memory("module_to_measure:allocation", mebibytes=64)

    assert peak is not None and 60 < peak < 90


def _marks() -> bool:
    mark = MemoryMark("cpu")
    mark.start()
    return mark.stop() is not None


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)speed\.measure:nothing failed.*AttributeError"):
        in_fresh_process("speed.measure:nothing")


# ------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def benchmarks(monkeypatch):
    """One benchmark of made-up rows; its module is never imported."""
    found = {"rows": some_rows(), "settings": []}

    class Made(command_line.Benchmark):
        def rows(self, name, settings):
            found["settings"].append(settings)
            return found["rows"]

    monkeypatch.setattr(command_line, "BENCHMARKS", {"throughput": Made("about this", "1", "a bound")})
    return found


def test_list_names_measure_time_and_bounds(capsys):
    assert command_line.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name, entry in command_line.BENCHMARKS.items():
        assert name in shown and entry.about in shown and entry.bounds in shown


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys):
    assert command_line.main(["speeed"]) == 2
    assert "no benchmark speeed; accepted: throughput, evaluation" in capsys.readouterr().err


def test_a_run_is_recorded_and_printed(benchmarks, tmp_path, capsys):
    arguments = ["throughput", "--output", str(tmp_path), "--rounds", "3", "--device", "cpu", "--precision", "bf16"]
    assert command_line.main(arguments) == 0

    assert read_rows(tmp_path / "throughput.json") == benchmarks["rows"]
    (settings,) = benchmarks["settings"]
    assert (settings.rounds, settings.precision, settings.output) == (3, "bf16", tmp_path)
    assert settings.command == "python -m speed " + " ".join(arguments)
    assert "1.750 of 1.800" in capsys.readouterr().out


def test_a_quick_run_writes_nothing(benchmarks, tmp_path):
    assert command_line.main(["--quick", "--output", str(tmp_path)]) == 0
    assert benchmarks["settings"][0].quick and benchmarks["settings"][0].output is None
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_another_format_is_refused_before_the_work(benchmarks, tmp_path, capsys):
    (tmp_path / "throughput.json").write_text("{}", encoding="utf-8")
    assert command_line.main(["throughput", "--output", str(tmp_path)]) == 2
    assert benchmarks["settings"] == [] and "move the file away" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused(benchmarks, capsys):
    assert command_line.main(["--quick", "--device", "cuda"]) == 2
    assert "accepted: cpu, or cuda with a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--threads", "-1"], ["--measured", "x.json"]])
def test_options_out_of_range_are_refused(benchmarks, arguments):
    with pytest.raises(SystemExit):
        command_line.main(arguments)


@pytest.mark.parametrize(("change", "status"), [(1.0, 0), (1.5, 1)])
def test_the_gate_decides_about_the_exit_status(benchmarks, tmp_path, change, status, capsys):
    write_rows(tmp_path / "record" / "throughput.json", some_rows())
    loop, ours = (asdict(row) for row in some_rows())
    ours |= {"ratio": 1.75 * change, "all_ratios": [1.75 * change] * 2, "benchmark": "bench"}
    benchmarks["rows"] = [Row(**loop), Row(**ours)]
    before = (tmp_path / "record" / "throughput.json").read_text(encoding="utf-8")

    assert command_line.main(["throughput", "--gate", "--recorded", str(tmp_path / "record")]) == status

    assert ("regression" in capsys.readouterr().out) == bool(status)
    assert (tmp_path / "record" / "throughput.json").read_text(encoding="utf-8") == before


def test_a_measured_file_is_compared_without_measuring(benchmarks, tmp_path, capsys):
    rows = [Row(**{**asdict(row), "benchmark": "throughput"}) for row in some_rows()]
    write_rows(tmp_path / "throughput.json", rows)
    write_rows(tmp_path / "measured.json", rows)
    arguments = ["--gate", "--measured", str(tmp_path / "measured.json"), "--recorded", str(tmp_path)]
    assert command_line.main(arguments) == 0
    assert benchmarks["settings"] == [] and "unchanged" in capsys.readouterr().out
