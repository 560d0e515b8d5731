"""The style sheet of report.html: one column on a phone and up to three of figures on a desk, light, dark and paper.

The colours of ink, grid and background are the variables that drawings are given by
:mod:`~avalanche_firn.experiments.report_svg`. Contrasts (WCAG 2): ink 15:1 and muted 5.5:1 or more on either paper.
"""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --grid: #d8dee4;
  --empty: #e6e9ed; --soft: #f4f6f8; --link: #0a5cad; --alarm: #9a3b00; --alarm-soft: #fff3e6; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e6e9ed; --muted: #a3abb5; --grid: #3b424c;
  --empty: #2a2f37; --soft: #1f232a; --link: #7db8ff; --alarm: #ffb26b; --alarm-soft: #33261a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem clamp(0.75rem, 3vw, 2.5rem)
  4rem; background: var(--paper); color: var(--ink); overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 0.75rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.75rem 0 0.75rem; padding-top: 0.5rem;
  border-top: 1px solid var(--grid); }
p, ul, dl { max-width: 46rem; margin: 0.5rem 0; }
a { color: var(--link); }
.result { font-size: 1.15rem; }
.facts { color: var(--muted); padding-left: 1.1rem; font-size: 0.92rem; max-width: none;
  columns: 30rem; column-gap: 3rem; }
.facts li { break-inside: avoid; margin-bottom: 0.2rem; }
.caution { border-left: 0.3rem solid var(--alarm); background: var(--alarm-soft); padding: 0.5rem 0.75rem;
  border-radius: 0.2rem; }
.caution strong { color: var(--alarm); }
nav { margin: 1.25rem 0 0; font-size: 0.95rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; list-style: none; padding: 0; max-width: none; }
nav a { display: inline-block; padding: 0.2rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.25rem 1.75rem;
  align-items: start; margin: 0.75rem 0 1.5rem; }
.flow { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; margin: 0.75rem 0 0; }
.flow > figure { flex: 1 1 22rem; max-width: 27rem; min-width: min(100%, 20rem); margin-bottom: 1.5rem; }
.data { min-width: 0; max-width: 100%; margin-bottom: 1.5rem; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; overflow: visible; }
figcaption { font-size: 0.92rem; font-weight: 600; line-height: 1.35; margin-bottom: 0.4rem; max-width: 36rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: min-content; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.35rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(44rem, calc(100vw - 2rem)); }
th, td { border-bottom: 1px solid var(--grid); padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; min-width: 4.5rem; font-weight: 600;
  border-bottom: 2px solid var(--muted); }
th:first-child { text-align: left; padding-left: 0; background: var(--paper); position: sticky; left: 0; }
tbody th { font-weight: 400; }
.short { white-space: nowrap; }
.long { white-space: normal; min-width: 10rem; }
.words { text-align: left; white-space: normal; min-width: 7rem; max-width: 44rem; }
td.words:last-child { min-width: min(21rem, 50vw); overflow-wrap: anywhere; }
.note { font-size: 0.9rem; color: var(--muted); margin: 0.4rem 0 0; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.3rem 0; }
pre { background: var(--soft); padding: 0.75rem; border-radius: 0.3rem; overflow-x: auto; font-size: 0.85rem;
  line-height: 1.45; font-family: ui-monospace, monospace; margin: 0.5rem 0; }
dl { columns: 28rem; column-gap: 3rem; max-width: none; }
dt { break-after: avoid; font-weight: 600; margin-top: 0.6rem;
  font-family: ui-monospace, monospace; font-size: 0.9rem; }
dd { margin: 0; break-inside: avoid; }
@media (max-width: 30rem) {
  body { font-size: 15px; padding-left: 0.55rem; padding-right: 0.55rem; }
  h1 { font-size: 1.6rem; }
  th, td { padding: 0.3rem 0.5rem; }
  tbody th { white-space: normal; min-width: 7rem; }
}
@media print {
  @page { margin: 14mm; }
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --muted: #444444; --grid: #c8ced4;
    --empty: #e6e9ed; --soft: #f4f6f8;   --link: #000000; --alarm: #7a2e00; --alarm-soft: #ffffff; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  nav, details:not(.printed) { display: none; }
  details.printed::details-content { content-visibility: visible; height: auto; display: block; }
  .figures { grid-template-columns: repeat(2, 1fr); }
  .flow { display: block; }
  .flow > figure { max-width: 50%; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; width: auto; }
  .words, td.words:last-child, .long { min-width: 0; }
  tbody th, .words { overflow-wrap: anywhere; }
  th, td { padding: 0.15rem 0.4rem; }
  th, .words, .short { white-space: normal; }
  th:first-child { position: static; }
  thead th { min-width: 0; }
  thead { display: table-header-group; }
  tr, figure { break-inside: avoid; }
  h2, caption, .note { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  a { text-decoration: underline; }
}
"""
