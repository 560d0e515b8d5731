"""Freezing on Naive: what is tracked and frozen, the window, steps that don't count, errors, state."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_firn.experiments.lora_results import lora_curves, lora_results
from avalanche_firn.plugins.critical_parameters import (
    ImportanceTracker,
    ImportantParameterPlugin,
    score_figures,
    select_critical,
)
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.run_errors import NonFiniteError

sys.path.append(str(Path(__file__).parent))
from lora_cases import StopAt, adapted_vit, assert_equal, images, layers, logged, naive, state, train

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture(scope="module")
def benchmark(stream_of):
    return images(stream_of)


def strategy_with(importance, *more, model=None, **kwargs):
    return naive([LoRACompositionPlugin(), importance, *more], model, **kwargs)


class Watch(SupervisedPlugin):
    """After every step: whether anything is recorded, and S by name."""

    def __init__(self):
        super().__init__()
        self.recording, self.sensitivity = [], []

    def before_forward(self, strategy, **kwargs):
        self.recording.append(any(layer._records is not None for layer in layers(strategy).layers.values()))

    def after_update(self, strategy, **kwargs):
        importance = next(p for p in strategy.plugins if isinstance(p, ImportantParameterPlugin))
        self.sensitivity.append({n: float(v) for n, v in importance.tracker.sensitivity().items()})


# ------------------------------------------------------------------ what is tracked
class ByHand(SupervisedPlugin):
    """Importance from the composed weights as plain parameters of a copy of the model, smoothed by hand."""

    def __init__(self):
        super().__init__()
        self.S, self.U, self.frozen_after = {}, {}, []

    def before_training_exp(self, strategy, **kwargs):
        self.S, self.U = {}, {}

    def before_forward(self, strategy, **kwargs):
        twin, composition = copy.deepcopy(strategy.model), layers(strategy)
        for name, layer in composition.layers.items():
            plain = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
            plain.weight.data.copy_(layer.weight.detach())
            plain.bias.data.copy_(layer.bias)
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, plain)
        outside = torch.tensor([c not in strategy.experience.classes_in_this_experience for c in range(6)])
        logits = twin(strategy.mb_x).masked_fill(outside, -torch.inf)
        nn.functional.cross_entropy(logits, strategy.mb_y).backward()
        self.step = {}
        for name, layer in composition.layers.items():
            weight = twin.get_submodule(name).weight
            for index, part in enumerate(layer.parts):
                if layer.is_free(part):
                    value = (weight * weight.grad)[layer._rows(index)].abs().mean().detach()
                    self.step[name if part == "full" else f"{name}.{part}"] = float(value)

    def after_update(self, strategy, **kwargs):
        for name, value in self.step.items():
            self.S[name] = 0.85 * self.S.get(name, 0.0) + 0.15 * value
            self.U[name] = 0.85 * self.U.get(name, 0.0) + 0.15 * abs(value - self.S[name])

    def after_training_exp(self, strategy, **kwargs):
        best = sorted(self.S, key=lambda name: -self.S[name] * self.U[name])[:3]
        self.frozen_after.append({*best, *(self.frozen_after[-1] if self.frozen_after else ())})


def test_scores_and_frozen_matrices_equal_those_by_hand(stream_of):
    class Compare(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            ours = importance.tracker
            for found, expected in ((ours.sensitivity(), hand.S), (ours.uncertainty(), hand.U)):
                assert found.keys() == expected.keys()
                assert {n: float(v) for n, v in found.items()} == pytest.approx(expected, rel=1e-10)

    importance, hand = ImportantParameterPlugin(0.25), ByHand()
    plugins = [LoRACompositionPlugin(), importance, hand, Compare()]
    strategy = train(naive(plugins, adapted_vit(dtype=torch.float64)), images(stream_of, dtype=torch.float64))
    assert [set(names) for names in importance.frozen_after] == hand.frozen_after
    tasks = layers(strategy)
    flags = tasks.frozen.tolist()
    assert importance.frozen_after[-1] == [name for name, frozen in zip(tasks.positions, flags, strict=True) if frozen]
    assert [len(names) for names in importance.frozen_after] == [3, 6, 9]
    assert importance.tracker.score().keys() == set(tasks.positions) - set(importance.frozen_after[1])
    assert logged(strategy, "lorac/frozen") == ([0, 1, 2], [3, 6, 9])


@pytest.mark.parametrize("fraction", [0.0, 1 / 12 - 1e-9])
def test_nothing_is_recorded_where_nothing_can_be_frozen(benchmark, fraction):
    importance, watch = ImportantParameterPlugin(fraction, window=None), Watch()
    strategy = train(strategy_with(importance, watch), benchmark)
    assert importance.frozen_after == [[], [], []] and not layers(strategy).frozen.any()
    assert len(watch.recording) == 12 and not any(watch.recording) and not any(watch.sensitivity)
    assert_equal(state(strategy), state(train(naive([LoRACompositionPlugin()]), benchmark)))
    assert logged(strategy, "lorac/frozen") == ([0, 1, 2], [0, 0, 0])


def test_recording_ends_with_the_task(benchmark):
    importance = ImportantParameterPlugin(0.25)
    strategy = train(strategy_with(importance), benchmark)
    assert all(layer._records is None for layer in layers(strategy).layers.values())
    before = {n: v.clone() for n, v in importance.tracker.sensitivity().items()}
    strategy.model(torch.zeros(2, 3, 16, 16)).sum().backward()
    strategy.eval(benchmark.test_stream)
    assert before == importance.tracker.sensitivity()


def test_zero_scores_rank_last_and_all_ties_may_freeze_everything(stream_of):
    """Local cross-entropy of a single class is 0, and so are all scores."""
    benchmark = images(stream_of, (1, 5))
    for ties, counts in (("order", [3, 6]), ("all", [12, 12])):
        importance = ImportantParameterPlugin(0.25, ties=ties)
        strategy = train(strategy_with(importance), benchmark, last=1)
        assert set(map(float, importance.tracker.score().values())) == {0.0}
        head, weights = strategy.model.head.weight.detach().clone(), state(strategy)
        train(strategy, benchmark, first=1)
        assert [len(names) for names in importance.frozen_after] == counts
        assert importance.frozen_after[0] == layers(strategy).positions[: counts[0]]
        assert not torch.equal(head, strategy.model.head.weight)  # still learns where everything is frozen
        if ties == "all":
            assert not any(state(strategy)[k].any() for k in state(strategy) if k.endswith("B.full.1"))
            assert torch.equal(weights["blocks.0.attn.proj.A.full.0"], state(strategy)["blocks.0.attn.proj.A.full.0"])
    importance = ImportantParameterPlugin(0.25, of_remaining=True)
    train(strategy_with(importance), benchmark)
    assert [len(names) for names in importance.frozen_after] == [0, 3]  # no score above 0, then 12 of them


# ------------------------------------------------------------------ window
def test_window_of_150_steps_equals_all_and_a_short_one_does_not(stream_of):
    """200 steps of plain descent: what is recorded changes the last bits of a gradient, and Adam would spread that."""
    benchmark = images(stream_of, (4,), per_class=5, dtype=torch.float64)
    scores, chosen = {}, {}
    for window in (None, 150, 3):
        importance, watch = ImportantParameterPlugin(0.34, window=window), Watch()
        model = adapted_vit(depth=1, dtype=torch.float64)
        strategy = naive(
            [LoRACompositionPlugin(0.0), importance, watch], model, train_mb_size=4, train_epochs=40,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        )  # fmt: skip
        train(strategy, benchmark)
        scores[window], chosen[window] = importance.tracker.score(), importance.frozen_after
        assert watch.recording == [False] * (200 - (window or 200)) + [True] * (window or 200)
    for name, exact in scores[None].items():
        assert float(scores[150][name]) == pytest.approx(float(exact), rel=1e-8)
        assert float(scores[3][name]) < 0.8 * float(exact)
    assert len(chosen[None][0]) == 2 and chosen[150] == chosen[None]


@pytest.mark.parametrize(
    ("step", "window", "told", "frozen"),
    [
        (2, 3, True, 0),  # before the window
        (11, 3, True, 3),  # in it, and in the last epoch
        (9, 3, True, 0),  # before it, and in the last epoch
        (12, 3, False, 3),  # the last step
        (2, None, False, 3), (2, 150, False, 3),  # all steps were tracked
    ],
)  # fmt: skip
def test_a_task_that_stops_early(benchmark, recwarn, step, window, told, frozen):
    importance = ImportantParameterPlugin(0.25, window=window)
    train(strategy_with(importance, StopAt(step), train_epochs=3, train_mb_size=4), benchmark, last=1)
    messages = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(messages) == told and [len(names) for names in importance.frozen_after] == [frozen]
    assert not told or "experience 0 stopped early, before or within the window of the 3 steps" in messages[0]


def test_no_warning_where_nothing_is_to_be_frozen(benchmark, recwarn):
    train(strategy_with(ImportantParameterPlugin(0, window=1), StopAt(1)), benchmark, last=1)
    assert [w for w in recwarn if w.category is RuntimeWarning] == []


# ------------------------------------------------------------------ loss scaling
def test_importance_does_not_depend_on_the_loss_scale(benchmark):
    found = []
    for plugins in ([], [MixedPrecisionPlugin("fp16", init_scale=2.0**8)], [MixedPrecisionPlugin("fp16")]):
        watch = Watch()
        train(strategy_with(ImportantParameterPlugin(0.25), *plugins, watch), benchmark, last=1)
        found.append(torch.tensor([list(step.values()) for step in watch.sensitivity]))
    exact, small, large = found
    assert exact.shape == (4, 12) and (exact > 0).all()
    torch.testing.assert_close(small, exact, rtol=0.02, atol=0)
    torch.testing.assert_close(large, small, rtol=0.01, atol=0)


def test_steps_that_overflow_in_fp16_do_not_count(benchmark):
    class Steps(SupervisedPlugin):
        """Before the plugin smooths the importance: whether all of it is finite."""

        def after_update(self, strategy, **kwargs):
            finite.append(all(bool(v.isfinite()) for v in importance._step.values()))

    finite, watch, precision = [], Watch(), MixedPrecisionPlugin("fp16", init_scale=2.0**34)
    importance = ImportantParameterPlugin(0.25)
    train(naive([LoRACompositionPlugin(), Steps(), importance, precision, watch], train_epochs=20), benchmark, last=1)
    assert 3 < finite.count(False) < 30 and precision.scaler.get_scale() < 2.0**30
    zero = dict.fromkeys(watch.sensitivity[0], 0.0)
    for before, after, counted in zip([zero, *watch.sensitivity], watch.sensitivity, finite, strict=False):
        assert (before != after) == counted
    assert all(0 < v < float("inf") for v in watch.sensitivity[-1].values())
    assert len(importance.frozen_after[0]) == 3


# ------------------------------------------------------------------ errors
def test_a_second_backward_pass_in_a_step_is_refused(benchmark):
    class Twice(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            strategy.mb_output = strategy.forward()
            strategy.criterion().backward()

    message = r"matrix blocks\.\d\.\S+ got two gradients in one step; importance needs one backward pass"
    with pytest.raises(RuntimeError, match=message):
        train(strategy_with(ImportantParameterPlugin(0.25), Twice()), benchmark)
    train(strategy_with(ImportantParameterPlugin(0), Twice()), benchmark, last=1)  # nothing is tracked


def test_the_order_of_the_plugins(benchmark):
    for plugins in (
        [ImportantParameterPlugin(0.25), LoRACompositionPlugin()],
        [ImportantParameterPlugin(0.25)],
    ):
        strategy = naive(plugins)
        before = state(strategy)
        with pytest.raises(ValueError, match="ImportantParameterPlugin freezes what LoRACompositionPlugin composes"):
            train(strategy, benchmark)
        assert_equal(before, state(strategy))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_is_refused_with_the_name(benchmark, value):
    class Spoil(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            strategy.plugins[1]._step["blocks.1.attn.qkv.k"] += value

    message = r"^experience 0 .*importance of matrices: that of 1 of 12 isn't finite \(blocks.1.attn.qkv.k\)"
    with pytest.raises(NonFiniteError, match=message):
        train(strategy_with(ImportantParameterPlugin(0.25), Spoil()), benchmark)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": -0.1}, "fraction is -0.1; 0 to 1"), ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": float("nan")}, "fraction is nan"), ({"window": 0}, "window is 0; 1 and above or None"),
        ({"ties": "first"}, "ties is 'first'"), ({"beta1": 1.0}, "beta1 is 1.0"), ({"beta2": -0.1}, "beta2 is -0.1"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportantParameterPlugin(**settings)


# ------------------------------------------------------------------ state
def test_state_round_trip_inside_a_task(benchmark):
    """The state goes into another plugin, which carries on as the first one does."""

    class Swap(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            clock = strategy.clock
            if (clock.train_exp_counter, clock.train_exp_iterations) == (1, 3):
                saved = to_plain(old.state_dict())
                new.load_state_dict(old.state_dict())
                layers(strategy).record(None)
                old.tracker.reset()
                assert differing_state(saved, to_plain(new.state_dict())) is None
                assert len(saved["tracker"]["names"]) == 9 and saved["frozen_after"] == whole.frozen_after[:1]
                strategy.plugins[2] = new

    whole, old, new = (ImportantParameterPlugin(0.25, beta1=0.7) for _ in range(3))
    reference = train(strategy_with(whole), benchmark)
    swapped = train(naive([Swap(), LoRACompositionPlugin(), old]), benchmark)
    assert swapped.plugins[2] is new and old.frozen_after == whole.frozen_after[:1]
    assert new.frozen_after == whole.frozen_after and len(new.frozen_after) == 3
    assert_equal(state(reference), state(swapped))


# ------------------------------------------------------------------- what is logged
class Scores(SupervisedPlugin):
    """Scores of the free matrices by name at the end of a task, read before they are chosen from."""

    def __init__(self):
        super().__init__()
        self.free = []

    def after_training_epoch(self, strategy, **kwargs):
        importance = next(p for p in strategy.plugins if isinstance(p, ImportantParameterPlugin))
        composition, found = layers(strategy), importance.tracker.score()
        free = [n for n, frozen in zip(composition.positions, composition.frozen.tolist(), strict=True) if not frozen]
        self.free.append({name: float(found[name]) for name in free})


def test_logged_scores_equal_those_by_hand(benchmark):
    importance, scores = ImportantParameterPlugin(0.2), Scores()
    strategy = naive([LoRACompositionPlugin(), scores, importance], train_epochs=1)
    train(strategy, benchmark)
    known: set[str] = set()
    for task, (free, frozen) in enumerate(zip(scores.free, importance.frozen_after, strict=True)):
        values, new = list(free.values()), set(frozen) - known
        known |= new
        expected = {
            "largest": max(values),
            "mean": sum(values) / len(values),
            "frozen-share": sum(free[name] for name in new) / sum(values),
        }
        assert len(free) == 12 - 2 * task and len(new) == 2
        assert importance.scores_after[task] == pytest.approx(expected, rel=1e-9)
        for name in expected:
            steps, found = logged(strategy, f"lorac/importance/{name}")
            assert steps == [0, 1, 2] and found[task] == importance.scores_after[task][name]
            assert lora_curves(strategy)[f"lorac/importance/{name}"] == found
    results = lora_results(strategy)
    assert results["frozen"] == importance.frozen_after and results["matrices"] == layers(strategy).positions
    assert set(results["frozen"][-1]) <= set(results["matrices"])


def test_nothing_is_logged_where_nothing_is_tracked(benchmark):
    importance = ImportantParameterPlugin(0.0)
    strategy = train(strategy_with(importance), benchmark, 0, 2)
    assert importance.scores_after == [None, None]
    assert not any(name.startswith("lorac/importance") for name in strategy.evaluator.get_all_metrics())
    assert not any(name.startswith("lorac/importance") for name in lora_curves(strategy))


def test_figures_of_scores():
    score = torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=torch.float64)
    first, second = torch.tensor([False, False, True, False]), torch.tensor([True, False, True, False])
    assert score_figures(score, first, second) == {"largest": 2.0, "mean": 1.0, "frozen-share": 1 / 3}
    assert score_figures(0 * score, first, second) == {"largest": 0.0, "mean": 0.0, "frozen-share": 0.0}
    assert score_figures(score, torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)) is None


def test_scores_are_part_of_the_state_and_older_states_have_none(benchmark):
    one, other = ImportantParameterPlugin(0.2), ImportantParameterPlugin(0.2)
    train(strategy_with(one), benchmark, 0, 2)
    saved = one.state_dict()
    other.load_state_dict(saved)
    assert other.scores_after == one.scores_after and None not in one.scores_after
    other.scores_after[0]["mean"] = -1.0
    assert saved["scores_after"] == one.scores_after
    other.load_state_dict({name: value for name, value in saved.items() if name != "scores_after"})
    assert other.scores_after == [None, None]


def test_public_names_of_the_module():
    assert ImportanceTracker().beta1 == ImportantParameterPlugin().tracker.beta1 == 0.85
    plugin = ImportantParameterPlugin()
    assert (plugin.fraction, plugin.window, plugin.of_remaining, plugin.ties) == (0.05, 150, False, "order")
    assert select_critical(torch.tensor([1.0, 2.0]), torch.tensor([False, False]), 0.5).tolist() == [False, True]
