"""Neighborhood attention by its definition: gather each query's keys, softmax over them, sum their values."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.neighborhood.geometry import Axis, keys_of
from zoo.kernels.softmax import softmax


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, *grid, Hq, Dv] and the natural-log LSE [B, *grid, Hq], in at least float32."""
    grid, heads, kv_heads = q.shape[1:-2], q.shape[-2], k.shape[-2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    index, visible = (table.to(q.device) for table in keys_of(axes))
    q, k, v = (x.flatten(1, -3).to(dtype) for x in (q, k, v))  # [B, N, H, D]
    q = q.unflatten(2, (kv_heads, heads // kv_heads))  # [B, N, Hkv, G, D]: query head h uses kv head h // G

    logits = scale * torch.einsum("bnhgd,bnkhd->bnhgk", q, k[:, index])
    if rpb is not None:
        bias = rpb.flatten(1).to(dtype)[:, _relative(index, axes)]  # [Hq, N, K]
        logits = logits + bias.unflatten(0, (kv_heads, -1)).permute(2, 0, 1, 3)
    logits = logits.masked_fill(~visible[:, None, None, :], float("-inf"))
    if extra_k is not None:
        extra = scale * torch.einsum("bnhgd,bkhd->bnhgk", q, extra_k.to(dtype))
        logits = torch.cat([logits, extra], dim=-1)

    weights, lse = softmax(logits)
    slots = index.shape[1]
    out = torch.einsum("bnhgk,bnkhd->bnhgd", weights[..., :slots], v[:, index])
    if extra_v is not None:
        out = out + torch.einsum("bnhgk,bkhd->bnhgd", weights[..., slots:], extra_v.to(dtype))
    return out.flatten(2, 3).unflatten(1, grid), lse.flatten(2, 3).unflatten(1, grid)


def _relative(index: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Flat index into the bias table: (key - query) / dilation + kernel_size - 1 on every axis, [N, K]."""
    flat = torch.zeros_like(index)
    query = torch.arange(index.shape[0], device=index.device)[:, None]
    steps = index.shape[0]
    for axis in axes:
        steps //= axis.length
        apart = index // steps % axis.length - query // steps % axis.length
        flat = flat * (2 * axis.kernel_size - 1) + apart // axis.dilation + axis.kernel_size - 1
    return flat
