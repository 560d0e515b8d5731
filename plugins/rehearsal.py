"""Rehearsal: a small buffer of earlier samples, trained on together with the current experience.

Which samples are kept is decided by Avalanche's storage policies; what is stored are places in the stream (experience,
position), never images. So the buffer costs 24 bytes a sample, goes into a checkpoint as three small tensors, and its
samples are transformed anew at each use.

``batches="union"``: one shuffled set of current and stored samples without oversampling, as contrastive methods need it
(Co2L, arXiv 2106.14413). ``batches="balanced"``: every batch of current samples is joined by as large a batch of stored
ones, as in experience replay and Avalanche's ``ReplayPlugin``.

The buffer is filled at the start of an experience from the one before, so whatever runs at the end of an experience
still sees the buffer that was trained with. The stream must be an indexable one whose experiences stay available.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from avalanche.benchmarks.scenarios import OnlineCLExperience
from avalanche.benchmarks.utils import concat_datasets
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from avalanche_firn.benchmarks.batches import JoinedBatches, WholeBatches, batched
from avalanche_firn.benchmarks.streams import avalanche_dataset, full_stream
from avalanche_firn.plugins.random_state import derived_seed, private_random_state

Storage = Literal["class_balanced", "reservoir"]


class RehearsalSet(Dataset[tuple[Any, ...]]):
    """Samples of several experiences as one map-style data set of ``(x, y, origin, task label)``.

    :param parts: ``(data set, positions, origin)``; ``origin`` is the index of the experience. The task label is there
        if the data sets have one.
    """

    def __init__(self, parts: Sequence[tuple[Any, Sequence[int], int]]) -> None:
        self.datasets = [dataset for dataset, _, _ in parts]
        self._positions = [[int(p) for p in positions] for _, positions, _ in parts]
        self.places = [(i, p) for i, positions in enumerate(self._positions) for p in positions]
        self.parts = [origin for _, _, origin in parts]
        labels = [list(dataset.targets) for dataset in self.datasets]
        self.targets = [int(labels[i][p]) for i, p in self.places]
        self.origins = [self.parts[i] for i, _ in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        part, position = self.places[index]
        sample = self.datasets[part][position]
        return (sample[0], sample[1], self.parts[part], *sample[2:])

    def as_batches(self) -> WholeBatches | None:
        """Whole batches, where all data sets are in memory (:mod:`avalanche_firn.benchmarks.batches`)."""
        found = [batched(dataset.subset(rows)) for dataset, rows in zip(self.datasets, self._positions, strict=True)]
        whole = [part for part in found if part is not None]
        return JoinedBatches(whole, self.parts) if whole and len(whole) == len(found) else None


class RehearsalPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Train on a buffer of earlier samples too.

    :param mem_size: samples kept in all (200 and 500: Co2L).
    :param storage: ``"class_balanced"``: equal shares of all classes seen, each class by reservoir sampling (the
        released code of Co2L has nearly equal shares, rounded at random); ``"reservoir"``: uniform over all samples
        seen (domain-incremental streams).
    :param batches: see the module.
    :param seed: of the choice, which depends on seed and experience alone.
    :raises ValueError: settings out of range; a stream whose experiences can't be looked up again.
    """

    def __init__(
        self,
        mem_size: int = 200,
        *,
        storage: Storage = "class_balanced",
        batches: Literal["union", "balanced"] = "union",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for field, value, least in (("mem_size", mem_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{field} is {value}; {least} and above is accepted")
        if storage not in ("class_balanced", "reservoir"):
            raise ValueError(f"storage is {storage!r}; 'class_balanced' or 'reservoir' is accepted")
        if batches not in ("union", "balanced"):
            raise ValueError(f"batches is {batches!r}; 'union' or 'balanced' is accepted")
        self.mem_size = mem_size
        self.storage = storage
        self.batches = batches
        self.seed = seed
        self.places = torch.empty(0, 2, dtype=torch.int64)
        """Experience and position of every stored sample, ``(M, 2)``."""
        self.labels = torch.empty(0, dtype=torch.int64)
        """Class ids of the stored samples, ``(M,)``."""
        self._priorities = torch.empty(0)  # of reservoir sampling
        self._stored: list[int] = []  # experiences that the buffer has seen
        self._last: int | None = None  # the experience trained last

    # ----------------------------------------------------------------- hooks
    def before_training_exp(
        self, strategy: Any, num_workers: int = 0, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """Fill the buffer from the experience before, and put the loader in place."""
        experience = strategy.experience
        if isinstance(experience, OnlineCLExperience):
            raise ValueError("the experience is an online one; rehearsal accepts streams of whole experiences")
        stream = full_stream(experience)
        if not hasattr(stream, "__getitem__"):
            raise ValueError(f"the stream is a {type(stream).__name__}; rehearsal accepts streams with stream[i]")
        current = int(experience.current_experience)
        # an experience that is entered again, as on resuming, is none before
        if self._last is not None and self._last != current and self._last not in self._stored:
            self.update(self._last, stream[self._last].dataset.targets)
        self._last = current
        options = {
            "batch_size": strategy.train_mb_size,
            "num_workers": num_workers,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "persistent_workers": bool(num_workers and kwargs.get("persistent_workers", False)),
            "pin_memory": bool(kwargs.get("pin_memory", strategy.device.type == "cuda")),
        }
        if self.batches == "union":
            strategy.dataloader = DataLoader(self.dataset(experience), **options)
        elif len(self.places):
            memory = concat_datasets([data.subset(rows) for data, rows, _ in self._memory(stream)])
            strategy.dataloader = ReplayDataLoader(
                strategy.adapted_dataset,
                memory,
                oversample_small_tasks=True,
                batch_size_mem=strategy.train_mb_size,
                task_balanced_dataloader=False,
                **options,
            )

    # ------------------------------------------------------------------- use
    def dataset(self, experience: Any, *, evaluation: bool = False) -> RehearsalSet:
        """Samples of the experience and of the buffer.

        :param evaluation: under the evaluation transform instead of the training one.
        """
        own = experience.dataset.eval() if evaluation else experience.dataset.train()
        memory = self._memory(full_stream(experience), evaluation=evaluation)
        return RehearsalSet([(own, range(len(own)), int(experience.current_experience)), *memory])

    def update(self, experience: int, targets: Sequence[int] | Tensor) -> None:
        """Let the buffer see an experience.

        :param experience: its index in the stream. :param targets: class ids of its samples, in their order.
        """
        labels = torch.as_tensor([int(t) for t in targets], dtype=torch.int64)
        rows = torch.stack([torch.full_like(labels, experience), torch.arange(len(labels))], dim=1)
        with private_random_state(derived_seed(self.seed, len(self._stored))):
            if self.storage == "reservoir":
                whole = self._reservoir(self.mem_size, torch.ones_like(self.labels, dtype=torch.bool))
                whole.update_from_dataset(_as_dataset(rows, labels))
                kept = [whole]
            else:
                kept = self._class_balanced(rows, labels)
        self.places, self.labels = (torch.cat(part) for part in zip(*map(_content, kept), strict=True))
        self._priorities = torch.cat([buffer._buffer_weights for buffer in kept])
        self._stored.append(experience)

    def counts(self) -> dict[int, int]:
        """Stored samples per class."""
        classes, numbers = self.labels.unique(return_counts=True)
        return dict(zip(classes.tolist(), numbers.tolist(), strict=True))

    # ------------------------------------------------------------------ work
    def _memory(self, stream: Any, *, evaluation: bool = False) -> list[tuple[Any, list[int], int]]:
        found = []
        for origin in self.places[:, 0].unique().tolist():
            data = stream[origin].dataset
            rows = self.places[self.places[:, 0] == origin, 1].tolist()
            found.append((data.eval() if evaluation else data.train(), rows, origin))
        return found

    def _class_balanced(self, rows: Tensor, labels: Tensor) -> list[ReservoirSamplingBuffer]:
        policy = ClassBalancedBuffer(self.mem_size)
        policy.seen_classes = set(self.labels.unique().tolist())
        for class_id in sorted(policy.seen_classes):
            mine = self.labels == class_id
            policy.buffer_groups[class_id] = self._reservoir(self.mem_size, mine)
        policy.update_from_dataset(_as_dataset(rows, labels))
        return [policy.buffer_groups[class_id] for class_id in sorted(policy.buffer_groups)]

    def _reservoir(self, size: int, chosen: Tensor) -> ReservoirSamplingBuffer:
        """Avalanche's reservoir with the chosen samples in it."""
        buffer = ReservoirSamplingBuffer(size)
        if bool(chosen.any()):
            buffer.buffer = _as_dataset(self.places[chosen], self.labels[chosen])
            buffer._buffer_weights = self._priorities[chosen]
        return buffer

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Places, classes and priorities of the stored samples."""
        return {
            "places": self.places,
            "labels": self.labels,
            "priorities": self._priorities,
            "stored": list(self._stored),
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.places, self.labels, self._priorities = (state[k].clone() for k in ("places", "labels", "priorities"))
        self._stored, self._last = list(state["stored"]), state["last"]


def find_rehearsal(strategy: Any) -> RehearsalPlugin | None:
    """The strategy's rehearsal plugin, if it has one."""
    return next((p for p in strategy.plugins if isinstance(p, RehearsalPlugin)), None)


def _as_dataset(rows: Tensor, labels: Tensor) -> Any:
    """Places in the stream as an Avalanche data set, which its storage policies accept."""
    data: Any = TensorDataset(rows, labels)
    data.targets = labels.tolist()
    return avalanche_dataset(data, "train", None, None)  # with task labels, as the policies' own parts have them


def _content(buffer: ReservoirSamplingBuffer) -> tuple[Tensor, Tensor]:
    samples = [buffer.buffer[i] for i in range(len(buffer.buffer))]
    if not samples:
        return torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    return torch.stack([s[0] for s in samples]), torch.as_tensor([int(s[1]) for s in samples])


__all__ = ["RehearsalPlugin", "RehearsalSet", "Storage", "find_rehearsal"]
