"""Checkpoint directories: exact round trips, damage, interrupted writes, deletion of old ones, growing files, locks."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.plugins import checkpoint_files as files
from avalanche_firn.plugins import folder_lock
from avalanche_firn.plugins.checkpoint_files import CheckpointError
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain


def write(folder: Path, step: int, state, keep: int = 2) -> Path:
    return files.write_checkpoint(folder, f"step-{step:09d}", to_plain(state), keep=keep)


def there_and_back(state, folder: Path):
    return from_plain(files.read_checkpoint(write(folder, 1, state)))


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)])
def test_tensors_of_every_type_and_shape(dtype, shape, tmp_path):
    tensor = (torch.randn(shape, dtype=torch.float64) * 50).to(dtype)
    assert differing_state(tensor, there_and_back({"x": tensor}, tmp_path)["x"]) is None


def test_unusual_values_and_layouts(tmp_path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    state = {
        "transposed": whole.permute(2, 0, 1),
        "slice": whole[:, 1],
        "shared": [whole, whole, whole.view(6, 4)],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "special": special,
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}, 1: {}},
        "betas": (0.9, 0.999),
        "float": [float("nan"), math.inf, -math.inf, -0.0, 0.1, 5e-324],
        "int": [2**200, -1],
        "nested": [[], {}, (), None, True, "text \u00e9\n", {"$tensor": 1, "a/b": 2}, {(1, "x"): [1]}],
        "keys": {"": 1, "device": 2},
    }
    got = there_and_back(state, tmp_path)
    assert differing_state(to_plain(state), to_plain(got)) is None
    assert list(got["state"]) == [0, 1] and math.copysign(1, got["float"][3]) == -1


def test_a_shared_tensor_is_stored_once(tmp_path):
    tensor = torch.zeros(1000)
    path = write(tmp_path, 1, {"a": tensor, "b": tensor, "c": [tensor]})
    assert (path / "tensors.safetensors").stat().st_size < 6000


def test_long_histories_are_stored_as_tensors(tmp_path):
    history = {"loss": ([*range(5000)], [0.1 * n for n in range(5000)]), "mixed": [1, 2.0] * 50, "big": [2**70] * 50}
    path = write(tmp_path, 1, history)
    assert (path / "state.json").stat().st_size < 4000
    assert differing_state(to_plain(history), to_plain(from_plain(files.read_checkpoint(path)))) is None


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_tensors_that_cannot_be_saved_are_named(tensor, tmp_path):
    with pytest.raises(TypeError, match="a/0: a torch"):
        write(tmp_path, 1, {"a": [tensor]})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_any_plain_value_survives_json(value):
    tree, tensors = files.flatten(to_plain(value))
    got = files.unflatten(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    assert differing_state(to_plain(value), to_plain(from_plain(got))) is None


# ---------------------------------------------------------------------- damage
def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_damage_is_named_and_the_previous_one_used(file, damage, tmp_path):
    for step in (3, 6):
        write(tmp_path, step, {"step": step, "x": torch.arange(100.0)})
    bad = tmp_path / "step-000000006" / file
    damage(bad)
    with pytest.warns(RuntimeWarning) as caught:
        found = files.newest_valid(tmp_path)
    assert found is not None
    path, state, damaged = found
    assert path.name == "step-000000003" and state["step"] == 3 and damaged == [bad.parent]
    assert str(bad) in str(caught[0].message)


def test_every_single_flipped_byte_is_noticed(tmp_path):
    path = write(tmp_path, 1, {"x": torch.arange(8.0), "n": 3})
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for i in range(0, len(content), 7):
            file.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
            with pytest.raises(CheckpointError, match=str(path)):
                files.read_checkpoint(path)
        file.write_bytes(content)
    files.read_checkpoint(path)


def test_no_checkpoint_and_none_intact(tmp_path):
    assert files.newest_valid(tmp_path) is None
    assert files.newest_valid(tmp_path / "absent") is None
    flip(write(tmp_path, 1, {"x": 1}) / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is truncated or was changed.*allow_fresh"), pytest.warns():
        files.newest_valid(tmp_path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 99)
    path = write(tmp_path, 1, {"x": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99; 1 is accepted"):
        files.read_checkpoint(path)


# ------------------------------------------------------------- order and age
def test_order_and_number_kept(tmp_path):
    for name in ("step-000000000", "step-000000009", "step-000000009-end", "step-000000010", "step-1000000000"):
        files.write_checkpoint(tmp_path, name, {}, keep=3)
    (tmp_path / "step-unrelated").mkdir()
    names = [p.name for p in files.checkpoints(tmp_path)]
    assert names == ["step-1000000000", "step-000000010", "step-000000009-end"]


def test_a_name_is_written_again(tmp_path):
    write(tmp_path, 1, {"x": 1})
    assert files.read_checkpoint(write(tmp_path, 1, {"x": 2})) == {"x": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001"]


def test_a_refused_checkpoint_is_kept_for_a_look_until_the_next_save(tmp_path):
    files.set_aside(write(tmp_path, 1, {}))
    assert files.checkpoints(tmp_path) == [] and (tmp_path / "refused-step-000000001").is_dir()
    write(tmp_path, 2, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000002"]


@pytest.mark.parametrize("operation", ["save_file", "sync", "_sha256", "_remove"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_save_that_fails_leaves_a_usable_directory(operation, count, tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step, {"step": step})
    original, calls = getattr(files, operation), iter(range(1, 100))

    def failing(*args, **kwargs):
        if next(calls) == count:
            raise OSError("disk full")
        return original(*args, **kwargs)

    monkeypatch.setattr(files, operation, failing)
    with contextlib.suppress(OSError):
        write(tmp_path, 3, {"step": 3})
    monkeypatch.undo()
    files.clean(tmp_path)
    found = files.newest_valid(tmp_path)
    assert found is not None and found[1]["step"] in (2, 3) and found[2] == []
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------- files that only grow
def test_growing_files_are_cut_back(tmp_path):
    folder, pattern = tmp_path / "checkpoint", [str(tmp_path / "*.log")]
    folder.mkdir()
    (tmp_path / "a.log").write_text("one\n")
    (tmp_path / "b.log").write_text("")
    sizes = files.measure(folder, pattern)
    assert sizes == {"../a.log": 4, "../b.log": 0}
    (tmp_path / "a.log").write_text("one\ntwo\n")
    (tmp_path / "c.log").write_text("later")
    (tmp_path / "other.txt").write_text("not ours")
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)  # a run that moved to another place is still the same run
    files.cut_back(moved / "checkpoint", [str(moved / "*.log")], sizes)
    assert sorted(p.name for p in moved.iterdir()) == ["a.log", "b.log", "checkpoint", "other.txt"]
    assert (moved / "a.log").read_text() == "one\n"


@pytest.mark.parametrize("damage", [empty, Path.unlink])
def test_lost_history_is_refused_before_anything_changes(damage, tmp_path):
    pattern = [str(tmp_path / "*.log")]
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_text("one\n")
    sizes = files.measure(tmp_path, pattern)
    (tmp_path / "a.log").write_text("one\ntwo\n")
    damage(tmp_path / "b.log")
    with pytest.raises(CheckpointError, match=r"b\.log (is missing|has 0 bytes)"):
        files.cut_back(tmp_path, pattern, sizes)
    assert (tmp_path / "a.log").read_text() == "one\ntwo\n"
    files.cut_back(tmp_path, [], sizes)  # somebody decided to go on without


# ------------------------------------------------------------------------ lock
class Owner:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_a_lock_ends_with_its_process_but_not_in_its_children(tmp_path):
    owner = Owner()
    files.lock_directory(tmp_path, owner, owner.stop)
    context = multiprocessing.get_context("fork")
    refused = context.Process(target=_try_lock, args=(tmp_path,))
    refused.start()
    refused.join()
    assert refused.exitcode == 7
    files.unlock_directory(tmp_path, owner)
    free = context.Process(target=_try_lock, args=(tmp_path,))
    free.start()
    free.join()
    assert free.exitcode == 0


def _try_lock(folder: Path) -> None:
    try:
        files.lock_directory(folder, Owner, lambda: None)
    except CheckpointError as error:
        os._exit(7 if f"id {os.getppid()}" in str(error) else 8)
    os._exit(0)


def test_a_second_owner_in_the_process_takes_over(tmp_path):
    first, second = Owner(), Owner()
    files.lock_directory(tmp_path, first, first.stop)
    files.lock_directory(tmp_path, first, first.stop)
    assert not first.stopped
    files.lock_directory(tmp_path, second, second.stop)
    assert first.stopped and not second.stopped
    files.unlock_directory(tmp_path, first)  # no longer the owner: nothing happens
    assert tmp_path.resolve() in folder_lock._OWNERS
    files.unlock_directory(tmp_path, second)
