"""Attention of all to all through PyTorch's fused attention, on any device."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.checks import widened
from zoo.kernels.fused import fused_attention


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Return the output [B, N, Hq, Dv]; values behind the mask are zero."""
    q, k, v = widened(q, k, v)
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None]  # [B, 1, 1, M]
        # PyTorch does not say what attention to nothing is; to all of these values it is 0.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    shared = {"enable_gqa": True} if q.shape[2] > k.shape[2] else {}  # a branch: a symbol is no answer
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return fused_attention(q, k, v, mask, scale, **shared).transpose(1, 2)
