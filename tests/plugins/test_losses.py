"""Local cross-entropy against a loop, and its guards inside Avalanche."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from avalanche_firn.plugins.losses import LocalCrossEntropy, local_cross_entropy


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


def test_training_is_local_and_evaluation_global():
    criterion = LocalCrossEntropy()
    criterion.before_training_exp(strategy(1, 3))
    logits, targets = torch.randn(4, 5), torch.tensor([1, 3, 3, 1])
    torch.testing.assert_close(criterion(logits, targets), local_cross_entropy(logits, targets, torch.tensor([1, 3])))
    criterion.before_eval(None)
    torch.testing.assert_close(
        criterion(logits, torch.tensor([0, 1, 2, 3])), F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    )
    criterion.after_eval(None)
    torch.testing.assert_close(criterion(logits, targets), local_cross_entropy(logits, targets, torch.tensor([1, 3])))


def test_replayed_targets_are_an_error_at_the_first_batch_and_at_the_end_of_an_epoch():
    criterion = LocalCrossEntropy()
    criterion.before_training_exp(strategy(1, 3))
    with pytest.raises(ValueError, match=r"1 training targets are outside .*\[1, 3\]"):
        criterion(torch.randn(2, 5), torch.tensor([1, 0]))
    criterion.before_training_exp(strategy(1, 3))
    criterion(torch.randn(2, 5), torch.tensor([1, 3]))
    criterion(torch.randn(2, 5), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="outside='ignore'"):
        criterion.after_training_epoch(None)
    tolerant = LocalCrossEntropy(outside="ignore")
    tolerant.before_training_exp(strategy(1, 3))
    assert torch.isfinite(tolerant(torch.randn(2, 5), torch.tensor([1, 0])))
    tolerant.after_training_epoch(None)


def test_bad_settings():
    with pytest.raises(ValueError, match="outside is 'drop'"):
        LocalCrossEntropy(outside="drop")
    with pytest.raises(ValueError, match="no classes"):
        LocalCrossEntropy().before_training_exp(strategy())
