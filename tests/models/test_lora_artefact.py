"""A LoRAC-IPC run of three tasks that an earlier version stored must load into this one, and say the same.

tests/artefacts/lorac_ipc.safetensors (model and plugins) and lorac_ipc.npz (inputs and what was computed from them)
were written by ``python tests/models/make_lora_artefact.py 2026-11-25``; see there for what is in them. A change of the
format breaks these tests: files that users have kept then need a way to be loaded.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.plugins.checkpoint_files import unflatten
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain

sys.path.append(str(Path(__file__).parent))
import make_lora_artefact as made


def close(found, expected):
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def stored():
    """State dict of the model, state dicts of the plugins by class, header."""
    with safe_open(made.FOLDER / "lorac_ipc.safetensors", "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    return model, from_plain(unflatten(json.loads(header["plugins"]), tensors)), header


@pytest.fixture(scope="module")
def expected():
    with np.load(made.FOLDER / "lorac_ipc.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] if name == "positions" else torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture
def loaded(stored):
    """Freshly built with other random numbers, then loaded."""
    model, plugins, _ = stored
    strategy = made.build(seed=99)
    assert LoRAComposition(strategy.model).num_tasks == strategy.model.head.num_tasks == 0
    assert strategy.model.load_state_dict(model) == ([], [])
    for name, plugin in made.plugins_of(strategy).items():
        plugin.load_state_dict(plugins[name])
    return strategy


def test_the_file_says_what_made_it(stored):
    _, plugins, header = stored
    assert header.keys() == {"format", "version", "date", "plugins"}
    assert header["version"] in (made.FOLDER / "README.md").read_text() and header["date"] == "2026-11-25"
    assert plugins.keys() == {kind.__name__ for kind in made.KINDS}
    sizes = [(made.FOLDER / f"lorac_ipc.{kind}").stat().st_size for kind in ("safetensors", "npz")]
    assert sum(sizes) < 50_000


def test_the_model_grows_to_the_stored_tasks(loaded, stored, expected):
    model, plugins, _ = stored
    composition, head = LoRAComposition(loaded.model), loaded.model.head
    assert (composition.num_tasks, composition.num_closed, head.num_tasks) == (3, 3, 3)
    assert head.known_classes == tuple(expected["columns"].tolist())
    assert composition.positions == expected["positions"].tolist()
    assert torch.equal(composition.frozen, expected["frozen"]) and composition.frozen.sum() == 6
    frozen = [name for name, flag in zip(composition.positions, composition.frozen.tolist(), strict=True) if flag]
    assert frozen == plugins["ImportantParameterPlugin"]["frozen_after"][-1]
    for name, layer in composition.layers.items():
        assert layer.frozen.tolist() == [not layer.is_free(part) for part in layer.parts]
        snapshots = layer.snapshots
        assert torch.equal(snapshots, model[f"{name}.snapshots"]) and snapshots.shape == (3, len(layer.parts), 3)
        assert torch.equal(snapshots.diagonal(dim1=0, dim2=2), torch.ones(len(layer.parts), 3))
        assert not snapshots[0, :, 1:].any() and not snapshots[1, :, 2:].any()
        for index, part in enumerate(layer.parts):  # trained in the last task, unless frozen before it
            matrix = name if part == "full" else f"{name}.{part}"
            kept = torch.equal(snapshots[2, index, :2], snapshots[1, index, :2])
            assert kept == (matrix in plugins["ImportantParameterPlugin"]["frozen_after"][1])
    merged = torch.stack([composition.layers[made.LAYER].merged_weight(task) for task in range(3)])
    close(merged, expected["merged"])


def test_merged_weights_equal_their_formula(stored, expected):
    """From the stored tensors alone: W0 + s sum_i omega_i A_i B_i with the scalars as they were after each task."""
    model, _, _ = stored
    scale, name = 3 / 2, made.LAYER
    for task in range(3):
        rows = []
        for index, part in enumerate("qkv"):
            pairs = ((model[f"{name}.A.{part}.{i}"] @ model[f"{name}.B.{part}.{i}"]).T for i in range(task + 1))
            scalars = model[f"{name}.snapshots"][task, index]
            rows.append(sum(scale * scalar * pair for scalar, pair in zip(scalars, pairs, strict=False)))
        weight = model[f"{name}.base.weight"] + torch.cat(rows)
        close(weight, expected["merged"][task])


def test_the_same_answers(loaded, expected):
    found = made.answers(loaded, expected["images"], expected["mixed"])
    assert found.keys() == expected.keys() - {"images", "targets", "mixed", "positions", "columns"}
    for name in ("logits", "mixed_logits", "predicted_logits", "distances"):
        close(found[name], expected[name])
    assert torch.equal(found["inferred"], expected["inferred"])
    tasks, cases = expected["mixed"], torch.arange(len(expected["mixed"]))
    close(found["mixed_logits"], expected["logits"][tasks, cases])
    close(found["predicted_logits"], expected["logits"][found["inferred"], cases])
    assert set(found["inferred"].tolist()) == {0, 1, 2}
    own = torch.arange(3).repeat_interleave(5)
    assert (found["inferred"] == own).float().mean() > 0.6


def test_the_state_is_written_as_it_was_read(loaded, stored):
    """The same keys and bits; the schedule waits for its optimizer."""
    model, plugins, _ = stored
    assert differing_state(dict(loaded.model.state_dict()), model) is None
    for name, plugin in made.plugins_of(loaded).items():
        state, before = to_plain(plugin.state_dict()), to_plain(plugins[name])
        if name == "LoRACompositionPlugin":
            assert state.pop("scheduler") is None and before.pop("scheduler")["last_epoch"] == 10
        # what the artefact's version didn't keep yet
        if name == "ImportantParameterPlugin":
            assert state.pop("scores_after") == [None] * 3
        elif name == "ClassifierAlignmentPlugin":
            assert state.pop("history") == []
        assert differing_state(state, before) is None
    own = made.plugins_of(loaded)
    alignment, inference = own["ClassifierAlignmentPlugin"].gaussians, own["TaskInferencePlugin"].inference
    assert set(alignment.class_ids) == set(inference.class_ids) == set(loaded.model.head.known_classes)
    assert inference.tasks == (0, 0, 0, 1, 1, 1, 2, 2)


def test_training_goes_on(loaded, stored):
    """A fourth task, from stored tasks whose weights stay as they were; old tasks' answers don't change."""
    model, plugins, _ = stored
    benchmark, composition = made.stream(), LoRAComposition(loaded.model)
    images = torch.stack([benchmark.test_stream[0].dataset[i][0] for i in range(4)])
    before = made.answers(loaded, images, torch.zeros(4, dtype=torch.long))["merged"]
    loaded.train_epochs, loaded.clock.train_exp_counter = 1, 3
    loaded.train(benchmark.train_stream[3], eval_streams=[])
    loaded.eval(benchmark.test_stream)
    own = made.plugins_of(loaded)
    assert (composition.num_tasks, composition.num_closed, loaded.model.head.num_tasks) == (4, 4, 4)
    assert [len(names) for names in own["ImportantParameterPlugin"].frozen_after] == [2, 4, 6, 8]
    assert own["ImportantParameterPlugin"].frozen_after[:3] == plugins["ImportantParameterPlugin"]["frozen_after"]
    assert own["TaskInferencePlugin"].inference.tasks == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)
    assert 4 in own["TaskInferencePlugin"].accuracies and len(own["ClassifierAlignmentPlugin"].gaussians) == 10
    after = made.answers(loaded, images, torch.zeros(4, dtype=torch.long))["merged"]
    assert torch.equal(after[:3], before)
    for key, value in loaded.model.state_dict().items():
        if ".A." in key or ".B." in key:
            assert key.endswith(".3") or torch.equal(value, model[key])
