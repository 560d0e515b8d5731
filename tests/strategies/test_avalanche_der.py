"""DER for a growing classifier: Avalanche's loss where its own code works, and what it becomes where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import DER
from torch import nn
from torch.nn import functional as F

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.models.heads import UNSEEN_LOGIT, TaskwiseLinearHead
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.strategies.avalanche_der import ResumableDER, logit_distance

pytestmark = pytest.mark.filterwarnings("ignore")

ORDER = [7, 3, 9, 1, 0, 2, 8, 4, 6, 5]  # gaps in the class ids from the beginning


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits() -> Any:
    return digits_stream(image_size=8, class_order=ORDER)


def growing() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU())
    return FeatureClassifier(body, TaskwiseLinearHead(32, freeze_old=False))


def fixed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


def der(model: nn.Module, *plugins: Any, kind: type = ResumableDER, **settings: Any) -> Any:
    common = {"train_mb_size": 32, "train_epochs": 1, "eval_mb_size": 256, "evaluator": None, **settings}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return kind(model=model, optimizer=optimizer, plugins=[FreshOptimizerPlugin(), *plugins], **common)


def train(strategy: Any, experiences: Any) -> Any:
    for experience in experiences:
        torch.manual_seed(int(experience.current_experience))
        strategy.train(experience, eval_streams=[])
    return strategy


class Steps(SupervisedPlugin):
    """What the loss is made of, at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        loss = float(strategy.loss)
        self.seen.append((loss, strategy.mb_output.detach().clone(), strategy.mb_y.clone(), strategy.batch_logits))


def by_loops(output: torch.Tensor, stored: torch.Tensor) -> float:
    """The mean over images and classes that have an output now; what was not stored counts as 0."""
    squares = []
    for now, before in zip(output.tolist(), stored.tolist(), strict=True):
        for c, value in enumerate(now):
            if value > -1000:
                squares.append((value - (before[c] if c < len(before) else 0.0)) ** 2)
    return sum(squares) / len(squares)


def test_avalanche_s_der_does_not_survive_growth(digits: Any) -> None:
    """The reason for a loss of our own."""
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        train(der(growing(), kind=DER, mem_size=40), digits.train[:2])


def test_distance_of_logits() -> None:
    torch.manual_seed(0)
    output, stored = torch.randn(4, 6), torch.randn(4, 3)
    output[:, 4] = UNSEEN_LOGIT
    assert float(logit_distance(output, stored)) == pytest.approx(by_loops(output, stored))
    assert float(logit_distance(output[:, :3], stored)) == pytest.approx(float(F.mse_loss(output[:, :3], stored)))
    half = output.bfloat16().requires_grad_()
    loss = logit_distance(half, stored)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad is not None
    assert torch.equal(half.grad[:, 4], torch.zeros(4, dtype=torch.bfloat16))
    assert logit_distance(output.double(), stored.double()).dtype == torch.float64


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (0.3, 0.0), (0.0, 0.5)])
def test_the_loss_is_that_of_the_formula(digits: Any, alpha: float, beta: float) -> None:
    steps = Steps()
    train(der(growing(), steps, mem_size=40, batch_size_mem=16, alpha=alpha, beta=beta), digits.train[:3])
    replayed = [step for step in steps.seen if step[3] is not None]
    assert len(replayed) == len(steps.seen) - 7 > 10  # 216 images in the first experience
    for loss, output, targets, stored in replayed:
        count = len(output) - len(stored)
        expected = F.cross_entropy(output[:count], targets[:count])
        expected = expected + alpha * by_loops(output[count:], stored)
        expected = expected + beta * F.cross_entropy(output[count:], targets[count:])
        assert loss == pytest.approx(float(expected), rel=1e-4)
        assert len(stored) in (16, 8)  # 40 images in batches of 16


def test_with_a_fixed_classifier_the_loss_is_avalanche_s(digits: Any) -> None:
    """Its loop and ours on the same batch, stored images in front there and at the end here."""
    ours = train(der(fixed(), mem_size=40), digits.train[:1])
    theirs = train(der(fixed(), kind=DER, mem_size=40), digits.train[:1])
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    stored, current = (torch.randn(8, 3, 8, 8), torch.arange(8)), (torch.randn(32, 3, 8, 8), torch.arange(32) % 10)
    logits = torch.randn(8, 10)
    found = {}
    for strategy, parts in ((ours, (current, stored)), (theirs, (stored, current))):
        images, labels = (torch.cat([part[k] for part in parts]) for k in (0, 1))
        strategy.is_training, strategy.experience = True, digits.train[1]
        strategy.batch_logits, strategy.batch_size_mem = logits, 8
        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.0)
        strategy._replaying, strategy.plugins = False, []
        strategy.replay_loader = iter([(images[:0], labels[:0], labels[:0], logits)])
        strategy.dataloader = [[images, labels, torch.zeros_like(labels)]]
        strategy.training_epoch()
        found[type(strategy)] = (float(strategy.loss), [p.grad.clone() for p in strategy.model.parameters()])
    (loss, gradients), (expected, wanted) = found[ResumableDER], found[DER]
    assert loss == pytest.approx(expected, rel=1e-6) and loss > 0.1
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_stored_logits_are_those_of_the_end_of_the_experience(digits: Any) -> None:
    """Kept as they were through later experiences; 0 for classes without an output then."""
    strategy = der(growing(), mem_size=40)
    said: dict[tuple[int, int], torch.Tensor] = {}
    for n, experience in enumerate(digits.train[:3]):
        train(strategy, [experience])
        buffer = strategy.storage_policy
        strategy.model.eval()
        for row, (origin, position) in enumerate(buffer.places.tolist()):
            if origin == n:
                image = digits.train[n].dataset.eval()[position][0]
                with torch.no_grad():
                    said[origin, position] = strategy.model(image[None])[0]
            expected = said[origin, position]
            expected = torch.where(expected > -1000, expected, 0.0)
            found = buffer.logits[row]
            torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert not found[len(expected) :].any()
    assert buffer.logits.shape == (40, 10) and buffer.labels.unique().tolist() == sorted(ORDER[:6])
    assert buffer.labels.bincount()[ORDER[:6]].min() >= 6


def test_an_evaluation_of_unseen_classes_changes_nothing(digits: Any) -> None:
    """It widens the output, by columns that no loss may count."""
    runs = []
    for evaluated in (False, True):
        strategy = der(growing(), mem_size=40)
        for experience in digits.train[:3]:
            if evaluated:
                strategy.eval(digits.test)
            train(strategy, [experience])
        runs.append(torch.cat([p.flatten() for p in strategy.model.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


def test_a_small_buffer_replays_too(digits: Any) -> None:
    """Avalanche's own code replays nothing with fewer images than a batch has."""
    steps = Steps()
    train(der(growing(), steps, mem_size=4), digits.train[:2])
    assert {None if s[3] is None else len(s[3]) for s in steps.seen} == {None, 4}


def test_bf16_stores_and_compares_in_float32(digits: Any) -> None:
    steps = Steps()
    strategy = train(der(growing(), steps, MixedPrecisionPlugin("bf16"), mem_size=40), digits.train[:2])
    loss, output, targets, stored = steps.seen[-1]
    count = len(output) - len(stored)
    assert output.dtype == torch.bfloat16 and strategy.storage_policy.logits.dtype == stored.dtype == torch.float32
    expected = 0.1 * by_loops(output[count:].float(), stored)
    expected += float(F.cross_entropy(output[:count].float(), targets[:count]))
    expected += 0.5 * float(F.cross_entropy(output[count:].float(), targets[count:]))
    assert loss == pytest.approx(expected, rel=0.02)


def test_workers_load_stored_images_too(digits: Any) -> None:
    alone, with_workers = (der(growing(), mem_size=40) for _ in range(2))
    for experience in digits.train[:2]:
        for strategy, workers in ((alone, 0), (with_workers, 2)):
            torch.manual_seed(1)
            strategy.train(experience, eval_streams=[], num_workers=workers)
    states = [torch.cat([p.flatten() for p in s.model.parameters()]) for s in (alone, with_workers)]
    assert torch.equal(*states)


def test_refusals(digits: Any) -> None:
    for wrong, message in (
        ({"alpha": -0.1}, "alpha is -0.1; 0 and above"),
        ({"beta": -1}, "beta is -1; 0 and above"),
        ({"batch_size_mem": 0}, "batch_size_mem is 0; 1 and above, or None"),
        ({"mem_size": 0}, "mem_size is 0; 1 and above"),
    ):
        with pytest.raises(ValueError, match=message):
            der(growing(), **wrong)
    with pytest.raises(ValueError, match="another plugin has put a loader of its own in place"):
        train(der(growing(), ReplayPlugin(40)), digits.train[:2])
