"""Where a run stands, in words, for the errors about numbers that aren't finite; and the context that raises them.

Functions of tensors raise :class:`~avalanche_firn.models.finite_values.NonFiniteValues` or ``FloatingPointError`` and
know nothing of a run. :func:`finite_or_stop` makes of it a
:class:`~avalanche_firn.plugins.run_errors.NonFiniteError` that says where. Costs nothing as long as all is well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.plugins.run_errors import NonFiniteError

__all__ = [
    "experience_words",
    "finite_or_stop",
    "kept_checkpoint",
    "listed",
    "nonfinite_stop",
    "not_evaluated",
    "refuse_empty",
]


_EVALUATION = "Precision fp32 or bf16, finite masks in the model, or a look at the images usually helps."


def listed(values: Iterable[Any], limit: int = 5) -> str:
    """The first few values, and how many more there are."""
    found = list(values)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(map(str, found[:limit])) + more


def experience_words(experience: Any) -> str:
    """``experience 1 (classes 2, 3)``, counted from 0; of many classes the first ten."""
    if experience is None:
        return "between experiences"
    classes = sorted(int(c) for c in getattr(experience, "classes_in_this_experience", None) or ())
    words = f"experience {getattr(experience, 'current_experience', '?')}"
    return f"{words} (classes {listed(classes, 10)})" if classes else words


def kept_checkpoint(strategy: Any) -> str:
    """A sentence on the newest checkpoint, empty where the strategy makes none."""
    from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin  # here: plugins that it imports import us
    from avalanche_firn.plugins.checkpoint_files import checkpoints
    from avalanche_firn.plugins.finite_guard import FiniteGuardPlugin

    plugins = getattr(strategy, "plugins", ())
    guarded = any(isinstance(plugin, FiniteGuardPlugin) for plugin in plugins)
    for plugin in plugins:
        if isinstance(plugin, ExactCheckpointPlugin):
            found = checkpoints(plugin.directory)
            if not found:
                return " No checkpoint was made yet."
            unseen = "" if guarded else ", made without a guard: it may hold the same"
            return f" The last checkpoint is kept: {found[0]}{unseen}."
    return ""


def nonfinite_stop(strategy: Any, doing: str, what: object, advice: str = "") -> NonFiniteError:
    """The error to raise: where the run stands, what was done, what isn't finite, what helps, what is kept.

    :param doing: such as ``"the statistics for alignment"``. :param what: such as the error that a function raised.
    :param advice: a sentence. :returns: the error.
    """
    place = "" if strategy is None else f"{experience_words(getattr(strategy, 'experience', None))}, "
    sentence = str(what).rstrip(".")
    return NonFiniteError(f"{place}{doing}: {sentence}.{f' {advice}' if advice else ''}{kept_checkpoint(strategy)}")


@contextmanager
def finite_or_stop(strategy: Any, doing: str, advice: str = "") -> Iterator[None]:
    """Inside, numbers that aren't finite raise :class:`NonFiniteError`; parameters: see :func:`nonfinite_stop`."""
    try:
        yield
    except (NonFiniteValues, FloatingPointError) as error:
        raise nonfinite_stop(strategy, doing, error, advice) from error


def not_evaluated(strategy: Any, what: str, place: str = "") -> NonFiniteError:
    """The error to raise where an evaluation gives no finite number.

    :param what: such as ``"the loss is nan"``. :param place: of the evaluation, default the experience in work.
    """
    experience = getattr(strategy, "experience", None)
    stream = getattr(getattr(experience, "origin_stream", None), "name", None)
    place = place or experience_words(experience) + (f" of the stream {stream!r}" if stream else "")
    trained = getattr(getattr(strategy, "clock", None), "train_exp_counter", None)
    after = "" if trained is None else f" after {trained} experiences of training"
    return NonFiniteError(f"evaluation of {place}{after}: {what}. {_EVALUATION}{kept_checkpoint(strategy)}")


def refuse_empty(experience: Any) -> None:
    """:raises ValueError: the experience has no sample to train on."""
    dataset = getattr(experience, "dataset", None)
    if dataset is not None and len(dataset) == 0:
        raise ValueError(
            f"{experience_words(experience)} has no training sample; at least one is accepted (leave the experience "
            "out of the stream)"
        )
