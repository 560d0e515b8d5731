"""Go on from a checkpoint with another number of mini-batches per optimizer step, and the same images in every step.

A run that has no memory left may be resumed with smaller mini-batches and as many more of them, see
:class:`~avalanche_firn.plugins.accumulation.GradientAccumulationPlugin`. Checkpoints lie between two steps, so the
images that were used are known in either cut. What counts mini-batches within an experience is counted anew; what
counts them over the run (``clock.train_iterations``, the names of checkpoints, the steps of scalars) goes on from where
it was. Weights differ by rounding from those of an uninterrupted run, and by more where BatchNorm sees mini-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avalanche_firn.plugins.accumulation import GradientAccumulationPlugin, accumulation_steps
from avalanche_firn.plugins.checkpoint_errors import CheckpointError
from avalanche_firn.plugins.plain_state import class_name, from_plain, to_plain
from avalanche_firn.plugins.strategy_state import stateful_plugins

__all__ = ["Cut", "cut_of", "recut", "saved_cut"]

_CLASS = f"{GradientAccumulationPlugin.__module__}.{GradientAccumulationPlugin.__qualname__}"


@dataclass(frozen=True)
class Cut:
    """How an optimizer step is cut: ``steps`` mini-batches of ``size`` images."""

    size: int
    steps: int

    @property
    def images(self) -> int:
        """Images per step."""
        return self.size * self.steps

    def __str__(self) -> str:
        return f"{self.steps} mini-batch{'es' * (self.steps > 1)} of {self.size} images"


def cut_of(strategy: Any) -> Cut:
    """That of a strategy."""
    return Cut(int(strategy.train_mb_size), accumulation_steps(strategy))


def saved_cut(state: dict[str, Any]) -> Cut:
    """That of the strategy which a checkpoint was made of."""
    for plugin in state["strategy"]["plugins"]:
        if plugin["class"] == _CLASS:
            return Cut(int(state["structure"]["train_mb_size"]), int(from_plain(plugin["state"])["steps"]))
    return Cut(int(state["structure"]["train_mb_size"]), 1)


def recut(state: dict[str, Any], strategy: Any) -> dict[str, Any]:
    """The state of a checkpoint as if it had been made with the strategy's cut.

    :returns: the state itself where the cut is the same, or where a step has another number of images (that isn't the
        same run, and the comparison of structures will say so); else a new one with the key ``recut``: images per
        mini-batch before and now.
    :raises CheckpointError: the place in the epoch can't be reached in mini-batches of this size.
    """
    old, new = saved_cut(state), cut_of(strategy)
    if old == new or old.images != new.images:
        return state
    moved, clock = dict(state["strategy"]), dict(state["strategy"]["clock"])
    used = clock["train_epoch_iterations"] * old.size
    if state["kind"] == "inside" and used % new.size:
        raise CheckpointError(
            f"the checkpoint was made after {used} images of an epoch, which mini-batches of {new.size} don't reach; "
            f"{old} per step are accepted"
        )
    clock["train_epoch_iterations"] = used // new.size
    structure, shifted = _structure(state["structure"], strategy, new)
    moved = _renamed(moved, shifted)
    moved |= {"plugins": _plugins(moved["plugins"], strategy), "clock": clock}
    return {**state, "structure": structure, "strategy": moved, "recut": (old.size, new.size)}


def _own(plugins: list[Any]) -> int | None:
    """Place of the accumulation in a list of plugins."""
    return next((i for i, plugin in enumerate(plugins) if class_name(plugin) == _CLASS), None)


def _structure(saved: dict[str, Any], strategy: Any, new: Cut) -> tuple[dict[str, Any], dict[str, str]]:
    """The structure with the strategy's cut, and the new names of plugins that others refer to by their place."""
    place = _own([p for p in strategy.plugins if getattr(p, "affects_results", True) is not False])
    others = [i for i, name in enumerate(saved["plugins"]) if name != _CLASS]
    names = [saved["plugins"][i] for i in others]
    if place is not None:
        names.insert(place, _CLASS)
    shifted = {f"plugin {i}": f"plugin {k + (place is not None and k >= place)}" for k, i in enumerate(others)}
    return {**saved, "train_mb_size": new.size, "plugins": names}, shifted


def _plugins(saved: list[dict[str, Any]], strategy: Any) -> list[dict[str, Any]]:
    """The states of the plugins, with that of the accumulation where the strategy has one."""
    found = [plugin for plugin in saved if plugin["class"] != _CLASS]
    mine = stateful_plugins(strategy)
    place = _own(mine)
    if place is not None:
        found.insert(place, {"class": _CLASS, "kind": "own", "state": to_plain(mine[place].state_dict())})
    return found


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """A description in which references to known objects have other names."""
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$known"}:
        return {"$known": names.get(node["$known"], node["$known"])}
    return {key: _renamed(value, names) for key, value in node.items()}
