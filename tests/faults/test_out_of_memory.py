"""No memory left in the middle of a task: said in words with settings that help, and resumed with smaller batches."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.memory_advice import memory_advice
from avalanche_firn.experiments.recipe import dump, load_recipe
from avalanche_firn.experiments.results_form import read_environment
from avalanche_firn.experiments.resume_settings import (
    accepted_settings,
    declared,
    declared_text,
    plan_with_settings,
    with_settings,
)
from avalanche_firn.experiments.run_folders import Planned
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.fast_path import FastPathPlugin
from avalanche_firn.plugins.memory_stop import is_out_of_memory
from avalanche_firn.plugins.rehearsal import RehearsalPlugin
from avalanche_firn.plugins.run_errors import NonFiniteError, OutOfMemoryStop

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from checkpoint_recipes import Bomb, Crash, sgd, stream
from fault_tools import Strike, assert_same, firn, shared_recipe, single, strike_loss, weights, whole_run

pytestmark = pytest.mark.filterwarnings("ignore")


def cuda_error() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")


def raised(work: Any) -> Exception:
    """What such a call raises on this machine."""
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        work()
    return caught.value


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_recipe(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that always had enough."""
    return whole_run(tmp_path_factory)


@pytest.fixture(scope="module")
def cut(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its ninth step."""
    folder = tmp_path_factory.mktemp("cut") / "naive" / "seed-0"
    with pytest.MonkeyPatch.context() as patch:
        strike_loss(patch, 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(single(recipe), folder, quiet=True, say=None)
    return folder


# --------------------------------------------------------------- what counts as it
@pytest.mark.parametrize(
    "error",
    [
        cuda_error(),
        MemoryError(),
        raised(lambda: np.empty(2**62, dtype=np.uint8)),
        raised(lambda: torch.empty(2**60)),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n...: can't allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:24]}",
)
def test_errors_of_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    try:
        raise ValueError("wrapped") from error
    except ValueError as wrapped:
        assert is_out_of_memory(wrapped)


def test_other_errors_are_not() -> None:
    for error in (
        RuntimeError("shapes (2) and (3)"),
        OSError(errno.ENOSPC, "no room"),
        NonFiniteError("out of memory"),
    ):
        assert not is_out_of_memory(error)


# ------------------------------------------------------------------ from the command line
def test_told_and_resumed_with_parts_of_a_batch(
    recipe: Path, reference: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    words = ["run", recipe, "method=naive", "seed=0", "checkpoint.every=2", "--output", tmp_path, "--quiet"]
    with monkeypatch.context() as patch:
        strike = strike_loss(patch, 12, cuda_error)  # the last step
        status, _, told = firn(words, capsys)
    assert strike.struck and status == 1 and "Traceback" not in told
    assert "out of memory in training of task 2/2 (classes " in told
    assert "), epoch 2/2, iteration 3 (6 of the task), on cpu (" in told and "CUDA out of memory. Tried to" in told
    assert f"The last checkpoint, {folder / 'checkpoint' / 'step-000000010'}, is kept: 1 iteration back" in told
    # what changes no figure first, then what does, each with a command
    order = [
        "performance.memory=mapped",
        "performance.memory=off",
        "performance.accumulate=2",
        "performance.accumulate=4",
    ]
    places = [told.index(setting) for setting in order]
    assert places == sorted(places) and told.index("changes no figure") < told.index("may change figures")
    assert f"go on with: firn resume {folder} performance.memory=mapped\n" in told
    assert f"or: firn resume {folder} performance.memory=mapped performance.accumulate=2" in told
    assert "another experiment, under another name=: precision=bf16, training.batch_size=2" in told

    before = (folder / "config.yaml").read_bytes()
    status, _, told = firn(["resume", folder, "performance.accumulate=4", "--quiet"], capsys)
    assert status == 0, told
    assert (folder / "config.yaml").read_bytes() == before
    mine, whole = (json.loads((place / "results.json").read_text()) for place in (folder, reference))
    assert mine["config_digest"] == whole["config_digest"] and mine["stream"] == whole["stream"]
    given = {"from": "step-000000010", "settings": {"performance.accumulate": 4}}
    assert mine["performance"] == whole["performance"] | {"resumed_with": [given]}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["resumed_in"][0]["settings"] == {"performance.accumulate": 4}
    ours, theirs = (
        {k: v for k, v in weights(f).items() if k.startswith("strategy/model")} for f in (folder, reference)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert declared_text(mine) == "performance.accumulate=4 from step-000000010" and not declared_text(whole)
    status, out, _ = firn(["report", folder], capsys)
    assert "CAUTION: resumed with other settings: naive seed 0 (performance.accumulate=4 from step-000000010)" in out
    # finished: it belongs to its comparison, as the one of the recipe
    assert firn([*words], capsys)[0] == 0


@pytest.mark.slow
def test_resumed_as_it_was_is_the_same_to_the_bit(
    recipe: Path, reference: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "naive" / "seed-0"
    with monkeypatch.context() as patch:
        strike_loss(patch, 9, MemoryError)
        with pytest.raises(OutOfMemoryStop, match=r"(?s)out of memory in training of task 2/2.*performance.memory"):
            run(single(recipe), folder, quiet=True, say=None)
    off = with_settings(single(recipe), ["performance.memory=off", "checkpoint.every=1"])
    run(single(recipe), folder, quiet=True, say=None, running=off)  # changes no figure
    assert_same(folder, reference)


@pytest.mark.parametrize(
    ("where", "phase", "helps"),
    [
        (
            "avalanche_firn.plugins.class_statistics._centre",
            "class statistics of task 1/2",
            "eval_batch_size=128",
        ),
        (
            "avalanche_firn.plugins.classifier_alignment.align_classifier",
            "classifier alignment, after 2 trained tasks",
            "methods.slca.alignment.samples_per_class=8",
        ),
        ("torch.nn.CrossEntropyLoss.forward", "evaluation of task 1/2 (classes ", "eval_batch_size=128"),
    ],
)
def test_other_phases(where: str, phase: str, helps: str, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    strike = Strike(cuda_error, 1)
    wanted = lambda *args, **kwargs: "Cross" not in where or not torch.is_grad_enabled()  # noqa: E731
    module, _, name = where.rpartition(".")
    owner: Any = nn.CrossEntropyLoss if "Cross" in where else __import__(module, fromlist=["x"])
    method = "naive" if "Cross" in where else "slca"
    monkeypatch.setattr(owner, name, strike.around(getattr(owner, name), name, wanted))
    with pytest.raises(OutOfMemoryStop) as stopped:
        run(single(recipe, method), tmp_path / method / "seed-0", quiet=True, say=None)
    assert phase in str(stopped.value) and helps in str(stopped.value)
    assert "accumulate" not in str(stopped.value)


# --------------------------------------------------------------------- what is advised
def test_advice_names_only_what_fits(recipe: Path) -> None:
    held = {"train/train": "cuda", "test/eval": "cuda"}
    config = single(recipe)
    advice = memory_advice(config, "training", device="cuda", held=held)
    assert advice.same[0][0] == "performance.memory=cpu" and not advice.refused
    assert [setting for setting, _ in advice.rounding] == ["performance.accumulate=2", "performance.accumulate=4"]
    odd = with_size(config, 7)
    assert [s for s, _ in memory_advice(odd, "training", device="cuda", held={}).rounding] == [
        "performance.accumulate=7"
    ]
    none = memory_advice(with_size(config, 1), "training", device="cuda", held={})
    assert not none.rounding and "no smaller equal parts" in none.refused
    contrastive = single(recipe, "cila", "methods=[cila]", "training.schedule={name: none}", "training.batch_size=32",
                         "methods.cila.rates.warmup_epochs=1", "stream.augment=false")  # fmt: skip
    text = memory_advice(contrastive, "training", device="cuda", held=held).text(Path("run"))
    assert "performance.accumulate can't be used here: 2 with cila: cila compares the images" in text
    assert "go on with: firn resume run performance.memory=cpu" in text and "accumulate=" not in text
    workers = with_settings(config, ["training.num_workers=2"])
    told = memory_advice(workers, "training", device="cpu", held={}).text(Path("a b"), ("performance.accumulate=2",))
    assert "performance.prefetch_factor=1" in told and "training.num_workers=0" in told
    assert "firn resume 'a b' performance.accumulate=2 performance.prefetch_factor=1" in told
    again = with_settings(config, ["performance.accumulate=2"])
    told = memory_advice(again, "training", device="cuda", held={}).text(Path("run"), ("performance.accumulate=2",))
    assert told.endswith("go on with: firn resume run performance.accumulate=4")


def with_size(config: Config, size: int) -> Config:
    training = config.training.model_copy(update={"batch_size": size})
    return config.model_copy(update={"training": training})


# ---------------------------------------------------------------- what may be changed
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.batch_size=8", r"training.batch_size: can't be changed in a run that goes on.*accepted: checkpoint"),
        ("precision=bf16", "precision: can't be changed"),
        ("performance.compile=true", "performance.compile: can't be changed"),
        ("performance.device_augmentation=true", "performance.device_augmentation: can't be changed"),
        ("methods.naive.training.epochs=1", "methods.naive.training.epochs: can't be changed"),
        ("performance.acumulate=2", "did you mean performance.accumulate"),
        ("performance.accumulate=3", "3 doesn't divide the batch size 4"),
        ("performance.accumulate=two", "performance.accumulate: 'two' isn't accepted"),
        ("=3", "has no key=value"),
    ],
)
def test_what_would_be_another_experiment_is_refused(
    setting: str, message: str, recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "naive" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(single(recipe)))
    status, _, told = firn(["resume", folder, setting], capsys)
    assert status == 2
    assert re.search(message, told, re.DOTALL), told
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_unknown_settings_are_refused_of_a_finished_run_too(reference: Path, capsys: Any) -> None:
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    status, _, told = firn(["resume", reference, "nonsense.key=1", "precision=bf16", "--quiet"], capsys)
    assert status == 2 and "nonsense.key" in told and "precision: can't be changed" in told, told
    assert firn(["resume", reference, "performance.memory=off", "--quiet"], capsys)[0] == 0
    assert {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()} == before


def test_only_settings_that_were_in_effect_are_declared(
    cut: Path, reference: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """What was stopped before the next checkpoint is done again, with other settings."""
    folder = Path(shutil.copytree(cut, tmp_path / "seed-0"))
    for words in (["performance.accumulate=4"], ["training.eval_batch_size=2", "performance.fast_path=false"]):
        with monkeypatch.context() as patch:
            strike_loss(patch, 1, KeyboardInterrupt)
            assert firn(["resume", folder, *words, "--quiet"], capsys)[0] == 130
    assert firn(["resume", folder, "--quiet"], capsys)[0] == 0
    assert_same(folder, reference)
    entries = json.loads((folder / "environment.json").read_text())["resumed_in"]
    assert [entry["from"] for entry in entries] == ["step-000000008"] * 3 and "settings" in entries[0]


def test_what_is_declared() -> None:
    def entry(place: str, **settings: Any) -> dict[str, Any]:
        return {"from": place, "settings": {key.replace("__", "."): value for key, value in settings.items()}}

    first = entry("start", threads=1)
    end, inside = entry("step-000000009-end", training__eval_batch_size=2), entry("step-000000009", device="cpu")
    old = {"settings": {}}  # of a version that didn't say from where
    for later, kept in (
        ([end], [first, end]),
        ([inside, end], [first, inside, end]),
        ([end, inside], [first, inside]),
        ([inside, {"from": "step-000000009"}], [first]),
        ([inside, {"from": "step-000000012"}], [first, inside]),
        ([inside, old], [first, inside]),
        ([inside, {"from": "start"}], []),
    ):
        assert declared(first | {"resumed_in": later}) == kept
    rounding = {"performance.one_pass_evaluation": False, "performance.fast_path": False, "progress": True}
    told = declared({"settings": rounding})
    assert told == [{"from": "start", "settings": {k: v for k, v in rounding.items() if k != "progress"}}]


@pytest.mark.parametrize(
    "content", ['{"date": ', "[]", '{"resumed_in": 3}', '{"resumed_in": [3]}', '{"settings": 5}', '{"from": 3}']
)
def test_a_damaged_environment_decides_nothing(
    content: str, cut: Path, reference: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(shutil.copytree(cut, tmp_path / "seed-0"))
    (folder / "environment.json").write_text(content)
    with pytest.warns(RuntimeWarning, match=r"environment.json .*; it is kept as refused-environment.json"):
        status, _, told = firn(["resume", folder, "--quiet"], capsys)
    assert status == 0, told
    assert_same(folder, reference)
    assert (folder / "refused-environment.json").read_text() == content
    assert read_environment(folder / "environment.json")["from"] == "step-000000008"


def test_settings_of_a_comparison_reach_its_unfinished_runs(recipe: Path) -> None:
    whole = load_recipe(recipe)
    plan = [Planned(whole.single(m.name, 0), Path(m.name), finished=m.name == "slca") for m in whole.methods]
    found = plan_with_settings(plan, ["performance.accumulate=2"])
    assert [p.running and p.running.performance.accumulate for p in found] == [2, None]
    assert [p.config.performance.accumulate for p in found] == [1, 1]
    assert plan_with_settings(plan, []) == plan
    assert {"performance.accumulate", "performance.memory", "training.num_workers"} <= set(accepted_settings(whole))


@pytest.mark.slow
def test_a_comparison_begun_with_settings_declares_them(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    config = load_recipe(recipe, ["methods=[naive]", "seeds=[0]", "training.epochs=1"])
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "naive" / "seed-0").mkdir(parents=True)  # so it is the folder of a comparison
    status, _, told = firn(["resume", tmp_path, "performance.accumulate=2", "threads=1", "--quiet"], capsys)
    assert status == 0, told
    results = json.loads((tmp_path / "naive" / "seed-0" / "results.json").read_text())
    given = {"from": "start", "settings": {"performance.accumulate": 2}}
    assert results["performance"]["resumed_with"] == [given] and results["performance"]["accumulate"] == 1
    assert results["config_digest"] == config.single("naive", 0).digest()


# ------------------------------------------------------- the same images in every step
class Images(SupervisedPlugin):
    """Images and targets of every optimizer step, in the order in which they are trained on."""

    stateless = True
    affects_results = False

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen, self.open = seen, list[Any]()

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.open.append((strategy.mb_x.clone(), strategy.mb_y.clone()))

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        x, y = (torch.cat(column) for column in zip(*self.open, strict=True))
        self.seen.append((int(strategy.clock.train_exp_counter), x, y))
        self.open.clear()


SLOW_CUTS = [
    ((1, 4), True),
    ((4, 1), True),
    ((2, 3), True),
    ((1, 4, 2, 1), True),
    ((1, 4), False),
    ((4, 1), False),
    ((2, 3), False),
]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def train(folder: Path, steps: int, *, fast: bool, replay: bool = False, stop: int = -1, every: int = 1) -> Any:
    """Three tasks with 12 images per step in ``steps`` mini-batches, to the end or to the crash."""
    torch.manual_seed(0)
    seen: list[Any] = []
    # the bomb counts images, not mini-batches
    plugins: list[Any] = [Bomb("after_update", stop), Images(seen)]
    plugins += [FastPathPlugin()] if fast else []
    plugins += [RehearsalPlugin(20, batches="balanced", seed=1)] if replay else []
    plugins += [GradientAccumulationPlugin(steps)] if steps > 1 else []
    checkpoint = ExactCheckpointPlugin(folder, every=every)
    strategy = sgd(network(), [*plugins, checkpoint], train_mb_size=12 // steps)
    bm = stream()
    start = checkpoint.resume(strategy)
    for experience in bm.train_stream[start:]:
        if not checkpoint.is_trained(experience):
            strategy.train(experience, eval_streams=[])
    return strategy, seen


@pytest.mark.parametrize(
    ("steps", "fast"),
    [
        ((1, 4, 2, 1), False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CUTS),
    ],
    ids=str,
)
def test_the_rest_of_the_epoch_has_the_same_images(steps: tuple[int, ...], fast: bool, tmp_path: Path) -> None:
    """Stopped in the middle of epochs, resumed with other numbers of mini-batches per step, and back."""
    whole, expected = train(tmp_path / "whole", 1, fast=fast)
    seen: list[Any] = []
    for number, stop in zip(steps, [*[7, 6, 4][: len(steps) - 1], -1], strict=True):
        if stop > 0:
            with pytest.raises(Crash):
                train_into(seen, tmp_path / "cut", number, fast, stop)
        else:
            with pytest.warns(RuntimeWarning, match=f"going on with {number} mini-batch.*the same images"):
                strategy = train_into(seen, tmp_path / "cut", number, fast, stop)
    assert len(seen) == len(expected)
    for (task, x, y), (other, x_, y_) in zip(seen, expected, strict=True):
        assert task == other and y.equal(y_) and x.equal(x_)
    for mine, theirs in zip(strategy.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert strategy.clock.train_exp_counter == 3


def train_into(seen: list[Any], folder: Path, steps: int, fast: bool, stop: int) -> Any:
    """Like ``train``, and what was trained on and saved goes to ``seen``, also after a crash."""
    collected: list[Any] = []
    original = Images.__init__

    def shared(self: Images, own: list[Any]) -> None:
        original(self, collected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "__init__", shared)
        try:
            strategy, _ = train(folder, steps, fast=fast, stop=stop)
        except Crash:
            seen += collected  # the bomb strikes first, so without the step that isn't saved
            raise
    seen += collected
    return strategy
