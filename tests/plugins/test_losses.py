"""Local losses against a loop and golden numbers, and their guards inside Avalanche."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from avalanche_firn.plugins.losses import (
    LocalCrossEntropy,
    LocalSymmetricCrossEntropy,
    local_cross_entropy,
    local_symmetric_cross_entropy,
)


def strategy(*classes):
    return SimpleNamespace(
        experience=SimpleNamespace(classes_in_this_experience=set(classes)), device=torch.device("cpu")
    )


def by_loop(logits, targets, classes):
    losses = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target in classes:
            losses.append(math.log(sum(math.exp(row[c]) for c in classes)) - row[target])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [[0], [1, 4], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_equals_the_loop_and_masking(classes):
    generator = torch.Generator().manual_seed(len(classes))
    logits = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 6, (40,), generator=generator)
    targets[0] = classes[0]
    loss = local_cross_entropy(logits, targets, torch.tensor(classes))
    assert loss.item() == pytest.approx(by_loop(logits, targets, classes), abs=1e-12)
    inside = torch.isin(targets, torch.tensor(classes))
    masked = torch.full_like(logits, -math.inf)
    masked[:, classes] = logits[:, classes]
    torch.testing.assert_close(loss, F.cross_entropy(masked[inside], targets[inside]), rtol=0, atol=1e-12)


def test_no_gradient_for_other_classes():
    logits = torch.randn(5, 6, requires_grad=True)
    local_cross_entropy(logits, torch.tensor([1, 4, 1, 4, 1]), torch.tensor([1, 4])).backward()
    assert (logits.grad[:, [0, 2, 3, 5]] == 0).all() and (logits.grad[:, [1, 4]] != 0).all()


def test_half_precision_logits_give_a_float32_loss():
    assert (
        local_cross_entropy(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), torch.tensor([0, 1])).dtype
        == torch.float32
    )


CRITERIA = {LocalCrossEntropy: local_cross_entropy, LocalSymmetricCrossEntropy: local_symmetric_cross_entropy}


@pytest.mark.parametrize(("criterion", "loss"), CRITERIA.items())
def test_training_is_local_and_evaluation_global(criterion, loss):
    criterion = criterion()
    criterion.before_training_exp(strategy(1, 3))
    logits, targets = torch.randn(4, 5), torch.tensor([1, 3, 3, 1])
    torch.testing.assert_close(criterion(logits, targets), loss(logits, targets, torch.tensor([1, 3])))
    criterion.before_eval(None)
    torch.testing.assert_close(
        criterion(logits, torch.tensor([0, 1, 2, 3])), F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    )
    criterion.after_eval(None)
    torch.testing.assert_close(criterion(logits, targets), loss(logits, targets, torch.tensor([1, 3])))


@pytest.mark.parametrize("kind", CRITERIA)
def test_replayed_targets_are_an_error_at_the_first_batch_and_at_the_end_of_an_epoch(kind):
    criterion = kind()
    criterion.before_training_exp(strategy(1, 3))
    with pytest.raises(ValueError, match=r"1 training targets are outside .*\[1, 3\]"):
        criterion(torch.randn(2, 5), torch.tensor([1, 0]))
    criterion.before_training_exp(strategy(1, 3))
    criterion(torch.randn(2, 5), torch.tensor([1, 3]))
    criterion(torch.randn(2, 5), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(outside='ignore'\)"):
        criterion.after_training_epoch(None)
    tolerant = kind(outside="ignore")
    tolerant.before_training_exp(strategy(1, 3))
    logits = torch.randn(2, 5)
    alone = CRITERIA[kind](logits[:1], torch.tensor([1]), torch.tensor([1, 3]))
    torch.testing.assert_close(tolerant(logits, torch.tensor([1, 0])), alone)
    tolerant.after_training_epoch(None)


@pytest.mark.parametrize("case", ["cifar", "imagenet_r", "ce_only"])
def test_golden_symmetric_criterion_among_other_columns(golden, case):
    file = golden("slca", "sce_loss")
    local = torch.from_numpy(file[f"{case}_logits"])
    classes = torch.arange(local.shape[1]) * 2 + 3  # every second class id, others between them
    logits = torch.randn(len(local), int(classes[-1]) + 2, dtype=torch.float64)
    logits[:, classes] = local
    logits.requires_grad_()
    criterion = LocalSymmetricCrossEntropy(float(file[f"{case}_alpha"]), float(file[f"{case}_beta"]))
    criterion.before_training_exp(strategy(*classes.tolist()))
    loss = criterion(logits, classes[torch.from_numpy(file[f"{case}_targets"])])
    assert loss.item() == pytest.approx(float(file[f"{case}_loss"]), rel=0, abs=1e-10)
    loss.backward()
    expected = torch.zeros_like(logits)
    expected[:, classes] = torch.from_numpy(file[f"{case}_grad"])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-10)


def test_half_precision_logits_give_a_float32_symmetric_loss():
    criterion = LocalSymmetricCrossEntropy()
    criterion.before_training_exp(strategy(1, 3))
    logits, targets = torch.randn(4, 5).bfloat16(), torch.tensor([1, 3, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(logits, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, criterion(logits.float(), targets))


@pytest.mark.parametrize("kind", CRITERIA)
def test_bad_settings(kind):
    with pytest.raises(ValueError, match="outside is 'drop'"):
        kind(outside="drop")
    with pytest.raises(ValueError, match="no classes"):
        kind().before_training_exp(strategy())


@pytest.mark.parametrize(
    ("weights", "message"),
    [((-1.0, 0.1), "alpha is -1.0"), ((1.0, math.nan), "beta is nan"), ((0.0, 0.0), "alpha and beta are 0")],
)
def test_bad_weights_of_the_symmetric_criterion(weights, message):
    with pytest.raises(ValueError, match=message):
        LocalSymmetricCrossEntropy(*weights)
