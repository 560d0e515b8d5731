"""Checking a recipe without its data: task sizes from the recipe alone, random images, the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.dry_run import _random_stream
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.task_plan import CLASS_COUNTS, TaskPlan, plan_tasks


def plan(stream: str, *overrides: str) -> TaskPlan:
    return plan_tasks(load_recipe("digits", [f"stream={stream}", *overrides]).stream)


def avalanche(benchmark: str, arguments: str = "{}", more: str = "") -> str:
    return f"{{name: avalanche, benchmark: {benchmark}, arguments: {arguments}{more}}}"


@pytest.mark.parametrize(
    ("stream", "sizes", "repeats"),
    [
        ("{name: digits, tasks: [3, 7]}", (3, 7), False),
        ("{name: digits, tasks: 3}", (3, 3, 4), False),
        ("{name: folder, root: nowhere, tasks: [5, 2]}", (5, 2), False),
        ("{name: folder, root: nowhere, tasks: 2, class_order: [b, c, a]}", (1, 2), False),
        ("{name: folder, root: nowhere, tasks: 4, classes: 10}", (2, 2, 2, 4), False),
        ("{name: domains, root: nowhere, classes: 62}", (62, 62), True),
        ("{name: domains, root: nowhere, classes: 9, domain_order: [a, b, c]}", (9, 9, 9), True),
        (avalanche("SplitCIFAR100", "{n_experiences: 20}"), (5,) * 20, False),
        (avalanche("SplitTinyImageNet"), (20,) * 10, False),  # Avalanche's default number of experiences
        (avalanche("SplitTinyImageNet", "{n_experiences: 40}", ", first_experiences: 20"), (5,) * 20, False),
    ],
)
def test_plan(stream: str, sizes: tuple[int, ...], repeats: bool) -> None:
    found = plan(stream)
    assert (found.sizes, found.repeats) == (sizes, repeats)
    assert found.num_classes == (max(sizes) if repeats else sum(sizes))


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ("{name: folder, root: nowhere, tasks: 2}", ["stream.classes", "needed without the data", "at least 1"]),
        ("{name: domains, root: nowhere}", ["stream.classes", "needed without the data"]),
        ("{name: folder, root: nowhere, tasks: 5, class_order: [a, b]}", ["tasks is 5", "1..2 tasks"]),
        (avalanche("CORe50"), ["stream.benchmark", "CORe50 aren't known without its data", "SplitMNIST"]),
        (avalanche("SplitMNIST"), ["stream.arguments.n_experiences", "missing"]),
        (avalanche("SplitMNIST", "{n_experiences: five}"), ["n_experiences", "'five' isn't accepted"]),
        (avalanche("SplitMNIST", "{n_experiences: 3}"), ["3 experiences can't share 10 classes evenly"]),
        (avalanche("SplitCUB200", "{n_experiences: 1}"), ["1 experiences can't share 200", "after {0: 100}"]),
        (
            avalanche("SplitMNIST", "{n_experiences: 5}", ", first_experiences: 6"),
            ["stream.first_experiences", "1 to 5"],
        ),
    ],
)
def test_unknown_or_impossible(stream: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(stream)
    for word in words:
        assert word in str(caught.value)


def test_table_names_avalanche_s_benchmarks() -> None:
    assert set(CLASS_COUNTS) <= set(avalanche_benchmarks())


def tensors(classes: int) -> tuple[TensorDataset, TensorDataset]:
    labels = torch.arange(classes).repeat(2)
    data = TensorDataset(torch.rand(len(labels), 1, 28, 28), labels)
    data.targets = labels.tolist()
    return data, data


@pytest.mark.parametrize(
    ("benchmark", "arguments"),
    [
        ("SplitMNIST", {"n_experiences": 5}),
        ("SplitMNIST", {"n_experiences": 5, "class_ids_from_zero_in_each_exp": True}),
        ("PermutedMNIST", {"n_experiences": 3}),
        ("RotatedMNIST", {"n_experiences": 2, "rotations_list": [0, 90]}),
        ("SplitFMNIST", {"n_experiences": 6, "first_batch_with_half_classes": True}),
        ("SplitCIFAR10", {"n_experiences": 5}),
        ("SplitCIFAR10", {"n_experiences": 2, "first_exp_with_half_classes": True}),
        ("SplitCIFAR100", {"n_experiences": 20}),
        ("SplitCIFAR110", {"n_experiences": 11}),
        ("SplitCUB200", {}),
        ("SplitCUB200", {"n_experiences": 10, "classes_first_batch": None}),
        ("SplitImageNet", {"n_experiences": 3, "per_exp_classes": {0: 500}, "dataset_root": "nowhere"}),
    ],
)
def test_plans_agree_with_avalanche(benchmark: str, arguments: dict, monkeypatch) -> None:
    """Avalanche's own builders on stand-ins for the images, with as many classes as the data sets have."""
    for module, function in (
        ("cmnist", "get_mnist_dataset"),
        ("cfashion_mnist", "get_fmnist_dataset"),
        ("ccifar10", "get_cifar10_dataset"),
        ("ccifar100", "get_cifar10_dataset"),
        ("ccifar100", "get_cifar100_dataset"),
        ("ccub200", "_get_cub200_dataset"),
        ("cimagenet", "_get_imagenet_dataset"),
    ):
        classes = {"get_cifar100_dataset": 100, "_get_cub200_dataset": 200, "_get_imagenet_dataset": 1000}.get(
            function, 10
        )
        path = f"avalanche.benchmarks.classic.{module}"
        monkeypatch.setattr(sys.modules[path], function, lambda *roots, classes=classes, **more: tensors(classes))
    real = avalanche_stream(benchmark, train_transform=None, eval_transform=None, **arguments)
    config = load_recipe("digits", [f"stream={avalanche(benchmark)}"])
    section = config.stream.model_copy(update={"arguments": arguments})
    found = plan_tasks(section)
    assert found.sizes == real.task_sizes and found.num_classes == real.num_classes
    assert found.repeats == (sum(real.task_sizes) != real.num_classes)


def test_random_stream_repeats_classes_where_the_data_does() -> None:
    stream = _random_stream(TaskPlan("d", (3, 5, 4), repeats=True), (3, 8, 8), batch_size=4)
    assert [e.classes_in_this_experience for e in stream.train] == [{0, 1, 2}, {0, 1, 2, 3, 4}]
    assert stream.num_classes == 5 and min(len(e.dataset) for e in stream.train) >= 8
    once = _random_stream(TaskPlan("c", (3, 5, 4), repeats=False), (3, 8, 8), batch_size=4)
    assert [e.classes_in_this_experience for e in once.train] == [{0, 1, 2}, {3, 4, 5, 6, 7}]


def test_command(capsys, tmp_path: Path) -> None:
    recipe = tmp_path / "elsewhere.yaml"
    recipe.write_text(
        "name: elsewhere\nmethods: [naive, joint]\nthreads: 1\ntraining: {batch_size: 4}\n"
        "backbone: {weights: /nowhere/weights.safetensors}\n"
        "stream: {name: domains, root: /nowhere/regions, domain_order: [Africa, Asia], classes: 7}\n"
    )
    assert main(["check", str(recipe), "--no-data"]) == 0
    told = capsys.readouterr().out
    assert "7 classes in tasks of 7, 7; images not read" in told and "training steps" not in told
    assert main(["check", str(recipe), "--dry-run", "--no-data"]) == 0
    told = capsys.readouterr().out
    assert "naive: 8 training steps" in told and "joint: " in told  # 14 images a task in batches of 4
    assert main(["check", str(recipe), "--dry-run", "--no-data", "methods=[slca]"]) == 2
    assert "needs each class in one experience, and domains repeats classes" in capsys.readouterr().err
    assert main(["check", str(recipe), "--no-data", "stream.classes=null"]) == 2
    assert "stream.classes: needed without the data" in capsys.readouterr().err
    assert main(["check", str(recipe)]) == 2  # with data, the weights are missed first
    assert "/nowhere/weights.safetensors" in capsys.readouterr().err
