"""Operations as their authors published them, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


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


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, window_size: int, *, bias: Tensor) -> Tensor:
    """Cut every map into windows, two products around a softmax with a bias [H, T, T], join the windows."""
    batch, rows, columns, heads, width = q.shape
    down, across = rows // window_size, columns // window_size

    def cut(x: Tensor) -> Tensor:
        x = x.reshape(batch, down, window_size, across, window_size, heads * width).transpose(2, 3)
        return x.reshape(-1, window_size**2, heads, width).transpose(1, 2)

    q, k, v = cut(q), cut(k), cut(v)
    weights = ((q * width**-0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, down, across, window_size, window_size, heads * width)
    return out.transpose(2, 3).reshape(batch, rows, columns, heads, width)


def attend_between_channels(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Two products around a softmax over channels, heads first: [B, N, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = ((q * scale).transpose(-2, -1) @ k).softmax(dim=-1)
    return (weights @ v.transpose(-2, -1)).transpose(-2, -1).transpose(1, 2)


def attend_through_agents(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, bias_in: Tensor, bias_out: Tensor
) -> Tensor:
    """Two products around a softmax from agents to tokens, and two from tokens to agents: [B, N, H, D]."""
    scale = q.shape[-1] ** -0.5
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    gathered = ((agents * scale) @ k.transpose(-2, -1) + bias_in).softmax(dim=-1) @ v
    return (((q * scale) @ agents.transpose(-2, -1) + bias_out).softmax(dim=-1) @ gathered).transpose(1, 2)


def attend_to_samples(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """The displacements of all pairs, read from the table, then two einsums around a softmax; "corners"."""
    (batch, rows, columns, heads, width), groups = q.shape, positions.shape[1]
    places = [torch.linspace(-1, 1, length, dtype=q.dtype) for length in (rows, columns)]
    places = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).flatten(0, 1)  # [Y * X, 2]
    apart = (places[None, :, None] - positions.flatten(0, 1)[:, None]) * 0.5  # [B * G, Y * X, N, 2]
    tables = table[None].expand(batch, -1, -1, -1).reshape(batch * groups, -1, *table.shape[1:])
    bias = grid_sample(tables, apart[..., (1, 0)], mode="bilinear", align_corners=True).flatten(0, 1)
    q, k, v = (x.permute(0, 2, 3, 1).reshape(batch * heads, width, -1) for x in (q.flatten(1, 2), k, v))
    logits = torch.einsum("bcm,bcn->bmn", q, k) * width**-0.5
    out = torch.einsum("bmn,bcn->bcm", (logits + bias).softmax(dim=2), v)
    return out.reshape(batch, heads, width, rows, columns).permute(0, 3, 4, 1, 2)
