"""``python -m speed [NAME ...]``: measure, print, record, compare.

    python -m speed --list                     # what there is, how long it takes, which bounds it checks
    python -m speed throughput evaluation      # measure and record in speed/results/
    python -m speed --quick                    # all of it in small sizes, in seconds; nothing is recorded
    python -m speed --gate throughput          # measure and compare with the record; status 1 on a regression
    python -m speed --gate --measured FILE     # compare a file of rows with the record, measuring nothing

Run it on an idle machine. The exit status is 1 for a regression (``--gate``), 2 for an error, else 0; whether the
bounds hold is printed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from speed import scripts
from speed.gate import TOLERANCE, compare, failed, recorded_rows, table
from speed.rows import RESULTS, ResultsError, Row, Settings, read_rows, write_rows
from speed.tables import bounds_table, rows_table

__all__ = ["BENCHMARKS", "Benchmark", "main"]


@dataclass(frozen=True)
class Benchmark:
    """An entry of ``--list``. What it computes is imported when it runs."""

    about: str
    minutes: str
    bounds: str = "none"

    def rows(self, name: str, settings: Settings) -> list[Row]:
        """Measure."""
        if name in scripts.SCRIPTS:
            return scripts.rows(name, settings)
        measured: Callable[[Settings], list[Row]] = importlib.import_module(f"speed.{name}").rows
        return measured(settings)


BENCHMARKS = {
    "throughput": Benchmark(
        "training through our strategies against a hand-written loop, part by part",
        "12 on two cores, 4 on a GPU",
        "with the fast path 1.03 times the loop's time for transformers, 1.3 for a perceptron; on a GPU at least 95 % "
        "of the loop's images per second for ViT-B/16 in bf16",
    ),
    "evaluation": Benchmark(
        "evaluation of ten experiences, task matrix and TensorBoard included, against a raw loop",
        "6 on two cores",
        "with the fast path 1.3 times the loop's time",
    ),
    "contrastive_step": Benchmark(
        "a training step of CILA against the same networks without losses",
        "3 on two cores",
        "with the fast path 1.15 times the time",
    ),
    "curves": Benchmark(
        "how time and memory grow: with classes, past tasks, past samples, samples, pixels; table and figure",
        "20 on two cores",
        "what must not grow doesn't: a step with past samples, LoRAC's with tasks (1.05), merged inference; drawing "
        "and statistics at most in proportion, alignment as its arithmetic; bytes as documented",
    ),
    "stream": Benchmark(
        "a whole SLCA stream against its bare first stage and, with --peer, against the public code",
        "30 to 60 on two cores with --peer",
        "1.05 times the bare first stage; at least 1.5 times faster than the public code as shipped",
    ),
    "alignment": Benchmark("the alignment stage of SLCA against one distribution per class and epoch", "5"),
    "contrastive": Benchmark("CILA's two losses alone, time and memory, against masks and gathers", "1"),
    "lora": Benchmark("a step and an evaluation of LoRA composition at its tenth task", "5 to 10"),
    "zapping": Benchmark("zaps, episodes, transfer and the look at single tasks", "10"),
    "linear_probe": Benchmark("a probe phase on cached features against one without a cache", "2"),
    "soak": Benchmark(
        "memory, handles and times over 200 tasks with SLCA and LoRAC-IPC; page and figure",
        "6 on two cores",
        "no tensor kept that isn't documented, bytes in use as accounted for, resident ones at most 2.5 times them; "
        "files, threads and processes flat; training, statistics and alignment grow as their arithmetic",
    ),
    "processes": Benchmark(
        "an epoch in one process and in two (torchrun), on the CPU, and the bytes that a step exchanges",
        "8 on two cores",
    ),
    "dashboards": Benchmark(
        "a report of a hundred runs of a thousand points, made by firn report in a process of its own",
        "2",
        "20 seconds, and 5 MiB of HTML",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(_parse(arguments), " ".join(["python -m speed", *arguments]))
    except (ResultsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, command: str) -> int:
    if args.list:
        print(_listing())
        return 0
    names = args.names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"there is no benchmark {', '.join(unknown)}; accepted: {', '.join(BENCHMARKS)}")
    recorded = recorded_rows(args.recorded, names) if args.gate else []
    if args.measured is not None:
        measured = read_rows(args.measured)
        if not args.names:
            recorded = recorded_rows(args.recorded, sorted({row.benchmark for row in measured}))
    else:
        measured = _measure(args, names, command)
        print("\n" + bounds_table(measured) + ("\n(of small sizes, which say little)" if args.quick else ""))
    if not args.gate:
        return 0
    comparisons = compare(measured, recorded, args.tolerance)
    print("\n" + table(comparisons))
    return int(failed(comparisons))


def _measure(args: argparse.Namespace, names: Sequence[str], command: str) -> list[Row]:
    output = args.output
    if args.quick or (args.gate and output is None):
        output = None
    elif output is None:
        output = RESULTS
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(
        quick=args.quick,
        rounds=args.rounds,
        device=_device(args.device),
        precision=args.precision,
        case=args.case,
        peer=args.peer,
        output=output,
        command=command,
    )
    earlier = {} if output is None else {name: _own_record(output, name) for name in names}  # refuse before the work
    warnings.filterwarnings("ignore", category=UserWarning)  # of Avalanche's: loggers, deprecated calls
    measured: list[Row] = []
    for name in names:
        found = BENCHMARKS[name].rows(name, settings)
        print(rows_table(found), flush=True)
        measured += found
        if output is None or name in scripts.SCRIPTS:  # those write their own record
            continue
        write_rows(output / f"{name}.json", found, keep=earlier[name])
        report: Callable[[Sequence[Row], Path], None] = getattr(
            importlib.import_module(f"speed.{name}"), "report", lambda rows, folder: None
        )
        report(found, output)
        print(f"written to {output / name}.json", flush=True)
    return measured


def _own_record(folder: Path, name: str) -> list[Row]:
    path = folder / f"{name}.json"
    if name in scripts.SCRIPTS or not path.exists():
        return []
    return read_rows(path)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; accepted: cpu, cuda") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {name!r}, which this machine doesn't have; accepted: cpu, or cuda with a GPU")
    return device


def _listing() -> str:
    lines = []
    for name, entry in BENCHMARKS.items():
        lines += [f"{name:<18}{entry.about}", f"{'':<18}minutes: {entry.minutes}; bounds: {entry.bounds}"]
    return "\n".join(lines)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument)
    add("names", nargs="*", metavar="NAME", help=f"benchmarks, default all: {', '.join(BENCHMARKS)}")
    add("--list", action="store_true", help="say what each measures, how long it takes and which bounds it checks")
    add("--quick", action="store_true", help="small sizes, one round, nothing recorded")
    add("--case", default="", help="only cases whose name contains this, such as vit_base")
    add("--rounds", type=int, help="counted rounds (default: each benchmark's own)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default auto: each case's own")
    add("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    add("--output", type=Path, help="folder to record in (default speed/results; with --gate: nowhere)")
    add("--peer", type=Path, help="clone of the public SLCA code, for stream")
    add("--gate", action="store_true", help="compare the ratios with the recorded ones; status 1 on a regression")
    add("--measured", type=Path, metavar="FILE", help="with --gate: compare this file of rows and measure nothing")
    add("--recorded", type=Path, default=RESULTS, help="folder of the record to compare with (default speed/results)")
    add("--tolerance", type=float, default=TOLERANCE, help=f"accepted worsening (default {TOLERANCE:g})")
    args = parser.parse_args(arguments)
    if args.measured is not None and not args.gate:
        parser.error("--measured needs --gate")
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; 1 and above is accepted")
    return args


if __name__ == "__main__":
    sys.exit(main())
