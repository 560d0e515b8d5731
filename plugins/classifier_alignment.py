"""Classifier alignment: after each task, retrain the classifier alone on samples of Gaussians of the classes.

SLCA (arXiv 2303.05118; stage 2 of the released code), one Gaussian per class. After a task the plugin stores mean and
covariance of the features of each new class; the statistics of earlier classes stay as they were. The heads are then
aligned on sampled features of all classes, used for evaluation, and the raw heads come back before the next task, so
alignment leaves no trace in training.

Differs from the released code: the task of a class is the task in which it was learnt (``compat_task_index=True`` gives
the released index, which is wrong for unequal tasks); nothing is evaluated inside; factors are computed once; by
default alignment runs lazily, when an evaluation needs it; the noise of a task depends on ``seed`` and task alone, so
lazy, eager and resumed runs agree. Cost per alignment: ``epochs * C * samples_per_class`` feature rows; memory in
:class:`~avalanche_firn.plugins.class_statistics.ClassGaussians`.

TAP (HiDe-Prompt; released code of LoRAC-IPC, arXiv 2504.13407) is :meth:`ClassifierAlignmentPlugin.tap`: several
diagonal Gaussians per class, and the aligned heads stay, so later alignments start from them. An epoch has as many
batches as earlier tasks have classes. Cost: ``epochs * earlier classes * samples_per_class`` feature rows; memory in
:class:`~avalanche_firn.plugins.cluster_gaussians.ClusterGaussians`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import extract_features, find_parts
from avalanche_firn.plugins.alignment_math import (
    align_classifier,
    gaussian_batches,
    logit_normalized_cross_entropy,
    mean_scale,
    reference_task_index,
    symmetric_cross_entropy,
)
from avalanche_firn.plugins.class_statistics import ClassGaussians
from avalanche_firn.plugins.cluster_gaussians import ClusterGaussians, cluster_batches
from avalanche_firn.plugins.experience_classes import experience_classes, refuse_known_classes
from avalanche_firn.plugins.finite_words import finite_or_stop, listed
from avalanche_firn.plugins.random_state import derived_seed

_STATISTICS_HELP = "A smaller rate of the backbone, or precision fp32 or bf16, usually helps."

BatchSource = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]


class ClassifierAlignmentPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Align a :class:`~avalanche_firn.models.heads.TaskwiseLinearHead` on class Gaussians after each task.

    The aligned heads stay in the model from the first evaluation after a task until the next task begins, or, with
    ``restore=False``, for good. The first task is not aligned (released codes). A periodic evaluation in the middle of
    a task sees the heads as they are in training.

    :param epochs: alignment epochs; 0 switches alignment off (5: exps/slca_*.json).
    :param samples_per_class: sampled rows per class and epoch, also the batch size (256: models/slca.py); with
        ``statistics="clusters"`` rows per cluster.
    :param lr: rate of the heads, cosine to 0 (0.01). :param momentum: 0.9. :param weight_decay: 5e-4
        (exps/slca_*.json).
    :param temperature: of the logit normalisation; None or <= 0: plain cross-entropy (0.1; Cars-196: 0.05).
    :param scaling: ``"mean"``: class means shrink towards early tasks (SLCA); ``"feature"``: rows are scaled at
        random and inference multiplies the head inputs (SLCA++); None: neither.
    :param feature_scale_mu: mean of the random factor of ``scaling="feature"`` (0.02: SLCA++).
    :param lazy: align when an evaluation starts, or right after the task; None: lazily where the raw heads come back.
    :param batch_source: ``(task, epoch) -> batches of (features (B, d), column indices (B,))`` instead of sampling.
    :param compat_task_index: scale by the released code's index, ``column // classes of the current task``.
    :param norm: ``"task_mean"``: mean of the tasks' logit norms (released code); ``"full"``: norm of all logits (the
        printed form is not known).
    :param form: ``"low_rank"`` or ``"cholesky"``, see :class:`ClassGaussians`. :param jitter: added to the diagonal
        (1e-4).
    :param relative_jitter: jitter times the mean variance of the class; neither this nor ``form`` is for clusters.
    :param seed: of the private noise generator and of KMeans. :param num_workers: loader processes for the statistics
        pass.
    :param statistics: ``"gaussian"``: one full Gaussian per class (SLCA). ``"clusters"``: a diagonal one per cluster,
        and per epoch as many batches as there are classes of earlier tasks (TAP); needs ``scaling=None``.
    :param clusters: KMeans clusters per class with ``statistics="clusters"`` (10: training_scripts/*.sh of LoRAC-IPC).
    :param restore: the raw heads come back before the next task (SLCA). False: the aligned ones stay, and the next
        alignment starts from them (TAP); it is eager then, as training would else depend on evaluations.
    :raises ValueError: the model has no ``TaskwiseLinearHead``; a class comes back in a later experience; settings
        out of range or at odds with each other.
    """

    def __init__(
        self,
        epochs: int = 5,
        samples_per_class: int = 256,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        temperature: float | None = 0.1,
        scaling: Literal["mean", "feature"] | None = "mean",
        feature_scale_mu: float = 0.02,
        lazy: bool | None = None,
        batch_source: BatchSource | None = None,
        compat_task_index: bool = False,
        norm: Literal["task_mean", "full"] = "task_mean",
        *,
        form: Literal["low_rank", "cholesky"] = "low_rank",
        jitter: float = 1e-4,
        relative_jitter: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        statistics: Literal["gaussian", "clusters"] = "gaussian",
        clusters: int = 10,
        restore: bool = True,
    ) -> None:
        super().__init__()
        for field, value, least in (
            ("epochs", epochs, 0),
            ("samples_per_class", samples_per_class, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{field} is {value}; {least} and above is accepted")
        for field, rate in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not rate >= 0:
                raise ValueError(f"{field} is {rate}; 0 and above is accepted")
        if scaling not in ("mean", "feature", None):
            raise ValueError(f"scaling is {scaling!r}; 'mean', 'feature' or None is accepted")
        if norm not in ("task_mean", "full"):
            raise ValueError(f"norm is {norm!r}; 'task_mean' or 'full' is accepted")
        if statistics not in ("gaussian", "clusters"):
            raise ValueError(f"statistics is {statistics!r}; 'gaussian' or 'clusters' is accepted")
        if statistics == "clusters" and scaling is not None:
            raise ValueError(f"scaling is {scaling!r} and statistics is 'clusters'; these accept scaling=None")
        if statistics == "clusters" and relative_jitter:
            raise ValueError("relative_jitter is True and statistics is 'clusters'; these accept an absolute jitter")
        if lazy and not restore:
            raise ValueError("lazy is True and restore is False; heads that stay are aligned right after the task")
        self.epochs = epochs
        self.samples_per_class = samples_per_class
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.temperature = temperature
        self.scaling = scaling
        self.feature_scale_mu = feature_scale_mu
        self.lazy = restore if lazy is None else lazy
        self.batch_source = batch_source
        self.compat_task_index = compat_task_index
        self.norm = norm
        self.seed = seed
        self.num_workers = num_workers
        self.statistics = statistics
        self.restore = restore
        self.gaussians: ClassGaussians | ClusterGaussians
        if statistics == "clusters":
            self.gaussians = ClusterGaussians(clusters, jitter=jitter, seed=seed)
        else:
            self.gaussians = ClassGaussians(form=form, jitter=jitter, relative_jitter=relative_jitter)
        self.alignments = 0
        """How many alignments ran in this process."""
        self.history: list[dict[str, Any]] = []
        """Per alignment: ``task``, ``loss-first`` and ``loss-last`` (means over the first and the last epoch, nats) and
        ``head-change`` (norm of the weights' change, relative to the raw ones; None if these are 0)."""
        self.features: tuple[Tensor, Tensor] | None = None
        """Features (N, d) and targets of the task that just ended, for plugins that come later; dropped after it."""
        self._pending = False  # statistics are there, the heads of this task are still raw
        self._aligned = False  # the model holds aligned heads, the head's snapshot the raw ones that will come back
        self._measured = False  # the current task's statistics were taken

    @classmethod
    def tap(cls, **overrides: Any) -> ClassifierAlignmentPlugin:
        """TAP with the settings of LoRAC-IPC's released code, of which ``overrides`` change any.

        SGD with rate 0.005 and momentum 0.9 without decay for 50 epochs, plain cross-entropy, 10 clusters per class
        (training_scripts/*.sh). ``samples_per_class`` is 5 times the batch size there, and here 5 times this project's
        batch of 128 (there 64 in each of two processes). The heads stay aligned.
        """
        settings: dict[str, Any] = {
            "epochs": 50, "samples_per_class": 5 * 128, "lr": 0.005, "momentum": 0.9, "weight_decay": 0.0,
            "temperature": None, "scaling": None, "statistics": "clusters", "clusters": 10, "restore": False,
        }  # fmt: skip
        return cls(**settings | overrides)

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model before any work is done."""
        self._head(strategy)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """A new task begins: the raw heads come back (``restore``) before the model grows."""
        if self._aligned:
            self._head(strategy).restore()
        self._aligned = self._pending = self._measured = False
        self.gaussians.to(strategy.device)
        refuse_known_classes(strategy.experience, self.gaussians)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The last epoch is over: a periodic evaluation that comes right now should see aligned heads."""
        if strategy.clock.train_exp_epochs + 1 >= strategy.train_epochs:
            self._after_task(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The same for a task that stopped early."""
        if not self._measured:
            self._after_task(strategy)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Let the features go."""
        self.features = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Lazy alignment (needs no autograd, which the evaluation loop switches off)."""
        if self._pending:
            self.align(strategy)

    # ------------------------------------------------------------------ work
    def _after_task(self, strategy: Any) -> None:
        features, targets = extract_features(
            strategy.model,
            strategy.experience.dataset.eval(),
            batch_size=strategy.eval_mb_size,
            device=strategy.device,
            num_workers=self.num_workers,
        )
        with finite_or_stop(strategy, "the statistics for classifier alignment", _STATISTICS_HELP):
            for class_id in experience_classes(strategy.experience):
                self.gaussians.add(class_id, features[targets == class_id])
        self.features = (features, targets)
        self._measured = self._pending = True
        if not self.lazy:
            self.align(strategy)

    def align(self, strategy: Any) -> None:
        """Align now the heads of all tasks so far, if there is more than one task."""
        self._pending = False
        head = self._head(strategy)
        task = head.num_tasks - 1
        if task < 1 or self.epochs == 0:
            return
        if self.restore:
            head.snapshot()
        weight, bias = head.weight_matrix()
        losses: list[float] = []
        newest = head.known_classes[-len(head.weights[-1]) :]
        with finite_or_stop(strategy, f"classifier alignment after task {task} (classes {listed(newest, 10)})"):
            aligned = align_classifier(
                weight,
                bias,
                self._batches(head, task),
                head.class_task,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                epochs=self.epochs,
                temperature=self.temperature,
                norm=self.norm,
                on_epoch=lambda _, loss: losses.append(loss),
            )
        self._note(strategy, task, losses, weight, aligned[0])
        head.load_weight_matrix(*aligned)
        if self.scaling == "feature":
            head.set_input_scales([1 + self.feature_scale_mu * (task - k) for k in range(task + 1)])
        self._aligned = self.restore
        self.alignments += 1

    @torch.no_grad()
    def _note(self, strategy: Any, task: int, losses: list[float], raw: Tensor, aligned: Tensor) -> None:
        """Keep and log how the alignment went, under the index of the task."""
        before = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        moved, size = torch.stack([torch.linalg.vector_norm(t) for t in (aligned.to(before) - before, before)]).tolist()
        figures = {"loss-first": losses[0], "loss-last": losses[-1], "head-change": moved / size if size else None}
        self.history.append({"task": task, **figures})
        evaluator = getattr(strategy, "evaluator", None)  # an export aligns without one
        if evaluator is not None and evaluator.active:
            for name, value in figures.items():
                if value is not None:
                    evaluator.publish_metric_value(MetricValue(self, f"slca/alignment/{name}", value, task))

    def _batches(self, head: TaskwiseLinearHead, task: int) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
        if self.batch_source is not None:
            source = self.batch_source
            return lambda epoch: source(task, epoch)
        generator = torch.Generator(head.class_task.device).manual_seed(derived_seed(self.seed, task))
        if isinstance(self.gaussians, ClusterGaussians):
            earlier = head.num_classes - head.weights[-1].shape[0]
            return cluster_batches(
                self.gaussians, head.known_classes, self.samples_per_class, earlier, generator=generator
            )
        class_task = head.class_task
        if self.compat_task_index:
            class_task = reference_task_index(head.num_classes, head.weights[-1].shape[0])
        return gaussian_batches(
            self.gaussians,
            head.known_classes,
            self.samples_per_class,
            self.samples_per_class,
            generator=generator,
            mean_scale=mean_scale(class_task, task) if self.scaling == "mean" else None,
            feature_scaling=(self.feature_scale_mu, task - class_task) if self.scaling == "feature" else None,
        )

    def _head(self, strategy: Any) -> TaskwiseLinearHead:
        parts = find_parts(strategy.model)
        if not isinstance(parts.head, TaskwiseLinearHead):
            raise ValueError(
                f"the classifier {parts.head_name!r} is a {type(parts.head).__name__}; alignment accepts a "
                "TaskwiseLinearHead (avalanche_firn.models.with_taskwise_head puts one on a model)"
            )
        return parts.head

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Class statistics and where in the cycle raw - aligned the heads are (their tensors belong to the model)."""
        return {
            "statistics": self.statistics,
            "gaussians": self.gaussians.state_dict(),
            "pending": self._pending,
            "aligned": self._aligned,
            "measured": self._measured,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        :raises ValueError: the state was made with other statistics or other settings of theirs.
        """
        kind = state.get("statistics", "gaussian")
        if kind != self.statistics:
            raise ValueError(f"statistics: the state was made with {kind!r}, here it is {self.statistics!r}")
        self.gaussians.load_state_dict(state["gaussians"])
        self._pending, self._aligned, self._measured = state["pending"], state["aligned"], state["measured"]
        self.history = [dict(entry) for entry in state.get("history", [])]  # states of 0.1 have none


__all__ = [
    "BatchSource",
    "ClassifierAlignmentPlugin",
    "align_classifier",
    "logit_normalized_cross_entropy",
    "mean_scale",
    "symmetric_cross_entropy",
]
