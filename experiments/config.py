"""The configuration of a comparison: methods, seeds, and the sections they share.

A run is a configuration with one method and one seed (:meth:`Config.single`), so the ``config.yaml`` of every run
is itself a recipe. :func:`validate` reports all errors together. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from avalanche_firn.experiments.about_sections import CostConfig, TargetConfig, check_repeated, own_targets
from avalanche_firn.experiments.baseline_sections import (
    AvalancheReplayConfig,
    DERConfig,
    EWCConfig,
    LwFConfig,
    SCRConfig,
    scr_problems,
)
from avalanche_firn.experiments.contrastive_sections import (
    AugmentationConfig,
    ClassifierStageConfig,
    CoefficientConfig,
    ContrastiveConfig,
    RateScheduleConfig,
    RehearsalConfig,
)
from avalanche_firn.experiments.errors import ConfigError, Problem, problems_of, reject
from avalanche_firn.experiments.lora_sections import ImportanceConfig, LoRAConfig, TapConfig, TaskInferenceConfig
from avalanche_firn.experiments.method_section import MethodSection as _Method
from avalanche_firn.experiments.performance_section import PerformanceConfig, changed_figures, performance_problems
from avalanche_firn.experiments.probe_sections import LinearProbeStageConfig
from avalanche_firn.experiments.schema_rules import (
    COSMETIC,
    LABEL,
    LABEL_HELP,
    Folder,
    Label,
    check_labels,
    check_seeds,
    digest_of,
    named_methods,
)
from avalanche_firn.experiments.sections import (
    BackboneConfig,
    CheckpointConfig,
    EvaluationConfig,
    Rate,
    Section,
    StreamConfig,
    TrainingConfig,
)

__all__ = [
    "AlignmentConfig",
    "CILAConfig",
    "Co2LConfig",
    "Config",
    "JointConfig",
    "LPFTConfig",
    "LinearProbeConfig",
    "LoRACIPCConfig",
    "LoRAOnlyConfig",
    "MethodConfig",
    "NaiveConfig",
    "ReplayConfig",
    "SLCAConfig",
    "SLCAPlusPlusConfig",
    "SlowLearnerConfig",
    "validate",
]


class NaiveConfig(_Method):
    """Plain sequential fine-tuning: the whole model at the full rate, cross-entropy over all classes seen."""

    strategy: Literal["naive"] = Field(description="sequential fine-tuning")


class JointConfig(_Method):
    """All classes at once with the whole model: an upper bound, not a continual learner."""

    strategy: Literal["joint"] = Field(description="joint training, not continual")


class LinearProbeConfig(_Method):
    """A frozen backbone and one linear head per task."""

    strategy: Literal["linear_probe"] = Field(description="linear heads on the frozen backbone")
    local_loss: bool = Field(default=True, description="cross-entropy over the classes of the task; the SLCA code")


class _SlowBackbone(_Method):
    """SLCA's first stage: the backbone learns at a much smaller rate than the head."""

    backbone_scale: float = Field(default=0.01, ge=0, description="rate of the backbone / lr; exps/slca_cifar.json")
    local_loss: bool = Field(default=True, description="cross-entropy over the classes of the task; the SLCA code")


class SlowLearnerConfig(_SlowBackbone):
    """SLCA's first stage alone."""

    strategy: Literal["slow_learner"] = Field(description="slow backbone, no alignment")


class AlignmentConfig(Section):
    """Classifier alignment on Gaussian features of all classes seen."""

    epochs: int = Field(default=5, ge=0, description="0 = no alignment; exps/slca_cifar.json")
    samples_per_class: int = Field(default=256, ge=1, description="feature rows per class and epoch; the SLCA code")
    lr: Rate = Field(default=0.01, description="cosine to 0 over the epochs; the SLCA code")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the SLCA code")
    weight_decay: float = Field(default=5e-4, ge=0, description="the SLCA code")
    temperature: float | None = Field(
        default=0.1, gt=0, description="of the logit-normalised loss, null = plain cross-entropy; exps/slca_cifar.json"
    )
    scaling: Literal["mean", "feature"] | None = Field(default="mean", description="mean = SLCA, feature = SLCA++")
    compat_task_index: bool = Field(default=False, description="the released code's task index on unequal tasks")


class SLCAConfig(_SlowBackbone):
    """SLCA: slow learner with classifier alignment."""

    strategy: Literal["slca"] = Field(description="slow learner with classifier alignment")
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig, description="the second stage")


class SLCAPlusPlusConfig(_Method):
    """SLCA++: low-rank pairs, norms and biases learn slowly with a symmetric cross-entropy, then alignment."""

    strategy: Literal["slca_plus_plus"] = Field(description="SLCA with LoRA and symmetric cross-entropy")
    alpha: float = Field(default=1.0, ge=0, description="of the cross-entropy; the SLCA++ code, CIFAR-100")
    beta: float = Field(default=0.1, ge=0, description="of its reverse; the SLCA++ code, CIFAR-100")
    backbone_scale: float = Field(default=0.1, gt=0, description="rate of the backbone / lr; the SLCA++ code")
    first_task_lora_scale: float = Field(
        default=0.5, gt=0, description="rate of the pairs in the first task / lr; the SLCA++ code"
    )
    lora_rank: int = Field(default=4, ge=1, description="of the pair of a layer; the SLCA++ code")
    lora_scale: Rate = Field(default=0.8, description="factor of the pairs; the SLCA++ code")
    lora_targets: list[str] = Field(
        default=["qkv"], min_length=1, description="layers by the end of their names; those that the SLCA++ code trains"
    )
    alignment: AlignmentConfig = Field(
        default_factory=lambda: AlignmentConfig(scaling="feature"), description="the second stage"
    )


class LoRAOnlyConfig(_Method):
    """One low-rank pair per matrix, fine-tuned from task to task on the frozen backbone."""

    strategy: Literal["lora"] = Field(description="sequential fine-tuning of one LoRA")
    lora: LoRAConfig = Field(default_factory=LoRAConfig, description="the pairs")
    local_loss: bool = Field(default=False, description="cross-entropy over the classes of the task; our choice")


class LoRACIPCConfig(_Method):
    """LoRAC-IPC: a low-rank pair per task, orthogonal to the others, and important matrices frozen."""

    strategy: Literal["lorac_ipc"] = Field(description="orthogonal LoRA composition, freezing, task inference")
    lora: LoRAConfig = Field(default_factory=LoRAConfig, description="the pairs")
    orthogonality: float = Field(default=0.5, ge=0, description="weight of the penalty; the LoRAC-IPC code, CIFAR-100")
    omega_scale: float = Field(default=1.0, ge=0, description="rate of the scalars / lr; the LoRAC-IPC code, CIFAR-100")
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm, null = none; the LoRAC-IPC code")
    first_lr: Rate | None = Field(default=None, description="rate of the first task, null = the same")
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig, description="freezing after a task")
    alignment: TapConfig | None = Field(default_factory=TapConfig, description="of the classifier, null = none")
    task_inference: TaskInferenceConfig | None = Field(
        default_factory=TaskInferenceConfig, description="at test time, null = the newest weights for all"
    )
    official_k_gate: bool = Field(default=False, description="repeats a slip of the LoRAC-IPC code")

    def brief(self) -> LoRACIPCConfig:
        """One epoch of training and of alignment."""
        alignment = self.alignment
        if alignment is not None:
            alignment = alignment.model_copy(update={"epochs": min(alignment.epochs, 1)})
        return super().brief().model_copy(update={"alignment": alignment})  # type: ignore[return-value]


class LPFTConfig(_Method):
    """LP-FT: in every task a linear probe on the frozen backbone, then fine-tuning from that classifier."""

    strategy: Literal["lp_ft"] = Field(description="linear probe, then fine-tuning, in every task")
    ft_lr: Rate | None = Field(default=None, description="rate of fine-tuning after a probe; null = training's; open")
    local_loss: bool = Field(default=False, description="cross-entropy over the classes of the task; open, our choice")
    linear_probe: LinearProbeStageConfig = Field(
        default_factory=LinearProbeStageConfig, description="the probe before fine-tuning"
    )


class ReplayConfig(_Method):
    """Experience replay: as naive, and every batch is joined by as many stored images."""

    strategy: Literal["replay"] = Field(description="naive fine-tuning with stored images in every batch")
    rehearsal: RehearsalConfig = Field(default_factory=RehearsalConfig, description="the buffer")


class _ContrastiveMethod(_Method):
    """What Co2L and CILA share."""

    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig, description="the losses")
    rehearsal: RehearsalConfig = Field(default_factory=RehearsalConfig, description="the buffer")
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig, description="views")
    rates: RateScheduleConfig = Field(default_factory=RateScheduleConfig, description="epochs and rates")
    classifier: ClassifierStageConfig = Field(default_factory=ClassifierStageConfig, description="the second stage")

    def brief(self) -> _ContrastiveMethod:
        """One epoch per experience, without warm-up, and one of the classifier."""
        rates = self.rates.model_copy(update={"first_epochs": None, "warmup_epochs": 0})
        classifier = self.classifier.model_copy(update={"epochs": 1, "milestones": None})
        return super().brief().model_copy(update={"rates": rates, "classifier": classifier})  # type: ignore[return-value]


class Co2LConfig(_ContrastiveMethod):
    """Co2L: asymmetric supervised contrastive loss and distillation of the similarities in a batch."""

    strategy: Literal["co2l"] = Field(description="contrastive learning with distillation, constant weight")
    distillation_weight: float = Field(default=1.0, ge=0, description="of the distillation; the Co2L code")


class CILAConfig(_ContrastiveMethod):
    """CILA: Co2L with a weight of the distillation that follows the losses of the tasks before."""

    strategy: Literal["cila"] = Field(description="Co2L with an adaptive weight of the distillation")
    coefficient: CoefficientConfig = Field(default_factory=CoefficientConfig, description="the adaptive weight")


MethodConfig = Annotated[
    NaiveConfig
    | LinearProbeConfig
    | SlowLearnerConfig
    | SLCAConfig
    | SLCAPlusPlusConfig
    | LoRAOnlyConfig
    | LoRACIPCConfig
    | LPFTConfig
    | ReplayConfig
    | Co2LConfig
    | CILAConfig
    | EWCConfig
    | LwFConfig
    | DERConfig
    | SCRConfig
    | AvalancheReplayConfig
    | JointConfig,
    Field(discriminator="strategy"),
]


class Config(Section):
    """A comparison of methods over seeds on one stream."""

    name: Label = Field(
        pattern=LABEL, json_schema_extra=LABEL_HELP, description="folder of the comparison below output"
    )
    description: str = Field(default="", description="one line for firn recipes ls")
    benchmark: str = Field(default="", description="one line for firn recipes ls: data, tasks, classes")
    cost: CostConfig | None = Field(default=None, description="what a run needs; null = not known")
    targets: list[TargetConfig] = Field(default_factory=list, description="figures that others report for it")
    output: Folder = Field(default="runs", min_length=1, description="folder that holds the comparisons; our choice")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=[0, 1, 2], min_length=1, description="one run per method and seed; our choice"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra={"accepted": "auto, cpu, cuda or cuda:N"},
        description="auto uses CUDA where there is one",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="fp32", description="autocast of forward passes, auto = bf16 or fp16 on a GPU; fp32 as in the SLCA code"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of torch; null leaves torch's own choice"
    )
    deterministic: bool = Field(
        default=False,
        description="only operations that torch makes deterministic, true = stop at others; slower, other rounding on "
        "a GPU",
    )
    backbone: BackboneConfig = Field(default_factory=BackboneConfig, description="the pre-trained feature extractor")
    stream: StreamConfig = Field(description="the data and how it is cut into experiences")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="for every method")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="after each experience")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="exact resume")
    performance: PerformanceConfig = Field(
        default_factory=PerformanceConfig, description="how fast; few change figures"
    )
    methods: list[MethodConfig] = Field(min_length=1, description="what is compared; a bare name means its defaults")
    progress: bool = Field(default=True, description="progress bars, where the output is a terminal")

    @field_validator("methods", mode="before")
    @classmethod
    def _expand(cls, methods: Any) -> Any:
        return named_methods(methods)

    @field_validator("seeds")
    @classmethod
    def _unique_seeds(cls, seeds: list[int]) -> list[int]:
        return check_seeds(seeds)

    @field_validator("targets")
    @classmethod
    def _unique_targets(cls, targets: list[TargetConfig]) -> list[TargetConfig]:
        return check_repeated(targets)

    @field_validator("methods")
    @classmethod
    def _unique_labels(cls, methods: list[Any]) -> list[Any]:
        check_labels(methods)
        return methods

    @model_validator(mode="after")
    def _trainable(self) -> Config:
        problems: list[tuple[str, str, str]] = []
        batch_sizes: list[int | None] = []
        for i, method in enumerate(self.methods):
            batch_sizes.append(None)
            try:
                batch_sizes[i] = self.training_of(method).batch_size
            except ValidationError as error:
                for problem in problems_of(error, TrainingConfig):
                    path = f"methods[{i}].training.{problem.path}"
                    problems.append((path, f"{problem.reason} (together with training)", problem.accepted))
                continue
            carried = isinstance(method, LPFTConfig) and not method.linear_probe.reset_momentum
            if carried and self.training_of(method).schedule.name != "none":
                reason = "false carries one optimizer over all tasks, and a schedule begins anew in each"
                path = f"methods[{i}].linear_probe.reset_momentum"
                problems.append((path, reason, "true, or schedule: {name: none}"))
            if isinstance(method, (Co2LConfig, CILAConfig)):
                problems += self._contrastive_problems(i, method)
            if isinstance(method, SCRConfig):
                transforms = getattr(self.stream, "transforms", "backbone")
                problems += scr_problems(f"methods[{i}]", method.zapping, transforms)
            problems += self._zapping_problems(i, method)
        problems += performance_problems(self.performance, self.methods, batch_sizes)
        if self.precision == "fp16" and self.device == "cpu":
            problems.append(("precision", "fp16 needs a CUDA device", "fp32 or bf16 with device: cpu"))
        reject(problems)
        return self

    def _zapping_problems(self, i: int, method: Any) -> list[tuple[str, str, str]]:
        """Where zaps would do nothing, or undo what the method is about."""
        zapping = method.zapping
        if zapping is None:
            return []
        if isinstance(method, (Co2LConfig, CILAConfig)):
            reason = f"is set with {method.strategy}, whose classifier is fitted after the training anyway"
            return [(f"methods[{i}].zapping", reason, "null")]
        if isinstance(method, LPFTConfig) and zapping.schedule == "experience":
            reason = "experience would redraw the classifier that the linear probe has just fitted"
            return [(f"methods[{i}].zapping.schedule", reason, "epoch, iteration or class_exposure")]
        epochs = self.training_of(method).epochs
        if zapping.schedule == "epoch" and zapping.every >= epochs:
            reason = f"{zapping.every} with {epochs} epochs: no zap would happen"
            return [(f"methods[{i}].zapping.every", reason, f"1 to {epochs - 1}" if epochs > 1 else "more epochs")]
        frozen = ("linear_probe", "slow_learner", "slca", "slca_plus_plus", "lorac_ipc")
        if method.strategy in frozen and zapping.scope in ("all", "random"):
            reason = f"{zapping.scope} reaches rows of earlier tasks, which {method.strategy} freezes"
            return [(f"methods[{i}].zapping.scope", reason, "experience or new")]
        return []

    def _contrastive_problems(self, i: int, method: Co2LConfig | CILAConfig) -> list[tuple[str, str, str]]:
        """Where a contrastive method does not fit the shared sections."""
        problems = []
        name, training = method.strategy, self.training_of(method)
        if training.schedule.name != "none":
            reason = f"{name} has its own schedule, and training asks for {training.schedule.name}"
            problems.append((f"methods[{i}].training.schedule", reason, "{name: none}"))
        transforms = getattr(self.stream, "transforms", "backbone")
        if transforms not in ("backbone", "co2l_cifar", "co2l_tiny", "co2l_digits"):
            reason = f"{transforms} with {name}, which draws its views on the device"
            problems.append(("stream.transforms", reason, "backbone with augment: false, or co2l_..."))
        elif transforms == "backbone" and getattr(self.stream, "augment", False):
            reason = f"true with {name}, which draws its views on the device"
            problems.append(("stream.augment", reason, "false"))
        rates = method.rates
        warm = training.batch_size > 256 if rates.warmup is None else rates.warmup
        fewest = min(training.epochs, rates.first_epochs or training.epochs)
        if warm and rates.warmup_epochs >= fewest:
            path = f"methods[{i}].rates.warmup_epochs"
            problems.append(
                (path, f"{rates.warmup_epochs} with {fewest} epochs", f"0 to {fewest - 1}, or warmup: false")
            )
        return problems

    def training_of(self, method: _Method) -> TrainingConfig:
        """`training` with the method's own values on top."""
        merged = self.training.model_dump()
        own = method.training.model_dump(exclude_none=True)
        optimizer = own.pop("optimizer", {})
        if optimizer.get("name", "sgd") != "sgd" and "momentum" not in optimizer:
            merged["optimizer"]["momentum"] = None  # the shared momentum belongs to the shared SGD
        merged["optimizer"].update(optimizer)
        merged.update(own)
        return TrainingConfig.model_validate(merged)

    def single(self, method: str, seed: int) -> Config:
        """The configuration of one run: one method (by label), one seed.

        Raises:
            KeyError: no method has that label.
        """
        chosen = {m.name: m for m in self.methods}[method]
        own = own_targets(self.targets, method)
        return self.model_copy(update={"methods": [chosen], "seeds": [seed], "targets": own})

    def identity(self) -> dict[str, Any]:
        """Everything that decides a run's figures, as plain values; what is only shown or stored is left out."""
        values = self.model_dump()
        changed = changed_figures(values["performance"])
        if not values["deterministic"]:
            del values["deterministic"]  # which runs of before it was there were not asked for
        kept = {key: value for key, value in values.items() if key not in COSMETIC}
        return kept | ({"performance": changed} if changed else {})

    def digest(self, *, seeds: bool = True) -> str:
        """SHA-256 of :meth:`identity`, hexadecimal: runs with the same digest are the same experiment.

        Without `seeds`: the same experiment but for the seed, so their figures may be averaged.
        """
        return digest_of(self.identity(), seeds=seeds)


def validate(raw: Any, *, source: str = "") -> Config:
    """The configuration in `raw` (nested dicts and lists, as YAML gives them).

    Raises:
        ConfigError: with all problems together.
    """
    if not isinstance(raw, Mapping):
        accepted = "key: value lines; see firn recipes show digits"
        raise ConfigError(Problem("", f"not a mapping but {type(raw).__name__}", accepted), source=source)
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(problems_of(error, Config), source=source) from None
