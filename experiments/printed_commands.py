"""The runs of a comparison as commands, one for each, for a scheduler that isn't ours.

Each is a ``firn run`` with the overrides of the comparison, and may be given again: a finished run is kept, an
interrupted one goes on. Recipe, output and working folder are absolute, so it means the same from anywhere; a relative
path inside a recipe can't be made absolute, as it is a part of what the run is. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.recipe import find_recipe, list_recipes, parse
from avalanche_firn.experiments.run_folders import comparison_folder, plan_runs, run_folder
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["commands_text", "printed_commands"]


def printed_commands(
    source: str, overrides: Sequence[str], config: Config | TransferExperiment, *, quiet: bool = False
) -> dict[str, Any]:
    """The facts of the event ``commands``, see :mod:`~avalanche_firn.experiments.narration`.

    Args:
        source: recipe as it was given. overrides: ``key=value`` as they were given.
        config: what they stand for.
        quiet: whether the commands are to be quiet.

    Raises:
        ConfigError: the folder of a run belongs to another configuration.
    """
    output, folder = Path(config.output).absolute(), comparison_folder(config).absolute()
    plan: Any = plan_runs  # of either kind
    list(plan(config, folder, False))  # for what it refuses
    shipped = {recipe.name for recipe in list_recipes()}
    recipe = source if source in shipped else str(find_recipe(source).absolute())
    given = [word for word in overrides if word.partition("=")[0].strip() != "output"]  # --output says it
    last = ["--output", str(output), "--directory", os.getcwd(), *(["--quiet"] if quiet else [])]
    commands = []
    for who in _runs(config):
        words = ["firn", "run", recipe, f"method={_yaml(who['method'])}", f"seed={who['seed']}", *given, *last]
        place = run_folder(folder, who["method"], who["seed"])
        commands.append(who | {"folder": place, "command": shlex.join(words)})
    report = shlex.join(["firn", "report", str(folder), "--output", str(folder / "summary")])
    return {"folder": folder, "commands": commands, "report": report}


def commands_text(facts: dict[str, Any]) -> str:
    """One command per line, and a comment with the one that makes the table."""
    lines = [run["command"] for run in facts["commands"]]
    return "\n".join([*lines, f"# table and report, also before all runs are finished: {facts['report']}"])


def _yaml(label: str) -> str:
    """A label as a value of YAML; one that looks like a number needs quotes."""
    return label if parse(label) == label else json.dumps(label)


def _runs(config: Config | TransferExperiment) -> Iterator[dict[str, Any]]:
    """Method and seed of every run, in the order of the comparison."""
    for seed in config.seeds:
        for method in config.methods:
            yield {"method": method.name, "seed": seed}
