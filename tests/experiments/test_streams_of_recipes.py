"""Stream sections of a recipe: what they build, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import avalanche_firn.experiments.resources as resources
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.resources import prepare


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of two and three classes, 36 pixels."""
    root = tmp_path_factory.mktemp("data") / "regions"
    for shade, (domain, names) in enumerate({"Asia": ("farm", "port"), "Africa": ("farm", "park", "port")}.items()):
        for name in names:
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (36, 36), (100 * shade, 40 * i, len(name))).save(folder / f"{i}.png")
    return root


def recipe(stream: str, *overrides: str):
    return load_recipe("digits", [f"stream={stream}", "methods=[naive]", "seeds=[0]", *overrides])


def test_domains(regions: Path) -> None:
    stream = prepare(
        recipe(
            f"{{name: domains, root: {regions}, domain_order: [Asia, Africa], classes: 3, split_seed: 2}}",
            "stream.augment=false",
        )
    ).stream
    assert stream.class_names == ("farm", "park", "port") and stream.class_order == (0, 2, 1)
    assert stream.task_sizes == (2, 3) and stream.valid is not None
    image, label, task = stream.test[1].dataset[0]
    assert image.shape == (3, 32, 32) and (label, task) == (0, 0)
    assert prepare(recipe(f"{{name: domains, root: {regions}}}")).stream.task_sizes == (3, 2)  # sorted: Africa first
    none = recipe(f"{{name: domains, root: {regions}, validation_fraction: 0}}", "evaluation.split=validation")
    with pytest.raises(ConfigError, match="has no validation part"):
        prepare(none)


def test_declared_classes_are_compared_with_the_data(regions: Path) -> None:
    for stream, found in (
        (f"{{name: domains, root: {regions}, classes: 62}}", 3),
        (f"{{name: folder, root: {regions / 'Asia'}, tasks: 2, classes: 62}}", 2),
    ):
        with pytest.raises(
            ConfigError, match=rf"stream.classes: 62, but the data has {found} classes; accepted: {found}"
        ):
            prepare(recipe(stream))


def test_methods_for_disjoint_classes_are_refused(regions: Path) -> None:
    for method in ("slca", "slow_learner", "linear_probe"):
        with pytest.raises(ConfigError, match=rf"methods\[1\].strategy: {method} needs each class in one experience"):
            prepare(recipe(f"{{name: domains, root: {regions}}}", f"methods=[naive,{method}]"))


def test_a_run_over_domains(regions: Path, tmp_path: Path, capsys) -> None:
    """Trained and evaluated for real, with classes that come again and one that is new in the second domain."""
    stream = f"stream={{name: domains, root: {regions}, domain_order: [Asia, Africa]}}"
    words = ["digits", stream, "methods=[naive,joint]", "seeds=[0]", "training.epochs=1", f"output={tmp_path}"]
    assert main(["compare", *words, "--quiet"]) == 0
    assert "2 runs trained" in capsys.readouterr().out


def test_avalanche_section_reaches_the_builder(monkeypatch) -> None:
    calls = []

    def build(name, **options):
        calls.append((name, {k: v for k, v in options.items() if not k.endswith("_transform")}))
        return digits_stream()

    monkeypatch.setattr(resources.classic, "avalanche_stream", build)
    base = "name: avalanche, benchmark: SplitCIFAR100, arguments: {n_experiences: 20}"
    prepare(recipe(f"{{{base}}}"))
    prepare(recipe(f"{{{base}, validation_fraction: 0.1, split_seed: 3, first_experiences: 4}}", "seeds=[7]"))
    own = {"n_experiences": 20}
    assert calls == [
        ("SplitCIFAR100", {**own, "validation_fraction": 0.0, "split_seed": 0, "first_experiences": None, "seed": 0}),
        ("SplitCIFAR100", {**own, "validation_fraction": 0.1, "split_seed": 3, "first_experiences": 4, "seed": 7}),
    ]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (
            "{name: domains, root: x, domain_order: [a, b, a]}",
            ["stream.domain_order", "['a'] are repeated", "every domain once"],
        ),
        ("{name: domains, root: x, domain_order: []}", ["stream.domain_order"]),
        ("{name: domains, root: x, tasks: 5}", ["stream.tasks: unknown key"]),
        ("{name: domains, root: x, validation_fraction: 0.6, test_fraction: 0.4}", ["leaves nothing to train on"]),
        ("{name: folder, root: x, tasks: 5, classes: 4}", ["stream.tasks", "impossible with 4 classes", "1 to 4"]),
        ("{name: folder, root: x, tasks: [2, 2], classes: 5}", ["stream.tasks", "sums to 4 classes", "sum to 5"]),
        ("{name: folder, root: x, tasks: 2, classes: 3, class_order: [0, 1]}", ["has 2 entries for 3 classes"]),
        ("{name: avalanche, benchmark: SplitMNIST, validation_fraction: 1}", ["stream.validation_fraction"]),
        ("{name: avalanche, benchmark: SplitMNIST, first_experiences: 0}", ["stream.first_experiences"]),
    ],
)
def test_refused(stream: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(stream)
    for word in words:
        assert word in str(caught.value)
