"""Few shots, what is chosen and on which data, corner cases, the protocol, and what is refused."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset

from avalanche_firn.benchmarks.streams import eager_stream
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.models import FeatureCache
from avalanche_firn.models.finite_values import NonFiniteValues

sys.path.append(str(Path(__file__).parent))
from representation_cases import ALL, FAST, Tiny, learner, plain, rows_of, train

pytestmark = pytest.mark.usefixtures("cheap_picture")


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


def test_a_representation_that_is_not_finite_has_no_accuracy(stream):
    bench = stream()
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
    model = learner(plain).model
    with torch.no_grad():
        model.backbone[0].weight.fill_(math.nan)
    with pytest.raises(
        NonFiniteValues, match=r"^train data of task 0: the features of class 0 \(12 of 12 samples\), 1"
    ):
        probe.measure(model, 0, tasks=range(3))
    model = learner(plain).model
    rows = bench.test_stream[1].dataset.eval()
    probe.measure(model, 0, tasks=[1])
    rows[0][0].fill_(math.inf)  # the stored tensor itself: one test sample is broken
    probe.cache.clear()
    probe._images.clear()
    with pytest.raises(
        NonFiniteValues, match=r"^test data of task 1: the features of class \d \(1 of \d+ samples\): not"
    ):
        probe.measure(model, 0, tasks=[1])


# ---------------------------------------------------------------------- protocol
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
