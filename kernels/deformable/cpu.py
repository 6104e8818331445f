"""Deformable attention on a CPU: PyTorch's own sampling, a fused attention call where nothing forbids it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import all_finite, in_graph, learns, shows_values, widened
from zoo.kernels.deformable.reference import query_points
from zoo.kernels.fused import fused_attention
from zoo.kernels.softmax import softmax

PAIRS_AT_ONCE = 1 << 24  # queries times keys, heads and images: a large map is done in parts


def deformable_sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample [B, Y, X, C] at [B, G, N, 2]: [B, N, C] in at least float32."""
    batch, groups = positions.shape[:2]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B * G, C / G, Y, X]
    dtype = torch.promote_types(x.dtype, torch.float32)
    taken = _grid_sample(maps.to(dtype), positions.to(dtype).flip(-1).flatten(0, 1)[:, None])[:, :, 0]
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
    points = None
    if table is not None:
        table, positions = table.to(dtype), positions.to(dtype)
        points = query_points(grid, query_grid, positions)
    q, k, v = (x.transpose(1, 2) for x in widened(q.flatten(1, 2), k, v))  # [B, H, N, D]
    k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
    bias = None if bias is None else bias.to(dtype).expand(*q.shape[:3], k.shape[2])

    may_hide = bias is not None or not (table is None or (shows_values(table) and all_finite(table)))

    def attend(some: slice) -> tuple[Tensor, Tensor | None]:
        added = None if bias is None else bias[:, :, some]
        if table is not None:
            relative = _relative_bias(table, points[some], positions)
            added = relative if added is None else relative + added
        return _attend(q[:, :, some], k, v, added, scale, return_lse, may_hide)

    step = queries = q.shape[2]
    if not in_graph():  # a graph of a free batch cannot depend on its size
        step = max(1, PAIRS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [attend(slice(start, start + step)) for start in range(0, queries, step)]
    out, lse = (_cat(same) for same in zip(*parts, strict=True))
    return tuple(None if x is None else x.transpose(1, 2).unflatten(1, grid) for x in (out, lse))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool, may_hide: bool
) -> tuple[Tensor, Tensor | None]:
    """[B, H, N, D] in, [B, H, N, D] and [B, H, N] out; `may_hide`: the bias may hide every key."""
    # What is mapped does not tell whether it wants a gradient, and SDPA has none for a bias.
    mapped = torch._C._are_functorch_transforms_active()
    if not return_lse and (bias is None or not (learns(bias) or mapped)):
        return fused_attention(q, k, v, bias, scale), None
    # SDPA returns no LSE, and with a bias that wants a gradient it is slower than the plain form.
    logits = (q * scale) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    if not may_hide:
        return logits.softmax(dim=-1) @ v, logits.logsumexp(dim=-1) if return_lse else None
    weights, lse = softmax(logits)
    return weights @ v, lse if return_lse else None


def _relative_bias(table: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """The table [H, Ty, Tx] at the displacement of queries [Q, 2] from keys [B, G, N, 2]: [B, H, Q, N]."""
    # Halved and put in order while they are few, so that the large tensor is written once. The batch goes
    # with the queries, so that the table is not repeated for it.
    batch, groups = positions.shape[:2]
    queries, keys = queries.flip(-1) / 2, positions.flip(-1).transpose(0, 1) / 2
    apart = queries[:, None] - keys[:, :, None]  # [G, B, Q, N, 2], column first
    bias = _grid_sample(table.unflatten(0, (groups, -1)), apart.flatten(1, 2))
    return bias.flatten(0, 1).unflatten(1, (batch, len(queries))).transpose(0, 1)


def _cat(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 2)


def _grid_sample(maps: Tensor, positions: Tensor) -> Tensor:
    """Bilinear samples of [M, C, Y, X] at [M, Q, N, 2] in (column, row): [M, C, Q, N]."""
    return F.grid_sample(maps, positions, mode="bilinear", padding_mode="zeros", align_corners=True)
