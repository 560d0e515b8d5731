"""What every section of a configuration is: the rules that pydantic applies. Nothing here imports torch."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from avalanche_firn.experiments.errors import reject

__all__ = ["Arguments", "Rate", "Section", "unprintable"]

Rate = Annotated[float, Field(gt=0)]
_LARGEST = 2**63 - 1
_WHOLE = f"a whole number from -{_LARGEST} to {_LARGEST}"
_DEPTH = 8  # of arguments, one inside the other; our choice
_TEXT = "a text without control characters"


def unprintable(text: str) -> str | None:
    """The first letter that has no place in a name, a path or a line of text, as ``U+0000``; None without one.

    Control characters but for tab and the ends of lines, and halves of letters (surrogates), which no file can hold.
    """
    if text.isprintable():
        return None
    found = (c for c in text if c not in "\t\n\r\u0085" and unicodedata.category(c) in ("Cc", "Cs"))
    letter = next(found, None)
    return None if letter is None else f"U+{ord(letter):04X}"


def _storable(value: Any, path: str, problems: list[tuple[str, str, str]]) -> Any:
    """A value that can be stored and read again, and is itself then; what can't is noted as a problem."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) > _LARGEST:
        problems.append((path, f"a whole number of {int(math.log10(abs(value))) + 1} digits", _WHOLE))
    elif isinstance(value, float) and value == 0:
        return 0.0  # -0.0 is the same value and would be another experiment
    elif isinstance(value, str) and (letter := unprintable(value)) is not None:
        problems.append((path, f"holds the letter {letter}", _TEXT))
    elif isinstance(value, list):
        return [_storable(inner, f"{path}[{i}]", problems) for i, inner in enumerate(value)]
    return value


class Section(BaseModel):
    """Common rules: unknown keys forbidden, no conversion of types, no infinities, immutable.

    Whole numbers fit into 64 bits, texts have no control characters, and minus zero is zero.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        problems: list[tuple[str, str, str]] = []
        kept = {key: _storable(value, str(key), problems) for key, value in values.items()}
        reject(problems[:20])
        return kept


def _argument(value: Any, path: str, depth: int, problems: list[tuple[str, str, str]]) -> Any:
    """An argument for somebody else's function, which no schema knows: plain values all the way down."""
    if depth > _DEPTH:
        problems.append((path, f"more than {_DEPTH} levels, one inside the other", "fewer levels"))
    elif isinstance(value, list | tuple):
        return [_argument(inner, f"{path}[{i}]", depth + 1, problems) for i, inner in enumerate(value)]
    elif isinstance(value, Mapping):
        kinds = {type(key) for key in value}
        if not (kinds <= {str} or kinds <= {int}):
            problems.append((path, "has keys of several kinds", "texts as keys, or whole numbers"))
        return {key: _argument(inner, f"{path}.{key}".lstrip("."), depth + 1, problems) for key, inner in value.items()}
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append((path, f"{value} isn't accepted", "a finite number"))
    elif value is not None and not isinstance(value, bool | int | float | str):
        problems.append((path, f"a {type(value).__name__} isn't accepted", "null, true, false, numbers, texts, lists"))
    return _storable(value, path, problems)


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    problems: list[tuple[str, str, str]] = []
    kept: dict[str, Any] = _argument(values, "", 0, problems)
    reject(problems[:20])
    return kept


Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]
"""Keyword arguments of a function of another library: plain, finite values."""
