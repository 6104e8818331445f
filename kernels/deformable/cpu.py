"""Deformable attention on a CPU: PyTorch's own sampling, a fused attention call where nothing forbids it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.deformable.reference import displacements


def deformable_sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample [B, Y, X, C] at [B, G, N, 2]: [B, N, C] in at least float32."""
    batch, groups = positions.shape[:2]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B * G, C / G, Y, X]
    dtype = torch.promote_types(x.dtype, torch.float32)
    taken = _grid_sample(maps.to(dtype), positions.to(dtype).flatten(0, 1)[:, None])[:, :, 0]
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
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, Y, X, H, Dv] and, where asked for, the natural-log LSE [B, Y, X, H]."""
    grid, shared = q.shape[1:3], q.shape[3] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    added = None if bias is None else bias.to(dtype)
    if table is not None:
        relative = _relative_bias(table.to(dtype), positions.to(dtype), grid, query_grid)
        added = relative if added is None else relative + added
    q, k, v = (x.transpose(1, 2) for x in (q.flatten(1, 2), k, v))  # [B, H, N, D]
    k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))

    if not return_lse and (added is None or not added.requires_grad):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        return out.transpose(1, 2).unflatten(1, grid), None
    # SDPA returns no LSE, and with a bias that wants a gradient it is slower than the plain form.
    logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
    logits = logits if added is None else logits + added
    out = (logits.softmax(dim=-1) @ v.to(dtype)).transpose(1, 2).unflatten(1, grid)
    lse = logits.logsumexp(dim=-1).transpose(1, 2).unflatten(1, grid) if return_lse else None
    return out, lse


def _relative_bias(table: Tensor, positions: Tensor, grid: tuple[int, int], query_grid: str) -> Tensor:
    """The table [H, Ty, Tx] at the displacement of every query from every key: [B, H, Y * X, N]."""
    batch, groups, keys = positions.shape[:3]
    apart = displacements(positions, grid, query_grid)  # [B, G, Q, N, 2]
    # The batch goes with the queries, so that the table is not repeated for it.
    bias = _grid_sample(table.unflatten(0, (groups, -1)), apart.transpose(0, 1).flatten(1, 2))
    return bias.flatten(0, 1).unflatten(1, (batch, -1)).transpose(0, 1)


def _grid_sample(maps: Tensor, positions: Tensor) -> Tensor:
    """Bilinear samples of [M, C, Y, X] at [M, Q, N, 2] in (row, column): [M, C, Q, N]."""
    return F.grid_sample(maps, positions.flip(-1), mode="bilinear", padding_mode="zeros", align_corners=True)
