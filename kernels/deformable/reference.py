"""Deformable attention by its definition: interpolate, softmax over all sampled keys, sum their values.

Positions are (row, column) between -1, the centre of the first token of an axis, and 1, that of the last.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from zoo.kernels.softmax import softmax


def deformable_sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample [B, Y, X, C] at [B, G, N, 2]: [B, N, C] in at least float32, each group its own channels."""
    batch, groups = positions.shape[:2]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B * G, C / G, Y, X]
    taken = interpolate(maps.to(torch.promote_types(x.dtype, torch.float32)), positions.flatten(0, 1))
    return taken.unflatten(0, (batch, groups)).permute(0, 3, 1, 2).flatten(2)


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    query_grid: str,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] and the natural-log LSE [B, Y, X, H], in at least float32."""
    grid, shared = q.shape[1:3], q.shape[3] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.flatten(1, 2).to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)

    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if table is not None:
        batch, groups = positions.shape[:2]
        positions = positions.to(dtype)
        apart = displacements(query_points(grid, query_grid, positions), positions)  # [B, G, Q, N, 2]
        maps = table.to(dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1)
        relative = interpolate(maps.flatten(0, 1), apart.flatten(0, 1).flatten(1, 2))
        logits = logits + relative.view(logits.shape)
    if bias is not None:
        logits = logits + bias.to(dtype)

    weights, lse = softmax(logits)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out.unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def query_points(grid: tuple[int, int], query_grid: str, like: Tensor) -> Tensor:
    """Where the tokens of a map are taken to lie, row by row, between -1 and 1: [Y * X, 2]."""
    axes = []
    for length in grid:
        token = torch.arange(length, dtype=like.dtype, device=like.device)
        if query_grid == "centres":
            axes.append((2 * token + 1) / length - 1)
        else:
            axes.append(2 * token / (length - 1) - 1 if length > 1 else token)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def displacements(queries: Tensor, positions: Tensor) -> Tensor:
    """Half of query [Q, 2] minus key [B, G, N, 2], within -1 and 1 for keys on the map: [B, G, Q, N, 2]."""
    return (queries[:, None] - positions[:, :, None]) / 2


def interpolate(maps: Tensor, positions: Tensor) -> Tensor:
    """Bilinear samples of [M, C, Y, X] at [M, N, 2]: [M, C, N]; beyond the map it is zero."""
    lengths = maps.shape[-2:]
    pixels = [(positions[..., a].to(maps.dtype) + 1) / 2 * (lengths[a] - 1) for a in (0, 1)]
    lower = [pixel.detach().floor() for pixel in pixels]
    out = 0
    for corner in product((0, 1), repeat=2):
        weight, index = 1, 0
        for pixel, low, step, length in zip(pixels, lower, corner, lengths, strict=True):
            token = low + step
            share = pixel - low if step else 1 - (pixel - low)
            weight = weight * torch.where((token >= 0) & (token < length), share, 0)
            index = index * length + token.nan_to_num().clamp(0, length - 1).long()
        taken = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))
        out = out + weight[:, None] * taken
    return out
