"""Bi-level routing attention by its definition: gather the tokens of the chosen regions, attend to these."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.bilevel.regions import to_map, to_regions
from zoo.kernels.softmax import softmax


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    scale: float,
    route_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, Hq, Dv] and the natural-log LSE [B, Y, X, Hq], in at least float32."""
    grid, shared = q.shape[1:3], q.shape[3] // k.shape[3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (to_regions(x, regions).to(dtype) for x in (q, k, v))  # [B, p, tokens, H, D]
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    k, v = k[image, routes], v[image, routes]  # [B, p, topk, tokens, Hkv, D]
    if route_weights is not None:
        weights = route_weights.to(dtype)[..., None, None, None]
        k, v = weights * k, weights * v
    k, v = (x.flatten(2, 3).repeat_interleave(shared, 3) for x in (k, v))

    logits = scale * torch.einsum("bpqhd,bpkhd->bpqhk", q, k)
    weights, lse = softmax(logits)
    out = torch.einsum("bpqhk,bpkhd->bpqhd", weights, v)
    return to_map(out, regions, grid), to_map(lse, regions, grid)
