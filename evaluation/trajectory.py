"""The path of a model through weight space: snapshots of chosen parameters, by hand or over a stream.

:class:`Trajectory` feeds :func:`~avalanche_firn.evaluation.landscape_math.pca_directions` and the landscapes of
:mod:`~avalanche_firn.evaluation.landscape`. Our own: no public code for the trajectories of arXiv 2507.01559 exists.

Cost: one copy of the chosen parameters to the CPU for each snapshot, which waits for the device; memory and limits are
in the class. Training isn't changed by a bit: nothing is drawn, written or switched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_firn.evaluation.landscape_math import Layout, Points, block_width, named_tensors
from avalanche_firn.models.parts import find_parts

Part = Literal["all", "encoder", "head"]


def chosen_parameters(
    model: nn.Module, *, part: Part = "all", ignore: Collection[str] = (), head_name: str | None = None
) -> dict[str, nn.Parameter]:
    """Floating-point parameters of a part of a model, by name.

    :param part: ``"encoder"`` is all but the classifier that :func:`~avalanche_firn.models.find_parts` finds,
        ``"head"`` that classifier, ``"all"`` both.
    :param ignore: names to leave out, for instance ``model.dead_parameters()`` of the zapping papers' convnets: biases
        that rounding noise moves, without any effect on the function.
    :raises ValueError: an unknown part, names to ignore that the part doesn't have, nothing left.
    """
    if part not in get_args(Part):
        raise ValueError(f"part: got {part!r}; accepted is one of {list(get_args(Part))}")
    parameters = dict(model.named_parameters())
    if part != "all":
        parts = find_parts(model, head_name)
        parameters = dict(parts.head_parameters() if part == "head" else parts.backbone_parameters())
    if isinstance(ignore, str) or (unknown := sorted({*ignore} - parameters.keys())):
        what = f"the text {ignore!r}" if isinstance(ignore, str) else f"{unknown}"
        raise ValueError(f"ignore: got {what}; accepted are names of parameters of the part {part!r}, {[*parameters]}")
    chosen = {n: p for n, p in parameters.items() if n not in ignore and p.is_floating_point()}
    if not chosen:
        raise ValueError(f"part: {part!r} without {sorted(ignore)} has no parameters; accepted is a part with some")
    return chosen


class Trajectory(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Snapshots of the weights over training.

    As a plugin it takes one before the first experience ("start"), every ``every`` iterations, and after each
    experience ("task 0", "task 1", ..., by the clock); put it behind plugins that change weights after training. By
    hand: ``trajectory.record(model)``. A snapshot with a label marks a place on the path.

    Memory: 4 bytes per parameter and snapshot on the CPU, 2 with ``storage="float16"``: 200 snapshots of the encoder of
    the 28 px convnet (1.2 million): 0.9 or 0.5 GB; of ViT-B (86 million): the default ``max_bytes`` holds 12 or 24.
    Nothing grows beyond the two limits. Checkpoints hold all snapshots, so their size counts at each save.

    :param part: see :func:`chosen_parameters`. A head that is zapped or grows is best left out with ``"encoder"``: its
        jumps otherwise dominate the principal directions, and weights that change their shape have no path.
    :param every: training iterations between snapshots; None (default): only the start and the ends of experiences.
    :param ignore: names of parameters to leave out, see :func:`chosen_parameters`.
    :param storage: ``"float32"``, or ``"float16"``: the first snapshot in float32, the others as scaled differences
        from it, accurate to 0.05 % of the distance moved.
    :param max_snapshots: at most this many, at least 3; 200, our choice.
    :param max_bytes: at most this much memory; 4 GiB, our choice.
    :param when_full: ``"thin"``: drop the snapshot whose neighbours are closest in steps, unlabelled ones first, never
        the first or the newest, so that the path stays evenly covered; ``"error"``: refuse the next snapshot.
    :param head_name: dotted name of the classifier, where it cannot be found.
    :raises ValueError: an argument out of range; when recording, a part that isn't there, parameters that are not those
        of the first snapshot, a model of which ``max_bytes`` can't hold 3 snapshots, a full store with ``"error"``.
    """

    def __init__(
        self,
        *,
        part: Part = "all",
        every: int | None = None,
        ignore: Collection[str] = (),
        storage: Literal["float32", "float16"] = "float32",
        max_snapshots: int = 200,
        max_bytes: int = 4 * 2**30,
        when_full: Literal["thin", "error"] = "thin",
        head_name: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, accepted in (
            ("part", part, [*get_args(Part)]),
            ("storage", storage, ["float32", "float16"]),
            ("when_full", when_full, ["thin", "error"]),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: got {value!r}; accepted is one of {accepted}")
        for name, number, least in (
            ("every", every, 1),
            ("max_snapshots", max_snapshots, 3),
            ("max_bytes", max_bytes, 1),
        ):
            if name == "every" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name}: got {number!r}; accepted are integers from {least}")
        if isinstance(ignore, str):
            raise ValueError(f"ignore: got the text {ignore!r}; accepted are several names")
        self.part, self.every, self.ignore, self.head_name = part, every, tuple(ignore), head_name
        self.storage, self.max_snapshots, self.max_bytes, self.when_full = storage, max_snapshots, max_bytes, when_full
        self.steps: list[int] = []
        """Training iterations done at each snapshot (by hand: what was given)."""
        self.labels: list[str] = []
        """One for each snapshot, "" for those that only lie on the way."""
        self._iterations = 0
        self._layout: Layout = {}
        self._rows: list[Tensor] = []
        self._scales: list[float] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes held by the snapshots."""
        return sum(row.numel() * row.element_size() for row in self._rows)

    # --------------------------------------------------------------- recording
    def record(self, model: nn.Module, *, step: int | None = None, label: str = "") -> None:
        """Take a snapshot now.

        :param step: position on the path; default one after the last.
        :param label: marks the place; labelled snapshots are thinned out last.
        """
        parameters = self._parameters(model)
        if len(self) >= self._capacity():
            if self.when_full == "error":
                raise ValueError(
                    f"trajectory: {len(self)} snapshots are all that max_snapshots={self.max_snapshots} and "
                    f"max_bytes={self.max_bytes} allow; when_full='thin' drops some"
                )
            while len(self) >= self._capacity():
                self._drop(self._closest())
        place = next(iter(parameters.values())).device
        # one vector, so that a device is waited for once
        flat = torch.cat([p.detach().reshape(-1).to(place, torch.float32) for p in parameters.values()]).cpu()
        scale = 1.0
        if self.storage == "float16" and self._rows:
            flat -= self._rows[0]
            scale = float(flat.abs().max()) or 1.0
            flat = flat.div_(scale).half()
        self._rows.append(flat)
        self._scales.append(scale)
        self.steps.append((self.steps[-1] + 1 if self.steps else 0) if step is None else int(step))
        self.labels.append(label)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Those to record; ValueError unless they fit to the first snapshot and into memory."""
        chosen = chosen_parameters(model, part=self.part, ignore=self.ignore, head_name=self.head_name)
        layout = {name: p.shape for name, p in chosen.items()}
        if not self._layout:
            self._layout = layout
            if (capacity := self._capacity()) < 3:
                self._layout = {}
                size = sum(shape.numel() for shape in layout.values())
                raise ValueError(
                    f"max_bytes: {self.max_bytes} hold {capacity} snapshots of {size} numbers; accepted is room for 3"
                )
        elif layout != self._layout:
            names = [n for n in {**layout, **self._layout} if layout.get(n) != self._layout.get(n)]
            raise ValueError(
                f"trajectory: {names} came, went or changed shape since the first snapshot; accepted are parameters "
                "that stay, for instance part='encoder', or ignore= their names"
            )
        return {name: chosen[name] for name in self._layout}

    def _capacity(self) -> int:
        size = sum(shape.numel() for shape in self._layout.values())
        if self.storage == "float16":  # the first one is a float32
            fit = max(0, self.max_bytes - 4 * size) // (2 * size) + (self.max_bytes >= 4 * size)
        else:
            fit = self.max_bytes // (4 * size)
        return min(self.max_snapshots, fit)

    def _closest(self) -> int:
        """Index of the snapshot that the path misses least."""
        middle = range(1, len(self) - 1)
        plain = [i for i in middle if not self.labels[i]]
        return min(plain or middle, key=lambda i: self.steps[i + 1] - self.steps[i - 1])

    def _drop(self, index: int) -> None:
        for store in (self._rows, self._scales, self.steps, self.labels):
            del store[index]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------- hooks
    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The start; later on only a check, before an experience's work is lost."""
        if self._rows:
            self._parameters(strategy.model)
        else:
            self.record(strategy.model, step=self._iterations, label="start")

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Counts; a snapshot every ``every`` iterations."""
        self._iterations += 1
        if self.every is not None and self._iterations % self.every == 0:
            self.record(strategy.model, step=self._iterations)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The end of a task; replaces a snapshot of the last iteration, as other plugins may have acted since."""
        if len(self) > 1 and self.steps[-1] == self._iterations and not self.labels[-1]:
            self._drop(-1)
        self.record(strategy.model, step=self._iterations, label=f"task {strategy.clock.train_exp_counter}")

    # ----------------------------------------------------------------- reading
    @property
    def points(self) -> Points:
        """The snapshots for :func:`~avalanche_firn.evaluation.landscape_math.pca_directions`, decoded in blocks."""
        width = block_width(len(self))
        size = sum(shape.numel() for shape in self._layout.values())

        def blocks() -> Iterator[Tensor]:
            for start in range(0, size, width):
                yield torch.stack([self._decoded(i, start, start + width).double() for i in range(len(self))])

        return Points(len(self), dict(self._layout), blocks)

    def snapshot(self, index: int) -> dict[str, Tensor]:
        """Snapshot ``index`` (negative: from the end) as float32 tensors by name; copies.

        :raises IndexError: there is no such snapshot.
        """
        return named_tensors(self._decoded(range(len(self))[index], 0, None).clone(), self._layout)

    def _decoded(self, index: int, start: int, stop: int | None) -> Tensor:
        row = self._rows[index][start:stop]
        if index == 0 or self.storage == "float32":
            return row
        return row.float() * self._scales[index] + self._rows[0][start:stop]

    # ------------------------------------------------------------------- state
    def _settings(self) -> dict[str, Any]:
        names = ("part", "every", "storage", "max_snapshots", "max_bytes", "when_full")
        return {**{name: getattr(self, name) for name in names}, "ignore": [*self.ignore]}

    def state_dict(self) -> dict[str, Any]:
        """All snapshots (not copied), where they lie, and the settings that they belong to."""
        return {
            "settings": self._settings(),
            "iterations": self._iterations,
            "layout": {name: [*shape] for name, shape in self._layout.items()},
            "rows": [*self._rows],
            "scales": [*self._scales],
            "steps": [*self.steps],
            "labels": [*self.labels],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a trajectory with the same arguments; ValueError where arguments differ."""
        own = self._settings()
        if differing := [name for name in own if state["settings"].get(name) != own[name]]:
            raise ValueError(f"Trajectory: the state was made with another value of {', '.join(differing)}")
        self._iterations = int(state["iterations"])
        self._layout = {name: torch.Size(shape) for name, shape in state["layout"].items()}
        self._rows = [row.detach().to("cpu", copy=True) for row in state["rows"]]
        self._scales = [float(scale) for scale in state["scales"]]
        self.steps, self.labels = [int(step) for step in state["steps"]], [str(label) for label in state["labels"]]


__all__ = ["Part", "Trajectory", "chosen_parameters"]
