"""Avalanche's EWC and LwF plugins as they are needed here: for heads that grow, mixed precision and exact resume.

Subclasses of ``EWCPlugin`` and ``LwFPlugin`` of Avalanche 0.6, which remain what they are but for:

- **EWC.** ``mode="online"`` pairs importances by position and stops with an AssertionError once a parameter joins the
  model other than at its end; here they are paired by name.
- **LwF.** The teacher is copied when the next experience opens, not when its own ends: it is the same network, and
  between experiences there is no second one to store. It runs in evaluation mode (Avalanche: in training mode, where
  its BatchNorm goes on moving and its dropout is on). The classes that are distilled are those seen so far, whatever
  task labels the data carry; Avalanche takes only those of task label 0 unless the model has several heads.

Both are restored to the bit by :class:`~avalanche_firn.plugins.checkpoint.ExactCheckpointPlugin`, and equal Avalanche's
to the bit where the list above doesn't apply. Under mixed precision teacher and importances are computed as the model
is trained (fp16: importances in float32, since unscaled squares of gradients would vanish).

Cost: EWC one pass with gradients over the experience at its end and, per step, a visit of every parameter for every
stored experience (``separate``) or once (``online``); two copies of the model per stored experience, also in
checkpoints. LwF a forward pass of the teacher per step and a copy of the model.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import EWCPlugin, LwFPlugin
from avalanche.training.regularization import LearningWithoutForgetting
from avalanche.training.utils import ParamData
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.plugins.experience_classes import experience_classes
from avalanche_firn.plugins.finite_words import listed, nonfinite_stop
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(strategy: Any, *, gradients: bool = False) -> AbstractContextManager[Any]:
    """The autocast of the strategy's :class:`MixedPrecisionPlugin`, or a context that does nothing.

    :param gradients: a backward pass without loss scaling follows: fp16 stays off.
    """
    for plugin in strategy.plugins:
        if isinstance(plugin, MixedPrecisionPlugin):
            precision = plugin.resolve(strategy.device)
            if precision == "bf16" or (precision == "fp16" and not gradients):
                return torch.autocast(strategy.device.type, _DTYPES[precision], cache_enabled=False)
    return nullcontext()


# -------------------------------------------------------------------------- EWC
class ResumableEWCPlugin(EWCPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Elastic weight consolidation (arXiv 1612.00796) by Avalanche, with importances paired by name.

    :param ewc_lambda: weight of the penalty. 1: continual-learning-baselines, Permuted MNIST.
    :param mode: ``"separate"``: a penalty for each experience (Avalanche's default); ``"online"``: one, whose
        importances are summed with ``decay_factor``.
    :param decay_factor: of the earlier importances, online only, where it is needed.
    :param keep_importance_data: online only: keep the values of all experiences (nothing reads them).
    :raises ValueError: settings out of range or that do not fit.
    :raises NonFiniteError: importances that aren't finite, by parameter.
    """

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        mode: Literal["separate", "online"] = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
    ) -> None:
        if not ewc_lambda >= 0:
            raise ValueError(f"ewc_lambda is {ewc_lambda}; 0 and above is accepted")
        if mode not in ("separate", "online"):
            raise ValueError(f"mode is {mode!r}; 'separate' or 'online' is accepted")
        if (mode == "online") != (decay_factor is not None):
            raise ValueError(f"decay_factor is {decay_factor} with mode {mode!r}; online needs it, separate has none")
        if decay_factor is not None and not 0 <= decay_factor <= 1:
            raise ValueError(f"decay_factor is {decay_factor}; 0 to 1 is accepted")
        super().__init__(ewc_lambda, mode, decay_factor, keep_importance_data)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Measure the importances, and remember the parameters."""
        with autocast_of(strategy, gradients=True):
            super().after_training_exp(strategy, **kwargs)
        found = self.importances[strategy.clock.train_exp_counter]
        finite = torch.stack([importance.data.sum() for importance in found.values()]).isfinite()
        if not bool(finite.all()):
            wrong = [name for name, fine in zip(found, finite.tolist(), strict=True) if not fine]
            what = f"that of {len(wrong)} of {len(found)} parameters isn't finite ({listed(wrong)})"
            raise nonfinite_stop(strategy, "the importances of EWC", what, "A smaller rate, or fp32, usually helps.")

    @torch.no_grad()
    def update_importances(self, importances: dict[str, ParamData], t: int) -> None:
        """Take in the importances of experience ``t``."""
        if self.mode == "separate" or t == 0:
            self.importances[t] = importances
            return
        before = self.importances[t - 1]
        self.importances[t] = {
            name: self._decayed(before[name], new) if name in before else new for name, new in importances.items()
        }
        if not self.keep_importance_data:
            del self.importances[t - 1]

    def _decayed(self, old: ParamData, new: ParamData) -> ParamData:
        """Both together; a parameter that has grown has had no importance where it is new."""
        summed = self.decay_factor * old.expand(new.shape) + new.data
        return ParamData(f"imp_{new.name}", init_tensor=summed, device=new.device)


# -------------------------------------------------------------------------- LwF
class _Distillation(LearningWithoutForgetting):
    """Avalanche's loss, in float32 whatever the networks gave, and without a copy to the device in every step."""

    def __init__(self, alpha: float, temperature: float) -> None:
        super().__init__(alpha, temperature)
        self._units: tuple[list[int], Tensor] = ([], torch.empty(0))

    def _distillation_loss(self, out: Tensor, prev_out: Tensor, active_units: Any) -> Tensor:
        units = list(active_units)
        if self._units[0] != units or self._units[1].device != out.device:
            self._units = (units, torch.tensor(units, device=out.device))
        index = self._units[1]
        with torch.autocast(out.device.type, enabled=False):
            log_p = F.log_softmax(_full(out)[:, index] / self.temperature, dim=1)
            q = F.softmax(_full(prev_out)[:, index] / self.temperature, dim=1)
            return F.kl_div(log_p, q, reduction="batchmean")


class ResumableLwFPlugin(LwFPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Learning without forgetting (arXiv 1606.09282) by Avalanche: distillation from the model before the experience.

    :param alpha: weight of the distillation. 1: Avalanche's default.
    :param temperature: of its softmax. 2: Avalanche's default, and the paper.
    :param teacher: ``"evaluation"``: the mode that its answers are recorded in; ``"training"``: Avalanche's.
    :raises ValueError: settings out of range; a model with several heads.
    """

    def __init__(
        self, alpha: float = 1.0, temperature: float = 2.0, *, teacher: Literal["evaluation", "training"] = "evaluation"
    ) -> None:
        for field, value in (("alpha", alpha), ("temperature", temperature)):
            if not (value > 0 or (field == "alpha" and value == 0)):
                raise ValueError(f"{field} is {value}; a number above 0 is accepted")
        if teacher not in ("evaluation", "training"):
            raise ValueError(f"teacher is {teacher!r}; 'evaluation' or 'training' is accepted")
        super().__init__(alpha, temperature)
        self.lwf = _Distillation(alpha, temperature)
        self.teacher = teacher
        self._pending: dict[str, Tensor] | None = None  # loaded before there is a teacher to hold it

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check once, before any work."""
        if isinstance(strategy.model, MultiTaskModule):
            raise ValueError(f"{type(strategy.model).__name__} has a head per task label; one head is accepted")

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Copy the teacher, once something was learnt: what has grown by now are outputs that it isn't asked for."""
        if self.lwf.expcount:
            self.lwf.prev_model = self._copy(strategy.model)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the distillation to the loss."""
        with autocast_of(strategy):
            super().before_backward(strategy, **kwargs)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The classes of the experience are distilled from now on."""
        known = self.lwf.prev_classes_by_task.get(0, [])
        # sorted: the order of the units decides the last bits of their sum; Avalanche reads the entry of label 0
        self.lwf.prev_classes_by_task = {0: sorted({*known, *experience_classes(strategy.experience)})}
        self.lwf.expcount += 1
        self.lwf.prev_model = self._pending = None

    def _copy(self, model: nn.Module) -> nn.Module:
        teacher = copy.deepcopy(model).requires_grad_(False).train(self.teacher == "training")
        for parameter in teacher.parameters():
            parameter.grad = None
        return teacher

    def state_dict(self) -> dict[str, Any]:
        """Teacher, if there is one, and the classes that it is asked for."""
        model = self.lwf.prev_model
        teacher = self._pending if model is None else model.state_dict()
        return {
            "teacher": None if teacher is None else {name: t.detach() for name, t in teacher.items()},
            "classes": list(self.lwf.prev_classes_by_task.get(0, [])),
            "experiences": self.lwf.expcount,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.lwf.expcount = int(state["experiences"])
        self.lwf.prev_classes_by_task = {0: list(state["classes"])} if self.lwf.expcount else {}
        self._pending = state["teacher"]
        if self._pending is None:
            self.lwf.prev_model = None
        elif self.lwf.prev_model is not None:
            self.lwf.prev_model.load_state_dict(self._pending)
            self._pending = None


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


__all__ = ["ResumableEWCPlugin", "ResumableLwFPlugin", "autocast_of"]
