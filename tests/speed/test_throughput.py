"""Training, evaluation and CILA's step against hand-written loops: equal work, complete rows, small sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from speed import contrastive_step, evaluation, throughput
from speed.measure import Row, Settings
from speed.throughput import BASELINE, Case, Contest
from speed.workload import Batched, EpochClock, Laps, OnDevice, as_it_is, deviation, held, network, recorded, stream_of

CPU = torch.device("cpu")
SMALL = Case("mlp", 0, 16, 72, bound=1.3)  # the last batch is smaller than the others


@cache
def quick(name: str) -> list[Row]:
    modules = {"throughput": throughput, "evaluation": evaluation, "contrastive_step": contrastive_step}
    return modules[name].rows(Settings(quick=True, command="python -m speed --quick"))


@pytest.mark.parametrize("name", ["throughput", "evaluation", "contrastive_step"])
def test_a_quick_run_gives_complete_rows(name):
    rows = quick(name)
    for row in rows:
        assert row.benchmark == name and row.case and row.device.startswith("CPU, ")
        assert row.precision == "fp32" and row.command and row.date and row.load_average is not None
        assert row.seconds and row.seconds > 0 and row.images_per_second and row.images_per_second > 0
        assert row.ratio and row.ratio > 0 and len(row.all_ratios) == len(row.all_seconds) == 1
    for case in {row.case for row in rows}:
        mine = [row for row in rows if row.case == case]
        assert {row.to_what for row in mine} == {mine[0].contestant} and mine[0].ratio == 1
        assert [row.contestant for row in mine if row.bound] == [
            r.contestant for r in mine if "fast path" in r.contestant
        ]


def test_all_contestants_of_a_case_end_with_the_same_weights():
    for row in quick("throughput"):
        assert row.details["weights_deviation"] < 1e-6


def test_the_breakdown_has_every_part_for_every_contestant():
    parts = {"fetch a batch", "hooks, zero_grad", "forward", "loss", "backward", "optimizer"}
    for row in quick("throughput"):
        laps = row.details["microseconds_per_iteration"]
        assert set(laps) == parts and all(value >= 0 for value in laps.values())


def test_evaluations_find_the_accuracies_of_the_raw_loop():
    ours = [row for row in quick("evaluation") if row.contestant.startswith("ours")]
    assert len(ours) == 4 and all(row.details["accuracy_deviation"] < 1e-6 for row in ours)


def test_a_case_can_be_asked_for_by_name():
    rows = contrastive_step.rows(Settings(quick=True, case="digit"))
    assert {row.case for row in rows} == {"digit_convnet, 28 px, batch 32, 2 steps"}
    assert throughput.rows(Settings(quick=True, case="no such case")) == []


def test_cases_for_a_gpu_alone_are_left_out_on_a_cpu():
    base = next(case for case in throughput.CASES if "base" in case.backbone)
    assert base.where == ("cuda",) and base.precision == "bf16" and 1 / base.bound == pytest.approx(0.95)
    assert not any("vit_base" in row.case for row in quick("throughput"))


def test_sizes_follow_the_device():
    small = next(case for case in throughput.CASES if "small" in case.backbone)
    on_gpu = small.at(torch.device("cuda"))
    assert (on_gpu.batch, on_gpu.images) == (128, 1280) and small.at(CPU) == small


def test_a_contest_trains_every_sample_once_an_epoch():
    """Seen by the model itself: batches of 16, the last one of 8."""
    contest = Contest(SMALL, CPU)
    seen: dict[str, list[int]] = {}
    for name in contest.contestants():
        sizes: list[int] = []
        contest.template.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        contest.train(name, EpochClock(CPU))
        seen[name] = sizes
        contest.template._forward_pre_hooks.clear()
    assert seen == {name: [16, 16, 16, 16, 8] for name in contest.contestants()}


def test_contestants_share_the_order_of_the_data():
    contest = Contest(SMALL, CPU)
    models = {name: contest.train(name, EpochClock(CPU)) for name in contest.contestants()}
    assert all(deviation(model, models[BASELINE]) < 1e-6 for model in models.values())
    other = contest.train(BASELINE, EpochClock(CPU, seed=9))
    assert deviation(other, models[BASELINE]) > 1e-6


def test_bf16_reaches_loops_and_strategies():
    contest = Contest(replace(SMALL, precision="bf16"), CPU)
    plain = Contest(SMALL, CPU).train(BASELINE, EpochClock(CPU))
    loop, ours = (contest.train(name, EpochClock(CPU)) for name in (BASELINE, "SLCA, fast path"))
    assert deviation(loop, plain) > 1e-7
    assert deviation(loop, ours) < 1e-6


def test_the_contest_has_two_rates_of_the_same_ratio_everywhere():
    contest = Contest(SMALL, CPU)
    for name in ("Naive", "SLCA"):
        with recorded() as log:
            strategy = throughput.strategy_for(name, contest.template, SMALL, 1, CPU, log)
            strategy.train(contest.experiences[False], eval_streams=[])
            assert sorted(group["lr"] for group in strategy.optimizer.param_groups) == pytest.approx([1e-4, 1e-2])


# ----------------------------------------------------------------------------------------------------- workload
def test_the_clock_surrounds_the_hooks_of_all_plugins():
    order: list[str] = []

    class Told(EpochClock):
        def start(self):
            order.append("start")
            super().start()

        def stop(self):
            super().stop()
            order.append("stop")

    class Other(throughput._StageOne):
        def before_training_epoch(self, strategy, **kwargs):
            order.append("before")

        def after_training_epoch(self, strategy, **kwargs):
            order.append("after")

    contest = Contest(SMALL, CPU)
    with recorded() as log:
        strategy = throughput.strategy_for("Naive", contest.template, SMALL, 2, CPU, log)
        strategy.plugins.append(Other(epochs=0))
        clock = Told(CPU)
        clock.install(strategy)
        strategy.train(contest.experiences[False], eval_streams=[])
    assert order == ["start", "before", "after", "stop"] * 2 and len(clock.epochs) == 2


def test_pixels_are_normalised_inside_the_network():
    images = held("vit_firn_32", 8, 4).tensors[0]
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 8, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(OnDevice(nn.Identity())(images), expected)


def test_batched_fetching_gives_the_samples_asked_for():
    data = held("mlp", 0, 20)
    x, y = as_it_is(Batched(data).__getitems__([3, 1, 19]))
    assert torch.equal(x, data.tensors[0][[3, 1, 19]]) and y.tolist() == [3, 1, 9]


def test_networks_are_always_the_same_and_need_no_task():
    first, second = network("mlp", 0), network("mlp", 0)
    assert deviation(first, second) == 0 and first(torch.zeros(2, 64)).shape == (2, 10)
    assert sum(p.numel() for p in first.parameters()) == 64 * 64 + 64 + 64 * 10 + 10


def test_a_stream_has_an_experience_per_data_set():
    parts = evaluation.by_class(held("mlp", 0, 40))
    benchmark = stream_of(parts, parts)
    assert [e.classes_in_this_experience for e in benchmark.test_stream] == [{c} for c in range(10)]


def test_laps_add_up_per_iteration():
    laps = Laps(CPU)
    laps.start()
    laps.lap("a")
    laps.seconds["a"] = 3e-3
    assert laps.microseconds(2) == {"a": 1500.0}


def test_recorded_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with recorded():
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
