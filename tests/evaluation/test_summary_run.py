"""The summary on disk: what is replaced, what is left alone, and what a TensorBoard that runs makes of it."""

import os
import re
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from avalanche_firn.evaluation.summary_run import (
    SUFFIX,
    Category,
    Lines,
    Margin,
    TableColumns,
    run_names,
    safe_name,
    write_runs,
)
from avalanche_firn.evaluation.tensorboard import read_scalars


def loaded(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return events.Reload()


def filled(folder):
    return [path for path in folder.glob("*tfevents*") if path.stat().st_size]


def test_names_can_be_read_and_are_never_the_same():
    assert safe_name("slca [digits, 3f]") == "slca [digits, 3f]"
    assert safe_name("joint (upper bound, not continual)") == "joint (upper bound, not continual)"
    assert not set('/\\:*?"<>|') & set(safe_name('a/b\\c:d*e?f"g<h>i|j'))
    assert safe_name("..") == "run" and safe_name("../../etc") == "-..-etc"
    names = run_names(["a/b", "a:b", "A-B", "a/b", "c"])
    assert names == {"a/b": "a-b", "a:b": "a-b (2)", "A-B": "A-B (3)", "c": "c"}


def test_scalars_are_those_given_and_older_ones_are_gone(tmp_path):
    write_runs(tmp_path, {"a": {"m": [(0, 0.5), (3, 0.25)], "old": [(9, 1.0)]}, "b": {"m": [(0, 1.0)]}})
    places = write_runs(tmp_path, {"a": {"m": [(0, 0.75)]}})
    assert places == {"a": tmp_path / "a"}
    assert read_scalars(tmp_path / "a") == {"m": [(0, 0.75)]}
    assert not (tmp_path / "b").exists()
    assert len(filled(tmp_path)) == len(filled(tmp_path / "a")) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_emptied_files_go_when_nobody_reads_them_any_more(tmp_path):
    for value in range(4):
        write_runs(tmp_path, {"a": {"m": [(0, float(value))]}})
        for path in (tmp_path / "a").iterdir():
            if not path.stat().st_size:
                os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert len(list((tmp_path / "a").iterdir())) == 2  # the last one, and the one before, emptied just now


def test_nothing_that_is_not_ours_is_touched(tmp_path):
    foreign = tmp_path / "notes"
    foreign.mkdir()
    with SummaryWriter(str(foreign)) as writer:
        writer.add_scalar("x", 1.0, 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept.txt").write_text("kept")
    write_runs(tmp_path, {"a": {"m": [(0, 1.0)]}, "b": {"m": [(0, 1.0)]}})
    write_runs(tmp_path, {"a": {"m": [(0, 1.0)]}})
    assert read_scalars(foreign) == {"x": [(0, 1.0)]}
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["kept.txt"]


def test_a_runs_own_event_files_stay_if_the_report_is_written_beside_them(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("accuracy/last", 0.5, 0)
    (tmp_path / "results.json").write_text("{}")
    for _ in range(2):
        write_runs(tmp_path, {}, texts={"about": "x"})
    assert read_scalars(tmp_path) == {"accuracy/last": [(0, 0.5)]}
    assert len(filled(tmp_path)) == 2


def test_other_peoples_event_files_in_the_folder_of_a_report_stay(tmp_path):
    for folder in (tmp_path, tmp_path / "naive"):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar("mine", 0.5, 0)
    for _ in range(2):
        write_runs(tmp_path, {"naive": {"m": [(0, 1.0)]}}, texts={"about": "x"})
    assert read_scalars(tmp_path)["mine"] == read_scalars(tmp_path / "naive")["mine"] == [(0, 0.5)]


def test_runs_do_not_take_the_names_of_a_reports_files(tmp_path):
    (tmp_path / "report.html").write_text("page")
    places = write_runs(tmp_path, {"report.html": {"m": [(0, 1.0)]}})
    assert read_scalars(places["report.html"]) == {"m": [(0, 1.0)]}
    assert (tmp_path / "report.html").read_text() == "page"


def test_a_summary_of_an_earlier_version_is_replaced(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("accuracy/last/naive/mean", 0.5, 0)
        writer.add_custom_scalars({"Means": {"accuracy": ["Multiline", ["accuracy/last/naive/mean"]]}})
    write_runs(tmp_path, {"naive": {"m": [(0, 1.0)]}})
    assert read_scalars(tmp_path) == {}
    assert all(path.name.endswith(SUFFIX) for path in filled(tmp_path))


def test_a_failure_leaves_the_older_files(tmp_path):
    write_runs(tmp_path, {"a": {"m": [(0, 1.0)]}}, texts={"about": "x"})

    def broken():
        yield (0, 2.0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_runs(tmp_path, {"a": {"m": broken()}})
    assert read_scalars(tmp_path / "a") == {"m": [(0, 1.0)]} and not list(tmp_path.rglob("*.tmp"))


def test_a_tensorboard_that_runs_goes_on_to_the_new_file(tmp_path):
    layout = [Category("all", (Lines("m", ("m",)),))]
    write_runs(tmp_path, {"a": {"m": [(0, 1.0), (1, 2.0), (2, 3.0)]}}, layout=layout, texts={"about": "first"})
    run, summary = loaded(tmp_path / "a"), loaded(tmp_path)
    assert [event.value for event in run.Scalars("m")] == [1.0, 2.0, 3.0]
    for values in ([5.0, 6.0], [7.0]):
        write_runs(tmp_path, {"a": {"m": [*enumerate(values)]}}, layout=layout * len(values), texts={"about": "new"})
        run.Reload()
        summary.Reload()
        assert [(event.step, event.value) for event in run.Scalars("m")] == [*enumerate(values)]
        tensor = summary.Tensors("custom_scalars__config__")[-1].tensor_proto
        assert len(layout_pb2.Layout.FromString(tensor.string_val[0]).category) == len(values)
        assert summary.Tensors("about/text_summary")[-1].tensor_proto.string_val[0] == b"new"


def test_layout(tmp_path):
    charts = (Lines("one (a+b)", ("g/one (a+b)", "g/two")), Margin("band", "m", "l", "u"))
    write_runs(tmp_path, {}, layout=[Category("open", charts[:1]), Category("folded", charts[1:], closed=True)])
    tensor = loaded(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert [(c.title, c.closed) for c in layout.category] == [("open", False), ("folded", True)]
    patterns = layout.category[0].chart[0].multiline.tag
    assert [bool(re.match(patterns[0], tag)) for tag in ("g/one (a+b)", "g/one (a+b)/more")] == [True, False]
    series = layout.category[1].chart[0].margin.series[0]
    assert (series.value, series.lower, series.upper) == ("m", "l", "u")


def test_pictures_and_texts(tmp_path):
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().imshow(np.eye(3))
    write_runs(tmp_path, {}, images={"maps/one": figure}, texts={"about": "**bold**"})
    events = loaded(tmp_path)
    image = events.Images("maps/one")[0]
    (tmp_path / "one.png").write_bytes(image.encoded_image_string)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (image.width, image.height) and picture.size[0] > picture.size[1] > 200
    assert events.Tensors("about/text_summary")[0].tensor_proto.string_val[0] == b"**bold**"


def test_columns(tmp_path):
    columns = TableColumns(
        {
            "Method": ["a", "b", "b"],
            "Seed": [0, 0, 1],
            "lr": [0.1, None, None],
            "epochs": [5, 5, 5],
            "rate": [0.1, "[1, 2]", None],
            "many": [*range(12)],
        },
        {"accuracy/last": "last accuracy"},
        {"accuracy/last": "what it is"},
    )
    write_runs(tmp_path, {}, columns=columns)
    content = loaded(tmp_path).PluginTagToContent("hparams")["_hparams_/experiment"]
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    infos = {info.name: info for info in experiment.hparam_infos}
    assert {name for name, info in infos.items() if info.differs} == {"Method", "Seed", "lr", "rate", "many"}
    assert infos["lr"].type == api_pb2.DATA_TYPE_FLOAT64 and list(infos["lr"].domain_discrete) == [0.1]
    assert infos["Method"].type == infos["rate"].type == api_pb2.DATA_TYPE_STRING
    assert set(infos["rate"].domain_discrete) == {"0.1", "[1, 2]"}
    assert (infos["many"].domain_interval.min_value, infos["many"].domain_interval.max_value) == (0.0, 11.0)
    (metric,) = experiment.metric_infos
    assert (metric.name.tag, metric.display_name, metric.description) == (
        "accuracy/last",
        "last accuracy",
        "what it is",
    )
