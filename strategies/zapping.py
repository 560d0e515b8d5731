"""ASB and Meta-ASB: alternating sequential and batch learning with zapping (arXiv 2310.07996, 2507.01559).

A pre-trainer for one labelled data set. An episode learns some images of one random class one after the other, its row
of the classifier redrawn before (the zap), then a batch of those and of images of the whole set. The layers below must
stay useful while the classifier is relearned again and again, which is meant to make them transfer better.

``ASB(...)`` equals Avalanche's ``Naive`` with Adam and
:class:`~avalanche_firn.plugins.sequential_phase.SequentialPhasePlugin` to the bit; what differs from the released code
stands there. Zapped i.i.d. pre-training is ``Naive`` with ``ZappingPlugin.pretraining()``. The two transfer protocols
are :func:`continual_transfer` and :func:`iid_transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from avalanche_firn.plugins.row_resampling import RowRule
from avalanche_firn.plugins.sequential_phase import SequentialPhasePlugin
from avalanche_firn.strategies.transfer import continual_transfer, iid_transfer

__all__ = ["ASB", "EpisodeLosses", "MetaASB", "continual_transfer", "iid_transfer"]


@dataclass(frozen=True)
class EpisodeLosses:
    """Losses of one episode: ``(steps,)`` along the sequence, and the scalar of the batch after it; on the device."""

    inner: Tensor
    batch: Tensor


class ASB(SupervisedTemplate):
    """Alternating sequential and batch learning.

    ``train(experience)`` performs ``episodes`` episodes on the images of the experience, which should hold all classes;
    a stream of several experiences gets as many in each. The model needs a row for every class: a ``Linear`` with all
    outputs (Omniglot: 1,000 for 964 classes), or a growing classifier, which grows before the first episode.

    :param inner_lr: rate of plain SGD in the sequence; see the plugin for the released values.
    :param outer_lr: rate of ``outer_optimizer`` (1e-3 in all released configurations).
    :param outer_optimizer: ``(parameters, lr=...) -> optimizer``; its state lives over all episodes. Default: Adam.
    :param zap, episodes, inner_steps, inner_batch_size, cycles, remember_size, remember_only, meta, inner,
        max_grad_norm, init, head_name, seed: see
        :class:`~avalanche_firn.plugins.sequential_phase.SequentialPhasePlugin`.
    :param plugins: further plugins; they run after the method's own and see the outer step.
    :raises ValueError: see the plugin; a rate that isn't above 0.

    Other parameters: :class:`avalanche.training.templates.SupervisedTemplate`. ``train_mb_size`` and ``train_epochs``
    are not among them: batches are episodes, counted by ``episodes``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        inner_lr: float,
        outer_lr: float = 1e-3,
        episodes: int = 9000,
        inner_steps: int = 20,
        inner_batch_size: int = 1,
        cycles: int = 1,
        remember_size: int = 64,
        remember_only: bool = False,
        zap: bool = True,
        meta: bool = False,
        inner: Literal["all", "head"] = "all",
        max_grad_norm: float | None = None,
        init: RowRule = "kaiming_normal",
        head_name: str | None = None,
        outer_optimizer: Callable[..., Optimizer] = Adam,
        criterion: Any = None,
        seed: int | None = None,
        eval_mb_size: int | None = 256,
        device: str | torch.device = "cpu",
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        for field in ("train_mb_size", "train_epochs", "optimizer"):
            if field in base_kwargs:
                raise ValueError(f"{field} is given; batches are episodes: episodes=, outer_lr=, outer_optimizer=")
        if not 0 < outer_lr < float("inf"):
            raise ValueError(f"outer_lr is {outer_lr}; a finite rate above 0 is accepted")
        phase = SequentialPhasePlugin(
            inner_lr,
            zap=zap,
            episodes=episodes,
            inner_steps=inner_steps,
            inner_batch_size=inner_batch_size,
            cycles=cycles,
            remember_size=remember_size,
            remember_only=remember_only,
            meta=meta,
            inner=inner,
            max_grad_norm=max_grad_norm,
            init=init,
            head_name=head_name,
            seed=seed,
        )
        super().__init__(
            model=model,
            optimizer=outer_optimizer(model.parameters(), lr=outer_lr),
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_epochs=1,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[phase, *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )

    @property
    def sequential_phase(self) -> SequentialPhasePlugin:
        """The plugin that makes iterations episodes."""
        return next(plugin for plugin in self.plugins if isinstance(plugin, SequentialPhasePlugin))

    def _make_empty_loss(self) -> Tensor:
        """Avalanche's is float32, in which the loss of a float64 model would lose its digits."""
        place = next(self.model.parameters())
        return torch.zeros(1, device=self.device, dtype=torch.promote_types(place.dtype, torch.float32))

    def episode(
        self, inner_images: Tensor, inner_labels: Tensor, remember_images: Tensor, remember_labels: Tensor
    ) -> EpisodeLosses:
        """One episode on given images, without a data set; all else is as in ``train``.

        Afterwards the ``grad`` of every parameter is the gradient of the outer step.

        :param inner_images: ``(n, ...)``, learnt in order. :param inner_labels: ``(n,)`` int64, all of one class.
        :param remember_images: ``(m, ...)``. :param remember_labels: ``(m,)`` int64.
        :raises ValueError: no image in the sequence, or labels of several classes in it; other numbers of images than
            of labels; an empty batch.
        """
        counts = len(inner_images), len(inner_labels), len(remember_images), len(remember_labels)
        if counts[0] != counts[1] or counts[2] != counts[3]:
            raise ValueError(
                f"inner_images and inner_labels hold {counts[0]} and {counts[1]}, remember_images and remember_labels "
                f"{counts[2]} and {counts[3]}; a label for each image is accepted"
            )
        if self.sequential_phase.remember_only and not counts[2]:
            raise ValueError("remember_images is empty and remember_only is True; at least one image is needed")
        classes = inner_labels.unique().tolist()
        if len(classes) != 1:
            raise ValueError(f"inner_labels holds the classes {classes}; the images of one class are accepted")
        batch = [torch.cat([inner_images, remember_images]), torch.cat([inner_labels, remember_labels])]
        batch = [*(part.to(self.device) for part in batch), torch.zeros(len(batch[1]), dtype=torch.long)]
        phase, episodes = self.sequential_phase, _Given(batch, int(classes[0]))
        self.model.to(self.device).train()
        self.is_training = True
        phase.before_training(self)
        loader, length, self.dataloader = phase._loader, phase.inner_steps, episodes
        phase._loader, phase.inner_steps = episodes, len(inner_labels)  # type: ignore[assignment]
        try:
            self.training_epoch()
        finally:
            phase._loader, phase.inner_steps = loader, length
        return EpisodeLosses(torch.stack(phase.inner_losses), self.loss.detach().squeeze(0))


class MetaASB(ASB):
    """Meta-ASB: the outer gradient goes through the whole sequence, whose weights are then dropped.

    :param episodes: 25,000 in the released configurations.

    All else as :class:`ASB`.
    """

    def __init__(self, *, model: nn.Module, inner_lr: float, episodes: int = 25000, **kwargs: Any) -> None:
        if not kwargs.pop("meta", True):
            raise ValueError("meta is False; MetaASB is the variant with meta=True, ASB the other one")
        super().__init__(model=model, inner_lr=inner_lr, episodes=episodes, meta=True, **kwargs)


class _Given:
    """A loader of one episode that is at hand."""

    def __init__(self, batch: Iterable[Tensor], class_id: int) -> None:
        self.batch = list(batch)
        self.class_id = class_id

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        yield list(self.batch)
