"""LoRAC-IPC's published figures are figures of evaluation/matrix.py (tests/golden/lorac_ipc/README.md, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from avalanche_firn.evaluation.matrix import average_accuracy, backward_transfer, forgetting

Golden = Callable[[str, str], dict[str, Any]]


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("unseen", [0.0, np.nan])
def test_golden_metrics(golden: Golden, step: int, unseen: float) -> None:
    """Rows here are steps and columns tasks, there the other way round; entries not evaluated are 0 there."""
    file = golden("lorac_ipc", "metrics")
    accuracy, official, backward, inference = file[f"t{step}_metrics"]
    np.testing.assert_array_equal(file["acc"], file["acc_matrix_after"])
    known = np.tril(np.ones((5, 5), dtype=bool))
    rows = np.where(known, file["acc"].T, unseen)[: step + 1]
    routed = np.where(known, file["task_inference_acc"].T, unseen)[: step + 1]
    assert average_accuracy(rows) == pytest.approx(accuracy, abs=1e-9)
    assert average_accuracy(routed) == pytest.approx(inference, abs=1e-9)
    if step == 0:  # undefined with one task; the official code prints 0
        assert official == backward == 0
        assert np.isnan(forgetting(rows, "max_seen")) and np.isnan(backward_transfer(rows))
        return
    assert forgetting(rows, "max_seen") == pytest.approx(official, abs=1e-9)
    assert backward_transfer(rows) == pytest.approx(backward, abs=1e-9)


def test_official_forgetting_is_not_clipped(golden: Golden) -> None:
    """Negative after a gain, where the maximum over all steps, the last one included, gives 0."""
    file = golden("lorac_ipc", "metrics")
    rows = file["acc"].T[:2]
    assert forgetting(rows, "max_seen") == pytest.approx(file["t1_metrics"][1], abs=1e-9)
    assert forgetting(rows, "max_seen") < 0 == forgetting(rows, "max_all")
