"""Every tag that the code logs has one meaning, and README names all of them."""

import ast
import re
from pathlib import Path

import pytest

from avalanche_firn.evaluation.vocabulary import VOCABULARY, describe, glossary

ROOT = Path(__file__).parents[2]
TAG = re.compile(r"[a-z][a-z-]*(/[A-Za-z0-9.-]+)+")


FILLED = ("x", "7", "", "-previous", "seconds")  # what may stand in an f-string's place


def logged_tags():
    """Strings that look like tags in modules that publish metrics: file -> alternatives, one of which is a tag."""
    found = []
    for path in [*ROOT.glob("evaluation/*.py"), *ROOT.glob("plugins/*.py"), *ROOT.glob("experiments/*results*.py")]:
        text = path.read_text(encoding="utf-8")
        if "MetricValue(" not in text and "curves" not in text:
            continue
        tree = ast.parse(text)
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if parts[0] is None:  # begins with a prefix that isn't known here
                    continue
                tags = ["".join(fill if part is None else part for part in parts) for fill in FILLED]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                tags = [node.value]
            else:
                continue
            if TAG.fullmatch(tags[0]):
                found.append((path.name, tags))
    return found


def test_every_tag_in_the_code_is_covered():
    found = logged_tags()
    first = {tags[0] for _, tags in found}
    assert {"efficiency/images-per-second", "lorac/frozen", "cila/bound/one-step", "zap/rows", "lr/x"} <= first
    assert [item for item in found if all(describe(tag) is None for tag in item[1])] == []


def test_readme_names_every_pattern():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## What is logged") :]
    table = table[: table.index("\n## ", 5)]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    named = set()
    for row in rows:
        before = ""
        for tag in re.findall(r"`([^`]+)`", row[1]):  # ".../b" after "x/a" is "x/b"
            before = tag.replace("...", before.rpartition("/")[0], 1) if tag.startswith(".../") else tag
            named.add(before)
    whole = {tag for tag in named if not tag.endswith("...")}
    opened = tuple(tag.removesuffix("...") for tag in named if tag.endswith("/..."))
    assert len(named) > 40

    def is_named(pattern):
        above = any(pattern.startswith((f"{tag}/", f"{tag}-")) for tag in whole)
        beside = any(re.sub(r"<[^>]+>", "<x>", tag) == re.sub(r"<[^>]+>", "<x>", pattern) for tag in whole)
        return beside or above or pattern.startswith(opened)

    ours = [m.pattern for m in VOCABULARY if m.pattern[0].islower() and m.pattern not in FALLBACKS]
    assert [pattern for pattern in ours if not is_named(pattern)] == []


# Nets for what may come, the run's text, a tag of the summary itself, a figure that isn't logged over time, and what
# only metrics log that no recipe switches on: no rows of README's table.
FALLBACKS = {"slca/...", "lorac/...", "zap/...", "dynamics/...", "loss/<term>", "config", "continual/accuracy..."}
FALLBACKS |= {"dynamics/forgetting", "phase/<name>", "loss/running"}


@pytest.mark.parametrize(
    ("tag", "pattern", "step", "better"),
    [
        ("accuracy/last", "accuracy/last", "experience", "higher"),
        ("validation/accuracy/last", "accuracy/last", "experience", "higher"),
        ("accuracy/task-12", "accuracy/task-K", "experience", "higher"),
        ("task-il/accuracy/average", "task-il/...", "experience", "higher"),
        ("task-il/forgetting/average", "task-il/forgetting/average", "experience", "lower"),
        ("probe/fine-tune", "probe/<adaptation>", "experience", "higher"),
        ("probe/knn/task-0", "probe/<adaptation>/task-K", "experience", "none"),
        ("probe/knn/forgetting-max-seen", "probe/<adaptation>/forgetting-<kind>", "experience", "lower"),
        ("drift/cka/blocks.3", "drift/cka/<block>", "experience", "higher"),
        ("lr/group-0", "lr/<group>", "iteration", "none"),
        ("loss/train", "loss/train", "iteration", "lower"),
        ("loss/something-new", "loss/<term>", "iteration", "lower"),
        ("cila/bound/chained", "cila/bound/...", "experience", "lower"),
        ("dynamics/update-cosine/past", "dynamics/update-cosine/...", "iteration", "higher"),
        ("transfer/sgd-1/continual", "transfer/<optimizer>/continual", "classes", "higher"),
        ("Loss_Exp/eval_phase/test_stream/Task000/Exp001", "Loss_Exp/...", "iteration", "lower"),
    ],
)
def test_describe(tag, pattern, step, better):
    meaning = describe(tag)
    assert (meaning.pattern, meaning.step, meaning.better) == (pattern, step, better)


def test_unknown_tags_have_no_meaning():
    for tag in ("", "accuracy", "accuracy/task-x", "accuracy/last/more", "mine/own", "probe/"):
        assert describe(tag) is None


def test_glossary_has_each_once_in_the_order_of_the_vocabulary():
    found = glossary(["lr/head", "accuracy/last", "lr/backbone", "mine/own", "validation/accuracy/last"])
    assert [meaning.pattern for meaning in found] == ["accuracy/last", "lr/<group>"]


def test_vocabulary_is_consistent():
    patterns = [meaning.pattern for meaning in VOCABULARY]
    assert len(set(patterns)) == len(patterns)
    for meaning in VOCABULARY:
        assert meaning.definition and not meaning.definition.endswith(".") and meaning.unit
    for place, pattern in enumerate(patterns):  # no pattern is hidden by one before it
        example = pattern.replace("...", "/x" if pattern.startswith("continual") else "x").replace("K", "7")
        example = re.sub(r"<[^>]+>", "x", example)
        assert describe(example) is VOCABULARY[place], example
