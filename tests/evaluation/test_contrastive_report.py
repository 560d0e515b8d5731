"""The metric against recomputation from copies of the model; that it leaves no trace; its state."""

import copy
import itertools
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation.contrastive_bound import loss_ceiling, tv_certificate
from avalanche_firn.evaluation.contrastive_pairs import project_images
from avalanche_firn.evaluation.contrastive_report import BOUNDS, ContrastiveBound
from avalanche_firn.models.contrastive import with_projection_head
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

TASKS = 3
COEFFICIENTS = [None, 1.0, 1.3]
SMALL = {"negatives": 3, "pairs_per_task": 20, "pool_per_task": 12}
FIRST_TAGS = {f"cila/bound/{name}" for name in ("measured", "chained", "training-loss", "ceiling")}
TAGS = {
    *FIRST_TAGS,
    "cila/bound/one-step",
    "cila/bound/old-distillation",
    *(f"cila/certificate/{name}" for name in ("loss", "lower", "upper")),
}


class Net(nn.Module):
    """BatchNorm and dropout, logits and projections."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)
        self.num_features = 9 * width
        self.head = nn.Linear(9 * width, 10)
        self.projector = nn.Linear(9 * width, 6)

    def features(self, x):
        return self.drop(F.relu(self.norm(self.conv(x))).flatten(1))

    def forward(self, x):
        return self.head(self.features(x))

    def project(self, x):
        return F.normalize(self.projector(self.features(x)), dim=1)


class Distiller(SupervisedPlugin):
    """What the metric asks of ContrastiveDistillationPlugin, with a teacher whose BatchNorm follows the new task."""

    def __init__(self, coefficients=COEFFICIENTS, temperature=0.5):
        super().__init__()
        self.planned, self.temperature = coefficients, temperature
        self.teacher, self.coefficients = None, []

    def before_training_exp(self, strategy, **kwargs):
        task = strategy.experience.current_experience
        self.teacher = copy.deepcopy(strategy.model).train() if task else None
        self.coefficients = [*self.coefficients[:task], self.planned[task]]

    def before_forward(self, strategy, **kwargs):
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(strategy.mb_x)

    def state_dict(self):
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {"teacher": teacher, "coefficients": list(self.coefficients)}

    def load_state_dict(self, state):
        self.coefficients = list(state["coefficients"])


class Copies(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.models = []

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


@pytest.fixture(scope="module")
def stream():
    return digits_stream(image_size=8, tasks=[3, 3, 4])


def learner(metrics, plugins, log=None, model=None):
    torch.manual_seed(0)
    model = Net() if model is None else model
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=64,
        train_epochs=1,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=[] if log is None else [log], collect_all=False),
    )


def train(strategy, experiences):
    for experience in experiences:
        strategy.train(experience, eval_streams=[])


@pytest.fixture(scope="module")
def trained(stream, tools):
    """A run of three tasks with everything it left behind."""
    log, copies, metric = tools.Collect(), Copies(), ContrastiveBound(stream.test, **SMALL)
    strategy = learner([metric], [Distiller(), copies], log)
    train(strategy, stream.train)
    return SimpleNamespace(metric=metric, log=log, models=copies.models, strategy=strategy)


# ------------------------------------------------------------------------- values
def rising(row):
    """Whether every bound that exists lies above the one before, and all above the measured loss."""
    values = [row["measured"], *(row[name] for name in BOUNDS if row[name] is not None)]
    return all(b - a >= -1e-9 for a, b in itertools.pairwise(values))


@torch.no_grad()
def rows_of(model, experience):
    model.eval()
    images = torch.stack([item[0] for item in experience.dataset.eval()]).to(next(model.parameters()).dtype)
    return F.normalize(model.project(images).double(), dim=1)


def by_hand(models, stream, metric, temperature=0.5):
    """All figures of every task, pair after pair, from copies of the models."""
    rows = [[rows_of(model, experience) for experience in stream.test] for model in models]
    pairs, alpha = metric._held_out.pairs, math.log(1 + metric.negatives * math.exp(2 / temperature))

    def log_softmax(z, pair):
        anchor, *others = pair
        logits = [float(z[anchor] @ z[j]) / temperature for j in others]
        return [x - math.log(sum(math.exp(v) for v in logits)) for x in logits]

    def loss(t, s):
        return -np.mean([log_softmax(rows[t][s], pair)[0] for pair in pairs[s]])

    def distillation(t, s):
        values = []
        for pair in pairs[s]:
            q, p = log_softmax(rows[t][s], pair), log_softmax(rows[t - 1][s], pair)
            values.append(-sum(math.exp(b) * a for a, b in zip(q, p, strict=True)))
        return np.mean(values)

    found, chained, training, before = [], 0.0, 0.0, 0.0
    for t in range(len(models)):
        measured, new = sum(loss(t, s) for s in range(t + 1)), loss(t, t)
        old = np.mean([distillation(t, s) for s in range(t)]) if t else 0.0
        one_step = alpha * before + new + t * old
        chained = alpha * chained + new + t * old
        lam = COEFFICIENTS[t] or 0.0
        training = alpha * training + (new + lam * old) * (max(1, t / lam) if t else 1)
        figures = {
            "cila/bound/measured": measured / (t + 1),
            "cila/bound/chained": chained / (t + 1),
            "cila/bound/training-loss": training / (t + 1),
            "cila/bound/ceiling": alpha,
        }
        if t:
            pools = metric._held_out.pools
            student, teacher = (torch.cat([rows[i][s][pools[s]] for s in range(t)]) for i in (t, t - 1))
            labels = torch.tensor([y for s in range(t) for y in np.asarray(stream.test[s].dataset.targets)[pools[s]]])
            certificate = tv_certificate(student, teacher, labels, temperature)
            figures |= {
                "cila/bound/one-step": one_step / (t + 1),
                "cila/bound/old-distillation": old,
                "cila/certificate/loss": certificate.loss.nanmean().item(),
                "cila/certificate/lower": certificate.lower_range.nanmean().item(),
                "cila/certificate/upper": certificate.upper_range.nanmean().item(),
            }
        before = measured
        found.append(figures)
    return found


def test_values_equal_recomputation_from_copies_of_the_model(trained, stream):
    expected = by_hand(trained.models, stream, trained.metric)
    assert {*expected[0]} == FIRST_TAGS and {*expected[1]} == {*expected[2]} == trained.log.tags == TAGS
    for tag in TAGS:
        curve = [(t, pytest.approx(figures[tag], rel=1e-5)) for t, figures in enumerate(expected) if tag in figures]
        assert trained.log.curve(tag) == curve, tag
    assert len({round(value, 3) for _, value in trained.log.curve("cila/bound/measured")}) == TASKS


def test_bounds_lie_above_each_other_and_the_ceiling_is_reached(trained):
    rows = trained.metric.result()
    alpha = loss_ceiling(0.5, 3)
    for t, row in enumerate(rows):
        assert row["task"] == t and row["tasks"] == t + 1 and row["weight"] == 1
        assert row["measured"] <= row["ceiling"] == alpha
        assert rising(row)
        assert row["vacuous"] == [name for name in BOUNDS if row[name] is not None and row[name] >= alpha]
        if t:
            assert row["certificate_lower"] <= row["certificate_loss"] <= row["certificate_upper"]
    assert rows[0]["vacuous"] == [] and rows[0]["one_step"] is None
    assert rows[0]["chained"] == rows[0]["training_loss"] == rows[0]["measured"] == rows[0]["contrastive_new"]
    assert rows[2]["vacuous"][-2:] == ["chained", "training_loss"]
    assert [row["gamma"] for row in rows] == [None, 1.0, 0.65]
    assert [row["coefficient"] for row in rows] == COEFFICIENTS


def test_teacher_of_the_plugin_is_not_the_earlier_model_any_more(trained, stream):
    """Why the metric keeps what the earlier model made of the images."""
    teacher = trained.strategy.plugins[0].teacher
    kept = [rows_of(model, stream.test[0]) for model in (trained.models[1], copy.deepcopy(teacher))]
    assert (kept[0] - kept[1]).abs().max() > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), trained.models[1].parameters(), strict=True))


def test_curves_and_lines(trained):
    curves, rows = trained.metric.curves(), trained.metric.result()
    assert {*curves} == TAGS and all(len(values) == TASKS for values in curves.values())
    for tag in TAGS:
        values = [value for _, value in trained.log.curve(tag)]
        assert curves[tag] == ([] if tag in FIRST_TAGS else [None]) + values
    lines = trained.metric.summary_lines()
    chained = (
        f"task 3: the chained bound {rows[2]['chained']:.3g} is vacuous: no loss exceeds {loss_ceiling(0.5, 3):.3g}"
    )
    assert chained in lines
    assert f"task 1: the contrastive loss over 1 task is {rows[0]['measured']:.3g}" in lines
    assert not any(line.startswith("task 1") and "bound" in line for line in lines)
    assert sum("certified to lie between" in line for line in lines) == 2
    assert sum("stays below" in line for line in lines) + sum("vacuous" in line for line in lines) == 6
    empty = ContrastiveBound(trained.metric.stream, **SMALL)
    assert empty.result() == [] and empty.summary_lines() == [] and {*empty.curves()} == TAGS
    assert str(empty) == "ContrastiveBound"


def test_results_are_copies_of_plain_values(trained):
    result = trained.metric.result()
    assert json.loads(json.dumps(result)) == result
    result[2]["vacuous"].clear()
    result[2]["measured"] = None
    assert trained.metric.result()[2]["vacuous"] and trained.metric.result()[2]["measured"]


def test_own_temperature_comes_before_the_plugins(stream):
    metric = ContrastiveBound(stream.valid, temperature=0.1, **SMALL)
    train(learner([metric], [Distiller()]), [stream.train[0]])
    assert metric.result()[0]["ceiling"] == loss_ceiling(0.1, 3)


# ---------------------------------------------------------------------- no trace
def test_training_is_the_same_to_the_bit(stream):
    def run(metrics):
        strategy = learner(metrics, [Distiller()])
        train(strategy, stream.train[:2])
        modes = {name: module.training for name, module in strategy.model.named_modules()}
        optimizer = to_plain(strategy.optimizer.state_dict())
        return to_plain([dict(strategy.model.state_dict()), modes, optimizer, capture_random_state()])

    metric = ContrastiveBound(stream.test, **SMALL)
    assert differing_state(run([]), run([metric])) is None
    assert len(metric.result()) == 2


def test_nothing_of_a_strategy_is_touched_by_a_hook(stream):
    metric = ContrastiveBound(stream.test, **SMALL)
    strategy = learner([], [Distiller()])
    train(strategy, [stream.train[0]])
    strategy.experience = stream.train[0]
    model = strategy.model.train()
    model.norm.eval()  # modes that differ
    grads = {name: p.grad for name, p in model.named_parameters()}

    def state():
        modes = {name: module.training for name, module in model.named_modules()}
        teacher = strategy.plugins[0].teacher
        return to_plain([dict(model.state_dict()), modes, capture_random_state(), teacher is None])

    before = state()
    metric.before_training_exp(strategy)
    assert len(metric.after_training_exp(strategy)) == len(FIRST_TAGS)
    assert differing_state(before, state()) is None
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_batch_size_is_about_memory_only(trained, stream):
    for size in (7, 1000):
        metric = ContrastiveBound(stream.test, batch_size=size, **SMALL)
        copies = iter(trained.models)
        strategy = SimpleNamespace(plugins=[SimpleNamespace(teacher=None, temperature=0.5)], device="cpu")
        for t, model in enumerate(copies):
            strategy.model, strategy.experience = model, stream.train[t]
            strategy.plugins[0].coefficients = COEFFICIENTS[: t + 1]
            metric.after_training_exp(strategy)
        for row, other in zip(metric.result(), trained.metric.result(), strict=True):
            assert row == {**other, **{k: pytest.approx(v, rel=1e-6) for k, v in other.items() if type(v) is float}}


# -------------------------------------------------------------------------- state
def test_state_round_trip(trained, stream):
    state = from_plain(copy.deepcopy(to_plain(trained.metric.state_dict())))
    loaded = ContrastiveBound(stream.test, **SMALL)
    loaded.load_state_dict(state)
    assert loaded.result() == trained.metric.result()
    assert differing_state(to_plain(loaded.state_dict()), to_plain(trained.metric.state_dict())) is None
    for tensors in (state["cosines"], state["pools"]):
        assert tensors.keys() == {"0", "1", "2"}
        tensors["0"].zero_()  # the loaded ones are copies
    assert differing_state(to_plain(loaded.state_dict()), to_plain(trained.metric.state_dict())) is None


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


class Plain(Distiller):
    """Without a teacher, whose weights a stand-in would have to restore."""

    def before_training_exp(self, strategy, **kwargs):
        super().before_training_exp(strategy)
        self.teacher = None


def test_exact_resume_after_a_kill(stream, tools, tmp_path):
    def run(at):
        log, metric = tools.Collect(), ContrastiveBound(stream.test, **SMALL)
        checkpoint = ExactCheckpointPlugin(tmp_path, every=1)
        strategy = learner([metric], [Plain(), Kill(at), checkpoint], log)
        start = checkpoint.resume(strategy)
        try:
            for experience in stream.train[start:2]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            pass
        finally:
            checkpoint.close()
        return log.values, metric.result()

    log, metric = tools.Collect(), ContrastiveBound(stream.test, **SMALL)
    train(learner([metric], [Plain(), Kill(-1)], log), stream.train[:2])
    first, _ = run(8)  # in the second experience
    second, result = run(-1)
    assert len(first) == len(FIRST_TAGS) and first + second == log.values
    assert result == metric.result()


def test_state_of_other_settings_is_refused(trained, stream):
    state = trained.metric.state_dict()
    for change in ({"negatives": 4}, {"pairs_per_task": 21}, {"pool_per_task": 13}, {"seed": 1}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match=f"another value of {next(iter(change))}"):
            ContrastiveBound(stream.test, **{**SMALL, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="another value of stream"):
        ContrastiveBound(list(stream.test)[:2], **SMALL).load_state_dict(state)


# ------------------------------------------------------------------------ trouble
def test_missing_parts_stop_the_run_before_a_step(stream):
    def refused(message, plugins=None, model=None, held_out=stream.test, **options):
        metric = ContrastiveBound(held_out, **{**SMALL, **options})
        strategy = learner([metric], [Distiller()] if plugins is None else plugins, model=model)
        with pytest.raises(ValueError, match=message):
            train(strategy, [stream.train[2]])
        assert strategy.clock.train_iterations == 0

    refused("plugins: got .*accepted is a list with a plugin that has teacher and coefficients", plugins=[Copies()])
    no_projection = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    refused(r"model: Sequential has no project\(images\); accepted", model=no_projection)
    long = Net()
    long.project = lambda x: 3 * Net.project(long, x)
    refused("model.project: got a row of length 3; accepted are unit rows", model=long)
    images = Net()
    images.project = lambda x: images.conv(x)
    refused(r"model.project: got \(2, 8, 3, 3\) for 2 images; accepted are rows", model=images)
    refused("stream: got 2 experiences, and experience 2 of 3 is trained", held_out=list(stream.test)[:2])
    cold = Distiller()
    del cold.temperature
    refused("temperature: None, and Distiller has none", plugins=[cold])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": 0}, "negatives"),
        ({"negatives": 2.0}, "negatives"),
        ({"pairs_per_task": True}, "pairs_per_task"),
        ({"pool_per_task": 1}, "pool_per_task"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
    ],
)
def test_impossible_arguments_are_refused(stream, change, message):
    with pytest.raises(ValueError, match=f"^{message}: got .*accepted"):
        ContrastiveBound(stream.test, **change)


def test_projections_of_models_in_double_precision(stream):
    model = Net().double()
    rows = project_images(model, stream.test[0], range(5), batch_size=2)
    assert rows.shape == (5, 6) and rows.dtype == torch.float64
    torch.testing.assert_close(rows, rows_of(model, stream.test[0])[:5], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------- with the method
def test_with_the_distilling_plugin_of_this_package(stream, tools):
    class Backbone(Net):
        def forward(self, x):
            return self.features(x)

    log, metric, copies = tools.Collect(), ContrastiveBound(stream.test, **SMALL), Copies()
    torch.manual_seed(0)
    model = with_projection_head(Backbone(), projection_size=8)
    distiller = ContrastiveDistillationPlugin(augmentation=lambda x: torch.stack([x, x + 0.1 * torch.randn_like(x)], 1))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=distiller,
        train_mb_size=128,
        train_epochs=2,
        plugins=[copies],
        evaluator=EvaluationPlugin(metric, loggers=[log], collect_all=False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(strategy, stream.train)
    rows = metric.result()
    assert [row["coefficient"] for row in rows] == distiller.coefficients
    expected = by_hand(copies.models, stream, metric)
    assert log.curve("cila/bound/chained") == [
        (t, pytest.approx(figures["cila/bound/chained"], rel=1e-5)) for t, figures in enumerate(expected)
    ]
    for row in rows:
        assert rising(row)
