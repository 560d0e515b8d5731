"""Loss, rates and phases against a plugin that writes everything down; exact continuation from a stored state."""

import copy

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_firn.evaluation.metrics import LearningRates, PhaseMetric, TrainingLoss, continual_metrics


class Losses(SupervisedPlugin):
    """The loss of every iteration with its batch size, and the phase of a made-up two-phase method."""

    def __init__(self):
        super().__init__()
        self.seen, self.epochs = [], []

    def before_training_epoch(self, strategy, **kwargs):
        strategy.phase = "probe" if strategy.clock.train_exp_epochs == 0 else "tune"
        self.epochs.append([])

    def after_training_iteration(self, strategy, **kwargs):
        self.seen.append((strategy.loss.item(), len(strategy.mb_y)))
        self.epochs[-1].append(self.seen[-1])

    def after_training_exp(self, strategy, **kwargs):
        strategy.phase = None


def mean(pairs):
    return sum(loss * size for loss, size in pairs) / sum(size for _, size in pairs)


def test_loss_rates_and_phases(tools):
    bench, log, spy = tools.benchmark(), tools.Collect(), Losses()
    learner = tools.strategy([TrainingLoss(every=3), LearningRates(), PhaseMetric()], [log], plugins=[spy])
    learner.train(bench.train_stream[0], eval_streams=[])
    learner.train(bench.train_stream[2], eval_streams=[])
    losses = log.curve("loss/train")
    ends = np.cumsum([len(epoch) for epoch in spy.epochs]).tolist()
    assert losses == [(end, pytest.approx(mean(epoch), rel=1e-6)) for end, epoch in zip(ends, spy.epochs, strict=True)]
    running = [(k, pytest.approx(mean(spy.seen[k - 3 : k]), rel=1e-6)) for k in range(3, len(spy.seen) + 1, 3)]
    assert log.curve("loss/running") == running
    assert log.curve("lr/backbone") == [(end, 0.02) for end in ends]
    assert log.curve("lr/group-1") == log.curve("lr/group-2") == [(end, 0.1) for end in ends]
    first, second, third, fourth = ends
    assert log.curve("phase/probe") == [(0, 1.0), (first, 0.0), (second, 1.0), (third, 0.0)]
    assert log.curve("phase/tune") == [(first, 1.0), (second, 0.0), (third, 1.0), (fourth, 0.0)]
    with pytest.raises(ValueError, match="every"):
        TrainingLoss(every=0)


def test_groups_of_the_same_name_do_not_hide_each_other(tools):
    metric, weight = LearningRates(), nn.Parameter(torch.zeros(1))
    groups = [{"lr": 0.1, "name": "head"}, {"lr": 0.2, "name": "head"}, {"lr": torch.tensor(0.5)}]
    fake = type("Fake", (), {"optimizer": type("Optimizer", (), {"param_groups": groups})})
    metric.before_training_iteration(fake)
    assert metric.result() == {"head": 0.1, "head-1": 0.2, "group-2": 0.5} and weight.numel() == 1


class AtIteration(SupervisedPlugin):
    """Calls ``act(plugin)`` once, before the given training iteration and before the metrics see it."""

    def __init__(self, at, act):
        super().__init__()
        self.at, self.act, self.result, self.mark = at, act, None, None

    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at and self.mark is None:
            self.result = self.act()
            self.mark = len(strategy.evaluator.loggers[0].values)


@pytest.mark.parametrize("at", [0, 1, 5, 13, 20])
def test_restored_in_the_middle_continues_exactly(tools, at):
    def make():
        return continual_metrics(loss_every=4, efficiency=False)

    def run(act):
        bench, log, metrics = tools.benchmark(), tools.Collect(), make()
        plugin = AtIteration(at, lambda: act(metrics))
        learner = tools.strategy(metrics, [log], plugins=[plugin, Losses()])
        learner.eval(bench.test_stream)
        for experience in bench.train_stream:
            learner.train(experience, eval_streams=[])
            learner.eval(bench.test_stream)
            learner.eval(bench.valid_stream)
        points = [(tag, x, value) for tag, x, value in log.values[plugin.mark :] if isinstance(value, float)]
        return plugin.result, points, [metric.state_dict() for metric in metrics]

    def take(metrics):
        return copy.deepcopy([metric.state_dict() for metric in metrics])

    def replace(metrics):  # by fresh ones, so that everything must come from the state
        for old, new, state in zip(metrics, make(), states, strict=True):
            new.load_state_dict(copy.deepcopy(state))
            old.__dict__ = new.__dict__

    states, expected, final = run(take)
    _, got, state = run(replace)
    assert len(expected) > 20 and got == expected and state == final


def test_state_is_plain_and_survives_the_hooks_of_a_resumed_epoch(tools):
    bench, log = tools.benchmark(), tools.Collect()
    metrics = continual_metrics(loss_every=4)
    taken = AtIteration(3, lambda: copy.deepcopy([metric.state_dict() for metric in metrics]))
    tools.strategy(metrics, [log], plugins=[taken]).train(bench.train_stream[0], eval_streams=[])
    states, hooks = taken.result, ["before_training", "before_train_dataset_adaptation"]
    hooks += ["before_training_exp", "before_training_epoch"]

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(plain(v) for v in value)
        return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))

    assert all(plain(state) for state in states)
    fresh = continual_metrics(loss_every=4, efficiency=False)
    learner = tools.strategy(fresh, [tools.Collect()])
    learner.experience = bench.train_stream[0]
    for metric, state in zip(fresh, states, strict=False):
        metric.load_state_dict(state)
        for hook in hooks:
            getattr(metric, hook)(learner)
    for metric, state in zip(fresh, states, strict=False):
        assert metric.state_dict() == state
