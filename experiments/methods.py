"""From the name of a method in a recipe to an Avalanche strategy.

One builder per method, found in :data:`METHODS`. A new method is a section of the schema (``config.py``) and a builder
here. All builders get the same :class:`Ingredients`, so that methods differ in what they are and in nothing else:
the same backbone, the same kind of head, the same optimizer settings unless the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation
from avalanche_firn.experiments import baselines
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.contrastive_sections import AugmentationConfig
from avalanche_firn.experiments.sections import OptimizerConfig, ScheduleConfig, TrainingConfig
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.models.compilation import compile_backbone
from avalanche_firn.models.contrastive import with_projection_head
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import FeatureClassifier
from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.classifier_stage import ClassifierStagePlugin
from avalanche_firn.plugins.contrastive_distillation import ContrastiveDistillationPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.linear_probe import LinearProbePlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.rehearsal import RehearsalPlugin
from avalanche_firn.plugins.schedules import SchedulerFactory, constant, cosine, lagged_cosine, multistep
from avalanche_firn.plugins.slow_learner import SlowLearnerPlugin
from avalanche_firn.plugins.task_inference import TaskInferencePlugin
from avalanche_firn.plugins.warmup_cosine import WarmupCosinePlugin
from avalanche_firn.plugins.zapping import ZappingPlugin
from avalanche_firn.strategies.cila import CILA
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA, SLCAPlusPlus

__all__ = ["METHODS", "Ingredients", "Method", "build_strategy", "make_optimizer", "make_schedule"]


@dataclass(frozen=True)
class Ingredients:
    """What every builder gets: the run's configuration (one method, one seed) and the objects of the run."""

    config: Config
    backbone: Backbone
    device: torch.device
    plugins: Sequence[SupervisedPlugin]
    evaluator: EvaluationPlugin
    cache: FeatureCache | None = None
    normalization: tuple[Sequence[float], Sequence[float]] = ((0.5,), (0.5,))
    """Mean and deviation that the stream's images were normalised with."""

    @property
    def method(self) -> Any:
        """The method's own section."""
        return self.config.methods[0]

    @property
    def training(self) -> TrainingConfig:
        """Training with the method's own values on top."""
        return self.config.training_of(self.method)

    def model(self, *, freeze_old: bool) -> FeatureClassifier:
        """The backbone with an empty head on it."""
        return FeatureClassifier(
            self.backbone.module, TaskwiseLinearHead(self.backbone.num_features, freeze_old=freeze_old)
        )

    def common(self, model: nn.Module) -> dict[str, Any]:
        """Arguments that every strategy takes."""
        training, performance = self.training, self.config.performance
        fused = {"auto": True if self.device.type == "cuda" else None, "on": True, "off": False}
        return {
            "model": model,
            "optimizer": make_optimizer(training.optimizer, model, fused=fused[performance.fused_optimizer]),
            "train_mb_size": training.batch_size // performance.accumulate,
            "train_epochs": training.epochs,
            "eval_mb_size": training.eval_batch_size,
            "device": self.device,
            "evaluator": self.evaluator,
        }

    def schedule(self) -> SchedulerFactory | None:
        """The schedule of one experience; None for constant rates."""
        return make_schedule(self.training.schedule, self.training.epochs)

    def extra_plugins(self) -> list[SupervisedPlugin]:
        """The run's plugins, with mixed precision, accumulation and zaps where the configuration asks for them."""
        precision, zapping, steps = self.config.precision, self.method.zapping, self.config.performance.accumulate
        mixed: list[SupervisedPlugin] = [] if precision == "fp32" else [MixedPrecisionPlugin(precision)]
        zaps: list[SupervisedPlugin] = []
        if zapping is not None:
            zaps = [ZappingPlugin(**zapping.model_dump(), seed=self.config.seeds[0], log=True)]
        parts: list[SupervisedPlugin] = [] if steps == 1 else [GradientAccumulationPlugin(steps)]
        return [*mixed, *parts, *zaps, *self.plugins]


def make_optimizer(config: OptimizerConfig, model: nn.Module, *, fused: bool | None = None) -> Optimizer:
    """The optimizer of a configuration over all parameters; plugins take it as a template.

    Args:
        config: kind and settings.
        model: whose parameters.
        fused: one kernel for all parameters of a step; None leaves it to torch, which then does without.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        return SGD(model.parameters(), momentum=0.9 if config.momentum is None else config.momentum, **settings)
    kind = Adam if config.name == "adam" else AdamW
    return kind(model.parameters(), **settings)


def make_schedule(config: ScheduleConfig, epochs: int) -> SchedulerFactory | None:
    """The schedule of a configuration as a factory; None for constant rates."""
    if config.name == "multistep":
        return multistep(config.milestones, config.gamma)
    if config.name == "lagged_cosine":
        return lagged_cosine(epochs, config.floor)
    return cosine(epochs, config.floor) if config.name == "cosine" else None


def _naive(parts: Ingredients) -> SupervisedTemplate:
    """The whole model at the full rate; the loss covers all classes seen so far."""
    fresh = FreshOptimizerPlugin(scheduler_factory=parts.schedule())
    return Naive(
        **parts.common(parts.model(freeze_old=False)),
        criterion=nn.CrossEntropyLoss(),
        plugins=[fresh, *parts.extra_plugins()],
    )


def _slow(parts: Ingredients, scale: float, local_loss: bool) -> SupervisedTemplate:
    slow = SlowLearnerPlugin(scale, scheduler_factory=parts.schedule())
    return Naive(
        **parts.common(parts.model(freeze_old=True)),
        criterion=LocalCrossEntropy() if local_loss else nn.CrossEntropyLoss(),
        plugins=[slow, *parts.extra_plugins()],
    )


def _linear_probe(parts: Ingredients) -> SupervisedTemplate:
    return _slow(parts, 0.0, parts.method.local_loss)


def _slow_learner(parts: Ingredients) -> SupervisedTemplate:
    return _slow(parts, parts.method.backbone_scale, parts.method.local_loss)


def _slca(parts: Ingredients) -> SupervisedTemplate:
    settings = parts.method.alignment.model_dump()
    return SLCA(
        **parts.common(parts.model(freeze_old=True)),
        criterion=LocalCrossEntropy() if parts.method.local_loss else nn.CrossEntropyLoss(),
        backbone_scale=parts.method.backbone_scale,
        scheduler_factory=parts.schedule(),
        alignment=ClassifierAlignmentPlugin(**settings, seed=parts.config.seeds[0]),
        fresh_final_norm=False,  # backbone.fresh_final_norm decides, for all methods alike
        plugins=parts.extra_plugins(),
    )


def _slca_plus_plus(parts: Ingredients) -> SupervisedTemplate:
    method = parts.method
    return SLCAPlusPlus(
        **parts.common(parts.model(freeze_old=True)),
        alpha=method.alpha,
        beta=method.beta,
        backbone_scale=method.backbone_scale,
        first_task_lora_scale=method.first_task_lora_scale,
        lora_rank=method.lora_rank,
        lora_scale=method.lora_scale,
        lora_targets=method.lora_targets,
        scheduler_factory=parts.schedule() or constant,
        alignment=ClassifierAlignmentPlugin(**method.alignment.model_dump(), seed=parts.config.seeds[0]),
        fresh_final_norm=False,  # backbone.fresh_final_norm decides, for all methods alike
        plugins=parts.extra_plugins(),
    )


def _lora(parts: Ingredients) -> SupervisedTemplate:
    """One pair per matrix that stays open over all tasks; the loss covers all classes seen so far."""
    model = parts.model(freeze_old=parts.method.local_loss)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    add_composed_lora(model, **parts.method.lora.model_dump())
    LoRAComposition(model).open_task(torch.Generator().manual_seed(parts.config.seeds[0]))
    fresh = FreshOptimizerPlugin(scheduler_factory=parts.schedule())
    return Naive(
        **parts.common(model),
        criterion=LocalCrossEntropy() if parts.method.local_loss else nn.CrossEntropyLoss(),
        plugins=[fresh, *parts.extra_plugins()],
    )


def _lorac_ipc(parts: Ingredients) -> SupervisedTemplate:
    method, seed, workers = parts.method, parts.config.seeds[0], parts.training.num_workers
    importance = method.importance.model_dump()
    threshold = importance.pop("threshold")
    tap, inference = method.alignment, method.task_inference
    return LoRACIPC(
        **parts.common(parts.model(freeze_old=True)),
        **method.lora.model_dump(),
        orthogonality=method.orthogonality,
        omega_scale=method.omega_scale,
        clip=method.clip,
        first_lr=method.first_lr,
        importance=ImportantParameterPlugin(threshold, **importance),
        alignment=tap is not None and ClassifierAlignmentPlugin.tap(**tap.model_dump(), seed=seed, num_workers=workers),
        task_inference=inference is not None
        and TaskInferencePlugin(**inference.model_dump(), seed=seed, num_workers=workers),
        scheduler_factory=parts.schedule() or constant,
        official_k_gate=method.official_k_gate,
        seed=seed,
        plugins=parts.extra_plugins(),
    )


def _lp_ft(parts: Ingredients) -> SupervisedTemplate:
    probe = LinearProbePlugin(
        **parts.method.linear_probe.model_dump(),
        ft_lr=parts.method.ft_lr,
        cache=parts.cache,
        seed=parts.config.seeds[0],
    )
    return LPFT(
        **parts.common(parts.model(freeze_old=False)),
        criterion=LocalCrossEntropy() if parts.method.local_loss else nn.CrossEntropyLoss(),
        linear_probe=probe,
        scheduler_factory=parts.schedule(),
        plugins=parts.extra_plugins(),
    )


def _replay(parts: Ingredients) -> SupervisedTemplate:
    rehearsal = RehearsalPlugin(**parts.method.rehearsal.model_dump(), batches="balanced", seed=parts.config.seeds[0])
    fresh = FreshOptimizerPlugin(scheduler_factory=parts.schedule())
    return Naive(
        **parts.common(parts.model(freeze_old=False)),
        criterion=nn.CrossEntropyLoss(),
        plugins=[fresh, rehearsal, *parts.extra_plugins()],
    )


def _contrastive(parts: Ingredients, coefficient: dict[str, Any]) -> SupervisedTemplate:
    """CILA or Co2L: a network with projector, views drawn on the device."""
    method, seed = parts.method, parts.config.seeds[0]
    losses = method.contrastive.model_dump()
    size, normalize = losses.pop("projection_size"), losses.pop("normalize")
    model = with_projection_head(parts.model(freeze_old=False), projection_size=size, normalize=normalize)
    return CILA(
        **parts.common(model),
        contrastive=ContrastiveDistillationPlugin(**losses, **coefficient, seed=seed),
        classifier=ClassifierStagePlugin(
            **method.classifier.model_dump(), seed=seed, num_workers=parts.training.num_workers
        ),
        augmentation=_augmentation(method.augmentation, parts.normalization),
        **method.rehearsal.model_dump(),
        rates=WarmupCosinePlugin(**method.rates.model_dump()),
        seed=seed,
        plugins=parts.extra_plugins(),
    )


def _augmentation(
    section: AugmentationConfig, normalization: tuple[Sequence[float], Sequence[float]]
) -> ContrastiveAugmentation:
    return ContrastiveAugmentation(
        crop_scale=(section.crop_scale[0], section.crop_scale[1]),
        flip=section.flip,
        jitter=None if section.jitter is None else (*section.jitter,),  # type: ignore[arg-type]
        jitter_probability=section.jitter_probability,
        grey=section.grey,
        blur=(section.blur_kernel, (section.blur_sigma[0], section.blur_sigma[1]), section.blur)
        if section.blur
        else None,
        mean=normalization[0],
        std=normalization[1],
    )


def _co2l(parts: Ingredients) -> SupervisedTemplate:
    return _contrastive(parts, {"mode": "constant", "floor": parts.method.distillation_weight})


def _cila(parts: Ingredients) -> SupervisedTemplate:
    return _contrastive(parts, parts.method.coefficient.model_dump())


def _scr(parts: Ingredients) -> SupervisedTemplate:
    return baselines.scr(parts, _augmentation(parts.method.augmentation, parts.normalization))


@dataclass(frozen=True)
class Method:
    """A method of the registry.

    `joint`: trained on all classes at once, an upper bound and not continual. `replay`: whether images of earlier
    experiences are kept. `contrastive`: trained by the losses of Co2L.
    """

    build: Callable[[Ingredients], SupervisedTemplate]
    joint: bool = False
    replay: bool = False
    contrastive: bool = False


METHODS: dict[str, Method] = {
    "naive": Method(_naive),
    "linear_probe": Method(_linear_probe),
    "slow_learner": Method(_slow_learner),
    "slca": Method(_slca),
    "slca_plus_plus": Method(_slca_plus_plus),
    "lora": Method(_lora),
    "lorac_ipc": Method(_lorac_ipc),
    "lp_ft": Method(_lp_ft),
    "replay": Method(_replay, replay=True),
    "co2l": Method(_co2l, replay=True, contrastive=True),
    "cila": Method(_cila, replay=True, contrastive=True),
    "ewc": Method(baselines.ewc),
    "lwf": Method(baselines.lwf),
    "der": Method(baselines.der, replay=True),
    "scr": Method(_scr, replay=True),
    "avalanche_replay": Method(baselines.avalanche_replay, replay=True),
    "joint": Method(_naive, joint=True),
}


def build_strategy(parts: Ingredients) -> SupervisedTemplate:
    """The strategy of a run."""
    strategy = METHODS[parts.method.strategy].build(parts)
    if parts.config.performance.compile:
        compile_backbone(strategy.model)
    return strategy
