"""Composed LoRA: a low-rank pair per task for each linear layer of a transformer, summed with trained scalars.

LoRAC-IPC (arXiv 2504.13407; formulas of the released code): training task t, ``W = W0 + s (sum_{i<t} omega_i A_i B_i +
A_t B_t)``, earlier pairs constant, their scalars trained; a frozen matrix keeps its value. After a task the scalars are
copied, so that the weights of every task come back exactly. One open task that is never closed is plain LoRA (SLCA++).

Differs from the released code: the new key component is gated by the mask of the keys (theirs: of the queries, see
``gates``); one parameter per task and matrix instead of one for all tasks, which weight decay and momentum would move.

Three ways to evaluate, equal but for rounding: merged weights (kept for two tasks), stacked factors ``x A B`` where a
call has too few rows to pay for a merge, and one pass over samples of different tasks. Cost of training: see
:mod:`~avalanche_firn.models.lora_math`. A fused qkv has three matrices with pairs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avalanche_firn.models.lora_math import ComposedLinear, Part, compose_delta
from avalanche_firn.models.lora_pairs import Init, LoRAPairs
from avalanche_firn.models.processes import mean_over_processes


class ComposedLoRALinear(LoRAPairs):
    """A linear layer with one low-rank pair per task; see :func:`avalanche_firn.models.lora.add_composed_lora`.

    :param base: the layer; its weight stays as it is, its bias may be trained.
    :param rank: r. :param scale: s, factor of all pairs.
    :param parts: names of the matrices that lie side by side in the output, of equal size (``("q", "k", "v")``).
    :param init: A of a new pair, B being 0. ``"kaiming"``: uniform in +-1/sqrt(r) (released code). ``"qr"``:
        orthonormal columns, orthogonal to those of earlier tasks as long as there is room (our option). ``"svd"``: the
        first r right singular vectors of the weight (SLCA++'s released code).
    :param gates: part -> part whose frozen state decides about the pair of the current task; default: its own.
        ``{"k": "q"}`` is the slip of LoRAC-IPC's released code.
    :raises TypeError: ``base`` is no ``nn.Linear``. :raises ValueError: a rank, scale, split or gate out of range.
    """

    # ------------------------------------------------------------------ weights
    @torch.no_grad()
    def merged_weight(self, view: int | None = None) -> Tensor:
        """Weight ``(out, in)`` as after a task, or as it is now (None); kept until something changes. Do not modify.

        :raises IndexError: a task that is not closed.
        """
        if view is not None and not 0 <= view < self.num_closed:
            raise IndexError(f"task {view} is not closed; 0 to {self.num_closed - 1} are accepted")
        if self.num_tasks == 0:
            return self.base.weight
        if view is None and self.num_closed == self.num_tasks:
            view = self.num_closed - 1
        key, stamp = ("merged", view), self._stamp(view)
        if key in self._kept and self._kept[key][0] == stamp:
            return self._kept[key][1]
        device = self.base.weight.device.type
        # kept beyond this call, so a normal tensor also where the caller is in inference mode
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            merged = self._merge([self._coefficients(index, view) for index in range(len(self.parts))])
        self._keep_merged(key, stamp, merged)
        return merged

    def _merge(self, coefficients: Sequence[Tensor]) -> Tensor:
        merged = torch.empty_like(self.base.weight)
        for index, scalars in enumerate(coefficients):
            rows = self._rows(index)
            A, B = self._history(index, len(scalars))
            weighted = B.T * (self.scale * scalars).repeat_interleave(self.rank)
            torch.addmm(self.base.weight[rows], weighted, A.T, out=merged[rows])
        return merged

    def _keep_merged(self, key: Any, stamp: Any, merged: Tensor) -> None:
        others = [k for k in self._kept if k[0] == "merged" and k not in (key, ("merged", 0))]
        room = self.keep_merged - (1 if key == ("merged", 0) else 2)
        for oldest in others[: max(len(others) - room, 0)]:
            del self._kept[oldest]
        self._kept[key] = (stamp, merged)

    def train(self, mode: bool = True) -> ComposedLoRALinear:
        """Modes as usual; a merged weight of an open task does not outlive them (fused optimizers leave no trace)."""
        self._kept.pop(("merged", None), None)
        super().train(mode)
        return self

    def _stamp(self, view: int | None) -> tuple[Any, ...]:
        """Changes whenever the tensors behind a merged weight do, by most ways of changing them."""
        live: list[Tensor] = [self.base.weight]
        if view is None:
            for part in self.parts:
                live += [self._list("A", part)[-1], self._list("B", part)[-1]]
                live += [self.omega[part]] if part in self.omega else []
        return tuple((t.data_ptr(), t._version) for t in live)

    @property
    def weight(self) -> Tensor:
        """The composed weight ``(out, in)`` of the current view, for models that multiply by it themselves.

        :raises RuntimeError: samples of several tasks are evaluated in one pass, which has no single weight.
        """
        if isinstance(self._view, Tensor):
            raise RuntimeError(
                "the model reads the weight of a layer instead of calling it, so samples of different tasks can't go "
                "through it in one pass; evaluate them task by task (mixed='grouped' of TaskInferencePlugin)"
            )
        if self._view is not None or not self._trains():
            return self.merged_weight(self._view)
        self._kept.pop(("merged", None), None)
        base = self.base.weight.detach()
        blocks = [base[self._rows(i)] + self._delta(i).T for i in range(len(self.parts))]
        weight = torch.cat(blocks)
        if self._records is not None:
            value = weight.detach()
            weight.register_hook(lambda gradient: self._record_all(value, gradient))
        return weight

    def _delta(self, index: int) -> Tensor:
        """Update (in, out) of one part in training, by automatic differentiation."""
        part, scalars = self.parts[index], self._trained_scalars(index)
        A, B = self._history(index, len(scalars))
        shape = (-1, self.rank)
        delta = compose_delta(
            A.unflatten(1, shape).transpose(0, 1), B.unflatten(0, shape), scalars, self.scale
        )  # fmt: skip
        if self._slot(index):
            delta = delta + self.scale * (self._list("A", part)[-1] @ self._list("B", part)[-1])
        return delta

    def _record_all(self, weight: Tensor, gradient: Tensor) -> None:
        for index, part in enumerate(self.parts):
            if self._records is not None and part in self._records and not self._frozen[index]:
                rows = self._rows(index)
                own = mean_over_processes(gradient[rows].clone())
                self._records[part]((weight[rows] * own).abs().mean())

    @property
    def bias(self) -> Tensor | None:
        """Bias of the layer."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    # ------------------------------------------------------------------ forward
    def _trains(self) -> bool:
        if not torch.is_grad_enabled() or self.num_closed == self.num_tasks:
            return False
        tensors = [p for part in self.parts for p in (self._list("A", part)[-1], self._list("B", part)[-1])]
        return any(t.requires_grad for t in (*tensors, *self.omega.values()))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``; samples in the first dimension where they belong to different tasks."""
        if isinstance(self._view, Tensor):
            return self._mixed(x, self._view)
        if self.num_tasks == 0:
            return F.linear(x, self.base.weight, self.bias)
        if self._view is None and self._trains():
            return self._trained(x)
        view = self.num_closed - 1 if self._view is None and self.num_closed == self.num_tasks else self._view
        rows = x.numel() // x.shape[-1]
        if view is None or rows * (self.in_features + self.out_features) >= self.in_features * self.out_features:
            return F.linear(x, self.merged_weight(view), self.bias)
        return self._stacked(x, [self._coefficients(index, view) for index in range(len(self.parts))])

    def _trained(self, x: Tensor) -> Tensor:
        self._kept.pop(("merged", None), None)
        parts, factors, scalars = [], [], []
        for index, name in enumerate(self.parts):
            slot, free = self._slot(index), not self._frozen[index]
            trained = self._trained_scalars(index)
            if slot:
                factors += [self._list("A", name)[-1], self._list("B", name)[-1]]
            history = self._history(index, len(trained)) if free and len(trained) else None
            if history is not None:
                factors.append(trained)
            record = None if self._records is None else self._records.get(name)
            parts.append(Part(self._rows(index), self.scale, self.rank, history, slot, record if free else None))
            scalars.append(trained.detach())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = self._merge_training(scalars)
        return ComposedLinear.apply(x, self.bias, weight, parts, *factors)

    def _merge_training(self, scalars: Sequence[Tensor]) -> Tensor:
        """The weight of this step: the history with its scalars, then the pair of the task; frozen parts are kept."""
        weight = torch.empty_like(self.base.weight)
        for index, part in enumerate(self.parts):
            rows, slot = self._rows(index), self._slot(index)
            if self._frozen[index]:
                constant = self.merged_weight(self.num_closed - 1)
                weight[rows] = constant[rows]
            elif len(scalars[index]):
                A, B = self._history(index, len(scalars[index]))
                weighted = B.T * (self.scale * scalars[index]).repeat_interleave(self.rank)
                torch.addmm(self.base.weight[rows], weighted, A.T, out=weight[rows])
            else:
                weight[rows] = self.base.weight[rows]
            if slot:
                A, B = self._list("A", part)[-1], self._list("B", part)[-1]
                weight[rows].addmm_(B.T, A.T, alpha=self.scale)
        return weight

    def _stacked(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Low-rank form for one task: cheaper than a merge for few rows."""
        deltas = []
        for index, scalars in enumerate(coefficients):
            A, B = self._history(index, len(scalars))
            deltas.append((x @ A * (self.scale * scalars).repeat_interleave(self.rank)) @ B)
        return F.linear(x, self.base.weight, self.bias) + torch.cat(deltas, -1)

    def _mixed(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Samples of different tasks in one pass: the scalars of each sample stand between the two products."""
        if len(tasks) == 0 or x.shape[0] % len(tasks):
            raise ValueError(
                f"the layer's input has {x.shape[0]} rows in its first dimension for {len(tasks)} samples; a multiple "
                "is accepted"
            )
        table = (self.scale * self.snapshots)[tasks]  # (samples, parts, tasks)
        table = table.repeat_interleave(x.shape[0] // len(tasks), 0).repeat_interleave(self.rank, 2)
        output = F.linear(x, self.base.weight, self.bias)
        in_place = not torch.is_grad_enabled()
        deltas = []
        for index in range(len(self.parts)):
            A, B = self._history(index, self.num_closed)
            factor = table[:, index].reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)
            weighted = (x @ A) * factor
            if in_place:
                rows = output.view(-1, self.out_features)[:, self._rows(index)]
                rows.addmm_(weighted.flatten(0, -2).to(rows), B.to(rows))
            else:
                deltas.append(weighted @ B)
        return output if in_place else output + torch.cat(deltas, -1)


__all__ = ["ComposedLoRALinear", "Init"]
