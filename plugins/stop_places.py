"""Where a run stood when an error ended it, in words: phase, task, epoch, iteration.

Nothing is noted while a run goes on, so it costs nothing: clock and experience of the strategy say how far it is, and
the modules on the traceback say what it was doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["chain", "frames", "phase_of", "place_of"]

_PHASES = {
    "models.parts:extract_features": "features of images",
    "plugins.classifier_alignment": "classifier alignment",
    "plugins.class_statistics": "class statistics",
    "plugins.cluster_gaussians": "class statistics",
    "plugins.mahalanobis": "class statistics",
    "plugins.mahalanobis_math": "class statistics",
    "plugins.task_inference": "task inference",
    "plugins.linear_probe": "linear probe",
    "plugins.probe_head": "linear probe",
    "plugins.classifier_stage": "classifier stage",
    "plugins.critical_parameters": "parameter importances",
    "plugins.importance": "parameter importances",
    "plugins.avalanche_state": "parameter importances",
    "plugins.sequential_phase": "training (inner steps of an episode)",
    "plugins.relearning": "relearning after a zap",
    "plugins.rehearsal": "choosing images to keep",
    "plugins.placed_buffer": "choosing images to keep",
    "plugins.checkpoint_files": "saving a checkpoint",
    "evaluation.representation": "probes of the representation",
    "evaluation.probes": "probes of the representation",
    "evaluation.fine_tuning": "probes of the representation",
    "evaluation.adaptation": "probes of the representation",
    "evaluation.drift": "drift of the representation",
    "evaluation.dynamics": "losses of single tasks",
    "evaluation.landscape": "the loss landscape",
    "evaluation.trajectory": "the loss landscape",
    "evaluation.contrastive_report": "bounds of the contrastive losses",
    "evaluation.gradient_alignment": "alignment of gradients",
    "benchmarks.memory": "holding images in memory",
    "benchmarks.image_store": "holding images in memory",
    "models.backbones": "loading the backbone",
}
"""Module below ``avalanche_firn``, or one of its functions -> what happens there; the innermost one counts."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        following = current.__cause__
        if following is None and not current.__suppress_context__:
            following = current.__context__
        current = following


def frames(error: BaseException) -> list[str]:
    """``module:function`` of the calls on the tracebacks of an error and its causes, innermost first."""
    found: list[str] = []
    for link in chain(error):
        names: list[str] = []
        trace = link.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            names.append(f"{frame.f_globals.get('__name__', '')}:{frame.f_code.co_name}")
            trace = trace.tb_next
        found = names[::-1] + found  # a cause lies deeper than what was made of it
    return found


def phase_of(error: BaseException, strategy: Any = None) -> str:
    """What was being done: an entry of the table above, else ``training`` or ``evaluation``.

    :param strategy: an Avalanche strategy; None before there is one, the phase is ``preparation`` then.
    """
    for frame in frames(error):
        call = frame.removeprefix("avalanche_firn.")
        known = _PHASES.get(call) or _PHASES.get(call.partition(":")[0])
        if known is not None:
            return known
    if strategy is None:
        return "preparation"
    return "training" if strategy.is_training else "evaluation"


def place_of(error: BaseException, strategy: Any = None) -> str:
    """Phase, task, epoch and iteration, such as ``training of task 2/5 (classes 3, 4, 5), epoch 1/20, iteration 7``.

    Tasks, epochs and iterations count from 1.
    """
    phase = phase_of(error, strategy)
    if strategy is None or phase == "preparation":
        return phase
    clock, task = strategy.clock, _task(strategy.experience)
    if not strategy.is_training:
        return f"{phase}{f' of {task}' if task else ''}, after {clock.train_exp_counter} trained tasks"
    if not task:
        return phase
    done = int(clock.train_exp_iterations)
    if not phase.startswith("training"):
        return f"{phase} of {task}, after {done} iterations"
    epoch = f"epoch {min(clock.train_exp_epochs + 1, strategy.train_epochs)}/{strategy.train_epochs}"
    inside = int(clock.train_epoch_iterations) + 1
    total = f" ({done + 1} of the task)" if done + 1 != inside else ""
    return f"{phase} of {task}, {epoch}, iteration {inside}{total}"


def _task(experience: Any) -> str:
    """``task 2/5 (classes 3, 4, 5)``, as far as the experience says."""
    number = getattr(experience, "current_experience", None)
    if number is None:
        return ""
    try:
        total = f"/{len(experience.origin_stream)}"
    except (AttributeError, TypeError):
        total = ""
    classes = sorted(getattr(experience, "classes_in_this_experience", None) or ())
    shown = f" ({len(classes)} classes)" if len(classes) > 10 else ""
    if 0 < len(classes) <= 10:
        shown = f" ({'classes' if len(classes) > 1 else 'class'} {', '.join(map(str, classes))})"
    return f"task {number + 1}{total}{shown}"
