"""Small strategies on digits for the checkpoint tests, and ways to run, crash and compare them."""

from __future__ import annotations

import functools
import gc
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark, task_incremental_benchmark, with_task_labels
from avalanche.benchmarks.utils import concat_datasets
from avalanche.evaluation.metric_results import AlternativeValues
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, loss_metrics
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training import Naive
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LRSchedulerPlugin,
    SupervisedPlugin,
    SynapticIntelligencePlugin,
)
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks import ContrastiveAugmentation
from avalanche_firn.benchmarks.domains import build_domain_stream
from avalanche_firn.evaluation import RepresentationDrift, RepresentationProbe
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.linear_probe import LinearProbePlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.placed_buffer import ResumableReplayPlugin
from avalanche_firn.plugins.plain_state import differing_state
from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
from avalanche_firn.plugins.strategy_state import capture_strategy
from avalanche_firn.plugins.task_inference import TaskInferencePlugin
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin
from avalanche_firn.plugins.zapping import ZappingPlugin
from avalanche_firn.strategies.avalanche_der import ResumableDER
from avalanche_firn.strategies.avalanche_scr import ResumableSCR
from avalanche_firn.strategies.cila import CILA
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA
from avalanche_firn.strategies.slca_plus_plus import SLCAPlusPlus
from avalanche_firn.strategies.zapping import ASB, MetaASB

X, Y = load_digits(return_X_y=True)
X, Y = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(Y)


class Crash(Exception):
    """What ends a run in these tests."""


class Bomb(SupervisedPlugin):
    """Raises in the n-th call of a hook, and does nothing else: an evaluation in one pass may go on without it."""

    stateless = True
    affects_results = False

    def __init__(self, hook: str = "", count: int = -1) -> None:
        super().__init__()
        self.calls = 0
        if hook:
            setattr(self, hook, self._tick)
        self.count = count

    def _tick(self, strategy: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls == self.count:
            raise Crash


class Noisy(TensorDataset):
    """Augmentation that draws from all global generators, in whichever process loads the data."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.05 * (torch.rand(()) + random.random() + np.random.rand()).float(), y


def dataset(part: slice, kind: type = TensorDataset):
    data = kind(X[part], Y[part])
    data.targets = Y[part].tolist()
    return data


def stream(kind: type = TensorDataset, train: int = 128, *, test: type = TensorDataset, **kwargs: Any):
    """Three experiences of 4, 3 and 3 classes, with task labels."""
    parts = {"train": dataset(slice(0, train), kind), "test": dataset(slice(400, 450), test)}
    order = [3, 1, 7, 0, 9, 2, 8, 4, 6, 5]
    return with_task_labels(class_incremental_benchmark(parts, class_order=order, num_classes_per_exp=[4, 3, 3]))


def mlp(**kwargs: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 10))


def evaluator(*loggers: Any, **kwargs: Any) -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, epoch_running=True, experience=True, stream=True),
        loss_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True),
        loggers=list(loggers),
        **kwargs,
    )


COMMON = {"train_mb_size": 10, "train_epochs": 2, "eval_mb_size": 64}


def naive_adam(plugins, loggers=()):
    """Optimizer state and schedule cross experiences; older generation of benchmarks."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7), reset_lr=False)
    data = (dataset(slice(0, 128)), dataset(slice(400, 450)))
    bm = nc_benchmark(*data, n_experiences=5, task_labels=False, shuffle=False)
    strategy = Naive(
        model=model, optimizer=optimizer, plugins=[schedule, *plugins], evaluator=evaluator(*loggers), **COMMON
    )
    return strategy, bm, {"eval_streams": []}


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.2))
        self.head = IncrementalClassifier(24, 2)

    def forward(self, x):
        return self.head(self.body(x))


def growing(plugins, loggers=(), **kwargs):
    """Avalanche's growing head in two groups with momentum, grown by a periodic evaluation of the test stream."""
    model = Growing()
    groups = [{"params": model.body.parameters(), "lr": 0.01}, {"params": model.head.parameters(), "lr": 0.1}]
    bm = stream(**kwargs)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3),
        plugins=plugins,
        evaluator=evaluator(*loggers),
        eval_every=1,
        **COMMON,
    )
    return strategy, bm, {"eval_streams": [bm.test_stream]}


def growing_by_iteration(plugins, loggers=()):
    """Periodic evaluation inside an epoch: the head grows between two batches."""
    strategy, bm, _ = growing(plugins, loggers)
    strategy.eval_every = 3
    for plugin in strategy.plugins:
        if hasattr(plugin, "peval_mode"):
            plugin.eval_every, plugin.peval_mode, plugin.do_initial = 3, "iteration", False
    return strategy, bm, {"eval_streams": [bm.test_stream]}


def sgd(model: nn.Module, plugins: list[Any], loggers=(), strategy: Any = Naive, **kwargs: Any):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Avalanche's default criterion is one object for all strategies of a process
    settings = {**COMMON, "criterion": nn.CrossEntropyLoss(), "evaluator": evaluator(*loggers), **kwargs}
    return strategy(model=model, optimizer=optimizer, plugins=plugins, **settings)


def early_stopping(plugins, loggers=()):
    bm = stream()
    stopper = EarlyStoppingPlugin(1, "test_stream", "Top1_Acc_Stream", margin=0.2)
    settings = {"train_epochs": 4, "eval_every": 1}
    return sgd(mlp(), [stopper, *plugins], loggers, **settings), bm, {"eval_streams": [bm.test_stream]}


class StopInside(SupervisedPlugin):
    """Ends an experience in the middle of its second epoch."""

    def __init__(self):
        super().__init__()
        self.stops = 0

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_epochs == 1 and strategy.clock.train_epoch_iterations == 1:
            self.stops += 1
            strategy.stop_training()


def stopped_epochs(plugins, loggers=()):
    return sgd(mlp(), [StopInside(), *plugins], loggers, train_epochs=5), stream(), {"eval_streams": []}


def ewc(plugins, loggers=()):
    return (
        sgd(mlp(), [EWCPlugin(50.0, mode="online", decay_factor=0.5), *plugins], loggers),
        stream(),
        {"eval_streams": []},
    )


def synaptic_intelligence(plugins, loggers=()):
    return sgd(mlp(), [SynapticIntelligencePlugin(0.1), *plugins], loggers), stream(), {"eval_streams": []}


def workers(plugins, loggers=()):
    """Augmentation in worker processes, in the modern loader."""
    settings = {"eval_streams": [], "num_workers": 2}
    return sgd(mlp(), plugins, loggers), stream(Noisy), settings


def lasting_workers(plugins, loggers=()):
    """Workers that live through the epochs of an experience carry their random state along."""
    settings = {"eval_streams": [], "num_workers": 2, "persistent_workers": True}
    return sgd(mlp(), plugins, loggers, train_epochs=3), stream(Noisy), settings


def augmented(plugins, loggers=()):
    """Augmentation and dropout draw from the same generators in turn."""
    return sgd(mlp(), plugins, loggers), stream(Noisy), {"eval_streams": []}


class ManyHeads(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.2))
        self.head = MultiHeadClassifier(24, masking=False)

    def forward(self, x, task_labels):
        return self.head(self.body(x), task_labels)


def head_per_task(plugins, loggers=()):
    """Avalanche's multi-head classifier gets a head per task; momentum crosses tasks."""
    data = (dataset(slice(0, 128)), dataset(slice(400, 450)))
    bm = nc_benchmark(*data, n_experiences=5, task_labels=True, shuffle=False, class_ids_from_zero_in_each_exp=True)
    return sgd(ManyHeads(), plugins, loggers), bm, {"eval_streams": []}


class Everything(SupervisedPlugin):
    stateless = True

    def __init__(self, experiences):
        super().__init__()
        sizes = (len(experiences[0].dataset), 14, 11)
        self.datasets = [e.dataset.subset(range(n)) for e, n in zip(experiences, sizes, strict=True)]

    def after_train_dataset_adaptation(self, strategy, **kwargs):
        strategy.adapted_dataset = concat_datasets([d.train() for d in self.datasets])


def several_tasks(plugins, loggers=()):
    """A task-balanced loader shuffles the short datasets again whenever they run out, in the middle of an epoch."""
    bm = task_incremental_benchmark(stream(Noisy), reset_task_labels=True)
    return sgd(mlp(), [Everything(bm.train_stream), *plugins], loggers), bm, {"eval_streams": []}


def slca(plugins, loggers=(), **kwargs):
    bm = stream()
    backbone = nn.Sequential(nn.Linear(64, 24), nn.LayerNorm(24), nn.ReLU(), nn.Dropout(0.2))
    strategy = SLCA(
        model=FeatureClassifier(backbone, TaskwiseLinearHead(24)),
        backbone_scale=0.1,
        milestones=[1],
        plugins=plugins,
        evaluator=evaluator(*loggers),
        **{**COMMON, **kwargs},
    )
    return strategy, bm, {"eval_streams": [bm.test_stream] if "eval_every" in kwargs else []}


def lp_ft(plugins, loggers=(), **kwargs):
    """A probe by mini-batches on random views, BatchNorm fixed after it, a smaller rate, half of the model frozen."""
    bm = stream(Noisy)
    backbone = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 24))
    probe = LinearProbePlugin(
        solver="sgd", lp_views=2, head_init="reset", ft_lr=0.005, backbone=["backbone.4.*"], epochs=3, **kwargs
    )
    model = FeatureClassifier(backbone, TaskwiseLinearHead(24, freeze_old=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    strategy = LPFT(
        model=model, optimizer=optimizer, linear_probe=probe, plugins=plugins, evaluator=evaluator(*loggers), **COMMON
    )
    return strategy, bm, {"eval_streams": []}


def lp_ft_one_optimizer(plugins, loggers=()):
    """The probe on Naive, whose own optimizer lives through the stream and gets its rate back; features are probed."""
    bm = stream()
    model = nn.Sequential(OrderedDict(body=mlp()[:4], head=nn.Linear(24, 10)))
    model.body[2] = nn.Tanh()
    probes = RepresentationProbe(
        bm.train_stream, bm.test_stream, ["knn", "linear", "fine_tune"], tasks="seen", lr=0.01, epochs=1, k=5
    )
    drift = RepresentationDrift(bm.train_stream[0].dataset, num_images=16)
    metrics = EvaluationPlugin(probes, drift, accuracy_metrics(epoch=True, stream=True), loggers=list(loggers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plugins = [LinearProbePlugin(head="head", ft_lr=0.01), *plugins]
    strategy = Naive(model=model, optimizer=optimizer, plugins=plugins, evaluator=metrics, **COMMON)
    return strategy, bm, {"eval_streams": []}


def slca_evaluated(plugins, loggers=()):
    return slca(plugins, loggers, eval_every=1)


def slca_bf16(plugins, loggers=()):
    return slca([MixedPrecisionPlugin("bf16"), *plugins], loggers)


class Squares(TensorDataset):
    """The digits as images (1, 8, 8)."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x.view(1, 8, 8), y


def contrastive(bm, plugins, loggers=(), *, dropout=0.0, rule=None, storage="class_balanced", **kwargs):
    """CILA on a small convolutional network with BatchNorm; three epochs of the first experience, with a warm-up."""
    norm = nn.Dropout(dropout) if dropout else nn.BatchNorm2d(8)
    shape = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)))  # test images are rows of 64
    network = nn.Sequential(shape, nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    strategy = CILA(
        model=network,
        feature_size=72,
        contrastive=ContrastiveDistillationPlugin(balance=3.0, **(rule or {})),
        classifier=ClassifierStagePlugin(epochs=3, batch_size=20, lr=0.1),
        rates=WarmupCosinePlugin(0.05, first_epochs=3, warmup=True, warmup_epochs=1),
        storage=storage,
        mem_size=12,
        projection_size=8,
        plugins=plugins,
        evaluator=EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True), loss_metrics(epoch=True, stream=True), loggers=list(loggers)
        ),
        **{**COMMON, **kwargs},
    )
    return strategy, bm, {"eval_streams": []}


def views_on_the_device():
    return ContrastiveAugmentation(crop_scale=(0.5, 1.0), jitter=None, grey=0.0, mean=0.0, std=1.0)


def cila(plugins, loggers=()):
    """Views on the device and BatchNorm, whose running statistics move in the teacher too."""
    return contrastive(stream(Squares), plugins, loggers, augmentation=views_on_the_device())


def cila_task(plugins, loggers=()):
    """Dropout, and averages over the whole task: the sums cross epochs."""
    rule = {"average_over": "task", "teacher_bn": "running"}
    return contrastive(
        stream(Squares), plugins, loggers, dropout=0.3, rule=rule, augmentation=views_on_the_device(), eval_every=0
    )


def cila_final_model(plugins, loggers=()):
    """One more pass over the loader's data at the end of an experience."""
    rule = {"average_over": "final_model"}
    return contrastive(stream(Squares), plugins, loggers, rule=rule, augmentation=views_on_the_device())


def two_noisy_views(x):
    """Draws from all global generators, where the data are loaded."""
    views = [x.view(1, 8, 8) + 0.05 * (torch.rand(()) + random.random() + np.random.rand()) for _ in range(2)]
    return torch.stack(views).float()


def domains(transform=None):
    """Ten digits in each of three domains."""
    return build_domain_stream(
        "domains",
        train=[dataset(slice(40 * d, 40 * (d + 1))) for d in range(3)],
        test=[dataset(slice(400 + 20 * d, 420 + 20 * d)) for d in range(3)],
        class_names=[str(c) for c in range(10)],
        fingerprint="",
        train_transform=transform,
    ).benchmark


def cila_domains(plugins, loggers=()):
    """Ten digits in each of three domains, a reservoir of them, views from the loader."""
    bm = domains(two_noisy_views)
    return contrastive(bm, plugins, loggers, rule={"domain_incremental": True}, storage="reservoir")


def squares():
    """12, 8 and 8 steps in two epochs of the experiences."""
    return stream(Squares, test=Squares)


def vit(**kwargs: Any) -> nn.Module:
    """Five tokens; twelve matrices to adapt."""
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **{**shape, **kwargs})


class Importance(SupervisedPlugin):
    """Statistics and frozen matrices after every step: they become part of the state that is compared."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_update(self, strategy, **kwargs):
        own = next(p for p in strategy.plugins if isinstance(p, ImportantParameterPlugin))
        composition = LoRAComposition(strategy.model)
        tasks = [composition.num_tasks, composition.num_closed]
        self.seen.append({"tracker": own.tracker.state_dict(), "frozen": composition.frozen, "tasks": tasks})


def lorac_ipc(plugins, loggers=(), **kwargs):
    """Importance is tracked in the last five steps of an experience, from step 7, 15 and 23 of the run on."""
    model = vit(proj_drop_rate=0.1)
    bm = squares()
    strategy = LoRACIPC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        rank=2,
        importance=ImportantParameterPlugin(0.2, window=5),
        alignment=ClassifierAlignmentPlugin.tap(epochs=3, samples_per_class=16, clusters=2),
        task_inference=TaskInferencePlugin(2),
        plugins=[Importance(), *plugins],
        evaluator=evaluator(*loggers),
        **{**COMMON, **kwargs},
    )
    return strategy, bm, {"eval_streams": [bm.test_stream] if "eval_every" in kwargs else []}


def lorac_ipc_evaluated(plugins, loggers=()):
    """Evaluations within a task, with weights that are still open, and at its end."""
    return lorac_ipc(plugins, loggers, eval_every=1)


def slca_plus_plus(plugins, loggers=(), **kwargs):
    """One open pair per qkv for the whole stream."""
    bm = squares()
    strategy = SLCAPlusPlus(
        model=vit(proj_drop_rate=0.1),
        alignment=ClassifierAlignmentPlugin(epochs=3, samples_per_class=16, scaling="feature"),
        plugins=plugins,
        evaluator=evaluator(*loggers),
        **{**COMMON, **kwargs},
    )
    return strategy, bm, {"eval_streams": [bm.test_stream] if "eval_every" in kwargs else []}


EPISODES = {"episodes": 8, "inner_steps": 3, "remember_size": 8}


def asb(plugins, loggers=(), **kwargs):
    """Eight episodes in each experience on random views, dropout, a growing classifier; the seed is drawn."""
    bm = stream(Noisy)
    settings = {"inner_lr": 0.05, "outer_lr": 0.01, "eval_mb_size": 64, **EPISODES, **kwargs}
    strategy = ASB(model=Growing(), plugins=plugins, evaluator=evaluator(*loggers), **settings)
    return strategy, bm, {"eval_streams": [bm.test_stream] if "eval_every" in kwargs else []}


def asb_evaluated(plugins, loggers=()):
    """Evaluations between two episodes; the classifier has all its rows from the first one on."""
    return asb(plugins, loggers, eval_every=3, peval_mode="iteration")


def meta_asb(plugins, loggers=()):
    """BatchNorm, whose statistics move in the sequences that are dropped; a clipped gradient, momentum."""
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    strategy = MetaASB(
        model=FeatureClassifier(nn.Sequential(*layers), nn.Linear(72, 10)),
        inner_lr=0.05,
        outer_lr=0.05,
        outer_optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        max_grad_norm=1.0,
        cycles=2,
        eval_mb_size=64,
        seed=3,
        plugins=plugins,
        evaluator=evaluator(*loggers),
        **EPISODES,
    )
    return strategy, squares(), {"eval_streams": []}


def episodes_lasting_workers(plugins, loggers=()):
    """The plugin alone, two passes an experience, augmentation in worker processes that are asked to live on."""
    phase = SequentialPhasePlugin(0.05, zap=True, seed=3, **EPISODES)
    settings = {"eval_streams": [], "num_workers": 2, "persistent_workers": True}
    return sgd(Growing(), [phase, *plugins], loggers), stream(Noisy), settings


def zapped_iid(plugins, loggers=(), **kwargs):
    """Half of the rows before the second and third epoch, from private generators; Adam keeps its state."""
    bm = stream(Noisy)
    zaps = ZappingPlugin.pretraining(**{"fraction": 0.5, "target": "4", "optimizer_state": "rows_seeded", **kwargs})
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    settings = {**COMMON, "train_epochs": 3}
    strategy = Naive(
        model=model, optimizer=optimizer, plugins=[zaps, *plugins], evaluator=evaluator(*loggers), **settings
    )
    return strategy, bm, {"eval_streams": []}


def zapped_iid_reference(plugins, loggers=()):
    """Rows by NumPy's generator, values from the global one, as the released code."""
    return zapped_iid(plugins, loggers, reference=True, optimizer_state="keep")


def backbone():
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2))


def grown(own, plugins, loggers=(), **kwargs):
    """A growing classifier and a fresh optimizer, as Avalanche's baselines get them in recipes."""
    model = FeatureClassifier(backbone(), TaskwiseLinearHead(24, freeze_old=False))
    return sgd(model, [FreshOptimizerPlugin(), *own, *plugins], loggers, **kwargs)


def ewc_online(plugins, loggers=()):
    """Importances that meet new rows of the classifier."""
    own = ResumableEWCPlugin(5.0, "online", 0.9)
    return grown([own], plugins, loggers), stream(Noisy), {"eval_streams": []}


def lwf(plugins, loggers=()):
    """A teacher in training mode, whose BatchNorm moves and whose dropout draws; evaluations within an experience."""
    bm = stream(Noisy)
    own = [ResumableLwFPlugin(teacher="training"), MixedPrecisionPlugin("bf16")]
    return grown(own, plugins, loggers, eval_every=1), bm, {"eval_streams": [bm.test_stream]}


def avalanche_replay(plugins, loggers=()):
    """A buffer that is smaller than what Avalanche draws from it in two steps."""
    own = ResumableReplayPlugin(12, batch_size_mem=8)
    return grown([own], plugins, loggers), stream(Noisy), {"eval_streams": []}


def fast_slca(plugins, loggers=()):
    """Whole batches from memory, cached hooks, evaluations in one pass."""
    return slca([MixedPrecisionPlugin("bf16"), FastPathPlugin(), *plugins], loggers, eval_every=1)


def fast_replay(plugins, loggers=()):
    """Two data sets in memory side by side; the buffer is shuffled again in the middle of an epoch."""
    own = [ResumableReplayPlugin(12, batch_size_mem=8), FastPathPlugin()]
    return grown(own, plugins, loggers), stream(), {"eval_streams": []}


def fast_lasting_workers(plugins, loggers=()):
    """Workers that live through the epochs, and whose draws depend on the batch alone."""
    settings = {"eval_streams": [], "num_workers": 2}
    return sgd(mlp(), [FastPathPlugin(), *plugins], loggers, train_epochs=3), stream(Noisy), settings


def noisy_view(x):
    return x + 0.05 * (torch.rand(()) + random.random() + np.random.rand()).float()


def replay_domains(plugins, loggers=()):
    """The classes come again, a reservoir of them; augmentation in worker processes."""
    own = ResumableReplayPlugin(12, storage="reservoir")
    return grown([own], plugins, loggers), domains(noisy_view), {"eval_streams": [], "num_workers": 2}


def der(plugins, loggers=(), **kwargs):
    model = FeatureClassifier(backbone(), TaskwiseLinearHead(24, freeze_old=False))
    settings = {"strategy": ResumableDER, "mem_size": 15, "batch_size_mem": 6, "alpha": 0.3, **kwargs}
    return sgd(model, [FreshOptimizerPlugin(), *plugins], loggers, **settings), stream(Noisy), {"eval_streams": []}


def der_bf16(plugins, loggers=()):
    """DER without the labels of stored images, on a stream whose classes come again."""
    strategy, _, settings = der([MixedPrecisionPlugin("bf16"), *plugins], loggers, beta=0.0)
    return strategy, domains(noisy_view), settings


def blurred(images):
    """A view of every image of a batch, drawn from torch's generator."""
    return images * (0.9 + 0.2 * torch.rand(len(images), 1, device=images.device))


def scr(plugins, loggers=()):
    """Class means from a buffer, four views of it in a step."""
    metrics = EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True), loss_metrics(epoch=True, stream=True), loggers=list(loggers)
    )
    settings = {"strategy": ResumableSCR, "mem_size": 20, "batch_size_mem": 10, "augmentations": blurred}
    model = NearestMeanNetwork(backbone(), 24, projection_size=8)
    strategy = sgd(model, [FreshOptimizerPlugin(), *plugins], loggers, **settings, evaluator=metrics)
    return strategy, stream(Noisy), {"eval_streams": []}


RECIPES = [
    naive_adam, growing, growing_by_iteration, early_stopping, stopped_epochs, ewc, synaptic_intelligence, workers,
    lasting_workers, augmented, slca, slca_evaluated, slca_bf16, head_per_task, lp_ft, lp_ft_one_optimizer,
    cila, cila_task, cila_final_model, cila_domains, lorac_ipc, slca_plus_plus,
    asb, asb_evaluated, meta_asb, episodes_lasting_workers, zapped_iid, zapped_iid_reference,
    ewc_online, lwf, avalanche_replay, replay_domains, der, der_bf16, scr,
    fast_slca, fast_replay, fast_lasting_workers,
]  # fmt: skip


def play(
    recipe: Callable[..., Any],
    folder: Path,
    bomb: Bomb | None = None,
    *,
    seed: int = 0,
    loggers: Callable[[], list[Any]] = list,
    **kwargs: Any,
):
    """Build everything from ``seed`` and run to the end, or to the crash."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    kwargs = {"every": 4, **kwargs}
    checkpoint = ExactCheckpointPlugin(folder, **kwargs) if kwargs["every"] is not None else None
    strategy, bm, settings = recipe([p for p in (bomb or Bomb(), checkpoint) if p is not None], loggers())
    start = 0 if checkpoint is None else checkpoint.resume(strategy)
    results = []
    for experience in bm.train_stream[start:]:
        if checkpoint is None or not checkpoint.is_trained(experience):
            strategy.train(experience, **settings)
        results.append(strategy.eval(bm.test_stream))
    return strategy, results


def crash(recipe, folder, hook, count, **kwargs):
    with pytest.raises(Crash):
        play(recipe, folder, Bomb(hook, count), **kwargs)
    gc.collect()  # loader workers end now, and not while the next ones are started


def state_of(strategy) -> dict[str, Any]:
    """The whole state; the bomb's own entry has no state, the checkpoint plugin is left out."""
    state = capture_strategy(strategy)
    state["plugins"] = [p for p in state["plugins"] if not p["class"].endswith(".ExactCheckpointPlugin")]
    return state


def assert_same(run, reference) -> None:
    strategy, results = run
    expected, expected_results = reference
    assert differing_state(state_of(expected), state_of(strategy)) is None
    # pictures are no state, and two objects are never equal
    last, wanted = (
        {k: v for k, v in r[-1].items() if not isinstance(v, AlternativeValues)} for r in (results, expected_results)
    )
    assert last == wanted


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """All scalars of the event files in a folder: (tag, step, value), sorted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return sorted((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))
