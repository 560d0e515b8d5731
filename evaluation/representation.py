"""How good is the representation: accuracy on every task after adapting to a little data of it, at every checkpoint.

The protocol of continual representation learning (arXiv 2302.13289 and the work before it): the classifier of the
stream is not scored. After step t the backbone is taken as it is, adapted on the adaptation data of task i, and tested
on the test data of task i; that is entry ``a[t, i]``. Adaptations: weighted kNN, a linear probe, fine-tuning from a
random classifier, and LP-FT (fine-tuning from the linear probe).

By default the classes compete within their task, which uses task identity at test time; ``task_aware=False`` adapts to
all tasks seen at once. Nothing is chosen on test data. Training is not touched, to the bit: random states, modes,
buffers, gradients and the strategy's batch stay as they are, fine-tuning works on copies.
Cost: one forward pass over adaptation and test data per checkpoint, shared by all adaptations and kept in
``cache``; kNN and linear probe next to nothing; fine-tuning see :mod:`~avalanche_firn.evaluation.fine_tuning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.adaptation import Adaptation, AdaptationJob, ProbeSolver, check_adaptation
from avalanche_firn.evaluation.figures import task_matrix_figure
from avalanche_firn.evaluation.matrix import FORGETTING_KINDS, NotEvaluatedError, ResultMatrix, forgetting
from avalanche_firn.evaluation.probes import few_shot_indices
from avalanche_firn.models.feature_cache import FeatureCache, backbone_sha256
from avalanche_firn.models.parts import evaluation_mode, find_parts
from avalanche_firn.plugins.finite_words import finite_or_stop
from avalanche_firn.plugins.random_state import private_random_state

When = Literal["experience", "diagonal", "end", "eval"]
Emitted = list[MetricValue] | None
_KINDS = sorted(set(FORGETTING_KINDS.values()))


class RepresentationProbe(PluginMetric[dict[str, ResultMatrix]]):
    """Matrices ``a[t, i]`` of accuracies after adaptation, for Avalanche's ``EvaluationPlugin``.

    Emitted over the experience index, per adaptation (``knn``, ``linear``, ``fine-tune``, ``lp-ft``): ``probe/knn``
    (mean over the tasks seen), ``probe/knn/task-K``, ``probe/knn/forgetting-KIND`` for every kind of
    :func:`~avalanche_firn.evaluation.matrix.forgetting`, ``probe/knn/backward``, ``probe/knn/forward``, as far as they
    are defined; after the last experience ``probe/knn/matrix``, an image. :attr:`matrices` keeps the raw counts,
    :meth:`protocol` says everything that a table has to state.

    :param train_stream: adaptation data of task i is (a part of) experience i. :param test_stream: tested on
        experience i. Both under their evaluation transform.
    :param adapt: one adaptation or several.
    :param shots: adaptation samples per class (int), a fraction of each class, or None for all; subsets are nested.
    :param seed: of subsets, classifiers, order of batches and splits; not of the training.
    :param when: ``"experience"``: every task after every experience. ``"diagonal"``: the new task after every
        experience, all after the last (enough for averages and for ``diag`` forgetting). ``"end"``: all after the last.
        ``"eval"``: every task whenever ``strategy.eval`` is called between experiences.
    :param tasks: ``"all"``: also tasks to come, and a row before any training (forward transfer); ``"seen"``.
    :param task_aware: see above; ``False`` needs ``tasks="seen"``.
    :param k: neighbours (200: UCL's public code), or ``(t, n) -> k`` from step and bank size. :param temperature: 0.1.
    :param solver, l2: of the linear probe, see :func:`~avalanche_firn.models.linear_probe.fit_linear_probe`; a sequence
        of penalties is chosen from on held-out adaptation data.
    :param lr: rate or rates of fine-tuning, chosen from on held-out adaptation data (open in the paper; our choice).
    :param epochs, batch_size, momentum, weight_decay: of fine-tuning, SGD with a cosine per step (open; our choice).
    :param val_fraction: of each class, held out for these choices (0.2: our choice).
    :param head: dotted name of the classifier. :param eval_batch_size: of feature extraction.
    :param num_workers: of feature extraction. :param cache: shared with a ``LinearProbePlugin``.
    :param detailed_tags: put the configuration into the tags: ``probe/knn_k200_T0.1``.
    :raises ValueError: settings out of range, streams of different length, a class with fewer samples than shots.
    :raises NonFiniteError: in a run, features or answers that aren't finite (:meth:`measure`: NonFiniteValues).
    """

    def __init__(
        self,
        train_stream: Sequence[Any],
        test_stream: Sequence[Any],
        adapt: Adaptation | Sequence[Adaptation] = "knn",
        *,
        shots: int | float | None = None,
        seed: int = 0,
        when: When = "experience",
        tasks: Literal["all", "seen"] = "all",
        task_aware: bool = True,
        k: int | Callable[[int, int], int] = 200,
        temperature: float = 0.1,
        solver: ProbeSolver = "lbfgs",
        l2: float | Sequence[float] | None = None,
        lr: float | Sequence[float] = (0.001, 0.01, 0.1),
        epochs: int = 20,
        batch_size: int = 32,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        val_fraction: float = 0.2,
        head: str | None = None,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        cache: FeatureCache | None = None,
        detailed_tags: bool = False,
    ) -> None:
        super().__init__()
        names: list[Adaptation] = [adapt] if isinstance(adapt, str) else list(adapt)  # type: ignore[list-item]
        rates = [float(lr)] if isinstance(lr, (int, float)) else [float(rate) for rate in lr]
        if not names or len(set(names)) != len(names) or not set(names) <= set(get_args(Adaptation)):
            raise ValueError(f"adapt is {adapt!r}; one or several of {list(get_args(Adaptation))} are accepted")
        if when not in get_args(When):
            raise ValueError(f"when is {when!r}; one of {list(get_args(When))} is accepted")
        if tasks not in ("all", "seen"):
            raise ValueError(f"tasks is {tasks!r}; 'all' or 'seen' is accepted")
        if not task_aware and tasks == "all":
            raise ValueError("task_aware is False with tasks 'all'; tasks='seen' is accepted (no data of future tasks)")
        if len(train_stream) != len(test_stream) or not len(train_stream):
            raise ValueError(
                f"train_stream has {len(train_stream)} and test_stream {len(test_stream)} experiences; the same number "
                "of at least one is accepted"
            )
        for field, value, least in (
            ("seed", seed, 0),
            ("epochs", epochs, 0),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{field} is {value}; {least} and above is accepted")
        self.train_stream, self.test_stream = train_stream, test_stream
        self.adapt = names
        self.shots, self.seed, self.when, self.tasks, self.task_aware = shots, seed, when, tasks, task_aware
        self.k, self.temperature = k, temperature
        self.solver = solver
        self.l2 = l2 if l2 is None or isinstance(l2, (int, float)) else [float(v) for v in l2]
        self.lr, self.epochs, self.batch_size = rates, epochs, batch_size
        self.momentum, self.weight_decay, self.val_fraction = momentum, weight_decay, val_fraction
        self.head, self.eval_batch_size, self.num_workers = head, eval_batch_size, num_workers
        self.cache = FeatureCache() if cache is None else cache
        self.detailed_tags = detailed_tags
        self.matrices: dict[str, ResultMatrix] = {name: ResultMatrix() for name in names}
        """Counts of correct test samples by adaptation."""
        self._trained: list[int] = []
        self._trained_classes: set[int] = set()
        self._aligned = True  # training experience i is task i; not so in joint training
        self._inside = False  # an experience is being trained on
        self._images = FeatureCache()
        targets = [_targets(experience.dataset) for experience in train_stream]
        self._shots = [few_shot_indices(ids, shots, seed) for ids in targets]
        check_adaptation(self, [ids[chosen] for ids, chosen in zip(targets, self._shots, strict=True)])

    # ------------------------------------------------------------------ use
    def __str__(self) -> str:
        return "RepresentationProbe(" + ", ".join(self.label(name) for name in self.adapt) + ")"

    def result(self) -> dict[str, ResultMatrix]:
        return self.matrices

    def reset(self) -> None:
        """Nothing: the matrices are the history of the run."""

    def label(self, name: str) -> str:
        """Name of an adaptation with its configuration, for tables."""
        k = "task-dependent" if callable(self.k) else self.k
        rates = "-".join(f"{rate:g}" for rate in self.lr)
        shots = "" if self.shots is None else f"_shots{self.shots}"
        bank = ("" if self.task_aware else "_all-tasks") + (f"_seed{self.seed}" if self.seed else "")
        tuned = f"_lr{rates}_epochs{self.epochs}"
        penalty = f"_l2-{len(self.l2)}values" if isinstance(self.l2, list) else f"_l2{self.l2 or 0:g}"
        penalty = "" if self.l2 is None else penalty
        own = {
            "knn": f"_k{k}_T{self.temperature:g}",
            "linear": f"_{self.solver}{penalty}",
            "fine_tune": tuned,
            "lp_ft": f"_{self.solver}{penalty}{tuned}",
        }[name]
        return f"{_tag(name)}{own}{shots}{bank}"

    def protocol(self) -> dict[str, Any]:
        """Everything that a table of these figures has to state, as plain values."""
        names = "adapt shots seed when tasks task_aware temperature solver l2 lr epochs batch_size momentum "
        return {
            **{name: getattr(self, name) for name in (names + "weight_decay val_fraction").split()},
            "k": "function of step and bank size" if callable(self.k) else self.k,
            "task_identity_at_test": self.task_aware,
            "adaptation_samples": [len(chosen) for chosen in self._shots],
        }

    def figures(self, name: Adaptation, t: int | None = None) -> dict[str, float | None]:
        """Average, all kinds of forgetting and transfer after step ``t`` (default the last); None = undefined."""
        matrix = self.matrices[name]
        rows = matrix.shape[0]
        t = rows - 1 if t is None else t
        summary = matrix.summary(t)
        found = {"": summary["accuracy/average"]}
        order = self._trained[: t + 1] if self._aligned else []
        square = matrix.accuracy[: t + 1, order]
        if len(set(order)) <= t or bool(np.isnan(np.diagonal(square)[:-1]).any()):
            square = square[:0, :0]  # without the accuracies right after training no kind means anything
        for kind in _KINDS:
            try:
                value = forgetting(square, kind) if len(square) > 1 else float("nan")
            except NotEvaluatedError:
                value = float("nan")
            found[f"/forgetting-{kind.replace('_', '-')}"] = None if np.isnan(value) else value
        found["/backward"], found["/forward"] = summary["transfer/backward"], summary["transfer/forward"]
        return found

    def tag(self, name: str) -> str:
        """Where the figures of an adaptation are logged."""
        return f"probe/{self.label(name) if self.detailed_tags else _tag(name)}"

    def curves(self) -> dict[str, list[float | None]]:
        """Every figure after every step by its tag; None where it is not defined."""
        found: dict[str, list[float | None]] = {}
        for name in self.adapt:
            for t in range(self.matrices[name].shape[0]):
                for suffix, value in self.figures(name, t).items():
                    found.setdefault(f"{self.tag(name)}{suffix}", []).append(value)
        return found

    def measure(
        self,
        model: torch.nn.Module,
        step: int,
        *,
        tasks: Iterable[int],
        device: torch.device | str = "cpu",
        adapt: Sequence[Adaptation] | None = None,
        competing: Iterable[int] | None = None,
    ) -> dict[Adaptation, dict[int, tuple[int, int]]]:
        """Adapt ``model`` to tasks and test it, outside any strategy: ``{adaptation: {task: (correct, samples)}}``.

        For saved checkpoints in a run of its own; records nothing.

        :param step: only for a ``k`` that depends on it. :param competing: with ``task_aware=False``, the tasks that
            are adapted to, where they are more than those that are tested.
        """
        with private_random_state(self.seed), evaluation_mode(model):
            parts = find_parts(model, self.head)
            weights = backbone_sha256(parts)
            found: dict[Adaptation, dict[int, tuple[int, int]]] = {name: {} for name in adapt or self.adapt}
            chosen = list(tasks)
            everything = chosen if competing is None else sorted({*competing, *chosen})
            groups = [([i], [i]) for i in chosen] if self.task_aware else [(everything, chosen)]
            for group, tested in groups if chosen else []:
                job = AdaptationJob(self, model, parts, weights, group, tested, torch.device(device))
                for name in found:
                    found[name].update(job.run(name, step))
        return found

    # ---------------------------------------------------------------- hooks
    def before_training_exp(self, strategy: Any) -> Emitted:
        """The row before any training, where future tasks count."""
        find_parts(strategy.model, self.head)  # an unknown classifier is an error now, not after the training
        self._inside = True
        wanted = self.tasks == "all" and self.when in ("experience", "eval") and not self._trained
        if wanted and not any(matrix.baseline.size for matrix in self.matrices.values()):
            self._record(strategy, -1, range(len(self.test_stream)))
        return None

    def after_training_exp(self, strategy: Any) -> Emitted:
        self._inside = False
        before = self._seen()
        self._trained.append(int(strategy.experience.current_experience))
        self._trained_classes |= _classes(strategy.experience)
        self._aligned = _length(full_stream(strategy.experience)) == len(self.train_stream)
        seen = self._seen()
        for matrix in self.matrices.values():
            matrix.describe(len(self._trained) - 1, task=self._trained[-1] if self._aligned else None, seen=seen)
        last = len(seen) == len(self.train_stream)
        if self.when == "eval" or (self.when == "end" and not last):
            return None
        newest = self._trained[-1:] if self._aligned else [i for i in seen if i not in before]
        return self._row(strategy, newest if self.when == "diagonal" and not last else None)

    def after_eval(self, strategy: Any) -> Emitted:
        return self._row(strategy, None) if self.when == "eval" and self._trained and not self._inside else None

    def _row(self, strategy: Any, tasks: Sequence[int] | None) -> Emitted:
        row = len(self._trained) - 1
        seen = self._seen()
        chosen = (range(len(self.test_stream)) if self.tasks == "all" else seen) if tasks is None else tasks
        if not chosen:  # no task is complete yet
            return None
        self._record(strategy, row, chosen)
        emitted: list[MetricValue] = []
        for name in self.adapt:
            start, accuracy = self.tag(name), self.matrices[name].accuracy
            values = {f"/task-{i}": float(accuracy[row, i]) for i in chosen}
            values |= {tag: value for tag, value in self.figures(name, row).items() if value is not None}
            emitted += [MetricValue(self, f"{start}{tag}", value, row) for tag, value in values.items()]
            if len(seen) == len(self.train_stream):
                picture = AlternativeValues(task_matrix_figure(accuracy), torch.from_numpy(accuracy))
                emitted.append(MetricValue(self, f"{start}/matrix", picture, row))
        return emitted

    def _record(self, strategy: Any, row: int, tasks: Iterable[int]) -> None:
        competing = None if self.task_aware else self._seen()
        doing = f"probes of the representation after {row + 1} experiences of training"
        with finite_or_stop(strategy, doing, "A smaller rate, or precision fp32 or bf16, usually helps."):
            found = self.measure(strategy.model, row, tasks=tasks, device=strategy.device, competing=competing)
        for name, counts in found.items():
            for task, (correct, total) in counts.items():
                classes = self.test_stream[task].classes_in_this_experience
                self.matrices[name].record(row, task, correct, total, classes=classes)

    def _seen(self) -> list[int]:
        if self._aligned:
            return sorted(set(self._trained))
        classes = [_classes(experience) for experience in self.train_stream]
        return [i for i, ids in enumerate(classes) if ids <= self._trained_classes]

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol(),
            "matrices": {name: matrix.state_dict() for name, matrix in self.matrices.items()},
            "trained": list(self._trained),
            "trained_classes": sorted(self._trained_classes),
            "aligned": self._aligned,
            "inside": self._inside,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a probe with the same settings.

        :raises ValueError: settings or adaptation data differ; rows of two protocols are no matrix.
        """
        now = self.protocol()
        other = [name for name, value in state.get("protocol", {}).items() if now.get(name) != value]
        if other:
            raise ValueError(f"the state belongs to a RepresentationProbe with another value of {', '.join(other)}")
        for name, matrix in self.matrices.items():
            matrix.load_state_dict(state["matrices"][name])
        self._trained, self._inside = [int(i) for i in state["trained"]], bool(state["inside"])
        self._trained_classes, self._aligned = set(state["trained_classes"]), bool(state["aligned"])


def _tag(name: str) -> str:
    return {"fine_tune": "fine-tune", "lp_ft": "lp-ft"}.get(name, name)


def _targets(dataset: Any) -> np.ndarray:
    return np.fromiter((int(t) for t in dataset.targets), dtype=np.int64, count=len(dataset))


def _classes(experience: Any) -> set[int]:
    return {int(c) for c in experience.classes_in_this_experience}


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except TypeError:  # a lazily generated stream
        return None


__all__ = ["Adaptation", "RepresentationProbe"]
