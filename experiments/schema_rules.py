"""Rules that both kinds of configuration share: names of methods, seeds, the digest. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.config import JsonDict

from avalanche_firn.experiments.errors import reject

__all__ = ["COSMETIC", "LABEL", "LABEL_HELP", "check_labels", "check_seeds", "digest_of", "named_methods"]

LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LABEL_HELP: JsonDict = {"accepted": "letters, digits, points, dashes and underscores"}
COSMETIC = ("name", "description", "benchmark", "cost", "targets", "output", "progress", "checkpoint", "performance")
"""Not part of a run's identity: what is said about it, where it is written, how it is shown, how often it is stored,
how fast it is (what of ``performance`` may change figures is part of it nevertheless, see the section)."""
_RESERVED = ("summary",)


def named_methods(methods: Any) -> Any:
    """A bare name becomes a method with its defaults; a missing label the strategy's name."""
    if not isinstance(methods, list):
        return methods
    expanded = [{"strategy": method} if isinstance(method, str) else method for method in methods]
    return [
        {"name": m["strategy"], **m} if isinstance(m, Mapping) and isinstance(m.get("strategy"), str) else m
        for m in expanded
    ]


def check_seeds(seeds: list[int]) -> list[int]:
    """Refuses repeated seeds, inside a validator."""
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    reject([("", f"the seeds {repeated} are repeated", "every seed once")] if repeated else [])
    return seeds


def check_labels(methods: Sequence[Any]) -> None:
    """Refuses repeated and reserved names of methods, inside a validator."""
    labels = [method.name for method in methods]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    problems = [("", f"the names {repeated} are repeated", "every name once")] if repeated else []
    problems += [("", f"the name {label} is reserved", "another name") for label in labels if label in _RESERVED]
    reject(problems)


def digest_of(identity: Mapping[str, Any], *, seeds: bool) -> str:
    """SHA-256 of plain values, hexadecimal; without `seeds` as if they had none."""
    values = dict(identity) if seeds else {**identity, "seeds": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
