"""Configuration errors: all of them in one message, each with its place, the value and what is accepted.

Whoever edits a recipe wants to see every mistake at once, and the name that was probably meant. pydantic collects
the errors; this module turns them into sentences. Nothing here imports torch, so a wrong recipe is answered in
well under a second.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

__all__ = ["ConfigError", "Problem", "describe", "explain_keys", "known_keys", "nearest", "problems_of", "reject"]

_MISSING = object()
_NEAR = 100  # letters of a key that was perhaps meant otherwise; the search takes their square
_MOST = 100  # errors that are listed
_SHOWN = 400  # letters of a reason
_UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Problem:
    """One mistake: `path` says where, `reason` what is wrong, `accepted` what would be right, `hint` the likely fix."""

    path: str
    reason: str
    accepted: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.reason}" if self.path else self.reason]
        if self.accepted:
            parts.append(f"accepted: {self.accepted}")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)


class ConfigError(ValueError):
    """A configuration, or something it points to, can't be used. `problems` lists every mistake that was found."""

    def __init__(self, problems: Problem | str | Iterable[Problem], *, source: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem("", problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        where = f" in {self.source}" if self.source else ""
        if len(self.problems) == 1:
            return f"wrong configuration{where}: {self.problems[0]}"
        lines = "\n".join(f"  {problem}" for problem in self.problems[:_MOST])
        more = len(self.problems) - _MOST
        rest = f"\n  and {more} more" if more > 0 else ""
        return f"wrong configuration{where}, {len(self.problems)} errors:\n{lines}{rest}"


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that looks most like `key`, or None when nothing does."""
    if len(key) > _NEAR:
        return None
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def reject(problems: Sequence[tuple[str, str, str]]) -> None:
    """Raise inside a pydantic validator with several (field, reason, accepted) at once; no-op for an empty list.

    A validator of pydantic can carry one message only, and its place is the whole section. The list travels in the
    context of the error and is unpacked by :func:`problems_of`.
    """
    if problems:
        raise PydanticCustomError("firn", "{text}", {"text": problems[0][1], "problems": [list(p) for p in problems]})


# --- reading the schema ---------------------------------------------------------------------------------------------


def _inner(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _inner(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in _UNIONS:
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        if len(rest) == 1:
            return _inner(rest[0])
    return annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that may stand where `annotation` stands."""
    annotation = _inner(annotation)
    # list[int] is an instance of type in Python 3.10, and no class that issubclass takes
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in _UNIONS:
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _tag(model: type[BaseModel], key: str) -> bool:
    """Whether `key` is the literal that selects `model` in a union (its `strategy` or `name`)."""
    return any(
        typing.get_origin(_inner(field.annotation)) is typing.Literal and key in typing.get_args(field.annotation)
        for field in model.model_fields.values()
    )


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field accepts, in words: ``a number, greater than 0``, ``one of sgd, adam``."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *extra = typing.get_args(annotation)
        flat = [m for item in extra for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return describe(base, [*flat, *metadata])
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in _UNIONS:
        named = [describe(part, metadata) if part is not type(None) else "null" for part in args]
        return " or ".join(dict.fromkeys(named))
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is list:
        return f"a list, each {describe(args[0])}{_bounds(metadata)}"
    if _models(annotation) or origin is dict or annotation is dict:
        return "a section of key: value"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    words = []
    for item in metadata:
        if isinstance(item, annotated_types.Gt):
            words.append(f"greater than {item.gt}")
        elif isinstance(item, annotated_types.Ge):
            words.append(f"at least {item.ge}")
        elif isinstance(item, annotated_types.Lt):
            words.append(f"less than {item.lt}")
        elif isinstance(item, annotated_types.Le):
            words.append(f"at most {item.le}")
        elif isinstance(item, annotated_types.MinLen):
            words.append("not empty" if item.min_length == 1 else f"{item.min_length} or more of them")
        elif isinstance(item, annotated_types.MaxLen):
            words.append(f"{item.max_length} at most")
        elif getattr(item, "pattern", None):
            words.append(f"matching {item.pattern}")
    return f", {', '.join(words)}" if words else ""


def accepted_by(field: FieldInfo) -> str:
    """What a field accepts, in words: its own wording where it has one, else :func:`describe`."""
    if isinstance(field.json_schema_extra, dict) and "accepted" in field.json_schema_extra:
        return str(field.json_schema_extra["accepted"])
    return describe(field.annotation, field.metadata)


def explain_keys(root: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """(path, what is accepted, description) of every key below `root`; the choices of a union's tag are joined."""
    choices = {
        f"{path}.{name}": list(dict.fromkeys(tag for model in models for tag in typing.get_args(_field(model, name))))
        for path, models in _unions(root)
        for name in ("name", "strategy")
        if all(typing.get_origin(_field(model, name)) is typing.Literal for model in models)
    }
    for path, field in known_keys(root).items():
        accepted = f"one of {', '.join(choices[path])}" if path in choices else accepted_by(field)
        yield path, accepted, "which one" if path in choices else field.description or ""


def _field(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].annotation if name in model.model_fields else None


def _unions(root: type[BaseModel]) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    for name, field in root.model_fields.items():
        annotation, path = _inner(field.annotation), name
        if typing.get_origin(annotation) is list:
            path, annotation = f"{name}[]", typing.get_args(annotation)[0]
        if len(models := _models(annotation)) > 1:
            yield path, models


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key below `model` by its dotted path; list items are written ``methods[]``."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        found.setdefault(path, field)
        annotation = _inner(field.annotation)
        if typing.get_origin(annotation) is list:
            path, annotation = f"{path}[]", typing.get_args(annotation)[0]
        for inner in _models(annotation):
            for key, value in known_keys(inner, f"{path}.").items():
                found.setdefault(key, value)
    return found


# --- from pydantic to sentences -------------------------------------------------------------------------------------


def _walk(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[type[BaseModel]], FieldInfo | None, Any]:
    """Follow an error's location: (path, sections that hold the last key, its field or None, its annotation)."""
    path, models = "", [root]
    field: FieldInfo | None = None
    annotation: Any = root
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            inner = _inner(annotation)
            annotation = typing.get_args(inner)[0] if typing.get_origin(inner) is list else inner
            models, field = _models(annotation) or models, None
            continue
        candidates = _models(annotation)
        tagged = [model for model in candidates if _tag(model, step)] if len(candidates) > 1 else []
        if tagged:  # pydantic puts the tag of a union into the location; a section may have a key of that name
            annotation, models = tagged[0], tagged
            continue
        if candidates:
            models = candidates
        holder = next((model for model in candidates if step in model.model_fields), None)
        if holder is None and not candidates:  # the arm of a plain union, such as "list[int]": no place of its own
            continue
        path += f".{step}" if path else step
        field = holder.model_fields[step] if holder else None
        annotation = field.annotation if field else None
    return path, models, field, annotation


def _value(raw: Any) -> str:
    try:
        text = repr(raw[:100] if isinstance(raw, str) else raw)
    except (ValueError, RecursionError):  # a number of thousands of digits, a value that holds itself
        text = f"a {type(raw).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _unknown(root: type[BaseModel], path: str, models: list[type[BaseModel]]) -> Problem:
    parent, _, key = path.rpartition(".")
    here = sorted({name for model in models for name in model.model_fields})
    close = nearest(key, here)
    elsewhere = [known for known in known_keys(root) if known.rpartition(".")[2] == key]
    if close is not None:
        hint = f"did you mean {parent}.{close}?" if parent else f"did you mean {close}?"
    elif re.sub(r"\[\d+\]", "[]", path) in elsewhere:
        hint = "only another choice of this section has that key"
    else:
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else ""
    return Problem(path, "unknown key", f"one of {', '.join(here)}", hint)


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Every error of a pydantic ValidationError as a :class:`Problem`, in the order of the schema, without doubles."""
    found: dict[tuple[str, str], Problem] = {}
    items = error.errors(include_url=False)
    for item in items if len(items) <= _MOST else items[: _MOST - 1]:
        path, models, field, annotation = _walk(root, item["loc"])
        kind, context, raw = item["type"], item.get("ctx", {}), item.get("input", _MISSING)
        accepted = accepted_by(field) if field is not None else describe(annotation) if annotation is not None else ""
        if kind == "firn":
            for name, reason, expected in context["problems"]:
                dot = "" if not path or not name or name.startswith("[") else "."
                problem = Problem(f"{path}{dot}{name}", _cut(reason), _cut(expected))
                found.setdefault((problem.path, problem.reason), problem)
            continue
        if kind == "extra_forbidden":
            problem = _unknown(root, path, models)
        elif kind == "missing":
            problem = Problem(path, "missing", accepted)
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            key = str(context.get("discriminator", "")).strip("'")
            tags = [tag for model in _models(annotation) for tag in typing.get_args(model.model_fields[key].annotation)]
            given = raw.get(key, _MISSING) if isinstance(raw, Mapping) else _MISSING
            reason = "missing" if given is _MISSING else f"{_value(given)} isn't known"
            close = nearest(str(given), tags) if given is not _MISSING else None
            hint = f"did you mean {close}?" if close else ""
            problem = Problem(f"{path}.{key}", reason, f"one of {', '.join(tags)}", hint)
        else:
            reason = (
                f"{_value(raw)} isn't accepted" if kind != "value_error" else str(context.get("error", item["msg"]))
            )
            close = nearest(raw, accepted.removeprefix("one of ").split(", ")) if isinstance(raw, str) else None
            problem = Problem(path, reason, accepted or item["msg"], f"did you mean {close}?" if close else "")
        found.setdefault((problem.path, problem.reason), problem)
    if len(items) > _MOST:
        found["", ""] = Problem("", f"and {len(items) - _MOST + 1} more errors")
    return list(found.values())
