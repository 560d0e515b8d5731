"""The probe of single tasks against copies of the model, its schedule, its neutrality, its state."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from avalanche.logging import TensorboardLogger
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional

from avalanche_firn.evaluation import RepresentationDrift
from avalanche_firn.evaluation.dynamics import TaskDynamics
from avalanche_firn.models import FeatureClassifier, TaskwiseLinearHead
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

CLASSES = 6


def images_of(count, seed, classes=CLASSES, size=8):
    """Noisy patterns, ``count`` of each class: (x (n, 1, 8, 8), y)."""
    patterns = torch.randn(classes, 1, size, size, generator=torch.Generator().manual_seed(99))
    y = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(len(y), 1, size, size, generator=torch.Generator().manual_seed(seed))
    return patterns[y] + 0.7 * noise, y


def pairs(count=5, seed=1):
    x, y = images_of(count, seed)
    return [(x[y == c], y[y == c]) for c in range(CLASSES)]


@pytest.fixture(params=["modern", "classic"])
def stream(request, stream_of):
    return stream_of(*images_of(7, 0), [2, 2, 2], *images_of(5, 1), generation=request.param)


@pytest.fixture
def modern(stream_of):
    return stream_of(*images_of(7, 0), [2, 2, 2], *images_of(5, 1))


@pytest.fixture
def cheap_pictures(monkeypatch):
    """Drawing takes longer than all else here; only the tests about pictures do it."""
    monkeypatch.setattr("avalanche_firn.evaluation.dynamics_result.Dynamics.figures", lambda self: {})


def convnet():
    """With what a probe could disturb: batch statistics and random masks."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(54, CLASSES),
    )  # fmt: skip


class Growing(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), head

    def forward(self, x):
        return self.head(self.body(x))


def learner(metrics, *, build=convnet, plugins=(), loggers=(), batch=4, epochs=1, lr=1e-2):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(*metrics, loggers=[*loggers], collect_all=False)
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=epochs,
        plugins=[*plugins],
        evaluator=evaluator,
    )


def train(strategy, experiences):
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
    return strategy


class Copies(SupervisedPlugin):
    """Copies of the model before the first step and after each, in the order in which rows could be taken."""

    def __init__(self):
        super().__init__()
        self.models = {}

    def before_training_exp(self, strategy, **kwargs):
        self.models.setdefault(int(strategy.clock.train_iterations), copy.deepcopy(strategy.model))

    def after_training_iteration(self, strategy, **kwargs):
        self.models[int(strategy.clock.train_iterations) + 1] = copy.deepcopy(strategy.model)


@torch.no_grad()
def by_hand(model, x, y):
    """Loss and accuracy of one task, image by image."""
    model.eval()
    outputs = [model(image[None])[0] for image in x]
    losses = [
        float(torch.logsumexp(out.double(), 0) - out.double()[label]) for out, label in zip(outputs, y, strict=True)
    ]
    hits = [int(out.argmax()) == int(label) for out, label in zip(outputs, y, strict=True)]
    return sum(losses) / len(losses), sum(hits) / len(hits)


# ------------------------------------------------------------------------ values
@pytest.mark.usefixtures("cheap_pictures")
def test_every_row_equals_a_copy_of_the_model(stream, tools):
    copies, log = Copies(), tools.Collect()
    metric = TaskDynamics(stream.test_stream, every=1, images_per_task=6, batch_size=7)
    train(learner([metric], plugins=[copies], loggers=[log]), stream.train_stream)
    found = metric.result()
    assert found.steps.tolist() == list(range(13)) == sorted(copies.models)
    assert found.blocks.tolist() == [[0, 4], [4, 8], [8, 12]] and found.block_tasks == ((0,), (1,), (2,))
    rows = [round(i * 9 / 5) for i in range(6)]  # of ten images of a task
    for task, experience in enumerate(stream.test_stream):
        items = [experience.dataset.eval()[i] for i in rows]
        x, y = torch.stack([item[0] for item in items]), [int(item[1]) for item in items]
        for row, step in enumerate(found.steps.tolist()):
            loss, accuracy = by_hand(copies.models[step], x, y)
            assert found.loss[row, task] == pytest.approx(loss, abs=2e-6)
            assert found.accuracy[row, task] == pytest.approx(accuracy, abs=1e-7)
    for tag, values in (("loss", found.mean_loss), ("accuracy", found.mean_accuracy)):
        assert log.curve(f"dynamics/{tag}") == list(zip(range(13), values.tolist(), strict=True))
    for name in ("learning", "interference", "synergy"):
        expected = [(step, getattr(found.totals(block), name)) for block, step in ((1, 4), (2, 8), (3, 12))]
        assert log.curve(f"dynamics/{name}") == expected
    np.testing.assert_allclose(found.block_effect.sum(0), found.loss[-1] - found.loss[0], atol=1e-12)
    assert found.totals().learning > 0.5 and found.totals().interference > 0


def test_a_loop_without_avalanche_gives_the_same_rows_bit_by_bit():
    probes = TaskDynamics(pairs(), every=3, task_names="abcdef")
    torch.manual_seed(0)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = pairs(4, seed=0)
    copies = [copy.deepcopy(model)]
    probes.start(model)
    for task, (x, y) in enumerate(data):
        probes.begin_block(task)
        for image, label in zip(x, y, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(image[None].repeat(2, 1, 1, 1)), label.repeat(2)).backward()
            optimizer.step()
            copies.append(copy.deepcopy(model))
            probes.step(model)
            assert model.training
        probes.end_block(model)
    probes.finish(model)
    found = probes.result()
    probes.finish(model)  # changes nothing
    assert len(probes.result().steps) == len(found.steps)
    # iteration 3 of each four, and each end, as there was a row inside
    assert found.steps.tolist() == [0, *(4 * task + part for task in range(6) for part in (3, 4))]
    assert found.block_tasks == tuple((i,) for i in range(6)) and found.task_names == tuple("abcdef")
    probe = probes.probe
    for row, step in enumerate(found.steps.tolist()):
        expected = probe.evaluate(copies[step], torch.device("cpu")).double().numpy()
        np.testing.assert_array_equal(np.stack([found.loss[row], found.accuracy[row]]), expected)
    assert found.shock(0.1).size == pytest.approx(found.mean_loss[0] - 0.1)


# ---------------------------------------------------------------------- schedule
class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, CLASSES))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.weight.expand(len(x), -1)


def schedule(lengths, every, **options):
    """Steps, blocks and tasks of a run over experiences of these lengths."""
    probes, model = TaskDynamics(pairs()[:1] * len(lengths), every=every, **options), Constant()
    probes.start(model)
    for task, length in enumerate(lengths):
        probes.begin_block([task])
        for _ in range(length):
            probes.step(model)
        probes.end_block(model)
    probes.finish(model)
    found = probes.result()
    return found.steps.tolist(), found.blocks.tolist(), [list(tasks) for tasks in found.block_tasks], model.passes


@pytest.mark.parametrize(
    ("lengths", "every", "steps", "blocks", "tasks"),
    [
        ([3, 2], 1, [0, 1, 2, 3, 4, 5], [[0, 3], [3, 5]], [[0], [1]]),
        ([3, 2], "experience", [0, 3, 5], [[0, 1], [1, 2]], [[0], [1]]),
        # inside at 4 and 8, ends at 10 and (having had one inside) at 15
        ([10, 5], 4, [0, 4, 8, 10, 14, 15], [[0, 3], [3, 5]], [[0], [1]]),
        # an end that falls on a row inside isn't repeated
        ([8], 4, [0, 4, 8], [[0, 2]], [[0]]),
        # experiences shorter than every share a block: ends at 3, 6, 9, 12, 14; due where 7 have passed
        ([3, 3, 3, 3, 2], 7, [0, 9, 14], [[0, 1], [1, 2]], [[0, 1, 2], [3, 4]]),
        # a short one after a long one: 2 have passed since the last row, so it joins the next
        ([8, 2, 2, 8], 4, [0, 4, 8, 12, 16, 20], [[0, 2], [2, 3], [3, 5]], [[0], [1, 2], [3]]),
        # nothing is due, but the last experience has a row
        ([2, 2], 100, [0, 4], [[0, 1]], [[0, 1]]),
        ([0, 2], "experience", [0, 0, 2], [[0, 1], [1, 2]], [[0], [1]]),
        ([0, 0], 5, [0, 0], [[0, 1]], [[0, 1]]),
    ],
)
def test_rows_and_blocks(lengths, every, steps, blocks, tasks):
    assert schedule(lengths, every)[:3] == (steps, blocks, tasks)


def test_default_resolution_is_cheap():
    passes = schedule([15] * 100, 100)[3]  # 1,500 iterations of batch 1
    rows = 1 + math.ceil(100 / 7)  # every seventh end: 105 iterations
    assert passes == rows * math.ceil(25 * 5 / 16)  # 25 tasks of 5 images, by 16 on a CPU
    settings = TaskDynamics(pairs()[:1] * 600).probe
    assert len(settings) == 25 and len(settings.images) == 125


@pytest.mark.usefixtures("cheap_pictures")
def test_work_after_training_is_part_of_the_block(modern):
    class Zero(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            with torch.no_grad():
                strategy.model[-1].weight.zero_()
                strategy.model[-1].bias.zero_()

    metric = TaskDynamics(modern.test_stream, every=4)  # a row inside at the very end of each experience
    train(learner([metric], plugins=[Zero()]), modern.train_stream)
    found = metric.result()
    assert found.steps.tolist() == [0, 4, 8, 12] and found.blocks.tolist() == [[0, 1], [1, 2], [2, 3]]
    np.testing.assert_allclose(found.loss[1:], math.log(CLASSES), atol=1e-6)  # the row inside was replaced


@pytest.mark.usefixtures("cheap_pictures")
def test_other_streams_need_task_of(modern, stream_of):
    one = stream_of(*images_of(7, 0), [6])
    with pytest.raises(ValueError, match=r"3 for a stream of 1.*task_of"):
        train(learner([TaskDynamics(modern.test_stream)]), one.train_stream)
    metric = TaskDynamics(modern.test_stream, every=100, task_of=lambda experience: range(3))
    train(learner([metric]), one.train_stream)
    found = metric.result()
    assert found.block_tasks == ((0, 1, 2),) and found.steps.tolist() == [0, 11] and found.totals().interference == 0


@pytest.mark.usefixtures("cheap_pictures")
def test_an_interrupted_experience_and_a_late_start(modern):
    class Stop(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 5 and strategy.experience.current_experience == 1:
                raise KeyboardInterrupt

    metric = TaskDynamics(modern.test_stream, every="experience")
    strategy = learner([metric], plugins=[Stop()])
    strategy.evaluator.active = False
    strategy.train(modern.train_stream[0], eval_streams=[])  # not heard of
    strategy.evaluator.active = True
    with pytest.raises(KeyboardInterrupt):
        strategy.train(modern.train_stream[1], eval_streams=[])
    strategy.train(modern.train_stream[2], eval_streams=[])
    found = metric.result()
    assert found.steps[0] == 4 and found.block_tasks == ((1, 2),) and found.steps[-1] == strategy.clock.train_iterations


# ------------------------------------------------------- heads without all units
@pytest.mark.usefixtures("cheap_pictures")
@pytest.mark.parametrize(
    "build",
    [
        lambda: Growing(IncrementalClassifier(8, 2)),
        lambda: Growing(IncrementalClassifier(8, 2, masking=False)),
        lambda: Growing(IncrementalClassifier(8, CLASSES)),  # all units, those not seen are masked
        lambda: FeatureClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), TaskwiseLinearHead(8)),
    ],
)
def test_tasks_without_units_are_not_measured(modern, tools, build):
    log, metric = tools.Collect(), TaskDynamics(modern.test_stream, every="experience")
    strategy = learner([metric], build=build, loggers=[log])
    for experience in modern.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(modern.test_stream)  # widens the output of some heads
    found = metric.result()
    assert found.steps.tolist() == [0, 4, 8, 12]
    known = ~np.isnan(found.loss)
    expected = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=bool)
    if build().head.__class__ is IncrementalClassifier and not build().head.masking:
        assert known[:, 0].all() and known[-1].all() and not known[0, 1:].any()  # grown by the evaluation
    else:
        np.testing.assert_array_equal(known, expected)
    np.testing.assert_array_equal(known, ~np.isnan(found.accuracy))
    assert np.nanmax(found.loss) < 50 and not found.diverged.any()
    assert [value for _, value in log.curve("dynamics/loss")] == found.mean_loss.tolist()


def test_a_head_without_any_unit_and_other_outputs():
    probes = TaskDynamics(pairs())
    probes.start(FeatureClassifier(nn.Flatten(), TaskwiseLinearHead(64)))
    assert np.isnan(probes.result().loss).all() and np.isnan(probes.result().mean_loss).all()
    with pytest.raises(TypeError, match="logits of shape"):
        TaskDynamics(pairs()).start(nn.Flatten(0))


@pytest.mark.usefixtures("cheap_pictures")
def test_divergence_is_told_apart_from_missing_units(modern, tools):
    class Break(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == 5:
                strategy.model[-1].weight.data.fill_(math.nan)

    log, metric = tools.Collect(), TaskDynamics(modern.test_stream, every=2)
    with pytest.warns(RuntimeWarning, match="from iteration 6 on") as caught:
        train(learner([metric], plugins=[Break()], loggers=[log]), modern.train_stream)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    found = metric.result()
    assert found.steps.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert found.diverged.all(1).tolist() == [False] * 3 + [True] * 4 and not found.diverged[:3].any()
    assert np.isnan(found.loss[3:]).all() and (found.accuracy[3:] == 0).all()
    assert [x for x, _ in log.curve("dynamics/loss")] == [0, 2, 4]
    assert all(math.isfinite(value) for _, _, value in log.values)


def test_one_diverged_task_does_not_spoil_the_others():
    class Picky(nn.Module):
        def forward(self, x):
            out = torch.zeros(len(x), CLASSES)
            out[x.flatten(1)[:, 0] > 1e3] = math.nan
            return out

    data = [(x.clone(), y) for x, y in pairs()]
    data[2][0][1] = 1e4
    probes = TaskDynamics(data)
    probes.start(Picky())
    found = probes.result()
    assert found.diverged[0].tolist() == [False, False, True, False, False, False]
    np.testing.assert_allclose(np.delete(found.loss[0], 2), math.log(CLASSES), atol=1e-6)


# --------------------------------------------------------------------- neutrality
def final_state(strategy):
    modes = {name: module.training for name, module in strategy.model.named_modules()}
    parts = [dict(strategy.model.state_dict()), modes, strategy.optimizer.state_dict(), capture_random_state()]
    gradients = {n: p.grad for n, p in strategy.model.named_parameters()}
    return to_plain([*parts, gradients])


@pytest.mark.usefixtures("cheap_pictures")
@pytest.mark.parametrize("every", [1, 3, "experience"])
def test_training_is_the_same_to_the_bit(stream, every):
    def run(metrics):
        return final_state(train(learner(metrics, epochs=2), stream.train_stream))

    metric = TaskDynamics(stream.test_stream, every=every)
    assert differing_state(run([]), run([metric])) is None
    assert len(metric.result().steps) >= 4


def test_nothing_of_a_model_is_touched_between_its_steps():
    model = convnet()
    model.train()
    model[1].eval()  # modes that differ
    model[0].requires_grad_(False)
    model(images_of(2, 0)[0]).sum().backward()

    def snapshot():
        parameters = {
            n: [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
            for n, p in model.named_parameters()
        }
        modes = {n: m.training for n, m in model.named_modules()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return to_plain([parameters, buffers, modes, capture_random_state(), torch.is_grad_enabled()])

    before, probes = snapshot(), TaskDynamics(pairs(), every=1)
    probes.start(model)
    probes.begin_block([0])
    probes.step(model)
    probes.end_block(model)
    probes.finish(model)
    assert differing_state(before, snapshot()) is None
    model[6].register_forward_pre_hook(lambda *_: 1 / 0)  # an error inside must not leave anything behind either
    probes.begin_block([1])
    with pytest.raises(ZeroDivisionError):
        probes.step(model)
    assert differing_state(before, snapshot()) is None


def test_noise_of_the_model_and_of_the_data_leaves_no_trace():
    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :CLASSES] + torch.rand(()) + random.random() + np.random.rand()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return torch.rand(1, 8, 8), 2

    before = to_plain(capture_random_state())
    probes = TaskDynamics([Data()])
    probes.start(Noisy())
    assert differing_state(before, to_plain(capture_random_state())) is None
    assert probes.probe.images.shape == (5, 1, 8, 8)


@pytest.mark.usefixtures("cheap_pictures")
def test_autocast_and_half_models(modern):
    metric = TaskDynamics(modern.test_stream, every=4)
    strategy = train(learner([metric], plugins=[MixedPrecisionPlugin("bf16")]), modern.train_stream)
    again = metric.probe.evaluate(strategy.model, torch.device("cpu"))
    assert again.dtype == torch.float32 and again[0].double().tolist() == metric.result().loss[-1].tolist()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric.probe.evaluate(strategy.model, torch.device("cpu")), again)
    double = metric.probe.evaluate(copy.deepcopy(strategy.model).double(), torch.device("cpu"))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), again)
    half = metric.probe.evaluate(strategy.model.bfloat16(), torch.device("cpu"))
    torch.testing.assert_close(half[0], again[0], atol=0.1, rtol=0.1)


# -------------------------------------------------------------------------- state
@pytest.mark.usefixtures("cheap_pictures")
@pytest.mark.parametrize("every", [1, 3, 100, "experience"])
def test_state_continues_to_the_same_values(modern, tools, every):
    options = {"every": every, "images_per_task": 4}

    class Replace(SupervisedPlugin):
        """A fresh metric after each iteration, which knows what stands in the state and nothing else."""

        def after_training_iteration(self, strategy, **kwargs):
            metric = strategy.evaluator.metrics[0]
            state = from_plain(copy.deepcopy(to_plain(metric.state_dict())))
            fresh = TaskDynamics(modern.test_stream, **options)
            fresh.load_state_dict(state)
            state["table"].zero_()  # an own copy
            assert differing_state(to_plain(fresh.state_dict()), to_plain(metric.state_dict())) is None
            metric.__dict__ = fresh.__dict__

    def run(plugins):
        log, metric = tools.Collect(), TaskDynamics(modern.test_stream, **options)
        train(learner([metric], loggers=[log], plugins=plugins), modern.train_stream)
        return log.values, metric.result().to_dict()

    expected = run([])
    assert run([Replace()]) == expected and len(expected[0]) > 3


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("cheap_pictures")
@pytest.mark.parametrize("at", [2, 6])  # in the first experience, in the second
def test_exact_resume_after_a_kill(modern, tools, tmp_path, at):
    def run(folder, at):
        log, metric = tools.Collect(), TaskDynamics(modern.test_stream, every=3)
        checkpoint = ExactCheckpointPlugin(folder, every=1)
        strategy = learner([metric], plugins=[Kill(at), checkpoint], loggers=[log])
        start = checkpoint.resume(strategy)
        try:
            for experience in modern.train_stream[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            return log.values, None
        finally:
            checkpoint.close()
        return log.values, metric.result().to_dict()

    whole, expected = run(tmp_path / "whole", -1)
    first, nothing = run(tmp_path / "killed", at)
    rest, found = run(tmp_path / "killed", -1)
    assert nothing is None and first + rest == whole and found == expected


def test_state_of_other_settings_is_refused():
    state = TaskDynamics(pairs()).state_dict()
    TaskDynamics(pairs()).load_state_dict(state)
    for options, name in (
        ({"every": 7}, "every"),
        ({"max_tasks": 3}, "task_ids"),
        ({"images_per_task": 2}, "sizes"),
        ({"tasks": pairs()[::-1]}, "labels"),
        ({"tasks": pairs()[:4]}, "tasks"),
    ):
        with pytest.raises(ValueError, match=f"another value of .*{name}"):
            TaskDynamics(**{"tasks": pairs(), **options}).load_state_dict(state)


# ------------------------------------------------------------------------- pictures
def test_tensorboard_receives_images_and_no_histograms(modern, tmp_path):
    metric = TaskDynamics(modern.test_stream, every=2)
    logger = TensorboardLogger(tmp_path)
    train(learner([metric], loggers=[logger]), modern.train_stream)
    logger.writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    names = {f"dynamics/{name}" for name in ("block-effect", "loss-map", "curves")}
    assert set(events.Tags()["images"]) == names and events.Tags()["histograms"] == []
    for name in names:
        (image,) = events.Images(name)
        assert image.step == 12 and image.width > 200 and image.encoded_image_string[:4] == b"\x89PNG"
    scalars = {f"dynamics/{name}" for name in ("loss", "accuracy", "learning", "interference", "synergy")}
    assert set(events.Tags()["scalars"]) == scalars
    assert [e.step for e in events.Scalars("dynamics/loss")] == [0, 2, 4, 6, 8, 10, 12]
    assert [e.step for e in events.Scalars("dynamics/learning")] == [4, 8, 12]


def test_the_figure_comes_first_and_can_be_switched_off(modern, tools):
    log = tools.Collect()
    strategy = learner([TaskDynamics(modern.test_stream)], loggers=[log])
    train(strategy, modern.train_stream)
    last = {name: value for name, _, value in log.values if name in ("dynamics/curves", "dynamics/block-effect")}
    assert [isinstance(value.alternatives[0], Figure) for value in last.values()] == [True, True]
    assert last["dynamics/block-effect"].alternatives[1].shape == (1, 3)  # eleven iterations share a block
    off = tools.Collect()
    train(learner([TaskDynamics(modern.test_stream, images=False)], loggers=[off]), modern.train_stream)
    names = {"loss", "accuracy", "learning", "interference", "synergy"}
    assert off.tags == {f"dynamics/{name}" for name in names}


@pytest.mark.usefixtures("cheap_pictures")
def test_it_works_beside_another_metric(modern, tools):
    log = tools.Collect()
    drift = RepresentationDrift(modern.test_stream, num_images=8, head_name="6")
    train(learner([drift, TaskDynamics(modern.test_stream)], loggers=[log]), modern.train_stream)
    assert {"drift/cka", "dynamics/loss"} <= log.tags


# ------------------------------------------------------------------------- arguments
def test_every_kind_of_tasks_is_read_alike(stream):
    experiences = list(stream.test_stream)
    items = [[e.dataset.eval()[i] for i in (0, 4, 9)] for e in experiences]  # of ten, evenly spread; 4.5 rounds to 4
    x = torch.cat([torch.stack([item[0] for item in task]) for task in items])
    y = torch.tensor([int(item[1]) for task in items for item in task])
    whole = [torch.stack([item[0] for item in e.dataset.eval()]) for e in experiences]
    labels = [torch.tensor([int(item[1]) for item in e.dataset.eval()]) for e in experiences]
    kinds = {
        "stream": stream.test_stream,
        "experiences": experiences,
        "data sets": [e.dataset for e in experiences],
        "tensors": list(zip(whole, labels, strict=True)),
        "tensor data sets": [torch.utils.data.TensorDataset(*pair) for pair in zip(whole, labels, strict=True)],
    }
    for kind, tasks in kinds.items():
        probe = TaskDynamics(tasks, images_per_task=3).probe
        assert torch.equal(probe.images, x) and torch.equal(probe.labels, y), kind
    some = TaskDynamics(kinds["tensors"], max_tasks=2)
    assert some.probe.ids == [0, 2] and some.task_names == ["0", "2"]
    whole[0].zero_()
    assert some.probe.images[0].abs().sum() > 0  # an own copy


def test_tasks_of_unequal_size_are_means_over_their_own_images():
    data = [(x[: n + 1], y[: n + 1]) for n, (x, y) in enumerate(pairs(6))]
    probes, model = TaskDynamics(data, images_per_task=4, batch_size=3), convnet()
    probes.start(model)
    assert probes.probe.sizes == [1, 2, 3, 4, 4, 4]
    for task, (x, y) in enumerate(data):
        rows = [round(i * task / (min(task, 3) or 1)) for i in range(min(task + 1, 4))]
        loss, accuracy = by_hand(model, x[rows], y[rows])
        assert probes.result().loss[0, task] == pytest.approx(loss, abs=1e-6)
        assert probes.result().accuracy[0, task] == pytest.approx(accuracy)


def test_evaluation_transforms_are_applied():
    from avalanche.benchmarks.utils import as_classification_dataset

    x, y = images_of(2, 0)
    data = torch.utils.data.TensorDataset(x, y)
    data.targets = y.tolist()
    both = as_classification_dataset(data, transform_groups={"train": lambda x: x * 0, "eval": lambda x: x * 2})
    assert torch.equal(TaskDynamics([both.train()], images_per_task=99).probe.images, x * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every"),
        ({"every": "epoch"}, "every"),
        ({"every": 2.0}, "every"),
        ({"every": True}, "every"),
        ({"max_tasks": 0}, "max_tasks"),
        ({"images_per_task": 0}, "images_per_task"),
        ({"batch_size": 0.5}, "batch_size"),
        ({"task_names": ["a"]}, "task_names"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": [(torch.zeros(0, 3), torch.zeros(0).long())]}, r"tasks\[0\].*no images"),
        ({"tasks": [(torch.zeros(2, 3), torch.zeros(2))]}, "integer labels"),
        ({"tasks": [(torch.zeros(2, 3), torch.zeros(3).long())]}, "integer labels"),
        ({"tasks": [(torch.zeros(2, 3).byte(), torch.zeros(2).long())]}, "float tensors"),
        ({"tasks": [(torch.zeros(2, 3), torch.tensor([0, -1]))]}, "label -1"),
        ({"tasks": [(torch.zeros(2, 3), torch.zeros(2).long()), (torch.zeros(2, 4), torch.zeros(2).long())]}, "shapes"),
        ({"tasks": [[(torch.zeros(3), 0), (torch.zeros(4), 0), (torch.zeros(3), 0)]]}, "one shape"),
        ({"tasks": [[("a", 0), ("b", 0), ("c", 0)]]}, "one shape"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TaskDynamics(**{"tasks": pairs(), **change})


def test_calls_in_another_order_are_refused(tools):
    probes, model = TaskDynamics(pairs()), convnet()
    for call in (
        lambda: probes.result(),
        lambda: probes.begin_block(0),
        lambda: probes.step(model),
        lambda: probes.end_block(model),
        lambda: probes.finish(model),
    ):
        with pytest.raises(RuntimeError, match="comes"):
            call()
    probes.start(model, "cpu", iteration=7)
    with pytest.raises(RuntimeError, match="called before"):
        probes.start(model)
    with pytest.raises(ValueError, match="0 to 5"):
        probes.begin_block(6)
    probes.begin_block([])
    for call in (lambda: probes.begin_block(1), lambda: probes.finish(model)):
        with pytest.raises(RuntimeError, match="comes"):
            call()
    probes.step(model, iterations=250)
    probes.end_block(model)
    assert probes.result().steps.tolist() == [7, 257] and probes.result().block_tasks == ((),)
    assert str(probes) == "TaskDynamics"
    probes.reset()
    assert len(probes.result().steps) == 2
    with pytest.raises(ValueError, match="single-task"):
        TaskDynamics(pairs()).start(as_multitask(Growing(nn.Linear(8, CLASSES)), "head"))


def test_a_multi_task_model_stops_the_run_before_a_step(tools):
    bench = tools.benchmark("classic")
    strategy = learner([TaskDynamics(bench.test_stream)], build=lambda: as_multitask(Growing(nn.Linear(8, 6)), "head"))
    with pytest.raises(ValueError, match="needs task labels"):
        train(strategy, bench.train_stream[:1])
    assert strategy.clock.train_iterations == 0
