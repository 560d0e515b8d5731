"""The classes of an experience, for plugins that keep statistics of each class."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def experience_classes(experience: Any) -> list[int]:
    """Sorted class ids (a list in one generation of Avalanche's benchmarks, a set in the other)."""
    return sorted(int(c) for c in experience.classes_in_this_experience)


def refuse_known_classes(experience: Any, known: Container[int]) -> None:
    """:raises ValueError: a class of the experience is among ``known``, those of earlier ones."""
    repeated = [c for c in experience_classes(experience) if c in known]
    if repeated:
        raise ValueError(
            f"classes {repeated} were learnt in an earlier experience; a class is accepted in one experience only"
        )


__all__ = ["experience_classes", "refuse_known_classes"]
