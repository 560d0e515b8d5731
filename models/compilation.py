"""``torch.compile`` for the backbone of a model, in place; the classifier stays outside.

``torch.compile(model)`` doesn't suit a continual learner: the compiled model hides its type from Avalanche, the names
of its parameters change, and every experience that lets the classifier grow compiles all of it again. Here the part
before the classifier is compiled inside the model: names, state dict and checkpoints stay, a copy (``copy.deepcopy``,
pickle) is an ordinary model that isn't compiled, and growth costs nothing.

The number of images is a symbol in the compiled code, so a smaller last batch runs the same graph. There are two graphs
in a run, one for training and one for evaluation (``torch.no_grad``). Torch makes a further one for a batch of a single
image, under ``torch.inference_mode``, and on a CPU for convolutions of fewer than 16 images. Compiled code can't call
hooks that come later: while there are hooks inside the backbone (the probes of block outputs), and inside transforms of
``torch.func``, it runs as if it had never been compiled.

Results differ from the plain model's by rounding, with ``backend="eager"`` not at all. Cost: compilation at the first
batch of each kind, seconds to minutes; about 15 microseconds per call of a ViT-B, most of it a look at its hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_firn.models.composed_linear import ComposedLoRALinear

__all__ = ["compile_backbone", "is_compiled"]


def compile_backbone(
    model: nn.Module,
    *,
    backend: str | Callable[..., Any] = "inductor",
    dynamic: bool | None = None,
    mode: str | None = None,
    fullgraph: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Compile what comes before the classifier, in place; the work is done at the first batch.

    :param model: with attributes ``backbone`` and ``head`` (:class:`~avalanche_firn.models.parts.FeatureClassifier`):
        its backbone; else a timm model: its ``forward_features``.
    :param backend: of :func:`torch.compile`, whose default this is.
    :param dynamic: None: the number of images is a symbol, all other sizes are constants. # our choice. True: all sizes
        are symbols. False: one graph per batch size, for data of a single one.
    :param mode: of :func:`torch.compile`; None: its default. :param fullgraph: likewise, an interruption is an error.
    :param options: of the backend.
    :raises ValueError: the model is compiled already, has composed LoRA layers, or has none of these parts.
    """
    if is_compiled(model):
        raise ValueError(f"{type(model).__name__} is compiled already; once is accepted")
    if any(isinstance(module, ComposedLoRALinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has composed LoRA layers, whose weights are merged and kept between calls; "
            "a model without them is accepted"
        )
    settings: dict[str, Any] = {"backend": backend, "dynamic": dynamic, "fullgraph": fullgraph}
    settings |= {"mode": mode} if mode is not None else {}
    settings |= {"options": dict(options)} if options is not None else {}
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and isinstance(getattr(model, "head", None), nn.Module):
        backbone.compile(**settings)
        compiled = backbone._compiled_call_impl
        assert compiled is not None
        # nn.Module leaves this attribute out of copies and pickles
        backbone._compiled_call_impl = _Compiled(backbone, "_call_impl", compiled, mark=dynamic is None)
    elif callable(features := getattr(model, "forward_features", None)):
        own = _Compiled(model, "forward_features", torch.compile(features, **settings), mark=dynamic is None)
        setattr(model, "forward_features", own)  # noqa: B010 (mypy takes attributes of modules for tensors)
    else:
        parts = [name for name, _ in model.named_children()]
        raise ValueError(
            f"{type(model).__name__} has the parts {parts}; attributes backbone and head, or a timm model with "
            "forward_features, are accepted"
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`compile_backbone` was called on the model (or something in it is compiled in another way)."""
    return any(
        isinstance(vars(module).get("forward_features"), _Compiled)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class _Compiled:
    """A compiled method of a module in the method's place; where it can't be used, the method itself."""

    def __init__(self, owner: nn.Module, name: str, compiled: Callable[..., Any], *, mark: bool) -> None:
        self.owner = owner
        self.name = name
        self.compiled = compiled
        self.mark = mark
        inside = [m for m in owner.modules() if m is not owner]
        # of the module itself torch calls hooks around this method, or (a compiled module) inside it
        inside += [owner] if name == "_call_impl" else []
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooks = [getattr(module, kind) for module in inside for kind in kinds]
        self.hooks = [found for found in hooks if not found]  # those that are there now are compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(self.hooks) or torch._C._functorch.maybe_current_level() is not None:
            return _plain_method(self.owner, self.name)(*args, **kwargs)
        if self.mark:
            for value in args:
                if isinstance(value, Tensor) and value.ndim:
                    torch._dynamo.maybe_mark_dynamic(value, 0)
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain_method(copy.deepcopy(self.owner, memo), self.name)

    def __reduce__(self) -> Any:
        return _plain_method, (self.owner, self.name)


def _plain_method(owner: nn.Module, name: str) -> Any:
    return MethodType(getattr(type(owner), name), owner)
