"""The classes of an experience, for plugins that keep statistics of each class."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from avalanche_firn.benchmarks.streams import full_stream


def experience_classes(experience: Any) -> list[int]:
    """Sorted class ids (a list in one generation of Avalanche's benchmarks, a set in the other)."""
    return sorted(int(c) for c in experience.classes_in_this_experience)


def refuse_known_classes(experience: Any, known: Container[int]) -> None:
    """Classes must not come again; looks ahead as far as the stream can be listed, before a task's work is lost.

    :param known: classes of earlier experiences.
    :raises ValueError: a class of the experience is known, or a later experience of its stream has a class again.
    """
    own = experience_classes(experience)
    repeated = [c for c in own if c in known]
    if repeated:
        raise ValueError(
            f"classes {repeated} were learnt in an earlier experience; a class is accepted in one experience only"
        )
    stream, seen = full_stream(experience), set(own)
    if not hasattr(stream, "__len__"):
        return
    for later in stream:
        if later.current_experience > experience.current_experience:
            again = [c for c in experience_classes(later) if c in seen or c in known]
            if again:
                raise ValueError(
                    f"classes {again} come again in experience {later.current_experience} of the stream; a class is "
                    "accepted in one experience only"
                )
            seen.update(experience_classes(later))


__all__ = ["experience_classes", "refuse_known_classes"]
