"""The lagged cosine: golden rates, through FreshOptimizerPlugin, resume, limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.schedules import SchedulerFactory, lagged_cosine

Golden = Callable[[str, str], dict[str, Any]]


def rates(factory: SchedulerFactory, bases: list[float], epochs: int) -> np.ndarray:
    """Rate of every epoch and group."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": base} for base in bases]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler, table = factory(optimizer), []
    for _ in range(epochs):
        table.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(table)


@pytest.mark.parametrize("row", range(4))
def test_golden_rates(golden: Golden, row: int) -> None:
    file = golden("lorac_ipc", "lr_schedule")
    raw, task0, batch, epochs, _, base = file["setting"][row]
    wanted = file["lr_used"][row, : int(epochs)]
    assert np.isnan(file["lr_used"][row, int(epochs) :]).all() and not np.isnan(wanted).any()
    assert base == pytest.approx(task0 if task0 and row == 2 else raw * batch / 256, rel=1e-12)
    bases = [float(base), float(base * file["omega_lr_scale"])]
    got = rates(lagged_cosine(int(epochs), float(file["min_lr"])), bases, int(epochs))
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=0)


def test_formula_with_a_base_of_its_own_for_each_group() -> None:
    bases, epochs, floor = [0.5, 0.02, 1e-4], 7, 1e-3
    table = rates(lagged_cosine(epochs, floor), bases, epochs)
    for epoch in range(epochs):
        for column, base in enumerate(bases):
            wanted = floor + (base - floor) * (1 + math.cos(math.pi * max(epoch - 1, 0) / epochs)) / 2
            # the last group starts below the floor and stays there
            assert table[epoch, column] == pytest.approx(min(base, wanted), rel=1e-12)
    assert (table[0] == bases).all() and (table[1] == bases).all()


@settings(max_examples=50, deadline=None)
@given(base=st.floats(0, 1), floor=st.floats(0, 1), epochs=st.integers(1, 12))
def test_rates_never_rise_and_stay_at_the_floor_after_the_end(base: float, floor: float, epochs: int) -> None:
    column = rates(lagged_cosine(epochs, floor), [base], epochs + 4)[:, 0]
    assert (np.diff(column) <= 1e-15).all() and column[0] == pytest.approx(base, rel=1e-12, abs=1e-17)  # of rounding
    np.testing.assert_allclose(column[epochs + 1 :], min(base, floor), rtol=1e-12, atol=1e-17)
    assert (column >= min(base, floor) * (1 - 1e-12)).all()


class TwoRates(FreshOptimizerPlugin):
    """Weight and bias in groups of their own."""

    def groups(self, strategy: Any) -> list[dict[str, Any]]:
        return [
            {"params": [strategy.model.weight], "name": "weight", "lr_scale": 1.0},
            {"params": [strategy.model.bias], "name": "bias", "lr_scale": 0.1},
        ]


class Rates(SupervisedPlugin):
    """Rates at the start of every epoch; the state of the schedule and the optimizer during one of them."""

    def __init__(self, plugin: TwoRates, keep: int) -> None:
        super().__init__()
        self.plugin, self.keep = plugin, keep
        self.table: list[list[float]] = []
        self.state, self.rates = "", [0.0]

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.rates = [group["lr"] for group in strategy.optimizer.param_groups]
        if len(self.table) == self.keep:
            self.state = json.dumps(self.plugin.state_dict())  # fails for anything that is not plain
        self.table.append(self.rates)


@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_in_every_experience_anew_and_from_a_saved_state(stream_of: Callable[..., Any]) -> None:
    epochs, floor, keep = 6, 1e-3, 8  # the third epoch of the second experience
    benchmark = stream_of(torch.randn(8, 2), np.arange(4).repeat(2), [2, 2])
    model = nn.Linear(2, 4)
    plugin = TwoRates(scheduler_factory=lagged_cosine(epochs, floor))
    record = Rates(plugin, keep)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.2), train_mb_size=4, train_epochs=epochs,
        plugins=[plugin, record], evaluator=None,
    )  # fmt: skip
    strategy.train(benchmark.train_stream)
    one = rates(lagged_cosine(epochs, floor), [0.2, 0.2 * 0.1], epochs)
    np.testing.assert_array_equal(record.table, np.concatenate([one, one]))

    resumed = TwoRates(scheduler_factory=lagged_cosine(epochs, floor))
    groups = [{"params": [p], "lr": lr} for p, lr in zip((model.weight, model.bias), [0.2, 0.2 * 0.1], strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    resumed.scheduler = lagged_cosine(epochs, floor)(optimizer)
    resumed.load_state_dict(json.loads(record.state))
    for epoch in range(keep + 1, 2 * epochs):
        optimizer.step()
        resumed.after_training_epoch(None)
        assert [group["lr"] for group in optimizer.param_groups] == record.table[epoch]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lagged_cosine(0), "epochs is 0"),
        (lambda: lagged_cosine(3, -1.0), "floor is -1.0"),
        (lambda: lagged_cosine(3, math.nan), "floor is nan"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
