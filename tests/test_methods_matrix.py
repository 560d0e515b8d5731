"""Every method on every kind of tiny backbone, in each precision, alone and beside Avalanche's Replay and EWC.

Each cell trains two tasks of real digits: the training loss falls, all weights are finite, a pre-trained
backbone has learnt the second task, and model and plugin states survive a round trip into freshly built objects.

Contrastive losses can't fall far: even perfect unit vectors leave log(number of positives), 3.1 of the 3.9 nats of a
random network here, and the distillation never falls below its teacher's entropy. What must fall there is the
contrastive part above its lower bound. A collapsed network stays at 0.7 nats, so this also says that none collapsed.

ASB redraws the row of one of two classes in every episode, so its loss is that of a classifier that is never done. What
must fall is the loss of an episode's batch in the outer step, on average over a task (0.21 to 0.82 of the loss before).

Avalanche's SCR has such a bound too; nothing is distilled there, so its whole loss must fall above it.

No cell has a linear probe before CILA: its classifier gets no gradient and is fitted after the experience anyway.

Low-rank methods need a transformer: the other networks are refused. Where the backbone isn't the question, they get its
first two blocks.
"""

import math

import pytest
import timm
import torch
from avalanche.training.plugins import EWCPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.benchmarks import ContrastiveAugmentation, digits_stream
from avalanche_firn.experiments.baselines import OneView
from avalanche_firn.models import with_projection_head, with_taskwise_head
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
from avalanche_firn.plugins import (
    ClassifierAlignmentPlugin,
    ClassifierStagePlugin,
    ContrastiveDistillationPlugin,
    FreshOptimizerPlugin,
    ImportantParameterPlugin,
    LocalCrossEntropy,
    MixedPrecisionPlugin,
    SlowLearnerPlugin,
    TaskInferencePlugin,
    WarmupCosinePlugin,
    ZappingPlugin,
    asymmetric_supcon,
)
from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin
from avalanche_firn.plugins.placed_buffer import ResumableReplayPlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.strategies import CILA, LPFT, SLCA, LoRACIPC, SLCAPlusPlus
from avalanche_firn.strategies.avalanche_der import ResumableDER
from avalanche_firn.strategies.avalanche_scr import ResumableSCR
from avalanche_firn.strategies.zapping import ASB


class PaperConvNet(nn.Module):
    """A small convolutional network of the kind that meta-learning papers use; features (B, 512)."""

    num_features = 512

    def __init__(self):
        super().__init__()
        blocks = [(3, 16), (16, 16), (16, 32)]
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(4, o), nn.ReLU()) for i, o in blocks), nn.Flatten()
        )

    def forward(self, x):
        return self.body(x)


def shallow_vit():
    model = timm.create_model("vit_firn_32.omniglot", pretrained=True)
    model.blocks = model.blocks[:2]
    return model


LOW_RANK = ("lorac_ipc", "slca_plus_plus")
AVALANCHE = ("ewc", "lwf", "der", "scr", "avalanche_replay")
BACKBONES = {
    # a transformer from scratch stays at chance for longer than a test may take
    "vit": lambda: timm.create_model("vit_firn_32.omniglot", pretrained=True),
    "shallow_vit": shallow_vit,
    "resnet": lambda: timm.create_model("resnet10t"),
    "convnet": PaperConvNet,
}


def zaps():
    return ZappingPlugin(scope="experience", schedule="experience", seed=0)


class Losses(SupervisedPlugin):
    """Loss of each iteration, per task."""

    def __init__(self):
        super().__init__()
        self.tasks = []

    def before_training_exp(self, strategy, **kwargs):
        self.tasks.append([])

    def after_training_iteration(self, strategy, **kwargs):
        self.tasks[-1].append(strategy.loss.detach().mean())


class TaskLosses(Losses):
    """Without what plugins add to the loss."""

    def after_training_iteration(self, strategy, **kwargs):
        self.tasks[-1].append(strategy.criterion().detach())


class OuterSteps(Losses):
    """Loss of each episode's batch before and after the outer step."""

    def after_training_iteration(self, strategy, **kwargs):
        with torch.no_grad():
            strategy.mb_output = strategy.forward()
            self.tasks[-1].append(torch.stack([strategy.loss.detach().mean(), strategy.criterion().float()]))


class Excess(Losses):
    """Contrastive loss of each iteration above the least that unit vectors can have, per task."""

    def after_training_iteration(self, strategy, **kwargs):
        labels = strategy.mb_y.repeat(2)
        current = torch.tensor(sorted(strategy.experience.classes_in_this_experience))
        anchors = torch.isin(labels, current)
        loss = asymmetric_supcon(strategy.mb_output.detach(), labels, anchors, temperature=0.5)
        # positives at similarity 1, all others at -1
        positives = (labels[:, None] == labels).sum(1) - 1.0
        others = len(labels) - 1 - positives
        least = (positives + others * math.exp(-2 / 0.5)).log().where(anchors & (positives > 0), 0.0).mean()
        self.tasks[-1].append(loss - least)


class ReplayExcess(Losses):
    """The same of SCR: all are anchors, and at temperature 0.1 others count for nothing in the bound."""

    def after_training_iteration(self, strategy, **kwargs):
        labels = strategy.mb_y.repeat(2)
        positives = (labels[:, None] == labels).sum(1) - 1.0
        loss = strategy.criterion().detach() * 0.07 / 0.1
        self.tasks[-1].append(loss - positives.log().mean())


def build_contrastive(backbone, others, plugins):
    """CILA; beside Avalanche's replay, which stores samples itself, its losses and classifier on Naive."""
    model = with_projection_head(BACKBONES[backbone](), feature_size=512 if backbone == "convnet" else None)
    views = ContrastiveAugmentation(crop_scale=(0.7, 1.0), flip=0.0, jitter=None, grey=0.0)
    stage = ClassifierStagePlugin(epochs=20, lr=0.1, views="evaluation")
    rates = WarmupCosinePlugin(final=0.5)
    lr, epochs = {"vit": (1e-4, 1), "resnet": (3e-4, 2), "convnet": (1e-3, 2)}[backbone]
    common = dict(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=lr), train_mb_size=24, train_epochs=epochs,
        eval_mb_size=256, evaluator=None,
    )  # fmt: skip
    if any(isinstance(p, ReplayPlugin) for p in others):
        losses = ContrastiveDistillationPlugin(augmentation=views)
        return Naive(**common, criterion=losses, plugins=[rates, stage, *plugins])
    return CILA(**common, augmentation=views, mem_size=40, rates=rates, classifier=stage, plugins=plugins)


def build_low_rank(method, backbone, others, plugins):
    """The strategies' own losses, but beside Avalanche's replay, which brings other classes than the task's."""
    model = BACKBONES[backbone]()
    criterion = nn.CrossEntropyLoss() if any(isinstance(p, ReplayPlugin) for p in others) else None
    common = dict(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3), criterion=criterion, train_mb_size=24,
        train_epochs=1, eval_mb_size=256, evaluator=None, feature_size=512 if backbone == "convnet" else None,
        plugins=plugins,
    )  # fmt: skip
    if method == "slca_plus_plus":
        own = ClassifierAlignmentPlugin(samples_per_class=32, scaling="feature")
        return SLCAPlusPlus(**common, alignment=own)
    own = dict(
        importance=ImportantParameterPlugin(0.1, window=6), task_inference=TaskInferencePlugin(2),
        alignment=ClassifierAlignmentPlugin.tap(epochs=3, samples_per_class=32, clusters=2),
    )  # fmt: skip
    return LoRACIPC(**common, rank=4, **own)


def build_asb(backbone, plugins):
    """Few episodes. ResNet's BatchNorm can't do with a single image where its last map is one pixel."""
    lr = {"vit": 1e-4, "resnet": 1e-3, "convnet": 2e-3}[backbone]
    model = with_taskwise_head(BACKBONES[backbone](), freeze_old=False)
    return ASB(
        model=model, inner_lr=1e-3, outer_lr=lr, episodes=10, inner_steps=4, remember_size=20, seed=0,
        inner_batch_size=2 if backbone == "resnet" else 1, plugins=plugins, evaluator=None,
    )  # fmt: skip


def build_avalanche(method, common, plugins):
    """Avalanche's own methods; DER and SCR are strategies of their own."""
    common["plugins"] = [FreshOptimizerPlugin(), *plugins]
    if method == "der":
        return ResumableDER(**common, criterion=nn.CrossEntropyLoss(), mem_size=40)
    if method == "scr":
        whole = common["model"]
        views = OneView(ContrastiveAugmentation(crop_scale=(0.7, 1.0), flip=0.0, jitter=None, grey=0.0))
        model = common["model"] = NearestMeanNetwork(whole.backbone, whole.head.in_features)
        common["optimizer"] = torch.optim.AdamW(model.parameters(), lr=3e-4)
        common["train_epochs"] = 2 if isinstance(whole.backbone, PaperConvNet) else 1  # slow, and learns fast
        return ResumableSCR(**common, augmentations=views, mem_size=40, batch_size_mem=12)
    own = {
        "ewc": lambda: ResumableEWCPlugin(0.1, "online", 0.9),
        "lwf": ResumableLwFPlugin,
        "avalanche_replay": lambda: ResumableReplayPlugin(40),
    }
    common["plugins"].insert(1, own[method]())
    return Naive(**common, criterion=nn.CrossEntropyLoss())


def build(method, backbone, precision, others, losses):
    torch.manual_seed(0)
    plugins = [*others, losses, MixedPrecisionPlugin(precision)]
    if method == "cila":
        return build_contrastive(backbone, others, plugins)
    if method in LOW_RANK:
        return build_low_rank(method, backbone, others, plugins)
    if method == "asb":
        return build_asb(backbone, plugins)
    model = with_taskwise_head(
        BACKBONES[backbone](), freeze_old=method not in ("naive", "zapping", "lp_ft", *AVALANCHE)
    )
    common = dict(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), train_mb_size=24, train_epochs=2,
        eval_mb_size=256, evaluator=None,
    )  # fmt: skip
    if method in AVALANCHE:
        return build_avalanche(method, common, plugins)
    replay = any(isinstance(p, ReplayPlugin) for p in others)
    criterion = nn.CrossEntropyLoss() if replay or method in ("naive", "zapping", "lp_ft") else LocalCrossEntropy()
    if method == "lp_ft":
        return LPFT(**common, criterion=criterion, plugins=plugins)
    if method == "slca":
        own = ClassifierAlignmentPlugin(samples_per_class=32)
        return SLCA(**common, criterion=criterion, backbone_scale=0.05, alignment=own, plugins=plugins)
    own = {
        "naive": lambda: [FreshOptimizerPlugin()],
        "zapping": lambda: [FreshOptimizerPlugin(), zaps()],
        "slow_learner": lambda: [SlowLearnerPlugin(0.05)],
    }
    return Naive(**common, criterion=criterion, plugins=[*own[method](), *plugins])


@pytest.fixture(scope="module")
def digits():
    return digits_stream(tasks=5)


CELLS = [
    *(
        (m, b, p, None)
        for m in ("naive", "zapping", "asb", "slow_learner", "slca", "lp_ft", "cila", *AVALANCHE)
        for b in ("vit", "resnet", "convnet")
        for p in ("fp32", "bf16")
    ),
    *(
        (m, "convnet", "fp32", c)
        for m in ("zapping", "slow_learner", "slca", "lp_ft", "cila")
        for c in ("replay", "ewc")
    ),
    *((m, "convnet", "fp32", "zapping") for m in ("slca", "lp_ft")),
    *((m, "convnet", "fp16", None) for m in ("slca", "cila")),
    *((m, "vit", p, None) for m in LOW_RANK for p in ("fp32", "bf16")),
    *((m, "shallow_vit", "fp32", c) for m in LOW_RANK for c in ("replay", "ewc")),
    *((m, "shallow_vit", "fp16", None) for m in LOW_RANK),
]


@pytest.mark.parametrize(("method", "backbone", "precision", "companion"), CELLS)
def test_two_tasks(digits, method, backbone, precision, companion):
    def others():
        made = {"replay": lambda: ReplayPlugin(mem_size=40), "ewc": lambda: EWCPlugin(ewc_lambda=0.1), "zapping": zaps}
        return [] if companion is None else [made[companion]()]

    kinds = {"cila": Excess, "asb": OuterSteps, "scr": ReplayExcess, **dict.fromkeys((*LOW_RANK, "lwf"), TaskLosses)}
    losses = kinds.get(method, Losses)()
    strategy = build(method, backbone, precision, others(), losses)
    for experience in digits.train[:2]:
        torch.manual_seed(experience.current_experience)
        strategy.train(experience, eval_streams=[])
    for task in losses.tasks:
        if method == "asb":
            before, after = torch.stack(task).mean(0)
            assert after < 0.9 * before
            continue
        quarter = len(task) // 4
        last, first = (torch.stack(part).mean() for part in (task[-quarter:], task[:quarter]))
        assert last < 0.8 * first and (method != "cila" or last < 0.65)
    strategy.eval(digits.test[:2])
    assert all(torch.isfinite(v).all() for v in strategy.model.state_dict().values())

    rows = range(0, len(digits.test[1].dataset), 2)
    images = torch.stack([digits.test[1].dataset[i][0] for i in rows])
    strategy.model.eval()
    expected = strategy.model(images)
    wanted = torch.tensor([digits.test[1].dataset[i][1] for i in rows])
    newest = sorted(digits.train[1].classes_in_this_experience)
    accuracy = (torch.tensor(newest)[expected[:, newest].argmax(1)] == wanted).float().mean()
    # the others start from random weights (two epochs teach the loss, not yet the test images) or end in a fresh row
    if "vit" in backbone and method != "asb":
        assert accuracy > 0.9

    fresh = build(method, backbone, precision, others(), Losses())
    fresh.model.load_state_dict(strategy.model.state_dict())
    fresh.model.head.adaptation(digits.train[0])  # puts the head into class-id order, as the strategy does
    torch.testing.assert_close(fresh.model.eval()(images), expected, rtol=0, atol=0)
    for old, new in zip(strategy.plugins, fresh.plugins, strict=True):
        if hasattr(old, "load_state_dict"):
            new.load_state_dict(old.state_dict())
            assert new.state_dict().keys() == old.state_dict().keys()
            # a scale waits for its device, a schedule for its optimizer
            waits = isinstance(old, (MixedPrecisionPlugin, FreshOptimizerPlugin))
            if method in ("cila", "zapping", "asb", *LOW_RANK, *AVALANCHE) and not waits:
                assert differing_state(to_plain(new.state_dict()), to_plain(old.state_dict())) is None
        if isinstance(old, ZappingPlugin):
            assert [zap.rows for zap in new.history] == [(0, 1), (2, 3)] and not new.zapped_past
        if isinstance(old, TaskInferencePlugin):
            assert old.accuracies[2] > 0.9
            predicted = new.predict(fresh.model, images)
            assert torch.equal(predicted, old.predict(strategy.model, images))
            assert (predicted.argmax(1) == wanted).float().mean() > 0.8


@pytest.mark.parametrize("backbone", ["resnet", "convnet"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_networks_without_linear_layers_are_refused(method, backbone):
    reason = {"lorac_ipc": "has no linear layer called .*", "slca_plus_plus": r"targets \['qkv'\] match nothing in .*"}
    with pytest.raises(ValueError, match=reason[method] + r"torch\.nn\.Linear layers.*, of which this model has none"):
        build(method, backbone, "fp32", [], Losses())
