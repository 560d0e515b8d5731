"""ClassifierStagePlugin: sampling and rates to the golden numbers, what it is fitted on, and what it leaves alone."""

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.logging import BaseLogger
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
from avalanche_firn.models import ContrastiveClassifier, ProjectionHead, TaskwiseLinearHead, extract_features
from avalanche_firn.plugins import ClassifierStagePlugin, ContrastiveDistillationPlugin, RehearsalPlugin
from avalanche_firn.plugins import classifier_stage as module
from avalanche_firn.plugins.classifier_stage import balancing_weights
from avalanche_firn.plugins.random_state import capture_random_state, private_random_state
from avalanche_firn.plugins.run_errors import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore::DeprecationWarning")


# --------------------------------------------------------------------- ingredients
class Net(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=0.5), nn.Dropout(0.3), nn.Tanh()
        )
        self.classifier = nn.Linear(8, 6) if head is None else head

    def forward(self, x):
        return self.classifier(self.backbone(x))


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def clusters(classes=4, per_class=10, spread=0.3):
    """Sample i of class i % classes, images (1, 4, 4)."""
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(classes), per_class)
    x = 2 * rng.normal(size=(classes, 1, 4, 4))[y] + spread * rng.normal(size=(len(y), 1, 4, 4))
    return torch.tensor(x, dtype=torch.float32), y


def ordered(order=((3, 1), (0, 2)), views=False, transforms=None):
    """A stream whose experiences hold these classes; with two views the second one is noise."""
    x, y = clusters()
    if views:
        x = torch.stack([x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))], dim=1)
    parts = []
    for classes in order:
        rows = np.isin(y, classes)
        data = TensorDataset(x[rows], torch.tensor(y[rows]))
        data.targets = y[rows].tolist()
        parts.append(as_classification_dataset(data, transform_groups=transforms))
    return with_classes_timeline(benchmark_from_datasets(train=parts, test=parts))


def naive(model, *plugins, criterion=None, epochs=0, loggers=(), **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Naive(
        model=model, optimizer=optimizer, criterion=criterion or nn.CrossEntropyLoss(), train_mb_size=7,
        train_epochs=epochs, eval_mb_size=16, plugins=list(plugins), evaluator=EvaluationPlugin(loggers=list(loggers)),
        **more,
    )  # fmt: skip


def train(strategy, stream):
    torch.manual_seed(1)
    for experience in stream:
        strategy.train(experience, eval_streams=[])
    return {k: v.clone() for k, v in strategy.model.state_dict().items()}


class Spy:
    """An augmentation that keeps what it was given; its second view is noise."""

    def __init__(self):
        self.calls = []

    def __call__(self, images):
        self.calls.append(images.clone())
        return torch.stack([images + 1, torch.randn_like(images)], dim=1)


class Collect(BaseLogger):
    def __init__(self):
        super().__init__()
        self.values = {}

    def log_single_metric(self, name, value, x_plot):
        self.values.setdefault(name, []).append((x_plot, value))


# --------------------------------------------------------------------------- golden
@pytest.mark.parametrize(("groups", "key"), [("class_targets", "class"), ("domain_ids", "domain")])
def test_golden_weights(golden, groups, key):
    g = golden("cila", "classifier_stage")
    weights = balancing_weights(g[groups].tolist())
    assert weights.dtype == torch.float64 and len(weights) == int(g[f"{key}_num_draws"])
    np.testing.assert_allclose(weights, g[f"{key}_weights"], rtol=1e-6)
    totals = torch.zeros(int(g[groups].max()) + 1).double().index_add(0, torch.tensor(g[groups]), weights)
    torch.testing.assert_close(totals[totals > 0], torch.ones_like(totals[totals > 0]))


@pytest.mark.parametrize(("key", "lr"), [("linear_1", 1.0), ("linear_01", 0.1)])
def test_golden_rates(golden, key, lr):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, rates = ClassifierStagePlugin(lr=lr).schedule(optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, golden("cila", "learning_rates")[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(100, [60, 75, 90]), (10, [6, 8, 9]), (3, [2]), (2, [1]), (1, []), (40, [24, 30, 36])]
)
def test_default_milestones(epochs, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = ClassifierStagePlugin(epochs).schedule(optimizer)
    assert sorted(schedule.milestones) == expected and schedule.gamma == 0.2


# ------------------------------------------------------------------------ what is fitted
HEADS = {
    "taskwise": lambda: TaskwiseLinearHead(8, freeze_old=False),
    "taskwise_frozen": lambda: TaskwiseLinearHead(8),
    "linear": lambda: nn.Linear(8, 6),
    "without_bias": lambda: nn.Linear(8, 6, bias=False),
    "incremental": lambda: IncrementalClassifier(8, 2),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("views", ["augmented", "evaluation"])
@pytest.mark.parametrize("memory", [RehearsalPlugin, ReplayPlugin])
def test_separable_classes_are_told_apart(head, views, memory):
    log, benchmark = Collect(), ordered()
    stage = ClassifierStagePlugin(30, 16, views=views)
    strategy = naive(Net(HEADS[head]()), memory(40), stage, loggers=[log])
    x, y = clusters()
    for experience, known in zip(benchmark.train_stream, ([1, 3], [0, 1, 2, 3]), strict=True):
        strategy.train(experience, eval_streams=[])
        chosen = np.isin(y, known)
        with torch.no_grad():
            logits = strategy.model.eval()(x[chosen])[:, known]
        assert torch.equal(torch.tensor(known)[logits.argmax(1)], torch.tensor(y[chosen]))
    assert {name: [s for s, _ in curve] for name, curve in log.values.items()} == {
        "classifier/loss": [0, 1], "classifier/accuracy": [0, 1],
    }  # fmt: skip
    assert [v for _, v in log.values["classifier/accuracy"]] == [1.0, 1.0]
    assert all(0 <= v < 0.3 for _, v in log.values["classifier/loss"])


def test_rows_of_classes_to_come_stay():
    model = Net()
    start = model.classifier.weight.detach().clone()
    train(naive(model, ClassifierStagePlugin(2)), ordered().train_stream[:1])
    changed = (model.classifier.weight != start).any(1)
    assert changed.tolist() == [False, True, False, True, False, False]


def test_equals_plain_training_on_the_stored_features():
    """Classifier, accuracy and loss of the last epoch, with every setting other than the default."""
    benchmark, log = ordered(), Collect()
    memory = RehearsalPlugin(9)
    stage = ClassifierStagePlugin(10, 6, 0.7, 0.8, 0.01, decay=0.5, views="evaluation", seed=3)
    strategy = naive(Net(), memory, stage, loggers=[log])
    train(strategy, benchmark.train_stream)
    data = memory.dataset(benchmark.train_stream[1], evaluation=True)
    features, targets = extract_features(strategy.model, data, batch_size=16)
    strategy.clock.train_exp_counter = 1  # as it was
    seed = stage._seed(strategy)
    with private_random_state(seed):
        for _ in DataLoader([0]):  # every loader draws a seed
            pass
        layer = nn.Linear(8, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.7, momentum=0.8, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, 11):
            rows = torch.multinomial(balancing_weights(targets), len(targets), True, generator=generator)
            losses, hits = [], 0
            for part in rows.split(6):
                logits = layer(features[part])
                loss = F.cross_entropy(logits, targets[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(len(part) * loss.item())
                hits += int((logits.argmax(1) == targets[part]).sum())
            optimizer.param_groups[0]["lr"] *= 0.5 if epoch in (6, 8, 9) else 1.0
    torch.testing.assert_close(strategy.model.classifier.weight[:4], layer.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(strategy.model.classifier.bias[:4], layer.bias, rtol=0, atol=1e-7)
    assert log.values["classifier/loss"][1][1] == pytest.approx(sum(losses) / len(rows), rel=1e-5)
    assert log.values["classifier/accuracy"][1][1] == pytest.approx(hits / len(rows))


def test_loader_processes_change_nothing():
    ends = []
    for workers in (0, 2):
        stage = ClassifierStagePlugin(2, 8, num_workers=workers)
        ends.append(train(naive(Net(), RehearsalPlugin(8), stage), ordered().train_stream)["classifier.weight"])
    assert torch.equal(*ends)


def test_fitted_on_the_experience_and_the_buffer_it_was_trained_with(monkeypatch):
    """The buffer of the classes before: 20 slots are 10 each, and would be 5 each after another update."""
    fitted, trained = [], []
    original = RehearsalPlugin.dataset

    class Seen(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            data = strategy.dataloader.dataset
            trained.append(sorted(zip(data.origins, data.targets, [p for _, p in data.places], strict=True)))

    def watched(self, experience, *, evaluation=False):
        data = original(self, experience, evaluation=evaluation)
        fitted.append(sorted(zip(data.origins, data.targets, [p for _, p in data.places], strict=True)))
        return data

    memory = RehearsalPlugin(20)
    strategy = naive(Net(), memory, Seen(), ClassifierStagePlugin(1), epochs=1)
    for experience in ordered().train_stream:
        with monkeypatch.context() as patch:
            patch.setattr(RehearsalPlugin, "dataset", watched)
            strategy.train(experience, eval_streams=[])
    assert fitted == [trained[0]] * 2 + [trained[1]] * 2  # the loader asks, then the stage
    assert [origin for origin, _, _ in trained[1]].count(0) == 20 and memory.counts() == {1: 10, 3: 10}


# ----------------------------------------------------------------------- draws and views
def test_draws_are_balanced_and_as_many_as_samples():
    spy = Spy()
    stage = ClassifierStagePlugin(60, 8, augmentation=spy)
    train(naive(Net(), RehearsalPlugin(4), stage), ordered().train_stream)
    assert [len(c) for c in spy.calls[:3]] == [8, 8, 4]
    second = torch.cat(spy.calls[60 * 3 :])
    assert len(second) == 60 * 24  # 20 current samples, 4 stored
    x, y = clusters()
    distance = torch.cdist(second.flatten(1), x.flatten(1))
    drawn = np.bincount(y[distance.argmin(1)], minlength=4) / len(second)
    assert np.abs(drawn - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(second))


@pytest.mark.parametrize("balance", ["class", "domain"])
def test_what_is_balanced_is_a_choice(monkeypatch, balance):
    groups = []
    monkeypatch.setattr(module, "balancing_weights", lambda g: groups.append(list(g)) or balancing_weights(g))
    order = ((0, 1), (0, 1))
    train(
        naive(Net(), RehearsalPlugin(6, storage="reservoir"), ClassifierStagePlugin(1, balance=balance)),
        ordered(order).train_stream,
    )
    assert groups[1][:20] == ([1] * 20 if balance == "domain" else [0, 1] * 10)
    assert balance == "class" or groups[1][20:] == [0] * 6


def test_the_first_view_counts_and_evaluation_needs_none():
    spy = Spy()
    model = Net()
    inputs = []
    model.backbone[0].register_forward_hook(lambda _, args, out: inputs.append(args[0].clone()))
    train(naive(model, ClassifierStagePlugin(1, 64, augmentation=spy)), ordered().train_stream[:1])
    assert torch.equal(inputs[0], spy.calls[0] + 1)
    train(naive(Net(), ClassifierStagePlugin(1, 64, augmentation=spy, views="evaluation")), ordered().train_stream[:1])
    assert len(spy.calls) == 1


def test_two_views_of_the_data_set_are_not_drawn_twice():
    model, inputs = Net(), []
    model.backbone[0].register_forward_hook(lambda _, args, out: inputs.append(args[0].clone()))
    train(naive(model, ClassifierStagePlugin(1, 64)), ordered(views=True).train_stream[:1])
    assert inputs[0].shape == (20, 1, 4, 4)
    x, _ = clusters()
    assert torch.cdist(inputs[0].flatten(1), x.flatten(1)).min(1).values.max() < 0.01


def test_our_augmentation_is_asked_for_one_view():
    asked = []

    class Counting(ContrastiveAugmentation):
        def forward(self, images, views=None):
            asked.append((len(images), views))
            return super().forward(images, views)

    augmentation = Counting(jitter=None, grey=0.0)
    for views in ("augmented", "evaluation"):
        stage = ClassifierStagePlugin(2, 64, augmentation=augmentation, views=views)
        train(naive(Net(), stage), ordered().train_stream[:1])
    assert asked == [(20, 1)] * 2  # none of the second stage's


class Add:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, x):
        return x + self.amount


@pytest.mark.parametrize(("views", "offset"), [("augmented", 50.0), ("evaluation", 90.0)])
@pytest.mark.parametrize("memory", [True, False])
def test_transform_of_the_data(views, offset, memory):
    transforms = {"train": (Add(50.0), None), "eval": (Add(90.0), None)}
    model, means = Net(), []
    model.backbone[0].register_forward_hook(lambda _, args, out: means.append(args[0].mean((1, 2, 3))))
    plugins = [RehearsalPlugin(6)] if memory else []
    train(naive(model, *plugins, ClassifierStagePlugin(1, views=views)), ordered(transforms=transforms).train_stream)
    assert (torch.cat(means) - offset).abs().max() < 10 and len(torch.cat(means)) == (46 if memory else 40)


# ------------------------------------------------------------------------- left alone
def contrastive_network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU())
    return ContrastiveClassifier(body, ProjectionHead(8, 8, 4), nn.Linear(8, 6))


def jitter(images):
    return torch.stack([images + 0.1 * torch.randn_like(images) for _ in range(2)], dim=1)


@pytest.mark.parametrize("views", ["augmented", "evaluation"])
def test_representation_is_bitwise_that_without_the_stage(stream_of, views):
    ends = []
    for stages in ([], [ClassifierStagePlugin(2, 8, views=views, augmentation=jitter)]):
        benchmark, model = stream_of(*clusters(6), [2, 2, 2]), contrastive_network()
        losses = ContrastiveDistillationPlugin(mode="constant", augmentation=jitter)
        strategy = naive(model, RehearsalPlugin(6), *stages, criterion=losses, epochs=2)
        end = train(strategy, benchmark.train_stream)
        assert all(m.training for m in model.modules())
        assert all(p.grad is None for p in model.head.parameters())
        held = {id(p) for p in model.head.parameters()}
        assert not any(id(p) in held for p in strategy.optimizer.state)
        momentum = [s["momentum_buffer"] for s in strategy.optimizer.state.values()]
        end |= {f"momentum {i}": m for i, m in enumerate(momentum)} | {"generator": torch.get_rng_state()}
        ends.append(end)
    assert {k for k in ends[0] if not torch.equal(ends[0][k], ends[1][k])} == {"head.weight", "head.bias"}


def test_modes_hooks_and_generators_come_back_after_an_error():
    model = Net()
    model.backbone[3].eval()  # a mode of its own

    def broken(images):
        torch.rand(3), np.random.rand(3)
        if len(calls := broken.calls) == 2:
            raise RuntimeError("broke")
        calls.append(0)
        return images

    broken.calls, before = [], {}

    class Look(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            model.backbone[3].eval()
            before.update(capture_random_state())

    strategy = naive(model, Look(), ClassifierStagePlugin(3, 8, augmentation=broken))
    with pytest.raises(RuntimeError, match="broke"):
        train(strategy, ordered().train_stream[:1])
    after = capture_random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"]["words"], after["numpy"]["words"])
    assert [m for m in model.modules() if not m.training] == [model.backbone[3]]
    assert not model.classifier._forward_pre_hooks


def test_the_seed_decides():
    ends = []
    for seed in (0, 0, 1):
        stage = ClassifierStagePlugin(2, seed=seed, augmentation=jitter)
        ends.append(train(naive(Net(), stage), ordered().train_stream)["classifier.weight"])
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


# ------------------------------------------------------------------------ when and where
def test_only_at_the_end_of_the_stream():
    heads = []
    for when in ("final", "every"):
        model = Net()
        start = model.classifier.weight.detach().clone()
        strategy, found = naive(model, RehearsalPlugin(6), ClassifierStagePlugin(2, when=when)), []
        for experience in ordered(((0, 1), (2,), (3,))).train_stream:
            strategy.train(experience, eval_streams=[])
            found.append(not torch.equal(model.classifier.weight, start))
        heads.append((found, model.classifier.weight.detach().clone()))
    assert heads[0][0] == [False, False, True] and heads[1][0] == [True, True, True]
    assert torch.equal(heads[0][1], heads[1][1])  # earlier classifiers leave no trace


@pytest.mark.parametrize("eval_every", [-1, 0])
def test_evaluation_after_an_experience_sees_the_new_classifier(eval_every):
    benchmark = ordered()
    strategy = naive(Net(), RehearsalPlugin(40), ClassifierStagePlugin(30, 16), eval_every=eval_every)
    seen = []

    class Last(SupervisedPlugin):
        def after_eval_iteration(self, strategy, **kwargs):
            seen.append((strategy.mb_output[:, [1, 3]].argmax(1) * 2 + 1 == strategy.mb_y).float().mean().item())

    strategy.plugins.insert(0, Last())
    strategy.train(benchmark.train_stream[0], eval_streams=[benchmark.test_stream[:1]])
    assert seen == [] if eval_every < 0 else seen[-1] == 1.0


def test_evaluation_inside_an_experience_is_refused():
    with pytest.raises(ValueError, match="eval_every is 1; with a classifier stage -1 or 0 is accepted"):
        train(naive(Net(), ClassifierStagePlugin(), eval_every=1), ordered().train_stream)


@pytest.mark.parametrize(
    ("head", "message"),
    [(Cosine(8, 6), "classifier is a Cosine; a linear one"), (nn.Linear(8, 2), r"class_ids \[3\].*has no row")],
)
def test_wrong_classifiers_are_refused_before_training(head, message):
    strategy = naive(Net(head), ClassifierStagePlugin(), epochs=1)
    with pytest.raises(ValueError, match=message):
        train(strategy, ordered().train_stream)
    assert strategy.clock.train_iterations == 0


@pytest.mark.parametrize("views", ["augmented", "evaluation"])
def test_features_that_are_not_finite(views):
    model = Net()
    model.backbone[1].bias.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^experience 0 .*, the classifier stage: the features of class \d \("):
        train(naive(model, ClassifierStagePlugin(2, views=views)), ordered().train_stream)


def test_a_silent_evaluator_gets_nothing():
    log = Collect()
    strategy = naive(Net(), ClassifierStagePlugin(1), loggers=[log])
    strategy.evaluator.active = False
    train(strategy, ordered().train_stream)
    assert not log.values and not strategy.evaluator.get_last_metrics()


# ------------------------------------------------------------------------ state, errors
def test_a_restored_stage_knows_the_earlier_classes():
    memory, stage = RehearsalPlugin(6), ClassifierStagePlugin(2)
    strategy = naive(Net(), memory, stage)
    benchmark = ordered()
    train(strategy, benchmark.train_stream[:1])
    states = [memory.state_dict(), stage.state_dict()]
    assert states[1] == {"classes": [1, 3]}
    train(strategy, benchmark.train_stream[1:])
    others = RehearsalPlugin(6), ClassifierStagePlugin(2)
    for other, state in zip(others, states, strict=True):
        other.load_state_dict(state)
    again = naive(Net(), *others)
    again.clock.train_exp_counter = 1
    train(again, benchmark.train_stream[1:])
    assert torch.equal(again.model.classifier.weight[:4], strategy.model.classifier.weight[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs is 0; 1 and above"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0; a rate above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"when": "never"}, "when is 'never'; 'every' or 'final'"),
        ({"balance": "task"}, "balance is 'task'"),
        ({"views": "both"}, "views is 'both'"),
        ({"milestones": [5, 3]}, r"milestones is \[5, 3\]"),
        ({"decay": 0.0}, "gamma is 0.0"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierStagePlugin(**arguments)


def test_nothing_to_balance():
    for groups in ([], torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="groups has shape"):
            balancing_weights(groups)
