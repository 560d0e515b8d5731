"""One pass over everything that is evaluated, in place of one loader and one half-filled batch per experience.

Avalanche evaluates experience by experience: each gets a loader of its own (with workers of its own), and its last
batch is smaller than the others. Here all experiences of an evaluation are one sequence of full batches. Plugins and
metrics still see experience by experience: a batch across a border is computed once and handed out in pieces.

It is done only where nothing but rounding can differ (a batch of another size may differ in the last bits): the
strategy's own loop and forward pass, no plugin that acts within the evaluation of an experience, no model whose output
depends on the experience or on the other images of a batch. Elsewhere each experience keeps its own batches. Metrics
are taken to look and not to touch; the images of all experiences have one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.models import DynamicModule, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.problem_type import SupervisedProblem
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from avalanche_firn.benchmarks.batches import JoinedBatches, batched
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.nearest_mean import NearestMeanHead
from avalanche_firn.plugins.fast_hooks import listens
from avalanche_firn.plugins.fast_loader import MemoryBatches, note_iteration

__all__ = ["OnePass", "evaluation_loader", "one_pass_fits", "run_evaluation"]

_ACTS_ON_BATCHES = (
    "before_eval_dataset_adaptation",
    "after_eval_dataset_adaptation",
    "before_eval_exp",
    "before_eval_iteration",
    "before_eval_forward",
    "after_eval_forward",
    "after_eval_iteration",
    "after_eval_exp",
)  # whatever changes images or model there, the outputs of a batch across a border would not know
_STEPS = ("eval_dataset_adaptation", "_eval_exp", "_before_eval_exp", *(f"_{event}" for event in _ACTS_ON_BATCHES[3:]))
_PER_IMAGE = ("autocasts", "per_image")  # forward passes of plugins that leave each image's output what it is
_SAME_FOR_ALL = (TaskwiseLinearHead, NearestMeanHead)  # only the width of their output grows with what is evaluated


def one_pass_fits(strategy: Any, experiences: Any) -> bool:
    """Whether the evaluation of these experiences may be one pass."""
    kind = type(strategy)
    stock = (
        all(getattr(kind, name) is getattr(BaseSGDTemplate, name) for name in _STEPS)
        and kind._unpack_minibatch is SupervisedProblem._unpack_minibatch
        and kind.forward is SupervisedProblem.forward
        and ("forward" not in vars(strategy) or any(hasattr(strategy.forward, mark) for mark in _PER_IMAGE))
    )
    if not stock or not hasattr(experiences, "__len__") or len(experiences) < 2:
        return False
    if not all(len(getattr(experience, "dataset", ())) for experience in experiences):
        return False
    for plugin in strategy.plugins:
        if isinstance(plugin, (EvaluationPlugin, Clock)) or getattr(plugin, "affects_results", True) is False:
            continue
        if any(listens(plugin, event) for event in _ACTS_ON_BATCHES):
            return False
    if any(module.training or _mixes_images(module) for module in strategy.model.modules()):
        return False
    dynamic = [m for m in strategy.model.modules() if isinstance(m, (DynamicModule, MultiTaskModule))]
    return all(type(module) in _SAME_FOR_ALL for module in dynamic)


def _mixes_images(module: nn.Module) -> bool:
    """BatchNorm that knows no statistics but those of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


class OnePass:
    """Full batches over several experiences, handed out piece by piece.

    :param experiences: in the order of their evaluation. :param options: of torch's DataLoader, for data that isn't in
        memory.

    ``mixed`` says that a part of the data is in memory and another isn't; there is nothing to be had then.
    """

    def __init__(self, experiences: Sequence[Any], batch_size: int, device: torch.device, **options: Any) -> None:
        datasets = [experience.dataset.eval() for experience in experiences]
        self.experiences = list(experiences)
        self.batch_size, self.device = batch_size, device
        self.starts = [0]
        for dataset in datasets:
            self.starts.append(self.starts[-1] + len(dataset))
        self.outputs: Tensor | None = None
        self.piece: tuple[Tensor, int, int] | None = None  # the images handed out last, and their place in the batch
        self.mixed = False
        self._next = 0  # of the experiences
        self._held, self._batch = -1, list[Tensor]()
        self._batches = self._load(datasets, options)

    def _load(self, datasets: list[Any], options: dict[str, Any]) -> Iterator[list[Tensor]]:
        found = [batched(dataset) for dataset in datasets]
        parts = [part for part in found if part is not None]
        if len(parts) == len(datasets):
            joined, size = JoinedBatches(parts), self.batch_size
            return (joined.slice(start, min(start + size, len(joined))) for start in range(0, len(joined), size))
        if parts:  # workers can't read what lies on the device, and what is in memory needs none
            self.mixed = True
            return iter(())
        loader: DataLoader[Any] = DataLoader(
            ConcatDataset(datasets),
            self.batch_size,
            collate_fn=getattr(datasets[0], "collate_fn", None),
            generator=torch.Generator(),
            **options,
        )
        return iter(loader)

    def loader(self, experience: Any) -> _Pieces | None:
        """The batches of an experience; None if it isn't the next one of this pass."""
        index = self._next
        if index == len(self.experiences) or not _equal(self.experiences[index], experience):
            return None
        self._next += 1
        return _Pieces(self, self.starts[index], self.starts[index + 1])

    def batch(self, number: int) -> list[Tensor]:
        """A whole batch, on the device; batches are asked for in their order."""
        while self._held < number:
            self._batch = [column.to(self.device, non_blocking=True) for column in next(self._batches)]
            self._held += 1
            self.outputs = None
        if self._held != number:
            raise RuntimeError("the batches of an evaluation were asked for a second time")
        return self._batch

    def forward(self, strategy: Any) -> Any:
        """The outputs of the piece that was handed out last."""
        mine = self.piece is not None and strategy.mbatch[0] is self.piece[0]
        if not mine or self.piece is None or len(self.piece[0]) == len(self._batch[0]):
            return strategy.forward()
        _, start, stop = self.piece
        if self.outputs is None:
            piece, strategy.mbatch = strategy.mbatch, list(self._batch)
            try:
                outputs = strategy.forward()
            finally:
                strategy.mbatch = piece
            if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(self._batch[0]):
                return strategy.forward()
            self.outputs = outputs
        # the output may have widened since, for classes that nobody has trained yet
        classes = getattr(strategy.experience, "classes_in_this_experience", None)  # not all benchmarks know them
        if classes and max(classes) >= self.outputs.shape[1]:
            return strategy.forward()
        return self.outputs[start:stop]


def _equal(known: Any, experience: Any) -> bool:
    """Streams of Avalanche's first generation make their experiences anew whenever they are asked."""
    own = getattr(known, "_dataset", None)
    return known is experience or (own is not None and own is getattr(experience, "_dataset", None))


class _Pieces:
    """One experience's part of the batches."""

    draws_while_iterating = False

    def __init__(self, whole: OnePass, start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop

    def __len__(self) -> int:
        size = self._whole.batch_size
        return (self._stop - 1) // size - self._start // size + 1

    def __iter__(self) -> Iterator[list[Tensor]]:
        note_iteration()
        whole, size, place = self._whole, self._whole.batch_size, self._start
        while place < self._stop:
            number, first = divmod(place, size)
            last = min(size, self._stop - number * size)
            batch = whole.batch(number)
            piece = [column[first:last] for column in batch] if last - first < len(batch[0]) else list(batch)
            whole.piece = (piece[0], first, last)
            yield piece
            place = number * size + last


def evaluation_loader(strategy: Any) -> MemoryBatches | None:
    """Batches of the experience being evaluated, if its data is in memory."""
    data = batched(strategy.adapted_dataset)
    return None if data is None else MemoryBatches(data, strategy.eval_mb_size, shuffle=False)


def run_evaluation(strategy: Any, whole: OnePass | None, **kwargs: Any) -> None:
    """Avalanche's evaluation loop over one experience, with outputs that may come from a larger batch."""
    for batch in strategy.dataloader:
        strategy.mbatch = batch
        strategy._unpack_minibatch()
        strategy._before_eval_iteration(**kwargs)
        strategy._before_eval_forward(**kwargs)
        strategy.mb_output = strategy.forward() if whole is None else whole.forward(strategy)
        strategy._after_eval_forward(**kwargs)
        strategy.loss = strategy.criterion()
        strategy._after_eval_iteration(**kwargs)
