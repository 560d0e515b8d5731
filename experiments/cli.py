"""The ``firn`` command: compare, run, resume, report, dashboard, results, export, recipes, check.

Exit status: 0 done, 1 a run failed, 2 wrong configuration or usage, 130 interrupted (Ctrl-C or SIGTERM). What takes
seconds to import (torch, Avalanche) is imported inside the commands that train; a wrong recipe is answered before that.
With ``--json`` standard output has one JSON object per line and nothing else, see
:mod:`~avalanche_firn.experiments.narration`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.about_sections import target_problems
from avalanche_firn.experiments.cli_parser import DEFAULT_RECIPE, EXPORTS, Parser, build_parser
from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError, Problem, explain_keys, nearest
from avalanche_firn.experiments.escapes import visible
from avalanche_firn.experiments.narration import (
    JsonNarrator,
    TextNarrator,
    error_facts,
    report_files,
    resume_command,
    stopped_text,
)
from avalanche_firn.experiments.places import RayPlace, place_of
from avalanche_firn.experiments.recipe import copy_recipe, load_experiment, parse, read_recipe
from avalanche_firn.experiments.transfer_config import TransferExperiment

__all__ = ["build_parser", "main"]

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
_EXPORTS = EXPORTS


class _UsageError(Exception):
    """A command line that argparse can't judge by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser, output = build_parser(), sys.stdout
    if _follows():
        return _follow(parser, words)
    scripted = JsonNarrator(lambda line: print(line, file=output, flush=True)) if "--json" in words else None
    try:
        # argparse can't mix options between two groups of positionals: what it leaves over goes to `words`
        arguments, rest = parser.parse_known_args(words)
        if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.words = [*arguments.words, *rest]
        if getattr(arguments, "json", False) and scripted is None:  # argparse takes --js for it too
            scripted = JsonNarrator(lambda line: print(line, file=output, flush=True))
        arguments.scripted = scripted
        with contextlib.redirect_stdout(sys.stderr) if scripted else contextlib.nullcontext():
            return _COMMANDS[arguments.command](arguments)
    except SystemExit as stop:  # argparse has printed its message
        if stop.code and scripted:
            scripted.tell("error", message=Parser.wrong, problems=[])
        return int(stop.code or 0)
    except (_UsageError, ConfigError) as error:
        if scripted:
            scripted.tell("error", **error_facts(error))
        print(f"firn: {visible(str(error))}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        if scripted and not scripted.ended:
            scripted.tell("error", message="interrupted", problems=[])
        print("firn: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (held until the process ends)
        return OK
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            if scripted and not scripted.ended:
                scripted.tell("error", **error_facts(error))
            print(f"firn: {visible(str(error))}", file=sys.stderr)
            return WRONG
        outside = _from_outside(error)
        if scripted and not scripted.ended:
            scripted.tell("error", **error_facts(outside or RuntimeError(f"{type(error).__name__}: {error}")))
        if outside is None:
            raise
        print(f"firn: {visible(str(outside))}", file=sys.stderr)
        return FAILED


def _follows() -> bool:
    """Whether this is one of the processes of ``torchrun`` that write nothing: all but the first."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def _follow(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Take part in what the first process does; it tells of all but errors that are this process's own."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            with contextlib.redirect_stderr(nowhere):
                arguments, rest = parser.parse_known_args(words)
            arguments.words, arguments.scripted, arguments.quiet = [*arguments.words, *rest], None, True
            if arguments.command not in ("compare", "run", "resume"):
                return OK
            return _COMMANDS[arguments.command](arguments)
        except SystemExit as stop:
            return int(stop.code or 0)
        except (_UsageError, ConfigError):
            return WRONG
        except KeyboardInterrupt:
            return INTERRUPTED


@contextlib.contextmanager
def _joined(config: Config | TransferExperiment) -> Iterator[None]:
    """Inside, the processes of ``torchrun`` work together; alone, nothing happens."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if isinstance(config, TransferExperiment):
        raise ConfigError(
            "a transfer experiment learns image by image, which several processes can't share; without torchrun, "
            "firn compare does its runs one after the other, and --print-commands gives one command per run"
        )
    from avalanche_firn.plugins.process_group import end_processes, start_processes

    try:
        start_processes(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    yield
    end_processes()  # not after an error: torchrun ends the others


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
        overrides.append(f"output={json.dumps(arguments.output)}")  # as YAML takes it, whatever is in the name
    return load_experiment(source, overrides)


def _calm() -> None:
    """Silence what imports of others print about solvers and deprecations that don't concern a run."""
    for message in ("no QP solver found", "Importing from timm.models", "Call to deprecated function"):
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is what Ctrl-C is: it is told how to go on. Only for the main thread of this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != here:  # a worker that was forked: it ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(
    arguments: argparse.Namespace,
    config: Config | TransferExperiment,
    folder: Path,
    work: Callable[[Any], Any],
    settings: Sequence[str] = (),
) -> int:
    """Run `work`, which gets a narrator, and turn its end into an exit status with a word on how to go on.

    `settings`: words that the command which goes on has, too.
    """
    from avalanche_firn.plugins.checkpoint_errors import CheckpointError

    told: list[str] = []  # shown after the traceback
    narrator = arguments.scripted or TextNarrator(quiet=arguments.quiet, stopped=told.append)
    try:
        with _terminable(), _joined(config):
            done = work(narrator)
    except ConfigError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        event = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        resume = {"resume": resume_command(folder, settings)}
        if arguments.scripted and not narrator.ended:  # before the first run
            more = {} if event == "interrupted" else {"error": f"{type(error).__name__}: {error}"}
            narrator.tell(event, folder=folder, finished=[], left=[], seconds_left=None, report=None, **resume, **more)
        text = "\n".join(told) or stopped_text(event, resume)
        outside = _from_outside(error)
        if isinstance(error, CheckpointError):
            text = str(error)
        elif outside is not None:
            text = f"{outside}\n{text}"
        elif event == "failed":
            traceback.print_exc()
        who = f"process {os.environ['RANK']}: " if _follows() else ""
        print("\n" * (event == "interrupted") + f"firn: {who}{visible(text)}", file=sys.stderr)
        return INTERRUPTED if event == "interrupted" else FAILED
    if not arguments.scripted:
        print(visible(str(done)))
    return OK


def _from_outside(error: BaseException) -> Exception | None:
    """What to tell of an error of numbers, memory, disk or data; None for one of the code, or an interruption."""
    if not isinstance(error, (OSError, MemoryError, RuntimeError)):
        return None
    from avalanche_firn.plugins.memory_stop import is_out_of_memory, out_of_memory
    from avalanche_firn.plugins.run_errors import RunError
    from avalanche_firn.plugins.storage_stop import storage_error, storage_problem

    if isinstance(error, RunError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error)
    from avalanche_firn.plugins.process_group import lost_process

    if (lost := lost_process(error)) is not None:
        return lost
    problem = storage_problem(error)
    return None if problem is None else storage_error(problem, "a file", problem.filename or ".", verb="use")


def _compared(config: Config | TransferExperiment, **options: Any) -> Any:
    """Either kind of comparison."""
    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_comparison import compare_transfers

        return compare_transfers(config, **options)
    from avalanche_firn.experiments.comparison import compare

    return compare(config, **options)


def _compare(arguments: argparse.Namespace) -> int:
    place = _place(arguments)
    config = _loaded(arguments, DEFAULT_RECIPE)
    if arguments.print_commands:
        return _print_commands(arguments, config)
    _calm()
    from avalanche_firn.experiments.run_folders import comparison_folder

    work = lambda narrator: _compared(config, fresh=arguments.fresh, narrator=narrator, on=place)  # noqa: E731
    return _train(arguments, config, comparison_folder(config), work, () if place is None else place.words)


def _place(arguments: argparse.Namespace) -> RayPlace | None:
    place = place_of(arguments.on, arguments.gpus_per_run, arguments.cpus_per_run)
    if place is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise _UsageError("--on ray and torchrun exclude each other: one shares runs, the other the work of a run")
    return place


def _print_commands(arguments: argparse.Namespace, config: Config | TransferExperiment) -> int:
    for option, given in (("--fresh", arguments.fresh), ("--on", arguments.on != "local")):
        if given:
            raise _UsageError(f"--print-commands and {option} exclude each other: the commands may be given again")
    from avalanche_firn.experiments.printed_commands import commands_text, printed_commands

    source, overrides = _recipe_and_overrides(arguments.words, DEFAULT_RECIPE)
    facts = printed_commands(source, overrides, config, quiet=arguments.quiet)
    if arguments.scripted:
        arguments.scripted.tell("commands", **facts)
    else:
        print(commands_text(facts))
    return OK


def _run(arguments: argparse.Namespace) -> int:
    with _working_in(arguments.directory):
        return _run_here(arguments)


@contextlib.contextmanager
def _working_in(directory: str | None) -> Iterator[None]:
    """Work from a folder, and go back."""
    if directory is None:
        yield
        return
    before = os.getcwd()
    try:
        os.chdir(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--directory", f"{directory!r}: {error}", "a folder that is there")) from None
    try:
        yield
    finally:
        os.chdir(before)


def _run_here(arguments: argparse.Namespace) -> int:
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
    work = lambda narrator: _compared(single, fresh=arguments.fresh, narrator=narrator, summary=False)  # noqa: E731
    return _train(arguments, config, folder, work)


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
    place, settings, folder = _place(arguments), list(arguments.words), arguments.folder
    folders = [str(folder), *(word for word in settings if "=" not in word)]
    if len(folders) > 1:
        raise _UsageError(f"one folder is accepted, found {', '.join(folders)}")
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} holds no config.yaml; give the folder of a run or of a comparison")
    config = load_experiment(file)
    _calm()
    work = lambda narrator: _resumed(config, folder, narrator=narrator, settings=settings, on=place)  # noqa: E731
    return _train(arguments, config, folder, work, [*settings, *(() if place is None else place.words)])


def _resumed(config: Config | TransferExperiment, folder: Path, **options: Any) -> Any:
    if isinstance(config, TransferExperiment):
        from avalanche_firn.experiments.transfer_comparison import resume_transfers

        return resume_transfers(config, folder, **options)
    from avalanche_firn.experiments.comparison import resume

    return resume(config, folder, **options)


def _report(arguments: argparse.Namespace) -> int:
    from avalanche_firn.experiments.results import FILE, files_below, find_runs

    _calm()
    folders = [Path(word) for word in arguments.words]
    runs = find_runs([folder for folder in folders if not folder.is_dir() or files_below(folder, FILE)])
    if any(run.get("experiment") == "transfer" for run in runs):
        from avalanche_firn.experiments.transfer_comparison import described_transfers, report_transfers
        from avalanche_firn.experiments.transfer_results import transfer_groups

        text, methods = report_transfers(folders, arguments.output), described_transfers(transfer_groups(runs))
    else:
        from avalanche_firn.experiments.comparison import described
        from avalanche_firn.experiments.report import report_folders
        from avalanche_firn.experiments.results import group_runs

        text, methods = report_folders(folders, arguments.output), described(group_runs(runs))
    if arguments.scripted:
        from avalanche_firn.experiments.unfinished import find_unfinished

        place = arguments.output or (folders[0] / "summary" if len(folders) == 1 else None)
        written = report_files(place if place is not None and place.is_dir() else None)
        unfinished = [run.to_dict() for run in find_unfinished(folders)]
        arguments.scripted.tell("report", methods=methods, unfinished=unfinished, report=written)
    else:
        print(visible(text))
    return OK


def _dashboard(arguments: argparse.Namespace) -> int:
    _calm()
    from avalanche_firn.experiments.dashboard import open_dashboard

    folders = [Path(word) for word in arguments.words]
    return open_dashboard(folders, port=arguments.port, open_browser=not arguments.no_browser)


def _results(arguments: argparse.Namespace) -> int:
    _calm()
    from avalanche_firn.experiments.reproduction_text import make_results

    chosen = {"collect_to": arguments.collect, "changed_code": arguments.changed_code, "replace": arguments.replace}
    print(visible(make_results([Path(word) for word in arguments.words], output=arguments.output, **chosen)))
    return OK


def _export(arguments: argparse.Namespace) -> int:
    if arguments.words:
        raise _UsageError(f"one run is accepted, found {', '.join(map(str, [arguments.folder, *arguments.words]))}")
    _calm()
    from avalanche_firn.experiments.export import describe_export, export_run

    written = export_run(
        arguments.folder, arguments.format, output=arguments.output, task=arguments.task, force=arguments.force
    )
    print(visible(describe_export(written)))
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
        text = read_recipe(name)  # of anybody: as it is into a file or a pipe, harmless on a terminal
        print(visible(text) if sys.stdout.isatty() else text, end="")
    elif action == "copy":
        print(visible(f"copied to {copy_recipe(name, arguments.target)}"))
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

    print(visible(outline(config) if arguments.no_data else str(prepare(config))))
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

    print(visible(str(outline_transfers(config) if arguments.no_data else prepare_transfers(config))))
    if arguments.dry_run:
        for line in dry_run_transfers(config, data=not arguments.no_data):
            print(line, flush=True)
    return OK


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compare": _compare,
    "run": _run,
    "resume": _resume,
    "report": _report,
    "dashboard": _dashboard,
    "results": _results,
    "export": _export,
    "recipes": _recipes,
    "check": _check,
}


if __name__ == "__main__":
    sys.exit(main())
