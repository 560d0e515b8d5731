"""Everything inside an Avalanche strategy that decides what it does next, as plain values, and back in place.

Model, criterion, optimizer, plugins, evaluator, clock and whatever a strategy class adds. What can't be saved exactly
is refused by name by :func:`check_strategy`, before any work is done; what doesn't come back to the bit is refused by
:func:`restore_strategy`. Used by :class:`~avalanche_firn.plugins.checkpoint.ExactCheckpointPlugin`. Tensors are
referenced, not copied; one pass over the module tree.
"""

from __future__ import annotations

import functools
import os
import platform
import types
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import avalanche
import numpy as np
import torch
from avalanche.evaluation.metric_results import AlternativeValues
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import BaseSGDTemplate, PeriodicEval
from matplotlib.figure import Figure
from torch import nn

from avalanche_firn.models.processes import process_count
from avalanche_firn.plugins.checkpoint_files import CheckpointError, matching_files
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.model_state import (
    describe_parameter,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from avalanche_firn.plugins.plain_state import (
    class_name,
    differing_state,
    from_plain,
    has_state_dict,
    load_plain_state,
    plain_state,
    to_plain,
)
from avalanche_firn.plugins.run_errors import RunError

_TEMPLATE = {
    "_criterion", "_distributed_check", "_eval_streams", "_stop_training", "adapted_dataset", "clock",
    "current_eval_stream", "dataloader", "device", "eval_every", "eval_mb_size", "evaluator", "experience",
    "is_training", "loss", "mb_output", "mbatch", "model", "optimized_param_id", "optimizer", "plugins", "retain_graph",
    "train_epochs", "train_mb_size",
}  # fmt: skip
"""Attributes of the template itself; a strategy class may add others."""


# ---------------------------------------------------------------------- checks
def check_strategy(strategy: Any, *, inside: bool) -> None:
    """Refuse what can't be saved exactly.

    :param inside: checkpoints are made inside experiences too.
    :raises ValueError: a plugin, metric, criterion or attribute can't be saved, or the training loop is not the
        template's.
    """
    if not isinstance(strategy, BaseSGDTemplate):
        raise ValueError(f"the strategy is a {class_name(strategy)}; a strategy on BaseSGDTemplate is accepted")
    if inside and type(strategy)._train_exp is not BaseSGDTemplate._train_exp:
        raise ValueError(
            f"{class_name(strategy)} has its own _train_exp, which can't be entered in the middle; "
            "every=0 (checkpoints at experience ends only) is accepted"
        )
    capture_strategy(strategy)


def structure(strategy: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit: classes, settings, names and shapes of the initial parameters."""
    criterion = strategy._criterion
    named = isinstance(criterion, (types.FunctionType, types.BuiltinFunctionType))
    return {
        "strategy": class_name(strategy),
        "plugins": [class_name(p) for p in strategy.plugins if _matters(p)],
        "criterion": criterion.__qualname__ if named else class_name(criterion),
        "optimizer": class_name(strategy.optimizer),
        "metrics": [class_name(m) for m in strategy.evaluator.metrics],
        "train_mb_size": strategy.train_mb_size,
        "train_epochs": strategy.train_epochs,
        "eval_every": strategy.eval_every,
        "parameters": {n: describe_parameter(p) for n, p in strategy.model.named_parameters()},
    }


def structure_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line per difference, at most five for parameters."""
    lines = [
        f"{field}: checkpoint {saved.get(field)!r}, now {current[field]!r}"
        for field in current
        if field != "parameters" and saved.get(field) != current[field]
    ]
    old, new = saved["parameters"], current["parameters"]
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    lines += [f"parameter {n!r}: checkpoint {old.get(n, 'absent')}, now {new.get(n, 'absent')}" for n in names[:5]]
    return lines + ([f"and {len(names) - 5} more parameters"] if len(names) > 5 else [])


def environment(strategy: Any) -> dict[str, str]:
    """What decides the last bits of a result beside the code: versions, device, threads."""
    device = strategy.device
    return {
        "avalanche_firn": _own_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "avalanche": avalanche.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "precision": _precision(strategy),
        "processes": str(process_count()),
    }


def _precision(strategy: Any) -> str:
    """What forward passes are computed in."""
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, MixedPrecisionPlugin)]
    return found[0].resolve(torch.device(strategy.device)) if found else "fp32"


@functools.cache
def _own_version() -> str:
    try:
        return version("avalanche-firn")
    except PackageNotFoundError:  # run from a copy that isn't installed
        return "unknown"


# --------------------------------------------------------------- the whole state
def capture_strategy(strategy: Any) -> dict[str, Any]:
    """The state of a strategy as a description (:mod:`~avalanche_firn.plugins.plain_state`).

    :raises ValueError: something can't be saved exactly; the message names it.
    """
    known = _known(strategy)
    try:
        return {
            "model": module_state(strategy.model),
            "criterion": _criterion_state(strategy, known),
            "optimizer": optimizer_state(strategy),
            "plugins": [_object_state(p, known) for p in stateful_plugins(strategy)],
            "evaluator": _evaluator_state(strategy.evaluator, known),
            "attributes": plain_state(strategy, known=known, skip=_template_attributes(strategy)),
            "periodic": [[p.do_initial, p.do_final, p._is_eval_updated] for p in _periodic(strategy)],
            "clock": dict(vars(strategy.clock)),
            "loss": strategy.loss.detach().clone(),
        }
    except TypeError as error:
        raise ValueError(
            f"the state of {type(strategy).__name__} can't be saved exactly: {error}. A plugin or metric needs "
            "state_dict() and load_state_dict(), or plain attributes, or the attribute stateless = True"
        ) from error


def restore_strategy(strategy: Any, state: dict[str, Any], *, optimizer: bool = True, final: bool = True) -> None:
    """Bring a strategy to a captured state; what lay on another device than its own goes to the strategy's.

    :param optimizer: False leaves the optimizer alone.
    :param final: False before the hooks of an interrupted experience have run again: objects that they create are left
        out, and what plugins made of their state isn't verified.
    :raises CheckpointError: something doesn't fit, or didn't come back to the bit.
    """
    try:
        _restore(strategy, state, optimizer=optimizer, final=final)
    except (RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a state that capture_strategy never gives, anything may come
        told = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointError) and "checkpoint" in told:
            raise
        raise CheckpointError(f"the checkpoint doesn't fit the strategy: {told}") from error


def _restore(strategy: Any, state: dict[str, Any], *, optimizer: bool, final: bool) -> None:
    known = _known(strategy)
    load_module_state(strategy.model, state["model"], "model")
    if state["criterion"] is not None:
        _load_criterion(strategy, state["criterion"], known)
    if optimizer:
        load_optimizer_state(strategy, state["optimizer"])
    known = _known(strategy)
    for plugin, saved in zip(stateful_plugins(strategy), state["plugins"], strict=True):
        _load_object(plugin, saved, known, strict=final, device=strategy.device)
    attributes = _template_attributes(strategy)
    load_plain_state(strategy, state["attributes"], known=known, skip=attributes, strict=final, device=strategy.device)
    _load_evaluator(strategy.evaluator, state["evaluator"], known, strategy.device)
    for plugin, flags in zip(_periodic(strategy), state["periodic"], strict=True):
        plugin.do_initial, plugin.do_final, plugin._is_eval_updated = flags
    if state["clock"].keys() != vars(strategy.clock).keys():
        raise CheckpointError(f"the clock has {sorted(vars(strategy.clock))}; the checkpoint {sorted(state['clock'])}")
    vars(strategy.clock).update(state["clock"])
    strategy.loss = state["loss"].to(strategy.device)
    if final:  # objects that share a part can't be brought to two states
        place = differing_state(_timeless(state["evaluator"]), _timeless(_evaluator_state(strategy.evaluator, known)))
        if place is not None:
            raise CheckpointError(f"the evaluator didn't come back as the checkpoint has it: {place} differs")


def _timeless(node: Any) -> Any:
    """A description without the time that clocks have measured: it comes back rounded."""
    if isinstance(node, list):
        return [_timeless(part) for part in node]
    if isinstance(node, dict):
        return {key: key == "$elapsed" or _timeless(part) for key, part in node.items()}
    return node


def verify_plugins(strategy: Any, state: dict[str, Any]) -> None:
    """Compare what plugins say about themselves with the state that was loaded into them.

    :raises CheckpointError: a plugin's load_state_dict didn't restore what its state_dict had given.
    """
    known = _known(strategy)
    for plugin, saved in zip(stateful_plugins(strategy), state["plugins"], strict=True):
        if saved["kind"] == "own":
            place = differing_state(saved, _object_state(plugin, known))
            if place is not None:
                raise CheckpointError(f"{class_name(plugin)} didn't restore its state exactly: {place} differs")


# ---------------------------------------------- plugins, criterion, evaluator
def stateful_plugins(strategy: Any) -> list[Any]:
    """Plugins that are saved as such; evaluator, clock and periodic evaluation are saved on their own."""
    apart = (EvaluationPlugin, PeriodicEval, Clock)
    return [p for p in strategy.plugins if _matters(p) and not isinstance(p, apart)]


def _matters(plugin: Any) -> bool:
    """Not a progress bar or the like, which a run may be resumed with or without."""
    return getattr(plugin, "affects_results", True) is not False


def _periodic(strategy: Any) -> list[PeriodicEval]:
    return [p for p in strategy.plugins if isinstance(p, PeriodicEval)]


def _object_state(obj: Any, known: dict[str, Any]) -> dict[str, Any]:
    name = class_name(obj)
    if has_state_dict(obj):
        return {"class": name, "kind": "own", "state": to_plain(obj.state_dict(), path=name, known=known)}
    if getattr(obj, "stateless", False) is True:
        return {"class": name, "kind": "none", "state": None}
    return {"class": name, "kind": "plain", "state": plain_state(obj, known=known)}


def _load_object(obj: Any, saved: dict[str, Any], known: dict[str, Any], *, strict: bool, device: torch.device) -> None:
    if saved["class"] != class_name(obj):
        raise ValueError(f"checkpoint {saved['class']}, now {class_name(obj)}")
    if saved["kind"] == "own":
        obj.load_state_dict(from_plain(saved["state"], known=known, device=device))
    elif saved["kind"] == "plain":
        load_plain_state(obj, saved["state"], known=known, strict=strict, device=device)


def _criterion_state(strategy: Any, known: dict[str, Any]) -> dict[str, Any] | None:
    criterion = strategy._criterion
    if isinstance(criterion, nn.Module):
        return {"kind": "module", "state": module_state(criterion)}
    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)
    if any(criterion is p for p in strategy.plugins) or isinstance(criterion, functions):
        return None
    return _object_state(criterion, known)


def _load_criterion(strategy: Any, saved: dict[str, Any], known: dict[str, Any]) -> None:
    if saved["kind"] == "module":
        load_module_state(strategy._criterion, saved["state"], "criterion")
    else:
        _load_object(strategy._criterion, saved, known, strict=True, device=strategy.device)


def _evaluator_state(evaluator: Any, known: dict[str, Any]) -> dict[str, Any]:
    last = {name: _without_picture(value) for name, value in evaluator.last_metric_results.items()}
    collected = {
        name: (steps, [_without_picture(value) for value in values])
        for name, (steps, values) in evaluator.all_metric_results.items()
    }
    return {
        "metrics": [_object_state(m, known) for m in evaluator.metrics],
        "last": to_plain(last, path="evaluator.last_metric_results"),
        "all": to_plain(collected, path="evaluator.all_metric_results"),
        "active": evaluator.active,
    }


def _without_picture(value: Any) -> Any:
    """A value that is also a picture stays as its other forms: the picture has been logged and decides nothing."""
    if not isinstance(value, AlternativeValues):
        return value
    return AlternativeValues(*(form for form in value.alternatives if not isinstance(form, Figure)))


def _load_evaluator(evaluator: Any, saved: dict[str, Any], known: dict[str, Any], device: torch.device) -> None:
    for metric, state in zip(evaluator.metrics, saved["metrics"], strict=True):
        _load_object(metric, state, known, strict=True, device=device)
    evaluator.last_metric_results = from_plain(saved["last"], device=device)
    evaluator.all_metric_results.clear()
    evaluator.all_metric_results.update(from_plain(saved["all"], device=device))
    evaluator.active = saved["active"]


def _template_attributes(strategy: Any) -> set[str]:
    """Attributes of the template, and methods that a plugin has wrapped on the instance."""
    wrapped = {n for n, v in vars(strategy).items() if callable(v) and hasattr(type(strategy), n)}
    return _TEMPLATE | wrapped


def _known(strategy: Any) -> dict[str, Any]:
    """Objects that others may refer to, by name: their own state is saved in its place."""
    known = {"strategy": strategy, "evaluator": strategy.evaluator, "clock": strategy.clock, "model": strategy.model}
    known |= {f"plugin {i}": p for i, p in enumerate(filter(_matters, strategy.plugins))}
    known |= {f"model.{n}": m for n, m in strategy.model.named_modules() if n}
    known |= {f"parameter {n}": p for n, p in strategy.model.named_parameters()}
    return known | {f"buffer {n}": b for n, b in strategy.model.named_buffers()}


# ---------------------------------------------------------------------- loggers
def flush_loggers(strategy: Any) -> None:
    """Write out what loggers hold back: TensorBoard's writer, open text files."""
    for logger in strategy.evaluator.loggers:
        for value in list(vars(logger).values()):
            if callable(getattr(value, "flush", None)) and not getattr(value, "closed", False):
                value.flush()


def close_writers(strategy: Any) -> None:
    """Close TensorBoard's writers; they open a new file at their next event, so the present one may be deleted."""
    for writer in _writers(strategy):
        writer.close()


def reopen_writers(strategy: Any) -> None:
    """Open new files for TensorBoard's writers that were closed, now and not at their next event."""
    for writer in _writers(strategy):
        if callable(opened := getattr(writer, "_get_file_writer", None)):
            opened()


def unmatched_writers(strategy: Any, patterns: Sequence[str]) -> list[str]:
    """Folders of TensorBoard's writers whose event files no pattern matches."""
    folders = {os.path.dirname(p) for p in matching_files(patterns)}
    return [str(w.log_dir) for w in _writers(strategy) if os.path.abspath(w.log_dir) not in folders]


def _writers(strategy: Any) -> list[Any]:
    writers = [getattr(logger, "writer", None) for logger in strategy.evaluator.loggers]
    return [w for w in writers if hasattr(w, "log_dir") and callable(getattr(w, "close", None))]


__all__ = [
    "capture_strategy",
    "check_strategy",
    "close_writers",
    "environment",
    "flush_loggers",
    "reopen_writers",
    "restore_strategy",
    "stateful_plugins",
    "structure",
    "structure_differences",
    "unmatched_writers",
    "verify_plugins",
]
