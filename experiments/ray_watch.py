"""What a run on another machine reports to: letters to whoever waits for it, in the place of lines and bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from avalanche_firn.experiments.narration import plain
from avalanche_firn.experiments.run_watch import RunWatch

__all__ = ["far_watch"]


class _LetterNarrator:
    """Hands events on."""

    quiet = True
    ended = False

    def __init__(self, put: Callable[..., None]) -> None:
        self._put = put

    def tell(self, event: str, **facts: Any) -> None:
        """Plain values only: what reads them may have no torch. The reader knows whose folder it is."""
        self._put("told", event=event, **plain({name: value for name, value in facts.items() if name != "folder"}))


class _FarWatch(RunWatch):
    """Also tells how much of the run is done, from which its reader estimates the time left."""

    def __init__(self, put: Callable[..., None], **more: Any) -> None:
        super().__init__(narrator=_LetterNarrator(put), **more)
        self._put = put

    def _paced(self, share: float, seconds: float) -> None:
        super()._paced(share, seconds)
        self._put("paced", share=float(share), seconds=float(seconds))


def far_watch(config: Any, folder: Path, put: Callable[..., None]) -> RunWatch:
    """The watch of a run whose letters `put` takes, as a kind and facts; `config` has one method and one seed."""
    method = config.methods[0]
    identity = {"method": method.name, "strategy": method.strategy, "seed": config.seeds[0], "folder": folder}
    return _FarWatch(put, **identity)
