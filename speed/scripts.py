"""The benchmarks that are programs of their own, with records of their own: run from here, and read as rows.

``alignment``, ``contrastive``, ``lora``, ``zapping`` and ``linear_probe`` each keep their measurement, their options
and the form of their record (`python speed/alignment.py` works as ever). What makes them comparable stands here: a
record, just made or years old, becomes rows with ratios.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed.rows import ResultsError, Row, Settings

__all__ = ["SCRIPTS", "rows", "rows_of_record"]

Found = Iterator[dict[str, Any]]


def rows(name: str, settings: Settings) -> list[Row]:
    """Run a script with the settings that it knows; its record goes to `settings.output`, if anywhere."""
    with tempfile.TemporaryDirectory() as scratch:
        output = (Path(scratch) if settings.output is None else settings.output) / f"{name}.json"
        report = importlib.import_module(f"speed.{name}").main([*_arguments(name, settings), "--output", str(output)])
    found = rows_of_record(name, report)
    return [replace(row, command=settings.command) for row in found if settings.wants(row.case)]


def _arguments(name: str, settings: Settings) -> list[str]:
    import torch

    threads = str(torch.get_num_threads())
    arguments = ["--threads", threads]
    if settings.quick:
        arguments += ["--quick", *_QUICK.get(name, ())]
    elif settings.rounds:
        arguments += ["--rounds", str(settings.rounds)]
    if name in ("lora", "linear_probe"):
        arguments += ["--device", str(settings.device)]
    return arguments


_QUICK = {
    "contrastive": ("--no-memory",),
    "lora": ("--no-memory",),
    "zapping": ("--widths", "16", "--parts", "asb", "zap"),
}


def rows_of_record(name: str, report: Any) -> list[Row]:
    """The rows of a script's record. Raises ResultsError when it has another form."""
    try:
        return [_row(name, **figures) for figures in SCRIPTS[name](report)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ResultsError(
            f"the record of {name} has another form than `python speed/{name}.py` writes: "
            f"{type(error).__name__} {error}; measure anew"
        ) from error


def read_record(name: str, path: Path) -> list[Row]:
    """The rows of a file with a script's record."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} can't be read: {error}") from error
    try:
        return rows_of_record(name, report)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from error


def _row(benchmark: str, *, machine: dict[str, Any], **figures: Any) -> Row:
    device = str(machine.get("device") or f"CPU, {machine['cpu']}")
    threads = figures.pop("threads", None) or machine.get("threads")
    if "CPU, " in device and device.endswith(" threads"):  # linear_probe: the threads in place of the model
        threads, device = int(device.split()[1]), "CPU, unknown"
    versions: dict[str, Any] = {
        key: str(machine.get(key, "unknown")) for key in ("torch", "timm", "avalanche", "python")
    }
    cleaned: dict[str, Any] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}
    return Row(
        benchmark=benchmark,
        device=device if device.startswith("CPU") else f"GPU, {device}",
        threads=int(threads or 1),
        precision="fp32",
        load_average=machine.get("load_average"),
        **versions,
        **cleaned,
    )


def _alignment(report: Any) -> Found:
    setting = report["setting"]
    size = f"{setting['classes']} classes x {setting['features']}"
    for row in report["results"]:
        case, shared = f"{size}, {row['samples']} samples, {row['form']}", {"machine": report["machine"]}
        yield {
            **shared,
            "case": case,
            "contestant": "floor",
            "seconds": row["floor_s"],
            "ratio": 1.0,
            "to_what": "floor",
        }
        yield {
            **shared,
            **dict(case=case, contestant="ours", seconds=row["ours_s"], ratio=row["over_floor"], to_what="floor"),
            "bound": 1.3,
            "all_seconds": row["all_s"]["ours"],
            "all_ratios": [a / b for a, b in zip(row["all_s"]["ours"], row["all_s"]["floor"], strict=True)],
        }
        yield {
            **shared,
            **dict(case=case, contestant="ours", seconds=row["ours_s"], ratio=1 / row["speedup"], to_what="baseline"),
            "bound": 1 / 20 if row["samples"] <= 30 else 1 / 15,
        }
        if row.get("growth_ratio") is not None:
            yield {
                **shared,
                **dict(case=case, contestant="ours", ratio=row["growth_ratio"], to_what="baseline"),
                **dict(quantity="memory", bound=0.25, peak_memory_MiB=row["growth_MiB"]),
            }


def _contrastive(report: Any) -> Found:
    case = f"{report['views']} views x {report['width']}, forward and backward"
    for row in report["rows"]:
        shared = {"machine": report, "case": case, "contestant": row["way"], "to_what": "gathered"}
        for threads, figures in row["threads"].items():
            ratio = 1 / figures["times_faster"]
            yield {
                **shared,
                **dict(
                    threads=int(threads), seconds=figures["seconds"], ratio=ratio, peak_memory_MiB=row["memory_MiB"]
                ),
            }
        yield {**shared, "threads": 1, "ratio": row["memory_share"], "quantity": "memory"}


def _lora(report: Any) -> Found:
    for name, record in report.items():
        for part, base, field in (("training", "plain", "times_plain"), ("evaluation", "forward", "times_forward")):
            size = f"{name}, batch {record['batch']}, {record['depth']} blocks, task {record['tasks']}"
            for way, row in record.get(part, {}).items():
                yield {
                    **dict(machine=record, case=f"{part}: {size}", contestant=way, to_what=base, ratio=row[field]),
                    **dict(seconds=row["seconds"], peak_memory_MiB=row.get("memory_MiB")),
                }


def _zapping(report: Any) -> Found:
    for record in report.values():
        for part in ("dynamics", "asb", "meta", "transfer", "zap"):
            for width, found in record.get(part, {}).items():
                base = next(iter(found["ways"]))
                case = f"{part}, {width}, {record['data']}"
                for way, row in found["ways"].items():
                    yield {
                        **dict(machine=record, case=case, contestant=way, to_what=base),
                        **dict(seconds=row["seconds"], ratio=row["ratio"]),
                    }


def _linear_probe(report: Any) -> Found:
    base = next(iter(report["seconds"]))
    sizes = ("samples", "classes", "batch_size", "epochs")
    case = f"{report['model']}, {report['image_size']} px, " + ", ".join(f"{n} {report[n]}" for n in sizes)
    for way, seconds in report["seconds"].items():
        yield {
            **dict(machine=report, case=case, contestant=way, to_what=base, seconds=seconds),
            "ratio": 1 / report["times_cheaper"][way],
        }


SCRIPTS: dict[str, Callable[[Any], Found]] = {
    "alignment": _alignment,
    "contrastive": _contrastive,
    "lora": _lora,
    "zapping": _zapping,
    "linear_probe": _linear_probe,
}
