"""Whether a model can be trained on a single image: BatchNorm can't, where it sees one value per channel.

torch says so when the batch comes, which may be the last one of the last task. Here it is found before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_firn.plugins.random_state import private_random_state

__all__ = ["refuses_one"]


@torch.no_grad()
def refuses_one(model: nn.Module, image: Tensor) -> str | None:
    """Name of the BatchNorm layer that a single image fails at, in the modes that the model is in; None if none does.

    One forward pass, and none without a BatchNorm in training mode. Buffers and random generators stay as they are.

    :param image: ``(1, ...)``, on the device of the model.
    """
    norms = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    if not norms:
        return None
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    entered: list[str] = []
    handles = [norm.register_forward_pre_hook(lambda m, args: entered.append(norms[m])) for norm in norms]
    try:
        with private_random_state():
            model(image)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return entered[-1]
    finally:
        for handle in handles:
            handle.remove()
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return None
