"""Ready Avalanche strategies, one file per paper."""

from avalanche_firn.strategies.slca import SLCA

__all__ = ["SLCA"]
