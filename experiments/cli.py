"""The ``firn`` command: compare, run, resume, report, results, export, recipes, check.

Exit status: 0 done, 1 a run failed, 2 wrong configuration or usage, 130 interrupted. What takes seconds to import
(torch, Avalanche) is imported inside the commands that train; a wrong recipe is answered before that.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.about_sections import target_problems
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, Problem, explain_keys, nearest
from avalanche_firn.experiments.recipe import copy_recipe, load_experiment, parse, read_recipe
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["build_parser", "main"]

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
_DEFAULT = "digits"
_EXPORTS = ("timm", "safetensors", "hub-folder")  # as in export_formats, which imports torch
_OVERRIDES = (
    "key=value changes the recipe; the value is YAML, a method is addressed by its name: training.epochs=3 "
    "seeds=[0,1] methods.slca.alignment.epochs=3 methods=[naive,slca]. Keys: firn recipes keys"
)


class _UsageError(Exception):
    """A command line that argparse can't judge by itself."""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``firn``."""
    parser = argparse.ArgumentParser(
        prog="firn",
        description="Compare continual-learning methods on pre-trained models.",
        epilog="Exit status: 0 done, 1 a run failed, 2 wrong configuration or usage, 130 interrupted.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=more or None)
        sub.set_defaults(run=run, words=[])
        return sub

    sub = command("compare", _compare, "train every method of a recipe with every seed and compare them", _OVERRIDES)
    sub.add_argument(
        "words", nargs="*", metavar="RECIPE|key=value", help=f"recipe name or file (default {_DEFAULT}), overrides"
    )
    _training_options(sub)

    sub = command("run", _run, "train one method with one seed", f"method=NAME seed=N choose the run. {_OVERRIDES}")
    sub.add_argument(
        "words", nargs="+", metavar="RECIPE|key=value", help="recipe name or file, method=NAME, seed=N, overrides"
    )
    _training_options(sub)

    sub = command("resume", _resume, "go on with an interrupted run or comparison, as if it had never stopped")
    sub.add_argument("folder", type=Path, help="folder of a run or of a comparison")
    sub.add_argument("--quiet", action="store_true", help="no progress bars, no line per experience")

    sub = command("report", _report, "print the table of finished runs and write their report")
    sub.add_argument("words", nargs="+", metavar="RUNS", help="folders of runs or comparisons")
    sub.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write the report (default: summary/ of a single comparison)",
    )

    sub = command(
        "results",
        _results,
        "set finished runs beside the figures that others report of the shipped recipes",
        "A run counts if its settings are the recipe's; others stand apart with what differs.",
    )
    sub.add_argument("words", nargs="*", metavar="RUNS", help="folders of runs or comparisons")
    sub.add_argument("--output", type=Path, metavar="FILE", help="write the table there, as Markdown (default: print)")
    sub.add_argument(
        "--collect", type=Path, metavar="DIR", help="first copy what is kept of RUNS to DIR, then take all runs in DIR"
    )
    sub.add_argument("--changed-code", action="store_true", help="collect also runs of code that wasn't committed")
    sub.add_argument("--replace", action="store_true", help="collect also over another run that is there already")

    sub = command("export", _export, "write the final model of a finished run for use elsewhere")
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a finished run")
    sub.add_argument(
        "--format",
        required=True,
        choices=_EXPORTS,
        help="timm: a state dict for timm.create_model; safetensors: all modules, for "
        "avalanche_firn.experiments.export.load_exported; hub-folder: weights, config.json and model card",
    )
    sub.add_argument("--output", type=Path, metavar="PATH", help="what to write (default: below RUN/export/)")
    sub.add_argument(
        "--task", type=int, metavar="K", help="lorac_ipc: the weights after task K (1 = first), without task inference"
    )
    sub.add_argument("--force", action="store_true", help="replace an export that is there already")

    sub = command(
        "recipes",
        _recipes,
        "list, show or copy the shipped recipes, or list all configuration keys",
        "ls: methods, benchmark, backbone, memory and hours of a run, and the best figure that others report.",
    )
    sub.add_argument("action", nargs="?", default="ls", choices=("ls", "show", "copy", "keys"), help="default: ls")
    sub.add_argument("name", nargs="?", help="recipe, for show and copy")
    sub.add_argument("target", nargs="?", help="file or folder to copy to (default: NAME.yaml here)")
    sub.add_argument("--long", action="store_true", help="ls: also descriptions and all figures that others report")

    sub = command(
        "check", _check, "validate a recipe, its data, weights and device, without writing anything", _OVERRIDES
    )
    sub.add_argument("words", nargs="+", metavar="RECIPE|key=value", help="recipe name or file, overrides")
    sub.add_argument(
        "--dry-run", action="store_true", help="also train two steps of every method on random data of the true shape"
    )
    sub.add_argument(
        "--no-data",
        action="store_true",
        help="read neither data nor weights, which may be elsewhere: the tasks follow from the recipe",
    )
    return parser


def _training_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--output", metavar="DIR", help="write to DIR/NAME, NAME being the recipe's name (same as output=DIR)"
    )
    sub.add_argument("--fresh", action="store_true", help="delete what earlier calls left of these runs and start over")
    sub.add_argument("--quiet", action="store_true", help="no progress bars, no line per experience; the table stays")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit status."""
    parser = build_parser()
    try:
        # argparse can't mix options between two groups of positionals: what it leaves over goes to `words`
        arguments, rest = parser.parse_known_args(argv)
        if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.words = [*arguments.words, *rest]
        status: int = arguments.run(arguments)
        return status
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    except _UsageError as error:
        print(f"firn: {error}", file=sys.stderr)
        return WRONG
    except ConfigError as error:
        print(f"firn: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("firn: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (held until the process ends)
        return OK


def _recipe_and_overrides(words: Sequence[str], default: str | None) -> tuple[str, list[str]]:
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise _UsageError(f"one recipe is accepted, found {', '.join(names)}")
    if not names and default is None:
        raise _UsageError("no recipe given; firn recipes ls lists them")
    return (names[0] if names else str(default)), [word for word in words if "=" in word]


def _loaded(arguments: argparse.Namespace, default: str | None = None) -> Config | TransferExperiment:
    source, overrides = _recipe_and_overrides(arguments.words, default)
    if getattr(arguments, "output", None) is not None:
        overrides.append(f"output={arguments.output!r}")
    return load_experiment(source, overrides)


def _calm() -> None:
    """Silence what imports of others print about solvers and deprecations that don't concern a run."""
    for message in ("no QP solver found", "Importing from timm.models", "Call to deprecated function"):
        warnings.filterwarnings("ignore", message=message)


def _train(work: Callable[[], None], folder: Path) -> int:
    """Run `work` and turn its end into an exit status with a word on how to go on."""
    from avalanche_firn.plugins.checkpoint_files import CheckpointError

    try:
        work()
    except ConfigError:
        raise
    except CheckpointError as error:
        print(f"firn: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\nfirn: interrupted; go on with: firn resume {folder}", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print(f"firn: a run failed; after fixing the cause go on with: firn resume {folder}", file=sys.stderr)
        return FAILED
    return OK


def _compared(config: Config | TransferExperiment, **options: Any) -> Any:
    """Either kind of comparison."""
    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_comparison import compare_transfers

        return compare_transfers(config, **options)
    from avalanche_firn.experiments.comparison import compare

    return compare(config, **options)


def _compare(arguments: argparse.Namespace) -> int:
    config = _loaded(arguments, _DEFAULT)
    _calm()
    from avalanche_firn.experiments.run_folders import comparison_folder

    return _train(
        lambda: _shown(_compared(config, fresh=arguments.fresh, quiet=arguments.quiet)), comparison_folder(config)
    )


def _shown(comparison: object) -> None:
    print(comparison)


def _run(arguments: argparse.Namespace) -> int:
    chosen = {"method": None, "seed": None}
    rest = []
    for word in arguments.words:
        key, sign, value = word.partition("=")
        if sign and key in chosen:
            chosen[key] = parse(value, source=word)
        else:
            rest.append(word)
    arguments.words = rest
    config = _loaded(arguments)
    _calm()
    method, seed = _one(config, chosen["method"], chosen["seed"])
    from avalanche_firn.experiments.run_folders import comparison_folder, run_folder

    single = config.single(method, seed)
    folder = run_folder(comparison_folder(config), method, seed)
    work = lambda: _shown(_compared(single, fresh=arguments.fresh, quiet=arguments.quiet, summary=False))  # noqa: E731
    return _train(work, folder)


def _one(config: Config | TransferExperiment, method: object, seed: object) -> tuple[str, int]:
    """The method and seed of `firn run`; a single one in the recipe needs no choice."""
    labels = [m.name for m in config.methods]
    problems = []
    if method is None and len(labels) == 1:
        method = labels[0]
    if method not in labels:
        reason = "missing" if method is None else f"{method!r} isn't in the recipe"
        close = nearest(str(method), labels)
        problems.append(
            Problem("method", reason, f"one of {', '.join(labels)}", f"did you mean {close}?" if close else "")
        )
    if seed is None:
        seed = config.seeds[0]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        problems.append(Problem("seed", f"{seed!r} isn't accepted", "a whole number, at least 0, less than 4294967296"))
    if problems:
        raise ConfigError(problems)
    assert isinstance(seed, int)
    return str(method), seed


def _resume(arguments: argparse.Namespace) -> int:
    if arguments.words:
        raise _UsageError(f"one folder is accepted, found {', '.join(map(str, [arguments.folder, *arguments.words]))}")
    file = arguments.folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{arguments.folder} holds no config.yaml; give the folder of a run or of a comparison")
    config = load_experiment(file)
    _calm()
    return _train(lambda: _shown(_resumed(config, arguments.folder, arguments.quiet)), arguments.folder)


def _resumed(config: Config | TransferExperiment, folder: Path, quiet: bool) -> Any:
    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_comparison import resume_transfers

        return resume_transfers(config, folder, quiet=quiet)
    from avalanche_firn.experiments.comparison import resume

    return resume(config, folder, quiet=quiet)


def _report(arguments: argparse.Namespace) -> int:
    from avalanche_firn.experiments.results import find_runs

    folders = [Path(word) for word in arguments.words]
    if any(run.get("experiment") == "transfer" for run in find_runs(folders)):
        from avalanche_firn.experiments.transfer_comparison import report_transfers

        print(report_transfers(folders, arguments.output))
        return OK
    from avalanche_firn.experiments.report import report_folders

    print(report_folders(folders, arguments.output))
    return OK


def _results(arguments: argparse.Namespace) -> int:
    _calm()
    from avalanche_firn.experiments.reproduction_text import make_results

    chosen = {"collect_to": arguments.collect, "changed_code": arguments.changed_code, "replace": arguments.replace}
    print(make_results([Path(word) for word in arguments.words], output=arguments.output, **chosen))
    return OK


def _export(arguments: argparse.Namespace) -> int:
    if arguments.words:
        raise _UsageError(f"one run is accepted, found {', '.join(map(str, [arguments.folder, *arguments.words]))}")
    _calm()
    from avalanche_firn.experiments.export import describe_export, export_run

    written = export_run(
        arguments.folder, arguments.format, output=arguments.output, task=arguments.task, force=arguments.force
    )
    print(describe_export(written))
    return OK


def _recipes(arguments: argparse.Namespace) -> int:
    action, name = arguments.action, arguments.name
    if action in ("show", "copy") and name is None:
        raise _UsageError(f"recipes {action} needs a recipe; firn recipes ls lists them")
    if action == "ls":
        from avalanche_firn.experiments.recipe_table import recipes_text

        terminal = sys.stdout.isatty()
        print(recipes_text(long=arguments.long, width=shutil.get_terminal_size().columns if terminal else None))
    elif action == "show":
        print(read_recipe(name), end="")
    elif action == "copy":
        print(f"copied to {copy_recipe(name, arguments.target)}")
    else:
        for title, schema in (("a comparison on a stream", Config), ("a transfer experiment", TransferExperiment)):
            print(f"# keys of {title}")
            for key, accepted, text in explain_keys(schema):
                print(f"{key}: {accepted}\n    {text}")
    return OK


def _check(arguments: argparse.Namespace) -> int:
    config = _loaded(arguments)
    if not any(word.startswith("methods=") for word in arguments.words):  # a selection leaves figures of others behind
        problems = target_problems(config)
        if problems:
            raise ConfigError(problems, source=_recipe_and_overrides(arguments.words, None)[0])
    _calm()
    if isinstance(config, TransferExperiment):
        return _check_transfer(config, arguments)
    from avalanche_firn.experiments.dry_run import dry_run, outline
    from avalanche_firn.experiments.resources import prepare

    print(outline(config) if arguments.no_data else prepare(config))
    if arguments.dry_run:
        for line in dry_run(config, data=not arguments.no_data):
            print(line, flush=True)
    return OK


def _check_transfer(config: TransferExperiment, arguments: argparse.Namespace) -> int:
    from avalanche_firn.experiments.transfer_comparison import (
        dry_run_transfers,
        outline_transfers,
        prepare_transfers,
    )

    print(outline_transfers(config) if arguments.no_data else prepare_transfers(config))
    if arguments.dry_run:
        for line in dry_run_transfers(config, data=not arguments.no_data):
            print(line, flush=True)
    return OK


if __name__ == "__main__":
    sys.exit(main())
