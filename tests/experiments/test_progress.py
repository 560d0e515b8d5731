"""Time left, bars on a terminal, quiet off it, reports while runs go on, what is said when a comparison breaks off."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent))
from tiny_comparison import json_lines, make_recipe

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.course import ReportBudget
from avalanche_firn.experiments.narration import TextNarrator, stopped_text
from avalanche_firn.experiments.progress import ProgressPlugin
from avalanche_firn.experiments.run_watch import RunWatch
from avalanche_firn.experiments.time_left import TimeLeft, about, span

BLOCKS = "█▏▎▍▌▋▊▉"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, a second per run."""
    return make_recipe(tmp_path_factory.mktemp("tiny"))


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ----------------------------------------------------------------------- time left
def test_no_estimate_before_anything_was_measured() -> None:
    left = TimeLeft(["naive", "slca"], Clock())
    assert left.seconds_left() is None
    left.begin("naive")
    assert left.seconds_left() is None and about(None) == ""


def test_pace_of_the_current_run_then_measured_runs() -> None:
    clock = Clock()
    left = TimeLeft(["naive", "slca", "naive"], clock)
    left.begin("naive")
    clock.now += 10
    left.pace(0.25, 10.0)
    assert left.seconds_left() == pytest.approx(30 + 40 + 40)  # slca as long as the only method that is known
    clock.now += 5
    assert left.seconds_left() == pytest.approx(25 + 40 + 40)
    clock.now += 35
    left.finish()  # 50 s, longer than its pace had said
    assert left.seconds_left() == pytest.approx(100)
    left.begin("slca")
    clock.now += 20
    assert left.seconds_left() == pytest.approx(30 + 50)  # nothing is known of slca: the mean of the others
    left.pace(0.5, 20.0)
    assert left.seconds_left() == pytest.approx(20 + 50)
    clock.now += 10
    left.finish()
    left.begin("naive")
    clock.now += 49
    assert left.seconds_left() == pytest.approx(1)
    clock.now += 11  # longer than before: never negative
    assert left.seconds_left() is not None and left.seconds_left() >= 0
    left.finish()
    assert left.seconds_left() == 0.0


def test_the_mean_is_over_methods_and_measured_beats_kept() -> None:
    clock = Clock()
    left = TimeLeft(["naive", "cila"], clock)
    for _ in range(3):
        left.kept("naive", 10.0)
    left.kept("slca", 110.0)
    left.kept("lora", None)
    assert left.seconds_left() == pytest.approx(10 + 60)
    left.begin("naive")
    clock.now += 20
    left.finish()
    assert left.seconds_left() == pytest.approx((20 + 110) / 2)


def test_a_resumed_run_took_what_it_took_before_too() -> None:
    clock = Clock()
    left = TimeLeft(["slca", "slca"], clock)
    left.begin("slca")
    clock.now += 5
    left.pace(0.75, 75.0)
    assert left.seconds_left() == pytest.approx(25 + 100)
    clock.now += 25
    left.finish()
    assert left.seconds_left() == pytest.approx(100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "a few seconds"), (38, "about 40 s"), (99, "about 100 s"), (100, "about 2 min"), (720, "about 12 min"),
        (3590, "about 1 h"), (4800, "about 1 h 20 min"), (86400, "about 1 d"), (100000, "about 1 d 4 h"),
    ],
)  # fmt: skip
def test_spans_for_readers(seconds: float, text: str) -> None:
    assert span(seconds) == text and about(seconds) == f"{text} left"


def test_a_watch_believes_single_steps_only_until_an_experience_is_done(tmp_path: Path) -> None:
    clock = Clock()
    left = TimeLeft(["naive"], clock)
    left.begin("naive")
    watch = RunWatch(
        method="naive", strategy="naive", seed=0, folder=tmp_path, narrator=TextNarrator(quiet=True),
        time_left=left, clock=clock,
    )  # fmt: skip
    watch.drawn(0.0)
    clock.now += 1
    watch.drawn(0.01)
    assert left.seconds_left() is None
    clock.now += 9
    watch.drawn(0.1)
    assert left.seconds_left() == pytest.approx(90)
    clock.now += 10
    watch.experience(index=0, tasks=2, classes=[0], figures={}, seconds=20.0)
    watch.drawn(0.9)
    assert left.seconds_left() == pytest.approx(20)


# ----------------------------------------------------------------------- bars
class LinearProbePlugin:
    """Called as the real one."""


class ClassifierAlignmentPlugin:
    """Called as the real one."""


def test_phases_epochs_and_an_evaluation_inside_training(capsys) -> None:
    clock = SimpleNamespace(train_exp_counter=0, train_exp_epochs=0, train_exp_iterations=0)
    strategy = SimpleNamespace(
        train_epochs=2, dataloader=[0] * 3, clock=clock, plugins=[LinearProbePlugin(), ClassifierAlignmentPlugin()]
    )
    shares: list[float] = []
    plugin = ProgressPlugin(label="m seed 0", tasks=2, drawn=shares.append)
    plugin.before_training_exp(strategy)
    bar = plugin._bar
    assert bar is not None and bar.desc.startswith("m seed 0 task 1/2 linear probe")
    plugin.before_training_epoch(strategy)
    assert bar.desc.startswith("m seed 0 task 1/2 epoch 1/2 fine-tuning")
    plugin.after_training_epoch(strategy)
    assert plugin.phase == "fine-tuning"  # not the last epoch
    strategy.current_eval_stream = [SimpleNamespace(dataset=[0] * 5), SimpleNamespace(dataset=[0] * 4)]
    plugin.before_eval(strategy)
    evaluation = plugin._evaluation
    assert evaluation is not None and evaluation.total == 9 and plugin._bar is bar
    strategy.experience, strategy.mb_y = SimpleNamespace(current_experience=1), [0] * 4
    plugin.before_eval_exp(strategy)
    plugin.after_eval_iteration(strategy)
    assert evaluation.n == 4 and "evaluating task 2" in evaluation.desc
    plugin.after_eval(strategy)
    assert plugin._evaluation is None and plugin._bar is bar
    clock.train_exp_epochs = 1
    bar.mininterval, bar.miniters, bar.n = 0.0, 1, 5
    plugin.after_training_iteration(strategy)
    assert bar.n == 6 and shares[-1:] == [0.5]
    plugin.after_training_epoch(strategy)
    assert "classifier alignment" in bar.desc
    plugin.after_training_exp(strategy)
    assert plugin._bar is bar  # others come after it in this event
    plugin.after_training(strategy)
    assert plugin._bar is None


def test_phases_of_a_strategy_show_while_it_trains(capsys) -> None:
    clock = SimpleNamespace(train_exp_counter=0, train_exp_epochs=0, train_exp_iterations=0)
    strategy = SimpleNamespace(train_epochs=1, dataloader=[0] * 50, clock=clock, phase="warm-up")
    plugin = ProgressPlugin(label="m", tasks=1)
    plugin.before_training_exp(strategy)
    plugin.before_training_epoch(strategy)
    assert plugin._bar is not None and "warm-up" in plugin._bar.desc
    strategy.phase = "main"
    plugin._bar.mininterval, plugin._bar.miniters = 0.0, 1
    plugin.after_training_iteration(strategy)
    assert "main" in plugin._bar.desc
    plugin.close()


def test_on_a_terminal(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Both bars, phases, evaluation in one pass and the time left; lines of text are whole lines."""
    monkeypatch.setattr("avalanche_firn.experiments.course.bars_wanted", lambda progress, quiet: progress and not quiet)
    monkeypatch.setattr("avalanche_firn.experiments.progress._INTERVAL", 0.0)
    assert main(["compare", str(recipe), "seeds=[0]", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    drawn = re.sub("\x1b\\[[0-9;]*[A-Z]", "", err)
    for text in (
        "tiny 0/2 runs", "tiny 1/2 runs", "tiny 2/2 runs", "naive seed 0 task 1/2 epoch 1/2",
        "slca seed 0 task 2/2 epoch 2/2 classifier alignment", "slca seed 0 evaluating task 2", "a few seconds left",
    ):  # fmt: skip
        assert text in drawn, text
    counts = [(int(n), int(total)) for n, total in re.findall(r"evaluating task \d:[^\r]*?(\d+)/(\d+) \[", drawn)]
    assert counts and max(n for n, _ in counts) == max(total for _, total in counts)  # full, part batches counted once
    assert not set(BLOCKS) & set(out) and "\r" not in out
    assert "slca seed 0 task 2/2 (2 classes)" not in out and "slca seed 0 task 2/2 (classes" in out
    assert re.search(r"^\[1/2\] naive seed 0 finished: last accuracy [\d.]+ %, [\d.]+ s; .*left$", out, re.MULTILINE)


def test_off_a_terminal(recipe: Path, tmp_path: Path, capsys) -> None:
    assert main(["compare", str(recipe), "seeds=[0]", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert not set(BLOCKS) & set(out + err) and "\r" not in out + err
    lines = out.splitlines()
    assert lines[0] == "[1/2] naive seed 0"
    assert re.fullmatch(r"naive seed 0 task 1/2 \(classes \d \d\): accuracy last .* s", lines[1])
    assert re.fullmatch(r"\[1/2\] naive seed 0 finished: last accuracy .* s; .* left", lines[3])
    assert re.fullmatch(r"\[2/2\] slca seed 0 finished: last accuracy [\d.]+ %, [\d.]+ s", lines[7])


def test_quiet_leaves_the_table(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    words = ["compare", str(recipe), "seeds=[0]", "methods=[naive]", "--output", str(tmp_path)]
    assert main([*words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("method") and "seed 0 task" not in out and not set(BLOCKS) & set(err)


# ----------------------------------------------------------------------- reports meanwhile
def test_reports_take_a_small_share_of_the_time() -> None:
    clock, written = Clock(), []
    budget = ReportBudget(share=0.02, guess=2.0, clock=clock)

    def report(seconds: float) -> None:
        written.append(clock.now)
        clock.now += seconds

    clock.now += 99
    assert not budget.write(lambda: report(1.0))
    clock.now += 1
    assert budget.write(lambda: report(1.0))  # 2 s, guessed, in 100 s
    clock.now += 49
    assert not budget.write(lambda: report(1.0))
    clock.now += 1
    assert budget.write(lambda: report(10.0))
    clock.now += 499
    assert not budget.write(lambda: report(1.0))
    clock.now += 1
    with pytest.raises(OSError):
        budget.write(lambda: (_ for _ in ()).throw(OSError("full")))
    assert len(written) == 2


def test_a_comparison_writes_reports_meanwhile(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    """After a run where they cost nothing; one that fails stops nothing; always one at the end."""
    import avalanche_firn.experiments.comparison as comparison

    seen: list[int] = []

    def write_report(folder: Path, groups, *, title: str, unfinished=()) -> None:
        seen.append(sum(len(group.runs) for group in groups))
        if len(seen) == 1:
            raise OSError("no room")

    said: list[str] = []
    monkeypatch.setattr(comparison, "write_report", write_report)
    monkeypatch.setattr("avalanche_firn.experiments.course.ReportBudget.write", lambda self, report: bool(report()))
    config = comparison.Config.model_validate(load(recipe, tmp_path))
    comparison.compare(config, say=said.append)
    assert seen == [1, 2]
    assert any("the report can't be written: no room; the runs go on" in line for line in said)


def load(recipe: Path, output: Path) -> dict:
    """The recipe with naive alone, as plain values."""
    from avalanche_firn.experiments.recipe import load_recipe

    return load_recipe(str(recipe), [f"output={str(output)!r}", "methods=[naive]"]).model_dump()


# ----------------------------------------------------------------------- breaking off
def test_how_to_go_on_in_words() -> None:
    facts = {
        "resume": "firn resume runs/x", "runs": 4, "seconds_left": 720.0, "report": Path("r.html"),
        "finished": [{"method": "naive", "seed": 0}, {"method": "naive", "seed": 1}],
        "left": [{"method": "slca", "seed": 0}, {"method": "lp_ft", "seed": 0}],
    }  # fmt: skip
    assert stopped_text("interrupted", facts).splitlines() == [
        "interrupted; go on with: firn resume runs/x",
        "finished: 2 of 4 runs (seeds of naive 0, 1)",
        "left: 2 (seeds of slca 0; lp_ft 0), about 12 min",
        "report of what is finished: r.html",
    ]
    alone = {"resume": "firn resume 'a b'", "runs": 1, "finished": [], "left": [{"method": "naive", "seed": 0}]}
    assert stopped_text("failed", alone) == "a run failed; after fixing the cause go on with: firn resume 'a b'"


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), OSError("the disk is full")])
def test_breaking_off_says_how_to_go_on_and_reports(
    cause: BaseException, recipe: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    import avalanche_firn.experiments.comparison as comparison

    original = comparison.run

    def breaking(config, folder, **options):
        if config.methods[0].name == "slca":
            folder.mkdir(parents=True)
            raise cause
        return original(config, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run", breaking)
        status = main(["compare", str(recipe), "seeds=[0]", "--output", str(tmp_path), "--quiet"])
    assert status == (130 if isinstance(cause, KeyboardInterrupt) else 1)
    err = capsys.readouterr().err
    assert f"go on with: firn resume {tmp_path / 'tiny'}" in err
    assert "finished: 1 of 2 runs (seeds of naive 0)" in err
    assert re.search(r"left: 1 \(seeds of slca 0\), (about|a few)", err)
    page = tmp_path / "tiny" / "summary" / "report.html"
    assert f"report of what is finished: {page}" in err and "naive" in page.read_text()
    assert ("the disk is full" in err) == isinstance(cause, OSError)
    assert err.rstrip().endswith(str(page))  # below the traceback


def test_an_error_in_the_report_does_not_hide_the_cause(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import avalanche_firn.experiments.comparison as comparison

    original, count = comparison.run, iter(range(9))

    def breaking(config, folder, **options):
        if next(count):
            raise OSError("the disk is full")
        return original(config, folder, **options)

    def no_report(*_: object, **__: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(comparison, "run", breaking)
    monkeypatch.setattr(comparison, "write_report", no_report)
    assert main(["compare", str(recipe), "seeds=[0]", "--output", str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "OSError: the disk is full" in err and "firn resume" in err and "no picture" not in err.splitlines()[-1]
    assert "the report can't be written: no picture" in out


def test_a_last_report_that_fails_leaves_the_table(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import avalanche_firn.experiments.comparison as comparison

    def no_report(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(comparison, "write_report", no_report)
    words = ["compare", str(recipe), "seeds=[0]", "methods=[naive]", "--output", str(tmp_path)]
    assert main([*words, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "OSError: the disk is full; all runs are finished, try firn report" in out
    assert "last accuracy %" in out and "report.html" not in out
    assert main([*words, "--json"]) == 0
    last = json_lines(capsys.readouterr().out)[-1]
    assert last["event"] == "comparison_finished" and last["report"] is None and last["kept"] == 1


def test_a_wrong_configuration_meanwhile_offers_no_resume(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import avalanche_firn.experiments.comparison as comparison
    from avalanche_firn.experiments.errors import ConfigError

    def refusing(config, folder, **options):
        raise ConfigError("no such device")

    monkeypatch.setattr(comparison, "run", refusing)
    assert main(["compare", str(recipe), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "no such device" in err and "resume" not in err
