"""What every section of a configuration is: the rules that pydantic applies. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Rate", "Section"]

Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Common rules: unknown keys forbidden, no conversion of types, no infinities, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
