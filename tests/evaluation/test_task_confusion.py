"""The confusion of tasks against per-sample loops, in Avalanche's loop and in one pass, over kinds of streams."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.evaluation.task_confusion import TaskConfusion, confusion_shares
from avalanche_firn.plugins import FastPathPlugin
from avalanche_firn.plugins.run_errors import NonFiniteError


class Stream(list):
    name = "test"


def stream_of_classes(tasks, name="test"):
    stream = Stream(SimpleNamespace(current_experience=i, classes_in_this_experience=c) for i, c in enumerate(tasks))
    stream.name = name
    for experience in stream:
        experience.origin_stream = stream
    return stream


def learn(metric, experience):
    metric.before_training_exp(SimpleNamespace(experience=experience))
    metric.after_training_exp(SimpleNamespace(experience=experience))


def evaluate(metric, experiences, logits, targets, batch=4):
    """Shows every experience the rows of its classes, a batch at a time; tag -> value."""
    metric.before_eval(None)
    for experience in experiences:
        rows = [i for i, y in enumerate(targets.tolist()) if y in experience.classes_in_this_experience]
        strategy = SimpleNamespace(experience=experience)
        metric.before_eval_exp(strategy)
        for start in range(0, len(rows), batch):
            strategy.mb_output, strategy.mb_y = (x[rows[start : start + batch]] for x in (logits, targets))
            metric.after_eval_iteration(strategy)
        metric.after_eval_exp(strategy)
    return {value.name: (value.x_plot, value.value) for value in metric.after_eval(None) or []}


def counted(rows, tasks):
    """The loop that the metric must equal; the last column are predictions of no task."""
    table = [[0] * (len(tasks) + 1) for _ in tasks]
    for logits, target in rows:
        found = len(tasks)
        if not any(math.isnan(value) for value in logits):
            best = max(range(len(logits)), key=lambda c: (logits[c], -c))
            found = next((j for j, classes in enumerate(tasks) if best in classes), len(tasks))
        table[next(i for i, classes in enumerate(tasks) if target in classes)][found] += 1
    return table if any(row[-1] for row in table) else [row[:-1] for row in table]


@st.composite
def problems(draw):
    """Tasks over class ids with gaps, logits with ties and infinities over more or fewer classes, targets."""
    ids = draw(st.lists(st.integers(0, 14), min_size=2, max_size=8, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, len(ids) - 1), max_size=3)))
    tasks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    width, rows = draw(st.integers(1, 18)), draw(st.integers(1, 20))
    entry = st.one_of(st.integers(-2, 2).map(float), st.just(-math.inf))
    finite = st.lists(entry, min_size=width, max_size=width).filter(lambda row: max(row) > -math.inf)
    logits = draw(st.lists(finite, min_size=rows, max_size=rows))
    targets = draw(st.lists(st.sampled_from(ids), min_size=rows, max_size=rows))
    return tasks, torch.tensor(logits, dtype=torch.float32), torch.tensor(targets)


@pytest.mark.parametrize(("classes", "rows"), [([0, 1], 0), (None, 2)])
def test_without_samples_or_classes_nothing_is_emitted(classes, rows):
    """Both would be a share of nothing; neither may stop a training run."""
    metric = TaskConfusion(image=False)
    (experience,) = stream_of_classes([classes])
    learn(metric, experience)
    metric.before_eval(None)
    strategy = SimpleNamespace(experience=experience, mb_output=torch.zeros(rows, 2))
    metric.before_eval_exp(strategy)
    metric.after_eval_iteration(strategy)
    metric.after_eval_exp(strategy)
    assert metric.after_eval(None) is None and metric.result() is None and metric.curve() == []


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(1, 6), st.booleans())
def test_equals_the_loop(problem, batch, joint):
    tasks, logits, targets = problem
    metric, matrix = TaskConfusion(image=False), ResultMatrixMetric(image=False)
    stream = stream_of_classes(tasks)
    for each in (metric, matrix):
        for experience in stream_of_classes([[c for task in tasks for c in task]] if joint else tasks, name="train"):
            learn(each, experience)
    emitted = evaluate(metric, stream, logits, targets, batch)
    evaluate(matrix, stream, logits, targets, batch)
    counts = metric.result()
    assert counts == counted(list(zip(logits.tolist(), targets.tolist(), strict=True)), tasks)
    sizes = [sum(y in classes for y in targets.tolist()) for classes in tasks]
    assert [sum(row) for row in counts] == sizes
    right = np.nan_to_num(matrix.matrix.correct[-1])
    assert all(counts[i][i] >= right[i] for i in range(len(tasks)))
    share = sum(counts[i][i] for i in range(len(tasks))) / len(targets)
    assert emitted == {"accuracy/within-task": (0 if joint else len(tasks) - 1, share)}
    assert share >= matrix.matrix.summary()["accuracy/last"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_no_wrong_answer(value):
    for kind in (TaskConfusion, ResultMatrixMetric) if math.isnan(value) else (ResultMatrixMetric,):
        metric, stream = kind(image=False), stream_of_classes([[0], [1]])
        for experience in stream_of_classes([[0], [1]], "train"):
            learn(metric, experience)
        logits = torch.zeros(4, 2)
        logits[3, 0] = value
        words = r"^evaluation of experience 1 .*of the stream 'test': the outputs of 1 "
        with pytest.raises(NonFiniteError, match=words):
            evaluate(metric, stream, logits, torch.tensor([0, 0, 1, 1]), batch=3)


def test_batches_beyond_those_that_are_added_up_at_once():
    metric = TaskConfusion(image=False)
    learn(metric, stream_of_classes([[0], [1]], "train")[0])
    learn(metric, stream_of_classes([[0], [1]], "train")[1])
    logits = torch.nn.functional.one_hot(torch.arange(1200) % 3 % 2, 2).float()
    evaluate(metric, stream_of_classes([[0], [1]]), logits, torch.arange(1200) % 2, batch=1)
    assert metric.result() == [[400, 200], [400, 200]]


TASKS = [[4, 0], [2], [1, 3]]


def problem(width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, width, generator=generator), torch.randint(5, (40,), generator=generator)


@pytest.mark.parametrize("streams", ["seen", "all"])
def test_only_tasks_seen_count(streams):
    metric, stream, (logits, targets) = TaskConfusion(image=False), stream_of_classes(TASKS), problem()
    if streams == "all":  # the baseline of forward transfer
        assert evaluate(metric, stream, logits, targets) == {} and metric.curve() == []
    for index, experience in enumerate(stream_of_classes(TASKS, "train")):
        learn(metric, experience)
        emitted = evaluate(metric, stream if streams == "all" else stream[: index + 1], logits, targets)
        seen = TASKS[: index + 1]
        rows = [
            (x, y) for x, y in zip(logits.tolist(), targets.tolist(), strict=True) if any(y in task for task in seen)
        ]
        assert metric.result() == counted(rows, seen)
        assert emitted["accuracy/within-task"][0] == index
    assert len(metric.curve()) == 3 and metric.curve()[-1] == emitted["accuracy/within-task"][1]
    assert evaluate(metric, stream, logits, targets) == {}, "an evaluation that was emitted already is not repeated"


def test_what_is_not_measured():
    logits, targets = problem()
    shared = TaskConfusion()  # domain-incremental: only the second task shows it
    learn(shared, stream_of_classes([[0, 1, 2, 3, 4]] * 2, "train")[0])
    assert evaluate(shared, stream_of_classes([[0, 1, 2, 3, 4]] * 2)[:1], logits, targets) == {}
    assert shared.result() is None and shared.curve() == []
    partial = TaskConfusion()
    for experience in stream_of_classes(TASKS, "train"):
        learn(partial, experience)
    assert evaluate(partial, stream_of_classes(TASKS)[1:], logits, targets) == {}
    other = TaskConfusion(stream="valid")
    learn(other, stream_of_classes(TASKS, "train")[0])
    assert evaluate(other, stream_of_classes(TASKS)[:1], logits, targets) == {}
    inside = TaskConfusion()
    learn(inside, stream_of_classes(TASKS, "train")[0])
    inside.before_training_exp(SimpleNamespace(experience=stream_of_classes(TASKS, "train")[1]))
    assert evaluate(inside, stream_of_classes(TASKS)[:2], logits, targets) == {}


def test_an_output_of_another_kind_is_refused():
    metric = TaskConfusion()
    learn(metric, stream_of_classes(TASKS, "train")[0])
    with pytest.raises(TypeError, match=r"mb_output: got \(4, 6, 1\); accepted are logits"):
        evaluate(metric, stream_of_classes(TASKS)[:1], problem()[0][..., None], problem()[1])


def test_image_and_prefix_after_the_last_experience():
    metric, (logits, targets) = TaskConfusion(stream="valid"), problem()
    stream = stream_of_classes(TASKS, "valid")
    for index, experience in enumerate(stream_of_classes(TASKS, "train")):
        learn(metric, experience)
        emitted = evaluate(metric, stream[: index + 1], logits, targets)
        assert ("validation/accuracy/confusion" in emitted) == (index == 2)
    picture = emitted["validation/accuracy/confusion"][1]
    figure, shares = picture.alternatives
    assert isinstance(figure, Figure)
    np.testing.assert_allclose(shares.numpy(), confusion_shares([metric.result()]))
    np.testing.assert_allclose(shares.sum(1).numpy(), 1.0)


def test_state_goes_through_json_and_on_to_the_same_values():
    logits, targets = problem()
    whole, first, second = (TaskConfusion(image=False) for _ in range(3))
    train, stream = stream_of_classes(TASKS, "train"), stream_of_classes(TASKS)
    for index, experience in enumerate(train):
        learn(whole, experience)
        expected = evaluate(whole, stream[: index + 1], logits, targets)
    for index, experience in enumerate(train[:2]):
        learn(first, experience)
        evaluate(first, stream[: index + 1], logits, targets)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    learn(second, train[2])
    assert evaluate(second, stream, logits, targets) == expected
    assert second.state_dict() == whole.state_dict()
    fresh = TaskConfusion()
    fresh.load_state_dict(json.loads(json.dumps(TaskConfusion().state_dict())))
    assert fresh.result() is None and fresh.curve() == []


# ------------------------------------------------------------------ a real strategy
def trained(digits, plugins, train=None):
    """The metric and the model after a few tasks of digits, in a network with ten outputs."""
    torch.manual_seed(0)
    size = digits.train[0].dataset[0][0].numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.ReLU(), nn.Linear(24, 10))
    metric = TaskConfusion(image=False)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
        train_mb_size=32, train_epochs=2, eval_mb_size=37, plugins=plugins,
        evaluator=EvaluationPlugin(metric, ResultMatrixMetric(image=False), loggers=[], collect_all=False),
    )  # fmt: skip
    for index, experience in enumerate(list(digits.train if train is None else train)[:3]):
        strategy.train(experience, eval_streams=[])
        strategy.eval(digits.test if train is not None else digits.test[: index + 1])
    return metric, model


@torch.no_grad()
def by_hand(model, experiences):
    rows = [(model(x[None])[0].tolist(), int(y)) for e in experiences for x, y, *_ in e.dataset.eval()]
    return counted(rows, [list(e.classes_in_this_experience) for e in experiences])


@pytest.mark.parametrize("joint", [False, True])
def test_avalanches_loop_and_one_pass(joint):
    digits = digits_stream(tasks=5)
    train = digits.joint().train if joint else None
    slow, model = trained(digits, [], train)
    fast, _ = trained(digits, [FastPathPlugin()], train)
    assert slow.result() == by_hand(copy.deepcopy(model).eval(), digits.test if joint else digits.test[:3])
    assert fast.state_dict() == slow.state_dict()
    assert len(slow.curve()) == (1 if joint else 3)


# --------------------------------------------------------------------------- shares
def test_shares_over_runs():
    shares = confusion_shares([[[3, 1], [0, 0]], [[1, 1, 2], [0, 2, 0]]])
    np.testing.assert_allclose(shares, [[0.5, 0.25, 0.25], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(confusion_shares([[[1, 3], [2, 2]]]), [[0.25, 0.75], [0.5, 0.5]])


@pytest.mark.parametrize("counts", [[], [[[1, 2, 3]]], [[[1]], [[1, 2], [3, 4]]], [[1, 2]]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match=r"counts: got shapes .*accepted is \(T, T\)"):
        confusion_shares(counts)
