"""The argument parser of ``firn``: commands, options and their help. What they do: :mod:`.cli`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

__all__ = ["DEFAULT_RECIPE", "EXPORTS", "Parser", "build_parser"]

DEFAULT_RECIPE = "digits"
EXPORTS = ("timm", "safetensors", "hub-folder")  # as in export_formats, which imports torch
_STATUS = "Exit status: 0 done, 1 a run failed, 2 wrong configuration or usage, 130 interrupted (Ctrl-C or SIGTERM)."
_OVERRIDES = (
    "key=value changes the recipe; the value is YAML, a method is addressed by its name: training.epochs=3 "
    "seeds=[0,1] methods.slca.alignment.epochs=3 methods=[naive,slca]. Keys: firn recipes keys"
)
_JSON = (
    "one JSON object per line on standard output, and nothing else there: events start, run_started, experience, "
    "run_finished, comparison_finished (the table and the report's files), interrupted, failed, error"
)


class Parser(argparse.ArgumentParser):
    """Keeps the message of a wrong command line, for a caller that reports it in another form."""

    wrong = ""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, exit with 2."""
        Parser.wrong = message
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``firn``."""
    parser = Parser(
        prog="firn",
        description="Compare continual-learning methods on pre-trained models.",
        epilog=_STATUS,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=more or None)
        sub.set_defaults(command=name, words=[])
        return sub

    sub = command("compare", "train every method of a recipe with every seed and compare them", _OVERRIDES)
    sub.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE|key=value",
        help=f"recipe (default {DEFAULT_RECIPE}), overrides",
    )
    _training_options(sub)
    _place_options(sub)
    sub.add_argument(
        "--print-commands",
        action="store_true",
        help="train nothing: print one command per run, for job arrays and other schedulers; each may be given again",
    )

    sub = command("run", "train one method with one seed", f"method=NAME seed=N choose the run. {_OVERRIDES}")
    sub.add_argument(
        "words", nargs="+", metavar="RECIPE|key=value", help="recipe name or file, method=NAME, seed=N, overrides"
    )
    _training_options(sub)
    sub.add_argument("--directory", metavar="DIR", help="work from there: where relative paths begin (default: here)")

    sub = command(
        "resume",
        "go on with an interrupted run or comparison, as if it had never stopped",
        "key=value changes how it computes, and not what it is: performance.accumulate=4 (with too little memory), "
        "performance.memory=off, training.num_workers=0, training.eval_batch_size, device, threads, checkpoint.every "
        "and so on. What may change figures is declared in the results.",
    )
    sub.add_argument("folder", type=Path, help="folder of a run or of a comparison")
    sub.add_argument("words", nargs="*", metavar="key=value", help="settings to go on with")
    _place_options(sub)
    _telling_options(sub)

    sub = command(
        "report",
        "print the table of finished runs and write their report",
        "Also while runs go on: those that aren't finished are listed with what they have shown so far.",
    )
    sub.add_argument("words", nargs="+", metavar="RUNS", help="folders of runs or comparisons")
    sub.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write the report (default: summary/ of a single comparison)",
    )
    sub.add_argument("--json", action="store_true", help="one JSON object: figures by method, files of the report")

    sub = command(
        "dashboard",
        "open TensorBoard on runs, with the charts of the comparison",
        "Reachable from this computer only. Ctrl-C ends it.",
    )
    sub.add_argument("words", nargs="+", metavar="RUNS", help="folders of runs or comparisons")
    sub.add_argument("--port", type=_port, metavar="N", help="port to listen on (default: a free one)")
    sub.add_argument("--no-browser", action="store_true", help="print the address and open nothing")

    sub = command(
        "results",
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

    sub = command("export", "write the final model of a finished run for use elsewhere")
    sub.add_argument("folder", type=Path, metavar="RUN", help="folder of a finished run")
    sub.add_argument(
        "--format",
        required=True,
        choices=EXPORTS,
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
        "list, show or copy the shipped recipes, or list all configuration keys",
        "ls: methods, benchmark, backbone, memory and hours of a run, and the best figure that others report.",
    )
    sub.add_argument("action", nargs="?", default="ls", choices=("ls", "show", "copy", "keys"), help="default: ls")
    sub.add_argument("name", nargs="?", help="recipe, for show and copy")
    sub.add_argument("target", nargs="?", help="file or folder to copy to (default: NAME.yaml here)")
    sub.add_argument("--long", action="store_true", help="ls: also descriptions and all figures that others report")

    sub = command("check", "validate a recipe, its data, weights and device, without writing anything", _OVERRIDES)
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
    _telling_options(sub)


def _place_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--on",
        default="local",
        metavar="PLACE",
        help="local: here, one run after the other (default); ray: runs at the same time on the Ray cluster that "
        "RAY_ADDRESS names, or that ray start began on this machine, or a new one here; ray://HOST:PORT: on a cluster "
        "through its client server. All machines must see the folder of the runs. Needs avalanche-firn[ray]",
    )
    sub.add_argument(
        "--gpus-per-run",
        type=_number,
        metavar="X",
        help="with --on ray: share of a GPU for each run, 0 to 1 (default: 1 where the device is cuda, or auto and the "
        "cluster has GPUs)",
    )
    sub.add_argument(
        "--cpus-per-run",
        type=_count,
        metavar="N",
        help="with --on ray: CPU cores that a run is given room for; changes no result (default: threads or "
        "training.num_workers of the recipe, whichever is more; without threads 1 beside a GPU, else what torch uses "
        "here)",
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} isn't accepted; a number from 0 to 1") from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise argparse.ArgumentTypeError(f"{text!r} isn't accepted; a whole number, at least 1")
    return int(text)


def _telling_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quiet", action="store_true", help="no progress bars, no line per experience; the table stays")
    sub.add_argument("--json", action="store_true", help=_JSON)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} isn't accepted; a port is a whole number from 1 to 65535")
    return int(text)
