"""Mixed precision for any Avalanche SGD strategy: bf16 autocast, or fp16 autocast with loss scaling.

Forward pass and criterion run under autocast (the plugin wraps them on the strategy, so an exception never leaves
autocast on); plugins that add to the loss in ``before_backward`` compute outside it. Weights, optimizer, class
statistics and alignment stay in float32/float64. fp16 is for GPUs without bf16: gradients are unscaled before
``after_backward``, so clipping and other plugins see their true values.

On a CPU the backward pass of PyTorch's fused attention is slow in bf16 for short sequences: attention takes 1.2 to 2.8
times the time of plain matrix products at 17 to 145 tokens, 0.75 to 0.9 times at 197 (torch 2.14, one thread, heads of
64). Transformers with few patches therefore train with plain products there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FEW_PATCHES = 160  # our choice, measured: see above


class MixedPrecisionPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Run a strategy in mixed precision.

    :param precision: ``"bf16"``; ``"fp16"`` (autocast and ``torch.amp.GradScaler``); ``"fp32"`` (does nothing);
        ``"auto"``: bf16 on a GPU that computes in it, else fp16 on a GPU, else fp32.
    :param init_scale: first loss scale of fp16 (65536: the default of ``torch.amp.GradScaler``).
    :param attention: ``"auto"``: plain products while training in bf16 on a CPU, where timm's ``patch_embed`` makes at
        most 160 patches, else PyTorch's choice; ``"fused"``: always PyTorch's choice. They differ in rounding only.
    :raises ValueError: an unknown precision or attention.

    A step of fp16 with a non-finite gradient is skipped and the scale halved, as ``GradScaler`` does.
    """

    def __init__(
        self,
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        *,
        init_scale: float = 2.0**16,
        attention: Literal["auto", "fused"] = "auto",
    ) -> None:
        super().__init__()
        if precision not in ("auto", "fp32", *_DTYPES):
            raise ValueError(f"precision is {precision!r}; 'auto', 'bf16', 'fp16' or 'fp32' is accepted")
        if attention not in ("auto", "fused"):
            raise ValueError(f"attention is {attention!r}; 'auto' or 'fused' is accepted")
        self.precision = precision
        self.attention = attention
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
        plain = self.attention == "auto" and precision == "bf16" and strategy.device.type == "cpu"
        forward = self._with_plain_attention(strategy) if plain else strategy.forward
        strategy.forward = self._under_autocast(forward, strategy.device.type, _DTYPES[precision])
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

    @staticmethod
    def _with_plain_attention(strategy: Any) -> Callable[[], Any]:
        function = strategy.forward

        def wrapped() -> Any:
            # without a backward pass the fused one is the faster
            plain = torch.is_grad_enabled() and _has_few_patches(strategy.model)
            context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
            with context:
                return function()

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


def _has_few_patches(model: Any) -> bool:
    """Whether a module has a timm patch embedding, and none that makes more than 160 patches."""
    if not isinstance(model, nn.Module):  # Meta-ASB's model of weights that a sequence has changed
        return False
    found = [getattr(getattr(module, "patch_embed", None), "num_patches", None) for module in model.modules()]
    counts = [count for count in found if isinstance(count, int)]
    return bool(counts) and max(counts) <= _FEW_PATCHES


__all__ = ["MixedPrecisionPlugin"]
