"""The papers' small convolutional networks, registered with timm, and Co2L's projector.

``digit_convnet``, for Co2L's rotated MNIST: two 5x5 convolutions with ReLU and pooling, then one hidden layer whose 500
values are the features; sizes from the code released with Co2L (chaht01/Co2L, ``networks/mlp.py``; paper arXiv
2106.14413). Its ResNet for CIFAR-10 and TinyImageNet is ``resnet18_cifar``. A contrastive loss is computed on the
output of :class:`ProjectionHead` and never on the features; a classifier is trained on the features, never on that.
Its cost: 426,070 parameters and 2.3 million multiply-additions per image; the projectors have 328,320 parameters behind
``resnet18_cifar`` and 501,000 behind this network.

``convnet_28`` and ``convnet_84``, the networks of the zapping papers (arXiv 2310.07996 and 2507.01559) for Omniglot and
for natural images: three or four blocks of 3x3 convolution, instance norm, ReLU and pooling, and a linear classifier on
the flattened last map. Sizes and initialisation are those of the released code; the width is an option here, and so
are the biases of the convolutions, which have no effect (see :class:`InstanceNormConvNet`).
Their cost at width 256: 1,184,256 and 1,779,456 parameters without the classifier, 78 million and 1.4 billion
multiply-additions per image; at width 32 1.4 and 27 million.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DigitConvNet", "InstanceNormConvNet", "ProjectionHead", "convnet_28", "convnet_84", "digit_convnet"]

_EDGE = 28  # pixels; 28 -> 24 -> 12 -> 8 -> 4 through convolution, pooling, convolution, pooling
_CHANNELS = (20, 50)
_FLAT = _CHANNELS[1] * 4 * 4
_WIDTH = 256  # arXiv 2310.07996, released code: num_filters of every configuration


class _Plan(NamedTuple):
    """What the edge of the images decides, from the released code of arXiv 2310.07996."""

    pools: tuple[bool, ...]  # one entry per block
    padding: int
    map_edge: int  # of the last map
    channels: int  # of the images


_PLANS = {
    28: _Plan((True, True, False), 0, 3, 1),  # 28 -> 26 -> 13 -> 11 -> 5 -> 3
    84: _Plan((True, True, True, True), 1, 5, 3),  # 84 -> 42 -> 21 -> 10 -> 5
}


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


class _ConvBlock(nn.Module):
    """3x3 convolution, instance norm with scale and shift, ReLU, and a 2x2 maximum where ``pool`` is set."""

    def __init__(self, in_chans: int, width: int, *, padding: int, pool: bool, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3, padding=padding, bias=bias)
        self.norm = nn.InstanceNorm2d(width, affine=True)  # no running statistics: training equals evaluation
        self.pool = pool
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.conv(x)
        # a group per channel is the instance norm, in half the time of torch's own on a CPU
        x = functional.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps).relu()
        if not self.pool:
            return x
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return _pooled(x)
        return functional.max_pool2d(x, 2)


def _pooled(x: Tensor) -> Tensor:
    """``max_pool2d(x, 2)`` by slices: several times faster on a CPU, but slower once gradients are needed."""
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    x = torch.maximum(x[..., :height:2, :], x[..., 1:height:2, :])
    return torch.maximum(x[..., :width:2], x[..., 1:width:2])


class InstanceNormConvNet(nn.Module):
    """The zapping papers' convnet: blocks of convolution, instance norm, ReLU and pooling, then ``fc``.

    Convolutions start normal with standard deviation ``sqrt(2 / fan_in)``, the rest with torch's own initialisation.
    Training and evaluation mode give the same values, for one image as for a batch.

    :param edge: height and width of the images in pixels: 28 (three blocks without padding, pooling in the first two,
        features ``9 * width``) or 84 (four padded blocks, pooling in each, features ``25 * width``).
    :param width: channels of every block. 256: released code; less is much cheaper.
    :param num_classes: outputs of the classifier ``fc``; 0 (default: no weights are shipped) leaves it out.
    :param in_chans: channels of the images. None: 1 for 28 pixels and 3 for 84, as in the released code.
    :param dead_biases: whether the convolutions have biases, as in the released code. The instance norm subtracts
        them again, so they have no effect and no true gradient, but optimisers such as Adam turn the rounding noise of
        their gradient into movement (:meth:`dead_parameters`). False leaves them out: the same function, fewer
        parameters.
    :raises ValueError: an edge other than these two, a number out of range; in ``forward`` images that aren't
        ``(B, in_chans, edge, edge)``.

    Example::

        >>> model = InstanceNormConvNet(28, width=32, num_classes=1000)
        >>> model(torch.rand(2, 1, 28, 28)).shape, model.num_features
        (torch.Size([2, 1000]), 288)
    """

    def __init__(
        self,
        edge: int = 28,
        *,
        width: int = _WIDTH,
        num_classes: int = 0,
        in_chans: int | None = None,
        dead_biases: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(edge, bool) or edge not in _PLANS:
            raise ValueError(f"edge is {edge!r}; {' or '.join(map(str, _PLANS))} pixels are accepted")
        if not isinstance(dead_biases, bool):
            raise ValueError(f"dead_biases is {dead_biases!r}; True or False is accepted")
        plan = _PLANS[edge]
        self.edge = edge
        self.width = _whole("width", width, 1)
        self.in_chans = _whole("in_chans", plan.channels if in_chans is None else in_chans, 1)
        self.num_features = self.head_hidden_size = width * plan.map_edge**2
        inputs = (self.in_chans, *(width for _ in plan.pools[1:]))
        self.blocks = nn.Sequential(
            *(
                _ConvBlock(n, width, padding=plan.padding, pool=pool, bias=dead_biases)
                for n, pool in zip(inputs, plan.pools, strict=True)
            )
        )
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def dead_parameters(self) -> list[str]:
        """Names of the parameters without effect on the output, as in ``named_parameters()``: the convolutions' biases.

        Leave them out of distances, of principal components and of comparisons of optimisers: only noise moves them.
        Empty with ``dead_biases=False``.
        """
        return [f"blocks.{name}" for name, _ in self.blocks.named_parameters() if name.endswith("conv.bias")]

    def get_classifier(self) -> nn.Module:
        """The classifier, ``nn.Identity`` without one."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` outputs, none for 0; ``global_pool``, timm's, has no meaning here."""
        self.num_classes = _whole("num_classes", num_classes, 0)
        place = next(self.blocks.parameters())
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=place.device, dtype=place.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, edge, edge)`` float -> features ``(B, num_features)``, channel by channel, >= 0."""
        if x.shape[1:] != (self.in_chans, self.edge, self.edge):
            raise ValueError(
                f"x has the shape {tuple(x.shape)}; this network takes (B, {self.in_chans}, {self.edge}, {self.edge})"
            )
        return self.blocks(x).flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``(B, F)`` -> logits ``(B, num_classes)``; the features themselves with ``pre_logits``."""
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, edge, edge)`` float -> logits ``(B, num_classes)``, or features without ``fc``."""
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
        },
        "convnet_28": {
            "num_classes": 0,
            "input_size": (1, 28, 28),
            "crop_pct": 1.0,
            "interpolation": "lanczos",
            "mean": (0.0,),  # released code of arXiv 2310.07996: the pixels of characters stay at 0..1
            "std": (1.0,),
            "first_conv": "blocks.0.conv",
            "classifier": "fc",
        },
        "convnet_84": {
            "num_classes": 0,
            "input_size": (3, 84, 84),
            "crop_pct": 1.0,
            "interpolation": "lanczos",
            "mean": (0.485, 0.456, 0.406),  # ImageNet's, as released for mini-ImageNet; OmnImage has figures of its own
            "std": (0.229, 0.224, 0.225),
            "first_conv": "blocks.0.conv",
            "classifier": "fc",
        },
    }
)


@register_model
def digit_convnet(pretrained: bool = False, **kwargs: Any) -> DigitConvNet:
    """Co2L's network for digits: images (B, 1, 28, 28), features of 500, no weights shipped."""
    return build_model_with_cfg(DigitConvNet, "digit_convnet", pretrained, **kwargs)


@register_model
def convnet_28(pretrained: bool = False, **kwargs: Any) -> InstanceNormConvNet:
    """The zapping papers' network for characters: images (B, 1, 28, 28), features of 9 x width, no weights shipped."""
    return build_model_with_cfg(InstanceNormConvNet, "convnet_28", pretrained, edge=28, **kwargs)


@register_model
def convnet_84(pretrained: bool = False, **kwargs: Any) -> InstanceNormConvNet:
    """The zapping papers' network for colour: images (B, 3, 84, 84), features of 25 x width, no weights shipped."""
    return build_model_with_cfg(InstanceNormConvNet, "convnet_84", pretrained, edge=84, **kwargs)
