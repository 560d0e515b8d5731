"""Benchmarks of speed and memory: ``python -m speed --list`` says what there is.

Run from the repository's root with the package installed; nothing in here goes into the wheel. Recorded figures stand
in ``speed/results/``, one file per benchmark.
"""

from __future__ import annotations

import os

# A waiting thread leaves its core to others. It counts only if it is set before torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
