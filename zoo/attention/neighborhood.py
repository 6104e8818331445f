"""Neighborhood attention as a module: projections and the relative positional bias around the operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.errors import ConfigError, at_least


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every token to its `kernel_size` x `kernel_size` neighborhood.

    Shapes: [B, Y, X, C] in and out. A map smaller than kernel_size * dilation is padded with zeros at the
    bottom and right before the projection, so padded tokens carry its bias and are attended, as the
    published models do. Units: `dilation` in tokens; "largest" takes the largest that fits the map, min(Y,
    X) // kernel_size. Raises: ConfigError when num_heads does not divide dim, and for a size that is none.
    Source: Hassani et al. 2023 (arXiv:2204.07143) Sec. 3; dilation: Hassani & Shi 2022 (arXiv:2209.15001).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 7,
        dilation: int | str = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        rel_pos_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if dilation != "largest":
            at_least(1, dilation=dilation)
        at_least(2, kernel_size=kernel_size)
        self.dim, self.num_heads = dim, num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            side = 2 * kernel_size - 1
            self.rpb = nn.Parameter(torch.empty(num_heads, side, side, **factory))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def dilation_for(self, rows: int, columns: int) -> int:
        """The dilation on a map of this size."""
        if self.dilation == "largest":
            return max(1, min(rows, columns) // self.kernel_size)
        return self.dilation

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Pad where needed and project: q, k, v as [B, Y, X, H, D], and the dilation."""
        rows, columns = x.shape[1:3]
        dilation = self.dilation_for(rows, columns)
        least = self.kernel_size * dilation
        if rows < least or columns < least:
            x = F.pad(x, (0, 0, 0, max(0, least - columns), 0, max(0, least - rows)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v, dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        rows, columns = x.shape[1:3]
        q, k, v, dilation = self._project(x)
        x = ops.neighborhood_attention(
            q, k, v, self.kernel_size, dilation=dilation, scale=self.scale, rpb=self.rpb
        )
        return self.proj_drop(self.proj(x[:, :rows, :columns].flatten(-2)))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over its keys for the input [B, Y, X, C] of `forward`."""
        q, k, _, dilation = self._project(x)
        grid = tuple(q.shape[1:3])
        keys = ops.neighborhood_indices(grid, self.kernel_size, dilation=dilation).to(q.device)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(x.device.type, enabled=False):
            q, k = (each.float().flatten(1, 2) for each in (q, k))
            logits = torch.einsum("bnhd,bnkhd->bnhk", scale * q, k[:, keys])
        if self.rpb is not None:
            query = torch.arange(len(keys), device=keys.device)[:, None]
            y, x_ = (
                (key - own) // dilation + self.kernel_size - 1
                for key, own in (
                    (keys // grid[1], query // grid[1]),
                    (keys % grid[1], query % grid[1]),
                )
            )
            logits = logits + self.rpb[:, y, x_].permute(1, 0, 2)
        weights = logits.softmax(-1).unflatten(1, grid)
        axes = ("batch", "row", "column", "head", "key")
        return AttentionRecord(weights, axes, grid, tuple(x.shape[1:3]), keys)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, channels = shape
        return 2 * batch * rows * columns * channels * self.kernel_size**2

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
