"""What the fuzz tests draw: wrong values, mutated recipes and texts, command lines, sections that are right by type.

Everything is drawn by hypothesis with fixed seeds, so a failing case is shrunk and comes again.
"""

from __future__ import annotations

import copy
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from avalanche_firn.experiments.recipe import list_recipes, parse

# ----------------------------------------------------------------------- values
NUMBERS = [
    True, False, 0, 1, -1, 2, 3, 7, 10, 255, 256, 4096, -(2**31), 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    10**40, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -0.1, 0.999999, 1e-300, 5e-324, 1e300, 1.7976931348623157e308,
    float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "\t", "0", "1", "1e3", "1e-3", "010", "0x10", "1_000", "1:30", "12e45", "on", "off", "yes", "no", "null",
    "~", "true", ".inf", ".nan", "2024-01-31", "naive", "slca", "SLCA", "digits", "auto", "cpu",
    "cuda:99999999999999999", "none", "all", "../../x", "/etc/passwd", "~/x", "~nobody/x", "$HOME", "$(touch x)",
    "`id`", "; rm -rf x", "a|b", "*", "&a", "*a", "!!python/object/apply:os.system [id]", "!tag", "%", "@", "a: b",
    "- a", "#", "'", '"', "\\", "\n", "a\nb", "\r\n", "\0", "a\0b", "\x1b[31m", "\x7f", "\u0085", "\u2028", "\u202e",
    "\ufeff", "\ud800", "é", "e\u0301", "日本", "😀",
    "a" * 300, "a/" * 200, "x" * 70_000, "CON", "nul.txt", "COM1", "a.",
    "a ", ".", "..", ".hidden", "-x", "--output", "summary", "Summary", "config.yaml", "seed-0", "hf-hub:no/such",
    "local-dir:/no/such", "vit_firn_32", "convnet_28", "resnet18", "<script>", "{{x}}", "%s%n", "a=b",
]  # fmt: skip


def _deep(kind: str) -> Any:
    value: Any = 1
    for _ in range(200):
        value = [value] if kind == "list" else {"a": value}
    return value


CONTAINERS: list[Any] = [
    [], {}, [None], [[]], [{}], {"": 1}, {"a": None}, {1: 2}, {None: 1}, {1.5: 2}, {True: 1}, [1, "a", None, 2.5],
    [0] * 300, [1, 1], ["a", "A"], {"name": "digits"}, {"strategy": "naive"}, {"strategy": ["naive"]},
    {"strategy": {"a": 1}}, {"name": []}, {"lr": 0.1}, {"epochs": 1}, _deep("list"), _deep("dict"),
    [{"strategy": "naive"}, {"strategy": "naive"}], {"name": "sgd", "momentum": 0.9}, {"name": "cosine"},
]  # fmt: skip
PLAIN = [None, *NUMBERS, *TEXTS, *CONTAINERS]
values = st.sampled_from(PLAIN).map(copy.deepcopy) | st.integers() | st.floats() | st.text(max_size=12)

# the same with dates, sets and bytes, which YAML has and a configuration hasn't
TAGGED = [
    "2024-01-31", "2024-13-45", "!!timestamp x", "!!binary AAAA", "!!binary =", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x", "!!str [a]", "!!map [a]",
    "!!seq {a: 1}", "!!python/name:os.system", "!!python/object/apply:os.system [id]", "!x y", "! y",
    "!<tag:a,2000:b> y", "190:20:30", "190:20:30.5", "010", "0o17", "0b11", "0x1F", "1_000", "+1", "-.inf", "1.", ".5",
    "1e3", "1E+3", "9" * 5000, "0x" + "f" * 5000, "1e99999", "? !!set {a} : 1", "{? [a]: 1}", "{? {a: 1} : 1}",
    "{.nan: 1, .nan: 2}", "=", "<<", "{<<: {a: 1}}", "{<<: 1}", "&a [*a]", "&a {b: *a}", "*nowhere", "&a 1",
    "|\n  text", ">\n  text", "[", "{", "]", "}", "[1, 2", '"abc', "'abc", '"\\ud800"', '"\\x00"', '"\\q"', "\tx",
    "a\tb", "@x", "`x`", "%x", "- - - 1", "?", ":", "-",
]  # fmt: skip


# ---------------------------------------------------------------------- recipes
@functools.cache
def recipes() -> dict[str, Any]:
    """The shipped recipes as plain values."""
    return {recipe.name: parse(recipe.path.read_text(encoding="utf-8")) for recipe in list_recipes()}


@functools.cache
def all_keys() -> list[str]:
    """Every key that stands anywhere in a recipe."""
    return sorted({str(path[-1]) for raw in recipes().values() for path in places(raw) if isinstance(path[-1], str)})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    return functools.reduce(lambda inner, key: inner[key], path, value)


ACTIONS = ("replace",) * 2 + ("number",) * 3 + ("delete", "rename", "add", "copy", "double")


@st.composite
def mutated_recipes(draw: Callable[..., Any], names: tuple[str, ...] = ()) -> Any:
    """A shipped recipe with one to three things changed."""
    raw = copy.deepcopy(recipes()[draw(st.sampled_from(names or sorted(recipes())))])
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        found = places(raw)
        path = draw(st.sampled_from(found)) if found else ()
        if not path:
            return draw(values)
        holder, key = at(raw, path[:-1]), path[-1]
        action = draw(
            st.sampled_from(
                ("replace", "replace", "number", "number", "number", "delete", "rename", "add", "copy", "double")
            )
        )
        if action == "replace":
            holder[key] = draw(values)
        elif action == "number":
            holder[key] = _changed(holder[key], draw(st.integers(0, 9)))
        elif action == "delete":
            del holder[key]
        elif action == "copy":
            holder[key] = copy.deepcopy(at(raw, draw(st.sampled_from(found))))
        elif action == "double" and isinstance(holder, list):
            holder.insert(key, _other_case(holder[key]) if draw(st.booleans()) else copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            name = draw(
                st.sampled_from(all_keys()) | st.sampled_from(["", "Name", "naem", 0, None, "a.b", "a[0]", "\0"])
            )
            holder[name] = holder.pop(key) if action == "rename" else draw(values)
    return raw


def _changed(value: Any, how: int) -> Any:
    """A neighbour of a value: beyond a bound, of another type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ways: list[Callable[[Any], Any]] = [
        lambda v: v + 1 if number else not v,
        lambda v: v - 1 if number else [v],
        lambda v: -v if number else {"a": v},
        lambda v: v * 1000 if number else str(v).upper(),
        lambda v: v / 1000 if number else f" {v}",
        lambda v: float(v) if number else f"{v} ",
        lambda v: int(v) if number else f"{v}x",
        lambda v: str(v),
        lambda v: bool(v),
        lambda v: [v, v],
    ]
    return ways[how](value)


def _other_case(value: Any) -> Any:
    """The same method with its label in capitals."""
    if isinstance(value, dict) and isinstance(label := value.get("name", value.get("strategy")), str):
        return {**copy.deepcopy(value), "name": label.upper()}
    return value.upper() if isinstance(value, str) else value


def as_yaml(value: Any) -> bytes:
    """The text of plain values, whatever they are."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=False)).encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------ texts
@st.composite
def raw_texts(draw: Callable[..., Any]) -> bytes:
    """The file of a recipe with its bytes changed, or something else altogether."""
    name = draw(st.sampled_from(("digits", "zapping_digits", "slca_plus_plus_cifar100", "all_digits")))
    text = as_yaml(recipes()[name])
    kind = draw(st.integers(0, 11))
    place = draw(st.integers(0, len(text)))
    if kind == 0:
        return bytes(draw(st.binary(max_size=200)))
    if kind == 1:
        return text[:place]
    if kind == 2:
        return text[:place] + draw(st.binary(min_size=1, max_size=8)) + text[place:]
    if kind == 3:
        return text[:place] + text[place + draw(st.integers(1, 40)) :]
    if kind == 4:  # a value replaced by something that only YAML has
        lines = text.splitlines()
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = lines[number].partition(b":")[0] + b": " + draw(st.sampled_from(TAGGED)).encode()
        return b"\n".join(lines)
    if kind == 5:
        line = draw(st.sampled_from(text.splitlines()))
        return text + line + b"\n"
    if kind == 6:
        return draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b"---\n", b"%YAML 1.2\n---\n", b"# \xff\n"))) + text
    if kind == 7:
        return text.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r", b"\n\n", b"\n\t", b"\n...\n", b"\n---\n"))))
    if kind == 8:
        encoding = draw(st.sampled_from(("utf-16", "utf-32", "utf-7", "cp037", "shift_jis")))
        return text.decode().encode(encoding)
    if kind == 9:
        return text + b"x: " + draw(st.sampled_from(BOMBS))
    if kind == 10:
        return draw(st.sampled_from(BOMBS))
    return text + draw(st.sampled_from(all_keys())).encode() + b": " + draw(st.sampled_from(TAGGED)).encode() + b"\n"


def laughs(depth: int, width: int) -> bytes:
    """A billion laughs: lists of aliases of lists of aliases."""
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines).encode()


BOMBS = (
    laughs(9, 9),
    laughs(30, 2),
    b"methods: &m [" + b"{strategy: naive}, " * 20 + b"]\nseeds: *m\nx: [*m, *m, *m]",
    b"[" * 5000,
    b"{a: " * 5000,
    b"- " * 2000 + b"a",
    b"[" * 900 + b"]" * 900,
    b"? " * 500 + b"a",
    b"&a [*a, *a]",
    b"&a {a: *a}",
    b"x: '" + b"y" * 200_000 + b"'",
    b"[" + b"1," * 60_000 + b"]",
    b"\n".join(b"k%d: 1" % i for i in range(5000)),
    b"\t\n\t",
    b"\0" * 100,
    b"a: b: c",
    b"x: " + b"9" * 100_000,
)


# ---------------------------------------------------------------- command lines
ODD_KEYS = [
    "", ".", "[0]", "training.", ".x", "a..b", "seeds[0]", "seeds[9]", "seeds[-1]", "seeds[²]", "seeds[٣]", "methods",
    "methods.", "methods[0]", "methods[99]", "methods.slca.x", "methods.²", "training[0].epochs", "stream.arguments.",
    "stream.arguments.a.b", "stream.arguments.a[0]", "network.arguments.x", f"seeds[{'9' * 5000}]", "output", "name",
    "é", "training.epochs ", " training.epochs", "training.optimizer", "evaluation.probes[0].adapt", "seed", "method",
    "data.pretrain[0]", "checkpoint.every", "performance.accumulate", "targets", "__class__", "backbone.name",
]  # fmt: skip


@st.composite
def overrides(draw: Callable[..., Any], recipe: str) -> str:
    """One ``key=value`` for a recipe, near what is right."""
    raw = recipes()[recipe]
    found = [_dotted(path, draw(st.booleans()), raw) for path in [draw(st.sampled_from(places(raw)))]]
    key = draw(st.sampled_from(found) | st.sampled_from(ODD_KEYS))
    sign = draw(st.sampled_from(("=", "=", "=", "=", "=", "", "==", " = ", ":=")))
    text = draw(st.sampled_from(TAGGED) | st.sampled_from(PLAIN).map(_flow) | st.text(max_size=6))
    return f"{key}{sign}{text}".replace("\0", "\\0")  # no system passes a NUL in a command line


def _dotted(path: tuple[Any, ...], by_label: bool, raw: Any) -> str:
    text = ""
    for i, step in enumerate(path):
        if isinstance(step, int):
            inner = at(raw, path[: i + 1])
            label = inner.get("name", inner.get("strategy")) if isinstance(inner, dict) else None
            text += f".{label}" if by_label and label else f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text


def _flow(value: Any) -> str:
    text = str(yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True))
    return text.removesuffix("\n").removesuffix("\n...")


# ---------------------------------------------------------------- right sections
def right(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values that a field accepts by its type and bounds, small ones and those at the bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        flat = [m for item in arguments[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return right(arguments[0], (*flat, *metadata))
    if origin in (typing.Union, types.UnionType):
        return st.one_of([right(part, metadata) for part in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(right(arguments[0]), min_size=1, max_size=2)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.sampled_from(["attn.qkv", "mlp.fc1", "blocks.0", "x"])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return right_section(annotation)
    low = max([m.ge for m in metadata if isinstance(m, Ge)] + [m.gt for m in metadata if isinstance(m, Gt)], default=0)
    high = min([m.le for m in metadata if isinstance(m, Le)] + [m.lt for m in metadata if isinstance(m, Lt)], default=8)
    if annotation is int:
        return st.integers(int(low), int(min(high, low + 8)))
    numbers = [low, low + 1e-6, 0.01, 0.5, 1.0, high, high - 1e-6, 100.0, 1e6]
    open_low, open_high = (any(isinstance(m, kind) for m in metadata) for kind in (Gt, Lt))
    bounded_above = any(isinstance(m, Le | Lt) for m in metadata)
    inside = [
        float(n)
        for n in numbers
        if (n > low or (n == low and not open_low)) and (not bounded_above or n < high or (n == high and not open_high))
    ]
    return st.sampled_from(sorted(set(inside)))


@st.composite
def right_section(draw: Callable[..., Any], model: type[BaseModel]) -> dict[str, Any]:
    """A section with up to three of its fields set to values that each by itself is accepted."""
    fields = {name: field for name, field in model.model_fields.items() if name != "name" or not field.is_required()}
    needed = {name for name, field in fields.items() if field.is_required()}
    chosen = draw(st.sets(st.sampled_from(sorted(fields)), max_size=3)) if fields else set()
    names = sorted(needed | chosen)
    return {name: draw(right(fields[name].annotation, tuple(fields[name].metadata))) for name in names}


def parts(cases: int, quick: int, lots: int) -> list[Any]:
    """Parameters ``part`` and ``cases``: `quick` cases always, and `cases` in `lots` parts with --slow."""
    slow = [pytest.param(n + 1, -(-cases // lots), marks=pytest.mark.slow) for n in range(lots)]
    return [pytest.param(0, quick), *slow]
