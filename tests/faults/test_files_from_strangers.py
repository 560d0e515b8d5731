"""Weights, exports, landscapes, lists, stores and CIFAR's files as strangers could hand them over.

Whatever is wrong with a file, the error names it and what is wrong, no weight stays at its random value, nothing is
executed, waited for or read into memory beyond the size of the file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
from fault_tools import assert_same, firn, shared_recipe, single, strike_loss, whole_run
from strangers import patch_torchvision, payload, python2_batch, small_cifar, write_cifar

from avalanche_firn.benchmarks import cifar, classic
from avalanche_firn.benchmarks.cifar import read_cifar
from avalanche_firn.benchmarks.classic import avalanche_stream
from avalanche_firn.benchmarks.image_store import ImageStore, Place, read_store, stored_file, write_facts
from avalanche_firn.benchmarks.pickles import Call, Name, plain_pickles_only, read_tokens
from avalanche_firn.benchmarks.split_lists import read_name_lists, read_split
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.evaluation import landscape as landscapes
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.experiments import transfer_run
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.export import ExportError, load_exported
from avalanche_firn.experiments.export_formats import own_state
from avalanche_firn.experiments.results import write_text
from avalanche_firn.experiments.runner import run
from avalanche_firn.models.backbones import WeightsError, load_backbone
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.models.weight_files import read_weights
from avalanche_firn.plugins.run_errors import StorageError

TINY = dict(embed_dim=32, depth=1, num_heads=2)


# --------------------------------------------------------------------- weights
@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    module = load_backbone("vit_firn_32", pretrained=False, **TINY).module
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def refusal(path: Path, name: str = "vit_firn_32", **options: Any) -> str:
    """The message; and the generators and the file are as they were."""
    with pytest.raises(WeightsError) as caught:
        load_backbone(name, weights=path, **{**TINY, **options})
    assert str(path) in str(caught.value)
    return str(caught.value)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("norm.weight"), "missing 1 (norm.weight)"),
        (lambda s: s.update(stranger=torch.zeros(3)), "unexpected 1 (stranger)"),
        (lambda s: s.update({"norm.weight": torch.ones(31)}), "wrong shape 1 (norm.weight (31,), expected (32,))"),
        (lambda s: s.update({"norm.weight": torch.ones(32, 1)}), "wrong shape 1 (norm.weight (32, 1), expected (32,))"),
        (lambda s: s["norm.bias"].fill_(float("nan")), "infinite or NaN values in norm.bias"),
        (lambda s: s["cls_token"].fill_(float("-inf")), "infinite or NaN values in cls_token"),
        (
            lambda s: s.update({"norm.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
            "too large for the model's type 1 (norm.bias)",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(32, dtype=torch.int64)}),
            "wrong type 1 (norm.bias int64, expected float32)",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(32, dtype=torch.bool)}),
            "wrong type 1 (norm.bias bool, expected float32)",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, state, suffix, change, told):
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    change(tensors)
    assert told in refusal(written(tmp_path / f"w{suffix}", tensors))


def test_complex_numbers_do_not_fit(tmp_path, state):
    path = written(tmp_path / "w.pth", {**state, "norm.bias": torch.zeros(32, dtype=torch.complex64)})
    assert "wrong type 1 (norm.bias complex64, expected float32)" in refusal(path)


def test_every_float_type_is_loaded_as_it_is_meant(tmp_path, state):
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    loaded = load_backbone("vit_firn_32", weights=written(tmp_path / "w.safetensors", small), **TINY).module
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, small[name].float())
    small["norm.bias"][3] = torch.tensor(float("nan"))
    assert "NaN values in norm.bias" in refusal(written(tmp_path / "w.safetensors", small))


def test_weights_of_another_architecture(tmp_path):
    other = load_backbone("resnet18_cifar", pretrained=False).module
    for suffix in (".safetensors", ".pth"):
        path = written(tmp_path / f"w{suffix}", dict(other.state_dict()))
        assert "doesn't fit 'vit_firn_32'" in refusal(path) and "missing" in refusal(path)


def lying(path: Path, change: Any) -> Path:
    """A .safetensors whose header is changed by `change(entries)`, the bytes behind it left alone."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["norm.bias"].update(data_offsets=[0, 2**60]),
        lambda h: h["norm.bias"].update(shape=[2**40]),
        lambda h: h["norm.bias"].update(shape=[16]),
        lambda h: h["norm.bias"].update(dtype="F64"),
        lambda h: h["norm.bias"].update(dtype="NONE"),
        lambda h: h["norm.bias"].update(data_offsets=h["norm.weight"]["data_offsets"]),
        lambda h: h["norm.bias"].update(shape=[-32]),
        lambda h: h.update({"norm.bias": None}),
        lambda h: [],
    ],
)
def test_headers_that_lie(tmp_path, state, change):
    path = lying(written(tmp_path / "w.safetensors", state), change)
    assert "can't be read, truncated or not a weights file" in refusal(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 0, 7])
def test_header_lengths_that_lie(tmp_path, length):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", length) + b"{}      ")
    assert "can't be read" in refusal(tmp_path / "w.safetensors") or "holds no state dict" in refusal(
        tmp_path / "w.safetensors"
    )


def test_pickles_ask_for_no_more_memory_than_they_have_bytes(tmp_path, state):
    """One value stretched over 4 TB, members that are compressed, layouts that are no plain numbers."""
    stretched = {**state, "norm.bias": torch.zeros(1).expand(10**6, 10**6)}
    assert "larger than the bytes they are made of, in norm.bias" in refusal(written(tmp_path / "w.pth", stretched))
    sparse = {**state, "norm.bias": torch.zeros(32).to_sparse()}
    assert "aren't dense" in refusal(written(tmp_path / "w.pth", sparse))
    whole = written(tmp_path / "v.pth", {**state, "big": torch.zeros(5_000_000)})
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    size = (tmp_path / "c.pth").stat().st_size
    assert size < 300_000 and f"has {size:,} bytes and announces 20," in refusal(tmp_path / "c.pth")


def bare(path: Path, pickled: bytes) -> Path:
    """A file of before torch 1.6, with that state dict and no bytes behind it."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join([*parts, b"\x80\x02" + pickled + b".", pickle.dumps([], 2)]))
    return path


def tensor_of(storage: bytes, length: int) -> bytes:
    """A dictionary with one tensor over all of a storage, as a pickle has it."""
    count = pickle.dumps(length, 2)[2:-1]
    stored = b"(X\x07\0\0\0storagec" + storage + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + count + b"NtQ"
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\0" + count + b"\x85K\x01\x85\x89"
    return b"}X\x01\0\0\0a" + built + b"ccollections\nOrderedDict\n)RtRs"


HUGE = pickle.dumps(10**12, 2)[2:-1]
ASKING = {
    "bytearray": (b"cbuiltins\nbytearray\n" + HUGE + b"\x85R", "more than tensors (builtins.bytearray)"),
    "of Python 2": (b"c__builtin__\nbytearray\n" + HUGE + b"\x85R", "more than tensors (__builtin__.bytearray)"),
    "a new object": (b"ctorch\nTensor\n" + HUGE + b"\x85\x81", "more than tensors (torch.Tensor)"),
    "a storage that is called": (
        b"ctorch.storage\nUntypedStorage\n" + HUGE + b"\x85R",
        "more than tensors (torch.storage.UntypedStorage)",
    ),
    "a storage without bytes": (tensor_of(b"torch\nFloatStorage", 10**11), "asks for storages of 400,000,000,000"),
    "hexadecimal digits": (b"c_codecs\nencode\n", "more than tensors (_codecs.encode)"),
    "copies": (b"]" + b"(" + b"K\0" * 200 + b"eq\0" + b"ccollections\nCounter\nh\0\x85R0" * 9, "operation POP"),
    "copies that are kept": (
        b"]q\x01(](" + b"K\0" * 99 + b"eq\0" + b"ccollections\nCounter\nq\x02h\0\x85R" + b"h\x02h\0\x85R" * 99 + b"e",
        "copies more values than its",
    ),
    "a mark that isn't there": (b"t", "its pickle is damaged"),
    "nothing": (b"", "its pickle is damaged"),
}


@pytest.mark.parametrize("where", ["bare", "archive"])
@pytest.mark.parametrize(("pickled", "told"), ASKING.values(), ids=ASKING)
def test_what_pickles_ask_torch_to_build(tmp_path, state, monkeypatch, pickled, told, where):
    """Told before torch reads the file."""
    path = bare(tmp_path / "w.pth", pickled)
    if where == "archive":
        with zipfile.ZipFile(path, "w") as members:
            members.writestr("w/data.pkl", b"\x80\x02" + pickled + b".")
            members.writestr("w/version", b"3")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch has read it"))
    assert told in refusal(path)


def test_archives_that_two_readers_could_read_differently(tmp_path, state, monkeypatch):
    """torch goes by the first four bytes, and finds the index by its own rules."""
    whole = written(tmp_path / "v.pth", state).read_bytes()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch has read it"))
    path = tmp_path / "w.pth"
    locator = len(whole) - 42
    assert whole[locator : locator + 4] == b"PK\x06\x07"
    moved = bytearray(whole)
    struct.pack_into("<Q", moved, locator + 8, 100)
    for content, told in (
        (whole + b"PK\x05\x06", "begins as an archive and doesn't end as one"),
        (whole[:-2] + b"\1\0x", "begins as an archive and doesn't end as one"),
        (bytes(moved), "the end of the archive isn't where it says"),
        (whole[:30] + b"x" + whole[30:], "isn't where it says"),
        (b"PK\x03\x04", "begins as an archive and doesn't end as one"),
    ):
        path.write_bytes(content)
        assert told in refusal(path)
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("w/data.pkl", b"\x80\x02}.")
        members.writestr("w/DATA.PKL", b"\x80\x02}.")
    assert "holds 2 files data.pkl" in refusal(path)


@pytest.mark.parametrize("archive", [True, False])
def test_everything_that_training_scripts_save_is_read(tmp_path, state, archive):
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.bool, torch.complex64)
    ordered = OrderedDict(state)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {
        "state_dict": ordered,
        "all kinds": {str(kind): torch.ones(2, dtype=kind) for kind in kinds},
        "optimizer": optimizer.state_dict(),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4]).state_dict(),
        "plain": [1, (2.5, None, True), "x", 2**70, torch.Size([1, 2]), torch.float32, torch.device("cpu"), set()],
        "views": [torch.nn.Parameter(torch.ones(2)), torch.arange(9.0)[3:5], torch.zeros(0)],
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=archive)
    found = read_weights(tmp_path / "w.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_what_is_no_file(tmp_path, state):
    for name, make in {"folder": Path.mkdir, "pipe": os.mkfifo}.items():
        for suffix in (".safetensors", ".pth"):
            make(tmp_path / f"{name}{suffix}")
            assert "is a folder, a pipe or a device" in refusal(tmp_path / f"{name}{suffix}")
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere.pth")
    assert "no such file" in refusal(tmp_path / "gone.pth")
    written(tmp_path / "real.safetensors", state)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    backbone = load_backbone("vit_firn_32", weights=tmp_path / "link.safetensors", **TINY)
    assert torch.equal(backbone.module.norm.weight, state["norm.weight"])


def test_weights_of_timm_are_looked_at_too(tmp_path, monkeypatch):
    import timm

    broken = timm.create_model("vit_firn_32", pretrained=True)
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: broken)
    with pytest.raises(WeightsError, match=r"'vit_firn_32\.omniglot' hold infinite or NaN values in norm\.weight"):
        load_backbone("vit_firn_32.omniglot")


# --------------------------------------------------------------------- exports
class Head:
    """A final model as `own_state` reads it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = load_backbone("vit_firn_32", pretrained=False)
        self.head = TaskwiseLinearHead(backbone.num_features)
        self.head.add_task([0, 1])
        self.model = FeatureClassifier(backbone.module, self.head)
        self.task = self.inference = None
        self.composed: dict[str, Any] = {}
        section = type("Section", (), {"name": "vit_firn_32", "fresh_final_norm": False})
        self.config = type("Config", (), {"backbone": section})


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    tensors, structure = own_state(Head())  # type: ignore[arg-type]
    header = {"firn_format": "1", "firn_form": "safetensors", "class_ids": "[0, 1]", "labels": '["a", "b"]'}
    path = tmp_path_factory.mktemp("export") / "own.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {**header, "structure": json.dumps(structure)})
    return path


def changed_export(source: Path, target: Path, change: Any = None, **header: str) -> Path:
    """With another description, other tensors (`change(structure, tensors)`) or another header."""
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        old = file.metadata()
    tensors, structure = load_file(source), json.loads(old["structure"])
    if change is not None:
        change(structure, tensors)
    save_file(tensors, target, {**old, "structure": json.dumps(structure), **header})
    return target


def test_an_export_loads(exported):
    model = load_exported(exported)
    assert model.class_ids == (0, 1) and model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, t: s["backbone"].update(weights="/etc/passwd"), "name and fresh_final_norm are"),
        (lambda s, t: s["backbone"].update(name="hf-hub:stranger/model"), "would be fetched; load_exported(..., hub=T"),
        (lambda s, t: s["backbone"].update(name="local-dir:/etc"), "would be fetched"),
        (lambda s, t: s["backbone"].update(name=["vit_firn_32"]), "doesn't hold what its header says"),
        (lambda s, t: s["backbone"].update(name="no_such_network"), "unknown backbone"),
        (lambda s, t: s["head"].update(in_features=10**12), "head.in_features is 1000000000000; no tensor is larger"),
        (lambda s, t: s["head"].update(in_features=True), "head.in_features is True"),
        (lambda s, t: s["head"].update(surprise=1), "doesn't hold what its header says"),
        (
            lambda s, t: s.update(projector={"hidden_features": 10**12, "out_features": 8, "normalize": True}),
            "projector.hidden_features is 1000000000000",
        ),
        (lambda s, t: s.update(pairs={"backbone.norm": {"rank": 2**50}}), "backbone.norm.rank is 1125899906842624"),
        (lambda s, t: s.pop("head"), "doesn't hold what its header says: KeyError"),
        (lambda s, t: s.update(pairs=[1]), "doesn't hold what its header says"),
        (lambda s, t: t["backbone.norm.bias"].fill_(float("nan")), "infinite or NaN values in backbone.norm.bias"),
        (lambda s, t: t.pop("backbone.norm.bias"), "backbone.norm.bias"),
        (lambda s, t: t.update({"backbone.norm.bias": torch.zeros(3)}), "backbone.norm.bias"),
        (
            lambda s, t: t.update({"backbone.norm.bias": torch.zeros(96, dtype=torch.int64)}),
            "backbone.norm.bias is torch.int64 and stands for torch.float32",
        ),
        (lambda s, t: t.update(stranger=torch.zeros(1)), "stranger"),
    ],
)
def test_exports_that_lie(tmp_path, exported, change, told, monkeypatch):
    def network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", network)
    with pytest.raises(ExportError) as caught:
        load_exported(changed_export(exported, tmp_path / "e.safetensors", change))
    assert told in str(caught.value) and "e.safetensors" in str(caught.value)


def test_exports_of_architectures_that_their_tensors_do_not_fill(tmp_path, exported):
    """A hundred bytes that name a network of four billion values, and a shape without values that allows any size."""
    import resource

    def giant(structure: Any, tensors: Any) -> None:
        structure["backbone"]["name"] = "vit_giant_patch14_224"

    def flat(structure: Any, tensors: Any) -> None:
        tensors["x"] = torch.zeros(30_000, 0)
        structure["projector"] = {"hidden_features": 30_000, "out_features": 30_000, "normalize": True}

    def square(structure: Any, tensors: Any) -> None:
        tensors["x"] = torch.zeros(30_000)
        structure["projector"] = {"hidden_features": 30_000, "out_features": 30_000, "normalize": True}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change, told in (
        (giant, "its modules have more than"),
        (square, "its modules have more than"),
        (flat, "projector.hidden_features is 30000; no tensor is larger than"),
    ):
        with pytest.raises(ExportError) as caught:
            load_exported(changed_export(exported, tmp_path / "e.safetensors", change))
        assert told in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    "header",
    [{"class_ids": "[0]"}, {"labels": "5"}, {"class_ids": "["}, {"structure": "[" * 100_000}, {"labels": "[]"}],
)
def test_headers_of_exports_that_lie(tmp_path, exported, header):
    with pytest.raises(ExportError, match=r"e\.safetensors doesn't hold what its header says"):
        load_exported(changed_export(exported, tmp_path / "e.safetensors", **header))


def test_exports_that_are_no_files(tmp_path, exported):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "absent.safetensors", tmp_path / "pipe.safetensors"):
        with pytest.raises(ConfigError, match="isn't a file"):
            load_exported(path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(exported.read_bytes()[:-10])
    with pytest.raises(ExportError, match=r"cut\.safetensors is truncated or no safetensors file"):
        load_exported(cut)


# ------------------------------------------------------------------- landscapes
def saved_landscape(folder: Path) -> Path:
    axis = np.linspace(-1, 1, 3)
    values = np.arange(9.0).reshape(3, 3) + 1
    arrays = dict(xs=axis, ys=axis, loss=values, accuracy=values / 10, path=np.zeros((0, 2)), explained=np.zeros(0))
    np.savez(folder / "l.npz", **arrays, labels=np.array([], dtype=str), axes=np.array(["x", "y"]))
    return folder / "l"


def test_landscapes_of_strangers(tmp_path, monkeypatch):
    stem = saved_landscape(tmp_path)
    assert Landscape.load(stem).loss.shape == (3, 3)
    with np.load(f"{stem}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    marker = tmp_path / "ran"
    hostile = np.empty(1, dtype=object)
    hostile[0] = pickle.loads  # any object: stored as a pickle
    for changed in (
        {**arrays, "labels": hostile},
        {**arrays, "loss": np.zeros((2, 2))},
        {**arrays, "xs": np.array([1.0, 1.0, 1.0])},
        {**arrays, "stranger": np.zeros(1)},
        {k: v for k, v in arrays.items() if k != "axes"},
        {**arrays, "axes": np.array([])},
        {**arrays, "loss": arrays["loss"].astype(complex)},
    ):
        np.savez(tmp_path / "w.npz", **changed)
        with pytest.raises(ValueError, match=r"w\.npz isn't a landscape as it was saved") as caught:
            Landscape.load(tmp_path / "w")
        assert str(tmp_path / "w.npz") in str(caught.value)
    (tmp_path / "w.npz").write_bytes(payload(marker))
    with pytest.raises(ValueError, match=r"w\.npz isn't a landscape"):
        Landscape.load(tmp_path / "w")
    for content in (b"", b"\x93NUMPY\x01\x00v\x00", (tmp_path / "l.npz").read_bytes()[:-30]):
        (tmp_path / "w.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.npz isn't a landscape"):
            Landscape.load(tmp_path / "w")
    assert not marker.exists()
    with zipfile.ZipFile(tmp_path / "l.npz") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    for shape in ((10**13,), (10**17, 10**17), (10**12, 0), (2,), (4,)):  # three values are there
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": "<f8"})
        with zipfile.ZipFile(tmp_path / "w.npz", "w") as made:
            for name, content in members.items():
                values = b"" if 0 in shape else content[-24:]
                made.writestr(name, header.getvalue() + values if name == "xs.npy" else content)
        with pytest.raises(ValueError, match=r"w\.npz isn't a landscape as it was saved: xs\.npy announces"):
            Landscape.load(tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_BZIP2) as made:
        for name, content in members.items():
            made.writestr(name, content)
    with pytest.raises(ValueError, match=r"xs\.npy is compressed by method 12; accepted is deflated"):
        Landscape.load(tmp_path / "w")
    monkeypatch.setattr(landscapes, "MAX_BYTES", 10**6)
    np.savez_compressed(tmp_path / "w.npz", **{**arrays, "loss": np.zeros((1000, 1000))})
    assert (tmp_path / "w.npz").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"announces 8,00\d,\d+ bytes; accepted are 1,000,000"):
        Landscape.load(tmp_path / "w")
    (tmp_path / "w.npz").unlink()
    os.mkfifo(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match=r"w\.npz is not a file"):
        Landscape.load(tmp_path / "w")


# ------------------------------------------------------------- lists and stores
def test_lists_of_strangers(tmp_path):
    marker = tmp_path / "ran"
    good = tmp_path / "good.txt"
    good.write_text("a/1.png\n")
    texts = {
        "tag.yaml": f"data: !!python/object/apply:os.system ['touch {marker}']",
        "new.yaml": f"data: !!python/object/new:pathlib.Path ['{marker}']",
        "name.yaml": "data: !!python/name:os.system ''",
        "deep.yaml": "data: " + "[" * 50_000,
        "bomb.yaml": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndata: [*c, *c]",
        "binary.yaml": "data: !!binary |\n  gIB",
        "numbers.yaml": "data: [1, 2]",
        "outside.txt": "a/../x.png\n",
        "bytes.txt": None,
        "twice.yaml": "data: [a/x.png]\ndata: [a/c.png]\n",
        "merged.yaml": "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
        + "data: [a/b.png]\n",
        "deep-beside.yaml": "data: [a/b.png]\nx: " + "[" * 300_000,
        "two.yaml": "data: [a/b.png]\n---\ndata: [a/c.png]\n",
        "key.yaml": "? [data]\n: [a/b.png]\n",
        "inner.yaml": "data: [[a/b.png]]",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(b"\xff\xfe\x00" if text is None else text.encode())
        with pytest.raises(StreamError) as caught:
            read_name_lists(path, good)
        assert str(path) in str(caught.value), name
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(StreamError, match=r"large\.txt cannot be read: it has 67,108,865 bytes"):
        read_name_lists(tmp_path / "large.txt", good)
    begun = time.perf_counter()
    (tmp_path / "commas.txt").write_text("a/b" + "," * 200_000 + "x\nb/c.png , 17\nb/d7\n")
    assert read_name_lists(tmp_path / "commas.txt", good)[0] == ["a/b" + "," * 200_000 + "x", "b/c.png", "b/d7"]
    assert time.perf_counter() - begun < 5
    (tmp_path / "other.yaml").write_text(
        "x: {data: [1], y: [{}]}\n'data': ['x/y/1.png', \"b/2.png\", 007/a b.png]\nz: 3\n"
    )
    assert read_name_lists(tmp_path / "other.yaml", good)[0] == ["007/a b.png", "b/2.png", "y/1.png"]
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(StreamError, match="it is no file"):
            read_name_lists(path, good)
        with pytest.raises(StreamError, match="it is no file"):
            read_split(path)
    assert not marker.exists()


def test_stores_of_strangers(tmp_path):
    """Whatever lies in the place of stored images: they are decoded anew."""
    facts, rows = {"what": "test"}, np.arange(3)
    file = stored_file(tmp_path, "x", facts)
    images = torch.arange(3 * 4, dtype=torch.uint8).view(3, 1, 2, 2)
    file.write_bytes(images.numpy().tobytes())
    write_facts(ImageStore(images, 3, rows, 3, Place(torch.device("cpu"), file)), facts)
    store = read_store(file, facts, rows, 3)
    assert store is not None and torch.equal(store.images, images)
    beside = file.with_suffix(".json")
    content = json.loads(beside.read_text())
    for text in (
        "",
        "[]",
        "{" * 100_000,
        json.dumps({**content, "shape": [3, 1, 2, 2**40]}),
        json.dumps({**content, "shape": [3, 1, 2, True]}),
        json.dumps({**content, "shape": [3, 1, 2, 2.0]}),
        json.dumps({**content, "channels": 2}),
        json.dumps({**content, "format": 99}),
        json.dumps({**content, "stranger": 1}),
    ):
        beside.write_text(text)
        assert read_store(file, facts, rows, 3) is None
    beside.write_text(json.dumps(content))
    file.write_bytes(images.numpy().tobytes()[:-1])
    assert read_store(file, facts, rows, 3) is None
    for place in (file, beside):
        place.unlink()
        os.mkfifo(place)
        assert read_store(file, facts, rows, 3) is None


# ----------------------------------------------------------------------- CIFAR
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar_of_either_version(tmp_path, monkeypatch, version, classes):
    made = write_cifar(tmp_path, monkeypatch, version, classes)
    for part, (pixels, labels) in made.items():
        images, found = read_cifar(classes, tmp_path, part)
        assert images.shape == (len(labels), 32, 32, 3) and images.flags.c_contiguous and found == labels
        assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(len(labels), -1), pixels)


@pytest.mark.parametrize("classes", [10, 100])
def test_both_versions_and_torchvision_say_the_same(tmp_path, monkeypatch, classes):
    write_cifar(tmp_path / "p", monkeypatch, "python", classes)
    kind = patch_torchvision(monkeypatch, tmp_path / "p", classes)
    write_cifar(tmp_path / "b", monkeypatch, "binary", classes)
    for part in ("train", "test"):
        theirs = kind(tmp_path / "p", train=part == "train")  # unpickles
        for root in ("p", "b"):
            images, labels = read_cifar(classes, tmp_path / root, part)
            assert np.array_equal(images, theirs.data) and labels == theirs.targets


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SplitCIFAR10", {"n_experiences": 5, "seed": 3}),
        ("SplitCIFAR10", {"n_experiences": 2, "fixed_class_order": list(range(10)), "return_task_id": True}),
        ("SplitCIFAR100", {"n_experiences": 10, "seed": 1, "class_ids_from_zero_in_each_exp": True}),
    ],
)
@pytest.mark.parametrize("version", ["binary", "python"])
def test_avalanches_benchmarks_are_what_they_were(tmp_path, monkeypatch, name, options, version):
    """The streams of Avalanche's own function on torchvision's class, bit for bit, without its pickles."""
    classes = 100 if name.endswith("100") else 10
    write_cifar(tmp_path / "p", monkeypatch, "python", classes)
    patch_torchvision(monkeypatch, tmp_path / "p", classes)
    root = tmp_path / ("p" if version == "python" else "b")
    write_cifar(root, monkeypatch, version, classes)
    build = getattr(classic.classic, name)
    theirs = classic.wrap_benchmark(name, build(dataset_root=tmp_path / "p", **options))
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "load", None)
        patch.setattr(pickle, "loads", None)
        ours = avalanche_stream(name, dataset_root=root, **options)
    assert (ours.fingerprint, ours.class_order, ours.task_sizes) == (
        theirs.fingerprint,
        theirs.class_order,
        theirs.task_sizes,
    )
    for part in ("train", "test"):
        for one, two in zip(ours.benchmark.streams[part], theirs.benchmark.streams[part], strict=True):
            pairs = zip(one.dataset.eval(), two.dataset.eval(), strict=True)
            assert all(torch.equal(a[0], b[0]) and tuple(a[1:]) == tuple(b[1:]) for a, b in pairs)


def test_absent_and_damaged_files_of_cifar(tmp_path, monkeypatch):
    with pytest.raises(StreamError, match=r"data_batch_1\.bin is absent, CIFAR-10 needs it; download=True fetches"):
        read_cifar(10, tmp_path, "train")
    write_cifar(tmp_path, monkeypatch, "binary")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StreamError, match=rf"{file} has the MD5 checksum [0-9a-f]+; accepted: [0-9a-f]+; remove"):
        read_cifar(10, tmp_path, "test")
    file.unlink()
    with pytest.raises(StreamError, match=r"test_batch\.bin is absent"):
        read_cifar(10, tmp_path, "test")
    file.mkdir()
    with pytest.raises(StreamError, match=r"test_batch\.bin is absent"):
        read_cifar(10, tmp_path, "test")


def test_cifar_is_fetched_as_the_binary_version(tmp_path, monkeypatch):
    import dataclasses
    import hashlib
    import tarfile

    from avalanche_firn.benchmarks.downloads import RemoteFile

    write_cifar(tmp_path / "server", monkeypatch, "binary", 100)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "server" / "cifar-100-binary", "cifar-100-binary")
    content = (tmp_path / "c.tar.gz").read_bytes()
    remote = RemoteFile((tmp_path / "c.tar.gz").as_uri(), "c.tar.gz", hashlib.md5(content).hexdigest(), len(content))
    monkeypatch.setitem(cifar.CIFAR, 100, dataclasses.replace(cifar.CIFAR[100], archive=remote))
    found = read_cifar(100, tmp_path / "root", "test", download=True)
    assert np.array_equal(found[0], read_cifar(100, tmp_path / "server", "test")[0])
    for known in cifar.CIFAR.values():  # the official addresses
        assert known.archive.url == f"https://www.cs.toronto.edu/~kriz/{known.archive.name}" or known.classes == 100


def test_a_pickle_with_the_right_sum_is_still_not_executed(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    pixels, labels = small_cifar(10, 20, 1)
    honest = python2_batch(labels, pixels)
    contents = {
        "a payload": payload(marker),
        "a payload behind": honest[:-1] + payload(marker)[2:],
        "another array": honest.replace(b"_reconstruct", b"fromstring__"),
        "another type": honest.replace(b"u1", b"O8"),
        "half": honest[: len(honest) // 2],
        "a list": pickle.dumps([1, 2], protocol=2),
        "protocol 4": pickle.dumps({"labels": [1], "data": b"x"}, protocol=4),
        "a wrong label": honest.replace(b"]q\x05(K" + bytes([labels[0]]), b"]q\x05(K\x63", 1),
        "no labels": honest.replace(b"\x06labels", b"\x06lobels"),
        "text": b"no pickle",
    }
    for content in contents.values():
        write_cifar(tmp_path, monkeypatch, "python")
        file = tmp_path / "cifar-10-batches-py" / "test_batch"
        file.write_bytes(content)
        import dataclasses
        import hashlib

        known = cifar.CIFAR[10]
        sums = {**known.python[1], "test": {"test_batch": hashlib.md5(content).hexdigest()}}
        monkeypatch.setitem(cifar.CIFAR, 10, dataclasses.replace(known, python=(known.python[0], sums)))
        with pytest.raises(StreamError) as caught:
            read_cifar(10, tmp_path, "test")
        assert str(file) in str(caught.value) and not marker.exists()


def test_tokens():
    """Values of every accepted operation, and calls as names; a GLOBAL is never looked up."""
    values = {"a": [1, 300, -5, 70_000, True, False, None], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "é": [[]]}
    assert read_tokens(pickle.dumps(values, protocol=2)) == values
    shared = [1, 2]
    found = read_tokens(pickle.dumps([shared, shared], protocol=2))
    assert found == [shared, shared] and found[0] is found[1]
    call = read_tokens(b"\x80\x02cno.such.module\nname\nK\x05\x85R}b.")
    assert isinstance(call, Call) and call.of == Name("no.such.module name")
    assert call.arguments == (5,) and call.state == {}
    for wrong in (b"", b".", b"\x80\x02.", b"(", b"\x80\x02K\x01a.", b"\x80\x02]K\x01s.", b"\x80\x02e.", b"h\x05.",
                  b"\x80\x02K\x01K\x02.", b"\x80\x02T\xff\xff\xff\x7fabc.", b"\x80\x02(]K\x01u.",
                  b"cos\nsystem\n\x81."):  # fmt: skip
        with pytest.raises(ValueError):
            read_tokens(wrong)
    tracemalloc.start()
    with pytest.raises(ValueError):
        read_tokens(b"\x80\x02T\xff\xff\xff\x7f" + b"x" * 100)  # says that it has 2 GB
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# ---------------------------------------------------------- Avalanche's loaders
def loader_of(path: Path, how: str) -> Any:
    """A benchmark whose loader unpickles a file, and may hide what goes wrong."""

    def build() -> Any:
        if how == "torch":
            return torch.load(path)
        if how == "torch, unsafe":
            return torch.load(path, weights_only=False)
        if how == "text":
            return pickle.loads(path.read_bytes())
        with open(path, "rb") as file:
            if how == "class":
                return pickle.Unpickler(file).load()
            try:
                return pickle.load(file)
            except pickle.UnpicklingError:
                if how == "swallowed":
                    return "what another loader gives"
                raise

    return build


@pytest.mark.parametrize("how", ["file", "class", "text", "torch", "torch, unsafe", "swallowed"])
def test_loaders_of_others_unpickle_plain_values_only(tmp_path, monkeypatch, how):
    marker, path = tmp_path / "ran", tmp_path / "list.pkl"
    code, plain = payload(marker), {"train": [["a.png", 3]], "order": (1, 2.5, None, "x")}
    if how.startswith("torch"):
        torch.save(plain, path)
    else:
        path.write_bytes(pickle.dumps(plain))
    build = loader_of(path, how)
    assert classic._built_from_plain_values("X", build, {}) == plain
    if how.startswith("torch"):
        torch.save({"x": type("Hidden", (), {}), "y": torch.nn.Linear(1, 1)}.get("y"), path)
    else:
        path.write_bytes(code)
    with pytest.raises(StreamError) as caught:
        classic._built_from_plain_values("X", build, {})
    assert str(caught.value).startswith("X: ") and "FIRN_TRUST_PICKLES=1" in str(caught.value)
    assert "a pickle names" in str(caught.value) if how == "text" else str(path) in str(caught.value)
    assert not marker.exists()
    assert pickle.loads(pickle.dumps(Path("x"))) == Path("x")  # afterwards all is as before


def test_other_threads_unpickle_as_ever():
    import threading

    found: list[Any] = []
    with plain_pickles_only() as refused:
        thread = threading.Thread(target=lambda: found.append(pickle.loads(pickle.dumps(Path("x")))))
        thread.start()
        thread.join()
    assert found == [Path("x")] and refused == []


def test_old_files_of_torchvision_are_not_unpickled(tmp_path):
    """MNIST/processed: torchvision takes these files before it looks at others."""
    marker, old = tmp_path / "ran", tmp_path / "MNIST" / "processed"
    old.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (old / name).write_bytes(payload(marker))
    for name in ("SplitMNIST", "PermutedMNIST", "SplitFMNIST"):
        if name == "SplitFMNIST":
            old.parent.rename(tmp_path / "FashionMNIST")
        with pytest.raises(StreamError, match=rf"{name}: .*processed/training\.pt: it holds more than tensors"):
            avalanche_stream(name, n_experiences=2, dataset_root=tmp_path)
    assert not marker.exists()


def test_only_the_environment_can_say_that_pickles_are_trusted(tmp_path, monkeypatch):
    path = tmp_path / "list.pkl"
    path.write_bytes(pickle.dumps(Path("x")))
    monkeypatch.setattr(classic.classic, "SplitMNIST", lambda **kwargs: loader_of(path, "file")())
    monkeypatch.setattr(classic, "avalanche_without_pickles", lambda build: plain_pickles_only())
    with pytest.raises(StreamError, match=r"names pathlib\.\w+"):
        avalanche_stream("SplitMNIST")
    monkeypatch.undo()
    monkeypatch.setenv("FIRN_TRUST_PICKLES", "1")
    monkeypatch.setattr(classic.classic, "SplitMNIST", lambda **kwargs: loader_of(path, "file")())
    with pytest.raises(StreamError, match="has the streams"):  # the unpickled path is no benchmark
        avalanche_stream("SplitMNIST")


# ------------------------------------------------------------------- folders of runs
@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "naive" / "seed-0"
    with pytest.MonkeyPatch.context() as patch:
        strike_loss(patch, 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(single(shared_recipe(tmp_path_factory)), folder, quiet=True, say=None)
    return folder


LINKS = {
    "lock": ("can't write the lock of a run", "it is a link"),
    "checkpoint/lock": ("can't write the lock of a run", "it is a link"),
    "metrics.csv": ("metrics.csv is a link to ",),
    "events.out.tfevents.*": ("events.out.tfevents.", " is a link to "),
    "checkpoint": ("checkpoint is a link to ", "(a link to the whole folder of a run is accepted)"),
    "checkpoint/step-000000008": ("step-000000008 is a link to ",),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link_in_the_folder_of_a_run(name, interrupted, tmp_path, capfd):
    folder = Path(shutil.copytree(interrupted, tmp_path / "seed-0"))
    place, target = next(folder.glob(name), folder / name), tmp_path / "precious"
    if place.is_dir():
        shutil.copytree(place, target)
        (target / ".old-mail").mkdir()
        shutil.rmtree(place)
    else:
        target.write_text("letters\n" * 1000)
        place.unlink(missing_ok=True)
    place.symlink_to(target)
    before = {p: p.read_bytes() if p.is_file() else None for p in (target, *target.rglob("*"))}
    status, _, told = firn(["resume", folder, "--quiet"], capfd)
    assert status == 1 and "Traceback" not in told
    assert all(words in told for words in LINKS[name]), told
    assert {p: p.read_bytes() if p.is_file() else None for p in (target, *target.rglob("*"))} == before


@pytest.mark.filterwarnings("ignore")
def test_no_metrics_begin_behind_a_link(tmp_path_factory, tmp_path):
    """Without a checkpoint; the link leads to where no file is yet."""
    folder = tmp_path / "naive" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").symlink_to(tmp_path / "new")
    with pytest.raises(StorageError, match=r"can't write the metrics of a run, .*metrics\.csv.*it is a link"):
        run(single(shared_recipe(tmp_path_factory)), folder, quiet=True, say=None)
    assert not (tmp_path / "new").exists()


def test_a_file_is_not_written_through_a_link_under_its_first_name(tmp_path):
    (tmp_path / "precious").write_text("letters")
    (tmp_path / f".results.json.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "results.json", "{}")
    assert (tmp_path / "precious").read_text() == "letters" and (tmp_path / "results.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "results.json"]


@pytest.mark.filterwarnings("ignore")
def test_a_landscape_is_not_written_through_a_link(tmp_path):
    rows = np.zeros((3, 3))
    made = Landscape(xs=np.arange(3.0), ys=np.arange(3.0), loss=rows, accuracy=rows, path=np.zeros((1, 2)))
    for end in (".npz", "-loss.png", "-accuracy.png"):
        (tmp_path / f"precious{end}").write_text("letters")
        (tmp_path / f"landscape-adam{end}").symlink_to(tmp_path / f"precious{end}")
    transfer_run._save(made, tmp_path / "landscape-adam")
    assert all(path.read_text() == "letters" for path in tmp_path.glob("precious*"))
    assert np.array_equal(Landscape.load(tmp_path / "landscape-adam").loss, rows)


def test_a_run_folder_may_be_reached_through_a_link(interrupted, tmp_path, tmp_path_factory, capfd):
    shutil.copytree(interrupted, tmp_path / "elsewhere")
    (tmp_path / "seed-0").symlink_to(tmp_path / "elsewhere")
    assert firn(["resume", tmp_path / "seed-0", "--quiet"], capfd)[0] == 0
    assert_same(tmp_path / "elsewhere", whole_run(tmp_path_factory))
