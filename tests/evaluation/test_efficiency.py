"""Costs: with a clock that the test holds, and inside a run."""

import torch
from torch import nn

from avalanche_firn.evaluation.efficiency import Efficiency, optimised_parameters, peak_memory_mib


def test_efficiency(tools, monkeypatch):
    bench, log = tools.benchmark(), tools.Collect()
    metric = Efficiency()
    learner = tools.strategy([metric], [log], epochs=2, eval_every=1)
    learner.model[0].requires_grad_(False)
    now = [0.0]

    def tick():  # every look at the clock takes one second
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("avalanche_firn.evaluation.efficiency.time.perf_counter", tick)
    for experience in bench.train_stream[:2]:
        learner.train(experience, eval_streams=[bench.test_stream])
    rates = log.curve("efficiency/images-per-second")
    sizes = [len(e.dataset) for e in bench.train_stream[:2]]
    assert rates[0][1] == sizes[0] and len(rates) == 4
    assert log.curve("efficiency/trainable-parameters") == [(0, 6 * 33), (1, 6 * 33)]
    seconds = log.curve("efficiency/seconds")
    assert [x for x, _ in seconds] == [0, 1] and 0 < seconds[0][1] < seconds[1][1] == metric.result()["seconds"]
    peaks = [value for _, value in log.curve("efficiency/peak-memory-MiB")]
    assert 50 < peaks[0] <= peaks[1] < 1e5

    restored = Efficiency()
    restored.load_state_dict(metric.state_dict())
    assert restored.result()["seconds"] == metric.result()["seconds"]
    assert restored.state_dict() == metric.state_dict()


def test_evaluation_time_is_not_training_time(tools, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("avalanche_firn.evaluation.efficiency.time.perf_counter", lambda: now[0])
    metric = Efficiency()
    parameter = nn.Parameter(torch.zeros(3))
    fake = type("Fake", (), {"device": "cpu", "mb_y": torch.zeros(10), "optimizer": torch.optim.SGD([parameter], 0.1)})
    fake.clock = type("Clock", (), {"train_iterations": 1, "train_exp_counter": 0})

    def at(time, hook):
        now[0] = time
        return getattr(metric, hook)(fake)

    at(1.0, "before_train_dataset_adaptation")
    at(2.0, "before_training_epoch")
    at(3.0, "after_training_iteration")
    at(4.0, "before_eval")
    at(104.0, "after_eval")
    (rate,) = at(107.0, "after_training_epoch")
    assert rate.value == 10 / 5
    at(107.0, "before_training_epoch")
    at(107.5, "after_training_iteration")
    (rate,) = at(108.0, "after_training_epoch")
    assert rate.value == 10 / 1
    emitted = {value.name: value.value for value in at(109.0, "after_training_exp")}
    assert emitted["efficiency/seconds"] == 8.0 and emitted["efficiency/trainable-parameters"] == 3
    at(200.0, "before_eval")
    at(300.0, "after_eval")
    assert metric.result()["seconds"] == 8.0

    at(400.0, "before_train_dataset_adaptation")
    at(401.0, "before_training_epoch")
    at(402.0, "before_training_iteration")
    at(403.0, "after_training_iteration")
    stored, metric = metric.state_dict(), Efficiency()  # `at` calls the new one: killed here, resumed at 900
    metric.load_state_dict(stored)
    at(900.0, "before_training_iteration")
    at(901.0, "after_training_iteration")
    (rate,) = at(902.0, "after_training_epoch")
    assert rate.value == 20 / 4
    emitted = {value.name: value.value for value in at(903.0, "after_training_exp")}
    assert emitted["efficiency/seconds"] == 14.0 and emitted["efficiency/trainable-parameters"] == 3


def test_optimised_parameters_and_memory(tools):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert optimised_parameters(torch.optim.SGD(model.parameters(), 0.1)) == 6
    assert optimised_parameters(torch.optim.SGD([model.bias], 0.1)) == 0
    assert peak_memory_mib("cpu") > 50
