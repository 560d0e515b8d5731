"""A few images of each task, kept as tensors, and one batched evaluation of all of them that leaves no trace.

What :class:`~avalanche_firn.evaluation.dynamics.TaskDynamics` and
:class:`~avalanche_firn.evaluation.gradient_alignment.GradientAlignment` look at. Choosing is deterministic: tasks and
images are spread evenly over the stream and over each task, so no seed is needed and a resumed run sees the same.

An evaluation is one forward pass without gradients, in evaluation mode and without autocast. Modes, buffers, gradients
and random generators stay, and nothing waits for the device. Loaders, ``strategy.eval`` and model adaptation aren't
involved. Cost: 4 bytes for each number of the images on the device (250 of 3x84x84: 21 MB).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLExperience
from avalanche.models import IncrementalClassifier
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn
from torch.nn import functional

from avalanche_firn.models.heads import UNSEEN_LOGIT, TaskwiseLinearHead
from avalanche_firn.models.parts import evaluation_mode, forward_batch
from avalanche_firn.plugins.random_state import private_random_state


def whole(name: str, value: Any, least: int) -> int:
    """``value`` if it is an integer from ``least``, else a ValueError that names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: got {value!r}; accepted are integers from {least}")
    return int(value)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0 to count - 1, evenly spread, the first and (from two on) the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


class ProbeTasks:
    """Images and labels of some tasks of a stream, and the losses of a model on them.

    :param tasks: per task an Avalanche experience (its evaluation transforms are applied), a data set with items
        ``(x, y, ...)``, or a pair of tensors: float images (n, ...) and integer labels (n,). A stream will do.
    :param max_tasks: tasks that are kept, spread evenly over all of them.
    :param images_per_task: images of each, spread evenly over the task in stored order.
    :param batch_size: images per forward pass, None: what suits the device; its only effect is on memory and speed.
    :raises ValueError: no tasks, a task without images, images of different shapes, labels below 0.
    """

    def __init__(self, tasks: Sequence[Any], *, max_tasks: int, images_per_task: int, batch_size: int | None) -> None:
        whole("max_tasks", max_tasks, 1)
        whole("images_per_task", images_per_task, 1)
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        self.total = len(tasks)
        """Tasks of the stream."""
        if not self.total:
            raise ValueError("tasks: got none; accepted is a sequence of at least one task")
        self.ids = spread(self.total, max_tasks)
        """Which of them are kept: T ascending indices."""
        with private_random_state():  # transforms may draw from the global generators
            parts = [_read(tasks[i], i, images_per_task) for i in self.ids]
        shapes = sorted({tuple(images.shape[1:]) for images, _ in parts})
        if len(shapes) > 1:
            raise ValueError(f"tasks: got images of shapes {shapes}; accepted is one shape for all tasks")
        self.sizes = [len(labels) for _, labels in parts]
        """Images of each task kept, T numbers."""
        self.top_labels = [int(labels.max()) for _, labels in parts]
        """Largest label of each task kept."""
        self.images = torch.cat([images for images, _ in parts])
        self.labels = torch.cat([labels for _, labels in parts])
        most = max(self.sizes)
        starts = np.cumsum([0, *self.sizes[:-1]])
        rows = starts[:, None] + np.minimum(np.arange(most), np.asarray(self.sizes)[:, None] - 1)
        self._rows = torch.from_numpy(rows)  # (T, most), the last image repeated where a task has fewer
        self._inside = torch.arange(most) < torch.tensor(self.sizes)[:, None]
        self._placed: tuple[Any, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def settings(self) -> dict[str, Any]:
        """What decides which numbers come out, as plain values; compared when a state is loaded."""
        return {"tasks": self.total, "task_ids": [*self.ids], "sizes": [*self.sizes], "labels": self.labels.tolist()}

    def on(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Tensors on the device, images in the dtype of the model; moved once."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if self._placed is None or self._placed[0] != (device, dtype):
            tensors = {"labels": self.labels, "rows": self._rows, "inside": self._inside}
            placed = {name: tensor.to(device) for name, tensor in tensors.items()}
            placed["images"] = self.images.to(device, dtype)
            placed["size"] = placed["inside"].sum(1)
            self._placed = ((device, dtype), placed)
        return self._placed[1]

    def batch(self, column: int, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels of one kept task."""
        placed, start = self.on(model, device), sum(self.sizes[:column])
        rows = slice(start, start + self.sizes[column])
        return placed["images"][rows], placed["labels"][rows]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device) -> Tensor:
        """Mean loss and accuracy of every kept task.

        :returns: (2, T) on the device, float32 (float64 for such a model): mean cross-entropy in nats, and the fraction
            of images whose largest logit is that of the label. NaN for a task of which any label has no output unit
            (logits too narrow, or the unit masked as unseen); a loss of ``inf`` where it isn't finite.
        :raises ValueError: a multi-task model. TypeError: an output that isn't (B, C).
        """
        refuse_multi_task(model, "the tasks that are probed")
        placed = self.on(model, device)
        with private_random_state(), evaluation_mode(model), torch.autocast(device.type, enabled=False):
            step = forward_batch(self.batch_size, device)
            logits = torch.cat([check_logits(model(part)) for part in placed["images"].split(step)])
        values = logits if logits.dtype == torch.float64 else logits.float()
        width, labels = values.shape[1], placed["labels"]
        if width == 0:  # a head without any unit
            return values.new_full((2, len(self)), torch.nan)
        inside_width = labels.clamp(max=width - 1)
        loss = functional.cross_entropy(values, inside_width, reduction="none")
        top, predicted = values.max(1)
        hit = ((predicted == labels) & ~top.isnan()).to(loss.dtype)
        absent = labels >= width
        own = logits.gather(1, inside_width[:, None])[:, 0]
        for value in mask_values(model):
            absent |= own == value
        rows, inside, size = placed["rows"], placed["inside"], placed["size"]
        # Padded rows and a masked sum: a matrix product would spread one task's NaN over all others.
        table = torch.stack([part[rows].masked_fill(~inside, 0).sum(1) / size for part in (loss, hit)])
        table[0].masked_fill_(~table[0].isfinite(), torch.inf)
        return table.masked_fill(absent[rows].any(1), torch.nan)


def mask_values(model: nn.Module) -> list[float]:
    """Values that heads of this model give to the logits of units that were not trained yet."""
    found = set()
    for module in model.modules():
        if isinstance(module, TaskwiseLinearHead):
            found.add(UNSEEN_LOGIT)
        elif isinstance(module, IncrementalClassifier) and module.masking:
            found.add(float(module.mask_value))
    return sorted(found)


def refuse_multi_task(model: nn.Module, what: str) -> None:
    """ValueError for a model that needs task labels."""
    if is_multi_task_module(model):
        raise ValueError(f"{type(model).__name__} needs task labels; accepted for {what} are single-task models")


def check_logits(output: Any) -> Tensor:
    """The output of a model if it is (B, C), else a TypeError."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"model: gives {kind}; accepted are logits of shape (B, C)")
    return output


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """The device given, else that of the first parameter, else the CPU."""
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _read(task: Any, index: int, most: int) -> tuple[Tensor, Tensor]:
    """Images (k, ...) and int64 labels (k,) of one task, on the CPU, not shared with the caller."""
    if isinstance(task, (tuple, list)) and len(task) == 2 and all(isinstance(part, Tensor) for part in task):
        images, labels = task
        if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
            shapes = f"{tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"tasks[{index}]: got {shapes}; accepted are images (n, ...) and integer labels (n,)")
        rows = spread(len(labels), most)
        picked, ids = [*images.detach()[rows].cpu()], labels.detach()[rows].tolist()
    else:
        data = task.dataset if isinstance(task, CLExperience) else task
        data = data.eval() if callable(getattr(data, "eval", None)) else data
        items = [data[row] for row in spread(len(data), most)]
        picked, ids = [item[0] for item in items], [int(item[1]) for item in items]
    if not picked:
        raise ValueError(f"tasks[{index}]: got no images; accepted are tasks of at least one")
    kinds = {tuple(x.shape) if isinstance(x, Tensor) and x.is_floating_point() else type(x).__name__ for x in picked}
    if len(kinds) > 1 or not isinstance(next(iter(kinds)), tuple):
        raise ValueError(
            f"tasks[{index}]: got images {sorted(map(str, kinds))}; accepted are float tensors of one shape"
        )
    if min(ids) < 0:
        raise ValueError(f"tasks[{index}]: got label {min(ids)}; accepted are labels of 0 and above")
    return torch.stack(picked).detach().cpu(), torch.tensor(ids, dtype=torch.long)


__all__ = ["ProbeTasks", "check_logits", "device_of", "mask_values", "refuse_multi_task", "spread", "whole"]
