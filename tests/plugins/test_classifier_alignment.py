"""The alignment plugin's state: a round trip in each part of the cycle gives the same aligned heads."""

import pytest
import torch
from torch import nn

from avalanche_firn.models.parts import with_taskwise_head
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
