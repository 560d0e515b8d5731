"""Classification heads that grow with the stream.

:class:`TaskwiseLinearHead` keeps one linear layer per task (SLCA, arXiv 2303.05118, released code): older layers are
frozen, the newest one is trained, and all of them can be swapped for aligned ones and back. Unlike one growing weight
matrix, frozen layers receive neither weight decay nor momentum. Cost: one ``(C, d)`` concatenation per forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from avalanche.models import DynamicModule
from torch import Tensor, nn
from torch.nn import functional as F

UNSEEN_LOGIT = -1e4
"""Logit of a class that has no unit yet; finite in float16, so losses over unseen classes stay finite."""


class TaskwiseLinearHead(DynamicModule):
    """One linear layer per task on shared features, concatenated in task order.

    Used alone, :meth:`forward` returns columns in task order, ``(B, C)``. Under Avalanche (from the first
    :meth:`adaptation` on) class ids are what targets and metrics speak of, so it returns ``(B, max class id + 1)``
    indexed by class id, with :data:`UNSEEN_LOGIT` for classes without a unit.

    :param in_features: feature size d.
    :param freeze_old: freeze the layers of earlier tasks when a task is added (SLCA). ``False`` gives the plain
        growing classifier of sequential fine-tuning.
    :param init_std: standard deviation of the truncated normal of new weights; biases start at 0
        (released SLCA code: 0.02).
    """

    class_ids: Tensor
    class_task: Tensor
    input_scales: Tensor

    def __init__(self, in_features: int, *, freeze_old: bool = True, init_std: float = 0.02) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features is {in_features}; a positive feature size is accepted")
        self.in_features = int(in_features)
        self.freeze_old = freeze_old
        self.init_std = init_std
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.register_buffer("class_ids", torch.empty(0, dtype=torch.long))
        self.register_buffer("class_task", torch.empty(0, dtype=torch.long))
        self.register_buffer("input_scales", torch.empty(0))
        self._known: tuple[int, ...] = ()
        self._scaled = False
        self._width: int | None = None
        self._snapshot: dict[str, list[Tensor] | Tensor] | None = None

    # ---------------------------------------------------------------- growth
    @property
    def num_tasks(self) -> int:
        """Number of tasks added so far."""
        return len(self.weights)

    @property
    def num_classes(self) -> int:
        """Number of classes with a unit, C."""
        return len(self._known)

    @property
    def known_classes(self) -> tuple[int, ...]:
        """Class ids in column order, as plain integers (no device read)."""
        return self._known

    def add_task(self, class_ids: Iterable[int]) -> None:
        """Add a layer for new classes and, with ``freeze_old``, freeze the earlier ones.

        :raises ValueError: empty, negative or repeated ids, or ids that already have a unit.
        """
        ids = [int(c) for c in class_ids]
        if not ids:
            raise ValueError("class_ids is empty; a task needs at least one class")
        if min(ids) < 0:
            raise ValueError(f"class_ids holds {min(ids)}; ids of 0 and above are accepted")
        repeated = sorted({c for c in ids if ids.count(c) > 1 or c in self._known})
        if repeated:
            raise ValueError(
                f"class_ids {repeated} already have a unit or are given twice; each class belongs to one task"
            )
        self._append(ids)
        nn.init.trunc_normal_(self.weights[-1], std=self.init_std)

    def _append(self, ids: Sequence[int]) -> None:
        """Append a layer of zeros for ``ids``, without drawing random numbers."""
        if self.freeze_old:
            for old in (*self.weights, *self.biases):
                old.requires_grad_(False)
                old.grad = None  # a view into the gradient of all layers together, which it would keep in memory
        like = self.input_scales  # follows the device and dtype that the model was moved to
        self.weights.append(nn.Parameter(like.new_zeros(len(ids), self.in_features)))
        self.biases.append(nn.Parameter(like.new_zeros(len(ids))))
        new_ids = torch.tensor(list(ids), dtype=torch.long, device=like.device)
        self.class_ids = torch.cat([self.class_ids, new_ids])
        self.class_task = torch.cat([self.class_task, torch.full_like(new_ids, self.num_tasks - 1)])
        self.input_scales = torch.cat([like, like.new_ones(1)])
        self._known = (*self._known, *ids)
        if self._width is not None:
            self._width = max(self._width, max(ids) + 1)

    def adaptation(self, experience: Any) -> None:
        """Avalanche's hook: add the unseen classes of the experience, in training mode only.

        An evaluated experience changes no parameter; it only widens the output so that its targets have a column.
        """
        classes = sorted(int(c) for c in experience.classes_in_this_experience)
        self._width = max([self._width or 0, *(c + 1 for c in classes), *(c + 1 for c in self._known)])
        if self.training:
            new = [c for c in classes if c not in self._known]
            if new:
                self.add_task(new)

    # --------------------------------------------------------------- forward
    def forward(self, features: Tensor) -> Tensor:
        """``features (B, d)`` -> logits ``(B, C)`` in column order, or ``(B, max class id + 1)`` under Avalanche."""
        logits = self._column_logits(features)
        return logits if self._width is None else self.scatter(logits, self._width)

    def _column_logits(self, features: Tensor) -> Tensor:
        if self.num_tasks == 0:
            return features.new_zeros(features.shape[0], 0)
        # not by iteration: a ParameterList looks its entries up by name, which takes longer than the product
        weights, biases = (list(layers._parameters.values()) for layers in (self.weights, self.biases))
        weight, bias = torch.cat(weights), torch.cat(biases)  # type: ignore[arg-type]
        if self._scaled:
            weight = weight * self.input_scales[self.class_task][:, None]
        return F.linear(features, weight, bias)

    def scatter(self, logits: Tensor, num_classes: int) -> Tensor:
        """Columns ``(B, C)`` -> class ids ``(B, num_classes)``; classes without a unit get :data:`UNSEEN_LOGIT`.

        :raises ValueError: a known class id does not fit into ``num_classes``.
        """
        if self._known and max(self._known) >= num_classes:
            raise ValueError(
                f"num_classes is {num_classes}; the head knows class {max(self._known)}, so more are needed"
            )
        full = logits.new_full((logits.shape[0], num_classes), UNSEEN_LOGIT)
        return full.index_copy(1, self.class_ids, logits) if self._known else full

    def local_targets(self, targets: Tensor) -> Tensor:
        """Class ids ``(B,)`` -> positions within the newest task; -100 (ignored by losses) for any other class."""
        if self.num_tasks == 0:
            return torch.full_like(targets, -100)
        newest = self.class_ids[-self.weights[-1].shape[0] :]
        order = torch.argsort(newest)
        found = torch.searchsorted(newest[order], targets).clamp(max=len(newest) - 1)
        position = order[found]
        return torch.where(newest[position] == targets, position, -100)

    # ------------------------------------------------- swapping heads in and out
    def weight_matrix(self) -> tuple[Tensor, Tensor]:
        """Copies of all weights ``(C, d)`` and biases ``(C,)`` in column order, detached, without input scales."""
        if self.num_tasks == 0:
            return self.input_scales.new_zeros(0, self.in_features), self.input_scales.new_zeros(0)
        return torch.cat(list(self.weights)).detach().clone(), torch.cat(list(self.biases)).detach().clone()

    @torch.no_grad()
    def load_weight_matrix(self, weight: Tensor, bias: Tensor) -> None:
        """Write weights ``(C, d)`` and biases ``(C,)`` in column order into the layers, in place.

        :raises ValueError: shapes differ from what the head holds.
        """
        expected = (self.num_classes, self.in_features)
        if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:1]:
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; {expected} and {expected[:1]} are accepted"
            )
        sizes = [w.shape[0] for w in self.weights]
        for own, new in zip(self.weights, weight.split(sizes), strict=True):
            own.copy_(new)
        for own, new in zip(self.biases, bias.split(sizes), strict=True):
            own.copy_(new)

    @torch.no_grad()
    def set_input_scales(self, values: Tensor | Sequence[float]) -> None:
        """Multiply the input of head k (not its bias) by ``values[k]``; shape ``(T,)`` (SLCA++ inference).

        :raises ValueError: not one finite value per task.
        """
        scales = torch.as_tensor(values, dtype=self.input_scales.dtype, device=self.input_scales.device)
        if scales.shape != self.input_scales.shape or not bool(torch.isfinite(scales).all()):
            raise ValueError(
                f"values {tuple(scales.shape)}; one finite scale for each of {self.num_tasks} tasks is accepted"
            )
        self.input_scales.copy_(scales)
        self._scaled = bool((scales != 1).any())

    def snapshot(self) -> None:
        """Remember weights, biases and input scales of all layers; replaces an earlier snapshot."""
        self._snapshot = {
            "weights": [w.detach().clone() for w in self.weights],
            "biases": [b.detach().clone() for b in self.biases],
            "input_scales": self.input_scales.clone(),
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Write the snapshot back, in place; tasks that were added after it stay as they are.

        :raises RuntimeError: no snapshot was taken.
        """
        if self._snapshot is None:
            raise RuntimeError("restore() needs a snapshot() first")
        for own, saved in zip(self.weights, self._snapshot["weights"], strict=False):
            own.copy_(saved)
        for own, saved in zip(self.biases, self._snapshot["biases"], strict=False):
            own.copy_(saved)
        scales = self._snapshot["input_scales"]
        assert isinstance(scales, Tensor)
        self.input_scales[: len(scales)] = scales.to(self.input_scales.device)
        self._scaled = bool((self.input_scales != 1).any())

    # ------------------------------------------------------------ state dict
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._snapshot is not None:
            for kind in ("weights", "biases"):
                for k, tensor in enumerate(self._snapshot[kind]):
                    destination[f"{prefix}snapshot.{kind}.{k}"] = tensor
            destination[f"{prefix}snapshot.input_scales"] = self._snapshot["input_scales"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Grow to the tasks of the loaded state before the tensors are copied (no random numbers drawn)."""
        error_msgs = args[-1]
        if f"{prefix}class_ids" in state_dict and f"{prefix}class_task" in state_dict:
            ids = state_dict[f"{prefix}class_ids"].tolist()
            tasks = state_dict[f"{prefix}class_task"].tolist()
            if tuple(ids[: len(self._known)]) != self._known or tasks[: len(self._known)] != self.class_task.tolist():
                error_msgs.append(
                    f"{prefix}class_ids: the head holds classes {list(self._known)}, the state {ids}; "
                    "a state of the same tasks, or of more tasks in the same order, is accepted"
                )
                return
            for task in range(self.num_tasks, max(tasks, default=-1) + 1):
                self._append([c for c, t in zip(ids, tasks, strict=True) if t == task])
        saved = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{prefix}snapshot.")}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._scaled = bool((self.input_scales != 1).any())
        self._snapshot = self._snapshot_from(saved, prefix) if saved else None

    def _snapshot_from(self, saved: dict[str, Tensor], prefix: str) -> dict[str, list[Tensor] | Tensor]:
        count = sum(key.startswith(f"{prefix}snapshot.weights.") for key in saved)
        like = self.input_scales
        parts: dict[str, list[Tensor] | Tensor] = {
            kind: [saved[f"{prefix}snapshot.{kind}.{k}"].to(like, copy=True) for k in range(count)]
            for kind in ("weights", "biases")
        }
        parts["input_scales"] = saved[f"{prefix}snapshot.input_scales"].to(like, copy=True)
        return parts

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, tasks={self.num_tasks}, classes={self.num_classes}"


__all__ = ["UNSEEN_LOGIT", "TaskwiseLinearHead"]
