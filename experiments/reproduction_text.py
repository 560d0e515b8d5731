"""The table of reproductions as Markdown, see :mod:`avalanche_firn.experiments.reproduction`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.about_sections import TASK_GIVEN, TRANSFER_FIGURES, TargetConfig
from avalanche_firn.experiments.collected_runs import collect
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.escapes import markdown_line
from avalanche_firn.experiments.recipe_table import Experiment, backbone_of, cost_text, declared
from avalanche_firn.experiments.reproduction import Reproduced, Rows, StoredRun, flags_of, reproduce, stored_runs
from avalanche_firn.experiments.results import write_text
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["make_results", "results_text", "shown_figures"]

NOT_RUN = "not run yet"
NOT_TRAINED = "not trained here"
_UNKNOWN = "not recorded"
_ADAPTATIONS = {"fine_tune": "fine-tune", "lp_ft": "lp-ft"}
_OPENING = """\
# Results beside those of others

What others report of each shipped recipe, and what was measured with this package. The file is made from the results
of finished runs by `firn results docs/results --output docs/results.md`; nothing in it is written by hand.

{count}

- **Others**: percent, with the standing of the figure in brackets: *code* = printed in the authors' repository,
  *abstract* = in the paper's abstract, *secondary* = quoted by others from the paper, *measured* = made again from what
  the authors published. Numbers in square brackets are the sources below the table, with what their ± is taken over.
- **Measured**: percent, mean ± 95 % interval over the seeds (Student t); a single seed has no interval. "{not_run}":
  nobody has run it. "{not_trained}": the recipe quotes the figure and has no such method.
- **To declare**: what a comparison with other figures has to say. No figure uses task identity at test time, except
  where the heading says "task given". A joint training is an upper bound and no continual learner.
- A run counts if its configuration is the recipe's, but for the places of data and weights, device and threads. Runs
  with other settings stand apart.

| figure | meaning |
|---|---|
| `accuracy/last` | after the last task, samples of all classes pooled |
| `accuracy/average` | after the last task, mean over the tasks |
| `accuracy/incremental` | mean over the steps of the stream of the accuracy on all classes seen so far |
| `forgetting/average` | mean over the tasks of how far their accuracy fell from its reference, in points |
| `task-il/...` | the same, among the classes of the true task |
| `probe/...` | mean over the tasks, after adapting the representation to each |
| `OPTIMIZER/continual/accuracy` | new classes, after a transfer one image at a time |
| `OPTIMIZER/iid/accuracy` | new classes, after a transfer in shuffled batches |
"""


def shown_figures(config: Experiment) -> list[str]:
    """Tags of a recipe's columns: those that others report, the recipe's probes, else the usual ones."""
    reported = list(dict.fromkeys(target.figure for target in config.targets))
    if isinstance(config, TransferExperiment):
        own = [t for t in TRANSFER_FIGURES if t != "iid/accuracy" or config.transfer.iid_epochs]
        usual = [f"{optimizer.label}/{tag}" for optimizer in config.transfer.optimizers for tag in own]
        return list(dict.fromkeys([*reported, *usual]))
    adapted = [f"probe/{_ADAPTATIONS.get(name, name)}" for probe in config.evaluation.probes for name in probe.adapt]
    return list(dict.fromkeys([*(reported or ["accuracy/last", "accuracy/average"]), *adapted]))


def _given(config: Experiment, tag: str) -> str:
    """What a heading adds where the figure is told the task."""
    aware = not isinstance(config, TransferExperiment) and any(p.task_aware for p in config.evaluation.probes)
    return " (task given)" if tag.startswith(TASK_GIVEN) or (tag.startswith("probe/") and aware) else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(heads), "|" + "---|" * len(heads), *map(_row, rows)]


class _Sources:
    """Numbers the sources of a table in the order in which they come."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str | None], int] = {}

    def cell(self, target: TargetConfig | None) -> str:
        if target is None:
            return "-"
        number = self.known.setdefault((target.source, target.spread_of), len(self.known) + 1)
        return f"{target.text()} ({target.standing}) [{number}]"

    def lines(self) -> list[str]:
        ends = {key: f"; ± over: {key[1]}" if key[1] else "" for key in self.known}
        return [f"- [{number}] {key[0]}{ends[key]}" for key, number in self.known.items()]


def _name(rows: Rows) -> str:
    """The method's label, with the hashes that tell its runs apart where some had other weights or data."""
    return markdown_line(f"{rows.label} ({rows.note})" if rows.note else rows.label)


def _seeds(rows: Rows, config: Experiment) -> str:
    listed = ", ".join(map(str, rows.seeds))
    foreign = [seed for seed in rows.seeds if seed not in config.seeds]
    return f"{len(rows.seeds)} of {len(config.seeds)} ({listed})" + ("; not all the recipe's" if foreign else "")


def _comparison(found: Reproduced) -> list[str]:
    """Methods and quoted rows, with what others report and what was measured."""
    config, sources = found.config, _Sources()
    tags = shown_figures(config)
    reported = {(target.label, target.figure): target for target in config.targets}
    quoted = {target.figure for target in config.targets}
    heads = ["method"]
    for tag in tags:
        heads += [f"`{tag}`{_given(config, tag)}, others"] * (tag in quoted)
        heads.append(f"`{tag}`{_given(config, tag)}, measured")

    def figures(label: str, measured: Rows | None, empty: str) -> list[str]:
        cells = []
        for tag in tags:
            if tag in quoted:
                cells.append(sources.cell(reported.get((label, tag))))
            cells.append(empty if measured is None else measured.measured(tag))
        return cells

    rows = []
    for method in config.methods:
        of_method: list[Rows | None] = [*found.of(method.name)] or [None]
        for measured in of_method:
            flags = declared(config, method.name) if measured is None else flags_of(measured.runs)
            seeds = "-" if measured is None else _seeds(measured, config)
            name = method.name if measured is None else _name(measured)
            rows.append([name, *figures(method.name, measured, NOT_RUN), seeds, "; ".join(flags) or "-"])
    for name in dict.fromkeys(target.label for target in config.targets if target.method is None):
        rows.append([f"*{name}*", *figures(name, None, NOT_TRAINED), "-", "-"])
    lines = [*_markdown([*heads, "seeds", "to declare"], rows), ""]
    return [*lines, *sources.lines(), ""] if sources.known else lines


# ------------------------------------------------------------- what it ran on
def _environments(run: StoredRun) -> list[dict[str, Any]]:
    """The first environment of a run and those that it was resumed in."""
    return [] if run.environment is None else [run.environment, *run.environment.get("resumed_in", [])]


def _code(environment: dict[str, Any]) -> str:
    commit = environment.get("git_commit")
    if not commit:
        version = environment.get("packages", {}).get("avalanche-firn", "unknown")
        return f"version {markdown_line(str(version))}, commit {_UNKNOWN}"
    head, changed, _ = commit.partition("+")
    return f"`{_hexadecimal(head)}`" + (" with changes" if changed else "")


def _device(environment: dict[str, Any]) -> str:
    device = environment.get("device", {})
    threads = device.get("threads")
    cpu = f"CPU, {threads} thread{'s' if threads != 1 else ''}" if threads else "CPU"
    named = device.get("name") or (cpu if device.get("type") == "cpu" else device.get("type", _UNKNOWN))
    return markdown_line(str(named))


def _hexadecimal(text: str) -> str:
    """The first twelve digits of a hash, whatever a file holds in its place."""
    return re.sub(r"[^0-9A-Za-z]", "", text)[:12]


def _weights(run: StoredRun) -> str:
    backbone = run.results.get("backbone")
    if backbone is None or backbone["weights"] == "random":
        return "random"
    source = "" if backbone["weights"] == "pretrained" else " from a file"
    return f"`{_hexadecimal(backbone['weights_sha256'])}`{source}"


def _joined(values: Iterable[str]) -> str:
    return "; ".join(sorted(set(values))) or _UNKNOWN


def _details(rows: Rows) -> list[str]:
    """Weights, code, device, date and hours of the runs of a row."""
    environments = [environment for run in rows.runs for environment in _environments(run)]
    hours = sum(run.results["cost"]["seconds"] for run in rows.runs) / len(rows.runs) / 3600
    missing = [_UNKNOWN] * any(run.environment is None for run in rows.runs)
    return [
        _joined(map(_weights, rows.runs)),
        _joined([*map(_code, environments), *missing]),
        _joined([*map(_device, environments), *missing]),
        _joined([markdown_line(str(e["date"])) for e in environments if e.get("date")]),
        f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}",
    ]


_DETAILS = ("initial weights (SHA-256)", "code", "device", "date", "hours a run")


def _measured(found: Reproduced) -> list[str]:
    if not found.counting:
        return []
    ordered = [rows for method in found.config.methods for rows in found.of(method.name)]
    rows = [[_name(r), *_details(r)] for r in ordered]
    return ["Measured with:", "", *_markdown(["method", *_DETAILS], rows), ""]


def _other_settings(found: Reproduced) -> list[str]:
    if not found.others:
        return []
    tags = shown_figures(found.config)
    heads = ["method", *(f"`{tag}`{_given(found.config, tag)}" for tag in tags), "seeds", "what differs", "to declare"]
    rows = []
    for r in found.others:
        differs = "; ".join([*r.differs, *([r.note] if r.note else [])])
        listed = ", ".join(map(str, r.seeds))
        cells = [markdown_line(r.label), *map(r.measured, tags), f"{len(r.seeds)} ({listed})", markdown_line(differs)]
        rows.append([*cells, "; ".join(flags_of(r.runs)) or "-", *_details(r)])
    text = "Run with other settings, so neither a reproduction nor comparable with the table above:"
    return [text, "", *_markdown([*heads, *_DETAILS], rows), ""]


def results_text(runs: Sequence[StoredRun]) -> str:
    """The whole file as Markdown.

    Args:
        runs: see :func:`~avalanche_firn.experiments.reproduction.stored_runs`; their order doesn't matter.

    Raises:
        ConfigError: the same seed twice among runs that would be averaged.
    """
    papers, left_out = reproduce(runs)
    every = [found for recipes in papers.values() for found in recipes]
    done = sum(1 for found in every if found.counting)
    complete = sum(1 for found in every if all(found.of(method.name) for method in found.config.methods))
    count = f"Of {len(every)} recipes {done} have been run, {complete} of them with every method."
    opening = _OPENING.format(count=count, not_run=NOT_RUN, not_trained=NOT_TRAINED)
    lines = [opening.rstrip("\n"), ""]
    for heading, recipes in papers.items():
        lines += [f"## {heading}", ""]
        for found in recipes:
            config = found.config
            about = f"{config.benchmark or config.description}; `{backbone_of(config)}`. {cost_text(config)}."
            lines += [f"### {config.name}", "", about[0].upper() + about[1:], ""]
            lines += [*_comparison(found), *_measured(found), *_other_settings(found)]
    if left_out:
        lines += ["## Runs of no shipped recipe", "", *(f"- {reason}" for reason in sorted(left_out)), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def make_results(
    folders: Iterable[Path],
    *,
    output: Path | None = None,
    collect_to: Path | None = None,
    changed_code: bool = False,
    replace: bool = False,
) -> str:
    """What ``firn results`` does: collect runs if that is asked for, make the table, write it if there is a file.

    Args:
        folders: of runs or comparisons.
        output: file for the table; None = it is returned.
        collect_to: first copy what is kept of the runs there, then take all runs that are there.
        changed_code, replace: see :func:`~avalanche_firn.experiments.collected_runs.collect`.

    Returns:
        The table, or a line about the file.

    Raises:
        ConfigError: see :func:`~avalanche_firn.experiments.reproduction.stored_runs` and ``collect``; an output that is
            a folder or in none.
    """
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--output {output}: a file in a folder that exists is accepted")
    if collect_to is None and (changed_code or replace):
        raise ConfigError("--changed-code and --replace change what --collect does, which isn't given")
    if collect_to is not None:
        collect(folders, collect_to, changed_code=changed_code, replace=replace)
        folders = [collect_to]
    runs = stored_runs(folders)
    text = results_text(runs)
    if output is None:
        return text.rstrip("\n")
    write_text(output, text)
    return f"{output}: {len(runs)} finished run{'' if len(runs) == 1 else 's'}"
