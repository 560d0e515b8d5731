"""A dashboard of a real small comparison, read back through TensorBoard's own code; and of made-up runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.evaluation.statistics import mean_interval
from avalanche_firn.evaluation.tensorboard import read_scalars, summary_tag
from avalanche_firn.evaluation.vocabulary import describe
from avalanche_firn.experiments.comparison import compare
from avalanche_firn.experiments.csv_logger import read_metrics
from avalanche_firn.experiments.recipe import dump, load_experiment
from avalanche_firn.experiments.report_tensorboard import write_dashboard, write_transfer_dashboard
from avalanche_firn.experiments.results import FIGURES, Group, RunResults, find_runs, group_runs
from avalanche_firn.experiments.tensorboard_curves import group_curves, thinned
from avalanche_firn.experiments.tensorboard_table import RUN_SECONDS, hyper_parameters

RECIPE = """
name: tiny
seeds: [0, 1]
device: cpu
threads: 1
stream: {{name: folder, root: {root}, tasks: 2, class_order: seeded}}
training: {{epochs: 2, batch_size: 8, optimizer: {{lr: 0.01}}}}
evaluation:
  task_incremental: true
  probes: [{{adapt: [knn], shots: 3, when: experience, tasks: seen}}]
  drift: {{num_images: 8}}
  dynamics: {{every: 2, max_tasks: 2, images_per_task: 4}}
methods:
  - strategy: joint
  - {{strategy: naive, zapping: {{schedule: epoch, scope: experience}}}}
  - {{strategy: slca, backbone_scale: 0.1, alignment: {{samples_per_class: 8, epochs: 2}}}}
  - {{strategy: lorac_ipc, orthogonality: 0.5, training: {{epochs: 3}}}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Four methods with two seeds on four classes of eight random textures."""
    base = tmp_path_factory.mktemp("dashboard")
    random = np.random.RandomState(0)
    for c in range(4):
        folder = base / "data" / f"class{c}"
        folder.mkdir(parents=True)
        wave = np.sin(np.arange(32) * (c + 1) / 3)[None, :, None] * 60 + 128
        for i in range(8):
            pixels = np.clip(wave + random.randn(32, 32, 3) * 30, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    path = base / "tiny.yaml"
    path.write_text(RECIPE.format(root=base / "data"))
    config = load_experiment(path)
    compare(config, folder=base / "tiny", quiet=True, summary=False)
    (base / "tiny" / "config.yaml").write_text(dump(config))
    return base / "tiny"


@pytest.fixture(scope="module")
def board(finished: Path) -> SimpleNamespace:
    """The dashboard of it, written twice."""
    write_dashboard(finished / "summary", group_runs(find_runs([finished])))
    groups, points = written(finished)
    return SimpleNamespace(folder=finished, groups=groups, points=points)


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; no pictures, which take most of the time."""
    monkeypatch.setattr("avalanche_firn.experiments.report_tensorboard.dashboard_images", lambda groups: {})
    ignored = shutil.ignore_patterns("checkpoint", "summary")
    return Path(shutil.copytree(finished, tmp_path / "tiny", ignore=ignored))


def written(folder: Path, **options):
    groups = group_runs(find_runs([folder]))
    return groups, write_dashboard(folder / "summary", groups, **options)


def hparams(folder: Path) -> tuple[api_pb2.Experiment, list[api_pb2.SessionGroup], str]:
    """Columns and rows of the hparams table as TensorBoard serves them, sorted by last accuracy, best first."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    context, experiment_id = RequestContext(), ""
    experiment = get_experiment.Handler(context, backend, experiment_id, api_pb2.GetExperimentRequest()).run()
    ordered = api_pb2.ColParams(metric=api_pb2.MetricName(tag="accuracy/last"), order=api_pb2.ORDER_DESC)
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[ordered],
        slice_size=100,
        aggregation_type=api_pb2.AGGREGATION_AVG,
    )
    found = list_session_groups.Handler(context, backend, experiment_id, request).run()
    return experiment, list(found.session_groups)


def summary_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return events.Reload()


def layout_of(folder: Path) -> layout_pb2.Layout:
    tensor = summary_events(folder).Tensors("custom_scalars__config__")[-1].tensor_proto
    return layout_pb2.Layout.FromString(tensor.string_val[0])


def text_of(folder: Path, tag: str) -> str:
    return summary_events(folder).Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_every_logged_tag_has_a_meaning(finished):
    found = {tag for run in find_runs([finished]) for _, tag, _ in read_metrics(run.folder / "metrics.csv")}
    assert {"lr/head", "drift/cka", "probe/knn", "dynamics/learning", "zap/rows", "lorac/frozen"} <= found
    assert {tag for tag in found if describe(tag) is None} == set()
    figures = {tag for run in find_runs([finished]) for tag in (*run["figures"], *run["curves"])}
    assert {tag for tag in figures if describe(tag) is None} == set()


def test_lines_are_the_means_and_intervals_of_the_results(board):
    groups, points = board.groups, board.points
    assert groups[0].label == "joint"
    assert list(points) == ["joint (upper bound, not continual)", *(group.label for group in groups[1:])]
    for group, (label, curves) in zip(groups, points.items(), strict=True):
        scalars = read_scalars(board.folder / "summary" / label)
        for tag, *_ in FIGURES[:4]:
            interval = group.interval(tag)
            if interval is None:
                assert tag not in curves
                continue
            last = {part: of[-1][1] for part, of in curves[tag].items()}
            assert last == pytest.approx({part: getattr(interval, part) for part in ("mean", "lower", "upper")})
            assert scalars[summary_tag(tag)][-1] == (1, pytest.approx(interval.mean, rel=1e-6))
            assert scalars[summary_tag(tag, "upper")][-1][1] == pytest.approx(interval.upper, rel=1e-6)
    naive = points["naive"]
    curves = [run["curves"]["accuracy/last"] for run in next(g for g in groups if g.label == "naive").runs]
    means = [mean_interval(values).mean for values in zip(*curves, strict=True)]
    assert [value for _, value in naive["accuracy/last"]["mean"]] == pytest.approx(means)
    joint = points["joint (upper bound, not continual)"]["accuracy/last"]["mean"]
    assert [step for step, _ in joint] == [0, 1] and joint[0][1] == joint[1][1]  # a level


def test_curves_of_metrics_csv(board):
    groups, points = board.groups, board.points
    slca = next(group for group in groups if group.label == "slca")
    logged = [read_metrics(folder / "metrics.csv") for folder in slca.folders]
    for tag in ("drift/cka", "loss/train", "lr/head", "efficiency/seconds", "dynamics/interference"):
        seeds = [[(step, value) for step, name, value in rows if name == tag] for rows in logged]
        assert len(seeds[0]) == len(seeds[1]) > 0
        steps = [int(np.median([a[0], b[0]]).round()) for a, b in zip(*seeds, strict=True)]
        means = [(a[1] + b[1]) / 2 for a, b in zip(*seeds, strict=True)]
        assert [step for step, _ in points["slca"][tag]["mean"]] == steps
        assert [value for _, value in points["slca"][tag]["mean"]] == pytest.approx(means)
    assert set(points["slca"]["drift/cka"]) == {"mean", "lower", "upper"}
    assert set(points["slca"]["loss/train"]) == {"mean"}
    for curves in points.values():
        assert not [tag for tag in curves if "task-0" in tag or tag.startswith(("Top1", "Loss_", "phase"))]


def test_layout_shows_all_methods_and_never_the_seeds(board):
    groups, points = board.groups, board.points
    layout = layout_of(board.folder / "summary")
    titles = [category.title for category in layout.category]
    assert titles[:2] == [f"Accuracy and forgetting ({x} over seeds)" for x in ("mean", "95 % intervals")]
    for title in ("Learning rates and losses", "LoRAC-IPC: importance and frozen matrices", "Cost"):
        assert title in titles
    assert [category.closed for category in layout.category] == [False, False, *[True] * (len(titles) - 2)]
    first = [chart.title for chart in layout.category[0].chart]
    assert first[:2] == ["accuracy/last over tasks", "accuracy/average over tasks"]
    seeds = {tag for group in groups for folder in group.folders for tag in read_scalars(folder)}
    shown = {label: read_scalars(board.folder / "summary" / label) for label in points}
    everything = {tag for scalars in shown.values() for tag in scalars}
    drawn = set()

    for category in layout.category:
        for chart in category.chart:
            tags = {tag for tag in everything for regex in chart.multiline.tag if re.match(regex, tag)}
            for series in chart.margin.series:
                tags |= {series.value, series.lower, series.upper}
            assert tags and tags <= everything and not tags & seeds, chart.title
            drawn |= tags
    assert drawn == everything
    assert all("All methods/accuracy/last" in scalars for scalars in shown.values())


def test_hparams_table(board):
    groups = board.groups
    experiment, rows = hparams(board.folder)
    runs = {f"{run['method']}/seed-{run['seed']}": run for group in groups for run in group.runs}
    assert sorted(row.name for row in rows) == sorted(runs)  # one row per run, none of the summary's
    names = [info.name for info in experiment.hparam_infos]
    assert names[:2] == ["Method", "Seed"] and "training.optimizer.lr" in names and "alignment.epochs" in names
    assert names.index("training.epochs") < names.index("stream.name")  # what differs is in front
    headings = {info.name.tag: info.display_name for info in experiment.metric_infos}
    assert [*headings][:4] == [tag for tag, *_ in FIGURES[:4]] and headings["accuracy/last"] == "last accuracy"
    assert headings[RUN_SECONDS] == "seconds" and "probe/knn" in headings and "drift/cka" in headings
    for row in rows:
        run = runs[row.name]
        values = {value.name.tag: value.value for value in row.metric_values}
        for tag in (*headings,):
            expected = {RUN_SECONDS: run["cost"]["seconds"]}.get(tag, run["figures"].get(tag))
            if expected is not None:
                assert values[tag] == pytest.approx(expected, rel=1e-6)
        assert values["efficiency/peak-memory-MiB"] == pytest.approx(run["cost"]["peak_memory_MiB"], rel=1e-6)
        assert values["efficiency/trainable-parameters"] == run["cost"]["trainable_parameters"]
        assert row.hparams["Method"].string_value == run["method"] and row.hparams["Seed"].number_value == run["seed"]
    order = [next(v.value for v in row.metric_values if v.name.tag == "accuracy/last") for row in rows]
    assert order == sorted(order, reverse=True)


def test_columns_are_complete_before_the_first_run_is_finished(finished, tmp_path):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    write_dashboard(tmp_path / "summary", [])
    experiment, rows = hparams(tmp_path)
    assert rows == []
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos["Method"].domain_discrete) == {"joint", "naive", "slca", "lorac_ipc"}
    assert {"alignment.epochs", "orthogonality"} <= set(infos)
    assert {"accuracy/last", "probe/knn", "drift/cka"} <= {info.name.tag for info in experiment.metric_infos}


def test_rows_of_hyper_parameters(finished):
    config = load_experiment(finished / "config.yaml")
    rows = {method.name: hyper_parameters(config.single(method.name, 1)) for method in config.methods}
    assert [*rows["slca"]][:2] == ["Method", "Seed"] and rows["slca"]["Seed"] == 1
    assert (rows["slca"]["training.epochs"], rows["lorac_ipc"]["training.epochs"]) == (2, 3)  # its own on top
    assert rows["slca"]["alignment.samples_per_class"] == 8 and "alignment.samples_per_class" not in rows["naive"]
    for row in rows.values():
        assert all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in row.values())
        assert "none" not in {str(value) for key, value in row.items() if key.startswith("training.optimizer.")}


def test_pictures_and_texts(board):
    groups = board.groups
    events = summary_events(board.folder / "summary")
    images = events.Tags()["images"]
    assert "1 task matrices/mean over seeds" in images and "3 frozen matrices/lorac_ipc" in images
    assert {f"2 confusion of tasks/{group.label}" for group in groups} <= set(images)
    assert {f"4 block effects/{label}, seed 0" for label in ("naive", "slca", "lorac_ipc")} <= set(images)
    results = text_of(board.folder / "summary", "2 results")
    for group in groups:
        assert f"{group.interval('accuracy/last').format()} |" in results
    assert "joint (upper bound, not continual)" in results
    protocol = text_of(board.folder / "summary", "3 protocol").splitlines()
    heads = [cell.strip() for cell in protocol[0].split("|")[2:-1]]
    joint = next(line for line in protocol if line.startswith("| joint |")).split("|")[2:-1]
    assert dict(zip(heads, (cell.strip() for cell in joint), strict=True)) == {
        group.label: "**yes**" if group.joint else "no" for group in groups
    }
    meanings = text_of(board.folder / "summary", "4 what the tags mean")
    assert "`accuracy/last`" in meanings and "`lr/<group>`" in meanings and "`cila/coefficient`" not in meanings
    assert "`orthogonality`" in text_of(board.folder / "summary", "5 settings that differ between methods")
    assert "    name: slca" in text_of(board.folder / "summary", "6 configuration/slca").replace("  - name", "    name")
    assert "Smoothing" in text_of(board.folder / "summary", "1 how to read this")


def test_methods_that_are_gone_are_gone(copy):
    written(copy)
    shutil.rmtree(copy / "slca")
    _, points = written(copy)
    runs = {path.parent.name for path in (copy / "summary").rglob("events*")}
    assert runs == {"summary", *points} and "slca" not in runs
    assert "slca" not in text_of(copy / "summary", "2 results")


def test_unfinished_runs(copy):
    groups = [group for group in group_runs(find_runs([copy])) if group.label == "naive"]
    half = {"accuracy/last": [1.0, None], "accuracy/task-0": [1.0], "drift/cka": [0.9]}
    more = {"accuracy/last": [0.5, 0.25]}
    digest = groups[0].runs[0]["group_digest"]
    waiting = [
        SimpleNamespace(label="slca", seed=0, folder=copy, group_digest="a", curves=half, tasks_done=1),
        SimpleNamespace(label="slca", seed=1, folder=copy, group_digest="a", curves=more, tasks_done=2),
        SimpleNamespace(label="naive", seed=9, folder=copy, group_digest=digest, curves=more, tasks_done=2),
    ]
    points = write_dashboard(copy / "summary", groups, unfinished=waiting)
    assert list(points) == ["naive", "slca (unfinished)"]  # naive has finished runs
    assert points["slca (unfinished)"] == {
        "accuracy/last": {"mean": [(0, 0.75), (1, 0.25)]},
        "drift/cka": {"mean": [(0, 0.9)]},
    }
    assert read_scalars(copy / "summary" / "slca (unfinished)")["All methods/accuracy/last"] == [(0, 0.75), (1, 0.25)]
    assert "seed 0: 1 tasks, seed 1: 2 tasks" in text_of(copy / "summary", "2 results, unfinished")
    assert list(write_dashboard(copy / "summary", [], unfinished=waiting[:1])) == ["slca (unfinished)"]
    waiting[1].group_digest = "bcdefgh"  # two configurations are never averaged
    points = write_dashboard(copy / "summary", [], unfinished=waiting[:2])
    assert points["slca [a] (unfinished)"]["accuracy/last"] == {"mean": [(0, 1.0)]}
    assert points["slca [bcdefg] (unfinished)"]["accuracy/last"] == {"mean": [(0, 0.5), (1, 0.25)]}


def test_results_without_folder_or_files_are_a_chart_less(copy):
    runs = [RunResults(run) for run in find_runs([copy])]
    for run in runs:
        del run["dynamics"], run["lora"]
        run.pop("task_confusion", None)
    points = write_dashboard(copy / "elsewhere", group_runs(runs))
    assert set(points["slca"]) == {tag for tag in points["slca"] if tag in runs[0]["curves"] or "slca/" in tag}
    for folder in copy.glob("*/seed-*"):
        (folder / "config.yaml").write_text("of: another version\n")
        (folder / "metrics.csv").write_text("step,tag,value\n0,drift/cka,0.5\n1,drift/c")  # cut off
    _, points = written(copy)
    assert points["slca"]["drift/cka"]["mean"] == [(0, 0.5)] and "loss/train" not in points["slca"]


def made_up(
    folder: Path, method: str, seed: int, series: dict[str, list[tuple[int, float]]], curves=None
) -> RunResults:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("step", "tag", "value"))
        table.writerows((step, tag, repr(value)) for tag, points in series.items() for step, value in points)
    content = {
        "method": method,
        "recipe": "made",
        "seed": seed,
        "group_digest": method,
        "curves": curves or {},
        "figures": {},
        "protocol": {"joint": False},
        "stream": {"split": "test", "task_sizes": [1, 1]},
    }
    return RunResults(json.loads(json.dumps(content)), folder)


def everything(tag: str) -> bool:
    return True


def test_seeds_of_unequal_length_are_joined_by_number(tmp_path):
    long = [(10 * k, float(k)) for k in range(1, 4)]
    short = [(12 * k, float(k) + 1) for k in range(1, 3)]
    runs = (
        made_up(tmp_path / "0", "a", 0, {"loss/train": long, "drift/cka": [(0, 0.5), (2, 0.25)]}),
        made_up(tmp_path / "1", "a", 1, {"loss/train": short, "drift/cka": [(0, 0.7), (1, 0.6)]}),
    )
    (points,) = group_curves([Group("a", runs)], everything, everything)
    assert points["loss/train"] == {"mean": [(11, 1.5), (22, 2.5), (30, 3.0)]}
    assert points["drift/cka"]["mean"] == [(0, pytest.approx(0.6)), (1, 0.6), (2, 0.25)]  # by task, not by number
    assert [step for step, _ in points["drift/cka"]["upper"]] == [0]


def test_long_curves_are_thinned(tmp_path):
    series = [(step, float(step)) for step in range(0, 25_000, 5)]
    run = made_up(tmp_path / "0", "a", 0, {"loss/train": series})
    (points,) = group_curves([Group("a", (run,))], everything, everything)
    mean = points["loss/train"]["mean"]
    assert len(mean) == 1000 and mean[0] == (0, 0.0) and mean[-1] == (24_995, 24_995.0)
    assert all(step == value for step, value in mean)
    gaps = np.diff([step for step, _ in mean])
    assert gaps.min() >= 25 and gaps.max() <= 30
    assert thinned(5, 10).tolist() == [0, 1, 2, 3, 4] and thinned(5, 2).tolist() == [0, 4]


def test_results_come_before_the_log_and_the_split_does_not_matter(tmp_path):
    series = {"validation/accuracy/last": [(0, 0.1), (1, 0.2)], "lorac/task-inference": [(1, 0.5), (2, 0.75)]}
    curves = {"accuracy/last": [0.1, 0.2], "lorac/task-inference": [0.5, 0.75]}
    run = made_up(tmp_path / "0", "a", 0, series, curves)
    run["stream"]["split"] = "validation"
    (points,) = group_curves([Group("a", (run,))], everything, everything)
    assert points == {tag: {"mean": [*enumerate(values)]} for tag, values in curves.items()}


def test_landscapes_of_transfer_experiments(tmp_path):
    grid = np.linspace(-1.0, 1.0, 3)
    surface = np.add.outer(grid**2, grid**2)
    (tmp_path / "run").mkdir()
    Landscape(grid, grid, surface, surface / 2, np.zeros((0, 2))).save(tmp_path / "run" / "landscape-slow")
    groups = [
        SimpleNamespace(label="asb, slow", optimizer="slow", runs=[{"config_digest": "a"}]),
        SimpleNamespace(label="asb, fast", optimizer="fast", runs=[{"config_digest": "a"}]),  # it left none
        SimpleNamespace(label="iid, slow", optimizer="slow", runs=[{"config_digest": "b"}]),  # its folder isn't known
    ]
    curves = {"continual/accuracy": {"asb, slow": [[0.5, 0.25], [0.25, 0.5]]}}
    points = write_transfer_dashboard(
        tmp_path / "summary", groups, {"a": tmp_path / "run"}, curves, steps={"continual/accuracy": [1, 10]}
    )
    assert points["asb, slow"]["continual/accuracy"]["mean"] == [(1, 0.375), (10, 0.375)]
    events = summary_events(tmp_path / "summary")
    assert events.Tags()["images"] == ["landscape/asb, slow"]
    assert read_scalars(tmp_path / "summary" / "asb, slow")["All methods/continual/accuracy"] == [
        (1, 0.375),
        (10, 0.375),
    ]
    assert "Smoothing" in text_of(tmp_path / "summary", "1 how to read this")
