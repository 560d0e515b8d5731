"""report.html in a real browser: nothing fetched, no complaint, legible on a phone and at night, printable."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Of every piece of text shown: size in pixels of the screen (SVG scaling included), contrast with what is behind it.
_TEXTS = """() => {
  const number = (colour) => { const m = colour.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const linear = (v) => v <= 0.03928 * 255 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(linear);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = number(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  };
  const shown = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || element.closest('title, desc, style, metadata, defs')) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    let size = parseFloat(style.fontSize);
    if (svg) { const m = element.getScreenCTM(); size *= Math.hypot(m.a, m.b); }
    const colour = number(svg ? style.fill : style.color), ground = behind(element);
    const [a, b] = [luminance(colour), luminance(ground)].sort((p, q) => q - p);
    // numbers on the cells of a heat map stand on the cell's colour, not on the page's
    const cell = svg && !(element.getAttribute('style') || '').includes('fill:var(--');
    shown.push({text, size, svg, contrast: (a + 0.05) / (b + 0.05), cell});
  }
  return shown;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_report_is_legible(comparison: Path, browser, screenshots: Path, width: int, scheme: str) -> None:
    complaints, requests = [], []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        address = (comparison / "summary" / "report.html").resolve().as_uri()
        page.goto(address)
        page.screenshot(path=screenshots / f"report-{width}-{scheme}.png", full_page=True)
        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [address]
        # the page itself never scrolls sideways; wide tables scroll in their own box
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        texts = page.evaluate(_TEXTS)
        assert len(texts) > 300
        small = {(t["text"], round(t["size"], 1)) for t in texts if t["size"] < (9.5 if t["svg"] else 12)}
        assert not small
        pale = {(t["text"], round(t["contrast"], 2)) for t in texts if t["contrast"] < 4.5 and not t["cell"]}
        assert not pale


def test_figures_have_words(comparison: Path, browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto((comparison / "summary" / "report.html").resolve().as_uri())
        figures = page.locator("svg[role=img]")
        assert figures.count() >= 10
        for index in range(figures.count()):
            named = figures.nth(index).evaluate(
                "s => (s.getAttribute('aria-label') || '') + [...s.children].filter(c => ['title', 'desc'].includes("
                "c.tagName)).map(c => c.textContent).join(' ')"
            )
            assert len(named) > 20, index
        assert page.locator("img:not([alt]), svg:not([role]):not([aria-hidden])").count() == 0
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        # links inside the page lead somewhere
        targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
        assert set(targets) <= set(ids)
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_report_prints(comparison: Path, browser, screenshots: Path) -> None:
    with browser.new_context(color_scheme="dark") as context:
        page = context.new_page()
        page.goto((comparison / "summary" / "report.html").resolve().as_uri())
        page.emulate_media(media="print", color_scheme="dark")
        style = "getComputedStyle(document.body)"
        ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        dark = lambda colour: sum(map(float, colour[4:].strip("()").split(",")[:3])) < 3 * 128  # noqa: E731
        assert dark(ink) and (paper == "rgba(0, 0, 0, 0)" or not dark(paper))  # dark on light, whatever the screen has
        (screenshots / "report.pdf").write_bytes(document := page.pdf(format="A4"))
        assert document.startswith(b"%PDF") and document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") < 60
