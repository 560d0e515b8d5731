"""The bounds of :mod:`~avalanche_firn.evaluation.contrastive_bound`, measured on held-out data during a CILA run.

After every task the contrastive loss over all tasks seen is measured, and next to it what each bound allowed for it, so
that a run shows how much the theory says about it. A bound that reaches the ceiling alpha, which no loss can exceed,
says nothing and is called vacuous. On the digits all three bounds do so from the third task on (measured once, five
tasks, the defaults); the certificate stays within 2.5 nats of its loss there.

The bounds compare each model with the one before its task. What that model made of the images is kept from the end of
its own task instead of asking the distilling plugin's teacher again: in its default mode the teacher normalises by
batch and its BatchNorm buffers follow the new task, so in evaluation mode it isn't the earlier model any more.

Cost per task: a forward pass of the images of all tasks seen, at most ``pairs_per_task * (2 + negatives) +
pool_per_task`` of each; the certificate some (n, n) float64 matrices for a pool of n images (10 tasks of 64: 3 MiB
each). Kept, and in checkpoints: 8 bytes for each cosine (256 pairs, 8 negatives: 18 KiB a task) and for each number of
a projection in the pool (64 of width 128: 64 KiB a task).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor

from avalanche_firn.benchmarks.streams import full_stream
from avalanche_firn.evaluation.contrastive_bound import (
    chained_bound,
    gamma,
    loss_ceiling,
    one_step_bound,
    pair_cross_entropies,
    pair_losses,
    training_loss_bound,
    tv_certificate,
)
from avalanche_firn.evaluation.contrastive_pairs import HeldOutPairs, check_unit_rows, project_images

Emitted = list[MetricValue] | None

BOUNDS = ("one_step", "chained", "training_loss")
_TAGS = {
    "measured": "cila/bound/measured",
    "one_step": "cila/bound/one-step",
    "chained": "cila/bound/chained",
    "training_loss": "cila/bound/training-loss",
    "ceiling": "cila/bound/ceiling",
    "old_distillation": "cila/bound/old-distillation",
    "certificate_loss": "cila/certificate/loss",
    "certificate_lower": "cila/certificate/lower",
    "certificate_upper": "cila/certificate/upper",
}


class ContrastiveBound(PluginMetric[list[dict[str, Any]]]):
    """Contrastive loss over all tasks seen, its bounds and its certificate, after every training experience.

    Emitted over the number of tasks trained - 1, all in nats, as far as they are defined:

    - ``cila/bound/measured``: mean over the tasks seen of the loss of one positive against K negatives;
      ``cila/bound/one-step``, ``chained``, ``training-loss``: what the three bounds allow for it, in the same unit;
      ``cila/bound/ceiling``: alpha; ``cila/bound/old-distillation``: from the model before to this one on the earlier
      tasks. In the first task the chained and the training-loss bound are the measured loss, and there is no other.
    - ``cila/certificate/loss``, ``lower``, ``upper``: means of the supervised contrastive loss with all positives on a
      pool of images of the tasks before this one, and of its lower and upper values by range
      (:func:`~avalanche_firn.evaluation.contrastive_bound.tv_certificate`). From the second task on. Equal ids in
      different tasks are different classes there.

    The images are chosen once, see :mod:`~avalanche_firn.evaluation.contrastive_pairs`. A task with one class, or
    without any class of two images, has weight 0 in the bounds (:attr:`skipped`, and a RuntimeWarning); its images are
    in the pool all the same. A task that is trained again changes no weight. All other weights are 1.

    A figure that isn't finite (diverged weights) is left out with a RuntimeWarning; the run goes on. Training isn't
    changed by a bit: modes, buffers, gradients and random generators stay.

    Args:
        stream: held-out experiences, validation or test, one per task; experience i of it belongs to experience i of
            the training stream. Evaluation transforms are applied.
        temperature: of both models; None takes the ``temperature`` of the distilling plugin.
        negatives: K. Default 8, our choice: few, because alpha grows with K.
        pairs_per_task, pool_per_task: anchors, and images in the pool. Default 256 and 64, our choice.
        seed: of this choice. batch_size, num_workers: of the forward passes.

    The strategy must hold a plugin with ``teacher``, ``coefficients`` (one per task started, None for the first) and,
    for ``temperature=None``, ``temperature``; the model ``project(images) -> (N, d)`` unit rows. Raises ValueError
    where it doesn't, before the first training step, and for arguments out of range, an experience without images, no
    task with pairs and streams of different length.
    """

    def __init__(
        self,
        stream: Sequence[Any],
        *,
        temperature: float | None = None,
        negatives: int = 8,
        pairs_per_task: int = 256,
        pool_per_task: int = 64,
        seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("negatives", negatives, 1),
            ("pairs_per_task", pairs_per_task, 1),
            ("pool_per_task", pool_per_task, 2),
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}; accepted are integers from {least}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature: got {temperature}; accepted are None and finite numbers above 0")
        self.stream = stream
        self.temperature = temperature
        self.negatives, self.pairs_per_task, self.pool_per_task = negatives, pairs_per_task, pool_per_task
        self.seed, self.batch_size, self.num_workers = seed, batch_size, num_workers
        self._held_out = HeldOutPairs(stream, negatives=negatives, pairs=pairs_per_task, pool=pool_per_task, seed=seed)
        if self.skipped:
            text = f"ContrastiveBound gives weight 0 to tasks: {self._held_out.why_skipped()}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        self._trained: list[int] = []
        self._rows: list[dict[str, Any]] = []
        self._cosines: dict[int, Tensor] = {}  # of the model at the end of the last task
        self._pools: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ use
    def __str__(self) -> str:
        return "ContrastiveBound"

    def reset(self) -> None:
        """Nothing to do between experiences: the bounds are about the history of the run."""

    @property
    def skipped(self) -> dict[int, str]:
        """Tasks without pairs, and why."""
        return self._held_out.skipped

    def result(self) -> list[dict[str, Any]]:
        """One dict of plain values per task trained, in order; a figure that isn't defined is None.

        ``measured``, ``one_step``, ``chained``, ``training_loss``, ``ceiling``, ``old_distillation``,
        ``certificate_loss``, ``certificate_lower`` and ``certificate_upper`` as in the tags. ``task``, index of the
        experience; ``weight``, 1 or 0; ``tasks``, how many count; ``contrastive_new``, the loss on the new task;
        ``coefficient`` and ``gamma`` of the distillation. ``vacuous``: those of :data:`BOUNDS` that reach the ceiling;
        for a coefficient of 0 the training-loss bound is infinite, thus None and in this list.
        """
        return [{**row, "vacuous": [*row["vacuous"]]} for row in self._rows]

    def curves(self) -> dict[str, list[float | None]]:
        """Every tag with its values after each task; None where it isn't defined."""
        return {tag: [row[name] for row in self._rows] for name, tag in _TAGS.items()}

    def summary_lines(self) -> list[str]:
        """Sentences for a report: the loss of each task, which bounds say something about it, the certificate.

        Tasks are counted from 1.
        """
        lines = [f"task {task + 1} is left out of the bounds: it has {why}" for task, why in self.skipped.items()]
        for row in self._rows:
            start, ceiling = f"task {row['task'] + 1}:", row["ceiling"]
            if row["measured"] is not None:
                over = f"{row['tasks']} task{'s' if row['tasks'] > 1 else ''}"
                lines.append(f"{start} the contrastive loss over {over} is {row['measured']:.3g}")
            for name in BOUNDS if row["tasks"] > row["weight"] else ():  # in the first task they are the loss
                size = "" if row[name] is None else f" {row[name]:.3g}"
                if name in row["vacuous"]:
                    text = f"{size or ' (infinite)'} is vacuous: no loss exceeds {ceiling:.3g}"
                else:
                    text = f"{size} stays below {ceiling:.3g}, the largest possible loss" if size else " is not defined"
                lines.append(f"{start} the {name.replace('_', '-')} bound{text}")
            if row["certificate_loss"] is not None:
                low, loss, high = (row[f"certificate_{end}"] for end in ("lower", "loss", "upper"))
                lines.append(
                    f"{start} on earlier tasks the loss with all positives is {loss:.3g}, certified to lie between "
                    f"{low:.3g} and {high:.3g}"
                )
        return lines

    # ---------------------------------------------------------------- hooks
    def before_training_exp(self, strategy: Any) -> Emitted:
        """Checks only: what is missing stops the run before it has cost anything."""
        plugin = _distiller(strategy)
        if self.temperature is None and not hasattr(plugin, "temperature"):
            raise ValueError(f"temperature: None, and {type(plugin).__name__} has none; accepted is a number then")
        task, trained = int(strategy.experience.current_experience), full_stream(strategy.experience)
        count = len(trained) if hasattr(trained, "__len__") else len(self.stream)  # it may be generated lazily
        if count != len(self.stream) or task >= count:
            raise ValueError(
                f"stream: got {len(self.stream)} experiences, and experience {task} of {count} is trained; accepted is "
                "one held-out experience for each of the training stream"
            )
        if not self._trained:
            first = self._held_out.pools[0][:2]
            check_unit_rows(project_images(strategy.model, self.stream[0], first, device=strategy.device))
        return None

    def after_training_exp(self, strategy: Any) -> Emitted:
        plugin, task, pairs = _distiller(strategy), int(strategy.experience.current_experience), self._held_out.pairs
        temperature = float(plugin.temperature if self.temperature is None else self.temperature)
        before = list(dict.fromkeys(self._trained))
        old = [s for s in before if s in pairs]
        new = [task] if task in pairs and task not in before else []
        loading = {"device": strategy.device, "batch_size": self.batch_size, "num_workers": self.num_workers}
        seen = {s: self._held_out.observe(strategy.model, s, **loading) for s in dict.fromkeys([*before, task])}
        cosines, pools = {s: values for s, (values, _) in seen.items()}, {s: rows for s, (_, rows) in seen.items()}
        losses = {s: float(pair_losses(cosines[s], temperature).mean()) for s in (*old, *new)}
        distilled = [float(pair_cross_entropies(cosines[s], self._cosines[s], temperature).mean()) for s in old]
        coefficient = plugin.coefficients[-1] if plugin.coefficients else None
        row = {
            "task": task,
            "weight": len(new),
            "tasks": len(losses),
            "coefficient": None if coefficient is None else float(coefficient),
            "contrastive_new": losses[task] if new else None,
            "measured": math.fsum(losses.values()) / len(losses) if losses else None,
            "old_distillation": math.fsum(distilled) / len(old) if old else None,
            "ceiling": loss_ceiling(temperature, self.negatives),
            **self._certificate(before, pools, temperature),
        }
        lost = [name for name, value in row.items() if value is not None and not math.isfinite(value)]
        if lost:
            text = f"ContrastiveBound after experience {task}: left out, as not finite: {', '.join(lost)}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        row |= dict.fromkeys(lost)
        self._rows.append({**row, **_bounds([*self._rows, row])})
        self._trained.append(task)
        self._cosines, self._pools = cosines, pools
        values, step = {tag: self._rows[-1][name] for name, tag in _TAGS.items()}, len(self._trained) - 1
        return [MetricValue(self, tag, value, step) for tag, value in values.items() if value is not None]

    def _certificate(
        self, before: Sequence[int], pools: Mapping[int, Tensor], temperature: float
    ) -> dict[str, float | None]:
        labels = self._held_out.pool_labels(before)
        paired = (labels[:, None] == labels).sum(1) > 1
        if not bool(paired.any()):
            return {f"certificate_{end}": None for end in ("loss", "lower", "upper")}
        student, teacher = (torch.cat([rows[s] for s in before]) for rows in (pools, self._pools))
        found = tv_certificate(student, teacher, labels, temperature)
        values = {"loss": found.loss, "lower": found.lower_range, "upper": found.upper_range}
        return {f"certificate_{end}": float(rows[paired].mean()) for end, rows in values.items()}

    # ---------------------------------------------------------------- state
    def _settings(self) -> dict[str, Any]:
        names = ("temperature", "negatives", "pairs_per_task", "pool_per_task", "seed")
        return {name: getattr(self, name) for name in names} | {"stream": [len(t) for t in self._held_out.targets]}

    def state_dict(self) -> dict[str, Any]:
        """History, cosines and pools of the last model (float64, not copied), and the settings they belong to."""
        return {
            "settings": self._settings(),
            "trained": [*self._trained],
            "rows": self.result(),
            "cosines": {str(task): values for task, values in self._cosines.items()},
            "pools": {str(task): values for task, values in self._pools.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a metric with the same arguments; ValueError, naming them, where they differ."""
        own = self._settings()
        if differing := [name for name in own if state["settings"].get(name) != own[name]]:
            raise ValueError(f"ContrastiveBound: the state was made with another value of {', '.join(differing)}")
        self._trained = [int(task) for task in state["trained"]]
        self._rows = [{**row, "vacuous": [*row["vacuous"]]} for row in state["rows"]]
        self._cosines, self._pools = (
            {int(task): values.detach().to("cpu", torch.float64, copy=True) for task, values in state[name].items()}
            for name in ("cosines", "pools")
        )


def _distiller(strategy: Any) -> Any:
    for plugin in strategy.plugins:
        if hasattr(plugin, "teacher") and hasattr(plugin, "coefficients"):
            return plugin
    raise ValueError(
        f"plugins: got {[type(plugin).__name__ for plugin in strategy.plugins]}; accepted is a list with a plugin that "
        "has teacher and coefficients, such as ContrastiveDistillationPlugin"
    )


def _bounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """gamma, the three bounds as means over tasks, and the vacuous ones, after the last of the rows."""
    last, alpha = rows[-1], rows[-1]["ceiling"]
    new, distilled, measured = (
        [math.nan if row[name] is None else row[name] for row in rows]
        for name in ("contrastive_new", "old_distillation", "measured")
    )
    weights, coefficients = [row["weight"] for row in rows], [row["coefficient"] for row in rows]
    training = [
        (c if weight else 0.0) + (0.0 if row["tasks"] == weight else math.nan if lam is None else lam * d)
        for row, c, d, lam, weight in zip(rows, new, distilled, coefficients, weights, strict=True)
    ]
    weight, previous = last["weight"], last["tasks"] - last["weight"]
    sums = {
        "one_step": math.nan,
        "chained": chained_bound(new, distilled, weights=weights, ceiling=alpha)[-1],
        "training_loss": training_loss_bound(training, weights=weights, coefficients=coefficients, ceiling=alpha)[-1],
    }
    if previous:
        old = measured[-2] * previous
        sums["one_step"] = one_step_bound(
            old, new[-1], distilled[-1], weight=weight, previous_weight=previous, ceiling=alpha
        )
    means = {name: value / last["tasks"] if last["tasks"] else math.nan for name, value in sums.items()}
    share = None if not previous or last["coefficient"] is None else gamma(weight, previous, last["coefficient"])
    return {
        **{name: value if math.isfinite(value) else None for name, value in means.items()},
        "gamma": share,
        "vacuous": [name for name, value in means.items() if value >= alpha],
    }


__all__ = ["BOUNDS", "ContrastiveBound"]
