"""SLCA inside Avalanche: the official end-to-end run, equality with Naive plus plugins, streams, composition."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier, with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.schedules import multistep
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin
from avalanche_firn.strategies.slca import SLCA


class InitialHeads(SupervisedPlugin):
    """Writes the golden initial weights into each new layer."""

    def __init__(self, golden):
        super().__init__()
        self.golden = golden

    def before_training_exp(self, strategy, **kwargs):
        with torch.no_grad():
            start = self.golden[f"task{strategy.clock.train_exp_counter}_head_weight0"]
            strategy.model.head.weights[-1].copy_(torch.from_numpy(start))


class Predictions(SupervisedPlugin):
    def before_eval(self, strategy, **kwargs):
        self.rows = []

    def after_eval_iteration(self, strategy, **kwargs):
        self.rows.append(strategy.mb_output.argmax(1))


def golden_batches(g, task, epoch):
    """The alignment rows of an epoch, made from the stored noise and the stored statistics."""
    sizes = g["sizes"].tolist()
    mean = np.concatenate([g[f"task{k}_mean"] for k in range(task + 1)])
    cov = np.concatenate([g[f"task{k}_cov"] for k in range(task + 1)])
    of_task = np.repeat(np.arange(task + 1), sizes[: task + 1])
    scale = 0.9 + 0.1 * (of_task + 1) / (task + 1)
    eps = g[f"task{task}_eps"][epoch].astype(np.float64)
    rows = scale[:, None, None] * mean[:, None] + eps @ np.linalg.cholesky(cov).transpose(0, 2, 1)
    targets = np.repeat(np.arange(len(mean)), eps.shape[1])
    perm = g[f"task{task}_perm"][epoch].astype(np.int64)
    features, targets = rows.reshape(-1, rows.shape[-1])[perm], targets[perm]
    for i in range(0, len(perm), eps.shape[1]):
        yield torch.from_numpy(features[i : i + eps.shape[1]]), torch.from_numpy(targets[i : i + eps.shape[1]])


@pytest.mark.parametrize("lazy", [True, False])
def test_golden_end_to_end(golden, stream_of, toy_backbone, lazy):
    g = golden("slca", "slca_end_to_end")
    sizes = g["sizes"].tolist()
    alignment = ClassifierAlignmentPlugin(
        epochs=int(g["ca_epochs"]), samples_per_class=int(g["samples_per_class"]), lr=float(g["lr"]),
        momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"]), temperature=float(g["temperature"]),
        lazy=lazy, batch_source=lambda task, epoch: golden_batches(g, task, epoch),
    )  # fmt: skip
    model = with_taskwise_head(toy_backbone(g)).double()
    predictions = Predictions()
    strategy = SLCA(
        model=model,
        optimizer=torch.optim.SGD(
            model.parameters(), lr=float(g["lr"]), momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"])
        ),
        backbone_scale=float(g["backbone_scale"]), milestones=g["milestones"].tolist(), alignment=alignment,
        train_mb_size=int(g["batch_size"]), train_epochs=int(g["epochs"]), eval_mb_size=16,
        plugins=[InitialHeads(g), predictions], evaluator=None,
    )  # fmt: skip
    benchmark = stream_of(g["train_x"], g["train_y"], sizes, g["test_x"], g["test_y"])
    close = dict(rtol=0, atol=1e-8)
    for t, experience in enumerate(benchmark.train_stream):
        strategy.train(experience, eval_streams=[], shuffle=False)
        for name, parameter in model.backbone.named_parameters():
            np.testing.assert_allclose(parameter.detach(), g[f"task{t}_backbone_{name}"], **close)
        first = sum(sizes[:t])
        ids = list(range(first, first + sizes[t]))
        np.testing.assert_allclose(alignment.gaussians.mean(ids), g[f"task{t}_mean"], **close)
        for k, class_id in enumerate(ids):
            np.testing.assert_allclose(alignment.gaussians.covariance(class_id), g[f"task{t}_cov"][k], **close)
        seen = g["test_y"][g["test_y"] < first + sizes[t]]
        predicted = np.empty_like(seen)
        for i in range(t + 1):
            strategy.eval(benchmark.test_stream[i])
            rows = (seen >= sum(sizes[:i])) & (seen < sum(sizes[: i + 1]))
            predicted[rows] = torch.cat(predictions.rows)
        assert predicted.tolist() == g[f"task{t}_test_pred"].tolist()
        assert round(100 * (predicted == seen).mean(), 2) == float(g[f"task{t}_test_accuracy_percent"])
        weight, bias = model.head.weight_matrix()
        np.testing.assert_allclose(weight, g[f"task{t}_weight_aligned"], **close)
        np.testing.assert_allclose(bias, g[f"task{t}_bias_aligned"], **close)
        if t:
            model.head.restore()
        raw_weight, raw_bias = model.head.weight_matrix()
        np.testing.assert_allclose(raw_weight, g[f"task{t}_weight_raw"], **close)
        np.testing.assert_allclose(raw_bias, g[f"task{t}_bias_raw"], **close)
        model.head.load_weight_matrix(weight, bias)
    assert alignment.alignments == 2


def tiny_vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, num_classes=7)


def images(stream_of, sizes=(2, 3), per_class=6, **kwargs):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(sum(sizes)).repeat_interleave(per_class)
    x = torch.randn(len(y), 3, 32, 32, generator=generator) + y[:, None, None, None] / 2
    return stream_of(x, y, list(sizes), **kwargs)


def train(strategy, benchmark, evaluate=True, seed=0):
    for experience in benchmark.train_stream:
        torch.manual_seed(seed + experience.current_experience)  # evaluation draws random numbers, too
        strategy.train(experience, eval_streams=[])
        if evaluate:
            strategy.eval(benchmark.test_stream)
    return strategy


def slca(model=None, **kwargs):
    settings = dict(model=model or tiny_vit(), train_mb_size=5, train_epochs=2, eval_mb_size=8, evaluator=None) | kwargs
    return SLCA(**settings)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_equals_naive_with_plugins_to_the_bit(stream_of, generation):
    benchmark = images(stream_of, generation=generation)
    ours = train(slca(fresh_final_norm=False, backbone_scale=0.1, milestones=[1]), benchmark)
    model = with_taskwise_head(tiny_vit())
    plugins = [SlowLearnerPlugin(0.1, scheduler_factory=multistep([1])), ClassifierAlignmentPlugin()]
    naive = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        criterion=LocalCrossEntropy(), train_mb_size=5, train_epochs=2, eval_mb_size=8, plugins=plugins, evaluator=None,
    )  # fmt: skip
    train(naive, benchmark)
    ours_state, naive_state = ours.model.state_dict(), naive.model.state_dict()
    assert ours_state.keys() == naive_state.keys()
    assert all(torch.equal(v, naive_state[k]) for k, v in ours_state.items())


def test_naive_with_a_plain_timm_model_and_its_own_head_attribute(stream_of):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, num_classes=0)
    vit.head = TaskwiseLinearHead(vit.num_features)
    benchmark = images(stream_of)
    alignment = ClassifierAlignmentPlugin()
    strategy = Naive(
        model=vit, optimizer=torch.optim.SGD(vit.parameters(), lr=0.01, momentum=0.9), criterion=LocalCrossEntropy(),
        train_mb_size=5, eval_mb_size=8, plugins=[SlowLearnerPlugin(), alignment], evaluator=None,
    )  # fmt: skip
    train(strategy, benchmark)
    assert vit.head.known_classes == (0, 1, 2, 3, 4) and alignment.alignments == 1


@pytest.mark.parametrize("eval_every", [-1, 0, 1])
def test_logged_final_accuracy_is_that_of_a_separate_evaluation(stream_of, eval_every):
    benchmark = images(stream_of)
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[SimpleNamespace(log_metrics=lambda m: None)])
    strategy = slca(eval_every=eval_every, evaluator=evaluator, alignment=ClassifierAlignmentPlugin(lr=0.5))
    torch.manual_seed(0)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        logged = evaluator.get_last_metrics()
        final = strategy.eval(benchmark.test_stream)
        if eval_every >= 0:
            assert logged == final
    assert strategy.model.head.num_tasks == 2


def test_evaluation_changes_no_parameter_and_aligns_once(stream_of):
    benchmark = images(stream_of)
    alignment = ClassifierAlignmentPlugin()
    strategy = slca(alignment=alignment)
    strategy.eval(benchmark.test_stream)  # before any training, on classes of the future
    assert strategy.model.head.num_tasks == 0
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert strategy.model.head.num_tasks == 1 and alignment.alignments == 0
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    backbone = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    strategy.eval(benchmark.test_stream)
    head = {k: v.clone() for k, v in strategy.model.head.state_dict().items()}
    strategy.eval(benchmark.test_stream)
    assert alignment.alignments == 1
    assert all(torch.equal(v, backbone[k]) for k, v in strategy.model.backbone.state_dict().items())
    assert all(torch.equal(v, head[k]) for k, v in strategy.model.head.state_dict().items())


def test_lazy_eager_and_skipped_alignments_agree(stream_of):
    benchmark = images(stream_of, (2, 1, 2))
    results = []
    for lazy, evaluate in ((True, True), (False, True), (True, False)):
        strategy = train(slca(alignment=ClassifierAlignmentPlugin(lazy=lazy)), benchmark, evaluate)
        strategy.eval(benchmark.test_stream)
        results.append(strategy.model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(v, other[k]) for k, v in results[0].items() if "snapshot" not in k)


def test_alignment_leaves_no_trace_in_training(stream_of):
    benchmark = images(stream_of, (2, 1, 2))
    with_it = train(slca(), benchmark, evaluate=True)
    without = train(slca(alignment=ClassifierAlignmentPlugin(epochs=0)), benchmark, evaluate=True)
    with_it.model.head.restore()
    raw, plain = with_it.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(v, raw[k]) for k, v in plain.items())


def test_non_contiguous_ids_unequal_tasks_and_single_samples(stream_of):
    """Classes 9, 4 | 7 | 2, 0, 11 with one image in class 7 and class 2."""
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset, as_classification_dataset
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)

    def data(counts):
        y = torch.tensor([c for c, n in counts.items() for _ in range(n)])
        dataset = TensorDataset(torch.randn(len(y), 6, generator=generator) + y[:, None], y)
        dataset.targets = y.tolist()
        return dataset

    tasks = [data({9: 8, 4: 8}), data({7: 1}), data({2: 1, 0: 8, 11: 8})]
    plain = benchmark_from_datasets(
        train=[as_classification_dataset(t) for t in tasks], test=[as_classification_dataset(t) for t in tasks]
    )
    labelled = [_make_taskaware_classification_dataset(t, task_labels=0) for t in tasks]
    for benchmark in (plain, with_task_labels(benchmark_from_datasets(train=labelled, test=labelled))):
        benchmark = with_classes_timeline(benchmark)
        backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        alignment = ClassifierAlignmentPlugin()
        strategy = slca(backbone, feature_size=8, alignment=alignment, train_epochs=3)
        results = train(strategy, benchmark)
        head = results.model.head
        assert head.known_classes == (4, 9, 7, 0, 2, 11) and head.class_task.tolist() == [0, 0, 1, 2, 2, 2]
        torch.testing.assert_close(alignment.gaussians.covariance(7), 1e-4 * torch.eye(8), rtol=0, atol=1e-9)
        assert all(torch.isfinite(v).all() for v in head.state_dict().values())
        logits = strategy.model.eval()(torch.randn(3, 6))
        assert logits.shape == (3, 12) and set(logits.argmax(1).tolist()) <= set(head.known_classes)


@pytest.mark.parametrize(("scaling", "compat"), [("mean", True), ("feature", False), ("feature", True), (None, False)])
def test_variants_run_and_differ_only_where_they_should(stream_of, scaling, compat):
    benchmark = images(stream_of, (2, 3))
    strategy = train(slca(alignment=ClassifierAlignmentPlugin(scaling=scaling, compat_task_index=compat)), benchmark)
    scales = strategy.model.head.input_scales.tolist()
    assert scales == pytest.approx([1.02, 1.0] if scaling == "feature" else [1.0, 1.0])
    assert all(torch.isfinite(v).all() for v in strategy.model.state_dict().values())


def test_task_index_matters_for_unequal_tasks_only(stream_of):
    for sizes, same in (((2, 2), True), ((3, 2), False)):
        heads = []
        for compat in (False, True):
            alignment = ClassifierAlignmentPlugin(compat_task_index=compat)
            heads.append(train(slca(alignment=alignment), images(stream_of, sizes)).model.head.weight_matrix()[0])
        assert torch.equal(*heads) == same


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_weights_and_statistics_in_float32(stream_of, precision):
    alignment = ClassifierAlignmentPlugin()
    strategy = slca(alignment=alignment, plugins=[MixedPrecisionPlugin(precision, init_scale=8.0)])
    train(strategy, images(stream_of))
    assert all(v.dtype == torch.float32 for v in strategy.model.state_dict().values() if v.is_floating_point())
    assert all(torch.isfinite(v).all() for v in strategy.model.state_dict().values())
    assert alignment.gaussians.mean([0]).dtype == torch.float32


def test_fresh_final_norm():
    vit = tiny_vit()
    with torch.no_grad():
        vit.norm.weight.fill_(3.0)
    assert slca(copy.deepcopy(vit), fresh_final_norm=False).model.backbone.norm.weight[0] == 3
    fresh = slca(vit).model.backbone.norm
    assert fresh.weight[0] == 1 and fresh.eps == 1e-5 and vit.blocks[0].norm1.eps == 1e-6
    own = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    nn.init.constant_(own[1].weight, 3.0)
    assert slca(own, feature_size=8).model.backbone[1].weight[0] == 3


def test_replay_is_refused_with_the_local_loss_and_composes_with_a_global_one(stream_of):
    benchmark = images(stream_of)
    with pytest.raises(ValueError, match="replay"):
        train(slca(plugins=[ReplayPlugin(mem_size=6)]), benchmark)
    train(slca(plugins=[ReplayPlugin(mem_size=6)], criterion=nn.CrossEntropyLoss()), benchmark)


def test_two_strategies_in_one_process(stream_of):
    benchmark = images(stream_of)
    alone = train(slca(), benchmark).model.state_dict()
    first, second = slca(), slca(tiny_vit(), backbone_scale=0.5, alignment=ClassifierAlignmentPlugin(lr=0.1))
    for i, experience in enumerate(benchmark.train_stream):
        torch.manual_seed(i)
        first.train(experience, eval_streams=[])
        first.eval(benchmark.test_stream)
        second.train(experience, eval_streams=[])
    assert all(torch.equal(v, alone[k]) for k, v in first.model.state_dict().items())


def test_errors_before_any_work(stream_of):
    benchmark = images(stream_of)
    strategy = slca()
    train(strategy, benchmark)
    with pytest.raises(ValueError, match=r"classes \[0, 1\] were learnt"):
        strategy.train(benchmark.train_stream[0], eval_streams=[])
    model = FeatureClassifier(nn.Flatten(), nn.Linear(3072, 5))
    naive = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        evaluator=None,
        plugins=[ClassifierAlignmentPlugin()],
    )
    with pytest.raises(ValueError, match="'head' is a Linear; alignment accepts a TaskwiseLinearHead"):
        naive.train(benchmark.train_stream[0], eval_streams=[])
    with pytest.raises(ValueError, match="milestones and scheduler_factory"):
        slca(milestones=[1], scheduler_factory=multistep([1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs is -1"), ({"samples_per_class": 0}, "samples_per_class is 0"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"), ({"scaling": "max"}, "scaling is 'max'"), ({"norm": "l1"}, "norm is 'l1'"),
    ],
)  # fmt: skip
def test_bad_alignment_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierAlignmentPlugin(**settings)


def test_early_stopping_still_measures_and_aligns(stream_of):
    class Stop(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            strategy.stop_training()

    alignment = ClassifierAlignmentPlugin()
    strategy = train(slca(alignment=alignment, plugins=[Stop()], train_epochs=5), images(stream_of))
    assert len(alignment.gaussians) == 5 and alignment.alignments == 1
    assert strategy.clock.train_exp_epochs == 1
