"""Vision transformers with deformable attention: DAT (arXiv:2201.00520) and DAT++ (arXiv:2309.01430).

The two share their frame and the names of their weights, but not their deformable attention: a DAT file read
as DAT++ would fit and be wrong. So the version belongs to the class, and a file that is another row's is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from zoo.attention import DeformableAttention, NeighborhoodAttention
from zoo.attention.layers import ChannelNorm, Convolution, Pointwise
from zoo.attention.window import WindowAttention, resize_relative_position_bias
from zoo.errors import ConfigError, IntegrityError
from zoo.layers.backbone import Backbone, drop_path_rates, run
from zoo.registry import register_family

DERIVED = (".relative_position_index", ".attn_mask")  # in published files; ours are computed
TABLES = ("rpe_table", "relative_position_bias_table")


@dataclass(frozen=True, kw_only=True)
class DATConfig:
    """Dims in channels, sizes of kernels, windows and strides in tokens, of images in pixels.

    `stages` has a letter for every block: D deformable, N neighborhood, L window, S shifted window.
    `groups`, `strides` and `offset_kernel_sizes` are those of the D blocks, stage by stage. `convolutional`
    models have a stem of two convolutions, overlapping down-sampling, and a depthwise convolution before
    every block and in every MLP. Position tables are made for images of `table_size` (None: `input_size`).
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    stages: tuple[str, ...] = ("ND", "ND" * 2, "ND" * 9, "DD")
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    groups: tuple[int, ...] = (1, 2, 4, 8)
    strides: tuple[int, ...] = (8, 4, 2, 1)
    offset_kernel_sizes: tuple[int, ...] = (9, 7, 5, 3)
    offset_range_factor: float = -1.0
    kernel_size: int = 7
    window_size: int = 7
    mlp_ratio: float = 4.0
    convolutional: bool = True
    table_size: int | None = 224
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875


class Form(NamedTuple):
    """What tells one row's weights from another's, as far as a file shows it."""

    convolutional: bool
    width: int  # channels of the first stage
    stages: tuple[str, ...]  # D deformable, N neighborhood, W window, shifted or not
    offset_kernel_sizes: tuple[int | None, ...]  # of the stages that have D blocks

    @classmethod
    def of_row(cls, cfg: DATConfig) -> Form:
        stages = tuple(re.sub("[LS]", "W", letters) for letters in cfg.stages)
        kernels = zip(stages, cfg.offset_kernel_sizes, strict=True)
        return cls(
            cfg.convolutional, cfg.dims[0], stages, tuple(k if "D" in stage else None for stage, k in kernels)
        )

    @classmethod
    def of_file(cls, state: Mapping[str, Tensor]) -> Form | None:
        """None for a file without the parts that tell."""
        letters = {"rpb": "N", "conv_offset.0.weight": "D", "relative_position_bias_table": "W"}
        blocks: dict[int, dict[int, str]] = defaultdict(dict)
        kernels: dict[int, int] = {}
        for key, value in state.items():
            found = re.fullmatch(rf"stages\.(\d+)\.attns\.(\d+)\.({'|'.join(map(re.escape, letters))})", key)
            if found:
                stage, block, letter = int(found[1]), int(found[2]), letters[found[3]]
                blocks[stage][block] = letter
                if letter == "D":
                    kernels[stage] = value.shape[-1]
        last = next(
            (state[key] for key in ("patch_proj.3.weight", "patch_proj.0.weight") if key in state), None
        )
        if last is None or not blocks:
            return None
        stages = tuple("".join(blocks[i][j] for j in sorted(blocks[i])) for i in sorted(blocks))
        convolutional = "patch_proj.3.weight" in state and not any(".chunk." in key for key in state)
        return cls(convolutional, last.shape[0], stages, tuple(kernels.get(i) for i in sorted(blocks)))


class PlainMlp(nn.Module):
    """Two linear layers around a GELU; [B, Y, X, C] in and out."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: object) -> None:
        super().__init__()
        layers = {
            "linear1": nn.Linear(dim, hidden, **factory),
            "act": nn.GELU(),
            "drop1": nn.Dropout(drop),
            "linear2": nn.Linear(hidden, dim, **factory),
            "drop2": nn.Dropout(drop),
        }
        self.chunk = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.chunk(x)


class ConvMlp(nn.Module):
    """Two pointwise layers; a depthwise convolution with a residual and a GELU between them."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: object) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(Pointwise(dim, hidden, **factory))
        self.dwc = Convolution(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.act = nn.GELU()
        self.linear2 = nn.Sequential(Pointwise(hidden, dim, **factory))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        x = self.drop(self.act(x + self.dwc(x)))
        return self.drop(self.linear2(x))


class LocalAttention(WindowAttention):
    """Window attention under the names of DAT's files and with its narrower initial table."""

    qkv_name = "proj_qkv"
    proj_name = "proj_out"

    def __init__(self, dim: int, num_heads: int, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)


class Stage(nn.Module):
    """Blocks at one resolution; published files keep them by kind of layer, not by block."""

    def __init__(
        self,
        index: int,
        attns: list[nn.Module],
        cfg: DATConfig,
        *,
        proj_drop: float,
        drop_path: list[float],
        **factory: object,
    ) -> None:
        super().__init__()
        self.index = index
        dim, mlp = cfg.dims[index], ConvMlp if cfg.convolutional else PlainMlp
        self.layer_norms = nn.ModuleList(ChannelNorm(dim, **factory) for _ in range(2 * len(attns)))
        self.attns = nn.ModuleList(attns)
        self.mlps = nn.ModuleList(mlp(dim, int(dim * cfg.mlp_ratio), proj_drop, **factory) for _ in attns)
        self.local_perception_units = nn.ModuleList(
            Convolution(dim, dim, 3, padding=1, groups=dim, **factory) for _ in attns if cfg.convolutional
        )
        self.drop_path = nn.ModuleList(DropPath(rate) if rate else nn.Identity() for rate in drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        for block in range(len(self.attns)):
            x = run(self._block, x, block, saving=self.grad_checkpointing)
        return x

    def _block(self, x: Tensor, block: int) -> Tensor:
        if self.local_perception_units:
            x = x + self.local_perception_units[block](x)
        drop_path = self.drop_path[block]
        x = x + drop_path(self.attns[block](self.layer_norms[2 * block](x)))
        return x + drop_path(self.mlps[block](self.layer_norms[2 * block + 1](x)))


class DeformableBackbone(Backbone):
    """What DAT and DAT++ share: a pyramid whose blocks attend as the letters of its stages say."""

    undecayed = TABLES  # but not the neighborhoods'
    attention_fields = (
        "groups", "strides", "offset_kernel_sizes", "offset_range_factor", "kernel_size", "window_size",
        "table_size",
    )  # fmt: skip
    norm_name = "cls_norm"
    head_name = "cls_head"
    version: int
    letters: str

    def __init__(
        self,
        cfg: DATConfig,
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
        wrong = set("".join(cfg.stages)) - set(self.letters)
        if wrong:
            raise ConfigError(
                f"stages of {type(self).__name__} are made of the letters {', '.join(self.letters)}, "
                f"found {', '.join(sorted(wrong))}"
            )
        for field in ("input_size", "table_size"):
            size = getattr(cfg, field)
            if not cfg.convolutional and size is not None and size < _reduction(cfg):
                raise ConfigError(
                    f"{field} must be at least {_reduction(cfg)} for a token in every stage, found {size}"
                )
        self.form = Form.of_row(cfg)
        self.input_size, self.least = cfg.input_size, _smallest_image(cfg)
        # Where nothing is padded, an image must have a token in every stage.
        self.least_of_body = 1 if cfg.convolutional else _reduction(cfg)
        self.patch_proj = self._stem(cfg, in_chans, **factory)
        rates = drop_path_rates(drop_path_rate, [len(letters) for letters in cfg.stages])
        self.stages = nn.ModuleList(
            Stage(
                i,
                [self._attention(letter, i, cfg, proj_drop_rate, **factory) for letter in letters],
                cfg,
                proj_drop=proj_drop_rate,
                drop_path=rates[i],
                **factory,
            )
            for i, letters in enumerate(cfg.stages)
        )
        kernel = {"kernel_size": 3, "padding": 1} if cfg.convolutional else {"kernel_size": 2}
        self.down_projs = nn.ModuleList(
            nn.Sequential(
                Convolution(dim, wider, stride=2, bias=False, **kernel, **factory),
                ChannelNorm(wider, **factory),
            )
            for dim, wider in zip(cfg.dims, cfg.dims[1:], strict=False)
        )
        self.cls_norm = ChannelNorm(cfg.dims[-1], **factory)
        self.add_head(
            cfg.dims,
            [4 * 2**i for i in range(len(cfg.dims))],
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **factory,
        )

    def stem(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        if self.as_published:
            self.refuse_size(rows, columns)
        elif rows < self.least_of_body or columns < self.least_of_body:
            least = f"{self.least_of_body} x {self.least_of_body}"
            raise ConfigError(
                f"images must be at least {least} for a token in every stage, found {rows} x {columns}"
            )
        return self.patch_proj(x.permute(0, 2, 3, 1))

    def refuse_size(self, rows: int, columns: int) -> None:
        """Raise ConfigError for images that the published attention has no positions for."""
        raise NotImplementedError

    @staticmethod
    def _stem(cfg: DATConfig, in_chans: int, **factory: object) -> nn.Sequential:
        dim = cfg.dims[0]
        if not cfg.convolutional:
            return nn.Sequential(Convolution(in_chans, dim, 4, 4, **factory), ChannelNorm(dim, **factory))
        return nn.Sequential(
            Convolution(in_chans, dim // 2, 3, 2, 1, **factory),
            ChannelNorm(dim // 2, **factory),
            nn.GELU(),
            Convolution(dim // 2, dim, 3, 2, 1, **factory),
            ChannelNorm(dim, **factory),
        )

    def _attention(
        self, letter: str, i: int, cfg: DATConfig, proj_drop: float, **factory: object
    ) -> nn.Module:
        place = (cfg.dims[i], cfg.num_heads[i])
        if letter == "N":
            return NeighborhoodAttention(*place, kernel_size=cfg.kernel_size, proj_drop=proj_drop, **factory)
        if letter == "D":
            size, reduction = cfg.table_size or cfg.input_size, 4 * 2**i
            side = -(-size // reduction) if cfg.convolutional else size // reduction
            return DeformableAttention(
                *place,
                version=self.version,
                groups=cfg.groups[i],
                stride=cfg.strides[i],
                kernel_size=cfg.offset_kernel_sizes[i],
                offset_range_factor=cfg.offset_range_factor,
                map_size=(side, side),
                proj_drop=proj_drop,
                **factory,
            )
        return LocalAttention(
            *place,
            window_size=cfg.window_size,
            shift=-(-cfg.window_size // 2) if letter == "S" else 0,
            proj_drop=proj_drop,
            **factory,
        )

    def next_resolution(self, stage: Stage, x: Tensor) -> Tensor:
        return self.down_projs[stage.index](x)

    def keep_stages(self, count: int) -> None:
        super().keep_stages(count)
        self.down_projs = self.down_projs[: count - 1]

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^patch_proj", "blocks": r"^(?:stages|down_projs)\.(\d+)"}
        blocks = [
            (
                rf"^stages\.{i}\.(?:layer_norms\.(?:{2 * j}|{2 * j + 1})"
                rf"|(?:attns|mlps|local_perception_units)\.{j})\.",
                (i, j),
            )
            for i, stage in enumerate(self.stages)
            for j in range(len(stage.attns))
        ]
        return {
            "stem": r"^patch_proj",
            "blocks": [(r"^down_projs\.(\d+)", (99999,)), *blocks, (r"^cls_norm", (99999,))],
        }

    @staticmethod
    def filter_checkpoint(state: dict[str, Tensor], model: DeformableBackbone) -> dict[str, Tensor]:
        """Drop what follows from the geometry, and resize position tables made for another size.

        Raises: IntegrityError for the file of another row, naming it.
        """
        own = model.state_dict()
        found, ours = Form.of_file(state), Form.of_file(own)
        # A body under another attention= is no row, and neither are its files.
        is_row = ours is not None and ours.stages == model.form.stages[: len(ours.stages)]
        if is_row and found is not None and found != model.form:
            raise IntegrityError(_another_row(found, model.form))
        return {
            key: _resize_table(value, own[key].shape) if key.endswith(TABLES) and key in own else value
            for key, value in state.items()
            if not key.endswith(DERIVED)
        }

    @staticmethod
    def default_cfg(cfg: DATConfig) -> dict[str, object]:
        """What timm wants to know of a row. Published evaluation does not keep the images' proportions."""
        side = (
            -(-cfg.input_size // _reduction(cfg)) if cfg.convolutional else cfg.input_size // _reduction(cfg)
        )
        names = {"first_conv": "patch_proj.0", "classifier": "cls_head"}
        return {"pool_size": (side, side), "crop_mode": "squash", **names}

    @staticmethod
    def default_features(cfg: DATConfig) -> tuple[int, ...]:
        """The stages that `features_only` returns: all."""
        return tuple(range(len(cfg.dims)))


class DAT(DeformableBackbone):
    """DAT: windows in the first two stages, windows and deformable attention in the last two.

    Source: Xia et al. 2022 (arXiv:2201.00520) Sec. 3.3, Table 1.
    """

    version = 1
    letters = "DLS"
    unused_fields = ("kernel_size",)

    def refuse_size(self, rows: int, columns: int) -> None:
        if (rows, columns) != (self.input_size, self.input_size):
            raise ConfigError(
                f"this model has position tables for images of {self.input_size} x {self.input_size}, found "
                f"{rows} x {columns}; zoo.create_model(..., input_size=...) builds it for another square and "
                "loads the published tables resized"
            )

    @staticmethod
    def default_cfg(cfg: DATConfig) -> dict[str, object]:
        return {**DeformableBackbone.default_cfg(cfg), "fixed_input_size": True}


class DATPlus(DeformableBackbone):
    """DAT++: neighborhood and deformable attention in turn, with convolutions in between.

    Source: Xia et al. 2023 (arXiv:2309.01430) Sec. 4, Table 1.
    """

    version = 2
    letters = "DN"
    unused_fields = ("window_size",)

    def refuse_size(self, rows: int, columns: int) -> None:
        if rows < self.least or columns < self.least:
            raise ConfigError(
                f"images must be at least {self.least} x {self.least}, found {rows} x {columns}: "
                "the last map would be a single token wide, where this model's positions are not defined"
            )

    @staticmethod
    def default_cfg(cfg: DATConfig) -> dict[str, object]:
        least = _smallest_image(cfg)
        return {**DeformableBackbone.default_cfg(cfg), "min_input_size": (3, least, least)}


def _smallest_image(cfg: DATConfig) -> int:
    """The side of an image whose last map is two tokens wide."""
    return _reduction(cfg) + 1 if cfg.convolutional else 2 * _reduction(cfg)


def _reduction(cfg: DATConfig) -> int:
    """Pixels along a token of the last map."""
    return 4 * 2 ** (len(cfg.dims) - 1)


def _another_row(found: Form, wanted: Form) -> str:
    """Why a file does not fit, and which row it does fit."""
    differences = [
        f"{name} {theirs} instead of {ours}"
        for name, theirs, ours in zip(Form._fields, found, wanted, strict=True)
        if theirs != ours
    ]
    rows = [name for name, cfg in (DAT_ROWS | DAT_PLUS_ROWS).items() if Form.of_row(cfg) == found]
    told = f"these weights are of {rows[0] if rows else 'another model'} ({'; '.join(differences)})"
    if any("W" in stage for stage in found.stages) != any("W" in stage for stage in wanted.stages):
        told += ", and DAT and DAT++ compute different functions under the same names"
    return f"{told}; use {f'zoo.create_model({rows[0]!r})' if rows else 'the model they were made with'}"


def _resize_table(table: Tensor, shape: torch.Size) -> Tensor:
    """Fit a position table to another map or window, bicubically as published."""
    if table.shape == shape or table.ndim != len(shape):
        return table
    if table.ndim == 3:  # [heads, rows, columns]
        maps = table[None].to(torch.promote_types(table.dtype, torch.float32))
        return F.interpolate(maps, shape[-2:], mode="bicubic", align_corners=False)[0].to(table.dtype)
    window = (math.isqrt(shape[0]) + 1) // 2
    return resize_relative_position_bias(table, window)


_SMALL = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_BASE = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_AT_384 = {"input_size": 384, "crop_pct": 1.0}

DAT_PLUS_ROWS = {
    "dat_plus_tiny": DATConfig(),
    "dat_plus_small": DATConfig(**_SMALL, groups=(1, 2, 3, 6)),
    "dat_plus_base": DATConfig(**_BASE, groups=(2, 4, 8, 16)),
    "dat_plus_base_384": DATConfig(**_BASE, groups=(2, 4, 8, 16), **_AT_384),  # tables as at 224, stretched
    "dat_p": DATConfig(convolutional=False),
    # For handwritten digits, tests and teaching: 8 x 8, 4 x 4 and 2 x 2 tokens.
    "dat_digits": DATConfig(
        dims=(24, 48, 96),
        stages=("N", "ND", "D"),
        num_heads=(2, 4, 8),
        groups=(1, 2, 4),
        strides=(4, 2, 1),
        offset_kernel_sizes=(5, 3, 3),
        kernel_size=3,
        mlp_ratio=2.0,
        table_size=None,
        input_size=32,
        num_classes=10,
        crop_pct=1.0,
    ),
}

_V1 = {
    "stages": ("LS", "LS", "LD" * 9, "LD"),
    "groups": (1, 1, 3, 6),
    "strides": (1, 1, 1, 1),
    "offset_range_factor": 2.0,
    "convolutional": False,
    "table_size": None,
}

DAT_ROWS = {
    "dat_tiny": DATConfig(**_SMALL, **{**_V1, "stages": ("LS", "LS", "LD" * 3, "LD")}),
    "dat_small": DATConfig(**_SMALL, **_V1),
    "dat_base": DATConfig(**_BASE, **{**_V1, "groups": (1, 1, 4, 8)}),
    "dat_base_384": DATConfig(**_BASE, **{**_V1, "groups": (1, 1, 4, 8)}, window_size=12, **_AT_384),
}

register_family(DATPlus, DAT_PLUS_ROWS, paper="arXiv:2309.01430", attention="deformable")
register_family(DAT, DAT_ROWS, paper="arXiv:2201.00520", attention="deformable")
