"""DaViT: dual attention, to the tokens of a window and to the channels of a group in turn (arXiv:2204.03645),
and the image towers of Florence-2 (arXiv:2311.06242)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.attention import ChannelAttention, WindowAttention
from zoo.attention.layers import Convolution
from zoo.layers.backbone import Backbone, Blocks, drop_path_rates, init_as_published
from zoo.layers.mlp import Mlp
from zoo.registry import register_family
from zoo.weights.convert.davit import to_timm

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class DaViTConfig:
    """Dims in channels, depths in dual blocks, window_size and down_kernel_size in tokens, sizes in pixels.

    `channel_version` is that of `ChannelAttention`. With `named_blocks` the keys say spatial_block and
    channel_block where they otherwise count.
    """

    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (1, 1, 3, 1)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    down_kernel_size: int = 2
    channel_version: int = 1
    named_blocks: bool = False
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.95


class ConvPosition(nn.Module):
    """A depthwise 3x3 convolution around a residual, which tells tokens where they are; [B, Y, X, C]."""

    def __init__(self, dim: int, **factory: object) -> None:
        super().__init__()
        self.proj = Convolution(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Block(nn.Module):
    """Position, attention, position, MLP, each around a residual; [B, Y, X, C] in and out."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: object,
    ) -> None:
        super().__init__()
        self.cpe1 = ConvPosition(dim, **factory)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.attn = attn
        self.cpe2 = ConvPosition(dim, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """A 7x7 convolution of stride 4, the image padded at the bottom and right to whole steps, then a norm."""

    def __init__(self, in_chans: int, dim: int, **factory: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **factory)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A norm, then a convolution of stride 2; an even kernel sees no padding but what it needs to fit."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, **factory: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        padding = kernel_size // 2 if kernel_size % 2 else 0
        self.conv = Convolution(dim, out_dim, kernel_size, stride=2, padding=padding, **factory)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        x = self.norm(x)
        side = self.conv.kernel_size[0]
        if side % 2 == 0:
            x = F.pad(x, (0, 0, 0, max(columns % 2, side - columns), 0, max(rows % 2, side - rows)))
        return self.conv(x)


class Stage(nn.Module):
    """The step to a resolution, an identity in the first stage, and the dual blocks there."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] of the stage before to [B, Y, X, C] of this one."""
        return self.blocks(self.downsample(x))


class DaViT(Backbone):
    """Dual attention transformer: every dual block is one of window attention and one of channel attention.

    Source: Ding et al. 2022 (arXiv:2204.03645) Sec. 3, Table 1; Florence-2's towers: Xiao et al. 2023
    (arXiv:2311.06242) Sec. 4.
    """

    attention_fields = ("window_size", "channel_version")
    norm_after_pool = True
    norm_name = "head.norm"
    head_name = "head.fc"

    def __init__(
        self,
        cfg: DaViTConfig,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        names = ("spatial_block", "channel_block") if cfg.named_blocks else ("0", "1")
        rates = drop_path_rates(drop_path_rate, [2 * depth for depth in cfg.depths])
        self.stem = Stem(in_chans, cfg.dims[0], **factory)
        stages = []
        for i, (dim, heads) in enumerate(zip(cfg.dims, cfg.num_heads, strict=True)):
            common = {"qkv_bias": cfg.qkv_bias, "proj_drop": proj_drop_rate, **factory}
            blocks = []
            for j in range(cfg.depths[i]):
                attention = (
                    WindowAttention(dim, heads, window_size=cfg.window_size, rel_pos_bias=False, **common),
                    ChannelAttention(dim, heads, version=cfg.channel_version, **common),
                )
                dual = nn.Sequential()
                for name, attn, rate in zip(names, attention, rates[i][2 * j : 2 * j + 2], strict=True):
                    block = Block(
                        dim,
                        attn,
                        mlp_ratio=cfg.mlp_ratio,
                        proj_drop=proj_drop_rate,
                        drop_path=rate,
                        **factory,
                    )
                    dual.add_module(name, block)
                blocks.append(dual)
            step = Downsample(cfg.dims[i - 1], dim, cfg.down_kernel_size, **factory) if i else nn.Identity()
            stages.append(Stage(step, blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(cfg.dims[-1], eps=LAYER_NORM_EPS, **factory)})
        self.add_head(
            cfg.dims,
            [4 * 2**i for i in range(len(cfg.dims))],
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self.apply(init_as_published)

    @property
    def stem(self) -> nn.Module:
        """Image [B, C, height, width] to the first token map [B, Y, X, C]."""
        return self._modules["stem"]

    @staticmethod
    def filter_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Accept timm's files, the published ones, and Florence-2's image towers."""
        return to_timm(state)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        block = r"^stages\.(\d+)\.blocks\.(\d+)\."
        layers = [
            (r"^stages\.(\d+)\.downsample", (0, 0)),
            (rf"{block}(?:0|spatial_block)\.", (0,)),
            (rf"{block}(?:1|channel_block)\.", (1,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else layers}

    @staticmethod
    def default_cfg(cfg: DaViTConfig) -> dict[str, object]:
        """What timm wants to know of a row."""
        side = -(-cfg.input_size // (4 * 2 ** (len(cfg.dims) - 1)))
        return {"pool_size": (side, side), "first_conv": "stem.conv", "classifier": "head.fc"}

    @staticmethod
    def default_features(cfg: DaViTConfig) -> tuple[int, ...]:
        """The stages that `features_only` returns: all."""
        return tuple(range(len(cfg.dims)))


def _row(dim: int, depths: tuple[int, ...], **other: object) -> DaViTConfig:
    """Four stages of doubling width with 32 channels in a head."""
    dims = tuple(dim * 2**i for i in range(4))
    return DaViTConfig(dims=dims, depths=depths, num_heads=tuple(d // 32 for d in dims), **other)


_FLORENCE = {
    "window_size": 12,
    "down_kernel_size": 3,
    "channel_version": 2,
    "named_blocks": True,
    "input_size": 768,
    "num_classes": 0,
}

ROWS = {
    "davit_tiny": _row(96, (1, 1, 3, 1)),
    "davit_small": _row(96, (1, 1, 9, 1)),
    "davit_base": _row(128, (1, 1, 9, 1)),
    "davit_large": _row(192, (1, 1, 9, 1)),
    "davit_large_window12_384": _row(192, (1, 1, 9, 1), window_size=12, input_size=384),
    "davit_huge": _row(256, (1, 1, 9, 1)),
    "davit_giant": _row(384, (1, 1, 12, 3)),
    # The image towers of Florence-2 base and large: no classifier, and without weights for the last norm.
    "davit_base_fl": _row(128, (1, 1, 9, 1), **_FLORENCE),
    "davit_huge_fl": _row(256, (1, 1, 9, 1), **_FLORENCE),
    # For handwritten digits, tests and teaching: 8 x 8, 4 x 4 and 2 x 2 tokens.
    "davit_digits": DaViTConfig(
        dims=(20, 40, 80),
        depths=(1, 1, 1),
        num_heads=(2, 4, 8),
        window_size=4,
        mlp_ratio=2.0,
        input_size=32,
        num_classes=10,
        crop_pct=1.0,
    ),
}

register_family(DaViT, ROWS, paper="arXiv:2204.03645", attention="window and channel")
