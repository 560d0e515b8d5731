"""Alternating sequential and batch learning (ASB) and Meta-ASB as a plugin (arXiv 2310.07996, released code).

In every iteration a random class gets a fresh row in the classifier (the zap), its images are learnt one after the
other with plain SGD, and then comes the strategy's own step: its optimizer, on the mean loss over those images and a
sample of the whole set. ASB lets that step start where the sequence ended. Meta-ASB takes its gradient through the
whole sequence (second order), applies it to the weights from before, and drops the sequence.

What differs from the released code: only the parameters of the sequence get its gradients, so nothing leaks into the
outer step where they are a part of the model (there it did); ``torch.func`` in place of ``higher``; one seed for
episodes and zaps, drawn apart from everything else; a zap is always asked for, never a default of a configuration file.

Cost of an episode: ``inner_steps`` forward and backward passes of one image and one of the batch; Meta-ASB three times
that and the memory of all its graphs. Nothing waits for the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from avalanche_firn.models.linear_rows import LinearRows, linear_rows
from avalanche_firn.models.parts import find_parts
from avalanche_firn.plugins.episodes import EpisodeLoader, EpisodeSampler
from avalanche_firn.plugins.finite_words import nonfinite_stop
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.plugins.row_resampling import RowRule, check_rule, resample_rows_
from avalanche_firn.plugins.zap_rows import refuse_untrainable

__all__ = ["SequentialPhasePlugin"]


class SequentialPhasePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Make every iteration of a strategy an episode of ASB or Meta-ASB; the strategy's optimizer is the outer one.

    An epoch is ``episodes`` episodes over the images of the experience; ``train_mb_size`` and shuffling have no
    meaning. The classifier needs a row for every class of the experience.

    :param inner_lr: rate of plain SGD in the sequence. Released configurations: 0.1 on Omniglot, 1e-3 elsewhere; a
        comment there calls 0.1 unfit for ASB.
    :param zap: whether the class gets a fresh row before its sequence; the papers' control is False. No default.
    :param episodes: of an epoch; 9,000 (ASB) and 25,000 (Meta-ASB) in the released configurations. Default: ASB's.
    :param inner_steps: images of the sequence, 20; drawn with replacement only from a class with fewer.
    :param inner_batch_size: images of a step of the sequence, 1. :param cycles: passes over the sequence, 1.
    :param remember_size: images of the whole set in the batch, 64 on Omniglot, 100 elsewhere; the batch has the
        sequence as well unless ``remember_only`` (False).
    :param meta: Meta-ASB.
    :param inner: parameters that the sequence moves: ``"all"`` that are trainable, or the ``"head"``.
    :param max_grad_norm: largest norm of the outer gradient; None: no clipping, the released setting.
    :param init: of a fresh row, see :func:`~avalanche_firn.plugins.row_resampling.resample_rows_`; its bias stays.
    :param head_name: the classifier, where it can't be found (:func:`~avalanche_firn.models.parts.find_parts`).
    :param seed: 0 and above, for the episodes and, apart from them, the zaps; None: drawn from the global generators at
        the first ``train``.
    :raises ValueError: settings out of range; fp16, whose inner gradients would need a scale of their own; models with
        several heads; a classifier that isn't linear or lacks a class; rows to zap that can't be relearned (frozen,
        computed from others, not in the optimizer); another plugin that replaces the loader.
    :raises NonFiniteError: at the end of an epoch, a loss in a sequence that isn't finite, by class and image.

    Logged at the end of an epoch, over training iterations: ``zap/inner-loss-first`` and ``zap/inner-loss-last``, the
    mean loss of the first and of the last image of the sequences as they were learnt.
    """

    def __init__(
        self,
        inner_lr: float,
        *,
        zap: bool,
        episodes: int = 9000,
        inner_steps: int = 20,
        inner_batch_size: int = 1,
        cycles: int = 1,
        remember_size: int = 64,
        remember_only: bool = False,
        meta: bool = False,
        inner: Literal["all", "head"] = "all",
        max_grad_norm: float | None = None,
        init: RowRule = "kaiming_normal",
        head_name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for field, value, least in (
            ("episodes", episodes, 1),
            ("inner_steps", inner_steps, 1),
            ("inner_batch_size", inner_batch_size, 1),
            ("cycles", cycles, 1),
            ("remember_size", remember_size, 1),
            ("seed", seed, 0),
        ):
            if value is None and field == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field} is {value!r}; a whole number, at least {least}, is accepted")
        if not 0 <= inner_lr < float("inf"):
            raise ValueError(f"inner_lr is {inner_lr}; a finite rate, 0 or above, is accepted")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; None or a norm above 0 is accepted")
        if inner not in ("all", "head"):
            raise ValueError(f"inner is {inner!r}; 'all' or 'head' is accepted")
        if not isinstance(zap, bool):
            raise ValueError(f"zap is {zap!r}; True or False is accepted")
        check_rule(init)
        self.inner_lr = float(inner_lr)
        self.zap = zap
        self.episodes = episodes
        self.inner_steps = inner_steps
        self.inner_batch_size = inner_batch_size
        self.cycles = cycles
        self.remember_size = remember_size
        self.remember_only = remember_only
        self.meta = meta
        self.inner: Literal["all", "head"] = inner
        self.max_grad_norm = max_grad_norm
        self.init = init
        self.head_name = head_name
        self.seed = seed
        self.zap_generator = torch.Generator()
        if seed is not None:
            self.zap_generator.manual_seed(derived_seed(seed, 1))
        self.inner_losses: list[Tensor] = []
        """Loss of every step of the newest sequence, scalars on the device."""
        self._loader: EpisodeLoader | None = None
        self._experience = 0
        self._installed: Any = None
        self._fast: dict[str, Tensor] | None = None  # weights at the end of a sequence, with their graph
        self._sums: Tensor | None = None  # of the first and the last loss
        self._count = 0
        self._learnt: list[tuple[int, int, int]] = []  # since the last log: steps before a sequence, iteration, class
        self._steps = 0  # of these sequences
        self._bad: Tensor | None = None  # the first one of these steps whose loss isn't finite, -1: none

    shares_batches = False
    """Sequences of single images: in a distributed run every process learns all of them."""

    # ------------------------------------------------------------------ hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check what can be checked before work, and stand before the model's forward pass (Meta-ASB)."""
        for plugin in strategy.plugins:
            if isinstance(plugin, MixedPrecisionPlugin) and plugin.resolve(strategy.device) == "fp16":
                raise ValueError("precision fp16 scales one loss per step, and an episode has many; bf16 is accepted")
        if any(isinstance(module, MultiTaskModule) for module in strategy.model.modules()):
            raise ValueError("the model has heads per task; ASB is accepted with one classifier for all classes")
        if self.seed is None:
            self.seed = int(torch.empty((), dtype=torch.int64).random_(2**31).item())
            self.zap_generator.manual_seed(derived_seed(self.seed, 1))
        if self.meta and self._installed is not strategy:
            strategy.forward = self._unrolled(strategy, strategy.forward)
            self._installed = strategy

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Put the episodes in place of the batches."""
        assert self.seed is not None
        dataset, loader = strategy.adapted_dataset, strategy.dataloader
        plain = type(loader) is DataLoader and loader.dataset is dataset
        if not plain and type(loader) is not TaskBalancedDataLoader:  # the two that Avalanche itself makes
            raise ValueError(
                f"another plugin has put its {type(loader).__name__} in the place of the loader; episodes "
                "need one of their own"
            )
        sampler = EpisodeSampler(
            [int(t) for t in dataset.targets],
            episodes=self.episodes,
            inner_steps=self.inner_steps,
            remember_size=self.remember_size,
            seed=self.seed,
        )
        self._rows(strategy.model, sampler.classes.tolist())  # a class without a row is an error before the first step
        options = {k: kwargs[k] for k in ("num_workers", "pin_memory") if k in kwargs}
        self._loader = strategy.dataloader = EpisodeLoader(dataset, sampler, **options)
        self._experience = int(strategy.clock.train_exp_counter)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The first pass of a run draws from the seed itself, as the released sampler does; each other from its own."""
        assert self._loader is not None and self.seed is not None
        if getattr(strategy.dataloader, "sampler", None) is not self._loader.sampler:
            raise ValueError("another plugin has replaced the data loader; episodes need one of their own")
        if self.zap:  # the optimizer is the final one by now
            rows = self._rows(strategy.model, self._loader.sampler.classes.tolist())
            refuse_untrainable(strategy.optimizer, find_parts(strategy.model, self.head_name), rows, bias=False)
        place = [self._experience, int(strategy.clock.train_exp_epochs)]
        self._loader.sampler.seed = [self.seed, *place] if any(place) else self.seed

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Zap, then learn the sequence."""
        assert self._loader is not None
        self.sequence(strategy, self._loader.class_id, self.inner_steps)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clip the outer gradient."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(strategy.model.parameters(), self.max_grad_norm)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Drop the unrolled weights and their graph."""
        self._fast = None

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Log the losses in the sequences."""
        if self._sums is None or not self._count:
            return
        if (what := self.describe_nonfinite(strategy)) is not None:
            raise nonfinite_stop(
                strategy, f"epoch {strategy.clock.train_exp_epochs}", what, "A smaller inner_lr or lr is needed."
            )
        step = int(strategy.clock.train_iterations)
        if strategy.evaluator.active:
            for name, value in zip(("first", "last"), (self._sums / self._count).tolist(), strict=True):
                strategy.evaluator.publish_metric_value(MetricValue(self, f"zap/inner-loss-{name}", value, step))
        self._sums, self._count = None, 0
        self._forget()

    def _forget(self) -> None:
        self._learnt, self._steps, self._bad = [], 0, None

    def describe_nonfinite(self, strategy: Any) -> str | None:
        """The first loss in a sequence that isn't finite, if there is one; for the message of a guard, too."""
        place = -1 if self._bad is None else int(self._bad)
        if place < 0:
            return None
        start, iteration, class_id = max(entry for entry in self._learnt if entry[0] <= place)
        return (
            f"In iteration {iteration}, the loss of step {place - start} of the sequence of class {class_id} isn't "
            f"finite (inner_lr {self.inner_lr:g})"
        )

    # --------------------------------------------------------------- sequence
    def sequence(self, strategy: Any, class_id: int, length: int) -> None:
        """Zap ``class_id`` if zaps are on, and learn the first ``length`` images of ``strategy.mbatch`` in order.

        Afterwards ``strategy.mbatch`` is the batch of the outer step.
        """
        if self.zap:
            for weight, _, rows in self._rows(strategy.model, [class_id]).parameters:
                resample_rows_(weight, rows, init=self.init, generator=self.zap_generator)
        self._fast = None  # an exception may have left some
        names, weights = self._inner_parameters(strategy.model)
        whole = strategy.mbatch
        self.inner_losses = []
        for _ in range(self.cycles):
            for start in range(0, length, self.inner_batch_size):
                end = min(start + self.inner_batch_size, length)
                strategy.mbatch = [part[start:end] for part in whole]
                weights = self._step(strategy, names, weights)
        strategy.mbatch = [part[length:] for part in whole] if self.remember_only else whole
        losses = torch.stack(self.inner_losses).double()
        bad = ~losses.isfinite()
        known = losses.new_full((), -1, dtype=torch.int64) if self._bad is None else self._bad
        self._bad = torch.where((known < 0) & bad.any(), self._steps + bad.int().argmax(), known)
        self._learnt.append((self._steps, int(strategy.clock.train_exp_iterations), int(class_id)))
        self._steps += len(losses)
        edges = torch.stack([losses[0], losses[-1]])
        self._sums = edges if self._sums is None else self._sums.to(edges.device) + edges
        self._count += 1

    def _step(self, strategy: Any, names: list[str], weights: list[Tensor]) -> list[Tensor]:
        """One step of plain SGD on ``strategy.mbatch``: in place (ASB), or as new tensors with their graph."""
        strategy.mb_output = strategy.forward()
        loss = strategy.criterion()
        gradients = torch.autograd.grad(loss, weights, create_graph=self.meta, allow_unused=True)
        self.inner_losses.append(loss.detach())
        if self.meta:
            weights = [
                w if g is None else w - self.inner_lr * g.to(w.dtype) for w, g in zip(weights, gradients, strict=True)
            ]
            self._fast = dict(zip(names, weights, strict=True))
            return weights
        used = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
        with torch.no_grad():
            torch._foreach_add_([w for w, _ in used], [g for _, g in used], alpha=-self.inner_lr)
        return weights

    def _inner_parameters(self, model: nn.Module) -> tuple[list[str], list[Tensor]]:
        parts = find_parts(model, self.head_name)
        source = parts.head_parameters() if self.inner == "head" else model.named_parameters()
        chosen = [(name, parameter) for name, parameter in source if parameter.requires_grad]
        if not chosen:
            raise ValueError(f"inner is {self.inner!r} and holds no trainable parameter; at least one is needed")
        return [name for name, _ in chosen], [parameter for _, parameter in chosen]

    def _rows(self, model: nn.Module, classes: list[int]) -> LinearRows:
        head = find_parts(model, self.head_name).head
        rows = linear_rows(head, classes)
        if rows is None:
            raise ValueError(
                f"the classifier is a {type(head).__name__}; one that is linear in the features is accepted"
            )
        return rows

    def _unrolled(self, strategy: Any, forward: Any) -> Any:
        """The strategy's forward pass, autocast and all, with the weights of the sequence where there are some."""

        def unrolled() -> Any:
            if self._fast is None or not strategy.is_training:
                return forward()
            model = strategy.model
            strategy.model = partial(_call, model, self._fast)
            try:
                return forward()
            finally:
                strategy.model = model

        return unrolled

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Seed, generator of the zaps, and the losses since the last log."""
        return {
            "seed": self.seed,
            "zap_generator": self.zap_generator.get_state(),
            "sums": self._sums,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.seed = state["seed"]
        self.zap_generator.set_state(state["zap_generator"])
        self._sums, self._count = state["sums"], int(state["count"])
        self._forget()  # all were finite, or there would be no checkpoint


def _call(model: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Any:
    return functional_call(model, weights, (images,))
