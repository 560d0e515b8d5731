"""Rules that both kinds of configuration share: names of methods, seeds, folders, the digest. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic.config import JsonDict

from avalanche_firn.experiments.errors import reject

__all__ = [
    "COSMETIC",
    "LABEL",
    "LABEL_HELP",
    "Folder",
    "Label",
    "check_labels",
    "check_seeds",
    "digest_of",
    "named_methods",
    "repeated",
]

LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LABEL_HELP: JsonDict = {"accepted": "letters, digits, points, dashes and underscores"}
_LETTERS = 100  # of a label, which names folders and files; our choice
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))}
_NAME_BYTES, _PATH_BYTES = 255, 3000  # of a folder's name and of a path, on nearly all systems; room for what is below
COSMETIC = ("name", "description", "benchmark", "cost", "targets", "output", "progress", "checkpoint", "performance")
"""Not part of a run's identity: what is said about it, where it is written, how it is shown, how often it is stored,
how fast it is (what of ``performance`` may change figures is part of it nevertheless, see the section)."""
_RESERVED = ("summary", "config.yaml")  # what a comparison puts beside the folders of its methods


def named_methods(methods: Any) -> Any:
    """A bare name becomes a method with its defaults; a missing label the strategy's name."""
    if not isinstance(methods, list):
        return methods
    expanded = [{"strategy": method} if isinstance(method, str) else method for method in methods]
    return [
        {"name": m["strategy"], **m} if isinstance(m, Mapping) and isinstance(m.get("strategy"), str) else m
        for m in expanded
    ]


def repeated(values: Iterable[Hashable]) -> list[Any]:
    """What is there more than once, each once, sorted."""
    return sorted((value for value, count in Counter(values).items() if count > 1), key=lambda v: (str(type(v)), v))


def _nameable(label: str) -> str:
    """Refuses a label that some file systems can't hold as the name of a folder."""
    accepted = f"{LABEL_HELP['accepted']}, up to {_LETTERS} of them, the last no point, no name of a device"
    if len(label) > _LETTERS or label.endswith(".") or label.split(".")[0].lower() in _DEVICES:
        shown = repr(label) if len(label) <= _LETTERS else f"a label of {len(label)} letters"
        reject([("", f"{shown} can't name a folder everywhere", accepted)])
    return label


def _folder(text: str) -> str:
    """Refuses a path that no system would make."""
    parts = text.replace("\\", "/").split("/")
    if len(text.encode()) > _PATH_BYTES or any(len(part.encode()) > _NAME_BYTES for part in parts):
        reject([("", "too long for a path", f"up to {_PATH_BYTES} bytes, up to {_NAME_BYTES} for each folder's name")])
    return text


Label = Annotated[str, AfterValidator(_nameable)]
"""Text of the pattern :data:`LABEL` that can name a folder on every system."""
Folder = Annotated[str, AfterValidator(_folder)]
"""Path of a folder that will be made."""


def check_seeds(seeds: list[int]) -> list[int]:
    """Refuses repeated seeds, inside a validator."""
    twice = repeated(seeds)
    reject([("", f"the seeds {twice} are repeated", "every seed once")] if twice else [])
    return seeds


def check_labels(methods: Sequence[Any]) -> None:
    """Refuses repeated and reserved names of methods, inside a validator; capitals make no other folder everywhere."""
    labels = [method.name for method in methods]
    twice = repeated(labels)
    problems = [("", f"the names {twice} are repeated", "every name once")] if twice else []
    alike = repeated(label.lower() for label in dict.fromkeys(labels))
    if alike:
        shown = sorted(label for label in labels if label.lower() in alike)
        problems.append(("", f"the names {shown} differ in capitals only", "names that name different folders"))
    reserved = [label for label in labels if label.lower() in _RESERVED]
    problems += [("", f"the name {label} is reserved", "another name") for label in reserved]
    reject(problems)


def digest_of(identity: Mapping[str, Any], *, seeds: bool) -> str:
    """SHA-256 of plain values, hexadecimal; without `seeds` as if they had none."""
    values = dict(identity) if seeds else {**identity, "seeds": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
