"""report.html as a browser, a screen reader and a watcher of the network would see it; report.md beside it."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from report_pages import Page, made_up_runs, read_page

from avalanche_firn.experiments.report import write_report
from avalanche_firn.experiments.report_html import html_report
from avalanche_firn.experiments.report_parts import (
    Code,
    DataTable,
    Folded,
    Report,
    Section,
    Terms,
    Text,
    unique_name,
)
from avalanche_firn.experiments.report_text import markdown_report
from avalanche_firn.experiments.results import FIGURES, group_runs

HOSTILE = '<script>alert("1")</script> & "x" | `y`'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a report of runs that have everything."""
    top = tmp_path_factory.mktemp("runs") / "rich"
    write_report(top / "summary", group_runs(made_up_runs(top, whole=True)), title="rich")
    return top / "summary"


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return read_page((written / "report.html").read_text(encoding="utf-8"))


def test_nothing_comes_from_elsewhere(written: Path, page: Page) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert "://" not in html and "@import" not in html and "url(" not in re.sub(r"url\(#[^)]*\)", "", html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "img", "base"}
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_structure(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(key, "").split()) <= set(ids)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    first = dict(page.tags)
    assert first["html"]["lang"] == "en"
    assert any(
        a.get("name") == "viewport" and "width=device-width" in a["content"] for t, a in page.tags if t == "meta"
    )


def test_tables_can_be_read_aloud(page: Page) -> None:
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert scopes and set(scopes) == {"col", "row"}
    count = sum(tag == "table" for tag, _ in page.tags)
    assert count == sum(tag == "caption" for tag, _ in page.tags) == len(page.tables)
    for caption, rows in page.tables.items():
        assert len({len(row) for row in rows}) == 1, caption
    boxes = [a for t, a in page.tags if t == "div" and a.get("class") == "scroll"]
    assert len(boxes) == count and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_figures_can_be_read_aloud(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) >= 20
    assert all(a["role"] == "img" and len(a["aria-labelledby"].split()) == 2 for a in drawings)
    assert "method_0 90.50 % (95 % interval 84.15 to 96.85)" in page.text
    assert "method_0 - method_1 3.00 percent points" in page.text


def test_what_is_shown(page: Page) -> None:
    assert page.tables["Results"][0] == ["method", *(head for _, head, *_ in FIGURES)]
    assert page.tables["Results"][1][:2] == ["method_0", "90.50 ± 6.35"]
    (paired,) = [rows for caption, rows in page.tables.items() if caption.startswith("Paired differences (")]
    assert paired[1] == ["method_0 - method_1", "3.00 ± 0.00", "2", "method_0 better: the interval excludes zero"]
    assert page.tables["What a run cost"][1] == ["method_0", "10.5 ± 6.4", "100.0 ± 0.0", "1,234"]
    for heading in (
        "Paired comparison over the seeds",
        "Accuracy and cost",
        "Over the tasks",
        "Between the tasks",
        "With the task given at test time",
        "Representations",
        "Single methods",
        "Dynamics of single tasks",
        "Settings",
        "Versions and devices",
        "How to repeat it",
        "What the figures mean",
    ):
        assert page.text.count(heading) >= 2, heading  # as a heading and in the contents
    assert "Unfinished runs" not in page.text
    assert "Likeness of the features to those before training" in page.text  # read from metrics.csv


def test_markdown_has_the_same_tables_and_figures(written: Path, page: Page) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    for caption, rows in page.tables.items():
        assert f"### {caption}" in text
        for row in rows:
            cells = [cell.replace("\xa0", " ").replace("|", "\\|") for cell in row]
            assert "| " + " | ".join(cells) + " |" in text
    linked = re.findall(r"\]\(([^()]+\.svg)\)", text)
    assert sorted(linked) == sorted(path.name for path in written.glob("*.svg"))
    assert len(linked) == sum(tag == "svg" for tag, _ in page.tags)


def test_every_text_is_escaped() -> None:
    blocks = [
        Text(HOSTILE),
        DataTable(HOSTILE, [HOSTILE, "n"], [[HOSTILE, HOSTILE]], HOSTILE),
        Code(HOSTILE),
        Terms([(HOSTILE, HOSTILE)]),
        Folded(HOSTILE, [Code(HOSTILE)]),
    ]
    report = Report(HOSTILE, [HOSTILE], [HOSTILE], [HOSTILE], [Section(HOSTILE, blocks)])
    page = read_page(html_report(report))
    assert "script" not in {tag for tag, _ in page.tags} and page.text.count('alert("1")') == 13
    assert list(page.tables) == [HOSTILE]
    markdown = markdown_report(report)
    assert not re.search(r"(?<!\\)<script", re.sub(r"```.*?```", "", markdown, flags=re.S).replace("&lt;", ""))


def test_code_cannot_break_its_fence() -> None:
    text = markdown_report(Report("t", [], [], [], [Section("s", [Code("```\n# no heading")])]))
    assert "````\n```\n# no heading\n````" in text


def test_contents_are_for_long_reports_and_empty_sections_are_left_out() -> None:
    sections = [Section(f"part {i}", [Text("x")]) for i in range(4)]
    assert "<nav" in html_report(Report("t", [], [], [], sections))
    short = html_report(Report("t", [], [], [], [*sections[:3], Section("nothing")]))
    assert "<nav" not in short and "nothing" not in short
    twice = read_page(html_report(Report("t", [], [], [], [sections[0]] * 4)))
    ids = [attributes["id"] for _, attributes in twice.tags if "id" in attributes]
    assert len(set(ids)) == 4


def test_columns_of_words_go_to_the_left() -> None:
    table = DataTable("t", ["a", "number %", "in words %"], [["x", "-1.5 ± 2", "good"], ["y", "-", "-"]])
    html = html_report(Report("t", [], [], [], [Section("s", [table])]))
    assert '<th scope="col" class="short">number %</th>' in html
    assert '<th scope="col" class="words">in words %</th>' in html and '<td class="words">good</td>' in html
    assert "<td>-1.5 ± 2</td>" in html


def test_unique_names() -> None:
    taken: set[str] = set()
    assert [unique_name("a", taken) for _ in range(3)] == ["a", "a-2", "a-3"]
