"""Thousands of wrong, odd and right configurations: each is answered in words or is what was asked for.

Status 0 or 2 and nothing else; no traceback; on 2 a message that names the file or the override, and nothing written;
on 0 a configuration that holds every given value, is dumped and read again with the same digest, and is finite. Each
fault that was found here has a test with its name in the second half. ``--slow`` runs all 5,000 and more cases.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))
import fuzz_calls as calls
import fuzz_cases as fuzz

from avalanche_firn.experiments.config import Config, MethodConfig, validate
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, load_experiment, parse
from avalanche_firn.experiments.transfer_config import TransferExperiment, is_transfer, validate_transfer

SECONDS = 2.0  # of the processor for one call; a call takes 0.02 to 0.1
PER_LETTER = 3e-5  # seconds for YAML, which is read at 4 ms per kB
COMMANDS = (("check", "--no-data"), ("check", "--no-data"), ("check", "--no-data"), ("run",), ("compare",), ("check",))


class Arena:
    """A folder to call ``firn`` in, and what every call is judged by."""

    def __init__(self, folder: Path, seen: dict[str, Any]) -> None:
        self.folder, self.seen = folder, seen
        self.statuses: Counter[int] = Counter()
        self.count = 0

    def judge(self, words: list[str], sources: list[str], asked: Any = None, letters: int = 0) -> calls.Outcome:
        """Call and assert what must hold of any call; `asked` are the values that were given in a file."""
        before = calls.snapshot(self.folder)
        self.seen.clear()
        found = calls.call(*words)
        self.count += 1
        self.statuses[found.status] += 1
        if found.escaped is not None:
            raise AssertionError(f"{words}: {found.escaped!r} reached the user") from found.escaped
        assert "Traceback (most recent call last)" not in found.err + found.out, found.err[-2000:]
        assert found.seconds < SECONDS + letters * PER_LETTER, f"{words} took {found.seconds:.1f} s"
        assert found.status in (0, 2), found.err
        if found.status == 2:
            assert calls.snapshot(self.folder) == before, "something was written"
            assert named(found.err, sources), found.err[:2000]
        else:
            self.meant(words, asked)
            for path in set(calls.snapshot(self.folder)) - set(before):
                assert path.split("/")[-1] == "config.yaml" or (self.folder / path).is_dir(), path
        if self.count % 7 == 0 and found.status == 2:
            assert calls.call(*words).answer == found.answer, "another answer to the same call"
        for path in sorted(set(calls.snapshot(self.folder)) - set(before), reverse=True):
            where = self.folder / path
            where.rmdir() if where.is_dir() and not where.is_symlink() else where.unlink()
        return found

    def meant(self, words: list[str], asked: Any) -> None:
        """What was accepted is what was asked for, and can be written down."""
        given = [word for word in words[1:] if "=" in word and not word.startswith(("method=", "seed=", "--"))]
        source = next(word for word in words[1:] if "=" not in word and not word.startswith("--"))
        config = load_experiment(source, given)
        assert_stored(config)
        values = config.model_dump()
        if asked is not None:
            assert_holds(values, asked, "")
        assert_overrides(values, given)
        if "config" in self.seen:  # what would have been trained, and what was written
            trained = self.seen["config"]
            single = config.single(trained.methods[0].name, trained.seeds[0]) if words[0] == "run" else config
            assert trained.digest() == single.digest() and trained.output == config.output


def named(message: str, sources: list[str]) -> bool:
    """Whether a message says where the mistake is: the file, the override or the section."""
    keys = "|".join([*Config.model_fields, *TransferExperiment.model_fields, "method", "seed"])
    told = re.search(rf"(firn: wrong configuration: |\n  )({keys})[a-z_.\[\]0-9]*: ", message)
    return told is not None or "usage: firn" in message or any(source in message for source in sources)


def assert_stored(config: Any) -> None:
    """Dumped and read again it is the same experiment; every number is finite."""
    read = parse(dump(config))
    again = validate_transfer(read) if is_transfer(read) else validate(read)
    assert again == config and again.digest() == config.digest()
    for path in fuzz.places(config.model_dump()):
        value = fuzz.at(config.model_dump(include={path[0]}), path)
        if isinstance(value, float):
            assert math.isfinite(value) and math.copysign(1, value or 1.0) == (1 if value >= 0 else -1), path


def assert_holds(values: Any, asked: Any, path: str) -> None:
    """Every value of `asked` stands at its place in `values`."""
    if isinstance(asked, dict) and isinstance(values, dict):
        for key, value in asked.items():
            assert key in values, f"{path}.{key} is gone"
            assert_holds(values[key], value, f"{path}.{key}")
    elif isinstance(asked, list) and isinstance(values, list):
        assert len(asked) == len(values), path
        for i, (inner, value) in enumerate(zip(values, asked, strict=True)):
            assert_holds(inner, value, f"{path}[{i}]")
    elif isinstance(asked, str) and isinstance(values, dict) and path.startswith(".methods["):
        assert values["strategy"] == asked
    elif asked is False and path in (".performance.memory", ".performance.fused_optimizer"):
        assert values == "off"  # what YAML makes of a bare off
    elif asked is True and path == ".performance.fused_optimizer":
        assert values == "on"
    else:
        assert values == asked and isinstance(values, bool) == isinstance(asked, bool), f"{path}: {asked!r}, {values!r}"


def assert_overrides(values: dict[str, Any], words: list[str]) -> None:
    """Every override that no later one touches has its value."""
    keys = [word.partition("=")[0].strip().replace("[", ".").replace("]", "").split(".") for word in words]
    for i, (key, word) in enumerate(zip(keys, words, strict=True)):
        later = keys[i + 1 :]
        if key[0] == "methods" and (len(key) == 1 or any(k == ["methods"] for k in later)):
            continue
        if any(k[: len(key)] == key or key[: len(k)] == k for k in later):
            continue
        place: Any = values
        for step in key:
            if isinstance(place, list):
                labels = [inner.get("name") if isinstance(inner, dict) else None for inner in place]
                place = place[labels.index(step) if step in labels else int(step)]
            else:
                place = place[step]
        assert_holds(place, parse(word.partition("=")[2]), "." + ".".join(key))


TOLD: Counter[tuple[str, str]] = Counter()
WHAT = "configurations"


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints how many were accepted."""
    with calls.printed(pytestconfig, WHAT, TOLD):
        yield


@pytest.fixture
def arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, record_property: Any
) -> Iterator[Arena]:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    before = TOLD.copy()
    with calls.no_training(tmp_path / "home") as seen:
        yield (found := Arena(tmp_path, seen))
    name = request.function.__name__.removeprefix("test_").replace("_", " ")
    for status, count in found.statuses.items():
        TOLD[name, {0: "accepted", 2: "refused"}.get(status, f"status {status}")] += count
    record_property("fuzzed", calls.told(WHAT, TOLD - before))


TINY = {
    "name": "tiny",
    "device": "cpu",
    "threads": 1,
    "seeds": [0],
    "stream": {"name": "digits", "tasks": 5},
    "training": {"epochs": 1, "batch_size": 4, "eval_batch_size": 64, "optimizer": {"lr": 0.001}},
}
SECTIONS = ("training", "evaluation", "performance", "checkpoint", "backbone")


@st.composite
def right_recipes(draw: Any) -> dict[str, Any]:
    """One method with any of its options, and one of the shared sections with any of its own."""
    method = draw(st.sampled_from(get_args(get_args(MethodConfig)[0])))
    raw = copy.deepcopy(TINY) | {"methods": [draw(fuzz.right_section(method))]}
    section = draw(st.sampled_from(SECTIONS))
    model = Config.model_fields[section].annotation
    given = draw(fuzz.right_section(model))
    if section == "training":
        given["batch_size"] = draw(st.integers(1, 6))
    given.pop("compile", None)  # takes minutes
    raw[section] = {**raw.get(section, {}), **given}
    return raw


# ------------------------------------------------------------------------ fuzzing
@pytest.mark.parametrize(("part", "cases"), fuzz.parts(2400, 60, 4))
def test_recipes_with_things_changed(arena: Arena, part: int, cases: int) -> None:
    def check(raw: Any, command: tuple[str, ...]) -> None:
        file = arena.folder / "case.yaml"
        file.write_bytes(fuzz.as_yaml(raw))
        try:
            asked = parse(file.read_text(encoding="utf-8"))
        except (ConfigError, ValueError):
            asked = None
        arena.judge([command[0], "case.yaml", *command[1:]], ["case.yaml"], asked)

    calls.explore(check, part=part, cases=cases, raw=fuzz.mutated_recipes(), command=st.sampled_from(COMMANDS))
    assert arena.count >= cases and arena.statuses[0] > cases / 40, arena.statuses


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(1200, 25, 2))
def test_texts_that_are_no_recipes(arena: Arena, part: int, cases: int) -> None:
    def check(text: bytes, resumed: bool) -> None:
        folder = arena.folder / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_bytes(text)
        words = ["resume", "run"] if resumed else ["check", "run", "--no-data"]
        arena.judge(words, ["run/config.yaml", "in run"], letters=len(text))

    calls.explore(check, part=part, cases=cases, text=fuzz.raw_texts(), resumed=st.booleans())
    assert arena.count >= cases * 0.9, arena.statuses


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(1600, 45, 3))
def test_command_lines(arena: Arena, part: int, cases: int) -> None:
    def check(data: st.DataObject) -> None:
        recipe = data.draw(st.sampled_from(sorted(fuzz.recipes())))
        words = data.draw(st.lists(fuzz.overrides(recipe), min_size=1, max_size=3))
        command = data.draw(st.sampled_from(COMMANDS))
        arena.judge([command[0], recipe, *words, *command[1:]], [recipe, *words])

    calls.explore(check, part=part, cases=cases, data=st.data())
    assert arena.count >= cases, arena.statuses


PATHS = st.sampled_from(
    [text for text in fuzz.TEXTS if "\0" not in text and "\ud800" not in text and len(text) < 200]
) | (st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8))
LINES = (
    ("report",), ("report", "--json"), ("report", ".", "--output"), ("results",), ("results", ".", "--collect"),
    ("resume",), ("dashboard", "--no-browser"), ("export", "--format", "timm"),
    ("export", ".", "--format", "timm", "--output"), ("recipes", "show"), ("recipes", "copy", "digits"),
    ("recipes", "copy"), ("check",), ("check", "--no-data"), ("run", "digits", "method=naive", "--output"),
    ("compare", "digits", "--output"), ("compare", "--json", "digits", "--output"), ("run", "digits"), ("recipes",),
    ("resume", "."), (), ("compare", "--print-commands"), ("compare", "digits", "--on"),
    ("resume", ".", "--on"), ("run", "digits", "method=naive", "--directory"),
)  # fmt: skip


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(600, 30, 1))
def test_paths_of_all_commands(arena: Arena, part: int, cases: int) -> None:
    """Any text where a path is expected; an output is the folder that was asked for, letter by letter."""

    def check(line: tuple[str, ...], path: str) -> None:
        before = calls.snapshot(arena.folder)
        arena.seen.clear()
        found = calls.call(*line, path)
        arena.count += 1
        arena.statuses[found.status] += 1
        if found.escaped is not None:
            raise AssertionError(f"{line} {path!r}: {found.escaped!r} reached the user") from found.escaped
        assert "Traceback (most recent call last)" not in found.err + found.out, found.err[-2000:]
        assert found.status in (0, 1, 2), found.err
        written = set(calls.snapshot(arena.folder)) - set(before)
        assert not written or found.status == 0, written
        if found.status == 0 and line[-1:] == ("--output",):
            assert arena.seen["config"].output == path
        for name in sorted(written, reverse=True):
            where = arena.folder / name
            where.rmdir() if where.is_dir() and not where.is_symlink() else where.unlink()

    calls.explore(check, part=part, cases=cases, line=st.sampled_from(LINES), path=PATHS)


@pytest.mark.parametrize(("part", "cases"), fuzz.parts(240, 4, 2))
def test_what_is_accepted_runs(arena: Arena, part: int, cases: int) -> None:
    """Two steps in each of two tasks: what the schema accepts trains, or is refused in words."""

    def check(raw: dict[str, Any]) -> None:
        file = arena.folder / "case.yaml"
        file.write_bytes(fuzz.as_yaml(raw))
        found = calls.call("check", "case.yaml", "--no-data", "--dry-run")
        arena.count += 1
        arena.statuses[found.status] += 1
        if found.escaped is not None:
            raise AssertionError(f"{found.escaped!r} reached the user") from found.escaped
        assert found.status in (0, 1, 2) and "Traceback (most recent call last)" not in found.err, found.err
        assert found.status == 0 or named(found.err, ["case.yaml"]), found.err

    calls.explore(check, part=part, cases=cases, raw=right_recipes())
    assert arena.statuses[0] > cases / 4, arena.statuses


# ------------------------------------------------------------- faults found by it
def refused(*words: str) -> str:
    """The message of a call that must be answered with status 2."""
    found = calls.call(*words)
    assert found.escaped is None and found.status == 2, found
    assert found.seconds < SECONDS
    return found.err


TEXTS_OF_YAML = {
    "levels without end": ("[" * 100_000, "more than 40 levels"),
    "a list that holds itself": ("&a [*a]", "more than 40 levels"),
    "a billion laughs": (fuzz.laughs(10, 10).decode(), "more than 50,000 values"),
    "a megabyte": ("x" * (2**20 + 1), "1,048,577 letters"),
    "a tag that doesn't fit": ("a: !!int x", "no whole number (line 1, column 4)"),
    "a tag for a scalar on a list": ("!!map [a]", "not valid YAML"),
    "a date that isn't one": ("a: !!timestamp x", "not valid YAML"),
    "null that isn't": ("a: !!null x", "'x' isn't null"),
    "thousands of digits": (f"a: {'9' * 5000}", "a number of 5000 digits"),
    "thousands of hexadecimal digits": (f"a: 0x{'f' * 5000}", "a number of 5002 digits"),
    "a set as key": ("? !!set {a}\n: 1", "not valid YAML"),
    "a true key": ("on: 1", "quote them"),
    "a control character": ('a: "\\x1b[31m"', "U+001B can't stand in a text"),
    "half a letter": ('a: "\\ud800"', "U+D800 can't stand in a text"),
}


@pytest.mark.parametrize(("text", "told"), TEXTS_OF_YAML.values(), ids=TEXTS_OF_YAML)
def test_yaml_that_was_not_answered_in_words(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse(text, source="x.yaml")


@pytest.mark.parametrize("text", ["010", "1:30", "190:20:30.5", "2024-01-31", "=", "<<", "0o8", "1_", "+.5e", "NaN"])
def test_yaml_does_not_make_numbers_and_dates_of_texts(text: str) -> None:
    assert parse(text) == text


@pytest.mark.parametrize(
    "value", ["1e-3", "12e45", "010", "2024-01-31", "0o17", "1_000", ".5", "off", "null", "~", "=", "a\u0085b", "é: #"]
)
def test_a_text_that_looks_like_something_else_comes_back(value: str) -> None:
    """A revision such as 12e45 became a number when a run was resumed."""
    assert parse(dump({"a": value, "b": [value]})) == {"a": value, "b": [value]}


OVERRIDES = {
    "index of a letter that is a digit": ("seeds[²]=1", "seeds[²]: unknown key"),
    "index of thousands of digits": (f"seeds[{'9' * 5000}]=1", "has no key=value"),
    "index of a section": ("training[0]=1", "training isn't a list"),
    "nothing after a point": ("stream.arguments.=5", "has no key=value"),
    "more than 64 bits": ("training.epochs=100000000000000000000", "a whole number of 21 digits"),
    "octal": ("training.epochs=010", "'010'"),
    "threads that abort the process": ("threads=1000000", "at most 1024"),
    "processes without end": ("training.num_workers=1000000000", "at most 1024"),
    "batches without end": ("training.batch_size=1000000000000", "at most 1000000"),
    "a name of a device": ("name=con", "can't name a folder everywhere"),
    "a name that ends in a point": ("name=digits.", "can't name a folder everywhere"),
    "a name that is too long": (f"name={'a' * 300}", "a label of 300 letters"),
    "a path that is too long": (f"output={'a' * 300}", "too long for a path"),
    "labels that differ in capitals": (
        "methods=[naive,{strategy: slca, name: Naive}]",
        "['Naive', 'naive'] differ in capitals only",
    ),
    "a label of a file": ("methods=[{strategy: naive, name: config.yaml}]", "config.yaml is reserved"),
    "a reserved label in capitals": ("methods=[{strategy: naive, name: Summary}]", "Summary is reserved"),
    "divisors of a large batch": ("performance.accumulate=7", "a divisor of all batch sizes: 1, 2, 4"),
}


@pytest.mark.parametrize(("word", "told"), OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_that_were_accepted_or_crashed(arena: Arena, word: str, told: str) -> None:
    assert told in refused("check", "digits", word, "--no-data")


def test_divisors_are_not_searched_for_years(arena: Arena) -> None:
    words = ("training.batch_size=999983", "performance.accumulate=7")
    assert "a divisor of all batch sizes: 1" in refused("check", "digits", *words, "--no-data")


def test_minus_zero_is_zero(arena: Arena) -> None:
    one, other = (load_experiment("digits", [f"training.optimizer.weight_decay={zero}"]) for zero in ("-0.0", "0.0"))
    assert one.digest() == other.digest() and "-0.0" not in dump(one)


ARGUMENTS = {
    "not a number": ("{a: .nan}", "stream.arguments.a: nan isn't accepted"),
    "keys of two kinds": ("{a: {0: 1, b: 2}}", "stream.arguments.a: has keys of several kinds"),
    "levels": ("{a: [[[[[[[[[1]]]]]]]]]}", "more than 8 levels"),
    "counts that are none": ("{n_experiences: 5, per_exp_classes: 3}", "stream.arguments.per_exp_classes: 3"),
    "a count that is text": ("{n_experiences: 5, per_exp_classes: {0: x}}", "stream.arguments.per_exp_classes.0: 'x'"),
    "experiences without end": ("{n_experiences: 10000000000}", "1 to 1000000"),
}


@pytest.mark.parametrize(("value", "told"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_other_libraries(arena: Arena, value: str, told: str) -> None:
    words = ("methods=[naive]", f"stream={{name: avalanche, benchmark: SplitMNIST, arguments: {value}}}")
    assert told in refused("check", "digits", *words, "--no-data")


def test_tasks_without_end_take_no_memory(arena: Arena) -> None:
    stream = "stream={name: folder, root: x, tasks: 1000000000, classes: 1000000000}"
    assert "at most 1000000" in refused("check", "digits", stream, "--no-data")


def test_thousands_of_mistakes_make_a_message_that_can_be_read(arena: Arena) -> None:
    words = [f"stream.class_order=[{'x, ' * 5000}x]", f"seeds=[{'-1, ' * 5000}-1]"]
    message = refused("check", "digits", *words, "--no-data")
    assert len(message) < 60_000 and "more errors" in message


def test_repeated_classes_are_found_in_no_time(arena: Arena) -> None:
    order = ", ".join(str(i % 15_000) for i in range(20_000))
    found = calls.call("check", "digits", f"stream.class_order=[{order}]", "--no-data")
    assert (
        found.status == 2
        and "the class ids [0, 1, 2" in found.err
        and len(found.err) < 5000
        and found.seconds < 2 * SECONDS
    )


def test_errors_of_other_libraries_are_told_in_words(arena: Arena) -> None:
    """torchvision raises RuntimeError where a file can't be fetched."""
    root = arena.folder / "data"
    arguments = f"{{n_experiences: 5, dataset_root: {root}}}"
    words = ("methods=[naive]", f"stream={{name: avalanche, benchmark: SplitMNIST, arguments: {arguments}}}")
    assert "wrong configuration: stream: " in refused("check", "digits", *words)


def test_a_rate_that_is_too_large_is_told_by_a_dry_run(arena: Arena) -> None:
    words = ("methods=[slca]", "training.optimizer.lr=1e30", "training.batch_size=4", "stream.tasks=[2,8]")
    assert "methods.slca: on random images: " in refused("check", "digits", *words, "--no-data", "--dry-run")


def test_a_copy_of_a_recipe_never_goes_over_a_file(arena: Arena) -> None:
    (arena.folder / "link.yaml").symlink_to("nowhere.yaml")
    assert "exists already" in refused("recipes", "copy", "digits", "link.yaml")
    assert "File name too long" in refused("recipes", "copy", "digits", f"{'a' * 300}.yaml")
    assert calls.call("recipes", "copy", "digits", "1e5.yaml").status == 0
    assert load_experiment("1e5.yaml").name == "1e5"


@pytest.mark.parametrize("path", ["a\\b", "it's", "a\tb", "é\\n", "😀"])
def test_an_output_is_the_folder_that_was_asked_for(arena: Arena, path: str) -> None:
    assert calls.call("compare", "digits", "--output", path).status == 0
    assert arena.seen["config"].output == path


@pytest.mark.parametrize(
    "line", [("report",), ("results",), ("resume",), ("dashboard",), ("export", "--format", "timm")]
)
def test_a_path_that_is_too_long(arena: Arena, line: tuple[str, ...]) -> None:
    assert "too long" in refused(*line, "a" * 300)
