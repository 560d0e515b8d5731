"""The section ``performance``: identity, refusals, optimizers, and small runs with what it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from avalanche_firn.experiments import methods, runner
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.dry_run import dry_run
from avalanche_firn.experiments.errors import ConfigError, explain_keys
from avalanche_firn.experiments.methods import make_optimizer
from avalanche_firn.experiments.performance_section import FIGURES, PerformanceConfig, changed_figures
from avalanche_firn.experiments.recipe import dump, list_recipes, load_experiment, load_recipe, parse
from avalanche_firn.experiments.sections import OptimizerConfig
from avalanche_firn.models.compilation import compile_backbone, is_compiled
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.optimizers import optimizer_like

pytestmark = pytest.mark.filterwarnings("ignore")


def config(*chosen: Any, **performance: Any) -> Config:
    raw = {
        "name": "small", "stream": {"name": "digits"}, "training": {"batch_size": 32}, "performance": performance,
        "methods": list(chosen) or ["naive"],
    }  # fmt: skip
    return validate(raw)


# -------------------------------------------------------------------- identity
def test_a_configuration_without_the_section_is_the_experiment_that_it_was() -> None:
    for recipe in list_recipes():
        loaded = load_experiment(recipe.path)
        assert "performance" not in loaded.identity(), recipe.name
    old = config().model_dump()
    del old["performance"]
    assert validate(old).digest() == config().digest()


@pytest.mark.parametrize(
    "values",
    [
        {"fast_path": False}, {"memory": "off"}, {"memory": "mapped", "memory_gb": 2.5}, {"one_pass_evaluation": False},
        {"persistent_workers": False}, {"prefetch_factor": 8}, {"fused_optimizer": "auto", "accumulate": 1},
    ],
)  # fmt: skip
def test_what_changes_no_figure_is_no_part_of_a_run(values: dict[str, Any]) -> None:
    assert config(**values).digest() == config().digest()


@pytest.mark.parametrize(
    "values",
    [
        {"device_augmentation": True}, {"device_augmentation": True, "stored_edge": 64}, {"compile": True},
        {"accumulate": 4}, {"fused_optimizer": "on"}, {"fused_optimizer": "off"},
    ],
)  # fmt: skip
def test_what_may_change_figures_is(values: dict[str, Any]) -> None:
    changed = config(**values)
    assert changed.digest() != config().digest()
    assert changed.digest(seeds=False) != config().digest(seeds=False)
    assert changed.identity()["performance"] == values
    assert config(**values, memory="cpu", prefetch_factor=2).digest() == changed.digest()
    assert validate(parse(dump(changed))).digest() == changed.digest()


def test_every_field_is_one_or_the_other() -> None:
    harmless = {"fast_path", "memory", "memory_gb", "one_pass_evaluation", "persistent_workers", "prefetch_factor"}
    harmless |= {"finite_guard", "worker_timeout"}
    assert set(PerformanceConfig.model_fields) == harmless | set(FIGURES)
    assert changed_figures({}) == changed_figures(PerformanceConfig().model_dump()) == {}
    keys = {key: text for key, _, text in explain_keys(Config)}
    assert all(keys[f"performance.{name}"] for name in PerformanceConfig.model_fields)


def test_words_that_yaml_reads_as_booleans() -> None:
    section = load_recipe("digits", ["performance.memory=off", "performance.fused_optimizer=on"]).performance
    assert (section.memory, section.fused_optimizer) == ("off", "on")
    assert load_recipe("digits", ["performance.fused_optimizer=false"]).performance.fused_optimizer == "off"
    assert PerformanceConfig.model_validate(parse(dump(section))) == section


# ------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("values", "chosen", "message"),
    [
        ({"accumulate": 0}, [], "performance.accumulate: 0 isn't accepted; accepted: a whole number, at least 1"),
        ({"accumulate": 2.0}, [], "performance.accumulate: 2.0 isn't accepted"),
        (
            {"memory": "ram"},
            [],
            "performance.memory: 'ram' isn't accepted; accepted: one of auto, off, cpu, device, map",
        ),
        ({"memory": True}, [], "performance.memory: True isn't accepted"),
        ({"memory_gb": 0.0}, [], "performance.memory_gb: 0.0 isn't accepted"),
        (
            {"memory": "off", "memory_gb": 1.0},
            [],
            "performance.memory_gb: 1.0 is set, but memory is off; accepted: null",
        ),
        ({"memory": "off", "device_augmentation": True}, [], "performance.device_augmentation: true with memory off"),
        ({"stored_edge": 64}, [], "performance.stored_edge: 64 is set without device_augmentation"),
        ({"prefetch_factor": 0}, [], "performance.prefetch_factor: 0 isn't accepted"),
        ({"acumulate": 2}, [], "did you mean performance.accumulate"),
        (
            {"accumulate": 3},
            ["naive", {"strategy": "joint", "training": {"batch_size": 24}}],
            "performance.accumulate: 3 doesn't divide the batch size 32 (naive); accepted: a divisor of all batch "
            "sizes: 1, 2, 4, 8",
        ),
        ({"accumulate": 4}, ["co2l"], "performance.accumulate: 4 with co2l: co2l compares the images of a batch"),
        ({"accumulate": 4}, [{"strategy": "cila", "name": "mine"}], "4 with mine: cila compares"),
        ({"accumulate": 4}, ["scr"], "performance.accumulate: 4 with scr: scr compares"),
        ({"accumulate": 4}, ["naive", "der"], "performance.accumulate: 4 with der: der adds means"),
        (
            {"accumulate": 4},
            ["naive", "lorac_ipc"],
            "methods[1].importance.threshold: 0.05 with performance.accumulate 4: importance needs whole batches; "
            "accepted: 0, or performance.accumulate: 1",
        ),
        (
            {"accumulate": 4},
            [{"strategy": "avalanche_replay", "rehearsal": {"batch_size_mem": 8}}],
            "methods[0].rehearsal.batch_size_mem: 8 with performance.accumulate 4",
        ),
        (
            {"accumulate": 4},
            [{"strategy": "naive", "zapping": {"schedule": "iteration", "every": 50}}],
            "methods[0].zapping.schedule: iteration with performance.accumulate 4",
        ),
        ({"compile": True}, ["naive", "slca_plus_plus", "lora"], "performance.compile: true with slca_plus_plus, lora"),
    ],
)
def test_errors_name_field_value_and_what_is_accepted(values: dict[str, Any], chosen: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*chosen, **values)
    assert message in str(caught.value)


def test_all_errors_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config("der", {"strategy": "slow_learner", "training": {"epochs": 0}}, "lora", accumulate=5, compile=True)
    assert "epochs" in str(caught.value)
    raw = {"training": {"schedule": {"name": "multistep", "milestones": [18]}}, "methods": ["der", "lora"]}
    raw["methods"] += [{"strategy": "naive", "training": {"epochs": 10}}]
    with pytest.raises(ConfigError) as caught:
        validate({"name": "x", "stream": {"name": "digits"}, "performance": {"accumulate": 5, "compile": True}} | raw)
    text = str(caught.value)
    for part in ("methods[2].training.schedule", "performance.compile", "doesn't divide", "5 with der"):
        assert part in text


@pytest.mark.parametrize("strategy", ["slca", "slca_plus_plus", "lora", "lp_ft", "replay", "ewc", "lwf", "joint"])
def test_methods_that_can_do_with_parts(strategy: str) -> None:
    assert config(strategy, accumulate=8).performance.accumulate == 8
    lorac = {"strategy": "lorac_ipc", "importance": {"threshold": 0.0}}
    assert config(lorac, {"strategy": "naive", "zapping": {"schedule": "epoch"}}, accumulate=8)


def test_transfer_experiments_have_no_such_section() -> None:
    with pytest.raises(ConfigError, match="performance"):
        load_experiment("zapping_omniglot", ["performance.accumulate=2"])


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "performance.accumulate=4", "--no-data"]) == 0
    assert main(["check", "digits", "performance.accumulate=5", "--no-data"]) == 2
    assert "performance.accumulate: 5 doesn't divide the batch size 32" in capsys.readouterr().err


# ------------------------------------------------------------------- optimizers
OPTIMIZERS = [
    OptimizerConfig(lr=0.05), OptimizerConfig(name="adam", lr=0.01), OptimizerConfig(name="adamw", lr=0.01),
]  # fmt: skip


@pytest.mark.parametrize("section", OPTIMIZERS, ids=lambda o: o.name)
def test_fused_and_default_agree(section: OptimizerConfig) -> None:
    found = []
    for fused in (None, True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        optimizer = make_optimizer(section, model, fused=fused)
        assert optimizer.defaults["fused"] is fused
        optimizer = optimizer_like(optimizer, [{"params": list(model.parameters())}])
        assert optimizer.defaults["fused"] is fused and optimizer.param_groups[0]["fused"] is fused
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


class Parts(methods.Ingredients):
    """Ingredients without a backbone."""


@pytest.mark.parametrize(
    ("choice", "device", "fused"),
    [("auto", "cpu", None), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False), ("off", "cpu", False)],
)
def test_where_an_optimizer_is_fused(choice: str, device: str, fused: bool | None) -> None:
    parts = Parts(config(fused_optimizer=choice), None, torch.device(device), [], None)  # type: ignore[arg-type]
    assert parts.common(nn.Linear(2, 2))["optimizer"].defaults["fused"] is fused


def test_mini_batches_and_their_plugin() -> None:
    plain, own = (
        Parts(config(accumulate=n), None, torch.device("cpu"), [SupervisedPlugin()], None)  # type: ignore[arg-type]
        for n in (1, 8)
    )
    assert [p.common(nn.Linear(2, 2))["train_mb_size"] for p in (plain, own)] == [32, 4]
    assert len(plain.extra_plugins()) == 1
    steps = [p.steps for p in own.extra_plugins() if isinstance(p, GradientAccumulationPlugin)]
    assert steps == [8]


# ------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of six random textures, and a recipe for them."""
    base = tmp_path_factory.mktemp("performance")
    random = np.random.RandomState(0)
    for c in range(4):
        folder = base / "data" / f"class{c}"
        folder.mkdir(parents=True)
        wave = np.sin(np.arange(32) * (c + 1) / 3)[None, :, None] * 60 + 128
        for i in range(8):
            pixels = np.clip(wave + random.randn(32, 32, 3) * 30, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    path = base / "small.yaml"
    path.write_text(
        f"""
name: small
seeds: [0]
device: cpu
stream: {{name: folder, root: {base / "data"}, tasks: 2, augment: false}}
training: {{epochs: 2, batch_size: 4, optimizer: {{lr: 0.01}}}}
checkpoint: {{every: 1}}
methods: [naive]
"""
    )
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (last,) = (folder / "checkpoint").glob("step-*")
    return {n: t for n, t in load_file(last / "tensors.safetensors").items() if t.is_floating_point()}


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run with all defaults."""
    folder = tmp_path_factory.mktemp("plain")
    return runner.run(load_recipe(recipe), folder, quiet=True), folder


def assert_close(folder: Path, other: Path) -> None:
    mine, theirs = weights(folder), weights(other)
    names = [name for name in theirs if name.startswith("strategy/model/")]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_accumulation_in_a_run(recipe: Path, plain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """The same network as with whole batches, after more iterations."""
    results = runner.run(load_recipe(recipe, ["performance.accumulate=2"]), tmp_path, quiet=True)
    assert_close(tmp_path, plain[1])
    assert results["performance"] == plain[0]["performance"] | {"accumulate": 2}
    assert results["config_digest"] != plain[0]["config_digest"]
    rows = [(folder / "metrics.csv").read_text() for folder in (tmp_path, plain[1])]
    steps = [max(int(line.split(",")[0]) for line in text.splitlines()[1:]) for text in rows]
    assert steps[0] > steps[1]


def test_a_fused_optimizer_in_a_run(recipe: Path, plain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results = runner.run(load_recipe(recipe, ["performance.fused_optimizer=on"]), tmp_path, quiet=True)
    assert_close(tmp_path, plain[1])
    assert results["performance"]["fused_optimizer"] is True and plain[0]["performance"]["fused_optimizer"] is False


class Stop(Exception):
    pass


@pytest.mark.parametrize("override", ["accumulate=2", "fused_optimizer=on", "compile=true"])
def test_a_run_that_stops_and_goes_on(
    override: str, recipe: Path, plain: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed inside an epoch, resumed with other values of what changes no figure: the same to the bit. And the same
    up to rounding as without the setting."""
    torch._dynamo.reset()
    compiled: list[nn.Module] = []

    def compile_eager(model: nn.Module) -> None:
        compile_backbone(model, backend="eager")
        compiled.append(model)

    monkeypatch.setattr(methods, "compile_backbone", compile_eager)
    words = [f"performance.{override}"]
    whole = runner.run(load_recipe(recipe, words), tmp_path / "whole", quiet=True)
    assert_close(tmp_path / "whole", plain[1])
    assert whole["performance"] != plain[0]["performance"]
    build = methods.METHODS["naive"].build

    class Bomb(SupervisedPlugin):
        stateless = True

        def after_forward(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_iterations == armed[0]:
                raise Stop

    def with_bomb(parts: Any) -> Any:
        strategy = build(parts)
        strategy.plugins.insert(0, Bomb())
        return strategy

    monkeypatch.setitem(methods.METHODS, "naive", methods.Method(with_bomb))
    armed = [5]
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        runner.run(load_recipe(recipe, words), folder, quiet=True)
    armed[0] = -1
    resumed = runner.run(load_recipe(recipe, [*words, "performance.prefetch_factor=2"]), folder, quiet=True)
    del whole["cost"], resumed["cost"]
    assert json.dumps(resumed, sort_keys=True) == json.dumps(whole, sort_keys=True)
    mine, theirs = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(compiled) == (3 if override == "compile=true" else 0) and all(map(is_compiled, compiled))
    torch._dynamo.reset()


def test_a_dry_run_with_parts_of_batches_and_zaps():
    config = load_recipe("zapping_stream_digits", ["performance.accumulate=2", "seeds=[0]"])
    lines = list(dry_run(config))
    assert len(lines) == len(config.methods) and all("training steps" in line for line in lines)
