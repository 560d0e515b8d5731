"""Small vision transformers for 32x32 images, registered with timm.

What: timm's ``VisionTransformer`` whose patch embedding is a stem of three 3x3 convolutions of stride 2 (in all
stride 8: 32x32 pixels give 4x4 tokens). Why the stem: on a few thousand small images a single 8x8 patch projection
stays at chance for epochs, while the convolutions learn from the first one.

============  =====  =====  =====  ============  =====================================================
name          width  depth  heads  parameters    weights
============  =====  =====  =====  ============  =====================================================
vit_firn_32   96     6      3      0.73 million  tag ``omniglot``, inside the package
vit_tin_32    192    6      3      2.9 million   none shipped; ``load_backbone(..., weights=FILE)``
============  =====  =====  =====  ============  =====================================================

Cost: about 900 training images a second for ``vit_firn_32`` on two CPU cores.
"""

from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["ConvStem", "checkpoint_filter_fn", "vit_firn_32", "vit_tin_32"]

WEIGHTS = Path(__file__).parent / "weights"
STRIDE = 8  # three convolutions of stride 2


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """``size`` as (height, width) in pixels; ValueError below one token."""
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(height, width) < STRIDE:
        raise ValueError(f"img_size={size!r}: the convolution stem needs at least {STRIDE}x{STRIDE} pixels")
    return height, width


class ConvStem(nn.Module):
    """Three 3x3 convolutions of stride 2, GroupNorm (8 groups) and GELU after the first two.

    Channels go ``in_chans -> embed_dim / 4 -> embed_dim / 2 -> embed_dim``. Any image size of at least 8 pixels works:
    an edge of n pixels gives ceil(n / 8) tokens. Takes the arguments of timm's ``PatchEmbed`` so that it can stand
    in for it.

    :param img_size: pixels, an int or (height, width).
    :param patch_size: must be 8, the stride of the stem; it is there for timm.
    :param in_chans: channels of the images.
    :param embed_dim: width of the tokens, a multiple of 32 (8 groups in a quarter of it).
    :raises ValueError: another patch size, a width that isn't a multiple of 32, images under 8 pixels, dynamic sizes.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 96,
        *,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if patch_size != STRIDE:
            raise ValueError(f"patch_size={patch_size!r}: the convolution stem has a fixed stride of {STRIDE}")
        if embed_dim % 32:
            raise ValueError(
                f"embed_dim={embed_dim!r} must be a multiple of 32: the stem has 8 groups in a quarter of it"
            )
        if dynamic_img_pad or not strict_img_size:
            raise ValueError("dynamic_img_size and dynamic_img_pad are not supported by the stem; pass img_size")
        place = {"device": device, "dtype": dtype}
        first, second = embed_dim // 4, embed_dim // 2
        self.patch_size = (STRIDE, STRIDE)
        self._set_size(img_size)
        self.net = nn.Sequential(
            nn.Conv2d(in_chans, first, 3, 2, 1, bias=bias, **place),
            nn.GroupNorm(8, first, **place),
            nn.GELU(),
            nn.Conv2d(first, second, 3, 2, 1, bias=bias, **place),
            nn.GroupNorm(8, second, **place),
            nn.GELU(),
            nn.Conv2d(second, embed_dim, 3, 2, 1, bias=bias, **place),
        )

    def _set_size(self, img_size: int | tuple[int, int]) -> None:
        self.img_size = _pair(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the accepted image size (timm resamples the position embedding); the stride stays 8."""
        if patch_size is not None and patch_size not in (STRIDE, self.patch_size):
            raise ValueError(f"patch_size={patch_size!r}: the convolution stem has a fixed stride of {STRIDE}")
        if img_size is not None:
            self._set_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token along an edge, as timm asks for it."""
        return STRIDE if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (rows, columns) of an image of ``img_size`` pixels."""
        return -(-img_size[0] // STRIDE), -(-img_size[1] // STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (B, C, H, W) float -> tokens (B, N, embed_dim) with N = ceil(H / 8) * ceil(W / 8)."""
        if x.shape[-2:] != self.img_size:
            raise ValueError(f"images of {tuple(x.shape[-2:])} pixels given to a model of img_size={self.img_size}")
        return self.net(x).flatten(2).transpose(1, 2)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Resample the position embedding (1, 1 + tokens, width) of a file to the token grid of ``model``.

    Only square grids of the right width are resampled; everything else is left for the strict loading to refuse.
    """
    old, new = state_dict.get("pos_embed"), model.pos_embed
    if old is None or new is None or old.ndim != 3 or old.shape[-1] != new.shape[-1]:
        return state_dict
    side = round((old.shape[1] - 1) ** 0.5)
    if side * side != old.shape[1] - 1 or (side, side) == tuple(model.patch_embed.grid_size):
        return state_dict
    resampled = resample_abs_pos_embed(
        old.float(), new_size=list(model.patch_embed.grid_size), old_size=[side, side], num_prefix_tokens=1
    )
    return {**state_dict, "pos_embed": resampled}


def _cfg(**values: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "first_conv": "patch_embed.net.0",
        "classifier": "head",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_firn_32.omniglot": _cfg(
            file=str(WEIGHTS / "vit_firn_32_omniglot.safetensors"),
            num_classes=242,
            # Strokes bright on dark, values 0..1; 0.5 and 0.5 map them to -1..1 (our choice).
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bilinear",
            license="mit",
            description="Omniglot characters (small background sets), see weights/vit_firn_32_omniglot.json",
        ),
        "vit_tin_32": _cfg(
            num_classes=0,
            mean=(0.48, 0.45, 0.40),  # what its weights file was trained with
            std=(0.277, 0.269, 0.282),
            interpolation="box",
        ),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    if kwargs.get("dynamic_img_size"):
        raise ValueError(f"{variant}: dynamic_img_size is not supported by the convolution stem; pass img_size")
    fixed = {"patch_size": STRIDE, "embed_layer": ConvStem}
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**fixed, **kwargs},
    )


@register_model
def vit_firn_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """0.7 million parameters, features of 96; ``vit_firn_32.omniglot`` comes with the package."""
    return _create("vit_firn_32", pretrained, **{"embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs})


@register_model
def vit_tin_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """2.9 million parameters, features of 192; no shipped weights, for natural images."""
    return _create("vit_tin_32", pretrained, **{"embed_dim": 192, "depth": 6, "num_heads": 3, **kwargs})
