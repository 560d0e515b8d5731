"""What the sections of all methods of a comparison have in common. Nothing here imports torch."""

from __future__ import annotations

from pydantic import Field

from avalanche_firn.experiments.schema_rules import LABEL, LABEL_HELP, Label
from avalanche_firn.experiments.sections import Section, TrainingOverride
from avalanche_firn.experiments.zapping_sections import ZappingConfig

__all__ = ["MethodSection"]


class MethodSection(Section):
    """What every method has: a label, which names its folder and its rows, and its own training values."""

    name: Label = Field(
        pattern=LABEL,
        json_schema_extra=LABEL_HELP,
        description="unique label: folder and table row. Default: the strategy's name",
    )
    training: TrainingOverride = Field(default_factory=TrainingOverride, description="where it differs from training")
    zapping: ZappingConfig | None = Field(default=None, description="redraw rows of the classifier; null = never")

    def brief(self) -> MethodSection:
        """The method with one epoch in each of its phases, for a dry run."""
        training = self.training.model_copy(update={"epochs": 1, "schedule": None})
        zapping = self.zapping
        if zapping is not None:  # in one epoch, at its only possible moment
            zapping = zapping.model_copy(update={"schedule": "iteration", "every": 1})
        return self.model_copy(update={"training": training, "zapping": zapping})
