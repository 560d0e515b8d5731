"""Recipes: YAML files with a configuration, found by name or path, changed by ``key=value`` overrides.

YAML is read as plain values, see :mod:`~avalanche_firn.experiments.plain_yaml`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.errors import ConfigError, Problem, known_keys, nearest
from avalanche_firn.experiments.plain_yaml import MAX_LETTERS, dump_plain, parse
from avalanche_firn.experiments.schema_rules import LABEL
from avalanche_firn.experiments.transfer_config import TransferExperiment, is_transfer, validate_transfer

__all__ = [
    "Recipe",
    "copy_recipe",
    "dump",
    "find_recipe",
    "list_recipes",
    "load_experiment",
    "load_recipe",
    "parse",
    "read_recipe",
]

_FOLDER = Path(__file__).parent / "recipes"
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]{1,9})\]")
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[0-9]{1,9}\])*")
_SHOWN = 200  # letters of overrides in front of a message


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe: its name, file and one-line description."""

    name: str
    path: Path
    description: str


def dump(value: Any) -> str:
    """YAML text of plain values or of a configuration, keys in order."""
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    return dump_plain(plain)


def list_recipes() -> list[Recipe]:
    """The shipped recipes, by name."""
    found = []
    for path in sorted(_FOLDER.glob("*.yaml")):
        raw = parse(path.read_text(encoding="utf-8"), source=path.name)
        found.append(Recipe(path.stem, path, str(raw.get("description", ""))))
    return found


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: a shipped recipe's name, or the path of a YAML file.

    Raises:
        ConfigError: there is neither.
    """
    shipped = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    text = str(source)
    if text in shipped:
        return shipped[text]
    path = Path(source)
    try:
        if path.is_file():
            return path
        if path.is_dir() and (path / "config.yaml").is_file():
            return path / "config.yaml"
    except (OSError, ValueError) as error:  # a name that is too long, or none
        raise ConfigError(Problem("", f"no recipe {_short(text)}: {error}")) from None
    close = nearest(path.stem, shipped)
    reason = f"no recipe {_short(text)}: neither a shipped name nor a file"
    accepted = f"one of {', '.join(shipped)}, or the path of a YAML file"
    raise ConfigError(Problem("", reason, accepted, f"did you mean {close}?" if close else ""))


def read_recipe(source: str | Path) -> str:
    """The text of a recipe; ConfigError when it can't be found or read."""
    path = find_recipe(source)
    try:
        size = path.stat().st_size
        if size > 4 * MAX_LETTERS:
            raise ConfigError(f"{path} has {size:,} bytes; a recipe has up to {4 * MAX_LETTERS:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def copy_recipe(name: str, target: str | Path | None = None) -> Path:
    """Copy a recipe to `target` (a file or a folder; default NAME.yaml here), never over an existing file.

    The copy is named after its file, so that its runs don't end in the folder of the original.
    """
    path = find_recipe(name)
    destination = Path(target) if target is not None else Path(path.name)
    text = read_recipe(name)
    try:
        if destination.is_dir():
            destination = destination / path.name
        if destination.exists() or destination.is_symlink():
            raise ConfigError(f"{destination} exists already; give another file name")
        if not destination.parent.is_dir():
            raise ConfigError(f"the folder {destination.parent} doesn't exist")
        if re.fullmatch(LABEL, destination.stem):
            text = re.sub(r"^name:.*$", f"name: {dump(destination.stem).split()[0]}", text, count=1, flags=re.MULTILINE)
        with destination.open("x", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{_short(str(destination))} can't be written: {error}") from None
    return destination


# --- overrides ------------------------------------------------------------------------------------------------------


def _unknown(path: str, known: Iterable[str]) -> Problem:
    known = list(known)
    plain = re.sub(r"\[\d+\]", "[]", path)
    plain = re.sub(r"^methods\.[^.]+", "methods[]", plain)
    leaf = [key for key in known if key.rpartition(".")[2] == plain.rpartition(".")[2]]
    close = nearest(plain, known) or (leaf[0] if leaf else None)
    method = re.match(r"methods(\[\d+\]|\.[^.]+)", path)
    if close and method:
        close = close.replace("methods[]", method.group(0))
    return Problem(path, "unknown key", "a key of firn recipes keys", f"did you mean {close}?" if close else "")


def _item(items: list[Any], step: str, path: str) -> Any:
    """A list item by its index or, for methods, by its label."""
    if _is_index(step):
        if int(step) < len(items):
            return items[int(step)]
        accepted = f"0 to {len(items) - 1}" if items else "the whole list"
        raise ConfigError(Problem(path, f"there are only {len(items)} entries", accepted))
    labels = [str(i.get("name", i.get("strategy", ""))) if isinstance(i, dict) else str(i) for i in items]
    if step in labels:
        return items[labels.index(step)]
    close = nearest(step, labels)
    hint = f"did you mean {close}?" if close else ""
    raise ConfigError(Problem(path, f"no entry is called {step!r}", f"one of {', '.join(labels)}", hint))


def _select(items: Any, wanted: Any) -> Any:
    """`methods=[a, b]` picks methods of the recipe by label; a name the recipe lacks stays for the schema to judge."""
    if isinstance(wanted, str):
        wanted = [part.strip() for part in wanted.split(",")]
    if not (isinstance(items, list) and isinstance(wanted, list)):
        return wanted
    labelled = {str(i.get("name", i.get("strategy"))): i for i in items if isinstance(i, dict)}
    return [labelled.get(w, w) if isinstance(w, str) else w for w in wanted]


def _is_index(step: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", step) is not None


def _refuse_number(place: Any, numbered: bool, walked: str, path: str) -> None:
    """``a[0]`` asks for a list."""
    if numbered and not isinstance(place, list):
        raise ConfigError(Problem(path, f"{walked} isn't a list, which [...] counts in", f"{walked}.KEY=value"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Change `raw` in place by one ``a.b=value``; the value is YAML, list items go by index or method label.

    Raises:
        ConfigError: no ``=``, an unknown key, a place that isn't a section.
    """
    path, sign, value = text.partition("=")
    path = path.strip()
    if not sign or not _PATH.fullmatch(path):
        raise ConfigError(Problem("", f"the override {_short(text)} has no key=value", "for example training.epochs=3"))
    new = parse(value, source=f"override {_short(text)}")
    if path == "methods":
        raw["methods"] = _select(raw.get("methods"), new)
        return
    steps = [name or index for name, index in _STEP.findall(path)]
    numbered = [bool(index) for _, index in _STEP.findall(path)]
    place: Any = raw
    walked = ""
    for i, step in enumerate(steps[:-1]):
        _refuse_number(place, numbered[i], walked, path)
        walked = f"{walked}.{step}" if walked else step
        if isinstance(place, list):
            found = _item(place, step, walked)
            if isinstance(found, str):  # a bare method name becomes a section that can hold values
                n = int(step) if _is_index(step) else place.index(found)
                found = place[n] = {"strategy": found}
            place = found
        elif isinstance(place, dict):
            if place.get(step) is None:
                place[step] = {}
            place = place[step]
        if not isinstance(place, dict | list):
            reason = f"{walked} is the value {_short(place)}, it holds no keys"
            raise ConfigError(Problem(path, reason, f"{walked}=value"))
    _refuse_number(place, numbered[-1], walked, path)
    if isinstance(place, list):
        _item(place, steps[-1], path)
        if not _is_index(steps[-1]):
            raise ConfigError(Problem(path, "a method isn't a single value", f"{path}.KEY=value"))
        place[int(steps[-1])] = new
    else:
        place[steps[-1]] = new


def _check_keys(overrides: Iterable[str], schema: type[BaseModel]) -> list[Problem]:
    """Overrides whose key the schema doesn't know at all, before anything is changed."""
    known = known_keys(schema)
    free = ("stream.arguments.", "network.arguments.")
    problems = []
    for text in overrides:
        path = text.partition("=")[0].strip()
        plain = re.sub(r"\[\d+\]", "[]", path)
        plain = re.sub(r"^methods\.[^.]+", "methods[]", plain)
        plain = re.sub(r"^(seeds|stream\.\w+|data\.\w+|training\.schedule\.milestones)\.\d+$", r"\1[]", plain)
        if "=" in text and plain.removesuffix("[]") not in known and not plain.startswith(free):
            problems.append(_unknown(path, known))
    return problems


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The validated configuration of a comparison on a stream, see :func:`load_experiment`.

    Raises:
        ConfigError: also a recipe of a transfer experiment.
    """
    config = load_experiment(source, overrides)
    if isinstance(config, TransferExperiment):
        raise ConfigError(Problem("experiment", "transfer isn't accepted here", "a comparison on a stream"))
    return config


def load_experiment(source: str | Path, overrides: Iterable[str] = ()) -> Config | TransferExperiment:
    """The validated configuration of a recipe (shipped name or file) with `overrides` (``a.b=value``) applied.

    Raises:
        ConfigError: no such recipe, not YAML, or any wrong value or override, all together.
    """
    overrides = list(overrides)
    text = read_recipe(source)
    raw = parse(text, source=str(source))
    told = ", ".join(overrides)
    told = told if len(told) <= _SHOWN else f"{told[: _SHOWN - 3]}..."
    label = f"{source}" + (f" with {told}" if overrides else "")
    if not isinstance(raw, dict):
        return validate(raw, source=label)
    transfer = is_transfer(raw)
    problems = _check_keys(overrides, TransferExperiment if transfer else Config)
    unknown = {problem.path for problem in problems}
    for override in overrides:
        if override.partition("=")[0].strip() in unknown:
            continue
        try:
            apply_override(raw, override)
        except ConfigError as error:
            problems += error.problems
    try:
        config = validate_transfer(raw, source=label) if transfer else validate(raw, source=label)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source=label) from None
    if problems:
        raise ConfigError(problems, source=label)
    return config
