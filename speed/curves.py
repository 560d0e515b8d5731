"""How cost grows, as curves: with classes, samples per class, past tasks, past samples, pixels; and what is flat.

``growth.py`` and ``past.py`` say what each curve measures. ``--case`` takes the name of a group: alignment, statistics,
lora, zaps, dynamics, pixels, past. A record comes with a figure (``curves.svg``) and a table of fitted exponents: the
slope of log seconds against log x, 0 for what does not grow and 1 for what grows in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from speed.growth import CURVES
from speed.past import steps
from speed.rows import RESULTS, ROOT, Row, Settings

__all__ = ["GROUPS", "figure", "markdown", "report", "rows"]

GROUPS = {**CURVES, "past": steps}
DOCUMENT = ROOT / "docs" / "speed-curves.md"


def rows(settings: Settings) -> list[Row]:
    """All curves, or the groups that `--case` names."""
    chosen = [measure for name, measure in GROUPS.items() if settings.wants(name)]
    if not chosen:
        raise ValueError(f"--case is {settings.case!r}; of curves accepted: {', '.join(GROUPS)}")
    return [row for measure in chosen for row in measure(settings)]


def report(found: Sequence[Row], folder: Path) -> None:
    """Figure and table beside a record; the table of the repository's own record stands in docs/."""
    document = DOCUMENT if folder.resolve() == RESULTS else folder / DOCUMENT.name
    figure(found, folder / "curves.svg")
    document.write_text(markdown(found), encoding="utf-8")
    print(f"written to {folder / 'curves.svg'} and {document}")


def _curves(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(case, list(group)) for case, group in groupby(found, key=lambda row: row.case)]


def markdown(found: Sequence[Row]) -> str:
    """The table of all curves."""
    first = found[0]
    where = f"{first.device}, {first.threads} threads, torch {first.torch}, {first.date[:10]}"
    lines = [
        "# How cost grows",
        "",
        f"Written by `python -m speed curves` ({where}). Curves are measured in interleaved rounds;",
        "those over past tasks and samples are medians over the steps of an epoch.",
        "*Exponent*: slope of log seconds against log x. *From, to*: the first and the last point.",
        "*Bound*: the largest ratio of the last point to the first that the project allows itself.",
        "",
        "| curve | x | from | to | times | exponent | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, curve in _curves(found):
        if "exponent" in curve[0].details:
            start, end = curve[0], curve[-1]
            bound = "" if end.bound is None else f"{end.bound:.4g}, {'met' if end.met else '**not met**'}"
            lines.append(
                f"| {case} | {start.details['axis']} | {start.details['x']:g}: {_time(start)} | {end.details['x']:g}: "
                f"{_time(end)} | {end.ratio:.2f} | {start.details['exponent']:.2f} | {bound} |"
            )
    lines += ["", "| fixed x | x | contestant | times its reference | more |", "|---|---|---|---|---|"]
    for case, curve in _curves(found):
        if "exponent" in curve[0].details:
            continue
        for row in curve:
            if row.contestant == row.to_what:
                continue
            more = {"bytes": "bytes", "milliseconds_per_zap": "ms a zap"}
            extra = ", ".join(f"{row.details[k]:.4g} {label}" for k, label in more.items() if k in row.details)
            ratio = f"{row.ratio:.3f} x {row.to_what}"
            lines.append(f"| {case} | {row.details.get('axis', '')} | {row.contestant} | {ratio} | {extra} |")
    return "\n".join(lines) + "\n"


def _time(row: Row) -> str:
    assert row.seconds is not None
    return f"{row.seconds:.2f} s" if row.seconds >= 1 else f"{1000 * row.seconds:.3g} ms"


def figure(found: Sequence[Row], path: Path) -> None:
    """Ratios to the first point over x, both on logarithmic axes, a panel per kind of x."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, list[Row]]]] = {}
    for case, curve in _curves(found):
        if "exponent" in curve[0].details:
            panels.setdefault(curve[0].details["axis"], []).append((case, curve))
    columns = max(1, min(3, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    picture = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    for place, (axis, curves) in enumerate(panels.items(), 1):
        panel = picture.add_subplot(lines, columns, place)
        for case, curve in curves:
            points = [(row.details["x"], row.ratio) for row in curve]
            label = f"{case.split(', a step')[0].split(', an epoch')[0]} ({curve[0].details['exponent']:.2f})"
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="time / time at the first point")
        panel.grid(True, which="major", linewidth=0.3)
        panel.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    # text as text, no date and no random ids: a small file, the same for the same figures
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "firn"}):
        picture.savefig(path, metadata={"Date": None})
