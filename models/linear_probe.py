"""Linear probes on cached features: three solvers of one objective, to the optimum, in float64.

Objective: ``(1/n) sum_i loss_i + (l2/2) ||W||^2`` over the classes that occur, bias free. The loss is the
cross-entropy (``"lbfgs"``, ``"sgd"``) or ``1/2 ||onehot - z||^2`` (``"ridge"``). In scikit-learn's terms
``C = 1 / (n l2)`` for three classes or more and ``2 / (n l2)`` for two, and ``alpha = n l2``.

The features are centred first, which changes nothing when the bias is free, and labels become columns of the classes
that occur. The solvers themselves are in ``probe_solvers`` and ``ridge``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.models.probe_rows import (
    binary_rows,
    c_path,
    fit_temperature,
    l2_from_c,
    pad_rows,
    probe_loss,
    rescale_rows,
)
from avalanche_firn.models.probe_solvers import Fit, LBFGSPath, SGDPath, SolverOptions
from avalanche_firn.models.ridge import RidgeStatistics, check_rows, fit_least_squares, one_hot, ridge_solver

__all__ = [
    "ProbeSolution",
    "RidgeStatistics",
    "binary_rows",
    "c_path",
    "fit_least_squares",
    "fit_linear_probe",
    "fit_temperature",
    "l2_from_c",
    "pad_rows",
    "probe_loss",
    "rescale_rows",
    "solve_linear_probe",
]

Solver = Literal["lbfgs", "ridge", "sgd"]
Normalize = Literal["none", "scalar"]

_CONSTANT = 1e-14  # relative size of the rounding errors that centring leaves in a constant column


@dataclass(frozen=True, eq=False)
class ProbeSolution:
    """A fitted probe and how it was reached.

    :param weight: (C, d); rows of absent classes are zero.
    :param bias: (C,).
    :param l2: the penalty used (chosen, if there was a choice).
    :param objective: value of the objective at the solution (with ``normalize="scalar"`` on normalised features).
    :param iterations: of the last fit: L-BFGS iterations, SGD steps, 1 for ridge.
    :param converged: whether the gradient is down to the tolerance; for SGD always True.
    :param val_accuracy: accuracy of the chosen penalty's probe on the validation data, in [0, 1]; None without them.
    :param path: (l2, validation accuracy or None) of every penalty tried, strongest first.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    objective: float
    iterations: int
    converged: bool
    val_accuracy: float | None
    path: list[tuple[float, float | None]]


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    solver: Solver = "lbfgs",
    l2: float | Sequence[float] | None = None,
    num_classes: int | None = None,
    normalize: Normalize = "none",
    val_features: Tensor | None = None,
    val_labels: Tensor | None = None,
    max_iter: int = 500,
    generator: torch.Generator | None = None,
    *,
    bias: bool = True,
    lr: float | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    momentum: float = 0.9,
    refit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of :func:`solve_linear_probe`, which has the same arguments."""
    solution = solve_linear_probe(
        *(features, labels, solver, l2, num_classes, normalize, val_features, val_labels, max_iter, generator),
        bias=bias,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        refit=refit,
    )
    return solution.weight, solution.bias


def solve_linear_probe(
    features: Tensor,
    labels: Tensor,
    solver: Solver = "lbfgs",
    l2: float | Sequence[float] | None = None,
    num_classes: int | None = None,
    normalize: Normalize = "none",
    val_features: Tensor | None = None,
    val_labels: Tensor | None = None,
    max_iter: int = 500,
    generator: torch.Generator | None = None,
    *,
    bias: bool = True,
    lr: float | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    momentum: float = 0.9,
    refit: bool = False,
) -> ProbeSolution:
    """Fit a linear classifier to features. Memory: three float64 copies of the features.

    Args:
        features: (n, d) floating, finite, n >= 1. Not modified.
        labels: (n,) integer class ids >= 0; not all ids need occur.
        solver: ``"lbfgs"`` (the optimum of the cross-entropy), ``"ridge"`` (closed form), ``"sgd"`` (mini-batches).
        l2: penalty >= 0. None is 1/n (a default of this project). A sequence needs validation data: the penalties
            are tried from the strongest on, each from the solution before it, and the first of the best validation
            accuracies wins.
        num_classes: C, the rows of the result; default the largest label + 1.
        normalize: ``"scalar"`` shifts and scales all features by one mean and one (population) deviation, as the
            official code of arXiv 2202.10054 does; the result is folded back, the penalty acts on the scaled problem.
        val_features, val_labels: (m, d) and (m,). A label that does not occur in ``labels`` counts as an error.
        max_iter: of L-BFGS, for each penalty. When they are spent, a RuntimeWarning is issued.
        generator: draws the order of the mini-batches of ``"sgd"``; None is a new one with seed 0.
        bias: False fits no bias; the features are not centred and the bias returned is zero.
        lr: of SGD; it falls to 0 along a cosine over the steps. None is half the largest stable rate, from an estimate
            of the largest curvature of a mini-batch.
        epochs, batch_size, momentum: of SGD.
        refit: fit once more on training and validation data with the chosen penalty.

    Returns:
        The solution; tensors in the dtype (float32 for half precision) and on the device of ``features``. Biases and
        rows of the classes that occur add up to zero (for ridge: biases to 1). With a single class, cross-entropy
        gives a zero head and ridge weight 0 and bias 1.

    Raises:
        ValueError: any argument outside what is described here; as NonFiniteValues, where numbers aren't finite.
        FloatingPointError: SGD diverged.
    """
    options = SolverOptions(max_iter, generator, bias, lr, epochs, batch_size, momentum)
    _check(features, labels, solver, num_classes, normalize, options)
    validation = _check_validation(features, val_features, val_labels, num_classes, refit)
    penalties = _penalties(l2, len(features), validation is not None)
    with torch.inference_mode(False), torch.no_grad():
        return _solve(features, labels, solver, penalties, num_classes, normalize, validation, refit, options)


def _solve(
    features: Tensor,
    labels: Tensor,
    solver: str,
    penalties: list[float],
    num_classes: int | None,
    normalize: str,
    validation: tuple[Tensor, Tensor] | None,
    refit: bool,
    options: SolverOptions,
) -> ProbeSolution:
    problem = _Problem(features, labels, normalize, options.bias)
    fit_one = problem.solver(solver, options)
    path: list[tuple[float, float | None]] = []
    highest = -1.0
    for l2 in penalties:
        candidate = fit_one(l2)
        measured = None if validation is None else problem.accuracy(candidate, *validation)
        path.append((l2, measured))
        if (value := 0.0 if measured is None else measured) > highest:
            fit, penalty, accuracy, highest = candidate, l2, measured, value
    rows, dtype = int(labels.max()) + 1, torch.float64 if features.dtype == torch.float64 else torch.float32
    if refit and validation is not None:
        x, y = validation[0].to(features.device), validation[1].to(features.device, torch.int64)
        features = torch.cat([features.double(), x.double()])
        labels = torch.cat([labels.to(y), y])
        problem = _Problem(features, labels, normalize, options.bias)
        fit, rows = problem.solver(solver, options)(penalty), int(labels.max()) + 1
    weight, bias = pad_rows(*problem.fold_back(fit), problem.present, num_classes or rows)
    objective = problem.objective(fit, penalty, solver)
    if not math.isfinite(objective):
        raise NonFiniteValues(f"the linear probe (solver {solver!r}, l2 {penalty:g}) ended with objective {objective}")
    return ProbeSolution(
        *(weight.to(dtype), bias.to(dtype), penalty, objective, fit.iterations, fit.converged, accuracy, path)
    )


class _Problem:
    """One data set in float64: normalised, centred, labels as columns of the classes that occur."""

    def __init__(self, features: Tensor, labels: Tensor, normalize: str, bias: bool) -> None:
        x = features.detach().to(torch.float64, copy=True)
        self.present, self.columns = labels.to(x.device, torch.int64).unique(return_inverse=True)
        self.classes = len(self.present)
        self.shift, self.scale = x.new_zeros(()), x.new_ones(())
        if normalize == "scalar":
            self.shift, scale = x.mean(), x.std(correction=0)
            self.scale = torch.where(scale > _CONSTANT * self.shift.abs(), scale, torch.ones_like(scale))
            x.sub_(self.shift).div_(self.scale)
        self.mean = x.mean(0) if bias else x.new_zeros(x.shape[1])
        if bias:  # a constant column must become exact zeros: with l2 = 0 its rounding errors would be features
            x.sub_(self.mean)
            x[:, x.abs().amax(0) <= _CONSTANT * self.mean.abs()] = 0
        self.x, self.bias = x, bias

    def solver(self, name: str, options: SolverOptions) -> Callable[[float], Fit]:
        if name == "ridge":
            solve = ridge_solver(self.x, one_hot(self.columns, self.classes), self.bias)
            frequency = torch.bincount(self.columns, minlength=self.classes).to(self.x) / len(self.x)
            offset = frequency if self.bias else torch.zeros_like(frequency)
            return lambda l2: Fit(solve(l2), offset)
        if self.classes == 1:
            zero = self.x.new_zeros(1, self.x.shape[1])
            return lambda l2: Fit(zero, zero[:, 0].clone(), iterations=0)
        if name == "lbfgs":
            return LBFGSPath(self.x, self.columns, self.classes, options)
        return SGDPath(self.x, self.columns, self.classes, options)

    def fold_back(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """(K, d) and (K,) for features as they were given."""
        if not self.bias:
            return fit.weight, fit.bias
        bias = fit.bias - fit.weight @ self.mean
        weight = fit.weight / self.scale
        return weight, bias - weight.sum(1) * self.shift

    def accuracy(self, fit: Fit, features: Tensor, labels: Tensor) -> float:
        weight, bias = self.fold_back(fit)
        predicted = self.present[(features.detach().to(weight) @ weight.T + bias).argmax(1)]
        return float((predicted == labels.to(predicted)).double().mean())

    def objective(self, fit: Fit, l2: float, solver: str) -> float:
        logits = self.x @ fit.weight.T + fit.bias
        if solver == "ridge":
            loss = 0.5 * (logits - F.one_hot(self.columns, self.classes)).square().sum(1).mean()
        else:
            loss = F.cross_entropy(logits, self.columns)
        return float(loss + 0.5 * l2 * fit.weight.square().sum())


def _penalties(l2: float | Sequence[float] | None, n: int, validated: bool) -> list[float]:
    if l2 is None:
        return [1 / n]
    several = np.ndim(l2) > 0
    values = [float(v) for v in np.ravel(np.asarray(l2, dtype=np.float64))]
    if not values or any(not 0 <= v < math.inf for v in values):
        raise ValueError(f"l2: got {l2}; accepted are finite numbers >= 0, or a sequence of them")
    if several and not validated:
        raise ValueError(f"l2: got {len(values)} values without val_features and val_labels to choose by")
    return sorted(values, reverse=True)


def _check(
    features: Tensor, labels: Tensor, solver: str, num_classes: int | None, normalize: str, options: SolverOptions
) -> None:
    for name, choice, accepted in (("solver", solver, get_args(Solver)), ("normalize", normalize, get_args(Normalize))):
        if choice not in accepted:
            raise ValueError(f"{name}: got {choice!r}; accepted are {', '.join(map(repr, accepted))}")
    check_rows(features, labels)
    if len(features) == 0 or features.shape[1] == 0:
        raise ValueError(f"features: got shape {tuple(features.shape)}; accepted is at least one row and one column")
    if num_classes is not None and num_classes <= int(labels.max()):
        raise ValueError(f"num_classes: got {num_classes}, but label {int(labels.max())} occurs")
    if normalize == "scalar" and not options.bias:
        raise ValueError("normalize: 'scalar' shifts the features and needs bias=True")
    for name, value in (("max_iter", options.max_iter), ("epochs", options.epochs), ("batch_size", options.batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; accepted are integers >= 1")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise ValueError(f"lr: got {options.lr}; accepted are finite numbers above 0 and None")
    if not 0 <= options.momentum < 1:
        raise ValueError(f"momentum: got {options.momentum}; accepted are numbers in [0, 1)")


def _check_validation(
    features: Tensor, val_features: Tensor | None, val_labels: Tensor | None, num_classes: int | None, refit: bool
) -> tuple[Tensor, Tensor] | None:
    if (val_features is None) != (val_labels is None):
        raise ValueError("val_features, val_labels: got one without the other")
    if val_features is None or val_labels is None:
        if refit:
            raise ValueError("refit: got True without val_features and val_labels")
        return None
    check_rows(val_features, val_labels, "val_")
    if len(val_features) == 0 or val_features.shape[1] != features.shape[1]:
        got = tuple(val_features.shape)
        raise ValueError(f"val_features: got shape {got}; accepted is (m, {features.shape[1]}) with m >= 1")
    if num_classes is not None and num_classes <= int(val_labels.max()):
        raise ValueError(f"val_labels: got {int(val_labels.max())}; accepted are ids below num_classes = {num_classes}")
    return val_features, val_labels
