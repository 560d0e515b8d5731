"""Adam's second moment beside the diagonal of the empirical Fisher information.

At batch size 1 the second moment of Adam is a running average of squared gradients of single samples, along the
trajectory: an estimate of the Fisher diagonal with a horizon of about 1 / (1 - beta2) samples (1000 by default), and so
a memory of the tasks that were trained last. With batches of B images it averages squares of *mean* gradients instead:
where these are mostly noise it is about the Fisher diagonal divided by B, and where they agree it isn't. This follows
from the update rule (our comparison; nothing on it was found in arXiv 2507.01559).

With weight decay inside the gradient (``Adam``, not ``AdamW``) the moment contains the decay too. Cost: one backward
pass per image and ``chunk_size`` gradients in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from avalanche_firn.evaluation.gradient_math import watched_parameters
from avalanche_firn.evaluation.probe_tasks import refuse_multi_task, whole
from avalanche_firn.models.parts import evaluation_mode
from avalanche_firn.plugins.random_state import private_random_state


@dataclass(frozen=True)
class MomentComparison:
    """How alike two non-negative vectors are: the second moment v and the Fisher diagonal f."""

    cosine: float
    """``v . f / (|v| |f|)``, 0 to 1; decided by the largest entries. NaN where one of them is 0."""
    log_correlation: float
    """Correlation of ``log v`` and ``log f`` over the entries where both are above 0; NaN where it isn't defined."""
    scale_ratio: float
    """``sum v / sum f``: 1 for the same scale, about 1 / B for noise in batches of B. NaN where ``sum f`` is 0."""
    per_parameter: dict[str, MomentComparison] = field(default_factory=dict)
    """The same for each parameter by its name; empty inside."""


def second_moment_vs_fisher(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    ignore: Iterable[str] = (),
    chunk_size: int = 16,
) -> MomentComparison:
    """Compare the bias-corrected second moment of an Adam with the empirical Fisher diagonal on some images.

    ``v = exp_avg_sq / (1 - beta2^step)`` and ``f`` = mean over the images of the squared gradient of the cross-entropy
    of the given label, one image at a time, in evaluation mode at the parameters as they are.

    Args:
        optimizer: one that keeps ``exp_avg_sq``: Adam, AdamW, NAdam, RAdam.
        model: from images to logits (B, C), without operations that ``torch.func.vmap`` can't batch.
        images: (N, ...) on the device of the model. labels: (N,) integers.
        ignore: names of parameters that are left out, see
            :func:`~avalanche_firn.evaluation.gradient_math.watched_parameters`.
        chunk_size: images whose gradients are held at once, ``chunk_size * P`` numbers; default 16, our choice.

    Returns:
        :class:`MomentComparison` over all parameters together and for each of them. Nothing is changed.

    Raises:
        ValueError: an optimizer without ``exp_avg_sq``, a parameter that it doesn't hold or has never stepped, no
            images, a multi-task model.
    """
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels: got {shapes}; accepted are (N, ...) and (N,) with N >= 1")
    refuse_multi_task(model, "the comparison of second moments")
    whole("chunk_size", chunk_size, 1)
    watched = watched_parameters(model, ignore)
    moments = _second_moments(optimizer, watched)
    fisher = _fisher_diagonal(model, watched, images, labels, chunk_size)
    rows = {name: (moments[name].reshape(-1), fisher[name].reshape(-1)) for name in watched}
    whole_v, whole_f = (torch.cat([row[side] for row in rows.values()]) for side in (0, 1))
    return MomentComparison(
        *_compare(whole_v, whole_f), {name: MomentComparison(*_compare(*row)) for name, row in rows.items()}
    )


def _second_moments(optimizer: torch.optim.Optimizer, watched: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Bias-corrected, float64 on the CPU, by name."""
    kind = type(optimizer).__name__
    kept = any("exp_avg_sq" in state for state in optimizer.state.values())
    if not kept and (optimizer.state or "betas" not in optimizer.defaults):
        raise ValueError(
            f"optimizer: {kind} keeps no exp_avg_sq; accepted are Adam, AdamW, NAdam, RAdam and their like"
        )
    beta = {id(p): group["betas"][1] for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, p in watched.items() if id(p) not in beta]:
        raise ValueError(f"optimizer: {kind} does not hold {missing}; accepted are its own parameters, see ignore")
    fresh = [name for name, p in watched.items() if "exp_avg_sq" not in optimizer.state.get(p, {})]
    if fresh:
        raise ValueError(f"optimizer: {kind} has never stepped {fresh}; accepted are stepped parameters, see ignore")
    found = {}
    for name, parameter in watched.items():
        state = optimizer.state[parameter]
        moment = state["exp_avg_sq"].detach().to("cpu", torch.float64)
        found[name] = moment / (1 - float(beta[id(parameter)]) ** float(state["step"]))
    return found


def _fisher_diagonal(
    model: nn.Module, watched: dict[str, nn.Parameter], images: Tensor, labels: Tensor, chunk: int
) -> dict[str, Tensor]:
    values = {name: parameter.detach() for name, parameter in watched.items()}
    other = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in values}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = functional_call(model, {**other, **parameters}, (image[None],))
        return functional.cross_entropy(output if output.dtype == torch.float64 else output.float(), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    sums: dict[str, Tensor] = {}
    device_type = images.device.type
    with private_random_state(), evaluation_mode(model), torch.autocast(device_type, enabled=False):
        for part, ids in zip(images.split(chunk), labels.split(chunk), strict=True):
            for name, gradient in per_sample(values, part, ids).items():
                squares = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(0)
                sums[name] = sums[name] + squares if name in sums else squares
    return {name: total.to("cpu", torch.float64) / len(labels) for name, total in sums.items()}


def _compare(v: Tensor, f: Tensor) -> tuple[float, float, float]:
    # Entries of 1e-20 have squares that float64 still holds; scaled by the largest entry nothing underflows.
    tops = [float(x.max()) if x.numel() else 0.0 for x in (v, f)]
    cosine = math.nan
    if min(tops) > 0:
        a, b = v / tops[0], f / tops[1]
        cosine = min(float(a @ b / (a.norm() * b.norm())), 1.0)  # NaN stays NaN in this order
    both = (v > 0) & (f > 0)
    correlation = math.nan
    if int(both.sum()) > 1:
        a, b = (x[both].log() for x in (v, f))
        a, b = a - a.mean(), b - b.mean()
        spread = float(a.norm() * b.norm())
        if spread > 1e-12 * len(a):  # else one of them is constant but for rounding
            correlation = min(max(float(a @ b) / spread, -1.0), 1.0)
    total = float(f.sum())
    return cosine, correlation, float(v.sum()) / total if total > 0 else math.nan


__all__ = ["MomentComparison", "second_moment_vs_fisher"]
