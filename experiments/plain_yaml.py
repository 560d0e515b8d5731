"""YAML as plain values: none of its objects, none of its habits that turn one value into another, and bounded.

Read and written are None, true and false, whole numbers, numbers, texts, lists and sections. Differences from PyYAML's
SafeLoader, so that a value means what it looks like: ``1e-3`` is a number; ``010``, ``1:30`` and ``2024-01-31`` are
texts (YAML 1.1 reads 8, 90 and a date); a repeated key is an error instead of the last one winning; there are no dates,
bytes, sets and merge keys. What is too long, too deep or grows by aliases is refused before it costs anything: 1 MiB of
text, 40 levels, 50,000 values, all our choice. Cost: about 4 ms per kB. Nothing here imports torch.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from avalanche_firn.experiments.errors import ConfigError, Problem
from avalanche_firn.experiments.section_base import unprintable

__all__ = ["MAX_DEPTH", "MAX_LETTERS", "MAX_VALUES", "dump_plain", "parse"]

MAX_LETTERS = 2**20
MAX_DEPTH = 40
MAX_VALUES = 50_000
_DEEP = f"more than {MAX_DEPTH} levels, one inside the other"
_MANY = f"more than {MAX_VALUES:,} values"
_DIGITS = 400  # of a number; Python itself refuses 4,300. Our choice
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$")  # what YAML 1.1 takes for a text
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)$")
_NUMBER = re.compile(
    r"[-+]?([0-9]+(_[0-9]+)*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_BREAKS = re.compile("[\r\x85\u2028\u2029]")  # ends of lines that YAML folds, but for the usual one
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # how JSON, which is YAML too, writes a rare letter
_WORDS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_NOTHING = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """Plain values only."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.nodes = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH or self.nodes > 2 * MAX_VALUES:  # keys are nodes too
            text = _DEEP if self.depth > MAX_DEPTH else _MANY
            reader: Any = self  # whose types aren't known
            raise ConstructorError(None, None, text, reader.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "key: value pairs are expected here", node.start_mark)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool) or not isinstance(key, str | int):
                text = "a key must be a text or a whole number"
                hint = " (yes, no, on, off are true and false: quote them)" if isinstance(key, bool) else ""
                raise ConstructorError(None, None, text + hint, key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"repeated key {_shown(key)}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = _PAIR.sub(_joined, str(self.construct_scalar(node)))
        if (letter := unprintable(text)) is not None:
            raise ConstructorError(None, None, f"the letter {letter} can't stand in a text", node.start_mark)
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > _DIGITS:
            raise ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
        if not _INT.match(text):
            raise ConstructorError(None, None, f"{_shown(text)} is no whole number", node.start_mark)
        plain = text.replace("_", "")
        return int(plain, 10 if re.fullmatch("[-+]?[0-9]+", plain) else 0)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node))
        if len(text) > _DIGITS or not (_NUMBER.match(text) or _INT.match(text)):
            raise ConstructorError(None, None, f"{_shown(text)} is no number", node.start_mark)
        plain = text.replace("_", "").lower()
        return float(plain.replace(".inf", "inf").replace(".nan", "nan") if _NUMBER.match(text) else int(plain, 0))

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node))
        if text.lower() not in _WORDS:
            raise ConstructorError(None, None, f"{_shown(text)} is neither true nor false", node.start_mark)
        return _WORDS[text.lower()]

    def construct_yaml_null(self, node: yaml.ScalarNode) -> None:
        text = str(self.construct_scalar(node))
        if text not in _NOTHING:
            raise ConstructorError(None, None, f"{_shown(text)} isn't null", node.start_mark)


def _joined(pair: re.Match[str]) -> str:
    return pair.group().encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(loader: _Loader, node: yaml.Node) -> Any:
    kind = str(node.tag).removeprefix(_TAG)
    raise ConstructorError(None, None, f"a {kind} isn't accepted; plain values are", node.start_mark)


for _kind in ("str", "int", "float", "bool", "null"):
    _Loader.add_constructor(_TAG + _kind, getattr(_Loader, f"construct_yaml_{_kind}"))
for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(_TAG + _kind, _refuse)
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag in (f"{_TAG}bool", f"{_TAG}null")]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this or PyYAML's own loader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        node = super().represent_str(data)
        if _BREAKS.search(data):
            node.style = '"'
        return node


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.yaml_implicit_resolvers = {key: list(known) for key, known in yaml.SafeDumper.yaml_implicit_resolvers.items()}
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))


def parse(text: str, *, source: str = "") -> Any:
    """The plain values of a YAML text; where aliases share a list or a section, each place has its own.

    Raises:
        ConfigError: with line and column where it isn't YAML, or not of plain values; too long, too deep, too many.
    """
    if len(text) > MAX_LETTERS:
        raise ConfigError(
            Problem("", f"{len(text):,} letters of YAML", f"a text of up to {MAX_LETTERS:,} letters"), source=source
        )
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
        return _Copy().of(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ConfigError(Problem("", f"not valid YAML: {what}{where}"), source=source) from None


class _Copy:
    """A copy without shared parts, whose size is bounded: aliases of aliases grow without bound in a few lines."""

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ConstructorError(None, None, _MANY, None)
        if depth > MAX_DEPTH:
            raise ConstructorError(None, None, _DEEP, None)
        if isinstance(value, dict):
            return {key: self.of(inner, depth + 1) for key, inner in value.items()}
        return [self.of(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def dump_plain(value: Any) -> str:
    """YAML text of plain values, keys in order; :func:`parse` gives the same values again."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
