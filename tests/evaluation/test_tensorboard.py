"""What lands in event files, read back from disk."""

import os
import re
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from avalanche_firn.evaluation.statistics import mean_interval
from avalanche_firn.evaluation.tensorboard import (
    flatten,
    log_hparams,
    log_text_config,
    read_scalars,
    summary_tag,
    write_summary,
)


def accumulator(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def hparams_of(path):
    events, found = accumulator(path), {}
    for tag, content in events.PluginTagToContent("hparams").items():
        found[tag.rsplit("/", 1)[-1]] = plugin_data_pb2.HParamsPluginData.FromString(content)
    return found


def test_hparams_live_in_the_runs_own_file(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("accuracy/last", 0.5, 0)
        writer.add_scalar("accuracy/last", 0.75, 1)
        log_hparams(
            writer, {"method": "slca", "training": {"lr": 0.1, "nesterov": True, "warmup": None}}, ["accuracy/last"]
        )
    assert len(os.listdir(tmp_path)) == 1
    found = hparams_of(tmp_path)
    start = found["session_start_info"].session_start_info.hparams
    assert start["method"].string_value == "slca" and start["training.lr"].number_value == 0.1
    assert start["training.nesterov"].string_value == "true" and start["training.warmup"].string_value == "none"
    experiment = found["experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["accuracy/last"]
    assert {info.name for info in experiment.hparam_infos} == set(start)
    assert found["session_end_info"].session_end_info.status == 1  # success
    assert read_scalars(tmp_path) == {"accuracy/last": [(0, 0.5), (1, 0.75)]}


def test_hparams_write_values_of_a_mapping_and_open_a_lazy_writer(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        log_hparams(writer, {"seed": 0}, {"final/last": 0.5, "final/forward": None, "final/nan": float("nan")})
        with pytest.raises(ValueError, match="hparams"):
            log_hparams(writer, {}, ["a"])
    assert read_scalars(tmp_path) == {"final/last": [(0, 0.5)]}
    infos = hparams_of(tmp_path)["experiment"].experiment.metric_infos
    assert [info.name.tag for info in infos] == ["final/last"]


def test_flatten():
    nested = {"a": {"b": {"c": 1}}, "list": [1, "x"], "none": None, "flag": False, "path": os}
    flat = flatten(nested)
    assert flat["a.b.c"] == 1 and flat["list"] == '[1, "x"]' and flat["none"] == "none" and flat["flag"] is False
    assert isinstance(flat["path"], str)


def test_config_is_verbatim_text(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        log_text_config(writer, "method: slca\n# ``` *not* markdown\n  lr: 0.1")
    events = accumulator(tmp_path)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["    method: slca", "    # ``` *not* markdown", "      lr: 0.1"]


def layout_of(path):
    proto = accumulator(path).Tensors("custom_scalars__config__")[0].tensor_proto
    return {
        c.title: {chart.title: chart for chart in c.chart}
        for c in layout_pb2.Layout.FromString(proto.string_val[0]).category
    }


def test_hparams_without_the_experiment_are_a_row_only(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        log_hparams(writer, {"Method": "slca", "Seed": 1}, {"efficiency/run-seconds": 3.5}, experiment=False)
    found = hparams_of(tmp_path)
    assert set(found) == {"session_start_info", "session_end_info"}
    assert found["session_start_info"].session_start_info.hparams["Method"].string_value == "slca"
    assert read_scalars(tmp_path) == {"efficiency/run-seconds": [(0, 3.5)]}


def test_summary_has_a_run_per_method(tmp_path):
    naive, joint = [[0.9, 0.5, 0.3], [0.8, 0.6, 0.2], [0.7, 0.4, np.nan]], [[0.97]]
    curves = {
        "accuracy/last": {"naive (sgd)": naive, "joint": joint},
        "forgetting/average": {"naive (sgd)": [[np.nan, 0.4]]},
    }
    (tmp_path / "report.md").write_text("kept")
    for _ in range(2):  # the second call replaces the first
        written = write_summary(tmp_path, curves)
    assert (tmp_path / "report.md").exists()
    scalars = read_scalars(tmp_path / "naive (sgd)")
    interval = mean_interval([0.9, 0.8, 0.7])
    assert scalars["All methods/accuracy/last"][0][1] == pytest.approx(interval.mean)
    assert scalars["interval over seeds/accuracy/last/lower"][0][1] == pytest.approx(interval.lower)
    assert scalars["interval over seeds/accuracy/last/upper"][0][1] == pytest.approx(interval.upper)
    assert [step for step, _ in scalars["interval over seeds/accuracy/last/upper"]] == [0, 1, 2]
    assert scalars["All methods/forgetting/average"] == [(1, pytest.approx(0.4))]
    assert read_scalars(tmp_path / "joint") == {"All methods/accuracy/last": [(0, pytest.approx(0.97))]}
    assert read_scalars(tmp_path) == {}  # all lines of one run would have one colour

    assert list(written) == ["naive (sgd)", "joint"] and list(written["joint"]["accuracy/last"]) == ["mean"]
    flat = {
        summary_tag(metric, part): [(step, np.float32(value)) for step, value in points]
        for metric, parts in written["naive (sgd)"].items()
        for part, points in parts.items()
    }
    assert flat == scalars

    layout = layout_of(tmp_path)
    means, bands = layout["All methods: mean over seeds"], layout["All methods: 95% intervals over seeds"]
    assert list(means) == ["accuracy/last", "forgetting/average"]
    for metric, chart in means.items():  # exactly the tag of the means, which no seed's run has
        matched = [tag for tag in [*scalars, metric] if re.match(chart.multiline.tag[0], tag)]
        assert len(chart.multiline.tag) == 1 and matched == [f"All methods/{metric}"]
    assert list(bands) == ["accuracy/last: mean and interval"]
    series = bands["accuracy/last: mean and interval"].margin.series[0]
    assert [series.value, series.lower, series.upper] == [
        summary_tag("accuracy/last", part) for part in ("mean", "lower", "upper")
    ]


def test_summary_pads_seeds_and_refuses_none(tmp_path):
    write_summary(tmp_path, {"m": {"a": [[0.5, 0.25], [0.5]]}})
    assert read_scalars(tmp_path / "a")["All methods/m"] == [(0, 0.5), (1, 0.25)]
    with pytest.raises(ValueError, match="without seeds"):
        write_summary(tmp_path, {"m": {"a": []}})


def test_summary_at_given_steps(tmp_path):
    curves = {"m": {"a": [[0.5, 0.25, 0.75], [0.5, 0.25]]}, "n": {"a": [[1.0, 2.0]]}}
    write_summary(tmp_path, curves, steps={"m": [1, 10, 67]})
    scalars = read_scalars(tmp_path / "a")
    assert scalars["All methods/m"] == [(1, 0.5), (10, 0.25), (67, 0.75)]
    assert [step for step, _ in scalars["interval over seeds/m/upper"]] == [1, 10]  # the last point has one seed
    assert scalars["All methods/n"] == [(0, 1.0), (1, 2.0)]
    for steps, reason in (({"m": [1, 10]}, "2 for m, whose longest curve has 3"), ({"x": [1]}, "x")):
        with pytest.raises(ValueError, match=rf"steps: .*{reason}"):
            write_summary(tmp_path, curves, steps=steps)
    assert read_scalars(tmp_path / "a") == scalars  # refused before the older summary was replaced


def test_read_scalars_keeps_every_point_and_honours_a_purge(tmp_path):
    with SummaryWriter(str(tmp_path), filename_suffix=".0") as writer:
        for step in range(12_000):
            writer.add_scalar("loss/train", 1.0, step)
    time.sleep(1.1)  # files are read in the order of their names, which begin with the second of their creation
    with SummaryWriter(str(tmp_path), filename_suffix=".1", purge_step=11_000) as writer:
        writer.add_scalar("loss/train", 2.0, 11_000)
    points = read_scalars(tmp_path)["loss/train"]
    assert len(points) == 11_001 and points[-1] == (11_000, 2.0)
    with pytest.raises(FileNotFoundError, match="event file"):
        read_scalars(tmp_path / "elsewhere")
