"""Names from configurations, folders and results in everything that is written and printed: shown, never obeyed."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import socket
import subprocess
import sys
import time
import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
from report_pages import made_up_runs, read_page

from avalanche_firn.evaluation.comparison_figures import (
    cost_figure,
    differences_figure,
    frozen_map_figure,
    ranking_figure,
)
from avalanche_firn.evaluation.dynamics_figures import cosine_figure
from avalanche_firn.evaluation.figures import curves_figure, save_figure, task_matrix_figure
from avalanche_firn.evaluation.landscape import Landscape
from avalanche_firn.evaluation.statistics import mean_interval
from avalanche_firn.experiments import dashboard
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.cli_parser import build_parser
from avalanche_firn.experiments.escapes import csv_cell, html_text, markdown_line, one_line, visible
from avalanche_firn.experiments.report import write_report
from avalanche_firn.experiments.report_html import html_report
from avalanche_firn.experiments.report_parts import Code, DataTable, Folded, Picture, Report, Section, Terms, Text
from avalanche_firn.experiments.report_svg import standalone_svg, svg_of
from avalanche_firn.experiments.report_tables import facts, text_table
from avalanche_firn.experiments.report_text import aligned, file_name, markdown_report
from avalanche_firn.experiments.results import RunResults, group_runs
from avalanche_firn.experiments.tensorboard_texts import dashboard_texts

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title></code></pre><b>",
    "<!-- ",
    "]]><![CDATA[",
    "{{7*7}} ${x} #{y} %(z)s {0}",
    "$\\frac{a}$ $x^2$ $",
    "`code` ``` | a | --- |",
    "![p](https://example.org/x.png) [a](javascript:alert(1)) ![b][c] [c]: https://example.org",
    "\\<b> &lt;b&gt; &#60;script&#62;",
    "line\r\nbreak\u2028and\x0bmore",
    "\x1b[31mred\x1b]0;title\x07 \x9b2J",
    "\u202egnp.exe\u202c \u2066x\u2069 \ufeff",
    "=cmd|'/c calc'!A0",
    "+1+1",
    "@SUM(A1)",
    "-2+3",
    "../../etc/passwd",
    "javascript:alert(1)",
)
names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.sampled_from("<>\"'&/\\`$|[](){}!#=+-@:\n\t \x1b\u202eaé"), max_size=24),
    st.text(max_size=16),
)
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# ----------------------------------------------------------------------- words
@settings(max_examples=200, deadline=None)
@given(names)
def test_escapes_of_every_kind(text):
    assert not STEERING.search(visible(text)) and not STEERING.search(one_line(text))
    assert len(one_line(text).splitlines()) <= 1 and "\t" not in one_line(text)
    escaped = html_text(text)
    assert not re.search(r"[<>\"']", escaped) and html.unescape(escaped) == visible(text)
    line = markdown_line(text)
    assert "<" not in line and not re.search(r"(?<!\\)(\\\\)*[`$]", re.sub(r"\\[`$]", "", line))
    assert not re.search(r"\][(\[:]", line)
    cell = csv_cell(text)
    assert not re.match(r"\s*[=+\-@]", cell) or re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?|[+-](nan|inf)", cell)


def test_texts_of_white_space_take_no_time():
    begun = time.perf_counter()
    for text in ("a" + " " * 200_000 + "b", "a" + " \n" * 100_000 + "b", "\t" * 200_000):
        for escape in (one_line, markdown_line, csv_cell, html_text, visible):
            escape(text)
    assert time.perf_counter() - begun < 5
    assert one_line("a \n \r\n b\n") == "a b " and one_line("\n\n") == " " and one_line(" a  b ") == " a  b "


def test_numbers_of_blocks_in_names_fill_no_memory():
    names = ["b.9999999999999.q", "b.²." + "q", "b." + "9" * 5000 + ".q", "b.2.q"]
    assert frozen_map_figure([names]).axes


def test_ordinary_texts_stay_to_the_byte():
    for text in (
        "slca",
        "90.12 ± 0.3 %",
        "method_0 (upper bound, not continual)",
        "Größe µm – 10²",
        "naïve 日本語",
        "a_b*c",
    ):
        assert visible(text) == one_line(text) == markdown_line(text) == csv_cell(text) == text
        assert html.unescape(html_text(text)) == text
    for number in (-1.5, 3, True, None, "-0.5", "+1e-3", "-inf"):
        assert csv_cell(number) == number
    assert csv_cell("-2+3") == "'-2+3" and csv_cell("=1") == "'=1" and csv_cell("@x") == "'@x"
    assert visible("a\x1b[31m\u202e\x07") == "a\\x1b[31m\\u202e\\x07" and one_line("a\r\n b\u2028c") == "a b c"


# ------------------------------------------------------------------------ HTML
class Tags(HTMLParser):
    """Elements with the names of their attributes, and all texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.other: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs if name != "class")))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    handle_pi = unknown_decl


PICTURE = svg_of(Figure(figsize=(1, 1)), name="p", title="t", description="d")


def report_of(name: str) -> Report:
    """Every place of a report that takes a text."""
    table = DataTable(name, [name, name], [[name, name], ["x", name]], note=name)
    blocks = [
        Text(name),
        table,
        Picture("p", name, name, PICTURE),
        Code(name),
        Terms([(name, name)]),
        Folded(name, [Text(name)], printed=True),
    ]
    sections = [Section(name, blocks), *(Section(f"{i}{name}", [Text(name)]) for i in range(4))]
    return Report(name, [name], [name], [name], sections)


@settings(max_examples=80, deadline=None)
@given(names)
def test_no_name_adds_an_element_or_an_attribute(name):
    name = name or "-"  # an empty note is left out
    found, plain = Tags(html_report(report_of(name))), Tags(html_report(report_of("x" * max(1, len(name)))))
    assert found.tags == plain.tags and found.other == plain.other == []
    assert all(link.startswith(("#", "data:")) for link in found.links)
    shown = "".join(found.texts).replace("\xa0", " ")
    assert visible(name).replace("\xa0", " ").replace("\r", "") in shown
    assert not STEERING.search(html_report(report_of(name)))


def test_the_policy_of_the_page():
    page = html_report(report_of("x"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert page.count(f'<meta http-equiv="Content-Security-Policy" content="{policy}">') == 1
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")
    assert not re.search(r"<script|\son\w+=|javascript:|https?://(?!www\.w3\.org)", page)


# -------------------------------------------------------------------- Markdown
def rendered(text: str) -> Tags:
    markdown = pytest.importorskip("markdown")  # TensorBoard brings it along
    return Tags(markdown.markdown(text, extensions=["tables", "fenced_code", "md_in_html"]))


@settings(max_examples=60, deadline=None)
@given(names)
def test_no_name_makes_markup_in_markdown(name):
    text = markdown_report(report_of(name or "-"))
    assert not STEERING.search(text)
    found = rendered(text)
    assert {tag for tag, _ in found.tags} <= {
        *("h1", "h2", "h3", "p", "strong", "em", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "img"),
        *("pre", "code", "ul", "ol", "li", "details", "summary", "br", "hr"),
    }
    assert found.links in ([], ["p.svg"])  # our own picture, unless a fence in the name's code has swallowed it


def test_tables_keep_their_columns():
    rows = [line for line in markdown_report(report_of("a|b ` | c")).splitlines() if line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


# ------------------------------------------------------------------------- SVG
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i in (0, 7, 12) else pytest.mark.slow) for i, name in enumerate(HOSTILE)]
)
def test_names_in_figures_are_drawn_letter_by_letter(name, tmp_path):
    """As title, label, tick and legend; a formula is neither interpreted nor a crash; TeX isn't started."""
    rows = {name: [[0.1, 0.2], [0.2, 0.3]], "other": [[0.3, 0.4], [0.5, 0.6]]}
    figures = [
        curves_figure(rows, title=name, xlabel=name, ylabel=name),
        task_matrix_figure([[0.5, 0.6], [0.7, 0.8]], title=name, task_names=[name, "b"]),
        ranking_figure({name: mean_interval([0.1, 0.3]), "b": mean_interval([0.2])}, xlabel=name),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        for figure in figures:
            svg = svg_of(figure, name="f", title=name, description=name)
            root = ElementTree.fromstring(standalone_svg(svg))
            tags = {element.tag.rpartition("}")[2] for element in root.iter()}
            assert tags <= {
                "svg",
                "title",
                "desc",
                "g",
                "path",
                "text",
                "tspan",
                "use",
                "defs",
                "clipPath",
                "rect",
                "image",
            }
            attributes = {key for element in root.iter() for key in element.attrib}
            assert not [key for key in attributes if key.startswith("on")] and "DOCTYPE" not in svg
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
            texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
            assert not STEERING.search("".join(texts))
            if "$" in name:  # the letters are all there, perhaps on several lines
                letters = re.sub(r"\s", "", name)
                assert letters in re.sub(r"\s", "", "".join(texts)) and "mathdefault" not in svg
        save_figure(curves_figure(rows, title=name), tmp_path / "f.png")


def test_other_figures_take_formulas_for_names():
    broken = "$\\frac$ $\\undefined{"
    interval = mean_interval([0.1, 0.3])
    grid = np.linspace(-1, 1, 3)
    values = np.arange(9.0).reshape(3, 3) + 1
    plane = Landscape(grid, grid, values, values / 10, np.array([[0.0, 0.0], [0.2, 0.1], [0.5, 0.5]]),
                      labels=("", broken, ""), axes=(broken, broken))  # fmt: skip
    points = {broken: (1.0, 0.5, 0.1), "b": (90.0, 0.6, None)}
    figures = [
        plane.figure(title=broken),
        plane.figure("accuracy", title=broken),
        differences_figure({broken: interval, "b": interval}, xlabel=broken),
        cost_figure(points, xlabel=broken, ylabel=broken, log=True),
        cosine_figure(np.eye(2), task_names=[broken, "b"], title=broken),
    ]
    for i, figure in enumerate(figures):
        assert "undefined" in svg_of(figure, name=f"f{i}", title="t", description="d")


# ----------------------------------------------------------------- whole report
def hostile_runs(folder: Path, text: str) -> list[RunResults]:
    """Runs that have everything, every text of the results of the first method replaced or ended by `text`."""
    runs = made_up_runs(folder, methods=2, seeds=1, tasks=2, whole=True)
    run = runs[0]
    for place, key in (
        (run, "method"), (run, "strategy"), (run, "recipe"), (run["stream"], "source"), (run["stream"], "split"),
        (run["backbone"], "tag"), (run["backbone"], "weights"), (run["cost"], "device"), (run, "config_digest"),
        (run, "group_digest"), (run["backbone"], "weights_sha256"), (run["stream"], "fingerprint"),
    ):  # fmt: skip
        place[key] = f"{text} {place[key]}"
    run["dynamics"]["task_names"] = [f"{text}{i}" for i in range(len(run["dynamics"]["task_names"]))]
    run["protocol"][text] = text
    run["figures"][f"probe/{text}"] = 0.5
    if not STEERING.search(text):  # which no configuration may hold
        for run in runs:
            config = run.folder / "config.yaml"
            described = f"{config.read_text(encoding='utf-8')}description: {json.dumps(text)}\n"
            config.write_text(described, encoding="utf-8")
    return runs


@pytest.mark.parametrize(
    "text",
    [
        "".join(HOSTILE[:4]),
        pytest.param("$\\frac$ `x` | ![p](//example.org/x)\x1b[2J\u202e", marks=pytest.mark.slow),
        pytest.param("=cmd|'\n@x", marks=pytest.mark.slow),
    ],
)
def test_a_whole_report_of_hostile_results(tmp_path, text):
    groups = group_runs(hostile_runs(tmp_path / "runs", text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_report(tmp_path / "summary", groups, title=text)
    page = read_page((tmp_path / "summary" / "report.html").read_text(encoding="utf-8"))
    allowed = {
        "id",
        "class",
        "style",
        "href",
        "role",
        "aria-label",
        "aria-labelledby",
        "tabindex",
        "scope",
        "lang",
        "name",
    }
    for tag, attributes in page.tags:
        assert tag not in {
            "script",
            "img",
            "iframe",
            "object",
            "a href",
            "b",
            "base",
            "form",
            "animate",
            "foreignObject",
        }
        if tag in ("p", "td", "th", "h1", "h2", "li", "a", "section", "details", "summary", "code", "pre", "span"):
            assert set(attributes) <= allowed
        assert not [name for name in attributes if name.startswith("on")]
        assert not attributes.get("href", "").lower().startswith(("javascript", "http", "//"))
    assert visible(text).split("\n")[0].split(" ")[0].strip() in page.text.replace("\\n", "\n")
    markdown = (tmp_path / "summary" / "report.md").read_text(encoding="utf-8")
    verbatim = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"<(?!/?details>|summary>|/summary>)", verbatim) and not re.search(r"(?<!\\)\]\(//", verbatim)
    for path in (tmp_path / "summary").iterdir():
        assert path.resolve().parent == (tmp_path / "summary").resolve()
        if path.suffix in (".html", ".md", ".csv", ".svg"):
            content = path.read_text(encoding="utf-8")
            assert not STEERING.search(content.replace("\r\n", "\n")), path.name
    rows = list(csv.reader(io.StringIO((tmp_path / "summary" / "results.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1
    wrong = [
        cell for row in rows for cell in row if re.match(r"\s*[=+\-@]", cell) and not re.fullmatch(r"-?[\d.e-]+", cell)
    ]
    assert wrong == []


def test_texts_of_tensorboard(tmp_path):
    from tensorboard import plugin_util

    text = "".join(HOSTILE[:4]) + HOSTILE[8] + HOSTILE[9]
    groups = group_runs(hostile_runs(tmp_path / "runs", text))
    texts = dashboard_texts(groups, [None] * len(groups), ["accuracy/last"], unfinished={text: text})
    assert len(texts) >= 5
    for tag, markdown in texts.items():
        source = re.sub(r"^    .*$", "", markdown, flags=re.MULTILINE)  # verbatim blocks
        assert "<script" not in source and "<img" not in source and not STEERING.search(markdown), tag
        found = Tags(plugin_util.markdown_to_safe_html(markdown))
        assert not {name for name, _ in found.tags} & {"script", "img", "svg", "iframe", "a", "style"}, tag
        for line in source.splitlines():
            if line.startswith("| "):
                assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", source.splitlines()[0]))


# -------------------------------------------------------------------- terminal
def test_tables_of_the_terminal(tmp_path):
    text = HOSTILE[11] + HOSTILE[12] + HOSTILE[13]
    groups = group_runs(hostile_runs(tmp_path / "runs", text))
    for printed in (text_table(groups), *facts(groups), aligned(["a", text], [[text, "1"]])):
        assert not STEERING.search(printed.replace("\n", ""))
    table = text_table(groups).split("\n\n")[0].splitlines()
    assert len(table) == 4 and len({line.index("  ") for line in table if line.startswith("-")}) == 1


def test_what_the_command_line_prints(tmp_path, capsys, monkeypatch):
    name = "evil\x1b[31m\x07\u202e\r"
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for words in (
        ["check", name],
        ["check", f"digits{name}"],
        ["report", name],
        ["resume", str(tmp_path / name)],
        ["dashboard", name],
        ["export", name, "--format", "timm"],
        ["check", "digits", f"training.{name}=3"],
        ["check", "digits", f"training.epochs='{name}'", "--no-data"],
        ["recipes", "show", name],
    ):
        assert main(words) == 2, words
        told = capsys.readouterr()
        assert "evil" in told.err + told.out and "Traceback" not in told.err
        assert not STEERING.search((told.err + told.out).replace("\n", "")), words
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("name: x # \u202e\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["recipes", "show", str(recipe)]) == 0
    assert capsys.readouterr().out == "name: x # \\u202e\n"


def test_printed_reports_of_hostile_results(tmp_path, capsys):
    """`firn report` on a folder of somebody else: files as they are, escape sequences not."""
    text = "m\x1b[31m\u202e"
    for run in hostile_runs(tmp_path / "runs", text):
        (run.folder / "results.json").write_text(json.dumps(run))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main(["report", str(tmp_path / "runs")])
    told = capsys.readouterr()
    assert status in (0, 2) and not STEERING.search((told.out + told.err).replace("\n", ""))


# ---------------------------------------------------------------- export cards
def test_cards_of_exports(tmp_path):
    from avalanche_firn.experiments.config import validate
    from avalanche_firn.experiments.export_card import model_card
    from avalanche_firn.experiments.export_formats import FinalModel
    from avalanche_firn.models.backbones import load_backbone
    from avalanche_firn.models.heads import TaskwiseLinearHead
    from avalanche_firn.models.parts import FeatureClassifier

    backbone = load_backbone("vit_firn_32", pretrained=False)
    head = TaskwiseLinearHead(backbone.num_features)
    head.add_task(list(range(len(HOSTILE))))
    config = validate({"name": "x", "seeds": [0], "stream": {"name": "digits", "tasks": 5}, "methods": ["naive"]})
    (run,) = made_up_runs(None, methods=1, seeds=1)
    everything = "".join(HOSTILE)
    results = {**run, "recipe": everything, "strategy": everything, "method": everything}
    results["stream"] = {**run["stream"], "source": everything, "task_sizes": [2, 2]}
    results["protocol"] = {**run["protocol"], "note": everything}
    cfg = dict(backbone.module.pretrained_cfg) | {"license": everything}
    final = FinalModel(config, results, FeatureClassifier(backbone.module, head), backbone.data_config, cfg,
                       tuple(range(len(HOSTILE))), HOSTILE)  # fmt: skip
    card = model_card(final, everything)
    assert not STEERING.search(card) and "<" not in card.replace("&lt;", "")
    front = card.split("---")[1]
    assert front.strip().splitlines()[0] == "library_name: timm" and "alert" not in front
    found = rendered(card.split("---", 2)[2])
    assert {tag for tag, _ in found.tags} <= {
        *("h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "em", "strong"),
    }
    assert all(f"- {i}: id {i}, " in card for i in range(len(HOSTILE)))


def test_names_of_pictures_are_names_of_files():
    for name in HOSTILE:
        made = file_name(name)
        assert not set(made) & set("/\\:\n\r\0<>\"'|?*") and not any(unicodedata.category(c) == "Cc" for c in made)


# ------------------------------------------------------------------- dashboard
@pytest.mark.parametrize(
    "words",
    [
        ["--host", "0.0.0.0"],
        ["--host=0.0.0.0"],
        ["--bind_all"],
        ["--bind-all"],
        ["--load_fast=true"],
        ["--logdir", "/"],
        ["--port", "0"],
        ["--port", "99999"],
        ["--port", "6006;id"],
        ["--path_prefix=/x"],
    ],
)
def test_the_dashboard_cannot_be_told_otherwise(words, tmp_path, capsys):
    assert main(["dashboard", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err
    parser = next(a for a in build_parser()._actions if a.choices and "dashboard" in a.choices).choices["dashboard"]
    assert {option for action in parser._actions for option in action.option_strings} == {
        *("-h", "--help", "--port", "--no-browser"),
    }


def test_tensorboard_is_started_on_loopback_without_a_shell(tmp_path, monkeypatch):
    started: list[tuple[list[str], dict[str, Any]]] = []

    class Started:
        pid, returncode = 0, 0

        def __init__(self, command: list[str], **options: Any) -> None:
            # -m takes modules of the current folder, below Python 3.11 whatever the environment says
            assert list(Path(options["cwd"]).iterdir()) == [] and Path(options["cwd"]).is_absolute()
            started.append((command, options))

        def wait(self, timeout: float | None = None) -> int:
            return 0

        def poll(self) -> None:
            return None

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(dashboard._Server, "wait_until_it_answers", lambda self: None)
    monkeypatch.setattr(dashboard._Server, "stop", lambda self: None)
    folders = []
    for name in ("--host=0.0.0.0", "$(touch x); `id` | x", "a,b:c", "-x"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "events.out.tfevents.1.x").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for chosen in ([folder] for folder in folders):
        dashboard.open_dashboard(chosen, open_browser=False, say=lambda text: None)
    dashboard.open_dashboard([Path(folder.name) for folder in folders], open_browser=False, say=lambda text: None)
    assert len(started) == 5
    for command, options in started:
        assert command[:3] == [sys.executable, "-m", "tensorboard.main"] and not options.get("shell")
        assert [word for word in command if word.startswith("--host")] == ["--host=127.0.0.1"]
        assert not any(word.startswith(("--bind", "--path_prefix")) for word in command)
        (logdir,) = [word for word in command[3:] if word.startswith("--logdir")]
        assert Path(logdir.partition("=")[2]).is_absolute()
        ports = [int(word.partition("=")[2]) for word in command if word.startswith("--port")]
        assert len(ports) == 1 and 1024 < ports[0] < 65536
    assert not (tmp_path / "x").exists() and dashboard.HOST == "127.0.0.1"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads the kernel's table of sockets")
def test_nothing_listens_elsewhere(tmp_path, monkeypatch):
    """TensorBoard as it is really started: all of its listening sockets are on this machine's loopback."""
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"")

    def listening() -> set[tuple[str, int]]:
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
                place, state = line.split()[1], line.split()[3]
                if state == "0A":
                    host, port = place.split(":")
                    found.add((host, int(port, 16)))
        return found

    before = listening()
    with dashboard._served([f"--logdir={tmp_path}"], dashboard._free_port()) as server:
        server.wait_until_it_answers()
        new = listening() - before
        assert server.port in {port for _, port in new}
        assert {host for host, _ in new} <= {"0100007F", "00000000000000000000000001000000"}
        with socket.create_connection(("127.0.0.1", server.port), timeout=5):
            pass
