"""LinearProbePlugin: what it writes, what it leaves alone, and what it refuses."""

import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from avalanche.benchmarks.scenarios import OnlineCLExperience
from avalanche.benchmarks.scenarios.online import split_online_stream
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from avalanche_firn.models import extract_features, with_taskwise_head
from avalanche_firn.models.linear_probe import fit_linear_probe
from avalanche_firn.plugins import LinearProbePlugin

sys.path.append(str(Path(__file__).parent))
from linear_probe_cases import Cosine, Net, naive, probed, small_benchmark

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def benchmark_of(stream_of):
    return partial(small_benchmark, stream_of)


# ----------------------------------------------------------------- what is written
def test_writes_the_optimum_of_the_current_classes_and_nothing_else(benchmark_of):
    benchmark = benchmark_of((2, 2))
    probe = LinearProbePlugin(l2=0.01)
    _, before, after = probed(probe, benchmark, epochs=2)
    assert all(torch.equal(before.states[0][k], after.states[0][k]) for k in before.states[0])  # first task: no probe
    old, new = before.states[1], after.states[1]
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed == {"classifier.weight", "classifier.bias"}
    for part in ("weight", "bias"):
        rows = [0, 1, 4, 5]
        assert torch.equal(old[f"classifier.{part}"][rows], new[f"classifier.{part}"][rows])
    model = Net()
    model.load_state_dict(old)
    features, targets = extract_features(model, benchmark.train_stream[1].dataset.eval())
    weight, bias = fit_linear_probe(features, targets - 2, l2=0.01)
    torch.testing.assert_close(new["classifier.weight"][2:4], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(new["classifier.bias"][2:4], bias, rtol=0, atol=1e-6)


def test_report_and_published_figures(benchmark_of):
    probe = LinearProbePlugin(bn_check=True)
    strategy, _, after = probed(probe, benchmark_of())
    model = Net()
    model.load_state_dict(after.states[1])
    model.eval()
    dataset = benchmark_of().train_stream[1].dataset
    x, y = torch.stack([item[0] for item in dataset]), torch.tensor([item[1] for item in dataset])
    logits = model(x)
    report = probe.report
    assert (report.experience, report.samples, report.classes) == (1, 20, (2, 3))
    assert report.loss == pytest.approx(float(F.cross_entropy(logits[:, 2:4], y - 2)), abs=1e-6)
    assert report.loss_all_rows == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-6)
    assert report.accuracy == pytest.approx(float((logits[:, 2:4].argmax(1) == y - 2).float().mean()))
    assert report.head_norm == pytest.approx(float(model.classifier.weight[2:4].norm()), abs=1e-6)
    assert report.l2 == pytest.approx(1 / 20) and report.seconds > 0
    model.train()
    batches = []
    with torch.no_grad():
        torch.manual_seed(0)
        model.backbone.layers[3].eval()  # its mask is random; the figure itself is drawn with a private seed
        batches = [model(part) for part in x.split(8)]
    assert report.loss_bn_train == pytest.approx(float(F.cross_entropy(torch.cat(batches), y)), rel=0.5)
    published = strategy.evaluator.get_last_metrics()
    assert published["lp/loss"] == report.loss and published["lp/head-norm"] == report.head_norm
    assert published["lp/loss-bn-train"] == report.loss_bn_train


# ------------------------------------------------------------- what stays untouched
def vit():
    return with_taskwise_head(timm.create_model("vit_firn_32", drop_rate=0.2, proj_drop_rate=0.2), freeze_old=False)


def resnet():
    return timm.create_model("resnet10t", num_classes=4, drop_rate=0.2)


class Images(Dataset):
    """Twelve random images of four classes."""

    def __init__(self):
        self.x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.targets = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.x[index], self.targets[index]


@pytest.mark.parametrize("build", [vit, resnet, Net])
@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "sgd"])
def test_backbone_is_bitwise_unchanged(build, solver, benchmark_of, stream_of):
    """Parameters and buffers, with momentum and weight decay in the optimizer, dropout and BatchNorm in the model."""
    if build is Net:
        benchmark = benchmark_of()
    else:
        images = Images()
        benchmark = stream_of(images.x, images.targets, [2, 2])
    torch.manual_seed(0)
    probe = LinearProbePlugin(solver=solver, lp_first=True, epochs=3)
    _, before, after = probed(probe, benchmark, model=build(), epochs=0, weight_decay=0.1)
    for old, new in zip(before.states, after.states, strict=True):
        head = ("classifier", "fc", "head")
        assert {k for k in old if not torch.equal(old[k], new[k])}  # the head was written
        assert all(torch.equal(old[k], new[k]) for k in old if not k.startswith(head))


def test_training_mode_features_do_change_buffers(benchmark_of):
    """The control of the test above."""
    _, before, after = probed(LinearProbePlugin(lp_features="train", lp_first=True), benchmark_of(), epochs=0)
    assert not torch.equal(
        before.states[0]["backbone.layers.1.running_mean"], after.states[0]["backbone.layers.1.running_mean"]
    )


@pytest.mark.parametrize("mode", ["new_bn_stats", "refresh"])
def test_renewed_statistics_reach_the_features(benchmark_of, mode):
    _, before, after = probed(LinearProbePlugin(lp_features=mode), benchmark_of(), epochs=1)
    model = Net()
    model.load_state_dict(before.states[1])
    dataset = benchmark_of().train_stream[1].dataset.eval()
    torch.manual_seed(0)
    extract_features(model, dataset, batch_size=16, bn=mode)
    name = "backbone.layers.1.running_mean"
    if mode == "refresh":
        torch.testing.assert_close(model.state_dict()[name], after.states[1][name], rtol=0, atol=0)
    assert not torch.equal(before.states[1][name], after.states[1][name])


def test_modes_flags_and_rates_come_back(benchmark_of):
    model = Net()
    model.backbone.layers[0].bias.requires_grad_(False)
    probe = LinearProbePlugin(ft_lr=0.001, backbone=["backbone.layers.4.*"])
    strategy, _, after = probed(probe, benchmark_of((2, 2)), model=model)
    assert strategy.optimizer.param_groups[0]["lr"] == 0.05
    assert after.rates == [[0.05], [0.001]]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert [n for n, flag in flags.items() if not flag] == ["backbone.layers.0.bias"]
    for inside in after.flags:  # only the chosen layer and the head were trainable
        assert {n for n, flag in inside.items() if flag} == {
            "backbone.layers.4.weight", "backbone.layers.4.bias", "classifier.weight", "classifier.bias",
        }  # fmt: skip
    assert all(m.training for m in model.modules())


def test_an_error_in_the_probe_leaves_modes_and_generators(benchmark_of, monkeypatch):
    from avalanche_firn.plugins import linear_probe

    def broken(*args, **kwargs):
        torch.rand(3)
        raise RuntimeError("solver broke")

    monkeypatch.setattr(linear_probe, "write_probe", broken)
    model = Net()
    strategy = naive(model, LinearProbePlugin(lp_first=True, backbone=["backbone.layers.4.*"]))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="solver broke"):
        strategy.train(benchmark_of().train_stream[0], eval_streams=[])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------- state
def test_state_round_trip(benchmark_of):
    probe = LinearProbePlugin(ft_lr=0.01)
    probed(probe, benchmark_of())
    other = LinearProbePlugin(ft_lr=0.01)
    other.load_state_dict(probe.state_dict())
    assert other.state_dict() == probe.state_dict() and other.report == probe.report


# ---------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, "solver is 'newton'"),
        ({"lp_features": "test"}, "lp_features is 'test'"),
        ({"lp_scope": "none"}, "lp_scope is 'none'"),
        ({"head_init": "random"}, "head_init is 'random'"),
        ({"ft_bn": "fixed"}, "ft_bn is 'fixed'"),
        ({"normalize": "mean"}, "normalize is 'mean'"),
        ({"rescale_head": "std"}, "rescale_head is 'std'"),
        ({"l2": -1.0}, "l2 is -1.0"),
        ({"l2": []}, r"l2 is \[\]"),
        ({"l2": [0.1, float("nan")]}, r"l2 is \[0.1, nan\]"),
        ({"lp_views": -1}, "lp_views is -1"),
        ({"lp_views": "fresh"}, "lp_views is 'fresh' with solver 'lbfgs'"),
        ({"ft_lr": 0.0}, "ft_lr is 0.0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"head_init": "zero", "rescale_head": True}, "rescale_head is True with head_init 'zero'"),
        ({"backbone": "blocks.*"}, "backbone is 'blocks"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearProbePlugin(**arguments)


def test_wrong_heads(benchmark_of):
    experience = benchmark_of().train_stream[0]
    with pytest.raises(ValueError, match="'classifier' is a Cosine, which solver 'lbfgs' cannot write"):
        naive(Net(Cosine()), LinearProbePlugin()).train(experience, eval_streams=[])
    with pytest.raises(ValueError, match=r"class_ids.*has no row"):
        naive(Net(nn.Linear(8, 1)), LinearProbePlugin(lp_first=True)).train(experience, eval_streams=[])
    with pytest.raises(ValueError, match="head_init is 'reset'; 'keep' is accepted with a Cosine"):
        naive(Net(Cosine()), LinearProbePlugin(solver="sgd", head_init="reset")).train(experience, eval_streams=[])
    with pytest.raises(ValueError, match="trained as a module"):
        probe = LinearProbePlugin(solver="sgd", rescale_head=True, lp_first=True)
        naive(Net(Cosine()), probe).train(experience, eval_streams=[])


def test_a_filter_that_selects_nothing(benchmark_of):
    with pytest.raises(ValueError, match="backbone selects no parameter"):
        naive(Net(), LinearProbePlugin(backbone=["lora.*"])).train(benchmark_of().train_stream[0], eval_streams=[])


def test_online_experiences_are_refused(benchmark_of):
    stream = split_online_stream(benchmark_of().train_stream, experience_size=10)
    experience = next(iter(stream))
    assert isinstance(experience, OnlineCLExperience)
    with pytest.raises(ValueError, match="online experience"):
        naive(Net(), LinearProbePlugin()).train(experience, eval_streams=[])
