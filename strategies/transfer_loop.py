"""One transfer at work: a copy of the model with its new classifier and optimizer, images on the device, accuracies.

What :func:`~avalanche_firn.strategies.transfer.continual_transfer` and ``iid_transfer`` share, and what they return.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from avalanche_firn.models.parts import ModelParts, evaluation_mode, extract_features, find_parts, forward_batch
from avalanche_firn.plugins.finite_words import listed
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.plugins.run_errors import NonFiniteError
from avalanche_firn.strategies.transfer_start import HeadStart, TensorPairs, TransferTask, ends_in, prepare_head

__all__ = ["OnNonFinite", "OptimizerFactory", "Transfer", "TransferResult"]

OptimizerFactory = Callable[..., Optimizer]
"""``(parameters, lr=...) -> optimizer``, such as ``torch.optim.SGD`` or a ``functools.partial`` of it."""
OnNonFinite = Literal["stop", "record"]
"""What a loss or a weight that isn't finite does: stop the transfer, or end as ``TransferResult.diverged``."""
_TOGETHER = 1024  # losses looked at together


@dataclass(frozen=True)
class TransferResult:
    """What a transfer gave. Columns are tasks in the order in which they were learnt."""

    logged_after: tuple[int, ...]
    """Number of classes (continual) or epochs (i.i.d.) after which a row was taken."""
    test_accuracy: Tensor
    """``(R, T)`` float64, fractions of the test images of each task; top-1 over all outputs."""
    train_accuracy: Tensor | None
    """The same on the images learnt from, where asked for."""
    test_top5: Tensor
    """``(R, T)`` float64: the label is among the five largest outputs."""
    order: tuple[int, ...]
    """Position in the given tasks of each column."""
    test_counts: Tensor
    """``(T,)`` int64."""
    model: nn.Module
    """The model after the transfer."""
    diverged: bool
    """Whether a loss or a weight wasn't finite; only with ``on_nonfinite="record"``, else that stops the transfer."""
    seen: tuple[int, ...]
    """Number of tasks learnt at each logging point."""

    @property
    def curve(self) -> Tensor:
        """``(R,)`` float64: mean accuracy over the tasks learnt so far (i.i.d. transfer learns all from the start)."""
        return torch.stack([row[:n].mean() for row, n in zip(self.test_accuracy, self.seen, strict=True)])

    @property
    def accuracy(self) -> float:
        """Fraction of all test images, of all tasks together, at the end."""
        return float((self.test_accuracy[-1] * self.test_counts).sum() / self.test_counts.sum())


class Transfer:
    """What both protocols share: the copy of the model, its optimizer, the images on the device, the figures."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[TransferTask],
        order: Sequence[int],
        *,
        lr: float,
        optimizer: OptimizerFactory,
        trainable: Literal["all", "head"],
        head: HeadStart,
        outputs: int | None,
        support: int,
        train_mode: bool,
        log_train: bool,
        eval_batch_size: int | None,
        device: torch.device | str | None,
        head_name: str | None,
        seed: int,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        if on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; 'stop' or 'record' is accepted")
        if not tasks:
            raise ValueError("tasks is empty; at least one task is needed")
        if not 0 <= lr < float("inf"):
            raise ValueError(f"lr is {lr}; a finite rate, 0 or above, is accepted")
        if trainable not in ("all", "head"):
            raise ValueError(f"trainable is {trainable!r}; 'all' or 'head' is accepted")
        if support < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"support is {support}, eval_batch_size {eval_batch_size}; 1 and above is accepted")
        chosen = [tasks[i] for i in order]
        for i, task in zip(order, chosen, strict=True):
            sizes = {len(task.images), len(task.labels)}, {len(task.test_images), len(task.test_labels)}
            if any(len(size) != 1 or 0 in size for size in sizes):
                raise ValueError(
                    f"task {i} has {len(task.images)} images and {len(task.labels)} labels, {len(task.test_images)} "
                    f"and {len(task.test_labels)} to test; equal numbers, 1 and above, are accepted"
                )
            least = min(int(task.labels.min()), int(task.test_labels.min()))
            if least < 0:
                raise ValueError(f"task {i} has the label {least}; 0 and above is accepted")
        self.order = tuple(order)
        self.model = copy.deepcopy(model)
        device = next(self.model.parameters()).device if device is None else torch.device(device)
        self.device = device
        self.eval_batch_size = forward_batch(eval_batch_size, device)
        self.model.to(device)
        self.images = torch.cat([t.images for t in chosen]).to(device)
        self.labels = torch.cat([t.labels for t in chosen]).to(device)
        self.counts = [len(t.images) for t in chosen]
        self.test_images = torch.cat([t.test_images for t in chosen]).to(device)
        self.test_labels = torch.cat([t.test_labels for t in chosen]).to(device)
        self.test_counts = torch.tensor([len(t.test_images) for t in chosen])
        most = max(int(t.labels.max()) for t in chosen), max(int(t.test_labels.max()) for t in chosen)
        needed = max(*most, -1) + 1 if outputs is None else outputs
        if needed <= max(most):
            raise ValueError(f"outputs is {outputs}; the labels go up to {max(most)}, so more are needed")
        few = [(t.images[:support], t.labels[:support]) for t in chosen] if head == "lstsq" else []
        given = (torch.cat([x for x, _ in few]), torch.cat([y for _, y in few])) if few else None
        generator = torch.Generator().manual_seed(derived_seed(seed, 1))
        prepare_head(self.model, needed, head=head, generator=generator, support=given, head_name=head_name)
        parts = find_parts(self.model, head_name)
        if trainable == "head":
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for _, parameter in parts.head_parameters():
                parameter.requires_grad_(True)
        self.model.train(train_mode)
        self.step_model: nn.Module = self.model
        self.step_images, self.step_test = self.images, self.test_images
        if trainable == "head" and not train_mode and ends_in(self.model, parts.head, self.images[:1]):
            # the backbone can't change, so its features are computed once
            self.step_images = self._features(parts, self.images, self.labels)
            self.step_test = self._features(parts, self.test_images, self.test_labels)
            self.step_model = parts.head
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.parameters, lr=lr)
        self.log_train, self.lr, self.on_nonfinite = log_train, lr, on_nonfinite
        self._losses: list[Tensor] = []  # not looked at yet
        self._steps = 0  # looked at
        self._first = torch.tensor(-1, device=device)  # of these, the first whose loss isn't finite
        self.rows: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.logged: list[int] = []

    def _features(self, parts: ModelParts, images: Tensor, labels: Tensor) -> Tensor:
        pairs, name, size = TensorPairs(images, labels), parts.head_name, self.eval_batch_size
        features, _ = extract_features(self.model, pairs, batch_size=size, device=self.device, head_name=name)
        return features.to(next(parts.head.parameters()).dtype)

    def step(self, rows: Any) -> None:
        """One step of the optimizer on the mean loss of some images."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.step_model(self.step_images[rows]), self.labels[rows])
        loss.backward()
        self.optimizer.step()
        self._losses.append(loss.detach())
        if len(self._losses) >= _TOGETHER:
            self._look()

    def _look(self) -> None:
        """Note the first loss that isn't finite, on the device."""
        if self._losses:
            bad = ~torch.stack(self._losses).isfinite()
            here = torch.where(bad.any(), self._steps + bad.int().argmax(), -1)
            self._first = torch.where(self._first < 0, here, self._first)
            self._steps += len(self._losses)
            self._losses = []

    def _wrong(self, *, sequential: bool) -> str:
        """What wasn't finite, empty if all was; one read."""
        self._look()
        finite = torch.stack([p.isfinite().all() for p in self.parameters]).all()
        step, fine = torch.stack([self._first, finite.to(self._first)]).tolist()
        if step >= 0:
            ends = torch.tensor(self.counts).cumsum(0).tolist()
            task = next((i for i, end in enumerate(ends) if step < end), None) if sequential else None
            where = "" if task is None else f", in task {self.order[task]} ({task} tasks learnt before)"
            return f"the loss of step {step} of {self._steps} isn't finite{where}"
        if fine:
            return ""
        names = [n for n, p in self.model.named_parameters() if not bool(p.isfinite().all())]
        return f"after {self._steps} steps {listed(names)} isn't finite"

    def log(self, point: int) -> None:
        """A row of accuracies; nothing waits for the device."""
        top1, top5 = self._accuracies(self.step_test, self.test_labels, self.test_counts)
        train = (
            self._accuracies(self.step_images, self.labels, torch.tensor(self.counts))[0] if self.log_train else None
        )
        self.rows.append((top1, train, top5))
        self.logged.append(point)

    @torch.no_grad()
    def _accuracies(self, images: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """``(T,)`` top-1 and top-5."""
        hits: list[Tensor] = []
        with evaluation_mode(self.model):
            for x, y in zip(images.split(self.eval_batch_size), labels.split(self.eval_batch_size), strict=True):
                logits = self.step_model(x)
                top = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
                # the first of equal outputs counts, and a NaN is never right
                first = (logits.argmax(1) == y) & ~logits.isnan().any(1)
                hits.append(torch.stack([first, top.any(1) & ~logits.isnan().any(1)]))
        task = torch.arange(len(counts)).repeat_interleave(counts).to(self.device)
        sums = torch.zeros(2, len(counts), dtype=torch.float64, device=self.device)
        sums.index_add_(1, task, torch.cat(hits, 1).double())
        shares = sums / counts.to(self.device)
        return shares[0], shares[1]

    def result(self, *, sequential: bool) -> TransferResult:
        """All figures, on the CPU.

        :raises NonFiniteError: a loss or a weight that isn't finite, with ``on_nonfinite="stop"``.
        """
        test, train, top5 = zip(*self.rows, strict=True)
        wrong = self._wrong(sequential=sequential)
        if wrong and self.on_nonfinite == "stop":
            raise NonFiniteError(
                f"transfer with lr {self.lr:g} ({type(self.optimizer).__name__}): {wrong}. A smaller lr is needed; in "
                "a sweep of several rates one that diverges only counts as the worst."
            )
        return TransferResult(
            logged_after=tuple(self.logged),
            test_accuracy=torch.stack(test).cpu(),
            train_accuracy=torch.stack(train).cpu() if self.log_train else None,
            test_top5=torch.stack(top5).cpu(),
            order=self.order,
            test_counts=self.test_counts,
            model=self.model,
            diverged=bool(wrong),
            seen=tuple(self.logged) if sequential else (len(self.order),) * len(self.logged),
        )
