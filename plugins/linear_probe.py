"""LP-FT: in every experience first a linear probe on the frozen backbone, then fine-tuning from that head.

A. Kumar et al., "Fine-Tuning can Distort Pretrained Features" (arXiv 2202.10054); in sequence M. Sun et al., "Improving
Representational Continuity via Continued Pretraining" (arXiv 2302.13289). A random head sends large arbitrary gradients
into the backbone; a fitted one makes them small from the first step, so the features of earlier tasks move less.

Before the first epoch of an experience the plugin extracts the features of its data once, solves the classifier on
them, and writes it into the rows of the current classes. The epochs that follow are fine-tuning. The probe is no epoch:
clocks, schedules, early stopping and metrics see fine-tuning alone, and path-integral methods see no update of it.

Differs from the released code: solved to the optimum in float64 with one explicit penalty; BatchNorm modes are those
that their names say; momentum of the task before is cleared. The body of 2302.13289 was not available, so whether it
probes the first task, its rates, solver and BatchNorm mode are open: parameters here. Cost: one forward pass over the
data of the experience, 1 / (3 E) of E epochs of fine-tuning, and ``N * d`` floats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from avalanche.benchmarks.scenarios import OnlineCLExperience
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_firn.models.feature_cache import FeatureCache, backbone_sha256
from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.models.linear_rows import linear_rows
from avalanche_firn.models.parts import BatchNormMode, ModelParts, extract_features, find_parts
from avalanche_firn.plugins.feature_checks import check_by_class
from avalanche_firn.plugins.finite_words import finite_or_stop
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.probe_head import (
    ParameterFilter,
    ProbeReport,
    Scope,
    Solver,
    batch_statistics_loss,
    describe_probe,
    not_linear,
    parameter_filter,
    task_label_of,
    write_probe,
)
from avalanche_firn.plugins.random_state import derived_seed, private_random_state

_PROBE_HELPS = "Finite features, a smaller lr of the probe, or another solver helps."
HeadInit = Literal["keep", "reset", "zero"]
FineTuneMode = Literal["auto", "train", "eval"]


class LinearProbePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """A linear probe at the beginning of each experience; works with any Avalanche SGD strategy.

    :param head: dotted name of the classifier, where :func:`~avalanche_firn.models.parts.find_parts` should not choose.
    :param solver: ``"lbfgs"``: logistic regression (2202.10054, released code); ``"ridge"``: closed form; ``"sgd"``:
        mini-batches, for classifiers that are not linear and for ``lp_views="fresh"``.
    :param l2: penalty of ``mean loss + l2 / 2 * ||W||^2``; None = 1 / samples (open; our choice); a sequence: the best
        on a held-out part of the experience's data (strongest first; the released code's grid is
        :func:`~avalanche_firn.models.linear_probe.c_path`), then fitted to all of it.
    :param lp_features: BatchNorm while features are extracted, see
        :func:`~avalanche_firn.models.parts.extract_features` (``"eval"``: released code's default).
    :param lp_views: 0: features under the evaluation transform; m: m random views under the training transform (the
        released code takes one); ``"fresh"``: new views in each epoch of ``solver="sgd"``, nothing kept.
    :param lp_scope: ``"current"``: write the rows of the classes in the data; ``"all"``: the whole classifier, absent
        classes zero (released code).
    :param head_init: the classifier at the start of every experience: ``"keep"``, ``"reset"`` (fresh random rows), or
        ``"zero"`` (open; our choice: keep).
    :param lp_first: probe the first experience too (open; our choice: no, its backbone is not yet adapted to anything).
    :param ft_bn: mode of the backbone in fine-tuning after a probe: ``"eval"`` (released code's command: running
        statistics fixed, no dropout), ``"train"``, or ``"auto"``, the mode of the features that were probed. An
        experience without a probe is always trained in training mode (fixed statistics would stay at their start).
    :param ft_lr: learning rate after a probe; None: the strategy's. After a probe the best rate is usually smaller.
    :param reset_momentum: clear the optimizer's state after a probe.
    :param normalize: ``"none"`` or ``"scalar"`` (released code: one mean and deviation of all features).
    :param rescale_head: ``True``: the rows get the spread of the rows they replace (released code's option);
        ``"temperature"``: divided by the temperature that fits the labels best (for ridge before cross-entropy).
    :param backbone: which backbone parameters are fine-tuned, ``(name, parameter) -> bool`` or name patterns with
        ``*``; the others are frozen in the experience. None: those that are trainable.
    :param enabled: False: do nothing.
    :param val_fraction: of each class, held out to choose ``l2`` from a sequence (0.2: our choice).
    :param max_iter: of ``"lbfgs"`` (500: our choice). :param epochs: of ``"sgd"`` (20).
    :param lr: of ``"sgd"``; None: a rate that is stable for these features. :param batch_size: of ``"sgd"`` (128).
    :param cache: shared with a ``RepresentationProbe``, so that features are computed once.
    :param bn_check: report the loss with BatchNorm in training mode, one more pass.
    :param seed: of the private generators. :param num_workers: loader processes for the extraction.
    :raises ValueError: settings out of range; a classifier that the solver cannot write; online experiences; a filter
        that selects no parameter.
    """

    def __init__(
        self,
        head: str | None = None,
        solver: Solver = "lbfgs",
        l2: float | Sequence[float] | None = None,
        lp_features: BatchNormMode = "eval",
        lp_views: int | Literal["fresh"] = 0,
        lp_scope: Scope = "current",
        head_init: HeadInit = "keep",
        lp_first: bool = False,
        ft_bn: FineTuneMode = "auto",
        ft_lr: float | None = None,
        reset_momentum: bool = True,
        normalize: Literal["none", "scalar"] = "none",
        rescale_head: bool | Literal["temperature"] = False,
        backbone: ParameterFilter | Sequence[str] | None = None,
        *,
        enabled: bool = True,
        val_fraction: float = 0.2,
        max_iter: int = 500,
        epochs: int = 20,
        lr: float | None = None,
        batch_size: int = 128,
        cache: FeatureCache | None = None,
        bn_check: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for field, value, accepted in (
            ("solver", solver, get_args(Solver)),
            ("lp_features", lp_features, get_args(BatchNormMode)),
            ("lp_scope", lp_scope, get_args(Scope)),
            ("head_init", head_init, get_args(HeadInit)),
            ("ft_bn", ft_bn, get_args(FineTuneMode)),
            ("normalize", normalize, ("none", "scalar")),
            ("rescale_head", rescale_head, (False, True, "temperature")),
        ):
            if value not in accepted:
                raise ValueError(f"{field} is {value!r}; one of {list(accepted)} is accepted")
        penalties = [l2] if l2 is None or isinstance(l2, (int, float)) else list(l2)
        if not penalties or any(p is not None and not (math.isfinite(p) and p >= 0) for p in penalties):
            raise ValueError(f"l2 is {l2!r}; None, a finite number of 0 and above, or a sequence of them is accepted")
        if lp_views != "fresh" and (isinstance(lp_views, (bool, str)) or lp_views < 0):
            raise ValueError(f"lp_views is {lp_views!r}; 0, a number of views, or 'fresh' is accepted")
        if lp_views == "fresh" and solver != "sgd":
            raise ValueError(f"lp_views is 'fresh' with solver {solver!r}; solver 'sgd' is accepted with fresh views")
        if head_init == "zero" and rescale_head is True:
            raise ValueError("rescale_head is True with head_init 'zero'; rows of zeros have no spread to rescale to")
        if ft_lr is not None and not (math.isfinite(ft_lr) and ft_lr > 0):
            raise ValueError(f"ft_lr is {ft_lr}; None or a rate above 0 is accepted")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; a fraction in (0, 1) is accepted")
        for field, count, least in (
            ("max_iter", max_iter, 1),
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if count < least:
                raise ValueError(f"{field} is {count}; {least} and above is accepted")
        self.head = head
        self.solver = solver
        self.l2 = l2 if l2 is None or isinstance(l2, (int, float)) else [float(v) for v in l2]
        self.lp_features = lp_features
        self.lp_views = lp_views
        self.lp_scope = lp_scope
        self.head_init = head_init
        self.lp_first = lp_first
        self.ft_bn = ft_bn
        self.ft_lr = ft_lr
        self.reset_momentum = reset_momentum
        self.normalize = normalize
        self.rescale_head = rescale_head
        self.backbone = parameter_filter(backbone)
        self.enabled = enabled
        self.val_fraction = val_fraction
        self.max_iter = max_iter
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.cache = cache
        self.bn_check = bn_check
        self.seed = seed
        self.num_workers = num_workers
        self.report: ProbeReport | None = None
        """Of the newest probe; None before the first."""
        self._probed = False  # the current experience began with a probe
        self._lrs: list[float] | None = None  # rates to give back after the experience
        self._frozen: list[str] = []  # parameters to make trainable again after it
        self._modes: dict[nn.Module, bool] | None = None  # modes to give back after it

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Find the classifier before any work is done, and see that the solver can write it."""
        parts = find_parts(strategy.model, self.head)
        if self.solver != "sgd" and self.enabled and not_linear(parts.head):
            raise ValueError(
                f"the classifier {parts.head_name!r} is a {type(parts.head).__name__}, which solver {self.solver!r} "
                "cannot write; a linear classifier, or solver 'sgd', is accepted"
            )

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """An experience begins: a plugin that rebuilds the optimizer has to know its rate."""
        if isinstance(strategy.experience, OnlineCLExperience):
            raise ValueError("LinearProbePlugin got an online experience; a probe needs the data of a whole experience")
        self._probed = self.enabled and (self.lp_first or strategy.clock.train_exp_counter > 0)
        if self.ft_lr is not None:
            for plugin in strategy.plugins:
                if isinstance(plugin, FreshOptimizerPlugin):
                    plugin.lr = self.ft_lr if self._probed else None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Freeze what stays fixed, initialise the head, probe, and prepare fine-tuning."""
        if not self.enabled:
            return
        parts = find_parts(strategy.model, self.head)
        if not _resuming(strategy):  # else all that follows is restored: no need to solve it again
            self._frozen = self._freeze(parts)
            try:
                self._initialise_head(strategy, parts)
                if self._probed:
                    with finite_or_stop(strategy, "the linear probe", _PROBE_HELPS):
                        self._probe(strategy, parts)
            except BaseException:
                self._thaw(strategy.model)
                raise
        else:
            self._freeze(parts)
        if not self._probed:
            return
        if self.reset_momentum:
            strategy.optimizer.state.clear()
        if self.ft_lr is not None and not _rebuilt(strategy):
            self._lrs = [group["lr"] for group in strategy.optimizer.param_groups]
            for group in strategy.optimizer.param_groups:
                group["lr"] = self.ft_lr

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Fix the backbone's statistics if asked to (``strategy.train`` puts the model into training mode)."""
        fixed = self.ft_bn == "eval" or (self.ft_bn == "auto" and self.lp_features != "train")
        if self._probed and fixed:
            if self._modes is None:
                self._modes = {module: module.training for module in strategy.model.modules()}
            find_parts(strategy.model, self.head).backbone_eval()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Give modes, flags and rates back."""
        for module, mode in (self._modes or {}).items():
            module.training = mode
        self._modes = None
        self._thaw(strategy.model)
        if self._lrs is not None:
            for group, rate in zip(strategy.optimizer.param_groups, self._lrs, strict=False):
                group["lr"] = rate
        self._lrs = None

    # ------------------------------------------------------------------ work
    def _freeze(self, parts: ModelParts) -> list[str]:
        """Freeze what the filter leaves out; names of the parameters that were trainable."""
        if self.backbone is None:
            return []
        if not any(self.backbone(n, p) for n, p in parts.backbone_parameters()):
            raise ValueError("backbone selects no parameter of the backbone; at least one is needed to fine-tune")
        frozen = [n for n, p in parts.backbone_parameters() if p.requires_grad and not self.backbone(n, p)]
        parameters = dict(parts.model.named_parameters())
        for name in frozen:
            parameters[name].requires_grad_(False)
        return frozen

    def _thaw(self, model: nn.Module) -> None:
        """Make trainable again what the filter froze, as far as it is still part of the model."""
        parameters = dict(model.named_parameters())
        for name in self._frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)
        self._frozen = []

    def _initialise_head(self, strategy: Any, parts: ModelParts) -> None:
        if self.head_init == "keep":
            return
        rows = linear_rows(parts.head, task_label=task_label_of(strategy.experience))
        if rows is None:
            raise ValueError(f"head_init is {self.head_init!r}; 'keep' is accepted with a {type(parts.head).__name__}")
        weight, bias = rows.initial(torch.Generator().manual_seed(self._seed(strategy, "head")))
        scale = 0 if self.head_init == "zero" else 1
        rows.write(weight * scale, bias * scale)

    def _probe(self, strategy: Any, parts: ModelParts) -> None:
        start = time.perf_counter()
        experience, label = strategy.experience, task_label_of(strategy.experience)
        with private_random_state(self._seed(strategy, "probe")):
            features, targets = self._features(strategy, parts)
            check_by_class(features, targets)
            l2 = write_probe(
                parts.head,
                features,
                targets,
                task_label=label,
                solver=self.solver,
                l2=self.l2,
                lp_scope=self.lp_scope,
                normalize=self.normalize,
                rescale_head=self.rescale_head,
                val_fraction=self.val_fraction,
                max_iter=self.max_iter,
                lr=self.lr,
                epochs=self.epochs,
                batch_size=self.batch_size,
                seed=self._seed(strategy, "solver"),
                fresh_features=(lambda: self._features(strategy, parts)) if self.lp_views == "fresh" else None,
            )
            classes, figures = describe_probe(parts.head, features, targets, task_label=label)
            if not math.isfinite(sum(figures.values())):
                raise NonFiniteValues(f"the solved classifier has loss {figures['loss']}, norm {figures['head_norm']}")
            seconds = time.perf_counter() - start
            if self.bn_check:
                options = self._extraction(strategy, parts) | {"batch_size": strategy.train_mb_size}
                dataset = experience.dataset.eval()
                figures["loss_bn_train"] = batch_statistics_loss(strategy.model, dataset, task_label=label, **options)
        step = strategy.clock.train_exp_counter
        self.report = ProbeReport(
            experience=step, samples=len(targets), classes=classes, l2=l2, seconds=seconds, **figures
        )
        if strategy.evaluator.active:
            for tag, value in self.report.figures().items():
                strategy.evaluator.publish_metric_value(MetricValue(self, tag, value, step))

    def _features(self, strategy: Any, parts: ModelParts) -> tuple[Tensor, Tensor]:
        experience = strategy.experience

        def extract(dataset: Any) -> tuple[Tensor, Tensor]:
            return extract_features(strategy.model, dataset, bn=self.lp_features, **self._extraction(strategy, parts))

        if self.lp_views:
            views = 1 if self.lp_views == "fresh" else int(self.lp_views)
            pairs = [extract(experience.dataset.train()) for _ in range(views)]
            return torch.cat([f for f, _ in pairs]), torch.cat([t for _, t in pairs])
        dataset = experience.dataset.eval()
        if self.cache is None or self.lp_features != "eval":
            return extract(dataset)
        key = (experience.origin_stream.name, experience.current_experience, None)
        return self.cache.get(backbone_sha256(parts), key, lambda: extract(dataset), rows=len(dataset))

    def _extraction(self, strategy: Any, parts: ModelParts) -> dict[str, Any]:
        return {
            "batch_size": strategy.eval_mb_size,
            "device": strategy.device,
            "num_workers": self.num_workers,
            "head_name": parts.head_name,
        }

    # ---------------------------------------------------------- random numbers
    def _seed(self, strategy: Any, purpose: str) -> int:
        """Depends on seed, experience and purpose alone, so that resumed and uninterrupted runs agree."""
        return derived_seed(self.seed, strategy.clock.train_exp_counter, *purpose.encode())

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Where the experience stands; weights and rates in force belong to model and optimizer."""
        report = None if self.report is None else asdict(self.report) | {"classes": list(self.report.classes)}
        if report is not None:
            del report["seconds"]
        return {"probed": self._probed, "lrs": self._lrs, "frozen": list(self._frozen), "report": report}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._probed, self._lrs, self._frozen = state["probed"], state["lrs"], list(state["frozen"])
        report = state["report"]
        self.report = None if report is None else ProbeReport(**{**report, "classes": tuple(report["classes"])})


def _resuming(strategy: Any) -> bool:
    """Whether the opening hooks run again for an experience that a checkpoint will restore."""
    return any(getattr(plugin, "reopening", False) for plugin in strategy.plugins)


def _rebuilt(strategy: Any) -> bool:
    return any(isinstance(plugin, FreshOptimizerPlugin) for plugin in strategy.plugins)


__all__ = ["LinearProbePlugin", "ProbeReport"]
