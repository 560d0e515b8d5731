"""Checks that several processes go through together, as a program under ``torchrun``: ``checks.py FOLDER``.

What becomes of each stands in ``FOLDER/RANK.json``: "" or the error.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates.base_sgd import PeriodicEval
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import TensorDataset

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier, extract_features
from avalanche_firn.models.processes import (
    all_rows,
    mean_over_processes,
    own_rows,
    process_count,
    process_rank,
    same_everywhere,
)
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.distributed import DistributedPlugin
from avalanche_firn.plugins.process_group import start_processes
from avalanche_firn.strategies.zapping import ASB

X, Y = load_digits(return_X_y=True)
X, Y = torch.tensor(X) / 16, torch.tensor(Y)  # float64: only order of sums differs


def data(part: slice) -> TensorDataset:
    found = TensorDataset(X[part], Y[part])
    found.targets = Y[part].tolist()  # type: ignore[attr-defined]
    return found


def stream(train: int = 120) -> Any:
    return class_incremental_benchmark(
        {"train": data(slice(0, train)), "test": data(slice(400, 450))},
        class_order=list(range(10)),
        num_classes_per_exp=[4, 3, 3],
    )


def network(dropout: float = 0.0) -> FeatureClassifier:
    body = nn.Sequential(nn.Linear(64, 24), nn.LayerNorm(24), nn.ReLU(), nn.Dropout(dropout))
    return FeatureClassifier(body, TaskwiseLinearHead(24, freeze_old=False)).double()


def naive(model: nn.Module, *plugins: Any, **settings: Any) -> Naive:
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True, stream=True), loss_metrics(epoch=True, stream=True), loggers=[]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": 7, "train_epochs": 2, "eval_mb_size": 8}
    return Naive(
        model=model, optimizer=optimizer, plugins=list(plugins), evaluator=evaluator, **{**options, **settings}
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])


# ----------------------------------------------------------------------------------------------------- rows
def check_rows_make_a_batch() -> None:
    world = process_count()
    for count in range(1, 3 * world + 2):
        rows = own_rows(count)
        sizes = [count // world + (r < count % world) for r in range(world)]
        expected = sum(sizes[: process_rank()])
        size = sizes[process_rank()]
        assert (rows.start, rows.stop) == ((expected, expected + size) if size else (0, 1)), (count, rows)
    with pytest.raises(ValueError, match="count is 0"):
        own_rows(0)


def check_all_rows_are_those_of_the_batch() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        for count in range(1, 8):
            for views in (1, 2, 3):
                whole = (torch.arange(views * count * 6).view(views, count, 2, 3) % 5).to(dtype)
                own = whole[:, own_rows(count)].flatten(0, 1)
                assert torch.equal(all_rows(own, count), whole.flatten(0, 1)), (dtype, count, views)
    assert all_rows(torch.zeros(len(range(7)[own_rows(7)]), 0), 7).shape == (7, 0)
    with pytest.raises(ValueError, match="a multiple of them"):
        all_rows(torch.zeros(len(range(7)[own_rows(7)]) + 1, 2), 7)


def check_mean_gradients_are_those_of_the_batch() -> None:
    """Of a loss over pairs of rows, and of a term of the weights alone."""
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 8):
        for views in (1, 2):
            x = torch.randn(views, count, 4, generator=generator, dtype=torch.float64)
            start = torch.randn(4, 3, generator=generator, dtype=torch.float64)

            def loss(z: Tensor, w: Tensor) -> Tensor:
                return (z @ z.T).tanh().sum() / len(z) + 0.3 * w.square().sum()

            alone = start.clone().requires_grad_()
            expected_loss = loss((x @ alone).flatten(0, 1), alone)
            expected_loss.backward()
            shared = start.clone().requires_grad_()
            found = loss(all_rows((x[:, own_rows(count)] @ shared).flatten(0, 1), count), shared)
            found.backward()
            assert shared.grad is not None and alone.grad is not None
            torch.testing.assert_close(found, expected_loss)
            torch.testing.assert_close(mean_over_processes(shared.grad), alone.grad)


def check_bits_are_compared() -> None:
    assert same_everywhere(torch.arange(5.0)) and same_everywhere(torch.tensor(float("nan")))
    assert not same_everywhere(torch.tensor([0.0, float(process_rank())]))


def check_features_are_those_of_one_process() -> None:
    torch.manual_seed(3)
    model = network()
    for count in (1, 2, 5, 40):
        experience = stream().train_stream[0]
        subset = experience.dataset.subset(range(count)).eval()
        before = torch.get_rng_state()
        features, targets = extract_features(model, subset, batch_size=3)
        assert torch.equal(before, torch.get_rng_state())
        with torch.no_grad():
            model.eval()
            expected = torch.cat([model.backbone(subset[i][0][None]) for i in range(count)])
        torch.testing.assert_close(features, expected)
        assert targets.tolist() == [int(subset[i][1]) for i in range(count)]


# ------------------------------------------------------------------------------------------------- training
def trained(plugins: Callable[[], list[Any]], model: nn.Module, **settings: Any) -> tuple[Naive, list[Any]]:
    """Three tasks; the strategy and what the evaluator gave."""
    strategy, bench, found = naive(copy.deepcopy(model), *plugins(), **settings), stream(), []
    for experience in bench.train_stream:
        found.append(strategy.train(experience, eval_streams=[]))
        found.append(strategy.eval(bench.test_stream))
    return strategy, found


def alone(plugins: Callable[[], list[Any]], model: nn.Module, **settings: Any) -> tuple[Naive, list[Any]]:
    """The same in this process alone, as if there were no others."""
    import avalanche_firn.models.processes as processes
    import avalanche_firn.plugins.distributed as distributed

    with pytest.MonkeyPatch.context() as patch:
        for module in (processes, distributed):
            patch.setattr(module, "process_count", lambda: 1)
        patch.setattr(dist, "is_initialized", lambda: False)
        return trained(plugins, model, **settings)


def check_training_is_that_of_one_process() -> None:
    """A last batch that is smaller than the number of processes, metrics of Avalanche, momentum over tasks."""
    torch.manual_seed(4)
    model = network()
    torch.manual_seed(5)
    one, expected = alone(lambda: [], model)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    two, found = trained(lambda: [DistributedPlugin()], model)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(weights(two.model), weights(one.model), rtol=1e-10, atol=1e-10)
    assert [sorted(part) for part in found] == [sorted(part) for part in expected]
    for part, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            assert part[name] == pytest.approx(value, rel=1e-6), name
    assert same_everywhere(weights(two.model))
    own = next(plugin for plugin in two.plugins if isinstance(plugin, DistributedPlugin))
    assert own.batches == two.clock.train_iterations
    assert 8 * 1700 * own.batches < own.bytes_given < 8 * 2000 * own.batches  # float64, about 1,900 parameters


def check_heads_that_grow_between_two_steps() -> None:
    """Avalanche's growing classifier in periodic evaluations, of experiences to come, after every third step."""

    class Single(nn.Module):  # what grows is float32
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    def growing() -> nn.Module:
        model = network()
        model.backbone.insert(0, Single())
        model.head = IncrementalClassifier(24, 2)
        return model.float()

    torch.manual_seed(19)
    model, settings = growing(), {"eval_every": 3, "peval_mode": "iteration"}

    def run(*plugins: Any) -> Tensor:
        torch.manual_seed(20)
        strategy, bench = naive(copy.deepcopy(model), *plugins, **settings), stream()
        for plugin in strategy.plugins:
            if isinstance(plugin, PeriodicEval):
                plugin.do_initial = False
        for experience in bench.train_stream:
            strategy.train(experience, eval_streams=[bench.test_stream])
        return weights(strategy.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        expected = run()
    found = run(DistributedPlugin())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_accumulated_steps_are_those_of_one_process() -> None:
    torch.manual_seed(6)
    model = network()
    torch.manual_seed(7)
    one, _ = alone(lambda: [GradientAccumulationPlugin(2)], model, train_mb_size=5)
    torch.manual_seed(7)
    two, _ = trained(lambda: [GradientAccumulationPlugin(2), DistributedPlugin()], model, train_mb_size=5)
    torch.testing.assert_close(weights(two.model), weights(one.model), rtol=1e-10, atol=1e-10)


def check_dropout_differs_and_nothing_else_does() -> None:
    drawn: list[Tensor] = []

    class Masks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                drawn.append(torch.rand(4))
            return x

    torch.manual_seed(8)
    model = network()
    model.backbone.append(Masks())
    torch.manual_seed(9)
    two, _ = trained(lambda: [DistributedPlugin()], model)
    masks = torch.stack(drawn)
    assert not same_everywhere(masks) and same_everywhere(torch.get_rng_state())
    assert len(masks.unique(dim=0)) == len(masks) > 30
    assert same_everywhere(weights(two.model))


def check_sequences_of_images_are_learnt_by_all() -> None:
    """To the bit those of one process."""

    def run(plugins: list[Any]) -> Tensor:
        torch.manual_seed(10)
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(nn.Linear(64, 16), nn.ReLU()))
        model.add_module("head", nn.Linear(16, 10))
        model.double()
        settings = {"episodes": 6, "inner_steps": 3, "remember_size": 6, "inner_lr": 0.01, "seed": 1}
        strategy = ASB(model=model, zap=True, plugins=plugins, evaluator=EvaluationPlugin(loggers=[]), **settings)
        strategy.train(stream().train_stream[0], eval_streams=[])
        return weights(strategy.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        expected = run([])
    assert torch.equal(run([DistributedPlugin()]), expected)


def check_weights_that_drift_are_brought_together() -> None:
    class Drift(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for parameter in strategy.model.parameters():
                    parameter += process_rank() * 1e-3

    torch.manual_seed(11)
    strategy = naive(network(), Drift(), DistributedPlugin())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy.train(stream().train_stream[0], eval_streams=[])
    told = [str(w.message) for w in caught if "differed between the processes in experience 0" in str(w.message)]
    assert len(told) == (process_rank() == 0) and same_everywhere(weights(strategy.model))


# ------------------------------------------------------------------------------------------------- refusals
def check_unsafe_plugins_are_refused() -> None:
    class Draws(SupervisedPlugin):
        """Says nothing about distributed runs."""

    torch.manual_seed(12)
    experience = stream().train_stream[0]
    for act in (lambda s: s.train(experience, eval_streams=[]), lambda s: s.eval([experience])):
        with pytest.raises(ValueError, match=r"^Draws: not known to be safe in a distributed run"):
            act(naive(network(), Draws(), DistributedPlugin()))
    naive(network(), Draws(), DistributedPlugin(allow=["Draws"])).train(experience, eval_streams=[])
    with pytest.raises(ValueError, match="allow is 'Draws'"):
        DistributedPlugin(allow="Draws")


def check_generators_that_differ_are_refused() -> None:
    torch.manual_seed(13)
    strategy = naive(network(), DistributedPlugin())
    torch.manual_seed(process_rank())
    with pytest.raises(ValueError, match="torch's random generators differ between the processes"):
        strategy.train(stream().train_stream[0], eval_streams=[])
    torch.manual_seed(14)


def check_generators_of_python_and_numpy_are_set_alike() -> None:
    random.seed(process_rank())
    np.random.seed(process_rank())
    random.gauss(0, 1)
    torch.manual_seed(18)
    naive(network(), DistributedPlugin()).eval(stream().test_stream)
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    assert same_everywhere(torch.tensor(drawn, dtype=torch.float64))


def check_outputs_other_than_tensors_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    torch.manual_seed(15)
    with pytest.raises(TypeError, match="output is a tuple"):
        naive(Pair(), DistributedPlugin()).train(stream().train_stream[0], eval_streams=[])


def check_a_plugin_serves_one_strategy() -> None:
    torch.manual_seed(16)
    own, experience = DistributedPlugin(), stream().train_stream[0]
    naive(network(), own).train(experience, eval_streams=[])
    with pytest.raises(ValueError, match="another strategy"):
        naive(network(), own).train(experience, eval_streams=[])


def check_batch_norm_on_a_cpu_is_told() -> None:
    torch.manual_seed(17)
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).double()
    with pytest.warns(RuntimeWarning, match="1 BatchNorm layers: on a CPU"):
        naive(model, DistributedPlugin(), train_mb_size=1000).train(stream().train_stream[0], eval_streams=[])
    assert same_everywhere(weights(model))


CHECKS = [name for name in globals() if name.startswith("check_")]

if __name__ == "__main__":
    start_processes("cpu", timeout=120)
    found = {}
    for name in CHECKS:
        try:
            globals()[name]()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    (Path(sys.argv[1]) / f"{process_rank()}.json").write_text(json.dumps(found))
