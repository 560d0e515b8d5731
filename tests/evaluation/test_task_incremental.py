"""Task-incremental accuracy against per-sample loops, golden numbers and the class-incremental metric."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_firn.evaluation import ResultMatrixMetric, TaskIncrementalMatrixMetric

FIGURES = ["accuracy/average", "accuracy/last", "accuracy/incremental"]
TRANSFERS = ["forgetting/average", "transfer/backward", "transfer/forward"]


class Stream(list):
    name = "test"


def stream_of_classes(tasks):
    """Experiences that know their classes and nothing else."""
    stream = Stream(SimpleNamespace(current_experience=i, classes_in_this_experience=c) for i, c in enumerate(tasks))
    for experience in stream:
        experience.origin_stream = stream
    return stream


def learn(metric, experience):
    metric.before_training_exp(SimpleNamespace(experience=experience))
    metric.after_training_exp(SimpleNamespace(experience=experience))


def evaluate(metric, stream, logits, targets, batch=4):
    """Shows every experience the rows of its classes, a batch at a time; tag -> value."""
    metric.before_eval(None)
    for experience in stream:
        rows = [i for i, y in enumerate(targets.tolist()) if y in experience.classes_in_this_experience]
        strategy = SimpleNamespace(experience=experience)
        metric.before_eval_exp(strategy)
        for start in range(0, len(rows), batch):
            strategy.mb_output, strategy.mb_y = (x[rows[start : start + batch]] for x in (logits, targets))
            metric.after_eval_iteration(strategy)
        metric.after_eval_exp(strategy)
    return {value.name: value.value for value in metric.after_eval(strategy)}


def right(row, target, allowed):
    """Whether the largest allowed logit, the first of equals, is the target's; the loop that the metric must equal."""
    best = None
    for c in sorted(allowed):
        if c >= len(row):
            continue
        if math.isnan(row[c]):
            return False
        if best is None or row[c] > row[best]:
            best = c
    return best == target


# ------------------------------------------------------------------------ golden
def golden_run(golden, stream_of, tools, sizes, metrics):
    """The golden classifier after as many trainings at rate 0 as there are tasks, and an evaluation."""
    arrays = golden("cila", "classifier_stage")
    weight = torch.from_numpy(arrays["acc_weight"])
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.load_state_dict({"weight": weight, "bias": torch.from_numpy(arrays["acc_bias"])})
    bench = stream_of(arrays["acc_features"], arrays["acc_labels"], sizes)
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=64,
        eval_mb_size=7,
        evaluator=EvaluationPlugin(*metrics, loggers=[tools.Collect()], collect_all=False),
    )
    for experience in bench.train_stream:
        learner.train(experience, eval_streams=[])
    learner.eval(bench.test_stream)
    return arrays


def test_golden_accuracies(golden, stream_of, tools):
    free, given_task = ResultMatrixMetric(image=False), TaskIncrementalMatrixMetric(image=False)
    arrays = golden_run(golden, stream_of, tools, [2, 2, 2], [free, given_task])
    assert arrays["acc_setting"].tolist() == [3, 2] and arrays["acc_weight"].shape[0] > 6
    assert 100 * free.matrix.last == pytest.approx(float(arrays["acc_class_il"]), abs=1e-4)
    assert 100 * given_task.matrix.last == pytest.approx(float(arrays["acc_task_il"]), abs=1e-4)


def test_golden_counts_of_every_class(golden, stream_of, tools):
    free, given_task = ResultMatrixMetric(image=False), TaskIncrementalMatrixMetric(image=False)
    arrays = golden_run(golden, stream_of, tools, [1] * 6, [free, given_task])
    np.testing.assert_array_equal(free.matrix.correct[-1], arrays["acc_correct_per_class"])
    np.testing.assert_array_equal(free.matrix.total, arrays["acc_count_per_class"])
    np.testing.assert_array_equal(given_task.matrix.correct[-1], arrays["acc_count_per_class"])  # nothing to choose


# -------------------------------------------------------------------- properties
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


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 6))
def test_equals_the_loop_and_is_never_below_class_incremental(problem, batch):
    tasks, logits, targets = problem
    free, given_task = ResultMatrixMetric(image=False), TaskIncrementalMatrixMetric(image=False)
    for metric in (free, given_task):
        for experience in stream_of_classes(tasks):
            learn(metric, experience)
        evaluate(metric, stream_of_classes(tasks), logits, targets, batch)
    rows = list(zip(logits.tolist(), targets.tolist(), strict=True))
    expected = [sum(right(row, y, allowed) for row, y in rows if y in allowed) for allowed in tasks]
    assert given_task.matrix.correct[-1].tolist() == expected
    assert (given_task.matrix.correct >= free.matrix.correct).all()
    np.testing.assert_array_equal(given_task.matrix.total, free.matrix.total)


# ------------------------------------------------------------ inside Avalanche runs
@torch.no_grad()
def count(model, experience):
    model.eval()
    rows = [(model(x[None])[0].tolist(), int(y)) for x, y, *_ in experience.dataset.eval()]
    return sum(right(row, y, experience.classes_in_this_experience) for row, y in rows)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_matrix_and_tags_of_a_whole_run(tools, generation):
    bench, log = tools.benchmark(generation), tools.Collect()
    free, given_task = ResultMatrixMetric(image=False), TaskIncrementalMatrixMetric()
    learner = tools.strategy([free, given_task], [log])
    learner.eval(bench.test_stream)
    hits = [[count(learner.model, e) for e in bench.test_stream]]
    for experience in bench.train_stream:
        learner.train(experience, eval_streams=[])
        learner.eval(bench.test_stream)
        hits.append([count(learner.model, e) for e in bench.test_stream])
    matrix, hits = given_task.result(), np.array(hits)
    np.testing.assert_array_equal(matrix.correct, hits[1:])
    np.testing.assert_array_equal(matrix.baseline, hits[0] / matrix.total)
    assert matrix.classes == [sorted(e.classes_in_this_experience) for e in bench.test_stream]
    assert matrix.last > free.matrix.last  # three tasks learnt one after the other: the last one wins among all classes
    assert log.curve("task-il/accuracy/last")[-1] == (2, hits[-1].sum() / matrix.total.sum())
    assert log.curve("task-il/forgetting/average")[-1] == (2, pytest.approx(matrix.forgetting))
    names = {*FIGURES, *TRANSFERS, *(f"accuracy/task-{k}" for k in range(3))}
    assert log.tags == {*names, *(f"task-il/{name}" for name in names), "task-il/accuracy/matrix"}


def test_prefixes_of_other_streams_and_periodic_evaluation(tools):
    bench, log = tools.benchmark(), tools.Collect()
    metrics = [TaskIncrementalMatrixMetric(stream=name, image=False) for name in ("test", "valid")]
    learner = tools.strategy(metrics, [log], eval_every=1)
    learner.train(bench.train_stream[0], eval_streams=[bench.test_stream[:1]])
    learner.eval(bench.test_stream[:1])
    learner.eval(bench.valid_stream[:1])
    assert {"task-il/accuracy/last", "validation/task-il/accuracy/last", "periodic/task-il/accuracy/last"} <= log.tags
    assert all("task-il/" in tag for tag in log.tags)
    assert [str(m) for m in metrics] == ["TaskIncrementalMatrix(test)", "TaskIncrementalMatrix(valid)"]
    assert TaskIncrementalMatrixMetric(stream="out").prefix == "out/task-il/"
    assert TaskIncrementalMatrixMetric(prefix="").prefix == ""


def test_the_columns_are_made_once_and_nothing_is_read_back():
    metric, stream = TaskIncrementalMatrixMetric(), stream_of_classes([[7, 2], {11, 0, 5}])
    made = []
    for experience in stream:
        strategy = SimpleNamespace(experience=experience)
        metric.before_eval_exp(strategy)
        for _ in range(3):  # tensors of the meta device have no values: reading one raises
            strategy.mb_output = torch.empty(4, 12, device="meta")
            strategy.mb_y = torch.empty(4, dtype=torch.long, device="meta")
            metric.after_eval_iteration(strategy)
            made.append(metric._columns)
    assert len({id(columns) for columns in made}) == 2 and made[0] is made[2]
    assert [len(columns) for columns in made] == [2] * 3 + [3] * 3


def test_state_round_trip():
    generator = torch.Generator().manual_seed(0)
    tasks, targets = [[9, 4], [1, 7, 2]], torch.tensor([9, 4, 1, 7, 2, 2, 4, 9, 1, 7])
    first, second = (torch.randn(10, 10, generator=generator) for _ in range(2))
    metric, stream = TaskIncrementalMatrixMetric(), stream_of_classes(tasks)
    learn(metric, stream[0])
    evaluate(metric, stream[:1], first, targets)
    loaded = TaskIncrementalMatrixMetric()
    loaded.load_state_dict(json.loads(json.dumps(metric.state_dict())))
    emitted = []
    for each in (metric, loaded):
        learn(each, stream[1])
        emitted.append({k: v for k, v in evaluate(each, stream, second, targets).items() if "matrix" not in k})
    assert emitted[0] == emitted[1] and "task-il/forgetting/average" in emitted[0]
    assert metric.state_dict() == loaded.state_dict()


def test_refusals(tools):
    bench = tools.benchmark()
    plain = benchmark_from_datasets(train=[bench.train_stream[0].dataset], test=[bench.test_stream[0].dataset])
    learner = tools.strategy([TaskIncrementalMatrixMetric()], [tools.Collect()], epochs=1)
    with pytest.raises(ValueError, match=r"classes_in_this_experience: got none for experience 0 of stream 'test'"):
        learner.eval(plain.test_stream)
    learner.eval(plain.train_stream)  # a stream that the metric doesn't follow may be what it likes
    metric, strategy = TaskIncrementalMatrixMetric(), SimpleNamespace(experience=stream_of_classes([[0, 1]])[0])
    metric.before_eval_exp(strategy)
    strategy.mb_y, strategy.mb_output = torch.zeros(3, dtype=torch.long), torch.zeros(3)
    with pytest.raises(TypeError, match="mb_output"):
        metric.after_eval_iteration(strategy)
