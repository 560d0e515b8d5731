"""The configuration of a transfer experiment: ways of pre-training, seeds, optimizers of the transfer.

A run is one way of pre-training with one seed (:meth:`TransferExperiment.single`), followed by all transfers. Nothing
here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from avalanche_firn.experiments.about_sections import CostConfig, TargetConfig, check_repeated, own_targets
from avalanche_firn.experiments.errors import ConfigError, problems_of, reject
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
from avalanche_firn.experiments.sections import CheckpointConfig, Section
from avalanche_firn.experiments.transfer_sections import (
    DataConfig,
    DynamicsConfig,
    IidConfig,
    LandscapeConfig,
    NetworkConfig,
    PretrainingConfig,
    TransferConfig,
)

__all__ = ["TransferExperiment", "is_transfer", "validate_transfer"]


class TransferExperiment(Section):
    """Networks pre-trained in several ways, each transferred with several optimizers."""

    experiment: Literal["transfer"] = Field(description="marks this kind of recipe")
    name: Label = Field(
        pattern=LABEL,
        json_schema_extra=LABEL_HELP,
        description="folder of the experiment below output",
    )
    description: str = Field(default="", description="one line for firn recipes ls")
    benchmark: str = Field(default="", description="one line for firn recipes ls: data, tasks, classes")
    cost: CostConfig | None = Field(default=None, description="what a run needs; null = not known")
    targets: list[TargetConfig] = Field(default_factory=list, description="figures that others report for it")
    output: Folder = Field(default="runs", min_length=1, description="folder that holds the comparisons; our choice")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=[0, 1, 2], min_length=1, description="one pre-training per method and seed; the released code: 3"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra={"accepted": "auto, cpu, cuda or cuda:N"},
        description="auto uses CUDA where there is one",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32", description="of the pre-training; the transfer is fp32. The released code: fp32"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of torch; null leaves torch's own choice"
    )
    network: NetworkConfig = Field(default_factory=NetworkConfig, description="what is pre-trained")
    data: DataConfig = Field(description="classes to pre-train on and to transfer to")
    methods: list[PretrainingConfig] = Field(min_length=1, description="ways of pre-training")
    transfer: TransferConfig = Field(description="the two protocols")
    dynamics: DynamicsConfig | None = Field(default_factory=DynamicsConfig, description="null = not measured")
    landscape: LandscapeConfig | None = Field(default=None, description="null = not drawn")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="exact resume of a pre-training")
    progress: bool = Field(default=True, description="progress bars, where the output is a terminal")

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, methods: Any) -> Any:
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
    def _possible(self) -> TransferExperiment:
        problems = []
        searched = [o.label for o in self.transfer.optimizers if len(o.rates) > 1]
        left = getattr(self.data, "validation_classes", None)
        if left is None:
            left = len(getattr(self.data, "validation", [0]))
        if searched and self.transfer.select == "validation" and not left:
            reason = f"validation, but no class is left for it, and {', '.join(searched)} has several rates"
            problems.append(("transfer.select", reason, "test_envelope, single rates, or validation classes in data"))
        for i, method in enumerate(self.methods):
            if isinstance(method, IidConfig) and method.zap and method.zap_every >= method.epochs:
                reason = f"{method.zap_every} with {method.epochs} epochs: no zap would happen"
                problems.append((f"methods[{i}].zap_every", reason, f"1 to {method.epochs - 1}, or zap: false"))
        reject(problems)
        return self

    def single(self, method: str, seed: int) -> TransferExperiment:
        """The configuration of one run; KeyError where no method has that label."""
        chosen = {m.name: m for m in self.methods}[method]
        own = own_targets(self.targets, method)
        return self.model_copy(update={"methods": [chosen], "seeds": [seed], "targets": own})

    def identity(self) -> dict[str, Any]:
        """Everything that decides a run's figures, as plain values; what is only shown or stored is left out."""
        return {key: value for key, value in self.model_dump().items() if key not in COSMETIC}

    def digest(self, *, seeds: bool = True) -> str:
        """SHA-256 of :meth:`identity`, hexadecimal; without `seeds` that of the same experiment but for the seed."""
        return digest_of(self.identity(), seeds=seeds)


def is_transfer(raw: Any) -> bool:
    """Whether plain values are those of a transfer experiment."""
    return isinstance(raw, Mapping) and "experiment" in raw


def validate_transfer(raw: Mapping[str, Any], *, source: str = "") -> TransferExperiment:
    """The configuration in `raw`.

    Raises:
        ConfigError: with all problems together.
    """
    try:
        return TransferExperiment.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(problems_of(error, TransferExperiment), source=source) from None
