"""LoRA for any transformer: put composed layers into a model, and address them together.

:class:`~avalanche_firn.models.composed_linear.ComposedLoRALinear` is one layer,
:mod:`~avalanche_firn.models.lora_math` its mathematics, :class:`LoRAComposition` all layers of a model. Its matrices,
the positions, stand in one order: all layers of one kind, from input to output, then the next kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_firn.models.composed_linear import ComposedLoRALinear, Init
from avalanche_firn.models.lora_math import compose_delta, history_gap, orthogonality_penalty

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Linear layers of timm's transformers that are adapted by default: six matrices per block, q, k, v, out, fc1, fc2."""


def add_composed_lora(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    rank: int = 16,
    alpha: float = 1.0,
    *,
    scale: float | None = None,
    init: Init = "kaiming",
    split: Mapping[str, Sequence[str]] | None = None,
    gates: Mapping[str, str] | None = None,
) -> dict[str, ComposedLoRALinear]:
    """Replace linear layers by composed ones, in place; without an open task the model computes what it did before.

    Load pre-trained weights first: the keys of the state dict change (``qkv.weight`` becomes ``qkv.base.weight``).

    :param targets: names of modules, or ends or patterns of them (``"attn.qkv"``, ``"blocks.*.mlp.fc1"``); default:
        :data:`TARGETS`. Each has to match a linear layer, the default ones together at least one.
    :param rank: 16, :param alpha: 1 (LoRAC-IPC's training scripts). The pairs are multiplied by ``alpha / rank``,
        or by ``scale`` where that is given (SLCA++: 0.8).
    :param init: A of a new pair, see :class:`ComposedLoRALinear`.
    :param split: last part of a layer's name -> its matrices; default ``{"qkv": ("q", "k", "v")}``, ``{}`` for none.
    :param gates: see :class:`ComposedLoRALinear`; applied to the layers that have these parts.
    :returns: the new layers by name.
    :raises ValueError: nothing matches, a match is no linear layer, or the model has composed layers already.
    """
    if any(isinstance(module, ComposedLoRALinear) for module in model.modules()):
        raise ValueError("the model has composed LoRA layers already; they are added once")
    split = {"qkv": ("q", "k", "v")} if split is None else split
    chosen: dict[str, ComposedLoRALinear] = {}
    for name, layer in _targets(model, targets).items():
        parts = tuple(split.get(name.rpartition(".")[2], ("full",)))
        own = {k: v for k, v in (gates or {}).items() if k in parts and v in parts}
        chosen[name] = ComposedLoRALinear(
            layer, rank=rank, scale=alpha / rank if scale is None else scale, parts=parts, init=init, gates=own
        )
    known = {part for composed in chosen.values() for part in composed.parts}
    unknown = sorted({*(gates or {}), *(gates or {}).values()} - known)
    if unknown:
        raise ValueError(f"gates names {unknown}; parts of the layers are accepted: {sorted(known)}")
    for name, composed in chosen.items():
        parent, _, leaf = name.rpartition(".")
        composed.train(composed.base.training)
        setattr(model.get_submodule(parent), leaf, composed)
    return chosen


def _targets(model: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Linear layers by name, in the model's order."""
    patterns = TARGETS if targets is None else tuple(targets)
    found: dict[str, nn.Linear] = {}
    refused: dict[str, str] = {}
    unmatched = set(patterns)
    for name, module in model.named_modules():
        matches = [p for p in patterns if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")]
        if not matches:
            continue
        if isinstance(module, nn.Linear):
            found[name] = module
            unmatched -= set(matches)
        else:
            refused[name] = type(module).__name__
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    here = f"here such as {linear}" if linear else "of which this model has none"
    if targets is not None and unmatched:
        wrong = refused or "nothing"
        raise ValueError(
            f"targets {sorted(unmatched)} match {wrong} in {type(model).__name__}; names of torch.nn.Linear layers are "
            f"accepted, {here}"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer called {' or '.join(patterns)}; give targets=..., names of "
            f"torch.nn.Linear layers, {here}"
        )
    return found


class LoRAComposition:
    """All composed layers of a model. Holds no state of its own: everything lives in the layers.

    :param model: with layers of :func:`add_composed_lora`. :raises ValueError: it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, ComposedLoRALinear)}
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no composed LoRA layer; avalanche_firn.models.add_composed_lora(model) "
                "puts them in"
            )
        kinds: dict[tuple[str, str], list[str]] = {}
        for name, layer in self.layers.items():
            for part in layer.parts:
                kinds.setdefault((name.rpartition(".")[2], part), []).append(name)
        self._places = [(name, part) for (_, part), names in kinds.items() for name in names]
        self._groups: tuple[list[Any], list[tuple[list[nn.Parameter], Tensor, Tensor]]] | None = None

    @property
    def positions(self) -> list[str]:
        """Names of the matrices: ``blocks.0.attn.qkv.q``, ..., kind by kind."""
        return [name if part == "full" else f"{name}.{part}" for name, part in self._places]

    @property
    def num_tasks(self) -> int:
        """Tasks with a pair, an open one included."""
        return next(iter(self.layers.values())).num_tasks

    @property
    def num_closed(self) -> int:
        """Tasks that can be evaluated for good."""
        return next(iter(self.layers.values())).num_closed

    @property
    def frozen(self) -> Tensor:
        """(positions,) bool on the CPU, in the order of :attr:`positions`."""
        return torch.tensor([not self.layers[name].is_free(part) for name, part in self._places])

    # ---------------------------------------------------------------- tasks
    def open_task(self, generator: torch.Generator | None = None) -> None:
        """Open a task in every layer.

        :raises RuntimeError: the newest task is open. A warning says where the pairs exceed a layer's input width: the
            orthogonality penalty can't fall to 0 then (least value ``sqrt(T r - in)``).
        """
        for layer in self.layers.values():
            layer.open_task(generator)
        columns = max(layer.num_tasks * layer.rank for layer in self.layers.values())
        width = min(layer.in_features for layer in self.layers.values())
        if columns > width >= columns - max(layer.rank for layer in self.layers.values()):
            warnings.warn(
                f"{self.num_tasks} tasks of rank {columns // self.num_tasks} exceed the input width {width} of a "
                f"layer: its pairs can't be orthogonal any more, their penalty stays above sqrt({columns - width})",
                RuntimeWarning,
                stacklevel=2,
            )

    def close_task(self) -> None:
        """Copy the scalars of every layer. :raises RuntimeError: no task is open."""
        for layer in self.layers.values():
            layer.close_task()

    def freeze(self, frozen: Tensor) -> None:
        """Which matrices keep their value from the next task on.

        :param frozen: (positions,) bool. :raises ValueError: another shape. :raises RuntimeError: a task is open.
        """
        if frozen.shape != (len(self._places),):
            raise ValueError(f"frozen has shape {tuple(frozen.shape)}; ({len(self._places)},) is accepted")
        flags = dict(zip(self._places, frozen.tolist(), strict=True))
        for name, layer in self.layers.items():
            layer.freeze_parts([flags[name, part] for part in layer.parts])

    # -------------------------------------------------------------- training
    def pairs(self) -> list[nn.Parameter]:
        """Trainable A and B of the open task."""
        newest = [self.layers[name]._list(factor, part)[-1:] for name, part in self._places for factor in "AB"]
        return [p for found in newest for p in found if p.requires_grad]

    def scalars(self) -> list[nn.Parameter]:
        """Trainable scalars of the tasks before."""
        return [p for layer in self.layers.values() for p in layer.omega.values() if p.requires_grad]

    def orthogonality(self) -> Tensor:
        """Sum over the free matrices of ``|| [A_0 .. A_t]' [A_0 .. A_t] - I ||_F``, a scalar; 0 without an open task.

        One batched product per input width; the constant part is computed once per task.
        """
        states = [layer._state for layer in self.layers.values()]
        if self._groups is None or any(a is not b for a, b in zip(self._groups[0], states, strict=True)):
            self._groups = (states, self._orthogonality_groups())
        groups = self._groups[1]
        if not groups:
            return next(iter(self.layers.values())).base.weight.new_zeros(())
        with torch.autocast(groups[0][1].device.type, enabled=False):
            terms = [orthogonality_penalty(h, torch.stack(list(A)), gap=gap).sum() for A, h, gap in groups]
        return torch.stack(terms).sum()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _orthogonality_groups(self) -> list[tuple[list[nn.Parameter], Tensor, Tensor]]:
        if self.num_tasks == self.num_closed:
            return []
        members: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for name, part in self._places:
            layer = self.layers[name]
            if layer.is_free(part):
                current = layer._list("A", part)[-1]
                history, _ = layer._history(layer.parts.index(part), layer.num_closed)
                members.setdefault(tuple(current.shape), []).append((current, history))  # type: ignore[arg-type]
        groups = []
        for found in members.values():
            stacked = torch.stack([history for _, history in found])
            groups.append(([current for current, _ in found], stacked, history_gap(stacked)))
        return groups

    @contextmanager
    def recording(self, records: Mapping[str, Any]) -> Iterator[None]:
        """Inside, backward passes hand the importance of the matrices, mean ``|W G|``, to ``records[position]``."""
        self.record(records)
        try:
            yield
        finally:
            self.record(None)

    def record(self, records: Mapping[str, Any] | None) -> None:
        """As :meth:`recording`, until it is called with None."""
        names = dict(zip(self._places, self.positions, strict=True))
        for name, layer in self.layers.items():
            own = {part: records[names[name, part]] for part in layer.parts if records and names[name, part] in records}
            layer._records = own or None

    # ------------------------------------------------------------ evaluation
    @contextmanager
    def as_task(self, task: int) -> Iterator[None]:
        """Inside, the model is what it was after a task.

        :raises IndexError: the task is not closed.
        """
        if not 0 <= task < self.num_closed:
            raise IndexError(f"task {task} is not closed; 0 to {self.num_closed - 1} are accepted")
        with self._viewed(task):
            yield

    @contextmanager
    def as_tasks(self, tasks: Tensor) -> Iterator[None]:
        """Inside, sample n of a batch goes through the model as it was after task ``tasks[n]``, all in one pass.

        :param tasks: ``(B,)`` int64 on the model's device, each of a closed task (unchecked: that would wait for the
            device). :raises ValueError: another shape or type.
        """
        if tasks.ndim != 1 or tasks.dtype != torch.int64:
            raise ValueError(f"tasks is {tuple(tasks.shape)} {tasks.dtype}; (B,) torch.int64 is accepted")
        with self._viewed(tasks):
            yield

    @contextmanager
    def _viewed(self, view: int | Tensor) -> Iterator[None]:
        before = [layer._view for layer in self.layers.values()]
        for layer in self.layers.values():
            layer._view = view
        try:
            yield
        finally:
            for layer, old in zip(self.layers.values(), before, strict=True):
                layer._view = old

    @torch.no_grad()
    def overlap(self) -> dict[str, float]:
        """How far the pairs of different tasks are from orthogonal, over the matrices that are not frozen.

        :returns: ``largest``: the largest ``|A_i' A_j|`` entry between two tasks; ``cosine``: the same with columns of
            unit length; ``mean-cosine``: the mean of the latter's absolute entries. NaN with fewer than two tasks.
        """
        largest, cosine, means = [], [], []
        for name, part in self._places:
            layer = self.layers[name]
            if not layer.is_free(part) or layer.num_tasks < 2:
                continue
            A = torch.cat([a.double() for a in layer._list("A", part)], 1)
            task = torch.arange(A.shape[1], device=A.device) // layer.rank
            between = task[:, None] != task
            unit = A / A.norm(dim=0).clamp_min(torch.finfo(A.dtype).tiny)
            largest.append((A.T @ A)[between].abs().max())
            cosines = (unit.T @ unit)[between].abs()
            cosine.append(cosines.max())
            means.append(cosines.mean())
        if not largest:
            return dict.fromkeys(("largest", "cosine", "mean-cosine"), float("nan"))
        values = torch.stack([torch.stack(largest).max(), torch.stack(cosine).max(), torch.stack(means).mean()])
        return dict(zip(("largest", "cosine", "mean-cosine"), values.tolist(), strict=True))


__all__ = [
    "TARGETS",
    "ComposedLoRALinear",
    "LoRAComposition",
    "add_composed_lora",
    "compose_delta",
    "orthogonality_penalty",
]
