"""Ready Avalanche strategies, one file per paper."""

from avalanche_firn.strategies.cila import CILA, Co2L
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA
from avalanche_firn.strategies.slca_plus_plus import SLCAPlusPlus

__all__ = ["CILA", "LPFT", "SLCA", "Co2L", "LoRACIPC", "SLCAPlusPlus"]
