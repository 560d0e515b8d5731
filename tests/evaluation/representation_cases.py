"""What the tests of the representation probe share: a tiny network, a learner, and ways to train and read."""

import copy

import numpy as np
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

ALL = ["knn", "linear", "fine_tune", "lp_ft"]
FAST = {"adapt": ALL, "lr": 0.05, "epochs": 2, "batch_size": 7}
KINDS = ("diag", "max_seen", "max_all")


class Tiny(nn.Module):
    def __init__(self, classes=6, norm=True, drop=0.3, head=None):
        super().__init__()
        norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Dropout(drop))
        self.head = nn.Linear(8, classes) if head is None else head(8)

    def forward(self, x):
        return self.head(self.backbone(x))


def plain():
    return Tiny(norm=False, drop=0.0).double()


def learner(build, metrics=(), *, plugins=(), log=None, **options):
    torch.manual_seed(0)
    model = build()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=1,
        eval_mb_size=16,
        plugins=[*plugins],
        evaluator=EvaluationPlugin(*metrics, loggers=[] if log is None else [log], collect_all=False),
        **options,
    )


class Copies(SupervisedPlugin):
    """Copies of the model before the first experience and after each."""

    def __init__(self):
        super().__init__()
        self.models = []

    def before_training_exp(self, strategy, **kwargs):
        if not self.models:
            self.models.append(copy.deepcopy(strategy.model))

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


def train(strategy, experiences, evaluated=None):
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
        if evaluated is not None:
            strategy.eval(evaluated)


def rows_of(experience):
    items = [experience.dataset.eval()[i] for i in range(len(experience.dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def measured(probe, name):
    """Which entries exist, the baseline first: ``(T + 1, N)``."""
    matrix = probe.matrices[name]
    return ~np.isnan(np.vstack([matrix.baseline, matrix.accuracy]))
