"""What needs less memory in the very run that had none left: settings with values, those that change no figure first.

Every setting is tried on the configuration before it is named, so none is named that ``firn resume`` would refuse.
Which ones help depends on where the run stood: training holds activations of a mini-batch, everything else those of an
evaluation batch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from avalanche_firn.experiments.config import Config
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.narration import firn_command
from avalanche_firn.experiments.resume_settings import with_settings

__all__ = ["Advice", "memory_advice"]


_BY_EVALUATION_BATCHES = (
    "evaluation", "class statistics", "task inference", "linear probe", "probes", "drift", "losses of", "parameter",
    "classifier stage", "bounds", "features",
)  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """Settings that need less memory.

    Attributes:
        same: (setting, what it does) that change no figure.
        rounding: that may change figures, by rounding at least.
        refused: why the run can't cut its batches; "" where it can.
        other: settings that make another experiment.
    """

    same: tuple[tuple[str, str], ...]
    rounding: tuple[tuple[str, str], ...]
    refused: str
    other: tuple[str, ...]

    def text(self, folder: Path, before: tuple[str, ...] = ()) -> str:
        """In words, with the commands that go on in `folder`; `before`: settings that the run was given already."""
        lines = []
        if self.same:
            lines += ["what needs less memory and changes no figure:", *_table(self.same)]
        if self.rounding:
            lines += ["what needs less with the same images per step of training, but may change figures:"]
            lines += _table(self.rounding)
        if self.refused:
            lines.append(f"performance.accumulate can't be used here: {self.refused}")
        if self.other:
            lines.append(f"other settings make another experiment, under another name=: {', '.join(self.other)}")
        free = [setting for setting, _ in self.same[:1]]
        cut = [setting for setting, _ in self.rounding[:1]]
        commands = [_command(folder, [*before, *chosen]) for chosen in ([*free], [*free, *cut]) if chosen]
        commands = list(dict.fromkeys(commands))
        return "\n".join([*lines, *(f"{'or' if i else 'go on with'}: {text}" for i, text in enumerate(commands))])


def memory_advice(config: Config, phase: str, *, device: str, held: Mapping[str, str]) -> Advice:
    """What helps a run with one method.

    Args:
        config: that it ran with.
        phase: of :func:`~avalanche_firn.plugins.stop_places.phase_of`.
        device: type of the device whose memory is used up, such as ``cuda``.
        held: where the images of the run are read from, see ``hold_stream``.
    """
    training = config.training_of(config.methods[0])
    same: list[tuple[str, str]] = []
    places = {place for found in held.values() for place in found.split("+")}
    if device != "cpu" and device in places:
        same.append(("performance.memory=cpu", f"the images lie in main memory, so far on {device}"))
    elif device == "cpu" and "cpu" in places:
        same.append(("performance.memory=mapped", "the images lie in a file on disk, so far in main memory"))
        same.append(("performance.memory=off", "the images are read anew each time"))
    if device == "cpu" and training.num_workers and config.performance.prefetch_factor > 1:
        same.append(("performance.prefetch_factor=1", "batches that each loader process holds ready"))
    rounding, refused = _cuts(config) if phase.startswith("training") else ((), "")
    if phase.startswith(_BY_EVALUATION_BATCHES) and (size := training.eval_batch_size) > 1:
        what = f"images per step of an evaluation, {size} so far; rounding"
        rounding = (*rounding, (f"training.eval_batch_size={size // 2}", what))
    if device == "cpu" and training.num_workers:
        what = f"images are loaded in the main process, so far in {training.num_workers} others"
        rounding = (*rounding, ("training.num_workers=0", f"{what}; other random numbers in augmentations"))
    other = []
    rows = getattr(getattr(config.methods[0], "alignment", None), "samples_per_class", None)
    if phase == "classifier alignment" and rows is not None and rows > 1:
        other.append(f"methods.{config.methods[0].name}.alignment.samples_per_class={rows // 2}")
    if config.precision == "fp32":
        other.append("precision=bf16")
    if training.batch_size > 1:
        other.append(f"training.batch_size={training.batch_size // 2}")
    return Advice(tuple(entry for entry in same if _fits(config, entry[0])), rounding, refused, tuple(other))


def _cuts(config: Config) -> tuple[tuple[tuple[str, str], ...], str]:
    """Ways to cut a batch, two at most, or why there is none."""
    size, now = config.training_of(config.methods[0]).batch_size, config.performance.accumulate
    found: list[tuple[str, str]] = []
    reason = ""
    for steps in (now * factor for factor in (2, 4, 8, 3, 5, 7)):
        if size % steps or len(found) == 2:
            continue
        setting = f"performance.accumulate={steps}"
        try:
            with_settings(config, [setting])
        except ConfigError as error:
            reason = "; ".join(problem.reason for problem in error.problems)
            break
        found.append((setting, f"mini-batches of {size // steps} images, {size // now} so far; rounding"))
    if not found and not reason:
        reason = f"a batch of {size} images has no smaller equal parts"
    return tuple(found), "" if found else reason


def _fits(config: Config, setting: str) -> bool:
    try:
        with_settings(config, [setting])
    except ConfigError:
        return False
    return True


def _table(entries: tuple[tuple[str, str], ...]) -> list[str]:
    width = max(len(setting) for setting, _ in entries)
    return [f"  {setting:<{width}}  {what}" for setting, what in entries]


def _command(folder: Path, settings: list[str]) -> str:
    last = {setting.partition("=")[0]: setting for setting in settings}  # a later value replaces an earlier one
    return " ".join([f"{firn_command()} resume", shlex.quote(str(folder)), *map(shlex.quote, last.values())])
