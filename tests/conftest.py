"""Shared by all tests: threads, the ``slow`` marker, golden numbers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--screenshots", metavar="DIR", help="keep the pictures that tests/dashboards makes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(scope="session")
def golden():
    """``golden("slca", "mean_scale")`` -> the arrays of ``tests/golden/slca/mean_scale.npz`` by name."""
    import numpy as np

    def load(method: str, name: str) -> dict:
        with np.load(Path(__file__).parent / "golden" / method / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def stream_of():
    """``stream_of(x, y, sizes, x_test, y_test)`` -> Avalanche benchmark over tensors, rows in stored order."""

    def build(x, y, sizes, x_test=None, y_test=None, *, generation: str = "modern"):
        import numpy as np
        import torch
        from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, with_classes_timeline
        from avalanche.benchmarks.utils import as_classification_dataset
        from torch.utils.data import TensorDataset

        def dataset(inputs, targets):
            data = TensorDataset(torch.as_tensor(inputs), torch.as_tensor(np.asarray(targets), dtype=torch.long))
            data.targets = [int(t) for t in targets]
            return data

        train = dataset(x, y)
        test = dataset(x if x_test is None else x_test, y if y_test is None else y_test)
        if generation == "classic":
            order = list(range(sum(sizes)))
            per_exp = dict(enumerate(sizes))
            return nc_benchmark(
                train,
                test,
                len(sizes),
                task_labels=False,
                shuffle=False,
                fixed_class_order=order,
                per_exp_classes=per_exp,
            )
        # class_incremental_benchmark sorts rows by class; the golden runs need them in stored order
        borders = np.cumsum([0, *sizes])

        def tasks(data):
            targets = np.asarray(data.targets)
            rows = [np.flatnonzero((targets >= low) & (targets < high)) for low, high in itertools.pairwise(borders)]
            whole = as_classification_dataset(data)
            return [whole.subset([int(i) for i in task]) for task in rows]

        return with_classes_timeline(benchmark_from_datasets(train=tasks(train), test=tasks(test)))

    return build


@pytest.fixture(scope="session")
def toy_backbone():
    """The golden files' network, ``LayerNorm(l2(tanh(l1(x))))``, filled from ``init_*`` arrays."""

    def build(arrays):
        import torch
        from torch import nn

        class Toy(nn.Module):
            def __init__(self):
                super().__init__()
                hidden, d_in = arrays["init_l1.weight"].shape
                self.num_features = arrays["init_l2.weight"].shape[0]
                self.l1 = nn.Linear(d_in, hidden)
                self.l2 = nn.Linear(hidden, self.num_features)
                self.norm = nn.LayerNorm(self.num_features)

            def forward(self, x):
                return self.norm(self.l2(torch.tanh(self.l1(x))))

        toy = Toy().double()
        toy.load_state_dict({k[5:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("init_")})
        return toy

    return build
