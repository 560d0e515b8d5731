"""Exact resume inside one process: a hook raises, a new strategy is built with other seeds, and the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metrics import timing_metrics
from avalanche.logging import BaseLogger, InteractiveLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.checkpoint_files import checkpoints
from avalanche_firn.plugins.plain_state import differing_state

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import (
    RECIPES,
    Bomb,
    Crash,
    assert_same,
    crash,
    growing,
    lorac_ipc,
    lorac_ipc_evaluated,
    mlp,
    naive_adam,
    play,
    several_tasks,
    sgd,
    slca,
    slca_evaluated,
    slca_plus_plus,
    stream,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and no waiting for the disk: nothing loses power here."""
    torch.set_num_threads(1)
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Uninterrupted runs, made once, without the checkpoint plugin: it must not change anything either."""
    made: dict[str, Any] = {}

    def get(recipe):
        if recipe.__name__ not in made:
            made[recipe.__name__] = play(recipe, tmp_path_factory.mktemp("reference"), every=None)
        return made[recipe.__name__]

    return get


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.__name__)
def test_resume_inside_an_experience(recipe, tmp_path, references):
    crash(recipe, tmp_path, "before_backward", 14)
    assert_same(play(recipe, tmp_path, seed=99), references(recipe))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "workers" not in r.__name__], ids=lambda r: r.__name__)
def test_resume_between_experiences(recipe, tmp_path, references):
    crash(recipe, tmp_path, "before_eval_iteration", 5)
    assert_same(play(recipe, tmp_path, seed=99), references(recipe))


@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("before_training", 1), ("before_training_exp", 2), ("before_training_epoch", 3), ("before_forward", 3),
        ("after_training_iteration", 4), ("after_training_iteration", 17), ("after_training_epoch", 2),
        ("after_training_exp", 1), ("after_training", 2), ("before_eval", 1), ("after_eval_exp", 4), ("after_eval", 2),
    ],
)  # fmt: skip
def test_resume_from_any_hook(hook, count, tmp_path, references):
    crash(slca_evaluated, tmp_path, hook, count)
    assert_same(play(slca_evaluated, tmp_path, seed=99), references(slca_evaluated))


@pytest.mark.parametrize(
    ("hook", "count"), [("after_eval_exp", 1), ("before_eval_iteration", 6), ("after_training", 1)]
)
def test_resume_where_a_head_grows_in_an_evaluation(hook, count, tmp_path, references):
    crash(growing, tmp_path, hook, count)
    assert_same(play(growing, tmp_path, seed=99), references(growing))


@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("before_training_exp", 2), ("after_update", 11), ("after_update", 18), ("after_training_epoch", 4),
        ("before_eval_forward", 10), ("after_eval_forward", 4),
    ],
)  # fmt: skip
def test_resume_from_any_hook_of_lora_composition(hook, count, tmp_path, references):
    """A pair has just been opened; in the window of importance; a task has been closed, its matrices frozen; in
    evaluations, also between the two passes of task inference."""
    crash(lorac_ipc_evaluated, tmp_path, hook, count)
    assert_same(play(lorac_ipc_evaluated, tmp_path, seed=99), references(lorac_ipc_evaluated))


@pytest.mark.parametrize("recipe", [lorac_ipc, slca_plus_plus], ids=lambda r: r.__name__)
def test_a_task_that_is_opened_again_and_again(recipe, tmp_path, references):
    opening = ("before_train_dataset_adaptation", "before_training_exp", "before_training_epoch")
    crash(recipe, tmp_path, "before_backward", 18)
    for n, hook in enumerate((*opening, "before_forward", *opening)):
        crash(recipe, tmp_path, hook, 1, seed=n)
    strategy, results = play(recipe, tmp_path, seed=99)
    assert_same((strategy, results), references(recipe))
    layers = LoRAComposition(strategy.model)
    assert (layers.num_tasks, layers.num_closed) == ((3, 3) if recipe is lorac_ipc else (1, 0))


def test_a_run_that_crashes_again_and_again(tmp_path, references):
    for n, count in enumerate((6, 3, 7, 1, 5, 4, 6)):
        crash(slca, tmp_path, "before_backward", count, seed=n)
    assert_same(play(slca, tmp_path, seed=99), references(slca))


def test_a_crash_in_the_last_evaluation(tmp_path, references):
    crash(slca, tmp_path, "before_eval_iteration", 8)
    strategy, results = play(slca, tmp_path, seed=99)
    expected, expected_results = references(slca)
    assert len(results) == 1 and results[-1] == expected_results[-1]
    assert differing_state(dict(expected.model.state_dict()), dict(strategy.model.state_dict())) is None


def test_checkpoints_at_experience_ends_only(tmp_path, references):
    crash(naive_adam, tmp_path, "before_backward", 14, every=0)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000012-end", "step-000000006-end"]
    assert_same(play(naive_adam, tmp_path, seed=99, every=0), references(naive_adam))


def test_every_iteration_is_a_place_to_stop(tmp_path, references):
    crash(naive_adam, tmp_path, "before_backward", 12, every=1)
    # 2 epochs of 3 batches in each experience; iteration 9 ends an epoch and is saved where the next one starts
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000011", "step-000000010"]
    assert_same(play(naive_adam, tmp_path, seed=99, every=1), references(naive_adam))


class LastBatch(SupervisedPlugin):
    """Looks, at the end of an epoch, at what its last batch left behind."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_training_epoch(self, strategy, **kwargs):
        self.seen.append([strategy.mb_output.sum().item(), strategy.mb_y.tolist()])


def test_the_end_of_an_epoch_sees_its_last_batch(tmp_path):
    def recipe(plugins, loggers=()):
        strategy, bm, settings = naive_adam(plugins, loggers)
        strategy.plugins.insert(0, LastBatch())
        return strategy, bm, settings

    reference = play(recipe, tmp_path / "reference", every=None)
    crash(recipe, tmp_path / "run", "after_training_epoch", 1, every=3)  # due exactly at the last batch of the epoch
    assert_same(play(recipe, tmp_path / "run", seed=99, every=3), reference)


class Opened(PluginMetric):
    """Emits a value when an experience opens."""

    def reset(self):
        pass

    def result(self):
        return 1.0

    def before_training_exp(self, strategy):
        return [MetricValue(self, "opened", 1.0, strategy.clock.train_exp_counter)]


class Listener(BaseLogger):
    def __init__(self):
        super().__init__()
        self.heard = []

    def log_single_metric(self, name, value, x_plot):
        self.heard.append((name, x_plot))


def test_the_opening_of_an_experience_is_logged_once(tmp_path):
    listener = Listener()

    def recipe(plugins, loggers=()):
        metrics = EvaluationPlugin(Opened(), loggers=[listener])
        return sgd(mlp(), plugins, evaluator=metrics), stream(), {"eval_streams": []}

    crash(recipe, tmp_path, "before_backward", 18)
    play(recipe, tmp_path, seed=99)
    assert listener.heard == [("opened", 0), ("opened", 1), ("opened", 2)]


def test_several_tasks_in_one_experience(tmp_path):
    reference = play(several_tasks, tmp_path / "reference", every=None)
    crash(several_tasks, tmp_path / "run", "before_backward", 14)
    assert_same(play(several_tasks, tmp_path / "run", seed=99), reference)


def test_a_loader_with_its_own_generator(tmp_path):
    class OwnGenerator(Naive):
        def make_train_dataloader(self, **kwargs):
            generator = torch.Generator().manual_seed(self.clock.train_exp_counter)
            self.dataloader = torch.utils.data.DataLoader(
                self.adapted_dataset, batch_size=10, shuffle=True, generator=generator
            )

    def recipe(plugins, loggers=()):
        return sgd(mlp(), plugins, loggers, strategy=OwnGenerator), stream(), {"eval_streams": []}

    reference = play(recipe, tmp_path / "reference", every=None)
    crash(recipe, tmp_path / "run", "before_backward", 11)
    assert_same(play(recipe, tmp_path / "run", seed=99), reference)


def test_one_train_call_for_several_experiences(tmp_path):
    def whole(folder, bomb=None, seed=0):
        torch.manual_seed(seed)
        checkpoint = ExactCheckpointPlugin(folder, every=4)
        strategy, bm, _ = slca([bomb or Bomb(), checkpoint])
        start = checkpoint.resume(strategy)
        strategy.train(bm.train_stream[start:], eval_streams=[])
        return strategy, [strategy.eval(bm.test_stream)]

    reference = whole(tmp_path / "reference")
    with pytest.raises(Crash):
        whole(tmp_path / "run", Bomb("before_backward", 20))
    assert_same(whole(tmp_path / "run", seed=99), reference)


def test_metrics_that_measure_time_go_on(tmp_path):
    def recipe(plugins, loggers=()):
        metrics = EvaluationPlugin(timing_metrics(epoch=True, epoch_running=True), loggers=[InteractiveLogger()])
        return sgd(mlp(), plugins, evaluator=metrics), stream(), {"eval_streams": []}

    crash(recipe, tmp_path, "before_backward", 14)
    strategy, _ = play(recipe, tmp_path)
    times = [v for _, values in strategy.evaluator.get_all_metrics().values() for v in values]
    assert len(times) > 6 and all(0 <= t < 600 for t in times)
