"""Agent attention as a module: pooled agents, their positional biases, a convolution of the values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.errors import ConfigError, at_least

TABLE_SIZE = (7, 7)  # of the tables that are interpolated to any map


class AgentMixing(nn.Module):
    """What agent attention does between its projections: queries, keys and values to outputs.

    Agents are queries averaged over a grid of `agent_shape` cells (None: as many as `agent_num`). The bias of
    an agent and a token is the sum of three learned tables, over the map at low resolution, over its rows and
    over its columns; what agents give has tables of its own. Tables are interpolated to the map at hand, and
    to the agents at hand where these are not the `agent_num` the tables were made for. A depthwise
    convolution of the values is added to the output. `class_token` adds a first token that is no part of
    the map: it is attended and attends, but makes no agents and no convolution.

    Units: `map_size`, which the tables of rows and columns are made for, and `key_map_size` (None: the same)
    in tokens. `convolution` is the name of the convolution's weights.
    Raises: ConfigError for an `agent_num` that is no square, or a num_heads that does not divide dim.
    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agent_num: int = 49,
        agent_shape: tuple[int, int] | None = None,
        map_size: tuple[int, int] | None = None,
        key_map_size: tuple[int, int] | None = None,
        class_token: bool = False,
        convolution: str = "dwc",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        side = math.isqrt(max(agent_num, 0))
        if side < 1 or side * side != agent_num:
            raise ConfigError(f"agent_num must be a square such as 9, 16 or 49, found {agent_num}")
        for cells in agent_shape or ():
            at_least(1, agent_shape=cells)
        self.dim, self.num_heads = dim, num_heads
        self.agent_num = agent_num
        self.table_shape = (side, side)
        self.agent_shape = self.table_shape if agent_shape is None else tuple(agent_shape)
        self.prefix = int(class_token)
        self.convolution = convolution
        setattr(self, convolution, nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory))
        rows, columns = map_size or TABLE_SIZE
        key_rows, key_columns = key_map_size or (rows, columns)
        shapes = {  # a: agents, n: tokens, h: rows, w: columns, c: the class token
            "an_bias": (num_heads, agent_num, *TABLE_SIZE),
            "na_bias": (num_heads, agent_num, *TABLE_SIZE),
            "ah_bias": (1, num_heads, agent_num, key_rows, 1),
            "aw_bias": (1, num_heads, agent_num, 1, key_columns),
            "ha_bias": (1, num_heads, rows, 1, agent_num),
            "wa_bias": (1, num_heads, 1, columns, agent_num),
        }
        if class_token:
            shapes |= {"ac_bias": (1, num_heads, agent_num, 1), "ca_bias": (1, num_heads, 1, agent_num)}
        for name, shape in shapes.items():
            table = nn.Parameter(torch.empty(shape, **factory))
            setattr(self, name, nn.init.trunc_normal_(table, std=0.02))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AgentMixing:
        # torch takes five axes for a volume, which `to(memory_format=torch.channels_last)` refuses.
        return super()._apply(lambda t: fn(t[0])[None] if t.ndim == 5 else fn(t), recurse)

    @property
    def agents(self) -> int:
        """How many agents there are."""
        return math.prod(self.agent_shape)

    def bias_in(self, grid: tuple[int, int]) -> Tensor:
        """The bias of every agent and every key, [H, A, tokens], for keys on a map of this size."""
        tables = (self.an_bias, self.ah_bias[0], self.aw_bias[0])
        return self._bias(*tables, self.ac_bias[0] if self.prefix else None, grid)

    def bias_out(self, grid: tuple[int, int]) -> Tensor:
        """The bias of every query and every agent, [H, tokens, A], for queries on a map of this size."""
        rows, columns = (table[0].permute(0, 3, 1, 2) for table in (self.ha_bias, self.wa_bias))
        first = self.ca_bias[0].transpose(1, 2) if self.prefix else None
        return self._bias(self.na_bias, rows, columns, first, grid).transpose(1, 2)

    def _bias(
        self, coarse: Tensor, rows: Tensor, columns: Tensor, first: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """Tables [H, A, 7, 7], [H, A, Y, 1], [H, A, 1, X] and [H, A, 1] to one of [H, agents, tokens]."""
        bias = _resized(coarse, grid) + _resized(rows, (grid[0], 1)) + _resized(columns, (1, grid[1]))
        bias = bias.flatten(2)
        if first is not None:
            bias = torch.cat([first, bias], dim=-1)
        if self.agent_shape == self.table_shape:
            return bias
        by_token = bias.transpose(1, 2).unflatten(2, self.table_shape)  # [H, tokens, rows, columns]
        return _resized(by_token, self.agent_shape).flatten(2).transpose(1, 2)

    def pool(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Agents [B, A, H, D] from queries [B, tokens, H, D]."""
        q = q[:, self.prefix :].flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, Y, X]
        pooled = F.adaptive_avg_pool2d(q, self.agent_shape)
        return pooled.flatten(2).transpose(1, 2).unflatten(-1, (self.num_heads, -1))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], key_grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Queries, keys and values [B, tokens, H, D] of these maps to outputs [B, tokens, C]."""
        key_grid = key_grid or grid
        out = ops.agent_attention(
            q, k, v, self.pool(q, grid), bias_in=self.bias_in(key_grid), bias_out=self.bias_out(grid)
        ).flatten(2)
        v = v[:, self.prefix :].flatten(2).unflatten(1, key_grid).permute(0, 3, 1, 2)  # [B, C, Y, X]
        local = getattr(self, self.convolution)(_resized(v, grid)).flatten(2).transpose(1, 2)
        return out + F.pad(local, (0, 0, self.prefix, 0))

    def mixing_weights(
        self, q: Tensor, k: Tensor, grid: tuple[int, int], key_grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What queries take from agents, [B, tokens, H, A], and agents from tokens, [B, A, H, keys]."""
        agents = self.pool(q, grid).float()
        bias_in, bias_out = self.bias_in(key_grid or grid), self.bias_out(grid)

        def weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
            logits = torch.einsum("bnhd,bmhd->bhnm", q.float() * q.shape[-1] ** -0.5, k.float())
            return (logits + bias.float()).softmax(dim=-1).transpose(1, 2)

        return weights(q, agents, bias_out), weights(agents, k, bias_in)

    def mixing_macs(self, batch: int, tokens: int, keys: int | None = None) -> int:
        """Multiply-adds of the four products, class token included."""
        return 2 * batch * self.agents * self.dim * (tokens + (tokens if keys is None else keys))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, agents={self.agent_shape}"


class AgentAttention(AgentMixing):
    """Multi-head attention of every token to the whole map through a few agents, pooled from the queries.

    `AgentMixing` says what the agents' arguments are. With `separate_kv` the queries have a projection of
    their own; `sr_ratio`, which needs that, takes keys and values from a map that many times coarser.

    Shapes: [B, Y, X, C] in and out, of any map; or, with `grid` = (Y, X), tokens [B, Y * X, C], a class token
    before them.
    Raises: ConfigError for arguments that do not fit each other.
    Source: Han et al. 2023 (arXiv:2312.08874) Sec. 3.3; coarser keys: Wang et al. 2021 (arXiv:2102.12122).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agent_num: int = 49,
        agent_shape: tuple[int, int] | None = None,
        map_size: tuple[int, int] | None = None,
        class_token: bool = False,
        separate_kv: bool = False,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        if sr_ratio < 1 or (sr_ratio > 1 and (class_token or not separate_kv)):
            raise ConfigError(
                f"sr_ratio must be 1, or more with separate_kv and without class_token; found {sr_ratio}"
            )
        rows, columns = map_size or TABLE_SIZE
        super().__init__(
            dim,
            num_heads,
            agent_num=agent_num,
            agent_shape=agent_shape,
            map_size=(rows, columns),
            key_map_size=(max(1, rows // sr_ratio), max(1, columns // sr_ratio)),
            class_token=class_token,
            **factory,
        )
        self.separate_kv, self.sr_ratio = separate_kv, sr_ratio
        if separate_kv:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(
        self, x: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]:
        """Tokens [B, N, C] to queries, keys and values [B, tokens, H, D], and the maps they lie on."""
        if not self.separate_kv:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            return q, k, v, grid, grid
        q, key_grid = self.q(x).unflatten(-1, (self.num_heads, -1)), grid
        if self.sr_ratio > 1:
            maps = x.unflatten(1, grid).permute(0, 3, 1, 2)
            short = [max(0, self.sr_ratio - side) for side in grid]  # a map smaller than one step is padded
            maps = self.sr(F.pad(maps, (0, short[1], 0, short[0])))
            x, key_grid = self.norm(maps.flatten(2).transpose(1, 2)), tuple(maps.shape[2:])
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return q, k, v, grid, key_grid

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C], or tokens [B, N, C] to tokens with their `grid`."""
        tokens, place = _tokens(x, grid)
        out = self.mix(*self._project(tokens, place))
        return self.proj_drop(self.proj(out)).view(x.shape)

    def attention_weights(self, x: Tensor, grid: tuple[int, int] | None = None) -> AttentionRecord:
        """Weights of every query over the agents, and of every agent over the tokens, for the input of
        `forward`."""
        tokens, place = _tokens(x, grid)
        q, k, _, place, key_grid = self._project(tokens, place)
        weights, agents = self.mixing_weights(q, k, place, key_grid)
        return agent_record(weights if grid else weights.unflatten(1, place), agents, place)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the four products for an input of this shape, [B, Y, X, C] or [B, N, C]."""
        batch, *place, _ = shape
        tokens = math.prod(place)
        keys = math.prod(max(1, side // self.sr_ratio) for side in place)
        return self.mixing_macs(batch, tokens, keys)


def agent_record(weights: Tensor, agents: Tensor, grid: tuple[int, int]) -> AttentionRecord:
    """The record of queries over agents, on a map or as tokens, and of agents over tokens."""
    queries = ("row", "column") if weights.ndim == 5 else ("token",)
    return AttentionRecord(weights, ("batch", *queries, "head", "agent"), grid, grid, agents=agents)


def _tokens(x: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """A map as tokens with its size; tokens as they are."""
    return (x.flatten(1, 2), tuple(x.shape[1:3])) if grid is None else (x, grid)


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    """[.., .., Y, X] interpolated to another size, cell centres to cell centres."""
    if tuple(table.shape[-2:]) == size:
        return table
    return F.interpolate(table, size=size, mode="bilinear", align_corners=False)
