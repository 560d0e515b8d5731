"""A whole SLCA stream: ours and the public code against the bare arithmetic of stage 1.

    python speed/stream.py                          # digits, embedded transformer, anyone's machine: minutes
    python speed/stream.py --peer PATH              # with the public code, a clone of GengDavid/SLCA
    python speed/stream.py --peer PATH --data FOLDER --backbone vit_tin_32 --weights FILE --epochs 10
    python speed/stream.py --quick                  # seconds, nothing recorded

Contestants, each seed of each in a fresh process with the same number of threads, interleaved over the seeds:

* ``stage 1 alone``: a hand-written loop: the same backbone, batches, two learning rates, epochs and tasks, batches
  fetched by one index. No evaluation, statistics or alignment. All ratios are to this one's seconds.
* ``ours``: the strategy, evaluator, TensorBoard, CSV and checkpoint after each task of a ``firn`` run: class
  statistics, alignment, and evaluation on all tasks seen after each. ``ours, bf16`` where the processor has bf16;
  ``--ours performance.compile=true`` adds one with other settings of the recipe.
* ``peer, as shipped``: the public code with its test passes; ``peer, no test passes``: without those whose figures are
  only printed. See ``peer_slca.py``.

All get the same decoded and resized uint8 images, without augmentation, and start the clock with them in memory and the
backbone loaded. A seed is the class order (1993, 1996, 1997 in exps/slca/*.json) and, but for the public code, which
fixes its own to 1, the random state; a round is a seed. Accuracies, fractions per seed, stand in the details of a row.
``accuracy_within_sd``: last and incremental accuracy both differ from the public code's, in the mean over the seeds, by
at most one standard deviation (pooled).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # python speed/stream.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from avalanche_firn.benchmarks.streams import class_order
from avalanche_firn.experiments.resources import stream_normalization
from speed.measure import RESULTS, Row, Settings, make_row, read_rows, write_rows
from speed.peer import DRIVER, check_equal_tasks, check_peer, peer_commit, run_contestant, within_one_deviation
from speed.stream_contestants import BARE, OURS, OURS_BF16, configuration, load_given, make_problem, run_job

__all__ = ["BENCHMARK", "NO_PASSES", "SHIPPED", "main", "measure", "native_bf16", "parse", "rows", "rows_of_runs"]

BENCHMARK = "stream"
SHIPPED, NO_PASSES = "peer, as shipped", "peer, no test passes"
SEEDS = (1993, 1996, 1997)  # exps/slca/*.json of the public code

# Shared by all contestants; exps/slca/slca_cifar.json and the constants of models/slca.py of the public code.
HYPER = {
    "lr": 0.01,
    "backbone_scale": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alignment_epochs": 5,
    "alignment_rows_per_class": 256,
    "temperature": 0.1,
}
# Largest seconds of a contestant by those of another one that the project allows itself.
BOUNDS = {(OURS, BARE): 1.05, (OURS, SHIPPED): 1 / 1.5, (OURS_BF16, SHIPPED): 1 / 2.2}
ACCURACIES = ("accuracy_last", "accuracy_incremental")
Runs = dict[str, list[dict[str, Any]]]  # contestant -> results in the order of the seeds


def native_bf16(device: torch.device) -> bool:
    """Whether the processor (or the GPU) computes in bf16 itself; of a CPU by the flags that Linux shows."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags.split()))


def rows(settings: Settings) -> list[Row]:
    """Figures on digits with the embedded backbone; `settings.rounds` is the number of seeds."""
    arguments = ["--device", str(settings.device), "--threads", str(torch.get_num_threads())]
    arguments += ["--quick"] * settings.quick + ["--precision", "fp32"] * (settings.precision == "fp32")
    if settings.peer is not None:
        arguments += ["--peer", str(settings.peer)]
    if settings.rounds is not None:
        arguments += ["--seeds", *(str(seed) for seed in (*SEEDS, *range(settings.rounds))[: settings.rounds])]
    args = parse(arguments)
    return measure(args, settings.command) if settings.wants(_case(_shared(args), args)) else []


def measure(args: argparse.Namespace, command: str) -> list[Row]:
    """All contestants over all seeds, see :func:`rows_of_runs`.

    Raises:
        PeerError: no clone at ``--peer``, or tasks of different sizes beside it.
        ConfigError: data, backbone, weights or a setting that can't be.
        ContestantError: a contestant failed.
    """
    peer = None if args.peer is None else check_peer(args.peer)
    device, base = torch.device(args.device), _shared(args)
    first = {**base, "seed": args.seeds[0], "precision": "fp32"}
    config = configuration(first)
    loaded = load_given(base)
    problem = make_problem(config, loaded.data_config, args.images_per_class, args.test_images_per_class)
    base["mean"], base["std"] = (list(map(float, v)) for v in stream_normalization(config, loaded.data_config))
    contestants = [BARE, OURS] + [OURS_BF16] * (args.precision == "auto" and native_bf16(device))
    if args.ours:
        contestants.append(_changed(args.ours))
        base["precisions"] = {_changed(args.ours): configuration({**first, "overrides": args.ours}).precision}
    if peer is not None:
        check_equal_tasks(problem.classes, args.tasks)
        contestants += [SHIPPED, NO_PASSES]
        base |= {"peer": str(peer), "peer_workers": args.peer_workers}
    runs: Runs = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(prefix="firn-stream-") as scratch:
        base["problem"] = f"{scratch}/problem.npz"
        np.savez(base["problem"], **problem._asdict())
        total = len(args.seeds) * len(contestants)
        with tqdm(total=total, desc="stream", unit="run", disable=None, leave=False) as bar:
            for turn, seed in enumerate(args.seeds):
                shift = turn % len(contestants)  # nobody is always first or last
                for name in contestants[shift:] + contestants[:shift]:
                    job = base | {
                        "contestant": name,
                        "seed": seed,
                        "class_order": class_order(problem.classes, seed),
                        "precision": "bf16" if name == OURS_BF16 else "fp32",
                        "overrides": args.ours if name == _changed(args.ours) else [],
                        "test_passes": name == SHIPPED,
                    }
                    script = DRIVER if name in (SHIPPED, NO_PASSES) else Path(__file__).resolve()
                    run = run_contestant(script, job, Path(scratch) / f"{seed}-{contestants.index(name)}")
                    runs[name].append(run)
                    tqdm.write(f"seed {seed}, {name}: {_shown(run)}")
                    bar.update(1)
    settings = Settings(device=device, command=command)
    return rows_of_runs(runs, base, args.seeds, _case(base, args), settings, peer)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    """What every job holds."""
    late = int(0.9 * args.epochs)  # 18 of 20 in exps/slca/slca_cifar.json
    milestones = args.milestones if args.milestones is not None else [late] * (late > 0)
    return HYPER | {
        "backbone": args.backbone,
        "weights": None if args.weights is None else str(args.weights.expanduser().resolve()),
        "data": None if args.data is None else str(args.data.expanduser().resolve()),
        "tasks": args.tasks,
        "epochs": args.epochs,
        "milestones": milestones,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "device": args.device,
    }


def _case(base: dict[str, Any], args: argparse.Namespace) -> str:
    data = "digits" if base["data"] is None else Path(base["data"]).name
    images = f"{args.images_per_class or 'all'} images a class"
    images += f" ({args.test_images_per_class} to test)" if args.test_images_per_class else ""
    size = f"{base['tasks']} tasks, {base['epochs']} epochs, {images}, batch {base['batch_size']}"
    return f"{data}, {base['backbone']}, {size}"


def _changed(overrides: Sequence[str]) -> str:
    """Name of our contestant with other settings."""
    return f"{OURS}, {' '.join(overrides)}"


def _shown(run: dict[str, Any]) -> str:
    accuracy = f", accuracy {100 * run['accuracy_last']:.2f} %" if "accuracy_last" in run else ""
    return f"{run['seconds']:.1f} s (stage 1 {run['stage1_seconds']:.1f}; processor {run['cpu_seconds']:.1f}){accuracy}"


def rows_of_runs(
    runs: Runs, base: dict[str, Any], seeds: Sequence[int], case: str, settings: Settings, peer: Path | None
) -> list[Row]:
    """A row per contestant in units of stage 1 alone and, with the public code, one in units of that as shipped.

    Ratios are medians of those of equal seeds. Details: accuracies in 0..1 per seed, ``accuracy_within_sd`` (None
    without the public code or with one seed), seconds of the processor (all threads, without loader processes; they say
    more than the clock's where others are at work) and of stage 1, images that one seed trains on (epochs counted), and
    the settings that all contestants share.
    """
    shared = {
        "seeds": list(seeds),
        "hyper_parameters": {name: base[name] for name in (*HYPER, "epochs", "milestones", "batch_size")},
        "peer_commit": None if peer is None else peer_commit(peer),
        "peer_workers": base.get("peer_workers"),
    }
    precisions = {OURS_BF16: "bf16"} | base.get("precisions", {})
    made = []
    for unit in (BARE, SHIPPED):
        for contestant, results in runs.items() if unit in runs else ():
            seconds = [run["seconds"] for run in results]
            ratios = [mine / other["seconds"] for mine, other in zip(seconds, runs[unit], strict=True)]
            memory = [run["peak_memory_MiB"] for run in results if run["peak_memory_MiB"] is not None]
            details = shared | {
                "cpu_seconds": [run["cpu_seconds"] for run in results],
                "stage1_seconds": statistics.median(run["stage1_seconds"] for run in results),
                "images": results[0]["images"],
                **{name: [run[name] for run in results] for name in ACCURACIES if name in results[0]},
                "accuracy_within_sd": _within(results, runs.get(SHIPPED)),
            }
            row = make_row(
                BENCHMARK,
                case,
                contestant,
                settings,
                threads=base["threads"],
                precision=precisions.get(contestant, "fp32"),
                seconds=statistics.median(seconds),
                all_seconds=seconds,
                images_per_second=results[0]["images"] / statistics.median(seconds),
                peak_memory_MiB=max(memory, default=None),
                ratio=statistics.median(ratios),
                all_ratios=ratios,
                to_what=unit,
                bound=BOUNDS.get((contestant, unit)),
                details=details,
            )
            made.append(row)
    return made


def _within(results: list[dict[str, Any]], shipped: list[dict[str, Any]] | None) -> bool | None:
    if shipped is None or "accuracy_last" not in results[0]:
        return None
    near = [within_one_deviation([r[name] for r in results], [r[name] for r in shipped]) for name in ACCURACIES]
    return None if None in near else all(near)


def show(made: Sequence[Row]) -> None:
    """Print the table and what became of the bounds."""
    first = made[0]
    print(f"{first.case}; {first.device}, {first.threads} threads; seeds {first.details['seeds']}")
    shipped = {row.contestant: row for row in made if row.to_what == SHIPPED}
    print(f"  {'contestant':<22}{'seconds':>9}{'x stage 1':>11}{'x faster':>10}{'last %':>9}{'incr. %':>9}{'MiB':>7}")
    for row in made:
        if row.to_what == BARE:
            faster = f"{1 / shipped[row.contestant].ratio:.2f}" if shipped else "-"  # type: ignore[operator]
            means = (statistics.fmean(row.details[name]) if name in row.details else None for name in ACCURACIES)
            shown = "".join(f"{'-' if mean is None else format(100 * mean, '.2f'):>9}" for mean in means)
            memory = "-" if row.peak_memory_MiB is None else f"{row.peak_memory_MiB:.0f}"
            print(f"  {row.contestant:<22}{row.seconds:>9.1f}{row.ratio:>11.3f}{faster:>10}{shown}{memory:>7}")
    for row in made:
        if row.met is not None:
            verdict = "met" if row.met else "NOT met"
            print(f"  {row.contestant}: {row.ratio:.3f} of {row.to_what}, at most {row.bound:.3f}: {verdict}")
    for name, row in shipped.items():
        if name in (OURS, OURS_BF16):
            near = row.details["accuracy_within_sd"]
            verdict = "not known from one seed" if near is None else "met" if near else "NOT met"
            print(f"  {name}: accuracy within a standard deviation: {verdict}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; ``--quick`` shrinks what wasn't given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peer", type=Path, metavar="PATH", help="clone of the public code (its code is executed)")
    add("--peer-workers", type=_workers, default=0, metavar="N", help="its loader processes: N (default 0: the images "
        "are in memory and others get none) or shipped (eight and four)")  # fmt: skip
    add("--data", type=Path, metavar="FOLDER", help="train/CLASS/*, test/CLASS/*; default: scikit-learn's digits")
    add("--backbone", default="vit_firn_32.omniglot", help="a timm name (default: the embedded one)")
    add("--weights", type=Path, metavar="FILE", help="local weights of the backbone")
    add("--tasks", type=int, default=5, help="default 5")
    add("--epochs", type=int, help="of each task (default 20: exps/slca/slca_cifar.json)")
    add("--milestones", type=int, nargs="*", help="epochs after which rates fall tenfold (default: 9 tenths, 18 of 20)")
    add("--images-per-class", type=int, metavar="N", help="train on the first N of each class (default all)")
    add("--test-images-per-class", type=int, metavar="N", help="evaluate on the first N of each class (default all)")
    add("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="one more contestant: ours with these settings of a "
        "recipe, such as performance.compile=true")  # fmt: skip
    add("--batch-size", type=int, default=128, help="default 128: models/slca.py")
    add("--seeds", type=int, nargs="+", default=None, help="class orders (default 1993 1996 1997: exps/slca/*.json)")
    add("--threads", type=int, default=1, help="of every contestant (default 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    add("--precision", choices=("auto", "fp32"), default="auto", help="auto adds bf16 where it is native (default)")
    add("--quick", action="store_true", help="one seed, two epochs, 20 images a class; recorded nowhere")
    add("--output", type=Path, default=RESULTS / "stream.json", help="JSON file to write")
    add("--job", type=Path, help=argparse.SUPPRESS)  # one contestant in a process of its own
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 2 if args.quick else 20
    args.seeds = args.seeds or list(SEEDS[:1] if args.quick else SEEDS)
    args.images_per_class = args.images_per_class or (20 if args.quick else None)
    return args


def _workers(text: str) -> int | None:
    return None if text == "shipped" else int(text)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and, unless ``--quick``, record; returns the rows."""
    args = parse(argv)
    if args.job is not None:
        run_job(args.job)
        return []
    kept = read_rows(args.output) if args.output.exists() and not args.quick else []
    made = measure(args, " ".join(["python speed/stream.py", *(sys.argv[1:] if argv is None else argv)]))
    show(made)
    if not args.quick:
        write_rows(args.output, made, keep=kept)
        print(f"written to {args.output}")
    return made


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
