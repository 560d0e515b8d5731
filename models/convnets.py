"""The digit network of Co2L's rotated MNIST, registered with timm as ``digit_convnet``, and the projector on top.

What: two 5x5 convolutions with ReLU and pooling, then one hidden layer whose 500 values are the features; sizes from
the code released with Co2L (chaht01/Co2L, ``networks/mlp.py``; paper arXiv 2106.14413). Its ResNet for CIFAR-10 and
TinyImageNet is ``resnet18_cifar``. A contrastive loss is computed on the output of :class:`ProjectionHead` and never
on the features; a classifier is trained on the features and never on that output.

Cost: 426,070 parameters and 2.3 million multiply-additions per image; the projectors have 328,320 parameters behind
``resnet18_cifar`` and 501,000 behind this network.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DigitConvNet", "ProjectionHead", "digit_convnet"]

_EDGE = 28  # pixels; 28 -> 24 -> 12 -> 8 -> 4 through convolution, pooling, convolution, pooling
_CHANNELS = (20, 50)
_FLAT = _CHANNELS[1] * 4 * 4


class DigitConvNet(nn.Module):
    """Convolution 20, pool, convolution 50, pool, hidden layer 500, each with ReLU (module names: see the code).

    Starts with torch's own initialisation of its layers.

    :param num_classes: outputs of the classifier ``fc``; 0 (default: no weights are shipped) leaves it out.
    :param in_chans: channels of the images; 1 in Co2L's code.
    :raises ValueError: a number out of range; in ``forward`` images that aren't ``(B, in_chans, 28, 28)``.

    ``num_features`` is 500, with and without a classifier.
    """

    def __init__(self, num_classes: int = 0, in_chans: int = 1) -> None:
        super().__init__()
        self.in_chans = _whole("in_chans", in_chans, 1)
        self.num_features = self.head_hidden_size = 500
        self.conv1 = nn.Conv2d(in_chans, _CHANNELS[0], 5)
        self.conv2 = nn.Conv2d(*_CHANNELS, 5)
        self.hidden = nn.Linear(_FLAT, self.num_features)
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The classifier, ``nn.Identity`` without one."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` outputs, none for 0; ``global_pool``, timm's, has no meaning here."""
        self.num_classes = _whole("num_classes", num_classes, 0)
        place = self.hidden.weight
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=place.device, dtype=place.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, 28, 28)`` float -> features ``(B, 500)``, none below 0."""
        if x.shape[1:] != (self.in_chans, _EDGE, _EDGE):
            raise ValueError(
                f"x has the shape {tuple(x.shape)}; digit_convnet takes (B, {self.in_chans}, {_EDGE}, {_EDGE})"
            )
        x = functional.max_pool2d(self.conv1(x).relu(), 2)
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.hidden(x.flatten(1)).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(B, 500)`` -> logits ``(B, num_classes)``; the features themselves with ``pre_logits``."""
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, 28, 28)`` float -> logits ``(B, num_classes)``, or features ``(B, 500)``."""
        return self.forward_head(self.forward_features(x))


class ProjectionHead(nn.Module):
    """Linear, ReLU, linear: from features to the space of a contrastive loss. Nothing is normalised in here.

    :param in_features: width of the features, 512 behind ``resnet18_cifar``, 500 behind ``digit_convnet``.
    :param hidden_features: None (Co2L's code): as many as ``in_features``.
    :param out_features: width of the output. 128 in Co2L's code, but 500 for the digits.
    :raises ValueError: a width below 1.

    Example::

        >>> sum(p.numel() for p in ProjectionHead(512).parameters())
        328320
    """

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int = 128) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.in_features = _whole("in_features", in_features, 1)
        self.out_features = _whole("out_features", out_features, 1)
        self.hidden = nn.Linear(in_features, _whole("hidden_features", hidden, 1))
        self.output = nn.Linear(hidden, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """``features``: (B, in_features) float -> (B, out_features), of any length: divide by the norm outside."""
        return self.output(self.hidden(features).relu())


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; a whole number, at least {least}, is accepted")
    return value


default_cfgs = generate_default_cfgs(
    {
        "digit_convnet": {
            "num_classes": 0,  # no weights, so no classifier that belongs to them
            "input_size": (1, _EDGE, _EDGE),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.0,),  # Co2L's code leaves the pixels of digits at 0..1
            "std": (1.0,),
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


@register_model
def digit_convnet(pretrained: bool = False, **kwargs: Any) -> DigitConvNet:
    """Co2L's network for digits: images (B, 1, 28, 28), features of 500, no weights shipped."""
    return build_model_with_cfg(DigitConvNet, "digit_convnet", pretrained, **kwargs)
