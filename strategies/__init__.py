"""Ready Avalanche strategies, one file per paper."""

from avalanche_firn.strategies.cila import CILA, Co2L
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA

__all__ = ["CILA", "LPFT", "SLCA", "Co2L"]
