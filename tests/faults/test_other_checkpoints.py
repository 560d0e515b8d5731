"""Checkpoints of something else: format, version, configuration, device, precision, torch, and damaged ones.

Each is refused, or continued with words, as the docstring of ``ExactCheckpointPlugin`` says.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from safetensors.torch import load_file

from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins import checkpoint as checkpoint_module
from avalanche_firn.plugins import checkpoint_files, plain_state, strategy_state
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.checkpoint_files import CheckpointError, checkpoints
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.random_state import capture_random_state, restore_random_state

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from checkpoint_recipes import assert_same, crash, mlp, play, sgd, stream
from fault_tools import Strike, firn, outcome, shared_recipe, single, strike_loss, whole_run
from fault_tools import assert_same as assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and no waiting for the disk: nothing loses power here."""
    torch.set_num_threads(1)
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)


def small(plugins: list[Any], loggers: Any = (), **kwargs: Any) -> Any:
    metrics = EvaluationPlugin(accuracy_metrics(experience=True), loggers=list(loggers))
    return sgd(mlp(), plugins, evaluator=metrics, **kwargs), stream(), {"eval_streams": []}


def recipe_of(*plugins: Callable[[], Any], **kwargs: Any) -> Any:
    def made(own: list[Any], loggers: Any = ()) -> Any:
        return small([*(plugin() for plugin in plugins), *own], loggers, **kwargs)

    return made


BF16 = recipe_of(lambda: MixedPrecisionPlugin("bf16"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return play(small, tmp_path_factory.mktemp("reference"), every=None)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another ``state.json``, with the sum that belongs to it."""
    file = path / "state.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, separators=(",", ":")))
    lines = (path / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums = [f"{digest}  state.json" if line.endswith("state.json") else line for line in lines]
    (path / "SHA256SUMS").write_text("\n".join(sums) + "\n")


# ------------------------------------------------------------------ on another device
def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Numbers with a point are described as those of tensors on a GPU; states of generators never lie there."""
    own = plain_state._Encoder.value

    def value(self: Any, thing: Any, path: str, **options: Any) -> Any:
        found = own(self, thing, path, **options)
        return {"$on": ["cuda:0", found]} if isinstance(found, torch.Tensor) and found.is_floating_point() else found

    patch.setattr(plain_state._Encoder, "value", value)


@pytest.mark.parametrize("there", ["gpu", "cpu"])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("naive", ("training.optimizer={name: adamw}",)),
        ("slca", ()),
        pytest.param("ewc", (), marks=pytest.mark.slow),
        pytest.param("der", ("methods.der.rehearsal.mem_size=8",), marks=pytest.mark.slow),
    ],
)
def test_from_another_kind_of_device(
    there: str, method: str, words: tuple[str, ...], tmp_path: Path, tmp_path_factory: Any, monkeypatch: Any
) -> None:
    """Saved on a GPU and resumed here; or saved here, and what is loaded is compared with tensors on a GPU."""
    config = single(shared_recipe(tmp_path_factory), method, f"methods=[{method}]", *words)
    folder, whole = tmp_path / "cut", tmp_path / "whole"
    run(config, whole, quiet=True, say=None)
    with monkeypatch.context() as patch:
        if there == "gpu":
            as_on_a_gpu(patch)
        strike = Strike(KeyboardInterrupt, 9)
        patch.setattr(BaseSGDTemplate, "backward", strike.around(BaseSGDTemplate.backward, "backward"))
        with pytest.raises(KeyboardInterrupt):
            run(config, folder, quiet=True, say=None)
    text = (checkpoints(folder / "checkpoint")[0] / "state.json").read_text()
    assert (text.count('"$on":["cuda:0"') > 5) is (there == "gpu")
    with monkeypatch.context() as patch:
        if there == "cpu":
            as_on_a_gpu(patch)
        run(config, folder, quiet=True, say=None)
    found, expected = outcome(folder), outcome(whole)
    found["weights"] = {name.replace("/$on/1", ""): content for name, content in found["weights"].items()}
    assert found == expected


# ---------------------------------------------------------------- continued with words
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("torch", "1.13.0", "torch 1.13.0 -> "),
        pytest.param("avalanche_firn", "0.0.9", "avalanche_firn 0.0.9 -> ", marks=pytest.mark.slow),
        pytest.param("avalanche_firn", None, "", marks=pytest.mark.slow),
        pytest.param("numpy", "1.0", "numpy 1.0 -> ", marks=pytest.mark.slow),
        pytest.param("device", "NVIDIA H100", "device NVIDIA H100 -> cpu", marks=pytest.mark.slow),
        pytest.param("threads", "64", "threads 64 -> 1", marks=pytest.mark.slow),
        pytest.param("precision", None, "", marks=pytest.mark.slow),
        pytest.param("quantum", "yes", "quantum yes -> absent", marks=pytest.mark.slow),
    ],
)
def test_another_environment(
    name: str, value: str | None, told: str, tmp_path: Path, reference: Any, monkeypatch: Any
) -> None:
    # the form of a state is recorded with it, see checkpoint_content: as another version would have saved it
    facts = strategy_state.environment

    def other(strategy: Any) -> dict[str, str]:
        found = {key: text for key, text in facts(strategy).items() if key != name}
        return found if value is None else found | {name: value}

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "environment", other)
        crash(small, tmp_path, "before_backward", 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = play(small, tmp_path, seed=99)
    texts = [str(w.message) for w in caught if "another environment" in str(w.message)]
    assert len(texts) == bool(told) and all(told in text and "may differ in the last bits" in text for text in texts)
    assert_same(found, reference)


def test_from_a_machine_with_other_devices(tmp_path: Path, reference: Any, monkeypatch: Any) -> None:
    """Generators of CUDA devices that aren't here are left out, and the device is named."""
    facts, capture = strategy_state.environment, capture_random_state

    def there(**options: Any) -> dict[str, Any]:
        return capture(**options) | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 97}

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "capture_random_state", there)
        patch.setattr(checkpoint_module, "environment", lambda s: facts(s) | {"device": "NVIDIA H100 80GB HBM3"})
        crash(small, tmp_path, "before_backward", 9)
    tensors = load_file(checkpoints(tmp_path)[0] / "tensors.safetensors")
    assert any("cuda" in name for name in tensors)
    with pytest.warns(RuntimeWarning, match="device NVIDIA H100 80GB HBM3 -> cpu"):
        found = play(small, tmp_path, seed=99)
    assert_same(found, reference)
    with pytest.raises(ValueError, match="holds 97 CUDA generators"):
        restore_random_state(there())


@pytest.mark.slow
def test_an_automatic_precision_that_differs(tmp_path: Path, monkeypatch: Any) -> None:
    automatic = recipe_of(lambda: MixedPrecisionPlugin("auto"))
    with monkeypatch.context() as patch:
        patch.setattr(MixedPrecisionPlugin, "resolve", lambda self, device: "bf16")
        crash(automatic, tmp_path, "before_backward", 9)
    with pytest.warns(RuntimeWarning, match="precision bf16 -> fp32"):
        play(automatic, tmp_path)


# ------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("saved", "now", "options", "told"),
    [
        (small, small, {"fingerprint": "another"}, "made with fingerprint None, this run has 'another'"),
        (BF16, small, {}, r"plugins: checkpoint \[.*MixedPrecision.*now \["),
        pytest.param(small, BF16, {}, r"plugins: checkpoint \[.*now \[.*MixedPrecision", marks=pytest.mark.slow),
        (
            BF16,
            recipe_of(lambda: MixedPrecisionPlugin("fp32")),
            {},
            "made with precision bf16, this run has fp32",
        ),
        pytest.param(
            small, recipe_of(train_mb_size=5), {}, "train_mb_size: checkpoint 10, now 5", marks=pytest.mark.slow
        ),
        (
            small,
            recipe_of(lambda: GradientAccumulationPlugin(3), train_mb_size=5),
            {},
            "train_mb_size: checkpoint 10, now 5",
        ),
        pytest.param(small, recipe_of(train_epochs=3), {}, "train_epochs: checkpoint 2, now 3", marks=pytest.mark.slow),
    ],
    ids=["configuration", "bf16 then", "bf16 now", "another precision", "batch", "images per step", "epochs"],
)
def test_another_configuration(saved: Any, now: Any, options: dict[str, Any], told: str, tmp_path: Path) -> None:
    crash(saved, tmp_path, "before_backward", 9)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(CheckpointError, match=told):
        play(now, tmp_path, **options)
    assert {path: path.read_bytes() for path in before} == before  # for whoever goes on with the right one
    play(saved, tmp_path)


@pytest.mark.slow
def test_another_format(tmp_path: Path, reference: Any) -> None:
    """One that this version doesn't know is refused by name; one before it that it knows is used."""
    crash(small, tmp_path, "before_backward", 9)
    new, old = checkpoints(tmp_path)
    edit(new, lambda content: content.update(format=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(play(small, tmp_path, seed=99), reference)
    assert any(
        f"checkpoint refused: {new / 'state.json'} has format 2; 1 is accepted" in str(w.message) for w in caught
    )
    assert old.name != new.name


def test_only_another_format(tmp_path: Path) -> None:
    crash(small, tmp_path, "before_backward", 9, keep=1)
    edit(checkpoints(tmp_path)[0], lambda content: content.update(format=2))
    with pytest.raises(CheckpointError, match=r"has format 2; 1 is accepted.*Restore the files, or start over"):
        play(small, tmp_path)


# -------------------------------------------------------------------------- damaged
def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A recipe, the folder of an interrupted run with two checkpoints, and that of a whole one."""
    torch.set_num_threads(1)
    recipe, cut = shared_recipe(tmp_path_factory), tmp_path_factory.mktemp("cut") / "naive" / "seed-0"
    with pytest.MonkeyPatch.context() as patch:
        strike_loss(patch, 11, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(single(recipe), cut, quiet=True, say=None)
    return recipe, cut, whole_run(tmp_path_factory)


@pytest.mark.parametrize(
    ("damage", "file"),
    [pytest.param(truncated, "tensors.safetensors", marks=pytest.mark.slow), (flipped, "state.json")],
)
def test_the_newest_is_damaged(
    damage: Any, file: str, interrupted: tuple[Path, Path, Path], tmp_path: Path, capfd: Any
) -> None:
    """Said on the command line; the one before is used, and the run ends as if nothing had happened."""
    _, cut, whole = interrupted
    folder = Path(shutil.copytree(cut, tmp_path / "seed-0"))
    new, _ = checkpoints(folder / "checkpoint")
    damage(new / file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, _, told = firn(["resume", folder, "--quiet"], capfd)
    assert status == 0, told
    said = [str(w.message) for w in caught]
    assert any(f"checkpoint refused: {new / file} is truncated or was changed" in text for text in said), said
    assert_same_run(folder, whole)


def test_all_are_damaged(interrupted: tuple[Path, Path, Path], tmp_path: Path, capfd: Any) -> None:
    recipe, cut, whole = interrupted
    folder = Path(shutil.copytree(cut, tmp_path / "tiny" / "naive" / "seed-0"))
    for path in checkpoints(folder / "checkpoint"):
        flipped(path / "tensors.safetensors")
    grown = (folder / "metrics.csv").read_bytes()
    status, _, told = firn(["resume", folder, "--quiet"], capfd)
    assert status == 1 and "Traceback" not in told
    assert "no checkpoint in " in told and told.count("is truncated or was changed") >= 2
    assert "--fresh deletes the run and begins anew" in told and (folder / "metrics.csv").read_bytes() == grown
    words = ["run", recipe, "method=naive", "seed=0", "checkpoint.every=2", f"output={tmp_path}", "--quiet", "--fresh"]
    assert firn(words, capfd)[0] == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_what_a_checkpoint_is_refused_for_can_be_read(tmp_path: Path) -> None:
    """No part of a message is a traceback or a bare number."""
    crash(small, tmp_path, "before_backward", 9, keep=1)
    (tmp_path / "step-000000008").rename(tmp_path / "step-000000007")
    with pytest.raises(CheckpointError) as refused:
        play(recipe_of(train_epochs=3), tmp_path)
    assert re.fullmatch(
        r".*step-000000007 was made by another strategy:\n  train_epochs: .*", str(refused.value), re.DOTALL
    )
