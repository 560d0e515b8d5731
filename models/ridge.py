"""Ridge regression on one-hot labels: a linear probe in closed form, from arrays or from a stream of batches.

Objective, with ``Y`` one-hot over the classes that occur:
``(1/n) sum_i 1/2 ||y_i - W h_i - b||^2 + (l2/2) ||W||^2``, bias free. In scikit-learn's terms ``alpha = n * l2``.
The scores of the classes that occur add up to 1 for every input. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues

_ILL_CONDITIONED = 1e-5  # below this ratio of eigenvalues a Gram matrix costs more than five digits: use the SVD


def one_hot(columns: Tensor, classes: int) -> Tensor:
    """Class indices (n,) int64 in ``0..classes-1`` -> targets (n, classes) float64 of zeros and ones."""
    targets = torch.zeros(len(columns), classes, dtype=torch.float64, device=columns.device)
    targets[torch.arange(len(columns), device=columns.device), columns] = 1
    return targets


def fit_least_squares(
    features: Tensor, targets: Tensor, l2: float = 0.0, *, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """The linear map of least squares, for heads that are fine-tuned with a squared loss.

    Minimises ``(1/n) sum 1/2 ||y - W h - b||^2 + (l2/2) ||W||^2``, ``b`` free. With ``l2 = 0`` and more features than
    samples the solution of smallest norm: the loss is then zero, and fine-tuning with the same loss leaves the backbone
    where it is (arXiv 2202.10054).

    Args:
        features: (n, d) floating-point. targets: (n, k) floating-point.
        l2: finite, >= 0. bias: False forces ``b = 0``.

    Returns:
        weight (k, d) and bias (k,) in the dtype of the features, solved in float64.

    Raises:
        ValueError: wrong shapes, no rows, values that are not finite, l2 out of range.
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets) or not features.numel():
        shapes = f"{tuple(features.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"features and targets: got {shapes}; accepted are (n, d) and (n, k) with n, d >= 1")
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2: got {l2}; accepted are finite numbers >= 0")
    x, y = features.detach().double(), targets.detach().double()
    if not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
        raise NonFiniteValues("features or targets: NaN or infinity among the values; accepted are finite ones")
    offset, mean = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    weight = ridge_solver(x - offset, y, bias)(l2)
    return weight.to(features.dtype), (mean - weight @ offset).to(features.dtype)


def ridge_solver(features: Tensor, targets: Tensor, bias: bool = True) -> Callable[[float], Tensor]:
    """Prepare the ridge problem of one data set; the decomposition is shared by all penalties.

    Args:
        features: (n, d) float64; centred when ``bias``.
        targets: (n, classes) float64, for classes of :func:`one_hot`.
        bias: whether a bias is fitted, that is, whether the targets are centred as well.

    Returns:
        Function of ``l2 >= 0`` that gives the weight (classes, d) float64; 0 is the least-squares solution of
        smallest norm. With centred features the bias is the class frequencies.
    """
    n, d = features.shape
    if bias:
        targets = targets - targets.mean(0)
    dual = d > n
    gram = features @ features.T if dual else features.T @ features
    values, vectors = torch.linalg.eigh(gram / n)
    right = vectors.T @ (targets if dual else features.T @ targets) / n
    largest, smallest = float(values[-1]), float(values[0])
    exact: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(l2: float) -> Tensor:
        if smallest + l2 > _ILL_CONDITIONED * largest:
            solution = vectors @ (right / (values[:, None] + l2))
            return ((features.T @ solution) if dual else solution).T.contiguous()
        if not exact:
            u, s, vh = torch.linalg.svd(features / math.sqrt(n), full_matrices=False)
            exact.append((u.T @ targets / math.sqrt(n), s, vh))
        projected, s, vh = exact[0]
        kept = s > max(n, d) * torch.finfo(s.dtype).eps * s[0]
        factor = torch.where(kept, s / (s.square() + l2).where(kept, torch.ones_like(s)), torch.zeros_like(s))
        return (vh.T @ (factor[:, None] * projected)).T.contiguous()

    return solve


class RidgeStatistics:
    """Sums from which a ridge probe over all rows seen so far follows exactly, whatever the batches were.

    Memory: ``d * d + C * d`` float64. The first row ever seen is subtracted from every row before summing: features
    far from the origin lose no digits. Two collections over parts of the data can be merged.
    """

    def __init__(self) -> None:
        self.count = 0
        self._reference: Tensor | None = None
        self._gram = self._sum = self._class_sum = self._class_count = torch.empty(0, dtype=torch.float64)

    def _open(self, reference: Tensor) -> None:
        d = reference.shape[0]
        self._reference = reference.clone()
        self._gram, self._sum = reference.new_zeros(d, d), reference.new_zeros(d)
        self._class_sum, self._class_count = reference.new_zeros(0, d), reference.new_zeros(0)

    def _grow(self, classes: int) -> None:
        missing = classes - self._class_count.shape[0]
        if missing > 0:
            self._class_sum = torch.cat([self._class_sum, self._class_sum.new_zeros(missing, self._sum.shape[0])])
            self._class_count = torch.cat([self._class_count, self._class_count.new_zeros(missing)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> RidgeStatistics:
        """Add rows.

        Args:
            features: (n, d) floating, finite; n = 0 is allowed. The first call fixes d and the device.
            labels: (n,) integer class ids >= 0.

        Returns:
            Itself.

        Raises:
            ValueError: other shapes or values than these.
        """
        check_rows(features, labels)
        if len(features) == 0:
            return self
        x = features.detach().to(torch.float64)
        if self._reference is None:
            self._open(x[0])
        assert self._reference is not None
        if x.shape[1] != self._reference.shape[0]:
            raise ValueError(f"features: got {x.shape[1]} columns; earlier rows have {self._reference.shape[0]}")
        x = x.to(self._reference.device) - self._reference
        labels = labels.to(x.device, torch.int64)
        self._grow(int(labels.max()) + 1)
        self._gram.addmm_(x.T, x)
        self._sum += x.sum(0)
        onehot = (labels[:, None] == torch.arange(len(self._class_count), device=x.device)).to(x.dtype)
        self._class_sum += onehot.T @ x
        self._class_count += onehot.sum(0)
        self.count += len(x)
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: RidgeStatistics) -> RidgeStatistics:
        """Add the rows of ``other``, which stays as it is; returns itself. ValueError when the columns differ."""
        if other._reference is None:
            return self
        if self._reference is None:
            self._open(other._reference)
        assert self._reference is not None
        if other._reference.shape != self._reference.shape:
            columns = (other._reference.shape[0], self._reference.shape[0])
            raise ValueError(f"merge: got statistics of {columns[0]} columns; these have {columns[1]}")
        device = self._reference.device
        shift = other._reference.to(device) - self._reference
        total, counts = other._sum.to(device), other._class_count.to(device)
        self._grow(len(counts))
        cross = torch.outer(shift, total)
        self._gram += other._gram.to(device) + cross + cross.T + other.count * torch.outer(shift, shift)
        self._sum += total + other.count * shift
        self._class_sum[: len(counts)] += other._class_sum.to(device) + torch.outer(counts, shift)
        self._class_count[: len(counts)] += counts
        self.count += other.count
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve(self, l2: float, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
        """The probe over all rows added.

        Args:
            l2: penalty >= 0; 0 gives the least-squares solution of smallest norm.
            num_classes: rows of the result; default the largest class id seen + 1.

        Returns:
            Weight (C, d) and bias (C,), float64; rows of classes without a sample are zero.

        Raises:
            ValueError: nothing was added, ``l2`` negative or not finite, ``num_classes`` too small.
        """
        if self._reference is None:
            raise ValueError("RidgeStatistics.solve: no rows were added")
        if not 0 <= l2 < math.inf:
            raise ValueError(f"l2: got {l2}; accepted are finite numbers >= 0")
        known = len(self._class_count)
        rows = known if num_classes is None else num_classes
        if rows < known:
            raise ValueError(f"num_classes: got {num_classes}, but class {known - 1} was added")
        mean = self._sum / self.count
        frequency = self._class_count / self.count
        gram = self._gram / self.count - torch.outer(mean, mean)
        cross = self._class_sum / self.count - torch.outer(frequency, mean)
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        kept = values + l2 > len(values) * torch.finfo(values.dtype).eps * values[-1]
        inverse = torch.where(kept & (values + l2 > 0), 1 / (values + l2), torch.zeros_like(values))
        weight = mean.new_zeros(rows, len(mean))
        bias = mean.new_zeros(rows)
        weight[:known] = (cross @ vectors * inverse) @ vectors.T
        bias[:known] = frequency - weight[:known] @ (mean + self._reference)
        absent = self._class_count == 0
        weight[:known][absent] = 0
        bias[:known][absent] = 0
        return weight, bias


def check_rows(features: Tensor, labels: Tensor, name: str = "") -> None:
    """ValueError unless ``features`` is a finite floating (n, d) and ``labels`` an integer (n,) without negatives.

    Args:
        features, labels: what to check. One host synchronisation.
        name: prefix of the names in the messages, such as ``"val_"``.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name}features: got {describe(features)}; accepted is a floating (n, d) tensor")
    if not is_integer(labels) or labels.shape != features.shape[:1]:
        accepted = f"an integer tensor of shape ({len(features)},)"
        raise ValueError(f"{name}labels: got {describe(labels)}; accepted is {accepted}")
    if len(labels) == 0:
        return
    finite = features.isfinite().all()
    lowest = labels.min()
    if not bool(finite):
        raise NonFiniteValues(f"{name}features: got NaN or infinite values; accepted are finite numbers")
    if int(lowest) < 0:
        raise ValueError(f"{name}labels: got {int(lowest)}; accepted are class ids >= 0")


def is_integer(value: object) -> bool:
    """Whether it is a tensor of integers; booleans are none."""
    return (
        isinstance(value, Tensor)
        and value.dtype != torch.bool
        and not (value.is_floating_point() or value.is_complex())
    )


def describe(value: object) -> str:
    """What a message says about a wrong argument: dtype and shape of a tensor, otherwise the type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
