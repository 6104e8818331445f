"""Aligned attention by shifts: one pass over the grid for each offset, nothing gathered.

Logits of all offsets, [slots, B, *grid, H], are all that is kept beside inputs and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor


def aligned_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] and the natural-log LSE [B, *grid, Hq], in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    kv_heads = k.shape[-2]
    q = q.unflatten(-2, (kv_heads, -1)) * scale  # [B, *grid, Hkv, G, D]
    k, v = k.unsqueeze(-2), v.unsqueeze(-2)
    if not any(radius):
        # The softmax of a single logit is 1, whatever the query.
        lse = (q * k).sum(dim=-1)
        return v.expand(*q.shape[:-1], -1).flatten(-3, -2), lse.flatten(-2)

    grid = q.shape[1:-3]
    shifts = list(_shifts(grid, radius))
    rows = []
    for here, there in shifts:
        row = q.new_full(q.shape[:-1], float("-inf"))
        row[here] = (q[here] * k[there]).sum(dim=-1)
        rows.append(row)
    logits = torch.stack(rows)
    lse = logits.logsumexp(dim=0)
    weights = logits.softmax(dim=0)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for (here, there), weight in zip(shifts, weights, strict=True):
        out[here] = out[here] + weight[here][..., None] * v[there]
    return out.flatten(-3, -2), lse.flatten(-2)


def _shifts(
    grid: tuple[int, ...], radius: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For every offset: the queries whose key lies inside the grid, and those keys."""
    for offset in product(*(range(-reach, reach + 1) for reach in radius)):
        if any(abs(step) >= length for step, length in zip(offset, grid, strict=True)):
            continue
        here, there = [slice(None)], [slice(None)]
        for step, length in zip(offset, grid, strict=True):
            here.append(slice(max(0, -step), length - max(0, step)))
            there.append(slice(max(0, step), length - max(0, -step)))
        yield tuple(here), tuple(there)
