"""Zapping against numbers of the released code: rows, spreads, optimizer state, schedule, and a run in Avalanche."""

import numpy as np
import pytest
import timm
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

import avalanche_firn.models  # noqa: F401  (registers convnet_28)
from avalanche_firn.plugins.zapping import ZappingPlugin, resample_rows_, reset_optimizer_rows_

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

RULES = ["kaiming_normal", "kaiming_normal_joint"]


def cases_of(arrays):
    """Dicts of the cases, arrays by their names without the case."""
    return [
        {k.split("_", 1)[1]: v for k, v in arrays.items() if k.startswith(f"c{i}_")} for i in range(arrays["n_cases"])
    ]


# ----------------------------------------------------------------------- rows
def from_normals(z, joint):
    """A rule that uses given normals, as torch's own draw might differ in another version."""
    count, width = z.shape
    scale = np.sqrt(2 / (width * (count if joint else 1)))
    return lambda block, generator: block.copy_(torch.from_numpy(z * scale))


@pytest.mark.parametrize("source", ["normals", "generator", "global"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", range(6))
def test_golden_rows(golden, case, rule, source):
    g = cases_of(golden("zapping", "zap_rows"))[case]
    joint = rule == "kaiming_normal_joint"
    head = nn.Linear(g["before"].shape[1], g["before"].shape[0], dtype=torch.from_numpy(g["before"]).dtype)
    head.load_state_dict({"weight": torch.from_numpy(g["before"]), "bias": torch.from_numpy(g["bias_before"])})
    parameter, pointer = head.weight, head.weight.data_ptr()
    rows = int(g["rows"][0]) if g["called_with_int"] else g["rows"]
    generator = torch.Generator().manual_seed(int(g["seed"])) if source == "generator" else None
    torch.manual_seed(int(g["seed"]))
    init = from_normals(g["z"].astype(np.float64), joint) if source == "normals" else rule
    resample_rows_(head.weight, rows, init=init, generator=generator)
    expected = g["after"].copy()
    if not joint:
        expected[g["rows"]] = g["z"] * np.sqrt(2 / g["z"].shape[1])
    tolerance = 1e-12 if g["before"].dtype == np.float64 else 1e-6
    np.testing.assert_allclose(head.weight.detach().numpy(), expected, rtol=0, atol=tolerance)
    others = np.setdiff1d(np.arange(len(expected)), g["rows"])
    assert np.array_equal(head.weight.detach().numpy()[others], g["before"][others])
    assert np.array_equal(head.bias.detach().numpy(), g["bias_after"])
    assert head.weight is parameter and head.weight.data_ptr() == pointer and parameter.requires_grad


def test_golden_spreads(golden):
    g = golden("zapping", "zap_statistics")
    for width, outputs, count, seed, std, largest, row, joint in zip(
        *(g[k] for k in ("F", "C", "K", "seed", "std", "max_abs", "std_formula_row", "std_formula_joint")), strict=True
    ):
        measured = {}
        for rule in RULES:
            weight = torch.zeros(outputs, width)
            torch.manual_seed(int(seed))
            resample_rows_(weight, range(count), init=rule)
            fresh = weight[:count].double()
            measured[rule] = float(fresh.std(correction=0))
            assert int((weight != 0).any(1).sum()) == count
            if rule == "kaiming_normal_joint":
                assert float(fresh.abs().max()) == pytest.approx(float(largest), abs=1e-6)
        assert measured["kaiming_normal_joint"] == pytest.approx(float(std), abs=1e-6)
        margin = 4 / np.sqrt(2 * count * width)
        assert measured["kaiming_normal"] == pytest.approx(float(row), rel=margin)
        assert measured["kaiming_normal_joint"] == pytest.approx(float(joint), rel=margin)
        assert measured["kaiming_normal"] / measured["kaiming_normal_joint"] == pytest.approx(np.sqrt(count), rel=1e-5)


@pytest.mark.parametrize("case", range(3))
def test_golden_head_start(golden, case):
    g = cases_of(golden("zapping", "head_reinit"))[case]
    outputs, width = g["weight"].shape
    head = nn.Linear(width, outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int(g["seed"]))
    resample_rows_(head.weight, range(outputs), bias=head.bias, generator=generator)
    np.testing.assert_allclose(head.weight.detach().numpy(), g["weight"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(head.bias.detach().numpy(), g["bias"], rtol=0, atol=0)


# ------------------------------------------------------------------ optimizer
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.filterwarnings("ignore:optimizer rows were zeroed")
@pytest.mark.parametrize("mode", ["keep", "drop", "rows", "rows_seeded"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_golden_optimizer_rows(golden, name, mode):
    g = golden("zapping", "optimizer_rows")
    parameter = nn.Parameter(torch.from_numpy(g["param0"].copy()))
    optimizer = OPTIMIZERS[name]([parameter])
    found = []
    for step, gradient in enumerate(g["grads"]):
        if step == int(g["t0"]):
            with torch.no_grad():
                parameter[g["rows"]] = torch.from_numpy(g["fresh_rows"])
            reset_optimizer_rows_(optimizer, parameter, g["rows"], mode)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        if step >= int(g["t0"]):
            found.append(parameter.detach().clone())
    expected = g[f"{name}__{mode}"]
    np.testing.assert_allclose(torch.stack(found)[: len(expected)].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [0, 1])
def test_golden_amplification(golden, case):
    arrays = golden("zapping", "adam_row_amplification")
    g = cases_of(arrays)[case]
    rate = 1e-3
    parameter = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=rate, betas=tuple(g["betas"].tolist()), eps=0, foreach=False)
    parameter.grad = torch.full_like(parameter, float(g["gradient"]))
    for _ in range(int(g["t0"])):
        optimizer.step()
    with pytest.warns(RuntimeWarning, match="updates of these rows are too large at first"):
        reset_optimizer_rows_(optimizer, parameter, 0, "rows")
    updates = []
    for _ in range(len(arrays["k"])):
        before = parameter.detach().clone()
        optimizer.step()
        updates.append((before - parameter.detach()).flatten() / rate)
    np.testing.assert_allclose(torch.stack(updates).numpy(), g["update_over_lr"], rtol=0, atol=1e-9)


# ------------------------------------------------------------------- schedule
def naive(model, plugin, *, epochs, batch, lr=1e-3, criterion=None):
    return Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=lr), train_mb_size=batch, train_epochs=epochs,
        criterion=criterion or nn.CrossEntropyLoss(), plugins=[plugin], evaluator=EvaluationPlugin(loggers=[]),
    )  # fmt: skip


class Net(nn.Module):
    """A classifier of so many outputs and nothing else."""

    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(2, outputs)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(("epochs", "rate"), [(30, 1), (30, 3), (30, 5), (30, 10), (10, 1), (10, 0)])
@pytest.mark.parametrize("short_cut", [False, True])
def test_golden_schedule(golden, stream_of, epochs, rate, short_cut):
    g = golden("zapping", "iid_zap_schedule")
    outputs, count, seed = (int(g[k]) for k in ("outputs", "rows_per_zap", "row_choice_seed"))
    if short_cut:
        plugin = ZappingPlugin.pretraining(every=rate, fraction=count / outputs, reference=True, seed=seed)
    else:
        plugin = ZappingPlugin(scope="random", schedule="epoch", every=rate, n_rows=count, row_choice_seed=seed)
    stream = stream_of(torch.randn(2, 2), [0, 1], [2]).train_stream
    naive(Net(outputs), plugin, epochs=epochs, batch=2).train(stream[0], eval_streams=[])
    key = f"E{epochs}_rate{rate}"
    assert [zap.epoch + 1 for zap in plugin.history] == g[f"{key}_epochs"].tolist()
    assert [list(zap.rows) for zap in plugin.history] == g[f"{key}_rows"].tolist()


# ------------------------------------------------------------------------ run
def names_in(model):
    """Names of the golden parameters -> parameters of ``convnet_28``."""
    found = {"head_w": model.fc.weight, "head_b": model.fc.bias}
    for i, block in enumerate(model.blocks, start=1):
        found |= {f"b{i}_conv_w": block.conv.weight, f"b{i}_conv_b": block.conv.bias}
        found |= {f"b{i}_norm_w": block.norm.weight, f"b{i}_norm_b": block.norm.bias}
    return found


class Recording(ZappingPlugin):
    """The rows right after each zap, in the order drawn."""

    def before_training_epoch(self, strategy, **kwargs):
        done = len(self.history)
        super().before_training_epoch(strategy, **kwargs)
        if len(self.history) > done:
            self.values = [*getattr(self, "values", []), strategy.model.fc.weight.detach()[list(self.history[-1].rows)]]


def test_golden_run(golden, stream_of):
    """Zapped i.i.d. pre-training in Avalanche's loop; the loader also draws from the global generator, so not that."""
    g = golden("zapping", "iid_zap_run")
    model = timm.create_model("convnet_28", width=4, num_classes=12).double()
    with torch.no_grad():
        for name, parameter in names_in(model).items():
            parameter.copy_(torch.from_numpy(g[f"init__{name}"]))
    losses = []

    def criterion(output, target):
        loss = nn.functional.cross_entropy(output, target)
        losses.append(loss.item())  # Avalanche's own sum is float32
        return loss

    plugin = Recording(
        scope="random", schedule="epoch", every=int(g["rate"]), n_rows=int(g["rows_per_zap"]),
        init="kaiming_normal_joint", seed=int(g["zap_seed"]), row_choice_seed=int(g["row_choice_seed"]),
    )  # fmt: skip
    images = torch.from_numpy(g["images_u8"].reshape(-1, 1, 28, 28)).double() / 255
    stream = stream_of(images, g["labels"].reshape(-1), [12]).train_stream
    strategy = naive(
        model, plugin, epochs=int(g["epochs"]), batch=g["labels"].shape[1], lr=float(g["lr"]), criterion=criterion
    )
    strategy.train(stream[0], eval_streams=[], shuffle=False)
    np.testing.assert_allclose(losses, g["step_loss"], rtol=0, atol=1e-9)
    assert [list(zap.rows) for zap in plugin.history] == g["zapped_rows"].tolist()
    np.testing.assert_allclose(torch.stack(plugin.values).numpy(), g["zapped_row_values"], rtol=0, atol=1e-12)
    for name, parameter in names_in(model).items():
        tolerance = 1e-6 if name.endswith("conv_b") else 1e-9  # the instance norm takes those out again
        np.testing.assert_allclose(parameter.detach().numpy(), g[f"final__{name}"], rtol=0, atol=tolerance)
