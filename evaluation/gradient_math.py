"""Do the gradients of tasks agree, and what did an update really do to each of them, to first order.

After "How Weight Resampling and Optimizers Shape the Dynamics of Continual Learning and Forgetting in Neural Networks"
(arXiv 2507.01559), which asks how optimisers shape interference between tasks; the measures are ours. For plain SGD the
predicted change of a task's loss is minus the rate times an inner product of gradients. Adam's update also depends on
all past tasks through its moments, so the change that was applied is compared, not the one that a gradient suggests.

Cost: a forward and a backward pass per task. Memory: one gradient per task (T * P numbers) up to a limit; beyond it the
tasks are worked through in groups and some gradients computed again (up to T / 2 times).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from avalanche_firn.evaluation.probe_tasks import refuse_multi_task, whole
from avalanche_firn.models.parts import evaluation_mode
from avalanche_firn.plugins.random_state import private_random_state

Loss = Callable[[Tensor, Tensor], Tensor]
Update = Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Gradients ``g_j`` of T tasks compared with each other and with an update ``u``; float64 tensors on the CPU."""

    loss: Tensor
    """(T,) mean loss of each task, nats."""
    norm: Tensor
    """(T,) ``|g_j|``."""
    cosine: Tensor
    """(T, T) cosine of each pair of gradients; NaN for a gradient of 0."""
    predicted_change: Tensor | None = None
    """(T,) ``g_j . u``, the change of the loss of j to first order, nats; None without an update."""
    cosine_update: Tensor | None = None
    """(T,) cosine of the update and of ``-g_j``: 1 where it went straight down; NaN for a norm of 0."""


def watched_parameters(model: nn.Module, ignore: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Named floating-point parameters that are trained, in the order of the model, without ``ignore``.

    :param ignore: names, as in ``model.named_parameters()``: parameters without any effect on the function, such as
        the bias of a convolution in front of an instance norm, which Adam moves along rounding noise.
    :raises ValueError: a name that the model doesn't have, or nothing left.
    """
    names = [ignore] if isinstance(ignore, str) else list(ignore)
    every = dict(model.named_parameters())
    if unknown := [name for name in names if name not in every]:
        raise ValueError(f"ignore: {unknown} are no parameters of {type(model).__name__}; accepted are {list(every)}")
    left = {n: p for n, p in every.items() if n not in names and p.requires_grad and p.is_floating_point()}
    if not left:
        raise ValueError(
            f"ignore: {names} leaves no trained parameter of {type(model).__name__}; accepted is at least 1"
        )
    return left


class AppliedUpdate:
    """The change of the parameters between two moments, whatever made it: the update that was really applied.

    Takes a copy when it is made and again when the ``with`` block begins::

        with AppliedUpdate(model) as applied:
            optimizer.step()
        gradient_alignment(model, batches, update=applied.update, parameters=applied.before)

    :param model: its trained parameters are copied, on their device; frozen ones are taken not to move.
    :param ignore: names that are left out of the difference, see :func:`watched_parameters`; :attr:`before` has them.
    """

    def __init__(self, model: nn.Module, *, ignore: Iterable[str] = ()) -> None:
        self._model = model
        self._ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self._update: dict[str, Tensor] | None = None
        self.snapshot()

    def snapshot(self) -> None:
        """Take the copy anew: differences are from here on."""
        self._names = list(watched_parameters(self._model, self._ignore))
        every = watched_parameters(self._model)
        self.before = {name: parameter.detach().clone() for name, parameter in every.items()}
        """Name -> copy of each trained parameter, ignored ones too: where the gradients before the update belong."""
        self._update = None

    def difference(self) -> dict[str, Tensor]:
        """Name -> parameter now minus parameter then, detached.

        :raises ValueError: parameters vanished or changed their shape (a head that grew).
        """
        now = dict(self._model.named_parameters())
        wrong = [n for n in self._names if n not in now or now[n].shape != self.before[n].shape]
        if wrong:
            raise ValueError(
                f"parameters: {wrong} vanished or changed their shape; accepted are the same ones as before"
            )
        return {name: now[name].detach() - self.before[name] for name in self._names}

    @property
    def update(self) -> dict[str, Tensor]:
        """The difference at the end of the ``with`` block. RuntimeError before it."""
        if self._update is None:
            raise RuntimeError("update is known once the with block has ended; difference() at any time")
        return self._update

    def __enter__(self) -> AppliedUpdate:
        self.snapshot()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self._update = self.difference()


def gradient_alignment(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    update: Update | None = None,
    ignore: Iterable[str] = (),
    loss: Loss = functional.cross_entropy,
    parameters: Mapping[str, Tensor] | None = None,
    max_numbers: int = 2**27,
) -> Alignment:
    """Cosines between the gradients of tasks, and what an update does to each task to first order.

    Args:
        model: from images to logits; looked at in evaluation mode. Its gradients, modes, buffers and parameters and
            all random generators stay as they are.
        batches: per task images (n, ...) and labels (n,), on the device of the model.
        update: the change of the parameters by name, or a pair of snapshots (before, after); see
            :class:`AppliedUpdate`. Has to cover all trained parameters but ``ignore``.
        ignore: names of parameters that are left out of everything, see :func:`watched_parameters`.
        loss: ``(logits, labels) -> scalar``, the mean over the batch.
        parameters: values by name at which the gradients are taken, default those of the model. After an update give
            those before it, of ignored parameters too: they are part of the function.
        max_numbers: gradient entries kept at once; default 2**27, 0.5 GiB in float32 (our choice). See the module.

    Returns:
        :class:`Alignment`. Sums are over the dtype of the parameters (float32 at least).

    Raises:
        ValueError: no batches or an empty one, a multi-task model, names or shapes that don't fit.
    """
    if not len(batches) or any(not len(labels) for _, labels in batches):
        raise ValueError(f"batches: got sizes {[len(y) for _, y in batches]}; accepted is one image or more per task")
    refuse_multi_task(model, "gradient alignment")
    whole("max_numbers", max_numbers, 1)
    watched = watched_parameters(model, ignore)
    moved = None if update is None else _flat(_change(update, watched))
    point: Mapping[str, Tensor] = watched if parameters is None else parameters
    _check_names("parameters", point, watched)
    # Leaves of our own on the same memory: hooks on the parameters don't fire, and no gradient can reach them.
    leaves = [point[name].detach().requires_grad_() for name in watched]
    others = {n: point[n].detach() for n, _ in model.named_parameters() if n in point and n not in watched}
    values = {**others, **dict(zip(watched, leaves, strict=True))}
    size, count = sum(leaf.numel() for leaf in leaves), len(batches)
    losses: list[Tensor | None] = [None] * count

    def gradient(task: int) -> Tensor:
        images, labels = batches[task]
        output = functional_call(model, values, (images,))
        value = loss(output if output.dtype == torch.float64 else output.float(), labels)
        losses[task] = value.detach()
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        return _flat([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)])

    group = max(1, min(count, max_numbers // size))
    rows, changes = [], []
    device_type = leaves[0].device.type
    with (
        private_random_state(),
        evaluation_mode(model),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
    ):
        for start in range(0, count, group):
            kept = torch.stack([gradient(task) for task in range(start, min(start + group, count))])
            later = [kept @ gradient(task) for task in range(start + len(kept), count)]  # one at a time
            block = torch.cat([kept @ kept.T, torch.stack(later, 1) if later else kept.new_zeros(len(kept), 0)], 1)
            rows.append(functional.pad(block, (start, 0)))
            if moved is not None:
                changes.append(kept @ moved)
    gram = torch.cat(rows).to("cpu", torch.float64).triu()
    gram = gram + gram.triu(1).T
    norm = gram.diagonal().sqrt()
    found = {
        "loss": torch.stack([value for value in losses if value is not None]).to("cpu", torch.float64),
        "norm": norm,
        "cosine": _ratio(gram, norm[:, None] * norm),
    }
    if moved is not None:
        found["predicted_change"] = change = torch.cat(changes).to("cpu", torch.float64)
        found["cosine_update"] = _ratio(-change, norm * moved.norm().to("cpu", torch.float64))
    return Alignment(**found)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    parts = [t.detach().reshape(-1) for t in tensors]
    return torch.cat([part if part.dtype == torch.float64 else part.float() for part in parts])


def _ratio(values: Tensor, norms: Tensor) -> Tensor:
    """Quotient within [-1, 1]; NaN where the norms are 0."""
    return torch.where(norms > 0, values / norms, math.nan).clamp(-1, 1)


def _check_names(field: str, given: Mapping[str, Tensor], watched: Mapping[str, Tensor]) -> None:
    wrong = [f"{n} (missing)" for n in watched if n not in given]
    wrong += [
        f"{n} ({tuple(given[n].shape)}, parameter {tuple(p.shape)})"
        for n, p in watched.items()
        if n in given and given[n].shape != p.shape
    ]
    if wrong:
        raise ValueError(f"{field}: {', '.join(wrong)}; accepted is a tensor for each trained parameter, by its name")


def _change(update: Update, watched: Mapping[str, nn.Parameter]) -> list[Tensor]:
    if isinstance(update, Mapping):
        _check_names("update", update, watched)
        return [update[name] for name in watched]
    if not isinstance(update, tuple) or len(update) != 2:
        raise TypeError(f"update: got {type(update).__name__}; accepted are a mapping and a pair (before, after)")
    for snapshot in update:
        _check_names("update", snapshot, watched)
    before, after = update
    return [after[name].detach() - before[name].detach() for name in watched]


__all__ = ["Alignment", "AppliedUpdate", "gradient_alignment", "watched_parameters"]
