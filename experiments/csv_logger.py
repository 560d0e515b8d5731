"""An Avalanche logger that writes every scalar of a run to ``metrics.csv``: step, tag, value.

The file is only ever appended to, one line per value, unbuffered beyond the line: its length at a checkpoint is all
that an exact resume has to know. Values are written with all their digits.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from avalanche.evaluation.metric_results import AlternativeValues, TensorImage
from avalanche.logging import BaseLogger
from torch import Tensor

from avalanche_firn.plugins.storage_stop import no_link, writing

__all__ = ["CsvLogger", "read_metrics"]

_HEADER = ("step", "tag", "value")


class CsvLogger(BaseLogger):
    """Write scalars to a CSV file; figures, histograms and texts are left to TensorBoard.

    :param path: the file; it is appended to if it exists.
    :raises StorageError: the file can't be written, here and whenever something is logged, or is a symbolic link.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        with writing("the metrics of a run", self.path):
            handle = no_link(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._file = os.fdopen(handle, "a", buffering=1, encoding="utf-8", newline="")
            self._rows = csv.writer(self._file, lineterminator="\n")
            if self._file.tell() == 0:
                self._rows.writerow(_HEADER)

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Append one line if the value is a single number."""
        if isinstance(value, AlternativeValues):
            value = value.best_supported_value(float, int)
        if isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, TensorImage):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, float | int):
            return
        with writing("the metrics of a run", self.path):
            self._rows.writerow((x_plot, name, repr(float(value))))

    def close(self) -> None:
        """Close the file."""
        with writing("the metrics of a run", self.path):
            self._file.close()


def read_metrics(path: str | Path) -> list[tuple[int, str, float]]:
    """The rows of a ``metrics.csv``: (step, tag, value)."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [(int(row["step"]), row["tag"], float(row["value"])) for row in csv.DictReader(file)]
