"""The rows of figures that the benchmarks give, and the files that they are recorded in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

__all__ = ["FORMAT", "RESULTS", "ROOT", "ResultsError", "Row", "Settings", "read_rows", "write_rows"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "speed" / "results"
FORMAT = 1


class ResultsError(ValueError):
    """A file of recorded figures that can't be read."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asks of a benchmark.

    Attributes:
        quick: small sizes that end in seconds; for a look, recorded nowhere.
        rounds: counted rounds; None: the benchmark's own number.
        device: where the networks run.
        precision: "fp32", "bf16", or "auto": each case's own.
        case: only cases whose name contains this.
        peer: clone of public code to compare with, for the benchmarks that can.
        output: folder of the recorded figures; None: nothing is recorded.
        command: how it was started, for the rows.
    """

    quick: bool = False
    rounds: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    case: str = ""
    peer: Path | None = None
    output: Path | None = None
    command: str = ""

    def rounds_or(self, usual: int) -> int:
        """Counted rounds: those asked for, 1 in a quick run, else `usual`."""
        return self.rounds or (1 if self.quick else usual)

    def wants(self, case: str) -> bool:
        """Whether a case was asked for."""
        return self.case in case


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one contestant in one case; a line of the JSON file.

    Attributes:
        case: what is computed, sizes included: figures of different sizes are never compared.
        device: "CPU, <model>" or "GPU, <name>". threads: of torch on the CPU.
        seconds, all_seconds: median and all of a round. images_per_second: from the median; None: no images.
        peak_memory_MiB: see the module; None: not measured.
        ratio: median over the rounds of this contestant's cost by that of `to_what`, all_ratios: of every round. Less
            is better. None: there is nothing to compare with.
        quantity: of the ratio: "time", "memory", "bytes", ...
        bound: largest ratio that the project allows itself; None: none is set.
        details: further figures, by name.
    """

    benchmark: str
    case: str
    contestant: str
    device: str
    threads: int
    precision: str
    torch: str
    timm: str
    avalanche: str
    python: str
    images_per_second: float | None = None
    seconds: float | None = None
    all_seconds: list[float] = field(default_factory=list)
    peak_memory_MiB: float | None = None
    ratio: float | None = None
    to_what: str = ""
    all_ratios: list[float] = field(default_factory=list)
    quantity: str = "time"
    bound: float | None = None
    load_average: float | None = None
    command: str = ""
    date: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where there is none."""
        return None if self.bound is None or self.ratio is None else self.ratio <= self.bound

    @classmethod
    def from_dict(cls, data: Any) -> Row:
        """The inverse of `dataclasses.asdict`. Raises ResultsError for missing or unknown fields."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, Mapping):
            raise ResultsError(f"a row is a {type(data).__name__}; accepted: an object with {', '.join(sorted(known))}")
        missing, unknown = sorted(_NEEDED - set(data)), sorted(set(data) - known)
        if missing or unknown:
            raise ResultsError(f"a row lacks {missing} and has unknown {unknown}; accepted: {', '.join(sorted(known))}")
        return cls(**data)


_NEEDED = {f.name for f in fields(Row) if f.default is MISSING and f.default_factory is MISSING} | {"ratio", "to_what"}


def write_rows(path: Path, rows: Sequence[Row], *, keep: Sequence[Row] = ()) -> None:
    """Write the rows of a benchmark, and before them those of `keep` that they don't replace."""
    new = {_place(row) for row in rows}
    kept = [row for row in keep if _place(row) not in new]
    text = json.dumps({"format": FORMAT, "rows": [asdict(row) for row in (*kept, *rows)]}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _place(row: Row) -> tuple[str, ...]:
    """What a new row replaces: the same figure of the same device."""
    return (row.case, row.contestant, row.quantity, row.to_what, row.device, str(row.threads), row.precision)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file. Raises ResultsError when it is none of ours, with what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("rows"), list):
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ResultsError(
            f'{path} has the format {found!r}; accepted: {FORMAT}, {{"format": {FORMAT}, "rows": [...]}} as '
            "`python -m speed` writes it; move the file away and measure anew"
        )
    try:
        return [Row.from_dict(row) for row in content["rows"]]
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from error
