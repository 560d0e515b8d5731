"""Fixed pairs and a fixed pool of held-out images per task, and what a contrastive model makes of them.

Pairs: anchor, one positive, K negatives, all of one task. Anchors are spread evenly over the images that have a
partner; the positive is drawn among the other images of the class, the negatives with repetition among the images of
the task's other classes. An image that is alone in its class is no anchor, only a negative. Pool: images of a task in
an order that takes two of each class in turn, so that few images of many classes still have positives. Everything is
drawn once, by private generators, and depends on the seed, the index of the task and its labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from avalanche_firn.benchmarks.batches import loader_of
from avalanche_firn.models.parts import evaluation_mode
from avalanche_firn.plugins.random_state import private_random_state


class HeldOutPairs:
    """Pairs and pool of every experience of a stream.

    Args:
        stream: experiences with ``dataset.targets`` and ``dataset.eval()``; read here for the targets only.
        negatives: K >= 1. pairs: per task. pool: images per task, all where there are fewer. seed: >= 0.

    Raises ValueError for an experience without images, and if no task has pairs: two classes or more, one of them with
    two images.
    """

    def __init__(self, stream: Sequence[Any], *, negatives: int, pairs: int, pool: int, seed: int) -> None:
        self.stream = stream
        self.targets = [np.asarray([int(y) for y in e.dataset.targets], dtype=np.int64) for e in stream]
        """Labels of every task, (n,) int64."""
        self.skipped: dict[int, str] = {}
        """Tasks without pairs, and why."""
        self.pairs: dict[int, np.ndarray] = {}
        """Positions of the images in their task, (pairs, 2 + K): anchor, positive, negatives."""
        self.pools: list[np.ndarray] = []
        """Positions in each task, at most ``pool`` of them."""
        self.negatives = negatives
        for task, targets in enumerate(self.targets):
            if not len(targets):
                raise ValueError(f"stream: experience {task} has no images; accepted is at least one")
            why = _why_not(targets)
            if why:
                self.skipped[task] = why
            else:
                self.pairs[task] = _draw_pairs(targets, negatives, pairs, (seed, task, 0))
            self.pools.append(_draw_pool(targets, pool, (seed, task, 1)))
        if not self.pairs:
            raise ValueError(
                f"stream: {self.why_skipped() or 'it is empty'}; accepted are experiences of two classes or more with "
                "two images of a class"
            )

    def why_skipped(self) -> str:
        """Which tasks have no pairs and why, "" if all have."""
        return "; ".join(f"task {task} has {why}" for task, why in self.skipped.items())

    def pool_labels(self, tasks: Sequence[int]) -> Tensor:
        """(n,) int64 ids for the pools of several tasks; an equal label in another task is another class."""
        ids: dict[tuple[int, int], int] = {}
        found = [ids.setdefault((s, int(y)), len(ids)) for s in tasks for y in self.targets[s][self.pools[s]]]
        return torch.tensor(found, dtype=torch.int64)

    def observe(self, model: nn.Module, task: int, **loading: Any) -> tuple[Tensor, Tensor]:
        """Cosines (pairs, 1 + K) of a task, no row where it has no pairs, and unit rows (pool, d) of its pool.

        ``loading``: arguments of :func:`project_images`. Both float64 on the CPU; rows are normalised once more, as
        the bounds hold for unit rows and float32 misses them by 1e-7.
        """
        pool, pairs = self.pools[task], self.pairs.get(task, np.empty((0, 2 + self.negatives), dtype=np.int64))
        images, position = np.unique(np.concatenate([pool, pairs.ravel()]), return_inverse=True)
        rows = nn.functional.normalize(project_images(model, self.stream[task], images, **loading), dim=1)
        place = torch.from_numpy(position.reshape(-1).astype(np.int64))
        at = place[len(pool) :].view(pairs.shape)
        return (rows[at[:, :1]] * rows[at[:, 1:]]).sum(-1), rows[place[: len(pool)]]


@torch.no_grad()
def project_images(
    model: nn.Module,
    experience: Any,
    positions: Sequence[int] | np.ndarray,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
) -> Tensor:
    """Projections of images of an experience: evaluation transform, evaluation mode, no trace in model or generators.

    Args:
        model: with ``project(images (N, C, H, W)) -> (N, d)``. positions: of the images in the experience's data set.

    Returns (len(positions), d) float64 on the CPU, as the model gives them. Raises ValueError without ``project`` and
    for another shape of its output.
    """
    project = getattr(model, "project", None)
    if not callable(project):
        raise ValueError(
            f"model: {type(model).__name__} has no project(images); accepted is a model that gives its unit-norm "
            "projections by it, such as ContrastiveClassifier"
        )
    data = experience.dataset.eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    batches = []
    # seeded: an evaluation transform that draws must make the same images of them for every model
    with private_random_state(0), evaluation_mode(model):
        chosen = [int(i) for i in positions]
        subset = data.subset(chosen) if hasattr(data, "subset") else Subset(data, chosen)
        loader = loader_of(subset, num_workers=num_workers, batch_size=batch_size)
        for batch in loader:
            images = batch[0].to(device)
            images = images.to(dtype) if images.is_floating_point() else images
            rows = project(images)
            if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
                got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(f"model.project: got {got} for {len(images)} images; accepted are rows (N, d)")
            batches.append(rows.to("cpu", torch.float64))
    return torch.cat(batches)


def check_unit_rows(rows: Tensor) -> None:
    """ValueError for rows (n, d) whose length is not 1; the margin of 1 % is that of half precision."""
    lengths = rows.norm(dim=1)
    if not bool(((lengths - 1).abs() < 0.01).all()):
        worst = max(lengths.tolist(), key=lambda length: math.inf if math.isnan(length) else abs(length - 1))
        raise ValueError(f"model.project: got a row of length {worst:.4g}; accepted are unit rows, as the ceiling asks")


def _why_not(targets: np.ndarray) -> str | None:
    classes, counts = np.unique(targets, return_counts=True)
    if len(classes) < 2:
        return "one class, so no negatives"
    return None if counts.max() > 1 else "one image of each class, so no positives"


def _draw_pairs(targets: np.ndarray, negatives: int, pairs: int, seed: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    members = {int(y): np.flatnonzero(targets == y) for y in np.unique(targets)}
    others = {y: np.flatnonzero(targets != y) for y in members}
    able = np.concatenate([rows for rows in members.values() if len(rows) > 1])
    anchors = np.concatenate([rng.permutation(able) for _ in range(-(-pairs // len(able)))])[:pairs]
    drawn = []
    for anchor in anchors:
        y = int(targets[anchor])
        positive = rng.choice(members[y][members[y] != anchor])
        drawn.append([int(anchor), int(positive), *rng.choice(others[y], negatives).tolist()])
    return np.asarray(drawn, dtype=np.int64)


def _draw_pool(targets: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    keys: list[tuple[int, int, int]] = []
    for place, y in enumerate(rng.permutation(np.unique(targets))):
        keys += [(i // 2, place, int(row)) for i, row in enumerate(rng.permutation(np.flatnonzero(targets == y)))]
    return np.asarray([row for _, _, row in sorted(keys)[:size]], dtype=np.int64)


__all__ = ["HeldOutPairs", "check_unit_rows", "project_images"]
