"""What ``docs/determinism.md`` claims: what is identical to the bit, and how large the rest is.

Runs are those of the random kills (``kill_cases.py``) and of the recipe ``digits`` with the embedded backbone. Each is
a process of its own; some have another hash seed and folders listed in another order.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from kill_cases import CASES, METHODS, story
from kill_runs import Runs

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "determinism.md"
IDENTITY = ("config_digest", "group_digest", "performance")  # say how a run was made, not what came out of it
ONE_TASK = ("threads=1", "device=cpu", "training.epochs=1", "seeds=[0]")


@pytest.fixture(scope="module")
def other_runs() -> Iterator[Runs]:
    """A second server, whose strings have other hashes."""
    server = Runs(PYTHONHASHSEED="4321")
    yield server
    server.close()


def outcome(folder: Path, case: str, name: str = "kills") -> dict[str, Any]:
    """What came out of a run: its story without the settings."""
    found = story(folder / name / case / "seed-0")
    found["results"] = {key: value for key, value in found["results"].items() if key not in IDENTITY}
    return found


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for part, value in first.items():
        assert value == second[part], part


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """The floating-point weights of a finished run."""
    from safetensors.torch import load_file

    from avalanche_firn.plugins.checkpoint_files import checkpoints

    stored = load_file(checkpoints(run / "checkpoint")[0] / "tensors.safetensors")
    return {k: v for k, v in stored.items() if k.startswith("strategy/model") and v.is_floating_point()}


def largest_difference(first: Path, second: Path) -> float:
    one, two = tensors_of(first), tensors_of(second)
    assert one.keys() == two.keys() and len(one) > 20
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# ------------------------------------------------------------------------------------------ identical to the bit
def twice(case: str, first: Runs, second: Runs, recipe: Path, place: Path) -> None:
    """The same run in two processes, folders listed in another order in one of them."""
    assert first.launch(place / "one", recipe) is None
    assert second.launch(place / "two", recipe, shuffle=7) is None
    assert_same(outcome(place / "one", case), outcome(place / "two", case))


@pytest.mark.parametrize("case", ["slca"])
def test_two_processes_give_the_same_bits(case: str, runs: Runs, recipes: dict[str, Path], run_root: Path) -> None:
    twice(case, runs, runs, recipes[case], run_root / "twice" / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_method_gives_the_same_bits_again(
    case: str, runs: Runs, other_runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """Also with other hashes of strings."""
    twice(case, runs, other_runs, recipes[case], run_root / "again" / case)


@pytest.mark.slow
def test_another_seed_gives_other_bits(runs: Runs, recipes: dict[str, Path], run_root: Path) -> None:
    """What is compared here can differ."""
    place = run_root / "seeds"
    assert runs.launch(place, recipes["slca"], "seed=0") is None
    assert runs.launch(place, recipes["slca"], "seed=1") is None
    first, second = (story(place / "kills" / "slca" / f"seed-{seed}") for seed in (0, 1))
    assert first["tensors"] != second["tensors"] and first["metrics"] != second["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("training.num_workers=1",), ("training.num_workers=2",)])
def test_workers_change_nothing_without_random_transforms(
    words: tuple[str, ...], runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """Images read from files, by the main process and by others."""
    place, case = run_root / "workers", "linear_probe"
    files = "performance.memory=off"
    assert runs.launch(place / "none", recipes[case], files) is None
    assert runs.launch(place / words[0], recipes[case], files, *words) is None
    assert_same(outcome(place / "none", case), outcome(place / words[0], case))


@pytest.mark.slow
def test_random_transforms_are_the_same_whatever_the_number_of_workers(
    runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """Above none: without any the main process draws them from the generators that everything else draws from."""
    place, case = run_root / "augmented", "zapping"
    for workers in (0, 1, 2):
        words = ("performance.memory=off", f"training.num_workers={workers}")
        assert runs.launch(place / str(workers), recipes[case], *words) is None
    none, one, two = (outcome(place / str(workers), case) for workers in (0, 1, 2))
    assert_same(one, two)
    assert none["tensors"] != one["tensors"]


@pytest.mark.slow
def test_the_fast_path_draws_other_numbers_in_loader_processes(
    runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """And the results say that it was off."""
    place, case = run_root / "augmented", "zapping"
    words = ("performance.memory=off", "training.num_workers=1")
    for name, more in (("1", ()), ("slow", ("performance.fast_path=false",))):
        if not (place / name).exists():
            assert runs.launch(place / name, recipes[case], *words, *more) is None
    fast, slow = (story(place / name / "kills" / case / "seed-0") for name in ("1", "slow"))
    assert fast["tensors"] != slow["tensors"]
    assert slow["results"]["performance"] == fast["results"]["performance"] | {"fast_path": False}
    assert slow["results"]["config_digest"] == fast["results"]["config_digest"]  # of what is the same experiment


def digits(runs: Runs, place: Path, *words: str) -> dict[str, Any]:
    """SLCA on the recipe digits, an epoch per task."""
    assert runs.launch(place, "digits", "method=slca", *ONE_TASK, *words) is None
    return outcome(place, "slca", "digits")


@pytest.mark.slow
def test_the_recipe_digits_gives_the_same_bits_with_workers(runs: Runs, other_runs: Runs, run_root: Path) -> None:
    """The embedded backbone; images are in memory, with workers and without."""
    none = digits(runs, run_root / "digits" / "0")
    for workers in (1, 2):
        assert_same(none, digits(other_runs, run_root / "digits" / str(workers), f"training.num_workers={workers}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("performance.fast_path=false",),
        ("performance.memory=off",),
        ("performance.memory=mapped",),
        ("performance.fast_path=false", "performance.memory=off"),
    ],
    ids=lambda words: " ".join(words).replace("performance.", ""),
)
def test_what_makes_a_run_fast_changes_no_bit(
    words: tuple[str, ...], runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """But for the evaluation in one pass, whose batches have another size."""
    place, case = run_root / "fast", "slca"
    alike = "performance.one_pass_evaluation=false"
    if not (place / "usual").exists():
        assert runs.launch(place / "usual", recipes[case], alike) is None
    assert runs.launch(place / "-".join(words), recipes[case], alike, *words) is None
    assert_same(outcome(place / "usual", case), outcome(place / "-".join(words), case))


@pytest.mark.slow
def test_alone_or_in_a_comparison_in_any_order(runs: Runs, recipes: dict[str, Path], run_root: Path) -> None:
    """Runs of a comparison share a process, and leave nothing behind in it."""
    import json

    place, cases = run_root / "compared", ("slca", "lorac_ipc", "replay")
    recipe = json.loads(recipes["slca"].read_text())
    recipe["methods"] = [{"name": case, **METHODS[case][0]} for case in cases]
    for name, methods in (("forwards", recipe["methods"]), ("backwards", recipe["methods"][::-1])):
        file = run_root / f"{name}.yaml"
        file.write_text(json.dumps({**recipe, "methods": methods}))
        assert runs.launch(place / name, file, command="compare") is None
    assert runs.launch(place / "alone", run_root / "forwards.yaml", "method=lorac_ipc") is None
    alone = outcome(place / "alone", "lorac_ipc")
    for name in ("forwards", "backwards"):
        assert_same(alone, outcome(place / name, "lorac_ipc"))
    for case in cases:
        assert_same(outcome(place / "forwards", case), outcome(place / "backwards", case))


# ------------------------------------------------------------------------------------------------- deterministic
def test_deterministic_is_part_of_a_run_only_where_it_is_asked_for(recipes: dict[str, Path]) -> None:
    """Digests of runs that were made before there was the switch stay what they are."""
    from avalanche_firn.experiments.recipe import load_recipe

    usual, asked = load_recipe("digits"), load_recipe("digits", ["deterministic=true"])
    assert not usual.deterministic and "deterministic" not in usual.identity()
    assert asked.identity()["deterministic"] is True and asked.digest() != usual.digest()
    assert load_recipe("digits", ["deterministic=false"]).digest() == usual.digest()


def test_deterministic_reaches_torch_and_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from avalanche_firn.experiments.environment import use_deterministic

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        use_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_every_method_runs_with_deterministic_algorithms(
    case: str, runs: Runs, recipes: dict[str, Path], run_root: Path
) -> None:
    """None of them needs an operation that has no deterministic form; on a CPU all have, and nothing changes."""
    place = run_root / "deterministic"
    assert runs.launch(place / "usual", recipes[case]) is None
    assert runs.launch(place / "asked", recipes[case], "deterministic=true") is None
    assert_same(outcome(place / "usual", case), outcome(place / "asked", case))


# --------------------------------------------------------------------------------------------- what is not identical
@pytest.mark.slow
def test_another_number_of_threads_differs_in_the_last_bits_at_most(runs: Runs, run_root: Path) -> None:
    """Sums are cut into other parts; nothing is claimed but the size of what follows from it."""
    place = run_root / "threads"
    for threads in (1, 2):
        words = ("method=slca", *ONE_TASK[1:], f"threads={threads}", "checkpoint.every=0")
        assert runs.launch(place / str(threads), "digits", *words) is None
    first, second = (place / str(threads) / "digits" / "slca" / "seed-0" for threads in (1, 2))
    difference = largest_difference(first, second)
    print(f"largest difference of a weight, 1 and 2 threads: {difference:.1e}")
    assert difference < 1e-3


# ------------------------------------------------------------------------------------------------------------- CUDA
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_device(place: Path, *words: str) -> Path:
    """SLCA on the recipe digits in a fresh process; the folder of the run."""
    command = [sys.executable, "-m", "avalanche_firn.experiments.cli", "run", "digits", "method=slca", *words]
    done = subprocess.run([*command, "--output", str(place), "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "digits" / "slca" / "seed-0"


@needs_cuda
@pytest.mark.parametrize("words", [(), ("deterministic=true",), ("precision=bf16",)])
def test_two_runs_on_one_gpu_give_the_same_bits(words: tuple[str, ...], run_root: Path) -> None:
    place = run_root / "gpu" / ("-".join(words) or "usual")
    runs = [on_device(place / n, "device=cuda", "training.epochs=1", *words) for n in ("one", "two")]
    first, second = (story(run) for run in runs)
    assert_same(first, second)


@needs_cuda
def test_a_gpu_and_a_cpu_agree_within_rounding(run_root: Path) -> None:
    """An epoch per task at 0.003: weights within 1e-3, accuracies within 3 of 100."""
    place = run_root / "gpu" / "cpu"
    runs = [on_device(place / d, f"device={d}", "training.epochs=1", "threads=1") for d in ("cpu", "cuda")]
    assert largest_difference(*runs) < 1e-3
    last = [story(run)["results"]["figures"]["accuracy/last"] for run in runs]
    assert abs(last[0] - last[1]) < 0.03


# ---------------------------------------------------------------------------------------------------- the document
def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_document_names_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if name not in names_in(ROOT / file)]
    assert len(set(named)) >= 12 and not missing


def test_the_document_names_every_test_of_this_module() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    own = {name for name in names_in(Path(__file__)) if name.startswith("test_") and "document" not in name}
    assert not {name for name in own if f"test_determinism.py::{name}`" not in text}
