"""What the tests of the linear probe share: a small network and benchmark, snapshots, and ways to train."""

import numpy as np
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F


class Body(nn.Module):
    """A backbone with everything that has a mode: BatchNorm with and without parameters, dropout."""

    def __init__(self, inputs=6, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, width),
            nn.BatchNorm1d(width, affine=False),
        )  # fmt: skip
        self.num_features = width

    def forward(self, x):
        return self.layers(x)


class Net(nn.Module):
    def __init__(self, head=None, width=8):
        super().__init__()
        self.backbone = Body(width=width)
        self.classifier = nn.Linear(width, 6) if head is None else head

    def forward(self, x):
        return self.classifier(self.backbone(x))


class Cosine(nn.Module):
    """A classifier that is not linear in the features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) * 0.1)

    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


def data(seed=0, classes=4, per_class=10, inputs=6):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), per_class)
    centres = rng.normal(size=(classes, inputs)) * 2
    return torch.tensor(centres[y] + rng.normal(size=(len(y), inputs)), dtype=torch.float32), y


def small_benchmark(stream_of, sizes=(2, 2), **kwargs):
    x, y = data(classes=sum(sizes))
    return stream_of(x, y, list(sizes), **kwargs)


class Snapshot(SupervisedPlugin):
    """State right before and right after the probe (one before it in the list of plugins, one behind)."""

    def __init__(self):
        super().__init__()
        self.states, self.rates, self.modes, self.flags, self.optimizer_state = [], [], [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.states.append({k: v.clone() for k, v in strategy.model.state_dict().items()})
        self.optimizer_state.append(len(strategy.optimizer.state))

    def before_training_epoch(self, strategy, **kwargs):
        self.rates.append([group["lr"] for group in strategy.optimizer.param_groups])
        self.modes.append({name: module.training for name, module in strategy.model.named_modules()})
        self.flags.append({name: p.requires_grad for name, p in strategy.model.named_parameters()})


def naive(model, *plugins, epochs=1, lr=0.05, momentum=0.9, weight_decay=0.0, criterion=None, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Naive(
        model=model, optimizer=optimizer, criterion=criterion or nn.CrossEntropyLoss(), train_mb_size=8,
        train_epochs=epochs, eval_mb_size=16, plugins=list(plugins), evaluator=EvaluationPlugin(loggers=[]), **more,
    )  # fmt: skip


def probed(probe, benchmark, model=None, epochs=1, seed=0, experiences=None, **more):
    """Train; returns the strategy and the snapshots before and after each probe."""
    torch.manual_seed(seed)
    model = Net() if model is None else model
    before, after = Snapshot(), Snapshot()
    strategy = naive(model, before, probe, after, epochs=epochs, **more)
    for experience in list(benchmark.train_stream)[:experiences]:
        torch.manual_seed(seed + 1)
        strategy.train(experience, eval_streams=[])
    return strategy, before, after
