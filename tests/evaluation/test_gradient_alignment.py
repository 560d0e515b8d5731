"""Gradients, applied updates and second moments against numbers of PyTorch's own autograd, and loops over samples."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional

from avalanche_firn.evaluation.gradient_alignment import (
    AppliedUpdate,
    GradientAlignment,
    gradient_alignment,
    second_moment_vs_fisher,
)
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

CLASSES = 6


def images_of(count, seed, dtype=torch.float32):
    """``count`` of each class: (x (n, 1, 8, 8), y)."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.arange(CLASSES).repeat_interleave(count)
    noise = torch.randn(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (patterns[y] + 0.7 * noise).to(dtype), y


def batches(count=4, seed=1, dtype=torch.float64):
    x, y = images_of(count, seed, dtype)
    return [(x[y == c], y[y == c]) for c in range(CLASSES)]


@pytest.fixture
def modern(stream_of):
    return stream_of(*images_of(7, 0), [2, 2, 2], *images_of(5, 1))


def convnet(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(36, CLASSES)).to(dtype)
    return model


def gradient_by_hand(model, x, y, names=None):
    """Flat gradient of a copy in evaluation mode, through ``backward``."""
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    chosen = [p for n, p in model.named_parameters() if names is None or n in names]
    return float(loss.detach()), torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen]
    )


def flat(mapping):
    return torch.cat([value.detach().flatten() for value in mapping.values()])


# ----------------------------------------------------------------------- golden
def test_golden_numbers_of_alignment(golden):
    g = golden("zapping", "gradient_alignment")
    tasks = int(g["n_tasks"])
    data = [(torch.from_numpy(g[f"x{j}"]), torch.from_numpy(g[f"y{j}"])) for j in range(tasks)]
    model = nn.Linear(5, 4).double()
    initial = {"weight": torch.from_numpy(g["weight"]), "bias": torch.from_numpy(g["bias"])}
    model.load_state_dict(initial)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(g["lr"]))

    def step(task):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[task][0]), data[task][1]).backward()
        optimizer.step()

    for _ in range(int(g["warm_steps"])):
        step(tasks - 1)
        model.load_state_dict(initial)  # parameters put back, moments kept
    with AppliedUpdate(model) as applied:
        step(0)
    np.testing.assert_allclose(flat(applied.update), g["applied_update"], atol=1e-12, rtol=0)
    found = gradient_alignment(model, data, update=applied.update, parameters=applied.before)
    for name, key, tolerance in (
        ("loss", "loss", 1e-9),
        ("cosine", "cosine", 1e-9),
        ("predicted_change", "predicted_change", 1e-9),
        ("cosine_update", "cosine_update", 1e-6),
    ):
        np.testing.assert_allclose(getattr(found, name), g[key], atol=tolerance, rtol=0, err_msg=name)
    np.testing.assert_allclose(found.norm, np.linalg.norm(g["task_gradients"], axis=1), atol=1e-9, rtol=0)
    snapshots = (applied.before, dict(model.named_parameters()))
    pair = gradient_alignment(model, data, update=snapshots, parameters=applied.before)
    assert torch.equal(pair.predicted_change, found.predicted_change)
    after = gradient_alignment(model, data).loss
    np.testing.assert_allclose(after - found.loss, g["real_change"], atol=1e-12, rtol=0)
    np.testing.assert_allclose(found.predicted_change, after - found.loss, rtol=0.003)


# ----------------------------------------------------------------------- oracle
@pytest.mark.parametrize("numbers", [1, 130, 700, 2**27])  # one task at a time, in groups, all at once
def test_alignment_against_backward_in_any_grouping(numbers):
    model, data = convnet(), batches()
    update = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double()
        for n, p in model.named_parameters()
    }
    found = gradient_alignment(model, data, update=update, max_numbers=numbers)
    losses, gradients = zip(*(gradient_by_hand(model, x, y) for x, y in data), strict=True)
    u = flat(update)
    assert found.loss.tolist() == pytest.approx(losses, abs=1e-12)
    for i, g in enumerate(gradients):
        assert float(found.norm[i]) == pytest.approx(float(g.norm()), abs=1e-12)
        assert float(found.predicted_change[i]) == pytest.approx(float(g @ u), abs=1e-10)
        assert float(found.cosine_update[i]) == pytest.approx(float(-(g @ u) / g.norm() / u.norm()), abs=1e-12)
        for j, h in enumerate(gradients):
            assert float(found.cosine[i, j]) == pytest.approx(float(g @ h / g.norm() / h.norm()), abs=1e-12)
    assert torch.equal(found.cosine, found.cosine.T)
    assert all(t.dtype == torch.float64 for t in vars(found).values())


def test_a_step_of_sgd_is_straight_down_for_its_own_batch():
    model, data = convnet(), batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.eval()
    with AppliedUpdate(model) as applied:
        functional.cross_entropy(model(data[2][0]), data[2][1]).backward()
        optimizer.step()
    found = gradient_alignment(model, data, update=applied.update, parameters=applied.before)
    assert float(found.cosine_update[2]) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found.predicted_change, -1e-4 * found.cosine[2] * found.norm[2] * found.norm, rtol=1e-8)
    real = gradient_alignment(model, data).loss - found.loss
    np.testing.assert_allclose(found.predicted_change, real, rtol=0.02, atol=1e-6)


def test_ignored_and_frozen_parameters_are_left_out():
    model, data = convnet(), batches()
    model[6].weight.requires_grad_(False)
    names = ["0.weight", "1.weight", "1.bias", "6.bias"]
    found = gradient_alignment(model, data, ignore=["0.bias"])
    gradients = [gradient_by_hand(copy.deepcopy(model).requires_grad_(True), x, y, names)[1] for x, y in data]
    np.testing.assert_allclose(found.norm, [float(g.norm()) for g in gradients], atol=1e-12)
    applied = AppliedUpdate(model, ignore="0.bias")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad  # frozen ones stay
    update = applied.difference()
    assert list(update) == names and set(applied.before) == {*names, "0.bias"}
    assert all(torch.allclose(change, torch.ones_like(change)) for change in update.values())
    found = gradient_alignment(model, data, update=update, ignore=["0.bias"], parameters=applied.before)
    np.testing.assert_allclose(found.predicted_change, [float(g.sum()) for g in gradients], atol=1e-12)


def test_dead_biases_have_no_gradient_and_can_be_ignored():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(144, CLASSES)
    ).double()
    every, alive = (gradient_alignment(model, batches(), ignore=names) for names in ([], ["0.bias"]))
    torch.testing.assert_close(every.cosine, alive.cosine, atol=1e-9, rtol=0)


def test_undefined_cosines_are_nan():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, CLASSES), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1)) * (x.flatten(1)[:, :1] < 100)

    data = batches()[:2]
    data[1] = (data[1][0] + 1e4, data[1][1])  # no gradient at all
    model = Half().double()
    update = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    found = gradient_alignment(model, data, update=update)
    assert found.norm[1] == 0 and found.cosine.isnan().tolist() == [[False, True], [True, True]]
    assert found.cosine_update.isnan().all() and found.predicted_change.tolist() == [0, 0]


def test_half_precision_and_float32():
    model, data = convnet(torch.float32), batches(dtype=torch.float32)
    single = gradient_alignment(model, data)
    double = gradient_alignment(model.double(), batches(dtype=torch.float64))
    torch.testing.assert_close(single.cosine, double.cosine, atol=1e-5, rtol=0)
    half = gradient_alignment(model.bfloat16(), [(x.bfloat16(), y) for x, y in data])
    torch.testing.assert_close(half.cosine, double.cosine, atol=0.1, rtol=0)


# ------------------------------------------------------------------- neutrality
def snapshot(model):
    parameters = {
        n: [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
        for n, p in model.named_parameters()
    }
    modes = {n: m.training for n, m in model.named_modules()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return to_plain([parameters, buffers, modes, capture_random_state(), torch.is_grad_enabled()])


def test_nothing_of_a_model_is_touched():
    model, data = convnet(), batches()
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    model(data[0][0]).sum().backward()
    optimizer.step()
    fired = []
    model[6].weight.register_hook(lambda g: fired.append(1))
    ids = {n: id(p) for n, p in model.named_parameters()}
    before, state = snapshot(model), to_plain(copy.deepcopy(optimizer.state_dict()))
    applied = AppliedUpdate(model)
    with torch.no_grad():
        gradient_alignment(model, data, update=applied.difference(), parameters=applied.before)
        gradient_alignment(model, data)
    second_moment_vs_fisher(optimizer, model, *data[0], chunk_size=3)
    assert differing_state(before, snapshot(model)) is None and not fired
    assert differing_state(state, to_plain(optimizer.state_dict())) is None
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    model[6].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradient_alignment(model, data)
    with pytest.raises(ZeroDivisionError):
        second_moment_vs_fisher(optimizer, model, *data[0])
    assert differing_state(before, snapshot(model)) is None


# ----------------------------------------------------------------------- metric
def learner(metrics, *, build=lambda: convnet(torch.float32), plugins=(), loggers=(), lr=1e-2):
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
        train_mb_size=4,
        train_epochs=1,
        plugins=[*plugins],
        evaluator=evaluator,
    )


def train(strategy, experiences):
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
    return strategy


class Copies(SupervisedPlugin):
    """Copies of the model right before and right after each step of the optimizer."""

    def __init__(self):
        super().__init__()
        self.old, self.new = {}, {}

    def before_update(self, strategy, **kwargs):
        self.old[int(strategy.clock.train_iterations) + 1] = copy.deepcopy(strategy.model)

    def after_update(self, strategy, **kwargs):
        self.new[int(strategy.clock.train_iterations) + 1] = copy.deepcopy(strategy.model)


def test_metric_equals_recomputation_from_copies(modern, tools):
    log, copies = tools.Collect(), Copies()
    metric = GradientAlignment(modern.test_stream, every=2, images_per_task=4, ignore=["0.bias"])
    train(learner([metric], plugins=[copies], loggers=[log]), modern.train_stream)
    found = metric.result()
    assert found.steps.tolist() == [2, 4, 6, 8, 10, 12] and found.current == ((0,), (0,), (1,), (1,), (2,), (2,))
    names = [n for n, _ in copies.old[2].named_parameters() if n != "0.bias"]
    expected = {"current": [], "past": [], "change": []}
    for m, step in enumerate(found.steps.tolist()):
        before, after = copies.old[step], copies.new[step]
        new, old = dict(after.named_parameters()), dict(before.named_parameters())
        u = flat({n: new[n] - old[n] for n in names}).double()
        cosines, changes = [], []
        for task, experience in enumerate(modern.test_stream):
            data = experience.dataset.eval()
            items = [data[i] for i in (0, 3, 6, 9)]
            x, y = torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])
            loss, g = gradient_by_hand(before, x, y, names)
            g = g.double()
            cosines.append(float(-(g @ u) / g.norm() / u.norm()))
            changes.append(float(g @ u))
            assert found.loss[m, task] == pytest.approx(loss, abs=1e-5)
            assert found.norm[m, task] == pytest.approx(float(g.norm()), rel=1e-4)
        np.testing.assert_allclose(found.cosine_update[m], cosines, atol=1e-5)
        np.testing.assert_allclose(found.predicted_change[m], changes, atol=1e-6)
        now = found.current[m][0]
        expected["current"].append((step, pytest.approx(cosines[now], abs=1e-5)))
        if now:
            expected["past"].append((step, pytest.approx(np.mean(cosines[:now]), abs=1e-5)))
            expected["change"].append((step, pytest.approx(np.mean(changes[:now]), abs=1e-6)))
    assert log.curve("dynamics/update-cosine/current") == expected["current"]
    assert log.curve("dynamics/update-cosine/past") == expected["past"]
    assert log.curve("dynamics/predicted-change-past") == expected["change"]
    assert log.tags == {
        "dynamics/update-cosine/current",
        "dynamics/update-cosine/past",
        "dynamics/predicted-change-past",
    }
    assert found.cosine.shape == (6, 3, 3)
    np.testing.assert_allclose(found.mean_cosine(), found.cosine.mean(0), atol=1e-12)
    image = found.figure().axes[0].images[0]
    np.testing.assert_allclose(image.get_array().filled(math.nan), found.mean_cosine())


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_to_the_bit(modern, every):
    def run(metrics):
        strategy = train(learner(metrics), modern.train_stream)
        return to_plain([snapshot(strategy.model), strategy.optimizer.state_dict()])

    metric = GradientAlignment(modern.test_stream, every=every)
    assert differing_state(run([]), run([metric])) is None
    assert len(metric.result().steps) == 12 // every


def test_tasks_without_units_are_nan(modern, tools):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Flatten(), IncrementalClassifier(64, CLASSES)

        def forward(self, x):
            return self.head(self.body(x))

    log, metric = tools.Collect(), GradientAlignment(modern.test_stream, every=4, max_tasks=2)
    train(learner([metric], build=Growing, loggers=[log]), modern.train_stream)
    found = metric.result()
    assert found.task_ids == (0, 2)
    assert np.isnan(found.predicted_change).tolist() == [[False, True], [False, True], [False, False]]
    assert np.isnan(found.mean_cosine()).sum() == 0
    assert [x for x, _ in log.curve("dynamics/update-cosine/current")] == [4, 12]  # task 1 is not looked at
    assert [x for x, _ in log.curve("dynamics/update-cosine/past")] == [8, 12]
    nothing = GradientAlignment(modern.test_stream, every=50).result()
    assert nothing.cosine.shape == (0, 3, 3) and np.isnan(nothing.mean_cosine()).all()


def test_state_continues_to_the_same_values(modern, tools):
    class Replace(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            metric = strategy.evaluator.metrics[0]
            fresh = GradientAlignment(modern.test_stream, every=3)
            fresh.load_state_dict(from_plain(copy.deepcopy(to_plain(metric.state_dict()))))
            assert differing_state(to_plain(fresh.state_dict()), to_plain(metric.state_dict())) is None
            metric.__dict__ = fresh.__dict__

    def run(plugins):
        log, metric = tools.Collect(), GradientAlignment(modern.test_stream, every=3)
        train(learner([metric], loggers=[log], plugins=plugins), modern.train_stream)
        return log.values, to_plain(metric.state_dict())

    values, state = run([])
    again, other = run([Replace()])
    assert again == values and len(values) == 10 and differing_state(state, other) is None
    for options, name in (({"every": 4}, "every"), ({"ignore": ["0.bias"]}, "ignore"), ({"max_tasks": 2}, "task_ids")):
        with pytest.raises(ValueError, match=f"another value of .*{name}"):
            GradientAlignment(modern.test_stream, **{"every": 3, **options}).load_state_dict(from_plain(state))


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


def test_exact_resume_after_a_kill(modern, tools, tmp_path):
    def run(folder, at):
        log, metric = tools.Collect(), GradientAlignment(modern.test_stream, every=2)
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
        return log.values, to_plain(metric.state_dict())

    whole, expected = run(tmp_path / "whole", -1)
    first, _ = run(tmp_path / "killed", 6)
    rest, found = run(tmp_path / "killed", -1)
    assert first + rest == whole and differing_state(expected, found) is None


def test_trouble_at_the_start_stops_the_run_before_a_step(modern, tools, stream_of):
    strategy = learner([GradientAlignment(modern.test_stream, ignore=["0.bias", "conv.bias"])])
    with pytest.raises(ValueError, match=r"conv\.bias"):
        train(strategy, modern.train_stream)
    assert strategy.clock.train_iterations == 0
    with pytest.raises(ValueError, match="task_of"):
        train(learner([GradientAlignment(modern.test_stream)]), stream_of(*images_of(7, 0), [6]).train_stream)
    metric = GradientAlignment(modern.test_stream, every=5, task_of=lambda experience: [0, 2])
    train(learner([metric]), stream_of(*images_of(7, 0), [6]).train_stream)
    assert metric.result().current == ((0, 2), (0, 2)) and str(metric) == "GradientAlignment"


# -------------------------------------------------------------- second moments
def stepped(model, x, y, steps=400, betas=(0.9, 0.99), kind=torch.optim.Adam):
    """An Adam of rate 0 that went through single samples: its second moment is an average at fixed parameters."""
    optimizer = kind(model.parameters(), lr=0.0, betas=betas)
    model.eval()
    for step in range(steps):
        i = step % len(y)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        optimizer.step()
    return optimizer


def fisher_by_hand(model, x, y):
    total = 0.0
    for image, label in zip(x, y, strict=True):
        total = total + gradient_by_hand(model, image[None], label[None])[1] ** 2
    return total / len(y)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_second_moment_against_a_loop_over_samples(chunk):
    model, (x, y) = convnet(), images_of(3, 2, torch.float64)
    optimizer = stepped(model, x, y, steps=37)
    found = second_moment_vs_fisher(optimizer, model, x, y, chunk_size=chunk)
    f = fisher_by_hand(model, x, y)
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]) / (1 - 0.99**37)
    assert found.cosine == pytest.approx(float(v @ f / v.norm() / f.norm()), abs=1e-12)
    assert found.scale_ratio == pytest.approx(float(v.sum() / f.sum()), abs=1e-12)
    both = (v > 0) & (f > 0)
    expected = np.corrcoef(v[both].log(), f[both].log())[0, 1]
    assert found.log_correlation == pytest.approx(expected, abs=1e-9)
    assert list(found.per_parameter) == [n for n, _ in model.named_parameters()]
    part = found.per_parameter["6.bias"]
    assert part.cosine == pytest.approx(float(v[-6:] @ f[-6:] / v[-6:].norm() / f[-6:].norm()), abs=1e-12)
    assert part.per_parameter == {}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_at_batch_size_one_the_moment_is_the_fisher_diagonal(kind):
    """With a horizon far beyond the samples and parameters that stand still the two agree."""
    model, (x, y) = convnet(), images_of(2, 2, torch.float64)
    optimizer = stepped(model, x, y, steps=120, betas=(0.9, 0.999999), kind=kind)
    found = second_moment_vs_fisher(optimizer, model, x, y)
    assert found.cosine > 1 - 1e-6 and found.log_correlation > 1 - 1e-6
    assert found.scale_ratio == pytest.approx(1, abs=1e-3)
    other = second_moment_vs_fisher(optimizer, model, *images_of(2, 77, torch.float64))
    assert other.cosine < found.cosine


def test_with_larger_batches_it_is_not():
    model, (x, y) = convnet(), images_of(2, 2, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model.eval()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert second_moment_vs_fisher(optimizer, model, x, y).scale_ratio < 0.5


def test_moments_that_cannot_be_compared_are_refused():
    model, (x, y) = convnet(), images_of(1, 2, torch.float64)
    for kind in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax):
        optimizer = kind(model.parameters(), lr=0.0)
        model(x).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match=f"{kind.__name__} keeps no exp_avg_sq"):
            second_moment_vs_fisher(optimizer, model, x, y)
    with pytest.raises(ValueError, match="keeps no exp_avg_sq"):
        second_moment_vs_fisher(torch.optim.SGD(model.parameters(), lr=0.1), model, x, y)
    with pytest.raises(ValueError, match=r"never stepped .*0\.weight"):
        second_moment_vs_fisher(torch.optim.Adam(model.parameters()), model, x, y)
    part = torch.optim.Adam(model[6].parameters(), lr=0.0)
    part.step()
    with pytest.raises(ValueError, match=r"does not hold \['0.weight'"):
        second_moment_vs_fisher(part, model, x, y)
    rest = [n for n, _ in model.named_parameters() if not n.startswith("6.")]
    assert list(second_moment_vs_fisher(part, model, x, y, ignore=rest).per_parameter) == ["6.weight", "6.bias"]
    for images, labels in ((x, y[:1]), (x[:0], y[:0]), (y, y)):
        with pytest.raises(ValueError, match="images and labels"):
            second_moment_vs_fisher(part, model, images, labels)
    with pytest.raises(ValueError, match="chunk_size"):
        second_moment_vs_fisher(part, model, x, y, chunk_size=0)


def test_a_moment_of_zero_has_no_cosine():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).double(), images_of(1, 2, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = second_moment_vs_fisher(optimizer, model, x, y)
    assert math.isnan(found.cosine) and math.isnan(found.log_correlation) and found.scale_ratio == 0


# ----------------------------------------------------------------------- errors
def test_applied_update_outside_its_block():
    model = convnet()
    applied = AppliedUpdate(model)
    with pytest.raises(RuntimeError, match="difference"):
        _ = applied.update
    with pytest.raises(ZeroDivisionError), applied:
        _ = 1 / 0
    with pytest.raises(RuntimeError):
        _ = applied.update
    model[6] = nn.Linear(36, CLASSES + 1).double()
    with pytest.raises(ValueError, match=r"6\.weight"):
        applied.difference()
    applied.snapshot()
    assert all(not u.any() for u in applied.difference().values())


MODEL = convnet()
WHOLE = {n: torch.zeros_like(p) for n, p in MODEL.named_parameters()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches"),
        ({"batches": [(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())]}, ValueError, "batches"),
        ({"ignore": ["nothing"]}, ValueError, "nothing"),
        ({"ignore": list(WHOLE)}, ValueError, "leaves no trained parameter"),
        ({"update": {n: u for n, u in WHOLE.items() if n != "6.bias"}}, ValueError, r"update: 6.bias \(missing\)"),
        ({"update": {**WHOLE, "6.bias": torch.zeros(2)}}, ValueError, r"update: 6.bias \(\(2,\), parameter \(6,\)\)"),
        ({"update": (WHOLE, {})}, ValueError, "update"),
        ({"update": [WHOLE]}, TypeError, "update"),
        ({"parameters": {}}, ValueError, "parameters"),
        ({"max_numbers": 0}, ValueError, "max_numbers"),
        ({"model": as_multitask(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), "1")}, ValueError, "task labels"),
    ],
)
def test_impossible_arguments_are_refused(change, error, message):
    arguments = {"model": MODEL, "batches": batches(1), **change}
    with pytest.raises(error, match=message):
        gradient_alignment(arguments.pop("model"), arguments.pop("batches"), **arguments)


@pytest.mark.parametrize("change", [{"every": 0}, {"max_tasks": 0}, {"images_per_task": 0.5}, {"batch_size": 0}])
def test_impossible_settings_of_the_metric_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GradientAlignment(batches(1), **change)
