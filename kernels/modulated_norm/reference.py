"""The modulated norm by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, centered: bool) -> Tensor:
    """Return norm(x) (1 + scale) + shift for x [B, N, C], scale and shift [B, C], in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, scale, shift = x.to(dtype), scale.to(dtype)[:, None], shift.to(dtype)[:, None]
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + scale) + shift
