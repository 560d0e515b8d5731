"""Snapshots: what is stored and what is dropped, over a stream and by hand; training unchanged; exact resume."""

import copy
import random

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

from avalanche_firn.evaluation.landscape_math import pca_directions
from avalanche_firn.evaluation.trajectory import Trajectory, chosen_parameters
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

SIZE = 6 * 8 + 8  # numbers of the encoder


def network(head=None):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2)))
    model.add_module("head", nn.Linear(8, 4) if head is None else head)
    return model


def learner(plugins, model=None):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = network() if model is None else model
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=1,
        eval_mb_size=32,
        plugins=[*plugins],
        evaluator=EvaluationPlugin(collect_all=False),
    )


@pytest.fixture
def two_tasks(stream):
    """Two experiences of 24 samples, three iterations each."""
    return stream((2, 2), dtype=torch.float32).train_stream


class Copies(SupervisedPlugin):
    """Copies of the model after every iteration and, first, of its start."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.states = {}

    def before_training_exp(self, strategy, **kwargs):
        self.states.setdefault(0, copy.deepcopy(strategy.model.state_dict()))

    def after_training_iteration(self, strategy, **kwargs):
        self.states[len(self.states)] = copy.deepcopy(strategy.model.state_dict())


class Shift(SupervisedPlugin):
    """Changes the weights after an experience, as an alignment of the classifier would."""

    def after_training_exp(self, strategy, **kwargs):
        with torch.no_grad():
            strategy.model.body[0].bias += 1


def walk(trajectory, steps, model=None, labels=None):
    model, states = network() if model is None else model, []
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        trajectory.record(model, label=(labels or {}).get(step, ""))
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return states


# ------------------------------------------------------------------- parameters
def test_parts_of_a_model():
    model = network()
    names = {part: [*chosen_parameters(model, part=part)] for part in ("all", "encoder", "head")}
    assert names["encoder"] == ["body.0.weight", "body.0.bias"] and names["head"] == ["head.weight", "head.bias"]
    assert names["all"] == names["encoder"] + names["head"]
    assert [*chosen_parameters(model, part="encoder", ignore=["body.0.bias"])] == ["body.0.weight"]
    assert chosen_parameters(model, part="all", head_name="nonsense")  # not looked for
    for options, match in (
        ({"part": "tail"}, "part: got 'tail'"),
        ({"part": "head", "ignore": ["body.0.bias"]}, r"ignore: got \['body.0.bias'\]"),
        ({"ignore": "head.bias"}, "ignore: got the text"),
        ({"part": "head", "ignore": ["head.bias", "head.weight"]}, "has no parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            chosen_parameters(model, **options)


# --------------------------------------------------------------------- by hand
@pytest.mark.parametrize(("storage", "error"), [("float32", 0.0), ("float16", 6e-4)])
def test_snapshots_are_the_weights(storage, error):
    trajectory = Trajectory(storage=storage)
    states = walk(trajectory, 5)
    assert len(trajectory) == 5 and trajectory.steps == [0, 1, 2, 3, 4]
    for index, state in enumerate(states):
        stored = trajectory.snapshot(index)
        assert [*stored] == [*state]
        moved = max(float((w - states[0][n]).abs().max()) for n, w in state.items())
        for name, w in state.items():
            assert stored[name].dtype == torch.float32 and stored[name].shape == w.shape
            assert float((stored[name] - w).abs().max()) <= error * moved
    size = sum(w.numel() for w in states[0].values())
    assert trajectory.nbytes == (20 if storage == "float32" else 12) * size
    trajectory.snapshot(0)["head.bias"].zero_()
    assert torch.equal(trajectory.snapshot(0)["head.bias"], states[0]["head.bias"])  # a copy
    assert torch.equal(trajectory.snapshot(-1)["head.bias"], trajectory.snapshot(4)["head.bias"])
    with pytest.raises(IndexError):
        trajectory.snapshot(5)
    by_hand = pca_directions([trajectory.snapshot(i) for i in range(5)])
    through_points = pca_directions(trajectory.points)
    torch.testing.assert_close(through_points.coordinates, by_hand.coordinates, atol=1e-6, rtol=0)


def test_float16_follows_moves_that_its_own_steps_would_hide():
    model, trajectory = network(), Trajectory(storage="float16")
    model.requires_grad_(False)
    model.body[0].weight.fill_(100.0)
    for step in range(4):
        model.body[0].weight[0] = 100 + 1e-3 * step
        trajectory.record(model)
    moved = trajectory.snapshot(3)["body.0.weight"][0] - 100
    torch.testing.assert_close(moved, torch.full((6,), 3e-3), atol=1e-5, rtol=0)
    assert torch.tensor(100.003).half() == 100


def test_thinning_keeps_the_path_even_and_its_ends_and_labels():
    trajectory = Trajectory(max_snapshots=8)
    labels = {0: "start", 13: "task 0"}
    states = walk(trajectory, 60, labels=labels)
    assert len(trajectory) == 8 and trajectory.steps[0] == 0 and trajectory.steps[-1] == 59
    assert 13 in trajectory.steps and trajectory.labels[trajectory.steps.index(13)] == "task 0"
    gaps = np.diff(trajectory.steps)
    assert gaps.min() >= 1 and gaps.max() <= 24
    for index, step in enumerate(trajectory.steps):
        assert torch.equal(trajectory.snapshot(index)["head.weight"], states[step]["head.weight"])


def test_labelled_snapshots_are_thinned_when_nothing_else_is_left():
    trajectory = Trajectory(max_snapshots=3)
    walk(trajectory, 9, labels={i: f"task {i}" for i in range(9)})
    assert len(trajectory) == 3 and trajectory.labels[0] == "task 0" and trajectory.labels[-1] == "task 8"


@pytest.mark.parametrize(("storage", "held"), [("float32", 4), ("float16", 7)])
def test_memory_limit(storage, held):
    trajectory = Trajectory(part="encoder", storage=storage, max_bytes=16 * SIZE)
    walk(trajectory, 12)
    assert len(trajectory) == held and trajectory.nbytes <= 16 * SIZE
    with pytest.raises(ValueError, match=f"max_bytes: .* snapshots of {SIZE} numbers"):
        walk(Trajectory(part="encoder", storage=storage, max_bytes=8 * SIZE - 1), 1)


def test_full_store_refuses_on_request():
    trajectory = Trajectory(max_snapshots=3, when_full="error")
    walk(trajectory, 3)
    with pytest.raises(ValueError, match="3 snapshots are all"):
        walk(trajectory, 1)
    assert trajectory.steps == [0, 1, 2]


def test_weights_that_change_their_shape_have_no_path():
    trajectory = Trajectory()
    trajectory.record(network())
    with pytest.raises(ValueError, match=r"\['head.weight', 'head.bias'\] came, went or changed shape"):
        trajectory.record(network(nn.Linear(8, 5)))
    encoder = Trajectory(part="encoder")
    for outputs in (4, 5, 6):
        encoder.record(network(nn.Linear(8, outputs)))
    assert len(encoder) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"part": "tail"}, "part: got 'tail'"),
        ({"storage": "bfloat16"}, "storage: got"),
        ({"when_full": "drop"}, "when_full: got"),
        ({"every": 0}, "every: got 0"),
        ({"every": True}, "every: got True"),
        ({"max_snapshots": 2}, "max_snapshots: got 2"),
        ({"max_bytes": 1.5}, "max_bytes: got 1.5"),
        ({"ignore": "head.bias"}, "ignore: got the text"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        Trajectory(**options)


# ---------------------------------------------------------------- over a stream
@pytest.mark.parametrize(
    ("every", "steps", "labels"),
    [
        (None, [0, 3, 6], ["start", "task 0", "task 1"]),
        (1, [0, 1, 2, 3, 4, 5, 6], ["start", "", "", "task 0", "", "", "task 1"]),
        (2, [0, 2, 3, 4, 6], ["start", "", "task 0", "", "task 1"]),
    ],
)
def test_hooks(two_tasks, every, steps, labels):
    copies, trajectory = Copies(), Trajectory(every=every)
    strategy = learner([copies, trajectory])
    for experience in two_tasks:
        strategy.train(experience, eval_streams=[])
    assert trajectory.steps == steps and trajectory.labels == labels
    for index, step in enumerate(steps):
        for name, w in trajectory.snapshot(index).items():
            assert torch.equal(w, copies.states[step][name])


def test_the_end_of_a_task_includes_what_other_plugins_did(two_tasks):
    trajectory = Trajectory(every=1)
    strategy = learner([Shift(), trajectory])
    for experience in two_tasks:
        strategy.train(experience, eval_streams=[])
        assert torch.equal(trajectory.snapshot(-1)["body.0.bias"], strategy.model.body[0].bias)
    assert trajectory.steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_growing_head_is_refused_before_the_experience_and_left_out_by_encoder(two_tasks):
    for part in ("all", "encoder"):
        trajectory = Trajectory(part=part)
        strategy = learner([trajectory], network(IncrementalClassifier(8, 2, masking=False)))
        strategy.train(two_tasks[0], eval_streams=[])
        if part == "encoder":
            strategy.train(two_tasks[1], eval_streams=[])
            assert len(trajectory) == 3
            continue
        with pytest.raises(ValueError, match="part='encoder'"):
            strategy.train(two_tasks[1], eval_streams=[])
        assert strategy.clock.train_iterations == 3


def test_training_is_the_same_to_the_bit(two_tasks):
    def run(plugins):
        strategy = learner(plugins)
        for experience in two_tasks:
            strategy.train(experience, eval_streams=[])
        state = [copy.deepcopy(dict(strategy.model.state_dict())), capture_random_state()]
        return to_plain([*state, {n: m.training for n, m in strategy.model.named_modules()}])

    trajectories = [Trajectory(every=1), Trajectory(every=2, storage="float16", part="encoder")]
    assert differing_state(run([]), run(trajectories)) is None
    assert [len(trajectory) for trajectory in trajectories] == [7, 5]


# ------------------------------------------------------------------------ state
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_state_continues_bit_for_bit(storage):
    options = {"storage": storage, "max_snapshots": 5, "ignore": ["head.bias"]}
    whole, first, second = (Trajectory(**options) for _ in range(3))
    model = network()
    walk(whole, 7, model)
    walk(whole, 6, model)
    model = network()
    walk(first, 7, model)
    state = from_plain(to_plain(first.state_dict()))
    second.load_state_dict(state)
    for row in state["rows"]:
        row.zero_()  # the loaded one has its own
    walk(second, 6, model)
    assert differing_state(to_plain(whole.state_dict()), to_plain(second.state_dict())) is None
    with pytest.raises(ValueError, match="another value of max_snapshots, ignore"):
        Trajectory(storage=storage).load_state_dict(first.state_dict())


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 4])  # in the first task, in the second
def test_exact_resume_after_a_kill(two_tasks, tmp_path, at):
    def run(at):
        trajectory, checkpoint = Trajectory(every=2), ExactCheckpointPlugin(tmp_path, every=1)
        strategy = learner([Kill(at), checkpoint, trajectory])
        start = checkpoint.resume(strategy)
        try:
            for experience in two_tasks[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            pass
        finally:
            checkpoint.close()
        return trajectory

    whole = Trajectory(every=2)
    strategy = learner([Kill(-1), whole])
    for experience in two_tasks:
        strategy.train(experience, eval_streams=[])
    assert len(run(at)) < len(whole) == 5
    assert differing_state(to_plain(whole.state_dict()), to_plain(run(-1).state_dict())) is None
