"""How far a backbone has moved: similarity of its features (linear CKA) and relative distance of its weights.

:func:`linear_cka` and :func:`weight_distance` are pure functions, usable on saved features and checkpoints.
:class:`RepresentationDrift` is the Avalanche metric that follows both over a stream, on a fixed set of images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from avalanche.benchmarks import CLExperience, CLStream
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models import MultiTaskModule
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from avalanche_firn.evaluation.block_outputs import block_names, recorded_blocks
from avalanche_firn.models.parts import extract_features, find_parts
from avalanche_firn.plugins.random_state import private_random_state

Emitted = list[MetricValue] | None

AGAINST = ("initial", "previous")


# -------------------------------------------------------------------- functions
def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Similarity of two representations of the same samples: linear centred kernel alignment (Kornblith et al. 2019).

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with the columns of X and Y centred. In [0, 1]; 1 for representations that
    are equal up to rotation, isotropic scaling and offset (exactly 1.0 for equal ones), unlike a distance of features.
    For n not much larger than d unrelated representations are similar too: about d / (n + d) for random ones.

    Args:
        x: (n, d1) features, row i those of sample i. Any real dtype; computed in float64.
        y: (n, d2) features of the same samples in the same order.

    Returns a float64 scalar on the device of the arguments. Cost: n^2 (d1 + d2) through the (n, n) Gram matrices where
    n < max(d1, d2), else n (d1 + d2)^2. Raises ValueError for other shapes, fewer than two samples, and, naming the
    side, for features that are not finite or equal in all rows: their similarity is not defined.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x and y: got shapes {shapes}; accepted are (n, d1) and (n, d2) with n >= 2 samples")
    x, y = _centred(x, "x"), _centred(y, "y")
    form = _gram_form if x.shape[0] < max(x.shape[1], y.shape[1]) else _feature_form
    return form(x, y).clamp(0, 1)  # rounding may pass the bounds


def _centred(values: Tensor, side: str) -> Tensor:
    """Columns centred, in float64, largest entry 1: no overflow, and the similarity does not depend on the scale."""
    values = values.to(torch.float64)
    values = values - values[0]  # exact zeros for constant columns, and no cancellation under a large offset
    values = values - values.mean(0)
    if not bool(values.isfinite().all()):
        raise ValueError(f"{side}: features that are NaN or infinite have no similarity; finite ones are accepted")
    scale = values.abs().max() if values.numel() else values.new_zeros(())
    if not bool(scale > 0):
        raise ValueError(f"{side}: the features of all {len(values)} samples are equal; accepted are ones that differ")
    return values / scale


def _feature_form(x: Tensor, y: Tensor) -> Tensor:
    cross, own, other = (y.T @ x).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
    return cross / (own * other).sqrt()


def _gram_form(x: Tensor, y: Tensor) -> Tensor:
    k, m = x @ x.T, y @ y.T
    return (k * m).sum() / (k.square().sum() * m.square().sum()).sqrt()


def weight_distance(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Relative distance of weights, ``||theta - theta_ref|| / ||theta_ref||`` over all named tensors together.

    Args:
        state, reference: name -> floating-point tensor, the same names and shapes in both. Pass parameters only,
            ``dict(model.named_parameters())``: statistics of a BatchNorm in a ``state_dict()`` would count as weights.

    The squares are summed in float64 on the CPU. NaN or infinite weights give NaN or infinity. Raises ValueError,
    with a list, for names on one side only, other shapes and tensors that aren't floating-point, and for a reference
    without any weight other than 0.
    """
    wrong = [f"{n} (missing in the state)" for n in reference if n not in state]
    wrong += [f"{n} (missing in the reference)" for n in state if n not in reference]
    for name in (n for n in reference if n in state):
        new, old = state[name], reference[name]
        if new.shape != old.shape:
            wrong.append(f"{name} ({tuple(new.shape)}, reference {tuple(old.shape)})")
        elif not (new.is_floating_point() and old.is_floating_point()):
            wrong.append(f"{name} ({new.dtype}, reference {old.dtype})")
    if wrong:
        raise ValueError(f"weights that can't be compared: {', '.join(wrong)}; accepted are the same parameters twice")
    moved = size = 0.0
    for name, old in reference.items():
        old = old.detach().to("cpu", torch.float64)
        moved += float((state[name].detach().to("cpu", torch.float64) - old).square().sum())
        size += float(old.square().sum())
    if size == 0:
        raise ValueError("reference: all weights are 0, so no distance is relative to it; accepted is a norm above 0")
    return math.sqrt(moved) / math.sqrt(size)


# ------------------------------------------------------------------------ metric
@dataclass(frozen=True)
class _Point:
    """The backbone at one moment, float32 on the CPU; the tensors are never written to."""

    features: Tensor
    blocks: dict[str, Tensor]
    weights: dict[str, Tensor]


class RepresentationDrift(PluginMetric[dict[str, float]]):
    """How far the backbone has moved on a fixed set of images, after every training experience.

    Emitted over the experience index: ``drift/cka``, the :func:`linear_cka` of the features (the input of the
    classifier, evaluation mode) with those of the initial backbone, 1 = no drift; ``drift/weights``, the
    :func:`weight_distance` of the backbone's parameters (all but the classifier's) from the initial ones, 0 = no drift;
    ``drift/cka-previous`` and ``drift/weights-previous``, the same against the end of the experience before (after the
    first one: the initial backbone). With ``blocks`` also ``drift/cka/<block>``, the output of a block, averaged over
    tokens (B, N, d) or space (B, C, H, W; (B, H, W, C) where timm's ``output_fmt`` says so), against its initial one.

    Initial means: before the first training experience that the metric hears of, after the model was adapted to it.
    A value that isn't defined later (features collapsed to a point, weights diverged, parameters added to the backbone)
    is left out with a RuntimeWarning; the run goes on.

    Memory: the images, 4 bytes a number (256 of 3x32x32: 3 MiB, of 3x224x224: 147 MiB); features of two moments
    (256 of 768: 0.8 MiB each); a float32 copy of the backbone on the CPU for each of ``against`` and one more for the
    time of the comparison (ViT-B: 0.3 GiB each), which ``weights=False`` avoids. Checkpoints hold all but the images.
    Cost per experience: a forward pass of the images, and 2 s for each of ``against`` with 86 million weights.

    Training isn't changed by a bit: modes, buffers, gradients and random generators stay. Only what a model itself
    remembers of its last forward pass is that of the fixed images. Multi-task models are not covered.

    Args:
        images: a data set with items ``(x, ...)``, an Avalanche experience or stream, whose ``.eval()`` transforms are
            applied; or a float tensor (n, C, H, W). Read once, here, and kept; x as the model takes it.
        num_images: images to use, drawn without replacement by a private generator; all where there are fewer. Default
            256, our choice.
        against: "initial", "previous" or both.
        blocks: names of modules, ("blocks.2", "blocks.5"), as in the model or unique at the end of a name there; or
            "all": the children of the largest module list named ``blocks``, ``stages`` or ``layers``, or all of
            ``layer1``, ``layer2``, ... Needs "initial" in ``against``.
        head_name: the classifier, where :func:`~avalanche_firn.models.find_parts` doesn't find it.
        batch_size: of the forward passes; its only effect is on memory and speed.
        weights: compare weights too.
        seed: decides which images are drawn.

    Raises ValueError for arguments out of range, fewer than two images or images of different shapes; and, before the
    first training step, for a multi-task model, blocks that aren't found, initial features that are all equal and
    ``weights`` of a backbone that has none.
    """

    def __init__(
        self,
        images: Any,
        *,
        num_images: int = 256,
        against: Sequence[str] = AGAINST,
        blocks: Sequence[str] | str | None = None,
        head_name: str | None = None,
        batch_size: int = 128,
        weights: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(against, str) or not against or len({*against}) < len(against) or not {*against} <= {*AGAINST}:
            raise ValueError(f"against: got {against!r}; accepted are one or both of {AGAINST}, as a sequence")
        if blocks is not None and (not blocks or (isinstance(blocks, str) and blocks != "all")):
            raise ValueError(f"blocks: got {blocks!r}; accepted are None, 'all' and a list of module names")
        if blocks is not None and "initial" not in against:
            raise ValueError(f"blocks: compared with the initial backbone only, and against is {against!r}")
        for name, value, least in (("num_images", num_images, 2), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}; accepted are integers from {least}")
        self.against = [name for name in AGAINST if name in against]
        self.blocks: list[str] | str | None = blocks if blocks is None or isinstance(blocks, str) else [*blocks]
        self.head_name = head_name
        self.batch_size = batch_size
        self.weights = bool(weights)
        with private_random_state():  # transforms may draw from the global ones
            self._rows, self.images = _fixed_images(images, num_images, seed)
        self._references: dict[str, _Point] = {}
        self._values: dict[str, float] = {}

    def __str__(self) -> str:
        return "RepresentationDrift"

    def result(self) -> dict[str, float]:
        """The values emitted last, by tag."""
        return dict(self._values)

    def reset(self) -> None:
        """Nothing to do between experiences: the references are the history of the run."""

    def before_training_exp(self, strategy: Any) -> Emitted:
        if not self._references:  # else taken before, or loaded
            initial = self._observe(strategy)
            for name, values in (("features", initial.features), *initial.blocks.items()):
                try:
                    linear_cka(values, values)
                except ValueError as error:
                    raise ValueError(f"images: the initial backbone's {name} can't be compared: {error}") from error
            if self.weights and not any(bool(w.any()) for w in initial.weights.values()):
                raise ValueError("weights: True, and no weight of the backbone differs from 0; accepted is False then")
            self._references = dict.fromkeys(self.against, initial)
        return None

    def after_training_exp(self, strategy: Any) -> Emitted:
        if not self._references:  # the evaluator was switched off when the experience began
            return None
        current, step = self._observe(strategy), int(strategy.clock.train_exp_counter)
        self._values = {}
        for name, old in self._references.items():
            end = "" if name == "initial" else f"-{name}"
            self._put(f"drift/cka{end}", step, linear_cka, current.features, old.features)
            if self.weights:
                self._put(f"drift/weights{end}", step, weight_distance, current.weights, old.weights)
            for block in old.blocks if name == "initial" else ():
                self._put(f"drift/cka/{block}", step, linear_cka, current.blocks[block], old.blocks[block])
        if "previous" in self._references:
            self._references["previous"] = replace(current, blocks={})
        return [MetricValue(self, tag, value, step) for tag, value in self._values.items()]

    def _put(self, tag: str, step: int, compare: Callable[[Any, Any], Any], new: Any, old: Any) -> None:
        try:
            value = float(compare(new, old))
            why = None if math.isfinite(value) else f"it is {value}"
        except ValueError as error:
            why = str(error)
        if why is None:
            self._values[tag] = value
        else:
            warnings.warn(f"{tag} is left out after experience {step}: {why}", RuntimeWarning, stacklevel=2)

    @torch.no_grad()
    def _observe(self, strategy: Any) -> _Point:
        model = strategy.model
        if isinstance(model, MultiTaskModule):
            raise ValueError(
                f"{type(model).__name__} needs task labels; RepresentationDrift accepts single-task models"
            )
        parts = find_parts(model, self.head_name)
        parameters = {n: p for n, p in parts.backbone_parameters() if p.is_floating_point()}
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        data = TensorDataset(self.images.to(dtype), torch.zeros(len(self.images), dtype=torch.long))
        names = block_names(parts, self.blocks)
        with private_random_state(), recorded_blocks(model, names) as outputs:
            features, _ = extract_features(
                model, data, batch_size=self.batch_size, device=strategy.device, head_name=parts.head_name
            )
        return _Point(
            features=_kept(features),
            blocks={block: _kept(torch.cat(batches)) for block, batches in outputs.items()},
            weights={n: _kept(p) for n, p in parameters.items()} if self.weights else {},
        )

    def _settings(self) -> dict[str, Any]:
        blocks = self.blocks if self.blocks is None or isinstance(self.blocks, str) else [*self.blocks]
        return {"rows": [*self._rows], "against": [*self.against], "blocks": blocks, "weights": self.weights}

    def state_dict(self) -> dict[str, Any]:
        """Reference features and weights (not copied), the last values, and the settings that they belong to."""
        references: dict[str, dict[str, Any] | None] = {name: {**vars(p)} for name, p in self._references.items()}
        if len(references) == 2 and self._references["previous"] is self._references["initial"]:
            references["previous"] = None  # not stored twice
        return {"settings": self._settings(), "references": references, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a metric with the same arguments and images; ValueError where arguments differ."""
        own = self._settings()
        if differing := [name for name in own if state["settings"].get(name) != own[name]]:
            raise ValueError(f"RepresentationDrift: the state was made with another value of {', '.join(differing)}")
        points: dict[str, _Point] = {}
        for name in (n for n in AGAINST if n in state["references"]):
            saved = state["references"][name]
            points[name] = points["initial"] if saved is None else _Point(**{k: _copied(v) for k, v in saved.items()})
        self._references = points
        self._values = {tag: float(value) for tag, value in state["values"].items()}


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _copied(value: Any) -> Any:
    return _kept(value) if isinstance(value, Tensor) else {name: _kept(tensor) for name, tensor in value.items()}


def _fixed_images(images: Any, num_images: int, seed: int) -> tuple[list[int], Tensor]:
    """Rows that were drawn, in ascending order, and these images on the CPU."""
    data = images
    if isinstance(images, CLExperience):
        data = _evaluated(images.dataset)
    elif isinstance(images, CLStream):
        data = ConcatDataset([_evaluated(experience.dataset) for experience in images])
    elif not isinstance(images, Tensor):
        data = _evaluated(images)
    if isinstance(data, Tensor) and (data.ndim < 2 or not data.is_floating_point()):
        raise ValueError(f"images: got {data.dtype} {tuple(data.shape)}; accepted is a float tensor (n, C, H, W)")
    count = len(data)
    if count < 2:
        raise ValueError(f"images: got {count}; accepted are at least 2, as similarity is about differences")
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_images]
    rows = sorted(drawn.tolist())
    if isinstance(data, Tensor):
        return rows, data.detach()[rows].cpu()
    items = [item[0] if isinstance(item, (tuple, list)) else item for item in (data[row] for row in rows)]
    shapes = {tuple(x.shape) if isinstance(x, Tensor) and x.is_floating_point() else type(x).__name__ for x in items}
    if len(shapes) > 1 or not isinstance(next(iter(shapes)), tuple):
        raise ValueError(
            f"images: the data set gives {sorted(map(str, shapes))}; accepted are float tensors of one shape"
        )
    return rows, torch.stack(items).detach().cpu()


def _evaluated(dataset: Any) -> Any:
    return dataset.eval() if callable(getattr(dataset, "eval", None)) else dataset


__all__ = ["RepresentationDrift", "linear_cka", "weight_distance"]
