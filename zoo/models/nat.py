"""Neighborhood Attention Transformers: NAT (arXiv:2204.07143), DiNAT and its Swin-like and isotropic forms
(arXiv:2209.15001).

Every family of this file is the same block around `NeighborhoodAttention`; they differ in the stem, in how
the map is halved between stages, and in the dilations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from zoo.attention import NeighborhoodAttention
from zoo.errors import ConfigError
from zoo.layers.backbone import Backbone, Stage, drop_path_rates, init_as_published, refuse_pyramid, run
from zoo.layers.patches import PatchMerging, PatchTokenizer
from zoo.registry import register_family
from zoo.weights.convert.nat import from_huggingface

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class NATConfig:
    """Dims in channels, depths in blocks, kernel_size and dilations in tokens, sizes in pixels.

    `dilations` holds one number for every block, stage by stage; "auto" gives every second block the largest
    dilation that fits its map, whatever the input size, and the others 1; None is 1 everywhere.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: tuple[tuple[int, ...], ...] | str | None = None
    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    qkv_bias: bool = True
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875


@dataclass(frozen=True, kw_only=True)
class IsotropicConfig:
    """One resolution throughout; dim in channels, depth in blocks, patch_size and input_size in pixels.

    `kernel_size` None attends globally, which fixes the map to input_size / patch_size.
    """

    dim: int = 384
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    kernel_size: int | None = 7
    dilations: tuple[int, ...] | None = None
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual; [B, Y, X, C] in and out."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int,
        dilation: int | str,
        mlp_ratio: float,
        qkv_bias: bool,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: object,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.attn = NeighborhoodAttention(
            dim,
            num_heads,
            kernel_size=kernel_size,
            dilation=dilation,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            **factory,
        )
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **factory))
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then a norm; quarter resolution."""

    def __init__(self, in_chans: int, dim: int, **factory: object) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory),
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 to twice the channels, then a norm."""

    def __init__(self, dim: int, **factory: object) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **factory)
        self.norm = nn.LayerNorm(2 * dim, eps=LAYER_NORM_EPS, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Backbone):
    """NAT and DiNAT: convolutional stem and down-sampling, four stages of neighborhood attention.

    Source: Hassani et al. 2023 (arXiv:2204.07143) Sec. 3.3, Table 1; Hassani & Shi 2022 (arXiv:2209.15001)
    Sec. 3.3.
    """

    stage_list = "levels"
    undecayed = ("rpb",)
    attention_fields = ("kernel_size", "dilations")
    tokenizer = ConvTokenizer
    downsample = ConvDownsample

    def __init__(
        self,
        cfg: NATConfig,
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
        refuse_pyramid(cfg.dims, cfg.num_heads)
        dilations = _dilations(cfg)
        rates = drop_path_rates(drop_path_rate, cfg.depths)
        self.patch_embed = self.tokenizer(in_chans, cfg.dims[0], **factory)
        stages = []
        for i, dim in enumerate(cfg.dims):
            blocks = [
                Block(
                    dim,
                    cfg.num_heads[i],
                    kernel_size=cfg.kernel_size,
                    dilation=dilations[i][j],
                    mlp_ratio=cfg.mlp_ratio,
                    qkv_bias=cfg.qkv_bias,
                    layer_scale=cfg.layer_scale,
                    proj_drop=proj_drop_rate,
                    drop_path=rates[i][j],
                    **factory,
                )
                for j in range(cfg.depths[i])
            ]
            last = i == len(cfg.dims) - 1
            stages.append(Stage(blocks, None if last else self.downsample(dim, **factory)))
        setattr(self, self.stage_list, nn.ModuleList(stages))
        self.norm = nn.LayerNorm(cfg.dims[-1], eps=LAYER_NORM_EPS, **factory)
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

    def stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    @staticmethod
    def filter_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Accept published files and Hugging Face's layout; drop what follows from the geometry."""
        state = from_huggingface(state)
        return {key: value for key, value in state.items() if not key.endswith(".relative_position_index")}

    @staticmethod
    def default_cfg(cfg: NATConfig) -> dict[str, object]:
        """What timm wants to know of a row."""
        side = -(-cfg.input_size // (4 * 2 ** (len(cfg.dims) - 1)))
        return {"pool_size": (side, side), "first_conv": "patch_embed.proj.0"}

    @staticmethod
    def default_features(cfg: NATConfig) -> tuple[int, ...]:
        """The stages that `features_only` returns: all."""
        return tuple(range(len(cfg.dims)))


class DiNATS(NAT):
    """DiNAT_s: Swin's stem and patch merging around alternating local and dilated neighborhood attention.

    Source: Hassani & Shi 2022 (arXiv:2209.15001) Sec. 4.
    """

    stage_list = "layers"
    tokenizer = PatchTokenizer
    downsample = PatchMerging

    @staticmethod
    def default_cfg(cfg: NATConfig) -> dict[str, object]:
        return {**NAT.default_cfg(cfg), "first_conv": "patch_embed.proj"}


class NATIsotropic(Backbone):
    """A plain transformer of one resolution, without class token or absolute positions.

    Source: Hassani & Shi 2022 (arXiv:2209.15001) Sec. 4, isotropic variants; ViT with relative positional
    bias is the case of a neighborhood as large as the map.
    """

    stage_list = "layers"  # every block is a stage
    undecayed = NAT.undecayed
    filter_checkpoint = staticmethod(NAT.filter_checkpoint)

    def __init__(
        self,
        cfg: IsotropicConfig,
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
        side = -(-cfg.input_size // cfg.patch_size)
        if cfg.kernel_size is None and side < 2:
            raise ConfigError(
                f"input_size must be above patch_size={cfg.patch_size} for a map of more than a token, "
                f"found {cfg.input_size}"
            )
        self.fixed_side = side if cfg.kernel_size is None else None
        dilations = cfg.dilations or (1,) * cfg.depth
        if len(dilations) != cfg.depth:
            raise ConfigError(
                f"dilations must have one number for each of {cfg.depth} blocks, found {dilations}"
            )
        self.patch_embed = PatchTokenizer(in_chans, cfg.dim, cfg.patch_size, **factory)
        (rates,) = drop_path_rates(drop_path_rate, (cfg.depth,))
        self.layers = nn.ModuleList(
            Block(
                cfg.dim,
                cfg.num_heads,
                kernel_size=cfg.kernel_size or self.fixed_side,
                dilation=dilations[j],
                mlp_ratio=cfg.mlp_ratio,
                qkv_bias=cfg.qkv_bias,
                proj_drop=proj_drop_rate,
                drop_path=rates[j],
                **factory,
            )
            for j in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, eps=LAYER_NORM_EPS, **factory)
        self.add_head(
            [cfg.dim] * cfg.depth,
            [cfg.patch_size] * cfg.depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **factory,
        )
        self.apply(init_as_published)

    def stem(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.fixed_side is not None and tuple(x.shape[1:3]) != (self.fixed_side, self.fixed_side):
            side = self.fixed_side * self.patch_embed.patch_size
            raise ConfigError(
                f"this model attends globally with a table for a {self.fixed_side} x {self.fixed_side} map: "
                f"images must be {side} x {side}, found a map of {x.shape[1]} x {x.shape[2]}"
            )
        return x

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        return run(stage, x, saving=self.grad_checkpointing)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @staticmethod
    def default_cfg(cfg: IsotropicConfig) -> dict[str, object]:
        """What timm wants to know of a row."""
        side = -(-cfg.input_size // cfg.patch_size)
        fixed = cfg.kernel_size is None
        return {"pool_size": (side, side), "first_conv": "patch_embed.proj", "fixed_input_size": fixed}

    @staticmethod
    def default_features(cfg: IsotropicConfig) -> tuple[int, ...]:
        """The blocks that `features_only` returns: the last three."""
        return tuple(range(max(0, cfg.depth - 3), cfg.depth))


def _dilations(cfg: NATConfig) -> Sequence[Sequence[int | str]]:
    """One dilation for every block of every stage."""
    if cfg.dilations is None:
        return [[1] * depth for depth in cfg.depths]
    if cfg.dilations == "auto":
        return [["largest" if j % 2 else 1 for j in range(depth)] for depth in cfg.depths]
    if isinstance(cfg.dilations, str):
        raise ConfigError(f"dilations must be 'auto', None or lists of numbers, found {cfg.dilations!r}")
    if [len(stage) for stage in cfg.dilations] != list(cfg.depths):
        raise ConfigError(
            f"dilations must have one number for every block, stage by stage {cfg.depths}, "
            f"found {[len(stage) for stage in cfg.dilations]}"
        )
    return cfg.dilations


def _alternating(depths: Sequence[int], largest: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Local and dilated blocks in turn: 1, d, 1, d ... with the stage's d."""
    return tuple(tuple(d if j % 2 else 1 for j in range(n)) for n, d in zip(depths, largest, strict=True))


_MINI = {"depths": (3, 4, 6, 5)}
_TINY = {"depths": (3, 4, 18, 5)}
_SMALL = {**_TINY, "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = {
    **_TINY,
    "dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
    "mlp_ratio": 2.0,
    "layer_scale": 1e-5,
}
_LARGE = {**_TINY, "dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}
_AT_224, _AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)  # the largest dilations of a kernel of 7 on the four maps
_MINI_224, _TINY_224 = _alternating((3, 4, 6, 5), _AT_224), _alternating((3, 4, 18, 5), _AT_224)
_22K = {"num_classes": 21841}

NAT_ROWS = {
    "nat_mini": NATConfig(**_MINI),
    "nat_tiny": NATConfig(**_TINY),
    # Only nat_small, nat_base and dinat_base were trained with layer scale.
    "nat_small": NATConfig(**_SMALL, layer_scale=1e-5),
    "nat_base": NATConfig(**_BASE),
    "dinat_mini": NATConfig(**_MINI, dilations=_MINI_224),
    "dinat_tiny": NATConfig(**_TINY, dilations=_TINY_224),
    "dinat_small": NATConfig(**_SMALL, dilations=_TINY_224),
    "dinat_base": NATConfig(**_BASE, dilations=_TINY_224),
    "dinat_large": NATConfig(**_LARGE, dilations=_TINY_224),
    "dinat_large_384": NATConfig(
        **_LARGE, dilations=_alternating((3, 4, 18, 5), _AT_384), input_size=384, crop_pct=1.0
    ),
    "dinat_large_384_11x11": NATConfig(
        **_LARGE, dilations=_TINY_224, kernel_size=11, input_size=384, crop_pct=1.0
    ),
    "dinat_large_21k": NATConfig(**_LARGE, dilations=_TINY_224, **_22K),
    "dinat_large_21k_11x11": NATConfig(**_LARGE, dilations=_TINY_224, kernel_size=11, **_22K),
    # For handwritten digits, tests and teaching: 8 x 8, 4 x 4 and 2 x 2 tokens.
    "nat_digits": NATConfig(
        dims=(24, 48, 96),
        depths=(1, 2, 1),
        num_heads=(2, 4, 8),
        kernel_size=3,
        mlp_ratio=2.0,
        input_size=32,
        num_classes=10,
        crop_pct=1.0,
    ),
}

_S_TINY = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "mlp_ratio": 4.0}
_S_SMALL = {**_S_TINY, "depths": (2, 2, 18, 2)}
_S_BASE = {**_S_SMALL, "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_S_LARGE = {**_S_SMALL, "dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_S_224 = _alternating((2, 2, 18, 2), _AT_224)

DINAT_S_ROWS = {
    "dinat_s_tiny": NATConfig(**_S_TINY, dilations=_alternating((2, 2, 6, 2), _AT_224)),
    "dinat_s_small": NATConfig(**_S_SMALL, dilations=_S_224),
    "dinat_s_base": NATConfig(**_S_BASE, dilations=_S_224),
    "dinat_s_large": NATConfig(**_S_LARGE, dilations=_S_224),
    "dinat_s_large_384": NATConfig(
        **_S_LARGE, dilations=_alternating((2, 2, 18, 2), _AT_384), input_size=384, crop_pct=1.0
    ),
    "dinat_s_large_21k": NATConfig(**_S_LARGE, dilations=_S_224, **_22K),
}

_ISO_BASE = {"dim": 768, "num_heads": 24}
_ISO_DILATED = (1, 2) * 6

ISOTROPIC_ROWS = {
    "nat_isotropic_small": IsotropicConfig(),
    "nat_isotropic_base": IsotropicConfig(**_ISO_BASE),
    "dinat_isotropic_small": IsotropicConfig(dilations=_ISO_DILATED),
    "dinat_isotropic_base": IsotropicConfig(**_ISO_BASE, dilations=_ISO_DILATED),
    "vitrpb_small": IsotropicConfig(kernel_size=None),
    "vitrpb_base": IsotropicConfig(**_ISO_BASE, kernel_size=None),
}

register_family(NAT, NAT_ROWS, paper="arXiv:2204.07143, arXiv:2209.15001", attention="neighborhood")
register_family(DiNATS, DINAT_S_ROWS, paper="arXiv:2209.15001", attention="neighborhood")
register_family(NATIsotropic, ISOTROPIC_ROWS, paper="arXiv:2209.15001", attention="neighborhood")
