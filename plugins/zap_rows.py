"""What a zap needs beside its schedule: private random streams, class ids, checks of settings and of rows.

:class:`RowStreams` holds all random numbers of a :class:`~avalanche_firn.plugins.zapping.ZappingPlugin`: values and
choice of rows, and the batches of relearning. Its state is 10 kB of tensors and some numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from avalanche.models import MultiHeadClassifier
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_firn.models.linear_rows import LinearRows
from avalanche_firn.models.parts import ModelParts
from avalanche_firn.plugins.experience_classes import experience_classes
from avalanche_firn.plugins.probe_head import ParameterFilter, parameter_filter, task_label_of
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.plugins.row_resampling import (
    BiasMode,
    RowRule,
    StateMode,
    blended,
    draw_rows,
    reset_optimizer_rows_,
)

Scope = Literal["experience", "new", "all", "random"]


class RowStreams:
    """The random streams of a zapping plugin.

    :param seed: of values and choice; None: the global CPU generator.
    :param row_choice_seed: of a NumPy generator for the choice; None: the stream of ``seed``.
    """

    def __init__(self, seed: int | None, row_choice_seed: int | None) -> None:
        self.values = None if seed is None else torch.Generator().manual_seed(int(seed))
        """Of fresh rows; None: the global generator."""
        self.batches = torch.Generator().manual_seed(derived_seed(int(seed or 0), 1))
        """Of relearning, always private."""
        self._choice = None if row_choice_seed is None else np.random.default_rng(int(row_choice_seed))

    def choose(self, candidates: list[int], count: int) -> list[int]:
        """``count`` of the candidates without replacement, in the order drawn."""
        total = len(candidates)
        if self._choice is not None:
            places = self._choice.choice(total, count, replace=False).tolist()
        else:
            places = torch.randperm(total, generator=self.values)[:count].tolist()
        return [candidates[i] for i in places]

    def state_dict(self) -> dict[str, Any]:
        """All streams that are private."""
        return {
            "values": None if self.values is None else self.values.get_state(),
            "choice": None if self._choice is None else _numpy_state(self._choice),
            "batches": self.batches.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        :raises ValueError: a stream is private in the state and not here, or the reverse.
        """
        for setting, saved, own in (
            ("seed", state["values"], self.values),
            ("row_choice_seed", state["choice"], self._choice),
        ):
            if (saved is None) != (own is None):
                raise ValueError(f"{setting} is None in one of the saved and the present plugin; equal ones are needed")
        if self.values is not None:
            self.values.set_state(state["values"].cpu())
        if self._choice is not None:
            _set_numpy_state(self._choice, state["choice"])
        self.batches.set_state(state["batches"].cpu())


def _numpy_state(generator: np.random.Generator) -> dict[str, Any]:
    """PCG64's state; its words have 128 bits, more than most file formats hold as a number."""
    state: Any = generator.bit_generator.state
    words = {name: str(value) for name, value in state["state"].items()}
    return {"words": words, "has_uint32": int(state["has_uint32"]), "uinteger": int(state["uinteger"])}


def _set_numpy_state(generator: np.random.Generator, saved: dict[str, Any]) -> None:
    state: Any = generator.bit_generator.state
    state["state"] = {name: int(value) for name, value in saved["words"].items()}
    state["has_uint32"], state["uinteger"] = saved["has_uint32"], saved["uinteger"]
    generator.bit_generator.state = state


# -------------------------------------------------------------------- classes
def current_classes(experience: Any) -> list[int]:
    """Sorted classes of an experience; of its targets where the benchmark keeps no timeline of classes."""
    if hasattr(experience, "classes_in_this_experience"):
        return experience_classes(experience)
    return sorted({int(t) for t in experience.dataset.targets})


def class_key(head: nn.Module, experience: Any, class_id: int) -> tuple[int, int]:
    """What tells classes apart in a run: several heads have a class 0 each."""
    return (task_label_of(experience) if isinstance(head, MultiHeadClassifier) else 0, class_id)


def checked_scope(scope: Any) -> Any:
    """A scope as the plugin keeps it: a name, a tuple of class ids, or a function.

    :raises ValueError: anything else.
    """
    if callable(scope):
        return scope
    if isinstance(scope, str):
        if scope not in get_args(Scope):
            raise ValueError(
                f"scope is {scope!r}; one of {list(get_args(Scope))}, class ids, or a function is accepted"
            )
        return scope
    ids = checked_ids(scope, "scope")
    if not ids:
        raise ValueError("scope is empty; at least one class id is needed")
    return tuple(ids)


def checked_ids(ids: Any, field: str) -> list[int]:
    """Class ids as a list.

    :raises ValueError: not different whole numbers of 0 and above.
    """
    values = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{field} is {ids!r}; class ids are accepted")
    found = list(values)
    if not all(_is_whole(c, 0) for c in found) or len(set(found)) < len(found):
        raise ValueError(f"{field} is {ids!r}; different whole numbers of 0 and above are accepted")
    return [int(c) for c in found]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


# ------------------------------------------------------------------- settings
_OPTIONAL = ("stop", "n_rows", "seed", "row_choice_seed", "fraction")


def check_names(*, target: Any, **settings: tuple[Any, tuple[str, ...]]) -> None:
    """:raises ValueError: a value that is not among those accepted (``schedule`` may be a function)."""
    if not isinstance(target, str) or not target:
        raise ValueError(f"target is {target!r}; 'auto' or the dotted name of a module is accepted")
    for field, (value, accepted) in settings.items():
        if value not in accepted and not (field == "schedule" and callable(value)):
            raise ValueError(f"{field} is {value!r}; one of {list(accepted)} is accepted")


def check_numbers(**settings: tuple[Any, int]) -> None:
    """:raises ValueError: not a whole number of at least so much, or None where that has a meaning."""
    for field, (value, least) in settings.items():
        if not _is_whole(value, least) and not (value is None and field in _OPTIONAL):
            raise ValueError(f"{field} is {value!r}; a whole number of {least} and above is accepted")


def check_shares(**settings: Any) -> None:
    """:raises ValueError: not a number above 0, to 1, or None where that has a meaning."""
    for field, value in settings.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value <= 1) and not (value is None and field in _OPTIONAL):
            raise ValueError(f"{field} is {value!r}; a share above 0, to 1, is accepted")


def checked_filter(given: Any) -> ParameterFilter | None:
    """``(name, parameter) -> bool`` of a function or of name patterns.

    :raises ValueError: anything else.
    """
    listed = isinstance(given, (list, tuple)) and given and all(isinstance(pattern, str) for pattern in given)
    if given is not None and not callable(given) and not listed:
        raise ValueError(f"relearn_parameters is {given!r}; None, a function or a list of name patterns is accepted")
    return parameter_filter(given)


# ----------------------------------------------------------------------- rows
def refuse_untrainable(optimizer: Optimizer, parts: ModelParts, rows: LinearRows, *, bias: bool) -> None:
    """A row that can't be learned again must not be lost.

    :param bias: whether the biases are redrawn too.
    :raises ValueError: a parameter with such rows is frozen, computed from others, or not in the optimizer.
    """
    names = {id(p): name for name, p in parts.model.named_parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for weight, own_bias, _ in rows.parameters:
        for tensor in (weight,) if own_bias is None or not bias else (weight, own_bias):
            name = names.get(id(tensor))
            if name is None:
                raise ValueError(
                    f"the rows of {parts.head_name!r} are computed from other parameters; plain parameters are accepted"
                )
            if not tensor.requires_grad:
                raise ValueError(
                    f"{name!r} holds rows to zap and is frozen, so they could never be relearned; trainable rows are "
                    "accepted (another scope, or freeze_old=False)"
                )
            if id(tensor) not in held:
                raise ValueError(
                    f"{name!r} holds rows to zap and is not in the optimizer, so they could never be relearned (a "
                    "classifier that grew in an evaluation is not, until the next experience)"
                )


def redraw(
    rows: LinearRows,
    optimizer: Optimizer,
    *,
    outputs: int,
    init: RowRule,
    bias_mode: BiasMode | None,
    blend: float,
    state_mode: StateMode,
    generator: torch.Generator | None,
) -> None:
    """Redraw rows of a classifier as one block, wherever they lie, and treat the optimizer's state of them.

    As :func:`~avalanche_firn.plugins.row_resampling.resample_rows_`, for rows that several parameters may hold.

    :param outputs: rows of the whole classifier. :param bias_mode: None: biases stay.
    """
    old, old_bias = rows.read()
    fresh, fresh_bias = draw_rows(
        *old.shape,
        outputs=outputs,
        init=init,
        generator=generator,
        dtype=old.dtype,
        bias_mode=bias_mode if rows.has_bias else None,
    )
    rows.write(blended(old, fresh, blend), old_bias if fresh_bias is None else blended(old_bias, fresh_bias, blend))
    for weight, bias, places in rows.parameters:
        reset_optimizer_rows_(optimizer, weight, places, state_mode)
        if bias is not None and bias_mode is not None:
            reset_optimizer_rows_(optimizer, bias, places, state_mode)


__all__ = [
    "RowStreams",
    "Scope",
    "check_names",
    "check_numbers",
    "check_shares",
    "checked_filter",
    "checked_ids",
    "checked_scope",
    "class_key",
    "current_classes",
    "redraw",
    "refuse_untrainable",
]
