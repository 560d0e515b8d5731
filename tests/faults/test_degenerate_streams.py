"""Data at the edge of what can be learnt from, with every method: it works, or is refused by name before work.

What happens where is the table in docs/guards.md. Working means: a second run gives the same bits, and all weights and
figures are finite. By default every method meets all edges at once where they can be had together, and every refusal;
the full matrix of methods and edges is slow.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))

from tiny_cases import A, B, Tiny, assert_equal, build, run, state, stream_of_labels

from avalanche_firn.evaluation.task_incremental import TaskIncrementalMatrixMetric
from avalanche_firn.experiments.config import validate
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.methods import METHODS
from avalanche_firn.experiments.resources import refuse_lone_images
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.plugins.class_statistics import ClassGaussians
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians
from avalanche_firn.plugins.lone_samples import refuses_one
from avalanche_firn.plugins.losses import LocalCrossEntropy, LocalSymmetricCrossEntropy
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference

pytestmark = pytest.mark.filterwarnings("ignore")

STREAMS = {
    "single samples": lambda: stream_of_labels([[0, 1, 1, 1, 1], [2, 2, 2, 3]], [A, B]),
    "one sample per task": lambda: stream_of_labels([[0], [1]], [[0], [1]]),
    "constant images": lambda: stream_of_labels([A, B], [A, B], constant=True),
    "few samples": lambda: stream_of_labels([[0, 0, 1, 1], [2, 2, 3, 3]], [A, B]),  # 2 of 12 dimensions
    "many equal samples": lambda: stream_of_labels([A * 4, B * 4], [A, B], constant=True),  # more than dimensions
    "last batch of one": lambda: stream_of_labels([[*A, 0], [*B, 2]], [A, B]),
    "no test sample": lambda: stream_of_labels([A, B], [A, []]),
    "classes again": lambda: stream_of_labels([A, [1, 1, 2, 2], [0, 0, 3, 3]], [A, [1, 2], [0, 3]]),
    "no sample": lambda: stream_of_labels([A, [], B], [A, [], B]),
    "no sample first": lambda: stream_of_labels([[], A, B], [[], A, B]),
}
EACH_CLASS_ONCE = ("slca", "slca_plus_plus", "lorac_ipc")


def refusal(edge: str, method: str) -> str | None:
    """What a method says to an edge; None where it works."""
    if edge == "classes again" and method in EACH_CLASS_ONCE:
        return r"classes \[1\] come again in experience 1 of the stream; a class is accepted in one experience only"
    if edge.startswith("no sample") and not METHODS[method].joint:
        index = 0 if edge.endswith("first") else 1
        return rf"experience {index} has no training sample; at least one is accepted"
    return None


def meets(edge: str, method: str, *, twice: bool = True) -> None:
    words = refusal(edge, method)
    if words is not None:
        strategy = build(method)
        with pytest.raises(ValueError, match=words):
            run(strategy, STREAMS[edge](), method=method)
        assert strategy.clock.train_exp_counter == (1 if edge == "no sample" else 0)
        return
    found = []
    for _ in range(1 + twice):
        strategy = build(method)
        run(strategy, STREAMS[edge](), method=method)
        found.append(state(strategy))
        assert all(bool(t.isfinite().all()) for t in found[-1].values()), edge
    assert_equal(found[0], found[-1])


@pytest.mark.parametrize("method", METHODS)
def test_single_samples_and_equal_ones(method):
    """Two classes have a single sample, a last batch a single image, and all images are equal."""
    stream = stream_of_labels([[0, 1, 1, 1, 1], [2, 2, 2, 2, 3]], [A, B], constant=True)
    found = []
    for _ in range(2):
        strategy = build(method)
        run(strategy, stream, method=method)
        found.append(state(strategy))
    assert_equal(*found)
    assert all(bool(t.isfinite().all()) for t in found[0].values())
    assert 0 <= float(found[0]["accuracy/last"]) <= 1


@pytest.mark.parametrize("method", [*EACH_CLASS_ONCE, "naive", "replay", "scr", "cila"])
def test_classes_that_come_again(method):
    meets("classes again", method, twice=False)


@pytest.mark.parametrize("method", ["naive", "slca", "co2l", "scr", "der", "joint"])
@pytest.mark.parametrize("edge", ["no sample", "no sample first"])
def test_an_experience_without_samples(edge, method):
    meets(edge, method, twice=False)


@pytest.mark.parametrize("method", ["naive", "scr", "lorac_ipc"])
def test_an_evaluated_experience_without_samples(method):
    stream = STREAMS["no test sample"]()
    strategy = build(method)
    strategy.evaluator.metrics.append(TaskIncrementalMatrixMetric(image=False))
    run(strategy, stream, method=method)
    last = strategy.evaluator.get_last_metrics()
    assert "accuracy/task-0" in last and "accuracy/task-1" not in last
    assert last["accuracy/last"] == last["accuracy/task-0"] == last["accuracy/average"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("edge", STREAMS)
def test_every_edge_with_every_method(edge, method):
    meets(edge, method)


@pytest.mark.parametrize("kind", [LocalCrossEntropy, LocalSymmetricCrossEntropy])
def test_a_batch_without_a_sample_of_the_experience(kind):
    criterion = kind(outside="ignore")
    experience = SimpleNamespace(classes_in_this_experience=[2, 3])
    criterion.before_training_exp(SimpleNamespace(experience=experience, device="cpu"))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = criterion(logits, torch.tensor([0, 1, 0]))
    loss.backward()
    assert float(loss) == 0 and not bool(logits.grad.any()) and bool(logits.grad.isfinite().all())
    mixed, own = criterion(logits, torch.tensor([0, 3, 1])), criterion(logits[1:2], torch.tensor([3]))
    assert float(mixed) == float(own) > 0


# ------------------------------------------------------------------ statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e6, 1e12])
def test_statistics_of_features_that_depend_on_each_other(rows, scale, dtype):
    """Constant, repeated and combined columns, of any size; more and fewer rows than columns."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, 8, generator=generator, dtype=torch.float64) * scale
    features[:, 3], features[:, 4], features[:, 5] = scale, features[:, 2], features[:, 0] + features[:, 1]
    features = features.to(dtype)
    exact = features.double()
    for form in ("low_rank", "cholesky"):
        gaussians = ClassGaussians(form)
        gaussians.add(7, features)
        wanted = (exact - exact.mean(0)).T @ (exact - exact.mean(0)) / max(rows - 1, 1) + 1e-4 * torch.eye(
            8, dtype=torch.float64
        )
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        found = gaussians.covariance(7).double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
        drawn = gaussians.sample([7], 50, torch.Generator().manual_seed(1))
        assert bool(drawn.isfinite().all())
    for clusters in (1, 3):
        made = ClusterGaussians(clusters)
        made.add(7, features)
        means, variances, counts = made.moments([7])
        assert bool(means.isfinite().all() and (variances >= 0).all()) and 1 <= counts[0] <= min(clusters, rows)
        inference = MahalanobisTaskInference(clusters)
        inference.add(7, features, 0)
        inference.add(8, features + 1, 1)
        assert bool(inference.distances(features).isfinite().all())


def test_a_factor_from_the_samples_equals_that_of_the_matrix():
    """Where both exist: the way out for matrices that aren't positive definite in float64 changes no law."""
    from avalanche_firn.plugins import class_statistics as module

    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = rows - rows.mean(0)
    plain = module._sample_factor(centred, 1e-4, 0)
    original = torch.linalg.cholesky_ex
    try:
        torch.linalg.cholesky_ex = lambda matrix, upper: (original(matrix, upper=upper)[0], torch.tensor(3))
        other = module._sample_factor(centred, 1e-4, 0)
        with pytest.raises(ValueError, match=r"class 5: the covariance is not positive definite"):
            module._sample_factor(centred, 0.0, 5)
    finally:
        torch.linalg.cholesky_ex = original
    torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


def test_a_class_again_is_refused_however_far_ahead():
    stream = stream_of_labels([A, B, [4, 4, 0]], [A, B, [4]])
    strategy = build("slca")
    with pytest.raises(ValueError, match=r"classes \[0\] come again in experience 2 of the stream"):
        strategy.train(stream.train[0], eval_streams=[])
    assert strategy.clock.train_iterations == 0
    plugin = next(p for p in strategy.plugins if isinstance(p, ClassifierAlignmentPlugin))
    assert len(plugin.gaussians) == 0


# ------------------------------------------------------- batches of a single image
@pytest.mark.parametrize("method", ["naive", "slca", "ewc", "joint"])
def test_a_last_batch_of_one_that_batch_norm_refuses(method):
    stream = stream_of_labels([[*A, 0], B if method == "joint" else [*B, 2]], [A, B])
    strategy = build(method, maps=1)
    count, name = (17, "0, 1, 2, 3") if method == "joint" else (9, "0, 1")
    words = (
        rf"^experience 0 \(classes {name}\) has {count} images, so with train_mb_size 4 its last batch is a single "
        r"one, which BatchNorm backbone\.norm can't be trained on; a size that leaves none or several is accepted$"
    )
    with pytest.raises(ValueError, match=words):
        run(strategy, stream, method=method)
    assert strategy.clock.train_iterations == 0
    run(build(method, maps=1, batch=6), stream, method=method)


@pytest.mark.parametrize("method", ["replay", "cila", "scr", "lorac_ipc", "lp_ft"])
def test_batches_that_only_look_like_single_images(method):
    """Stored images, several views, and BatchNorm that stands still."""
    first = A if method in ("replay", "lp_ft") else [*A, 0]
    run(build(method, maps=1), stream_of_labels([first, [*B, 2]], [A, B]), method=method)


def test_a_dropped_batch_is_none():
    strategy = build("naive", maps=1)
    strategy.train(stream_of_labels([[*A, 0]], [A]).train[0], eval_streams=[], drop_last=True)
    assert strategy.clock.train_iterations == 4


def test_refuses_one_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(Tiny(1), nn.Dropout(0.5)).train()
    before, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
    image = torch.zeros(1, 3, 4, 4)
    assert refuses_one(model, image) == "0.norm"
    wide = nn.Sequential(Tiny(), nn.Dropout(0.5)).train()
    kept = [b.clone() for b in wide.buffers()]
    torch.set_rng_state(random)
    assert refuses_one(wide, image) is None and all(map(torch.equal, wide.buffers(), kept))
    assert all(map(torch.equal, model.buffers(), before)) and torch.equal(torch.get_rng_state(), random)
    assert refuses_one(model.eval(), image) is None
    with pytest.raises(RuntimeError):
        refuses_one(wide, torch.zeros(1, 2, 4, 4))


OWN_SIZE = {"strategy": "naive", "training": {"batch_size": 3}}
MOVING_NORMS = {"strategy": "lp_ft", "linear_probe": {"ft_bn": "train"}}


@pytest.mark.parametrize(
    ("methods", "sizes", "batch", "path", "words"),
    [
        (["naive"], (8, 9), 4, "training.batch_size", "4 leaves task 1 .9 images. a last batch of one image"),
        (["slca", "ewc"], (9, 8), 8, "training.batch_size", "8 leaves task 0 .9 images."),
        (["joint"], (8, 9), 4, "training.batch_size", "4 leaves task 0 .17 images."),
        ([OWN_SIZE], (10, 9), 4, r"methods\[0\].training.batch_size", "3 leaves task 0"),
        (["replay", "lp_ft", "der", "avalanche_replay", "cila", "scr", "lorac_ipc"], (8, 9), 4, None, None),
        (["replay"], (9, 8), 4, "training.batch_size", "4 leaves task 0"),
        ([MOVING_NORMS], (8, 9), 4, "training.batch_size", "4 leaves task 1"),
        (["naive"], (8, 9), 5, None, None),
    ],
)
def test_a_recipe_is_refused_before_work(methods, sizes, batch, path, words):
    stream = stream_of_labels([[i % 2 + 2 * t for i in range(n)] for t, n in enumerate(sizes)], [A, B])
    data = {"name": "digits", "tasks": 5}
    config = validate({"name": "x", "stream": data, "methods": methods, "training": {"batch_size": batch}})
    for maps in (1, 4):
        backbone = Backbone(Tiny(maps), 12, {}, "tiny", "random", "0")
        if words is None or maps == 4:
            refuse_lone_images(config, backbone, stream)
            continue
        message = rf"{path}: {words}.*BatchNorm norm of tiny can't.*accepted: for example \d+, \d+"
        with pytest.raises(ConfigError, match=message):
            refuse_lone_images(config, backbone, stream)


def test_the_sizes_that_are_proposed_are_fine():
    stream = stream_of_labels([[*A, 0], [*B, 2, 2, 2]], [A, B])
    given = {"name": "x", "stream": {"name": "digits", "tasks": 5}, "methods": ["naive"]}
    backbone = Backbone(Tiny(1), 12, {}, "tiny", "random", "0")
    with pytest.raises(ConfigError) as caught:
        refuse_lone_images(validate({**given, "training": {"batch_size": 8}}), backbone, stream)
    proposed = [int(n) for n in re.search(r"for example ([\d, ]+)", str(caught.value))[1].split(", ")]
    assert len(proposed) == 3
    for size in proposed:
        refuse_lone_images(validate({**given, "training": {"batch_size": size}}), backbone, stream)
