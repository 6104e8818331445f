"""Attention of all to all by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.softmax import softmax


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Hq, Dv] and the natural-log LSE [B, N, Hq], in at least float32."""
    shared = q.shape[2] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))

    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
    if key_mask is None:
        key_mask = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    weights, lse = softmax(logits)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), lse.transpose(1, 2)
