"""Channel attention by its definition: channels attend to channels, over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the output [B, N, H, D] for q [B, N, H, D] and k, v [B, N, H, E], in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    weights = (scale * torch.einsum("bnhd,bnhe->bhde", q, k)).softmax(dim=-1)
    return torch.einsum("bhde,bnhe->bnhd", weights, v)
