"""``firn dashboard`` in a real browser: what its address shows, tab by tab, of six methods with three seeds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

METHODS = ("cila", "lorac_ipc", "lp_ft", "naive", "slca", "zapping")
CHARTS = {  # category -> charts that must be in it, among others
    "Accuracy and forgetting (mean over seeds)": ("accuracy/last", "accuracy/average", "forgetting/average"),
    "Accuracy and forgetting (95 % intervals over seeds)": ("accuracy/last", "accuracy/average", "forgetting/average"),
    "Probes of the representation (mean over seeds)": ("probe/knn", "probe/linear"),
    "Drift of the representation (mean over seeds)": ("drift/cka", "drift/weights"),
    "Learning rates and losses": ("lr/backbone", "lr/head", "loss/train"),
    "SLCA: alignment": ("slca/alignment/loss-last",),
    "LoRAC-IPC: importance and frozen matrices": ("lorac/frozen", "lorac/importance/largest"),
    "CILA: coefficient and bounds": ("cila/coefficient", "bound"),
    "Zapping, interference and recovery": ("dynamics/interference", "dynamics/synergy", "zap/rows"),
}
IMAGES = ("task matrices", "confusion of tasks", "frozen matrices", "block effects")


@pytest.fixture(scope="module")
def address(comparison: Path) -> Iterator[str]:
    """What a running ``firn dashboard`` prints."""
    words = [sys.executable, "-m", "avalanche_firn.experiments.cli", "dashboard", str(comparison), "--no-browser"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = next((line.strip() for line in process.stdout if "http://" in line), None)
            assert found is not None and found.startswith("http://127.0.0.1:")
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0


@pytest.fixture
def page(browser):
    """A page that remembers what the browser's console complains about."""
    with browser.new_context(viewport={"width": 1500, "height": 1500}) as context:
        opened = context.new_page()
        opened.set_default_timeout(90_000)
        opened.errors = []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        yield opened
        assert opened.errors == []


def tab(address: str, name: str, runs: str | None = None) -> str:
    """The address of another tab, with the runs filtered to `runs` (as the address that is printed does)."""
    query = "smoothing=0" + ("" if runs is None else f"&runFilter={runs}")
    return f"{address.split('?')[0]}?{query}#{name}" + ("" if runs is None else f"&regexInput={runs}")


def test_custom_scalars_overlay_all_methods(address: str, page, screenshots: Path) -> None:
    page.goto(address)
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    cards.first.get_by_text("Matches (6)").wait_for()
    for method in METHODS:
        page.get_by_text(f"summary/{method}", exact=True).first.wait_for()
    page.wait_for_timeout(5000)  # lines are drawn with an animation
    page.screenshot(path=screenshots / "custom-scalars.png")
    # one chart of lines and one of margins per metric, each with the six methods and none of the single runs
    for kind in ("multi-line", "margin"):
        first = page.locator(f"tf-custom-scalar-{kind}-chart-card").first
        assert re.search(
            r"Matches \((\d+)\)", first.evaluate("c => c.shadowRoot ? c.shadowRoot.textContent : c.textContent")
        )
        assert first.get_by_text("Matches (6)").count() == 1
    for category, charts in CHARTS.items():
        heading = page.get_by_role("button", name=re.compile(re.escape(category)))
        heading.wait_for()
        pane = page.locator("tf-category-paginated-view").filter(has=heading)
        if not pane.locator("tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card").count():
            heading.click()
        for chart in charts:
            pane.get_by_text(re.compile(re.escape(chart))).first.wait_for(state="attached")


def test_time_series_group_the_means(address: str, page, screenshots: Path) -> None:
    page.goto(tab(address, "timeseries", "summary%2F"))
    group = page.get_by_text("All methods", exact=True)
    group.wait_for()
    headings = page.locator("metrics-card-groups").inner_text()
    for name in ("All methods", "Learning rates and losses", "Probes", "Drift", "SLCA", "LoRAC-IPC", "CILA"):
        assert name in headings
    group.click()
    page.locator("card-view").first.get_by_text(re.compile("accuracy/")).first.wait_for()
    page.wait_for_timeout(5000)
    page.screenshot(path=screenshots / "time-series.png")


def test_hparams_have_a_row_per_run(address: str, page, screenshots: Path) -> None:
    page.goto(tab(address, "hparams"))
    table = page.locator("tf-hparams-table-view vaadin-grid")
    for method in METHODS:
        for seed in (0, 1, 2):
            table.get_by_text(f"{method}/seed-{seed}", exact=True).first.wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=screenshots / "hparams.png")
    assert table.get_by_text("summary", exact=True).count() == 0
    # what the tab asks the server for: 18 rows and no other, sorted by a metric as numbers
    experiment = ask(address, "experiment", {"experimentName": ""})
    metrics = [info["displayName"] for info in experiment["metricInfos"]]
    assert metrics[0] == "last accuracy"
    hparams = [info["name"] for info in experiment["hparamInfos"]]
    assert hparams[:2] == ["Method", "Seed"] and len(set(hparams)) == len(hparams)
    name = experiment["metricInfos"][0]["name"]
    columns = [{"metric": name, "order": "ORDER_DESC", "missingValuesFirst": False}]
    asked = {"experimentName": "", "allowedStatuses": [], "colParams": columns, "startIndex": 0, "sliceSize": 100}
    rows = ask(address, "session_groups", asked | {"allowedStatuses": ["STATUS_SUCCESS"]})["sessionGroups"]
    values = [next(v["value"] for v in row["metricValues"] if v["name"]["tag"] == name["tag"]) for row in rows]
    assert len(rows) == 18 and values == sorted(values, reverse=True) and values[0] > values[-1]


def ask(address: str, what: str, body: dict) -> dict:
    """An answer of the hparams plugin."""
    url = f"{address.split('?')[0].rstrip('/')}/data/plugin/hparams/{what}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_images_are_drawn(address: str, page, screenshots: Path) -> None:
    page.goto(tab(address, "images", "%5Esummary%24"))
    for name in IMAGES:
        heading = page.get_by_role("button", name=re.compile(name))
        heading.wait_for()
        pane = page.locator("tf-category-paginated-view").filter(has=heading)
        if not pane.locator("tf-image-loader").count():
            heading.click()
        image = pane.locator("tf-image-loader img").first
        image.wait_for(state="attached")
        image.scroll_into_view_if_needed()
        page.wait_for_function("i => i.complete && i.naturalWidth > 200", arg=image.element_handle())
    page.locator("tf-image-loader img").first.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "images.png")


def test_texts_explain(address: str, page, screenshots: Path) -> None:
    page.goto(tab(address, "text", "%5Esummary%24"))
    for heading, words in (
        ("results", "last accuracy"),
        ("protocol", "replay"),
        ("what the tags mean", "all classes seen"),
        ("settings that differ", "backbone_scale"),
        ("configuration", "vit_firn_32.omniglot"),
    ):
        button = page.get_by_role("button", name=re.compile(heading)).first
        button.wait_for()
        pane = page.locator("tf-category-paginated-view").filter(has=button)
        if not pane.locator("tf-text-loader").count():
            button.click()
        pane.get_by_text(re.compile(words)).first.wait_for(state="attached")
    page.screenshot(path=screenshots / "texts.png")
