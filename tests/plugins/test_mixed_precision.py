"""Mixed precision: where autocast is on, loss scaling, state, nothing left behind."""

import pytest
import timm
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin


class Probe(SupervisedPlugin):
    """Records what a plugin that comes first sees."""

    def __init__(self):
        super().__init__()
        self.outputs, self.gradients, self.losses = [], [], []

    def after_forward(self, strategy, **kwargs):
        self.outputs.append(strategy.mb_output.dtype)

    def before_backward(self, strategy, **kwargs):
        assert not torch.is_autocast_enabled("cpu")
        strategy.loss = strategy.loss + 0.1 * strategy.model[0].weight.square().sum()

    def after_backward(self, strategy, **kwargs):
        self.gradients.append(strategy.model[0].weight.grad.clone())
        self.losses.append(strategy.loss.detach().clone())


def run(stream_of, precision, plugins=(), lr=0.1, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x, y = torch.randn(32, 6), torch.arange(4).repeat_interleave(8)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), train_mb_size=8, evaluator=None,
        plugins=[*plugins, *([MixedPrecisionPlugin(precision, **kwargs)] if precision else [])],
    )  # fmt: skip
    for experience in stream_of(x, y, (2, 2)).train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(experience)
    return strategy


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forward_in_half_precision_and_true_gradients(stream_of, precision, dtype):
    probe, reference = Probe(), Probe()
    run(stream_of, precision, [probe])
    run(stream_of, None, [reference])
    assert set(probe.outputs) == {dtype} and set(reference.outputs) == {torch.float32}
    for ours, exact in zip(probe.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.02)
    for ours, exact in zip(probe.losses, reference.losses, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.02)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_full_precision_changes_nothing_on_a_cpu(stream_of, precision):
    plain, with_plugin = run(stream_of, None), run(stream_of, precision)
    assert torch.equal(plain.model[0].weight, with_plugin.model[0].weight)


def test_an_exception_leaves_autocast_off(stream_of):
    class Boom(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            raise KeyError("boom")

    with pytest.raises(KeyError):
        run(stream_of, "bf16", [Boom()])
    assert not torch.is_autocast_enabled("cpu")


def test_fp16_skips_steps_that_overflow_and_lowers_the_scale(stream_of):
    strategy = run(stream_of, "fp16", init_scale=2.0**40)
    plugin = next(p for p in strategy.plugins if isinstance(p, MixedPrecisionPlugin))
    assert plugin.scaler.get_scale() < 2.0**40
    assert torch.isfinite(strategy.model[0].weight).all()


def test_state_round_trip_before_and_after_the_first_use(stream_of):
    strategy = run(stream_of, "fp16", init_scale=2.0**40)
    plugin = next(p for p in strategy.plugins if isinstance(p, MixedPrecisionPlugin))
    state = plugin.state_dict()
    early = MixedPrecisionPlugin("fp16")
    early.load_state_dict(state)
    early.before_training(
        strategy=Naive(model=nn.Linear(2, 2), optimizer=torch.optim.SGD([torch.zeros(1)], lr=1), evaluator=None)
    )
    assert early.scaler.get_scale() == plugin.scaler.get_scale()
    bf16 = MixedPrecisionPlugin("bf16")
    bf16.load_state_dict(bf16.state_dict())


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        MixedPrecisionPlugin("fp8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu():
    assert MixedPrecisionPlugin().resolve(torch.device("cuda")) in ("bf16", "fp16")


@pytest.mark.parametrize(
    ("size", "precision", "attention", "plain"),
    [
        (32, "bf16", "auto", True),
        (64, "bf16", "auto", False),
        (32, "bf16", "fused", False),
        (32, "fp32", "auto", False),
    ],
)
def test_short_sequences_train_with_plain_attention_on_a_cpu(stream_of, size, precision, attention, plain):
    """64 patches of 4 x 4 pixels are few, 256 aren't; an evaluation never needs it."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=4
    )
    seen = []
    chosen = torch.nn.functional.scaled_dot_product_attention

    def attention_of(*args, **kwargs):
        fused = torch.backends.cuda.flash_sdp_enabled()  # the switch of the CPU's fused attention, too
        seen.append((model.training, not fused))
        return chosen(*args, **kwargs)

    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train_mb_size=4, eval_mb_size=4,
        evaluator=None, plugins=[MixedPrecisionPlugin(precision, attention=attention)],
    )  # fmt: skip
    x, y = torch.randn(8, 3, size, size), torch.arange(4).repeat_interleave(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_of)
        for experience in stream_of(x, y, (4,)).train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(experience)
    assert {was for training, was in seen if training} == {plain}
    assert {was for training, was in seen if not training} == {False}
    assert torch.backends.cuda.flash_sdp_enabled()


def test_plain_attention_is_fused_attention_up_to_rounding(stream_of):
    trained = {}
    for attention in ("auto", "fused"):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=4
        )
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), train_mb_size=8, evaluator=None,
            plugins=[MixedPrecisionPlugin("bf16", attention=attention)],
        )  # fmt: skip
        x, y = torch.randn(8, 3, 32, 32), torch.arange(4).repeat_interleave(2)
        for experience in stream_of(x, y, (4,)).train_stream:
            strategy.train(experience, eval_streams=[])
        trained[attention] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(trained["auto"], trained["fused"], rtol=0.02, atol=2e-3)


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention is 'plain'"):
        MixedPrecisionPlugin("bf16", attention="plain")
