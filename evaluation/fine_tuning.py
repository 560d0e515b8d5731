"""Adaptation by fine-tuning: how good is a representation as a starting point, not as it stands.

A copy of the model gets a fresh linear classifier for the classes of one task and is trained on the adaptation data,
all parameters. The rate is chosen on a held-out part of that data, then training starts again on all of it. Every
choice that is random (classifier, order of the batches, dropout, split) depends on the seed alone, so two
representations are adapted in the same way. Cost: ``(rates + 1) * epochs`` passes over the adaptation data (``epochs``
with one rate), and one copy of the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from avalanche.models import MultiTaskModule
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models.contrastive import ContrastiveClassifier
from avalanche_firn.models.parts import FeatureClassifier, find_parts
from avalanche_firn.plugins.random_state import private_random_state

Head = tuple[Tensor, Tensor]


class _Classifier(nn.Linear):
    """A linear layer in the place of any classifier, whatever arguments that one took."""

    def forward(self, input: Tensor, *unused: Any, **task_labels: Any) -> Tensor:
        return super().forward(input)


def adapted_copy(model: nn.Module, weight: Tensor, bias: Tensor, *, head_name: str | None = None) -> nn.Module:
    """A deep copy whose classifier is replaced by the linear one given, every parameter trainable.

    :param weight: ``(K, d)``. :param bias: ``(K,)``.
    """
    parts = find_parts(model, head_name)
    duplicate: nn.Module = copy.deepcopy(model)
    size = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    head = nn.utils.skip_init(_Classifier, **size, device=weight.device, dtype=weight.dtype)  # draws nothing
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    if isinstance(duplicate, ContrastiveClassifier):  # in training it gives projections and no logits
        duplicate = FeatureClassifier(duplicate.backbone, duplicate.head)
    above, _, last = parts.head_name.rpartition(".")
    nn.Module.__setattr__(duplicate.get_submodule(above), last, head)  # Avalanche's as_multitask redirects its own
    for parameter in duplicate.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return duplicate


def random_head(num_classes: int, feature_size: int, seed: int, like: Tensor) -> Head:
    """Weights ``(K, d)`` and biases ``(K,)`` uniform in ``±1 / sqrt(d)``, as ``nn.Linear`` draws them."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(feature_size)
    weight = torch.empty(num_classes, feature_size).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(num_classes).uniform_(-bound, bound, generator=generator)
    return weight.to(like), bias.to(like)


@torch.enable_grad()
def fine_tune(
    model: nn.Module,
    head: Head,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 32,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mode: Literal["train", "eval"] = "train",
    seed: int = 0,
    task_label: int = 0,
    head_name: str | None = None,
) -> nn.Module:
    """Train a copy of ``model`` with ``head`` on it by SGD with a cosine to 0 per step; ``model`` stays as it is.

    A single sample that is left over joins the batch before it: BatchNorm can't be trained on one.

    :param images: ``(N, ...)`` on the model's device. :param labels: ``(N,)``, rows of ``head``.
    :param mode: of the backbone while training: ``"train"``, or ``"eval"`` (fixed BatchNorm statistics, no dropout).
    :param seed: of the order of the batches and of dropout; the global generators stay as they are.
    :returns: the trained copy, in evaluation mode.
    """
    tuned = adapted_copy(model, *head, head_name=head_name)
    tuned.train(mode == "train")
    optimizer = torch.optim.SGD(tuned.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    sizes = _batch_sizes(len(images), batch_size)
    step, steps = 0, epochs * len(sizes)
    with private_random_state(seed):
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=order).to(images.device).split(sizes):
                for group in optimizer.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss = F.cross_entropy(_logits(tuned, images[batch], task_label), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    return tuned.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 256, task_label: int = 0) -> Tensor:
    """Rows with the largest logit ``(N,)``; -1 (never right) where a logit is NaN."""
    found = []
    for batch in images.split(batch_size):
        best, row = _logits(model, batch, task_label).max(1)
        found.append(torch.where(best.isnan(), -1, row))
    return torch.cat(found)


def choose_rate(
    model: nn.Module,
    heads: dict[str, Head],
    images: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    split: tuple[np.ndarray, np.ndarray],
    **settings: Any,
) -> float:
    """The rate with the best accuracy on the held-out part of the adaptation data, the smallest of equals.

    :param heads: ``"part"``: the starting classifier for the training part. :param split: indices, training and
        held-out, of :func:`~avalanche_firn.evaluation.probes.holdout_split`. :param settings: of :func:`fine_tune`.
    """
    train, held = (torch.from_numpy(indices).to(labels.device) for indices in split)
    hits = []
    for rate in sorted(rates):
        tuned = fine_tune(model, heads["part"], images[train], labels[train], lr=rate, **settings)
        predicted = predict(tuned, images[held], task_label=settings.get("task_label", 0))
        hits.append((predicted == labels[held]).sum())
    counts = torch.stack(hits).tolist()
    return sorted(rates)[counts.index(max(counts))]


def _batch_sizes(samples: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (samples // batch_size)
    rest = samples % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def _logits(model: nn.Module, images: Tensor, task_label: int) -> Tensor:
    # given a tensor of labels, Avalanche's own forward pads the logits of a task with zeros, which would compete
    padded = type(model).forward is MultiTaskModule.forward
    labels = task_label if padded else torch.full((len(images),), task_label, device=images.device)
    logits = avalanche_forward(model, images, labels)
    return logits if logits.dtype == torch.float64 else logits.float()


__all__ = ["adapted_copy", "choose_rate", "fine_tune", "predict", "random_head"]
