"""The angles of rotated MNIST as in the code released with Co2L: any figure in [0, 180) degrees, one per domain.

Why our own: Avalanche's `RotatedMNIST` draws whole degrees from -180 to 180, so that domains may be the same or upside
down twice. Its argument `rotations_list` takes these instead; the rotation itself stays Avalanche's, which is
torchvision's with nearest-neighbour sampling, black corners, and positive angles counter-clockwise.
Cost: none worth naming.
"""

from __future__ import annotations

import numpy as np

from avalanche_firn.benchmarks.streams import StreamError

__all__ = ["LARGEST_ANGLE", "rotation_angles"]

LARGEST_ANGLE = 180.0  # degrees, never reached; Co2L's code


def rotation_angles(domains: int, seed: int) -> list[float]:
    """Angles in degrees, uniform in [0, 180), of the domains in order of appearance.

    They are the first draws of `numpy.random.RandomState(seed)`: the legacy generator, whose figures numpy promises not
    to change. Fewer domains with the same seed are the beginning of more.

    Args:
        domains: how many, at least 1.
        seed: 0..2**32-1.

    Raises:
        StreamError: a number or seed out of range.

    Example:
        >>> [round(angle, 3) for angle in rotation_angles(3, seed=0)]
        [98.786, 128.734, 108.497]
    """
    if isinstance(domains, bool) or not isinstance(domains, int) or domains < 1:
        raise StreamError(f"the number of domains is {domains!r}; accepted: a whole number, at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise StreamError(f"the seed of the angles is {seed!r}; accepted: 0..{2**32 - 1}")
    return np.random.RandomState(seed).uniform(0, LARGEST_ANGLE, domains).tolist()
