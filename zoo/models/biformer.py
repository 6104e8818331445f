"""BiFormer (arXiv:2303.08810): bi-level routing attention in three stages, global attention in the last.

The STL rows are the paper's ablation: the same attention in Swin-T's layout, in both of its published forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.attention.bilevel import BilevelRoutingAttention, RaggedRoutingAttention
from zoo.attention.global_attention import GlobalAttention
from zoo.attention.layers import Convolution, Pointwise
from zoo.errors import ConfigError
from zoo.layers.backbone import Backbone, Blocks, drop_path_rates, init_as_published
from zoo.registry import register_family

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BiFormerConfig:
    """Dims in channels, depths in blocks, n_win in regions along either side of a map, input_size in pixels.

    `topks` holds how many regions a region attends to, stage by stage; None attends to the whole map. No
    weight depends on `n_win`: the published classifiers serve with 7, dense prediction with 8 or 16.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 8)  # the last stage has 8 heads at any width
    n_win: int = 7
    topks: tuple[int | None, ...] = (1, 4, 16, None)
    mlp_ratio: float = 3.0
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875


class Block(nn.Module):
    """A depthwise convolution, attention and MLP, each around a residual; [B, Y, X, C] in and out."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        pos_embed: bool,
        drop_path: float = 0.0,
        **factory: object,
    ) -> None:
        super().__init__()
        self.pos_embed = Convolution(dim, dim, 3, padding=1, groups=dim, **factory) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(Blocks):
    """Blocks at one resolution."""

    def __init__(self, index: int, blocks: Sequence[Block]) -> None:
        super().__init__(*blocks)
        self.index = index

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order they run."""
        return list(self)


class NamedStage(nn.Module):
    """Blocks at one resolution, one level down as `blocks`."""

    def __init__(self, index: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.index = index
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class BiFormer(Backbone):
    """Four stages with a convolutional stem and overlapping down-sampling; batch norms between them.

    Source: Zhu et al. 2023 (arXiv:2303.08810) Sec. 3.3, Table 1.
    """

    stage = Stage
    attention_fields = ("n_win", "topks")
    pos_embed = True  # a depthwise convolution before the attention of every block

    def __init__(
        self,
        cfg: BiFormerConfig,
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
        rates = drop_path_rates(drop_path_rate, cfg.depths)
        self.downsample_layers = nn.ModuleList(
            [
                self._stem(in_chans, cfg.dims[0], **factory),
                *(self._halve(a, b, **factory) for a, b in zip(cfg.dims, cfg.dims[1:], strict=False)),
            ]
        )
        self.stages = nn.ModuleList(
            self.stage(
                i,
                [
                    Block(
                        dim,
                        self._attention(cfg, i, proj_drop=proj_drop_rate, **factory),
                        self._mlp(dim, int(cfg.mlp_ratio * dim), proj_drop_rate, **factory),
                        pos_embed=self.pos_embed,
                        drop_path=rate,
                        **factory,
                    )
                    for rate in rates[i]
                ],
            )
            for i, dim in enumerate(cfg.dims)
        )
        self.norm = nn.BatchNorm2d(cfg.dims[-1], **factory)
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

    # What the layouts build differently; images and maps are channels first in the first two.

    @staticmethod
    def _stem(in_chans: int, dim: int, **factory: object) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(dim // 2, **factory),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(dim, **factory),
        )

    @staticmethod
    def _halve(dim: int, wider: int, **factory: object) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(dim, wider, 3, stride=2, padding=1, **factory), nn.BatchNorm2d(wider, **factory)
        )

    @staticmethod
    def _mlp(dim: int, hidden: int, drop: float, **factory: object) -> nn.Module:
        # Published files count the layers with one in second place that does nothing.
        layers = [nn.Linear(dim, hidden, **factory), nn.Identity(), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(hidden, dim, **factory), nn.Dropout(drop))

    @staticmethod
    def _attention(cfg: BiFormerConfig, i: int, **options: object) -> nn.Module:
        place = (cfg.dims[i], cfg.num_heads[i])
        if cfg.topks[i] is None:
            return GlobalAttention(*place, lepe_of="input", qkv_bias=False, **options)
        return BilevelRoutingAttention(*place, n_win=cfg.n_win, topk=cfg.topks[i], **options)

    # What Backbone asks for.

    def stem(self, x: Tensor) -> Tensor:
        return self.downsample_layers[0](x).permute(0, 2, 3, 1)

    def next_resolution(self, stage: nn.Module, x: Tensor) -> Tensor:
        return self.downsample_layers[stage.index + 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def last_norm(self, x: Tensor) -> Tensor:
        """The norm behind the last stage, which wants channels first."""
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.downsample_layers = self.downsample_layers[: len(self.stages)]
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        stem = r"^downsample_layers\.0"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:stages|downsample_layers)\.(\d+)"}
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    @staticmethod
    def default_cfg(cfg: BiFormerConfig) -> dict[str, object]:
        """What timm wants to know of a row."""
        side = -(-cfg.input_size // (4 * 2 ** (len(cfg.dims) - 1)))
        return {"pool_size": (side, side), "first_conv": "downsample_layers.0.0"}

    @staticmethod
    def default_features(cfg: BiFormerConfig) -> tuple[int, ...]:
        """The stages that `features_only` returns: all."""
        return tuple(range(len(cfg.dims)))


class BiFormerSTL(BiFormer):
    """BiFormer in Swin-T's layout: patches instead of overlapping convolutions, nothing before the attention.

    Source: Zhu et al. 2023 (arXiv:2303.08810) Sec. 4.4, Table 5.
    """

    stage = NamedStage
    pos_embed = False

    @staticmethod
    def _stem(in_chans: int, dim: int, **factory: object) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **factory), nn.BatchNorm2d(dim, **factory))

    @staticmethod
    def _halve(dim: int, wider: int, **factory: object) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(dim, **factory), nn.Conv2d(dim, wider, 2, stride=2, **factory))

    @staticmethod
    def _mlp(dim: int, hidden: int, drop: float, **factory: object) -> nn.Module:
        return nn.Sequential(
            nn.Linear(dim, hidden, **factory),
            nn.GELU(),
            nn.Linear(hidden, dim, **factory),
            nn.Dropout(drop),
        )

    def stem(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        least = self.feature_info[-1]["reduction"]
        if rows < least or columns < least:
            raise ConfigError(f"images must be at least {least} x {least}, found {rows} x {columns}")
        return super().stem(x)

    @staticmethod
    def default_cfg(cfg: BiFormerConfig) -> dict[str, object]:
        least = 4 * 2 ** (len(cfg.dims) - 1)
        side = cfg.input_size // least
        return {
            **BiFormer.default_cfg(cfg),
            "pool_size": (side, side),
            "min_input_size": (3, least, least),
        }


class BiFormerSTLRagged(BiFormerSTL):
    """BiFormer in Swin-T's layout with ragged regions; its files keep linear layers as 1 x 1 convolutions."""

    @staticmethod
    def _mlp(dim: int, hidden: int, drop: float, **factory: object) -> nn.Module:
        return nn.Sequential(
            Pointwise(dim, hidden, **factory),
            nn.GELU(),
            Pointwise(hidden, dim, **factory),
            nn.Dropout(drop),
        )

    @staticmethod
    def _attention(cfg: BiFormerConfig, i: int, **options: object) -> nn.Module:
        place = (cfg.dims[i], cfg.num_heads[i])
        if cfg.topks[i] is None:
            return GlobalAttention(*place, lepe_of="value", pointwise=True, qkv_bias=False, **options)
        return RaggedRoutingAttention(*place, n_win=cfg.n_win, topk=cfg.topks[i], **options)


_BASE = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 8)}
_STL = {**_BASE, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0}

BIFORMER_ROWS = {
    "biformer_tiny": BiFormerConfig(),
    "biformer_small": BiFormerConfig(depths=(4, 4, 18, 4)),
    "biformer_base": BiFormerConfig(**_BASE, depths=(4, 4, 18, 4)),
    # For handwritten digits, tests and teaching: 8 x 8, 4 x 4 and 2 x 2 tokens.
    "biformer_digits": BiFormerConfig(
        dims=(24, 48, 96),
        depths=(1, 2, 1),
        num_heads=(2, 4, 8),
        n_win=4,
        topks=(4, 4, None),
        mlp_ratio=2.0,
        input_size=32,
        num_classes=10,
        crop_pct=1.0,
    ),
}
_PAPER = {"paper": "arXiv:2303.08810", "attention": "bi-level routing"}

register_family(BiFormer, BIFORMER_ROWS, **_PAPER)
register_family(BiFormerSTL, {"biformer_stl": BiFormerConfig(**_STL)}, **_PAPER)
register_family(BiFormerSTLRagged, {"biformer_stl_nchw": BiFormerConfig(**_STL)}, **_PAPER)
