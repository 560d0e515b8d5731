"""Accuracies after adaptation against golden numbers and against recomputation from copies of the model."""

import copy
import itertools
import json
import math
import pickle
import warnings

import dill
import matplotlib.figure
import numpy as np
import pytest
import timm
import torch
from avalanche.benchmarks import task_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset, concat_datasets
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from sklearn.linear_model import LogisticRegression
from torch import nn

from avalanche_firn.benchmarks.streams import eager_stream
from avalanche_firn.evaluation import matrix as matrices
from avalanche_firn.evaluation.probes import few_shot_indices, holdout_split
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.models import FeatureCache, resnet_firn, with_taskwise_head
from avalanche_firn.plugins import LinearProbePlugin
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

ALL = ["knn", "linear", "fine_tune", "lp_ft"]
FAST = {"adapt": ALL, "lr": 0.05, "epochs": 2, "batch_size": 7}
KINDS = ("diag", "max_seen", "max_all")


# ------------------------------------------------------------------------ set-up
class Tiny(nn.Module):
    def __init__(self, classes=6, norm=True, drop=0.3, head=None):
        super().__init__()
        norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Dropout(drop))
        self.head = nn.Linear(8, classes) if head is None else head(8)

    def forward(self, x):
        return self.head(self.backbone(x))


def plain():
    return Tiny(norm=False, drop=0.0).double()


def samples(classes, per_class, seed, dtype=torch.float64):
    """Clusters whose samples come in a mixed order, ``(n, 6)`` and ``(n,)``."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.asarray(classes), per_class))
    centres = np.random.default_rng(99).normal(size=(max(classes) + 1, 6))
    return torch.tensor(centres[y] + 0.9 * rng.normal(size=(len(y), 6)), dtype=dtype), y


@pytest.fixture(autouse=True)
def cheap_picture(request, monkeypatch):
    """Drawing the matrix takes longer than all else here; one test does it."""
    if not request.node.name.startswith("test_everything"):
        figure = matplotlib.figure.Figure()
        monkeypatch.setattr("avalanche_firn.evaluation.representation.task_matrix_figure", lambda matrix: figure)


@pytest.fixture
def stream(stream_of):
    """``stream(sizes, generation, classes, dtype)``: 12 training and 9 test samples of every class."""

    def build(sizes=(2, 2, 2), generation="modern", classes=None, dtype=torch.float64):
        classes = list(range(sum(sizes))) if classes is None else classes
        parts = (*samples(classes, 12, 0, dtype), *samples(classes, 9, 1, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return stream_of(parts[0], parts[1], list(sizes), parts[2], parts[3], generation=generation)

    return build


def learner(build, metrics=(), *, plugins=(), log=None, **options):
    torch.manual_seed(0)
    model = build()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=1,
        eval_mb_size=16,
        plugins=[*plugins],
        evaluator=EvaluationPlugin(*metrics, loggers=[] if log is None else [log], collect_all=False),
        **options,
    )


class Copies(SupervisedPlugin):
    """Copies of the model before the first experience and after each."""

    def __init__(self):
        super().__init__()
        self.models = []

    def before_training_exp(self, strategy, **kwargs):
        if not self.models:
            self.models.append(copy.deepcopy(strategy.model))

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


def train(strategy, experiences, evaluated=None):
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
        if evaluated is not None:
            strategy.eval(evaluated)


def rows_of(experience):
    items = [experience.dataset.eval()[i] for i in range(len(experience.dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def measured(probe, name):
    """Which entries exist, the baseline first: ``(T + 1, N)``."""
    matrix = probe.matrices[name]
    return ~np.isnan(np.vstack([matrix.baseline, matrix.accuracy]))


# ------------------------------------------------------------------------ golden
def test_golden_matrices_end_to_end(golden, stream_of):
    arrays = golden("lp_ft", "knn_matrix")
    tasks = range(len(arrays["backbone_weights"]))
    x, y, x_test, y_test = (
        np.concatenate([arrays[f"{kind}_{part}_{i}"] for i in tasks])
        for part, kind in itertools.product(("train", "test"), "xy")
    )
    stream = stream_of(x, y, [int(arrays["n_classes_per_task"])] * len(tasks), x_test, y_test)
    size = arrays["backbone_weights"].shape[1]
    model = nn.Sequential(nn.Linear(x.shape[1], size, bias=False), nn.ReLU(), nn.Linear(size, 3)).double()
    l2 = float(arrays["linear_l2"])
    for field, options in {
        "acc_k200": {"adapt": "knn"},
        "acc_masked_k200": {"adapt": "knn"},
        "acc_k_tasks_seen": {"adapt": "knn", "k": lambda t, n: t + 1},
        "acc_linear_lbfgs": {"adapt": "linear", "l2": l2},
        "acc_linear_ridge": {"adapt": "linear", "l2": l2, "solver": "ridge"},
    }.items():
        probe = RepresentationProbe(stream.train_stream, stream.test_stream, head="2", **options)
        for t in tasks:
            with torch.no_grad():
                model[0].weight.copy_(torch.from_numpy(arrays["backbone_weights"][t]))
            counts = probe.measure(model, t, tasks=tasks)[options["adapt"]]
            found = [100 * correct / total for correct, total in (counts[i] for i in tasks)]
            np.testing.assert_allclose(found, arrays[field][t], rtol=0, atol=1e-9, err_msg=field)
        assert probe.matrices[options["adapt"]].shape == (0, 0)  # measuring records nothing


# ----------------------------------------------------- recomputation, plain loops
@torch.no_grad()
def features_by_hand(model, x):
    return torch.relu(x @ model.backbone[0].weight.T + model.backbone[0].bias)


def knn_by_hand(bank, labels, queries, k, temperature):
    found = []
    for q in queries.tolist():
        near = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            lengths = math.sqrt(sum(v * v for v in q) * sum(v * v for v in row))
            near.append((sum(a * b for a, b in zip(q, row, strict=True)) / lengths if lengths else 0.0, label))
        near = sorted(near, reverse=True)[:k]
        scores = {}
        for similarity, label in near:
            scores[label] = scores.get(label, 0.0) + math.exp(similarity / temperature)
        found.append(max(sorted(scores), key=scores.get))
    return torch.tensor(found)


def logistic_by_hand(features, labels, l2):
    fit = LogisticRegression(C=(2 if len(labels.unique()) == 2 else 1) / (len(labels) * l2), tol=1e-12, max_iter=5000)
    fit.fit(features.numpy(), labels.numpy())
    w, b = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    return (torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2) if len(w) == 1 else (w, b)


def random_head_by_hand(classes, size, seed):
    draws, bound = torch.Generator().manual_seed(seed), size**-0.5
    weight = (torch.rand(classes, size, generator=draws) * 2 - 1) * bound
    return weight.double(), ((torch.rand(classes, generator=draws) * 2 - 1) * bound).double()


def tuned_by_hand(model, head, x, y, *, lr, epochs, batch_size, momentum, weight_decay, seed):
    """Parameters ``[B, b, W, c]`` after SGD with momentum and a cosine, written out."""
    first = model.backbone[0]
    p = [t.detach().clone().requires_grad_() for t in (first.weight, first.bias, *head)]
    speed, draws = [torch.zeros_like(t) for t in p], torch.Generator().manual_seed(seed)
    total, step = epochs * math.ceil(len(x) / batch_size), 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=draws)
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            logits = torch.relu(x[rows] @ p[0].T + p[1]) @ p[2].T + p[3]
            loss = (logits.logsumexp(1) - logits[range(len(rows)), y[rows]]).mean()
            grads = torch.autograd.grad(loss, p)
            rate = lr * (1 + math.cos(math.pi * step / total)) / 2
            for i, grad in enumerate(grads):
                speed[i] = momentum * speed[i] + grad + weight_decay * p[i].detach()
                p[i] = (p[i].detach() - rate * speed[i]).requires_grad_()
            step += 1
    return [t.detach() for t in p]


def predicted_by_hand(p, x):
    return (torch.relu(x @ p[0].T + p[1]) @ p[2].T + p[3]).argmax(1)


SGD = {"epochs": 3, "batch_size": 4, "momentum": 0.8, "weight_decay": 0.01}


def row_by_hand(model, stream, chosen, seed):
    """Accuracy by adaptation and task: 6 shots, k = 3, l2 = 0.1, two rates."""
    found = {name: [] for name in ALL}
    for i, experience in enumerate(stream.train_stream):
        x, y = (part[chosen[i]] for part in rows_of(experience))
        test, wanted = rows_of(stream.test_stream[i])
        classes = sorted(set(y.tolist()))
        local = torch.tensor([classes.index(c) for c in y.tolist()])
        target = torch.tensor([classes.index(c) for c in wanted.tolist()])
        h, queries = features_by_hand(model, x), features_by_hand(model, test)
        hits = {"knn": knn_by_hand(h, y, queries, 3, 0.2) == wanted}
        weight, bias = logistic_by_hand(h, local, 0.1)
        hits["linear"] = (queries @ weight.T + bias).argmax(1) == target
        kept, held = (torch.from_numpy(rows) for rows in holdout_split(y.numpy(), 0.3, seed))
        random = random_head_by_hand(len(classes), h.shape[1], seed)
        starts = {
            "fine_tune": (random, random),
            "lp_ft": ((weight, bias), logistic_by_hand(h[kept], local[kept], 0.1)),
        }
        for name, (whole, part) in starts.items():
            right = []
            for lr in (0.01, 0.3):
                p = tuned_by_hand(model, part, x[kept], local[kept], lr=lr, seed=seed, **SGD)
                right.append(int((predicted_by_hand(p, x[held]) == local[held]).sum()))
            rate = 0.3 if right[1] > right[0] else 0.01
            p = tuned_by_hand(model, whole, x, local, lr=rate, seed=seed, **SGD)
            hits[name] = predicted_by_hand(p, test) == target
        for name, values in hits.items():
            found[name].append(float(values.double().mean()))
    return found


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_everything_equals_recomputation_from_copies_of_the_model(stream, tools, generation):
    bench, log, saved, seed = stream((2, 3, 2), generation), tools.Collect(), Copies(), 5
    options = {"shots": 6, "seed": seed, "k": 3, "temperature": 0.2, "l2": 0.1, "val_fraction": 0.3}
    probe = RepresentationProbe(
        bench.train_stream, bench.test_stream, ALL, lr=[0.3, 0.01], eval_batch_size=5, **options, **SGD
    )
    strategy = learner(lambda: Tiny(7, norm=False, drop=0.0).double(), [probe], plugins=[saved], log=log)
    train(strategy, bench.train_stream)
    chosen = [few_shot_indices(rows_of(e)[1], 6, seed) for e in bench.train_stream]
    rows = [row_by_hand(model.eval(), bench, chosen, seed) for model in saved.models]
    expected_tags = set()
    for name in ALL:
        base, a = np.asarray(rows[0][name]), np.asarray([row[name] for row in rows[1:]])
        found = probe.matrices[name]
        np.testing.assert_array_equal(found.baseline, base)
        np.testing.assert_array_equal(found.accuracy, a)
        start = f"probe/{name.replace('_', '-')}"
        approx = lambda values: [(t, pytest.approx(v, abs=1e-12)) for t, v in values]  # noqa: E731
        assert log.curve(start) == approx((t, a[t, : t + 1].mean()) for t in range(3))
        for i in range(3):
            assert log.curve(f"{start}/task-{i}") == approx((t, a[t, i]) for t in range(3))
        backward = [(t, np.mean([a[t, i] - a[i, i] for i in range(t)])) for t in (1, 2)]
        assert log.curve(f"{start}/backward") == approx(backward)
        forward = [(t, np.mean([a[i - 1, i] - base[i] for i in range(1, t + 1)])) for t in (1, 2)]
        assert log.curve(f"{start}/forward") == approx(forward)
        for kind in KINDS:
            tag = f"{start}/forgetting-{kind.replace('_', '-')}"
            assert log.curve(tag) == approx((t, matrices.forgetting(a[: t + 1], kind)) for t in (1, 2))
            assert probe.figures(name)[tag.removeprefix(start)] == log.curve(tag)[-1][1]
            assert probe.curves()[tag] == [None, *(v for _, v in log.curve(tag))]
            expected_tags.add(tag)
        assert [x for x, _ in log.curve(f"{start}/matrix")] == [2]
        expected_tags |= {f"{start}{end}" for end in ("", "/task-0", "/task-1", "/task-2", "/matrix")}
        expected_tags |= {f"{start}/backward", f"{start}/forward"}
    assert log.tags == expected_tags
    accuracies = np.concatenate([probe.matrices[name].accuracy.ravel() for name in ALL])
    assert len(set(accuracies)) > 5 and 0.3 < accuracies.mean() < 1


# ------------------------------------------------------------------ side effects
@pytest.mark.parametrize("generation", ["modern", "classic"])
@pytest.mark.parametrize("when", ["experience", "eval"])
def test_training_is_the_same_to_the_bit(stream, generation, when):
    bench = stream(generation=generation, dtype=torch.float32)

    def run(wanted):
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST | {"lr": [0.05, 0.1]})
        strategy = learner(Tiny, [probe] if wanted else [])
        train(strategy, bench.train_stream, bench.test_stream)
        modes = {name: module.training for name, module in strategy.model.named_modules()}
        clock = {name: value for name, value in vars(strategy.clock).items() if isinstance(value, int)}
        optimizer = to_plain(strategy.optimizer.state_dict())
        state = [dict(strategy.model.state_dict()), modes, clock, optimizer, capture_random_state()]
        return to_plain(state), probe

    without, (state, probe) = run(False)[0], run(True)
    assert differing_state(without, state) is None
    assert all(probe.matrices[name].shape == (3, 3) for name in ALL)


@pytest.mark.parametrize("when", ["experience", "eval"])
def test_nothing_of_a_strategy_is_touched_between_its_hooks(stream, when):
    bench = stream(dtype=torch.float32)
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
    strategy = learner(Tiny)
    strategy.train(bench.train_stream[0], eval_streams=[])
    model = strategy.model.train()
    model.backbone[1].eval()  # modes that differ
    model.backbone[0].requires_grad_(False)
    x = torch.randn(4, 6)
    strategy.mbatch = [x, torch.zeros(4), torch.zeros(4)]
    strategy.mb_output, strategy.loss = model(x), torch.ones(1)
    strategy.mb_output.sum().backward()
    strategy.experience = bench.train_stream[0]

    def snapshot():
        parameters = {
            n: [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
            for n, p in model.named_parameters()
        }
        modes = {n: [m.training, len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        optimizer = to_plain(strategy.optimizer.state_dict())
        return to_plain([parameters, buffers, modes, optimizer, capture_random_state(), torch.is_grad_enabled()])

    attributes, modules = dict(vars(strategy)), list(model.named_modules())
    for enabled in (True, False):  # ``strategy.eval`` runs without gradients
        with torch.set_grad_enabled(enabled):
            before = snapshot()
            probe.before_training_exp(strategy)
            probe.after_training_exp(strategy)
            probe.after_eval(strategy)
            assert differing_state(before, snapshot()) is None
    assert all(vars(strategy)[name] is value for name, value in attributes.items())
    assert [(n, id(m)) for n, m in modules] == [(n, id(m)) for n, m in model.named_modules()]
    assert probe.matrices["fine_tune"].shape == (2, 3)
    with torch.no_grad():
        model.head.weight.add_(1)
        model.backbone[0].weight.add_(1)  # other features, so that the model is asked
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    before = snapshot()
    with pytest.raises(ZeroDivisionError):
        probe._row(strategy, None)
    assert differing_state(before, snapshot()) is None


# ------------------------------------------------------------------ rows, columns
LOWER = np.tri(3, dtype=bool)
WHEN = {
    ("experience", "all"): np.ones((4, 3), dtype=bool),
    ("experience", "seen"): np.vstack([[False] * 3, LOWER]),
    ("diagonal", "all"): np.vstack([[False] * 3, np.eye(3, dtype=bool)[:2], [True] * 3]),
    ("diagonal", "seen"): np.vstack([[False] * 3, np.eye(3, dtype=bool)[:2], [True] * 3]),
    ("end", "all"): np.vstack([np.zeros((3, 3), dtype=bool), [True] * 3]),
    ("end", "seen"): np.vstack([np.zeros((3, 3), dtype=bool), [True] * 3]),
    ("eval", "all"): np.ones((4, 3), dtype=bool),
    ("eval", "seen"): np.vstack([[False] * 3, LOWER]),
}


@pytest.mark.parametrize(("when", "tasks"), WHEN)
def test_rows_and_columns(stream, tools, when, tasks):
    bench = stream()
    full = RepresentationProbe(bench.train_stream, bench.test_stream)
    probe, log = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, tasks=tasks), tools.Collect()
    train(learner(plain, [full, probe], log=log), bench.train_stream, bench.test_stream)
    found = measured(probe, "knn")
    np.testing.assert_array_equal(found, WHEN[when, tasks])
    values, expected = (
        np.vstack([p.matrices["knn"].baseline, p.matrices["knn"].accuracy])[found] for p in (probe, full)
    )
    np.testing.assert_array_equal(values, expected)
    figures = [probe.figures("knn", t) for t in range(3)]
    assert probe.figures("knn") == figures[2] and figures[2][""] == full.figures("knn")[""]
    undefined = {tag for tag, value in figures[2].items() if value is None}
    transfers = {"/backward", *(f"/forgetting-{kind.replace('_', '-')}" for kind in KINDS)}
    assert undefined == (set() if tasks == "all" and when in ("experience", "eval") else {"/forward"}) | (
        transfers if when == "end" else set()
    )
    assert {tag for tag, value in figures[0].items() if value is not None} == (set() if when == "end" else {""})
    if when == "diagonal":
        assert figures[1][""] is None  # task 0 was not measured then
        assert figures[2]["/forgetting-diag"] == full.figures("knn")["/forgetting-diag"]


@pytest.mark.parametrize(("every", "expected"), [(0, [-1, 0, 0, 1]), (1, [-1, 0])])
def test_periodic_evaluation_writes_no_row_inside_an_experience(stream, every, expected):
    bench = stream((2, 2))
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, when="eval")
    strategy, rows = learner(plain, [probe], eval_every=every), []
    measure = probe.measure
    probe.measure = lambda model, step, **kwargs: rows.append(step) or measure(model, step, **kwargs)
    for experience in bench.train_stream:  # Avalanche evaluates before each, after it or after each epoch
        strategy.train(experience, eval_streams=[bench.test_stream])
    assert rows == expected
    assert probe.matrices["knn"].shape[0] == max(expected) + 1


def test_tasks_in_another_order(stream):
    """Steps and tasks are matched by what was trained, not by position."""
    bench, order = stream(), [2, 0, 1]
    full, end, diagonal = (
        RepresentationProbe(bench.train_stream, bench.test_stream, when=when)
        for when in ("experience", "end", "diagonal")
    )
    train(learner(plain, [full, end, diagonal]), [bench.train_stream[i] for i in order])
    a, base = full.matrices["knn"].accuracy, full.matrices["knn"].baseline
    expected = {"": a[2].mean(), "/backward": np.mean([a[2, i] - a[t, i] for t, i in enumerate(order[:2])])}
    expected["/forward"] = np.mean([a[t, i] - base[i] for t, i in enumerate(order[1:])])
    for kind in KINDS:
        expected[f"/forgetting-{kind.replace('_', '-')}"] = matrices.forgetting(a[:, order], kind)
    assert full.figures("knn") == pytest.approx(expected)
    assert full.figures("knn", 1)[""] == pytest.approx((a[1, 0] + a[1, 2]) / 2)
    np.testing.assert_array_equal(
        measured(diagonal, "knn")[1:], [[False, False, True], [True, False, False], [True] * 3]
    )
    assert diagonal.figures("knn")["/forgetting-diag"] == pytest.approx(expected["/forgetting-diag"])
    assert {tag for tag, value in end.figures("knn").items() if value is not None} == {""}


def test_forgetting_needs_every_step_to_train_another_task(stream):
    bench = stream()
    probe = RepresentationProbe(bench.train_stream, bench.test_stream)
    train(learner(plain, [probe]), [bench.train_stream[i] for i in (0, 1, 1)])
    figures = probe.figures("knn")
    assert {tag for tag, value in figures.items() if value is not None} == {""}
    assert figures[""] == pytest.approx(probe.matrices["knn"].accuracy[2, :2].mean())


# ---------------------------------------------------------------------- few shots
def test_few_shots_are_exact_nested_and_the_same_at_every_checkpoint(stream):
    bench = stream()

    class Keys(FeatureCache):
        def __init__(self):
            super().__init__()
            self.asked = []

        def get(self, weights, key, compute, **kwargs):
            entry = super().get(weights, key, compute, **kwargs)
            self.asked.append((weights, key, entry[1].tolist()))
            return entry

    def bank(shots, seed=0):
        cache = Keys()
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, shots=shots, seed=seed, cache=cache)
        train(learner(plain, [probe]), bench.train_stream)
        found, states = {}, set()
        for weights, (name, i, rows), targets in cache.asked:
            if name == "train":
                states.add(weights)
                found.setdefault(i, {}).setdefault(rows, np.unique(targets, return_counts=True)[1].tolist())
        assert len(states) == 4 and all(len(subsets) == 1 for subsets in found.values())
        return [next(iter(found[i].items())) for i in range(3)]

    few, more, third, other = bank(3), bank(6), bank(0.34), bank(3, seed=1)
    for i in range(3):
        assert few[i][1] == [3, 3] and more[i][1] == [6, 6] and third[i][1] == [4, 4]
        assert set(few[i][0]) < set(third[i][0]) < set(more[i][0])
    assert few != other and bank(None)[0] == (None, [12, 12])


def test_too_many_shots_are_refused_before_training(stream):
    bench = stream()
    with pytest.raises(ValueError, match="13, but class 0 has 12"):
        RepresentationProbe(bench.train_stream, bench.test_stream, shots=13)


# ----------------------------------------------------------------- corner settings
@pytest.mark.parametrize("build", [plain, lambda: Tiny().double()])
def test_no_epochs_equal_the_starting_head(stream, build):
    bench = stream()
    options = {"adapt": ALL, "shots": 5}
    still = RepresentationProbe(bench.train_stream, bench.test_stream, epochs=0, **options)
    frozen = RepresentationProbe(bench.train_stream, bench.test_stream, epochs=3, lr=0.0, **options)
    train(learner(build, [still, frozen]), bench.train_stream)
    for probe in (still, frozen):
        linear, lp_ft = (probe.matrices[name].to_dict() for name in ("linear", "lp_ft"))
        assert lp_ft == linear
    if build is plain:  # BatchNorm's statistics adapt even at a rate of 0
        assert still.matrices["fine_tune"].to_dict() == frozen.matrices["fine_tune"].to_dict()
    assert still.matrices["fine_tune"].to_dict() != still.matrices["linear"].to_dict()


def test_rate_and_penalty_are_not_chosen_on_test_data(stream):
    """Of three rotations of the test labels each prediction fits exactly one, unless labels influence predictions."""
    bench = stream((3,))
    x, y = rows_of(bench.test_stream[0])
    model = learner(plain).model

    def counts(rotation, adapt, **settings):
        data = torch.utils.data.TensorDataset(x, (y + rotation) % 3)
        data.targets = data.tensors[1].tolist()
        test = eager_stream("test", [as_classification_dataset(data)])
        options = {"epochs": 15, "batch_size": 8, "val_fraction": 0.5, **settings}
        return RepresentationProbe(bench.train_stream, test, adapt, **options).measure(model, 0, tasks=[0])[adapt][0][0]

    for adapt, settings, values in (
        ("fine_tune", "lr", [0.0, 0.1, 0.3]),
        ("lp_ft", "lr", [0.0, 0.1, 0.3]),
        ("linear", "l2", [1e-3, 1.0, 1e5]),
    ):
        chosen = [counts(r, adapt, **{settings: values}) for r in range(3)]
        assert sum(chosen) == len(y), adapt
        best = [max(counts(r, adapt, **{settings: value}) for value in values) for r in range(3)]
        assert sum(best) > len(y), adapt  # test data would have chosen otherwise


def test_one_shot_leaves_nothing_to_choose_on(stream):
    bench = stream()
    make = lambda **kwargs: RepresentationProbe(bench.train_stream, bench.test_stream, shots=1, **kwargs)  # noqa: E731
    for bad in (
        {"adapt": "fine_tune", "lr": [0.1, 0.2]},
        {"adapt": "lp_ft", "lr": [0.1, 0.2]},
        {"adapt": "linear", "l2": [0.1, 1.0]},
    ):
        with pytest.raises(ValueError, match="no class has two adaptation samples"):
            make(**bad)
    model = learner(plain).model
    for good in (
        {"adapt": ALL, "lr": 0.1, "epochs": 2},
        {"adapt": ["knn", "linear"]},
        {"adapt": "fine_tune", "epochs": 0},
    ):
        assert all(counts[2][1] == 18 for counts in make(**good).measure(model, 0, tasks=range(3)).values())


def test_one_bank_of_the_seen_tasks(stream):
    bench, saved = stream(), Copies()
    options = {"task_aware": False, "tasks": "seen", "k": 5, "l2": 0.1, "adapt": ["knn", "linear"]}
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **options)
    diagonal = RepresentationProbe(bench.train_stream, bench.test_stream, when="diagonal", **options)
    train(learner(plain, [probe, diagonal], plugins=[saved]), bench.train_stream)
    for t, model in enumerate(saved.models[1:]):
        pairs = [rows_of(e) for e in bench.train_stream[: t + 1]]
        x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        h = features_by_hand(model, x)
        weight, bias = logistic_by_hand(h, y, 0.1)
        for i in range(t + 1):
            test, wanted = rows_of(bench.test_stream[i])
            queries = features_by_hand(model, test)
            knn = float((knn_by_hand(h, y, queries, 5, 0.1) == wanted).double().mean())
            linear = float(((queries @ weight.T + bias).argmax(1) == wanted).double().mean())
            assert (probe.matrices["knn"].accuracy[t, i], probe.matrices["linear"].accuracy[t, i]) == (knn, linear)
            if i == t or t == 2:  # the bank of the diagonal is no smaller
                assert diagonal.matrices["knn"].accuracy[t, i] == knn
    aware = RepresentationProbe(bench.train_stream, bench.test_stream, k=5).measure(model, 2, tasks=range(3))["knn"]
    hits = sum(hit for hit, _ in aware.values())
    assert hits > probe.matrices["knn"].correct[2].sum()  # fewer classes compete within a task


def test_joint_training_gives_one_row_over_all_tasks(stream, tools):
    bench, log = stream(), tools.Collect()
    joint = eager_stream("train", [concat_datasets([e.dataset for e in bench.train_stream])])
    for when, tasks in itertools.product(("experience", "diagonal", "end", "eval"), ("all", "seen")):
        log = tools.Collect()
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, tasks=tasks)
        train(learner(plain, [probe], log=log), joint, bench.test_stream)
        matrix = probe.matrices["knn"]
        assert matrix.accuracy.shape == (1, 3) and not np.isnan(matrix.accuracy).any()
        assert log.curve("probe/knn") == [(0, pytest.approx(matrix.accuracy.mean()))]
        assert {tag for tag, value in probe.figures("knn").items() if value is not None} == {""}
        assert log.tags == {"probe/knn", "probe/knn/matrix", *(f"probe/knn/task-{i}" for i in range(3))}


def test_a_training_stream_finer_than_the_tasks(stream):
    """Tasks count as seen once all their classes were trained; a step that completes none gives no row."""
    bench, fine = stream((2, 2)), stream((1, 1, 1, 1))
    for when in ("experience", "diagonal"):
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, tasks="seen")
        train(learner(plain, [probe]), fine.train_stream)
        expected = [[False, False], [True, False], [when == "experience", False], [True, True]]
        np.testing.assert_array_equal(measured(probe, "knn")[1:], expected)
        assert set(probe.figures("knn").values()) == {None, probe.figures("knn")[""]}


def test_classes_that_are_not_contiguous_and_single_classes(stream):
    gaps = stream((4, 3, 4), classes=[0, 3, 4, 6, 8, 10])
    single = stream((1, 1, 1))
    for bench, classes in ((gaps, [[0, 3], [4, 6], [8, 10]]), (single, [[0], [1], [2]])):
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, **FAST | {"l2": 0.1})
        train(learner(lambda: Tiny(11, norm=False).double(), [probe]), bench.train_stream)
        for name in ALL:
            matrix = probe.matrices[name]
            assert matrix.classes == classes
            assert (matrix.accuracy == 1).all() if bench is single else matrix.accuracy.mean() > 0.6


def test_a_diverged_representation_is_wrong_everywhere(stream):
    bench = stream()
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
    model = learner(plain).model
    with torch.no_grad():
        model.backbone[0].weight.fill_(math.nan)
    for counts in probe.measure(model, 0, tasks=range(3)).values():
        assert counts == dict.fromkeys(range(3), (0, 18))
    model = learner(plain).model
    rows = bench.test_stream[1].dataset.eval()
    finite = probe.measure(model, 0, tasks=[1])
    rows[0][0].fill_(math.inf)  # the stored tensor itself: one test sample is broken
    probe.cache.clear()
    probe._images.clear()
    for name, counts in probe.measure(model, 0, tasks=[1]).items():
        assert finite[name][1][0] - counts[1][0] in (0, 1)


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


# -------------------------------------------------------------------------- state
@pytest.mark.parametrize(
    ("generation", "when"), [("modern", "experience"), ("modern", "diagonal"), ("classic", "eval")]
)
def test_state_continues_to_the_same_values(stream, tools, generation, when):
    bench = stream(generation=generation)

    def run(between):
        log, probe = tools.Collect(), RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
        strategy = learner(plain, [probe], log=log)
        for experience in bench.train_stream:
            between(probe)
            train(strategy, [experience], bench.test_stream)
        return [value for value in log.values if not value[0].endswith("matrix")], probe.curves()

    def replace(probe):
        state = from_plain(copy.deepcopy(to_plain(probe.state_dict())))
        fresh = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
        fresh.load_state_dict(state)
        assert differing_state(to_plain(fresh.state_dict()), to_plain(probe.state_dict())) is None
        probe.__dict__ = fresh.__dict__

    assert run(replace) == run(lambda probe: None)


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 4])  # in the first experience, in the second
def test_exact_resume_after_a_kill(stream, tools, tmp_path, at):
    bench = stream(dtype=torch.float32)

    def run(at, folder):
        log, probe = tools.Collect(), RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
        checkpoint = ExactCheckpointPlugin(tmp_path / folder, every=1)
        strategy = learner(Tiny, [probe], plugins=[Kill(at), checkpoint], log=log)
        start = checkpoint.resume(strategy)
        try:
            for experience in bench.train_stream[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            pass
        finally:
            checkpoint.close()
        return [value for value in log.values if not value[0].endswith("matrix")], probe

    values, whole = run(-1, "whole")
    killed, _ = run(at, "killed")
    resumed, probe = run(-1, "killed")
    assert len(killed) == (0 if at == 1 else 4 * 4) and killed + resumed == values
    assert {n: m.to_dict() for n, m in probe.matrices.items()} == {n: m.to_dict() for n, m in whole.matrices.items()}


def test_state_of_other_settings_is_refused(stream):
    bench = stream()
    make = lambda **kwargs: RepresentationProbe(bench.train_stream, bench.test_stream, **kwargs)  # noqa: E731
    state = make().state_dict()
    for options, name in (({"shots": 3}, "shots, adaptation_samples"), ({"k": 5}, "k"), ({"adapt": "linear"}, "adapt")):
        with pytest.raises(ValueError, match=f"another value of {name}$"):
            make(**options).load_state_dict(state)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_pickle(stream, generation):
    bench = stream(generation=generation)
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
    strategy = learner(plain, [probe])
    strategy.train(bench.train_stream[0], eval_streams=[])
    # Avalanche's classic streams can't be pickled (a lambda inside), with or without a probe; dill can
    again = pickle.loads(pickle.dumps(probe)) if generation == "modern" else dill.loads(dill.dumps(probe))
    assert again.curves() == probe.curves() and again.protocol() == probe.protocol()
    again.cache.clear()
    again._images.clear()  # read once more from the pickled streams
    assert again.measure(strategy.model, 0, tasks=range(3)) == probe.measure(strategy.model, 0, tasks=range(3))


# --------------------------------------------------------------- names, protocol
def test_tags_with_the_configuration(stream, tools):
    bench, log = stream(), tools.Collect()
    settings = {"detailed_tags": True, "when": "end", "tasks": "seen"}
    probes = [
        RepresentationProbe(bench.train_stream, bench.test_stream, adapt, **settings, **options)
        for adapt, options in (
            ("knn", {"k": 7}),
            ("knn", {"k": lambda t, n: t + 1, "temperature": 0.07, "shots": 2}),
            ("knn", {"task_aware": False}),
            (["linear", "lp_ft"], {"l2": 0.5, "shots": 0.5, "lr": 0.01, "epochs": 1}),
            ("linear", {"l2": [0.1, 1], "solver": "ridge"}),
            ("fine_tune", {"lr": (0.1, 0.01), "epochs": 1}),
            ("fine_tune", {"lr": 0.1, "epochs": 1, "shots": 1.0}),
        )
    ]
    train(learner(plain, probes, log=log), bench.train_stream)
    names = [
        "knn_k7_T0.1",
        "knn_ktask-dependent_T0.07_shots2",
        "knn_k200_T0.1_all-tasks",
        "linear_lbfgs_l20.5_shots0.5",
        "lp-ft_lbfgs_l20.5_lr0.01_epochs1_shots0.5",
        "linear_ridge_l2-2values",
        "fine-tune_lr0.1-0.01_epochs1",
        "fine-tune_lr0.1_epochs1_shots1.0",
    ]
    ends = ("", "/task-0", "/task-1", "/task-2", "/matrix")
    assert log.tags == {f"probe/{name}{end}" for name in names for end in ends}
    assert str(probes[3]) == f"RepresentationProbe({names[3]}, {names[4]})"
    assert probes[0].result() is probes[0].matrices


def test_protocol_says_everything_and_is_json(stream):
    bench = stream((2, 2))
    given = {
        "adapt": ["knn", "lp_ft"],
        "shots": 0.5,
        "seed": 3,
        "when": "end",
        "tasks": "seen",
        "task_aware": False,
        "k": 9,
        "temperature": 0.2,
        "solver": "ridge",
        "l2": [0.1, 1.0],
        "lr": [0.1, 0.2],
        "epochs": 4,
        "batch_size": 5,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "val_fraction": 0.4,
    }
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **given)
    said = probe.protocol()
    assert json.loads(json.dumps(said)) == said
    assert said == {**given, "task_identity_at_test": False, "adaptation_samples": [12, 12]}
    default = RepresentationProbe(bench.train_stream, bench.test_stream, k=max).protocol()
    assert json.loads(json.dumps(default)) == default and default["k"] == "function of step and bank size"
    assert default["adapt"] == ["knn"] and default["lr"] == [0.001, 0.01, 0.1] and default["l2"] is None


# ------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapt": []}, r"adapt is \[\]; one or several of \['knn', 'linear', 'fine_tune', 'lp_ft'\]"),
        ({"adapt": "svm"}, "adapt is 'svm'"),
        ({"adapt": ["knn", "knn"]}, "adapt is"),
        ({"when": "never"}, "when is 'never'; one of .*'diagonal'"),
        ({"tasks": "some"}, "tasks is 'some'; 'all' or 'seen'"),
        ({"task_aware": False}, "task_aware is False with tasks 'all'; tasks='seen'"),
        ({"lr": []}, r"lr is \[\]; a finite rate of 0 and above"),
        ({"lr": -0.1}, "lr is"),
        ({"lr": [0.1, math.nan]}, "lr is"),
        ({"lr": math.inf}, "lr is"),
        ({"l2": []}, "l2 is"),
        ({"l2": -1.0}, "l2 is -1.0; None, a finite penalty"),
        ({"l2": [0.1, math.inf]}, "l2 is"),
        ({"solver": "newton"}, "solver is 'newton'; one of .*'ridge'"),
        ({"val_fraction": 0.0}, r"val_fraction is 0.0; a fraction in \(0, 1\)"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"seed": -1}, "seed is -1; 0 and above"),
        ({"epochs": -1}, "epochs is -1; 0 and above"),
        ({"batch_size": 0}, "batch_size is 0; 1 and above"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; 1 and above"),
        ({"k": 0}, "k is 0; 1 and above, or a function"),
        ({"temperature": 0.0}, "temperature is 0.0; a finite number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"shots": 0}, "shots: got 0"),
        ({"shots": 1.5}, "shots: got 1.5"),
    ],
)
def test_impossible_arguments_are_refused(stream, change, message):
    bench = stream((2,))
    with pytest.raises(ValueError, match=message):
        RepresentationProbe(bench.train_stream, bench.test_stream, **change)


def test_streams_that_do_not_fit_are_refused(stream):
    bench = stream((2, 2))
    with pytest.raises(ValueError, match="train_stream has 2 and test_stream 1 experiences; the same number"):
        RepresentationProbe(bench.train_stream, bench.test_stream[:1])
    with pytest.raises(ValueError, match="train_stream has 0 and test_stream 0"):
        RepresentationProbe([], [])


@pytest.mark.parametrize("when", ["experience", "end", "eval"])
def test_an_unknown_classifier_stops_the_run_before_a_step(stream, when):
    bench = stream((2, 2))
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, head="fc")
    strategy = learner(plain, [probe])
    with pytest.raises(ValueError, match="head_name 'fc' is no module"):
        strategy.train(bench.train_stream[0], eval_streams=[])
    assert strategy.clock.train_iterations == 0
