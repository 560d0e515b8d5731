"""Avalanche's own strategies on our streams and, for comparison, on its legacy benchmarks."""

import copy

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import SCRModel
from avalanche.training.supervised import DER, EWC, SCR, LwF, Naive, Replay
from torch import nn
from torch.optim import SGD, Adam

from avalanche_firn.benchmarks.classic import wrap_benchmark
from avalanche_firn.benchmarks.digits import digits_stream

STRATEGIES = {
    "naive": (Naive, {}),
    "replay": (Replay, {"mem_size": 100}),
    "ewc": (EWC, {"ewc_lambda": 0.1}),
    "lwf": (LwF, {"alpha": 1.0, "temperature": 2.0}),
    "der": (DER, {"mem_size": 100}),
}


def _scale(x):
    return x * 1.5


@pytest.fixture(scope="module")
def streams():
    plain = digits_stream(image_size=8)
    with_transforms = digits_stream(image_size=8, train_transform=_scale, eval_transform=_scale)
    leaves = []
    for part in (plain.train, plain.test):
        leaf = part[0].dataset._flat_data
        while hasattr(leaf, "_datasets"):
            (leaf,) = leaf._datasets
        leaves.append(leaf)
    legacy = nc_benchmark(*leaves, n_experiences=5, task_labels=False, fixed_class_order=list(range(10)))
    return {"plain": plain, "transforms": with_transforms, "legacy": wrap_benchmark("legacy", legacy)}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


def common(model, epochs=1):
    return {
        "optimizer": Adam(model.parameters(), lr=0.005),
        "train_mb_size": 32,
        "train_epochs": epochs,
        "eval_mb_size": 256,
        "evaluator": None,
    }


def accuracy(model, experience):
    model.eval()
    x, y = zip(*[(x, y) for x, y, _ in experience.dataset.eval()], strict=True)
    with torch.no_grad():
        return (model(torch.stack(x)).argmax(1) == torch.tensor(y)).float().mean().item()


@pytest.mark.parametrize("kind", ["plain", "transforms", "legacy"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_strategies_learn_two_experiences(streams, name, kind):
    stream, (build, options) = streams[kind], STRATEGIES[name]
    model = make_model()
    strategy = build(model=model, criterion=nn.CrossEntropyLoss(), **common(model, epochs=4), **options)
    start = copy.deepcopy(model.state_dict())
    accuracies = []
    for experience in stream.train[:2]:
        strategy.train(experience)
        strategy.eval(stream.test[:2])
        accuracies.append(accuracy(model, stream.test[experience.current_experience]))
    assert min(accuracies) > 0.8
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(start["1.weight"], model.state_dict()["1.weight"])


def test_replay_forgets_less_than_naive(streams):
    first_task = {}
    for name in ("naive", "replay"):
        build, options = STRATEGIES[name]
        model = make_model()
        strategy = build(model=model, criterion=nn.CrossEntropyLoss(), **common(model, epochs=4), **options)
        for experience in streams["plain"].train[:2]:
            strategy.train(experience)
        first_task[name] = accuracy(model, streams["plain"].test[0])
    assert first_task["replay"] > first_task["naive"] + 0.3


@pytest.mark.parametrize("kind", ["plain", "legacy"])
def test_supervised_contrastive_replay(streams, kind):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU())
    model = SCRModel(feature_extractor=encoder, projection=nn.Linear(32, 16))
    stream = streams[kind]
    settings = common(model) | {"optimizer": SGD(model.parameters(), lr=0.05)}
    strategy = SCR(model=model, mem_size=40, batch_size_mem=20, **settings)
    for experience in stream.train[:2]:
        strategy.train(experience)
        strategy.eval(stream.test[:2])
    assert accuracy(model, stream.test[0]) > 0.7


def test_joint_training_learns_all_classes(streams):
    model = make_model()
    strategy = Naive(model=model, criterion=nn.CrossEntropyLoss(), **common(model, epochs=5))
    (experience,) = streams["plain"].joint().train
    strategy.train(experience)
    assert min(accuracy(model, e) for e in streams["plain"].test) > 0.8
