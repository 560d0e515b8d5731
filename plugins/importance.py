"""Which weight matrices mattered for a task, and which of them to freeze: LoRAC-IPC (arXiv 2504.13407, public code).

Per matrix and step ``I = mean |W * G|`` with the weight and its gradient; a running mean S of it and a running mean U
of its deviation from S. After a task the matrices with the largest S * U stay fixed for good.

Cost: ``update`` is one pass over a matrix with a temporary of its size; ``update_many`` takes the means ready made, 6
small kernels for all matrices together. Nothing here reads a value back from the device, except ``select_critical``,
which runs once a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues


class ImportanceTracker:
    """Running importance S and its uncertainty U of named weight matrices.

    ``S <- beta1 S + (1 - beta1) I``, then ``U <- beta2 U + (1 - beta2) |I - S|`` with the new S; both start at 0. Kept
    where the first update is, in float32, or float64 once an update is in float64.

    :param beta1: of S. :param beta2: of U. Both 0.85 in the public code.
    :raises ValueError: a beta outside [0, 1).
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        for field, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{field} is {value}; a number in [0, 1) is accepted")
        self.beta1 = float(beta1)
        self.beta2 = float(beta2)
        self.reset()

    def reset(self) -> None:
        """Forget values and names, as every task does at its start."""
        self._rows: dict[str, int] = {}
        self._s = torch.zeros(0)
        self._u = torch.zeros(0)
        self._last: tuple[list[str], slice | Tensor] = ([], slice(0, 0))

    @torch.no_grad()
    def update(self, name: str, weight: Tensor, grad: Tensor, *, valid: Tensor | None = None) -> None:
        """One step of one matrix.

        :param weight: W, any shape but empty; the mean is taken in float32 at least. :param grad: G, same shape.
        :param valid: 0-dim bool on the same device; where False the values stay (a step that loss scaling skips).
        :raises ValueError: other shapes or types than these.
        """
        if weight.shape != grad.shape or weight.numel() == 0:
            raise ValueError(
                f"{name}: weight {tuple(weight.shape)} and grad {tuple(grad.shape)}; equal, non-empty shapes are needed"
            )
        dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
        self.update_many([name], (weight.to(dtype) * grad.to(dtype)).abs_().mean()[None], valid=valid)

    @torch.no_grad()
    def update_many(self, names: Sequence[str], importance: Tensor, *, valid: Tensor | None = None) -> None:
        """One step of several matrices at once, whose ``mean |W * G|`` are known.

        :param names: of the matrices, each once; cheapest with the names of the call before.
        :param importance: ``(len(names),)``, floating point. :param valid: as for :meth:`update`; new names enter
            with 0 even where it is False.
        :raises ValueError: repeated names, other shapes or types than these.
        """
        if isinstance(names, str):
            raise ValueError(f"names is the single string {names!r}; a sequence of names is accepted")
        if importance.shape != (len(names),) or not importance.is_floating_point():
            raise ValueError(
                f"importance: got {importance.dtype} of shape {tuple(importance.shape)}; "
                f"floating point of shape ({len(names)},) is accepted, one for each name"
            )
        if valid is not None and (valid.dtype != torch.bool or valid.ndim):
            raise ValueError(f"valid: got {valid.dtype} of shape {tuple(valid.shape)}; a 0-dim bool is accepted")
        rows = self._place(list(names), importance)
        new, s, u = importance.to(self._s.dtype), self._s[rows], self._u[rows]
        new_s = torch.lerp(s, new, 1 - self.beta1)
        new_u = torch.lerp(u, (new - new_s).abs_(), 1 - self.beta2)
        if valid is not None:
            new_s, new_u = torch.where(valid, new_s, s), torch.where(valid, new_u, u)
        self._s[rows], self._u[rows] = new_s, new_u

    def _place(self, names: list[str], like: Tensor) -> slice | Tensor:
        """Rows of these names, added where new; moves everything to the device of ``like`` (after a resume)."""
        dtype = torch.promote_types(self._s.dtype, like.dtype)
        moved = self._s.device != like.device
        if moved or self._s.dtype != dtype:
            self._s, self._u = (v.to(like.device, dtype) for v in (self._s, self._u))
        if names == self._last[0] and not moved:
            return self._last[1]
        if len(set(names)) != len(names):
            raise ValueError(f"names: {sorted({n for n in names if names.count(n) > 1})} occur more than once")
        added = [name for name in names if name not in self._rows]
        if added:
            self._rows.update({name: len(self._rows) + i for i, name in enumerate(added)})
            self._s, self._u = (torch.cat([v, v.new_zeros(len(added))]) for v in (self._s, self._u))
        rows = [self._rows[name] for name in names]
        first = rows[0] if rows else 0
        found: slice | Tensor = slice(first, first + len(rows))
        if rows != list(range(first, first + len(rows))):
            found = torch.tensor(rows).to(like.device, non_blocking=True)
        self._last = (names, found)
        return found

    def score(self) -> dict[str, Tensor]:
        """Name -> S * U, 0-dim float64 (in float32 small products would vanish), in the order of the first update."""
        return self._named(self._s.double() * self._u.double())

    def sensitivity(self) -> dict[str, Tensor]:
        """Name -> S, 0-dim, a copy, in the order of the first update."""
        return self._named(self._s.clone())

    def uncertainty(self) -> dict[str, Tensor]:
        """Name -> U, likewise."""
        return self._named(self._u.clone())

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._rows, values.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Names, S and U (copies); the betas are settings."""
        return {"names": list(self._rows), "sensitivity": self._s.clone(), "uncertainty": self._u.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state to the bit; it moves to the device of the next update.

        :raises ValueError: repeated names, or sizes that do not fit.
        """
        names, s, u = list(state["names"]), state["sensitivity"], state["uncertainty"]
        if len(set(names)) != len(names) or not tuple(s.shape) == tuple(u.shape) == (len(names),) or s.dtype != u.dtype:
            raise ValueError(
                f"state: {len(set(names))} different names of {len(names)}, sensitivity {s.dtype} {tuple(s.shape)}, "
                f"uncertainty {u.dtype} {tuple(u.shape)}; one value of each, of one dtype, for each name is accepted"
            )
        self.reset()
        self._rows = {name: row for row, name in enumerate(names)}
        self._s, self._u = s.detach().clone(), u.detach().clone()


def select_critical(
    score: Tensor,
    frozen: Tensor,
    fraction: float,
    *,
    of_remaining: bool = False,
    ties: Literal["order", "all"] = "order",
) -> Tensor:
    """Freeze the free positions with the largest scores, ``k = int(fraction * positions)`` of them.

    With k = 0 nothing is added, with fewer free positions than k all of them are. A score of 0 may be frozen, last.

    :param score: any shape, finite, at least 0. :param frozen: bool, same shape; True stays True. Neither is modified.
    :param fraction: in [0, 1]; 0.05 in the public code's scripts.
    :param of_remaining: count only free positions with a score above 0 in k, instead of all positions.
    :param ties: ``"order"``: exactly k, of equal scores the earlier one in flattened order. ``"all"``: every position
        that reaches the k-th largest score, frozen ones counted as 0, as in the public code (which raises at k = 0);
        with fewer than k scores above 0 that freezes everything.
    :returns: bool, True = frozen from now on; shape and device of ``score``.
    :raises ValueError: scores that are NaN, infinite or negative, other shapes, a fraction outside [0, 1].
    """
    if ties not in ("order", "all"):
        raise ValueError(f"ties is {ties!r}; 'order' or 'all' is accepted")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; a number in [0, 1] is accepted")
    if frozen.shape != score.shape or frozen.dtype != torch.bool:
        raise ValueError(
            f"frozen: got {frozen.dtype} of shape {tuple(frozen.shape)}; bool of the shape of score, "
            f"{tuple(score.shape)}, is accepted"
        )
    values = score.detach().cpu().double()
    for what, wrong in (("not finite", ~values.isfinite()), ("negative", values < 0)):
        if wrong.any():
            places = [tuple(place) for place in wrong.nonzero().tolist()]
            more = f" and {len(places) - 5} more" if len(places) > 5 else ""
            kind = NonFiniteValues if what == "not finite" else ValueError
            raise kind(f"score: {what} at {places[:5]}{more}; finite numbers of 0 and above are accepted")
    values, after = values.flatten(), frozen.detach().cpu().flatten().clone()
    counted = int((values[~after] > 0).sum()) if of_remaining else len(values)
    k = int(fraction * counted)
    if k and ties == "all":
        values = values.masked_fill(after, 0.0)
        after |= values >= values.topk(k).values[-1]
    elif k:
        free = (~after).nonzero().flatten()
        after[free[values[free].argsort(descending=True, stable=True)[:k]]] = True
    return after.reshape(score.shape).to(score.device)


__all__ = ["ImportanceTracker", "select_critical"]
