"""Zapping: rows of the classifier are redrawn again and again while the network is trained.

L. Frati et al., "Reset It and Forget It" (arXiv 2310.07996), and "How Weight Resampling and Optimizers Shape the
Dynamics of Continual Learning" (arXiv 2507.01559): the layers below must stay useful while the last one is relearned,
and such features transfer better. The released code zaps in pre-training: every few epochs (here ``schedule="epoch"``,
:meth:`ZappingPlugin.pretraining`) or one class before its images come (``"class_exposure"``).

What differs from the released code: rows have the spread of a single one however many are drawn together; old classes
are zapped only where they are named; one private stream of random numbers, so that data order and dropout don't change
with the zap; rules for the optimizer's state, parts of a zap (``blend``), and any schedule. Its bugs are switches.

Cost of a zap: one draw of K x F numbers on the CPU and a copy of the classifier's chosen rows; no read from the device
(one where the classifier has no bias, and as said at ``"class_exposure"``). On one CPU core a row of 2304 takes about
1 ms, a whole head of 1000 rows 50 ms.

EWC, SI, MAS and LwF pull zapped rows back to their old values or outputs: take the classifier out of their reach, or
expect a weaker zap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_firn.models.linear_rows import LinearRows, linear_rows
from avalanche_firn.models.parts import ModelParts, find_parts
from avalanche_firn.plugins.finite_words import listed, nonfinite_stop
from avalanche_firn.plugins.probe_head import ParameterFilter, not_linear, task_label_of
from avalanche_firn.plugins.relearning import relearn
from avalanche_firn.plugins.row_resampling import (
    RowRule,
    StateMode,
    check_blend,
    check_rule,
    check_state_mode,
    resample_rows_,
    reset_optimizer_rows_,
)
from avalanche_firn.plugins.zap_rows import (
    RowStreams,
    Scope,
    check_names,
    check_numbers,
    check_shares,
    checked_filter,
    checked_ids,
    checked_scope,
    class_key,
    current_classes,
    redraw,
    refuse_untrainable,
)

Schedule = Literal["experience", "epoch", "iteration", "class_exposure"]
ZapBias = Literal["keep", "zero", "init"]


class Zap(NamedTuple):
    """One zap: training iterations of the run before it, epochs done of the experience, its number, class ids."""

    iteration: int
    epoch: int
    experience: int
    rows: tuple[int, ...]


class ZappingPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Redraw rows of the classifier on a schedule; works with any Avalanche SGD strategy.

    The classifier: a linear layer, Avalanche's growing or multi-head one (rows of the experience's task), or a
    ``TaskwiseLinearHead``. Rows are found and written in place at each zap, after the classifier has grown.

    **Place in the list of plugins.** It matters for ``schedule="experience"`` alone, where the zap comes when the
    experience opens: before a ``LinearProbePlugin``, whose solution it would destroy otherwise. Plugins that rebuild
    the optimizer may stand on either side. Zaps at the start of an epoch (the first too) come after any probe.

    :param target: ``"auto"`` (:func:`~avalanche_firn.models.parts.find_parts`) or the dotted name of a module.
    :param scope: class ids to zap. ``"experience"``: those of the current one. ``"new"``: those of them that no earlier
        one had. ``"all"``: every row there is, **also of old classes**. ``"random"``: ``n_rows`` or ``fraction`` of
        ``"all"``. A sequence of ids, or a function ``strategy -> ids``: whatever they name, see :attr:`zapped_past`.
        With replay, the classes of stored samples are not the experience's.
    :param schedule: what is counted, from 0: ``"experience"``: experiences of the run. ``"epoch"``: epochs of the
        experience, at their start. ``"iteration"``: iterations of the experience, before their forward pass.
        ``"class_exposure"``: for each class of the scope, the experiences of the run in which it has arrived; its row
        is zapped when its first batch arrives (reads the targets from the device in each iteration until all classes
        of the scope have come). A function ``strategy -> bool``: asked before the iterations that the numbers below
        leave, counted as ``"iteration"``.
    :param every: zap where ``(count - start) % every == 0``; 0: never (a control run, as in the released code).
    :param start: first count. :param stop: first count without a zap any more; None: no end.
    :param skip_first: leave count 0 out. None: True for epochs and iterations (released code: zap at the start of
        epoch e if ``e > 0 and e % every == 0``), else False.
    :param skip_last: False: zap also after the last epoch or iteration of an experience if the next would have one (the
        other reading of the paper, "at the end of each epoch"); those rows stay untrained. Epochs and iterations only.
    :param n_rows: so many rows of the scope, drawn without replacement at each zap; None: all of them.
    :param fraction: the same as a share, above 0 to 1, to the nearest and at least 1. Not with ``"class_exposure"``.
    :param init: rule of :func:`~avalanche_firn.plugins.row_resampling.resample_rows_`.
        ``"kaiming_normal_joint"``: as the released code draws several rows.
    :param bias: ``"keep"`` (released code), ``"zero"``, ``"init"`` (uniform, as PyTorch starts it).
    :param optimizer_state: mode of :func:`~avalanche_firn.plugins.row_resampling.reset_optimizer_rows_` for the weights
        (and the bias unless it is kept); ``"keep"``: released code.
    :param blend: share of the fresh values in a zapped row. # our choice: 1, as in the released code
    :param relearn_steps: after a zap, steps on batches of ``train_mb_size`` samples of the experience with
        ``relearn_fraction`` of them from the zapped classes (:mod:`~avalanche_firn.plugins.relearning`). 0: none
        (released configurations). After a zap at the opening they come at the start of the first epoch.
    :param relearn_fraction: above 0 to 1. # our choice: 0.5, open in the paper
    :param relearn_parameters: which parameters those steps move, ``(name, parameter) -> bool`` or name patterns with
        ``*``; None: the classifier (released code).
    :param seed: of a private CPU generator for values and row choice, 0 and above. None: the global CPU generator, as
        in the released code; data order and dropout then depend on the zaps.
    :param row_choice_seed: of a NumPy generator for the row choice of ``n_rows`` and ``fraction``, as in the released
        code (``default_rng(seed).choice``). None: rows come from the stream of ``seed``.
    :param log: send ``zap/rows``, the number of rows, to the loggers at each zap, step = training iterations.
    :raises ValueError: settings out of range; a classifier without rows, that has no row for a class, is frozen,
        computed (parametrised), or not in the optimizer; an optimizer that the row modes refuse.
    """

    def __init__(
        self,
        target: str = "auto",
        *,
        scope: Scope | Sequence[int] | Callable[[Any], Iterable[int]] = "experience",
        schedule: Schedule | Callable[[Any], bool] = "experience",
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        skip_first: bool | None = None,
        skip_last: bool = True,
        n_rows: int | None = None,
        fraction: float | None = None,
        init: RowRule = "kaiming_normal",
        bias: ZapBias = "keep",
        optimizer_state: StateMode = "keep",
        blend: float = 1.0,
        relearn_steps: int = 0,
        relearn_fraction: float = 0.5,
        relearn_parameters: ParameterFilter | Sequence[str] | None = None,
        seed: int | None = 0,
        row_choice_seed: int | None = None,
        log: bool = False,
    ) -> None:
        super().__init__()
        scope = checked_scope(scope)
        check_names(
            target=target,
            schedule=(schedule, get_args(Schedule)),
            bias=(bias, get_args(ZapBias)),
            optimizer_state=(optimizer_state, get_args(StateMode)),
        )
        check_numbers(
            every=(every, 0),
            start=(start, 0),
            stop=(stop, 0),
            n_rows=(n_rows, 1),
            relearn_steps=(relearn_steps, 0),
            seed=(seed, 0),
            row_choice_seed=(row_choice_seed, 0),
        )
        check_shares(fraction=fraction, relearn_fraction=relearn_fraction)
        if n_rows is not None and fraction is not None:
            raise ValueError(f"n_rows is {n_rows} and fraction is {fraction}; one of them is accepted")
        sampled = n_rows is not None or fraction is not None
        if scope == "random" and not sampled:
            raise ValueError("scope is 'random' without n_rows and fraction; one of them is needed")
        if schedule == "class_exposure" and sampled:
            raise ValueError("schedule is 'class_exposure' with n_rows or fraction; it zaps the classes that arrive")
        if not skip_last and schedule not in ("epoch", "iteration"):
            raise ValueError(f"skip_last is False with schedule {schedule!r}; 'epoch' or 'iteration' is accepted then")
        check_rule(init)
        check_blend(blend)
        self.target = target
        self.scope = scope
        self.schedule = schedule
        self.every = every
        self.start = start
        self.stop = stop
        self.skip_first = schedule in ("epoch", "iteration") if skip_first is None else bool(skip_first)
        self.skip_last = bool(skip_last)
        self.n_rows = n_rows
        self.fraction = fraction
        self.init = init
        self.bias = bias
        self.optimizer_state: StateMode = optimizer_state
        self.blend = blend
        self.relearn_steps = relearn_steps
        self.relearn_fraction = relearn_fraction
        self.relearn_parameters = checked_filter(relearn_parameters)
        self.log = log
        self.history: list[Zap] = []
        """Every zap so far (in memory and checkpoints: one whole number per redrawn row)."""
        self._streams = RowStreams(seed, row_choice_seed)
        self._known: set[tuple[int, int]] = set()  # task label (0 without several heads) and class, earlier experiences
        self._awaited: set[int] = set()  # classes that have not arrived in this experience
        self._exposures: dict[tuple[int, int], int] = {}
        self._zapped_past = False
        self._to_relearn: list[int] = []
        self._relearnt: list[tuple[int, tuple[int, ...]]] = []  # in this epoch: iteration and classes
        self._bad: Tensor | None = None  # the first step among all of theirs whose loss isn't finite, -1: none

    @classmethod
    def pretraining(
        cls, *, every: int = 1, fraction: float = 1.0, reference: bool = False, seed: int = 0, **options: Any
    ) -> ZappingPlugin:
        """Zapped i.i.d. pre-training (2310.07996): a share of all rows at the start of each epoch but the first.

        :param every: epochs between zaps; 0: the control. The released sweep has 0, 1, 3, 5, 10.
        :param fraction: of the rows, 1 or 0.1 in the released sweep.
        :param reference: as the released code: all rows of a zap share its smaller spread, which rows is up to NumPy's
            generator of ``seed``, their values come from the global generator.
        :param options: further settings of the plugin.
        :raises ValueError: a setting out of range.
        """
        settings: dict[str, Any] = dict(schedule="epoch", every=every, skip_first=True, seed=seed)
        if reference or fraction != 1:
            settings |= dict(scope="random", fraction=fraction)
        else:
            settings |= dict(scope="all")
        if reference:
            settings |= dict(init="kaiming_normal_joint", seed=None, row_choice_seed=seed)
        return cls(**(settings | options))

    @property
    def zapped_past(self) -> bool:
        """Whether any zap has redrawn a class of an earlier experience that the current one did not have."""
        return self._zapped_past

    # ----------------------------------------------------------------- hooks
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Find the classifier before any work is done, and see that it has rows."""
        parts = self._parts(strategy)
        if not_linear(parts.head):
            raise ValueError(
                f"the classifier {parts.head_name!r} is a {type(parts.head).__name__}; a linear layer, "
                "IncrementalClassifier, MultiHeadClassifier or TaskwiseLinearHead is accepted (target=... names one)"
            )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A new experience: its zap, or the classes to wait for."""
        self._to_relearn = []
        if self.schedule == "class_exposure":
            self._awaited = set(self._candidates(strategy, self._parts(strategy).head))
        if self.schedule == "experience" and self._due(strategy.clock.train_exp_counter):
            self._zap(strategy, epoch=0)  # the clock still stands at the end of the experience before

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The zap of an epoch, and the steps after one that came earlier: the optimizer is the final one by now."""
        check_state_mode(strategy.optimizer, self.optimizer_state)
        if self.schedule == "epoch" and self._due(strategy.clock.train_exp_epochs):
            self._zap(strategy)
        self._relearn(strategy)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """The zap of an iteration, or of classes that arrive."""
        if self.schedule == "class_exposure":
            if self._awaited:
                self._zap(strategy, self._arriving(strategy))
        elif self.schedule == "iteration" or callable(self.schedule):
            if not self._due(strategy.clock.train_exp_iterations):
                return
            if not callable(self.schedule) or self.schedule(strategy):
                self._zap(strategy)
        self._relearn(strategy)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """One read in an epoch with relearning: were its losses finite?"""
        if (what := self.describe_nonfinite(strategy)) is not None:
            raise nonfinite_stop(
                strategy, f"epoch {strategy.clock.train_exp_epochs}", what, "A smaller learning rate is needed."
            )
        self._relearnt, self._bad = [], None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The zap after the last epoch or iteration, if wanted; the classes are old ones from here on."""
        if not self.skip_last:
            clock = strategy.clock
            if self._due(clock.train_exp_epochs if self.schedule == "epoch" else clock.train_exp_iterations):
                self._zap(strategy)
                self._to_relearn = []
        head = self._parts(strategy).head
        self._known |= {class_key(head, strategy.experience, c) for c in current_classes(strategy.experience)}

    # ------------------------------------------------------------------ when
    def _due(self, count: int) -> bool:
        if self.every == 0 or count < self.start or (count == 0 and self.skip_first):
            return False
        return (self.stop is None or count < self.stop) and (count - self.start) % self.every == 0

    def _arriving(self, strategy: Any) -> list[int]:
        """Classes in the batch that had not come in this experience yet, and whose exposure is due."""
        arrived = self._awaited.intersection(strategy.mb_y.unique().tolist())
        self._awaited -= arrived
        head, due = self._parts(strategy).head, []
        for class_id in sorted(arrived):
            key = class_key(head, strategy.experience, class_id)
            count = self._exposures.get(key, 0)
            self._exposures[key] = count + 1
            if self._due(count):
                due.append(class_id)
        return due

    # ------------------------------------------------------------------ what
    def _candidates(self, strategy: Any, head: nn.Module) -> list[int]:
        """Class ids of the scope, in order."""
        if self.scope == "experience":
            return current_classes(strategy.experience)
        if self.scope == "new":
            return [
                c
                for c in current_classes(strategy.experience)
                if class_key(head, strategy.experience, c) not in self._known
            ]
        if self.scope in ("all", "random"):
            return list(_all_rows(strategy, head).class_ids)
        if callable(self.scope):
            return checked_ids(self.scope(strategy), "scope(strategy)")
        return list(self.scope)  # type: ignore[arg-type]

    def _chosen(self, candidates: list[int]) -> list[int]:
        if not candidates or (self.n_rows is None and self.fraction is None):
            return candidates
        total = len(candidates)
        count = self.n_rows if self.fraction is None else max(1, int(self.fraction * total + 0.5))
        assert count is not None
        if count > total:
            raise ValueError(f"n_rows is {count} and scope {self.scope!r} has {total} rows; at most those are accepted")
        return self._streams.choose(candidates, count)

    # ------------------------------------------------------------------ work
    def _zap(self, strategy: Any, class_ids: list[int] | None = None, *, epoch: int | None = None) -> None:
        if any(getattr(plugin, "reopening", False) for plugin in strategy.plugins):
            return  # a checkpoint is about to restore weights, optimizer and generators, which have it already
        parts = self._parts(strategy)
        ids = self._chosen(self._candidates(strategy, parts.head)) if class_ids is None else class_ids
        if not ids:
            return
        rows = linear_rows(parts.head, ids, task_label=task_label_of(strategy.experience))
        assert rows is not None  # before_training saw to it
        refuse_untrainable(strategy.optimizer, parts, rows, bias=self.bias != "keep")
        redraw(
            rows,
            strategy.optimizer,
            outputs=len(_all_rows(strategy, parts.head).class_ids),
            init=self.init,
            bias_mode=None if self.bias == "keep" else self.bias,
            blend=self.blend,
            state_mode=self.optimizer_state,
            generator=self._streams.values,
        )
        self._to_relearn = list(ids)
        self._record(strategy, parts.head, ids, epoch)

    def _record(self, strategy: Any, head: nn.Module, ids: list[int], epoch: int | None) -> None:
        clock, current = strategy.clock, set(current_classes(strategy.experience))
        done = clock.train_exp_epochs if epoch is None else epoch
        self.history.append(Zap(clock.train_iterations, done, clock.train_exp_counter, tuple(ids)))
        past = [c for c in ids if c not in current and class_key(head, strategy.experience, c) in self._known]
        self._zapped_past = self._zapped_past or bool(past)
        if self.log and strategy.evaluator.active:
            value = MetricValue(self, "zap/rows", len(ids), clock.train_iterations)
            strategy.evaluator.publish_metric_value(value)

    def _relearn(self, strategy: Any) -> None:
        classes, self._to_relearn = self._to_relearn, []
        if classes and self.relearn_steps:
            losses = relearn(
                strategy,
                self._parts(strategy),
                classes,
                steps=self.relearn_steps,
                fraction=self.relearn_fraction,
                chosen=self.relearn_parameters,
                generator=self._streams.batches,
            )
            bad = ~losses.isfinite()
            known = torch.full_like(bad, -1, dtype=torch.int64)[0] if self._bad is None else self._bad
            step = len(self._relearnt) * self.relearn_steps + bad.int().argmax()
            self._bad = torch.where((known < 0) & bad.any(), step, known)
            self._relearnt.append((int(strategy.clock.train_exp_iterations), tuple(classes)))

    def describe_nonfinite(self, strategy: Any) -> str | None:
        """The first loss of relearning that isn't finite, if there is one; for the message of a guard, too."""
        place = -1 if self._bad is None else int(self._bad)
        if place < 0:
            return None
        iteration, classes = self._relearnt[place // self.relearn_steps]
        return (
            f"In iteration {iteration}, the loss of step {place % self.relearn_steps} of relearning the classes "
            f"{listed(classes, 10)} isn't finite"
        )

    def _parts(self, strategy: Any) -> ModelParts:
        return find_parts(strategy.model, None if self.target == "auto" else self.target)

    # ----------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Random streams, what was zapped, and which classes have come (weights belong to the model)."""
        return {
            "streams": self._streams.state_dict(),
            "known": sorted(list(key) for key in self._known),
            "awaited": sorted(self._awaited),
            "exposures": sorted([*key, count] for key, count in self._exposures.items()),
            "history": [[*zap[:3], list(zap.rows)] for zap in self.history],
            "zapped_past": self._zapped_past,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        :raises ValueError: a random stream is private in one of the two plugins only.
        """
        self._streams.load_state_dict(state["streams"])
        self._known = {(int(task), int(c)) for task, c in state["known"]}
        self._awaited = {int(c) for c in state["awaited"]}
        self._exposures = {(int(task), int(c)): int(count) for task, c, count in state["exposures"]}
        self.history = [Zap(int(i), int(e), int(x), tuple(int(r) for r in rows)) for i, e, x, rows in state["history"]]
        self._zapped_past = bool(state["zapped_past"])


def _all_rows(strategy: Any, head: nn.Module) -> LinearRows:
    rows = linear_rows(head, task_label=task_label_of(strategy.experience))
    assert rows is not None  # before_training saw to it
    return rows


__all__ = ["Zap", "ZappingPlugin", "resample_rows_", "reset_optimizer_rows_"]
