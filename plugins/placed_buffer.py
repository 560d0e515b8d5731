"""Avalanche's replay with a buffer of places in the stream, for exact resume and light checkpoints.

``ReplayPlugin`` and the storage policies of Avalanche 0.6 keep data sets, which can't be stored without pickling the
images' source. :class:`PlacedBuffer` lets the same policies work on pairs (experience, position) and looks the images
up in the stream when an experience opens; :class:`ResumableReplayPlugin` is Avalanche's plugin with such a buffer and
equals it to the bit. :class:`~avalanche_firn.plugins.rehearsal.RehearsalPlugin` is our own replay: it draws from a
generator of its own and fills its buffer when the next experience opens.

Cost: 24 bytes a sample, and per experience a few microseconds for each of its samples. The stream must be an indexable
one whose experiences stay available.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from avalanche.benchmarks.scenarios import OnlineCLExperience
from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import (
    ClassBalancedBuffer,
    ExemplarsBuffer,
    ExperienceBalancedBuffer,
    ReservoirSamplingBuffer,
)
from torch import Tensor
from torch.utils.data import TensorDataset

from avalanche_firn.benchmarks.streams import avalanche_dataset, full_stream

Policy = Literal["experience_balanced", "class_balanced", "reservoir"]
_POLICIES = ("experience_balanced", "class_balanced", "reservoir")


class PlacedBuffer(ExemplarsBuffer):
    """What Avalanche's storage policies keep, as places in the stream: 24 bytes a sample, and a state without images.

    ``buffer`` are the samples themselves under the training transform, in Avalanche's order; it is there from
    :meth:`open` on. Drawing is Avalanche's, from torch's global generator when an experience ends.

    :param max_size: samples in all. 200: Avalanche.
    :param storage: ``"experience_balanced"`` (Avalanche's default), ``"class_balanced"`` or ``"reservoir"``, uniform
        over all samples seen.
    :raises ValueError: settings out of range; a stream whose experiences can't be looked up again.
    """

    def __init__(self, max_size: int = 200, storage: Policy = "experience_balanced") -> None:
        if max_size < 1:
            raise ValueError(f"mem_size is {max_size}; 1 and above is accepted")
        if storage not in _POLICIES:
            raise ValueError(f"storage is {storage!r}; one of {list(_POLICIES)} is accepted")
        super().__init__(max_size)
        self.storage = storage
        self.places = torch.empty(0, 2, dtype=torch.int64)
        """Experience and position of every stored sample, ``(M, 2)``, group after group."""
        self.labels = torch.empty(0, dtype=torch.int64)
        """Class ids of the stored samples, ``(M,)``."""
        self.priorities = torch.empty(0)
        self.groups: list[list[int]] = []
        """Key (class or count of experiences), capacity and size of every group."""

    def open(self, experience: Any) -> None:
        """Look the samples up in the stream of an experience."""
        self.buffer = self.dataset(indexable_stream(experience))

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Let the policy see an experience."""
        labels = torch.as_tensor([int(t) for t in exp.dataset.targets], dtype=torch.int64)
        rows = torch.stack([torch.full_like(labels, int(exp.current_experience)), torch.arange(len(labels))], dim=1)
        policy = self._policy()
        policy.post_adapt(agent, SimpleNamespace(dataset=_as_dataset(rows, labels)))
        self._keep(policy)
        self.open(exp)

    def resize(self, strategy: Any, new_size: int) -> None:
        """Keep fewer samples, or make room for more."""
        policy = self._policy()
        policy.resize(strategy, new_size)
        self.max_size = new_size
        self._keep(policy)
        if strategy is not None and strategy.experience is not None:
            self.open(strategy.experience)

    def dataset(self, stream: Any, *, evaluation: bool = False) -> Any:
        """The stored samples, in the order of ``places``, under the training or the evaluation transform."""
        parts, order = [], []
        for origin in self.places[:, 0].unique().tolist():
            data = stream[origin].dataset
            rows = torch.nonzero(self.places[:, 0] == origin).flatten()
            parts.append((data.eval() if evaluation else data.train()).subset(self.places[rows, 1].tolist()))
            order.append(rows)
        whole = concat_datasets(parts)
        return whole.subset(torch.cat(order).argsort().tolist()) if parts else whole

    def _policy(self) -> ExemplarsBuffer:
        """Avalanche's policy with the stored places in it."""
        found: dict[int, ReservoirSamplingBuffer] = {}
        sizes = [size for _, _, size in self.groups]
        parts = zip(*(t.split(sizes) for t in (self.places, self.labels, self.priorities)), strict=True)
        for (key, capacity, size), (places, labels, priorities) in zip(self.groups, parts, strict=False):
            found[key] = ReservoirSamplingBuffer(capacity)
            if size:
                found[key].buffer = _as_dataset(places, labels)
                found[key]._buffer_weights = priorities
        if self.storage == "reservoir":
            return found.get(0, ReservoirSamplingBuffer(self.max_size))
        policy: Any
        if self.storage == "class_balanced":
            policy = ClassBalancedBuffer(self.max_size)
            policy.seen_classes = set(found)
        else:
            policy = ExperienceBalancedBuffer(self.max_size)
            policy._num_exps = len(found)
        policy.buffer_groups = found
        return policy  # type: ignore[no-any-return]

    def _keep(self, policy: Any) -> None:
        groups = {0: policy} if self.storage == "reservoir" else policy.buffer_groups
        self.groups = [[int(key), int(group.max_size), len(group.buffer)] for key, group in groups.items()]
        samples = [group.buffer[i] for group in groups.values() for i in range(len(group.buffer))]
        self.places = torch.stack([s[0] for s in samples]) if samples else self.places[:0]
        self.labels = torch.as_tensor([int(s[1]) for s in samples], dtype=torch.int64)
        self.priorities = torch.cat([group._buffer_weights for group in groups.values()])

    def state_dict(self) -> dict[str, Any]:
        """Places, classes and priorities of the stored samples, and the groups that they stand in."""
        tensors = {"places": self.places, "labels": self.labels, "priorities": self.priorities}
        return {**tensors, "groups": [list(group) for group in self.groups], "max_size": self.max_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; :meth:`open` looks the samples up again."""
        self.places, self.labels, self.priorities = (state[k].clone() for k in ("places", "labels", "priorities"))
        self.groups, self.max_size = [list(group) for group in state["groups"]], int(state["max_size"])


class ResumableReplayPlugin(ReplayPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Avalanche's experience replay with a :class:`PlacedBuffer`.

    :param mem_size: samples kept in all. 200: Avalanche's default.
    :param batch_size_mem: stored samples per batch; None: as many as current ones (Avalanche's default).
    :param storage: see :class:`PlacedBuffer`.
    :raises ValueError: settings out of range; a stream whose experiences can't be looked up again.
    """

    storage_policy: PlacedBuffer

    def __init__(
        self, mem_size: int = 200, *, batch_size_mem: int | None = None, storage: Policy = "experience_balanced"
    ) -> None:
        if batch_size_mem is not None and batch_size_mem < 1:
            raise ValueError(f"batch_size_mem is {batch_size_mem}; 1 and above, or None, is accepted")
        super().__init__(mem_size, batch_size_mem=batch_size_mem, storage_policy=PlacedBuffer(mem_size, storage))

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Look the samples up, and put Avalanche's loader in place."""
        self.storage_policy.open(strategy.experience)
        super().before_training_exp(strategy, *args, **kwargs)
        if len(self.storage_policy.buffer):  # Avalanche's plugin forgets this option
            pinned = kwargs.get("pin_memory", strategy.device.type == "cuda")
            strategy.dataloader.loader_kwargs["pin_memory"] = pinned

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let the buffer see the experience."""
        self.storage_policy.post_adapt(strategy, strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """The buffer's."""
        return self.storage_policy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.storage_policy.load_state_dict(state)


def indexable_stream(experience: Any) -> Any:
    """The whole stream of an experience, in which earlier experiences can be looked up.

    :raises ValueError: an online stream, or one without ``stream[i]``.
    """
    stream = full_stream(experience)
    if isinstance(experience, OnlineCLExperience) or not hasattr(stream, "__getitem__"):
        raise ValueError(f"the stream is a {type(stream).__name__}; whole experiences with stream[i] are accepted")
    return stream


def _as_dataset(rows: Tensor, labels: Tensor) -> Any:
    """Places in the stream as an Avalanche data set, which its storage policies accept."""
    data: Any = TensorDataset(rows, labels)
    data.targets = labels.tolist()
    return avalanche_dataset(data, "train", None, None)


__all__ = ["PlacedBuffer", "Policy", "ResumableReplayPlugin", "indexable_stream"]
