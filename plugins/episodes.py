"""Episodes of alternating sequential and batch learning (ASB), drawn from one labelled data set.

An episode is one batch: the ``inner_steps`` images of one class that are learnt one after the other, then
``remember_size`` images of the whole set (arXiv 2310.07996, released code). The draws follow that code's sampler call
by call, so the same NumPy seed gives the same episodes. Cost: tens of microseconds an episode beside loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from avalanche_firn.benchmarks.batches import loader_of

__all__ = ["EpisodeLoader", "EpisodeSampler", "draw_episode"]


def draw_episode(
    pools: Sequence[np.ndarray],
    inner_steps: int,
    remember_size: int,
    rng: np.random.Generator,
    everything: np.ndarray | None = None,
) -> tuple[int, np.ndarray, np.ndarray]:
    """One episode.

    :param pools: for each class the positions of its images in the data set.
    :param everything: all pools one after the other, where it is at hand.
    :returns: position of the class in ``pools``; ``(inner_steps,)`` positions of its images, with replacement only
        where the class has fewer; ``(remember_size,)`` positions from all pools, each at most once, which may hold
        images of the class again.
    """
    chosen = int(rng.choice(len(pools)))
    pool = pools[chosen]
    inner = rng.choice(pool, inner_steps, replace=inner_steps > len(pool))
    everything = np.concatenate(pools) if everything is None else everything
    return chosen, inner, rng.choice(everything, remember_size, replace=False)


class EpisodeSampler:
    """Batches of positions in a data set, an episode each: first the sequence, then the images to remember.

    :param targets: ``(N,)`` class ids of the data set; :attr:`classes` holds the different ones, ascending.
    :param episodes: batches of a pass.
    :param seed: whole numbers, 0 and above: each pass draws from ``numpy.random.default_rng`` of them.
    :raises ValueError: no images, numbers below 1, more images to remember than there are, a seed below 0.
    """

    def __init__(
        self,
        targets: Sequence[int] | np.ndarray,
        *,
        episodes: int,
        inner_steps: int = 20,
        remember_size: int = 64,
        seed: int | Sequence[int] = 0,
    ) -> None:
        for field, value in (("episodes", episodes), ("inner_steps", inner_steps), ("remember_size", remember_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value!r}; a whole number, at least 1, is accepted")
        if any(number < 0 for number in np.atleast_1d(np.asarray(seed, dtype=object))):
            raise ValueError(f"seed is {seed!r}; whole numbers, 0 and above, are accepted")
        labels = np.asarray(targets, dtype=np.int64)
        if not len(labels):
            raise ValueError("the data set is empty; episodes need at least one image")
        if remember_size > len(labels):
            raise ValueError(
                f"remember_size is {remember_size}; the data set has {len(labels)} images, drawn without replacement"
            )
        self.classes = np.unique(labels)
        order = np.argsort(labels, kind="stable")
        self._everything = order
        self._pools = np.split(order, np.searchsorted(labels[order], self.classes[1:]))
        self.episodes = episodes
        self.inner_steps = inner_steps
        self.remember_size = remember_size
        self.seed = seed

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.episodes):
            _, inner, remember = draw_episode(self._pools, self.inner_steps, self.remember_size, rng, self._everything)
            yield [*inner.tolist(), *remember.tolist()]


class EpisodeLoader:
    """Loads the batches of an :class:`EpisodeSampler` and knows the class of the newest one without asking the device.

    A pass draws nothing from the global generators, but one number for the seeds of workers where there are some.

    :param options: of ``torch.utils.data.DataLoader``. Workers live for one pass, as the seed belongs to one.
    """

    draws_while_iterating = False
    """Episodes depend on their seed alone: nothing global is drawn between batches (the checkpoint plugin asks)."""

    def __init__(self, dataset: Any, sampler: EpisodeSampler, **options: Any) -> None:
        self.sampler = sampler
        self.class_id = -1
        """Class of the sequence in the newest batch."""
        self.num_workers = int(options.get("num_workers", 0))
        # DataLoader draws a seed for workers even without any
        generator = None if self.num_workers else torch.Generator()
        self._batches = loader_of(dataset, batch_sampler=sampler, generator=generator, **options)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.class_id = int(batch[1][0])  # still on the CPU
            yield batch
