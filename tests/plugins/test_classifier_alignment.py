"""The alignment plugin: its state survives a round trip in each part of the cycle; what it logs, counted by hand."""

import pytest
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_firn.experiments.slca_results import slca_curves
from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins import classifier_alignment
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.strategies.slca import SLCA


def strategy(lazy):
    torch.manual_seed(5)
    model = with_taskwise_head(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), feature_size=8)
    return SLCA(
        model=model,
        train_mb_size=8,
        eval_mb_size=8,
        evaluator=None,
        alignment=ClassifierAlignmentPlugin(lazy=lazy, seed=3),
    )


def plugin_of(strategy):
    return next(p for p in strategy.plugins if isinstance(p, ClassifierAlignmentPlugin))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("evaluate_first", [True, False])
def test_state_round_trip_between_tasks(stream_of, lazy, evaluate_first):
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    benchmark = stream_of(x, torch.arange(6).repeat_interleave(8), (2, 2, 2))
    whole, resumed = strategy(lazy), strategy(lazy)
    for i in range(2):
        torch.manual_seed(i)
        whole.train(benchmark.train_stream[i], eval_streams=[])
    if evaluate_first:
        whole.eval(benchmark.test_stream)
    resumed.model.load_state_dict(whole.model.state_dict())
    plugin_of(resumed).load_state_dict(plugin_of(whole).state_dict())
    for one in (whole, resumed):
        torch.manual_seed(2)
        one.eval(benchmark.test_stream)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for one in (whole, resumed):
        torch.manual_seed(2)
        one.train(benchmark.train_stream[2], eval_streams=[])
        one.eval(benchmark.test_stream)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_another_seed_gives_other_noise(stream_of):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    benchmark = stream_of(x, torch.arange(4).repeat_interleave(8), (2, 2))
    heads = []
    for seed in (3, 4, 3):
        one = strategy(True)
        plugin_of(one).seed = seed
        for i, experience in enumerate(benchmark.train_stream):
            torch.manual_seed(i)
            one.train(experience, eval_streams=[])
        one.eval(benchmark.test_stream)
        heads.append(one.model.head.weight_matrix()[0])
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


class Published(BaseLogger):
    """Name -> (step, value) of everything that was logged."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_single_metric(self, name, value, x_plot):
        self.values.setdefault(name, []).append((x_plot, value))


def watched(lazy, logger):
    one = strategy(lazy)
    one.evaluator = EvaluationPlugin(loggers=[logger])
    one.plugins = [p for p in one.plugins if not isinstance(p, EvaluationPlugin)] + [one.evaluator]
    return one


@pytest.mark.parametrize("lazy", [True, False])
def test_what_is_logged_equals_alignment_by_hand(stream_of, monkeypatch, lazy):
    calls, plain = [], classifier_alignment.align_classifier

    def recorded(weight, bias, batches, class_task, **settings):
        """The same alignment, and a second one of the same batches, whose losses are taken here."""
        kept = [list(batches(epoch)) for epoch in range(settings["epochs"])]
        losses = []
        by_hand = plain(
            weight, bias, kept.__getitem__, class_task, **settings | {"on_epoch": lambda _, x: losses.append(x)}
        )
        found = plain(weight, bias, kept.__getitem__, class_task, **settings)
        assert all(torch.equal(a, b) for a, b in zip(by_hand, found, strict=True))
        calls.append((losses, float((found[0] - weight).norm() / weight.norm())))
        return found

    monkeypatch.setattr(classifier_alignment, "align_classifier", recorded)
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    benchmark = stream_of(x, torch.arange(6).repeat_interleave(8), (2, 2, 2))
    logger = Published()
    one = watched(lazy, logger)
    for i, experience in enumerate(benchmark.train_stream):
        torch.manual_seed(i)
        one.train(experience, eval_streams=[])
        one.eval(benchmark.test_stream[: i + 1])
    assert len(calls) == 2 and [entry["task"] for entry in plugin_of(one).history] == [1, 2]
    for name, expected in (
        ("loss-first", [losses[0] for losses, _ in calls]),
        ("loss-last", [losses[-1] for losses, _ in calls]),
        ("head-change", [change for _, change in calls]),
    ):
        found = logger.values[f"slca/alignment/{name}"]
        assert [step for step, _ in found] == [1, 2]
        assert [value for _, value in found] == pytest.approx(expected, rel=1e-5)
        assert [entry[name] for entry in plugin_of(one).history] == [value for _, value in found]
        assert slca_curves(one)[f"slca/alignment/{name}"] == [None, *(value for _, value in found)]


def test_logging_changes_nothing(stream_of):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    benchmark = stream_of(x, torch.arange(4).repeat_interleave(8), (2, 2))
    ends = []
    for one in (strategy(True), watched(True, Published())):
        for i, experience in enumerate(benchmark.train_stream):
            torch.manual_seed(i)
            one.train(experience, eval_streams=[])
            one.eval(benchmark.test_stream[: i + 1])
        ends.append((one.model.state_dict(), torch.get_rng_state()))
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


def test_history_is_part_of_the_state_and_older_states_have_none(stream_of):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    benchmark = stream_of(x, torch.arange(4).repeat_interleave(8), (2, 2))
    one, other = strategy(False), strategy(False)
    assert slca_curves(one) == {}
    for experience in benchmark.train_stream:
        one.train(experience, eval_streams=[])
    state = plugin_of(one).state_dict()
    assert len(state["history"]) == 1 and set(state["history"][0]) == {"task", "loss-first", "loss-last", "head-change"}
    plugin_of(other).load_state_dict(state)
    assert plugin_of(other).history == plugin_of(one).history
    plugin_of(other).history[0]["task"] = 9
    assert plugin_of(one).history[0]["task"] == 1 == state["history"][0]["task"]
    plugin_of(other).load_state_dict({name: value for name, value in state.items() if name != "history"})
    assert plugin_of(other).history == []
