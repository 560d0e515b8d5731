"""Splits of names: drawn alike everywhere, written, read back and compared with what is on disk."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.benchmarks import split_lists
from avalanche_firn.benchmarks.split_lists import (
    load_or_draw,
    read_name_lists,
    read_split,
    seeded_split,
    split_digest,
    write_split,
)
from avalanche_firn.benchmarks.streams import StreamError

NAMES = [f"n{c:02d}/{n}.jpg" for c in range(4) for n in range(5)]


# ----------------------------------------------------------------------- draw
def test_the_drawn_split_is_fixed_for_ever():
    """Written down once: NumPy's policy and the sorting keep it, whatever machine and version draws."""
    train, test = seeded_split(NAMES, 0.8, 0)
    assert test == ["n00/0.jpg", "n00/3.jpg", "n02/2.jpg", "n03/0.jpg"] and len(train) == 16
    assert split_digest(train, test) == "e1a3f53640a4dc18b1567730f21cc20cfd3da1ab1da85647679cec15def7c9e1"
    assert seeded_split(NAMES, 0.8, 1)[1] != test


@settings(deadline=None, max_examples=40)
@given(
    names=st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=30),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_split_parts_the_names_whatever_their_order(names, fraction, seed, shuffle):
    ordered = sorted(names)
    turned = list(names)
    shuffle.shuffle(turned)
    if not 0 < round(fraction * len(names)) < len(names):
        with pytest.raises(StreamError, match="leave a part empty"):
            seeded_split(ordered, fraction, seed)
        return
    train, test = seeded_split(ordered, fraction, seed)
    assert sorted(train + test) == ordered and len(train) == round(fraction * len(names))
    assert train == sorted(train) and test == sorted(test)
    assert seeded_split(turned, fraction, seed) == (train, test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.0}, r"fraction is 1\.0; accepted: 0 <"),
        ({"fraction": True}, "fraction is True"),
        ({"seed": -1}, "seed of the split is -1"),
        ({"seed": "1"}, "seed of the split is '1'"),
        ({"names": [*NAMES, NAMES[3]]}, r"names: 'n00/3\.jpg' is there twice"),
        ({"names": ["a"]}, "1 names with fraction 0.5 leave a part empty"),
    ],
)
def test_draws_that_are_refused(change, message):
    with pytest.raises(StreamError, match=message):
        seeded_split(**({"names": NAMES, "fraction": 0.5, "seed": 0} | change))


# ---------------------------------------------------------------------- files
def test_written_and_read_back(tmp_path):
    train, test = seeded_split(NAMES, 0.6, 3)
    write_split(tmp_path / "list.txt", train[::-1], test)
    assert read_split(tmp_path / "list.txt") == (train, test)
    lines = (tmp_path / "list.txt").read_bytes().decode().split("\n")
    assert lines[1] == f"# sha256 {split_digest(train, test)}" and lines[2] == f"train {train[0]}" and lines[-1] == ""
    assert hashlib.sha256("\n".join(lines[2:]).encode()).hexdigest() == lines[1][-64:]  # as sha256sum gives it
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode())  # a checkout under Windows
    assert read_split(tmp_path / "list.txt") == (train, test)


def test_names_with_spaces_and_accents(tmp_path):
    names = ["a b/c d.jpg", "é/ü.jpg", "a/#1.jpg"]
    write_split(tmp_path / "list.txt", names[:2], names[2:])
    assert read_split(tmp_path / "list.txt") == (names[:2], names[2:])


def test_digest_tells_parts_apart_and_not_orders():
    digests = {split_digest(["a", "b"], ["c"]), split_digest(["a"], ["b", "c"]), split_digest(["c"], ["a", "b"])}
    assert len(digests) == 3 and split_digest(["b", "a"], ["c"]) in digests


@pytest.mark.parametrize(
    "name", ["/a/b.jpg", "../b.jpg", "a/../b.jpg", "a\\b.jpg", "a//b.jpg", "a/b.jpg ", "a\nb.jpg", ""]
)
def test_names_that_are_not_written_or_read(tmp_path, name):
    with pytest.raises(StreamError, match=r"test names of .*accepted: a relative path"):
        write_split(tmp_path / "list.txt", ["x/y.jpg"], [name])
    assert not list(tmp_path.iterdir())
    body = f"train x/y.jpg\ntest {name}\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    (tmp_path / "list.txt").write_text(f"# avalanche-firn split 1\n# sha256 {digest}\n{body}")
    with pytest.raises(StreamError, match=r"line [45]"):
        read_split(tmp_path / "list.txt")


def test_files_that_are_not_read(tmp_path):
    path = tmp_path / "list.txt"

    def refused(message, text):
        path.write_text(text)
        with pytest.raises(StreamError, match=message):
            read_split(path)

    with pytest.raises(StreamError, match=r"list\.txt cannot be read"):
        read_split(path)
    write_split(path, ["a/1", "a/2"], ["a/3"])
    text = path.read_text()
    refused(r"starts with \['train a/1'", "train a/1\ntest a/2\n")
    refused(r"starts with \[\]; accepted: '# avalanche-firn split 1'", "")
    refused("starts with", text.replace("split 1", "split 2"))
    refused("its lines have [0-9a-f]{64}; accepted: an unchanged list", text.replace("test a/3", "train a/3"))
    refused("its lines have", text.replace("train a/2\n", ""))
    refused("line 4: 'valid a/2'; accepted: 'train PATH' or 'test PATH'", text.replace("train a/2", "valid a/2"))
    refused("line 6: ''", text + "\n")
    refused(r"list\.txt: 'a/1' is there twice", text.replace("test a/3", "test a/1"))
    with pytest.raises(StreamError, match="'a/1' is there twice"):
        write_split(path, ["a/1"], ["a/1"])


# -------------------------------------------------------------- load or draw
def test_drawn_once_and_then_read(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    expected = seeded_split(NAMES, 0.8, 7)
    turned = random.Random(0).sample(NAMES, len(NAMES))
    assert load_or_draw(path, turned, 0.8, 7) == expected and read_split(path) == expected
    monkeypatch.setattr(split_lists, "seeded_split", lambda *_: pytest.fail("drawn again"))
    assert load_or_draw(path, NAMES, 0.8, 7) == expected
    own = (NAMES[:3], NAMES[3:])  # a list that somebody else published
    write_split(path, *own)
    assert load_or_draw(path, NAMES, 0.8, 7) == own
    with pytest.raises(StreamError, match="seed of the split is -7"):
        load_or_draw(path, NAMES, 0.8, -7)


def test_a_list_must_match_the_names(tmp_path):
    path = tmp_path / "list.txt"
    load_or_draw(path, NAMES, 0.8, 0)
    with pytest.raises(StreamError, match=r"match the images: 1 not on disk \(n03/4\.jpg\); accepted"):
        load_or_draw(path, NAMES[:-1], 0.8, 0)
    more = [*NAMES[1:], *(f"new/{n}" for n in range(5))]
    with pytest.raises(
        StreamError, match=r"1 not on disk .*, 5 on disk and not listed \(new/0, new/1, new/2 and 2 more\)"
    ):
        load_or_draw(path, more, 0.8, 0)


def test_where_nothing_can_be_written_the_split_is_the_same(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "list.txt", tmp_path / "absent" / "list.txt"):
        assert load_or_draw(path, NAMES, 0.8, 2) == seeded_split(NAMES, 0.8, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_no_list(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(split_lists.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_draw(tmp_path / "list.txt", NAMES, 0.8, 2)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------- lists of other projects
def test_lists_of_other_projects(tmp_path):
    train, test = tmp_path / "train.yaml", tmp_path / "test.txt"
    train.write_text("data:\n- data/imagenet-r/n02/b.jpg\n- /home/me/imagenet-r/n01/a_1.jpg\ntargets:\n- 1\n- 0\n")
    test.write_text("# path label\nn01/z 2.jpg 7\nC:\\data\\n01\\k.jpg,3\n\nn02/9.jpg\t\n")
    assert read_name_lists(train, str(test)) == (
        ["n01/a_1.jpg", "n02/b.jpg"],
        ["n01/k.jpg", "n01/z 2.jpg", "n02/9.jpg"],
    )


def test_lists_of_other_projects_that_are_refused(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.yaml"
    good.write_text("a/1.jpg\na/2.jpg\n")

    def refused(message, text, name="bad.yaml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(StreamError, match=message):
            read_name_lists(good, tmp_path / name)

    refused(r"bad\.yaml has no list of paths under 'data'", "- a/1.jpg\n")
    refused(r"bad\.yaml has no list of paths", "data: a/1.jpg\n")
    refused(r"bad\.yaml has no list of paths", "data: [1, 2]\n")
    refused(r"bad\.yaml cannot be read as plain YAML", "data: [a/1.jpg\n")
    refused(r"bad\.yaml lists no paths", "data: []\n")
    refused(r"bad\.txt lists no paths", "# nothing\n\n", "bad.txt")
    refused(r"bad\.txt lists '1\.jpg'; accepted: paths that end in CLASS/FILE", "1.jpg\n", "bad.txt")
    refused(r"lists '\.\./1\.jpg'", "../1.jpg\n", "bad.txt")
    refused(r"bad\.txt: 'a/3\.jpg' is there twice", "x/a/3.jpg\ny/a/3.jpg\n", "bad.txt")
    refused(r"both list a/2\.jpg; accepted", "x/a/2.jpg\n", "bad.txt")
    bad.unlink()
    with pytest.raises(StreamError, match=r"bad\.yaml cannot be read"):
        read_name_lists(good, bad)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe/a.jpg")
    with pytest.raises(StreamError, match=r"bad\.txt cannot be read: .*accepted: a text file in UTF-8"):
        read_name_lists(good, tmp_path / "bad.txt")


def test_nothing_in_a_list_is_executed(tmp_path):
    trap = tmp_path / "trap.yaml"
    trap.write_text(
        f"data: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/hit]]\n"
    )
    (tmp_path / "good.txt").write_text("a/1.jpg\n")
    with pytest.raises(StreamError, match=r"trap\.yaml cannot be read as plain YAML"):
        read_name_lists(trap, tmp_path / "good.txt")
    assert not (tmp_path / "hit").exists()
