"""LinearProbePlugin: how fine-tuning goes on after the probe, and every option."""

import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_firn.models import FeatureCache, extract_features, with_taskwise_head
from avalanche_firn.models.linear_probe import fit_linear_probe, fit_temperature
from avalanche_firn.plugins import LinearProbePlugin, SlowLearnerPlugin

sys.path.append(str(Path(__file__).parent))
from linear_probe_cases import Net, Snapshot, data, naive, probed, small_benchmark

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def benchmark_of(stream_of):
    return partial(small_benchmark, stream_of)


# --------------------------------------------------------------------- fine-tuning
@pytest.mark.parametrize(
    ("lp_features", "ft_bn", "first", "fixed"),
    [
        ("eval", "auto", False, True),
        ("eval", "train", False, False),
        ("eval", "eval", False, True),
        ("train", "auto", False, False),
        ("refresh", "auto", False, True),
        ("eval", "eval", True, True),
    ],
)
def test_batchnorm_policy(benchmark_of, lp_features, ft_bn, first, fixed):
    probe = LinearProbePlugin(lp_features=lp_features, ft_bn=ft_bn, lp_first=first)
    _, _, after = probed(probe, benchmark_of(), epochs=2)
    assert len(after.modes) == 4
    for epoch, modes in enumerate(after.modes):
        expected = fixed and (epoch >= 2 or first)  # the first task is trained in training mode unless it is probed
        backbone = {name: mode for name, mode in modes.items() if name.startswith("backbone")}
        assert set(backbone.values()) == {not expected}
        assert modes["classifier"] is True


def test_fresh_state_and_stale_momentum(benchmark_of):
    """After a probe the first update is -lr * (g + wd * p); without the reset old momentum drifts to lr m / (1 - m)."""
    lr, decay, m = 0.1, 0.01, 0.9

    class First(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.seen = []

        def before_update(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 1 and strategy.clock.train_exp_iterations == 0:
                self.before = [p.detach().clone() for p in strategy.model.parameters()]
                self.grads = [p.grad.clone() for p in strategy.model.parameters()]

        def after_update(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 1 and strategy.clock.train_exp_iterations == 0:
                self.after = [p.detach().clone() for p in strategy.model.parameters()]

    first = First()
    strategy = naive(Net().double(), LinearProbePlugin(), first, lr=lr, momentum=m, weight_decay=decay)
    x, y = data()
    for experience in benchmark_of_double(x, y):
        strategy.train(experience, eval_streams=[])
    for old, grad, new in zip(first.before, first.grads, first.after, strict=True):
        torch.testing.assert_close(new, old - lr * (grad + decay * old), rtol=0, atol=1e-10)


def benchmark_of_double(x, y):
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset
    from torch.utils.data import TensorDataset

    parts = []
    for low in (0, 2):
        rows = (y >= low) & (y < low + 2)
        dataset = TensorDataset(x[rows].double(), torch.tensor(y[rows]))
        dataset.targets = [int(t) for t in y[rows]]
        parts.append(as_classification_dataset(dataset))
    return with_classes_timeline(benchmark_from_datasets(train=parts)).train_stream


@pytest.mark.parametrize("reset", [True, False])
def test_reset_momentum(benchmark_of, reset):
    _, before, after = probed(LinearProbePlugin(reset_momentum=reset), benchmark_of())
    assert before.optimizer_state[1] > 0
    assert after.optimizer_state[1] == (0 if reset else before.optimizer_state[1])


def test_stale_momentum_moves_the_model_without_gradients(benchmark_of):
    """With zero gradients after the switch the drift tends to lr m / (1 - m) times the old buffer."""
    lr, m = 0.1, 0.5

    class NoGradient(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 1:
                for p in strategy.model.parameters():
                    p.grad.zero_()

        def before_training_exp(self, strategy, **kwargs):
            name = "momentum_buffer"
            state = strategy.optimizer.state
            self.start = [p.detach().clone() for p in strategy.model.backbone.parameters()]
            self.buffers = [
                state[p][name].clone() if p in state else None for p in strategy.model.backbone.parameters()
            ]

    for reset in (True, False):
        plugin = NoGradient()
        strategy = naive(Net().double(), LinearProbePlugin(reset_momentum=reset), plugin, lr=lr, momentum=m, epochs=30)
        x, y = data()
        for experience in benchmark_of_double(x, y):
            strategy.train(experience, eval_streams=[])
        moved = [p.detach() - s for p, s in zip(strategy.model.backbone.parameters(), plugin.start, strict=True)]
        if reset:
            assert all(float(d.abs().max()) == 0 for d in moved)
        else:
            for d, buffer in zip(moved, plugin.buffers, strict=True):
                torch.testing.assert_close(d, -lr * m / (1 - m) * buffer, rtol=0, atol=1e-9)


@pytest.mark.parametrize("behind", [True, False])
def test_ft_lr_with_a_plugin_that_rebuilds_the_optimizer(benchmark_of, behind):
    """Wherever the two stand in the list of plugins."""
    probe, slow, rates = LinearProbePlugin(ft_lr=0.02), SlowLearnerPlugin(0.1), Snapshot()
    order = [slow, probe, rates] if behind else [probe, slow, rates]
    strategy = naive(Net(), *order, lr=0.5)
    for experience in benchmark_of((2, 2, 2)).train_stream:
        strategy.train(experience, eval_streams=[])
    assert rates.rates[0] == pytest.approx([0.05, 0.5])
    assert rates.rates[1] == rates.rates[2] == pytest.approx([0.002, 0.02])


# -------------------------------------------------------------------------- options
def rows_after(probe, benchmark, **kwargs):
    _, before, after = probed(probe, benchmark, **kwargs)
    return before.states[1], after.states[1]


def test_scope_all_clears_absent_rows(benchmark_of):
    _, new = rows_after(LinearProbePlugin(lp_scope="all"), benchmark_of())
    assert float(new["classifier.weight"][[0, 1, 4, 5]].abs().max()) == 0
    assert float(new["classifier.weight"][2:4].abs().min()) > 0


@pytest.mark.parametrize("init", ["keep", "reset", "zero"])
def test_head_init(benchmark_of, init):
    old, new = rows_after(LinearProbePlugin(head_init=init, seed=4), benchmark_of())
    rows = [0, 1, 4, 5]
    if init == "keep":
        assert torch.equal(old["classifier.weight"][rows], new["classifier.weight"][rows])
    elif init == "zero":
        assert float(new["classifier.weight"][rows].abs().max()) == 0
    else:
        assert not torch.equal(old["classifier.weight"][rows], new["classifier.weight"][rows])
        assert float(new["classifier.weight"][rows].abs().max()) <= 8**-0.5
        again = rows_after(LinearProbePlugin(head_init=init, seed=4), benchmark_of())[1]
        assert torch.equal(again["classifier.weight"], new["classifier.weight"])


def test_views_repeat_the_training_transform(benchmark_of):
    from avalanche_firn.benchmarks import digits_stream

    stream = digits_stream(tasks=5)
    model = with_taskwise_head(timm.create_model("vit_firn_32"), freeze_old=False)
    counts = []
    for views in (0, 1, 3):
        probe = LinearProbePlugin(lp_views=views, lp_first=True)
        strategy = naive(model, probe, epochs=0)
        strategy.train(stream.train[0], eval_streams=[])
        counts.append(probe.report.samples)
    assert counts == [len(stream.train[0].dataset)] * 2 + [3 * len(stream.train[0].dataset)]


class Noisy(nn.Module):
    """A random training transform, drawn from torch's global generator."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def noisy_stream():
    from avalanche.benchmarks import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from torch.utils.data import TensorDataset

    x, y = data()
    dataset = TensorDataset(x, torch.tensor(y))
    dataset.targets = [int(t) for t in y]
    whole = as_classification_dataset(dataset, transform_groups={"train": Noisy(), "eval": None})
    return class_incremental_benchmark({"train": whole}, class_order=[0, 1, 2, 3], num_classes_per_exp=[2, 2])


@pytest.mark.parametrize("views", [1, 2, "fresh"])
def test_random_views_are_private_and_repeatable(views):
    states, generators = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        solver = "sgd" if views == "fresh" else "lbfgs"
        probe = LinearProbePlugin(solver=solver, lp_views=views, seed=seed, epochs=3)
        _, _, after = probed(probe, noisy_stream())
        states.append(after.states[1]["classifier.weight"])
        generators.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert torch.equal(generators[0], generators[2])


def test_penalty_chosen_on_held_out_training_data(benchmark_of):
    grid = [1e-4, 1e-2, 1.0, 100.0]
    strategy, before, after = probed(LinearProbePlugin(l2=grid, val_fraction=0.3), benchmark_of())
    probe = next(p for p in strategy.plugins if isinstance(p, LinearProbePlugin))
    assert probe.report.l2 in grid
    model = Net()
    model.load_state_dict(before.states[1])
    features, targets = extract_features(model, benchmark_of().train_stream[1].dataset.eval())
    weight, _ = fit_linear_probe(features, targets - 2, l2=probe.report.l2)  # on all of the data, not the part
    torch.testing.assert_close(after.states[1]["classifier.weight"][2:4], weight, rtol=0, atol=1e-5)


def test_rescaled_to_the_rows_replaced(benchmark_of):
    old, new = rows_after(LinearProbePlugin(rescale_head=True), benchmark_of())
    plain = rows_after(LinearProbePlugin(), benchmark_of())[1]
    rows = slice(2, 4)
    torch.testing.assert_close(new["classifier.weight"][rows].std(), old["classifier.weight"][rows].std())
    ratio = old["classifier.weight"][rows].std() / plain["classifier.weight"][rows].std()
    torch.testing.assert_close(new["classifier.bias"][rows], plain["classifier.bias"][rows] * ratio)


def test_rescaled_by_a_temperature(benchmark_of):
    old, new = rows_after(LinearProbePlugin(solver="ridge", rescale_head="temperature"), benchmark_of())
    _, plain = rows_after(LinearProbePlugin(solver="ridge"), benchmark_of())
    model = Net()
    model.load_state_dict(old)
    features, targets = extract_features(model, benchmark_of().train_stream[1].dataset.eval())
    weight, bias = plain["classifier.weight"][2:4], plain["classifier.bias"][2:4]
    temperature = fit_temperature(features @ weight.T + bias, targets - 2)
    torch.testing.assert_close(new["classifier.weight"][2:4], weight / temperature)
    loss = F.cross_entropy(features @ weight.T + bias, targets - 2)
    better = F.cross_entropy((features @ weight.T + bias) / temperature, targets - 2)
    assert better < loss


def test_scalar_normalisation_reaches_the_solver(benchmark_of):
    _, plain = rows_after(LinearProbePlugin(l2=0.1), benchmark_of())
    old, new = rows_after(LinearProbePlugin(l2=0.1, normalize="scalar"), benchmark_of())
    model = Net()
    model.load_state_dict(old)
    features, targets = extract_features(model, benchmark_of().train_stream[1].dataset.eval())
    weight, _ = fit_linear_probe(features, targets - 2, l2=0.1, normalize="scalar")
    torch.testing.assert_close(new["classifier.weight"][2:4], weight, rtol=0, atol=1e-6)
    assert not torch.allclose(new["classifier.weight"][2:4], plain["classifier.weight"][2:4], atol=1e-3)


def test_cache_is_shared_and_never_stale(benchmark_of):
    cache = FeatureCache()
    _, _, after = probed(LinearProbePlugin(cache=cache), benchmark_of((2, 2, 2)))
    assert (cache.hits, cache.misses) == (0, 2)
    fresh = probed(LinearProbePlugin(), benchmark_of((2, 2, 2)))[2]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after.states, fresh.states, strict=True) for k in a)


def test_reads_the_data_of_the_experience_not_the_replayed(benchmark_of):
    probe = LinearProbePlugin()
    torch.manual_seed(0)
    strategy = naive(Net(), ReplayPlugin(mem_size=10), probe)
    for experience in benchmark_of().train_stream:
        strategy.train(experience, eval_streams=[])
    assert probe.report.samples == 20 and probe.report.classes == (2, 3)
