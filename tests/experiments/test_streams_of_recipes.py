"""Stream sections of a recipe: what they build, and what they refuse."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import avalanche_firn.experiments.stream_builders as stream_builders
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.task_plan import plan_tasks


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

    monkeypatch.setattr(stream_builders.classic, "avalanche_stream", build)
    base = "name: avalanche, benchmark: SplitCIFAR100, arguments: {n_experiences: 20}"
    prepare(recipe(f"{{{base}}}"))
    prepare(recipe(f"{{{base}, validation_fraction: 0.1, split_seed: 3, first_experiences: 4}}", "seeds=[7]"))
    own = {"n_experiences": 20}
    assert calls == [
        ("SplitCIFAR100", {**own, "validation_fraction": 0.0, "split_seed": 0, "first_experiences": None, "seed": 0}),
        ("SplitCIFAR100", {**own, "validation_fraction": 0.1, "split_seed": 3, "first_experiences": 4, "seed": 7}),
    ]


# section -> the builder it reaches, what it is called with apart from the transforms, tasks without the data
PUBLIC: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "name: imagenet_r, class_order: seeded, split_seed: 3, download: false, root: x": (
        "imagenet_r_stream",
        {"root": "x", "tasks": 10, "seed": 7, "split_seed": 3, "split_files": None, "download": False},
        (20,) * 10,
    ),
    "name: imagenet_r, split_files: [a.yaml, b.yaml], tasks: 20": (
        "imagenet_r_stream",
        {"root": None, "tasks": 20, "split_seed": 0, "split_files": ("a.yaml", "b.yaml"), "download": True},
        (10,) * 20,
    ),
    "name: cub200, validation_fraction: 0.1": (
        "cub200_stream",
        {"root": None, "tasks": 10, "validation_fraction": 0.1, "split_seed": 0, "download": True},
        (20,) * 10,
    ),
    "name: cars196, swap_train_test: true": (
        "cars196_stream",
        {"root": None, "tasks": [20] * 9 + [16], "swap_train_test": True, "split_seed": 0},
        (*[20] * 9, 16),
    ),
    "name: domainnet, domains: [real, sketch]": (
        "domainnet_stream",
        {"root": None, "tasks": 5, "domains": ["real", "sketch"], "split_seed": 0, "download": True},
        (69,) * 5,
    ),
    "name: domainnet, scenario: domains": (
        "domainnet_domain_stream",
        {"root": None, "split_seed": 0, "download": True},
        (345,) * 6,
    ),
    "name: five_datasets, datasets: [mnist, svhn]": (
        "five_datasets_stream",
        {"root": None, "datasets": ["mnist", "svhn"], "split_seed": 0, "download": True},
        (10, 10),
    ),
    "name: fmow, regions: [Europe, Asia], until_year: null": (
        "fmow_region_stream",
        {"root": None, "regions": ["Europe", "Asia"], "until_year": None},
        (62, 62),
    ),
    "name: huggingface, dataset: owner/birds, tasks: 3, classes: 6": (
        "huggingface_stream",
        {"dataset": "owner/birds", "tasks": 3, "train": "train", "test": None, "test_fraction": 0.2},
        (2, 2, 2),
    ),
}


@pytest.mark.parametrize("section", PUBLIC)
def test_public_sections_reach_their_builders(section: str, monkeypatch) -> None:
    name, expected, sizes = PUBLIC[section]
    signature = inspect.signature(getattr(stream_builders, name))
    calls = []

    def build(*positional, **named):
        calls.append(signature.bind(*positional, **named).arguments)  # refuses what the real one would refuse
        return digits_stream()

    monkeypatch.setattr(stream_builders, name, build)
    config = recipe(f"{{{section}}}", "seeds=[7]")
    assert plan_tasks(config.stream).sizes == sizes
    assert plan_tasks(config.stream).repeats == ("scenario: domains" in section or "fmow" in section)
    stream_builders.build_stream(
        config.model_copy(update={"stream": config.stream.model_copy(update={"classes": None})})
        if "classes:" in section
        else config,
        {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        7,
    )
    (called,) = calls
    assert callable(called["train_transform"]) and callable(called["eval_transform"])
    assert {key: called[key] for key in expected} == expected
    assert ("seed" in called) == ("seeded" in section) and "class_order" not in called


def test_imagenet_r_from_a_recipe(tmp_path: Path) -> None:
    """A part of the data set, read for real; the list that is drawn of a part isn't kept."""
    for wnid in ("n01443537", "n02007558", "n12267677"):
        folder = tmp_path / "imagenet-r" / wnid
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 36), (20 * i, 0, 0)).save(folder / f"art_{i}.jpg")
    section = f"{{name: imagenet_r, root: {tmp_path}, tasks: 3, complete: false, download: false}}"
    stream = prepare(recipe(section, "stream.augment=false")).stream
    assert stream.class_names == ("n01443537", "n02007558", "n12267677") and stream.task_sizes == (1, 1, 1)
    assert sum(len(e.dataset) for e in stream.train) == 24 and sum(len(e.dataset) for e in stream.test) == 6
    assert not list(tmp_path.glob("*.txt"))
    with pytest.raises(ConfigError, match=r"stream: .*30,?000"):
        prepare(recipe(section.replace("complete: false", "complete: true").replace("tasks: 3", "tasks: 10")))


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
        ("{name: imagenet_r, tasks: 201}", ["stream.tasks", "impossible with 200 classes"]),
        ("{name: imagenet_r, split_files: [a]}", ["stream.split_files"]),
        ("{name: cub200, class_order: [1, 0]}", ["stream.class_order", "has 2 entries for 200 classes"]),
        ("{name: cars196, download: true}", ["stream.download: unknown key"]),
        ("{name: cars196, tasks: [98, 99]}", ["sums to 197 classes", "sum to 196"]),
        ("{name: domainnet, domains: [real, real]}", ["stream.domains", "['real'] are repeated"]),
        ("{name: domainnet, domains: [photo]}", ["stream.domains", "clipart"]),
        ("{name: domainnet, scenario: domains, class_order: seeded}", ["stream.class_order", "natural"]),
        ("{name: five_datasets, datasets: [mnist, mnist]}", ["stream.datasets", "['mnist'] are repeated"]),
        ("{name: fmow, regions: [Asia, Asia]}", ["stream.regions", "['Asia'] are repeated"]),
        ("{name: fmow, validation_fraction: 0.1}", ["stream.validation_fraction: unknown key"]),
        ("{name: huggingface, dataset: x, tasks: [2, 2], classes: 5}", ["sums to 4 classes", "sum to 5"]),
        ("{name: huggingface, tasks: 2}", ["stream.dataset"]),
    ],
)
def test_refused(stream: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(stream)
    for word in words:
        assert word in str(caught.value)
