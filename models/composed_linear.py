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

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models.lora_math import ComposedLinear, Part, compose_delta

Init = Literal["kaiming", "qr", "svd"]


class ComposedLoRALinear(nn.Module):
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

    frozen: Tensor
    snapshots: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        parts: Sequence[str] = ("full",),
        init: Init = "kaiming",
        gates: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base is a {type(base).__name__}; a torch.nn.Linear is accepted")
        least = min(base.in_features, base.out_features // max(len(parts), 1))
        if not 1 <= rank <= least:
            raise ValueError(f"rank is {rank}; 1 to {least}, the smaller side of the matrix, is accepted")
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; a finite factor is accepted")
        if not parts or len(set(parts)) != len(parts) or base.out_features % len(parts):
            raise ValueError(f"parts is {list(parts)}; distinct names of equal shares of {base.out_features} rows")
        if init not in ("kaiming", "qr", "svd"):
            raise ValueError(f"init is {init!r}; 'kaiming', 'qr' or 'svd' is accepted")
        gates = dict(gates or {})
        unknown = sorted({*gates, *gates.values()} - set(parts))
        if unknown:
            raise ValueError(f"gates names {unknown}; parts of the layer are accepted: {list(parts)}")
        self.base = base
        self.rank, self.scale, self.parts, self.init, self.gates = rank, float(scale), tuple(parts), init, gates
        self.A = nn.ModuleDict({part: nn.ParameterList() for part in parts})
        self.B = nn.ModuleDict({part: nn.ParameterList() for part in parts})
        self.omega = nn.ParameterDict()
        self.register_buffer("frozen", torch.zeros(len(parts), dtype=torch.bool, device=base.weight.device))
        self.register_buffer("snapshots", base.weight.new_zeros(0, len(parts), 0))
        self._frozen: tuple[bool, ...] = (False,) * len(parts)
        self._view: int | Tensor | None = None
        self._records: Mapping[str, Any] | None = None
        self.keep_merged = 2
        """Merged weights kept per layer: those of the first task, which task inference needs, and of others."""
        self._kept: dict[Any, Any] = {}  # whatever can be computed again: histories, merged weights
        self._state = object()  # another one whenever pairs, scalars' copies or frozen parts change

    # ------------------------------------------------------------------ growth
    @property
    def num_tasks(self) -> int:
        """Pairs, that of an open task included."""
        return len(self._list("A", self.parts[0]))

    @property
    def num_closed(self) -> int:
        """Tasks whose scalars were copied."""
        return int(self.snapshots.shape[0])

    @property
    def height(self) -> int:
        """Output rows of each part."""
        return self.base.out_features // len(self.parts)

    def _forget(self) -> None:
        self._kept.clear()
        self._state = object()

    def _list(self, factor: str, part: str) -> nn.ParameterList:
        found = getattr(self, factor)[part]
        assert isinstance(found, nn.ParameterList)
        return found

    def open_task(self, generator: torch.Generator | None = None) -> None:
        """Add a pair per part, with B = 0, and a scalar 1 for the task before; earlier pairs are constant from now on.

        :raises RuntimeError: the newest task is not closed.
        """
        if self.num_closed < self.num_tasks:
            raise RuntimeError(f"task {self.num_tasks - 1} is open; close it before the next one opens")
        for index, part in enumerate(self.parts):
            self._append(part, self._initial(index, generator))
        self._set_gradients()

    def _append(self, part: str, A: Tensor) -> None:
        weight, task = self.base.weight, self.num_tasks_of(part)
        self._list("A", part).append(nn.Parameter(A))
        self._list("B", part).append(nn.Parameter(weight.new_zeros(self.rank, self.height)))
        if task > 0:
            ones = weight.new_ones(task)
            if task > 1:
                ones[:-1] = self.omega[part].detach()
            self.omega[part] = nn.Parameter(ones)
        self._forget()

    def num_tasks_of(self, part: str) -> int:
        """Pairs of one part (equal for all but in the middle of growing)."""
        return len(self._list("A", part))

    @torch.no_grad()
    def _initial(self, index: int, generator: torch.Generator | None) -> Tensor:
        weight = self.base.weight[self._rows(index)]
        if self.init == "svd":
            _, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
            A = right[: self.rank].T
            # a singular vector is known up to its sign: the same one on every machine
            A = A * A.gather(0, A.abs().argmax(0, keepdim=True)).sign()
            return A.to(weight).contiguous()
        device = weight.device if generator is None else generator.device
        A = torch.empty(self.base.in_features, self.rank, dtype=torch.float64, device=device)
        A.uniform_(-1, 1, generator=generator)
        if self.init == "kaiming":
            return (A / math.sqrt(self.rank)).to(weight)
        history = [a.to(A) for a in self._list("A", self.parts[index])]
        basis = torch.linalg.qr(torch.cat(history, 1))[0][:, : A.shape[0] - self.rank] if history else A[:, :0]
        for _ in range(2):  # once is not enough in floating point
            A = A - basis @ (basis.T @ A)
        orthonormal, triangle = torch.linalg.qr(A)
        return (orthonormal * triangle.diagonal().sign()).to(weight)

    def _set_gradients(self) -> None:
        """Which tensors are trained, from what is closed and frozen."""
        newest = self.num_tasks - 1
        for index, part in enumerate(self.parts):
            free, slot = not self._frozen[index], self._slot(index)
            for task, (A, B) in enumerate(zip(self._list("A", part), self._list("B", part), strict=True)):
                A.requires_grad_(task == newest and (slot or free))
                B.requires_grad_(task == newest and slot)
                if task < newest:
                    A.grad = B.grad = None
            if part in self.omega:
                self.omega[part].requires_grad_(free)

    def _slot(self, index: int) -> bool:
        """Whether the pair of the newest task takes part in training."""
        part = self.parts[index]
        return not self._frozen[self.parts.index(self.gates.get(part, part))]

    @torch.no_grad()
    def close_task(self) -> None:
        """Copy the scalars: from now on the layer can be evaluated as the task that just ended, for good.

        :raises RuntimeError: no task is open.
        """
        task = self.num_tasks - 1
        if self.num_closed != task:
            raise RuntimeError("no task is open")
        table = self.snapshots.new_zeros(task + 1, len(self.parts), task + 1)
        table[:task, :, :task] = self.snapshots
        for index in range(len(self.parts)):
            table[task, index] = torch.cat([self._trained_scalars(index), table.new_ones(1)])
        self.snapshots = table
        self._forget()

    def freeze_parts(self, frozen: Sequence[bool]) -> None:
        """Say which parts keep their value from the next task on.

        :raises ValueError: not one flag per part. :raises RuntimeError: a task is open.
        """
        if len(frozen) != len(self.parts):
            raise ValueError(f"frozen has {len(frozen)} flags; one for each of {list(self.parts)} is accepted")
        if self.num_closed < self.num_tasks:
            raise RuntimeError(f"task {self.num_tasks - 1} is open; matrices are frozen between tasks")
        if any(frozen) and self.num_tasks == 0:
            raise RuntimeError("no task has been trained; matrices are frozen from the second task on")
        self._frozen = tuple(bool(f) for f in frozen)
        self.frozen.copy_(torch.tensor(self._frozen))
        self._forget()

    def pair_parameters(self) -> list[nn.Parameter]:
        """All pairs and scalars, trained or not; what the layer has beside ``base``."""
        return [p for part in (self.A, self.B, self.omega) for p in part.parameters()]

    def is_free(self, part: str) -> bool:
        """Whether the scalars and pairs of a part are trained."""
        return not self._frozen[self.parts.index(part)]

    # ------------------------------------------------------------- coefficients
    def _trained_scalars(self, index: int) -> Tensor:
        """(t,) scalars of the tasks before the newest one, as training sees them."""
        if self.num_tasks < 2:
            return self.snapshots.new_zeros(0)
        task = self.num_tasks - 1
        if self._frozen[index]:
            return self.snapshots[task - 1, index, :task]
        return self.omega[self.parts[index]]

    def _coefficients(self, index: int, view: int | None) -> Tensor:
        """Scalars of the pairs that make up a view of one part, detached."""
        if view is not None:
            return self.snapshots[view, index, : view + 1]
        if self.num_closed == self.num_tasks:
            return self.snapshots[-1, index]
        scalars = self._trained_scalars(index).detach()
        return torch.cat([scalars, scalars.new_ones(1)]) if self._slot(index) else scalars

    def _history(self, index: int, tasks: int) -> tuple[Tensor, Tensor]:
        """A (in, tasks r) and B (tasks r, out) of the first tasks of a part, side by side. Closed ones are kept."""
        if tasks > self.num_closed:
            return self._side_by_side(index, tasks)
        key = ("history", index)
        if key not in self._kept:
            self._kept[key] = self._side_by_side(index, self.num_closed)
        A, B = self._kept[key]
        return A[:, : tasks * self.rank], B[: tasks * self.rank]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _side_by_side(self, index: int, tasks: int) -> tuple[Tensor, Tensor]:
        weight, part = self.base.weight, self.parts[index]
        A = [weight.new_zeros(self.base.in_features, 0), *(a.detach() for a in self._list("A", part)[:tasks])]
        B = [weight.new_zeros(0, self.height), *(b.detach() for b in self._list("B", part)[:tasks])]
        return torch.cat(A, 1), torch.cat(B)

    def _rows(self, index: int) -> slice:
        return slice(index * self.height, (index + 1) * self.height)

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
                self._records[part]((weight[rows] * gradient[rows]).abs().mean())

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

    # -------------------------------------------------------------------- state
    def _apply(self, fn: Any, recurse: bool = True) -> ComposedLoRALinear:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedLoRALinear:
        kept, self._kept = self._kept, {}
        view, self._view = self._view, None
        records, self._records = self._records, None
        try:
            copied = self.__class__.__new__(self.__class__)
            memo[id(self)] = copied
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        finally:
            self._kept, self._view, self._records = kept, view, records
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Grow to the tasks of the loaded state before the tensors are copied (no random numbers drawn)."""
        first = f"{prefix}A.{self.parts[0]}."
        tasks = sum(key.startswith(first) for key in state_dict)
        if tasks < self.num_tasks:
            args[-1].append(f"{prefix}A: the layer holds {self.num_tasks} tasks, the state {tasks}; as many are needed")
            return
        for part in self.parts:
            for _ in range(self.num_tasks_of(part), tasks):
                self._append(part, self.base.weight.new_zeros(self.base.in_features, self.rank))
        table = state_dict.get(f"{prefix}snapshots")
        if table is not None:
            self.snapshots = self.snapshots.new_zeros(table.shape)
        frozen = state_dict.get(f"{prefix}frozen")
        if frozen is not None and len(frozen) == len(self.parts):
            self._frozen = tuple(bool(f) for f in frozen.tolist())
        self._forget()
        if tasks:
            self._set_gradients()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={list(self.parts)}, tasks={self.num_tasks}"


__all__ = ["ComposedLoRALinear", "Init"]
