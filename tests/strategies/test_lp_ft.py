"""LP-FT as a whole: golden trajectory, equality with its plugins on Naive, and what it must leave alone."""

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F

from avalanche_firn.models import with_taskwise_head
from avalanche_firn.models.linear_probe import fit_least_squares
from avalanche_firn.plugins import ClassifierAlignmentPlugin, FreshOptimizerPlugin, LinearProbePlugin, cosine
from avalanche_firn.strategies import LPFT, SLCA


class Small(nn.Module):
    """The golden files' network; dropout and a second normalisation without affine parameters on request."""

    def __init__(self, inputs=6, width=8, classes=4, dropout=0.0, affine=True):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width, affine=affine), nn.Tanh(), nn.Dropout(dropout)
        )
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.backbone(x))


class Recorder(SupervisedPlugin):
    """Losses, and copies of the model after the probe and at the end of each experience."""

    def __init__(self):
        super().__init__()
        self.losses, self.probed, self.trained = [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.losses.append([])
        self.probed.append({k: v.clone() for k, v in strategy.model.state_dict().items()})

    def after_training_iteration(self, strategy, **kwargs):
        self.losses[-1].append(strategy.loss.item())

    def after_training_exp(self, strategy, **kwargs):
        self.trained.append({k: v.clone() for k, v in strategy.model.state_dict().items()})


def quiet():
    return EvaluationPlugin(loggers=[])


def data(seed=0, classes=4, per_class=12, inputs=6, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), per_class)
    centres = rng.normal(size=(classes, inputs)) * 2
    return torch.tensor(centres[y] + rng.normal(size=(len(y), inputs)), dtype=dtype), y


def settings(model, epochs=2, lr=0.05, **more):
    return {
        "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3),
        "train_mb_size": 8, "train_epochs": epochs, "eval_mb_size": 16, "evaluator": quiet(), **more,
    }  # fmt: skip


def train(strategy, benchmark, seed=0):
    for experience in benchmark.train_stream:
        torch.manual_seed(seed + experience.current_experience)
        strategy.train(experience, eval_streams=[])
    return {k: v.clone() for k, v in strategy.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------ golden
@pytest.mark.filterwarnings("ignore:No loggers")
@pytest.mark.parametrize("as_plugins", [False, True])
def test_golden_trajectory(golden, stream_of, as_plugins):
    g = golden("lp_ft", "trajectory_class_incremental")
    model = Small().double()
    model.load_state_dict({k[5:]: torch.from_numpy(v) for k, v in g.items() if k.startswith("init/")})
    benchmark = stream_of(np.concatenate([g["x_0"], g["x_1"]]), np.concatenate([g["y_0"], g["y_1"]]), [2, 2])
    probe = LinearProbePlugin(
        l2=float(g["l2"]), lp_scope=str(g["lp_scope"]), ft_bn=str(g["ft_bn"]), reset_momentum=bool(g["reset_momentum"])
    )
    record = Recorder()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=float(g["lr"]), momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"])
    )
    common = dict(model=model, optimizer=optimizer, train_mb_size=40, eval_mb_size=64, evaluator=quiet())
    if as_plugins:  # one optimizer for the whole stream, Avalanche's own
        strategy = Naive(**common, criterion=nn.CrossEntropyLoss(), plugins=[probe, record])
    else:
        strategy = LPFT(**common, linear_probe=probe, plugins=[record])
    for experience, epochs in zip(benchmark.train_stream, (g["epochs_task0"], g["epochs_task1"]), strict=True):
        strategy.train_epochs = int(epochs)
        strategy.train(experience, eval_streams=[])

    for name, states in (("after_task0", record.trained[0]), ("after_task1", record.trained[1])):
        for key, value in states.items():
            np.testing.assert_allclose(value, g[f"{name}/{key}"], rtol=0, atol=1e-10, err_msg=f"{name} {key}")
    for key, value in record.probed[1].items():
        np.testing.assert_allclose(value, g[f"after_lp_task1/{key}"], rtol=0, atol=1e-10, err_msg=key)
    np.testing.assert_allclose(record.losses[0], g["loss_task0"], atol=1e-6)  # strategy.loss is float32
    np.testing.assert_allclose(record.losses[1], g["loss_task1"], atol=1e-6)
    assert probe.report.loss == pytest.approx(float(g["lp_loss_current_rows"]), abs=1e-7)
    # where fine-tuning starts is the loss of the probe over all rows
    assert probe.report.loss_all_rows == pytest.approx(record.losses[1][0], abs=1e-6)  # the report is float32
    for task in (0, 1):
        x = torch.from_numpy(g[f"x_{task}"])
        np.testing.assert_allclose(model.eval()(x).detach(), g[f"final_logits_task{task}"], atol=1e-9)


# --------------------------------------------------------------------- equalities
@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_equals_naive_with_plugins(stream_of, generation):
    x, y = data(dtype=torch.float32)
    benchmark = stream_of(x, y, [2, 2], generation=generation)
    results = []
    for build in ("strategy", "plugins"):
        torch.manual_seed(1)
        model = Small(dropout=0.3)
        plugins = [LinearProbePlugin(seed=3), FreshOptimizerPlugin(scheduler_factory=cosine(2))]
        if build == "strategy":
            strategy = LPFT(**settings(model), linear_probe=plugins[0], scheduler_factory=cosine(2))
        else:
            strategy = Naive(**settings(model, criterion=nn.CrossEntropyLoss(), plugins=plugins))
        results.append(train(strategy, benchmark))
    same(*results)


def test_without_probe_is_naive_to_the_bit(stream_of):
    x, y = data(dtype=torch.float32)
    benchmark = stream_of(x, y, [2, 2])
    results = []
    for probe in (None, LinearProbePlugin(enabled=False)):
        torch.manual_seed(1)
        model = Small(dropout=0.3)
        if probe is None:
            strategy = Naive(**settings(model, criterion=nn.CrossEntropyLoss(), plugins=[FreshOptimizerPlugin()]))
        else:
            strategy = LPFT(**settings(model), linear_probe=probe)
        results.append(train(strategy, benchmark))
        results.append({"rng": torch.get_rng_state()})
    same(results[0], results[2])
    same(results[1], results[3])


def test_probe_draws_nothing_from_the_global_generators(stream_of):
    """The first experience, which is not probed by default, is the same whether or not the second is; and the order of
    the data of a probed experience is that of one without a probe."""
    x, y = data(dtype=torch.float32)
    benchmark = stream_of(x, y, [2, 2])
    states = []
    for probe in (LinearProbePlugin(lp_first=True, solver="sgd"), LinearProbePlugin(enabled=False)):
        torch.manual_seed(1)
        strategy = LPFT(**settings(Small()), linear_probe=probe)
        train(strategy, benchmark)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_train_of_a_stream_is_one_train_per_experience(stream_of):
    x, y = data(dtype=torch.float32)
    benchmark = stream_of(x, y, [2, 1, 1])
    results = []
    for whole in (False, True):
        torch.manual_seed(1)
        strategy = LPFT(**settings(Small()))
        torch.manual_seed(2)
        if whole:
            strategy.train(benchmark.train_stream, eval_streams=[])
        else:
            for experience in benchmark.train_stream:
                strategy.train(experience, eval_streams=[])
        results.append(strategy.model.state_dict())
    same(*results)


def test_no_epochs_is_a_pure_probe(stream_of):
    x, y = data(dtype=torch.float32)
    benchmark = stream_of(x, y, [2, 2])
    torch.manual_seed(1)
    model = Small()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    strategy = LPFT(**settings(model, epochs=0), linear_probe=LinearProbePlugin(lp_first=True))
    train(strategy, benchmark)
    same(before, dict(model.backbone.state_dict()))
    model.eval()
    predicted = model(x)[:, 2:].argmax(1) + 2
    assert (predicted[y >= 2] == torch.tensor(y[y >= 2])).float().mean() > 0.9


def test_models_without_a_classifier_get_a_growing_one(stream_of):
    x, y = data(dtype=torch.float32)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    strategy = LPFT(**{**settings(body), "model": body, "feature_size": 8})
    train(strategy, stream_of(x, y, [2, 2]))
    head = strategy.model.head
    assert head.known_classes == (0, 1, 2, 3)
    assert all(w.requires_grad for w in head.weights)  # no layer is frozen


def test_reset_momentum_false_keeps_one_optimizer(stream_of):
    x, y = data(dtype=torch.float32)
    with pytest.raises(ValueError, match="scheduler_factory is given with reset_momentum=False"):
        LPFT(**settings(Small()), linear_probe=LinearProbePlugin(reset_momentum=False), scheduler_factory=cosine(2))
    strategy = LPFT(**settings(Small()), linear_probe=LinearProbePlugin(reset_momentum=False))
    optimizer = strategy.optimizer
    train(strategy, stream_of(x, y, [2, 2]))
    assert strategy.optimizer is optimizer


# --------------------------------------------------- zero loss, no movement (2202.10054)
class _OneHotSquares(nn.Module):
    """Mean over samples of half the squared distance to the one-hot target."""

    def forward(self, logits, targets):
        return 0.5 * (logits - F.one_hot(targets, logits.shape[1])).square().sum(1).mean()


@pytest.mark.parametrize("probed", [True, False])
def test_exact_probe_of_a_realisable_problem_leaves_the_backbone(stream_of, probed):
    x, y = data(classes=2, per_class=10, inputs=6)
    torch.manual_seed(0)
    model = Small(inputs=6, width=40, classes=2).double()  # more features than samples: the probe fits exactly
    torch.nn.init.normal_(model.backbone[0].weight)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.eval()
    benchmark = stream_of(x, y, [2])
    before = model.backbone[0].weight.detach().clone()
    strategy = LPFT(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=_OneHotSquares(),
        linear_probe=LinearProbePlugin(solver="ridge", l2=0.0, lp_first=True, enabled=probed, ft_bn="eval"),
        train_mb_size=20, train_epochs=200, eval_mb_size=20, evaluator=quiet(),
    )  # fmt: skip
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    moved = float((model.backbone[0].weight.detach() - before).norm() / before.norm())
    assert moved < 1e-10 if probed else moved > 1e-2


def test_golden_realisable_squares(golden):
    """The corollary with the golden arrays: the exact head moves nothing, the random one moves the backbone."""
    g = {k: torch.from_numpy(v) if v.ndim else v for k, v in golden("lp_ft", "realisable_mse").items()}
    head, bias = fit_least_squares(g["x"] @ g["backbone"].T, g["y"], bias=False)
    torch.testing.assert_close(head, g["head_lp"], rtol=0, atol=1e-9)
    assert float(bias.abs().max()) == 0
    for start, name in ((head, "lpft"), (g["head_random"], "ft")):
        body, top = g["backbone"].clone().requires_grad_(True), start.clone().requires_grad_(True)
        optimizer = torch.optim.SGD([body, top], lr=float(g["lr"]))
        losses = []
        for _ in range(int(g["steps"])):
            loss = (g["x"] @ body.T @ top.T - g["y"]).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved = float((body.detach() - g["backbone"]).norm() / g["backbone"].norm())
        torch.testing.assert_close(body.detach(), g[f"{name}_backbone"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(losses, g[f"{name}_losses"], rtol=0, atol=1e-9)
        assert moved < 1e-12 if name == "lpft" else moved > 0.1


# ------------------------------------------------------------------- composition
def test_before_slca(stream_of):
    x, y = data(dtype=torch.float32)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    probe = LinearProbePlugin(ft_lr=0.01)
    strategy = SLCA(
        model=with_taskwise_head(body, feature_size=8), plugins=[probe], train_mb_size=8, train_epochs=2,
        alignment=ClassifierAlignmentPlugin(samples_per_class=16), eval_mb_size=32, evaluator=quiet(),
    )  # fmt: skip
    benchmark = stream_of(x, y, [2, 2])
    rates = []

    class Rates(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            rates.append({g["name"]: g["lr"] for g in strategy.optimizer.param_groups})

    strategy.plugins.insert(0, Rates())
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
    assert probe.report.classes == (2, 3) and probe.report.accuracy > 0.8
    assert rates[0]["head"] == 0.01 and rates[-1] == pytest.approx({"backbone": 1e-4, "head": 0.01})


def test_drift_of_the_first_probed_task_is_smaller_on_average(stream_of):
    """Five seeds: features of task 0 move less with a probe before task 1 than without, at equal rates."""
    moved = {True: [], False: []}
    for seed in range(5):
        x, y = data(seed=seed, per_class=30, dtype=torch.float32)
        benchmark = stream_of(x, y, [2, 2])
        for probed in moved:
            torch.manual_seed(seed)
            model = Small(width=16)
            record = Recorder()
            strategy = LPFT(
                **settings(model, epochs=5, lr=0.02, plugins=[record]), linear_probe=LinearProbePlugin(enabled=probed)
            )
            train(strategy, benchmark, seed)
            first = torch.as_tensor(x[y < 2])
            features = []
            for state in record.trained:
                model.load_state_dict(state)
                features.append(model.eval().backbone(first))
            moved[probed].append(float((features[1] - features[0]).norm() / features[0].norm()))
    assert np.mean(moved[True]) < 0.8 * np.mean(moved[False])


def test_growing_classifier(stream_of):
    x, y = data(dtype=torch.float32)
    model = Small()
    model.classifier = IncrementalClassifier(8, 2)
    probe = LinearProbePlugin(lp_first=True)
    strategy = LPFT(**settings(model), linear_probe=probe)
    benchmark = stream_of(x, y, [2, 1, 1])
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)  # grows the classifier for classes to come
        assert probe.report.classes == tuple(sorted(experience.classes_in_this_experience))
    assert model.classifier.classifier.out_features == 4
