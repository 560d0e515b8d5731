"""Choice of pairs; the metric on streams and in runs that are out of the ordinary."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_firn.evaluation.contrastive_bound import loss_ceiling
from avalanche_firn.evaluation.contrastive_pairs import HeldOutPairs
from avalanche_firn.evaluation.contrastive_report import BOUNDS, ContrastiveBound

SMALL = {"negatives": 3, "pairs_per_task": 20, "pool_per_task": 12}


# -------------------------------------------------------------------------- pairs
def rising(row):
    """Whether every bound that exists lies above the one before, and all above the measured loss."""
    values = [row["measured"], *(row[name] for name in BOUNDS if row[name] is not None)]
    return all(b - a >= -1e-9 for a, b in itertools.pairwise(values))


def experience_of(targets, value=None):
    targets = list(targets)
    images = [torch.full((1, 2, 2), float(i if value is None else value)) for i in range(len(targets))]

    class Data(torch.utils.data.Dataset):
        def __init__(self):
            self.targets = targets

        def __len__(self):
            return len(targets)

        def __getitem__(self, index):
            return images[index], targets[index], 0

        def eval(self):
            return self

    return SimpleNamespace(dataset=Data())


def test_pairs_are_what_they_should_be():
    rng = np.random.default_rng(0)
    targets = [*rng.integers(0, 3, 30).tolist(), 9]  # 9 is alone: a negative, never an anchor
    tasks = [experience_of(targets), experience_of([5, 5, 6])]
    held_out = HeldOutPairs(tasks, negatives=4, pairs=70, pool=8, seed=0)
    for task, experience in enumerate(tasks):
        pairs, y = held_out.pairs[task], np.asarray(experience.dataset.targets)
        assert pairs.shape == (70, 6)
        assert (pairs[:, 0] != pairs[:, 1]).all() and (y[pairs[:, 0]] == y[pairs[:, 1]]).all()
        assert (y[pairs[:, 2:]] != y[pairs[:, :1]]).all()
    counts = np.bincount(held_out.pairs[0][:, 0], minlength=31)
    assert counts[30] == 0 and set(counts[:30]) == {2, 3}
    assert (held_out.pairs[0][:, 2:] == 30).any()
    assert set(held_out.pairs[1][:, 0]) == {0, 1}
    assert [len(pool) for pool in held_out.pools] == [8, 3]
    labels = held_out.pool_labels([0, 1]).tolist()
    assert sorted(labels[:8].count(i) for i in set(labels[:8])) == [1, 2, 2, 3] and not {*labels[:8]} & {*labels[8:]}


def test_pool_of_many_classes_still_has_positives():
    held_out = HeldOutPairs([experience_of(np.repeat(range(20), 5))], negatives=1, pairs=1, pool=10, seed=3)
    labels = held_out.pool_labels([0])
    assert torch.bincount(labels).tolist() == [2] * 5 and len({*held_out.pools[0].tolist()}) == 10


def test_choice_depends_on_seed_and_task_only():
    tasks = [experience_of([0, 0, 1, 1, 2, 2] * 3), experience_of([0, 0, 1, 1, 2, 2] * 3)]

    def chosen(tasks, seed):
        found = HeldOutPairs(tasks, negatives=2, pairs=9, pool=6, seed=seed)
        return [found.pairs[0].tolist(), found.pools[0].tolist(), found.pairs[len(tasks) - 1].tolist()]

    first = chosen(tasks, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert chosen(tasks, 0) == first and chosen(tasks[:1], 0)[:2] == first[:2]
    assert chosen(tasks, 1)[0] != first[0] != first[2]


def test_equal_labels_of_different_tasks_are_different_classes():
    held_out = HeldOutPairs([experience_of([0, 0, 1, 1])] * 2, negatives=1, pairs=4, pool=4, seed=0)
    labels = held_out.pool_labels([0, 1])
    assert torch.bincount(labels).tolist() == [2, 2, 2, 2]


# ------------------------------------------------------------------ special streams
def play(metric, model, tasks, coefficients=(None, 1.0, 2.0, 2.0), count=None):
    """The hooks as a strategy would call them."""
    plugin = SimpleNamespace(teacher=None, temperature=0.5, coefficients=[])
    strategy = SimpleNamespace(plugins=[plugin], model=model, device="cpu")
    whole = [None] * (len(metric.stream) if count is None else count)
    tags = []
    for i, task in enumerate(tasks):
        origin = type("Origin", (list,), {"name": "train"})(whole)
        strategy.experience = SimpleNamespace(current_experience=task, origin_stream=origin)
        plugin.coefficients.append(coefficients[i])
        metric.before_training_exp(strategy)
        model.step = i
        tags.append({value.name: (value.x_plot, value.value) for value in metric.after_training_exp(strategy)})
    return tags


class Toy(nn.Module):
    """Projections that depend on the number of tasks trained."""

    step = 0

    def project(self, x):
        angle = x.flatten(1).mean(1) * (1 + self.step)
        return torch.stack([angle.cos(), angle.sin()], 1)


def test_transforms_that_draw_give_the_same_images_to_every_model():
    experience = experience_of([0, 0, 1, 1, 2, 2])
    plain = type(experience.dataset).__getitem__
    noisy = type("Noisy", (type(experience.dataset),), {"__getitem__": lambda self, i: noise(plain(self, i))})
    experience.dataset.__class__ = noisy

    def noise(item):
        return (item[0] + torch.rand(1) + np.random.rand(), *item[1:])

    held_out = HeldOutPairs([experience], negatives=2, pairs=8, pool=4, seed=0)
    first = held_out.observe(Toy(), 0, batch_size=4)
    torch.rand(3)
    for values, other in zip(first, held_out.observe(Toy(), 0, batch_size=4), strict=True):
        assert torch.equal(values, other)


def test_tasks_without_pairs_have_no_weight():
    tasks = [experience_of([0, 0, 0]), experience_of([1, 1, 2]), experience_of([3, 4]), experience_of([5, 5, 6, 6])]
    with pytest.warns(RuntimeWarning, match=r"task 0 has one class, so no negatives; task 2 has one image of each"):
        metric = ContrastiveBound(tasks, **SMALL)
    assert [*metric.skipped] == [0, 2]
    tags = play(metric, Toy(), range(4))
    rows, alpha = metric.result(), loss_ceiling(0.5, 3)
    assert {*tags[0]} == {"cila/bound/ceiling"} and [row["weight"] for row in rows] == [0, 1, 0, 1]
    assert rows[1]["chained"] == rows[1]["training_loss"] == rows[1]["measured"] and rows[1]["one_step"] is None
    assert rows[2]["contrastive_new"] is None and rows[2]["measured"] is not None
    bound = alpha * rows[1]["measured"] + rows[2]["old_distillation"]
    assert rows[2]["chained"] == pytest.approx(bound) == rows[2]["one_step"] == rows[2]["training_loss"]
    for row in rows[1:]:
        assert rising(row)
    assert rows[1]["certificate_loss"] is not None  # the pool is that of all earlier tasks
    assert "task 1 is left out of the bounds: it has one class, so no negatives" in metric.summary_lines()
    with pytest.raises(ValueError, match=r"stream: task 0 has one class.*accepted"):
        ContrastiveBound(tasks[:1])
    with pytest.raises(ValueError, match="stream: it is empty"):
        ContrastiveBound([])
    with pytest.raises(ValueError, match="stream: experience 1 has no images"):
        ContrastiveBound([tasks[1], experience_of([])])


def test_order_of_training_counts_and_repeated_tasks_change_no_weight():
    tasks = [experience_of([2 * i, 2 * i, 2 * i + 1, 2 * i + 1]) for i in range(3)]
    metric = ContrastiveBound(tasks, **SMALL)
    tags = play(metric, Toy(), [2, 0, 2, 1])
    rows = metric.result()
    assert [row["task"] for row in rows] == [2, 0, 2, 1] and [row["tasks"] for row in rows] == [1, 2, 2, 3]
    assert [{x for x, _ in values.values()} for values in tags] == [{0}, {1}, {2}, {3}]
    for row in rows:
        assert rising(row)


def test_bounds_that_do_not_exist():
    tasks = [experience_of([0, 0, 1, 1])] * 3
    metric = ContrastiveBound(tasks, **SMALL)
    tags = play(metric, Toy(), range(3), coefficients=[None, 0.0, 1.0])
    rows = metric.result()
    assert [row["training_loss"] is None for row in rows] == [False, True, True]
    assert "training_loss" in rows[1]["vacuous"] and rows[1]["gamma"] == 0 and "cila/bound/training-loss" not in tags[1]
    assert "the training-loss bound (infinite) is vacuous" in " ".join(metric.summary_lines())
    unknown = ContrastiveBound(tasks, **SMALL)
    play(unknown, Toy(), range(2), coefficients=[None, None])
    row = unknown.result()[1]
    assert row["training_loss"] is None and row["gamma"] is None and "training_loss" not in row["vacuous"]
    assert row["chained"] is not None and "the training-loss bound is not defined" in " ".join(unknown.summary_lines())


def test_diverged_weights_leave_values_out_and_the_run_goes_on():
    metric, model = ContrastiveBound([experience_of([0, 0, 1, 1])] * 3, **SMALL), Toy()
    project = model.project
    model.project = lambda x: project(x) * (math.nan if model.step == 1 else 1)
    with pytest.warns(RuntimeWarning, match="after experience 1: left out, as not finite: contrastive_new, measured"):
        tags = play(metric, model, range(2))
    assert {*tags[1]} == {"cila/bound/ceiling"}
    row = metric.result()[1]
    assert row["vacuous"] == [] and row["measured"] is None
    json.dumps(metric.result(), allow_nan=False)
