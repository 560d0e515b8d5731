"""Whether a checkpoint fits the strategy that is to go on from it: what is refused, and what is said and accepted.

Configuration, classes, sizes and precision have to be the same. Versions, device, threads and an automatic precision
may differ with a warning. Another number of mini-batches with the same images per step is translated, see
:mod:`~avalanche_firn.plugins.recut`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from avalanche_firn.plugins.checkpoint_errors import CheckpointError
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.recut import cut_of, recut, saved_cut
from avalanche_firn.plugins.strategy_state import environment, structure_differences

__all__ = ["experiences_left", "fitted"]


def fitted(
    path: Path, state: dict[str, Any], strategy: Any, *, structure: dict[str, Any], fingerprint: str | None
) -> dict[str, Any]:
    """The state as this strategy can take it.

    :param path: of the checkpoint, for messages. :param state: that it holds. :param structure: of the strategy.
    :param fingerprint: that the checkpoint must have.
    :raises CheckpointError: it was made by something else; the message says in what.
    """
    try:
        cut, state = saved_cut(state), recut(state, strategy)
        _check(path, state, structure, fingerprint)
        changed = _environment(path, state["environment"], strategy)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        text = f"{path} has another form than a checkpoint of a strategy: {type(error).__name__} {error}"
        raise CheckpointError(text) from error
    if changed:
        text = f"resuming in another environment ({', '.join(changed)}): results may differ in the last bits"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    if "recut" in state:
        text = (
            f"going on with {cut_of(strategy)} per step, where the checkpoint had {cut}: the same images, but results "
        )
        warnings.warn(f"{text}may differ by rounding", RuntimeWarning, stacklevel=4)
    return state


def _check(path: Path, state: dict[str, Any], structure: dict[str, Any], fingerprint: str | None) -> None:
    if state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path} was made with fingerprint {state['fingerprint']!r}, this run has {fingerprint!r}"
        )
    lines = structure_differences(state["structure"], structure)
    if lines:
        raise CheckpointError(f"{path} was made by another strategy:\n  " + "\n  ".join(lines))


def experiences_left(stream: Any, done: int) -> Any:
    """What of a stream is still to be trained, after ``ExactCheckpointPlugin.resume`` has said that ``done`` are.

    :raises CheckpointError: the checkpoint counts more experiences than the stream has.
    """
    if done > len(stream):
        raise CheckpointError(f"the checkpoint counts {done} trained experiences, the stream has {len(stream)}")
    return stream[done:]


def _environment(path: Path, there: dict[str, str], strategy: Any) -> list[str]:
    """What differs, one entry each; what a checkpoint of an earlier version doesn't say is left out."""
    here = environment(strategy)
    chosen = {plugin.precision for plugin in strategy.plugins if isinstance(plugin, MixedPrecisionPlugin)}
    if there.get("precision", here["precision"]) != here["precision"] and chosen != {"auto"}:
        raise CheckpointError(f"{path} was made with precision {there['precision']}, this run has {here['precision']}")
    return [f"{name} {value} -> {here.get(name, 'absent')}" for name, value in there.items() if value != here.get(name)]
