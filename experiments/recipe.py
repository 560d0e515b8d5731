"""Recipes: YAML files with a configuration, found by name or path, changed by ``key=value`` overrides.

YAML is read safely (no objects), with two corrections of its habits: ``1e-3`` is a number, and a repeated key is an
error instead of the last one winning. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from avalanche_firn.experiments.config import Config, validate
from avalanche_firn.experiments.errors import ConfigError, Problem, known_keys, nearest
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
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with ``1e-3`` as a number and repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"repeated key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe: its name, file and one-line description."""

    name: str
    path: Path
    description: str


def parse(text: str, *, source: str = "") -> Any:
    """The plain values of a YAML text; ConfigError with line and column where it isn't YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        what = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(Problem("", f"not valid YAML: {what}{where}"), source=source) from None


def dump(value: Any) -> str:
    """YAML text of plain values or of a configuration, keys in order."""
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


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
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    close = nearest(path.stem, shipped)
    reason = f"no recipe {text!r}: neither a shipped name nor a file"
    accepted = f"one of {', '.join(shipped)}, or the path of a YAML file"
    raise ConfigError(Problem("", reason, accepted, f"did you mean {close}?" if close else ""))


def read_recipe(source: str | Path) -> str:
    """The text of a recipe; ConfigError when it can't be found or read."""
    path = find_recipe(source)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def copy_recipe(name: str, target: str | Path | None = None) -> Path:
    """Copy a recipe to `target` (a file or a folder; default NAME.yaml here), never over an existing file.

    The copy is named after its file, so that its runs don't end in the folder of the original.
    """
    path = find_recipe(name)
    destination = Path(target) if target is not None else Path(path.name)
    if destination.is_dir():
        destination = destination / path.name
    if destination.exists():
        raise ConfigError(f"{destination} exists already; give another file name")
    if not destination.parent.is_dir():
        raise ConfigError(f"the folder {destination.parent} doesn't exist")
    text = read_recipe(name)
    if re.fullmatch(LABEL, destination.stem):
        text = re.sub(r"^name:.*$", f"name: {destination.stem}", text, count=1, flags=re.MULTILINE)
    destination.write_text(text, encoding="utf-8")
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
    if step.isdigit():
        if int(step) < len(items):
            return items[int(step)]
        raise ConfigError(Problem(path, f"there are only {len(items)} entries", f"0 to {len(items) - 1}"))
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


def _unshared(value: Any) -> Any:
    """The same values with every list and section its own, where YAML's aliases made several places share one."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Change `raw` in place by one ``a.b=value``; the value is YAML, list items go by index or method label.

    Raises:
        ConfigError: no ``=``, an unknown key, a place that isn't a section.
    """
    path, sign, value = text.partition("=")
    path = path.strip()
    if not sign or not path:
        raise ConfigError(Problem("", f"the override {text!r} has no key=value", "for example training.epochs=3"))
    new = parse(value, source=f"override {text!r}")
    if path == "methods":
        raw["methods"] = _select(raw.get("methods"), new)
        return
    steps = [name or index for name, index in _STEP.findall(path)]
    place: Any = raw
    walked = ""
    for step in steps[:-1]:
        walked = f"{walked}.{step}" if walked else step
        if isinstance(place, list):
            i = place.index(found) if isinstance(found := _item(place, step, walked), str) else None
            if i is not None:  # a bare method name becomes a section that can hold values
                found = place[i] = {"strategy": found}
            place = found
        elif isinstance(place, dict):
            if place.get(step) is None:
                place[step] = {}
            place = place[step]
        if not isinstance(place, dict | list):
            raise ConfigError(Problem(path, f"{walked} is the value {place!r}, it holds no keys", f"{walked}=value"))
    if isinstance(place, list):
        _item(place, steps[-1], path)
        if not steps[-1].isdigit():
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
    raw = _unshared(parse(text, source=str(source)))
    label = f"{source}" + (f" with {', '.join(overrides)}" if overrides else "")
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
