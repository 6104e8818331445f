"""Agent Transformers: agent attention in the bodies of DeiT, PVT, Swin and CSwin (arXiv:2312.08874).

The bodies differ in stem, steps between stages, positions and norms; every one keeps the names its published
files have. Tables and position embeddings are made for one image size and interpolated to any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, global_pool_nlc
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.attention.agent import AgentAttention, AgentMixing, agent_record
from zoo.attention.capture import AttentionRecord
from zoo.attention.global_attention import GlobalAttention
from zoo.attention.stripes import StripeMixing
from zoo.attention.window import WindowAttention
from zoo.errors import ConfigError
from zoo.layers.backbone import (
    Backbone,
    Blocks,
    Stage,
    drop_path_rates,
    init_as_published,
    refuse_pyramid,
    run,
)
from zoo.layers.patches import PatchMerging, PatchTokenizer
from zoo.registry import register_family
from zoo.weights.convert.agent import fit_tables


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """A body of four stages. Dims in channels, depths in blocks, windows in tokens, image sizes in pixels.

    `stages` has a letter for every block: A agent attention, B the body's own. `agent_num` are the agents of
    every stage that the tables are made for; `agent_shapes` pools them over other grids, with the same
    weights, as the published models for dense prediction do. Tables are made for images of `input_size`.
    `window_size` is that of Swin's B blocks, and the width of CSwin's stripes. Where a map is no wider than a
    window of Swin's, `clamp_window` makes it one window without a shift, as the classifiers do; the published
    models for dense prediction shift all the same. `sr_ratios` are PVT's, None is 1 everywhere.
    """

    dims: tuple[int, ...] = (96, 192, 384, 768)
    stages: tuple[str, ...] = ("AA", "AA", "AAAAAA", "BB")
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    agent_num: tuple[int, ...] = (9, 16, 49, 49)
    agent_shapes: tuple[tuple[int, int], ...] | None = None
    window_size: int = 7
    clamp_window: bool = True
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    sr_ratios: tuple[int, ...] | None = None
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if set("".join(self.stages)) - set("AB"):
            raise ConfigError(f"stages must be words of A and B, one letter a block, found {self.stages}")

    @property
    def depths(self) -> list[int]:
        """Blocks of every stage."""
        return [len(letters) for letters in self.stages]

    def map_size(self, stage: int) -> tuple[int, int]:
        """The map of a stage at the row's own input size, in tokens."""
        side = -(-self.input_size // (4 * 2**stage))
        return (side, side)

    def agents(self, stage: int) -> dict[str, object]:
        """What agent attention takes from the row."""
        shape = None if self.agent_shapes is None else self.agent_shapes[stage]
        return {
            "agent_num": self.agent_num[stage],
            "agent_shape": shape,
            "map_size": self.map_size(stage),
        }


@dataclass(frozen=True, kw_only=True)
class AgentDeiTConfig:
    """One resolution throughout. Dim in channels, sizes in pixels; the first `agent_depth` of all `depth`
    blocks have agents, the others are plain; `agent_shape` is as in `AgentConfig`."""

    dim: int = 192
    depth: int = 12
    agent_depth: int = 12
    num_heads: int = 3
    agent_num: int = 49
    agent_shape: tuple[int, int] | None = None
    patch_size: int = 16
    mlp_ratio: float = 4.0
    input_size: int = 224
    num_classes: int = 1000
    crop_pct: float = 0.875


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(
        self,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        eps: float = 1e-5,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: object,
    ) -> None:
        super().__init__()
        dim = attn.dim
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *place: object) -> Tensor:
        """Tokens, or a map, to the same; `place` goes to the attention."""
        x = x + self.drop_path(self.attn(self.norm1(x), *place))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AgentBackbone(Backbone):
    """What the four bodies have in common: checkpoints of any input size, and what timm wants to know."""

    first_conv = "patch_embed.proj"
    undecayed = ("relative_position_bias_table",)  # but not the agents'
    attention_fields = ("agent_num", "agent_shapes", "window_size", "clamp_window", "sr_ratios")

    @staticmethod
    def filter_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Accept published files of any input size; drop what follows from the geometry."""
        return fit_tables(state, {key: value.shape for key, value in model.state_dict().items()})

    @classmethod
    def default_cfg(cls, cfg: AgentConfig) -> dict[str, object]:
        """What timm wants to know of a row. Published evaluation does not keep the images' proportions."""
        size = cfg.map_size(len(cfg.stages) - 1)
        return {"pool_size": size, "first_conv": cls.first_conv, "crop_mode": "squash"}

    @staticmethod
    def default_features(cfg: AgentConfig) -> tuple[int, ...]:
        """The stages that `features_only` returns: all."""
        return tuple(range(len(cfg.stages)))


# Agent-Swin -------------------------------------------------------------------------------------------------


class AgentSwin(AgentBackbone):
    """Swin with agents that see the whole map; B blocks are its own shifted windows.

    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 4.1; Liu et al. 2021 (arXiv:2103.14030).
    """

    stage_list = "layers"
    unused_fields = ("sr_ratios",)

    def __init__(
        self,
        cfg: AgentConfig,
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
        rates = drop_path_rates(drop_path_rate, cfg.depths)
        self.patch_embed = PatchTokenizer(in_chans, cfg.dims[0], **factory)
        stages = []
        for i, dim in enumerate(cfg.dims):
            blocks = []
            for j, letter in enumerate(cfg.stages[i]):
                place = {"proj_drop": proj_drop_rate, **factory}
                if letter == "A":
                    attn = AgentAttention(dim, cfg.num_heads[i], **cfg.agents(i), **place)
                else:
                    attn = WindowAttention(
                        dim,
                        cfg.num_heads[i],
                        window_size=cfg.window_size,
                        shift=cfg.window_size // 2 if j % 2 else 0,
                        clamp_window=cfg.clamp_window,
                        **place,
                    )
                blocks.append(Block(attn, mlp_ratio=cfg.mlp_ratios[i], drop_path=rates[i][j], **place))
            last = i == len(cfg.dims) - 1
            stages.append(Stage(blocks, None if last else PatchMerging(dim, **factory)))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(cfg.dims[-1], **factory)
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


# Stages that are attributes: Agent-PVT and Agent-CSwin ------------------------------------------------------


class NumberedStage(Blocks):
    """The blocks of one stage, which knows its number, from 1."""

    def __init__(self, number: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__(*blocks)
        self.number = number

    @property
    def blocks(self) -> Blocks:
        """The blocks, as every stage has them."""
        return self


class NumberedStages(AgentBackbone):
    """A body whose files keep each stage, and each step to one, as an attribute with a number, from 1."""

    step_names: tuple[str, ...] = ()  # what leads to a stage, without its number

    @property
    def stages_(self) -> list[NumberedStage]:
        return [getattr(self, self.stage_path(i)) for i in range(self.stage_count)]

    def stage_path(self, index: int) -> str:
        return f"{self.stage_list}{index + 1}"

    def add_stages(self, stages: Sequence[Sequence[nn.Module]]) -> None:
        """Take the blocks of every stage."""
        self.stage_count = len(stages)
        for i, blocks in enumerate(stages):
            setattr(self, self.stage_path(i), NumberedStage(i + 1, blocks))

    def keep_stages(self, count: int) -> None:
        for i in range(count, self.stage_count):
            for name in (self.stage_list, *self.step_names):
                delattr(self, f"{name}{i + 1}")
        self.stage_count = count


class AgentPVT(NumberedStages):
    """PVT with agents, and without a last norm.

    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 4.1; Wang et al. 2021 (arXiv:2102.12122).
    """

    stage_list = "block"
    step_names = ("patch_embed", "pos_embed")
    first_conv = "patch_embed1.proj"
    unused_fields = ("window_size", "clamp_window")

    def __init__(
        self,
        cfg: AgentConfig,
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
        if "B" in "".join(cfg.stages):
            raise ConfigError(f"Agent-PVT has agents in every block, found stages {cfg.stages}")
        rates = drop_path_rates(drop_path_rate, cfg.depths)
        channels = (in_chans, *cfg.dims)
        stages = []
        for i, dim in enumerate(cfg.dims):
            patches = PatchTokenizer(channels[i], dim, 2 if i else 4, **factory)
            positions = torch.empty(1, math.prod(cfg.map_size(i)), dim, **factory)
            setattr(self, f"patch_embed{i + 1}", patches)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(nn.init.trunc_normal_(positions, std=0.02)))
            place = {"proj_drop": proj_drop_rate, **factory}
            ratio = cfg.sr_ratios[i] if cfg.sr_ratios else 1
            agents = {**cfg.agents(i), "separate_kv": True, "sr_ratio": ratio}
            stages.append([
                Block(
                    AgentAttention(dim, cfg.num_heads[i], **agents, **place),
                    mlp_ratio=cfg.mlp_ratios[i],
                    eps=1e-6,
                    drop_path=rate,
                    **place,
                )
                for rate in rates[i]
            ])  # fmt: skip
        self.add_stages(stages)
        self.norm = nn.Identity()
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
        return self._embed(1, x)

    def next_resolution(self, stage: NumberedStage, x: Tensor) -> Tensor:
        return self._embed(stage.number + 1, x.permute(0, 3, 1, 2))

    def _embed(self, number: int, x: Tensor) -> Tensor:
        """[B, C, Y, X] to the first map of a stage, positions added."""
        x = getattr(self, f"patch_embed{number}")(x)
        return x + _positions(getattr(self, f"pos_embed{number}"), x.shape[1:3], "bilinear")

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        fine = [(r"^(?:patch_embed|pos_embed)(\d+)", (0,)), (r"^block(\d+)\.(\d+)", None)]
        blocks = r"^(?:patch_embed|pos_embed|block)(\d+)" if coarse else fine
        return {"stem": r"^(?:patch_embed|pos_embed)1", "blocks": blocks}


class CSwinBlock(nn.Module):
    """Attention in one or two branches, which share the channels, and an MLP; [B, Y, X, C] in and out.

    The published files keep the projections in the block, so the block is the attention module too.
    """

    def __init__(
        self,
        dim: int,
        branches: Sequence[nn.Module],
        *,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: object,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = sum(branch.num_heads for branch in branches)
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attns = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _project(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The queries, keys and values of every branch, [B, Y, X, H, D]."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        parts = qkv.split([branch.num_heads for branch in self.attns], dim=-2)
        return [part.unbind(-3) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        grid, mixed = tuple(x.shape[1:3]), []
        for branch, qkv in zip(self.attns, self._project(x), strict=True):
            if isinstance(branch, AgentMixing):
                out = branch.mix(*(part.flatten(1, 2) for part in qkv), grid)
                mixed.append(out.unflatten(1, grid))
            else:
                mixed.append(branch.mix(*qkv))
        x = x + self.drop_path(self.proj_drop(self.proj(torch.cat(mixed, dim=-1))))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def with_attention(self, attn: nn.Module) -> Block:
        """The block with this module in the place of its own attention, everything else as it is."""
        block = Block(attn, mlp_ratio=1)
        for name in ("norm1", "norm2", "mlp", "drop_path"):
            setattr(block, name, getattr(self, name))
        return block

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over the agents, or over the stripes of both branches, whose heads weigh
        what only the other branch sees by 0; for the input of `forward`."""
        grid, parts = tuple(x.shape[1:3]), self._project(x)
        if isinstance(self.attns[0], AgentMixing):
            q, k, _ = (part.flatten(1, 2) for part in parts[0])
            weights, agents = self.attns[0].mixing_weights(q, k, grid)
            return agent_record(weights.unflatten(1, grid), agents, grid)
        seen = [branch.seen(grid).to(x.device) for branch in self.attns]
        weights = []
        for i, (q, k, _) in enumerate(parts):
            q, k = q.flatten(1, 2).float(), k.flatten(1, 2).float()
            logits = torch.einsum("bnhd,bnshd->bnhs", q * q.shape[-1] ** -0.5, k[:, seen[i]])
            own = logits.masked_fill(seen[i][:, None] < 0, float("-inf")).softmax(dim=-1)
            sides = (sum(len(s[0]) for s in seen[:i]), sum(len(s[0]) for s in seen[i + 1 :]))
            weights.append(F.pad(own, sides))
        axes = ("batch", "row", "column", "head", "key")
        whole = torch.cat(weights, dim=2).unflatten(1, grid)
        return AttentionRecord(whole, axes, grid, grid, torch.cat(seen, dim=1))

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the products of all branches for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, _ = shape
        return sum(
            branch.mixing_macs(batch, rows * columns)
            if isinstance(branch, AgentMixing)
            else branch.mixing_macs(batch, (rows, columns))
            for branch in self.attns
        )


class ConvMerge(nn.Module):
    """A 3x3 convolution of stride 2 to other channels, then a norm."""

    def __init__(self, dim: int, dim_out: int, **factory: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(dim_out, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ToChannelsLast(nn.Module):
    """[B, C, Y, X] to [B, Y, X, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class AgentCSwin(NumberedStages):
    """CSwin with agents that see the whole map; B blocks are its own cross-shaped windows.

    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 4.1; Dong et al. 2022 (arXiv:2107.00652).
    """

    stage_list = "stage"
    first_conv = "stage1_conv_embed.0"
    unused_fields = ("sr_ratios", "clamp_window")

    def __init__(
        self,
        cfg: AgentConfig,
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
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, cfg.dims[0], 7, stride=4, padding=2, **factory),
            ToChannelsLast(),
            nn.LayerNorm(cfg.dims[0], **factory),
        )
        stages = []
        for i, dim in enumerate(cfg.dims):
            stages.append([
                CSwinBlock(
                    dim,
                    self._branches(cfg, i, letter, **factory),
                    mlp_ratio=cfg.mlp_ratios[i],
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    **factory,
                )
                for letter, rate in zip(cfg.stages[i], rates[i], strict=True)
            ])  # fmt: skip
        self.add_stages(stages)
        for i, (dim, following) in enumerate(pairwise(cfg.dims)):
            setattr(self, f"merge{i + 1}", ConvMerge(dim, following, **factory))
        self.norm = nn.LayerNorm(cfg.dims[-1], **factory)
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

    @staticmethod
    def _branches(cfg: AgentConfig, i: int, letter: str, **factory: object) -> list[nn.Module]:
        """Agents and the last stage take the whole map in one branch, the others stripes in two."""
        dim, heads = cfg.dims[i], cfg.num_heads[i]
        if letter == "A":
            return [AgentMixing(dim, heads, **cfg.agents(i), convolution="get_v", **factory)]
        if i == len(cfg.dims) - 1:
            return [StripeMixing(dim, heads, **factory)]
        if dim % 2 or heads % 2:
            raise ConfigError(
                "B blocks before the last stage have stripes in two directions, which share width and heads: "
                f"both must be even, found dims={cfg.dims} and num_heads={cfg.num_heads}"
            )
        return [
            StripeMixing(dim // 2, heads // 2, direction=direction, width=cfg.window_size, **factory)
            for direction in ("down", "across")
        ]

    def stem(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        if rows < 3 or columns < 3:
            raise ConfigError(f"images must be at least 3 x 3, found {rows} x {columns}")
        return self.stage1_conv_embed(x)

    @classmethod
    def default_cfg(cls, cfg: AgentConfig) -> dict[str, object]:
        side = -(-((cfg.input_size - 3) // 4 + 1) // 2 ** (len(cfg.stages) - 1))  # the stem pads too little
        return {**super().default_cfg(cfg), "pool_size": (side, side)}

    def next_resolution(self, stage: NumberedStage, x: Tensor) -> Tensor:
        return getattr(self, f"merge{stage.number}")(x)

    def keep_stages(self, count: int) -> None:
        for i in range(count, self.stage_count):
            delattr(self, f"merge{i}")
        super().keep_stages(count)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        fine = [(r"^merge(\d+)", (99999,)), (r"^stage(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)" if coarse else fine}


# Agent-DeiT -------------------------------------------------------------------------------------------------


class TokenAttention(GlobalAttention):
    """Attention of all tokens [B, N, C] to all, a class token among them."""

    def __init__(self, dim: int, num_heads: int, **arguments: object) -> None:
        super().__init__(dim, num_heads, lepe_of=None, **arguments)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        return super().forward(x[:, None])[:, 0]

    def attention_weights(self, x: Tensor, grid: tuple[int, int]) -> AttentionRecord:
        """Weights of every token over all tokens, the class token first."""
        weights = super().attention_weights(x[:, None]).weights[:, 0]
        return AttentionRecord(weights, ("batch", "token", "head", "key"), grid, grid)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, N, C]."""
        return super().attention_macs(torch.Size((shape[0], 1, *shape[1:])))


class TokenPool(nn.Module):
    """Tokens, the class token first, to one vector: that token, or a mean or maximum of the others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ("token", "avg", "max", "avgmax", ""):
            raise ConfigError(f"global_pool must be token, avg, max, avgmax or '', found {kind!r}")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return global_pool_nlc(x, pool_type=self.kind, num_prefix_tokens=1)


class AgentDeiT(AgentBackbone):
    """DeiT with agents: tokens of one resolution, [B, 1 + Y * X, C], the class token first.

    As timm's vision transformers: `forward_features` gives all tokens, `global_pool` is "token" or another of
    timm's names, feature maps come without the class token, and every block is a stage.
    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 4.1; Touvron et al. 2021 (arXiv:2012.12877).
    """

    stage_list = "blocks"
    output_fmt = "NLC"
    num_prefix_tokens = 1

    def __init__(
        self,
        cfg: AgentDeiTConfig,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        side = -(-cfg.input_size // cfg.patch_size)
        self.patch_embed = PatchTokenizer(in_chans, cfg.dim, cfg.patch_size, norm=False, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, cfg.dim, **factory))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        (rates,) = drop_path_rates(drop_path_rate, (cfg.depth,))
        place = {"proj_drop": proj_drop_rate, **factory}
        agents = {"agent_num": cfg.agent_num, "agent_shape": cfg.agent_shape, "map_size": (side, side)}
        self.blocks = nn.ModuleList(
            Block(
                AgentAttention(cfg.dim, cfg.num_heads, class_token=True, **agents, **place)
                if j < cfg.agent_depth
                else TokenAttention(cfg.dim, cfg.num_heads, **place),
                mlp_ratio=cfg.mlp_ratio,
                eps=1e-6,
                drop_path=rates[j],
                **place,
            )
            for j in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, **factory)
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

    def make_pool(self, kind: str) -> nn.Module:
        return TokenPool(kind)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image [B, C, height, width] to tokens [B, 1 + Y * X, C], and (Y, X)."""
        x = self.patch_embed(x)
        grid = tuple(x.shape[1:3])
        x = x + _positions(self.pos_embed[:, 1:], grid, "bicubic")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x.flatten(1, 2)], dim=1), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, C, height, width] to the normed tokens [B, 1 + Y * X, C]."""
        x, grid = self.embed(x)
        for block in self.blocks:
            x = run(block, x, grid, saving=self.grad_checkpointing)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Return block outputs as maps [B, C, Y, X] (or [B, Y * X, C] as "NLC"), and the last tokens with
        them.

        `indices` picks blocks: the last n, or a list; `return_prefix_tokens` makes every output a pair with
        the class token [B, 1, C]; `norm` applies the final norm to all; `stop_early` computes no further than
        needed.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, found {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        features = []
        x, grid = self.embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = run(block, x, grid, saving=self.grad_checkpointing)
            if i in take:
                tokens = self.norm(x) if norm else x
                first, feature = tokens[:, :1], tokens[:, 1:]
                if output_fmt == "NCHW":
                    feature = feature.transpose(1, 2).unflatten(2, grid).contiguous()
                features.append((feature, first) if return_prefix_tokens else feature)
        return features if intermediates_only else (self.norm(x), features)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that AdamW should not shrink: class token and positions."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Say to which layer each parameter belongs, for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|pos_embed|patch_embed)", "blocks": blocks}

    @classmethod
    def default_cfg(cls, cfg: AgentDeiTConfig) -> dict[str, object]:
        """What timm wants to know of a row."""
        side = -(-cfg.input_size // cfg.patch_size)
        return {"pool_size": (side, side), "first_conv": cls.first_conv, "crop_mode": "squash"}

    @staticmethod
    def default_features(cfg: AgentDeiTConfig) -> tuple[int, ...]:
        """The blocks that `features_only` returns: the last three."""
        return tuple(range(max(0, cfg.depth - 3), cfg.depth))


def _positions(table: Tensor, grid: Sequence[int], mode: str) -> Tensor:
    """Positions [1, N, C] of a square map as [1, Y, X, C] of another."""
    side = math.isqrt(table.shape[1])
    table = table.unflatten(1, (side, side))
    if tuple(grid) == (side, side):
        return table
    maps = F.interpolate(table.permute(0, 3, 1, 2), size=tuple(grid), mode=mode, align_corners=False)
    return maps.permute(0, 2, 3, 1)


# Rows -------------------------------------------------------------------------------------------------------

_SWIN_BASE = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_SWIN_SMALL = {"stages": ("AA", "AA", "B" * 18, "BB")}
_SWIN_MIXED = {**_SWIN_BASE, "stages": ("AA", "AA", "AA" + "B" * 16, "BB")}

SWIN_ROWS = {
    "agent_swin_tiny": AgentConfig(),
    "agent_swin_small": AgentConfig(**_SWIN_SMALL),
    "agent_swin_small_288": AgentConfig(**_SWIN_SMALL, input_size=288, window_size=9, crop_pct=1.0),
    "agent_swin_base": AgentConfig(**_SWIN_MIXED),
    "agent_swin_base_384": AgentConfig(**_SWIN_MIXED, input_size=384, window_size=12, crop_pct=1.0),
    # For handwritten digits, tests and teaching: 8 x 8, 4 x 4 and 2 x 2 tokens, both kinds of blocks.
    "agent_digits": AgentConfig(
        dims=(24, 48, 96),
        stages=("A", "AB", "A"),
        num_heads=(2, 4, 8),
        agent_num=(9, 9, 4),
        window_size=3,
        mlp_ratios=(2.0, 2.0, 2.0),
        input_size=32,
        num_classes=10,
        crop_pct=1.0,
    ),
}

_PVT = {"dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8.0, 8.0, 4.0, 4.0)}


def _agents_everywhere(*depths: int) -> dict[str, tuple[str, ...]]:
    return {"stages": tuple("A" * depth for depth in depths)}


PVT_ROWS = {
    "agent_pvt_tiny": AgentConfig(**_PVT, **_agents_everywhere(2, 2, 2, 2)),
    "agent_pvt_small": AgentConfig(**_PVT, **_agents_everywhere(3, 4, 6, 3)),
    "agent_pvt_medium": AgentConfig(**_PVT, **_agents_everywhere(3, 4, 18, 3)),
    "agent_pvt_medium_256": AgentConfig(**_PVT, **_agents_everywhere(3, 4, 18, 3), input_size=256),
    "agent_pvt_large": AgentConfig(**_PVT, **_agents_everywhere(3, 8, 27, 3)),
}

_CSWIN = {"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)}
_CSWIN_BASE = {
    "dims": (96, 192, 384, 768),
    "num_heads": (4, 8, 16, 32),
    "stages": ("A" * 3, "A" * 6, "B" * 29, "BB"),
}

CSWIN_ROWS = {
    "agent_cswin_tiny": AgentConfig(**_CSWIN, stages=("AA", "A" * 4, "B" * 18, "B")),
    "agent_cswin_small": AgentConfig(**_CSWIN, stages=_CSWIN_BASE["stages"]),
    "agent_cswin_base": AgentConfig(**_CSWIN_BASE),
    "agent_cswin_base_384": AgentConfig(**_CSWIN_BASE, input_size=384, window_size=12),
}

_DEIT_SMALL = {"dim": 384, "num_heads": 6}

DEIT_ROWS = {
    "agent_deit_tiny": AgentDeiTConfig(),
    "agent_deit_small": AgentDeiTConfig(**_DEIT_SMALL),
    "agent_deit_small_448": AgentDeiTConfig(**_DEIT_SMALL, input_size=448),
    "agent_deit_base": AgentDeiTConfig(dim=768, num_heads=12, agent_depth=4, agent_num=81),
}

for _model, _rows in (
    (AgentDeiT, DEIT_ROWS),
    (AgentPVT, PVT_ROWS),
    (AgentSwin, SWIN_ROWS),
    (AgentCSwin, CSWIN_ROWS),
):
    register_family(_model, _rows, paper="arXiv:2312.08874", attention="agent")
