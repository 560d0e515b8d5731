"""Ways to damage files: those of a checkpoint, and those that a run leaves. What was done is returned in a word."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
import fuzz_cases as fuzz

from avalanche_firn.plugins.checkpoint_content import form_of

FILES = ("state.json", "tensors.safetensors", "SHA256SUMS")
Draw = Callable[..., Any]


# ------------------------------------------------------------------- of a checkpoint
def form_anew(file: Path) -> None:
    """Write into a ``state.json`` the form of the state that is in it, if it can be read."""
    with contextlib.suppress(ValueError):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and "form" in content:
            content["form"] = form_of(json.dumps(content.get("state"), separators=(",", ":")))
            file.write_text(json.dumps(content))


def sums_anew(folder: Path) -> None:
    """Write SHA256SUMS for what is there."""
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES[:2]]
    (folder / "SHA256SUMS").write_text("".join(lines))


def change_bytes(draw: Draw, file: Path) -> str:
    """Change a few bytes of a file, or its length."""
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    block = draw(st.binary(min_size=1, max_size=30))
    kind = draw(st.sampled_from(("flip", "truncate", "overwrite", "insert", "delete", "append", "empty", "zeros")))
    if kind == "flip":
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "truncate":
        del content[place:]
    elif kind == "overwrite":
        content[place : place + len(block)] = block
    elif kind == "insert":
        content[place:place] = block
    elif kind == "delete":
        del content[place : place + len(block)]
    elif kind == "append":
        content += block
    elif kind == "empty":
        content.clear()
    else:
        content[place:] = bytes(len(content) - place)
    file.write_bytes(content)
    return kind


OTHER_THINGS = (
    "delete", "folder", "pipe", "dangling", "loop", "device", "copied", "exchanged", "renamed", "twice", "gone",
    "file for folder", "link to folder", "name", "unreadable",
)  # fmt: skip
ODD_NAMES = (
    "step-", "step--1", "step-1.5", "step-٣", "step-" + "9" * 200, "step-000000099-end", "step-x", ".old-step-1",
)  # fmt: skip


def change_files(draw: Draw, newest: Path, older: Path) -> str:
    """Replace, exchange, rename or remove whole files and folders."""
    name = draw(st.sampled_from(FILES))
    file, other = newest / name, older / name
    kind = draw(st.sampled_from(OTHER_THINGS))
    if kind == "delete":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif kind in ("dangling", "loop", "device"):
        file.unlink()
        file.symlink_to({"dangling": "nowhere", "loop": file.name, "device": "/dev/zero"}[kind])
    elif kind == "copied":
        shutil.copy(other, file)
    elif kind == "exchanged":
        file.rename(newest / "x")
        other.rename(file)
        (newest / "x").rename(other)
    elif kind == "renamed":
        file.rename(newest / f"{name}.bak")
    elif kind == "twice":
        shutil.copytree(older, newest.with_name("step-000000099"))
    elif kind == "gone":
        shutil.rmtree(newest)
    elif kind == "file for folder":
        shutil.rmtree(newest)
        newest.write_text("x")
    elif kind == "link to folder":
        newest.rename(newest.with_name("elsewhere"))
        newest.symlink_to("elsewhere")
    elif kind == "name":
        odd = (
            "step-",
            "step--1",
            "step-1.5",
            "step-٣",
            "step-" + "9" * 200,
            "step-000000099-end",
            "step-x",
            ".old-step-1",
        )
        newest.rename(newest.with_name(draw(st.sampled_from(odd))))
    else:
        file.chmod(0)
    return kind


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e308, "", "x", "inside", "end", "cuda:0",
    [], {}, [1], ["x"], [[]], {"x": 1}, {"$tensor": "x"}, {"$tensor": None}, {"$tensor": "loss", "x": 1},
    {"$numbers": "loss"}, {"$float": "nan"}, {"$float": "x"}, {"$tuple": []}, {"$tuple": 1}, {"$set": [[]]},
    {"$known": "model"}, {"$known": 3}, {"$state": {}}, {"$object": {"class": "x", "attributes": {}}},
    {"$setting": "x"}, {"$generator": None}, {"$dtype": "load"}, {"$dtype": "float32"}, {"$device": "x"},
    {"$device": "meta"}, {"$path": "/etc/passwd"}, {"$size": ["x"]}, {"$deque": [1, []]},
    {"$picture": {"mode": "RGB", "size": [60000, 60000], "data": {"$bytes": {"$tensor": "loss"}}}}, {"$elapsed": "x"},
    {"$items": [[1]]}, {"$items": [[[], 1]]}, {"$default": []}, {"$nothing": 1},
    {"$on": ["cuda:7", {"$tensor": "loss"}]}, {"$ndarray": 1}, {"$bytes": 1}, {"$parameter": {}}, {"$elapsed": 1e300},
    {"$scalar": {"$tensor": "loss"}},
]  # fmt: skip


def change_state(draw: Draw, file: Path) -> str:
    """Another structure or other values in a ``state.json``."""
    content = json.loads(file.read_text())
    found = fuzz.places(content)
    path = draw(st.sampled_from(found) | st.sampled_from([p for p in found if len(p) < 5]))
    holder, key = fuzz.at(content, path[:-1]), path[-1]
    kind = draw(st.sampled_from(("junk", "delete", "rename", "copy", "double", "number", "add", "text", "deep")))
    if kind == "junk":
        holder[key] = draw(st.sampled_from(JUNK))
    elif kind == "delete":
        del holder[key]
    elif kind == "copy":
        holder[key] = copy.deepcopy(fuzz.at(content, draw(st.sampled_from(found))))
    elif kind == "number":
        holder[key] = _other_number(holder[key], draw(st.integers(-3, 3)))
    elif kind == "deep":
        holder[key] = fuzz.CONTAINERS[draw(st.sampled_from([21, 22]))]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "rename":
        holder[draw(st.sampled_from(("x", "$tensor", "$tuple", "class", "", f"{key}x")))] = holder.pop(key)
    else:
        holder[draw(st.sampled_from(("x", "model", "train", "$tensor", "_train_exp", "plugins", "lr")))] = draw(
            st.sampled_from(JUNK)
        )
    text = json.dumps(content)
    if kind == "text":
        place = draw(st.integers(0, len(text)))
        odd = (
            "NaN",
            "Infinity",
            "1e999",
            '{"a":1,"a":2}',
            "[" * 5000,
            "]",
            ",",
            '"',
            "\\ud800",
            "9" * 6000,
            "\0",
            "null",
        )
        text = text[:place] + draw(st.sampled_from(odd)) + text[place:]
    file.write_text(text)
    return f"state: {kind}"


def _other_number(value: Any, by: int) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + by if by else float(value)
    return value[:-1] if isinstance(value, str | list) and value else value


def change_tensors(draw: Draw, file: Path) -> str:
    """Another header, or other values, in a ``tensors.safetensors``."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = draw(st.sampled_from(sorted(header)))
    other = draw(st.sampled_from(sorted(header)))
    kind = draw(
        st.sampled_from(
            ("size", "offsets", "type", "shape", "extra", "missing", "renamed", "exchanged", "values", "text")
        )
    )
    length = None
    if kind == "size":
        length = draw(st.sampled_from((0, 1, size - 1, size + 1, len(content), 2**31, 2**60, 2**64 - 1)))
    elif kind == "offsets":
        begin, end = header[name]["data_offsets"]
        odd = (
            [end, begin],
            [begin, end + 1],
            [0, end],
            [begin, 2**60],
            [-1, end],
            [0, 0],
            header[other]["data_offsets"],
        )
        header[name]["data_offsets"] = draw(st.sampled_from(odd))
    elif kind == "type":
        header[name]["dtype"] = draw(
            st.sampled_from(("F32", "I32", "F64", "I64", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "X", 3))
        )
    elif kind == "shape":
        shape = header[name]["shape"]
        odd = ([*shape, 1], shape[::-1], shape[1:], [], [0], [-1], [2**40, 2**40], [int(np.prod(shape))], "x")
        header[name]["shape"] = draw(st.sampled_from(odd))
    elif kind == "extra":
        header["extra"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
        data += b"abcd"
    elif kind == "missing":
        del header[name]
    elif kind == "renamed":
        header["x"] = header.pop(name)
    elif kind == "exchanged":
        header[name], header[other] = header[other], header[name]
    elif kind == "values":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    text = json.dumps(header, separators=(",", ":")).encode()
    if kind == "text":
        text = text[: draw(st.integers(0, len(text)))] + draw(st.binary(max_size=4))
    text += b" " * (-len(text) % 8)
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return f"tensors: {kind}"


# ------------------------------------------------------------------------ of a run
def change_values(draw: Draw, file: Path) -> str:
    """Other values, keys or types in a JSON or YAML file."""
    text = file.read_text()
    content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    found = fuzz.places(content)
    path = draw(st.sampled_from([p for p in found if len(p) < 4]) | st.sampled_from(found))
    holder, key = fuzz.at(content, path[:-1]), path[-1]
    kind = draw(st.sampled_from(("replace", "replace", "number", "delete", "rename", "double", "copy", "nothing left")))
    if kind == "replace":
        holder[key] = draw(st.sampled_from(fuzz.PLAIN))
    elif kind == "number":
        value = holder[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        holder[key] = draw(st.sampled_from((value * 2, -value, value + 1, str(value), [value]))) if number else None
    elif kind == "delete":
        del holder[key]
    elif kind == "copy":
        holder[key] = fuzz.at(content, draw(st.sampled_from(found)))
    elif kind == "nothing left":
        content = draw(st.sampled_from((None, [], {}, 1, "x", True, [content])))
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[draw(st.sampled_from(("x", "format", "seed", "")))] = holder.pop(key)
    written = _json(content) if file.suffix == ".json" else fuzz.as_yaml(content)
    file.write_bytes(written)
    return f"{file.name}: {kind}"


def _json(content: Any) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(plain(content) if not isinstance(content, int) else content).encode()


def change_text(draw: Draw, file: Path) -> str:
    """Cut, torn or foreign text."""
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(("cut", "insert", "foreign", "empty", "flip", "binary")))
    if kind == "cut":
        del content[place:]
    elif kind == "insert":
        odd = (b"NaN", b"1e999", b"9" * 5000, b"\xff", b"\0", b'"', b"{", b"[" * 3000)
        content[place:place] = draw(st.sampled_from(odd))
    elif kind == "foreign":
        foreign = (*fuzz.BOMBS[:14], b"<html></html>", b"version https://git-lfs.github.com")
        content = bytearray(draw(st.sampled_from(foreign)))
    elif kind == "empty":
        content.clear()
    elif kind == "flip":
        content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
    else:
        content = bytearray(draw(st.binary(min_size=1, max_size=300)))
    file.write_bytes(content)
    return f"{file.name}: {kind}"


ROWS = (
    "999999999999,drift/cka,0.5", "-1,drift/cka,0.5", "1.5,accuracy/last,0.5", "²,drift/cka,1", "٣,accuracy/last,1",
    "1_0,x,1", "3,accuracy/last,nan", "3,accuracy/last,inf", "3,accuracy/last,1e999", "3,accuracy/last,",
    "3,accuracy/last", ",,", "a,b,c", "99999999999999999999999,accuracy/last,0.5", "4,accuracy/last,0x10",
    '3,"accuracy/last,0.5', "3,loss/train,1_0", "\x00,x,1", "7,loss/train,inf", "8,drift/cka,-inf",
    "9,drift/weights,nan", "3," + "x" * 200_000 + ",1", "9" * 5000 + ",accuracy/last,0.5",
    "5,accuracy/last,0.5\r6,x,1", "step,tag,value", "",
)  # fmt: skip


def change_lines(draw: Draw, file: Path) -> str:
    """Another line in a ``metrics.csv``."""
    lines = file.read_text().splitlines()
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(ROWS)))
    file.write_text("\n".join(lines) + draw(st.sampled_from(("\n", ""))))
    return f"{file.name}: line"


def change_kind(draw: Draw, file: Path) -> str:
    """Something that is no file."""
    kind = draw(st.sampled_from(("folder", "pipe", "loop", "nowhere", "device", "gone")))
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "gone":
        file.symlink_to({"loop": file.name, "nowhere": "nowhere", "device": "/dev/zero"}[kind])
    return f"{file.name}: {kind}"
