"""Aligned attention by its definition: gather each query's keys, softmax over them, sum their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.softmax import softmax


def aligned_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] and the natural-log LSE [B, *grid, Hq], in at least float32."""
    grid, shared = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype).flatten(1, -3) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    index, visible = keys_of(grid, radius, q.device)

    logits = scale * torch.einsum("bnhd,bnshd->bnhs", q, k[:, index])
    # A slot beyond the border repeats a key that has no weight; every query sees at least its own place.
    weights, lse = softmax(logits.masked_fill(~visible[:, None], float("-inf")))
    values = v[:, index].masked_fill(~visible[..., None, None], 0.0)  # infinity times no weight is NaN
    out = torch.einsum("bnhs,bnshd->bnhd", weights, values)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def keys_of(
    grid: Sequence[int], radius: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Which keys every query sees: flat places [N, slots], and which of them lie inside the grid."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)
    for length, reach in zip(grid, radius, strict=True):
        key = torch.arange(length, device=device)[:, None] + torch.arange(-reach, reach + 1, device=device)
        inside = (key >= 0) & (key < length)
        key = key.clamp(0, length - 1)
        # Rows of two axes become the rows of their grid in row-major order, and so do the slots.
        index = (index[:, None, :, None] * length + key[:, None, :]).flatten(2).flatten(0, 1)
        visible = (visible[:, None, :, None] & inside[:, None, :]).flatten(2).flatten(0, 1)
    return index, visible
