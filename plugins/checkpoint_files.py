"""Checkpoints as directories of safetensors and JSON: written whole or not at all, verified before use, newest first.

``directory/step-000000400/{state.json, tensors.safetensors, SHA256SUMS}``; ``-end`` marks the end of an experience. A
checkpoint is written to a hidden directory beside it, flushed to disk and renamed, so a name that starts with ``step-``
is complete unless somebody changed it later: then it is refused by name and the previous one is used. Besides: files
that are only appended to (event files, CSV), cut back to their length at a checkpoint. The lock that keeps two
processes apart is in :mod:`~avalanche_firn.plugins.folder_lock`.

Cost: the bytes are written once and hashed once (about 1 GB/s) when saving, hashed once when resuming.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from avalanche_firn.plugins.checkpoint_content import (
    check_form,
    check_run_state,
    describe_tensors,
    form_of,
    load_tensors,
    read_json,
    references,
    unflatten,
)
from avalanche_firn.plugins.checkpoint_errors import CheckpointError
from avalanche_firn.plugins.folder_lock import lock_directory, unlock_directory

FORMAT = 1
_DTYPES = frozenset(
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
_NAME = re.compile(r"step-(\d+)(-end)?")
_LONG = 32
"""Lists of numbers from this length on are stored as tensors: histories of metrics grow without bound."""


# ------------------------------------------------------- JSON and tensors apart
def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a description (see :mod:`~avalanche_firn.plugins.plain_state`) into JSON and named tensors.

    Equal views of one storage are stored once. Tensors come back contiguous, on the CPU.

    :raises TypeError: a tensor that safetensors can't hold (sparse, quantised, complex), named with its path.
    """
    tensors: dict[str, Tensor] = {}
    views: dict[tuple[Any, ...], str] = {}
    return _flatten(state, "", tensors, views), _detached(tensors)


def _flatten(node: Any, path: str, tensors: dict[str, Tensor], views: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(node, Tensor):
        if node.layout != torch.strided or node.dtype not in _DTYPES or node.is_meta:
            raise TypeError(f"{path}: a {node.layout} tensor of {node.dtype} on {node.device} can't be saved")
        view = (node.device, node.data_ptr(), node.dtype, node.shape, node.stride())
        if view not in views or node.numel() == 0:
            views[view] = path
            tensors[path] = node
        return {"$tensor": views[view]}
    if isinstance(node, list):
        kinds = {type(v) for v in node}
        if len(node) >= _LONG and len(kinds) == 1 and (kinds <= {float} or (kinds <= {int} and _fits(node))):
            tensors[path] = torch.tensor(node, dtype=torch.float64 if kinds <= {float} else torch.int64)
            return {"$numbers": path}
        return [_flatten(v, f"{path}/{i}", tensors, views) for i, v in enumerate(node)]
    if isinstance(node, dict):
        return {k: _flatten(v, f"{path}/{k}" if path else k, tensors, views) for k, v in node.items()}
    return node


def _fits(values: list[int]) -> bool:
    return min(values) >= -(2**63) and max(values) < 2**63


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another (safetensors insists)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        out[name] = flat
    return out


# ------------------------------------------------------------------ directories
def write_checkpoint(directory: Path, name: str, state: Any, *, keep: int) -> Path:
    """Write a checkpoint, then delete all but the ``keep`` newest. The name appears only once everything is on disk.

    After an error nothing of it is left, and the checkpoints before it are as they were.
    """
    tree, tensors = flatten(state)
    hidden = directory / f".new-{name}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
        save_file(tensors, hidden / "tensors.safetensors")
        text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
        head = {"format": FORMAT, "form": form_of(text), "tensors": describe_tensors(tensors)}
        text = f'{json.dumps(head, separators=(",", ":"))[:-1]},"state":{text}}}'
        (hidden / "state.json").write_text(text, encoding="utf-8")
        files = ("state.json", "tensors.safetensors")
        sums = "".join(f"{_sha256(hidden / f)}  {f}\n" for f in files)
        (hidden / "SHA256SUMS").write_text(sums, encoding="ascii")
        for path in (*(hidden / f for f in (*files, "SHA256SUMS")), hidden):
            sync(path)
        target = directory / name
        if target.exists():  # left over from a run that was rewound further
            _remove(target)
        hidden.rename(target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)  # on a full disk others need the room
        raise
    sync(directory)
    for old in checkpoints(directory)[keep:]:
        _remove(old)
    for refused in directory.glob("refused-step-*"):
        _remove(refused)
    return target


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a directory, newest first; damaged ones included."""
    named = [(_NAME.fullmatch(p.name), p) for p in directory.glob("step-*") if p.is_dir()]
    order = [(int(match[1]), match[2] is not None, path) for match, path in named if match]
    return [path for _, _, path in sorted(order, reverse=True)]


def read_checkpoint(path: Path, *, tensors: bool = True) -> Any:
    """Verify and read one checkpoint.

    :param tensors: False reads the JSON alone (all files are verified in any case); tensors stay placeholders.
    :raises CheckpointError: a file is missing, truncated or edited, or of another format; the message names the file.
    """
    sums, file = path / "SHA256SUMS", path / "state.json"
    expected = _expected(sums)
    for name, digest in expected.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, or no file")
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} can't be read: {error}") from error
        if found != digest:
            raise CheckpointError(f"{path / name} is truncated or was changed: its SHA-256 is not the one in {sums}")
    content = read_json(file)
    if content.get("format") != FORMAT or isinstance(content["format"], bool):
        raise CheckpointError(f"{file} has format {content.get('format')!r}; {FORMAT} is accepted")
    check_form(file, content)
    state = content.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds no state")
    try:
        named = references(state)
        if tensors:
            state = unflatten(state, load_tensors(path / "tensors.safetensors", content.get("tensors"), named))
        check_run_state(state)
    except CheckpointError:
        raise
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file} isn't the state of a run: {error}") from error
    return state


def _expected(sums: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint."""
    try:
        if not sums.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no such file")
        if sums.stat().st_size > 4096:
            raise ValueError("it is longer than two lines")
        lines = [line.split("  ", 1) for line in sums.read_text(encoding="ascii").splitlines()]
        expected = {name: digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{sums} is missing or unreadable ({error})") from error
    if sorted(expected) != ["state.json", "tensors.safetensors"] or len(lines) != 2:
        raise CheckpointError(f"{sums} lists {sorted(expected)}; state.json and tensors.safetensors are needed")
    return expected


def newest_valid(directory: Path, *, tensors: bool = True) -> tuple[Path, Any, list[Path]] | None:
    """The newest checkpoint that passes verification, its content, and the damaged ones that are newer.

    Each damaged one is reported by a warning. None if the directory holds no checkpoint at all.

    :raises CheckpointError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(directory)
    problems = []
    for i, path in enumerate(found):
        try:
            return path, read_checkpoint(path, tensors=tensors), found[:i]
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"checkpoint refused: {error}; trying the one before it", RuntimeWarning, stacklevel=3)
    if not found:
        return None
    raise CheckpointError(
        f"no checkpoint in {directory} can be used: {'; '.join(problems)}. "
        "Restore the files, or start over with resume(strategy, allow_fresh=True)"
    )


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it can be looked at but is never used; the next save deletes it."""
    target = path.with_name(f"refused-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def refuse_links(directory: Path) -> None:
    """Whatever is written or deleted in a folder of checkpoints is in that folder, and nowhere else.

    :raises CheckpointError: the folder, or a checkpoint in it, is a symbolic link.
    """
    for path in (directory, *directory.glob("step-*")):
        _refuse_link(path)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link to {os.readlink(path)}: what a run writes and deletes would be there. Put what it leads "
            "to in its place, or delete it (a link to the whole folder of a run is accepted)"
        )


def clean(directory: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for pattern in (".new-*", ".old-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk (Windows can't do it this way)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint; the rename comes first, so that half a checkpoint never carries its name."""
    hidden = path.with_name(f".old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------- files that only grow
def measure(directory: Path, patterns: Sequence[str]) -> dict[str, int]:
    """Length in bytes of all files that match, flushed to disk; keys are paths relative to ``directory``."""
    sizes = {}
    for path in matching_files(patterns):
        sync(path)
        sizes[os.path.relpath(path, directory)] = path.stat().st_size
    return sizes


def cut_back(directory: Path, patterns: Sequence[str], sizes: dict[str, int]) -> None:
    """Bring all files that match to a recorded state: longer ones are cut, ones that came later are deleted.

    Event files that follow have to come after these: see :mod:`~avalanche_firn.plugins.event_files`.

    :raises CheckpointError: a recorded file is missing or shorter than recorded, or a file is a symbolic link; nothing
        has been changed then.
    """
    recorded = {Path(os.path.normpath(directory / name)): size for name, size in sizes.items()}
    matching = matching_files(patterns)
    if not patterns:
        return
    for path in (*recorded, *matching):
        _refuse_link(path)
    for path, size in recorded.items():
        length = path.stat().st_size if path.is_file() else None
        if length is None or length < size:
            state = "is missing" if length is None else f"has {length} bytes"
            raise CheckpointError(
                f"{path} {state}, and the checkpoint was made when it had {size}: its history is lost; "
                "restore it, or resume with append_only=() to go on without"
            )
    for path in matching:
        if path not in recorded:
            path.unlink()
        elif path.stat().st_size > recorded[path]:
            os.truncate(path, recorded[path])
            sync(path)


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """Files that match any of the paths or globs, sorted."""
    found = {Path(os.path.normpath(p)) for pattern in patterns for p in glob.glob(pattern, recursive=True)}
    return sorted(p for p in found if p.is_file())


__all__ = [
    "CheckpointError",
    "checkpoints",
    "clean",
    "cut_back",
    "flatten",
    "lock_directory",
    "matching_files",
    "measure",
    "newest_valid",
    "read_checkpoint",
    "refuse_links",
    "set_aside",
    "sync",
    "unflatten",
    "unlock_directory",
    "write_checkpoint",
]
