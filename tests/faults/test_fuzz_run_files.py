"""Damaged files of runs: every command that reads them says which file it is, or shows what is in it and nothing else.

Kept results of this project are copied, one of their files is changed as a disk, an editor or a stranger would, and
``firn report``, ``results``, ``resume``, ``dashboard`` and ``export`` are called. Status 0 or 2 and no traceback; on 2
the file is named and nothing was written; on 0 every figure that is shown stands in a file. ``--slow`` runs all cases.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
import fuzz_calls as calls
import fuzz_cases as fuzz
import fuzz_damage as damage

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.report_figures import curves
from avalanche_firn.experiments.results import group_runs, read_results
from avalanche_firn.experiments.results_form import read_environment
from avalanche_firn.experiments.tensorboard_curves import group_curves
from avalanche_firn.experiments.unfinished import find_unfinished

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")

KEPT = Path(__file__).parents[2] / "docs" / "results"
RUNS = {
    "stream": [f"lorac_digits/{method}/seed-{seed}" for method in ("lorac_ipc", "slca") for seed in (0, 1)],
    "contrastive": [f"all_digits/{method}/seed-{seed}" for method in ("cila", "lp_ft") for seed in (0, 1)],
    "transfer": [f"zapping_digits/{method}/seed-{seed}" for method in ("asb", "asb_zap") for seed in (0, 1)],
}
FILES = ("results.json", "results.json", "environment.json", "config.yaml", "metrics.csv")
COMMANDS = ("report", "report", "report full", "report json", "results", "collect", "dashboard", "resume")
SECONDS = 10.0
TOLD: Counter[tuple[str, str]] = Counter()


def make(kind: str, folder: Path) -> Path:
    """A comparison as it lies on disk after its runs: the last one unfinished, the others finished."""
    top = folder / "runs" / RUNS[kind][0].split("/")[0]
    for name in RUNS[kind]:
        place = top.parent / name
        shutil.copytree(KEPT / name, place)
        results = json.loads((place / "results.json").read_text())
        lines = ["step,tag,value", *(f"{i},loss/train,{1 / (i + 1)}" for i in range(20))]
        for tag, curve in results.get("curves", {}).items():
            lines += [f"{i},{tag},{value}" for i, value in enumerate(curve) if value is not None]
        lines += [f"{i},drift/{what},{0.9**i}" for what in ("cka", "weights") for i in range(3)]
        (place / "metrics.csv").write_text("\n".join(lines) + "\n")
    config = yaml.safe_load((top.parent / RUNS[kind][0] / "config.yaml").read_text())
    others = [yaml.safe_load((top.parent / name / "config.yaml").read_text())["methods"][0] for name in RUNS[kind][::2]]
    (top / "config.yaml").write_text(yaml.safe_dump({**config, "methods": others, "seeds": [0, 1]}, sort_keys=False))
    (top.parent / RUNS[kind][-1] / "results.json").unlink()
    return top


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One comparison of each kind, by kind."""
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in RUNS}


@contextlib.contextmanager
def quick(home: Path) -> Iterator[None]:
    """No training, no TensorBoard, no rendering of pictures."""
    from avalanche_firn.experiments import dashboard, report_figures, report_tensorboard

    @contextlib.contextmanager
    def served(*arguments: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with pytest.MonkeyPatch.context() as patch, calls.no_training(home):
        patch.setattr(dashboard, "_served", served)
        patch.setattr(report_figures, "svg_of", lambda figure, **texts: '<svg viewBox="0 0 1 1"><desc></desc></svg>')
        patch.setattr(report_tensorboard, "dashboard_images", lambda groups: {})
        yield


# ----------------------------------------------------------------------- judging
def words_of(command: str, top: Path, run: Path, out: Path) -> list[str]:
    """The command line."""
    return {
        "report": ["report", str(top)],
        "report full": ["report", str(top), "--output", str(out)],
        "report json": ["report", str(top), "--json"],
        "results": ["results", str(top)],
        "collect": ["results", str(top), "--collect", str(out), "--changed-code"],
        "dashboard": ["dashboard", str(top), "--no-browser"],
        "resume": ["resume", str(run)],
        "export": ["export", str(run), "--format", "safetensors", "--output", str(out / "x.safetensors")],
    }[command]


def judge(command: str, top: Path, run: Path, file: Path, out: Path) -> str:
    """Call and assert what must hold."""
    before = calls.snapshot(top.parent)
    found = calls.call(*words_of(command, top, run, out))
    after = calls.snapshot(top.parent)
    if found.escaped is not None:
        raise AssertionError(f"{command}: {found.escaped!r} reached the user") from found.escaped
    assert "Traceback (most recent call last)" not in found.err + found.out, found.err[-2000:]
    assert found.status in (0, 2), found.err
    assert found.seconds < SECONDS, f"{command} took {found.seconds:.1f} s"
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if command == "dashboard":  # it may write the summary, and says so where it can't
        assert all(f"{top.name}/summary" in name for name in changed), changed
        if "can't be written" in found.out:
            assert not changed and names(found.out, file, top)
        return "shown" if "can't be written" not in found.out else "named"
    own = {f"{top.name}/config.yaml"} if command == "resume" and found.status == 0 else set()
    assert changed <= own, changed
    if found.status == 2:
        assert names(found.err + found.out, file, top), found.err
        assert not out.exists() or not any(out.rglob("*")), "something was written"
        return "named"
    if command == "report full":
        assert_shown(top, out)
    if command == "report":
        assert_table(top, found.out)
    return "shown"


def names(message: str, file: Path, top: Path) -> bool:
    """Whether a message names the damaged file, its run or, where nothing is left in it, the comparison."""
    label = f"{file.parent.parent.name}"
    return any(text in message for text in (str(file), str(file.parent), label, str(top)))


def raw_results(top: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What stands in every ``results.json`` below a folder that is a file: (label, seed) -> content."""
    found = {}
    for place in sorted(top.rglob("results.json")):
        if place.is_file():
            content = json.loads(place.read_text())
            found[str(content["method"]), str(content["seed"])] = content
    return found


def assert_shown(top: Path, out: Path) -> None:
    """The figures of results.csv are those of the files, digit by digit."""
    raw = raw_results(top)
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert len(rows) >= len(raw)
    for row in rows:
        label = row["method"].split(" [")[0].lstrip("'")
        content = raw[label, row["seed"]]
        figures = content.get("figures") or content["optimizers"][row["optimizer"]]["figures"]
        for tag, text in row.items():
            if tag in figures:
                assert text == ("" if figures[tag] is None else str(float(figures[tag])) if text else text), (tag, text)


def assert_table(top: Path, text: str) -> None:
    """Every number of the column of accuracies is the mean of what stands in the files."""
    groups: dict[str, list[float]] = {}
    for content in raw_results(top).values():
        if "figures" in content:
            groups.setdefault(content["group_digest"], []).append(content["figures"].get("accuracy/last"))
    means = {
        f"{100 * sum(values) / len(values):.2f}" for values in groups.values() if all(v is not None for v in values)
    }
    for line in text.splitlines()[2 : 2 + len(groups)]:
        cells = [cell for cell in line.split("  ") if cell]
        if len(cells) > 2:
            shown = cells[1].split("±")[0].strip()
            assert shown in means or shown == "-", (line, means)


WHAT = "changed files of runs"


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints what became of the files."""
    with calls.printed(pytestconfig, WHAT, TOLD):
        yield


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The same as a property of each test."""
    before = TOLD.copy()
    yield
    record_property("fuzzed", calls.told(WHAT, TOLD - before))


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(150, 10, 2))
def test_damaged_files(comparisons: dict[str, Path], tmp_path: Path, part: int, cases: int) -> None:
    (tmp_path / "home").mkdir()

    def check(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(sorted(RUNS)))
        work, out = tmp_path / "work", tmp_path / "out"
        for place in (work, out):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(comparisons[kind].parent, work / "runs")
        top = work / "runs" / comparisons[kind].name
        run = top.parent / data.draw(st.sampled_from(RUNS[kind]))
        file = run / data.draw(st.sampled_from([name for name in FILES if (run / name).is_file()]))
        if data.draw(st.integers(0, 9)) == 0:
            file = top / "config.yaml"
        ways = [damage.change_text, damage.change_kind]
        ways += [damage.change_lines] * 3 if file.suffix == ".csv" else [damage.change_values] * 3
        what = data.draw(st.sampled_from(ways))(data.draw, file)
        command = data.draw(st.sampled_from(COMMANDS))
        outcome = judge(command, top, top if command == "resume" else run, file, out)
        TOLD[f"{command}, {what.partition(':')[0]}", outcome] += 1

    with quick(tmp_path / "home"):
        calls.explore(check, part=part, cases=cases, data=st.data())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a second, with its last checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["method=slca", "seed=0", "stream.tasks=2", "training.epochs=1", "training.batch_size=256", "device=cpu"]
    done = calls.call("run", "digits", *words, "--output", str(folder), "--quiet", limit=300)
    assert done.status == 0, done.err
    return folder / "digits" / "slca" / "seed-0"


@pytest.mark.slow
def test_damaged_files_of_an_exported_run(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    place = next((finished / "checkpoint").glob("step-*"))

    def check(data: st.DataObject) -> None:
        run, out = tmp_path / "runs" / "slca" / "seed-0", tmp_path / "out"
        for folder in (run, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, run)
        inside = run / place.relative_to(finished)
        ways: list[tuple[Path, Callable[..., str], bool]] = [
            (run / "results.json", damage.change_values, False),
            (run / "config.yaml", damage.change_values, False),
            (run / "results.json", damage.change_text, False),
            (run / "config.yaml", damage.change_kind, False),
            (inside / data.draw(st.sampled_from(damage.FILES)), damage.change_bytes, False),
            (inside / "state.json", damage.change_state, True),
            (inside / "tensors.safetensors", damage.change_tensors, True),
        ]
        file, way, sums = data.draw(st.sampled_from(ways))
        what = way(data.draw, file)
        if sums:
            damage.sums_anew(inside)
        outcome = judge("export", run.parent, run, file, out)
        if outcome == "shown":
            assert load_file(out / "x.safetensors")
        TOLD[f"export, {what.partition(':')[0]}", outcome] += 1

    with quick(tmp_path / "home"):
        calls.explore(check, part=1, cases=150, data=st.data())


# ------------------------------------------------------------- faults found by it
Change = Callable[[dict[str, Any]], Any]


def results_with(comparisons: dict[str, Path], folder: Path, change: Change, kind: str) -> Path:
    """A finished run whose ``results.json`` is changed."""
    place = folder / "run"
    shutil.copytree(comparisons[kind].parent / RUNS[kind][0], place)
    content = json.loads((place / "results.json").read_text())
    change(content)
    (place / "results.json").write_text(json.dumps(content))
    return place


RESULTS: dict[str, tuple[str, Change, str]] = {
    "true for a figure": ("stream", lambda r: r["figures"].update({"accuracy/last": True}), "figures.accuracy/last"),
    "text for a figure": ("stream", lambda r: r["figures"].update({"accuracy/last": "0.9"}), "figures.accuracy/last"),
    "no number": ("stream", lambda r: r["figures"].update({"accuracy/last": float("nan")}), "NaN is no number"),
    "an integer of hundreds of digits": (
        "stream",
        lambda r: r.update(x=10**300),
        "a number of 301 digits",
    ),
    "figures that are gone": ("stream", lambda r: r.pop("figures"), "figures: Field required"),
    "a ragged matrix": ("stream", lambda r: r["accuracy_matrix"][0].pop(), "the rows have different lengths"),
    "a seed that is none": ("stream", lambda r: r.update(seed="0"), "seed: "),
    "format true": ("stream", lambda r: r.update(format=True), "format 1"),
    "another experiment": ("stream", lambda r: r.update(experiment="x"), "doesn't know"),
    "half a letter": ("stream", lambda r: r.update(method="\ud800"), "can't be read"),
    "curves of another length": ("transfer", lambda r: _first(r)["logged_after"].pop(), "doesn't fit logged_after"),
    "a protocol without shots": ("contrastive", lambda r: r.update(probes=[_probe("shots")]), "protocol.shots: Field"),
    "a protocol without rates": ("contrastive", lambda r: r.update(probes=[_probe("lr")]), "protocol.lr: Field requ"),
    "a figure that overflows": ("stream", lambda r: r["figures"].update({"accuracy/last": 1e308}), "figures.accuracy"),
    "seconds that overflow": ("stream", lambda r: r["cost"].update(seconds=1e308), "cost.seconds"),
    "a name without end": ("stream", lambda r: r.update(method="a" + " " * 40_000 + "b"), "method: String should have"),
    "no optimizers": ("transfer", lambda r: r.update(optimizers={}), "optimizers: "),
}


def _probe(without: str) -> dict[str, Any]:
    """A probe of every kind, but for one field of its protocol."""
    protocol = {"adapt": ["knn", "linear", "fine_tune"], "shots": None, "k": 20, "temperature": 0.07, "solver": "lbfgs"}
    protocol |= {"l2": None, "lr": [0.1], "momentum": 0.9, "weight_decay": 0.0, "epochs": 1, "batch_size": 8}
    protocol |= {"task_aware": False, "seed": 0, "when": "after every task"}
    del protocol[without]
    return {"protocol": protocol, "matrices": {}}


def _first(results: dict[str, Any]) -> dict[str, Any]:
    return next(iter(results["optimizers"].values()))


@pytest.mark.parametrize(("kind", "change", "told"), RESULTS.values(), ids=RESULTS)
def test_results_that_are_none(
    comparisons: dict[str, Path], tmp_path: Path, kind: str, change: Change, told: str
) -> None:
    place = results_with(comparisons, tmp_path, change, kind)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        read_results(place)
    assert str(place / "results.json") in str(caught.value)


@pytest.mark.parametrize("name", ["lorac/frozen", "cila/floor-active"])
def test_a_curve_that_is_longer_than_the_others(comparisons: dict[str, Path], tmp_path: Path, name: str) -> None:
    """All pages are rendered: missing cells of the others are dashes."""
    kind = "stream" if name.startswith("lorac") else "contrastive"
    place = results_with(comparisons, tmp_path, lambda r: r["curves"].setdefault(name, [1.0]).append(1.0), kind)
    out = tmp_path / "out"
    with quick(tmp_path):
        found = calls.call("report", str(place), "--output", str(out))
    assert found.status == 0 and found.escaped is None, found.err
    assert (out / "report.md").stat().st_size > 0 and (out / "report.html").stat().st_size > 0


def test_all_kept_results_are_read(comparisons: dict[str, Path]) -> None:
    read = [read_results(path.parent) for path in KEPT.rglob("results.json")]
    assert len(read) > 200 and all(results is not None for results in read)


@pytest.mark.parametrize("content", ["[]", '{"packages": []}', '{"device": "cpu"}', '{"resumed_in": {}}', "{", ""])
def test_an_environment_that_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "environment.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        read_environment(file)


@pytest.mark.parametrize("line", ["999999999999,drift/cka,0.5", "²,drift/cka,0.5", "3,drift/cka,1e999"])
def test_a_step_that_no_run_has_takes_no_memory(comparisons: dict[str, Path], tmp_path: Path, line: str) -> None:
    """A list was made that is as long as the largest step."""
    place = results_with(comparisons, tmp_path, lambda results: None, "stream")
    with (place / "metrics.csv").open("a") as file:
        file.write(f"{line}\n")
    with calls.bounded(gigabytes=1):
        drawn = curves(group_runs([read_results(place)]), "drift/cka")
    assert [values.shape[1] for values in drawn.values()] == [5]


def test_a_value_without_end_has_no_place_on_a_chart(comparisons: dict[str, Path], tmp_path: Path) -> None:
    place = results_with(comparisons, tmp_path, lambda results: None, "stream")
    groups = group_runs([read_results(place)])
    before = group_curves(groups, lambda tag: True, lambda tag: True)
    with (place / "metrics.csv").open("a") as file:
        file.write("8,drift/cka,-inf\n")
    (curves_now,) = group_curves(groups, lambda tag: True, lambda tag: True)
    assert [curves_now] == before and curves_now["drift/cka"]["mean"]


TORN = ("9999999999999,accuracy/last,0.5", "x" * 200_000, "4,accuracy/last,inf", "1_0,accuracy/last,1")


@pytest.mark.parametrize("line", TORN)
def test_lines_of_an_unfinished_run_that_are_none(comparisons: dict[str, Path], tmp_path: Path, line: str) -> None:
    place = tmp_path / "run"
    shutil.copytree(comparisons["stream"].parent / RUNS["stream"][-1], place)
    before = find_unfinished([tmp_path])
    with (place / "metrics.csv").open("a") as file:
        file.write(f'{line}\n"')
    with calls.bounded(gigabytes=1):
        found = find_unfinished([tmp_path])
    assert [run.curves for run in found] == [run.curves for run in before]


@pytest.mark.parametrize("command", ["report", "results", pytest.param("dashboard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["metrics.csv", "results.json", "environment.json", "config.yaml"])
def test_a_pipe_is_never_waited_for(comparisons: dict[str, Path], tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / "home").mkdir()
    top = tmp_path / "runs"
    shutil.copytree(comparisons["stream"], top)
    for seed in (0, 1):
        file = top / "slca" / f"seed-{seed}" / name
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    with quick(tmp_path / "home"):
        found = calls.call(*words_of(command, top, top, tmp_path / "out"))
    assert found.escaped is None and found.status in (0, 2), found
