"""What a transfer starts with: tasks in memory, and the classifier of the pre-trained model redrawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from avalanche_firn.models.least_squares import least_squares_head
from avalanche_firn.models.linear_rows import linear_rows
from avalanche_firn.models.parts import evaluation_mode, extract_features, find_parts
from avalanche_firn.plugins.row_resampling import resample_rows_

__all__ = ["HeadStart", "TensorPairs", "TransferTask", "ends_in", "prepare_head", "transfer_tasks"]

HeadStart = Literal["kaiming", "lstsq", "given"]
"""The classifier that a transfer starts with, see :func:`prepare_head`."""


class TransferTask(NamedTuple):
    """Images of one task, in memory: to learn from, in order, and to test on."""

    images: Tensor
    """``(n, C, H, W)`` float, as the model takes them."""
    labels: Tensor
    """``(n,)`` int64."""
    test_images: Tensor
    test_labels: Tensor


def transfer_tasks(train: Iterable[Any], test: Iterable[Any]) -> list[TransferTask]:
    """Tasks from two Avalanche streams, an experience each, under the evaluation transform.

    :raises ValueError: streams of different length, an experience without images.
    """
    pairs = list(zip(train, test, strict=True))
    return [
        TransferTask(*_stacked(a.dataset.eval(), i), *_stacked(b.dataset.eval(), i)) for i, (a, b) in enumerate(pairs)
    ]


def _stacked(dataset: Any, index: int) -> tuple[Tensor, Tensor]:
    if len(dataset) == 0:
        raise ValueError(f"experience {index} has no image; at least one is needed")
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def prepare_head(
    model: nn.Module,
    outputs: int,
    *,
    head: HeadStart = "kaiming",
    generator: torch.Generator | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    head_name: str | None = None,
) -> None:
    """Give a model the classifier that a transfer starts with, in place.

    A ``Linear`` with enough outputs stays the same module (surplus outputs compete); any other classifier that is
    linear in the features is replaced by a ``Linear`` with ``outputs``.

    :param head: ``"kaiming"``: weights from N(0, 2 / features), biases 0 (released code); ``"lstsq"``: least squares on
        ``support``; ``"given"``: as it is, and too few outputs are an error.
    :param support: images ``(N, ...)`` and labels ``(N,)``, for ``"lstsq"``.
    :raises ValueError: a classifier that isn't linear, or a head start that can't be made.
    """
    parts = find_parts(model, head_name)
    rows = linear_rows(parts.head)
    if rows is None:
        raise ValueError(
            f"the classifier is a {type(parts.head).__name__}; one that is linear in the features is accepted"
        )
    if head not in get_args(HeadStart):
        raise ValueError(f"head is {head!r}; 'kaiming', 'lstsq' or 'given' is accepted")
    classifier = parts.head
    enough = isinstance(classifier, nn.Linear) and classifier.out_features >= outputs
    if head == "given":
        if not enough:
            raise ValueError(
                f"head is 'given', but the classifier has no {outputs} outputs; 'kaiming' or 'lstsq' is accepted"
            )
        return
    # what is written into a computed weight would be lost
    enough = enough and not parametrize.is_parametrized(classifier)
    if head == "lstsq" and (support is None or (enough and classifier.bias is None)):
        raise ValueError("head is 'lstsq'; support images and a classifier with biases are needed")
    if not enough:
        like = rows.parameters[0][0]
        # without PyTorch's own start, which would draw from the global generator
        classifier = skip_init(nn.Linear, like.shape[1], outputs, device=like.device, dtype=like.dtype)
        parent, _, name = parts.head_name.rpartition(".")
        setattr(model.get_submodule(parent), name, classifier)
    assert isinstance(classifier, nn.Linear)
    with torch.no_grad():
        if classifier.bias is not None:
            classifier.bias.zero_()
        if head == "kaiming":
            resample_rows_(classifier.weight, list(range(classifier.out_features)), generator=generator)
            return
        assert support is not None
        classifier.weight.zero_()
        features = extract_features(model, TensorPairs(*support), device=classifier.weight.device, head_name=head_name)[
            0
        ]
        weight, bias = least_squares_head(features, support[1], classifier.out_features)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


@torch.no_grad()
def ends_in(model: nn.Module, head: nn.Module, images: Tensor) -> bool:
    """Whether a model returns what its classifier gives as it is, so that the classifier alone can stand for it."""
    given: list[Any] = []
    handle = head.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        with evaluation_mode(model):
            output = model(images)
    finally:
        handle.remove()
    return bool(given) and given[-1] is output


class TensorPairs:
    """Tensors as a data set of pairs."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.cpu(), labels.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
