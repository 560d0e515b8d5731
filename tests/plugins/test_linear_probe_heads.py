"""LinearProbePlugin: kinds of classifier, one head per task, class ids and precision."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from torch import nn

from avalanche_firn.plugins import LinearProbePlugin

sys.path.append(str(Path(__file__).parent))
from linear_probe_cases import Body, Cosine, Net, Snapshot, data, naive, probed, small_benchmark

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def benchmark_of(stream_of):
    return partial(small_benchmark, stream_of)


class MultiHead(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.backbone = Body()
        self.classifier = MultiHeadClassifier(8, 4, masking=False)

    def forward(self, x, task_labels):
        return self.classifier(self.backbone(x), task_labels)


def accuracy_on(model, experience):
    model.eval()
    dataset = experience.dataset
    x, y = torch.stack([item[0] for item in dataset]), torch.tensor([item[1] for item in dataset])
    classes = sorted(experience.classes_in_this_experience)
    with torch.no_grad():
        logits = model(x)[:, classes]
    return float((torch.tensor(classes)[logits.argmax(1)] == y).float().mean())


@pytest.mark.parametrize(
    ("head", "solver"),
    [
        (lambda: nn.Linear(8, 6), "lbfgs"),
        (lambda: nn.Linear(8, 6, bias=False), "lbfgs"),
        (lambda: nn.Linear(8, 6, bias=False), "ridge"),
        (lambda: IncrementalClassifier(8, 2), "lbfgs"),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 6)), "sgd"),
        (Cosine, "sgd"),
    ],
)
def test_kinds_of_classifier(benchmark_of, head, solver):
    torch.manual_seed(0)
    model = Net(head())
    rate = {nn.Sequential: 0.5, Cosine: 0.005}.get(type(model.classifier))
    probe = LinearProbePlugin(solver=solver, lp_first=True, epochs=60, lr=rate)
    strategy, _, _ = probed(probe, benchmark_of(), model=model, epochs=0)
    for experience in benchmark_of().train_stream:
        # the rows of both tasks were fitted on the same features; a trained module may forget its first task
        if solver != "sgd" or experience.current_experience == 1:
            assert accuracy_on(strategy.model, experience) >= 0.9
    assert probe.report.accuracy >= 0.9


def test_multi_head_classifier(stream_of):
    x, y = data()
    benchmark = stream_of(x, y % 2, [2])  # classes repeat in every task of a task-incremental stream
    from avalanche.benchmarks import task_incremental_benchmark, with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset
    from torch.utils.data import TensorDataset

    parts = []
    for low in (0, 2):
        rows = (y >= low) & (y < low + 2)
        dataset = TensorDataset(x[rows], torch.tensor(y[rows] % 2))
        dataset.targets = [int(t) for t in y[rows] % 2]
        parts.append(as_classification_dataset(dataset))
    from avalanche.benchmarks import benchmark_from_datasets

    benchmark = with_classes_timeline(task_incremental_benchmark(benchmark_from_datasets(train=parts)))
    torch.manual_seed(0)
    model = MultiHead()
    probe = LinearProbePlugin(lp_first=True)
    before, after = Snapshot(), Snapshot()
    strategy = naive(model, before, probe, after, epochs=0)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        assert probe.report.accuracy >= 0.9
    old, new = before.states[1], after.states[1]
    changed = {k for k in new if k in old and not torch.equal(old[k], new[k])}
    assert changed == {"classifier.classifiers.1.classifier.weight", "classifier.classifiers.1.classifier.bias"}


def test_class_ids_need_not_be_contiguous_and_one_sample_is_enough(stream_of):
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset
    from torch.utils.data import TensorDataset

    x, y = data(classes=2)
    ids = np.where(y == 0, 1, 5)
    keep = np.concatenate([np.flatnonzero(ids == 1), np.flatnonzero(ids == 5)[:1]])
    dataset = TensorDataset(x[keep], torch.tensor(ids[keep]))
    dataset.targets = [int(t) for t in ids[keep]]
    benchmark = with_classes_timeline(benchmark_from_datasets(train=[as_classification_dataset(dataset)]))
    probe = LinearProbePlugin(lp_first=True)
    _, before, after = probed(probe, benchmark, epochs=0)
    assert probe.report.classes == (1, 5) and probe.report.samples == 11
    old, new = before.states[0]["classifier.weight"], after.states[0]["classifier.weight"]
    assert [i for i in range(6) if not torch.equal(old[i], new[i])] == [1, 5]


def test_half_precision_and_double(stream_of):
    x, y = data()
    for dtype in (torch.float64, torch.bfloat16):
        model = Net().to(dtype)
        benchmark = stream_of(x.to(dtype), y, [2, 2])
        probe = LinearProbePlugin(lp_first=True)
        probed(probe, benchmark, model=model, epochs=0)
        assert probe.report.accuracy >= 0.9 and model.classifier.weight.dtype == dtype
