"""The matrix metric inside real Avalanche runs, against counts made by hand, on both benchmark generations."""

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.evaluation.metric_results import AlternativeValues
from avalanche.logging import TensorboardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_firn.evaluation.metrics import ResultMatrixMetric, continual_metrics
from avalanche_firn.evaluation.tensorboard import read_scalars

FIGURES = ["accuracy/average", "accuracy/last", "accuracy/incremental"]
TRANSFERS = ["forgetting/average", "transfer/backward", "transfer/forward"]


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_matrix_and_tags_of_a_whole_run(tools, generation):
    bench, log = tools.benchmark(generation), tools.Collect()
    metric = ResultMatrixMetric()
    learner = tools.strategy([metric], [log])
    counts = [[tools.count(learner.model, e) for e in bench.test_stream]]
    learner.eval(bench.test_stream)
    assert log.values == [] and metric.matrix.shape[0] == 0  # the baseline is recorded, not plotted
    for experience in bench.train_stream:
        learner.train(experience, eval_streams=[])
        learner.eval(bench.test_stream)
        counts.append([tools.count(learner.model, e) for e in bench.test_stream])

    hits = np.array([[hit for hit, _ in row] for row in counts])
    total = np.array([size for _, size in counts[0]])
    matrix = metric.result()
    np.testing.assert_array_equal(matrix.correct, hits[1:])
    np.testing.assert_array_equal(matrix.total, total)
    np.testing.assert_array_equal(matrix.baseline, hits[0] / total)
    assert matrix.classes == [sorted(e.classes_in_this_experience) for e in bench.test_stream]
    assert sorted(c for ids in matrix.classes for c in ids) == list(range(6)) and matrix.classes[0] != [0, 1]

    last = hits[-1]
    assert log.curve("accuracy/last")[-1] == (2, last.sum() / total.sum())
    assert log.curve("accuracy/average")[-1] == (2, pytest.approx(np.mean(last / total)))
    pooled = [hits[t + 1, : t + 1].sum() / total[: t + 1].sum() for t in range(3)]
    assert log.curve("accuracy/incremental")[-1] == (2, pytest.approx(np.mean(pooled)))
    fall = np.mean([(hits[i + 1 : 3, i].max() - last[i]) / total[i] for i in range(2)])
    assert log.curve("forgetting/average")[-1] == (2, pytest.approx(fall))
    assert [x for x, _ in log.curve("accuracy/task-1")] == [0, 1, 2]
    assert [x for x, _ in log.curve("transfer/forward")] == [1, 2]
    assert log.tags == {"accuracy/matrix", *FIGURES, *TRANSFERS, *(f"accuracy/task-{k}" for k in range(3))}
    ((step, picture),) = log.curve("accuracy/matrix")
    assert step == 2 and isinstance(picture, AlternativeValues) and isinstance(picture.alternatives[0], Figure)
    np.testing.assert_array_equal(picture.alternatives[1].numpy(), matrix.accuracy)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_sliced_streams_and_partial_evaluation(tools, generation):
    bench, log = tools.benchmark(generation), tools.Collect()
    metric = ResultMatrixMetric()
    learner = tools.strategy([metric], [log], epochs=1)
    for k, experience in enumerate([*bench.train_stream[:1], *bench.train_stream[1:]]):
        learner.train(experience, eval_streams=[])
        learner.eval(bench.test_stream[: k + 1])
    assert [x for x, _ in log.curve("accuracy/last")] == [0, 1, 2]
    assert np.isnan(metric.matrix.accuracy[np.triu_indices(3, 1)]).all()
    assert "transfer/forward" not in log.tags and [x for x, _ in log.curve("forgetting/average")] == [1, 2]

    partial, log = ResultMatrixMetric(), tools.Collect()
    learner = tools.strategy([partial], [log], epochs=1)
    learner.train(bench.train_stream[0], eval_streams=[])
    learner.train(bench.train_stream[1], eval_streams=[])
    learner.eval(bench.test_stream[1])
    assert log.tags == {"accuracy/task-1"}
    learner.eval([bench.test_stream[0]])
    assert [x for x, _ in log.curve("accuracy/average")] == [1]
    learner.eval(bench.test_stream)  # the same values once more, and one new column
    assert len(log.curve("accuracy/average")) == len(log.curve("accuracy/task-1")) == 1
    assert log.curve("accuracy/task-2")[-1][0] == 1


def test_joint_training_counts_all_tasks_as_seen(tools):
    bench, joint, log = tools.benchmark(), tools.benchmark(sizes=(6,)), tools.Collect()
    metric = ResultMatrixMetric()
    learner = tools.strategy([metric], [log])
    learner.train(joint.train_stream[0], eval_streams=[])
    learner.eval(bench.test_stream)
    hits, total = np.array([tools.count(learner.model, e) for e in bench.test_stream]).T
    assert log.curve("accuracy/last") == [(0, hits.sum() / total.sum())]
    assert log.curve("accuracy/average") == [(0, pytest.approx(np.mean(hits / total)))]
    assert "forgetting/average" not in log.tags and metric.matrix.shape == (1, 3)
    assert len(log.curve("accuracy/matrix")) == 1

    coarse, log = ResultMatrixMetric(), tools.Collect()  # two training steps, one test experience with all classes
    two = tools.benchmark(sizes=(2, 4))
    learner = tools.strategy([coarse], [log], epochs=1)
    for experience in two.train_stream:
        learner.train(experience, eval_streams=[])
        learner.eval(joint.test_stream)
    assert [x for x, _ in log.curve("accuracy/task-0")] == [0, 1]
    assert [x for x, _ in log.curve("accuracy/last")] == [1]


def test_joint_training_on_streams_that_do_not_know_their_classes(tools):
    bench = tools.benchmark()
    plain = benchmark_from_datasets(
        train=[bench.train_stream[0].dataset], test=[e.dataset for e in bench.test_stream[:2]]
    )
    metric, log = ResultMatrixMetric(), tools.Collect()
    learner = tools.strategy([metric], [log], epochs=1)
    learner.train(plain.train_stream[0], eval_streams=[])
    learner.eval(plain.test_stream)
    assert log.curve("accuracy/last") == [(0, metric.matrix.correct.sum() / metric.matrix.total.sum())]
    assert metric.matrix.classes == [[], []]


def test_streams_are_kept_apart(tools):
    bench, log = tools.benchmark(), tools.Collect()
    metrics = continual_metrics()
    learner = tools.strategy(metrics, [log], epochs=1)
    learner.train(bench.train_stream[0], eval_streams=[])
    for stream in (bench.test_stream, bench.valid_stream, bench.train_stream[:1]):
        learner.eval(stream)
    assert len(log.curve("accuracy/last")) == 1 == len(log.curve("validation/accuracy/last"))
    assert [str(m) for m in metrics[:2]] == ["ResultMatrix(test)", "ResultMatrix(valid)"]
    assert ResultMatrixMetric(stream="out_stream").prefix == "out_stream/"
    with pytest.raises(ValueError, match="different"):
        continual_metrics(streams=["test", "test"])


@pytest.mark.parametrize("mode", ["epoch", "iteration"])
def test_periodic_evaluation_never_writes_a_row(tools, mode):
    bench, log = tools.benchmark(), tools.Collect()
    metric = ResultMatrixMetric()
    learner = tools.strategy([metric], [log], epochs=3, eval_every=1 if mode == "epoch" else 4, peval_mode=mode)
    rows = [[tools.count(learner.model, e)[0] for e in bench.test_stream]]
    for experience in bench.train_stream[:2]:
        learner.train(experience, eval_streams=[bench.test_stream])
        learner.eval(bench.test_stream)
        rows.append([tools.count(learner.model, e)[0] for e in bench.test_stream])
    np.testing.assert_array_equal(metric.matrix.baseline * metric.matrix.total, rows[0])
    np.testing.assert_array_equal(metric.matrix.correct, rows[1:])
    assert rows[0] != rows[1] != rows[2]
    assert [x for x, _ in log.curve("accuracy/last")] == [0, 1]
    steps = [x for x, _ in log.curve("periodic/accuracy/last")]
    assert len(steps) >= 4 and steps == sorted(steps) and steps[-1] <= learner.clock.train_iterations
    assert log.tags >= {"periodic/accuracy/task-0", "periodic/accuracy/task-2"}
    assert not any("average" in tag for tag in log.tags if tag.startswith("periodic"))


def test_final_periodic_evaluation_is_the_row(tools):
    bench, log = tools.benchmark(), tools.Collect()
    metric = ResultMatrixMetric()
    learner = tools.strategy([metric], [log], epochs=2, eval_every=0)
    learner.train(bench.train_stream[0], eval_streams=[bench.test_stream])
    assert metric.matrix.correct[0].tolist() == [tools.count(learner.model, e)[0] for e in bench.test_stream]
    assert not any(tag.startswith("periodic") for tag in log.tags)


def test_empty_test_experience_and_wide_or_broken_outputs(tools):
    class Experience:
        def __init__(self, index, classes):
            self.current_experience, self.classes_in_this_experience = index, classes

        class origin_stream:
            name = "test"

    class Fake:
        clock = type("Clock", (), {"train_iterations": 7})

    experiences = [Experience(0, [5]), Experience(1, {2, 11})]

    class Stream(list):
        name = "test"

    for e in experiences:
        e.origin_stream = Stream(experiences)
    metric, fake = ResultMatrixMetric(), Fake()
    for e in experiences:
        fake.experience = e
        metric.before_training_exp(fake)
        metric.after_training_exp(fake)
    metric.before_eval(fake)
    batches = {0: [], 1: [([2, 11, 11], [2, 11, 2]), ([2], [11])]}
    for e in experiences:
        fake.experience = e
        metric.before_eval_exp(fake)
        for target, predicted in batches[e.current_experience]:
            fake.mb_y = torch.tensor(target)
            fake.mb_output = torch.zeros(len(target), 12).scatter_(1, torch.tensor(predicted)[:, None], 1.0)
            metric.after_eval_iteration(fake)
        metric.after_eval_exp(fake)
    emitted = {value.name: value.value for value in metric.after_eval(fake)}
    assert emitted["accuracy/task-1"] == 0.5 == emitted["accuracy/last"] == emitted["accuracy/average"]
    assert "accuracy/task-0" not in emitted and metric.matrix.total.tolist() == [0, 4]

    fake.mb_y, fake.mb_output = torch.zeros(3, dtype=torch.long), torch.full((3, 12), float("nan"))
    metric.before_eval_exp(fake)
    metric.after_eval_iteration(fake)
    metric._count()
    assert int(metric._correct) == 0  # a diverged model is never right, although argmax of NaN is class 0
    fake.mb_output = (torch.zeros(3, 12),)
    with pytest.raises(TypeError, match="mb_output"):
        metric.after_eval_iteration(fake)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_event_file_of_a_run(tools, tmp_path, generation):
    bench, log = tools.benchmark(generation), TensorboardLogger(str(tmp_path))
    metrics = continual_metrics(streams=["test"])
    learner = tools.strategy(metrics, [log])
    for experience in bench.train_stream:
        learner.train(experience, eval_streams=[])
        learner.eval(bench.test_stream)
    log.writer.close()
    scalars = read_scalars(tmp_path)
    cost = ["images-per-second", "seconds", "peak-memory-MiB", "trainable-parameters"]
    expected = {*FIGURES, *TRANSFERS[:2], "loss/train", "lr/backbone", "lr/group-1", "lr/group-2"}
    expected |= {*(f"accuracy/task-{k}" for k in range(3)), *(f"efficiency/{name}" for name in cost)}
    assert set(scalars) == expected
    last = [(t, np.float32(metrics[0].matrix.summary(t)["accuracy/last"])) for t in range(3)]
    assert scalars["accuracy/last"] == last
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("accuracy/matrix")
    assert image.step == 2 and image.width > 300
    assert events.Tags()["histograms"] == []


def test_metrics_change_neither_weights_nor_random_numbers(tools):
    def weights(metrics):
        bench = tools.benchmark()
        learner = tools.strategy(metrics, [tools.Collect()])
        learner.train(bench.train_stream[0], eval_streams=[])
        learner.eval(bench.test_stream)
        return [*learner.model.parameters(), torch.get_rng_state().float()]

    for a, b in zip(weights([]), weights(continual_metrics(loss_every=2)), strict=True):
        assert torch.equal(a, b)
