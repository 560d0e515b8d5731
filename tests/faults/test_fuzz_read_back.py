"""Damaged files that are read back beside those of runs: split lists, landscapes, the index of decoded images.

Each is what was written, is refused by name, or isn't used. ``--slow`` tries more of them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
import fuzz_calls as calls
import fuzz_cases as fuzz
import fuzz_damage as damage

from avalanche_firn.benchmarks.image_store import ImageStore, Place, read_store, write_facts
from avalanche_firn.benchmarks.split_lists import read_name_lists, read_split, write_split
from avalanche_firn.evaluation.landscape import Landscape

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")

WHAT = "other files"
TOLD: Counter[tuple[str, str]] = Counter()
WAYS = (damage.change_text, damage.change_text, damage.change_bytes, damage.change_kind)


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints what became of the files."""
    with calls.printed(pytestconfig, WHAT, TOLD):
        yield


Read = Callable[[Path], Any]


def split_list(file: Path) -> Read:
    """A drawn split, with its digest."""
    names = [f"{c}/{i}.jpg" for c in "abc" for i in range(8)]
    write_split(file, names[:16], names[16:])
    return read_split


def name_lists(file: Path) -> Read:
    """Lists of another project, as YAML."""
    file.with_name("test.yaml").write_text("data: [x/a/9.jpg]")
    file.write_text("data: [x/a/1.jpg, x/b/2.jpg]\n")
    return lambda path: read_name_lists(path, path.with_name("test.yaml"))


def landscape(file: Path) -> Read:
    """Losses on a plane."""
    values = np.arange(6.0).reshape(2, 3)
    arrays = {"xs": np.arange(2.0), "ys": np.arange(3.0), "loss": values, "accuracy": values / 6}
    texts = {"labels": np.array(["a", "b"]), "axes": np.array(["x", "y"]), "explained": np.array([0.5, 0.25])}
    np.savez(file, **arrays, **texts, path=np.zeros((2, 2)))
    return lambda path: Landscape.load(path.with_suffix(""))


def store_index(file: Path) -> Read:
    """What lies in a file of decoded images."""
    images, facts = torch.arange(3 * 1 * 2 * 2, dtype=torch.uint8).reshape(3, 1, 2, 2), {"data": "x"}
    data = file.with_suffix(".uint8")
    data.write_bytes(images.numpy().tobytes())
    rows = np.arange(3)
    write_facts(ImageStore(images, 1, rows, 3, Place(torch.device("cpu"), data)), facts)
    return lambda path: read_store(path.with_suffix(".uint8"), facts, rows, 3)


OTHERS: dict[str, tuple[str, Callable[[Path], Read]]] = {
    "split list": ("split.txt", split_list),
    "name lists": ("train.yaml", name_lists),
    "landscape": ("landscape.npz", landscape),
    "index of images": ("images.json", store_index),
}


def content_of(value: Any) -> Any:
    """Something to compare what was read by."""
    if isinstance(value, ImageStore):
        return value.images.tolist(), value.channels
    if isinstance(value, Landscape):
        return [(name, np.asarray(part).tolist()) for name, part in vars(value).items()]
    return value


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(300, 25, 1))
def test_files_that_are_read_back(tmp_path: Path, part: int, cases: int, record_property: Any) -> None:
    """Lists without a digest may say something else."""

    def check(data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(sorted(OTHERS)))
        name, make_file = OTHERS[what]
        folder = tmp_path / what
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        file = folder / name
        read = make_file(file)
        expected = content_of(read(file))
        data.draw(st.sampled_from(WAYS))(data.draw, file)
        outcome = "the same"
        with calls.bounded(gigabytes=1):
            try:
                found = content_of(read(file))
            except (ValueError, FileNotFoundError) as error:
                assert str(file) in str(error) or file.stem in str(error), error
                outcome = "named"
            else:
                assert found in (expected, None) or what == "name lists", (found, expected)
                outcome = "the same" if found == expected else "not used" if found is None else "as it says now"
        TOLD[what, outcome] += 1

    calls.explore(check, part=part, cases=cases, data=st.data())
    record_property("fuzzed", calls.told(WHAT, TOLD))
