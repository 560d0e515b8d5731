"""Configurations of transfer experiments: what is refused, and how; overrides; the released values in the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, load_experiment, load_recipe
from avalanche_firn.experiments.transfer_config import TransferExperiment, validate_transfer


def raw(**changes):
    return {
        "experiment": "transfer",
        "name": "mine",
        "data": {"name": "digits"},
        "methods": ["untrained", {"strategy": "iid", "zap": True, "epochs": 2}],
        "transfer": {"optimizers": [{"label": "adam", "name": "adam", "rates": [0.001]}]},
    } | changes


def problems(values) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        validate_transfer(values)
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_a_small_one_is_valid_and_comes_back_from_its_own_text(tmp_path: Path) -> None:
    config = validate_transfer(raw())
    assert [method.name for method in config.methods] == ["untrained", "iid"]
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_experiment(tmp_path) == config
    single = config.single("iid", 2)
    assert single.seeds == [2] and [m.name for m in single.methods] == ["iid"]
    assert single.digest() != config.single("iid", 1).digest()
    assert single.digest(seeds=False) == config.single("iid", 1).digest(seeds=False)
    moved = validate_transfer(raw(name="other", output="x", progress=False)).single("iid", 2)
    assert moved.digest() == single.digest()


@pytest.mark.parametrize(
    ("changes", "path", "said"),
    [
        ({"methods": [{"strategy": "asb", "inner_lr": 0.1}]}, "methods[0].zap", "missing"),
        ({"methods": [{"strategy": "asb", "zap": True}]}, "methods[0].inner_lr", "missing"),
        ({"methods": [{"strategy": "iid", "zap": True, "epochs": 1}]}, "methods[0].zap_every", "no zap would happen"),
        ({"methods": [{"strategy": "meta", "zap": True}]}, "methods[0].strategy", "'meta' isn't known"),
        ({"methods": ["untrained", "untrained"]}, "methods", "repeated"),
        ({"methods": [{"strategy": "untrained", "name": "summary"}]}, "methods", "reserved"),
        ({"seeds": [1, 1]}, "seeds", "repeated"),
        ({"precision": "fp16"}, "precision", "isn't accepted"),
        ({"data": {"name": "digits", "transfer": [4]}}, "data.transfer", "in two parts"),
        ({"data": {"name": "digits", "validation": []}, "transfer": {"optimizers": [
            {"label": "a", "name": "adam", "rates": [0.1, 0.2]}]}}, "transfer.select", "no class is left for it"),
        ({"transfer": {"optimizers": [{"label": "a", "name": "adam", "rates": [0.1, 0.1]}]}},
         "transfer.optimizers[0].rates", "repeated"),
        ({"transfer": {"optimizers": [{"label": "a", "name": "adam", "rates": [0.1], "momentum": 0.9}]}},
         "transfer.optimizers[0].momentum", "has no momentum"),
        ({"transfer": {"optimizers": [{"label": "a", "name": "adam", "rates": [0.1]}] * 2}},
         "transfer.optimizers", "labels"),
        ({"transfr": {}}, "transfr", "unknown key"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(changes, path, said) -> None:
    found = problems(raw(**changes))
    assert said in found[path], found


def test_all_problems_come_together() -> None:
    wrong = {"methods": [{"strategy": "asb", "zap": 1}], "seeds": [], "network": {"widht": 3}}
    found = problems(raw(**wrong))
    assert {"methods[0].zap", "methods[0].inner_lr", "seeds", "network.widht"} <= set(found)


def test_overrides_address_methods_by_name() -> None:
    config = load_experiment(
        "zapping_digits",
        [
            "methods.asb_zap.episodes=7",
            "seeds=[5]",
            "methods=[asb_zap]",
            "network.arguments.width=4",
            "data.test_images=9",
        ],
    )
    assert isinstance(config, TransferExperiment)
    assert [m.name for m in config.methods] == ["asb_zap"] and config.methods[0].episodes == 7
    assert config.network.arguments == {"width": 4} and config.data.test_images == 9
    with pytest.raises(ConfigError, match=r"did you mean methods\.asb_zap\.episodes"):
        load_experiment("zapping_digits", ["methods.asb_zap.episode=7"])


def test_a_comparison_on_a_stream_is_something_else() -> None:
    with pytest.raises(ConfigError, match="a comparison on a stream"):
        load_recipe("zapping_digits")
    with pytest.raises(ConfigError, match="experiment"):
        validate_transfer({"experiment": "stream"})


def test_recipes_have_the_values_of_the_public_code() -> None:
    """The table of the released configurations."""
    expected = {
        "zapping_omniglot": (1000, 0.1, 64, 15, 15, 5, 600, 256, 10, 1e-3),
        "zapping_mini_imagenet": (64, 1e-3, 100, 500, 30, 100, 20, 64, 30, 3e-4),
        "zapping_omnimage_20": (700, 1e-3, 100, 15, 15, 5, 300, 128, 30, 3e-4),
        "zapping_omnimage_100": (700, 1e-3, 100, 85, 15, 85, 300, 128, 30, 3e-4),
    }
    released = [0.055, 0.01, 0.0055, 1e-3, 7e-4, 4e-4, 1e-4, 7e-5, 4e-5]
    for name, (outputs, inner, remember, images, train, test, tasks, batch, epochs, rate) in expected.items():
        config = load_experiment(name)
        by = {method.name: method for method in config.methods}
        assert sorted(by) == ["asb", "asb_zap", "iid", "iid_zap", "meta_asb", "meta_asb_zap"]
        for label, method in by.items():
            assert method.zap is label.endswith("_zap")
            if "asb" in label:
                assert (method.inner_lr, method.outer_lr, method.remember_size) == (inner, 1e-3, remember)
                assert (method.inner_steps, method.episodes) == (20, 25000 if "meta" in label else 9000)
            else:
                assert (method.epochs, method.batch_size, method.optimizer.lr) == (epochs, 256, rate)
        data, transfer = config.data, config.transfer
        assert config.network.outputs == outputs and config.network.arguments == {"width": 256}
        assert (data.pretrain_images, data.train_images, data.test_images) == (images, train, test)
        assert (transfer.tasks, transfer.iid_batch_size, transfer.trials) == (tasks, batch, 10)
        assert transfer.optimizers[0].rates == released and transfer.optimizers[0].name == "adam"
        plain = {m: by[m].model_dump() | {"name": "", "zap": None} for m in by}
        assert plain["asb"] == plain["asb_zap"] and plain["meta_asb"] == plain["meta_asb_zap"]


def test_command_line_answers_wrong_recipes(tmp_path: Path, capsys) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(raw(methods=[{"strategy": "asb"}])))
    assert main(["check", str(file)]) == 2
    assert "2 errors" in capsys.readouterr().err
