"""The rate of a transfer: which one is chosen, what is passed on, and how far the envelope is above every run."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_firn.strategies.transfer import TransferResult, continual_transfer, iid_transfer
from avalanche_firn.strategies.transfer_start import TransferTask
from avalanche_firn.strategies.transfer_sweep import RELEASED_RATES, RateSweep, sweep_rates


def sweep(accuracy, rates=None, diverged=None):
    """From ``(rates, trials, points)`` nested lists."""
    values = torch.tensor(accuracy, dtype=torch.float64)
    rates = tuple(0.1**i for i in range(len(values))) if rates is None else tuple(rates)
    flags = torch.zeros(values.shape[:2], dtype=torch.bool) if diverged is None else torch.tensor(diverged)
    return RateSweep(rates, tuple(range(1, values.shape[2] + 1)), values, flags)


def test_the_best_rate_is_that_of_the_highest_mean_at_the_last_point():
    result = sweep([[[0.9, 0.5], [0.9, 0.4]], [[0.1, 0.6], [0.1, 0.5]], [[0.2, 0.9], [0.2, 0.1]]], (0.1, 0.01, 0.001))
    assert result.best == 0.01
    assert not result.at_edge


def test_ties_go_to_the_smaller_rate():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last digit."""
    trials = list(itertools.permutations([0.1, 0.2, 0.3]))
    assert len({sum(t) for t in trials}) > 1
    for rates in ((1e-3, 1e-2, 0.1, 0.2, 0.3, 0.5), (0.5, 0.3, 0.2, 0.1, 1e-2, 1e-3)):
        result = sweep([[[value] for value in trial] for trial in trials], rates)
        assert result.best == 1e-3


def test_rates_that_diverged_come_last():
    """In any trial, however well the others went; if all of them did, the best of them stands."""
    accuracy = [[[0.9], [0.9]], [[0.2], [0.2]], [[0.3], [0.3]]]
    assert sweep(accuracy, diverged=[[False, True], [False, False], [False, False]]).best == pytest.approx(0.01)
    assert sweep(accuracy, diverged=[[False, True], [False, False], [True, False]]).best == pytest.approx(0.1)
    assert sweep(accuracy, diverged=[[True, True]] * 3).best == 1.0


@pytest.mark.parametrize(
    ("scores", "edge"),
    [([0.9, 0.1, 0.1], True), ([0.1, 0.9, 0.1], False), ([0.1, 0.1, 0.9], True), ([0.5], False), ([0.2, 0.1], True)],
)
def test_whether_the_best_rate_is_at_the_edge(scores, edge):
    """Of the values, not of the order in which they were given."""
    accuracy, rates = [[[score]] for score in scores], [0.1, 0.01, 0.001][: len(scores)]
    assert sweep(accuracy, rates).at_edge == edge
    turned = [1, 2, 0] if len(scores) == 3 else range(len(scores))
    assert sweep([accuracy[i] for i in turned], [rates[i] for i in turned]).at_edge == edge


@settings(max_examples=50, deadline=None)
@given(
    data=st.integers(1, 4).flatmap(
        lambda points: st.lists(
            st.lists(st.floats(0, 1), min_size=2 * points, max_size=2 * points), min_size=1, max_size=4
        )
    )
)
def test_no_curve_is_above_the_envelope(data):
    values = torch.tensor(data, dtype=torch.float64).view(len(data), 2, -1)
    result = sweep(values.tolist())
    envelope = result.envelope()
    assert envelope.shape == (values.shape[2],)
    for rate in values:
        assert (envelope >= rate.mean(0) - 1e-15).all()
    for point, height in enumerate(envelope):
        assert float(height) in [float(rate.mean(0)[point]) for rate in values]


def test_the_envelope_of_crossing_curves_is_no_run():
    result = sweep([[[0.9, 0.1]], [[0.2, 0.8]]])
    assert result.envelope().tolist() == [0.9, 0.8]


# ---------------------------------------------------------------------- the runs
def tasks(count=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, 5, generator=generator) + 2 * torch.eye(count, 5)[:, None]
    return [
        TransferTask(x[:5], torch.full((5,), c), x[5:], torch.full((3,), c)) for c, x in enumerate(images)
    ]  # fmt: skip


def network():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("backbone", nn.Sequential(nn.Linear(5, 6), nn.Tanh()))
    model.add_module("head", nn.Linear(6, 3))
    return model


@pytest.mark.parametrize("transfer", [continual_transfer, iid_transfer])
def test_every_rate_runs_with_the_same_seeds(transfer):
    """Against single calls; settings are passed on."""
    options = {"log_every": 2} | ({"shuffle_tasks": True} if transfer is continual_transfer else {"epochs": 3})
    rates = (0.1, 1e-3)
    result = sweep_rates(transfer, network(), tasks(), rates, trials=2, seed=7, **options)
    assert result.rates == rates and result.accuracy.dtype == torch.float64
    for i, rate in enumerate(rates):
        for trial in range(2):
            run = transfer(network(), tasks(), lr=rate, seed=7 + trial, **options)
            assert torch.equal(result.accuracy[i, trial], run.curve)
            assert bool(result.diverged[i, trial]) == run.diverged
            assert result.logged_after == run.logged_after
    assert not torch.equal(result.accuracy[:, 0], result.accuracy[:, 1])


def test_a_rate_that_is_too_large_is_not_chosen():
    result = sweep_rates(continual_transfer, network(), tasks(), (1e38, 0.01), trials=2, optimizer=torch.optim.SGD)
    assert result.diverged.tolist() == [[True, True], [False, False]]
    assert result.best == 0.01


def test_the_released_rates():
    """Method card: nine rates from 0.055 to 4e-5."""
    assert len(RELEASED_RATES) == 9 and max(RELEASED_RATES) == 0.055 and min(RELEASED_RATES) == 4e-5
    assert list(RELEASED_RATES) == sorted(RELEASED_RATES, reverse=True)


@pytest.mark.parametrize(
    ("rates", "trials", "message"),
    [
        ((), 1, r"rates is \[\]"),
        ((0.1, 0.1), 1, "each once"),
        ((0.1, -0.1), 1, "0 or above"),
        ((0.1, float("nan")), 1, "0 or above"),
        ((0.1,), 0, "trials is 0"),
    ],
)
def test_errors_come_before_any_run(rates, trials, message):
    def never(*args, **kwargs) -> TransferResult:
        raise AssertionError("a transfer was started")

    with pytest.raises(ValueError, match=message):
        sweep_rates(never, network(), tasks(), rates, trials=trials)
