"""The small-image ResNet-18 of the continual-learning literature, registered with timm as ``resnet18_cifar``.

What: timm's ``ResNet`` whose stem is one 3x3 convolution of stride 1 without a max-pool, so that 32x32 pixels enter the
stages at full resolution and leave them as 4x4 (the ImageNet stem would leave 1x1). It is the network of the protocols
on sequential CIFAR-10, CIFAR-100 and, at 64x64 pixels, TinyImageNet (divyam3897/UCL, ``models/backbones/ResNet18.py``).

11,168,832 parameters without the classifier, features of 512, no weights shipped. Cost: 0.56 billion
multiply-additions per image of 32x32 pixels, four times that at 64x64.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ["SmallImageResNet", "resnet18_cifar"]

_STEM_SHRINK = 4  # timm's stem: a convolution of stride 2 and a max-pool of stride 2
_STEM_OPTIONS = ("stem_type", "stem_width", "replace_stem_pool")


class SmallImageResNet(ResNet):
    """timm's ``ResNet`` with ``conv1`` 3x3 of stride 1 and padding 1, and nothing in the place of ``maxpool``.

    Names of modules and parameters are timm's, and so is the initialisation: every convolution, the stem too, normal
    with the variance of Kaiming in fan-out mode; the last BatchNorm weight of each residual branch zero. UCL's code
    starts that one at 1: ``zero_init_last=False``.

    :param kwargs: of ``timm.models.resnet.ResNet``: ``block``, ``layers``, ``num_classes``, ``in_chans``,
        ``global_pool``, ``channels``, ``drop_rate``, ``drop_path_rate``, ``zero_init_last``, ... ``output_stride``
        stays timm's figure, four times the true one here.
    :raises ValueError: ``stem_type``, ``stem_width`` or ``replace_stem_pool``: the stem is fixed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if refused := [name for name in _STEM_OPTIONS if name in kwargs]:
            given = ", ".join(f"{name}={kwargs[name]!r}" for name in refused)
            raise ValueError(f"{given}: the stem is fixed, a 3x3 convolution of stride 1 without pooling")
        super().__init__(*args, **kwargs)
        own: Any = self  # timm declares types for its own stems only
        old = own.conv1
        place = {"device": old.weight.device, "dtype": old.weight.dtype}
        own.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False, **place)
        nn.init.kaiming_normal_(own.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's init_weights
        own.maxpool = nn.Identity()
        for info in own.feature_info:  # read by features_only=True
            info["reduction"] = max(info["reduction"] // _STEM_SHRINK, 1)


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": {
            "num_classes": 0,  # no weights, so no classifier that belongs to them
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            # CIFAR-10's, as UCL's code has them for every data set (augmentations/eval_aug.py)
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2615),
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-18 for images (B, 3, H, W) of 32x32 or 64x64 pixels (any size from 8 on), features of 512."""
    fixed = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build_model_with_cfg(SmallImageResNet, "resnet18_cifar", pretrained, **{**fixed, **kwargs})
