"""What a report says about how its runs were made: settings, versions, and the commands that repeat them.

Settings come from each run's ``config.yaml``, versions from its ``environment.json``; runs whose files aren't there
(results that were copied alone) just have no such part. Files are read as they are, not validated: a report may be made
by a later version than its runs.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from avalanche_firn.experiments.recipe import parse, read_recipe
from avalanche_firn.experiments.report_parts import Block, Code, DataTable, Folded, Section, Text
from avalanche_firn.experiments.results_form import read_environment

__all__ = ["Made", "made_from", "repeat_section", "settings_section", "versions_section"]

_SAID = ("name", "description", "benchmark", "cost", "targets", "output", "seeds")
"""Keys of a configuration that decide nothing about a run's figures."""
_WIDE = 44  # letters of a value in a table; longer ones end in dots (the whole YAML is below). Our choice


class Made:
    """One line of the tables: its label, and of each of its runs the seed and the folder (None where there is none)."""

    def __init__(self, label: str, method: str, runs: Sequence[tuple[int, Path | None]]) -> None:
        self.label, self.method, self.runs = label, method, list(runs)
        self.texts = [text for _, folder in self.runs if (text := _text(folder, "config.yaml")) is not None][:1]

    @property
    def folders(self) -> list[Path]:
        """Of the runs that have one."""
        return [folder for _, folder in self.runs if folder is not None]

    def settings(self) -> dict[str, str] | None:
        """The configuration, flat: ``a.b.c`` -> text; those of the method begin with ``method.``. None without one.

        Raises:
            ConfigError: a ``config.yaml`` that isn't YAML.
        """
        if not self.texts:
            return None
        raw = parse(self.texts[0], source=f"config.yaml of {self.label}")
        if not isinstance(raw, Mapping):
            return None
        methods = raw.get("methods")
        own = methods[0] if isinstance(methods, list) and methods else {}
        shared = {key: value for key, value in raw.items() if key not in (*_SAID, "methods")}
        return _flat(shared) | _flat(own if isinstance(own, Mapping) else {}, "method.")


class _Group(Protocol):
    """What a line of a table is made of; both kinds of groups are."""

    @property
    def seeds(self) -> list[int]: ...
    @property
    def runs(self) -> tuple[dict[str, Any], ...]: ...


def made_from(label: str, group: _Group, folders: Sequence[Path | None]) -> Made:
    """The line of a group."""
    return Made(label, str(group.runs[0]["method"]), list(zip(group.seeds, folders, strict=True)))


def _text(folder: Path | None, name: str) -> str | None:
    return None if folder is None or not (folder / name).is_file() else read_recipe(folder / name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                found |= _flat(item if isinstance(item, Mapping) else {"": item}, f"{prefix}{key}[{place}].")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False, default=str).strip('"')
    return found


# ---------------------------------------------------------------------- settings
def settings_section(made: Sequence[Made]) -> Section:
    """What differs between the methods, what only one of them has, what all share, and whole configurations to open."""
    known = {one.label: found for one in made if (found := one.settings()) is not None}
    if not known:
        return Section("Settings")
    keys = list(dict.fromkeys(key for found in known.values() for key in found))
    keys = [key for key in keys if any(found.get(key, _NONE) != _NONE for found in known.values())]
    keys = [key for key in keys if key != "method.name"]
    same = [key for key in keys if len({_cell(key, found) for found in known.values()}) == 1]
    having = {key: [label for label, found in known.items() if _cell(key, found) != "-"] for key in keys}
    alone = [key for key in keys if len(having[key]) == 1 < len(known)]
    blocks: list[Block] = []
    rows = [[key, *(_cell(key, found) for found in known.values())] for key in keys if key not in (*same, *alone)]
    if rows:
        note = "A dash: the method has no such setting. As shared: what stands under the same name without method."
        blocks.append(DataTable("What differs between the methods", ["setting", *known], rows, note))
    for label, found in known.items():
        own = [[key, _cell(key, found)] for key in alone if having[key] == [label]]
        if own:
            title = f"What only {label} has ({len(own)} settings)"
            blocks.append(Folded(title, [DataTable(title, ["setting", "value"], own)], printed=True))
    rows = [[key, _cell(key, next(iter(known.values())))] for key in same]
    if rows:
        title = f"What all runs share ({len(rows)} settings)" if len(known) > 1 else f"All settings ({len(rows)})"
        blocks.append(Folded(title, [DataTable(title, ["setting", "value"], rows)], printed=True))
    whole = [Folded(f"{one.label}, seed {one.runs[0][0]}", [Code(one.texts[0])]) for one in made if one.texts]
    blocks.append(Folded("Whole configurations (config.yaml)", whole))
    return Section("Settings", blocks)


_NONE = "null"


def _cell(key: str, found: Mapping[str, str]) -> str:
    """A setting of a method; those of its own training fall back to the shared ones of the same name."""
    value = found.get(key)
    if key.startswith("method.training.") and value in (None, _NONE):
        return "as shared" if key.removeprefix("method.") in found else "-"
    return "-" if value is None else _shorter(value)


def _shorter(value: str) -> str:
    return value if len(value) <= _WIDE else value[: _WIDE - 3] + "..."


# ---------------------------------------------------------------------- versions
def versions_section(made: Sequence[Made]) -> Section:
    """Packages, code and devices; where runs differ, how many had which."""
    found: dict[str, dict[str, int]] = {}
    count = 0
    for folder in (folder for one in made for folder in one.folders):
        raw = read_environment(folder / "environment.json")
        if raw is None:
            continue
        count += 1
        for name, value in _described(raw).items():
            found.setdefault(name, {}).setdefault(value, 0)
            found[name][value] += 1
    if not found:
        return Section("Versions and devices")
    rows = []
    for name, values in found.items():
        told = [f"{value} ({times} of {count} runs)" for value, times in values.items()]
        rows.append([name, next(iter(values)) if list(values.values()) == [count] else ", ".join(told)])
    return Section("Versions and devices", [DataTable("What the runs ran on", ["what", "of the runs"], rows)])


def _described(raw: Mapping[str, Any]) -> dict[str, str]:
    """The lines of the table that an ``environment.json`` gives."""
    flat: dict[str, Any] = {"day (UTC)": raw.get("date"), "code (git commit)": raw.get("git_commit")}
    device = raw.get("device")
    if isinstance(device, Mapping):
        told = [str(device.get("name") or device.get("type"))]
        told += [f"{unit} {device[key]}" for key, unit in _DEVICE if device.get(key) is not None]
        flat["device"] = ", ".join(told)
    flat |= {"python": raw.get("python"), "platform": raw.get("platform")}
    packages = raw.get("packages")
    flat |= dict(packages) if isinstance(packages, Mapping) else {}
    backbone = raw.get("backbone")
    if isinstance(backbone, Mapping):
        flat["backbone"] = f"{backbone.get('tag')}, {backbone.get('weights')}"
        flat["weights, SHA-256"] = backbone.get("weights_sha256")
    return {name: str(value) for name, value in flat.items() if value is not None}


_DEVICE = (("memory_MiB", "memory in MiB"), ("cuda", "CUDA"), ("cpus", "CPU cores"), ("threads", "threads"))


# ---------------------------------------------------------------------- commands
def repeat_section(made: Sequence[Made], report: Path, unfinished: Sequence[Path] = ()) -> Section:
    """Commands that train the same again, all or one of them, that go on with what isn't finished, and this report.

    Args:
        made: the lines of the report. report: its folder. unfinished: folders of runs that aren't finished.
    """
    folders = [folder for one in made for folder in one.folders]
    tops = _tops(folders)
    single = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    blocks: list[Block] = []
    if tops:
        words = "The whole comparison again, in a folder of its own (in the old one finished runs are kept):"
        lines = [f"firn compare {_word(top / 'config.yaml')} --output again" for top in tops]
        blocks += [Text(words), Code("\n".join(lines))]
    if tops and made and made[0].folders:
        one, seed = made[0], made[0].runs[0][0]
        top = _comparison(one.folders[0]) or tops[0]
        chosen = f"method={shlex.quote(one.method)} seed={seed}"
        blocks += [
            Text("One method and seed of it:"),
            Code(f"firn run {_word(top / 'config.yaml')} {chosen} --output again"),
        ]
    elif single is not None:
        runs = [folder for folder in folders if (folder / "config.yaml").is_file()]
        lines = [f"firn run {_word(folder / 'config.yaml')} --output again" for folder in runs[:_MANY]]
        if len(runs) > _MANY:
            lines.append(f"# ... and {len(runs) - _MANY} more: firn run RUN/config.yaml --output again")
        blocks += [Text("A run again, in a folder of its own:"), Code("\n".join(lines))]
    if unfinished:
        going = list(dict.fromkeys(_comparison(folder) or folder for folder in unfinished))
        lines = [f"firn resume {_word(folder)}" for folder in going]
        blocks += [Text("Go on with what isn't finished, as if it had never stopped:"), Code("\n".join(lines))]
    if folders or unfinished:
        tops = _tops([*folders, *unfinished])
        shown = tops or list(dict.fromkeys(folder.parent for folder in [*folders, *unfinished]))
        words = " ".join(_word(folder) for folder in shown[:_MANY]) + (" ..." if len(shown) > _MANY else "")
        usual = len(tops) == 1 and report.resolve() == (tops[0] / "summary").resolve()
        words += "" if usual else f" --output {_word(report)}"
        blocks += [Text("This report, from the files of the runs:"), Code(f"firn report {words}")]
    return Section("How to repeat it", blocks)


_MANY = 8  # commands of a kind that are written out


def _tops(folders: Sequence[Path]) -> list[Path]:
    """The comparisons that runs belong to, each once."""
    return list(dict.fromkeys(top for folder in folders if (top := _comparison(folder)) is not None))


def _comparison(folder: Path) -> Path | None:
    """The folder of the comparison that a run belongs to: FOLDER/METHOD/seed-S with a ``config.yaml`` of its own."""
    top = folder.parent.parent
    return top if (top / "config.yaml").is_file() and folder.name.startswith("seed-") else None


def _word(path: Path) -> str:
    """A path for a command line, from the working directory where it lies below it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute))
