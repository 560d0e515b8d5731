"""A network for supervised contrastive replay: projections in training, distances to class means in evaluation.

SCR (arXiv 2103.13885) trains an encoder through a projector and classifies by the nearest class mean of the encoder's
normalised features. :class:`NearestMeanHead` is Avalanche's ``NCMClassifier`` for class ids with gaps and for
checkpoints; :class:`NearestMeanNetwork` is an ``SCRModel``, which Avalanche's ``SCR`` asks for, around any backbone.

Differs from Avalanche's: a class without a mean is never predicted (there its mean is the zero vector, at distance 1 of
every feature, nearer than a mean at more than 60 degrees); evaluation adds no such vectors to the model; the projector
sees the features as they are and its output has unit norm, as in the paper's code (Avalanche: the other way round).
Cost: one ``(B, C)`` matrix of distances, in float32 also under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import NCMClassifier, SCRModel
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models.contrastive import ContrastiveClassifier
from avalanche_firn.models.convnets import ProjectionHead
from avalanche_firn.models.heads import UNSEEN_LOGIT


class NearestMeanHead(NCMClassifier):
    """Negative distances of normalised features to the class means.

    Means are set by ``replace_class_means_dict({class id: (d,)})``; without any, all outputs are equal.
    """

    class_means: Tensor | None
    class_means_dict: dict[int, Tensor]
    max_class: int

    def __init__(self) -> None:
        super().__init__(normalize=True)

    @property
    def known_classes(self) -> tuple[int, ...]:
        """Classes with a mean, sorted."""
        return tuple(sorted(self.class_means_dict))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, d)`` -> ``(B, max class id + 1)``, by class id; :data:`UNSEEN_LOGIT` for unknown classes."""
        means = self.class_means
        width = self.max_class + 1
        if means is None:
            return x.new_full((len(x), width), UNSEEN_LOGIT, dtype=torch.float32)
        means = means.to(x.device)  # a loaded state may lie elsewhere until the model is moved
        with torch.autocast(x.device.type, enabled=False):
            features = F.normalize(x.to(means.dtype), dim=1)
            near = -torch.cdist(features, means)
        near = near.masked_fill(~means.any(dim=1), UNSEEN_LOGIT)
        return F.pad(near, (0, width - len(means)), value=UNSEEN_LOGIT)

    def adaptation(self, experience: Any) -> None:
        """Avalanche's hook: the output gets a column for every class of the experience, and nothing else changes."""
        self.max_class = max([self.max_class, *map(int, experience.classes_in_this_experience)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the means of the state, however many there are."""
        saved = state_dict.get(f"{prefix}class_means")
        device = None if self.class_means is None else self.class_means.device
        self.class_means = None if saved is None else torch.empty_like(saved, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        means = self.class_means
        rows = [] if means is None else torch.nonzero(means.any(dim=1)).flatten().tolist()
        self.class_means_dict = {} if means is None else {c: means[c].clone() for c in rows}
        self.max_class = max(self.max_class, -1 if means is None else len(means) - 1)


class NearestMeanNetwork(SCRModel, ContrastiveClassifier):
    """Backbone with a projector for training and a :class:`NearestMeanHead` for evaluation.

    :param backbone: module whose output is features ``(B, f)``.
    :param feature_size: f.
    :param projection_size: d of the projections. 128: the paper's code.

    In training mode ``(B, d)`` of unit norm, in evaluation mode outputs by class id.
    """

    def __init__(self, backbone: nn.Module, feature_size: int, *, projection_size: int = 128) -> None:
        projector = ProjectionHead(feature_size, None, projection_size)
        ContrastiveClassifier.__init__(self, backbone, projector, NearestMeanHead())  # not SCRModel's: other names

    # the names that Avalanche's SCR knows them by
    @property
    def feature_extractor(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    @property
    def train_classifier(self) -> nn.Module:
        """The projector."""
        return self.projector

    @property
    def eval_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> projections in training, outputs by class id in evaluation."""
        return self.project(x) if self.training else self.head(self.backbone(x))


__all__ = ["NearestMeanHead", "NearestMeanNetwork"]
