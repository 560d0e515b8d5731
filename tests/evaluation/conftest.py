"""What the tests of the metrics share: a small class-incremental stream of digits, a learner, a recording logger."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark, with_task_labels
from avalanche.logging import BaseLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

ORDER = [3, 8, 1, 0, 9, 4]  # of the digits 0..9; six of them, not contiguous inside a task


class Tensors(TensorDataset):
    def __init__(self, x, y):
        super().__init__(x, y)
        self.targets = y.tolist()

    def __getitem__(self, index):
        return self.tensors[0][index], int(self.targets[index])


class Collect(BaseLogger):
    """Keeps every logged value in order."""

    def __init__(self):
        super().__init__()
        self.values = []

    def log_single_metric(self, name, value, x_plot):
        self.values.append((name, x_plot, value))

    def curve(self, name):
        return [(x, value) for tag, x, value in self.values if tag == name]

    @property
    def tags(self):
        return {name for name, _, _ in self.values}


def digits(classes):
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(data.target)
    keep = torch.isin(y, torch.tensor(classes))
    x, y = x[keep], y[keep]
    return Tensors(x[0::2], y[0::2]), Tensors(x[1::2], y[1::2])


def benchmark(generation="modern", sizes=(2, 3, 1)):
    warnings.simplefilter("ignore")  # nc_benchmark and its like call their own deprecated functions
    train, test = digits(sorted(ORDER))
    relabel = {c: i for i, c in enumerate(sorted(ORDER))}  # builders demand contiguous labels
    for data in (train, test):
        data.targets = [relabel[c] for c in data.targets]
    order = [relabel[c] for c in ORDER]
    if generation == "classic":
        per_exp = dict(enumerate(sizes))
        return nc_benchmark(
            train, test, len(sizes), task_labels=False, fixed_class_order=order, per_exp_classes=per_exp, shuffle=False
        )
    streams = {"train": train, "test": test, "valid": copy.copy(test)}
    return with_task_labels(class_incremental_benchmark(streams, class_order=order, num_classes_per_exp=list(sizes)))


def strategy(metrics, loggers, epochs=2, plugins=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
    groups = [
        {"params": model[0].parameters(), "lr": 0.02, "name": "backbone"},
        {"params": [model[2].weight]},
        {"params": [model[2].bias]},
    ]
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=epochs,
        eval_mb_size=50,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=loggers, collect_all=False),
        **options,
    )


@torch.no_grad()
def count(model, experience):
    model.eval()
    rows = [(x, int(y)) for x, y, *_ in experience.dataset.eval()]
    hits = sum(int(model(x[None]).argmax()) == y for x, y in rows)
    return hits, len(rows)


@pytest.fixture(scope="session")
def tools():
    """Helpers: ``benchmark(generation, sizes)``, ``strategy(metrics, loggers)``, ``count`` and ``Collect``."""
    return SimpleNamespace(benchmark=benchmark, strategy=strategy, count=count, Collect=Collect)


# -------------------------------------------------------- the representation probe
def samples(classes, per_class, seed, dtype=torch.float64):
    """Clusters whose samples come in a mixed order, ``(n, 6)`` and ``(n,)``."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.asarray(classes), per_class))
    centres = np.random.default_rng(99).normal(size=(max(classes) + 1, 6))
    return torch.tensor(centres[y] + 0.9 * rng.normal(size=(len(y), 6)), dtype=dtype), y


@pytest.fixture
def cheap_picture(monkeypatch):
    """Drawing the matrix takes longer than all else in these tests; one of them does it."""
    figure = matplotlib.figure.Figure()
    monkeypatch.setattr("avalanche_firn.evaluation.representation.task_matrix_figure", lambda matrix: figure)


@pytest.fixture
def stream(stream_of):
    """``stream(sizes, generation, classes, dtype)``: 12 training and 9 test samples of every class."""

    def build(sizes=(2, 2, 2), generation="modern", classes=None, dtype=torch.float64):
        classes = list(range(sum(sizes))) if classes is None else classes
        parts = (*samples(classes, 12, 0, dtype), *samples(classes, 9, 1, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return stream_of(parts[0], parts[1], list(sizes), parts[2], parts[3], generation=generation)

    return build
