"""Task inference at test time: find the task of a sample from its features, then evaluate it as that task's model.

LoRAC-IPC (arXiv 2504.13407; procedure of the released code): features of the backbone as it was after the first task
are compared with clusters of every class seen (:mod:`~avalanche_firn.plugins.mahalanobis`); the nearest class says the
task; a second pass goes through the backbone as it was after that task. No task identity is used.

Differs from the released code: one pass per batch instead of one per image, every sample decides for itself (their
``--batch_wise`` vote over test batches of one task, which leaks the task, is ``batchwise_vote=True``), classes are
looked up by id, classes not seen are masked. Cost at test time: a second forward pass with ``T r`` more columns per
layer, and the distances; after a task one more pass over its images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_firn.models.heads import UNSEEN_LOGIT, TaskwiseLinearHead
from avalanche_firn.models.lora import LoRAComposition
from avalanche_firn.models.parts import ModelParts, evaluation_mode, extract_features, find_parts
from avalanche_firn.models.processes import all_rows, own_rows
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.experience_classes import experience_classes, refuse_known_classes
from avalanche_firn.plugins.finite_words import experience_words, finite_or_stop, not_evaluated
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference, vote

_STATISTICS_HELP = "A smaller rate, or precision fp32 or bf16, usually helps."


class TaskInferencePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Evaluate every sample with the weights of the task that its features point to. After LoRACompositionPlugin.

    In evaluations the strategy's forward pass goes through the first task's weights; its features choose the tasks, and
    the outputs of a second pass replace its own. An evaluation in the middle of a task, whose statistics do not exist
    yet, uses the weights as they are.

    :param clusters: per class (4; ImageNet-R: 2; training_scripts/*.sh). Other settings of
        :class:`MahalanobisTaskInference`: give ``inference``.
    :param inference: the statistics, in place of ``clusters`` and ``seed``.
    :param mask_unseen: no output for classes not seen in training (True; the released code masks none). Without effect
        on a ``TaskwiseLinearHead``, which has no outputs for them.
    :param batchwise_vote: one task per batch, by majority (False). Only for comparisons with figures of the released
        code; test batches of one task then tell their task. Declared in the results.
    :param mixed: how a batch of several tasks is evaluated. ``"one_pass"``: all samples together, low-rank.
        ``"grouped"``: one pass per task with merged weights, also for models that read weights instead of calling
        layers (BEiT, EVA, Swin v2); waits for the device once. ``"auto"``: grouped on a CPU, where that is cheaper,
        else one pass. The figures are the same.
    :param seed: of the clusters. :param num_workers: loader processes for the statistics.
    :raises ValueError: no LoRACompositionPlugin before this one, a class comes back in a later experience.
    :raises NonFiniteError: features that aren't finite, in the statistics of a class or in an evaluation.
    """

    def __init__(
        self,
        clusters: int = 4,
        *,
        inference: MahalanobisTaskInference | None = None,
        mask_unseen: bool = True,
        batchwise_vote: bool = False,
        mixed: Literal["auto", "one_pass", "grouped"] = "auto",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if mixed not in ("auto", "one_pass", "grouped"):
            raise ValueError(f"mixed is {mixed!r}; 'auto', 'one_pass' or 'grouped' is accepted")
        self.inference = MahalanobisTaskInference(clusters, seed=seed) if inference is None else inference
        self.mask_unseen = mask_unseen
        self.batchwise_vote = batchwise_vote
        self.mixed = mixed
        self.num_workers = num_workers
        self.accuracies: dict[int, float] = {}
        """Experiences trained -> share of samples routed to their own task, mean over tasks, in the last evaluation."""
        self._composition: LoRAComposition | None = None
        self._measured = False  # the current task's statistics were taken
        self._capture: Any = None  # handle of the hook that takes features
        self._features: list[Tensor] = []
        self._view: Any = None  # context of the first pass
        self._end: Any = None  # handle of the hook that leaves it, whatever happens in the pass
        self._hits: list[Tensor] = []  # per experience of an evaluation: routed right, samples of seen classes
        self._lost: list[tuple[str, Tensor]] = []  # the same: its name, samples whose features aren't finite
        self._owners: tuple[Tensor, Tensor] | None = None  # classes and their tasks, on the device

    # ------------------------------------------------------------- in training
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """The plugin that closes tasks comes first."""
        self._leave()
        before = strategy.plugins[: strategy.plugins.index(self)]
        if not any(isinstance(plugin, LoRACompositionPlugin) for plugin in before):
            raise ValueError(
                "TaskInferencePlugin needs the weights that LoRACompositionPlugin keeps; give that one before it in "
                "plugins"
            )

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """A new task: its classes must be new."""
        self._composition = LoRAComposition(strategy.model)
        self._measured = False
        self.inference.to(strategy.device)
        refuse_known_classes(strategy.experience, self.inference)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The last epoch is over: a periodic evaluation that comes right now needs the statistics."""
        if strategy.clock.train_exp_epochs + 1 >= strategy.train_epochs:
            self._measure(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The same for a task that stopped early."""
        if not self._measured:
            self._measure(strategy)

    def _measure(self, strategy: Any) -> None:
        composition = self._layers(strategy)
        aligned = [p.features for p in strategy.plugins if isinstance(p, ClassifierAlignmentPlugin)]
        if composition.num_closed == 1 and aligned and aligned[0] is not None:
            features, targets = aligned[0]  # the first task's weights are the present ones
        else:
            with composition.as_task(0):
                features, targets = extract_features(
                    strategy.model,
                    strategy.experience.dataset.eval(),
                    batch_size=strategy.eval_mb_size,
                    device=strategy.device,
                    num_workers=self.num_workers,
                )
        with finite_or_stop(strategy, "the statistics for task inference", _STATISTICS_HELP):
            for class_id in experience_classes(strategy.experience):
                self.inference.add(class_id, features[targets == class_id], composition.num_closed - 1)
        self._measured = True

    # ----------------------------------------------------------- in evaluation
    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Count anew."""
        self._leave()
        self._composition = LoRAComposition(strategy.model)
        self._hits, self._lost, self._owners = [], [], None

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Counters of the experience."""
        if self._owners is None:
            pair = [torch.tensor(ids, dtype=torch.long) for ids in (self.inference.class_ids, self.inference.tasks)]
            self._owners = (pair[0].to(strategy.device), pair[1].to(strategy.device))
        self._hits.append(torch.zeros(2, dtype=torch.long, device=strategy.device))
        self._lost.append((experience_words(strategy.experience), torch.zeros_like(self._hits[-1][0])))

    def before_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        """The pass that follows goes through the first task's weights, and its features are taken."""
        if not self._ready(self._layers(strategy)):
            return
        self._features = []
        head = find_parts(strategy.model).head
        self._capture = head.register_forward_pre_hook(lambda _, args: self._features.append(args[0].detach()))
        self._view = self._layers(strategy).as_task(0)
        self._view.__enter__()
        self._end = strategy.model.register_forward_hook(lambda *_: self._exit(), always_call=True)

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Infer the tasks; the outputs of a second pass take the place of the first one's."""
        if self._end is None:
            return
        self._leave()
        features, count = self._features.pop(), len(strategy.mb_y)
        shared = len(features) != count  # in a distributed run each process passes its own rows through the model
        features = all_rows(features, count) if shared else features
        tasks = self._infer(features)
        own = tasks[own_rows(count)] if shared else tasks

        def forward(rows: Tensor | None) -> Tensor:
            if rows is None:
                return strategy.forward()
            whole, strategy.mbatch = strategy.mbatch, [part[rows] for part in strategy.mbatch]
            try:
                return strategy.forward()
            finally:
                strategy.mbatch = whole

        strategy.mb_output = self._second_pass(self._layers(strategy), find_parts(strategy.model), tasks, forward, own)
        self._count(tasks, strategy.mb_y)
        self._lost[-1][1].add_((~features.sum(1).isfinite()).sum())

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing of a pass stays behind, whatever happened in it."""
        self._leave()

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Publish how many samples were routed to their own task, the mean over tasks with samples of seen classes."""
        counts = torch.stack(self._hits).tolist() if self._hits else []
        lost = torch.stack([bad for _, bad in self._lost]).tolist() if self._lost else []
        for (place, _), bad in zip(self._lost, lost, strict=True):
            if bad:
                raise not_evaluated(strategy, f"{bad} samples have features that aren't finite, so no task", place)
        shares = [right / total for right, total in counts if total]
        if shares:
            step = self._layers(strategy).num_closed  # the clock has not counted yet in a periodic evaluation
            self.accuracies[step] = sum(shares) / len(shares)
            if strategy.evaluator.active:
                value = MetricValue(self, "lorac/task-inference", self.accuracies[step], step)
                strategy.evaluator.publish_metric_value(value)

    def _exit(self) -> None:
        """The first pass is over, or broke off."""
        if self._view is not None:
            view, self._view = self._view, None
            view.__exit__(None, None, None)
            self._capture.remove()

    def _leave(self) -> None:
        self._exit()
        if self._end is not None:  # not from within this hook itself
            self._end.remove()
            self._end = None

    def _count(self, tasks: Tensor, targets: Tensor) -> None:
        assert self._owners is not None
        ids, owners = self._owners
        same = targets[:, None] == ids  # (B, C): at most one per row
        own = (same * owners).sum(1)
        known = same.any(1)
        self._hits[-1] += torch.stack([((own == tasks) & known).sum(), known.sum()])

    # ------------------------------------------------------------------- work
    @torch.no_grad()
    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits ``(B, ...)`` of a batch outside a strategy, in evaluation mode, as an evaluation gives them.

        :raises RuntimeError: no task has been learnt.
        """
        composition, parts = LoRAComposition(model), find_parts(model)
        if not len(self.inference):
            raise RuntimeError("predict() needs the statistics of at least one task; train first")
        features: list[Tensor] = []
        handle = parts.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        with evaluation_mode(model):
            try:
                with composition.as_task(0):
                    model(x)
            finally:
                handle.remove()
            tasks = self._infer(features[-1])
            forward = lambda rows: model(x if rows is None else x[rows])  # noqa: E731
            return self._second_pass(composition, parts, tasks, forward, tasks)

    def _infer(self, features: Tensor) -> Tensor:
        tasks = self.inference.infer(features)
        return vote(tasks) if self.batchwise_vote else tasks

    def _second_pass(
        self,
        composition: LoRAComposition,
        parts: ModelParts,
        tasks: Tensor,
        forward: Callable[[Tensor | None], Tensor],
        own: Tensor,
    ) -> Tensor:
        """`own`: tasks of the rows that go through the model in this process."""
        if self.mixed == "one_pass" or (self.mixed == "auto" and tasks.device.type != "cpu"):
            with composition.as_tasks(own):
                output = forward(None)
        else:
            output = self._by_task(composition, tasks, forward)
        if self.mask_unseen and not isinstance(parts.head, TaskwiseLinearHead):
            seen = torch.zeros(output.shape[1], dtype=torch.bool, device=output.device)
            seen[torch.tensor(self.inference.class_ids, device=output.device)] = True
            output = output.masked_fill(~seen, UNSEEN_LOGIT)
        return output

    def _by_task(
        self, composition: LoRAComposition, tasks: Tensor, forward: Callable[[Tensor | None], Tensor]
    ) -> Tensor:
        output: Tensor | None = None
        for task in tasks.unique().tolist():
            rows = (tasks == task).nonzero()[:, 0]
            with composition.as_task(task):
                part = forward(rows)
            output = part.new_empty(len(tasks), *part.shape[1:]) if output is None else output
            output[rows] = part
        assert output is not None
        return output

    def _ready(self, composition: LoRAComposition) -> bool:
        return len(self.inference) > 0 and composition.num_closed == composition.num_tasks

    def _layers(self, strategy: Any) -> LoRAComposition:
        if self._composition is None:
            self._composition = LoRAComposition(strategy.model)
        return self._composition

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Statistics of all classes, and the record of task inference."""
        accuracies = [[step, value] for step, value in self.accuracies.items()]
        return {"inference": self.inference.state_dict(), "measured": self._measured, "accuracies": accuracies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.inference.load_state_dict(state["inference"])
        self._measured = state["measured"]
        self.accuracies = {int(step): value for step, value in state["accuracies"]}


__all__ = ["MahalanobisTaskInference", "TaskInferencePlugin"]
