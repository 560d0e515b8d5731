"""The state of a composed LoRA layer: one low-rank pair per task and part, scalars, copies of them, frozen parts.

What :class:`~avalanche_firn.models.composed_linear.ComposedLoRALinear` makes of it stands there. LoRAC-IPC (arXiv
2504.13407; formulas of the released code); its bookkeeping of all tasks in one tensor, which weight decay and momentum
would move, is one parameter per task here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Init = Literal["kaiming", "qr", "svd"]


class LoRAPairs(nn.Module):
    """Pairs, scalars and snapshots beside a linear layer; parameters: see ``ComposedLoRALinear``."""

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

    # -------------------------------------------------------------------- state
    def _apply(self, fn: Any, recurse: bool = True) -> LoRAPairs:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LoRAPairs:
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


__all__ = ["Init", "LoRAPairs"]
