"""The classifier stage of contrastive methods: after an experience, a fresh linear classifier on the frozen backbone.

Co2L (arXiv 2106.14413, released code): features are the backbone's, not the projector's, in evaluation mode; the data
are the experience just trained and the buffer that it was trained with (that of Avalanche's ``ReplayPlugin`` as it is
by then); classes are balanced by sampling with replacement; every epoch draws new augmented single views. The
classifier starts anew each time and covers the classes seen so far.

Differs from the released code: the last epoch counts, not the best one on the test set; classes not seen yet have no
row (there they are rows that are never a target); random numbers are the plugin's own, so running the stage or not
does not change the representation. Cost: one forward pass over the data per epoch with ``views="augmented"``, one in
all with ``"evaluation"``, which differs from the paper and is meant for machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import WeightedRandomSampler

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
from avalanche_firn.benchmarks.batches import loader_of
from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.models.linear_rows import linear_rows
from avalanche_firn.models.parts import ModelParts, evaluation_mode, extract_features, find_parts
from avalanche_firn.plugins.feature_checks import check_by_class
from avalanche_firn.plugins.finite_words import finite_or_stop, nonfinite_stop
from avalanche_firn.plugins.random_state import derived_seed, private_random_state
from avalanche_firn.plugins.rehearsal import RehearsalSet, find_rehearsal
from avalanche_firn.plugins.schedules import multistep


def balancing_weights(groups: Sequence[int] | Tensor) -> Tensor:
    """Sampling weights ``(N,)`` float64 that give every group the same share: 1 / size of the sample's group.

    :param groups: ``(N,)`` class or domain ids. :raises ValueError: empty.
    """
    ids = torch.as_tensor(groups)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"groups has shape {tuple(ids.shape)}; at least one id (N,) is accepted")
    _, places, counts = ids.unique(return_inverse=True, return_counts=True)
    return counts.double().reciprocal()[places]


class ClassifierStagePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Fit the linear classifier after an experience, whatever its features were trained with.

    :param epochs: 100. :param batch_size: 256. :param lr: 1.0 (0.1: Seq-Tiny-ImageNet). :param momentum: 0.9.
    :param weight_decay: 0. :param milestones: the rate falls after these epochs (60, 75, 90); None: after 60, 75 and
        90 % of ``epochs``. :param decay: to this part, 0.2. All: Co2L's released code.
    :param when: ``"every"`` experience or only the ``"final"`` one, before which the classifier means nothing.
    :param balance: ``"class"``, or ``"domain"`` as the released code has it on the digits.
    :param views: ``"augmented"``, or ``"evaluation"``: features once, under the evaluation transform.
    :param augmentation: of batches on the device, ``(B, C, H, W) -> (B, V, C, H, W)``; the first view counts. None: the
        training transform of the data set alone.
    :param seed: of initialisation, draws and augmentation. :param num_workers: loader processes.
    :raises ValueError: settings out of range; a classifier that is not linear.
    :raises NonFiniteError: features or the loss aren't finite; the message names the classes.
    """

    def __init__(
        self,
        epochs: int = 100,
        batch_size: int = 256,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        milestones: Sequence[int] | None = None,
        decay: float = 0.2,
        *,
        when: Literal["every", "final"] = "every",
        balance: Literal["class", "domain"] = "class",
        views: Literal["augmented", "evaluation"] = "augmented",
        augmentation: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for field, value, least in (
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("momentum", momentum, 0),
            ("weight_decay", weight_decay, 0),
        ):
            if not value >= least:
                raise ValueError(f"{field} is {value}; {least} and above is accepted")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; a rate above 0 is accepted")
        for field, text, accepted in (
            ("when", when, ("every", "final")),
            ("balance", balance, ("class", "domain")),
            ("views", views, ("augmented", "evaluation")),
        ):
            if text not in accepted:
                raise ValueError(f"{field} is {text!r}; {accepted[0]!r} or {accepted[1]!r} is accepted")
        if milestones is None:
            milestones = sorted({e for share in (0.6, 0.75, 0.9) if 1 <= (e := round(share * epochs)) < epochs})
        self.schedule = multistep(milestones, decay)
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.when = when
        self.balance = balance
        self.views = views
        self.augmentation = augmentation
        self.seed = seed
        self.num_workers = num_workers
        self._classes: set[int] = set()

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse what would show a classifier that belongs to earlier features."""
        if strategy.eval_every > 0:
            raise ValueError(
                f"eval_every is {strategy.eval_every}; with a classifier stage -1 or 0 is accepted: inside an "
                "experience the classifier belongs to earlier features"
            )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The classifier must be one whose rows can be written."""
        self._classes |= {int(c) for c in strategy.experience.classes_in_this_experience}
        head = find_parts(strategy.model).head
        if linear_rows(head, sorted(self._classes)) is None:
            raise ValueError(f"the classifier is a {type(head).__name__}; a linear one is accepted")

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Fit the classifier, before anything is evaluated."""
        experience = strategy.experience
        if self.when == "final" and experience.current_experience + 1 < len(full_stream(experience)):
            return
        with private_random_state(self._seed(strategy)):
            loss, accuracy = self.fit(strategy)
        if strategy.evaluator.active:
            for tag, value in (("classifier/loss", loss), ("classifier/accuracy", accuracy)):
                step = strategy.clock.train_exp_counter
                strategy.evaluator.publish_metric_value(MetricValue(self, tag, value, step))

    # ------------------------------------------------------------------ work
    @torch.enable_grad()
    def fit(self, strategy: Any) -> tuple[float, float]:
        """Fit now; loss (nats) and accuracy over the draws of the last epoch."""
        parts = find_parts(strategy.model)
        classes = torch.tensor(sorted(self._classes), device=strategy.device)
        data = self._data(strategy)
        groups = data.origins if self.balance == "domain" else data.targets
        sampler = WeightedRandomSampler(
            balancing_weights(groups).tolist(), len(data), generator=torch.Generator().manual_seed(self._seed(strategy))
        )
        batches = self._stored(strategy, parts, data, sampler) if self.views == "evaluation" else None
        if batches is None:
            batches = self._augmented(strategy, parts, data, sampler)
        rows = linear_rows(parts.head, classes.tolist())
        assert rows is not None
        like = rows.read()[0]
        layer = nn.Linear(like.shape[1], len(classes), bias=rows.has_bias, device=like.device, dtype=like.dtype)
        optimizer = torch.optim.SGD(
            layer.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = self.schedule(optimizer)
        for _ in range(self.epochs):
            total, hits = torch.zeros(2, device=strategy.device).unbind()
            for features, targets in batches():
                logits = layer(features)
                wanted = torch.searchsorted(classes, targets)
                loss = F.cross_entropy(logits, wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total = total + loss.detach() * len(targets)
                hits = hits + (logits.detach().argmax(1) == wanted).sum()
            schedule.step()
        mean, accuracy = (torch.stack([total, hits]) / len(data)).tolist()
        if not np.isfinite(mean):
            with finite_or_stop(strategy, "the classifier stage", "A smaller rate, fp32 or bf16 usually helps."):
                check_by_class(*self._plain_features(strategy))
            what = f"its loss became {mean} with lr {self.lr:g}, while the features are finite"
            raise nonfinite_stop(strategy, "the classifier stage", what, "A smaller lr of the stage is needed.")
        with torch.no_grad():
            rows.write(layer.weight, layer.bias if rows.has_bias else like.new_zeros(len(classes)))
        return mean, accuracy

    def _plain_features(self, strategy: Any) -> tuple[Tensor, Tensor]:
        """Features and class ids of all its data under the evaluation transform."""
        data, size = self._data(strategy, evaluation=True), strategy.eval_mb_size
        return extract_features(strategy.model, data, batch_size=size, device=strategy.device)

    def _data(self, strategy: Any, evaluation: bool | None = None) -> RehearsalSet:
        rehearsal = find_rehearsal(strategy)
        evaluation = self.views == "evaluation" if evaluation is None else evaluation
        if rehearsal is not None:
            return rehearsal.dataset(strategy.experience, evaluation=evaluation)
        replayed = [p.storage_policy.buffer for p in strategy.plugins if isinstance(p, ReplayPlugin)]
        sets = [(strategy.experience.dataset, int(strategy.experience.current_experience))]
        sets += [(buffer, -1) for buffer in replayed if len(buffer)]  # whose samples don't say where they come from
        return RehearsalSet(
            [(data.eval() if evaluation else data.train(), range(len(data)), origin) for data, origin in sets]
        )

    def _augmented(
        self, strategy: Any, parts: ModelParts, data: RehearsalSet, sampler: WeightedRandomSampler
    ) -> Callable[[], Any]:
        loader = loader_of(data, num_workers=self.num_workers, batch_size=self.batch_size, sampler=sampler)

        def epoch() -> Any:
            for batch in loader:
                yield self._features(strategy, parts, batch[0]), batch[1].to(strategy.device, non_blocking=True)

        return epoch

    def _stored(
        self, strategy: Any, parts: ModelParts, data: RehearsalSet, sampler: WeightedRandomSampler
    ) -> Callable[[], Any]:
        """Features once; the draws of each epoch pick from them."""
        loader = loader_of(data, num_workers=self.num_workers, batch_size=strategy.eval_mb_size)
        found = [(self._features(strategy, parts, batch[0], plain=True), batch[1]) for batch in loader]
        features = torch.cat([f for f, _ in found])
        targets = torch.cat([t for _, t in found]).to(strategy.device)

        def epoch() -> Any:
            for rows in torch.tensor(list(sampler)).split(self.batch_size):
                places = rows.to(strategy.device)
                yield features[places], targets[places]

        return epoch

    @torch.no_grad()
    def _features(self, strategy: Any, parts: ModelParts, images: Tensor, *, plain: bool = False) -> Tensor:
        """Input of the classifier ``(B, d)``, backbone in evaluation mode."""
        images = images.to(strategy.device, non_blocking=True)
        if not plain and isinstance(self.augmentation, ContrastiveAugmentation):
            images = self.augmentation.to(images.device)(images, views=1)
        elif not plain and self.augmentation is not None:
            images = self.augmentation(images)
        if images.ndim == 5:
            images = images[:, 0]
        captured: list[Tensor] = []
        handle = parts.head.register_forward_pre_hook(lambda _, args: captured.append(args[0].detach()))
        try:
            with evaluation_mode(strategy.model):
                strategy.model(images)
        finally:
            handle.remove()
        return captured[-1] if captured[-1].dtype == torch.float64 else captured[-1].float()

    def _seed(self, strategy: Any) -> int:
        return derived_seed(self.seed, strategy.clock.train_exp_counter)

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Classes seen; the classifier itself belongs to the model."""
        return {"classes": sorted(self._classes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._classes = set(state["classes"])


__all__ = ["ClassifierStagePlugin", "balancing_weights"]
