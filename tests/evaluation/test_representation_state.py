"""What measuring leaves alone, and what a resumed, copied or pickled probe continues with."""

import copy
import pickle
import sys
from pathlib import Path

import dill
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_firn.evaluation.representation import RepresentationProbe
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain
from avalanche_firn.plugins.random_state import capture_random_state

sys.path.append(str(Path(__file__).parent))
from representation_cases import ALL, FAST, Tiny, learner, plain, train

pytestmark = pytest.mark.usefixtures("cheap_picture")


# ------------------------------------------------------------------ side effects
@pytest.mark.parametrize("generation", ["modern", "classic"])
@pytest.mark.parametrize("when", ["experience", "eval"])
def test_training_is_the_same_to_the_bit(stream, generation, when):
    bench = stream(generation=generation, dtype=torch.float32)

    def run(wanted):
        probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST | {"lr": [0.05, 0.1]})
        strategy = learner(Tiny, [probe] if wanted else [])
        train(strategy, bench.train_stream, bench.test_stream)
        modes = {name: module.training for name, module in strategy.model.named_modules()}
        clock = {name: value for name, value in vars(strategy.clock).items() if isinstance(value, int)}
        optimizer = to_plain(strategy.optimizer.state_dict())
        state = [dict(strategy.model.state_dict()), modes, clock, optimizer, capture_random_state()]
        return to_plain(state), probe

    without, (state, probe) = run(False)[0], run(True)
    assert differing_state(without, state) is None
    assert all(probe.matrices[name].shape == (3, 3) for name in ALL)


@pytest.mark.parametrize("when", ["experience", "eval"])
def test_nothing_of_a_strategy_is_touched_between_its_hooks(stream, when):
    bench = stream(dtype=torch.float32)
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
    strategy = learner(Tiny)
    strategy.train(bench.train_stream[0], eval_streams=[])
    model = strategy.model.train()
    model.backbone[1].eval()  # modes that differ
    model.backbone[0].requires_grad_(False)
    x = torch.randn(4, 6)
    strategy.mbatch = [x, torch.zeros(4), torch.zeros(4)]
    strategy.mb_output, strategy.loss = model(x), torch.ones(1)
    strategy.mb_output.sum().backward()
    strategy.experience = bench.train_stream[0]

    def snapshot():
        parameters = {
            n: [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
            for n, p in model.named_parameters()
        }
        modes = {n: [m.training, len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        optimizer = to_plain(strategy.optimizer.state_dict())
        return to_plain([parameters, buffers, modes, optimizer, capture_random_state(), torch.is_grad_enabled()])

    attributes, modules = dict(vars(strategy)), list(model.named_modules())
    for enabled in (True, False):  # ``strategy.eval`` runs without gradients
        with torch.set_grad_enabled(enabled):
            before = snapshot()
            probe.before_training_exp(strategy)
            probe.after_training_exp(strategy)
            probe.after_eval(strategy)
            assert differing_state(before, snapshot()) is None
    assert all(vars(strategy)[name] is value for name, value in attributes.items())
    assert [(n, id(m)) for n, m in modules] == [(n, id(m)) for n, m in model.named_modules()]
    assert probe.matrices["fine_tune"].shape == (2, 3)
    with torch.no_grad():
        model.head.weight.add_(1)
        model.backbone[0].weight.add_(1)  # other features, so that the model is asked
    model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    before = snapshot()
    with pytest.raises(ZeroDivisionError):
        probe._row(strategy, None)
    assert differing_state(before, snapshot()) is None


# -------------------------------------------------------------------------- state
@pytest.mark.parametrize(
    ("generation", "when"), [("modern", "experience"), ("modern", "diagonal"), ("classic", "eval")]
)
def test_state_continues_to_the_same_values(stream, tools, generation, when):
    bench = stream(generation=generation)

    def run(between):
        log, probe = tools.Collect(), RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
        strategy = learner(plain, [probe], log=log)
        for experience in bench.train_stream:
            between(probe)
            train(strategy, [experience], bench.test_stream)
        return [value for value in log.values if not value[0].endswith("matrix")], probe.curves()

    def replace(probe):
        state = from_plain(copy.deepcopy(to_plain(probe.state_dict())))
        fresh = RepresentationProbe(bench.train_stream, bench.test_stream, when=when, **FAST)
        fresh.load_state_dict(state)
        assert differing_state(to_plain(fresh.state_dict()), to_plain(probe.state_dict())) is None
        probe.__dict__ = fresh.__dict__

    assert run(replace) == run(lambda probe: None)


class Kill(SupervisedPlugin):
    stateless = True

    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 4])  # in the first experience, in the second
def test_exact_resume_after_a_kill(stream, tools, tmp_path, at):
    bench = stream(dtype=torch.float32)

    def run(at, folder):
        log, probe = tools.Collect(), RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
        checkpoint = ExactCheckpointPlugin(tmp_path / folder, every=1)
        strategy = learner(Tiny, [probe], plugins=[Kill(at), checkpoint], log=log)
        start = checkpoint.resume(strategy)
        try:
            for experience in bench.train_stream[start:]:
                if not checkpoint.is_trained(experience):
                    strategy.train(experience, eval_streams=[])
        except KeyboardInterrupt:
            pass
        finally:
            checkpoint.close()
        return [value for value in log.values if not value[0].endswith("matrix")], probe

    values, whole = run(-1, "whole")
    killed, _ = run(at, "killed")
    resumed, probe = run(-1, "killed")
    assert len(killed) == (0 if at == 1 else 4 * 4) and killed + resumed == values
    assert {n: m.to_dict() for n, m in probe.matrices.items()} == {n: m.to_dict() for n, m in whole.matrices.items()}


def test_state_of_other_settings_is_refused(stream):
    bench = stream()
    make = lambda **kwargs: RepresentationProbe(bench.train_stream, bench.test_stream, **kwargs)  # noqa: E731
    state = make().state_dict()
    for options, name in (({"shots": 3}, "shots, adaptation_samples"), ({"k": 5}, "k"), ({"adapt": "linear"}, "adapt")):
        with pytest.raises(ValueError, match=f"another value of {name}$"):
            make(**options).load_state_dict(state)


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_pickle(stream, generation):
    bench = stream(generation=generation)
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **FAST)
    strategy = learner(plain, [probe])
    strategy.train(bench.train_stream[0], eval_streams=[])
    # Avalanche's classic streams can't be pickled (a lambda inside), with or without a probe; dill can
    again = pickle.loads(pickle.dumps(probe)) if generation == "modern" else dill.loads(dill.dumps(probe))
    assert again.curves() == probe.curves() and again.protocol() == probe.protocol()
    again.cache.clear()
    again._images.clear()  # read once more from the pickled streams
    assert again.measure(strategy.model, 0, tasks=range(3)) == probe.measure(strategy.model, 0, tasks=range(3))
