"""One model adapted to one set of tasks and tested on them: the work behind ``RepresentationProbe``.

Features are extracted once and shared by all adaptations; one that is not finite stops the run by name, as does a
fine-tuned network that answers with NaN: they have no accuracy. Of several rates that are tried out, one that diverges
is merely never right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from avalanche_firn.evaluation import fine_tuning
from avalanche_firn.evaluation.probes import fit_linear_probe, holdout_split, knn_predict
from avalanche_firn.models.feature_cache import Features
from avalanche_firn.models.finite_values import NonFiniteValues
from avalanche_firn.models.parts import ModelParts, extract_features
from avalanche_firn.plugins.feature_checks import check_by_class

if TYPE_CHECKING:
    from avalanche_firn.evaluation.representation import RepresentationProbe

Adaptation = Literal["knn", "linear", "fine_tune", "lp_ft"]
ProbeSolver = Literal["lbfgs", "ridge", "sgd"]


class AdaptationJob:
    """One model adapted to one set of tasks; what several adaptations need is made once.

    :param weights: :func:`~avalanche_firn.models.feature_cache.backbone_sha256` of the model, which is in evaluation
        mode. :param tasks: whose classes compete. :param tested: those of them that are tested.
    """

    def __init__(
        self,
        probe: RepresentationProbe,
        model: nn.Module,
        parts: ModelParts,
        weights: str,
        tasks: Sequence[int],
        tested: Sequence[int],
        device: torch.device,
    ) -> None:
        self.probe, self.model, self.parts = probe, model, parts
        self.weights, self.tasks, self.tested, self.device = weights, list(tasks), list(tested), device
        self._linear: dict[bool, fine_tuning.Head] = {}
        self._classes: Tensor | None = None
        self._rate: float | None = None  # of the newest fine-tuning

    def run(self, name: Adaptation, step: int) -> dict[int, tuple[int, int]]:
        """Task -> (correct, samples).

        :raises NonFiniteValues: features or answers that aren't finite.
        """
        bank, targets = self._bank()
        if name == "knn":
            k = self.probe.k(step, len(targets)) if callable(self.probe.k) else self.probe.k

            def predictions(features: Tensor, task: int) -> Tensor:
                return knn_predict(features, bank, targets, k=k, temperature=self.probe.temperature)

        elif name == "linear":
            weight, bias = self._probe_head()

            def predictions(features: Tensor, task: int) -> Tensor:
                return self.classes[(features @ weight.T + bias).argmax(1)]

        else:
            tuned = self._fine_tuned(name)
            rows = torch.cat([self.classes, self.classes.new_tensor([-1])])  # -1: never right

            def predictions(features: Tensor, task: int) -> Tensor:
                images = self._images("test", task)
                size = self.probe.eval_batch_size
                label = _task_label(self.probe.test_stream[task])
                return rows[fine_tuning.predict(tuned, images, batch_size=size, task_label=label)]

        counts = {}
        for task in self.tested:
            features, wanted = self._features("test", task)
            predicted = predictions(features, task)
            hits, lost = torch.stack([(predicted == wanted).sum(), (predicted < 0).sum()]).tolist()
            if lost:
                rate = f" with lr {self._rate:g}" if self._rate is not None else ""
                raise NonFiniteValues(f"{name} of task {task}{rate}: {lost} of {len(wanted)} test samples get NaN")
            counts[task] = (hits, len(wanted))
        return counts

    @property
    def classes(self) -> Tensor:
        """Sorted ids of the classes that compete, ``(K,)``."""
        if self._classes is None:
            self._classes = self._bank()[1].unique()
        return self._classes

    def _features(self, part: Literal["train", "test"], task: int) -> Features:
        probe = self.probe
        experience = (probe.train_stream if part == "train" else probe.test_stream)[task]
        dataset = experience.dataset.eval()
        key: tuple[Any, ...] = (experience.origin_stream.name, experience.current_experience, None)
        if part == "train" and probe.shots is not None:
            indices = probe._shots[task].tolist()
            dataset, key = dataset.subset(indices), (*key[:2], tuple(indices))

        def extract() -> Features:
            with _any_task(self.parts):
                return extract_features(
                    self.model,
                    dataset,
                    batch_size=probe.eval_batch_size,
                    device=self.device,
                    num_workers=probe.num_workers,
                    head_name=self.parts.head_name,
                )

        features, targets = probe.cache.get(self.weights, key, extract, rows=len(dataset))
        try:
            check_by_class(features, targets)
        except NonFiniteValues as error:
            raise NonFiniteValues(f"{part} data of task {task}: {error}") from error
        return features.to(self.device), targets.to(self.device)

    def _bank(self) -> Features:
        pairs = [self._features("train", task) for task in self.tasks]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([f for f, _ in pairs]), torch.cat([t for _, t in pairs])

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        return holdout_split(self._bank()[1].cpu().numpy(), self.probe.val_fraction, self.probe.seed)

    def _probe_head(self, part: bool = False) -> fine_tuning.Head:
        """Solved linear probe ``(K, d), (K,)``; ``part``: on the training part of the adaptation data alone."""
        if part not in self._linear:
            features, targets = self._bank()
            labels = torch.searchsorted(self.classes, targets)
            options: dict[str, Any] = {"solver": self.probe.solver, "num_classes": len(self.classes)}
            options["generator"] = torch.Generator(features.device).manual_seed(self.probe.seed)
            if part or isinstance(self.probe.l2, list):
                train, held = (torch.from_numpy(i).to(labels.device) for i in self._split())
            if isinstance(self.probe.l2, list):
                options |= {"val_features": features[held], "val_labels": labels[held], "refit": not part}
            if part or isinstance(self.probe.l2, list):
                features, labels = features[train], labels[train]
            self._linear[part] = fit_linear_probe(features, labels, l2=self.probe.l2, **options)
        return self._linear[part]

    def _fine_tuned(self, name: Adaptation) -> nn.Module:
        probe = self.probe
        features, targets = self._bank()
        labels = torch.searchsorted(self.classes, targets)
        images = torch.cat([self._images("train", i) for i in self.tasks])

        def head(part: bool) -> fine_tuning.Head:
            if name == "lp_ft":
                return self._probe_head(part)
            return fine_tuning.random_head(len(self.classes), features.shape[1], probe.seed, features)

        settings: dict[str, Any] = dict(
            epochs=probe.epochs,
            batch_size=probe.batch_size,
            momentum=probe.momentum,
            weight_decay=probe.weight_decay,
            mode="eval" if name == "lp_ft" else "train",
            seed=probe.seed,
            task_label=_task_label(probe.train_stream[self.tasks[0]]),
            head_name=self.parts.head_name,
        )
        rate = probe.lr[0]
        if len(probe.lr) > 1 and probe.epochs:
            rate = fine_tuning.choose_rate(
                self.model, {"part": head(True)}, images, labels, probe.lr, self._split(), **settings
            )
        self._rate = rate
        return fine_tuning.fine_tune(self.model, head(False), images, labels, lr=rate, **settings)

    def _images(self, part: Literal["train", "test"], task: int) -> Tensor:
        """Images of a task on the device; they are the same at every checkpoint, so they are read once."""
        dataset = (self.probe.train_stream if part == "train" else self.probe.test_stream)[task].dataset.eval()
        indices = self.probe._shots[task].tolist() if part == "train" else range(len(dataset))

        def read() -> Features:
            return torch.stack([dataset[i][0] for i in indices]).to(self.device), torch.empty(0)

        return self.probe._images.get("", (part, task), read)[0].to(self.device)


def check_adaptation(probe: RepresentationProbe, adaptation_targets: Sequence[np.ndarray]) -> None:
    """Refuse settings of the adaptations that are out of range or impossible with the data, before any work.

    :param adaptation_targets: class ids of each task's adaptation data.
    :raises ValueError: see above; the text names the setting, its value and what is accepted.
    """
    many = isinstance(probe.l2, list)
    penalties: Sequence[Any] = probe.l2 if isinstance(probe.l2, list) else [probe.l2]
    if not probe.lr or any(not 0 <= rate < math.inf for rate in probe.lr):
        raise ValueError(f"lr is {probe.lr!r}; a finite rate of 0 and above or several of them are accepted")
    if not penalties or any(l2 is not None and not 0 <= l2 < math.inf for l2 in penalties):
        raise ValueError(f"l2 is {probe.l2!r}; None, a finite penalty of 0 and above or several of them are accepted")
    if probe.solver not in get_args(ProbeSolver):
        raise ValueError(f"solver is {probe.solver!r}; one of {list(get_args(ProbeSolver))} is accepted")
    if not 0 < probe.val_fraction < 1:
        raise ValueError(f"val_fraction is {probe.val_fraction}; a fraction in (0, 1) is accepted")
    if not 0 <= probe.momentum < 1:
        raise ValueError(f"momentum is {probe.momentum}; a number in [0, 1) is accepted")
    if not 0 <= probe.weight_decay < math.inf:
        raise ValueError(f"weight_decay is {probe.weight_decay}; a finite number of 0 and above is accepted")
    if not 0 < probe.temperature < math.inf:
        raise ValueError(f"temperature is {probe.temperature}; a finite number above 0 is accepted")
    if not callable(probe.k) and probe.k < 1:
        raise ValueError(f"k is {probe.k}; 1 and above, or a function of step and bank size, is accepted")
    tuned = {"fine_tune", "lp_ft"} & set(probe.adapt)
    if (tuned and len(probe.lr) > 1 and probe.epochs) or (many and {"linear", "lp_ft"} & set(probe.adapt)):
        for i, targets in enumerate(adaptation_targets):
            if not len(holdout_split(targets, probe.val_fraction, probe.seed)[1]):
                raise ValueError(
                    f"task {i}: no class has two adaptation samples, so nothing can be held out to choose lr or l2 on; "
                    "one lr, one l2, or more shots are accepted"
                )


class _Placeholder(nn.Module):
    def forward(self, features: Tensor, *unused: Any, **task_labels: Any) -> Tensor:
        return features.new_zeros(len(features), 1)


@contextmanager
def _any_task(parts: ModelParts) -> Iterator[None]:
    """Multi-head classifiers know the tasks they were trained on; with a placeholder features of all get through."""
    head = parts.head
    if not isinstance(head, MultiTaskModule):
        yield
        return
    above, _, last = parts.head_name.rpartition(".")
    owner = parts.model.get_submodule(above)
    nn.Module.__setattr__(owner, last, _Placeholder())  # Avalanche's as_multitask redirects its own
    try:
        yield
    finally:
        nn.Module.__setattr__(owner, last, head)


def _task_label(experience: Any) -> int:
    labels = getattr(experience, "task_labels", None) or [0]
    return int(labels[0])


__all__ = ["Adaptation", "AdaptationJob", "ProbeSolver", "check_adaptation"]
