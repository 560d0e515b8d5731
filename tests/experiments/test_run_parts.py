"""The small parts of a run: CSV logger, clock, progress bars, environment, device, method builders, preparation."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.evaluation.metric_results import AlternativeValues, TensorImage

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.csv_logger import CsvLogger, read_metrics
from avalanche_firn.experiments.environment import git_commit, package_versions, resolve_device, seed_everything
from avalanche_firn.experiments.errors import ConfigError, known_keys
from avalanche_firn.experiments.methods import METHODS, make_optimizer, make_schedule
from avalanche_firn.experiments.progress import ProgressPlugin, RunClock, bars_wanted
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.sections import OptimizerConfig, ScheduleConfig


def test_csv_keeps_numbers_exactly_and_leaves_out_the_rest(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    third = 1 / 3
    logger.log_single_metric("a", third, 0)
    logger.log_single_metric('tag, with "comma"', torch.tensor(2.5), 1)
    logger.log_single_metric("b", AlternativeValues("figure", 3), 2)
    logger.log_single_metric("text", "x", 3)
    logger.log_single_metric("picture", TensorImage(torch.zeros(1)), 3)
    logger.log_single_metric("histogram", torch.zeros(4), 3)
    logger.log_single_metric("flag", True, 3)
    logger.log_single_metric("figure only", AlternativeValues("figure", torch.zeros(2, 2)), 3)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3  # on disk before it is closed
    logger.close()
    again = CsvLogger(tmp_path / "metrics.csv")
    again.log_single_metric("a", float("nan"), 4)
    again.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[:3] == [(0, "a", third), (1, 'tag, with "comma"', 2.5), (2, "b", 3.0)]
    assert rows[3][0] == 4 and np.isnan(rows[3][2])


def test_clock_counts_training_and_evaluation_once(monkeypatch) -> None:
    now = iter(np.arange(0.0, 100.0, 1.0))
    monkeypatch.setattr("avalanche_firn.experiments.progress.time.perf_counter", lambda: next(now))
    strategy = SimpleNamespace(device=torch.device("cpu"))
    clock = RunClock()
    clock.before_training(strategy)  # 0
    clock.after_training_iteration(strategy)  # 1
    clock.before_eval(strategy)  # inside training: nothing
    clock.after_eval(strategy)
    clock.after_training(strategy)  # 2
    assert clock.seconds == 2.0
    clock.before_eval(strategy)  # 3
    clock.after_eval(strategy)  # 4
    assert clock.seconds == 3.0
    resumed = RunClock()
    resumed.before_training(strategy)
    resumed.load_state_dict(clock.state_dict())
    assert resumed.state_dict() == clock.state_dict()
    resumed.after_training(strategy)
    assert resumed.seconds == 4.0


def test_bars_only_on_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    assert bars_wanted(True, quiet=False)
    assert not bars_wanted(False, quiet=False) and not bars_wanted(True, quiet=True)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    assert not bars_wanted(True, quiet=False)


def test_progress_shows_where_the_run_is(capsys) -> None:
    clock = SimpleNamespace(train_exp_counter=1, train_exp_epochs=2, train_exp_iterations=6)
    strategy = SimpleNamespace(train_epochs=4, dataloader=[0] * 3, clock=clock)
    plugin = ProgressPlugin(label="slca seed 0", tasks=5)
    plugin.before_training_exp(strategy)
    plugin.before_training_epoch(strategy)
    bar = plugin._bar
    assert bar is not None and bar.total == 12 and bar.n == 6  # a resumed run starts in the middle
    plugin.after_training_iteration(strategy)
    assert bar.n == 7 and "slca seed 0 task 2/5 epoch 3/4" in bar.desc
    plugin.after_training_exp(strategy)
    assert plugin._bar is None


def test_seeds_cover_all_generators() -> None:
    def draws() -> tuple[float, float, float]:
        seed_everything(3)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draws() == draws()


def test_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="cuda:2"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_environment(tmp_path: Path) -> None:
    versions = package_versions()
    assert versions["torch"] and versions["avalanche-lib"]
    assert git_commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    setup = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "x"]):
        subprocess.run([*setup, *words], cwd=tmp_path, check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"


def test_every_strategy_of_the_schema_has_a_builder() -> None:
    config = load_recipe("digits", [f"methods=[{','.join(METHODS)}]"])
    assert [method.strategy for method in config.methods] == list(METHODS)
    with pytest.raises(ConfigError) as error:
        load_recipe("digits", ["methods=[nothing]"])
    assert ", ".join(sorted(METHODS)) == ", ".join(sorted(error.value.problems[0].accepted[7:].split(", ")))
    assert "methods[].alignment.temperature" in known_keys(Config)


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        (OptimizerConfig(lr=0.5), torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-4}),
        (OptimizerConfig(momentum=0.0), torch.optim.SGD, {"momentum": 0.0}),
        (OptimizerConfig(name="adam", lr=1.0), torch.optim.Adam, {"lr": 1.0}),
        (OptimizerConfig(name="adamw", weight_decay=0.0), torch.optim.AdamW, {"weight_decay": 0.0}),
    ],
)
def test_optimizers(config: OptimizerConfig, kind: type, expected: dict) -> None:
    optimizer = make_optimizer(config, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_schedules() -> None:
    def rates(config: ScheduleConfig, epochs: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        factory = make_schedule(config, epochs)
        assert factory is not None
        schedule, found = factory(optimizer), []
        for _ in range(epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    assert make_schedule(ScheduleConfig(), 3) is None
    assert rates(ScheduleConfig(name="multistep", milestones=[1, 3], gamma=0.5), 4) == [1.0, 0.5, 0.5, 0.25]
    assert rates(ScheduleConfig(name="cosine"), 2) == pytest.approx([1.0, 0.5])


def test_prepare_tells_what_will_run() -> None:
    text = str(prepare(load_recipe("digits", ["device=cpu"])))
    assert "5 methods x 3 seeds = 15 runs" in text
    assert "10 classes in tasks of 2, 2, 2, 2, 2" in text and "vit_firn_32.omniglot (pretrained)" in text


def test_stream_without_validation_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / name / f"{i}.png")
    stream = f"stream={{name: folder, root: {tmp_path}, tasks: 2, validation_fraction: 0}}"
    with pytest.raises(ConfigError, match="no validation part"):
        prepare(load_recipe("digits", [stream, "evaluation.split=validation", "device=cpu"]))


def test_classic_benchmark_gets_the_backbone_s_transform(monkeypatch) -> None:
    """A benchmark of Avalanche is built with the run's seed and the backbone's transforms, grey images included."""
    import avalanche.benchmarks.classic as classic
    from avalanche.benchmarks import nc_benchmark
    from PIL import Image

    seen: dict = {}

    class Grey(torch.utils.data.Dataset):
        targets = [0, 1, 0, 1]  # noqa: RUF012

        def __init__(self, transform) -> None:
            self.transform = transform

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int):
            return self.transform(Image.new("L", (28, 28), index)), self.targets[index]

    def benchmark(n_experiences: int, *, seed=None, train_transform=None, eval_transform=None):
        seen.update(seed=seed)
        data = Grey(train_transform), Grey(eval_transform)
        return nc_benchmark(*data, n_experiences, task_labels=False, fixed_class_order=[1, 0])

    monkeypatch.setattr(classic, "SplitMNIST", benchmark)
    stream = "stream={name: avalanche, benchmark: SplitMNIST, arguments: {n_experiences: 2}}"
    prepared = prepare(load_recipe("digits", [stream, "seeds=[5]", "device=cpu", "methods=[naive,joint]"]))
    assert seen["seed"] == 5
    assert prepared.stream.class_order == (1, 0)
    assert tuple(prepared.stream.train[0].dataset[0][0].shape) == prepared.backbone.data_config["input_size"]
    assert len(prepared.stream.joint().train) == 1
