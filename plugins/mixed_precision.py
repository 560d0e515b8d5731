"""Mixed precision for any Avalanche SGD strategy: bf16 autocast, or fp16 autocast with loss scaling.

Forward pass and criterion run under autocast (the plugin wraps them on the strategy, so an exception never leaves
autocast on); plugins that add to the loss in ``before_backward`` compute outside it. Weights, optimizer, class
statistics and alignment stay in float32/float64. fp16 is for GPUs without bf16: gradients are unscaled before
``after_backward``, so clipping and other plugins see their true values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from avalanche.training.plugins import SupervisedPlugin

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MixedPrecisionPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Run a strategy in mixed precision.

    :param precision: ``"bf16"``; ``"fp16"`` (autocast and ``torch.amp.GradScaler``); ``"fp32"`` (does nothing);
        ``"auto"``: bf16 on a GPU that computes in it, else fp16 on a GPU, else fp32.
    :param init_scale: first loss scale of fp16 (65536: the default of ``torch.amp.GradScaler``).
    :raises ValueError: an unknown precision.

    A step of fp16 with a non-finite gradient is skipped and the scale halved, as ``GradScaler`` does.
    """

    def __init__(
        self, precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto", *, init_scale: float = 2.0**16
    ) -> None:
        super().__init__()
        if precision not in ("auto", "fp32", *_DTYPES):
            raise ValueError(f"precision is {precision!r}; 'auto', 'bf16', 'fp16' or 'fp32' is accepted")
        self.precision = precision
        self.init_scale = init_scale
        self.scaler: torch.amp.GradScaler | None = None
        self._pending_state: dict[str, Any] | None = None

    def resolve(self, device: torch.device) -> str:
        """The precision in use on a device: ``"bf16"``, ``"fp16"`` or ``"fp32"``."""
        if self.precision != "auto":
            return self.precision
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Wrap the strategy's forward pass and criterion (once)."""
        self._install(strategy)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation runs in the same precision."""
        self._install(strategy)

    def _install(self, strategy: Any) -> None:
        precision = self.resolve(strategy.device)
        if precision == "fp32" or getattr(strategy.forward, "autocasts", None) is self:
            return
        strategy.forward = self._under_autocast(strategy.forward, strategy.device.type, _DTYPES[precision])
        strategy.criterion = self._under_autocast(strategy.criterion, strategy.device.type, _DTYPES[precision])
        if precision == "fp16":
            self.scaler = torch.amp.GradScaler(strategy.device.type, init_scale=self.init_scale)
            if self._pending_state is not None:
                self.scaler.load_state_dict(self._pending_state)
            strategy.backward = lambda: self._backward(strategy)
            strategy.optimizer_step = lambda: self._step(strategy)

    def _under_autocast(self, function: Callable[[], Any], device_type: str, dtype: torch.dtype) -> Callable[[], Any]:
        def wrapped() -> Any:
            with torch.autocast(device_type, dtype):
                return function()

        wrapped.autocasts = self  # type: ignore[attr-defined]
        return wrapped

    def _backward(self, strategy: Any) -> None:
        """Scaled backward pass; the strategy keeps the true loss and gets true gradients."""
        assert self.scaler is not None
        self.scaler.scale(strategy.loss).backward(retain_graph=strategy.retain_graph)
        self.scaler.unscale_(strategy.optimizer)

    def _step(self, strategy: Any) -> None:
        assert self.scaler is not None
        self.scaler.step(strategy.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Loss scale and its counters (empty for bf16 and fp32)."""
        return {"scaler": None if self.scaler is None else self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loss scale."""
        if state["scaler"] is not None:
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            else:
                self._pending_state = state["scaler"]


__all__ = ["MixedPrecisionPlugin"]
