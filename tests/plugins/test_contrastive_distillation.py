"""ContrastiveDistillationPlugin inside Avalanche's loop: golden steps, teacher, averages, weight, anchors, state."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import loss_metrics
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from avalanche_firn.models import ContrastiveClassifier, ProjectionHead, with_taskwise_head
from avalanche_firn.plugins import ContrastiveDistillationPlugin, RehearsalPlugin
from avalanche_firn.plugins import contrastive_distillation as module
from avalanche_firn.plugins.contrastive_losses import (
    ContrastiveTerms,
    asymmetric_supcon,
    contrastive_distillation,
    distillation_coefficient,
    relation_distillation,
)
from avalanche_firn.plugins.run_errors import NonFiniteError

pytestmark = pytest.mark.filterwarnings(
    "ignore:No loggers specified", "ignore::DeprecationWarning", "ignore:the coefficient was at its floor"
)
PLAIN = {"temperature": 0.5, "base_temperature": None}
FACTOR = 0.5 / 0.07


# --------------------------------------------------------------------- ingredients
def network(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU())
    return ContrastiveClassifier(body, ProjectionHead(8, 8, 4), nn.Linear(8, 8)).to(dtype)


def samples(classes=6, per_class=7, views=True, dtype=torch.float64):
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(classes), per_class)
    centres = rng.normal(size=(classes, 1, 1, 4, 4))
    x = centres[y] + 0.5 * rng.normal(size=(len(y), 2, 1, 4, 4))
    return torch.tensor(x if views else x[:, 0], dtype=dtype), y


def domains(count=3):
    """Experiences of the same two classes."""
    x, y = samples(2 * count)
    parts = []
    for d in range(count):
        rows = y // 2 == d
        data = TensorDataset(x[rows], torch.tensor(y[rows] % 2))
        data.targets = (y[rows] % 2).tolist()
        parts.append(as_classification_dataset(data))
    return with_classes_timeline(benchmark_from_datasets(train=parts, test=parts))


def jitter(x):
    return torch.stack([x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)], dim=1)


def naive(model, losses, *plugins, epochs=2, evaluator=None, lr=0.05, batch=6, weight_decay=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    return Naive(
        model=model, optimizer=optimizer, criterion=losses, train_mb_size=batch, train_epochs=epochs, eval_mb_size=20,
        plugins=list(plugins), evaluator=evaluator or EvaluationPlugin(loggers=[]),
    )  # fmt: skip


def train(strategy, stream, **kwargs):
    for experience in stream:
        torch.manual_seed(experience.current_experience)
        strategy.train(experience, eval_streams=[], **kwargs)
    return {k: v.clone() for k, v in strategy.model.state_dict().items()}


@pytest.fixture
def three_tasks(stream_of):
    """14 samples of two classes each; batches of 6, 6 and 2."""
    return stream_of(*samples(), [2, 2, 2])


class Steps(SupervisedPlugin):
    """What went into the losses, per task, and copies of the model before and after."""

    def __init__(self):
        super().__init__()
        self.tasks, self.starts, self.ends = [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.tasks.append([])
        self.starts.append(copy.deepcopy(strategy.model).eval())

    def after_forward(self, strategy, **kwargs):
        batch = [strategy.clock.train_exp_epochs, *(t.clone() for t in strategy.mbatch), strategy.mb_output.detach()]
        self.tasks[-1].append(batch)

    def after_training_exp(self, strategy, **kwargs):
        self.ends.append(copy.deepcopy(strategy.model).eval())


class Batches(SupervisedPlugin):
    """Trains on given batches instead of the experience's."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = self.batches


class Collect(BaseLogger):
    def __init__(self):
        super().__init__()
        self.values = {}

    def log_single_metric(self, name, value, x_plot):
        self.values.setdefault(name, []).append((x_plot, value))


@pytest.fixture
def seen(monkeypatch):
    """Labels and anchors of every batch that went into the losses."""
    calls = []

    def spy(features, labels, anchors, **settings):
        calls.append((labels.clone(), anchors.clone()))
        return contrastive_distillation(features, labels, anchors, **settings)

    monkeypatch.setattr(module, "contrastive_distillation", spy)
    return calls


# ---------------------------------------------------------------------- golden steps
class GoldenBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


class GoldenSteps(ContrastiveDistillationPlugin):
    """Keeps losses and states of each step; the strategy's own loss is float32."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps = []

    def __call__(self, output, targets):
        total = super().__call__(output, targets)
        self.steps.append([total.item()])
        return total

    def after_training_iteration(self, strategy, **kwargs):
        sums = self.state_dict()["sums"].clone()
        copies = [{k: v.clone() for k, v in m.state_dict().items()} for m in (strategy.model, self.teacher)]
        self.steps[-1] += [sums, *copies]


def golden_run(g, stream_of, teacher_bn):
    lr, momentum, decay, temperature, base, student, teacher, coefficient = g["setting"]
    names = {
        k.removeprefix("student0."): k.removeprefix("student0.").replace("fc1", "hidden").replace("fc2", "output")
        for k in g if k.startswith("student0.")
    }  # fmt: skip
    names = {k: f"{'projector' if k.startswith('fc') else 'backbone'}.{v}" for k, v in names.items()}
    model = ContrastiveClassifier(GoldenBody(), ProjectionHead(6, 7, 5), nn.Linear(6, 4)).double()
    start = {v: torch.from_numpy(np.asarray(g[f"student0.{k}"])) for k, v in names.items()}
    assert set(model.load_state_dict(start, strict=False).missing_keys) == {"head.weight", "head.bias"}
    losses = GoldenSteps(
        temperature=temperature, student_temperature=student, teacher_temperature=teacher, base_temperature=base,
        floor=coefficient, teacher_bn=teacher_bn,
    )  # fmt: skip
    losses.contrastive_losses, losses.distillation_losses, losses.coefficients = [1.0], [0.0], [None]  # a task is over
    batches = []
    for step in (1, 2):
        x, y = torch.from_numpy(g[f"images{step}"]), torch.from_numpy(g[f"labels{step}"])
        batches.append((x.unflatten(0, (2, len(x) // 2)).transpose(0, 1), y[: len(y) // 2]))
        assert torch.equal(torch.from_numpy(g[f"anchors{step}"]), (y == 2) | (y == 3))
    benchmark = stream_of(torch.zeros(8, 2, 3, 6, 6), np.arange(4).repeat(2), [2, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=losses, train_epochs=1, plugins=[Batches(batches)],
        evaluator=EvaluationPlugin(loggers=[]),
    )  # fmt: skip
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    return losses, names


@pytest.mark.parametrize("name", ["train", "eval"])
def test_golden_steps(golden, stream_of, name):
    g = golden("cila", f"trajectory_teacher_{name}")
    losses, names = golden_run(g, stream_of, {"train": "batch", "eval": "running"}[name])
    assert losses.coefficients == [None, 1.0]
    before = torch.zeros(3, dtype=torch.float64)
    for step, (total, sums, student, teacher) in enumerate(losses.steps):
        contrastive, distillation = ((sums - before)[:2] / (sums - before)[2]).tolist()
        before = sums
        assert total == pytest.approx(g["total_loss"][step], abs=1e-9)
        assert contrastive * FACTOR == pytest.approx(g["contrastive_loss"][step], abs=1e-9)
        assert distillation == pytest.approx(g["distillation_loss"][step], abs=1e-9)
        for who, state in (("student", student), ("teacher", teacher)):
            for key, own in names.items():
                message = f"{who} {key} after step {step + 1}"
                expected = g[f"{who}{step + 1}.{key}"]
                np.testing.assert_allclose(state[own], expected, rtol=0, atol=1e-9, err_msg=message)
    last, start = losses.steps[1][3], g["teacher0.bn1.running_mean"]
    moved = np.abs(last["backbone.bn1.running_mean"].numpy() - start).max()
    assert moved == 0 if name == "eval" else moved > 1e-3


def test_the_two_modes_of_the_teacher_differ(golden, stream_of):
    g = golden("cila", "trajectory_teacher_train")
    ends = [golden_run(g, stream_of, mode)[0].steps for mode in ("batch", "running")]
    assert abs(ends[0][0][0] - ends[1][0][0]) > 1e-2
    gaps = [(ends[0][1][2][k] - ends[1][1][2][k]).abs().max() for k in ends[0][1][2] if "num_batches" not in k]
    assert max(gaps) > 1e-3


# --------------------------------------------------------------------------- teacher
class Watch(SupervisedPlugin):
    """The teacher must be the model as it was, and nobody may train it."""

    def __init__(self, losses):
        super().__init__()
        self.losses, self.checked, self.momentum = losses, 0, []

    def _momentum(self, strategy):
        return [s["momentum_buffer"].clone() for s in strategy.optimizer.state.values()]

    def before_training_exp(self, strategy, **kwargs):
        self.start = {k: v.clone() for k, v in strategy.model.named_parameters()}
        self.momentum.append(self._momentum(strategy))

    def after_training_iteration(self, strategy, **kwargs):
        teacher = self.losses.teacher
        if teacher is None:
            return
        held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        mine = dict(teacher.named_parameters())
        assert mine.keys() == self.start.keys() and not held & {id(p) for p in mine.values()}
        assert all(torch.equal(p, self.start[k]) and not p.requires_grad and p.grad is None for k, p in mine.items())
        modes = {type(m).__name__ for m in teacher.modules() if m.training}
        assert modes == ({"BatchNorm1d"} if self.losses.teacher_bn == "batch" else set())
        self.checked += 1

    def after_training_exp(self, strategy, **kwargs):
        self.momentum.append(self._momentum(strategy))


@pytest.mark.parametrize("teacher_bn", ["batch", "running"])
def test_teacher_is_the_model_before_the_task(three_tasks, teacher_bn):
    losses = ContrastiveDistillationPlugin(teacher_bn=teacher_bn)
    watch = Watch(losses)
    model = network(dropout=0.3)
    train(naive(model, losses, watch, weight_decay=1e-2), three_tasks.train_stream)
    assert watch.checked == 2 * 2 * 3
    for end, start in itertools.pairwise(watch.momentum[1:]):
        if len(end) == len(start):  # end of a task, start of the next: one optimizer
            assert start and all(map(torch.equal, end, start))
            break
    else:
        pytest.fail("no momentum was seen")
    assert not any(m is losses.teacher for m in model.modules())


# -------------------------------------------------------------------------- averages
@pytest.mark.parametrize("window", ["last_epoch", "task", "final_model"])
def test_averages_equal_a_recomputation(three_tasks, window):
    losses, steps = ContrastiveDistillationPlugin(average_over=window, teacher_bn="running"), Steps()
    train(naive(network(), losses, steps, epochs=3), three_tasks.train_stream, shuffle=False)
    for task, batches in enumerate(steps.tasks):
        assert [len(b[2]) for b in batches] == [6, 6, 2] * 3
        current, sums, count = torch.tensor([2 * task, 2 * task + 1]), np.zeros(2), 0
        for epoch, x, y, output in batches:
            if window != "task" and epoch < 2:
                continue
            if window == "final_model":
                output = steps.ends[task].project(x).detach()
            pair = [asymmetric_supcon(output, y.repeat(2), torch.isin(y, current).repeat(2), **PLAIN), 0.0]
            if task:
                pair[1] = relation_distillation(output, steps.starts[task].project(x), 0.2, 0.01)
            sums += len(y) * np.array([float(p) for p in pair])
            count += len(y)
        assert losses.contrastive_losses[task] == pytest.approx(sums[0] / count, rel=1e-10)
        assert losses.distillation_losses[task] == pytest.approx(sums[1] / count, rel=1e-10)


def test_the_additional_pass_changes_nothing(stream_of):
    benchmark = stream_of(*samples(views=False), [2, 2, 2])
    ends = []
    for window in ("last_epoch", "final_model"):
        losses = ContrastiveDistillationPlugin(mode="constant", average_over=window, augmentation=jitter)
        found = []

        class Last(SupervisedPlugin):
            def after_training_exp(self, strategy, found=found, **kwargs):
                found.append([t.clone() for t in strategy.mbatch])

        model = network(dropout=0.3)
        strategy = naive(model, losses)
        strategy.plugins.insert(strategy.plugins.index(losses) + 1, Last())
        state = train(strategy, benchmark.train_stream)
        assert all(m.training for m in model.modules())
        teacher = {f"teacher {k}": v for k, v in losses.state_dict()["teacher"].items()}
        batches = {f"batch {i}": t for i, t in enumerate(itertools.chain(*found))}
        ends.append(({**state, **teacher, **batches, "generator": torch.get_rng_state()}, losses.contrastive_losses))
    assert ends[0][0].keys() == ends[1][0].keys() and len(ends[0][0]) > 30
    assert all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())
    assert ends[0][1] != ends[1][1]


@pytest.mark.parametrize("window", ["last_epoch", "final_model"])
def test_early_stopping_keeps_the_epoch_that_was_trained(three_tasks, window):
    class Stop(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            strategy.stop_training()

    found = []
    for plugins, epochs in (([Stop()], 5), ([], 1)):
        losses = ContrastiveDistillationPlugin(average_over=window)
        train(naive(network(), losses, *plugins, epochs=epochs), three_tasks.train_stream[:2])
        found.append((losses.contrastive_losses, losses.distillation_losses, losses.coefficients))
    assert found[0] == found[1]


def test_an_experience_without_a_batch(three_tasks):
    with pytest.raises(ValueError, match="experience 0 had no batch to train on"):
        train(naive(network(), ContrastiveDistillationPlugin(), epochs=0), three_tasks.train_stream[:1])


# ----------------------------------------------------------------------- coefficient
@pytest.mark.parametrize("scale", ["plain", "training"])
def test_coefficients_come_from_the_history(stream_of, scale):
    benchmark = stream_of(*samples(8), [2, 2, 2, 2])
    rule = {"mode": "pure", "balance": 2.0, "floor": 0.7}
    losses, steps = ContrastiveDistillationPlugin(ratio_scale=scale, teacher_bn="running", **rule), Steps()
    train(naive(network(), losses, steps), benchmark.train_stream)
    assert losses.coefficients[:2] == [None, 0.7]
    factor = FACTOR if scale == "training" else 1.0
    for task in (2, 3):
        ratio = sum(losses.distillation_losses[1:task]) / sum(losses.contrastive_losses[1:task]) / factor
        assert losses.coefficients[task] == pytest.approx(2 * ratio, rel=1e-12)
    assert losses.distillation_losses[0] == 0 and min(losses.distillation_losses[1:]) > 0


def test_the_coefficient_weighs_the_step(three_tasks):
    """Balance moves the third task only; with a balance of 0 CILA is Co2L to the bit."""
    ends = {}
    for name, rule in {"co2l": {"mode": "constant"}, "zero": {"balance": 0.0}, "large": {"balance": 50.0}}.items():
        strategy, states = naive(network(), ContrastiveDistillationPlugin(**rule)), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for experience in three_tasks.train_stream:
                states.append(train(strategy, [experience]))
        ends[name] = states
    for task in range(3):
        same = {n: all(torch.equal(v, s[task][k]) for k, v in ends["co2l"][task].items()) for n, s in ends.items()}
        assert same == {"co2l": True, "zero": True, "large": task < 2}


@pytest.mark.parametrize("mode", ["max", "min", "pure", "constant"])
@pytest.mark.parametrize("window", ["task", "last_epoch"])
def test_golden_run_of_the_coefficient(golden, stream_of, monkeypatch, window, mode):
    g = golden("cila", "coefficient")
    pairs = iter(zip(g["run_contrastive"].ravel(), g["run_distillation"].ravel(), strict=True))

    def given(features, *_, **__):
        contrastive, distillation = (torch.tensor(float(v), dtype=torch.float64) for v in next(pairs))
        return ContrastiveTerms(features.sum() * 0, contrastive, distillation)

    monkeypatch.setattr(module, "contrastive_distillation", given)
    batches = [(torch.zeros(n, 2, 1, 4, 4).double(), torch.zeros(n).long()) for n in g["run_batch_sizes"].tolist()]
    losses = ContrastiveDistillationPlugin(
        mode=mode, average_over=window, balance=float(g["run_balance"]), base_temperature=None
    )
    benchmark = stream_of(torch.zeros(5, 2, 1, 4, 4), np.arange(5), [1] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(naive(network(), losses, Batches(batches), epochs=3), benchmark.train_stream)
    for name, own in (("contrastive", losses.contrastive_losses), ("distillation", losses.distillation_losses)):
        np.testing.assert_allclose(own, g[f"run_{window}_mean_{name}"], rtol=1e-12)
    assert losses.coefficients[0] is None
    np.testing.assert_allclose(losses.coefficients[1:], g[f"run_{window}_coefficients_{mode}"], rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "tasks", "expected"),
    [
        ({"balance": 0.0}, 3, 1),
        ({"balance": 50.0}, 3, 0),
        ({"mode": "constant"}, 3, 0),
        ({"mode": "min", "balance": 50.0}, 3, 0),
        ({"balance": 0.0}, 2, 0),  # not the end of the stream
    ],
)
def test_a_coefficient_that_never_left_its_floor_is_told_once(three_tasks, rule, tasks, expected):
    strategy = naive(network(), ContrastiveDistillationPlugin(**rule))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(strategy, three_tasks.train_stream[:tasks])
    told = [w for w in caught if "was at its floor" in str(w.message)]
    assert len(told) == expected and all(w.category is RuntimeWarning for w in told)


def test_no_warning_where_no_task_can_look_back(stream_of):
    strategy = naive(network(), ContrastiveDistillationPlugin(balance=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(strategy, stream_of(*samples(4), [2, 2]).train_stream)


def test_logged_figures(three_tasks):
    log = Collect()
    losses = ContrastiveDistillationPlugin(balance=50.0)
    train(naive(network(), losses, evaluator=EvaluationPlugin(loggers=[log])), three_tasks.train_stream)
    steps = {name: [x for x, _ in values] for name, values in log.values.items()}
    assert steps == {
        "loss/contrastive": [3, 6, 9, 12, 15, 18],
        "loss/distillation": [9, 12, 15, 18],
        "cila/contrastive": [0, 1, 2],
        "cila/distillation": [1, 2],
        "cila/coefficient": [1, 2],
        "cila/ratio": [2],
        "cila/floor-active": [2],
    }
    values = {name: [v for _, v in curve] for name, curve in log.values.items()}
    assert values["cila/contrastive"] == losses.contrastive_losses == values["loss/contrastive"][1::2]
    assert values["cila/distillation"] == losses.distillation_losses[1:] == values["loss/distillation"][1::2]
    assert values["cila/coefficient"] == losses.coefficients[1:] and values["cila/floor-active"] == [0.0]
    ratio = values["cila/ratio"][0]
    assert ratio == pytest.approx(losses.distillation_losses[1] / losses.contrastive_losses[1])
    assert losses.coefficients[2] == distillation_coefficient([ratio], [1.0], balance=50.0)
    logged = {tag: [None] * (3 - len(found)) + found for tag, found in values.items() if tag.startswith("cila/")}
    assert losses.history() == logged


def test_a_silent_evaluator_gets_nothing(three_tasks):
    evaluator = EvaluationPlugin(loggers=[])
    evaluator.active = False
    train(naive(network(), ContrastiveDistillationPlugin(), evaluator=evaluator), three_tasks.train_stream)
    assert not evaluator.get_last_metrics()


# --------------------------------------------------------------------------- anchors
@pytest.mark.parametrize("memory", [RehearsalPlugin, ReplayPlugin])
def test_anchors_are_samples_of_current_classes(stream_of, seen, memory):
    benchmark = stream_of(*samples(), [2, 2, 2], generation="classic")
    steps = Steps()
    train(naive(network(), ContrastiveDistillationPlugin(), memory(6), steps), benchmark.train_stream)
    batches = [(task, b[2]) for task, found in enumerate(steps.tasks) for b in found]
    old = 0
    for (task, y), (labels, anchors) in zip(batches, seen, strict=True):
        assert torch.equal(labels, y.repeat(2)) and torch.equal(anchors, (y // 2 == task).repeat(2))
        old += int((y // 2 < task).sum())
    assert old >= 2 * (4 + 6)  # RehearsalPlugin: each stored sample once per epoch


@pytest.mark.parametrize("listed", [False, True])
def test_equal_classes_of_different_domains_are_negatives(seen, listed):
    """Also where the criterion stands in ``plugins`` as well, before the one that replaces the loader."""
    losses, steps = ContrastiveDistillationPlugin(domain_incremental=True), Steps()
    memory = RehearsalPlugin(8, storage="reservoir")
    first = [losses] if listed else []
    train(naive(network(), losses, *first, memory, steps), domains().train_stream)
    batches = [(task, b[2], b[3]) for task, found in enumerate(steps.tasks) for b in found]
    assert {(task, int(o)) for task, _, origins in batches for o in origins} == {
        (t, o) for t in range(3) for o in range(t + 1)
    }
    for (task, y, origins), (labels, anchors) in zip(batches, seen, strict=True):
        assert torch.equal(anchors, (origins == task).repeat(2))
        groups = (3 * y + origins).repeat(2)
        assert torch.equal(labels[:, None] == labels, groups[:, None] == groups)


def test_domains_without_a_memory(seen):
    train(naive(network(), ContrastiveDistillationPlugin(domain_incremental=True)), domains(2).train_stream)
    assert all(anchors.all() for _, anchors in seen)


def test_domains_need_to_know_where_a_sample_comes_from():
    for memory in (ReplayPlugin(6), RehearsalPlugin(6, batches="balanced")):
        with pytest.raises(ValueError, match="domain_incremental is True with replayed batches"):
            train(
                naive(network(), ContrastiveDistillationPlugin(domain_incremental=True), memory), domains().train_stream
            )


# ------------------------------------------------------------------ evaluation, company
def test_evaluation_is_cross_entropy_of_the_logits(three_tasks, stream_of):
    tests = stream_of(*samples(views=False), [2, 2, 2]).test_stream
    losses = ContrastiveDistillationPlugin()
    strategy = naive(network(), losses, evaluator=EvaluationPlugin(loss_metrics(stream=True), loggers=[]))
    train(strategy, three_tasks.train_stream)
    found = strategy.eval(tests)["Loss_Stream/eval_phase/test_stream"]
    x, y = samples(views=False)
    with torch.no_grad():
        expected = F.cross_entropy(strategy.model.eval()(x), torch.tensor(y))
    assert found == pytest.approx(float(expected), rel=1e-5)
    rough = strategy.model(x).bfloat16()
    assert losses(rough, torch.tensor(y)).dtype == torch.float32
    both = strategy.model(samples()[0])  # logits of two views
    assert torch.equal(losses(both, torch.tensor(y)), F.cross_entropy(both, torch.tensor([*y, *y])))


def test_an_interrupted_step_does_not_reach_the_evaluation(three_tasks, stream_of):
    class Broken(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 2:
                raise RuntimeError("broke")

    tests = stream_of(*samples(views=False), [2, 2, 2]).test_stream
    evaluator = EvaluationPlugin(loss_metrics(stream=True), loggers=[])
    strategy = naive(network(), ContrastiveDistillationPlugin(), Broken(), evaluator=evaluator)
    with pytest.raises(RuntimeError, match="broke"):
        train(strategy, three_tasks.train_stream)
    found = strategy.eval(tests[:1])["Loss_Stream/eval_phase/test_stream"]
    x, y = samples(views=False)
    with torch.no_grad():
        expected = F.cross_entropy(strategy.model.eval()(x[y < 2]), torch.tensor(y[y < 2]))
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("views", [False, True])
def test_beside_ewc(stream_of, views):
    benchmark = stream_of(*samples(views=views, dtype=torch.float32), [2, 2, 2], generation="classic")
    ends = []
    for weight in (0.0, 10.0):
        losses = ContrastiveDistillationPlugin(augmentation=None if views else jitter)
        ends.append(train(naive(network(torch.float32), losses, EWCPlugin(weight)), benchmark.train_stream))
        assert all(np.isfinite(losses.contrastive_losses + losses.distillation_losses))
    assert not torch.equal(ends[0]["backbone.1.weight"], ends[1]["backbone.1.weight"])


# ----------------------------------------------------------------------------- state
class Capture(SupervisedPlugin):
    """Everything after one iteration, and the batch and loss of the next."""

    def __init__(self, losses, task, iteration):
        super().__init__()
        self.losses, self.task, self.iteration = losses, task, iteration
        self.state = self.batch = self.loss = self.reached = None

    def _here(self, strategy, iteration):
        clock = strategy.clock
        return (clock.train_exp_counter, clock.train_exp_iterations) == (self.task, iteration)

    def before_training_iteration(self, strategy, **kwargs):
        if self._here(strategy, self.iteration):
            owners = (strategy.model, strategy.optimizer, self.losses)
            self.state = [copy.deepcopy(owner.state_dict()) for owner in owners]
            self.batch = [t.clone() for t in strategy.mbatch]

    def before_backward(self, strategy, **kwargs):
        if self._here(strategy, self.iteration):
            self.loss = strategy.loss.detach().clone()

    def after_training_iteration(self, strategy, **kwargs):
        if self._here(strategy, self.iteration):  # the clock comes last
            self.reached = copy.deepcopy(self.losses.state_dict())


class Restore(Capture):
    def before_training_iteration(self, strategy, **kwargs):
        for owner, state in zip((strategy.model, strategy.optimizer, self.losses), self.state, strict=True):
            owner.load_state_dict(copy.deepcopy(state))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(("task", "iteration"), [(0, 4), (1, 0), (1, 3), (1, 4), (2, 1)])
@pytest.mark.parametrize("window", ["last_epoch", "task"])
def test_state_in_the_middle_of_a_task(three_tasks, task, iteration, window):
    losses = ContrastiveDistillationPlugin(average_over=window)
    capture = Capture(losses, task, iteration)
    train(naive(network(), losses, capture), three_tasks.train_stream)
    assert (capture.state[2]["teacher"] is None) == (task == 0)

    other = ContrastiveDistillationPlugin(average_over=window)
    other.load_state_dict(copy.deepcopy(capture.state[2]))  # before there is a teacher
    assert equal(other.state_dict(), capture.state[2])
    restore = Restore(other, 0, 0)  # a new strategy: its clock begins at 0
    restore.state = capture.state
    strategy = naive(network(), other, Batches([tuple(capture.batch)]), restore, epochs=1)
    strategy.train(three_tasks.train_stream[task], eval_streams=[])
    assert torch.equal(restore.loss, capture.loss) and equal(restore.reached, capture.reached)


def test_a_state_without_teacher_removes_it(three_tasks):
    losses = ContrastiveDistillationPlugin()
    start = copy.deepcopy(losses.state_dict())
    train(naive(network(), losses), three_tasks.train_stream[:2])
    assert losses.teacher is not None
    losses.load_state_dict(start)
    assert losses.teacher is None and equal(losses.state_dict(), start)


# ---------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "^temperature is 0.0"),
        ({"student_temperature": -1.0}, "student_temperature is -1.0"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature is inf"),
        ({"base_temperature": 0.0}, "base_temperature is 0.0"),
        ({"mode": "mean"}, "mode is 'mean'"),
        ({"balance": -0.1}, "balance is -0.1"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"ceiling": -1.0}, "ceiling is -1.0"),
        ({"average_over": "epoch"}, "average_over is 'epoch'"),
        ({"ratio_scale": "raw"}, "ratio_scale is 'raw'"),
        ({"teacher_bn": "eval"}, "teacher_bn is 'eval'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDistillationPlugin(**arguments)


def test_one_view_is_refused(stream_of):
    benchmark = stream_of(*samples(views=False), [2, 2, 2])
    with pytest.raises(ValueError, match=r"images of a batch are \(6, 1, 4, 4\); two views"):
        train(naive(network(), ContrastiveDistillationPlugin()), benchmark.train_stream)


def test_a_model_without_projections_is_refused(three_tasks):
    model = with_taskwise_head(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), feature_size=8)
    with pytest.raises(ValueError, match=r"FeatureClassifier has no project\(images\)"):
        train(naive(model, ContrastiveDistillationPlugin()), three_tasks.train_stream)


def test_it_must_be_the_criterion(three_tasks):
    with pytest.raises(ValueError, match="not the strategy's criterion"):
        train(naive(network(), nn.CrossEntropyLoss(), ContrastiveDistillationPlugin()), three_tasks.train_stream)


@pytest.mark.parametrize("window", ["last_epoch", "task"])
def test_losses_that_are_not_finite(stream_of, window):
    x, y = samples()
    x[y == 2] = float("inf")
    strategy = naive(network(), ContrastiveDistillationPlugin(average_over=window))
    with pytest.raises(
        NonFiniteError, match=r"^experience 1 .*, epoch 0: the contrastive loss became nan and the distillation nan"
    ):
        train(strategy, stream_of(x, y, [2, 2, 2]).train_stream)
