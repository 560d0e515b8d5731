"""Transfer experiments end to end on digits: runs, resumed runs, checks, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.experiments import pretraining, transfer_run
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_experiment
from avalanche_firn.experiments.transfer_comparison import compare_transfers, prepare_transfers, resume_transfers
from avalanche_firn.experiments.transfer_data import build_data, random_data, tasks_of

SMALL = [
    "network.arguments.width=4", "data.pretrain_images=30", "data.held_out_images=10", "data.train_images=10",
    "data.test_images=10", "transfer.trials=2", "transfer.sweep_trials=1", "methods.iid.epochs=2",
    "methods.iid_zap.epochs=3", "methods.asb_zap.episodes=4", "methods.meta_asb_zap.episodes=2", "device=cpu",
    "transfer.iid_epochs=2", "landscape={points: 5, snapshots: 4}", "threads=1",
]  # fmt: skip


def small(tmp_path: Path, methods: str, *more: str):
    words = [*SMALL, f"methods={methods}", f"output={str(tmp_path)!r}", *more]
    return load_experiment("zapping_digits", words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    config = small(folder, "[untrained,iid,iid_zap,asb_zap,meta_asb_zap]", "seeds=[0]")
    return config, compare_transfers(config, quiet=True, summary=False)


def test_every_way_of_pretraining(finished) -> None:
    config, done = finished
    assert done.trained == 5 and len(done.groups) == 10
    for run in done.runs:
        folder = done.folder / run["method"] / "seed-0"
        assert run["protocol"]["rates_chosen_on"] == "validation" and not run["protocol"]["task_identity_at_test"]
        assert run["protocol"]["zap"] is run["method"].endswith("_zap")
        assert 0 <= run["pretraining"]["accuracy"] <= 1 and (folder / "pretrained.safetensors").is_file()
        assert not (folder / "checkpoint").exists()
        for label, found in run["optimizers"].items():
            figures = found["figures"]
            assert set(figures) == set(transfer_run.FIGURES)
            assert found["rates"]["continual"] in config.transfer.optimizers[label == "sgd"].rates
            assert len(found["continual"]["accuracy"]) == len(found["iid"]["accuracy"]) == len(found["shocks"]) == 2
            assert figures["continual/accuracy"] == pytest.approx(np.mean(found["continual"]["accuracy"]))
            stored = json.loads(transfer_run.dynamics_file(folder, label).read_text())
            totals = Dynamics.from_dict(stored).totals()
            assert figures["dynamics/interference"] == pytest.approx(totals.interference)
            assert (folder / f"landscape-{label}.npz").is_file()
    text = str(done)
    assert "meta_asb_zap" in text and str(done.folder) in text


def test_tensorboard_has_curves_and_images(finished) -> None:
    _, done = finished
    board = EventAccumulator(str(done.folder / "iid_zap" / "seed-0"), size_guidance={"images": 0})
    board.Reload()
    scalars, images = board.Tags()["scalars"], board.Tags()["images"]
    assert {"transfer/adam/continual", "transfer/sgd/continual", "adam/continual/accuracy", "loss/train"} <= set(
        scalars
    )
    assert {f"dynamics/{o}/{n}" for o in ("adam", "sgd") for n in ("block-effect", "loss-map", "curves")} <= set(images)
    assert "landscape/adam" in images


def test_methods_and_optimizers_meet_the_same_orders_and_start_from_the_same_weights(finished) -> None:
    _, done = finished
    names = {
        tuple(
            json.loads(transfer_run.dynamics_file(done.folder / run["method"] / "seed-0", o).read_text())["task_names"]
        )
        for run in done.runs
        for o in ("adam", "sgd")
    }
    assert len(names) == 1
    untrained = load_file(done.folder / "untrained" / "seed-0" / "pretrained.safetensors")
    again = small(done.folder, "[untrained]")
    model = pretraining.pretrain(
        again.single("untrained", 0), build_data(again.data), done.folder, torch.device("cpu")
    )[0]
    (done.folder / "pretrained.safetensors").unlink()
    assert all(torch.equal(untrained[name], value) for name, value in model.state_dict().items())


def test_finished_runs_are_kept_and_other_configurations_refused(finished) -> None:
    config, done = finished
    again = compare_transfers(config, quiet=True, summary=False)
    assert again.trained == 0 and again.runs == done.runs
    other = config.model_copy(update={"transfer": config.transfer.model_copy(update={"trials": 1})})
    with pytest.raises(ConfigError, match=r"transfer.trials 2 there, 1 here.*--fresh"):
        compare_transfers(other, quiet=True, summary=False)
    kept = resume_transfers(config.single("iid", 0), done.folder / "iid" / "seed-0", quiet=True)
    assert kept.trained == 0 and len(kept.groups) == 2


class Stop(Exception):
    pass


class Interrupt(SupervisedPlugin, supports_distributed=False):
    """Ends a run after its second iteration, while it is armed."""

    stateless = True
    armed = True

    def after_training_iteration(self, strategy, **kwargs):
        if self.armed and strategy.clock.train_iterations == 2:
            raise Stop


@pytest.mark.parametrize("method", ["iid_zap", "asb_zap"])
def test_an_interrupted_pretraining_goes_on_to_the_same_weights(finished, method, tmp_path, monkeypatch) -> None:
    config, done = finished
    expected = load_file(done.folder / method / "seed-0" / "pretrained.safetensors")
    single = config.single(method, 0)
    single = single.model_copy(update={"checkpoint": single.checkpoint.model_copy(update={"every": 1})})
    data, device, built = build_data(config.data), torch.device("cpu"), pretraining.pretraining_strategy

    def interrupted(*args):
        strategy = built(*args)
        strategy.plugins.insert(0, Interrupt())
        return strategy

    monkeypatch.setattr(pretraining, "pretraining_strategy", interrupted)
    with pytest.raises(Stop):
        pretraining.pretrain(single, data, tmp_path, device)
    assert list((tmp_path / "checkpoint").iterdir()) and not (tmp_path / "pretrained.safetensors").exists()
    monkeypatch.setattr(Interrupt, "armed", False)
    model, _ = pretraining.pretrain(single, data, tmp_path, device)
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


def test_results_say_what_decided_the_rates() -> None:
    searched = load_experiment("zapping_digits")
    assert transfer_run._chosen_on(searched) == "validation"
    on_test = load_experiment("zapping_digits", ["transfer.select=test_envelope"])
    assert transfer_run._chosen_on(on_test) == "transfer classes (test)"
    one = ["transfer.optimizers=[{label: adam, name: adam, rates: [0.001]}]"]
    assert transfer_run._chosen_on(load_experiment("zapping_digits", one)) == "given"


def test_weights_of_other_images_are_refused(finished, tmp_path) -> None:
    config, _ = finished
    single, data, device = config.single("untrained", 0), build_data(config.data), torch.device("cpu")
    pretraining.pretrain(single, data, tmp_path, device)
    pretraining.pretrain(single, data, tmp_path, device)
    with pytest.raises(ConfigError, match="on other images"):
        pretraining.pretrain(single, replace(data, fingerprint="other"), tmp_path, device)
    with pytest.raises(ConfigError, match="another configuration"):
        pretraining.pretrain(config.single("untrained", 1), data, tmp_path, device)


def test_data_of_the_parts_is_disjoint() -> None:
    data = build_data(load_experiment("zapping_digits").data)
    assert data.pretrain.class_names == ("0", "1", "2", "3", "4") and data.transfer[0].class_names == ("7", "8", "9")
    hashes = [set(part.image_hashes()) for part in (data.pretrain, data.held_out, *data.validation, *data.transfer)]
    assert len(set.union(*hashes)) >= sum(map(len, hashes)) - 2  # digits has a few equal images
    tasks = tasks_of(data.transfer, torch.device("cpu"))
    assert [int(task.labels[0]) for task in tasks] == [0, 1, 2]
    assert all(len(task.images) == 60 and len(task.test_images) == 60 for task in tasks)
    fake = random_data((3, 84, 84), 5)
    assert fake.pretrain.images.shape == (40, 3, 84, 84)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.pretrain_images=400"], "data: class"),
        (["network.name=convnet_27"], "network"),
        (["network.outputs=3"], "network.outputs: 3 for 5 classes"),
        (["network.name=convnet_84"], "network"),
        (["transfer.tasks=4"], "transfer.tasks: 4 of 3 transfer classes"),
        (["methods.asb.remember_size=601"], "methods[3].remember_size: 601, but 600 images"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(words, said, tmp_path) -> None:
    config = load_experiment("zapping_digits", [*words, f"output={str(tmp_path)!r}"])
    with pytest.raises(ConfigError) as caught:
        prepare_transfers(config)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_missing_data_is_an_answer(tmp_path, capsys) -> None:
    assert main(["check", "zapping_omniglot", f"data.root={tmp_path / 'nowhere'}"]) == 2
    assert "data: " in capsys.readouterr().err
    assert main(["compare", "zapping_omniglot", f"data.root={tmp_path / 'nowhere'}", f"output={tmp_path}"]) == 2


@pytest.mark.parametrize(
    "name", ["zapping_omniglot", "zapping_mini_imagenet", "zapping_omnimage_20", "zapping_omnimage_100"]
)
def test_paper_recipes_are_dry_run_without_data(name, capsys) -> None:
    small = ["network.arguments.width=4", "threads=1", "device=cpu"]
    assert main(["check", name, "--dry-run", "--no-data", *small]) == 0
    told = capsys.readouterr().out
    for method in load_experiment(name).methods:
        assert f"{method.name}: 2 steps of pre-training, transfers with adam, sgd" in told
    assert "images not read" in told


def test_command_line(tmp_path, capsys) -> None:
    words = ["zapping_digits", *SMALL[:-1], f"output={tmp_path}", "seeds=[3]", "methods=[iid]", "threads=1", "--quiet"]
    assert main(["run", *words]) == 0
    told = capsys.readouterr().out
    assert "iid" in told and "1 runs trained" in told
    run = tmp_path / "zapping_digits" / "iid" / "seed-3"
    assert main(["resume", str(run)]) == 0
    assert "0 runs trained, 1 kept" in capsys.readouterr().out
    assert main(["report", str(run), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").is_file()
