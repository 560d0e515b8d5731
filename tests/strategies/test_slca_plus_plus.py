"""SLCA++ inside Avalanche: the official stage 1 and rates, equality with Naive plus plugins, digits, resume, errors."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.models.backbones import renew_final_norm
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import FeatureClassifier, with_taskwise_head
from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy, LocalSymmetricCrossEntropy
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.plain_state import differing_state
from avalanche_firn.plugins.schedules import cosine, multistep
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin
from avalanche_firn.plugins.strategy_state import capture_strategy
from avalanche_firn.strategies import SLCAPlusPlus
from avalanche_firn.strategies import slca as slca_module

ALL = ("qkv", "fc1", "fc2")


def tiny_vit(img_size=32, patch_size=16, width=12, depth=1, dtype=torch.float32):
    torch.manual_seed(3)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=img_size, patch_size=patch_size, depth=depth, embed_dim=width, num_heads=2,
        num_classes=0,
    ).to(dtype)  # fmt: skip


def images(stream_of, sizes=(2, 3), per_class=6, **kwargs):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(sum(sizes)).repeat_interleave(per_class)
    x = torch.randn(len(y), 3, 32, 32, generator=generator) + y[:, None, None, None] / 2
    return stream_of(x, y, list(sizes), **kwargs)


def plus_plus(model=None, **kwargs):
    settings = dict(train_mb_size=5, train_epochs=2, eval_mb_size=8, evaluator=None) | kwargs
    return SLCAPlusPlus(model=tiny_vit() if model is None else model, **settings)


def train(strategy, benchmark, evaluate=True):
    for experience in benchmark.train_stream:
        torch.manual_seed(experience.current_experience)  # evaluation draws random numbers, too
        strategy.train(experience, eval_streams=[])
        if evaluate:
            strategy.eval(benchmark.test_stream)
    return strategy


def assert_equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [k for k, v in first.items() if not torch.equal(v, second[k])] == []


# ------------------------------------------------------------------ the released code's numbers
class RecordingLoss(LocalSymmetricCrossEntropy, supports_distributed=True):
    """Keeps every training loss: Avalanche's own sum is float32."""

    def __init__(self, *args):
        super().__init__(*args)
        self.values = []

    def local_loss(self, *args):
        loss = super().local_loss(*args)
        self.values.append(loss.detach())
        return loss


class Rates(SupervisedPlugin):
    """Rates per epoch in the columns of the golden tables (A, B, others, head), and the golden initial heads."""

    def __init__(self, golden=None):
        super().__init__()
        self.golden, self.rates = golden, []

    def before_training_exp(self, strategy, **kwargs):
        self.rates.append([])
        if self.golden is not None:
            start = self.golden[f"task{strategy.clock.train_exp_counter}_head_weight0"]
            with torch.no_grad():
                strategy.model.head.weights[-1].copy_(torch.from_numpy(start))

    def before_training_epoch(self, strategy, **kwargs):
        pairs, others, head = (group["lr"] for group in strategy.optimizer.param_groups)
        self.rates[-1].append([pairs, pairs, others, head])


def official(name):
    """Our name of a backbone tensor -> the released code's."""
    for ours, theirs in (
        ("attn.qkv.A.full.0", "attn.lora_A"), ("attn.qkv.B.full.0", "attn.lora_B"),
        ("mlp.fc1.A.full.0", "mlp.lora_1_A"), ("mlp.fc1.B.full.0", "mlp.lora_1_B"),
        ("mlp.fc2.A.full.0", "mlp.lora_2_A"), ("mlp.fc2.B.full.0", "mlp.lora_2_B"), (".base.", "."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def golden_value(array, name):
    return array.T if "lora_" in name else array


def golden_run(g, stream_of, targets, **overrides):
    """The strategy on the golden stream; asserts the initial state, yields after each task."""
    vit = tiny_vit(int(g["img_size"]), int(g["patch_size"]), int(g["dim"]), int(g["depth"]), torch.float64)
    start = {k[5:]: torch.from_numpy(v) for k, v in g.items() if k.startswith("init_") and "lora" not in k}
    vit.load_state_dict(start)
    rates = Rates(g)
    settings = dict(
        optimizer=torch.optim.SGD(
            vit.parameters(), lr=float(g["lr"]), momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"])
        ),
        criterion=RecordingLoss(float(g["alpha"]), float(g["beta"])), lora_rank=int(g["lora_rank"]),
        lora_scale=float(g["lora_scale"]), backbone_scale=float(g["backbone_scale"]),
        num_milestones=int(g["n_milestones"]),
    ) | overrides  # fmt: skip
    strategy = plus_plus(
        with_taskwise_head(vit).double(), lora_targets=targets, plugins=[rates], train_mb_size=int(g["batch_size"]),
        train_epochs=int(g["epochs"]), **settings,
    )  # fmt: skip
    backbone = strategy.model.backbone
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            value = golden_value(g[f"init_{official(name)}"], official(name))
            if not name.startswith("norm."):  # theirs was new as well, but not at 1 and 0; A is known up to its sign
                np.testing.assert_allclose(parameter.abs(), abs(value), rtol=0, atol=1e-10)
            parameter.copy_(torch.from_numpy(value))
    x, y = (np.concatenate([g[f"task{t}_{part}"] for t in range(2)]) for part in "xy")
    for t, experience in enumerate(stream_of(x, y, g["sizes"].tolist()).train_stream):
        settings["criterion"].values.clear()
        strategy.train(experience, eval_streams=[], shuffle=False)
        losses = torch.stack(settings["criterion"].values).view(int(g["epochs"]), -1)
        with torch.no_grad():
            features = backbone.eval()(torch.from_numpy(g[f"task{t}_x"][:4]))
        yield t, strategy, losses, rates.rates[t], features


def test_golden_stage_1_equals_the_released_code(golden, stream_of):
    g = golden("slca", "slcapp_stage1")
    close = dict(rtol=0, atol=1e-9)
    for t, strategy, losses, rates, features in golden_run(g, stream_of, ("qkv",)):
        np.testing.assert_allclose(losses, g[f"task{t}_losses"], **close)
        np.testing.assert_allclose(rates, g[f"task{t}_lrs"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(features, g[f"task{t}_features"], **close)
        trained = []
        for name, parameter in strategy.model.backbone.named_parameters():
            name = official(name)
            if parameter.requires_grad:
                trained.append(name)
                np.testing.assert_allclose(parameter.detach(), golden_value(g[f"task{t}_after_{name}"], name), **close)
            else:
                assert np.array_equal(parameter, g[f"init_{name}"])
        assert set(trained) == {name for name in g["trainable"].tolist() if "mlp.lora" not in name}
        weight, bias = strategy.model.head.weight_matrix()
        np.testing.assert_allclose(weight, g[f"task{t}_weight"], **close)
        np.testing.assert_allclose(bias, g[f"task{t}_bias"], **close)


def test_golden_stage_1_with_all_declared_targets(golden, stream_of):
    g = golden("slca", "slcapp_stage1")
    close = dict(rtol=0, atol=1e-9)
    *_, (_, strategy, losses, _, features) = golden_run(g, stream_of, ALL)
    np.testing.assert_allclose(losses, g["alltargets_losses"], **close)
    np.testing.assert_allclose(features, g["alltargets_features"], **close)
    parameters = {official(n): p.detach() for n, p in strategy.model.backbone.named_parameters() if p.requires_grad}
    assert parameters.keys() == set(g["trainable"].tolist())
    pairs = [name for name in parameters if "lora_" in name]
    assert len(pairs) == 12
    for name in pairs:
        np.testing.assert_allclose(parameters[name], golden_value(g[f"alltargets_after_{name}"], name), **close)
    weight, bias = strategy.model.head.weight_matrix()
    np.testing.assert_allclose(weight, g["alltargets_weight"], **close)
    np.testing.assert_allclose(bias, g["alltargets_bias"], **close)


@pytest.mark.parametrize(
    "wrong",
    [
        {"criterion": RecordingLoss(1.0, 0.0)}, {"lora_scale": 0.5}, {"first_task_lora_scale": 0.1},
        {"num_milestones": 2}, {"fresh_final_norm": False},
    ],
)  # fmt: skip
def test_the_golden_run_notices_wrong_settings(golden, stream_of, wrong):
    g = golden("slca", "slcapp_stage1")
    *_, (t, _, _, _, features) = golden_run(g, stream_of, ("qkv",), **wrong)
    assert abs(features.numpy() - g[f"task{t}_features"]).max() > 1e-7


@pytest.mark.parametrize(("epochs", "milestones"), [(20, 1), (50, 1), (90, 2)])
def test_learning_rate_tables_of_the_released_configurations(golden, stream_of, epochs, milestones):
    tables = {k: v for k, v in golden("slca", "lr_tables").items() if k.startswith("slcapp_") and len(v) == epochs}
    assert len(tables) == {20: 2, 50: 6, 90: 8}[epochs]
    rates = Rates()
    strategy = plus_plus(tiny_vit(width=4), num_milestones=milestones, train_epochs=epochs, plugins=[rates])
    train(strategy, images(stream_of, (1, 1), per_class=2), evaluate=False)
    for name, table in tables.items():
        np.testing.assert_allclose(rates.rates[int(name[-1])], table, rtol=0, atol=1e-12, err_msg=name)


# ------------------------------------------------------------------ composition
@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_equals_naive_with_plugins_to_the_bit(stream_of, generation):
    benchmark = images(stream_of, generation=generation)
    ours = train(plus_plus(lora_targets=ALL, alpha=0.5, beta=0.5), benchmark)
    vit = tiny_vit()
    renew_final_norm(vit)
    model = with_taskwise_head(vit)
    add_composed_lora(model, ALL, 4, scale=0.8, init="svd", split={})
    LoRAComposition(model).open_task()

    def is_pair(name, _=None):
        return ".A." in name or ".B." in name

    def is_head(name, _=None):
        return name.startswith("head.")

    for name, parameter in model.named_parameters():
        if not (is_pair(name) or is_head(name) or any(part in name for part in ("norm", "bias", "cls_token"))):
            parameter.requires_grad_(False)
    groups = [
        (is_pair, lambda task: 0.5 if task == 0 else 0.1),
        (lambda name, _: not is_pair(name) and not is_head(name), 0.1),
        (is_head, 1.0),
    ]
    naive = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        criterion=LocalSymmetricCrossEntropy(0.5, 0.5), train_mb_size=5, train_epochs=2, eval_mb_size=8, evaluator=None,
        plugins=[
            SlowLearnerPlugin(groups=groups, scheduler_factory=cosine(2, 0.01 * 0.1 * 0.1)),
            ClassifierAlignmentPlugin(scaling="feature"),
        ],
    )  # fmt: skip
    assert_equal_states(ours.model, train(naive, benchmark).model)


def test_one_open_pair_for_the_whole_stream_and_scales_for_inference(stream_of):
    strategy = train(plus_plus(), images(stream_of, (2, 1, 2)))
    lora = LoRAComposition(strategy.model)
    assert (lora.num_tasks, lora.num_closed, lora.positions) == (1, 0, ["backbone.blocks.0.attn.qkv"])
    assert strategy.model.head.input_scales.tolist() == pytest.approx([1.04, 1.02, 1.0])
    assert slca_module.SLCAPlusPlus is SLCAPlusPlus


def test_own_schedule_criterion_optimizer_and_alignment(stream_of):
    vit = tiny_vit()
    alignment, criterion = ClassifierAlignmentPlugin(epochs=0), LocalCrossEntropy()
    strategy = plus_plus(
        vit, optimizer=torch.optim.AdamW(vit.parameters(), lr=0.02), criterion=criterion, alignment=alignment,
        scheduler_factory=multistep([1]),
    )  # fmt: skip
    train(strategy, images(stream_of))
    assert type(strategy.optimizer) is torch.optim.AdamW and alignment in strategy.plugins
    assert [g["lr"] for g in strategy.optimizer.param_groups] == pytest.approx([2e-4, 2e-4, 2e-3])


@pytest.mark.parametrize(("kind", "decay", "expected"), [("SGD", 0.0, 0.0), ("SGD", 0.1, 0.1), ("AdamW", 0.3, 5e-4)])
def test_alignment_decays_as_stage_1_does(kind, decay, expected):
    vit = tiny_vit()
    strategy = plus_plus(vit, optimizer=getattr(torch.optim, kind)(vit.parameters(), lr=0.1, weight_decay=decay))
    (alignment,) = (p for p in strategy.plugins if isinstance(p, ClassifierAlignmentPlugin))
    assert (alignment.weight_decay, alignment.scaling) == (expected, "feature")


def test_backbone_scale_0_adapts_in_the_first_task_only(stream_of):
    benchmark = images(stream_of)
    strategy = plus_plus(backbone_scale=0.0)
    start = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    first = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    assert {k for k, v in first.items() if not torch.equal(v, start[k])} == {
        f"blocks.0.attn.qkv.{factor}.full.0" for factor in "AB"
    }
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    assert all(torch.equal(v, first[k]) for k, v in strategy.model.backbone.state_dict().items())


def test_layers_of_the_users_own(stream_of):
    vit = tiny_vit()
    add_composed_lora(vit, ["attn.proj"], 2, alpha=1.0)
    with pytest.raises(ValueError, match="0 closed tasks and no open one"):
        plus_plus(vit)
    lora = LoRAComposition(vit)
    lora.open_task(torch.Generator().manual_seed(0))
    strategy = train(plus_plus(vit), images(stream_of))
    assert strategy.model.backbone.blocks[0].attn.proj.B["full"][0].abs().max() > 0
    assert list(LoRAComposition(strategy.model).layers) == ["backbone.blocks.0.attn.proj"]
    lora.close_task()
    with pytest.raises(ValueError, match=r"1 closed tasks and no open one.*open_task"):
        plus_plus(vit)


def test_only_what_is_named_is_trained_and_frozen_tensors_stay_frozen():
    class Odd(nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.norm_mlp = nn.Linear(6, 8)  # a name with norm in it is trained, but not beneath a pair
            self.norm_out = nn.Linear(8, 8)
            self.last = nn.Linear(8, 8)
            self.last.bias.requires_grad_(False)

        def forward(self, x):
            return self.last(self.norm_out(self.norm_mlp(x)))

    model = plus_plus(Odd(), lora_targets="norm_mlp").model
    assert sorted(n[9:] for n, p in model.named_parameters() if p.requires_grad) == [
        "norm_mlp.A.full.0", "norm_mlp.B.full.0", "norm_mlp.base.bias", "norm_out.bias", "norm_out.weight",
    ]  # fmt: skip


# ------------------------------------------------------------------ evaluation, precision, resume
def test_periodic_and_separate_evaluations_agree(stream_of):
    class Seed(SupervisedPlugin):
        """An evaluation before the training draws random numbers, too."""

        def before_train_dataset_adaptation(self, strategy, **kwargs):
            torch.manual_seed(strategy.experience.current_experience)

    benchmark = images(stream_of)
    results, states = [], []
    for eval_every in (0, -1):
        evaluator = EvaluationPlugin(
            accuracy_metrics(stream=True), loggers=[SimpleNamespace(log_metrics=lambda m: None)]
        )
        strategy = plus_plus(eval_every=eval_every, evaluator=evaluator, plugins=[Seed()])
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[benchmark.test_stream])
            logged = evaluator.get_last_metrics()
            results.append(strategy.eval(benchmark.test_stream))
            assert eval_every == -1 or logged == results[-1]
        states.append(strategy.model)
    assert results[:2] == results[2:]
    assert_equal_states(*states)


def test_bf16_keeps_weights_and_statistics_in_float32(stream_of):
    criterion = RecordingLoss()
    strategy = plus_plus(plugins=[MixedPrecisionPlugin("bf16")], criterion=criterion)
    train(strategy, images(stream_of))
    plain = RecordingLoss()
    train(plus_plus(criterion=plain), images(stream_of))
    assert all(v.dtype == torch.float32 for v in strategy.model.state_dict().values() if v.is_floating_point())
    assert all(torch.isfinite(v).all() for v in strategy.model.state_dict().values())
    torch.testing.assert_close(torch.stack(criterion.values), torch.stack(plain.values), rtol=0, atol=0.02)
    assert not torch.equal(torch.stack(criterion.values), torch.stack(plain.values))


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_inside_a_task_resumes_to_the_bit(stream_of, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)

    class Stop(SupervisedPlugin):
        stateless = True
        at = None

        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == self.at:
                raise KeyboardInterrupt

    benchmark = images(stream_of)

    def run(folder, seed, at=None):
        torch.manual_seed(seed)
        stop, checkpoint = Stop(), ExactCheckpointPlugin(folder, every=2)
        stop.at = at
        strategy = plus_plus(plugins=[stop, checkpoint])
        for experience in benchmark.train_stream[checkpoint.resume(strategy) :]:
            if not checkpoint.is_trained(experience):
                strategy.train(experience, eval_streams=[])
            strategy.eval(benchmark.test_stream)
        state = capture_strategy(strategy)
        state["plugins"] = [p for p in state["plugins"] if "checkpoint" not in p["class"]]
        checkpoint.close()
        return state

    expected = run(tmp_path / "whole", 0)
    for seed, at in ((0, 4), (1, 11)):  # 6 iterations in the first task, 8 in the second
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", seed, at)
    assert differing_state(expected, run(tmp_path / "parts", 2)) is None


def test_two_tasks_of_digits_on_the_embedded_backbone():
    benchmark = digits_stream().benchmark
    torch.manual_seed(0)
    criterion = RecordingLoss()
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[SimpleNamespace(log_metrics=lambda m: None)])
    strategy = plus_plus(
        timm.create_model("vit_firn_32.omniglot", pretrained=True), criterion=criterion, evaluator=evaluator,
        train_mb_size=32, train_epochs=3, eval_mb_size=128,
    )  # fmt: skip
    start = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    head = strategy.model.head
    for t, experience in enumerate(benchmark.train_stream[:2]):
        criterion.values.clear()
        raw = [tensor.detach().clone() for tensor in (*head.weights, *head.biases)]
        strategy.train(experience, eval_streams=[])
        losses = torch.stack(criterion.values).view(3, -1).mean(1)
        assert losses[2] < 0.5 * losses[0]
        kept = [*head.weights[:t], *head.biases[:t]]
        assert len(kept) == 2 * t and all(map(torch.equal, kept, raw))
    changed = {k for k, v in strategy.model.backbone.state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {k for k in start if "norm" in k or "bias" in k or ".qkv.A." in k or ".qkv.B." in k} | {
        "cls_token"
    }
    for test in benchmark.test_stream[:2]:
        found = strategy.eval(test)
        (accuracy,) = (value for tag, value in found.items() if tag.startswith("Top1_Acc"))
        assert accuracy > 0.9


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_milestones": -1}, "num_milestones is -1"), ({"backbone_scale": -0.1}, "backbone_scale is -0.1"),
        ({"first_task_lora_scale": float("nan")}, "first_task_lora_scale is nan"), ({"beta": -1.0}, "beta is -1.0"),
        ({"lora_rank": 13}, "rank is 13; 1 to 12"), ({"lora_rank": 0}, "rank is 0"),
        ({"lora_scale": float("inf")}, "scale is inf"), ({"train_epochs": 0}, "epochs is 0"),
        ({"lora_targets": ("q_proj",)}, r"targets \['q_proj'\] match nothing in .*here such as \['fc1'"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        plus_plus(**settings)


def test_models_without_targets_are_refused():
    with pytest.raises(ValueError, match="match nothing"):
        plus_plus(timm.create_model("resnet10t", num_classes=3))
    with pytest.raises(ValueError, match=r"targets \['fc'\] match"):  # a classifier is replaced before, not adapted
        plus_plus(timm.create_model("resnet10t", num_classes=3), lora_targets=("fc",))
    with pytest.raises(ValueError, match="match nothing"):
        plus_plus(FeatureClassifier(nn.Flatten(), nn.Linear(3072, 5)), feature_size=5)
