"""One Gaussian per class, exact and cheap to store and to sample (SLCA, arXiv 2303.05118, part "classifier alignment").

Class ``c`` with features ``x_1 .. x_n`` of size ``d`` is ``N(mu, S + jitter I)`` with the unbiased covariance ``S``.
Instead of the ``d x d`` matrix the ``low_rank`` form keeps ``A = H X / sqrt(n - 1)``, where the ``n - 1`` rows of ``H``
(Helmert contrasts) are orthonormal and orthogonal to the ones vector. Then ``A^T A = S`` exactly, and
``mu + w A + sqrt(jitter) z`` with standard normal ``w`` (n - 1) and ``z`` (d) has exactly the law above.
From ``n - 1 >= d`` on, and always in the ``cholesky`` form, the factor is the triangular one of ``S + jitter I``.

Differences from the public code: every factor is made once, in float64, instead of twice per class and epoch in
float32; all classes are drawn with batched products; one sample in a class gives ``jitter I`` instead of NaN.

Cost: ``min(n, d + 1) d`` numbers a class (30 samples x 768: 0.09 MB in float32, against 2.4 MB), one pass over the
features to add a class (plus ``d^3 / 3`` where a Cholesky factor is made), ``n d`` multiplications a drawn row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.plugins.feature_checks import check_features, check_jitter, fill_normal, to_float64

_CHUNK = 16  # classes per product while sampling: keeps the extra memory small and in the cache
_COLUMNS = 192  # width of the column blocks in which a triangular factor is applied: skips most of its zeros


def class_statistics(features: Tensor, jitter: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Mean and jittered unbiased covariance of the features of one class.

    Args:
        features: (n, d), floating point, finite, n >= 1.
        jitter: added to the diagonal (1e-4: the public code's value).

    Returns:
        ``(mean (d,), covariance (d, d))``, accumulated in float64 and returned in the dtype of ``features``, on its
        device. One sample gives ``jitter * identity``.

    Raises:
        TypeError: ``features`` isn't a floating-point tensor.
        ValueError: ``features`` isn't 2-d, is empty or not finite; ``jitter`` is negative or not finite.
    """
    check_jitter(jitter)
    mean, centred = _centre(features, "features")
    covariance = _covariance(centred)
    covariance.diagonal().add_(jitter)
    return mean.to(features), covariance.to(features)


class ClassGaussians:
    """A growing set of class Gaussians that can be sampled all at once.

    Args:
        form: ``"low_rank"`` (exact factor from the samples where that is smaller, see the module text) or
            ``"cholesky"`` (always the triangular factor; ``d`` normals a row, drawn as the public code draws them).
        jitter: added to every variance (1e-4: the public code's value).
        relative_jitter: ``jitter`` is a fraction of the class's mean variance ``trace(S) / d`` instead of an absolute
            number. A class without any variance, such as one with a single sample, then gets no jitter at all:
            ``low_rank`` draws its mean, ``cholesky`` refuses it.
        dtype: storage and sampling dtype, float32 or float64. Default: float64 if the first features are, else float32.

    Raises:
        ValueError: unknown form, negative or non-finite jitter, other dtype.
    """

    def __init__(
        self,
        form: str = "low_rank",
        jitter: float = 1e-4,
        *,
        relative_jitter: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if form not in ("low_rank", "cholesky"):
            raise ValueError(f"form: {form!r} is not accepted, use 'low_rank' or 'cholesky'")
        check_jitter(jitter)
        if dtype is not None and dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: {dtype} is not accepted, use torch.float32, torch.float64 or None")
        self.form, self.jitter, self.relative_jitter, self.dtype = form, float(jitter), bool(relative_jitter), dtype
        self._device: torch.device | None = None
        # Class id -> (r + 1, d): the r rows of the factor F, then the mean. Never written to once it is here.
        self._rows: dict[int, Tensor] = {}
        # Class id -> standard deviation of the isotropic part that F doesn't hold (0 for a triangular factor).
        self._noise: dict[int, float] = {}
        # Number of rows -> (class ids, (k, r + 1, d)); the entries of _rows are views of these after the first draw.
        self._stacks: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, class_id: object) -> bool:
        return class_id in self._rows

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Class ids in the order in which they were added."""
        return tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored statistics."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def add(self, class_id: int, features: Tensor, replace: bool = False) -> None:
        """Store the Gaussian of ``features`` ((n, d), any floating dtype, n >= 1) under ``class_id``.

        Raises:
            TypeError: ``features`` isn't a floating-point tensor.
            ValueError: the id is known and ``replace`` is False; ``features`` isn't 2-d, is empty, not finite or of
                another feature size; the covariance isn't positive definite (form ``cholesky``, or n > d).
        """
        class_id = self._new_id(class_id, replace)
        mean, centred = _centre(features, f"features of class {class_id}")
        n, d = centred.shape
        jitter = self.jitter
        if self.relative_jitter:
            jitter *= float(centred.square().sum()) / (max(n - 1, 1) * d)
        if self.form == "low_rank" and n - 1 < d:
            factor, noise = _contrasts(centred), math.sqrt(jitter)
        else:
            factor, noise = _sample_factor(centred, jitter, class_id), 0.0
        self._store(class_id, factor, mean, noise, features)

    def add_moments(self, class_id: int, mean: Tensor, covariance: Tensor, replace: bool = False) -> None:
        """Store given moments: ``mean`` (d,) and the complete ``covariance`` (d, d), to which no jitter is added.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: the id is known and ``replace`` is False; wrong shapes or feature size; not finite; covariance
                not symmetric or not positive definite.
        """
        class_id = self._new_id(class_id, replace)
        check_features(mean, f"mean of class {class_id}", "d")
        check_features(covariance, f"covariance of class {class_id}", "n, d")
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"covariance of class {class_id}: got {tuple(covariance.shape)} for {len(mean)} features")
        matrix = to_float64(covariance)
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
            raise ValueError(f"covariance of class {class_id}: not symmetric")
        self._store(class_id, _upper_factor((matrix + matrix.T) / 2, class_id), to_float64(mean), 0.0, mean)

    def mean(self, class_ids: Iterable[int] | Tensor) -> Tensor:
        """Means of the classes, (len(class_ids), d). KeyError for unknown, ValueError for repeated or no ids."""
        return torch.stack([self._rows[class_id][-1] for class_id in self._known(class_ids)])

    def covariance(self, class_id: int) -> Tensor:
        """Covariance (d, d) of one class, jitter included, multiplied out in float64. KeyError if unknown."""
        (class_id,) = self._known([class_id])
        factor = to_float64(self._rows[class_id][:-1])
        covariance = factor.T @ factor
        covariance.diagonal().add_(self._noise[class_id] ** 2)
        return covariance.to(self._rows[class_id])

    @torch.no_grad()
    def sample(
        self,
        class_ids: Iterable[int] | Tensor,
        n: int,
        generator: torch.Generator | None = None,
        mean_scale: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Draw ``n`` rows of every class from ``N(mean_scale * mu, covariance)``.

        Draw order, in float32 on the device of ``generator`` (else of the statistics) whatever the storage dtype:
        one block ``(len, n, d)``; then, for low-rank factors only, ``(k, n, r + 1)`` per chunk of up to 16 classes
        with ``r`` factor rows each (ranks in order of first appearance), whose last column is not used.

        Args:
            class_ids: ids, no repeats.
            n: rows per class, >= 1.
            generator: source of the normals. Default: PyTorch's global one.
            mean_scale: (len,) factors of the means. Default: 1.
            out: contiguous tensor to fill and return, of the shape, dtype and device of the result.

        Returns:
            (len, n, d) in the storage dtype.

        Raises:
            KeyError: unknown id.
            ValueError: no or repeated ids, n < 1, unfit ``mean_scale`` or ``out``.
        """
        ids = self._known(class_ids)
        if n < 1:
            raise ValueError(f"n: must be at least 1, got {n}")
        like = self._rows[ids[0]]
        shape = (len(ids), n, like.shape[1])
        out = like.new_empty(shape) if out is None else out
        if (out.shape, out.dtype, out.device) != (shape, like.dtype, like.device) or not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous {shape} {like.dtype} tensor on {like.device}")
        scale = like.new_ones(len(ids)) if mean_scale is None else mean_scale.to(like)
        if scale.shape != (len(ids),):
            raise ValueError(f"mean_scale: expected shape ({len(ids)},), got {tuple(scale.shape)}")
        fill_normal(out, generator)
        groups: dict[int, list[int]] = {}
        for position, class_id in enumerate(ids):
            groups.setdefault(len(self._rows[class_id]), []).append(position)
        with torch.autocast(like.device.type, enabled=False):
            for positions in groups.values():
                stack = self._stacked([ids[position] for position in positions])
                for start in range(0, len(positions), _CHUNK):
                    chunk = positions[start : start + _CHUNK]
                    contiguous = chunk[-1] - chunk[0] == len(chunk) - 1
                    index = slice(chunk[0], chunk[-1] + 1) if contiguous else chunk
                    noise = [self._noise[ids[position]] for position in chunk]
                    block = out[index]
                    _transform(block, stack[start : start + len(chunk)], scale[index], noise, generator)
                    if not contiguous:
                        out[index] = block
        return out

    def to(self, device: torch.device | str) -> ClassGaussians:
        """Move all statistics, and those added later, to ``device``; returns self."""
        self._device = torch.device(device)
        self._rows = {class_id: rows.to(device) for class_id, rows in self._rows.items()}
        self._stacks = {}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, bit-exact, as tensors and plain values; the tensors are shared, not copied."""
        groups = []
        for size in dict.fromkeys(len(rows) for rows in self._rows.values()):
            ids = [class_id for class_id, rows in self._rows.items() if len(rows) == size]
            groups.append({"class_ids": ids, "noise": [self._noise[c] for c in ids], "rows": self._stacked(ids)})
        return {**self._settings(), "class_ids": list(self._rows), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all statistics by copies of those of ``state``, on the device given to ``to``, else on theirs.

        Raises:
            ValueError: ``state`` was made with another form, jitter, relative_jitter or dtype, or is inconsistent.
        """
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"{name}: the state was made with {state[name]!r}, here it is {own!r}")
        rows: dict[int, Tensor] = {}
        noise: dict[int, float] = {}
        stacks: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        for group in state["groups"]:
            ids, stack = group["class_ids"], group["rows"]
            if stack.ndim != 3 or not len(ids) == len(stack) == len(group["noise"]):
                raise ValueError(f"groups: the statistics of classes {ids} are inconsistent")
            stack = stack.to(self._device or stack.device, copy=True)
            stacks[stack.shape[1]] = (tuple(ids), stack)
            rows.update(zip(ids, stack, strict=True))
            noise.update(zip(ids, group["noise"], strict=True))
        kinds = {(tensor.shape[1], tensor.dtype) for tensor in rows.values()}
        if sorted(rows) != sorted(state["class_ids"]) or len(kinds) > 1:
            raise ValueError("groups: inconsistent, other classes than class_ids or several feature sizes or dtypes")
        self._rows = {class_id: rows[class_id] for class_id in state["class_ids"]}
        self._noise, self._stacks = noise, stacks

    def _settings(self) -> dict[str, Any]:
        names = ("form", "jitter", "relative_jitter")
        return {**{name: getattr(self, name) for name in names}, "dtype": str(self.dtype)}

    def _new_id(self, class_id: int, replace: bool) -> int:
        class_id = operator.index(class_id)
        if class_id in self._rows and not replace:
            raise ValueError(f"class_id: class {class_id} is known already, pass replace=True to overwrite it")
        return class_id

    def _known(self, class_ids: Iterable[int] | Tensor) -> list[int]:
        ids = class_ids.tolist() if isinstance(class_ids, Tensor) else [operator.index(c) for c in class_ids]
        unknown = sorted(set(ids) - set(self._rows))
        if unknown:
            raise KeyError(f"class_ids: no statistics for classes {unknown}, known are {sorted(self._rows)}")
        if len(set(ids)) != len(ids) or not ids:
            repeated = sorted({class_id for class_id in ids if ids.count(class_id) > 1})
            raise ValueError(f"class_ids: repeated classes {repeated}" if ids else "class_ids: empty")
        return ids

    def _store(self, class_id: int, factor: Tensor, mean: Tensor, noise: float, source: Tensor) -> None:
        default = torch.float64 if source.dtype == torch.float64 else torch.float32
        like = next(iter(self._rows.values()), torch.empty(0, len(mean), device=self._device or source.device))
        if len(mean) != like.shape[1]:
            raise ValueError(f"class {class_id}: feature size {len(mean)}, the other classes have {like.shape[1]}")
        dtype = like.dtype if self._rows else self.dtype or default
        rows = torch.cat([factor, mean[None]]).to(device=like.device, dtype=dtype)
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteValues(f"class {class_id}: the statistics overflow {dtype}")
        self._stacks.pop(len(rows), None)
        self._rows[class_id], self._noise[class_id] = rows, noise

    def _stacked(self, ids: list[int]) -> Tensor:
        """(k, r + 1, d) of classes of one size. Cached, and shared with the per-class tensors, when these are all."""
        size = len(self._rows[ids[0]])
        cached = self._stacks.get(size)
        if cached is not None and cached[0] == tuple(ids):
            return cached[1]
        stack = torch.stack([self._rows[class_id] for class_id in ids])
        if len(ids) == sum(len(rows) == size for rows in self._rows.values()):
            self._stacks[size] = (tuple(ids), stack)
            self._rows.update(zip(ids, stack, strict=True))
        return stack


def _transform(
    block: Tensor, rows: Tensor, scale: Tensor, noise: list[float], generator: torch.Generator | None
) -> None:
    """Turn standard normals ``block`` (k, n, d) into draws of the k Gaussians ``rows`` (k, r + 1, d), in place."""
    k, n, d = block.shape
    rank = rows.shape[1] - 1
    if rank == d:
        means = scale[:, None, None] * rows[:, -1:]
        # From the last columns to the first: a column of the triangular factor needs only the normals before it.
        for start in reversed(range(0, d, _COLUMNS)):
            stop = min(start + _COLUMNS, d)
            factor = rows[:, :stop, start:stop]
            block[:, :, start:stop] = torch.baddbmm(means[:, :, start:stop], block[:, :, :stop], factor)
        return
    # The mean is the last row, so its factor takes the place of the last normal and one product does everything.
    coordinates = block.new_empty(k, n, rank + 1)
    fill_normal(coordinates, generator)
    coordinates[:, :, -1] = scale[:, None]
    if len(set(noise)) > 1:
        block.mul_(block.new_tensor(noise)[:, None, None])
        block.baddbmm_(coordinates, rows)
    else:
        block.baddbmm_(coordinates, rows, beta=noise[0])


def _contrasts(centred: Tensor) -> Tensor:
    """(n - 1, d) Helmert contrasts of centred rows over sqrt(n - 1): their Gram matrix is the sample covariance."""
    n = len(centred)
    if n == 1:
        return centred[:0]
    count = torch.arange(1, n, dtype=centred.dtype, device=centred.device)[:, None]
    sums = centred.cumsum(0)[:-1]
    return (sums - count * centred[1:]) / (count * (count + 1) * (n - 1)).sqrt()


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / max(len(centred) - 1, 1)


def _sample_factor(centred: Tensor, jitter: float, class_id: int) -> Tensor:
    """U (d, d) upper triangular with U^T U = S + jitter I, S the covariance of centred rows (n, d); float64.

    Features so large that the jitter is lost among their squares leave no positive definite matrix where some of them
    depend on others. The factor is then that of the samples themselves, whose squares aren't taken (QR, 3 times the
    time).
    """
    covariance = _covariance(centred)
    covariance.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(covariance, upper=True)
    if int(info) == 0 and bool(torch.isfinite(factor).all()):
        return factor
    if jitter == 0 or not bool(torch.isfinite(covariance).all()):
        return _upper_factor(covariance, class_id)  # says what is wrong
    n, d = centred.shape
    identity = torch.eye(d, dtype=centred.dtype, device=centred.device)
    rows = torch.cat([centred / math.sqrt(max(n - 1, 1)), math.sqrt(jitter) * identity])
    triangle = torch.linalg.qr(rows, mode="r").R
    return triangle * triangle.diagonal().sign()[:, None]


def _upper_factor(covariance: Tensor, class_id: int) -> Tensor:
    """U (d, d) upper triangular with U^T U = covariance, float64."""
    factor, info = torch.linalg.cholesky_ex(covariance, upper=True)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"class {class_id}: the covariance is not positive definite (largest variance "
            f"{float(covariance.diagonal().max()):.3g}); use form='low_rank', which needs no factorisation with fewer "
            "samples than features, a larger jitter, or relative_jitter=True"
        )
    return factor


def _centre(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean (d,) and centred features (n, d), both float64."""
    check_features(features, name, "n, d")
    features = to_float64(features)
    mean = features.mean(0)
    return mean, features - mean
