"""Train a classifier module by SGD on features that are given, for heads whose rows cannot be solved for.

Used by :class:`~avalanche_firn.plugins.linear_probe.LinearProbePlugin` with ``solver="sgd"`` for classifiers with
hidden layers, normalised weights or several heads, and where every epoch sees new augmented views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models.finite_values import NonFiniteValues


def stable_rate(features: Tensor, l2: float) -> float:
    """Half the largest stable gradient step of a linear softmax classifier, ``1 / (lambda_max / 2 + l2)``.

    :param features: ``(N, d)``. ``lambda_max``: largest eigenvalue of the second-moment matrix of ``(features, 1)``,
        since the classifier's bias is trained too; the softmax adds the factor 1/2.
    """
    extended = F.pad(features.detach().double(), (0, 1), value=1.0)
    small = extended.T @ extended if extended.shape[1] <= len(extended) else extended @ extended.T
    largest = float(torch.linalg.eigvalsh(small.cpu() / len(extended))[-1])
    return 0.5 / (0.5 * largest + l2)


def head_logits(head: nn.Module, features: Tensor, task_label: int) -> Tensor:
    """Logits of a classifier ``(N, C)``; multi-head ones get the task label, half-precision ones features of theirs."""
    features = features.to(next((p.dtype for p in head.parameters()), features.dtype))
    return avalanche_forward(head, features, torch.full((len(features),), task_label, device=features.device))


@torch.enable_grad()
def train_head(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    *,
    classes: Sequence[int] | None = None,
    task_label: int = 0,
    l2: float = 0.0,
    lr: float | None = None,
    momentum: float = 0.9,
    epochs: int = 20,
    batch_size: int = 128,
    generator: torch.Generator,
    fresh_features: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Minimise cross-entropy plus ``l2 / 2 * ||weights||^2`` over the trainable parameters of ``head``, in place.

    :param features: ``(N, d)``. :param targets: ``(N,)`` class ids, columns of the head's output.
    :param classes: compare these columns only; None: all.
    :param l2: on tensors with two or more dimensions. :param lr: cosine to 0; None: :func:`stable_rate`.
    :param generator: on the CPU, orders the batches; dropout in the head draws from the global generators.
    :param fresh_features: gives the features of every epoch but the first.
    :raises ValueError: nothing in the head is trainable, or the loss is not finite at the end.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"the classifier {type(head).__name__} has no trainable parameter")
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": l2},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    first = stable_rate(features, l2) if lr is None else lr
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=first, momentum=momentum)
    columns = None if classes is None else torch.tensor(sorted(classes), device=features.device)
    mode = head.training
    head.train()
    total = epochs * math.ceil(len(features) / batch_size)
    step, loss = 0, features.new_zeros(())
    try:
        for epoch in range(epochs):
            if epoch and fresh_features is not None:
                features, targets = fresh_features()
            order = torch.randperm(len(features), generator=generator).to(features.device)
            for batch in order.split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = first * 0.5 * (1 + math.cos(math.pi * step / total))
                logits = head_logits(head, features[batch], task_label)
                wanted = targets[batch]
                if columns is not None:
                    logits, wanted = logits[:, columns], torch.searchsorted(columns, wanted)
                loss = F.cross_entropy(logits, wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    finally:
        head.train(mode)
        for parameter in parameters:
            parameter.grad = None
    if not bool(torch.isfinite(loss)):
        raise NonFiniteValues(
            f"the loss of the linear probe became {float(loss)} at lr={first:g}; a smaller lr is needed"
        )


__all__ = ["head_logits", "stable_rate", "train_head"]
