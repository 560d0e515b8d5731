"""Nothing that the project loads is ever unpickled or executed: the sources say so, and so does Python's audit log.

The static part reads every source file as a syntax tree, with the names that imports give to things; what is allowed
stands in a list, each entry with its reason. The dynamic part listens to the audit events of loading.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parent))
from strangers import payload, write_cifar

ROOT = Path(__file__).parents[2]
FOLDERS = ("models", "benchmarks", "plugins", "evaluation", "strategies", "experiments", "examples", "speed")

# (file, what is found there) -> why it may be there. An entry that nothing needs any more is an error too.
ALLOWED = {
    ("models/weight_files.py", "pickle.UnpicklingError"): "the name of torch's error for weights_only=True",
    ("models/weight_pickles.py", "pickle.UnpicklingError"): "the same name, for what is told before torch reads it",
    ("benchmarks/pickles.py", "pickle.Unpickler"): "exchanged for one that looks no name up, around loaders of others",
    ("benchmarks/pickles.py", "pickle.load"): "the same",
    ("benchmarks/pickles.py", "pickle.loads"): "the same",
    ("benchmarks/pickles.py", "pickle.UnpicklingError"): "base of the error that says so",
    ("benchmarks/pickles.py", "torch.load under another name"): "called with weights_only=True unless a loader says no",
    ("benchmarks/pickles.py", "torch.load without weights_only=True"): "the same; other threads' calls are handed on",
    ("experiments/plain_yaml.py", "yaml.load"): "with a SafeLoader, see test_yaml_loaders_are_safe",
    ("benchmarks/cars196.py", "scipy.io.loadmat"): "numbers and texts of MATLAB files; builds no objects",
    ("experiments/report_svg.py", "xml.etree.ElementTree"): "parses what matplotlib has drawn in this process",
    ("speed/scripts.py", "importlib.import_module"): "names of scripts in this repository",
    ("speed/memory.py", "importlib.import_module"): "the same",
    ("speed/__main__.py", "importlib.import_module"): "the same",
    ("speed/peer_slca.py", "importlib.import_module"): "runs code of another repository on purpose, not installed",
}
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"),
    *("xml", "lxml", "code", "runpy", "imp"),
}
FORBIDDEN = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader", "yaml.CUnsafeLoader", "yaml.CFullLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load_state_dict_from_url"),
    *("shutil.unpack_archive", "scipy.io.loadmat", "importlib.import_module", "numpy.fromregex"),
    *("pandas.read_pickle", "pandas.eval", "numpy.lib.format.read_array"),
    *("torchvision.datasets.utils.extract_archive", "torchvision.datasets.utils.download_and_extract_archive"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"extractall"}


class Finder(ast.NodeVisitor):
    """Collects what may execute data, by the names that things really have."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.found: list[tuple[int, str]] = []

    def add(self, node: ast.AST, what: str) -> None:
        self.found.append((getattr(node, "lineno", 0), what))

    def dotted(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            above = self.dotted(node.value)
            return None if above is None else f"{above}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            # uses of pickle are looked at one by one, of the others none is expected
            if alias.name.partition(".")[0] in MODULES - {"pickle"}:
                self.add(node, alias.name)
            if alias.name == "pickle" and alias.asname:
                self.add(node, "pickle under another name")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for alias in node.names:
            name = f"{module}.{alias.name}"
            self.names[alias.asname or alias.name] = name
            if module.partition(".")[0] in MODULES or name in FORBIDDEN:
                self.add(node, name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.dotted(node)
        builtin = name is not None and name.startswith("builtins.") and name.partition(".")[2] in BUILTINS
        if name is not None and (builtin or name in FORBIDDEN or name.startswith("pickle.")):
            self.add(node, name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        options = {k.arg: k.value for k in node.keywords}
        constants = {k: v.value for k, v in options.items() if isinstance(v, ast.Constant)}
        if isinstance(node.func, ast.Name) and name in BUILTINS:
            self.add(node, f"{name}()")
        if name == "torch.load" and constants.get("weights_only") is not True:
            self.add(node, "torch.load without weights_only=True")
        if name == "numpy.load" and constants.get("allow_pickle") is not False:
            self.add(node, "numpy.load without allow_pickle=False")
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            self.add(node, f".{node.func.attr}()")
        for option, wrong in (("shell", True), ("trust_remote_code", True), ("allow_pickle", True)):
            if option in options and (option not in constants or constants[option] is wrong):
                self.add(node, f"{option}={wrong}")
        if constants.get("weights_only") is False:
            self.add(node, "weights_only=False")
        if name == "getattr" and node.args and self.dotted(node.args[0]) in {"pickle", "builtins"}:
            self.add(node, f"getattr({self.dotted(node.args[0])}, ...)")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:  # a function under another name: seen where it is given the name
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=False) if several else [(target, node.value)]
            for name_node, value in pairs:
                if isinstance(name_node, ast.Name) and (name := self.dotted(value)) is not None:
                    if name in {"torch.load", "numpy.load"}:
                        self.add(node, f"{name} under another name")
                    self.names.setdefault(name_node.id, name)
        self.generic_visit(node)


def findings(source: str) -> list[tuple[int, str]]:
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield ROOT / "setup.py"


# ---------------------------------------------------------------------- static
def test_no_source_unpickles_or_executes_data():
    wrong, used = [], set()
    count = 0
    for path in sources():
        count += 1
        name = path.relative_to(ROOT).as_posix()
        for line, what in findings(path.read_text(encoding="utf-8")):
            if (name, what) in ALLOWED:
                used.add((name, what))
            else:
                wrong.append(f"{name}:{line} {what}")
    assert count > 150  # else the folders have moved
    assert wrong == []
    assert set(ALLOWED) - used == set(), "nothing needs these exceptions any more"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("import pickle as p\np.loads(x)", "pickle under another name"),
        ("from pickle import loads as l\nl(x)", "pickle.loads"),
        ("def f():\n    import pickle\n    return pickle.Unpickler(f)", "pickle.Unpickler"),
        ("import dill", "dill"),
        ("import joblib\njoblib.load(x)", "joblib"),
        ("from shelve import open", "shelve.open"),
        ("import marshal", "marshal"),
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=flag)", "torch.load without weights_only=True"),
        ("from torch import load\nload(p)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(p)", "torch.load without weights_only=True"),
        ("import torch\nread = torch.load", "torch.load under another name"),
        ("import torch\na, read = 1, torch.load", "torch.load under another name"),
        ("import torch\ntorch.hub.load('x/y', 'z')", "torch.hub.load"),
        ("from torch import hub\nhub.load('x/y', 'z')", "torch.hub.load"),
        ("import numpy as np\nnp.load(p)", "numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "allow_pickle=True"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "yaml.Loader"),
        ("import yaml\nyaml.load(t, Loader=Mine)", "yaml.load"),
        ("from yaml import unsafe_load", "yaml.unsafe_load"),
        ("import yaml\nyaml.full_load(t)", "yaml.full_load"),
        ("eval(text)", "eval()"),
        ("exec(text)", "exec()"),
        ("compile(text, 'x', 'eval')", "compile()"),
        ("__import__(name)", "__import__()"),
        ("import builtins\nbuiltins.eval(text)", "builtins.eval"),
        ("import importlib\nimportlib.import_module(name)", "importlib.import_module"),
        ("tar.extractall(folder)", ".extractall()"),
        ("import shutil\nshutil.unpack_archive(a, b)", "shutil.unpack_archive"),
        ("import subprocess\nsubprocess.run(c, shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.run(c, shell=flag)", "shell=True"),
        ("import os\nos.system(c)", "os.system"),
        ("datasets.load_dataset(n, trust_remote_code=True)", "trust_remote_code=True"),
        ("import xml.dom.minidom", "xml.dom.minidom"),
        ("from lxml import etree", "lxml.etree"),
        ("from scipy.io import loadmat", "scipy.io.loadmat"),
        ("import pickle\ngetattr(pickle, 'lo' + 'ad')(f)", "getattr(pickle, ...)"),
    ],
)
def test_planted_sources_are_found(source, told):
    assert told in [what for _, what in findings(source)]


def test_harmless_sources_are_not():
    source = """
    import re, numpy as np, torch, yaml, json, subprocess
    re.compile("x"); model.eval(); torch.compile(model); json.load(f); model.load(f)
    torch.load(p, map_location="cpu", weights_only=True); np.load(p, allow_pickle=False)
    yaml.safe_load(t); yaml.safe_dump(v); subprocess.run(["git", "status"]); strategy.compile = None
    """
    assert findings(textwrap.dedent(source)) == []


def test_yaml_loaders_are_safe():
    """The classes that are given to yaml.load build plain values only, tried out with every unsafe tag."""
    from avalanche_firn.benchmarks import split_lists
    from avalanche_firn.experiments import plain_yaml, recipe
    from avalanche_firn.experiments.errors import ConfigError

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    assert issubclass(loader, yaml.constructor.SafeConstructor) and split_lists.yaml is yaml
    assert issubclass(plain_yaml._Loader, yaml.SafeLoader)
    tags = ("object/apply:os.getcwd []", "object:pathlib.Path {}", "name:os.getcwd ''", "module:os ''",
            "object/new:tuple [[1]]", "tuple [1]", "bytes ''", "complex 1")  # fmt: skip
    for tag in tags:
        with pytest.raises(ConfigError, match=r"YAML|isn't accepted"):
            recipe.parse(f"a: !!python/{tag}")
        with pytest.raises(yaml.YAMLError):
            yaml.load(f"a: !!python/{tag}", Loader=loader)


# --------------------------------------------------------------------- dynamic
LISTENING: list[list[str]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if LISTENING and event in ("pickle.find_class", "os.system", "subprocess.Popen"):
        LISTENING[-1].append(f"{event} {arguments}")
    elif LISTENING and event == "marshal.loads":
        frame = sys._getframe(1)
        if "importlib" not in frame.f_code.co_filename:  # Python reads its own modules so
            LISTENING[-1].append(event)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Audit events of unpickling and of starting programs. A hook can't be taken back, so it is added once."""
    if not hasattr(sys, "_firn_listens"):
        sys.addaudithook(_listen)
        sys._firn_listens = True  # type: ignore[attr-defined]
    LISTENING.append([])
    try:
        yield LISTENING[-1]
    finally:
        LISTENING.pop()


def test_the_ear_hears(tmp_path):
    with heard() as events:
        pickle.loads(pickle.dumps(Path("x")))
        os.system("true")
    assert any(event.startswith("pickle.find_class") for event in events) and "os.system" in events[-1]
    events.clear()
    pickle.loads(pickle.dumps(Path("x")))
    assert events == []


def test_loading_what_strangers_made_is_silent(tmp_path, monkeypatch):
    """Weights of both kinds, a landscape, lists, an archive, CIFAR's pickles: no event of unpickling, no marker."""
    from safetensors.torch import save_file

    from avalanche_firn.benchmarks.archives import unpack
    from avalanche_firn.benchmarks.cifar import read_cifar
    from avalanche_firn.benchmarks.classic import avalanche_stream
    from avalanche_firn.benchmarks.split_lists import read_name_lists, read_split, seeded_split, write_split
    from avalanche_firn.benchmarks.streams import StreamError
    from avalanche_firn.evaluation.landscape import Landscape
    from avalanche_firn.experiments.errors import ConfigError
    from avalanche_firn.experiments.recipe import load_experiment
    from avalanche_firn.models.backbones import WeightsError, load_backbone

    tiny = dict(embed_dim=32, depth=1, num_heads=2)
    marker = tmp_path / "ran"
    code = payload(marker)
    state = load_backbone("vit_firn_32", pretrained=False, **tiny).module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    axis = np.linspace(0, 1, 3)
    Landscape(axis, axis, np.ones((3, 3)), np.ones((3, 3)), np.zeros((0, 2))).save(tmp_path / "l")
    names = [f"a/{i}.png" for i in range(10)]
    train, test = seeded_split(names, 0.8, 0)
    write_split(tmp_path / "split.txt", train, test)
    (tmp_path / "names.yaml").write_text("data: [x/a/1.png]")
    (tmp_path / "names.txt").write_text("x/a/2.png")
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as members:
        members.writestr("code.pkl", code)
    write_cifar(tmp_path, monkeypatch, "python")
    with heard() as events:
        for name in ("w.safetensors", "w.pth"):
            load_backbone("vit_firn_32", weights=tmp_path / name, **tiny)
        Landscape.load(tmp_path / "l")
        read_split(tmp_path / "split.txt")
        read_name_lists(tmp_path / "names.yaml", tmp_path / "names.txt")
        unpack(tmp_path / "a.zip", tmp_path / "unpacked")
        read_cifar(10, tmp_path, "train")
        avalanche_stream("SplitCIFAR10", n_experiences=5, seed=0, dataset_root=tmp_path)
    assert events == []

    # the same places, with what would run if it were unpickled
    torch.save({"state_dict": state, "code": _Payload(marker)}, tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(code)
    hostile = np.empty(1, dtype=object)
    hostile[0] = _Payload(marker)
    np.savez(tmp_path / "l.npz", xs=hostile)
    assert not marker.exists()
    (tmp_path / "names.yaml").write_text(f"data: !!python/object/apply:os.system ['touch {marker}']")
    (tmp_path / "recipe.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {marker}']")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(code)
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(code)
    attempts = {
        "w.pth": (WeightsError, lambda: load_backbone("vit_firn_32", weights=tmp_path / "w.pth", **tiny)),
        "old.pth": (WeightsError, lambda: load_backbone("vit_firn_32", weights=tmp_path / "old.pth", **tiny)),
        "l.npz": (ValueError, lambda: Landscape.load(tmp_path / "l")),
        "names.yaml": (StreamError, lambda: read_name_lists(tmp_path / "names.yaml", tmp_path / "names.txt")),
        "recipe.yaml": (ConfigError, lambda: load_experiment(tmp_path / "recipe.yaml")),
        "data_batch_1": (StreamError, lambda: read_cifar(10, tmp_path, "train")),
        "training.pt": (StreamError, lambda: avalanche_stream("SplitMNIST", n_experiences=2, dataset_root=tmp_path)),
    }
    for name, (kind, attempt) in attempts.items():
        with heard() as events, pytest.raises(kind) as caught:
            attempt()
        assert str(tmp_path) in str(caught.value) and name in str(caught.value), name
        assert events == [] and not marker.exists(), name


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


CHILD = """
import contextlib, json, os, sys
sys.path.insert(0, {tests!r})
import test_no_unpickling as ours
from avalanche_firn.experiments import csv_logger
from avalanche_firn.experiments.cli import main
import avalanche_firn.experiments.comparison  # imports before the ear opens: libraries may unpickle their own tables
import avalanche_firn.experiments.export, avalanche_firn.experiments.report

def words(*given):
    with ours.heard() as events:
        status = main([str(word) for word in given])
    print("RESULT", json.dumps({{"words": given, "status": status, "events": events}}), flush=True)

place = {place!r}
kill = csv_logger.CsvLogger.log_single_metric
seen = []
def stop(self, name, value, x_plot):
    seen.append(name)
    if len(seen) == 60:
        csv_logger.CsvLogger.log_single_metric = kill
        raise KeyboardInterrupt
    return kill(self, name, value, x_plot)
csv_logger.CsvLogger.log_single_metric = stop
words("compare", {recipe!r}, "--output", place, "--quiet")
words("resume", place + "/tiny", "--quiet")
run = place + "/tiny/slca/seed-0"
words("report", place + "/tiny")
for form in ("timm", "safetensors", "hub-folder"):
    words("export", run, "--format", form)
words("results", place + "/tiny")
with ours.heard() as events:
    from avalanche_firn.experiments.export import load_exported
    load_exported(run + "/export/tiny-slca-seed-0.safetensors")
print("RESULT", json.dumps({{"words": ["load"], "status": 0, "events": events}}), flush=True)
"""


@pytest.mark.slow
def test_a_whole_comparison_is_silent(tmp_path):
    """Trained, interrupted, resumed, reported, exported, collected: nothing is unpickled in the whole process."""
    sys.path.append(str(ROOT / "tests" / "experiments"))
    from tiny_comparison import make_recipe

    recipe = make_recipe(tmp_path)
    text = recipe.read_text().replace("seeds: [0, 1]", "seeds: [0]")
    recipe.write_text(text + "evaluation: {probes: [{adapt: [knn], shots: 2}], drift: {}}\n")
    script = CHILD.format(tests=str(Path(__file__).parent), place=str(tmp_path / "runs"), recipe=str(recipe))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line) for line in lines]
    assert len(found) == 8, done.stderr[-3000:]
    assert [step["status"] for step in found] == [130, 0, 0, 0, 0, 0, 0, 0], found
    # git is asked for the commit of the code, and Python asks for the processor, both with a list of arguments
    known = ("subprocess.Popen ('git', ['git',", "subprocess.Popen ('uname', ['uname',")
    strange = [event for step in found for event in step["events"] if not event.startswith(known)]
    assert strange == []
