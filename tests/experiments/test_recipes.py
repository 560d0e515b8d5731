"""Recipes: found, listed, copied, parsed safely, overridden; the configuration's own rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, describe, known_keys, nearest
from avalanche_firn.experiments.recipe import (
    copy_recipe,
    dump,
    list_recipes,
    load_experiment,
    load_recipe,
    parse,
    read_recipe,
)
from avalanche_firn.experiments.sections import TrainingConfig
from avalanche_firn.experiments.transfer_config import TransferExperiment

ALL = [recipe.name for recipe in list_recipes()]
TRANSFERS = [name for name in ALL if isinstance(load_experiment(name), TransferExperiment)]
SHIPPED = [name for name in ALL if name not in TRANSFERS]


@pytest.mark.parametrize("name", ALL)
def test_shipped_recipes_are_valid_and_described(name: str) -> None:
    config = load_experiment(name)
    assert config.name == name and config.description


# a recipe with 500 stored images differs from its twin with 200 in the buffer alone, see below
LARGE = ("baselines_", "domainnet_", "lorac_ipc_", "slca_plus_plus_")  # ViT-B/16, a quarter of a minute for a method
SMALL = "vit_tiny_patch16_224"  # in place of ViT-B/16 where a recipe differs from another in weights, rates, data alone
TWINS = ("_mocov3", "baselines_cifar100", "baselines_cub200", "baselines_imagenet_r")  # baselines_cars196 stays large
LATER = [name for name in SHIPPED if name.endswith("_500") or name.startswith(LARGE)]
DRY_RUNS = [pytest.param(name, marks=[pytest.mark.slow] * (name in LATER)) for name in SHIPPED]


@pytest.mark.parametrize("name", DRY_RUNS)
def test_shipped_recipes_train_two_steps_without_their_data(name: str, capsys) -> None:
    """Small batches: at 224 pixels a ResNet-50 takes half a second for one image, and 64 pixels are slow too."""
    config, size = load_recipe(name), 1 if name.startswith(("lp_ft_regions", "co2l_seq_tiny", *LARGE)) else 2
    own = [method.name for method in config.methods if method.training.batch_size is not None]
    batches = [f"{place}training.batch_size={size}" for place in ("", *(f"methods.{label}." for label in own))]
    backbone = SMALL if name.endswith(TWINS) else config.backbone.name
    words = [*batches, f"backbone.name={backbone}", "training.num_workers=0", "threads=1", "device=cpu"]
    assert main(["check", name, "--dry-run", "--no-data", *words]) == 0
    told = capsys.readouterr().out
    for method in config.methods:
        assert f"{method.name}: " in told
    assert "images not read" in told and f"backbone  {backbone} (weights not read)" in told


@pytest.mark.parametrize("name", ["baselines_cub200", "lorac_ipc_five_datasets", "slca_plus_plus_cars196"])
def test_recipes_for_a_large_transformer_train_two_steps_of_a_small_one(name: str, capsys) -> None:
    words = [f"backbone.name={SMALL}", "training.batch_size=1", "training.num_workers=0", "threads=1"]
    assert main(["check", name, "--dry-run", "--no-data", "device=cpu", *words]) == 0
    told = capsys.readouterr().out
    for method in load_recipe(name).methods:
        assert f"{method.name}: 4 training steps and an evaluation" in told


@pytest.mark.parametrize(
    ("name", "sizes", "images"),
    [
        ("lp_ft_seq_cifar10", (2,) * 5, (3, 32, 32)),
        ("lp_ft_seq_cifar100", (5,) * 20, (3, 32, 32)),
        ("lp_ft_seq_tiny_imagenet", (5,) * 20, (3, 64, 64)),
        ("lp_ft_regions", (62,) * 5, (3, 224, 224)),
        ("co2l_seq_cifar10_200", (2,) * 5, (3, 32, 32)),
        ("co2l_seq_cifar10_500", (2,) * 5, (3, 32, 32)),
        ("co2l_seq_tiny_imagenet_200", (20,) * 10, (3, 64, 64)),
        ("co2l_seq_tiny_imagenet_500", (20,) * 10, (3, 64, 64)),
        ("co2l_rotated_mnist_200", (10,) * 20, (1, 28, 28)),
        ("co2l_rotated_mnist_500", (10,) * 20, (1, 28, 28)),
    ],
)
def test_recipes_have_the_tasks_of_the_public_code(name: str, sizes: tuple, images: tuple) -> None:
    from avalanche_firn.experiments.dry_run import _shape
    from avalanche_firn.experiments.resources import build_backbone
    from avalanche_firn.experiments.task_plan import plan_tasks

    config = load_recipe(name, ["backbone.pretrained=false", "backbone.weights=null"])
    plan = plan_tasks(config.stream)
    assert plan.sizes == sizes and plan.repeats is (name == "lp_ft_regions" or "rotated" in name)
    assert _shape(config, build_backbone(config)) == images


@pytest.mark.parametrize(
    ("name", "sizes", "order"),
    [
        ("lorac_ipc_cifar100", (10,) * 10, False),
        ("lorac_ipc_cifar100_in21k", (10,) * 10, False),
        ("lorac_ipc_cifar100_mocov3", (10,) * 10, False),
        ("lorac_ipc_imagenet_r", (20,) * 10, "natural"),
        ("lorac_ipc_imagenet_r_in21k", (20,) * 10, "natural"),
        ("lorac_ipc_imagenet_r_mocov3", (20,) * 10, "natural"),
        ("lorac_ipc_five_datasets", (10,) * 5, None),
        ("lorac_ipc_domainnet", (69,) * 5, "natural"),
        ("slca_plus_plus_cifar100", (10,) * 10, None),
        ("slca_plus_plus_imagenet_r", (20,) * 10, "seeded"),
        ("slca_plus_plus_cub200", (20,) * 10, "seeded"),
        ("slca_plus_plus_cars196", (20,) * 9 + (16,), "seeded"),
        ("slca_plus_plus_cifar100_mocov3", (10,) * 10, None),
        ("slca_plus_plus_imagenet_r_mocov3", (20,) * 10, "seeded"),
        ("slca_plus_plus_cub200_mocov3", (20,) * 10, "seeded"),
        ("slca_plus_plus_cars196_mocov3", (20,) * 9 + (16,), "seeded"),
        ("baselines_cifar100", (10,) * 10, None),
        ("baselines_imagenet_r", (20,) * 10, "seeded"),
        ("baselines_cub200", (20,) * 10, "seeded"),
        ("baselines_cars196", (20,) * 9 + (16,), "seeded"),
    ],
)
def test_recipes_of_lora_methods_have_the_protocol_of_the_public_code(name: str, sizes: tuple, order: object) -> None:
    """Tasks, class order (Avalanche's own benchmarks: whether they shuffle), seeds, size of the images."""
    from PIL import Image

    from avalanche_firn.benchmarks.transforms import preset_transforms
    from avalanche_firn.experiments.task_plan import plan_tasks

    config = load_recipe(name)
    plan = plan_tasks(config.stream)
    assert plan.sizes == sizes and not plan.repeats
    if config.stream.name == "avalanche":
        assert config.stream.arguments.get("shuffle") is order and "seed" not in config.stream.arguments
    else:
        assert getattr(config.stream, "class_order", None) == order
        assert config.stream.name in name and config.stream.root is None  # the data set itself, in its own place
    assert config.seeds == ([42, 44, 40] if name.startswith("lorac") else [1993, 1996, 1997])
    image = preset_transforms(config.stream.transforms).eval(Image.new("RGB", (64, 64), "white"))
    assert image.shape == (3, 224, 224)
    assert bool((image == 1).all()) is (config.stream.transforms == "lorac")


def test_lora_recipes_have_the_values_of_the_public_code() -> None:
    """What the rates are made of, the defaults' own row, and what tells the methods of a recipe apart."""
    from avalanche_firn.experiments.config import LoRACIPCConfig

    raw = {
        "lorac_ipc_cifar100": 0.006, "lorac_ipc_cifar100_in21k": 0.02, "lorac_ipc_cifar100_mocov3": 0.01,
        "lorac_ipc_imagenet_r": 0.006, "lorac_ipc_imagenet_r_mocov3": 0.01, "lorac_ipc_five_datasets": 0.01,
        "lorac_ipc_imagenet_r_in21k": 0.02, "lorac_ipc_domainnet": 0.006,
    }  # fmt: skip
    assert sorted(raw) == sorted(name for name in SHIPPED if name.startswith("lorac_ipc"))
    for name, rate in raw.items():
        training = load_recipe(name).training
        assert training.optimizer.lr == pytest.approx(rate * 64 / 256, rel=1e-12)
        assert training.optimizer.name == "adam" and training.optimizer.weight_decay == 0
        assert (training.schedule.name, training.schedule.floor, training.batch_size) == ("lagged_cosine", 1e-5, 128)
    default = LoRACIPCConfig(name="lorac_ipc", strategy="lorac_ipc").model_dump()
    targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    first = load_recipe("lorac_ipc_cifar100").methods[0].model_dump()
    assert first == default | {"lora": default["lora"] | {"targets": targets}}
    pairs = [("cifar100", set()), ("imagenet_r", set()), ("imagenet_r_in21k", set())]
    for name, own in (*pairs, ("imagenet_r_mocov3", {"orthogonality"})):
        ipc, plain = (method.model_dump() for method in load_recipe(f"lorac_ipc_{name}").methods[:2])
        assert {key for key in ipc if ipc[key] != plain[key]} == {"name", "importance"} | own
        assert plain["importance"] == ipc["importance"] | {"threshold": 0.0} != ipc["importance"]
    assert load_recipe("lorac_ipc_domainnet").methods[0].task_inference is None


@pytest.mark.parametrize("name", ["lorac_ipc_cifar100_in21k", "lorac_ipc_imagenet_r_in21k"])
def test_rows_of_the_lorac_table_differ_in_what_their_names_say(name: str) -> None:
    config = load_recipe(name)
    rows = {method.name: method.model_dump() for method in config.methods}
    for label, twin in (
        ("lorac_newest", "lorac"),
        ("lorac_ipc_newest", "lorac_ipc"),
        ("lorac_ipc_batchwise_vote", "lorac_ipc"),
    ):
        assert {key for key in rows[label] if rows[label][key] != rows[twin][key]} == {"name", "task_inference"}
    assert [rows[label]["importance"]["threshold"] for label in ("lorac", "lorac_ipc")] == [0.0, 0.05]
    assert rows["lorac_newest"]["task_inference"] is None is rows["lorac_ipc_newest"]["task_inference"]
    single, voting = (rows[label]["task_inference"] for label in ("lorac_ipc", "lorac_ipc_batchwise_vote"))
    assert single == rows["lorac"]["task_inference"] and not single["batchwise_vote"]
    assert voting == single | {"batchwise_vote": True} and config.training.eval_batch_size == 64  # what votes together
    whole = config.methods[-2:]
    assert [method.strategy for method in whole] == ["naive", "joint"]
    values = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    assert [config.training_of(method).optimizer.model_dump() for method in whole] == [values] * 2
    assert {target.method for target in config.targets} == {*rows, None}


SLCA_STREAMS = ["cifar100", "imagenet_r", "cub200", "cars196"]


@pytest.mark.parametrize("weights", ["", "_mocov3"])
@pytest.mark.parametrize("name", SLCA_STREAMS)
def test_slca_plus_plus_recipes_have_the_values_of_the_public_code(name: str, weights: str, golden) -> None:
    """The rates of a task are those of the golden tables, for SLCA++ and for SLCA."""
    import numpy as np
    import torch

    from avalanche_firn.experiments.methods import make_schedule

    config = load_recipe(f"slca_plus_plus_{name}{weights}")
    plus, slca, *others = config.methods
    assert [method.strategy for method in others] == ["slow_learner", "naive", "joint"]
    assert all(config.training_of(method) == config.training_of(slca) for method in others)
    assert others[0].backbone_scale == slca.backbone_scale and others[0].local_loss is slca.local_loss
    assert config.backbone.fresh_final_norm and (config.backbone.weights is None) is (weights == "")
    assert plus.alignment.weight_decay == config.training.optimizer.weight_decay
    assert plus.alignment.temperature == slca.alignment.temperature == (0.05 if name == "cars196" else 0.1)
    assert config.training_of(slca).optimizer.weight_decay == slca.alignment.weight_decay == 5e-4
    short = {"cifar100": "cifar", "imagenet_r": "imgnetr", "cub200": "cub", "cars196": "cars"}[name]
    tables = golden("slca", "lr_tables")

    def rates(training: TrainingConfig, *scales: float) -> list[list[float]]:
        groups = [{"params": [torch.zeros(1)], "lr": training.optimizer.lr * scale} for scale in scales]
        optimizer = torch.optim.SGD(groups)
        schedule = make_schedule(training.schedule, training.epochs)(optimizer)
        found = []
        for _ in range(training.epochs):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return found

    for task in (0, 1):
        pairs = plus.first_task_lora_scale if task == 0 else plus.backbone_scale
        table = tables[f"slcapp_{short}_lora{weights}_task{task}"]  # columns A, B, other tensors, head
        found = rates(config.training_of(plus), pairs, plus.backbone_scale, 1.0)
        np.testing.assert_allclose(found, table[:, [0, 2, 3]], rtol=0, atol=1e-12)
    found = rates(config.training_of(slca), slca.backbone_scale, 1.0)
    np.testing.assert_allclose(found, tables[f"slca_{short}{weights}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SLCA_STREAMS)
def test_recipes_to_be_read_beside_slca_plus_plus_share_its_setting(name: str) -> None:
    """Those of MoCo v3 and of Avalanche's baselines: what they have in common with their twin is the same."""
    from avalanche_firn.experiments.task_plan import plan_tasks

    twin, moco, beside = (
        load_recipe(recipe)
        for recipe in (f"slca_plus_plus_{name}", f"slca_plus_plus_{name}_mocov3", f"baselines_{name}")
    )
    for other in (moco, beside):
        assert (other.stream, other.evaluation, other.seeds) == (twin.stream, twin.evaluation, twin.seeds)
        assert other.training.batch_size == twin.training.batch_size and not other.targets
    values = [[method.model_dump(exclude={"training"}) for method in config.methods] for config in (moco, twin)]
    assert values[0] == values[1]
    assert beside.backbone == twin.backbone and beside.training.epochs == twin.training.epochs
    slca = twin.training_of(twin.methods[1])
    assert all(beside.training_of(method) == slca for method in beside.methods)
    labels = ["naive", "avalanche_replay", "ewc", "lwf", "der_plus_plus", "scr", "joint"]
    assert [method.name for method in beside.methods] == labels
    replay, der = beside.methods[1], beside.methods[4]
    classes = sum(plan_tasks(beside.stream).sizes)
    assert replay.rehearsal.mem_size == der.rehearsal.mem_size == 20 * classes and der.beta > 0
    told = read_recipe(f"baselines_{name}")
    assert f"firn report runs/slca_plus_plus_{name} runs/baselines_{name}" in told and "LearningToPrompt" in told


def test_recipes_of_papers_say_where_every_value_comes_from() -> None:
    """Every line with a value has a comment; those of the header and lines that open a section aside."""
    free = {"name", "description", "benchmark", "root", "strategy", "streams", "split", "eval_batch_size", "adapt"}
    free |= {"experiment", "label"}
    free |= {"{method", "{name", "standing", "spread_of", "source"}  # figures of others have their source in a field
    for name in ALL:
        papers = ("baselines", "cila", "co2l", "domainnet", "lorac_ipc", "lp_ft", "slca_plus_plus")
        if not name.startswith((*papers, "zapping_omn", "zapping_mini")):
            continue
        for line in read_recipe(name).splitlines():
            key, _, value = line.strip().removeprefix("- ").partition(":")
            if line.startswith("#") or not value.strip() or key in free:
                continue
            assert " # " in line, f"{name}: {line}"


@pytest.mark.parametrize("name", ["co2l_seq_cifar10", "co2l_seq_tiny_imagenet", "co2l_rotated_mnist"])
def test_co2l_recipes_differ_in_what_their_names_say(name: str) -> None:
    """The contrastive methods in the coefficient, the two recipes in the buffer; views are those of the presets."""
    from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
    from avalanche_firn.benchmarks.transforms import PRESET_NORMALIZATION
    from avalanche_firn.experiments.methods import _augmentation

    plain = []
    for slots in (200, 500):
        config = load_recipe(f"{name}_{slots}")
        co2l, cila, other, *stored = (method.model_dump() for method in config.methods)
        own = {"name", "strategy", "coefficient", "distillation_weight"}
        assert [{k: v for k, v in m.items() if k not in own} for m in (cila, other)] == [
            {k: v for k, v in co2l.items() if k not in own}
        ] * 2
        assert cila["coefficient"] | {"ratio_scale": "training"} == other["coefficient"] != cila["coefficient"]
        assert [method["name"] for method in stored] == ["replay", "der", "der_plus_plus"]
        assert {method["rehearsal"]["mem_size"] for method in (co2l, *stored)} == {slots}
        normalization = PRESET_NORMALIZATION[config.stream.transforms]
        views = _augmentation(config.methods[0].augmentation, normalization)
        preset = ContrastiveAugmentation.preset(name.removeprefix("co2l_"))
        assert str(views) == str(preset)
        assert views._mean.tolist() == preset._mean.tolist() and views._std.tolist() == preset._std.tolist()
        changed = [f"methods.{method.name}.rehearsal.mem_size=1" for method in config.methods]
        for label in ("replay", "der", "der_plus_plus"):  # the DER code has its own values for each buffer
            changed.append(f"methods.{label}.training.optimizer.lr=1")
        for label in ("der", "der_plus_plus"):
            changed += [f"methods.{label}.alpha=1", f"methods.{label}.beta=1"]
        plain.append(load_recipe(f"{name}_{slots}", changed).identity())
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "replay", "der", "plus"),
    [
        ("seq_cifar10_200", 50, 32, 0.1, (0.03, 0.3), (0.03, 0.1, 0.5)),
        ("seq_cifar10_500", 50, 32, 0.1, (0.03, 0.3), (0.03, 0.2, 0.5)),
        ("seq_tiny_imagenet_200", 100, 32, 0.1, (0.03, 0.1), (0.03, 0.1, 1.0)),
        ("seq_tiny_imagenet_500", 100, 32, 0.03, (0.03, 0.1), (0.03, 0.2, 0.5)),
        ("rotated_mnist_200", 1, 128, 0.2, (0.2, 1.0), (0.1, 1.0, 0.5)),
        ("rotated_mnist_500", 1, 128, 0.2, (0.2, 0.5), (0.2, 0.5, 1.0)),
    ],
)
def test_replay_rows_of_co2l_recipes_have_the_values_of_the_der_code(
    name: str, epochs: int, batch: int, replay: float, der: tuple, plus: tuple
) -> None:
    """Rate, alpha, beta; and what others report of DER and DER++ belongs to methods that are trained."""
    config = load_recipe(f"co2l_{name}")
    rows = {method.name: method for method in config.methods[3:]}
    trained = {label: config.training_of(method) for label, method in rows.items()}
    for training in trained.values():
        optimizer = training.optimizer
        assert (training.epochs, training.batch_size, training.schedule.name) == (epochs, batch, "none")
        assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0, 0)
    rates = {label: training.optimizer.lr for label, training in trained.items()}
    assert rates == {"replay": replay, "der": der[0], "der_plus_plus": plus[0]}
    assert (rows["der"].alpha, rows["der"].beta) == (der[1], 0)
    assert (rows["der_plus_plus"].alpha, rows["der_plus_plus"].beta) == plus[1:]
    assert rows["der"].rehearsal == rows["der_plus_plus"].rehearsal
    assert rows["der"].rehearsal.batch_size_mem == batch
    figures = {"accuracy/last"} | (set() if "rotated" in name else {"task-il/accuracy/last"})
    for label in ("co2l", "der", "der_plus_plus"):
        assert {target.figure for target in config.targets if target.method == label} == figures


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_lp_ft_sequences_have_baselines_with_the_buffer_of_the_public_code(name: str) -> None:
    config = load_recipe(f"lp_ft_seq_{name}")
    names = ["naive", "lp_ft", "der", "avalanche_replay", "ewc", "lwf", "joint"]
    assert [method.strategy for method in config.methods] == names
    der, replay, ewc = config.methods[2:5]
    assert der.rehearsal.mem_size == replay.rehearsal.mem_size == 256
    assert (der.alpha, der.beta) == (0.4, 0.0)  # its configurations' alpha; no term of labels
    assert (ewc.mode, ewc.decay_factor) == ("online", 1.0)  # twenty tasks would be forty copies of the model
    assert all(config.training_of(method) == config.training for method in config.methods)
    assert config.methods == load_recipe("lp_ft_seq_cifar10").methods
    sections = read_recipe(f"lp_ft_seq_{name}").split("  - strategy: ")[3:-1]
    assert len(sections) == 4
    for section in sections:  # none of them pretends to be the paper's
        assert "open in the paper; our choice, not tuned" in section


def test_lp_ft_regions_reads_the_data_set_s_own_parts() -> None:
    config = load_recipe("lp_ft_regions")
    assert (config.stream.name, config.stream.root, config.stream.until_year) == ("fmow", None, 2013)
    assert config.stream.regions == ["Asia", "Europe", "Africa", "Americas", "Oceania"]
    assert not config.stream.augment and "0xaec91eb7c9d548ebb15e1b5e60f966ab" in read_recipe("lp_ft_regions")


def test_domainnet_by_domains_trains_what_accepts_repeated_classes() -> None:
    """Six domains of all classes; its values are those of SLCA on ImageNet-R, as it says."""
    from PIL import Image

    from avalanche_firn.benchmarks.domainnet import DOMAINNET_DOMAINS
    from avalanche_firn.benchmarks.transforms import preset_transforms
    from avalanche_firn.experiments.resources import refuse_repeated_classes
    from avalanche_firn.experiments.task_plan import plan_tasks

    config, twin = load_recipe("domainnet_domains"), load_recipe("slca_plus_plus_imagenet_r")
    plan = plan_tasks(config.stream)
    assert plan.sizes == (345,) * 6 and plan.repeats and plan.num_classes == 345
    assert config.stream.domains == list(DOMAINNET_DOMAINS)
    refuse_repeated_classes(config, plan.name)  # none of its methods is
    with pytest.raises(ConfigError, match="slca_plus_plus needs each class in one experience, and domainnet repeats"):
        refuse_repeated_classes(load_recipe("domainnet_domains", ["methods=[slca_plus_plus]"]), plan.name)
    slca = next(method for method in twin.methods if method.name == "slca")
    assert config.training == twin.training_of(slca) and (config.backbone, config.seeds) == (twin.backbone, twin.seeds)
    assert config.methods[1].ft_lr == pytest.approx(config.training.optimizer.lr * slca.backbone_scale)
    assert all(config.training_of(method) == config.training for method in config.methods)
    image = preset_transforms(config.stream.transforms).eval(Image.new("RGB", (64, 64)))
    assert image.shape == (3, 224, 224) and config.stream.transforms == twin.stream.transforms
    assert not config.targets


@pytest.mark.parametrize("schema", [Config, TransferExperiment])
def test_every_key_is_described(schema: type) -> None:
    undescribed = [key for key, field in known_keys(schema).items() if not field.description]
    assert not undescribed


def test_resolved_configuration_is_a_recipe(tmp_path: Path) -> None:
    config = load_recipe("digits", ["training.optimizer.lr=1e-3", "methods.slca.alignment.epochs=3"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_recipe(path) == config
    assert load_recipe(tmp_path) == config


def test_overrides() -> None:
    config = load_recipe(
        "digits",
        [
            "training.epochs=3",
            "seeds=[4,5]",
            "methods=[naive,slca]",
            "methods.slca.alignment.epochs=2",
            "methods.naive.training.optimizer.lr=1e-2",
            "methods[1].backbone_scale=0.5",
            "training.schedule={name: multistep, milestones: [1]}",
            "stream.class_order=seeded",
            "backbone.weights=null",
        ],
    )
    assert config.training.epochs == 3 and config.seeds == [4, 5]
    assert [method.name for method in config.methods] == ["naive", "slca"]
    assert config.methods[1].alignment.epochs == 2 and config.methods[1].backbone_scale == 0.5
    assert config.training_of(config.methods[0]).optimizer.lr == 0.01
    assert config.training.schedule.milestones == [1]
    assert config.stream.class_order == "seeded"


def test_override_of_a_section_that_others_refer_to(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nstream: {name: digits}\nmethods:\n"
        "  - {strategy: co2l, rehearsal: &buffer {mem_size: 9}}\n  - {strategy: cila, rehearsal: *buffer}\n"
    )
    config = load_recipe(path, ["methods.cila.rehearsal.mem_size=5"])
    assert [method.rehearsal.mem_size for method in config.methods] == [9, 5]


def test_selection_keeps_the_recipe_s_values() -> None:
    config = load_recipe("digits", ["methods.slca.alignment.epochs=2", "methods=[slca]"])
    assert config.methods[0].alignment.epochs == 2
    assert load_recipe("digits", ["methods=slca,naive"]).methods[1].name == "naive"


def test_override_of_a_bare_method_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nstream: {name: digits}\nmethods: [naive, slca]\n")
    config = load_recipe(path, ["methods.slca.alignment.lr=0.5", "seeds[0]=7"][:1])
    assert config.methods[1].alignment.lr == 0.5
    assert config.methods[0].name == "naive"


def test_method_training_replaces_single_values() -> None:
    config = load_recipe(
        "digits",
        [
            "training.optimizer={name: sgd, lr: 0.1, momentum: 0.8}",
            "methods.naive.training.optimizer={name: adam, lr: 1}",
        ],
    )
    naive = config.training_of(config.methods[0]).optimizer
    assert (naive.name, naive.lr, naive.momentum) == ("adam", 1, None)
    other = config.training_of(config.methods[1]).optimizer
    assert (other.name, other.lr, other.momentum) == ("sgd", 0.1, 0.8)


def test_digest_is_the_experiment_not_its_surroundings() -> None:
    base = load_recipe("digits").single("slca", 0)
    said = [
        "benchmark=z",
        "cost=null",
        "targets=[{name: x, figure: accuracy/last, value: 1, standing: code, source: y}]",
    ]
    same = load_recipe("digits", ["name=x", "output=y", "progress=false", "checkpoint.every=7", "seeds=[0]", *said])
    assert same.single("slca", 0).digest() == base.digest()
    for override in ("training.epochs=2", "device=cpu", "methods.slca.alignment.lr=0.5", "stream.tasks=2"):
        assert load_recipe("digits", [override]).single("slca", 0).digest() != base.digest()
    assert base.digest() != load_recipe("digits", ["seeds=[1]"]).single("slca", 1).digest()
    assert base.digest(seeds=False) == load_recipe("digits", ["seeds=[1]"]).single("slca", 1).digest(seeds=False)


def test_yaml_habits() -> None:
    assert parse("[1e-3, 1E3, -2.5e+1, .5e1, 1.5, 3]") == [1e-3, 1e3, -25.0, 5.0, 1.5, 3]
    assert parse("1e-3x") == "1e-3x"
    with pytest.raises(ConfigError, match="repeated key 'a'"):
        parse("{a: 1, b: {a: 1}, a: 2}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse("!!python/name:os.system")


def test_copy_never_overwrites(tmp_path: Path) -> None:
    copied = copy_recipe("digits", tmp_path)
    assert copied == tmp_path / "digits.yaml"
    assert load_recipe(copied) == load_recipe("digits")
    assert load_recipe(copy_recipe("digits", tmp_path / "mine.yaml")).name == "mine"
    with pytest.raises(ConfigError, match="exists already"):
        copy_recipe("digits", copied)
    with pytest.raises(ConfigError, match="doesn't exist"):
        copy_recipe("digits", tmp_path / "no" / "where.yaml")


def test_recipes_command(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in ALL)
    assert main(["recipes", "ls", "--long"]) == 0
    assert load_experiment("digits").description in " ".join(capsys.readouterr().out.split())
    assert main(["recipes", "show", "digits"]) == 0
    assert "methods:" in capsys.readouterr().out
    assert main(["recipes", "copy", "digits", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").is_file()
    assert main(["recipes", "copy", "digits", "mine.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["recipes", "keys"]) == 0
    listed = capsys.readouterr().out
    assert "methods[].alignment.lr: a number, greater than 0" in listed
    assert "device: auto, cpu, cuda or cuda:N" in listed
    assert "stream.name: one of digits, folder, avalanche" in listed


@pytest.mark.parametrize(
    "command",
    [["--help"], ["recipes", "ls"], ["recipes", "ls", "--long"], ["compare", "--help"], ["check", "x", "a=1"]],
)
def test_answers_without_the_heavy_imports(command: list[str]) -> None:
    code = (
        "import sys; from avalanche_firn.experiments.cli import main; main(sys.argv[1:]); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'avalanche', 'timm', 'sklearn')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_describe() -> None:
    keys = known_keys(Config)
    seeds = keys["seeds"]
    assert describe(seeds.annotation, seeds.metadata).startswith("a list, each a whole number, at least 0")
    temperature = keys["methods[].alignment.temperature"]
    assert describe(temperature.annotation, temperature.metadata) == "a number, greater than 0 or null"
    assert nearest("epoch", ["epochs", "lr"]) == "epochs"
    assert nearest("zzz", ["epochs", "lr"]) is None
