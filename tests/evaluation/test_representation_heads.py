"""Every kind of model and classifier, the order of the tasks, and a cache of features shared with others."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from avalanche.benchmarks import task_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import concat_datasets
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, as_multitask
from torch import nn

from avalanche_firn.benchmarks.streams import eager_stream
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.models import FeatureCache, resnet_firn, with_taskwise_head
from avalanche_firn.plugins import LinearProbePlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

sys.path.append(str(Path(__file__).parent))
from representation_cases import ALL, FAST, Copies, Tiny, learner, plain, train

pytestmark = pytest.mark.usefixtures("cheap_picture")


# -------------------------------------------------------------- models and heads
class MultiTask(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8), MultiHeadClassifier(8, masking=False)

    def forward(self, x, task_labels):
        return self.head(torch.relu(self.backbone(x)), task_labels)


class Reference(nn.Module):
    """The same network with one linear classifier."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 9)

    def forward(self, x):
        return self.head(self.backbone(x))


def decorated():
    model = as_multitask(Reference(), "head")
    model._modules["head"].masking = False
    return model


HEADS = {
    "incremental": lambda: Tiny(norm=False, drop=0, head=IncrementalClassifier),
    "taskwise": lambda: with_taskwise_head(Tiny(norm=False, drop=0).backbone, feature_size=8),
    "multi-head": MultiTask,
    "as_multitask": decorated,
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_classifier_of_the_stream_plays_no_role(stream, kind):
    bench = stream((2, 4, 3), dtype=torch.float32)
    if "multi" in kind:
        bench = with_classes_timeline(task_incremental_benchmark(bench, reset_task_labels=True))
    options = {**FAST, "l2": 0.1, "head": "head"}
    probe, saved = RepresentationProbe(bench.train_stream, bench.test_stream, **options), Copies()
    train(learner(HEADS[kind], [probe], plugins=[saved]), bench.train_stream, bench.test_stream)
    for t, model in enumerate(saved.models, start=-1):
        same = Reference()
        first = next(m for m in model.modules() if isinstance(m, nn.Linear))
        same.backbone[0].load_state_dict(first.state_dict())
        for name, counts in probe.measure(same, t, tasks=range(3)).items():
            matrix = probe.matrices[name]
            row = [matrix.to_dict()["baseline"], *matrix.correct.tolist()][t + 1]
            assert [counts[i][0] for i in range(3)] == row, (name, t)


def vit():
    size = {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_firn_32", proj_drop_rate=0.2, **size)


def resnet():
    return resnet_firn.resnet18_cifar(num_classes=4, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), drop_rate=0.2)


@pytest.mark.parametrize("build", [vit, resnet, lambda: with_taskwise_head(resnet())])
def test_images_and_real_backbones(stream_of, build):
    y = np.arange(24) % 4
    x = (
        torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        + torch.from_numpy(y)[:, None, None, None]
    )
    bench = stream_of(x.float(), y, [2, 2])

    def run(wanted):
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, when="end", **FAST)
        strategy = learner(build, [probe] if wanted else [])
        train(strategy, bench.train_stream)
        return to_plain([dict(strategy.model.state_dict()), capture_random_state()]), probe

    without, (state, probe) = run(False)[0], run(True)
    assert differing_state(without, state) is None
    for name in ALL:
        assert probe.matrices[name].accuracy.shape == (2, 2)
        assert not np.isnan(probe.matrices[name].accuracy[1]).any()


def test_order_and_number_of_tasks_do_not_change_a_figure(stream):
    bench = stream(dtype=torch.float32)
    model = learner(Tiny).model  # with dropout, which is on in fine-tuning
    make = lambda adapt: RepresentationProbe(bench.train_stream, bench.test_stream, **FAST | {"adapt": adapt})  # noqa: E731
    together = make(ALL).measure(model, 0, tasks=[2, 0, 1])
    for name in ALL:
        for i in range(3):
            assert make(name).measure(model, 0, tasks=[i])[name][i] == together[name][i]
    everything = make(ALL)
    assert everything.measure(model, 0, tasks=[1], adapt=["lp_ft"]) == {"lp_ft": {1: together["lp_ft"][1]}}


# -------------------------------------------------------------------------- cache
def test_features_are_extracted_once_and_shared(stream):
    bench, cache = stream(), FeatureCache()
    first, second = (
        RepresentationProbe(bench.train_stream, bench.test_stream, adapt, cache=cache, lr=0.1, epochs=1)
        for adapt in (["knn", "linear"], ["fine_tune", "lp_ft"])
    )
    plugin = LinearProbePlugin(cache=cache, lp_first=True)
    alone = [
        RepresentationProbe(bench.train_stream, bench.test_stream, p.adapt, lr=0.1, epochs=1) for p in (first, second)
    ]
    train(learner(plain, [first, second, *alone], plugins=[plugin]), bench.train_stream)
    for shared, own in zip((first, second), alone, strict=True):
        for name in shared.adapt:
            assert shared.matrices[name].to_dict() == own.matrices[name].to_dict()
    # 4 states of the weights, 3 tasks, training and test data; before task 0 the plugin extracted its own
    assert cache.misses == 4 * 6 and alone[0].cache.misses == 4 * 6


def test_other_data_under_the_same_name_are_not_taken(stream):
    """Joint training with a probe of its own: experience 0 of its stream is not task 0."""
    bench, cache = stream(), FeatureCache()
    joint = eager_stream("train", [concat_datasets([e.dataset for e in bench.train_stream])])
    shared, own = (RepresentationProbe(bench.train_stream, bench.test_stream, cache=c) for c in (cache, None))
    train(learner(plain, [shared, own], plugins=[LinearProbePlugin(cache=cache, lp_first=True)]), joint)
    assert shared.matrices["knn"].to_dict() == own.matrices["knn"].to_dict()
