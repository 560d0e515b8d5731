"""What every released version has left on disks is still read: results, exports, adapters, lists, landscapes.

`tests/artefacts/vVERSION` was made by `tests/artefacts/make_artefacts.py` in that version; its README says what is
promised. Interrupted runs go on, or are refused in words; nothing in between.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "artefacts"))
from artefact_runs import BACKBONE, METHODS
from make_artefacts import EXPORTED, MOST, STORE_FACTS
from make_artefacts import main as make

from avalanche_firn.benchmarks import image_store
from avalanche_firn.benchmarks.archives import unpack
from avalanche_firn.benchmarks.image_store import read_store, stored_file
from avalanche_firn.benchmarks.split_lists import read_split, seeded_split
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.export import export_run, final_model, load_exported
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.results import find_runs, read_results
from avalanche_firn.experiments.run_folders import plan_runs

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
VERSIONS = sorted(path.name for path in ARTEFACTS.glob("v*") if path.is_dir())
NOW = pytest.param("now", marks=pytest.mark.slow)  # what this version would store


@pytest.fixture(scope="module")
def made_now(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the script has just made."""
    with redirect_stdout(io.StringIO()):
        yield make(["--output", str(tmp_path_factory.mktemp("artefacts"))])


@pytest.fixture(params=[*VERSIONS, NOW])
def stored(request: pytest.FixtureRequest) -> Path:
    """The folder of a version."""
    return request.getfixturevalue("made_now") if request.param == "now" else ARTEFACTS / request.param


def run_of(stored: Path, label: str, state: str, to: Path) -> Path:
    """A stored run in a folder of a comparison, as it lay there."""
    unpack(stored / f"{label}.zip", to / "unpacked" / label)
    name = "transfer/iid_zap" if label == "transfer" else f"artefacts/{label}"
    place = to / "runs" / name / "seed-0"
    place.parent.mkdir(parents=True)
    shutil.move(to / "unpacked" / label / state, place)
    return place


def told(*words: str | Path) -> tuple[int, str]:
    """Exit status and output of a command."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = main([str(word) for word in words])
    assert "Traceback" not in output.getvalue()
    return status, output.getvalue()


def test_the_first_version_is_there():
    assert "v0.1.0" in VERSIONS
    readme = (ARTEFACTS / "README.md").read_text(encoding="utf-8")
    assert all(name in readme for name in VERSIONS)


def test_size_and_origin(stored):
    files = [path for path in stored.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST
    facts = json.loads((stored / "made_by.json").read_text())
    assert stored.name == f"v{facts['version']}" and facts["packages"].keys() >= {"torch", "timm", "avalanche-lib"}
    assert {path.name for path in files} >= {"answers.npz", "split.txt", "landscape.npz", "transfer.zip"}
    assert {f"{label}.zip" for label in METHODS} <= {path.name for path in files}


@pytest.mark.parametrize("label", METHODS)
def test_finished_runs_count_as_finished(stored, label, tmp_path):
    run = run_of(stored, label, "finished", tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    results = read_results(run)
    assert results is not None and results["method"] == label and len(results["accuracy_matrix"]) == 2
    (planned,) = plan_runs(load_experiment(run / "config.yaml"), tmp_path / "runs" / "artefacts", fresh=False)
    assert planned.finished and planned.folder == run
    status, text = told("resume", run)  # there is nothing to do
    assert status == 0 and f"{100 * results['figures']['accuracy/last']:.2f}" in text
    assert {path: path.read_bytes() for path in before} == before


def test_reports_of_finished_runs(stored, tmp_path, request):
    labels = set(METHODS) if request.config.getoption("--slow") else {"slca", "lorac_ipc"}
    for label in labels:
        run_of(stored, label, "finished", tmp_path)
    found = find_runs([tmp_path / "runs"])
    assert {run["method"] for run in found} == labels
    status, text = told("report", tmp_path / "runs", "--output", tmp_path / "summary")
    assert status == 0 and all(label in text for label in labels)
    assert {"report.html", "report.md", "results.csv"} <= {path.name for path in (tmp_path / "summary").iterdir()}
    page = (tmp_path / "summary" / "report.html").read_text(encoding="utf-8")
    assert all(f"{100 * run['figures']['accuracy/last']:.2f}" in page for run in found)


def test_transfers(stored, tmp_path):
    run = run_of(stored, "transfer", "finished", tmp_path)
    results = read_results(run)
    assert results is not None and results["experiment"] == "transfer"
    status, text = told("report", run.parents[1])
    assert status == 0 and "iid_zap" in text
    assert Landscape.load(run / "landscape-adam").loss.shape == (3, 3)
    network = timm.create_model("convnet_28", width=2, num_classes=0)
    missing, unexpected = network.load_state_dict(load_file(run / "pretrained.safetensors"), strict=False)
    assert missing == [] and len(unexpected) <= 2  # the classifier of the pre-training


def answers(stored: Path) -> dict[str, torch.Tensor]:
    with np.load(stored / "answers.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and float(expected.abs().max()) > 0.1
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_exports_of_then_say_what_they_said(stored):
    said = answers(stored)
    images = said["images"]
    own = load_exported(stored / "lorac_ipc-safetensors.safetensors")
    close(own(images), said["lorac_ipc-safetensors.safetensors"])
    assert own.class_ids == tuple(range(10)) and own.inference is not None
    plain = timm.create_model(BACKBONE, num_classes=10)
    plain.load_state_dict(load_file(stored / "slca-timm.safetensors"))
    close(plain.eval()(images), said["slca-timm.safetensors"])
    hub = timm.create_model(f"local-dir:{stored / 'lp_ft-hub-folder'}", pretrained=True)
    close(hub.eval()(images), said["lp_ft-hub-folder"])


@pytest.mark.parametrize("label", EXPORTED)
def test_finished_runs_are_exported_now(stored, label, tmp_path):
    run = run_of(stored, label, "finished", tmp_path)
    name = f"{label}-{EXPORTED[label]}" + ("" if EXPORTED[label] == "hub-folder" else ".safetensors")
    said = answers(stored)
    close(final_model(run).logits(said["images"]), said[name])
    written = export_run(run, EXPORTED[label], output=tmp_path / name)
    if written.is_file():
        old, new = load_file(stored / name), load_file(written)
        assert old.keys() == new.keys() and all(torch.allclose(old[k], new[k], atol=1e-4) for k in old)


@torch.no_grad()
def test_adapters_of_then_are_the_pairs_of_the_model(stored):
    """PEFT's form: the backbone's weights with the pairs are the merged weights of the exported model."""
    folder = stored / "lorac_ipc-adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = load_exported(stored / "lorac_ipc-safetensors.safetensors").model
    assert config["peft_type"] == "LORA" and set(config["target_modules"]) == set(config["rank_pattern"])
    for name in config["target_modules"]:
        down, up = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        layer: Any = model.backbone.get_submodule(name)
        assert len(down) == config["rank_pattern"][name] == config["alpha_pattern"][name]
        assert torch.allclose(layer.base.weight + up @ down, layer.merged_weight(None), atol=1e-5)


def test_lists_landscapes_and_stores(stored, tmp_path, monkeypatch):
    train, test = read_split(stored / "split.txt")
    names = [f"class_{i % 3}/{i}.png" for i in range(30)]
    assert (list(train), list(test)) == tuple(map(list, seeded_split(names, 0.8, 7)))
    plane = Landscape.load(stored / "landscape")
    assert plane.labels == ("start", "end") and plane.explained == (0.8, 0.1) and plane.axes == ("u", "v")
    assert plane.loss.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]] and plane.path.shape == (2, 2)
    (beside,) = stored.glob("store-*.json")
    content = json.loads(beside.read_text())
    written = {name: content[name] for name in ("format", "pillow", "torchvision")}
    if image_store._versions() != written:  # a cache: of another decoder, it isn't used but made anew
        assert read_store(stored_file(stored, "store", STORE_FACTS), STORE_FACTS, np.arange(10), 10) is None
    monkeypatch.setattr(image_store, "_versions", lambda: written)
    file = stored_file(stored, "store", STORE_FACTS)
    assert file.with_suffix(".json") == beside
    store = read_store(file, STORE_FACTS, np.arange(10), 10)
    assert store is not None and store.images.flatten().tolist() == list(range(160))


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[] if label == "slca" else pytest.mark.slow) for label in METHODS]
)
def test_interrupted_runs_go_on_or_are_refused_in_words(stored, label, tmp_path):
    run = run_of(stored, label, "interrupted", tmp_path / "half")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    facts = json.loads((stored / "made_by.json").read_text())
    same = all(version(package) == there for package, there in facts["packages"].items())
    status, text = told("resume", run, "--quiet")
    if status != 0:
        # words: which format or version is there, which is accepted; and the run is as it was
        assert status in (1, 2) and text.startswith("firn: ") and str(run) in text
        assert "format" in text or "version" in text
        assert facts["version"] != version("avalanche-firn"), "a version reads what it has written itself"
        assert {path: path.read_bytes() for path in before} == before
        return
    found = read_results(run)
    expected = read_results(run_of(stored, label, "finished", tmp_path / "whole"))
    assert found is not None and expected is not None
    assert np.shape(found["accuracy_matrix"]) == np.shape(expected["accuracy_matrix"])
    for tag, value in expected["figures"].items():
        if value is not None:
            assert found["figures"][tag] == pytest.approx(value, abs=1e-12 if same else 0.15), tag
