"""Bi-level routing attention as modules, in its two published forms: projections, regions, routing and LePE
around the operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.attention.layers import Pointwise, lepe
from zoo.errors import ConfigError, at_least
from zoo.kernels.bilevel.regions import to_map, to_regions

POOLS = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


class BilevelRoutingAttention(nn.Module):
    """Attention of every token to the `topk` regions that suit its own region best, one choice for all heads.

    Shapes: [B, Y, X, C] in and out. The map is cut into `n_win` x `n_win` regions whatever its size, padded
    with zeros at the bottom and right before the projection where that does not divide it: padded tokens
    carry the bias, count in the region means and are attended, as in the published models. A depthwise
    convolution of the values (LePE, `side_dwconv` tokens wide, 0: none) is added to the result.

    The choice is hard: near ties fall otherwise in another precision, and the result with them. Regions are
    compared by detached means. `soft_routing` weighs keys and values of a region by the softmax of its
    affinity; only then can `diff_routing` (means keep their gradient) and `param_routing` (a learned
    projection of the means) do anything. `kv_downsample_mode` pools keys and values inside every region: to
    `kv_per_win` x `kv_per_win` tokens (ada_avgpool, ada_maxpool) or by `kv_downsample_ratio` (avgpool,
    maxpool).
    Units: `qk_dim` in channels of all heads, C by default; logits are scaled by qk_dim**-0.5, not by the
    width of a head, as published. Where there are fewer than `topk` regions, all are taken.
    Raises: ConfigError for arguments that do not fit each other.
    Source: Zhu et al. 2023 (arXiv:2303.08810) Sec. 3.2; LePE: Dong et al. 2022 (arXiv:2107.00652) Sec. 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        side_dwconv: int = 5,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        kv_downsample_mode: str = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        qk_dim = dim if qk_dim is None else qk_dim
        if dim % num_heads or qk_dim % num_heads:
            raise ConfigError(f"dim {dim} and qk_dim {qk_dim} must be multiples of num_heads {num_heads}")
        at_least(1, n_win=n_win, topk=topk, kv_per_win=kv_per_win, kv_downsample_ratio=kv_downsample_ratio)
        if (diff_routing or param_routing) and not soft_routing:
            raise ConfigError(
                "diff_routing and param_routing need soft_routing: a hard choice carries no gradient"
            )
        if kv_downsample_mode not in POOLS:
            raise ConfigError(
                f"kv_downsample_mode must be one of {', '.join(POOLS)}, found {kv_downsample_mode!r}"
            )
        self.dim, self.num_heads, self.qk_dim = dim, num_heads, qk_dim
        self.n_win, self.topk = n_win, topk
        self.scale = qk_dim**-0.5 if scale is None else scale
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.kv_downsample_mode = kv_downsample_mode
        self.kv_per_win, self.kv_downsample_ratio = kv_per_win, kv_downsample_ratio
        self.lepe = lepe(dim, side_dwconv, **factory) if side_dwconv else None
        self._add_projections(2 * qk_dim + dim, qkv_bias, **factory)
        self.router = nn.ModuleDict({"emb": nn.Linear(qk_dim, qk_dim, **factory)}) if param_routing else None
        self.proj_drop = nn.Dropout(proj_drop)

    def _add_projections(self, channels: int, bias: bool, **factory: object) -> None:
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(self.dim, channels, bias=bias, **factory)})
        self.wo = nn.Linear(self.dim, self.dim, **factory)

    @property
    def _projections(self) -> tuple[nn.Module, nn.Module]:
        """The projection to q, k and v and the one of the result, as published files call them."""
        return self.qkv["qkv"], self.wo

    def regions_for(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Regions along both axes of a map of this size, and the size that it is padded to."""
        regions = (self.n_win, self.n_win)
        return regions, (rows + -rows % self.n_win, columns + -columns % self.n_win)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]:
        """Pad and project: q, k, v as [B, Y, X, H, D], the regions, and which part counts in their means."""
        regions, size = self.regions_for(*x.shape[1:3])
        return *self._heads(self._projections[0](_pad(x, size))), regions, size

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in parts)

    def _route(
        self, q: Tensor, k: Tensor, regions: tuple[int, int], counted: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Chosen regions [B, p, topk] and their weights, None where the choice is hard."""
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        q, k = (ops.region_means(x, regions, image=counted) for x in (q, k))
        if self.router is not None:
            emb = self.router["emb"]
            q, k = (emb(x.flatten(3).to(emb.weight.dtype)).view_as(x) for x in (q, k))
        topk = min(self.topk, regions[0] * regions[1])
        routes, affinities = ops.route(q, k, regions, topk, scale=self.scale)
        return routes, affinities.softmax(dim=-1) if self.soft_routing else None

    def _pool(self, x: Tensor, regions: tuple[int, int]) -> Tensor:
        """Pool inside every region, [B, Y, X, H, D] in and out."""
        if self.kv_downsample_mode == "identity":
            return x
        heads, (rows, columns) = x.shape[3:], regions
        x = x.flatten(3).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)  # [B * regions, C, rows and columns of a region]
        pool = {
            "ada_avgpool": F.adaptive_avg_pool2d,
            "ada_maxpool": F.adaptive_max_pool2d,
            "avgpool": F.avg_pool2d,
            "maxpool": F.max_pool2d,
        }[self.kv_downsample_mode]
        adaptive = self.kv_downsample_mode.startswith("ada")
        if not adaptive and min(x.shape[2:]) < self.kv_downsample_ratio:
            raise ConfigError(
                f"kv_downsample_ratio {self.kv_downsample_ratio} leaves no token of regions of "
                f"{x.shape[2]} x {x.shape[3]}; take a smaller one, or fewer regions (n_win)"
            )
        x = pool(x, self.kv_per_win if adaptive else self.kv_downsample_ratio)
        x = x.unflatten(0, (-1, rows, columns)).permute(0, 1, 4, 2, 5, 3)
        return x.flatten(3, 4).flatten(1, 2).unflatten(-1, heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        rows, columns = x.shape[1:3]
        q, k, v, regions, counted = self._project(x)
        routes, weights = self._route(q, k, regions, counted)
        out = ops.bilevel_routing_attention(
            q,
            self._pool(k, regions),
            self._pool(v, regions),
            routes,
            regions,
            scale=self.scale,
            route_weights=weights,
        ).flatten(-2)
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(-2))
        return self.proj_drop(self._projections[1](out[:, :rows, :columns]))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over the tokens of its regions for the input [B, Y, X, C] of `forward`."""
        q, k, _, regions, counted = self._project(x)
        routes, weights = self._route(q, k, regions, counted)
        pooled, grid = self._pool(k, regions), tuple(q.shape[1:3])
        image = torch.arange(len(q), device=q.device)[:, None, None]
        chosen = to_regions(pooled, regions)[image, routes].float()  # [B, p, topk, tokens, H, D]
        if weights is not None:
            chosen = weights[..., None, None, None] * chosen
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.einsum("bpqhd,bpkhd->bpqhk", to_regions(q, regions).float(), chosen.flatten(2, 3))
        keys = None
        if self.kv_downsample_mode == "identity":
            tokens = torch.arange(grid[0] * grid[1], device=q.device).view(1, *grid)
            tokens = to_regions(tokens, regions)[0][routes].flatten(2)  # [B, p, topk * tokens]
            tokens = tokens[:, :, None].expand(-1, -1, logits.shape[2], -1)
            keys = to_map(tokens, regions, grid).flatten(1, 2)
        weights = to_map((self.scale * logits).softmax(dim=-1), regions, grid)
        axes = ("batch", "row", "column", "head", "key")
        return AttentionRecord(weights, axes, grid, tuple(x.shape[1:3]), keys)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of routing and both products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, _ = shape
        regions, size = self.regions_for(rows, columns)
        parts, tokens = regions[0] * regions[1], size[0] * size[1]
        sides = [length // count for length, count in zip(size, regions, strict=True)]
        if self.kv_downsample_mode.startswith("ada"):
            sides = [self.kv_per_win] * 2
        elif self.kv_downsample_mode != "identity":
            sides = [side // self.kv_downsample_ratio for side in sides]
        keys = min(self.topk, parts) * sides[0] * sides[1]
        return batch * (parts**2 * self.qk_dim + tokens * keys * (self.qk_dim + self.dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}"


class RaggedRoutingAttention(BilevelRoutingAttention):
    """Bi-level routing attention with ragged regions at the border, the other published form.

    Regions are as large as whole ones of `n_win` x `n_win` would be, so a map that they do not divide has
    more of them. They are filled with zeros after the projection: these count in no mean, but still take
    their share of the softmax, as published. Where n_win divides the map this is `BilevelRoutingAttention`.
    """

    def _add_projections(self, channels: int, bias: bool, **factory: object) -> None:
        self.qkv_linear = Pointwise(self.dim, channels, bias=bias, **factory)
        self.output_linear = Pointwise(self.dim, self.dim, **factory)

    @property
    def _projections(self) -> tuple[nn.Module, nn.Module]:
        return self.qkv_linear, self.output_linear

    def regions_for(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        sizes = [max(1, length // self.n_win) for length in (rows, columns)]
        regions = tuple(-(-length // size) for length, size in zip((rows, columns), sizes, strict=True))
        return regions, (regions[0] * sizes[0], regions[1] * sizes[1])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]:
        counted = tuple(x.shape[1:3])
        regions, size = self.regions_for(*counted)
        return *self._heads(_pad(self._projections[0](x), size)), regions, counted


def _pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, Y, X, C] with zeros at the bottom and right up to `size`."""
    down, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
