"""Transfer of a pre-trained network: one image at a time, class after class, or in shuffled batches.

The two protocols of arXiv 2310.07996 (released code). The classifier is redrawn, the optimizer is fresh, and the model
is fine-tuned on few images of classes that it has never seen: by :func:`continual_transfer` on batches of one image,
the classes one after the other and each image once; by :func:`iid_transfer` on shuffled batches of all of them.

What differs from the released code: the optimizer is an argument (there always Adam); rates are chosen on other data
(:mod:`~avalanche_firn.strategies.transfer_sweep`); the model that is given stays as it is. As there, the model is in
evaluation mode while it is trained unless ``train_mode`` says otherwise, which freezes the statistics of BatchNorm and
switches dropout off. No task identity is used: all outputs compete, surplus ones of the old classifier too.

Plain loops over tensors on the device, because at batches of one image Avalanche's loaders and hooks cost more than the
network; ``Naive`` with a fixed ``Linear``, batches of 1 and ``shuffle=False`` gives the same numbers. With
``trainable="head"`` the features are computed once, where the model returns its classifier's output as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.strategies.transfer_loop import OnNonFinite, OptimizerFactory, Transfer, TransferResult
from avalanche_firn.strategies.transfer_start import HeadStart, TransferTask, prepare_head, transfer_tasks

if TYPE_CHECKING:
    from avalanche_firn.evaluation.dynamics import TaskDynamics

__all__ = ["TransferResult", "TransferTask", "continual_transfer", "iid_transfer", "prepare_head", "transfer_tasks"]


def _order(tasks: Sequence[TransferTask], shuffle: bool, seed: int) -> list[int]:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; a whole number, 0 or above, is accepted")
    if not shuffle:
        return list(range(len(tasks)))
    return np.random.default_rng(seed).permutation(len(tasks)).tolist()


def continual_transfer(
    model: nn.Module,
    tasks: Sequence[TransferTask],
    *,
    lr: float,
    optimizer: OptimizerFactory = Adam,
    trainable: Literal["all", "head"] = "all",
    head: HeadStart = "kaiming",
    outputs: int | None = None,
    support: int = 1,
    train_mode: bool = False,
    log_every: int | None = None,
    log_train: bool = False,
    shuffle_tasks: bool = False,
    seed: int = 0,
    eval_batch_size: int | None = None,
    device: torch.device | str | None = None,
    dynamics: TaskDynamics | None = None,
    after_task: Callable[[nn.Module, int], Any] | None = None,
    head_name: str | None = None,
    on_nonfinite: OnNonFinite = "stop",
) -> TransferResult:
    """Fine-tune on one image at a time, task after task, each image once.

    :param model: stays as it is; a copy is trained.
    :param lr: of ``optimizer``, whose state lives through the whole sequence. Released sweep: 0.055 to 4e-5.
    :param trainable: ``"all"`` (the released headline setting) or only the ``"head"``.
    :param head: see :func:`prepare_head`. :param support: images per task of the ``"lstsq"`` start, 1.
    :param outputs: of the classifier, at least; None: as many as the labels need.
    :param train_mode: False: in evaluation mode while training, as the released code.
    :param log_every: accuracies after the first task, after every so many and after the last (released: 50 on Omniglot,
        10 on OmnImage); None: after the first and the last.
    :param log_train: also on the images learnt from, which costs as many forward passes again.
    :param shuffle_tasks: order of the tasks drawn from ``seed``; images keep theirs.
    :param seed: of order and classifier.
    :param eval_batch_size: images per forward pass of an evaluation, None: what suits the device.
    :param device: None: where the model is.
    :param dynamics: follows the loss of every task; its tasks are those given here, in the same order.
    :param after_task: called with the model and the number of tasks learnt: with 0 before the first step, then after
        each task.
    :param on_nonfinite: ``"stop"``: a loss or a weight that isn't finite raises NonFiniteError at the end;
        ``"record"``: the result says ``diverged`` and counts NaN as wrong, for sweeps of rates.
    :raises ValueError: settings out of range, a task without images.
    :raises NonFiniteError: see ``on_nonfinite``; the message names step, task and rate.

    Returns figures with one row per logging point.
    """
    if log_every is not None and log_every < 1:
        raise ValueError(f"log_every is {log_every}; None or a number of tasks, 1 and above, is accepted")
    order = _order(tasks, shuffle_tasks, seed)
    work = Transfer(
        model,
        tasks,
        order,
        lr=lr,
        optimizer=optimizer,
        trainable=trainable,
        head=head,
        outputs=outputs,
        support=support,
        train_mode=train_mode,
        log_train=log_train,
        eval_batch_size=eval_batch_size,
        device=device,
        head_name=head_name,
        seed=seed,
        on_nonfinite=on_nonfinite,
    )
    last = len(order)
    if dynamics is not None:
        dynamics.start(work.model, device=work.device)
    if after_task is not None:
        after_task(work.model, 0)
    row = 0
    for done, (index, count) in enumerate(zip(order, work.counts, strict=True), 1):
        if dynamics is not None:
            dynamics.begin_block([index])
        for place in range(row, row + count):
            work.step(slice(place, place + 1))
            if dynamics is not None:
                dynamics.step(work.model)
        row += count
        if dynamics is not None:
            dynamics.end_block(work.model)
        if after_task is not None:
            after_task(work.model, done)
        if done in (1, last) or (log_every is not None and done % log_every == 0):
            work.log(done)
    if dynamics is not None:
        dynamics.finish(work.model)
    return work.result(sequential=True)


def iid_transfer(
    model: nn.Module,
    tasks: Sequence[TransferTask],
    *,
    lr: float,
    optimizer: OptimizerFactory = Adam,
    epochs: int = 1,
    batch_size: int = 256,
    trainable: Literal["all", "head"] = "all",
    head: HeadStart = "kaiming",
    outputs: int | None = None,
    support: int = 1,
    train_mode: bool = False,
    log_every: int | None = None,
    log_train: bool = False,
    orders: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    eval_batch_size: int | None = None,
    device: torch.device | str | None = None,
    dynamics: TaskDynamics | None = None,
    head_name: str | None = None,
    on_nonfinite: OnNonFinite = "stop",
) -> TransferResult:
    """Fine-tune on shuffled batches of the images of all tasks.

    :param epochs: 1 in the released code; figures of its authors name 5, and which one the paper reports is open.
    :param batch_size: 256 on Omniglot, 128 on OmnImage, 64 on mini-ImageNet in the released configurations; the last
        batch of an epoch is smaller.
    :param orders: the order of the images (positions in the tasks laid end to end) in each epoch; None: drawn from
        ``seed``.
    :param log_every: accuracies after every so many epochs and the last; None: after the last.

    All else as :func:`continual_transfer`; the figures have one row per logging point.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs is {epochs}, batch_size {batch_size}; 1 and above is accepted")
    if log_every is not None and log_every < 1:
        raise ValueError(f"log_every is {log_every}; None or a number of epochs, 1 and above, is accepted")
    work = Transfer(
        model,
        tasks,
        _order(tasks, False, seed),
        lr=lr,
        optimizer=optimizer,
        trainable=trainable,
        head=head,
        outputs=outputs,
        support=support,
        train_mode=train_mode,
        log_train=log_train,
        eval_batch_size=eval_batch_size,
        device=device,
        head_name=head_name,
        seed=seed,
        on_nonfinite=on_nonfinite,
    )
    if dynamics is not None:
        dynamics.start(work.model, device=work.device)
        dynamics.begin_block(list(range(len(tasks))))
    for epoch, order in enumerate(_epochs(orders, len(work.images), epochs, seed), 1):
        rows = order.to(work.device)
        for batch in rows.split(batch_size):
            work.step(batch)
            if dynamics is not None:
                dynamics.step(work.model)
        if epoch == epochs or (log_every is not None and epoch % log_every == 0):
            work.log(epoch)
    if dynamics is not None:
        dynamics.end_block(work.model)
        dynamics.finish(work.model)
    return work.result(sequential=False)


def _epochs(orders: Sequence[Sequence[int]] | None, images: int, epochs: int, seed: int) -> Iterator[Tensor]:
    if orders is not None:
        if len(orders) != epochs or any(sorted(order) != list(range(images)) for order in orders):
            raise ValueError(f"orders: {epochs} permutations of the {images} images are accepted, one for each epoch")
        yield from (torch.as_tensor(order, dtype=torch.long) for order in orders)
        return
    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    for _ in range(epochs):
        yield torch.randperm(images, generator=generator)
