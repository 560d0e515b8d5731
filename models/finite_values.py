"""The error of functions of tensors that need finite numbers and got others.

A ``ValueError``, as bad arguments are everywhere here, with a class of its own: who calls in the middle of a run can
tell it from the others and say which experience it happened in (:mod:`avalanche_firn.plugins.finite_words`).
"""

from __future__ import annotations

__all__ = ["NonFiniteValues"]


class NonFiniteValues(ValueError):
    """NaN or infinity where finite numbers are needed; the message names the argument, class or matrix."""
