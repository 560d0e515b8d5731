"""Rows of a classifier by class id, in every module that holds them."""

import pytest
import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from torch import nn

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.linear_rows import linear_rows


def taskwise():
    head = TaskwiseLinearHead(3)
    head.add_task([4, 1])
    head.add_task([0])
    head.add_task([7, 2, 3])
    return head


def multi_head():
    head = MultiHeadClassifier(3, 6, masking=False)
    head.classifiers["2"] = IncrementalClassifier(3, 8, masking=False)
    head.max_class_label = 8
    return head


HEADS = {
    "linear": (lambda: nn.Linear(3, 8), 0),
    "without bias": (lambda: nn.Linear(3, 8, bias=False), 0),
    "incremental": (lambda: IncrementalClassifier(3, 8), 0),
    "multi-head": (multi_head, 2),
    "taskwise": (taskwise, 0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_writes_what_the_head_computes_with(kind):
    build, label = HEADS[kind]
    torch.manual_seed(0)
    head = build()
    ids = [7, 1, 0, 2]
    rows = linear_rows(head, ids, task_label=label)
    parameters = list(head.parameters())
    before = [p.detach().clone() for p in parameters]
    weight, bias = torch.randn(4, 3), torch.randn(4) if rows.has_bias else torch.zeros(4)
    rows.write(weight, bias)
    assert all(p is q for p, q in zip(parameters, head.parameters(), strict=True))  # in place
    read = rows.read()
    assert torch.equal(read[0], weight) and torch.equal(read[1], bias)
    read[0].zero_()  # a copy
    assert torch.equal(rows.read()[0], weight)

    x = torch.randn(5, 3)
    if kind == "multi-head":
        logits = head(x, torch.full((5,), 2))
    elif kind == "taskwise":
        logits = head.scatter(head(x), 8)
    else:
        logits = head.eval()(x) if kind != "incremental" else nn.functional.linear(x, *parameters)
    torch.testing.assert_close(logits[:, ids], x @ weight.T + bias)
    # no other row moved
    everything = linear_rows(head, task_label=label)
    others = [c for c in everything.class_ids if c not in ids]
    fresh = build()
    for p, old in zip(fresh.parameters(), before, strict=True):
        p.data.copy_(old)
    kept = linear_rows(fresh, others, task_label=label).read()
    now = linear_rows(head, others, task_label=label).read()
    assert torch.equal(kept[0], now[0]) and torch.equal(kept[1], now[1])


def test_fresh_rows_are_drawn_as_the_head_draws_them():
    torch.manual_seed(0)
    weight, bias = linear_rows(nn.Linear(400, 50)).initial(torch.Generator().manual_seed(1))
    assert weight.shape == (50, 400) and float(weight.abs().max()) <= 0.05 and float(bias.abs().max()) <= 0.05
    assert float(weight.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert not linear_rows(nn.Linear(4, 5, bias=False)).initial(torch.Generator())[1].any()
    head = TaskwiseLinearHead(400)
    head.add_task(range(50))
    weight, bias = linear_rows(head).initial(torch.Generator().manual_seed(1))
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02) and not bias.any()
    again = linear_rows(head).initial(torch.Generator().manual_seed(1))[0]
    assert torch.equal(weight, again)


class Normalised(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x))


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(3, 3)), Normalised(3, 3), nn.Identity()])
def test_other_heads_have_no_rows(head):
    assert linear_rows(head) is None


def test_errors():
    with pytest.raises(ValueError, match=r"class_ids \[9\]: the Linear has no row for them; rows exist for 8"):
        linear_rows(nn.Linear(3, 8), [1, 9])
    with pytest.raises(ValueError, match=r"class_ids \[5\]: the TaskwiseLinearHead"):
        linear_rows(taskwise(), [5, 4])
    with pytest.raises(ValueError, match="the TaskwiseLinearHead has no row"):
        linear_rows(TaskwiseLinearHead(3))
    with pytest.raises(ValueError, match="task_label is 1; the MultiHeadClassifier has heads for"):
        linear_rows(multi_head(), [0], task_label=1)
    rows = linear_rows(nn.Linear(3, 8, bias=False), [0, 1])
    with pytest.raises(ValueError, match=r"weight \(2, 4\)"):
        rows.write(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="bias is not zero"):
        rows.write(torch.zeros(2, 3), torch.ones(2))
