"""Gradient accumulation: equal to large batches, order of the triggers, loss scaling, schedules, refusals, resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import AGEMPlugin, EvaluationPlugin, LRSchedulerPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_firn.evaluation import GradientAlignment
from avalanche_firn.plugins import (
    ContrastiveDistillationPlugin,
    GradientAccumulationPlugin,
    ImportantParameterPlugin,
    MixedPrecisionPlugin,
    SequentialPhasePlugin,
    WarmupCosinePlugin,
    ZappingPlugin,
    checkpoint_files,
)
from avalanche_firn.plugins.accumulation import _refuse, accumulation_steps, inside_group, updates_done, updates_in
from avalanche_firn.plugins.checkpoint_files import CheckpointError, checkpoints

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import Noisy, assert_same, crash, der, play, scr, sgd, slca, stream
from checkpoint_recipes import mlp as noisy_mlp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Sizes(SupervisedPlugin):
    """Batches of given sizes, over the same 18 images."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        x, y = images(18)
        strategy.dataloader = list(zip(x.split(self.sizes), y.split(self.sizes), strict=True))


class Watch(SupervisedPlugin):
    """Triggers in order, and what stands in loss and gradient at some of them."""

    HOOKS = (
        "before_training_epoch", "before_training_iteration", "before_forward", "after_forward", "before_backward",
        "after_backward", "before_update", "after_update", "after_training_iteration", "after_training_epoch",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []
        self.backward: list[torch.Tensor] = []
        for hook in self.HOOKS:
            setattr(self, hook, self._note(hook))

    def _note(self, hook: str) -> Any:
        def note(strategy: Any, **kwargs: Any) -> None:
            self.seen.append(hook)
            if hook == "after_training_iteration":
                self.losses.append(float(strategy.loss.detach()))
            elif hook == "before_update":
                self.gradients.append(next(strategy.model.parameters()).grad.clone())
            elif hook == "after_backward":
                self.backward.append(next(strategy.model.parameters()).grad.clone())

        return note


class Penalty(SupervisedPlugin):
    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.loss = strategy.loss + 0.3 * sum(p.square().sum() for p in strategy.model.parameters())


class StopAt(SupervisedPlugin):
    def __init__(self, iteration: int) -> None:
        super().__init__()
        self.iteration = iteration

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_iterations + 1 == self.iteration:  # the clock counts after us
            strategy.stop_training()


def images(count: int = 38) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 4


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def run(stream_of: Any, batch: int, *plugins: SupervisedPlugin, epochs: int = 2, lr: float = 0.1) -> Naive:
    torch.manual_seed(0)
    model = network()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=epochs,
        evaluator=EvaluationPlugin(loggers=[]),
        plugins=list(plugins),
    )
    for experience in stream_of(*images(), (2, 2)).train_stream:  # 20 and 18 images
        strategy.train(experience, eval_streams=[])
    return strategy


def distance(one: Naive, other: Naive) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# ------------------------------------------------------------------- equality
@pytest.mark.parametrize(("steps", "batch"), [(2, 8), (4, 4), (16, 1), (3, 4)])
def test_equals_large_batches(stream_of: Any, steps: int, batch: int) -> None:
    """Shuffled, with momentum; the last group is shorter, and its last mini-batch smaller, than the others."""
    large = run(stream_of, steps * batch, Penalty())
    small = run(stream_of, batch, Penalty(), GradientAccumulationPlugin(steps))
    assert distance(large, small) < 1e-6
    assert distance(large, run(stream_of, batch, Penalty())) > 1e-3  # without accumulation it's another run
    assert small.clock.train_iterations > large.clock.train_iterations


def test_one_step_is_the_loop_of_avalanche_to_the_bit(stream_of: Any) -> None:
    with_plugin = run(stream_of, 4, GradientAccumulationPlugin(1))
    assert distance(run(stream_of, 4), with_plugin) == 0
    assert "training_epoch" not in vars(with_plugin)


@pytest.mark.parametrize("sizes", [(5, 3, 1, 7, 2), (1, 8, 8, 1), (6, 6, 6)])
@pytest.mark.parametrize("steps", [2, 3, 9])
def test_gradient_is_the_mean_over_the_images_of_a_group(stream_of: Any, sizes: tuple[int, ...], steps: int) -> None:
    watch = Watch()
    run(stream_of, 1, Sizes(sizes), watch, GradientAccumulationPlugin(steps), epochs=1, lr=1e-12)
    torch.manual_seed(0)
    model, (x, y) = network(), images(18)
    ends = np.cumsum(sizes)
    expected = []
    for start in range(0, len(sizes), steps):
        first = 0 if start == 0 else ends[start - 1]
        last = ends[min(start + steps, len(sizes)) - 1]
        model.zero_grad()
        nn.functional.cross_entropy(model(x[first:last]), y[first:last]).backward()
        expected.append(next(model.parameters()).grad.clone())
    for mine, theirs in zip(watch.gradients, expected * 2, strict=True):  # two experiences of the same images
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_triggers_and_losses_of_the_mini_batches(stream_of: Any) -> None:
    stock, own = Watch(), Watch()
    run(stream_of, 4, stock, epochs=1)
    strategy = run(stream_of, 4, own, GradientAccumulationPlugin(3), epochs=1)
    update = ("before_update", "after_update")
    assert [h for h in own.seen if h not in update] == [h for h in stock.seen if h not in update]
    assert own.seen.count("before_update") == own.seen.count("after_update") == 4  # 5 mini-batches, 3 + 2, twice
    place = own.seen.index("before_update")
    assert own.seen[place - 1 : place + 3] == ["after_backward", *update, "after_training_iteration"]
    assert own.seen[:place].count("after_training_iteration") == 2
    assert own.losses[0] == stock.losses[0]  # the same batch and weights; not a part of it
    assert strategy.clock.train_iterations == 10


def test_a_stop_inside_a_group_throws_no_gradient_away(stream_of: Any) -> None:
    watch = Watch()
    strategy = run(stream_of, 1, Sizes((4, 4, 4, 6)), watch, StopAt(2), GradientAccumulationPlugin(4), epochs=1)
    torch.manual_seed(0)
    model, (x, y) = network(), images(18)
    nn.functional.cross_entropy(model(x[:8]), y[:8]).backward()
    torch.testing.assert_close(watch.gradients[0], next(model.parameters()).grad, rtol=1e-5, atol=1e-7)
    assert not inside_group(strategy)


def test_a_loader_that_gives_less_than_it_says(stream_of: Any) -> None:
    class Short(list):
        def __len__(self) -> int:
            return 50

    class Loader(Sizes):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            super().before_training_exp(strategy)
            strategy.dataloader = Short(strategy.dataloader)

    watch = Watch()
    run(stream_of, 1, Loader((9, 9)), watch, GradientAccumulationPlugin(4), epochs=1, lr=1e-12)
    torch.manual_seed(0)
    model, (x, y) = network(), images(18)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(watch.gradients[0], next(model.parameters()).grad, rtol=1e-5, atol=1e-7)


def test_an_exception_leaves_nothing_for_the_next_epoch(stream_of: Any) -> None:
    accumulation = GradientAccumulationPlugin(4)
    with pytest.raises(KeyError):

        class Boom(SupervisedPlugin):
            def after_backward(self, strategy: Any, **kwargs: Any) -> None:
                raise KeyError

        run(stream_of, 4, accumulation, Boom())
    assert accumulation.inside_group
    assert distance(run(stream_of, 4, accumulation), run(stream_of, 4, GradientAccumulationPlugin(4))) == 0


# ------------------------------------------------------------ mixed precision
def test_bf16_equals_large_batches(stream_of: Any) -> None:
    large = run(stream_of, 8, MixedPrecisionPlugin("bf16"))
    small = run(stream_of, 4, MixedPrecisionPlugin("bf16"), GradientAccumulationPlugin(2))
    assert distance(large, small) < 2e-2 and distance(small, run(stream_of, 4, MixedPrecisionPlugin("bf16"))) > 2e-2


@pytest.mark.parametrize("first", ["precision", "accumulation"])
def test_fp16_unscales_the_sum_once(stream_of: Any, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    unscale = torch.amp.GradScaler.unscale_
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, opt: (calls.append(1), unscale(self, opt)))
    large, small = Watch(), Watch()
    run(stream_of, 12, large, MixedPrecisionPlugin("fp16"), epochs=1)
    steps = len(calls)
    own = [MixedPrecisionPlugin("fp16", init_scale=2.0**10), GradientAccumulationPlugin(3)]
    strategy = run(stream_of, 4, small, *(own if first == "precision" else own[::-1]), epochs=1)
    assert len(calls) == 2 * steps == 8
    for mine, theirs in zip(small.gradients, large.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=5e-3)
    # in the middle of a group the sum is scaled, at its end it's the true gradient
    assert small.backward[0].abs().max() > 100 * small.backward[2].abs().max()
    assert torch.equal(small.backward[2], small.gradients[0])
    assert strategy.loss.isfinite().all()


def test_fp16_skips_a_group_that_overflows(stream_of: Any) -> None:
    precision = MixedPrecisionPlugin("fp16", init_scale=2.0**40)
    strategy = run(stream_of, 4, precision, GradientAccumulationPlugin(3), StopAt(2), epochs=1)  # a stop flushes, too
    assert precision.scaler is not None and precision.scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in strategy.model.parameters())


# ------------------------------------------------------------------- schedules
class Rates(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.done: list[int] = []

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.done.append(updates_done(strategy))

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.rates.append(strategy.optimizer.param_groups[0]["lr"])


def test_a_warm_up_counts_steps(stream_of: Any) -> None:
    def rates() -> WarmupCosinePlugin:
        return WarmupCosinePlugin(0.5, warmup=True, warmup_epochs=2)

    large, small = Rates(), Rates()
    strategies = [
        run(stream_of, 12, rates(), large, epochs=4),
        run(stream_of, 4, rates(), small, GradientAccumulationPlugin(3), epochs=4),
    ]
    assert large.rates == small.rates and len(set(large.rates)) > 4
    assert distance(*strategies) < 1e-5
    assert large.done[:8] == list(range(8))
    assert small.done[:10] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]  # 3 + 2 mini-batches in an epoch


def test_whether_to_warm_up_depends_on_the_images_of_a_step(stream_of: Any) -> None:
    small = Rates()
    rates = WarmupCosinePlugin(0.5, warmup_epochs=2)
    run(stream_of, 128, rates, small, GradientAccumulationPlugin(4), epochs=3)
    assert small.rates[0] == 0.01  # 512 images: warm
    assert updates_in(Naive(model=nn.Linear(1, 1), optimizer=torch.optim.SGD([torch.zeros(1)], lr=1)), 7) == 7


def test_updates_in() -> None:
    class Strategy:
        plugins = (SupervisedPlugin(), GradientAccumulationPlugin(4))

    assert [updates_in(Strategy, n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert accumulation_steps(Strategy) == 4


# -------------------------------------------------------------------- refusals
@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_steps_out_of_range(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"steps is .*; a whole number of 1 and above is accepted"):
        GradientAccumulationPlugin(steps)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (lambda: ContrastiveDistillationPlugin(), "ContrastiveDistillationPlugin compares the images"),
        (lambda: SequentialPhasePlugin(0.1, zap=False), "SequentialPhasePlugin makes an episode"),
        (lambda: ImportantParameterPlugin(0.1), "ImportantParameterPlugin takes importance"),
        (lambda: ZappingPlugin(schedule="iteration"), "schedule 'iteration'"),
        (lambda: ZappingPlugin(schedule=lambda strategy: True), "schedule 'a function'"),
        (lambda: ZappingPlugin(schedule="epoch", relearn_steps=2), "relearn_steps=2"),
        (lambda: AGEMPlugin(4, 4), "AGEMPlugin takes a gradient"),
        (
            lambda: LRSchedulerPlugin(
                torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1), 1),
                step_granularity="iteration",
            ),
            "LRSchedulerPlugin steps its schedule",
        ),
    ],
)
def test_plugins_that_need_whole_batches(stream_of: Any, plugin: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"steps is 2 and .*{message}.*steps=1 is accepted"):
        run(stream_of, 4, GradientAccumulationPlugin(2), plugin())


@pytest.mark.parametrize(
    "plugin",
    [lambda: ImportantParameterPlugin(0.0), lambda: ZappingPlugin(schedule="epoch"), lambda: ZappingPlugin("auto")],
)
def test_plugins_that_can_do_with_parts(plugin: Any) -> None:
    strategy = Naive(
        model=nn.Linear(1, 1), optimizer=torch.optim.SGD([torch.zeros(1)], lr=1), plugins=[plugin()], evaluator=None
    )
    _refuse(strategy, 2)


@pytest.mark.parametrize("recipe", [der, scr], ids=lambda r: r.__name__)
def test_strategies_that_need_whole_batches(recipe: Any) -> None:
    strategy, bm, settings = recipe([GradientAccumulationPlugin(2)])
    with pytest.raises(ValueError, match=f"steps is 2 and {type(strategy).__name__} .*steps=1"):
        strategy.train(bm.train_stream[0], **settings)


def test_another_loop_and_a_criterion_and_a_metric(stream_of: Any) -> None:
    class Own(Naive):
        def training_epoch(self, **kwargs: Any) -> None:
            super().training_epoch(**kwargs)

    own = Own(model=network(), optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1), evaluator=None)
    with pytest.raises(ValueError, match="Own has a training loop of its own"):
        _refuse(own, 2)
    strategy = run(stream_of, 4, epochs=1)
    strategy._criterion = ContrastiveDistillationPlugin()
    with pytest.raises(ValueError, match="ContrastiveDistillationPlugin"):
        _refuse(strategy, 2)
    tasks = stream_of(*images(), (2, 2)).test_stream
    strategy = run(stream_of, 4, epochs=1)
    strategy.evaluator.metrics.append(GradientAlignment(list(tasks)))
    with pytest.raises(ValueError, match="GradientAlignment takes every iteration for a step"):
        _refuse(strategy, 2)


def test_two_of_them_or_another_loop_on_the_instance(stream_of: Any) -> None:
    with pytest.raises(ValueError, match="several GradientAccumulationPlugins; one is accepted"):
        run(stream_of, 4, GradientAccumulationPlugin(2), GradientAccumulationPlugin(2))

    class Taken(SupervisedPlugin):
        def before_training(self, strategy: Any, **kwargs: Any) -> None:
            strategy.training_epoch = lambda **kwargs: None

    with pytest.raises(ValueError, match="training_epoch of the strategy was replaced"):
        run(stream_of, 4, Taken(), GradientAccumulationPlugin(2))


def test_a_loader_without_a_length(stream_of: Any) -> None:
    class Endless(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            strategy.dataloader = (batch for batch in strategy.dataloader)

    with pytest.raises(ValueError, match="generator has no length"):
        run(stream_of, 4, Endless(), GradientAccumulationPlugin(2))


# ---------------------------------------------------------------------- resume
def accumulating(plugins: list[Any], loggers: Any = ()) -> Any:
    """Groups of 4 + 2, 4 and 4 mini-batches an epoch, with augmentation and dropout."""
    return sgd(noisy_mlp(), [GradientAccumulationPlugin(4), *plugins], loggers), stream(Noisy), {"eval_streams": []}


def accumulating_slca(plugins: list[Any], loggers: Any = ()) -> Any:
    return slca([GradientAccumulationPlugin(3), *plugins], loggers)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(recipe: Any) -> Any:
        if recipe.__name__ not in made:
            made[recipe.__name__] = play(recipe, tmp_path_factory.mktemp("reference"), every=None)
        return made[recipe.__name__]

    return get


@pytest.mark.parametrize("recipe", [accumulating, accumulating_slca], ids=lambda r: r.__name__)
@pytest.mark.parametrize(("hook", "count"), [("before_backward", 6), ("after_backward", 10), ("after_update", 5)])
def test_kill_and_resume(
    recipe: Any, hook: str, count: int, tmp_path: Path, references: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)
    crash(recipe, tmp_path, hook, count, every=1, keep=50)
    steps = [int(path.name.split("-")[1]) for path in checkpoints(tmp_path) if "end" not in path.name]
    size = 4 if recipe is accumulating else 3
    assert {size} <= set(steps) and not {1, 2} & set(steps)  # between groups only
    assert_same(play(recipe, tmp_path, seed=99, every=1), references(recipe))


def test_resuming_with_other_steps(tmp_path: Path) -> None:
    crash(accumulating, tmp_path, "before_backward", 9)

    def other(plugins: list[Any], loggers: Any = ()) -> Any:
        return sgd(noisy_mlp(), [GradientAccumulationPlugin(2), *plugins], loggers), stream(Noisy), {"eval_streams": []}

    with pytest.raises(CheckpointError, match="steps is 2; the state was made with steps=4"):
        play(other, tmp_path)
