"""Put a linear probe into the classifier of a model, and say what came of it.

The functions behind :class:`~avalanche_firn.plugins.linear_probe.LinearProbePlugin`: features in, rows of the
classifier written in place, whatever module holds them.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.benchmarks.subsets import holdout_split
from avalanche_firn.models.linear_probe import fit_temperature, rescale_rows, solve_linear_probe
from avalanche_firn.models.linear_rows import linear_rows
from avalanche_firn.models.parts import evaluation_mode, extract_features, find_parts
from avalanche_firn.plugins.head_training import head_logits, train_head

Solver = Literal["lbfgs", "ridge", "sgd"]
Scope = Literal["current", "all"]
Rescale = Literal["temperature"] | bool
ParameterFilter = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class ProbeReport:
    """What a linear probe found.

    ``loss`` (nats) and ``accuracy`` over the current classes, on the features it was solved on; ``loss_all_rows``: loss
    of the whole classifier on them, which is where fine-tuning starts; ``head_norm``: Frobenius norm of the rows
    written (the larger, the less the features move); ``l2``: the penalty used; ``loss_bn_train``: loss with BatchNorm
    in training mode (None: not asked for); ``seconds``: of this process (NaN in a resumed one), not logged, since no
    two runs repeat it.
    """

    experience: int
    samples: int
    classes: tuple[int, ...]
    loss: float
    loss_all_rows: float
    accuracy: float
    head_norm: float
    l2: float
    loss_bn_train: float | None = None
    seconds: float = field(default=math.nan, compare=False)

    def figures(self) -> dict[str, float]:
        """What is logged, by tag."""
        names = ("loss", "loss_all_rows", "accuracy", "head_norm", "l2", "loss_bn_train")
        values = {name: getattr(self, name) for name in names}
        return {f"lp/{name.replace('_', '-')}": value for name, value in values.items() if value is not None}


def write_probe(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    *,
    task_label: int = 0,
    solver: Solver = "lbfgs",
    l2: float | Sequence[float] | None = None,
    lp_scope: Scope = "current",
    normalize: Literal["none", "scalar"] = "none",
    rescale_head: Rescale = False,
    val_fraction: float = 0.2,
    max_iter: int = 500,
    lr: float | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    seed: int = 0,
    fresh_features: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> float:
    """Solve a linear probe on features and write it into a classifier, in place.

    :param head: a classifier that :func:`~avalanche_firn.models.linear_rows.linear_rows` knows, or any other with
        ``solver="sgd"``: it is then trained as a module, and ``normalize`` and ``rescale_head`` are refused.
    :param features: ``(N, d)``. :param targets: ``(N,)`` class ids.
    :param fresh_features: see :func:`~avalanche_firn.plugins.head_training.train_head`; only with ``solver="sgd"``.
    :param seed: of the held-out part and the order of batches. Other parameters: of ``LinearProbePlugin``.
    :returns: the penalty used.
    :raises ValueError: a class has no row; settings that the classifier does not allow.
    """
    classes = targets.unique()
    rows = linear_rows(head, classes.tolist(), task_label=task_label)
    if rows is None or fresh_features is not None:
        if isinstance(l2, Sequence) or normalize != "none" or rescale_head is not False or solver != "sgd":
            raise ValueError(
                f"solver {solver!r}, l2 {l2!r}, normalize {normalize!r}, rescale_head {rescale_head!r}: where a "
                f"{type(head).__name__} is trained as a module, 'sgd', one l2, 'none' and False are accepted"
            )
        penalty = 1 / len(targets) if l2 is None else float(l2)
        train_head(
            head,
            features,
            targets,
            classes=classes.tolist() if lp_scope == "current" else None,
            task_label=task_label,
            l2=penalty,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(seed),
            fresh_features=fresh_features,
        )
        return penalty
    labels = torch.searchsorted(classes, targets)
    options: dict[str, Any] = dict(
        solver=solver,
        num_classes=len(classes),
        normalize=normalize,
        max_iter=max_iter,
        bias=rows.has_bias,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        generator=torch.Generator(features.device).manual_seed(seed),
    )
    if isinstance(l2, Sequence):
        train, held = holdout_split(labels.cpu().numpy(), val_fraction, seed % 2**32)
        if not len(held):
            raise ValueError(
                f"l2 is {list(l2)}, and no class has a second sample to choose on; one l2 is accepted here"
            )
        part, rest = (torch.from_numpy(i).to(labels.device) for i in (train, held))
        options |= {"val_features": features[rest], "val_labels": labels[rest], "refit": True}
        solution = solve_linear_probe(features[part], labels[part], l2=l2, **options)
    else:
        solution = solve_linear_probe(features, labels, l2=l2, **options)
    weight, bias = solution.weight, solution.bias
    if rescale_head is True:
        weight, bias = rescale_rows(weight, bias, rows.read()[0])
    elif rescale_head == "temperature":
        temperature = fit_temperature(F.linear(features, weight, bias), labels)
        weight, bias = weight / temperature, bias / temperature
    if lp_scope == "all":
        everything = linear_rows(head, task_label=task_label)
        assert everything is not None
        everything.write(*(torch.zeros_like(part) for part in everything.read()))
    rows.write(weight, bias)
    return solution.l2


@torch.no_grad()
def describe_probe(
    head: nn.Module, features: Tensor, targets: Tensor, *, task_label: int = 0
) -> tuple[tuple[int, ...], dict[str, float]]:
    """Classes of the targets, and ``loss``, ``loss_all_rows``, ``accuracy``, ``head_norm`` of a classifier on features.

    One transfer from the device for all four.
    """
    classes = targets.unique()
    local = torch.searchsorted(classes, targets)
    with evaluation_mode(head):
        logits = head_logits(head, features, task_label).float()
    rows = linear_rows(head, classes.tolist(), task_label=task_label)
    written = [rows.read()[0]] if rows is not None else [p.detach() for p in head.parameters()]
    current = logits[:, classes]
    found = [
        F.cross_entropy(current, local),
        F.cross_entropy(logits, targets),
        (current.argmax(1) == local).float().mean(),
        torch.stack([w.float().norm() for w in written]).norm(),
    ]
    names = ("loss", "loss_all_rows", "accuracy", "head_norm")
    return tuple(classes.tolist()), dict(zip(names, torch.stack(found).tolist(), strict=True))


@torch.no_grad()
def batch_statistics_loss(model: nn.Module, dataset: Any, *, task_label: int = 0, **extraction: Any) -> float:
    """Loss with BatchNorm in training mode, as the first epoch of fine-tuning would meet it; changes nothing.

    :param extraction: of :func:`~avalanche_firn.models.parts.extract_features`.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        features, targets = extract_features(model, dataset, bn="train", **extraction)
    finally:
        for buffer, kept in buffers:
            buffer.copy_(kept)
    head = find_parts(model, extraction.get("head_name")).head
    with evaluation_mode(head):
        return float(F.cross_entropy(head_logits(head, features, task_label).float(), targets))


def parameter_filter(given: ParameterFilter | Sequence[str] | None) -> ParameterFilter | None:
    """``(name, parameter) -> bool`` of a function or of name patterns; ValueError for anything else."""
    if given is None or callable(given):
        return given
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"backbone is {given!r}; None, a function or a list of name patterns is accepted")
    patterns = list(given)
    return lambda name, parameter: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def not_linear(head: nn.Module) -> bool:
    """Whether a classifier has no rows that a solver could write."""
    try:
        return linear_rows(head) is None
    except ValueError:  # linear, and without a row so far
        return False


def task_label_of(experience: Any) -> int:
    """Task label of an experience, 0 where there is none."""
    labels = getattr(experience, "task_labels", None) or [0]
    return int(labels[0])


__all__ = [
    "ParameterFilter",
    "ProbeReport",
    "batch_statistics_loss",
    "describe_probe",
    "not_linear",
    "parameter_filter",
    "task_label_of",
    "write_probe",
]
