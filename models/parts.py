"""Which part of a model is the backbone and which the classifier: decided here, once, for every method.

The classifier is found in this order: the name given by the user; the only :class:`TaskwiseLinearHead` in the model;
an attribute ``head`` beside an attribute ``backbone``; the classifier that timm names; the only one of the attributes
``head``, ``classifier``, ``fc``. All that is not the classifier is the backbone. Features are what enters the
classifier, so every model that ends in a linear classifier works, whatever happens before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.processes import all_rows, own_rows, process_count

_COMMON_NAMES = ("head", "classifier", "fc")

BatchNormMode = Literal["eval", "train", "new_bn_stats", "refresh"]
"""How BatchNorm behaves in :func:`extract_features`; all but ``"eval"`` change its running statistics."""


@dataclass(frozen=True)
class ModelParts:
    """A model split into backbone and classifier.

    :param model: the whole model.
    :param head_name: dotted name of the classifier inside the model.
    """

    model: nn.Module
    head_name: str

    @property
    def head(self) -> nn.Module:
        """The classifier module (looked up each time: growing heads may be replaced)."""
        return self.model.get_submodule(self.head_name)

    def is_head(self, parameter_name: str) -> bool:
        """Whether a parameter of the model belongs to the classifier."""
        return parameter_name.startswith(f"{self.head_name}.")

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters outside the classifier."""
        return ((n, p) for n, p in self.model.named_parameters() if not self.is_head(n))

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the classifier."""
        return ((n, p) for n, p in self.model.named_parameters() if self.is_head(n))

    def backbone_eval(self) -> None:
        """Put everything but the classifier into evaluation mode (frozen BatchNorm statistics, no dropout)."""
        head = self.head
        training = head.training
        self.model.eval()
        head.train(training)


def find_parts(model: nn.Module, head_name: str | None = None) -> ModelParts:
    """Find the classifier of a model (order: see the module).

    :param head_name: dotted name of the classifier, where it cannot be found or another one is meant.
    :raises ValueError: the name does not exist, no classifier was found, or several could be meant.
    """
    if head_name is not None:
        names = [name for name, _ in model.named_modules()]
        if not head_name or head_name not in names:
            raise ValueError(
                f"head_name {head_name!r} is no module of {type(model).__name__}; top level: {_top_level(model)}"
            )
        return ModelParts(model, head_name)
    taskwise = [name for name, module in model.named_modules() if isinstance(module, TaskwiseLinearHead)]
    if len(taskwise) == 1:
        return ModelParts(model, taskwise[0])
    if len(taskwise) > 1:
        raise ValueError(
            f"{type(model).__name__} has several classifiers, {taskwise}; name the one that is meant: head_name=..."
        )
    children = dict(model.named_children())
    if "backbone" in children and "head" in children:
        return ModelParts(model, "head")
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    named = config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)
    if isinstance(named, (tuple, list)):
        raise ValueError(
            f"{type(model).__name__} has several classifiers, {list(named)}; name the one that is meant: head_name=..."
        )
    candidates = [named] if named else [name for name in _COMMON_NAMES if name in children]
    candidates = [name for name in candidates if _is_module(model, name)]
    if len(candidates) == 1:
        return ModelParts(model, candidates[0])
    found = f"could be any of {candidates}" if candidates else "was not found"
    raise ValueError(
        f"the classifier of {type(model).__name__} {found}; give head_name=..., one of "
        f"{_top_level(model)} or a dotted name below"
    )


def _is_module(model: nn.Module, name: str) -> bool:
    try:
        return not isinstance(model.get_submodule(name), nn.Identity)
    except AttributeError:
        return False


def _top_level(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children()]


class FeatureClassifier(nn.Module):
    """``head(backbone(x))``: any feature extractor with a classifier of ours on top.

    :param backbone: module whose output is features ``(B, d)``.
    :param head: module from features to logits.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, ...)`` -> logits."""
        return self.head(self.backbone(x))


def with_taskwise_head(model: nn.Module, *, feature_size: int | None = None, freeze_old: bool = True) -> nn.Module:
    """A model that ends in a :class:`TaskwiseLinearHead`; one that already does is returned unchanged.

    :param model: a timm model (its classifier is removed), or any module with a feature output ``(B, d)``.
    :param feature_size: d, where the model has no ``num_features``.
    :raises ValueError: the feature size is not known.
    """
    if any(isinstance(module, TaskwiseLinearHead) for module in model.modules()):
        return model
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(0)
    if feature_size is None:
        # timm: features after a hidden layer of the classifier can be wider than num_features
        feature_size = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if not isinstance(feature_size, int):
        raise ValueError(f"the feature size of {type(model).__name__} is not known; give feature_size=...")
    return FeatureClassifier(model, TaskwiseLinearHead(feature_size, freeze_old=freeze_old))


def forward_batch(batch_size: int | None, device: torch.device) -> int:
    """Images per forward pass without gradients: the number asked for, or for None one that suits the device.

    16 on a CPU: measured on the 28-pixel convnets, batches whose maps leave the cache take three times as long per
    image. 256 elsewhere, where few large kernels are faster.
    """
    if batch_size is not None:
        return batch_size
    return 16 if device.type == "cpu" else 256


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, every module's own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    head_name: str | None = None,
    bn: BatchNormMode = "eval",
) -> tuple[Tensor, Tensor]:
    """Features of a data set: the input of the classifier, in evaluation mode, without gradients.

    :param dataset: items ``(x, y, ...)``; for statistics pass ``experience.dataset.eval()``, which applies the
        evaluation transform. Models with task labels get the last element of the items.
    :param bn: ``"eval"``: running statistics as they are, nothing changes. ``"train"``: the whole model in training
        mode, batch statistics. ``"new_bn_stats"``: one pass in training mode first, then evaluation mode.
        ``"refresh"``: statistics reset and averaged over one pass with equal weights, dropout off, then evaluation
        mode. The last three move the running statistics (arXiv 2202.10054, released code, has the first three); batches
        are those of ``batch_size`` in stored order.
    :returns: features ``(N, d)`` (float32 after a forward pass in half precision) and targets ``(N,)``, on ``device``.
    :raises ValueError: the data set is empty, the features are not ``(B, d)``, an unknown ``bn``.

    In a distributed run (:mod:`~avalanche_firn.models.processes`) all processes call it and get everything; with
    ``bn="eval"`` each computes its own rows.

    With ``bn="eval"`` the global random generators are not touched, so the order of later batches does not depend on
    this call (training modes may draw dropout masks).
    """
    from avalanche_firn.benchmarks.batches import loader_of  # here: loading the package of streams takes seconds

    if len(dataset) == 0:
        raise ValueError("the data set is empty; features need at least one sample")
    if bn not in get_args(BatchNormMode):
        raise ValueError(f"bn is {bn!r}; one of {list(get_args(BatchNormMode))} is accepted")
    parts = find_parts(model, head_name)
    captured: list[Tensor] = []
    handle = parts.head.register_forward_pre_hook(lambda _, args: captured.append(args[0].detach()))
    # the private generator: else the loader draws its seed from the global one
    options: dict[str, Any] = {"batch_size": batch_size, "generator": torch.Generator()}
    shared = bn == "eval" and process_count() > 1
    if shared:
        rows = own_rows(len(dataset))
        options["sampler"] = range(rows.start, rows.stop)
    loader = loader_of(dataset, num_workers=num_workers, **options)
    features, targets = [], []
    try:
        with evaluation_mode(model):
            if bn in ("new_bn_stats", "refresh"):
                _renew_statistics(model, loader, device, reset=bn == "refresh")
            model.train(bn == "train")
            for batch in loader:
                _forward(model, batch, device)
                if not captured:
                    raise ValueError(
                        f"{type(model).__name__} doesn't call its classifier {parts.head_name!r} with bn={bn!r}, in "
                        "training mode; 'eval', 'new_bn_stats' or 'refresh' is accepted"
                    )
                features.append(captured.pop())
                captured.clear()  # a model may call its classifier more than once; the last call is the answer
                targets.append(batch[1].to(device, non_blocking=True))
    finally:
        handle.remove()
    stacked = torch.cat(features)
    if stacked.ndim != 2:
        raise ValueError(
            f"the classifier {parts.head_name!r} receives {tuple(stacked.shape)}; features (B, d) are accepted"
        )
    found = stacked if stacked.dtype == torch.float64 else stacked.float(), torch.cat(targets)
    return (all_rows(found[0], len(dataset)), all_rows(found[1], len(dataset))) if shared else found


def _forward(model: nn.Module, batch: Any, device: torch.device | str) -> Tensor:
    labels = batch[-1].to(device, non_blocking=True) if len(batch) > 2 else None
    return avalanche_forward(model, batch[0].to(device, non_blocking=True), labels)


def _renew_statistics(model: nn.Module, loader: Any, device: torch.device | str, *, reset: bool) -> None:
    """One pass that moves BatchNorm's running statistics: by their momentum, or from zero with equal weights."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.train(not reset)
    try:
        if reset:
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
        for batch in loader:
            _forward(model, batch, device)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


__all__ = [
    "BatchNormMode",
    "FeatureClassifier",
    "ModelParts",
    "evaluation_mode",
    "extract_features",
    "find_parts",
    "forward_batch",
    "with_taskwise_head",
]
