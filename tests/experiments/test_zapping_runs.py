"""Zapping and the dynamics of tasks in comparisons on a stream: what is refused, what runs and reports say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.experiments.comparison import compare
from avalanche_firn.experiments.config import validate
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe


def raw(method, **changes):
    training = {"epochs": 3, "batch_size": 64}
    return {"name": "mine", "stream": {"name": "digits"}, "training": training, "methods": [method]} | changes


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ({"strategy": "naive", "zapping": {"every": 3}}, "methods[0].zapping.every", "3 with 3 epochs: no zap"),
        ({"strategy": "naive", "zapping": {"scope": "random"}}, "methods[0].zapping.fraction", "null with scope"),
        ({"strategy": "naive", "zapping": {"fraction": 0.5}}, "methods[0].zapping.fraction", "scope is experience"),
        ({"strategy": "slca", "zapping": {"scope": "all"}}, "methods[0].zapping.scope", "which slca freezes"),
        ({"strategy": "lp_ft", "zapping": {"schedule": "experience"}}, "methods[0].zapping.schedule", "linear probe"),
        ({"strategy": "cila", "zapping": {}}, "methods[0].zapping", "fitted after the training"),
        ({"strategy": "naive", "zapping": {"shedule": "epoch"}}, "methods[0].zapping.shedule", "schedule"),
        ({"strategy": "naive", "zapping": {"blend": 0}}, "methods[0].zapping.blend", "greater than 0"),
    ],
)  # fmt: skip
def test_zaps_that_would_do_nothing_or_harm_are_refused(method, path, said) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(raw(method))
    found = {problem.path: str(problem) for problem in caught.value.problems}
    assert said in found[path], found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    words = [
        f"output={str(tmp_path_factory.mktemp('zapping'))!r}", "seeds=[0]", "stream.tasks=[5,5]", "training.epochs=2",
        "methods=[naive,lp_ft_zap,slca_zap]", "device=cpu",
        "evaluation.dynamics={every: experience, images_per_task: 10}",
    ]  # fmt: skip
    return compare(load_recipe("zapping_stream_digits", words), quiet=True)


def test_results_say_what_was_redrawn_and_what_it_did_to_single_tasks(done) -> None:
    runs = {run["method"]: run for run in done.runs}
    assert runs["naive"]["zapping"] is None and runs["naive"]["protocol"]["zapping"] is None
    for label in ("lp_ft_zap", "slca_zap"):
        assert runs[label]["zapping"] == {"zaps": 2, "rows": 10, "past_rows": False}
        assert runs[label]["protocol"]["zapping"] == "experience, every 1 epoch"
    for run in runs.values():
        found = Dynamics.from_dict(run["dynamics"])
        assert found.loss.shape[1] == 2 and found.block_tasks == ((0,), (1,))
        assert run["figures"]["dynamics/interference"] == pytest.approx(found.totals().interference)
    naive = Dynamics.from_dict(runs["naive"]["dynamics"])
    assert naive.block_effect[1, 0] > 0.5  # learning the second task harms the first


def test_report_and_tensorboard_show_them(done) -> None:
    text = (done.summary / "report.md").read_text()
    assert "Dynamics of single tasks" in text and "Rows of the classifier are redrawn" in text
    for name in ("block-effect", "loss-map", "curves"):
        drawing = (done.summary / f"dynamics-{name}-slca_zap.svg").read_text(encoding="utf-8")
        assert drawing.count("<path") + drawing.count("<image") > 3
    board = EventAccumulator(str(Path(done.folder) / "slca_zap" / "seed-0"), size_guidance={"images": 0})
    board.Reload()
    assert {"dynamics/loss", "dynamics/interference", "zap/rows"} <= set(board.Tags()["scalars"])
    assert {"dynamics/block-effect", "dynamics/loss-map", "dynamics/curves"} <= set(board.Tags()["images"])
    assert not {tag for tag in board.Tags()["histograms"] if tag.startswith("dynamics")}
