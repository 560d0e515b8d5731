"""DER and DER++ (Dark Experience Replay, arXiv 2004.07211): Avalanche's strategy for a classifier that grows.

Beside the cross-entropy of the current images, stored ones are held to the logits that they had when their experience
ended (``alpha``), and to their labels (``beta``; above 0 this is DER++). ``ResumableDER`` is Avalanche's ``DER``, whose
hyper-parameters, storage rule and moment of storing it keeps. What differs, and why:

- **Logits that are compared.** Avalanche takes the mean square over all outputs. Once a head has grown, stored rows are
  shorter than present ones, and an output without a class holds a huge negative number: its code stops with "size of
  tensor a must match". Here the mean is over the classes that have an output now, and a class that had none when the
  image was stored counts as logit 0, which is what a fresh output says: without that, nothing but ``beta`` would keep
  new classes from taking old images over. With a head that has all classes from the start this is Avalanche's loss.
- **Loader.** Stored images come from the loader of the current ones, with its workers (Avalanche: a loader of their
  own, whose workers start anew with every pass over the buffer), and one batch is drawn as long as anything is stored
  (Avalanche replays nothing, without a word, while the buffer holds fewer images than a batch).
- **What is stored.** Places in the stream and logits; only images that enter the buffer are passed through the model
  for them (Avalanche: the whole experience). Forward pass and loss follow the strategy's mixed precision, the loss and
  the stored logits in float32; Avalanche's are outside autocast.

As in Avalanche, and unlike the paper's code: one forward pass for current and stored images, one batch of these for
both terms, logits at the end of an experience and under the evaluation transform. Cost: twice the images per step.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.models.utils import avalanche_forward
from avalanche.training.supervised import DER
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from avalanche_firn.benchmarks.batches import WholeBatches, batched, loader_of
from avalanche_firn.models.parts import evaluation_mode
from avalanche_firn.plugins.avalanche_state import autocast_of
from avalanche_firn.plugins.finite_words import listed, nonfinite_stop
from avalanche_firn.plugins.placed_buffer import PlacedBuffer

_MASKED = -1000.0  # of outputs without a class in Avalanche's IncrementalClassifier; TaskwiseLinearHead's are below


class LogitBuffer(PlacedBuffer):
    """Class-balanced places with the logits of their images.

    :param max_size: images in all.
    """

    def __init__(self, max_size: int = 200) -> None:
        super().__init__(max_size, "class_balanced")
        self.logits = torch.empty(0, 0)
        """``(M, C)``, by class id; 0 for classes that had no output when the image was stored."""

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Let the buffer see the experience of a strategy, and store what its model says now."""
        row_of = {place: row for row, place in enumerate(map(tuple, self.places.tolist()))}
        before = self.logits
        self.post_adapt(strategy, strategy.experience)
        new = self.places[:, 0] == int(strategy.experience.current_experience)
        positions = self.places[new, 1].tolist()
        data = strategy.experience.dataset.eval().subset(positions)
        outputs = _outputs(strategy, data, int(kwargs.get("num_workers", 0))) if positions else before[:0]
        if not bool(outputs.isfinite().all()):
            classes = self.labels[new][~outputs.isfinite().all(1)].unique().tolist()
            what = f"those of class {listed(classes, 10)} aren't finite"
            raise nonfinite_stop(strategy, "the stored logits of DER", what, "A smaller rate, or fp32, usually helps.")
        self.logits = outputs.new_zeros(len(self.places), max(before.shape[1], outputs.shape[1]))
        self.logits[new, : outputs.shape[1]] = outputs
        kept = [row_of[tuple(place)] for place in self.places[~new].tolist()]
        self.logits[~new, : before.shape[1]] = before[kept].to(outputs.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Places and logits."""
        return {**super().state_dict(), "logits": self.logits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.logits = state["logits"].clone()


class ResumableDER(DER):
    """DER, with ``beta`` above 0 DER++; any model with one classifier, growing or not.

    :param mem_size: images stored, in equal shares of the classes seen. 200: Avalanche's default.
    :param batch_size_mem: stored images per batch; None: as many as current ones (Avalanche's default).
    :param alpha: weight of the squared differences of logits, 0.1, and
    :param beta: of the cross-entropy of stored images, 0.5: Avalanche's defaults, the paper's for CIFAR-10 and 200
        images.
    :raises ValueError: settings out of range; a stream whose experiences can't be looked up again; another plugin puts
        a loader of its own in place.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    mbatch: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        mem_size: int = 200,
        batch_size_mem: int | None = None,
        alpha: float = 0.1,
        beta: float = 0.5,
        **base_kwargs: Any,
    ) -> None:
        for field, value in (("alpha", alpha), ("beta", beta)):
            if not value >= 0:
                raise ValueError(f"{field} is {value}; 0 and above is accepted")
        if batch_size_mem is not None and batch_size_mem < 1:
            raise ValueError(f"batch_size_mem is {batch_size_mem}; 1 and above, or None, is accepted")
        super().__init__(
            model=model,
            optimizer=optimizer,
            mem_size=mem_size,
            batch_size_mem=batch_size_mem,
            alpha=alpha,
            beta=beta,
            **base_kwargs,
        )
        self.storage_policy = LogitBuffer(mem_size)
        self.batch_logits: Tensor | None = None  # of the stored images at the end of the batch, (B, C)
        self._replaying = False

    def make_train_dataloader(
        self, num_workers: int = 0, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """Current images, then stored ones, in one loader; the template's where nothing is stored."""
        self.storage_policy.open(self.experience)
        stored = self.storage_policy.buffer
        self._replaying, self.batch_logits = len(stored) > 0, None
        if not self._replaying:
            super().make_train_dataloader(num_workers=num_workers, shuffle=shuffle, drop_last=drop_last, **kwargs)
            return
        self.dataloader = ReplayDataLoader(
            _Numbered(self.adapted_dataset),
            _Numbered(stored, stored=True),
            oversample_small_tasks=True,
            batch_size=self.train_mb_size,
            batch_size_mem=min(self.batch_size_mem, len(stored)),
            task_balanced_dataloader=False,
            num_workers=num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            persistent_workers=bool(num_workers and kwargs.get("persistent_workers", False)),
            pin_memory=bool(kwargs.get("pin_memory", self.device.type == "cuda")),
            collate_fn=default_collate,
        )

    def _before_training_exp(self, **kwargs: Any) -> None:
        super(DER, self)._before_training_exp(**kwargs)  # Avalanche's second loader is left out

    def _unpack_minibatch(self) -> None:
        """Take the rows of the buffer out of the batch, and fetch their logits."""
        if self.is_training and self._replaying:
            inputs, targets, rows, *others = self.mbatch
            self.mbatch = [inputs, targets, *others]
            rows = rows.cpu()  # where the logits are; waits for the device where the images lie there
            self.batch_logits = self.storage_policy.logits[rows[rows >= 0]].to(self.device, non_blocking=True)
        super()._unpack_minibatch()

    def _before_forward(self, **kwargs: Any) -> None:
        super(DER, self)._before_forward(**kwargs)  # the batch is whole already

    def training_epoch(self, **kwargs: Any) -> None:
        """The template's loop; what DER adds to the loss is part of the criterion."""
        if self._replaying and not isinstance(getattr(self.dataloader, "datasets", [None])[0], _Numbered):
            raise ValueError("another plugin has put a loader of its own in place; DER replays by itself")
        super(DER, self).training_epoch(**kwargs)

    def criterion(self) -> Tensor:
        """Loss of a training batch, a scalar; in evaluation and without stored images the plain criterion."""
        stored = self.batch_logits
        if not self.is_training or stored is None:
            return super().criterion()  # type: ignore[no-any-return]
        output, count = self.mb_output, len(self.mb_output) - len(stored)
        loss: Tensor = self._criterion(output[:count], self.mb_y[:count])
        if self.alpha:
            loss = loss + self.alpha * logit_distance(output[count:], stored)
        if self.beta:
            loss = loss + self.beta * self._criterion(output[count:], self.mb_y[count:])
        return loss


def logit_distance(output: Tensor, stored: Tensor) -> Tensor:
    """Mean squared difference over the classes that have an output now, float32 (float64 for such an output).

    :param output: present logits ``(B, C')``. :param stored: ``(B, C)``, C at most C'; what is missing counts as 0.
    """
    output = output if output.dtype == torch.float64 else output.float()
    there = output > _MASKED
    earlier = F.pad(stored, (0, output.shape[1] - stored.shape[1]))
    return ((output - earlier) * there).square().sum() / there.sum()


@torch.no_grad()
def _outputs(strategy: Any, data: Any, num_workers: int) -> Tensor:
    """Logits of a data set ``(N, C)`` on the CPU, 0 where there is no class; no global generator is touched."""
    size = strategy.eval_mb_size or strategy.train_mb_size
    loader = loader_of(data, num_workers=num_workers, batch_size=size, generator=torch.Generator())
    found = []
    with evaluation_mode(strategy.model), autocast_of(strategy):
        for batch in loader:
            labels = batch[-1].to(strategy.device) if len(batch) > 2 else None
            output = avalanche_forward(strategy.model, batch[0].to(strategy.device), labels).cpu()
            found.append(output if output.dtype == torch.float64 else output.float())
    logits = torch.cat(found)
    return logits.masked_fill(logits <= _MASKED, 0.0)


class _Numbered(Dataset[tuple[Any, ...]]):
    """Samples ``(x, y, row, ...)`` of a data set ``(x, y, ...)``: the row of a stored sample, -1 for another."""

    def __init__(self, data: Any, *, stored: bool = False) -> None:
        self.data = data
        self.stored = stored

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        inputs, targets, *others = self.data[index]
        return (inputs, targets, index if self.stored else -1, *others)

    def as_batches(self) -> WholeBatches | None:
        """Whole batches, where the data is in memory (:mod:`avalanche_firn.benchmarks.batches`)."""
        data = batched(self.data)
        return None if data is None else _NumberedBatches(data, self.stored)


class _NumberedBatches:
    def __init__(self, data: WholeBatches, stored: bool) -> None:
        self.data, self.stored, self.device = data, stored, data.device

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, positions: Tensor) -> list[Tensor]:
        inputs, targets, *others = self.data.fetch(positions)
        rows = positions.to(self.device) if self.stored else torch.full_like(targets, -1)
        return [inputs, targets, rows, *others]

    def slice(self, start: int, stop: int) -> list[Tensor]:
        return self.fetch(torch.arange(start, stop, device=self.device))


__all__ = ["LogitBuffer", "ResumableDER", "logit_distance"]
