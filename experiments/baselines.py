"""Builders of Avalanche's own baselines, wired like the other methods.

The backbone with one growing classifier, cross-entropy over all classes seen, an optimizer that is rebuilt in every
experience, mixed precision and zaps from the run's plugins. What our subclasses change in Avalanche's classes stands in
:mod:`~avalanche_firn.plugins.avalanche_state`, :mod:`~avalanche_firn.plugins.placed_buffer`,
:mod:`~avalanche_firn.strategies.avalanche_der` and :mod:`~avalanche_firn.strategies.avalanche_scr`.

Avalanche's LearningToPrompt is missing: with timm 1.0.31 its networks can't be built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.placed_buffer import ResumableReplayPlugin
from avalanche_firn.strategies.avalanche_der import ResumableDER
from avalanche_firn.strategies.avalanche_scr import ResumableSCR

if TYPE_CHECKING:
    from avalanche_firn.experiments.methods import Ingredients

__all__ = ["OneView", "avalanche_replay", "der", "ewc", "lwf", "scr"]


class OneView:
    """One random view of every image, drawn on the device of the batch: (B, C, H, W) float -> the same shape.

    Args:
        augmentation: draws the views.
    """

    def __init__(self, augmentation: ContrastiveAugmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, images: Tensor) -> Tensor:
        views: Tensor = self.augmentation.to(images.device)(images, views=1)
        return views[:, 0]


def _naive_with(parts: Ingredients, own: SupervisedPlugin) -> SupervisedTemplate:
    """Sequential fine-tuning and one plugin; it comes before zaps, so that a teacher is what was trained."""
    fresh = FreshOptimizerPlugin(scheduler_factory=parts.schedule())
    return Naive(
        **parts.common(parts.model(freeze_old=False)),
        criterion=nn.CrossEntropyLoss(),
        plugins=[fresh, own, *parts.extra_plugins()],
    )


def ewc(parts: Ingredients) -> SupervisedTemplate:
    """Elastic weight consolidation."""
    method = parts.method
    own = ResumableEWCPlugin(method.ewc_lambda, method.mode, method.decay_factor, method.keep_importance_data)
    return _naive_with(parts, own)


def lwf(parts: Ingredients) -> SupervisedTemplate:
    """Learning without forgetting."""
    method = parts.method
    return _naive_with(parts, ResumableLwFPlugin(method.alpha, method.temperature, teacher=method.teacher))


def avalanche_replay(parts: Ingredients) -> SupervisedTemplate:
    """Avalanche's experience replay."""
    return _naive_with(parts, ResumableReplayPlugin(**parts.method.rehearsal.model_dump()))


def der(parts: Ingredients) -> SupervisedTemplate:
    """Dark experience replay; DER++ with a beta above 0."""
    method = parts.method
    return ResumableDER(
        **parts.common(parts.model(freeze_old=False)),
        criterion=nn.CrossEntropyLoss(),
        **method.rehearsal.model_dump(),
        alpha=method.alpha,
        beta=method.beta,
        plugins=[FreshOptimizerPlugin(scheduler_factory=parts.schedule()), *parts.extra_plugins()],
    )


def scr(parts: Ingredients, augmentation: ContrastiveAugmentation) -> SupervisedTemplate:
    """Supervised contrastive replay, whose second views `augmentation` draws."""
    method, backbone = parts.method, parts.backbone
    model = NearestMeanNetwork(backbone.module, backbone.num_features, projection_size=method.projection_size)
    return ResumableSCR(
        **parts.common(model),
        **method.rehearsal.model_dump(),
        temperature=method.temperature,
        augmentations=OneView(augmentation),
        plugins=[FreshOptimizerPlugin(scheduler_factory=parts.schedule()), *parts.extra_plugins()],
    )
