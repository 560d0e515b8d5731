"""Writes tests/artefacts/vVERSION: what users of this version keep on their disks, for the tests of all later ones.

    OMP_NUM_THREADS=1 python tests/artefacts/make_artefacts.py [--output DIR] [--force]

Run once for every release, in its checkout, with the package installed; the version is the installed one's. It trains
the runs of `artefact_runs` (20 s): each once to its end and once until a Ctrl-C in the middle of the second task; then
exports, a LoRA adapter, a split list, a landscape and a store of images. Run folders are zip files. Names of machines
and paths are not stored: the script looks for them in every byte before it ends. What is promised of these files, and
what tests do with them: README.md beside this.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from avalanche.training.plugins.clock import Clock

sys.path.append(str(Path(__file__).parent))
from artefact_runs import METHODS, recipe_of

from avalanche_firn.benchmarks.image_store import ImageStore, Place, stored_file, write_facts
from avalanche_firn.benchmarks.split_lists import seeded_split, write_split
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.experiments import environment
from avalanche_firn.experiments.cli import main as firn
from avalanche_firn.experiments.export import export_run, final_model
from avalanche_firn.models.lora_export import save_peft_adapter

HERE = Path(__file__).parent
MOST = 400 * 1024  # bytes of a version's folder
STOP = 17  # training iterations of 18, of which the last 9 are the second task's
EXPORTED = {"lorac_ipc": "safetensors", "slca": "timm", "lp_ft": "hub-folder"}
STORE_FACTS = {"what": "ten grey images of 4x4"}
_EPOCH = (2020, 1, 1, 0, 0, 0)  # of members of zip files: the same content gives the same file


@contextlib.contextmanager
def nameless() -> Iterator[None]:
    """Without the machine's name, system and commit in what is written."""
    with (
        mock.patch.object(socket, "gethostname", lambda: "machine"),
        mock.patch.object(environment.platform, "platform", lambda *a, **k: "Linux"),
        mock.patch.object(environment, "git_commit", lambda *a, **k: None),
        mock.patch.object(environment.os, "cpu_count", lambda: 1),
    ):
        yield


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With that folder as the current one, so that no path is part of a configuration."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def interrupted_at(iteration: int) -> Iterator[None]:
    """A Ctrl-C after so many training iterations."""
    count = Clock.after_training_iteration

    def stop(self: Any, strategy: Any, *arguments: Any, **options: Any) -> None:
        count(self, strategy, *arguments, **options)
        if self.train_iterations == iteration:
            raise KeyboardInterrupt

    with mock.patch.object(Clock, "after_training_iteration", stop):
        yield


def run(label: str, place: Path, *, stop: int | None = None) -> Path:
    """Trains a recipe below `place` with the command line; returns the folder of its only run."""
    place.mkdir(parents=True)
    file = place / f"{label}.yaml"
    file.write_text(yaml.safe_dump(recipe_of(label), sort_keys=False), encoding="utf-8")
    output = io.StringIO()
    with inside(place), nameless(), contextlib.redirect_stdout(output):
        if stop is None:
            status = firn(["compare", file.name, "--quiet"])
        else:
            with interrupted_at(stop), contextlib.redirect_stderr(output):
                status = firn(["compare", file.name, "--quiet"])
    assert status == (0 if stop is None else 130), (label, status, output.getvalue())
    (folder,) = place.glob("runs/*/*/seed-0")
    assert (folder / "results.json").is_file() == (stop is None)
    return folder


def pack(folders: dict[str, Path], target: Path, *, checkpoint: bool) -> None:
    """Run folders as one zip file: of a finished one neither pictures nor event files, which nothing reads again.

    `checkpoint`: whether the finished run keeps its checkpoint, which an export needs.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, folder in folders.items():
            for path in sorted(folder.rglob("*")):
                inner = path.relative_to(folder).as_posix()
                idle = path.suffix == ".png" or path.name.startswith("events.")
                idle |= inner.startswith("checkpoint/") and not checkpoint
                if path.is_file() and path.name != "lock" and not (name == "finished" and idle):
                    info = zipfile.ZipInfo(f"{name}/{inner}", _EPOCH)
                    info.external_attr = 0o644 << 16
                    archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def make_runs(scratch: Path, target: Path) -> dict[str, Path]:
    """Stores the runs; returns the folders of the finished ones."""
    finished = {}
    for label in METHODS:
        finished[label] = run(label, scratch / label / "whole")
        half = run(label, scratch / label / "half", stop=STOP)
        newest = sorted(path.name for path in (half / "checkpoint").glob("step-*"))[-1]
        pack(
            {"finished": finished[label], "interrupted": half},
            target / f"{label}.zip",
            checkpoint=label in EXPORTED,
        )
        print(f"{label}: interrupted behind {newest}", flush=True)
    transfer = run("transfer", scratch / "transfer")
    pack({"finished": transfer}, target / "transfer.zip", checkpoint=False)
    return finished


def make_files(finished: dict[str, Path], target: Path) -> None:
    """Exports, adapter, lists, landscape, store; and what the exported models say about two images."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = {}
    with nameless():
        for label, form in EXPORTED.items():
            name = f"{label}-{form}" + ("" if form == "hub-folder" else ".safetensors")
            export_run(finished[label], form, output=target / name)
            answers[name] = final_model(finished[label]).logits(images).numpy()
        save_peft_adapter(final_model(finished["lorac_ipc"]).model, target / "lorac_ipc-adapter", submodule="backbone")
    np.savez(target / "answers.npz", images=images.numpy(), **answers)
    names = [f"class_{i % 3}/{i}.png" for i in range(30)]
    write_split(target / "split.txt", *seeded_split(names, 0.8, 7))
    axis, values = np.linspace(-1, 1, 3), np.arange(9.0).reshape(3, 3) + 1
    path = np.array([[-0.5, 0.5], [0.0, 0.0]])
    told: Any = dict(labels=("start", "end"), explained=(0.8, 0.1), axes=("u", "v"))
    plane = Landscape(axis, axis, values, values / 10, path, **told)
    for picture in plane.save(target / "landscape")[1:]:
        picture.unlink()
    stored = torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4)
    file = stored_file(target, "store", STORE_FACTS)
    file.write_bytes(stored.numpy().tobytes())
    write_facts(ImageStore(stored, 3, np.arange(10), 10, Place(torch.device("cpu"), file)), STORE_FACTS)


def check(folder: Path, scratch: Path) -> int:
    """Bytes of the folder; refuses names of this machine in it, also inside of its archives."""
    names = [socket.gethostname(), str(scratch), str(Path.home()), str(HERE.parents[1]), tempfile.gettempdir() + "/"]
    user = getpass.getuser()
    secret = [name.encode() for name in {*names, *([user] if user != "root" else [])} if len(name) > 3]

    def look(name: str, content: bytes) -> None:
        for word in secret:
            if word in content or word in name.encode():
                raise SystemExit(f"{name} holds {word.decode()!r}, which belongs to this machine")

    size = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size += path.stat().st_size
            look(path.relative_to(folder).as_posix(), path.read_bytes())
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        look(f"{path.name}/{member}", archive.read(member))
    if size > MOST:
        raise SystemExit(f"{folder} has {size:,} bytes; accepted: {MOST:,}")
    return size


def main(argv: list[str] | None = None) -> Path:
    """Makes the folder of the installed version."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE, help="holds the versions' folders (default: beside this)")
    parser.add_argument("--force", action="store_true", help="replace the folder of this version")
    arguments = parser.parse_args(argv)
    release = version("avalanche-firn")
    target: Path = arguments.output / f"v{release}"
    if target.exists():
        if not arguments.force:
            raise SystemExit(f"{target} is there: what a version has stored stays as it is; --force replaces it")
        shutil.rmtree(target)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="firn-artefacts-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = Path(temporary)
        made = scratch / "made"
        made.mkdir()
        finished = make_runs(scratch, made)
        make_files(finished, made)
        packages = ("torch", "torchvision", "timm", "avalanche-lib", "numpy", "safetensors", "pillow", "scikit-learn")
        facts = {"version": release, "python": sys.version.split()[0], "packages": {p: version(p) for p in packages}}
        (made / "made_by.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        size = check(made, scratch)
        shutil.copytree(made, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # some are written for the owner alone
    print(f"written {target}: {size:,} bytes")
    return target


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
