"""Task-incremental accuracy: the same classifier, asked to choose among the classes of the true task only.

This **uses task identity at test time**, which a class-incremental learner does not get, so its figures stand under
tags of their own and never mix with the class-incremental ones. Nothing is trained for it and nothing is asked of the
model but its logits over all classes. It is at least the class-incremental accuracy on any input: what wins among all
classes also wins among a few of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avalanche_firn.evaluation.metrics import Emitted, ResultMatrixMetric

TASK_PREFIX = "task-il/"


class TaskIncrementalMatrixMetric(ResultMatrixMetric):
    """:class:`ResultMatrixMetric` whose predictions are the argmax over the classes of the evaluated experience.

    The tags are those of the base class under ``task-il/`` ("valid": ``validation/task-il/``; periodic evaluations:
    ``periodic/task-il/``), for example ``task-il/accuracy/last`` and ``task-il/forgetting/average``. State, steps, rows
    and the image are the base class's too, and both metrics may be given to one evaluator.

    The classes are ``strategy.experience.classes_in_this_experience``, original class ids in any order and with gaps:
    those that the *evaluated* stream has samples of, so a class of the task without a test sample doesn't compete.
    Where every experience has all classes (domain-incremental streams) the figures equal the class-incremental ones.

    Args:
        stream, forgetting_kind, rounded, image: see :class:`ResultMatrixMetric`.
        prefix: put before every tag; default that of the base class with "task-il/" behind it.

    A row with a NaN among its classes is wrong, and so is one whose class has no column in ``strategy.mb_output``.
    Raises TypeError for an output that isn't (B, max class id + 1), ValueError for an experience without classes.
    """

    def __init__(
        self,
        *,
        stream: str = "test",
        prefix: str | None = None,
        forgetting_kind: str = "max_seen",
        rounded: str | None = None,
        image: bool = True,
    ) -> None:
        super().__init__(stream=stream, prefix=prefix, forgetting_kind=forgetting_kind, rounded=rounded, image=image)
        if prefix is None:
            self.prefix += TASK_PREFIX
        self._allowed: list[int] = []
        self._columns: Tensor | None = None

    def __str__(self) -> str:
        return f"TaskIncrementalMatrix({self.stream})"

    def before_eval_exp(self, strategy: Any) -> Emitted:
        experience = strategy.experience
        if experience.origin_stream.name == self.stream:
            # ascending: of equal logits the first counts, here as among all classes
            self._allowed = sorted(int(c) for c in getattr(experience, "classes_in_this_experience", None) or ())
            self._columns = None
            if not self._allowed and len(experience.dataset):
                raise ValueError(
                    f"classes_in_this_experience: got none for experience {experience.current_experience} of stream "
                    f"{self.stream!r}; accepted is at least one class id, see Avalanche's with_classes_timeline"
                )
        return super().before_eval_exp(strategy)

    def _hits(self, output: Tensor, target: Tensor) -> Tensor:
        if self._columns is None:  # once per experience: a copy to the device waits for it
            known = [c for c in self._allowed if c < output.shape[1]]
            self._columns = torch.tensor(known, dtype=torch.long, device=output.device)
        if not self._columns.numel():
            return torch.zeros_like(target, dtype=torch.bool)
        top, chosen = output.index_select(1, self._columns).max(1)
        return (self._columns[chosen] == target) & ~top.isnan()
