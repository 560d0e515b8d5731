"""Which rows and columns of the matrices are measured, what figures follow from them, and how they are logged."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from avalanche.benchmarks.utils import concat_datasets

from avalanche_firn.benchmarks.streams import eager_stream
from avalanche_firn.evaluation import matrix as matrices
from avalanche_firn.evaluation.representation import RepresentationProbe

sys.path.append(str(Path(__file__).parent))
from representation_cases import KINDS, learner, measured, plain, train

pytestmark = pytest.mark.usefixtures("cheap_picture")


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


# ------------------------------------------------------------------------- names
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
