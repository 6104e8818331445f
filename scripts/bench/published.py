"""Operations as their authors published them, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_regions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    scale: float | None = None,
) -> Tensor:
    """Copy the keys and values of the chosen regions for every region, then two products, as published."""
    batch, rows, columns, heads, width = q.shape
    parts, topk = routes.shape[1:]
    scale = width**-0.5 if scale is None else scale
    down, across = (regions, regions) if isinstance(regions, int) else regions

    def cut(x: Tensor) -> Tensor:  # [B, Y, X, C] to [B, p, tokens, C]
        x = x.unflatten(2, (across, -1)).unflatten(1, (down, -1))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    q, kv = cut(q.flatten(3)), cut(torch.cat([k.flatten(3), v.flatten(3)], dim=-1))
    tokens, both = kv.shape[2:]
    kv = kv[:, None].expand(-1, parts, -1, -1, -1)
    kv = kv.gather(2, routes[..., None, None].expand(-1, -1, -1, tokens, both))
    k, v = kv.unflatten(-1, (2, heads, width)).flatten(2, 3).unbind(3)  # [B, p, topk * tokens, H, D]
    q = q.unflatten(-1, (heads, width)).transpose(2, 3)
    weights = ((q * scale) @ k.permute(0, 1, 3, 4, 2)).softmax(dim=-1)
    out = (weights @ v.transpose(2, 3)).transpose(2, 3)
    out = out.unflatten(2, (rows // down, -1)).unflatten(1, (down, across))
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
