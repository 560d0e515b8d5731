"""Ready Avalanche strategies, one file per paper; transfer protocols."""

from avalanche_firn.strategies.avalanche_der import ResumableDER
from avalanche_firn.strategies.avalanche_scr import ResumableSCR
from avalanche_firn.strategies.cila import CILA, Co2L
from avalanche_firn.strategies.lorac_ipc import LoRACIPC
from avalanche_firn.strategies.lp_ft import LPFT
from avalanche_firn.strategies.slca import SLCA
from avalanche_firn.strategies.slca_plus_plus import SLCAPlusPlus
from avalanche_firn.strategies.transfer import TransferResult, continual_transfer, iid_transfer
from avalanche_firn.strategies.transfer_start import TransferTask, transfer_tasks
from avalanche_firn.strategies.transfer_sweep import RateSweep, sweep_rates
from avalanche_firn.strategies.zapping import ASB, MetaASB

__all__ = [
    "ASB",
    "CILA",
    "LPFT",
    "SLCA",
    "Co2L",
    "LoRACIPC",
    "MetaASB",
    "RateSweep",
    "ResumableDER",
    "ResumableSCR",
    "SLCAPlusPlus",
    "TransferResult",
    "TransferTask",
    "continual_transfer",
    "iid_transfer",
    "sweep_rates",
    "transfer_tasks",
]
