"""Classifier alignment of SLCA (arXiv 2303.05118) and SLCA++ (arXiv 2408.08295) as functions of tensors.

After a task the heads of all classes seen so far are trained for a few epochs on features drawn from one Gaussian
per class, with a cross-entropy whose logits are divided by the mean of the per-task logit norms. Nothing here knows
about Avalanche; ``classifier_alignment.ClassifierAlignmentPlugin`` decides when it happens.

Differences from the public code: one ``(C, d)`` matrix instead of a head per task, the gradient of the loss written
out by hand instead of autograd through a norm per task, no evaluation passes. The results are the same.

Cost of ``align_classifier``: two matrix products and about twenty operations of the size of the logits a step; one
host synchronisation an epoch. ``gaussian_batches`` holds one epoch of features: 79 MB for 100 classes x 256 x 768.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_firn.plugins.class_statistics import ClassGaussians

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]

_NORM_FLOOR = 1e-7  # added to every task norm by the public code
_RCE_FLOOR = (1e-7, 1e-4)  # lower clamps of the probabilities and of the one-hot labels, public code of SLCA++


def mean_scale(class_task: Tensor | Sequence[int], current_task: int) -> Tensor:
    """Factors ``0.9 + 0.1 (t(c) + 1) / (T + 1)`` of the class means in SLCA's alignment.

    Args:
        class_task: (C,) integer, the task of every class; above ``current_task`` is legal (``reference_task_index``).
        current_task: index T >= 0 of the task just learnt.

    Returns:
        (C,) float64.
    """
    if current_task < 0:
        raise ValueError(f"current_task: must be at least 0, got {current_task}")
    return 0.9 + 0.1 * (torch.as_tensor(class_task).double() + 1) / (current_task + 1)


def feature_scale(uniform: Tensor, task_distance: Tensor, mu: float = 0.02) -> Tensor:
    """Factors ``1 / (1 + m (T - t(c)))`` of the sampled rows in SLCA++'s alignment.

    Args:
        uniform: (C, n) draws u from [0, 1), one a row; ``m = mu + 0.02 (u - 0.5)``.
        task_distance: (C,) numbers ``T - t(c)``.
        mu: mean of m (0.02: every released configuration of SLCA++).

    Returns:
        (C, n) in the dtype of ``uniform``.
    """
    return 1 / (1 + (mu + 0.02 * (uniform - 0.5)) * task_distance.to(uniform)[:, None])


def reference_task_index(num_classes: int, last_task_size: int) -> Tensor:
    """Task index of the public code, ``column // size of the last task``: wrong when tasks differ in size.

    Only for comparisons with results of that code. Returns (num_classes,) int64.
    """
    return torch.arange(num_classes) // last_task_size


def logit_normalized_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    class_task: Tensor | Sequence[int],
    temperature: float | None,
    norm: str = "task_mean",
) -> Tensor:
    """Cross-entropy of ``logits / (N temperature)``, where ``N`` is the mean over tasks of the logit norm of the task.

    The gradient flows through ``N``; a task whose logits are all zero contributes none to it.

    Args:
        logits: (B, C); computed in float32 at least.
        targets: (B,) int64 columns.
        class_task: (C,) integer, the task of every column, in any order.
        temperature: None or <= 0 is the plain cross-entropy of the logits.
        norm: ``"task_mean"`` (public code) or ``"full"``, the norm of the whole row.

    Returns:
        Scalar, nats, mean over rows. It can be differentiated once.

    Raises:
        ValueError: other shapes than these, unknown ``norm``.
    """
    _check_logits(logits, targets)
    tasks = _task_matrix(class_task, logits, temperature, norm)
    with torch.autocast(logits.device.type, enabled=False):
        return _NormalizedCrossEntropy.apply(_at_least_float32(logits), targets, tasks, temperature)


def symmetric_cross_entropy(logits: Tensor, targets: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha CE + beta RCE`` of SLCA++'s first stage.

    The reverse term is the mean over rows of ``sum_k clamp(p_k, 1e-7, 1) * (-log clamp(onehot_k, 1e-4, 1))``:
    9.21 times the clamped probability of the wrong classes. Clamped entries pass no gradient.

    Args:
        logits: (B, C); computed in float32 at least.
        targets: (B,) int64 columns; rows with -100 are left out of both means, as cross-entropy does.
        alpha, beta: weights of the two terms.

    Returns:
        Scalar, nats; NaN if no row is left.
    """
    _check_logits(logits, targets)
    with torch.autocast(logits.device.type, enabled=False):
        logits = _at_least_float32(logits)
        counts = targets >= 0
        own = targets.clamp(min=0)[:, None]  # any column will do where the row does not count
        wrong = logits.softmax(1).clamp(min=_RCE_FLOOR[0]).scatter(1, own, 0.0).sum(1)
        reverse = torch.where(counts, wrong, 0.0).sum() / counts.sum()
        return alpha * F.cross_entropy(logits, targets) - beta * math.log(_RCE_FLOOR[1]) * reverse


def cosine_rates(lr: float, epochs: int) -> list[float]:
    """Learning rate of every alignment epoch, ``lr (1 + cos(pi e / epochs)) / 2``."""
    return [lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]


@torch.no_grad()
def align_classifier(
    weight: Tensor,
    bias: Tensor,
    batches: Batches,
    class_task: Tensor | Sequence[int],
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 5,
    temperature: float | None = 0.1,
    norm: str = "task_mean",
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train a linear classifier with SGD on ``logit_normalized_cross_entropy``; defaults: ``exps/slca_cifar.json``.

    Autograd isn't used, so the grad mode of the caller plays no role; autocast is switched off.

    Args:
        weight, bias: (C, d) and (C,). Not modified.
        batches: ``batches(epoch)`` yields ``(features (B, d), targets (B,) int64 columns)``.
        class_task: (C,) integer, the task of every row of ``weight``, in any order.
        lr, momentum, weight_decay: of the SGD; ``lr`` falls to 0 over the epochs along ``cosine_rates``.
        epochs: 0 returns copies.
        temperature, norm: see ``logit_normalized_cross_entropy``.
        on_epoch: called with the epoch and its mean loss after each epoch.

    Returns:
        ``(weight, bias)``: new tensors of the dtypes given; the arithmetic is float32 at least.

    Raises:
        ValueError: shapes that don't fit, a negative setting, momentum >= 1, an epoch without batches.
        FloatingPointError: loss or classifier not finite at the end of an epoch; the text names it.
    """
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(f"weight, bias: expected (C, d) and (C,), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "epochs": epochs}.items():
        if not value >= 0 or (name == "momentum" and value >= 1):
            raise ValueError(f"{name}: must be at least 0{' and below 1' * (name == 'momentum')}, got {value}")
    new_weight = _at_least_float32(weight.detach()).clone(memory_format=torch.contiguous_format)
    new_bias = _at_least_float32(bias.detach()).to(new_weight.dtype).clone()
    tasks = _task_matrix(class_task, new_bias[None], temperature, norm)
    velocity, bias_velocity = torch.zeros_like(new_weight), torch.zeros_like(new_bias)
    with torch.autocast(weight.device.type, enabled=False):
        for epoch, rate in enumerate(cosine_rates(lr, epochs)):
            total, steps = new_bias.new_zeros(()), 0
            for features, targets in batches(epoch):
                features, targets = features.to(new_weight), targets.to(new_weight.device)
                logits = torch.addmm(new_bias, features, new_weight.T)
                _check_logits(logits, targets)
                loss, gradient = _loss_and_gradient(logits, targets, tasks, temperature)
                velocity.addmm_(gradient.T, features, beta=momentum).add_(new_weight, alpha=weight_decay)
                new_weight.add_(velocity, alpha=-rate)
                bias_velocity.mul_(momentum).add_(gradient.sum(0)).add_(new_bias, alpha=weight_decay)
                new_bias.add_(bias_velocity, alpha=-rate)
                total, steps = total.add_(loss), steps + 1
            if steps == 0:
                raise ValueError(f"batches: epoch {epoch} has no batch")
            mean_loss, size = torch.stack([total / steps, new_weight.abs().sum() + new_bias.abs().sum()]).tolist()
            if not math.isfinite(mean_loss + size):
                raise FloatingPointError(
                    f"alignment epoch {epoch}: mean loss {mean_loss}, the classifier diverged; lower lr ({lr}), raise "
                    f"temperature ({temperature}), or check the class statistics"
                )
            if on_epoch is not None:
                on_epoch(epoch, mean_loss)
    return new_weight.to(weight.dtype), new_bias.to(bias.dtype)


def gaussian_batches(
    gaussians: ClassGaussians,
    class_ids: Iterable[int] | Tensor,
    samples_per_class: int = 256,
    batch_size: int = 256,
    *,
    generator: torch.Generator | None,
    mean_scale: Tensor | None = None,
    feature_scaling: tuple[float, Tensor] | None = None,
) -> Batches:
    """The ``batches`` of ``align_classifier``: every epoch the same number of new rows of every class, mixed.

    Draw order per epoch: ``gaussians.sample``; with ``feature_scaling`` one uniform (C, n); ``randperm(C n)``.
    An epoch is drawn when its first batch is asked for. The features of a batch are overwritten by the next one.

    Args:
        gaussians: statistics of all the classes.
        class_ids: (C,) ids in column order; targets are positions in it.
        samples_per_class, batch_size: rows a class and epoch, rows a step (256, 256: public code).
        generator: source of all draws; None is PyTorch's global one.
        mean_scale: (C,) factors of the means (SLCA), see ``mean_scale``.
        feature_scaling: ``(mu, task_distance (C,))`` of ``feature_scale``, the factors of the rows (SLCA++).

    Raises:
        ValueError: a size below 1. Ids and shapes are checked by ``gaussians.sample`` at the first draw.
    """
    if samples_per_class < 1 or batch_size < 1:
        raise ValueError(f"samples_per_class, batch_size: at least 1, got {samples_per_class} and {batch_size}")
    ids = class_ids.tolist() if isinstance(class_ids, Tensor) else list(class_ids)
    buffer: Tensor | None = None

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal buffer
        buffer = gaussians.sample(ids, samples_per_class, generator, mean_scale, out=buffer)
        device = buffer.device if generator is None else generator.device
        if feature_scaling is not None:
            uniform = torch.rand(buffer.shape[:2], generator=generator, device=device).to(buffer)
            mu, task_distance = feature_scaling
            buffer.mul_(feature_scale(uniform, task_distance, mu)[:, :, None])
        rows = buffer.flatten(0, 1)
        order = torch.randperm(len(rows), generator=generator, device=device).to(buffer.device)
        targets = order // samples_per_class
        batch = rows.new_empty(batch_size, rows.shape[1])  # reused: new memory for each costs more than the copy
        for index, target in zip(order.split(batch_size), targets.split(batch_size), strict=True):
            yield torch.index_select(rows, 0, index, out=batch[: len(index)]), target

    return batches


class _NormalizedCrossEntropy(torch.autograd.Function):
    """Gives autograd the gradient that ``_loss_and_gradient`` computes along with the loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tasks: Tensor | None, temperature: float | None) -> Tensor:
        loss, gradient = _loss_and_gradient(logits, targets, tasks, temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, tasks: Tensor | None, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient (B, C). ``tasks`` (K, C) one-hot; None is the plain cross-entropy.

    With ``r_k`` the norm of task k, ``N = mean_k r_k + 1e-7``, ``u = logits / (N tau)`` and ``g`` the gradient with
    respect to ``u``: ``dloss/dl_c = (g_c - tau (g . u) l_c / (K r_t(c))) / (N tau)``.
    """
    column, size = targets[:, None], len(logits)
    if tasks is None or temperature is None:
        return _cross_entropy(logits, column, size)
    norms = tasks.mm((logits * logits).T).sqrt_()  # (K, B): this way round the product is several times faster
    inverse = ((norms.mean(0)[:, None] + _NORM_FLOOR) * temperature).reciprocal_()
    scaled = logits * inverse
    loss, gradient = _cross_entropy(scaled, column, 1)
    pull = (gradient * scaled).sum(1).mul_(temperature / len(tasks))
    slopes = torch.where(norms > 0, pull / norms, 0.0)  # the subgradient of a norm at 0 is 0
    return loss, gradient.addcmul_(logits, slopes.T.mm(tasks), value=-1).mul_(inverse.div_(size))


def _cross_entropy(logits: Tensor, column: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean loss of the rows, and the gradient of their sum divided by ``size``."""
    log_p = logits.log_softmax(1)
    loss = log_p.gather(1, column).mean().neg_()
    gradient = log_p.exp_().scatter_add_(1, column, log_p.new_full(column.shape, -1.0))
    return loss, gradient if size == 1 else gradient.div_(size)


def _task_matrix(
    class_task: Tensor | Sequence[int], logits: Tensor, temperature: float | None, norm: str
) -> Tensor | None:
    """(K, C) one-hot of the tasks in ``class_task``; a single row for ``norm="full"``; None if not needed."""
    class_task = torch.as_tensor(class_task, device=logits.device)
    if class_task.shape != logits.shape[1:]:
        raise ValueError(f"class_task: expected shape ({logits.shape[1]},), got {tuple(class_task.shape)}")
    if norm not in ("task_mean", "full"):
        raise ValueError(f"norm: {norm!r} is not accepted, use 'task_mean' or 'full'")
    if temperature is None or temperature <= 0:
        return None
    task = torch.unique(class_task, return_inverse=True)[1] if norm == "task_mean" else torch.zeros_like(class_task)
    return F.one_hot(task.long()).T.to(_at_least_float32(logits).dtype, memory_format=torch.contiguous_format)


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        got = f"{tuple(logits.shape)} and {tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"logits, targets: expected (B, C) and (B,) torch.int64, got {got}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
