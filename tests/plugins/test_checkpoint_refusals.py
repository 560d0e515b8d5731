"""What the checkpoint plugin refuses, what it reports, and how it treats files that a run appends to."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import cpu_usage_metrics
from avalanche.logging import TensorboardLogger
from avalanche.training import Cumulative, Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.checkpoint_files import CheckpointError, checkpoints
from avalanche_firn.plugins.fast_path import FastPathPlugin

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import (
    Bomb,
    Crash,
    assert_same,
    crash,
    dataset,
    mlp,
    naive_adam,
    play,
    scalars,
    sgd,
    slca,
    stream,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and no waiting for the disk: nothing loses power here."""
    torch.set_num_threads(1)
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of SLCA."""
    return play(slca, tmp_path_factory.mktemp("reference"), every=None)


# --------------------------------------------------------------- wrong use
def test_resume_comes_first_and_once(tmp_path):
    checkpoint = ExactCheckpointPlugin(tmp_path)
    strategy, bm, _ = naive_adam([checkpoint])
    with pytest.raises(RuntimeError, match="call resume"):
        strategy.train(bm.train_stream[0], eval_streams=[])
    assert checkpoint.resume(strategy) == 0
    with pytest.raises(RuntimeError, match="called before"):
        checkpoint.resume(strategy)
    strategy.train(bm.train_stream[0], eval_streams=[])
    assert not checkpoint.is_trained(bm.train_stream[0])  # asked about a resumed run only
    other = ExactCheckpointPlugin(tmp_path / "other")
    strategy.plugins.insert(0, other)
    with pytest.raises(RuntimeError, match="before the first train"):
        other.resume(strategy)
    with pytest.raises(ValueError, match="doesn't hold this plugin"):
        ExactCheckpointPlugin(tmp_path).resume(naive_adam([])[0])


def test_half_an_experience_is_not_evaluated(tmp_path):
    crash(naive_adam, tmp_path, "before_backward", 9)
    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    strategy, bm, _ = naive_adam([Bomb(), checkpoint])
    assert checkpoint.resume(strategy) == 1
    with pytest.raises(RuntimeError, match="train on it before evaluating"):
        strategy.eval(bm.test_stream)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": -1}, "every is -1"), ({"keep": 0}, "keep is 0"), ({"append_only": "events*"}, "a list of paths")],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ExactCheckpointPlugin(tmp_path, **settings)


class Closure(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        count = [0]
        self.step = lambda: count.append(1)


class OwnLoop(Naive):
    def _train_exp(self, experience, eval_streams=None, **kwargs):
        super()._train_exp(experience, eval_streams, **kwargs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: sgd(mlp(), [ReplayPlugin(20), *p]), r"ReplayPlugin\.storage_policy"),
        (lambda p: sgd(mlp(), [Closure(), *p]), r"Closure\.step: a builtins\.function can't be saved exactly"),
        (lambda p: sgd(mlp(), p, evaluator=EvaluationPlugin(cpu_usage_metrics(epoch=True))), "EpochCPUUsage"),
        (lambda p: sgd(mlp(), p, strategy=OwnLoop), "_train_exp"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_training(build, message, tmp_path):
    checkpoint = ExactCheckpointPlugin(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.resume(build([checkpoint]))
    assert not list(tmp_path.iterdir())


def test_state_that_appears_later_is_refused_at_the_first_checkpoint(tmp_path):
    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    strategy, bm = sgd(mlp(), [checkpoint], strategy=Cumulative, criterion=nn.CrossEntropyLoss()), stream()
    checkpoint.resume(strategy)
    with pytest.raises(ValueError, match=r"Cumulative\.dataset"):
        strategy.train(bm.train_stream[0], eval_streams=[])


def test_growth_that_could_not_be_repeated_is_refused_at_the_first_checkpoint(tmp_path):
    class Wrap(SupervisedPlugin):
        stateless = True

        def before_training_exp(self, strategy, **kwargs):
            strategy.model[0] = nn.Sequential(strategy.model[0], nn.Linear(24, 24))

    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    strategy, bm = sgd(mlp(), [Wrap(), checkpoint]), stream()
    checkpoint.resume(strategy)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' was \[24, 64\] torch\.float32 and is absent now"):
        strategy.train(bm.train_stream[0], eval_streams=[])


def test_a_plugin_that_forgets_is_found_out(tmp_path):
    class Forgetful(SupervisedPlugin):
        steps = 0

        def after_training_iteration(self, strategy, **kwargs):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            pass

    def recipe(plugins, loggers=()):
        return sgd(mlp(), [Forgetful(), *plugins]), stream(), {"eval_streams": []}

    crash(recipe, tmp_path, "before_backward", 18)
    with pytest.raises(CheckpointError, match="Forgetful didn't restore its state exactly: /state/steps"):
        play(recipe, tmp_path)


# -------------------------------------------------------- another configuration
def test_fingerprint(tmp_path):
    crash(naive_adam, tmp_path, "before_backward", 9, fingerprint="abc")
    with pytest.raises(CheckpointError, match="made with fingerprint 'abc', this run has 'abd'"):
        play(naive_adam, tmp_path, fingerprint="abd")
    play(naive_adam, tmp_path, fingerprint="abc")


def wider(plugins, loggers=()):
    strategy, bm, settings = naive_adam(plugins, loggers)
    strategy.model[0] = nn.Linear(64, 30)
    return strategy, bm, settings


def longer(plugins, loggers=()):
    strategy, bm, settings = naive_adam(plugins, loggers)
    strategy.train_epochs = 3
    return strategy, bm, settings


def another_plugin(plugins, loggers=()):
    return naive_adam([EWCPlugin(1.0), *plugins], loggers)


def other_data(plugins, loggers=()):
    strategy, _bm, settings = naive_adam(plugins, loggers)
    data = (dataset(slice(20, 156)), dataset(slice(400, 450)))
    return strategy, nc_benchmark(*data, n_experiences=5, task_labels=False, shuffle=False), settings


def other_order(plugins, loggers=()):
    strategy, bm, settings = naive_adam(plugins, loggers)
    data = dataset(slice(0, 128))
    flipped = TensorDataset(data.tensors[0].flip(0), data.tensors[1].flip(0))
    flipped.targets = data.targets[::-1]
    bm = nc_benchmark(flipped, dataset(slice(400, 450)), n_experiences=5, task_labels=False, shuffle=False)
    return strategy, bm, settings


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (wider, r"parameter '0\.weight': checkpoint \[24, 64\] torch\.float32, now \[30, 64\]"),
        (longer, "train_epochs: checkpoint 2, now 3"),
        (another_plugin, "plugins: checkpoint .*LRScheduler.*now .*EWCPlugin"),
        (other_data, "samples in the experience: the checkpoint was made with"),
        (other_order, "the loader gives other batches than before"),
    ],
)
def test_another_strategy_or_other_data(recipe, message, tmp_path):
    crash(naive_adam, tmp_path, "before_backward", 9)
    with pytest.raises(CheckpointError, match=message):
        play(recipe, tmp_path)


def test_the_wrong_experience(tmp_path):
    crash(naive_adam, tmp_path, "before_backward", 9)
    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    strategy, bm, settings = naive_adam([Bomb(), checkpoint])
    assert checkpoint.resume(strategy) == 1
    with pytest.raises(CheckpointError, match="experience: the checkpoint was made with 1, this run has 0"):
        strategy.train(bm.train_stream[0], **settings)


def test_another_environment_is_reported(tmp_path, monkeypatch):
    crash(naive_adam, tmp_path, "before_backward", 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.resume(naive_adam([Bomb(), checkpoint])[0])
    assert any("threads 1 -> 7" in str(w.message) for w in caught)


# ------------------------------------------------------ damage, locks, files
@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(file, tmp_path, reference):
    crash(slca, tmp_path, "before_backward", 14)
    newest, _previous = checkpoints(tmp_path)
    damaged = newest / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning) as caught:
        run = play(slca, tmp_path, seed=99)
    assert any(str(damaged) in str(w.message) for w in caught)
    assert_same(run, reference)


def test_nothing_intact_needs_a_decision(tmp_path):
    crash(slca, tmp_path, "before_backward", 14)
    for path in checkpoints(tmp_path):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing.*allow_fresh"):
        play(slca, tmp_path)
    checkpoint = ExactCheckpointPlugin(tmp_path, every=4)
    strategy, _, _ = slca([Bomb(), checkpoint])
    assert checkpoint.resume(strategy, allow_fresh=True) == 0
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000000"]


def test_a_second_process_is_kept_out(tmp_path):
    held = "import fcntl,sys,time,os; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); "
    code = held + "f.write(str(os.getpid())); f.flush(); print('held',flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=f"in use by another process .id {other.pid}"):
            play(naive_adam, tmp_path)
        other.kill()
    play(naive_adam, tmp_path)


def test_a_second_plugin_in_the_same_process_takes_over(tmp_path):
    first, second = ExactCheckpointPlugin(tmp_path), ExactCheckpointPlugin(tmp_path)
    strategy, bm, settings = naive_adam([first])
    first.resume(strategy)
    second.resume(naive_adam([second])[0])
    with pytest.raises(RuntimeError, match="has taken the directory over"):
        strategy.train(bm.train_stream[0], **settings)


def close(strategy) -> None:
    for logger in strategy.evaluator.loggers:
        logger.writer.close()


@pytest.mark.parametrize("rewound_first", [False, True])
def test_event_files_tell_one_story(rewound_first, tmp_path):
    def run(name, bomb=None, seed=0):
        folder = tmp_path / name
        pattern = [folder / "events.out.tfevents.*"]
        if rewound_first:
            ExactCheckpointPlugin.rewind(folder / "checkpoint", pattern)

        def loggers():
            logger = TensorboardLogger(folder)
            logger.writer.add_scalar("written before resume", 1.0, 0)
            return [logger]

        return play(slca, folder / "checkpoint", bomb, seed=seed, loggers=loggers, append_only=pattern)

    expected = run("reference")
    close(expected[0])
    for n, (hook, count) in enumerate([("before_backward", 7), ("before_eval_iteration", 2), ("before_backward", 9)]):
        with pytest.raises(Crash):
            run("run", Bomb(hook, count), seed=n)
    (tmp_path / "run" / "notes.txt").write_text("not ours")
    got = run("run", seed=99)
    close(got[0])
    assert_same(got, expected)
    assert scalars(tmp_path / "run") == scalars(tmp_path / "reference")
    assert (tmp_path / "run" / "notes.txt").exists()


def test_files_that_only_grow(tmp_path):
    class Lines(SupervisedPlugin):
        stateless = True

        def after_training_iteration(self, strategy, **kwargs):
            with (tmp_path / "metrics.csv").open("a") as file:
                file.write(f"{strategy.clock.train_iterations},{strategy.loss.item()!r}\n")

    def recipe(plugins, loggers=()):
        return naive_adam([Lines(), *plugins], loggers)

    play(recipe, tmp_path / "reference", append_only=[tmp_path / "metrics.csv"])
    expected = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").unlink()
    crash(recipe, tmp_path / "run", "before_backward", 15, append_only=[tmp_path / "metrics.csv"])
    play(recipe, tmp_path / "run", append_only=[tmp_path / "metrics.csv"])
    assert (tmp_path / "metrics.csv").read_text() == expected
    os.truncate(tmp_path / "metrics.csv", 10)
    with pytest.raises(CheckpointError, match=r"metrics\.csv has 10 bytes.*its history is lost"):
        play(recipe, tmp_path / "run", append_only=[tmp_path / "metrics.csv"])


def test_event_files_without_a_pattern_are_reported(tmp_path):
    with pytest.warns(RuntimeWarning, match="no pattern of append_only covers"):
        play(naive_adam, tmp_path / "checkpoint", loggers=lambda: [TensorboardLogger(tmp_path)], every=0)


def test_a_plugin_without_influence_may_come_and_go(tmp_path):
    """Bars and the fast path are no part of a run: it resumes with or without them."""
    torch.manual_seed(0)
    reference = play(slca, tmp_path / "whole")

    def with_bars(plugins, loggers=()):
        return slca([FastPathPlugin(one_pass=False), *plugins], loggers)

    crash(with_bars, tmp_path / "cut", "before_backward", 14)
    assert_same(play(slca, tmp_path / "cut", seed=99), reference)
    crash(slca, tmp_path / "again", "before_backward", 14)
    assert_same(play(with_bars, tmp_path / "again", seed=99), reference)
