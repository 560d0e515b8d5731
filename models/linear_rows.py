"""The rows of a linear classifier by class id, whatever module holds them.

A classifier that was solved for in closed form has to be written into the head that the model has: a plain ``Linear``,
Avalanche's growing or multi-head classifiers, or one linear layer per task. :func:`linear_rows` finds where the row of
each class lies; reading and writing happen in place, so optimizers keep their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from torch import Tensor, nn

from avalanche_firn.models.heads import TaskwiseLinearHead


@dataclass(frozen=True)
class _Segment:
    weight: Tensor
    bias: Tensor | None
    rows: list[int]  # of the parameters
    positions: list[int]  # in the list of classes


class LinearRows:
    """Rows of a linear classifier, in the order of ``class_ids``.

    Made by :func:`linear_rows`; valid until the head grows.
    """

    def __init__(self, class_ids: Sequence[int], segments: Sequence[_Segment], init_std: float | None = None) -> None:
        self.class_ids = tuple(class_ids)
        self._segments = list(segments)
        self._init_std = init_std

    @property
    def has_bias(self) -> bool:
        """Whether the classifier adds a bias."""
        return all(segment.bias is not None for segment in self._segments)

    @property
    def parameters(self) -> list[tuple[Tensor, Tensor | None, list[int]]]:
        """Weight, bias and the positions of the rows in them, per parameter that holds some of the classes."""
        return [(segment.weight, segment.bias, list(segment.rows)) for segment in self._segments]

    @torch.no_grad()
    def read(self) -> tuple[Tensor, Tensor]:
        """Copies of weights ``(C, d)`` and biases ``(C,)`` (zeros where there is no bias)."""
        like = self._segments[0].weight
        weight = like.new_empty(len(self.class_ids), like.shape[1])
        bias = like.new_zeros(len(self.class_ids))
        for segment in self._segments:
            weight[segment.positions] = segment.weight[segment.rows]
            if segment.bias is not None:
                bias[segment.positions] = segment.bias[segment.rows]
        return weight, bias

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor) -> None:
        """Write ``(C, d)`` and ``(C,)`` into the parameters, in place; no other row changes.

        :raises ValueError: wrong shapes, or a bias that the classifier cannot hold.
        """
        expected = (len(self.class_ids), self._segments[0].weight.shape[1])
        if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:1]:
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; {expected} and {expected[:1]} are accepted"
            )
        if not self.has_bias and bool(bias.any()):
            raise ValueError("bias is not zero; the classifier has no bias to write it to")
        for segment in self._segments:
            segment.weight[segment.rows] = weight[segment.positions].to(segment.weight)
            if segment.bias is not None:
                segment.bias[segment.rows] = bias[segment.positions].to(segment.bias)

    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh random weights ``(C, d)`` and biases ``(C,)`` as the head itself draws them, on the CPU.

        PyTorch's ``Linear``: uniform in ``±1 / sqrt(d)`` for both. ``TaskwiseLinearHead``: truncated normal, no bias.
        """
        count, width = len(self.class_ids), self._segments[0].weight.shape[1]
        if self._init_std is not None:
            weight = torch.empty(count, width)
            nn.init.trunc_normal_(weight, std=self._init_std, generator=generator)
            return weight, torch.zeros(count)
        bound = 1 / math.sqrt(width)
        weight = torch.empty(count, width).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(count).uniform_(-bound, bound, generator=generator)
        return weight, bias if self.has_bias else torch.zeros(count)


def linear_rows(head: nn.Module, class_ids: Sequence[int] | None = None, *, task_label: int = 0) -> LinearRows | None:
    """Where the rows of classes lie in a classifier; None if the classifier is not linear in the features.

    :param head: ``nn.Linear``, ``IncrementalClassifier``, ``MultiHeadClassifier``, or ``TaskwiseLinearHead``.
    :param class_ids: original class ids; None = every row that there is.
    :param task_label: which head of a ``MultiHeadClassifier``.
    :raises ValueError: a class has no row.
    """
    if isinstance(head, TaskwiseLinearHead):
        known = {c: column for column, c in enumerate(head.known_classes)}
        ids = list(head.known_classes) if class_ids is None else [int(c) for c in class_ids]
        _check_known(ids, known, head)
        borders = torch.tensor([0, *(w.shape[0] for w in head.weights)]).cumsum(0).tolist()
        segments = []
        for task, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True)):
            inside = [(p, known[c]) for p, c in enumerate(ids) if borders[task] <= known[c] < borders[task + 1]]
            if inside:
                rows = [column - borders[task] for _, column in inside]
                segments.append(_Segment(weight, bias, rows, [p for p, _ in inside]))
        return LinearRows(ids, segments, head.init_std)
    if isinstance(head, MultiHeadClassifier):
        if str(task_label) not in head.classifiers:
            raise ValueError(
                f"task_label is {task_label}; the MultiHeadClassifier has heads for {sorted(head.classifiers)}"
            )
        head = head.classifiers[str(task_label)]
    if isinstance(head, IncrementalClassifier):
        head = head.classifier
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None  # subclasses may normalise their weights or inputs
    ids = list(range(head.out_features)) if class_ids is None else [int(c) for c in class_ids]
    _check_known(ids, range(head.out_features), head)
    return LinearRows(ids, [_Segment(head.weight, head.bias, ids, list(range(len(ids))))])


def _check_known(ids: Sequence[int], known: object, head: nn.Module) -> None:
    absent = [c for c in ids if c not in known]  # type: ignore[operator]
    if absent or not ids:
        raise ValueError(
            f"class_ids {absent or list(ids)}: the {type(head).__name__} has no row for them; rows exist for "
            f"{len(known)} classes"  # type: ignore[arg-type]
        )


__all__ = ["LinearRows", "linear_rows"]
