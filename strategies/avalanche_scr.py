"""SCR (Supervised Contrastive Replay, arXiv 2103.13885): Avalanche's strategy on any backbone.

Current and stored images and one random view of each are trained with a supervised contrastive loss; in evaluation an
image belongs to the class whose mean feature, over the stored images, is nearest. ``ResumableSCR`` is Avalanche's
``SCR``, whose loss, batches and storage rule it keeps. What differs, and why:

- **Class means** are those of the present encoder, as in the paper's code. Avalanche averages them with the means that
  an earlier encoder had left. They take one pass over the buffer with the strategy's workers and precision.
- **Network.** Made for :class:`~avalanche_firn.models.nearest_mean.NearestMeanNetwork`, which never predicts a class
  without a mean; another ``SCRModel`` trains as well, but can't be checkpointed exactly.
- **Buffer.** Places in the stream (:class:`~avalanche_firn.plugins.placed_buffer.ResumableReplayPlugin`). With fewer
  slots than classes some class would have no mean: refused before the first step.
- **Precision.** The loss is float32 also under autocast: its temperature multiplies errors of similarities by ten.

Like Avalanche's, this is SCR without the paper's "review trick" (one more epoch on the buffer after each task), and
here images come in epochs, not once. Metrics of the training phase that compare outputs with classes mean nothing: in
training mode outputs are projections ``(B, 2, d)``. Cost: four times the images per step (memory and views).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.models import SCRModel
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import SCR
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from avalanche_firn.benchmarks.batches import loader_of
from avalanche_firn.plugins.avalanche_state import autocast_of
from avalanche_firn.plugins.finite_words import listed, nonfinite_stop
from avalanche_firn.plugins.placed_buffer import ResumableReplayPlugin, indexable_stream


class ResumableSCR(SCR):
    """SCR with exact checkpoints.

    :param model: see the module.
    :param augmentations: batch ``(B, C, H, W)`` on the device -> one random view of each image, of the same shape.
    :param mem_size: images stored, in equal shares of the classes seen. 200: continual-learning-baselines, Split
        CIFAR-10 (Avalanche's default: 100).
    :param batch_size_mem: stored images per batch. 100: Avalanche's default.
    :param temperature: of the loss. 0.1: Avalanche's default.
    :raises ValueError: settings out of range; fewer slots than classes; a stream whose experiences can't be looked up
        again.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`.
    """

    mb_output: Any
    replay_plugin: ResumableReplayPlugin
    # functions without a state: known to the class, so that a checkpoint takes them for methods and leaves them out
    augmentations: Any = None
    train_loss: Any = None
    eval_loss: Any = None

    def __init__(
        self,
        *,
        model: SCRModel,
        optimizer: Optimizer,
        augmentations: Callable[[Tensor], Tensor],
        mem_size: int = 200,
        batch_size_mem: int = 100,
        temperature: float = 0.1,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; a number above 0 is accepted")
        replay = ResumableReplayPlugin(mem_size, batch_size_mem=batch_size_mem, storage="class_balanced")
        super().__init__(
            model=model,
            optimizer=optimizer,
            augmentations=augmentations,
            mem_size=mem_size,
            batch_size_mem=batch_size_mem,
            temperature=temperature,
            plugins=list(plugins or []),
            **base_kwargs,
        )
        self.plugins[self.plugins.index(self.replay_plugin)] = replay
        self.replay_plugin = replay
        self._workers = 0

    shares_batches = False
    """Images and their views are one batch, so in a distributed run every process computes all of it."""

    def criterion(self) -> Tensor:
        """Contrastive loss of a training batch, cross-entropy of the distances in evaluation; a scalar."""
        with torch.autocast(self.device.type, enabled=False):
            if self.mb_output.dtype != torch.float64:
                self.mb_output = self.mb_output.float()
            return super().criterion()  # type: ignore[no-any-return]

    def _before_training_exp(self, **kwargs: Any) -> None:
        """Refuse a buffer that leaves classes without a mean."""
        stream = indexable_stream(self.experience)
        classes = {int(c) for experience in stream for c in experience.classes_in_this_experience}
        if self.replay_plugin.mem_size < len(classes):
            raise ValueError(
                f"mem_size is {self.replay_plugin.mem_size} with {len(classes)} classes, whose means are taken over "
                f"stored images; {len(classes)} and above is accepted"
            )
        self._workers = int(kwargs.get("num_workers", 0))
        super()._before_training_exp(**kwargs)

    @torch.no_grad()
    def compute_class_means(self) -> None:
        """Set the means of all classes that have a stored image; no global generator is touched."""
        buffer = self.replay_plugin.storage_policy
        data = buffer.dataset(indexable_stream(self.experience), evaluation=True)
        size = self.eval_mb_size or self.train_mb_size
        loader = loader_of(data, num_workers=self._workers, batch_size=size, generator=torch.Generator())
        classes = buffer.labels.unique()
        ids, sums = classes.to(self.device)[:, None], torch.zeros((), device=self.device)
        found: list[tuple[Tensor, Tensor]] = []  # class and a number that isn't finite if a feature isn't, per image
        for images, targets, *_ in loader:
            with autocast_of(self):
                features = self.model.feature_extractor(images.to(self.device))
            found.append((targets, features.sum(1)))
            features = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
            sums = sums + (ids == targets.to(self.device)).to(features.dtype) @ features  # (classes, d)
        means = F.normalize(sums, dim=1)  # the number of images doesn't change the direction
        if not bool(means.isfinite().all()):
            lost = [int(c) for labels, values in found for c in labels.cpu()[~values.isfinite().cpu()]]
            what = f"the features of class {listed(sorted(set(lost)), 10)} aren't finite"
            raise nonfinite_stop(self, "the class means of SCR", what, "A smaller rate, or fp32, usually helps.")
        self.model.eval_classifier.replace_class_means_dict(dict(zip(classes.tolist(), means, strict=True)))


__all__ = ["ResumableSCR"]
