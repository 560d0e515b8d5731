"""Fresh random rows in a classifier, and what becomes of the optimizer's state for them.

A zap overwrites the weights of some output units in place (arXiv 2310.07996, released code); bias and optimizer state
stay as they are there. :func:`resample_rows_` is the draw, :func:`reset_optimizer_rows_` the choice for the state.

What differs from the released code: every row has the spread of a single one, ``sqrt(2 / F)``, however many are drawn
together; there a list of K rows came out ``sqrt(K)`` too small (``init="kaiming_normal_joint"``). Rows of the
optimizer's state have no counterpart there. Cost: one draw of K x F numbers and one copy of them to the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Adagrad, Optimizer

RowInit = Literal["kaiming_normal", "kaiming_normal_joint", "kaiming_uniform", "default", "xavier_normal", "zeros"]
"""Rules for fresh rows, by name."""
RowRule = RowInit | Callable[[Tensor, "torch.Generator | None"], Any]
"""A rule by name, or a function ``(block (K, F), generator)`` that fills the block in place."""
Rows = int | Sequence[int] | np.ndarray | Tensor
"""Row numbers: one, a list, an integer array or tensor."""
BiasMode = Literal["rule", "zero", "init"]
"""What a bias that is given becomes, see :func:`resample_rows_`."""
StateMode = Literal["keep", "drop", "rows", "rows_seeded"]
"""What becomes of the optimizer's state, see :func:`reset_optimizer_rows_`."""

_FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta"})
# state without rows, or with rows whose zero is no start; Adafactor came with PyTorch 2.5
_REFUSED = tuple(getattr(torch.optim, n) for n in ("Rprop", "ASGD", "Adafactor", "LBFGS") if hasattr(torch.optim, n))


@torch.no_grad()
def resample_rows_(
    weight: Tensor,
    rows: Rows,
    init: RowRule = "kaiming_normal",
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    blend: float = 1.0,
    bias_mode: BiasMode = "rule",
) -> Tensor:
    """Overwrite rows of a weight with fresh random values, in place; every other row stays as it is, to the bit.

    :param weight: ``(C, ...)`` floating point, on any device; F = entries of one row.
    :param rows: different row numbers, 0 to C - 1; the k-th row of one block ``(K, F)`` goes to the k-th of them. None
        (an empty list): nothing happens, and nothing is drawn. A tensor on a device is read from there.
    :param init: ``"kaiming_normal"``: N(0, 2 / F). ``"kaiming_normal_joint"``: N(0, 2 / (K F)), what the released code
        gives for a list. ``"kaiming_uniform"``: uniform in ``±sqrt(6 / F)``. ``"default"``: uniform in
        ``±1 / sqrt(F)``, as PyTorch starts a linear layer. ``"xavier_normal"``: N(0, 2 / (F + C)). ``"zeros"``. Or a
        function ``(block, generator)`` that fills ``block (K, F)`` with finite values, in place.
    :param bias: ``(C,)``, whose rows are drawn or set as well; None: left alone, as in the released code.
    :param generator: None: the global one of the CPU. Values are drawn where the generator lives (float64 for a float64
        weight, else float32) and copied, so that CPU and GPU get equal rows from a CPU generator.
    :param blend: share of the fresh values: ``w <- (1 - blend) w + blend * fresh``, the bias likewise. 0 draws and
        changes nothing (a control with the same random numbers). # our choice: 1, a full zap
    :param bias_mode: ``"rule"``: zeros, but as PyTorch starts it with ``init="default"``. ``"zero"``: zeros.
        ``"init"``: uniform in ``±1 / sqrt(F)`` with every rule, drawn after the weights.
    :returns: ``weight``.
    :raises ValueError: rows that repeat or lie outside, no entries in a row, an unknown rule or mode, a bias of another
        shape, a blend outside 0 to 1, a function that leaves entries without a finite value.
    :raises TypeError: a weight or bias that is no floating point tensor; rows that aren't whole numbers.
    """
    check_rule(init)
    if bias_mode not in get_args(BiasMode):
        raise ValueError(f"bias_mode is {bias_mode!r}; one of {list(get_args(BiasMode))} is accepted")
    check_blend(blend)
    _check_tensor("weight", weight)
    if weight.ndim < 2 or weight[:1].numel() == 0 < weight.shape[0]:
        raise ValueError(f"weight has the shape {tuple(weight.shape)}; (C, ...) with entries in a row is accepted")
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has the shape {tuple(bias.shape)}; {tuple(weight.shape[:1])} is accepted")
    chosen = row_numbers(rows, weight.shape[0])
    if not chosen:
        return weight
    fresh, fresh_bias = draw_rows(
        len(chosen),
        weight[0].numel(),
        outputs=weight.shape[0],
        init=init,
        generator=generator,
        dtype=weight.dtype,
        bias_mode=None if bias is None else bias_mode,
    )
    index = torch.tensor(chosen, device=weight.device)
    weight[index] = blended(weight[index], fresh.view(-1, *weight.shape[1:]), blend)
    if bias is not None:
        assert fresh_bias is not None
        index = index.to(bias.device)
        bias[index] = blended(bias[index], fresh_bias, blend)
    return weight


def draw_rows(
    count: int,
    width: int,
    *,
    outputs: int,
    init: RowRule,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    bias_mode: BiasMode | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One block of fresh rows ``(count, width)`` and their biases ``(count,)``, where the generator lives.

    Settings are those of :func:`resample_rows_` and checked there; ``outputs`` is C.

    :param bias_mode: None: no biases.
    :raises ValueError: a function as ``init`` that leaves entries without a finite value.
    """
    place = torch.device("cpu") if generator is None else generator.device
    # half types have generators of their own, whose values would differ from those of float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    block = torch.empty(count, width, dtype=wide, device=place)
    start = 1 / math.sqrt(width)  # bound of PyTorch's own start, of weights and biases
    if callable(init):
        block.fill_(math.nan)  # what the function leaves out is found below
        init(block, generator)
        if not bool(torch.isfinite(block).all()):
            raise ValueError("init left entries without a finite value; a function that fills the block is accepted")
    elif init == "zeros":
        block.zero_()
    elif init == "kaiming_uniform":
        bound = math.sqrt(6 / width)
        block.uniform_(-bound, bound, generator=generator)
    elif init == "default":
        block.uniform_(-start, start, generator=generator)
    else:
        fan = {"kaiming_normal": width, "kaiming_normal_joint": count * width, "xavier_normal": width + outputs}[init]
        block.normal_(0.0, math.sqrt(2 / fan), generator=generator)
    if bias_mode is None:
        return block, None
    biases = torch.zeros(count, dtype=wide, device=place)
    if bias_mode == "init" or (bias_mode == "rule" and init == "default"):
        biases.uniform_(-start, start, generator=generator)
    return block, biases


def blended(old: Tensor, fresh: Tensor, blend: float) -> Tensor:
    """``(1 - blend) old + blend fresh`` in the dtype and on the device of ``old``; 1 and 0 give one of them exactly."""
    if blend == 1:  # not a product with zero, which would keep a NaN
        return fresh.to(old)
    if blend == 0:
        return old
    fresh = fresh.to(old.device)
    return torch.lerp(old.to(fresh.dtype), fresh, blend).to(old.dtype)


# ------------------------------------------------------------------ optimizer
@torch.no_grad()
def reset_optimizer_rows_(
    optimizer: Optimizer,
    parameter: Tensor,
    rows: Rows,
    mode: StateMode = "keep",
) -> None:
    """Treat the optimizer's state of rows that have just been redrawn.

    No state so far, or no rows: nothing happens. Works in place, on any device, without reading from it.

    :param optimizer: any for ``"keep"`` and ``"drop"``. The row modes take those whose state has the parameter's shape:
        SGD, Adam, AdamW (AMSGrad too), Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta.
    :param parameter: ``(C, ...)``, or a bias ``(C,)``; one that the optimizer holds.
    :param rows: as for :func:`resample_rows_`.
    :param mode: ``"keep"`` (default, as in the released code): nothing; the first updates follow old gradients.

        ``"drop"``: the parameter's whole state starts anew, other rows included: right where all rows were redrawn.
        Adagrad's is set to its start in place; LBFGS has one for all parameters, which goes.

        ``"rows"``: 0 in the rows of every moment (Adagrad's sum: its initial value), counters stay. Adam's updates of
        those rows are too large then, up to 6.5 times with its default betas; a ``RuntimeWarning`` says so.

        ``"rows_seeded"``: first moments 0, second moments the mean over the rows that stay, per column; counters stay.
        With all rows chosen there is none to take a mean of, which gives ``"drop"``.
    :raises ValueError: an unknown mode; wrong rows; a parameter that the optimizer doesn't hold; a row mode with Rprop,
        ASGD, Adafactor, LBFGS, or state of another kind: ``"drop"`` is accepted with them.
    :raises TypeError: rows that aren't whole numbers.
    """
    check_state_mode(optimizer, mode)
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        raise ValueError(
            f"parameter {tuple(parameter.shape)} is in no group of the {type(optimizer).__name__}; one of its own "
            "parameters is accepted"
        )
    chosen = row_numbers(rows, parameter.shape[0])
    if mode == "keep" or not chosen:
        return
    if mode == "drop" or (mode == "rows_seeded" and len(chosen) == parameter.shape[0]):
        _drop(optimizer, parameter, group)
        return
    state = optimizer.state.get(parameter) or {}
    moments = {name: value for name, value in state.items() if _is_moment(optimizer, parameter, name, value)}
    index = torch.tensor(chosen, device=parameter.device)
    for name, value in moments.items():
        place = index.to(value.device)
        if name in _FIRST_MOMENTS:
            value[place] = 0
        elif mode == "rows":
            value[place] = group["initial_accumulator_value"] if isinstance(optimizer, Adagrad) else 0.0
        else:
            others = torch.ones(len(value), dtype=torch.bool)
            others[chosen] = False
            stay = others.nonzero().flatten().to(value.device)
            value[place] = value[stay].mean(0)
    if mode == "rows" and "exp_avg_sq" in moments:
        warnings.warn(
            "optimizer rows were zeroed under a counter that stays: updates of these rows are too large at first, up "
            "to 6.5 times with Adam's default betas; mode 'rows_seeded' avoids it",
            RuntimeWarning,
            stacklevel=2,
        )


def check_state_mode(optimizer: Optimizer, mode: StateMode) -> None:
    """:raises ValueError: an unknown mode, or a row mode with an optimizer that has no rows to reset."""
    if mode not in get_args(StateMode):
        raise ValueError(f"mode is {mode!r}; one of {list(get_args(StateMode))} is accepted")
    if mode in ("rows", "rows_seeded") and isinstance(optimizer, _REFUSED):
        raise ValueError(_refusal(optimizer, mode))


def _refusal(optimizer: Optimizer, what: str) -> str:
    return (
        f"mode 'rows' or 'rows_seeded' with {type(optimizer).__name__} ({what}): its state has no rows that could be "
        "reset alone; mode 'drop' is accepted"
    )


def _drop(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> None:
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
    elif isinstance(optimizer, Adagrad):  # makes its state on construction only, and fails without one
        state = optimizer.state.get(parameter) or {}
        if "sum" in state:
            state["step"].zero_()
            state["sum"].fill_(group["initial_accumulator_value"])
    else:
        optimizer.state.pop(parameter, None)


def _is_moment(optimizer: Optimizer, parameter: Tensor, name: str, value: Any) -> bool:
    """Whether an entry of the state has rows; counters have none, and anything else is refused."""
    if isinstance(value, Tensor):
        if name in _FIRST_MOMENTS | _SECOND_MOMENTS and value.shape == parameter.shape:
            return True
        if name == "step" or value.ndim == 0:
            return False
    elif value is None or isinstance(value, (bool, int, float)):
        return False
    kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(_refusal(optimizer, f"state {name!r}: {kind}"))


# --------------------------------------------------------------------- checks
def row_numbers(rows: Rows, count: int) -> list[int]:
    """Row numbers as a list, in their order.

    :raises TypeError: not whole numbers. :raises ValueError: repeated, or outside 0 to ``count - 1``.
    """
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy()
    given = np.asarray(rows)
    if given.size == 0:
        return []
    if given.ndim > 1 or not np.issubdtype(given.dtype, np.integer):
        raise TypeError(
            f"rows is {given.dtype} of shape {given.shape}; a whole number, or a list, array or tensor of them is "
            "accepted"
        )
    chosen = [int(r) for r in given.reshape(-1)]
    outside = [r for r in chosen if not 0 <= r < count]
    if outside:
        raise ValueError(f"rows holds {outside[:5]}; numbers from 0 to {count - 1} are accepted")
    if len(set(chosen)) < len(chosen):
        repeated = sorted({r for r in chosen if chosen.count(r) > 1})
        raise ValueError(f"rows holds {repeated[:5]} more than once; different rows are accepted")
    return chosen


def check_rule(init: RowRule) -> None:
    """:raises ValueError: neither a function nor the name of a rule."""
    if not callable(init) and init not in get_args(RowInit):
        raise ValueError(f"init is {init!r}; a function or one of {list(get_args(RowInit))} is accepted")


def check_blend(blend: float) -> None:
    """:raises ValueError: not a number from 0 to 1."""
    if isinstance(blend, bool) or not isinstance(blend, (int, float)) or not 0 <= blend <= 1:
        raise ValueError(f"blend is {blend!r}; a share from 0 to 1 is accepted")


def _check_tensor(field: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{field} is {kind}; a floating point tensor is accepted")


__all__ = [
    "BiasMode",
    "RowInit",
    "RowRule",
    "Rows",
    "StateMode",
    "resample_rows_",
    "reset_optimizer_rows_",
]
