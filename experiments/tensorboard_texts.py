"""What the TEXT tab of a comparison says: how to read it, results, protocol, settings, meaning of every tag.

Tags are numbered because TensorBoard sorts them by name. Everything is Markdown, which TensorBoard cleans of HTML;
configurations are verbatim blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from avalanche_firn.evaluation.vocabulary import glossary
from avalanche_firn.experiments.escapes import markdown_line, one_line, visible
from avalanche_firn.experiments.results import FIGURES, Group
from avalanche_firn.experiments.tensorboard_curves import label_of
from avalanche_firn.experiments.tensorboard_table import Settings

__all__ = ["dashboard_texts", "markdown_table"]

_STEPS = {
    "experience": "index of the task",
    "iteration": "training iterations",
    "classes": "classes learnt",
    "once": "one value",
}
_BETTER = {"higher": "↑", "lower": "↓", "none": ""}
_SHOWN = 12  # configurations in full; the table of differences has all methods
HOW_TO_READ = """\
Each method is a run `summary/METHOD`: **the mean over its seeds**, in one colour in every chart of a tab. The runs
`METHOD/seed-S` are the single seeds.

- **Custom scalars** has one chart per quantity with all methods in it, and one with the 95 % intervals over the seeds
  (Student t). Sections after the second are folded; click on one to open it.
- **Set Smoothing to 0.** TensorBoard starts with 0.6 there, and a smoothed curve shows values that nobody measured;
  the data can't change that. `firn dashboard` opens it with 0.
- **Ignore outliers in chart scaling** cuts off curves at the edges of a chart; switch it off, or click on the frame
  symbol below a chart, to see all of it.
- **More than 40 runs**: TensorBoard then selects none in the tabs with a list of runs on the left. Type `summary/`
  above that list and select those; `firn dashboard` opens it with this filter.
- **Time series**: filter the runs by `summary/`; the cards of all methods are in the groups with a capital letter.
- Tasks count from 0. Curves over iterations are means of the seeds' k-th points, at the median of their iterations,
  and are thinned to at most 1,000 points. Intervals are drawn where two seeds have a value.
- *Joint training* sees all classes at once: it isn't continual, and is drawn as a level.
- **HParams**: one row per run, the last value of each metric; *Sorting* is at the lower end of the left column. Method
  and seed come first, then the settings that differ.
"""


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def dashboard_texts(
    groups: Sequence[Group],
    settings: Sequence[Settings | None],
    tags: Iterable[str],
    *,
    unfinished: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Tag of the text -> Markdown.

    Args:
        groups: finished runs.
        settings: of each group.
        tags: those that the dashboard draws; only these are explained.
        unfinished: label -> how far it is.
    """
    texts = {"1 how to read this": HOW_TO_READ}
    if groups:
        texts["2 results"] = _results(groups)
    if unfinished:
        rows = [[markdown_line(label), markdown_line(far)] for label, far in unfinished.items()]
        texts["2 results, unfinished"] = markdown_table(["method", "so far"], rows)
    if groups:
        texts["3 protocol"] = _protocol(groups)
    texts["4 what the tags mean"] = _meanings(tags)
    different = _differences(groups, settings)
    if different:
        texts["5 settings that differ between methods"] = different
    for group in groups[:_SHOWN]:
        folder = next((folder for folder in group.folders if folder is not None), None)
        text = _configuration(folder)
        if text:
            texts[f"6 configuration/{group.label}"] = text
    return texts


def _results(groups: Sequence[Group]) -> str:
    heads = ["method", *(heading for _, heading, *_ in FIGURES), "seeds"]
    rows = []
    for group in groups:
        cells = [(group.interval(tag), scale, digits) for tag, _, scale, digits in FIGURES]
        shown = ["-" if interval is None else interval.format(scale, digits) for interval, scale, digits in cells]
        rows.append([markdown_line(label_of(group)), *shown, ", ".join(map(str, group.seeds))])
    return (
        f"{markdown_table(heads, rows)}\n\nMean ± 95 % interval over the seeds (Student t); one seed has no interval."
    )


def _protocol(groups: Sequence[Group]) -> str:
    """What each method was allowed, one row per flag that results have."""
    flags = dict.fromkeys(flag for group in groups for flag in group.runs[0]["protocol"])
    rows = [
        [markdown_line(flag.replace("_", " ")), *(_flag(group.runs[0]["protocol"].get(flag)) for group in groups)]
        for flag in flags
    ]
    for title, key in (
        ("evaluated split", lambda run: run["stream"]["split"]),
        ("data", lambda run: run["stream"]["source"]),
        ("backbone", lambda run: f"{run['backbone']['tag']} ({run['backbone']['weights']})"),
        ("device", lambda run: run["cost"]["device"]),
    ):
        values = [", ".join(sorted({key(run) for run in group.runs})) for group in groups]
        rows.append([title, *map(markdown_line, values)])
    return markdown_table(["", *(markdown_line(group.label) for group in groups)], rows)


def _flag(value: object) -> str:
    if value is None:
        return "-"
    return {True: "**yes**", False: "no"}[value] if isinstance(value, bool) else markdown_line(str(value))


def _meanings(tags: Iterable[str]) -> str:
    found = glossary(tags)
    rows = [[f"`{m.pattern}`", m.definition, m.unit, _STEPS[m.step], _BETTER[m.better]] for m in found]
    return (
        markdown_table(["tag", "definition", "unit", "over", ""], rows) + "\n\n↑ higher is better, ↓ lower is better."
    )


def _differences(groups: Sequence[Group], settings: Sequence[Settings | None]) -> str:
    """Hyper-parameters that not all methods share; empty where fewer than two configurations are known."""
    known = [(group.label, row) for group, row in zip(groups, settings, strict=True) if row is not None]
    names = sorted({name for _, row in known for name in row} - {"Method", "Seed"})
    rows = [[_code(name), *(markdown_line(str(row.get(name, "-"))) for _, row in known)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if len(known) < 2 or not different:
        return ""
    same = len(rows) - len(different)
    table = markdown_table(["setting", *(markdown_line(label) for label, _ in known)], different)
    return f"{table}\n\n{same} settings are the same in all of them; - means that a method has no such setting."


def _configuration(folder: Path | None) -> str:
    """A run's resolved configuration as a verbatim block; empty where it can't be read."""
    if folder is None or not (folder / "config.yaml").is_file():  # a pipe would be waited for
        return ""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "\n".join(f"    {visible(line)}" for line in text.splitlines())


def _code(name: str) -> str:
    """A name as code, which nothing in it can end."""
    return f"`{one_line(name).replace('`', chr(39))}`"
