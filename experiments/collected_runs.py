"""Finished runs for the project's own history: small, without anything that tells whose machine they ran on.

A run's folder holds megabytes of curves and weights. What the table of reproductions and a report need fits a few
kilobytes: ``results.json`` without what was measured inside the tasks, ``environment.json`` without the machine,
``config.yaml`` without places. They are copied to FOLDER/RECIPE/METHOD/seed-S, to be committed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import dump, parse, read_recipe
from avalanche_firn.experiments.reproduction import StoredRun, reproduce, stored_runs
from avalanche_firn.experiments.results import FILE, write_text

__all__ = ["collect", "compact_results", "portable", "portable_environment"]

_PLACES = ("root", "dataset_root", "data_dir", "weights", "test_class_list", "split_files", "output")
"""Keys whose values are paths, in a configuration and in results."""
_SAID = ("benchmark", "cost", "targets")
"""Said by the shipped recipe, which may say more by now."""
_INSIDE = ("dynamics", "contrastive_bound")
"""What was measured inside the tasks: as long as the training, and not part of any table of the project."""
_ENVIRONMENT = ("python", "platform", "packages", "git_commit", "device", "backbone", "date")
_DEVICE = ("type", "name", "memory_MiB", "cuda", "cpus", "threads")
_MACHINES = r"x86_64|amd64|AMD64|aarch64|arm64|ppc64le|riscv64"


def collect(folders: Iterable[Path], target: Path, *, changed_code: bool = False, replace: bool = False) -> list[Path]:
    """Copy what the project keeps of finished runs. All runs are looked at before the first file is written.

    Args:
        folders: of runs or comparisons.
        target: such as ``docs/results``; made if needed. Runs of a shipped recipe go to RECIPE/METHOD/seed-S, runs with
            other settings to RECIPE/METHOD/other-DIGEST/seed-S.
        changed_code: also runs of code with changes that were not committed.
        replace: overwrite a run that is there already with other content.

    Returns:
        The folders written, also those that held the same already.

    Raises:
        ConfigError: no finished run, one without ``environment.json``, of changed code, with a configuration that this
            version can't read, or whose place is taken.
    """
    runs = stored_runs(folders)
    if not runs:
        raise ConfigError("no finished run to collect; give folders of runs or comparisons")
    problems, files = [], {}
    places = _destinations(runs)
    for run in runs:
        problem = _refused(run, changed_code=changed_code)
        if problem is None:
            place = target / places[run.folder]
            content = _content(run)
            differs = [n for n, text in content.items() if (place / n).exists() and _bytes(place / n) != text.encode()]
            if differs and not replace:
                problem = f"{place} holds another run already ({', '.join(differs)} differ); replace it knowingly"
            elif place in files:
                problem = f"{run.folder} would go to {place} as another run does; give one of them"
            files[place] = content
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConfigError(problems[0] + (f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""))
    for place, content in files.items():
        place.mkdir(parents=True, exist_ok=True)
        for name in sorted(content, key=lambda name: name == FILE):  # last: where it is, the rest is
            write_text(place / name, content[name])
    return sorted(files)


def _bytes(file: Path) -> bytes | None:
    """What is in a file; None where it can't be read."""
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError:
        return None


def _refused(run: StoredRun, *, changed_code: bool) -> str | None:
    if run.environment is None:
        return f"{run.folder} holds no environment.json, so the code and the device of the run aren't known"
    if run.config is None:
        return f"{run.folder}/config.yaml: this version can't read it"
    commits = [str(e.get("git_commit") or "") for e in (run.environment, *run.environment.get("resumed_in", []))]
    if any(commit.endswith("+changes") for commit in commits) and not changed_code:
        return f"{run.folder} was run from code with uncommitted changes; run it from a commit, or allow it knowingly"
    return None


def _destinations(runs: list[StoredRun]) -> dict[Path, Path]:
    """Below the target, by the folder of a run."""
    papers, _ = reproduce(runs)
    found = {}
    for recipe in (recipe for recipes in papers.values() for recipe in recipes):
        for rows in (*recipe.counting, *recipe.others):
            for run in rows.runs:
                other = [f"other-{run.results['group_digest'][:8]}"] if rows.differs else []
                found[run.folder] = Path(recipe.config.name, run.label, *other, f"seed-{run.seed}")
    for run in runs:
        own = Path(str(run.results["recipe"]), run.label, f"other-{run.results['group_digest'][:8]}")
        found.setdefault(run.folder, own / f"seed-{run.seed}")
    return found


def _content(run: StoredRun) -> dict[str, str]:
    config = parse(read_recipe(run.folder / "config.yaml"), source=str(run.folder / "config.yaml"))
    kept = portable({key: value for key, value in config.items() if key not in _SAID}) | {"output": "runs"}
    environment = portable_environment(run.environment or {})
    return {
        FILE: _json(compact_results(run.results)),
        "environment.json": json.dumps(environment, indent=2, allow_nan=False) + "\n",
        "config.yaml": dump(kept),
    }


def _json(values: Mapping[str, Any]) -> str:
    """A line per key, so that a change of one shows as one."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# ---------------------------------------------------------- what is left out
def _last(path: str) -> str:
    """The last part of a path of either kind of system."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or "."


def _absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("~/", "~\\"))


def portable(value: Any, key: str = "") -> Any:
    """Plain values in which of every path only the last part is left.

    Args:
        value: plain values, such as a configuration.
        key: under which it stands: under some keys every text is a path, under others absolute paths alone are.
    """
    if isinstance(value, Mapping):
        return {name: portable(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [portable(item, key) for item in value]
    if isinstance(value, str) and (key in _PLACES or _absolute(value)):
        return _last(value)
    return value


def portable_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, code and kind of device; nothing else that an environment may say, and of the system its kind alone."""
    kept = {key: environment[key] for key in _ENVIRONMENT if key in environment}
    if "platform" in kept:
        system = re.match(r"[A-Za-z]+", str(kept["platform"]))
        machine = re.search(_MACHINES, str(kept["platform"]))
        kept["platform"] = "-".join(part.group() for part in (system, machine) if part)
    if "device" in kept:
        kept["device"] = {key: kept["device"][key] for key in _DEVICE if key in kept["device"]}
    if "resumed_in" in environment:
        kept["resumed_in"] = [portable_environment(later) for later in environment["resumed_in"]]
    return {key: portable(value, key) for key, value in kept.items()}


def compact_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without what was measured inside the tasks; figures, matrices, curves over the tasks and cost stay."""
    kept = {key: None if key in _INSIDE else value for key, value in results.items()}
    if "curves" in kept:
        tasks = len(results["stream"]["task_sizes"])
        kept["curves"] = {tag: curve for tag, curve in results["curves"].items() if len(curve) <= tasks}
    return {key: portable(value, key) for key, value in kept.items()}
