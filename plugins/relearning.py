"""Steps on batches in which chosen classes are frequent, moving chosen parameters only: what may follow a zap.

The released code of arXiv 2310.07996 has this as an option, off in every configuration: after rows of the classifier
were redrawn, some steps bring them back before the layers below move. Images are drawn with replacement only where
there are too few; how the released code fills the other part of a batch is open, here it is any other class.

Cost: a forward pass of the whole model per step, gradients of the chosen parameters only, and one pass over the targets
of the experience per call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from avalanche_firn.models.parts import ModelParts
from avalanche_firn.plugins.probe_head import ParameterFilter
from avalanche_firn.plugins.random_state import private_random_state


def biased_batch(
    inside: Tensor, outside: Tensor, *, size: int, fraction: float, generator: torch.Generator
) -> list[int]:
    """Positions of a batch, the part from ``inside`` first.

    :param inside: ``(n,)`` int64, n > 0, positions of the frequent classes. :param outside: ``(m,)``, all others; with
        none the whole batch comes from ``inside``.
    :param fraction: of ``inside``, above 0 to 1; at least one sample, rounded to the nearest.
    :param generator: on the CPU.
    """
    count = min(size, max(1, int(size * fraction + 0.5))) if len(outside) else size
    parts = []
    for pool, wanted in ((inside, count), (outside, size - count)):
        if wanted > len(pool):
            drawn = torch.randint(len(pool), (wanted,), generator=generator)
        else:
            drawn = torch.randperm(len(pool), generator=generator)[:wanted]
        parts.append(pool[drawn])
    return [int(i) for i in torch.cat(parts).tolist()]


def relearn(
    strategy: Any,
    parts: ModelParts,
    classes: list[int],
    *,
    steps: int,
    fraction: float,
    chosen: ParameterFilter | None,
    generator: torch.Generator,
) -> Tensor:
    """Train the chosen parameters for some steps with the strategy's optimizer, forward pass and criterion.

    No hook runs: other plugins' losses, metrics, clocks and schedules see nothing of it. Modules without a chosen
    parameter are in evaluation mode meanwhile (BatchNorm statistics fixed, no dropout). The global random generators
    stay as they were; augmentation draws from private ones.

    :param classes: frequent in the batches, of ``strategy.train_mb_size`` samples of the current data set.
    :param chosen: ``(name, parameter) -> bool``; None: the classifier. Of these only trainable ones move.
    :param generator: on the CPU; decides all random numbers.
    :returns: the loss of every step ``(steps,)``, detached, on the device.
    :raises ValueError: no sample of these classes, or no trainable parameter chosen.
    """
    dataset = strategy.adapted_dataset
    targets = torch.tensor([int(t) for t in dataset.targets])
    hit = torch.isin(targets, torch.tensor(classes))
    inside, outside = hit.nonzero().flatten(), (~hit).nonzero().flatten()
    if not len(inside):
        raise ValueError(
            f"relearn_steps is {steps} and the experience has no sample of the zapped classes {classes[:10]}; 0 is "
            "accepted for classes without data"
        )
    named = [(n, p) for n, p in parts.model.named_parameters() if p.requires_grad]
    moved = {id(p) for n, p in named if (parts.is_head(n) if chosen is None else chosen(n, p))}
    if not moved:
        raise ValueError("relearn_parameters chooses no trainable parameter; at least one is needed")
    frozen = [p for _, p in named if id(p) not in moved]
    modes = {module: module.training for module in parts.model.modules()}
    current = strategy.mbatch, strategy.mb_output, strategy.loss
    collate = getattr(dataset, "collate_fn", None) or default_collate
    size = min(int(strategy.train_mb_size), len(dataset))
    losses = []
    with private_random_state(int(torch.randint(2**62, (1,), generator=generator))):
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for module in modes:
                if not any(id(p) in moved for p in module.parameters()):
                    module.eval()
            for _ in range(steps):
                places = biased_batch(inside, outside, size=size, fraction=fraction, generator=generator)
                strategy.mbatch = list(collate([dataset[i] for i in places]))
                strategy._unpack_minibatch()
                strategy.optimizer.zero_grad(set_to_none=True)  # parameters without gradient are not stepped
                strategy.mb_output = strategy.forward()
                strategy.loss = strategy.criterion()
                losses.append(strategy.loss.detach().mean())
                strategy.backward()
                strategy.optimizer_step()
            strategy.optimizer.zero_grad(set_to_none=True)
        finally:
            strategy.mbatch, strategy.mb_output, strategy.loss = current
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, mode in modes.items():
                module.training = mode
    return torch.stack(losses)


__all__ = ["biased_batch", "relearn"]
