"""Each guard against numbers that aren't finite fires when the thing that it guards is broken, and says what broke.

A plugin breaks one number at one place of a run. The message must name that place, the newest checkpoint must be one
from before it, and a run resumed from there without the fault must end as one that never had it, to the bit.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from avalanche.training.plugins import EWCPlugin, SupervisedPlugin
from avalanche.training.supervised import StreamingLDA
from avalanche.training.templates.base_sgd import PeriodicEval
from safetensors.torch import load_file
from torch import nn

sys.path.append(str(Path(__file__).parent))

import tiny_cases
from tiny_cases import A, B, Tiny, assert_equal, build, run, state, stream_of_labels

from avalanche_firn.evaluation.device_metrics import DeviceAccuracy, DeviceLoss
from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.methods import METHODS
from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins import (
    ExactCheckpointPlugin,
    FiniteGuardPlugin,
    GradientAccumulationPlugin,
    MixedPrecisionPlugin,
    ZappingPlugin,
)
from avalanche_firn.plugins import finite_guard as guard_module
from avalanche_firn.plugins.checkpoint_files import checkpoints
from avalanche_firn.plugins.class_statistics import ClassGaussians
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference
from avalanche_firn.plugins.run_errors import NonFiniteError
from avalanche_firn.strategies.zapping import ASB, MetaASB

pytestmark = pytest.mark.filterwarnings("ignore")
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def stream():
    return stream_of_labels([A, B], [A, B])


class Break(SupervisedPlugin):
    """Calls ``change(strategy)`` at one event of one iteration of one experience; with None it only stands there."""

    stateless = True

    def __init__(self, change, *, event="before_backward", experience=1, iteration=2):
        super().__init__()
        self.change, self.place = change, (experience, iteration)
        self.losses = {}
        setattr(self, event, self._act)

    def _act(self, strategy, **kwargs):
        clock = strategy.clock
        if self.change is not None and (clock.train_exp_counter, clock.train_exp_iterations) == self.place:
            self.change(strategy)

    def after_training_iteration(self, strategy, **kwargs):
        clock = strategy.clock
        self.losses[clock.train_exp_counter, clock.train_exp_iterations] = float(strategy.loss.mean())


def spoil_loss(strategy):
    strategy.loss = strategy.loss * NAN


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, INF)


def spoil_gradient(strategy):
    """A loss that grows by 0, with an infinite gradient for one bias."""
    bias = dict(strategy.model.named_parameters())["backbone.mix.bias"]
    strategy.loss = strategy.loss + 0 * _InfiniteGradient.apply(bias).sum()


def fill(name, value, place=0):
    def change(strategy):
        tensors = {**dict(strategy.model.named_parameters()), **dict(strategy.model.named_buffers())}
        tensors[name].data.view(-1)[place] = value

    return change


def stopped(strategy, stream, pattern, *, method="naive"):
    """The message of the NonFiniteError that a run ends with; it holds the pattern."""
    with pytest.raises(NonFiniteError) as caught:
        run(strategy, stream, method=method)
    message = str(caught.value)
    assert re.search(pattern, message), f"{pattern}\n{message}"
    return message


# ------------------------------------------------------------------ the loop
WORDS = {
    "loss": r"epoch [01], iteration 2 \(counted from 0\): the loss is nan; it was {loss:.4g} in iteration 1\.",
    "gradient": r"epoch 1, iteration 2 \(counted from 0\): the gradient of 1 of \d+ parameters isn't finite "
    r"\(backbone.mix.bias\), the loss is \d",
    "weight": r"epoch 1, iteration 3 \(counted from 0\): the loss is nan; it was \d\.\d+ in iteration 2",
    "buffer": r"by iteration 3 \(counted from 0\): buffer backbone.norm.running_var isn't finite, while losses and "
    "gradients were finite",
}
FAULTS = {
    "loss": (spoil_loss, "before_backward"),
    "gradient": (spoil_gradient, "before_backward"),
    "weight": (fill("backbone.conv.bias", NAN), "after_update"),
    "buffer": (fill("backbone.norm.running_var", INF), "after_update"),
}


@pytest.mark.parametrize(
    ("fault", "method"),
    [*((fault, method) for fault in FAULTS for method in ("naive", "slca")), ("loss", "lorac_ipc"), ("loss", "co2l")],
)
def test_the_loop_stops_and_resumes_from_before_the_fault(stream, tmp_path, fault, method):
    def made(folder, broken):
        checkpoint = ExactCheckpointPlugin(folder, every=2)
        breaker = Break(FAULTS[fault][0] if broken else None, event=FAULTS[fault][1])
        return build(method, breaker, checkpoint), checkpoint, breaker

    whole, checkpoint, _ = made(tmp_path / "whole", False)
    checkpoint.resume(whole)
    run(whole, stream, method=method)
    checkpoint.close()
    strategy, checkpoint, breaker = made(tmp_path / "broken", True)
    assert checkpoint.resume(strategy) == 0
    message = stopped(strategy, stream, r"^experience 1 \(classes 2, 3\), (epoch|by iteration)", method=method)
    checkpoint.close()
    assert re.search(WORDS[fault].format(loss=breaker.losses[1, 1]), message), message
    rates = {"slca": r"0.0001 \(backbone\), 0.01 \(head\)", "naive": r"0.01 \(model\)"}.get(method, r"[\d.e-]+ \(")
    assert re.search(rf" Learning rate {rates}.*, precision fp32\. A smaller learning rate, clipped gradients", message)
    newest = checkpoints(tmp_path / "broken")[0]
    assert newest.name == "step-000000006" and message.endswith(f"The last checkpoint is kept: {newest}.")
    tensors = [t for file in newest.glob("*.safetensors") for t in load_file(file).values() if t.is_floating_point()]
    assert tensors and all(bool(t.isfinite().all()) for t in tensors)

    mended, checkpoint, _ = made(tmp_path / "broken", False)
    assert checkpoint.resume(mended) == 1
    run(mended, stream, 1, method=method)
    checkpoint.close()
    assert_equal(state(mended), state(whole))


@pytest.mark.parametrize("method", ["slca", "cila", "der"])
def test_the_guard_changes_no_bit(stream, method):
    found = []
    for guard in (False, True):
        strategy = build(method, guard=guard)
        run(strategy, stream, method=method)
        found.append(state(strategy))
    assert_equal(*found)


@pytest.mark.parametrize(("every", "read"), [(1, 1), (2, 1), (100, 2)])
def test_what_was_first_is_told_whenever_it_is_read(stream, every, read):
    strategy = build("naive", Break(spoil_loss, experience=0, iteration=1), guard=False)
    strategy.plugins.insert(0, FiniteGuardPlugin(every=every))
    words = r"^experience 0 \(classes 0, 1\), epoch 0, iteration 1 .*the loss is nan; it was 0\.\d+ in iteration 0"
    stopped(strategy, stream, words)
    assert strategy.clock.train_exp_iterations == read


def test_images_that_are_not_finite_are_mentioned(stream):
    def change(strategy):
        strategy.mbatch[0] = strategy.mb_x / 0

    strategy = build("naive", Break(change, event="before_forward"), guard=False)
    strategy.plugins.insert(0, FiniteGuardPlugin(every=1))
    stopped(strategy, stream, r"iteration 2 .*the loss is nan.*; the images of its batch are not finite\.")


def test_accumulated_gradients_are_those_of_the_group(stream):
    """The infinity enters with the first of two mini-batches, and is there when the group is complete."""
    strategy = build("naive", Break(spoil_gradient), performance={"accumulate": 2})
    assert any(isinstance(plugin, GradientAccumulationPlugin) for plugin in strategy.plugins)
    stopped(
        strategy, stream, r"epoch 0, iteration 3 .*the gradient of 1 of 10 parameters isn't finite \(backbone.mix.b"
    )


def test_clipping_does_not_blur_which_gradient_it_was(stream):
    class Clip(SupervisedPlugin):
        stateless = True

        def before_update(self, strategy, **kwargs):
            nn.utils.clip_grad_norm_(strategy.model.parameters(), 1.0)

    for place in (2, 3):  # in the middle of an epoch, and in its last iteration, whose gradients are still there
        strategy = build("naive", Break(spoil_gradient, iteration=place), Clip())
        stopped(strategy, stream, rf"iteration {place} .*the gradient of 1 of 10 parameters isn't finite \(backbone.m")


@pytest.mark.parametrize("every", [1, 100])
def test_values_that_were_clipped_had_no_end_all_the_same(stream, every):
    """When it is read makes no difference: afterwards all gradients are finite."""

    class Clip(SupervisedPlugin):
        stateless = True

        def before_update(self, strategy, **kwargs):
            nn.utils.clip_grad_value_(strategy.model.parameters(), 1.0)

    for place in (2, 3):
        strategy = build("naive", Break(spoil_gradient, iteration=place), Clip(), guard=False)
        strategy.plugins.insert(0, FiniteGuardPlugin(every=every))
        stopped(strategy, stream, rf"iteration {place} .*the gradient of 1 of 10 parameters isn't finite \(backbone.m")


def test_a_sum_of_halves_does_not_leave_the_range_of_halves():
    sums = guard_module._sums([torch.full((100,), 6e4, dtype=torch.float16)])
    assert bool(sums[0].isfinite())
    if torch.cuda.is_available():
        mixed = [torch.full((100,), 6e4, dtype=d, device="cuda") for d in (torch.float16, torch.float32)]
        assert all(bool(s.isfinite()) for s in guard_module._sums(mixed))
        mixed.append(torch.full((2,), 1e300, dtype=torch.float64, device="cuda"))
        assert all(bool(s.isfinite()) for s in guard_module._sums(mixed))


def test_the_last_group_of_an_epoch_may_be_smaller():
    """Three mini-batches in groups of two: the third is a group of its own."""
    labels = [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    strategy = build("naive", Break(spoil_gradient), performance={"accumulate": 2})
    words = r"epoch 0, iteration 2 .*the gradient of 1 of 10 parameters isn't finite \(backbone.mix.b"
    stopped(strategy, stream_of_labels(labels, labels), words)


def test_an_evaluation_inside_an_epoch_is_not_blamed(stream):
    strategy = build("naive", Break(spoil_loss, experience=0, iteration=1))
    strategy.plugins.append(PeriodicEval(eval_every=1, peval_mode="iteration", do_initial=False))
    with pytest.raises(NonFiniteError, match=r"^experience 0 .*, epoch 0, iteration 1 .*: the loss is nan; it was 0\."):
        strategy.train(stream.train[0], eval_streams=[stream.test])


def test_what_plugins_do_after_the_last_epoch(stream):
    spoil = fill("backbone.mix.bias", NAN)
    strategy = build("naive", Break(spoil, event="after_training_epoch", iteration=4))
    stopped(strategy, stream, r"^experience 1 .*, after its training .*: weight backbone\.mix\.bias isn't finite\.")


class Masked(Tiny):
    """With the usual causal mask in front of the last layer, and a range that is observed."""

    def __init__(self, maps=4):
        super().__init__(maps)
        self.register_buffer("mask", torch.full((4, 4), -INF).triu_(1), persistent=False)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        rows = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.mix(self.attention(rows, rows, rows, attn_mask=self.mask)[0].flatten(1))


def test_buffers_that_are_infinite_by_design(monkeypatch, stream, tmp_path):
    monkeypatch.setattr(tiny_cases, "Tiny", Masked)
    checkpoint = ExactCheckpointPlugin(tmp_path, every=2)
    strategy = build("naive", checkpoint)
    checkpoint.resume(strategy)
    run(strategy, stream)
    for value in (INF, NAN):  # it is watched from where it isn't what it was
        strategy = build("naive", Break(fill("backbone.mask", value), event="after_update", iteration=3))
        stopped(strategy, stream, r"by iteration 3 .*: buffer backbone\.mask isn't finite, while losses and gradients")
    strategy = build("naive")
    fill("backbone.norm.running_var", INF)(strategy)
    words = r"^experience 0 .*, before its first iteration .*: buffer backbone\.norm\.running_var isn't finite"
    stopped(strategy, stream, words)


def test_a_strategy_without_an_optimizer(stream):
    def made(*plugins):
        body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        settings = dict(input_size=16, num_classes=4, output_layer_name=None, evaluator=None, plugins=list(plugins))
        loss = nn.CrossEntropyLoss()
        return StreamingLDA(
            slda_model=body, criterion=loss, train_epochs=1, train_mb_size=4, eval_mb_size=4, **settings
        )

    strategy = made(FiniteGuardPlugin())
    run(strategy, stream)
    strategy = made(FiniteGuardPlugin())
    next(strategy.model.parameters()).data[0] = NAN
    words = r"^experience 0 .*, before its first iteration .*: weight .* isn't finite\. Precision fp32\."
    stopped(strategy, stream, words)


def test_loss_scaling_may_meet_infinite_gradients_but_no_loss(stream):
    scaled = MixedPrecisionPlugin("fp16", init_scale=8.0)
    strategy = build("naive", Break(spoil_gradient), guard=False)
    strategy.plugins[:0] = [FiniteGuardPlugin(every=1), scaled]
    run(strategy, stream)
    assert float(scaled.scaler.get_scale()) == 4.0  # the step was left out
    strategy = build("naive", Break(spoil_loss), guard=False)
    strategy.plugins[:0] = [FiniteGuardPlugin(every=1), MixedPrecisionPlugin("fp16", init_scale=8.0)]
    stopped(strategy, stream, r"epoch 1, iteration 2 .*the loss is nan.*precision fp16")


def test_moments_of_the_optimizer_are_watched(stream):
    def change(strategy):
        bias = dict(strategy.model.named_parameters())["backbone.mix.bias"]
        strategy.loss = strategy.loss + (bias - bias.detach()).sum() * 1e25

    strategy = build("naive", Break(change), training={"optimizer": {"name": "adam", "lr": 0.01, "momentum": None}})
    words = r"by iteration 3 .*: the optimizer's exp_avg_sq of backbone.mix.bias isn't finite, while losses and grad"
    stopped(strategy, stream, words)


def test_weights_to_start_from_must_be_finite(stream, tmp_path):
    strategy = build("naive")
    fill("backbone.conv.weight", NAN)(strategy)
    words = r": weight backbone\.conv\.weight isn't finite\."
    stopped(strategy, stream, rf"^experience 0 .*, before its first iteration .*{words}")
    checkpoint = ExactCheckpointPlugin(tmp_path)
    strategy = build("naive", checkpoint)
    fill("backbone.conv.weight", NAN)(strategy)
    with pytest.raises(NonFiniteError, match=rf"^between experiences, .*{words}.* No checkpoint was made yet\.$"):
        checkpoint.resume(strategy)
    assert checkpoints(tmp_path) == []


def test_finite_numbers_whose_sum_is_not_are_no_fault(stream):
    strategy = build("naive")
    for place in (0, 1):
        fill("backbone.mix.weight", 3e38, place)(strategy)
    assert not bool(strategy.model.backbone.mix.weight.sum().isfinite())
    FiniteGuardPlugin().before_checkpoint(strategy)
    fill("backbone.mix.weight", INF, 2)(strategy)
    with pytest.raises(NonFiniteError, match=r"weight backbone\.mix\.weight isn't finite"):
        FiniteGuardPlugin().before_checkpoint(strategy)


def test_settings_of_the_guard():
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"every is {wrong!r}; a whole number of 1 and above is accepted"):
            FiniteGuardPlugin(every=wrong)


# -------------------------------------------------------- features and statistics
class Poisoned(nn.Module):
    """Features of some images are others, in evaluation mode and once more than ``after`` experiences have begun."""

    num_features = 12

    def __init__(self, images, after, replace):
        super().__init__()
        self.body, self.begun, self.after = Tiny(), 0, after
        self.images, self.replace = images, replace

    def forward(self, x):
        features = self.body(x)
        if self.training or self.begun <= self.after:
            return features
        mine = (x[:, None] == self.images).flatten(2).all(2).any(1)
        return torch.where(mine[:, None], self.replace(features), features)


class Begin(SupervisedPlugin):
    """Tells the backbone how many experiences have begun."""

    stateless = True

    def before_train_dataset_adaptation(self, strategy, **kwargs):
        strategy.model.backbone.begun += 1


def poisoned(monkeypatch, method, stream, replace=lambda f: f * NAN, experience=1, class_id=3, **more):
    """A strategy whose backbone gives other features for a class, from an experience on."""
    data = stream.train[experience].dataset
    images = torch.stack([data[i][0] for i in range(len(data)) if int(data[i][1]) == class_id])
    monkeypatch.setattr(tiny_cases, "Tiny", lambda maps: Poisoned(images, experience, replace))
    strategy = build(method, **more)
    strategy.plugins.insert(0, Begin())
    return strategy


STATISTICS = {
    "slca": r"the statistics for classifier alignment: features of class 3: not finite",
    "slca_plus_plus": r"the statistics for classifier alignment: features of class 3: not finite",
    "lorac_ipc": r"the statistics for classifier alignment: features of class 3: not finite",
    "lp_ft": r"the linear probe: the features of class 3 \(4 of 4 samples\): not finite .*another solver",
    "co2l": r"the classifier stage: the features of class 3 \(4 of 4 samples\): not finite",
    "der": r"the stored logits of DER: those of class 3 aren't finite",
    "scr": r"the class means of SCR: the features of class 3 aren't finite",
}


@pytest.mark.parametrize("method", STATISTICS)
def test_features_of_one_class(monkeypatch, stream, method):
    more = {"classifier": {"epochs": 1, "views": "evaluation"}} if method == "co2l" else {}
    strategy = poisoned(monkeypatch, method, stream, **more)
    stopped(strategy, stream, rf"^experience 1 \(classes 2, 3\), {STATISTICS[method]}", method=method)


def test_features_for_task_inference(monkeypatch, stream):
    strategy = poisoned(monkeypatch, "lorac_ipc", stream, alignment=None)
    words = r"^experience 1 \(classes 2, 3\), the statistics for task inference: features of class 3: not finite"
    stopped(strategy, stream, words)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (lambda: ClassGaussians(dtype=torch.float32), 1e40),
        (lambda: ClusterGaussians(1), 1e25),
        (lambda: ClusterGaussians(1), 1e200),
        (lambda: MahalanobisTaskInference(1, normalize=False), 1e200),
    ],
)
def test_a_covariance_that_overflows(made, size):
    statistics = made()
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (rows * size).to(torch.float32 if size == 1e25 else torch.float64)
    task = (0,) if isinstance(statistics, MahalanobisTaskInference) else ()
    with pytest.raises(
        NonFiniteValues, match=r"^class 3: the (statistics overflow|covariance of a cluster overflows) t"
    ):
        statistics.add(3, rows, *task)
    with pytest.raises(NonFiniteValues, match=r"^features of class 3: not finite"):
        statistics.add(3, rows * INF, *task)
    assert len(statistics) == 0


def test_a_covariance_that_overflows_in_a_run(monkeypatch, stream):
    words = r"^experience 1 \(classes 2, 3\), the statistics for classifier alignment: class 3: the statistics overflow"
    more = {"alignment": {"epochs": 1, "samples_per_class": 8, "clusters": 1}}
    strategy = poisoned(monkeypatch, "lorac_ipc", stream, lambda f: f * 1e25, **more)
    stopped(strategy, stream, words)


def test_alignment_that_diverges(stream):
    strategy = build("slca", alignment={"epochs": 2, "samples_per_class": 8, "lr": 1e30})
    stopped(strategy, stream, r"classifier alignment after task 1 \(classes 2, 3\): alignment epoch [01]: mean loss ")


def test_importance_of_matrices(stream):
    def change(strategy):
        plugin = next(p for p in strategy.plugins if type(p).__name__ == "ImportantParameterPlugin")
        plugin._step["backbone.mix"] = plugin._step["backbone.mix"] * NAN

    strategy = build("lorac_ipc", Break(change, event="after_backward", experience=0, iteration=3))
    words = r"^experience 0 .*, the importance of matrices: that of 1 of 1 isn't finite \(backbone\.mix\)\. A smaller"
    stopped(strategy, stream, words)


def test_importances_of_ewc(monkeypatch, stream):
    measure = EWCPlugin.compute_importances

    def spoiled(*arguments, **more):
        found = measure(*arguments, **more)
        found["backbone.conv.bias"].data[1] = INF
        return found

    monkeypatch.setattr(EWCPlugin, "compute_importances", spoiled)
    words = r"^experience 0 .*, the importances of EWC: that of 1 of 8 parameters isn't finite \(backbone.conv.bias\)"
    stopped(build("ewc"), stream, words)


def test_a_probe_that_diverges(stream):
    strategy = build("lp_ft", linear_probe={"solver": "sgd", "lr": 1e200, "epochs": 2})
    words = r"^experience 1 .*, the linear probe: the linear probe diverged: lower lr \(1e\+200\)"
    stopped(strategy, stream, words, method="lp_ft")


def test_a_classifier_stage_that_diverges(stream):
    strategy = build("co2l", classifier={"epochs": 3, "lr": 1e38, "weight_decay": 10.0})
    words = r"^experience 0 .*, the classifier stage: its loss became (nan|inf) with lr 1e\+38, while the features are"
    stopped(strategy, stream, words)


@pytest.mark.parametrize("kind", [ASB, MetaASB])
def test_a_sequence_of_images(stream, kind):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU())
    body.num_features = 6

    def made():
        model = with_taskwise_head(body, freeze_old=False)
        settings = dict(inner_lr=1e30, outer_lr=0.01, episodes=4, inner_steps=3, remember_size=4, seed=0)
        return kind(model=model, evaluator=None, **settings)

    words = r"In iteration 0, the loss of step [12] of the sequence of class [01] isn't finite \(inner_lr 1e\+30\)\."
    strategy = made()
    with pytest.raises(NonFiniteError, match=rf"^experience 0 .*, epoch 0: {words}"):
        strategy.train(stream.train[0])
    body[1].reset_parameters()
    strategy = made()
    strategy.plugins.insert(0, FiniteGuardPlugin())
    with pytest.raises(NonFiniteError, match=rf"^experience 0 .*epoch 0, iteration 0 .*the loss is nan.* {words}"):
        strategy.train(stream.train[0])


@pytest.mark.parametrize("guard", [True, False])
def test_relearning_after_a_zap(stream, guard):
    zaps = ZappingPlugin(schedule="experience", scope="experience", relearn_steps=4, seed=0)
    strategy = build("naive", zaps, training={"optimizer": {"lr": 1e30}}, guard=guard)
    start = r"epoch 0, iteration 0 .*the loss is nan.* " if guard else "epoch 0: "
    words = r"In iteration 0, the loss of step \d of relearning the classes 0, 1 isn't finite"
    stopped(strategy, stream, rf"^experience 0 .*, {start}{words}")


def test_parts_of_a_loss_are_told(stream):
    for method, words in (
        ("lorac_ipc", "the losses of the task add up to nan, the orthogonality penalties to"),
        ("cila", "the contrastive losses add up to nan, the distillation to nan"),
    ):
        strategy = build(method, Break(fill("backbone.conv.bias", NAN), event="before_forward", iteration=1))
        stopped(strategy, stream, rf"iteration 1 .*the loss is nan.*{words}")


# --------------------------------------------------------------------- evaluation
@pytest.mark.parametrize(
    ("method", "more"), [("naive", {}), ("lorac_ipc", {"alignment": None, "task_inference": None})]
)
def test_outputs_of_an_evaluation(monkeypatch, stream, method, more):
    strategy = poisoned(monkeypatch, method, stream, experience=0, class_id=1, **more)
    words = (
        r"^evaluation of experience 0 \(classes 0, 1\) of the stream 'test' after 1 experiences of training: the "
        r"outputs of 4 of 8 images aren't finite; all weights are finite, so the forward pass overflows"
    )
    stopped(strategy, stream, words)


def test_the_loss_of_an_evaluation(monkeypatch, stream):
    """Outputs may be finite where the loss isn't; no metric looks at it."""
    strategy = build("naive")
    strategy.evaluator.metrics = []
    own = strategy._criterion
    monkeypatch.setattr(strategy, "_criterion", lambda x, y: own(x, y) * (1 if torch.is_grad_enabled() else NAN))
    words = r"^evaluation of experience 0 .*: the loss is nan; all weights are finite, so the forward pass overflows"
    stopped(strategy, stream, words)


def test_features_of_an_evaluation_by_task_inference(monkeypatch, stream):
    strategy = poisoned(monkeypatch, "lorac_ipc", stream, experience=0, class_id=1, alignment=None, guard=False)
    strategy.evaluator.metrics = []
    strategy.model.backbone.after = 9
    strategy.train(stream.train[0], eval_streams=[])
    strategy.model.backbone.after = 0
    words = r"^evaluation of experience 0 .*: 4 samples have features that aren't finite, so no task"
    with pytest.raises(NonFiniteError, match=words):
        strategy.eval(stream.test[:1])


@pytest.mark.parametrize(
    ("kind", "words"),
    [(DeviceAccuracy, "the outputs of 4 samples"), (DeviceLoss, "the loss of 1 of 2 mini-batches isn't finite")],
)
def test_metrics_alone(monkeypatch, stream, kind, words):
    strategy = poisoned(monkeypatch, "naive", stream, experience=0, class_id=1, guard=False)
    strategy.evaluator.metrics = [kind()]
    strategy.eval_mb_size = 4
    with pytest.raises(NonFiniteError, match=rf"^evaluation of experience 0 .*: {words}"):
        run(strategy, stream)


def test_probes_of_a_representation(monkeypatch, stream):
    strategy = poisoned(monkeypatch, "naive", stream)
    strategy.evaluator.metrics.append(RepresentationProbe(stream.train, stream.test, "knn", k=3))
    words = (
        r"^experience 1 .*, probes of the representation after 2 experiences of training: train data of task 1: the "
        r"features of class 3 \(4 of 4 samples\)"
    )
    stopped(strategy, stream, words)


def test_a_network_that_was_tuned_to_nan_has_no_accuracy(stream):
    strategy = build("naive")
    probe = RepresentationProbe(stream.train, stream.test, "fine_tune", lr=1e30, epochs=3, batch_size=4)
    strategy.train(stream.train[0], eval_streams=[])
    with pytest.raises(NonFiniteValues, match=r"^fine_tune of task 0 with lr 1e\+30: 8 of 8 test samples get NaN"):
        probe.measure(strategy.model, 0, tasks=[0])


def test_every_method_is_guarded(stream):
    """A NaN in the second iteration of the second experience (of joint training: of the first) is named in all."""
    for method in METHODS:
        place = 0 if METHODS[method].joint else 1
        strategy = build(method, Break(spoil_loss, experience=place, iteration=1))
        stopped(strategy, stream, rf"^experience {place} \(classes .*, iteration 1 .*the loss is nan", method=method)


# ------------------------------------------------------------------- command line
RECIPE = """
name: broken
output: {output}
seeds: [0]
device: cpu
threads: 1
stream: {{name: digits, tasks: 5}}
training: {{epochs: 1, batch_size: 64, optimizer: {{lr: 1.0e+30}}}}
checkpoint: {{every: 1}}
methods: [naive]
"""


def test_without_a_guard_a_checkpoint_may_hold_the_same(tmp_path, capsys):
    """Figures that can't be read end the run all the same."""
    (tmp_path / "broken.yaml").write_text(RECIPE.format(output=tmp_path / "runs"), encoding="utf-8")
    words = ["run", str(tmp_path / "broken.yaml"), "performance.finite_guard=false", "--quiet"]
    assert main(words) == 1
    shown = capsys.readouterr().err
    words = r"evaluation of experience 0 .*The last checkpoint is kept: \S+, made without a guard"
    assert re.search(words, shown), shown


def test_the_command_line_shows_no_traceback(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(RECIPE.format(output=tmp_path / "runs"), encoding="utf-8")
    assert main(["run", str(tmp_path / "broken.yaml"), "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    folder = tmp_path / "runs" / "broken" / "naive" / "seed-0"
    newest = checkpoints(folder / "checkpoint")[0]
    words = r"experience 0 \(classes \d, \d\), epoch 0, iteration 1 .*: the loss is nan; it was \d"
    assert re.search(words, shown), shown
    assert f"The last checkpoint is kept: {newest}." in shown and "firn resume" in shown
    assert newest.name in ("step-000000000", "step-000000001") and not (folder / "results.json").exists()
    tensors = load_file(next(newest.glob("*.safetensors")))
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
