"""An image that can't be read any more: its file, class and split are named, and with the file back the run goes on."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.experiments import runner
from avalanche_firn.experiments.runner import run
from avalanche_firn.plugins.loading_stop import loading_error
from avalanche_firn.plugins.run_errors import DataLoadingError, NonFiniteError

sys.path.append(str(Path(__file__).parent))
from fault_tools import assert_same, firn, make_recipe, single, strike_loss

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files for training, JPEG files for testing, in folders of their own."""
    base = tmp_path_factory.mktemp("recipe")
    path = make_recipe(base)
    for c in range(4):
        files = sorted((base / "data" / f"class{c}").glob("*.png"))
        for part, chosen in (("train", files[:6]), ("test", files[6:])):
            folder = base / "data" / part / f"class{c}"
            folder.mkdir(parents=True)
            for file in chosen:
                image = Image.open(file)
                image.save(folder / (file.stem + (".png" if part == "train" else ".jpg")))
        shutil.rmtree(base / "data" / f"class{c}")
    return path


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs that could read everything, by the number of loader processes."""
    made: dict[int, Path] = {}

    def get(workers: int) -> Path:
        if workers not in made:
            made[workers] = tmp_path_factory.mktemp("whole") / "naive" / "seed-0"
            run(config(recipe, workers, "off"), made[workers], quiet=True, say=None)
        return made[workers]

    return get


def config(recipe: Path, workers: int, memory: str) -> Any:
    return single(recipe, "naive", f"training.num_workers={workers}", f"performance.memory={memory}")


# ------------------------------------------------------------------------- damages
def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("404 Not Found")


DAMAGES = (truncated, emptied, text, Path.unlink)


class Damage:
    """Damages the images of a class in a split, and puts them back."""

    def __init__(self, recipe: Path, split: str, kind: Callable[[Path], Any]) -> None:
        self.files = sorted((recipe.parent / "data" / split / "class2").iterdir())
        self.kept = {path: path.read_bytes() for path in self.files}
        self.kind, self.split = kind, split

    def do(self) -> None:
        for path in self.files:
            self.kind(path)

    def undo(self) -> None:
        for path, content in self.kept.items():
            path.write_bytes(content)

    def assert_named(self, told: str) -> None:
        assert any(str(path) in told for path in self.files), told
        assert f"(class 'class2', {self.split})" in told, told


CASES = [(kind, split, workers) for kind in DAMAGES for split in ("train", "test") for workers in (0, 2)]
QUICK = [(text, "test", 0)]


@pytest.mark.parametrize(
    ("kind", "split", "workers"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK)],
)
def test_damaged_while_a_run_goes_on(
    kind: Any, split: str, workers: int, recipe: Path, reference: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """In the second step of the task with the class, or of the one before; images are read anew each time."""
    expected, folder = reference(workers), tmp_path / "naive" / "seed-0"
    damage = Damage(recipe, split, kind)
    try:
        with monkeypatch.context() as patch:
            strike = strike_loss(patch, 2, KeyError)
            strike.check = counted(2, damage.do)  # type: ignore[method-assign]
            with pytest.raises(DataLoadingError) as stopped:
                run(config(recipe, workers, "off"), folder, quiet=True, say=None)
    finally:
        damage.undo()
    told = str(stopped.value)
    damage.assert_named(told)
    phase = "training of task " if split == "train" else "evaluation"
    assert told.startswith(f"images can't be loaded in {phase}"), told
    assert f"The last checkpoint, {folder / 'checkpoint'}/step-" in told and "Traceback" not in told
    run(config(recipe, workers, "off"), folder, quiet=True, say=None)
    assert_same(folder, expected)


def counted(at: int, act: Callable[[], None]) -> Callable[[str], None]:
    calls = iter(range(1, 10**6))

    def check(what: str) -> None:
        if next(calls) == at:
            act()

    return check


@pytest.mark.parametrize(
    ("memory", "split"),
    [
        ("auto", "train"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("auto", "test"), ("off", "train"), ("off", "test"))
        ),
    ],
)
def test_damaged_after_the_stream_was_built(
    memory: str, split: str, recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Held in memory it is found before there is anything of the run, else when it is read."""
    damage = Damage(recipe, split, truncated)
    build = runner.build_stream

    def built(*args: Any) -> Any:
        stream = build(*args)
        damage.do()
        return stream

    words = ["run", recipe, "method=naive", "seed=0", f"output={tmp_path}", f"performance.memory={memory}"]
    words += ["stream.augment=false", "--quiet"]  # images to train on are held, too
    try:
        with monkeypatch.context() as patch:
            patch.setattr(runner, "build_stream", built)
            status, _, told = firn(words, capsys)
    finally:
        damage.undo()
    assert status == 1 and "Traceback" not in told
    damage.assert_named(told)
    folder = tmp_path / "tiny" / "naive" / "seed-0"
    assert f"go on with: firn resume {folder}" in told
    if memory == "auto":
        assert "images can't be loaded in holding images in memory" in told and not folder.exists()


def test_damaged_before_the_stream_is_built(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    damage = Damage(recipe, "train", emptied)
    try:
        damage.do()
        status, _, told = firn(["run", recipe, "method=naive", "seed=0", f"output={tmp_path}"], capsys)
    finally:
        damage.undo()
    assert status == 2 and str(damage.files[0]) in told and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_held_images_need_no_files(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What is in memory is read once: files that are damaged later are not missed."""
    words = ("stream.augment=false", "performance.memory=cpu")
    expected, folder = tmp_path / "whole" / "seed-0", tmp_path / "cut" / "seed-0"
    run(single(recipe, "naive", *words), expected, quiet=True, say=None)
    damage = Damage(recipe, "test", Path.unlink)
    try:
        with monkeypatch.context() as patch:
            strike_loss(patch, 1, KeyError).check = counted(1, damage.do)  # type: ignore[method-assign]
            run(single(recipe, "naive", *words), folder, quiet=True, say=None)
    finally:
        damage.undo()
    assert_same(folder, expected)


# ------------------------------------------------------------------- what counts as it
def raised_in(work: Callable[[], Any]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class Torn(torch.utils.data.Dataset[Any]):
    """Reads an image as data sets of others do, which name no file."""

    def __init__(self, path: Path, error: Exception | None = None) -> None:
        self.path, self.error = path, error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if self.error is not None:
            raise self.error
        return np.asarray(Image.open(self.path))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_sets_of_others(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    truncated(path)
    loader = torch.utils.data.DataLoader(Torn(path), num_workers=workers)
    told = loading_error(raised_in(lambda: list(loader)))
    assert told is not None and "truncated" in str(told) and "Traceback" not in str(told)
    other = torch.utils.data.DataLoader(Torn(path, TypeError("a transform that fails")), num_workers=workers)
    assert loading_error(raised_in(lambda: list(other))) is None  # an error of the code keeps its traceback


def test_what_is_no_error_of_loading() -> None:
    assert loading_error(NonFiniteError("loss")) is None
    assert loading_error(OSError(errno.ENOSPC, "no room")) is None
    assert str(loading_error(StreamError("x.png cannot be decoded"), lambda text: "class 'a'")).endswith("(class 'a')")
